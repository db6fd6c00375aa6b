//! `fleet fields`: what may stand in a job file.

use crate::failure::Failure;
use crate::out;
use fleet_common::{exit, job};

/// Print all fields of a job file in Markdown: what each may be, its default, what it does
#[derive(clap::Args)]
pub struct Args {}

pub fn run(Args {}: Args) -> Result<u8, Failure> {
    out::lines(job::reference().trim());
    Ok(exit::SUCCEEDED)
}
