use serde_json::json;

use super::*;

/// What is handed out, and the faults.
fn documents(text: &str) -> (Vec<String>, Vec<SyntaxFault>) {
    let (mut seen, mut faults) = (Vec::new(), Vec::new());
    for document in yaml_documents(text) {
        let mut take = |number, item: Captured| seen.push(format!("{number} {}", item.value));
        match document.read(&mut take) {
            Ok(root) => {
                let kind = root.value.get("kind").and_then(Value::as_str);
                seen.push(format!("{} {}", kind.unwrap_or("?"), document.start.line));
            }
            Err(fault) => faults.push(fault),
        }
    }
    (seen, faults)
}

fn value(text: &str) -> Captured {
    let document = yaml_documents(text).pop().expect("a document");
    document.read(&mut |_, _| {}).expect("YAML")
}

/// The places of some paths.
fn positions(document: &Document<'_>, paths: &[&str]) -> Vec<(u64, u64)> {
    let found = document.positions(paths.iter().map(ToString::to_string));
    let place = |path: &&str| (found[*path].line, found[*path].column);
    paths.iter().map(place).collect()
}

#[test]
fn documents_are_cut_at_marker_lines_only() {
    let text = "# head\n---\na: 1\n--- # second\nb: |\n  x\n---not: a marker\n---\r\n# nothing\n---\n\
                c: 1\n...\nd: 1\n";
    let lines: Vec<u64> = yaml_documents(text)
        .iter()
        .map(|document| document.start.line)
        .collect();
    assert_eq!(lines, [2, 4, 10, 13]);
}

