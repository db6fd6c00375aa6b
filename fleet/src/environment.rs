//! The environment of a program that is submitted. It goes through the cluster's log, so only what is known to be no secret travels by
//! itself; everything else is given by name, and is then treated as a secret.

use crate::failure::Failure;
use fleet_common::protocol::Variable;
use std::collections::BTreeMap;
use std::fs::File;
use std::io::Read;
use std::path::{Path, PathBuf};

/// Which programs and libraries are found, and how times and texts look. What is about the machine or its user (HOME, USER, TMPDIR, the
/// devices that may be seen) is the node's and not the submitter's.
const TRAVELS: &[&str] = &[
    "PATH",
    "LD_LIBRARY_PATH",
    "VIRTUAL_ENV",
    "CONDA_PREFIX",
    "CONDA_DEFAULT_ENV",
    "LANG",
    "LANGUAGE",
    "TZ",
    "TERM",
    "HF_HOME",
    "HF_HUB_OFFLINE",
    "TOKENIZERS_PARALLELISM",
];
/// Settings of the runtimes that programs of this kind stand on.
const TRAVELS_BEGINNING: &[&str] = &[
    "LC_",
    "PYTHON",
    "OMP_",
    "GOMP_",
    "KMP_",
    "MKL_",
    "OPENBLAS_",
    "NUMEXPR_",
    "NCCL_",
    "GLOO_",
    "UCX_",
    "FI_",
    "TORCH_",
    "TORCHINDUCTOR_",
    "TORCHDYNAMO_",
    "PYTORCH_",
    "TRITON_",
    "CUDA_",
    "CUBLAS_",
    "CUDNN_",
];
/// Stays, whatever it begins with: it sounds like a secret, or is about the devices of one machine.
const STAYS: &[&str] =
    &["SECRET", "TOKEN", "PASSW", "CREDENTIAL", "PRIVATE", "AUTH", "KEY", "VISIBLE_DEVICES"];
/// Of a file of variables: no environment is larger.
const FILE_MAX: u64 = 256 << 10;

/// Variables that are given by name.
#[derive(clap::Args)]
pub struct EnvArgs {
    /// Pass this variable on, with its value here or with the one given (which other users of this machine can see while the command
    /// runs). Its value is a secret: shown by nothing, forgotten when the job ends
    #[arg(long = "env", value_name = "NAME[=VALUE]")]
    env: Vec<String>,
    /// The same for the lines of a file, NAME=VALUE or NAME each, with values as they stand; # begins a comment
    #[arg(long = "env-file", value_name = "FILE")]
    files: Vec<PathBuf>,
}

impl EnvArgs {
    pub fn is_empty(&self) -> bool {
        self.env.is_empty() && self.files.is_empty()
    }

    /// Name and value of each; `--env` counts before files, and later ones before earlier ones.
    pub fn secrets(&self) -> Result<BTreeMap<String, String>, Failure> {
        let mut secrets = BTreeMap::new();
        for file in &self.files {
            for (number, line) in read(file)?.lines().enumerate() {
                if line.trim().is_empty() || line.trim_start().starts_with('#') {
                    continue;
                }
                let place = format!("line {} of {}", number + 1, file.display());
                let (name, value) = variable(line, &place)?;
                secrets.insert(name, value);
            }
        }
        for text in &self.env {
            let place = if text.contains('=') { "--env".to_owned() } else { format!("--env {text}") };
            let (name, value) = variable(text, &place)?;
            secrets.insert(name, value);
        }
        Ok(secrets)
    }

    /// What travels by itself, and under or instead of it what was given.
    pub fn variables(&self) -> Result<Vec<Variable>, Failure> {
        let secrets = self.secrets()?;
        let here = std::env::vars_os()
            .filter_map(|(name, value)| Some((name.into_string().ok()?, value.into_string().ok()?)));
        let open = here.filter(|(name, _)| travels(name) && !secrets.contains_key(name));
        let open = open.map(|(name, value)| Variable::open(name, value));
        let mut variables: Vec<Variable> = open.filter(|variable| variable.flaw().is_none()).collect();
        variables.sort_by(|a, b| a.name.cmp(&b.name));
        variables.extend(secrets.into_iter().map(|(name, value)| Variable::secret(name, value)));
        Ok(variables)
    }
}

