//! The CNI plug-in that a CRI runtime asks for a Pod's network: it answers with the address that the node wrote on the
//! sandbox, and makes nothing, for the node plugs the cable itself. So no address is handed out twice, whichever driver
//! a Pod has.
//!
//! It is this program under another name, `lambdalet-cni`. The protocol is CNI 1.0 (containernetworking/cni, SPEC.md).

use std::io::{Read as _, Write as _};
use std::net::IpAddr;
use std::process::ExitCode;

use serde_json::{Value, json};

use crate::runtime::cri::ADDRESS_ANNOTATION as ADDRESS;

/// The name by which a CNI configuration calls this program.
const NAME: &str = "lambdalet-cni";
/// What a runtime puts a sandbox's annotations under, if the configuration lists that capability.
const ANNOTATIONS: &str = "io.kubernetes.cri.pod-annotations";
const VERSIONS: [&str; 2] = ["1.0.0", "1.1.0"];
/// Most bytes of a configuration that are read.
const LONGEST: u64 = 1 << 20;
/// "Invalid network config" of the specification.
const INVALID: u32 = 7;
/// "Incompatible CNI version".
const INCOMPATIBLE: u32 = 1;

/// Whether this process was started as the plug-in.
pub fn is_asked() -> bool {
    let called = std::env::args_os().next().map(std::path::PathBuf::from);
    called.is_some_and(|path| path.file_name().is_some_and(|name| name == NAME))
}

/// Answers on standard output, as the specification has it.
pub fn answer() -> ExitCode {
    let variable = |name: &str| std::env::var(name).unwrap_or_default();
    let mut config = Vec::new();
    let read = std::io::stdin().take(LONGEST).read_to_end(&mut config);
    let config = read.ok().and_then(|_| serde_json::from_slice(&config).ok()).unwrap_or(Value::Null);
    let said = said(&variable("CNI_COMMAND"), &config, (&variable("CNI_IFNAME"), &variable("CNI_NETNS")));
    let (text, code) = match said {
        Ok(Value::Null) => (String::new(), ExitCode::SUCCESS),
        Ok(result) => (result.to_string(), ExitCode::SUCCESS),
        Err(error) => (error.to_string(), ExitCode::FAILURE),
    };
    // A runtime that does not read gets no answer either way.
    let _ = std::io::stdout().write_all(text.as_bytes());
    code
}

/// The result of a command, or the error's own form.
fn said(command: &str, config: &Value, (interface, namespace): (&str, &str)) -> Result<Value, Value> {
    let version = config["cniVersion"].as_str().unwrap_or(VERSIONS[0]);
    let failed = |code: u32, msg: &str, details: String| json!({"cniVersion": version, "code": code, "msg": msg, "details": details});
    match command {
        "VERSION" => Ok(json!({"cniVersion": VERSIONS[1], "supportedVersions": VERSIONS})),
        "ADD" if !VERSIONS.contains(&version) => {
            Err(failed(INCOMPATIBLE, "the CNI version of the configuration is not spoken", VERSIONS.join(", ")))
        }
        "ADD" => {
            let text = config["runtimeConfig"][ANNOTATIONS][ADDRESS].as_str().unwrap_or_default();
            let addresses: Result<Vec<IpAddr>, _> = text.split(',').map(str::parse).collect();
            let Ok(addresses) = addresses else {
                let why = format!(
                    "annotation {ADDRESS} is {text:?}: this is no Pod of a lambdalet node, or the \
                    configuration does not list the capability {ANNOTATIONS}"
                );
                return Err(failed(INVALID, "the Pod has no address of a lambdalet node", why));
            };
            let alone = |address: &IpAddr| {
                let length = if address.is_ipv4() { 32 } else { 128 };
                json!({"address": format!("{address}/{length}"), "interface": 0})
            };
            Ok(json!({
                "cniVersion": version,
                "interfaces": [{"name": interface, "sandbox": namespace}],
                "ips": addresses.iter().map(alone).collect::<Vec<_>>(),
            }))
        }
        // Nothing was made, so there is nothing to take away or to look after.
        _ => Ok(Value::Null),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn config(address: &str) -> Value {
        json!({"cniVersion": "1.0.0", "type": NAME, "runtimeConfig": {ANNOTATIONS: {ADDRESS: address, "x": "y"}}})
    }

    #[test]
    fn the_address_on_the_sandbox_is_what_the_runtime_is_told() {
        for (address, told) in [("10.1.2.3", "10.1.2.3/32"), ("fd00::7", "fd00::7/128")] {
            let result = said("ADD", &config(address), ("eth0", "/run/netns/x")).unwrap();
            assert_eq!(result["ips"][0]["address"], told);
            let both = said("ADD", &config("fd00::7,10.1.2.3"), ("eth0", "/n")).unwrap();
            assert_eq!(
                (&both["ips"][0]["address"], &both["ips"][1]["address"]),
                (&json!("fd00::7/128"), &json!("10.1.2.3/32"))
            );
            assert_eq!(result["interfaces"][0], json!({"name": "eth0", "sandbox": "/run/netns/x"}));
        }
    }

    #[test]
    fn a_pod_of_somebody_else_is_refused_and_told_why() {
        for config in [config(""), json!({"cniVersion": "1.0.0"})] {
            let error = said("ADD", &config, ("eth0", "/n")).unwrap_err();
            assert_eq!(error["code"], INVALID);
            assert!(error["details"].as_str().unwrap().contains("no Pod of a lambdalet node"), "{error}");
        }
        let old = json!({"cniVersion": "0.2.0"});
        assert_eq!(said("ADD", &old, ("eth0", "/n")).unwrap_err()["code"], INCOMPATIBLE);
    }

    #[test]
    fn the_rest_has_nothing_to_do() {
        for command in ["DEL", "CHECK", "GC", "STATUS"] {
            assert_eq!(said(command, &Value::Null, ("", "")), Ok(Value::Null));
        }
        assert_eq!(said("VERSION", &Value::Null, ("", "")).unwrap()["supportedVersions"][0], "1.0.0");
    }
}
