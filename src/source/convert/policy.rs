//! Conversion of NetworkPolicies.
//!
//! Invalid parts fail closed: an invalid rule is left out, so that it allows nothing; an invalid pod
//! selector makes the policy apply to more pods and allow nothing; invalid policy types make it
//! isolate in both directions. Each invalid value is reported with its path in the object.

use serde_json::{Map, Value};

use super::address::parse_range;
use super::fields::{FieldReader, FieldResult, Path, present};
use super::report::FieldReport;
use super::{Converter, PORT_HINT, PROTOCOL_HINT, port};
use crate::model::{
    LabelSelector, NetworkPolicy, ObjectName, Peer, PolicyMode, PolicyPort, PolicyRule, PortMatch,
    Protocol,
};
use ipnet::IpNet;

const RULE_LEFT_OUT: &str =
    "the rule is left out; what it would allow stays denied until this is corrected";
const RULES_LEFT_OUT: &str =
    "no rule of this direction is used; all its traffic stays denied until this is corrected";
const POLICY_CLOSED: &str = "the policy isolates its pods in both directions and allows nothing \
    until this is corrected; without a valid podSelector these are all pods of the namespace";
const SELECTOR_WIDENED: &str = "this requirement is left out, so the policy applies to more \
    pods and allows them nothing in its directions until this is corrected";
const BOTH_DIRECTIONS: &str =
    "the policy isolates its pods in both directions until this is corrected";

/// The fields of `spec`.
const FIELDS: [&str; 4] = ["podSelector", "policyTypes", "ingress", "egress"];

/// The annotation with the mode of a policy, or of the policies of a Namespace.
pub(super) const MODE: &str = "nftlet.dev/mode";

/// Reads the value of [`MODE`]. A value that is not known enforces.
pub(super) fn mode(value: Option<&Value>, report: &mut FieldReport) -> Option<PolicyMode> {
    let value = value.filter(|value| !value.is_null())?;
    match value.as_str() {
        Some("enforce") => Some(PolicyMode::Enforce),
        Some("audit") => Some(PolicyMode::Audit),
        other => {
            let written = other.map_or_else(|| value.to_string(), str::to_owned);
            let fault = "is neither \"audit\" nor \"enforce\"; policies are enforced";
            report.left_out(format_args!("annotation {MODE}"), written, fault);
            Some(PolicyMode::Enforce)
        }
    }
}

/// The directions in `policyTypes`.
#[derive(Clone, Copy)]
struct Directions {
    ingress: bool,
    egress: bool,
}

const BOTH: Directions = Directions {
    ingress: true,
    egress: true,
};

impl Converter {
    pub(super) fn network_policy(
        &mut self,
        name: &ObjectName,
        spec: Option<&Value>,
        report: &mut FieldReport,
    ) -> NetworkPolicy {
        let at = Path::Top("spec");
        let closed = |pods| NetworkPolicy {
            name: name.clone(),
            pods,
            ingress: Some(Vec::new()),
            egress: Some(Vec::new()),
            mode: None,
        };
        let mut reader = FieldReader::new(&mut self.interner, report, POLICY_CLOSED);
        let Ok(spec) = reader.mapping(&at, spec.unwrap_or(&Value::Null)) else {
            return closed(LabelSelector::default());
        };
        let fields_known = reader.check_known(&at, spec, &FIELDS);

        let mut reader = FieldReader::new(&mut self.interner, report, SELECTOR_WIDENED);
        let (pods, pods_known) = match present(spec, "podSelector") {
            Some(selector) => {
                let found = reader.requirements(&at.field("podSelector"), selector);
                (LabelSelector::new(found.valid), found.all)
            }
            // Absent, it selects every pod, as in the API.
            None => (LabelSelector::default(), Ok(())),
        };
        if fields_known.is_err() {
            return closed(pods);
        }

        let mut reader = FieldReader::new(&mut self.interner, report, BOTH_DIRECTIONS);
        let directions = reader.directions(&at, spec);
        if pods_known.is_err() {
            return NetworkPolicy {
                name: name.clone(),
                pods,
                ingress: directions.ingress.then(Vec::new),
                egress: directions.egress.then(Vec::new),
                mode: None,
            };
        }
        let mut rules = |wanted: bool, field, peers| {
            wanted.then(|| {
                let rules = present(spec, field);
                self.rules(&at.field(field), rules, peers, report)
            })
        };
        NetworkPolicy {
            name: name.clone(),
            pods,
            ingress: rules(directions.ingress, "ingress", "from"),
            egress: rules(directions.egress, "egress", "to"),
            mode: None,
        }
    }

