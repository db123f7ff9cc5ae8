//! Delivering the objects of one kind: what is known of them, and what was said about them.

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

/// Turns what the server sends of one kind into events. Every operation fails only when the
/// receiver of the events is gone.
pub(super) struct Deliveries {
    kind: Kind,
    plural: &'static str,
    node_name: String,
    sender: Sender,
    stats: Arc<SourceStats>,
    converter: Converter,
    /// How long the own Node may be missing, and when to go on without it.
    node_wait: Duration,
    node_deadline: Option<Deadline>,
    /// The names that were delivered and not deleted.
    known: HashSet<ObjectName>,
    /// While a list is being read, the names that came up in it.
    listing: Option<HashSet<ObjectName>>,
    /// Whether objects come as items of a list, which says of what kind they are.
    in_items: bool,
    /// Whether an object of that list could not be told by name: what the list lacks may be it.
    nameless: bool,
    /// What was said about objects at fault, so that it is not repeated with their every change.
    told: HashMap<ObjectName, Vec<Notice>>,
    /// Whether `ListStarted` was sent.
    started: bool,
    /// Whether `ListComplete` was sent.
    complete: bool,
    /// Whether the list was read to its end, though its node is still missing.
    waiting_for_node: bool,
}

impl Deliveries {
    pub(super) fn new(
        selection: &Selection,
        sender: Sender,
        stats: Arc<SourceStats>,
        node_wait: Duration,
    ) -> Self {
        let is_node = selection.kind == Kind::Node;
        Self {
            kind: selection.kind,
            plural: selection.kind.plural(),
            node_name: selection.node_name().to_owned(),
            sender,
            stats,
            converter: Converter::default(),
            node_wait,
            node_deadline: is_node.then(|| Deadline::now() + node_wait),
            known: HashSet::new(),
            listing: None,
            in_items: false,
            nameless: false,
            told: HashMap::new(),
            started: false,
            complete: false,
            waiting_for_node: false,
        }
    }

    /// Whether a list is being read.
    pub(super) fn is_listing(&self) -> bool {
        self.listing.is_some()
    }

    /// Gives up the list that is being read; returns whether there was one.
    pub(super) fn break_off(&mut self) -> bool {
        self.listing.take().is_some()
    }

    /// Whether a first list was delivered completely.
    pub(super) fn is_complete(&self) -> bool {
        self.complete
    }

    /// When to go on without the own Node.
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

    /// Takes an item of a list.
    pub(super) async fn item(&mut self, raw: &RawValue, at: Instant) -> Result<(), WatchError> {
        self.in_items = true;
        let taken = self.object(raw, at).await;
        self.in_items = false;
        taken.map(drop)
    }

    /// A list begins: whatever was listed so far counts no more.
    pub(super) async fn begin_list(&mut self) -> Result<(), WatchError> {
        self.stats.kind(self.kind).count_list();
        self.listing = Some(HashSet::new());
        self.nameless = false;
        if !self.complete {
            // A list that was cut off and begins anew has delivered nothing that counts.
            self.known.clear();
            self.started = true;
            self.send(Instant::now(), Event::ListStarted(self.kind))
                .await?;
        }
        Ok(())
    }

    /// The list is at its end: what is not in it is gone. Of the own Node nothing may be known yet.
    pub(super) async fn end_list(&mut self, at: Instant) -> Result<(), WatchError> {
        let listed = self.listing.take().unwrap_or_default();
        if self.complete && self.nameless {
            // Nobody knows which of the known objects is there.
        } else if self.complete {
            let gone: Vec<ObjectName> = self.known.difference(&listed).cloned().collect();
            for name in gone {
                self.delete(name, at).await?;
            }
        } else if self.kind == Kind::Node && self.known.is_empty() && self.node_deadline.is_some() {
            self.waiting_for_node = true;
        } else {
            self.complete(at).await?;
        }
        Ok(())
    }

    async fn complete(&mut self, at: Instant) -> Result<(), WatchError> {
        self.complete = true;
        self.node_deadline = None;
        self.waiting_for_node = false;
        self.send(at, Event::ListComplete(self.kind)).await
    }

    /// Delivers an empty list, so that the other kinds are not held up.
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

    /// Takes an object of a list or a change; returns its version.
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

