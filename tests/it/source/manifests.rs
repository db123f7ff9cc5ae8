//! Manifest files as a source: what is read at the start, and faults with their places.

use std::fs;
use std::path::{Path, PathBuf};

use nftlet::model::{Event, Kind, Notice, Object, Reason, Subject};
use nftlet::source::Manifests;
use nftlet::source::manifests::Error;

pub fn service(name: &str, ip: &str) -> String {
    format!(
        "apiVersion: v1\nkind: Service\nmetadata:\n  name: {name}\n  namespace: shop\nspec:\n  clusterIP: {ip}\n  ports:\n  - port: 80\n"
    )
}

fn load(paths: &[&Path]) -> Vec<Event> {
    let paths = paths.iter().map(|path| path.to_path_buf()).collect();
    Manifests::new(paths, "node-1".to_owned())
        .load()
        .expect("the paths exist")
}

fn notices(events: &[Event]) -> Vec<&Notice> {
    let found = events.iter().filter_map(|event| match event {
        Event::Notice(notice) => Some(notice),
        _ => None,
    });
    found.collect()
}

fn applied(events: &[Event]) -> Vec<String> {
    let name = |event: &Event| match event {
        Event::Apply(object) => Some(object.reference().to_string()),
        _ => None,
    };
    events.iter().filter_map(name).collect()
}

fn place(notice: &Notice) -> (PathBuf, Option<(u64, u64)>) {
    match &notice.subject {
        Subject::File { path, position } => (path.clone(), *position),
        other => panic!("not about a file: {other}"),
    }
}

#[test]
fn a_kubectl_dump_is_read_whole() {
    let dump = Path::new(env!("CARGO_MANIFEST_DIR")).join("tests/fixtures/kubectl-get-all.yaml");
    let events = load(&[&dump]);
    assert_eq!(
        applied(&events),
        [
            "Service default/kubernetes",
            "Service lab/svc-00000",
            "Service lab/svc-00001",
            "Service lab/svc-00002",
            "Service shop/db",
            "Service shop/ext",
            "Service shop/web",
            "EndpointSlice default/kubernetes",
            "EndpointSlice lab/svc-00000-v4-0",
            "EndpointSlice lab/svc-00001-v4-0",
            "EndpointSlice lab/svc-00002-v4-0",
            "EndpointSlice shop/web-abc12",
            "Node node-1",
            "ServiceCIDR kubernetes",
            "Pod shop/web-0",
            "Namespace default",
            "Namespace kube-node-lease",
            "Namespace kube-public",
            "Namespace kube-system",
            "Namespace lab",
            "Namespace shop",
            "NetworkPolicy shop/web-from-front"
        ]
    );
    assert_eq!(notices(&events), Vec::<&Notice>::new());
    for kind in Kind::ALL {
        let started = events
            .iter()
            .position(|event| matches!(event, Event::ListStarted(k) if *k == kind));
        let complete = events
            .iter()
            .position(|event| matches!(event, Event::ListComplete(k) if *k == kind));
        assert!(started.is_some() && started < complete, "{kind}");
    }
}

#[test]
fn without_network_policies_their_objects_are_none_of_our_business() {
    let dump = Path::new(env!("CARGO_MANIFEST_DIR")).join("tests/fixtures/kubectl-get-all.yaml");
    let dir = tempfile::tempdir().expect("a directory");
    let broken = dir.path().join("broken.yaml");
    fs::write(
        &broken,
        "apiVersion: v1\nkind: Pod\nmetadata: {name: a}\nspec: 5\n",
    )
    .expect("written");
    let events = Manifests::new(vec![dump, broken], "node-1".to_owned())
        .with_network_policies(false)
        .load()
        .expect("the paths exist");
    assert_eq!(applied(&events).len(), 14);
    assert_eq!(notices(&events), Vec::<&Notice>::new());
    assert_eq!(kinds(&events), Kind::SERVICES);
}

