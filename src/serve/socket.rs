//! A unix socket over which commands ask the running agent.
//!
//! It speaks HTTP/1.1 and answers GET only. A few clients are served at once; others wait.

use std::convert::Infallible;
use std::fs;
use std::io;
use std::os::unix::fs::{DirBuilderExt, FileTypeExt, PermissionsExt};
use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::time::Duration;

use futures::TryStreamExt;
use futures::stream;
use http_body_util::combinators::BoxBody;
use http_body_util::{BodyExt, Full, StreamBody};
use hyper::body::{Body, Bytes, Frame};
use hyper::header::{ALLOW, CONTENT_TYPE, HeaderValue};
use hyper::server::conn::http1;
use hyper::service::service_fn;
use hyper::{Method, Request, Response, StatusCode, Uri};
use hyper_util::rt::{TokioIo, TokioTimer};
use thiserror::Error;
use tokio::net::{UnixListener, UnixStream};
use tokio::sync::{Semaphore, mpsc, watch};
use tokio::task::JoinSet;
use tracing::debug;

use super::http::{JSON, TEXT, stopped};

/// Clients that are served at once.
const CLIENTS: usize = 8;
/// Time until the last header of a request has arrived.
const REQUEST: Duration = Duration::from_secs(5);
/// Lifetime of a connection.
const CONNECTION: Duration = Duration::from_secs(60);
/// Size of a request's line and headers; the smallest that hyper accepts.
const HEADER_BYTES: usize = 8192;
/// Parts of a stream that wait for the client.
const PARTS: usize = 2;

/// Why the socket cannot be used.
#[derive(Debug, Error)]
pub(crate) enum SocketError {
    /// Another process listens on it.
    #[error(
        "another agent answers on the socket {}; stop it, or choose another path with --socket",
        .0.display()
    )]
    InUse(PathBuf),
    /// A file of another kind is in the way.
    #[error(
        "{} exists and is not a socket; remove it, or choose another path with --socket",
        .0.display()
    )]
    NotASocket(PathBuf),
    /// The socket cannot be created.
    #[error("cannot listen on the socket {}: {source}; choose another path with --socket, or none with --socket=", path.display())]
    Bind {
        /// Its path.
        path: PathBuf,
        /// The cause.
        source: io::Error,
    },
}

/// The answer to a request.
pub(crate) enum SocketAnswer {
    /// A status and a body of JSON.
    Json(StatusCode, String),
    /// A body of JSON in parts.
    Parts(mpsc::Receiver<Bytes>),
}

impl SocketAnswer {
    /// Returns a sender of parts, and the answer that consists of them.
    pub(crate) fn parts() -> (mpsc::Sender<Bytes>, Self) {
        let (sender, receiver) = mpsc::channel(PARTS);
        (sender, Self::Parts(receiver))
    }
}

/// Answers requests.
pub(crate) trait SocketPages: Send + Sync + 'static {
    /// Answers GET; `None` if there is no such page.
    fn get(&self, uri: &Uri) -> impl Future<Output = Option<SocketAnswer>> + Send;
}

/// A socket that only root can connect to, removed when dropped.
pub(crate) struct Socket {
    listener: UnixListener,
    path: PathBuf,
}

impl Socket {
    /// Listens on a path. Creates its directory, and replaces a socket of a process that has ended. Must
    /// be called in a runtime.
    ///
    /// # Errors
    ///
    /// If another process listens on it, or it cannot be created.
    pub(crate) fn bind(path: &Path) -> Result<Self, SocketError> {
        let failed = |source| SocketError::Bind {
            path: path.to_owned(),
            source,
        };
        if let Some(directory) = path.parent().filter(|it| !it.as_os_str().is_empty()) {
            let mut builder = fs::DirBuilder::new();
            builder.recursive(true).mode(0o700);
            builder.create(directory).map_err(failed)?;
        }
        match fs::symlink_metadata(path) {
            Ok(found) if !found.file_type().is_socket() => {
                return Err(SocketError::NotASocket(path.to_owned()));
            }
            Ok(_) if std::os::unix::net::UnixStream::connect(path).is_ok() => {
                return Err(SocketError::InUse(path.to_owned()));
            }
            Ok(_) => fs::remove_file(path).map_err(failed)?,
            Err(_) => {}
        }
        let listener = UnixListener::bind(path).map_err(failed)?;
        fs::set_permissions(path, fs::Permissions::from_mode(0o600)).map_err(failed)?;
        Ok(Self {
            listener,
            path: path.to_owned(),
        })
    }

