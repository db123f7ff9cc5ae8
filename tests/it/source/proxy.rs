//! The proxy of a kubeconfig.

use std::net::SocketAddr;

use crate::support::consumer::{Consumer, hasty};
use crate::support::objects::{node, service};
use nftlet::source::cluster::Cluster;
use nftlet_lab::fake_api::{FakeApi, NODES, SERVICES};
use tokio::io::{AsyncReadExt, AsyncWriteExt};
use tokio::net::{TcpListener, TcpStream};

/// Answers one client as a proxy does, and returns the way to what it asked for.
async fn meet(mut near: TcpStream, socks: bool, far: SocketAddr) {
    if socks {
        let mut greeting = [0; 3];
        near.read_exact(&mut greeting).await.expect("a greeting");
        assert_eq!(greeting, [5, 1, 0]);
        near.write_all(&[5, 0]).await.expect("an open connection");
        let mut wish = [0; 5];
        near.read_exact(&mut wish).await.expect("a wish");
        assert_eq!(wish[..4], [5, 1, 0, 3], "to connect by name");
        let mut name = vec![0; usize::from(wish[4]) + 2];
        near.read_exact(&mut name).await.expect("a name");
        assert_eq!(&name[..name.len() - 2], b"api.invalid");
        let reply = [5, 0, 0, 1, 0, 0, 0, 0, 0, 0];
        near.write_all(&reply).await.expect("an open connection");
    } else {
        let mut head = Vec::new();
        while !head.ends_with(b"\r\n\r\n") {
            head.push(near.read_u8().await.expect("a request"));
        }
        let head = String::from_utf8(head).expect("text");
        assert!(
            head.starts_with("CONNECT api.invalid:6443 HTTP/1.1\r\n"),
            "{head}"
        );
        // "me:pass word", escaped for an address.
        assert!(
            head.contains("\r\nProxy-Authorization: Basic bWU6cGFzcyB3b3Jk\r\n"),
            "{head}"
        );
        let reply = b"HTTP/1.1 200 OK\r\n\r\n";
        near.write_all(reply).await.expect("an open connection");
    }
    let mut far = TcpStream::connect(far).await.expect("the server");
    let _ = tokio::io::copy_bidirectional(&mut near, &mut far).await;
}

#[tokio::test]
async fn the_way_leads_through_the_proxy_of_the_kubeconfig() {
    for (socks, scheme) in [(false, "http://me:pass%20word@"), (true, "socks5://")] {
        let api = FakeApi::start().await;
        api.put(NODES, node("node-1", "zone-a"));
        api.put(SERVICES, service("a", "10.0.0.1"));
        let proxy = TcpListener::bind("127.0.0.1:0").await.expect("a port");
        let address = proxy.local_addr().expect("an address");
        let far = api.address();
        let proxy = tokio::spawn(async move {
            while let Ok((near, _)) = proxy.accept().await {
                tokio::spawn(meet(near, socks, far));
            }
        });
        let directory = tempfile::tempdir().expect("a directory");
        let kubeconfig = api.write_kubeconfig(directory.path());
        let text = std::fs::read_to_string(&kubeconfig).expect("a file");
        let server = format!("http://{far}");
        assert!(text.contains(&server), "{text}");
        // Only the proxy knows where that is.
        let text = text.replace(
            &server,
            &format!("http://api.invalid:6443\n    proxy-url: '{scheme}{address}'"),
        );
        std::fs::write(&kubeconfig, text).expect("written");
        let mut consumer = Consumer::connect(&kubeconfig, directory, hasty()).await;
        consumer.ready().await;
        assert!(consumer.objects.contains_key("Service shop/a"));
        assert_eq!(consumer.notices, Vec::new());
        consumer.finish().await;
        proxy.abort();
    }
}

#[tokio::test]
async fn a_proxy_that_cannot_be_used_is_named() {
    let api = FakeApi::start().await;
    let directory = tempfile::tempdir().expect("a directory");
    let kubeconfig = api.write_kubeconfig(directory.path());
    let text = std::fs::read_to_string(&kubeconfig).expect("a file");
    let server = format!("http://{}", api.address());
    for proxy in ["ftp://me:secret@192.0.2.20", "http://me:secret@[192.0.2.20"] {
        let text = text.replace(&server, &format!("{server}\n    proxy-url: '{proxy}'"));
        std::fs::write(&kubeconfig, text).expect("written");
        let error = Cluster::connect(Some(kubeconfig.clone()), None, "node-1".to_owned()).await;
        let error = error.err().expect("a fault").to_string();
        assert!(
            error.contains("cannot use the proxy") && error.contains("192.0.2.20"),
            "{error}"
        );
        assert!(
            error.contains("proxy-url of the kubeconfig") && !error.contains("secret"),
            "{error}"
        );
    }
}
