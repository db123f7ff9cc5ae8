//! Delivery of the objects of one kind as events.

use std::collections::{HashMap, HashSet};
use std::sync::Arc;
use std::time::{Duration, Instant};

use serde_json::value::RawValue;
use tokio::time::Instant as Deadline;

use super::frames::json;
use super::selection::Selection;
use super::stats::SourceStats;
use super::watch_error::{WatchError, shortened};
use crate::model::{Delivery, Event, Kind, Notice, Object, ObjectName, ObjectRef, Reason, Subject};
use crate::source::Sender;
use crate::source::convert::{Converter, Declared, Decoded, identify};

/// Turns the objects of one kind into events.
///
/// Keeps the names it has delivered, to find the objects that a new list lacks. Operations fail
/// with [`WatchError::Closed`] once the receiver of the events was dropped, and with
/// [`WatchError::Foreign`] if the server sends objects of another kind.
pub(super) struct Deliveries {
    kind: Kind,
    plural: &'static str,
    selection: Selection,
    sender: Sender,
    stats: Arc<SourceStats>,
    converter: Converter,
    /// How long to wait for the node's own Node object, and until when.
    node_wait: Duration,
    node_deadline: Option<Deadline>,
    /// The names that were delivered and not deleted.
    known: HashSet<ObjectName>,
    /// While a list is read, the names that it has contained so far.
    listing: Option<HashSet<ObjectName>>,
    /// Whether the objects are list items, which may lack apiVersion and kind.
    in_items: bool,
    /// Whether the list has an object without a readable name. It may be any known object that the
    /// list seems to lack.
    nameless: bool,
    /// The last notices about each object, so that a change does not repeat them.
    reported: HashMap<ObjectName, Vec<Notice>>,
    /// Whether `ListStarted` was sent.
    started: bool,
    /// Whether `ListComplete` was sent.
    complete: bool,
    /// Whether the list of Nodes ended without the own Node.
    waiting_for_node: bool,
}

impl Deliveries {
    pub(super) fn new(
        selection: &Selection,
        sender: Sender,
        stats: Arc<SourceStats>,
        node_wait: Duration,
    ) -> Self {
        let deadline = selection.own_node().deadline;
        let waits = selection.kind == Kind::Node && deadline > Deadline::now();
        Self {
            kind: selection.kind,
            plural: selection.kind.plural(),
            selection: selection.clone(),
            sender,
            stats,
            converter: Converter::default(),
            node_wait,
            node_deadline: waits.then_some(deadline),
            known: HashSet::new(),
            listing: None,
            in_items: false,
            nameless: false,
            reported: HashMap::new(),
            started: false,
            complete: false,
            waiting_for_node: false,
        }
    }

    pub(super) fn is_listing(&self) -> bool {
        self.listing.is_some()
    }

    /// Abandons the list that is being read. Returns whether there was one.
    pub(super) fn break_off(&mut self) -> bool {
        self.listing.take().is_some()
    }

    /// Returns whether a first list was delivered completely.
    pub(super) fn is_complete(&self) -> bool {
        self.complete
    }

    /// Returns when to stop waiting for the own Node.
    pub(super) fn node_deadline(&self) -> Option<Deadline> {
        self.node_deadline
    }

    /// Decodes an object without delivering it.
    pub(super) fn decode(&mut self, json: &str) -> Result<Decoded, serde_json::Error> {
        let mut json = serde_json::Deserializer::from_str(json);
        let decoded = self.converter.decode(self.kind, &mut json)?;
        json.end()?;
        Ok(decoded)
    }

    /// Delivers an item of a list.
    pub(super) async fn item(&mut self, raw: &RawValue, at: Instant) -> Result<(), WatchError> {
        self.in_items = true;
        let taken = self.object(raw, at).await;
        self.in_items = false;
        taken.map(drop)
    }

    /// Starts a list. One that was abandoned has no effect.
    pub(super) async fn begin_list(&mut self) -> Result<(), WatchError> {
        self.listing = Some(HashSet::new());
        self.nameless = false;
        if !self.complete {
            // `ListStarted` discards what an incomplete list has delivered.
            self.known.clear();
            self.started = true;
            self.send(Instant::now(), Event::ListStarted(self.kind))
                .await?;
        }
        Ok(())
    }

