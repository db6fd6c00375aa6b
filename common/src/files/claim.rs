//! A directory of fleet's own: it belongs to the user whom fleet runs as, and nobody else can look into it.

use super::kind::Kind;
use super::{create_dir, private};
use std::fs::{self, File, Metadata, Permissions, TryLockError};
use std::io;
use std::os::unix::fs::{MetadataExt, PermissionsExt};
use std::path::Path;

/// What a mode gives to others than the owner.
const OTHERS: u32 = 0o077;
/// A mode of directories that all may write to, such as the temporary one.
const STICKY: u32 = 0o1000;

/// Endings of files that an operator puts beside a service.
const BESIDE: [&str; 6] = ["token", "log", "out", "err", "pid", "env"];

/// Makes `dir`, or takes it over for `kind`: an empty one without a word, one that is kept for the same as `mend` does. One that is kept for
/// something else, or holds files that are not fleet's, is refused before anything is written.
pub fn claim(dir: &Path, kind: Kind) -> io::Result<Option<String>> {
    let found = Kind::of(dir);
    if let Some(other) = found.filter(|found| *found != kind) {
        return Err(wrong(format!("{} is {other}; give --data-dir another directory", dir.display())));
    }
    let contents = kind.contents();
    if let (None, Some(other)) = (found, first_of_others(dir, contents)?) {
        return Err(wrong(format!(
            "{} holds files that are not fleet's, such as {}; name a directory that is empty or does not exist yet",
            dir.display(),
            other.escape_debug()
        )));
    }
    let is_new = !contents.iter().any(|name| dir.join(name).exists());
    create_dir(dir)?;
    // Where nothing was, nothing was open.
    Ok(mend(dir, contents)?.filter(|_| !is_new))
}

/// Takes the lock of a claimed directory: two processes in it would share an identity.
pub fn lock(dir: &Path) -> io::Result<File> {
    let path = dir.join("lock");
    let file = private().create(true).truncate(false).write(true).open(&path);
    let file = file.map_err(|error| cannot("open", &path, &error))?;
    match file.try_lock() {
        Ok(()) => Ok(file),
        Err(TryLockError::WouldBlock) => {
            let who = match Kind::of(dir) {
                Some(Kind::Coordinator) => "another coordinator",
                Some(Kind::Worker) => "another worker",
                _ => "another coordinator or worker",
            };
            let what =
                format!("{who} runs on {}; stop it or give --data-dir another directory", dir.display());
            Err(io::Error::new(io::ErrorKind::ResourceBusy, what))
        }
        Err(TryLockError::Error(error)) => Err(cannot("lock", &path, &error)),
    }
}

/// Closes `dir` to others, and those of `contents` that are in it, with all that is in them: modes are mended, and what was open is told in
/// one line. Refuses a directory that belongs to somebody else or has files of somebody else's (root's may stay: root needs no mode).
pub fn mend(dir: &Path, contents: &[&str]) -> io::Result<Option<String>> {
    // The directory itself may be reached by a link that its owner made.
    let found = fs::metadata(dir).map_err(|error| cannot("look at", dir, &error))?;
    if !found.is_dir() {
        return Err(refused(format!("{} is not a directory", dir.display())));
    }
    if found.uid() != me() {
        return Err(refused(format!(
            "{} belongs to uid {}, and this runs as uid {}; run it as that user, or name a directory that is yours or does not exist yet",
            dir.display(),
            found.uid(),
            me()
        )));
    }
    if found.mode() & STICKY != 0 {
        return Err(refused(format!(
            "{} is for temporary files of everybody; name a directory in it that does not exist yet",
            dir.display()
        )));
    }
    let mut open = Vec::new();
    close(dir, &found, &mut open)?;
    for name in contents {
        let path = dir.join(name);
        close_all(&path, &mut open)?;
        check_link(&path)?;
    }
    let Some(first) = open.first() else { return Ok(None) };
    let (others, have) = match open.len() {
        1 => (String::new(), "was"),
        count => (format!(" and {} more", count - 1), "were"),
    };
    Ok(Some(format!(
        "{first}{others} {have} open to other users of this machine; closed now, but what they held may have been read"
    )))
}

/// What lies in `dir`, is none of `contents`, and looks like somebody's data. What an operator puts beside a service is none: the token that it
/// joins with, its log, its pid.
fn first_of_others(dir: &Path, contents: &[&str]) -> io::Result<Option<String>> {
    let entries = match fs::read_dir(dir) {
        Err(error) if error.kind() == io::ErrorKind::NotFound => return Ok(None),
        other => other.map_err(|error| cannot("read", dir, &error))?,
    };
    let beside = |entry: &fs::DirEntry| {
        let name = entry.file_name();
        let ending = Path::new(&name).extension().and_then(|ending| ending.to_str());
        ending.is_some_and(|ending| BESIDE.contains(&ending))
            && entry.file_type().is_ok_and(|kind| kind.is_file())
    };
    let others = entries.flatten().filter(|entry| !beside(entry));
    let names = others.map(|entry| entry.file_name().to_string_lossy().into_owned());
    // The root of a file system has the first, and tools hide theirs.
    let counts =
        |name: &String| name != "lost+found" && !name.starts_with('.') && !contents.contains(&name.as_str());
    Ok(names.filter(counts).min())
}

