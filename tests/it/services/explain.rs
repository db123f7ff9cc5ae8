//! `nftlet explain` about services: what it says is what becomes of packets.

use std::io::ErrorKind;
use std::net::IpAddr;
use std::process::Command;
use std::thread;
use std::time::Duration;

use super::packets::{CIDR, DROPPED, ip, pod_addresses, serve, shop};
use crate::support::listing::Listing;
use crate::support::manifests::{Backend, Manifests, Service};
use nftlet_lab::netns::{Ask, Lab, LabOptions, Machine, require_net_admin};
use serde_json::{Value, json};

/// A service of all kinds of frontends, changed by a patch of its `spec`.
fn service(name: &str, last: u8, spec: Value) -> Service {
    let port = 30_000 + u16::from(last);
    let mut service = Service::new(name, last)
        .port("http", "TCP", 80, Some(port))
        .port("dns", "UDP", 53, Some(port))
        .patch(json!({ "spec": spec }));
    service.kind = "LoadBalancer".into();
    service.load_balancer_ips = vec![format!("203.0.113.{last}"), format!("2001:db8:1::{last:x}")];
    service
}

/// The node with services of all policies; the endpoints on node-2 do not exist.
fn open() -> (Lab, Manifests, Vec<IpAddr>) {
    let lab = Lab::new(LabOptions::default());
    let manifests = Manifests::new();
    let here = |pods: &[&Machine]| -> Vec<Backend> {
        let addresses = pod_addresses(pods).into_iter();
        addresses
            .map(|(address, _)| Backend::new(address, "node-1"))
            .collect()
    };
    let pods = lab.pods();
    let elsewhere = || {
        here(&pods)
            .into_iter()
            .map(|it| it.patch(json!({"nodeName": "node-2"})))
    };
    let local = json!({ "externalTrafficPolicy": "Local" });
    let internal = json!({ "internalTrafficPolicy": "Local" });
    let closed = json!({ "loadBalancerSourceRanges": ["192.0.2.0/24", "2001:db8:9::/64"] });
    let mut whole = shop();
    whole.name = "web".into();
    for (service, backends) in [
        (whole, here(&pods)),
        (service("local", 21, local.clone()), here(&pods[..1])),
        (service("far", 22, local.clone()), elsewhere().collect()),
        (service("inside", 23, internal.clone()), here(&pods[1..])),
        (service("inside-far", 24, internal), elsewhere().collect()),
        (service("closed", 25, closed), here(&pods)),
        (service("empty", 26, json!({})), Vec::new()),
        (service("empty-local", 27, local), Vec::new()),
        (
            service("leaving", 28, json!({})),
            here(&pods[..1])
                .into_iter()
                .map(Backend::terminating)
                .collect(),
        ),
    ] {
        manifests.service(&service);
        manifests.backends(&service, 8080, &backends);
    }
    manifests.program(lab.node().ns(), &CIDR);
    let mut addresses: Vec<IpAddr> = Vec::new();
    for last in [10, 21, 22, 23, 24, 25, 26, 27, 28, 99] {
        addresses.push(ip(&format!("10.96.0.{last}")));
        addresses.push(ip(&format!("fd00:10:96::{last:x}")));
        if (21..99).contains(&last) {
            addresses.push(ip(&format!("203.0.113.{last}")));
            addresses.push(ip(&format!("2001:db8:1::{last:x}")));
        }
    }
    addresses.extend(["198.51.100.7", "2001:db8:2::7"].map(ip));
    (lab, manifests, addresses)
}

/// What becomes of a request: its verdict in the words of the answers, and the client's address as
/// the server saw it.
fn sent(from: &Machine, ask: Ask) -> (&'static str, Option<IpAddr>, String) {
    from.ns.enter();
    match ask.send() {
        Ok(answer) => ("allowed", Some(answer.seen_client.ip()), answer.name),
        Err(error) if error.kind() == ErrorKind::ConnectionRefused => {
            ("refused", None, error.to_string())
        }
        Err(error) if error.kind() == ErrorKind::TimedOut => ("dropped", None, error.to_string()),
        // The node's own packets end before they leave: the kernel tells their sender so.
        Err(error) if error.kind() == ErrorKind::PermissionDenied => {
            ("ended", None, error.to_string())
        }
        Err(error) => ("failed", None, error.to_string()),
    }
}

