//! The manifest: length and SHA-256 of every file of a checkpoint, and the check of a directory against it.

use crate::{CheckpointError, MANIFEST_FILE, MODEL_FILE};
use serde::{Deserialize, Serialize};
use sha2::{Digest, Sha256};
use std::collections::BTreeMap;
use std::fs::File;
use std::io::{self, Read};
use std::path::Path;

/// Raised when the layout changes; other layouts are refused.
pub(crate) const FORMAT: &str = "fleet-checkpoint/1";

/// What the formats of all versions begin with.
const FORMATS: &str = "fleet-checkpoint/";

const KEYS: [&str; 6] = ["format", "step", "serial", "loss", "run", "files"];

/// No honest manifest is near this many bytes; more is not read.
const MANIFEST_MAX: u64 = 1 << 20;

/// A checkpoint has some twenty files; a manifest that names more than this is not one of ours, and each file costs a thread.
const FILES_MAX: usize = 64;

/// Bytes hashed at a time.
const HASH_CHUNK: usize = 1 << 20;

#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Manifest {
    /// `fleet-checkpoint/1`.
    pub format: String,
    /// Optimizer steps done.
    pub step: u64,
    /// Rises with every checkpoint of a directory; the highest is the newest, also after a run was started over.
    pub serial: u64,
    /// Training loss of the last step, in nats; `None` where it was not a number.
    pub loss: Option<f64>,
    /// The run that wrote it, and whose continuations may remove it. Empty where an early fleet did not say.
    #[serde(default)]
    pub run: String,
    /// By name, without the manifest itself.
    pub files: BTreeMap<String, ManifestFile>,
}

#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct ManifestFile {
    pub bytes: u64,
    /// Hex.
    pub sha256: String,
}

/// Why a manifest is not taken.
#[derive(Debug)]
pub(crate) enum Flaw {
    Damage(String),
    /// Another version of fleet may read it.
    Version(String),
}

impl Manifest {
    /// Of all files together, in bytes.
    pub fn bytes(&self) -> u64 {
        self.files.values().fold(0u64, |sum, f| sum.saturating_add(f.bytes))
    }

    /// Whether `dir` has all the files, of the lengths that they should have.
    pub(crate) fn fits(&self, dir: &Path) -> bool {
        let has =
            |name: &String| std::fs::symlink_metadata(dir.join(name)).ok().filter(|found| found.is_file());
        self.files.iter().all(|(name, file)| has(name).is_some_and(|found| found.len() == file.bytes))
    }

    pub(crate) fn parse(bytes: &[u8]) -> Result<Manifest, Flaw> {
        let damaged = |e| Flaw::Damage(format!("{MANIFEST_FILE} cannot be read: {e}"));
        // What another version wrote is told from damage before anything else of it is believed.
        let all: serde_json::Map<String, serde_json::Value> =
            serde_json::from_slice(bytes).map_err(damaged)?;
        match all.get("format").and_then(|format| format.as_str()) {
            Some(format) if format != FORMAT && format.starts_with(FORMATS) => {
                return Err(Flaw::Version(format!(
                    "its format is `{format}` and this fleet reads `{FORMAT}`"
                )));
            }
            _ => {}
        }
        if let Some(key) = all.keys().find(|key| !KEYS.contains(&key.as_str())) {
            let what = format!(
                "its {MANIFEST_FILE} has the key `{}`, which this fleet does not know",
                key.escape_default()
            );
            return Err(Flaw::Version(what));
        }
        let manifest: Manifest = serde_json::from_value(all.into()).map_err(damaged)?;
        if manifest.format != FORMAT {
            return Err(Flaw::Damage(format!("its format is `{}`", manifest.format)));
        }
        if manifest.files.len() > FILES_MAX {
            return Err(Flaw::Damage(format!("{MANIFEST_FILE} names {} files", manifest.files.len())));
        }
        for name in manifest.files.keys() {
            if name.is_empty() || name == "." || name == ".." || name.contains(['/', '\\', '\0']) {
                let what = format!("{MANIFEST_FILE} names a file `{}`", name.escape_default());
                return Err(Flaw::Damage(what));
            }
        }
        Ok(manifest)
    }

