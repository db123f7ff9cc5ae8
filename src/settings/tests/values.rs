use super::*;

#[test]
fn addresses_have_the_forms_of_kube_proxy() {
    for (text, wanted) in [
        ("", None),
        (" ", None),
        ("10.0.0.1", Some("10.0.0.1:10256")),
        ("10.0.0.1:0", Some("10.0.0.1:0")),
        ("10.0.0.1:65535", Some("10.0.0.1:65535")),
        ("::", Some("[::]:10256")),
        ("fd00::1", Some("[fd00::1]:10256")),
        ("[fd00::1]", Some("[fd00::1]:10256")),
        ("[fd00::1]:80", Some("[fd00::1]:80")),
        (":80", Some("[::]:80")),
    ] {
        let args = parsed(&["--healthz-bind-address", text]);
        let wanted = wanted.map(|address| address.parse().unwrap());
        assert_eq!(args.healthz_address(), wanted, "{text:?}");
    }
}

#[test]
fn addresses_that_are_none_are_refused_with_the_forms() {
    for text in [
        "localhost",
        "localhost:80",
        "10.0.0",
        "10.0.0.256:80",
        "[10.0.0.1]:80",
        "[::1",
        "[::1]80",
        "::1::80",
        "80",
    ] {
        assert_eq!(
            refused(&["--metrics-bind-address", text]),
            format!(
                "error: invalid value '{text}' for '--metrics-bind-address <ADDR>': `{text}` is not an IP address; write IP, IP:PORT, [IPv6]:PORT, :PORT or an empty value to disable it"
            )
        );
    }
    for port in ["", "65536", "+80", "http", "-1"] {
        for host in ["10.0.0.1", "[::1]", ""] {
            let line = refused(&["--metrics-bind-address", &format!("{host}:{port}")]);
            let wanted = format!(
                ": `{port}` is not a port; write a number from 0 to 65535, where 0 is any free port"
            );
            assert!(line.ends_with(&wanted), "{line}");
        }
    }
}

#[test]
fn pod_networks_are_one_per_family() {
    let cidrs = |text: &str| {
        let parsed = parsed(&["--cluster-cidr", text]).cluster_cidr;
        parsed.as_slice().to_vec()
    };
    assert_eq!(cidrs(""), []);
    assert_eq!(cidrs("10.244.3.1/16"), [net("10.244.0.0/16")]);
    assert_eq!(
        cidrs("fd00:10::/64, 10.0.0.0/8"),
        [net("fd00:10::/64"), net("10.0.0.0/8")]
    );
    assert_eq!(
        refused(&["--cluster-cidr=10.0.0.0/8,fd00::/64,10.244.0.0/16"]),
        "error: invalid value '10.0.0.0/8,fd00::/64,10.244.0.0/16' for '--cluster-cidr <CIDR[,CIDR]>': 10.0.0.0/8 and 10.244.0.0/16 are both IPv4; give at most one range per family"
    );
    assert!(
        refused(&["--cluster-cidr=fd01::/64,fd00::/64"])
            .ends_with("fd01::/64 and fd00::/64 are both IPv6; give at most one range per family")
    );
}

#[test]
fn ranges_that_are_none_are_refused_with_an_example() {
    for flag in ["--cluster-cidr", "--nodeport-addresses"] {
        for (text, wanted) in [
            (
                "10.0.0.0/33",
                ": `10.0.0.0/33` is not a range of addresses; write it like 10.244.0.0/16 or fd00:10::/64",
            ),
            (
                "10.0.0.0/8,pods",
                ": `pods` is not a range of addresses; write it like 10.244.0.0/16 or fd00:10::/64",
            ),
            (
                "10.0.0.1",
                ": `10.0.0.1` has no prefix length; write 10.0.0.1/32 for this one address",
            ),
            (
                "fd00::1",
                ": `fd00::1` has no prefix length; write fd00::1/128 for this one address",
            ),
        ] {
            let line = refused(&[flag, text]);
            assert!(line.ends_with(wanted), "{line}");
        }
        for text in ["10.0.0.0/8,", ",10.0.0.0/8", ","] {
            let line = refused(&[flag, text]);
            assert!(
                line.contains("a range is missing before or after a comma"),
                "{line}"
            );
        }
    }
}

#[test]
fn nodeport_addresses_are_primary_or_ranges() {
    let addresses = |text: &str| {
        let args = parsed(&["--nodeport-addresses", text]);
        args.nodeport_addresses().unwrap()
    };
    assert_eq!(addresses("primary"), NodePortAddressesSetting::Primary);
    assert_eq!(addresses(""), NodePortAddressesSetting::Primary);
    assert_eq!(
        addresses("192.168.1.7/24"),
        NodePortAddressesSetting::Ranges(vec![net("192.168.1.0/24")])
    );
    for mixed in [
        "primary,10.0.0.0/8",
        "10.0.0.0/8, primary",
        "primary,primary",
    ] {
        let line = refused(&["--nodeport-addresses", mixed]);
        assert!(
            line.ends_with(
                ": `primary` cannot be combined with ranges; write either primary or ranges like 10.0.0.0/8"
            ),
            "{line}"
        );
    }
}

