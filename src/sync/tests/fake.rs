//! A kernel in memory, and a reporter that records.

use super::*;

/// A kernel in memory. Clones share it, so that tests can look and meddle.
#[derive(Clone, Default)]
pub(crate) struct Fake(pub(crate) Rc<RefCell<FakeState>>);

#[derive(Default)]
pub(crate) struct FakeState {
    pub(crate) ruleset: Ruleset,
    pub(crate) applied: Vec<Transaction>,
    pub(crate) reads: usize,
    /// How often what packets add to a set was read, and what timed out thereafter.
    pub(crate) reads_of_sets: usize,
    pub(crate) timed_out: Vec<Element>,
    /// Transactions to fail before the next one succeeds.
    pub(crate) failures: usize,
    /// Transactions to take before all later ones fail.
    pub(crate) most: Option<usize>,
    /// The kernel does not want elements with this key.
    pub(crate) unwanted: Option<Key>,
    /// Nor with these.
    pub(crate) others_unwanted: Vec<Key>,
    /// The errno it says that with, `EINVAL` if none is given, and how often it does.
    pub(crate) unwanted_because: Option<i32>,
    pub(crate) unwanted_times: Option<usize>,
    /// Nothing can be written to tables of this name.
    pub(crate) stuck: Option<&'static str>,
    /// Each write conflicts with the tables, at another path each time.
    pub(crate) conflicts: Option<usize>,
    /// The kernel does not answer.
    pub(crate) mute: bool,
    pub(crate) generation: u32,
    /// Another process makes a change during a write, without a notification.
    pub(crate) missed_notifications: bool,
}

impl Fake {
    /// Changes something as another process.
    pub(crate) fn meddle(&self, change: impl FnOnce(&mut Ruleset)) {
        let mut state = self.0.borrow_mut();
        change(&mut state.ruleset);
        state.generation += 1;
    }
}

impl Kernel for Fake {
    fn apply(&mut self, transaction: &Transaction) -> Result<Applied, Error> {
        let mut state = self.0.borrow_mut();
        let too_many = state.most.is_some_and(|most| state.applied.len() >= most);
        if state.failures > 0 || too_many {
            state.failures = state.failures.saturating_sub(1);
            return Err(Error::Send {
                what: "a transaction",
                bytes: 0,
                source: io::Error::from_raw_os_error(libc::ENOBUFS),
            });
        }
        let refused = |path, errno| {
            let first = Refusal {
                path,
                source: io::Error::from_raw_os_error(errno),
                detail: String::new(),
            };
            Error::Refused {
                first: Box::new(first),
                others: Vec::new(),
            }
        };
        for op in &transaction.ops {
            let Op::AddElements(_, _, _, elements) = op else {
                continue;
            };
            let unwanted = |element: &Element| state.unwanted.as_ref() == Some(&element.key);
            if let Some(index) = elements.iter().position(unwanted) {
                let errno = state.unwanted_because.unwrap_or(libc::EINVAL);
                if let Some(times) = &mut state.unwanted_times {
                    *times -= 1;
                    if *times == 0 {
                        state.unwanted = None;
                    }
                }
                return Err(refused(ObjectPath::of(op, Some(index)), errno));
            }
        }
        if let Some(conflicts) = &mut state.conflicts {
            *conflicts += 1;
            let set = format!("set-{conflicts}");
            let path = ObjectPath::Set(
                crate::services::table_id(crate::model::Family::V4),
                set.as_str().into(),
            );
            return Err(refused(path, libc::ENOENT));
        }
        let others: Vec<Refusal> = unwanted_of(transaction, &state.others_unwanted);
        let mut others = others.into_iter();
        if let Some(first) = others.next() {
            return Err(Error::Refused {
                first: Box::new(first),
                others: others.collect(),
            });
        }
        let mut ops = transaction.ops.iter();
        if let Some(op) = ops.find(|op| state.stuck == Some(table_of(op))) {
            return Err(refused(ObjectPath::of(op, None), libc::EINVAL));
        }
        if let Err((index, _)) = simulate::apply(&mut state.ruleset, transaction) {
            let place = transaction
                .ops
                .get(index)
                .map(|op| ObjectPath::of(op, None));
            return Err(refused(
                place.unwrap_or(ObjectPath::Transaction),
                libc::ENOENT,
            ));
        }
        state.applied.push(transaction.clone());
        state.generation += 1 + u32::from(state.missed_notifications);
        Ok(Applied {
            missed_notifications: state.missed_notifications,
            ..Applied::default()
        })
    }

