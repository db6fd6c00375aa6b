//! What a rank printed last, for the report of its failure. Pure.

use fleet_common::events::Level;
use fleet_common::lines;
use std::collections::VecDeque;

/// Lines of a report, and bytes of one; what is longer is several. The coordinators keep so much of an error and not more.
const LINES_MAX: usize = 30;
const LINE_MAX: usize = 2_000;

/// The newest lines. Of stdout and stderr neither drives the other one's out of its half.
#[derive(Debug, Default)]
pub struct LastLines(VecDeque<(Level, String)>);

impl LastLines {
    pub fn push(&mut self, level: Level, line: &str) {
        let pieces = lines::pieces(line, LINE_MAX);
        let skip = pieces.len().saturating_sub(LINES_MAX);
        for piece in &pieces[skip..] {
            self.0.push_back((level, (*piece).to_owned()));
            if self.0.len() > LINES_MAX {
                self.drop_one();
            }
        }
    }

    /// Oldest first.
    pub fn to_vec(&self) -> Vec<String> {
        self.0.iter().map(|(_, line)| line.clone()).collect()
    }

    /// The oldest of those that are more.
    fn drop_one(&mut self) {
        let is_output = |(level, _): &(Level, String)| *level == Level::Info;
        let output = self.0.iter().filter(|line| is_output(line)).count();
        let from_output = output * 2 >= self.0.len();
        if let Some(oldest) = self.0.iter().position(|line| is_output(line) == from_output) {
            self.0.remove(oldest);
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn much_output_does_not_drive_out_what_stderr_said() {
        let mut last = LastLines::default();
        (0..20).for_each(|n| last.push(Level::Warn, &format!("FATAL {n}")));
        (0..100).for_each(|n| last.push(Level::Info, &format!("bye {n}")));
        let lines = last.to_vec();
        assert_eq!(lines.len(), LINES_MAX);
        assert_eq!((lines[0].as_str(), lines[14].as_str()), ("FATAL 5", "FATAL 19"));
        assert_eq!((lines[15].as_str(), lines[29].as_str()), ("bye 85", "bye 99"));
        let mut alone = LastLines::default();
        (0..100).for_each(|n| alone.push(Level::Info, &n.to_string()));
        assert_eq!(alone.to_vec(), (70..100).map(|n| n.to_string()).collect::<Vec<_>>());
    }

    #[test]
    fn of_a_line_that_is_longer_than_a_report_its_end_is_kept() {
        let mut last = LastLines::default();
        last.push(Level::Warn, &format!("{}the end", "x".repeat(100 * LINE_MAX)));
        let lines = last.to_vec();
        assert_eq!((lines.len(), lines.last().map(String::as_str)), (LINES_MAX, Some("the end")));
        assert!(lines.iter().all(|line| line.len() <= LINE_MAX));
    }
}
