use std::net::{IpAddr, Ipv4Addr};
use std::sync::Mutex;

use tokio::io::{AsyncReadExt, AsyncWriteExt};
use tokio::task::JoinHandle;

use super::*;
use crate::serve::health::PERIOD;
use crate::serve::metrics::Sample;

/// A server on a port of the loopback address.
struct Server {
    address: SocketAddr,
    health: Health,
    registry: Registry,
    stop: watch::Sender<bool>,
    task: JoinHandle<()>,
}

const ANY_PORT: SocketAddr = SocketAddr::new(IpAddr::V4(Ipv4Addr::LOCALHOST), 0);

impl Server {
    async fn start(limits: Limits) -> Self {
        let health = Health::new(PERIOD);
        let registry = Registry::new().unwrap();
        let metrics = HttpMetrics::register(&registry).unwrap();
        let router = Router::new()
            .probes(&health, &metrics)
            .metrics(registry.clone())
            .text("/proxyMode", || "nftables".to_owned())
            // More than the sockets' buffers hold.
            .text("/long", || "x".repeat(32 << 20));
        let listener = bind(ANY_PORT, "--some-address").unwrap();
        let address = listener.local_addr().unwrap();
        let (stop, stopped) = watch::channel(false);
        let task = tokio::spawn(async move {
            let share = Share::new(limits.connections);
            serve_within(limits, &share, listener, Arc::new(router), stopped).await;
        });
        Self {
            address,
            health,
            registry,
            stop,
            task,
        }
    }

    async fn connect(&self) -> Client {
        Client(TcpStream::connect(self.address).await.unwrap())
    }

    fn counted(&self) -> Vec<String> {
        counted(&self.registry)
    }

    async fn ask(&self, method: &str, path: &str) -> String {
        let mut client = self.connect().await;
        client
            .send(&format!(
                "{method} {path} HTTP/1.1\r\nHost: node\r\nConnection: close\r\n\r\n"
            ))
            .await;
        client.rest().await
    }
}

struct Client(TcpStream);

impl Client {
    async fn send(&mut self, text: &str) {
        self.0.write_all(text.as_bytes()).await.unwrap();
    }

    /// Everything until the server closes the connection, in whatever way.
    async fn rest(&mut self) -> String {
        let mut all = Vec::new();
        let _ = in_time(self.0.read_to_end(&mut all)).await;
        String::from_utf8(all).unwrap()
    }

    /// The next answer to a GET of `/proxyMode`, on a connection that stays open.
    async fn proxy_mode(&mut self) -> String {
        self.send("GET /proxyMode HTTP/1.1\r\nHost: node\r\n\r\n")
            .await;
        let mut answer = String::new();
        while !answer.ends_with("nftables") {
            let byte = in_time(self.0.read_u8()).await.unwrap();
            answer.push(byte.into());
        }
        answer
    }
}

/// Fails a test that waits for something which never comes.
async fn in_time<F: Future>(future: F) -> F::Output {
    let waited = tokio::time::timeout(Duration::from_secs(120), future).await;
    waited.expect("nothing happened for 120 s")
}

/// The counters of answered probes.
fn counted(registry: &Registry) -> Vec<String> {
    let page = registry.encode();
    let lines = page.lines().map(str::to_owned);
    lines
        .filter(|line| line.starts_with("kubeproxy_proxy_"))
        .collect()
}

fn body(answer: &str) -> &str {
    answer.split_once("\r\n\r\n").unwrap().1
}

fn has_header(answer: &str, header: &str) -> bool {
    answer.lines().any(|line| line.eq_ignore_ascii_case(header))
}

#[tokio::test]
async fn probes_answer_with_status_and_body_and_are_counted() {
    let server = Server::start(Limits::default()).await;
    let answer = server.ask("GET", "/healthz").await;
    assert!(answer.starts_with("HTTP/1.1 503 "), "{answer}");
    assert!(has_header(&answer, "content-type: application/json"));
    assert!(has_header(&answer, "x-content-type-options: nosniff"));
    assert!(body(&answer).contains("no rules are written yet"));
    server.health.synced();
    let answer = server.ask("GET", "/healthz?verbose=1").await;
    assert!(answer.starts_with("HTTP/1.1 200 "), "{answer}");
    let json: serde_json::Value = serde_json::from_str(body(&answer)).unwrap();
    assert_eq!(json.get("nodeEligible"), Some(&true.into()));
    let answer = server.ask("GET", "/livez").await;
    assert!(answer.starts_with("HTTP/1.1 200 "), "{answer}");
    let answer = server.ask("GET", "/readyz").await;
    assert!(answer.starts_with("HTTP/1.1 200 "), "{answer}");
    assert_eq!(
        server.counted(),
        [
            "kubeproxy_proxy_healthz_total{code=\"200\"} 1",
            "kubeproxy_proxy_healthz_total{code=\"503\"} 1",
            "kubeproxy_proxy_livez_total{code=\"200\"} 1",
        ]
    );
}

