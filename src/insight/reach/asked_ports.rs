//! The ports that are asked about, as people write them.

use super::port_set::{ALL_PORTS, PROTOCOLS, PortSet, SetId};
use super::rows::{Cell, Reach, ReachError};
use crate::model::Protocol;

/// Ports that are asked about.
pub(super) struct AskedPorts {
    pub set: PortSet,
    id: SetId,
}

impl AskedPorts {
    pub fn new(reach: &Reach, set: PortSet) -> Self {
        let id = reach.decisions.id(set.clone());
        Self { set, id }
    }

    /// Returns a cell without other ports.
    pub fn only(&self, reach: &Reach, cell: Cell) -> Cell {
        let only = |set| reach.decisions.intersection(set, self.id);
        Cell {
            all: only(cell.all),
            some: only(cell.some),
        }
    }

    /// Returns the mark of a cell.
    pub fn mark(&self, reach: &Reach, cell: Option<Cell>) -> char {
        match cell.map(|cell| self.only(reach, cell)) {
            None => '-',
            Some(cell) if cell.all == self.id => '.',
            Some(cell) if cell.some == SetId::NONE => 'X',
            Some(_) => '~',
        }
    }
}

/// Reads `TCP/80`, `80/TCP`, `80`, `UDP/8000-8080`, `TCP`, `ICMP` or `all`.
///
/// # Errors
///
/// If it is none of these.
pub(crate) fn asked_ports(text: &str) -> Result<PortSet, ReachError> {
    let fault = || ReachError::Port(text.to_owned());
    let mut set = PortSet::default();
    if text.eq_ignore_ascii_case("all") {
        return Ok(PortSet::all());
    }
    if text.eq_ignore_ascii_case("icmp") {
        return Ok(PortSet::icmp());
    }
    let (protocol, range) = match text.split_once('/') {
        None => match protocol(text) {
            Some(protocol) => (protocol, ALL_PORTS),
            None => (Protocol::Tcp, range(text).ok_or_else(fault)?),
        },
        Some((one, other)) => {
            let (of, ports) = match protocol(one) {
                Some(of) => (Some(of), other),
                None => (protocol(other), one),
            };
            (of.ok_or_else(fault)?, range(ports).ok_or_else(fault)?)
        }
    };
    set.add(Some(protocol), Some(range));
    Ok(set)
}

fn protocol(name: &str) -> Option<Protocol> {
    let is_it = |it: &Protocol| name.eq_ignore_ascii_case(&it.to_string());
    PROTOCOLS.into_iter().find(is_it)
}

fn range(text: &str) -> Option<(u16, u16)> {
    let number = |text: &str| {
        let is_number = text.bytes().all(|byte| byte.is_ascii_digit());
        text.parse().ok().filter(|number| is_number && *number > 0)
    };
    let (first, last) = text.split_once('-').unwrap_or((text, text));
    let (first, last) = (number(first)?, number(last)?);
    (first <= last).then_some((first, last))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn ports_are_written_in_several_ways() {
        for (text, wanted) in [
            ("TCP/80", "TCP 80"),
            ("80/tcp", "TCP 80"),
            ("80", "TCP 80"),
            ("udp/8000-8080", "UDP 8000-8080"),
            ("SCTP", "SCTP 1-65535"),
            ("icmp", "ICMP"),
            ("all", "All Connections"),
        ] {
            assert_eq!(asked_ports(text).unwrap().to_string(), wanted, "{text}");
        }
        for text in [
            "",
            "0",
            "http",
            "TCP/",
            "TCP/0",
            "90-80",
            "TCP/70000",
            "+80",
        ] {
            assert_eq!(asked_ports(text), Err(ReachError::Port(text.to_owned())));
        }
    }
}