    fn read(&mut self, names: &[&str], _: &Ruleset) -> Result<Ruleset, Error> {
        let mut state = self.0.borrow_mut();
        state.reads += 1;
        let mut ruleset = state.ruleset.clone();
        ruleset
            .tables
            .retain(|id, _| names.contains(&id.name.as_str()));
        for table in ruleset.tables.values_mut() {
            // As from the kernel: what packets add is left out.
            let sets = table.sets.values_mut();
            for set in sets.filter(|set| set.declaration.timeout.is_some()) {
                set.elements.clear();
            }
        }
        Ok(ruleset)
    }

    fn elements(&mut self, table: &TableId, set: &str) -> Result<Vec<Element>, Error> {
        let mut state = self.0.borrow_mut();
        state.reads_of_sets += 1;
        let table = state.ruleset.tables.get(table);
        let Some(set) = table.and_then(|table| table.sets.get(set)) else {
            return Err(Error::Receive {
                what: "the elements of a set",
                source: io::Error::from_raw_os_error(libc::ENOENT),
            });
        };
        let mut elements = set.elements.clone();
        elements.extend(state.timed_out.clone());
        elements.sort();
        Ok(elements)
    }

    fn generation(&mut self) -> Result<u32, Error> {
        let state = self.0.borrow();
        if state.mute {
            return Err(Error::Receive {
                what: "the ruleset's generation",
                source: io::Error::from_raw_os_error(libc::EIO),
            });
        }
        Ok(state.generation)
    }
}

/// The refusals of elements that are not wanted, one of each operation as from the kernel.
fn unwanted_of(transaction: &Transaction, unwanted: &[Key]) -> Vec<Refusal> {
    let ops = transaction.ops.iter();
    let refused = ops.filter_map(|op| {
        let Op::AddElements(_, _, _, elements) = op else {
            return None;
        };
        let index = elements.iter().position(|it| unwanted.contains(&it.key))?;
        Some(Refusal {
            path: ObjectPath::of(op, Some(index)),
            source: io::Error::from_raw_os_error(libc::EINVAL),
            detail: String::new(),
        })
    });
    refused.collect()
}

/// The name of the table that an operation is about.
fn table_of(op: &Op) -> &str {
    let (Op::AddTable(table)
    | Op::DeleteTable(table)
    | Op::AddSet(table, ..)
    | Op::DeleteSet(table, _)
    | Op::FlushSet(table, _)
    | Op::DeleteStray(table, _)
    | Op::AddChain(table, ..)
    | Op::FlushChain(table, _)
    | Op::DeleteChain(table, _)
    | Op::AddRule(table, ..)
    | Op::AddElements(table, ..)
    | Op::DeleteElements(table, ..)) = op;
    table.name.as_str()
}

#[derive(Default)]
pub(crate) struct RecordedReports(pub(super) Mutex<Vec<String>>);

impl Reporter for RecordedReports {
    fn notice(&self, notice: &Notice) {
        let line = format!("{}: {}", notice.subject, notice.message);
        self.0.lock().unwrap().push(line);
    }

    fn failed(&self, error: &Error) {
        self.0.lock().unwrap().push(error.to_string());
    }

    fn stale_flows_remain(&self, error: &ConntrackError) {
        self.0.lock().unwrap().push(error.to_string());
    }
}
