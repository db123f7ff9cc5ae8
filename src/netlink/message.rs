//! Framing of netlink messages and their attributes.
//!
//! An attribute is a length, a type and a value, padded to four bytes. The value of a nested attribute
//! is a list of attributes. Reading works on slices, so that no input leads to an access out of
//! bounds.

use crate::nft::TableFamily;

/// Marks an attribute as holding others.
const NESTED: u16 = 0x8000;
/// The bits of the type field that are the type.
const TYPE_MASK: u16 = 0x3fff;
const HEADER: usize = 4;

/// Appends attributes to a buffer.
pub(crate) struct AttrWriter<'a> {
    buffer: &'a mut Vec<u8>,
}

/// The offset at which a nested attribute begins.
#[must_use]
pub(crate) struct Nest(usize);

impl<'a> AttrWriter<'a> {
    /// Appends to a buffer, whose length must be a multiple of four.
    pub(crate) fn new(buffer: &'a mut Vec<u8>) -> Self {
        Self { buffer }
    }

    /// Returns the length of the buffer.
    pub(crate) fn len(&self) -> usize {
        self.buffer.len()
    }

    /// Appends an attribute. The value must be shorter than 64 KiB, as are all names, keys and
    /// comments.
    pub(crate) fn bytes(&mut self, kind: u16, value: &[u8]) {
        let length = (HEADER + value.len()) as u16;
        self.buffer.extend_from_slice(&length.to_ne_bytes());
        self.buffer.extend_from_slice(&kind.to_ne_bytes());
        self.buffer.extend_from_slice(value);
        self.pad();
    }

    /// Appends a 16-bit number in network byte order.
    pub(crate) fn be16(&mut self, kind: u16, value: u16) {
        self.bytes(kind, &value.to_be_bytes());
    }

    /// Appends a 32-bit number in network byte order.
    pub(crate) fn be32(&mut self, kind: u16, value: u32) {
        self.bytes(kind, &value.to_be_bytes());
    }

    /// Appends a zero-terminated string.
    pub(crate) fn string(&mut self, kind: u16, value: &str) {
        let length = (HEADER + value.len() + 1) as u16;
        self.buffer.extend_from_slice(&length.to_ne_bytes());
        self.buffer.extend_from_slice(&kind.to_ne_bytes());
        self.buffer.extend_from_slice(value.as_bytes());
        self.buffer.push(0);
        self.pad();
    }

    /// Begins a nested attribute.
    pub(crate) fn begin(&mut self, kind: u16) -> Nest {
        let nest = Nest(self.buffer.len());
        self.buffer.extend_from_slice(&[0, 0]);
        self.buffer
            .extend_from_slice(&(kind | NESTED).to_ne_bytes());
        nest
    }

    /// Ends a nested attribute.
    pub(crate) fn end(&mut self, nest: Nest) {
        let length = (self.buffer.len() - nest.0) as u16;
        if let Some(field) = self.buffer.get_mut(nest.0..nest.0 + 2) {
            field.copy_from_slice(&length.to_ne_bytes());
        }
    }

    fn pad(&mut self) {
        self.buffer
            .resize(self.buffer.len().next_multiple_of(HEADER), 0);
    }
}

/// Iterates over attributes. A truncated one ends the iteration.
#[derive(Clone, Copy)]
pub(crate) struct AttrReader<'a>(&'a [u8]);

impl<'a> AttrReader<'a> {
    /// Reads the attributes in the value of a nested attribute or in a message.
    pub(crate) fn new(bytes: &'a [u8]) -> Self {
        Self(bytes)
    }

    /// Returns the value of the first attribute of a type.
    pub(crate) fn get(self, kind: u16) -> Option<&'a [u8]> {
        self.into_iter()
            .find_map(|(k, value)| (k == kind).then_some(value))
    }

    /// Returns the attributes nested in the first attribute of a type.
    pub(crate) fn nested(self, kind: u16) -> Option<AttrReader<'a>> {
        self.get(kind).map(AttrReader)
    }

    /// Returns the first attribute of a type as a 16-bit number in network byte order.
    pub(crate) fn be16(self, kind: u16) -> Option<u16> {
        Some(u16::from_be_bytes(self.get(kind)?.try_into().ok()?))
    }

    /// Returns the first attribute of a type as a 32-bit number in network byte order.
    pub(crate) fn be32(self, kind: u16) -> Option<u32> {
        Some(u32::from_be_bytes(self.get(kind)?.try_into().ok()?))
    }

    /// Returns the first attribute of a type as a 64-bit number in network byte order.
    pub(crate) fn be64(self, kind: u16) -> Option<u64> {
        Some(u64::from_be_bytes(self.get(kind)?.try_into().ok()?))
    }

    /// Returns the first attribute of a type as text without its terminating zero.
    pub(crate) fn string(self, kind: u16) -> Option<&'a str> {
        let value = self.get(kind)?;
        std::str::from_utf8(value.strip_suffix(&[0]).unwrap_or(value)).ok()
    }
}

