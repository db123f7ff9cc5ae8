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

use std::error::Error;
use std::fs;
use std::io;
use std::net::SocketAddr;
use std::path::{Path, PathBuf};
use std::process::{Command, ExitCode};
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::thread;
use std::time::{Duration, Instant};

use clap::Parser;
use netns::{Ask, Daemon, Lab, LabOptions, Machine, Namespace, Protocol};
use print::{Cell, PICTURE, Style, Table, family};
use shop::{Shop, has_word};
use tally::Tally;

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

/// The requests for each row of the first table.
const REQUESTS: usize = 600;

/// No answer within this time counts as a failure. It is below the second after which the kernel
/// repeats a lost connection request, so that no loss is hidden.
const PATIENCE: Duration = Duration::from_millis(900);

/// The longest time to wait for nftlet.
const LIMIT: Duration = Duration::from_secs(20);

/// The pod that is removed.
const LEAVING: &str = "pod-3";

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
        show_spread(&lab, style)?;
        show_removal(&lab, &mut shop, &mut nftlet, style, &say)?;
        show_refusals(&lab, style)?;
        show_stop(&lab, &mut nftlet, style)?;
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

/// Shows how requests to all addresses of the services are distributed over the pods.
fn show_spread(lab: &Lab, style: &Style) -> Outcome<()> {
    let (client, node, pod) = (lab.client(), &lab.node().machine, lab.pods()[0]);
    let all: &[&str] = &["pod-1", "pod-2", "pod-3"];
    let (cart, dns) = (&all[..2], &all[1..]);
    use Protocol::{Http, Tcp, Udp};
    let rows: [(&str, Protocol, &str, &Machine, &[&str]); 16] = [
        ("web ClusterIP", Http, "10.96.0.10:80", node, all),
        ("web ClusterIP", Http, "[fd00:10:96::a]:80", node, all),
        ("web ClusterIP", Http, "10.96.0.10:80", pod, all),
        ("web ClusterIP", Http, "[fd00:10:96::a]:80", pod, all),
        ("web NodePort", Http, "192.168.10.1:30080", client, all),
        (
            "web NodePort",
            Http,
            "[fd00:192:168:10::1]:30080",
            client,
            all,
        ),
        ("web LoadBalancer", Http, "203.0.113.10:80", client, all),
        ("web LoadBalancer", Http, "[2001:db8:1::10]:80", client, all),
        ("cart ClusterIP", Http, "10.96.0.20:80", pod, cart),
        ("cart ClusterIP", Http, "[fd00:10:96::14]:80", pod, cart),
        ("cart metrics", Http, "10.96.0.20:9090", pod, cart),
        ("cart metrics", Http, "[fd00:10:96::14]:9090", pod, cart),
        ("dns over UDP", Udp, "10.96.0.53:53", pod, dns),
        ("dns over UDP", Udp, "[fd00:10:96::35]:53", pod, dns),
        ("dns over TCP", Tcp, "10.96.0.53:53", pod, dns),
        ("dns over TCP", Tcp, "[fd00:10:96::35]:53", pod, dns),
    ];
    println!(
        "\n{}\n",
        style.strong("Distribution of requests over the pods")
    );
    let table = Table::new(
        style,
        &[
            ("SERVICE", -16),
            ("ADDRESS", -26),
            ("FAMILY", -6),
            ("FROM", -8),
            ("REQUESTS", 8),
            ("POD-1", 5),
            ("POD-2", 5),
            ("POD-3", 5),
            ("FAILED", 6),
        ],
    );
    let mut problems = Vec::new();
    for (service, protocol, to, from, expected) in rows {
        let target = address(to);
        let tally = from.ns.run(|| {
            let mut tally = Tally::default();
            for _ in 0..REQUESTS {
                tally.count(Ask::new(protocol, target).timeout(PATIENCE).send());
                // Hundreds of timeouts would show nothing more.
                if INTERRUPTED.load(Ordering::Relaxed) || tally.failed > 5 {
                    break;
                }
            }
            tally
        });
        go_on()?;
        table.row(&[
            Cell::plain(service),
            Cell::plain(to),
            Cell::plain(family(target.ip())),
            Cell::plain(who(from)),
            Cell::plain(&tally.total().to_string()),
            Cell::plain(&tally.share("pod-1")),
            Cell::plain(&tally.share("pod-2")),
            Cell::plain(&tally.share("pod-3")),
            Cell::failures(tally.failed),
        ]);
        if let Err(problem) = tally.check(&format!("{service} {to}"), expected) {
            problems.push(problem.to_string());
        }
    }
    println!();
    all_well(problems)
}

