//! The plugins that clusters have, as Debian packages them (`containernetworking-plugins`): bridge, host-local, portmap,
//! bandwidth.

use std::net::{SocketAddr, TcpStream};

use super::*;
use crate::network::bridge::tests::{ask, shell};

const PLUGINS: &str = "/usr/lib/cni";
/// Lets IPv6 addresses be used at once: nobody else is on these links.
const AT_ONCE_SIX: &str = "echo 0 >/proc/sys/net/ipv6/conf/default/accept_dad";

/// Runs the test on a host of its own with a network of these plugins, or says why not.
fn on_their_network<F: Future<Output = ()>>(test: impl FnOnce(Bench, Cni) -> F + Send + 'static) {
    if !Path::new(PLUGINS).join("bridge").exists() {
        println!("skipped: {PLUGINS} has no plugins (apt-get install containernetworking-plugins)");
        return;
    }
    on_a_host(async move || {
        shell(AT_ONCE_SIX);
        let bench = Bench::new();
        bench.configure(&network(&bench, "0.4.0"));
        let cni = open(&bench);
        cni.ready().await.unwrap();
        test(bench, cni).await;
    });
}

fn network(bench: &Bench, version: &str) -> Value {
    let ranges = json!([[{"subnet": "10.9.7.0/24"}], [{"subnet": "fd09:7::/64"}]]);
    let ipam = json!({"type": "host-local", "ranges": ranges, "dataDir": bench.path("leases"),
        "routes": [{"dst": "0.0.0.0/0"}, {"dst": "::/0"}]});
    json!({"cniVersion": version, "name": "pods", "plugins": [
        {"type": "bridge", "bridge": "cni0", "isGateway": true, "ipMasq": true, "hairpinMode": true, "ipam": ipam},
        {"type": "portmap", "capabilities": {"portMappings": true}, "snat": true},
        {"type": "bandwidth", "capabilities": {"bandwidth": true}},
    ]})
}

fn open(bench: &Bench) -> Cni {
    let root = bench.path("root");
    let bin_dirs = vec![PLUGINS.into()];
    Cni::new(CniOptions { conf_dir: bench.path("conf"), bin_dirs, root, patience: PATIENCE })
}

/// Everything on the host that a sandbox could leave: links but the bridge, rules, leases.
fn traces(bench: &Bench) -> String {
    let leases = bench.path("leases/pods");
    let leases = fs::read_dir(leases).into_iter().flatten().flatten().map(|entry| entry.file_name());
    let leases: Vec<String> = leases.filter_map(|name| name.into_string().ok()).collect();
    let leases: Vec<_> = leases.iter().filter(|name| name.starts_with("10.") || name.starts_with("fd")).collect();
    let links = shell("ip -o link | grep -v -e ' lo:' -e ' cni0:' || true");
    let rules =
        shell("(iptables-save; ip6tables-save) | grep -e 10.9.7 -e fd09 -e CNI-DN -e 'CNI-[0-9a-f]\\{8\\}' || true");
    format!("{leases:?}\n{links}{rules}")
}

fn wish(host_port: u16) -> Attachment {
    let port = HostPort { protocol: Protocol::Tcp, host_ip: None, host_port, pod_port: 80 };
    Attachment { wish: Wish { ports: vec![port], ..Wish::default() }, ..attachment() }
}

fn answers(at: &str) -> bool {
    let at: SocketAddr = at.parse().unwrap();
    TcpStream::connect_timeout(&at, Duration::from_secs(2)).is_ok()
}

#[test]
fn pods_of_debians_plugins_reach_each_other_by_both_families_and_leave_nothing() {
    on_their_network(async |bench, cni| {
        let before = traces(&bench);
        let (a, b) = (Namespace::new(), Namespace::new());
        a.sees(AT_ONCE_SIX);
        b.sees(AT_ONCE_SIX);
        let of_a = cni.attach(a.tid, "sandbox-a", &wish(8081)).await.unwrap();
        let of_b = cni.attach(b.tid, "sandbox-b", &attachment()).await.unwrap();
        assert_eq!(of_a.iter().map(IpAddr::is_ipv4).collect::<Vec<_>>(), [true, false]);
        for address in &of_a {
            a.listen(*address);
            assert_eq!(b.ask(*address).unwrap(), of_b[usize::from(address.is_ipv6())].to_string());
            ask(*address).unwrap();
        }
        assert!(answers("127.0.0.1:8081") && answers("10.9.7.1:8081"), "the port of the host");
        assert_ne!(traces(&bench), before);

        // Another process finds both whole, and takes one away that has lost its process.
        let again = open(&bench);
        assert_eq!(again.attached("sandbox-a").await.unwrap(), of_a);
        assert_eq!(again.attached("sandbox-b").await.unwrap(), of_b);
        drop(a);
        again.unplug("sandbox-a").await.unwrap();
        assert!(!answers("127.0.0.1:8081"));
        again.unplug("sandbox-b").await.unwrap();
        assert_eq!(traces(&bench), before);
        assert!(bench.is_clean());
    });
}

#[test]
fn a_crash_between_debians_plugins_leaves_nothing_once_it_is_undone() {
    on_their_network(async |bench, cni| {
        let before = traces(&bench);
        let pod = Namespace::new();
        // The bridge's part is done, the record has no result: as after kill -9.
        let record = cni.record("sandbox", &wish(8082)).await.unwrap();
        cni.inner.records.write(&record).unwrap();
        let namespaces = cni.inner.namespaces.clone();
        let namespace = on_thread({
            let tid = pod.tid;
            move || namespaces.keep("sandbox", tid)
        })
        .await
        .unwrap();
        let about = About { sandbox: "sandbox", namespace: Some(&namespace), args: &record.args };
        let told = record.network.told(&record.network.plugins[0], &record.capabilities, None);
        cni.inner.plugins.call("bridge", Call { command: "ADD", about: Some(about) }, &told).await.unwrap();
        assert_ne!(traces(&bench), before);
        let again = open(&bench);
        assert!(again.attached("sandbox").await.is_err());
        assert_eq!(again.sweep(again.known().unwrap(), &BTreeSet::new()).await, 1);
        assert_eq!(traces(&bench), before);
        assert!(bench.is_clean());
    });
}

#[test]
fn debians_plugins_speak_the_older_versions_too() {
    on_their_network(async |bench, _| {
        for version in ["0.3.1", "1.0.0"] {
            bench.configure(&network(&bench, version));
            let (cni, pod) = (open(&bench), Namespace::new());
            cni.ready().await.unwrap();
            let before = traces(&bench);
            let addresses = cni.attach(pod.tid, "sandbox", &wish(8084)).await.unwrap();
            pod.listen(addresses[0]);
            ask(addresses[0]).unwrap();
            assert!(answers("127.0.0.1:8084"), "{version}");
            open(&bench).attached("sandbox").await.unwrap();
            cni.unplug("sandbox").await.unwrap();
            assert_eq!(traces(&bench), before, "{version}");
        }
    });
}