    /// Reads the manifest of a checkpoint directory without checking the files it names.
    pub fn read(dir: &Path) -> Result<Manifest, CheckpointError> {
        let bytes = manifest_bytes(dir)?;
        Manifest::parse(&bytes).map_err(|flaw| match flaw {
            Flaw::Damage(what) => CheckpointError::damaged(dir, what),
            Flaw::Version(what) => CheckpointError::OtherVersion { path: dir.to_owned(), what },
        })
    }
}

/// SHA-256 of the manifest file, in hex: what a `CheckpointRecord` holds.
pub fn manifest_sha256(dir: &Path) -> Result<String, CheckpointError> {
    Ok(hex::encode(Sha256::digest(manifest_bytes(dir)?)))
}

/// Checks that `dir` is a checkpoint of fleet and that every file has the length and hash it was written with. Reads all of it.
pub fn verify(dir: &Path) -> Result<Manifest, CheckpointError> {
    let manifest = Manifest::read(dir)?;
    let checks = std::thread::scope(|scope| {
        let threads: Vec<_> = manifest
            .files
            .iter()
            .map(|(name, expected)| scope.spawn(move || check_file(dir, name, expected)))
            .collect();
        threads.into_iter().map(|t| t.join()).collect::<Vec<_>>()
    });
    for check in checks {
        check.unwrap_or_else(|panic| std::panic::resume_unwind(panic))?;
    }
    Ok(manifest)
}

fn check_file(dir: &Path, name: &str, expected: &ManifestFile) -> Result<(), CheckpointError> {
    let path = dir.join(name);
    let file = match File::open(&path) {
        Ok(file) => file,
        Err(e) if e.kind() == io::ErrorKind::NotFound => {
            return Err(CheckpointError::damaged(dir, format!("{name} is missing")));
        }
        Err(e) => return Err(CheckpointError::read(&path, e)),
    };
    let bytes = file.metadata().map_err(|e| CheckpointError::read(&path, e))?.len();
    if bytes != expected.bytes {
        let what = format!("{name} has {bytes} bytes and should have {}", expected.bytes);
        return Err(CheckpointError::damaged(dir, what));
    }
    let found = hash_reader(file).map_err(|e| CheckpointError::read(&path, e))?;
    if found != expected.sha256 {
        return Err(CheckpointError::damaged(
            dir,
            format!("the contents of {name} have changed since it was written"),
        ));
    }
    Ok(())
}

fn hash_reader(mut reader: impl Read) -> io::Result<String> {
    let mut hasher = Sha256::new();
    let mut chunk = vec![0u8; HASH_CHUNK];
    loop {
        match reader.read(&mut chunk)? {
            0 => return Ok(hex::encode(hasher.finalize())),
            n => hasher.update(&chunk[..n]),
        }
    }
}

fn manifest_bytes(dir: &Path) -> Result<Vec<u8>, CheckpointError> {
    let path = dir.join(MANIFEST_FILE);
    let file = match File::open(&path) {
        Ok(file) => file,
        Err(_) if !dir.exists() => return Err(CheckpointError::Missing(dir.to_owned())),
        Err(_) if !dir.is_dir() => {
            let what = "it is a single file (a Lightning .ckpt or a PyTorch .pt holds pickled Python objects, which fleet does not \
                        read); name a directory step-* that fleet wrote";
            return Err(CheckpointError::foreign(dir, what));
        }
        Err(e) if e.kind() == io::ErrorKind::NotFound => return Err(no_manifest(dir)),
        Err(e) => return Err(CheckpointError::read(&path, e)),
    };
    let mut bytes = Vec::new();
    file.take(MANIFEST_MAX + 1).read_to_end(&mut bytes).map_err(|e| CheckpointError::read(&path, e))?;
    if bytes.len() as u64 > MANIFEST_MAX {
        return Err(CheckpointError::damaged(
            dir,
            format!("{MANIFEST_FILE} is larger than {MANIFEST_MAX} bytes"),
        ));
    }
    Ok(bytes)
}

