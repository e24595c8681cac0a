//! Names, addresses and who reaches whom.

use std::sync::atomic::{AtomicBool, AtomicUsize, Ordering};
use std::time::Duration;

use k8s_openapi::api::core::v1::{Pod, Service};
use serde_json::json;

use crate::harness::http::get;
use crate::harness::leaks::Leaks;
use crate::harness::node::{Options, free_port, output};
use crate::harness::pods::{busybox, pod_ip, sleeper, with};
use crate::harness::wait::{SOON, poll};
use crate::harness::{Case, on_own_node, on_shared_node};

/// Serves its own name on port 8080.
const SERVE: &str = "mkdir /www; hostname >/www/index.html; echo up; exec httpd -f -p 8080 -h /www";
/// Asks for a page until it is served.
fn ask(address: &str) -> String {
    format!("until timeout 2 wget -qO- http://{address}/ 2>/tmp/error; do cat /tmp/error; sleep 0.2; done")
}

async fn server(t: &Case, name: &str) -> String {
    let metadata = json!({"labels": {"app": name}});
    t.labelled_pod(name, metadata, json!({"terminationGracePeriodSeconds": 1, "containers": [busybox(SERVE)]})).await;
    pod_ip(&t.running(name).await).to_owned()
}

#[test]
#[ignore = "needs cluster: run hack/test"]
fn the_host_reaches_a_pod_by_its_address() {
    on_shared_node(async |t| {
        let address = server(t, "web").await;
        let answer = poll("an answer", SOON, async || get(&format!("{address}:8080"), "/").await).await;
        assert_eq!(answer.text(), "web\n");
    });
}

#[test]
#[ignore = "needs cluster: run hack/test"]
fn a_port_without_a_listener_is_refused_at_once() {
    on_shared_node(async |t| {
        t.pod("quiet", sleeper()).await;
        let address = pod_ip(&t.running("quiet").await).to_owned();
        let began = std::time::Instant::now();
        let refused = get(&format!("{address}:8080"), "/").await.unwrap_err();
        assert!(refused.contains("refused"), "{refused}");
        assert!(began.elapsed().as_millis() < 900, "{:?}", began.elapsed());
    });
}

/// Connects until told to stop, and checks that each try is accepted or refused before a lost packet would be sent
/// again (after a second). How many were refused.
async fn never_left_without_answer(address: &str, stop: impl Fn() -> bool) -> usize {
    let mut refused = 0;
    while !stop() {
        let asked = std::time::Instant::now();
        let within = Duration::from_millis(900);
        match tokio::time::timeout(within, tokio::net::TcpStream::connect(address)).await {
            Ok(Ok(_)) => {}
            Ok(Err(error)) => {
                assert_eq!(error.kind(), std::io::ErrorKind::ConnectionRefused, "{error} after {:?}", asked.elapsed());
                refused += 1;
            }
            Err(_) => panic!("{address} did not answer within {within:?}"),
        }
        tokio::time::sleep(Duration::from_millis(10)).await;
    }
    refused
}

#[test]
#[ignore = "needs cluster: run hack/test"]
fn an_address_refuses_host_and_pods_at_once_while_its_pod_goes_and_when_it_is_gone() {
    on_shared_node(async |t| {
        let ip = server(t, "web").await;
        let address = format!("{ip}:8080");
        poll("an answer", SOON, async || get(&address, "/").await).await;
        let gone = AtomicBool::new(false);
        let going = async {
            t.delete("web", None).await;
            t.gone("web", SOON).await;
            gone.store(true, Ordering::Relaxed);
        };
        let stop = || gone.load(Ordering::Relaxed);
        tokio::join!(never_left_without_answer(&address, stop), going);
        let tries = AtomicUsize::new(0);
        let refused = never_left_without_answer(&address, || tries.fetch_add(1, Ordering::Relaxed) == 20).await;
        assert_eq!(refused, 20);
        let log = t.script(&format!("nc -w 1 {ip} 8080 </dev/null 2>&1 || true")).await;
        assert!(log.contains("refused"), "{log}");
    });
}

