//! A headless Chromium, driven by the WebDriver protocol.

use std::io::{self, BufRead, BufReader, Read, Write};
use std::net::TcpStream;
use std::path::{Path, PathBuf};
use std::process::{Child, Command, Stdio};
use std::time::Duration;

use serde_json::{Value, json};
use tempfile::TempDir;

const FLAGS: [&str; 9] = [
    "--headless",
    "--no-sandbox",
    "--disable-gpu",
    "--disable-quic",
    "--no-first-run",
    "--disable-background-networking",
    "--disable-component-update",
    "--disable-sync",
    // A container's /dev/shm is small.
    "--disable-dev-shm-usage",
];

/// Reached by a test that fails, and by no other.
const PATIENCE: Duration = Duration::from_secs(60);

/// The name of an element's reference, by the standard.
const ELEMENT: &str = "element-6066-11e4-a52e-4f735466cecf";

/// A browser with one window, which is closed in the end.
pub struct Browser {
    driver: Child,
    port: u16,
    session: String,
    _profile: TempDir,
}

/// Returns a program of `PATH`.
fn program(name: &str) -> Option<PathBuf> {
    let path = std::env::var_os("PATH")?;
    let mut all = std::env::split_paths(&path).map(|folder| folder.join(name));
    all.find(|file| file.is_file())
}

impl Browser {
    /// Starts one; `None` if it is not installed.
    pub fn start() -> Option<Self> {
        let (chromium, driver) = (program("chromium")?, program("chromedriver")?);
        let profile = tempfile::tempdir().expect("a directory");
        let mut driver = Command::new(driver)
            .arg("--port=0")
            .stdout(Stdio::piped())
            .stderr(Stdio::null())
            .spawn()
            .expect("chromedriver starts");
        let output = BufReader::new(driver.stdout.take().expect("its output"));
        let lines = output.lines().map(|line| line.expect("a line"));
        let port = lines
            .filter_map(|line| {
                line.rsplit_once("successfully on port ")?
                    .1
                    .trim_end_matches('.')
                    .parse()
                    .ok()
            })
            .next()
            .expect("the port of chromedriver");
        let mut browser = Self {
            driver,
            port,
            session: String::new(),
            _profile: profile,
        };
        let folder = format!("--user-data-dir={}", browser._profile.path().display());
        let flags: Vec<&str> = FLAGS.into_iter().chain([&*folder]).collect();
        let wanted = json!({
            "goog:chromeOptions": { "binary": chromium, "args": flags },
            "goog:loggingPrefs": { "browser": "ALL" },
        });
        let body = json!({ "capabilities": { "alwaysMatch": wanted } });
        let session = browser.request("POST", "", &body);
        browser.session = session["sessionId"].as_str().expect("a session").to_owned();
        Some(browser)
    }

    /// Sends a command, and returns its answer.
    fn send(&self, method: &str, command: &str, body: &Value) -> io::Result<Value> {
        let mut stream = TcpStream::connect(("127.0.0.1", self.port))?;
        // A browser that hangs must not stop all tests.
        stream.set_read_timeout(Some(PATIENCE))?;
        let session = match self.session.as_str() {
            "" => String::new(),
            session => format!("/{session}"),
        };
        let body = body.to_string();
        write!(
            stream,
            "{method} /session{session}{command} HTTP/1.1\r\nHost: localhost\r\nConnection: close\r\n\
             Content-Type: application/json\r\nContent-Length: {}\r\n\r\n{body}",
            body.len()
        )?;
        let mut reader = BufReader::new(stream);
        let mut length = 0;
        loop {
            let mut line = String::new();
            reader.read_line(&mut line)?;
            match line.trim_end().split_once(':') {
                Some((name, value)) if name.eq_ignore_ascii_case("content-length") => {
                    length = value.trim().parse().map_err(io::Error::other)?;
                }
                None if line.trim_end().is_empty() => break,
                _ => {}
            }
        }
        let mut answer = Vec::new();
        reader.take(length).read_to_end(&mut answer)?;
        Ok(serde_json::from_slice(&answer)?)
    }

    /// Sends a command, and returns its value.
    fn request(&self, method: &str, command: &str, body: &Value) -> Value {
        let mut answer = self.send(method, command, body).expect("an answer");
        let value = answer["value"].take();
        assert!(
            value.get("error").is_none(),
            "{method} {command}: {value:#}"
        );
        value
    }

    fn post(&self, command: &str, body: Value) -> Value {
        self.request("POST", command, &body)
    }

    /// Opens a file.
    pub fn open(&self, file: &Path) {
        self.post(
            "/url",
            json!({ "url": format!("file://{}", file.display()) }),
        );
    }

    /// Runs the body of a function, and returns its result.
    pub fn run(&self, script: &str) -> Value {
        self.post("/execute/sync", json!({ "script": script, "args": [] }))
    }

    fn element(&self, selector: &str) -> String {
        let body = json!({ "using": "css selector", "value": selector });
        let found = self.post("/element", body);
        found[ELEMENT].as_str().expect("an element").to_owned()
    }

    /// Clicks where an element is.
    pub fn click(&self, selector: &str) {
        let element = self.element(selector);
        self.post(&format!("/element/{element}/click"), json!({}));
    }

    /// Types into an element what replaces its text.
    pub fn fill(&self, selector: &str, text: &str) {
        let element = self.element(selector);
        self.post(&format!("/element/{element}/clear"), json!({}));
        self.post(
            &format!("/element/{element}/value"),
            json!({ "text": text }),
        );
    }

    /// Returns the text that an element shows.
    pub fn text(&self, selector: &str) -> String {
        let element = self.element(selector);
        let text = self.request("GET", &format!("/element/{element}/text"), &json!({}));
        text.as_str().expect("a text").to_owned()
    }

    /// Shows pages as a phone does, in the dark or not.
    pub fn be_a_phone(&self, scheme: &str) {
        let metrics =
            json!({ "width": 390, "height": 844, "deviceScaleFactor": 2, "mobile": true });
        self.debug("Emulation.setDeviceMetricsOverride", metrics);
        let features = json!([{ "name": "prefers-color-scheme", "value": scheme }]);
        self.debug(
            "Emulation.setEmulatedMedia",
            json!({ "features": features }),
        );
    }

    /// Shows pages as printed.
    pub fn be_a_printer(&self) {
        self.debug("Emulation.setEmulatedMedia", json!({ "media": "print" }));
    }

    fn debug(&self, command: &str, parameters: Value) {
        let body = json!({ "cmd": command, "params": parameters });
        self.post("/goog/cdp/execute", body);
    }

    /// Returns what was written to the console since the last call.
    pub fn console(&self) -> Vec<Value> {
        let log = self.post("/se/log", json!({ "type": "browser" }));
        log.as_array().expect("a list").clone()
    }
}

impl Drop for Browser {
    fn drop(&mut self) {
        // Without this the browser would outlive its driver.
        let _ = self.send("DELETE", "", &json!({}));
        let _ = self.driver.kill();
        let _ = self.driver.wait();
    }
}
