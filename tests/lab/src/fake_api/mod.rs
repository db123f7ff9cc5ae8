//! An API server in memory, over real HTTP.
//!
//! It does what watches depend on: lists in pages, watches from a version, bookmarks, streamed
//! lists, label and field selectors (an object that leaves a selection is deleted for its
//! watchers), a history that can be compacted (410 Gone), and the ways to fail: 401, 403, an API
//! that does not exist, connections that break. Every request is recorded.
//!
//! Objects are serialised once, when they are put; lists and watches share the bytes. So it also
//! serves clusters of any size, and counts what it sends.

mod answers;
mod selectors;
mod serve;
mod watches;
mod writes;

use std::collections::{BTreeMap, BTreeSet, VecDeque};
use std::net::SocketAddr;
use std::path::{Path, PathBuf};
use std::sync::atomic::{AtomicU64, Ordering};
use std::sync::{Arc, Mutex, MutexGuard};
use std::time::Instant;

use hyper::body::Bytes;
use serde_json::{Value, json};
use tokio::net::TcpListener;
use tokio::sync::watch;

pub use writes::Written;

use selectors::{Traits, traits_of};
use serve::accept;

/// The collections that the server has at first.
pub const SERVICES: &str = "/api/v1/services";

pub const NODES: &str = "/api/v1/nodes";
pub const SLICES: &str = "/apis/discovery.k8s.io/v1/endpointslices";
pub const CIDRS: &str = "/apis/networking.k8s.io/v1/servicecidrs";
pub const PODS: &str = "/api/v1/pods";
pub const NAMESPACES: &str = "/api/v1/namespaces";
/// What can be written to, and not read.
pub const EVENTS: &str = "/apis/events.k8s.io/v1/events";

pub const POLICIES: &str = "/apis/networking.k8s.io/v1/networkpolicies";

/// An API that the server has only after [`FakeApi::add_api`].
pub const CLUSTER_POLICIES: &str = "/apis/policy.networking.k8s.io/v1alpha2/clusternetworkpolicies";
/// Where discovery lists the kinds of that API; 404 without it.
pub const DISCOVERY: &str = "/apis/policy.networking.k8s.io/v1alpha2";

/// How the server treats `sendInitialEvents=true`.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Streaming {
    /// Streams the list and ends it with the annotated bookmark.
    Yes,
    /// Answers 422, as servers without the feature do.
    Rejected,
    /// Sends the objects and never the bookmark, as servers that do not know the parameter do.
    Ignored,
    /// Closes the connection before the bookmark.
    CutOff,
}

/// A request as it came.
#[derive(Clone, Debug)]
pub struct Recorded {
    pub method: String,
    pub path: String,
    pub query: BTreeMap<String, String>,
}

impl Recorded {
    pub fn get(&self, name: &str) -> &str {
        self.query.get(name).map_or("", String::as_str)
    }

    pub fn is_watch(&self) -> bool {
        self.get("watch") == "true"
    }
}

/// The server; it stops when dropped.
pub struct FakeApi {
    address: SocketAddr,
    state: Arc<Mutex<State>>,
    /// Counts changes, to wake the watches.
    changed: watch::Sender<u64>,
    /// Counts how often all connections were broken (first) and all watches ended (second).
    broken: watch::Sender<(u64, u64)>,
    /// Counts open connections.
    open: watch::Sender<usize>,
    traffic: watch::Sender<Traffic>,
    /// Counts the bytes of all answers, without what HTTP adds.
    sent: Arc<AtomicU64>,
    tasks: Vec<tokio::task::JoinHandle<()>>,
}

/// Counts by collection.
#[derive(Default)]
struct Traffic {
    requests: BTreeMap<String, usize>,
    /// The watches that are open.
    watches: BTreeMap<String, usize>,
}

struct State {
    version: u64,
    /// Versions up to this one are no longer in the history.
    compacted: u64,
    collections: BTreeMap<String, Collection>,
    streaming: Streaming,
    gone_as_event: bool,
    token: Option<String>,
    forbidden: BTreeSet<String>,
    /// Whether Services cannot be selected by their fields.
    old_fields: bool,
    /// The collections of which the next page after the first is too old to be had.
    expiring: BTreeSet<String>,
    /// Collections that cannot be had at present: the seconds after which to come back.
    busy: BTreeMap<String, u32>,
    /// What is answered in place of a collection, whether it is listed or watched.
    instead: BTreeMap<String, Bytes>,
    /// The collections of which no page after the first can be had.
    failing: BTreeSet<String>,
    /// Paths that are answered with 404 so many times.
    missing: BTreeMap<String, usize>,
    down: bool,
    /// Counts the connections that were refused.
    refused: watch::Sender<usize>,
    requests: Vec<Recorded>,
    written: Vec<Written>,
    /// The status that answers writes, in place of doing them.
    write_status: Option<(u16, &'static str)>,
    /// The same for Events about objects of a name.
    write_status_about: BTreeMap<&'static str, (u16, &'static str)>,
}

