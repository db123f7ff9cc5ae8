//! The uses that scenes make of nftlet's library, beside [`crate::facts`]. All others go through
//! its program.

use std::collections::{BTreeMap, BTreeSet};
use std::net::Ipv4Addr;
use std::sync::Arc;
use std::sync::mpsc::{Receiver, RecvTimeoutError, channel};
use std::thread;
use std::time::{Duration, Instant};

use nftlet::netlink::{Monitor, Nftables};
use nftlet::nft::{
    Declaration, Element, Key, Name, Op, Selector, Set, SetKind, Table, TableId, Value, diff,
};
use nftlet::policies;
use nftlet::services::{ServiceSet, TABLE};

use crate::facts::ruleset;
use nftlet_lab::cluster::Put;
use nftlet_lab::netns::Namespace;

pub use nftlet::nft::{Ruleset, TableFamily, Transaction};

/// Returns the transaction that makes one ruleset another one.
pub fn transaction(before: &Ruleset, after: &Ruleset) -> Transaction {
    diff(before, after.clone())
}

/// Returns a ruleset with the same rules, whose largest sets are declared otherwise.
pub fn declared_otherwise(ruleset: &Ruleset) -> Ruleset {
    let mut ruleset = ruleset.clone();
    for table in ruleset.tables.values_mut() {
        let set = table.sets.get_mut(&ServiceSet::Frontends.name());
        let set = set.expect("the table has frontends");
        let declaration = Declaration::clone(&set.declaration);
        set.declaration = Arc::new(declaration.comment("of another version"));
    }
    ruleset
}

/// A connection to the kernel that writes rules.
pub struct Writer(Nftables);

impl Writer {
    /// Opens a connection in the namespace of the calling thread.
    pub fn open() -> Self {
        Self(Nftables::open().unwrap_or_else(|error| panic!("{error}")))
    }

    /// Writes a transaction as one.
    pub fn write(&mut self, transaction: &Transaction) {
        let written = self.0.apply(transaction);
        written.unwrap_or_else(|error| panic!("{error}"));
    }

    /// Writes a transaction in the steps that nftlet would take.
    pub fn write_in_steps(&mut self, transaction: Transaction) {
        transaction.into_steps().for_each(|step| self.write(&step));
    }
}

/// Returns the transaction that adds or deletes port 80 in a set of ports of another's table.
pub fn change_of_another(table: &str, set: &str, add: bool) -> Transaction {
    let id = TableId::new(TableFamily::Ip, table);
    let declaration = Arc::new(Declaration::new(SetKind::Set, [Selector::DestinationPort]));
    let elements = vec![Element::new(Key::build().port(80).finish())];
    let make = if add {
        Op::AddElements
    } else {
        Op::DeleteElements
    };
    Transaction {
        ops: vec![make(id, set.into(), declaration, elements)],
    }
}

/// Ranges of keys.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Ranges {
    /// Of four addresses each, with four between them.
    Sources,
    /// Every second port.
    Ports,
}

impl Ranges {
    /// Returns the transaction that fills a new set with so many ranges. Where `concatenated`,
    /// their keys begin with a part that is equal in all: a frontend, or a protocol.
    pub fn fill(self, count: u32, concatenated: bool) -> Transaction {
        let (before, selector) = match self {
            Self::Sources => (
                vec![
                    Selector::DestinationAddress,
                    Selector::L4Protocol,
                    Selector::DestinationPort,
                ],
                Selector::SourceAddress,
            ),
            Self::Ports => (vec![Selector::L4Protocol], Selector::DestinationPort),
        };
        let key = |number: u32| {
            let (prefix, key) = match self {
                Self::Sources => {
                    let address = Key::build().address([203, 0, 113, 10].into());
                    let key = Key::address(Ipv4Addr::from(number).into());
                    (address.protocol(6).port(80), key)
                }
                Self::Ports => {
                    let key = Key::build().port(number as u16).finish();
                    (Key::build().protocol(6), key)
                }
            };
            match concatenated {
                true => prefix.bytes(key.as_bytes()).finish(),
                false => key,
            }
        };
        let elements = (0..count).map(|number| {
            let [first, last] = match self {
                Self::Sources => [0x0a00_0000 + number * 8, 0x0a00_0003 + number * 8],
                Self::Ports => [number * 2; 2],
            };
            Element {
                key_end: Some(Box::new(key(last))),
                ..Element::new(key(first))
            }
        });
        let mut selectors = if concatenated { before } else { Vec::new() };
        selectors.push(selector);
        let declaration = Arc::new(Declaration {
            interval: true,
            ..Declaration::new(SetKind::Set, selectors)
        });
        let (table, elements) = (TableId::new(TableFamily::Ip, "ranges"), elements.collect());
        Transaction {
            ops: vec![
                Op::AddTable(table.clone()),
                Op::AddSet(table.clone(), "ranges".into(), Arc::clone(&declaration)),
                Op::AddElements(table, "ranges".into(), declaration, elements),
            ],
        }
    }
}

