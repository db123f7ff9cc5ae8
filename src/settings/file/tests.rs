use serde_json::Value;

use super::*;
use crate::settings::CommandLine;
use crate::settings::{LogFormat, NodePortAddressesSetting};

const HEAD: &str = "apiVersion: kubeproxy.config.k8s.io/v1alpha1\nkind: KubeProxyConfiguration\n";
const KUBEADM: &str = include_str!("../../../tests/fixtures/kube-proxy-config-kubeadm.yaml");
const WRITTEN: &str =
    include_str!("../../../tests/fixtures/kube-proxy-config-written-by-1.36.yaml");

fn parse(text: &str) -> Result<File, Error> {
    File::parse(Path::new("config.conf"), text)
}

/// A file with the usual head.
fn with(fields: &str) -> File {
    parse(&format!("{HEAD}{fields}\n")).unwrap_or_else(|error| panic!("{fields}: {error}"))
}

/// What is said about fields that cannot be used. The first of them is in line 3.
#[track_caller]
fn refused(fields: &str) -> String {
    let error = parse(&format!("{HEAD}{fields}\n")).expect_err(fields);
    let text = error.to_string();
    assert_eq!(text.lines().count(), 1, "{text}");
    text
}

/// The command line after a file was applied to it.
fn applied(file: &File, flags: &[&str]) -> Settings {
    let all = ["nftlet"].iter().chain(flags);
    let mut line = CommandLine::parse(all).expect("flags");
    line.replace(file.settings().clone());
    line.settings
}

#[test]
fn the_file_of_kubeadm_changes_nothing_but_the_kubeconfig() {
    let file = parse(KUBEADM).expect("it is accepted unchanged");
    assert_eq!(file.notes(), Vec::<String>::new());
    let mut args = applied(&file, &[]);
    assert_eq!(
        args.kubeconfig.take(),
        Some("/var/lib/kube-proxy/kubeconfig.conf".into())
    );
    let plain = CommandLine::parse(["nftlet", "--bind-address=0.0.0.0"]).expect("flags");
    assert_eq!(args, plain.settings);
}

#[test]
fn what_kube_proxy_writes_is_read_with_a_note_of_its_mode() {
    let file = parse(WRITTEN).expect("the mode is accepted");
    assert_eq!(
        file.notes(),
        ["mode iptables is for kube-proxy; nftlet uses nftables"]
    );
    let args = applied(&file, &[]);
    assert_eq!(args.conntrack_max_per_core, Some(32_768));
    assert_eq!(args.oom_score_adj, Some(-999));
    assert_eq!(effective(&args)["mode"], "nftables");
}

#[test]
fn other_modes_are_accepted_with_one_note() {
    for (mode, notes) in [("''", 0), ("nftables", 0), ("iptables", 1), ("ipvs", 1)] {
        let file = with(&format!("mode: {mode}"));
        assert_eq!(file.notes().len(), notes, "{mode}");
        assert_eq!(applied(&file, &[]), applied(&with(""), &[]), "{mode}");
    }
}

#[test]
fn connection_tracking_has_the_defaults_of_kube_proxy_and_zero_leaves_it() {
    let defaults = serde_json::json!({
        "maxPerCore": 32_768,
        "min": 131_072,
        "tcpBeLiberal": false,
        "tcpCloseWaitTimeout": "1h0m0s",
        "tcpEstablishedTimeout": "24h0m0s",
        "udpStreamTimeout": "0s",
        "udpTimeout": "0s",
    });
    let plain = CommandLine::parse(["nftlet"]).expect("flags").settings;
    assert_eq!(effective(&plain)["conntrack"], defaults, "no flag");
    for file in [
        parse(KUBEADM).expect("kubeadm's"),
        with(""),
        with("conntrack: null"),
    ] {
        assert_eq!(effective(&applied(&file, &[]))["conntrack"], defaults);
    }
    let zeros = with(
        "conntrack: {maxPerCore: 0, min: 0, tcpCloseWaitTimeout: 0s, tcpEstablishedTimeout: 0s}",
    );
    let left = effective(&applied(&zeros, &[]))["conntrack"].clone();
    assert_eq!(left["maxPerCore"], 0);
    assert_eq!(left["min"], 0);
    assert_eq!(left["tcpCloseWaitTimeout"], "0s");
    assert_eq!(left["tcpEstablishedTimeout"], "0s");
}

