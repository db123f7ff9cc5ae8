//! Alerts and dashboard ask for what there is: every query parses, and every metric and label in it
//! is one that nftlet has.

use std::collections::{BTreeMap, BTreeSet};
use std::path::Path;
use std::process::Command;
use std::sync::Arc;

use crate::support::kustomize;
use crate::support::schema::{Custom, PodMonitorSpec, RuleSpec, typed};
use crate::support::skip;
use nftlet::events::EventMetrics;
use nftlet::followers::{FollowerMetrics, register_drops, register_not_remembered};
use nftlet::logging::LogQueue;
use nftlet::serve::health::Probe;
use nftlet::serve::http::HttpMetrics;
use nftlet::serve::metrics::{Registry, Sample};
use nftlet::source::SourceStats;
use nftlet::sync::SyncMetrics;
use rusty_promql_parser::{Expr, VectorSelector, expr};
use serde_json::Value;

fn component() -> Vec<Value> {
    // The component patches a DaemonSet; that of the base will do.
    let over = kustomize::beside(
        "apiVersion: kustomize.config.k8s.io/v1beta1\nkind: Kustomization\n\
         resources: [../manifests/base]\ncomponents: [../manifests/components/monitoring]\n",
    );
    kustomize::build(over.path()).objects
}

/// All metrics. One with labels exists only once it was used.
fn registry() -> Result<Registry, prometheus::Error> {
    let registry = Registry::new()?;
    registry.add_log(LogQueue::start(std::io::stderr()).expect("a thread"))?;
    SyncMetrics::register(&registry)?.objects("Service", 1);
    FollowerMetrics::register(&registry)?;
    EventMetrics::register(&registry)?;
    let http = HttpMetrics::register(&registry)?;
    http.answered(Probe::Healthz, 200);
    http.answered(Probe::Livez, 200);
    Arc::new(SourceStats::default()).register(&registry)?;
    let drops = || Some(vec![Sample::new(["shop", "web", "ingress"], 1)]);
    register_drops(&registry, drops)?;
    let clients = || Some(vec![Sample::new(["shop"], 1)]);
    register_not_remembered(&registry, clients)?;
    Ok(registry)
}

/// The series of a scrape: names of samples with their labels.
fn series() -> BTreeMap<String, BTreeSet<String>> {
    let registry = registry().expect("no name is taken twice");
    let mut series: BTreeMap<String, BTreeSet<String>> = BTreeMap::new();
    for line in registry
        .encode()
        .lines()
        .filter(|line| !line.starts_with('#'))
    {
        let (sample, _value) = line.rsplit_once(' ').expect("a sample has a value");
        let (name, labels) = sample.split_once('{').unwrap_or((sample, ""));
        let labels = labels.trim_end_matches('}').split(',');
        let labels = labels.filter_map(|pair| Some(pair.split_once('=')?.0.to_owned()));
        series.entry(name.to_owned()).or_default().extend(labels);
    }
    // Prometheus has this one of each target.
    series.insert("up".to_owned(), BTreeSet::new());
    series
}

/// Collects the selectors of a query, and the labels by which it groups.
fn selectors<'a>(
    query: &'a Expr,
    found: &mut Vec<&'a VectorSelector>,
    groups: &mut BTreeSet<&'a str>,
) {
    match query {
        Expr::Number(_) | Expr::String(_) => {}
        Expr::VectorSelector(selector) => found.push(selector),
        Expr::MatrixSelector(matrix) => found.push(&matrix.selector),
        Expr::Call(call) => {
            for argument in &call.args {
                selectors(argument, found, groups);
            }
        }
        Expr::Aggregation(aggregation) => {
            let grouping = aggregation.grouping.iter();
            groups.extend(
                grouping
                    .flat_map(|grouping| &grouping.labels)
                    .map(String::as_str),
            );
            selectors(&aggregation.expr, found, groups);
        }
        Expr::Binary(binary) => {
            selectors(&binary.lhs, found, groups);
            selectors(&binary.rhs, found, groups);
        }
        Expr::Unary(unary) => selectors(&unary.expr, found, groups),
        Expr::Paren(inner) => selectors(inner, found, groups),
        Expr::Subquery(subquery) => selectors(&subquery.expr, found, groups),
    }
}

