//! What data may be stored as, and how several sources of it go together: Parquet (`golden/parquet`, made by `tests/parity/tables.py`), zstd,
//! weights, near duplicates, rows that are wrong.

#![allow(clippy::unwrap_used)] // helpers of tests panic as tests do

use fleet_common::job::{Job, parse_toml};
use fleet_data::{DataError, DataFiles, Item, Note, TokenCache, Windows};
use serde_json::Value;
use std::cell::RefCell;
use std::fs;
use std::path::{Path, PathBuf};

fn here() -> PathBuf {
    Path::new(env!("CARGO_MANIFEST_DIR")).to_owned()
}

fn golden(name: &str) -> PathBuf {
    here().join("tests/golden/parquet").join(name)
}

fn expected() -> Value {
    serde_json::from_slice(&fs::read(golden("expected.json")).unwrap()).unwrap()
}

/// A job whose data are named by these lines, with a tokenizer that is there.
fn job(dir: &Path, top: &str, lines: &str) -> Job {
    let model = here().join("../../tests/parity/golden/foreign/byte_level");
    let toml = format!(
        "{top}\noutput_dir = \"out\"\nmax_seq_len = 64\nmodel = {{ path = {model:?} }}\n[data]\n{lines}"
    );
    parse_toml(&toml, dir).unwrap_or_else(|e| panic!("{e}\n{toml}")).0
}

fn build(job: &Job) -> Result<(TokenCache, String), DataError> {
    let notes = RefCell::new(Vec::new());
    let tell = |note: Note| notes.borrow_mut().push(note.line);
    let (cache, _) = TokenCache::build_or_open(job, &DataFiles::find(job, &|_| {})?, &tell)?;
    Ok((cache, notes.into_inner().join("\n")))
}

fn refused(job: &Job) -> String {
    let error = build(job).unwrap_err().to_string();
    assert!(!error.contains('\n'), "{error}");
    error
}

fn items(windows: &Windows) -> Vec<Item> {
    let item = |index| {
        let mut item = Item::default();
        windows.append(index, &mut item);
        item
    };
    (0..windows.len()).map(item).collect()
}

/// The files of tokens of a cache.
fn tokens(cache: &TokenCache) -> [Vec<u8>; 2] {
    ["train.bin", "validation.bin"].map(|name| fs::read(cache.dir().join(name)).unwrap())
}

fn lines(texts: &[Value]) -> String {
    texts.iter().map(|text| format!("{}\n", serde_json::json!({"text": text}))).collect()
}

#[test]
fn text_in_parquet_is_the_text_that_was_written() {
    let texts = expected()["texts"].as_array().unwrap().clone();
    let dir = tempfile::tempdir().unwrap();
    fs::write(dir.path().join("a.jsonl"), lines(&texts)).unwrap();
    let of = |path: &Path| {
        let job = job(dir.path(), "", &format!("path = {path:?}\nvalidation_fraction = 0.2"));
        let (cache, told) = build(&job).unwrap();
        assert!(told.contains("read 60 rows of 1 file"), "{told}");
        tokens(&cache)
    };
    let wanted = of(&dir.path().join("a.jsonl"));
    for name in ["snappy", "zstd", "gzip", "plain"] {
        assert_eq!(of(&golden(&format!("{name}.parquet"))), wanted, "{name}");
    }
    fs::copy(golden("snappy.parquet"), dir.path().join("b.txt")).unwrap();
    assert_eq!(of(&dir.path().join("b.txt")), wanted, "whatever it is called");
}

#[test]
fn rows_in_parquet_are_those_of_json() {
    let dir = tempfile::tempdir().unwrap();
    let rows = expected()["rows"].clone();
    fs::write(dir.path().join("a.json"), rows.to_string()).unwrap();
    let of = |path: &Path, top: &str| {
        let lines = format!("path = {path:?}\nchat_template = \"chatml\"\nvalidation_fraction = 0");
        items(build(&job(dir.path(), top, &lines)).unwrap().0.train())
    };
    for top in ["task_name = \"sft\"", "task_name = \"dpo\"\nadapter = { type = \"lora\" }"] {
        let wanted = of(&dir.path().join("a.json"), top);
        assert_eq!(wanted.len(), 24);
        assert!(of(&golden("rows.parquet"), top) == wanted, "{top}");
    }
}

