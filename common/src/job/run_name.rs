//! The name of a run, which is also a directory's: letters of every script, and no two job files with one name by accident.

use super::error::JobFileError;
use super::fields::Fields;
use sha2::{Digest, Sha256};
use std::ffi::OsStr;

/// File systems hold 255 bytes; a job file of the longest name still gives its run one of its own.
const BYTES_MAX: usize = 250;

/// Of the hash that is added where a file's name could not be taken as it is.
const DIGITS: usize = 6;

/// `run_name` where it is given, else the name of the job file without its extension.
pub(super) fn of(f: &Fields, file_stem: &OsStr) -> Result<String, JobFileError> {
    let wanted = format!(
        "a name of at most {BYTES_MAX} bytes of letters and digits of any script and . _ - =, not beginning with a dot,"
    );
    let given = f.text_that("run_name", &wanted, fits)?;
    Ok(given.unwrap_or_else(|| from_file(file_stem)))
}

fn fits(name: &str) -> bool {
    (1..=BYTES_MAX).contains(&name.len()) && name.chars().all(allowed) && !name.starts_with('.')
}

/// Letters of other scripts come with marks, joiners and punctuation that no class of Unicode has alone, so that of what is not ASCII only
/// what cannot be seen is left out.
fn allowed(c: char) -> bool {
    match c {
        _ if c.is_ascii() => c.is_ascii_alphanumeric() || "._-=".contains(c),
        '\u{200c}' | '\u{200d}' => true, // joiners, which Persian and the scripts of India write with
        '\u{200b}'..='\u{200f}'
        | '\u{2028}'..='\u{202e}'
        | '\u{2060}'..='\u{206f}'
        | '\u{feff}'
        | '\u{fffd}' => false,
        _ => !c.is_control() && !c.is_whitespace(),
    }
}

/// A character that does not fit becomes a hyphen; the hash of the whole tells files apart that differ in such ones alone.
fn from_file(stem: &OsStr) -> String {
    if let Some(name) = stem.to_str().filter(|name| fits(name)) {
        return name.to_owned();
    }
    let hash = hex::encode(Sha256::digest(stem.as_encoded_bytes()));
    let shown = stem.to_string_lossy();
    let mut name: String = shown.chars().map(|c| if allowed(c) { c } else { '-' }).collect();
    name = name.trim_start_matches('.').to_owned();
    name.truncate(name.floor_char_boundary(BYTES_MAX - 1 - DIGITS));
    format!("{name}-{}", &hash[..DIGITS])
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::os::unix::ffi::OsStrExt;

    #[test]
    fn names_keep_the_letters_of_every_script() {
        for name in
            ["训练一", "первый", "ÄÖ", "हिन्दी", "می\u{200c}خواهم", "lr=1e-3_v2.1", "e\u{301}tude", "🦙"]
        {
            assert!(fits(name), "{name}");
            assert_eq!(from_file(name.as_ref()), name);
        }
        for bad in
            ["", ".hidden", "a/b", "a b", "a\u{202e}b", "a\tb", "a\u{a0}b", "..", "$x", &"x".repeat(251)]
        {
            assert!(!fits(bad), "{bad:?}");
        }
    }

    #[test]
    fn files_that_differ_give_names_that_differ() {
        let long = |last: char| "训".repeat(90) + &last.to_string();
        let stems = ["my run", "my-run", "my\trun", ".my-run", &long('一'), &long('二')];
        let mut names: Vec<String> = stems.iter().map(|stem| from_file(stem.as_ref())).collect();
        names.push(from_file(OsStr::from_bytes(b"my\xffrun")));
        names.push(from_file(OsStr::from_bytes(b"my\xferun")));
        assert!(names.iter().all(|name| fits(name)), "{names:?}");
        assert!(names[0].starts_with("my-run-"), "{names:?}");
        let different: std::collections::BTreeSet<&String> = names.iter().collect();
        assert_eq!(different.len(), names.len(), "{names:?}");
    }
}
