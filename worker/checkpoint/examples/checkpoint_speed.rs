//! How fast a checkpoint is written and read, and for how long it stops training: `checkpoint_speed MIB WRITERS [ROUNDS] [DIR]`. The state is
//! of MIB in all, a third weights and the rest two moments, as AdamW has it in fp32; each writer is a thread with a part of its own. Prints one
//! line of JSON for each round: the first one takes its memory anew. What is read was just written, so it comes from the page cache.

use fleet_checkpoint::{
    CheckpointError, Claim, Dtype, PartWriter, RunDir, TensorRef, Tensors, Writer, model_file,
    optimizer_file, verify,
};
use std::path::{Path, PathBuf};
use std::sync::Barrier;
use std::time::{Duration, Instant};

type Outcome<T> = Result<T, Box<dyn std::error::Error>>;

/// Bytes of a tensor of weights.
const TENSOR: usize = 4 << 20;

/// One writer's state and the copy of it that is written.
struct Rank {
    state: Vec<u8>,
    copy: Vec<u8>,
}

fn main() -> Outcome<()> {
    let words: Vec<String> = std::env::args().skip(1).collect();
    let number = |at: usize| words.get(at).map(|word| word.parse::<usize>()).transpose();
    let (Some(mib), Some(writers)) = (number(0)?, number(1)?) else {
        return Err("give the MiB of the state and the number of writers".into());
    };
    let rounds = number(2)?.unwrap_or(5);
    let place = words.get(3).map_or_else(std::env::temp_dir, PathBuf::from);
    let dir = place.join(format!("checkpoint-speed-{}", std::process::id()));
    // Of each writer: whole tensors of weights, and twice as many bytes of moments.
    let tensors = (mib << 20).div_ceil(3 * TENSOR * writers).max(1);
    let mut ranks: Vec<Rank> = (0..writers)
        .map(|rank| Rank {
            state: (0..3 * tensors * TENSOR)
                .map(|at| (at.wrapping_mul(31) >> 7) as u8 ^ rank as u8)
                .collect(),
            copy: Vec::new(),
        })
        .collect();
    let bytes = (writers * 3 * tensors * TENSOR) as f64;
    for step in 1..=rounds as u64 {
        let stopped = at_once(&mut ranks, |rank| {
            rank.copy.clear();
            rank.copy.extend_from_slice(&rank.state);
        });
        let began = Instant::now();
        let path = save(&dir, step, &ranks, tensors)?;
        let written = began.elapsed();
        let began = Instant::now();
        verify(&path)?;
        let verified = began.elapsed();
        let began = Instant::now();
        load(&path, &mut ranks, tensors)?;
        let loaded = began.elapsed();
        if ranks.iter().any(|rank| rank.copy != rank.state) {
            return Err("what was read is not what was written".into());
        }
        let rate = |time: Duration| (bytes / time.as_secs_f64() / 1e7).round() / 100.0;
        let line = serde_json::json!({
            "mib": bytes / f64::from(1 << 20), "writers": writers, "stopped_ms": stopped.as_secs_f64() * 1e3,
            "write_ms": written.as_secs_f64() * 1e3, "write_gb_s": rate(written), "verify_gb_s": rate(verified),
            "load_ms": loaded.as_secs_f64() * 1e3, "load_gb_s": rate(loaded),
        });
        println!("{line}");
        std::fs::remove_dir_all(&path)?;
    }
    std::fs::remove_dir_all(&dir)?;
    Ok(())
}

/// All ranks at once; the time until the last is done.
fn at_once(ranks: &mut [Rank], work: impl Fn(&mut Rank) + Sync) -> Duration {
    let (start, end) = (Barrier::new(ranks.len() + 1), Barrier::new(ranks.len() + 1));
    std::thread::scope(|scope| {
        for rank in ranks.iter_mut() {
            scope.spawn(|| {
                start.wait();
                work(rank);
                end.wait();
            });
        }
        start.wait();
        let began = Instant::now();
        end.wait();
        began.elapsed()
    })
}

fn save(dir: &Path, step: u64, ranks: &[Rank], tensors: usize) -> Outcome<PathBuf> {
    let run =
        RunDir::claim(&Claim { dir, run: "speed", resumed: None, overwrite: true, until: None, reads: &[] })?;
    let world = ranks.len();
    let mut writer = Writer::begin(&run, step)?.of("ddp", world as u32);
    let ticket = writer.ticket();
    std::thread::scope(|scope| {
        let others: Vec<_> = (1..world)
            .map(|rank| {
                let data = &ranks[rank].copy;
                scope.spawn(move || {
                    let mut part = PartWriter::join(dir, step, ticket, rank as u32);
                    write_part(&mut part, data, rank, world, tensors)?;
                    part.hand_in()
                })
            })
            .collect();
        write_part(writer.part(), &ranks[0].copy, 0, world, tensors)?;
        for other in others {
            other.join().map_err(|_| "a writer panicked")??;
        }
        Ok(writer.finish_together(0.0, &|| true)?.path.into())
    })
}

/// Names of the tensors of weights that `rank` writes.
fn names(rank: usize, tensors: usize) -> Vec<String> {
    (0..tensors).map(|at| format!("layers.{rank}.{at}.weight")).collect()
}

fn write_part(
    part: &mut PartWriter,
    data: &[u8],
    rank: usize,
    world: usize,
    tensors: usize,
) -> Result<(), CheckpointError> {
    let (weights, moments) = data.split_at(tensors * TENSOR);
    let names = names(rank, tensors);
    let shape = [TENSOR / 4];
    let whole: Vec<TensorRef> = names
        .iter()
        .zip(weights.chunks(TENSOR))
        .map(|(name, data)| TensorRef { name, dtype: Dtype::F32, shape: &shape, first: 0, data })
        .collect();
    part.write_safetensors(&model_file(rank, world), &whole)?;
    let shape = [world * moments.len() / 4];
    let first = rank * moments.len() / 4;
    let kept = TensorRef { name: "moments", dtype: Dtype::F32, shape: &shape, first, data: moments };
    part.write_safetensors(&optimizer_file(rank, world), &[kept])
}

/// Each rank reads what it wrote, by ranges.
fn load(path: &Path, ranks: &mut [Rank], tensors: usize) -> Outcome<()> {
    std::thread::scope(|scope| {
        let readers: Vec<_> = ranks
            .iter_mut()
            .enumerate()
            .map(|(number, rank)| {
                scope.spawn(move || -> Result<(), CheckpointError> {
                    let (model, optimizer) = (Tensors::of_model(path)?, Tensors::of_optimizer(path)?);
                    let mut at = 0;
                    for name in names(number, tensors) {
                        let tensor = model.get(&name).expect("it was written");
                        tensor.pieces(0..TENSOR, &mut |bytes| {
                            rank.copy[at..at + bytes.len()].copy_from_slice(bytes);
                            at += bytes.len();
                        })?;
                    }
                    let kept = rank.copy.len() - at;
                    let moments = optimizer.get("moments").expect("it was written");
                    moments.pieces(number * kept..(number + 1) * kept, &mut |bytes| {
                        rank.copy[at..at + bytes.len()].copy_from_slice(bytes);
                        at += bytes.len();
                    })
                })
            })
            .collect();
        for reader in readers {
            reader.join().map_err(|_| "a reader panicked")??;
        }
        Ok(())
    })
}
