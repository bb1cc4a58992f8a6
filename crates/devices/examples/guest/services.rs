//! TCP servers on the host for the guest to talk to. Each connection begins with a letter, and numbers.

use crate::pattern::Pattern;
use std::io::{Read, Result, Write};
use std::net::{Shutdown, TcpListener, TcpStream};
use std::time::Duration;

/// Everything that the guest asks for.
pub fn serve(listener: TcpListener) {
    for stream in listener.incoming().flatten() {
        std::thread::spawn(move || {
            stream.set_nodelay(true).unwrap();
            if let Err(error) = one(stream) {
                eprintln!("service: {error}");
            }
        });
    }
}

fn number(stream: &mut TcpStream) -> Result<u64> {
    let mut bytes = [0; 8];
    stream.read_exact(&mut bytes)?;
    Ok(u64::from_le_bytes(bytes))
}

fn one(mut stream: TcpStream) -> Result<()> {
    let mut letter = [0];
    if stream.read(&mut letter)? == 0 {
        return Ok(());
    }
    let mut buffer = vec![0; 256 << 10];
    match letter[0] {
        // Echo until the end.
        b'e' => loop {
            let count = stream.read(&mut buffer)?;
            if count == 0 {
                return stream.shutdown(Shutdown::Write);
            }
            stream.write_all(&buffer[..count])?;
        },
        // Checks to the end, then answers how many bytes there were.
        b'u' => {
            let seed = number(&mut stream)?;
            let count = Pattern::new(seed).check(&mut stream, u64::MAX, 1 << 16)?;
            stream.write_all(&count.to_le_bytes())
        }
        // Sends, shuts its half, then answers nothing but checks what comes.
        b'd' => {
            let (seed, bytes) = (number(&mut stream)?, number(&mut stream)?);
            Pattern::new(seed).send(&mut stream, bytes, 50_000)?;
            stream.shutdown(Shutdown::Write)?;
            let back = Pattern::new(seed + 1).check(&mut stream, u64::MAX, 1 << 16)?;
            assert!(back == 0 || back == bytes, "{back} of {bytes} came back");
            Ok(())
        }
        // Reads slowly.
        b's' => {
            let seed = number(&mut stream)?;
            let mut slow = Slow(stream);
            let count = Pattern::new(seed).check(&mut slow, u64::MAX, 20_000)?;
            slow.0.write_all(&count.to_le_bytes())
        }
        // A request of 100 bytes, with the letter; a reply of 100.
        b'r' => {
            stream.read_exact(&mut buffer[..99])?;
            stream.write_all(&buffer[..100])?;
            stream.read(&mut buffer).map(drop)
        }
        // Takes bytes and throws them away; one byte back at the end.
        b'z' => {
            while stream.read(&mut buffer)? > 0 {}
            stream.write_all(b"z")
        }
        // Sends so many bytes of nothing.
        b'y' => {
            let mut left = number(&mut stream)?;
            while left > 0 {
                let part = (buffer.len() as u64).min(left) as usize;
                stream.write_all(&buffer[..part])?;
                left -= part as u64;
            }
            Ok(())
        }
        // Waits for a byte, then resets the connection.
        b'x' => {
            let socket = socket2::Socket::from(stream);
            socket.set_linger(Some(Duration::ZERO))
        }
        other => panic!("service {other}"),
    }
}

struct Slow(TcpStream);

impl Read for Slow {
    fn read(&mut self, buffer: &mut [u8]) -> Result<usize> {
        std::thread::sleep(Duration::from_millis(1));
        self.0.read(buffer)
    }
}
