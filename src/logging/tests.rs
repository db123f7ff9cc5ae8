use std::fs::File;
use std::io::{BufRead, BufReader, PipeReader, Read, Seek, pipe};
use std::os::fd::OwnedFd;

use nix::fcntl::{FcntlArg, OFlag, SealFlag, fcntl};
use nix::sys::memfd::{MFdFlags, memfd_create};

use super::*;

fn piped() -> (LogQueue, BufReader<PipeReader>) {
    let (reader, writer) = pipe().expect("a pipe");
    let lines = LogQueue::start(writer).expect("a thread");
    (lines, BufReader::new(reader))
}

/// Reads lines until there is nothing left to write.
fn read_all(lines: &LogQueue, reader: &mut impl BufRead) -> Vec<String> {
    let end = "the end\n";
    let read = |lines: &mut dyn Iterator<Item = io::Result<String>>| -> Vec<String> {
        let lines = lines.map(|line| line.expect("UTF-8"));
        lines.take_while(|line| line != end.trim_end()).collect()
    };
    lines.add(end.as_bytes());
    read(&mut reader.lines())
}

fn line(number: usize, length: usize) -> String {
    format!("{number:08}{}\n", "x".repeat(length - 9))
}

/// The number of the lines that are said to be missing.
fn missing(said: &str) -> Option<u64> {
    let number = said.strip_prefix("nftlet: ")?.split_once(' ')?;
    let is_it = number.1.ends_with("dropped here");
    number.0.parse().ok().filter(|_| is_it)
}

#[test]
fn lines_come_whole_and_in_order() {
    let (lines, mut reader) = piped();
    let read = thread::scope(|scope| {
        for from in [0, 1] {
            let lines = lines.clone();
            scope.spawn(move || {
                for number in 0..2_000 {
                    lines.add(line(2 * number + from, 100).as_bytes());
                }
            });
        }
        let read = (&mut reader).lines().take(4_000);
        read.collect::<io::Result<Vec<_>>>().expect("UTF-8")
    });
    for from in [0, 1] {
        let numbers = read.iter().map(|line| {
            assert_eq!(line.len(), 99, "{line}");
            line[..8].parse::<usize>().expect("a number")
        });
        let of_one: Vec<usize> = numbers.filter(|number| number % 2 == from).collect();
        assert!(of_one.is_sorted() && of_one.len() == 2_000);
    }
    assert!(lines.flush());
    assert_eq!(lines.dropped(), 0);
}

#[test]
fn logging_does_not_wait_for_a_pipe_that_nothing_reads() {
    let (lines, mut reader) = piped();
    // More than the queue and the pipe have room for. The pipe is full before the queue is, so that
    // all lines that are dropped are dropped in one place.
    let (count, length) = (3 * ROOM / 1_000, 1_000);
    let (first, rest) = (0..500, 500..count);
    for number in first {
        lines.add(line(number, length).as_bytes());
    }
    assert!(!lines.flush(), "nothing can be written");
    for number in rest {
        lines.add(line(number, length).as_bytes());
    }
    let dropped = lines.dropped();
    assert!(dropped > 0);
    assert!(lines.0.lock().bytes <= ROOM);
    // Once lines are read, there is room for others, behind a line about the missing ones.
    let reading = thread::spawn(move || {
        let first: Vec<String> = (0..2_000)
            .map(|_| {
                (&mut reader)
                    .lines()
                    .next()
                    .expect("a line")
                    .expect("UTF-8")
            })
            .collect();
        (first, reader)
    });
    let (mut read, mut reader) = reading.join().expect("lines");
    read.extend(read_all(&lines, &mut reader));
    let said: Vec<u64> = read.iter().filter_map(|line| missing(line)).collect();
    assert_eq!(said, [dropped]);
    assert_eq!(missing(read.last().expect("lines")), Some(dropped));
    let written = &read[..read.len() - 1];
    assert_eq!(written.len() as u64 + dropped, count as u64);
    for (number, read) in written.iter().enumerate() {
        assert_eq!(read, line(number, length).trim_end());
    }
    assert_eq!(lines.dropped(), dropped);
}

#[test]
fn dropped_lines_are_reported_although_no_line_follows() {
    let (lines, mut reader) = piped();
    lines.add(line(0, 2 * ROOM).as_bytes());
    let mut said = String::new();
    reader.read_line(&mut said).expect("a line");
    assert_eq!(said, "nftlet: 1 line was dropped here\n");
    lines.add(b"a line\n");
    assert_eq!(read_all(&lines, &mut reader), ["a line"]);
    let mut queue = LineQueue::default();
    assert!(!queue.push(line(0, 2 * ROOM).as_bytes()));
    assert!(!queue.is_done());
    assert!(matches!(queue.pop(), Some(LogEntry::Dropped(1))));
    assert!(queue.pop().is_none() && queue.is_done());
}

