//! The binary as an operator meets it: help, version, completion, and one clear message for each mistake.

// Helpers of tests may unwrap as tests do.
#![allow(clippy::unwrap_used)]

use std::net::SocketAddr;
use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::time::Duration;

use assert_cmd::Command;
use base64::Engine;
use base64::engine::general_purpose::STANDARD;
use rcgen::{BasicConstraints, CertificateParams, CertifiedIssuer, IsCa, KeyPair, date_time_ymd};
use tempfile::TempDir;

/// Flags that scripts written for a kubelet rely on, and our own.
const RUN_FLAGS: [&str; 54] = [
    "kubeconfig",
    "bootstrap-kubeconfig",
    "cert-dir",
    "rotate-certificates",
    "rotate-server-certificates",
    "tls-min-version",
    "tls-cipher-suites",
    "config",
    "node-name",
    "node-ip",
    "node-labels",
    "register-with-taints",
    "register-node",
    "max-pods",
    "system-reserved",
    "kube-reserved",
    "node-status-update-frequency",
    "virtual-kubelet-label",
    "drain-on-exit",
    "address",
    "port",
    "client-ca-file",
    "tls-cert-file",
    "tls-private-key-file",
    "cri-listen",
    "root-dir",
    "cluster-dns",
    "cluster-domain",
    "pod-cidr",
    "non-masquerade-cidr",
    "cni-conf-dir",
    "cni-bin-dir",
    "runtime",
    "docker-endpoint",
    "container-runtime-endpoint",
    "sandbox-image",
    "insecure-registries",
    "guest-image",
    "kernel-image",
    "vm-asset-dirs",
    "microvm-accel",
    "vmm",
    "microvm-pin-cpus",
    "microvm-warm",
    "microvm-host-paths",
    "function-server-addr",
    "function-server-tls-cert-file",
    "function-server-tls-private-key-file",
    "function-server-client-ca-file",
    "function-server-memory",
    "resource-manager-addr",
    "resource-manager-port",
    "v",
    "log-format",
];

/// Longer than any of these calls takes; one that starts a node by mistake would never end.
const PATIENCE: Duration = Duration::from_secs(60);

fn lambdalet(args: &[&str]) -> (bool, String, String) {
    let mut command = Command::new(env!("CARGO_BIN_EXE_lambdalet"));
    command.args(args).env_remove("KUBECONFIG").env_remove("RUST_LOG").timeout(PATIENCE);
    let output = command.output().unwrap();
    let text = |bytes: &[u8]| String::from_utf8_lossy(bytes).into_owned();
    (output.status.success(), text(&output.stdout), text(&output.stderr))
}

/// The stderr of a call that must fail, on one line after the first.
fn refused(args: &[&str]) -> String {
    let (success, _, stderr) = lambdalet(args);
    assert!(!success, "{args:?} succeeded");
    assert!(!stderr.contains("panicked"), "{stderr}");
    stderr
}

struct Files(TempDir);

impl Files {
    fn new() -> Self {
        Self(tempfile::tempdir().unwrap())
    }

    fn path(&self, name: &str) -> PathBuf {
        self.0.path().join(name)
    }

    fn write(&self, name: &str, text: &str) -> String {
        std::fs::write(self.path(name), text).unwrap();
        self.path(name).display().to_string()
    }

    /// A kubeconfig for a server, with a CA and whatever else stands under `user`.
    fn kubeconfig(&self, server: &str, ca_pem: &str, user: &str) -> String {
        let ca = STANDARD.encode(ca_pem);
        self.write(
            "kubeconfig",
            &format!(
                "apiVersion: v1\nkind: Config\ncurrent-context: c\n\
                 contexts: [{{name: c, context: {{cluster: c, user: u}}}}]\n\
                 clusters: [{{name: c, cluster: {{server: '{server}', certificate-authority-data: {ca}}}}}]\n\
                 users: [{{name: u, user: {{{user}}}}}]\n"
            ),
        )
    }
}

fn authority(name: &str) -> CertifiedIssuer<'static, KeyPair> {
    let mut params = CertificateParams::new(Vec::new()).unwrap();
    params.is_ca = IsCa::Ca(BasicConstraints::Unconstrained);
    params.distinguished_name.push(rcgen::DnType::CommonName, name);
    CertifiedIssuer::self_signed(params, KeyPair::generate().unwrap()).unwrap()
}