impl State {
    fn put(&mut self, path: &str, mut object: Value) {
        // As real servers do in a watch, whatever they were given.
        let (api_version, kind) = type_of(path);
        for (field, value) in [("apiVersion", api_version), ("kind", kind)] {
            let known = object.as_object_mut().expect("an object");
            known.entry(field).or_insert_with(|| value.into());
        }
        self.version += 1;
        let version = self.version;
        object["metadata"]["resourceVersion"] = json!(version.to_string());
        let stored = Stored {
            json: Bytes::from(object.to_string()),
            traits: Arc::new(traits_of(&object)),
        };
        let collection = self
            .collections
            .get_mut(path)
            .expect("the collection exists");
        let before = collection.objects.insert(key_of(&object), stored.clone());
        collection.history.push_back(Change {
            version,
            object: Some(stored),
            before: before.map(|before| before.traits),
            deleted: false,
        });
    }
}

#[derive(Default)]
struct Collection {
    objects: BTreeMap<String, Stored>,
    history: VecDeque<Change>,
}

#[derive(Clone)]
struct Stored {
    json: Bytes,
    traits: Arc<Traits>,
}

#[derive(Clone)]
struct Change {
    version: u64,
    /// The object after the change, or as it last was; `None` for a bookmark.
    object: Option<Stored>,
    before: Option<Arc<Traits>>,
    deleted: bool,
}

impl FakeApi {
    /// Starts a server with empty collections that streams lists.
    pub async fn start() -> Self {
        let collections = [SERVICES, NODES, SLICES, CIDRS, PODS, NAMESPACES, POLICIES];
        let state = Arc::new(Mutex::new(State {
            version: 100,
            compacted: 0,
            collections: collections
                .map(|path| (path.to_owned(), Collection::default()))
                .into(),
            streaming: Streaming::Yes,
            gone_as_event: false,
            token: None,
            forbidden: BTreeSet::new(),
            old_fields: false,
            expiring: BTreeSet::new(),
            busy: BTreeMap::new(),
            failing: BTreeSet::new(),
            instead: BTreeMap::new(),
            missing: BTreeMap::new(),
            down: false,
            refused: watch::Sender::new(0),
            requests: Vec::new(),
            written: Vec::new(),
            write_status: None,
            write_status_about: BTreeMap::new(),
        }));
        let (changed, _) = watch::channel(0);
        let (broken, _) = watch::channel((0, 0));
        let (open, _) = watch::channel(0);
        let (traffic, _) = watch::channel(Traffic::default());
        let mut server = Self {
            address: SocketAddr::from(([127, 0, 0, 1], 0)),
            state,
            changed,
            broken,
            open,
            traffic,
            sent: Arc::default(),
            tasks: Vec::new(),
        };
        server.listen().await;
        server
    }

    /// Opens another port, in the network namespace of the calling thread. From now on it is the
    /// server's address; the others go on.
    pub async fn listen(&mut self) {
        let listener = TcpListener::bind("127.0.0.1:0").await.expect("a port");
        self.address = listener.local_addr().expect("an address");
        self.tasks.push(tokio::spawn(accept(
            listener,
            self.state.clone(),
            self.changed.clone(),
            self.broken.clone(),
            self.open.clone(),
            self.traffic.clone(),
            self.sent.clone(),
        )));
    }

