//! Which files a job's data are, in an order that depends on their names alone.

use crate::blocks::Input;
use crate::formats::{HEAD, is_data_by_name, is_documentation};
use crate::left_out::{LeftOut, Reason};
use crate::{DataError, Note, text};
use fleet_common::job::{Data, Job};
use globset::{GlobBuilder, GlobSet, GlobSetBuilder};
use rayon::prelude::*;
use sha2::{Digest, Sha256};
use std::collections::HashSet;
use std::fs::{self, File};
use std::io::{self, Read};
use std::path::{Path, PathBuf};
use walkdir::{DirEntry, WalkDir};

/// The files of a job's data.
#[derive(Debug)]
pub struct DataFiles {
    pub(crate) files: Vec<PathBuf>,
    /// Of each file, how often what it has is trained on in an epoch.
    pub(crate) weights: Vec<f64>,
    /// What was seen in the folders and not taken.
    pub(crate) left_out: LeftOut,
}

impl DataFiles {
    /// Looks for them, and tells how many there are and what was left out.
    pub fn find(job: &Job, progress: &dyn Fn(Note)) -> Result<DataFiles, DataError> {
        let found = find(&job.data, &job.output_dir)?;
        let note = if found.left_out.of(Reason::Data).is_some() { Note::warning } else { Note::info };
        found.left_out.told().into_iter().for_each(|line| progress(note(line)));
        let (count, s) = (found.files.len(), if found.files.len() == 1 { "" } else { "s" });
        progress(Note::info(format!("reading {count} file{s}")));
        Ok(found)
    }

    /// With the SHA-256 of each. What cannot be read by its first bytes is refused before the rest of it is looked at.
    pub(crate) fn hashed(&self) -> Result<Vec<Input>, DataError> {
        let hash = |(path, weight): (&PathBuf, &f64)| {
            let read = |source| DataError::Read { path: path.clone(), source };
            let mut file = File::open(path).map_err(read)?;
            let mut head = Vec::with_capacity(HEAD);
            (&mut file).take(HEAD as u64).read_to_end(&mut head).map_err(read)?;
            text::known(path, &head)?;
            let mut hasher = Sha256::new_with_prefix(&head);
            io::copy(&mut file, &mut hasher).map_err(read)?;
            Ok(Input { path: path.clone(), sha256: hasher.finalize().into(), weight: *weight })
        };
        let inputs: Vec<Result<Input, DataError>> =
            self.files.par_iter().zip(&self.weights).map(hash).collect();
        inputs.into_iter().collect() // the first error in the order of the files
    }
}

/// The files of `data`: paths in the order given, a directory's files in alphabetical order, each file once, whatever names lead to
/// it. Globs without a `/` match names at any depth, others the path below the directory; upper and lower case are the same to
/// them. Links are followed; one that leads nowhere is an error where its name asks to be read. `output`, where the job writes, is
/// no data.
pub(crate) fn find(data: &Data, output: &Path) -> Result<DataFiles, DataError> {
    let real = |path: &Path| fs::canonicalize(path).ok();
    let roots: Vec<PathBuf> = data.paths.iter().filter_map(|path| real(path)).collect();
    // Data may lie where the job writes; what fleet keeps there is none.
    let holds_data = |output: &PathBuf| roots.iter().any(|root| root.starts_with(output));
    let kept = ["cache", "checkpoints"].map(|name| real(&output.join(name)));
    let mut search = Search {
        written: real(output)
            .filter(|output| !holds_data(output))
            .into_iter()
            .chain(kept.into_iter().flatten())
            .collect(),
        all_kinds: data.takes_all_kinds(),
        include: globs("include", &data.include)?,
        exclude: globs("exclude", &data.exclude)?,
        seen: HashSet::new(),
        weight: 1.0,
        found: DataFiles { files: Vec::new(), weights: Vec::new(), left_out: LeftOut::default() },
    };
    for (number, path) in data.paths.iter().enumerate() {
        search.weight = data.weights.get(number).copied().unwrap_or(1.0);
        let meta = fs::metadata(path).map_err(|source| match source.kind() {
            io::ErrorKind::NotFound => nowhere(path).unwrap_or_else(|| DataError::Missing(path.clone())),
            _ => DataError::Read { path: path.clone(), source },
        })?;
        match () {
            () if meta.is_dir() => search.folder(path)?,
            () if meta.is_file() => search.take(path, path)?,
            () => return Err(DataError::Special(path.clone())),
        }
    }
    let found = search.found;
    if found.files.is_empty() {
        return Err(DataError::Empty(nothing(data, &found.left_out)));
    }
    let documents = || found.files.iter().all(|file| is_documentation(file) && !data.paths.contains(file));
    match found.left_out.of(Reason::Data) {
        Some((count, first)) if documents() => {
            Err(DataError::Empty(only_documentation(&found.files, count, first)))
        }
        _ => Ok(found),
    }
}

