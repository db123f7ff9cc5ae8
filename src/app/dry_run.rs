//! `--dry-run`: reads all objects once and prints their rules.

use std::io::{self, Write};

use tokio::sync::{mpsc, watch};

use super::objects::{connect, fallback_node, load, manifests, policy_engine, summary};
use super::{Error, QUEUE, print, single_threaded};
use crate::engine::{BUDGET, Engine as _};
use crate::host::routes;
use crate::insight::OtherNodes;
use crate::model::{Event, ServiceKind};
use crate::nft::{Ruleset, text};
use crate::policies::{Engine, LOG_GROUP};
use crate::services;
use crate::services::{Marks, Store};
use crate::settings::Settings;
use crate::source::Manifests;
use crate::sync::{Log, Reporter};

pub(super) fn run(
    settings: &Settings,
    node_name: &str,
    service_settings: &services::ServiceSettings,
) -> Result<(), Error> {
    let manifests = manifests(settings, node_name);
    let collect = collect(settings, node_name, service_settings, manifests, None);
    let (store, policies) = single_threaded()?.block_on(collect)?;
    let (mut wanted, notices) = services::wanted(&store, service_settings);
    for notice in &notices {
        Log.notice(notice);
    }
    wanted.tables.extend(policies.ruleset().tables);
    let summary = summary(&store, Some(&policies), settings);
    print(|out| print_ruleset(&store, &summary, &wanted, out))
}

/// Reads all objects once, from manifests or else from a cluster. `others` gets those of services on
/// other nodes.
pub(super) async fn collect(
    settings: &Settings,
    node_name: &str,
    service_settings: &services::ServiceSettings,
    manifests: Option<Manifests>,
    mut others: Option<&mut OtherNodes>,
) -> Result<(Store, Engine), Error> {
    let mut store = service_settings.store(Store::with_fallback_node(fallback_node(node_name)));
    let log_group = settings.log_denied.then_some(LOG_GROUP);
    let mut policies = policy_engine(settings, node_name, log_group)?;
    if policies.is_on() {
        policies.apply(&Event::Routes(routes::direct().map_err(Error::Routes)?));
    }
    let mut changes = Marks::default();
    if let Some(mut manifests) = manifests {
        for event in load(&mut manifests, settings, node_name)? {
            policies.apply(&event);
            if let Some(others) = &mut others {
                others.add(&event);
            }
            store.apply(event, &mut changes);
        }
    } else {
        let mut cluster = connect(settings, node_name).await?;
        if others.is_some() {
            cluster = cluster.with_pods(true).with_all_nodes(true);
        }
        let (sender, mut events) = mpsc::channel(QUEUE);
        let (stop, stopped) = watch::channel(false);
        let source = tokio::spawn(cluster.run(sender, stopped));
        while !store.is_complete() || !policies.is_ready() {
            let Some(delivery) = events.recv().await else {
                return Err(Error::SourceEnded);
            };
            policies.apply(&delivery.event);
            if let Some(others) = &mut others {
                others.add(&delivery.event);
            }
            store.apply(delivery.event, &mut changes);
            report(&mut changes);
            if policies.has_no_pod_network() {
                break;
            }
        }
        stop.send_replace(true);
        drop(events);
        let _ = source.await;
    }
    report(&mut changes);
    if policies.has_no_pod_network() {
        return Err(Error::NoPodNetwork(node_name.to_owned()));
    }
    policies.update(BUDGET);
    for notice in policies.take_notices() {
        Log.notice(&notice);
    }
    Ok((store, policies))
}

fn report(changes: &mut Marks) {
    for notice in changes.notices.drain(..) {
        Log.notice(&notice);
    }
}

fn print_ruleset(
    store: &Store,
    summary: &str,
    ruleset: &Ruleset,
    mut out: &mut dyn Write,
) -> io::Result<()> {
    writeln!(out, "# nftlet {}: {summary}", env!("CARGO_PKG_VERSION"))?;
    let mut without_rules: Vec<_> = store
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
    without_rules.sort();
    for line in without_rules {
        writeln!(out, "{line}")?;
    }
    writeln!(out)?;
    text::render(ruleset, &mut out)
}