#[test]
fn every_field_reaches_its_setting() {
    let file = with(
        "bindAddress: 192.0.2.1
bindAddressHardFail: true
clientConnection: {kubeconfig: /etc/proxy.conf, qps: 1.5, burst: 10}
clusterCIDR: 10.244.0.0/16,fd00:10::/64
conntrack: {maxPerCore: 1, min: 2, tcpBeLiberal: true, tcpCloseWaitTimeout: 3s, tcpEstablishedTimeout: 4m0s, udpStreamTimeout: 5s, udpTimeout: 6s}
detectLocal: {bridgeInterface: cni0, interfaceNamePrefix: veth}
detectLocalMode: BridgeInterface
healthzBindAddress: 192.0.2.1:1
hostnameOverride: Node-7
logging: {format: json, verbosity: 5}
metricsBindAddress: '[::1]:2'
mode: nftables
nftables: {masqueradeAll: true, masqueradeBit: 7, syncPeriod: 10s}
nodePortAddresses: [10.0.0.0/8, fd00::/8]
oomScoreAdj: -5",
    );
    let from_flags = CommandLine::parse([
        "nftlet",
        "--bind-address=192.0.2.1",
        "--bind-address-hard-fail",
        "--kubeconfig=/etc/proxy.conf",
        "--cluster-cidr=10.244.0.0/16,fd00:10::/64",
        "--conntrack-max-per-core=1",
        "--conntrack-min=2",
        "--conntrack-tcp-be-liberal",
        "--conntrack-tcp-timeout-close-wait=3s",
        "--conntrack-tcp-timeout-established=4m",
        "--conntrack-udp-timeout-stream=5s",
        "--conntrack-udp-timeout=6s",
        "--pod-bridge-interface=cni0",
        "--pod-interface-name-prefix=veth",
        "--detect-local-mode=BridgeInterface",
        "--healthz-bind-address=192.0.2.1:1",
        "--hostname-override=node-7",
        "--log-format=json",
        "--v=5",
        "--metrics-bind-address=[::1]:2",
        "--masquerade-all",
        "--masquerade-bit=7",
        "--nodeport-addresses=10.0.0.0/8,fd00::/8",
        "--oom-score-adj=-5",
    ])
    .expect("flags");
    let mut wanted = from_flags.settings;
    wanted.sync_period = Some(std::time::Duration::from_secs(10));
    assert_eq!(applied(&file, &[]), wanted);
}

#[test]
fn null_zero_and_empty_mean_the_defaults() {
    let nothing = CommandLine::parse(["nftlet"]).expect("flags").settings;
    let empty = with(
        "bindAddress: ''
clientConnection: null
clusterCIDR: ~
conntrack: {maxPerCore: null, min: null, tcpEstablishedTimeout: null, udpTimeout: 0s}
detectLocalMode: ''
healthzBindAddress: ''
hostnameOverride: ''
logging: {format: '', verbosity: 0}
mode: ''
nftables: {masqueradeBit: null, syncPeriod: 0s}
nodePortAddresses: null
oomScoreAdj: null",
    );
    assert_eq!(applied(&empty, &[]), nothing);
    assert_eq!(applied(&with(""), &[]), nothing);
    let listed = applied(&with("nodePortAddresses: []"), &[]);
    assert_eq!(
        listed.nodeport_addresses(),
        Ok(NodePortAddressesSetting::Primary)
    );
}

#[test]
fn the_name_of_the_node_and_the_log_are_the_command_lines() {
    let file = with(
        "hostnameOverride: of-the-file\nlogging: {format: json, verbosity: 8}\nclusterCIDR: 10.0.0.0/8",
    );
    let args = applied(
        &file,
        &[
            "--hostname-override=of-the-flag",
            "--log-format=text",
            "-v",
            "--cluster-cidr=10.1.0.0/16",
            "--manifests=a",
        ],
    );
    assert_eq!(args.hostname_override.as_deref(), Some("of-the-flag"));
    assert_eq!(args.log_format, LogFormat::Text);
    assert_eq!(args.verbosity(), 1);
    assert_eq!(args.cluster_cidr.to_string(), "10.0.0.0/8");
    assert_eq!(args.manifests.len(), 1, "nftlet's own flags always count");
}

