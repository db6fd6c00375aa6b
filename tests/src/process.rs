//! One process that a test started: its output as it comes, its signals, its end.

use crate::{PATIENCE, eventually};
use nix::sys::signal::{Signal, kill};
use nix::unistd::Pid;
use serde_json::Value;
use std::io::{BufRead, BufReader, Read};
use std::os::unix::process::ExitStatusExt;
use std::process::{Child, Command, ExitStatus, Stdio};
use std::sync::mpsc::{Receiver, RecvTimeoutError, channel};
use std::sync::{Arc, Mutex};
use std::thread::JoinHandle;
use std::time::Instant;

/// A running process. Killed when dropped.
pub struct Running {
    child: Child,
    what: String,
    lines: Receiver<String>,
    stdout: Vec<String>,
    stderr: Arc<Mutex<String>>,
    stderr_reader: Option<JoinHandle<()>>,
}

/// How a process ended, and all that it wrote.
#[derive(Debug)]
pub struct Finished {
    pub what: String,
    pub status: ExitStatus,
    pub stdout: Vec<String>,
    pub stderr: String,
}

impl Running {
    pub fn start(mut command: Command) -> Running {
        let what = format!("{command:?}");
        command.stdin(Stdio::null()).stdout(Stdio::piped()).stderr(Stdio::piped());
        let mut child = command.spawn().unwrap_or_else(|error| panic!("cannot start {what}: {error}"));
        let (sender, lines) = channel();
        let stdout = BufReader::new(child.stdout.take().expect("stdout is a pipe"));
        std::thread::spawn(move || {
            for line in stdout.lines().map_while(Result::ok) {
                if sender.send(line).is_err() {
                    break;
                }
            }
        });
        let stderr = Arc::new(Mutex::new(String::new()));
        let (written, mut pipe) = (stderr.clone(), child.stderr.take().expect("stderr is a pipe"));
        let stderr_reader = std::thread::spawn(move || {
            let mut buffer = [0; 4096];
            while let Ok(read @ 1..) = pipe.read(&mut buffer) {
                let mut written = written.lock().expect("no reader panics");
                written.push_str(&String::from_utf8_lossy(&buffer[..read]));
            }
        });
        Running { child, what, lines, stdout: Vec::new(), stderr, stderr_reader: Some(stderr_reader) }
    }

    pub fn pid(&self) -> u32 {
        self.child.id()
    }

    pub fn signal(&self, signal: Signal) {
        kill(Pid::from_raw(self.pid() as i32), signal).expect("the process has not been waited for");
    }

    /// The next line on stdout; `None` at its end.
    pub fn line(&mut self) -> Option<String> {
        match self.lines.recv_timeout(PATIENCE) {
            Ok(line) => {
                self.stdout.push(line.clone());
                Some(line)
            }
            Err(RecvTimeoutError::Disconnected) => None,
            Err(RecvTimeoutError::Timeout) => panic!("silent for too long: {}", self.so_far()),
        }
    }

    /// Reads JSON lines until one is wanted, and returns that.
    pub fn until(&mut self, what: &str, wanted: impl Fn(&Value) -> bool) -> Value {
        let begun = Instant::now();
        while let Some(line) = self.line() {
            let value: Value = serde_json::from_str(&line)
                .unwrap_or_else(|error| panic!("not JSON ({error}): {line}\n{}", self.so_far()));
            if wanted(&value) {
                return value;
            }
            assert!(begun.elapsed() < PATIENCE, "no {what} in time: {}", self.so_far());
        }
        panic!("the output ended without {what}: {}", self.so_far());
    }

    /// The first event of this kind that is still to come.
    pub fn until_event(&mut self, event: &str) -> Value {
        self.until(event, |value| value["event"] == event)
    }

    /// Reads until a step of at least `step` is done.
    pub fn until_step(&mut self, step: u64) -> Value {
        self.until("step", |value| value["event"] == "step" && value["step"].as_u64() >= Some(step))
    }

    /// What it wrote to stderr up to now.
    pub fn complaints(&self) -> String {
        self.stderr.lock().expect("no reader panics").clone()
    }

    pub fn has_ended(&mut self) -> bool {
        self.child.try_wait().expect("the child is ours").is_some()
    }