#[test]
fn what_is_wrong_with_a_parquet_file_is_said() {
    let dir = tempfile::tempdir().unwrap();
    let with = |path: &Path, more: &str| job(dir.path(), "", &format!("path = {path:?}\n{more}"));
    let null = golden("null.parquet");
    let said = refused(&with(&null, ""));
    assert!(said.contains("null.parquet, row 2: no text in the field `text`"), "{said}");
    let said = refused(&with(&null, "text_field = \"data\""));
    assert!(said.contains("the column `data` holds bytes and no text"), "{said}");
    let said = refused(&with(&null, "text_field = \"body\""));
    assert!(said.contains("no field `body`; set data.text_field to one of: text, data"), "{said}");
    let whole = fs::read(golden("zstd.parquet")).unwrap();
    let cut = dir.path().join("cut.parquet");
    for at in [whole.len() / 2, whole.len() - 20, 5] {
        fs::write(&cut, &whole[..at]).unwrap();
        let said = refused(&with(&cut, ""));
        assert!(said.contains("its Parquet data cannot be read"), "{said}");
    }
    for at in (4..whole.len()).step_by(7) {
        let mut damaged = whole.clone();
        damaged[at] ^= 0x55;
        fs::write(&cut, damaged).unwrap();
        let _ = build(&with(&cut, "")); // some damage is in what is not read; none of it panics
    }
}

#[test]
fn text_in_zstd_is_the_text_that_was_written() {
    let texts = expected()["texts"].as_array().unwrap().clone();
    let dir = tempfile::tempdir().unwrap();
    let folder = dir.path().join("folder");
    fs::create_dir(&folder).unwrap();
    fs::write(folder.join("a.jsonl.zst"), zstd::encode_all(lines(&texts).as_bytes(), 3).unwrap()).unwrap();
    fs::write(dir.path().join("a.jsonl"), lines(&texts)).unwrap();
    let of = |name: &str| tokens(&build(&job(dir.path(), "", &format!("path = {name:?}"))).unwrap().0);
    assert_eq!(of("folder"), of("a.jsonl"));
}

#[test]
fn a_source_is_seen_as_often_as_it_weighs() {
    let dir = tempfile::tempdir().unwrap();
    let texts = |word: &str| -> String {
        (0..200)
            .map(|i| format!("{}\n", serde_json::json!({"text": format!("{word} {i} and more")})))
            .collect()
    };
    fs::write(dir.path().join("a.jsonl"), texts("first")).unwrap();
    fs::write(dir.path().join("b.jsonl"), texts("second")).unwrap();
    let len = |weights: &str| {
        let lines = format!("path = [\"a.jsonl\", \"b.jsonl\"]\n{weights}\nvalidation_fraction = 0.1");
        let cache = build(&job(dir.path(), "", &lines)).unwrap().0;
        let [train, validation] = tokens(&cache);
        (train.len() as f64, validation)
    };
    let ((one, held_out), (alike, _)) = (len(""), len("weights = [1, 1.0]"));
    assert_eq!(one, alike);
    let (more, same) = len("weights = [3, 0.5]");
    assert_eq!(same, held_out, "what is held out does not hang on weights");
    assert!((more / one - 1.75).abs() < 0.1, "{more} of {one}");
    assert_eq!(len("weights = [3, 0.5]").0, more);

    let rows = |word: &str| -> String {
        (0..50)
            .map(|i| {
                format!("{}\n", serde_json::json!({"prompt": format!("{word} {i}?"), "completion": " yes"}))
            })
            .collect()
    };
    fs::write(dir.path().join("c.jsonl"), rows("first")).unwrap();
    fs::write(dir.path().join("d.jsonl"), rows("second")).unwrap();
    let count = |more: &str| {
        let lines = format!("path = [\"c.jsonl\", \"d.jsonl\"]\n{more}\nvalidation_fraction = 0");
        build(&job(dir.path(), "task_name = \"sft\"", &lines)).unwrap().0.train().len()
    };
    assert_eq!((count(""), count("weights = [2, 1]")), (100, 150));
    assert!(count("weights = [2, 1]\npacking = true") < 50);
}

