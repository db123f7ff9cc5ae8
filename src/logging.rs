//! The lines of the log, on their way to standard error.
//!
//! Whoever logs puts a line into a queue and goes on. A thread of its own takes the lines out and
//! writes them, each with one call, so that a line of up to `PIPE_BUF` bytes stays whole beside
//! those of other writers. Standard error may be a pipe that nothing reads, a stopped terminal or
//! a file on a full disk: then only that thread waits or fails. Lines for which the queue has no
//! room, and lines that cannot be written, are dropped and counted; a line in their place says
//! how many they were.
//!
//! Standard error is never made non-blocking: that would be a property of the open file, which
//! other programs write to as well.
//!
//! Names of objects, files and tables, and the texts of servers, are in the lines as they were
//! found. Each line is therefore made safe: control characters are escaped, so that a text
//! cannot look like another line, and users and passwords are taken out of URLs.

mod safe;

use std::cell::{Cell, RefCell};
use std::collections::VecDeque;
use std::fmt;
use std::io::{self, IsTerminal, Write};
use std::os::fd::AsFd;
use std::panic::{self, PanicHookInfo};
use std::sync::atomic::{AtomicU64, Ordering};
use std::sync::{Arc, Condvar, Mutex, MutexGuard, PoisonError, TryLockError};
use std::thread;
use std::time::{Duration, Instant};

use rustix::event::{PollFd, PollFlags, Timespec, poll};
use rustix::io::Errno;
use tracing_subscriber::fmt::MakeWriter;

pub use self::repeats::{Count, Repeats, Throttle};
use self::safe::safe;

mod repeats;

/// The bytes of lines that may wait to be written.
const ROOM: usize = 4 << 20;
/// What a line takes besides its text, so that short ones are bounded as well.
const OVERHEAD: usize = 64;
/// How long the end of the process waits for the next line to be written.
const PATIENCE: Duration = Duration::from_secs(1);
/// How long it waits in all.
const LONGEST: Duration = Duration::from_secs(10);
/// How often a panic looks whether the queue is free.
const LOOK_EVERY: Duration = Duration::from_millis(10);

thread_local! {
    /// The line that this thread has made for itself, where it makes one.
    static OWN_LINE: RefCell<Option<Vec<u8>>> = const { RefCell::new(None) };
    /// Whether this is the thread that writes.
    static WRITES: Cell<bool> = const { Cell::new(false) };
}

/// What is on its way to standard error; every clone leads to the same queue.
#[derive(Clone)]
pub struct Lines(Arc<Shared>);

struct Shared {
    out: Box<dyn AsFd + Send + Sync>,
    /// Whether lines may have the sequences that set colours: `out` is a terminal.
    colours: bool,
    queue: Mutex<Queue>,
    /// Rings when something is in the queue.
    filled: Condvar,
    /// Rings when something was taken care of.
    progress: Condvar,
    /// The lines that nobody will see.
    dropped: AtomicU64,
}

#[derive(Default)]
struct Queue {
    entries: VecDeque<Entry>,
    bytes: usize,
    /// The lines that found no room after the last entry.
    without_room: u64,
    /// Whether an entry was taken out and is not done with.
    busy: bool,
    /// The entries that are done with.
    done: u64,
}

enum Entry {
    Line(Box<[u8]>),
    /// So many lines are missing here.
    Dropped(u64),
}

impl Queue {
    /// Appends a line; returns false where there is no room.
    fn push(&mut self, line: &[u8]) -> bool {
        let size = line.len() + OVERHEAD;
        if self.bytes + size > ROOM {
            self.without_room += 1;
            return false;
        }
        if self.without_room > 0 {
            let missing = std::mem::take(&mut self.without_room);
            self.entries.push_back(Entry::Dropped(missing));
        }
        self.bytes += size;
        self.entries.push_back(Entry::Line(line.into()));
        true
    }

    fn pop(&mut self) -> Option<Entry> {
        let entry = self.entries.pop_front();
        if let Some(Entry::Line(line)) = &entry {
            self.bytes -= line.len() + OVERHEAD;
        }
        let missing = || match std::mem::take(&mut self.without_room) {
            0 => None,
            missing => Some(Entry::Dropped(missing)),
        };
        entry.or_else(missing)
    }

    fn is_done(&self) -> bool {
        self.entries.is_empty() && self.without_room == 0 && !self.busy
    }
}

