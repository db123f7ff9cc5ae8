use std::net::SocketAddr;

use clap::CommandFactory;
use clap::error::ErrorKind;
use ipnet::IpNet;

use super::*;

mod values;

fn parse(args: &[&str]) -> Result<Settings, clap::Error> {
    CommandLine::parse(["nftlet"].iter().chain(args)).map(|line| line.settings)
}

#[track_caller]
fn parsed(args: &[&str]) -> Settings {
    parse(args).unwrap_or_else(|error| panic!("{args:?}: {error}"))
}

/// The first line of the error, after checking that it ends the process with 2.
#[track_caller]
fn refused(args: &[&str]) -> String {
    let error = match parse(args) {
        Ok(args) => panic!("accepted: {args:?}"),
        Err(error) => error,
    };
    assert_eq!(error.exit_code(), 2);
    error.to_string().lines().next().unwrap().to_owned()
}

fn net(text: &str) -> IpNet {
    text.parse().unwrap()
}

#[test]
fn the_definition_is_consistent() {
    Settings::command().debug_assert();
}

#[test]
fn nothing_given_means_the_defaults_of_kube_proxy() {
    let args = parsed(&[]);
    assert_eq!(args.kubeconfig, None);
    assert!(args.manifests.is_empty());
    assert!(args.cluster_cidr.as_slice().is_empty());
    assert_eq!(
        args.nodeport_addresses(),
        Ok(NodePortAddressesSetting::Primary)
    );
    assert!(!args.masquerade_all && !args.dry_run && !args.once);
    assert_eq!(args.verbosity(), 0);
    assert_eq!(args.log_format, LogFormat::Text);
    assert!(args.network_policy.is_on());
    assert_eq!(
        args.healthz_address(),
        Some("0.0.0.0:10256".parse().unwrap())
    );
    assert_eq!(
        args.metrics_address(),
        Some("127.0.0.1:10249".parse().unwrap())
    );
}

#[test]
fn everything_given_is_kept() {
    let args = parsed(&[
        "--kubeconfig=/etc/proxy.conf",
        "--hostname-override=Node-1.example",
        "--cluster-cidr=10.244.0.0/16,fd00:10::/64",
        "--nodeport-addresses=10.0.0.0/8,fd00::/8",
        "--masquerade-all",
        "--metrics-bind-address=10.0.0.1",
        "--healthz-bind-address=[::1]:8080",
        "-vv",
        "--log-format=json",
        "--network-policy=off",
    ]);
    assert_eq!(args.kubeconfig, Some("/etc/proxy.conf".into()));
    assert_eq!(args.hostname_override.as_deref(), Some("node-1.example"));
    assert_eq!(
        args.cluster_cidr.as_slice(),
        [net("10.244.0.0/16"), net("fd00:10::/64")]
    );
    assert_eq!(
        args.nodeport_addresses(),
        Ok(NodePortAddressesSetting::Ranges(vec![
            net("10.0.0.0/8"),
            net("fd00::/8")
        ]))
    );
    assert!(args.masquerade_all);
    assert_eq!(
        args.metrics_address(),
        Some("10.0.0.1:10249".parse().unwrap())
    );
    assert_eq!(args.healthz_address(), Some("[::1]:8080".parse().unwrap()));
    assert_eq!(args.verbosity(), 2);
    assert_eq!(args.log_format, LogFormat::Json);
    assert_eq!(args.network_policy, OnOff::Off);
}

#[test]
fn manifests_are_repeatable_and_a_dash_is_standard_input() {
    let args = parsed(&["--manifests", "a.yaml", "--manifests", "-", "--manifests=d"]);
    assert_eq!(args.manifests, ["a.yaml", "-", "d"].map(PathBuf::from));
    assert!(
        refused(&["--manifests="])
            .ends_with(": the path is empty; write a file, a directory, or - for standard input")
    );
}

#[test]
fn what_excludes_each_other_is_refused() {
    for (args, names) in [
        (
            &["--kubeconfig=a", "--manifests=b"],
            ["--kubeconfig", "--manifests"],
        ),
        (
            &["--manifests=b", "--kubeconfig=a"],
            ["--kubeconfig", "--manifests"],
        ),
        (&["--dry-run", "--once"], ["--dry-run", "--once"]),
        (&["--once", "--dry-run"], ["--dry-run", "--once"]),
    ] {
        assert_eq!(
            parse(args).unwrap_err().kind(),
            ErrorKind::ArgumentConflict,
            "{args:?}"
        );
        let line = refused(args);
        assert!(names.iter().all(|name| line.contains(name)), "{line}");
    }
}

