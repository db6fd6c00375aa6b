//! Logs of every fleet process: `tracing` on stderr, filtered by `FLEET_LOG`. Never stdout, which belongs to results.

use std::io::IsTerminal;
use std::str::FromStr;
use tracing_subscriber::EnvFilter;

/// Environment variable with a filter such as `debug` or `warn,fleet_coordinator=debug`.
pub const FILTER_ENV: &str = "FLEET_LOG";

/// How a log line looks.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub enum LogFormat {
    /// `Human` on a terminal, otherwise `Json`.
    #[default]
    Auto,
    Human,
    /// One JSON object per line.
    Json,
}

impl FromStr for LogFormat {
    type Err = String;

    fn from_str(text: &str) -> Result<Self, String> {
        match text {
            "auto" => Ok(LogFormat::Auto),
            "human" => Ok(LogFormat::Human),
            "json" => Ok(LogFormat::Json),
            other => Err(format!("`{other}` is not a log format; use auto, human or json")),
        }
    }
}

/// Starts logging for this process; a second call changes nothing. `default_level` holds where `FLEET_LOG` is not set or cannot be read.
pub fn init(format: LogFormat, default_level: &str) {
    let terminal = std::io::stderr().is_terminal();
    let filter = std::env::var(FILTER_ENV).ok().and_then(|text| EnvFilter::try_new(text).ok());
    let filter = filter.unwrap_or_else(|| EnvFilter::new(default_level));
    // A closed stderr must not end the process, which printing an internal error there would.
    let builder = tracing_subscriber::fmt()
        .with_env_filter(filter)
        .with_writer(std::io::stderr)
        .with_ansi(terminal)
        .log_internal_errors(false);
    let json = match format {
        LogFormat::Auto => !terminal,
        LogFormat::Human => false,
        LogFormat::Json => true,
    };
    let _ = if json { builder.json().flatten_event(true).try_init() } else { builder.try_init() };
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_log_format_is_named_or_refused_with_the_choices() {
        assert_eq!("json".parse(), Ok(LogFormat::Json));
        assert!("xml".parse::<LogFormat>().unwrap_err().contains("auto, human or json"));
    }
}
