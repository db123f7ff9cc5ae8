//! Files that take nothing.

use std::fs::File;
use std::io::{PipeReader, PipeWriter, Write as _, pipe};

use nix::fcntl::{FcntlArg, OFlag, fcntl};

/// A full pipe: writes to it block until something is read.
pub fn full_pipe() -> (PipeReader, PipeWriter) {
    let (reader, mut writer) = pipe().expect("a pipe");
    fcntl(&writer, FcntlArg::F_SETFL(OFlag::O_NONBLOCK)).expect("a flag");
    while writer.write(b"\n").is_ok() {}
    fcntl(&writer, FcntlArg::F_SETFL(OFlag::empty())).expect("a flag");
    (reader, writer)
}

/// A pipe whose reader was closed.
pub fn broken_pipe() -> PipeWriter {
    pipe().expect("a pipe").1
}

/// A file on a full disk.
pub fn full_disk() -> File {
    let file = File::options().write(true).open("/dev/full");
    file.expect("/dev/full")
}
