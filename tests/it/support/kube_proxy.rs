//! A node as kube-proxy programs it: its tables in nftables, its chains in iptables.
//!
//! Written from the shape of its rules, with what each of them is for, so that packets meet them as
//! they would on a real node: jumps in front of what others have, chains of services and endpoints
//! with hashes for names, marks for masquerading, refusals without endpoints.

use std::fmt::Write as _;
use std::net::{IpAddr, SocketAddr};

use nftlet_lab::netns::Namespace;

/// One port of a service in one family.
#[derive(Clone, Debug)]
pub struct Frontend {
    /// `shop/web:http`.
    pub name: String,
    /// The ClusterIP with the port.
    pub cluster: SocketAddr,
    /// The port on the node, if any.
    pub node_port: Option<u16>,
    /// Who serves it.
    pub endpoints: Vec<SocketAddr>,
}

/// Which iptables.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Iptables {
    Legacy,
    Nft,
}

impl Iptables {
    /// `ip6tables-legacy-save`.
    pub fn program(self, v6: bool, action: &str) -> String {
        let family = if v6 { "ip6tables" } else { "iptables" };
        let kind = match self {
            Iptables::Legacy => "legacy",
            Iptables::Nft => "nft",
        };
        format!("{family}-{kind}{action}")
    }

    /// Loads text for `iptables-restore`, beside what is there.
    #[track_caller]
    pub fn load(self, node: &Namespace, v6: bool, text: &str) {
        let program = self.program(v6, "-restore");
        node.feed(&program, &["--noflush", "--wait=30"], text);
    }

    /// What `iptables-save` prints, without dates and counters.
    #[track_caller]
    pub fn save(self, node: &Namespace, v6: bool) -> String {
        let saved = node.feed(&self.program(v6, "-save"), &[], "");
        let mut lines: Vec<&str> = Vec::new();
        for line in saved.lines().filter(|line| !line.starts_with('#')) {
            lines.push(match line.split_once(" [") {
                Some((declaration, _)) if line.starts_with(':') => declaration,
                _ => line,
            });
        }
        lines.join("\n")
    }
}

/// Whether the kernel has legacy iptables, tried out in a namespace; why not, otherwise.
pub fn legacy_iptables(node: &Namespace) -> Result<(), String> {
    let output = node
        .command("iptables-legacy-save")
        .args(["-t", "nat"])
        .output();
    let output = output.map_err(|error| error.to_string())?;
    if output.status.success() {
        return Ok(());
    }
    Err(String::from_utf8_lossy(&output.stderr).trim().to_owned())
}

/// The 16 characters that distinguish kube-proxy's chains. It takes SHA-256; any hash will do.
fn hash(text: &str) -> String {
    const DIGITS: &[u8] = b"ABCDEFGHIJKLMNOPQRSTUVWXYZ234567";
    let mut state = 0xcbf2_9ce4_8422_2325_u64;
    let mut digits = String::new();
    for round in 0..16_u8 {
        for byte in text.bytes().chain([round]) {
            state = (state ^ u64::from(byte)).wrapping_mul(0x0100_0000_01b3);
        }
        digits.push(char::from(DIGITS[(state >> 40) as usize % DIGITS.len()]));
    }
    digits
}

