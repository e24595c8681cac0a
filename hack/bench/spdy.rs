//! The least of SPDY/3.1 that a port-forward of one connection needs, as API servers before 1.36 speak it to a node.

use anyhow::{Context, ensure};
use bytes::{Buf as _, BufMut as _, BytesMut};
use flate2::{Compress, Compression, FlushCompress};
use lambdalet::spdy::headers::DICTIONARY;
use tokio::io::{AsyncReadExt as _, AsyncWriteExt as _};

use crate::client::{Client, PIECE, Tls};

/// The two streams of the connection.
const ERRORS: u32 = 1;
const DATA: u32 = 3;

/// A connection to a port of a Pod.
pub(crate) struct Forwarded {
    io: Tls,
    input: BytesMut,
}

impl Forwarded {
    /// `place` is namespace and Pod, as paths have them.
    pub(crate) async fn open(client: &Client, place: &str, port: u16) -> anyhow::Result<Self> {
        let mut forwarded = Self { io: client.connect().await?, input: BytesMut::new() };
        let request = format!(
            "POST /portForward/{place} HTTP/1.1\r\nhost: node\r\nconnection: Upgrade\r\nupgrade: SPDY/3.1\r\n\
             x-stream-protocol-version: portforward.k8s.io\r\n\r\n"
        );
        forwarded.io.write_all(request.as_bytes()).await?;
        let end = loop {
            if let Some(end) = forwarded.input.windows(4).position(|bytes| bytes == b"\r\n\r\n") {
                break end + 4;
            }
            forwarded.fill().await?;
        };
        let head = forwarded.input.split_to(end);
        ensure!(head.starts_with(b"HTTP/1.1 101"), "no upgrade: {}", String::from_utf8_lossy(&head));
        let (mut deflate, mut out) = (Compress::new(Compression::fast(), true), BytesMut::new());
        deflate.set_dictionary(&DICTIONARY)?;
        for (id, kind) in [(ERRORS, "error"), (DATA, "data")] {
            let port = port.to_string();
            open_stream(&mut deflate, &mut out, id, &[("streamtype", kind), ("port", &port), ("requestid", "0")])?;
        }
        forwarded.io.write_all(&out).await?;
        Ok(forwarded)
    }

    /// Sends these bytes.
    pub(crate) async fn send(&mut self, bytes: &[u8]) -> anyhow::Result<()> {
        self.io.write_all(&data_frame(bytes)?).await?;
        Ok(self.io.flush().await?)
    }

    /// Sends so many zeros.
    pub(crate) async fn send_zeros(&mut self, bytes: u64) -> anyhow::Result<()> {
        let full = data_frame(&vec![0; PIECE])?;
        for _ in 0..bytes / PIECE as u64 {
            self.io.write_all(&full).await?;
        }
        self.send(&vec![0; (bytes % PIECE as u64) as usize]).await
    }

    /// Reads until so many bytes have come from the port.
    pub(crate) async fn receive(&mut self, bytes: u64) -> anyhow::Result<()> {
        let mut seen = 0;
        while seen < bytes {
            while self.input.len() < 8 {
                self.fill().await?;
            }
            let (stream, mut left) = (self.input.get_u32(), (self.input.get_u32() & 0x00ff_ffff) as usize);
            while left > 0 {
                if self.input.is_empty() {
                    self.fill().await?;
                }
                let part = self.input.split_to(left.min(self.input.len()));
                left -= part.len();
                ensure!(stream != ERRORS, "the node says: {}", String::from_utf8_lossy(&part));
                seen += if stream == DATA { part.len() as u64 } else { 0 };
            }
        }
        Ok(())
    }

    async fn fill(&mut self) -> anyhow::Result<()> {
        self.input.reserve(PIECE);
        ensure!(self.io.read_buf(&mut self.input).await? > 0, "the connection ended");
        Ok(())
    }
}

fn data_frame(bytes: &[u8]) -> anyhow::Result<BytesMut> {
    let mut frame = BytesMut::with_capacity(8 + bytes.len());
    frame.put_u32(DATA);
    frame.put_u32(u32::try_from(bytes.len())?);
    frame.put_slice(bytes);
    Ok(frame)
}

/// A SYN_STREAM. Its headers are deflated in one go with those of the streams before.
fn open_stream(deflate: &mut Compress, out: &mut BytesMut, id: u32, headers: &[(&str, &str)]) -> anyhow::Result<()> {
    let mut plain = Vec::new();
    plain.put_u32(u32::try_from(headers.len())?);
    for text in headers.iter().flat_map(|(name, value)| [name, value]) {
        plain.put_u32(u32::try_from(text.len())?);
        plain.put_slice(text.as_bytes());
    }
    let (mut block, before) = (vec![0; plain.len() + 256], deflate.total_out());
    deflate.compress(&plain, &mut block, FlushCompress::Sync).context("failed to deflate headers")?;
    block.truncate(usize::try_from(deflate.total_out() - before)?);
    out.put_u32(0x8003_0001);
    out.put_u32(u32::try_from(10 + block.len())?);
    out.put_u32(id);
    out.put_slice(&[0; 6]);
    out.put_slice(&block);
    Ok(())
}
