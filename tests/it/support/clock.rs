//! A clock that only tests advance, for the chains that are kept for a while.

use nftlet::netlink::Nftables;
use nftlet::sync::{Controller, Engines};
use tokio::runtime::{Builder, Runtime};
use tokio::time::sleep_until;

/// Returns a runtime whose clock stands still. It is in effect where the runtime is entered.
pub fn paused() -> Runtime {
    Builder::new_current_thread()
        .enable_time()
        .start_paused(true)
        .build()
        .expect("a runtime")
}

/// Advances the clock until the shared chains that are unused now expire, and removes them.
pub fn remove_unused_chains(clock: &Runtime, controller: &mut Controller<'_, Nftables>) {
    while let Some(due) = controller.due() {
        clock.block_on(sleep_until(due.into()));
        controller.work(Engines::SERVICES);
    }
}
