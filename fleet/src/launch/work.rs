//! The command line of a launch into what is submitted. Everything that can be refused without starting anything is refused here.

use super::Args;
use crate::failure::Failure;
use crate::{meant, programs};
use fleet_common::ids::Rank;
use fleet_common::job::Warning;
use fleet_common::job::{Asked, Shape};
use fleet_common::protocol::{Program, SubmitJob, Variable, Wish, Work};
use std::ffi::{OsStr, OsString};
use std::path::{Path, PathBuf};

/// The worker's own limit of slots on one machine.
const RANKS_MAX: u32 = 64;

pub struct Prepared {
    pub submit: SubmitJob,
    pub program: bool,
    pub warnings: Vec<Warning>,
    pub traced: Option<Traced>,
}

/// The trace that the job wants.
#[derive(Clone)]
pub struct Traced {
    pub file: PathBuf,
    /// What each rank writes.
    pub parts: Vec<(Rank, PathBuf)>,
}

pub fn prepare(args: &Args) -> Result<Prepared, Failure> {
    let prepared = match &args.job {
        Some(path) => training(path, args)?,
        None if args.program.is_empty() => return Err(no_work()),
        None => program(args)?,
    };
    let ranks = prepared.submit.world_size;
    if !(1..=RANKS_MAX).contains(&ranks) {
        return Err(Failure::input(format!("{ranks} ranks: one machine runs 1 to {RANKS_MAX}")));
    }
    // looked for before anything is started
    for name in ["coordinator", "worker"] {
        programs::beside(name)?;
    }
    if !prepared.program {
        programs::beside("fleet-rank")?;
    }
    Ok(prepared)
}

fn training(path: &Path, args: &Args) -> Result<Prepared, Failure> {
    let (mut job, mut warnings) = meant::load_job(path, &args.sets, &here()?)?;
    if let Some(nodes) = job.num_nodes.filter(|nodes| *nodes > 1) {
        return Err(Failure::input(format!(
            "`num_nodes` is {nodes}, and fleet launch runs a job on this machine alone; give it to a cluster with fleet submit"
        )));
    }
    let (Shape { ranks: world_size, .. }, warning) =
        job.settle_ranks(Asked { ranks: args.ranks, nodes: None })?;
    warnings.extend(warning);
    if let Some(file) = &args.trace {
        utf8(file.as_os_str(), "the trace's name")?;
        job.trace = Some(here()?.join(file));
    }
    let parts = (0..world_size).filter_map(|rank| Some((rank, job.trace_of(rank)?))).collect();
    let traced = job.trace.clone().map(|file| Traced { file, parts });
    Ok(Prepared {
        submit: SubmitJob { world_size, work: Work::Train { job_json: job.to_json() }, wish: wish() },
        program: false,
        warnings,
        traced,
    })
}

fn program(args: &Args) -> Result<Prepared, Failure> {
    // the worker of a launch gives its programs what it has itself from here
    let work = work_of(&args.program, Vec::new())?;
    let world_size = args.ranks.unwrap_or_else(accelerators);
    let submit = SubmitJob { world_size, work, wish: wish() };
    Ok(Prepared { submit, program: true, warnings: Vec::new(), traced: None })
}

pub fn no_work() -> Failure {
    Failure::input(
        "nothing to run: give a job file, or a program and its arguments behind `--`, as in `-n 2 -- PROGRAM ARGS`",
    )
}

/// Any program, to be run where it would run here.
pub fn work_of(program: &[OsString], env: Vec<Variable>) -> Result<Work, Failure> {
    let argv =
        program.iter().map(|arg| utf8(arg, "the program's argument")).collect::<Result<Vec<_>, _>>()?;
    let working_dir = utf8(here()?.as_os_str(), "the current directory")?;
    Ok(Work::Program(Program { argv, working_dir, env }))
}

/// The node of a launch may join after its job is there.
fn wish() -> Wish {
    Wish { queue: true, ..Wish::default() }
}

fn here() -> Result<std::path::PathBuf, Failure> {
    std::env::current_dir()
        .map_err(|e| Failure::environment(format!("the current directory cannot be used: {e}")))
}

fn utf8(text: &OsStr, what: &str) -> Result<String, Failure> {
    let bad = || Failure::input(format!("{what} {} is not UTF-8", text.to_string_lossy()));
    text.to_str().map(str::to_owned).ok_or_else(bad)
}

/// CUDA devices of this machine that programs may see, at least 1.
pub fn accelerators() -> u32 {
    let names = std::fs::read_dir("/dev").into_iter().flatten().flatten().map(|entry| entry.file_name());
    let is_gpu = |name: &std::ffi::OsString| {
        let number = name.to_str().and_then(|name| name.strip_prefix("nvidia"));
        number.is_some_and(|number| !number.is_empty() && number.bytes().all(|b| b.is_ascii_digit()))
    };
    let all = names.filter(is_gpu).count();
    u32::try_from(visible(all, std::env::var("CUDA_VISIBLE_DEVICES").ok().as_deref())).unwrap_or(1).max(1)
}

/// How many of `all` the variable leaves: those that it lists, up to the first that is none, as the CUDA driver reads it.
fn visible(all: usize, listed: Option<&str>) -> usize {
    let is_one = |entry: &&str| !entry.trim().is_empty() && !entry.trim().starts_with('-');
    listed.map_or(all, |listed| listed.split(',').take_while(is_one).count().min(all))
}

#[cfg(test)]
mod tests {
    use super::visible;

    #[test]
    fn only_devices_that_programs_see_get_a_rank() {
        let cases = [
            (None, 4),
            (Some("2"), 1),
            (Some("3,1"), 2),
            (Some("GPU-1f,GPU-2e"), 2),
            (Some(""), 0),
            (Some("0,-1,1"), 1),
        ];
        assert_eq!(cases.map(|(listed, _)| visible(4, listed)), cases.map(|(_, count)| count));
        assert_eq!(visible(0, Some("0,1")), 0);
    }
}