#[test]
fn dry_runs_open_no_port_unless_one_is_given() {
    for look in [
        &["--manifests=a"][..],
        &["--dry-run"],
        &["--once"],
        &["--manifests=a", "--dry-run"],
    ] {
        let args = parsed(look);
        assert_eq!(args.healthz_address(), None, "{look:?}");
        assert_eq!(args.metrics_address(), None, "{look:?}");
        let more = [look, &["--metrics-bind-address=:9000"]].concat();
        let args = parsed(&more);
        assert_eq!(args.healthz_address(), None, "{more:?}");
        assert_eq!(args.metrics_address(), Some("[::]:9000".parse().unwrap()));
    }
}

#[test]
fn the_node_name_comes_from_the_flag_the_variable_or_the_host() {
    let with = parsed(&["--hostname-override", " Node-A "]);
    let without = parsed(&[]);
    let env = Some(" Node-B\n".to_owned());
    assert_eq!(with.node_name(env.clone(), "Host"), "node-a");
    assert_eq!(without.node_name(env, "Host"), "node-b");
    assert_eq!(without.node_name(Some("  ".to_owned()), " Host\n"), "host");
    assert_eq!(without.node_name(None, " Host.Example\n"), "host.example");
}

#[test]
fn flags_that_are_none_are_refused() {
    assert!(refused(&["--proxy-mode=userspace"]).contains("--proxy-mode"));
    assert!(refused(&["services.yaml"]).contains("services.yaml"));
    assert!(refused(&["--kubeconfig"]).contains("--kubeconfig"));
    assert!(refused(&["--once", "--once"]).contains("--once"));
}

#[test]
fn help_names_every_flag_in_its_group_within_the_width() {
    let error = parse(&["--help"]).unwrap_err();
    assert_eq!(error.exit_code(), 0);
    let help = error.to_string();
    let mut rest = help.as_str();
    for expected in [
        "Usage: nftlet [--kubeconfig FILE | --manifests PATH...] [--dry-run | --once] [OPTIONS]",
        "Source:",
        "--kubeconfig <FILE>",
        "--manifests <PATH>",
        "--hostname-override <NODE>",
        "Mode:",
        "--dry-run",
        "--once",
        "Services:",
        "--cluster-cidr <CIDR[,CIDR]>",
        "--detect-local-mode <MODE>",
        "[default: ClusterCIDR]",
        "--pod-bridge-interface <NAME>",
        "--pod-interface-name-prefix <PREFIX>",
        "--nodeport-addresses <primary|CIDR,...>",
        "[default: primary]",
        "--masquerade-all",
        "Observability:",
        "--metrics-bind-address <ADDR>",
        "127.0.0.1:10249",
        "--healthz-bind-address <ADDR>",
        "0.0.0.0:10256",
        "-v",
        "--log-format <text|json>",
        "[default: text]",
        "Examples:",
    ] {
        let (_, after) = rest
            .split_once(expected)
            .unwrap_or_else(|| panic!("`{expected}` is missing or out of order in:\n{help}"));
        rest = after;
    }
    for line in help.lines() {
        assert!(line.chars().count() <= 100, "{line}");
    }
}

#[test]
fn the_version_is_that_of_the_package_and_its_commit() {
    let error = parse(&["--version"]).unwrap_err();
    assert_eq!(error.exit_code(), 0);
    let built = version(option_env!("NFTLET_COMMIT"));
    assert_eq!(error.to_string(), format!("nftlet {built}\n"));
    let of_package = env!("CARGO_PKG_VERSION");
    assert_eq!(
        version(Some("0a1b2c3d")),
        format!("{of_package} (0a1b2c3d)")
    );
    for none in [None, Some(""), Some("unknown")] {
        assert_eq!(version(none), of_package);
    }
}

#[test]
fn cleanup_takes_its_value_with_a_sign_only() {
    let cleanup = |flags: &[&str]| parse(flags).map(|args| args.cleanup);
    assert_eq!(cleanup(&[]).unwrap(), None);
    for (flag, expected) in [
        ("--cleanup", Cleanup::All),
        ("--cleanup=all", Cleanup::All),
        ("--cleanup=true", Cleanup::All),
        ("--cleanup=nftlet", Cleanup::Nftlet),
        ("--cleanup=kube-proxy", Cleanup::KubeProxy),
        ("--cleanup=false", Cleanup::Nothing),
    ] {
        assert_eq!(cleanup(&[flag]).unwrap(), Some(expected), "{flag}");
    }
    let error = cleanup(&["--cleanup=iptables"]).unwrap_err().to_string();
    assert!(error.contains("write all, nftlet or kube-proxy"), "{error}");
    // Beside the flags of a DaemonSet, as with kube-proxy.
    assert!(cleanup(&["--cleanup", "--kubeconfig", "x", "--masquerade-all"]).is_ok());
    for other in ["--dry-run", "--once", "--keep-kube-proxy", "nftlet"] {
        assert!(cleanup(&["--cleanup", other]).is_err(), "{other}");
    }
}

