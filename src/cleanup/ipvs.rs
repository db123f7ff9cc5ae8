//! What kube-proxy's ipvs mode leaves outside of iptables: an interface with the addresses of all
//! services, virtual services at these addresses and at NodePorts, and ipsets.
//!
//! Virtual services of other programs, such as keepalived, stay: kube-proxy's have an address of
//! its interface, or a port in its ipsets of NodePorts. Both are read before they are removed.

use std::fs;
use std::io;
use std::net::{IpAddr, Ipv4Addr, SocketAddr};
use std::path::Path;
use std::thread;
use std::time::Duration;

use super::error::Error;
use super::owned::{self, IPVS_INTERFACE};
use super::program;
use super::report::{CleanupReport, counted};
use crate::host;
use crate::netlink::{self, IpSets, Links};

/// Lists the virtual services; exists while the kernel has ipvs.
const SERVICES: &str = "/proc/net/ip_vs";
/// The kernel frees rules some time after their removal, and an ipset is in use until then.
const BUSY_PAUSE: Duration = Duration::from_millis(50);
const BUSY_ATTEMPTS: usize = 40;

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
struct VirtualService {
    protocol: IpvsProtocol,
    at: SocketAddr,
}

type NodePort = (IpvsProtocol, u16);

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum IpvsProtocol {
    Tcp,
    Udp,
    Sctp,
}

impl IpvsProtocol {
    fn parse(name: &str) -> Option<Self> {
        match name {
            "TCP" => Some(Self::Tcp),
            "UDP" => Some(Self::Udp),
            "SCTP" => Some(Self::Sctp),
            _ => None,
        }
    }

    /// Returns the flag of ipvsadm for a virtual service of the protocol.
    fn flag(self) -> &'static str {
        match self {
            Self::Tcp => "--tcp-service",
            Self::Udp => "--udp-service",
            Self::Sctp => "--sctp-service",
        }
    }
}

/// Returns whether the ipvs mode left anything.
pub(super) fn is_present() -> Result<bool, Error> {
    if !addresses().is_empty() || nix::net::if_::if_nametoindex(IPVS_INTERFACE).is_ok() {
        return Ok(true);
    }
    let Some(mut sets) = IpSets::open()? else {
        return Ok(false);
    };
    Ok(sets.names()?.iter().any(|name| owned::is_ipset(name)))
}

pub(super) fn clean(report: &mut CleanupReport) {
    let mut sets = match IpSets::open() {
        Ok(sets) => sets,
        Err(error) => {
            report.fail(error);
            None
        }
    };
    let mut names = Vec::new();
    let mut node_ports = Vec::new();
    if let Some(sets) = &mut sets {
        match own_sets(sets) {
            Ok((found, ports)) => (names, node_ports) = (found, ports),
            Err(error) => report.fail(error),
        }
    }
    if let Err(error) = remove_services(&node_ports, report) {
        report.fail(error);
    }
    match Links::open().and_then(|mut links| links.delete(IPVS_INTERFACE)) {
        Ok(true) => report.removed(format!("interface {IPVS_INTERFACE}"), "network interfaces"),
        Ok(false) => {}
        Err(error) => report.fail(error),
    }
    if let Some(mut sets) = sets {
        for name in names {
            match destroy(&mut sets, &name) {
                Ok(true) => report.removed(name, "ipsets"),
                Ok(false) => {}
                Err(error) => report.fail(error),
            }
        }
    }
}

/// Returns the names of kube-proxy's ipsets, and the NodePorts in them.
fn own_sets(sets: &mut IpSets) -> Result<(Vec<String>, Vec<NodePort>), Error> {
    let mut names = sets.names()?;
    names.retain(|name| owned::is_ipset(name));
    let mut node_ports = Vec::new();
    for name in &names {
        if let Some(protocol) = owned::node_ports(name).and_then(IpvsProtocol::parse) {
            let ports = sets.ports(name)?;
            node_ports.extend(ports.into_iter().map(|port| (protocol, port)));
        }
    }
    Ok((names, node_ports))
}

fn destroy(sets: &mut IpSets, name: &str) -> Result<bool, netlink::Error> {
    for _ in 1..BUSY_ATTEMPTS {
        match sets.destroy(name) {
            Err(error) if error.errno() == Some(libc::EBUSY) => thread::sleep(BUSY_PAUSE),
            done => return done,
        }
    }
    sets.destroy(name)
}

