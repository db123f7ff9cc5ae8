use super::*;

/// Returns the value of a series, written as on the page.
pub(crate) fn value(registry: &Registry, series: &str) -> Option<f64> {
    let text = registry.encode();
    let mut lines = text
        .lines()
        .filter_map(|line| line.strip_prefix(series)?.strip_prefix(' '));
    lines.next().map(|value| value.parse().unwrap())
}

#[track_caller]
pub(crate) fn expect(registry: &Registry, expected: &[(&str, f64)]) {
    for (series, wanted) in expected {
        assert_eq!(value(registry, series), Some(*wanted), "{series}");
    }
}

#[test]
fn label_values_from_outside_are_escaped() {
    let registry = Registry::new().unwrap();
    let sample = || Some(vec![Sample::new(["a\"b\\c\nd"], 1)]);
    registry
        .sampled("some_total", "Some", ["reason"], sample)
        .unwrap();
    assert!(
        registry
            .encode()
            .contains(r#"some_total{reason="a\"b\\c\nd"} 1"#)
    );
}

#[test]
fn a_name_is_registered_once_and_the_version_from_the_start() {
    let registry = Registry::new().unwrap();
    let version = env!("CARGO_PKG_VERSION");
    let series = format!("nftlet_build_info{{version=\"{version}\"}}");
    expect(&registry, &[(&series, 1.0)]);
    registry.counter("some_total", "Some").unwrap();
    assert!(registry.counter("some_total", "Some").is_err());
}

#[test]
fn the_process_is_measured() {
    let registry = Registry::new().unwrap();
    let now = unix_seconds(SystemTime::now());
    let started = value(&registry, "process_start_time_seconds").unwrap();
    // The kernel's boot time is in whole seconds and shifts when the clock is set.
    assert!(started > 1.0e9 && started < now + 5.0, "{started} {now}");
    assert!(value(&registry, "process_resident_memory_bytes").unwrap() > 100_000.0);
    assert!(value(&registry, "process_virtual_memory_bytes").unwrap() > 100_000.0);
    assert!(value(&registry, "process_open_fds").unwrap() >= 3.0);
    assert!(value(&registry, "process_max_fds").unwrap() >= 3.0);
    assert!(value(&registry, "process_threads").unwrap() >= 1.0);
    assert!(value(&registry, "process_cpu_seconds_total").is_some());
}
