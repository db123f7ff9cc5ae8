//! Reports the bridges on which traffic between isolated pods bypasses network policies.

use std::net::IpAddr;
use std::time::Duration;

use tokio::sync::watch;
use tokio::time::{MissedTickBehavior, interval};

use super::FollowerMetrics;
use crate::host::addresses;
use crate::host::bridges::{BridgeChange, BridgeWatch};
use crate::model::{Notice, Reason, Subject};
use crate::policies::Isolated;
use crate::sync::{LogAndSend, Reporter};

/// The interval between two looks at the bridges while the isolated pods stay the same.
const INTERVAL: Duration = Duration::from_secs(60);

/// Reports where traffic of isolated pods begins and ceases to bypass their policies, until the
/// sender of the isolated pods is dropped.
pub(crate) async fn watch(
    mut isolated: watch::Receiver<Isolated>,
    metrics: FollowerMetrics,
    reporter: LogAndSend,
) {
    let mut watch = BridgeWatch::new("/");
    let mut again = interval(INTERVAL);
    again.set_missed_tick_behavior(MissedTickBehavior::Delay);
    loop {
        tokio::select! {
            changed = isolated.changed() => {
                if changed.is_err() {
                    return;
                }
            }
            _ = again.tick() => {}
        }
        let pods: Vec<IpAddr> = {
            let isolated = isolated.borrow_and_update();
            isolated.iter().map(|(address, _)| *address).collect()
        };
        for change in watch.check(&addresses::attached(), &pods) {
            match change {
                BridgeChange::Begins(unfiltered) => {
                    reporter.notice(&Notice {
                        subject: Subject::Other(format!("bridge {}", unfiltered.bridge).into()),
                        reason: Reason::BridgeTraffic,
                        message: unfiltered.to_string(),
                    });
                }
                BridgeChange::Ends(unfiltered) => reporter.ended(
                    Subject::Other(format!("bridge {}", unfiltered.bridge).into()),
                    Reason::BridgeTraffic,
                    &format!(
                        "pod-to-pod {} traffic no longer bypasses NetworkPolicy",
                        unfiltered.family()
                    ),
                ),
            }
        }
        for ipv6 in [false, true] {
            metrics.bridge_unfiltered(ipv6, watch.is_unfiltered(ipv6));
        }
    }
}
