//! Keys and data of set elements, in the byte form that the kernel compares.

use std::fmt;
use std::net::{IpAddr, Ipv4Addr, Ipv6Addr};

use smallvec::SmallVec;

/// The type of one field of a concatenated key or value.
///
/// In a concatenation every field starts at a multiple of four bytes.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub enum FieldType {
    /// `ipv4_addr`, four bytes in network order.
    Ipv4Addr,
    /// `ipv6_addr`, sixteen bytes in network order.
    Ipv6Addr,
    /// `inet_proto`, one byte.
    InetProto,
    /// `inet_service`, a port, two bytes in network order.
    InetService,
    /// `classid`, a traffic class of two 16-bit numbers, four bytes in host order.
    ClassId,
    /// `ifname`, sixteen bytes padded with zeros.
    IfName,
    /// `icmpv6_type`, one byte.
    Icmp6Type,
}

impl FieldType {
    /// Returns the length of the value in bytes.
    pub fn bytes(self) -> usize {
        match self {
            FieldType::Ipv4Addr | FieldType::ClassId => 4,
            FieldType::Ipv6Addr | FieldType::IfName => 16,
            FieldType::InetProto | FieldType::Icmp6Type => 1,
            FieldType::InetService => 2,
        }
    }

    /// Returns the length of the value in a concatenation, in bytes.
    pub fn padded_len(self) -> usize {
        self.bytes().next_multiple_of(4)
    }

    /// Returns the name of the type in nft.
    pub fn name(self) -> &'static str {
        match self {
            FieldType::Ipv4Addr => "ipv4_addr",
            FieldType::Ipv6Addr => "ipv6_addr",
            FieldType::InetProto => "inet_proto",
            FieldType::InetService => "inet_service",
            FieldType::ClassId => "classid",
            FieldType::IfName => "ifname",
            FieldType::Icmp6Type => "icmpv6_type",
        }
    }

    /// Returns whether the value is in host byte order.
    pub(crate) fn host_order(self) -> bool {
        matches!(self, FieldType::ClassId | FieldType::IfName)
    }
}

/// The key of a set element: a concatenation of fields, each padded to four bytes.
///
/// A key of a single field is not padded. The declaration of the set has the types of the fields.
#[derive(Clone, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub struct Key(SmallVec<[u8; 32]>);

/// The value of a map element, in the same form as a [`Key`].
pub type Data = Key;

impl Key {
    /// Starts a key.
    pub fn build() -> KeyBuilder {
        KeyBuilder {
            bytes: SmallVec::new(),
            last_field: 0,
        }
    }

    /// Returns a key of one address.
    pub fn address(address: IpAddr) -> Self {
        Self::build().address(address).finish()
    }

    /// Returns the key with these bytes, as read from the kernel.
    pub fn from_bytes(bytes: &[u8]) -> Self {
        Self(SmallVec::from_slice(bytes))
    }

    /// Returns the bytes for the kernel.
    pub fn as_bytes(&self) -> &[u8] {
        &self.0
    }

    /// Returns the printed fields, given their types; fewer if the key is too short for all of
    /// them.
    pub fn fields<'a>(&'a self, types: &'a [FieldType]) -> KeyFields<'a> {
        KeyFields {
            bytes: &self.0,
            types,
        }
    }
}

impl fmt::Debug for Key {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        for byte in &self.0 {
            write!(f, "{byte:02x}")?;
        }
        Ok(())
    }
}

/// Builds a [`Key`] from its fields.
#[derive(Clone, Debug)]
pub struct KeyBuilder {
    bytes: SmallVec<[u8; 32]>,
    last_field: usize,
}

impl KeyBuilder {
    fn field(mut self, value: &[u8]) -> Self {
        self.bytes.resize(self.bytes.len().next_multiple_of(4), 0);
        self.last_field = self.bytes.len();
        self.bytes.extend_from_slice(value);
        self
    }

    /// Appends an address of either family.
    pub fn address(self, address: IpAddr) -> Self {
        match address {
            IpAddr::V4(v4) => self.field(&v4.octets()),
            IpAddr::V6(v6) => self.field(&v6.octets()),
        }
    }

    /// Appends an IP protocol number.
    pub fn protocol(self, number: u8) -> Self {
        self.field(&[number])
    }

    /// Appends the type of an ICMPv6 message.
    pub fn icmp6_type(self, number: u8) -> Self {
        self.field(&[number])
    }

    /// Appends a port.
    pub fn port(self, port: u16) -> Self {
        self.field(&port.to_be_bytes())
    }

    /// Appends a number in host order, such as a traffic class or a mark.
    pub fn number(self, number: u32) -> Self {
        self.field(&number.to_ne_bytes())
    }

    /// Appends an interface name, cut after 15 bytes, the maximum in the kernel.
    pub fn interface(self, name: &str) -> Self {
        let mut padded = [0u8; 16];
        for (to, from) in padded.iter_mut().take(15).zip(name.bytes()) {
            *to = from;
        }
        self.field(&padded)
    }

