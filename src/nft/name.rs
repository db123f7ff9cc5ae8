//! Names made of those of objects.

use ring::digest;

use super::table::Name;

/// Names longer than this are cut; the kernel takes 255 bytes.
const LONGEST: usize = 200;

/// The name that holds the text of an object's name. One that would be too long, or that nft could
/// not read again, ends in a digest; the API server admits none of the latter, files may hold them.
pub(crate) fn readable_name(whole: &str) -> Name {
    let plain = |c: char| c.is_ascii_alphanumeric() || matches!(c, '.' | '-' | '/');
    if whole.len() <= LONGEST && whole.chars().all(plain) {
        return Name::from(whole);
    }
    // No plain name has the sign that replaces the others, and none is as long as one that was cut.
    let readable = whole.chars().map(|c| if plain(c) { c } else { '_' });
    let start: String = readable.take(LONGEST).collect();
    Name::from(format!("{start}-{}", digest_of(whole)))
}

/// Hexadecimal digits that stand for a text.
///
/// They are 128 bits of a cryptographic digest: whoever may write objects can find two texts with
/// the same 64 bits, and two sets of one name would be refused by the kernel for good.
pub(crate) fn digest_of(text: &str) -> String {
    let digest = digest::digest(&digest::SHA256, text.as_bytes());
    let bytes = digest.as_ref().iter().take(16);
    bytes.map(|byte| format!("{byte:02x}")).collect()
}
