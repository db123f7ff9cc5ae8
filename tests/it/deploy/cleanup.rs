//! `--cleanup` on a host full of other people's rules.

use std::fs;
use std::io::Write as _;
use std::path::Path;
use std::process::{Command, Output, Stdio};

use super::neighbours::{
    add_kube_proxy, assert_same, everything, host, kinds, kube_proxy_iptables, kube_proxy_nftables,
};
use crate::support::agent::said;
use crate::support::kube_proxy::Iptables;
use crate::support::manifests::{CLUSTER_CIDR, Manifests, Service};
use crate::support::skip::skip;
use nftlet_lab::netns::{Namespace, PATIENCE, require_net_admin, wait_for};

fn nftlet(node: &Namespace, arguments: &[&str]) -> Output {
    let mut command = node.command(env!("CARGO_BIN_EXE_nftlet"));
    command.args(arguments).output().expect("nftlet runs")
}

/// Cleans up and returns the list.
#[track_caller]
fn clean(node: &Namespace, flag: &str) -> String {
    let output = nftlet(node, &[flag]);
    assert_eq!(output.status.code(), Some(0), "{}", said(&output));
    String::from_utf8_lossy(&output.stdout).into_owned()
}

fn shop() -> Manifests {
    let manifests = Manifests::new();
    let web = Service::new("web", 10).port("http", "TCP", 80, Some(30080));
    manifests.service(&web);
    manifests.endpoints(&web, 8080, &[("10.244.1.11".into(), true)]);
    manifests
}

#[test]
fn all_goes_that_is_nftlets_or_kube_proxys_and_nothing_of_others() {
    if !require_net_admin() {
        return;
    }
    let kinds = kinds();
    let node = host(&kinds);
    let before = everything(&node, &kinds);
    add_kube_proxy(&node, &kinds);
    shop().program(&node, &[]);
    node.nft_load(
        "add table ip nftlet-policy; add chain ip nftlet-policy c; add table ip6 nftlet-policy",
    );
    assert_ne!(everything(&node, &kinds), before);

    let list = clean(&node, "--cleanup");
    assert_same(&everything(&node, &kinds), &before);
    let tables = ["ip nftlet", "ip6 nftlet", "ip kube-proxy", "ip6 kube-proxy"];
    let more = ["ip nftlet-policy", "ip6 nftlet-policy"];
    for table in tables.iter().chain(&more) {
        let found = list
            .lines()
            .any(|line| line.starts_with(&format!("table {table} ")));
        assert!(found, "{table}: {list}");
    }
    for kind in &kinds {
        for v6 in [false, true] {
            let family = kind.program(v6, "");
            // mangle has the canary, filter what it always has, nat the chains of services too.
            for (chains, table) in [
                ("1 chain of kube-proxy ", "mangle"),
                ("6 chains of kube-proxy and 9 jumps ", "filter"),
                ("13 chains of kube-proxy and 3 jumps ", "nat"),
            ] {
                let line = |line: &str| {
                    line.starts_with(chains)
                        && line.ends_with(&format!("  {family}, table {table}"))
                };
                assert!(list.lines().any(line), "{family} {chains} {table}: {list}");
            }
        }
    }
    // Every second column begins where the heading says.
    let column = list.find("WHERE").expect("a heading");
    for line in list.lines() {
        assert_eq!(line.get(column - 2..column), Some("  "), "{list}");
        assert_ne!(line.get(column..=column), Some(" "), "{list}");
    }

    assert_eq!(clean(&node, "--cleanup"), "nothing to remove\n");
    assert_same(&everything(&node, &kinds), &before);
}

#[test]
fn each_part_can_be_removed_alone() {
    if !require_net_admin() {
        return;
    }
    let kinds = kinds();
    let node = host(&kinds);
    let others = everything(&node, &kinds);
    add_kube_proxy(&node, &kinds);
    let with_kube_proxy = everything(&node, &kinds);
    shop().program(&node, &[]);

    let list = clean(&node, "--cleanup=nftlet");
    assert_same(&everything(&node, &kinds), &with_kube_proxy);
    assert_eq!(list.lines().count(), 3, "{list}");

    shop().program(&node, &[]);
    clean(&node, "--cleanup=kube-proxy");
    let rules = node.nft(&["list", "tables"]);
    assert!(rules.contains("table ip nftlet\n"), "{rules}");
    clean(&node, "--cleanup=nftlet");
    assert_same(&everything(&node, &kinds), &others);
    // kube-proxy's own flag is true or false.
    add_kube_proxy(&node, &kinds);
    clean(&node, "--cleanup=true");
    assert_same(&everything(&node, &kinds), &others);
}

