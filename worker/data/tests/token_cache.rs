//! The token cache as the agent and the ranks use it: built once, found again, the same in every process, never half there.

#![allow(clippy::unwrap_used)] // helpers of tests panic as tests do

use fleet_common::events::Level;
use fleet_common::exit::Fault;
use fleet_common::job::{Job, Model, Tokenizer, parse_toml};
use fleet_data::{DataError, DataFiles, Note, Order, Rest, TokenCache};
use std::collections::HashMap;
use std::fs;
use std::path::Path;
use std::process::Command;
use std::sync::Mutex;

/// A file of sentences that a small vocabulary learns well; the same on every call.
fn corpus(path: &Path, paragraphs: u64) {
    let words = [
        "ship", "harbour", "captain", "storm", "lantern", "rope", "island", "gull", "anchor", "tide",
        "chart", "crew",
    ];
    let mut state = 1u64;
    let mut word = || {
        state = state.wrapping_mul(6364136223846793005).wrapping_add(1442695040888963407);
        words[(state >> 33) as usize % words.len()]
    };
    let text: String = (0..paragraphs)
        .map(|i| {
            format!(
                "{i}. The {} saw a {} near the {}; \"{}!\" cried the {}.\n\n",
                word(),
                word(),
                word(),
                word(),
                word()
            )
        })
        .collect();
    fs::write(path, text).unwrap();
}

fn job(dir: &Path) -> Job {
    let text = r#"
        output_dir = "out"
        vocab_size = 300
        max_seq_len = 32
        model = { hidden_size = 8, num_hidden_layers = 1, num_attention_heads = 1 }
        data = { path = "corpus.txt", include = [], validation_fraction = 0.1 }
    "#;
    parse_toml(text, dir).unwrap().0
}

fn quiet(_: Note) {}

fn build(job: &Job) -> Result<(TokenCache, fleet_common::events::DataStats), DataError> {
    TokenCache::build_or_open(job, &DataFiles::find(job, &quiet)?, &quiet)
}

fn message(job: &Job) -> String {
    build(job).unwrap_err().to_string()
}

#[test]
fn a_cache_is_built_once_and_found_again() {
    let dir = tempfile::tempdir().unwrap();
    corpus(&dir.path().join("corpus.txt"), 400);
    let job = job(dir.path());
    let (cache, stats) = build(&job).unwrap();
    assert!(!stats.cached && stats.documents >= 10 && stats.vocab_size == 300);
    assert!(stats.train_windows > 100 && stats.validation_windows > 5, "{stats:?}");
    assert!(stats.validation_bytes_per_token > 1.5, "{stats:?}");
    assert!((stats.train_tokens / 32) == stats.train_windows);

    let mut other_seed = job.clone();
    other_seed.seed = 2;
    let (again, warm) = build(&other_seed).unwrap();
    assert!(warm.cached && again.hash() == cache.hash() && again.meta() == cache.meta());
    assert_eq!(warm.train_windows, stats.train_windows);

    let opened = TokenCache::open(cache.dir()).unwrap();
    let mut tokens = vec![0; 32];
    let mut seen = 0;
    for window in Order::new(1, opened.train().len(), 8, 1, Rest::LeftOut).unwrap().batch(3) {
        opened.train().read(window, &mut tokens);
        assert!(tokens.iter().all(|&id| (0..300).contains(&id)));
        seen += 1;
    }
    assert_eq!(seen, 8);
    assert!(fs::metadata(opened.tokenizer_path()).unwrap().len() > 1000);
}

#[test]
fn what_decides_the_contents_decides_the_hash() {
    let dir = tempfile::tempdir().unwrap();
    corpus(&dir.path().join("corpus.txt"), 400);
    let base = job(dir.path());
    let first = build(&base).unwrap().0.hash().to_owned();
    let changed: [fn(&mut Job); 4] = [
        |job| job.max_seq_len = 16,
        |job| job.data.validation_fraction = 0.2,
        |job| job.data.clean.normalize_whitespace = true,
        |job| job.tokenizer = Tokenizer::Train { vocab_size: 290 },
    ];
    for change in changed {
        let mut job = base.clone();
        change(&mut job);
        assert_ne!(build(&job).unwrap().0.hash(), first);
    }
    fs::rename(dir.path().join("corpus.txt"), dir.path().join("moved.txt")).unwrap();
    let mut moved = base.clone();
    moved.data.paths = vec![dir.path().join("moved.txt")];
    assert!(build(&moved).unwrap().1.cached, "the same text under another name is the same data");
    corpus(&dir.path().join("moved.txt"), 401);
    assert!(!build(&moved).unwrap().1.cached);
}

