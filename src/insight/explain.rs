//! Answers one question.

use std::collections::BTreeSet;
use std::net::IpAddr;
use std::sync::Arc;

use super::answer::{
    Action, Answer, Code, Decision, PortAnswer, ServiceStep, TargetAnswer, Verdict,
};
use super::decision::{decide, is_bridged, pass};
use super::evidence::Subjects;
use super::names::{NameError, Place, no_service, places};
use super::nodes::OtherNode;
use super::ports::{Ports, ports};
use super::question::{End, PortName, Question};
use super::rules;
use super::service::{self, Compiled, Destination, Judgement, Source, is_of_node, source_of};
use super::{API_VERSION, Facts};
use crate::model::{Family, Kind, Pod, Protocol};
use crate::policies::{Connection, Direction};
use crate::services::Claim;

/// The answer for one port.
#[derive(Clone, Debug)]
struct OfPort {
    /// The family; `None` if both have this answer.
    family: Option<Family>,
    port: Ports,
    verdict: Verdict,
    code: Code,
    step: ServiceStep,
    targets: Vec<TargetAnswer>,
}

/// Answers a question. `compiled` are those of earlier questions about the same facts.
///
/// # Errors
///
/// If a name in it is unknown.
pub(crate) fn explain(
    facts: &Facts,
    question: &Question,
    compiled: &mut Compiled,
) -> Result<Answer, NameError> {
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
    check_pairs(facts, sources.len().saturating_mul(destinations.len()))?;
    let ports = ports(facts, question, &destinations)?;
    check_size(facts, &sources, &destinations, &ports)?;
    let sources: Vec<Origin> = sources
        .into_iter()
        .map(|place| Origin::new(facts, place))
        .collect();
    let mut answers: Vec<OfPort> = Vec::new();
    for port in &ports {
        let of_families = common.iter().map(|family| {
            let sources = sources.iter();
            let sources: Vec<&Origin> = sources
                .filter(|from| Family::of(from.place.address) == *family)
                .collect();
            let destinations = destinations.iter();
            let destinations: Vec<&Place> = destinations
                .filter(|place| Family::of(place.address) == *family)
                .collect();
            of_port(facts, &sources, &destinations, *family, port, compiled)
        });
        for answer in of_families {
            add(&mut answers, answer);
        }
    }
    let verdict = Verdict::of_all(answers.iter().map(|it| it.verdict));
    let each: Vec<PortAnswer> = match answers.len() {
        0 | 1 => Vec::new(),
        _ => answers
            .iter()
            .map(|it| port_answer(it, common.len() > 1))
            .collect(),
    };
    // What says most: an answer that is not allowed.
    let says_most = answers.iter().position(|it| it.verdict != Verdict::Allowed);
    let shown = answers.into_iter().nth(says_most.unwrap_or_default());
    let Some(shown) = shown else {
        return Err(NameError::OtherFamily {
            from: question.from.to_string(),
            to: question.to.to_string(),
        });
    };
    let mut answer = Answer {
        api_version: API_VERSION,
        from: question.from.to_string(),
        source_addresses: sources.iter().map(|from| from.place.address).collect(),
        to: question.to.to_string(),
        family: match common.first() {
            Some(Family::V4) if common.len() == 1 => "IPv4",
            Some(Family::V6) if common.len() == 1 => "IPv6",
            _ => "both",
        },
        port: match question.port {
            Some(_) => shown.port.number(),
            None => None,
        },
        protocol: protocol_name(shown.port.protocol),
        node: sources
            .iter()
            .map(|from| from.facts(facts).node)
            .find(|node| *node == facts.node)
            .or(sources.first().map(|from| from.facts(facts).node))
            .unwrap_or(facts.node)
            .to_owned(),
        verdict,
        code: shown.code,
        service: shown.step,
        targets: shown.targets,
        ports: each,
        warnings: warnings(facts, question, &sources, compiled),
        assumptions: assumptions(facts),
        live: None,
        subjects: Subjects::default(),
    };
    if facts.rules {
        // The rules of other nodes are not those of the kernel here.
        let own = sources.iter().filter(|from| from.other.is_none());
        let from = own.map(|from| from.place.address);
        let to = destinations.iter().map(|place| place.address);
        let ends = rules::Ends::new(shown.family, from, to);
        rules::add(facts, &mut answer, &ends, &shown.port, compiled);
    }
    Ok(answer)
}

