//! Which files a job's data are, in an order that depends on their names alone.

use crate::DataError;
use fleet_common::job::Data;
use globset::{GlobBuilder, GlobSet, GlobSetBuilder};
use std::collections::HashSet;
use std::path::{Path, PathBuf};
use walkdir::{DirEntry, WalkDir};

#[derive(Clone, Debug, PartialEq, Eq)]
pub(crate) struct SourceFile {
    pub path: PathBuf,
    pub kind: Kind,
}

/// How a file is cut into documents; decided by its extension.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Kind {
    /// The file is a document.
    Text,
    /// A line is a JSON object, its text field a document.
    Jsonl,
    /// A row's text field is a document; fields are separated by this byte.
    Csv(u8),
}

impl Kind {
    fn of(path: &Path) -> Kind {
        let extension = path.extension().unwrap_or_default().to_string_lossy().to_lowercase();
        match extension.as_str() {
            "jsonl" | "ndjson" => Kind::Jsonl,
            "csv" => Kind::Csv(b','),
            "tsv" => Kind::Csv(b'\t'),
            _ => Kind::Text,
        }
    }
}

/// The files of `data`: paths in the order given, a directory's files in alphabetical order, each file once. Globs without a `/`
/// match names at any depth, others the path below the directory. Links inside directories are not followed.
pub(crate) fn find(data: &Data) -> Result<Vec<SourceFile>, DataError> {
    let include = globs("include", &data.include)?;
    let exclude = globs("exclude", &data.exclude)?;
    let mut seen = HashSet::new();
    let mut files = Vec::new();
    for path in &data.paths {
        let meta = std::fs::metadata(path).map_err(|source| match source.kind() {
            std::io::ErrorKind::NotFound => DataError::Missing(path.clone()),
            _ => DataError::Read { path: path.clone(), source },
        })?;
        if !meta.is_dir() {
            if seen.insert(path.clone()) {
                files.push(SourceFile { path: path.clone(), kind: Kind::of(path) });
            }
            continue;
        }
        let below = |entry: &DirEntry| entry.path().strip_prefix(path).unwrap_or(entry.path()).to_owned();
        let walk = WalkDir::new(path).sort_by_file_name().into_iter();
        for entry in walk.filter_entry(|e| e.depth() == 0 || !(left_out(e) || exclude.is_match(below(e)))) {
            let entry = entry.map_err(|e| DataError::Read {
                path: e.path().unwrap_or(path).to_owned(),
                source: e.into_io_error().unwrap_or_else(|| std::io::Error::other("a loop of links")),
            })?;
            let taken = data.include.is_empty() || include.is_match(below(&entry));
            if entry.file_type().is_file() && taken && seen.insert(entry.path().to_owned()) {
                files.push(SourceFile { path: entry.path().to_owned(), kind: Kind::of(entry.path()) });
            }
        }
    }
    if files.is_empty() {
        let paths: Vec<String> = data.paths.iter().map(|p| p.display().to_string()).collect();
        let globs = |list: &[String]| if list.is_empty() { "none".into() } else { list.join(", ") };
        return Err(DataError::Empty(format!(
            "no file to train on in {} (data.include: {}; data.exclude: {}); check data.path and the globs",
            paths.join(", "),
            globs(&data.include),
            globs(&data.exclude)
        )));
    }
    Ok(files)
}

/// Hidden files and build outputs.
fn left_out(entry: &DirEntry) -> bool {
    let name = entry.file_name().to_string_lossy();
    name.starts_with('.') || (name == "target" && entry.file_type().is_dir())
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
        set.add(GlobBuilder::new(&anchored).literal_separator(true).build().map_err(|e| bad(glob, e))?);
    }
    set.build().map_err(|e| bad(&list.join(", "), e))
}

#[cfg(test)]
pub(crate) mod tests {
    use super::*;

    pub(crate) fn data(paths: Vec<PathBuf>, include: &[&str], exclude: &[&str]) -> Data {
        Data {
            paths,
            include: include.iter().map(|s| s.to_string()).collect(),
            exclude: exclude.iter().map(|s| s.to_string()).collect(),
            text_field: "text".into(),
            validation_fraction: 0.1,
            clean: Default::default(),
        }
    }

    #[test]
    fn files_are_sorted_and_hidden_ones_and_target_are_left_out() {
        let dir = tempfile::tempdir().unwrap();
        for name in [
            "b.md",
            "a/z.rs",
            "a/y.txt",
            ".git/x.md",
            "target/debug/w.rs",
            "a/.v.md",
            "c/skip/u.md",
            "c/t.MD",
        ] {
            let path = dir.path().join(name);
            std::fs::create_dir_all(path.parent().unwrap()).unwrap();
            std::fs::write(path, "x").unwrap();
        }
        let list = |include: &[&str], exclude: &[&str]| -> Vec<String> {
            let files = find(&data(vec![dir.path().to_owned()], include, exclude)).unwrap();
            let below = |f: SourceFile| f.path.strip_prefix(dir.path()).unwrap().display().to_string();
            files.into_iter().map(below).collect()
        };
        assert_eq!(list(&[], &[]), ["a/y.txt", "a/z.rs", "b.md", "c/skip/u.md", "c/t.MD"]);
        assert_eq!(list(&["*.md", "*.rs"], &["skip"]), ["a/z.rs", "b.md"]);
        assert_eq!(list(&["**/*.md"], &[]), ["b.md", "c/skip/u.md"]);
        assert_eq!(list(&["a/*"], &["*.rs"]), ["a/y.txt"]);
        assert_eq!(list(&[], &["c/"]), ["a/y.txt", "a/z.rs", "b.md"]);
    }

    #[test]
    fn a_named_file_is_taken_once_whatever_the_globs_say() {
        let dir = tempfile::tempdir().unwrap();
        let file = dir.path().join("notes.dat");
        std::fs::write(&file, "x").unwrap();
        let paths = vec![file.clone(), file.clone(), dir.path().to_owned()];
        let files = find(&data(paths, &["*.md"], &["*.dat"])).unwrap();
        assert_eq!(files, [SourceFile { path: file, kind: Kind::Text }]);
    }

    #[test]
    fn refusals_name_the_path_and_the_glob() {
        let dir = tempfile::tempdir().unwrap();
        let missing = dir.path().join("nowhere");
        let error = |d: Data| find(&d).unwrap_err().to_string();
        assert!(error(data(vec![missing.clone()], &[], &[])).contains(&missing.display().to_string()));
        assert!(error(data(vec![dir.path().to_owned()], &["*.md"], &[])).contains("data.include: *.md"));
        assert!(
            error(data(vec![dir.path().to_owned()], &["a[.md"], &[])).contains("`a[.md` in data.include")
        );
    }
}
