//! The `nftlet` binary.

fn main() {}