/// Says what a directory without a manifest seems to be.
fn no_manifest(dir: &Path) -> CheckpointError {
    let steps = crate::search::by_age(dir).unwrap_or_default();
    if let Some(newest) = steps.iter().rev().find(|found| found.seems_whole()) {
        let what = format!("it holds checkpoints; name one of them, such as {}", newest.name());
        return CheckpointError::foreign(dir, what);
    }
    if !steps.is_empty() {
        return CheckpointError::foreign(dir, "it holds checkpoints, and none of them is whole");
    }
    let weights = [MODEL_FILE, "model.safetensors.index.json", "pytorch_model.bin"];
    if let Some(name) = weights.iter().find(|name| dir.join(name).exists()) {
        let what = format!(
            "it has {name} but no {MANIFEST_FILE}, as a Hugging Face model has; to start from its weights set model.path \
             to it and leave resume_from_checkpoint out"
        );
        return CheckpointError::foreign(dir, what);
    }
    CheckpointError::foreign(dir, format!("it has no {MANIFEST_FILE}"))
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    proptest! {
        #[test]
        fn arbitrary_bytes_are_refused_without_a_panic(bytes in proptest::collection::vec(any::<u8>(), 0..400)) {
            prop_assert!(Manifest::parse(&bytes).is_err());
        }

        #[test]
        fn a_manifest_with_a_changed_byte_never_panics(at in 0usize..200, byte: u8) {
            let files = [("model.safetensors".to_owned(), ManifestFile { bytes: 7, sha256: "00".into() })].into();
            let manifest = Manifest { format: FORMAT.into(), step: 3, serial: 1, loss: Some(1.5), run: "c/job-1".into(), files };
            let mut bytes = serde_json::to_vec(&manifest).unwrap();
            prop_assert_eq!(Manifest::parse(&bytes).unwrap(), manifest);
            let at = at % bytes.len();
            bytes[at] = byte;
            let _ = Manifest::parse(&bytes);
        }
    }

    /// As checkpoints on users' disks have it: a change that does not read this needs a new `FORMAT` and a reader of the old one.
    #[test]
    fn the_layout_on_disk_never_changes() {
        let text = r#"{"format":"fleet-checkpoint/1","step":100,"serial":2,"loss":null,"run":"c/job-1",
            "files":{"config.json":{"bytes":12,"sha256":"ab"}}}"#;
        let manifest = Manifest::parse(text.as_bytes()).unwrap();
        assert_eq!((manifest.step, manifest.serial, manifest.loss, manifest.bytes()), (100, 2, None, 12));
        let early = text.replace(r#","run":"c/job-1""#, "");
        assert_eq!(
            Manifest { run: String::new(), ..manifest.clone() },
            Manifest::parse(early.as_bytes()).unwrap()
        );
        let written: serde_json::Value = serde_json::to_value(&manifest).unwrap();
        assert_eq!(written, serde_json::from_str::<serde_json::Value>(text).unwrap());
    }

    #[test]
    fn names_that_leave_the_directory_are_refused() {
        for name in ["../x", "a/b", "..", "", "/etc/passwd"] {
            let text = format!(
                r#"{{"format":"{FORMAT}","step":1,"serial":1,"loss":null,"files":{{"{name}":{{"bytes":1,"sha256":""}}}}}}"#
            );
            let flaw = Manifest::parse(text.as_bytes()).unwrap_err();
            assert!(matches!(&flaw, Flaw::Damage(what) if what.contains("names a file")), "{name}: {flaw:?}");
        }
    }
}