/// Checks a query, and returns the metrics it is about.
#[track_caller]
fn check(query: &str, texts: &[&str], series: &BTreeMap<String, BTreeSet<String>>) -> Vec<String> {
    // Grafana fills these in.
    let filled = query
        .replace("$__rate_interval", "5m")
        .replace("$node", "node-1");
    assert!(!filled.contains('$'), "an unknown variable: {query}");
    let parsed = match expr(&filled) {
        Ok((rest, parsed)) if rest.trim().is_empty() => parsed,
        Ok((rest, _)) => panic!("{query}: cannot be read from {rest:?} on"),
        Err(error) => panic!("{query}: {error}"),
    };
    let (mut found, mut groups) = (Vec::new(), BTreeSet::new());
    selectors(&parsed, &mut found, &mut groups);
    assert!(!found.is_empty(), "{query} asks for nothing");
    let mut known = of_the_target();
    for selector in &found {
        let name = selector.name.as_deref().expect("a metric has a name");
        let labels = series.get(name);
        let labels = labels.unwrap_or_else(|| panic!("{query}: there is no metric {name}"));
        known.extend(labels.iter().map(String::as_str));
        let of_nftlet = selector
            .matchers
            .iter()
            .any(|it| it.name == "job" && it.value == "nftlet");
        assert!(of_nftlet, "{query}: {name} is not only nftlet's");
        for matcher in &selector.matchers {
            let is_there =
                labels.contains(&matcher.name) || of_the_target().contains(&*matcher.name);
            assert!(is_there, "{query}: {name} has no label {}", matcher.name);
        }
    }
    for group in &groups {
        assert!(
            known.contains(group),
            "{query}: nothing has the label {group}"
        );
    }
    for text in texts {
        for label in labels_in(text) {
            let is_there = groups.contains(label) || groups.is_empty() && known.contains(label);
            assert!(
                is_there,
                "{text}: the result of {query} has no label {label}"
            );
        }
    }
    found
        .iter()
        .filter_map(|selector| selector.name.clone())
        .collect()
}

/// The labels that Prometheus gives every series of nftlet.
fn of_the_target() -> BTreeSet<&'static str> {
    ["job", "node"].into()
}

/// The labels that a text of an alert or the legend of a panel shows.
fn labels_in(text: &str) -> Vec<&str> {
    let shown = text
        .split("{{")
        .skip(1)
        .filter_map(|rest| rest.split("}}").next());
    let shown = shown.map(|inside| inside.trim());
    let shown = shown.filter(|inside| !inside.starts_with("$value"));
    shown
        .map(|inside| inside.trim_start_matches("$labels."))
        .collect()
}

#[test]
fn alerts_ask_for_what_there_is_and_say_what_to_do() {
    let (objects, series) = (component(), series());
    let rules = kustomize::object(&objects, "PrometheusRule", "nftlet");
    let rules = typed::<Custom<RuleSpec>>("alerts", rules).spec.groups;
    let mut names = BTreeSet::new();
    for alert in rules.iter().flat_map(|group| &group.rules) {
        let texts = [&*alert.annotations.summary, &*alert.annotations.description];
        check(&alert.expr, &texts, &series);
        assert!(names.insert(&alert.alert), "{} is there twice", alert.alert);
        assert!(alert.alert.starts_with("Nftlet"), "{}", alert.alert);
        assert!(
            texts.iter().all(|text| !text.trim().is_empty()),
            "{}",
            alert.alert
        );
        for pending in alert.pending.iter() {
            let (minutes, unit) = pending.split_at(pending.len() - 1);
            assert!(
                unit == "m" && minutes.parse::<u8>().is_ok(),
                "{}",
                alert.alert
            );
        }
    }
    assert!(names.len() > 10);
}

/// Runs promtool in a folder; returns what it said, and whether it was content.
fn promtool(arguments: &[&str], folder: &Path) -> std::io::Result<(String, bool)> {
    let mut promtool = Command::new("promtool");
    let output = promtool.args(arguments).current_dir(folder).output()?;
    let said = [output.stdout, output.stderr].concat();
    let said = String::from_utf8_lossy(&said).into_owned();
    Ok((said, output.status.success()))
}

