//! The amount of work of small changes.

use super::*;

#[test]
fn labels_of_a_namespace_touch_its_pods_if_a_policy_selects_them() {
    let mut checked = shop();
    let team = |team: &str| LabelSelector::new([Requirement::In("team".into(), vec![team.into()])]);
    checked.apply(apply_policy(NetworkPolicy {
        ingress: Some(vec![PolicyRule {
            peers: Some(vec![Peer::Pods {
                namespaces: Some(team("a")),
                pods: app("client"),
            }]),
            ports: None,
        }]),
        ..policy("shop/of-team", app("web"))
    }));
    checked.update();
    let mut touched = |labels: &[(&str, &str)]| {
        let namespace = Namespace {
            name: ObjectName::new("", "shop"),
            labels: labels.iter().copied().collect(),
            mode: None,
        };
        checked.apply(Event::Apply(Object::Namespace(namespace)));
        let touched = checked.engine.touched_pods();
        checked.update();
        touched
    };
    assert_eq!(touched(&[("owner", "x")]), 0, "no policy knows the label");
    assert_eq!(touched(&[("team", "b")]), 0, "nor this value");
    assert_eq!(touched(&[("team", "a")]), 2);
    assert_eq!(touched(&[("team", "a"), ("owner", "x")]), 0);
    assert_eq!(touched(&[("team", "b")]), 2);
}

#[test]
fn isolated_addresses_are_listed_when_they_change() {
    let mut checked = shop();
    let mut change = |pod: Pod| {
        checked.engine.apply(&apply_pod(pod));
        let change = checked.engine.update(BUDGET).change;
        (change.rules, change.isolated.map(|all| all.len()))
    };
    let remote = |app: &str| pod("shop/another", 3, "there", app);
    assert_eq!(change(remote("client")), (true, None));
    assert_eq!(change(remote("other")), (true, None));
    assert_eq!(change(remote("third")), (false, None));
    let local = |app: &str| pod("shop/local", 4, "here", app);
    assert_eq!(change(local("free")), (false, None));
    assert_eq!(change(local("web")), (true, Some(2)));
    assert_eq!(change(local("free")), (true, Some(1)));
}

#[test]
fn a_copy_shares_the_pods_of_the_cluster() {
    let mut checked = shop();
    let remote = |number: u16, app: &str| {
        let namespace = if number.is_multiple_of(2) {
            "shop"
        } else {
            "other"
        };
        let [high, low] = number.to_be_bytes();
        apply_pod(Pod {
            addresses: [IpAddr::from([10, 1, high, low])].into_iter().collect(),
            ..pod(&format!("{namespace}/pod-{number}"), 0, "there", app)
        })
    };
    for number in 0..4_000 {
        checked.apply(remote(number, "client"));
    }
    checked.update();
    let copy = checked.engine.copy();
    let copied = |checked: &Checked| {
        let inventory = &checked.engine.inventory;
        inventory.copied(&copy.inventory)
    };
    assert_eq!(copied(&checked), 0);
    let before = checked.kernel.clone();
    checked.apply(remote(8, "other"));
    checked.update();
    assert_ne!(checked.kernel, before);
    let copied = copied(&checked);
    assert!((1..500).contains(&copied), "{copied} of 12,000");
    assert_eq!(copy.ruleset(), before, "of the time of the copy");
}

/// The chains of pods in the IPv4 table.
fn pods_chains(checked: &Checked) -> Vec<String> {
    let table = &checked.kernel.tables[&table_id(crate::model::Family::V4)];
    let names = table.chains.keys().map(ToString::to_string);
    names.filter(|name| name.starts_with("pods-")).collect()
}

#[test]
fn pods_with_the_same_policies_share_a_chain() {
    let mut checked = shop();
    checked.apply(apply_pod(pod("shop/another", 3, "here", "web")));
    checked.update();
    let of_both = pods_chains(&checked);
    assert_eq!(of_both.len(), 1);
    checked.apply(apply_policy(NetworkPolicy {
        ingress: Some(Vec::new()),
        ..policy("shop/closed", app("client"))
    }));
    checked.apply(apply_pod(pod("shop/client", 2, "here", "client")));
    checked.update();
    assert_eq!(pods_chains(&checked).len(), 2, "other policies");
    checked.apply(apply_pod(pod("shop/client", 2, "there", "client")));
    for name in ["web", "another"] {
        assert_eq!(pods_chains(&checked)[..1], of_both[..], "{name} has it");
        let name = ObjectName::new("shop", name);
        checked.apply(Event::Delete(ObjectRef::new(Kind::Pod, name)));
        checked.update();
    }
    assert!(pods_chains(&checked).is_empty());
}

#[test]
fn a_policy_for_all_pods_of_a_node_costs_as_much_as_their_policies_and_not_as_their_product() {
    let mut checked = Checked::new(false);
    for number in 1..=110u8 {
        let v6 = IpAddr::from([0xfd00, 0, 0, 0, 0, 0, 0, u16::from(number)]);
        let mut pod = pod(&format!("shop/web-{number}"), number, "here", "web");
        pod.addresses.push(v6);
        let index = number.to_string();
        pod.labels = [("app", "web"), ("index", &index)].into_iter().collect();
        checked.apply(apply_pod(pod));
    }
    let another = |number: u16| {
        apply_policy(NetworkPolicy {
            ingress: Some(vec![PolicyRule {
                peers: None,
                ports: Some(vec![PolicyPort {
                    protocol: Protocol::Tcp,
                    port: PortMatch::Range(number, number),
                }]),
            }]),
            ..policy(&format!("shop/of-{number}"), app("web"))
        })
    };
    for number in 1..=2_000 {
        checked.apply(another(number));
    }
    checked.update();
    checked.apply(another(2_001));
    let (elements, operations) = checked.update();
    assert_eq!(elements, 2 * 2 * 110, "each address leads to another chain");
    assert!(elements + operations <= 5_000, "{elements} {operations}");
}
