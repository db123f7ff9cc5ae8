//! Families, names and comments.

use std::borrow::Borrow;
use std::fmt;
use std::sync::Arc;

use ring::digest;

/// The family of a table.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub enum TableFamily {
    /// IPv4.
    Ip,
    /// IPv6.
    Ip6,
}

impl TableFamily {
    /// Returns the keyword in nft: `ip` or `ip6`.
    pub fn keyword(self) -> &'static str {
        match self {
            TableFamily::Ip => "ip",
            TableFamily::Ip6 => "ip6",
        }
    }
}

/// The name of a chain, set or table. Cheap to clone.
#[derive(Clone, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub struct Name(Arc<str>);

impl Name {
    /// Returns the name as text.
    pub fn as_str(&self) -> &str {
        &self.0
    }
}

impl From<&str> for Name {
    fn from(name: &str) -> Self {
        Self(Arc::from(name))
    }
}

impl From<String> for Name {
    fn from(name: String) -> Self {
        Self(Arc::from(name))
    }
}

impl Borrow<str> for Name {
    fn borrow(&self) -> &str {
        &self.0
    }
}

impl fmt::Display for Name {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(&self.0)
    }
}

impl fmt::Debug for Name {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(&self.0)
    }
}

/// Longer names are cut; the kernel accepts 255 bytes.
const LONGEST: usize = 200;

/// Returns the name of a chain or set for the name of an object. A name that is too long, or has
/// characters that nft cannot read, ends in a digest; such characters occur in files only.
pub(crate) fn readable_name(whole: &str) -> Name {
    let plain = |c: char| c.is_ascii_alphanumeric() || matches!(c, '.' | '-' | '/');
    if whole.len() <= LONGEST && whole.chars().all(plain) {
        return Name::from(whole);
    }
    // Cannot collide with a plain name, which has no `_` and is shorter than a cut one.
    let readable = whole.chars().map(|c| if plain(c) { c } else { '_' });
    let start: String = readable.take(LONGEST).collect();
    Name::from(format!("{start}-{}", digest_of(whole)))
}

/// Returns a digest of a text as hexadecimal digits.
///
/// It has 128 bits of a cryptographic digest: a user who may write objects could find a collision
/// of 64 bits, and the kernel would refuse two sets of one name.
pub(crate) fn digest_of(text: &str) -> String {
    let digest = digest::digest(&digest::SHA256, text.as_bytes());
    let bytes = digest.as_ref().iter().take(16);
    bytes.map(|byte| format!("{byte:02x}")).collect()
}

/// Returns a text that fits into a comment: a quoted string in nft has no escapes, and the kernel
/// stores at most 127 bytes.
pub(super) fn clean_comment(text: &str) -> Arc<str> {
    const LONGEST: usize = 127;
    let cleaned: String = text
        .chars()
        .map(|c| {
            if c == '"' || c == '\\' || c.is_control() {
                '?'
            } else {
                c
            }
        })
        .collect();
    let end = (0..=LONGEST.min(cleaned.len()))
        .rev()
        .find(|end| cleaned.is_char_boundary(*end));
    Arc::from(cleaned.get(..end.unwrap_or_default()).unwrap_or_default())
}
