//! Follows the kernel's notifications, also after errors.

use std::thread;
use std::time::{Duration, Instant};

use super::Error;
use crate::backoff::Backoff;

const SHORTEST_PAUSE: Duration = Duration::from_secs(1);
const LONGEST_PAUSE: Duration = Duration::from_secs(60);

/// Notifications of one kind, and their handler.
pub(super) trait Notifications {
    /// The subject of the notifications, for the log.
    const ABOUT: &'static str;

    /// Opens a new socket, and handles changes missed before.
    fn listen(&mut self) -> Result<(), Error>;

    /// Waits for notifications and handles them.
    fn wait(&mut self) -> Result<(), Error>;
}

/// Handles notifications forever. Listens again after an error.
pub(super) fn follow(notifications: impl Notifications) {
    follow_until(notifications, |time| {
        thread::sleep(time);
        false
    });
}

/// Handles notifications until `pause` returns true.
fn follow_until<N: Notifications>(mut notifications: N, pause: impl Fn(Duration) -> bool) {
    let mut backoff = Backoff::new(SHORTEST_PAUSE, LONGEST_PAUSE);
    let mut failed = false;
    loop {
        let began = Instant::now();
        let error = match notifications.listen() {
            Ok(()) => {
                if std::mem::take(&mut failed) {
                    tracing::info!("notifications about {} are received again", N::ABOUT);
                }
                loop {
                    if let Err(error) = notifications.wait() {
                        break error;
                    }
                }
            }
            Err(error) => error,
        };
        if !std::mem::replace(&mut failed, true) {
            tracing::warn!(
                "{error}; no notifications about {} until this succeeds",
                N::ABOUT
            );
        }
        if began.elapsed() > LONGEST_PAUSE {
            backoff.reset();
        }
        if pause(backoff.next()) {
            return;
        }
    }
}

#[cfg(test)]
mod tests {
    use std::cell::RefCell;
    use std::collections::VecDeque;

    use super::*;

    /// For each attempt to listen, how many notifications arrive before it fails, or `None` if it fails
    /// at once.
    struct Scripted<'a> {
        attempts: VecDeque<Option<usize>>,
        left: usize,
        done: &'a RefCell<Vec<&'static str>>,
    }

    impl Notifications for Scripted<'_> {
        const ABOUT: &'static str = "changes";

        fn listen(&mut self) -> Result<(), Error> {
            let attempt = self.attempts.pop_front().flatten();
            self.left = attempt.ok_or(Error::SourceEnded)?;
            self.done.borrow_mut().push("listen");
            Ok(())
        }

        fn wait(&mut self) -> Result<(), Error> {
            self.left = self.left.checked_sub(1).ok_or(Error::SourceEnded)?;
            self.done.borrow_mut().push("act");
            Ok(())
        }
    }

    #[test]
    fn after_an_error_notifications_are_listened_to_again() {
        let done = RefCell::default();
        let scripted = Scripted {
            attempts: [Some(2), None, None, Some(0), Some(1)].into(),
            left: 0,
            done: &done,
        };
        let pauses = RefCell::new(Vec::new());
        follow_until(scripted, |time| {
            let done = done.borrow().len();
            pauses.borrow_mut().push((time.as_secs(), done));
            pauses.borrow().len() == 12
        });
        let pauses = pauses.take();
        assert_eq!(pauses[..5], [(1, 3), (2, 3), (4, 3), (8, 4), (16, 6)]);
        assert_eq!(pauses[11], (60, 6));
        let all = ["listen", "act", "act", "listen", "listen", "act"];
        assert_eq!(done.take(), all);
    }
}