#[test]
fn items_come_before_the_rest_of_their_list() {
    let (seen, faults) =
        documents("apiVersion: v1\nitems:\n- a: 1\n-   b: 2\nkind: List\n---\nkind: Node\n");
    assert!(faults.is_empty(), "{faults:?}");
    assert_eq!(seen, [r#"0 {"a":1}"#, r#"1 {"b":2}"#, "List 1", "Node 6"]);
}

#[test]
fn a_syntax_error_spoils_what_follows_in_its_own_document_only() {
    let (seen, faults) = documents("kind: A\n---\nkind: B\n bad:\n---\nkind: C\n");
    assert_eq!(seen, ["A 1", "C 5"]);
    let lines: Vec<_> = faults
        .iter()
        .map(|fault| (fault.at.line, fault.at.column))
        .collect();
    assert_eq!(lines, [(4, 5)], "{faults:?}");
    let (seen, faults) = documents("items:\n- {a: 1}\n- {b: [}\n---\nkind: C\n");
    assert_eq!(seen, [r#"0 {"a":1}"#, "C 4"]);
    assert_eq!(faults.len(), 1, "{faults:?}");
}

#[test]
fn scalars_have_the_types_that_the_api_server_sees() {
    let read =
        value("a: 80\nb: '80'\nc: 0x10\nd: yes\ne: ~\nf:\ng: 99999999999999999999\nh: !!str 80\n");
    let wanted = json!({"a": 80, "b": "80", "c": 16, "d": true, "e": null, "f": null,
        "g": i64::MAX, "h": "80"});
    assert_eq!(read, wanted.into());
}

#[test]
fn the_own_field_comes_before_that_of_a_base_and_the_first_base_before_others() {
    let read = value(
        "a: &a {name: a, number: 1}\nb: &b {name: b, number: 2, flag: yes}\n\
         <<: [*a, *b]\nname: own\nlist: [*a]\n",
    );
    let a = json!({"name": "a", "number": 1});
    let b = json!({"name": "b", "number": 2, "flag": true});
    let wanted = json!({"a": a, "b": b, "name": "own", "number": 1, "flag": true, "list": [a]});
    assert_eq!(read, wanted.into());
}

#[test]
fn a_field_that_is_there_twice_is_noted_with_its_path() {
    let read = value("a: 1\nspec:\n  ports: [{port: 1}, {port: 2, port: 3}]\n");
    assert_eq!(read.twice.as_deref(), Some("spec.ports[1].port"));
    assert_eq!(value("a: {b: 1}\nb: 1\n").twice, None);
}

#[test]
fn positions_are_those_of_the_file() {
    let text = "---\na: &a\n  b: [1, {c: 2}]\na-c: *a\n---\nd: 1\n--- {e: [{f: 1}], g: 1}\n";
    let documents = yaml_documents(text);
    assert_eq!(
        positions(&documents[0], &["a.b[1].c", "a.x", "a.b[0]", "a-c"]),
        [(3, 14), (1, 1), (3, 7), (4, 6)]
    );
    assert_eq!(
        positions(&documents[2], &["g", "e[0].f"]),
        [(7, 22), (7, 14)]
    );
    assert_eq!(positions(&documents[2], &[""]), [(7, 5)]);
}

#[test]
fn json_is_cut_between_its_values() {
    let (documents, fault) = json_documents("{\"a\": 1}\n\n {\"b\":\n [2]} 3 {]");
    let starts: Vec<_> = documents
        .iter()
        .map(|document| (document.start.line, document.start.column))
        .collect();
    assert_eq!(starts, [(1, 1), (3, 2), (4, 7)]);
    assert_eq!(positions(&documents[1], &["b[0]"]), [(4, 3)]);
    assert_eq!(positions(&documents[1], &[""]), [(3, 2)]);
    let fault = fault.expect("it is no JSON");
    let at = Position {
        line: 4,
        column: 10,
    };
    assert_eq!(fault.at, at);
}

/// Lines that each refer to the line before.
fn bomb(lines: usize, references: impl Fn(usize) -> String) -> String {
    let line = |n: usize| match n {
        0 => "a0: &a0 {name: x}\n".to_owned(),
        _ => format!("a{n}: &a{n} {}\n", references(n - 1)),
    };
    (0..lines).map(line).collect()
}

#[test]
fn aliases_stand_for_so_much_and_nest_so_deep_and_no_more() {
    let laughs = |n: usize| format!("[{}]", vec![format!("*a{n}"); 10].join(", "));
    let merges = |n: usize| format!("{{<<: *a{n}, k{n}: x}}");
    let chain = |n: usize| format!("[*a{n}]");
    let long = format!(
        "a: &a {}\nb: [{}]\n",
        "x".repeat(1 << 20),
        "*a, ".repeat(20)
    );
    for text in [
        bomb(12, laughs),
        bomb(5_000, merges),
        bomb(100_000, chain),
        long,
    ] {
        let (seen, faults) = documents(&text);
        assert_eq!(seen, Vec::<String>::new());
        let message = &faults[0].message;
        assert!(
            message.contains("or aliases expand to more than"),
            "{message}"
        );
    }
    for text in [bomb(5, laughs), bomb(60, merges), bomb(60, chain)] {
        let (seen, faults) = documents(&text);
        assert!(faults.is_empty() && seen.len() == 1, "{faults:?}");
    }
    let pods: String = (0..20_000).map(|_| "- *pod\n").collect();
    let read = value(&format!("base: &pod {{name: a}}\nlist:\n{pods}"));
    let list = read.value.get("list").and_then(Value::as_array);
    assert_eq!(list.map(Vec::len), Some(20_000));
}

#[test]
fn values_nest_so_deep_and_no_more() {
    let nested = |depth: usize| format!("{}{}", "[".repeat(depth), "]".repeat(depth));
    assert!(documents(&nested(DEEPEST)).1.is_empty());
    let fault = documents(&nested(DEEPEST + 1)).1.pop();
    assert!(fault.is_some_and(|fault| fault.message.contains("nest more than 64 deep")));
    let maps: String = (0..DEEPEST)
        .map(|depth| format!("{}k:\n", " ".repeat(depth)))
        .collect();
    assert!(documents(&maps).1.is_empty());
}
