//! What inotify says, on its way to the task that follows the files.
//!
//! Only so much waits: of more it is enough to know that something was lost, since all files can
//! be looked at again.

use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};

use notify::event::Flag;
use notify::{Event, EventKind};
use tokio::sync::mpsc;
use tokio::sync::mpsc::error::TrySendError;

/// The most events that wait.
const QUEUE: usize = 4096;

pub(super) type News = notify::Result<Event>;

/// Makes a queue.
pub(super) fn queue() -> (Inlet, Outlet) {
    let (sender, waiting) = mpsc::channel(QUEUE);
    let lost = Arc::<AtomicBool>::default();
    let inlet = Inlet {
        sender,
        lost: lost.clone(),
    };
    (inlet, Outlet { waiting, lost })
}

/// Where news come in.
pub(super) struct Inlet {
    sender: mpsc::Sender<News>,
    lost: Arc<AtomicBool>,
}

impl Inlet {
    /// Adds an event. Does not wait.
    pub fn add(&self, event: News) {
        if let Err(TrySendError::Full(_)) = self.sender.try_send(event) {
            self.lost.store(true, Ordering::Release);
            // The queue may have been emptied just now, by a reader that does not know of it.
            let _ = self.sender.try_send(Ok(look_again()));
        }
    }
}

/// Where news come out.
pub(super) struct Outlet {
    waiting: mpsc::Receiver<News>,
    lost: Arc<AtomicBool>,
}

impl Outlet {
    /// Waits for an event.
    pub async fn next(&mut self) -> Option<News> {
        self.waiting.recv().await
    }

    /// Takes what waits, and one more event that asks to look at everything if some were lost.
    pub fn rest(&mut self) -> impl Iterator<Item = News> {
        let waiting = std::iter::from_fn(|| self.waiting.try_recv().ok());
        // A writer that is faster than this loop would hold it up for ever.
        let waiting: Vec<News> = waiting.take(QUEUE).collect();
        let lost = self.lost.swap(false, Ordering::AcqRel);
        waiting.into_iter().chain(lost.then(|| Ok(look_again())))
    }
}

/// The event by which inotify says the same.
fn look_again() -> Event {
    Event::new(EventKind::Other).set_flag(Flag::Rescan)
}

#[cfg(test)]
mod tests {
    use super::*;

    fn rescans(news: impl Iterator<Item = News>) -> (usize, usize) {
        let news: Vec<bool> = news.map(|news| news.unwrap().need_rescan()).collect();
        (news.len(), news.iter().filter(|rescan| **rescan).count())
    }

    #[tokio::test]
    async fn of_more_than_may_wait_everything_is_looked_at_again() {
        let (inlet, mut outlet) = queue();
        let add = |count| (0..count).for_each(|_| inlet.add(Ok(Event::new(EventKind::Any))));
        add(QUEUE);
        assert!(outlet.next().await.is_some());
        assert_eq!(rescans(outlet.rest()), (QUEUE - 1, 0));
        add(3 * QUEUE);
        assert_eq!(rescans(outlet.rest()), (QUEUE + 1, 1));
        assert_eq!(rescans(outlet.rest()), (0, 0));
        add(1);
        assert_eq!(rescans(outlet.rest()), (1, 0));
    }
}
