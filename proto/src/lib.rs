//! What the node and the agent in a microVM say to each other: the messages, and the session that carries them. With
//! the feature `cri` also the messages of CRI v1.
//!
//! ```text
//! agent.proto (tonic, HTTP/2)   verbs, typed, versioned by package
//! session                       frames below HTTP/2, so that a killed or restored peer leaves nothing behind
//! byte stream                   virtio-serial port, or vsock
//! ```

pub mod capability;
pub mod session;

/// The messages of `lambdalet/agent/v1/agent.proto`, as generated; that file is their documentation.
pub mod agent {
    /// Version 1.
    #[allow(missing_docs, unreachable_pub, clippy::all, clippy::too_many_lines)]
    pub mod v1 {
        tonic::include_proto!("lambdalet.agent.v1");

        /// The number of this protocol in `Hello`.
        pub const PROTOCOL: u32 = 1;
    }
}

/// The messages and services of CRI v1 (`runtime/v1/cri.proto`), as generated.
#[cfg(feature = "cri")]
pub mod cri {
    /// Version 1, the only one since Kubernetes 1.26.
    #[allow(missing_docs, unreachable_pub, deprecated, clippy::all, clippy::too_many_lines)]
    pub mod v1 {
        tonic::include_proto!("runtime.v1");
    }

    /// Turns a message into bytes and back.
    pub use prost::Message;
}

/// Bytes of one piece of a stream (standard input, a port's data, a file) in a message.
pub const MAX_PIECE: usize = 32 << 10;
/// Bytes of one message in either direction; more is refused before it is read.
pub const MAX_MESSAGE: usize = 1 << 20;
/// Bytes that one push may leave in a volume: a ConfigMap or Secret holds at most 1 MiB, a projected volume several.
pub const MAX_PUSHED: usize = 16 << 20;
/// Files of one push.
pub const MAX_FILES: usize = 4096;
