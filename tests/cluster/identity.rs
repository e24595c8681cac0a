//! The node's credentials on a real control plane: bootstrap, rotation, the serving certificate and its approval.

use std::fs::File;
use std::io::Write as _;
use std::os::unix::fs::PermissionsExt as _;
use std::path::{Path, PathBuf};
use std::process::{Child, Command, Stdio};
use std::sync::Arc;

use base64::Engine as _;
use jiff::Timestamp;
use k8s_openapi::api::certificates::v1::CertificateSigningRequest;
use kube::api::ListParams;
use kube::{Api, Client};
use lambdalet::certificate::{self, Certificate};
use rcgen::{CertificateParams, DistinguishedName, DnType, ExtendedKeyUsagePurpose, Issuer, KeyPair};
use rustls::{ClientConfig, RootCertStore};
use rustls_pki_types::pem::PemObject as _;
use rustls_pki_types::{CertificateDer, ServerName};
use tokio_rustls::TlsConnector;

use crate::harness::cluster::Cluster;
use crate::harness::node::{Node, tail};
use crate::harness::on_cluster;
use crate::harness::wait::{SOON, poll};

/// A node that has no kubeconfig yet, only a bootstrap token. Its Pods would be remembered, not run.
fn newcomer(cluster: &Cluster, name: &str, flags: &[&str]) -> Node {
    let bootstrap = cluster.bootstrap_kubeconfig();
    let mut all = vec!["--runtime".to_owned(), "fake".to_owned(), "--bootstrap-kubeconfig".to_owned()];
    all.push(bootstrap.display().to_string());
    all.extend(flags.iter().map(|flag| (*flag).to_owned()));
    let node = Node::prepare(cluster, name, &all);
    node.lead_to(node.root.join("node.kubeconfig"));
    node
}

fn pair(node: &Node, kind: &str) -> PathBuf {
    node.root.join(format!("pki/kubelet-{kind}-current.pem"))
}

/// The requests a node made for a signer.
async fn requests(client: &Client, node: &Node, signer: &str) -> Vec<CertificateSigningRequest> {
    let requests: Api<CertificateSigningRequest> = Api::all(client.clone());
    let params = ListParams::default().fields(&format!("spec.signerName=kubernetes.io/{signer}"));
    let user = format!("system:node:{}", node.name);
    let asks = |request: &CertificateSigningRequest| {
        x509_parser::pem::parse_x509_pem(&request.spec.request.0)
            .is_ok_and(|(_, pem)| String::from_utf8_lossy(&pem.contents).contains(&user))
    };
    requests.list(&params).await.unwrap().items.into_iter().filter(asks).collect()
}

/// A node's certificate signed by the cluster's CA as its controller manager would, but near its end.
fn nearly_over(cluster: &Cluster, node: &Node) -> String {
    let authority = KeyPair::from_pem(&std::fs::read_to_string(cluster.dir.join("ca.key")).unwrap()).unwrap();
    let mut issuer = CertificateParams::default();
    issuer.distinguished_name = DistinguishedName::new();
    issuer.distinguished_name.push(DnType::CommonName, "lambdalet-hack-ca");
    let issuer = Issuer::new(issuer, authority);
    let key = KeyPair::generate().unwrap();
    let mut params = CertificateParams::default();
    params.distinguished_name = DistinguishedName::new();
    params.distinguished_name.push(DnType::OrganizationName, "system:nodes");
    params.distinguished_name.push(DnType::CommonName, format!("system:node:{}", node.name));
    params.extended_key_usages = vec![ExtendedKeyUsagePurpose::ClientAuth];
    params.not_before = rcgen::date_time_ymd(2000, 1, 1);
    let tomorrow = Timestamp::now().to_zoned(jiff::tz::TimeZone::UTC).date().tomorrow().unwrap();
    let (month, day) = (tomorrow.month().unsigned_abs(), tomorrow.day().unsigned_abs());
    params.not_after = rcgen::date_time_ymd(tomorrow.year().into(), month, day);
    let pem = params.signed_by(&key, &issuer).unwrap().pem();
    format!("{pem}{}", key.serialize_pem())
}