#[test]
fn a_value_that_cannot_be_used_is_named_with_its_place() {
    for (fields, wanted) in [
        (
            "clusterCIDR: 10.0.0.0/33",
            ":3:14: clusterCIDR: `10.0.0.0/33` is not a range of addresses; write it like 10.244.0.0/16 or fd00:10::/64",
        ),
        (
            "conntrack:\n  maxPerCore: many",
            ":4:15: conntrack.maxPerCore: `many` is not a whole number up to 2147483647",
        ),
        (
            "conntrack: {min: -1}",
            ":3:18: conntrack.min: -1 is below zero; write 0 or more",
        ),
        (
            "conntrack: {udpTimeout: 30}",
            ":3:25: conntrack.udpTimeout: \"30\" is not a duration; write one such as 24h, 90s or 1h30m, or 0; at most 2562047h",
        ),
        (
            "nftables: {masqueradeAll: 5}",
            ":3:27: nftables.masqueradeAll: `5` is neither true nor false",
        ),
        (
            "nftables: {masqueradeBit: 32}",
            ":3:27: nftables.masqueradeBit: `32` is not the number of a bit; write one from 0 to 31",
        ),
        (
            "nftables: on",
            ":3:11: nftables: the value has the wrong type; write fields with values",
        ),
        (
            "clusterCIDR: [10.0.0.0/8]",
            ":3:14: clusterCIDR: the value has the wrong type; write a single value",
        ),
        (
            "nodePortAddresses: 10.0.0.0/8",
            ":3:20: nodePortAddresses: the value has the wrong type; write a list",
        ),
        (
            "nodePortAddresses:\n- 10.0.0.0/8\n- 10.0.0.1",
            ":5:3: nodePortAddresses[1]: `10.0.0.1` has no prefix length; write 10.0.0.1/32 for this one address",
        ),
        (
            "oomScoreAdj: -1001",
            ":3:14: oomScoreAdj: `-1001` is not a number from -1000 to 1000",
        ),
        (
            "mode: userspace",
            ":3:7: mode: there is no mode `userspace`; omit it or write nftables (iptables and ipvs are accepted and mean the same)",
        ),
        (
            "detectLocalMode: Auto",
            ":3:18: detectLocalMode: there is no such mode; write ClusterCIDR, NodeCIDR, BridgeInterface or InterfaceNamePrefix",
        ),
        (
            "detectLocalMode: BridgeInterface",
            ": detectLocal.bridgeInterface: the value is empty, and detectLocalMode needs the bridge of the pods, for example cni0",
        ),
        (
            "logging: {format: xml}",
            ":3:19: logging.format: there is no such format; write text or json",
        ),
        (
            "clusterCIDR: 10.0.0.0/8\nclusterCIDR: 10.0.0.0/8",
            ":4:1: clusterCIDR is given twice; remove one of them",
        ),
    ] {
        assert_eq!(refused(fields), format!("config.conf{wanted}"));
    }
    let primary = refused("nodePortAddresses: [primary, 10.0.0.0/8]");
    assert!(
        primary.contains("nodePortAddresses: `primary` cannot be combined with ranges"),
        "{primary}"
    );
    let bind = refused("healthzBindAddress: localhost:80");
    assert!(
        bind.starts_with("config.conf:3:21: healthzBindAddress: `localhost:80` is not"),
        "{bind}"
    );
}

#[test]
fn what_is_no_such_configuration_says_what_it_is() {
    for (text, wanted) in [
        ("", "an object without apiVersion"),
        (
            "kind: KubeProxyConfiguration\n",
            "an object without apiVersion",
        ),
        (
            "apiVersion: kubeproxy.config.k8s.io/v1alpha1\n",
            "an object without kind",
        ),
        (
            "apiVersion: v1\nkind: ConfigMap\nmode: [1]\n",
            "a ConfigMap of v1",
        ),
        (
            "apiVersion: kubeproxy.config.k8s.io/v1alpha2\nkind: KubeProxyConfiguration\n",
            "a KubeProxyConfiguration of kubeproxy.config.k8s.io/v1alpha2",
        ),
    ] {
        let error = parse(text).expect_err(text).to_string();
        assert_eq!(
            error,
            format!(
                "config.conf: this is {wanted}; --config needs a KubeProxyConfiguration of kubeproxy.config.k8s.io/v1alpha1"
            )
        );
    }
    for text in [
        "kind: \"a\\nb\"\napiVersion: c\n",
        "- a\n",
        "a: [\n",
        "just words\n",
        "\u{0}\n",
        "a: b\n---\nc: d\n",
    ] {
        let error = parse(text).expect_err(text).to_string();
        assert!(error.starts_with("config.conf:"), "{error}");
        assert_eq!(error.lines().count(), 1, "{error}");
    }
}

