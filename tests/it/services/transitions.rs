//! Whatever a service turns into, its rules become those that a new process would write.
//!
//! The binary runs on a directory of manifests. After each change, what `nft` lists is compared
//! with a namespace that was programmed from scratch. Two things may differ, since they depend on
//! the way there: which endpoint has which index, and chains that wait to be used again.

use std::collections::{BTreeMap, BTreeSet};
use std::thread;
use std::time::{Duration, Instant};

use crate::support::manifests::{Backend, CLUSTER_CIDR, Manifests, Service};
use crate::support::objects::{slice_of, with};
use nftlet_lab::netns::{Daemon, Namespace, PATIENCE, require_net_admin};
use serde_json::{Value, json};

const FLAGS: [&str; 2] = ["--cluster-cidr", CLUSTER_CIDR];

/// A running nftlet, and its objects.
struct Bench {
    node: Namespace,
    manifests: Manifests,
    daemon: Daemon,
}

impl Bench {
    /// Two services that nothing happens to, and endpoints for the one that changes.
    fn start() -> Self {
        let manifests = Manifests::new();
        for (name, last) in [("other", 20), ("another", 21)] {
            let service = Service::new(name, last).port("http", "TCP", 80, None);
            manifests.service(&service);
            manifests.backends(&service, 8080, &backends(1..=3));
        }
        let node = Namespace::new("node-1");
        let daemon = manifests.run(&node, &FLAGS);
        Self {
            node,
            manifests,
            daemon,
        }
    }

    /// The rules in force become those of a fresh start.
    #[track_caller]
    fn settles(&self, what: &str) {
        let fresh = Namespace::new("fresh");
        self.manifests.program(&fresh, &FLAGS);
        let wanted = meaning(&fresh);
        let deadline = Instant::now() + PATIENCE;
        loop {
            let actual = meaning(&self.node);
            if actual == wanted {
                return;
            }
            if Instant::now() > deadline {
                let both = wanted.keys().chain(actual.keys()).collect::<BTreeSet<_>>();
                let differences = both
                    .into_iter()
                    .filter(|name| wanted.get(*name) != actual.get(*name))
                    .map(|name| {
                        let show = |of: &BTreeMap<String, Value>| {
                            of.get(name).map_or("nothing".to_owned(), Value::to_string)
                        };
                        format!(
                            "{name}\n  wanted {}\n  is     {}\n",
                            show(&wanted),
                            show(&actual)
                        )
                    });
                let differences: String = differences.collect();
                panic!("{what}:\n{differences}{}", self.daemon.log());
            }
            // So that the kernel has time for others than those who list its rules.
            thread::sleep(Duration::from_millis(5));
        }
    }

    /// Puts a service and waits for its rules.
    #[track_caller]
    fn becomes(&self, what: &str, service: &Service) {
        self.manifests.service(service);
        self.settles(what);
    }
}

impl Drop for Bench {
    fn drop(&mut self) {
        if !std::thread::panicking() {
            let log = self.daemon.log();
            assert!(!log.contains("ERROR"), "{log}");
        }
    }
}

fn backends(hosts: std::ops::RangeInclusive<u8>) -> Vec<Backend> {
    let both = |host: u8| [format!("10.244.1.{host}"), format!("fd00:10:244:1::{host}")];
    hosts
        .flat_map(both)
        .map(|address| Backend::new(address, "node-1"))
        .collect()
}

/// What `nft` lists, by kind, family and name, without handles and what depends on history.
fn meaning(node: &Namespace) -> BTreeMap<String, Value> {
    let listing: Value = serde_json::from_str(&node.nft(&["-j", "list", "ruleset"])).unwrap();
    let mut found: BTreeMap<String, Value> = BTreeMap::new();
    for object in listing["nftables"].as_array().unwrap() {
        let (kind, body) = object.as_object().unwrap().iter().next().unwrap();
        let text = |field: &str| body[field].as_str().unwrap_or_default().to_owned();
        let mut body = body.clone();
        body.as_object_mut().unwrap().remove("handle");
        match kind.as_str() {
            "metainfo" => {}
            "rule" => {
                let name = format!("rules {} {}", text("family"), text("chain"));
                let rules = found.entry(name).or_insert_with(|| json!([]));
                rules.as_array_mut().unwrap().push(body["expr"].clone());
            }
            _ => {
                if let Some(elements) = body.get_mut("elem").and_then(Value::as_array_mut) {
                    if text("name").ends_with("endpoints") {
                        forget_indexes(elements);
                    }
                    elements.sort_by_key(Value::to_string);
                    if elements.is_empty() {
                        body.as_object_mut().unwrap().remove("elem");
                    }
                }
                found.insert(format!("{kind} {} {}", text("family"), text("name")), body);
            }
        }
    }
    for family in ["ip", "ip6"] {
        forget_unused_draws(&mut found, family);
        let used = used_chains(&found, family);
        found.retain(|name, _| {
            let mut words = name.split(' ');
            let (kind, of, chain) = (words.next(), words.next(), words.next());
            let (true, Some(name)) = (of == Some(family), chain) else {
                return true;
            };
            if !matches!(kind, Some("chain" | "rules")) {
                // Sets of a namespace are there with the chain that asks who is remembered, those of
                // source ranges with the chain that lets them in.
                let namespace = name.split_once('/');
                return match namespace {
                    Some((_, of)) => used.contains(&format!("sticky/{of}")),
                    None => !name.starts_with("sources-") || used.contains(name),
                };
            }
            !is_shared(name) || used.contains(name)
        });
    }
    found
}