fn check_pairs(facts: &Facts, pairs: usize) -> Result<(), NameError> {
    match facts.most_pairs {
        Some(most) if pairs > most => Err(NameError::TooMany(pairs)),
        _ => Ok(()),
    }
}

/// Checks that a question is not too large for who answers it.
fn check_size(
    facts: &Facts,
    sources: &[Place],
    destinations: &[Place],
    ports: &[Ports],
) -> Result<(), NameError> {
    if facts.most_pairs.is_none() {
        return Ok(());
    }
    let check = |pairs| check_pairs(facts, pairs);
    let lengths = [sources.len(), destinations.len(), ports.len()];
    check(lengths.into_iter().fold(1, usize::saturating_mul))?;
    // A bare address may be a frontend with as many endpoints as a named service has.
    let targets = destinations.iter().flat_map(|place| {
        ports.iter().map(|port| {
            let to = port.at(place.address);
            service::endpoints(facts, &to).max(1)
        })
    });
    let targets = targets.fold(0, usize::saturating_add);
    check(targets.saturating_mul(sources.len()))
}

/// Adds an answer; joins it with the last one if both families, or ports that follow each other, have
/// the same.
fn add(answers: &mut Vec<OfPort>, answer: OfPort) {
    let is_same = |last: &&mut OfPort| {
        (last.verdict, last.code) == (answer.verdict, answer.code)
            && last.port.protocol == answer.port.protocol
            && last.step.action == answer.step.action
    };
    let Some(last) = answers.last_mut().filter(is_same) else {
        answers.push(answer);
        return;
    };
    if last.port == answer.port {
        last.family = None;
        last.targets.extend(answer.targets);
        return;
    }
    match (last.port.range, answer.port.range) {
        (Some((first, before)), Some((next, end)))
            if last.family == answer.family && before.checked_add(1) == Some(next) =>
        {
            last.port.range = Some((first, end));
        }
        _ => answers.push(answer),
    }
}

/// Describes an answer; `several` says that the question is about both families.
fn port_answer(answer: &OfPort, several: bool) -> PortAnswer {
    PortAnswer {
        port: answer.port.to_string(),
        protocol: protocol_name(answer.port.protocol),
        family: answer.family.filter(|_| several).map(family_name),
        verdict: answer.verdict,
        code: answer.code,
    }
}

fn family_name(family: Family) -> &'static str {
    match family {
        Family::V4 => "IPv4",
        Family::V6 => "IPv6",
    }
}

fn protocol_name(protocol: Option<Protocol>) -> String {
    protocol.map_or_else(|| "ICMP".to_owned(), |protocol| protocol.to_string())
}

/// Returns the addresses that the source connects to: of a service its own ones.
fn destinations(facts: &Facts, question: &Question) -> Result<Vec<Place>, NameError> {
    let End::Service(name) = &question.to else {
        return places(facts, &question.to);
    };
    let service = facts.store.service(name);
    let service = service.ok_or_else(|| no_service(facts, name))?;
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
        return Err(NameError::WithoutFrontend(name.clone()));
    }
    Ok(places)
}

/// A source, and the node whose rules its connections meet.
#[derive(Clone, Debug)]
struct Origin {
    place: Place,
    /// The node of the pod, if it is not the own one and its objects are known.
    other: Option<OtherNode>,
}

impl Origin {
    fn new(facts: &Facts, place: Place) -> Self {
        let node = service::node_of(facts, place.address);
        let node = node.map(|node| (**node).to_owned());
        let node = node.or_else(|| {
            facts
                .other_with(place.address)
                .map(|it| it.name().to_owned())
        });
        let elsewhere = node.filter(|node| *node != facts.node);
        Self {
            place,
            other: elsewhere.and_then(|node| facts.other_node(&node)),
        }
    }

    /// Returns the facts as the rules of its node have them.
    fn facts<'a>(&'a self, own: &Facts<'a>) -> Facts<'a> {
        self.other.as_ref().map_or(*own, |node| node.facts(own))
    }
}

