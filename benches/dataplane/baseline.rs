//! The same services as kube-proxy 1.36 puts them into nftables: text for `nft -f -`.
//!
//! A chain for every service port, whose one rule holds an anonymous map of its endpoints; a
//! second chain where the service can be reached from outside; maps that lead to these chains.
//! Only IPv4 is written, and new chains are not flushed first as kube-proxy does: where the
//! shape could be costlier, the cheaper form was taken.

#![allow(dead_code, reason = "each benchmark uses its own part")]

use std::fmt::Write;
use std::os::unix::process::ExitStatusExt;
use std::process::{Command, Stdio};
use std::time::{Duration, Instant};

use nftlet::model::Service;
use nix::sys::resource::{UsageWho, getrusage};

use crate::netns::Namespace;
use crate::workload::{NODE, NODE_IP, POD_CIDR, SERVICE_CIDR, Workload};

const TABLE: &str = "ip kube-proxy";
/// How long all services may take. Their time grows with the square of their number.
pub const PATIENCE: Duration = Duration::from_secs(300);

/// What does not depend on services.
const SKELETON: &str = "
set cluster-ips { type ipv4_addr; }
set nodeport-ips { type ipv4_addr; }
set hairpin-connections { type ipv4_addr . ipv4_addr . inet_proto . inet_service; }
map no-endpoint-services { type ipv4_addr . inet_proto . inet_service : verdict; }
map no-endpoint-nodeports { type inet_proto . inet_service : verdict; }
map firewall-ips { type ipv4_addr . inet_proto . inet_service : verdict; }
map service-ips { type ipv4_addr . inet_proto . inet_service : verdict; }
map service-nodeports { type inet_proto . inet_service : verdict; }
chain reject-chain { reject; }
chain firewall-check { ip daddr . meta l4proto . th dport vmap @firewall-ips; }
chain service-endpoints-check { ip daddr . meta l4proto . th dport vmap @no-endpoint-services; }
chain nodeport-endpoints-check {
    ip daddr @nodeport-ips meta l4proto . th dport vmap @no-endpoint-nodeports
}
chain cluster-ips-check { ip daddr @cluster-ips reject; ip daddr { SERVICE_CIDR } drop; }
chain services {
    ip daddr @cluster-ips ip saddr != POD_CIDR meta mark set meta mark or 0x4000
    ip daddr . meta l4proto . th dport vmap @service-ips
    ip daddr @nodeport-ips meta l4proto . th dport vmap @service-nodeports
}
chain masquerading {
    meta mark & 0x4000 != 0 meta mark set meta mark xor 0x4000 masquerade fully-random
    ct status dnat ip saddr . ip daddr . meta l4proto . th dport @hairpin-connections masquerade fully-random
}
chain filter-prerouting-pre-dnat {
    type filter hook prerouting priority -110;
    ct state new jump firewall-check
}
chain filter-output-pre-dnat {
    type filter hook output priority -110;
    ct state new jump firewall-check
}
chain filter-input {
    type filter hook input priority 0;
    ct state new jump nodeport-endpoints-check
    ct state new jump service-endpoints-check
}
chain filter-forward {
    type filter hook forward priority 0;
    ct state new jump service-endpoints-check
    ct state new jump cluster-ips-check
}
chain filter-output {
    type filter hook output priority 0;
    ct state new jump service-endpoints-check
    ct state new jump cluster-ips-check
}
chain nat-prerouting { type nat hook prerouting priority -100; jump services; }
chain nat-output { type nat hook output priority -100; jump services; }
chain nat-postrouting { type nat hook postrouting priority 100; jump masquerading; }
";

/// What a run of `nft` took.
#[derive(Clone, Copy, Debug)]
pub struct Cost {
    /// From starting the program to its end.
    pub wall: Duration,
    /// The processor time of that in the kernel, most of which is the transaction.
    pub kernel: Duration,
}

