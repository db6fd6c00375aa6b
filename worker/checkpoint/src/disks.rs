//! On which disks the hosts of a gang write. Hosts that see the same directory share one; that is found out, not asked.

use crate::CheckpointError;
use crate::writer::{TEMPORARY, create_dir_durably};
use std::fs::{self, File};
use std::path::{Path, PathBuf};

/// Disk 0 is rank 0's; the others follow in the order of ranks.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Disks {
    /// Of each host.
    of_host: Vec<u32>,
    /// The host of each rank.
    hosts: Vec<u32>,
    /// Of each host, for people.
    names: Vec<String>,
}

impl Disks {
    /// One, which all of `ranks` ranks see.
    pub fn one(ranks: usize) -> Disks {
        Disks { of_host: vec![0], hosts: vec![0; ranks], names: vec![String::new()] }
    }

    /// `hosts` has the host of each rank, `seen` of each host the first one whose directory it sees: itself, if no other's.
    pub fn new(hosts: Vec<u32>, seen: &[u32], names: Vec<String>) -> Disks {
        let mut firsts: Vec<u32> = Vec::new();
        let mut number = |first: u32| match firsts.iter().position(|known| *known == first) {
            Some(at) => at as u32,
            None => {
                firsts.push(first);
                firsts.len() as u32 - 1
            }
        };
        Disks { of_host: seen.iter().map(|first| number(*first)).collect(), hosts, names }
    }

    /// Of each host.
    pub fn of_hosts(&self) -> &[u32] {
        &self.of_host
    }

    pub fn of_rank(&self, rank: usize) -> usize {
        self.of_host[self.hosts[rank] as usize] as usize
    }

    /// So many of the first ranks are together on disk 0.
    pub fn together(&self) -> usize {
        (0..self.hosts.len()).take_while(|rank| self.of_rank(*rank) == 0).count()
    }

    /// Those to which the first `writers` ranks write: as many, from 0 on.
    pub fn written(&self, writers: usize) -> usize {
        (0..writers).map(|rank| self.of_rank(rank) + 1).max().unwrap_or(0)
    }

    /// The first rank on a disk: it decides there.
    pub fn lead(&self, disk: usize) -> usize {
        self.ranks(disk).next().expect("a disk is one of some rank")
    }

    /// In ascending order.
    pub fn ranks(&self, disk: usize) -> impl Iterator<Item = usize> {
        (0..self.hosts.len()).filter(move |rank| self.of_rank(*rank) == disk)
    }

    /// Those that see a disk, in ascending order.
    pub fn hosts(&self, disk: usize) -> impl Iterator<Item = u32> {
        (0..).zip(&self.of_host).filter(move |(_, of)| **of as usize == disk).map(|(host, _)| host)
    }

    /// The host to which a disk belongs, for people.
    pub fn name(&self, disk: usize) -> &str {
        let host = self.of_host.iter().position(|of| *of as usize == disk);
        host.and_then(|host| self.names.get(host)).map_or("", String::as_str)
    }
}

/// A file by which other hosts find out that they see the same directory. It is gone when this is dropped.
#[derive(Debug)]
pub struct Mark {
    path: PathBuf,
}

/// What tells a mark from all others.
#[derive(Clone, Copy, Debug)]
pub struct MarkOf<'a> {
    /// The start of the job that looks.
    pub gang: &'a str,
    pub host: u32,
    /// The process that leaves it.
    pub pid: u32,
}

impl MarkOf<'_> {
    fn path(&self, dir: &Path) -> PathBuf {
        let MarkOf { gang, host, pid } = self;
        dir.join(format!("{TEMPORARY}host-{gang}-{host}-{pid}"))
    }

    /// Whether it can be seen in `dir`.
    pub fn is_in(&self, dir: &Path) -> bool {
        fs::symlink_metadata(self.path(dir)).is_ok()
    }
}

impl Mark {
    /// In `dir`, which is made if it is missing.
    pub fn leave(dir: &Path, of: &MarkOf) -> Result<Mark, CheckpointError> {
        let path = of.path(dir);
        let made = create_dir_durably(dir).and_then(|_| File::create(&path));
        match made {
            Ok(_) => Ok(Mark { path }),
            Err(source) => Err(CheckpointError::Unwritable { path: dir.to_owned(), source }),
        }
    }
}

impl Drop for Mark {
    fn drop(&mut self) {
        let _ = fs::remove_file(&self.path); // the next writer removes what is left
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn disks(hosts: &[u32], seen: &[u32]) -> Disks {
        let names = (0..seen.len()).map(|host| format!("box-{host}")).collect();
        Disks::new(hosts.to_vec(), seen, names)
    }

    #[test]
    fn hosts_that_see_the_same_directory_share_a_disk() {
        let apart = disks(&[0, 0, 1, 1], &[0, 1]);
        assert_eq!((apart.together(), apart.written(2), apart.written(4)), (2, 1, 2));
        assert_eq!(
            (apart.lead(1), apart.ranks(1).collect::<Vec<_>>(), apart.name(1)),
            (2, vec![2, 3], "box-1")
        );
        let shared = disks(&[0, 0, 1, 1], &[0, 0]);
        assert_eq!((shared.together(), shared.written(4)), (4, 1));
        // The second and the third see one that the first does not.
        let mixed = disks(&[0, 1, 2, 3], &[0, 1, 1, 0]);
        assert_eq!(mixed.of_hosts(), [0, 1, 1, 0]);
        assert_eq!((mixed.together(), mixed.written(4), mixed.lead(1)), (1, 2, 1));
        assert_eq!(mixed.ranks(0).collect::<Vec<_>>(), [0, 3]);
    }

    #[test]
    fn a_mark_is_seen_where_it_lies_while_it_is_kept() {
        let (here, there) = (tempfile::tempdir().unwrap(), tempfile::tempdir().unwrap());
        let of = MarkOf { gang: "job-1.2", host: 3, pid: std::process::id() };
        let mark = Mark::leave(&here.path().join("new"), &of).unwrap();
        assert!(of.is_in(&here.path().join("new")) && !of.is_in(there.path()));
        assert!(!MarkOf { gang: "job-1.1", ..of }.is_in(&here.path().join("new")));
        drop(mark);
        assert!(!of.is_in(&here.path().join("new")));
    }
}
