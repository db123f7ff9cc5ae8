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
use nftlet_lab::netns;

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
/// The most that the plain set of the largest number may take.
const BUDGET: Duration = Duration::from_millis(300);

/// The selectors of a set's key, and the first and the last keys of its ranges.
type Ranges = (Vec<Selector>, Vec<[Key; 2]>);

/// Ranges of four addresses.
fn sources(count: u32) -> Ranges {
    let ranges = (0..count).map(|number| {
        let first = 0x0a00_0000 + number * 8;
        [first, first + 3].map(|address| Key::address(std::net::IpAddr::V4(address.into())))
    });
    (vec![Selector::SourceAddress], ranges.collect())
}

/// The same behind a frontend.
fn sources_of_frontends(count: u32) -> Ranges {
    let mut selectors = vec![
        Selector::DestinationAddress,
        Selector::L4Protocol,
        Selector::DestinationPort,
    ];
    let key = |client: Key| {
        let address = Key::build().address([203, 0, 113, 10].into());
        let frontend = address.protocol(6).port(80);
        frontend.bytes(client.as_bytes()).finish()
    };
    let (client, ranges) = sources(count);
    selectors.extend(client);
    let ranges = ranges.into_iter().map(|range| range.map(key));
    (selectors, ranges.collect())
}

/// Every second port.
fn ports(count: u32) -> Ranges {
    let ranges = (0..count).map(|number| {
        let port = u16::try_from(number * 2).expect("a port");
        [(); 2].map(|()| Key::build().port(port).finish())
    });
    (vec![Selector::DestinationPort], ranges.collect())
}

/// The same behind a protocol.
fn ports_of_protocols(count: u32) -> Ranges {
    let (port, ranges) = ports(count);
    let key = |port: Key| Key::build().protocol(6).bytes(port.as_bytes()).finish();
    let ranges = ranges.into_iter().map(|range| range.map(key));
    let selectors = [vec![Selector::L4Protocol], port].concat();
    (selectors, ranges.collect())
}

/// What is compared: both shapes with a number of ranges, and whether it has a budget.
struct Case {
    what: &'static str,
    count: u32,
    plain: fn(u32) -> Ranges,
    concatenated: fn(u32) -> Ranges,
    budgeted: bool,
}

const CASES: [Case; 3] = [
    Case {
        what: "source ranges",
        count: 10_000,
        plain: sources,
        concatenated: sources_of_frontends,
        budgeted: false,
    },
    Case {
        what: "source ranges",
        count: 40_000,
        plain: sources,
        concatenated: sources_of_frontends,
        budgeted: true,
    },
    Case {
        what: "port ranges",
        count: 30_000,
        plain: ports,
        concatenated: ports_of_protocols,
        budgeted: true,
    },
];

/// Writes a set into a fresh namespace as one transaction.
fn fill((key, ranges): Ranges) -> Duration {
    let node = Namespace::new("node");
    let table = TableId::new(Family::Ip, "ranges");
    let declaration = Arc::new(Declaration {
        interval: true,
        ..Declaration::new(SetKind::Set, key)
    });
    let elements = ranges.into_iter().map(|[first, last]| Element {
        key_end: Some(Box::new(last)),
        ..Element::new(first)
    });
    let elements = elements.collect();
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
        "{:>20}  {:>10}  {:>12}  {:>6}",
        "ranges", "plain", "concatenated", "ratio"
    );
    for case in CASES {
        let what = format!("{} {}", case.count, case.what);
        let rounds = (0..ROUNDS).map(|_| {
            let plain = fill((case.plain)(case.count));
            (plain, fill((case.concatenated)(case.count)))
        });
        let (plain, concatenated): (Vec<_>, Vec<_>) = rounds.unzip();
        let (plain, concatenated) = (median(plain), median(concatenated));
        println!(
            "{what:>20}  {:>7.1} ms  {:>9.1} ms  {:>6.0}",
            plain.as_secs_f64() * 1e3,
            concatenated.as_secs_f64() * 1e3,
            concatenated.as_secs_f64() / plain.as_secs_f64(),
        );
        if case.budgeted {
            outcomes.push(Outcome {
                what,
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
