//! The share of each endpoint, computed from the compiled rules.

use std::collections::{BTreeMap, HashMap};

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

/// The probability that the packet has each priority at a place in the rules.
type Packets = BTreeMap<u32, f64>;

impl Walk<'_> {
    fn key(&self, selectors: &[Selector], priority: u32) -> Key {
        let mut key = Key::build();
        for selector in selectors {
            key = match selector {
                Selector::DestinationAddress => key.address(self.to),
                Selector::L4Protocol => key.protocol(Protocol::Tcp.number()),
                Selector::DestinationPort => key.port(self.port),
                Selector::Priority => key.number(priority),
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

    fn verdict(&self, map: &Name, key: &Key) -> Option<Verdict> {
        match self.value(map, key)? {
            Value::Verdict(verdict) => Some(verdict.clone()),
            other => panic!("{other:?} is no verdict"),
        }
    }

    /// Returns the packets that come back from a chain.
    fn chain(&mut self, name: &Name, mut packets: Packets) -> Packets {
        let table = self.table;
        for rule in &table.chains[name].rules {
            let mut next = Packets::new();
            for (priority, mass) in packets {
                for (priority, mass) in self.rule(&rule.statements, name, priority, mass) {
                    *next.entry(priority).or_default() += mass;
                }
            }
            packets = next;
        }
        packets
    }

    /// Returns the packets that go on behind a rule.
    fn rule(&mut self, rule: &[Statement], name: &Name, mut priority: u32, mass: f64) -> Packets {
        for (place, statement) in rule.iter().enumerate() {
            let verdict = match statement {
                Statement::PriorityByMap(key, map) => {
                    let Some(Value::Data(data)) = self.value(map, &self.key(key, 0)) else {
                        break;
                    };
                    priority = u32::from_ne_bytes(data.as_bytes().try_into().unwrap());
                    continue;
                }
                Statement::PriorityVerdict { mask, map } => {
                    let key = Key::build().number(priority & mask).finish();
                    self.verdict(map, &key)
                }
                Statement::SetPriority(value) => {
                    priority = *value;
                    continue;
                }
                Statement::RandomPriority(largest) => {
                    assert_eq!(place + 1, rule.len(), "{name}");
                    let each = mass / f64::from(*largest);
                    return (1..=*largest).map(|index| (index, each)).collect();
                }
                Statement::VerdictMap(key, map) => self.verdict(map, &self.key(key, priority)),
                Statement::DnatByMap(key, map) => {
                    let Some(Value::Data(target)) = self.value(map, &self.key(key, priority))
                    else {
                        break;
                    };
                    let target = target.as_bytes().to_vec();
                    *self.shares.entry(target).or_default() += mass;
                    return Packets::new();
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
                Statement::DestinationIsLocal
                | Statement::InSet(..)
                | Statement::SourceIsLocal
                | Statement::Match(..) => break,
                other => panic!("{other:?} is not expected in {name}"),
            };
            return match verdict {
                None => break,
                Some(Verdict::Jump(chain)) => self.chain(&chain, [(priority, mass)].into()),
                // Nothing that leads to a chain comes back to this one.
                Some(Verdict::Goto(chain)) => {
                    let rest = self.chain(&chain, [(priority, mass)].into());
                    self.lost += rest.values().sum::<f64>();
                    Packets::new()
                }
                Some(Verdict::Drop) => {
                    self.lost += mass;
                    Packets::new()
                }
                Some(other) => panic!("{other:?} is not expected in {name}"),
            };
        }
        [(priority, mass)].into()
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
            // The packet brings a priority of its own.
            let rest = walk.chain(&"services".into(), [(6, 1.0)].into());
            let case = format!("{endpoints} endpoints at {to}");
            assert!(rest.is_empty() && walk.lost < 1e-12, "{case}: {rest:?}");
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
        let packets = Packets::from([(priority, 1.0)]);
        assert_eq!(walk.chain(&"services".into(), packets.clone()), packets);
    }
}