/// What kube-proxy's iptables mode hands to `iptables-restore`, with the jumps it makes before.
/// `pods` is the pod network.
pub fn iptables(node: IpAddr, pods: &str, frontends: &[Frontend]) -> String {
    let bits = if node.is_ipv4() { 32 } else { 128 };
    let (mut nat_chains, mut services, mut node_ports, mut own) =
        (String::new(), String::new(), String::new(), String::new());
    let mut refused = String::new();
    for frontend in frontends {
        let name = &frontend.name;
        let id = hash(name);
        let (ip, port) = (frontend.cluster.ip(), frontend.cluster.port());
        if frontend.endpoints.is_empty() {
            line(
                &mut refused,
                format_args!(
                    "-A KUBE-SERVICES -d {ip}/{bits} -p tcp -m comment --comment \"{name} has no endpoints\" -m tcp --dport {port} -j REJECT"
                ),
            );
            continue;
        }
        for kind in ["SVC", "EXT"] {
            line(&mut nat_chains, format_args!(":KUBE-{kind}-{id} - [0:0]"));
        }
        line(
            &mut services,
            format_args!(
                "-A KUBE-SERVICES -d {ip}/{bits} -p tcp -m comment --comment \"{name} cluster IP\" -m tcp --dport {port} -j KUBE-SVC-{id}"
            ),
        );
        line(
            &mut own,
            format_args!(
                "-A KUBE-SVC-{id} ! -s {pods} -d {ip}/{bits} -p tcp -m comment --comment \"{name} cluster IP\" -m tcp --dport {port} -j KUBE-MARK-MASQ"
            ),
        );
        line(
            &mut own,
            format_args!(
                "-A KUBE-EXT-{id} -m comment --comment \"masquerade traffic for {name} external destinations\" -j KUBE-MARK-MASQ\n\
             -A KUBE-EXT-{id} -j KUBE-SVC-{id}"
            ),
        );
        if let Some(port) = frontend.node_port {
            line(
                &mut node_ports,
                format_args!(
                    "-A KUBE-NODEPORTS -p tcp -m comment --comment \"{name}\" -m tcp --dport {port} -j KUBE-EXT-{id}"
                ),
            );
        }
        let count = frontend.endpoints.len();
        for (index, endpoint) in frontend.endpoints.iter().enumerate() {
            let sep = hash(&format!("{name}{endpoint}"));
            let left = count - index;
            let chance = if left == 1 {
                String::new()
            } else {
                format!(
                    " -m statistic --mode random --probability {:.10}",
                    1.0 / left as f64
                )
            };
            line(&mut nat_chains, format_args!(":KUBE-SEP-{sep} - [0:0]"));
            line(
                &mut own,
                format_args!(
                    "-A KUBE-SVC-{id} -m comment --comment \"{name} -> {endpoint}\"{chance} -j KUBE-SEP-{sep}\n\
                 -A KUBE-SEP-{sep} -s {}/{bits} -m comment --comment \"{name}\" -j KUBE-MARK-MASQ\n\
                 -A KUBE-SEP-{sep} -p tcp -m comment --comment \"{name}\" -m tcp -j DNAT --to-destination {endpoint}",
                    endpoint.ip()
                ),
            );
        }
    }
    format!(
        "*mangle\n:KUBE-PROXY-CANARY - [0:0]\nCOMMIT\n\
         *filter\n\
         :KUBE-EXTERNAL-SERVICES - [0:0]\n:KUBE-FORWARD - [0:0]\n:KUBE-NODEPORTS - [0:0]\n\
         :KUBE-PROXY-CANARY - [0:0]\n:KUBE-PROXY-FIREWALL - [0:0]\n:KUBE-SERVICES - [0:0]\n\
         {filter_jumps}{refused}\
         -A KUBE-FORWARD -m conntrack --ctstate INVALID -j DROP\n\
         -A KUBE-FORWARD -m comment --comment \"kubernetes forwarding rules\" -m mark --mark 0x4000/0x4000 -j ACCEPT\n\
         -A KUBE-FORWARD -m comment --comment \"kubernetes forwarding conntrack rule\" -m conntrack --ctstate RELATED,ESTABLISHED -j ACCEPT\n\
         COMMIT\n\
         *nat\n\
         :KUBE-MARK-MASQ - [0:0]\n:KUBE-NODEPORTS - [0:0]\n:KUBE-POSTROUTING - [0:0]\n\
         :KUBE-PROXY-CANARY - [0:0]\n:KUBE-SERVICES - [0:0]\n{nat_chains}\
         -I PREROUTING 1 -m comment --comment \"kubernetes service portals\" -j KUBE-SERVICES\n\
         -I OUTPUT 1 -m comment --comment \"kubernetes service portals\" -j KUBE-SERVICES\n\
         -I POSTROUTING 1 -m comment --comment \"kubernetes postrouting rules\" -j KUBE-POSTROUTING\n\
         -A KUBE-MARK-MASQ -j MARK --set-xmark 0x4000/0x4000\n\
         -A KUBE-POSTROUTING -m mark ! --mark 0x4000/0x4000 -j RETURN\n\
         -A KUBE-POSTROUTING -j MARK --set-xmark 0x4000/0x0\n\
         -A KUBE-POSTROUTING -m comment --comment \"kubernetes service traffic requiring SNAT\" -j MASQUERADE --random-fully\n\
         {services}{node_ports}{own}\
         -A KUBE-SERVICES -d {node}/{bits} -m comment --comment \"kubernetes service nodeports; NOTE: this must be the last rule in this chain\" -j KUBE-NODEPORTS\n\
         COMMIT\n",
        filter_jumps = "\
-I INPUT 1 -m conntrack --ctstate NEW -m comment --comment \"kubernetes load balancer firewall\" -j KUBE-PROXY-FIREWALL
-I INPUT 1 -m conntrack --ctstate NEW -m comment --comment \"kubernetes externally-visible service portals\" -j KUBE-EXTERNAL-SERVICES
-I INPUT 1 -m comment --comment \"kubernetes health check service ports\" -j KUBE-NODEPORTS
-I FORWARD 1 -m conntrack --ctstate NEW -m comment --comment \"kubernetes load balancer firewall\" -j KUBE-PROXY-FIREWALL
-I FORWARD 1 -m comment --comment \"kubernetes forwarding rules\" -j KUBE-FORWARD
-I FORWARD 1 -m conntrack --ctstate NEW -m comment --comment \"kubernetes service portals\" -j KUBE-SERVICES
-I FORWARD 1 -m conntrack --ctstate NEW -m comment --comment \"kubernetes externally-visible service portals\" -j KUBE-EXTERNAL-SERVICES
-I OUTPUT 1 -m conntrack --ctstate NEW -m comment --comment \"kubernetes load balancer firewall\" -j KUBE-PROXY-FIREWALL
-I OUTPUT 1 -m conntrack --ctstate NEW -m comment --comment \"kubernetes service portals\" -j KUBE-SERVICES
",
    )
}

