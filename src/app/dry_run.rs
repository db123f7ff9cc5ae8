//! `--dry-run`: reads all objects once and prints their rules.

use std::collections::BTreeSet;
use std::io::{self, Write};
use std::time::Duration;

use tokio::sync::{mpsc, watch};
use tokio::time::{Instant, timeout_at};

use super::objects::{connect, fallback_node, load, manifests, policy_engine, summary};
use super::{Error, QUEUE, print, single_threaded};
use crate::engine::{BUDGET, Engine as _};
use crate::host::routes;
use crate::insight::OtherNodes;
use crate::model::{Event, Kind, Reason, ServiceKind};
use crate::nft::{Ruleset, text};
use crate::policies::{Engine, LOG_GROUP};
use crate::services;
use crate::services::{Marks, Store};
use crate::settings::Settings;
use crate::source::cluster::{KEPT, Timing};
use crate::source::{Manifests, SourceStats};
use crate::sync::{Log, Reporter};

pub(super) fn run(
    settings: &Settings,
    node_name: &str,
    service_settings: &services::ServiceSettings,
) -> Result<(), Error> {
    let manifests = manifests(settings, node_name);
    let collect = collect(settings, node_name, service_settings, manifests, None);
    let runtime = single_threaded()?;
    let collected = runtime.block_on(collect);
    // An unanswered DNS query would delay the exit.
    runtime.shutdown_background();
    let (store, policies) = collected?;
    let (mut wanted, notices) = services::wanted(&store, service_settings);
    for notice in &notices {
        Log.notice(notice);
    }
    wanted.tables.extend(policies.ruleset().tables);
    let summary = summary(&store, Some(&policies), settings);
    print(|out| print_ruleset(&store, &summary, &wanted, out))
}

/// How long the API server may send no object before the command gives up.
const SILENCE: Duration = Duration::from_secs(30);

/// Reads all objects once, from manifests or else from a cluster. `others` gets those of services on
/// other nodes.
pub(super) async fn collect(
    settings: &Settings,
    node_name: &str,
    service_settings: &services::ServiceSettings,
    manifests: Option<Manifests>,
    others: Option<&mut OtherNodes>,
) -> Result<(Store, Engine), Error> {
    let (node, services) = (node_name, service_settings);
    collect_within(SILENCE, settings, node, services, manifests, others).await
}

async fn collect_within(
    silence: Duration,
    settings: &Settings,
    node_name: &str,
    service_settings: &services::ServiceSettings,
    manifests: Option<Manifests>,
    mut others: Option<&mut OtherNodes>,
) -> Result<(Store, Engine), Error> {
    let mut store = service_settings.store(Store::with_fallback_node(fallback_node(node_name)));
    let log_group = settings.logs_packets().then_some(LOG_GROUP);
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
        // A Node that does not exist is not waited for.
        let timing = Timing {
            node_wait: Duration::ZERO,
            ..Timing::default()
        };
        let mut cluster = connect(settings, node_name).await?.with_timing(timing);
        if others.is_some() {
            cluster = cluster.with_pods(true).with_all_nodes(true);
        }
        let (server, stats) = (cluster.server().to_owned(), cluster.stats());
        let failed = |why| Error::NotRead {
            server: server.clone(),
            why,
        };
        let (sender, mut events) = mpsc::channel(QUEUE);
        let (stop, stopped) = watch::channel(false);
        let source = tokio::spawn(cluster.run(sender, stopped));
        let mut deadline = Instant::now() + silence;
        while !store.is_complete() || !policies.is_ready() {
            let Ok(received) = timeout_at(deadline, events.recv()).await else {
                let missing = [store.missing(), policies.missing()].concat();
                return Err(failed(unread(&missing, silence, &stats)));
            };
            let Some(delivery) = received else {
                return Err(Error::SourceEnded);
            };
            match &delivery.event {
                Event::ListComplete(_) => deadline = Instant::now() + silence,
                // Objects of a kind that is listed say nothing about the others.
                Event::Apply(object) => {
                    let kind = object.kind();
                    if store.missing().contains(&kind) || policies.missing().contains(&kind) {
                        deadline = Instant::now() + silence;
                    }
                }
                Event::Notice(notice) if notice.reason == Reason::ApiServer => {
                    if let Some(refusal) = stats.refusal() {
                        return Err(failed(once(refusal)));
                    }
                    // If it lasts, it is the reason to give up.
                    continue;
                }
                // A question about the whole cluster is about no node.
                Event::Notice(notice)
                    if notice.reason == Reason::NodeMissing && node_name.is_empty() =>
                {
                    continue;
                }
                _ => {}
            }
            policies.apply(&delivery.event);
            if let Some(others) = &mut others {
                others.add(&delivery.event);
            }
            store.apply(delivery.event, &mut changes);
            report(&mut changes);
            if policies.pod_network_never_known() {
                break;
            }
        }
        stop.send_replace(true);
        drop(events);
        let _ = source.await;
    }
    report(&mut changes);
    if policies.pod_network_never_known() {
        return Err(Error::NoPodNetwork(node_name.to_owned()));
    }
    policies.update(BUDGET);
    for notice in policies.take_notices() {
        Log.notice(&notice);
    }
    Ok((store, policies))
}