#[test]
fn the_default_addresses_have_the_family_of_the_node() {
    let addresses = |args: &[&str]| {
        let args = parsed(args);
        let shown = |address: Option<SocketAddr>| address.map(|it| it.to_string());
        (
            shown(args.healthz_address()).unwrap_or_default(),
            shown(args.metrics_address()).unwrap_or_default(),
        )
    };
    for (own, healthz, metrics) in [
        ("0.0.0.0", "0.0.0.0:10256", "127.0.0.1:10249"),
        ("192.0.2.1", "0.0.0.0:10256", "127.0.0.1:10249"),
        ("::ffff:192.0.2.1", "0.0.0.0:10256", "127.0.0.1:10249"),
        ("::", "[::]:10256", "[::1]:10249"),
        ("2001:db8::1", "[::]:10256", "[::1]:10249"),
    ] {
        let found = addresses(&["--bind-address", own]);
        assert_eq!(found, (healthz.to_owned(), metrics.to_owned()), "{own}");
    }
    let other = &["--bind-address=::", "--metrics-bind-address=127.0.0.1"];
    assert_eq!(addresses(other).1, "127.0.0.1:10249");
}

/// Command lines of kube-proxy as distributions and installers write them.
#[test]
fn command_lines_of_kube_proxy_are_accepted() {
    let args = parsed(&[
        "--logtostderr=true",
        "--v=4",
        "--vmodule=proxier=5",
        "--log_dir=/var/log",
        "--feature-gates=A=true,B=false",
        "--feature-gates",
        "C=true",
        "--kube-api-qps=50",
        "--kube-api-burst",
        "100",
        "--iptables-min-sync-period=10s",
        "--iptables-masquerade-bit=15",
        "--ipvs-strict-arp",
        "--ipvs-exclude-cidrs=10.0.0.0/8",
        "--profiling=false",
        "--logging-format=json",
        "--masquerade-all=true",
        "--conntrack-tcp-be-liberal=True",
        "--bind-address-hard-fail=false",
        "--init-only=true",
        "--nodeport-addresses=10.0.0.0/8",
        "--nodeport-addresses=fd00::/8,172.16.0.0/12",
        "--healthz-port=10356",
        "--metrics-port=0",
    ]);
    assert_eq!(
        args.ignored.given().join(" "),
        "--feature-gates --iptables-min-sync-period --ipvs-exclude-cidrs --kube-api-burst \
         --kube-api-qps --log-dir --vmodule --ipvs-strict-arp --logtostderr --profiling"
    );
    assert_eq!(args.verbosity(), 1);
    assert_eq!(args.masquerade_bit, 15);
    assert_eq!(args.log_format, LogFormat::Json);
    assert!(args.masquerade_all && args.conntrack_tcp_be_liberal);
    assert!(args.init_only && !args.bind_address_hard_fail);
    assert_eq!(
        args.nodeport_addresses(),
        Ok(NodePortAddressesSetting::Ranges(
            ["10.0.0.0/8", "fd00::/8", "172.16.0.0/12"].map(net).into()
        ))
    );
    assert_eq!(
        args.healthz_address(),
        Some("0.0.0.0:10356".parse().unwrap())
    );
    assert_eq!(args.metrics_address(), None);
    assert_eq!(parsed(&[]).ignored.given(), Vec::<String>::new());
}

#[test]
fn a_verbosity_is_counted_or_kube_proxys() {
    for (args, wanted) in [
        (&["-v"][..], 1),
        (&["-vv"], 2),
        (&["-vvv"], 3),
        (&["-v", "-v"], 2),
        (&["-v=2"], 0),
        (&["-v=5"], 1),
        (&["-v4"], 1),
        (&["-v", "6", "--once"], 2),
        (&["-v", "--once"], 1),
        (&["--v", "--once"], 1),
        (&["--v=7"], 2),
        (&["--v", "9"], 3),
        (&["-vv", "--once"], 2),
    ] {
        assert_eq!(parsed(args).verbosity(), wanted, "{args:?}");
    }
    for wrong in ["-v=much", "--v=-1", "-v1v"] {
        let line = refused(&[wrong]);
        assert!(
            line.contains("is not a verbosity; write a number"),
            "{line}"
        );
    }
}

#[test]
fn switches_are_true_or_false_and_contradictions_are_refused() {
    for flag in [
        "--masquerade-all",
        "--conntrack-tcp-be-liberal",
        "--bind-address-hard-fail",
        "--init-only",
    ] {
        let line = refused(&[&format!("{flag}=maybe")]);
        assert!(
            line.ends_with("`maybe` is neither true nor false"),
            "{line}"
        );
    }
    assert!(!parsed(&["--masquerade-all=0"]).masquerade_all);
    let args = parsed(&["--nodeport-addresses=primary", "--nodeport-addresses=::/0"]);
    assert_eq!(args.nodeport_addresses(), Err(Error::PrimaryAndRanges));
    assert!(refused(&["--nftlet-typo"]).contains("--nftlet-typo"));
}
