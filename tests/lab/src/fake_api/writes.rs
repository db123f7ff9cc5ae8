//! Writing to the API server in memory: Events are created and patched.

use std::collections::BTreeMap;
use std::sync::{Arc, Mutex};

use http_body_util::BodyExt;
use hyper::body::{Bytes, Incoming};
use hyper::{Method, Request, StatusCode};
use serde_json::Value;
use tokio::sync::watch;

use super::answers::{Answer, full, status};
use super::{EVENTS, FakeApi, Recorded, State};

/// An Event as it was written.
#[derive(Clone, Debug)]
pub struct Written {
    pub method: Method,
    pub namespace: String,
    /// Of the path for a patch, of the object otherwise.
    pub name: String,
    pub body: Value,
}

impl Written {
    pub fn is_new(&self) -> bool {
        self.method == Method::POST
    }

    /// A text inside of the body; empty if there is none.
    pub fn text(&self, pointer: &str) -> &str {
        let found = self.body.pointer(pointer);
        found.and_then(Value::as_str).unwrap_or_default()
    }
}

impl FakeApi {
    /// What was written until now, without what was refused.
    pub fn written(&self) -> Vec<Written> {
        self.state().written.clone()
    }

    /// How many writes were asked for, whatever the answer was.
    pub fn asked_to_write(&self) -> usize {
        let is_write = |request: &&Recorded| request.method != "GET";
        self.requests().iter().filter(is_write).count()
    }

    /// Waits until so many writes were asked for.
    pub async fn until_asked_to_write(&self, count: usize) {
        let mut changed = self.changed.subscribe();
        let met = changed.wait_for(|_| self.asked_to_write() >= count);
        let waited = tokio::time::timeout(std::time::Duration::from_secs(120), met).await;
        assert!(waited.is_ok(), "{} writes", self.asked_to_write());
    }

    /// Answers writes with a status, or does them again.
    pub fn answer_writes(&self, status: Option<(u16, &'static str)>) {
        self.state().write_status = status;
    }

    /// Answers writes of Events about objects of a name with a status.
    pub fn answer_writes_about(&self, name: &'static str, status: (u16, &'static str)) {
        self.state().write_status_about.insert(name, status);
    }

    /// The Events of before are kept no longer.
    pub fn forget_events(&self) {
        self.state().written.clear();
    }

    /// Waits until what was written is as a closure says.
    pub async fn until_written(&self, what: &str, mut right: impl FnMut(&[Written]) -> bool) {
        let mut changed = self.changed.subscribe();
        let met = changed.wait_for(|_| right(&self.state().written));
        let waited = tokio::time::timeout(std::time::Duration::from_secs(120), met).await;
        assert!(waited.is_ok(), "{what}: {:?}", self.written());
    }
}

/// Whether a request is not for reading.
pub fn is_write(request: &Request<Incoming>) -> bool {
    request.method() != Method::GET
}

/// The path of a collection without a namespace, and the namespace.
pub fn of_all_namespaces(path: &str) -> (String, String) {
    let inside = path.split_once("/namespaces/").and_then(|(api, rest)| {
        let (namespace, plural) = rest.split_once('/')?;
        Some((format!("{api}/{plural}"), namespace.to_owned()))
    });
    inside.unwrap_or_else(|| (path.to_owned(), String::new()))
}

/// Creates or patches an Event.
pub async fn write(
    request: Request<Incoming>,
    state: &Arc<Mutex<State>>,
    changed: &watch::Sender<u64>,
) -> Answer {
    let (method, uri) = (request.method().clone(), request.uri().clone());
    let body = request.into_body().collect().await;
    let body = body.map(|body| body.to_bytes()).unwrap_or_default();
    state
        .lock()
        .expect("no test panicked with it")
        .requests
        .push(Recorded {
            method: method.to_string(),
            path: uri.path().to_owned(),
            query: BTreeMap::new(),
        });
    let answer = answer(method, uri.path(), &body, state);
    changed.send_modify(|count| *count += 1);
    answer
}

fn answer(method: Method, path: &str, body: &Bytes, state: &Arc<Mutex<State>>) -> Answer {
    let (path, namespace) = of_all_namespaces(path);
    let mut state = state.lock().expect("no test panicked with it");
    if let Some((code, reason)) = state.write_status {
        let message = "events.events.k8s.io is forbidden: User \"nftlet\" cannot create resource \
                       \"events\" in API group \"events.k8s.io\"";
        return status(code, reason, message);
    }
    let Ok(body) = serde_json::from_slice::<Value>(body) else {
        return status(400, "BadRequest", "no JSON");
    };
    let about = body["regarding"]["name"].as_str().unwrap_or_default();
    if let Some((code, reason)) = state.write_status_about.get(about) {
        return status(*code, reason, "it is not wanted here");
    }
    let exists = |name: &str| {
        let mut written = state.written.iter();
        written.any(|it| it.is_new() && it.namespace == namespace && it.name == name)
    };
    let name = match method {
        Method::POST if path == EVENTS => {
            let name = body["metadata"]["name"].as_str().unwrap_or_default();
            if exists(name) {
                return status(409, "AlreadyExists", "it exists");
            }
            name.to_owned()
        }
        Method::PATCH => {
            let name = path.strip_prefix(&format!("{EVENTS}/")).unwrap_or_default();
            if !exists(name) {
                return status(404, "NotFound", "it does not exist");
            }
            name.to_owned()
        }
        _ => return status(405, "MethodNotAllowed", "only Events are written"),
    };
    // A real server answers with the written object, which clients that create Events do not read.
    let answered = serde_json::json!({
        "apiVersion": "events.k8s.io/v1", "kind": "Event",
        "metadata": {"name": name, "namespace": namespace}, "eventTime": null,
    });
    state.written.push(Written {
        method,
        namespace,
        name,
        body,
    });
    full(StatusCode::CREATED, Bytes::from(answered.to_string()))
}
