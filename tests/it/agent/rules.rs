//! `nftlet explain --rules` of the running agent: what it says of the kernel.

use std::io::ErrorKind;
use std::net::{IpAddr, SocketAddr};
use std::time::Duration;

use nftlet_lab::netns::{Ask, PATIENCE, Protocol, Server, require_net_admin, wait_for};
use serde_json::{Value, json};

use super::socket::answering;
use crate::support::listing::named;
use crate::support::manifests::{Backend, CLUSTER_CIDR, Service};
use crate::support::objects::policy;
use crate::support::shop::Shop;

/// How long a request waits that must not arrive; a counter says that it came.
const DROPPED: Duration = Duration::from_millis(10);

/// The port of the endpoints.
const ENDPOINT: u16 = 8088;

/// A service with session affinity and the pods web and db behind it; only store/api reaches web.
fn open() -> (Shop, Vec<Server>) {
    let shop = Shop::open();
    let front = Service::new("front", 10)
        .port("http", "TCP", 80, Some(30080))
        .patch(json!({"spec": {"sessionAffinity": "ClientIP"}}));
    shop.manifests.service(&front);
    let [web, db, _] = shop.pods();
    let servers = [&web, &db].map(|pod| pod.serve(Protocol::Http, ENDPOINT));
    let addresses = [web, db].into_iter().flat_map(|pod| pod.addresses());
    let backends: Vec<Backend> = addresses.map(|it| Backend::new(it, "node-1")).collect();
    shop.manifests.backends(&front, ENDPOINT, &backends);
    let from = json!({"namespaceSelector": {"matchLabels": {"team": "b"}}});
    let spec = json!({
        "podSelector": {"matchLabels": {"app": "web"}},
        "policyTypes": ["Ingress"], "ingress": [{"from": [from]}],
    });
    shop.manifests.put(&policy("web", spec));
    (shop, servers.into_iter().flatten().collect())
}

/// Returns the agent's answer to a question with `--rules`.
#[track_caller]
fn explained(words: [&str; 2], socket: &str) -> Value {
    let words = ["explain", "--rules", "-o", "json", words[0], words[1]];
    let output = answering(&words, socket);
    serde_json::from_slice(&output.stdout).unwrap_or_else(|_| panic!("{output:?}"))
}

/// Returns what the kernel does not have. All parts must have been compared.
fn lacking(answer: &Value) -> Vec<&Value> {
    let all = named(answer);
    assert!(all.len() > 3, "{answer:#}");
    assert!(
        all.iter().all(|rule| rule["inKernel"].is_boolean()),
        "{answer:#}"
    );
    all.into_iter()
        .filter(|rule| rule["inKernel"] == false)
        .collect()
}

#[test]
fn the_kernel_agrees_and_knows_the_client() {
    if !require_net_admin() {
        return;
    }
    let (shop, _servers) = open();
    let directory = tempfile::tempdir().unwrap();
    let path = directory.path().join("nftlet.sock");
    let socket = path.to_str().unwrap();
    let flags = ["--cluster-cidr", CLUSTER_CIDR, "--socket", socket];
    let _daemon = shop.manifests.run(shop.node(), &flags);
    let [web, db, api] = shop.pods();

    for family in [0, 1] {
        let address: IpAddr = ["10.96.0.10", "fd00:10:96::a"][family].parse().unwrap();
        let front = SocketAddr::new(address, 80).to_string();
        let before = explained(["store/api", &front], socket);
        assert_eq!(lacking(&before), [&Value::Null; 0], "{before:#}");
        assert_eq!(before["live"]["affinity"], Value::Null, "{before:#}");
        assert_eq!(before["live"]["connections"]["count"], 0, "{before:#}");
        assert_eq!(before["targets"].as_array().unwrap().len(), 2);

        let mut connection = api.ns.run(|| Ask::http(address, 80).open()).unwrap();
        let answered = connection.ask().unwrap().name;
        let mut pods = [&web, &db].into_iter();
        let server = pods.find(|pod| pod.name == answered).unwrap();
        let server = server.addresses()[family];
        let endpoint = SocketAddr::new(server, ENDPOINT).to_string();
        let bound = explained(["store/api", &front], socket);
        assert_eq!(lacking(&bound), [&Value::Null; 0], "{bound:#}");
        assert_eq!(bound["code"], "AFFINITY", "{bound:#}");
        let targets = bound["targets"].as_array().unwrap();
        assert_eq!(targets.len(), 1, "{bound:#}");
        assert_eq!(targets[0]["address"], json!(server));
        let live = &bound["live"];
        assert_eq!(live["affinity"]["endpoint"], json!(endpoint), "{bound:#}");
        let expires = live["affinity"]["expiresSeconds"].as_u64().unwrap();
        assert!((1..=10_800).contains(&expires), "{bound:#}");
        assert_eq!(live["connections"]["count"], 1, "{bound:#}");
        let shown = &live["connections"]["shown"][0];
        assert_eq!(shown["state"], "ESTABLISHED");
        assert_eq!(shown["endpoint"], json!(endpoint));
        let text = answering(&["explain", "--rules", "store/api", &front], socket);
        let text = String::from_utf8_lossy(&text.stdout);
        assert!(text.contains("kernel    AGREES"), "{text}");
        assert!(text.contains(&format!("to {endpoint} for")), "{text}");
        assert!(text.contains("tracked   1           ESTABLISHED"), "{text}");
    }

    let refused = db.ns.run(|| Ask::tcp(web.v4, 80).timeout(DROPPED).send());
    assert_eq!(refused.unwrap_err().kind(), ErrorKind::TimedOut);
    let denied = explained(["shop/db", &format!("{}:80", web.v4)], socket);
    assert_eq!(denied["code"], "POLICY_NO_RULE", "{denied:#}");
    assert_eq!(lacking(&denied), [&Value::Null; 0], "{denied:#}");
    let drops = &denied["live"]["drops"];
    assert_eq!(drops[0]["pod"], "shop/web", "{denied:#}");
    assert_eq!(drops[0]["direction"], "ingress");
    assert!(drops[0]["packets"].as_u64().unwrap() > 0, "{denied:#}");

    // The agent repairs at once, but more slowly the more often it has to.
    let element = "10.96.0.10 . tcp . 80 . 0:1";
    let differs = wait_for("an answer before the repair", PATIENCE, || {
        let delete = format!("delete element ip nftlet endpoints {{ {element} }}");
        let _ = shop.node().command("nft").arg(delete).output();
        let answer = explained(["store/api", "10.96.0.10:80"], socket);
        (!lacking(&answer).is_empty()).then_some(answer)
    });
    let lacking = lacking(&differs);
    assert_eq!(lacking.len(), 1, "{differs:#}");
    assert_eq!(lacking[0]["object"], "map endpoints");
    assert!(lacking[0]["element"].as_str().unwrap().starts_with(element));
}
