//! The configuration of kube-proxy in nftlet's hands: read as it is, written, followed; and what
//! the ports show of it.

use std::fs;
use std::os::unix::fs::symlink;
use std::path::{Path, PathBuf};
use std::process::Output;

use crate::support::agent::{
    NFTLET, Node, PATIENCE, confined, get, lines_with, nftlet, of_repository, one_line, printed,
    rules, said, wait_for_log,
};
use crate::support::manifests::{CLUSTER_CIDR, Manifests, Service};
use crate::support::objects::{node, service, slice};
use nftlet_lab::fake_api::{NODES, SERVICES, SLICES};
use nftlet_lab::netns::{Daemon, Namespace, require_net_admin, wait_for};
use serde_json::Value;
use tempfile::TempDir;

const HEAD: &str = "apiVersion: kubeproxy.config.k8s.io/v1alpha1\nkind: KubeProxyConfiguration\n";

/// A directory with a configuration.
struct Config(TempDir);

impl Config {
    fn new(text: &str) -> Self {
        let config = Self(tempfile::tempdir().expect("a directory"));
        config.write(text);
        config
    }

    /// The usual head and more.
    fn with(fields: &str) -> Self {
        Self::new(&format!("{HEAD}{fields}\n"))
    }

    fn path(&self) -> PathBuf {
        self.0.path().join("config.conf")
    }

    fn flag(&self) -> String {
        format!("--config={}", self.path().display())
    }

    fn write(&self, text: &str) {
        fs::write(self.path(), text).expect("a file");
    }
}

/// The file of the fixtures that kubeadm wrote, for a kubeconfig.
fn kubeadm(kubeconfig: &str) -> String {
    let text = fs::read_to_string(of_repository(
        "tests/fixtures/kube-proxy-config-kubeadm.yaml",
    ));
    let text = text.expect("the fixture");
    text.replace("/var/lib/kube-proxy/kubeconfig.conf", kubeconfig)
}

fn small_cluster() -> Node {
    let cluster = Node::new();
    cluster.api.put(NODES, node("node-1", "zone-a"));
    cluster.api.put(SERVICES, service("a", "10.96.0.11"));
    cluster.api.put(SLICES, slice("a-1", "a", &["10.1.0.1"]));
    cluster
}

/// One service with a NodePort.
fn shop() -> Manifests {
    let manifests = Manifests::new();
    let web = Service::new("web", 10).port("http", "TCP", 80, Some(30080));
    manifests.service(&web);
    manifests.endpoints(&web, 8080, &[("10.244.1.11".to_owned(), true)]);
    manifests
}

/// Checks that a run ended with 2 and said one line, which is returned.
#[track_caller]
fn refused(output: &Output) -> String {
    let said = said(output);
    assert_eq!(output.status.code(), Some(2), "{said}");
    assert_eq!(said.matches('\n').count(), 1, "{said}");
    said
}

#[test]
fn the_command_line_of_kubeadm_works_unchanged() {
    if !require_net_admin() {
        return;
    }
    let cluster = small_cluster();
    let config = Config::new(&kubeadm(&cluster.kubeconfig()));
    let arguments = [config.flag(), "--hostname-override=node-1".to_owned()];
    let daemon = Daemon::start(&cluster.ns, NFTLET, arguments);
    wait_for_log(&daemon, "the rules are in place");
    cluster.leads("10.96.0.11", &["10.1.0.1"]);
    assert_eq!(lines_with(&daemon.log(), "WARN"), Vec::<String>::new());
    assert_eq!(get(&cluster.ns, "127.0.0.1:10256", "/healthz").0, 200);
    assert_eq!(get(&cluster.ns, "127.0.0.1:10249", "/metrics").0, 200);
}

