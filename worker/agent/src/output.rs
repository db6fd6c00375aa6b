//! What ranks print, whole, in files of the node: written as it comes, bounded, and read again for who asks.
//!
//! A rank's output lies in segments: `rank-0.log`, then `rank-0.log.N` where `N` is the byte of the output at which it begins. None is
//! ever renamed, and the oldest goes when there are too many: a reader that names a byte finds it, or learns how far the rest is gone.

use fleet_common::files;
use fleet_common::protocol::{OUTPUT_PIECE_MAX, OutputPiece};
use std::fs::File;
use std::io::{Read, Seek, SeekFrom, Write};
use std::path::{Path, PathBuf};
use std::sync::{Arc, Mutex};

/// Bytes of one segment.
const SEGMENT_MAX: u64 = 16 << 20;
/// Segments of one rank, which keeps its newest 256 MiB: a node's disk is for checkpoints.
const SEGMENTS_MAX: usize = 16;
/// Bytes of a line that are waited for, so that what two pipes say does not meet in the middle of one.
const LINE_MAX: usize = 64 << 10;

/// Where the output of a rank is. Cheap to clone; losing it to a full disk does not disturb the rank.
#[derive(Clone)]
pub struct OutputFile(Arc<Mutex<Option<Segments>>>);

struct Segments {
    /// Of the first one.
    path: PathBuf,
    /// Where each begins.
    starts: Vec<u64>,
    file: File,
    /// Bytes of the whole output.
    end: u64,
    segment_max: u64,
}

impl OutputFile {
    /// `path` is where its first segment lies.
    pub fn create(path: &Path) -> OutputFile {
        Self::sized(path, SEGMENT_MAX)
    }

    fn sized(path: &Path, segment_max: u64) -> OutputFile {
        let file = new_file(path)
            .inspect_err(|error| tracing::warn!(path = %path.display(), %error, "no log file for the rank"));
        let segments = |file| Segments { path: path.to_owned(), starts: vec![0], file, end: 0, segment_max };
        OutputFile(Arc::new(Mutex::new(file.ok().map(segments))))
    }

    pub fn write(&self, bytes: &[u8]) {
        let Ok(mut slot) = self.0.lock() else { return };
        let Some(segments) = slot.as_mut() else { return };
        if let Err(error) = segments.write(bytes) {
            tracing::warn!(path = %segments.path.display(), %error, "the rank's output is not kept any more");
            *slot = None;
        }
    }
}

impl Segments {
    fn write(&mut self, bytes: &[u8]) -> std::io::Result<()> {
        if self.end - self.starts.last().copied().unwrap_or_default() >= self.segment_max {
            self.file = new_file(&segment(&self.path, self.end))?;
            self.starts.push(self.end);
            if self.starts.len() > SEGMENTS_MAX {
                std::fs::remove_file(segment(&self.path, self.starts.remove(0)))?;
            }
        }
        self.file.write_all(bytes)?;
        self.end += bytes.len() as u64;
        Ok(())
    }
}

fn new_file(path: &Path) -> std::io::Result<File> {
    files::private().write(true).create(true).truncate(true).open(path)
}

fn segment(path: &Path, start: u64) -> PathBuf {
    match start {
        0 => path.to_owned(),
        _ => {
            let mut name = path.as_os_str().to_owned();
            name.push(format!(".{start}"));
            name.into()
        }
    }
}

/// Whole lines out of what one pipe says, as it says them.
#[derive(Default)]
pub struct Lines(Vec<u8>);

impl Lines {
    /// Writes what is complete with these bytes.
    pub fn push(&mut self, bytes: &[u8], to: &OutputFile) {
        self.0.extend_from_slice(bytes);
        let whole = self.0.iter().rposition(|byte| *byte == b'\n').map_or(0, |end| end + 1);
        let whole = if self.0.len() - whole > LINE_MAX { self.0.len() } else { whole };
        if whole > 0 {
            to.write(&self.0[..whole]);
            self.0.drain(..whole);
        }
    }

    /// The last line, if it had no end.
    pub fn finish(&mut self, to: &OutputFile) {
        if !self.0.is_empty() {
            self.0.push(b'\n');
            to.write(&self.0);
            self.0.clear();
        }
    }
}

