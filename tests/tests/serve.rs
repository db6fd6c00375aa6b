//! `fleet serve` and `fleet generate`: the same model asked over HTTP, by several clients, well and badly, and from the command line.

#![allow(clippy::unwrap_used)] // in a test an unwrap is an assertion

use fleet_tests::http::{Answer, get, post, send};
use fleet_tests::{PATIENCE, Running, World};
use nix::sys::signal::Signal;
use serde_json::{Value, json};
use std::fs;
use std::io::{Read, Write};
use std::net::TcpStream;
use std::path::Path;
use std::sync::mpsc::channel;

const CHAT: &str = "/v1/chat/completions";
const TEXT: &str = "/v1/completions";

/// A world with `model`, a copy of a golden directory (tests/parity/foreign.py made it).
fn world() -> World {
    let world = World::new();
    let golden = Path::new(env!("CARGO_MANIFEST_DIR")).join("parity/golden/foreign/byte_level");
    fs::create_dir(world.path("model")).unwrap();
    for entry in fs::read_dir(golden).unwrap() {
        let path = entry.unwrap().path();
        fs::copy(&path, world.path("model").join(path.file_name().unwrap())).unwrap();
    }
    world
}

/// The same, whose texts end only where they are told to.
fn endless() -> World {
    let world = world();
    let change = |file: &str, change: fn(&mut Value)| {
        let path = world.path("model").join(file);
        let mut json: Value = serde_json::from_slice(&fs::read(&path).unwrap()).unwrap();
        change(&mut json);
        fs::write(path, json.to_string()).unwrap();
    };
    change("config.json", |config| {
        config["eos_token_id"] = Value::Null;
        config["max_position_embeddings"] = json!(1 << 20);
    });
    change("tokenizer_config.json", |config| config["eos_token"] = Value::Null);
    fs::remove_file(world.path("model/generation_config.json")).unwrap();
    world
}

/// An adapter of `model` that changes what it says, as PEFT writes it.
fn adapter(world: &World, name: &str, strength: f32) {
    let dir = world.path(name);
    fs::create_dir(&dir).unwrap();
    let config = json!({"peft_type": "LORA", "r": 1, "lora_alpha": 1, "target_modules": ["down_proj"], "base_model_name_or_path": "model"});
    fs::write(dir.join("adapter_config.json"), config.to_string()).unwrap();
    let module = "base_model.model.model.layers.1.mlp.down_proj";
    let header = json!({
        format!("{module}.lora_A.weight"): {"dtype": "F32", "shape": [1, 24], "data_offsets": [0, 96]},
        format!("{module}.lora_B.weight"): {"dtype": "F32", "shape": [16, 1], "data_offsets": [96, 160]},
    })
    .to_string();
    let mut bytes = (header.len() as u64).to_le_bytes().to_vec();
    bytes.extend(header.bytes());
    for at in 0..40 {
        let number = if at % 3 == 0 { strength } else { -strength };
        bytes.extend(number.to_le_bytes());
    }
    fs::write(dir.join("adapter_model.safetensors"), bytes).unwrap();
}

struct Served {
    process: Running,
    at: String,
}

fn serve(world: &World, more: &[&str]) -> Served {
    let args = ["serve", "--model", "model", "--port", "0"];
    let mut process = world.start("fleet", &[&args, more].concat());
    let line = process.line().unwrap_or_else(|| panic!("it does not serve: {}", process.complaints()));
    let at = line.split("http://").nth(1).unwrap().trim_end_matches("/v1").to_owned();
    Served { process, at }
}

/// What the command line writes.
fn generated(world: &World, more: &[&str]) -> Value {
    let args = ["generate", "--model", "model", "--temperature", "0", "--max-new-tokens", "24", "--json"];
    world.run("fleet", &[&args, more].concat()).expect(0).json().remove(0)
}

fn text_of(answer: &Answer) -> String {
    assert_eq!(answer.status, 200, "{answer:?}");
    answer.json()["choices"][0]["text"].as_str().unwrap().to_owned()
}

