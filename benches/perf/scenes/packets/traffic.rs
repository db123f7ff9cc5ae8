//! Connections, both ends of which one thread holds, and those whose server is another thread.
//!
//! Over a pair of linked devices a packet is received inside of the call that sends it. With one
//! thread for both ends no thread is woken, and what is timed is the work of the kernel on the
//! packets and not that of its scheduler.

use std::io::{ErrorKind, Read, Write};
use std::net::{SocketAddrV4, TcpListener, TcpStream};
use std::time::{Duration, Instant};

use rustix::net::sockopt::{Timeout, set_socket_linger, set_socket_timeout, set_tcp_nodelay};
use rustix::net::{AddressFamily, SocketType};

/// What takes longer has failed; what is measured takes microseconds.
pub const PATIENCE: Duration = Duration::from_secs(5);
/// What is written at once.
const CHUNK: usize = 256 << 10;

/// An established connection, which ends with a reset, so that neither side waits for the other.
pub struct Connection {
    /// The end of the client.
    pub client: TcpStream,
    /// The end of the server.
    pub server: TcpStream,
    /// From the call that sends the first packet to its return with the answer.
    pub handshake: Duration,
}

/// Connects from the namespace of the calling thread.
pub fn connect(listener: &TcpListener, to: SocketAddrV4) -> Connection {
    let socket = rustix::net::socket(AddressFamily::INET, SocketType::STREAM, None)
        .expect("a socket can be opened");
    set_socket_linger(&socket, Some(Duration::ZERO)).expect("sockets can be reset");
    set_socket_timeout(&socket, Timeout::Send, Some(PATIENCE)).expect("sockets can wait");
    let started = Instant::now();
    let connected = rustix::net::connect(&socket, &to);
    let handshake = started.elapsed();
    connected.unwrap_or_else(|error| panic!("cannot connect to {to}: {error}"));
    let (server, _) = listener
        .accept()
        .unwrap_or_else(|error| panic!("a connection to {to} is not accepted: {error}"));
    Connection {
        client: socket.into(),
        server,
        handshake,
    }
}

/// An established connection with a thread at the server's end that returns each byte.
///
/// The thread ends with the connection.
pub struct Echo(TcpStream);

impl Echo {
    pub fn new(connection: Connection) -> Self {
        let Connection { client, server, .. } = connection;
        for end in [&client, &server] {
            set_tcp_nodelay(end, true).expect("the socket is one of TCP");
        }
        set_socket_timeout(&client, Timeout::Recv, Some(PATIENCE)).expect("sockets can wait");
        std::thread::spawn(move || {
            let (mut from, mut to) = (&server, &server);
            let mut byte = [0];
            while from.read_exact(&mut byte).is_ok() && to.write_all(&byte).is_ok() {}
        });
        Self(client)
    }

    /// Sends a byte there and a byte back.
    pub fn exchange(&mut self) -> Duration {
        let mut byte = [0];
        let started = Instant::now();
        let sent = self.0.write_all(&byte);
        let answered = sent.and_then(|()| self.0.read_exact(&mut byte));
        let took = started.elapsed();
        answered.unwrap_or_else(|error| panic!("a connection fails: {error}"));
        took
    }
}

impl Connection {
    /// Prepares it for data: small packets go at once, and no call waits.
    pub fn for_data(self) -> Self {
        for end in [&self.client, &self.server] {
            set_tcp_nodelay(end, true).expect("the socket is one of TCP");
            end.set_nonblocking(true).expect("sockets need not block");
        }
        self
    }

    /// Sends a byte there and a byte back.
    pub fn round_trip(&mut self) -> Duration {
        let started = Instant::now();
        pass_byte(&mut self.client, &mut self.server);
        pass_byte(&mut self.server, &mut self.client);
        started.elapsed()
    }

    /// Sends so many bytes to the server.
    pub fn send(&mut self, bytes: usize) -> Duration {
        let mut buffer = vec![0; CHUNK];
        let started = Instant::now();
        let (mut sent, mut received) = (0, 0);
        while received < bytes {
            let chunk = CHUNK.min(bytes - sent);
            if chunk > 0 {
                sent += progress(self.client.write(&buffer[..chunk]));
            }
            let now = progress(self.server.read(&mut buffer));
            received += now;
            assert!(started.elapsed() < PATIENCE, "a connection is stuck");
        }
        started.elapsed()
    }
}

fn pass_byte(from: &mut TcpStream, to: &mut TcpStream) {
    let started = Instant::now();
    let mut byte = [0];
    assert_eq!(progress(from.write(&byte)), 1, "there is room for a byte");
    while progress(to.read(&mut byte)) == 0 {
        assert!(started.elapsed() < PATIENCE, "a connection is stuck");
    }
}

/// Returns how many bytes a call moved.
fn progress(result: std::io::Result<usize>) -> usize {
    match result {
        Ok(bytes) => bytes,
        Err(error) if error.kind() == ErrorKind::WouldBlock => 0,
        Err(error) => panic!("a connection fails: {error}"),
    }
}
