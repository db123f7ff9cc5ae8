use super::*;
use crate::insight::{Compiled, Facts, Question, Style, answer_text, explain};
use crate::model::{
    Endpoint, EndpointSlice, Event, Object, ObjectName, Protocol, Service, ServiceKind,
    ServicePort, SlicePort, TrafficPolicy,
};
use crate::policies::{self, Direction, PolicySettings};
use crate::services::{Marks, ServiceSettings, Store};

const CLIENT: &str = "10.244.1.12";

/// Answers a question of the client about a service with session affinity and some endpoints.
fn answer(endpoints: u8) -> Answer {
    let name = ObjectName::new("shop", "web");
    let service = Service {
        name: name.clone(),
        created: None,
        kind: ServiceKind::ClusterIp,
        cluster_ips: vec!["10.96.0.10".parse().unwrap()],
        ports: vec![ServicePort {
            name: "".into(),
            protocol: Protocol::Tcp,
            port: 80,
            node_port: None,
        }],
        external_ips: vec![],
        load_balancer_ips: vec![],
        source_ranges: vec![],
        external_policy: TrafficPolicy::Cluster,
        internal_policy: TrafficPolicy::Cluster,
        affinity_seconds: Some(600),
        health_check_node_port: None,
    };
    let slice = EndpointSlice {
        name: ObjectName::new("shop", "web-1"),
        service: name,
        created: None,
        family: Family::V4,
        ports: vec![SlicePort {
            name: "".into(),
            protocol: Protocol::Tcp,
            port: 8080,
        }],
        endpoints: (1..=endpoints)
            .map(|last| Endpoint {
                address: [10, 244, 1, last].into(),
                ready: true,
                serving: true,
                terminating: false,
                node: None,
                hints: None,
            })
            .collect(),
        triggered_at_ms: None,
    };
    let mut store = Store::default();
    for object in [Object::Service(service), Object::EndpointSlice(slice)] {
        store.apply(Event::Apply(object), &mut Marks::default());
    }
    let facts = Facts {
        store: &store,
        settings: &ServiceSettings::default(),
        policies: &policies::Engine::off(PolicySettings::default()),
        node: "node-1",
        has_node: true,
        rules: true,
        most_pairs: None,
        is_refused: &|_| false,
        unfiltered: &[],
        others: None,
    };
    let question = Question::new(CLIENT, "10.96.0.10:80").unwrap();
    explain(&facts, &question, &mut Compiled::default()).unwrap()
}

/// A kernel that has all rules but those whose text contains some word.
#[derive(Default)]
struct Fake {
    lacks: Option<&'static str>,
    bound: Option<Target>,
    connections: u32,
    packets: u64,
    asked: usize,
    fails: bool,
    lists_no_connections: bool,
}

impl KernelView for Fake {
    type Error = String;

    fn has(&mut self, part: &RulesetPart) -> Result<bool, String> {
        self.asked += 1;
        if self.fails {
            return Err("no access".into());
        }
        let text = format!("{} {:?}", part.object(), part.element());
        Ok(self.lacks.is_none_or(|lacks| !text.contains(lacks)))
    }

    fn affinity(&mut self, at: &ElementKey) -> Result<Option<(Target, Duration)>, String> {
        assert_eq!(at.1.as_str(), "affinity/shop");
        Ok(self
            .bound
            .map(|bound| (bound, Duration::from_millis(10_795_900))))
    }

    fn packets(&mut self, _: &ElementKey) -> Result<Option<u64>, String> {
        Ok(Some(self.packets))
    }

    fn connections(
        &mut self,
        pair: &Pair,
        each: &mut dyn FnMut(u32, TrackedConnection),
    ) -> Result<(), String> {
        if self.lists_no_connections {
            return Err("no module".into());
        }
        // The kernel may list a connection twice.
        for id in (0..self.connections).chain(0..self.connections) {
            let connection = TrackedConnection {
                state: "ESTABLISHED",
                client: format!("{}:{}", pair.client, 40_000 + id),
                endpoint: "10.244.1.2:8080".into(),
            };
            each(id, connection);
        }
        Ok(())
    }
}

fn text(answer: &Answer) -> String {
    let mut text = String::new();
    answer_text(answer, Style::default(), &mut text).unwrap();
    text
}

#[test]
fn the_kernel_agrees_if_it_has_all_parts() {
    let mut answer = answer(2);
    let mut kernel = Fake::default();
    add(&mut answer, 0, &mut kernel);
    let rules = answer.service.rules.as_ref().unwrap();
    assert!(rules.len() >= 6, "{rules:?}");
    assert!(rules.iter().all(|rule| rule.in_kernel == Some(true)));
    assert_eq!(kernel.asked, rules.len());
    let text = text(&answer);
    let line = format!(
        "kernel    AGREES      it has all {} chains and elements above",
        rules.len()
    );
    assert!(text.contains(&line), "{text}");
    assert!(
        text.contains("tracked   0           no connection"),
        "{text}"
    );
    assert_eq!(answer.live.unwrap().affinity, None);
}

#[test]
fn what_the_kernel_lacks_is_named() {
    let mut answer = answer(12);
    let mut kernel = Fake {
        // Not among the first, which are all that is shown otherwise.
        lacks: Some(". 0:c :"),
        ..Fake::default()
    };
    add(&mut answer, 3, &mut kernel);
    let text = text(&answer);
    let lines: Vec<&str> = text.lines().filter(|it| it.contains("NOT IN")).collect();
    assert_eq!(lines.len(), 1, "{text}");
    assert!(lines[0].contains("10.96.0.10 . tcp . 80 . 0:c : 10.244.1.12 . 8080"));
    assert!(text.contains("map endpoints: 1 more"), "{text}");
    let all = answer.service.rules.as_ref().unwrap().len();
    let line = format!(
        "DIFFERS     1 of {all} chains and elements above are not in it; 3 changes wait to be written"
    );
    assert!(text.contains(&line), "{text}");
}

