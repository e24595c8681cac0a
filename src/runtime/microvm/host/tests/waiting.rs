//! Guests that wait for Pods, in machines that are none and whose guests say what they are asked.

use std::path::PathBuf;

use bytes::Bytes;
use http::HeaderMap;
use tokio_util::sync::CancellationToken;

use super::*;
use crate::runtime::microvm::machine::template;

/// Machines by their directories, of one process after the other.
#[derive(Debug, Default)]
struct Stage {
    running: Mutex<HashMap<PathBuf, Good>>,
    restored: AtomicU32,
    /// Those that wait cannot go on.
    stuck: AtomicU32,
    /// Guests do not answer.
    mute: AtomicU32,
    /// None can be restored.
    broken: AtomicU32,
}

/// A machine, and its manager.
#[derive(Clone, Debug)]
struct Good {
    dir: VmDir,
    cgroup: Arc<Mutex<String>>,
    paused: Arc<Mutex<bool>>,
    ended: CancellationToken,
    kind: TemplateKind,
    template: Option<PathBuf>,
    stage: Arc<Stage>,
}

#[derive(Clone, Debug)]
struct Manager(Arc<Stage>);

/// What guests answer to Hello: the version of what is spoken; and to all else: nothing in particular.
async fn answer(io: tokio::io::DuplexStream) {
    let Ok(mut connection) = h2::server::handshake(io).await else { return };
    while let Some(Ok((request, mut respond))) = connection.accept().await {
        let says_hello = request.uri().path().ends_with("/Hello");
        let message: &[u8] = if says_hello { &[8, lambdalet_proto::agent::v1::PROTOCOL as u8] } else { &[] };
        let frame = [&[0, 0, 0, 0, message.len() as u8], message].concat();
        let response = http::Response::builder().header("content-type", "application/grpc").body(()).unwrap();
        let mut body = respond.send_response(response, false).unwrap();
        body.send_data(Bytes::from(frame), false).unwrap();
        let trailers = HeaderMap::from_iter([("grpc-status".parse().unwrap(), "0".parse().unwrap())]);
        body.send_trailers(trailers).unwrap();
    }
}

#[async_trait]
impl MachineManager for Manager {
    fn name(&self) -> &'static str {
        "good"
    }

    fn tap_use(&self) -> TapUse {
        TapUse::Handed
    }

    async fn check(&self) -> Result<String, Why> {
        Ok("good".to_owned())
    }

    async fn template_kind(&self, spec: &MachineSpec) -> Result<TemplateKind, MachineError> {
        TemplateKind::of("good", spec)
    }

    async fn boot(&self, spec: &MachineSpec) -> Result<Box<dyn Machine>, MachineError> {
        let kind = self.template_kind(spec).await?;
        let machine = Good {
            dir: spec.dir.clone(),
            cgroup: Arc::new(Mutex::new(spec.cgroup_parent.clone())),
            paused: Arc::default(),
            ended: CancellationToken::new(),
            kind,
            template: spec.template.clone(),
            stage: Arc::clone(&self.0),
        };
        self.0.running.lock().unwrap().insert(spec.dir.path().to_owned(), machine.clone());
        Ok(Box::new(machine))
    }

    async fn restore(&self, spec: &MachineSpec, _: &Template) -> Result<Box<dyn Machine>, MachineError> {
        self.0.restored.fetch_add(1, Ordering::SeqCst);
        if self.0.broken.load(Ordering::SeqCst) > 0 {
            tokio::task::yield_now().await;
            return Err(MachineError::NotAssigned);
        }
        self.boot(spec).await
    }

    async fn adopt(&self, dir: &VmDir) -> Result<Option<Box<dyn Machine>>, MachineError> {
        let found = self.0.running.lock().unwrap().get(dir.path()).cloned();
        Ok(found.map(|machine| Box::new(machine) as Box<dyn Machine>))
    }
}

#[async_trait]
impl Machine for Good {
    fn pid(&self) -> i32 {
        1
    }

    fn dir(&self) -> &VmDir {
        &self.dir
    }

    // The task ends with the stream.
    #[allow(clippy::disallowed_methods)]
    async fn agent(&self) -> Result<Pin<Box<dyn Duplex>>, MachineError> {
        assert!(!*self.paused.lock().unwrap(), "a paused guest answers nobody");
        if self.stage.mute.load(Ordering::SeqCst) > 0 {
            std::future::pending::<()>().await;
        }
        let (ours, mut guests) = UnixStream::pair().unwrap();
        tokio::spawn(async move {
            let (reader, mut writer) = guests.split();
            serve_sessions(reader, &mut writer, answer).await
        });
        Ok(Box::pin(ours))
    }

    async fn put_image(&self, _: u8, _: &std::path::Path) -> Result<(), MachineError> {
        Ok(())
    }

    async fn take_image(&self, _: u8) -> Result<(), MachineError> {
        Ok(())
    }

    async fn pause(&self) -> Result<(), MachineError> {
        *self.paused.lock().unwrap() = true;
        Ok(())
    }

