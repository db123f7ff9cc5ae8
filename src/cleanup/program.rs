//! Finds and runs the programs of iptables and ipvs.

use std::env;
use std::ffi::OsString;
use std::io::{self, Read, Write as _};
use std::path::{Path, PathBuf};
use std::process::{Child, Command, ExitStatus, Stdio};
use std::thread;
use std::time::{Duration, Instant};

use super::error::Error;
use crate::backoff::Backoff;

/// Searched in addition to PATH, which often lacks them.
const SBIN: [&str; 3] = ["/usr/local/sbin", "/usr/sbin", "/sbin"];
/// The longest time that a program may run.
const TIMEOUT: Duration = Duration::from_secs(60);
/// The pauses between checks whether a program has ended.
const SHORTEST_PAUSE: Duration = Duration::from_millis(1);
const LONGEST_PAUSE: Duration = Duration::from_millis(50);

/// Returns the path of a program.
pub(super) fn find(name: &str) -> Option<PathBuf> {
    first_file(&directories(env::var_os("PATH")), name)
}

/// Runs a program with `input` on its standard input, and returns what it prints. A status other
/// than 0 is an error.
pub(super) fn run(program: &Path, arguments: &[&str], input: &str) -> Result<String, Error> {
    run_within(TIMEOUT, program, arguments, input)
}

fn run_within(
    timeout: Duration,
    program: &Path,
    arguments: &[&str],
    input: &str,
) -> Result<String, Error> {
    let fault = |source| Error::Run {
        program: program.to_owned(),
        source,
    };
    let mut child = Command::new(program)
        .args(arguments)
        .stdin(Stdio::piped())
        .stdout(Stdio::piped())
        .stderr(Stdio::piped())
        .spawn()
        .map_err(fault)?;
    let (stdin, stdout, stderr) = (child.stdin.take(), child.stdout.take(), child.stderr.take());
    let (exited, stdout, stderr) = thread::scope(|scope| {
        scope.spawn(move || {
            // A program that does not read its input reports why on standard error.
            if let Some(mut stdin) = stdin {
                let _ = stdin.write_all(input.as_bytes());
            }
        });
        let stdout = scope.spawn(move || read_all(stdout));
        let stderr = scope.spawn(move || read_all(stderr));
        let exited = wait(&mut child, timeout);
        (
            exited,
            stdout.join().unwrap_or_default(),
            stderr.join().unwrap_or_default(),
        )
    });
    let Some(status) = exited.map_err(fault)? else {
        return Err(Error::Timeout {
            program: program.to_owned(),
            seconds: timeout.as_secs(),
        });
    };
    if status.success() {
        return Ok(String::from_utf8_lossy(&stdout).into_owned());
    }
    let message = String::from_utf8_lossy(&stderr);
    let lines: Vec<&str> = message.lines().map(str::trim).collect();
    Err(Error::Failed {
        program: program.to_owned(),
        status,
        message: lines.join(" "),
    })
}

fn read_all(pipe: Option<impl Read>) -> Vec<u8> {
    let mut all = Vec::new();
    if let Some(mut pipe) = pipe {
        // After an error, what was read before it is used.
        let _ = pipe.read_to_end(&mut all);
    }
    all
}

/// Waits for a program. Kills it after `timeout`, and then returns `None`.
fn wait(child: &mut Child, timeout: Duration) -> io::Result<Option<ExitStatus>> {
    let begun = Instant::now();
    let mut backoff = Backoff::new(SHORTEST_PAUSE, LONGEST_PAUSE);
    loop {
        if let Some(status) = child.try_wait()? {
            return Ok(Some(status));
        }
        if begun.elapsed() > timeout {
            child.kill()?;
            child.wait()?;
            return Ok(None);
        }
        thread::sleep(backoff.next());
    }
}

/// Returns the absolute directories of PATH, and those of system administration.
fn directories(path: Option<OsString>) -> Vec<PathBuf> {
    let listed = path.iter().flat_map(env::split_paths);
    let listed = listed.filter(|directory| directory.is_absolute());
    listed.chain(SBIN.iter().map(PathBuf::from)).collect()
}

fn first_file(directories: &[PathBuf], name: &str) -> Option<PathBuf> {
    let mut candidates = directories.iter().map(|directory| directory.join(name));
    candidates.find(|candidate| candidate.is_file())
}

#[cfg(test)]
mod tests {
    use std::fs;

    use super::*;

    #[test]
    fn programs_are_found_in_order_and_not_in_relative_directories() {
        let first = tempfile::tempdir().unwrap();
        let second = tempfile::tempdir().unwrap();
        for directory in [&first, &second] {
            fs::write(directory.path().join("iptables-save"), "").unwrap();
        }
        fs::create_dir(first.path().join("iptables-restore")).unwrap();
        let path = env::join_paths([Path::new("."), first.path(), second.path()]).unwrap();
        let directories = directories(Some(path));
        assert_eq!(directories[0], first.path());
        assert_eq!(
            first_file(&directories, "iptables-save"),
            Some(first.path().join("iptables-save"))
        );
        let restore = first_file(&directories[..2], "iptables-restore");
        assert_eq!(restore, None, "a directory is no program");
    }

    #[test]
    fn the_error_of_a_failed_program_has_its_path_and_message() {
        let error = run(Path::new("/bin/sh"), &["-s"], "echo bad line >&2; exit 3").unwrap_err();
        let message = error.to_string();
        assert!(message.contains("/bin/sh"), "{message}");
        assert!(message.contains("bad line"), "{message}");
        let missing = run(Path::new("/nowhere/iptables-save"), &[], "").unwrap_err();
        assert!(missing.to_string().contains("/nowhere/iptables-save"));
    }

    #[test]
    fn a_program_that_does_not_end_is_killed() {
        let sleep = run_within(
            Duration::from_millis(50),
            Path::new("/bin/sh"),
            &["-c", "exec sleep 3600"],
            "",
        );
        let error = sleep.unwrap_err();
        assert!(error.is_timeout(), "{error}");
        assert!(error.to_string().contains("/bin/sh did not end"), "{error}");
    }

    #[test]
    fn a_program_may_print_before_it_has_read_everything() {
        let much = "x".repeat(1 << 20);
        let output = run(Path::new("/bin/cat"), &[], &much).unwrap();
        assert_eq!(output.len(), much.len());
    }
}
