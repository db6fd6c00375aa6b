//! The node agent. `agent` decides, purely; `driver` does. The simulator runs `agent` without the driver.

pub mod agent;
mod backoff;
pub mod budget;
mod cgroup;
mod container;
pub mod coordinators;
pub mod doors;
pub mod driver;
pub mod exec_rank;
pub mod gang;
mod last_lines;
mod link;
mod memory;
mod output;
mod panics;
mod prepare;
mod processes;
pub mod program;
mod rank_io;
mod ranks;
mod records;
pub mod relay;
mod spawn;
pub mod stall;
mod straggler;
pub mod stream;
pub mod verdict;
