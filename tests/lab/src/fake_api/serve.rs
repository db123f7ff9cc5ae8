//! Connections and their requests.

use std::convert::Infallible;
use std::ops::Bound;
use std::sync::atomic::{AtomicU64, Ordering};
use std::sync::{Arc, Mutex};

use futures::stream::{self, StreamExt};
use http_body_util::BodyExt;
use hyper::body::{Bytes, Incoming};
use hyper::service::service_fn;
use hyper::{Request, StatusCode};
use hyper_util::rt::TokioIo;
use serde_json::json;
use tokio::net::TcpListener;
use tokio::sync::watch;

use super::answers::{Answer, event, full, query_of, status, status_value, stream_answer};
use super::selectors::Selector;
use super::watches::{Counted, Follow};
use super::writes;
use super::{
    CLUSTER_POLICIES, Collection, DISCOVERY, Recorded, State, Streaming, Traffic, type_of,
};

pub async fn accept(
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
            // Under the lock: a shutdown of the server finds the connection, or refuses it.
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
    let missing = locked.missing.get_mut(&path);
    let missing = missing.is_some_and(|times| {
        let left = times.checked_sub(1);
        *times = left.unwrap_or_default();
        left.is_some()
    });
    if path == DISCOVERY && !missing && locked.collections.contains_key(CLUSTER_POLICIES) {
        return full(StatusCode::OK, kinds().to_string().into());
    }
    let too_new = locked.old_fields && recorded.get("fieldSelector").contains("spec.clusterIP");
    let selector = Selector::new(recorded.get("labelSelector"), recorded.get("fieldSelector"));
    // The names of the tests' objects are enough to find them.
    let collection = locked.collections.get(&writes::of_all_namespaces(&path).0);
    let Some(collection) = collection.filter(|_| !missing) else {
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

/// The answer of discovery where the server has ClusterNetworkPolicies.
fn kinds() -> serde_json::Value {
    let kind = |name: &str, verbs: &[&str]| json!({"name": name, "singularName": "", "namespaced": false, "kind": "ClusterNetworkPolicy", "verbs": verbs});
    json!({"kind": "APIResourceList", "apiVersion": "v1", "groupVersion": "policy.networking.k8s.io/v1alpha2", "resources": [
        kind("clusternetworkpolicies", &["get", "list", "watch"]),
        kind("clusternetworkpolicies/status", &["get"]),
    ]})
}

pub fn list(
    state: &State,
    collection: &Collection,
    request: &Recorded,
    selector: &Selector,
) -> Answer {
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