struct Search {
    /// Real paths of the folders that are there already and that fleet writes.
    written: Vec<PathBuf>,
    all_kinds: bool,
    include: GlobSet,
    exclude: GlobSet,
    /// Real paths of the files that were taken.
    seen: HashSet<PathBuf>,
    /// Of the files that are found next.
    weight: f64,
    found: DataFiles,
}

impl Search {
    fn folder(&mut self, root: &Path) -> Result<(), DataError> {
        let mut walk = WalkDir::new(root).min_depth(1).follow_links(true).sort_by_file_name().into_iter();
        while let Some(entry) = walk.next() {
            let entry = match entry {
                Ok(entry) => entry,
                Err(error) => {
                    self.unreachable(root, error)?;
                    continue;
                }
            };
            let below = entry.path().strip_prefix(root).unwrap_or(entry.path());
            match self.reason(below, Some(&entry)) {
                None if entry.file_type().is_dir() => (),
                None => self.take(entry.path(), below)?,
                Some(reason) => {
                    self.found.left_out.add(reason, below);
                    if entry.file_type().is_dir() {
                        walk.skip_current_dir();
                    }
                }
            }
        }
        Ok(())
    }

    /// Why this path below a folder is not taken. Without an entry it is a link that cannot be followed.
    fn reason(&self, below: &Path, entry: Option<&DirEntry>) -> Option<Reason> {
        let name = below.file_name().unwrap_or_default().to_string_lossy();
        let is = |what: fn(&fs::FileType) -> bool| entry.is_some_and(|entry| what(&entry.file_type()));
        let (directory, file) = (is(fs::FileType::is_dir), is(fs::FileType::is_file));
        match () {
            () if name.starts_with('.') => Some(Reason::Hidden),
            () if name == "target" && directory => Some(Reason::Target),
            () if directory && entry.is_some_and(|entry| self.is_written(entry.path())) => {
                Some(Reason::Output)
            }
            () if self.exclude.is_match(below) => Some(Reason::Excluded),
            () if directory => None,
            () if entry.is_some() && !file => Some(Reason::Special),
            () if !self.include.is_empty() && !self.include.is_match(below) => {
                Some(if self.all_kinds && is_data_by_name(below) {
                    Reason::Data
                } else {
                    Reason::NotIncluded
                })
            }
            () => None,
        }
    }

    /// Where this job writes, or what any job of fleet's has written.
    fn is_written(&self, path: &Path) -> bool {
        let is = |written: &PathBuf| {
            path.file_name() == written.file_name()
                && fs::canonicalize(path).is_ok_and(|path| path == *written)
        };
        let has = |names: &[&str]| names.iter().all(|name| path.join(name).is_file());
        self.written.iter().any(is)
            || has(&["manifest.json", "trainer_state.json"])
            || has(&["meta.json", "train.bin", "validation.bin"])
            || has(&["meta.json", "train.index", "validation.index"])
    }

    /// A loop of folders is left out, and a broken link that nobody asked for; the rest cannot be read and is an error.
    fn unreachable(&mut self, root: &Path, error: walkdir::Error) -> Result<(), DataError> {
        let path = error.path().unwrap_or(root).to_owned();
        let below = path.strip_prefix(root).unwrap_or(&path);
        let unasked = self.reason(below, None);
        let reason = match () {
            () if error.loop_ancestor().is_some() => unasked
                .filter(|reason| !matches!(reason, Reason::NotIncluded | Reason::Data))
                .or(Some(Reason::Loop)),
            () if fs::symlink_metadata(&path).is_ok_and(|meta| meta.is_symlink()) => unasked,
            () => None,
        };
        if let Some(reason) = reason {
            self.found.left_out.add(reason, below);
            return Ok(());
        }
        Err(nowhere(&path).unwrap_or_else(|| DataError::Read {
            source: error.into_io_error().unwrap_or_else(|| io::Error::other("it cannot be looked at")),
            path,
        }))
    }