impl Lines {
    /// Starts the thread that writes to a file.
    ///
    /// # Errors
    ///
    /// When the system refuses the thread.
    pub fn start(out: impl AsFd + Send + Sync + 'static) -> io::Result<Self> {
        let lines = Self(Arc::new(Shared {
            colours: out.as_fd().is_terminal(),
            out: Box::new(out),
            queue: Mutex::default(),
            filled: Condvar::new(),
            progress: Condvar::new(),
            dropped: AtomicU64::new(0),
        }));
        let shared = lines.0.clone();
        thread::Builder::new()
            .name("log".into())
            .spawn(move || Writer::new(&shared).run())?;
        Ok(lines)
    }

    /// Adds a line, which ends with a line feed. Escapes its control characters and removes the
    /// passwords of URLs. Never waits for it to be written.
    pub fn add(&self, line: &[u8]) {
        if keep_own_line(line) {
            return;
        }
        let text = String::from_utf8_lossy(line.strip_suffix(b"\n").unwrap_or(line));
        let line = format!("{}\n", safe(&text, self.0.colours));
        let added = self.0.lock().push(line.as_bytes());
        self.0.note(added);
    }

    /// Waits until all lines are written, or are known not to be; for no longer than a second
    /// without progress, and ten seconds in all. Returns whether nothing is left.
    pub fn flush(&self) -> bool {
        let end = Instant::now() + LONGEST;
        let mut queue = self.0.lock();
        loop {
            if queue.is_done() {
                return true;
            }
            let done = queue.done;
            let patience = PATIENCE.min(end.saturating_duration_since(Instant::now()));
            let waited = self
                .0
                .progress
                .wait_timeout_while(queue, patience, |queue| queue.done == done);
            let timeout;
            (queue, timeout) = waited.unwrap_or_else(PoisonError::into_inner);
            if timeout.timed_out() {
                return queue.is_done();
            }
        }
    }

    /// How many lines were dropped so far.
    pub fn dropped(&self) -> u64 {
        self.0.dropped.load(Ordering::Relaxed)
    }

    /// Has panics say their message behind the lines that wait, and not directly, which could
    /// block the process for ever instead of ending it.
    pub fn take_panics(&self) {
        let lines = self.clone();
        panic::set_hook(Box::new(move |panic| lines.last_words(&words(panic))));
    }

    /// Adds a line and waits for it, wherever in the process the panic happened.
    fn last_words(&self, line: &str) {
        let writes = WRITES.try_with(Cell::get).unwrap_or(false);
        let queued = !writes
            && self.0.lock_soon().is_some_and(|mut queue| {
                let added = queue.push(line.as_bytes());
                self.0.note(added);
                added
            });
        if queued {
            self.flush();
            return;
        }
        // The thread that holds the queue, or writes, may be this one.
        let out = self.0.out.as_fd();
        let mut ready = [PollFd::from_borrowed_fd(out, PollFlags::OUT)];
        let patience = Timespec::try_from(PATIENCE).ok();
        if let Ok(1..) = poll(&mut ready, patience.as_ref()) {
            let _ = rustix::io::write(out, line.as_bytes());
        }
    }
}

impl fmt::Debug for Lines {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Lines").finish_non_exhaustive()
    }
}

impl Shared {
    fn lock(&self) -> MutexGuard<'_, Queue> {
        self.queue.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// The queue, unless it is still in use after a while.
    fn lock_soon(&self) -> Option<MutexGuard<'_, Queue>> {
        let end = Instant::now() + PATIENCE;
        while Instant::now() < end {
            match self.queue.try_lock() {
                Ok(queue) => return Some(queue),
                Err(TryLockError::Poisoned(queue)) => return Some(queue.into_inner()),
                Err(TryLockError::WouldBlock) => thread::sleep(LOOK_EVERY),
            }
        }
        None
    }

    /// Wakes the writer for a line that was added, or to say that it was not.
    fn note(&self, added: bool) {
        if !added {
            self.count_dropped();
        }
        self.filled.notify_one();
    }

    fn count_dropped(&self) {
        self.dropped.fetch_add(1, Ordering::Relaxed);
    }
}

/// One event of `tracing` is one write.
pub struct Line<'a>(&'a Lines);

impl Write for Line<'_> {
    fn write(&mut self, line: &[u8]) -> io::Result<usize> {
        self.0.add(line);
        Ok(line.len())
    }

    fn flush(&mut self) -> io::Result<()> {
        Ok(())
    }
}

impl<'a> MakeWriter<'a> for Lines {
    type Writer = Line<'a>;

