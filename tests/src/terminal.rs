//! A terminal with somebody at it, and a command that is in front there.

use crate::{PATIENCE, World, eventually, program};
use nix::pty::openpty;
use std::fs::File;
use std::io::{Read, Write};
use std::process::{Child, Command, Stdio};
use std::sync::{Arc, Mutex};
use std::time::Instant;

/// Killed when dropped.
pub struct Terminal {
    keyboard: File,
    shown: Arc<Mutex<String>>,
    child: Child,
}

impl Terminal {
    /// `words` are a program and its arguments; the first may be one of this workspace.
    pub fn start(world: &World, words: &[&str]) -> Terminal {
        let pty = openpty(None, None).expect("there are terminals");
        let end = || Stdio::from(pty.slave.try_clone().expect("a descriptor is free"));
        let mut command = world.enter(Command::new("setsid"));
        command.args(["--ctty", "--wait"]);
        match words[0] {
            "fleet" => command.arg(program("fleet")),
            other => command.arg(other),
        };
        command.args(&words[1..]).stdin(end()).stdout(end()).stderr(end());
        let child = command.spawn().expect("setsid is there");
        let keyboard = File::from(pty.master);
        let mut screen = keyboard.try_clone().expect("a descriptor is free");
        let shown = Arc::new(Mutex::new(String::new()));
        let written = shown.clone();
        std::thread::spawn(move || {
            let mut buffer = [0; 4096];
            while let Ok(read @ 1..) = screen.read(&mut buffer) {
                let text = String::from_utf8_lossy(&buffer[..read]).into_owned();
                written.lock().expect("no reader panics").push_str(&text);
            }
        });
        Terminal { keyboard, shown, child }
    }

    pub fn shown(&self) -> String {
        self.shown.lock().expect("no reader panics").clone()
    }

    /// Waits until this is on the screen.
    pub fn until(&self, text: &str) {
        eventually(text, || self.shown().contains(text));
    }

    pub fn type_in(&mut self, text: &str) {
        self.keyboard.write_all(text.as_bytes()).expect("the terminal is open");
    }

    /// Waits for the end. The exit code.
    pub fn finish(mut self) -> Option<i32> {
        let begun = Instant::now();
        loop {
            if let Some(status) = self.child.try_wait().expect("the child is ours") {
                return status.code();
            }
            assert!(begun.elapsed() < PATIENCE, "does not end: {}", self.shown());
            std::thread::sleep(std::time::Duration::from_millis(5));
        }
    }
}

impl Drop for Terminal {
    fn drop(&mut self) {
        let _ = self.child.kill(); // gone
        let _ = self.child.wait();
    }
}
