//! Learns at once that a ConfigMap or Secret has changed which a running Pod shows in a volume.
//!
//! A node's identity may watch such an object, one at a time and by name (the Node authorizer takes a field selector for
//! a name). There is one watch per object, however many Pods show it, and it carries metadata only: what is compared is
//! the version, and whoever shows an older one fetches the object as any other.

use std::collections::btree_map::Entry;
use std::collections::{BTreeMap, HashMap};
use std::fmt;
use std::fmt::Debug;
use std::pin::pin;
use std::sync::{Arc, Mutex, PoisonError, Weak};

use futures::StreamExt;
use futures::future::select_all;
use k8s_openapi::api::core::v1::{ConfigMap, Secret};
use kube::core::PartialObjectMeta;
use kube::runtime::watcher::Event;
use kube::runtime::{WatchStreamExt, watcher};
use kube::{Api, Client, Resource, ResourceExt};
use serde::de::DeserializeOwned;
use tokio::sync::watch;
use tokio::task::JoinSet;

use super::objects::{Kind, ObjectName, Objects, Uses};
use crate::telemetry::chain;

/// What the API server says of an object: nothing yet, or its version, `None` if it does not exist.
type State = Option<Option<String>>;

/// The watches of this node. Needs the right to `list` and `watch` what Pods name; without it nothing is ever told.
pub struct Watches {
    client: Client,
    objects: Arc<Objects>,
    open: Mutex<HashMap<ObjectName, Weak<Open>>>,
}

/// One watch, for as long as somebody follows the object.
struct Open {
    state: watch::Receiver<State>,
    _task: JoinSet<()>,
}

/// The objects that somebody follows, and which version of each is known there.
#[derive(Default)]
pub struct Following {
    objects: BTreeMap<ObjectName, Followed>,
}

struct Followed {
    known: Option<String>,
    state: watch::Receiver<State>,
    _open: Arc<Open>,
}

impl Watches {
    /// Watches by `client`; what has changed is fetched anew from `objects`.
    pub fn new(client: Client, objects: Arc<Objects>) -> Self {
        Self { client, objects, open: Mutex::new(HashMap::new()) }
    }

    /// From now on these are followed and no others; the versions are those that are known already.
    pub fn follow(&self, following: &mut Following, uses: Uses) {
        following.objects.retain(|name, _| uses.contains_key(name));
        for (name, known) in uses {
            match following.objects.entry(name) {
                Entry::Occupied(mut entry) => entry.get_mut().known = known,
                Entry::Vacant(entry) => {
                    let open = self.open(entry.key());
                    let mut state = open.state.clone();
                    // What was said before is news to whoever comes now.
                    state.mark_changed();
                    entry.insert(Followed { known, state, _open: open });
                }
            }
        }
    }

    fn open(&self, name: &ObjectName) -> Arc<Open> {
        let mut open = self.open.lock().unwrap_or_else(PoisonError::into_inner);
        if let Some(found) = open.get(name).and_then(Weak::upgrade) {
            return found;
        }
        open.retain(|_, watch| watch.strong_count() > 0);
        let (sender, state) = watch::channel(None);
        let (objects, client, namespace) = (Arc::clone(&self.objects), self.client.clone(), &name.namespace);
        let mut task = JoinSet::new();
        match name.kind {
            Kind::ConfigMap => {
                let api: Api<PartialObjectMeta<ConfigMap>> = Api::namespaced(client, namespace);
                task.spawn(observe(api, name.clone(), objects, sender))
            }
            Kind::Secret => {
                let api: Api<PartialObjectMeta<Secret>> = Api::namespaced(client, namespace);
                task.spawn(observe(api, name.clone(), objects, sender))
            }
        };
        let made = Arc::new(Open { state, _task: task });
        open.insert(name.clone(), Arc::downgrade(&made));
        made
    }
}

impl Following {
    /// Returns once an object is another than the one that is known, and takes that for known; never if none is
    /// followed. Cancel-safe.
    pub async fn changed(&mut self) {
        let waits: Vec<_> = self.objects.values_mut().map(|followed| Box::pin(followed.changed())).collect();
        if waits.is_empty() {
            return std::future::pending().await;
        }
        select_all(waits).await;
    }
}

impl fmt::Debug for Following {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_set().entries(self.objects.keys()).finish()
    }
}

impl Followed {
    async fn changed(&mut self) {
        // The watch lives as long as this does, so its channel stays open.
        while self.state.changed().await.is_ok() {
            let state = self.state.borrow_and_update().clone();
            if let Some(version) = state.filter(|version| *version != self.known) {
                self.known = version;
                return;
            }
        }
        std::future::pending().await
    }
}

async fn observe<K>(api: Api<K>, name: ObjectName, objects: Arc<Objects>, state: watch::Sender<State>)
where
    K: Resource<DynamicType = ()> + Clone + Debug + DeserializeOwned + Send + 'static,
{
    let config = watcher::Config::default().fields(&format!("metadata.name={}", name.name));
    let mut events = pin!(watcher(api, config).default_backoff());
    let mut listed = None;
    while let Some(event) = events.next().await {
        let version = match event {
            Ok(Event::Init) => {
                listed = None;
                continue;
            }
            Ok(Event::InitApply(found)) => {
                listed = found.resource_version();
                continue;
            }
            Ok(Event::InitDone) => listed.take(),
            Ok(Event::Apply(found)) => found.resource_version(),
            Ok(Event::Delete(_)) => None,
            Err(error) => {
                tracing::debug!(object = ?name, error = chain(&error), "a watch failed; it goes on");
                continue;
            }
        };
        if *state.borrow() != Some(version.clone()) {
            // First, so that whoever hears of it does not get the former answer.
            objects.outdate(&name);
            state.send_replace(Some(version));
        }
    }
}

