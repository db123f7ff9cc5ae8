//! The result of a scene: tables of values. `scripts/bench-report.py` prints them beside the budgets.

use std::collections::BTreeMap;
use std::io;
use std::path::Path;
use std::process::{Command, Stdio};

use serde::{Serialize, Serializer};

/// A value with its unit.
#[derive(Clone, Debug, Serialize)]
pub enum Value {
    #[serde(rename = "s")]
    Seconds(f64),
    #[serde(rename = "B")]
    Bytes(f64),
    #[serde(rename = "B/s")]
    BytesPerSecond(f64),
    /// A count, or a mean of counts.
    #[serde(rename = "n")]
    Number(f64),
    #[serde(rename = "ratio")]
    Ratio(f64),
    /// Words, where there is no number.
    #[serde(untagged)]
    Text(String),
}

/// A line of a table. A budget is for the first of its values.
#[derive(Debug, Serialize)]
pub struct Row {
    /// The quantity.
    what: String,
    /// The cluster, or whatever else differs between rows of one quantity.
    of: String,
    /// Values with the names of their columns.
    #[serde(serialize_with = "as_map")]
    values: Vec<(&'static str, Value)>,
}

fn as_map<S: Serializer>(
    values: &[(&'static str, Value)],
    serializer: S,
) -> Result<S::Ok, S::Error> {
    serializer.collect_map(values.iter().map(|(name, value)| (name, value)))
}

impl Row {
    /// Adds another value, if there is one.
    pub fn and(&mut self, name: &'static str, value: impl Into<Option<Value>>) -> &mut Self {
        self.values.extend(value.into().map(|value| (name, value)));
        self
    }
}

#[derive(Debug, Serialize)]
pub struct Table {
    title: &'static str,
    /// The head of the column [`Row::of`].
    of: &'static str,
    rows: Vec<Row>,
}

impl Table {
    pub fn new(title: &'static str, of: &'static str) -> Self {
        let rows = Vec::new();
        Self { title, of, rows }
    }

    pub fn is_empty(&self) -> bool {
        self.rows.is_empty()
    }

    pub fn row(
        &mut self,
        what: impl Into<String>,
        of: impl ToString,
        name: &'static str,
        value: Value,
    ) -> &mut Row {
        self.rows.push(Row {
            what: what.into(),
            of: of.to_string(),
            values: vec![(name, value)],
        });
        self.rows.last_mut().expect("it was added")
    }
}

/// Everything that a scene measured.
#[derive(Debug, Serialize)]
pub struct Report {
    scene: &'static str,
    /// What the scene was asked for.
    pub parameters: BTreeMap<&'static str, String>,
    pub tables: Vec<Table>,
    /// Remarks below the tables.
    pub notes: Vec<String>,
}

impl Report {
    pub fn new<const N: usize>(
        scene: &'static str,
        parameters: [(&'static str, &dyn ToString); N],
    ) -> Self {
        let parameters = parameters.into_iter();
        Self {
            scene,
            parameters: parameters
                .map(|(name, value)| (name, value.to_string()))
                .collect(),
            tables: Vec::new(),
            notes: Vec::new(),
        }
    }

    /// Prints everything and writes it to a directory; returns whether every budget is met that was
    /// measured.
    ///
    /// # Errors
    ///
    /// When the script that does so cannot be started.
    pub fn conclude(&self, results: Option<&Path>) -> io::Result<bool> {
        let file = results.map(|directory| directory.join(self.scene).with_extension("json"));
        let mut script = Command::new(concat!(
            env!("CARGO_MANIFEST_DIR"),
            "/scripts/bench-report.py"
        ))
        .arg("scene")
        .args(file)
        .stdin(Stdio::piped())
        .spawn()?;
        serde_json::to_writer(script.stdin.take().expect("it is piped"), self)?;
        Ok(script.wait()?.success())
    }
}
