//! Words of the fake runtime as a script, for containers that are real.

/// A command that does what these words say; see the table of the fake runtime. It ends by the stop signal unless it is
/// `stubborn`, also as the first process of its namespace.
pub(crate) fn script(words: &str) -> Vec<String> {
    if words.is_empty() {
        return Vec::new();
    }
    if words == "missing" {
        return vec!["/missing".to_owned()];
    }
    let mut lines = vec!["trap 'exit 143' TERM".to_owned()];
    let mut ends = false;
    let mut rest = words.split_whitespace();
    while let Some(word) = rest.next() {
        let mut argument = || rest.next().expect("a word after it");
        lines.push(match word {
            "print" => format!("echo {}", argument()),
            "warn" => format!("echo {} >&2", argument()),
            // A shell runs its traps between commands, so it must not wait for a long one itself.
            "sleep" => {
                let milliseconds: u32 = argument().parse().expect("milliseconds");
                format!("sleep {}.{:03} & wait $!", milliseconds / 1000, milliseconds % 1000)
            }
            "exit" => {
                ends = true;
                format!("exit {}", argument())
            }
            "stubborn" => "trap '' TERM".to_owned(),
            "listen" => format!("nc -ll -p {} -e cat &", argument()),
            other => panic!("no script does {other:?}"),
        });
    }
    if !ends {
        lines.push("while :; do sleep 1 & wait $!; done".to_owned());
    }
    ["sh", "-c", &lines.join("\n")].map(str::to_owned).to_vec()
}

#[test]
fn words_become_a_script() {
    let says = |words: &str| script(words).pop().unwrap_or_default();
    assert_eq!(says("print a warn b exit 3"), "trap 'exit 143' TERM\necho a\necho b >&2\nexit 3");
    assert!(says("sleep 50").starts_with("trap 'exit 143' TERM\nsleep 0.050 & wait $!\nwhile"));
    assert!(script("").is_empty() && script("missing") == ["/missing"]);
}
