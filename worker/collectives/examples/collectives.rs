//! Times collectives between real processes and prints one JSON object per line.
//!
//! `collectives [shm|tcp|plain|quic] [RANKS]... [NETNS=ADDRESS]...`; without a transport shm, without ranks 2 and 4. With network namespaces the
//! ranks are dealt to them in turn, each at its address: `collectives tcp 2 h1=10.0.0.1 h2=10.0.0.2`.
//!
//! Bytes are those of the whole buffer: the input of all_reduce and reduce_scatter, the output of all_gather. A time is the median
//! over calls as rank 0 sees them; `copies` takes ordinary memory, `in place` works on registered buffers.

use fleet_collectives::net::{Key, Listener, PublicKey, RankAddress, Rendezvous};
use fleet_collectives::{
    DType, Exchange, Gang, Keep, Op, Posted, Result, Segment, SharedHost, ShmCollective, part,
};
use std::io::{BufRead, BufReader, Write};
use std::os::fd::AsRawFd;
use std::process::{Child, Command, Stdio};
use std::time::{Duration, Instant};

/// Bytes, and calls over shared memory and over connections.
const SIZES: [(usize, usize, usize); 5] = [
    (4, 20_000, 1_000),
    (4 << 10, 5_000, 500),
    (64 << 10, 2_000, 200),
    (4 << 20, 200, 20),
    (64 << 20, 20, 6),
];
const TIMEOUT: Duration = Duration::from_secs(30);

type Failed = Box<dyn std::error::Error>;

/// A network namespace and an address in it.
type Place = (String, String);

fn main() -> std::result::Result<(), Failed> {
    let arguments: Vec<String> = std::env::args().skip(1).collect();
    let words: Vec<&str> = arguments.iter().map(String::as_str).collect();
    match words.as_slice() {
        ["rank-shm", fd, rank, world] => {
            let mut gang = ShmCollective::attach(fd.parse()?, rank.parse()?, world.parse()?, 1)?;
            exchanges(&mut gang, "fleet shm", true)?;
            return Ok(in_shared_memory(&mut gang)?);
        }
        ["rank-net", transport, rank, world, address] => {
            return rank_of_net(transport, rank.parse()?, world.parse()?, address);
        }
        _ => {}
    }
    let transport =
        words.iter().find(|word| ["shm", "tcp", "plain", "quic"].contains(word)).copied().unwrap_or("shm");
    let mut worlds: Vec<usize> = words.iter().filter_map(|word| word.parse().ok()).collect();
    if worlds.is_empty() {
        worlds = vec![2, 4];
    }
    let places: Vec<Place> = (words.iter().filter_map(|word| word.split_once('=')))
        .map(|(netns, address)| (netns.to_owned(), address.to_owned()))
        .collect();
    for world in worlds {
        match transport {
            "shm" => over_shared_memory(world)?,
            _ => over_connections(transport, world, &places)?,
        }
    }
    Ok(())
}

fn over_shared_memory(world: usize) -> std::result::Result<(), Failed> {
    let segment = Segment::create(world, 1)?;
    let fd = segment.inheritable()?;
    let start = |rank: usize| {
        Command::new(std::env::current_exe()?)
            .args(["rank-shm".to_owned(), fd.as_raw_fd().to_string(), rank.to_string(), world.to_string()])
            .spawn()
    };
    join((0..world).map(start).collect::<std::io::Result<_>>()?)
}

fn over_connections(transport: &str, world: usize, places: &[Place]) -> std::result::Result<(), Failed> {
    let start = |rank: usize| {
        let own = std::env::current_exe()?;
        let place = (!places.is_empty()).then(|| &places[rank % places.len()]);
        let mut command = match place {
            Some((netns, _)) => {
                let mut command = Command::new("ip");
                command.args(["netns", "exec", netns]).arg(own);
                command
            }
            None => Command::new(own),
        };
        let address = place.map_or("127.0.0.1", |(_, address)| address);
        command.args(["rank-net", transport, &rank.to_string(), &world.to_string(), address]);
        command.stdin(Stdio::piped()).stdout(Stdio::piped()).spawn()
    };
    let mut ranks: Vec<Child> = (0..world).map(start).collect::<std::io::Result<_>>()?;
    let mut said = Vec::new();
    let mut told = String::new();
    for (rank, child) in ranks.iter_mut().enumerate() {
        let mut out = BufReader::new(child.stdout.take().ok_or("no output")?);
        let mut line = String::new();
        out.read_line(&mut line)?;
        // Ranks in one namespace are on one host; without any, each is on its own.
        let host = if places.is_empty() { rank } else { rank % places.len() };
        told.push_str(&format!("{host} {line}"));
        said.push(out);
    }
    for child in &mut ranks {
        child.stdin.take().ok_or("no input")?.write_all(told.as_bytes())?;
    }
    for line in said.swap_remove(0).lines() {
        println!("{}", line?);
    }
    join(ranks)
}

fn join(ranks: Vec<Child>) -> std::result::Result<(), Failed> {
    for mut rank in ranks {
        if !rank.wait()?.success() {
            return Err("a rank failed".into());
        }
    }
    Ok(())
}

