//! What a coordinator says over HTTP.

use std::io::{self, Read, Write};
use std::net::TcpStream;

/// The whole answer, with its head.
pub fn get(at: &str, path: &str) -> io::Result<String> {
    let mut stream = TcpStream::connect(at)?;
    write!(stream, "GET {path} HTTP/1.1\r\nHost: {at}\r\n\r\n")?;
    let mut answer = String::new();
    stream.read_to_string(&mut answer)?;
    Ok(answer)
}
