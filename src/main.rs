//! The `nftlet` binary: parses the command line and hands over to the library.

use std::process::ExitCode;

use clap::Parser;
use nftlet::{app, cli};

fn main() -> ExitCode {
    match app::run(&cli::Args::parse()) {
        Ok(()) => ExitCode::SUCCESS,
        Err(error) => {
            eprintln!("nftlet: {error}");
            ExitCode::FAILURE
        }
    }
}
