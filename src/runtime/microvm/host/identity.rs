//! What a guest is told of itself.

use std::fmt::Write as _;
use std::net::IpAddr;

use lambdalet_proto::agent::v1;

use super::Inner;
use crate::network::tap::mac_of;
use crate::runtime::microvm::agent::spec::resources;
use crate::runtime::types::{NamespaceMode, SandboxConfig};
use crate::runtime::{Kind, Result, RuntimeError};

/// What the guest's network card is called in it.
const INTERFACE: &str = "eth0";

impl Inner {
    /// Who the guest is.
    pub(super) async fn identity(&self, address: IpAddr, config: &SandboxConfig) -> Result<v1::ConfigureRequest> {
        let mut request = v1::ConfigureRequest {
            hostname: config.hostname.clone(),
            machine_id: format!("{:032x}", rand::random::<u128>()),
            time_ns: u64::try_from(jiff::Timestamp::now().as_nanosecond()).unwrap_or_default(),
            seed: rand::random::<[u8; 32]>().to_vec().into(),
            resources: Some(resources(&config.resources)),
            scratch: true,
            shared_pid: config.pid == NamespaceMode::Pod,
            ..v1::ConfigureRequest::default()
        };
        let sysctls = config.sysctls.iter();
        request.sysctls =
            sysctls.map(|(name, value)| v1::Sysctl { name: name.clone(), value: value.clone() }).collect();
        if let Some(taps) = &self.options.taps {
            let failed = |error| {
                let text = format!("failed to find the Pod network for {}", config.pod);
                RuntimeError::new(Kind::Internal, text).with_source(error)
            };
            let around = taps.surroundings().await.map_err(failed)?;
            let mac = mac_of(address).iter().fold(String::new(), |mut text, byte| {
                // Writing to a string does not fail.
                let _ = write!(text, "{}{byte:02x}", if text.is_empty() { "" } else { ":" });
                text
            });
            // As in a sandbox of containers: neighbours are reached through the gateway too.
            let (longest, everywhere) = if address.is_ipv4() { (32, "0.0.0.0/0") } else { (128, "::/0") };
            let route = |destination: String, gateway: String| v1::Route {
                destination,
                gateway,
                interface: INTERFACE.to_owned(),
            };
            request.interfaces = vec![v1::Interface {
                mac,
                name: INTERFACE.to_owned(),
                addresses: vec![format!("{address}/{longest}")],
                mtu: around.mtu,
            }];
            request.routes = vec![
                route(format!("{}/{longest}", around.gateway), String::new()),
                route(everywhere.to_owned(), around.gateway.to_string()),
            ];
        }
        Ok(request)
    }
}