/// Where one of the contents is a link that its owner made, what it leads to must be as private as the rest. It is not mended: it may hold
/// other things too.
fn check_link(path: &Path) -> io::Result<()> {
    if !fs::symlink_metadata(path).is_ok_and(|found| found.is_symlink()) {
        return Ok(());
    }
    match fs::metadata(path) {
        Ok(target) if ![0, me()].contains(&target.uid()) || target.mode() & OTHERS != 0 => {
            Err(refused(format!(
                "{} is a link to what other users may read or change; close that to them (`chmod go=`), or remove the link",
                path.display()
            )))
        }
        _ => Ok(()),
    }
}

/// Links are left alone and not followed, and what others remove meanwhile is no matter.
fn close_all(path: &Path, open: &mut Vec<String>) -> io::Result<()> {
    let found = match fs::symlink_metadata(path) {
        Err(error) if error.kind() == io::ErrorKind::NotFound => return Ok(()),
        other => other.map_err(|error| cannot("look at", path, &error))?,
    };
    if found.is_symlink() && [0, me()].contains(&found.uid()) {
        return Ok(());
    }
    close(path, &found, open)?;
    if found.is_dir() {
        let entries = fs::read_dir(path).map_err(|error| cannot("read", path, &error))?;
        for entry in entries.flatten() {
            close_all(&entry.path(), open)?;
        }
    }
    Ok(())
}

fn close(path: &Path, found: &Metadata, open: &mut Vec<String>) -> io::Result<()> {
    match found.uid() {
        owner if owner == me() => {}
        0 => return Ok(()),
        owner => {
            return Err(refused(format!(
                "{} belongs to uid {owner}, who could read or hold it; look at it, and give it to uid {} or remove it",
                path.display(),
                me()
            )));
        }
    }
    if found.mode() & OTHERS == 0 {
        return Ok(());
    }
    let closed = Permissions::from_mode(found.mode() & 0o7777 & !OTHERS);
    match fs::set_permissions(path, closed) {
        Err(error) if error.kind() == io::ErrorKind::NotFound => return Ok(()),
        done => done.map_err(|error| cannot("close", path, &error))?,
    }
    open.push(path.display().to_string());
    Ok(())
}

fn me() -> u32 {
    nix::unistd::geteuid().as_raw()
}

fn refused(what: String) -> io::Error {
    io::Error::new(io::ErrorKind::PermissionDenied, what)
}

/// Of a directory that was named by mistake.
fn wrong(what: String) -> io::Error {
    io::Error::new(io::ErrorKind::InvalidInput, what)
}