#[test]
#[ignore = "needs cluster: run hack/test"]
fn a_node_with_a_bootstrap_token_becomes_a_node_and_stays_one() {
    on_cluster(async |cluster, client| {
        let node = newcomer(cluster, "newcomer", &[]);
        node.spawn(&[]);
        node.ready(client).await;
        let file = pair(&node, "client");
        let first = Certificate::of_pair(&file).unwrap();
        assert_eq!(first.common_name, format!("system:node:{}", node.name));
        for path in [&file, &node.root.join("node.kubeconfig")] {
            assert_eq!(std::fs::metadata(path).unwrap().permissions().mode() & 0o777, 0o600, "{}", path.display());
        }
        assert_eq!(requests(client, &node, "kube-apiserver-client-kubelet").await.len(), 1);
        assert!(!node.root.join("pki/kubelet-client.key.tmp").exists());

        // Near its end it is renewed while the node runs, by the identity it replaces, and the new one is used.
        certificate::write(&file, nearly_over(cluster, &node).as_bytes(), 0o600).unwrap();
        let second = poll("renewed", SOON, async || match Certificate::of_pair(&file) {
            Ok(found) if found.not_before.to_zoned(jiff::tz::TimeZone::UTC).year() > 2000 && found != first => {
                Ok(found)
            }
            found => Err(format!("{found:?}\n{}", tail(&node.log(), 20))),
        })
        .await;
        assert_eq!(second.common_name, first.common_name);
        poll("using the new certificate", SOON, async || {
            let taken = node.log().matches("took over changed credentials").count();
            if taken >= 1 && node.log().contains("the one there is near its end") { Ok(()) } else { Err(node.log()) }
        })
        .await;
        let asked = requests(client, &node, "kube-apiserver-client-kubelet").await;
        let by_itself = asked.iter().filter(|r| r.spec.username == Some(first.common_name.clone())).count();
        assert_eq!((asked.len(), by_itself), (2, 1));

        // Expired while it was down: the token is used once more.
        node.kill9();
        let expired = {
            let key = KeyPair::generate().unwrap();
            let mut params = CertificateParams::default();
            params.distinguished_name.push(DnType::CommonName, first.common_name.clone());
            params.not_after = rcgen::date_time_ymd(2001, 1, 1);
            format!("{}{}", params.self_signed(&key).unwrap().pem(), key.serialize_pem())
        };
        certificate::write(&file, expired.as_bytes(), 0o600).unwrap();
        node.spawn(&[]);
        node.adopted(client).await;
        assert!(Certificate::of_pair(&file).unwrap().not_after > Timestamp::now());
        assert_eq!(requests(client, &node, "kube-apiserver-client-kubelet").await.len(), 3);

        // Expired while it runs, as after a long outage: the same, without a restart.
        let pid = node.pid();
        certificate::write(&file, expired.as_bytes(), 0o600).unwrap();
        poll("asked for by the token", SOON, async || match Certificate::of_pair(&file) {
            Ok(found) if found.not_after > Timestamp::now() => Ok(()),
            found => Err(format!("{found:?}\n{}", tail(&node.log(), 20))),
        })
        .await;
        assert_eq!(requests(client, &node, "kube-apiserver-client-kubelet").await.len(), 4);
        assert_eq!(node.pid(), pid);
    });
}

/// A running `lambdalet controller`; ended when it is dropped.
struct Controller {
    process: Child,
    log: PathBuf,
}

impl Controller {
    /// With the rights of its manifest, and no others.
    fn start(cluster: &Cluster, name: &str) -> Self {
        let manifest = Path::new(env!("CARGO_MANIFEST_DIR")).join("manifests/controller-rbac.yaml");
        let applied = cluster.kubectl(&["apply", "-f", &manifest.display().to_string()]).output().unwrap();
        assert!(applied.status.success(), "{}", String::from_utf8_lossy(&applied.stderr));
        let kubeconfig = cluster.user_kubeconfig("system:serviceaccount:kube-system:lambdalet-controller");
        let log = std::env::temp_dir().join(format!("lambdalet-controller-{name}-{}.log", std::process::id()));
        let file = File::create(&log).unwrap();
        let process = Command::new(env!("CARGO_BIN_EXE_lambdalet"))
            .args(["controller", "--v", "2", "--kubeconfig"])
            .arg(kubeconfig)
            .stdin(Stdio::null())
            .stdout(file.try_clone().unwrap())
            .stderr(file)
            .spawn()
            .unwrap();
        Self { process, log }
    }

    fn log(&self) -> String {
        std::fs::read_to_string(&self.log).unwrap()
    }

    fn works(&self) -> bool {
        self.log().contains("approving serving certificates")
    }
}

impl Drop for Controller {
    fn drop(&mut self) {
        // It may have ended already.
        let _ = self.process.kill();
        self.process.wait().unwrap();
        if std::thread::panicking() {
            eprintln!("--- log of a controller\n{}", tail(&self.log(), 60));
        }
        let _ = std::fs::remove_file(&self.log);
    }
}

/// What the node shows to who connects, as the API server would judge it: signed by the cluster's CA or not.
async fn shown(cluster: &Cluster, node: &Node) -> Result<(), String> {
    let roots = CertificateDer::pem_file_iter(cluster.dir.join("ca.crt")).unwrap();
    let mut store = RootCertStore::empty();
    store.add_parsable_certificates(roots.map(Result::unwrap));
    let config = ClientConfig::builder().with_root_certificates(store).with_no_client_auth();
    let stream = tokio::net::TcpStream::connect(("127.0.0.1", node.port)).await.map_err(|e| e.to_string())?;
    let name = ServerName::try_from(node.name.clone()).unwrap();
    TlsConnector::from(Arc::new(config)).connect(name, stream).await.map(drop).map_err(|e| e.to_string())
}

