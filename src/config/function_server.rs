//! The function server, and the resource manager it works for.

use std::net::{IpAddr, Ipv4Addr, SocketAddr};
use std::path::PathBuf;
use std::str::FromStr;

use super::values::ValueError;

/// A function server that is to be there.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct FunctionServerSettings {
    /// Where it listens. On any address but a loopback one there are [`Self::tls`].
    pub listen: ListenAddress,
    /// How it and its callers prove who they are.
    pub tls: Option<TlsFileNames>,
    /// The resource manager the node registers with.
    pub manager: Option<ManagerAddress>,
    /// Bytes of memory that all replicas may have together; without it there are none.
    pub memory: Option<u64>,
}

/// PEM files of the function server.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct TlsFileNames {
    /// The certificate it shows.
    pub certificate: PathBuf,
    /// Its key.
    pub key: PathBuf,
    /// Authorities of those it believes.
    pub client_ca: PathBuf,
}

/// Where a resource manager is.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct ManagerAddress {
    /// A name or an address.
    pub host: String,
    /// Its port.
    pub port: u16,
}

/// `PORT`, which is on 127.0.0.1, or `IP:PORT`.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct ListenAddress(pub SocketAddr);

impl FromStr for ListenAddress {
    type Err = ValueError;

    fn from_str(text: &str) -> Result<Self, Self::Err> {
        let port = |text: &str| text.parse::<u16>().ok().filter(|port| *port != 0);
        if let Some(port) = port(text) {
            return Ok(Self(SocketAddr::from((Ipv4Addr::LOCALHOST, port))));
        }
        match text.parse::<SocketAddr>() {
            Ok(address) if address.port() != 0 => Ok(Self(address)),
            _ => {
                Err(ValueError::new(format!("{text:?} is no address to listen on: write PORT, IP:PORT or [IPv6]:PORT")))
            }
        }
    }
}

impl ManagerAddress {
    /// Whether it is on this host, by its name.
    pub fn is_local(&self) -> bool {
        self.host == "localhost" || self.host.parse::<IpAddr>().is_ok_and(|address| address.is_loopback())
    }
}

impl FunctionServerSettings {
    /// What may be put together.
    ///
    /// # Errors
    /// What anybody could call, or what could not be reached.
    pub fn validate(&self) -> Result<(), ValueError> {
        let ListenAddress(listen) = self.listen;
        let local = listen.ip().is_loopback();
        if !local && self.tls.is_none() {
            return Err(ValueError::new(format!(
                "--function-server-addr {listen} is not on loopback: callers must prove who they are, which takes \
                 --function-server-tls-cert-file, --function-server-tls-private-key-file and \
                 --function-server-client-ca-file"
            )));
        }
        let Some(manager) = self.manager.as_ref().filter(|manager| !manager.is_local()) else { return Ok(()) };
        let ManagerAddress { host, .. } = manager;
        if local {
            return Err(ValueError::new(format!(
                "--resource-manager-addr {host} is another host, which cannot call a function server on {listen}"
            )));
        }
        Ok(())
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn settings(listen: &str, tls: bool, manager: Option<&str>) -> FunctionServerSettings {
        let tls = tls.then(|| TlsFileNames { certificate: "/c".into(), key: "/k".into(), client_ca: "/a".into() });
        let manager = manager.map(|host| ManagerAddress { host: host.to_owned(), port: 1 });
        FunctionServerSettings { listen: listen.parse().unwrap(), tls, manager, memory: None }
    }

    #[test]
    fn a_port_alone_is_on_loopback() {
        let address = |text: &str| text.parse::<ListenAddress>().map(|address| address.0.to_string());
        assert_eq!(address("50051").unwrap(), "127.0.0.1:50051");
        assert_eq!(address("10.0.0.1:1").unwrap(), "10.0.0.1:1");
        assert_eq!(address("[::1]:1").unwrap(), "[::1]:1");
        for bad in ["", "0", ":50051", "localhost:1", "10.0.0.1", "10.0.0.1:0", "70000", "::1", "-1"] {
            assert!(address(bad).is_err(), "{bad}");
        }
    }

    #[test]
    fn only_loopback_is_open_and_only_a_local_manager_reaches_it() {
        for (listen, tls, manager, fine) in [
            ("1", false, None, true),
            ("1", false, Some("127.0.0.1"), true),
            ("[::1]:1", false, Some("localhost"), true),
            ("1", true, Some("10.0.0.9"), false),
            ("1", false, Some("rm.example"), false),
            ("10.0.0.1:1", false, None, false),
            ("0.0.0.0:1", false, None, false),
            ("[::]:1", true, Some("rm.example"), true),
            ("10.0.0.1:1", true, Some("10.0.0.9"), true),
            ("10.0.0.1:1", true, Some("127.0.0.1"), true),
        ] {
            assert_eq!(settings(listen, tls, manager).validate().is_ok(), fine, "{listen} {tls} {manager:?}");
        }
    }
}
