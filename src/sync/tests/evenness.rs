//! The share of each endpoint, computed from the compiled rules.

use std::collections::HashMap;

use super::*;
use crate::nft::{Comparison, Selector, Statement, Table, Value, Verdict};
use crate::services::{self, Store};

/// A packet from another host.
struct Walk<'a> {
    table: &'a Table,
    to: IpAddr,
    port: u16,
    /// Whether the destination is an address of the node.
    local: bool,
    /// The probability that the packet reaches each endpoint.
    shares: HashMap<Vec<u8>, f64>,
    /// The probability that it is dropped or rejected.
    lost: f64,
}

/// The way out of a chain: the probability that the packet returns, and its priority then.
struct Rest {
    mass: f64,
    priority: u32,
}

impl Walk<'_> {
    fn key(&self, selectors: &[Selector], index: Option<u32>) -> Key {
        let mut key = Key::build();
        for selector in selectors {
            key = match selector {
                Selector::DestinationAddress => key.address(self.to),
                Selector::L4Protocol => key.protocol(Protocol::Tcp.number()),
                Selector::DestinationPort => key.port(self.port),
                Selector::RandomIndex { .. } => key.number(index.unwrap()),
                other => panic!("{other:?} is not expected"),
            };
        }
        key.finish()
    }

    fn value(&self, map: &Name, key: &Key) -> Option<&Value> {
        let elements = &self.table.sets[map].elements;
        let place = elements.binary_search_by(|element| element.key.cmp(key));
        place.ok().map(|place| &elements[place].value)
    }

    fn number(&self, map: &Name, key: &Key) -> Option<u32> {
        match self.value(map, key)? {
            Value::Data(data) => Some(u32::from_ne_bytes(data.as_bytes().try_into().unwrap())),
            other => panic!("{other:?} is no number"),
        }
    }

    fn verdict(&self, map: &Name, key: &Key) -> Option<Verdict> {
        match self.value(map, key)? {
            Value::Verdict(verdict) => Some(verdict.clone()),
            other => panic!("{other:?} is no verdict"),
        }
    }

    fn chain(&mut self, name: &Name, mut rest: Rest) -> Rest {
        let table = self.table;
        for rule in &table.chains[name].rules {
            for statement in &*rule.statements {
                let verdict = match statement {
                    Statement::PriorityByMap(key, map) => {
                        let Some(number) = self.number(map, &self.key(key, None)) else {
                            break;
                        };
                        rest.priority = number;
                        continue;
                    }
                    Statement::PriorityVerdict { mask, map } => {
                        let key = Key::build().number(rest.priority & mask).finish();
                        self.verdict(map, &key)
                    }
                    Statement::ClearPriority => {
                        rest.priority = 0;
                        continue;
                    }
                    Statement::VerdictMap(key, map) => self.verdict(map, &self.key(key, None)),
                    Statement::DnatByMap(key, map) => {
                        assert_eq!(rest.priority, 0, "it leaves with a priority: {name}");
                        rest.mass = self.translate(key, map, rest.mass);
                        None
                    }
                    Statement::Verdict(verdict) => Some(verdict.clone()),
                    Statement::Reject(_) => Some(Verdict::Drop),
                    Statement::SetMarkBits(_) => continue,
                    Statement::DestinationIsLocal if self.local => continue,
                    Statement::InSet(key, Comparison::Is, _)
                        if self.local && *key == [Selector::DestinationAddress] =>
                    {
                        continue;
                    }
                    // The client is in none of the sets.
                    Statement::InSet(_, Comparison::IsNot, _) => continue,
                    Statement::InSet(..) | Statement::SourceIsLocal | Statement::Match(..) => break,
                    other => panic!("{other:?} is not expected in {name}"),
                };
                match verdict {
                    None => break,
                    Some(Verdict::Jump(chain)) => {
                        rest = self.chain(&chain, rest);
                        break;
                    }
                    Some(Verdict::Goto(chain)) => return self.chain(&chain, rest),
                    Some(Verdict::Drop) => {
                        self.lost += rest.mass;
                        return Rest { mass: 0.0, ..rest };
                    }
                    Some(other) => panic!("{other:?} is not expected in {name}"),
                }
            }
        }
        rest
    }

    /// Divides the probability among the drawn indexes. Returns that of those without an endpoint.
    fn translate(&mut self, key: &[Selector], map: &Name, mass: f64) -> f64 {
        let Some(Selector::RandomIndex { modulus }) = key.last() else {
            panic!("{map} is not drawn from");
        };
        let each = mass / f64::from(*modulus);
        let mut missed = 0.0;
        for index in 0..*modulus {
            let key = self.key(key, Some(index));
            match self.value(map, &key) {
                Some(Value::Data(target)) => {
                    let target = target.as_bytes().to_vec();
                    *self.shares.entry(target).or_default() += each;
                }
                _ => missed += each,
            }
        }
        missed
    }
}

