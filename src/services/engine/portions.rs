//! Processes the changes of large services in portions.

use std::sync::Arc;

use super::{Engine, replaced};
use crate::model::{Event, Kind, Object, ObjectName};
use crate::services::change::PlanChange;
use crate::services::queue::{Done, Task};
use crate::services::service::Compilation;
use crate::services::tables::TransactionDraft;

/// The number of claims that are applied, and of frontends that are compiled, for each element of a
/// portion: each takes a fraction of the time that an element takes in the kernel.
const CLAIMS: usize = 2;

impl Engine {
    /// Queues an event that changes more claims than a portion has elements, and returns all
    /// others. No event waits while Services are listed: the list replaces earlier events, and the
    /// objects missing from it are known only after all others are applied.
    pub(super) fn put_off_event(&mut self, event: Event) -> Option<Event> {
        let (name, new) = match &event {
            Event::ListStarted(Kind::Service) => {
                self.queue.drop_events();
                return Some(event);
            }
            Event::Apply(Object::Service(service)) => (&service.name, service.frontends()),
            Event::Delete(object) if object.kind == Kind::Service => (&object.name, 0),
            _ => return Some(event),
        };
        let name = name.clone();
        let old = self.store.service(&name).map_or(0, |old| old.frontends());
        let may_wait = self.started && !self.store.is_listing(Kind::Service);
        let waits = self.queue.has_event(&name) || self.store.is_applying(&name);
        if may_wait && (old.max(new) > self.portion || waits) {
            let exists = matches!(event, Event::Apply(_));
            self.store.announce_queued(&name, exists);
            self.queue.put_off(&name, event);
            return None;
        }
        self.queue.drop_event(&name);
        Some(event)
    }

    /// Starts to write a change in portions.
    pub(super) fn begin(&mut self, name: &ObjectName, change: PlanChange) {
        let change = Arc::new(change);
        let replaced = replaced(name, &change);
        self.tables.begin(name, change.clone());
        self.queue.write(name, change.after(), replaced);
    }

    /// Processes one portion of the queue: applies one event, compiles one service, or writes
    /// elements. Changes that fit into one portion are not divided.
    pub(super) fn work_on_queue(&mut self, draft: &mut TransactionDraft) {
        let mut room = self.portion;
        let mut compiled = false;
        while room > 0
            && let Some(name) = self.queue.next()
            && (!compiled || self.queue.is_being_written(&name))
        {
            let left = self.tables.left(&name);
            let most = match left {
                // It fits: write all of it.
                _ if left <= room => usize::MAX,
                // It does not fit into what is left: wait for a whole portion.
                _ if room < self.portion => break,
                // It does not fit into a whole portion: divide it.
                _ => room,
            };
            if self.store.is_applying(&name) {
                self.queue.had_turn(&name);
                self.apply_portion_of_claims(&name);
                break;
            }
            match self.queue.task(&name) {
                None => break,
                Some(Task::Write) => {
                    self.queue.had_turn(&name);
                    let (elements, done) = self.tables.advance(&name, most, Some(draft));
                    room = room.saturating_sub(elements);
                    if done && self.done(&name) {
                        break;
                    }
                }
                Some(Task::Compile) => {
                    compiled = true;
                    let elements = self.compile_one(&name);
                    if elements.is_none_or(|elements| elements > room) {
                        self.queue.had_turn(&name);
                        break;
                    }
                }
                Some(Task::ApplyEvent(event)) => {
                    self.queue.had_turn(&name);
                    self.apply_in_portions(&name, event);
                    break;
                }
            }
        }
    }

    /// Starts to apply an event that waited.
    fn apply_in_portions(&mut self, name: &ObjectName, event: Event) {
        let in_force = self.tables.shared_plan(name);
        self.queue.compile(name, in_force);
        self.store.begin_apply(event, &mut self.marks);
        self.note_marks();
        self.apply_portion_of_claims(name);
    }

    /// Applies a portion of the claims of a service. Other services that it concerns are compiled
    /// with the next call.
    fn apply_portion_of_claims(&mut self, name: &ObjectName) {
        let most = self.portion.saturating_mul(CLAIMS);
        self.store.continue_apply(name, most, &mut self.marks);
        self.note_marks();
    }

    /// Compiles a portion of the frontends of a service. After the last one, starts to write the
    /// change and returns its approximate number of elements.
    fn compile_one(&mut self, name: &ObjectName) -> Option<usize> {
        let begun = self.queue.take_compilation(name).or_else(|| {
            self.note_compiled(name);
            let begun = Compilation::begin(&self.store, name);
            let begun = self.unless_too_large(name, begun).flatten();
            begun.filter(|_| !self.quarantined.contains(name))
        });
        let previous = self.tables.plan(name);
        let mut plan = None;
        if let Some(mut compilation) = begun {
            let (most, queue) = (self.portion.saturating_mul(CLAIMS), &mut self.queue);
            let mut withheld = false;
            let (store, settings) = (&self.store, &self.settings);
            let complete = compilation.advance(store, settings, previous, most, |frontend| {
                let is_free = queue.reserve_frontend(name, frontend);
                withheld |= !is_free;
                is_free
            });
            if withheld {
                queue.recompile_on_release(name);
            }
            if !complete {
                queue.compile_on(name, compilation);
                return None;
            }
            plan = compilation.finish(store, previous);
        }
        match self.tables.change(name, plan) {
            Some(change) => {
                self.queue.compiled(name, change.after());
                let elements = change.elements();
                self.begin(name, change);
                Some(elements)
            }
            None => {
                self.queue.had_turn(name);
                self.done(name);
                Some(0)
            }
        }
    }

    /// Records the change of a service that no longer waits. The services that waited for its
    /// frontends are compiled with the next call.
    ///
    /// Returns whether it has to be compiled again. No other service may be compiled before: the
    /// store may have assigned frontends to others that its plan in force still has.
    pub(super) fn done(&mut self, name: &ObjectName) -> bool {
        let Done { replaced, compile } = self.queue.done(name);
        match replaced {
            Some(replaced) => self.note(replaced),
            None => self.note_unchanged(name),
        }
        let services = &mut self.marks.services;
        services.append(&mut self.queue.take_recompile());
        services.extend(compile.then(|| name.clone()));
        compile
    }

    /// Treats all started changes as written, before a comparison of the whole tables. Events
    /// continue to wait.
    pub(super) fn abandon_portions(&mut self) {
        self.store.finish(&mut self.marks);
        self.note_marks();
        for name in self.queue.services() {
            self.tables.advance(&name, usize::MAX, None);
            self.done(&name);
        }
    }
}
