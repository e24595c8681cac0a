//! `$(VAR)` in values, commands and arguments. Pure.
//!
//! The rules are those of "Use dependent environment variables" in the Kubernetes documentation: `$(NAME)` is replaced
//! if NAME is known and else left as it is, `$$` is one `$` and so protects what follows.

/// The text with every known reference replaced.
pub fn expand<'a>(text: &str, lookup: impl Fn(&str) -> Option<&'a str>) -> String {
    let mut expanded = String::with_capacity(text.len());
    let mut rest = text;
    while let Some(dollar) = rest.find('$') {
        expanded.push_str(&rest[..dollar]);
        let after = &rest[dollar + 1..];
        if let Some(escaped) = after.strip_prefix('$') {
            expanded.push('$');
            rest = escaped;
        } else if let Some((name, behind)) = after.strip_prefix('(').and_then(|after| after.split_once(')')) {
            match lookup(name) {
                Some(value) => expanded.push_str(value),
                None => expanded.push_str(&rest[dollar..rest.len() - behind.len()]),
            }
            rest = behind;
        } else {
            expanded.push('$');
            rest = after;
        }
    }
    expanded.push_str(rest);
    expanded
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    fn lookup(name: &str) -> Option<&'static str> {
        match name {
            "A" => Some("a"),
            "EMPTY" => Some(""),
            "DOLLAR" => Some("$(A)"),
            _ => None,
        }
    }

    #[test]
    fn references_escapes_and_everything_else() {
        for (text, expanded) in [
            ("$(A)", "a"),
            ("x$(A)y$(A)", "xaya"),
            ("$(EMPTY)|", "|"),
            ("$(DOLLAR)", "$(A)"),
            ("$(B)", "$(B)"),
            ("$$(A)", "$(A)"),
            ("$$$(A)", "$a"),
            ("$$$$(A)", "$$(A)"),
            ("$A ${A}", "$A ${A}"),
            ("$(A", "$(A"),
            ("$()", "$()"),
            ("$(A $(A))", "$(A $(A))"),
            ("100$", "100$"),
            ("", ""),
            ("é$(A)ß", "éaß"),
        ] {
            assert_eq!(expand(text, lookup), expanded, "{text}");
        }
    }

    proptest! {
        #[test]
        fn without_a_dollar_nothing_changes(text in "[^$]*") {
            prop_assert_eq!(expand(&text, lookup), text);
        }

        #[test]
        fn unknown_names_stay_as_they_are(text in "[$()Bx]{0,16}") {
            let expanded = expand(&text, |_| None);
            prop_assert!(expanded.len() <= text.len());
            if !text.contains("$$") {
                prop_assert_eq!(expanded, text);
            }
        }
    }
}
