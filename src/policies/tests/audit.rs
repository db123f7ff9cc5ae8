//! Audited policies.

use proptest::prelude::*;

use super::histories::any_step;
use super::walk::{Walked, walk};
use super::*;

/// The same objects as three engines have them.
struct Three {
    /// Some policies are audited.
    audited: Checked,
    /// The audited policies do not exist.
    without: Engine,
    /// The audited policies are enforced.
    enforced: Engine,
}

impl Three {
    fn new() -> Self {
        let audit = PolicySettings {
            audit: true,
            ..settings(false)
        };
        Self {
            audited: Checked::with(audit),
            without: Checked::new(false).engine,
            enforced: Checked::new(false).engine,
        }
    }

    fn apply(&mut self, event: Event) {
        self.enforced.apply(&event);
        self.audited.apply(event);
    }

    /// Writes what changed.
    fn update(&mut self) {
        self.audited.update();
        self.enforced.update(BUDGET);
        self.without = Checked::new(false).engine;
        for event in &self.audited.events {
            self.without.apply(event);
        }
        let audited = self.audited.engine.inventory().policies();
        let audited = audited.filter(|policy| self.audited.engine.is_audited(policy));
        let names: Vec<ObjectName> = audited.map(|policy| policy.name.clone()).collect();
        for name in names {
            let policy = ObjectRef::new(Kind::NetworkPolicy, name);
            self.without.apply(&Event::Delete(policy));
        }
        self.without.update(BUDGET);
    }

    /// Checks what the rules with audited policies do with a connection.
    fn check(&self, connection: &Connection) {
        let Walked { passes, audited } = walk(&self.audited.kernel, connection);
        assert_eq!(passes, self.without.allows(connection), "{connection:?}");
        let inventory = self.audited.engine.inventory();
        let mut sent = true;
        for direction in [Direction::Egress, Direction::Ingress] {
            let end = connection.end(direction);
            let allows = |engine: &Engine| engine.allows_at(direction, end, connection);
            let now = sent && allows(&self.without);
            // The policies of several pods that may have an address are asked one after the other.
            let holders = inventory.isolating(end).chain(inventory.departed(end));
            if holders.count() == 1 {
                let expected = now && !allows(&self.enforced);
                assert_eq!(
                    audited.contains(&direction),
                    expected,
                    "{direction:?} {connection:?}"
                );
                let engine = &self.audited.engine;
                let policies =
                    engine.auditing(direction, connection, &mut KnownProfiles::default());
                assert!(sent || !expected);
                if sent {
                    assert_eq!(
                        !policies.is_empty(),
                        expected,
                        "{direction:?} {connection:?}"
                    );
                }
            }
            sent = now;
        }
    }
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(200))]

    #[test]
    fn audited_policies_deny_nothing_and_report_what_they_would_deny(
        batches in prop::collection::vec(prop::collection::vec(any_step(), 1..6), 1..8),
    ) {
        let mut three = Three::new();
        for batch in batches {
            for step in batch {
                three.apply(step.into());
            }
            three.update();
        }
        let addresses: Vec<IpAddr> = (0..9u8).map(|host| IpAddr::from([10, 0, 0, host])).collect();
        for source in &addresses {
            for destination in &addresses {
                for (protocol, port) in [(6, Some(80)), (6, Some(82)), (17, Some(80)), (1, None)] {
                    three.check(&Connection {
                        source: *source,
                        destination: *destination,
                        protocol,
                        port,
                    });
                }
            }
        }
    }
}

#[test]
fn audited_policies_of_many_pods_with_one_address_deny_nothing() {
    let mut checked = Checked::with(PolicySettings {
        audit: true,
        ..settings(false)
    });
    for number in 0..6 {
        let (name, app) = (format!("shop/pod-{number}"), format!("app-{number}"));
        checked.apply(apply_pod(pod(&name, 1, "here", &app)));
        checked.apply(apply_policy(NetworkPolicy {
            ingress: Some(Vec::new()),
            mode: Some(PolicyMode::Audit),
            ..policy(&format!("shop/deny-{number}"), self::app(&app))
        }));
    }
    checked.update();
    let connection = Connection {
        source: "10.0.0.2".parse().unwrap(),
        destination: "10.0.0.1".parse().unwrap(),
        protocol: 6,
        port: Some(80),
    };
    assert!(walk(&checked.kernel, &connection).passes);
    // An enforced one among them denies.
    checked.apply(apply_policy(NetworkPolicy {
        ingress: Some(Vec::new()),
        ..policy("shop/deny", app("app-3"))
    }));
    checked.update();
    assert!(!walk(&checked.kernel, &connection).passes);
}

#[test]
fn a_policy_is_audited_by_its_annotation_and_that_of_its_namespace() {
    let mut checked = Checked::with(PolicySettings {
        audit: true,
        ..settings(false)
    });
    checked.apply(apply_pod(pod("shop/web", 1, "here", "web")));
    let connection = Connection {
        source: "10.0.0.2".parse().unwrap(),
        destination: "10.0.0.1".parse().unwrap(),
        protocol: 6,
        port: Some(80),
    };
    let namespace = |mode| {
        Event::Apply(Object::Namespace(Namespace {
            name: ObjectName::new("", "shop"),
            labels: Labels::default(),
            mode,
        }))
    };
    let deny = |mode| {
        apply_policy(NetworkPolicy {
            ingress: Some(Vec::new()),
            mode,
            ..policy("shop/deny", LabelSelector::default())
        })
    };
    let (audit, enforce) = (Some(PolicyMode::Audit), Some(PolicyMode::Enforce));
    for (event, is_denied) in [
        (deny(None), true),
        (deny(audit), false),
        (deny(enforce), true),
        (namespace(audit), true),
        (deny(None), false),
        (namespace(None), true),
        (namespace(audit), false),
        (namespace(enforce), true),
        (deny(audit), false),
    ] {
        checked.apply(event);
        checked.update();
        let walked = walk(&checked.kernel, &connection);
        assert_eq!(walked.passes, !is_denied);
        assert_eq!(walked.audited.is_empty(), is_denied);
        assert_eq!(checked.engine.isolated().count(), usize::from(is_denied));
    }
}