#[test]
fn a_file_and_its_flags_lead_to_the_same_rules() {
    if !require_net_admin() {
        return;
    }
    let (manifests, ns) = (shop(), Namespace::new("node"));
    let config = Config::with(&format!(
        "clusterCIDR: {CLUSTER_CIDR}\nnodePortAddresses: [192.168.0.0/16]\nmode: nftables\n\
         nftables: {{masqueradeAll: true, masqueradeBit: 5}}"
    ));
    let by_file = manifests.arguments(&["--dry-run"]);
    let flag = config.flag();
    let by_file = nftlet(&ns, &[&by_file[..], &[&flag]].concat(), "");
    let flags = [
        "--dry-run",
        "--cluster-cidr",
        CLUSTER_CIDR,
        "--nodeport-addresses=192.168.0.0/16",
        "--masquerade-all",
        "--masquerade-bit=5",
    ];
    let text = printed(&by_file);
    assert_eq!(said(&by_file), "");
    assert_eq!(
        text,
        printed(&nftlet(&ns, &manifests.arguments(&flags), ""))
    );
    assert!(
        text.contains("0x00000020") || text.contains("0x20"),
        "{text}"
    );
    // The kernel takes the bit, and a run without it puts its own in the place.
    manifests.program(&ns, &flags[1..]);
    let first = rules(&ns);
    assert!(first.contains("0x00000020"), "{first}");
    manifests.program(&ns, &["--cluster-cidr", CLUSTER_CIDR]);
    let second = rules(&ns);
    assert!(!second.contains("0x00000020"), "{second}");
    assert!(second.contains("0x00004000"), "{second}");
}

#[test]
fn flags_beside_a_file_are_ignored_and_named_once() {
    if !require_net_admin() {
        return;
    }
    let (manifests, ns) = (shop(), Namespace::new("node"));
    let config = Config::with("masqueradeAll: true\niptables: {masqueradeAll: true}");
    let flag = config.flag();
    let arguments = manifests.arguments(&[
        "--dry-run",
        &flag,
        "--masquerade-all",
        "--cluster-cidr=10.9.0.0/16",
    ]);
    let output = nftlet(&ns, &arguments, "");
    let plain = nftlet(&ns, &manifests.arguments(&["--dry-run"]), "");
    assert_eq!(printed(&output), printed(&plain));
    let said = said(&output);
    assert_eq!(lines_with(&said, "WARN").len(), 3, "{said}");
    for part in [
        "does not have: masqueradeAll",
        "other modes have no effect; set those of nftables instead: iptables.masqueradeAll",
        "these flags are ignored",
        ": --cluster-cidr, --masquerade-all",
    ] {
        assert!(said.contains(part), "{part}: {said}");
    }
}

#[test]
fn another_mode_of_kube_proxy_is_one_warning_and_the_same_rules() {
    if !require_net_admin() {
        return;
    }
    let (manifests, ns) = (shop(), Namespace::new("node"));
    let plain = nftlet(&ns, &manifests.arguments(&["--dry-run"]), "");
    let config = Config::with("mode: iptables");
    let by_file = config.flag();
    for (flag, warning) in [
        (
            "--proxy-mode=ipvs",
            "--proxy-mode: mode ipvs is for kube-proxy",
        ),
        (&by_file, "config.conf: mode iptables is for kube-proxy"),
    ] {
        let output = nftlet(&ns, &manifests.arguments(&["--dry-run", flag]), "");
        assert_eq!(printed(&output), printed(&plain), "{flag}");
        let warnings = lines_with(&said(&output), "WARN");
        assert_eq!(warnings.len(), 1, "{warnings:?}");
        assert!(warnings[0].contains(warning), "{warnings:?}");
    }
}