    /// Appends a field given by its bytes.
    pub fn bytes(self, value: &[u8]) -> Self {
        self.field(value)
    }

    /// Returns the key.
    pub fn finish(mut self) -> Key {
        if self.last_field > 0 {
            self.bytes.resize(self.bytes.len().next_multiple_of(4), 0);
        }
        Key(self.bytes)
    }
}

/// An iterator over the printed fields of a [`Key`].
pub struct KeyFields<'a> {
    bytes: &'a [u8],
    types: &'a [FieldType],
}

impl Iterator for KeyFields<'_> {
    type Item = String;

    fn next(&mut self) -> Option<String> {
        let (field, rest) = self.types.split_first()?;
        self.types = rest;
        let value = self.bytes.get(..field.bytes())?;
        self.bytes = self.bytes.get(field.padded_len()..).unwrap_or_default();
        Some(print_field(*field, value))
    }
}

fn print_field(field: FieldType, value: &[u8]) -> String {
    match field {
        FieldType::Ipv4Addr => <[u8; 4]>::try_from(value)
            .map(|octets| Ipv4Addr::from(octets).to_string())
            .unwrap_or_default(),
        FieldType::Ipv6Addr => <[u8; 16]>::try_from(value)
            .map(|octets| Ipv6Addr::from(octets).to_string())
            .unwrap_or_default(),
        FieldType::InetProto => protocol(value.first().copied().unwrap_or_default()),
        FieldType::InetService => <[u8; 2]>::try_from(value)
            .map(|bytes| u16::from_be_bytes(bytes).to_string())
            .unwrap_or_default(),
        FieldType::ClassId => <[u8; 4]>::try_from(value)
            .map(|bytes| class_id(u32::from_ne_bytes(bytes)))
            .unwrap_or_default(),
        FieldType::IfName => {
            let end = value.iter().position(|b| *b == 0).unwrap_or(value.len());
            let name = value.get(..end).unwrap_or_default();
            format!("{:?}", String::from_utf8_lossy(name))
        }
        FieldType::Icmp6Type => icmp6_type(value.first().copied().unwrap_or_default()),
    }
}

/// Returns a traffic class as nft prints it: two hexadecimal numbers, or `none` for 0.
pub(super) fn class_id(class: u32) -> String {
    match class {
        0 => "none".into(),
        _ => format!("{:x}:{:x}", class >> 16, class & 0xffff),
    }
}

/// Returns the name in nft of an IP protocol that nftlet uses, else its number.
pub(super) fn protocol(number: u8) -> String {
    match number {
        1 => "icmp".into(),
        6 => "tcp".into(),
        17 => "udp".into(),
        58 => "ipv6-icmp".into(),
        132 => "sctp".into(),
        other => other.to_string(),
    }
}

/// Returns the name in nft of an ICMPv6 type, else its number.
fn icmp6_type(number: u8) -> String {
    let name = match number {
        1 => "destination-unreachable",
        2 => "packet-too-big",
        3 => "time-exceeded",
        4 => "parameter-problem",
        128 => "echo-request",
        129 => "echo-reply",
        130 => "mld-listener-query",
        131 => "mld-listener-report",
        132 => "mld-listener-done",
        133 => "nd-router-solicit",
        134 => "nd-router-advert",
        135 => "nd-neighbor-solicit",
        136 => "nd-neighbor-advert",
        137 => "nd-redirect",
        143 => "mld2-listener-report",
        other => return other.to_string(),
    };
    name.into()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn fields_are_aligned_to_four_bytes() {
        let key = Key::build()
            .address("10.96.0.5".parse().unwrap())
            .protocol(6)
            .port(80)
            .number(3)
            .finish();
        let index = 3u32.to_ne_bytes();
        assert_eq!(
            key.as_bytes(),
            [[10, 96, 0, 5], [6, 0, 0, 0], [0, 80, 0, 0], index].concat()
        );
        let types = [
            FieldType::Ipv4Addr,
            FieldType::InetProto,
            FieldType::InetService,
            FieldType::ClassId,
        ];
        let fields: Vec<_> = key.fields(&types).collect();
        assert_eq!(fields, ["10.96.0.5", "tcp", "80", "0:3"]);
    }

    #[test]
    fn a_single_field_is_not_padded() {
        assert_eq!(Key::build().protocol(17).finish().as_bytes(), [17]);
        assert_eq!(Key::build().port(53).finish().as_bytes(), [0, 53]);
    }

    #[test]
    fn a_trailing_short_field_of_a_concatenation_is_padded() {
        let key = Key::build().protocol(17).port(53).finish();
        assert_eq!(key.as_bytes(), [17, 0, 0, 0, 0, 53, 0, 0]);
    }

    #[test]
    fn printing_a_short_key_stops_early() {
        let types = [FieldType::Ipv4Addr, FieldType::InetService];
        assert_eq!(Key::from_bytes(&[10, 0]).fields(&types).count(), 0);
    }
}