    /// Ends the list: known objects that it lacks are deleted. The first list of Nodes stays
    /// incomplete until the own Node exists or its deadline has passed.
    pub(super) async fn end_list(&mut self, at: Instant) -> Result<(), WatchError> {
        let listed = self.listing.take().unwrap_or_default();
        self.stats.kind(self.kind).count_list();
        if self.complete && self.nameless {
            // Any known object may be the one whose name could not be read.
        } else if self.complete {
            let gone: Vec<ObjectName> = self.known.difference(&listed).cloned().collect();
            for name in gone {
                self.delete(name, at).await?;
            }
        } else if self.node_deadline.is_some() && !self.known.contains(&self.own_name()) {
            self.waiting_for_node = true;
        } else {
            self.complete(at).await?;
        }
        Ok(())
    }

    /// Returns the name of the own Node.
    fn own_name(&self) -> ObjectName {
        ObjectName::new("", &self.selection.own_node().name)
    }

    async fn complete(&mut self, at: Instant) -> Result<(), WatchError> {
        self.complete = true;
        self.node_deadline = None;
        self.waiting_for_node = false;
        self.send(at, Event::ListComplete(self.kind)).await
    }

    /// Deletes all objects.
    pub(super) async fn withdraw(&mut self) -> Result<(), WatchError> {
        let known: Vec<ObjectName> = self.known.iter().cloned().collect();
        for name in known {
            self.delete(name, Instant::now()).await?;
        }
        Ok(())
    }

    /// Completes the first list without objects, so that the other kinds can be used.
    pub(super) async fn complete_without(&mut self) -> Result<(), WatchError> {
        if self.complete {
            return Ok(());
        }
        let now = Instant::now();
        if !self.started {
            self.started = true;
            self.send(now, Event::ListStarted(self.kind)).await?;
        }
        self.complete(now).await
    }

    /// Decodes and delivers an object of a list or of a change. Returns its version.
    pub(super) async fn object(
        &mut self,
        raw: &RawValue,
        at: Instant,
    ) -> Result<Option<String>, WatchError> {
        let kind = self.kind;
        match self.converter.decode(kind, &mut json(raw)) {
            Ok(decoded) => self.take(decoded, at).await,
            Err(error) => {
                self.check_raw(raw)?;
                self.stats.kind(kind).count_event();
                let identity = identify(kind, &mut json(raw)).ok();
                let (name, version) = identity
                    .map(|identity| (identity.name, identity.resource_version))
                    .unzip();
                if let (Some(listed), Some(name)) = (&mut self.listing, &name) {
                    listed.insert(name.clone());
                }
                self.undecodable(name, &error, at).await?;
                Ok(version.flatten())
            }
        }
    }

    /// Checks that an object that cannot be decoded, or was deleted, is of the requested kind.
    pub(super) fn check_raw(&self, raw: &RawValue) -> Result<(), WatchError> {
        match Declared::read(self.kind, &mut json(raw)) {
            Ok(declared) => self.check(&declared),
            // In a list, only this entry is invalid.
            Err(_) if self.in_items => Ok(()),
            Err(error) => Err(WatchError::Foreign(format!(
                "an event without an object: {error}"
            ))),
        }
    }

    fn check(&self, declared: &Declared) -> Result<(), WatchError> {
        match declared {
            Declared::Requested => Ok(()),
            Declared::Absent if self.in_items => Ok(()),
            Declared::Absent => Err(WatchError::Foreign(
                "an object without apiVersion and kind".to_owned(),
            )),
            Declared::Other(what) => Err(WatchError::Foreign(format!("a {what}"))),
        }
    }

    /// Checks that a Node is the own one, unless all were requested.
    fn check_node(&self, name: &ObjectName) -> Result<(), WatchError> {
        if self.kind == Kind::Node && !self.selection.has_node(name.name()) {
            return Err(WatchError::Foreign(format!("another Node, {name}")));
        }
        Ok(())
    }

