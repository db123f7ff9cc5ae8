//! List and watch requests to the API server.

use std::io;
use std::time::Duration;

use futures::TryStreamExt;
use futures::io::{AsyncBufReadExt, AsyncReadExt};
use http_body_util::BodyExt;
use hyper::header::{HeaderMap, RETRY_AFTER};
use kube::Client;
use kube::api::{ListParams, VersionMatch, WatchParams};
use kube::core::Request;
use serde::Deserialize;

use super::limits::{MOST_OBJECT, MOST_REFUSAL};
use super::list::{Body, List};
use super::selection::Selection;
use super::timing::watch_seconds;
use super::watch_error::{WatchError, broken_off, one_line};

/// Sends the requests for one selection.
#[derive(Clone)]
pub(super) struct Requester {
    client: Client,
    pub selection: Selection,
    /// Time limit of an answer.
    patience: Duration,
}

impl Requester {
    pub(super) fn new(client: Client, selection: Selection, patience: Duration) -> Self {
        Self {
            client,
            selection,
            patience,
        }
    }

    /// Requests one page of a list, or all of it without `limit`. With `at_least` the server may
    /// answer from its watch cache once that has reached this version.
    pub(super) async fn list(
        &self,
        limit: Option<u32>,
        token: Option<String>,
        at_least: Option<String>,
    ) -> Result<List, WatchError> {
        let params = ListParams {
            version_match: at_least.as_ref().map(|_| VersionMatch::NotOlderThan),
            resource_version: at_least,
            label_selector: self.selection.labels.map(str::to_owned),
            field_selector: self.selection.fields.clone(),
            limit,
            continue_token: token,
            ..ListParams::default()
        };
        let request = Request::new(&self.selection.path)
            .list(&params)
            .map_err(|error| WatchError::Unreachable(error.to_string()))?;
        let body = self.in_time(self.send(request)).await?;
        Ok(List::new(self.selection.kind, body, self.patience))
    }

    /// Opens a watch from a version. Without one, it begins with a streamed list, which the server
    /// may send from its watch cache once that has reached the version `at_least`.
    pub(super) async fn watch(
        &self,
        version: Option<&str>,
        at_least: Option<&str>,
    ) -> Result<WatchLines, WatchError> {
        let listing = version.is_none();
        let version = version.or(at_least).unwrap_or_default();
        let params = WatchParams {
            label_selector: self.selection.labels.map(str::to_owned),
            field_selector: self.selection.fields.clone(),
            timeout: Some(watch_seconds()),
            bookmarks: true,
            send_initial_events: listing,
        };
        let request = Request::new(&self.selection.path)
            .watch(&params, version)
            .map_err(|error| WatchError::Unreachable(error.to_string()))?;
        let body = self.in_time(self.send(request)).await?;
        let line = Vec::new();
        Ok(WatchLines { body, line })
    }

    /// Asks discovery whether the server has the kind. Servers have every kind without a path of
    /// discovery.
    pub(super) async fn is_served(&self) -> Result<bool, WatchError> {
        let Some(path) = &self.selection.discovery else {
            return Ok(true);
        };
        let request = hyper::Request::get(path)
            .body(Vec::new())
            .map_err(|error| WatchError::Unreachable(error.to_string()))?;
        let answer = async {
            let mut text = Vec::new();
            self.send(request)
                .await?
                .take(MOST_OBJECT as u64)
                .read_to_end(&mut text)
                .await
                .map_err(|error| WatchError::Unreachable(broken_off(&error)))?;
            Ok(text)
        };
        let text = match self.in_time(answer).await {
            Ok(text) => text,
            Err(WatchError::Absent(_)) => return Ok(false),
            Err(fault) => return Err(fault),
        };
        match serde_json::from_slice::<ResourceList>(&text) {
            Ok(list) if list.kind == "APIResourceList" => {
                let plural = self.selection.kind.plural();
                Ok(list.resources.iter().any(|kind| kind.name == plural))
            }
            _ => Err(WatchError::Foreign(format!(
                "not an APIResourceList of {path}: {:?}",
                one_line(&String::from_utf8_lossy(text.get(..80).unwrap_or(&text)))
            ))),
        }
    }

    /// Sends a request. Returns the body of a successful answer.
    async fn send(&self, request: hyper::Request<Vec<u8>>) -> Result<Body, WatchError> {
        let answer = self.client.send(request.map(Into::into)).await?;
        let (head, body) = answer.into_parts();
        let body = body.into_data_stream().map_err(io::Error::other);
        let body: Body = Box::pin(body.into_async_read());
        if head.status.is_success() {
            return Ok(body);
        }
        let retry_after = retry_after(&head.headers);
        let mut text = Vec::new();
        body.take(MOST_REFUSAL as u64 + 1)
            .read_to_end(&mut text)
            .await
            .map_err(|error| WatchError::Unreachable(broken_off(&error)))?;
        if text.len() > MOST_REFUSAL {
            let begin = String::from_utf8_lossy(text.get(..200).unwrap_or_default());
            let most = MOST_REFUSAL >> 10;
            text = format!("a text of more than {most} KiB that begins with {begin}").into();
        }
        Err(WatchError::of_answer(
            head.status.as_u16(),
            retry_after,
            &text,
        ))
    }

    async fn in_time<T>(
        &self,
        answer: impl Future<Output = Result<T, WatchError>>,
    ) -> Result<T, WatchError> {
        match tokio::time::timeout(self.patience, answer).await {
            Ok(answer) => answer,
            Err(_) => Err(WatchError::Unreachable(format!(
                "no answer within {:?}",
                self.patience
            ))),
        }
    }
}

/// The answer of discovery: the kinds of an API version.
#[derive(Debug, Default, Deserialize)]
#[serde(default)]
struct ResourceList {
    kind: String,
    resources: Vec<Resource>,
}

#[derive(Debug, Default, Deserialize)]
#[serde(default)]
struct Resource {
    /// The plural, with the subresource if it is one.
    name: String,
}

/// Returns the seconds in the header `Retry-After`.
pub(super) fn retry_after(headers: &HeaderMap) -> Option<u32> {
    headers.get(RETRY_AFTER)?.to_str().ok()?.parse().ok()
}

/// The lines of a watch, one event each.
pub(super) struct WatchLines {
    body: Body,
    line: Vec<u8>,
}

impl WatchLines {
    /// Returns the next line without its line break.
    ///
    /// # Errors
    /// [`WatchError::Ended`] if the server closed the connection, it broke, or nothing was received
    /// for `patience`; the watch is resumed alike after each of them.
    /// [`WatchError::Foreign`] for a line that is longer than an object can be.
    pub(super) async fn next(&mut self, patience: Duration) -> Result<&[u8], WatchError> {
        self.line.clear();
        let mut bounded = (&mut self.body).take(MOST_OBJECT as u64 + 1);
        let read = bounded.read_until(b'\n', &mut self.line);
        match tokio::time::timeout(patience, read).await {
            // An incomplete last line is dropped.
            Ok(Ok(_)) if self.line.last() == Some(&b'\n') => Ok(self.line.trim_ascii_end()),
            Ok(Ok(_)) if self.line.len() > MOST_OBJECT => Err(WatchError::Foreign(format!(
                "an event of more than {} MiB",
                MOST_OBJECT >> 20
            ))),
            Ok(Ok(_)) => Err(WatchError::Ended),
            Ok(Err(error)) => {
                tracing::debug!(%error, "a watch connection broke");
                Err(WatchError::Ended)
            }
            Err(_) => {
                tracing::debug!(?patience, "a watch connection was silent");
                Err(WatchError::Ended)
            }
        }
    }
}
