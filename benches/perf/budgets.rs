//! The budgets of all scenes: `budgets.txt`.

use std::fmt;

use serde::Serialize;

use crate::report::Value;

const TEXT: &str = include_str!("budgets.txt");

/// A bound of a quantity.
#[derive(Clone, Debug, Serialize)]
pub struct Budget {
    #[serde(skip)]
    what: String,
    #[serde(skip)]
    of: String,
    /// Whether the value must be at least the bound; at most, otherwise.
    at_least: bool,
    bound: Value,
    /// Why it may be missed, where that is known.
    #[serde(skip_serializing_if = "Option::is_none")]
    reason: Option<&'static str>,
}

impl Budget {
    /// Returns whether a value is within the bound. Words are: they stand for a comparison whose
    /// other side took too long.
    pub fn admits(&self, value: &Value) -> bool {
        match (value.number(), self.bound.number()) {
            (Some(value), Some(bound)) if self.at_least => value >= bound,
            (Some(value), Some(bound)) => value <= bound,
            _ => true,
        }
    }
}

/// The bound; with `#` all of the budget.
impl fmt::Display for Budget {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        if f.alternate() {
            write!(f, "{}, {} ", self.what, self.of)?;
        }
        write!(
            f,
            "{} {}",
            if self.at_least { ">=" } else { "<=" },
            self.bound
        )?;
        match self.reason {
            Some(reason) if f.alternate() => write!(f, " ({reason})"),
            _ => Ok(()),
        }
    }
}

/// The budgets of a scene.
#[derive(Debug)]
pub struct Budgets(Vec<Budget>);

/// Returns the budgets of a scene.
pub fn of(scene: &str) -> Budgets {
    let lines = TEXT
        .lines()
        .filter(|line| !line.is_empty() && !line.starts_with('#'));
    let parse = |line: &'static str| {
        let [of_scene, what, of, bound, reason @ ..] = &*line.split(" | ").collect::<Vec<_>>()
        else {
            panic!("a budget has four parts or five: {line}");
        };
        let reason = reason.first().copied();
        let (sign, bound) = bound
            .split_once(' ')
            .expect("a bound is <= or >=, and a value");
        let budget = |of: &str| Budget {
            what: (*what).to_owned(),
            of: of.to_owned(),
            at_least: sign == ">=",
            bound: value(bound),
            reason,
        };
        let found: Vec<Budget> = of.split("; ").map(budget).collect();
        (*of_scene == scene).then_some(found)
    };
    Budgets(lines.filter_map(parse).flatten().collect())
}

/// Parses a value with its unit.
fn value(text: &str) -> Value {
    let (number, unit) = text.split_once(' ').unwrap_or((text, ""));
    let number: f64 = number.parse().expect("the value of a budget is a number");
    match unit {
        "s" => Value::Seconds(number),
        "ms" => Value::Seconds(number / 1e3),
        "MiB" => Value::Bytes(number * f64::from(1 << 20)),
        "of" => Value::Ratio(number),
        "" => Value::Number(number),
        unit => panic!("budgets have no unit {unit}"),
    }
}

impl Budgets {
    /// Returns the first budget of a quantity.
    pub fn find(&self, what: &str, of: &str) -> Option<Budget> {
        let fits = |it: &&Budget| it.what == what && matches(&it.of, of);
        let found = self.0.iter().find(fits);
        found.map(|budget| Budget {
            of: of.to_owned(),
            ..budget.clone()
        })
    }

    /// Returns those without a pattern whose quantities were not measured.
    pub fn unmeasured(&self, measured: impl Fn(&str, &str) -> bool) -> Vec<String> {
        let expected = self.0.iter().filter(|budget| !budget.of.contains('*'));
        let unmeasured = expected.filter(|budget| !measured(&budget.what, &budget.of));
        unmeasured
            .map(|budget| format!("{}, {}", budget.what, budget.of))
            .collect()
    }
}

/// Returns whether a text is of a pattern, in which `*` stands for any text.
fn matches(pattern: &str, text: &str) -> bool {
    let mut parts = pattern.split('*');
    let first = parts.next().unwrap_or_default();
    let Some(mut rest) = text.strip_prefix(first) else {
        return false;
    };
    let mut parts: Vec<&str> = parts.collect();
    let Some(last) = parts.pop() else {
        return rest.is_empty();
    };
    for part in parts {
        let Some((_, behind)) = rest.split_once(part) else {
            return false;
        };
        rest = behind;
    }
    rest.ends_with(last)
}