#[test]
fn an_empty_host_stays_empty() {
    if !require_net_admin() {
        return;
    }
    let node = Namespace::new("node");
    assert_eq!(clean(&node, "--cleanup"), "nothing to remove\n");
    assert_eq!(node.nft(&["list", "ruleset"]), "");
    // Looking for legacy rules must not bring legacy tables into being.
    let tables = node.run(|| fs::read_to_string("/proc/thread-self/net/ip_tables_names"));
    assert_eq!(tables.unwrap_or_default(), "");
}

#[test]
fn masquerading_stays_while_others_ask_for_it() {
    if !require_net_admin() {
        return;
    }
    let node = Namespace::new("node");
    Iptables::Nft.load(&node, false, &kube_proxy_iptables(false));
    let mark =
        "*nat\n:CNI-HOSTPORT-SETMARK - [0:0]\n-A CNI-HOSTPORT-SETMARK -j KUBE-MARK-MASQ\nCOMMIT\n";
    Iptables::Nft.load(&node, false, mark);
    let output = nftlet(&node, &["--cleanup"]);
    let told = said(&output);
    assert_eq!(output.status.code(), Some(0), "{told}");
    assert!(
        told.contains("KUBE-MARK-MASQ and KUBE-POSTROUTING"),
        "{told}"
    );
    let saved = Iptables::Nft.save(&node, false);
    assert!(
        saved.contains("-A CNI-HOSTPORT-SETMARK -j KUBE-MARK-MASQ"),
        "{saved}"
    );
    assert!(saved.contains("-A KUBE-MARK-MASQ -j MARK"), "{saved}");
    assert!(saved.contains("-j KUBE-POSTROUTING"), "{saved}");
    assert!(!saved.contains("KUBE-SERVICES"), "{saved}");
}

#[test]
fn what_the_ipvs_mode_leaves_goes_and_a_starting_nftlet_leaves_it() {
    if !require_net_admin() {
        return;
    }
    let node = Namespace::new("node");
    let sets = "create KUBE-CLUSTER-IP hash:ip,port\n\
                create KUBE-6-LOAD-BALANCER-SOURCE-CID hash:net family inet6\n\
                create KUBE-NODE-PORT-TCP bitmap:port range 0-65535\n\
                add KUBE-NODE-PORT-TCP 30080\n\
                create KUBE-SRC-ABC hash:ip\n";
    node.feed("ipset", &["restore"], sets);
    // Any kind of interface will do where the kernel has no dummies.
    let dummy = node
        .command("ip")
        .args(["link", "add", "kube-ipvs0", "type", "dummy"])
        .output();
    if !dummy.expect("ip runs").status.success() {
        skip(
            "dummy-interfaces",
            "the kernel has none; a bridge stands in",
        );
        node.ip("link add kube-ipvs0 type bridge");
    }
    node.addr_add("kube-ipvs0", "10.96.0.10/32");
    // A rule in iptables uses a set until it goes.
    let filter = "*filter\n:KUBE-NODE-PORT - [0:0]\n-A INPUT -j KUBE-NODE-PORT\n\
                  -A KUBE-NODE-PORT -m set --match-set KUBE-NODE-PORT-TCP dst -j ACCEPT\nCOMMIT\n";
    let kinds = kinds();
    kinds
        .iter()
        .for_each(|kind| kind.load(&node, false, filter));
    let ipvs = ipvs(&node);

    let daemon = shop().run(&node, &["--cluster-cidr", CLUSTER_CIDR]);
    wait_for("the note", PATIENCE, || {
        daemon
            .log()
            .contains("existing connections go through it")
            .then_some(())
    });
    for kind in &kinds {
        let saved = kind.save(&node, false);
        assert!(!saved.contains("KUBE-NODE-PORT"), "{saved}");
    }
    let names = || node.feed("ipset", &["list", "-name"], "");
    assert!(names().contains("KUBE-CLUSTER-IP"));
    assert!(node.feed("ip", &["link"], "").contains("kube-ipvs0"));

    kinds
        .iter()
        .for_each(|kind| kind.load(&node, false, filter));
    let list = clean(&node, "--cleanup=kube-proxy");
    assert_eq!(names(), "KUBE-SRC-ABC\n", "{list}");
    assert!(
        !node.feed("ip", &["link"], "").contains("kube-ipvs0"),
        "{list}"
    );
    assert!(list.contains("interface kube-ipvs0"), "{list}");
    if ipvs {
        let left = node.feed("ipvsadm", &["-Sn"], "");
        assert_eq!(left, "-A -t 192.168.10.99:80 -s rr\n", "{list}");
    }
}

