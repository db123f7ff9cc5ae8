use std::sync::Mutex;
use std::sync::atomic::{AtomicU16, Ordering};

use tokio::io::{AsyncReadExt, AsyncWriteExt};
use tokio::net::TcpStream;

use super::*;
use crate::serve::health::PERIOD;

/// Reached by a test that fails, and by no other.
const PATIENCE: Duration = Duration::from_secs(120);
const QUICK: Backoff = Backoff::new(Duration::from_millis(10), Duration::from_millis(40));

/// A manager at work.
struct Bench {
    wanted: watch::Sender<Checks>,
    health: Health,
    failures: Arc<Mutex<Vec<(String, bool)>>>,
    stop: watch::Sender<bool>,
    manager: JoinHandle<()>,
}

impl Bench {
    fn start() -> Self {
        Self::within(Quota::of(1024))
    }

    fn within(quota: Quota) -> Self {
        let (wanted, receiver) = watch::channel(Checks::new());
        let (stop, stopped) = watch::channel(false);
        let health = Health::new(PERIOD);
        health.synced();
        let failures = Arc::new(Mutex::new(Vec::new()));
        let reported = Arc::clone(&failures);
        let failed = move |error: &CheckError| {
            reported
                .lock()
                .unwrap()
                .push((error.to_string(), error.again));
        };
        let ports = Ports::new(QUICK, quota, receiver.clone(), health.clone());
        let manager = ports.follow(receiver, failed, stopped);
        Self {
            wanted,
            health,
            failures,
            stop,
            manager: tokio::spawn(manager),
        }
    }

    fn want(&self, checks: &[(u16, &str, usize)]) {
        let checks = checks.iter().map(|(port, name, count)| {
            let check = Check {
                namespace: "shop".into(),
                name: (*name).into(),
                local_endpoints: *count,
            };
            (*port, check)
        });
        self.wanted.send_replace(checks.collect());
    }

    fn failures(&self) -> usize {
        self.failures.lock().unwrap().len()
    }
}

/// A free port that no other test gets: the kernel assigns higher ones.
async fn free_port() -> u16 {
    static NEXT: AtomicU16 = AtomicU16::new(21_000);
    loop {
        let port = NEXT.fetch_add(1, Ordering::Relaxed);
        if TcpListener::bind(("::", port)).await.is_ok() {
            return port;
        }
    }
}

async fn ask(host: &str, port: u16) -> io::Result<String> {
    let mut stream = TcpStream::connect((host, port)).await?;
    let request = "OPTIONS /any HTTP/1.1\r\nHost: node\r\nConnection: close\r\n\r\n";
    stream.write_all(request.as_bytes()).await?;
    let mut answer = String::new();
    stream.read_to_string(&mut answer).await?;
    Ok(answer)
}

/// Asks until the answer is as wanted; `None` is a port that is closed.
async fn expect(port: u16, wanted: Option<&str>) -> String {
    let mut last = String::new();
    let found = tokio::time::timeout(PATIENCE, async {
        loop {
            let answer = ask("127.0.0.1", port).await;
            let fits = match (&answer, wanted) {
                (Ok(text), Some(wanted)) => text.contains(wanted),
                (Err(_), None) => true,
                _ => false,
            };
            last = answer.unwrap_or_default();
            if fits {
                return;
            }
            tokio::task::yield_now().await;
        }
    });
    let found = found.await;
    assert!(found.is_ok(), "{wanted:?} did not come: {last}");
    last
}

#[tokio::test]
async fn a_port_answers_as_kube_proxy_does() {
    let bench = Bench::start();
    let port = free_port().await;
    bench.want(&[(port, "web", 2)]);
    let answer = expect(port, Some("HTTP/1.1 200 ")).await;
    let (head, body) = answer.split_once("\r\n\r\n").unwrap();
    let head = head.to_ascii_lowercase();
    assert!(
        head.contains("\r\nx-load-balancing-endpoint-weight: 2\r\n"),
        "{head}"
    );
    assert!(
        head.contains("\r\ncontent-type: application/json\r\n"),
        "{head}"
    );
    let body: serde_json::Value = serde_json::from_str(body).unwrap();
    assert_eq!(
        body,
        json!({
            "service": {"namespace": "shop", "name": "web"},
            "localEndpoints": 2,
            "serviceProxyHealthy": true,
        })
    );
    // Both families on one socket.
    assert!(ask("::1", port).await.unwrap().starts_with("HTTP/1.1 200 "));
}

