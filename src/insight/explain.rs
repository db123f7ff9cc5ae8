//! Answers one question.

use std::collections::BTreeSet;
use std::net::IpAddr;

use super::answer::{
    Action, Answer, Code, Decision, Nearest, PolicyName, PortAnswer, ServiceStep, TargetAnswer,
    Verdict,
};
use super::names::{NameError, Place, places};
use super::question::{End, PortName, Question};
use super::service::{self, Destination, Source, is_of_node};
use super::{API_VERSION, Facts};
use crate::model::{Family, Kind, ObjectName, Protocol, Service, Tier};
use crate::policies::{self, Connection, Direction, RuleOf};

/// The tier of NetworkPolicies, between those of cluster policies.
const NETWORK_POLICY: &str = "NetworkPolicy";
/// The protocol number of ICMP in a family.
const ICMP: [(Family, u8); 2] = [(Family::V4, 1), (Family::V6, 58)];

/// A port, with a protocol, that a question is asked for.
#[derive(Clone, Debug, PartialEq, Eq, PartialOrd, Ord)]
struct Port {
    number: Option<u16>,
    protocol: Option<Protocol>,
}

/// The answer for one port.
#[derive(Clone, Debug)]
struct OfPort {
    port: Port,
    verdict: Verdict,
    code: Code,
    step: ServiceStep,
    targets: Vec<TargetAnswer>,
}

/// Answers a question.
///
/// # Errors
///
/// If a name in it is unknown.
pub(crate) fn explain(facts: &Facts, question: &Question) -> Result<Answer, NameError> {
    let mut sources = places(facts, &question.from)?;
    let mut destinations = destinations(facts, question)?;
    let families = |places: &[Place]| -> BTreeSet<Family> {
        places
            .iter()
            .map(|place| Family::of(place.address))
            .collect()
    };
    let common = &families(&sources) & &families(&destinations);
    for places in [&mut sources, &mut destinations] {
        places.retain(|place| common.contains(&Family::of(place.address)));
    }
    if common.is_empty() {
        return Err(NameError::OtherFamily {
            from: question.from.to_string(),
            to: question.to.to_string(),
        });
    }
    let ports = ports(facts, question, &destinations)?;
    let mut answers: Vec<OfPort> = ports
        .into_iter()
        .map(|port| of_port(facts, &sources, &destinations, port))
        .collect();
    let verdict = Verdict::of_all(answers.iter().map(|it| it.verdict));
    let differ = answers.windows(2).any(|pair| match pair {
        [one, other] => (one.verdict, one.code) != (other.verdict, other.code),
        _ => false,
    });
    let each = answers.iter().map(|it| PortAnswer {
        port: it
            .port
            .number
            .map_or_else(|| "all other".to_owned(), |port| port.to_string()),
        protocol: protocol_name(it.port.protocol),
        verdict: it.verdict,
        code: it.code,
    });
    let each: Vec<PortAnswer> = if differ { each.collect() } else { Vec::new() };
    // The port that says most: one that is not allowed.
    let worst = answers
        .iter()
        .position(|it| it.verdict != Verdict::Allowed)
        .unwrap_or_default();
    let shown = answers.swap_remove(worst);
    let to = match &question.to {
        End::Pod(name) => name.to_string(),
        end => end.to_string(),
    };
    Ok(Answer {
        api_version: API_VERSION,
        from: question.from.to_string(),
        source_addresses: sources.iter().map(|source| source.address).collect(),
        to,
        family: match common.first() {
            Some(Family::V4) if common.len() == 1 => "IPv4",
            Some(Family::V6) if common.len() == 1 => "IPv6",
            _ => "both",
        },
        port: match question.port {
            Some(_) => shown.port.number,
            None => None,
        },
        protocol: protocol_name(question.protocol),
        node: facts.node.to_owned(),
        verdict,
        code: shown.code,
        service: shown.step,
        targets: shown.targets,
        ports: each,
        warnings: warnings(facts, question),
        assumptions: assumptions(facts),
    })
}

fn protocol_name(protocol: Option<Protocol>) -> String {
    protocol.map_or_else(|| "ICMP".to_owned(), |protocol| protocol.to_string())
}