#[test]
fn a_question_compares_a_bounded_number() {
    let mut answer = answer(250);
    let mut kernel = Fake::default();
    add(&mut answer, 0, &mut kernel);
    assert_eq!(kernel.asked, MOST_COMPARED);
    let all = answer.service.rules.as_ref().unwrap();
    let compared = all.iter().filter(|rule| rule.in_kernel.is_some()).count();
    assert_eq!(compared, MOST_COMPARED);
    let left = answer.live.as_ref().unwrap().not_compared;
    assert_eq!(compared + left, all.len());
    let text = text(&answer);
    assert!(
        text.contains(&format!("{left} more were not compared")),
        "{text}"
    );
}

#[test]
fn a_bound_client_has_one_endpoint() {
    let mut answer = answer(3);
    let endpoint = ("10.244.1.2".parse().unwrap(), 8080);
    let mut kernel = Fake {
        bound: Some(endpoint),
        connections: 7,
        ..Fake::default()
    };
    add(&mut answer, 0, &mut kernel);
    assert_eq!(answer.targets.len(), 1);
    assert_eq!(answer.targets[0].address, endpoint.0);
    assert_eq!(
        (answer.verdict, answer.code),
        (Verdict::Allowed, Code::Affinity)
    );
    let json = serde_json::to_value(&answer).unwrap();
    assert_eq!(json["code"], "AFFINITY");
    assert_eq!(json["live"]["affinity"]["endpoint"], "10.244.1.2:8080");
    assert_eq!(json["live"]["affinity"]["expiresSeconds"], 10_795);
    assert_eq!(json["live"]["connections"]["count"], 7);
    assert_eq!(
        json["live"]["connections"]["shown"]
            .as_array()
            .unwrap()
            .len(),
        MOST_SHOWN
    );
    let text = text(&answer);
    assert!(
        text.contains("the endpoint to which the client is bound;"),
        "{text}"
    );
    assert!(
        text.contains("affinity  BOUND       10.244.1.12 to 10.244.1.2:8080 for 10795 s more"),
        "{text}"
    );
    assert!(
        text.contains("10.244.1.12:40004 -> 10.244.1.2:8080, and 2 more"),
        "{text}"
    );
}

#[test]
fn an_endpoint_that_serves_no_more_leaves_the_others() {
    let mut answer = answer(3);
    let mut kernel = Fake {
        bound: Some(("10.244.1.129".parse().unwrap(), 8080)),
        ..Fake::default()
    };
    add(&mut answer, 0, &mut kernel);
    assert_eq!(answer.targets.len(), 3);
    assert_eq!(answer.code, Code::NoPolicy);
    assert!(answer.live.unwrap().affinity.is_some());
}

#[test]
fn counters_of_both_families_are_one_sum() {
    let mut answer = answer(1);
    let at = answer.subjects.pairs[0].affinity.clone().unwrap();
    for pod in ["shop/web-0", "shop/web-0", "shop/web-1"] {
        answer
            .subjects
            .counters
            .push(crate::insight::evidence::Counter {
                pod: pod.to_owned(),
                direction: Direction::Ingress,
                at: at.clone(),
            });
    }
    let mut kernel = Fake {
        packets: 4,
        ..Fake::default()
    };
    add(&mut answer, 0, &mut kernel);
    let text = text(&answer);
    assert!(
        text.contains("denied    8           packets of shop/web-0, ingress"),
        "{text}"
    );
    assert!(
        text.contains("denied    4           packets of shop/web-1, ingress"),
        "{text}"
    );
}

#[test]
fn a_kernel_that_cannot_be_read_is_a_warning() {
    let mut answer = answer(1);
    let mut kernel = Fake {
        fails: true,
        ..Fake::default()
    };
    add(&mut answer, 0, &mut kernel);
    assert_eq!(answer.live, None);
    assert_eq!(
        answer.warnings,
        ["what the kernel has is not shown: no access"]
    );
}

#[test]
fn the_rows_in_the_document_are_these() {
    let mut answer = answer(3);
    answer
        .subjects
        .counters
        .push(crate::insight::evidence::Counter {
            pod: "shop/web-0".to_owned(),
            direction: Direction::Ingress,
            at: answer.subjects.pairs[0].affinity.clone().unwrap(),
        });
    let mut kernel = Fake {
        bound: Some(("10.244.1.2".parse().unwrap(), 8080)),
        connections: 1,
        packets: 12,
        ..Fake::default()
    };
    add(&mut answer, 0, &mut kernel);
    let text = text(&answer);
    let (_, rows) = text.split_once("    kernel").unwrap();
    let (rows, _) = rows.split_once("\n\n").unwrap();
    let document = include_str!("../../../docs/insight.md");
    assert!(
        document.contains(&format!("```text\n    kernel{rows}\n```")),
        "{rows}"
    );
}

#[test]
fn a_kernel_without_connection_tracking_is_compared() {
    let mut answer = answer(1);
    let mut kernel = Fake {
        lists_no_connections: true,
        ..Fake::default()
    };
    add(&mut answer, 0, &mut kernel);
    let warnings = &answer.warnings;
    assert_eq!(*warnings, ["what the kernel has is not shown: no module"]);
    let text = text(&answer);
    assert!(text.contains("kernel    AGREES"), "{text}");
    assert!(text.contains("tracked   -           not counted"), "{text}");
}