/// A stream that has begun: its first piece was read.
fn begun(at: &str) -> TcpStream {
    let body = json!({"prompt": "The river", "max_tokens": 1_000_000, "stream": true});
    let mut stream = send(at, TEXT, &body.to_string()).unwrap();
    stream.set_read_timeout(Some(PATIENCE)).unwrap();
    let mut text = String::new();
    let mut bytes = [0; 256];
    while !text.contains("data: ") {
        let read = stream.read(&mut bytes).unwrap();
        assert!(read > 0, "it ended: {text}");
        text += &String::from_utf8_lossy(&bytes[..read]);
    }
    stream
}

#[test]
fn texts_that_are_written_together_are_those_of_each_alone_in_the_order_of_the_prompts() {
    let world = world();
    let prompts = ["The river", "A", "Once upon a time there was", "The", "It is", "x y z"];
    let asked: Vec<String> = prompts.iter().map(|prompt| json!({"prompt": prompt}).to_string()).collect();
    fs::write(world.path("asked.jsonl"), asked.join("\n")).unwrap();
    for sampling in ["0", "0.9"] {
        let written = |more: &[&str]| {
            let args = ["generate", "--model", "model", "--temperature", sampling, "--max-new-tokens", "24"];
            world.run("fleet", &[&args, more].concat()).expect(0)
        };
        let together = written(&["--prompts", "asked.jsonl", "--batch", "4", "--json"]).json();
        let after_another = written(&["--prompts", "asked.jsonl", "--batch", "1"]);
        for (text, prompt) in together.iter().zip(prompts) {
            let alone = &written(&["--prompt", prompt, "--json"]).json()[0];
            for key in ["prompt", "text", "new_tokens", "prompt_tokens", "end"] {
                assert_eq!(text[key], alone[key], "{prompt}: {key}");
            }
        }
        let texts: Vec<String> = together
            .iter()
            .map(|text| {
                format!("==> {} <==\n{}\n", text["prompt"].as_str().unwrap(), text["text"].as_str().unwrap())
            })
            .collect();
        assert_eq!(after_another.stdout.join("\n") + "\n", texts.concat());
        assert_eq!(written(&["--prompts", "asked.jsonl"]).stdout, after_another.stdout);
    }
}

#[test]
fn a_client_gets_what_the_command_line_writes_at_once_and_piece_by_piece() {
    let world = world();
    let served = serve(&world, &["--name", "mine"]);
    let at = served.at.as_str();
    assert!(get(at, "/health").unwrap().starts_with("HTTP/1.1 200"));
    assert!(get(at, "/v1/models").unwrap().contains("\"id\":\"mine\""));
    assert!(get(at, "/v1/models/mine").unwrap().starts_with("HTTP/1.1 200"));

    let wanted = generated(&world, &["--prompt", "The river"]);
    let ask = json!({"model": "mine", "prompt": "The river", "max_tokens": 24, "temperature": 0});
    let whole = post(at, TEXT, &ask).unwrap();
    assert_eq!(text_of(&whole), wanted["text"].as_str().unwrap());
    let answer = whole.json();
    assert_eq!(answer["choices"][0]["finish_reason"], "stop");
    assert_eq!(answer["usage"]["prompt_tokens"], wanted["prompt_tokens"]);
    assert_eq!(answer["usage"]["completion_tokens"], wanted["new_tokens"]);

    let mut streamed = ask.clone();
    streamed["stream"] = json!(true);
    streamed["stream_options"] = json!({"include_usage": true});
    let streamed = post(at, TEXT, &streamed).unwrap();
    assert!(streamed.head.contains("text/event-stream"), "{streamed:?}");
    let mut events = streamed.events();
    assert_eq!(events.pop().unwrap(), "[DONE]");
    let events: Vec<Value> = events.iter().map(|event| serde_json::from_str(event).unwrap()).collect();
    let pieces: String = events.iter().filter_map(|event| event["choices"][0]["text"].as_str()).collect();
    assert_eq!(pieces, wanted["text"].as_str().unwrap());
    assert_eq!(events.last().unwrap()["usage"], answer["usage"]);
    assert_eq!(events[events.len() - 2]["choices"][0]["finish_reason"], "stop");

    let wanted = generated(&world, &["--prompt", "The river", "--chat"]);
    let ask = json!({"messages": [{"role": "user", "content": "The river"}], "max_tokens": 24, "temperature": 0, "stream": true});
    let events = post(at, CHAT, &ask).unwrap().events();
    let deltas = events.iter().filter_map(|event| serde_json::from_str::<Value>(event).ok());
    let deltas: Vec<Value> = deltas.map(|event| event["choices"][0]["delta"].clone()).collect();
    assert_eq!(deltas[0]["role"], "assistant");
    let said: String = deltas.iter().filter_map(|delta| delta["content"].as_str()).collect();
    assert_eq!(said, wanted["text"].as_str().unwrap());

    let hot = |seed: u64| {
        let ask = json!({"prompt": "The river", "max_tokens": 12, "temperature": 1.5, "seed": seed, "top_k": 40, "top_p": 0.9});
        text_of(&post(at, TEXT, &ask).unwrap())
    };
    assert_eq!(hot(1), hot(1));
    assert_ne!(hot(1), hot(2));
}

