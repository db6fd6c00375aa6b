//! Which nodes a gang goes to, as arithmetic: free places in, ranks per node out. Deterministic, and all ranks or none.

use fleet_common::ids::NodeId;

/// Ranks that a node has places for.
pub type Room = (NodeId, u32);

/// Places for `ranks` ranks: on exactly `nodes` nodes with as many on each, or else on as few as possible and there on the fullest ones
/// that still fit, which keeps large holes for large jobs. In rank order.
pub fn fit(room: &[Room], ranks: u32, nodes: Option<u32>) -> Option<Vec<Room>> {
    if ranks == 0 {
        return None;
    }
    match nodes {
        Some(nodes) => evenly(room, ranks, nodes),
        None => on_few(room, ranks),
    }
}

fn evenly(room: &[Room], ranks: u32, nodes: u32) -> Option<Vec<Room>> {
    if nodes == 0 || !ranks.is_multiple_of(nodes) {
        return None;
    }
    let each = ranks / nodes;
    let mut fitting: Vec<Room> = room.iter().copied().filter(|(_, free)| *free >= each).collect();
    if fitting.len() < nodes as usize {
        return None;
    }
    fitting.sort_by_key(|(node, free)| (*free, *node));
    fitting.truncate(nodes as usize);
    fitting.sort();
    Some(fitting.into_iter().map(|(node, _)| (node, each)).collect())
}

fn on_few(room: &[Room], ranks: u32) -> Option<Vec<Room>> {
    // Most nodes of a busy cluster are full: those need not be sorted.
    let mut largest: Vec<Room> = room.iter().copied().filter(|(_, free)| *free > 0).collect();
    if largest.iter().fold(0, |sum: u32, (_, free)| sum.saturating_add(*free)) < ranks {
        return None;
    }
    largest.sort_by_key(|(node, free)| (std::cmp::Reverse(*free), *node));
    let (mut left, mut taken) = (ranks, Vec::new());
    for (at, (node, free)) in largest.iter().enumerate() {
        if *free < left {
            taken.push((*node, *free));
            left -= free;
            continue;
        }
        // The rest fits on one node: the tightest of those that are not taken.
        let tightest = largest.get(at..)?.iter().filter(|(_, free)| *free >= left);
        let (node, _) = tightest.min_by_key(|(node, free)| (*free, *node))?;
        taken.push((*node, left));
        return Some(taken);
    }
    None
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    fn room(free: &[u32]) -> Vec<Room> {
        free.iter().enumerate().map(|(at, free)| (NodeId(at as u64 + 1), *free)).collect()
    }

    fn placed(free: &[u32], ranks: u32, nodes: Option<u32>) -> Option<Vec<(u64, u32)>> {
        Some(fit(&room(free), ranks, nodes)?.into_iter().map(|(node, ranks)| (node.0, ranks)).collect())
    }

    #[test]
    fn one_node_is_better_than_two_and_a_tight_one_better_than_a_wide_one() {
        assert_eq!(placed(&[8, 4, 2], 3, None), Some(vec![(2, 3)]));
        assert_eq!(placed(&[8, 4, 2], 10, None), Some(vec![(1, 8), (3, 2)]));
        assert_eq!(placed(&[8, 4, 2], 14, None), Some(vec![(1, 8), (2, 4), (3, 2)]));
        assert_eq!(placed(&[8, 4, 2], 15, None), None);
    }

    #[test]
    fn a_wish_for_nodes_is_met_exactly_or_not_at_all() {
        assert_eq!(placed(&[8, 4, 2], 4, Some(2)), Some(vec![(2, 2), (3, 2)]));
        assert_eq!(placed(&[8, 4, 2], 4, Some(1)), Some(vec![(2, 4)]));
        assert_eq!(placed(&[8, 4, 2], 9, Some(3)), None);
        assert_eq!(placed(&[8, 4, 2], 5, Some(2)), None);
    }

    proptest! {
        #[test]
        fn a_placement_has_all_ranks_and_no_node_more_than_it_has_room_for(
            free in prop::collection::vec(0u32..9, 0..8), ranks in 1u32..40, nodes in prop::option::of(1u32..5),
        ) {
            let room = room(&free);
            match fit(&room, ranks, nodes) {
                Some(parts) => {
                    prop_assert_eq!(parts.iter().map(|(_, ranks)| ranks).sum::<u32>(), ranks);
                    for (node, ranks) in &parts {
                        prop_assert!(*ranks > 0 && *ranks <= free[node.0 as usize - 1]);
                    }
                    prop_assert!(nodes.is_none_or(|nodes| parts.len() == nodes as usize));
                    if nodes.is_none() && parts.len() > 1 {
                        let mut sorted = free.clone();
                        sorted.sort_unstable_by(|a, b| b.cmp(a));
                        prop_assert!(sorted[..parts.len() - 1].iter().sum::<u32>() < ranks, "fewer nodes would do");
                    }
                }
                None if nodes.is_none() => prop_assert!(free.iter().sum::<u32>() < ranks),
                None => {}
            }
        }
    }
}
