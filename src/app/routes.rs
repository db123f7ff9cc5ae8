//! The thread that sends the host's routes to the controller.

use std::sync::Arc;
use std::thread;
use std::time::{Duration, Instant};

use tokio::sync::mpsc;

use super::follow::{Notifications, follow};
use super::{Error, system};
use crate::host::routes;
use crate::model::{Delivery, Event, HostRoute};
use crate::netlink::RouteMonitor;

/// The shortest time between two readings of the routes.
const BETWEEN_READINGS: Duration = Duration::from_millis(200);

/// Sends the routes as the first event of a channel, and starts the thread that sends them again when
/// they change. It ends with the process.
///
/// # Errors
///
/// When the system refuses the thread.
pub(super) fn start(events: &mpsc::Sender<Delivery>, once: bool) -> Result<(), Error> {
    let mut changes = RouteChanges::new(events);
    if let Err(error) = changes.send() {
        tracing::warn!("{error}");
    }
    if once {
        return Ok(());
    }
    thread::Builder::new()
        .name("routes".into())
        .spawn(move || follow(changes))
        .map(drop)
        .map_err(system("the thread that follows the host's routes"))
}

/// Sends the routes when they change.
struct RouteChanges {
    /// Weak, so that the channel ends with the source of objects.
    events: mpsc::WeakSender<Delivery>,
    monitor: Option<RouteMonitor>,
    sent: Option<Arc<[HostRoute]>>,
}

impl RouteChanges {
    fn new(events: &mpsc::Sender<Delivery>) -> Self {
        Self {
            events: events.downgrade(),
            monitor: None,
            sent: None,
        }
    }

    /// Reads the routes and sends them if they are others than those sent last.
    fn send(&mut self) -> Result<(), Error> {
        let routes = routes::direct().map_err(Error::Routes)?;
        // Without a sender the process is about to end.
        if self.sent.as_ref() != Some(&routes)
            && let Some(events) = self.events.upgrade()
        {
            let delivery = Delivery::now(Event::Routes(routes.clone()));
            if events.blocking_send(delivery).is_ok() {
                self.sent = Some(routes);
            }
        }
        Ok(())
    }
}

impl Notifications for RouteChanges {
    const ABOUT: &'static str = "changes of the host's routes";

    fn listen(&mut self) -> Result<(), Error> {
        self.monitor = Some(RouteMonitor::open()?);
        self.send()
    }

    fn wait(&mut self) -> Result<(), Error> {
        let Some(monitor) = &mut self.monitor else {
            return self.listen();
        };
        monitor.wait()?;
        let started = Instant::now();
        self.send()?;
        // Reading takes a fifth of the time at most, however many routes there are.
        thread::sleep(BETWEEN_READINGS.max(started.elapsed() * 4));
        Ok(())
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn routes_are_sent_once_until_they_change() {
        let (events, mut received) = mpsc::channel(4);
        let mut changes = RouteChanges::new(&events);
        changes.send().unwrap();
        changes.send().unwrap();
        changes.sent = Some(Arc::new([HostRoute {
            network: "192.0.2.0/24".parse().unwrap(),
            interface: "none".into(),
        }]));
        changes.send().unwrap();
        drop(events);
        changes.sent = None;
        changes.send().unwrap();
        let count = std::iter::from_fn(|| received.blocking_recv())
            .inspect(|delivery| assert!(matches!(delivery.event, Event::Routes(_))))
            .count();
        assert_eq!(count, 2, "and the channel has ended");
    }
}
