//! The facts and the rules that nftlet's library makes of objects.

use nftlet::model::{Event, Kind};
use nftlet::nft::Ruleset;
use nftlet::services::{self, DetectLocal, ServiceSettings};
use nftlet::services::{Marks, Store};
use nftlet::source::Decoder;

use nftlet_lab::cluster::{POD_CIDRS, Put};
use nftlet_lab::fake_api::{CIDRS, NAMESPACES, NODES, PODS, POLICIES, SERVICES, SLICES};

/// Returns the events of complete lists of objects, as a source sends them when it starts.
pub fn events(objects: impl IntoIterator<Item = Put>) -> Vec<Event> {
    let mut decoder = Decoder::default();
    let mut events: Vec<Event> = Kind::ALL.map(Event::ListStarted).into();
    events.extend(
        objects
            .into_iter()
            .map(|object| event(&mut decoder, &object)),
    );
    events.extend(Kind::ALL.map(Event::ListComplete));
    events
}

/// Returns the event of a new or replaced object.
pub fn event(decoder: &mut Decoder, (path, object): &Put) -> Event {
    let decoded = decoder.decode(kind(path), object.to_string().as_bytes());
    let (object, notices) = decoded.expect("the objects fit their kinds");
    assert!(notices.is_empty(), "the objects are sound: {notices:?}");
    Event::Apply(object.expect("nftlet keeps all of the objects"))
}

/// Returns the kind of the objects of a collection.
pub fn kind(path: &str) -> Kind {
    match path {
        SERVICES => Kind::Service,
        SLICES => Kind::EndpointSlice,
        NODES => Kind::Node,
        CIDRS => Kind::ServiceCidr,
        PODS => Kind::Pod,
        NAMESPACES => Kind::Namespace,
        POLICIES => Kind::NetworkPolicy,
        path => panic!("nftlet does not read {path}"),
    }
}

/// Returns the settings of the nodes that are measured.
pub fn settings() -> ServiceSettings {
    let cidrs = POD_CIDRS.map(|cidr| cidr.parse().expect("a range"));
    ServiceSettings {
        detect_local: DetectLocal::ClusterCidr(cidrs.into()),
        ..ServiceSettings::default()
    }
}

/// Returns a store with the facts of events.
pub fn store(events: Vec<Event>) -> Store {
    let (mut store, mut marks) = (Store::default(), Marks::default());
    for event in events {
        store.apply(event, &mut marks);
    }
    store
}

/// Returns the rules for services that objects ask for, compiled from scratch.
pub fn ruleset(objects: impl IntoIterator<Item = Put>) -> Ruleset {
    wanted(&store(events(objects)))
}

/// Returns the rules for services that facts ask for, compiled from scratch.
pub fn wanted(store: &Store) -> Ruleset {
    services::wanted(store, &settings()).0
}
