//! raft-rs speaks slog; fleet logs through tracing. Its chatter is of use only when raft itself is looked at.

use slog::{Drain, KV, Key, Level, Never, OwnedKVList, Record, Serializer};
use std::fmt::{self, Write};

struct ToTracing;

pub fn logger() -> slog::Logger {
    slog::Logger::root(ToTracing, slog::o!())
}

impl Drain for ToTracing {
    type Ok = ();
    type Err = Never;

    fn log(&self, record: &Record<'_>, _context: &OwnedKVList) -> Result<(), Never> {
        let level = record.level();
        let wanted = match level {
            Level::Critical | Level::Error => true,
            Level::Warning => tracing::enabled!(tracing::Level::INFO),
            _ => tracing::enabled!(tracing::Level::DEBUG),
        };
        if !wanted {
            return Ok(());
        }
        let mut line = Line(record.msg().to_string());
        // A field that cannot be shown leaves the message as it is.
        let _ = record.kv().serialize(record, &mut line);
        match level {
            Level::Critical | Level::Error => tracing::error!("raft: {}", line.0),
            Level::Warning => tracing::info!("raft: {}", line.0),
            _ => tracing::debug!("raft: {}", line.0),
        }
        Ok(())
    }
}

struct Line(String);

impl Serializer for Line {
    fn emit_arguments(&mut self, key: Key, value: &fmt::Arguments<'_>) -> slog::Result {
        write!(self.0, " {key}={value}").map_err(Into::into)
    }
}
