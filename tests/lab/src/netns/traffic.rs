//! Servers that answer with the address of the client, and clients that return the outcome.

use std::io::{self, Read as _, Write as _};
use std::net::{IpAddr, SocketAddr, TcpListener, TcpStream, UdpSocket};
use std::os::fd::{AsFd as _, OwnedFd};
use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};
use std::sync::mpsc;
use std::thread::{self, JoinHandle};
use std::time::Duration;

use nix::poll::{PollFd, PollFlags, PollTimeout, poll};
use rustix::io::Errno;
use rustix::net::sockopt::{self, Timeout};
use rustix::net::{AddressFamily, SocketFlags, SocketType};
use tokio::io::{AsyncReadExt as _, AsyncWriteExt as _};
use tokio::sync::oneshot;

use super::Namespace;

/// What is spoken between [`Server`] and [`Ask`].
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub enum Protocol {
    /// Each connection is answered with one line and closed.
    Tcp,
    /// Each datagram is answered with one line.
    Udp,
    /// Like TCP, where the kernel has SCTP; see [`Protocol::supported`].
    Sctp,
    /// HTTP/1.1 with connections that stay open; the line is the body.
    Http,
}

impl Protocol {
    /// Whether the kernel knows the protocol.
    pub fn supported(self) -> bool {
        self.socket(AddressFamily::INET).is_ok()
    }

    fn socket(self, family: AddressFamily) -> io::Result<OwnedFd> {
        let (kind, protocol) = match self {
            Protocol::Tcp | Protocol::Http => (SocketType::STREAM, rustix::net::ipproto::TCP),
            Protocol::Sctp => (SocketType::STREAM, rustix::net::ipproto::SCTP),
            Protocol::Udp => (SocketType::DGRAM, rustix::net::ipproto::UDP),
        };
        let flags = SocketFlags::CLOEXEC;
        let socket = rustix::net::socket_with(family, kind, flags, Some(protocol))?;
        // A port is free again although connections to it still linger.
        sockopt::set_socket_reuseaddr(&socket, true)?;
        Ok(socket)
    }
}

/// The address family of an address, as the socket calls name it.
fn family_of(address: SocketAddr) -> AddressFamily {
    if address.is_ipv4() {
        AddressFamily::INET
    } else {
        AddressFamily::INET6
    }
}

/// Answers on one port of a namespace until the value goes away.
///
/// Each answer is the line `NAME CLIENT LOCAL`: the name of the server, the address and port the
/// client was seen with, and those it was reached at. See [`Answer`].
#[derive(Debug)]
pub struct Server {
    address: SocketAddr,
    served: Arc<AtomicU64>,
    stop: Option<oneshot::Sender<()>>,
    thread: Option<JoinHandle<()>>,
}

impl Server {
    /// Starts to serve; port 0 takes a free one, see [`Server::address`]. When this returns,
    /// clients are accepted.
    #[track_caller]
    pub fn start(ns: &Namespace, protocol: Protocol, at: SocketAddr, name: &str) -> Self {
        Self::try_start(ns, protocol, at, name)
            .unwrap_or_else(|error| panic!("{name} cannot serve {protocol:?} at {at}: {error}"))
    }

    /// Like [`Server::start`], with the error instead of a panic.
    pub fn try_start(
        ns: &Namespace,
        protocol: Protocol,
        at: SocketAddr,
        name: &str,
    ) -> io::Result<Self> {
        // A socket stays in the namespace it was opened in; the serving thread need not be there.
        let socket = ns.run(|| listen(protocol, at))?;
        let served = Arc::new(AtomicU64::new(0));
        let (stop, stopped) = oneshot::channel();
        let runtime = tokio::runtime::Builder::new_current_thread()
            .enable_all()
            .build()?;
        let answering = Answering {
            name: name.to_owned(),
            served: Arc::clone(&served),
        };
        let (address, thread) = if protocol == Protocol::Udp {
            let socket = UdpSocket::from(socket);
            let address = socket.local_addr()?;
            let serve = move || runtime.block_on(answering.datagrams(socket, address, stopped));
            (address, spawn_named(name, serve)?)
        } else {
            let socket = TcpListener::from(socket);
            let address = socket.local_addr()?;
            let http = protocol == Protocol::Http;
            let serve = move || runtime.block_on(answering.connections(socket, http, stopped));
            (address, spawn_named(name, serve)?)
        };
        Ok(Self {
            address,
            served,
            stop: Some(stop),
            thread: Some(thread),
        })
    }

    /// Where it listens.
    pub fn address(&self) -> SocketAddr {
        self.address
    }

    /// How many requests it has answered.
    pub fn served(&self) -> u64 {
        self.served.load(Ordering::Relaxed)
    }
}

