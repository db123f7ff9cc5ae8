//! Random clusters with real packets: nftlet runs on two nodes, and who reaches whom is what the
//! API's text allows.

use std::net::IpAddr;
use std::path::Path;
use std::thread;

use crate::support::policy::generate::{self, Random, Shape};
use crate::support::policy::oracle::{self, Cluster, allowed};
use crate::support::reach;
use crate::support::reach::{Case, Probe, check, check_counted};
use nftlet_lab::netns::{Lab, LabOptions, Machine, Namespace, Protocol, Server, require_net_admin};

/// The addresses of the laboratory.
const SHAPE: Shape = Shape {
    nodes: 2,
    slots: 3,
    pods: 8,
    policies: 4,
    cluster_policies: 4,
    faults: 5,
};
const SERVED: [u16; 3] = [53, 80, 8080];
const CASES: u64 = 15;
const CHANGES: usize = 2;
const ASKED: usize = 28;

/// The network, with servers everywhere.
struct Net {
    lab: Lab,
    _servers: Vec<Server>,
}

impl Net {
    fn new() -> Self {
        let lab = Lab::new(LabOptions {
            nodes: SHAPE.nodes,
            pods_per_node: SHAPE.slots,
            clients: 1,
        });
        let machines = machines(&lab);
        let servers: Vec<Server> = machines
            .iter()
            .flat_map(|machine| {
                SERVED.into_iter().flat_map(|port| {
                    let protocols = [Protocol::Tcp, Protocol::Udp];
                    protocols.map(|protocol| machine.serve(protocol, port))
                })
            })
            .flatten()
            .collect();
        machines.iter().for_each(reach::allow_ping);
        Self {
            lab,
            _servers: servers,
        }
    }

    fn nodes(&self) -> Vec<&Namespace> {
        self.lab.nodes.iter().map(|node| node.ns()).collect()
    }

    fn at(&self, address: IpAddr) -> Option<Machine> {
        let mut machines = machines(&self.lab).into_iter();
        machines.find(|machine| machine.addresses().contains(&address))
    }

    /// Programs all nodes with these objects.
    fn program(&self, directory: &Path, cluster: &Cluster) {
        let file = directory.join("all.json");
        let list = serde_json::json!({
            "apiVersion": "v1", "kind": "List", "items": generate::manifests(cluster),
        });
        std::fs::write(&file, list.to_string()).expect("a manifest");
        thread::scope(|scope| {
            for node in &self.lab.nodes {
                let file = &file;
                scope.spawn(move || {
                    let output = node
                        .ns()
                        .command(env!("CARGO_BIN_EXE_nftlet"))
                        .args(["--once", "--allow-empty"])
                        .args(["--hostname-override", &node.machine.name])
                        .arg("--manifests")
                        .arg(file)
                        .output()
                        .expect("nftlet runs");
                    let said = String::from_utf8_lossy(&output.stderr);
                    assert!(output.status.success(), "{}: {said}", node.machine.name);
                });
            }
        });
    }

    /// The text of `--dry-run` means the same to `nft` as what was written means to the kernel.
    fn compare_text(&self, directory: &Path) {
        let node = &self.lab.nodes[0];
        let output = node
            .ns()
            .command(env!("CARGO_BIN_EXE_nftlet"))
            .args(["--dry-run", "--hostname-override", &node.machine.name])
            .arg("--manifests")
            .arg(directory.join("all.json"))
            .output()
            .expect("nftlet runs");
        let text = String::from_utf8(output.stdout).expect("UTF-8");
        let loaded = Namespace::new("loaded");
        loaded.nft_load(&text);
        let rules = |ns: &Namespace| -> Vec<String> {
            let listing = ns.nft(&["list", "ruleset"]);
            // A counter that has counted is no difference. Chains, sets and elements are listed
            // in any order.
            let parts = listing.split(['\n', ',']).map(|part| {
                let part = part.trim().trim_start_matches("elements = { ");
                let element = part.split(" packets ").next().unwrap_or_default();
                element.trim_end_matches(" }").to_owned()
            });
            let mut parts: Vec<String> = parts.collect();
            parts.sort();
            parts
        };
        assert_eq!(rules(&loaded), rules(node.ns()), "{text}");
    }

    /// Connections between machines of the network, with what the API says of them. Counts those
    /// that cluster policies deny, and allow.
    fn cases(&self, random: &mut Random, cluster: &Cluster, by_tier: &mut [usize; 2]) -> Vec<Case> {
        let untiered = Cluster {
            cluster_policies: Vec::new(),
            ..cluster.clone()
        };
        let mut cases = Vec::new();
        while cases.len() < ASKED {
            let (source, to, protocol, port) = generate::connection(random, &SHAPE, cluster);
            let probe = match protocol {
                oracle::Protocol::Tcp => Probe::Tcp(port),
                oracle::Protocol::Udp => Probe::Udp(port),
                oracle::Protocol::Icmp => Probe::Ping,
                oracle::Protocol::Sctp => continue,
            };
            let served = probe == Probe::Ping || SERVED.contains(&port);
            if let Some(from) = self.at(source)
                && self.at(to).is_some()
                && served
            {
                // The host sees nothing of a pod that reaches its own address.
                let passes = source == to || allowed(cluster, source, to, protocol, port);
                let without = source == to || allowed(&untiered, source, to, protocol, port);
                // Most pass; what is denied is asked for rather.
                if passes && without && random.percent(60) && !cluster.policies.is_empty() {
                    continue;
                }
                if passes != without {
                    by_tier[usize::from(passes)] += 1;
                }
                cases.push(Case {
                    from,
                    to,
                    probe,
                    passes,
                });
            }
        }
        cases
    }
}

fn machines(lab: &Lab) -> Vec<Machine> {
    let nodes = lab.nodes.iter().map(|node| &node.machine);
    let all = nodes.chain(lab.pods()).chain(&lab.clients);
    all.cloned().collect()
}

#[test]
fn packets_of_random_clusters_agree_with_the_api() {
    if !require_net_admin() {
        return;
    }
    let net = Net::new();
    let directory = tempfile::tempdir().expect("a directory");
    let (mut passed, mut denied, mut by_tier) = (0, 0, [0, 0]);
    let mut asked: Vec<Case> = Vec::new();
    for seed in 0..CASES {
        let mut random = Random::new(seed);
        let mut cluster = generate::cluster(&mut random, &SHAPE);
        for change in 0..=CHANGES {
            net.program(directory.path(), &cluster);
            net.compare_text(directory.path());
            let cases = net.cases(&mut random, &cluster, &mut by_tier);
            passed += cases.iter().filter(|case| case.passes).count();
            denied += cases.iter().filter(|case| !case.passes).count();
            println!("seed {seed}, change {change}");
            check_counted(&net.nodes(), &cases);
            asked.extend(cases.into_iter().filter(|case| !case.passes));
            generate::mutate(&mut random, &SHAPE, &mut cluster);
            // Each run of nftlet begins without a memory.
            cluster.departed.clear();
        }
    }
    println!("{passed} requests passed, {denied} were denied; {by_tier:?} by cluster policies");
    assert!(passed > 200 && denied > 200, "{passed} and {denied}");
    assert!(by_tier[0] > 100 && by_tier[1] > 20, "{by_tier:?}");
    // Without policies every one of the denied is answered.
    net.program(directory.path(), &Cluster::default());
    asked.iter_mut().for_each(|case| case.passes = true);
    asked.chunks(ASKED).for_each(check);
    for node in net.nodes() {
        assert!(!node.nft(&["list", "ruleset"]).contains("nftlet-policy"));
    }
}