fn remove_services(node_ports: &[NodePort], report: &mut CleanupReport) -> Result<(), Error> {
    let listed = match fs::read_to_string(SERVICES) {
        Ok(listed) => listed,
        // The kernel has no ipvs, or has not loaded it.
        Err(error) if error.kind() == io::ErrorKind::NotFound => return Ok(()),
        Err(source) => {
            let path = SERVICES.into();
            return Err(Error::Read { path, source });
        }
    };
    let own = own_services(&listed, &addresses(), node_ports);
    if own.is_empty() {
        return Ok(());
    }
    let services = own.len();
    let ipvsadm = program::find("ipvsadm").ok_or(Error::Ipvsadm { services })?;
    let removed = own
        .iter()
        .filter(|service| match remove(&ipvsadm, service) {
            Ok(()) => true,
            Err(error) => {
                report.fail(error);
                false
            }
        })
        .count();
    if removed > 0 {
        report.removed(counted(removed, "virtual service"), "ipvs");
    }
    Ok(())
}

fn remove(ipvsadm: &Path, service: &VirtualService) -> Result<(), Error> {
    let at = service.at.to_string();
    let arguments = ["--delete-service", service.protocol.flag(), &at];
    program::run(ipvsadm, &arguments, "").map(drop)
}

/// Returns the addresses of kube-proxy's interface.
fn addresses() -> Vec<IpAddr> {
    let attached = host::addresses::attached().into_iter();
    let own = attached.filter(|it| it.interface == IPVS_INTERFACE);
    own.map(|it| it.network.addr()).collect()
}

/// Returns kube-proxy's virtual services out of the list.
fn own_services(
    listed: &str,
    addresses: &[IpAddr],
    node_ports: &[NodePort],
) -> Vec<VirtualService> {
    let services = listed.lines().filter_map(parse);
    services
        .filter(|service| {
            addresses.contains(&service.at.ip())
                || node_ports.contains(&(service.protocol, service.at.port()))
        })
        .collect()
}

/// Parses a line such as `TCP  0A60000A:0050 rr` or `UDP  [fd00:...:000a]:0035 rr`, with all
/// numbers in base 16. Lines of real servers begin with an arrow.
fn parse(line: &str) -> Option<VirtualService> {
    let mut words = line.split_whitespace();
    let protocol = IpvsProtocol::parse(words.next()?)?;
    let (address, port) = words.next()?.rsplit_once(':')?;
    let port = u16::from_str_radix(port, 16).ok()?;
    let ip = match address.strip_prefix('[') {
        Some(v6) => IpAddr::V6(v6.strip_suffix(']')?.parse().ok()?),
        None => IpAddr::V4(Ipv4Addr::from(u32::from_str_radix(address, 16).ok()?)),
    };
    Some(VirtualService {
        protocol,
        at: SocketAddr::new(ip, port),
    })
}

#[cfg(test)]
mod tests {
    use super::*;

    const LISTED: &str = "\
IP Virtual Server version 1.2.1 (size=4096)
Prot LocalAddress:Port Scheduler Flags
  -> RemoteAddress:Port Forward Weight ActiveConn InActConn
TCP  0A60000A:0050 rr
  -> 0AF4010B:1F90      Masq    1      0          0
TCP  C0A80A01:7580 rr
UDP  [fd00:0010:0096:0000:0000:0000:0000:000a]:0035 rr
SCTP C0A80A01:7581 rr
TCP  C0A80A63:0050 wlc
FWM  00000001 wlc
";

    #[test]
    fn virtual_services_of_others_stay() {
        let addresses = ["10.96.0.10", "fd00:10:96::a"].map(|ip| ip.parse().unwrap());
        let node_ports = [(IpvsProtocol::Tcp, 30080), (IpvsProtocol::Sctp, 30081)];
        let own = own_services(LISTED, &addresses, &node_ports);
        let named: Vec<String> = own
            .iter()
            .map(|service| format!("{} {}", service.protocol.flag(), service.at))
            .collect();
        assert_eq!(
            named,
            [
                "--tcp-service 10.96.0.10:80",
                "--tcp-service 192.168.10.1:30080",
                "--udp-service [fd00:10:96::a]:53",
                "--sctp-service 192.168.10.1:30081",
            ]
        );
        assert!(own_services(LISTED, &[], &[]).is_empty());
    }
}