    fn take(&mut self, path: &Path, told_as: &Path) -> Result<(), DataError> {
        let real =
            fs::canonicalize(path).map_err(|source| DataError::Read { path: path.to_owned(), source })?;
        match self.seen.insert(real) {
            true => {
                self.found.files.push(path.to_owned());
                self.found.weights.push(self.weight);
            }
            false => self.found.left_out.add(Reason::Again, told_as),
        }
        Ok(())
    }
}

/// The error of a link whose target is not there.
fn nowhere(path: &Path) -> Option<DataError> {
    let target = fs::read_link(path).ok()?;
    let gone = fs::metadata(path)
        .is_err_and(|e| e.kind() == io::ErrorKind::NotFound || e.raw_os_error() == Some(ELOOP));
    gone.then(|| DataError::Nowhere { path: path.to_owned(), target })
}

/// What Linux answers to a link that leads to itself.
const ELOOP: i32 = 40;

fn nothing(data: &Data, left_out: &LeftOut) -> String {
    let paths: Vec<String> = data.paths.iter().map(|p| p.display().to_string()).collect();
    let globs = |list: &[String]| if list.is_empty() { "none".into() } else { list.join(", ") };
    let seen = left_out.told().map(|told| format!("{told}; ")).unwrap_or_default();
    format!(
        "no file to train on in {} (data.include: {}; data.exclude: {}); {seen}check data.path and the globs",
        paths.join(", "),
        globs(&data.include),
        globs(&data.exclude)
    )
}

/// Where all that would be read tells about the data.
fn only_documentation(files: &[PathBuf], count: u64, first: &str) -> String {
    let names: Vec<String> =
        files.iter().take(3).map(|file| file.file_name().unwrap_or_default().display().to_string()).collect();
    let (are, they) = if count == 1 { ("is 1 file", "it") } else { ("are files", "they") };
    format!(
        "nothing but documentation would be read ({}), and beside it {are} of data that fleet does not read as {they} {} ({}{first}): write \
         the rows as JSON Lines (.jsonl), or unpack {}; or name what is to be read in data.include",
        names.join(", "),
        if count == 1 { "is" } else { "are" },
        if count == 1 { String::new() } else { format!("{count}, such as ") },
        if count == 1 { "it" } else { "them" },
    )
}

fn globs(key: &'static str, list: &[String]) -> Result<GlobSet, DataError> {
    let bad = |glob: &str, e: globset::Error| DataError::Glob {
        key,
        glob: glob.to_owned(),
        what: e.kind().to_string(),
    };
    let mut set = GlobSetBuilder::new();
    for glob in list {
        let trimmed = glob.trim_end_matches('/');
        let anchored = if trimmed.contains('/') { trimmed.to_owned() } else { format!("**/{trimmed}") };
        let glob = GlobBuilder::new(&anchored).literal_separator(true).case_insensitive(true).build();
        set.add(glob.map_err(|e| bad(trimmed, e))?);
    }
    set.build().map_err(|e| bad(&list.join(", "), e))
}

#[cfg(test)]
pub(crate) mod tests {
    use super::*;
    use std::os::unix::fs::{PermissionsExt, symlink};

    pub(crate) fn data(paths: Vec<PathBuf>, include: &[&str], exclude: &[&str]) -> Data {
        Data {
            paths,
            include: include.iter().map(|s| s.to_string()).collect(),
            exclude: exclude.iter().map(|s| s.to_string()).collect(),
            text_field: "text".into(),
            validation_fraction: 0.1,
            clean: Default::default(),
            weights: Vec::new(),
            bad_rows: Default::default(),
            rows: None,
        }
    }

    /// A folder with these files, each of one letter.
    fn folder(names: &[&str]) -> tempfile::TempDir {
        let dir = tempfile::tempdir().unwrap();
        for name in names {
            let path = dir.path().join(name);
            fs::create_dir_all(path.parent().unwrap()).unwrap();
            fs::write(path, "x").unwrap();
        }
        dir
    }

    /// Names of what is found below the folder, and what is told of the rest.
    fn look(dir: &Path, include: &[&str], exclude: &[&str]) -> (Vec<String>, String) {
        let found = find(&data(vec![dir.to_owned()], include, exclude), &dir.join("out")).unwrap();
        let below = |path: &PathBuf| path.strip_prefix(dir).unwrap().display().to_string();
        (found.files.iter().map(below).collect(), found.left_out.told().unwrap_or_default())
    }

