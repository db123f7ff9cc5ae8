//! Audited policies, by their packets: they deny nothing, and what they would deny is counted,
//! logged and listed.

use std::io;
use std::process::{Command, Output};
use std::sync::atomic::{AtomicBool, AtomicU32, Ordering};
use std::thread;

use crate::policies::observe::{LONG, PORT, SILENCE, Shop, scrape};
use crate::support::objects::{namespace, policy};
use nftlet_lab::netns::{Ask, Daemon, Machine, require_net_admin, wait_for};
use serde_json::{Value, json};

const METRICS: &str = "--metrics-bind-address=127.0.0.1:10249";
const AUDIT: &str = "--audit-annotations=on";

/// Puts a policy for pod-1 that allows ingress from the client outside alone.
fn put(shop: &Shop, name: &str, mode: Option<&str>) {
    let client = format!("{}/32", shop.lab.client().v4);
    let mut policy = policy(
        name,
        json!({
            "podSelector": {"matchLabels": {"pod": "pod-1"}},
            "ingress": [{"from": [{"ipBlock": {"cidr": client}}]}],
        }),
    );
    if let Some(mode) = mode {
        policy["metadata"]["annotations"] = json!({ "nftlet.dev/mode": mode });
    }
    shop.manifests.put(&policy);
}

fn reaches(from: &Machine, shop: &Shop) -> bool {
    let ask = Ask::http(shop.pod(1).v4, PORT).timeout(SILENCE);
    match from.ns.run(|| ask.send()) {
        Ok(_) => true,
        Err(error) if error.kind() == io::ErrorKind::TimedOut => false,
        Err(error) => panic!("{error}"),
    }
}

/// Returns what the kernel counted for a policy and pod-1.
fn counted(shop: &Shop, policy: &str) -> Option<f64> {
    scrape(shop.node()).value(&format!(
        "nftlet_policy_audited_total{{direction=\"ingress\",namespace=\"shop\",pod=\"pod-1\",policy=\"{policy}\"}}"
    ))
}

/// Waits until the verdict map leads packets to pod-1 to a chain whose rules have a word in them.
#[track_caller]
fn wait_for_chain(shop: &Shop, word: &str) {
    let address = shop.pod(1).v4.to_string();
    wait_for(&format!("{word} in the rules of pod-1"), LONG, || {
        let tables = shop.node().nft(&["list", "tables", "ip"]);
        let rules = if tables.contains("nftlet-policy") {
            shop.node().nft(&["list", "table", "ip", "nftlet-policy"])
        } else {
            String::new()
        };
        let leads = rules
            .split_once("map ingress-pods {")
            .and_then(|(_, rest)| rest.split_once('}'))
            .map_or("", |(map, _)| map);
        let goto = format!("{address} : goto ");
        let chain = leads.split_once(&*goto).map(|(_, rest)| {
            let end = rest.find(|c: char| c == ',' || c.is_whitespace());
            &rest[..end.unwrap_or(rest.len())]
        });
        let rules = rules.split_once(&format!("chain {} {{", chain?));
        let rules = rules.and_then(|(_, rest)| rest.split_once('}'));
        rules
            .is_some_and(|(rules, _)| rules.contains(word))
            .then_some(())
    });
}

fn nftlet(words: &[&str]) -> Output {
    let mut command = Command::new(env!("CARGO_BIN_EXE_nftlet"));
    command.args(words).env_remove("NODE_NAME");
    command.output().expect("nftlet runs")
}

fn audits(daemon: &Daemon) -> Vec<String> {
    let log = daemon.log();
    let lines = log.lines().filter(|line| line.contains("audited ingress"));
    lines.map(str::to_owned).collect()
}