/// Loads commands with `nft -f -`.
pub fn load(namespace: &Namespace, commands: &str) -> Cost {
    load_within(namespace, commands, Duration::ZERO).expect("there is no limit")
}

/// The same, unless it takes longer than a limit; zero is none. The kernel gives a transaction up
/// between two of its messages when the program that sent it is killed.
pub fn load_within(namespace: &Namespace, commands: &str, limit: Duration) -> Option<Cost> {
    /// How `timeout` ends when it killed.
    const OVER: i32 = 137;
    let system_time = || {
        let usage = getrusage(UsageWho::RUSAGE_CHILDREN).expect("a process knows its usage");
        let time = usage.system_time();
        Duration::from_secs(time.tv_sec() as u64) + Duration::from_micros(time.tv_usec() as u64)
    };
    namespace.run(|| {
        let (started, before) = (Instant::now(), system_time());
        let mut child = Command::new("timeout")
            .args(["--signal=KILL", &limit.as_secs().to_string()])
            .args(["nft", "-f", "-"])
            .stdin(Stdio::piped())
            .spawn()
            .expect("nft can be started");
        let mut input = child.stdin.take().expect("standard input is piped");
        let written = std::io::Write::write_all(&mut input, commands.as_bytes());
        drop(input);
        let status = child.wait().expect("nft ends");
        let killed = status.code() == Some(OVER) || status.signal() == Some(libc::SIGKILL);
        if killed && !limit.is_zero() && started.elapsed() >= limit {
            return None;
        }
        assert!(status.success(), "nft fails: {status}");
        written.expect("nft reads its input");
        Some(Cost {
            wall: started.elapsed(),
            kernel: system_time().saturating_sub(before),
        })
    })
}

/// The elements of the maps and sets for services, by map or set.
#[derive(Default)]
struct Elements {
    service_ips: String,
    nodeports: String,
    cluster_ips: String,
    hairpin: String,
}

/// The complete table.
pub fn table(workload: &Workload) -> String {
    let skeleton = SKELETON
        .replace("SERVICE_CIDR", SERVICE_CIDR)
        .replace("POD_CIDR", POD_CIDR);
    let mut text = format!("table {TABLE} {{\n{skeleton}\n}}\n");
    line(
        &mut text,
        format_args!("add element {TABLE} nodeport-ips {{ {NODE_IP} }}"),
    );
    let mut elements = Elements::default();
    for service in 0..workload.services.len() {
        chains(workload, service, &mut text);
        service_elements(workload, service, "add", &mut elements);
    }
    elements.append_to(&mut text);
    text
}

/// The commands for a service that is new.
pub fn add(workload: &Workload, service: usize) -> String {
    let (mut text, mut elements) = (String::new(), Elements::default());
    chains(workload, service, &mut text);
    service_elements(workload, service, "add", &mut elements);
    elements.append_to(&mut text);
    text
}

/// The commands for a service that is gone. kube-proxy deletes the chains in a later run, which
/// newer kernels do not need.
pub fn delete(workload: &Workload, service: usize) -> String {
    let (mut text, mut elements) = (String::new(), Elements::default());
    service_elements(workload, service, "delete", &mut elements);
    elements.append_to(&mut text);
    let object = &workload.services[service];
    let mut names = vec![chain_name("service", object)];
    if external(object) {
        names.push(chain_name("external", object));
    }
    for verb in ["flush", "delete"] {
        for name in names.iter().rev() {
            line(&mut text, format_args!("{verb} chain {TABLE} {name}"));
        }
    }
    text
}

/// The commands for a service whose endpoints changed. The few that are on this node would also
/// change `hairpin-connections`; that is left out.
pub fn change(workload: &Workload, service: usize) -> String {
    let mut text = String::new();
    let name = chain_name("service", &workload.services[service]);
    line(&mut text, format_args!("flush chain {TABLE} {name}"));
    dnat_rule(workload, service, &mut text);
    text
}