#[test]
fn alerts_come_and_go_with_their_faults() {
    let objects = component();
    let rules = kustomize::object(&objects, "PrometheusRule", "nftlet");
    let fixture = Path::new(env!("CARGO_MANIFEST_DIR")).join("tests/fixtures/alerts.yaml");
    let tests = std::fs::read_to_string(fixture).expect("the tests of alerts");
    for alert in typed::<Custom<RuleSpec>>("alerts", rules)
        .spec
        .groups
        .iter()
        .flat_map(|group| &group.rules)
    {
        let firing = format!("alertname=\"{}\"", alert.alert);
        let samples = tests.lines().filter(|line| line.contains("- labels:"));
        let tested = samples.filter(|line| line.contains(&firing)).count();
        assert!(tested > 0, "{} is not tested", alert.alert);
    }
    let folder = tempfile::tempdir().expect("a directory");
    let write = |name: &str, text: &str| std::fs::write(folder.path().join(name), text);
    write("rules.yaml", &rules["spec"].to_string()).expect("written");
    write("alerts.yaml", &tests).expect("written");
    for arguments in [
        ["check", "rules", "rules.yaml"],
        ["test", "rules", "alerts.yaml"],
    ] {
        match promtool(&arguments, folder.path()) {
            Ok((said, content)) => assert!(content, "{said}"),
            Err(error) => skip::skip("promtool", &error.to_string()),
        }
    }
}

#[test]
fn the_dashboard_shows_what_there_is() {
    let (objects, series) = (component(), series());
    let map = kustomize::object(&objects, "ConfigMap", "nftlet-dashboard");
    assert_eq!(map["metadata"]["labels"]["grafana_dashboard"], "1");
    let text = map["data"]["dashboard.json"].as_str().expect("a text");
    let dashboard: Value = serde_json::from_str(text).expect("JSON");
    let panels = dashboard["panels"].as_array().expect("panels");
    let mut shown = BTreeSet::new();
    let mut ids = BTreeSet::new();
    for panel in panels {
        let title = panel["title"].as_str().expect("a title");
        assert!(ids.insert(panel["id"].as_u64().expect("an id")), "{title}");
        let targets = panel["targets"].as_array().into_iter().flatten();
        let mut count = 0;
        for target in targets {
            let legend = target["legendFormat"].as_str().expect("a legend");
            let query = target["expr"].as_str().expect("a query");
            shown.extend(check(query, &[legend], &series));
            count += 1;
        }
        assert_eq!(count == 0, panel["type"] == "row", "{title} shows nothing");
        let place = &panel["gridPos"];
        let end = place["x"]
            .as_u64()
            .zip(place["w"].as_u64())
            .map(|(x, w)| x + w);
        assert!(end.is_some_and(|end| end <= 24), "{title} is too wide");
    }
    let stem = |name: &str| name.trim_end_matches("_bucket").to_owned();
    let shown: BTreeSet<String> = shown.iter().map(|name| stem(name)).collect();
    let counted = series.keys().filter(|name| name.starts_with("nftlet_"));
    let missing: Vec<_> = counted
        .filter(|name| {
            !["_bucket", "_sum", "_count"]
                .iter()
                .any(|end| name.ends_with(end))
        })
        .filter(|name| !shown.contains(*name))
        .collect();
    let left_out = [
        "nftlet_transaction_messages_total",
        "nftlet_watch_events_total",
        "nftlet_watch_lists_total",
    ];
    assert_eq!(missing, left_out, "metrics without a panel");
}

#[test]
fn series_have_the_labels_that_queries_ask_for() {
    let objects = component();
    let monitor = kustomize::object(&objects, "PodMonitor", "nftlet");
    let spec = typed::<Custom<PodMonitorSpec>>("monitor", monitor).spec;
    let labels = &objects
        .iter()
        .find(|object| object["kind"] == "DaemonSet")
        .expect("a DaemonSet")["spec"]["template"]["metadata"]["labels"];
    assert_eq!(labels[&spec.job_label], "nftlet");
    for endpoint in spec.pod_metrics_endpoints {
        let made = endpoint
            .relabelings
            .iter()
            .filter_map(|it| it.target_label.as_deref());
        assert_eq!(made.collect::<Vec<_>>(), ["node"]);
    }
}
