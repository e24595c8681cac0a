//! Containers: their life, their rights, their limits.

use std::time::Duration;

use futures::StreamExt;
use lambdalet::runtime::Kind;
use lambdalet::runtime::microvm::agent::said::{Event, Phase};
use lambdalet_proto::agent::v1::{ContainerSpec, PidMode, Resources, Rlimit};

use crate::bench::{Bench, IMAGE, PATIENCE, script};

pub(crate) async fn a_container_runs_and_its_exit_code_and_log_are_told(bench: &mut Bench) {
    let spec = ContainerSpec {
        env: vec!["GREETING=hello".into(), "GREETING=good day".into()],
        cwd: "/made/for/it".into(),
        annotations: [("a".to_owned(), "b".to_owned())].into(),
        ..script("first", "echo $GREETING from $PWD, $HOME; echo not good >&2; exit 7")
    };
    bench.agent.create_container(spec.clone()).await.unwrap();
    bench.agent.create_container(spec).await.unwrap();
    assert_eq!(bench.agent.list().await.unwrap()[0].phase, Phase::Created);
    bench.agent.start("first").await.unwrap();
    let ended = bench.agent.wait("first").await.unwrap();
    assert_eq!((ended.phase, ended.exit_code, ended.oom_killed), (Phase::Exited, 7, false));
    assert!(ended.created_at <= ended.started_at.unwrap() && ended.started_at <= ended.finished_at);
    assert_eq!(ended.annotations["a"], "b");
    let mut batches = bench.agent.logs("first", 0, false).await.unwrap();
    let mut records = batches.next().await.unwrap().unwrap().records;
    records.sort_by_key(|record| record.stderr);
    let said: Vec<_> = records.iter().map(|record| (&record.bytes[..], record.stderr, record.line_start)).collect();
    let wanted = [(&b"good day from /made/for/it, /root\n"[..], false, true), (&b"not good\n"[..], true, true)];
    assert_eq!(said, wanted);
    assert_eq!(bench.agent.start("first").await.unwrap_err().kind(), Kind::Invalid);
    bench.agent.remove("first").await.unwrap();
    bench.agent.remove("first").await.unwrap();
    assert!(bench.agent.list().await.unwrap().is_empty());
    assert!(bench.agent.wait("first").await.unwrap_err().is_not_found());
    let unknown = ContainerSpec { image: "other".into(), ..script("x", "true") };
    assert!(bench.agent.create_container(unknown).await.unwrap_err().is_not_found());
    assert_eq!(bench.agent.create_container(script("../x", "true")).await.unwrap_err().kind(), Kind::Invalid);
}

pub(crate) async fn a_command_that_is_not_there_exits_with_127_and_one_that_may_not_run_with_128(bench: &mut Bench) {
    for (command, code, words) in [("no-such", 127, "o such file"), ("/bin/plain", 128, "ermission denied")] {
        let spec = ContainerSpec { args: vec![command.into()], ..script("bad", "") };
        bench.agent.create_container(spec).await.unwrap();
        let error = bench.agent.start("bad").await.unwrap_err();
        assert!(error.kind() == Kind::Invalid && error.to_string().contains(words), "{error}");
        let ended = bench.agent.wait("bad").await.unwrap();
        assert_eq!((ended.phase, ended.exit_code), (Phase::Exited, code));
        assert!(ended.message.contains(words), "{}", ended.message);
        assert_eq!(bench.log("bad").await, "");
        bench.agent.remove("bad").await.unwrap();
    }
}