#[test]
fn a_file_that_cannot_be_used_is_one_line_and_touches_no_rule() {
    if !require_net_admin() {
        return;
    }
    let (manifests, ns) = (shop(), Namespace::new("node"));
    manifests.program(&ns, &[]);
    let before = rules(&ns);
    let empty = Manifests::new();
    for (fields, wanted) in [
        (
            "mode: userspace",
            ":3:7: mode: there is no mode `userspace`",
        ),
        ("clusterCIDR: {}", ":3:14: clusterCIDR: "),
        ("conntrack: {min: x}", ":3:18: conntrack.min: "),
        ("nftables: [", ":3:"),
        (
            "detectLocalMode: BridgeInterface",
            "detectLocal.bridgeInterface: ",
        ),
    ] {
        let config = Config::with(fields);
        for mode in [&["--once"][..], &[]] {
            let flag = config.flag();
            let arguments = empty.arguments(&[mode, &[&flag]].concat());
            let line = refused(&nftlet(&ns, &arguments, ""));
            assert!(line.starts_with("nftlet: "), "{line}");
            let place = format!("{}{wanted}", config.path().display());
            let place = match wanted.starts_with(':') {
                true => place,
                false => wanted.to_owned(),
            };
            assert!(line.contains(&place), "{line}");
        }
    }
    let line = refused(&nftlet(&ns, &["--config", "/nowhere/config.conf"], ""));
    assert!(
        line.contains("cannot read the configuration /nowhere/config.conf"),
        "{line}"
    );
    let other = Config::new("apiVersion: v1\nkind: ConfigMap\n");
    let line = refused(&nftlet(&ns, &[other.flag()], ""));
    assert!(line.contains("this is a ConfigMap of v1"), "{line}");
    let lost = Config::with("clientConnection: {kubeconfig: /nowhere/kubeconfig}");
    let line = one_line(&nftlet(&ns, &[lost.flag()], ""));
    assert!(line.contains("/nowhere/kubeconfig"), "{line}");
    assert_eq!(rules(&ns), before);
}

#[test]
fn a_change_ends_the_process_and_one_that_cannot_be_used_does_not() {
    if !require_net_admin() {
        return;
    }
    let (manifests, ns) = (shop(), Namespace::new("node"));
    // As Kubernetes mounts and changes a ConfigMap.
    let mount = tempfile::tempdir().expect("a directory");
    let swap = |version: &str, fields: &str| {
        let data = mount.path().join(version);
        fs::create_dir(&data).expect("a directory");
        fs::write(data.join("config.conf"), format!("{HEAD}{fields}\n")).expect("a file");
        symlink(version, mount.path().join("..data_tmp")).expect("a link");
        fs::rename(mount.path().join("..data_tmp"), mount.path().join("..data")).expect("a rename");
    };
    swap("..1", "");
    let config = mount.path().join("config.conf");
    symlink("..data/config.conf", &config).expect("a link");
    let flag = format!("--config={}", config.display());
    let mut daemon = manifests.run(&ns, &[&flag]);
    let before = rules(&ns);
    swap("..2", "clusterCIDR: 10.0.0.0/33");
    wait_for_log(&daemon, "`10.0.0.0/33` is not a range of addresses");
    swap("..3", "# the old settings");
    swap("..4", "mode: userspace");
    wait_for_log(&daemon, "there is no mode `userspace`");
    assert!(daemon.ended().is_none(), "{}", daemon.log());
    assert_eq!(
        lines_with(&daemon.log(), "ERROR").len(),
        2,
        "{}",
        daemon.log()
    );
    swap("..5", &format!("clusterCIDR: {CLUSTER_CIDR}"));
    let status = wait_for("the end", PATIENCE, || daemon.ended());
    assert_eq!(status.code(), Some(0), "{}", daemon.log());
    let told = lines_with(
        &daemon.log(),
        "has changed; exiting, to be restarted with the new settings",
    );
    assert_eq!(told.len(), 1, "{}", daemon.log());
    assert_eq!(rules(&ns), before, "the rules stay");
    let again = manifests.run(&ns, &[&flag]);
    assert!(rules(&ns).contains("10.244"), "{}", again.log());
}