#[cfg(test)]
mod tests {
    use std::convert::Infallible;
    use std::time::Duration;

    use bytes::Bytes;
    use http::{Request, Response};
    use http_body_util::{BodyExt, Full, StreamBody};
    use hyper::body::Frame;
    use kube::client::Body;
    use serde_json::{Value, json};
    use tokio::sync::mpsc;
    use tokio_stream::wrappers::ReceiverStream;

    use super::*;

    /// Long enough for anything that is going to happen in this process.
    const SOON: Duration = Duration::from_secs(10);
    /// Long enough for most of what should not happen.
    const WHILE: Duration = Duration::from_millis(100);

    /// An API server with one ConfigMap, which is at version 1, and what its watches have been sent.
    #[derive(Default)]
    struct Server {
        watches: Mutex<Vec<mpsc::Sender<Value>>>,
        opened: Mutex<usize>,
    }

    impl Server {
        fn client(self: &Arc<Self>) -> Client {
            let server = Arc::clone(self);
            let service = tower::service_fn(move |request: Request<Body>| {
                let query = request.uri().query().unwrap_or_default().to_owned();
                assert!(query.contains("metadata.name%3Dconf"), "only by name: {query}");
                let body = if query.contains("watch=true") {
                    let (sender, receiver) = mpsc::channel(8);
                    server.watches.lock().unwrap().push(sender);
                    *server.opened.lock().unwrap() += 1;
                    let lines = ReceiverStream::new(receiver);
                    let frames = lines.map(|v: Value| Ok::<_, Infallible>(Frame::data(Bytes::from(format!("{v}\n")))));
                    StreamBody::new(frames).boxed_unsync()
                } else {
                    let list = json!({"kind": "PartialObjectMetadataList", "apiVersion": "meta.k8s.io/v1",
                        "metadata": {"resourceVersion": "1"}, "items": [object("1")]});
                    Full::new(Bytes::from(list.to_string())).boxed_unsync()
                };
                let answer = Response::builder().header("content-type", "application/json").body(body);
                async move { Ok::<_, Infallible>(answer.unwrap()) }
            });
            Client::new(service, "shop")
        }

        async fn send(&self, kind: &str, version: &str) {
            let event = json!({"type": kind, "object": object(version)});
            while !self.watches.lock().unwrap().iter().any(|watch| watch.try_send(event.clone()).is_ok()) {
                tokio::task::yield_now().await;
            }
        }
    }

    fn object(version: &str) -> Value {
        json!({"kind": "PartialObjectMetadata", "apiVersion": "meta.k8s.io/v1",
            "metadata": {"name": "conf", "namespace": "shop", "resourceVersion": version}})
    }

    fn uses(version: Option<&str>) -> Uses {
        let name = ObjectName { kind: Kind::ConfigMap, namespace: "shop".to_owned(), name: "conf".to_owned() };
        Uses::from([(name, version.map(str::to_owned))])
    }

    async fn changes(following: &mut Following) -> bool {
        tokio::time::timeout(SOON, following.changed()).await.is_ok()
    }

    async fn stays(following: &mut Following) -> bool {
        tokio::time::timeout(WHILE, following.changed()).await.is_err()
    }

    fn watches(server: &Arc<Server>) -> Watches {
        let client = server.client();
        let objects = Arc::new(Objects::new(client.clone(), Duration::ZERO));
        Watches::new(client, objects)
    }

    #[tokio::test]
    async fn every_version_but_the_known_one_is_told_once() {
        let server = Arc::new(Server::default());
        let (watches, mut following) = (watches(&server), Following::default());
        watches.follow(&mut following, uses(Some("1")));
        assert!(stays(&mut following).await, "the known version is no news");
        server.send("MODIFIED", "2").await;
        assert!(changes(&mut following).await);
        assert!(stays(&mut following).await, "told once");
        watches.follow(&mut following, uses(Some("3")));
        server.send("MODIFIED", "3").await;
        assert!(stays(&mut following).await, "it was known before it was told");
        server.send("DELETED", "4").await;
        assert!(changes(&mut following).await);
        watches.follow(&mut following, Uses::new());
        assert!(stays(&mut following).await, "nothing is followed");
    }

    #[tokio::test]
    async fn who_knows_an_old_version_hears_of_it_at_once_and_all_share_a_watch() {
        let server = Arc::new(Server::default());
        let watches = watches(&server);
        let (mut one, mut other) = (Following::default(), Following::default());
        watches.follow(&mut one, uses(None));
        assert!(changes(&mut one).await, "it did not exist, as far as this one knew");
        watches.follow(&mut other, uses(Some("0")));
        assert!(changes(&mut other).await);
        server.send("MODIFIED", "2").await;
        assert!(changes(&mut one).await && changes(&mut other).await);
        assert_eq!(*server.opened.lock().unwrap(), 1);
        drop((one, other));
        let watch = server.watches.lock().unwrap()[0].clone();
        tokio::time::timeout(SOON, watch.closed()).await.expect("nobody follows it any more");
    }
}
