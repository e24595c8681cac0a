//! The plugins' side of the network: with small scripts in their place, and with Debian's.

mod debian;

use std::fs;
use std::os::unix::fs::PermissionsExt as _;
use std::path::Path;

use super::*;
use crate::network::bridge::tests::{Namespace, on_a_host};
use crate::network::ports::Protocol;

/// Says what it was asked, and does what the test wrote down for that: `PLUGIN.COMMAND` beside it.
const SCRIPT: &str = r#"#!/bin/sh
here=$(dirname "$0"); name=$(basename "$0")
cat >"$here/told.$name.$CNI_COMMAND"
echo "$name $CNI_COMMAND" >>"$here/calls"
printf '%s|%s|%s|%s' "$CNI_CONTAINERID" "$CNI_IFNAME" "$CNI_ARGS" "$CNI_NETNS" >"$here/env.$name.$CNI_COMMAND"
if [ -e "$here/$name.$CNI_COMMAND" ]; then . "$here/$name.$CNI_COMMAND"; exit; fi
case $CNI_COMMAND in
  ADD) echo '{"cniVersion": "1.0.0", "ips": [{"address": "10.9.0.2/24"}], "by": "'"$name"'"}' ;;
  VERSION) echo '{"cniVersion": "1.0.0", "supportedVersions": ["0.3.1", "0.4.0", "1.0.0", "1.1.0"]}' ;;
esac
"#;

struct Bench {
    dir: tempfile::TempDir,
}

impl Bench {
    /// Two plugins, `one` and `two`, and a network of both.
    fn new() -> Self {
        let bench = Self { dir: tempfile::tempdir().unwrap() };
        for sub in ["conf", "bin"] {
            fs::create_dir(bench.path(sub)).unwrap();
        }
        bench.plugin("one");
        bench.plugin("two");
        bench.configure(&bench.network());
        bench
    }

    fn path(&self, sub: &str) -> PathBuf {
        self.dir.path().join(sub)
    }

    fn network(&self) -> Value {
        json!({"cniVersion": "1.0.0", "name": "pods", "plugins": [
            {"type": "one"}, {"type": "two", "capabilities": {"portMappings": true, "bandwidth": true, "ipRanges": true}},
        ]})
    }

    fn plugin(&self, name: &str) {
        let path = self.path("bin").join(name);
        fs::write(&path, SCRIPT).unwrap();
        fs::set_permissions(&path, fs::Permissions::from_mode(0o755)).unwrap();
    }

    fn does(&self, plugin: &str, command: &str, script: &str) {
        fs::write(self.path("bin").join(format!("{plugin}.{command}")), script).unwrap();
    }

    fn configure(&self, network: &Value) {
        fs::write(self.path("conf").join("10-pods.conflist"), network.to_string()).unwrap();
    }

    /// The network as a process of the node has it.
    fn open(&self) -> Cni {
        self.patient(Duration::from_secs(20))
    }

    fn patient(&self, patience: Duration) -> Cni {
        let bin_dirs = vec![self.path("none"), self.path("bin")];
        let cni = Cni::new(CniOptions { conf_dir: self.path("conf"), bin_dirs, root: self.path("root"), patience });
        cni.set_ranges(vec!["10.9.0.0/24".parse().unwrap()]);
        cni
    }

    /// What was called since the last time.
    fn calls(&self) -> Vec<String> {
        let path = self.path("bin").join("calls");
        let text = fs::read_to_string(&path).unwrap_or_default();
        let _ = fs::remove_file(path);
        text.lines().map(str::to_owned).collect()
    }

    fn told(&self, plugin: &str, command: &str) -> Value {
        let text = fs::read(self.path("bin").join(format!("told.{plugin}.{command}"))).unwrap();
        serde_json::from_slice(&text).unwrap()
    }

    fn environment(&self, plugin: &str, command: &str) -> Vec<String> {
        let text = fs::read_to_string(self.path("bin").join(format!("env.{plugin}.{command}"))).unwrap();
        text.split('|').map(str::to_owned).collect()
    }

