//! How a run learns, without a device: what happens when (`trainer`), what is asked of the model (`objective`), where its numbers lie and who
//! updates them (`strategy`), and the seam to what computes (`executor`, `units`).
//!
//! A step: the trainer reads windows and hands them to a `Learner`. Behind that an `Engine` gives them to an executor, which asks the
//! strategy for each unit's weights, gives them back, and says when the unit's gradients are ready; at the end the strategy updates.

pub mod adapter;
pub mod agent_link;
pub mod batch;
pub mod dropout;
pub mod engine;
pub mod error;
pub mod executor;
pub mod machine;
pub mod model;
pub mod neftune;
pub mod objective;
pub mod optimizer;
pub mod preference;
mod reached;
mod scaler;
pub mod shim;
pub mod snapshot;
pub mod stopwatch;
pub mod strategy;
mod suspects;
#[doc(hidden)]
pub mod testing;
mod timed;
pub mod trace;
pub mod trainer;
pub mod units;
mod watched;
mod workers;
pub mod zeros;

pub use batch::{Batch, IGNORED, TokenBatch};
pub use engine::{Engine, Learner};
pub use error::{Error, Result};
pub use executor::{Executor, Tally, Weigh, Which};
pub use objective::{Measured, NextToken, Objective, Weighing};
pub use optimizer::{AdamW, Update};
pub use snapshot::Snapshot;
pub use stopwatch::{Phase, Stopwatch};
pub use strategy::{Report, Strategy, Votes};
pub use timed::TimedGang;
pub use units::{
    Gradients, Host, HostNumber, HostWeights, Kept, Memory, Pieces, Places, Table, UnitWeights, Units,
};
pub use workers::Workers;