#[test]
fn without_services_the_own_node_and_the_objects_of_policies_are_left() {
    let dump = Path::new(env!("CARGO_MANIFEST_DIR")).join("tests/fixtures/kubectl-get-all.yaml");
    let dir = tempfile::tempdir().expect("a directory");
    let broken = dir.path().join("broken.yaml");
    fs::write(
        &broken,
        "apiVersion: v1\nkind: Service\nmetadata: {name: a}\nspec: 5\n",
    )
    .expect("written");
    let events = Manifests::new(vec![dump, broken], "node-1".to_owned())
        .with_services(false)
        .load()
        .expect("the paths exist");
    assert_eq!(applied(&events).len(), 9);
    assert_eq!(notices(&events), Vec::<&Notice>::new());
    let wanted = [&[Kind::Node][..], &Kind::POLICY].concat();
    assert_eq!(kinds(&events), wanted);
}

/// The kinds that events are about, in their order.
fn kinds(events: &[Event]) -> Vec<Kind> {
    let about = |event: &Event| match event {
        Event::ListStarted(kind) | Event::ListComplete(kind) => Some(*kind),
        event => event.kind(),
    };
    let mut kinds: Vec<Kind> = events.iter().filter_map(about).collect();
    kinds.dedup();
    kinds
}

#[test]
fn json_and_typed_lists_give_the_same_facts() {
    let dir = tempfile::tempdir().expect("a directory");
    let (yaml, json) = (dir.path().join("a.yaml"), dir.path().join("a.json"));
    fs::write(
        &yaml,
        "kind: ServiceList\napiVersion: v1\nitems:\n- metadata: {name: a, namespace: shop}\n  spec: {clusterIP: 10.0.0.1, ports: [{port: 80}]}\n\
         ---\napiVersion: v1\nitems:\n- apiVersion: v1\n  kind: List\n  items:\n  - {apiVersion: v1, kind: Service, metadata: {name: b}, spec: {clusterIP: 10.0.0.2}}\nkind: List\n",
    )
    .expect("written");
    fs::write(
        &json,
        r#"{"kind": "ServiceList", "apiVersion": "v1", "items": [{"metadata": {"name": "a", "namespace": "shop"}, "spec": {"clusterIP": "10.0.0.1", "ports": [{"port": 80}]}}]}
           {"kind": "List", "apiVersion": "v1", "items": [{"kind": "List", "apiVersion": "v1", "items": [
             {"apiVersion": "v1", "kind": "Service", "metadata": {"name": "b"}, "spec": {"clusterIP": "10.0.0.2"}}]}]}"#,
    )
    .expect("written");
    let (from_yaml, from_json) = (load(&[&yaml]), load(&[&json]));
    assert_eq!(applied(&from_yaml), ["Service default/b", "Service shop/a"]);
    assert!(notices(&from_yaml).is_empty() && notices(&from_json).is_empty());
    let objects = |events: Vec<Event>| {
        let object = |event| match event {
            Event::Apply(object) => Some(object),
            _ => None,
        };
        events
            .into_iter()
            .filter_map(object)
            .collect::<Vec<Object>>()
    };
    assert_eq!(objects(from_yaml), objects(from_json));
}