/// Returns the addresses that the source connects to: of a service its own ones.
fn destinations(facts: &Facts, question: &Question) -> Result<Vec<Place>, NameError> {
    let End::Service(name) = &question.to else {
        return places(facts, &question.to);
    };
    // The name is checked.
    places(facts, &question.to)?;
    let no_frontend = || NameError::WithoutFrontend(name.clone());
    let service = facts.store.service(name).ok_or_else(no_frontend)?;
    let addresses = service
        .cluster_ips
        .iter()
        .filter(|_| service.has_frontends());
    let places: Vec<Place> = addresses
        .map(|address| Place {
            address: *address,
            pod: None,
        })
        .collect();
    if places.is_empty() {
        return Err(no_frontend());
    }
    Ok(places)
}

/// Returns the ports that a question is about; several if it names none.
fn ports(
    facts: &Facts,
    question: &Question,
    destinations: &[Place],
) -> Result<Vec<Port>, NameError> {
    let protocol = question.protocol;
    let one = |number| {
        vec![Port {
            number: Some(number),
            protocol,
        }]
    };
    match (&question.port, &question.to) {
        (Some(PortName::Number(number)), _) => Ok(one(*number)),
        (Some(PortName::Name(port)), End::Service(name)) => {
            let found = facts.store.service(name).and_then(|service| {
                let mut ports = service.ports.iter();
                ports.find(|it| *it.name == **port && Some(it.protocol) == protocol)
            });
            let found = found.ok_or_else(|| no_service_port(facts, name, port))?;
            Ok(one(found.port))
        }
        (Some(PortName::Name(port)), to) => {
            let inventory = facts.policies.inventory();
            let pods = destinations
                .iter()
                .filter_map(|place| inventory.pod(place.pod.as_ref()?));
            let mut named = pods.flat_map(|pod| pod.ports.iter());
            let found = named.find(|it| *it.name == **port && Some(it.protocol) == protocol);
            let found = found.ok_or_else(|| NameError::UnknownNamedPort {
                to: to.to_string(),
                port: port.clone(),
            })?;
            Ok(one(found.port))
        }
        (None, _) if protocol.is_none() => Ok(vec![Port {
            number: None,
            protocol,
        }]),
        (None, End::Service(name)) => {
            let service = facts.store.service(name);
            let ports = service.into_iter().flat_map(|service| &service.ports);
            Ok(ports
                .map(|port| Port {
                    number: Some(port.port),
                    protocol: Some(port.protocol),
                })
                .collect())
        }
        (None, _) => {
            let mut ports: BTreeSet<Port> = facts
                .policies
                .ports()
                .into_iter()
                .filter(|(of, _)| Some(*of) == protocol)
                .map(|(_, number)| Port {
                    number: Some(number),
                    protocol,
                })
                .collect();
            let inventory = facts.policies.inventory();
            let pods = destinations
                .iter()
                .filter_map(|place| inventory.pod(place.pod.as_ref()?));
            let named = pods.flat_map(|pod| pod.ports.iter());
            ports.extend(
                named
                    .filter(|it| Some(it.protocol) == protocol)
                    .map(|it| Port {
                        number: Some(it.port),
                        protocol,
                    }),
            );
            // A port that nothing mentions.
            let mut rest = ports.into_iter().collect::<Vec<_>>();
            rest.push(Port {
                number: None,
                protocol,
            });
            Ok(rest)
        }
    }
}

fn no_service_port(facts: &Facts, name: &ObjectName, port: &str) -> NameError {
    let service = facts.store.service(name);
    let ports = service.into_iter().flat_map(|service| &service.ports);
    let ports = ports.map(|port| {
        let number = format!("{}/{}", port.port, port.protocol);
        if port.name.is_empty() {
            number
        } else {
            format!("{} ({number})", port.name)
        }
    });
    NameError::UnknownServicePort {
        service: name.clone(),
        port: port.to_owned(),
        ports: ports.collect::<Vec<_>>().join(", "),
    }
}

