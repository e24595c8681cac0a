//! Connections to ports in a guest.

use std::io;
use std::pin::Pin;

use bytes::Bytes;
use futures::StreamExt;
use lambdalet_proto::agent::v1::port_data::Message;
use lambdalet_proto::agent::v1::{Empty, PortData};
use tokio::sync::mpsc;
use tokio_stream::wrappers::ReceiverStream;
use tokio_util::io::StreamReader;
use tonic::Status;

use super::outlet::{Outlet, QUEUE};
use super::said;
use super::{Agent, PATIENCE};
use crate::runtime::Result;
use crate::runtime::session::Duplex;

impl Agent {
    /// Connects to a TCP port on the guest's loopback address. The connection ends with the agent's session.
    ///
    /// # Errors
    /// [`Kind::Invalid`](crate::runtime::Kind::Invalid) where nothing listens.
    pub async fn port_forward(&self, port: u16) -> Result<Pin<Box<dyn Duplex>>> {
        let tried = format!("failed to connect to localhost:{port} inside namespace of the guest");
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
        let data = |bytes| PortData { message: Some(Message::Data(bytes)) };
        let outlet = Outlet::new(sender, data, || PortData { message: Some(Message::End(Empty {})) });
        let joined = tokio::io::join(StreamReader::new(incoming), outlet);
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
