//! Which pod has an address, and what holds while it cannot be told.

use std::time::{Duration, Instant};

use super::*;

/// A pod whose sandbox runs since a time, with a container that started then.
fn since(time: u32, pod: Pod) -> Pod {
    Pod {
        running: true,
        evidence: Evidence {
            sandbox: Sandbox::RanAt(time),
            started: Some(time),
        },
        ..pod
    }
}

/// A pod that has no sandbox.
fn gone(pod: Pod) -> Pod {
    Pod {
        evidence: Evidence {
            sandbox: Sandbox::Gone,
            started: None,
        },
        ..pod
    }
}

fn delete(name: &str) -> Event {
    let (namespace, name) = name.split_once('/').unwrap();
    Event::Delete(ObjectRef::new(Kind::Pod, ObjectName::new(namespace, name)))
}

/// Pods of an application let in what comes from others, at a port.
fn lets_in(name: &str, of: &str, from: &[&str], port: PortMatch) -> Event {
    let peers = from.iter().map(|from| Peer::Pods {
        namespaces: None,
        pods: app(from),
    });
    let rule = PolicyRule {
        peers: Some(peers.collect()),
        ports: Some(vec![PolicyPort {
            protocol: Protocol::Tcp,
            port,
        }]),
    };
    apply_policy(NetworkPolicy {
        ingress: Some(vec![rule]),
        ..policy(name, app(of))
    })
}

fn passes(checked: &Checked, source: u8, destination: u8, port: u16) -> bool {
    checked.engine.allows(&Connection {
        source: [10, 0, 0, source].into(),
        destination: [10, 0, 0, destination].into(),
        protocol: 6,
        port: Some(port),
    })
}

/// The isolated addresses with their pods, without a name where the object is gone.
fn isolated(checked: &Checked) -> Vec<(IpAddr, String)> {
    let isolated = checked.engine.isolated();
    let name = |pod: Option<&ObjectName>| pod.map(ObjectName::to_string).unwrap_or_default();
    isolated.map(|(ip, pod)| (ip, name(pod))).collect()
}

fn elements(checked: &Checked, comment: &str) -> usize {
    let tables = checked.kernel.tables.values();
    let sets = tables.flat_map(|table| table.sets.values());
    let mut named = sets.filter(|set| set.declaration.comment.as_deref() == Some(comment));
    named.next().expect("a set of this comment").elements.len()
}

#[test]
fn a_pod_of_this_node_is_isolated_whatever_is_claimed_elsewhere() {
    let mut checked = shop();
    let elsewhere = since(9, pod("other/stale", 1, "there", "free"));
    checked.apply(apply_pod(elsewhere));
    checked.update();
    let web = (IpAddr::from([10, 0, 0, 1]), "shop/web".to_owned());
    assert_eq!(isolated(&checked), [web]);
    assert!(!passes(&checked, 9, 1, 80));
    // Unless it has no sandbox here.
    checked.apply(apply_pod(gone(pod("shop/web", 1, "here", "web"))));
    checked.update();
    assert_eq!(isolated(&checked), []);
}

#[test]
fn after_a_reboot_the_pod_whose_sandbox_is_newer_has_the_address() {
    for local in [true, false] {
        let node = if local { "here" } else { "there" };
        let mut checked = shop();
        let stale = since(10, pod("shop/stale", 3, node, "client"));
        let fresh = since(20, pod("shop/fresh", 3, node, "web"));
        for order in [[&stale, &fresh], [&fresh, &stale]] {
            for pod in order {
                checked.apply(apply_pod(pod.clone()));
            }
            checked.update();
            assert!(!passes(&checked, 3, 1, 80), "it is not the client any more");
            assert_eq!(passes(&checked, 9, 3, 80), !local, "{local}");
            checked.apply(delete("shop/stale"));
            checked.apply(delete("shop/fresh"));
            checked.update();
        }
    }
}