    fn make_writer(&'a self) -> Line<'a> {
        Line(self)
    }
}

/// The thread that writes.
struct Writer<'a> {
    shared: &'a Shared,
    /// The lines that are missing since the last one that was written.
    missing: u64,
    /// Whether the last line was written in part.
    torn: bool,
}

impl<'a> Writer<'a> {
    fn new(shared: &'a Shared) -> Self {
        Self {
            shared,
            missing: 0,
            torn: false,
        }
    }

    fn run(mut self) {
        WRITES.set(true);
        loop {
            let entry = self.next();
            match entry {
                Entry::Line(line) => self.line(&line),
                Entry::Dropped(lines) => {
                    self.missing += lines;
                    self.say_what_is_missing();
                }
            }
            let mut queue = self.shared.lock();
            queue.busy = false;
            queue.done += 1;
            drop(queue);
            self.shared.progress.notify_all();
        }
    }

    fn next(&self) -> Entry {
        let mut queue = self.shared.lock();
        loop {
            if let Some(entry) = queue.pop() {
                queue.busy = true;
                return entry;
            }
            let waited = self.shared.filled.wait(queue);
            queue = waited.unwrap_or_else(PoisonError::into_inner);
        }
    }

    fn line(&mut self, line: &[u8]) {
        if !self.say_what_is_missing() || !self.put(line) {
            self.missing += 1;
            self.shared.count_dropped();
        }
    }

    /// Returns whether nothing is missing that was not said.
    fn say_what_is_missing(&mut self) -> bool {
        if self.missing == 0 {
            return true;
        }
        let said = self.put(&own_line(self.missing));
        if said {
            self.missing = 0;
        }
        said
    }

    /// Writes a line; returns false where the system does not take all of it.
    fn put(&mut self, line: &[u8]) -> bool {
        let apart;
        let mut rest = line;
        if self.torn {
            apart = [b"\n", line].concat();
            rest = &apart;
        }
        let whole = rest.len();
        let out = self.shared.out.as_fd();
        while !rest.is_empty() {
            let written = match rustix::io::write(out, rest) {
                Ok(0) => None,
                Err(Errno::INTR) => Some(0),
                // Some other program has made it non-blocking.
                Err(Errno::AGAIN) => {
                    let mut ready = [PollFd::from_borrowed_fd(out, PollFlags::OUT)];
                    match poll(&mut ready, None) {
                        Ok(_) | Err(Errno::INTR) => Some(0),
                        Err(_) => None,
                    }
                }
                Ok(written) => Some(written),
                Err(_) => None,
            };
            let Some(remaining) = written.and_then(|written| rest.get(written..)) else {
                self.torn |= rest.len() < whole;
                return false;
            };
            rest = remaining;
        }
        self.torn = false;
        true
    }
}

/// The line that says how many are missing, in the form of all others.
fn own_line(missing: u64) -> Vec<u8> {
    OWN_LINE.set(Some(Vec::new()));
    let what = match missing {
        1 => "1 line was dropped".to_owned(),
        _ => format!("{missing} lines were dropped"),
    };
    tracing::warn!(
        "{what} here: standard error did not take it in time (a full disk, or a reader that is \
         slow or gone)"
    );
    let line = OWN_LINE.take().unwrap_or_default();
    if line.is_empty() {
        // Before the form is known.
        return format!("nftlet: {what} here\n").into_bytes();
    }
    line
}

/// Keeps a line that the writing thread makes; returns false on all other threads.
fn keep_own_line(line: &[u8]) -> bool {
    let keep = |own: &RefCell<Option<Vec<u8>>>| match own.try_borrow_mut().as_deref_mut() {
        Ok(Some(own)) => {
            own.extend_from_slice(line);
            true
        }
        _ => false,
    };
    OWN_LINE.try_with(keep).unwrap_or(false)
}

/// What there is to say of a panic.
fn words(panic: &PanicHookInfo<'_>) -> String {
    let payload = panic.payload();
    let message = payload.downcast_ref::<&str>().copied();
    let message = message.or_else(|| payload.downcast_ref::<String>().map(String::as_str));
    let current = thread::current();
    let thread = current.name().unwrap_or("without a name");
    let place = panic.location().map(|it| format!(" at {it}"));
    let trace = std::backtrace::Backtrace::capture();
    let trace = match trace.status() {
        std::backtrace::BacktraceStatus::Captured => format!("{trace}\n"),
        _ => String::new(),
    };
    format!(
        "nftlet: thread {thread} panicked{}: {}\n{trace}",
        place.unwrap_or_default(),
        safe(message.unwrap_or("no message"), false)
    )
}

#[cfg(test)]
mod tests;
