//! Where a user's own state is kept when nothing else is said: by the XDG directories, never in a place that anybody could own before.

use std::ffi::OsString;
use std::io;
use std::path::{Path, PathBuf};

/// `$HOME`, else what the system calls this user's home.
pub fn dir() -> io::Result<PathBuf> {
    let user = || nix::unistd::User::from_uid(nix::unistd::geteuid()).ok().flatten().map(|user| user.dir);
    let home = std::env::var_os("HOME").map(PathBuf::from).filter(|home| home.is_absolute()).or_else(user);
    home.ok_or_else(|| io::Error::new(io::ErrorKind::NotFound, "no home directory is known; set HOME"))
}

/// `$XDG_STATE_HOME`, else `~/.local/state`.
pub fn state() -> io::Result<PathBuf> {
    below("XDG_STATE_HOME", ".local/state")
}

/// `$XDG_DATA_HOME`, else `~/.local/share`.
pub fn data() -> io::Result<PathBuf> {
    below("XDG_DATA_HOME", ".local/share")
}

fn below(variable: &str, otherwise: &str) -> io::Result<PathBuf> {
    let user = || nix::unistd::User::from_uid(nix::unistd::geteuid()).ok().flatten().map(|user| user.dir);
    let (chosen, home) = (std::env::var_os(variable), std::env::var_os("HOME"));
    choose(chosen, home, user)
        .map(|(base, of_home)| if of_home { base.join(otherwise) } else { base })
        .ok_or_else(|| {
            let what = format!(
                "no home directory is known for uid {}; set HOME or {variable} to a directory of this user",
                nix::unistd::geteuid()
            );
            io::Error::new(io::ErrorKind::NotFound, what)
        })
}

/// The directory, and whether it is the home. What is relative counts as unset, as the XDG specification says.
fn choose(
    chosen: Option<OsString>,
    home: Option<OsString>,
    user: impl FnOnce() -> Option<PathBuf>,
) -> Option<(PathBuf, bool)> {
    let absolute = |text: Option<OsString>| text.map(PathBuf::from).filter(|path| path.is_absolute());
    // Users without a home have one that does not exist, or the root.
    let is_home = |path: &PathBuf| path.is_absolute() && path.is_dir() && path != Path::new("/");
    match absolute(chosen) {
        Some(chosen) => Some((chosen, false)),
        None => absolute(home).or_else(|| user().filter(is_home)).map(|home| (home, true)),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_variable_counts_then_the_home_then_the_users_entry_and_nothing_else() {
        let path = |text: &str| Some(OsString::from(text));
        let entry = || Some(PathBuf::from("/usr"));
        let is = |base: &str, of_home| Some((PathBuf::from(base), of_home));
        assert_eq!(choose(path("/x"), path("/h"), entry), is("/x", false));
        assert_eq!(choose(path("x"), path("/h"), entry), is("/h", true));
        assert_eq!(choose(None, path(""), entry), is("/usr", true));
        assert_eq!(choose(None, path("relative"), || Some("/dev/null/home".into())), None);
        assert_eq!(choose(None, None, || Some("/".into())), None);
        assert_eq!(choose(None, None, || None), None);
    }
}
