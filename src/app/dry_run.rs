//! Reads all objects once and prints their rules.

use std::io::{self, Write};

use tokio::sync::{mpsc, watch};

use super::{
    Error, QUEUE, connect, fallback_node, load, manifests, policies, print, single_threaded,
    summary,
};
use crate::engine::{BUDGET, Engine as _};
use crate::model::ServiceKind;
use crate::nft::{Ruleset, text};
use crate::policies::{Engine, LOG_GROUP};
use crate::services;
use crate::services::{Marks, Store};
use crate::settings::Settings;
use crate::sync::{Log, Reporter};

/// Prints the rules for the objects as they are now.
pub(super) fn run(
    args: &Settings,
    node_name: &str,
    settings: &services::ServiceSettings,
) -> Result<(), Error> {
    let (store, mut policies) = single_threaded()?.block_on(collect(args, node_name, settings))?;
    let (mut wanted, notices) = services::wanted(&store, settings);
    for notice in &notices {
        Log.notice(notice);
    }
    policies.update(BUDGET);
    wanted.tables.extend(policies.ruleset().tables);
    print(|out| print_ruleset(&store, &policies, &wanted, out))
}

/// Reads all objects once.
async fn collect(
    args: &Settings,
    node_name: &str,
    settings: &services::ServiceSettings,
) -> Result<(Store, Engine), Error> {
    let mut store = settings.store(Store::with_fallback_node(fallback_node(node_name)));
    let log_group = args.log_denied.then_some(LOG_GROUP);
    let mut policies = policies(args, node_name, log_group);
    let mut marks = Marks::default();
    if let Some(mut manifests) = manifests(args, node_name) {
        for event in load(&mut manifests, node_name)? {
            policies.apply(&event);
            store.apply(event, &mut marks);
        }
    } else {
        let cluster = connect(args, node_name).await?;
        let (sender, mut events) = mpsc::channel(QUEUE);
        let (stop, stopped) = watch::channel(false);
        let source = tokio::spawn(cluster.run(sender, stopped));
        while !store.is_complete() || !policies.is_ready() {
            let Some(delivery) = events.recv().await else {
                return Err(Error::SourceEnded);
            };
            policies.apply(&delivery.event);
            store.apply(delivery.event, &mut marks);
            report(&mut marks);
        }
        stop.send_replace(true);
        drop(events);
        let _ = source.await;
    }
    report(&mut marks);
    Ok((store, policies))
}

fn report(marks: &mut Marks) {
    for notice in marks.notices.drain(..) {
        Log.notice(&notice);
    }
}

fn print_ruleset(
    store: &Store,
    policies: &Engine,
    ruleset: &Ruleset,
    mut out: &mut dyn Write,
) -> io::Result<()> {
    writeln!(
        out,
        "# nftlet {}: {}",
        env!("CARGO_PKG_VERSION"),
        summary(store, Some(policies))
    )?;
    let mut without: Vec<_> = store
        .services()
        .filter_map(|service| {
            let why = match service.kind {
                ServiceKind::ExternalName => "ExternalName, answered by DNS",
                ServiceKind::Headless => "headless, answered by DNS",
                _ => return None,
            };
            Some(format!("# {}: {why}, no rules", service.name))
        })
        .collect();
    without.sort();
    for line in without {
        writeln!(out, "{line}")?;
    }
    writeln!(out)?;
    text::render(ruleset, &mut out)
}
