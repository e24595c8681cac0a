//! The session itself: identity, coming back, the end.

use std::time::Duration;

use crate::bench::{Bench, MACHINE_ID, PATIENCE, script};
use lambdalet::runtime::session::ExecRequest;

pub(crate) async fn hello_is_answered_and_the_guest_takes_its_identity(bench: &mut Bench) {
    assert!(!bench.hello.configured && bench.hello.machine_id.is_empty());
    bench.configure().await;
    // Once more changes nothing.
    bench.configure().await;
    if !bench.is_machine() {
        return;
    }
    let behind = bench.agent.sync_time(vec![1; 32]).await.unwrap();
    assert!(behind < 0, "the clock was set to 2027 by configure, and is behind by {behind}");
    let who = "hostname; ip addr show eth0; ip route; cat /proc/sys/net/ipv4/ip_unprivileged_port_start";
    let (_, said) = bench.run(script("who", who)).await;
    for wanted in ["guest-test", "10.244.1.7/24", "mtu 1400", "default via 10.244.1.1", "\n80\n"] {
        assert!(said.contains(wanted), "{wanted} is not in {said}");
    }
    assert!(!said.contains("inet6"), "{said}");
}

pub(crate) async fn of_ipv6_an_interface_has_a_part_by_its_address(bench: &mut Bench) {
    if !bench.is_machine() {
        return;
    }
    bench.agent.configure(bench.identity(&["10.244.1.7/24", "fd00:10:244::7/64"])).await.unwrap();
    let (_, said) = bench.run(script("six", "ip addr show eth0")).await;
    for wanted in ["inet 10.244.1.7/24", "inet6 fd00:10:244::7/64"] {
        assert!(said.contains(wanted), "{wanted} is not in {said}");
    }
}

pub(crate) async fn calls_that_are_given_up_do_not_end_the_session(bench: &mut Bench) {
    // More at once than a server of HTTP/2 takes from somebody whom it does not know.
    let given_up = (0..200).map(|_| tokio::time::timeout(Duration::from_micros(100), bench.agent.list()));
    futures::future::join_all(given_up).await;
    bench.agent.list().await.unwrap();
    let ended = tokio::time::timeout(Duration::ZERO, bench.agent.ended()).await;
    assert!(ended.is_err(), "{ended:?}");
}

pub(crate) async fn a_node_that_comes_back_finds_all_as_it_was(bench: &mut Bench) {
    bench
        .start(script("stays", "echo before; while sleep 0.05; do [ -e /go ] && break; done; echo after; sleep 1000"))
        .await;
    bench.log_says("stays", "before\n").await;
    let old = bench.agent.clone();
    let offset = {
        let mut batches = old.logs("stays", 0, false).await.unwrap();
        futures::StreamExt::next(&mut batches).await.unwrap().unwrap().next
    };
    // A command of the old session, which ends with it.
    let sleeps =
        ExecRequest { command: ["sleep", "1234"].map(str::to_owned).to_vec(), stdout: true, ..ExecRequest::default() };
    let session = old.exec("stays", &sleeps).await.unwrap();
    bench.reconnect().await;
    assert!(bench.hello.configured);
    assert_eq!(bench.hello.machine_id, if bench.is_machine() { MACHINE_ID } else { "" });
    assert!(tokio::time::timeout(PATIENCE, session.exit).await.expect("the old session ends").is_err());
    tokio::time::timeout(PATIENCE, old.ended()).await.expect("the old session says so");
    drop(old);
    let running = bench.agent.list().await.unwrap();
    assert_eq!(running.iter().map(|container| container.id.as_str()).collect::<Vec<_>>(), ["stays"]);
    let touched = ExecRequest {
        command: ["sh", "-c", "touch /go; while grep -qs '[s]leep.1234' /proc/[0-9]*/cmdline; do sleep 0.05; done"]
            .map(str::to_owned)
            .to_vec(),
        ..ExecRequest::default()
    };
    let exit = bench.agent.exec("stays", &touched).await.unwrap().exit;
    assert_eq!(tokio::time::timeout(PATIENCE, exit).await.expect("the old command ends").unwrap(), 0);
    let mut rest = bench.agent.logs("stays", offset, true).await.unwrap();
    let batch = futures::StreamExt::next(&mut rest).await.unwrap().unwrap();
    assert_eq!((&batch.records[0].bytes[..], batch.lost), (&b"after\n"[..], 0));
    drop(rest);
    // Many come and go; the last has the guest to itself.
    for _ in 0..20 {
        bench.reconnect().await;
    }
    assert_eq!(bench.agent.list().await.unwrap().len(), 1);
    bench.agent.remove("stays").await.unwrap();
}

pub(crate) async fn a_shutdown_ends_the_machine(bench: Bench) {
    bench.start(script("polite", "trap 'exit 0' TERM; echo ready; while true; do sleep 0.1; done")).await;
    bench.log_says("polite", "ready").await;
    bench.agent.shutdown(Duration::from_secs(20)).await.unwrap();
    bench.ended().await;
}
