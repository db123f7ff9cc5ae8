//! An API server in memory, over real HTTP.
//!
//! It does what watches depend on: lists in pages, watches from a version, bookmarks, streamed
//! lists, label and field selectors (an object that leaves a selection is deleted for its
//! watchers), a history that can be compacted (410 Gone), and the ways to fail: 401, 403, an API
//! that does not exist, connections that break. Every request is recorded.
//!
//! Objects are serialised once, when they are put; lists and watches share the bytes. So it also
//! serves clusters of any size, and counts what it sends.

use std::collections::{BTreeMap, BTreeSet, VecDeque};
use std::convert::Infallible;
use std::io;
use std::net::SocketAddr;
use std::ops::Bound;
use std::path::{Path, PathBuf};
use std::sync::atomic::{AtomicU64, Ordering};
use std::sync::{Arc, Mutex, MutexGuard};
use std::time::Instant;

use futures::stream::{self, StreamExt};
use http_body_util::BodyExt;
use hyper::body::{Bytes, Incoming};
use hyper::service::service_fn;
use hyper::{Request, StatusCode};
use hyper_util::rt::TokioIo;
use serde_json::{Value, json};
use tokio::net::TcpListener;
use tokio::sync::watch;

mod answers;
mod selectors;
mod writes;

pub use writes::Written;

use answers::{Answer, event, full, query_of, status, status_value, stream_answer};
use selectors::{Selector, Traits, traits_of};

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

    /// The objects of a collection as they are now.
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

async fn accept(
    listener: TcpListener,
    state: Arc<Mutex<State>>,
    changed: watch::Sender<u64>,
    broken: watch::Sender<(u64, u64)>,
    open: watch::Sender<usize>,
    traffic: watch::Sender<Traffic>,
    sent: Arc<AtomicU64>,
) {
    while let Ok((socket, _)) = listener.accept().await {
        // As real servers do: an event does not wait for the acknowledgement of the one before.
        socket.set_nodelay(true).expect("a TCP socket");
        let mut breaks = broken.subscribe();
        let generation = {
            // Under the lock: whoever takes the server down finds the connection, or keeps it out.
            let state = state.lock().expect("no test panicked with it");
            if state.down {
                state.refused.send_modify(|refused| *refused += 1);
                continue;
            }
            open.send_modify(|open| *open += 1);
            breaks.borrow_and_update().0
        };
        let (state, changed, broken) = (state.clone(), changed.clone(), broken.clone());
        let (open, traffic, sent) = (open.clone(), traffic.clone(), sent.clone());
        tokio::spawn(async move {
            let service = service_fn(move |request: Request<Incoming>| {
                let (state, changed) = (state.clone(), changed.clone());
                let (broken, traffic) = (broken.clone(), traffic.clone());
                let sent = sent.clone();
                async move {
                    let answer = if writes::is_write(&request) {
                        writes::write(request, &state, &changed).await
                    } else {
                        answer(&request, &state, &changed, &broken, &traffic)
                    };
                    let answer = answer.map(|body| {
                        body.map_frame(move |frame| {
                            let length = frame.data_ref().map_or(0, Bytes::len);
                            sent.fetch_add(length as u64, Ordering::Relaxed);
                            frame
                        })
                    });
                    Ok::<_, Infallible>(answer)
                }
            });
            let connection = hyper::server::conn::http1::Builder::new()
                .serve_connection(TokioIo::new(socket), service);
            tokio::select! {
                _ = connection => {}
                // Dropping the connection closes the socket in whatever state it is.
                _ = breaks.wait_for(|(broken, _)| *broken != generation) => {}
            }
            open.send_modify(|open| *open -= 1);
        });
    }
}

