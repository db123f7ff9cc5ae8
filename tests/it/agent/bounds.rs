//! Answers of an API server, or of what stands in its place, that have no end, and lists with
//! objects as large as they can be: neither takes much memory.

use std::io::{BufRead as _, BufReader, Write};
use std::net::{SocketAddr, TcpListener, TcpStream};
use std::{fs, io, thread};

use crate::support::agent::{NFTLET, PATIENCE, lines_with, wait_for_log};
use nftlet_lab::netns::{Daemon, Namespace, require_net_admin, wait_for};

/// How much memory nftlet may have had at any time, in KiB: what a small cluster takes, and some of
/// the longest objects.
const MOST_MEMORY: u64 = 100 << 10;
/// What etcd allows for an object, by the setting of some clusters.
const LARGE: usize = 3 << 20;

/// Answers a request, whose first line is given.
type Answer = fn(&str, &mut TcpStream) -> io::Result<()>;

/// Starts nftlet on a server that answers everything in one way.
fn start(ns: &Namespace, directory: &tempfile::TempDir, answer: Answer) -> Daemon {
    let listener = ns.run(|| TcpListener::bind("127.0.0.1:0")).expect("a port");
    let address = listener.local_addr().expect("an address");
    thread::spawn(move || {
        for stream in listener.incoming() {
            let mut stream = stream.expect("a connection");
            thread::spawn(move || {
                // Where nftlet has heard enough, the writing fails.
                let _ = serve(&mut stream, answer);
            });
        }
    });
    let kubeconfig = directory.path().join("kubeconfig");
    fs::write(&kubeconfig, kubeconfig_for(address)).expect("written");
    let kubeconfig = kubeconfig.to_str().expect("UTF-8");
    let quiet = ["--metrics-bind-address=", "--healthz-bind-address="];
    let arguments = [
        &["--hostname-override=node-1", "--kubeconfig", kubeconfig],
        &quiet[..],
    ];
    Daemon::start(ns, NFTLET, arguments.concat())
}

fn kubeconfig_for(server: SocketAddr) -> String {
    format!(
        "apiVersion: v1\nkind: Config\ncurrent-context: c\n\
         clusters: [{{name: c, cluster: {{server: 'http://{server}'}}}}]\n\
         contexts: [{{name: c, context: {{cluster: c}}}}]\n"
    )
}

fn serve(stream: &mut TcpStream, answer: Answer) -> io::Result<()> {
    let mut reader = BufReader::new(stream.try_clone()?);
    let mut first = String::new();
    reader.read_line(&mut first)?;
    let mut line = String::new();
    while reader.read_line(&mut line)? > 2 {
        line.clear();
    }
    answer(&first, stream)
}

/// Writes the head of an answer that ends with the connection.
fn begin(stream: &mut TcpStream, status: &str) -> io::Result<()> {
    write!(
        stream,
        "HTTP/1.1 {status}\r\nContent-Type: application/json\r\nConnection: close\r\n\r\n"
    )
}

/// Writes a text that never ends.
fn endless(stream: &mut TcpStream) -> io::Result<()> {
    let piece = [b'x'; 1 << 16];
    loop {
        stream.write_all(&piece)?;
    }
}

fn not_streamed(request: &str, stream: &mut TcpStream) -> io::Result<bool> {
    let streamed = request.contains("sendInitialEvents");
    if streamed {
        begin(stream, "422 Unprocessable Entity")?;
        write!(
            stream,
            r#"{{"kind":"Status","apiVersion":"v1","code":422}}"#
        )?;
    }
    Ok(streamed)
}

/// The apiVersion and the kind of what is asked for.
fn asked(request: &str) -> (&'static str, &'static str) {
    let kinds = [
        ("/services?", ("v1", "Service")),
        ("/nodes?", ("v1", "Node")),
        ("/endpointslices?", ("discovery.k8s.io/v1", "EndpointSlice")),
        ("/servicecidrs?", ("networking.k8s.io/v1", "ServiceCIDR")),
        (
            "/networkpolicies?",
            ("networking.k8s.io/v1", "NetworkPolicy"),
        ),
    ];
    let mut kinds = kinds.into_iter();
    let found = kinds.find(|(path, _)| request.contains(path));
    found.map_or(("v1", "Event"), |(_, kind)| kind)
}

/// The largest memory that a program has had, in KiB.
fn peak(daemon: &Daemon) -> u64 {
    let status = fs::read_to_string(format!("/proc/{}/status", daemon.pid())).expect("a process");
    let peak = status.lines().find_map(|line| line.strip_prefix("VmHWM:"));
    let peak = peak.and_then(|line| line.trim().strip_suffix(" kB"));
    peak.and_then(|peak| peak.parse().ok()).expect("a number")
}

