//! Conversion of ClusterNetworkPolicies.
//!
//! A rule that is not understood fails closed, as the API asks: an `Accept` rule is left out, and
//! any other rule denies all traffic of its direction. A policy without a usable subject, tier or
//! priority has no place among the others and is an error.

use std::sync::Arc;

use serde_json::{Map, Value};

use super::fields::{FieldReader, FieldResult, Path, present};
use super::report::FieldReport;
use super::{Converter, PORT_HINT, port};
use crate::model::{
    Action, ClusterNetworkPolicy, Kind, LabelSelector, ObjectName, ObjectRef, PolicyPort,
    PortMatch, Protocol, Tier, TierPeer, TierRule,
};

const NEEDED: &str = "without a tier, a priority and a subject a policy has no effect";
const IGNORED: &str = "the rest of the policy is used";
const NAMELESS: &str = "the rule is used without this name";
const ACCEPTS_NOTHING: &str = "the rule accepts nothing until this is corrected";
const DENIES_ALL: &str =
    "the rule denies all traffic of the policy's pods in its direction until this is corrected";
const DIRECTION_DENIED: &str =
    "all traffic of the policy's pods in this direction is denied until this is corrected";

/// The fields of `spec`.
const FIELDS: [&str; 5] = ["tier", "priority", "subject", "ingress", "egress"];
/// The fields of an entry of `protocols`.
const PROTOCOLS: [&str; 4] = ["tcp", "udp", "sctp", "destinationNamedPort"];

/// How many rules, peers, protocols or networks a list may have.
const MOST_ENTRIES: usize = 25;
const HIGHEST_PRIORITY: u16 = 1000;
/// How many characters the name of a rule may have.
const LONGEST_NAME: usize = 100;

/// The tier, priority and subject of a policy.
struct Placement {
    tier: Tier,
    priority: u16,
    subject: NamespacedPods,
}

/// The selectors of pods by their namespaces and labels.
struct NamespacedPods {
    namespaces: LabelSelector,
    pods: LabelSelector,
}

/// The direction of rules.
#[derive(Clone, Copy, PartialEq, Eq)]
enum Direction {
    Ingress,
    Egress,
}

impl Direction {
    /// Returns the field of the peers.
    fn peers(self) -> &'static str {
        match self {
            Self::Ingress => "from",
            Self::Egress => "to",
        }
    }
}

impl Converter {
    /// Converts a policy.
    ///
    /// # Errors
    /// What is wrong with the tier, the priority or the subject.
    pub(super) fn cluster_network_policy(
        &mut self,
        name: &ObjectName,
        spec: Option<&Value>,
        report: &mut FieldReport,
    ) -> Result<ClusterNetworkPolicy, String> {
        let at = Path::Top("spec");
        let spec = spec.unwrap_or(&Value::Null);
        let mut unusable =
            FieldReport::new(ObjectRef::new(Kind::ClusterNetworkPolicy, name.clone()));
        let mut reader = FieldReader::new(&mut self.interner, &mut unusable, NEEDED);
        let read = reader
            .mapping(&at, spec)
            .and_then(|spec| Ok((spec, reader.placement(&at, spec)?)));
        let Ok((spec, placement)) = read else {
            return Err(unusable.into_first_fault());
        };
        // An unknown field may be of a later version of the API; the rules are still understood.
        let _ =
            FieldReader::new(&mut self.interner, report, IGNORED).check_known(&at, spec, &FIELDS);
        Ok(ClusterNetworkPolicy {
            name: name.clone(),
            tier: placement.tier,
            priority: placement.priority,
            subject_namespaces: placement.subject.namespaces,
            subject_pods: placement.subject.pods,
            ingress: self.tier_rules(&at, spec, Direction::Ingress, report),
            egress: self.tier_rules(&at, spec, Direction::Egress, report),
        })
    }