fn cannot(verb: &str, path: &Path, error: &io::Error) -> io::Error {
    io::Error::new(error.kind(), format!("cannot {verb} {}: {error}", path.display()))
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::os::unix::fs::symlink;

    fn mode(path: &Path) -> u32 {
        fs::metadata(path).unwrap().mode() & 0o7777
    }

    fn chmod(path: &Path, mode: u32) {
        fs::set_permissions(path, Permissions::from_mode(mode)).unwrap();
    }

    #[test]
    fn a_new_directory_is_private_and_there_is_nothing_to_tell() {
        let dir = tempfile::tempdir().unwrap();
        let data = dir.path().join("a/data");
        assert_eq!(claim(&data, Kind::Coordinator).unwrap(), None);
        assert_eq!(mode(&data), 0o700);
        assert_eq!(claim(&data, Kind::Coordinator).unwrap(), None);
    }

    #[test]
    fn what_was_open_is_closed_and_told_and_what_is_not_fleets_stays() {
        let dir = tempfile::tempdir().unwrap();
        let data = dir.path().join("data");
        let outside = dir.path().join("outside");
        for path in [&data, &data.join("raft"), &data.join("other"), &outside] {
            fs::create_dir(path).unwrap();
            chmod(path, 0o755);
        }
        for path in [data.join("lock"), data.join("raft/1.log"), data.join("other/file"), outside.join("x")] {
            fs::write(&path, "").unwrap();
            chmod(&path, 0o644);
        }
        symlink(&outside, data.join("raft/link")).unwrap();
        let told = claim(&data, Kind::Coordinator).unwrap().unwrap();
        assert!(told.contains("data and 3 more were open"), "{told}");
        let closed = [data.clone(), data.join("raft"), data.join("lock"), data.join("raft/1.log")];
        assert_eq!(closed.map(|path| mode(&path)), [0o700, 0o700, 0o600, 0o600]);
        let left = [data.join("other/file"), outside.clone(), outside.join("x")];
        assert_eq!(left.map(|path| mode(&path)), [0o644, 0o755, 0o644]);
        assert_eq!(claim(&data, Kind::Coordinator).unwrap(), None);
    }

    #[test]
    fn a_directory_of_other_things_is_left_as_it_is() {
        let dir = tempfile::tempdir().unwrap();
        let project = dir.path().join("project");
        fs::create_dir_all(project.join("src")).unwrap();
        for mode_before in [0o755, 0o700] {
            chmod(&project, mode_before);
            let why = claim(&project, Kind::Worker).unwrap_err();
            assert_eq!(why.kind(), io::ErrorKind::InvalidInput);
            assert!(
                why.to_string().contains("project holds files that are not fleet's, such as src"),
                "{why}"
            );
            assert_eq!(mode(&project), mode_before);
        }
        chmod(&project, 0o755);
        // The root of a disk, as it was made.
        fs::rename(project.join("src"), project.join("lost+found")).unwrap();
        assert_eq!(claim(&project, Kind::Worker).unwrap(), None);
        assert_eq!(mode(&project), 0o700);
        chmod(&project, 0o1777);
        let why = claim(&project, Kind::Worker).unwrap_err().to_string();
        assert!(why.contains("for temporary files of everybody"), "{why}");
        assert_eq!(mode(&project), 0o1777);
    }

    #[test]
    fn what_an_operator_put_there_before_the_first_start_is_nobodys_data() {
        let dir = tempfile::tempdir().unwrap();
        for name in ["worker.token", "worker.log", "nohup.out"] {
            fs::write(dir.path().join(name), "x").unwrap();
        }
        assert_eq!(claim(dir.path(), Kind::Worker).unwrap(), None);
        assert_eq!(mode(dir.path()), 0o700);
        let other = dir.path().join("other");
        fs::create_dir_all(other.join("notes.log")).unwrap();
        let why = claim(&other, Kind::Worker).unwrap_err().to_string();
        assert!(why.contains("such as notes.log"), "a directory is somebody's: {why}");
    }

    #[test]
    fn one_that_is_kept_for_something_else_is_named_and_left_as_it_is() {
        let dir = tempfile::tempdir().unwrap();
        for (sign, name) in [
            ("raft", "the data directory of a coordinator"),
            ("gangs", "the data directory of a worker"),
            ("step-00000010", "a directory of checkpoints"),
        ] {
            let data = dir.path().join(sign);
            fs::create_dir_all(data.join(sign)).unwrap();
            chmod(&data, 0o755);
            for kind in
                [Kind::Coordinator, Kind::Worker].into_iter().filter(|kind| Kind::of(&data) != Some(*kind))
            {
                let why = claim(&data, kind).unwrap_err();
                assert_eq!(why.kind(), io::ErrorKind::InvalidInput);
                assert!(why.to_string().contains(name) && why.to_string().contains("--data-dir"), "{why}");
                assert_eq!((mode(&data), fs::read_dir(&data).unwrap().count()), (0o755, 1));
            }
        }
    }

    #[test]
    fn a_lock_says_who_has_it() {
        let dir = tempfile::tempdir().unwrap();
        let held = lock(dir.path()).unwrap();
        let said = || lock(dir.path()).unwrap_err().to_string();
        assert!(said().starts_with("another coordinator or worker runs on"), "{}", said());
        fs::create_dir(dir.path().join("gangs")).unwrap();
        assert!(said().starts_with("another worker runs on"), "{}", said());
        drop(held);
        lock(dir.path()).unwrap();
    }

    #[test]
    fn a_link_leads_only_to_what_is_as_private_as_the_rest() {
        let dir = tempfile::tempdir().unwrap();
        let (data, elsewhere) = (dir.path().join("data"), dir.path().join("elsewhere"));
        [&data, &elsewhere].iter().for_each(|path| fs::create_dir(path).unwrap());
        symlink(&elsewhere, data.join("raft")).unwrap();
        chmod(&elsewhere, 0o777);
        let why = claim(&data, Kind::Coordinator).unwrap_err().to_string();
        assert!(why.contains("data/raft is a link to what other users may read or change"), "{why}");
        chmod(&elsewhere, 0o700);
        claim(&data, Kind::Coordinator).unwrap();
        if nix::unistd::geteuid().is_root() {
            std::os::unix::fs::lchown(data.join("raft"), Some(65_534), None).unwrap();
            let why = claim(&data, Kind::Coordinator).unwrap_err().to_string();
            assert!(why.contains("data/raft belongs to uid 65534"), "{why}");
        }
    }

    #[test]
    fn what_belongs_to_somebody_else_is_refused() {
        if !nix::unistd::geteuid().is_root() {
            return; // only root gives files away
        }
        let dir = tempfile::tempdir().unwrap();
        let (data, nobody) = (dir.path().join("data"), Some(65_534));
        fs::create_dir_all(data.join("raft")).unwrap();
        std::os::unix::fs::chown(data.join("raft"), nobody, nobody).unwrap();
        let why = claim(&data, Kind::Coordinator).unwrap_err().to_string();
        assert!(why.contains("data/raft belongs to uid 65534"), "{why}");
        std::os::unix::fs::chown(&data, nobody, nobody).unwrap();
        let why = claim(&data, Kind::Coordinator).unwrap_err().to_string();
        assert!(why.contains("data belongs to uid 65534, and this runs as uid 0"), "{why}");
    }
}
