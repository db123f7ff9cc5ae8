use std::net::{IpAddr, SocketAddr};

use super::*;
use crate::netlink::message::AttrReader;

fn at(text: &str) -> SocketAddr {
    text.parse().unwrap()
}

fn flow(source: &str, destination: &str, replier: &str) -> Flow {
    Flow {
        id: 7,
        zone: 0,
        source: at(source),
        destination: at(destination),
        replier: at(replier),
    }
}

/// The attributes of a flow as the kernel dumps it.
fn dumped(flow: &Flow, protocol: u8, write_zone: impl Fn(&mut AttrWriter, bool)) -> Vec<u8> {
    let mut bytes = Vec::new();
    let start = begin_message(&mut bytes, kind(0), 0, 1, family_number(flow.family()));
    let mut writer = AttrWriter::new(&mut bytes);
    let ends = [
        (uapi::CTA_TUPLE_ORIG, flow.source, flow.destination),
        (uapi::CTA_TUPLE_REPLY, flow.replier, flow.source),
    ];
    for (kind, from, to) in ends {
        let tuple = writer.begin(kind);
        let addresses = writer.begin(uapi::CTA_TUPLE_IP);
        for (offset, end) in [(0, from), (1, to)] {
            match end.ip() {
                IpAddr::V4(a) => writer.bytes(uapi::CTA_IP_V4_SRC + offset, &a.octets()),
                IpAddr::V6(a) => writer.bytes(uapi::CTA_IP_V6_SRC + offset, &a.octets()),
            }
        }
        writer.end(addresses);
        let ports = writer.begin(uapi::CTA_TUPLE_PROTO);
        writer.bytes(uapi::CTA_PROTO_NUM, &[protocol]);
        writer.be16(uapi::CTA_PROTO_SRC_PORT, from.port());
        writer.be16(uapi::CTA_PROTO_DST_PORT, to.port());
        writer.end(ports);
        if kind == uapi::CTA_TUPLE_ORIG {
            write_zone(&mut writer, true);
        }
        writer.end(tuple);
    }
    write_zone(&mut writer, false);
    writer.be32(uapi::CTA_ID, flow.id);
    end_message(&mut bytes, start);
    bytes
}

fn read(bytes: &[u8]) -> Option<Flow> {
    Flow::read(Message { kind: 0, bytes })
}

#[test]
fn flows_are_read_in_both_families() {
    for flow in [
        flow("10.244.1.11:4000", "10.96.0.10:53", "10.244.1.12:5353"),
        flow("[fd00::1]:4000", "[fd00:10:96::a]:53", "[fd00::2]:5353"),
    ] {
        assert_eq!(read(&dumped(&flow, UDP, |_, _| ())), Some(flow));
        assert_eq!(read(&dumped(&flow, 6, |_, _| ())), None, "TCP");
    }
}

#[test]
fn the_zone_is_that_of_the_original_direction() {
    let flow = flow("10.0.0.1:1", "10.0.0.2:2", "10.0.0.3:3");
    let both = dumped(&flow, UDP, |writer, tuple| {
        if !tuple {
            writer.be16(uapi::CTA_ZONE, 9);
        }
    });
    let original = dumped(&flow, UDP, |writer, tuple| {
        if tuple {
            writer.be16(uapi::CTA_TUPLE_ZONE, 9);
        }
    });
    for bytes in [both, original] {
        assert_eq!(read(&bytes).map(|flow| flow.zone), Some(9));
    }
}

#[test]
fn truncated_flows_are_no_flows() {
    let flow = flow("10.0.0.1:1", "10.0.0.2:2", "10.0.0.3:3");
    let bytes = dumped(&flow, UDP, |_, _| ());
    for length in 0..bytes.len() {
        assert_eq!(read(&bytes[..length]), None, "{length} bytes");
    }
}

#[test]
fn filters_admit_by_original_destination() {
    let flow = flow("10.0.0.1:1", "10.96.0.10:53", "10.0.0.3:5353");
    for (filter, admitted) in [
        (FlowFilter::all(TableFamily::Ip), true),
        (FlowFilter::all(TableFamily::Ip6), false),
        (FlowFilter::to(at("10.96.0.10:53")), true),
        (FlowFilter::to(at("10.96.0.10:54")), false),
        (FlowFilter::to(at("10.0.0.3:5353")), false),
        (FlowFilter::to_port(TableFamily::Ip, 53), true),
        (FlowFilter::to_port(TableFamily::Ip, 5353), false),
        (FlowFilter::to_port(TableFamily::Ip6, 53), false),
    ] {
        assert_eq!(filter.admits(&flow), admitted, "{filter:?}");
    }
}

