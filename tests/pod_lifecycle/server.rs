//! What a container would answer on its port: the fake runtime has no network, so probes and hooks are sent to this.

use std::sync::Arc;
use std::sync::atomic::{AtomicUsize, Ordering};

use lambdalet::shutdown::owned;
use serde_json::{Value, json};
use tokio::io::{AsyncReadExt, AsyncWriteExt};
use tokio::net::TcpListener;
use tokio::sync::watch;
use tokio::task::JoinSet;
use tokio_util::task::AbortOnDropHandle;

/// An HTTP server on the loopback address; it ends with this.
pub(crate) struct Server {
    port: u16,
    status: watch::Sender<u16>,
    asked: Arc<AtomicUsize>,
    _task: AbortOnDropHandle<()>,
}

impl Server {
    /// Answers everything with this status; 0 is no answer until there is another.
    pub(crate) async fn new(status: u16) -> Self {
        let listener = TcpListener::bind("127.0.0.1:0").await.unwrap();
        let port = listener.local_addr().unwrap().port();
        let (status, asked) = (watch::Sender::new(status), Arc::new(AtomicUsize::new(0)));
        let (answer, count) = (status.subscribe(), Arc::clone(&asked));
        let serve = async move {
            let mut connections = JoinSet::new();
            while let Ok((mut stream, _)) = listener.accept().await {
                let (mut answer, count) = (answer.clone(), Arc::clone(&count));
                connections.spawn(async move {
                    let mut request = Vec::new();
                    while !request.ends_with(b"\r\n\r\n") {
                        let Ok(byte) = stream.read_u8().await else { return };
                        request.push(byte);
                    }
                    count.fetch_add(1, Ordering::SeqCst);
                    let Ok(status) = answer.wait_for(|status| *status > 0).await.map(|status| *status) else { return };
                    let answer = format!("HTTP/1.1 {status} Told\r\nContent-Length: 0\r\nConnection: close\r\n\r\n");
                    let _ = stream.write_all(answer.as_bytes()).await;
                });
            }
        };
        Self { port, status, asked, _task: owned(serve) }
    }

    /// From now on.
    pub(crate) fn answer(&self, status: u16) {
        self.status.send_replace(status);
    }

    /// How often it was asked.
    pub(crate) fn asked(&self) -> usize {
        self.asked.load(Ordering::SeqCst)
    }

    /// The action that asks it.
    pub(crate) fn get(&self) -> Value {
        json!({ "httpGet": { "host": "127.0.0.1", "port": self.port, "path": "/" } })
    }

    /// A probe that asks it every second, one result being enough.
    pub(crate) fn probe(&self) -> Value {
        let mut probe = self.get();
        for (field, number) in [("periodSeconds", 1), ("failureThreshold", 1), ("successThreshold", 1)] {
            probe[field] = json!(number);
        }
        probe
    }
}
