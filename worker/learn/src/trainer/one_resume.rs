//! All ranks go on from the same checkpoint, or none does.

use crate::error::{Error, Result};
use fleet_checkpoint::{manifest_sha256, weights_sample_sha256};
use fleet_collectives::{Gang, Op};
use std::path::Path;

/// What a rank goes on from: the step, 0 where it begins anew, of the manifest's hash as much as a number holds, and as much of a hash of the
/// models that it reads.
type Point = [f64; 3];

/// Hexadecimal digits of a hash that an f64 holds exactly.
const DIGITS: usize = 12;

/// An error that names two ranks which go on from different checkpoints, the same on all of them. A collective call.
/// Ranks of several hosts also read the same `models`.
pub(super) fn agree(resumed: Option<(&Path, u64)>, models: &[&Path], gang: &mut dyn Gang) -> Result<()> {
    let (rank, world) = (gang.rank(), gang.world_size());
    if world == 1 {
        return Ok(());
    }
    let mut points: Vec<Point> = vec![[0.0; 3]; world];
    if let Some((checkpoint, step)) = resumed {
        points[rank] = [step as f64, number(&manifest_sha256(checkpoint).unwrap_or_default()), 0.0];
    }
    // What cannot be read is told by who reads it.
    let samples = models.iter().filter_map(|dir| weights_sample_sha256(dir).ok());
    points[rank][2] = number(&samples.collect::<String>());
    gang.all_reduce_f64(points.as_flattened_mut(), Op::Sum)?;
    different(&points).map_or(Ok(()), |line| Err(Error::Input(line)))
}

fn number(hash: &str) -> f64 {
    let digits = hash.get(..DIGITS).unwrap_or_default();
    u64::from_str_radix(digits, 16).unwrap_or(0) as f64
}

fn different(points: &[Point]) -> Option<String> {
    let (rank, other) = points.iter().enumerate().find(|(_, point)| **point != points[0])?;
    if points[0][..2] == other[..2] {
        return Some(format!(
            "rank {rank} has another model in model.path than rank 0; copy the same one to all nodes"
        ));
    }
    let from = |[step, hash, _]: Point| match step {
        0.0 if hash == 0.0 => "begins anew".to_owned(),
        step => format!("goes on from step {step}"),
    };
    let (first, second) = (from(points[0]), from(*other));
    let second = if first == second { format!("{second} of another checkpoint") } else { second };
    Some(format!(
        "the nodes of the job have different checkpoints: rank 0 {first}, and rank {rank} {second}; copy the same one to all of them, or name one that \
         the cluster knows (`fleet checkpoints ls`), which it brings to them"
    ))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn ranks_that_go_on_from_different_checkpoints_are_named() {
        let cases = [
            (vec![[6.0, 5.0, 0.0]; 3], None),
            (vec![[0.0, 0.0, 0.0]; 2], None),
            (
                vec![[6.0, 5.0, 0.0], [6.0, 5.0, 0.0], [9.0, 7.0, 0.0]],
                Some("rank 0 goes on from step 6, and rank 2 goes on from step 9"),
            ),
            (
                vec![[6.0, 5.0, 0.0], [0.0, 0.0, 0.0]],
                Some("rank 0 goes on from step 6, and rank 1 begins anew"),
            ),
            (
                vec![[0.0, 0.0, 0.0], [6.0, 5.0, 0.0]],
                Some("rank 0 begins anew, and rank 1 goes on from step 6"),
            ),
            (
                vec![[6.0, 5.0, 0.0], [6.0, 4.0, 0.0]],
                Some("rank 1 goes on from step 6 of another checkpoint"),
            ),
        ];
        let other_model = different(&[[0.0, 0.0, 1.0], [0.0, 0.0, 1.0], [0.0, 0.0, 2.0]]).unwrap_or_default();
        assert!(other_model.contains("rank 2 has another model"), "{other_model}");
        for (points, wanted) in cases {
            let found = different(&points);
            assert_eq!(found.is_some(), wanted.is_some(), "{found:?}");
            assert!(found.unwrap_or_default().contains(wanted.unwrap_or_default()));
        }
        assert_ne!(number("0123456789abcdef"), number("0123456789accdef"));
    }
}
