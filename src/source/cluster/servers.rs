//! The addresses of the API server, which no service may use.
//!
//! A service with one of these addresses and ports would cut nftlet off from the server, and with
//! it from the deletion of that service. They are what the name of the server, or of the proxy to
//! it, resolves to at intervals, and the peers of connections on which answers were received.

use std::collections::{BTreeSet, VecDeque};
use std::net::SocketAddr;
use std::time::Duration;

use hyper::Uri;
use hyper_util::client::legacy::connect::HttpInfo;
use tokio::sync::watch;

use crate::model::{Delivery, Event};
use crate::source::Sender;

/// How often the name is resolved again.
const AGAIN: Duration = Duration::from_secs(30);
/// Time limit of resolving the name. The first lists wait for it.
const PATIENCE: Duration = Duration::from_secs(2);
/// How many of the latest peers are kept.
const MOST_PEERS: usize = 8;

/// The addresses and ports of one server.
#[derive(Debug)]
pub(super) struct Servers {
    host: String,
    port: u16,
    /// The latest peers, the newest last.
    peers: watch::Sender<VecDeque<SocketAddr>>,
}

impl Servers {
    /// Takes the host and port to connect to: those of the proxy if there is one, else the server's.
    pub(super) fn new(server: &Uri, proxy: Option<&Uri>) -> Self {
        let target = proxy.unwrap_or(server);
        let host = target.host().unwrap_or_default();
        let default = match target.scheme_str() {
            Some("https") => 443,
            _ => 80,
        };
        Self {
            host: host.trim_matches(['[', ']']).to_owned(),
            port: target.port_u16().unwrap_or(default),
            peers: watch::Sender::new(VecDeque::new()),
        }
    }

    /// Notes the peer of the connection on which an answer was received.
    pub(super) fn answered(&self, extensions: &hyper::http::Extensions) {
        let Some(info) = extensions.get::<HttpInfo>() else {
            return;
        };
        let peer = canonical(info.remote_addr());
        self.peers.send_if_modified(|peers| {
            let is_new = !peers.contains(&peer);
            if is_new {
                peers.push_back(peer);
                if peers.len() > MOST_PEERS {
                    peers.pop_front();
                }
            }
            is_new
        });
    }

    /// Resolves the name and delivers the addresses. Returns them without the peers.
    pub(super) async fn announce(&self, sender: &Sender) -> BTreeSet<SocketAddr> {
        let resolved = self.resolve().await.unwrap_or_default();
        self.send(&resolved, sender).await;
        resolved
    }

    /// Delivers the addresses whenever they change. Never returns.
    pub(super) async fn follow(&self, mut resolved: BTreeSet<SocketAddr>, sender: Sender) {
        let mut peers = self.peers.subscribe();
        let mut known = self.all(&resolved);
        loop {
            // The wait cannot fail, since `self` has the sender.
            let _ = tokio::time::timeout(AGAIN, peers.changed()).await;
            // If resolving fails, the last addresses stay.
            resolved = self.resolve().await.unwrap_or(resolved);
            let now = self.all(&resolved);
            if now != known {
                self.send(&resolved, &sender).await;
                known = now;
            }
        }
    }

    fn all(&self, resolved: &BTreeSet<SocketAddr>) -> BTreeSet<SocketAddr> {
        let peers = self.peers.borrow();
        resolved.iter().chain(peers.iter()).copied().collect()
    }

    async fn send(&self, resolved: &BTreeSet<SocketAddr>, sender: &Sender) {
        let event = Event::Servers(self.all(resolved));
        // If the receiver was dropped, the watches end the source.
        let _ = sender.send(Delivery::now(event)).await;
    }

    async fn resolve(&self) -> Option<BTreeSet<SocketAddr>> {
        let found = tokio::net::lookup_host((&*self.host, self.port));
        let found = tokio::time::timeout(PATIENCE, found).await.ok()?.ok()?;
        Some(found.map(canonical).collect())
    }
}

fn canonical(address: SocketAddr) -> SocketAddr {
    SocketAddr::new(address.ip().to_canonical(), address.port())
}

#[cfg(test)]
mod tests {
    use super::*;

    fn target(server: &str, proxy: Option<&str>) -> (String, u16) {
        let proxy: Option<Uri> = proxy.map(|proxy| proxy.parse().expect("an address"));
        let servers = Servers::new(&server.parse().expect("an address"), proxy.as_ref());
        (servers.host, servers.port)
    }

    #[test]
    fn the_target_is_the_server_or_the_proxy_on_the_way() {
        let of = |host: &str, port| (host.to_owned(), port);
        assert_eq!(target("https://192.0.2.1", None), of("192.0.2.1", 443));
        assert_eq!(target("http://192.0.2.1", None), of("192.0.2.1", 80));
        assert_eq!(
            target("https://[2001:db8::1]:6443/", None),
            of("2001:db8::1", 6443)
        );
        assert_eq!(
            target("https://api.example:6443", Some("http://192.0.2.9:3128")),
            of("192.0.2.9", 3128)
        );
    }

    #[tokio::test]
    async fn addresses_are_resolved_and_without_their_ipv4_mapping() {
        let servers = Servers::new(&"https://[::ffff:192.0.2.1]:6443".parse().unwrap(), None);
        let (sender, mut events) = tokio::sync::mpsc::channel(1);
        servers.announce(&sender).await;
        let event = events.recv().await.expect("an event").event;
        let Event::Servers(servers) = event else {
            panic!("{event:?}");
        };
        assert_eq!(servers, ["192.0.2.1:6443".parse().unwrap()].into());
    }
}
