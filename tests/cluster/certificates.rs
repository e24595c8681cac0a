//! Certificate files that are replaced under a running node: what it shows, and whom it believes, from then on.

use std::path::{Path, PathBuf};
use std::process::Command;

use rcgen::{BasicConstraints, CertificateParams, DnType, ExtendedKeyUsagePurpose, IsCa, Issuer, KeyPair};
use tempfile::TempDir;

use crate::harness::node::Node;
use crate::harness::on_cluster;
use crate::harness::wait::{SOON, poll};

/// Who asks: a user with every right on nodes.
const USER: &str = "kube-apiserver-kubelet-client";

/// A certificate authority that the cluster knows nothing of, a serving certificate of 127.0.0.1, and a client's.
struct Authority {
    issuer: Issuer<'static, KeyPair>,
    directory: TempDir,
}

impl Authority {
    fn new(name: &str) -> Self {
        let mut params = CertificateParams::default();
        params.distinguished_name.push(DnType::CommonName, name);
        params.is_ca = IsCa::Ca(BasicConstraints::Unconstrained);
        let key = KeyPair::generate().unwrap();
        let directory = tempfile::tempdir().unwrap();
        std::fs::write(directory.path().join("ca.crt"), params.self_signed(&key).unwrap().pem()).unwrap();
        let authority = Self { issuer: Issuer::new(params, key), directory };
        authority.sign("server", &format!("server of {name}"), ExtendedKeyUsagePurpose::ServerAuth);
        authority.sign("client", USER, ExtendedKeyUsagePurpose::ClientAuth);
        authority
    }

    /// NAME.crt and NAME.key.
    fn sign(&self, name: &str, subject: &str, usage: ExtendedKeyUsagePurpose) {
        let mut params = CertificateParams::new(vec!["127.0.0.1".to_owned()]).unwrap();
        params.distinguished_name.push(DnType::CommonName, subject);
        params.extended_key_usages = vec![usage];
        let key = KeyPair::generate().unwrap();
        std::fs::write(self.file(&format!("{name}.crt")), params.signed_by(&key, &self.issuer).unwrap().pem()).unwrap();
        std::fs::write(self.file(&format!("{name}.key")), key.serialize_pem()).unwrap();
    }

    fn file(&self, name: &str) -> PathBuf {
        self.directory.path().join(name)
    }

    fn client(&self) -> Pair {
        Pair(self.file("client.crt"), self.file("client.key"))
    }
}

/// A certificate and its key.
struct Pair(PathBuf, PathBuf);

/// What the node answers to curl, which believes `authority` and comes with a certificate; `000` is no answer.
fn answer(node: &Node, authority: &Path, client: &Pair) -> String {
    let mut curl = Command::new("curl");
    curl.args(["-s", "--noproxy", "*", "--max-time", "10", "-o", "/dev/null", "-w", "%{http_code}", "--cacert"]);
    curl.arg(authority).arg("--cert").arg(&client.0).arg("--key").arg(&client.1);
    let asked = curl.arg(format!("https://127.0.0.1:{}/pods", node.port)).output().unwrap();
    String::from_utf8(asked.stdout).unwrap()
}

/// Waits until these are the answers.
async fn answers(node: &Node, asked: &[(&Path, &Pair, &str)]) {
    let wanted: Vec<_> = asked.iter().map(|(.., wanted)| (*wanted).to_owned()).collect();
    poll(&format!("answering {wanted:?}"), SOON, async || {
        let seen: Vec<_> = asked.iter().map(|(authority, client, _)| answer(node, authority, client)).collect();
        if seen == wanted { Ok(()) } else { Err(format!("{seen:?}\n{}", crate::harness::node::tail(&node.log(), 10))) }
    })
    .await;
}

#[test]
#[ignore = "needs cluster: run hack/test"]
fn certificate_files_that_are_replaced_are_used_without_a_restart() {
    on_cluster(async |cluster, client| {
        let (first, second) = (Authority::new("first"), Authority::new("second"));
        let own = tempfile::tempdir().unwrap();
        let file = |name: &str| own.path().join(name);
        let show = |authority: &Authority| {
            for name in ["server.crt", "server.key"] {
                std::fs::copy(authority.file(name), file(name)).unwrap();
            }
        };
        let ours = std::fs::read_to_string(cluster.dir.join("ca.crt")).unwrap();
        let of_second = std::fs::read_to_string(second.file("ca.crt")).unwrap();
        let api_server = Pair(cluster.dir.join("pki/kubelet-client.crt"), cluster.dir.join("pki/kubelet-client.key"));
        let stranger = second.client();

        show(&first);
        std::fs::write(file("clients.crt"), &ours).unwrap();
        let flag = |name: &str, value: &str| format!("--{name}={}", file(value).display());
        let flags = [
            "--runtime=fake".to_owned(),
            flag("tls-cert-file", "server.crt"),
            flag("tls-private-key-file", "server.key"),
            flag("client-ca-file", "clients.crt"),
        ];
        let node = Node::prepare(cluster, "replaced", &flags);
        node.spawn(&[]);
        node.ready(client).await;
        let pid = node.pid();
        let (shown, to_come) = (first.file("ca.crt"), second.file("ca.crt"));
        let before = [(&*shown, &api_server, "200"), (&*shown, &stranger, "000"), (&*to_come, &api_server, "000")];
        answers(&node, &before).await;

        // Another serving certificate, and one more authority for clients: of the same name, the same user.
        show(&second);
        std::fs::write(file("clients.crt"), format!("{ours}{of_second}")).unwrap();
        let after = [(&*to_come, &api_server, "200"), (&*to_come, &stranger, "200"), (&*shown, &api_server, "000")];
        answers(&node, &after).await;
        let path = format!("/api/v1/nodes/{}/proxy/healthz", node.name);
        let through = cluster.kubectl(&["get", "--raw", &path]).output().unwrap();
        assert_eq!(String::from_utf8_lossy(&through.stdout), "ok", "{through:?}");

        // An authority that is taken away is not believed any more.
        std::fs::write(file("clients.crt"), &ours).unwrap();
        answers(&node, &[(&to_come, &api_server, "200"), (&to_come, &stranger, "000")]).await;
        assert_eq!(node.pid(), pid);
    });
}
