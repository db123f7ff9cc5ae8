//! What stands between nftlet and the API server, such as a load balancer: it forgets connections
//! without a sign, and breaks off requests.

use std::net::SocketAddr;
use std::path::PathBuf;
use std::sync::Arc;
use std::sync::atomic::{AtomicUsize, Ordering};
use std::time::Duration;

use crate::support::consumer::{Consumer, hasty};
use crate::support::objects::{node, service};
use nftlet::source::cluster::{Cluster, Timing};
use nftlet_lab::fake_api::{FakeApi, NODES, SERVICES};
use tokio::io::{AsyncReadExt, AsyncWriteExt, copy_bidirectional};
use tokio::net::{TcpListener, TcpStream};
use tokio::sync::watch;

/// Reads the head of a request. Empty where the connection ends before.
async fn request(connection: &mut TcpStream) -> Vec<u8> {
    let mut bytes = Vec::new();
    while !bytes.windows(4).any(|window| window == b"\r\n\r\n") {
        if connection.read_buf(&mut bytes).await.unwrap_or_default() == 0 {
            return Vec::new();
        }
    }
    bytes
}

fn is_for(request: &[u8], part: &str) -> bool {
    String::from_utf8_lossy(request)
        .lines()
        .next()
        .is_some_and(|line| line.contains(part))
}

/// A listening socket, and what calls a closure with each connection to it.
async fn listen<F>(mut handle: impl FnMut(TcpStream) -> F + Send + 'static) -> SocketAddr
where
    F: Future<Output = ()> + Send + 'static,
{
    let listener = TcpListener::bind("127.0.0.1:0").await.expect("a port");
    let address = listener.local_addr().expect("it is bound");
    tokio::spawn(async move {
        while let Ok((near, _)) = listener.accept().await {
            tokio::spawn(handle(near));
        }
    });
    address
}

/// The kubeconfig of a server, with another address.
fn kubeconfig(api: &FakeApi, address: SocketAddr, directory: &tempfile::TempDir) -> PathBuf {
    let path = api.write_kubeconfig(directory.path());
    let text = std::fs::read_to_string(&path).expect("it was written");
    let text = text.replace(&api.address().to_string(), &address.to_string());
    std::fs::write(&path, text).expect("it can be written");
    path
}

#[derive(Clone, Copy, Debug, PartialEq)]
enum Phase {
    Before,
    Away,
    Back,
}

/// One connection is closed at the begin of an outage; the others are never heard of again.
#[tokio::test]
async fn watches_that_are_dead_without_a_sign_are_given_up() {
    let api = FakeApi::start().await;
    api.put(SERVICES, service("a", "10.96.0.1"));
    api.put(NODES, node("node-1", "a"));
    let server = api.address();
    let phase = watch::Sender::new(Phase::Before);
    let phases = phase.subscribe();
    let refused = watch::Sender::new(0);
    let refusals = refused.clone();
    let address = listen(move |mut near| {
        let (mut phases, refusals) = (phases.clone(), refusals.clone());
        async move {
            let born = *phases.borrow_and_update();
            let head = request(&mut near).await;
            if born == Phase::Away || head.is_empty() {
                drop(near);
                refusals.send_modify(|times| *times += usize::from(born == Phase::Away));
                return;
            }
            let mut far = TcpStream::connect(server).await.expect("it listens");
            far.write_all(&head).await.expect("it reads");
            tokio::select! {
                _ = copy_bidirectional(&mut near, &mut far) => return,
                _ = phases.wait_for(|phase| *phase != born) => {}
            }
            if !is_for(&head, "servicecidrs") {
                std::future::pending::<()>().await;
            }
        }
    })
    .await;
    let directory = tempfile::tempdir().expect("a directory");
    let path = kubeconfig(&api, address, &directory);
    let timing = Timing {
        quiet: Duration::from_secs(3600),
        idle: Duration::from_secs(3600),
        probe: Duration::from_millis(20),
        wake: Duration::from_millis(20),
        ..hasty()
    };
    let mut consumer = Consumer::connect(&path, directory, timing).await;
    consumer.ready().await;
    api.until_watched(SERVICES, 1).await;
    let mut refused = refused.subscribe();
    phase.send_replace(Phase::Away);
    // Enough for one of them to be a request that gets no answer.
    let enough = refused.wait_for(|times| *times >= 3);
    enough.await.expect("the sender is there");
    api.put(SERVICES, service("b", "10.96.0.2"));
    phase.send_replace(Phase::Back);
    consumer.has("Service shop/b").await;
}

/// It answers for the version, and breaks off each other request as soon as it has done so again.
#[tokio::test]
async fn what_answers_and_breaks_off_is_named_and_spared() {
    let (versions, others) = (watch::Sender::new(0), Arc::new(AtomicUsize::new(0)));
    let counts = (versions, others.clone());
    let address = listen(move |mut near| {
        let (versions, others) = counts.clone();
        async move {
            while is_for(&request(&mut near).await, "/version") {
                versions.send_modify(|times| *times += 1);
                let answer = "HTTP/1.1 200 OK\r\nContent-Length: 2\r\n\r\n{}";
                let _ = near.write_all(answer.as_bytes()).await;
            }
            let mut answered = versions.subscribe();
            let before = *answered.borrow();
            if others.fetch_add(1, Ordering::Relaxed) > 0 {
                let _ = answered.wait_for(|times| *times > before).await;
            }
        }
    })
    .await;
    let server = Some(format!("http://{address}"));
    let connected = Cluster::connect(None, server, "node-1".into()).await;
    let timing = Timing {
        first_pause: Duration::from_secs(3600),
        longest_pause: Duration::from_secs(3600),
        probe: Duration::from_millis(5),
        wake: Duration::from_millis(5),
        ..hasty()
    };
    let connected = connected.expect("an address").with_timing(timing);
    let directory = tempfile::tempdir().expect("a directory");
    let mut consumer = Consumer::of(connected.with_network_policies(false), directory);
    let named = |it: &Consumer| !it.notices.is_empty();
    consumer.until("the fault to be named", named).await;
    let tried = others.load(Ordering::Relaxed);
    assert!(tried <= 4 * 4, "{tried} requests of four kinds");
}
