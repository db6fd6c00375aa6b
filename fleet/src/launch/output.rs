//! What the ranks of a launched program print, as if they ran here: every byte as it is where one rank is alone, with the rank before
//! each line where they are several, and as events with `--json`.

use crate::{json, out, places};
use fleet_common::events::{Event, EventBody, Level};
use fleet_common::ids::Rank;
use fleet_common::lines::{LINE_MAX, LineSplitter};
use fleet_common::protocol::{CANNOT_START, Printed};
use std::collections::{BTreeMap, BTreeSet};
use std::fs::File;
use std::io;
use std::os::fd::AsFd;
use std::os::unix::fs::MetadataExt;

/// Bytes of a line that are waited for, so that what two ranks say does not meet in the middle of one.
const HELD_MAX: usize = LINE_MAX;

pub struct ProgramOutput {
    shape: Shape,
    /// What ranks have printed that seem not to have started, and nothing since: if that is how the job ended, its error says it.
    unstarted: BTreeMap<Rank, Printed>,
    begun: BTreeSet<Rank>,
}

enum Shape {
    AsItIs,
    Lines(Lines),
    Json(BTreeMap<(Rank, bool), LineSplitter>),
}

impl ProgramOutput {
    pub fn new(ranks: u32, json: bool) -> ProgramOutput {
        let shape = match (json, ranks) {
            (true, _) => Shape::Json(BTreeMap::new()),
            (false, 1) => Shape::AsItIs,
            (false, _) => Shape::Lines(Lines::default()),
        };
        ProgramOutput { shape, unstarted: BTreeMap::new(), begun: BTreeSet::new() }
    }

    pub fn print(&mut self, printed: Printed) {
        let first = self.begun.insert(printed.rank);
        if first && printed.bytes.starts_with(CANNOT_START.as_bytes()) {
            self.unstarted.insert(printed.rank, printed);
            return;
        }
        if let Some(held) = self.unstarted.remove(&printed.rank) {
            self.show(held);
        }
        self.show(printed);
    }

    /// The job's error says why its ranks did not start.
    pub fn is_told_otherwise(&mut self) {
        self.unstarted.clear();
    }

    fn show(&mut self, Printed { rank, stderr, bytes }: Printed) {
        match &mut self.shape {
            Shape::AsItIs => write(stderr, &bytes),
            Shape::Lines(lines) => write(stderr, &lines.push(rank, stderr, &bytes)),
            Shape::Json(splitters) => {
                let lines = splitters.entry((rank, stderr)).or_default().push(&bytes);
                lines.into_iter().for_each(|line| tell(rank, stderr, line));
            }
        }
    }

    /// What is still held: nothing follows.
    pub fn finish(&mut self) {
        std::mem::take(&mut self.unstarted).into_values().for_each(|held| self.show(held));
        match &mut self.shape {
            Shape::AsItIs => {}
            Shape::Lines(lines) => {
                lines.finish().into_iter().for_each(|(stderr, bytes)| write(stderr, &bytes));
            }
            Shape::Json(splitters) => {
                for ((rank, stderr), splitter) in splitters {
                    splitter.finish().into_iter().for_each(|line| tell(*rank, *stderr, line));
                }
            }
        }
    }
}

/// Whether stdout and stderr of this process are one and the same file, pipe or terminal.
pub fn goes_to_one_place() -> bool {
    let place = |fd: io::Result<std::os::fd::OwnedFd>| {
        let found = File::from(fd.ok()?).metadata().ok()?;
        Some((found.dev(), found.ino()))
    };
    let out = place(io::stdout().as_fd().try_clone_to_owned());
    out.is_some() && out == place(io::stderr().as_fd().try_clone_to_owned())
}

fn write(stderr: bool, bytes: &[u8]) {
    match stderr {
        true => out::own_error(bytes),
        false => out::own_output(bytes),
    }
}

fn tell(rank: Rank, stderr: bool, line: String) {
    let level = if stderr { Level::Warn } else { Level::Info };
    let body = EventBody::Log { rank: Some(rank), level, line };
    out::json(&json::event(&Event { unix_ms: places::unix_ms(), body }));
}

/// Whole lines of several ranks, each with its rank before it. Pure: bytes in, bytes to be written out. A line ends with a newline or, as
/// progress bars have it, with a carriage return.
#[derive(Default)]
pub struct Lines {
    sources: BTreeMap<(bool, Rank), Source>,
    /// Who has written last to stdout and to stderr, if that was no whole line.
    unfinished: [Option<Rank>; 2],
}