#[test]
fn what_there_is_to_know_of_the_data_is_told_at_every_start() {
    let dir = tempfile::tempdir().unwrap();
    corpus(&dir.path().join("corpus.txt"), 400);
    fs::create_dir(dir.path().join("folder")).unwrap();
    let rows: String = (0..300).map(|i| format!("{i}\t\"A ship, number {i} of the harbour\n")).collect();
    fs::write(dir.path().join("folder/a.TSV"), format!("id\ttext\n{rows}999\t\n1000\t\u{e9}\n")).unwrap();
    fs::write(dir.path().join("folder/b.rst"), "x").unwrap();
    // A token for each of these characters, and nothing for \u{e9}.
    let known = (' '..='~').map(|c| (c.to_string(), c as u32 - 32)).collect::<HashMap<String, u32>>();
    let model = serde_json::json!({"type": "BPE", "vocab": known, "merges": []});
    let end = serde_json::json!({"id": 95, "content": "</s>", "single_word": false, "lstrip": false, "rstrip": false,
        "normalized": false, "special": true});
    let json = serde_json::json!({"version": "1.0", "added_tokens": [end], "decoder": {"type": "Fuse"}, "model": model});
    fs::write(dir.path().join("tokenizer.json"), json.to_string()).unwrap();

    let mut job = job(dir.path());
    job.data.paths = vec![dir.path().join("folder")];
    job.data.include = vec!["*.tsv".into()];
    job.data.validation_fraction = 0.0;
    job.tokenizer = Tokenizer::File(dir.path().join("tokenizer.json"));
    let told = || {
        let notes = Mutex::new(Vec::new());
        let tell = |note: Note| notes.lock().unwrap().push((note.level, note.line));
        let files = DataFiles::find(&job, &tell).unwrap();
        let (cache, stats) = TokenCache::build_or_open(&job, &files, &tell).unwrap();
        // A token is a byte here, and each of the 301 documents has an end of text besides.
        let meta = cache.meta();
        let expected = (meta.train_tokens - 301) as f64 / meta.train_tokens as f64;
        assert!((meta.validation_bytes_per_token - expected).abs() < 1e-9, "dropped bytes do not count");
        (stats.cached, notes.into_inner().unwrap())
    };
    for cached in [false, true] {
        let (was, notes) = told();
        assert_eq!(was, cached);
        let has = |level, line: &str| notes.iter().any(|(l, text)| *l == level && text.contains(line));
        assert!(has(Level::Info, "left out: 1 that data.include does not name (b.rst)"), "{notes:?}");
        assert!(has(Level::Info, "read 302 rows of 1 file, 1 without text"), "{notes:?}");
        assert!(has(Level::Warn, "2 bytes (such as `\u{e9}`): they are dropped"), "{notes:?}");
    }
}

#[test]
fn a_cache_of_an_older_format_is_built_again() {
    let dir = tempfile::tempdir().unwrap();
    corpus(&dir.path().join("corpus.txt"), 300);
    let job = job(dir.path());
    let cache = build(&job).unwrap().0;
    let meta = fs::read_to_string(cache.dir().join("meta.json")).unwrap();
    fs::write(cache.dir().join("meta.json"), meta.replace("fleet-tokens/2", "fleet-tokens/1")).unwrap();
    assert!(!build(&job).unwrap().1.cached);
    assert!(build(&job).unwrap().1.cached);
}

/// Not a test: what the next one runs in processes of its own.
#[test]
#[ignore = "run by another test, with FLEET_TEST_DIR"]
fn child_builds_a_cache() {
    if let Some(dir) = std::env::var_os("FLEET_TEST_DIR") {
        build(&job(Path::new(&dir))).unwrap();
    }
}

#[test]
fn every_process_makes_the_same_bytes() {
    let build_in_child = || {
        let dir = tempfile::tempdir().unwrap();
        corpus(&dir.path().join("corpus.txt"), 300);
        let status = Command::new(std::env::current_exe().unwrap())
            .args(["--exact", "child_builds_a_cache", "--ignored"])
            .env("FLEET_TEST_DIR", dir.path())
            .output()
            .unwrap();
        assert!(status.status.success(), "{}", String::from_utf8_lossy(&status.stdout));
        let job = job(dir.path());
        let (cache, stats) = build(&job).unwrap();
        assert!(stats.cached);
        let bytes = |name: &str| fs::read(cache.dir().join(name)).unwrap();
        (
            cache.hash().to_owned(),
            bytes("tokenizer.json"),
            bytes("train.bin"),
            bytes("validation.bin"),
            bytes("meta.json"),
        )
    };
    let first = build_in_child();
    for _ in 0..3 {
        assert!(first == build_in_child(), "two processes tokenised the same data differently");
    }
}

