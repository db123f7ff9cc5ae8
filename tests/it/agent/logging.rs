//! What nftlet says, and where it cannot say it: full disks, pipes that nothing reads, pipes
//! without a reader.

use std::io::{BufRead as _, BufReader, Read as _};
use std::os::unix::process::CommandExt as _;
use std::process::{Child, Command, ExitStatus, Output, Stdio};
use std::{panic, thread};

use crate::support::agent::{NFTLET, Node, PATIENCE, get, metric, said, small_cluster};
use crate::support::manifests::Manifests;
use crate::support::objects::slice;
use crate::support::stuck::{broken_pipe, full_disk, full_pipe};
use nftlet::logging::LogQueue;
use nftlet_lab::fake_api::SLICES;
use nftlet_lab::netns::{Daemon, require_net_admin, wait_for};
use nix::sys::signal::Signal;

const METRICS: &str = "127.0.0.1:10249";

/// nftlet with nothing in its environment that names a cluster.
fn command<A: AsRef<str>>(arguments: &[A]) -> Command {
    let mut command = Command::new(NFTLET);
    command
        .args(arguments.iter().map(AsRef::as_ref))
        .env_remove("KUBECONFIG")
        .env_remove("KUBERNETES_SERVICE_HOST")
        .env_remove("NODE_NAME")
        .stdin(Stdio::null());
    command
}

fn output(command: &mut Command) -> Output {
    command.output().expect("nftlet can be started")
}

/// How a program ends that must not wait for a reader that never comes.
#[track_caller]
fn ends(mut child: Child) -> ExitStatus {
    let end = wait_for("the end of the program", PATIENCE, || {
        child.try_wait().ok().flatten()
    });
    drop(child);
    end
}

/// Manifests with a fault that is told, and the arguments to print their rules.
fn dry_run(manifests: &Manifests) -> Vec<String> {
    let path = manifests.path().to_str().expect("UTF-8").to_owned();
    let mut arguments = vec!["--dry-run".to_owned(), "--manifests".to_owned(), path];
    arguments.extend(["--hostname-override".to_owned(), "node-2".to_owned()]);
    arguments
}

#[test]
fn where_standard_error_takes_nothing_the_work_is_done_all_the_same() {
    let manifests = Manifests::new();
    let arguments = dry_run(&manifests);
    let heard = output(&mut command(&arguments));
    assert!(heard.status.success());
    assert!(said(&heard).contains("hold no such Node"));
    let rules = heard.stdout;
    let (_reader, stuck) = full_pipe();
    for stderr in [
        Stdio::from(full_disk()),
        Stdio::from(broken_pipe()),
        Stdio::from(stuck),
    ] {
        let mut child = command(&arguments)
            .stdout(Stdio::piped())
            .stderr(stderr)
            .spawn()
            .expect("nftlet can be started");
        let mut printed = Vec::new();
        let stdout = child.stdout.as_mut().expect("a pipe");
        stdout.read_to_end(&mut printed).expect("rules");
        assert!(ends(child).success());
        assert!(printed == rules);
    }
}

#[test]
fn a_closed_standard_error_does_no_harm() {
    let manifests = Manifests::new();
    let rules = output(&mut command(&dry_run(&manifests))).stdout;
    let script = r#"exec "$@" 2>&-"#;
    let mut shell = Command::new("sh");
    let closed = shell
        .args(["-c", script, "sh", NFTLET])
        .args(dry_run(&manifests))
        .env_remove("KUBECONFIG");
    let closed = output(closed);
    assert!(closed.status.success());
    assert!(closed.stdout == rules);
}

#[test]
fn a_failing_start_gives_the_reason_and_ends_even_if_it_cannot_write() {
    let wrong = ["--no-such-flag"];
    let heard = output(&mut command(&wrong));
    assert_eq!(heard.status.code(), Some(2));
    assert!(said(&heard).ends_with("(nftlet --help shows all flags)\n"));
    let nowhere = ["--dry-run", "--manifests", "/nonexistent"];
    let heard = output(&mut command(&nowhere));
    assert_eq!(heard.status.code(), Some(1));
    assert!(said(&heard).starts_with("nftlet: "), "{}", said(&heard));
    for (arguments, code) in [(&wrong[..], 2), (&nowhere[..], 1)] {
        let (_reader, stuck) = full_pipe();
        for stderr in [
            Stdio::from(full_disk()),
            Stdio::from(broken_pipe()),
            Stdio::from(stuck),
        ] {
            let child = command(arguments).stderr(stderr).spawn();
            assert_eq!(ends(child.expect("nftlet")).code(), Some(code));
        }
    }
}

#[test]
fn what_cannot_be_printed_is_an_error_and_a_reader_that_has_gone_is_none() {
    let manifests = Manifests::new();
    let dry_run = dry_run(&manifests);
    let prints: [&[&str]; 6] = [
        &dry_run.iter().map(String::as_str).collect::<Vec<_>>(),
        &["--help"],
        &["-h"],
        &["--version"],
        &["completion", "bash"],
        &["man"],
    ];
    for arguments in prints {
        let full = output(
            command(arguments)
                .stdout(full_disk())
                .stderr(Stdio::piped()),
        );
        assert_eq!(full.status.code(), Some(1), "{arguments:?}");
        let said = said(&full);
        let last = said.lines().last().unwrap_or_default();
        let expected = "nftlet: cannot print: No space left on device";
        assert!(last.starts_with(expected), "{arguments:?}: {said}");
        let gone = output(
            command(arguments)
                .stdout(broken_pipe())
                .stderr(Stdio::piped()),
        );
        assert_eq!(gone.status.code(), Some(0), "{arguments:?}");
    }
}

