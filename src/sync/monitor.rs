//! The thread that hears of changes that others make to nftlet's tables.

use std::io;
use std::sync::Arc;
use std::thread;
use std::time::{Duration, Instant};

use tokio::sync::{Notify, oneshot};

use crate::netlink::{self, Monitor, Nftables, Notification};
use crate::policies;
use crate::services;

/// The pause before the second attempt to listen; each further one is twice as long.
const FIRST_PAUSE: Duration = Duration::from_secs(1);
const LONGEST_PAUSE: Duration = Duration::from_secs(60);

/// Starts the thread, which ends with the process.
///
/// # Errors
///
/// When the system refuses the thread.
pub(crate) fn start_monitor(
    own: &mut Nftables,
    begin: oneshot::Receiver<()>,
    foreign: Arc<Notify>,
) -> io::Result<()> {
    let mut monitor = Monitor::new(&[services::TABLE, policies::TABLE], own);
    own.mute_during_large_writes(monitor.muted());
    let listen = move || {
        if begin.blocking_recv().is_ok() {
            follow(&mut monitor, || foreign.notify_one(), pause);
        }
    };
    thread::Builder::new()
        .name("monitor".into())
        .spawn(listen)
        .map(drop)
}

/// Sleeps. Returns whether to go on, which is always so.
fn pause(time: Duration) -> bool {
    thread::sleep(time);
    true
}

/// What news come from.
trait News {
    /// Begins to hear, again where it did before.
    fn listen(&mut self) -> Result<(), netlink::Error>;
    /// Waits until something is heard.
    fn wait(&mut self) -> Result<Notification, netlink::Error>;
}

impl News for Monitor {
    fn listen(&mut self) -> Result<(), netlink::Error> {
        Monitor::listen(self)
    }

    fn wait(&mut self) -> Result<Notification, netlink::Error> {
        Monitor::wait(self)
    }
}

/// Has the tables compared whenever others may have changed them, until `pause` returns false.
/// Listens again after an error; what happened meanwhile shows in the comparison that follows.
fn follow(news: &mut impl News, compare: impl Fn(), pause: impl Fn(Duration) -> bool) {
    let (mut deaf, mut time) = (false, FIRST_PAUSE);
    loop {
        let began = Instant::now();
        let error = match news.listen() {
            Ok(()) => {
                if std::mem::take(&mut deaf) {
                    tracing::info!("changes that others make to the rules are noticed again");
                }
                hear(news, &compare)
            }
            Err(error) => error,
        };
        if !std::mem::replace(&mut deaf, true) {
            tracing::warn!(
                "{error}; changes that others make to the rules are not noticed until this works"
            );
        }
        if began.elapsed() > LONGEST_PAUSE {
            time = FIRST_PAUSE;
        }
        if !pause(time) {
            return;
        }
        time = (time * 2).min(LONGEST_PAUSE);
    }
}

/// Listens until this fails.
fn hear(news: &mut impl News, compare: &impl Fn()) -> netlink::Error {
    // Something may have happened before; looking costs nothing if not.
    compare();
    loop {
        match news.wait() {
            Ok(Notification::Changed | Notification::Lost) => compare(),
            Err(error) => return error,
        }
    }
}

#[cfg(test)]
mod tests {
    use std::cell::{Cell, RefCell};
    use std::collections::VecDeque;

    use super::*;

    /// What each attempt to listen yields: what is heard before it fails, or `None` if it fails at
    /// once.
    struct Scripted(VecDeque<Option<Vec<Notification>>>, VecDeque<Notification>);

    fn failed() -> netlink::Error {
        netlink::Error::Receive {
            what: "news",
            source: io::ErrorKind::OutOfMemory.into(),
        }
    }

    impl News for Scripted {
        fn listen(&mut self) -> Result<(), netlink::Error> {
            self.1 = self.0.pop_front().flatten().ok_or_else(failed)?.into();
            Ok(())
        }

        fn wait(&mut self) -> Result<Notification, netlink::Error> {
            self.1.pop_front().ok_or_else(failed)
        }
    }

    #[test]
    fn after_an_error_news_are_listened_to_again_and_the_tables_compared() {
        let attempts = [
            Some(vec![Notification::Changed, Notification::Lost]),
            None,
            None,
            Some(vec![]),
            Some(vec![Notification::Changed]),
        ];
        let mut news = Scripted(attempts.into(), VecDeque::new());
        let (compared, pauses) = (Cell::new(0), RefCell::new(Vec::new()));
        let pause = |time: Duration| {
            pauses.borrow_mut().push((time.as_secs(), compared.get()));
            pauses.borrow().len() < 12
        };
        follow(&mut news, || compared.set(compared.get() + 1), pause);
        let pauses = pauses.take();
        assert_eq!(pauses[..5], [(1, 3), (2, 3), (4, 3), (8, 4), (16, 6)]);
        assert_eq!(pauses[11], (60, 6));
    }
}
