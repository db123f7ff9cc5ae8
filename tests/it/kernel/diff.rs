//! `nftlet diff kernel`: the tables in force against the rules compiled from objects.

use std::process::Output;

use crate::support::manifests::CLUSTER_CIDR;
use crate::support::objects::policy;
use crate::support::shop::Shop;
use nftlet_lab::netns::require_net_admin;
use serde_json::{Value, json};

fn diff(shop: &Shop, sides: [&str; 2]) -> (Option<i32>, Value) {
    let more = [
        "--hostname-override=node-1",
        "--cluster-cidr",
        CLUSTER_CIDR,
        "-o=json",
    ];
    let mut command = shop.node().command(env!("CARGO_BIN_EXE_nftlet"));
    command.arg("diff").args(sides).args(more);
    let output: Output = command.output().expect("nftlet runs");
    let diff = serde_json::from_slice(&output.stdout);
    let diff = diff.unwrap_or_else(|error| panic!("{error}: {output:?}"));
    (output.status.code(), diff)
}

#[test]
fn the_kernel_equals_what_it_was_given_until_it_is_changed() {
    if !require_net_admin() {
        return;
    }
    let shop = Shop::open();
    let spec = json!({ "podSelector": { "matchLabels": { "app": "web" } } });
    shop.put_and_apply(&policy("web", spec));
    let path = shop.manifests.path().to_str().expect("UTF-8");
    for sides in [["kernel", path], [path, "kernel"]] {
        let (code, same) = diff(&shop, sides);
        assert_eq!(code, Some(0), "{same:#}");
        assert_eq!(same["operations"], 0);
        let said = same["notCompared"][0].as_str().expect("a line");
        assert!(said.contains("the kernel has only rules"), "{said}");
    }
    shop.node().nft(&["add", "chain", "ip", "nftlet", "other"]);
    shop.node().nft(&[
        "flush",
        "chain",
        "ip",
        "nftlet-policy",
        "policy-ingress-shop/web",
    ]);
    for sides in [["kernel", path], [path, "kernel"]] {
        let (code, other) = diff(&shop, sides);
        assert_eq!(code, Some(3), "{other:#}");
    }
    shop.apply();
    let (code, same) = diff(&shop, ["kernel", path]);
    assert_eq!(code, Some(0), "{same:#}");
}