    /// Nothing is written down, and nothing mounted.
    fn is_clean(&self) -> bool {
        let names = |sub: &str| fs::read_dir(self.path("root").join(sub)).map_or(0, Iterator::count);
        (names("results"), names("namespaces")) == (0, 0) && mounts(self.dir.path()) == 0
    }
}

impl Drop for Bench {
    fn drop(&mut self) {
        // Of a test that failed.
        for entry in fs::read_dir(self.path("root/namespaces")).into_iter().flatten().flatten() {
            let _ = nix::mount::umount2(&entry.path(), nix::mount::MntFlags::MNT_DETACH);
        }
    }
}

fn mounts(below: &Path) -> usize {
    let text = fs::read_to_string("/proc/self/mountinfo").unwrap();
    text.lines().filter(|line| line.contains(&*below.to_string_lossy())).count()
}

fn attachment() -> Attachment {
    Attachment { namespace: "default".to_owned(), name: "web".to_owned(), uid: "u-1".to_owned(), wish: Wish::default() }
}

fn text(error: &NetworkError) -> String {
    chain(error)
}

#[test]
fn plugins_are_called_in_order_with_the_result_before_and_undone_in_reverse() {
    on_a_host(async || {
        let (bench, pod) = (Bench::new(), Namespace::new());
        let cni = bench.open();
        let port = HostPort { protocol: Protocol::Udp, host_ip: None, host_port: 53, pod_port: 5353 };
        let wish = Wish { ports: vec![port], ingress: Some(1_000_000), egress: None };
        let addresses = cni.attach(pod.tid, "s1", &Attachment { wish, ..attachment() }).await.unwrap();
        assert_eq!(addresses, ["10.9.0.2".parse::<IpAddr>().unwrap()]);
        assert_eq!(bench.calls(), ["one ADD", "two ADD"]);
        let told = bench.told("two", "ADD");
        assert_eq!(
            (&told["name"], &told["cniVersion"], &told["type"]),
            (&json!("pods"), &json!("1.0.0"), &json!("two"))
        );
        assert_eq!(told["prevResult"]["by"], "one");
        assert_eq!(
            told["runtimeConfig"],
            json!({
                "portMappings": [{"hostPort": 53, "containerPort": 5353, "protocol": "udp", "hostIP": ""}],
                "bandwidth": {"ingressRate": 1_000_000, "ingressBurst": u32::MAX},
                "ipRanges": [[{"subnet": "10.9.0.0/24"}]],
            })
        );
        assert_eq!(bench.told("one", "ADD").get("runtimeConfig"), None);
        let namespace = bench.path("root/namespaces/s1").display().to_string();
        let args =
            "IgnoreUnknown=1;K8S_POD_NAMESPACE=default;K8S_POD_NAME=web;K8S_POD_INFRA_CONTAINER_ID=s1;K8S_POD_UID=u-1";
        assert_eq!(bench.environment("one", "ADD"), ["s1", "eth0", args, &namespace]);
        assert!(pod.sees("ip -o link show lo").contains("LOOPBACK,UP"));

        assert_eq!(cni.attach(pod.tid, "s1", &attachment()).await.unwrap(), addresses);
        assert!(bench.calls().is_empty(), "it is plugged in already");
        assert_eq!(bench.open().attached("s1").await.unwrap(), addresses);
        assert_eq!(bench.calls(), ["one CHECK", "two CHECK"]);

        cni.unplug("s1").await.unwrap();
        assert_eq!(bench.calls(), ["two DEL", "one DEL"]);
        assert_eq!(bench.told("one", "DEL")["prevResult"]["by"], "two");
        assert_eq!(bench.environment("one", "DEL"), ["s1", "eth0", args, &namespace]);
        cni.unplug("s1").await.unwrap();
        assert!(bench.calls().is_empty() && bench.is_clean());
    });
}

