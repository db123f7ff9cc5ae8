use std::sync::atomic::{AtomicU64, Ordering};
use std::time::UNIX_EPOCH;

use super::*;

/// Creates a health with a clock that only moves when it is advanced.
fn at_rest() -> (Health, impl Fn(u64)) {
    let passed = Arc::new(AtomicU64::new(0));
    let begin = Instant::now();
    let clock = {
        let passed = Arc::clone(&passed);
        move || {
            let passed = Duration::from_secs(passed.load(Ordering::Relaxed));
            ClockReading {
                monotonic: begin + passed,
                wall: UNIX_EPOCH + Duration::from_secs(1_700_000_000) + passed,
            }
        }
    };
    let forward = move |seconds| {
        passed.fetch_add(seconds, Ordering::Relaxed);
    };
    (Health::with_clock(PERIOD, clock), forward)
}

#[test]
fn nothing_written_yet_is_not_ready_but_alive() {
    let (health, forward) = at_rest();
    forward(3600);
    assert!(!health.ready() && !health.proxy_healthy());
    let status = health.healthz();
    assert_eq!(status.code(), 503);
    assert_eq!(status.last_updated, None);
    assert_eq!(
        status.message.as_deref(),
        Some("no rules are written yet: the objects of the cluster have not been read completely")
    );
    assert_eq!(health.livez().code(), 200);
    health.synced();
    assert!(health.ready());
    assert_eq!(health.healthz().code(), 200);
}

#[test]
fn the_rules_are_in_step_since_the_last_change() {
    let (health, forward) = at_rest();
    let since = || health.times()[0].clone();
    assert_eq!(since(), None);
    forward(1);
    health.synced();
    let first = since();
    assert_eq!(first.as_deref(), Some("2023-11-14T22:13:21Z"));
    forward(60);
    health.synced();
    assert_eq!(since(), first, "nothing changed");
    health.queued();
    forward(1);
    health.synced();
    assert_eq!(since().as_deref(), Some("2023-11-14T22:14:22Z"));
}

#[test]
fn readiness_waits_for_policies_once() {
    let (health, forward) = at_rest();
    health.synced();
    assert_eq!(health.readyz().code(), 200, "nothing more is expected");
    health.expect_policies();
    let message = || health.readyz().message;
    let begin = "network policies are not in force: ";
    assert_eq!(
        message(),
        Some(format!("{begin}the objects have not been read completely"))
    );
    health.policies(Err("pods is forbidden".to_owned()));
    assert_eq!(message(), Some(format!("{begin}pods is forbidden")));
    assert!(health.healthz().healthy, "services work");
    health.policies(Ok(()));
    assert_eq!(message(), None);
    health.policies(Err("the kernel is away".to_owned()));
    health.node_going_away(true);
    health.queued();
    forward(3600);
    assert_eq!(health.readyz().code(), 200, "it was ready once");
}

#[test]
fn a_change_may_wait_for_two_periods() {
    let (health, forward) = at_rest();
    health.synced();
    forward(1000);
    health.queued();
    forward(59);
    health.queued();
    assert!(health.healthz().healthy);
    forward(1);
    assert!(!health.proxy_healthy());
    for probe in [Probe::Healthz, Probe::Livez] {
        let status = health.status(probe);
        assert_eq!(status.code(), 503, "{probe:?}");
        assert_eq!(
            status.message.as_deref(),
            Some("changes have waited for 60 s to be written to the kernel")
        );
    }
    health.synced();
    assert!(health.healthz().healthy);
    health.queued();
    forward(59);
    assert!(health.healthz().healthy);
}

#[test]
fn a_failure_shows_once_it_lasts_and_goes_with_the_next_success() {
    let (health, forward) = at_rest();
    health.synced();
    health.failed("the kernel refused set a");
    assert!(health.healthz().healthy);
    forward(40);
    health.failed("the kernel refused set b");
    forward(20);
    let status = health.livez();
    assert_eq!(
        status.message.as_deref(),
        Some(
            "changes have waited for 60 s to be written to the kernel; the last attempt failed: the kernel refused set b"
        )
    );
    health.synced();
    assert_eq!(health.healthz().message, None);
}

#[test]
fn a_failure_before_the_first_success_shows_at_once() {
    let (health, _) = at_rest();
    health.failed("no permission");
    assert_eq!(
        health.healthz().message.as_deref(),
        Some("no rules are written yet: no permission")
    );
}

#[test]
fn a_node_that_goes_away_is_unhealthy_but_alive() {
    let (health, _) = at_rest();
    health.synced();
    health.node_going_away(true);
    let status = health.healthz();
    assert_eq!(status.code(), 503);
    assert_eq!(status.node_eligible, Some(false));
    assert!(health.livez().healthy && health.proxy_healthy());
    health.node_going_away(false);
    assert!(health.healthz().healthy);
}

#[test]
fn a_cluster_that_is_out_of_reach_is_unhealthy_after_a_period_but_alive() {
    let (health, forward) = at_rest();
    let outage = Arc::new(Mutex::new(None));
    let asked = Arc::clone(&outage);
    health.depends_on(move || asked.lock().unwrap().clone());
    health.synced();
    let since = health.read_clock().monotonic;
    let message = "no route".to_owned();
    *outage.lock().unwrap() = Some(Outage { since, message });
    forward(29);
    assert!(health.healthz().healthy, "servers restart");
    forward(1);
    let status = health.healthz();
    assert_eq!(status.code(), 503);
    assert_eq!(
        status.message.as_deref(),
        Some("no changes have come for 30 s: no route")
    );
    assert!(health.livez().healthy && health.proxy_healthy());
    *outage.lock().unwrap() = None;
    assert!(health.healthz().healthy);
}

#[test]
fn the_body_has_the_fields_of_kube_proxy() {
    let (health, forward) = at_rest();
    health.synced();
    forward(5);
    let healthy: Value = serde_json::from_str(&health.healthz().body()).unwrap();
    assert_eq!(
        healthy,
        json!({
            "lastUpdated": "2023-11-14T22:13:25Z",
            "currentTime": "2023-11-14T22:13:25Z",
            "nodeEligible": true,
        })
    );
    health.clone().node_going_away(true);
    let leaving: Value = serde_json::from_str(&health.healthz().body()).unwrap();
    assert_eq!(
        leaving,
        json!({
            "lastUpdated": "2023-11-14T22:13:20Z",
            "currentTime": "2023-11-14T22:13:25Z",
            "nodeEligible": false,
            "message": "the node is being removed; send traffic to other nodes",
        })
    );
    let alive: Value = serde_json::from_str(&health.livez().body()).unwrap();
    assert_eq!(
        alive,
        json!({
            "lastUpdated": "2023-11-14T22:13:25Z",
            "currentTime": "2023-11-14T22:13:25Z",
        })
    );
}

#[test]
fn before_the_first_rules_there_is_no_last_update() {
    let (health, _) = at_rest();
    let body: Value = serde_json::from_str(&health.healthz().body()).unwrap();
    assert_eq!(body.get("lastUpdated"), Some(&Value::Null));
}
