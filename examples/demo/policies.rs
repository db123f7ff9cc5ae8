//! The last part of the demo: a network policy that blocks, and one that allows.

use std::fs;
use std::path::Path;
use std::time::Duration;

use crate::netns::{Ask, Daemon, Lab, Machine, Protocol};
use crate::print::{Cell, Style, Table};
use crate::shop::Shop;
use crate::{Outcome, address, go_on, still_running, until, who};

/// A denied request gets no answer; an allowed one is answered in a fraction of this.
const PATIENCE: Duration = Duration::from_millis(300);

/// Whether a request is answered: without policies, with the first, with both.
struct Row<'a> {
    from: &'a Machine,
    to: &'static str,
    what: &'static str,
    allowed: [bool; 3],
}

/// Adds two policies and shows the effect of each.
pub fn show(lab: &Lab, shop: &Shop, nftlet: &mut Daemon, style: &Style) -> Outcome<()> {
    println!(
        "{}\n",
        style.strong("A network policy blocks, and one allows")
    );
    let [_, cart, ..] = lab.pods()[..] else {
        return Err("the laboratory has too few pods".into());
    };
    let node = &lab.node().machine;
    let row = |from, to, what, allowed| Row {
        from,
        to,
        what,
        allowed,
    };
    let rows = [
        row(
            cart,
            "10.244.1.11:8080",
            "cart to web, port http",
            [true, false, true],
        ),
        row(
            cart,
            "[fd00:10:244:1::11]:8080",
            "cart to web, port http",
            [true, false, true],
        ),
        row(
            cart,
            "10.244.1.11:8081",
            "cart to another port",
            [true, false, false],
        ),
        row(
            node,
            "10.244.1.11:8080",
            "a probe of the node",
            [true, true, true],
        ),
    ];
    let steps = [
        (None, ""),
        (Some("deny.yaml"), "policy-ingress-shop/deny-web"),
        (Some("allow.yaml"), "policy-ingress-shop/cart-to-web"),
    ];
    add(shop, "pods.yaml")?;
    let mut seen = Vec::new();
    for (file, chain) in steps {
        if let Some(file) = file {
            add(shop, file)?;
            until("the rules of the policy", || {
                still_running(nftlet)?;
                let rules = lab.node().ns().nft(&["list", "ruleset"]);
                Ok(rules.contains(&format!("chain {chain} ")).then_some(()))
            })?;
        }
        let answers = rows.iter().map(|row| {
            go_on()?;
            let ask = Ask::new(Protocol::Http, address(row.to)).timeout(PATIENCE);
            Ok(row.from.ns.run(|| ask.send()).is_ok())
        });
        seen.push(answers.collect::<Outcome<Vec<bool>>>()?);
    }
    print(&rows, &seen, style)
}

fn print(rows: &[Row<'_>], seen: &[Vec<bool>], style: &Style) -> Outcome<()> {
    let table = Table::new(
        style,
        &[
            ("WHAT", -23),
            ("FROM", -8),
            ("TO", -25),
            ("NO POLICY", -10),
            ("DENY-WEB", -10),
            ("+ CART-TO-WEB", -13),
        ],
    );
    let mut problems = Vec::new();
    for (index, row) in rows.iter().enumerate() {
        let mut cells = vec![
            Cell::plain(row.what),
            Cell::plain(who(row.from)),
            Cell::plain(row.to),
        ];
        for (step, expected) in seen.iter().zip(row.allowed) {
            let answered = step.get(index).copied().unwrap_or_default();
            let text = if answered { "answered" } else { "denied" };
            if answered == expected {
                cells.push(Cell::good(text));
            } else {
                cells.push(Cell::bad(text));
                problems.push(format!("{} to {}: {text}", row.what, row.to));
            }
        }
        table.row(&cells);
    }
    println!();
    crate::all_well(problems)
}

/// Copies a manifest to the directory that nftlet follows.
fn add(shop: &Shop, file: &str) -> Outcome<()> {
    let source = Path::new(env!("CARGO_MANIFEST_DIR")).join("examples/policies");
    fs::copy(source.join(file), shop.folder.path().join(file))?;
    Ok(())
}