#[test]
#[ignore = "needs cluster: run hack/test"]
fn the_address_of_a_pod_that_has_ended_refuses_at_once_while_its_object_stays() {
    on_shared_node(async |t| {
        let pod = t.run_pod("short", json!({"containers": [busybox("true")]})).await;
        // The status says so before the sandbox is stopped.
        let address = format!("{}:8080", pod_ip(&pod));
        let tries = AtomicUsize::new(0);
        let refused = never_left_without_answer(&address, || tries.fetch_add(1, Ordering::Relaxed) == 50).await;
        assert_eq!(refused, 50);
    });
}

#[test]
#[ignore = "needs cluster: run hack/test"]
fn pods_reach_each_other_by_address() {
    on_shared_node(async |t| {
        let address = server(t, "web").await;
        assert_eq!(t.script(&ask(&format!("{address}:8080"))).await, "web\n");
    });
}

#[test]
#[ignore = "needs cluster: run hack/test"]
fn a_pod_sees_its_own_address_and_who_called() {
    on_shared_node(async |t| {
        let log = t.script("ip -o -4 address show eth0 | awk '{print $4}'; ip route | head -n 1").await;
        assert!(t.node.has_address(&log), "{log}");
        assert!(log.contains("default via "), "{log}");
    });
}

#[test]
#[ignore = "needs cluster: run hack/test"]
fn a_pod_reaches_the_host() {
    on_shared_node(async |t| {
        let server = format!("{}:{}", t.cluster.fact("HOST_ADDRESS"), t.cluster.fact("APISERVER_PORT"));
        let (host, port) = server.split_once(':').unwrap();
        assert_eq!(t.script(&format!("nc -w 5 {host} {port} </dev/null && echo open")).await, "open\n");
    });
}

#[test]
#[ignore = "needs cluster: run hack/test"]
fn a_service_reaches_its_pod_from_host_and_pods_and_from_itself() {
    on_shared_node(async |t| {
        if !t.cluster.has_addons() {
            eprintln!("skipped: hack/cluster addons are not up");
            return;
        }
        server(t, "web").await;
        let spec = json!({"spec": {"selector": {"app": "web"}, "ports": [{"port": 80, "targetPort": 8080}]}});
        let service: Service = t.make("shop", spec).await;
        let address = service.spec.unwrap().cluster_ip.unwrap();
        poll("the Service reachable from the host", SOON, async || get(&format!("{address}:80"), "/").await).await;
        assert!(t.script(&ask(&address)).await.ends_with("web\n"));

        let hairpin =
            format!("mkdir /www; echo myself >/www/index.html; httpd -p 8080 -h /www; {}", ask("$MIRROR_SERVICE_HOST"));
        let spec = json!({"spec": {"selector": {"app": "mirror"}, "ports": [{"port": 80, "targetPort": 8080}]}});
        let service: Service = t.make("mirror", spec).await;
        let env = json!([{"name": "MIRROR_SERVICE_HOST", "value": service.spec.unwrap().cluster_ip.unwrap()}]);
        let spec = json!({"restartPolicy": "Never", "containers": [with(busybox(&hairpin), json!({"env": env}))]});
        t.labelled_pod("mirror", json!({"labels": {"app": "mirror"}}), spec).await;
        let log = t.log_with("mirror", "main", "myself").await;
        assert!(log.ends_with("myself\n"), "{log}");
    });
}

#[test]
#[ignore = "needs cluster: run hack/test"]
fn cluster_dns_finds_services_by_short_name() {
    on_shared_node(async |t| {
        if !t.cluster.has_addons() {
            eprintln!("skipped: hack/cluster addons are not up");
            return;
        }
        server(t, "web").await;
        let spec = json!({"spec": {"selector": {"app": "web"}, "ports": [{"port": 80, "targetPort": 8080}]}});
        t.make::<Service>("shop", spec).await;
        assert!(t.script(&ask("shop")).await.ends_with("web\n"));
    });
}

