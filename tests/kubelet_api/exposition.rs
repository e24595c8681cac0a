//! A strict reader of Prometheus' text format 0.0.4: what it takes, every scraper does.

use std::collections::{BTreeMap, BTreeSet};

/// One line with a value.
#[derive(Clone, Debug, PartialEq)]
pub(crate) struct Sample {
    pub(crate) labels: BTreeMap<String, String>,
    pub(crate) value: f64,
    pub(crate) time: Option<i64>,
}

/// Samples of one name.
#[derive(Clone, Debug, Default, PartialEq)]
pub(crate) struct Family {
    pub(crate) kind: String,
    pub(crate) samples: Vec<Sample>,
}

/// Reads a text; families are whole, named once, typed and explained, and no series is there twice.
pub(crate) fn read(text: &str) -> Result<BTreeMap<String, Family>, String> {
    let mut families: BTreeMap<String, Family> = BTreeMap::new();
    let (mut current, mut helped) = (String::new(), String::new());
    let mut series = BTreeSet::new();
    if !text.is_empty() && !text.ends_with('\n') {
        return Err("no newline at the end".to_owned());
    }
    for line in text.lines() {
        let wrong = |what: &str| Err(format!("{what}: {line:?}"));
        if let Some(rest) = line.strip_prefix("# HELP ") {
            helped = rest.split(' ').next().unwrap_or_default().to_owned();
            if families.contains_key(&helped) {
                return wrong("a family in two pieces");
            }
        } else if let Some(rest) = line.strip_prefix("# TYPE ") {
            let Some((name, kind)) = rest.split_once(' ') else { return wrong("no type") };
            if name != helped || !is_name(name, true) || !matches!(kind, "counter" | "gauge") {
                return wrong("a bad type");
            }
            if (kind == "counter") != (name.ends_with("_total") || name == "container_memory_failcnt") {
                return wrong("a counter is named _total, and nothing else is");
            }
            current = name.to_owned();
            families.insert(current.clone(), Family { kind: kind.to_owned(), samples: Vec::new() });
        } else {
            let (name, sample) = read_sample(line).map_err(|what| format!("{what}: {line:?}"))?;
            if name != current {
                return wrong("a sample outside its family");
            }
            if !series.insert((name, sample.labels.clone())) {
                return wrong("a series twice");
            }
            if sample.value.is_nan() || sample.value < 0.0 {
                return wrong("a value below nothing");
            }
            families.get_mut(&current).unwrap().samples.push(sample);
        }
    }
    Ok(families)
}

fn is_name(name: &str, colons: bool) -> bool {
    let letter = |c: char| c.is_ascii_alphabetic() || c == '_' || (colons && c == ':');
    name.starts_with(letter) && name.chars().all(|c| letter(c) || c.is_ascii_digit())
}

fn read_sample(line: &str) -> Result<(String, Sample), &'static str> {
    let end = line.find(['{', ' ']).ok_or("no value")?;
    let (name, mut rest) = line.split_at(end);
    if !is_name(name, true) {
        return Err("a bad name");
    }
    let mut labels = BTreeMap::new();
    if let Some(inside) = rest.strip_prefix('{') {
        rest = inside;
        loop {
            let (label, value) = rest.split_once("=\"").ok_or("a label without a value")?;
            if !is_name(label, false) {
                return Err("a bad label");
            }
            let (value, after) = read_value(value)?;
            if labels.insert(label.to_owned(), value).is_some() {
                return Err("a label twice");
            }
            rest = after;
            match rest.as_bytes().first() {
                Some(b',') => rest = &rest[1..],
                Some(b'}') => break,
                _ => return Err("labels without an end"),
            }
        }
        rest = &rest[1..];
    }
    let mut words = rest.strip_prefix(' ').ok_or("no blank before the value")?.split(' ');
    let value = words.next().and_then(|word| word.parse().ok()).ok_or("a bad value")?;
    let time = words.next().map(|word| word.parse().map_err(|_| "a bad time")).transpose()?;
    if words.next().is_some() {
        return Err("more than a time");
    }
    Ok((name.to_owned(), Sample { labels, value, time }))
}

fn read_value(text: &str) -> Result<(String, &str), &'static str> {
    let mut value = String::new();
    let mut chars = text.char_indices();
    while let Some((at, c)) = chars.next() {
        match c {
            '"' => return Ok((value, &text[at + 1..])),
            '\\' => match chars.next() {
                Some((_, 'n')) => value.push('\n'),
                Some((_, c @ ('"' | '\\'))) => value.push(c),
                _ => return Err("a bad escape"),
            },
            c => value.push(c),
        }
    }
    Err("a value without an end")
}

#[test]
fn the_reader_is_strict() {
    let head = "# HELP a Text.\n# TYPE a gauge\n";
    assert!(read(&format!("{head}a 1\n")).is_ok());
    assert!(read(&format!("{head}a{{b=\"\\\"\\n\"}} 1.5 12\n")).is_ok());
    let bad =
        ["a 1", "b 1\n", "a{b=\"1\",} 1\n", "a{b=\"1\" 1\n", "a x\n", "a 1\na 2\n", "a 1 2 3\n", "a  1\n", "a -1\n"];
    for bad in bad {
        assert!(read(&format!("{head}{bad}")).is_err(), "{bad:?}");
    }
    assert!(read("a 1\n").is_err());
    assert!(read("# HELP a Text.\n# TYPE a counter\na 1\n").is_err());
    assert!(read(&format!("{head}a 1\n# HELP b T.\n# TYPE b gauge\nb 1\n{head}a 2\n")).is_err());
}
