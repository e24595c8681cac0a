//! What the node and the agent in a microVM say to each other: the messages, and the session that carries them. And what
//! resource managers and nodes say to each other; with the feature `cri` also the messages of CRI v1.
//!
//! ```text
//! agent.proto (tonic, HTTP/2)   verbs, typed, versioned by package
//! session                       frames below HTTP/2, so that a killed or restored peer leaves nothing behind
//! byte stream                   virtio-serial port, or vsock
//!
//! functionserver.proto          a resource manager asks a node for replicas (tonic, TCP)
//! resmngr.proto                 a node tells a resource manager of them
//! ```

pub mod bounded;
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

/// The messages of `functionserver/functionserver.proto`, as generated; that file is their documentation.
#[allow(missing_docs, unreachable_pub, clippy::all, clippy::too_many_lines)]
pub mod functionserver {
    tonic::include_proto!("functionserver");
}

/// The messages of `resmngr/resmngr.proto`, as generated; that file is their documentation.
#[allow(missing_docs, unreachable_pub, clippy::all, clippy::too_many_lines)]
pub mod resmngr {
    tonic::include_proto!("resmngr");
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
/// Containers of one guest.
pub const MAX_CONTAINERS: usize = 256;
/// Network interfaces of one guest.
pub const MAX_INTERFACES: usize = 16;
/// Volumes of one guest.
pub const MAX_VOLUMES: usize = 1024;
/// Records of one batch of log.
pub const MAX_RECORDS: usize = 16 << 10;

#[cfg(test)]
mod tests {
    use prost::Message;

    use super::functionserver::{CreateReply, CreateRequest, ReleaseRequest};
    use super::resmngr::{RegisterFunctionNodeRequest, StatusUpdateReply, StatusUpdateRequest};

    /// Number and wire type of each field, in order.
    fn fields(mut bytes: &[u8]) -> Vec<(u64, u64)> {
        let mut found = Vec::new();
        while !bytes.is_empty() {
            let tag = prost::decode_length_delimiter(&mut bytes).unwrap() as u64;
            found.push((tag >> 3, tag & 7));
            let number = prost::decode_length_delimiter(&mut bytes).unwrap();
            if tag & 7 == 2 {
                bytes = &bytes[number..];
            }
        }
        found
    }

    #[test]
    fn each_field_has_the_number_that_clients_were_built_with() {
        let text = || "x".to_owned();
        let create = CreateRequest {
            kernel_image_path: text(),
            kernel_args: text(),
            image_name: text(),
            image_storage_prefix: text(),
            inet_dev: text(),
            name_server: text(),
            aws_access_key_id: text(),
            aws_secret_access_key: text(),
            cpu: 1,
            mem: 1,
            num_replica: 1,
            vm_type: text(),
            initrd_path: text(),
        };
        let strings = (4..=11).map(|number| (number, 2));
        let expected: Vec<_> = strings.chain([(13, 0), (14, 0), (15, 0), (16, 2), (17, 2)]).collect();
        assert_eq!(fields(&create.encode_to_vec()), expected);
        assert_eq!(fields(&CreateReply { ip: text(), vmid: text() }.encode_to_vec()), [(1, 2), (2, 2)]);
        assert_eq!(fields(&ReleaseRequest { vmid: text() }.encode_to_vec()), [(1, 2)]);
        let register = RegisterFunctionNodeRequest { ip: text(), port: 1, node_id: text() };
        assert_eq!(fields(&register.encode_to_vec()), [(1, 2), (4, 0), (5, 2)]);
        assert_eq!(fields(&StatusUpdateRequest { vmid: text(), status: 1 }.encode_to_vec()), [(1, 2), (2, 0)]);
        assert_eq!(fields(&StatusUpdateReply { action: 2 }.encode_to_vec()), [(1, 0)]);
    }

    /// By hand, after the rules of the wire format.
    #[test]
    fn a_message_is_these_bytes() {
        let request = CreateRequest { cpu: 2, mem: 512, initrd_path: "/i".to_owned(), ..CreateRequest::default() };
        assert_eq!(request.encode_to_vec(), [0x68, 2, 0x70, 0x80, 0x04, 0x8a, 0x01, 2, b'/', b'i']);
    }
}
