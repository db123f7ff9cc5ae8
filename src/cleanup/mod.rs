//! Removal of rules: nftlet's own, and what kube-proxy leaves behind when it is replaced.
//!
//! ```text
//!                    All   Own   KubeProxy   Superseded
//!  nftables: nftlet   x     x                              tables of nftlet
//!  nftables           x              x           x         tables of kube-proxy
//!  iptables, saved    x              x           x         chains, and the jumps to them
//!  ipvs               x              x                     interface, virtual services, ipsets
//! ```
//!
//! [`clean`] goes through these one by one. What cannot be removed is noted in the [`Report`], and
//! the rest is removed all the same. Connections go on: the kernel translates them as it began to,
//! whatever becomes of the rules. Those through ipvs are the exception, since ipvs itself leads
//! them on. [`Scope::Superseded`], which a starting nftlet takes, therefore leaves ipvs alone.
//!
//! What is whose is decided by name, in `owned`. Rules of others are neither read nor written:
//! tables are removed by name over netlink, chains of iptables by name with iptables' own programs.

mod error;
mod iptables;
mod ipvs;
mod owned;
mod report;
mod saved;

use std::thread;
use std::time::{Duration, Instant};

use rustix::thread::{MembarrierCommand, membarrier};

use crate::netlink::{self, Nftables};
use crate::nft::{Op, TableId, Transaction};
use crate::policies;
use crate::services;

pub use error::Error;
pub use iptables::Iptables;
pub use report::Report;

/// Every table that nftlet has ever written, in either family.
const OWN_TABLES: [&str; 2] = [services::TABLE, policies::TABLE];
/// How long an nftlet that still runs may take to put its tables back. It answers to the first
/// change at once, and on a busy node takes some tenths of a second for a large table.
const COME_BACK: Duration = Duration::from_secs(1);
const LOOK_EVERY: Duration = Duration::from_millis(50);
/// Longer than a packet takes through the rules, also where the machine stalls.
const PASSAGE: Duration = Duration::from_millis(100);

/// What to remove.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Scope {
    /// Everything that nftlet and kube-proxy ever wrote.
    All,
    /// nftlet's own rules.
    Own,
    /// What kube-proxy wrote.
    KubeProxy,
    /// What kube-proxy wrote and no connection needs, now that other rules are in force.
    Superseded,
}

/// Removes what is asked for, in the current network namespace. Blocks meanwhile.
///
/// # Errors
///
/// When nftables cannot be spoken to at all, usually for want of `CAP_NET_ADMIN`. Everything else
/// is in the report.
pub fn clean(scope: Scope) -> Result<Report, netlink::Error> {
    let mut nftables = Nftables::open()?;
    let mut report = Report::default();
    let own = match scope {
        Scope::All | Scope::Own => nftables.tables(&OWN_TABLES)?,
        Scope::KubeProxy | Scope::Superseded => Vec::new(),
    };
    let removed = Instant::now();
    remove_tables(&mut nftables, &own, &mut report);
    if scope != Scope::Own {
        let tables = nftables.tables(&[owned::KUBE_PROXY_TABLE])?;
        remove_tables(&mut nftables, &tables, &mut report);
        for iptables in Iptables::ALL {
            iptables.clean(&mut nftables, &mut report);
        }
    }
    match scope {
        Scope::All | Scope::KubeProxy => ipvs::clean(&mut report),
        Scope::Superseded => match ipvs::is_there() {
            Ok(true) => report.note(
                "what kube-proxy's ipvs mode left outside of iptables stays, because existing \
                 connections go through it; remove it later with nftlet --cleanup=kube-proxy"
                    .into(),
            ),
            Ok(false) => {}
            Err(error) => report.fail(error),
        },
        Scope::Own => {}
    }
    if !own.is_empty() {
        watch(&mut nftables, removed, &mut report)?;
    }
    Ok(report)
}

/// Removes tables, one after the other.
fn remove_tables(nftables: &mut Nftables, tables: &[TableId], report: &mut Report) {
    for table in tables {
        match remove_table(nftables, table) {
            Ok(()) => report.removed(format!("table {table}"), "nftables"),
            // Somebody else was faster.
            Err(error) if error.errno() == Some(libc::ENOENT) => {}
            Err(error) => report.fail(error),
        }
    }
}

/// Removes a table such that no packet notices.
///
/// A packet walks the rules that were there when it came, but finds no element any more that has
/// gone since: it would be dropped, or refused, on its way. So first the entrances are closed, and
/// the rest goes when the packets that are inside have left.
fn remove_table(nftables: &mut Nftables, table: &TableId) -> Result<(), netlink::Error> {
    let entrances = nftables.base_chains(table)?;
    let entrances = || entrances.iter().map(|chain| chain.name.clone());
    let empty = entrances().map(|chain| Op::FlushChain(table.clone(), chain));
    let close = entrances().map(|chain| Op::DeleteChain(table.clone(), chain));
    nftables.apply(&Transaction {
        ops: empty.chain(close).collect(),
    })?;
    wait_for_packets();
    nftables.apply(&Transaction {
        ops: vec![Op::DeleteTable(table.clone())],
    })?;
    Ok(())
}

/// Waits until every packet that the kernel is working on now has left the rules.
fn wait_for_packets() {
    // It waits for all critical sections of RCU, in which packets walk the rules. Kernels set up
    // for undisturbed cores refuse; there some time must do.
    if membarrier(MembarrierCommand::Global).is_err() {
        thread::sleep(PASSAGE);
    }
}

/// Notices an nftlet that puts back what was just removed.
fn watch(
    nftables: &mut Nftables,
    removed: Instant,
    report: &mut Report,
) -> Result<(), netlink::Error> {
    loop {
        if let Some(table) = nftables.tables(&OWN_TABLES)?.into_iter().next() {
            report.fail(Error::CameBack { table });
            return Ok(());
        }
        if removed.elapsed() > COME_BACK {
            return Ok(());
        }
        thread::sleep(LOOK_EVERY);
    }
}
