//! Open watches.

use std::collections::VecDeque;
use std::io;
use std::sync::{Arc, Mutex};

use hyper::body::Bytes;
use serde_json::json;
use tokio::sync::watch;

use super::answers::event;
use super::selectors::Selector;
use super::{State, Traffic, type_of};

/// An open watch in the count of its collection.
pub struct Counted {
    pub traffic: watch::Sender<Traffic>,
    pub path: String,
}

impl Counted {
    pub fn new(traffic: watch::Sender<Traffic>, path: &str) -> Self {
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
pub struct Follow {
    pub _counted: Counted,
    pub state: Arc<Mutex<State>>,
    pub changed: watch::Receiver<u64>,
    pub ended: watch::Receiver<(u64, u64)>,
    pub ended_before: u64,
    pub path: String,
    pub selector: Selector,
    pub bookmarks: bool,
    pub from: u64,
    /// The events to send: type and object.
    pub lines: VecDeque<(&'static str, Bytes)>,
}

/// About how much is written at once where a lot is to be sent.
const CHUNK: usize = 64 * 1024;

impl Follow {
    pub async fn next(mut self) -> Option<(io::Result<Bytes>, Self)> {
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
    pub fn chunk(&mut self) -> Option<Bytes> {
        let mut chunk = Vec::new();
        while chunk.len() < CHUNK
            && let Some((type_, json)) = self.lines.pop_front()
        {
            chunk.extend_from_slice(&event(type_, &json));
        }
        (!chunk.is_empty()).then(|| chunk.into())
    }

    pub fn collect(&mut self) {
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
