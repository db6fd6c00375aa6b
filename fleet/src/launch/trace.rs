//! One trace out of the parts that the ranks of this machine have written.

use fleet_common::files::NewFile;
use fleet_common::ids::Rank;
use std::fs::File;
use std::io::{self, BufRead, BufReader, BufWriter, Write};
use std::path::{Path, PathBuf};

/// Puts the parts into `file`, in their order, and removes them; the answer is whose part is not there. A part has a line before its events, an
/// event on each line, and a line behind them.
pub fn put_together(file: &Path, parts: &[(Rank, PathBuf)]) -> io::Result<Vec<Rank>> {
    let mut new = NewFile::create(file)?;
    let mut out = BufWriter::new(&mut new);
    let mut missing = Vec::new();
    let mut comma = "";
    write!(out, "{{\"displayTimeUnit\":\"ms\",\"traceEvents\":[")?;
    for (rank, path) in parts {
        let part = match File::open(path) {
            Ok(part) => part,
            Err(_) => {
                missing.push(*rank);
                continue;
            }
        };
        for line in BufReader::new(part).lines().skip(1) {
            let line = line?;
            if line.starts_with(']') {
                break;
            }
            write!(out, "{comma}\n{}", line.trim_end_matches(','))?;
            comma = ",";
        }
    }
    write!(out, "\n]}}\n")?;
    out.flush()?;
    drop(out);
    new.commit()?;
    // They are in the whole one; what cannot be removed harms nobody.
    parts.iter().for_each(|(_, path)| drop(std::fs::remove_file(path)));
    Ok(missing)
}

#[cfg(test)]
mod tests {
    use super::*;
    use serde_json::Value;

    #[test]
    fn the_events_of_all_parts_are_one_list_and_who_wrote_none_is_told() {
        let dir = tempfile::tempdir().unwrap();
        let of = |rank: Rank| (rank, dir.path().join(format!("t.json.rank-{rank}")));
        let parts = [of(0), of(1), of(2), of(3)];
        std::fs::write(&parts[0].1, "{\"traceEvents\":[\n{\"pid\":0},\n{\"pid\":0,\"a\":\",\"}\n]}\n")
            .unwrap();
        std::fs::write(&parts[2].1, "{\"traceEvents\":[\n]}\n").unwrap();
        std::fs::write(&parts[3].1, "{\"traceEvents\":[\n{\"pid\":3}\n]}\n").unwrap();
        let file = dir.path().join("t.json");
        assert_eq!(put_together(&file, &parts).unwrap(), [1]);
        let whole: Value = serde_json::from_slice(&std::fs::read(&file).unwrap()).unwrap();
        let pids: Vec<_> =
            whole["traceEvents"].as_array().unwrap().iter().map(|e| e["pid"].as_u64()).collect();
        assert_eq!(pids, [Some(0), Some(0), Some(3)]);
        assert_eq!(std::fs::read_dir(dir.path()).unwrap().count(), 1);
    }
}