pub(crate) async fn a_user_of_the_image_runs_with_the_rights_of_the_spec(bench: &mut Bench) {
    let show =
        "id; grep -E 'Cap(Eff|Bnd)|NoNewPrivs|Seccomp:' /proc/self/status; ulimit -n; cat /proc/self/oom_score_adj";
    let spec = ContainerSpec {
        user: "www-data".into(),
        supplemental_groups: vec![77],
        no_new_privileges: true,
        oom_score_adj: 500,
        rlimits: vec![Rlimit { name: "nofile".into(), soft: 100, hard: 200 }],
        ..script("www", show)
    };
    let (_, said) = bench.run(spec).await;
    for wanted in [
        "uid=33(www-data) gid=33(www-data)",
        "44(extra)",
        "77",
        "CapEff:\t0000000000000000",
        "NoNewPrivs:\t1",
        "Seccomp:\t2",
        "\n100\n500\n",
    ] {
        assert!(said.contains(wanted), "{wanted:?} is not in {said}");
    }
    // CHOWN, DAC_OVERRIDE, FOWNER, KILL, SETGID, SETUID.
    let (_, said) = bench.run(script("root", show)).await;
    for wanted in
        ["uid=0(root) gid=0(root)", "CapEff:\t00000000000000eb", "CapBnd:\t00000000000000eb", "NoNewPrivs:\t0"]
    {
        assert!(said.contains(wanted), "{wanted:?} is not in {said}");
    }
    let (_, said) = bench.run(ContainerSpec { privileged: true, ..script("all", show) }).await;
    assert!(said.contains("CapEff:\t000001ffffffffff"), "{said}");
    let refused = "mount -t tmpfs x /tmp; unshare -U true; mknod /tmp/null c 1 3 && echo x > /tmp/null; echo over";
    let spec = ContainerSpec { capabilities: vec!["MKNOD".into()], ..script("tries", refused) };
    let (_, said) = bench.run(spec).await;
    assert!(said.contains("are you root") && said.contains("Operation not permitted"), "{said}");
    assert!(said.contains("/tmp/null: Permission denied") && said.ends_with("over\n"), "{said}");
    let nobody = ContainerSpec { user: "nobody-at-all".into(), ..script("nobody", "true") };
    bench.agent.create_container(nobody).await.unwrap();
    assert!(bench.agent.start("nobody").await.unwrap_err().to_string().contains("nobody-at-all"));
    bench.agent.remove("nobody").await.unwrap();
}

pub(crate) async fn root_file_systems_are_their_containers_own(bench: &mut Bench) {
    let (_, said) =
        bench.run(script("writes", "echo mine > /file && cat /file; ls -d /up/self; df -a / | tail -1")).await;
    assert!(said.starts_with("mine\n/up/self\n"), "{said}");
    let (ended, said) =
        bench.run(ContainerSpec { read_only_rootfs: true, ..script("reads", "ls /file; echo x > /file") }).await;
    assert!(ended.exit_code != 0 && said.contains("No such file") && said.contains("Read-only file system"), "{said}");
}

pub(crate) async fn what_is_the_kernels_is_hidden(bench: &mut Bench) {
    let look = "ls /dev; wc -c < /proc/kcore; ls /sys/firmware | wc -l; echo 1 > /proc/sys/vm/drop_caches; ls /dev/vport* /dev/vd*; \
                head -c 4 /dev/urandom | wc -c; echo fine > /dev/shm/x && cat /dev/shm/x";
    let (_, said) = bench.run(script("looks", look)).await;
    let devices = "fd\nfull\nmqueue\nnull\nptmx\npts\nrandom\nshm\nstderr\nstdin\nstdout\ntty\nurandom\nzero\n0\n0\n";
    assert!(said.starts_with(devices), "{said}");
    assert!(said.contains("Read-only file system") && said.ends_with("4\nfine\n"), "{said}");
    assert_eq!(said.matches("No such file").count(), 2, "{said}");
}

