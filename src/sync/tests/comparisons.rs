//! Comparisons that another thread makes, without the thread.

use std::sync::mpsc::{Receiver, channel};

use tokio::sync::oneshot;

use super::histories::event;
use super::queries::{closed, engine, pod, policy_lists};
use super::*;
use crate::policies::{self, Connection, Direction};
use crate::sync::reader::ReaderTask;

/// The tasks of the thread.
struct Tasks(Receiver<ReaderTask>);

impl Tasks {
    /// Performs all tasks that wait and returns their number.
    fn perform(&self, bench: &Bench) -> usize {
        let tasks = self.0.try_iter().map(|job| match job {
            ReaderTask::Compare(compare) => compare(&mut bench.kernel.clone()),
            ReaderTask::Audit(_) => panic!("not a comparison"),
        });
        tasks.count()
    }
}

fn controller(bench: &Bench) -> (Controller<'_, Fake>, Tasks) {
    let (jobs, received) = channel();
    let controller = bench.controller().with_policies(engine());
    let controller = controller.with_reader(TableReader::new(jobs));
    (controller, Tasks(received))
}

fn web(number: u8) -> Service {
    let name = format!("web-{number}");
    service(&name, &[&format!("10.96.0.{number}")], &[80])
}

/// The lists of both engines.
fn all_lists(services: u8) -> Vec<Event> {
    let services = (1..=services).map(|number| web(number).into());
    let mut events = lists(services.collect());
    events.extend(policy_lists(vec![pod("web", "10.1.0.5"), closed()]));
    events
}

/// Runs an earlier process to its end, which leaves its rules.
fn leave_rules(bench: &Bench) {
    let mut earlier = bench.controller().with_policies(engine());
    assert_eq!(handle(&mut earlier, all_lists(50)), Outcome::Synced);
    bench.applied();
    bench.kernel.0.borrow_mut().reads = 0;
}

/// Checks that the kernel has what a new process would write.
fn assert_as_fresh(bench: &Bench, controller: &Controller<Fake>) {
    let mut ruleset = bench.kernel.0.borrow().ruleset.clone();
    let wanted = controller.policies().unwrap().ruleset();
    let of_policies = |id: &TableId| id.name.as_str() == policies::TABLE;
    let (found, rest) = std::mem::take(&mut ruleset.tables)
        .into_iter()
        .partition(|(id, _)| of_policies(id));
    assert_eq!(Ruleset { tables: found }, wanted);
    let wanted = services::wanted(controller.store(), &bench.settings).0;
    assert_eq!(meaning(&Ruleset { tables: rest }), meaning(&wanted));
}

#[test]
fn the_main_loop_reads_and_writes_nothing_while_tables_are_compared() {
    let bench = Bench::new();
    leave_rules(&bench);
    let (mut controller, tasks) = controller(&bench);
    assert_eq!(handle(&mut controller, all_lists(50)), Outcome::Comparing);
    let generation = bench.kernel.0.borrow().generation;
    let changes = [
        vec![put(web(60))],
        vec![pod("db", "10.1.0.6")],
        vec![delete(Kind::Service, "web-7")],
        vec![],
    ];
    for events in changes {
        assert_eq!(handle(&mut controller, events), Outcome::Comparing);
        assert!(controller.ping_kernel().is_ok());
        let (answer, mut answered) = oneshot::channel();
        let connection = Connection {
            source: "10.1.0.5".parse().unwrap(),
            destination: "10.1.0.9".parse().unwrap(),
            protocol: 6,
            port: Some(80),
        };
        controller.answer(Query::Names {
            connection,
            direction: Direction::Egress,
            audited: false,
            answer,
        });
        let names = answered.try_recv().unwrap();
        assert_eq!(names.source.unwrap().name(), "web");
        assert_eq!(names.destination, None);
    }
    assert_eq!(bench.kernel.0.borrow().reads, 0);
    assert_eq!(bench.kernel.0.borrow().generation, generation);

    assert_eq!(tasks.perform(&bench), 2, "one for each engine");
    assert_eq!(bench.kernel.0.borrow().reads, 2);
    assert_eq!(bench.applied().len(), 0, "the thread only reads");
    assert_eq!(handle(&mut controller, vec![]), Outcome::Synced);
    assert_as_fresh(&bench, &controller);
    assert!(controller.store().service(&web(60).name).is_some());
    // The rules were in place but for the changes.
    let elements: usize = bench.applied().iter().map(Transaction::elements).sum();
    assert!((1..20).contains(&elements), "{elements}");
    assert_eq!(bench.kernel.0.borrow().reads, 2);
}