#[test]
fn short_lines_are_bounded_too() {
    let mut queue = LineQueue::default();
    let pushed = (0..ROOM).take_while(|_| queue.push(b"\n")).count();
    assert_eq!(pushed, ROOM / (OVERHEAD + 1));
    while let Some(LogEntry::Line(_)) = queue.pop() {}
    assert_eq!(queue.bytes, 0);
}

#[test]
fn a_full_disk_loses_lines_and_nothing_else() {
    let full = File::options().write(true).open("/dev/full").expect("it");
    let lines = LogQueue::start(full).expect("a thread");
    for number in 0..10 {
        lines.add(line(number, 100).as_bytes());
    }
    assert!(lines.flush());
    assert_eq!(lines.dropped(), 10);
    let (reader, writer) = pipe().expect("a pipe");
    drop(reader);
    let lines = LogQueue::start(writer).expect("a thread");
    lines.add(b"to nobody\n");
    assert!(lines.flush());
    assert_eq!(lines.dropped(), 1);
}

#[test]
fn a_line_after_a_truncated_one_is_whole() {
    // A page that cannot grow stands for a disk that becomes full in the middle of a line.
    let page = 4096;
    let file = memfd_create(c"full", MFdFlags::MFD_ALLOW_SEALING).expect("a file");
    let mut file = File::from(file);
    file.set_len(page).expect("a page");
    fcntl(&file, FcntlArg::F_ADD_SEALS(SealFlag::F_SEAL_GROW)).expect("a seal");
    let out = OwnedFd::from(file.try_clone().expect("a copy"));
    let lines = LogQueue::start(out).expect("a thread");
    file.seek(io::SeekFrom::Start(page - 10)).expect("a place");
    lines.add(b"this is longer than ten bytes\n");
    assert!(lines.flush());
    assert_eq!(lines.dropped(), 1);
    file.rewind().expect("a place");
    lines.add(b"whole\n");
    assert!(lines.flush());
    let mut text = String::new();
    file.rewind().expect("a place");
    file.read_to_string(&mut text).expect("UTF-8");
    let expected = "\nnftlet: 1 line was dropped here\nwhole\n";
    assert_eq!(&text[..expected.len()], expected);
    assert!(text.ends_with("this is lo"));
}

#[test]
fn a_non_blocking_pipe_is_waited_for() {
    let (reader, writer) = pipe().expect("a pipe");
    fcntl(&writer, FcntlArg::F_SETFL(OFlag::O_NONBLOCK)).expect("a flag");
    let lines = LogQueue::start(writer).expect("a thread");
    let mut reader = BufReader::new(reader);
    // Several times what the pipe has room for.
    for number in 0..500 {
        lines.add(line(number, 1_000).as_bytes());
    }
    assert_eq!(read_all(&lines, &mut reader).len(), 500);
    assert_eq!(lines.dropped(), 0);
}

#[test]
fn a_panic_is_written_although_the_queue_is_locked() {
    let (lines, mut reader) = piped();
    lines.add(b"before\n");
    lines.last_words("last\n");
    let mut said = String::new();
    reader.read_line(&mut said).expect("a line");
    reader.read_line(&mut said).expect("a line");
    assert_eq!(said, "before\nlast\n");
    let queue = lines.0.lock();
    lines.last_words("very last\n");
    drop(queue);
    said.clear();
    reader.read_line(&mut said).expect("a line");
    assert_eq!(said, "very last\n");
}

#[test]
fn foreign_texts_forge_no_line_and_show_no_password() {
    for (text, written) in [
        ("a line: \u{e4}\u{65e5}", "a line: \u{e4}\u{65e5}"),
        ("a\nb\r\n\tc\0", r"a\nb\r\n\tc\u0000"),
        (
            "\u{7f}\u{85}\u{9b}2J\u{2028}\u{202e}",
            r"\u007f\u0085\u009b2J\u2028\u202e",
        ),
        (
            "\x1b[2J\x1b[31mred\x1b[0m",
            r"\u001b[2J\u001b[31mred\u001b[0m",
        ),
        (
            "https://me:se@cret@192.0.2.1:6443/x?a@b, then",
            "https://192.0.2.1:6443/x?a@b, then",
        ),
        ("`http://me@a` socks5://b:c@d", "`http://a` socks5://d"),
        ("https://a/b@c", "https://a/b@c"),
        ("://", "://"),
    ] {
        assert_eq!(safe(text, false), written);
    }
    let coloured = "\x1b[2m\x1b[38;5;1mx\x1b[0m\x1b[2J\x1b[\x1b";
    let written = "\x1b[2m\x1b[38;5;1mx\x1b[0m\\u001b[2J\\u001b[\\u001b";
    assert_eq!(safe(coloured, true), written);
    let (lines, mut reader) = piped();
    lines.add(b"a\n\x1b[0mb\xff\n");
    assert_eq!(read_all(&lines, &mut reader), ["a\\n\\u001b[0mb\u{fffd}"]);
}