    #[test]
    fn files_are_sorted_and_what_is_left_out_is_told() {
        let names = [
            "b.md",
            "a/z.rs",
            "a/y.txt",
            ".git/x.md",
            "target/debug/w.rs",
            "a/.v.md",
            "c/skip/u.md",
            "c/t.MD",
        ];
        let dir = folder(&names);
        let list = |include: &[&str], exclude: &[&str]| look(dir.path(), include, exclude).0;
        assert_eq!(list(&[], &[]), ["a/y.txt", "a/z.rs", "b.md", "c/skip/u.md", "c/t.MD"]);
        assert_eq!(list(&["*.md", "*.rs"], &["skip"]), ["a/z.rs", "b.md", "c/t.MD"]);
        assert_eq!(list(&["**/*.md"], &[]), ["b.md", "c/skip/u.md", "c/t.MD"]);
        assert_eq!(list(&["a/*"], &["*.RS"]), ["a/y.txt"]);
        assert_eq!(list(&[], &["c/"]), ["a/y.txt", "a/z.rs", "b.md"]);
        assert_eq!(
            look(dir.path(), &["*.md"], &["skip"]).1,
            "left out: 2 that data.include does not name (such as a/y.txt), 1 by data.exclude (c/skip), \
             2 hidden (such as .git), 1 of build outputs (target)"
        );
    }

    #[test]
    fn what_the_job_writes_is_no_data() {
        let dir = folder(&["a.json", "out/cache/1/meta.json", "b/out/c.json"]);
        let (files, told) = look(dir.path(), &["*.json"], &[]);
        assert_eq!(files, ["a.json", "b/out/c.json"]);
        assert_eq!(told, "left out: 1 that fleet writes (out)");
    }

    #[test]
    fn fleets_own_files_are_no_data_wherever_they_lie() {
        let names = [
            "a.json",
            "cache/1/meta.json",
            "checkpoints/r/step-00000001/config.json",
            "sub/b.json",
            "other/x/manifest.json",
            "other/x/trainer_state.json",
            "other/y/manifest.json",
        ];
        let dir = folder(&names);
        let below = |data_of: &Path, output: &Path| -> Vec<String> {
            let found = find(&data(vec![data_of.to_owned()], &["*.json"], &[]), output).unwrap();
            let below = |path: &PathBuf| path.strip_prefix(dir.path()).unwrap().display().to_string();
            found.files.iter().map(below).collect()
        };
        // The job writes into its data, and its data lie within what it writes.
        assert_eq!(below(dir.path(), dir.path()), ["a.json", "other/y/manifest.json", "sub/b.json"]);
        assert_eq!(below(&dir.path().join("sub"), dir.path()), ["sub/b.json"]);
    }

    #[test]
    fn a_data_set_of_which_only_the_documentation_can_be_read_is_refused() {
        let default = fleet_common::job::READABLE;
        let find = |names: &[&str], include: &[&str], named: &[&str]| {
            let dir = folder(names);
            let paths =
                [dir.path().to_owned()].into_iter().chain(named.iter().map(|name| dir.path().join(name)));
            find(&data(paths.collect(), include, &[]), Path::new("out"))
        };
        let set = ["README.md", "LICENSE.txt", "data/train-0.arrow", "data/train-1.arrow"];
        let said = find(&set, &default, &[]).unwrap_err().to_string();
        assert!(
            said.contains("(2, such as data/train-0.arrow)") && said.contains("LICENSE.txt, README.md"),
            "{said}"
        );
        assert_eq!(find(&set, &["*.md"], &[]).unwrap().files.len(), 1, "who names it has it");
        assert_eq!(find(&set, &default, &["README.md"]).unwrap().files.len(), 2);
        let mixed = find(&["README.md", "a.txt", "b.zip", "c.py"], &default, &[]).unwrap();
        assert_eq!(
            mixed.left_out.told().unwrap(),
            "left out: 1 that data.include does not name (c.py), 1 that looks like data and is of no kind that is read (b.zip)"
        );
        assert_eq!(
            find(&["README.md", "a.rs"], &default, &[]).unwrap().files.len(),
            1,
            "no data are left out"
        );
    }