impl<'a> Iterator for AttrReader<'a> {
    type Item = (u16, &'a [u8]);

    fn next(&mut self) -> Option<Self::Item> {
        let (header, _) = self.0.split_first_chunk::<HEADER>()?;
        let [l0, l1, k0, k1] = *header;
        let length = usize::from(u16::from_ne_bytes([l0, l1]));
        let kind = u16::from_ne_bytes([k0, k1]) & TYPE_MASK;
        let value = self.0.get(HEADER..length)?;
        self.0 = self
            .0
            .get(length.next_multiple_of(HEADER)..)
            .unwrap_or_default();
        Some((kind, value))
    }
}

/// Appends the netlink and netfilter headers of a message and returns its offset.
pub(crate) fn begin_message(
    bytes: &mut Vec<u8>,
    kind: u16,
    flags: u16,
    seq: u32,
    family: u8,
) -> usize {
    let start = bytes.len();
    let flags = flags | libc::NLM_F_REQUEST as u16;
    bytes.extend_from_slice(&[0; 4]);
    bytes.extend_from_slice(&kind.to_ne_bytes());
    bytes.extend_from_slice(&flags.to_ne_bytes());
    bytes.extend_from_slice(&seq.to_ne_bytes());
    bytes.extend_from_slice(&[0; 4]);
    bytes.extend_from_slice(&[family, 0, 0, 0]);
    start
}

/// Sets `res_id` of the message at an offset.
pub(crate) fn set_resource(bytes: &mut [u8], start: usize, resource: u16) {
    if let Some(field) = bytes.get_mut(start + 18..start + 20) {
        field.copy_from_slice(&resource.to_be_bytes());
    }
}

/// Sets the length of the message that begins at an offset and ends with the buffer.
pub(crate) fn end_message(bytes: &mut [u8], start: usize) {
    if let Some(message) = bytes.get_mut(start..) {
        set_length(message);
    }
}

/// Writes the length of a message into its header.
pub(crate) fn set_length(message: &mut [u8]) {
    let length = (message.len() as u32).to_ne_bytes();
    if let Some(field) = message.get_mut(..4) {
        field.copy_from_slice(&length);
    }
}

/// Returns the kernel's number of a family.
pub(crate) fn family_number(family: TableFamily) -> u8 {
    match family {
        TableFamily::Ip => libc::NFPROTO_IPV4 as u8,
        TableFamily::Ip6 => libc::NFPROTO_IPV6 as u8,
    }
}

/// Returns the family with a number of the kernel.
pub(crate) fn family(number: u8) -> Option<TableFamily> {
    match i32::from(number) {
        libc::NFPROTO_IPV4 => Some(TableFamily::Ip),
        libc::NFPROTO_IPV6 => Some(TableFamily::Ip6),
        _ => None,
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn what_is_written_is_read() {
        let mut buffer = Vec::new();
        let mut writer = AttrWriter::new(&mut buffer);
        writer.string(1, "abc");
        let nest = writer.begin(2);
        writer.be32(3, 7);
        writer.bytes(4, &[1, 2, 3, 4, 5]);
        writer.end(nest);
        let reader = AttrReader::new(&buffer);
        assert_eq!(reader.string(1), Some("abc"));
        let nested = reader.nested(2).unwrap();
        assert_eq!(nested.be32(3), Some(7));
        assert_eq!(nested.get(4), Some(&[1u8, 2, 3, 4, 5][..]));
        assert_eq!(nested.be64(3), None);
        assert_eq!(reader.count(), 2);
    }

    #[test]
    fn truncated_input_ends_the_iteration() {
        let mut buffer = Vec::new();
        AttrWriter::new(&mut buffer).string(1, "abcdefgh");
        for length in 0..buffer.len() - 3 {
            assert_eq!(
                AttrReader::new(&buffer[..length]).count(),
                0,
                "{length} bytes"
            );
        }
        assert_eq!(
            AttrReader::new(&[3, 0, 1, 0]).count(),
            0,
            "length below header"
        );
        assert_eq!(AttrReader::new(&[0, 0, 0, 0]).count(), 0, "length zero");
    }
}
