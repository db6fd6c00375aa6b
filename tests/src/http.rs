//! What a program says over HTTP.

use crate::PATIENCE;
use serde_json::Value;
use std::io::{self, Read, Write};
use std::net::TcpStream;

/// The whole answer, with its head.
pub fn get(at: &str, path: &str) -> io::Result<String> {
    let mut stream = TcpStream::connect(at)?;
    write!(stream, "GET {path} HTTP/1.1\r\nHost: {at}\r\nConnection: close\r\n\r\n")?;
    let mut answer = String::new();
    stream.read_to_string(&mut answer)?;
    Ok(answer)
}

/// The same, taken apart.
pub fn answer(at: &str, path: &str) -> io::Result<Answer> {
    ask_as(at, path, "*/*")
}

/// The answer to a reader that wants this kind of it.
pub fn ask_as(at: &str, path: &str, accept: &str) -> io::Result<Answer> {
    let mut stream = TcpStream::connect(at)?;
    write!(stream, "GET {path} HTTP/1.1\r\nHost: {at}\r\nAccept: {accept}\r\nConnection: close\r\n\r\n")?;
    Answer::read(stream)
}

/// An answer, taken apart.
#[derive(Clone, Debug)]
pub struct Answer {
    pub status: u16,
    pub head: String,
    pub body: String,
}

impl Answer {
    /// Of a connection that its server closes.
    pub fn read(mut stream: TcpStream) -> io::Result<Answer> {
        stream.set_read_timeout(Some(PATIENCE))?;
        let mut bytes = Vec::new();
        // Some of a body that is too long may not have been read when it is refused.
        match stream.read_to_end(&mut bytes) {
            Err(e) if bytes.is_empty() => return Err(e),
            _ => {}
        }
        let text = String::from_utf8_lossy(&bytes).into_owned();
        let (head, body) = text.split_once("\r\n\r\n").unwrap_or((&text, ""));
        let status = head.split(' ').nth(1).and_then(|status| status.parse().ok()).unwrap_or(0);
        let is_chunked = head.to_lowercase().contains("transfer-encoding: chunked");
        let body = if is_chunked { joined(body) } else { body.to_owned() };
        Ok(Answer { status, head: head.to_owned(), body })
    }

    pub fn json(&self) -> Value {
        serde_json::from_str(&self.body).unwrap_or_else(|e| panic!("no JSON ({e}): {self:?}"))
    }

    /// The data of server-sent events.
    pub fn events(&self) -> Vec<String> {
        let data = |event: &str| event.strip_prefix("data: ").map(str::to_owned);
        self.body.split("\n\n").filter_map(data).collect()
    }
}

fn joined(mut chunks: &str) -> String {
    let mut body = String::new();
    while let Some((size, rest)) = chunks.split_once("\r\n") {
        let size = usize::from_str_radix(size.trim(), 16).unwrap_or(0);
        let Some(chunk) = rest.get(..size).filter(|chunk| !chunk.is_empty()) else { break };
        body += chunk;
        chunks = rest.get(size + 2..).unwrap_or_default();
    }
    body
}

/// Sends JSON; the answer comes by the connection.
pub fn send(at: &str, path: &str, body: &str) -> io::Result<TcpStream> {
    let mut stream = TcpStream::connect(at)?;
    let length = body.len();
    write!(
        stream,
        "POST {path} HTTP/1.1\r\nHost: {at}\r\nContent-Type: application/json\r\nContent-Length: {length}\r\nConnection: close\r\n\r\n{body}"
    )?;
    Ok(stream)
}

pub fn post(at: &str, path: &str, body: &Value) -> io::Result<Answer> {
    Answer::read(send(at, path, &body.to_string())?)
}