#[test]
fn what_write_config_to_writes_is_read_without_a_word() {
    if !require_net_admin() {
        return;
    }
    let ns = Namespace::new("node");
    let directory = tempfile::tempdir().expect("a directory");
    let path = |name: &str| directory.path().join(name).display().to_string();
    let (first, second) = (path("first"), path("second"));
    let flags = [
        "--cluster-cidr=10.244.0.0/16",
        "--hostname-override=node-1",
        "--metrics-bind-address=127.0.0.1:9",
        "--write-config-to",
        &first,
    ];
    printed(&nftlet(&ns, &flags, ""));
    let output = nftlet(&ns, &["--config", &first, "--write-config-to", &second], "");
    assert_eq!(printed(&output), "");
    assert_eq!(lines_with(&said(&output), "WARN"), Vec::<String>::new());
    let [first, second] = [first, second].map(|path| fs::read_to_string(path).expect("written"));
    assert_eq!(first, second);
    for line in [
        "clusterCIDR: 10.244.0.0/16",
        "hostnameOverride: node-1",
        "mode: nftables",
        "metricsBindAddress: 127.0.0.1:9",
    ] {
        assert!(first.lines().any(|it| it == line), "{line}: {first}");
    }
    let nowhere = ["--write-config-to", "/nowhere/config"];
    let line = one_line(&nftlet(&ns, &nowhere, ""));
    assert!(
        line.contains("cannot write the configuration to /nowhere/config"),
        "{line}"
    );
}

#[test]
fn init_only_makes_kernel_settings_and_no_rule() {
    if !require_net_admin() {
        return;
    }
    let ns = Namespace::new("node");
    let config = Config::with("conntrack: {udpTimeout: 71s, udpStreamTimeout: 0s}");
    let read = |name: &str| {
        let path = format!("/proc/sys/net/netfilter/nf_conntrack_{name}");
        let output = ns.command("cat").arg(&path).output().expect("cat runs");
        String::from_utf8_lossy(&output.stdout).trim().to_owned()
    };
    // The files appear with the module, which an empty ruleset may not have loaded.
    ns.nft_load("table ip t { chain c { ct state new; }; }");
    let untouched = read("udp_timeout_stream");
    printed(&nftlet(&ns, &[config.flag(), "--init-only".to_owned()], ""));
    assert_eq!(read("udp_timeout"), "71");
    assert_eq!(read("tcp_timeout_close_wait"), "3600");
    assert_eq!(read("tcp_timeout_established"), "86400");
    assert_eq!(read("udp_timeout_stream"), untouched);
    assert!(!rules(&ns).contains("nftlet"), "{}", rules(&ns));
    // What cannot be set is said, and keeps nothing from starting behind it.
    let output = nftlet(&ns, &["--init-only", "--conntrack-max-per-core=1"], "");
    assert_eq!(output.status.code(), Some(0), "{}", said(&output));
    assert!(said(&output).contains("WARN cannot set") || said(&output).contains("cannot set /"));
}

#[test]
fn the_score_for_short_memory_is_set_and_a_missing_right_is_a_warning() {
    if !require_net_admin() {
        return;
    }
    let (manifests, ns) = (shop(), Namespace::new("node"));
    let score = |daemon: &Daemon| {
        let path = format!("/proc/{}/oom_score_adj", daemon.pid());
        fs::read_to_string(path)
            .expect("a process")
            .trim()
            .to_owned()
    };
    let config = Config::with("oomScoreAdj: 321");
    let flag = config.flag();
    let daemon = manifests.run(&ns, &[&flag]);
    assert_eq!(score(&daemon), "321");
    drop(daemon);
    let daemon = manifests.run(&ns, &["--oom-score-adj", "322"]);
    assert_eq!(score(&daemon), "322");
    drop(daemon);
    // Looking changes nothing, so that only the lowered score of a daemon can fail.
    let bounds = "--bounding-set=-all,+net_admin".to_owned();
    for (more, warnings) in [(&[][..], 0), (&["--oom-score-adj=-1000"][..], 1)] {
        let mut arguments = vec![bounds.clone(), "--".to_owned(), NFTLET.to_owned()];
        arguments.extend(manifests.arguments(more).into_iter().map(str::to_owned));
        let daemon = Daemon::start(&ns, "setpriv", arguments);
        wait_for_log(&daemon, "the rules are in place");
        let told = lines_with(&daemon.log(), "cannot set /proc/self/oom_score_adj");
        assert_eq!(told.len(), warnings, "{told:?}");
    }
}

