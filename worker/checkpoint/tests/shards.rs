//! Checkpoints that several ranks write: at the same time, each its part, read back by whoever needs which range.

#![allow(clippy::unwrap_used)] // helpers of tests panic as tests do

use fleet_checkpoint::{
    CheckpointError, Claim, Dtype, MODEL_INDEX_FILE, PartWriter, RunDir, TensorRef, Tensors, Writer, inspect,
    latest, model_file, optimizer_file, verify, writers,
};
use fleet_common::events::CheckpointRecord;
use proptest::prelude::*;
use std::fs;
use std::ops::Range;
use std::path::{Path, PathBuf};

/// Names and numbers of some tensors; `moment.*` are cut at any number, `weight.*` are not.
struct State(Vec<(String, Vec<f32>)>);

impl State {
    fn of(sizes: &[usize]) -> State {
        let tensor = |(at, size): (usize, &usize)| {
            let numbers = |kind: usize| (0..*size).map(|n| (n * 7 + at * 1000 + kind) as f32).collect();
            [(format!("weight.{at}"), numbers(1)), (format!("moment.{at}"), numbers(2))]
        };
        State(sizes.iter().enumerate().flat_map(tensor).collect())
    }

    fn get(&self, name: &str) -> &[f32] {
        &self.0.iter().find(|(known, _)| known == name).unwrap().1
    }

    fn names(&self, prefix: &str) -> Vec<&(String, Vec<f32>)> {
        self.0.iter().filter(|(name, _)| name.starts_with(prefix)).collect()
    }
}

fn bytes(numbers: &[f32]) -> Vec<u8> {
    numbers.iter().flat_map(|x| x.to_le_bytes()).collect()
}

/// Where the parts of `world` ranks of `len` numbers begin.
fn cut(len: usize, rank: usize, world: usize) -> usize {
    (len * rank).div_ceil(world)
}

fn write_part(
    part: &mut PartWriter,
    state: &State,
    rank: usize,
    world: usize,
) -> Result<(), CheckpointError> {
    let weights = state.names("weight");
    let sizes: Vec<usize> = weights.iter().map(|(_, numbers)| numbers.len()).collect();
    let owned: Vec<_> =
        weights.iter().zip(writers(&sizes, world)).filter(|(_, writer)| *writer == rank).collect();
    let data: Vec<_> = owned.iter().map(|((_, numbers), _)| (bytes(numbers), [numbers.len()])).collect();
    let whole: Vec<TensorRef> = owned
        .iter()
        .zip(&data)
        .map(|(((name, _), _), (data, shape))| TensorRef { name, dtype: Dtype::F32, shape, first: 0, data })
        .collect();
    if !whole.is_empty() {
        part.write_safetensors(&model_file(rank, world.min(weights.len())), &whole)?;
    }
    let moments: Vec<_> = state
        .names("moment")
        .into_iter()
        .map(|(name, numbers)| {
            let range = cut(numbers.len(), rank, world)..cut(numbers.len(), rank + 1, world);
            (name, [numbers.len()], range.start, bytes(&numbers[range]))
        })
        .filter(|(.., data)| !data.is_empty())
        .collect();
    let parts: Vec<TensorRef> = moments
        .iter()
        .map(|(name, shape, first, data)| TensorRef { name, dtype: Dtype::F32, shape, first: *first, data })
        .collect();
    part.write_safetensors(&optimizer_file(rank, world), &parts)
}

fn claim(dir: &Path) -> RunDir {
    RunDir::claim(&Claim { dir, run: "run", resumed: None, overwrite: false, until: None, reads: &[] })
        .unwrap()
}

/// Ranks as threads; `spoil` may keep one from doing its part.
fn save(
    dir: &Path,
    state: &State,
    step: u64,
    world: usize,
    spoil: &(dyn Fn(usize, &mut PartWriter) -> Result<(), CheckpointError> + Sync),
) -> Result<CheckpointRecord, CheckpointError> {
    let run = claim(dir);
    let mut writer = Writer::begin(&run, step)?.of("ddp", world as u32);
    let ticket = writer.ticket();
    std::thread::scope(|scope| {
        for rank in 1..world {
            scope.spawn(move || {
                let mut part = PartWriter::join(dir, step, ticket, rank as u32);
                match spoil(rank, &mut part).and_then(|()| write_part(&mut part, state, rank, world)) {
                    Ok(()) => part.hand_in().unwrap(),
                    Err(e) => part.fail(&e),
                }
            });
        }
        spoil(0, writer.part())?;
        write_part(writer.part(), state, 0, world)?;
        writer.write_bytes("config.json", b"{}")?;
        writer.finish_together(1.5, &|| true)
    })
}

fn read(tensors: &Tensors, name: &str, range: Range<usize>) -> Vec<f32> {
    let bytes = tensors.get(name).unwrap().bytes(4 * range.start..4 * range.end).unwrap();
    bytes.as_chunks::<4>().0.iter().map(|b| f32::from_le_bytes(*b)).collect()
}

