//! The demo: a small shop on one node, in network namespaces of this process.
//!
//! Creates a client, a node and three pods, runs `nftlet` in the node with the manifests of
//! `examples/shop`, and shows how requests are distributed, what happens to them while a pod is
//! removed, what is rejected, and what network policies do. `make demo` builds and runs it. All
//! namespaces end with the process.

use nftlet_lab::netns;
mod policies;
mod print;
mod shop;
mod tally;
mod traffic;

use std::error::Error;
use std::fs;
use std::io;
use std::net::SocketAddr;
use std::path::{Path, PathBuf};
use std::process::{Command, ExitCode};
use std::sync::atomic::{AtomicBool, Ordering};
use std::thread;
use std::time::{Duration, Instant};

use clap::Parser;
use netns::{Ask, Daemon, Lab, LabOptions, Machine, Namespace, Protocol};
use print::{PICTURE, Style};
use shop::Shop;

/// Shows nftlet at work in network namespaces.
#[derive(Debug, Parser)]
struct Options {
    /// The nftlet program [default: the one built beside this demo]
    #[arg(long, env = "NFTLET", value_name = "FILE")]
    nftlet: Option<PathBuf>,

    /// Keep everything running at the end until Ctrl-C
    #[arg(long)]
    keep: bool,
}

/// Set by SIGINT and SIGTERM, and checked by every loop.
static INTERRUPTED: AtomicBool = AtomicBool::new(false);

/// No answer within this time counts as a failure. It is below the second after which the kernel
/// repeats a lost connection request, so that no loss is hidden.
const PATIENCE: Duration = Duration::from_millis(900);

/// The longest time to wait for nftlet.
const LIMIT: Duration = Duration::from_secs(20);

type Outcome<T> = Result<T, Box<dyn Error>>;

fn main() -> ExitCode {
    let options = Options::parse();
    if let Err(error) = watch_signals() {
        eprintln!("demo: cannot handle signals: {error}");
        return ExitCode::FAILURE;
    }
    let style = Style::for_output();
    match run(&options, &style) {
        Ok(()) => {
            println!("{}", style.good("Everything worked as expected."));
            ExitCode::SUCCESS
        }
        Err(_) if INTERRUPTED.load(Ordering::Relaxed) => {
            eprintln!("\ndemo: interrupted; everything was removed");
            ExitCode::from(130)
        }
        Err(error) => {
            eprintln!("{} {error}", style.bad("The demo failed:"));
            ExitCode::FAILURE
        }
    }
}

/// Sets a flag on SIGINT and SIGTERM, so that the demo removes what it created.
fn watch_signals() -> io::Result<()> {
    use tokio::signal::unix::{SignalKind, signal};
    let runtime = tokio::runtime::Builder::new_current_thread()
        .enable_io()
        .build()?;
    let guard = runtime.enter();
    let mut interrupt = signal(SignalKind::interrupt())?;
    let mut terminate = signal(SignalKind::terminate())?;
    drop(guard);
    thread::spawn(move || {
        runtime.block_on(async {
            tokio::select! { _ = interrupt.recv() => {}, _ = terminate.recv() => {} }
        });
        INTERRUPTED.store(true, Ordering::Relaxed);
    });
    Ok(())
}

/// Returns an error after a signal.
fn go_on() -> Outcome<()> {
    if INTERRUPTED.load(Ordering::Relaxed) {
        return Err("interrupted".into());
    }
    Ok(())
}

/// Waits until the probe returns a value, the time limit is over, or a signal arrives.
fn until<T>(what: &str, mut probe: impl FnMut() -> Outcome<Option<T>>) -> Outcome<T> {
    let deadline = Instant::now() + LIMIT;
    loop {
        go_on()?;
        if let Some(value) = probe()? {
            return Ok(value);
        }
        if Instant::now() > deadline {
            return Err(format!("waited {} s for {what}", LIMIT.as_secs()).into());
        }
        thread::sleep(Duration::from_millis(5));
    }
}