#[test]
fn near_duplicates_are_left_out_and_counted() {
    let dir = tempfile::tempdir().unwrap();
    let text = |i: u32| -> String {
        (0..100).map(|j| format!("word{} ", (i * 7919 + j * j * 31 + j * i) % 3001)).collect()
    };
    let texts: Vec<String> = (0..60).map(text).collect();
    let near = texts[3].replacen("word", "changed ", 1);
    let all = [&texts[..], &[near, texts[5].to_uppercase(), texts[7].clone()]].concat();
    let rows = |texts: &[String]| {
        texts.iter().map(|text| format!("{}\n", serde_json::json!({"text": text}))).collect::<String>()
    };
    fs::write(dir.path().join("a.jsonl"), rows(&texts)).unwrap();
    fs::write(dir.path().join("b.jsonl"), rows(&all)).unwrap();
    let of = |name: &str, top: &str, more: &str| {
        build(&job(dir.path(), top, &format!("path = {name:?}\nvalidation_fraction = 0\n{more}"))).unwrap()
    };
    let (cache, told) = of("b.jsonl", "", "clean = { near_duplicates = 0.8 }");
    assert!(told.contains("read 63 rows of 1 file, 3 left out as near duplicates"), "{told}");
    assert_eq!(tokens(&cache), tokens(&of("a.jsonl", "", "").0));
    assert_eq!(cache.meta().train_documents, 60);
    let (_, told) = of("b.jsonl", "", "clean = { near_duplicates = 1 }");
    assert!(told.contains("2 left out as near duplicates"), "{told}");
    let sft = "task_name = \"sft\"\nmax_seq_len = 512";
    let sft = sft.replace("\nmax_seq_len = 512", "");
    let (cache, told) = of("b.jsonl", &sft, "format = \"text\"\nclean = { near_duplicates = 0.8 }");
    assert!(told.contains("3 rows left out as near duplicates"), "{told}");
    assert_eq!(cache.train().len(), 60);
}

#[test]
fn rows_that_are_wrong_stop_the_job_or_are_left_out() {
    let dir = tempfile::tempdir().unwrap();
    let good: String = (0..40).map(|i| format!("{i},row number {i} of the table\n")).collect();
    fs::write(dir.path().join("good.csv"), format!("id,text\n{good}")).unwrap();
    fs::write(dir.path().join("bad.csv"), format!("id,text\n1,a,b\n{good}2\n\"3\"x,c\n")).unwrap();
    let of = |name: &str, more: &str| job(dir.path(), "", &format!("path = {name:?}\n{more}"));
    let said = refused(&of("bad.csv", ""));
    assert!(said.contains("bad.csv, line 2: 3 fields where the first row has 2"), "{said}");
    let (cache, told) = build(&of("bad.csv", "bad_rows = \"skip\"")).unwrap();
    assert!(
        told.contains("left out: 3 rows that cannot be read (the first: ")
            && told.contains("line 2: 3 fields"),
        "{told}"
    );
    assert_eq!(tokens(&cache), tokens(&build(&of("good.csv", "")).unwrap().0));
    let rows: String = (0..40).map(|i| format!("{{\"text\":\"row {i} of some\"}}\n")).collect();
    fs::write(
        dir.path().join("bad.jsonl"),
        [rows.as_bytes(), b"{\"text\":3}\n{\"text\":\"caf\xe9\"}\n"].concat(),
    )
    .unwrap();
    assert!(refused(&of("bad.jsonl", "")).contains("is not UTF-8 text"));
    let (_, told) = build(&of("bad.jsonl", "bad_rows = \"skip\"")).unwrap();
    assert!(
        told.contains("line 41: invalid type: integer `3`")
            && told.contains("1 row with bytes that are not UTF-8"),
        "{told}"
    );
}