/// Creates virtual services, two of kube-proxy and one of another program, if the kernel can.
fn ipvs(node: &Namespace) -> bool {
    for service in ["10.96.0.10:80", "192.168.10.1:30080", "192.168.10.99:80"] {
        let output = node
            .command("ipvsadm")
            .args(["-A", "-t", service, "-s", "rr"])
            .output();
        match output {
            Ok(output) if output.status.success() => {}
            Ok(output) => {
                let lines = said(&output);
                skip("ipvs", lines.lines().next().unwrap_or_default());
                return false;
            }
            Err(error) => {
                skip("ipvs", &format!("ipvsadm: {error}"));
                return false;
            }
        }
    }
    true
}

/// A directory in which only these programs are.
fn programs(links: &[(&str, &str)]) -> tempfile::TempDir {
    let directory = tempfile::tempdir().expect("a temporary directory");
    for (name, script) in links {
        // Not written by this process: children that other tests start meanwhile would have the
        // file open for a moment, in which it cannot be run.
        let mut install = Command::new("install")
            .args(["--mode=755", "/dev/stdin"])
            .arg(directory.path().join(name))
            .stdin(Stdio::piped())
            .spawn()
            .expect("install runs");
        let mut stdin = install.stdin.take().expect("standard input is piped");
        write!(stdin, "#!/bin/sh\n{script}\n").expect("a program is written");
        drop(stdin);
        assert!(install.wait().expect("install ends").success());
    }
    directory
}

/// nftlet with other programs in front of the host's.
fn with_programs(node: &Namespace, directory: &Path, arguments: &[&str]) -> Output {
    let mut command = node.command(env!("CARGO_BIN_EXE_nftlet"));
    // `nsenter` is found by the path of this process.
    command.env("PATH", format!("{}:/usr/bin:/bin", directory.display()));
    command.args(arguments).output().expect("nftlet runs")
}

#[test]
fn a_program_that_fails_leaves_the_rest_to_be_removed() {
    if !require_net_admin() {
        return;
    }
    let node = Namespace::new("node");
    Iptables::Nft.load(&node, false, &kube_proxy_iptables(false));
    node.nft_load(&kube_proxy_nftables());
    let saved = Iptables::Nft.save(&node, false);
    let broken = programs(&[
        (
            "iptables-nft-restore",
            "cat >/dev/null; echo 'line 7 failed' >&2; exit 4",
        ),
        (
            "iptables-nft-save",
            "exec /usr/sbin/iptables-nft-save \"$@\"",
        ),
    ]);
    let output = with_programs(&node, broken.path(), &["--cleanup"]);
    let told = said(&output);
    assert_eq!(output.status.code(), Some(1), "{told}");
    assert!(told.contains("iptables-nft-restore failed"), "{told}");
    assert!(told.contains("line 7 failed"), "{told}");
    // One line for each of the three tables, and a last one.
    assert_eq!(told.lines().count(), 4, "{told}");
    let list = String::from_utf8_lossy(&output.stdout);
    assert!(list.contains("table ip kube-proxy"), "{list}");
    assert!(!list.contains("iptables"), "{list}");
    assert_eq!(Iptables::Nft.save(&node, false), saved);
}