#[test]
fn faults_are_reported_with_file_line_and_column() {
    let dir = tempfile::tempdir().expect("a directory");
    let path = dir.path().join("faults.yaml");
    let text = format!(
        "{}---\napiVersion: v1\nitems:\n- apiVersion: v1\n  kind: Service\n  metadata: {{name: bad, namespace: shop}}\n  spec:\n    ports: eighty\n\
         - apiVersion: v1\n  kind: Service\n  metadata: {{name: inside, namespace: shop}}\n  spec: {{clusterIP: 10.0.0.300}}\nkind: List\n\
         ---\nkind: Service\n---\napiVersion: discovery.k8s.io/v1beta1\nkind: EndpointSlice\nmetadata: {{name: old}}\n\
         ---\napiVersion: v1\nkind: Service\n  name: broken\n---\n{}",
        service("first", "10.0.0.1"),
        service("last", "10.0.0.9")
    );
    fs::write(&path, &text).expect("written");
    let line_of = |needle: &str| {
        let line = text.lines().position(|line| line.contains(needle));
        line.expect("in the text") as u64 + 1
    };
    let events = load(&[&path]);
    assert_eq!(
        applied(&events),
        [
            "Service shop/first",
            "Service shop/inside",
            "Service shop/last"
        ]
    );
    let told: Vec<_> = notices(&events)
        .into_iter()
        .map(|notice| (notice.reason, place(notice), notice.message.clone()))
        .collect();
    let expected = [
        (
            Reason::InvalidObject,
            line_of("eighty"),
            "Service shop/bad: spec.ports: invalid type: string \"eighty\"",
        ),
        (
            Reason::InvalidField,
            line_of("name: inside") - 2,
            "Service shop/inside: spec.clusterIP \"10.0.0.300\" is not an IP address",
        ),
        (
            Reason::InvalidObject,
            line_of("v1beta1") - 2,
            "apiVersion or kind is missing",
        ),
        (
            Reason::InvalidObject,
            line_of("v1beta1"),
            "EndpointSlice old: apiVersion \"discovery.k8s.io/v1beta1\" is not supported; write discovery.k8s.io/v1",
        ),
        (
            Reason::InvalidFile,
            line_of("name: broken"),
            "the file cannot be parsed here",
        ),
    ];
    assert_eq!(told.len(), expected.len(), "{told:#?}");
    for ((reason, (file, at), message), (wanted, line, text)) in told.iter().zip(expected) {
        assert_eq!((*reason, file), (wanted, &path), "{message}");
        assert_eq!(at.map(|(line, _)| line), Some(line), "{message}");
        assert!(message.contains(text), "{message}");
    }
}