#[test]
fn policy_events_during_a_comparison_are_written_behind_it() {
    let bench = Bench::new();
    leave_rules(&bench);
    let (mut controller, tasks) = controller(&bench);
    assert_eq!(handle(&mut controller, all_lists(50)), Outcome::Comparing);
    handle(&mut controller, vec![pod("web-2", "10.1.0.6")]);
    tasks.perform(&bench);
    let outcomes = controller.work(Engines {
        policies: true,
        services: false,
    });
    assert_eq!(outcomes.policies, Some(Outcome::Synced));
    let state = bench.kernel.0.borrow();
    let of_policies = state.ruleset.tables.iter();
    let mut of_policies = of_policies.filter(|(id, _)| id.name.as_str() == policies::TABLE);
    let address = Key::address("10.1.0.6".parse().unwrap());
    let holds = |table: &Table| {
        let mut elements = table.sets.values().flat_map(|set| &set.elements);
        elements.any(|element| element.key == address)
    };
    assert!(of_policies.any(|(_, table)| holds(table)));
}

#[test]
fn a_service_that_changed_during_a_comparison_is_not_left_out_for_its_former_state() {
    let bench = Bench::new();
    let (mut controller, tasks) = controller(&bench);
    let unwanted = Key::build().address("10.96.0.7".parse().unwrap());
    let unwanted = unwanted.protocol(6).port(80).finish();
    bench.kernel.0.borrow_mut().unwanted = Some(unwanted);
    assert_eq!(handle(&mut controller, all_lists(9)), Outcome::Comparing);
    let mended = service("web-7", &["10.96.0.77"], &[80]);
    handle(&mut controller, vec![put(mended)]);
    tasks.perform(&bench);
    assert_eq!(handle(&mut controller, vec![]), Outcome::Synced);
    assert_eq!(bench.heard(), Vec::<String>::new());
    assert_as_fresh(&bench, &controller);
}

#[test]
fn only_the_last_of_many_comparisons_is_made() {
    let bench = Bench::new();
    leave_rules(&bench);
    let (mut controller, tasks) = controller(&bench);
    handle(&mut controller, all_lists(50));
    for _ in 0..20 {
        bench.kernel.meddle(|ruleset| ruleset.tables.clear());
        assert_eq!(heal(&mut controller), (Outcome::Comparing, true));
    }
    let reads = bench.kernel.0.borrow().reads;
    assert_eq!(tasks.perform(&bench), 2 * 21);
    assert_eq!(bench.kernel.0.borrow().reads, reads + 2);
    assert_eq!(handle(&mut controller, vec![]), Outcome::Synced);
    assert_as_fresh(&bench, &controller);
}

#[test]
fn a_refused_service_is_left_out_after_a_comparison_in_another_thread() {
    let bench = Bench::new();
    let unwanted = Key::build()
        .address("10.96.0.7".parse().unwrap())
        .protocol(6)
        .port(80)
        .finish();
    bench.kernel.0.borrow_mut().unwanted = Some(unwanted);
    let (mut controller, tasks) = controller(&bench);
    assert_eq!(handle(&mut controller, all_lists(9)), Outcome::Comparing);
    handle(&mut controller, vec![put(web(60)), pod("db", "10.1.0.6")]);
    tasks.perform(&bench);
    assert_eq!(handle(&mut controller, vec![]), Outcome::Synced);
    let heard = bench.heard();
    assert_eq!(heard.len(), 1, "{heard:?}");
    assert!(heard[0].starts_with("Service shop/web-7: the kernel refused"));
    let state = bench.kernel.0.borrow();
    let table = &state.ruleset.tables[&table_id(Family::V4)];
    assert_eq!(table.sets[&ServiceSet::Frontends.name()].elements.len(), 9);
}

#[test]
fn a_comparison_starts_again_if_another_process_wrote_meanwhile() {
    let bench = Bench::new();
    leave_rules(&bench);
    let (mut controller, tasks) = controller(&bench);
    handle(&mut controller, all_lists(50));
    tasks.perform(&bench);
    bench.kernel.meddle(|ruleset| ruleset.tables.clear());
    heal(&mut controller);
    assert_eq!(handle(&mut controller, vec![]), Outcome::Comparing);
    assert_eq!(tasks.perform(&bench), 2);
    assert_eq!(handle(&mut controller, vec![]), Outcome::Synced);
    assert_as_fresh(&bench, &controller);
}

