//! Builds the token cache of a job and prints what it took, for `bench/tokenising.py`: `tokenise JOB.toml`.

use fleet_common::job::load;
use fleet_data::{DataFiles, TokenCache};
use std::path::Path;

fn main() -> Result<(), Box<dyn std::error::Error>> {
    let path = std::env::args().nth(1).ok_or("usage: tokenise JOB.toml")?;
    let (job, _) = load(Path::new(&path), &[], &std::env::current_dir()?)?;
    let tell = |note: fleet_data::Note| eprintln!("{}", note.line);
    let (cache, stats) = TokenCache::build_or_open(&job, &DataFiles::find(&job, &tell)?, &tell)?;
    let tokens = cache.meta().train_tokens + cache.meta().validation_tokens;
    println!("{{\"seconds\": {}, \"tokens\": {tokens}, \"cached\": {}}}", stats.seconds, stats.cached);
    Ok(())
}