fn files(dir: &Path) -> Vec<String> {
    let mut names: Vec<String> =
        fs::read_dir(dir).unwrap().map(|e| e.unwrap().file_name().into_string().unwrap()).collect();
    names.sort();
    names
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(40))]

    /// Written by any number of ranks, read by any other, cut otherwise.
    #[test]
    fn what_n_ranks_write_m_ranks_read_bit_for_bit(
        sizes in proptest::collection::vec(1usize..400, 1..6), world in 1usize..5, readers in 1usize..5
    ) {
        let dir = tempfile::tempdir().unwrap();
        let state = State::of(&sizes);
        let record = save(dir.path(), &state, 3, world, &|_, _| Ok(())).unwrap();
        prop_assert_eq!(record.flaw(), None);
        let path = PathBuf::from(&record.path);
        let manifest = verify(&path).unwrap();
        prop_assert_eq!((manifest.world_size as usize, manifest.strategy.as_str()), (world, "ddp"));
        let (model, optimizer) = (Tensors::of_model(&path).unwrap(), Tensors::of_optimizer(&path).unwrap());
        prop_assert_eq!((model.len(), optimizer.len()), (sizes.len(), sizes.len()));
        // As others read it, who know no manifest.
        let foreign = Tensors::open(&path).unwrap();
        for (name, numbers) in &state.0 {
            for rank in 0..readers {
                let range = cut(numbers.len(), rank, readers)..cut(numbers.len(), rank + 1, readers);
                let from = if name.starts_with("weight") { &model } else { &optimizer };
                prop_assert_eq!(&read(from, name, range.clone()), &numbers[range.clone()]);
                if name.starts_with("weight") {
                    prop_assert_eq!(&read(&foreign, name, range.clone()), &numbers[range]);
                }
            }
        }
    }
}

#[test]
fn a_directory_of_several_writers_is_a_model_as_transformers_has_it() {
    let dir = tempfile::tempdir().unwrap();
    let record = save(dir.path(), &State::of(&[5, 60, 7]), 3, 2, &|_, _| Ok(())).unwrap();
    let path = PathBuf::from(&record.path);
    let expected = [
        "config.json",
        "manifest.json",
        "model-00001-of-00002.safetensors",
        "model-00002-of-00002.safetensors",
        "model.safetensors.index.json",
        "optimizer-00001-of-00002.safetensors",
        "optimizer-00002-of-00002.safetensors",
    ];
    assert_eq!(files(&path), expected);
    let index: serde_json::Value =
        serde_json::from_slice(&fs::read(path.join(MODEL_INDEX_FILE)).unwrap()).unwrap();
    assert_eq!(index["metadata"]["total_size"], 4 * (5 + 60 + 7));
    assert_eq!(index["weight_map"]["weight.1"], "model-00001-of-00002.safetensors");
    assert_eq!(index["weight_map"]["weight.0"], "model-00002-of-00002.safetensors");
    let writers: Vec<u32> = record.shards.iter().map(|shard| shard.writer).collect();
    assert_eq!(writers, [0, 0, 1, 0, 0, 1]);
    // Each file is one by itself; what is a part says of what.
    let bytes = fs::read(path.join("optimizer-00002-of-00002.safetensors")).unwrap();
    let parsed = safetensors::SafeTensors::deserialize(&bytes).unwrap();
    assert_eq!(parsed.tensor("moment.1[30:60]").unwrap().shape(), [30]);
}

#[test]
fn a_large_tensor_has_many_pieces_and_a_range_is_checked_without_the_others() {
    let dir = tempfile::tempdir().unwrap();
    let state = State::of(&[5 << 20]);
    let path = PathBuf::from(save(dir.path(), &state, 3, 2, &|_, _| Ok(())).unwrap().path);
    let manifest = verify(&path).unwrap();
    assert_eq!(manifest.tensors["weight.0"].pieces.len(), 3);
    assert_eq!(manifest.tensors["moment.0"].pieces.len(), 4);
    // A byte of the last piece.
    let file = path.join("model.safetensors");
    let mut bytes = fs::read(&file).unwrap();
    *bytes.last_mut().unwrap() ^= 1;
    fs::write(&file, bytes).unwrap();
    let model = Tensors::of_model(&path).unwrap();
    let across = (2 << 20) - 3..(2 << 20) + 3;
    assert_eq!(read(&model, "weight.0", across.clone()), state.get("weight.0")[across]);
    let end = model.get("weight.0").unwrap().len();
    let error = model.get("weight.0").unwrap().bytes(end - 64..end - 60).unwrap_err().to_string();
    assert!(error.contains("the contents of the tensor weight.0 in model"), "{error}");
}

