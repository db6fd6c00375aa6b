//! The page's files, streams and pictures, over HTTP.

#![allow(clippy::unwrap_used)] // in a test an unwrap is an assertion

mod common;

use common::{Agent, Client, start, started, step, succeeded};
use fleet_common::events::{EventBody, Level};
use fleet_common::protocol::{Point, Reply, Request};
use fleet_coordinator::server::Coordinator;
use std::time::Duration;
use tempfile::tempdir;
use tokio::io::{AsyncReadExt, AsyncWriteExt};
use tokio::net::TcpStream;
use tokio::time::timeout;

const DEADLINE: Duration = Duration::from_secs(20);

async fn ask(coordinator: &Coordinator, path: &str, more: &str) -> TcpStream {
    let mut stream = TcpStream::connect(&coordinator.endpoint().http).await.unwrap();
    let request = format!("GET {path} HTTP/1.1\r\nHost: localhost\r\n{more}\r\n");
    stream.write_all(request.as_bytes()).await.unwrap();
    stream
}

async fn get(coordinator: &Coordinator, path: &str) -> String {
    let mut answer = String::new();
    ask(coordinator, path, "Connection: close\r\n").await.read_to_string(&mut answer).await.unwrap();
    answer
}

/// What comes until `wanted` is in it.
async fn until(stream: &mut TcpStream, wanted: &str) -> String {
    let mut text = String::new();
    let read = timeout(DEADLINE, async {
        let mut bytes = [0; 4096];
        while !text.contains(wanted) {
            match stream.read(&mut bytes).await.unwrap() {
                0 => panic!("it ended without `{wanted}`: {text}"),
                read => text.push_str(&String::from_utf8_lossy(&bytes[..read])),
            }
        }
    });
    assert!(read.await.is_ok(), "no `{wanted}` in time: {text}");
    text
}

#[tokio::test(flavor = "multi_thread")]
async fn every_answer_binds_the_browser_to_this_coordinator() {
    let dir = tempdir().unwrap();
    let coordinator = start(dir.path()).await;
    for (path, kind) in
        [("/", "text/html"), ("/main.js", "text/javascript"), ("/api/v1/jobs", "application/json")]
    {
        let answer = get(&coordinator, path).await.to_lowercase();
        assert!(answer.starts_with("http/1.1 200"), "{path}: {answer}");
        for header in [
            &format!("content-type: {kind}")[..],
            "content-security-policy: default-src 'none'; script-src 'self';",
            "x-content-type-options: nosniff",
            "referrer-policy: no-referrer",
        ] {
            assert!(answer.contains(header), "{path} without {header}: {answer}");
        }
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn a_job_s_stream_goes_on_where_it_was_cut_off() {
    let dir = tempdir().unwrap();
    let coordinator = start(dir.path()).await;
    let mut client = Client::local(dir.path(), &coordinator).await;
    let mut agent = Agent::join(dir.path(), &coordinator, 1).await;
    let job = client.submit(1).await;
    agent.gang().await;
    let path = format!("/api/v1/jobs/{job}/stream");
    let mut stream = ask(&coordinator, &path, "").await;
    until(&mut stream, "event: job\ndata: {\"job\":{").await;
    let line = "</script><img src=x onerror=alert(1)>\ndata: forged";
    let log = EventBody::Log { rank: Some(0), level: Level::Info, line: line.into() };
    agent.events((job, 1), 1, vec![started(), step(1), log]).await;
    let seen = until(&mut stream, "\nid: 3\n").await;
    assert!(!seen.contains("\ndata: forged"), "{seen}");
    until(&mut stream, "\"state\":\"running\"").await;
    drop(stream);
    agent.events((job, 1), 4, vec![step(2), succeeded()]).await;
    let mut stream = ask(&coordinator, &path, "Last-Event-ID: 3\r\n").await;
    let rest = until(&mut stream, "event: end\n").await;
    assert!(
        rest.contains("\"index\":4") && rest.contains("\"index\":5") && !rest.contains("\"index\":3"),
        "{rest}"
    );
    assert!(rest.contains("\"state\":\"succeeded\""), "{rest}");
    let some = get(&coordinator, &format!("/api/v1/jobs/{job}/events?from=2")).await;
    assert!(
        some.contains("\"next\":6") && some.contains("\"index\":2") && !some.contains("\"index\":1,"),
        "{some}"
    );
    let mut none = ask(&coordinator, "/api/v1/jobs/99/stream", "").await;
    until(&mut none, "event: refused\ndata: \"there is no job-99").await;
}

#[tokio::test(flavor = "multi_thread")]
async fn pages_see_the_queue_move_and_are_bounded() {
    let dir = tempdir().unwrap();
    let coordinator = start(dir.path()).await;
    let mut client = Client::local(dir.path(), &coordinator).await;
    let mut open = Vec::new();
    for _ in 0..32 {
        let mut stream = ask(&coordinator, "/api/v1/stream", "").await;
        until(&mut stream, "\"jobs_queued\":0").await;
        open.push(stream);
    }
    let refused = get(&coordinator, "/api/v1/stream").await;
    assert!(refused.starts_with("HTTP/1.1 503") && refused.contains("32 pages are open"), "{refused}");
    client.submit(1).await;
    for stream in &mut open {
        until(stream, "\"jobs_queued\":1").await;
    }
    // Those that leave make room.
    drop(open);
    let begun = std::time::Instant::now();
    while !get(&coordinator, "/api/v1/jobs/99/stream").await.starts_with("HTTP/1.1 200") {
        assert!(begun.elapsed() < DEADLINE);
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn a_picture_grows_with_its_run_and_a_name_in_it_is_text() {
    let dir = tempdir().unwrap();
    let coordinator = start(dir.path()).await;
    let mut client = Client::local(dir.path(), &coordinator).await;
    let Reply::RunStarted(run) = client.ask(Request::StartRun { name: "<script>x</script>".into() }).await
    else {
        panic!()
    };
    let other = client.ask(Request::StartRun { name: "other".into() }).await;
    let point = |step| Point { series: "loss".into(), step, value: 5.0 / step as f64, unix_ms: 1 };
    let path = format!("/api/v1/runs/plot.svg?run={run}&run=run-2");
    assert_eq!(other, Reply::RunStarted(fleet_common::ids::RunId(2)));
    for run in [run, fleet_common::ids::RunId(2)] {
        let points = (1..=10).map(point).collect();
        assert_eq!(client.ask(Request::RecordMetrics { run, points }).await, Reply::Done);
    }
    let picture = get(&coordinator, &path).await;
    assert!(picture.contains("image/svg+xml") && picture.contains("to 0.5000 at 10,"), "{picture}");
    assert!(!picture.contains("<script") && picture.contains("&lt;script&gt;x"), "{picture}");
    let points = (11..=20).map(point).collect();
    assert_eq!(client.ask(Request::RecordMetrics { run, points }).await, Reply::Done);
    assert!(get(&coordinator, &path).await.contains("to 0.2500 at 20,"));
    let series = get(&coordinator, &format!("/api/v1/runs/{run}/series")).await;
    assert!(series.ends_with("[{\"name\":\"loss\",\"step\":20.0,\"value\":0.25}]"), "{series}");
    assert!(get(&coordinator, "/api/v1/runs/plot.svg?run=run-99").await.starts_with("HTTP/1.1 404"));
}