#[test]
fn explanations_of_services_agree_with_packets() {
    if !require_net_admin() {
        return;
    }
    let (lab, manifests, addresses) = open();
    let pods = lab.pods();
    let _servers = serve(&pods);
    let node = &lab.node().machine;
    let sources: [&Machine; 4] = [pods[0], pods[2], node, lab.client()];
    let mut asked: Vec<(&Machine, IpAddr, Ask, String)> = Vec::new();
    let mut add = |from: usize, to: IpAddr, port: u16, udp: bool| {
        let from = sources[from];
        let ask = if udp {
            Ask::udp(to, port)
        } else {
            Ask::tcp(to, port)
        };
        let protocol = if udp { "UDP" } else { "TCP" };
        let at = std::net::SocketAddr::new(to, port);
        let source = from.address_like(to);
        asked.push((from, source, ask, format!("{source} {at}/{protocol}")));
    };
    for from in 0..sources.len() {
        for to in &addresses {
            add(from, *to, 80, false);
            add(from, *to, 53, true);
            if to.to_string().contains("96") {
                add(from, *to, 81, false);
                add(from, *to, 54, true);
            }
        }
        for to in node.addresses() {
            for port in [30_080, 30_021, 30_022, 30_023, 30_026, 30_027, 30_028] {
                add(from, to, port, false);
            }
        }
    }
    let batch = manifests.path().join("questions.txt");
    let questions: Vec<&str> = asked
        .iter()
        .map(|(.., question)| question.as_str())
        .collect();
    std::fs::write(&batch, questions.join("\n")).unwrap();
    let output = Command::new(env!("CARGO_BIN_EXE_nftlet"))
        .args(["explain", "--rules"])
        .args(manifests.arguments(&CIDR))
        .arg("--batch")
        .arg(&batch)
        .output()
        .unwrap();
    assert!(output.status.success(), "{output:?}");
    let text = String::from_utf8(output.stdout).unwrap();
    let answers: Vec<Value> = text
        .lines()
        .map(|line| serde_json::from_str(line).unwrap())
        .collect();
    assert_eq!(answers.len(), asked.len());
    assert!(answers.len() >= 500, "{}", answers.len());
    let rules = Listing::compiled(manifests.arguments(&CIDR));
    let named: usize = answers.iter().map(|it| rules.assert_names(it)).sum();
    assert!(named > answers.len(), "{named} chains and elements");
    let became: Vec<_> = thread::scope(|scope| {
        let threads: Vec<_> = asked
            .iter()
            .zip(&answers)
            .map(|((from, _, ask, _), answer)| {
                let waits = answer["verdict"] == "allowed";
                let timeout = if waits {
                    Duration::from_secs(10)
                } else {
                    DROPPED
                };
                let (from, ask) = (*from, ask.timeout(timeout));
                scope.spawn(move || sent(from, ask))
            })
            .collect();
        threads
            .into_iter()
            .map(|thread| thread.join().unwrap())
            .collect()
    });
    let mut different = Vec::new();
    let mut seen = std::collections::BTreeMap::new();
    for (((_, source, _, question), answer), (verdict, client, name)) in
        asked.iter().zip(&answers).zip(&became)
    {
        *seen.entry(*verdict).or_insert(0) += 1;
        let said = answer["verdict"].as_str().unwrap();
        let mut wrong = match *verdict {
            "ended" => !matches!(said, "refused" | "dropped"),
            verdict => said != verdict,
        };
        if let (Some(client), false) = (client, wrong) {
            // A pod that reaches itself through a service sees its node.
            let itself = pods
                .iter()
                .any(|pod| pod.name == *name && pod.address_like(*client) == *source);
            let kept = client == source;
            let masquerade = answer["service"]["masquerade"] == true;
            wrong =
                !itself && !lab.node().machine.addresses().contains(source) && kept == masquerade;
        }
        if wrong {
            let service = &answer["service"];
            different.push(format!(
                "{question}: {said}, but {verdict} {client:?} {name}: {service}"
            ));
        }
    }
    assert!(
        different.is_empty(),
        "{} differ:\n{}",
        different.len(),
        different.join("\n")
    );
    assert_eq!(seen.len(), 4, "{seen:?}");
}
