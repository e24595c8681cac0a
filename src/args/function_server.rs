//! The flags of the function server.

use std::path::PathBuf;

use anyhow::Context;
use clap::Args;

use crate::config::function_server::{FunctionServerSettings, ListenAddress, ManagerAddress, TlsFileNames};
use crate::config::values::parse_quantity;
use crate::quantity::Quantity;

/// A resource manager's way to this node, and this node's to it.
#[derive(Debug, Args)]
#[command(next_help_heading = "Function server")]
pub(super) struct FunctionServerArgs {
    /// Serve functionserver.Function (gRPC) here, for a resource manager that asks this node for replicas: PORT on
    /// loopback, or IP:PORT, which needs the three files below unless it is on loopback [default: not served]
    #[arg(long, value_name = "[IP:]PORT", env = "FUNCTIONSERVER_PORT")]
    function_server_addr: Option<ListenAddress>,
    /// Certificate it shows to callers, and to a resource manager on another host
    #[arg(long, value_name = "FILE")]
    function_server_tls_cert_file: Option<PathBuf>,
    /// Key of that certificate
    #[arg(long, value_name = "FILE")]
    function_server_tls_private_key_file: Option<PathBuf>,
    /// CA bundle that the certificates of both are checked against; without one of its certificates nobody is served
    #[arg(long, value_name = "FILE")]
    function_server_client_ca_file: Option<PathBuf>,
    /// Memory that all of its replicas may have together, such as 4Gi, which Pods do not get; none can be started without
    /// it [default: none]
    #[arg(long, value_name = "QUANTITY", value_parser = parse_quantity)]
    function_server_memory: Option<Quantity>,
    /// Resource manager (resmngr.ResMngrService) that this node registers with and tells of replicas; over TLS with the
    /// files above if it is on another host [default: none]
    #[arg(long, value_name = "HOST", env = "RESMNGR_ADDR")]
    resource_manager_addr: Option<String>,
    /// Its port
    #[arg(long, value_name = "PORT", env = "RESMNGR_PORT")]
    resource_manager_port: Option<String>,
}

impl FunctionServerArgs {
    /// The server that is wanted; `None` if there is to be none.
    pub(super) fn resolve(self) -> anyhow::Result<Option<FunctionServerSettings>> {
        let Self {
            function_server_addr,
            function_server_tls_cert_file: certificate,
            function_server_tls_private_key_file: key,
            function_server_client_ca_file: client_ca,
            function_server_memory: memory,
            resource_manager_addr: host,
            resource_manager_port: port,
        } = self;
        let tls = match (certificate, key, client_ca) {
            (None, None, None) => None,
            (Some(certificate), Some(key), Some(client_ca)) => Some(TlsFileNames { certificate, key, client_ca }),
            _ => anyhow::bail!(
                "--function-server-tls-cert-file, --function-server-tls-private-key-file and \
                 --function-server-client-ca-file belong together"
            ),
        };
        let given = |text: Option<String>| text.filter(|text| !text.is_empty());
        let manager = match (given(host), given(port)) {
            (None, None) => None,
            (Some(host), Some(port)) => {
                let number = port.parse().ok().filter(|number| *number != 0);
                let port = number.with_context(|| format!("--resource-manager-port {port:?} is no port"))?;
                Some(ManagerAddress { host, port })
            }
            _ => anyhow::bail!(
                "--resource-manager-addr (RESMNGR_ADDR) and --resource-manager-port (RESMNGR_PORT) belong together"
            ),
        };
        let Some(listen) = function_server_addr else {
            anyhow::ensure!(tls.is_none(), "--function-server-tls-cert-file needs --function-server-addr");
            anyhow::ensure!(memory.is_none(), "--function-server-memory needs --function-server-addr");
            anyhow::ensure!(
                manager.is_none(),
                "--resource-manager-addr (RESMNGR_ADDR) needs --function-server-addr (FUNCTIONSERVER_PORT), which the \
                 resource manager is to call"
            );
            return Ok(None);
        };
        let memory = memory.map(|memory| memory.value().unsigned_abs());
        let settings = FunctionServerSettings { listen, tls, manager, memory };
        settings.validate()?;
        Ok(Some(settings))
    }
}
