//! Standard output that may be closed at any time. A reader that goes away (`fleet logs | head`) ends the printing and nothing else.
//!
//! Names, errors and lines of jobs come from others. Whatever is printed here only shows (`terminal::plain`), whoever wrote it; jobs' own
//! output is the exception, where no terminal is on the other side.

use fleet_common::terminal;
use nix::poll::{PollFd, PollFlags, PollTimeout, poll};
use serde_json::Value;
use std::io::{ErrorKind, IsTerminal, Write};
use std::os::fd::AsFd;
use std::sync::OnceLock;
use std::sync::atomic::{AtomicBool, Ordering};
use std::time::Duration;

/// Between two looks whether a silent command still has a reader.
const LOOK_EVERY: Duration = Duration::from_millis(250);

static CLOSED: AtomicBool = AtomicBool::new(false);
/// The same of stderr, for what a program writes there.
static ERROR_CLOSED: AtomicBool = AtomicBool::new(false);
/// Why stdout could not be written, where nobody has closed it.
static LOST: OnceLock<String> = OnceLock::new();

/// Whether stdout is known to have been closed.
pub fn is_closed() -> bool {
    CLOSED.load(Ordering::Relaxed)
}

/// Whether something could not be written because whoever read it is gone.
pub fn reader_is_gone() -> bool {
    is_closed() && lost().is_none()
}

/// Whether something of a program could not be written to stderr because whoever read it is gone.
pub fn error_reader_is_gone() -> bool {
    ERROR_CLOSED.load(Ordering::Relaxed)
}

/// Waits until nothing can be written any more, also where nothing is.
pub async fn reader_gone() {
    while !(is_closed() || is_broken()) {
        tokio::time::sleep(LOOK_EVERY).await;
    }
}

/// Whether stdout is a pipe or a socket with nobody at the other end, or a terminal that was closed.
fn is_broken() -> bool {
    let stdout = std::io::stdout();
    let mut looked = [PollFd::new(stdout.as_fd(), PollFlags::empty())];
    poll(&mut looked, PollTimeout::ZERO).is_ok_and(|found| found > 0)
}

/// What kept this command's output from being written, as a disk that is full.
pub fn lost() -> Option<&'static str> {
    LOST.get().map(String::as_str)
}

/// Prints one line, at once.
pub fn line(text: &str) {
    print(&terminal::plain(text));
}

/// Prints a text of several lines.
pub fn lines(text: &str) {
    text.lines().for_each(line);
}

/// A line of what somebody's job has put out. Where no terminal is on the other side every byte of it is passed on.
pub fn output(text: &str) {
    match std::io::stdout().is_terminal() {
        true => line(text),
        false => print(text),
    }
}

/// The same of bytes, which need not be text.
pub fn output_bytes(begin: &str, bytes: &[u8]) {
    if std::io::stdout().is_terminal() {
        return line(&format!("{begin}{}", String::from_utf8_lossy(bytes)));
    }
    write([begin.as_bytes(), bytes, b"\n"].concat().as_slice());
}

/// Output of a program that the user started with this very command: as if it ran here.
pub fn own_output(bytes: &[u8]) {
    write(bytes);
}

/// The same on stderr; one that is full is nobody's loss.
pub fn own_error(bytes: &[u8]) {
    if let Err(error) = std::io::stderr().lock().write_all(bytes)
        && error.kind() == ErrorKind::BrokenPipe
    {
        ERROR_CLOSED.store(true, Ordering::Relaxed);
    }
}

fn print(text: &str) {
    write(format!("{text}\n").as_bytes());
}

fn write(bytes: &[u8]) {
    if is_closed() {
        return;
    }
    let mut stdout = std::io::stdout().lock();
    if let Err(error) = stdout.write_all(bytes).and_then(|()| stdout.flush()) {
        CLOSED.store(true, Ordering::Relaxed);
        if error.kind() != ErrorKind::BrokenPipe {
            let _ = LOST.set(error.to_string()); // the first is as good as any
        }
    }
}

/// Prints one JSON value as one line.
pub fn json(value: &Value) {
    print(&terminal::json(&value.to_string()));
}

/// A line for people on stderr; a closed stderr is nobody's loss.
pub fn note(text: &str) {
    let _ = writeln!(std::io::stderr().lock(), "{}", terminal::plain(text));
}

/// Prints `columns`.
pub fn table(heading: &[&str], rows: &[Vec<String>]) {
    columns(heading, rows).iter().for_each(|text| line(text));
}

/// Columns padded to their widest cell, two spaces between, under a heading.
pub fn columns(heading: &[&str], rows: &[Vec<String>]) -> Vec<String> {
    let cell = |cell: &String| terminal::plain(cell).replace('\t', " ");
    let rows: Vec<Vec<String>> = rows.iter().map(|row| row.iter().map(cell).collect()).collect();
    let width = |column: usize| {
        let cells = rows.iter().filter_map(|row| row.get(column)).map(|cell| cell.chars().count());
        cells.chain([heading[column].len()]).max().unwrap_or_default()
    };
    let widths: Vec<usize> = (0..heading.len()).map(width).collect();
    let heading: Vec<String> = heading.iter().map(|name| (*name).to_owned()).collect();
    let lines = std::iter::once(&heading).chain(&rows).map(|row| {
        let cells: Vec<String> =
            row.iter().zip(&widths).map(|(cell, width)| format!("{cell:<width$}")).collect();
        cells.join("  ").trim_end().to_owned()
    });
    lines.collect()
}
