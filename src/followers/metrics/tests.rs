use super::*;
use crate::serve::metrics::tests::expect;

#[test]
fn drops_are_read_at_each_scrape_and_deleted_pods_leave_no_series() {
    let registry = Registry::new().unwrap();
    let scrapes = std::sync::atomic::AtomicUsize::new(0);
    let drops = |pod, direction, packets| Sample::new(["shop", pod, direction], packets);
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
    register_drops(&registry, read).unwrap();
    let series = || {
        let text = registry.encode();
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
    assert!(register_drops(&registry, || None).is_err());
}

#[test]
fn bridges_and_cuts_are_shown_from_the_start() {
    let registry = Registry::new().unwrap();
    let metrics = FollowerMetrics::register(&registry).unwrap();
    let bridge = |family| format!("nftlet_policy_bridge_unfiltered{{ip_family=\"{family}\"}}");
    let (v4, v6) = (bridge("IPv4"), bridge("IPv6"));
    let cut = "nftlet_policy_connections_cut_total";
    expect(&registry, &[(&v4, 0.0), (&v6, 0.0), (cut, 0.0)]);
    metrics.bridge_unfiltered(true, true);
    metrics.connections_cut(3);
    metrics.connections_cut(1);
    expect(&registry, &[(&v4, 0.0), (&v6, 1.0), (cut, 4.0)]);
    metrics.bridge_unfiltered(true, false);
    expect(&registry, &[(&v6, 0.0)]);
}
