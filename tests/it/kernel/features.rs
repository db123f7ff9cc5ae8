//! The question about features at the start.

use nftlet::netlink::{Needs, Nftables};
use nftlet_lab::netns::{Namespace, require_net_admin};

#[test]
fn the_kernel_is_asked_for_features_and_keeps_nothing() {
    if !require_net_admin() {
        return;
    }
    let ns = Namespace::new("node");
    ns.run(|| {
        let mut nftables = Nftables::open().unwrap();
        let before = nftables.generation().unwrap();
        for (services, policies) in [(true, true), (true, false), (false, true)] {
            nftables.require(Needs { services, policies }).unwrap();
        }
        assert_eq!(nftables.generation().unwrap(), before);
    });
    assert_eq!(ns.nft(&["list", "ruleset"]), "");
}