    /// Checks that an object that cannot be decoded, or is not there any more, is of the kind that
    /// was asked for.
    pub(super) fn check_raw(&self, raw: &RawValue) -> Result<(), WatchError> {
        match Declared::read(self.kind, &mut json(raw)) {
            Ok(declared) => self.check(&declared),
            // In a list it is a fault of this entry alone.
            Err(_) if self.in_items => Ok(()),
            Err(error) => Err(WatchError::Foreign(format!(
                "an event without an object: {error}"
            ))),
        }
    }

    fn check(&self, declared: &Declared) -> Result<(), WatchError> {
        match declared {
            Declared::AsAsked => Ok(()),
            Declared::Nothing if self.in_items => Ok(()),
            Declared::Nothing => Err(WatchError::Foreign(
                "an object that does not say what it is".to_owned(),
            )),
            Declared::Other(what) => Err(WatchError::Foreign(format!("a {what}"))),
        }
    }

    /// Of the nodes only the own one is asked for.
    fn check_node(&self, name: &ObjectName) -> Result<(), WatchError> {
        if self.kind == Kind::Node && name.name() != self.node_name {
            return Err(WatchError::Foreign(format!("another one, {name}")));
        }
        Ok(())
    }

    /// Delivers what became of an object; returns its version.
    pub(super) async fn take(
        &mut self,
        decoded: Decoded,
        at: Instant,
    ) -> Result<Option<String>, WatchError> {
        self.check(&decoded.declared)?;
        self.check_node(&decoded.name)?;
        self.stats.kind(self.kind).count_event();
        self.tell(&decoded.name, decoded.notices, at).await?;
        match decoded.object {
            Some(object) => {
                if let Some(listed) = &mut self.listing {
                    listed.insert(decoded.name.clone());
                }
                self.known.insert(decoded.name);
                self.apply(object, at).await?;
            }
            // It has become none of nftlet's business.
            None => self.delete(decoded.name, at).await?,
        }
        Ok(decoded.resource_version)
    }

    async fn apply(&mut self, object: Object, at: Instant) -> Result<(), WatchError> {
        self.send(at, Event::Apply(object)).await?;
        if self.waiting_for_node {
            self.complete(at).await?;
        }
        Ok(())
    }

    /// Takes the deletion of an object.
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
        self.told.remove(&name);
        if !self.known.remove(&name) {
            return Ok(());
        }
        let object = ObjectRef::new(self.kind, name);
        self.send(at, Event::Delete(object)).await
    }

    /// Tells of an object that cannot be decoded.
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
            "{who}: the object cannot be decoded: {error}; what was known of it stays in force until it is mended"
        );
        let notice = Notice {
            subject,
            reason: Reason::InvalidObject,
            message,
        };
        match name {
            Some(name) => self.tell(&name, vec![notice], at).await,
            None => {
                self.nameless = true;
                self.send(at, Event::Notice(notice)).await
            }
        }
    }

    /// Sends what is wrong with an object, unless that was said before.
    async fn tell(
        &mut self,
        name: &ObjectName,
        notices: Vec<Notice>,
        at: Instant,
    ) -> Result<(), WatchError> {
        if notices.is_empty() {
            self.told.remove(name);
            return Ok(());
        }
        if self.told.get(name) == Some(&notices) {
            return Ok(());
        }
        self.told.insert(name.clone(), notices.clone());
        for notice in notices {
            self.send(at, Event::Notice(notice)).await?;
        }
        Ok(())
    }

    /// Delivers an event.
    pub(super) async fn send(&mut self, at: Instant, event: Event) -> Result<(), WatchError> {
        self.sender
            .send(Delivery { at, event })
            .await
            .map_err(|_| WatchError::Closed)
    }

    /// The own Node has been missing for too long.
    pub(super) async fn go_on_without_node(&mut self) -> Result<(), WatchError> {
        self.node_deadline = None;
        let node_name = &self.node_name;
        let message = format!(
            "the Node \"{node_name}\" has been missing for {:?}; nftlet goes on without its addresses and zone (if the node has another name, give it with --hostname-override)",
            self.node_wait
        );
        let notice = Notice {
            subject: Subject::Object(ObjectRef::new(Kind::Node, ObjectName::new("", node_name))),
            reason: Reason::NodeMissing,
            message,
        };
        self.send(Instant::now(), Event::Notice(notice)).await?;
        self.complete_without().await
    }
}
