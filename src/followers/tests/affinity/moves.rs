//! Clients that move to this node, by changes that take effect in parts.

use super::*;

#[test]
fn clients_move_to_this_node_whichever_portion_fails() {
    let (cluster, local, endpoints) = external();
    let mut writes = 1;
    let mut fails_after = 0;
    while fails_after < writes {
        for again in [false, true] {
            let bench = Bench::new();
            let controller = bench.controller().with_portions_of(1);
            let mut controller = forgetting_in(&bench, controller);
            let objects = vec![node().into(), cluster.clone().into()];
            handle(&mut controller, lists(objects));
            handle(&mut controller, vec![put(endpoints.clone())]);
            learn(&bench, &outside());
            bench.applied();
            bench.kernel.0.borrow_mut().most = Some(fails_after);
            handle(&mut controller, vec![put(local.clone())]);
            if again {
                controller.resync();
            }
            bench.kernel.0.borrow_mut().most = None;
            controller.resync();
            assert_eq!(left(&bench), outside()[1..], "after {fails_after}");
            writes = bench.applied().len();
        }
        fails_after += 1;
        assert!(fails_after < 100);
    }
    assert!(fails_after > 1, "it was written at once");
}

#[test]
fn clients_move_to_this_node_when_a_later_step_of_a_restart_fails() {
    let (cluster, local, endpoints) = external();
    let objects = |web: &Service| {
        lists(vec![
            node().into(),
            web.clone().into(),
            endpoints.clone().into(),
        ])
    };
    for fails_after in 0..4 {
        let bench = Bench::new();
        handle(&mut forgetting(&bench), objects(&cluster));
        learn(&bench, &outside());
        bench.applied();
        let mut restarted = forgetting(&bench);
        bench.kernel.0.borrow_mut().most = Some(fails_after);
        handle(&mut restarted, objects(&local));
        bench.kernel.0.borrow_mut().most = None;
        restarted.resync();
        assert_eq!(left(&bench), outside()[1..], "after {fails_after}");
    }
}

#[test]
fn clients_move_to_this_node_when_healing_makes_the_policy_local() {
    let (cluster, local, endpoints) = external();
    let bench = Bench::new();
    let mut controller = forgetting(&bench);
    let objects = vec![node().into(), local.into(), endpoints.clone().into()];
    handle(&mut controller, lists(objects));
    let earlier = Bench::new();
    let objects = vec![node().into(), cluster.into(), endpoints.into()];
    handle(&mut forgetting(&earlier), lists(objects));
    let ruleset = earlier.kernel.0.borrow().ruleset.clone();
    bench.kernel.meddle(|now| *now = ruleset);
    learn(&bench, &outside());
    assert_eq!(heal(&mut controller.controller), (Outcome::Synced, true));
    controller.forget();
    assert_eq!(left(&bench), outside()[1..]);
}

#[test]
fn clients_move_to_this_node_when_a_service_of_policy_local_takes_over() {
    let bench = Bench::new();
    let mut controller = forgetting(&bench);
    let (a_with, _, endpoints) = external();
    let (mut b, mut b_with) = (
        sticky("b", "10.96.0.11", None),
        sticky("b", "10.96.0.11", None),
    );
    b_with.external_ips = a_with.external_ips.clone();
    b.external_policy = TrafficPolicy::Local;
    b_with.external_policy = TrafficPolicy::Local;
    let mut a_without = a_with.clone();
    a_without.external_ips.clear();
    let objects: Vec<Object> = vec![
        node().into(),
        a_with.into(),
        slice("b-1", &b, Family::V4, &[1, 2]).into(),
        b.into(),
        endpoints.into(),
    ];
    handle(&mut controller, lists(objects));
    learn(&bench, &outside());
    handle(&mut controller, vec![put(a_without), put(b_with)]);
    assert_eq!(left(&bench), outside()[1..]);
}