fn answer(
    request: &Request<Incoming>,
    state: &Arc<Mutex<State>>,
    changed: &watch::Sender<u64>,
    broken: &watch::Sender<(u64, u64)>,
    traffic: &watch::Sender<Traffic>,
) -> Answer {
    let path = request.uri().path().to_owned();
    let recorded = Recorded {
        method: request.method().to_string(),
        query: query_of(request.uri().query().unwrap_or_default()),
        path: path.clone(),
    };
    let authorization = request
        .headers()
        .get("authorization")
        .and_then(|value| value.to_str().ok())
        .unwrap_or_default();
    let mut locked = state.lock().expect("no test panicked with it");
    locked.requests.push(recorded.clone());
    traffic.send_modify(|traffic| *traffic.requests.entry(path.clone()).or_default() += 1);
    if let Some(token) = &locked.token
        && authorization != format!("Bearer {token}")
    {
        return status(401, "Unauthorized", "Unauthorized");
    }
    let plural = path.rsplit('/').next().unwrap_or_default();
    if locked.forbidden.contains(&path) {
        let message = format!(
            "{plural} is forbidden: User \"fake\" cannot list resource \"{plural}\" at the cluster scope"
        );
        return status(403, "Forbidden", &message);
    }
    if let Some(seconds) = locked.busy.get(&path) {
        let text = Bytes::from("Too many requests, please try again later.\n");
        let mut answer = full(StatusCode::TOO_MANY_REQUESTS, text);
        answer
            .headers_mut()
            .insert("retry-after", (*seconds).into());
        return answer;
    }
    if !recorded.get("continue").is_empty() && locked.expiring.remove(&path) {
        return status(410, "Expired", "The provided continue parameter is too old");
    }
    if locked.failing.contains(&path) && !recorded.get("continue").is_empty() {
        return status(500, "InternalError", "etcd took too long");
    }
    // Not in place of the answers that lead to another list.
    let version = recorded.get("resourceVersion");
    let version = version.trim_start_matches('0').parse::<u64>();
    let lists_again = recorded.is_watch()
        && match version {
            Ok(version) if recorded.get("sendInitialEvents").is_empty() => {
                version < locked.compacted
            }
            _ => locked.streaming == Streaming::Rejected,
        };
    if let Some(text) = locked.instead.get(&path).filter(|_| !lists_again) {
        return full(StatusCode::OK, text.clone());
    }
    let too_new = locked.old_fields && recorded.get("fieldSelector").contains("spec.clusterIP");
    let selector = Selector::new(recorded.get("labelSelector"), recorded.get("fieldSelector"));
    // The names of the tests' objects are enough to find them.
    let Some(collection) = locked.collections.get(&writes::of_all_namespaces(&path).0) else {
        return status(
            404,
            "NotFound",
            "the server could not find the requested resource",
        );
    };
    let initial = recorded.get("sendInitialEvents") == "true";
    if initial && locked.streaming == Streaming::Rejected {
        let message = "ListOptions.meta.k8s.io \"\" is invalid: sendInitialEvents: Forbidden: sendInitialEvents is forbidden for watch unless the WatchList feature gate is enabled";
        return status(422, "Invalid", message);
    }
    // Servers look at the selectors after the other parameters.
    if too_new {
        let message = "\"spec.clusterIP\" is not a known field selector: only \"metadata.name\", \"metadata.namespace\"";
        return status(400, "BadRequest", message);
    }
    if !recorded.is_watch() {
        return list(&locked, collection, &recorded, &selector);
    }

    let mut lines = Vec::new();
    let from = match recorded.get("resourceVersion") {
        // A streamed list is of now; its version says how old it may be at most.
        version if initial || ["", "0"].contains(&version) => {
            let chosen = collection
                .objects
                .values()
                .filter(|stored| selector.takes(&stored.traits));
            lines.extend(chosen.map(|stored| ("ADDED", stored.json.clone())));
            if initial && locked.streaming == Streaming::Yes {
                let (api_version, kind) = type_of(&path);
                let end = json!({"kind": kind, "apiVersion": api_version,
                    "metadata": {"resourceVersion": locked.version.to_string(),
                        "annotations": {"k8s.io/initial-events-end": "true"}}});
                lines.push(("BOOKMARK", end.to_string().into()));
            }
            locked.version
        }
        version => version.parse().unwrap_or_default(),
    };
    if from < locked.compacted {
        let gone = status_value(410, "Expired", "too old resource version");
        if !locked.gone_as_event {
            return status(410, "Expired", "too old resource version");
        }
        let line = event("ERROR", gone.to_string().as_bytes());
        return stream_answer(stream::iter([Ok(line)]).boxed());
    }
    let cut_off = initial && locked.streaming == Streaming::CutOff;
    drop(locked);
    if cut_off {
        let lines = lines.into_iter().map(|(type_, json)| event(type_, &json));
        return stream_answer(stream::iter(lines.map(Ok)).boxed());
    }
    let follow = Follow {
        _counted: Counted::new(traffic.clone(), &path),
        state: state.clone(),
        changed: changed.subscribe(),
        ended_before: broken.borrow().1,
        ended: broken.subscribe(),
        path,
        selector,
        bookmarks: recorded.get("allowWatchBookmarks") == "true",
        from,
        lines: lines.into(),
    };
    stream_answer(stream::unfold(follow, Follow::next).boxed())
}

/// An open watch in the count of its collection.
struct Counted {
    traffic: watch::Sender<Traffic>,
    path: String,
}