impl Drop for Server {
    /// Answers the connections that are already there, then closes the port.
    fn drop(&mut self) {
        drop(self.stop.take());
        if let Some(thread) = self.thread.take() {
            // The thread reports its own panic; a second one here would abort.
            let _ = thread.join();
        }
    }
}

fn spawn_named(
    name: &str,
    serve: impl FnOnce() -> io::Result<()> + Send + 'static,
) -> io::Result<JoinHandle<()>> {
    thread::Builder::new()
        .name(format!("server {name}"))
        .spawn(move || serve().unwrap_or_else(|error| panic!("the server fails: {error}")))
}

fn listen(protocol: Protocol, at: SocketAddr) -> io::Result<OwnedFd> {
    let socket = protocol.socket(family_of(at))?;
    if at.is_ipv6() {
        sockopt::set_ipv6_v6only(&socket, true)?;
    }
    rustix::net::bind(&socket, &at)?;
    if protocol != Protocol::Udp {
        rustix::net::listen(&socket, 4096)?;
    }
    rustix::io::ioctl_fionbio(&socket, true)?;
    Ok(socket)
}

/// What the serving threads share.
#[derive(Clone)]
struct Answering {
    name: String,
    served: Arc<AtomicU64>,
}

impl Answering {
    fn line(&self, client: SocketAddr, local: SocketAddr) -> String {
        self.served.fetch_add(1, Ordering::Relaxed);
        format!("{} {client} {local}\n", self.name)
    }

    async fn datagrams(
        self,
        socket: UdpSocket,
        local: SocketAddr,
        mut stopped: oneshot::Receiver<()>,
    ) -> io::Result<()> {
        let socket = tokio::net::UdpSocket::from_std(socket)?;
        let mut buffer = [0; 2048];
        loop {
            let received = tokio::select! {
                biased;
                received = socket.recv_from(&mut buffer) => received,
                _ = &mut stopped => return Ok(()),
            };
            // Errors are about answers that could not be delivered; other clients go on.
            if let Ok((_, client)) = received {
                let _ = socket
                    .send_to(self.line(client, local).as_bytes(), client)
                    .await;
            }
        }
    }

    async fn connections(
        self,
        listener: TcpListener,
        http: bool,
        mut stopped: oneshot::Receiver<()>,
    ) -> io::Result<()> {
        let listener = tokio::net::TcpListener::from_std(listener)?;
        loop {
            // Connections first, so that none that waits is reset by the closing of the port.
            let (mut stream, client) = tokio::select! {
                biased;
                accepted = listener.accept() => match accepted {
                    Ok(accepted) => accepted,
                    // The client has closed the connection already.
                    Err(error) if error.kind() == io::ErrorKind::ConnectionAborted => continue,
                    Err(error) => return Err(error),
                },
                _ = &mut stopped => return Ok(()),
            };
            let Ok(local) = stream.local_addr() else {
                continue;
            };
            if http {
                let answering = self.clone();
                tokio::spawn(async move { answering.http(stream, client, local).await });
            } else {
                // The line fits the empty send buffer, so this does not hold up the others.
                let _ = stream.write_all(self.line(client, local).as_bytes()).await;
            }
        }
    }

    async fn http(
        self,
        mut stream: tokio::net::TcpStream,
        client: SocketAddr,
        local: SocketAddr,
    ) -> io::Result<()> {
        let mut request = Vec::new();
        loop {
            while let Some(end) = find(&request, b"\r\n\r\n") {
                let head = String::from_utf8_lossy(&request[..end]).to_ascii_lowercase();
                let close = head.contains("\r\nconnection: close");
                request.drain(..end + 4);
                let body = self.line(client, local);
                let connection = if close { "close" } else { "keep-alive" };
                let response = format!(
                    "HTTP/1.1 200 OK\r\nContent-Type: text/plain\r\nContent-Length: {}\r\n\
                     Connection: {connection}\r\n\r\n{body}",
                    body.len(),
                );
                stream.write_all(response.as_bytes()).await?;
                if close {
                    return Ok(());
                }
            }
            if stream.read_buf(&mut request).await? == 0 {
                return Ok(());
            }
        }
    }
}

fn find(haystack: &[u8], needle: &[u8]) -> Option<usize> {
    haystack.windows(needle.len()).position(|w| w == needle)
}

/// What a [`Server`] said.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Answer {
    /// The name of the server.
    pub name: String,
    /// The client's address as the server saw it.
    pub seen_client: SocketAddr,
    /// The server's own address that the request arrived at.
    pub local: SocketAddr,
}