pub(crate) async fn a_container_sees_its_own_processes_only_unless_they_are_shared(bench: &mut Bench) {
    let (_, said) = bench.run(script("alone", "echo $$; ls -d /proc/[0-9]* | wc -l; kill -9 1; echo alive")).await;
    assert!(said.starts_with("1\n") && said.ends_with("alive\n"), "{said}");
    let shared = |id: &str, run: &str| {
        let mut spec = script(id, run);
        spec.set_pid(PidMode::Pod);
        spec
    };
    bench.start(shared("one", "exec sleep 777")).await;
    let look = "grep -qs '[s]leep.777' /proc/[0-9]*/cmdline && echo seen; grep -ls '[l]ambdalet-agent' /proc/[0-9]*/cmdline; \
                ls /proc/1/root/; kill -9 1; \
                for one in /proc/[0-9]*; do grep -qs '[s]leep.777' $one/cmdline && kill -9 ${one#/proc/}; done";
    let (_, said) = bench.run(shared("two", look)).await;
    assert!(said.starts_with("seen\n") && !said.contains("cmdline") && !said.contains("init"), "{said}");
    assert_eq!(bench.agent.wait("one").await.unwrap().exit_code, 137);
    bench.agent.remove("one").await.unwrap();
    bench.start(script("target", "exec sleep 778")).await;
    let mut spec = script("debugger", "grep -ls '[s]leep.778' /proc/[0-9]*/cmdline");
    spec.set_pid(PidMode::Target);
    spec.pid_target = "target".into();
    assert_eq!(bench.run(spec).await.1, "/proc/1/cmdline\n");
    bench.agent.remove("target").await.unwrap();
}

pub(crate) async fn a_signal_ends_a_container_and_what_it_started(bench: &mut Bench) {
    bench.start(script("traps", "trap 'echo asked; exit 3' TERM; sleep 1000 & echo ready; wait")).await;
    bench.log_says("traps", "ready").await;
    bench.agent.signal("traps", "SIGTERM", false).await.unwrap();
    let ended = tokio::time::timeout(PATIENCE, bench.agent.wait("traps")).await.unwrap().unwrap();
    assert_eq!((ended.exit_code, bench.log("traps").await.as_str()), (3, "ready\nasked\n"));
    bench.agent.signal("traps", "SIGTERM", false).await.unwrap();
    bench.agent.remove("traps").await.unwrap();
    bench.start(script("deaf", "trap '' TERM; echo ready; while true; do sleep 1; done")).await;
    bench.log_says("deaf", "ready").await;
    bench.agent.signal("deaf", "TERM", false).await.unwrap();
    assert_eq!(bench.agent.signal("deaf", "SIGNOT", false).await.unwrap_err().kind(), Kind::Invalid);
    bench.agent.signal("deaf", "9", true).await.unwrap();
    assert_eq!(bench.agent.wait("deaf").await.unwrap().exit_code, 137);
    bench.agent.remove("deaf").await.unwrap();
    assert!(bench.agent.signal("deaf", "9", true).await.unwrap_err().is_not_found());
}

pub(crate) async fn a_frozen_container_gets_no_time(bench: &mut Bench) {
    bench.start(script("counts", "while sleep 0.05; do echo tick; done")).await;
    bench.log_says("counts", "tick").await;
    bench.agent.freeze("counts").await.unwrap();
    bench.agent.freeze("counts").await.unwrap();
    assert!(bench.agent.list().await.unwrap()[0].frozen);
    // What was in the pipe has been read once a verb later was answered.
    bench.agent.stats(false).await.unwrap();
    let before = bench.log("counts").await;
    tokio::time::sleep(Duration::from_millis(300)).await;
    assert_eq!(bench.log("counts").await, before);
    bench.agent.thaw("counts").await.unwrap();
    bench.log_says("counts", &format!("{before}tick")).await;
    // A frozen one can be removed as it is.
    bench.agent.freeze("counts").await.unwrap();
    bench.agent.remove("counts").await.unwrap();
    assert!(bench.agent.freeze("counts").await.unwrap_err().is_not_found());
}

