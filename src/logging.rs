//! The log: a queue of lines, and a thread that writes them to standard error.
//!
//! Logging a line only puts it into the queue. The thread writes each line with one call, so that
//! lines of up to `PIPE_BUF` bytes do not mix with those of other writers. If standard error is a
//! pipe that nothing reads, a stopped terminal or a file on a full disk, only this thread waits or
//! fails. Lines that do not fit into the queue, and lines that cannot be written, are dropped and
//! counted; a line in their place has the number.
//!
//! Standard error is never made non-blocking: that is a property of the open file, which other
//! programs write to as well.
//!
//! Log lines contain names of objects, files and tables, and messages of servers. Control
//! characters are therefore escaped, so that such a text cannot forge a line, and user names and
//! passwords are removed from URLs.

mod repeats;
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

pub(crate) use self::repeats::{Count, Repeats, Throttle};
use self::safe::safe;
use crate::mutex::lock;

/// The bytes of lines that fit into the queue.
const ROOM: usize = 4 << 20;
/// Counted for each line in addition to its text, so that the number of short lines is bounded.
const OVERHEAD: usize = 64;
/// How long [`LogQueue::flush`] waits for the next line to be written.
const LINE_TIMEOUT: Duration = Duration::from_secs(1);
/// How long it waits in total.
const FLUSH_TIMEOUT: Duration = Duration::from_secs(10);
/// How often a panic tries to lock the queue.
const TRY_EVERY: Duration = Duration::from_millis(10);

thread_local! {
    /// Receives the lines of this thread in place of the queue, if set.
    static OWN_LINE: RefCell<Option<Vec<u8>>> = const { RefCell::new(None) };
    /// Whether this is the writing thread.
    static WRITES: Cell<bool> = const { Cell::new(false) };
}

/// A handle to the queue of lines. Clones share the queue.
#[derive(Clone)]
pub struct LogQueue(Arc<LogShared>);

struct LogShared {
    out: Box<dyn AsFd + Send + Sync>,
    /// Whether lines may contain the sequences that set colours, since `out` is a terminal.
    colours: bool,
    queue: Mutex<LineQueue>,
    /// Notified when the queue is filled.
    filled: Condvar,
    /// Notified when an entry is done.
    progress: Condvar,
    /// The number of dropped lines.
    dropped: AtomicU64,
}

#[derive(Default)]
struct LineQueue {
    entries: VecDeque<LogEntry>,
    bytes: usize,
    /// The number of lines dropped since the last entry.
    overflow: u64,
    /// Whether an entry was taken out and is not done.
    busy: bool,
    /// The number of entries that were written or given up.
    done: u64,
}

enum LogEntry {
    Line(Box<[u8]>),
    /// This number of lines was dropped here.
    Dropped(u64),
}

impl LineQueue {
    /// Appends a line. Returns false if it does not fit.
    fn push(&mut self, line: &[u8]) -> bool {
        let size = line.len() + OVERHEAD;
        if self.bytes + size > ROOM {
            self.overflow += 1;
            return false;
        }
        if self.overflow > 0 {
            let missing = std::mem::take(&mut self.overflow);
            self.entries.push_back(LogEntry::Dropped(missing));
        }
        self.bytes += size;
        self.entries.push_back(LogEntry::Line(line.into()));
        true
    }

    fn pop(&mut self) -> Option<LogEntry> {
        let entry = self.entries.pop_front();
        if let Some(LogEntry::Line(line)) = &entry {
            self.bytes -= line.len() + OVERHEAD;
        }
        let missing = || match std::mem::take(&mut self.overflow) {
            0 => None,
            missing => Some(LogEntry::Dropped(missing)),
        };
        entry.or_else(missing)
    }

    fn is_done(&self) -> bool {
        self.entries.is_empty() && self.overflow == 0 && !self.busy
    }
}

