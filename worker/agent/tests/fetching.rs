//! Checkpoints from node to node: a real lender and a real fetcher over QUIC, with real certificates. Each has a directory as its disk.

#![allow(clippy::unwrap_used)] // in a test an unwrap is an assertion

use fleet_agent::fetch::{Unfetched, fetch};
use fleet_agent::lend::Lender;
use fleet_checkpoint::{Claim, Dtype, RunDir, TensorRef, Writer, manifest_sha256, verify};
use fleet_common::codec::{read_frame, write_frame};
use fleet_common::ids::NodeId;
use fleet_common::net::{self, ClusterCa, Identity};
use fleet_common::protocol::{Fetch, Fetched, Files, Holder, Loan, Member, ResumePoint};
use std::fs;
use std::path::{Path, PathBuf};
use std::sync::atomic::{AtomicBool, Ordering};
use std::time::{Duration, SystemTime};
use tempfile::TempDir;
use tokio::sync::watch;

const YEAR: Duration = Duration::from_secs(365 * 24 * 3600);
/// Nobody answers later here.
const SHORT: Duration = Duration::from_millis(500);
/// Numbers of a tensor: three pieces of its file.
const NUMBERS: usize = 5 << 20;

/// Node 1 has a checkpoint and lends it to node 2.
struct Scene {
    dir: TempDir,
    ca: ClusterCa,
    nodes: [Identity; 2],
    lender: Lender,
    shown: watch::Sender<Identity>,
}

impl Scene {
    fn new() -> Scene {
        let dir = tempfile::tempdir().unwrap();
        let now = SystemTime::now();
        let ca = ClusterCa::create("cluster-test", now).unwrap();
        let nodes =
            [1, 2].map(|n| ca.issue(Member::Worker(NodeId(n)), &format!("box-{n}"), now, YEAR).unwrap());
        let (shown, newest) = watch::channel(nodes[0].clone());
        let lender = Lender::start("127.0.0.1", 0, newest).unwrap();
        let scene = Scene { dir, ca, nodes, lender, shown };
        scene.save();
        scene.lender.lend(vec![scene.loan()]);
        scene
    }

    fn save(&self) {
        let place = self.dir.path().join("one");
        let claim = Claim { dir: &place, run: "r", resumed: None, overwrite: false, until: None, reads: &[] };
        let run = RunDir::claim(&claim).unwrap();
        let mut writer = Writer::begin(&run, 5).unwrap();
        let data: Vec<u8> = (0..4 * NUMBERS).map(|n| (n % 251) as u8).collect();
        let tensor = |name| TensorRef { name, dtype: Dtype::F32, shape: &[NUMBERS], first: 0, data: &data };
        writer.write_safetensors("model.safetensors", &[tensor("a"), tensor("b")]).unwrap();
        writer.write_bytes("config.json", b"{}").unwrap();
        writer.write_bytes("empty.txt", b"").unwrap();
        writer.finish(1.0).unwrap();
    }

    fn original(&self) -> PathBuf {
        self.dir.path().join("one/step-00000005")
    }

    fn copy(&self) -> PathBuf {
        self.dir.path().join("two/step-00000005")
    }

    fn manifest(&self) -> String {
        manifest_sha256(&self.original()).unwrap()
    }

    fn loan(&self) -> Loan {
        let (to, key) = (NodeId(2), self.nodes[1].key_hash().unwrap());
        let path = self.original().display().to_string();
        Loan { to, key, path, manifest_sha256: self.manifest() }
    }

    fn holder(&self, node: u64, port: u16) -> Holder {
        let (name, address) = (format!("box-{node}"), Some(format!("127.0.0.1:{port}")));
        Holder {
            node: NodeId(node),
            name,
            address,
            key: self.nodes[0].key_hash().unwrap(),
            files: Files::All,
        }
    }

    fn fetch_of(&self, holders: Vec<Holder>, patience: Duration) -> Result<(), String> {
        let (path, manifest_sha256) = (self.copy().display().to_string(), self.manifest());
        let point = ResumePoint { step: 5, path, manifest_sha256, holders };
        fetch(&point, self.nodes[1].clone(), patience, &|_| {}).map_err(|unfetched| match unfetched {
            Unfetched::Lost(why) => why,
            Unfetched::Refused(error) => format!("refused: {error}"),
        })
    }

    fn fetch(&self) -> Result<(), String> {
        self.fetch_of(vec![self.holder(1, self.lender.port)], SHORT)
    }

    /// What is in the directory of the copies.
    fn left(&self) -> Vec<String> {
        let entries = fs::read_dir(self.dir.path().join("two")).into_iter().flatten().flatten();
        entries.map(|entry| entry.file_name().to_string_lossy().into_owned()).collect()
    }