/// The times at which the kernel of a namespace committed transactions of nftlet's tables.
pub struct News(Receiver<Instant>);

impl News {
    /// Begins to listen, until the program ends.
    pub fn listen(namespace: &Namespace) -> Self {
        Self::listen_to(namespace, &[TABLE, policies::TABLE])
    }

    /// As [`News::listen`], about other tables.
    pub fn listen_to(namespace: &Namespace, tables: &'static [&'static str]) -> Self {
        let namespace = namespace.clone();
        let (sender, news) = channel();
        let (ready, listening) = channel();
        thread::spawn(move || {
            namespace.enter();
            // The socket whose own changes are left out; it makes none.
            let own = Nftables::open().unwrap_or_else(|error| panic!("{error}"));
            let mut monitor = Monitor::new(tables, &own);
            monitor.listen().unwrap_or_else(|error| panic!("{error}"));
            let _ = ready.send(());
            // Lost notifications mean a change just now, too.
            while monitor.wait().is_ok() && sender.send(Instant::now()).is_ok() {}
        });
        listening.recv().expect("the thread listens");
        Self(news)
    }

    /// Forgets the news so far.
    pub fn forget(&self) {
        while self.0.try_recv().is_ok() {}
    }

    /// Waits for news, and returns their time, if there are any.
    pub fn first(&self, within: Duration) -> Option<Instant> {
        self.0.recv_timeout(within).ok()
    }

    /// Returns the time of the last news before nothing was heard for so long, if there were any.
    pub fn last(&self, quiet: Duration) -> Option<Instant> {
        let mut last = None;
        loop {
            match self.0.recv_timeout(quiet) {
                Ok(at) => last = Some(at),
                Err(RecvTimeoutError::Timeout) => return last,
                Err(RecvTimeoutError::Disconnected) => panic!("the listening thread ended"),
            }
        }
    }
}

/// Returns the operations that would make the kernel hold what objects ask for: none, if all is
/// well.
///
/// Two things may differ from rules that are compiled from scratch, since those in the kernel have
/// a history: the index of an endpoint, and shared chains that are no longer used, which stay for
/// a minute. So the indexes of each frontend are numbered anew in the order of the endpoints,
/// unless there is a gap, and chains that only the kernel has are ignored unless they are used.
pub fn difference(node: &Namespace, objects: impl IntoIterator<Item = Put>) -> Transaction {
    let mut wanted = ruleset(objects);
    let read = node.run(|| Nftables::open()?.read(&[TABLE], &wanted));
    let mut held = read.unwrap_or_else(|error| panic!("the rules cannot be read: {error}"));
    for (id, table) in &mut held.tables {
        if let Some(wanted) = wanted.tables.get(id) {
            remove_unused_chains(table, wanted);
        }
    }
    for ruleset in [&mut held, &mut wanted] {
        let tables = ruleset.tables.values_mut();
        tables
            .flat_map(|table| table.sets.values_mut())
            .for_each(number_anew);
    }
    diff(&held, wanted)
}

fn remove_unused_chains(held: &mut Table, wanted: &Table) {
    let elements = held.sets.values().flat_map(|set| &set.elements);
    let used: BTreeSet<Name> = elements
        .filter_map(|element| match &element.value {
            Value::Verdict(verdict) => verdict.target().cloned(),
            Value::None | Value::Data(_) => None,
        })
        .collect();
    held.chains
        .retain(|name, _| wanted.chains.contains_key(name) || used.contains(name));
}

fn number_anew(set: &mut Set) {
    let key = &set.declaration.key;
    if key.len() < 2 || key.last() != Some(&Selector::Priority) {
        return;
    }
    let mut frontends: BTreeMap<&[u8], Vec<(u32, &Value)>> = BTreeMap::new();
    for element in &set.elements {
        let (frontend, index) = element.key.as_bytes().split_last_chunk().expect("an index");
        let endpoint = (u32::from_ne_bytes(*index), &element.value);
        frontends.entry(frontend).or_default().push(endpoint);
    }
    let mut elements = Vec::with_capacity(set.elements.len());
    for (frontend, mut endpoints) in frontends {
        endpoints.sort_unstable();
        if !(1..)
            .zip(&endpoints)
            .all(|(index, (found, _))| index == *found)
        {
            return;
        }
        let mut values: Vec<&Value> = endpoints.into_iter().map(|(_, value)| value).collect();
        values.sort_unstable();
        for (index, value) in (1_u32..).zip(values) {
            let key = Key::from_bytes(&[frontend, &index.to_ne_bytes()].concat());
            elements.push(Element {
                value: value.clone(),
                ..Element::new(key)
            });
        }
    }
    elements.sort_unstable();
    set.elements = elements;
}