/// Removes the chains that draw indexes if there are no frontends.
fn forget_unused_draws(found: &mut BTreeMap<String, Value>, family: &str) {
    let maps = ["frontends", "nodeports"].map(|map| format!("map {family} {map}"));
    if maps.iter().any(|map| found[map].get("elem").is_some()) {
        return;
    }
    for map in ["draw", "draw-filled"] {
        let map = found.get_mut(&format!("map {family} {map}"));
        map.and_then(Value::as_object_mut).unwrap().remove("elem");
    }
    let [chains, rules] = ["chain", "rules"].map(|kind| format!("{kind} {family} draw-"));
    found.retain(|name, _| !name.starts_with(&chains) && !name.starts_with(&rules));
}

fn is_shared(chain: &str) -> bool {
    chain.starts_with("sources-") || chain.contains('/') || OF_AFFINITY.contains(&chain)
}

/// What exists while some service has session affinity.
const OF_AFFINITY: [&str; 3] = ["learn-prerouting", "learn-output", "learn-new"];

/// Keeps the indexes that a frontend has and its endpoints, but not which belongs to which.
fn forget_indexes(elements: &mut [Value]) {
    let parts = |element: &Value| {
        let key = element[0]["concat"].as_array().unwrap().clone();
        let index = key.last().and_then(Value::as_str).unwrap();
        let index = usize::from_str_radix(index.strip_prefix("0:").unwrap(), 16).unwrap();
        (format!("{:?}", &key[..key.len() - 1]), index)
    };
    let mut targets: BTreeMap<String, Vec<Value>> = BTreeMap::new();
    for element in elements.iter() {
        targets
            .entry(parts(element).0)
            .or_default()
            .push(element[1].clone());
    }
    targets
        .values_mut()
        .for_each(|of| of.sort_by_key(Value::to_string));
    for element in elements {
        let (frontend, index) = parts(element);
        element[1] = targets[&frontend]
            .get(index - 1)
            .cloned()
            .unwrap_or(Value::Null);
    }
}

/// The shared chains that verdicts lead to, directly or not.
fn used_chains(found: &BTreeMap<String, Value>, family: &str) -> BTreeSet<String> {
    fn targets(value: &Value, into: &mut Vec<String>) {
        match value {
            Value::Object(fields) => {
                into.extend(
                    fields
                        .get("target")
                        .and_then(Value::as_str)
                        .map(str::to_owned),
                );
                fields.values().for_each(|value| targets(value, into));
            }
            Value::Array(values) => values.iter().for_each(|value| targets(value, into)),
            _ => {}
        }
    }
    let mut next = Vec::new();
    for (name, body) in found {
        if name.starts_with(&format!("map {family} ")) {
            targets(body, &mut next);
        }
    }
    let mut used = BTreeSet::new();
    while let Some(chain) = next.pop() {
        if let Some(rules) = found.get(&format!("rules {family} {chain}"))
            && !used.contains(&chain)
        {
            targets(rules, &mut next);
        }
        if chain.starts_with("learn-") {
            used.extend(OF_AFFINITY.map(str::to_owned));
        }
        used.insert(chain);
    }
    used
}

fn plain() -> Service {
    Service::new("web", 10)
        .port("http", "TCP", 80, None)
        .port("dns", "UDP", 53, None)
}