#[test]
fn a_flipped_byte_is_found_and_file_tensor_and_rank_are_named() {
    let dir = tempfile::tempdir().unwrap();
    let path =
        PathBuf::from(save(dir.path(), &State::of(&[500, 600, 700]), 3, 3, &|_, _| Ok(())).unwrap().path);
    for name in files(&path).into_iter().filter(|name| name != "manifest.json") {
        let whole = fs::read(path.join(&name)).unwrap();
        for at in [0, whole.len() / 2, whole.len() - 1] {
            let mut bytes = whole.clone();
            bytes[at] ^= 0x10;
            fs::write(path.join(&name), &bytes).unwrap();
            let (manifest, wrong) = inspect(&path).unwrap();
            assert_eq!(wrong.len(), 1, "{name}: {wrong:?}");
            let line = wrong[0].to_string();
            let rank = manifest.files[&name].writer;
            assert!(line.contains(&format!("{name}, which rank {rank} wrote, have changed")), "{line}");
            assert_eq!(line.contains("tensor "), at > 0 && name.ends_with(".safetensors"), "{line}");
        }
        fs::write(path.join(&name), &whole).unwrap();
    }
    verify(&path).unwrap();
}

#[test]
fn a_missing_piece_is_named_with_who_wrote_it() {
    let dir = tempfile::tempdir().unwrap();
    let path =
        PathBuf::from(save(dir.path(), &State::of(&[500, 600, 700]), 3, 3, &|_, _| Ok(())).unwrap().path);
    fs::remove_file(path.join("optimizer-00003-of-00003.safetensors")).unwrap();
    let said = "optimizer-00003-of-00003.safetensors, which rank 2 wrote, is missing";
    for error in [verify(&path).unwrap_err(), Tensors::of_optimizer(&path).unwrap_err()] {
        assert!(error.to_string().contains(said), "{error}");
    }
    Tensors::of_model(&path).unwrap();
}

#[test]
fn what_no_rank_has_written_or_two_have_is_no_checkpoint() {
    let dir = tempfile::tempdir().unwrap();
    let state = State::of(&[50]);
    save(dir.path(), &state, 1, 2, &|_, _| Ok(())).unwrap();
    let extra = |first: usize| {
        let numbers = vec![0; 4 * 10];
        move |rank: usize, part: &mut PartWriter| {
            let tensor = TensorRef {
                name: "more",
                dtype: Dtype::F32,
                shape: &[30],
                first: first * rank,
                data: &numbers,
            };
            part.write_safetensors(&format!("more-{rank}"), &[tensor])
        }
    };
    for (first, said) in [
        (5, "two ranks have written bytes 20..40 of more"),
        (15, "nobody has written bytes 40..60 of more"),
        (10, "has not all of the tensor more"),
    ] {
        let error = save(dir.path(), &state, 2, 2, &extra(first)).unwrap_err().to_string();
        assert!(error.contains(said), "{error}");
        assert_eq!(files(dir.path()), ["step-00000001"], "nothing is left of it");
    }
}

#[test]
fn a_rank_that_cannot_write_fails_the_save_of_all_and_is_named() {
    let dir = tempfile::tempdir().unwrap();
    let state = State::of(&[50, 60]);
    save(dir.path(), &state, 1, 2, &|_, _| Ok(())).unwrap();
    let full = |rank: usize, part: &mut PartWriter| match rank {
        1 => part.write_bytes("no/such/folder", b"x"),
        _ => Ok(()),
    };
    let error = save(dir.path(), &state, 2, 2, &full).unwrap_err();
    let line = error.to_string();
    assert!(matches!(error, CheckpointError::Peer { rank: 1, .. }), "{line}");
    assert!(line.contains("was not saved by rank 1: ") && line.contains("no/such/folder"), "{line}");
    assert_eq!(files(dir.path()), ["step-00000001"]);
    assert_eq!(latest(dir.path()).unwrap().newest.unwrap().1.step, 1);
}

/// A directory where the small file would be is as good as a full disk: it cannot be written.
#[test]
fn a_part_that_cannot_be_handed_in_is_told_as_none() {
    let dir = tempfile::tempdir().unwrap();
    let run = claim(dir.path());
    let mut writer = Writer::begin(&run, 1).unwrap().of("ddp", 2);
    write_part(writer.part(), &State::of(&[50]), 0, 2).unwrap();
    let mut other = PartWriter::join(dir.path(), 1, writer.ticket(), 1);
    write_part(&mut other, &State::of(&[50]), 1, 2).unwrap();
    let temporary = fs::read_dir(dir.path()).unwrap().map(|entry| entry.unwrap().path());
    let temporary = temporary.into_iter().find(|path| path.to_string_lossy().contains(".tmp-")).unwrap();
    fs::create_dir(temporary.join(".part-00001.new")).unwrap();
    assert!(other.hand_in().is_err());
    let error = writer.finish_together(1.0, &|| false).unwrap_err();
    assert!(matches!(error, CheckpointError::Peer { rank: 1, is_full: true, .. }), "{error}");
    assert!(error.to_string().contains("no room to hand its part in"), "{error}");
}

#[test]
fn a_part_that_never_comes_is_not_waited_for_for_ever() {
    let dir = tempfile::tempdir().unwrap();
    let run = claim(dir.path());
    let mut writer = Writer::begin(&run, 1).unwrap().of("ddp", 2);
    write_part(writer.part(), &State::of(&[50]), 0, 2).unwrap();
    let looks = std::cell::Cell::new(0);
    let error = writer.finish_together(1.0, &|| looks.replace(looks.get() + 1) < 3).unwrap_err().to_string();
    assert!(error.contains("rank 1: its part did not come"), "{error}");
}