    fn spoil(&self, file: &str, at: u64) {
        use std::os::unix::fs::FileExt;
        let file = fs::File::options().read(true).write(true).open(self.original().join(file)).unwrap();
        let mut byte = [0];
        file.read_exact_at(&mut byte, at).unwrap();
        file.write_all_at(&[byte[0] ^ 1], at).unwrap();
    }
}

fn same(a: &Path, b: &Path) {
    let names = |dir: &Path| {
        let mut names: Vec<_> = fs::read_dir(dir).unwrap().map(|entry| entry.unwrap().file_name()).collect();
        names.sort();
        names
    };
    assert_eq!(names(a), names(b));
    for name in names(a) {
        assert!(fs::read(a.join(&name)).unwrap() == fs::read(b.join(&name)).unwrap(), "{name:?}");
    }
}

#[test]
fn a_checkpoint_comes_as_it_was_written_and_leaves_nothing_else() {
    let scene = Scene::new();
    scene.fetch().unwrap();
    same(&scene.original(), &scene.copy());
    verify(&scene.copy()).unwrap();
    assert_eq!(scene.left(), ["step-00000005"]);
    // Over a damaged copy, and with a certificate that was renewed meanwhile.
    fs::write(scene.copy().join("config.json"), "[]").unwrap();
    let again = scene.nodes[0].signing_request().unwrap();
    let der = scene.ca.sign(&again, Member::Worker(NodeId(1)), "box-1", SystemTime::now(), YEAR).unwrap();
    let renewed = scene.nodes[0].renewed(der, scene.nodes[0].authorities.clone()).unwrap();
    scene.shown.send_replace(renewed);
    scene.fetch().unwrap();
    same(&scene.original(), &scene.copy());
    assert_eq!(scene.left(), ["step-00000005"]);
}

#[test]
fn a_changed_byte_is_found_and_named_with_node_file_and_tensor() {
    let scene = Scene::new();
    scene.spoil("model.safetensors", 4 * NUMBERS as u64 * 2 - 9);
    let why = scene.fetch().unwrap_err();
    for part in ["model.safetensors", "step 5", "node box-1", "tensor b"] {
        assert!(why.contains(part), "{part}: {why}");
    }
    assert_eq!(scene.left(), Vec::<String>::new());
    // The header of a file is no tensor's.
    scene.spoil("model.safetensors", 4 * NUMBERS as u64 * 2 - 9);
    scene.spoil("model.safetensors", 9);
    let why = scene.fetch().unwrap_err();
    assert!(why.contains("model.safetensors") && why.contains("changed"), "{why}");
}

#[test]
fn a_missing_piece_is_named_with_the_node_that_had_it_and_taken_from_the_next_one() {
    let scene = Scene::new();
    fs::remove_file(scene.original().join("config.json")).unwrap();
    let why = scene.fetch().unwrap_err();
    assert!(
        why.contains("config.json") && why.contains("node box-1 had it: ") && why.contains("missing"),
        "{why}"
    );
    let nobody = Holder { address: None, ..scene.holder(3, 1) };
    let why = scene.fetch_of(vec![nobody.clone()], SHORT).unwrap_err();
    assert!(why.contains("node box-3 had it: it is out of touch"), "{why}");
    fs::write(scene.original().join("config.json"), "{}").unwrap();
    scene.fetch_of(vec![nobody, scene.holder(1, scene.lender.port)], SHORT).unwrap();
    same(&scene.original(), &scene.copy());
}

