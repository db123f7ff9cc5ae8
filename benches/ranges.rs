//! How long the kernel takes to fill a set of ranges: plain intervals, as nftlet writes them for
//! source ranges and ports, and a concatenation with an interval, which would need neither a set
//! nor a chain for each list.
//!
//! ```text
//! cargo bench --bench ranges
//! ```
//!
//! Both shapes are written in turns in fresh network namespaces; the median counts. A missed
//! budget ends the benchmark with an error.

#[path = "budgets/mod.rs"]
mod budgets;
#[path = "../tests/common/netns/mod.rs"]
mod netns;

use std::process::ExitCode;
use std::sync::Arc;
use std::time::{Duration, Instant};

use nftlet::netlink::Nftables;
use nftlet::ruleset::{
    Declaration, Element, Family, Key, Op, Selector, SetKind, TableId, Transaction,
};

use budgets::Outcome;
use netns::{Namespace, require_net_admin};

/// How often each shape is written.
const ROUNDS: usize = 3;
/// The numbers of ranges.
const RANGES: [u32; 2] = [10_000, 40_000];
/// The most that the plain set of the larger number may take.
const BUDGET: Duration = Duration::from_millis(300);

/// A range of four addresses, apart from those of other numbers.
fn range(number: u32) -> [Key; 2] {
    let first = 0x0a00_0000 + number * 8;
    [first, first + 3].map(|address| Key::address(std::net::IpAddr::V4(address.into())))
}

/// The elements of a plain set.
fn plain(count: u32) -> (Declaration, Vec<Element>) {
    let declaration = Declaration::new(SetKind::Set, [Selector::SourceAddress]);
    let elements = (0..count).map(|number| {
        let [first, last] = range(number);
        Element {
            key_end: Some(Box::new(last)),
            ..Element::new(first)
        }
    });
    (declaration, elements.collect())
}

/// The elements of a set of (frontend, client range).
fn concatenated(count: u32) -> (Declaration, Vec<Element>) {
    let declaration = Declaration::new(
        SetKind::Set,
        [
            Selector::DestinationAddress,
            Selector::L4Protocol,
            Selector::DestinationPort,
            Selector::SourceAddress,
        ],
    );
    let key = |client: &Key| {
        let frontend = Key::build().address([203, 0, 113, 10].into());
        frontend
            .protocol(6)
            .port(80)
            .bytes(client.as_bytes())
            .finish()
    };
    let elements = (0..count).map(|number| {
        let [first, last] = range(number);
        Element {
            key_end: Some(Box::new(key(&last))),
            ..Element::new(key(&first))
        }
    });
    (declaration, elements.collect())
}

/// Writes a set into a fresh namespace as one transaction.
fn fill((declaration, elements): (Declaration, Vec<Element>)) -> Duration {
    let node = Namespace::new("node");
    let table = TableId::new(Family::Ip, "ranges");
    let declaration = Arc::new(Declaration {
        interval: true,
        ..declaration
    });
    let (set, id) = ("ranges".into(), table.clone());
    let transaction = Transaction {
        ops: vec![
            Op::AddTable(table.clone()),
            Op::AddSet(table, "ranges".into(), Arc::clone(&declaration)),
            Op::AddElements(id, set, declaration, elements),
        ],
    };
    node.run(|| {
        let mut kernel = Nftables::open().unwrap_or_else(|error| panic!("{error}"));
        let started = Instant::now();
        let written = kernel.apply(&transaction);
        written.unwrap_or_else(|error| panic!("{error}"));
        started.elapsed()
    })
}

fn median(mut times: Vec<Duration>) -> Duration {
    times.sort();
    times.get(times.len() / 2).copied().unwrap_or_default()
}

fn main() -> ExitCode {
    if !require_net_admin() {
        return ExitCode::FAILURE;
    }
    let mut outcomes = Vec::new();
    println!(
        "{:>8}  {:>10}  {:>12}  {:>6}",
        "ranges", "plain", "concatenated", "ratio"
    );
    for count in RANGES {
        let rounds = (0..ROUNDS).map(|_| (fill(plain(count)), fill(concatenated(count))));
        let (plain, concatenated): (Vec<_>, Vec<_>) = rounds.unzip();
        let (plain, concatenated) = (median(plain), median(concatenated));
        println!(
            "{count:>8}  {:>7.1} ms  {:>9.1} ms  {:>6.0}",
            plain.as_secs_f64() * 1e3,
            concatenated.as_secs_f64() * 1e3,
            concatenated.as_secs_f64() / plain.as_secs_f64(),
        );
        if count == RANGES[1] {
            outcomes.push(Outcome {
                what: format!("{count} source ranges"),
                measured: format!("{plain:.0?}"),
                budget: format!("at most {BUDGET:?}"),
                met: plain <= BUDGET,
            });
        }
    }
    match budgets::conclude("ranges", &outcomes) {
        Ok(true) => ExitCode::SUCCESS,
        Ok(false) => ExitCode::FAILURE,
        Err(error) => {
            eprintln!("{error}");
            ExitCode::FAILURE
        }
    }
}
