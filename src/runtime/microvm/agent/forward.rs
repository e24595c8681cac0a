//! Connections to ports in a guest.

use std::io;
use std::pin::Pin;
use std::task::{Context, Poll, ready};

use bytes::Bytes;
use futures::StreamExt;
use lambdalet_proto::MAX_PIECE;
use lambdalet_proto::agent::v1::port_data::Message;
use lambdalet_proto::agent::v1::{Empty, PortData};
use tokio::io::AsyncWrite;
use tokio::sync::mpsc;
use tokio_stream::wrappers::ReceiverStream;
use tokio_util::io::StreamReader;
use tokio_util::sync::PollSender;
use tonic::Status;

use super::said;
use super::{Agent, PATIENCE};
use crate::runtime::Result;
use crate::runtime::session::Duplex;

/// Pieces on their way, each of at most [`MAX_PIECE`] bytes.
const QUEUE: usize = 4;

impl Agent {
    /// Connects to a TCP port on the guest's loopback address. The connection ends with the agent's session.
    ///
    /// # Errors
    /// [`Kind::Invalid`](crate::runtime::Kind::Invalid) where nothing listens.
    pub async fn port_forward(&self, port: u16) -> Result<Pin<Box<dyn Duplex>>> {
        let tried = format!("failed to connect to port {port} in the guest");
        let (sender, receiver) = mpsc::channel(QUEUE);
        let connect = PortData { message: Some(Message::Connect(u32::from(port))) };
        let messages = futures::stream::once(std::future::ready(connect)).chain(ReceiverStream::new(receiver));
        let mut client = self.client.clone();
        let call = async move {
            let mut answers = client.port_forward(messages).await?.into_inner();
            match answers.message().await? {
                Some(PortData { message: Some(Message::Connected(_)) }) => Ok(answers),
                _ => Err(Status::internal("the guest did not say that it is connected")),
            }
        };
        let answers = self.within(PATIENCE, &tried, call).await?;
        let agent = self.clone();
        let incoming = tokio_stream::StreamExt::map_while(answers, move |answer| {
            // The session lives as long as its connections.
            let _agent = &agent;
            read(answer)
        });
        let joined = tokio::io::join(StreamReader::new(incoming), Outlet(PollSender::new(sender)));
        Ok(Box::pin(joined))
    }
}

/// The bytes of an answer; `None` at their end.
fn read(answer: std::result::Result<PortData, Status>) -> Option<io::Result<Bytes>> {
    match answer {
        Ok(PortData { message: Some(Message::Data(bytes)) }) => Some(said::piece(bytes).map_err(io::Error::other)),
        Ok(PortData { message: Some(Message::End(_)) }) => None,
        Ok(_) => Some(Err(io::Error::from(io::ErrorKind::InvalidData))),
        Err(status) => Some(Err(io::Error::new(io::ErrorKind::ConnectionReset, said::text(status.message())))),
    }
}

/// The direction towards the port.
struct Outlet(PollSender<PortData>);

impl Outlet {
    fn poll_send(&mut self, cx: &mut Context<'_>, message: impl FnOnce() -> Message) -> Poll<io::Result<()>> {
        let gone = |_| io::Error::from(io::ErrorKind::BrokenPipe);
        ready!(self.0.poll_reserve(cx)).map_err(gone)?;
        Poll::Ready(self.0.send_item(PortData { message: Some(message()) }).map_err(gone))
    }
}

impl AsyncWrite for Outlet {
    fn poll_write(mut self: Pin<&mut Self>, cx: &mut Context<'_>, bytes: &[u8]) -> Poll<io::Result<usize>> {
        let piece = &bytes[..bytes.len().min(MAX_PIECE)];
        ready!(self.poll_send(cx, || Message::Data(Bytes::copy_from_slice(piece))))?;
        Poll::Ready(Ok(piece.len()))
    }

    fn poll_flush(self: Pin<&mut Self>, _: &mut Context<'_>) -> Poll<io::Result<()>> {
        Poll::Ready(Ok(()))
    }

    fn poll_shutdown(mut self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<io::Result<()>> {
        if self.0.is_closed() {
            return Poll::Ready(Ok(()));
        }
        ready!(self.poll_send(cx, || Message::End(Empty {})))?;
        self.0.close();
        Poll::Ready(Ok(()))
    }
}
