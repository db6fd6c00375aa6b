//! Server processes of a benchmark: started, killed, measured, and ended with it.

use anyhow::{Context, Result};
use std::net::UdpSocket;
use std::os::unix::process::CommandExt;
use std::path::Path;
use std::process::{Child, Command, Stdio};
use tempfile::TempDir;

/// A server. Killed when dropped.
pub struct Server {
    child: Child,
}

impl Server {
    pub fn start(command: &mut Command, log: &Path) -> Result<Server> {
        let log = std::fs::File::create(log).with_context(|| format!("cannot write {}", log.display()))?;
        command.stdin(Stdio::null()).stdout(log.try_clone()?).stderr(log).process_group(0);
        let child = command.spawn().with_context(|| format!("cannot start {command:?}"))?;
        Ok(Server { child })
    }

    pub fn kill(&mut self) -> Result<()> {
        self.child.kill()?;
        self.child.wait()?;
        Ok(())
    }

    /// Processor time so far in seconds, and resident memory in MiB.
    pub fn usage(&self) -> Result<(f64, f64)> {
        let pid = self.child.id();
        let stat = std::fs::read_to_string(format!("/proc/{pid}/stat"))?;
        let fields: Vec<&str> = stat.rsplit(')').next().unwrap_or_default().split_whitespace().collect();
        let field = |at: usize| fields.get(at).and_then(|text| text.parse::<f64>().ok()).unwrap_or_default();
        // After the name: utime and stime are the 12th and 13th, rss in pages the 22nd.
        Ok(((field(11) + field(12)) / 100.0, field(21) * 4096.0 / f64::from(1 << 20)))
    }
}

impl Drop for Server {
    fn drop(&mut self) {
        let _ = self.kill();
    }
}

/// Where both sides keep their data; on the working directory's disk, since /tmp may be in memory.
pub fn disk(wish: Option<&Path>) -> Result<TempDir> {
    let parent = wish.map_or_else(std::env::current_dir, |path| Ok(path.to_owned()))?;
    Ok(tempfile::Builder::new().prefix("fleet-bench-").tempdir_in(parent)?)
}

/// Ports that were free a moment ago, for servers that want to be told.
pub fn free_ports(count: usize) -> Result<Vec<u16>> {
    let sockets: Vec<UdpSocket> =
        (0..count).map(|_| UdpSocket::bind("127.0.0.1:0")).collect::<Result<_, _>>()?;
    sockets.iter().map(|socket| Ok(socket.local_addr()?.port())).collect()
}
