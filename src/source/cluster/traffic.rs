//! Observation of all requests to the API server, those of the watches and those for Events.

use std::error::Error as StdError;
use std::io;
use std::sync::Arc;
use std::task::{Context, Poll};

use futures::FutureExt;
use futures::future::BoxFuture;
use http_body_util::BodyExt;
use http_body_util::combinators::UnsyncBoxBody;
use hyper::body::Bytes;
use hyper::{Request, Response, Uri};
use hyper_util::client::legacy;
use kube::client::Body;
use tower::{BoxError, Service};

use super::proxy::without_password;
use super::reach::Reach;
use super::requests::RequestMetrics;
use super::servers::Servers;

/// Passes the outcome of requests to [`Reach`], [`Servers`] and the metrics.
#[derive(Debug)]
pub(super) struct Traffic {
    /// The address of the server, and of the proxy if there is one, for error messages.
    target: String,
    reach: Arc<Reach>,
    servers: Arc<Servers>,
    metrics: RequestMetrics,
}

impl Traffic {
    pub(super) fn new(
        server: &Uri,
        proxy: Option<&Uri>,
        reach: Arc<Reach>,
        servers: Arc<Servers>,
        metrics: RequestMetrics,
    ) -> Self {
        let mut target = server.to_string().trim_end_matches('/').to_owned();
        if let Some(proxy) = proxy {
            let proxy = proxy.to_string();
            target = format!("{target} through the proxy {}", without_password(&proxy));
        }
        Self {
            target,
            reach,
            servers,
            metrics,
        }
    }

    fn answered<B>(&self, answer: &Response<B>) {
        self.reach.answered(answer.status());
        self.servers.answered(answer.extensions());
    }

    /// Notes a failed request. Returns its error in words.
    fn failed(&self, error: BoxError) -> BoxError {
        let unanswered = Unanswered::new(&*error, &self.target);
        // Other errors, such as unreadable credentials, say nothing about the server.
        if error.is::<legacy::Error>() && !unanswered.no_descriptor {
            self.reach.lost();
        }
        Box::new(unanswered)
    }
}

/// A request that was not answered.
#[derive(Debug, thiserror::Error)]
#[error("{text}")]
pub(super) struct Unanswered {
    text: String,
    /// The process has no file descriptor for a connection.
    pub no_descriptor: bool,
}

impl Unanswered {
    pub(super) fn new(error: &(dyn StdError + 'static), target: &str) -> Self {
        Self {
            text: explain(error, target),
            no_descriptor: wants_descriptors(error),
        }
    }
}

/// A service that observes the requests to an inner one.
pub(super) struct Observed<S> {
    pub service: S,
    pub traffic: Arc<Traffic>,
}

impl<S, B> Service<Request<Body>> for Observed<S>
where
    S: Service<Request<Body>, Response = Response<B>, Error = BoxError>,
    S::Future: Send + 'static,
    B: hyper::body::Body<Data = Bytes, Error = BoxError> + Send + 'static,
{
    type Response = Response<UnsyncBoxBody<Bytes, BoxError>>;
    type Error = BoxError;
    type Future = BoxFuture<'static, Result<Self::Response, BoxError>>;

    fn poll_ready(&mut self, context: &mut Context<'_>) -> Poll<Result<(), BoxError>> {
        self.service.poll_ready(context)
    }

    fn call(&mut self, request: Request<Body>) -> Self::Future {
        let traffic = self.traffic.clone();
        let mut in_flight = traffic.metrics.begin(&request);
        let answer = self.service.call(request);
        async move {
            let answer = answer.await.map_err(|error| traffic.failed(error))?;
            traffic.answered(&answer);
            in_flight.answered(answer.status());
            // Dropped with the body, so that the time includes reading it.
            let timed = move |frame| {
                let _in_flight = &in_flight;
                frame
            };
            Ok(answer.map(|body| body.map_frame(timed).boxed_unsync()))
        }
        .boxed()
    }
}

/// Returns a sentence about why a request was not answered.
fn explain(error: &(dyn StdError + 'static), target: &str) -> String {
    let cause = innermost(error);
    let Some(request) = error.downcast_ref::<legacy::Error>() else {
        return format!("the request to {target} could not be sent: {cause}");
    };
    let kind = chain(error)
        .filter_map(|error| error.downcast_ref::<io::Error>())
        .map(io::Error::kind)
        .last();
    if !request.is_connect() {
        let ended = format!("the connection to {target} ended before the answer");
        let plain = chain(error)
            .filter_map(|error| error.downcast_ref::<hyper::Error>())
            .any(|error| error.is_incomplete_message() || error.is_canceled());
        return if plain {
            ended
        } else {
            format!("{ended}: {cause}")
        };
    }
    if chain(error).any(|error| error.to_string() == "dns error") {
        return format!("the name in {target} cannot be resolved: {cause}");
    }
    let why = match kind {
        Some(io::ErrorKind::ConnectionRefused) => "connection refused (no process listens there)",
        Some(io::ErrorKind::TimedOut) => "no connection within the time limit",
        Some(io::ErrorKind::HostUnreachable) => "there is no route to the host",
        Some(io::ErrorKind::NetworkUnreachable) => "there is no route to its network",
        Some(io::ErrorKind::ConnectionReset | io::ErrorKind::UnexpectedEof) => {
            "the connection was closed at once"
        }
        // Errors of the TLS library.
        Some(io::ErrorKind::InvalidData) => &*format!("TLS handshake: {cause}"),
        _ => &*cause,
    };
    format!("connecting to {target} failed: {why}")
}

/// Returns the text of the innermost cause, which says what happened; the outer errors say what
/// was attempted.
pub(super) fn innermost(error: &(dyn StdError + 'static)) -> String {
    let last = chain(error).last();
    last.map(ToString::to_string).unwrap_or_default()
}

/// Returns whether an error was caused by a lack of file descriptors.
fn wants_descriptors(error: &(dyn StdError + 'static)) -> bool {
    let errors = chain(error).filter_map(|cause| cause.downcast_ref::<io::Error>());
    errors
        .filter_map(io::Error::raw_os_error)
        .any(|errno| [libc::EMFILE, libc::ENFILE].contains(&errno))
}

/// Returns an error and its causes, including the error inside an `io::Error`, which
/// `io::Error::source` skips.
fn chain<'e>(
    error: &'e (dyn StdError + 'static),
) -> impl Iterator<Item = &'e (dyn StdError + 'static)> {
    std::iter::successors(Some(error), |&error| {
        let wrapped = error
            .downcast_ref::<io::Error>()
            .and_then(io::Error::get_ref);
        match wrapped {
            Some(wrapped) => Some(wrapped as &(dyn StdError + 'static)),
            None => error.source(),
        }
    })
}
