//! The `nftlet` binary; [`nftlet::app`] is its composition root.

use std::process::ExitCode;

fn main() -> ExitCode {
    nftlet::app::main()
}
