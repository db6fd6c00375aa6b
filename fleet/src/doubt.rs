//! Changes of which it is not known whether they were made: what is said of them, and how to find out.

use crate::failure::Failure;
use fleet_common::exit;
use fleet_common::protocol::{Member, Request};

/// `why` no answer came.
pub fn unknown(request: &Request, why: &str) -> Failure {
    let (what, cure) = match request {
        Request::Submit(_) => (
            "the job may or may not have been submitted".to_owned(),
            "look for it with `fleet jobs` before submitting it again; a submit with --id NAME can be repeated".to_owned(),
        ),
        Request::SubmitOnce { name, .. } => (
            format!("the job `{name}` may or may not have been submitted"),
            "the same command again submits it at most once and prints its number".to_owned(),
        ),
        Request::Cancel { job, .. } => (format!("{job} may or may not be stopping"), repeat(&format!("fleet status {job}"))),
        Request::Drain { node, .. } => (format!("{node} may or may not be drained"), repeat("fleet nodes")),
        Request::Undrain(node) => (format!("{node} may or may not have work again"), repeat("fleet nodes")),
        Request::Revoke(member @ Member::Worker(_)) => {
            (format!("{member} may or may not be cut off"), repeat("fleet nodes"))
        }
        Request::Revoke(member) => (
            format!("{member} may or may not be cut off"),
            "the same command again makes sure and does no harm".to_owned(),
        ),
        Request::RemoveCoordinator(replica) => {
            (format!("{replica} may or may not be taken out"), repeat("fleet coordinators ls"))
        }
        Request::RevokeToken { id } => (
            format!("the token {id} may or may not be useless"),
            "`fleet token ls` lists those that are good".to_owned(),
        ),
        Request::CreateToken { .. } => (
            "a token may or may not have been made".to_owned(),
            "make another; `fleet token ls` lists all, and `fleet token revoke ID` ends one that nobody has"
                .to_owned(),
        ),
        _ => (
            "the change may or may not have been made".to_owned(),
            "look at what there is before asking again".to_owned(),
        ),
    };
    Failure { code: exit::UNKNOWN, message: format!("{what}; {cure} ({why})") }
}

fn repeat(look: &str) -> String {
    format!("`{look}` tells, and the same command again does no harm")
}
