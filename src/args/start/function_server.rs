//! Starts the function server, if there is to be one.

use anyhow::Context;
use tokio::sync::watch;

use super::Parts;
use crate::config::function_server::{FunctionServerSettings, TlsFileNames};
use crate::function_server::{FunctionServer, Limits, ManagerParams, Params, Supply, TlsFiles};

/// Listens and serves. Where replicas come from is told by the supply, which may become known later.
pub(super) async fn serve(parts: &Parts, supply: watch::Receiver<Supply>) -> anyhow::Result<()> {
    let Some(settings) = &parts.settings.function_server else { return Ok(()) };
    let FunctionServerSettings { listen, tls, manager } = settings.clone();
    let tls = tls.map(|TlsFileNames { certificate, key, client_ca }| TlsFiles { certificate, key, client_ca });
    let facts = parts.node.facts.borrow().clone();
    let listen = listen.0;
    let advertised = match listen.ip() {
        all if all.is_unspecified() => *facts.addresses.first().context("this node has no address to be called at")?,
        one => one,
    };
    let manager = manager.map(|manager| ManagerParams {
        tls: tls.clone().filter(|_| !manager.is_local()),
        host: manager.host,
        port: manager.port,
        advertised: advertised.to_string(),
        node: facts.name.clone(),
    });
    let server = FunctionServer::bind(Params { listen, tls, manager, supply, limits: Limits::default() }).await?;
    let draining = parts.tasks.draining();
    parts.tasks.spawn("function server", async move {
        server.serve(draining).await;
        Ok(())
    });
    Ok(())
}

/// Where replicas come from.
pub(super) fn supply() -> watch::Receiver<Supply> {
    let missing =
        "this node starts no replicas: the pool of microVMs that they come from is not opened by this version";
    watch::channel(Supply::Missing(missing.to_owned())).1
}
