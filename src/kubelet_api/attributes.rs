//! Pure: what right a request needs.

use http::Method;

/// What a request asks of the authorizer: `verb` on `nodes/<subresource>` for any one of the subresources.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) struct Attributes {
    /// The API verb.
    pub(super) verb: &'static str,
    /// Tried in order; one that is allowed is enough.
    pub(super) subresources: &'static [&'static str],
}

/// The right a request needs, by the kubelet's own mapping with its fine-grained subresources
/// (Kubernetes documentation, "Kubelet authentication/authorization"; KEP-2862); `None` for a method no kubelet knows.
pub(super) fn attributes(method: &Method, path: &str) -> Option<Attributes> {
    Some(Attributes { verb: verb(method)?, subresources: subresources(path) })
}

fn verb(method: &Method) -> Option<&'static str> {
    match *method {
        // HEAD tells nothing that GET does not.
        Method::GET | Method::HEAD => Some("get"),
        Method::POST => Some("create"),
        Method::PUT => Some("update"),
        Method::PATCH => Some("patch"),
        Method::DELETE => Some("delete"),
        _ => None,
    }
}

/// The path is taken as it stands on the wire, just as the router takes it: an encoded or doubled slash reaches no
/// handler and so needs the widest right.
fn subresources(path: &str) -> &'static [&'static str] {
    let first = path.strip_prefix('/').unwrap_or_default().split('/').next().unwrap_or_default();
    match first {
        "stats" => &["stats"],
        "metrics" => &["metrics"],
        "logs" => &["log"],
        "checkpoint" => &["checkpoint"],
        "pods" | "runningpods" => &["pods", "proxy"],
        "healthz" => &["healthz", "proxy"],
        "configz" => &["configz", "proxy"],
        "statusz" => &["statusz"],
        // The flags are configuration, and kubelet asks for no right of their own.
        "flagz" => &["configz"],
        _ => &["proxy"],
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn each_path_needs_the_subresource_a_kubelet_asks_for() {
        let table: &[(&str, &[&str])] = &[
            ("/stats/summary", &["stats"]),
            ("/stats", &["stats"]),
            ("/metrics", &["metrics"]),
            ("/metrics/resource", &["metrics"]),
            ("/metrics/cadvisor", &["metrics"]),
            ("/logs/", &["log"]),
            ("/logs/syslog", &["log"]),
            ("/checkpoint/ns/pod/c", &["checkpoint"]),
            ("/pods", &["pods", "proxy"]),
            ("/pods/", &["pods", "proxy"]),
            ("/runningpods/", &["pods", "proxy"]),
            ("/healthz", &["healthz", "proxy"]),
            ("/healthz/syncloop", &["healthz", "proxy"]),
            ("/configz", &["configz", "proxy"]),
            ("/statusz", &["statusz"]),
            ("/containerLogs/ns/pod/c", &["proxy"]),
            ("/exec/ns/pod/c", &["proxy"]),
            ("/attach/ns/pod/c", &["proxy"]),
            ("/portForward/ns/pod", &["proxy"]),
            ("/run/ns/pod/c", &["proxy"]),
            ("/debug/pprof/profile", &["proxy"]),
            ("/flagz", &["configz"]),
            ("/", &["proxy"]),
            ("", &["proxy"]),
            // No way around by look-alikes.
            ("/podsx", &["proxy"]),
            ("/metricsx", &["proxy"]),
            ("/Metrics", &["proxy"]),
            ("//metrics", &["proxy"]),
            ("/%6detrics", &["proxy"]),
            ("/exec/../metrics", &["proxy"]),
            ("/metrics%2f..%2fexec", &["proxy"]),
        ];
        for (path, wanted) in table {
            assert_eq!(attributes(&Method::GET, path).unwrap().subresources, *wanted, "{path}");
        }
    }

    #[test]
    fn each_method_is_a_verb() {
        let table = [
            (Method::GET, Some("get")),
            (Method::HEAD, Some("get")),
            (Method::POST, Some("create")),
            (Method::PUT, Some("update")),
            (Method::PATCH, Some("patch")),
            (Method::DELETE, Some("delete")),
            (Method::OPTIONS, None),
            (Method::CONNECT, None),
            (Method::TRACE, None),
        ];
        for (method, wanted) in table {
            assert_eq!(attributes(&method, "/pods").map(|attributes| attributes.verb), wanted, "{method}");
        }
    }
}
