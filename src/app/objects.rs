//! Sources and engines as the settings describe them.

use super::Error;
use crate::engine::Engine as _;
use crate::host::addresses;
use crate::model::{Event, Kind, Node, NodePortAddresses, Notice, Object, Reason, Subject};
use crate::policies::{self, Engine, PodNetwork};
use crate::services::{self, DetectLocal, MasqueradeBit, Store};
use crate::settings::{self, Settings};
use crate::source::cluster::Error as ClusterError;
use crate::source::{Cluster, Manifests};

/// Returns the source of manifests, unless the objects come from a cluster.
pub(super) fn manifests(settings: &Settings, node_name: &str) -> Option<Manifests> {
    (!settings.manifests.is_empty()).then(|| {
        Manifests::new(settings.manifests.clone(), node_name.to_owned())
            .with_services(settings.services.is_on())
            .with_network_policies(settings.network_policy.is_on())
            .with_allow_empty(settings.allow_empty || settings.dry_run)
    })
}

/// Reads the manifests, and adds a notice if this node is not among them and services need it.
pub(super) fn load(
    manifests: &mut Manifests,
    settings: &Settings,
    node_name: &str,
) -> Result<Vec<Event>, Error> {
    let mut events = manifests.load()?;
    let known = events
        .iter()
        .any(|event| matches!(event, Event::Apply(Object::Node(node)) if *node.name == *node_name));
    // A question about the whole cluster is about no node.
    if !known && settings.services.is_on() && !node_name.is_empty() {
        events.push(Event::Notice(Notice {
            subject: Subject::Other(format!("Node {node_name}").into()),
            reason: Reason::NodeMissing,
            message: "the manifests hold no such Node; NodePorts answer on this host's first \
                      address of each family (name another node with --hostname-override)"
                .into(),
        }));
    }
    Ok(events)
}

pub(super) async fn connect(settings: &Settings, node_name: &str) -> Result<Cluster, Error> {
    let (kubeconfig, server) = (settings.kubeconfig.clone(), settings.master.clone());
    let always = settings.is_closed()?;
    Cluster::connect(kubeconfig, server, node_name.to_owned())
        .await
        .map(|cluster| {
            cluster
                .with_services(settings.services.is_on())
                .with_network_policies(settings.network_policy.is_on())
                .with_pods(always)
        })
        .map_err(|error| match error {
            ClusterError::NoCluster => Error::NoSource(error),
            other => Error::Cluster(other),
        })
}

pub(super) fn service_settings(settings: &Settings) -> Result<services::ServiceSettings, Error> {
    Ok(services::ServiceSettings {
        off: !settings.services.is_on(),
        detect_local: match settings.detect_local()? {
            settings::DetectLocalSetting::ClusterCidr(ranges) => DetectLocal::ClusterCidr(ranges),
            settings::DetectLocalSetting::NodeCidr => DetectLocal::NodeCidr,
            settings::DetectLocalSetting::BridgeInterface(name) => {
                DetectLocal::BridgeInterface(name.into())
            }
            settings::DetectLocalSetting::InterfaceNamePrefix(prefix) => {
                DetectLocal::InterfaceNamePrefix(prefix.into())
            }
        },
        masquerade_all: settings.masquerade_all,
        nodeport_addresses: match settings.nodeport_addresses()? {
            settings::NodePortAddressesSetting::Primary => NodePortAddresses::Primary,
            settings::NodePortAddressesSetting::Ranges(ranges) => NodePortAddresses::Inside(ranges),
        },
        bind_address: settings.bind_address.filter(|ip| !ip.is_unspecified()),
        masquerade_bit: MasqueradeBit::new(settings.masquerade_bit).unwrap_or_default(),
    })
}

/// Returns the engine of policies. `log_group` is that of a log that is read. Without policies it deletes the tables of an earlier run.
pub(super) fn policy_engine(
    settings: &Settings,
    node_name: &str,
    log_group: Option<u16>,
) -> Result<Engine, Error> {
    let audit = settings.audit_annotations.is_on();
    let closed = settings.is_closed()?.then(|| pod_network(settings));
    let policy_settings = policies::PolicySettings {
        node: node_name.into(),
        strict: settings.network_policy_strict,
        log_group: log_group.filter(|_| settings.log_denied),
        audit,
        audit_log_group: log_group.filter(|_| audit),
        deny_with: match settings.deny_with {
            settings::DenyMode::Drop => policies::DenyWith::Drop,
            settings::DenyMode::Reject => policies::DenyWith::Reject,
        },
        beside_proxy: !settings.services.is_on(),
        closed: closed.transpose()?,
    };
    Ok(if settings.network_policy.is_on() {
        Engine::new(policy_settings)
    } else {
        Engine::off(policy_settings)
    })
}

/// Returns how the network of this node's pods is recognised. The pod network of the cluster does not
/// say which pods are on this node.
fn pod_network(settings: &Settings) -> Result<PodNetwork, Error> {
    Ok(match settings.detect_local()? {
        settings::DetectLocalSetting::ClusterCidr(_) | settings::DetectLocalSetting::NodeCidr => {
            PodNetwork::NodeCidr
        }
        settings::DetectLocalSetting::BridgeInterface(name) => {
            PodNetwork::BridgeInterface(name.into())
        }
        settings::DetectLocalSetting::InterfaceNamePrefix(prefix) => {
            PodNetwork::InterfaceNamePrefix(prefix.into())
        }
    })
}

/// Returns the Node that is used while the node's own object is missing: its name makes endpoints
/// local, and the host's addresses serve NodePorts. Without a name it has no addresses, and nothing is
/// local.
pub(super) fn fallback_node(name: &str) -> Node {
    Node {
        name: name.into(),
        internal_ips: match name.is_empty() {
            true => Vec::new(),
            false => addresses::global(),
        },
        external_ips: Vec::new(),
        pod_cidrs: Vec::new(),
        zone: None,
        going_away: false,
        labels: Default::default(),
        addresses: Default::default(),
    }
}

/// Returns the number of objects of each kind that is used, in one line.
pub(super) fn summary(store: &Store, policies: Option<&Engine>, settings: &Settings) -> String {
    let count = |kind: Kind| store.count(kind);
    let mut parts = Vec::new();
    if settings.services.is_on() {
        parts.push(format!(
            "{} services, {} endpoint slices, {} service ranges",
            count(Kind::Service),
            count(Kind::EndpointSlice),
            count(Kind::ServiceCidr),
        ));
    }
    let node = store.node().map_or("unknown", |node| &*node.name);
    parts.push(format!("node {node}"));
    for (kind, plural) in [
        (Kind::NetworkPolicy, "network policies"),
        (Kind::ClusterNetworkPolicy, "cluster network policies"),
    ] {
        let policies = policies.map_or(0, |policies| policies.count(kind));
        if policies > 0 {
            parts.push(format!("{policies} {plural}"));
        }
    }
    parts.join(", ")
}
