//! Checkpoints that hosts without a common file system write, each to its own disk.

#![allow(clippy::unwrap_used)] // helpers of tests panic as tests do

use fleet_checkpoint::{
    CheckpointError, Claim, Disks, Dtype, Manifest, PartWriter, RunDir, TensorRef, Tensors, Writer,
    consolidate, diff, inspect, latest, model_file, optimizer_file, step_dir, verify,
};
use fleet_common::events::CheckpointRecord;
use std::fs;
use std::path::{Path, PathBuf};

const WORLD: usize = 4;

/// Two hosts with two ranks each, and a disk each under the same directory.
struct Scene {
    dir: tempfile::TempDir,
    disks: Disks,
}

impl Scene {
    fn new() -> Scene {
        let names = vec!["box-1".to_owned(), "box-2".to_owned()];
        Scene { dir: tempfile::tempdir().unwrap(), disks: Disks::new(vec![0, 0, 1, 1], &[0, 1], names) }
    }

    fn disk(&self, disk: usize) -> PathBuf {
        self.dir.path().join(format!("disk-{disk}"))
    }

    fn at(&self, disk: usize, step: u64) -> PathBuf {
        step_dir(&self.disk(disk), step)
    }

    fn claim(&self, disk: usize) -> RunDir {
        let dir = self.disk(disk);
        let claim = Claim { dir: &dir, run: "r", resumed: None, overwrite: true, until: None, reads: &[] };
        RunDir::claim(&claim).unwrap()
    }

    /// The parts of all ranks are written, on both disks.
    fn written(&self, runs: &[RunDir], step: u64) -> Vec<Writer> {
        let write = |disk: usize| {
            let writer = Writer::begin(&runs[disk], step).unwrap().of("fsdp", WORLD as u32);
            let mut writer = writer.among(self.disks.clone(), disk);
            let ticket = writer.ticket();
            for rank in self.disks.ranks(disk).skip(1) {
                let mut part = PartWriter::join(&self.disk(disk), step, ticket, rank as u32);
                write_part(&mut part, rank, step);
                part.hand_in().unwrap();
            }
            write_part(writer.part(), self.disks.lead(disk), step);
            writer.collect(&|| false).unwrap();
            writer
        };
        (0..2).map(write).collect()
    }

    fn prepared(&self, runs: &[RunDir], step: u64) -> Vec<Writer> {
        let mut writers = self.written(runs, step);
        let handed: Vec<Vec<u8>> = writers.iter().map(Writer::handed).collect();
        let serial = writers.iter().map(|writer| writer.ticket().serial).max().unwrap();
        for (disk, writer) in writers.iter_mut().enumerate() {
            writer.numbered(serial);
            writer.take_in(1 - disk, &handed[1 - disk]).unwrap();
            writer.prepare(1.5).unwrap();
        }
        writers
    }

    fn save(&self, step: u64) -> Vec<CheckpointRecord> {
        let runs = [self.claim(0), self.claim(1)];
        self.prepared(&runs, step).into_iter().map(|writer| writer.publish().unwrap()).collect()
    }

    /// As a node has it that has fetched all of it.
    fn whole(&self, step: u64) -> PathBuf {
        let whole = self.dir.path().join(format!("whole-{step}"));
        fs::create_dir(&whole).unwrap();
        for disk in 0..2 {
            for entry in fs::read_dir(self.at(disk, step)).unwrap().flatten() {
                fs::copy(entry.path(), whole.join(entry.file_name())).unwrap();
            }
        }
        whole
    }
}

/// Weights lie on the first disk, the optimizer's state on both.
fn write_part(part: &mut PartWriter, rank: usize, step: u64) {
    let data: Vec<u8> = (0..64).map(|at| (at * 3 + rank as u64 * 7 + step) as u8).collect();
    if rank < 2 {
        let name = format!("w{rank}");
        let whole = TensorRef { name: &name, dtype: Dtype::U8, shape: &[64], first: 0, data: &data };
        part.write_safetensors(&model_file(rank, 2), &[whole]).unwrap();
    }
    let kept = TensorRef { name: "m", dtype: Dtype::U8, shape: &[64 * WORLD], first: 64 * rank, data: &data };
    part.write_safetensors(&optimizer_file(rank, WORLD), &[kept]).unwrap();
}

fn names(dir: &Path) -> Vec<String> {
    let mut names: Vec<String> =
        fs::read_dir(dir).unwrap().map(|entry| entry.unwrap().file_name().into_string().unwrap()).collect();
    names.sort();
    names
}

#[test]
fn each_disk_has_its_part_and_the_same_manifest_and_together_they_are_whole() {
    let scene = Scene::new();
    let records = scene.save(5);
    assert_eq!(records[0].manifest_sha256, records[1].manifest_sha256);
    assert_eq!((records[0].flaw(), &records[0].disks), (None, &vec![0, 1]));
    let optimizer = |rank| optimizer_file(rank, WORLD);
    assert_eq!(names(&scene.at(1, 5)), ["manifest.json".to_owned(), optimizer(2), optimizer(3)]);
    // The first one is a model for others.
    assert_eq!(Tensors::of_model(&scene.at(0, 5)).unwrap().len(), 2);
    assert!(scene.at(0, 5).join("model.safetensors.index.json").exists());
    let whole = scene.whole(5);
    assert_eq!(verify(&whole).unwrap().disks, ["box-1", "box-2"]);
    assert_eq!(Tensors::of_optimizer(&whole).unwrap().get("m").unwrap().data().unwrap().len(), 256);
    let one = scene.dir.path().join("one");
    assert_eq!(consolidate(&whole, &one).unwrap().disks.len(), 0);
    assert_eq!(diff(&whole, &one).unwrap(), []);
}

