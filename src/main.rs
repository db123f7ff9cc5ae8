//! The `nftlet` binary; see the library's `app`.

use std::process::ExitCode;

fn main() -> ExitCode {
    nftlet::app::main()
}
