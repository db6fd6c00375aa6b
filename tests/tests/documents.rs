//! Jobs in the documents run as they stand there: those behind `<!-- job: KIND -->`, on data of that kind.

#![allow(clippy::unwrap_used)] // in a test an unwrap is an assertion

use fleet_tests::World;
use serde_json::json;
use std::fs;
use std::path::Path;

const DOCUMENTS: [&str; 1] = ["docs/moving.md"];

/// Kind and text of each.
fn jobs(document: &str) -> Vec<(String, String)> {
    let root = Path::new(env!("CARGO_MANIFEST_DIR")).parent().unwrap();
    let text = fs::read_to_string(root.join(document)).unwrap();
    let of = |part: &str| {
        let (kind, rest) = part.split_once(" -->").unwrap();
        let (_, job) = rest.split_once("```toml\n").unwrap();
        (kind.to_owned(), job.split_once("```").unwrap().0.to_owned())
    };
    text.split("<!-- job: ").skip(1).map(of).collect()
}

fn rows(kind: &str) -> String {
    let row = |n: usize| {
        let (asked, answer) = (format!("say {n}"), format!("it is {n}"));
        match kind {
            "messages" => {
                json!({"messages": [{"role": "user", "content": asked}, {"role": "assistant", "content": answer}]})
            }
            "rows" => json!({"instruction": asked, "input": "", "output": answer}),
            "pairs" => json!({"prompt": asked, "chosen": answer, "rejected": "no"}),
            kind => panic!("{kind} is no kind of rows"),
        }
    };
    (0..60).map(|n| format!("{}\n", row(n))).collect()
}

#[test]
fn the_jobs_of_the_documents_run() {
    let world = World::new();
    let base = Path::new(env!("CARGO_MANIFEST_DIR")).join("parity/golden/foreign/byte_level");
    let base = format!("model.path={}", base.canonicalize().unwrap().display());
    let mut ran = 0;
    for (document, (kind, job)) in
        DOCUMENTS.into_iter().flat_map(|d| jobs(d).into_iter().map(move |job| (d, job)))
    {
        ran += 1;
        world.write("data.jsonl", rows(&kind));
        let file = world.write(&format!("job-{ran}.toml"), job).display().to_string();
        let sets = [base.as_str(), "data.path=data.jsonl", "max_steps=2", "max_seq_len=96", "device=cpu"];
        let sets: Vec<&str> = sets.into_iter().flat_map(|set| ["--set", set]).collect();
        let done =
            world.start("fleet", &[&["launch", "-n", "1", "--json", &file], &sets[..]].concat()).finish();
        assert_eq!(done.status.code(), Some(0), "{document}, job {ran}: {}", done.all());
        assert_eq!(done.losses().last().unwrap().0, 2, "{document}, job {ran}");
    }
    assert_eq!(ran, 4);
}
