//! The composition root: parses the command line, and connects source, engines, kernel and HTTP
//! ports.
//!
//! ```text
//!  main thread                          thread "io"
//!  ┌──────────────────────────┐ events ┌──────────────────────────────┐
//!  │ Controller ──> Nftables  │ <───── │ source (cluster or manifests)│
//!  │ blocks in sendmsg        │        │ HTTP ports, signals, Events  │
//!  └──────────────────────────┘        └──────────────────────────────┘
//! ```
//!
//! Writing to the kernel blocks, and neither decoding objects nor answering probes may wait for
//! it: each of these two threads has a single-threaded runtime. The other threads block on a
//! channel or a socket:
//!
//! | Thread | Work |
//! |---|---|
//! | `log` | Writes the log |
//! | `flows` | Deletes conntrack entries of UDP that lead to endpoints no longer used |
//! | `clients` | Deletes affinity of clients whose endpoint was removed |
//! | `cuts` | Cuts connections that no policy allows, with `--network-policy-strict` |
//! | `denied` | Logs denied packets, with `--log-denied` |
//! | `health-checks` | Publishes the health check ports of services |
//! | `monitor` | Receives the kernel's notifications about nftlet's tables |
//! | `routes` | Sends the host's routes to the controller |
//! | `audit` | Compares the tables with the wanted rules after missed notifications |
//! | `kube-proxy` | Removes kube-proxy's rules once nftlet's are in force |
//! | `settings` | Writes kernel parameters that exist only once rules are in force |
//!
//! `flows`, `clients`, `health-checks`, `kube-proxy` and `settings` work for services, and do not run
//! with `--services=off`.

mod agent;
mod ask;
mod collected;
mod configure;
mod descriptors;
mod diff;
mod dry_run;
mod error;
mod follow;
mod followers;
mod io_thread;
mod kube_proxy_cleanup;
mod live;
mod metrics;
mod monitor;
mod objects;
mod questions;
mod reach;
mod routes;
mod socket;
mod sysctls;

use std::io::{self, IsTerminal, Write};
use std::process::ExitCode;

use tokio::runtime;

use self::error::{Error, system};
use self::objects::{connect, load, manifests};
use crate::logging::LogQueue;
use crate::settings::{self, Cleanup, Command, CommandLine};

/// The number of events that may wait between the source and the controller.
const QUEUE: usize = 4096;

/// Runs the command line of this process, and writes an error to standard error.
///
/// Exits with 2 for an invalid command line or configuration, and with 1 for every other error.
pub fn main() -> ExitCode {
    let log = match LogQueue::start(io::stderr()) {
        Ok(log) => log,
        Err(error) => {
            let error = system("the thread that writes the log")(error);
            let _ = writeln!(io::stderr(), "nftlet: {error}");
            return error.exit_code();
        }
    };
    log.take_panics();
    let code = match CommandLine::parse(std::env::args_os()) {
        Ok(line) => exit_code(run(line, &log), &log),
        Err(error) if error.use_stderr() => {
            let error = settings::one_line(&error);
            log.add(format!("{error} (nftlet --help shows all flags)\n").as_bytes());
            ExitCode::from(2)
        }
        // --help or --version.
        Err(requested) => {
            let printed = print(|out| help(&requested, out));
            exit_code(printed.map(|()| ExitCode::SUCCESS), &log)
        }
    };
    log.flush();
    code
}

/// Runs one of nftlet's modes. The rules stay in the kernel when it returns.
fn run(mut line: CommandLine, log: &LogQueue) -> Result<ExitCode, Error> {
    let command = line.command.take();
    match &command {
        Some(Command::Completion { shell }) => {
            return print(|mut out| settings::print_completion(*shell, &mut out))
                .map(|()| ExitCode::SUCCESS);
        }
        Some(Command::Man) => {
            return print(|mut out| settings::print_man(&mut out)).map(|()| ExitCode::SUCCESS);
        }
        Some(_) | None => {}
    }
    let cleanup = line.settings.cleanup;
    if let Some(cleanup) = cleanup.filter(|scope| *scope != Cleanup::Nothing) {
        // An invalid configuration must not keep rules from being removed.
        configure::start_logging(&line.settings, log);
        return kube_proxy_cleanup::clean(cleanup).map(|()| ExitCode::SUCCESS);
    }
    let file = configure::read(&mut line)?;
    let settings = &line.settings;
    settings.check()?;
    configure::start_logging(settings, log);
    configure::warn_of_ignored(&line, file.as_ref());
    let node_name = settings.node_name(std::env::var("NODE_NAME").ok(), &host_name());
    let service_settings = objects::service_settings(settings)?;
    settings.is_closed()?;
    if let Some(path) = &settings.write_config_to {
        return configure::write(settings, path).map(|()| ExitCode::SUCCESS);
    }
    if settings.init_only {
        sysctls::initialise(settings);
        return Ok(ExitCode::SUCCESS);
    }
    if let Some(command) = &command {
        return questions::answer(command, settings, &node_name, &service_settings);
    }
    let descriptors = descriptors::reserve()?;
    if settings.dry_run {
        return dry_run::run(settings, &node_name, &service_settings).map(|()| ExitCode::SUCCESS);
    }
    agent::run(agent::Start {
        line: &line,
        file,
        node_name,
        service_settings,
        descriptors,
        log,
    })
    .map(|()| ExitCode::SUCCESS)
}

/// Writes the error of a failed run to the log, and returns the exit code.
fn exit_code(result: Result<ExitCode, Error>, log: &LogQueue) -> ExitCode {
    match result {
        Ok(code) => code,
        Err(error) => {
            log.add(format!("nftlet: {error}\n").as_bytes());
            error.exit_code()
        }
    }
}

/// Writes the help or the version, with colours on a terminal.
fn help(requested: &clap::Error, out: &mut dyn Write) -> io::Result<()> {
    let text = requested.render();
    if io::stdout().is_terminal() {
        write!(out, "{}", text.ansi())
    } else {
        write!(out, "{text}")
    }
}

/// Writes to standard output.
fn print(write: impl FnOnce(&mut dyn Write) -> io::Result<()>) -> Result<(), Error> {
    let mut out = io::BufWriter::new(io::stdout().lock());
    write(&mut out)
        .and_then(|()| out.flush())
        .or_else(|error| match error.kind() {
            // `nftlet --dry-run | head` closes the pipe early.
            io::ErrorKind::BrokenPipe => Ok(()),
            _ => Err(Error::Print(error)),
        })
}

fn single_threaded() -> Result<runtime::Runtime, Error> {
    runtime::Builder::new_current_thread()
        .enable_all()
        .build()
        .map_err(system("a runtime"))
}

fn host_name() -> String {
    let uname = rustix::system::uname();
    uname.nodename().to_string_lossy().into_owned()
}
