use std::time::SystemTime;

use super::*;
use crate::serve::metrics::tests::{expect, value};
use crate::serve::metrics::{FAMILIES, unix_seconds};

fn registered() -> (Registry, SyncMetrics) {
    let registry = Registry::new().unwrap();
    let metrics = SyncMetrics::register(&registry).unwrap();
    (registry, metrics)
}

#[test]
fn a_transaction_counts_its_parts() {
    let (registry, metrics) = registered();
    metrics.transaction(Duration::from_micros(80), 3, 10, 900);
    metrics.transaction(Duration::from_millis(3), 1, 2, 100);
    expect(
        &registry,
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
    let (registry, metrics) = registered();
    let before = unix_seconds(SystemTime::now());
    metrics.sync(true, Duration::from_millis(30));
    metrics.sync(false, Duration::from_micros(300));
    metrics.sync(false, Duration::from_micros(700));
    metrics.queued();
    for family in FAMILIES {
        let count = |name: &str| {
            let series = format!("kubeproxy_{name}_count{{ip_family=\"{family}\"}}");
            value(&registry, &series)
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
            assert_eq!(value(&registry, &series), Some(wanted), "{series}");
        }
        for which in ["last", "last_queued"] {
            let series = format!(
                "kubeproxy_sync_proxy_rules_{which}_timestamp_seconds{{ip_family=\"{family}\"}}"
            );
            let at = value(&registry, &series).unwrap();
            assert!(at >= before && at < before + 60.0, "{series} {at}");
        }
    }
}

#[test]
fn series_that_alerts_rely_on_exist_from_the_start() {
    let (registry, _) = registered();
    expect(
        &registry,
        &[
            (
                "kubeproxy_sync_proxy_rules_nftables_sync_failures_total{ip_family=\"IPv6\"}",
                0.0,
            ),
            (
                "kubeproxy_sync_proxy_rules_nftables_cleanup_failures_total{ip_family=\"IPv6\"}",
                0.0,
            ),
            (
                "kubeproxy_network_programming_duration_seconds_count{ip_family=\"IPv4\"}",
                0.0,
            ),
        ],
    );
}

#[test]
fn changes_faults_and_objects_show_their_values() {
    let (registry, metrics) = registered();
    metrics.changes(2, 5);
    metrics.changes(1, 0);
    metrics.pending(7, 8);
    metrics.pending(0, 3);
    metrics.failure();
    metrics.objects("Service", 12);
    metrics.objects("EndpointSlice", 30);
    metrics.objects("Service", 11);
    metrics.refused(2);
    metrics.notice(Reason::InvalidField);
    metrics.notice(Reason::InvalidField);
    metrics.healed(4);
    metrics.audit("same");
    metrics.audit("same");
    metrics.chains(6);
    metrics.compiled(3);
    metrics.compiled(4);
    metrics.no_local_endpoints([[1, 2], [0, 3]]);
    metrics.programmed(Duration::from_micros(900));
    metrics.network_programming(Duration::from_millis(700));
    expect(
        &registry,
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
            ("nftlet_notices_total{reason=\"InvalidField\"}", 2.0),
            ("nftlet_foreign_changes_healed_total", 4.0),
            ("nftlet_audits_total{result=\"same\"}", 2.0),
            ("nftlet_shared_chains", 6.0),
            ("nftlet_services_compiled_total", 7.0),
            (
                "kubeproxy_sync_proxy_rules_no_local_endpoints_total{ip_family=\"IPv4\",traffic_policy=\"external\"}",
                2.0,
            ),
            (
                "kubeproxy_sync_proxy_rules_no_local_endpoints_total{ip_family=\"IPv6\",traffic_policy=\"internal\"}",
                0.0,
            ),
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
fn two_instances_share_nothing() {
    let (_, first) = registered();
    let (page, _) = registered();
    first.healed(1);
    expect(&page, &[("nftlet_foreign_changes_healed_total", 0.0)]);
}

#[test]
fn reasons_are_there_before_anything_happens() {
    let (registry, metrics) = registered();
    metrics.notice(Reason::Conflict);
    let page = registry.encode();
    for line in [
        "nftlet_notices_total{reason=\"InvalidPolicy\"} 0",
        "nftlet_notices_total{reason=\"Conflict\"} 1",
    ] {
        assert!(page.lines().any(|it| it == line), "{line}: {page}");
    }
}

#[test]
fn network_programming_has_all_bounds_of_kube_proxy() {
    let (registry, metrics) = registered();
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
        assert_eq!(value(&registry, &series), Some(wanted), "{series}");
    }
}

#[test]
fn failed_cleanups_are_counted_by_family() {
    let (registry, metrics) = registered();
    metrics.cleanup_failure(true);
    let of = |family| {
        format!(
            "kubeproxy_sync_proxy_rules_nftables_cleanup_failures_total{{ip_family=\"{family}\"}}"
        )
    };
    expect(&registry, &[(&of("IPv4"), 0.0), (&of("IPv6"), 1.0)]);
}