#[test]
#[ignore = "needs cluster: run hack/test"]
fn the_host_name_is_the_pods_name_unless_the_spec_names_one() {
    on_shared_node(async |t| {
        let script = "hostname; hostname -f; cat /etc/hostname; tail -n 1 /etc/hosts";
        let pod = t.run_pod("plain", json!({"containers": [busybox(script)]})).await;
        let log = t.log("plain", "main").await;
        assert_eq!(log, format!("plain\nplain\nplain\n{}\tplain\n", pod_ip(&pod)));

        let spec = json!({"hostname": "db-0", "subdomain": "db", "containers": [busybox(script)]});
        let pod = t.run_pod("named", spec).await;
        let whole = format!("db-0.db.{}.svc.cluster.local", t.namespace);
        let log = t.log("named", "main").await;
        assert_eq!(log, format!("db-0\n{whole}\ndb-0\n{}\t{whole}\tdb-0\n", pod_ip(&pod)));

        let spec = json!({"hostname": "db-0", "subdomain": "d", "setHostnameAsFQDN": true, "containers": [busybox("hostname")]});
        let whole = format!("db-0.d.{}.svc.cluster.local", t.namespace);
        assert_eq!(t.output_of("whole", spec).await, format!("{whole}\n"));
    });
}

#[test]
#[ignore = "needs cluster: run hack/test"]
fn host_aliases_are_in_the_hosts_file() {
    on_shared_node(async |t| {
        let aliases = json!([{"ip": "192.0.2.7", "hostnames": ["seven", "seven.example"]}, {"ip": "192.0.2.8", "hostnames": ["eight"]}]);
        let spec = json!({"hostAliases": aliases, "containers": [busybox("cat /etc/hosts")]});
        let log = t.output_of("aliases", spec).await;
        assert!(log.starts_with("# Kubernetes-managed hosts file.\n127.0.0.1\tlocalhost\n"), "{log}");
        assert!(log.contains("192.0.2.7\tseven\tseven.example\n") && log.contains("192.0.2.8\teight\n"), "{log}");
    });
}

#[test]
#[ignore = "needs cluster: run hack/test"]
fn a_restart_keeps_what_a_container_cannot_change_in_the_hosts_file() {
    on_shared_node(async |t| {
        let aliases = json!([{"ip": "192.0.2.7", "hostnames": ["seven"]}]);
        let script = "grep -c seven /etc/hosts; exit 1";
        let spec = json!({"restartPolicy": "OnFailure", "hostAliases": aliases, "containers": [busybox(script)]});
        t.pod("aliases", spec).await;
        t.until("aliases", "restarted", |p| crate::harness::pods::restarts(p, "main") >= 1).await;
        t.log_with("aliases", "main", "1\n").await;
    });
}

#[test]
#[ignore = "needs cluster: run hack/test"]
fn name_servers_follow_the_dns_policy() {
    on_shared_node(async |t| {
        let read = |policy: &str| json!({"dnsPolicy": policy, "containers": [busybox("cat /etc/resolv.conf")]});
        let first = t.output_of("cluster", read("ClusterFirst")).await;
        let lines: Vec<&str> = first.lines().collect();
        assert_eq!(
            lines[0],
            format!("search {}.svc.cluster.local svc.cluster.local cluster.local", t.namespace).as_str().trim_end(),
            "{first}"
        );
        assert!(lines.contains(&format!("nameserver {}", t.cluster.fact("DNS_IP")).as_str()), "{first}");
        assert!(lines.contains(&"options ndots:5"), "{first}");

        let host = std::fs::read_to_string("/etc/resolv.conf").unwrap_or_default();
        let servers = |text: &str| -> Vec<String> {
            text.lines().filter(|l| l.starts_with("nameserver")).map(str::to_owned).collect()
        };
        let default = t.output_of("default", read("Default")).await;
        assert_eq!(servers(&default), servers(&host), "{default}");

        let mut spec = read("None");
        let options = json!([{"name": "ndots", "value": "2"}, {"name": "edns0"}]);
        spec["dnsConfig"] = json!({"nameservers": ["192.0.2.53"], "searches": ["my.example"], "options": options});
        let none = t.output_of("none", spec.clone()).await;
        assert_eq!(none, "search my.example\nnameserver 192.0.2.53\noptions ndots:2 edns0\n");

        spec["dnsPolicy"] = json!("ClusterFirst");
        let merged = t.output_of("merged", spec).await;
        assert!(
            merged.contains(&format!("nameserver {}\nnameserver 192.0.2.53\n", t.cluster.fact("DNS_IP"))),
            "{merged}"
        );
        assert!(merged.lines().next().unwrap().ends_with(" my.example"), "{merged}");
        assert!(merged.contains("ndots:2") && merged.contains("edns0"), "{merged}");
    });
}