#[test]
fn a_cleanup_says_what_it_could_not_print() {
    if !require_net_admin() {
        return;
    }
    let node = Node::new();
    let cleanup = |stdout: Stdio| {
        let mut command = node.ns.command(NFTLET);
        let command = command.arg("--cleanup=nftlet").stdout(stdout);
        output(command.stderr(Stdio::piped()))
    };
    let full = cleanup(full_disk().into());
    assert_eq!(full.status.code(), Some(1));
    assert!(said(&full).contains("nftlet: cannot print: No space left on device"));
    assert!(cleanup(broken_pipe().into()).status.success());
}

fn arguments(node: &Node) -> Vec<String> {
    let metrics = format!("--metrics-bind-address={METRICS}");
    node.arguments(&[&metrics, "--healthz-bind-address=", "-vvv"])
}

#[test]
fn it_starts_works_and_ends_where_nothing_can_be_logged() {
    if !require_net_admin() {
        return;
    }
    for stuck in [false, true] {
        let node = small_cluster();
        let (_reader, pipe) = full_pipe();
        let stderr = if stuck {
            Stdio::from(pipe)
        } else {
            Stdio::from(full_disk())
        };
        let mut agent = Daemon::start_with_stderr(&node.ns, NFTLET, arguments(&node), stderr);
        node.has("10.96.0.11");
        node.leads("10.96.0.11", &["10.1.0.1"]);
        node.api.put(SLICES, slice("a-1", "a", &["10.1.0.2"]));
        node.leads("10.96.0.11", &["10.1.0.2"]);
        if !stuck {
            let (_, page) = get(&node.ns, METRICS, "/metrics");
            assert!(metric(&page, "nftlet_log_lines_dropped_total") > 0.0);
        }
        agent.signal(Signal::SIGTERM);
        let end = wait_for("its end", PATIENCE, || agent.ended());
        assert!(end.success());
    }
}

#[test]
fn a_reader_that_comes_back_hears_how_many_lines_are_missing() {
    if !require_net_admin() {
        return;
    }
    let node = small_cluster();
    let (reader, pipe) = full_pipe();
    let mut agent = Daemon::start_with_stderr(&node.ns, NFTLET, arguments(&node), pipe);
    node.has("10.96.0.11");
    // With everything logged, each change is some lines.
    let dropped = wait_for("lines that are dropped", PATIENCE, || {
        for number in 0..1_000 {
            let pod = format!("10.1.{}.{}", number / 250, number % 250);
            node.api.put(SLICES, slice("a-1", "a", &[&pod]));
        }
        let (_, page) = get(&node.ns, METRICS, "/metrics");
        Some(metric(&page, "nftlet_log_lines_dropped_total")).filter(|count| *count > 0.0)
    });
    let reading = thread::spawn(move || {
        let lines = BufReader::new(reader).lines();
        // Until the end, so that nothing waits.
        lines.map_while(Result::ok).collect::<Vec<String>>()
    });
    wait_for("a line that is not dropped", PATIENCE, || {
        let (_, before) = get(&node.ns, METRICS, "/metrics");
        let (_, after) = get(&node.ns, METRICS, "/metrics");
        let name = "nftlet_log_lines_dropped_total";
        (metric(&before, name) == metric(&after, name)).then_some(())
    });
    agent.signal(Signal::SIGTERM);
    let end = wait_for("its end", PATIENCE, || agent.ended());
    assert!(end.success());
    let lines = reading.join().expect("lines");
    // The queue may have had room in between, so that there are several gaps.
    let is_gap = |line: &&String| line.contains("lines were dropped here");
    let missing = lines.iter().filter(is_gap).map(|said| {
        assert!(said.contains(" WARN "), "{said}");
        let number = said.split(' ').find_map(|word| word.parse::<f64>().ok());
        number.expect("a number of lines")
    });
    assert!(missing.sum::<f64>() >= dropped, "{lines:?}");
    let last = lines.iter().rposition(|line| is_gap(&line));
    assert!(
        last.is_some_and(|last| last + 1 < lines.len()),
        "the log goes on"
    );
}

/// Runs the ignored test below in a process of its own.
fn panicking(stderr: impl Into<Stdio>) -> Command {
    let mut command = Command::new(std::env::current_exe().expect("the test itself"));
    command
        .args([
            "agent::logging::panics",
            "--exact",
            "--nocapture",
            "--ignored",
        ])
        .env("RUST_BACKTRACE", "0")
        .arg0("panics")
        .stdout(Stdio::null())
        .stderr(stderr);
    command
}

#[test]
#[ignore = "a process that another test starts"]
fn panics() {
    let log = LogQueue::start(std::io::stderr()).expect("a thread");
    log.take_panics();
    log.add(b"a line before\n");
    let panicked = thread::Builder::new()
        .name("worker".into())
        .spawn(|| panic!("words of {}", "the panic"))
        .expect("a thread")
        .join();
    let _ = panic::take_hook();
    assert!(panicked.is_err());
}

#[test]
fn a_panic_is_logged_after_earlier_lines_and_waits_for_no_reader() {
    let heard = output(&mut panicking(Stdio::piped()));
    assert!(heard.status.success());
    let said = said(&heard);
    let (before, last) = said.split_once('\n').expect("lines");
    assert_eq!(before, "a line before");
    let place = "nftlet: thread worker panicked at tests/it/agent/logging.rs:";
    assert!(last.starts_with(place), "{said}");
    assert!(last.contains(": words of the panic\n"), "{said}");
    let (_reader, stuck) = full_pipe();
    for stderr in [Stdio::from(full_disk()), Stdio::from(stuck)] {
        let child = panicking(stderr).spawn().expect("the test itself");
        assert!(ends(child).success());
    }
}