#[test]
fn while_its_pod_is_unknown_an_address_is_no_peer_and_no_named_port() {
    let mut checked = shop();
    let comment = "pods app=client in namespace shop";
    assert_eq!(elements(&checked, comment), 1);
    checked.apply(apply_pod(pod("shop/other", 2, "there", "free")));
    checked.update();
    assert_eq!(elements(&checked, comment), 0);
    assert!(!passes(&checked, 2, 1, 80));
    checked.apply(apply_pod(since(
        5,
        pod("shop/client", 2, "there", "client"),
    )));
    checked.update();
    assert_eq!(elements(&checked, comment), 1, "one of them runs");
    checked.apply(apply_pod(gone(pod("shop/client", 2, "there", "client"))));
    checked.apply(delete("shop/other"));
    checked.update();
    assert_eq!(elements(&checked, comment), 0, "it has no sandbox");

    checked.apply(apply_pod(pod("shop/client", 2, "there", "client")));
    checked.apply(lets_in(
        "shop/web",
        "web",
        &["client"],
        PortMatch::Named("http".into()),
    ));
    checked.update();
    assert!(passes(&checked, 2, 1, 8001));
    checked.apply(apply_pod(pod("shop/double", 1, "here", "free")));
    checked.update();
    assert!(!passes(&checked, 2, 1, 8001));
    assert_eq!(
        elements(&checked, "ports http (TCP) of pods of this node"),
        0
    );
}

#[test]
fn an_address_of_two_isolated_pods_is_open_for_what_both_let_in() {
    let mut checked = shop();
    let any = || PortMatch::Range(1, 99);
    checked.apply(lets_in("shop/web", "web", &["client", "friend"], any()));
    checked.apply(lets_in("shop/db", "db", &["friend", "admin"], any()));
    for (name, address, app) in [
        ("client", 2, "client"),
        ("friend", 3, "friend"),
        ("admin", 4, "admin"),
    ] {
        checked.apply(apply_pod(pod(
            &format!("shop/{name}"),
            address,
            "there",
            app,
        )));
    }
    checked.update();
    let passing = |checked: &Checked| {
        let from = [2u8, 3, 4, 9].into_iter();
        from.filter(|from| passes(checked, *from, 1, 80))
            .collect::<Vec<_>>()
    };
    assert_eq!(passing(&checked), [2, 3]);
    checked.apply(apply_pod(pod("shop/db", 1, "here", "db")));
    checked.update();
    assert_eq!(passing(&checked), [3]);
    let table = &checked.kernel.tables[&table_id(crate::model::Family::V4)];
    assert!(table.chains.contains_key("ingress-2"));
    assert_eq!(table.sets["ingress-pods-2"].elements.len(), 1);
    // A pod that nothing isolates takes nothing away, nor does one that says the same.
    checked.apply(apply_pod(pod("shop/free", 1, "here", "free")));
    checked.apply(apply_pod(pod("shop/web-2", 1, "here", "web")));
    checked.update();
    assert_eq!(passing(&checked), [3]);
    checked.apply(apply_pod(since(1, pod("shop/db", 1, "here", "db"))));
    checked.update();
    assert_eq!(passing(&checked), [3, 4]);
    let table = &checked.kernel.tables[&table_id(crate::model::Family::V4)];
    assert!(!table.chains.contains_key("ingress-2"));
    assert!(!table.sets.contains_key("ingress-pods-2"));
}

#[test]
fn an_address_of_too_many_isolated_pods_is_closed() {
    let mut checked = shop();
    for number in 0..5 {
        let name = format!("shop/more-{number}");
        checked.apply(lets_in(&name, &name, &["client"], PortMatch::Range(80, 80)));
        checked.apply(apply_pod(pod(&name, 1, "here", &name)));
        checked.update();
        assert_eq!(passes(&checked, 2, 1, 80), number < 3, "{number}");
    }
}

