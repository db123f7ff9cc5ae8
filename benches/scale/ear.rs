//! Hears when the kernel has taken over a transaction.
//!
//! The kernel tells its listeners of every change of a table when the transaction is committed:
//! the same news as `nft monitor` prints. A thread of its own notes when they come.

use std::sync::mpsc::{Receiver, RecvTimeoutError, channel};
use std::thread;
use std::time::{Duration, Instant};

use nftlet::compile::TABLE;
use nftlet::netlink::{Monitor, Nftables};
use nftlet::policy;

use crate::netns::Namespace;

/// Far beyond every budget.
const PATIENCE: Duration = Duration::from_secs(60);

/// Listens in a namespace until the benchmark ends.
pub struct Ear {
    news: Receiver<Instant>,
}

impl Ear {
    /// Begins to listen for changes of nftlet's tables.
    pub fn new(namespace: &Namespace) -> Self {
        let namespace = namespace.clone();
        let (sender, news) = channel();
        let (ready, listening) = channel();
        thread::spawn(move || {
            namespace.enter();
            // Whose changes are not told; it makes none.
            let own = Nftables::open().unwrap_or_else(|error| panic!("{error}"));
            let mut monitor = Monitor::new(&[TABLE, policy::TABLE], &own);
            monitor.listen().unwrap_or_else(|error| panic!("{error}"));
            let _ = ready.send(());
            // Both ways to hear, and losing news, mean that something was changed just now.
            while monitor.wait().is_ok() && sender.send(Instant::now()).is_ok() {}
        });
        listening.recv().expect("the thread listens");
        Self { news }
    }

    /// Forgets what was heard.
    pub fn forget(&self) {
        while self.news.try_recv().is_ok() {}
    }

    /// Waits until something is heard, and tells when.
    pub fn first(&self) -> Instant {
        let heard = self.news.recv_timeout(PATIENCE);
        heard.expect("every change that is measured changes a table")
    }

    /// The moment of the last news before nothing was heard for so long, if there were any.
    pub fn last(&self, quiet: Duration) -> Option<Instant> {
        let mut last = None;
        loop {
            match self.news.recv_timeout(quiet) {
                Ok(at) => last = Some(at),
                Err(RecvTimeoutError::Timeout) => return last,
                Err(RecvTimeoutError::Disconnected) => panic!("nobody listens any more"),
            }
        }
    }
}