#[tokio::test]
async fn a_probe_waits_until_all_is_written_where_it_is_asked_to() {
    let server = Server::start(Limits::default()).await;
    server.health.expect_policies();
    let mut client = server.connect().await;
    client
        .send("GET /livez?wait=60 HTTP/1.1\r\nHost: node\r\nConnection: close\r\n\r\n")
        .await;
    // Probes that do not ask for it do not wait, and show that the first one does.
    let answer = server.ask("GET", "/readyz").await;
    assert!(answer.starts_with("HTTP/1.1 503 "), "{answer}");
    server.health.synced();
    let answer = server.ask("GET", "/readyz?wait=0").await;
    assert!(answer.starts_with("HTTP/1.1 503 "), "{answer}");
    assert_eq!(server.counted(), [""; 0], "it did not wait");
    server.health.policies(Ok(()));
    let answer = client.rest().await;
    assert!(answer.starts_with("HTTP/1.1 200 "), "{answer}");
    let answer = server.ask("GET", "/readyz?wait=60").await;
    assert!(answer.starts_with("HTTP/1.1 200 "), "{answer}");
}

#[test]
fn a_request_says_how_long_it_waits() {
    let asked = |query| requested_wait(Some(query)).map(|wait| wait.as_secs());
    assert_eq!(asked("wait=50"), Some(50));
    assert_eq!(asked("verbose&wait=3600"), Some(60));
    for query in ["", "wait", "wait=", "wait=-1", "waits=5"] {
        assert_eq!(asked(query), None, "{query}");
    }
}

#[tokio::test]
async fn pages_have_their_type_and_text() {
    let server = Server::start(Limits::default()).await;
    let answer = server.ask("GET", "/metrics").await;
    assert!(has_header(
        &answer,
        "content-type: text/plain; version=0.0.4; charset=utf-8"
    ));
    let first = body(&answer).lines().next();
    assert!(
        first.is_some_and(|line| line.starts_with("# HELP ")),
        "{answer}"
    );
    let answer = server.ask("GET", "/proxyMode").await;
    assert!(answer.starts_with("HTTP/1.1 200 "), "{answer}");
    assert_eq!(body(&answer), "nftables");
}

#[tokio::test]
async fn head_has_the_headers_alone() {
    let server = Server::start(Limits::default()).await;
    let answer = server.ask("HEAD", "/proxyMode").await;
    assert!(answer.starts_with("HTTP/1.1 200 "), "{answer}");
    assert!(has_header(&answer, "content-length: 8"), "{answer}");
    assert_eq!(body(&answer), "");
}

#[tokio::test]
async fn other_methods_and_paths_are_refused_with_what_there_is() {
    let server = Server::start(Limits::default()).await;
    for method in ["POST", "PUT", "DELETE", "OPTIONS", "TRACE", "BREW"] {
        let answer = server.ask(method, "/healthz").await;
        assert!(answer.starts_with("HTTP/1.1 405 "), "{answer}");
        assert!(has_header(&answer, "allow: GET, HEAD"), "{answer}");
    }
    let answer = server.ask("GET", "/").await;
    assert!(answer.starts_with("HTTP/1.1 404 "), "{answer}");
    assert_eq!(
        body(&answer),
        "no such page; there are /healthz, /livez, /readyz, /metrics, /proxyMode, /long\n"
    );
    assert!(
        server
            .ask("POST", "/nowhere")
            .await
            .starts_with("HTTP/1.1 404 ")
    );
    assert_eq!(server.counted(), [""; 0]);
}

#[tokio::test]
async fn a_connection_serves_several_requests() {
    let server = Server::start(Limits::default()).await;
    let mut client = server.connect().await;
    for _ in 0..3 {
        assert!(client.proxy_mode().await.starts_with("HTTP/1.1 200 "));
    }
}