#[test]
fn what_is_wrong_with_a_request_is_told_as_openai_tells_it_and_ends_nothing() {
    let world = world();
    let served = serve(&world, &[]);
    let at = served.at.as_str();
    let user = json!([{"role": "user", "content": "hi"}]);
    for (path, body, status, what) in [
        (CHAT, json!("text"), 400, "no JSON object"),
        (CHAT, json!({}), 400, "`messages` is missing"),
        (CHAT, json!({"messages": user, "temperature": "hot"}), 400, "`temperature`"),
        (CHAT, json!({"messages": user, "n": 2}), 400, "`n`"),
        (CHAT, json!({"messages": user, "model": "other"}), 404, "there is model"),
        (CHAT, json!({"messages": [{"role": "user"}, 3]}), 400, "messages[1]"),
        (TEXT, json!({"prompt": "the ".repeat(99)}), 400, "the model takes 96"),
        (TEXT, json!({"prompt": "the ".repeat(99_000)}), 400, "bytes, and the model takes 96 tokens"),
        (TEXT, json!({"prompt": [1, 2]}), 400, "`prompt`"),
        ("/v1/embeddings", json!({}), 404, "there is /health"),
        ("/health", json!({}), 405, "only GET"),
    ] {
        let answer = post(at, path, &body).unwrap();
        let error = &answer.json()["error"];
        assert_eq!(answer.status, status, "{path} {body}: {answer:?}");
        assert!(error["message"].as_str().unwrap().contains(what), "{path} {body}: {error}");
        assert!(error["type"].is_string() && error.get("param").is_some() && error.get("code").is_some());
    }
    let raw = |request: &str| {
        let mut stream = TcpStream::connect(at).unwrap();
        stream.write_all(request.as_bytes()).unwrap();
        Answer::read(stream).unwrap()
    };
    let head = |host: &str, kind: &str, body: &str| {
        format!(
            "POST {CHAT} HTTP/1.1\r\nHost: {host}\r\nContent-Type: {kind}\r\nConnection: close\r\nContent-Length: {}\r\n\r\n{body}",
            body.len()
        )
    };
    let json = "application/json; charset=utf-8";
    assert_eq!(raw(&head("evil.example", json, "{}")).status, 421, "by a name of another site");
    assert_eq!(raw(&head(at, "text/plain", "{}")).status, 415, "what a page of another site may send");
    assert_eq!(raw(&head(at, json, "{\"messages\": ")).status, 400);
    assert_eq!(raw(&head(at, json, &"[".repeat(60_000))).status, 400);
    assert_eq!(raw(&head(at, json, &" ".repeat(5 << 20))).status, 413);
    assert_eq!(raw("GET /health HTTP/1.1\r\nConnection: close\r\n\r\n").status, 400, "without a Host");
    assert_eq!(raw("nonsense\r\n\r\n").status, 400);
    let long = format!("GET /health HTTP/1.1\r\nHost: {at}\r\nX: {}\r\n\r\n", "x".repeat(1 << 20));
    let mut stream = TcpStream::connect(at).unwrap();
    // The server may close before it has read all of it.
    let _ = stream.write_all(long.as_bytes());
    assert!(Answer::read(stream).map_or(431, |answer| answer.status) == 431);
    let answer = post(at, CHAT, &json!({"messages": user, "max_tokens": 2})).unwrap();
    assert_eq!(answer.status, 200, "{answer:?}\n{}", served.process.complaints());
}