#[test]
fn what_fails_half_way_is_told_in_the_plugins_words_and_taken_away_by_another_process() {
    on_a_host(async || {
        let (bench, pod) = (Bench::new(), Namespace::new());
        bench.does("two", "ADD", r#"echo '{"code": 7, "msg": "no room", "details": "all taken"}'; exit 1"#);
        let error = bench.open().attach(pod.tid, "s1", &attachment()).await.unwrap_err();
        assert_eq!(text(&error), "CNI plugin two failed ADD: no room; all taken (code 7)");
        // The process ends here; another one finds the sandbox.
        let next = bench.open();
        let error = next.attached("s1").await.unwrap_err();
        assert_eq!(text(&error), "sandbox s1 was not plugged in completely");
        assert_eq!(next.known().unwrap(), ["s1"]);
        bench.calls();
        bench.does("one", "DEL", "echo broken >&2; exit 3");
        let error = next.unplug("s1").await.unwrap_err();
        assert_eq!(text(&error), "CNI plugin one failed DEL with exit status: 3: \"broken\"");
        assert_eq!(next.known().unwrap(), ["s1"], "it is tried again");
        bench.does("one", "DEL", "exit 0");
        next.unplug("s1").await.unwrap();
        assert_eq!(bench.calls(), ["two DEL", "one DEL", "two DEL", "one DEL"]);
        assert_eq!(bench.told("two", "DEL")["prevResult"]["by"], "one", "what there was is told");
        assert!(bench.is_clean());
    });
}

#[test]
fn a_sandbox_that_was_half_plugged_is_undone_before_it_is_plugged_again() {
    on_a_host(async || {
        let (bench, pod) = (Bench::new(), Namespace::new());
        bench.does("two", "ADD", "exit 1");
        bench.open().attach(pod.tid, "s1", &attachment()).await.unwrap_err();
        fs::remove_file(bench.path("bin/two.ADD")).unwrap();
        bench.calls();
        bench.open().attach(pod.tid, "s1", &attachment()).await.unwrap();
        assert_eq!(bench.calls(), ["two DEL", "one DEL", "one ADD", "two ADD"]);
    });
}

#[test]
fn a_sandbox_is_undone_as_it_was_configured_and_its_namespace_outlives_its_process() {
    on_a_host(async || {
        let (bench, pod) = (Bench::new(), Namespace::new());
        bench.open().attach(pod.tid, "s1", &attachment()).await.unwrap();
        drop(pod);
        bench.plugin("three");
        bench.configure(&json!({"cniVersion": "0.3.1", "name": "others", "type": "three"}));
        bench.calls();
        bench.does("two", "DEL", r#"nsenter --net="$CNI_NETNS" ip link show lo >"$here/seen" || exit 1"#);
        bench.open().unplug("s1").await.unwrap();
        assert_eq!(bench.calls(), ["two DEL", "one DEL"]);
        assert_eq!(bench.told("two", "DEL")["name"], "pods");
        assert!(fs::read_to_string(bench.path("bin/seen")).unwrap().contains("lo:"));
        assert!(bench.is_clean());
    });
}

#[test]
fn after_a_restart_of_the_host_plugins_are_told_that_the_namespace_is_gone() {
    on_a_host(async || {
        let (bench, pod) = (Bench::new(), Namespace::new());
        bench.open().attach(pod.tid, "s1", &attachment()).await.unwrap();
        nix::mount::umount2(&bench.path("root/namespaces/s1"), nix::mount::MntFlags::MNT_DETACH).unwrap();
        bench.open().unplug("s1").await.unwrap();
        assert_eq!(bench.environment("one", "DEL")[3], "");
        assert!(bench.is_clean());
    });
}

#[test]
fn a_plugin_that_hangs_is_killed_with_all_it_has_started() {
    on_a_host(async || {
        let (bench, pod) = (Bench::new(), Namespace::new());
        bench.does("two", "ADD", r#"sleep 600 & echo $! >"$here/pid"; wait"#);
        let cni = bench.patient(Duration::from_secs(3));
        let error = cni.attach(pod.tid, "s1", &attachment()).await.unwrap_err();
        assert_eq!(text(&error), "CNI plugin two did not finish ADD within 3s and was killed");
        let pid = fs::read_to_string(bench.path("bin/pid")).unwrap();
        let lives = || {
            let stat = fs::read_to_string(format!("/proc/{}/stat", pid.trim())).unwrap_or_default();
            stat.rsplit(") ").next().is_some_and(|rest| !rest.is_empty() && !rest.starts_with(['Z', 'X']))
        };
        let begun = Instant::now();
        while lives() {
            assert!(begun.elapsed() < Duration::from_secs(5), "it still runs");
            tokio::time::sleep(Duration::from_millis(5)).await;
        }
        cni.unplug("s1").await.unwrap();
        assert!(bench.is_clean());
    });
}

#[test]
fn a_sandbox_that_is_plugged_in_needs_no_configuration_any_more() {
    on_a_host(async || {
        let (bench, pod) = (Bench::new(), Namespace::new());
        let cni = bench.open();
        let addresses = cni.attach(pod.tid, "s1", &attachment()).await.unwrap();
        bench.calls();
        fs::write(bench.path("conf/10-pods.conflist"), "{").unwrap();
        assert_eq!(cni.attach(pod.tid, "s1", &attachment()).await.unwrap(), addresses);
        assert!(bench.calls().is_empty(), "nothing is done again");
        cni.attach(pod.tid, "s2", &attachment()).await.unwrap_err();
        cni.unplug("s1").await.unwrap();
        assert!(bench.is_clean());
    });
}

#[test]
fn what_nobody_waits_for_any_more_is_undone_to_the_end_and_once() {
    on_a_host(async || {
        let (bench, pod) = (Bench::new(), Namespace::new());
        let cni = bench.open();
        cni.attach(pod.tid, "s1", &attachment()).await.unwrap();
        bench.does("two", "DEL", r#"until [ -e "$here/go" ]; do sleep 0.01; done; : >"$here/done""#);
        let begun = async {
            while !bench.path("bin/told.two.DEL").exists() {
                tokio::time::sleep(Duration::from_millis(5)).await;
            }
        };
        bench.calls();
        tokio::select! {
            undone = cni.unplug("s1") => panic!("it is not done: {undone:?}"),
            () = begun => {}
        }
        let again = cni.unplug("s1");
        fs::write(bench.path("bin/go"), "").unwrap();
        again.await.unwrap();
        assert!(bench.path("bin/done").exists(), "it was not killed");
        assert_eq!(bench.calls(), ["two DEL", "one DEL"], "who came second found it done");
        assert!(bench.is_clean());
    });
}

#[test]
fn what_is_no_result_is_refused() {
    on_a_host(async || {
        let (bench, pod) = (Bench::new(), Namespace::new());
        let cni = bench.open();
        for (answer, told) in [
            ("echo hello", "CNI plugin two answered ADD with something else than a result: expected value"),
            ("echo '{\"ips\": [{\"address\": \"ten\"}]}'", "\"ten\" is no address"),
            ("echo '{}'", "network pods gave the sandbox no address"),
        ] {
            bench.does("two", "ADD", answer);
            let error = cni.attach(pod.tid, "s1", &attachment()).await.unwrap_err();
            assert!(text(&error).contains(told), "{error}");
        }
        cni.unplug("s1").await.unwrap();
        assert!(bench.is_clean());
    });
}

#[tokio::test]
async fn a_network_is_ready_once_its_configuration_and_plugins_are() {
    let bench = Bench::new();
    let cni = bench.open();
    let why = async || cni.ready().await.unwrap_err().to_string();
    cni.ready().await.unwrap();
    assert_eq!(bench.calls(), ["one VERSION", "two VERSION"]);
    cni.ready().await.unwrap();
    assert!(bench.calls().is_empty(), "they were asked");

    let conf = bench.path("conf");
    fs::write(conf.join("05-broken.conf"), "{").unwrap();
    assert!(why().await.contains("05-broken.conf cannot be used: it is not JSON"), "{}", why().await);
    fs::remove_file(conf.join("05-broken.conf")).unwrap();
    cni.ready().await.unwrap();

    let program = bench.path("bin/two");
    fs::set_permissions(&program, fs::Permissions::from_mode(0o644)).unwrap();
    assert_eq!(why().await, format!("CNI plugin {} is not an executable file", program.display()));
    fs::remove_file(&program).unwrap();
    let (none, bin) = (bench.path("none"), bench.path("bin"));
    assert_eq!(why().await, format!("CNI plugin two is not in {}, {}", none.display(), bin.display()));
    bench.plugin("two");
    cni.ready().await.unwrap();

    bench.does("two", "VERSION", r#"echo '{"cniVersion": "1.0.0", "supportedVersions": ["0.4.0", "1.0.0"]}'"#);
    let mut newer = bench.network();
    newer["cniVersion"] = json!("1.1.0");
    bench.configure(&newer);
    assert_eq!(why().await, "CNI plugin two does not support version 1.1.0 of the configuration (but 0.4.0, 1.0.0)");
    fs::remove_dir_all(&conf).unwrap();
    assert!(why().await.starts_with("there is no CNI configuration in "));
}

#[tokio::test]
async fn a_plugin_of_version_1_1_may_say_that_it_is_not_ready() {
    let bench = Bench::new();
    let mut newer = bench.network();
    newer["cniVersion"] = json!("1.1.0");
    bench.configure(&newer);
    bench.does("two", "STATUS", r#"echo '{"code": 50, "msg": "its agent does not run"}'; exit 1"#);
    let cni = bench.open();
    let error = cni.ready().await.unwrap_err();
    assert_eq!(error.to_string(), "CNI plugin two failed STATUS: its agent does not run (code 50)");
    assert_eq!(bench.told("one", "STATUS")["name"], "pods");
    fs::remove_file(bench.path("bin/two.STATUS")).unwrap();
    cni.ready().await.unwrap();
    bench.calls();
    cni.ready().await.unwrap();
    assert!(bench.calls().is_empty(), "an answer holds for a while");
}

#[test]
fn after_a_restart_plugins_are_asked_and_whatever_they_say_ends_no_sandbox() {
    on_a_host(async || {
        let (bench, pod) = (Bench::new(), Namespace::new());
        bench.open().attach(pod.tid, "s1", &attachment()).await.unwrap();
        bench.does("one", "CHECK", r#"echo '{"code": 3, "msg": "gone"}'; exit 1"#);
        let again = bench.open();
        let checked = |sandbox: &str| again.inner.records.read(sandbox).unwrap().unwrap();
        let error = again.check(&checked("s1")).await.unwrap_err();
        assert_eq!(error.to_string(), "CNI plugin one failed CHECK: gone (code 3)");
        again.attached("s1").await.unwrap();
        fs::remove_file(bench.path("bin/one")).unwrap();
        again.attached("s1").await.unwrap();
        bench.plugin("one");

        let mut unchecked = bench.network();
        unchecked["disableCheck"] = json!(true);
        bench.configure(&unchecked);
        again.attach(pod.tid, "s2", &attachment()).await.unwrap();
        bench.calls();
        again.check(&checked("s2")).await.unwrap();
        assert!(bench.calls().is_empty());
    });
}

#[test]
fn what_sandboxes_have_left_is_swept_and_no_others() {
    on_a_host(async || {
        let (bench, pod) = (Bench::new(), Namespace::new());
        let cni = bench.open();
        for sandbox in ["s1", "s2", "s3"] {
            cni.attach(pod.tid, sandbox, &attachment()).await.unwrap();
        }
        let known = cni.known().unwrap();
        cni.attach(pod.tid, "s4", &attachment()).await.unwrap();
        assert_eq!(cni.sweep(known, &BTreeSet::from(["s2".to_owned()])).await, 2);
        let mut left = cni.known().unwrap();
        left.sort();
        assert_eq!(left, ["s2", "s4"]);
    });
}

#[test]
fn a_sandbox_on_the_hosts_network_is_refused() {
    on_a_host(async || {
        let bench = Bench::new();
        let own = nix::unistd::gettid().as_raw();
        let cni = bench.open();
        let error = cni.attach(own, "s1", &attachment()).await.unwrap_err();
        assert!(text(&error).contains("no network namespace of its own"), "{error}");
        assert!(bench.calls().is_empty());
        cni.unplug("s1").await.unwrap();
        assert!(bench.is_clean());
    });
}