    fn tier_rules(
        &mut self,
        spec_at: &Path<'_>,
        spec: &Map<String, Value>,
        direction: Direction,
        report: &mut FieldReport,
    ) -> Vec<TierRule> {
        let field = match direction {
            Direction::Ingress => "ingress",
            Direction::Egress => "egress",
        };
        let at = spec_at.field(field);
        let Some(rules) = present(spec, field) else {
            return Vec::new();
        };
        let mut reader = FieldReader::new(&mut self.interner, report, DIRECTION_DENIED);
        match reader.bounded_entries(&at, rules) {
            Ok(rules) => rules
                .iter()
                .enumerate()
                .filter_map(|(index, rule)| {
                    self.tier_rule(&Path::Entry(&at, index), rule, direction, report)
                })
                .collect(),
            Err(_) => vec![denying_all(None)],
        }
    }

    /// Converts a rule, or returns what takes its place if it is not understood.
    fn tier_rule(
        &mut self,
        at: &Path<'_>,
        value: &Value,
        direction: Direction,
        report: &mut FieldReport,
    ) -> Option<TierRule> {
        let name = value.get("name").filter(|name| !name.is_null());
        let name = name.and_then(|name| {
            FieldReader::new(&mut self.interner, report, NAMELESS)
                .rule_name(&at.field("name"), name)
                .ok()
        });
        let accepts = action_of(value) == Some(Action::Accept);
        let consequence = if accepts { ACCEPTS_NOTHING } else { DENIES_ALL };
        let mut reader = FieldReader::new(&mut self.interner, report, consequence);
        match reader.tier_rule(at, value, direction) {
            Ok((action, peers, protocols)) => Some(TierRule {
                name,
                action,
                peers: Some(peers),
                protocols,
            }),
            Err(_) if accepts => None,
            Err(_) => Some(denying_all(name)),
        }
    }
}

fn denying_all(name: Option<Arc<str>>) -> TierRule {
    TierRule {
        name,
        action: Action::Deny,
        peers: None,
        protocols: None,
    }
}

fn action_of(rule: &Value) -> Option<Action> {
    match rule.get("action")?.as_str()? {
        "Accept" => Some(Action::Accept),
        "Deny" => Some(Action::Deny),
        "Pass" => Some(Action::Pass),
        _ => None,
    }
}

/// The action, peers and protocols of a rule.
type RuleParts = (Action, Vec<TierPeer>, Option<Vec<PolicyPort>>);

