//! Three replicas on simulated disks, and what they say to each other.

use super::*;

/// Replicas, the messages between them, and the snapshots that they fetch.
pub struct Cluster {
    pub replicas: BTreeMap<u64, TestReplica>,
    /// What every replica answered, by ticket.
    pub answers: BTreeMap<Ticket, Answer>,
    pub cut: Option<u64>,
    /// Reads that came back, by replica.
    pub reads: Vec<(u64, Ticket)>,
}

pub fn replica(id: u64) -> TestReplica {
    Replica::create(Arc::new(MemoryDisk::default()), id, &[1, 2, 3], State::new("test".into()), 7).unwrap()
}

impl Cluster {
    pub fn new() -> Self {
        let replicas = (1..=3).map(|id| (id, replica(id))).collect();
        Cluster { replicas, answers: BTreeMap::new(), cut: None, reads: Vec::new() }
    }

    pub fn is_cut(&self, a: u64, b: u64) -> bool {
        self.cut.is_some_and(|cut| cut == a || cut == b)
    }

    /// Delivers messages until none is left. A message counts as sent only with what its sender's disk holds by then.
    pub fn settle(&mut self) {
        loop {
            let mut sent = Vec::new();
            for (id, replica) in &mut self.replicas {
                let output = replica.process(&mut |message| sent.push(message)).unwrap();
                for (ticket, answer) in output.answers {
                    assert_eq!(self.answers.entry(ticket).or_insert(answer.clone()), &answer);
                }
                self.reads.extend(output.reads.into_iter().map(|ticket| (*id, ticket)));
            }
            let fetched = self.fetch();
            sent.retain(|message| !self.is_cut(message.from, message.to));
            if sent.is_empty() && !fetched {
                break;
            }
            for message in sent {
                if let Some(to) = self.replicas.get_mut(&message.to) {
                    to.step(message).unwrap();
                }
            }
        }
    }

    /// One chunk for everybody who wants one.
    pub fn fetch(&mut self) -> bool {
        let wants: Vec<_> = self
            .replicas
            .iter()
            .filter_map(|(id, replica)| replica.wants().map(|want| (*id, want)))
            .collect();
        let mut moved = false;
        for (id, (from, fetch)) in wants {
            if !self.is_cut(id, from) {
                let chunk = self.replicas.get_mut(&from).unwrap().serve(id, &fetch).unwrap().chunk().unwrap();
                self.replicas.get_mut(&id).unwrap().take_chunk(from, chunk).unwrap();
                moved = true;
            }
        }
        moved
    }

    pub fn run_until(&mut self, done: impl Fn(&Cluster) -> bool) {
        for _ in 0..200 {
            if done(self) {
                return;
            }
            self.replicas.values_mut().for_each(Replica::tick);
            self.settle();
        }
        panic!("not reached in 200 ticks");
    }

    pub fn leader(&self) -> Option<u64> {
        let mut leaders = self.replicas.values().filter(|it| it.leads() && self.cut != Some(it.id()));
        leaders.next().map(Replica::id)
    }

    /// With a leader.
    pub fn led() -> (Self, u64) {
        let mut cluster = Cluster::new();
        cluster.run_until(|cluster| cluster.leader().is_some());
        let leader = cluster.leader().unwrap();
        (cluster, leader)
    }

    pub fn at(&mut self, id: u64) -> &mut TestReplica {
        self.replicas.get_mut(&id).unwrap()
    }

    pub fn propose(&mut self, id: u64, seq: u64) {
        self.at(id).propose(seq, &command(seq)).unwrap();
        self.settle();
    }

    pub fn agree(&self, a: u64, b: u64) -> bool {
        let (a, b) = (&self.replicas[&a], &self.replicas[&b]);
        a.applied_index() == b.applied_index() && a.state() == b.state()
    }
}