impl LogQueue {
    /// Starts the thread that writes to `out`.
    ///
    /// # Errors
    ///
    /// If the thread cannot be started.
    pub fn start(out: impl AsFd + Send + Sync + 'static) -> io::Result<Self> {
        let lines = Self(Arc::new(LogShared {
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
            .spawn(move || WriterThread::new(&shared).run())?;
        Ok(lines)
    }

    /// Adds a line, which ends with a line feed. Escapes its control characters, and removes user
    /// names and passwords from URLs. Does not block.
    pub fn add(&self, line: &[u8]) {
        if keep_own_line(line) {
            return;
        }
        let text = String::from_utf8_lossy(line.strip_suffix(b"\n").unwrap_or(line));
        let line = format!("{}\n", safe(&text, self.0.colours));
        let added = self.0.lock().push(line.as_bytes());
        self.0.note(added);
    }

    /// Waits until all lines are written or given up, but no longer than a second without progress,
    /// and ten seconds in total. Returns whether the queue is empty.
    pub fn flush(&self) -> bool {
        let end = Instant::now() + FLUSH_TIMEOUT;
        let mut queue = self.0.lock();
        loop {
            if queue.is_done() {
                return true;
            }
            let done = queue.done;
            let longest = LINE_TIMEOUT.min(end.saturating_duration_since(Instant::now()));
            let waited = self
                .0
                .progress
                .wait_timeout_while(queue, longest, |queue| queue.done == done);
            let timeout;
            (queue, timeout) = waited.unwrap_or_else(PoisonError::into_inner);
            if timeout.timed_out() {
                return queue.is_done();
            }
        }
    }

    /// Returns the number of lines dropped so far.
    pub fn dropped(&self) -> u64 {
        self.0.dropped.load(Ordering::Relaxed)
    }

    /// Sets a panic hook that adds the message to the queue. Writing it directly could block the
    /// process forever.
    pub fn take_panics(&self) {
        let lines = self.clone();
        panic::set_hook(Box::new(move |panic| {
            lines.last_words(&panic_message(panic))
        }));
    }

    /// Adds a line and waits until it is written, on whichever thread the panic happened.
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
        // This thread may be the one that has locked the queue, or the writing one.
        let out = self.0.out.as_fd();
        let mut ready = [PollFd::from_borrowed_fd(out, PollFlags::OUT)];
        let timeout = Timespec::try_from(LINE_TIMEOUT).ok();
        if let Ok(1..) = poll(&mut ready, timeout.as_ref()) {
            let _ = rustix::io::write(out, line.as_bytes());
        }
    }
}

impl fmt::Debug for LogQueue {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("LogQueue").finish_non_exhaustive()
    }
}

impl LogShared {
    fn lock(&self) -> MutexGuard<'_, LineQueue> {
        lock(&self.queue)
    }

    /// Locks the queue, unless it stays locked for a while.
    fn lock_soon(&self) -> Option<MutexGuard<'_, LineQueue>> {
        let end = Instant::now() + LINE_TIMEOUT;
        while Instant::now() < end {
            match self.queue.try_lock() {
                Ok(queue) => return Some(queue),
                Err(TryLockError::Poisoned(queue)) => return Some(queue.into_inner()),
                Err(TryLockError::WouldBlock) => thread::sleep(TRY_EVERY),
            }
        }
        None
    }

    /// Wakes the writing thread after a line was added or dropped.
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

/// Writes one event of `tracing`, which is one call of `write`.
pub struct Line<'a>(&'a LogQueue);

impl Write for Line<'_> {
    fn write(&mut self, line: &[u8]) -> io::Result<usize> {
        self.0.add(line);
        Ok(line.len())
    }

    fn flush(&mut self) -> io::Result<()> {
        Ok(())
    }
}

impl<'a> MakeWriter<'a> for LogQueue {
    type Writer = Line<'a>;

    fn make_writer(&'a self) -> Line<'a> {
        Line(self)
    }
}

/// The writing thread.
struct WriterThread<'a> {
    shared: &'a LogShared,
    /// The number of lines dropped since the last one written.
    missing: u64,
    /// Whether the last line was written only in part.
    torn: bool,
}

impl<'a> WriterThread<'a> {
    fn new(shared: &'a LogShared) -> Self {
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
                LogEntry::Line(line) => self.line(&line),
                LogEntry::Dropped(lines) => {
                    self.missing += lines;
                    self.report_missing();
                }
            }
            let mut queue = self.shared.lock();
            queue.busy = false;
            queue.done += 1;
            drop(queue);
            self.shared.progress.notify_all();
        }
    }

    fn next(&self) -> LogEntry {
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
        if !self.report_missing() || !self.put(line) {
            self.missing += 1;
            self.shared.count_dropped();
        }
    }

    /// Writes a line about dropped lines, if there are any. Returns false if it was not written.
    fn report_missing(&mut self) -> bool {
        if self.missing == 0 {
            return true;
        }
        let said = self.put(&missing_line(self.missing));
        if said {
            self.missing = 0;
        }
        said
    }

    /// Writes a line. Returns false if not all of it was written.
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
                // Another program has made it non-blocking.
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

/// Returns the line about dropped lines, in the format of the log.
fn missing_line(missing: u64) -> Vec<u8> {
    OWN_LINE.set(Some(Vec::new()));
    let what = match missing {
        1 => "1 line was dropped".to_owned(),
        _ => format!("{missing} lines were dropped"),
    };
    tracing::warn!(
        "{what} here: standard error did not accept them in time (the disk is full, or the reader \
         is slow or has ended)"
    );
    let line = OWN_LINE.take().unwrap_or_default();
    if line.is_empty() {
        // Logging has not been set up.
        return format!("nftlet: {what} here\n").into_bytes();
    }
    line
}

/// Stores a line for [`missing_line`]. Returns false on all other threads.
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

fn panic_message(panic: &PanicHookInfo<'_>) -> String {
    let payload = panic.payload();
    let message = payload.downcast_ref::<&str>().copied();
    let message = message.or_else(|| payload.downcast_ref::<String>().map(String::as_str));
    let current = thread::current();
    let thread = current.name().unwrap_or("without name");
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