#[test]
fn a_pod_deleted_while_it_ran_stays_isolated() {
    let running = || since(10, pod("shop/web", 1, "here", "web"));
    let web = (IpAddr::from([10, 0, 0, 1]), String::new());
    let deleted = || {
        let mut checked = shop();
        checked.apply(apply_pod(running()));
        checked.apply(delete("shop/web"));
        checked.update();
        assert_eq!(isolated(&checked), std::slice::from_ref(&web));
        assert!(passes(&checked, 2, 1, 80) && !passes(&checked, 9, 1, 80));
        checked
    };
    // Policies go on to count.
    let mut checked = deleted();
    checked.apply(lets_in(
        "shop/web",
        "web",
        &["other"],
        PortMatch::Range(80, 80),
    ));
    checked.update();
    assert!(!passes(&checked, 2, 1, 80));
    // For five minutes.
    let due = checked.engine.inventory.departed_due().expect("a time");
    checked.engine.forget_departed(due - Duration::from_secs(1));
    checked.update();
    assert_eq!(isolated(&checked).len(), 1);
    assert!(due > Instant::now() + Duration::from_secs(290));
    checked.engine.forget_departed(due);
    checked.engine.update(BUDGET);
    assert_eq!(isolated(&checked), []);
    assert_eq!(checked.engine.inventory.departed_due(), None);

    // Or until another pod has the address, on whichever node.
    for node in ["here", "there"] {
        let mut checked = deleted();
        checked.apply(apply_pod(pod("shop/next", 1, node, "free")));
        checked.update();
        assert_eq!(isolated(&checked), [], "{node}");
    }
    // One that had lost it before has not got it since.
    for stale in [
        since(5, pod("shop/stale", 1, "here", "free")),
        gone(pod("shop/stale", 1, "here", "free")),
    ] {
        let mut checked = shop();
        checked.apply(apply_pod(stale));
        checked.apply(apply_pod(running()));
        checked.apply(delete("shop/web"));
        checked.update();
        assert_eq!(isolated(&checked), std::slice::from_ref(&web));
        checked.apply(apply_pod(since(20, pod("shop/stale", 1, "here", "free"))));
        checked.update();
        assert_eq!(isolated(&checked), []);
    }
    // A pod of the same name at another address is another pod.
    let mut checked = deleted();
    checked.apply(apply_pod(since(30, pod("shop/web", 7, "here", "web"))));
    checked.update();
    let next = (IpAddr::from([10, 0, 0, 7]), "shop/web".to_owned());
    assert_eq!(isolated(&checked), [web.clone(), next]);
}

#[test]
fn a_pod_that_is_deleted_after_its_containers_ended_leaves_nothing() {
    for last in [
        pod("shop/web", 1, "here", "web"),
        Pod {
            ended: true,
            ..since(10, pod("shop/web", 1, "here", "web"))
        },
        since(10, pod("shop/web", 1, "there", "web")),
    ] {
        let mut checked = shop();
        checked.apply(apply_pod(last));
        checked.apply(delete("shop/web"));
        checked.update();
        assert_eq!(isolated(&checked), []);
    }
}

#[test]
fn the_deleted_pods_that_are_remembered_are_bounded() {
    let mut checked = Checked::new(false);
    checked.apply(apply_policy(NetworkPolicy {
        ingress: Some(Vec::new()),
        ..policy("shop/all", LabelSelector::default())
    }));
    for number in 0..1030u16 {
        let [high, low] = number.to_be_bytes();
        let running = Pod {
            addresses: [IpAddr::from([10, 0, high, low])].into_iter().collect(),
            ..since(1, pod("shop/web", 1, "here", "web"))
        };
        checked.apply(apply_pod(running));
        checked.apply(delete("shop/web"));
    }
    checked.update();
    let isolated = isolated(&checked);
    assert_eq!(isolated.len(), 1024);
    assert_eq!(
        isolated[0].0,
        IpAddr::from([10, 0, 0, 6]),
        "the oldest went"
    );
}

#[test]
fn connections_are_looked_at_while_it_is_doubtful_who_has_an_address() {
    let mut checked = shop();
    checked.engine.reassigned.take();
    checked.apply(apply_pod(pod("shop/other", 2, "there", "free")));
    let address = IpAddr::from([10, 0, 0, 2]);
    assert_eq!(checked.engine.reassigned.take(), [address].into());
    checked.apply(apply_pod(since(1, pod("shop/other", 2, "there", "free"))));
    assert_eq!(checked.engine.reassigned.take(), [address].into());
    checked.apply(apply_pod(since(2, pod("shop/other", 2, "there", "free"))));
    assert_eq!(checked.engine.reassigned.take(), [].into());
}

#[test]
fn pods_that_are_not_watched_without_policies_keep_their_addresses() {
    let mut checked = shop();
    checked.engine.reassigned.take();
    let web = ObjectName::new("shop", "web");
    checked.apply(Event::Delete(ObjectRef::new(Kind::NetworkPolicy, web)));
    let list = |pods: Vec<Pod>| {
        let mut events = vec![Event::ListStarted(Kind::Pod)];
        events.extend(pods.into_iter().map(apply_pod));
        events.push(Event::ListComplete(Kind::Pod));
        events
    };
    // The watch of pods ends with an empty list.
    list(Vec::new())
        .into_iter()
        .for_each(|it| checked.apply(it));
    checked.update();
    checked.apply(apply_policy(policy("shop/closed", app("web"))));
    let pods = vec![
        pod("shop/web", 1, "here", "web"),
        pod("shop/client", 2, "there", "client"),
    ];
    list(pods).into_iter().for_each(|it| checked.apply(it));
    assert_eq!(checked.engine.reassigned.take(), [].into());
}
