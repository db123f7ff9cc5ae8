use super::register::FAMILIES;
use super::*;

/// The value of one series, named as it stands in the exposition.
fn value(metrics: &Metrics, series: &str) -> Option<f64> {
    let text = metrics.encode();
    let mut lines = text
        .lines()
        .filter_map(|line| line.strip_prefix(series)?.strip_prefix(' '));
    lines.next().map(|value| value.parse().unwrap())
}

#[track_caller]
fn expect(metrics: &Metrics, expected: &[(&str, f64)]) {
    for (series, wanted) in expected {
        assert_eq!(value(metrics, series), Some(*wanted), "{series}");
    }
}

#[test]
fn a_transaction_counts_its_parts() {
    let metrics = Metrics::new().unwrap();
    metrics.transaction(Duration::from_micros(80), 3, 10, 900);
    metrics.transaction(Duration::from_millis(3), 1, 2, 100);
    expect(
        &metrics,
        &[
            ("nftlet_transactions_total", 2.0),
            ("nftlet_transaction_messages_total", 4.0),
            ("nftlet_transaction_elements_total", 12.0),
            ("nftlet_transaction_bytes_total", 1000.0),
            ("nftlet_transaction_duration_seconds_count", 2.0),
            (
                "nftlet_transaction_duration_seconds_bucket{le=\"0.00005\"}",
                0.0,
            ),
            (
                "nftlet_transaction_duration_seconds_bucket{le=\"0.0001\"}",
                1.0,
            ),
            (
                "nftlet_transaction_duration_seconds_bucket{le=\"26.2144\"}",
                2.0,
            ),
        ],
    );
}

#[test]
fn a_sync_is_counted_for_both_families_and_by_its_kind() {
    let metrics = Metrics::new().unwrap();
    let before = unix_seconds(SystemTime::now());
    metrics.sync(true, Duration::from_millis(30));
    metrics.sync(false, Duration::from_micros(300));
    metrics.sync(false, Duration::from_micros(700));
    metrics.queued();
    for family in FAMILIES {
        let count = |name: &str| {
            let series = format!("kubeproxy_{name}_count{{ip_family=\"{family}\"}}");
            value(&metrics, &series)
        };
        assert_eq!(count("sync_proxy_rules_duration_seconds"), Some(3.0));
        assert_eq!(count("sync_full_proxy_rules_duration_seconds"), Some(1.0));
        assert_eq!(
            count("sync_partial_proxy_rules_duration_seconds"),
            Some(2.0)
        );
        for (bound, wanted) in [("0.0005", 1.0), ("0.001", 2.0), ("16.384", 3.0)] {
            let series = format!(
                "kubeproxy_sync_proxy_rules_duration_seconds_bucket{{ip_family=\"{family}\",le=\"{bound}\"}}"
            );
            assert_eq!(value(&metrics, &series), Some(wanted), "{series}");
        }
        for which in ["last", "last_queued"] {
            let series = format!(
                "kubeproxy_sync_proxy_rules_{which}_timestamp_seconds{{ip_family=\"{family}\"}}"
            );
            let at = value(&metrics, &series).unwrap();
            assert!(at >= before && at < before + 60.0, "{series} {at}");
        }
    }
}

#[test]
fn series_that_alerts_rely_on_exist_from_the_start() {
    let metrics = Metrics::new().unwrap();
    expect(
        &metrics,
        &[
            (
                "kubeproxy_sync_proxy_rules_nftables_sync_failures_total{ip_family=\"IPv6\"}",
                0.0,
            ),
            (
                "kubeproxy_sync_proxy_rules_nftables_cleanup_failures_total{ip_family=\"IPv6\"}",
                0.0,
            ),
            ("nftlet_events_given_up_total", 0.0),
            (
                "kubeproxy_network_programming_duration_seconds_count{ip_family=\"IPv4\"}",
                0.0,
            ),
            (
                concat!(
                    "nftlet_build_info{version=\"",
                    env!("CARGO_PKG_VERSION"),
                    "\"}"
                ),
                1.0,
            ),
        ],
    );
}