/// Answers for one port: each source with each destination of its family.
fn of_port(
    facts: &Facts,
    sources: &[&Origin],
    destinations: &[&Place],
    family: Family,
    port: &Ports,
    compiled: &mut Compiled,
) -> OfPort {
    let mut step: Option<ServiceStep> = None;
    let mut refused: Option<(Verdict, Code)> = None;
    let mut targets: Vec<TargetAnswer> = Vec::new();
    for from in sources {
        let facts = from.facts(facts);
        let source = source_of(&facts, from.place.address);
        let of_source = service::node_of(&facts, source.address);
        let egress_of = |connection: &Connection, compiled: &mut Compiled| {
            decide(
                &facts,
                Direction::Egress,
                connection,
                &source,
                of_source,
                compiled,
            )
        };
        for destination in destinations {
            let to = port.at(destination.address);
            let judged = service::judge(&facts, &source, &to, compiled);
            let beyond = beyond(&facts, &source, &to, &judged, compiled);
            // What the source may not send does not reach the other node.
            let sent = beyond.as_ref().map(|_| {
                let connection = connection(&source, (to.address, to.port), port);
                egress_of(&connection, compiled)
            });
            let passes = sent
                .as_ref()
                .is_none_or(|it| it.verdict == Verdict::Allowed);
            let beyond = beyond.filter(|_| passes);
            let (judged, to_node) = match &beyond {
                Some((node, judged)) => (judged, Some(node)),
                None => (&judged, None),
            };
            if let Some(code) = judged.code {
                let verdict = match judged.step.action {
                    Action::Reject => Verdict::Refused,
                    Action::Drop | Action::Dnat | Action::None => Verdict::Dropped,
                };
                refused.get_or_insert((verdict, code));
            }
            for target in &judged.targets {
                let masquerade = judged.step.masquerade;
                let connection = connection(&source, *target, port);
                let mut egress = match (&sent, to_node) {
                    (Some(sent), Some(_)) => sent.clone(),
                    _ => egress_of(&connection, compiled),
                };
                let facts = to_node.map_or(facts, |node| node.facts(&facts));
                let client = to_node.map_or_else(|| source.clone(), |_| source.elsewhere());
                let pod = facts.policies.inventory().owner(connection.destination);
                let of_target = pod.and_then(|pod| pod.node.as_ref());
                let mut ingress =
                    ingress(&facts, &client, connection, masquerade, of_target, compiled);
                if judged.step.action == Action::None && is_bridged(&facts, &connection) {
                    pass(&mut egress);
                    pass(&mut ingress);
                }
                let mut target = target_answer(*target, pod, egress, ingress);
                target.source = (sources.len() > 1).then_some(source.address);
                targets.push(target);
            }
            step.get_or_insert_with(|| judged.step.clone());
        }
    }
    let verdicts = targets.iter().map(|target| target.verdict);
    let verdict = Verdict::of_all(verdicts.chain(refused.map(|(verdict, _)| verdict)));
    let denied = targets.iter().find(|it| it.verdict != Verdict::Allowed);
    let code = refused
        .map(|(_, code)| code)
        .or_else(|| denied.or(targets.first()).map(|target| target.code));
    OfPort {
        family: Some(family),
        port: port.clone(),
        verdict,
        code: code.unwrap_or(Code::PodUnknown),
        step: step.unwrap_or_default(),
        targets,
    }
}

/// Judges a connection to an address of another node, whose rules translate its NodePorts. Returns
/// `None` if they leave it alone or are not known.
fn beyond(
    facts: &Facts,
    source: &Source,
    to: &Destination,
    judged: &Judgement,
    compiled: &mut Compiled,
) -> Option<(OtherNode, Judgement)> {
    if judged.step.action != Action::None {
        return None;
    }
    let node = facts.other_with(to.address)?;
    let node = facts.other_node(node.name())?;
    let mut judged = service::judge(&node.facts(facts), &source.elsewhere(), to, compiled);
    if judged.step.action == Action::None {
        return None;
    }
    judged.step.node = Some(node.name.to_string());
    Some((node, judged))
}

fn connection(
    source: &Source,
    (address, number): (IpAddr, Option<u16>),
    port: &Ports,
) -> Connection {
    let family = Family::of(address);
    Connection {
        source: source.address,
        destination: address,
        protocol: port.protocol_number(family),
        port: number,
    }
}

/// Asks the policies of the destination. `masquerade` says that the packet leaves the node that
/// translates it with that node's address, which the rules of other nodes see; `of_target` is the node of
/// the destination.
fn ingress(
    facts: &Facts,
    source: &Source,
    mut connection: Connection,
    masquerade: bool,
    of_target: Option<&Arc<str>>,
    compiled: &mut Compiled,
) -> Decision {
    let node = facts.store.node();
    let family = Family::of(connection.destination);
    let seen = node.and_then(|node| node.primary_ip(family));
    let is_elsewhere = of_target.is_some_and(|it| **it != *facts.node);
    if let (true, true, Some(seen)) = (masquerade, is_elsewhere, seen) {
        connection.source = seen;
    }
    let client = Source {
        address: connection.source,
        ..source.clone()
    };
    decide(
        facts,
        Direction::Ingress,
        &connection,
        &client,
        of_target,
        compiled,
    )
}

