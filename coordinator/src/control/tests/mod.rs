//! Coordinators on simulated disks and wires: what they do together, and what becomes of it when some fail.

mod agents;
mod calls;
mod custody;
mod greeting;
mod growth;
mod measures;
mod members;
mod net;
mod repairs;