/// The table of kube-proxy's nftables mode in the family of the node's address.
pub fn nftables(node: IpAddr, pods: &str, service_range: &str, frontends: &[Frontend]) -> String {
    let family = if node.is_ipv4() { "ip" } else { "ip6" };
    let address = if node.is_ipv4() {
        "ipv4_addr"
    } else {
        "ipv6_addr"
    };
    let (mut chains, mut elements) = (String::new(), String::new());
    let table = format!("{family} kube-proxy");
    for frontend in frontends {
        let name = &frontend.name;
        let id = hash(name);
        let chain = |kind: &str| format!("{kind}-{}-{name}/tcp", &id[..8]).replace(':', "/");
        let (service, external) = (chain("service"), chain("external"));
        let (ip, port) = (frontend.cluster.ip(), frontend.cluster.port());
        line(
            &mut elements,
            format_args!("add element {table} cluster-ips {{ {ip} }}"),
        );
        if frontend.endpoints.is_empty() {
            line(
                &mut elements,
                format_args!(
                    "add element {table} no-endpoint-services {{ {ip} . tcp . {port} : goto reject-chain }}"
                ),
            );
            continue;
        }
        let targets: Vec<String> = frontend
            .endpoints
            .iter()
            .enumerate()
            .map(|(index, endpoint)| format!("{index} : {} . {}", endpoint.ip(), endpoint.port()))
            .collect();
        line(
            &mut chains,
            format_args!(
                "chain {service} {{\n\
             {family} daddr {ip} tcp dport {port} {family} saddr != {pods} meta mark set meta mark | 0x4000\n\
             meta l4proto tcp dnat {family} addr . port to numgen random mod {} map {{ {} }}\n}}",
                targets.len(),
                targets.join(", ")
            ),
        );
        line(
            &mut chains,
            format_args!(
                "chain {external} {{ meta mark set meta mark | 0x4000; goto {service}; }}"
            ),
        );
        line(
            &mut elements,
            format_args!(
                "add element {table} service-ips {{ {ip} . tcp . {port} : goto {service} }}"
            ),
        );
        if let Some(port) = frontend.node_port {
            line(
                &mut elements,
                format_args!(
                    "add element {table} service-nodeports {{ tcp . {port} : goto {external} }}"
                ),
            );
        }
        for endpoint in &frontend.endpoints {
            line(
                &mut elements,
                format_args!(
                    "add element {table} hairpin-connections {{ {0} . {0} . tcp . {1} }}",
                    endpoint.ip(),
                    endpoint.port()
                ),
            );
        }
    }
    format!(
        "table {table} {{
comment \"rules for kube-proxy\"
set cluster-ips {{ type {address}; }}
set nodeport-ips {{ type {address}; elements = {{ {node} }}; }}
set hairpin-connections {{ type {address} . {address} . inet_proto . inet_service; }}
map no-endpoint-services {{ type {address} . inet_proto . inet_service : verdict; }}
map service-ips {{ type {address} . inet_proto . inet_service : verdict; }}
map service-nodeports {{ type inet_proto . inet_service : verdict; }}
chain reject-chain {{ reject; }}
chain service-endpoints-check {{ {family} daddr . meta l4proto . th dport vmap @no-endpoint-services; }}
chain cluster-ips-check {{
    {family} daddr @cluster-ips reject
    {family} daddr {{ {service_range} }} drop
}}
{chains}
chain services {{
    {family} daddr . meta l4proto . th dport vmap @service-ips
    {family} daddr @nodeport-ips meta l4proto . th dport vmap @service-nodeports
}}
chain masquerading {{
    meta mark & 0x4000 != 0 meta mark set meta mark ^ 0x4000 masquerade fully-random
    ct status dnat {family} saddr . {family} daddr . meta l4proto . th dport @hairpin-connections masquerade fully-random
}}
chain filter-prerouting-pre-dnat {{ type filter hook prerouting priority -110; }}
chain filter-input {{ type filter hook input priority 0; ct state new jump service-endpoints-check; }}
chain filter-forward {{
    type filter hook forward priority 0;
    ct state new jump service-endpoints-check
    ct state new jump cluster-ips-check
}}
chain filter-output {{
    type filter hook output priority 0;
    ct state new jump service-endpoints-check
    ct state new jump cluster-ips-check
}}
chain nat-prerouting {{ type nat hook prerouting priority -100; jump services; }}
chain nat-output {{ type nat hook output priority -100; jump services; }}
chain nat-postrouting {{ type nat hook postrouting priority 100; jump masquerading; }}
}}
{elements}"
    )
}

fn line(text: &mut String, what: std::fmt::Arguments) {
    text.write_fmt(what).expect("a String can be written to");
    text.push('\n');
}