/// Joins what the policies of both ends decide.
fn target_answer(
    (address, port): (IpAddr, Option<u16>),
    pod: Option<&Pod>,
    egress: Decision,
    ingress: Decision,
) -> TargetAnswer {
    let denying = [&egress, &ingress]
        .into_iter()
        .find(|it| it.verdict != Verdict::Allowed);
    // What says most about an allowed connection: that no rule sees it, or a rule.
    let with = |code| [&ingress, &egress].into_iter().find(|it| it.code == code);
    let saying_most = with(Code::BridgeUnfiltered).or(with(Code::PolicyRule));
    let deciding = denying.or(saying_most).unwrap_or(&ingress);
    TargetAnswer {
        source: None,
        family: family_name(Family::of(address)),
        address,
        port,
        pod: pod.map(|pod| pod.name.clone()),
        node: pod.and_then(|pod| pod.node.clone()),
        verdict: deciding.verdict,
        code: deciding.code,
        egress,
        ingress,
    }
}

/// Returns what is wrong with the objects of a question.
fn warnings(
    facts: &Facts,
    question: &Question,
    sources: &[Origin],
    compiled: &mut Compiled,
) -> Vec<String> {
    let mut warnings = Vec::new();
    let elsewhere: BTreeSet<String> = sources
        .iter()
        .filter(|from| from.other.is_none())
        .filter_map(|from| service::node_of(facts, from.place.address))
        .filter(|node| ***node != *facts.node)
        .map(|node| node.to_string())
        .collect();
    if !elsewhere.is_empty() {
        let nodes: Vec<String> = elsewhere.into_iter().collect();
        warnings.push(format!(
            "the source is on {}, whose rules translate services and are not known here; this is what those of {} would do",
            nodes.join(", "),
            facts.node
        ));
    }
    let name = match &question.to {
        End::Service(name) => Some(name),
        End::Address(address) => facts.store.with_cluster_ip(*address),
        End::Pod(_) | End::Workload(_) | End::Node | End::Internet => None,
    };
    let service = name.and_then(|name| facts.store.service(name));
    warnings.extend(service.and_then(|service| compiled.fault(facts, &service.name)));
    warnings.extend(node_port_elsewhere(facts, question));
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

/// Returns a warning if the destination may be a NodePort of another node, whose rules are not known.
fn node_port_elsewhere(facts: &Facts, question: &Question) -> Option<String> {
    let (End::Address(address), Some(PortName::Number(port))) = (&question.to, &question.port)
    else {
        return None;
    };
    let inventory = facts.policies.inventory();
    let own = facts.store.node().map(|node| &**node);
    let is_known = facts.others.is_some()
        || is_of_node(own, *address)
        || inventory.claimants(*address).next().is_some()
        || facts.store.with_cluster_ip(*address).is_some();
    let claim = Claim::NodePort(question.protocol()?, *port);
    let service = facts.store.owner(&claim).filter(|_| !is_known)?;
    Some(format!(
        "{port} is a NodePort of {service}: if {address} is another node, its rules decide, which are \
         not known here"
    ))
}

/// Returns what the facts lack.
fn assumptions(facts: &Facts) -> Vec<String> {
    let (pods, namespaces, _) = facts.policies.inventory().counts();
    let count = |kind| facts.store.count(kind);
    let mut lacking = Vec::new();
    if pods == 0 {
        lacking.push("no Pods: addresses belong to no pod, and no policy applies".to_owned());
    } else if namespaces == 0 {
        lacking
            .push("no Namespaces: namespaceSelectors see only the names of namespaces".to_owned());
    }
    if count(Kind::Service) == 0 {
        lacking.push("no Services: no address is one of a service".to_owned());
    } else if count(Kind::EndpointSlice) == 0 {
        lacking.push("no EndpointSlices: services have no endpoints".to_owned());
    }
    if !facts.has_node {
        lacking.push(format!(
            "no Node {}: the addresses of this host stand for those of the node",
            facts.node
        ));
    }
    lacking
}