#[tokio::test]
async fn it_is_503_without_endpoints_and_while_the_proxy_is_unhealthy() {
    let bench = Bench::start();
    let port = free_port().await;
    bench.want(&[(port, "web", 0)]);
    let answer = expect(port, Some("HTTP/1.1 503 ")).await;
    assert!(answer.contains("\"localEndpoints\":0"), "{answer}");
    bench.want(&[(port, "web", 1)]);
    expect(port, Some("HTTP/1.1 200 ")).await;
    // A node that is about to go is the concern of the other probes.
    bench.health.node_going_away(true);
    expect(port, Some("HTTP/1.1 200 ")).await;

    let check = Check {
        namespace: "shop".into(),
        name: "web".into(),
        local_endpoints: 1,
    };
    assert_eq!(
        check.answer(false).status(),
        StatusCode::SERVICE_UNAVAILABLE
    );
}

#[tokio::test]
async fn ports_open_change_hands_and_close() {
    let bench = Bench::start();
    let (one, two) = (free_port().await, free_port().await);
    bench.want(&[(one, "web", 1), (two, "api", 3)]);
    expect(one, Some("\"name\":\"web\"")).await;
    expect(two, Some("\"localEndpoints\":3")).await;
    bench.want(&[(one, "api", 3)]);
    expect(one, Some("\"name\":\"api\"")).await;
    expect(two, None).await;
    // A port that is back before its last connection ended.
    let mut idle = TcpStream::connect(("127.0.0.1", one)).await.unwrap();
    idle.write_all(b"GET / HT").await.unwrap();
    bench.want(&[]);
    expect(one, None).await;
    bench.want(&[(one, "web", 5)]);
    expect(one, Some("\"localEndpoints\":5")).await;
    assert_eq!(bench.failures(), 0);
}

#[tokio::test]
async fn a_port_in_use_is_reported_once_and_retried() {
    let bench = Bench::start();
    let (taken, other) = (free_port().await, free_port().await);
    let holder = TcpListener::bind(("127.0.0.1", taken)).await.unwrap();
    bench.want(&[(taken, "web", 1), (other, "api", 1)]);
    expect(other, Some("\"name\":\"api\"")).await;
    let tried = tokio::time::timeout(PATIENCE, async {
        while bench.failures() < 3 {
            tokio::task::yield_now().await;
        }
    });
    tried.await.expect("nftlet retries");
    {
        let failures = bench.failures.lock().unwrap();
        let (text, again) = &failures[0];
        assert!(!again);
        assert!(
            text.starts_with(&format!("cannot listen on healthCheckNodePort {taken}: ")),
            "{text}"
        );
        assert!(
            text.contains("stop the program that holds the port"),
            "{text}"
        );
        assert!(failures[1..].iter().all(|(_, again)| *again));
    }
    drop(holder);
    expect(taken, Some("\"name\":\"web\"")).await;
}

#[tokio::test]
async fn the_end_closes_the_ports() {
    let bench = Bench::start();
    let port = free_port().await;
    bench.want(&[(port, "web", 1)]);
    expect(port, Some("200")).await;
    bench.stop.send_replace(true);
    bench.manager.await.unwrap();
    assert!(ask("127.0.0.1", port).await.is_err());
}

#[tokio::test]
async fn held_connections_of_all_ports_share_a_bound_and_exclude_no_client() {
    let quota = Quota {
        ports: 16,
        connections: 8,
    };
    let bench = Bench::within(quota);
    let ports = [free_port().await, free_port().await, free_port().await];
    bench.want(&ports.map(|port| (port, "web", 1)));
    let mut held = Vec::new();
    for port in ports.into_iter().cycle().take(60) {
        expect(port, Some("200")).await;
        let mut stream = TcpStream::connect(("127.0.0.1", port)).await.unwrap();
        stream.write_all(b"GET / HT").await.unwrap();
        held.push(stream);
    }
    for port in ports {
        expect(port, Some("200")).await;
    }
    // Connections without a seat were closed: nothing else ends them before ten seconds.
    let closed = tokio::time::timeout(PATIENCE, async {
        for stream in &mut held[..52] {
            let _ = stream.read_to_end(&mut Vec::new()).await;
        }
    });
    closed.await.expect("displaced connections are closed");
}

#[tokio::test]
async fn ports_without_descriptors_are_reported_and_opened_when_others_close() {
    let quota = Quota {
        ports: 1,
        connections: 8,
    };
    let bench = Bench::within(quota);
    let (one, two) = (free_port().await, free_port().await);
    bench.want(&[(one, "web", 1), (two, "api", 1)]);
    expect(one, Some("\"name\":\"web\"")).await;
    expect(two, None).await;
    let failure = bench.failures.lock().unwrap()[0].0.clone();
    assert!(failure.contains("LimitNOFILE"), "{failure}");
    bench.want(&[(two, "api", 1)]);
    expect(two, Some("\"name\":\"api\"")).await;
}
