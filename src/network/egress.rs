//! The interface that this host's traffic leaves by.

use std::fs;
use std::io::{self, ErrorKind};

/// The host's IPv4 routes (proc_net(5)).
const ROUTES: &str = "/proc/net/route";

/// The interface of the host's default route; `None` if it has none.
///
/// # Errors
/// The routes cannot be read.
pub fn interface() -> io::Result<Option<String>> {
    let routes = match fs::read_to_string(ROUTES) {
        Err(error) if error.kind() == ErrorKind::NotFound => String::new(),
        routes => routes?,
    };
    Ok(of_default(&routes).map(str::to_owned))
}

/// Of the default route with the lowest metric.
fn of_default(routes: &str) -> Option<&str> {
    let defaults = routes.lines().skip(1).filter_map(|line| {
        let words: Vec<&str> = line.split_ascii_whitespace().collect();
        let is_default = words.get(1) == Some(&"00000000") && words.get(7) == Some(&"00000000");
        let metric: u32 = words.get(6)?.parse().ok()?;
        is_default.then_some((metric, *words.first()?))
    });
    defaults.min().map(|(_, interface)| interface)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_interface_of_the_default_route_is_found() {
        let routes = "Iface\tDestination\tGateway \tFlags\tRefCnt\tUse\tMetric\tMask\t\tMTU\tWindow\tIRTT\n\
                      eth1\t00000000\t0101A8C0\t0003\t0\t0\t100\t00000000\t0\t0\t0\n\
                      eth0\t00000000\t0101A8C0\t0003\t0\t0\t20\t00000000\t0\t0\t0\n\
                      eth2\t0000FEA9\t00000000\t0001\t0\t0\t0\t0000FFFF\t0\t0\t0\n";
        assert_eq!(of_default(routes), Some("eth0"));
        assert_eq!(of_default("Iface\n"), None);
        assert_eq!(of_default("Iface\nrubbish\n\n"), None);
    }
}