/// A TLS server on loopback that shows a certificate of `issuer` and answers nothing.
fn tls_server(issuer: &CertifiedIssuer<'static, KeyPair>) -> SocketAddr {
    let _ = rustls::crypto::ring::default_provider().install_default();
    let key = KeyPair::generate().unwrap();
    let params = CertificateParams::new(vec!["localhost".to_owned(), "127.0.0.1".to_owned()]).unwrap();
    let certificate = params.signed_by(&key, issuer).unwrap();
    let key = rustls_pki_types::PrivateKeyDer::try_from(key.serialize_der()).unwrap();
    let config = rustls::ServerConfig::builder()
        .with_no_client_auth()
        .with_single_cert(vec![certificate.der().clone()], key)
        .unwrap();
    let listener = std::net::TcpListener::bind("127.0.0.1:0").unwrap();
    let address = listener.local_addr().unwrap();
    std::thread::spawn(move || {
        for stream in listener.incoming() {
            let (Ok(mut stream), Ok(mut tls)) = (stream, rustls::ServerConnection::new(Arc::new(config.clone())))
            else {
                return;
            };
            // A handshake that fails is what the test is about.
            let _ = tls.complete_io(&mut stream);
        }
    });
    address
}

#[test]
fn help_lists_every_flag() {
    let (success, stdout, _) = lambdalet(&["run", "--help"]);
    assert!(success);
    for flag in RUN_FLAGS {
        assert!(stdout.contains(&format!("--{flag}")), "--{flag} is not in the help");
    }
    let (_, stdout, _) = lambdalet(&["--help"]);
    for command in ["run", "check", "functions", "invoke", "top", "cri", "version", "completion"] {
        assert!(stdout.contains(command), "{command}");
    }
}

#[test]
fn the_version_is_printed_for_people_and_for_scripts() {
    let (success, stdout, _) = lambdalet(&["version"]);
    assert!(success && stdout.starts_with(&format!("lambdalet {}", env!("CARGO_PKG_VERSION"))), "{stdout}");
    let (_, stdout, _) = lambdalet(&["version", "--output", "json"]);
    let object: serde_json::Value = serde_json::from_str(&stdout).unwrap();
    assert_eq!(object["lambdaletVersion"], env!("CARGO_PKG_VERSION"));
    assert!(object["kubeletVersion"].as_str().unwrap().starts_with("v1."), "{object}");
}

#[test]
fn completion_scripts_are_made_for_each_shell() {
    for shell in ["bash", "zsh", "fish", "elvish", "powershell"] {
        let (success, stdout, _) = lambdalet(&["completion", shell]);
        assert!(success && stdout.contains("node-labels"), "{shell}");
    }
    let directory = Files::new();
    let script = directory.write("completion.bash", &lambdalet(&["completion", "bash"]).1);
    let status = std::process::Command::new("bash").args(["-n", &script]).status().unwrap();
    assert!(status.success(), "bash does not accept it");
}

#[test]
fn an_unknown_runtime_is_answered_with_those_there_are() {
    let stderr = refused(&["run", "--runtime", "podman"]);
    assert!(stderr.contains("podman") && stderr.contains("docker, microvm, cri, fake"), "{stderr}");
}

#[test]
fn values_of_flags_are_refused_by_name() {
    for (flag, value, expected) in [
        ("--node-name", "No_Good", "No_Good"),
        ("--node-labels", "node-restriction.kubernetes.io/a=b", "cannot be set by a node"),
        ("--register-with-taints", "a=b:Sometimes", "NoSchedule"),
        ("--system-reserved", "gpu=1", "gpu"),
        ("--kube-reserved", "cpu=many", "many"),
        ("--node-ip", "127.0.0.1", "127.0.0.1"),
        ("--node-ip", "10.0.0.1,10.0.0.2", "one family"),
        ("--pod-cidr", "10.0.0.0", "--pod-cidr"),
        ("--pod-cidr", "10.1.0.0/16,10.2.0.0/16", "both are of one family"),
        ("--non-masquerade-cidr", "10.1.0.0/16,10.2.0.0/16", "both are of one family"),
        ("--cni-bin-dir", "/plugins", "--cni-conf-dir"),
        ("--cluster-dns", "dns.local", "--cluster-dns"),
        ("--insecure-registries", "http://a", "without http://"),
        ("--node-status-update-frequency", "10", "10s"),
        ("--tls-cert-file", "/c", "--tls-private-key-file"),
        ("--port", "70000", "70000"),
        ("--cri-listen", "cri.sock", "unix:// and an absolute path"),
        ("--function-server-addr", "localhost", "[IPv6]:PORT"),
        ("--function-server-addr", "0.0.0.0:50051", "--function-server-client-ca-file"),
        ("--function-server-tls-cert-file", "/c", "belong together"),
        ("--resource-manager-port", "50052", "--resource-manager-addr (RESMNGR_ADDR)"),
    ] {
        let stderr = refused(&["run", flag, value]);
        assert!(stderr.contains(expected), "{flag} {value}: {stderr}");
    }
}

