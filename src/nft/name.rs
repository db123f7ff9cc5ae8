//! Names of chains and sets that contain names of objects.

use ring::digest;

use super::table::Name;

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
