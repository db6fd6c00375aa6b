//! Samples, and what they say.

use anyhow::Result;
use std::io::Write;
use std::path::Path;
use std::time::{Duration, Instant};

/// What one load did in one round.
#[derive(Clone, Debug)]
pub struct Sample {
    pub puts_per_s: f64,
    pub p50_ms: f64,
    pub p99_ms: f64,
    /// Cores that the servers used.
    pub cores: f64,
}

pub fn sample(mut latencies: Vec<Duration>, took: Duration, cpu_s: f64) -> Sample {
    latencies.sort_unstable();
    let ms = |share: f64| {
        let at = ((latencies.len() as f64 * share) as usize).min(latencies.len().saturating_sub(1));
        latencies.get(at).map_or(f64::NAN, |latency| latency.as_secs_f64() * 1e3)
    };
    Sample {
        puts_per_s: latencies.len() as f64 / took.as_secs_f64(),
        p50_ms: ms(0.5),
        p99_ms: ms(0.99),
        cores: cpu_s / took.as_secs_f64(),
    }
}

pub fn median(values: impl IntoIterator<Item = f64>) -> f64 {
    let mut values: Vec<f64> = values.into_iter().collect();
    values.sort_by(f64::total_cmp);
    values.get(values.len() / 2).copied().unwrap_or(f64::NAN)
}

pub fn worst(values: &[f64]) -> f64 {
    values.iter().copied().fold(f64::NAN, f64::max)
}

/// Milliseconds of the median append of 256 bytes with fdatasync on the disk that holds `dir`.
pub fn fsync_ms(dir: &Path) -> Result<f64> {
    let mut file = std::fs::File::create(dir.join("fsync"))?;
    let mut times = Vec::new();
    for _ in 0..300 {
        let start = Instant::now();
        file.write_all(&[0x5A; 256])?;
        file.sync_data()?;
        times.push(start.elapsed().as_secs_f64() * 1e3);
    }
    Ok(median(times))
}
