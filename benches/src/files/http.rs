//! Clients that fetch a file again and again.

use std::io::{Read, Write};
use std::net::{SocketAddr, TcpStream};
use std::thread;
use std::time::{Duration, Instant};

use anyhow::{Context, Result, anyhow, bail};

const CLIENTS: usize = 4;
/// A server that sends nothing for so long has failed.
const PATIENCE: Duration = Duration::from_secs(30);
const BUFFER: usize = 256 << 10;
const HEAD_MAX: usize = 4096;

/// MB/s that all clients together get.
pub fn rate(server: SocketAddr, file: &'static str, time: Duration) -> Result<f64> {
    let start = Instant::now();
    let clients: Vec<_> =
        (0..CLIENTS).map(|_| thread::spawn(move || client(server, file, start + time))).collect();
    let mut total = 0;
    for client in clients {
        total += client.join().map_err(|_| anyhow!("a client panicked"))??;
    }
    Ok(total as f64 / 1e6 / start.elapsed().as_secs_f64())
}

/// Whole files, and bytes got.
fn client(server: SocketAddr, file: &str, until: Instant) -> Result<u64> {
    let mut stream = TcpStream::connect_timeout(&server, PATIENCE)?;
    stream.set_read_timeout(Some(PATIENCE))?;
    let mut buffer = vec![0; BUFFER];
    let mut total = 0;
    while Instant::now() < until {
        stream.write_all(format!("GET /{file} HTTP/1.1\r\nHost: bench\r\n\r\n").as_bytes())?;
        let mut got = 0;
        let head = loop {
            let room = buffer.get_mut(got..HEAD_MAX).context("a long header")?;
            let count = stream.read(room)?;
            if count == 0 {
                bail!("the server closed the connection");
            }
            got += count;
            let seen = buffer.get(..got).unwrap_or_default();
            if let Some(at) = seen.windows(4).position(|four| four == b"\r\n\r\n") {
                break at + 4;
            }
        };
        let text = String::from_utf8_lossy(buffer.get(..head).unwrap_or_default()).to_ascii_lowercase();
        if !text.starts_with("http/1.1 200") {
            bail!("the server says {}", text.lines().next().unwrap_or_default());
        }
        let length = text.lines().find_map(|line| line.strip_prefix("content-length:"));
        let length: u64 = length.context("no length")?.trim().parse()?;
        let mut left = length.saturating_sub((got - head) as u64);
        while left > 0 {
            match stream.read(&mut buffer)? {
                0 => bail!("the file ends early"),
                count => left = left.saturating_sub(count as u64),
            }
        }
        total += length;
    }
    Ok(total)
}