impl Counted {
    fn new(traffic: watch::Sender<Traffic>, path: &str) -> Self {
        let path = path.to_owned();
        traffic.send_modify(|traffic| *traffic.watches.entry(path.clone()).or_default() += 1);
        Self { traffic, path }
    }
}

impl Drop for Counted {
    fn drop(&mut self) {
        self.traffic.send_modify(|traffic| {
            if let Some(count) = traffic.watches.get_mut(&self.path) {
                *count -= 1;
            }
        });
    }
}

/// One watch.
struct Follow {
    _counted: Counted,
    state: Arc<Mutex<State>>,
    changed: watch::Receiver<u64>,
    ended: watch::Receiver<(u64, u64)>,
    ended_before: u64,
    path: String,
    selector: Selector,
    bookmarks: bool,
    from: u64,
    /// The events to send: type and object.
    lines: VecDeque<(&'static str, Bytes)>,
}

/// About how much is written at once where a lot is to be sent.
const CHUNK: usize = 64 * 1024;

impl Follow {
    async fn next(mut self) -> Option<(io::Result<Bytes>, Self)> {
        let ended = self.ended_before;
        loop {
            if self.ended.borrow().1 != ended {
                return None;
            }
            if let Some(chunk) = self.chunk() {
                return Some((Ok(chunk), self));
            }
            self.changed.borrow_and_update();
            self.collect();
            if self.lines.is_empty() {
                tokio::select! {
                    changed = self.changed.changed() => changed.ok()?,
                    _ = self.ended.wait_for(|(_, now)| *now != ended) => return None,
                }
            }
        }
    }

    /// The events that wait, up to about [`CHUNK`].
    fn chunk(&mut self) -> Option<Bytes> {
        let mut chunk = Vec::new();
        while chunk.len() < CHUNK
            && let Some((type_, json)) = self.lines.pop_front()
        {
            chunk.extend_from_slice(&event(type_, &json));
        }
        (!chunk.is_empty()).then(|| chunk.into())
    }

    fn collect(&mut self) {
        let state = self.state.lock().expect("no test panicked with it");
        let Some(collection) = state.collections.get(&self.path) else {
            return;
        };
        let first = collection
            .history
            .partition_point(|change| change.version <= self.from);
        for change in collection.history.range(first..) {
            self.from = change.version;
            let Some(object) = &change.object else {
                if self.bookmarks {
                    let (api_version, kind) = type_of(&self.path);
                    let mark = json!({"kind": kind, "apiVersion": api_version,
                        "metadata": {"resourceVersion": change.version.to_string()}});
                    self.lines.push_back(("BOOKMARK", mark.to_string().into()));
                }
                continue;
            };
            let was = change
                .before
                .as_ref()
                .is_some_and(|before| self.selector.takes(before));
            let is = !change.deleted && self.selector.takes(&object.traits);
            let type_ = match (was, is) {
                (false, true) => "ADDED",
                (true, true) => "MODIFIED",
                (true, false) => "DELETED",
                (false, false) => continue,
            };
            self.lines.push_back((type_, object.json.clone()));
        }
    }
}

fn list(state: &State, collection: &Collection, request: &Recorded, selector: &Selector) -> Answer {
    let limit = request.get("limit").parse::<usize>().unwrap_or(usize::MAX);
    let (version, after) = match request.get("continue").split_once(':') {
        Some((version, after)) => (version.parse().unwrap_or_default(), Some(after)),
        None => (state.version, None),
    };
    if version < state.compacted {
        return status(410, "Expired", "The provided continue parameter is too old");
    }
    let rest = match after {
        Some(after) => (Bound::Excluded(after), Bound::Unbounded),
        None => (Bound::Unbounded, Bound::Unbounded),
    };
    let mut chosen = collection
        .objects
        .range::<str, _>(rest)
        .filter(|(_, stored)| selector.takes(&stored.traits));
    let page: Vec<_> = chosen.by_ref().take(limit).collect();
    let token = match (chosen.next(), page.last()) {
        (Some(_), Some((last, _))) => format!("{version}:{last}"),
        _ => String::new(),
    };
    let head = json!({"resourceVersion": version.to_string(), "continue": token});
    let (api_version, kind) = type_of(&request.path);
    let mut body = format!(
        "{{\"kind\":\"{kind}List\",\"apiVersion\":\"{api_version}\",\"metadata\":{head},\"items\":["
    )
    .into_bytes();
    for (index, (_, stored)) in page.iter().enumerate() {
        if index > 0 {
            body.push(b',');
        }
        body.extend_from_slice(&stored.json);
    }
    body.extend_from_slice(b"]}");
    full(StatusCode::OK, Bytes::from(body))
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