/// A piece of the output whose first segment is or was at `path`, from this byte on, or why there is none.
pub fn read(path: &Path, from: u64) -> Result<OutputPiece, String> {
    // The oldest segment may go between the look and the reading.
    let mut tried = Err(String::new());
    for _ in 0..3 {
        tried = attempt(path, from);
        if tried.is_ok() {
            break;
        }
    }
    tried
}

fn attempt(path: &Path, from: u64) -> Result<OutputPiece, String> {
    let gone = |error: std::io::Error| format!("{} cannot be read: {error}", path.display());
    let (dir, name) = (path.parent().unwrap_or(Path::new(".")), path.file_name().unwrap_or_default());
    let name = name.to_string_lossy();
    let mut starts = Vec::new();
    for entry in std::fs::read_dir(dir).map_err(gone)? {
        let found = entry.map_err(gone)?.file_name();
        let Some(rest) = found.to_str().and_then(|found| found.strip_prefix(&*name)) else { continue };
        match rest.strip_prefix('.') {
            None if rest.is_empty() => starts.push(0),
            Some(start) => starts.extend(start.parse::<u64>().ok()),
            None => {}
        }
    }
    starts.sort_unstable();
    let (Some(first), Some(last)) = (starts.first().copied(), starts.last().copied()) else {
        return Err(format!("{} is not there any more", path.display()));
    };
    let length = |start| std::fs::metadata(segment(path, start)).map(|found| found.len()).map_err(gone);
    let end = last + length(last)?;
    let start = from.clamp(first, end);
    let within = starts.partition_point(|other| *other <= start) - 1;
    let mut file = File::open(segment(path, starts[within])).map_err(gone)?;
    file.seek(SeekFrom::Start(start - starts[within])).map_err(gone)?;
    let mut bytes = Vec::new();
    file.take(OUTPUT_PIECE_MAX as u64).read_to_end(&mut bytes).map_err(gone)?;
    Ok(OutputPiece { start, bytes, end })
}

#[cfg(test)]
mod tests {
    use super::*;

    fn all(path: &Path, mut from: u64) -> (u64, Vec<u8>) {
        let (mut begin, mut bytes) = (None, Vec::new());
        loop {
            let piece = read(path, from).unwrap();
            assert_eq!(piece.start, from.max(piece.start));
            begin.get_or_insert(piece.start);
            from = piece.start + piece.bytes.len() as u64;
            bytes.extend(piece.bytes);
            if from >= piece.end {
                return (begin.unwrap(), bytes);
            }
        }
    }

    #[test]
    fn what_two_pipes_say_is_kept_in_whole_lines() {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("rank-0.log");
        let (file, mut out, mut err) = (OutputFile::create(&path), Lines::default(), Lines::default());
        out.push(b"one\ntw", &file);
        err.push(b"bad\n", &file);
        out.push(b"o\nlast", &file);
        out.finish(&file);
        err.finish(&file);
        assert_eq!(all(&path, 0), (0, b"one\nbad\ntwo\nlast\n".to_vec()));
        let long = vec![b'x'; LINE_MAX + 1];
        out.push(&long, &file);
        assert_eq!(all(&path, 17), (17, long));
        assert_eq!(read(&path, 1 << 40).unwrap().bytes, b"", "behind the end there is nothing");
    }

    #[test]
    fn the_oldest_segments_go_and_who_asks_for_them_learns_how_much_is_gone() {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("rank-1.log");
        let file = OutputFile::sized(&path, 100);
        OutputFile::create(&dir.path().join("rank-10.log")).write(b"another rank's");
        let lines: Vec<String> = (0..500).map(|n| format!("line {n:04}\n")).collect();
        lines.iter().for_each(|line| file.write(line.as_bytes()));
        let (begin, bytes) = all(&path, 0);
        let kept = 16 * 100;
        assert_eq!((begin, bytes.len() as u64), (5_000 - kept, kept));
        assert_eq!(String::from_utf8(bytes).unwrap(), lines.concat()[begin as usize..]);
        assert_eq!(all(&path, 4_990), (4_990, b"line 0499\n".to_vec()));
        assert!(read(&dir.path().join("rank-2.log"), 0).unwrap_err().contains("not there any more"));
        assert!(read(&dir.path().join("nowhere/rank-2.log"), 0).is_err());
    }
}
