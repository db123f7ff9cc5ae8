//! The thread that receives notifications about changes that others make to nftlet's tables.

use std::sync::Arc;
use std::thread;

use tokio::sync::{Notify, oneshot};

use super::follow::{Notifications, follow};
use super::{Error, system};
use crate::netlink::{Monitor, Nftables, Notification};
use crate::policies;
use crate::services;

/// Starts the thread, which ends with the process.
pub(super) fn start(
    own: &mut Nftables,
    begin: oneshot::Receiver<()>,
    foreign: Arc<Notify>,
    missed: Arc<Notify>,
) -> Result<(), Error> {
    let monitor = Monitor::new(&[services::TABLE, policies::TABLE], own);
    own.mute_during_large_writes(monitor.muted());
    let listen = move || {
        if begin.blocking_recv().is_ok() {
            follow(ForeignChanges {
                monitor,
                foreign,
                missed,
            });
        }
    };
    thread::Builder::new()
        .name("monitor".into())
        .spawn(listen)
        .map(drop)
        .map_err(system("the thread that monitors the tables"))
}

/// Reports changes, and that notifications about them were missed.
struct ForeignChanges {
    monitor: Monitor,
    foreign: Arc<Notify>,
    missed: Arc<Notify>,
}

impl Notifications for ForeignChanges {
    const ABOUT: &'static str = "changes that others make to the rules";

    fn listen(&mut self) -> Result<(), Error> {
        self.monitor.listen()?;
        // Changes before were missed.
        self.missed.notify_one();
        Ok(())
    }

    fn wait(&mut self) -> Result<(), Error> {
        match self.monitor.wait()? {
            Notification::Changed => self.foreign.notify_one(),
            Notification::Lost => self.missed.notify_one(),
        }
        Ok(())
    }
}