fn all_well(problems: Vec<String>) -> Outcome<()> {
    if problems.is_empty() {
        return Ok(());
    }
    Err(problems.join("\n  ").into())
}

/// Removes a pod while requests run.
fn show_removal(
    lab: &Lab,
    shop: &mut Shop,
    nftlet: &mut Daemon,
    style: &Style,
    say: &dyn Fn(&str),
) -> Outcome<()> {
    println!("{}\n", style.strong("A pod is removed under load"));
    let (client, node, pod) = (lab.client(), &lab.node().machine, lab.pods()[0]);
    let sources = [
        ("203.0.113.10:80", client),
        ("[fd00:192:168:10::1]:30080", client),
        ("10.96.0.10:80", node),
        ("[fd00:10:96::a]:80", pod),
    ];
    // Requests stop at this flag, or at a bound that only a failing demo reaches.
    let (finish, sent) = (AtomicBool::new(false), AtomicU64::new(0));
    let tallies: Outcome<Vec<Tally>> = thread::scope(|scope| {
        let load = sources.map(|(to, from)| {
            let (finish, sent) = (&finish, &sent);
            scope.spawn(move || {
                from.ns.run(|| {
                    let (mut tally, deadline) = (Tally::default(), Instant::now() + 3 * LIMIT);
                    while !finish.load(Ordering::Relaxed)
                        && !INTERRUPTED.load(Ordering::Relaxed)
                        && tally.total() < 50_000
                        && Instant::now() < deadline
                    {
                        let ask = Ask::new(Protocol::Http, address(to));
                        tally.count(ask.timeout(PATIENCE).send());
                        sent.fetch_add(1, Ordering::Relaxed);
                    }
                    tally
                })
            })
        });
        let steps = remove_pod(lab, shop, nftlet, &sent, say);
        finish.store(true, Ordering::Relaxed);
        let tallies = load.map(|thread| thread.join().expect("the load does not panic"));
        steps.map(|()| Vec::from(tallies))
    });
    let tallies = tallies?;
    go_on()?;

    println!();
    let table = Table::new(
        style,
        &[
            ("ADDRESS", -26),
            ("FROM", -8),
            ("REQUESTS", 8),
            ("POD-1", 6),
            ("POD-2", 6),
            ("POD-3", 6),
            ("FAILED", 6),
        ],
    );
    let mut problems = Vec::new();
    for ((to, from), tally) in sources.iter().zip(&tallies) {
        table.row(&[
            Cell::plain(to),
            Cell::plain(who(from)),
            Cell::plain(&tally.total().to_string()),
            Cell::plain(&tally.of("pod-1").to_string()),
            Cell::plain(&tally.of("pod-2").to_string()),
            Cell::plain(&tally.of("pod-3").to_string()),
            Cell::failures(tally.failed),
        ]);
        if tally.failed > 0 {
            let example = tally.example.as_deref().unwrap_or_default();
            let failed = tally.failed;
            problems.push(format!(
                "{failed} requests to {to} failed while {LEAVING} left: {example}"
            ));
        }
    }
    let total: usize = tallies.iter().map(Tally::total).sum();
    let failed: usize = tallies.iter().map(|tally| tally.failed).sum();
    let verdict = format!("{failed} of {total} requests failed");
    let painted = if failed == 0 {
        style.good(&verdict)
    } else {
        style.bad(&verdict)
    };
    println!("\n  {painted}\n");
    all_well(problems)
}