#[tokio::test]
async fn a_body_ends_the_connection_unread() {
    let server = Server::start(Limits::default()).await;
    let mut client = server.connect().await;
    client
        .send("GET /proxyMode HTTP/1.1\r\nHost: node\r\nContent-Length: 1000000000\r\n\r\n")
        .await;
    let answer = client.rest().await;
    assert!(has_header(&answer, "connection: close"), "{answer}");
    assert_eq!(body(&answer), "nftables");
}

#[tokio::test]
async fn requests_that_are_too_large_or_no_http_are_refused() {
    let server = Server::start(Limits::default()).await;
    let cookie = format!("Cookie: {}\r\n", "c".repeat(20_000));
    let many = "A: b\r\n".repeat(65);
    for (request, wanted) in [
        (
            format!("GET /healthz HTTP/1.1\r\n{cookie}\r\n"),
            "HTTP/1.1 431 ",
        ),
        (
            format!("GET /healthz HTTP/1.1\r\n{many}\r\n"),
            "HTTP/1.1 431 ",
        ),
        ("\u{16}\u{3}\u{1} hello\r\n\r\n".to_owned(), "HTTP/1.1 400 "),
    ] {
        let mut client = server.connect().await;
        client.send(&request).await;
        let answer = client.rest().await;
        assert!(answer.starts_with(wanted) || answer.is_empty(), "{answer}");
    }
    assert_eq!(server.counted(), [""; 0]);
}

#[tokio::test]
async fn who_does_not_finish_a_request_is_closed() {
    let limits = Limits {
        request: Duration::from_millis(50),
        ..Limits::default()
    };
    let server = Server::start(limits).await;
    let mut silent = server.connect().await;
    let mut half = server.connect().await;
    half.send("GET /healthz HTTP/1.1\r\nHost: no").await;
    assert_eq!(silent.rest().await, "");
    assert!(!half.rest().await.starts_with("HTTP/1.1 200 "));
}

#[tokio::test]
async fn an_idle_connection_is_closed() {
    // The limit is the same for a request, which a machine that stalls may not have sent in time.
    let mut limits = [1, 4, 16, 60].into_iter().map(Duration::from_secs);
    loop {
        let request = limits.next().expect("an answer within the longest limit");
        let limits = Limits {
            request,
            ..Limits::default()
        };
        let server = Server::start(limits).await;
        let mut client = server.connect().await;
        client
            .send("GET /proxyMode HTTP/1.1\r\nHost: node\r\n\r\n")
            .await;
        // Ends because the server closes the connection, although no client requested it.
        let answer = client.rest().await;
        if answer.starts_with("HTTP/1.1 200 ") {
            assert_eq!(answer.matches("HTTP/1.1 200 ").count(), 1, "{answer}");
            return;
        }
    }
}

#[tokio::test]
async fn who_does_not_read_the_answer_is_cut_off() {
    let limits = Limits {
        connection: Duration::from_millis(100),
        grace: Duration::from_millis(100),
        ..Limits::default()
    };
    let server = Server::start(limits).await;
    let mut client = server.connect().await;
    client
        .send("GET /long HTTP/1.1\r\nHost: node\r\n\r\n")
        .await;
    // The connection ends on the side of the server alone; a write then meets a closed socket.
    in_time(async {
        while client.0.write_all(b"x").await.is_ok() {
            tokio::task::yield_now().await;
        }
    })
    .await;
}

#[tokio::test]
async fn one_connection_too_many_drives_out_the_oldest() {
    let limits = Limits {
        connections: 2,
        ..Limits::default()
    };
    let server = Server::start(limits).await;
    let mut first = server.connect().await;
    first.proxy_mode().await;
    let mut second = server.connect().await;
    second.proxy_mode().await;
    let mut third = server.connect().await;
    third.proxy_mode().await;
    assert_eq!(first.rest().await, "");
    second.proxy_mode().await;
    third.proxy_mode().await;
    // One that has ended makes room.
    drop(second);
    assert!(server.ask("GET", "/proxyMode").await.ends_with("nftables"));
}

