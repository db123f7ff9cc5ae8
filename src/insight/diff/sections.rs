//! The differences as tables, for text and Markdown.

use super::Diff;
use super::objects::Change;

/// The most paths of fields in a row.
const MOST_FIELDS: usize = 4;

/// One kind of differences.
pub(super) struct Section {
    pub title: &'static str,
    /// The number of differences, in words.
    pub count: String,
    pub header: &'static [&'static str],
    pub rows: Vec<Line>,
}

/// A row of a table.
pub(super) struct Line {
    pub change: Change,
    pub cells: Vec<String>,
}

/// Returns the kinds of which there are differences.
pub(super) fn sections(diff: &Diff) -> Vec<Section> {
    let all = [
        Section {
            title: "Objects",
            count: counted(diff.objects.len(), "object"),
            header: &["CHANGE", "KIND", "NAME", "FIELDS"],
            rows: objects(diff),
        },
        Section {
            title: "Services",
            count: counted(diff.services.len(), "service"),
            header: &["SERVICE", "FRONTEND, ENDPOINT", "BEFORE", "AFTER"],
            rows: services(diff),
        },
        Section {
            title: "Reachability",
            count: counted(diff.reachability.len(), "pair"),
            header: &["FROM", "TO", "BEFORE", "AFTER"],
            rows: reachability(diff),
        },
        Section {
            title: "Operations",
            count: counted(diff.operations.unwrap_or_default(), "operation"),
            header: &["TABLE", "OPERATIONS"],
            rows: operations(diff),
        },
    ];
    let mut all = Vec::from(all);
    all.retain(|section| !section.rows.is_empty());
    all
}

/// Returns what differs, in one line.
pub(super) fn summary(sections: &[Section]) -> String {
    let counts: Vec<&str> = sections.iter().map(|section| &*section.count).collect();
    match counts.is_empty() {
        true => "no differences".to_owned(),
        false => counts.join(", "),
    }
}

/// Returns what is compared, in one line.
pub(super) fn compared(diff: &Diff, name: impl Fn(&str) -> String) -> String {
    let [a, b] = diff.sides.each_ref().map(|side| name(side));
    match diff.node.is_empty() {
        true => format!("{a} -> {b}"),
        false => format!("{a} -> {b}, on {}", name(&diff.node)),
    }
}

/// Returns what to know about the answer, a line each.
pub(super) fn notes(diff: &Diff) -> impl Iterator<Item = String> {
    let not = diff.not_compared.iter();
    let not = not.map(|what| format!("not compared: {what}"));
    let assumed = diff.assumptions.iter();
    not.chain(assumed.map(|what| format!("assumed: {what}")))
}

fn counted(count: usize, what: &str) -> String {
    match count {
        1 => format!("1 {what}"),
        many => format!("{many} {what}s"),
    }
}

fn objects(diff: &Diff) -> Vec<Line> {
    let rows = diff.objects.iter().map(|object| {
        let name = match object.namespace.is_empty() {
            true => object.name.clone(),
            false => format!("{}/{}", object.namespace, object.name),
        };
        let shown = object.fields.iter().take(MOST_FIELDS).cloned();
        let mut fields = shown.collect::<Vec<_>>().join(", ");
        if let Some(more @ 1..) = object.fields.len().checked_sub(MOST_FIELDS) {
            fields.push_str(&format!(" and {more} more"));
        }
        let change = object.change;
        Line {
            change,
            cells: vec![
                change.word().to_owned(),
                object.kind.to_owned(),
                name,
                fields,
            ],
        }
    });
    rows.collect()
}

fn services(diff: &Diff) -> Vec<Line> {
    let mut rows = Vec::new();
    for service in &diff.services {
        if service.before != service.after {
            let ends = [&service.name, ""];
            rows.push(line(ends, &service.before, &service.after));
        }
        for part in service.frontends.iter().chain(&service.endpoints) {
            let ends = [&*service.name, &part.at];
            rows.push(line(ends, &part.before, &part.after));
        }
    }
    rows
}

fn reachability(diff: &Diff) -> Vec<Line> {
    let rows = diff.reachability.iter();
    let rows = rows.map(|pair| line([&*pair.from, &pair.to], &pair.before, &pair.after));
    rows.collect()
}

fn operations(diff: &Diff) -> Vec<Line> {
    let rows = diff.tables.iter().map(|(table, count)| Line {
        change: Change::Changed,
        cells: vec![table.clone(), count.to_string()],
    });
    rows.collect()
}

fn line(ends: [&str; 2], before: &Option<String>, after: &Option<String>) -> Line {
    let shown = [before, after].map(|it| it.as_deref().unwrap_or("-"));
    let cells = ends.into_iter().chain(shown).map(str::to_owned);
    Line {
        change: Change::of(before.as_ref(), after.as_ref()),
        cells: cells.collect(),
    }
}