/// The service as each type, with the fields that the API server would leave it.
fn of_type(kind: &str) -> Service {
    let mut web = Service::new("web", 10);
    let node_ports = matches!(kind, "NodePort" | "LoadBalancer");
    web = web
        .port("http", "TCP", 80, node_ports.then_some(30080))
        .port("dns", "UDP", 53, node_ports.then_some(30053));
    web.kind = kind.to_owned();
    match kind {
        "LoadBalancer" => {
            web.load_balancer_ips = vec!["203.0.113.10".into(), "2001:db8:1::10".into()];
            web.external_ips = vec!["198.51.100.7".into()];
            web.patch(json!({"spec": {
                "loadBalancerSourceRanges": ["192.168.0.0/16", "fd00::/16"],
                "externalTrafficPolicy": "Local",
            }}))
        }
        "ExternalName" => {
            web.cluster_ips.clear();
            web.patch(json!({"spec": {
                "externalName": "example.com", "clusterIP": null, "clusterIPs": null,
            }}))
        }
        "Headless" => {
            web.kind = "ClusterIP".into();
            web.cluster_ips = vec!["None".into()];
            web
        }
        _ => web,
    }
}

#[test]
fn a_service_changes_its_type_in_every_direction() {
    if !require_net_admin() {
        return;
    }
    let bench = Bench::start();
    bench.manifests.backends(&plain(), 8080, &backends(11..=13));
    let kinds = [
        "ClusterIP",
        "NodePort",
        "LoadBalancer",
        "ExternalName",
        "Headless",
    ];
    for from in kinds {
        for to in kinds.into_iter().filter(|to| *to != from) {
            bench.becomes(from, &of_type(from));
            bench.becomes(&format!("{from} to {to}"), &of_type(to));
        }
    }
    bench.manifests.remove("Service", "web");
    bench.settles("the service is removed");
    bench.becomes("the service is back", &of_type("LoadBalancer"));
}

#[test]
fn addresses_and_ports_change() {
    if !require_net_admin() {
        return;
    }
    let bench = Bench::start();
    bench.manifests.backends(&plain(), 8080, &backends(11..=13));
    bench.becomes("at first", &plain());
    let mut moved = plain();
    moved.cluster_ips = vec!["10.96.0.77".into(), "fd00:10:96::77".into()];
    bench.becomes("other ClusterIPs", &moved);
    let mut single = plain();
    single.cluster_ips.truncate(1);
    bench.becomes("one family", &single);
    single.cluster_ips = vec!["fd00:10:96::a".into()];
    bench.becomes("the other family", &single);
    bench.becomes("both families", &plain());
    let ports = |list: Value| plain().patch(json!({"spec": {"ports": list}}));
    for (what, list) in [
        (
            "another number",
            json!([{"name": "http", "port": 8000}, {"name": "dns", "port": 53, "protocol": "UDP"}]),
        ),
        (
            "numbers swapped",
            json!([{"name": "http", "port": 53}, {"name": "dns", "port": 80, "protocol": "UDP"}]),
        ),
        (
            "another protocol",
            json!([{"name": "http", "port": 80, "protocol": "SCTP"}]),
        ),
        ("another name", json!([{"name": "web", "port": 80}])),
        (
            "one less",
            json!([{"name": "dns", "port": 53, "protocol": "UDP"}]),
        ),
        (
            "many",
            json!([
                {"name": "http", "port": 80}, {"name": "dns", "port": 53, "protocol": "UDP"},
                {"name": "dns", "port": 53}, {"name": "http", "port": 81},
            ]),
        ),
    ] {
        bench.becomes(what, &ports(list));
    }
    let mut node_port = of_type("NodePort");
    bench.becomes("NodePorts", &node_port);
    node_port = node_port.port("http", "TCP", 80, Some(31080));
    bench.becomes("another NodePort", &node_port);
    // An address that another service has had.
    let mut heir = plain();
    heir.cluster_ips = vec!["10.96.0.20".into()];
    bench.becomes("the address of an older one", &heir);
    bench.manifests.remove("Service", "other");
    bench.settles("the address is inherited");
}