impl Answer {
    fn parse(text: &str) -> io::Result<Self> {
        let mut words = text.split_whitespace();
        let mut next = || words.next();
        (|| {
            Some(Self {
                name: next()?.to_owned(),
                seen_client: next()?.parse().ok()?,
                local: next()?.parse().ok()?,
            })
        })()
        .ok_or_else(|| {
            let problem = format!("not an answer of a server: {text:?}");
            io::Error::new(io::ErrorKind::InvalidData, problem)
        })
    }
}

/// One request, sent from the namespace of the calling thread.
///
/// The errors that matter have their own kind: [`io::ErrorKind::ConnectionRefused`] where the
/// request was refused (reset, or ICMP says the port is unreachable), and
/// [`io::ErrorKind::TimedOut`] where nothing came back. Nothing is sent twice, except that the
/// kernel repeats a lost connection request after one second, which
/// [`Namespace::repeated_requests`] counts.
#[derive(Clone, Copy, Debug)]
pub struct Ask {
    protocol: Protocol,
    to: SocketAddr,
    from: Option<SocketAddr>,
    timeout: Duration,
}

impl Ask {
    /// A request to a server that speaks this protocol. Its timeout is for a failing test; where
    /// nothing is to come back, [`Ask::timeout`] sets a short one.
    pub fn new(protocol: Protocol, to: SocketAddr) -> Self {
        Self {
            protocol,
            to,
            from: None,
            timeout: Duration::from_secs(30),
        }
    }

    /// A request over TCP.
    pub fn tcp(to: impl Into<IpAddr>, port: u16) -> Self {
        Self::new(Protocol::Tcp, SocketAddr::new(to.into(), port))
    }

    /// A request over UDP.
    pub fn udp(to: impl Into<IpAddr>, port: u16) -> Self {
        Self::new(Protocol::Udp, SocketAddr::new(to.into(), port))
    }

    /// A request over SCTP.
    pub fn sctp(to: impl Into<IpAddr>, port: u16) -> Self {
        Self::new(Protocol::Sctp, SocketAddr::new(to.into(), port))
    }

    /// A request over HTTP, on a connection of its own.
    pub fn http(to: impl Into<IpAddr>, port: u16) -> Self {
        Self::new(Protocol::Http, SocketAddr::new(to.into(), port))
    }

    /// Where it goes.
    pub fn to(&self) -> SocketAddr {
        self.to
    }

    /// Sends from this address instead of the one the routes choose.
    pub fn source(self, address: impl Into<IpAddr>) -> Self {
        self.source_port(address, 0)
    }

    /// Sends from this address and port.
    pub fn source_port(mut self, address: impl Into<IpAddr>, port: u16) -> Self {
        self.from = Some(SocketAddr::new(address.into(), port));
        self
    }

    /// How long to wait for the connection, and again for the answer.
    pub fn timeout(mut self, timeout: Duration) -> Self {
        self.timeout = timeout;
        self
    }

    /// Sends the request and waits for the answer.
    pub fn send(self) -> io::Result<Answer> {
        let socket = self.connect()?;
        let mut text = String::new();
        match self.protocol {
            Protocol::Udp => {
                let socket = UdpSocket::from(socket);
                socket.send(b"?\n").map_err(named)?;
                let mut buffer = [0; 512];
                let length = socket.recv(&mut buffer).map_err(named)?;
                text.push_str(&String::from_utf8_lossy(&buffer[..length]));
            }
            Protocol::Tcp | Protocol::Sctp => {
                let mut stream = TcpStream::from(socket);
                stream.read_to_string(&mut text).map_err(named)?;
            }
            Protocol::Http => return HttpConnection::over(TcpStream::from(socket)).ask(),
        }
        Answer::parse(&text)
    }

    /// Opens an HTTP connection that can be asked again and again.
    pub fn open(self) -> io::Result<HttpConnection> {
        Ok(HttpConnection::over(TcpStream::from(self.connect()?)))
    }

    fn connect(self) -> io::Result<OwnedFd> {
        let socket = self.protocol.socket(family_of(self.to))?;
        if let Some(from) = self.from {
            rustix::net::bind(&socket, &from)?;
        }
        rustix::io::ioctl_fionbio(&socket, true)?;
        match rustix::net::connect(&socket, &self.to) {
            Ok(()) => {}
            Err(Errno::INPROGRESS) => {
                // An ICMP error that comes back while the kernel is still inside `connect` is
                // only noted: nothing wakes up for it, and the kernel would try again after a
                // second. Across virtual links that happens often, so the note is read here.
                sockopt::socket_error(&socket)??;
                let timeout = PollTimeout::try_from(self.timeout).map_err(io::Error::other)?;
                let mut waiting = [PollFd::new(socket.as_fd(), PollFlags::POLLOUT)];
                if poll(&mut waiting, timeout)? == 0 {
                    return Err(named(Errno::INPROGRESS.into()));
                }
                sockopt::socket_error(&socket)??;
            }
            Err(error) => return Err(error.into()),
        }
        rustix::io::ioctl_fionbio(&socket, false)?;
        for direction in [Timeout::Send, Timeout::Recv] {
            sockopt::set_socket_timeout(&socket, direction, Some(self.timeout))?;
        }
        Ok(socket)
    }
}

