//! One request that is right, and everything that can be wrong with it.

use k8s_openapi::ByteString;
use k8s_openapi::api::certificates::v1::{
    CertificateSigningRequestCondition, CertificateSigningRequestSpec, CertificateSigningRequestStatus,
};
use k8s_openapi::api::core::v1::{NodeAddress, NodeStatus};
use k8s_openapi::apimachinery::pkg::apis::meta::v1::Time;
use proptest::prelude::*;
use rcgen::{
    Attribute, BasicConstraints, CertificateParams, CustomExtension, DistinguishedName, DnType, IsCa, KeyPair,
    KeyUsagePurpose, SanType,
};

use super::*;

/// What a node asks for, before it is signed.
struct Asked {
    params: CertificateParams,
    attributes: Vec<Attribute>,
    request: CertificateSigningRequest,
    node: Node,
    others: Others,
    /// Around the PEM text.
    before: &'static str,
    after: &'static str,
}

impl Asked {
    /// As node `a` asks.
    fn right() -> Self {
        let mut params = CertificateParams::new(vec!["a".to_owned(), "10.0.0.1".to_owned()]).unwrap();
        params.distinguished_name = DistinguishedName::new();
        params.distinguished_name.push(DnType::OrganizationName, GROUP);
        params.distinguished_name.push(DnType::CommonName, "system:node:a");
        let spec = CertificateSigningRequestSpec {
            signer_name: SIGNER.to_owned(),
            username: Some("system:node:a".to_owned()),
            groups: Some(vec![GROUP.to_owned(), "system:authenticated".to_owned()]),
            usages: Some(vec!["digital signature".to_owned(), "server auth".to_owned()]),
            ..CertificateSigningRequestSpec::default()
        };
        let all = [("InternalIP", "10.0.0.1"), ("InternalIP", "fd00::1"), ("Hostname", "a"), ("ExternalDNS", "a.test")];
        let others = Others {
            nodes: vec![node("a", &all), node("b", &[("InternalIP", "10.0.0.2"), ("InternalDNS", "b.test")])],
            service_ranges: vec!["10.96.0.0/12".parse().unwrap(), "fd96::/108".parse().unwrap()],
        };
        let request = CertificateSigningRequest { spec, ..CertificateSigningRequest::default() };
        Self { params, attributes: Vec::new(), request, node: node("a", &all), others, before: "", after: "" }
    }

    fn verdict(mut self) -> Verdict {
        let key = KeyPair::generate().unwrap();
        let pem = self.params.serialize_request_with_attributes(&key, self.attributes).unwrap().pem().unwrap();
        self.request.spec.request = ByteString(format!("{}{pem}{}", self.before, self.after).into_bytes());
        verdict(&self.request, Some(&self.node), &self.others)
    }

    fn san(&mut self, name: SanType) {
        self.params.subject_alt_names.push(name);
    }

    /// The node asks for a name or address and says in its status that it has it.
    fn claim(&mut self, type_: &str, what: &str) {
        self.san(match type_ {
            "InternalIP" | "ExternalIP" => SanType::IpAddress(what.parse().unwrap()),
            _ => dns(what),
        });
        let addresses = self.node.status.as_mut().unwrap().addresses.as_mut().unwrap();
        addresses.push(NodeAddress { type_: type_.into(), address: what.into() });
    }

    fn condition(&mut self, type_: &str) {
        let condition =
            CertificateSigningRequestCondition { type_: type_.into(), ..CertificateSigningRequestCondition::default() };
        let conditions = Some(vec![condition]);
        self.request.status = Some(CertificateSigningRequestStatus { conditions, certificate: None });
    }
}

/// A Node that says so of itself.
fn node(name: &str, addresses: &[(&str, &str)]) -> Node {
    let address = |(type_, address): &(&str, &str)| NodeAddress { type_: (*type_).into(), address: (*address).into() };
    let mut node = Node::default();
    node.metadata.name = Some(name.to_owned());
    let addresses = Some(addresses.iter().map(address).collect());
    node.status = Some(NodeStatus { addresses, ..NodeStatus::default() });
    node
}

fn boot(node: &mut Node, id: &str) {
    let info = node.status.get_or_insert_default().node_info.get_or_insert_default();
    info.boot_id = id.to_owned();
}

fn dns(name: &str) -> SanType {
    SanType::DnsName(name.try_into().unwrap())
}