impl FieldReader<'_> {
    fn placement(&mut self, at: &Path<'_>, spec: &Map<String, Value>) -> FieldResult<Placement> {
        let [tier, priority, subject] =
            ["tier", "priority", "subject"].map(|name| spec.get(name).unwrap_or(&Value::Null));
        Ok(Placement {
            tier: match tier.as_str() {
                Some("Admin") => Tier::Admin,
                Some("Baseline") => Tier::Baseline,
                _ => {
                    let hint = "is not a tier; write Admin or Baseline";
                    return Err(self.reject(&at.field("tier"), tier, hint));
                }
            },
            priority: match priority.as_u64().and_then(|it| u16::try_from(it).ok()) {
                Some(number) if number <= HIGHEST_PRIORITY => number,
                _ => {
                    let hint = "is not a priority; write a number from 0 to 1000";
                    return Err(self.reject(&at.field("priority"), priority, hint));
                }
            },
            subject: self.subject(&at.field("subject"), subject)?,
        })
    }

    fn subject(&mut self, at: &Path<'_>, value: &Value) -> FieldResult<NamespacedPods> {
        match self.fields(at, value, ["namespaces", "pods"])? {
            [Some(namespaces), None] => self.namespaces(&at.field("namespaces"), namespaces),
            [None, Some(pods)] => self.namespaced_pods(&at.field("pods"), pods),
            _ => Err(self.reject(at, value, "needs one of the fields namespaces and pods")),
        }
    }

    /// Reads the selector of all pods of some namespaces.
    fn namespaces(&mut self, at: &Path<'_>, value: &Value) -> FieldResult<NamespacedPods> {
        Ok(NamespacedPods {
            namespaces: self.selector(at, value)?,
            pods: LabelSelector::default(),
        })
    }

    fn namespaced_pods(&mut self, at: &Path<'_>, value: &Value) -> FieldResult<NamespacedPods> {
        let [namespaces, pods] = self.fields(at, value, ["namespaceSelector", "podSelector"])?;
        let Some(pods) = pods else {
            let hint = "needs a podSelector; write {} for all pods";
            return Err(self.reject(at, value, hint));
        };
        let namespaces = match namespaces {
            Some(namespaces) => self.selector(&at.field("namespaceSelector"), namespaces),
            None => Ok(LabelSelector::default()),
        };
        let pods = self.selector(&at.field("podSelector"), pods);
        Ok(NamespacedPods {
            namespaces: namespaces?,
            pods: pods?,
        })
    }

    fn rule_name(&mut self, at: &Path<'_>, value: &Value) -> FieldResult<Arc<str>> {
        let name = self.text(at, value)?;
        if name.is_empty() || name.chars().nth(LONGEST_NAME).is_some() {
            let hint = "is not a name of a rule; write 1 to 100 characters";
            return Err(self.reject(at, value, hint));
        }
        Ok(self.interner.string(name))
    }

    fn tier_rule(
        &mut self,
        at: &Path<'_>,
        value: &Value,
        direction: Direction,
    ) -> FieldResult<RuleParts> {
        let peers_field = direction.peers();
        let known = ["name", "action", peers_field, "protocols"];
        let [_, action_value, peers, protocols] = self.fields(at, value, known)?;
        let action = action_of(value).ok_or_else(|| {
            let hint = "is not an action; write Accept, Deny or Pass";
            let action = action_value.unwrap_or(&Value::Null);
            self.reject(&at.field("action"), action, hint)
        });
        // All are read before one is returned, so that every invalid value is reported.
        let peers_at = at.field(peers_field);
        let peers = self.entries_of(
            &peers_at,
            peers.unwrap_or(&Value::Null),
            |reader, at, it| reader.tier_peer(at, it, direction, action.ok()),
        );
        let protocols = protocols.map(|protocols| {
            let entries =
                self.entries_of(&at.field("protocols"), protocols, Self::tier_protocol)?;
            Ok(entries.into_iter().flatten().collect::<Vec<_>>())
        });
        let (action, peers, protocols) = (action?, peers?, protocols.transpose()?);
        let is_named = |port: &PolicyPort| matches!(port.port, PortMatch::Named(_));
        let portless = |peer: &TierPeer| !matches!(peer, TierPeer::Pods { .. });
        if protocols.iter().flatten().any(is_named) && peers.iter().any(portless) {
            let hint = "names a port beside a peer that is not a pod; only pods have named ports, \
                so write two rules";
            return Err(self.reject(at, value, hint));
        }
        Ok((action, peers, protocols))
    }

    /// Reads a list without its entries, at most as many as the API permits.
    fn bounded_entries<'v>(&mut self, at: &Path<'_>, value: &'v Value) -> FieldResult<&'v [Value]> {
        let entries = self.entries(at, value)?;
        if entries.len() > MOST_ENTRIES {
            let hint = format_args!(
                "has {} entries; write at most {MOST_ENTRIES}",
                entries.len()
            );
            return Err(self.reject(at, value, hint));
        }
        Ok(entries)
    }

    /// Reads a list that has 1 to 25 entries.
    fn entries_of<T>(
        &mut self,
        at: &Path<'_>,
        value: &Value,
        read: impl FnMut(&mut Self, &Path<'_>, &Value) -> FieldResult<T>,
    ) -> FieldResult<Vec<T>> {
        if self.bounded_entries(at, value)?.is_empty() {
            return Err(self.reject(at, value, "has no entries; write at least one"));
        }
        self.list(at, value, read)
    }

    fn tier_peer(
        &mut self,
        at: &Path<'_>,
        value: &Value,
        direction: Direction,
        action: Option<Action>,
    ) -> FieldResult<TierPeer> {
        let pods = |read: NamespacedPods| TierPeer::Pods {
            namespaces: read.namespaces,
            pods: read.pods,
        };
        let known = ["namespaces", "pods", "networks", "nodes", "domainNames"];
        let [of_namespaces, of_pods, networks, nodes, names] = match direction {
            Direction::Ingress => {
                let [of_namespaces, of_pods] = self.fields(at, value, ["namespaces", "pods"])?;
                [of_namespaces, of_pods, None, None, None]
            }
            Direction::Egress => self.fields(at, value, known)?,
        };
        match (of_namespaces, of_pods, networks, nodes, names) {
            (Some(namespaces), None, None, None, None) => self
                .namespaces(&at.field("namespaces"), namespaces)
                .map(pods),
            (None, Some(of_pods), None, None, None) => {
                self.namespaced_pods(&at.field("pods"), of_pods).map(pods)
            }
            (None, None, Some(networks), None, None) => {
                let mut networks = self.entries_of(&at.field("networks"), networks, Self::range)?;
                // Equal rules share their sets of addresses.
                networks.sort_unstable();
                networks.dedup();
                Ok(TierPeer::Networks(networks))
            }
            (None, None, None, Some(nodes), None) => self
                .selector(&at.field("nodes"), nodes)
                .map(TierPeer::Nodes),
            (None, None, None, None, Some(names)) => {
                let at = at.field("domainNames");
                if action == Some(Action::Accept) {
                    return Err(self.unsupported(&at, "the rule accepts nothing"));
                }
                Err(self.reject(&at, names, "can only be in rules with the action Accept"))
            }
            _ => Err(self.reject(at, value, "must have exactly one of the fields of a peer")),
        }
    }

    /// Reads an entry of `protocols`. A named port may be of any protocol.
    fn tier_protocol(&mut self, at: &Path<'_>, value: &Value) -> FieldResult<Vec<PolicyPort>> {
        let [tcp, udp, sctp, named] = self.fields(at, value, PROTOCOLS)?;
        let (protocol, field, of_protocol) = match (tcp, udp, sctp, named) {
            (Some(tcp), None, None, None) => (Protocol::Tcp, "tcp", tcp),
            (None, Some(udp), None, None) => (Protocol::Udp, "udp", udp),
            (None, None, Some(sctp), None) => (Protocol::Sctp, "sctp", sctp),
            (None, None, None, Some(name)) => {
                let at = at.field("destinationNamedPort");
                let text = self.text(&at, name)?;
                if text.is_empty() {
                    return Err(self.reject(&at, name, "is not the name of a port; write one"));
                }
                let name = self.interner.string(text);
                let of_protocol = |protocol| PolicyPort {
                    protocol,
                    port: PortMatch::Named(name.clone()),
                };
                let protocols = [Protocol::Tcp, Protocol::Udp, Protocol::Sctp];
                return Ok(protocols.map(of_protocol).into());
            }
            _ => {
                let hint = "must have exactly one of the fields of a protocol";
                return Err(self.reject(at, value, hint));
            }
        };
        let at = at.field(field);
        let [port] = self.fields(&at, of_protocol, ["destinationPort"])?;
        // An empty protocol has a field of a later version of the API.
        let Some(port) = port else {
            let hint = "needs a destinationPort; write a number or a range";
            return Err(self.reject(&at, of_protocol, hint));
        };
        let port = self.destination_port(&at.field("destinationPort"), port)?;
        Ok(vec![PolicyPort { protocol, port }])
    }

    fn destination_port(&mut self, at: &Path<'_>, value: &Value) -> FieldResult<PortMatch> {
        match self.fields(at, value, ["number", "range"])? {
            [Some(number), None] => {
                let number = self.port_number(&at.field("number"), number)?;
                Ok(PortMatch::Range(number, number))
            }
            [None, Some(range)] => {
                let at = at.field("range");
                let [start, end] = self.fields(&at, range, ["start", "end"])?;
                let mut read = |name, value: Option<&Value>| {
                    self.port_number(&at.field(name), value.unwrap_or(&Value::Null))
                };
                let (start, end) = (read("start", start), read("end", end));
                let (start, end) = (start?, end?);
                if start >= end {
                    let hint = "does not end above its start; write the larger number as end";
                    return Err(self.reject(&at, range, hint));
                }
                Ok(PortMatch::Range(start, end))
            }
            _ => Err(self.reject(at, value, "must have one of the fields number and range")),
        }
    }

    fn port_number(&mut self, at: &Path<'_>, value: &Value) -> FieldResult<u16> {
        let number = value.as_i64().and_then(port);
        number.ok_or_else(|| self.reject(at, value, PORT_HINT))
    }
}

#[cfg(test)]
mod tests;