    /// Delivers a decoded object. Returns its version.
    pub(super) async fn take(
        &mut self,
        decoded: Decoded,
        at: Instant,
    ) -> Result<Option<String>, WatchError> {
        self.check(&decoded.declared)?;
        self.check_node(&decoded.name)?;
        self.stats.kind(self.kind).count_event();
        // The fields of other Nodes that policies use have no faults.
        if self.kind != Kind::Node || decoded.name == self.own_name() {
            self.report(&decoded.name, decoded.notices, at).await?;
        }
        match decoded.object {
            Some(object) => {
                if let Some(listed) = &mut self.listing {
                    listed.insert(decoded.name.clone());
                }
                self.known.insert(decoded.name);
                self.apply(object, at).await?;
            }
            // An object without rules, such as a slice of host names.
            None => self.delete(decoded.name, at).await?,
        }
        Ok(decoded.resource_version)
    }

    async fn apply(&mut self, object: Object, at: Instant) -> Result<(), WatchError> {
        let is_awaited = self.waiting_for_node && object.reference().name == self.own_name();
        self.send(at, Event::Apply(object)).await?;
        if is_awaited {
            self.complete(at).await?;
        }
        Ok(())
    }

    /// Delivers the deletion of an object.
    pub(super) async fn deleted(
        &mut self,
        name: ObjectName,
        at: Instant,
    ) -> Result<(), WatchError> {
        self.stats.kind(self.kind).count_event();
        if let Some(listed) = &mut self.listing {
            listed.remove(&name);
        }
        self.delete(name, at).await
    }

    async fn delete(&mut self, name: ObjectName, at: Instant) -> Result<(), WatchError> {
        self.reported.remove(&name);
        if !self.known.remove(&name) {
            return Ok(());
        }
        let object = ObjectRef::new(self.kind, name);
        self.send(at, Event::Delete(object)).await
    }

    /// Reports an object that cannot be decoded.
    pub(super) async fn undecodable(
        &mut self,
        name: Option<ObjectName>,
        error: &serde_json::Error,
        at: Instant,
    ) -> Result<(), WatchError> {
        let kind = self.kind;
        self.stats.kind(kind).count_undecodable();
        let (subject, who) = match &name {
            Some(name) => {
                let object = ObjectRef::new(kind, name.clone());
                (Subject::Object(object.clone()), object.to_string())
            }
            None => (
                Subject::Other(self.plural.into()),
                format!("a {kind} without a usable name"),
            ),
        };
        let error = shortened(error.to_string());
        let message = format!(
            "{who}: the object cannot be decoded: {error}; its last valid state stays in force until the object is corrected"
        );
        let notice = Notice {
            subject,
            reason: Reason::InvalidObject,
            message,
        };
        match name {
            Some(name) => self.report(&name, vec![notice], at).await,
            None => {
                self.nameless = true;
                self.send(at, Event::Notice(notice)).await
            }
        }
    }

    /// Sends the notices about an object, unless they are those sent last.
    async fn report(
        &mut self,
        name: &ObjectName,
        notices: Vec<Notice>,
        at: Instant,
    ) -> Result<(), WatchError> {
        if notices.is_empty() {
            self.reported.remove(name);
            return Ok(());
        }
        if self.reported.get(name) == Some(&notices) {
            return Ok(());
        }
        self.reported.insert(name.clone(), notices.clone());
        for notice in notices {
            self.send(at, Event::Notice(notice)).await?;
        }
        Ok(())
    }

    pub(super) async fn send(&mut self, at: Instant, event: Event) -> Result<(), WatchError> {
        self.sender
            .send(Delivery { at, event })
            .await
            .map_err(|_| WatchError::Closed)
    }

    /// Stops waiting for the own Node.
    pub(super) async fn go_on_without_node(&mut self) -> Result<(), WatchError> {
        self.node_deadline = None;
        let own = self.own_name();
        let node_name = own.name();
        let message = format!(
            "the Node \"{node_name}\" has not existed for {:?}; continuing without its addresses and zone (if the node has another name, set --hostname-override)",
            self.node_wait
        );
        let notice = Notice {
            subject: Subject::Object(ObjectRef::new(Kind::Node, own.clone())),
            reason: Reason::NodeMissing,
            message,
        };
        self.send(Instant::now(), Event::Notice(notice)).await?;
        self.complete_without().await
    }
}
