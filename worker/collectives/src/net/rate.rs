//! How fast links between hosts are, as their gang sees it: who had more to send than a connection took measures how fast it was taken. Pure.

use crate::algorithm::Topology;
use std::collections::VecDeque;
use std::fmt;
use std::time::{Duration, Instant};

/// Bytes over which a rate is measured: more than a stutter, less than a gradient.
const WINDOW: usize = 1 << 20;
/// A link that has less than this share of the others' rate is slow.
const SLOW: f64 = 0.25;

/// Windows that are kept, the newest.
const WINDOWS_MAX: usize = 64;

/// Of one connection, what it takes while there is more. The median of the newest windows: the first are fast, while buffers of the kernel
/// fill, and a peer that reads late makes one slow.
#[derive(Clone, Debug, Default)]
pub struct Rate {
    /// Bytes in a second, oldest first.
    windows: VecDeque<f64>,
    /// Since when the connection takes less than there is, and what it took.
    window: Option<(Instant, usize)>,
}

impl Rate {
    /// The connection takes no more now.
    pub fn is_full(&mut self, now: Instant) {
        self.window.get_or_insert((now, 0));
    }

    pub fn took(&mut self, bytes: usize, now: Instant) {
        let Some((since, taken)) = &mut self.window else { return };
        *taken += bytes;
        if *taken >= WINDOW {
            let seconds = (now - *since).max(Duration::from_micros(1)).as_secs_f64();
            let rate = *taken as f64 / seconds;
            if self.windows.len() == WINDOWS_MAX {
                self.windows.pop_front();
            }
            self.windows.push_back(rate);
            self.window = Some((now, 0));
        }
    }

    /// There is nothing to send now.
    pub fn is_idle(&mut self) {
        self.window = None;
    }

    /// Bytes in a second since the last look; 0: the connection took all there was.
    pub fn look(&mut self) -> f64 {
        let mut windows = Vec::from(std::mem::take(&mut self.windows));
        windows.sort_by(f64::total_cmp);
        windows.get(windows.len() / 2).copied().unwrap_or(0.0)
    }
}

/// A link that is much slower than the others.
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct SlowLink {
    pub from_host: usize,
    pub to_host: usize,
    /// Bytes in a second.
    pub rate: f64,
    /// The median of the other links that were measured.
    pub others: f64,
}

impl SlowLink {
    /// What `rank` measured to every rank, 0 where nothing, as a part of what each host sends to each other host: a row for each host. What the
    /// ranks of a host send to another one is to be added up.
    pub(super) fn of_rank(topology: &Topology, rank: usize, rates: &[f64]) -> Vec<f64> {
        let (from, hosts) = (topology.host_of(rank), topology.hosts());
        let mut links = vec![0.0; hosts * hosts];
        for (peer, rate) in rates.iter().enumerate() {
            let to = topology.host_of(peer);
            if from != to {
                links[from * hosts + to] += rate;
            }
        }
        links
    }

    /// `links` has a row for each host with the rates to all hosts.
    pub(super) fn among(hosts: usize, links: &[f64]) -> Option<SlowLink> {
        let mut known: Vec<usize> = (0..links.len()).filter(|link| links[*link] > 0.0).collect();
        known.sort_by(|one, other| links[*one].total_cmp(&links[*other]));
        let (slowest, others) = known.split_first()?;
        let others = links[*others.get(others.len() / 2)?];
        let rate = links[*slowest];
        let slow = SlowLink { from_host: slowest / hosts, to_host: slowest % hosts, rate, others };
        (rate < SLOW * others).then_some(slow)
    }
}

impl fmt::Display for SlowLink {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let SlowLink { from_host, to_host, rate, others } = *self;
        write!(f, "slow link: host {from_host} to host {to_host}, {}, others {}", bits(rate), bits(others))
    }
}

fn bits(bytes_per_second: f64) -> String {
    match bytes_per_second * 8.0 {
        bits if bits < 1e9 => format!("{:.0} Mbit/s", bits / 1e6),
        bits => format!("{:.1} Gbit/s", bits / 1e9),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn what_a_full_connection_takes_is_its_rate_and_one_window_more_or_less_changes_little() {
        let start = Instant::now();
        let at = |ms| start + Duration::from_millis(ms);
        let mut rate = Rate::default();
        rate.took(WINDOW, at(1));
        assert_eq!(rate.look(), 0.0, "it was not full");
        rate.is_full(at(10));
        // Into the kernel's buffers; as fast as the link; the peer was late.
        rate.took(WINDOW, at(11));
        rate.took(WINDOW / 2, at(20));
        rate.is_full(at(20));
        rate.took(WINDOW / 2, at(111));
        rate.took(WINDOW, at(1111));
        assert_eq!(rate.look(), WINDOW as f64 / 0.1);
        assert_eq!(rate.look(), 0.0);
        rate.is_idle();
        rate.took(WINDOW, at(1200));
        assert_eq!(rate.look(), 0.0);
    }

    #[test]
    fn the_link_that_is_slower_than_the_others_is_named() {
        let fast = 125e6;
        let mut rates = [0.0, fast, 0.0, 0.0, 0.0, fast / 11.0, 1.2 * fast, 0.0, 0.0];
        let slow = SlowLink::among(3, &rates).unwrap();
        assert_eq!(slow.to_string(), "slow link: host 1 to host 2, 91 Mbit/s, others 1.2 Gbit/s");
        rates[5] = fast / 2.0;
        assert_eq!(SlowLink::among(3, &rates), None, "half is no other kind of link");
        assert_eq!(SlowLink::among(3, &[0.0; 9]), None);
        rates = [0.0; 9];
        rates[1] = fast;
        assert_eq!(SlowLink::among(3, &rates), None, "there is nothing to compare with");
        // Ranks of a host share its link, and those of one host are no link.
        let two = Topology::new(&[0, 0, 1, 1]);
        let rows = [[0.0, 9e9, fast / 20.0, 0.0], [0.0, 0.0, 0.0, fast / 20.0], [fast, 0.0, 0.0, 0.0]];
        let mut links = [0.0; 4];
        for (rank, row) in rows.iter().enumerate() {
            let of_rank = SlowLink::of_rank(&two, rank, row);
            links.iter_mut().zip(of_rank).for_each(|(link, rate)| *link += rate);
        }
        assert_eq!(
            SlowLink::among(2, &links).unwrap().to_string(),
            "slow link: host 0 to host 1, 100 Mbit/s, others 1.0 Gbit/s"
        );
    }
}
