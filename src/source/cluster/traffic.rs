//! What all requests to the API server pass through, those of the watches and those for Events.

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

/// Observes the requests of a client.
#[derive(Debug)]
pub(super) struct Traffic {
    /// The address of the server and the proxy on the way, as errors name them.
    way: String,
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
        let mut way = server.to_string().trim_end_matches('/').to_owned();
        if let Some(proxy) = proxy {
            let proxy = proxy.to_string();
            way = format!("{way} through the proxy {}", without_password(&proxy));
        }
        Self {
            way,
            reach,
            servers,
            metrics,
        }
    }

    fn answered<B>(&self, answer: &Response<B>) {
        self.reach.answered(answer.status());
        self.servers.answered(answer.extensions());
    }

    /// Draws the conclusions from an error, and says what it means.
    fn failed(&self, error: BoxError) -> BoxError {
        let unanswered = Unanswered::new(&*error, &self.way);
        // Others, as those of credentials that cannot be read, come from this side.
        if error.is::<legacy::Error>() && !unanswered.no_descriptor {
            self.reach.lost();
        }
        Box::new(unanswered)
    }
}

/// A request got no answer.
#[derive(Debug, thiserror::Error)]
#[error("{text}")]
pub(super) struct Unanswered {
    text: String,
    /// The process has no file descriptor for a connection.
    pub no_descriptor: bool,
}

impl Unanswered {
    pub(super) fn new(error: &(dyn StdError + 'static), way: &str) -> Self {
        Self {
            text: explain(error, way),
            no_descriptor: wants_descriptors(error),
        }
    }
}

/// Passes requests on to the service inside.
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
            // Dropped with the body, thus when that was read.
            let timed = move |frame| {
                let _in_flight = &in_flight;
                frame
            };
            Ok(answer.map(|body| body.map_frame(timed).boxed_unsync()))
        }
        .boxed()
    }
}

/// Says in a sentence why a server did not answer.
fn explain(error: &(dyn StdError + 'static), way: &str) -> String {
    let cause = innermost(error);
    let Some(request) = error.downcast_ref::<legacy::Error>() else {
        return format!("the request to {way} could not be sent: {cause}");
    };
    let kind = chain(error)
        .filter_map(|error| error.downcast_ref::<io::Error>())
        .map(io::Error::kind)
        .last();
    if !request.is_connect() {
        let ended = format!("the connection to {way} ended before the answer");
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
        return format!("the name in {way} cannot be resolved: {cause}");
    }
    let why = match kind {
        Some(io::ErrorKind::ConnectionRefused) => "connection refused (no process listens there)",
        Some(io::ErrorKind::TimedOut) => "no connection within the time limit",
        Some(io::ErrorKind::HostUnreachable) => "there is no route to the host",
        Some(io::ErrorKind::NetworkUnreachable) => "there is no route to its network",
        Some(io::ErrorKind::ConnectionReset | io::ErrorKind::UnexpectedEof) => {
            "the connection was closed at once"
        }
        // What the TLS library finds wrong.
        Some(io::ErrorKind::InvalidData) => &*format!("the TLS handshake: {cause}"),
        _ => &*cause,
    };
    format!("connecting to {way} failed: {why}")
}

/// The innermost cause says what happened; those around it say what was tried.
pub(super) fn innermost(error: &(dyn StdError + 'static)) -> String {
    let last = chain(error).last();
    last.map(ToString::to_string).unwrap_or_default()
}

/// Whether an error comes of there being no file descriptor.
fn wants_descriptors(error: &(dyn StdError + 'static)) -> bool {
    let errors = chain(error).filter_map(|cause| cause.downcast_ref::<io::Error>());
    errors
        .filter_map(io::Error::raw_os_error)
        .any(|errno| [libc::EMFILE, libc::ENFILE].contains(&errno))
}

/// An error and its causes. `io::Error` passes over the error that it wraps.
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