/// A load balancer with a NodePort; every other endpoint is on this node.
fn cluster_of(endpoints: u32, policy: TrafficPolicy) -> Ruleset {
    let mut web = service("web", &["10.96.0.10"], &[80]);
    web.kind = ServiceKind::NodePort;
    web.ports[0].node_port = Some(30_080);
    web.load_balancer_ips = vec!["203.0.113.10".parse().unwrap()];
    web.external_policy = policy;
    let mut slice = slice("web-1", &web, Family::V4, &[]);
    slice.endpoints = (0..endpoints)
        .map(|number| Endpoint {
            address: IpAddr::V4(
                (u32::from(std::net::Ipv4Addr::new(10, 244, 0, 0)) + number).into(),
            ),
            ready: true,
            serving: true,
            terminating: false,
            node: Some(if number % 2 == 0 { "node-1" } else { "node-2" }.into()),
            hints: None,
        })
        .collect();
    let (mut store, mut marks) = (Store::default(), services::Marks::default());
    for event in [put(node()), put(web), put(slice)] {
        store.apply(event, &mut marks);
    }
    services::wanted(&store, &Bench::new().settings).0
}

#[test]
fn every_endpoint_gets_its_share_within_one_percent() {
    use TrafficPolicy::{Cluster, Local};
    for endpoints in (1u32..=130).chain([1000]) {
        for (policy, to, port, among) in [
            (Cluster, "10.96.0.10", 80, endpoints),
            (Cluster, "192.168.10.1", 30_080, endpoints),
            (Local, "203.0.113.10", 80, endpoints.div_ceil(2)),
            (Local, "192.168.10.1", 30_080, endpoints.div_ceil(2)),
        ] {
            let ruleset = cluster_of(endpoints, policy);
            let mut walk = Walk {
                table: &ruleset.tables[&table_id(Family::V4)],
                to: to.parse().unwrap(),
                port,
                local: port == 30_080,
                shares: HashMap::new(),
                lost: 0.0,
            };
            let at_first = Rest {
                mass: 1.0,
                // The packet brings a priority of its own.
                priority: 6,
            };
            let rest = walk.chain(&"services".into(), at_first);
            let case = format!("{endpoints} endpoints at {to}");
            assert!(rest.mass + walk.lost < 1e-12, "{case}: {}", rest.mass);
            assert_eq!(walk.shares.len(), among as usize, "{case}");
            for share in walk.shares.values() {
                let of_equal = share * f64::from(among);
                assert!((0.99..=1.01).contains(&of_equal), "{case}: {of_equal}");
            }
        }
    }
}

#[test]
fn a_packet_without_a_frontend_is_not_judged_by_its_own_priority() {
    let ruleset = cluster_of(3, TrafficPolicy::Cluster);
    for priority in [0, 0x0001_0003, 0x0002_0003, 0x0008_0000] {
        let mut walk = Walk {
            table: &ruleset.tables[&table_id(Family::V4)],
            to: "10.96.0.10".parse().unwrap(),
            port: 81,
            local: false,
            shares: HashMap::new(),
            lost: 0.0,
        };
        let mass = 1.0;
        let rest = walk.chain(&"services".into(), Rest { mass, priority });
        assert_eq!((rest.mass, rest.priority), (mass, priority));
    }
}