/// What is changed, and the change.
type Deviation = (&'static str, fn(&mut Asked));

/// Everything that may be different, each by itself enough to refuse.
const DEVIATIONS: [Deviation; 42] = [
    ("another signer", |a| a.request.spec.signer_name = "kubernetes.io/kube-apiserver-client-kubelet".into()),
    ("approved", |a| a.condition("Approved")),
    ("denied", |a| a.condition("Denied")),
    ("failed", |a| a.condition("Failed")),
    ("being deleted", |a| a.request.metadata.deletion_timestamp = Some(Time(jiff::Timestamp::UNIX_EPOCH))),
    ("nobody", |a| a.request.spec.username = None),
    ("no node", |a| a.request.spec.username = Some("system:node:".into())),
    ("a person", |a| a.request.spec.username = Some("admin".into())),
    ("a service account", |a| a.request.spec.username = Some("system:serviceaccount:x:a".into())),
    ("another node asks", |a| a.request.spec.username = Some("system:node:c".into())),
    ("no groups", |a| a.request.spec.groups = None),
    ("other groups", |a| a.request.spec.groups = Some(vec!["system:masters".into()])),
    ("no usages", |a| a.request.spec.usages = None),
    ("no server auth", |a| a.request.spec.usages = Some(vec!["digital signature".into()])),
    ("no signature", |a| a.request.spec.usages = Some(vec!["server auth".into()])),
    ("client auth too", |a| a.request.spec.usages.get_or_insert_default().push("client auth".into())),
    ("cert sign too", |a| a.request.spec.usages.get_or_insert_default().push("cert sign".into())),
    ("another name", |a| a.params.distinguished_name.push(DnType::CommonName, "system:node:b")),
    ("no name", |a| {
        a.params.distinguished_name = DistinguishedName::new();
        a.params.distinguished_name.push(DnType::OrganizationName, GROUP);
    }),
    ("no organization", |a| {
        a.params.distinguished_name = DistinguishedName::new();
        a.params.distinguished_name.push(DnType::CommonName, "system:node:a");
    }),
    ("another organization", |a| a.params.distinguished_name.push(DnType::OrganizationName, "system:masters")),
    ("a unit too", |a| a.params.distinguished_name.push(DnType::OrganizationalUnitName, "x")),
    ("another DNS name", |a| a.san(dns("b"))),
    ("a wildcard", |a| a.san(dns("*"))),
    ("the API server", |a| a.san(dns("kubernetes.default.svc"))),
    ("another address", |a| a.san(SanType::IpAddress("10.0.0.2".parse().unwrap()))),
    ("a mail address", |a| a.san(SanType::Rfc822Name("a@test".try_into().unwrap()))),
    ("a URI", |a| a.san(SanType::URI("spiffe://a".try_into().unwrap()))),
    ("no names", |a| a.params.subject_alt_names.clear()),
    ("an authority", |a| a.params.is_ca = IsCa::Ca(BasicConstraints::Unconstrained)),
    ("key usage by extension", |a| a.params.key_usages = vec![KeyUsagePurpose::KeyCertSign]),
    ("an unknown extension", |a| {
        a.params.custom_extensions.push(CustomExtension::from_oid_content(&[1, 2, 3, 4], vec![5, 0]));
    }),
    ("a challenge", |a| {
        a.attributes.push(Attribute { oid: &[1, 2, 840, 113549, 1, 9, 7], values: vec![0x31, 3, 0x0c, 1, b'x'] });
    }),
    ("text before", |a| a.before = "x\n"),
    ("something after", |a| a.after = "-----BEGIN CERTIFICATE REQUEST-----\nMAA=\n-----END CERTIFICATE REQUEST-----\n"),
    ("another Node", |a| a.node.metadata.name = Some("b".into())),
    ("the API server, as it says", |a| a.claim("InternalDNS", "kubernetes.default.svc")),
    ("a Service's address, as it says", |a| a.claim("InternalIP", "10.96.0.1")),
    ("another Node's address, as it says", |a| a.claim("InternalIP", "10.0.0.2")),
    ("another Node's name, as it says", |a| a.claim("ExternalDNS", "b")),
    ("loopback, as it says", |a| a.claim("InternalIP", "127.0.0.1")),
    ("a Node that goes", |a| a.node.metadata.deletion_timestamp = Some(Time(jiff::Timestamp::UNIX_EPOCH))),
];

#[test]
fn what_a_node_asks_for_itself_is_approved() {
    assert_eq!(Asked::right().verdict(), Verdict::Approve);
    let mut rsa = Asked::right();
    rsa.request.spec.usages.as_mut().unwrap().push("key encipherment".into());
    assert_eq!(rsa.verdict(), Verdict::Approve);
    let mut all = Asked::right();
    all.san(dns("a.test"));
    all.san(SanType::IpAddress("fd00::1".parse().unwrap()));
    assert_eq!(all.verdict(), Verdict::Approve);
}

#[test]
fn each_deviation_is_refused() {
    for (what, change) in DEVIATIONS {
        let mut asked = Asked::right();
        change(&mut asked);
        assert_ne!(asked.verdict(), Verdict::Approve, "{what}");
    }
}

#[test]
fn what_the_node_may_still_say_is_looked_at_again_and_the_rest_is_not() {
    let of = |change: fn(&mut Asked)| {
        let mut asked = Asked::right();
        change(&mut asked);
        asked.verdict()
    };
    assert!(matches!(of(|a| a.san(dns("b"))), Verdict::NotYet(_)));
    assert!(matches!(of(|a| a.node.status = None), Verdict::NotYet(_)));
    assert!(matches!(of(|a| a.request.spec.groups = None), Verdict::Never(_)));
    assert_eq!(of(|a| a.condition("Denied")), Verdict::Nothing);
    let mut alone = Asked::right();
    let pem = alone.params.serialize_request(&KeyPair::generate().unwrap()).unwrap().pem().unwrap();
    alone.request.spec.request = ByteString(pem.into_bytes());
    assert!(matches!(verdict(&alone.request, None, &alone.others), Verdict::NotYet(_)));
}

#[test]
fn a_node_is_not_believed_what_is_a_services_another_nodes_or_everybodys() {
    let claims = |type_, what: &str| {
        let mut asked = Asked::right();
        asked.claim(type_, what);
        asked.verdict()
    };
    for name in [
        "kubernetes",
        "Kubernetes.Default",
        "kubernetes.default.svc",
        "kubernetes.default.svc.cluster.local",
        "db.shop.svc",
        "db-0.db.shop.SVC.example.org",
        "10-1-2-3.shop.pod.cluster.local",
        "localhost",
        "a.localhost",
        "*.test",
        "a..test",
        "-a.test",
        "a.test.",
        "10.0.0.1",
    ] {
        assert!(matches!(claims("InternalDNS", name), Verdict::Never(_)), "{name}");
    }
    for ip in ["127.0.0.1", "127.8.8.8", "::1", "0.0.0.0", "::", "224.0.0.1", "ff02::1", "169.254.169.254", "fe80::1"] {
        assert!(matches!(claims("InternalIP", ip), Verdict::Never(_)), "{ip}");
    }
    assert!(matches!(claims("InternalIP", "::ffff:127.0.0.1"), Verdict::Never(_)));
    for ip in ["10.96.0.10", "fd96::1", "::ffff:10.96.0.1", "10.0.0.2"] {
        assert!(matches!(claims("ExternalIP", ip), Verdict::NotYet(_)), "{ip}");
    }
    for name in ["b", "B", "b.test", "B.Test"] {
        assert!(matches!(claims("Hostname", name), Verdict::NotYet(_)), "{name}");
    }
    for name in ["kubernetes-1", "node.svc.example.org", "svc.example.org", "ip-10-0-0-1.eu.internal", "1234", "A1"] {
        assert_eq!(claims("ExternalDNS", name), Verdict::Approve, "{name}");
    }
    for ip in ["10.0.0.3", "192.168.7.7", "fd00::2", "203.0.113.5"] {
        assert_eq!(claims("InternalIP", ip), Verdict::Approve, "{ip}");
    }
}

#[test]
fn two_nodes_of_one_host_may_have_its_address_but_not_each_others_names() {
    let asks = |type_, what: &str, boots: [&str; 2]| {
        let mut asked = Asked::right();
        asked.claim(type_, what);
        boot(&mut asked.node, boots[0]);
        boot(&mut asked.others.nodes[1], boots[1]);
        asked.verdict()
    };
    assert_eq!(asks("InternalIP", "10.0.0.2", ["one", "one"]), Verdict::Approve);
    assert!(matches!(asks("InternalIP", "10.0.0.2", ["one", "two"]), Verdict::NotYet(_)));
    assert!(matches!(asks("InternalIP", "10.0.0.2", ["", ""]), Verdict::NotYet(_)));
    assert!(matches!(asks("Hostname", "b", ["one", "one"]), Verdict::NotYet(_)));
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(128))]

    /// However many things are wrong at once, none hides another.
    #[test]
    fn any_set_of_deviations_is_refused(chosen in proptest::collection::btree_set(0..DEVIATIONS.len(), 1..5)) {
        let mut asked = Asked::right();
        for index in &chosen {
            (DEVIATIONS[*index].1)(&mut asked);
        }
        let what: Vec<_> = chosen.iter().map(|index| DEVIATIONS[*index].0).collect();
        prop_assert_ne!(asked.verdict(), Verdict::Approve, "{:?}", what);
    }

    /// No name or address beyond the Node's own passes.
    #[test]
    fn any_other_name_or_address_is_refused(name in "[a-z*][a-z0-9.-]{0,20}", ip in any::<u128>(), v4 in any::<bool>()) {
        let ip = if v4 { IpAddr::from((ip as u32).to_be_bytes()) } else { IpAddr::from(ip.to_be_bytes()) };
        let known = addresses(&Asked::right().node);
        prop_assume!(!known.dns.contains(&name) && !known.ip.contains(&ip));
        for other in [dns(&name), SanType::IpAddress(ip)] {
            let mut asked = Asked::right();
            asked.san(other);
            prop_assert_ne!(asked.verdict(), Verdict::Approve);
        }
    }

    /// Rubbish neither passes nor panics.
    #[test]
    fn any_bytes_are_refused(bytes in proptest::collection::vec(any::<u8>(), 0..200)) {
        let mut asked = Asked::right();
        asked.request.spec.request = ByteString(bytes);
        prop_assert!(matches!(verdict(&asked.request, Some(&asked.node), &asked.others), Verdict::Never(_)));
    }
}