    async fn resume(&self) -> Result<(), MachineError> {
        if self.stage.stuck.load(Ordering::SeqCst) > 0 {
            return Err(MachineError::NotAssigned);
        }
        *self.paused.lock().unwrap() = false;
        Ok(())
    }

    async fn save(&self) -> Result<Template, MachineError> {
        Ok(template::tests::written(self.template.clone().expect("it was booted for that"), &self.kind))
    }

    fn weigh(&self, _: u64) -> Result<(), MachineError> {
        Ok(())
    }

    async fn move_to(&mut self, spec: &MachineSpec) -> Result<(), MachineError> {
        self.cgroup.lock().unwrap().clone_from(&spec.cgroup_parent);
        Ok(())
    }

    fn kill_unwaited(&self) {
        self.ended.cancel();
        self.stage.running.lock().unwrap().remove(self.dir.path());
    }

    async fn kill(&self) -> Result<(), MachineError> {
        self.kill_unwaited();
        Ok(())
    }

    async fn exited(&self) -> VmExit {
        self.ended.cancelled().await;
        VmExit::Signal(9)
    }
}

/// A host where two guests wait, once there is a template.
struct Host {
    vms: HostVms,
    stage: Arc<Stage>,
    place: tempfile::TempDir,
}

impl Host {
    async fn new() -> Self {
        let place = tempfile::tempdir().unwrap();
        for file in [KERNEL, INITRAMFS] {
            std::fs::write(place.path().join(file), file).unwrap();
        }
        let stage = Arc::<Stage>::default();
        let host = Self { vms: vms(&place, &stage).await, stage, place };
        host.vms.prepare(&Resources::default()).await.unwrap();
        host
    }

    /// Launches one, and says by which name and whether it has waited.
    async fn launch(&self, config: &SandboxConfig) -> (String, bool) {
        let id = self.vms.name(config);
        let waited = self.running(&id).is_some();
        self.vms.launch(&id, config).await.unwrap();
        (id, waited)
    }

    fn running(&self, id: &str) -> Option<Good> {
        let dir = self.vms.inner.dirs.of(&VmId::new(id).unwrap());
        self.stage.running.lock().unwrap().get(dir.path()).cloned()
    }

    /// Waits until so many were restored in all, and two wait; how many run then, those among them.
    async fn settles(&self, restored: u32) -> usize {
        let begun = Instant::now();
        while (self.stage.restored.load(Ordering::SeqCst), self.vms.waiting()) != (restored, Some(2)) {
            assert!(begun.elapsed() < BOOT_PATIENCE, "{:?}", self.stage);
            tokio::time::sleep(Duration::from_millis(1)).await;
        }
        self.stage.running.lock().unwrap().len()
    }
}

async fn vms(place: &tempfile::TempDir, stage: &Arc<Stage>) -> HostVms {
    let user = VmmUser { uid: nix::unistd::geteuid().as_raw(), gid: nix::unistd::getegid().as_raw() };
    let (root, bundle) = (place.path().join("microvm"), place.path().to_owned());
    let options = HostOptions { user, scratch: 16 << 20, warm: 2, ..HostOptions::new(root, bundle) };
    HostVms::open(options, Arc::new(Manager(Arc::clone(stage)))).await.unwrap()
}

fn of_memory(bytes: i64) -> SandboxConfig {
    SandboxConfig { resources: Resources { memory_limit: Some(bytes), ..Resources::default() }, ..config() }
}

#[tokio::test]
async fn one_that_waits_becomes_the_pods_and_another_takes_its_place() {
    let host = Host::new().await;
    let (first, waited) = host.launch(&config()).await;
    assert!(!waited, "none was started before");
    assert_eq!(host.settles(3).await, 3);
    let (second, waited) = host.launch(&config()).await;
    assert!(waited);
    let machine = host.running(&second).unwrap();
    assert_eq!((machine.cgroup.lock().unwrap().as_str(), *machine.paused.lock().unwrap()), ("/l/p", false));
    assert_eq!(host.settles(4).await, 4);
    // Of its own size only, and not for a kernel of one's own.
    let (other, waited) = host.launch(&of_memory(1 << 30)).await;
    assert!(!waited);
    let own = MachineFiles { kernel_args: vec!["quiet".to_owned()], ..MachineFiles::default() };
    assert!(host.running(&host.vms.name(&SandboxConfig { machine: own, ..config() })).is_none());
    // Of those that wait, one gives way to one of the size that was started last.
    assert_eq!(host.settles(5).await, 5);
    for id in [&first, &second, &other] {
        host.vms.destroy(id).await.unwrap();
    }
    assert!(host.running(&host.vms.name(&of_memory(1 << 30))).is_some());
}

#[tokio::test]
async fn what_is_promised_and_not_launched_ends_with_a_removal() {
    let host = Host::new().await;
    host.launch(&config()).await;
    host.settles(3).await;
    let (one, other) = (host.vms.name(&config()), host.vms.name(&config()));
    assert_ne!(one, other);
    assert!(host.running(&host.vms.name(&config())).is_none(), "both are promised");
    for id in [&one, &other] {
        host.vms.destroy(id).await.unwrap();
        assert!(host.running(id).is_none());
    }
    assert_eq!(host.vms.inner.dirs.list().unwrap().len(), 1);
}