#[test]
fn policies_affinity_ranges_and_addresses_change() {
    if !require_net_admin() {
        return;
    }
    let bench = Bench::start();
    let balancer = of_type("LoadBalancer");
    bench
        .manifests
        .backends(&balancer, 8080, &backends(11..=13));
    let with = |fields: Value| of_type("LoadBalancer").patch(json!({"spec": fields}));
    let affinity = |seconds: u32| {
        json!({
            "sessionAffinity": "ClientIP",
            "sessionAffinityConfig": {"clientIP": {"timeoutSeconds": seconds}},
        })
    };
    for (what, fields) in [
        ("unchanged", json!({})),
        (
            "external Cluster",
            json!({"externalTrafficPolicy": "Cluster"}),
        ),
        ("external Local", json!({"externalTrafficPolicy": "Local"})),
        ("internal Local", json!({"internalTrafficPolicy": "Local"})),
        ("affinity", affinity(100)),
        ("another timeout", affinity(200)),
        ("no affinity", json!({})),
        (
            "other ranges",
            json!({"loadBalancerSourceRanges": ["10.0.0.0/8", "10.1.0.0/16"]}),
        ),
        (
            "overlapping ranges",
            json!({"loadBalancerSourceRanges": ["10.1.0.0/16", "10.0.0.0/9"]}),
        ),
        (
            "everyone",
            json!({"loadBalancerSourceRanges": ["0.0.0.0/0"]}),
        ),
        ("no ranges", json!({"loadBalancerSourceRanges": null})),
        (
            "the node inside",
            json!({"loadBalancerSourceRanges": ["192.168.10.0/24"]}),
        ),
        (
            "other external addresses",
            json!({"externalIPs": ["198.51.100.8", "2001:db8:2::8"]}),
        ),
        ("none", json!({"externalIPs": null})),
    ] {
        bench.becomes(what, &with(fields));
    }
    let ingress = |list: Value| {
        let status = json!({"status": {"loadBalancer": {"ingress": list}}});
        of_type("LoadBalancer").patch(status)
    };
    bench.becomes(
        "mode Proxy",
        &ingress(json!([{"ip": "203.0.113.10", "ipMode": "Proxy"}])),
    );
    bench.becomes("no address yet", &ingress(json!([])));
    bench.becomes(
        "two of a family",
        &ingress(json!([{"ip": "203.0.113.10"}, {"ip": "203.0.113.11"}])),
    );
    // The ClusterIP is a load balancer's address as well.
    bench.becomes("two roles", &ingress(json!([{"ip": "10.96.0.10"}])));
}

#[test]
fn slices_change_come_and_go() {
    if !require_net_admin() {
        return;
    }
    let bench = Bench::start();
    let web = of_type("LoadBalancer");
    bench.becomes("no slices", &web);
    let steps: [(&str, Vec<Backend>); 7] = [
        ("three", backends(11..=13)),
        ("five", backends(11..=15)),
        ("others", backends(14..=16)),
        ("one", backends(15..=15)),
        (
            "elsewhere",
            backends(15..=17)
                .into_iter()
                .map(|b| b.patch(json!({"nodeName": "node-2"})))
                .collect(),
        ),
        (
            "leaving",
            backends(15..=17)
                .into_iter()
                .map(Backend::terminating)
                .collect(),
        ),
        ("none", vec![]),
    ];
    for (what, backends) in steps {
        bench.manifests.backends(&web, 8080, &backends);
        bench.settles(what);
    }
    bench.manifests.backends(&web, 8080, &backends(11..=13));
    bench.manifests.backends(&web, 9090, &backends(11..=13));
    bench.settles("another target port");
    for family in ["v4", "v6"] {
        bench
            .manifests
            .remove("EndpointSlice", &format!("web-{family}"));
    }
    bench.settles("no slices again");
}

fn slice(name: &str, service: &str, hosts: std::ops::RangeInclusive<u8>) -> Value {
    let endpoints =
        hosts.map(|host| json!({"addresses": [format!("10.244.1.{host}")], "nodeName": "node-1"}));
    with(
        slice_of(name, service, endpoints.collect()),
        json!({"ports": [
            {"name": "http", "port": 8080},
            {"name": "dns", "port": 5353, "protocol": "UDP"},
        ]}),
    )
}

#[test]
fn slices_move_between_services() {
    if !require_net_admin() {
        return;
    }
    let bench = Bench::start();
    bench.becomes("at first", &plain());
    bench.manifests.put(&slice("wanderer", "web", 31..=33));
    bench.settles("with web");
    bench.manifests.put(&slice("wanderer", "other", 31..=33));
    bench.settles("with other");
    bench.manifests.put(&slice("wanderer", "nobody", 31..=33));
    bench.settles("without endpoints");
    bench.manifests.put(&slice("wanderer", "another", 32..=34));
    bench.settles("with another, changed");
    bench.manifests.put(&slice("settler", "another", 33..=36));
    bench.settles("overlapping");
    bench.manifests.put(&slice("wanderer", "web", 33..=36));
    bench.settles("the same endpoints in two services");
    bench.manifests.remove("EndpointSlice", "settler");
    bench.settles("one of them gone");
    bench.manifests.remove("Service", "web");
    bench.settles("without its service");
    bench.becomes("with its service again", &plain());
}
