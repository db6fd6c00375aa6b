//! Who waits for which answer. Belongs to the raft thread, which alone looks here.

use crate::cluster::Answer;
use crate::control::{Action, Admission, Call, Session};
use fleet_common::protocol::{Refusal, Reply, ToAgent};
use std::collections::HashMap;
use tokio::sync::{mpsc, oneshot};

/// Where the answers of a call go. A receiver that is gone has given up.
pub enum CallSink {
    Once(oneshot::Sender<Reply>),
    /// A watch. Unbounded: `Control` keeps to its credit.
    Many(mpsc::UnboundedSender<Reply>),
    Join(oneshot::Sender<Result<Admission, Refusal>>),
    Propose(oneshot::Sender<Result<Answer, Refusal>>),
    Look(oneshot::Sender<Result<(), Refusal>>),
}

/// What the task of an agent's connection is told.
#[derive(Debug)]
pub enum Down {
    Say(Box<ToAgent>),
    /// One batch of events is done with; another may come.
    Taken,
    Close {
        message: String,
        fatal: bool,
    },
}

/// Unbounded: what is said to an agent answers what it said, and its credit comes back through this queue.
pub type SessionSink = mpsc::UnboundedSender<Down>;

#[derive(Default)]
pub struct Desk {
    calls: HashMap<Call, CallSink>,
    sessions: HashMap<Session, SessionSink>,
}

impl Desk {
    pub fn open(&mut self, call: Call, sink: CallSink) {
        self.calls.insert(call, sink);
    }

    pub fn forget(&mut self, call: Call) {
        self.calls.remove(&call);
    }

    pub fn connect(&mut self, session: Session, sink: SessionSink) {
        self.sessions.insert(session, sink);
    }

    pub fn disconnect(&mut self, session: Session) {
        self.sessions.remove(&session);
    }

    /// To every agent.
    pub fn say_to_all(&self, message: &ToAgent) {
        for sink in self.sessions.values() {
            let _ = sink.send(Down::Say(Box::new(message.clone()))); // one that is gone reports it itself
        }
    }

    /// Passes an action on to whom it concerns; gives it back if it concerns none of those that wait.
    pub fn deliver(&mut self, action: Action) -> Option<Action> {
        // A receiver that is gone does not matter to anybody.
        match action {
            Action::Reply { call, reply } => {
                let ends = !matches!(reply, Reply::Event { .. });
                match self.calls.get(&call) {
                    Some(CallSink::Many(sink)) => {
                        let _ = sink.send(reply);
                        if ends {
                            self.calls.remove(&call);
                        }
                    }
                    Some(_) => {
                        if let Some(CallSink::Once(sink)) = self.calls.remove(&call) {
                            let _ = sink.send(reply);
                        }
                    }
                    None => {}
                }
            }
            Action::Joined { call, result } => {
                if let Some(CallSink::Join(sink)) = self.calls.remove(&call) {
                    let _ = sink.send(result);
                }
            }
            Action::Proposed { call, result } => {
                if let Some(CallSink::Propose(sink)) = self.calls.remove(&call) {
                    let _ = sink.send(result);
                }
            }
            Action::Looked { call, result } => {
                if let Some(CallSink::Look(sink)) = self.calls.remove(&call) {
                    let _ = sink.send(result);
                }
            }
            Action::ToAgent { session, message } => self.down(session, Down::Say(Box::new(message))),
            Action::AgentTaken { session } => self.down(session, Down::Taken),
            Action::CloseAgent { session, message, fatal } => {
                self.down(session, Down::Close { message, fatal });
                self.sessions.remove(&session);
            }
            other => return Some(other),
        }
        None
    }

    fn down(&self, session: Session, down: Down) {
        if let Some(sink) = self.sessions.get(&session) {
            let _ = sink.send(down);
        }
    }
}
