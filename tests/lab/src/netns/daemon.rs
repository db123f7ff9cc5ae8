//! Programs that run inside a namespace until they are stopped.

use std::ffi::{OsStr, OsString};
use std::fs::File;
use std::io;
use std::os::unix::fs::FileExt as _;
use std::path::Path;
use std::process::{Child, ExitStatus, Stdio};
use std::thread;
use std::time::{Duration, Instant};

use nix::sys::signal::{Signal, kill};
use nix::unistd::Pid;

use super::Namespace;

/// The flag of nftlet's unix socket.
const SOCKET: &str = "--socket";
/// Programs that run nftlet as their last argument with its own ones.
const WRAPPERS: [&str; 3] = ["prlimit", "setpriv", "unshare"];

/// A running program; killed when the value goes away, and also when the thread that started it
/// ends, so that it does not outlive a test that is itself killed.
#[derive(Debug)]
pub struct Daemon {
    child: Child,
    log: File,
}

impl Daemon {
    /// Starts a program in a namespace, its output collected for [`Daemon::log`].
    #[track_caller]
    pub fn start<A: AsRef<OsStr>>(
        namespace: &Namespace,
        program: impl AsRef<OsStr>,
        arguments: impl IntoIterator<Item = A>,
    ) -> Self {
        let program = program.as_ref();
        Self::try_start(namespace, program, arguments, None)
            .unwrap_or_else(|error| panic!("cannot start {}: {error}", program.display()))
    }

    /// As [`Daemon::start`], with another standard error than the log.
    #[track_caller]
    pub fn start_with_stderr<A: AsRef<OsStr>>(
        namespace: &Namespace,
        program: impl AsRef<OsStr>,
        arguments: impl IntoIterator<Item = A>,
        stderr: impl Into<Stdio>,
    ) -> Self {
        let program = program.as_ref();
        Self::try_start(namespace, program, arguments, Some(stderr.into()))
            .unwrap_or_else(|error| panic!("cannot start {}: {error}", program.display()))
    }

    fn try_start<A: AsRef<OsStr>>(
        namespace: &Namespace,
        program: &OsStr,
        arguments: impl IntoIterator<Item = A>,
        stderr: Option<Stdio>,
    ) -> io::Result<Self> {
        let mut arguments: Vec<OsString> =
            arguments.into_iter().map(|it| it.as_ref().into()).collect();
        // Agents in several namespaces share the file system.
        let is_nftlet = |name: &OsStr| Path::new(name).file_name() == Some(OsStr::new("nftlet"));
        let is_wrapped = WRAPPERS.iter().any(|it| program == *it)
            && arguments.iter().any(|argument| is_nftlet(argument));
        let has_socket = arguments
            .iter()
            .any(|it| it.as_encoded_bytes().starts_with(SOCKET.as_bytes()));
        if (is_nftlet(program) || is_wrapped) && !has_socket {
            arguments.push(format!("{SOCKET}=").into());
        }
        let log = tempfile::tempfile()?;
        let stderr = match stderr {
            Some(stderr) => stderr,
            None => log.try_clone()?.into(),
        };
        let child = namespace
            .command("setpriv")
            .args(["--pdeathsig", "KILL", "--"])
            .arg(program)
            .args(arguments)
            .stdin(Stdio::null())
            .stdout(log.try_clone()?)
            .stderr(stderr)
            .spawn()?;
        Ok(Self { child, log })
    }

    /// The process id of the program.
    pub fn pid(&self) -> u32 {
        self.child.id()
    }

    /// Everything the program has written so far to standard output and standard error.
    pub fn log(&self) -> String {
        let mut bytes = vec![0; self.log.metadata().map_or(0, |m| m.len() as usize)];
        // Read at an offset: the program shares the file's own position.
        match self.log.read_exact_at(&mut bytes, 0) {
            Ok(()) => String::from_utf8_lossy(&bytes).into_owned(),
            Err(error) => format!("(the log cannot be read: {error})"),
        }
    }

    /// How the program ended, if it has.
    pub fn ended(&mut self) -> Option<ExitStatus> {
        self.child.try_wait().ok().flatten()
    }

    /// Sends a signal.
    #[track_caller]
    pub fn signal(&self, signal: Signal) {
        let pid = Pid::from_raw(self.child.id().cast_signed());
        kill(pid, signal).unwrap_or_else(|error| panic!("cannot send {signal} to {pid}: {error}"));
    }

    /// Asks the program to end with SIGTERM and returns how it did; `None` if it had to be killed.
    pub fn stop(&mut self, within: Duration) -> Option<ExitStatus> {
        if let Some(status) = self.ended() {
            return Some(status);
        }
        self.signal(Signal::SIGTERM);
        let deadline = Instant::now() + within;
        while Instant::now() < deadline {
            if let Some(status) = self.ended() {
                return Some(status);
            }
            thread::sleep(Duration::from_millis(5));
        }
        self.kill();
        None
    }

    /// Ends the program at once, as a crash would.
    pub fn kill(&mut self) {
        // Fails only where the program has ended, which is what is wanted.
        let _ = self.child.kill();
        let _ = self.child.wait();
    }
}

impl Drop for Daemon {
    fn drop(&mut self) {
        self.kill();
        if thread::panicking() {
            eprintln!("---- log of the program ----\n{}----", self.log());
        }
    }
}