#[test]
#[ignore = "needs cluster: run hack/test"]
fn a_serving_certificate_is_asked_for_approved_by_the_controller_and_shown_without_a_restart() {
    on_cluster(async |cluster, client| {
        let node = newcomer(cluster, "serving", &["--rotate-server-certificates"]);
        node.spawn(&[]);
        node.ready(client).await;
        // Nobody approves yet: the node serves all the same, with a certificate of its own.
        let asked = poll("asked", SOON, async || {
            requests(client, &node, "kubelet-serving").await.pop().ok_or_else(|| tail(&node.log(), 20))
        })
        .await;
        assert_eq!(asked.spec.username, Some(format!("system:node:{}", node.name)));
        let refused = poll("answering", SOON, async || match shown(cluster, &node).await {
            Err(error) if error.contains("UnknownIssuer") => Ok(error),
            other => Err(format!("{other:?}")),
        })
        .await;
        assert!(refused.contains("UnknownIssuer"), "{refused}");

        let pid = node.pid();
        let first = Controller::start(cluster, "first");
        poll("trusted by the cluster's CA", SOON, async || shown(cluster, &node).await).await;
        assert_eq!(node.pid(), pid);
        assert!(first.works());
        let certificate = Certificate::of_pair(&pair(&node, "server")).unwrap();
        assert_eq!(certificate.names.dns, [node.name.clone()].into());

        // A second replica waits for the first one's lease, and takes over when it is given back.
        let mut first = first;
        let second = Controller::start(cluster, "second");
        nix::sys::signal::kill(
            nix::unistd::Pid::from_raw(first.process.id().try_into().unwrap()),
            nix::sys::signal::Signal::SIGTERM,
        )
        .unwrap();
        let ended = poll("ended", SOON, async || first.process.try_wait().unwrap().ok_or_else(|| first.log())).await;
        assert!(ended.success(), "{}", first.log());
        poll("at work", SOON, async || if second.works() { Ok(()) } else { Err(second.log()) }).await;

        // The same node asks for somebody else's name: that is left alone.
        let foreign = foreign_request(&node);
        let as_node = cluster.node_kubeconfig(&node.name);
        let mut create = cluster.kubectl(&["create", "-f", "-"]);
        create.arg("--kubeconfig").arg(as_node).stdin(Stdio::piped()).stdout(Stdio::null());
        let mut create = create.spawn().unwrap();
        create.stdin.take().unwrap().write_all(foreign.to_string().as_bytes()).unwrap();
        assert!(create.wait().unwrap().success());
        let name = foreign["metadata"]["name"].as_str().unwrap().to_owned();
        poll("looked at", SOON, async || {
            if second.log().contains("is not in the Node's status.addresses") { Ok(()) } else { Err(second.log()) }
        })
        .await;
        let all: Api<CertificateSigningRequest> = Api::all(client.clone());
        let left = all.get(&name).await.unwrap();
        assert!(left.status.and_then(|status| status.conditions).is_none());
        assert_eq!(left.metadata.finalizers, Some(vec!["lambdalet.dev/kubelet-serving".to_owned()]));
        // It goes, and not unseen.
        all.delete(&name, &kube::api::DeleteParams::default()).await.unwrap();
        poll("gone", SOON, async || match all.get_opt(&name).await.unwrap() {
            None => Ok(()),
            Some(there) => Err(format!("{:?}\n{}", there.metadata, second.log())),
        })
        .await;
        assert!(second.log().contains("was deleted undecided"), "{}", second.log());
    });
}

/// A request in the node's own name for an address that is not its.
fn foreign_request(node: &Node) -> serde_json::Value {
    let key = KeyPair::generate().unwrap();
    let mut params = CertificateParams::new(vec![node.name.clone(), "10.99.99.99".to_owned()]).unwrap();
    params.distinguished_name = DistinguishedName::new();
    params.distinguished_name.push(DnType::OrganizationName, "system:nodes");
    params.distinguished_name.push(DnType::CommonName, format!("system:node:{}", node.name));
    let pem = params.serialize_request(&key).unwrap().pem().unwrap();
    serde_json::json!({
        "apiVersion": "certificates.k8s.io/v1",
        "kind": "CertificateSigningRequest",
        "metadata": { "name": format!("foreign-{}", node.name) },
        "spec": {
            "request": base64::engine::general_purpose::STANDARD.encode(pem),
            "signerName": "kubernetes.io/kubelet-serving",
            "usages": ["digital signature", "server auth"],
        },
    })
}
