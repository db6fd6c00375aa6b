//! What several hosts need to know of each other's disks: which of them are the same, and what was written to the others.

use crate::error::Result;
use fleet_checkpoint::{Disks, Mark, MarkOf};
use fleet_collectives::{Gang, Op};
use fleet_common::protocol::RankStart;
use std::path::Path;

/// Numbers of one sum, by which bytes travel.
const NUMBERS: usize = 4096;
/// Bytes in each of them, which a sum with zeros keeps exactly.
const BYTES: usize = 6;

/// On which disks the ranks of `gang` see `dir`. The first rank of each host leaves a file there and looks for those of the others. A
/// collective call.
pub(super) fn find(start: &RankStart, dir: &Path, gang: &mut dyn Gang) -> Result<Disks> {
    let (world, hosts) = (gang.world_size(), start.hosts as usize);
    if hosts <= 1 {
        return Ok(Disks::one(world));
    }
    let (host, leads) = (start.host as usize, start.local_rank == 0);
    let name = format!("{}.{}", start.job, start.generation);
    let mark = |host: usize, pid: f64| MarkOf { gang: &name, host: host as u32, pid: pid as u32 };
    let pid = f64::from(std::process::id());
    let left = leads.then(|| Mark::leave(dir, &mark(host, pid))).transpose()?;
    // After this sum all have left theirs.
    let mut numbers = vec![0.0; world + hosts];
    numbers[start.rank as usize] = host as f64;
    numbers[world + host] = if leads { pid } else { 0.0 };
    gang.all_reduce_f64(&mut numbers, Op::Sum)?;
    let (host_of, pids) = numbers.split_at(world);
    let mut seen = vec![0.0; hosts];
    if leads {
        let first = (0..host).find(|other| mark(*other, pids[*other]).is_in(dir));
        seen[host] = first.unwrap_or(host) as f64;
    }
    // After this one all have looked.
    gang.all_reduce_f64(&mut seen, Op::Sum)?;
    drop(left);
    let whole = |numbers: &[f64]| numbers.iter().map(|number| *number as u32).collect::<Vec<u32>>();
    let peers = start.network.as_ref().map_or(&[][..], |network| &network.peers[..]);
    let names = (0..hosts).map(|host| {
        let peer = peers.iter().find(|peer| peer.host as usize == host);
        peer.map_or_else(|| format!("host {host}"), |peer| peer.address.clone())
    });
    Ok(Disks::new(whole(host_of), &whole(&seen), names.collect()))
}

/// All ranks get the bytes of the one that has some. A collective call, for what is small beside a step.
pub(super) fn from_one(bytes: Option<&[u8]>, gang: &mut dyn Gang) -> Result<Vec<u8>> {
    let mut len = [bytes.map_or(0.0, |bytes| bytes.len() as f64)];
    gang.all_reduce_f64(&mut len, Op::Sum)?;
    let len = len[0] as usize;
    let mut all = Vec::with_capacity(len);
    while all.len() < len {
        let now = (len - all.len()).min(NUMBERS * BYTES);
        let mut numbers = vec![0.0; now.div_ceil(BYTES)];
        if let Some(bytes) = bytes {
            let some = bytes[all.len()..][..now].chunks(BYTES);
            numbers.iter_mut().zip(some).for_each(|(number, bytes)| *number = number_of(bytes));
        }
        gang.all_reduce_f64(&mut numbers, Op::Sum)?;
        all.extend(numbers.iter().flat_map(|number| (*number as u64).to_le_bytes()[..BYTES].to_vec()));
        all.truncate(len);
    }
    Ok(all)
}

fn number_of(bytes: &[u8]) -> f64 {
    let mut eight = [0; 8];
    eight[..bytes.len()].copy_from_slice(bytes);
    u64::from_le_bytes(eight) as f64
}

#[cfg(test)]
mod tests {
    use super::*;
    use fleet_collectives::Solo;

    #[test]
    fn bytes_come_as_they_were_sent() {
        for len in [0, 1, 5, 6, 7, NUMBERS * BYTES, NUMBERS * BYTES + 11] {
            let bytes: Vec<u8> = (0..len).map(|at| (at * 37 + 255) as u8).collect();
            let mut gang = Solo::new(1);
            assert_eq!(from_one(Some(&bytes), &mut gang).unwrap(), bytes);
            assert!(from_one(None, &mut gang).unwrap().is_empty());
        }
    }
}
