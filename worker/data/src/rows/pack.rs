//! Which examples share a sequence: best fit, the longest first, as TRL's `bfd` packs them.

use std::collections::{BTreeMap, VecDeque};

/// Packs of at most `max` tokens, each a list of examples, of which none has more. An example goes where the least room is left that holds
/// it; of packs with equal room to the one that had it first. The same lengths give the same packs.
pub(super) fn best_fit(lengths: &[u32], max: u32) -> Vec<Vec<u32>> {
    let mut order: Vec<u32> = (0..).take(lengths.len()).collect();
    order.sort_by_key(|example| std::cmp::Reverse(lengths[*example as usize]));
    let mut packs: Vec<Vec<u32>> = Vec::new();
    // Packs by their room.
    let mut open: BTreeMap<u32, VecDeque<usize>> = BTreeMap::new();
    for example in order {
        let length = lengths[example as usize];
        let fit = open.range(length..).next().map(|(room, _)| *room);
        let taken = fit.and_then(|room| {
            let packs = open.get_mut(&room)?;
            let pack = packs.pop_front()?;
            if packs.is_empty() {
                open.remove(&room);
            }
            Some((room, pack))
        });
        let (room, pack) = taken.unwrap_or_else(|| {
            packs.push(Vec::new());
            (max, packs.len() - 1)
        });
        packs[pack].push(example);
        if room > length {
            open.entry(room - length).or_default().push_back(pack);
        }
    }
    packs
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    #[test]
    fn the_least_room_that_holds_an_example_is_taken() {
        assert_eq!(best_fit(&[3, 8, 5, 2, 9], 10), [vec![4], vec![1, 3], vec![2, 0]]);
        assert_eq!(best_fit(&[4, 4, 4, 4, 2, 2], 10), [vec![0, 1, 4], vec![2, 3, 5]]);
        assert_eq!(best_fit(&[], 10), Vec::<Vec<u32>>::new());
    }

    #[test]
    fn packs_are_those_of_trl() {
        let golden: serde_json::Value =
            serde_json::from_str(include_str!("../../tests/golden/rows/expected.json")).unwrap();
        let lengths: Vec<u32> = serde_json::from_value(golden["lengths"].clone()).unwrap();
        assert_eq!(serde_json::to_value(best_fit(&lengths, 64)).unwrap(), golden["packs"]);
    }

    proptest! {
        #[test]
        fn every_example_is_in_one_pack_and_no_two_packs_are_half_empty(lengths in proptest::collection::vec(1u32..40, 0..80)) {
            let packs = best_fit(&lengths, 40);
            let mut all = packs.concat();
            all.sort_unstable();
            prop_assert!(all.into_iter().eq(0..lengths.len() as u32));
            let full = |pack: &Vec<u32>| pack.iter().map(|example| lengths[*example as usize]).sum::<u32>();
            prop_assert!(packs.iter().all(|pack| full(pack) <= 40));
            prop_assert!(packs.iter().filter(|pack| full(pack) <= 20).count() <= 1);
        }
    }
}