#[test]
fn who_has_nothing_lent_gets_nothing_and_nobody_gets_anything_else() {
    let scene = Scene::new();
    fs::write(scene.dir.path().join("one/secret"), "s").unwrap();
    std::os::unix::fs::symlink("../secret", scene.original().join("link")).unwrap();
    let runtime = tokio::runtime::Builder::new_current_thread().enable_all().build().unwrap();
    let (address, key) = (format!("127.0.0.1:{}", scene.lender.port), scene.nodes[0].key_hash().unwrap());
    let ask = async |fetch: Fetch| {
        let connection = net::connect_agent(&address, &scene.nodes[1], key).await.unwrap();
        let (mut send, mut receive) = connection.open_bi().await.unwrap();
        write_frame(&mut send, &fetch).await.unwrap();
        read_frame::<_, Fetched>(&mut receive).await.ok().flatten()
    };
    runtime.block_on(async {
        let (manifest, other) = (scene.manifest(), "ab".repeat(32));
        assert_eq!(ask(Fetch::new(&manifest, "config.json", 1)).await, Some(Fetched::Comes { bytes: 1 }));
        for name in ["../secret", "link", "/etc/passwd", "", ".", "..", ".lock"] {
            let answer = ask(Fetch::new(&manifest, name, 0)).await;
            assert!(matches!(answer, Some(Fetched::Missing(_))), "{name}: {answer:?}");
        }
        let answer = ask(Fetch::new(&other, "config.json", 0)).await;
        assert!(matches!(answer, Some(Fetched::Later(_))), "{answer:?}");
        let newer = Fetch { version: 99, ..Fetch::new(&manifest, "config.json", 0) };
        assert_eq!(ask(newer).await, None, "another version is refused");
        // A member of the cluster, but not who is meant.
        let wrong = net::connect_agent(&address, &scene.nodes[1], [7; 32]).await;
        assert!(wrong.is_err());
    });
    let stranger = ClusterCa::create("cluster-test", SystemTime::now()).unwrap();
    let stranger = stranger.issue(Member::Worker(NodeId(2)), "box-2", SystemTime::now(), YEAR).unwrap();
    let holders = || vec![scene.holder(1, scene.lender.port)];
    let (path, manifest_sha256) = (scene.copy().display().to_string(), scene.manifest());
    let point = ResumePoint { step: 5, path, manifest_sha256, holders: holders() };
    assert!(matches!(fetch(&point, stranger, SHORT, &|_| {}), Err(Unfetched::Lost(_))));
    scene.lender.lend(Vec::new());
    let why = scene.fetch_of(holders(), SHORT).unwrap_err();
    assert!(why.contains("nothing is lent to this node"), "{why}");
    assert_eq!(scene.left(), Vec::<String>::new());
}

#[test]
fn a_lender_that_ends_in_the_middle_and_comes_back_is_read_on() {
    let Scene { dir, ca, nodes, lender, shown } = Scene::new();
    let port = lender.port;
    let scene =
        Scene { lender: Lender::start("127.0.0.1", 0, shown.subscribe()).unwrap(), dir, ca, nodes, shown };
    let (loan, over) = (scene.loan(), AtomicBool::new(false));
    std::thread::scope(|scope| {
        let two = scene.dir.path().join("two");
        let begun = move || {
            let came =
                |dir: PathBuf| fs::metadata(dir.join("model.safetensors")).is_ok_and(|file| file.len() > 0);
            fs::read_dir(&two).into_iter().flatten().flatten().any(|entry| came(entry.path()))
        };
        let (over, newest) = (&over, scene.shown.subscribe());
        scope.spawn(move || {
            while !begun() && !over.load(Ordering::Relaxed) {
                std::thread::yield_now();
            }
            drop(lender);
            let mut again = Lender::start("127.0.0.1", port, newest.clone());
            while again.is_err() && !over.load(Ordering::Relaxed) {
                again = Lender::start("127.0.0.1", port, newest.clone());
            }
            let again = again.unwrap();
            again.lend(vec![loan]);
            while !over.load(Ordering::Relaxed) {
                std::thread::yield_now();
            }
        });
        let fetched = scene.fetch_of(vec![scene.holder(1, port)], Duration::from_secs(60));
        over.store(true, Ordering::Relaxed);
        fetched.unwrap();
    });
    same(&scene.original(), &scene.copy());
}

#[test]
fn each_file_comes_from_a_node_whose_ranks_wrote_it_or_from_this_one() {
    let scene = Scene::new();
    // Here lies what a rank of this node wrote, of a checkpoint that others wrote too.
    fs::create_dir_all(scene.copy()).unwrap();
    for name in ["manifest.json", "config.json"] {
        fs::copy(scene.original().join(name), scene.copy().join(name)).unwrap();
    }
    fs::remove_file(scene.original().join("config.json")).unwrap();
    let second = Holder { files: Files::Of { first: 1, ranks: 1 }, ..scene.holder(3, scene.lender.port) };
    let why = scene.fetch_of(vec![second.clone()], SHORT).unwrap_err();
    assert!(
        why.contains("empty.txt") && why.contains("here on node box-2: ") && !why.contains("box-3"),
        "{why}"
    );
    let first = Holder { files: Files::Of { first: 0, ranks: 1 }, ..scene.holder(1, scene.lender.port) };
    scene.fetch_of(vec![second, first], SHORT).unwrap();
    verify(&scene.copy()).unwrap();
}

#[test]
fn what_lies_where_the_copy_belongs_is_kept_unless_it_is_this_run_s() {
    let scene = Scene::new();
    fs::create_dir_all(scene.copy()).unwrap();
    fs::write(scene.copy().join("mine.txt"), "m").unwrap();
    let why = scene.fetch().unwrap_err();
    assert!(!why.starts_with("refused: ") && why.contains("move it away"), "{why}");
    assert_eq!(fs::read_to_string(scene.copy().join("mine.txt")).unwrap(), "m");
    assert_eq!(scene.left(), ["step-00000005"]);
}