#[test]
fn faults_of_policies_close_what_they_are_in() {
    let dir = tempfile::tempdir().expect("a directory");
    let path = dir.path().join("policies.yaml");
    let text = "\
kind: NetworkPolicy
apiVersion: networking.k8s.io/v1
metadata: {name: typo, namespace: shop}
spec:
  podSelector: {matchLabels: {app: web}}
  ingress:
  - form: [{podSelector: {}}]
  - from: [{podSelector: {matchLabels: {tier: 1}}}]
  - from: [{podSelector: {matchLabels: {tier: \"1\"}}}]
    ports: [{port: http}, {port: 80, protocol: UDP}]
---
kind: NetworkPolicy
apiVersion: networking.k8s.io/v1
metadata: {name: number, namespace: shop}
spec: {podSelector: {}, ingress: [{ports: 5}], policyTypes: [Ingress]}
---
kind: NetworkPolicy
apiVersion: extensions/v1beta1
metadata: {name: old, namespace: shop}
---
kind: NetworkPolicy
apiVersion: crd.projectcalico.org/v1
metadata: {name: foreign, namespace: shop}
";
    fs::write(&path, text).expect("written");
    let events = load(&[&path]);
    assert_eq!(
        applied(&events),
        ["NetworkPolicy shop/number", "NetworkPolicy shop/typo"]
    );
    let rules = |name: &str| {
        let found = events.iter().find_map(|event| match event {
            Event::Apply(Object::NetworkPolicy(policy)) if policy.name.name() == name => {
                policy.ingress.clone()
            }
            _ => None,
        });
        found.expect("ingress is isolated")
    };
    assert!(rules("number").is_empty());
    let left = rules("typo");
    assert_eq!(left.len(), 1);
    assert_eq!(left[0].ports.as_ref().map(Vec::len), Some(2));
    let told: Vec<_> = notices(&events)
        .into_iter()
        .map(|notice| {
            let line = place(notice).1.map(|(line, _)| line);
            (notice.reason, line, notice.message.as_str())
        })
        .collect();
    let expected = [
        (
            Reason::InvalidPolicy,
            Some(1),
            "NetworkPolicy shop/typo: spec.ingress[0].form \"[...]\" is in an unknown field; the known ones are from and ports; the rule is left out",
        ),
        (
            Reason::InvalidPolicy,
            Some(1),
            "NetworkPolicy shop/typo: spec.ingress[1].from[0].podSelector.matchLabels.tier \"1\" is not a string; put it in quotes",
        ),
        (
            Reason::InvalidPolicy,
            Some(12),
            "NetworkPolicy shop/number: spec.ingress[0].ports \"5\" is not a list",
        ),
        (
            Reason::InvalidObject,
            Some(17),
            "NetworkPolicy old: apiVersion \"extensions/v1beta1\" is not supported; write networking.k8s.io/v1",
        ),
        (Reason::UnknownKind, None, "skipped 1 NetworkPolicy"),
    ];
    assert_eq!(told.len(), expected.len(), "{told:#?}");
    for ((reason, line, message), (wanted, at, text)) in told.into_iter().zip(expected) {
        assert_eq!((reason, line), (wanted, at), "{message}");
        assert!(message.contains(text), "{message}");
    }
}

#[test]
fn faults_in_json_have_absolute_places() {
    let dir = tempfile::tempdir().expect("a directory");
    let path = dir.path().join("faults.json");
    fs::write(
        &path,
        "{\"apiVersion\": \"v1\", \"kind\": \"List\", \"items\": [\n  {\"apiVersion\": \"v1\", \"kind\": \"Service\",\n   \"metadata\": {\"name\": \"bad\"}, \"spec\": {\"ports\": 7}},\n\
         {\"apiVersion\": \"v1\", \"kind\": \"Service\", \"metadata\": {\"name\": \"good\"}, \"spec\": {\"clusterIP\": \"10.0.0.1\"}}]}\n{]\n",
    )
    .expect("written");
    let events = load(&[&path]);
    assert_eq!(applied(&events), ["Service default/good"]);
    assert!(
        notices(&events)[0]
            .message
            .contains("integer `7`, expected a sequence; the object"),
        "{events:?}"
    );
    let places: Vec<_> = notices(&events)
        .into_iter()
        .map(|notice| (notice.reason, place(notice).1))
        .collect();
    assert_eq!(
        places,
        [
            (Reason::InvalidObject, Some((3, 51))),
            (Reason::InvalidFile, Some((5, 2)))
        ],
        "{events:?}"
    );
}

#[test]
fn the_first_path_wins_an_object_in_two_files() {
    let dir = tempfile::tempdir().expect("a directory");
    fs::write(dir.path().join("b.yaml"), service("web", "10.0.0.2")).expect("written");
    fs::write(dir.path().join("a.yaml"), service("web", "10.0.0.1")).expect("written");
    let events = load(&[dir.path()]);
    let ips: Vec<_> = events
        .iter()
        .filter_map(|event| match event {
            Event::Apply(Object::Service(service)) => {
                service.cluster_ips.first().map(ToString::to_string)
            }
            _ => None,
        })
        .collect();
    assert_eq!(ips, ["10.0.0.1"]);
    let notices = notices(&events);
    assert_eq!(notices.len(), 1, "{notices:?}");
    assert_eq!(place(notices[0]).0, dir.path().join("b.yaml"));
}

#[test]
fn other_nodes_are_for_policies_alone() {
    let dir = tempfile::tempdir().expect("a directory");
    let path = dir.path().join("nodes.yaml");
    let other = "apiVersion: v1\nkind: Node\nmetadata: {name: node-2}\nspec: {podCIDR: x}\nstatus: {addresses: [{type: Hostname, address: 192.0.2.2}]}\n";
    let text = format!("apiVersion: v1\nkind: Node\nmetadata: {{name: node-1}}\n---\n{other}");
    fs::write(&path, text).expect("written");
    let events = load(&[&path]);
    assert_eq!(applied(&events), ["Node node-1", "Node node-2"]);
    assert!(notices(&events).is_empty(), "{events:?}");
    let addresses = events.iter().find_map(|event| match event {
        Event::Apply(Object::Node(node)) if &*node.name == "node-2" => Some(node.addresses.clone()),
        _ => None,
    });
    let address = "192.0.2.2".parse().expect("an address");
    assert_eq!(addresses.as_deref(), Some(&[address][..]));
    let events = Manifests::new(vec![path], "node-1".to_owned())
        .with_network_policies(false)
        .load()
        .expect("the path exists");
    assert_eq!(applied(&events), ["Node node-1"]);
}

#[test]
fn cluster_policies_are_read_and_their_predecessors_reported() {
    let dir = tempfile::tempdir().expect("a directory");
    let path = dir.path().join("cluster.yaml");
    let text = "\
apiVersion: policy.networking.k8s.io/v1alpha2
kind: ClusterNetworkPolicy
metadata: {name: sound, namespace: ignored}
spec: {tier: Admin, priority: 10, subject: {namespaces: {}}, ingress: [{action: Deny, from: [{namespaces: {}}]}]}
---
apiVersion: policy.networking.k8s.io/v1alpha2
kind: ClusterNetworkPolicyList
items:
- metadata: {name: faulty}
  spec: {tier: Admin, priority: 1001, subject: {namespaces: {}}}
- metadata: {name: unsupported}
  spec: {tier: Admin, priority: 1, subject: {namespaces: {}}, egress: [{action: Accept, to: [{domainNames: [example.org]}]}]}
---
apiVersion: policy.networking.k8s.io/v1alpha1
kind: AdminNetworkPolicy
metadata: {name: admin}
---
apiVersion: policy.networking.k8s.io/v1alpha1
kind: BaselineAdminNetworkPolicy
metadata: {name: default}
---
apiVersion: policy.networking.k8s.io/v1
kind: ClusterNetworkPolicy
metadata: {name: later}
---
apiVersion: crd.antrea.io/v1beta1
kind: ClusterNetworkPolicy
metadata: {name: foreign}
";
    fs::write(&path, text).expect("written");
    let events = load(&[&path]);
    assert_eq!(
        applied(&events),
        [
            "ClusterNetworkPolicy sound",
            "ClusterNetworkPolicy unsupported"
        ]
    );
    let found: Vec<_> = notices(&events)
        .into_iter()
        .map(|notice| {
            let line = place(notice).1.map(|(line, _)| line);
            (notice.reason, line, notice.message.as_str())
        })
        .collect();
    let expected = [
        (
            Reason::InvalidObject,
            Some(9),
            "ClusterNetworkPolicy faulty: spec.priority \"1001\" is not a priority; write a number from 0 to 1000; without a tier, a priority and a subject a policy has no effect; the object is not used until it is corrected",
        ),
        (
            Reason::UnsupportedField,
            Some(11),
            "ClusterNetworkPolicy unsupported: spec.egress[0].to[0].domainNames is not supported; the rule accepts nothing",
        ),
        (
            Reason::InvalidObject,
            Some(14),
            "AdminNetworkPolicy admin: apiVersion \"policy.networking.k8s.io/v1alpha1\" is not supported; write a ClusterNetworkPolicy of policy.networking.k8s.io/v1alpha2 with tier: Admin instead;",
        ),
        (
            Reason::InvalidObject,
            Some(18),
            "BaselineAdminNetworkPolicy default: apiVersion \"policy.networking.k8s.io/v1alpha1\" is not supported; write a ClusterNetworkPolicy of policy.networking.k8s.io/v1alpha2 with tier: Baseline instead;",
        ),
        (
            Reason::InvalidObject,
            Some(22),
            "ClusterNetworkPolicy later: apiVersion \"policy.networking.k8s.io/v1\" is not supported; write policy.networking.k8s.io/v1alpha2;",
        ),
        (
            Reason::UnknownKind,
            None,
            "skipped 1 ClusterNetworkPolicy: nftlet does not use these kinds",
        ),
    ];
    assert_eq!(found.len(), expected.len(), "{found:#?}");
    for ((reason, line, message), (wanted, at, text)) in found.into_iter().zip(expected) {
        assert_eq!((reason, line), (wanted, at), "{message}");
        assert!(message.starts_with(text), "{message}\n{text}");
    }
}

#[test]
fn a_path_that_does_not_exist_is_an_error_that_names_it() {
    let dir = tempfile::tempdir().expect("a directory");
    let missing = dir.path().join("missing.yaml");
    let error = Manifests::new(vec![missing.clone()], "node-1".to_owned())
        .load()
        .expect_err("missing");
    let Error::Path { path, .. } = &error else {
        panic!("{error}");
    };
    assert_eq!(path, &missing);
    let text = error.to_string();
    assert!(
        text.contains("missing.yaml") && text.contains("name an existing file"),
        "{text}"
    );
}