pub(crate) async fn statistics_are_counted(bench: &mut Bench) {
    bench.start(script("busy", "head -c 1000000 /dev/zero > /file; echo written; i=0; while [ $i -lt 20000 ]; do i=$((i+1)); done; echo done; sleep 1000")).await;
    bench.log_says("busy", "done").await;
    let stats = bench.agent.stats(true).await.unwrap();
    let container = &stats.containers[0];
    assert_eq!((container.id.as_str(), container.log_bytes), ("busy", 2 * 16 + 13));
    assert!(container.layer_bytes >= 1_000_000 && container.layer_inodes >= 1, "{container:?}");
    if bench.is_machine() {
        let usage = container.usage.as_ref().unwrap();
        assert!(usage.cpu_ns > 0 && usage.memory > 0 && usage.tasks >= 1, "{usage:?}");
        assert!(stats.interfaces.iter().any(|interface| interface.name == "eth0"));
        assert!(stats.scratch.as_ref().unwrap().bytes > 200 << 20);
        let busy = stats.memory_total - stats.memory_available;
        println!("    the guest takes {} MiB of {} MiB", busy >> 20, stats.memory_total >> 20);
    }
    bench.agent.remove("busy").await.unwrap();
}

pub(crate) async fn a_deep_tree_is_counted_and_removed(bench: &mut Bench) {
    // Deeper than the agent may have files open.
    let digs = "i=0; while [ $i -lt 1500 ]; do mkdir d && cd d || exit 1; i=$((i+1)); done; echo dug; exec sleep 1000";
    bench.start(script("digs", digs)).await;
    bench.log_says("digs", "dug").await;
    let stats = bench.agent.stats(true).await.unwrap();
    assert!(stats.containers[0].layer_inodes >= 1500, "{:?}", stats.containers[0]);
    bench.agent.remove("digs").await.unwrap();
}

pub(crate) async fn events_tell_what_happens(bench: &mut Bench) {
    let events = bench.agent.events().await.unwrap();
    bench.run(script("told", "exit 4")).await;
    let told: Vec<_> = tokio::time::timeout(PATIENCE, events.take(3).collect()).await.unwrap();
    let id = || "told".to_owned();
    assert_eq!(told, [Event::Started(id()), Event::Exited(id(), 4), Event::Removed(id())]);
}

pub(crate) async fn too_much_memory_is_told_as_such(bench: &mut Bench) {
    let mut events = bench.agent.events().await.unwrap();
    let resources = Resources { memory_bytes: 16 << 20, ..Resources::default() };
    let spec = ContainerSpec { resources: Some(resources), ..script("eats", "tail /dev/zero; sleep 1000") };
    let (ended, _) = bench.run(spec).await;
    assert_eq!((ended.exit_code, ended.oom_killed), (137, true));
    let told = async {
        while let Some(event) = events.next().await {
            if event == Event::OutOfMemory("eats".into()) {
                return;
            }
        }
        panic!("nothing was told");
    };
    tokio::time::timeout(PATIENCE, told).await.unwrap();
}

pub(crate) async fn too_many_processes_are_refused(bench: &mut Bench) {
    let resources = Resources { pids: 10, cpu_quota_us: 50_000, ..Resources::default() };
    // Only what the shell does itself: it could not start another program.
    let bomb = "(b() { b | b & }; b) 2>/dev/null; cd /sys/fs/cgroup; until read name count < pids.events && [ $count -gt 0 ]; \
                do :; done; read pids < pids.max; read cpu < cpu.max; echo $pids, $cpu: over";
    bench.start(ContainerSpec { image: IMAGE.into(), resources: Some(resources), ..script("bomb", bomb) }).await;
    bench.log_says("bomb", "over").await;
    let said = bench.log("bomb").await;
    assert_eq!(said, "10, 50000 100000: over\n");
    let resources = Resources { pids: 20, ..Resources::default() };
    bench.agent.update("bomb", resources).await.unwrap();
    bench.agent.remove("bomb").await.unwrap();
}