/// A kernel whose dumps are interrupted.
struct Interrupted;

impl Kernel for Interrupted {
    fn apply(&mut self, _: &Transaction) -> Result<Applied, Error> {
        unreachable!("the thread only reads")
    }

    fn read(&mut self, _: &[&str], _: &Ruleset) -> Result<Ruleset, Error> {
        let what = "elements";
        Err(Error::Interrupted { what, times: 32 })
    }

    fn elements(&mut self, _: &TableId, _: &str) -> Result<Vec<Element>, Error> {
        unreachable!("they are not read")
    }

    fn generation(&mut self) -> Result<u32, Error> {
        Ok(0)
    }
}

#[test]
fn the_main_loop_compares_what_the_thread_could_not_read() {
    let bench = Bench::new();
    leave_rules(&bench);
    let (mut controller, tasks) = controller(&bench);
    handle(&mut controller, all_lists(50));
    handle(&mut controller, vec![put(web(60)), pod("db", "10.1.0.6")]);
    for job in tasks.0.try_iter() {
        let ReaderTask::Compare(compare) = job else {
            panic!("not a comparison");
        };
        compare(&mut Interrupted);
    }
    assert_eq!(handle(&mut controller, vec![]), Outcome::Synced);
    assert_eq!(bench.heard(), Vec::<String>::new());
    assert_eq!(bench.kernel.0.borrow().reads, 2);
    assert_as_fresh(&bench, &controller);
}

#[test]
fn the_main_loop_compares_if_the_thread_has_ended() {
    let bench = Bench::new();
    let (mut controller, tasks) = controller(&bench);
    handle(&mut controller, all_lists(3));
    drop(tasks);
    assert_eq!(handle(&mut controller, vec![]), Outcome::Synced);
    assert_as_fresh(&bench, &controller);
}

/// The end of a comparison is an event of its own.
#[tokio::test(start_paused = true)]
async fn the_main_loop_goes_on_when_a_comparison_is_done() {
    let bench = Bench::new();
    let (mut controller, tasks) = controller(&bench);
    let health = Health::new(Duration::from_secs(30));
    let (events, received) = mpsc::channel(256);
    let (_stop, stop) = watch::channel(false);
    let (ready, mut in_force) = oneshot::channel();
    for event in all_lists(5) {
        events.send(Delivery::now(event)).await.unwrap();
    }
    // Also when nothing can come any more.
    drop(events);
    let signals = Signals {
        stop,
        once: false,
        foreign: Arc::default(),
        missed: Arc::default(),
        audits: None,
        ready: vec![ready],
        queries: None,
    };
    let compare = async {
        while tasks.perform(&bench) == 0 {
            tokio::task::yield_now().await;
        }
        assert!(in_force.try_recv().is_err(), "nothing is written yet");
    };
    let (exit, ()) = tokio::join!(run(&mut controller, received, signals, &health), compare);
    assert_eq!(exit, Exit::SourcesGone);
    assert!(in_force.try_recv().is_ok());
    assert_as_fresh(&bench, &controller);
}

proptest! {
    #![proptest_config(ProptestConfig { cases: 100, ..ProptestConfig::default() })]

    /// Whatever arrives and fails while tables are compared, the kernel ends where a new process would
    /// bring it.
    #[test]
    fn histories_with_comparisons_end_where_a_fresh_start_would(
        history in vec((vec(event(), 0..4), 0u8..6, 1u8..9, any::<bool>()), 1..12),
    ) {
        let bench = Bench::new();
        let (mut controller, tasks) = controller(&bench);
        handle(&mut controller, all_lists(3));
        for (events, failures, address, performs) in history {
            // One batch in three meets a kernel that fails, and one in two a thread that is done.
            bench.kernel.0.borrow_mut().failures = usize::from(failures.saturating_sub(3));
            handle(&mut controller, events);
            handle(&mut controller, vec![pod("moving", &format!("10.1.0.{address}"))]);
            bench.kernel.0.borrow_mut().failures = 0;
            if performs {
                tasks.perform(&bench);
            }
        }
        let mut outcome = handle(&mut controller, vec![]);
        for _ in 0..10 {
            tasks.perform(&bench);
            outcome = handle(&mut controller, vec![]);
        }
        prop_assert_eq!(outcome, Outcome::Synced);
        assert_as_fresh(&bench, &controller);
    }
}
