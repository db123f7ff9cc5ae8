//! What clients of the services see: how requests are distributed, a pod that leaves, addresses without an
//! endpoint, and a stopped agent.

use std::io;
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::thread;
use std::time::Instant;

use crate::netns::{Ask, Daemon, Lab, Machine, Protocol};

use crate::print::{Cell, Style, Table, family};
use crate::shop::{Shop, has_word};
use crate::tally::Tally;
use crate::{
    INTERRUPTED, LIMIT, Outcome, PATIENCE, address, all_well, go_on, milliseconds, still_running,
    until, who,
};

/// The requests for each row of the first table.
const REQUESTS: usize = 600;

/// The pod that is removed.
const LEAVING: &str = "pod-3";

/// Shows how requests to all addresses of the services are distributed over the pods.
pub fn distribution(lab: &Lab, style: &Style) -> Outcome<()> {
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

/// Removes a pod while requests run.
pub fn removal(
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
pub fn refusals(lab: &Lab, style: &Style) -> Outcome<()> {
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
pub fn stop(lab: &Lab, nftlet: &mut Daemon, style: &Style) -> Outcome<()> {
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