struct Source {
    held: Vec<u8>,
    /// What stood before what is held.
    last: u8,
}

impl Lines {
    fn push(&mut self, rank: Rank, stderr: bool, bytes: &[u8]) -> Vec<u8> {
        let source = self.source(rank, stderr);
        source.held.extend_from_slice(bytes);
        let whole = source.held.iter().rposition(|byte| ends(*byte)).map_or(0, |end| end + 1);
        let whole = if source.held.len() - whole > HELD_MAX { source.held.len() } else { whole };
        let rest = source.held.split_off(whole);
        let lines = std::mem::replace(&mut source.held, rest);
        self.labelled(rank, stderr, &lines)
    }

    fn finish(&mut self) -> Vec<(bool, Vec<u8>)> {
        let sources: Vec<(bool, Rank)> = self.sources.keys().copied().collect();
        let rest = sources.into_iter().map(|(stderr, rank)| {
            let held = std::mem::take(&mut self.source(rank, stderr).held);
            (stderr, self.labelled(rank, stderr, &held))
        });
        rest.collect()
    }

    fn source(&mut self, rank: Rank, stderr: bool) -> &mut Source {
        self.sources.entry((stderr, rank)).or_insert(Source { held: Vec::new(), last: b'\n' })
    }

    fn labelled(&mut self, rank: Rank, stderr: bool, lines: &[u8]) -> Vec<u8> {
        let mut labelled = Vec::new();
        let Some(end) = lines.last() else { return labelled };
        let other = self.unfinished[usize::from(stderr)].filter(|other| *other != rank);
        if let Some(other) = other {
            labelled.push(b'\n');
            self.source(other, stderr).last = b'\n';
        }
        self.unfinished[usize::from(stderr)] = (!ends(*end)).then_some(rank);
        let source = self.source(rank, stderr);
        for line in lines.split_inclusive(|byte| ends(*byte)) {
            let is_end_of_the_last = source.last == b'\r' && line == b"\n";
            if ends(source.last) && !is_end_of_the_last {
                labelled.extend_from_slice(format!("[rank {rank}] ").as_bytes());
            }
            labelled.extend_from_slice(line);
            source.last = line.last().copied().unwrap_or(source.last);
        }
        labelled
    }
}

fn ends(byte: u8) -> bool {
    matches!(byte, b'\n' | b'\r')
}

#[cfg(test)]
mod tests {
    use super::*;

    fn text(bytes: &[u8]) -> &str {
        std::str::from_utf8(bytes).unwrap()
    }

    #[test]
    fn ranks_do_not_meet_within_a_line() {
        let mut lines = Lines::default();
        assert_eq!(text(&lines.push(0, false, b"one\ntw")), "[rank 0] one\n");
        assert_eq!(text(&lines.push(1, false, b"uno\n\n")), "[rank 1] uno\n[rank 1] \n");
        assert_eq!(text(&lines.push(0, false, b"o\nend")), "[rank 0] two\n");
        assert_eq!(text(&lines.push(1, true, b"bad")), "");
        assert_eq!(text(&lines.push(1, false, b"fin")), "");
        let rest = lines.finish();
        let rest: Vec<(bool, &str)> = rest.iter().map(|(stderr, bytes)| (*stderr, text(bytes))).collect();
        assert_eq!(rest, [(false, "[rank 0] end"), (false, "\n[rank 1] fin"), (true, "[rank 1] bad")]);
    }

    #[test]
    fn a_bar_is_shown_as_it_moves_and_a_return_with_its_newline_is_one_end() {
        let mut lines = Lines::default();
        assert_eq!(text(&lines.push(0, true, b"\r 10%\r 2")), "[rank 0] \r[rank 0]  10%\r");
        assert_eq!(text(&lines.push(0, true, b"0%\r")), "[rank 0]  20%\r");
        assert_eq!(text(&lines.push(0, true, b"\nnext\r\n")), "\n[rank 0] next\r\n");
    }

    #[test]
    fn a_line_that_does_not_end_is_not_waited_for_and_keeps_every_byte() {
        let mut lines = Lines::default();
        let long = vec![0xff; HELD_MAX + 1];
        assert_eq!(lines.push(0, false, &long), [b"[rank 0] ".as_slice(), &long].concat());
        assert_eq!(text(&lines.push(1, false, b"hi\n")), "\n[rank 1] hi\n");
        assert_eq!(text(&lines.push(0, false, b"on\n")), "[rank 0] on\n");
    }
}