fn rank_of_net(transport: &str, rank: usize, world: usize, address: &str) -> std::result::Result<(), Failed> {
    let place = format!("{address}:0").parse()?;
    let listener = if transport == "quic" { Listener::quic(place)? } else { Listener::tcp(place)? };
    let key = Key::generate()?;
    let hex: String = key.public().0.iter().map(|byte| format!("{byte:02x}")).collect();
    println!("{} {hex}", listener.address()?);
    let mut ranks = Vec::new();
    for line in std::io::stdin().lines().take(world) {
        let line = line?;
        let words: Vec<&str> = line.split(' ').collect();
        let [host, address, hex] = words.as_slice() else { return Err("host, address and key".into()) };
        let byte = |at: usize| u8::from_str_radix(&hex[at..at + 2], 16);
        let key = (0..hex.len()).step_by(2).map(byte).collect::<std::result::Result<_, _>>()?;
        ranks.push(RankAddress { host: host.parse()?, address: address.parse()?, key: PublicKey(key) });
    }
    let told = Rendezvous { generation: 1, rank, ranks, encryption: transport != "plain" };
    let mut gang = listener.connect(&told, &key, TIMEOUT)?;
    Ok(exchanges(&mut gang, &format!("fleet {transport}"), false)?)
}

/// What every transport can.
fn exchanges(gang: &mut dyn Exchange, library: &str, shm: bool) -> Result<()> {
    let world = gang.world_size();
    for (bytes, shm_calls, net_calls) in SIZES {
        let calls = if shm { shm_calls } else { net_calls };
        let share = (bytes / world).max(4) / 4 * 4;
        let mut whole = vec![0u8; share * world];
        let mut one = vec![0u8; share];
        let mut data = vec![0u8; bytes];
        let buffers = gang.allocate_per_rank(bytes)?;
        let mut bench = Bench { gang, library, bytes, calls };
        bench.time("all_reduce", "copies", |g| g.all_reduce(&mut data, DType::F32, Op::Sum))?;
        bench.time("all_reduce", "in place", |g| {
            let ticket = g.post(&buffers, 0..bytes, Posted::AllReduce(DType::F32, Op::Sum))?;
            g.wait(ticket)
        })?;
        bench
            .time("reduce_scatter", "copies", |g| g.reduce_scatter(&whole, &mut one, DType::F32, Op::Sum))?;
        bench.time("reduce_scatter", "in place", |g| {
            let ticket = g.post(&buffers, 0..bytes, Posted::ReduceScatter(DType::F32, Op::Sum))?;
            g.wait(ticket)
        })?;
        bench.time("all_gather", "copies", |g| g.all_gather(&one, &mut whole))?;
        bench.time("all_gather", "in place", |g| {
            let ticket = g.post(&buffers, 0..bytes, Posted::AllGather(DType::F32))?;
            g.wait(ticket)
        })?;
    }
    Ok(())
}

/// What memory that a host shares makes of the same: reductions that leave each rank its part, and one buffer for all.
fn in_shared_memory(gang: &mut ShmCollective) -> Result<()> {
    let (me, world) = (gang.rank(), gang.world_size());
    for (bytes, calls, _) in SIZES {
        let share = (bytes / world).max(4);
        let data = vec![0u8; bytes];
        let buffers = gang.allocate_per_rank(bytes)?;
        let common = gang.allocate_common(share * world)?;
        let mine = part(share * world, me, world);
        let mut bench = Bench { gang, library: "fleet shm", bytes, calls };
        bench.time("reduce_scatter", "shared", |g| {
            g.post_reduce(&buffers, 0..bytes, DType::F32, Op::Sum, Keep::MyPart)?;
            g.finish()?;
            g.barrier()
        })?;
        bench.time("all_gather", "shared", |g| {
            common.write(mine.start, &data[..mine.len().min(data.len())]);
            g.barrier()
        })?;
    }
    Ok(())
}

struct Bench<'a, G: Exchange + ?Sized> {
    gang: &'a mut G,
    library: &'a str,
    bytes: usize,
    calls: usize,
}

impl<G: Exchange + ?Sized> Bench<'_, G> {
    fn time(
        &mut self,
        operation: &str,
        memory: &str,
        mut call: impl FnMut(&mut G) -> Result<()>,
    ) -> Result<()> {
        for _ in 0..self.calls.div_ceil(10) {
            call(self.gang)?;
        }
        self.gang.barrier()?;
        let mut microseconds = Vec::with_capacity(self.calls);
        for _ in 0..self.calls {
            let start = Instant::now();
            call(self.gang)?;
            microseconds.push(start.elapsed().as_secs_f64() * 1e6);
        }
        self.gang.barrier()?;
        if self.gang.rank() == 0 {
            microseconds.sort_by(f64::total_cmp);
            let median = microseconds[self.calls / 2];
            let line = [
                format!("\"library\":\"{}\"", self.library),
                format!("\"operation\":\"{operation}\",\"memory\":\"{memory}\""),
                format!("\"ranks\":{},\"bytes\":{}", self.gang.world_size(), self.bytes),
                format!("\"median_us\":{median:.2},\"best_us\":{:.2}", microseconds[0]),
                format!("\"gb_per_s\":{:.2}", self.bytes as f64 / median / 1e3),
            ];
            println!("{{{}}}", line.join(","));
        }
        Ok(())
    }
}