#[test]
fn answers_without_an_end_are_cut_off_and_named() {
    if !require_net_admin() {
        return;
    }
    let ns = Namespace::new("endless");
    let ways: [(Answer, &str); 4] = [
        (
            |_, stream| {
                begin(stream, "200 OK")?;
                write!(stream, r#"{{"type":"ADDED","object":{{"x":""#)?;
                endless(stream)
            },
            "asked for services at /api/v1/services, and the answer is an event of more than 8 MiB",
        ),
        (
            |request, stream| {
                if not_streamed(request, stream)? {
                    return Ok(());
                }
                begin(stream, "200 OK")?;
                let (version, kind) = asked(request);
                write!(
                    stream,
                    r#"{{"kind":"{kind}List","apiVersion":"{version}","items":[{{"x":""#
                )?;
                endless(stream)
            },
            "asked for services at /api/v1/services, and the answer is an object of more than 8 MiB",
        ),
        (
            |request, stream| {
                if not_streamed(request, stream)? {
                    return Ok(());
                }
                begin(stream, "200 OK")?;
                endless(stream)
            },
            "and the answer is a text around objects of more than 1 MiB; check what answers",
        ),
        (
            |_, stream| {
                begin(stream, "500 Internal Server Error")?;
                endless(stream)
            },
            "cannot answer now (500: a text of more than 64 KiB that begins with xxx",
        ),
    ];
    for (answer, told) in ways {
        let directory = tempfile::tempdir().expect("a directory");
        let agent = start(&ns, &directory, answer);
        wait_for_log(&agent, told);
        let longest = agent.log().lines().map(str::len).max();
        assert!(longest < Some(1_000), "{longest:?}");
        assert!(peak(&agent) < MOST_MEMORY, "{told}: {} KiB", peak(&agent));
    }
}

#[test]
fn answers_to_events_without_an_end_are_cut_off_and_named() {
    if !require_net_admin() {
        return;
    }
    let ns = Namespace::new("events");
    let ways: [(Answer, &str); 2] = [
        (
            |request, stream| {
                if request.starts_with("POST") {
                    begin(stream, "201 Created")?;
                    write!(stream, r#"{{"x":""#)?;
                    endless(stream)?;
                }
                begin(stream, "404 Not Found")
            },
            "is longer than 8192 KiB; check what answers at the address of the API server",
        ),
        (
            |request, stream| {
                if request.starts_with("POST") {
                    begin(stream, "500 Internal Server Error")?;
                    endless(stream)?;
                }
                begin(stream, "404 Not Found")
            },
            "is longer than 64 KiB; check what answers at the address of the API server",
        ),
    ];
    for (answer, told) in ways {
        let directory = tempfile::tempdir().expect("a directory");
        let agent = start(&ns, &directory, answer);
        wait_for_log(&agent, told);
        let line = lines_with(&agent.log(), told).concat();
        assert!(
            line.contains("the answer to POST /apis/events.k8s.io/v1/"),
            "{line}"
        );
        assert!(peak(&agent) < MOST_MEMORY, "{} KiB", peak(&agent));
    }
}

/// The objects of a list: services as large as they can be, and the own Node.
fn objects(request: &str) -> Box<dyn Iterator<Item = String>> {
    match asked(request).1 {
        "Service" => Box::new((1..=OBJECTS).map(large)),
        "Node" => Box::new(std::iter::once(NODE.to_owned())),
        _ => Box::new(std::iter::empty()),
    }
}

const NODE: &str = r#"{"kind":"Node","apiVersion":"v1","metadata":{"name":"node-1"}}"#;

fn large(number: usize) -> String {
    let spec = format!(r#""clusterIP":"10.96.1.{number}","ports":[{{"port":80}}]"#);
    let filler = "x".repeat(LARGE - 200);
    format!(
        r#"{{"kind":"Service","apiVersion":"v1","metadata":{{"namespace":"a","name":"s{number}","resourceVersion":"{number}","annotations":{{"x":"{filler}"}}}},"spec":{{{spec}}}}}"#
    )
}

const OBJECTS: usize = 40;

#[test]
fn a_list_has_any_number_of_objects_as_large_as_they_can_be() {
    if !require_net_admin() {
        return;
    }
    let ns = Namespace::new("large");
    let in_pages: Answer = |request, stream| {
        if not_streamed(request, stream)? {
            return Ok(());
        }
        begin(stream, "200 OK")?;
        if request.contains("watch=") {
            thread::park();
        }
        let (version, kind) = asked(request);
        write!(
            stream,
            r#"{{"kind":"{kind}List","apiVersion":"{version}","metadata":{{"resourceVersion":"9"}},"items":["#
        )?;
        for (index, object) in objects(request).enumerate() {
            let comma = if index > 0 { "," } else { "" };
            write!(stream, "{comma}{object}")?;
        }
        write!(stream, "]}}")
    };
    let streamed: Answer = |request, stream| {
        begin(stream, "200 OK")?;
        let (version, kind) = asked(request);
        for object in objects(request) {
            writeln!(stream, r#"{{"type":"ADDED","object":{object}}}"#)?;
        }
        writeln!(
            stream,
            r#"{{"type":"BOOKMARK","object":{{"kind":"{kind}","apiVersion":"{version}","metadata":{{"resourceVersion":"9","annotations":{{"k8s.io/initial-events-end":"true"}}}}}}}}"#
        )?;
        thread::park();
        Ok(())
    };
    for answer in [in_pages, streamed] {
        let directory = tempfile::tempdir().expect("a directory");
        let agent = start(&ns, &directory, answer);
        let last = format!("10.96.1.{OBJECTS}");
        wait_for("the last service of the list", 2 * PATIENCE, || {
            let rules = ns.command("nft").args(["list", "ruleset"]).output().ok()?;
            String::from_utf8_lossy(&rules.stdout)
                .contains(&last)
                .then_some(())
        });
        assert!(peak(&agent) < MOST_MEMORY, "{} KiB", peak(&agent));
        drop(agent);
        ns.nft(&["flush", "ruleset"]);
    }
}