#[test]
#[ignore = "needs cluster: run hack/test"]
fn a_host_port_leads_to_the_pod_from_everywhere_and_ends_with_it() {
    on_shared_node(async |t| {
        let (port, bridge) = (free_port(), t.node.bridge().unwrap());
        let ports = json!({"ports": [{"containerPort": 8080, "hostPort": port}]});
        let main = with(busybox(SERVE), ports);
        t.pod("open", json!({"terminationGracePeriodSeconds": 1, "containers": [main]})).await;
        t.running("open").await;
        let host = t.cluster.fact("HOST_ADDRESS");
        for address in [format!("127.0.0.1:{port}"), format!("{host}:{port}")] {
            let answer = poll("an answer", SOON, async || get(&address, "/").await).await;
            assert_eq!(answer.text(), "open\n", "{address}");
        }
        // From another Pod, and from the Pod itself.
        let from_pod = t.script(&ask(&format!("{host}:{port}"))).await;
        assert_eq!(from_pod, "open\n");
        let itself =
            t.kubectl_text(&["exec", "open", "--", "timeout", "5", "wget", "-qO-", &format!("http://{host}:{port}/")]);
        assert_eq!(itself, "open\n");
        t.delete("open", None).await;
        t.gone("open", SOON).await;
        poll("no rule left", SOON, async || {
            let rules = output("iptables", &["-w", "-t", "nat", "-S"]);
            if rules.contains(&format!("lambdalet:{bridge}:")) { Err(rules) } else { Ok(()) }
        })
        .await;
        assert!(get(&format!("127.0.0.1:{port}"), "/").await.is_err());
    });
}

#[test]
#[ignore = "needs cluster: run hack/test"]
fn on_a_node_with_two_ranges_a_pod_has_an_address_of_each_family() {
    let prefix = format!("fd5c:{:x}:{:x}:", std::process::id() >> 16, std::process::id() & 0xffff);
    let range = format!("--pod-cidr={prefix}:/64");
    on_own_node("dual", Options::flags(&[&range]), async |t| {
        let before = Leaks::of(&t.node);
        let port = free_port();
        let ips = json!({"fieldRef": {"fieldPath": "status.podIPs"}});
        let more =
            json!({"ports": [{"containerPort": 8080, "hostPort": port}], "env": [{"name": "IPS", "valueFrom": ips}]});
        let main = with(busybox(SERVE), more);
        t.pod("web", json!({"terminationGracePeriodSeconds": 1, "containers": [main]})).await;
        let addresses = |pod: &Pod| -> Vec<String> {
            pod.status.iter().flat_map(|s| s.pod_ips.iter().flatten()).map(|ip| ip.ip.clone()).collect()
        };
        let web = t.running("web").await;
        let both = addresses(&web);
        let [four, six] = &both[..] else { panic!("{both:?}") };
        assert!(t.node.has_address(four) && six.starts_with(&prefix), "{both:?}");
        assert_eq!(pod_ip(&web), four);
        let inside = t.kubectl_text(&["exec", "web", "--", "sh", "-c", "echo $IPS; cat /etc/hosts"]);
        assert!(inside.starts_with(&both.join(",")), "{inside}");
        assert!(inside.lines().any(|line| line.starts_with(six) && line.contains("web")), "{inside}");
        for address in [format!("{four}:8080"), format!("[{six}]:8080"), format!("127.0.0.1:{port}")] {
            let answer = poll("an answer", SOON, async || get(&address, "/").await).await;
            assert_eq!(answer.text(), "web\n", "{address}");
        }
        assert_eq!(t.script(&ask(&format!("[{six}]:8080"))).await, "web\n");

        t.node.restart(&t.client).await;
        assert_eq!(addresses(&t.running("web").await), both);
        assert_eq!(get(&format!("[{six}]:8080"), "/").await.unwrap().text(), "web\n");
        let bridge = t.node.bridge().unwrap();
        t.delete("web", None).await;
        t.gone("web", SOON).await;
        assert!(get(&format!("[{six}]:8080"), "/").await.is_err());
        t.kubectl_text(&["delete", "pods", "--all"]);
        poll("no rule left", SOON, async || {
            let rules = output("ip6tables", &["-w", "-t", "nat", "-S"]);
            if rules.contains(&format!("lambdalet:{bridge}:")) { Err(rules) } else { Ok(()) }
        })
        .await;
        before.again(&t.node).await;
    });
}