#[test]
fn fields_without_effect_are_reported_once_per_kind() {
    let notes = with(
        "enableProfiling: true
featureGates: {A: true}
configSyncPeriod: 5m
nftables: {minSyncPeriod: 10s, typo: 1}
Mode: nftables
iptables: {masqueradeAll: true, syncPeriod: 30s, masqueradeBit: 14, localhostNodePorts: false}
ipvs: {strictARP: true, excludeCIDRs: [10.0.0.0/8], scheduler: rr}
portRange: ''
",
    )
    .notes()
    .to_vec();
    assert_eq!(
        notes,
        [
            "fields that KubeProxyConfiguration does not have: nftables.typo, Mode",
            "fields of other modes have no effect; set those of nftables instead: iptables.masqueradeAll, ipvs.excludeCIDRs, ipvs.strictARP",
            "fields that nftlet does not use: configSyncPeriod, enableProfiling, featureGates, nftables.minSyncPeriod",
        ]
    );
}

#[test]
fn what_is_written_is_complete_and_read_back_as_the_same() {
    let reference: Value = serde_saphyr::from_str(WRITTEN).expect("YAML");
    let mut samples = vec![
        vec!["nftlet"],
        vec![
            "nftlet",
            "--kubeconfig=/etc/proxy.conf",
            "--hostname-override=node-1",
            "--cluster-cidr=10.244.0.0/16,fd00:10::/64",
            "--detect-local-mode=InterfaceNamePrefix",
            "--pod-interface-name-prefix=veth",
            "--nodeport-addresses=10.0.0.0/8",
            "--masquerade-all",
            "--masquerade-bit=3",
            "--bind-address=2001:db8::1",
            "--bind-address-hard-fail",
            "--metrics-bind-address=[::1]:9000",
            "--healthz-bind-address=:9001",
            "--conntrack-max-per-core=5",
            "--conntrack-udp-timeout=90s",
            "--log-format=json",
            "-vvv",
            "--oom-score-adj=10",
        ],
    ];
    samples.push(vec!["nftlet", "--hostname-override=80"]);
    for flags in samples {
        let args = CommandLine::parse(&flags).expect("flags").settings;
        let value = effective(&args);
        assert_eq!(paths(&value), paths(&reference));
        let text = serde_saphyr::to_string(&value).expect("YAML");
        let file = parse(&text).unwrap_or_else(|error| panic!("{text}: {error}"));
        assert_eq!(file.notes(), Vec::<String>::new());
        assert_eq!(effective(&applied(&file, &[])), value);
    }
}

/// The paths of all fields.
fn paths(value: &Value) -> Vec<String> {
    let Some(fields) = value.as_object() else {
        return vec![String::new()];
    };
    let below = fields.iter().flat_map(|(name, value)| {
        let below = paths(value);
        below.into_iter().map(move |path| format!("{name}.{path}"))
    });
    below.collect()
}

#[test]
fn what_is_wrong_with_other_modes_is_wrong_with_the_file() {
    for (fields, wanted) in [
        (
            "iptables: {masqueradeBit: x}",
            ":3:27: iptables.masqueradeBit: `x` is not",
        ),
        (
            "iptables: {masqueradeAll: maybe}",
            ":3:27: iptables.masqueradeAll: `maybe` is neither",
        ),
        (
            "iptables: [1]",
            ":3:11: iptables: the value has the wrong type",
        ),
        (
            "ipvs: {tcpTimeout: long}",
            ":3:20: ipvs.tcpTimeout: \"long\" is not a duration",
        ),
        (
            "ipvs: {excludeCIDRs: 10.0.0.0/8}",
            ":3:22: ipvs.excludeCIDRs: the value has the wrong type",
        ),
        (
            "featureGates: {A: perhaps}",
            ":3:19: featureGates.A: `perhaps` is neither",
        ),
        (
            "featureGates: [A]",
            ":3:15: featureGates: the value has the wrong type",
        ),
    ] {
        let line = refused(fields);
        assert!(line.starts_with(&format!("config.conf{wanted}")), "{line}");
    }
    let notes = with("iptables: {masqueradeBit: 7}\nipvs: {tcpTimeout: 5s, odd: 1}")
        .notes()
        .to_vec();
    assert_eq!(
        notes,
        [
            "fields that KubeProxyConfiguration does not have: ipvs.odd",
            "fields of other modes have no effect; set those of nftables instead: iptables.masqueradeBit, ipvs.tcpTimeout",
        ]
    );
}