#[test]
fn who_looks_at_a_part_is_told_what_lies_where() {
    let scene = Scene::new();
    scene.save(5);
    let part = scene.at(0, 5);
    let out = scene.dir.path().join("out");
    let errors = [
        verify(&part).unwrap_err(),
        inspect(&part).unwrap().1.remove(0),
        consolidate(&part, &out).unwrap_err(),
        Tensors::of_optimizer(&part).unwrap_err(),
    ];
    for error in errors {
        let text = error.to_string();
        assert!(matches!(error, CheckpointError::Partial { .. }), "{text}");
        let missing =
            format!("on box-2 were written {}, {}", optimizer_file(2, WORLD), optimizer_file(3, WORLD));
        assert!(text.contains(&missing), "{text}");
    }
    assert!(!out.exists());
    let found = latest(&scene.disk(0)).unwrap();
    assert!(found.newest.is_none() && matches!(found.passed_over[0], CheckpointError::Partial { .. }));
    // What is damaged or gone of the part itself is named with its rank and host.
    let file = part.join(optimizer_file(1, WORLD));
    let mut bytes = fs::read(&file).unwrap();
    *bytes.last_mut().unwrap() ^= 1;
    fs::write(&file, bytes).unwrap();
    let said = |dir: &Path| inspect(dir).unwrap().1.iter().map(ToString::to_string).collect::<Vec<_>>();
    let [changed, _] = &said(&part)[..] else { panic!("{:?}", said(&part)) };
    assert!(
        changed.contains("the tensor m in optimizer-00002-of-00004.safetensors, which rank 1 wrote on box-1"),
        "{changed}"
    );
    fs::remove_file(file).unwrap();
    let [gone, _] = &said(&part)[..] else { panic!("{:?}", said(&part)) };
    assert!(gone.contains("which rank 1 wrote on box-1, is missing"), "{gone}");
}

#[test]
fn what_one_disk_cannot_do_appears_on_none() {
    let scene = Scene::new();
    scene.save(1);
    let mut runs = [scene.claim(0), scene.claim(1)];
    let mut writers = scene.written(&runs, 2);
    // A rank of the other disk that says it wrote what this one did.
    let handed = writers[0].handed();
    let error = writers[0].take_in(1, &handed).unwrap_err().to_string();
    assert!(error.contains("is on another disk than box-2"), "{error}");
    drop(writers);
    let mut published = scene.prepared(&runs, 3).into_iter();
    published.next().unwrap().publish().unwrap();
    drop(published);
    runs[0].withdraw(3).unwrap();
    drop(runs);
    for disk in 0..2 {
        assert_eq!(names(&scene.disk(disk)), ["step-00000001"], "disk {disk}");
    }
    verify(&scene.whole(1)).unwrap();
}

#[test]
fn each_disk_keeps_as_many_parts_and_never_counts_what_an_earlier_process_left_half() {
    let scene = Scene::new();
    let mut runs = [scene.claim(0), scene.claim(1)];
    for step in 1..=4 {
        scene.prepared(&runs, step).into_iter().for_each(|writer| drop(writer.publish().unwrap()));
        runs.iter_mut().for_each(|run| drop(run.rotate(2, step, false).unwrap()));
    }
    for disk in 0..2 {
        let kept: Vec<String> =
            names(&scene.disk(disk)).into_iter().filter(|name| name.starts_with("step")).collect();
        assert_eq!(kept, ["step-00000003", "step-00000004"], "disk {disk}");
    }
    drop(runs);
    // The next process does not know whether they were recorded.
    let mut run = scene.claim(1);
    assert_eq!(run.rotate(1, 4, false).unwrap().len(), 1, "the one of 4 is what it was told");
    assert_eq!(Manifest::read(&scene.at(1, 4)).unwrap().step, 4);
}

#[test]
fn serials_rise_on_all_disks() {
    let scene = Scene::new();
    scene.save(1);
    scene.save(2);
    fs::remove_dir_all(scene.disk(1)).unwrap();
    scene.save(3);
    let serial = |disk: usize| Manifest::read(&scene.at(disk, 3)).unwrap().serial;
    assert_eq!((serial(0), serial(1)), (3, 3));
}

#[test]
fn what_was_replaced_goes_where_nobody_writes() {
    let scene = Scene::new();
    let [record, _] = &scene.save(7)[..] else { panic!("two disks") };
    let path = scene.at(1, 7);
    let run = scene.claim(1);
    assert!(!RunDir::retire(&path, &record.manifest_sha256).unwrap(), "its run writes there");
    drop(run);
    assert!(!RunDir::retire(&path, &"ab".repeat(32)).unwrap(), "another one");
    assert!(path.exists());
    assert!(RunDir::retire(&path, &record.manifest_sha256).unwrap());
    assert!(!path.exists() && names(&scene.disk(1)).is_empty());
    assert!(!RunDir::retire(&path, &record.manifest_sha256).unwrap(), "it is gone");
    assert!(scene.at(0, 7).exists());
}