/// Answers for one port: each source with each destination of its family.
fn of_port(facts: &Facts, sources: &[Place], destinations: &[Place], port: Port) -> OfPort {
    let mut step: Option<ServiceStep> = None;
    let mut refused: Option<(Verdict, Code)> = None;
    let mut targets: Vec<TargetAnswer> = Vec::new();
    for source in sources {
        let from = source_of(facts, source);
        let of_family = destinations
            .iter()
            .filter(|place| Family::of(place.address) == Family::of(source.address));
        for destination in of_family {
            let to = Destination {
                address: destination.address,
                protocol: port.protocol,
                port: port.number,
            };
            let judged = service::judge(facts, &from, &to);
            if let Some(code) = judged.code {
                let verdict = match judged.step.action {
                    Action::Reject => Verdict::Refused,
                    Action::Drop | Action::Dnat | Action::None => Verdict::Dropped,
                };
                refused.get_or_insert((verdict, code));
            }
            for (address, number) in &judged.targets {
                let target = target(facts, &from, *address, *number, &port);
                if !targets.contains(&target) {
                    targets.push(target);
                }
            }
            step.get_or_insert(judged.step);
        }
    }
    let verdicts = targets.iter().map(|target| target.verdict);
    let verdict = Verdict::of_all(verdicts.chain(refused.map(|(verdict, _)| verdict)));
    let denied = targets.iter().find(|it| it.verdict != Verdict::Allowed);
    let code = refused
        .map(|(_, code)| code)
        .or_else(|| denied.or(targets.first()).map(|target| target.code));
    OfPort {
        port,
        verdict,
        code: code.unwrap_or(Code::PodUnknown),
        step: step.unwrap_or_default(),
        targets,
    }
}

fn source_of(facts: &Facts, place: &Place) -> Source {
    let node = facts.store.node().map(|node| &**node);
    let owner = facts.policies.inventory().owner(place.address);
    let is_local_pod = owner.is_some_and(|pod| pod.node.as_deref() == Some(facts.node));
    Source {
        address: place.address,
        is_node: is_of_node(node, place.address),
        is_local_pod,
    }
}

/// Asks the policies of both ends about a target.
fn target(
    facts: &Facts,
    source: &Source,
    address: IpAddr,
    number: Option<u16>,
    port: &Port,
) -> TargetAnswer {
    let family = Family::of(address);
    let connection = Connection {
        source: source.address,
        destination: address,
        protocol: match port.protocol {
            Some(protocol) => protocol.number(),
            None => ICMP
                .iter()
                .find(|(of, _)| *of == family)
                .map_or(1, |(_, it)| *it),
        },
        port: number,
    };
    let egress = decide(facts, Direction::Egress, &connection, source);
    let ingress = decide(facts, Direction::Ingress, &connection, source);
    let denying = [&egress, &ingress]
        .into_iter()
        .find(|it| it.verdict != Verdict::Allowed);
    // What says most about an allowed connection: a rule, if there is one.
    let by_rule = [&ingress, &egress]
        .into_iter()
        .find(|it| it.code == Code::PolicyRule);
    let deciding = denying.or(by_rule).unwrap_or(&ingress);
    TargetAnswer {
        family: match family {
            Family::V4 => "IPv4",
            Family::V6 => "IPv6",
        },
        address,
        port: number,
        pod: service::pod_at(facts, address),
        node: service::node_of(facts, address).map(|node| node.to_string()),
        verdict: deciding.verdict,
        code: deciding.code,
        egress: egress.clone(),
        ingress: ingress.clone(),
    }
}

