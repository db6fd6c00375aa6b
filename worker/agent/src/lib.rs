//! The node agent. `agent` decides, purely; `driver` does. The simulator runs `agent` without the driver.

pub mod agent;
mod backoff;
pub mod budget;
pub mod coordinators;
pub mod driver;
pub mod exec_rank;
pub mod gang;
mod lines;
mod link;
mod memory;
mod output;
mod prepare;
mod program;
mod rank_io;
mod ranks;
mod spawn;
pub mod stream;
pub mod verdict;