#[tokio::test]
async fn what_has_ended_or_does_not_go_on_is_replaced_by_another_of_its_name() {
    let host = Host::new().await;
    host.launch(&config()).await;
    host.settles(3).await;
    // The one that ended meanwhile is given to nobody.
    let waiting: Vec<_> = host.stage.running.lock().unwrap().values().cloned().collect();
    let dead = waiting.into_iter().find(|machine| *machine.paused.lock().unwrap()).unwrap();
    dead.kill_unwaited();
    host.stage.stuck.store(1, Ordering::SeqCst);
    let (id, waited) = host.launch(&config()).await;
    assert!(waited && id != dead.dir.id().as_str());
    let machine = host.running(&id).unwrap();
    assert_eq!(machine.cgroup.lock().unwrap().as_str(), "/l/p");
    // One in the place of that which did not go on, and two that wait.
    assert_eq!(host.settles(6).await, 4);
    assert!(!dead.dir.path().exists());
}

#[tokio::test]
async fn none_waits_with_an_older_guest_or_of_a_template_that_was_written_to() {
    let host = Host::new().await;
    host.launch(&config()).await;
    host.settles(3).await;
    std::fs::write(host.place.path().join(INITRAMFS), "newer").unwrap();
    let (_, waited) = host.launch(&config()).await;
    assert!(!waited);
    // It was booted, and a template is made of the newer one.
    assert_eq!(host.settles(5).await, 4);
    let (id, waited) = host.launch(&config()).await;
    assert!(waited);
    host.settles(6).await;
    let template = host.vms.inner.templates.find(&host.running(&id).unwrap().kind).unwrap();
    std::fs::write(template.path.join("memory"), "other memory").unwrap();
    assert!(!host.launch(&config()).await.1);
}

#[tokio::test]
async fn a_host_that_is_closed_leaves_only_what_is_somebodys() {
    let host = Host::new().await;
    let (id, _) = host.launch(&config()).await;
    host.settles(3).await;
    host.vms.close().await;
    let left: Vec<_> = host.vms.inner.dirs.list().unwrap().iter().map(|dir| dir.id().to_string()).collect();
    assert_eq!((left, host.stage.running.lock().unwrap().len()), (vec![id], 1));
    let (_, waited) = host.launch(&config()).await;
    assert!(!waited);
    host.vms.close().await;
    assert_eq!(host.stage.running.lock().unwrap().len(), 2, "none is made any more");
}

#[tokio::test]
async fn a_host_is_closed_without_waiting_for_a_guest_that_is_being_restored() {
    let host = Host::new().await;
    host.stage.mute.store(1, Ordering::SeqCst);
    let close = async {
        while host.stage.running.lock().unwrap().is_empty() {
            tokio::task::yield_now().await;
        }
        host.vms.close().await;
    };
    let config = config();
    let both = async { tokio::join!(host.vms.inner.keep_waiting(&config), close) };
    tokio::time::timeout(RESTORE_PATIENCE / 2, both).await.expect("nobody waits for an answer");
    assert!(host.stage.running.lock().unwrap().is_empty() && host.vms.inner.dirs.list().unwrap().is_empty());
}

#[tokio::test]
async fn what_cannot_be_restored_is_not_tried_again_for_each_of_many_starts() {
    let host = Host::new().await;
    host.stage.broken.store(1, Ordering::SeqCst);
    let config = config();
    futures::future::join_all((0..5).map(|_| host.vms.inner.keep_waiting(&config))).await;
    assert!(host.stage.restored.load(Ordering::SeqCst) <= 2);
    host.stage.broken.store(0, Ordering::SeqCst);
    host.vms.inner.keep_waiting(&config).await;
    assert_eq!(host.vms.waiting(), Some(2));
}

#[tokio::test]
async fn those_that_wait_end_with_the_process_and_the_next_one_leaves_nothing_of_them() {
    let host = Host::new().await;
    let (id, _) = host.launch(&config()).await;
    host.settles(3).await;
    let Host { vms: before, stage, place } = host;
    let inner = Arc::downgrade(&before.inner);
    drop(before);
    let begun = Instant::now();
    while inner.strong_count() > 0 {
        assert!(begun.elapsed() < BOOT_PATIENCE, "somebody still works");
        tokio::time::sleep(Duration::from_millis(1)).await;
    }
    assert_eq!(stage.running.lock().unwrap().len(), 1, "that of the Pod goes on");
    let host = Host { vms: vms(&place, &stage).await, stage, place };
    assert_eq!(host.vms.inner.dirs.list().unwrap().len(), 3);
    host.vms.end_all(host.vms.left().into_iter().filter(|left| *left != id).collect());
    while host.vms.inner.dirs.list().unwrap().len() > 1 {
        assert!(begun.elapsed() < BOOT_PATIENCE, "something is left of them");
        tokio::time::sleep(Duration::from_millis(1)).await;
    }
    assert!(host.vms.find(&id).await.unwrap().is_some());
}