fn run(options: &Options, style: &Style) -> Outcome<()> {
    let started = Instant::now();
    let say = |line: &str| {
        let time = format!("[{:5.1} s]", started.elapsed().as_secs_f64());
        println!("{} {line}", style.faint(&time));
    };
    let program = find_nftlet(options)?;
    if !netns::require_net_admin() {
        return Err("network namespaces need root; run `make demo`".into());
    }

    println!(
        "{}\n",
        style.strong("nftlet demo: a small shop on one node")
    );
    PICTURE.iter().for_each(|line| println!("  {line}"));
    println!();
    let lab = Lab::new(LabOptions::default());
    let mut shop = Shop::open(&lab)?;
    say("created network namespaces; the pods answer with their names");

    let manifests = shop.folder.path().to_owned();
    let socket_folder = tempfile::tempdir()?;
    let socket = socket_folder.path().join("nftlet.sock");
    let start = || {
        Daemon::start(
            lab.node().ns(),
            &program,
            [
                "--manifests".as_ref(),
                manifests.as_os_str(),
                "--hostname-override".as_ref(),
                "node-1".as_ref(),
                "--socket".as_ref(),
                socket.as_os_str(),
                "-v".as_ref(),
            ],
        )
    };
    let mut nftlet = start();
    let launched = Instant::now();
    say(&format!(
        "nftlet runs in node-1: {} --manifests {} --hostname-override node-1",
        program.display(),
        manifests.display()
    ));
    let result = (|| {
        wait_for_rules(&lab, &mut nftlet)?;
        say(&format!(
            "the rules are in force, {} after the start",
            milliseconds(launched.elapsed())
        ));
        traffic::distribution(&lab, style)?;
        traffic::removal(&lab, &mut shop, &mut nftlet, style, &say)?;
        traffic::refusals(&lab, style)?;
        traffic::stop(&lab, &mut nftlet, style)?;
        nftlet = start();
        say("nftlet runs again");
        println!();
        policies::show(&lab, &shop, &mut nftlet, style)?;
        explain(&program, &socket, style)?;
        if options.keep {
            keep(&lab)?;
        }
        Ok(())
    })();
    if result.is_err() && !INTERRUPTED.load(Ordering::Relaxed) {
        eprintln!(
            "---- the log of nftlet ----\n{}----",
            tail(&nftlet.log(), 40)
        );
    }
    result
}

/// Asks the agent why the last connection was denied.
fn explain(program: &Path, socket: &Path, style: &Style) -> Outcome<()> {
    let words = ["explain", "shop/pod-2", "shop/pod-1:8081"];
    println!("{}\n", style.strong("nftlet explains itself"));
    println!("  $ nftlet {}\n", words.join(" "));
    let output = Command::new(program)
        .args(words)
        .arg("--socket")
        .arg(socket)
        .output()?;
    let text = String::from_utf8_lossy(&output.stdout);
    text.lines().for_each(|line| println!("  {line}"));
    println!();
    match output.status.code() {
        // Denied.
        Some(3) => Ok(()),
        _ => Err(format!(
            "{}: {}",
            output.status,
            String::from_utf8_lossy(&output.stderr)
        )
        .into()),
    }
}

/// Returns the given nftlet, or the one in the target directory of this example.
fn find_nftlet(options: &Options) -> Outcome<PathBuf> {
    let path = match &options.nftlet {
        Some(path) => path.clone(),
        None => std::env::current_exe()?
            .parent()
            .and_then(Path::parent)
            .map(|target| target.join("nftlet"))
            .unwrap_or_default(),
    };
    // Absolute, since a name without a directory would be searched in PATH.
    fs::canonicalize(&path).map_err(|error| {
        let path = path.display();
        format!("there is no nftlet at {path} ({error}): build it, or give its path with --nftlet")
            .into()
    })
}

/// Returns the last lines of a text.
fn tail(text: &str, lines: usize) -> String {
    let all: Vec<&str> = text.lines().collect();
    let from = all.len().saturating_sub(lines);
    all[from..].iter().map(|line| format!("{line}\n")).collect()
}

fn milliseconds(time: Duration) -> String {
    format!("{:.1} ms", time.as_secs_f64() * 1000.0)
}

/// Returns an error if nftlet has exited.
fn still_running(nftlet: &mut Daemon) -> Outcome<()> {
    match nftlet.ended() {
        Some(status) => Err(format!("nftlet exited: {status}").into()),
        None => Ok(()),
    }
}

/// Waits until requests to the service are answered, over both families.
fn wait_for_rules(lab: &Lab, nftlet: &mut Daemon) -> Outcome<()> {
    until("nftlet to write its rules", || {
        still_running(nftlet)?;
        let web = ["10.96.0.10:80", "[fd00:10:96::a]:80"];
        // Short, so that the timeout of the last failed attempt adds little to nftlet's time.
        let patience = Duration::from_millis(20);
        let answered = lab.node().ns().run(|| {
            web.iter().all(|to| {
                let ask = Ask::new(Protocol::Http, address(to));
                ask.timeout(patience).send().is_ok()
            })
        });
        Ok(answered.then_some(()))
    })
}

fn address(text: &str) -> SocketAddr {
    text.parse().expect("the demo's addresses are well-formed")
}

/// Returns the name of a machine in the tables; there is only one client.
fn who(machine: &Machine) -> &str {
    match machine.name.as_str() {
        "client-1" => "client",
        name => name,
    }
}

/// Returns all problems as one error.
fn all_well(problems: Vec<String>) -> Outcome<()> {
    if problems.is_empty() {
        return Ok(());
    }
    Err(problems.join("\n  ").into())
}

/// Keeps everything running, and prints commands to inspect it.
fn keep(lab: &Lab) -> Outcome<()> {
    println!("Everything runs until Ctrl-C. To inspect it, as root in another terminal:\n");
    let show = |who: &str, ns: &Namespace, what: &str| {
        println!("  {who:<8} nsenter --net={} {what}", ns.path().display());
    };
    show("node-1", lab.node().ns(), "nft list ruleset");
    show("client", &lab.client().ns, "curl http://203.0.113.10/");
    println!();
    while !INTERRUPTED.load(Ordering::Relaxed) {
        thread::sleep(Duration::from_millis(50));
    }
    Ok(())
}
