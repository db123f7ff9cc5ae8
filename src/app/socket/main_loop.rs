//! Looks at the objects, which the main loop owns.

use std::sync::{Arc, Mutex, MutexGuard};

use tokio::sync::{mpsc, oneshot};
use tokio::time::Instant;

use crate::mutex::lock;
use crate::sync::{Look, Query, View};

/// The main loop has ended.
#[derive(Debug)]
pub(super) struct Ended;

/// The main loop, as pages of the socket see it.
pub(in crate::app) struct MainLoop {
    ask: mpsc::Sender<Query>,
    /// Held while the main loop looks, so that other events have their turn in between.
    turn: tokio::sync::Mutex<()>,
    /// When the oldest question was asked that has no answer yet.
    asked: Arc<Mutex<Option<Instant>>>,
}

impl MainLoop {
    pub(in crate::app) fn new(ask: mpsc::Sender<Query>) -> Self {
        Self {
            ask,
            turn: tokio::sync::Mutex::default(),
            asked: Arc::default(),
        }
    }

    /// Has the main loop look at the objects.
    pub(super) async fn look<T: Send + 'static>(
        &self,
        look: impl FnOnce(&View) -> T + Send + 'static,
    ) -> Result<T, Ended> {
        let _turn = self.turn.lock().await;
        let (answer, answered) = oneshot::channel();
        let asked = self.asked.clone();
        let look = Look(Box::new(move |view: &View| {
            *lock(&asked) = None;
            // The client may have gone.
            let _ = answer.send(look(view));
        }));
        self.asked().get_or_insert_with(Instant::now);
        self.ask.send(Query::Look(look)).await.map_err(|_| Ended)?;
        answered.await.map_err(|_| Ended)
    }

    /// Returns how long the main loop has not answered, in seconds; 0 if it has.
    pub(super) fn silent_seconds(&self) -> u64 {
        self.asked().map_or(0, |asked| asked.elapsed().as_secs())
    }

    fn asked(&self) -> MutexGuard<'_, Option<Instant>> {
        lock(&self.asked)
    }
}