#[test]
fn master_replaces_the_address_of_the_kubeconfig() {
    if !require_net_admin() {
        return;
    }
    let cluster = small_cluster();
    cluster.api.require_token("secret");
    let (url, kubeconfig) = (cluster.api.url(), cluster.kubeconfig());
    let text = fs::read_to_string(&kubeconfig).expect("a kubeconfig");
    fs::write(&kubeconfig, text.replace(&url, "http://192.0.2.1:1")).expect("written");
    let arguments = [
        "--kubeconfig",
        &kubeconfig,
        "--master",
        &url,
        "--hostname-override=node-1",
        "--once",
    ];
    printed(&nftlet(&cluster.ns, &arguments, ""));
    cluster.leads("10.96.0.11", &["10.1.0.1"]);
    // A file does not say where the server is otherwise, so the flag counts beside it.
    let config = Config::new(&kubeadm(&kubeconfig));
    let flag = config.flag();
    let output = nftlet(&cluster.ns, &[&arguments[2..], &[&flag]].concat(), "");
    printed(&output);
    assert!(!said(&output).contains("ignored"), "{}", said(&output));
}

#[test]
fn the_metrics_port_shows_how_it_was_started() {
    if !require_net_admin() {
        return;
    }
    let (manifests, ns) = (shop(), Namespace::new("node"));
    let address = "127.0.0.1:10249";
    let config = Config::with(&format!(
        "metricsBindAddress: {address}\nclusterCIDR: {CLUSTER_CIDR}"
    ));
    let flag = config.flag();
    let _daemon = manifests.run(&ns, &[&flag]);
    let page = |path: &str| {
        let (code, body) = get(&ns, address, path);
        assert_eq!(code, 200, "{path}: {body}");
        body
    };
    let shown: Value = serde_json::from_str(&page("/configz")).expect("JSON");
    let shown = &shown["kubeproxy.config.k8s.io"];
    assert_eq!(shown["clusterCIDR"], CLUSTER_CIDR);
    assert_eq!(shown["mode"], "nftables");
    let flags = page("/flagz");
    assert!(flags.starts_with("\nnftlet flags\n"), "{flags}");
    for line in [
        format!("config={}", config.path().display()),
        "hostname-override=node-1".to_owned(),
        "dry-run=false".to_owned(),
    ] {
        assert!(flags.lines().any(|it| it == line), "{line}: {flags}");
    }
    let status = page("/statusz");
    for line in [
        "Started: ",
        "Up: 0 hr 00 min ",
        "Binary version: ",
        "Paths: ",
    ] {
        assert!(
            status.lines().any(|it| it.starts_with(line)),
            "{line}: {status}"
        );
    }
    assert!(status.contains(" /configz /flagz /statusz"), "{status}");
    assert_eq!(page("/proxyMode"), "nftables");
}

#[test]
fn bind_address_hard_fail_ends_it_and_names_the_field() {
    if !require_net_admin() {
        return;
    }
    let (manifests, ns) = (shop(), Namespace::new("node"));
    let _held = ns.run(|| std::net::TcpListener::bind("127.0.0.1:10249").expect("a port"));
    let fields = "metricsBindAddress: 127.0.0.1:10249\nbindAddressHardFail: true";
    let config = Config::with(fields);
    let flag = config.flag();
    let line = one_line(&nftlet(&ns, &manifests.arguments(&[&flag]), ""));
    assert!(line.contains("cannot listen on 127.0.0.1:10249"), "{line}");
    assert!(
        line.contains("choose another one with metricsBindAddress"),
        "{line}"
    );
    assert_eq!(rules(&ns), "");
    config.write(&format!("{HEAD}metricsBindAddress: 127.0.0.1:10249\n"));
    let daemon = manifests.run(&ns, &[&flag]);
    assert_eq!(lines_with(&daemon.log(), "cannot listen on").len(), 1);
}

