//! How a rank writes what it has copied of a checkpoint, while training goes on.

use super::companions::Companions;
use super::in_flight::Done;
use crate::snapshot::Snapshot;
use fleet_checkpoint::{CheckpointError, PartWriter, TrainerState, Writer};
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::time::{Duration, Instant};

/// Longest wait for the part of a rank that is slower to write than the first one on its disk. A rank that dies ends the gang, and the wait,
/// at once.
const PART_WAIT: Duration = Duration::from_secs(900);

/// What a rank writes with.
pub(super) enum Pen {
    /// With what only rank 0 has to write.
    Lead(Box<Writer>, Option<(Arc<Companions>, Box<TrainerState>)>),
    Other(PartWriter),
}

impl Pen {
    /// With `loss`, publishes on the only disk.
    pub fn write(
        self,
        snapshot: &mut Snapshot,
        loss: Option<f64>,
        given_up: &AtomicBool,
    ) -> Result<Done, CheckpointError> {
        match self {
            Pen::Lead(mut writer, own) => {
                snapshot.write(writer.part())?;
                if let Some((companions, state)) = own {
                    companions.write(&mut writer)?;
                    writer.write_state(&state)?;
                }
                let written = Instant::now();
                let wait = || !given_up.load(Ordering::Relaxed) && written.elapsed() < PART_WAIT;
                writer.collect(&wait)?;
                let Some(loss) = loss else { return Ok(Done::Ready(writer)) };
                writer.prepare(loss)?;
                writer.publish().map(Done::Published)
            }
            Pen::Other(mut part) => match snapshot.write(&mut part) {
                Ok(()) => part.hand_in().map(|()| Done::Part),
                Err(e) => {
                    part.fail(&e);
                    Err(e)
                }
            },
        }
    }

    /// There is nothing to write.
    pub fn give_up(self, why: &CheckpointError) {
        if let Pen::Other(part) = self {
            part.fail(why);
        }
    }
}