    #[test]
    fn a_named_file_is_taken_once_whatever_the_globs_say() {
        let dir = folder(&["notes.dat"]);
        let file = dir.path().join("notes.dat");
        let data = data(vec![file.clone(), file.clone(), dir.path().to_owned()], &["*.md"], &["*.dat"]);
        assert_eq!(find(&data, Path::new("out")).unwrap().files, [file]);
    }

    #[test]
    fn links_are_followed_and_the_same_file_is_read_once() {
        let dir = folder(&["hub/blobs/0a1b", "hub/blobs/2c3d", "mix/a.txt", "hub/refs/r.txt"]);
        let at = |name: &str| dir.path().join(name);
        fs::create_dir_all(at("hub/snapshots/abc")).unwrap();
        symlink("../../blobs/0a1b", at("hub/snapshots/abc/train.txt")).unwrap();
        symlink("../../blobs/2c3d", at("hub/snapshots/abc/more.jsonl")).unwrap();
        symlink("../../refs", at("hub/snapshots/abc/folder")).unwrap();
        let (files, told) = look(&at("hub/snapshots/abc"), &[], &[]);
        assert_eq!(files, ["folder/r.txt", "more.jsonl", "train.txt"]);
        assert_eq!(told, "");
        symlink("a.txt", at("mix/b.txt")).unwrap();
        symlink(".", at("mix/loop")).unwrap();
        let (files, told) = look(&at("mix"), &["*.txt"], &[]);
        assert_eq!(files, ["a.txt"]);
        assert_eq!(
            told,
            "left out: 1 under a second name (b.txt), 1 link back to a folder that it lies in (loop)"
        );
    }

    #[test]
    fn a_link_that_leads_nowhere_is_an_error_where_it_is_asked_for() {
        let dir = folder(&["a.txt"]);
        symlink("gone.txt", dir.path().join("b.txt")).unwrap();
        let error = |paths, include: &[&str]| {
            find(&data(paths, include, &[]), Path::new("out")).unwrap_err().to_string()
        };
        let told = error(vec![dir.path().to_owned()], &["*.txt"]);
        assert!(told.contains("b.txt is a link to gone.txt, which is not there"), "{told}");
        assert!(error(vec![dir.path().join("b.txt")], &[]).contains("is a link to gone.txt"));
        fs::rename(dir.path().join("b.txt"), dir.path().join(".#b.txt")).unwrap();
        symlink("c.dat", dir.path().join("c.dat")).unwrap();
        let (files, told) = look(dir.path(), &["*.txt"], &[]);
        assert_eq!(files, ["a.txt"]);
        assert_eq!(told, "left out: 1 that data.include does not name (c.dat), 1 hidden (.#b.txt)");
    }

    #[test]
    fn what_is_no_file_is_never_opened() {
        let dir = folder(&["a.txt"]);
        let _socket = std::os::unix::net::UnixListener::bind(dir.path().join("b.txt")).unwrap();
        let (files, told) = look(dir.path(), &["*.txt"], &[]);
        assert_eq!(
            (files.as_slice(), told.as_str()),
            (&["a.txt".to_owned()][..], "left out: 1 that is no file (b.txt)")
        );
        let error =
            find(&data(vec!["/dev/null".into()], &[], &[]), Path::new("out")).unwrap_err().to_string();
        assert!(error.contains("/dev/null is no file"), "{error}");
    }

    #[test]
    fn refusals_name_the_path_and_the_glob() {
        let dir = folder(&["a.rst"]);
        let missing = dir.path().join("nowhere");
        let error = |d: Data| find(&d, Path::new("out")).unwrap_err().to_string();
        assert!(error(data(vec![missing.clone()], &[], &[])).contains(&missing.display().to_string()));
        let told = error(data(vec![dir.path().to_owned()], &["*.md"], &[]));
        assert!(told.contains("data.include: *.md") && told.contains("does not name (a.rst)"), "{told}");
        assert!(
            error(data(vec![dir.path().to_owned()], &["a[.md"], &[])).contains("`a[.md` in data.include")
        );
        let closed = dir.path().join("closed");
        fs::create_dir(&closed).unwrap();
        fs::set_permissions(&closed, fs::Permissions::from_mode(0o000)).unwrap();
        if fs::read_dir(&closed).is_err() {
            // root may read it all the same
            assert!(error(data(vec![dir.path().to_owned()], &[], &[])).contains("closed: Permission denied"));
        }
    }
}