#[tokio::test]
async fn holding_all_connections_excludes_no_client() {
    let limits = Limits {
        connections: 8,
        ..Limits::default()
    };
    let server = Server::start(limits).await;
    let mut held = Vec::new();
    for _ in 0..40 {
        let mut client = server.connect().await;
        client.send("GET /healthz HTT").await;
        held.push(client);
    }
    let answer = server.ask("GET", "/proxyMode").await;
    assert_eq!(body(&answer), "nftables");
}

#[tokio::test]
async fn shutdown_closes_the_port_and_the_connections() {
    let server = Server::start(Limits {
        grace: Duration::from_millis(100),
        ..Limits::default()
    })
    .await;
    let mut idle = server.connect().await;
    idle.proxy_mode().await;
    let mut half = server.connect().await;
    half.send("GET /proxyMode HTTP/1.1\r\n").await;
    server.stop.send(true).unwrap();
    in_time(server.task).await.unwrap();
    assert_eq!(idle.rest().await, "");
    half.rest().await;
    // The server no longer answers, though another test's server may have the port by now.
    if let Ok(stream) = TcpStream::connect(server.address).await {
        let mut other = Client(stream);
        other
            .send("GET /healthz HTTP/1.1\r\nHost: node\r\nConnection: close\r\n\r\n")
            .await;
        other.rest().await;
    }
    assert_eq!(counted(&server.registry), [""; 0]);
}

#[tokio::test]
async fn a_dropped_sender_ends_the_server() {
    let server = Server::start(Limits::default()).await;
    drop(server.stop);
    in_time(server.task).await.unwrap();
}

#[tokio::test]
async fn an_address_that_cannot_be_had_names_the_flag() {
    let taken = bind(ANY_PORT, "--some-address").unwrap();
    let address = taken.local_addr().unwrap();
    let error = bind(address, "--some-address").unwrap_err();
    let text = error.to_string();
    assert!(
        text.starts_with(&format!("cannot listen on {address}: ")),
        "{text}"
    );
    assert!(
        text.ends_with(
            "; stop the program that holds this port (kube-proxy has the same ports) or choose another one with --some-address"
        ),
        "{text}"
    );
    // An address reserved for documentation is no node's.
    let error = bind("192.0.2.1:0".parse().unwrap(), "--some-address").unwrap_err();
    assert!(
        error.to_string().ends_with(
            "give one of this node's addresses, or 0.0.0.0 or [::] for all, with --some-address"
        ),
        "{error}"
    );
}

#[tokio::test]
async fn a_page_that_takes_long_holds_up_nothing_and_is_made_once_at_a_time() {
    let (open, gate) = std::sync::mpsc::channel::<()>();
    let gate = Mutex::new(Some(gate));
    let (begun, mut begins) = tokio::sync::mpsc::unbounded_channel();
    let registry = Registry::new().unwrap();
    let read = move || {
        begun.send(()).unwrap();
        // The first one takes until the gate is opened.
        let gate = gate.lock().unwrap().take();
        let _ = gate.map(|gate| gate.recv_timeout(Duration::from_secs(60)));
        Some(vec![Sample::new([], 1)])
    };
    registry.sampled("some_total", "Some", [], read).unwrap();
    let router = Router::new()
        .metrics(registry)
        .text("/proxyMode", || "nftables".to_owned());
    let listener = bind(ANY_PORT, "--some-address").unwrap();
    let address = listener.local_addr().unwrap();
    let (_stop, stopped) = watch::channel(false);
    tokio::spawn(serve(listener, Arc::new(router), stopped));
    let connect = async || Client(TcpStream::connect(address).await.unwrap());
    let mut clients = Vec::new();
    // More than the server keeps: displaced connections leave their page unread.
    for _ in 0..100 {
        let mut client = connect().await;
        client
            .send("GET /metrics HTTP/1.1\r\nHost: n\r\n\r\n")
            .await;
        clients.push(client);
    }
    in_time(begins.recv()).await.unwrap();
    for _ in 0..100 {
        let answer = connect().await.proxy_mode().await;
        assert!(answer.starts_with("HTTP/1.1 200 "), "{answer}");
    }
    assert!(begins.try_recv().is_err(), "two are made at once");
    drop(open);
    drop(clients);
    let mut client = connect().await;
    client
        .send("GET /metrics HTTP/1.1\r\nHost: n\r\nConnection: close\r\n\r\n")
        .await;
    let answer = client.rest().await;
    assert!(answer.ends_with("some_total 1\n"), "{answer}");
}