#[test]
fn what_an_audited_policy_would_deny_passes_and_is_reported() {
    if !require_net_admin() {
        return;
    }
    let shop = Shop::open();
    let directory = tempfile::tempdir().expect("a directory");
    let path = directory.path().join("nftlet.sock");
    let socket = format!("--socket={}", path.display());
    let daemon = shop.run(&[METRICS, AUDIT, &socket]);
    let (client, other) = (shop.lab.client(), shop.pod(2));

    // An audited policy alone.
    put(&shop, "web", Some("audit"));
    wait_for_chain(&shop, "goto audit-ingress");
    assert!(reaches(client, &shop) && reaches(other, &shop) && reaches(other, &shop));
    wait_for("the counter", LONG, || {
        (counted(&shop, "web") == Some(2.0)).then_some(())
    });
    let line = "shop/pod-1 (10.244.1.11:8080), would be denied by shop/web";
    wait_for(line, LONG, || daemon.log().contains(line).then_some(()));
    assert_eq!(audits(&daemon).len(), 1, "{}", daemon.log());
    let event = "NetworkPolicy shop/web: if enforced, it would deny ingress TCP shop/pod-2 -> \
                 shop/pod-1:8080";
    wait_for(event, LONG, || daemon.log().contains(event).then_some(()));

    let listed = wait_for("both connections", LONG, || {
        let output = nftlet(&["audit", "--since=1h", "-o", "json", &socket]);
        let report: Value = serde_json::from_slice(&output.stdout).expect("JSON");
        (report["audit"][0]["connections"] == 2).then_some(report)
    });
    let row = &listed["audit"][0];
    for (field, expected) in [
        ("policy", json!("shop/web")),
        ("direction", json!("ingress")),
        ("from", json!("shop/pod-2")),
        ("to", json!("shop/pod-1")),
        ("port", json!(PORT)),
        ("protocol", json!("TCP")),
    ] {
        assert_eq!(row[field], expected, "{listed}");
    }
    assert_eq!(listed["counts"][0]["packets"], 2, "{listed}");
    let text = nftlet(&["audit", &socket]);
    let text = String::from_utf8(text.stdout).expect("UTF-8");
    assert!(text.starts_with("POLICY    DIRECTION  FROM"), "{text}");
    assert!(
        text.contains("shop/web  ingress    shop/pod-2  shop/pod-1  8080/TCP"),
        "{text}"
    );
    let explained = nftlet(&["explain", "shop/pod-2", "shop/pod-1:8080", &socket]);
    let explained = String::from_utf8(explained.stdout).expect("UTF-8");
    assert!(
        explained.contains("audited: shop/web would deny this"),
        "{explained}"
    );
    let policies = nftlet(&["policies", "shop/web", &socket]);
    let policies = String::from_utf8(policies.stdout).expect("UTF-8");
    assert!(policies.contains("audit\n"), "{policies}");
    let status = nftlet(&["status", "-o", "json", &socket]);
    let status: Value = serde_json::from_slice(&status.stdout).expect("JSON");
    assert_eq!(status["policies"]["audited"], 1, "{status}");
    assert_eq!(status["policies"]["isolatedPods"], 0, "{status}");

    // An enforced one beside it: the audited one makes no difference.
    put(&shop, "more", None);
    wait_for_chain(&shop, "goto deny-ingress");
    assert!(reaches(client, &shop) && !reaches(other, &shop));
    assert_eq!(counted(&shop, "web"), None);
    shop.manifests.remove("NetworkPolicy", "more");
    wait_for_chain(&shop, "goto audit-ingress");

    // Enforced alone, by its annotation and without one.
    for mode in [Some("enforce"), None, Some("unheard-of")] {
        put(&shop, "web", mode);
        wait_for_chain(&shop, "goto deny-ingress");
        assert!(reaches(client, &shop) && !reaches(other, &shop), "{mode:?}");
        put(&shop, "web", Some("audit"));
        wait_for_chain(&shop, "goto audit-ingress");
        assert!(reaches(other, &shop), "{mode:?}");
    }
    assert!(
        daemon
            .log()
            .contains("annotation nftlet.dev/mode \"unheard-of\" is neither"),
        "{}",
        daemon.log()
    );

    // The annotation of the namespace.
    put(&shop, "web", None);
    wait_for_chain(&shop, "goto deny-ingress");
    let mut audited = namespace("shop", &[]);
    audited["metadata"]["annotations"] = json!({ "nftlet.dev/mode": "audit" });
    shop.manifests.put(&audited);
    wait_for_chain(&shop, "goto audit-ingress");
    assert!(reaches(other, &shop));
    shop.manifests.put(&namespace("shop", &[]));
    wait_for_chain(&shop, "goto deny-ingress");
    assert!(!reaches(other, &shop));
}

#[test]
fn annotations_count_for_nothing_unless_that_is_asked_for() {
    if !require_net_admin() {
        return;
    }
    let shop = Shop::open();
    put(&shop, "web", Some("audit"));
    let directory = tempfile::tempdir().expect("a directory");
    let socket = format!(
        "--socket={}",
        directory.path().join("nftlet.sock").display()
    );
    let _daemon = shop.run(&[&socket]);
    wait_for_chain(&shop, "goto deny-ingress");
    assert!(reaches(shop.lab.client(), &shop) && !reaches(shop.pod(2), &shop));
    let said = wait_for("an answer", LONG, || {
        let output = nftlet(&["audit", &socket]);
        let said = String::from_utf8_lossy(&output.stderr).into_owned();
        (!said.contains("no agent answers")).then_some((output.status.code(), said))
    });
    assert_eq!(said.0, Some(1));
    assert!(
        said.1.contains("start it with --audit-annotations=on"),
        "{}",
        said.1
    );
}

/// The rules of a policy that turns from audited to enforced and back change in one transaction.
#[test]
fn no_connection_fails_while_a_policy_turns_from_audited_to_enforced_and_back() {
    if !require_net_admin() {
        return;
    }
    let shop = Shop::open();
    let _daemon = shop.run(&[AUDIT]);
    put(&shop, "web", Some("audit"));
    wait_for_chain(&shop, "goto audit-ingress");
    let (stop, connected) = (AtomicBool::new(false), AtomicU32::new(0));
    thread::scope(|scope| {
        let traffic = scope.spawn(|| {
            while !stop.load(Ordering::Relaxed) {
                let ask = Ask::http(shop.pod(1).v4, PORT).timeout(LONG);
                let answered = shop.lab.client().ns.run(|| ask.send());
                answered.expect("an allowed connection");
                connected.fetch_add(1, Ordering::Relaxed);
            }
        });
        for _ in 0..10 {
            for (mode, word) in [
                ("enforce", "goto deny-ingress"),
                ("audit", "goto audit-ingress"),
            ] {
                let before = connected.load(Ordering::Relaxed);
                put(&shop, "web", Some(mode));
                wait_for_chain(&shop, word);
                wait_for("more connections", LONG, || {
                    (connected.load(Ordering::Relaxed) > before + 2).then_some(())
                });
            }
        }
        stop.store(true, Ordering::Relaxed);
        traffic.join().expect("no connection fails");
    });
}
