//! Firecracker's vsock from the host (docs/vsock.md): a Unix socket, where the first line names the guest's port.

use std::io;
use std::path::Path;
use std::time::Duration;

use tokio::io::{AsyncReadExt, AsyncWriteExt};
use tokio::net::UnixStream;
use tokio::time::timeout;

use crate::runtime::microvm::machine::VmDir;

/// `OK ` and a number of 32 bits.
const LONGEST_ANSWER: usize = 16;
/// How long Firecracker may take to say whether somebody listens in the guest.
const PATIENCE: Duration = Duration::from_secs(5);

/// Connects to a port in the guest.
///
/// # Errors
/// [`io::ErrorKind::ConnectionRefused`] if nobody listens there: Firecracker then closes the connection.
pub(super) async fn connect(dir: &VmDir, place: &Path, name: &str, port: u32) -> io::Result<UnixStream> {
    let stream = dir.connect(place, name).await?;
    timeout(PATIENCE, ask(stream, port)).await?
}

async fn ask(mut stream: UnixStream, port: u32) -> io::Result<UnixStream> {
    stream.write_all(format!("CONNECT {port}\n").as_bytes()).await?;
    let mut answer = Vec::new();
    // A byte at a time: what comes after the line is the guest's.
    loop {
        match stream.read_u8().await {
            Ok(b'\n') => break,
            Ok(byte) if answer.len() < LONGEST_ANSWER => answer.push(byte),
            Ok(_) => return Err(invalid()),
            Err(error) if error.kind() == io::ErrorKind::UnexpectedEof => {
                return Err(io::ErrorKind::ConnectionRefused.into());
            }
            Err(error) => return Err(error),
        }
    }
    let number = str::from_utf8(&answer).ok().and_then(|text| text.strip_prefix("OK "));
    match number.map(str::parse::<u32>) {
        Some(Ok(_)) => Ok(stream),
        _ => Err(invalid()),
    }
}

fn invalid() -> io::Error {
    io::Error::new(io::ErrorKind::InvalidData, "the VMM did not answer as Firecracker does")
}

#[cfg(test)]
mod tests {
    use super::*;

    async fn answered(answer: &'static [u8]) -> (io::Result<Vec<u8>>, String) {
        let (ours, mut theirs) = UnixStream::pair().unwrap();
        let serve = async {
            let mut asked = vec![0; 13];
            theirs.read_exact(&mut asked).await.unwrap();
            theirs.write_all(answer).await.unwrap();
            drop(theirs);
            String::from_utf8(asked).unwrap()
        };
        let ask = async {
            let mut stream = ask(ours, 1024).await?;
            let mut rest = Vec::new();
            stream.read_to_end(&mut rest).await?;
            Ok(rest)
        };
        tokio::join!(ask, serve)
    }

    #[tokio::test]
    async fn what_follows_the_answer_is_the_guests() {
        let (rest, asked) = answered(b"OK 1073741824\nhello\n").await;
        assert_eq!(asked, "CONNECT 1024\n");
        assert_eq!(rest.unwrap(), b"hello\n");
    }

    #[tokio::test]
    async fn a_closed_port_and_garbage_are_told_apart() {
        assert_eq!(answered(b"").await.0.unwrap_err().kind(), io::ErrorKind::ConnectionRefused);
        for garbage in [&b"NO\n"[..], b"OK\n", b"OK x\n", b"OK 99999999999\n", b"aaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaa"]
        {
            assert_eq!(answered(garbage).await.0.unwrap_err().kind(), io::ErrorKind::InvalidData, "{garbage:?}");
        }
    }
}
