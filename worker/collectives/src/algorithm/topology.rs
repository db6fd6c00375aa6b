//! Which rank is on which host.

/// Hosts are numbered from 0 in the order of their first rank.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Topology {
    /// Of each rank.
    host_of: Vec<usize>,
    /// Of each host, its ranks in order.
    ranks: Vec<Vec<usize>>,
    /// Of each rank, its place on its host.
    place: Vec<usize>,
}

impl Topology {
    /// `labels` says for each rank where it is; ranks with equal labels are on one host.
    pub fn new(labels: &[usize]) -> Topology {
        let mut seen: Vec<usize> = Vec::new();
        let mut topology = Topology { host_of: Vec::new(), ranks: Vec::new(), place: Vec::new() };
        for (rank, label) in labels.iter().enumerate() {
            let host = seen.iter().position(|one| one == label).unwrap_or_else(|| {
                seen.push(*label);
                topology.ranks.push(Vec::new());
                seen.len() - 1
            });
            topology.host_of.push(host);
            topology.place.push(topology.ranks[host].len());
            topology.ranks[host].push(rank);
        }
        topology
    }

    /// `hosts` times `ranks`, host by host.
    pub fn even(hosts: usize, ranks: usize) -> Topology {
        Topology::new(&(0..hosts * ranks).map(|rank| rank / ranks).collect::<Vec<_>>())
    }

    pub fn world(&self) -> usize {
        self.host_of.len()
    }

    pub fn hosts(&self) -> usize {
        self.ranks.len()
    }

    pub fn host_of(&self, rank: usize) -> usize {
        self.host_of[rank]
    }

    /// The ranks of a host, in order.
    pub fn ranks_of(&self, host: usize) -> &[usize] {
        &self.ranks[host]
    }

    /// This rank's place among those of its host.
    pub fn place_of(&self, rank: usize) -> usize {
        self.place[rank]
    }

    /// Who on `host` carries what belongs to `rank`: on its own host the rank itself, on others the one at its place, around.
    pub(crate) fn carrier(&self, host: usize, rank: usize) -> usize {
        let ranks = &self.ranks[host];
        ranks[self.place[rank] % ranks.len()]
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn hosts_are_numbered_as_they_come_and_share_what_is_carried() {
        let topology = Topology::new(&[7, 3, 7, 7, 3]);
        assert_eq!((topology.world(), topology.hosts()), (5, 2));
        assert_eq!(topology.ranks_of(0), [0, 2, 3]);
        assert_eq!([topology.host_of(4), topology.place_of(4)], [1, 1]);
        assert_eq!((0..5).map(|rank| topology.carrier(1, rank)).collect::<Vec<_>>(), [1, 1, 4, 1, 4]);
        assert_eq!((0..5).map(|rank| topology.carrier(0, rank)).collect::<Vec<_>>(), [0, 0, 2, 3, 2]);
        assert_eq!(Topology::even(2, 2), Topology::new(&[0, 0, 9, 9]));
    }
}