fn decide(
    facts: &Facts,
    direction: Direction,
    connection: &Connection,
    source: &Source,
) -> Decision {
    let end = match direction {
        Direction::Egress => connection.source,
        Direction::Ingress => connection.destination,
    };
    let decided_on = service::node_of(facts, end).map(|node| node.to_string());
    let allowed = |code| Decision {
        verdict: Verdict::Allowed,
        code,
        tier: None,
        policies: Vec::new(),
        rule: None,
        nearest: None,
        decided_on: decided_on.clone(),
    };
    let node = facts.store.node().map(|node| &**node);
    if is_of_node(node, end) {
        return allowed(Code::HostNetwork);
    }
    let inventory = facts.policies.inventory();
    if inventory.claimants(end).next().is_none() {
        let networks = facts.settings.pod_networks(Family::of(end), node);
        let is_pod = networks.iter().any(|network| network.contains(&end));
        return allowed(if is_pod {
            Code::PodUnknown
        } else {
            Code::NoPolicy
        });
    }
    if direction == Direction::Ingress && is_own_node(facts, source, end) {
        return allowed(Code::NodeToOwnPod);
    }
    let by_rule = |of: RuleOf| Decision {
        tier: Some(of.tier.map_or(NETWORK_POLICY, tier_name)),
        rule: Some(of.rule),
        policies: vec![PolicyName {
            kind: match of.tier {
                Some(_) => Kind::ClusterNetworkPolicy.as_str(),
                None => Kind::NetworkPolicy.as_str(),
            },
            namespace: of.policy.namespace().to_owned(),
            name: of.policy.name().to_owned(),
        }],
        ..allowed(Code::PolicyRule)
    };
    match facts.policies.decide(direction, connection) {
        policies::Decision::NotIsolated => allowed(Code::NoPolicy),
        policies::Decision::ToItself => allowed(Code::SamePod),
        policies::Decision::Allowed(of) => Decision {
            code: Code::PolicyRule,
            ..by_rule(of)
        },
        policies::Decision::Denied(of) => Decision {
            verdict: Verdict::Denied,
            code: Code::PolicyDeny,
            ..by_rule(of)
        },
        policies::Decision::NoRule { policies, nearest } => Decision {
            verdict: Verdict::Denied,
            tier: Some(NETWORK_POLICY),
            policies: policies.iter().map(policy_name).collect(),
            nearest: nearest.map(|miss| Nearest {
                policy: policy_name(&miss.of.policy),
                rule: miss.of.rule,
                failed: miss.failed,
                met: miss.met,
            }),
            ..allowed(Code::PolicyNoRule)
        },
    }
}

/// Returns whether the source is the node of the pod with an address.
fn is_own_node(facts: &Facts, source: &Source, pod: IpAddr) -> bool {
    let inventory = facts.policies.inventory();
    let mut nodes = inventory.holders(pod).map(|pod| pod.node.as_deref());
    nodes.any(|node| match node {
        Some(node) if node == facts.node => source.is_node,
        Some(node) => inventory.node_has(node, source.address),
        None => false,
    })
}

fn tier_name(tier: Tier) -> &'static str {
    match tier {
        Tier::Admin => "Admin",
        Tier::Baseline => "Baseline",
    }
}

fn policy_name(name: &ObjectName) -> PolicyName {
    PolicyName {
        kind: Kind::NetworkPolicy.as_str(),
        namespace: name.namespace().to_owned(),
        name: name.name().to_owned(),
    }
}

/// Returns what is wrong with the objects of a question.
fn warnings(facts: &Facts, question: &Question) -> Vec<String> {
    let mut warnings = Vec::new();
    if let End::Service(name) = &question.to
        && let Some(service) = facts.store.service(name)
    {
        warnings.extend(too_large(facts, service));
    }
    for end in [&question.from, &question.to] {
        if let End::Pod(name) = end
            && let Some(pod) = facts.policies.inventory().pod(name)
        {
            let others: BTreeSet<String> = pod
                .addresses
                .iter()
                .flat_map(|address| facts.policies.inventory().claimants(*address))
                .filter(|other| *other != name)
                .map(ToString::to_string)
                .collect();
            if !others.is_empty() && !pod.host_network {
                let others: Vec<String> = others.into_iter().collect();
                warnings.push(format!(
                    "the address of {name} is also that of {} in their status",
                    others.join(", ")
                ));
            }
        }
    }
    warnings
}

pub(super) fn too_large(facts: &Facts, service: &Service) -> Option<String> {
    let plan = crate::services::plan(facts.store, &service.name, facts.settings, None);
    let error = plan.err()?;
    Some(format!("the service {} {error}", service.name))
}

/// Returns what the facts lack.
fn assumptions(facts: &Facts) -> Vec<String> {
    let (pods, namespaces, _) = facts.policies.inventory().counts();
    let mut lacking = Vec::new();
    if pods == 0 {
        lacking.push("no Pods: addresses belong to no pod, and no policy applies".to_owned());
    } else if namespaces == 0 {
        lacking
            .push("no Namespaces: namespaceSelectors see only the names of namespaces".to_owned());
    }
    lacking
}