    /// Converts the valid rules of one direction; `peers` is the name of their field of peers.
    fn rules(
        &mut self,
        at: &Path<'_>,
        rules: Option<&Value>,
        peers: &str,
        report: &mut FieldReport,
    ) -> Vec<PolicyRule> {
        let mut reader = FieldReader::new(&mut self.interner, report, RULES_LEFT_OUT);
        let entries = match rules.map(|rules| reader.entries(at, rules)) {
            Some(Ok(entries)) => entries,
            Some(Err(_)) | None => return Vec::new(),
        };
        let mut reader = FieldReader::new(&mut self.interner, report, RULE_LEFT_OUT);
        entries
            .iter()
            .enumerate()
            .filter_map(|(index, rule)| reader.rule(&Path::Entry(at, index), rule, peers).ok())
            .collect()
    }
}

impl FieldReader<'_> {
    /// Reads `policyTypes`. The default is Ingress, and Egress if there are egress rules, as in the
    /// API server (`SetDefaults_NetworkPolicy` in `pkg/apis/networking/v1`).
    fn directions(&mut self, spec_at: &Path<'_>, spec: &Map<String, Value>) -> Directions {
        let at = spec_at.field("policyTypes");
        let types = match present(spec, "policyTypes") {
            Some(types) => self.list(&at, types, Self::direction),
            None => Ok(Vec::new()),
        };
        match types {
            Ok(types) if types.is_empty() => Directions {
                ingress: true,
                egress: present(spec, "egress")
                    .is_some_and(|rules| rules.as_array().is_none_or(|rules| !rules.is_empty())),
            },
            Ok(types) => Directions {
                ingress: types.iter().any(|direction| direction.ingress),
                egress: types.iter().any(|direction| direction.egress),
            },
            Err(_) => BOTH,
        }
    }

    fn direction(&mut self, at: &Path<'_>, value: &Value) -> FieldResult<Directions> {
        match value.as_str() {
            Some("Ingress") => Ok(Directions {
                ingress: true,
                egress: false,
            }),
            Some("Egress") => Ok(Directions {
                ingress: false,
                egress: true,
            }),
            _ => Err(self.reject(at, value, "is not a policy type; write Ingress or Egress")),
        }
    }

    fn rule(&mut self, at: &Path<'_>, value: &Value, peers_field: &str) -> FieldResult<PolicyRule> {
        let [peers, ports] = self.fields(at, value, [peers_field, "ports"])?;
        // Both are read before either is returned, so that every invalid value is reported.
        let peers = self.unless_empty(&at.field(peers_field), peers, Self::peer);
        let ports = self.unless_empty(&at.field("ports"), ports, Self::policy_port);
        Ok(PolicyRule {
            peers: peers?,
            ports: ports?,
        })
    }

    /// Reads a list. Returns `None`, which stands for everything, if it is absent or empty.
    fn unless_empty<T>(
        &mut self,
        at: &Path<'_>,
        value: Option<&Value>,
        read: impl FnMut(&mut Self, &Path<'_>, &Value) -> FieldResult<T>,
    ) -> FieldResult<Option<Vec<T>>> {
        let list = match value {
            Some(value) => self.list(at, value, read)?,
            None => Vec::new(),
        };
        Ok(Some(list).filter(|list| !list.is_empty()))
    }

    fn peer(&mut self, at: &Path<'_>, value: &Value) -> FieldResult<Peer> {
        let known = ["podSelector", "namespaceSelector", "ipBlock"];
        let [pods, namespaces, block] = self.fields(at, value, known)?;
        let pods = pods.map(|it| self.selector(&at.field("podSelector"), it));
        let namespaces = namespaces.map(|it| self.selector(&at.field("namespaceSelector"), it));
        let block = block.map(|it| self.block(&at.field("ipBlock"), it));
        match (pods, namespaces, block) {
            (None, None, None) => {
                let hint =
                    "selects no peers; write a podSelector, a namespaceSelector or an ipBlock";
                Err(self.reject(at, value, hint))
            }
            (None, None, Some(block)) => block,
            (pods, namespaces, None) => Ok(Peer::Pods {
                namespaces: namespaces.transpose()?,
                pods: pods.transpose()?.unwrap_or_default(),
            }),
            (_, _, Some(_)) => {
                let hint = "has an ipBlock and a selector; write them as two entries";
                Err(self.reject(at, value, hint))
            }
        }
    }

    fn block(&mut self, at: &Path<'_>, value: &Value) -> FieldResult<Peer> {
        let [cidr, except] = self.fields(at, value, ["cidr", "except"])?;
        let cidr = self.range(&at.field("cidr"), cidr.unwrap_or(&Value::Null))?;
        let except = match except {
            Some(except) => self.list(&at.field("except"), except, |reader, at, value| {
                let range = reader.range(at, value)?;
                if cidr.contains(&range) && range != cidr {
                    return Ok(range);
                }
                let hint = format_args!("is not a smaller range within {cidr}; write one that is");
                Err(reader.reject(at, value, hint))
            })?,
            None => Vec::new(),
        };
        Ok(Peer::Block { cidr, except })
    }

    pub(super) fn range(&mut self, at: &Path<'_>, value: &Value) -> FieldResult<IpNet> {
        let text = self.text(at, value)?;
        match parse_range(text) {
            // Packets never have such addresses, so that an exception of this kind would have no
            // effect.
            Ok(IpNet::V6(range)) if range.addr().to_ipv4_mapped().is_some() => {
                let hint = "is an IPv4 range in IPv6 notation; write it as an IPv4 range";
                Err(self.reject(at, value, hint))
            }
            Ok(range) => Ok(range),
            Err(fault) => Err(self.reject(at, value, fault)),
        }
    }

    fn policy_port(&mut self, at: &Path<'_>, value: &Value) -> FieldResult<PolicyPort> {
        let [protocol, port, end] = self.fields(at, value, ["protocol", "port", "endPort"])?;
        let protocol = match protocol {
            None => Ok(Protocol::Tcp),
            Some(value) => match value.as_str() {
                Some("TCP") => Ok(Protocol::Tcp),
                Some("UDP") => Ok(Protocol::Udp),
                Some("SCTP") => Ok(Protocol::Sctp),
                _ => Err(self.reject(&at.field("protocol"), value, PROTOCOL_HINT)),
            },
        };
        let port = self.port_match(at, port, end);
        Ok(PolicyPort {
            protocol: protocol?,
            port: port?,
        })
    }

    fn port_match(
        &mut self,
        at: &Path<'_>,
        first: Option<&Value>,
        last: Option<&Value>,
    ) -> FieldResult<PortMatch> {
        let (port_at, end_at) = (at.field("port"), at.field("endPort"));
        let first = match first {
            None => PortMatch::Any,
            Some(Value::String(name)) if is_port_name(name) => {
                PortMatch::Named(self.interner.string(name))
            }
            Some(value @ Value::String(_)) => {
                let hint = "is not the name of a port; write up to 15 lower-case letters, digits \
                    and '-', or a number without quotes";
                return Err(self.reject(&port_at, value, hint));
            }
            Some(value) => match value.as_i64().and_then(port) {
                Some(number) => PortMatch::Range(number, number),
                None => return Err(self.reject(&port_at, value, PORT_HINT)),
            },
        };
        let Some(last) = last else {
            return Ok(first);
        };
        let PortMatch::Range(first, _) = first else {
            let hint = "needs a number as port; write one, or remove endPort";
            return Err(self.reject(&end_at, last, hint));
        };
        match last.as_i64().and_then(port) {
            Some(last) if last >= first => Ok(PortMatch::Range(first, last)),
            Some(_) => {
                let hint =
                    format_args!("is below the port {first}; write the larger one as endPort");
                Err(self.reject(&end_at, last, hint))
            }
            None => Err(self.reject(&end_at, last, PORT_HINT)),
        }
    }
}

/// Returns whether a text is a service name of RFC 6335 (apimachinery's `IsValidPortName`).
fn is_port_name(text: &str) -> bool {
    let inside = |byte: u8| byte.is_ascii_lowercase() || byte.is_ascii_digit() || byte == b'-';
    text.len() <= 15
        && text.bytes().all(inside)
        && text.bytes().any(|byte| byte.is_ascii_lowercase())
        && !text.contains("--")
        && !text.starts_with('-')
        && !text.ends_with('-')
}

#[cfg(test)]
mod tests;