    /// Panics with what it said if it has ended.
    pub fn must_live(&mut self) {
        if let Some(status) = self.child.try_wait().expect("the child is ours") {
            panic!("ended with {status}: {}", self.so_far());
        }
    }

    /// Waits until stderr has this text.
    pub fn until_it_says(&self, text: &str) {
        eventually(text, || self.stderr.lock().expect("no reader panics").contains(text));
    }

    /// Waits for the end.
    pub fn finish(mut self) -> Finished {
        let begun = Instant::now();
        while self.line().is_some() {
            assert!(begun.elapsed() < PATIENCE, "does not end: {}", self.so_far());
        }
        self.end(begun)
    }

    /// Closes the reading end of stdout: the next write of the process fails. Then waits for the end.
    pub fn finish_unheard(mut self) -> Finished {
        // The reader thread ends, and with it the pipe, at the next line that comes.
        let (_, nobody) = channel();
        self.lines = nobody;
        self.end(Instant::now())
    }

    fn end(mut self, begun: Instant) -> Finished {
        let status = loop {
            match self.child.try_wait().expect("the child is ours") {
                Some(status) => break status,
                None => std::thread::sleep(std::time::Duration::from_millis(5)),
            }
            assert!(begun.elapsed() < PATIENCE, "does not end: {}", self.so_far());
        };
        // A grandchild may hold stderr open; what the process itself wrote is there.
        if let Some(reader) = self.stderr_reader.take() {
            let grace = Instant::now();
            while !reader.is_finished() && grace.elapsed().as_secs() < 2 {
                std::thread::sleep(std::time::Duration::from_millis(5));
            }
        }
        let stderr = self.stderr.lock().expect("no reader panics").clone();
        Finished { what: self.what.clone(), status, stdout: std::mem::take(&mut self.stdout), stderr }
    }

    fn so_far(&self) -> String {
        let stderr = self.stderr.lock().expect("no reader panics");
        format!("{}\nstdout:\n{}\nstderr:\n{stderr}", self.what, self.stdout.join("\n"))
    }
}

impl Drop for Running {
    fn drop(&mut self) {
        let _ = self.child.kill();
        let _ = self.child.wait();
    }
}

impl Finished {
    /// The exit code, or 128 + the signal, as a shell says it.
    pub fn code(&self) -> i32 {
        self.status.code().unwrap_or_else(|| 128 + self.status.signal().expect("it ended by a signal"))
    }

    /// Panics with all output unless the process ended with `code`.
    pub fn expect(self, code: i32) -> Finished {
        assert_eq!(self.code(), code, "{}", self.all());
        self
    }

    /// Panics unless stderr has `text` in one line, which is returned.
    pub fn says(&self, text: &str) -> String {
        let line = self.stderr.lines().find(|line| line.contains(text));
        line.unwrap_or_else(|| panic!("nothing about `{text}` in: {}", self.all())).to_owned()
    }

    /// The lines on stdout, all of which are JSON.
    pub fn json(&self) -> Vec<Value> {
        let parse = |line: &String| {
            serde_json::from_str(line)
                .unwrap_or_else(|error| panic!("not JSON ({error}): {line}\n{}", self.all()))
        };
        self.stdout.iter().map(parse).collect()
    }

    /// The lines of one kind of event.
    pub fn events(&self, event: &str) -> Vec<Value> {
        self.json().into_iter().filter(|value| value["event"] == event).collect()
    }

    /// The last line, which is the summary.
    pub fn summary(&self) -> Value {
        let last = self.json().pop().unwrap_or_default();
        assert_eq!(last["event"], "summary", "the last line is no summary: {}", self.all());
        last
    }

    /// Step and loss of every step event, in order.
    pub fn losses(&self) -> Vec<(u64, f64)> {
        let number = |value: &Value| (value["step"].as_u64(), value["loss"].as_f64());
        let steps = self.events("step");
        let numbers = steps.iter().map(|step| match number(step) {
            (Some(step), Some(loss)) => (step, loss),
            _ => panic!("a step without a step or loss: {step}"),
        });
        numbers.collect()
    }

    pub fn all(&self) -> String {
        format!(
            "{} ended with {}\nstdout:\n{}\nstderr:\n{}",
            self.what,
            self.status,
            self.stdout.join("\n"),
            self.stderr
        )
    }
}
