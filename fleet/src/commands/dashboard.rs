//! `fleet dashboard`: opens the page that a coordinator shows of the cluster.

use super::Target;
use crate::cluster::Cluster;
use crate::failure::Failure;
use crate::out;
use fleet_common::endpoint::Endpoint;
use fleet_common::exit;
use fleet_common::http::host_of;
use std::net::{IpAddr, SocketAddr};
use std::path::Path;
use std::process::{Command, Stdio};

/// Open the cluster's page in a browser
#[derive(clap::Args)]
pub struct Args {
    /// Only print its address
    #[arg(long)]
    print: bool,
}

#[cfg(target_os = "macos")]
const OPENER: &str = "open";
#[cfg(not(target_os = "macos"))]
const OPENER: &str = "xdg-open";

pub fn run(args: Args, cluster: Target<'_>) -> Result<u8, Failure> {
    let cluster = Cluster::find(cluster.name)?;
    let dir = cluster.data_dir().ok_or_else(|| elsewhere(&cluster))?;
    let page = address(dir)?;
    out::line(&page);
    if !args.print {
        let opened = Command::new(OPENER)
            .arg(&page)
            .stdin(Stdio::null())
            .stdout(Stdio::null())
            .stderr(Stdio::null())
            .status();
        if !opened.is_ok_and(|status| status.success()) {
            out::note(&format!("{OPENER} did not open it; open the address in a browser"));
        }
    }
    Ok(exit::SUCCEEDED)
}

/// Where the coordinator of this directory serves HTTP.
fn address(dir: &Path) -> Result<String, Failure> {
    let endpoint = Endpoint::load(dir).map_err(|e| Failure::unreachable(e.to_string()))?;
    let running = endpoint.filter(|endpoint| endpoint.running().is_some());
    let endpoint = running.ok_or_else(|| {
        let dir = dir.display();
        Failure::unreachable(format!(
            "no coordinator runs in {dir}; start it with `coordinator start --data-dir {dir}`"
        ))
    })?;
    Ok(reachable(&endpoint.http))
}

/// As this machine reaches it; on other addresses than loopback a coordinator speaks TLS.
fn reachable(http: &str) -> String {
    let scheme =
        if http.parse::<SocketAddr>().is_ok_and(|at| !at.ip().is_loopback()) { "https" } else { "http" };
    let at = match http.parse::<SocketAddr>() {
        Ok(at) if at.ip().is_unspecified() => {
            let loopback = if at.is_ipv4() {
                IpAddr::from([127, 0, 0, 1])
            } else {
                IpAddr::from([0, 0, 0, 0, 0, 0, 0, 1])
            };
            SocketAddr::new(loopback, at.port()).to_string()
        }
        _ => http.to_owned(),
    };
    format!("{scheme}://{at}/")
}

fn elsewhere(cluster: &Cluster) -> Failure {
    let addresses = cluster.addresses().unwrap_or_default();
    let host = addresses.first().map_or("HOST", |address| host_of(address));
    Failure::input(format!(
        "the page is served on the coordinator's own machine: run `fleet dashboard --cluster DIR` there, or `ssh -L 7080:127.0.0.1:7080 {host}` here and open http://127.0.0.1:7080/"
    ))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_page_is_opened_where_this_machine_reaches_it() {
        assert_eq!(reachable("0.0.0.0:7080"), "https://127.0.0.1:7080/");
        assert_eq!(reachable("[::]:7080"), "https://[::1]:7080/");
        assert_eq!(reachable("127.0.0.1:7080"), "http://127.0.0.1:7080/");
        assert_eq!(reachable("10.0.0.1:7080"), "https://10.0.0.1:7080/");
    }
}
