//! The page of `nftlet reach` in a browser.

use std::fs;
use std::process::Command;

use crate::support::browser::Browser;
use crate::support::skip::skip;
use serde_json::json;

const OBJECTS: &str = "tests/fixtures/insight/shop.yaml";

#[test]
fn the_page_of_reach_works_in_a_browser() {
    let Some(browser) = Browser::start() else {
        skip("chromium", "chromium and chromedriver are not installed");
        return;
    };
    let output = Command::new(env!("CARGO_BIN_EXE_nftlet"))
        .args(["reach", "-o=html", "--manifests", OBJECTS])
        .output()
        .expect("nftlet runs");
    assert!(output.status.success(), "{output:?}");
    let folder = tempfile::tempdir().expect("a directory");
    let file = folder.path().join("reach.html");
    fs::write(&file, &output.stdout).expect("the page is written");
    browser.open(&file);

    let rows = || browser.run("return document.querySelectorAll('tbody tr').length");
    let cells = || browser.run("return document.querySelectorAll('tbody button').length");
    assert_eq!((rows(), cells()), (json!(6), json!(36)));
    let text = browser.text("tbody");
    assert!(text.starts_with("monitoring/prometheus"), "{text}");

    // A search narrows the matrix.
    browser.fill("#from", "SHOP ca");
    assert_eq!((rows(), cells()), (json!(1), json!(6)));
    browser.fill("#to", "web");
    assert_eq!((rows(), cells()), (json!(1), json!(1)));
    assert_eq!(browser.text("#shown"), "1 of 6 rows, 1 of 6 columns");

    // A click shows the reason.
    browser.click("tbody button");
    let why = browser.text("#why");
    for part in [
        "shop/cart => shop/web",
        "No Connections",
        "egress allowed All Connections: NetworkPolicy shop/cart-egress rule 1 allows this",
        "ingress denied TCP 8080: NetworkPolicy shop/deny-web, web-from-gateway select the \
         destination and no rule allows this; nearest: shop/web-from-gateway rule 1: port 8080 matches, \
         podSelector app=gateway does not",
    ] {
        assert!(why.contains(part), "{why}");
    }
    browser.fill("#from", "nothing");
    assert_eq!(rows(), json!(0));
    browser.fill("#from", "");
    browser.fill("#to", "");
    assert_eq!(cells(), json!(36));

    // On a phone, in the dark: nothing is wider than the screen but the matrix, which scrolls.
    browser.be_a_phone("dark");
    let colours = browser.run(
        "const style = getComputedStyle(document.body); return [style.backgroundColor, style.color]",
    );
    assert_eq!(colours, json!(["rgb(13, 17, 23)", "rgb(230, 237, 243)"]));
    let width = browser.run("return [innerWidth, document.documentElement.scrollWidth]");
    assert_eq!(width, json!([390, 390]));
    browser.click("tbody tr:nth-child(4) td:nth-of-type(5) button");
    let why = browser.text("#why");
    assert!(why.contains("shop/gateway => shop/web\nTCP 8080"), "{why}");
    let seen = browser.run(
        "const box = document.getElementById('why').getBoundingClientRect(); \
         return box.top >= 0 && box.bottom <= innerHeight",
    );
    assert_eq!(seen, json!(true), "the reason is on the screen");
    browser.be_a_phone("light");
    let colour = browser.run("return getComputedStyle(document.body).backgroundColor");
    assert_eq!(colour, json!("rgb(255, 255, 255)"));

    browser.be_a_printer();
    let form = browser.run("return getComputedStyle(document.querySelector('form')).display");
    assert_eq!(form, json!("none"));

    let requests = browser.run("return performance.getEntriesByType('resource').length");
    assert_eq!(requests, json!(0), "the page needs no network");
    assert_eq!(browser.console(), Vec::<serde_json::Value>::new());
}