    fn state(&self) -> MutexGuard<'_, State> {
        self.state.lock().expect("no test panicked with it")
    }

    fn wake(&self) {
        self.changed.send_modify(|count| *count += 1);
    }

    /// Creates or replaces an object; the server adds its version.
    pub fn put(&self, path: &str, object: Value) {
        self.put_all([(path, object)]);
    }

    /// Creates or replaces objects at once. Returns the moment in which the watches are told.
    pub fn put_all<'a>(&self, objects: impl IntoIterator<Item = (&'a str, Value)>) -> Instant {
        let mut state = self.state();
        for (path, object) in objects {
            state.put(path, object);
        }
        drop(state);
        let told = Instant::now();
        self.wake();
        told
    }

    /// Deletes an object by `namespace/name`, or `name` of a cluster-scoped one.
    pub fn delete(&self, path: &str, key: &str) {
        let mut state = self.state();
        state.version += 1;
        let version = state.version;
        let collection = state
            .collections
            .get_mut(path)
            .expect("the collection exists");
        let stored = collection.objects.remove(key).expect("the object exists");
        let mut object: Value = serde_json::from_slice(&stored.json).expect("JSON");
        object["metadata"]["resourceVersion"] = json!(version.to_string());
        collection.history.push_back(Change {
            version,
            before: Some(stored.traits.clone()),
            object: Some(Stored {
                json: Bytes::from(object.to_string()),
                ..stored
            }),
            deleted: true,
        });
        drop(state);
        self.wake();
    }

    /// Returns the current objects of a collection.
    pub fn objects(&self, path: &str) -> Vec<Value> {
        let state = self.state();
        let collection = state.collections.get(path);
        let collection = collection.expect("the collection exists");
        let objects = collection.objects.values();
        objects
            .map(|stored| serde_json::from_slice(&stored.json).expect("JSON"))
            .collect()
    }

    /// Sends a bookmark on every watch.
    pub fn bookmark(&self) {
        let mut state = self.state();
        state.version += 1;
        let version = state.version;
        for collection in state.collections.values_mut() {
            collection.history.push_back(Change {
                version,
                object: None,
                before: None,
                deleted: false,
            });
        }
        drop(state);
        self.wake();
    }

    /// Forgets the history: resuming from any version so far is answered with 410 Gone, as a
    /// status or, if `as_event`, as an event of the watch.
    pub fn compact(&self, as_event: bool) {
        let mut state = self.state();
        state.version += 1;
        state.compacted = state.version;
        state.gone_as_event = as_event;
        for collection in state.collections.values_mut() {
            collection.history.clear();
        }
    }

    /// Forgets the oldest history, up to so many changes of each collection, as servers do after
    /// some minutes. Watches that are further behind would miss what is forgotten.
    pub fn trim(&self, keep: usize) {
        let mut state = self.state();
        let mut forgotten = state.compacted;
        for collection in state.collections.values_mut() {
            let superfluous = collection.history.len().saturating_sub(keep);
            let last = collection.history.drain(..superfluous).last();
            forgotten = forgotten.max(last.map_or(0, |change| change.version));
        }
        state.compacted = forgotten;
    }

    pub fn set_streaming(&self, streaming: Streaming) {
        self.state().streaming = streaming;
    }

    /// From now on only this bearer token is accepted; anything else gets 401.
    pub fn require_token(&self, token: &str) {
        self.state().token = Some(token.to_owned());
    }

    /// Answers requests for a collection with 403, or no longer.
    pub fn forbid(&self, path: &str, forbidden: bool) {
        let mut state = self.state();
        if forbidden {
            state.forbidden.insert(path.to_owned());
        } else {
            state.forbidden.remove(path);
        }
    }

    /// Answers with 400 where Services are to be selected by their fields, as servers before
    /// Kubernetes 1.31 do.
    pub fn set_old_fields(&self, old: bool) {
        self.state().old_fields = old;
    }

    /// Answers requests for a collection with 429, as a server with too much to do does: with a
    /// text, and with the header that says after how many seconds to come back.
    pub fn set_busy(&self, path: &str, retry_after: Option<u32>) {
        let mut state = self.state();
        match retry_after {
            Some(seconds) => state.busy.insert(path.to_owned(), seconds),
            None => state.busy.remove(path),
        };
    }

    /// Answers the next page of a list that is not the first one with 410, once.
    pub fn expire_next_page(&self, path: &str) {
        self.state().expiring.insert(path.to_owned());
    }

    /// Answers every page of a list but the first one with 500, or no longer.
    pub fn fail_next_pages(&self, path: &str, failing: bool) {
        let mut state = self.state();
        if failing {
            state.failing.insert(path.to_owned());
        } else {
            state.failing.remove(path);
        }
    }

    /// Answers requests for a collection with 200 and this text, or no longer.
    pub fn answer_instead(&self, path: &str, text: Option<&str>) {
        let mut state = self.state();
        match text {
            Some(text) => state
                .instead
                .insert(path.to_owned(), text.to_owned().into()),
            None => state.instead.remove(path),
        };
    }

    /// Takes a whole API away: 404.
    pub fn remove_api(&self, path: &str) {
        self.state().collections.remove(path);
    }

    /// Answers the next so many requests for a path with 404.
    pub fn miss(&self, path: &str, times: usize) {
        self.state().missing.insert(path.to_owned(), times);
    }

    /// Brings an API (back), empty.
    pub fn add_api(&self, path: &str) {
        self.state().collections.entry(path.to_owned()).or_default();
    }

    /// Refuses all connections, and breaks those that are open; or works again. Returns when
    /// no connection is open.
    pub async fn set_down(&self, down: bool) {
        self.state().down = down;
        if down {
            self.broken.send_modify(|(broken, _)| *broken += 1);
            let mut open = self.open.subscribe();
            open.wait_for(|open| *open == 0)
                .await
                .expect("the server exists");
        }
    }

    /// Waits until this many more connections were refused.
    pub async fn until_refused_again(&self, times: usize) {
        let mut refused = self.state().refused.subscribe();
        let wanted = *refused.borrow() + times;
        let met = refused.wait_for(|refused| *refused >= wanted);
        let waited = tokio::time::timeout(std::time::Duration::from_secs(120), met).await;
        assert!(waited.is_ok(), "there never were {wanted} connections");
    }

    /// Breaks all watches in the middle, as a network does.
    pub async fn break_connections(&self) {
        self.set_down(true).await;
        self.set_down(false).await;
    }

    /// Ends all watches properly, as a server does after `timeoutSeconds`.
    pub fn end_watches(&self) {
        self.broken.send_modify(|(_, ended)| *ended += 1);
    }

    /// Waits until a collection has this many open watches.
    pub async fn until_watched(&self, path: &str, count: usize) {
        self.until(&format!("{count} watches of {path}"), |traffic| {
            traffic.watches.get(path).copied().unwrap_or_default() == count
        })
        .await;
    }

    /// Waits until a collection was asked for this many times more.
    pub async fn until_asked_again(&self, path: &str, times: usize) {
        let wanted = self.requests_for(path).len() + times;
        self.until(&format!("{wanted} requests for {path}"), |traffic| {
            traffic.requests.get(path).copied().unwrap_or_default() >= wanted
        })
        .await;
    }

    async fn until(&self, what: &str, condition: impl FnMut(&Traffic) -> bool) {
        let mut traffic = self.traffic.subscribe();
        let met = traffic.wait_for(condition);
        let waited = tokio::time::timeout(std::time::Duration::from_secs(120), met).await;
        assert!(waited.is_ok(), "there never were {what}");
    }

    /// All requests so far, in order.
    pub fn requests(&self) -> Vec<Recorded> {
        self.state().requests.clone()
    }

    /// The requests for a collection.
    pub fn requests_for(&self, path: &str) -> Vec<Recorded> {
        let of_path = |request: &Recorded| request.path == path;
        self.requests().into_iter().filter(of_path).collect()
    }

    /// The bytes of all answers so far, without what HTTP adds.
    pub fn sent(&self) -> u64 {
        self.sent.load(Ordering::Relaxed)
    }

    pub fn address(&self) -> SocketAddr {
        self.address
    }

    pub fn url(&self) -> String {
        format!("http://{}", self.address)
    }

    /// Writes a kubeconfig for the server that reads its token from the file `token` beside it.
    pub fn write_kubeconfig(&self, directory: &Path) -> PathBuf {
        let path = directory.join("kubeconfig");
        let token = directory.join("token");
        let text = format!(
            "apiVersion: v1\nkind: Config\ncurrent-context: fake\n\
             clusters:\n- name: fake\n  cluster:\n    server: {}\n\
             users:\n- name: nftlet\n  user:\n    tokenFile: {}\n\
             contexts:\n- name: fake\n  context:\n    cluster: fake\n    user: nftlet\n",
            self.url(),
            token.display()
        );
        if !token.exists() {
            std::fs::write(&token, "secret").expect("written");
        }
        std::fs::write(&path, text).expect("written");
        path
    }
}

impl Drop for FakeApi {
    fn drop(&mut self) {
        self.tasks.iter().for_each(tokio::task::JoinHandle::abort);
        self.broken.send_modify(|(broken, _)| *broken += 1);
    }
}

/// The version and the kind of the objects of a collection.
fn type_of(path: &str) -> (&'static str, &'static str) {
    match writes::of_all_namespaces(path).0.as_str() {
        SERVICES => ("v1", "Service"),
        NODES => ("v1", "Node"),
        SLICES => ("discovery.k8s.io/v1", "EndpointSlice"),
        CIDRS => ("networking.k8s.io/v1", "ServiceCIDR"),
        PODS => ("v1", "Pod"),
        NAMESPACES => ("v1", "Namespace"),
        POLICIES => ("networking.k8s.io/v1", "NetworkPolicy"),
        CLUSTER_POLICIES => ("policy.networking.k8s.io/v1alpha2", "ClusterNetworkPolicy"),
        other => panic!("the server has no {other}"),
    }
}

fn key_of(object: &Value) -> String {
    let name = object["metadata"]["name"].as_str().unwrap_or_default();
    match object["metadata"]["namespace"].as_str() {
        Some(namespace) => format!("{namespace}/{name}"),
        None => name.to_owned(),
    }
}
