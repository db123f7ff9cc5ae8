//! Asks the running agent over its unix socket.

use std::io;
use std::path::{Path, PathBuf};
use std::time::Duration;

use http_body_util::{BodyExt, Empty, Limited};
use hyper::body::{Bytes, Incoming};
use hyper::client::conn::http1;
use hyper::header::HOST;
use hyper::{Request, Response, StatusCode};
use hyper_util::rt::TokioIo;
use serde_json::Value;
use thiserror::Error;
use tokio::net::UnixStream;
use tokio::time::timeout;

/// The most bytes of an answer: a command in the agent's container shares its limit of memory.
const MOST: usize = 100 << 20;
/// How long the agent may take to begin an answer, and to complete it.
const PATIENCE: Duration = Duration::from_secs(10);
const WHOLE: Duration = Duration::from_secs(60);

/// Why the agent gives no answer.
#[derive(Debug, Error)]
pub(crate) enum AskError {
    #[error(
        "no agent answers on {}: {source}; run the command where the agent runs, name its socket with --socket, or give the objects with --manifests or --kubeconfig", path.display()
    )]
    Connect { path: PathBuf, source: io::Error },
    #[error("the agent did not answer: {0}; see its log")]
    Http(#[from] hyper::Error),
    #[error("the agent's answer is not valid: {0}; its version may be another one")]
    Invalid(String),
    /// The question is too large for the agent.
    #[error("the question is too large for the agent")]
    TooMany,
    #[error(
        "the agent does not answer within {} s; its main loop may be stuck: see its log",
        PATIENCE.as_secs()
    )]
    Silent,
    /// The agent's own message.
    #[error("{0}")]
    Refused(String),
    #[error(
        "the objects are more than {} MiB; run the command elsewhere: kubectl get svc,endpointslices,nodes,servicecidrs,pods,ns,netpol,clusternetworkpolicies -A -o json | nftlet ... --manifests - --hostname-override NODE",
        MOST >> 20
    )]
    TooLarge,
}

/// Requests a page. `query` holds names and values.
pub(super) async fn get(
    socket: &Path,
    page: &str,
    query: &[(&str, &str)],
) -> Result<Vec<u8>, AskError> {
    let failed = |source| AskError::Connect {
        path: socket.to_owned(),
        source,
    };
    let stream = UnixStream::connect(socket).await.map_err(failed)?;
    let (mut sender, connection) = http1::handshake(TokioIo::new(stream)).await?;
    let driver = tokio::spawn(connection);
    let mut encoded = form_urlencoded::Serializer::new(String::new());
    encoded.extend_pairs(query);
    let request = Request::get(format!("{page}?{}", encoded.finish()))
        .header(HOST, "nftlet")
        .body(Empty::<Bytes>::new())
        .map_err(|error| AskError::Invalid(error.to_string()))?;
    let response = timeout(PATIENCE, sender.send_request(request)).await;
    let response = response.map_err(|_| AskError::Silent)??;
    let answered = timeout(WHOLE, body(response)).await;
    let answered = answered.unwrap_or(Err(AskError::Silent));
    drop(sender);
    driver.abort();
    answered
}

async fn body(response: Response<Incoming>) -> Result<Vec<u8>, AskError> {
    let status = response.status();
    let body = Limited::new(response.into_body(), MOST).collect().await;
    let body = body.map_err(|error| match error.downcast::<hyper::Error>() {
        Ok(error) => AskError::Http(*error),
        Err(_) => AskError::TooLarge,
    })?;
    let body = body.to_bytes();
    if status == StatusCode::OK {
        return Ok(body.into());
    }
    if status == StatusCode::PAYLOAD_TOO_LARGE {
        return Err(AskError::TooMany);
    }
    let said: Value = serde_json::from_slice(&body).unwrap_or_default();
    let message = said.get("error").and_then(Value::as_str);
    Err(message.map_or_else(
        || AskError::Invalid(status.to_string()),
        |message| AskError::Refused(message.to_owned()),
    ))
}

/// Requests a page of JSON.
pub(super) async fn get_json(
    socket: &Path,
    page: &str,
    query: &[(&str, &str)],
) -> Result<Value, AskError> {
    let body = get(socket, page, query).await?;
    serde_json::from_slice(&body).map_err(|error| AskError::Invalid(error.to_string()))
}