#[test]
fn what_cannot_be_had_beside_cni_plugins_is_said() {
    for (more, expected) in [
        (["--runtime", "microvm"], "CNI plugins make the network of Pods on Docker only, and --runtime is microvm"),
        (["--function-server-addr", "50051"], "need the node's own network"),
    ] {
        let stderr = refused(&[&["run", "--cni-conf-dir", "/etc/cni/net.d"], &more[..]].concat());
        assert!(stderr.contains(expected), "{more:?}: {stderr}");
    }
}

#[test]
fn the_old_name_of_the_node_name_flag_is_understood() {
    let stderr = refused(&["run", "--hostname-override", "n1"]);
    assert!(stderr.contains("pass --kubeconfig"), "{stderr}");
}

#[test]
fn a_configuration_file_that_cannot_be_used_is_named() {
    let files = Files::new();
    let stderr = refused(&["run", "--config", "/nowhere/node.yaml"]);
    assert!(stderr.contains("/nowhere/node.yaml") && stderr.contains("No such file"), "{stderr}");
    let head = "apiVersion: kubelet.config.k8s.io/v1beta1\nkind: KubeletConfiguration\n";
    let path = files.write("type.yaml", &format!("{head}maxPods: lots\n"));
    let stderr = refused(&["run", "--config", &path]);
    assert!(stderr.contains(&path) && stderr.contains("maxPods") && stderr.contains("line 3"), "{stderr}");
    let path = files.write("yaml.yaml", "a: [\n");
    assert!(refused(&["run", "--config", &path]).contains(&path));
    let path = files.write("pod.yaml", "apiVersion: v1\nkind: Pod\n");
    assert!(refused(&["run", "--config", &path]).contains("KubeletConfiguration"));
}

#[test]
fn what_a_configuration_file_says_in_vain_is_logged_once() {
    let files = Files::new();
    let path = files.write(
        "c.yaml",
        "apiVersion: kubelet.config.k8s.io/v1beta1\nkind: KubeletConfiguration\nvolumePluginDir: /m\nwrong: 1\n",
    );
    let stderr = refused(&["run", "--config", &path, "--log-format", "json"]);
    let line = stderr.lines().find(|line| line.contains("volumePluginDir")).expect("a warning");
    let object: serde_json::Value = serde_json::from_str(line).unwrap();
    assert_eq!(object["level"], "WARN");
    assert!(object["message"].as_str().unwrap().contains("volumePluginDir, wrong"), "{object}");
}

#[test]
fn a_kubeconfig_that_cannot_be_used_is_named() {
    let files = Files::new();
    assert!(refused(&["run"]).contains("pass --kubeconfig"));
    let stderr = refused(&["run", "--kubeconfig", "/nowhere/kc"]);
    assert!(stderr.contains("there is no kubeconfig /nowhere/kc"), "{stderr}");

    let secret = "users:\n- name: u\n  user: {token: hunter2}\n  x: [\n";
    let path = files.write("bad", secret);
    let stderr = refused(&["run", "--kubeconfig", &path]);
    assert!(stderr.contains(&path) && stderr.contains("malformed") && stderr.contains("line "), "{stderr}");
    assert!(!stderr.contains("hunter2"), "a secret is in the log: {stderr}");

    let path = files.write("empty", "");
    assert!(refused(&["run", "--kubeconfig", &path]).contains("current context"));
    let path = files.kubeconfig("https://127.0.0.1:1", "no certificate", "token: t");
    let stderr = refused(&["run", "--kubeconfig", &path]);
    assert!(stderr.contains(&path) && stderr.contains("holds no certificate"), "{stderr}");
}

