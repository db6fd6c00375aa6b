//! Times shared-memory collectives between real processes: `collectives [RANKS]...` prints one JSON object per line.
//!
//! Bytes are those of the whole buffer: the input of all_reduce and reduce_scatter, the output of all_gather. A time is the median
//! over calls as rank 0 sees them; `copies` takes ordinary memory, `in place` works on buffers that lie in the segment.

use fleet_collectives::{
    DType, Exchange, Gang, Keep, Op, PerRank, Result, Segment, SharedHost, ShmCollective, part,
};
use std::os::fd::AsRawFd;
use std::process::Command;
use std::time::Instant;

/// Bytes and calls.
const SIZES: [(usize, usize); 4] = [(4, 20_000), (4 << 10, 5_000), (4 << 20, 200), (64 << 20, 20)];

fn main() -> std::result::Result<(), Box<dyn std::error::Error>> {
    let arguments: Vec<String> = std::env::args().skip(1).collect();
    if arguments.first().is_some_and(|word| word == "rank") {
        let number = |i: usize| arguments[i].parse::<usize>();
        let gang = ShmCollective::attach(number(1)? as i32, number(2)?, number(3)?, 1)?;
        return Ok(rank(gang)?);
    }
    let worlds = match arguments.is_empty() {
        true => vec![2, 4],
        false => arguments.iter().map(|word| word.parse()).collect::<std::result::Result<_, _>>()?,
    };
    for world in worlds {
        let segment = Segment::create(world, 1)?;
        let fd = segment.inheritable()?;
        let ranks: Vec<_> = (0..world)
            .map(|rank| {
                Command::new(std::env::current_exe()?)
                    .arg("rank")
                    .args([fd.as_raw_fd().to_string(), rank.to_string(), world.to_string()])
                    .spawn()
            })
            .collect::<std::io::Result<_>>()?;
        for mut rank in ranks {
            if !rank.wait()?.success() {
                return Err("a rank failed".into());
            }
        }
    }
    Ok(())
}

fn rank(mut gang: ShmCollective) -> Result<()> {
    let (me, world) = (gang.rank(), gang.world_size());
    for (bytes, calls) in SIZES {
        let share = (bytes / world).max(4);
        let mut whole = vec![0u8; share * world];
        let mut one = vec![0u8; share];
        let mut data = vec![0u8; bytes];
        let buffers = gang.allocate_per_rank(bytes)?;
        let common = gang.allocate_common(share * world)?;
        let reduce = |gang: &mut ShmCollective, buffers: &PerRank, keep| {
            gang.post_reduce(buffers, 0..bytes, DType::F32, Op::Sum, keep)?;
            gang.finish()
        };
        time(&mut gang, "all_reduce", "copies", bytes, calls, |g| {
            g.all_reduce(&mut data, DType::F32, Op::Sum)
        })?;
        time(&mut gang, "all_reduce", "in place", bytes, calls, |g| reduce(g, &buffers, Keep::Everything))?;
        time(&mut gang, "reduce_scatter", "copies", bytes, calls, |g| {
            g.reduce_scatter(&whole, &mut one, DType::F32, Op::Sum)
        })?;
        time(&mut gang, "reduce_scatter", "in place", bytes, calls, |g| {
            reduce(g, &buffers, Keep::MyPart)?;
            g.barrier()
        })?;
        time(&mut gang, "all_gather", "copies", bytes, calls, |g| g.all_gather(&one, &mut whole))?;
        let mine = part(share * world, me, world);
        time(&mut gang, "all_gather", "in place", bytes, calls, |g| {
            common.write(mine.start, &data[..mine.len().min(data.len())]);
            g.barrier()
        })?;
    }
    Ok(())
}

fn time(
    gang: &mut ShmCollective,
    operation: &str,
    memory: &str,
    bytes: usize,
    calls: usize,
    mut call: impl FnMut(&mut ShmCollective) -> Result<()>,
) -> Result<()> {
    for _ in 0..calls.div_ceil(10) {
        call(gang)?;
    }
    gang.barrier()?;
    let mut microseconds = Vec::with_capacity(calls);
    for _ in 0..calls {
        let start = Instant::now();
        call(gang)?;
        microseconds.push(start.elapsed().as_secs_f64() * 1e6);
    }
    gang.barrier()?;
    if gang.rank() == 0 {
        microseconds.sort_by(f64::total_cmp);
        let median = microseconds[calls / 2];
        let line = [
            "\"library\":\"fleet shm\"".to_owned(),
            format!("\"operation\":\"{operation}\",\"memory\":\"{memory}\""),
            format!("\"ranks\":{},\"bytes\":{bytes}", gang.world_size()),
            format!("\"median_us\":{median:.2},\"best_us\":{:.2}", microseconds[0]),
            format!("\"gb_per_s\":{:.2}", bytes as f64 / median / 1e3),
        ];
        println!("{{{}}}", line.join(","));
    }
    Ok(())
}