#[test]
fn clients_wait_for_each_other_and_one_that_goes_makes_way() {
    let world = endless();
    let served = serve(&world, &[]);
    let at = served.at.as_str();
    let short = json!({"prompt": "The river", "max_tokens": 3, "temperature": 0});
    let alone = text_of(&post(at, TEXT, &short).unwrap());
    let first = begun(at);
    let (tell, answers) = channel();
    for _ in 0..24 {
        let (tell, stream) = (tell.clone(), send(at, TEXT, &short.to_string()).unwrap());
        std::thread::spawn(move || tell.send(Answer::read(stream).unwrap()));
    }
    let next = || answers.recv_timeout(PATIENCE).unwrap();
    // Sixteen wait for the first one's text to end; to the others it is told at once that there is no room.
    for _ in 0..8 {
        let full = next();
        assert_eq!((full.status, &full.json()["error"]["type"]), (503, &json!("overloaded_error")));
        assert!(full.head.to_lowercase().contains("retry-after"), "{full:?}");
    }
    drop(first);
    (0..16).for_each(|_| assert_eq!(text_of(&next()), alone));

    // One that waits for the whole text.
    let long = json!({"prompt": "The river", "max_tokens": 1_000_000});
    drop(send(at, TEXT, &long.to_string()).unwrap());
    assert_eq!(text_of(&post(at, TEXT, &short).unwrap()), alone);
    // A client that sends half a request, and one that sends nothing, are in nobody's way.
    let silent = TcpStream::connect(at).unwrap();
    let mut half = TcpStream::connect(at).unwrap();
    write!(half, "POST {TEXT} HTTP/1.1\r\nHost: {at}\r\nContent-Length: 100\r\n\r\n{{").unwrap();
    assert_eq!(text_of(&post(at, TEXT, &short).unwrap()), alone);
    drop((silent, half));
}

#[test]
fn adapters_are_asked_by_name_in_any_order() {
    let world = world();
    adapter(&world, "one", 0.5);
    adapter(&world, "two", -0.7);
    let served = serve(&world, &["--adapter", "a=one", "--adapter", "b=two"]);
    let wanted = |more: &[&str]| {
        generated(&world, &[&["--prompt", "The river"], more].concat())["text"].as_str().unwrap().to_owned()
    };
    let (base, one, two) = (wanted(&[]), wanted(&["--adapter", "one"]), wanted(&["--adapter", "two"]));
    assert!(base != one && one != two && base != two);
    let ask = |model: &str| {
        let ask = json!({"model": model, "prompt": "The river", "max_tokens": 24, "temperature": 0});
        text_of(&post(&served.at, TEXT, &ask).unwrap())
    };
    for (model, wanted) in [("a", &one), ("model", &base), ("b", &two), ("a", &one), ("model", &base)] {
        assert_eq!(&ask(model), wanted, "{model}");
    }
    let both = serve(&world, &["--adapter", "one", "--adapter", "b=two"]);
    let ask = |model: &str| {
        let ask = json!({"model": model, "prompt": "The river", "max_tokens": 24, "temperature": 0});
        text_of(&post(&both.at, TEXT, &ask).unwrap())
    };
    assert_eq!(ask("b"), wanted(&["--adapter", "one", "--adapter", "two"]));
    assert_eq!(ask("model"), one);
    let twice = world.run("fleet", &["serve", "--model", "model", "--port", "0", "--adapter", "model=one"]);
    assert!(twice.expect(2).all().contains("two models have the name model"));
}