#[test]
fn commands_for_functions_say_what_keeps_them_from_asking() {
    let files = Files::new();
    let (_, help, _) = lambdalet(&["invoke", "--help"]);
    for word in ["--data", "--path", "--namespace", "--kubeconfig", "Exit code", "@FILE"] {
        assert!(help.contains(word), "{word} is not in\n{help}");
    }
    let (_, help, _) = lambdalet(&["functions", "--help"]);
    for word in ["--all-namespaces", "--watch", "--namespace", "--kubeconfig"] {
        assert!(help.contains(word), "{word} is not in\n{help}");
    }
    for command in [&["functions"][..], &["invoke", "f"], &["top"], &["top", "--once", "-o", "json"]] {
        let missing = refused(&[command, &["--kubeconfig", "/nowhere/kc"]].concat());
        assert!(missing.contains("there is no kubeconfig /nowhere/kc"), "{missing}");
        let path = files.kubeconfig("https://127.0.0.1:1", &authority("some").pem(), "token: t");
        let away = refused(&[command, &["--kubeconfig", &path]].concat());
        assert!(away.contains("https://127.0.0.1:1") && away.contains("cannot be reached"), "{away}");
    }
    assert!(refused(&["invoke"]).contains("<POD>"));
    assert!(refused(&["invoke", "f", "--data", "@/nowhere/data"]).contains("/nowhere/data"));
    for command in ["functions", "top"] {
        assert!(refused(&[command, "-A", "-n", "x"]).contains("cannot be used with"));
    }
    let (_, help, _) = lambdalet(&["top", "--help"]);
    for wanted in ["--once", "--node", "--output", "-A, --all-namespaces", "nodes/proxy"] {
        assert!(help.contains(wanted), "{wanted} in {help}");
    }
}

#[test]
fn an_expired_client_certificate_is_named_with_its_time() {
    let (files, ca) = (Files::new(), authority("ca"));
    let key = KeyPair::generate().unwrap();
    let mut params = CertificateParams::new(Vec::new()).unwrap();
    params.not_before = date_time_ymd(2020, 1, 1);
    params.not_after = date_time_ymd(2021, 1, 1);
    let certificate = params.signed_by(&key, &ca).unwrap();
    let (certificate, key) = (STANDARD.encode(certificate.pem()), STANDARD.encode(key.serialize_pem()));
    let user = format!("client-certificate-data: {certificate}, client-key-data: {key}");
    let path = files.kubeconfig("https://127.0.0.1:1", &ca.pem(), &user);
    let stderr = refused(&["run", "--kubeconfig", &path]);
    assert!(stderr.contains("expired at 2021-01-01T00:00:00Z") && stderr.contains(&path), "{stderr}");
}

#[test]
fn check_tells_a_wrong_ca_from_a_server_that_is_away() {
    let (files, theirs, ours) = (Files::new(), authority("theirs"), authority("ours"));
    let server = format!("https://{}", tls_server(&theirs));
    let path = files.kubeconfig(&server, &ours.pem(), "token: t");
    let (success, stdout, _) = lambdalet(&["check", "--kubeconfig", &path, "--runtime", "fake"]);
    assert!(!success);
    assert!(stdout.contains(&format!("CA in {path} did not sign")), "{stdout}");

    let path = files.kubeconfig("https://127.0.0.1:1", &ours.pem(), "token: t");
    let (success, stdout, _) = lambdalet(&["check", "--kubeconfig", &path, "--runtime", "fake"]);
    assert!(!success);
    assert!(stdout.contains("https://127.0.0.1:1/") && stdout.contains("cannot be reached"), "{stdout}");
}

#[test]
fn check_changes_nothing_and_names_what_is_missing() {
    let files = Files::new();
    let root = files.path("root");
    let socket = format!("unix://{}", files.path("docker.sock").display());
    let (success, stdout, _) =
        lambdalet(&["check", "--root-dir", &root.display().to_string(), "--docker-endpoint", &socket]);
    assert!(!success);
    assert!(stdout.contains("FAIL  docker") && stdout.contains("FAIL  kubeconfig"), "{stdout}");
    assert!(!Path::new(&root).exists());
}