#[test]
fn completion_and_the_manual_need_neither_rights_nor_a_cluster() {
    if !require_net_admin() {
        return;
    }
    let ns = Namespace::new("node");
    let nothing = ["--bounding-set=-all", "--inh-caps=-all"];
    for (arguments, part) in [
        (&["completion", "bash"][..], "complete -F _nftlet"),
        (&["completion", "zsh"], "#compdef nftlet"),
        (&["completion", "fish"], "complete -c nftlet"),
        (&["man"], ".TH nftlet 1"),
    ] {
        let text = printed(&confined(&ns, &nothing, arguments, ""));
        assert!(text.contains(part), "{arguments:?}: {text}");
    }
    let line = refused(&nftlet(&ns, &["completion", "csh"], ""));
    assert!(line.contains("csh"), "{line}");
    assert!(Path::new(NFTLET).exists());
}

/// kubeadm writes `::` for a cluster whose nodes have IPv6 addresses.
#[test]
fn on_an_ipv6_cluster_the_ports_are_where_kube_proxy_has_them() {
    if !require_net_admin() {
        return;
    }
    let cluster = small_cluster();
    cluster.ns.sysctls(&[("net.ipv6.bindv6only", "1")]);
    let text = kubeadm(&cluster.kubeconfig());
    let config = Config::new(&text.replace("bindAddress: 0.0.0.0", "bindAddress: '::'"));
    assert!(text.contains("bindAddress: 0.0.0.0"), "{text}");
    let arguments = [config.flag(), "--hostname-override=node-1".to_owned()];
    let daemon = Daemon::start(&cluster.ns, NFTLET, arguments);
    wait_for_log(&daemon, "the rules are in place");
    for (address, path) in [
        ("[::1]:10256", "/healthz"),
        ("127.0.0.1:10256", "/healthz"),
        ("[::1]:10249", "/metrics"),
    ] {
        assert_eq!(get(&cluster.ns, address, path).0, 200, "{address}");
    }
    let (_, page) = get(&cluster.ns, "[::1]:10249", "/configz");
    let shown: Value = serde_json::from_str(&page).expect("JSON");
    let shown = &shown["kubeproxy.config.k8s.io"];
    assert_eq!(shown["healthzBindAddress"], "[::]:10256");
    assert_eq!(shown["metricsBindAddress"], "[::1]:10249");
}

#[test]
fn a_command_line_of_kube_proxy_means_the_same_with_one_warning() {
    if !require_net_admin() {
        return;
    }
    let (manifests, ns) = (shop(), Namespace::new("node"));
    let flags = [
        "--dry-run",
        "--v=2",
        "--logtostderr=true",
        "--iptables-sync-period=30s",
        "--iptables-masquerade-bit=5",
        "--masquerade-all=true",
    ];
    let output = nftlet(&ns, &manifests.arguments(&flags), "");
    let own = ["--dry-run", "--masquerade-bit=5", "--masquerade-all"];
    let own = nftlet(&ns, &manifests.arguments(&own), "");
    assert_eq!(printed(&output), printed(&own));
    assert_eq!(said(&own), "");
    let said = said(&output);
    assert_eq!(said.lines().count(), 1, "{said}");
    assert!(
        said.trim_end().ends_with(
            "these flags of kube-proxy have no effect here: --iptables-sync-period, --logtostderr"
        ),
        "{said}"
    );
    let line = refused(&nftlet(&ns, &["--iptables-sync-perod=30s"], ""));
    assert!(line.contains("did you mean"), "{line}");
}

#[test]
fn what_a_file_cannot_say_is_not_written() {
    if !require_net_admin() {
        return;
    }
    let ns = Namespace::new("node");
    let directory = tempfile::tempdir().expect("a directory");
    let path = directory.path().join("config");
    let to = format!("--write-config-to={}", path.display());
    let line = refused(&nftlet(&ns, &["--metrics-bind-address=", &to], ""));
    assert!(
        line.contains("cannot disable metricsBindAddress: an empty value means the default there"),
        "{line}"
    );
    assert!(!path.exists());
}