fn chains(workload: &Workload, service: usize, text: &mut String) {
    let object = &workload.services[service];
    let name = chain_name("service", object);
    line(text, format_args!("add chain {TABLE} {name}"));
    dnat_rule(workload, service, text);
    if external(object) {
        let outside = chain_name("external", object);
        line(text, format_args!("add chain {TABLE} {outside}"));
        line(
            text,
            format_args!(
                "add rule {TABLE} {outside} meta mark set meta mark or 0x4000 goto {name}"
            ),
        );
    }
}

fn dnat_rule(workload: &Workload, service: usize, text: &mut String) {
    let name = chain_name("service", &workload.services[service]);
    let mut targets = String::new();
    let mut count = 0;
    for (address, port) in workload.targets(service) {
        let comma = if count == 0 { "" } else { ", " };
        append(
            &mut targets,
            format_args!("{comma}{count} : {address} . {port}"),
        );
        count += 1;
    }
    line(
        text,
        format_args!(
            "add rule {TABLE} {name} meta l4proto tcp dnat ip addr . port to \
             numgen random mod {count} map {{ {targets} }}"
        ),
    );
}

fn service_elements(workload: &Workload, service: usize, verb: &str, elements: &mut Elements) {
    let object = &workload.services[service];
    let (inside, outside) = (
        chain_name("service", object),
        chain_name("external", object),
    );
    let addresses = object.cluster_ips.iter().map(|ip| (ip, &inside));
    let external = object.load_balancer_ips.iter().map(|ip| (ip, &outside));
    for port in &object.ports {
        for (address, chain) in addresses.clone().chain(external.clone()) {
            line(
                &mut elements.service_ips,
                format_args!(
                    "{verb} element {TABLE} service-ips {{ {address} . tcp . {} : goto {chain} }}",
                    port.port
                ),
            );
        }
        if let Some(number) = port.node_port {
            line(
                &mut elements.nodeports,
                format_args!(
                    "{verb} element {TABLE} service-nodeports {{ tcp . {number} : goto {outside} }}"
                ),
            );
        }
    }
    for address in &object.cluster_ips {
        line(
            &mut elements.cluster_ips,
            format_args!("{verb} element {TABLE} cluster-ips {{ {address} }}"),
        );
    }
    let endpoints = workload.endpoints[service].iter();
    for (endpoint, (address, port)) in endpoints.zip(workload.targets(service)) {
        if endpoint.node.as_deref() == Some(NODE) {
            line(
                &mut elements.hairpin,
                format_args!(
                    "{verb} element {TABLE} hairpin-connections {{ \
                     {address} . {address} . tcp . {port} }}"
                ),
            );
        }
    }
}

impl Elements {
    fn append_to(&self, text: &mut String) {
        text.push_str(&self.service_ips);
        text.push_str(&self.nodeports);
        text.push_str(&self.cluster_ips);
        text.push_str(&self.hairpin);
    }
}

fn external(service: &Service) -> bool {
    service.ports.iter().any(|port| port.node_port.is_some())
        || !service.load_balancer_ips.is_empty()
}

/// A name of kube-proxy's form and length: kind, eight characters of a hash, and what it is for.
fn chain_name(kind: &str, service: &Service) -> String {
    let name = service.name.as_str();
    // FNV-1a; kube-proxy takes other bits, which makes no difference to the kernel.
    let hash = name.bytes().fold(0x811c_9dc5u32, |hash, byte| {
        (hash ^ u32::from(byte)).wrapping_mul(0x0100_0193)
    });
    format!("{kind}-{hash:08X}-{name}/tcp/http")
}

fn line(text: &mut String, command: std::fmt::Arguments) {
    append(text, command);
    text.push('\n');
}

fn append(text: &mut String, what: std::fmt::Arguments) {
    // Writing to a String cannot fail.
    let _ = text.write_fmt(what);
}