#[test]
fn the_kernel_is_never_asked_for_an_ipv6_address() {
    let flags = |filter: FlowFilter| {
        let bytes = filter.attributes();
        let filter = AttrReader::new(&bytes).nested(uapi::CTA_FILTER).unwrap();
        let flags = filter.get(uapi::CTA_FILTER_ORIG_FLAGS).unwrap();
        u32::from_ne_bytes(flags.try_into().unwrap())
    };
    let (udp, port) = (
        uapi::CTA_FILTER_F_PROTO_NUM,
        uapi::CTA_FILTER_F_PROTO_DST_PORT,
    );
    assert_eq!(flags(FlowFilter::all(TableFamily::Ip)), udp);
    assert_eq!(flags(FlowFilter::to_port(TableFamily::Ip, 53)), udp | port);
    assert_eq!(
        flags(FlowFilter::to(at("10.96.0.10:53"))),
        udp | port | uapi::CTA_FILTER_F_IP_DST
    );
    assert_eq!(flags(FlowFilter::to(at("[fd00::a]:53"))), udp | port);
}

#[test]
fn flows_are_named_for_people() {
    let mut flow = flow("10.0.0.1:1", "10.96.0.10:53", "10.0.0.3:5353");
    assert_eq!(
        flow.to_string(),
        "10.0.0.1:1 > 10.96.0.10:53 (answered by 10.0.0.3:5353)"
    );
    flow.replier = flow.destination;
    flow.zone = 4;
    assert_eq!(flow.to_string(), "10.0.0.1:1 > 10.96.0.10:53 in zone 4");
}

#[test]
fn connections_are_read_whatever_their_protocol() {
    let flow = flow("10.0.0.1:4000", "10.96.0.10:80", "10.0.0.3:8080");
    let read = |bytes: &[u8]| Tracked::read(Message { kind: 0, bytes });
    for protocol in [6, UDP, 132] {
        let tracked = read(&dumped(&flow, protocol, |_, _| ())).unwrap();
        assert_eq!(tracked.source, flow.source.ip());
        assert_eq!(tracked.replier, flow.replier.ip(), "behind the translation");
        assert_eq!((tracked.protocol, tracked.port), (protocol, Some(8080)));
    }
    let tracked = read(&dumped(&flow, 6, |_, _| ())).unwrap();
    assert_eq!(
        tracked.to_string(),
        "of IP protocol 6 from 10.0.0.1 to 10.0.0.3 port 8080"
    );
}

#[test]
fn connections_of_connections_are_left_to_these() {
    let flow = flow("10.0.0.1:4000", "10.0.0.3:20", "10.0.0.3:20");
    let bytes = dumped(&flow, 6, |writer, tuple| {
        if !tuple {
            writer.bytes(uapi::CTA_TUPLE_MASTER, &[]);
        }
    });
    assert_eq!(
        Tracked::read(Message {
            kind: 0,
            bytes: &bytes
        }),
        None
    );
}

#[test]
fn connections_of_a_client_are_filtered_and_have_a_state() {
    let flow = flow("10.0.0.1:4000", "10.96.0.10:80", "10.0.0.3:8080");
    let read = |bytes: &[u8]| OpenedConnection::read(Message { kind: 0, bytes }).unwrap();
    let tcp = read(&dumped(&flow, 6, |writer, tuple| {
        if !tuple {
            let info = writer.begin(uapi::CTA_PROTOINFO);
            let of_tcp = writer.begin(uapi::CTA_PROTOINFO_TCP);
            writer.bytes(uapi::CTA_PROTOINFO_STATE, &[3]);
            writer.end(of_tcp);
            writer.end(info);
        }
    }));
    assert_eq!(tcp.state, "ESTABLISHED");
    assert_eq!(
        (tcp.replier, tcp.replier_port),
        (flow.replier.ip(), Some(8080))
    );
    let udp = |status: u32| {
        let bytes = dumped(&flow, UDP, |writer, tuple| {
            if !tuple {
                writer.be32(uapi::CTA_STATUS, status);
            }
        });
        read(&bytes).state
    };
    assert_eq!((udp(0), udp(2)), ("UNREPLIED", "REPLIED"));
    let by = OpenedBy {
        source: flow.source.ip(),
        destination: flow.destination.ip(),
        protocol: 6,
        port: Some(80),
    };
    assert!(by.admits(&tcp));
    let any_port = OpenedBy { port: None, ..by };
    assert!(any_port.admits(&tcp));
    for other in [
        OpenedBy {
            source: flow.replier.ip(),
            ..by
        },
        OpenedBy {
            destination: flow.replier.ip(),
            ..by
        },
        OpenedBy {
            protocol: UDP,
            ..by
        },
        OpenedBy {
            port: Some(8080),
            ..by
        },
    ] {
        assert!(!other.admits(&tcp), "{other:?}");
    }
}
