//! Parts of the rules that fail do not delay others, and no object is blamed for the faults of others.

use super::queries::{closed, engine, pod, policy_lists};
use super::*;
use crate::policies;

/// How often a test looks before it takes something for absent. The clock of these tests moves on
/// only while no task has anything to do, so that looking takes no time.
const LOOKS: usize = 10_000;

async fn soon(what: &str, condition: impl Fn() -> bool) {
    for _ in 0..LOOKS {
        if condition() {
            return;
        }
        tokio::task::yield_now().await;
    }
    panic!("{what}: not soon");
}

fn signals(stopped: watch::Receiver<bool>) -> Signals {
    Signals {
        stop: stopped,
        once: false,
        foreign: Arc::default(),
        missed: Arc::default(),
        audits: None,
        ready: Vec::new(),
        queries: None,
    }
}

fn has_frontend(kernel: &Fake, last: u8) -> bool {
    let state = kernel.0.borrow();
    let Some(table) = state.ruleset.tables.get(&table_id(Family::V4)) else {
        return false;
    };
    let key = frontend(last);
    let frontends = &table.sets[&ServiceSet::Frontends.name()].elements;
    frontends.iter().any(|element| element.key == key)
}

fn frontend(last: u8) -> Key {
    let address = IpAddr::from([10, 96, 0, last]);
    Key::build().address(address).protocol(6).port(80).finish()
}

fn web(last: u8) -> Service {
    service(&format!("web-{last}"), &[&format!("10.96.0.{last}")], &[80])
}

#[tokio::test(start_paused = true)]
async fn policies_that_fail_delay_no_service() {
    let bench = Bench::new();
    let kernel = &bench.kernel;
    let mut controller = bench.controller().with_policies(engine());
    kernel.0.borrow_mut().stuck = Some(policies::TABLE);
    let health = Health::new(Duration::from_secs(30));
    let (events, received) = mpsc::channel(64);
    let (stop, stopped) = watch::channel(false);
    let test = async {
        for event in lists(vec![web(1).into()]) {
            events.send(Delivery::now(event)).await.unwrap();
        }
        for event in policy_lists(vec![pod("web", "10.1.0.5"), closed()]) {
            events.send(Delivery::now(event)).await.unwrap();
        }
        soon("the first service", || has_frontend(kernel, 1)).await;
        // By now the pauses between two attempts at the policies are long.
        tokio::time::sleep(Duration::from_secs(300)).await;
        assert!(!health.ready(), "policies are not in force");
        let before = tokio::time::Instant::now();
        events.send(Delivery::now(put(web(2)))).await.unwrap();
        soon("the second service", || has_frontend(kernel, 2)).await;
        assert_eq!(before.elapsed(), Duration::ZERO);
        // They come to force with the next attempt.
        kernel.0.borrow_mut().stuck = None;
        tokio::time::sleep(Duration::from_secs(30)).await;
        soon("the policies", || health.ready()).await;
        stop.send_replace(true);
    };
    let task = run(&mut controller, received, signals(stopped), &health);
    let (exit, ()) = tokio::join!(task, test);
    assert_eq!(exit, Exit::Stopped);
}

#[tokio::test(start_paused = true)]
async fn events_that_never_end_leave_time_for_healing() {
    let bench = Bench::new();
    let kernel = &bench.kernel;
    let mut controller = bench.controller();
    let health = Health::new(Duration::from_secs(30));
    let (events, received) = mpsc::channel(4);
    let (stop, stopped) = watch::channel(false);
    let signals = signals(stopped);
    let foreign = signals.foreign.clone();
    let service = web(1);
    let test = async {
        for event in lists(vec![service.clone().into()]) {
            events.send(Delivery::now(event)).await.unwrap();
        }
        soon("the service", || has_frontend(kernel, 1)).await;
        // Another process removes something that no event is about.
        kernel.meddle(|ruleset| {
            let table = ruleset.tables.get_mut(&table_id(Family::V4)).unwrap();
            let frontends = table.sets.get_mut(&ServiceSet::Frontends.name());
            frontends.unwrap().elements.clear();
        });
        foreign.notify_one();
        let whole = || has_frontend(kernel, 1);
        for endpoint in (1..=9).cycle().take(LOOKS) {
            if whole() {
                break;
            }
            let endpoints = slice("web-1", &service, Family::V4, &[endpoint]);
            events.send(Delivery::now(put(endpoints))).await.unwrap();
        }
        assert!(whole(), "put back in spite of the events");
        stop.send_replace(true);
    };
    let (exit, ()) = tokio::join!(run(&mut controller, received, signals, &health), test);
    assert_eq!(exit, Exit::Stopped);
}