/// Returns why lists are missing.
fn unread(missing: &[Kind], silence: Duration, stats: &SourceStats) -> String {
    let fault = missing.iter().find_map(|kind| stats.fault_of(*kind));
    let kinds: BTreeSet<&str> = missing.iter().map(|kind| kind.as_str()).collect();
    let kinds: Vec<&str> = kinds.into_iter().collect();
    format!(
        "{}; no object came for {} s, and the lists of {} are not complete",
        fault.as_deref().map_or_else(
            || "the API server does not answer; check its address and the network".to_owned(),
            once
        ),
        silence.as_secs(),
        kinds.join(", ")
    )
}

/// Returns the message about a fault without what the agent does about it.
fn once(message: &str) -> String {
    let message = message.strip_suffix(KEPT).unwrap_or(message);
    message.trim_end_matches("; ").to_owned()
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

#[cfg(test)]
mod tests {
    use std::net::TcpListener;
    use std::path::Path;

    use nftlet_lab::fake_api::{FakeApi, SERVICES};

    use super::*;
    use crate::app::objects::service_settings;
    use crate::settings::CommandLine;

    /// Reads the objects of a cluster. Returns the message of the error, if there is one.
    async fn read(silence: Duration, kubeconfig: &Path) -> Option<String> {
        let flags = [
            "nftlet".into(),
            "--kubeconfig".into(),
            kubeconfig.to_owned(),
        ];
        let settings = CommandLine::parse(flags).expect("flags").settings;
        let services = service_settings(&settings).expect("settings");
        let read = collect_within(silence, &settings, "node-1", &services, None, None).await;
        read.err().map(|error| error.to_string())
    }

    /// A kubeconfig with the address of a listener.
    fn kubeconfig(directory: &Path, listener: &TcpListener) -> std::path::PathBuf {
        let path = directory.join("kubeconfig");
        let address = listener.local_addr().expect("an address");
        let text = format!(
            "apiVersion: v1\nkind: Config\ncurrent-context: c\n\
             clusters: [{{name: c, cluster: {{server: 'http://{address}'}}}}]\n\
             users: [{{name: u, user: {{token: t}}}}]\n\
             contexts: [{{name: c, context: {{cluster: c, user: u}}}}]\n"
        );
        std::fs::write(&path, text).expect("written");
        path
    }

    #[tokio::test]
    async fn a_server_that_is_not_there_or_silent_is_given_up() {
        let directory = tempfile::tempdir().expect("a directory");
        // It takes connections and does not answer.
        let listener = TcpListener::bind("127.0.0.1:0").expect("a port");
        let path = kubeconfig(directory.path(), &listener);
        let error = read(Duration::from_millis(50), &path)
            .await
            .expect("an error");
        let address = listener.local_addr().expect("an address");
        let expected = format!(
            "cannot read the objects of http://{address}/: the API server does not answer; check \
             its address and the network; no object came for 0 s, and the lists of \
             ClusterNetworkPolicy, EndpointSlice, Namespace, NetworkPolicy, Node, Pod, Service, \
             ServiceCIDR are not complete"
        );
        assert_eq!(error, expected);
        drop(listener);
        // On a busy machine the first attempts may take longer.
        let mut silence = Duration::from_millis(50);
        let error = loop {
            let error = read(silence, &path).await.expect("an error");
            if error.contains("cannot be reached") || silence > Duration::from_secs(10) {
                break error;
            }
            silence *= 2;
        };
        assert!(error.contains("refused"), "{error}");
        assert!(!error.contains("keeps retrying"), "{error}");
    }

    #[tokio::test]
    async fn what_may_not_be_read_is_named_at_once_and_a_missing_node_is_not_waited_for() {
        let directory = tempfile::tempdir().expect("a directory");
        let api = FakeApi::start().await;
        let path = api.write_kubeconfig(directory.path());
        let patience = Duration::from_secs(600);
        assert_eq!(read(patience, &path).await, None);
        api.forbid(SERVICES, true);
        let error = read(patience, &path).await.expect("an error");
        assert!(error.contains(&api.url()), "{error}");
        assert!(
            error.contains("cannot list resource \"services\""),
            "{error}"
        );
        let rule = "{apiGroups: [\"\"], resources: [\"services\"], verbs: [\"list\", \"watch\"]}";
        assert!(error.ends_with(rule), "{error}");
    }
}
