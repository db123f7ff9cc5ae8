//! A bound on the connections of several ports together.

use std::collections::BTreeMap;
use std::pin::pin;
use std::sync::{Arc, Mutex, MutexGuard};
use std::time::Duration;

use tokio::sync::{OwnedSemaphorePermit, Semaphore, oneshot};
use tokio::time::timeout;

use crate::mutex::lock;

/// The file descriptors for health checks of services. The others are left for connections to the
/// API server, for the kernel, and for nftlet's own ports.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Quota {
    /// Simultaneously open ports.
    pub(super) ports: usize,
    /// Simultaneous connections of all ports together.
    pub(super) connections: usize,
}

/// Descriptors for nftlet itself: twice 64 connections for probes and metrics, and fewer than 50
/// others.
const OWN: usize = 256;
/// The maximum number of connections for health checks.
const MOST: usize = 512;
/// The minimum number of ports and of connections, even if descriptors are scarce.
const LEAST: usize = 16;
/// How long an entering connection waits for a seat before it displaces another connection.
const GRACE: Duration = Duration::from_millis(50);

impl Quota {
    /// Returns the quota for a process with a limit of `descriptors`.
    pub fn of(descriptors: usize) -> Self {
        let free = descriptors.saturating_sub(OWN);
        let connections = (free / 4).clamp(LEAST, MOST);
        // A port uses one descriptor, and another for an accepted connection without a seat.
        let ports = (free.saturating_sub(connections) / 2).max(LEAST);
        Self { ports, connections }
    }
}

/// A bound on connections. When it is reached, a new connection displaces the oldest one of the
/// port with most connections, so that a client that holds many displaces its own.
#[derive(Debug)]
pub(super) struct Share {
    free: Arc<Semaphore>,
    held: Mutex<Held>,
}

/// The connections of each port, by age; sending on the channel dismisses a connection.
#[derive(Debug, Default)]
struct Held {
    ports: BTreeMap<u16, BTreeMap<u64, oneshot::Sender<()>>>,
    next: u64,
}

/// A connection's place in a [`Share`], freed when dropped.
#[derive(Debug)]
pub(super) struct Seat {
    share: Arc<Share>,
    port: u16,
    number: u64,
    give_way: oneshot::Receiver<()>,
    _permit: OwnedSemaphorePermit,
}

impl Share {
    /// Creates a share of `most` connections.
    pub(super) fn new(most: usize) -> Arc<Self> {
        Arc::new(Self {
            free: Arc::new(Semaphore::new(most)),
            held: Mutex::default(),
        })
    }

    /// Waits for a seat for a connection of a port with at most `most` connections. If all seats
    /// are taken, an older connection is dismissed.
    pub(super) async fn enter(self: &Arc<Self>, port: u16, most: usize) -> Option<Seat> {
        let made_room = self.held().make_room_at(port, most);
        let permit = match self.free.clone().try_acquire_owned() {
            Ok(permit) => permit,
            Err(_) => {
                if !made_room {
                    self.held().make_room();
                }
                let mut permit = pin!(self.free.clone().acquire_owned());
                loop {
                    match timeout(GRACE, permit.as_mut()).await {
                        // The semaphore is never closed.
                        Ok(permit) => break permit.ok()?,
                        // Other waiting connections may have taken the seats.
                        Err(_) => self.held().make_room(),
                    }
                }
            }
        };
        let (sender, give_way) = oneshot::channel();
        let mut held = self.held();
        let number = held.next;
        held.next += 1;
        held.ports.entry(port).or_default().insert(number, sender);
        drop(held);
        Some(Seat {
            share: self.clone(),
            port,
            number,
            give_way,
            _permit: permit,
        })
    }

    fn held(&self) -> MutexGuard<'_, Held> {
        lock(&self.held)
    }
}

impl Held {
    /// Dismisses the oldest connections of a port until there is room for one more. Returns whether
    /// any was dismissed.
    fn make_room_at(&mut self, port: u16, most: usize) -> bool {
        let mut asked = false;
        while self.ports.get(&port).map_or(0, BTreeMap::len) >= most.max(1) {
            self.dismiss(port);
            asked = true;
        }
        asked
    }

    /// Dismisses the oldest connection of the port with most connections.
    fn make_room(&mut self) {
        let most = self.ports.iter().max_by_key(|(_, held)| held.len());
        if let Some(port) = most.map(|(port, _)| *port) {
            self.dismiss(port);
        }
    }

    fn dismiss(&mut self, port: u16) {
        let Some(held) = self.ports.get_mut(&port) else {
            return;
        };
        if let Some((_, oldest)) = held.pop_first() {
            // The receiver is dropped if the connection ends at the same time.
            let _ = oldest.send(());
        }
        if held.is_empty() {
            self.ports.remove(&port);
        }
    }
}

impl Seat {
    /// Waits until the connection is dismissed to make room for another one.
    pub(super) async fn dismissed(&mut self) {
        // The sender is not dropped before the seat.
        let _ = (&mut self.give_way).await;
    }
}

impl Drop for Seat {
    fn drop(&mut self) {
        let mut held = self.share.held();
        if let Some(of_port) = held.ports.get_mut(&self.port) {
            of_port.remove(&self.number);
            if of_port.is_empty() {
                held.ports.remove(&self.port);
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_quota_leaves_descriptors_for_everything_else() {
        for descriptors in [1024, 4096, 65_536, 1_048_576] {
            let Quota { ports, connections } = Quota::of(descriptors);
            assert!(2 * ports + connections + OWN <= descriptors, "{ports}");
            assert!(ports >= 256 && (192..=MOST).contains(&connections));
        }
        let Quota { ports, connections } = Quota::of(64);
        assert_eq!((ports, connections), (LEAST, LEAST));
    }

    fn is_dismissed(seat: &mut Seat) -> bool {
        seat.give_way.try_recv().is_ok()
    }

    #[tokio::test]
    async fn the_oldest_connection_of_the_port_with_most_gives_way() {
        let share = Share::new(5);
        let enter = async |port| share.enter(port, 64).await.unwrap();
        let mut quiet = enter(1).await;
        let mut second = enter(2).await;
        let mut noisy = Vec::new();
        for _ in 0..3 {
            noisy.push(enter(3).await);
        }
        let mut entering = Box::pin(share.enter(2, 64));
        assert!(futures::poll!(entering.as_mut()).is_pending(), "no seat");
        assert!(is_dismissed(&mut noisy[0]));
        assert!(!is_dismissed(&mut noisy[1]));
        assert!(!is_dismissed(&mut quiet) && !is_dismissed(&mut second));
        noisy.remove(0);
        assert!(entering.await.is_some());
    }

    #[tokio::test]
    async fn a_port_has_a_bound_of_its_own_and_an_end_makes_room() {
        let share = Share::new(64);
        let mut first = share.enter(1, 2).await.unwrap();
        let mut second = share.enter(1, 2).await.unwrap();
        let third = share.enter(1, 2).await.unwrap();
        assert!(is_dismissed(&mut first) && !is_dismissed(&mut second));
        drop(third);
        let _fourth = share.enter(1, 2).await.unwrap();
        assert!(!is_dismissed(&mut second));
    }
}
