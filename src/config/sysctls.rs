//! Kernel parameters that the operator lets Pods set although they are not safe (`allowedUnsafeSysctls`).

use std::fmt;
use std::str::FromStr;

use super::values::ValueError;

/// Longest name or pattern, as the API takes them.
const LONGEST: usize = 253;
/// Parameters that the kernel keeps for each namespace apart; of others there is one for the whole host.
const NAMESPACED: [&str; 5] = ["kernel.sem", "kernel.shm", "kernel.msg", "fs.mqueue.", "net."];

/// A kernel parameter, or all that begin like it (`net.core.*`).
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct SysctlPattern {
    text: String,
}

impl SysctlPattern {
    /// Whether it means the parameter of this name, with dots between its parts.
    pub fn matches(&self, name: &str) -> bool {
        match self.text.strip_suffix('*') {
            Some(beginning) => name.starts_with(beginning),
            None => name == self.text,
        }
    }

    /// As it was written.
    pub fn as_str(&self) -> &str {
        &self.text
    }
}

impl fmt::Display for SysctlPattern {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(&self.text)
    }
}

impl FromStr for SysctlPattern {
    type Err = ValueError;

    fn from_str(text: &str) -> Result<Self, Self::Err> {
        let refused = |why: &str| Err(ValueError::new(format!("{text:?} {why}")));
        // Slashes between the parts mean the same; patterns are compared with names that have dots.
        let dotted = if text.contains('/') && !text.contains('.') { text.replace('/', ".") } else { text.to_owned() };
        let name = dotted.strip_suffix('*').unwrap_or(&dotted);
        let in_name = |c: char| c.is_ascii_lowercase() || c.is_ascii_digit() || "._-/".contains(c);
        if name.is_empty() || text.len() > LONGEST || !name.chars().all(in_name) {
            return refused("is no kernel parameter such as net.core.somaxconn or net.core.*");
        }
        if !NAMESPACED.iter().any(|known| if *known == "kernel.sem" { name == *known } else { name.starts_with(known) })
        {
            return refused("is not namespaced: a Pod would set it for the whole host");
        }
        Ok(Self { text: dotted })
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn matches(pattern: &str, name: &str) -> bool {
        pattern.parse::<SysctlPattern>().unwrap().matches(name)
    }

    #[test]
    fn a_star_stands_for_the_rest_of_the_name() {
        assert!(matches("kernel.msg*", "kernel.msgmax") && !matches("kernel.msg*", "kernel.shmmax"));
        assert!(matches("net.core.somaxconn", "net.core.somaxconn"));
        assert!(!matches("net.core.somaxconn", "net.core.somaxconn2"));
        assert!(matches("net/core/*", "net.core.somaxconn"));
    }

    #[test]
    fn what_is_of_the_whole_host_or_no_parameter_is_refused() {
        for text in ["vm.swappiness", "kernel.*", "kernel.semaphore", "*"] {
            assert!(text.parse::<SysctlPattern>().is_err(), "{text}");
        }
        for text in ["", "net.core.*.x", "net core", "Net.x"] {
            let error = text.parse::<SysctlPattern>().unwrap_err().to_string();
            assert!(error.contains("is no kernel parameter"), "{error}");
        }
    }
}