fn travels(name: &str) -> bool {
    let begins = TRAVELS_BEGINNING.iter().any(|beginning| name.starts_with(beginning));
    TRAVELS.contains(&name) || (begins && !STAYS.iter().any(|word| name.contains(word)))
}

/// `NAME=VALUE`, or `NAME` with its value here. A bad one is told by its place alone: where a line is something else, it may be a secret.
fn variable(text: &str, place: &str) -> Result<(String, String), Failure> {
    let (name, value) = match text.split_once('=') {
        Some((name, value)) => (name, value.to_owned()),
        None => {
            let name = text.trim_end();
            // The system is not asked for a name that is none.
            let value = Variable::secret(name, "").flaw().map_or_else(|| std::env::var_os(name), |_| None);
            let unset = || Failure::input(format!("{place}: no such variable is set here; write NAME=VALUE"));
            let not_text = |_| Failure::input(format!("{place}: the value here is not UTF-8"));
            (name, value.ok_or_else(unset)?.into_string().map_err(not_text)?)
        }
    };
    match Variable::secret(name, &value).flaw() {
        Some(flaw) => Err(Failure::input(format!("{place}: a variable {flaw}"))),
        None => Ok((name.to_owned(), value)),
    }
}

fn read(file: &Path) -> Result<String, Failure> {
    let refused =
        |what: String| Failure::input(format!("cannot use the variables in {}: {what}", file.display()));
    let mut text = String::new();
    let read = File::open(file).and_then(|file| file.take(FILE_MAX + 1).read_to_string(&mut text));
    match read.map_err(|error| refused(error.to_string()))? as u64 {
        0..=FILE_MAX => Ok(text),
        _ => Err(refused(format!("it has more than {FILE_MAX} bytes"))),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn what_could_be_a_secret_or_is_about_the_machine_stays() {
        for name in
            ["PATH", "PYTHONPATH", "LC_ALL", "OMP_NUM_THREADS", "NCCL_DEBUG", "TOKENIZERS_PARALLELISM"]
        {
            assert!(travels(name), "{name}");
        }
        for name in [
            "AWS_SECRET_ACCESS_KEY",
            "HF_TOKEN",
            "WANDB_API_KEY",
            "PYTHON_KEYRING_TOKEN",
            "SSH_AUTH_SOCK",
            "HOME",
            "USER",
            "CUDA_VISIBLE_DEVICES",
            "FLEET_TOKEN",
            "PATHS",
        ] {
            assert!(!travels(name), "{name}");
        }
    }

    #[test]
    fn a_file_has_values_as_they_stand_and_the_command_line_counts_before_it() {
        let dir = tempfile::tempdir().unwrap();
        let file = dir.path().join("env");
        std::fs::write(&file, "# mine\n\nA=1\nB=\"$x\" # 'y'\nC=a=b\r\n").unwrap();
        let args = EnvArgs { env: vec!["A=2".into(), "PATH".into()], files: vec![file.clone()] };
        let secrets = args.secrets().unwrap();
        let get = |name: &str| secrets.get(name).map(String::as_str);
        assert_eq!((get("A"), get("B"), get("C")), (Some("2"), Some("\"$x\" # 'y'"), Some("a=b")));
        assert_eq!(get("PATH"), std::env::var("PATH").ok().as_deref());
        std::fs::write(&file, "A=1\nhidden value\n").unwrap();
        let why = args.secrets().unwrap_err().message;
        assert!(why.starts_with("line 2 of ") && !why.contains("hidden"), "{why}");
    }

    #[test]
    fn what_is_not_set_is_said_by_name() {
        let args = EnvArgs { env: vec!["FLEET_NO_SUCH_VARIABLE".into()], files: Vec::new() };
        let why = args.secrets().unwrap_err().message;
        assert!(why.contains("--env FLEET_NO_SUCH_VARIABLE: no such variable is set here"), "{why}");
    }
}
