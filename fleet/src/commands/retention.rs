//! `fleet retention`: how much is kept of what has ended.

use super::{OutputArgs, Target, connect, done};
use crate::client::{block_on, unexpected};
use crate::failure::Failure;
use crate::{places, text};
use fleet_common::exit;
use fleet_common::protocol::{Reply, Request, RetentionView};
use serde_json::json;

/// Show, or set, how much is kept of what has ended: jobs with their logs, runs, exports, profiles, decisions
#[derive(clap::Args)]
pub struct Args {
    /// Remove what ended longer ago: 12h, 90d
    #[arg(long, value_parser = super::token::seconds)]
    age: Option<u64>,
    /// Remove the oldest of it where there is more: 500MB, 4GB
    #[arg(long, value_parser = bytes)]
    size: Option<u64>,
    #[command(flatten)]
    output: OutputArgs,
}

pub fn run(args: Args, cluster: Target<'_>) -> Result<u8, Failure> {
    let mut client = connect(cluster)?;
    let view = block_on(async {
        if args.age.is_some() || args.size.is_some() {
            done(client.change(Request::SetRetention { age_s: args.age, bytes: args.size }).await?)?;
        }
        match client.ask(Request::Retention).await? {
            Reply::Retention(view) => Ok(view),
            other => Err(unexpected(&other)),
        }
    })?;
    args.output.say(&json!(view), &sentence(&view, places::unix_ms()));
    Ok(exit::SUCCEEDED)
}

fn sentence(view: &RetentionView, now_unix_ms: u64) -> String {
    let kept = format!(
        "kept: what ended within {}, and at most {}B in all; there are {} that ended, and {}B",
        text::age(view.age_s.saturating_mul(1_000)),
        text::short(view.bytes_max),
        text::thousands(view.ended),
        text::short(view.bytes),
    );
    match view.removed_unix_ms {
        None => kept,
        Some(at) => format!(
            "{kept}\nremoved: {} that ended {} ago or before",
            text::thousands(view.removed),
            text::age(now_unix_ms.saturating_sub(at))
        ),
    }
}

fn bytes(wish: &str) -> Result<u64, String> {
    let bad = || "write it like 500MB or 4GB".to_owned();
    let (number, unit) = wish.split_at(wish.find(|c: char| !c.is_ascii_digit()).unwrap_or(wish.len()));
    let factor: u64 = match unit.trim().to_ascii_uppercase().as_str() {
        "" | "B" => 1,
        "M" | "MB" => 1_000_000,
        "G" | "GB" => 1_000_000_000,
        "T" | "TB" => 1_000_000_000_000,
        _ => return Err(bad()),
    };
    number.parse::<u64>().ok().and_then(|number| number.checked_mul(factor)).ok_or_else(bad)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn sizes_are_written_as_people_write_them() {
        assert_eq!([bytes("4GB"), bytes("500 mb"), bytes("7")], [Ok(4_000_000_000), Ok(500_000_000), Ok(7)]);
        for bad in ["", "GB", "-1GB", "4XB", "99999999999999TB"] {
            assert!(bytes(bad).is_err(), "{bad}");
        }
    }

    #[test]
    fn what_is_kept_and_what_was_removed_is_said() {
        let day = 86_400;
        let view = RetentionView {
            age_s: 90 * day,
            bytes_max: 4_000_000_000,
            bytes: 1_500_000,
            ended: 1_200,
            removed: 3,
            removed_unix_ms: Some(0),
        };
        let said = sentence(&view, 91 * day * 1_000);
        assert!(
            said.contains("within 90 d, and at most 4.00 GB") && said.contains("1,200 that ended"),
            "{said}"
        );
        assert!(said.contains("3 that ended 91 d ago"), "{said}");
    }
}