#[test]
fn changes_faults_and_objects_show_their_values() {
    let metrics = Metrics::new().unwrap();
    metrics.changes(2, 5);
    metrics.changes(1, 0);
    metrics.pending(7, 8);
    metrics.pending(0, 3);
    metrics.failure();
    metrics.objects("Service", 12);
    metrics.objects("EndpointSlice", 30);
    metrics.objects("Service", 11);
    metrics.refused(2);
    metrics.notice("MalformedAddress");
    metrics.notice("MalformedAddress");
    metrics.healed(4);
    metrics.audit("same");
    metrics.audit("same");
    metrics.chains(6);
    metrics.no_local_endpoints([[1, 2], [0, 3]]);
    metrics.healthz(200);
    metrics.healthz(503);
    metrics.livez(200);
    metrics.programmed(Duration::from_micros(900));
    metrics.network_programming(Duration::from_millis(700));
    expect(
        &metrics,
        &[
            ("kubeproxy_sync_proxy_rules_service_changes_total", 3.0),
            ("kubeproxy_sync_proxy_rules_endpoint_changes_total", 5.0),
            ("kubeproxy_sync_proxy_rules_service_changes_pending", 0.0),
            ("kubeproxy_sync_proxy_rules_endpoint_changes_pending", 3.0),
            (
                "kubeproxy_sync_proxy_rules_nftables_sync_failures_total{ip_family=\"IPv4\"}",
                1.0,
            ),
            (
                "kubeproxy_sync_proxy_rules_nftables_sync_failures_total{ip_family=\"IPv6\"}",
                1.0,
            ),
            ("nftlet_netlink_errors_total", 1.0),
            ("nftlet_objects{kind=\"Service\"}", 11.0),
            ("nftlet_objects{kind=\"EndpointSlice\"}", 30.0),
            ("nftlet_refused_services", 2.0),
            ("nftlet_notices_total{reason=\"MalformedAddress\"}", 2.0),
            ("nftlet_foreign_changes_healed_total", 4.0),
            ("nftlet_audits_total{result=\"same\"}", 2.0),
            ("nftlet_shared_chains", 6.0),
            (
                "kubeproxy_sync_proxy_rules_no_local_endpoints_total{ip_family=\"IPv4\",traffic_policy=\"external\"}",
                2.0,
            ),
            (
                "kubeproxy_sync_proxy_rules_no_local_endpoints_total{ip_family=\"IPv6\",traffic_policy=\"internal\"}",
                0.0,
            ),
            ("kubeproxy_proxy_healthz_total{code=\"200\"}", 1.0),
            ("kubeproxy_proxy_healthz_total{code=\"503\"}", 1.0),
            ("kubeproxy_proxy_livez_total{code=\"200\"}", 1.0),
            (
                "nftlet_programming_latency_seconds_bucket{le=\"0.0008\"}",
                0.0,
            ),
            (
                "nftlet_programming_latency_seconds_bucket{le=\"0.0016\"}",
                1.0,
            ),
            (
                "kubeproxy_network_programming_duration_seconds_bucket{ip_family=\"IPv6\",le=\"0.5\"}",
                0.0,
            ),
            (
                "kubeproxy_network_programming_duration_seconds_bucket{ip_family=\"IPv6\",le=\"1\"}",
                1.0,
            ),
        ],
    );
}

#[test]
fn totals_of_a_watch_replace_each_other_and_never_fall() {
    let metrics = Metrics::new().unwrap();
    metrics.watch("Service", 1, 0, 10);
    metrics.watch("Service", 2, 1, 25);
    metrics.watch("Service", 1, 1, 20);
    expect(
        &metrics,
        &[
            ("nftlet_watch_lists_total{kind=\"Service\"}", 2.0),
            ("nftlet_watch_restarts_total{kind=\"Service\"}", 1.0),
            ("nftlet_watch_events_total{kind=\"Service\"}", 25.0),
        ],
    );
}

#[test]
fn two_instances_share_nothing() {
    let first = Metrics::new().unwrap();
    let second = Metrics::new().unwrap();
    first.healed(1);
    expect(&second, &[("nftlet_foreign_changes_healed_total", 0.0)]);
}