    /// Answers requests until `shutdown` is true or its sender is dropped.
    pub(crate) async fn serve(
        self,
        pages: Arc<impl SocketPages>,
        mut shutdown: watch::Receiver<bool>,
    ) {
        let seats = Arc::new(Semaphore::new(CLIENTS));
        let mut connections = JoinSet::new();
        loop {
            let seat = tokio::select! {
                () = stopped(&mut shutdown) => break,
                Some(_) = connections.join_next() => continue,
                seat = seats.clone().acquire_owned() => seat,
            };
            let accepted = tokio::select! {
                () = stopped(&mut shutdown) => break,
                accepted = self.listener.accept() => accepted,
            };
            match accepted {
                Ok((stream, _)) => {
                    let pages = pages.clone();
                    connections.spawn(async move {
                        attend(stream, pages).await;
                        drop(seat);
                    });
                }
                Err(error) => {
                    debug!("cannot accept a connection on the socket: {error}");
                    tokio::time::sleep(Duration::from_millis(100)).await;
                }
            }
        }
    }
}

impl Drop for Socket {
    fn drop(&mut self) {
        // If it is gone, another agent may have replaced it.
        let _ = fs::remove_file(&self.path);
    }
}

async fn attend(stream: UnixStream, pages: Arc<impl SocketPages>) {
    let service = service_fn(|request| {
        let pages = pages.clone();
        async move { Ok::<_, Infallible>(answer(&*pages, request).await) }
    });
    let connection = http1::Builder::new()
        .timer(TokioTimer::new())
        .header_read_timeout(REQUEST)
        .max_buf_size(HEADER_BYTES)
        .serve_connection(TokioIo::new(stream), service);
    match tokio::time::timeout(CONNECTION, connection).await {
        Ok(Ok(())) => {}
        Ok(Err(error)) => debug!("a connection on the socket ended: {error}"),
        Err(_) => debug!("a connection on the socket was closed after its time limit"),
    }
}

type Answered = Response<BoxBody<Bytes, Infallible>>;

async fn answer<B: Body>(pages: &impl SocketPages, request: Request<B>) -> Answered {
    if request.method() != Method::GET {
        let mut response = whole(
            StatusCode::METHOD_NOT_ALLOWED,
            TEXT,
            "only GET is answered\n".into(),
        );
        response
            .headers_mut()
            .insert(ALLOW, HeaderValue::from_static("GET"));
        return response;
    }
    match pages.get(request.uri()).await {
        None => whole(StatusCode::NOT_FOUND, TEXT, "no such page\n".into()),
        Some(SocketAnswer::Json(code, body)) => whole(code, JSON, body),
        Some(SocketAnswer::Parts(parts)) => {
            let parts = stream::unfold(parts, |mut parts| async {
                let part = parts.recv().await?;
                Some((Ok::<_, Infallible>(part), parts))
            });
            let body = StreamBody::new(parts.map_ok(Frame::data));
            with_type(StatusCode::OK, JSON, BodyExt::boxed(body))
        }
    }
}

fn whole(code: StatusCode, content_type: &'static str, body: String) -> Answered {
    with_type(code, content_type, Full::new(Bytes::from(body)).boxed())
}

fn with_type(
    code: StatusCode,
    content_type: &'static str,
    body: BoxBody<Bytes, Infallible>,
) -> Answered {
    let mut response = Response::new(body);
    *response.status_mut() = code;
    let content_type = HeaderValue::from_static(content_type);
    response.headers_mut().insert(CONTENT_TYPE, content_type);
    response
}