#[test]
fn pods_are_recognised_in_one_of_four_modes() {
    let mode = |more: &[&str]| {
        let given = [&["--cluster-cidr", "10.0.0.0/8"], more].concat();
        parsed(&given)
            .detect_local()
            .map_err(|error| error.to_string())
    };
    let cluster = Ok(DetectLocalSetting::ClusterCidr(vec![net("10.0.0.0/8")]));
    assert_eq!(mode(&[]), cluster);
    assert_eq!(mode(&["--detect-local-mode="]), cluster);
    assert_eq!(mode(&["--detect-local-mode=ClusterCIDR"]), cluster);
    assert_eq!(
        mode(&["--detect-local-mode=NodeCIDR"]),
        Ok(DetectLocalSetting::NodeCidr)
    );
    let bridge = &["--detect-local-mode=BridgeInterface"][..];
    assert_eq!(
        mode(&[bridge, &["--pod-bridge-interface=cni0"]].concat()),
        Ok(DetectLocalSetting::BridgeInterface("cni0".into()))
    );
    let prefix = &["--detect-local-mode=InterfaceNamePrefix"][..];
    assert_eq!(
        mode(&[prefix, &["--pod-interface-name-prefix=veth"]].concat()),
        Ok(DetectLocalSetting::InterfaceNamePrefix("veth".into()))
    );
    for more in [
        &[][..],
        &["--pod-bridge-interface="],
        &["--pod-interface-name-prefix=veth"],
    ] {
        let error = mode(&[bridge, more].concat()).unwrap_err();
        assert_eq!(
            error,
            "--detect-local-mode BridgeInterface needs the bridge of the pods; give it with --pod-bridge-interface, for example cni0"
        );
    }
    let error = mode(&[prefix, &["--pod-bridge-interface=cni0"]].concat()).unwrap_err();
    assert!(
        error.contains("give it with --pod-interface-name-prefix, for example veth"),
        "{error}"
    );
    // What a mode does not need may be there, as with kube-proxy.
    assert_eq!(mode(&["--pod-bridge-interface=cni0"]), cluster);
}

#[test]
fn modes_and_interfaces_that_are_none_are_refused() {
    for text in ["clustercidr", "NodeCidr", "Bridge", "Auto"] {
        assert_eq!(
            refused(&["--detect-local-mode", text]),
            format!(
                "error: invalid value '{text}' for '--detect-local-mode <MODE>': there is no such mode; write ClusterCIDR, NodeCIDR, BridgeInterface or InterfaceNamePrefix"
            )
        );
    }
    for flag in ["--pod-bridge-interface", "--pod-interface-name-prefix"] {
        assert!(parse(&[flag, "exactly15bytes-"]).is_ok());
        let line = refused(&[flag, "sixteen-bytes--+"]);
        assert!(
            line.ends_with(": a name of an interface has at most 15 bytes; this one has 16"),
            "{line}"
        );
        for (name, wrong) in [
            ("a b", ' '),
            ("a/b", '/'),
            ("eth0:1", ':'),
            ("veth*", '*'),
            ("ä", 'ä'),
        ] {
            let line = refused(&[flag, name]);
            assert!(
                line.contains(&format!(
                    ": the name of an interface cannot contain `{wrong}`; "
                )),
                "{line}"
            );
        }
    }
}

#[test]
fn node_names_that_no_node_can_have_are_refused() {
    let long = "a".repeat(254);
    for name in [
        "",
        " ",
        "$(NODE_NAME)",
        "a b",
        "a_b",
        "-a",
        "a-",
        "a..b",
        "a/b",
        "ä",
        &long,
    ] {
        let line = refused(&[&format!("--hostname-override={name}")]);
        assert!(line.ends_with("see kubectl get nodes"), "{line}");
    }
}

#[test]
fn a_log_format_that_is_none_is_refused() {
    assert_eq!(
        refused(&["--log-format=xml"]),
        "error: invalid value 'xml' for '--log-format <text|json>': there is no such format; write text or json"
    );
}

#[test]
fn services_and_network_policies_are_not_both_off() {
    let check = |args: &[&str]| parsed(args).check().map_err(|error| error.to_string());
    assert_eq!(check(&[]), Ok(()));
    assert_eq!(check(&["--services=off"]), Ok(()));
    assert_eq!(check(&["--network-policy=off", "--init-only"]), Ok(()));
    let error = check(&["--services=off", "--network-policy=off"]).unwrap_err();
    assert!(error.contains("nothing to do"), "{error}");
    let error = check(&["--services=off", "--init-only"]).unwrap_err();
    assert!(error.contains("--init-only"), "{error}");
    assert_eq!(
        refused(&["--services=no"]),
        "error: invalid value 'no' for '--services <on|off>': there is no such value; write on or off"
    );
}

#[test]
fn denials_are_drops_or_rejections() {
    assert_eq!(parsed(&[]).deny_with, DenyMode::Drop);
    assert_eq!(parsed(&["--deny-with=reject"]).deny_with, DenyMode::Reject);
    assert_eq!(
        refused(&["--deny-with=no"]),
        "error: invalid value 'no' for '--deny-with <drop|reject>': there is no such answer; write drop or reject"
    );
}

#[test]
fn network_policies_are_on_or_off() {
    assert!(parsed(&["--network-policy=on"]).network_policy.is_on());
    assert_eq!(
        refused(&["--network-policy=maybe"]),
        "error: invalid value 'maybe' for '--network-policy <on|off>': there is no such value; write on or off"
    );
}

#[test]
fn pods_start_open_or_closed() {
    assert_eq!(parsed(&[]).is_closed(), Ok(false));
    let closed = "--pod-startup=closed";
    assert_eq!(parsed(&[closed]).is_closed(), Ok(true));
    for other in ["--network-policy=off", "--once"] {
        assert!(parsed(&[closed, other]).is_closed().is_err(), "{other}");
        assert_eq!(parsed(&[other]).is_closed(), Ok(false));
    }
    assert_eq!(
        refused(&["--pod-startup=ajar"]),
        "error: invalid value 'ajar' for '--pod-startup <open|closed>': there is no such value; write open or closed"
    );
}
