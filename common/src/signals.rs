//! What it means when more than one signal asks a process to end.

use std::time::Duration;

/// One that follows another within this time says nothing new: GNU `timeout` strikes its child and then the whole process group, and a
/// scheduler does much the same. Only one that comes later asks for the end at once, without what would still be saved.
pub const AGAIN_AFTER: Duration = Duration::from_secs(1);