/// A time limit shows as "would block" or "in progress"; both mean that nothing came back.
fn named(error: io::Error) -> io::Error {
    let limit = error.kind() == io::ErrorKind::WouldBlock
        || error.raw_os_error() == Some(Errno::INPROGRESS.raw_os_error());
    if limit {
        io::Error::new(io::ErrorKind::TimedOut, "no answer within the time limit")
    } else {
        error
    }
}

/// An HTTP connection that stays open between requests.
#[derive(Debug)]
pub struct HttpConnection {
    stream: TcpStream,
}

impl HttpConnection {
    fn over(stream: TcpStream) -> Self {
        Self { stream }
    }

    /// How long each further request waits for its answer.
    pub fn set_timeout(&self, timeout: Duration) {
        self.stream
            .set_read_timeout(Some(timeout))
            .expect("a time limit can be set");
    }

    /// Sends one request and waits for its answer, within the timeout the connection was opened
    /// with, or was given since.
    pub fn ask(&mut self) -> io::Result<Answer> {
        self.send()?;
        self.answer()
    }

    /// Sends one request, whose answer is for [`HttpConnection::answer`] to wait for.
    pub fn send(&mut self) -> io::Result<()> {
        self.stream
            .write_all(b"GET / HTTP/1.1\r\nHost: lab\r\n\r\n")
            .map_err(named)
    }

    /// Waits for the answer to the request that was sent.
    pub fn answer(&mut self) -> io::Result<Answer> {
        let mut response = Vec::new();
        let mut chunk = [0; 1024];
        loop {
            let length = self.stream.read(&mut chunk).map_err(named)?;
            if length == 0 {
                return Err(io::ErrorKind::UnexpectedEof.into());
            }
            response.extend_from_slice(&chunk[..length]);
            // The server's body is one line, so its end is the end of the response.
            if let Some(end) = find(&response, b"\r\n\r\n")
                && response[end + 4..].ends_with(b"\n")
            {
                return Answer::parse(&String::from_utf8_lossy(&response[end + 4..]));
            }
        }
    }
}

/// Takes all datagrams that wait in a connected socket, and the errors of earlier ones, so
/// that whatever comes next answers what is sent next.
pub fn drain(socket: &UdpSocket) {
    socket.set_nonblocking(true).expect("a socket's mode");
    loop {
        match socket.recv(&mut [0; 2048]) {
            Err(error) if error.kind() == io::ErrorKind::WouldBlock => break,
            Ok(_) | Err(_) => {}
        }
    }
    socket.set_nonblocking(false).expect("a socket's mode");
}

type Job = Box<dyn FnOnce() + Send>;

/// A thread that lives in a namespace and runs what it is given, one after the other: for many
/// small requests, where [`Namespace::run`] would start a thread each time.
#[derive(Debug)]
pub struct Client {
    jobs: Option<mpsc::Sender<Job>>,
    thread: Option<JoinHandle<()>>,
}

impl Client {
    /// Starts the thread.
    pub fn new(ns: &Namespace) -> Self {
        let (jobs, queue) = mpsc::channel::<Job>();
        let ns = ns.clone();
        let thread = thread::Builder::new()
            .name(format!("client {}", ns.name()))
            .spawn(move || {
                ns.enter();
                queue.into_iter().for_each(|job| job());
            })
            .expect("a thread can be started");
        Self {
            jobs: Some(jobs),
            thread: Some(thread),
        }
    }

    /// Runs a closure there and returns its value.
    #[track_caller]
    pub fn run<T: Send + 'static>(&self, closure: impl FnOnce() -> T + Send + 'static) -> T {
        let (result, wait) = mpsc::sync_channel(1);
        let job: Job = Box::new(move || {
            // An error means that the result is no longer awaited.
            let _ = result.send(closure());
        });
        let jobs = self.jobs.as_ref().expect("the client runs until dropped");
        jobs.send(job).expect("the client's thread runs");
        wait.recv().expect("the closure does not panic")
    }

    /// Sends one request from there.
    #[track_caller]
    pub fn ask(&self, ask: Ask) -> io::Result<Answer> {
        self.run(move || ask.send())
    }
}

impl Drop for Client {
    fn drop(&mut self) {
        drop(self.jobs.take());
        if let Some(thread) = self.thread.take() {
            let _ = thread.join();
        }
    }
}