#[tokio::test(start_paused = true)]
async fn a_kernel_that_does_not_answer_is_noticed_although_nothing_changes() {
    let bench = Bench::new();
    let kernel = &bench.kernel;
    let mut controller = bench.controller();
    let period = Duration::from_secs(30);
    let health = Health::with_clock(period, || ClockReading {
        monotonic: tokio::time::Instant::now().into_std(),
        wall: SystemTime::now(),
    });
    let (events, received) = mpsc::channel(4);
    let (stop, stopped) = watch::channel(false);
    let test = async {
        for event in lists(vec![web(1).into()]) {
            events.send(Delivery::now(event)).await.unwrap();
        }
        soon("the first rules", || health.ready()).await;
        tokio::time::sleep(period * 10).await;
        assert_eq!(health.livez().message, None);
        kernel.0.borrow_mut().mute = true;
        tokio::time::sleep(period * 2).await;
        let message = health.livez().message.unwrap();
        assert!(message.contains("the ruleset's generation"), "{message}");
        assert!(!health.healthz().healthy);
        kernel.0.borrow_mut().mute = false;
        tokio::time::sleep(period).await;
        soon("health", || health.healthz().healthy).await;
        stop.send_replace(true);
    };
    let task = run(&mut controller, received, signals(stopped), &health);
    let (exit, ()) = tokio::join!(task, test);
    assert_eq!(exit, Exit::Stopped);
}

#[tokio::test(start_paused = true)]
async fn while_it_is_unknown_what_is_in_force_no_chain_is_removed() {
    let bench = Bench::new();
    let mut controller = bench.controller().with_policies(engine());
    handle(&mut controller, lists(vec![restricted(8).into()]));
    handle(&mut controller, policy_lists(vec![]));
    handle(&mut controller, vec![put(restricted(16))]);
    assert!(controller.services.due().is_some());

    // The outcome of the services does not contain that of the policies.
    bench.kernel.0.borrow_mut().stuck = Some(policies::TABLE);
    let policies = vec![pod("web", "10.1.0.5"), closed()];
    assert_eq!(handle(&mut controller, policies), Outcome::Failed);
    let removed = remove_unused_chains(&mut controller).await;
    assert_eq!(removed.services, Some(Outcome::Synced));
    assert_eq!(removed.policies, None);
    assert!(!controller.is_synced());

    handle(&mut controller, vec![put(restricted(8))]);
    bench.kernel.0.borrow_mut().failures = 3;
    handle(&mut controller, vec![put(restricted(16))]);
    assert_eq!(controller.services.due(), None);
}

#[tokio::test(start_paused = true)]
async fn each_chain_stays_for_its_own_time() {
    let bench = Bench::new();
    let mut controller = bench.controller();
    let has = |length| bench.has_chain(&source_list(length));
    let wait = async |controller: &mut Controller<'_, Fake>, seconds| {
        tokio::time::advance(Duration::from_secs(seconds)).await;
        controller.work(Engines::SERVICES);
    };
    handle(&mut controller, lists(vec![]));
    handle(&mut controller, vec![put(restricted(8))]);
    handle(&mut controller, vec![put(restricted(12))]);
    wait(&mut controller, 20).await;
    handle(&mut controller, vec![put(restricted(16))]);
    wait(&mut controller, 40).await;
    assert!(!has(8));
    assert!(has(12), "it was used after that");
    assert!(controller.services.due().is_some());
    // A chain that is used again and left again begins anew.
    handle(&mut controller, vec![put(restricted(12))]);
    handle(&mut controller, vec![put(restricted(16))]);
    wait(&mut controller, 59).await;
    assert!(has(12));
    wait(&mut controller, 1).await;
    assert!(!has(12));
    assert_eq!(controller.services.due(), None);
}

/// Writes a service whose frontend the kernel refuses so often, for this reason; returns what was
/// achieved and whether the service was left out.
fn refuse(errno: i32, times: usize) -> (Outcome, bool) {
    let bench = Bench::new();
    let mut controller = bench.controller();
    handle(&mut controller, lists(vec![web(1).into()]));
    {
        let mut state = bench.kernel.0.borrow_mut();
        state.unwanted = Some(frontend(2));
        state.unwanted_because = Some(errno);
        state.unwanted_times = Some(times);
    }
    let outcome = handle(&mut controller, vec![put(web(2))]);
    assert_eq!(outcome == Outcome::Synced, controller.is_synced());
    (outcome, !has_frontend(&bench.kernel, 2))
}

#[test]
fn a_service_is_left_out_only_for_what_is_wrong_with_it() {
    // The first refusal meets the change alone; then everything is read and compared.
    assert_eq!(refuse(libc::EINVAL, 1), (Outcome::Synced, false));
    assert_eq!(refuse(libc::EINVAL, 2), (Outcome::Synced, true));
    // Another process may have written between reading and writing.
    assert_eq!(refuse(libc::EBUSY, 2), (Outcome::Synced, false));
    assert_eq!(refuse(libc::ENOENT, 2), (Outcome::Synced, false));
    assert_eq!(refuse(libc::EEXIST, 3), (Outcome::Synced, true));
    // Any other element would have met the same.
    assert_eq!(refuse(libc::ENOMEM, 2), (Outcome::Failed, true));
    assert_eq!(refuse(libc::EPERM, 2), (Outcome::Failed, true));
}