/// A cache's hash promises its contents: when this fails after an update of the tokenizer crate, raise `FORMAT`.
#[test]
fn the_tokens_of_a_known_text_never_change() {
    let dir = tempfile::tempdir().unwrap();
    corpus(&dir.path().join("corpus.txt"), 200);
    let (cache, _) = build(&job(dir.path())).unwrap();
    let meta = cache.meta();
    assert_eq!(
        [
            &meta.hash[..],
            &meta.tokenizer_sha256[..16],
            &meta.train_sha256[..16],
            &meta.validation_sha256[..16]
        ],
        ["d5ccf2ca3284ae541c2cf020962e13c3", "f7400dd2015911fd", "44f2e202f6635ef2", "a808128b254cbf71"]
    );
}

#[test]
fn builders_at_the_same_time_share_one_cache() {
    let dir = tempfile::tempdir().unwrap();
    corpus(&dir.path().join("corpus.txt"), 300);
    let job = job(dir.path());
    let built: Vec<bool> = std::thread::scope(|scope| {
        let threads: Vec<_> = (0..4).map(|_| scope.spawn(|| !build(&job).unwrap().1.cached)).collect();
        threads.into_iter().map(|t| t.join().unwrap()).collect()
    });
    assert_eq!(built.into_iter().filter(|&built| built).count(), 1);
}

#[test]
fn a_damaged_cache_is_built_again_and_leftovers_go() {
    let dir = tempfile::tempdir().unwrap();
    corpus(&dir.path().join("corpus.txt"), 300);
    let job = job(dir.path());
    let (cache, _) = build(&job).unwrap();
    let (path, meta) = (cache.dir().to_owned(), cache.meta().clone());
    drop(cache);
    let train = fs::read(path.join("train.bin")).unwrap();
    let leftover = path.parent().unwrap().join(".tmp-dead-1");
    for damage in ["flip", "truncate", "remove"] {
        let mut bytes = train.clone();
        match damage {
            "flip" => bytes[100] ^= 1,
            "truncate" => bytes.truncate(50),
            _ => (),
        }
        match damage {
            "remove" => fs::remove_file(path.join("train.bin")).unwrap(),
            _ => fs::write(path.join("train.bin"), bytes).unwrap(),
        }
        fs::create_dir(&leftover).unwrap();
        let (again, stats) = build(&job).unwrap();
        assert!(!stats.cached && *again.meta() == meta, "{damage}");
        assert_eq!(fs::read(path.join("train.bin")).unwrap(), train);
        assert!(!leftover.exists());
    }
}

#[test]
fn bad_data_is_refused_in_one_line_and_leaves_no_cache() {
    let dir = tempfile::tempdir().unwrap();
    let text = dir.path().join("corpus.txt");
    let good = job(dir.path());

    assert!(message(&good).contains("does not exist"));
    fs::write(&text, "").unwrap();
    assert!(message(&good).contains("hold no text"));
    fs::write(&text, b"caf\xe9").unwrap();
    assert!(message(&good).contains("corpus.txt is not UTF-8 text: bad byte at offset 3"));

    corpus(&text, 300);
    let with = |change: &dyn Fn(&mut Job)| {
        let mut job = good.clone();
        change(&mut job);
        let error = build(&job).unwrap_err();
        assert_eq!(error.fault(), Fault::Input);
        assert!(!error.to_string().contains('\n'));
        error.to_string()
    };
    let grow = |job: &mut Job, size: u32| {
        let Model::New(config) = &mut job.model else { unreachable!() };
        config.insert("vocab_size".into(), size.into());
        job.tokenizer = Tokenizer::Train { vocab_size: size };
    };
    assert!(with(&|job| grow(job, 30_000)).contains("asks for 30000"));
    let error = with(&|job| job.tokenizer = Tokenizer::Train { vocab_size: 310 });
    assert!(error.contains("310 tokens and the model's vocab_size is 300"), "{error}");
    assert!(
        with(&|job| job.max_seq_len = 1_000_000)
            .contains("a sequence is longer than the data: max_seq_len is 1000000")
    );
    assert!(with(&|job| job.data.clean.min_chars = 1_000_000).contains("cleaning left nothing"));

    let caches: Vec<_> = fs::read_dir(good.output_dir.join("cache"))
        .unwrap()
        .map(|e| e.unwrap().file_name().into_string().unwrap())
        .filter(|name| name != ".lock")
        .collect();
    assert_eq!(caches, [] as [String; 0]);
}