/// Both kinds of iptables are one program each, which all names lead to.
#[test]
fn without_iptables_programs_remaining_rules_are_reported() {
    if !require_net_admin() {
        return;
    }
    let node = Namespace::new("node");
    let kinds = kinds();
    kinds
        .iter()
        .for_each(|kind| kind.load(&node, false, &kube_proxy_iptables(false)));
    node.nft_load(&kube_proxy_nftables());
    let saved: Vec<_> = kinds.iter().map(|kind| kind.save(&node, false)).collect();
    let hidden = "for program in nft legacy; do \
                  mount --bind /dev/null /usr/sbin/xtables-$program-multi || exit 9; done; \
                  exec \"$0\" --cleanup";
    let output = node
        .command("unshare")
        .args(["--mount", "sh", "-c", hidden, env!("CARGO_BIN_EXE_nftlet")])
        .output()
        .expect("unshare runs");
    let told = said(&output);
    assert_eq!(output.status.code(), Some(1), "{told}");
    let line = "20 chains of kube-proxy stay in iptables-nft, because there is no program \
                iptables-nft-save; install iptables";
    assert_eq!(told.matches(line).count(), 1, "{told}");
    if kinds.contains(&Iptables::Legacy) {
        let line = "iptables-legacy has tables (filter, mangle, nat) whose chains cannot be listed";
        assert_eq!(told.matches(line).count(), 1, "{told}");
    }
    assert_eq!(told.lines().count(), kinds.len() + 1, "{told}");
    let list = String::from_utf8_lossy(&output.stdout);
    assert!(list.contains("table ip kube-proxy"), "{list}");
    let left: Vec<_> = kinds.iter().map(|kind| kind.save(&node, false)).collect();
    assert_eq!(left, saved);
}

#[test]
fn a_table_that_changes_meanwhile_is_read_again() {
    if !require_net_admin() {
        return;
    }
    let node = Namespace::new("node");
    Iptables::Nft.load(&node, false, &kube_proxy_iptables(false));
    // Another process adds a jump between reading and writing, once.
    let memory = tempfile::tempdir().expect("a temporary directory");
    let done = memory.path().join("done");
    let racing = programs(&[
        (
            "iptables-nft-save",
            "exec /usr/sbin/iptables-nft-save \"$@\"",
        ),
        (
            "iptables-nft-restore",
            &format!(
                "if mkdir {} 2>/dev/null; then /usr/sbin/iptables-nft -t nat -A PREROUTING -p udp -j KUBE-SERVICES; \
                 /usr/sbin/iptables-nft -A INPUT -p udp -j KUBE-SERVICES; fi\n\
                 exec /usr/sbin/iptables-nft-restore \"$@\"",
                done.display()
            ),
        ),
    ]);
    let output = with_programs(&node, racing.path(), &["--cleanup"]);
    assert_eq!(output.status.code(), Some(0), "{}", said(&output));
    assert!(done.exists(), "the other writer came in between");
    let saved = Iptables::Nft.save(&node, false);
    assert!(!saved.contains("KUBE-"), "{saved}");
}

#[test]
fn an_nftlet_that_still_runs_is_reported() {
    if !require_net_admin() {
        return;
    }
    let node = Namespace::new("node");
    let manifests = shop();
    let _daemon = manifests.run(&node, &["--cluster-cidr", CLUSTER_CIDR]);
    let output = nftlet(&node, &["--cleanup=nftlet"]);
    let told = said(&output);
    assert_eq!(output.status.code(), Some(1), "{told}");
    assert!(told.contains("still running on this node"), "{told}");
}

#[test]
fn kube_proxys_rules_stay_where_a_flag_asks_or_nothing_was_programmed() {
    if !require_net_admin() {
        return;
    }
    let node = Namespace::new("node");
    node.nft_load(&kube_proxy_nftables());
    let tables = || node.nft(&["list", "tables"]);
    let manifests = shop();
    manifests.program(&node, &[]);
    assert!(
        tables().contains("ip kube-proxy"),
        "--once is a look beside another proxy"
    );
    let cidr = ["--cluster-cidr", CLUSTER_CIDR];
    let keep = manifests.run(&node, &[&cidr[..], &["--keep-kube-proxy"]].concat());
    // As long as it takes another one to remove them, from its start to the end.
    let other = Namespace::new("other");
    other.nft_load(&kube_proxy_nftables());
    let removing = manifests.run(&other, &cidr);
    wait_for("kube-proxy's tables to go elsewhere", PATIENCE, || {
        (!other.nft(&["list", "tables"]).contains("kube-proxy")).then_some(())
    });
    drop((keep, removing));
    assert!(tables().contains("ip kube-proxy"));
    let daemon = manifests.run(&node, &cidr);
    wait_for("kube-proxy's tables to go", PATIENCE, || {
        (!tables().contains("kube-proxy")).then_some(())
    });
    wait_for("the log", PATIENCE, || {
        daemon
            .log()
            .contains("removed what kube-proxy left: table ip kube-proxy")
            .then_some(())
    });
}