#[test]
fn label_values_from_outside_are_escaped() {
    let metrics = Metrics::new().unwrap();
    metrics.notice("a\"b\\c\nd");
    assert!(
        metrics
            .encode()
            .contains(r#"nftlet_notices_total{reason="a\"b\\c\nd"} 1"#)
    );
}

#[test]
fn the_process_is_measured() {
    let metrics = Metrics::new().unwrap();
    let now = unix_seconds(SystemTime::now());
    let started = value(&metrics, "process_start_time_seconds").unwrap();
    // The kernel's boot time is in whole seconds and shifts when the clock is set.
    assert!(started > 1.0e9 && started < now + 5.0, "{started} {now}");
    assert!(value(&metrics, "process_resident_memory_bytes").unwrap() > 100_000.0);
    assert!(value(&metrics, "process_virtual_memory_bytes").unwrap() > 100_000.0);
    assert!(value(&metrics, "process_open_fds").unwrap() >= 3.0);
    assert!(value(&metrics, "process_max_fds").unwrap() >= 3.0);
    assert!(value(&metrics, "process_threads").unwrap() >= 1.0);
    assert!(value(&metrics, "process_cpu_seconds_total").is_some());
}

#[test]
fn failed_health_check_ports_are_counted_from_zero() {
    let metrics = Metrics::new().unwrap();
    let series = "nftlet_health_check_port_errors_total";
    expect(&metrics, &[(series, 0.0)]);
    metrics.health_check_port_error();
    expect(&metrics, &[(series, 1.0)]);
}

#[test]
fn drops_are_read_at_each_scrape_and_pods_that_are_gone_leave_no_series() {
    let metrics = Metrics::new().unwrap();
    let scrapes = std::sync::atomic::AtomicUsize::new(0);
    let drops = |pod: &str, direction, packets| PolicyDrops {
        namespace: "shop".into(),
        pod: pod.into(),
        direction,
        packets,
    };
    let read = move || match scrapes.fetch_add(1, std::sync::atomic::Ordering::Relaxed) {
        // IPv4 and IPv6 of web-0.
        0 => Some(vec![
            drops("web-0", "ingress", 2),
            drops("web-0", "ingress", 3),
            drops("web-0", "egress", 0),
        ]),
        1 => None,
        _ => Some(vec![drops("web-1", "ingress", 1)]),
    };
    metrics.policy_drops(read).unwrap();
    let series = || {
        let text = metrics.encode();
        let lines = text.lines().map(str::to_owned);
        let lines = lines.filter(|line| line.starts_with("nftlet_policy_drops_total"));
        lines.collect::<Vec<_>>()
    };
    let line = |pod: &str, direction: &str, packets: u64| {
        format!(
            "nftlet_policy_drops_total{{direction=\"{direction}\",namespace=\"shop\",\
             pod=\"{pod}\"}} {packets}"
        )
    };
    assert_eq!(
        series(),
        [line("web-0", "egress", 0), line("web-0", "ingress", 5)]
    );
    assert_eq!(series(), [""; 0], "what cannot be read is absent");
    assert_eq!(series(), [line("web-1", "ingress", 1)]);
    // A second reader would count everything twice.
    assert!(metrics.policy_drops(|| None).is_err());
}

#[test]
fn bridges_and_cuts_are_shown_from_the_start() {
    let metrics = Metrics::new().unwrap();
    let bridge = |family| format!("nftlet_policy_bridge_unfiltered{{ip_family=\"{family}\"}}");
    let (v4, v6) = (bridge("IPv4"), bridge("IPv6"));
    let cut = "nftlet_policy_connections_cut_total";
    expect(&metrics, &[(&v4, 0.0), (&v6, 0.0), (cut, 0.0)]);
    metrics.bridge_unfiltered(true, true);
    metrics.connections_cut(3);
    metrics.connections_cut(1);
    expect(&metrics, &[(&v4, 0.0), (&v6, 1.0), (cut, 4.0)]);
    metrics.bridge_unfiltered(true, false);
    expect(&metrics, &[(&v6, 0.0)]);
}

#[test]
fn reasons_are_there_before_anything_happens() {
    let metrics = Metrics::new().unwrap();
    metrics.expect_notices(["InvalidPolicy", "Conflict"]);
    metrics.notice("Conflict");
    let page = metrics.encode();
    for line in [
        "nftlet_notices_total{reason=\"InvalidPolicy\"} 0",
        "nftlet_notices_total{reason=\"Conflict\"} 1",
    ] {
        assert!(page.lines().any(|it| it == line), "{line}: {page}");
    }
}

#[test]
fn network_programming_has_all_bounds_of_kube_proxy() {
    let metrics = Metrics::new().unwrap();
    metrics.network_programming(Duration::ZERO);
    metrics.network_programming(Duration::from_millis(300));
    let mut bounds = vec![0.0, 0.25, 0.5];
    bounds.extend((1..60).map(f64::from));
    bounds.extend((60..120).step_by(5).map(f64::from));
    bounds.extend((120..=300).step_by(30).map(f64::from));
    for bound in bounds {
        let series = format!(
            "kubeproxy_network_programming_duration_seconds_bucket{{ip_family=\"IPv4\",le=\"{bound}\"}}"
        );
        let wanted = if bound < 0.3 { 1.0 } else { 2.0 };
        assert_eq!(value(&metrics, &series), Some(wanted), "{series}");
    }
}

#[test]
fn failed_cleanups_are_counted_by_family() {
    let metrics = Metrics::new().unwrap();
    metrics.cleanup_failure(true);
    let of = |family| {
        format!(
            "kubeproxy_sync_proxy_rules_nftables_cleanup_failures_total{{ip_family=\"{family}\"}}"
        )
    };
    expect(&metrics, &[(&of("IPv4"), 0.0), (&of("IPv6"), 1.0)]);
}