#[test]
fn an_output_directory_that_cannot_be_written_is_the_environments_fault() {
    let dir = tempfile::tempdir().unwrap();
    corpus(&dir.path().join("corpus.txt"), 100);
    let mut job = job(dir.path());
    fs::write(dir.path().join("file"), "").unwrap();
    job.output_dir = dir.path().join("file");
    let error = build(&job).unwrap_err();
    assert_eq!(error.fault(), Fault::Environment);
    assert!(error.to_string().contains("cannot write the token cache"), "{error}");
}

#[test]
fn nothing_is_held_out_when_the_fraction_is_zero() {
    let dir = tempfile::tempdir().unwrap();
    corpus(&dir.path().join("corpus.txt"), 100);
    let mut job = job(dir.path());
    job.data.validation_fraction = 0.0;
    let (cache, stats) = build(&job).unwrap();
    assert!(
        cache.validation().is_empty()
            && stats.validation_windows == 0
            && stats.validation_bytes_per_token > 1.0
    );
}

/// The decoder of GPT-1's tokenizer panics at nothing, and of these documents it has a token for nothing.
#[test]
fn a_tokenizer_that_drops_whole_documents_is_refused_and_does_not_panic() {
    let dir = tempfile::tempdir().unwrap();
    let tokenizer = serde_json::json!({"version": "1.0", "added_tokens": [], "decoder": {"type": "BPEDecoder", "suffix": "</w>"},
        "model": {"type": "BPE", "vocab": {"a": 0, "b": 1, "</s>": 2}, "merges": []}});
    fs::write(dir.path().join("tokenizer.json"), tokenizer.to_string()).unwrap();
    fs::write(dir.path().join("corpus.txt"), "\u{e9}\u{e8}").unwrap();
    let mut job = job(dir.path());
    job.tokenizer = Tokenizer::File(dir.path().join("tokenizer.json"));
    let line = message(&job);
    assert!(line.contains("the tokenizer drops 100 % of the data"), "{line}");
}

#[test]
fn a_cache_of_a_tokenizer_with_special_tokens_is_not_one_where_they_were_text() {
    let dir = tempfile::tempdir().unwrap();
    corpus(&dir.path().join("corpus.txt"), 400);
    let mut job = job(dir.path());
    let (cache, _) = build(&job).unwrap();
    let trained = dir.path().join("tokenizer.json");
    fs::copy(cache.tokenizer_path(), &trained).unwrap();
    let text = fs::read_to_string(dir.path().join("corpus.txt")).unwrap();
    let marked = text.replace("\n\n", "<|endoftext|>\n\n");
    fs::write(dir.path().join("corpus.txt"), marked).unwrap();
    let ends = |job: &Job| {
        let (cache, _) = build(job).unwrap();
        let mut ids = vec![0; 32];
        (0..cache.train().len())
            .map(|at| {
                cache.train().read(at, &mut ids);
                ids.iter().filter(|id| **id == 0).count()
            })
            .sum::<usize>()
    };
    job.tokenizer = Tokenizer::File(trained);
    assert!(ends(&job) > 250, "each is the token that ends a text: {}", ends(&job));
    job.tokenizer = Tokenizer::Train { vocab_size: 300 };
    assert!(ends(&job) < 250, "of a tokenizer that is trained here they are text: {}", ends(&job));
}

/// What panics within a tokenizer, or here within what hears of the progress.
#[test]
fn a_panic_while_data_are_prepared_is_an_error_of_one_line() {
    let dir = tempfile::tempdir().unwrap();
    corpus(&dir.path().join("corpus.txt"), 50);
    let job = job(dir.path());
    let files = DataFiles::find(&job, &quiet).unwrap();
    let line = TokenCache::build_or_open(&job, &files, &|_| panic!("at\n0")).unwrap_err().to_string();
    assert!(line.contains("fails at these texts") && line.contains("(at 0)"), "{line}");
    build(&job).unwrap(); // and the lock is free
}