#[test]
fn bad_command_lines_and_missing_rights_have_one_clear_line() {
    if !require_net_admin() {
        return;
    }
    let node = Namespace::new("node");
    for flags in [
        &["--cleanup", "--dry-run"][..],
        &["--cleanup", "--once"],
        &["--cleanup", "--manifests", "x"],
        &["--cleanup", "--keep-kube-proxy"],
        &["--cleanup=everything"],
    ] {
        let output = nftlet(&node, flags);
        let told = said(&output);
        assert_eq!(output.status.code(), Some(2), "{flags:?}: {told}");
        assert_eq!(told.matches("error:").count(), 1, "{told}");
    }
    let weak = node
        .command("setpriv")
        .args([
            "--bounding-set",
            "-all",
            "--inh-caps",
            "-all",
            env!("CARGO_BIN_EXE_nftlet"),
        ])
        .arg("--cleanup")
        .output()
        .expect("setpriv runs");
    let told = said(&weak);
    assert_eq!(weak.status.code(), Some(1), "{told}");
    assert_eq!(told.lines().count(), 1, "{told}");
    assert!(told.contains("CAP_NET_ADMIN"), "{told}");
}

/// A table of iptables with rules that were written with `nft` is one that iptables' own
/// programs do not print.
#[test]
fn chains_that_iptables_does_not_show_are_reported() {
    if !require_net_admin() {
        return;
    }
    let node = Namespace::new("node");
    Iptables::Nft.load(&node, false, &kube_proxy_iptables(false));
    node.nft_load("add rule ip nat POSTROUTING oifname \"nowhere\" masquerade");
    node.nft_load("add rule ip nat POSTROUTING meta mark 0x77 counter masquerade random");
    let before = node.nft(&["-s", "list", "table", "ip", "nat"]);
    assert!(before.contains("chain KUBE-SERVICES"), "{before}");
    let output = nftlet(&node, &["--cleanup"]);
    let told = said(&output);
    let shown = Iptables::Nft.save(&node, false);
    if shown.contains("*nat") {
        skip(
            "incompatible-tables",
            "this iptables prints the rules of nft",
        );
        return;
    }
    assert_eq!(output.status.code(), Some(1), "{told}");
    let line = "13 chains of kube-proxy stay in table ip nat, because";
    assert_eq!(told.matches(line).count(), 1, "{told}");
    // The tables that it does show are cleaned.
    assert!(!shown.contains("KUBE-"), "{shown}");
    node.nft_load("flush chain ip nat POSTROUTING");
    assert!(clean(&node, "--cleanup").contains("13 chains of kube-proxy"));
}

/// A kube-proxy that still runs writes its rules again; its port becomes free when it
/// has ended.
#[test]
fn rules_that_came_back_go_when_a_port_becomes_free() {
    if !require_net_admin() {
        return;
    }
    let node = Namespace::new("node");
    node.nft_load(&kube_proxy_nftables());
    let held = node.run(|| std::net::TcpListener::bind("127.0.0.1:10249").expect("a port"));
    let address = "--metrics-bind-address=127.0.0.1:10249";
    let _daemon = shop().run(&node, &["--cluster-cidr", CLUSTER_CIDR, address]);
    let gone = || (!node.nft(&["list", "tables"]).contains("kube-proxy")).then_some(());
    wait_for("kube-proxy's tables to go", PATIENCE, gone);
    node.nft_load(&kube_proxy_nftables());
    assert_eq!(gone(), None);
    drop(held);
    wait_for("them to go again", PATIENCE, gone);
}

#[test]
fn rules_of_kube_proxy_are_removed_without_ports() {
    if !require_net_admin() {
        return;
    }
    let node = Namespace::new("node");
    node.nft_load(&kube_proxy_nftables());
    let no_ports = ["--metrics-bind-address=", "--healthz-bind-address="];
    let arguments = [&["--cluster-cidr", CLUSTER_CIDR], &no_ports[..]].concat();
    let _daemon = shop().run(&node, &arguments);
    wait_for("kube-proxy's tables to be removed", PATIENCE, || {
        (!node.nft(&["list", "tables"]).contains("kube-proxy")).then_some(())
    });
}
