//! What the kernel says of the connections of an answer, over sockets of its own.

use std::net::SocketAddr;
use std::time::Duration;

use thiserror::Error;

use crate::insight::{Answer, ElementKey, KernelView, Pair, TrackedConnection, add_live, not_read};
use crate::netlink::{self, Conntrack, ConntrackError, Nftables, OpenedBy};
use crate::nft::{RulesetPart, Value};
use crate::services::{self, Target};

/// Why the kernel does not answer.
#[derive(Debug, Error)]
enum LiveError {
    #[error(transparent)]
    Netlink(#[from] netlink::Error),
    #[error(transparent)]
    Conntrack(#[from] ConntrackError),
}

/// Adds what the kernel says to an answer, on a thread of its own: the kernel takes its time for a
/// large table of connections.
pub(super) async fn ask(mut answer: Answer, changes_waiting: usize) -> Answer {
    let before = answer.clone();
    let asked = tokio::task::spawn_blocking(move || {
        match Kernel::open() {
            Ok(mut kernel) => add_live(&mut answer, changes_waiting, &mut kernel),
            Err(error) => answer.warnings.push(not_read(&error)),
        }
        answer
    });
    asked.await.unwrap_or(before)
}

struct Kernel {
    nftables: Nftables,
    conntrack: Conntrack,
}

impl Kernel {
    fn open() -> Result<Self, LiveError> {
        Ok(Self {
            nftables: Nftables::open()?,
            conntrack: Conntrack::open()?,
        })
    }
}

impl KernelView for Kernel {
    type Error = LiveError;

    fn has(&mut self, part: &RulesetPart) -> Result<bool, LiveError> {
        Ok(self.nftables.has(part)?)
    }

    fn affinity(&mut self, at: &ElementKey) -> Result<Option<(Target, Duration)>, LiveError> {
        let (table, map, key) = at;
        let Some(found) = self.nftables.look_up(table, map, key)? else {
            return Ok(None);
        };
        let Value::Data(data) = &found.element.value else {
            return Ok(None);
        };
        Ok(services::target(data).zip(found.expires))
    }

    fn packets(&mut self, at: &ElementKey) -> Result<Option<u64>, LiveError> {
        let (table, set, key) = at;
        let found = self.nftables.look_up(table, set, key)?;
        Ok(found.and_then(|found| found.packets))
    }

    fn connections(
        &mut self,
        pair: &Pair,
        each: &mut dyn FnMut(u32, TrackedConnection),
    ) -> Result<(), LiveError> {
        let by = OpenedBy {
            source: pair.client,
            destination: pair.destination,
            protocol: pair.protocol,
            port: pair.port,
        };
        self.conntrack.opened(&by, |opened| {
            let end = |address, port: Option<u16>| match port {
                Some(port) => SocketAddr::new(address, port).to_string(),
                None => address.to_string(),
            };
            let connection = TrackedConnection {
                state: opened.state,
                client: end(opened.source, opened.source_port),
                endpoint: end(opened.replier, opened.replier_port),
            };
            each(opened.id, connection);
        })?;
        Ok(())
    }
}
