//! `fleet login`: stores a credential for a cluster that runs elsewhere.

use crate::client::block_on;
use crate::cluster::{Login, logins};
use crate::failure::Failure;
use crate::{out, places};
use fleet_common::net::{self, Identity, JoinToken, NAME_MAX};
use fleet_common::protocol::Role;
use fleet_common::{exit, files};
use serde_json::json;
use std::path::PathBuf;

/// Store a credential for a cluster, with a token for clients or admins made there
#[derive(clap::Args)]
pub struct Args {
    /// HOST:PORT of a coordinator
    address: String,
    /// File with the token; FLEET_TOKEN works too
    #[arg(long, value_name = "FILE")]
    token_file: Option<PathBuf>,
    /// The token itself, visible to other users of this machine while the command runs
    #[arg(long, value_name = "TOKEN", conflicts_with = "token_file")]
    token: Option<String>,
    /// What to call the cluster in --cluster; without it HOST, or HOST-PORT where another cluster is called so
    #[arg(long)]
    name: Option<String>,
    /// Print JSON
    #[arg(long)]
    json: bool,
}

pub fn run(args: Args) -> Result<u8, Failure> {
    let env = std::env::var("FLEET_TOKEN").ok();
    let given = JoinToken::from_sources(args.token_file.as_deref(), env.as_deref(), args.token.as_deref())?;
    let token = JoinToken::expect(given, Role::Client)?;
    let host = args.address.rsplit_once(':').map(|(host, _)| host);
    let host =
        host.ok_or_else(|| Failure::input(format!("`{}` is not of the form HOST:PORT", args.address)))?;
    let name = match args.name {
        Some(name) => name,
        None => free_name(&args.address, host, &token)?,
    };
    if name.is_empty()
        || name.starts_with('.')
        || !name.chars().all(|c| c.is_ascii_alphanumeric() || "._-".contains(c))
    {
        return Err(Failure::input(format!("`{name}` cannot name a cluster; use letters, digits and . _ -")));
    }
    let me: String = user_name().chars().take(NAME_MAX).collect();
    let at = std::slice::from_ref(&args.address);
    // Before the token is used: what cannot be kept would be lost.
    let dir = places::logins_dir()?.join(&name);
    files::create_dir(&dir).map_err(|e| Failure::environment(e.to_string()))?;
    let joined = block_on(async { Ok(net::join(at, &token, &me).await?) }).inspect_err(|_| {
        let _ = std::fs::remove_dir(&dir); // unless there was a login in it
    })?;
    let identity = joined.identity;
    identity.store(&dir).map_err(|e| Failure::io("write to", &dir, &e))?;
    let mut addresses = vec![args.address.clone()];
    let others = joined.coordinators.into_iter().map(|coordinator| coordinator.client);
    addresses.extend(others.filter(|other| *other != args.address));
    Login { addresses }.store(&dir)?;
    match args.json {
        true => out::json(&json!({
            "name": name, "address": args.address, "cluster_id": identity.cluster_id,
            "member": identity.member.to_string(),
        })),
        false => out::line(&format!(
            "logged in as {}; use it with --cluster {name} (--name gives it another name)",
            identity.member
        )),
    }
    Ok(exit::SUCCEEDED)
}

/// HOST, or HOST-PORT where another cluster's login is called so already: a credential is never replaced by that of another cluster unless its
/// name is given.
fn free_name(address: &str, host: &str, token: &JoinToken) -> Result<String, Failure> {
    let logins_dir = places::logins_dir()?;
    let of_another = |name: &str| {
        let identity = Identity::load(&logins_dir.join(name)).ok().flatten();
        identity.is_some_and(|identity| !identity.authorities.contains(&token.ca_fingerprint))
    };
    let at_this_address = |login: &Login| login.addresses.iter().any(|known| known == address);
    if let Some((name, _)) =
        logins()?.into_iter().find(|(name, login)| at_this_address(login) && of_another(name))
    {
        return Err(Failure::input(format!(
            "the login `{name}` is of another cluster at {address}; if that was made anew, replace it with --name {name}, else keep both with another --name"
        )));
    }
    let plain = |text: &str| text.replace(['[', ']'], "").replace(':', "-");
    let (short, long) = (plain(host), plain(address));
    Ok(if of_another(&short) { long } else { short })
}

fn user_name() -> String {
    let user = nix::unistd::User::from_uid(nix::unistd::getuid()).ok().flatten().map(|user| user.name);
    user.unwrap_or_else(|| "client".to_owned())
}