#[test]
fn a_signal_ends_it_in_the_middle_of_a_text_and_leaves_nothing() {
    let world = endless();
    for signal in [Signal::SIGTERM, Signal::SIGINT] {
        let served = serve(&world, &[]);
        let text = begun(&served.at);
        served.process.signal(signal);
        let done = served.process.finish().expect(0);
        assert!(!done.all().contains("panicked") && !done.all().contains("failed"), "{}", done.all());
        drop(text);
    }
    world.is_empty_soon();
    let taken = std::net::TcpListener::bind("127.0.0.1:0").unwrap();
    let port = taken.local_addr().unwrap().port().to_string();
    let refused = world.run("fleet", &["serve", "--model", "model", "--port", &port]);
    refused.expect(4).says("cannot listen on 127.0.0.1");
}

#[test]
fn several_prompts_are_answered_as_each_alone_and_cut_at_a_stop_string() {
    let world = world();
    let alone = |prompt: &str| generated(&world, &["--prompt", prompt])["text"].clone();
    world.write(
        "asked.jsonl",
        "\"winter\\n\\nlight\"\n\n{\"prompt\": \"\"}\n{\"messages\": [{\"role\": \"user\", \"content\": \"The river\"}]}\n",
    );
    let base = ["generate", "--model", "model", "--temperature", "0", "--max-new-tokens", "24"];
    let args = [&base[..], &["--json", "--prompt", "The river", "--prompts", "asked.jsonl"]].concat();
    let lines = world.run("fleet", &args).expect(0).json();
    let texts: Vec<&Value> = lines.iter().map(|line| &line["text"]).collect();
    let chat = generated(&world, &["--prompt", "The river", "--chat"])["text"].clone();
    assert_eq!(texts, [&alone("The river"), &alone("winter\n\nlight"), &alone(""), &chat]);

    let whole = alone("winter\n\nlight").as_str().unwrap().to_owned();
    for stop in ["in", "d1", "u s", "nowhere"] {
        let cut = generated(&world, &["--prompt", "winter\n\nlight", "--stop", "never", "--stop", stop]);
        let wanted = whole.find(stop).map_or(whole.as_str(), |at| &whole[..at]);
        assert_eq!(cut["text"], wanted, "{stop}");
        let end = if whole.contains(stop) { "stop_string" } else { "end_of_text" };
        assert_eq!(cut["end"], end, "{stop}");
        let args = [&base[..], &["--prompt", "winter\n\nlight", "--stop", stop]].concat();
        assert_eq!(world.run("fleet", &args).expect(0).stdout.concat(), wanted, "as it comes");
    }

    world.write("own.jinja", "{% for m in messages %}{{ m.content }}{% endfor %}");
    let own = generated(&world, &["--prompt", "The river", "--chat", "--chat-template", "own.jinja"]);
    assert_eq!(own["prompt_tokens"], 2, "no begin of text, and nothing behind");
    world.write("wrong.jsonl", "{\"text\": 3}\n");
    for (args, what) in [
        (vec!["--prompts", "wrong.jsonl"], "wrong.jsonl, line 1: neither"),
        (vec!["--prompts", "none.jsonl"], "none.jsonl"),
        (vec!["--prompt", "a", "--chat", "--chat-template", "none.jinja"], "none.jinja"),
        (vec!["--prompt", "a", "--chat", "--chat-template", "none"], "there is no chat template none"),
    ] {
        let refused = world.run("fleet", &[&base[..], &args].concat()).expect(2);
        refused.says(what);
        assert!(refused.stdout.is_empty(), "nothing is computed: {}", refused.all());
    }
}