/// The steps of a removal, between which requests keep running.
fn remove_pod(
    lab: &Lab,
    shop: &mut Shop,
    nftlet: &mut Daemon,
    sent: &AtomicU64,
    say: &dyn Fn(&str),
) -> Outcome<()> {
    let more = |count: u64| {
        let goal = sent.load(Ordering::Relaxed) + count;
        until("requests to go on", || {
            Ok((sent.load(Ordering::Relaxed) >= goal).then_some(()))
        })
    };
    more(3000)?;
    let changed = shop.remove_from_manifests(LEAVING)?;
    let removed = Instant::now();
    let leaving = lab.pods().into_iter().find(|pod| pod.name == LEAVING);
    let addresses = leaving.map(Machine::addresses).ok_or("no such pod")?;
    until("the rules without the pod", || {
        still_running(nftlet)?;
        let rules = lab.node().ns().nft(&["list", "ruleset"]);
        let mentioned = addresses
            .iter()
            .any(|address| has_word(&rules, &address.to_string()));
        Ok((!mentioned).then_some(()))
    })?;
    say(&format!(
        "{LEAVING} left {changed} manifests; the rules followed within {}",
        milliseconds(removed.elapsed())
    ));
    // Requests under way to the pod are answered when its count no longer changes.
    let mut last = shop.served(LEAVING);
    loop {
        more(200)?;
        let now = shop.served(LEAVING);
        if now == last {
            break;
        }
        last = now;
    }
    shop.servers.retain(|(pod, _)| pod != LEAVING);
    say(&format!(
        "{LEAVING} has answered its last request and stops; requests go on"
    ));
    more(10_000)?;
    if shop.served(LEAVING) > last {
        return Err(format!("{LEAVING} was still asked after it had left").into());
    }
    Ok(())
}

/// Shows that requests without an endpoint are rejected at once.
fn show_refusals(lab: &Lab, style: &Style) -> Outcome<()> {
    println!("{}\n", style.strong("Requests without an endpoint"));
    let (node, pod) = (&lab.node().machine, lab.pods()[0]);
    let rows = [
        ("empty, which has no endpoints", "10.96.0.40:80", pod),
        ("empty, which has no endpoints", "[fd00:10:96::28]:80", pod),
        ("empty, which has no endpoints", "10.96.0.40:80", node),
        ("empty, which has no endpoints", "[fd00:10:96::28]:80", node),
        ("a port that the service lacks", "10.96.0.10:81", pod),
        ("a port that the service lacks", "[fd00:10:96::a]:81", pod),
        ("an address of no service", "10.96.99.99:80", pod),
        ("an address of no service", "[fd00:10:96::99]:80", pod),
    ];
    let table = Table::new(
        style,
        &[
            ("WHAT", -30),
            ("ADDRESS", -26),
            ("FROM", -8),
            ("ANSWER", -22),
        ],
    );
    let mut problems = Vec::new();
    for (what, to, from) in rows {
        go_on()?;
        let asked = Instant::now();
        let result = from.ns.run(|| {
            Ask::new(Protocol::Tcp, address(to))
                .timeout(PATIENCE)
                .send()
        });
        let time = milliseconds(asked.elapsed());
        let refused =
            matches!(&result, Err(error) if error.kind() == io::ErrorKind::ConnectionRefused);
        let dropped = matches!(&result, Err(error) if error.kind() == io::ErrorKind::TimedOut);
        // An address that a service may get at any time must not be rejected: it is dropped.
        let expected = if what.contains("no service") {
            dropped
        } else {
            refused
        };
        let answer = match result {
            Err(_) if refused => format!("refused after {time}"),
            Err(_) if dropped => "dropped, no answer".to_owned(),
            Err(error) => format!("{error}"),
            Ok(answer) => format!("answered by {}", answer.name),
        };
        if !expected {
            problems.push(format!("{what}, {to} from {}: {answer}", from.name));
        }
        let cell = if refused {
            Cell::good(&answer)
        } else {
            Cell::bad(&answer)
        };
        table.row(&[
            Cell::plain(what),
            Cell::plain(to),
            Cell::plain(&from.name),
            cell,
        ]);
    }
    println!();
    all_well(problems)
}

/// Shows that rules outlive the agent, so that a restart or an update interrupts no connection.
fn show_stop(lab: &Lab, nftlet: &mut Daemon, style: &Style) -> Outcome<()> {
    println!("{}\n", style.strong("nftlet stops, its rules stay"));
    let status = nftlet
        .stop(LIMIT)
        .ok_or("nftlet does not end after SIGTERM")?;
    if !status.success() {
        return Err(format!("nftlet ended with an error after SIGTERM: {status}").into());
    }
    let to = "203.0.113.10:80";
    let tally = lab.client().ns.run(|| {
        let mut tally = Tally::default();
        while tally.total() < REQUESTS && tally.failed < 5 {
            let ask = Ask::new(Protocol::Http, address(to));
            tally.count(ask.timeout(PATIENCE).send());
        }
        tally
    });
    go_on()?;
    println!(
        "  {} of {} requests to {to} answered after it ended ({status})\n",
        tally.total() - tally.failed,
        tally.total()
    );
    tally.check("the stopped nftlet's rules", &["pod-1", "pod-2"])
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
