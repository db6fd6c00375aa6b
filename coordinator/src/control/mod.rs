//! One coordinator without the world: its replica of the log and the state, the agents it holds, the clients it answers, and what it
//! and the other coordinators ask of each other.
//!
//! Pure: no clock, no sockets, no threads, and no randomness but the seed that is passed in. `handle` takes what happened and
//! touches no disk; `process` does the work of all that was handled since, with one sync of the disk, and returns what is to be done.
//! After the same inputs at the same times two `Control`s do the same. The tokio driver and the simulator both drive this code.
//!
//! How a thing gets done, whoever asks for it:
//! - A change is proposed by the leader; another coordinator passes it on (`PeerMessage::Propose`) under its own ticket and sees that
//!   ticket come back when it applies the entry, so the answer needs no second way and survives the leader. Passed on again after a
//!   second or when the leader changes: every change carries a request id or is idempotent by itself.
//! - A query is answered by the leader, which alone has all observations, after a ReadIndex; `stale` ones by whoever is asked.
//! - A watch and an agent's orders come from the local state, once a ReadIndex has made sure that it is new enough.
//!
//! What the driver does: it authenticates (`Input` carries who somebody is by his certificate), encodes, signs certificates, makes
//! tokens, acknowledges heartbeats, and keeps to the two credits `AGENT_BATCHES_MAX` and `REPLIES_MAX`.

mod io;
mod peer;

pub use io::{
    AGENT_BATCHES_MAX, Action, Admission, Call, ControlError, Input, Myself, Now, REPLIES_MAX, Session,
    Status, TICK_MS,
};
pub use peer::{PeerMessage, Report, SIGHTINGS_MAX, Sighting, Told};

use crate::cluster::State;
use crate::raft::disk::Disk;
use crate::raft::history::History;
use crate::raft::replica::Replica;
use fleet_common::ids::ReplicaId;
use prost::Message as _;
use raft::eraftpb::Message;

pub struct Control<D: Disk> {
    replica: Replica<D>,
    history: History<D>,
    out: Vec<Action>,
}

impl<D: Disk> Control<D> {
    /// `seed` makes the tickets of this life of the coordinator: it must be another one at every start.
    pub fn new(replica: Replica<D>, history: History<D>, _myself: Myself, _seed: u64, _now: Now) -> Self {
        Control { replica, history, out: Vec::new() }
    }

    /// Takes what happened. Cheap, and touches no disk.
    pub fn handle(&mut self, _now: Now, input: Input) {
        match input {
            Input::Tick => self.replica.tick(),
            Input::Peer { message: PeerMessage::Raft(bytes), .. } => {
                if let Ok(message) = Message::decode(&bytes[..]) {
                    let _ = self.replica.step(message);
                }
            }
            _ => {}
        }
    }

    /// Does the work of all that was handled since the last call: one sync of the disk for all of it.
    pub fn process(&mut self, _now: Now) -> Result<Vec<Action>, ControlError> {
        let out = &mut self.out;
        self.replica.process(&mut |message| {
            out.push(Action::ToPeer {
                to: ReplicaId(message.to),
                message: PeerMessage::Raft(message.encode_to_vec()),
            });
        })?;
        Ok(std::mem::take(&mut self.out))
    }

    /// There is work left that waits for no input: call `process` again soon.
    pub fn busy(&self) -> bool {
        false
    }

    pub fn state(&self) -> &State {
        self.replica.state()
    }

    pub fn replica(&self) -> &Replica<D> {
        &self.replica
    }

    pub fn history(&self) -> &History<D> {
        &self.history
    }

    pub fn status(&self) -> Status {
        Status {
            leader: self.replica.leader().map(ReplicaId),
            term: self.replica.term(),
            commit_index: self.replica.commit_index(),
            applied_index: self.replica.applied_index(),
            ..Status::default()
        }
    }
}
