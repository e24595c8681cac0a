//! What speaks in an environment: Lambda's runtime interface emulator (RIE), or a plain HTTP server.

use std::collections::BTreeMap;
use std::fmt;

/// How an environment is called.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Protocol {
    /// The runtime interface emulator: one path, one call at a time (a second one crashes it), and a call cannot be
    /// cancelled.
    Rie,
    /// Any HTTP server: every path is passed on.
    Http,
}

impl Protocol {
    /// As annotations and metrics write it.
    pub fn name(self) -> &'static str {
        match self {
            Self::Rie => "rie",
            Self::Http => "http",
        }
    }
}

impl fmt::Display for Protocol {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(self.name())
    }
}

/// What an image says about the process it starts.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct ImageConfig {
    /// ENTRYPOINT.
    pub entrypoint: Vec<String>,
    /// CMD.
    pub command: Vec<String>,
    /// ENV.
    pub environment: BTreeMap<String, String>,
}

/// Programs that are RIE, or the entrypoint of AWS's base images that starts it.
const RIE_PROGRAMS: [&str; 2] = ["aws-lambda-rie", "lambda-entrypoint.sh"];
/// What AWS's base images set, whatever their entrypoint is called.
const RIE_VARIABLE: &str = "LAMBDA_TASK_ROOT";

/// Tells RIE from a plain HTTP server.
///
/// The command line decides: RIE if one of its words is a program named `aws-lambda-rie` or `lambda-entrypoint.sh`. A
/// Pod that gives no command of its own also runs RIE if its image sets `LAMBDA_TASK_ROOT`, as AWS's base images do. An
/// image that is not here yet (`None`) counts as RIE unless the Pod's own command says otherwise: to take a server for
/// RIE costs concurrency, the reverse crashes RIE.
pub fn detect(command: &[String], args: &[String], image: Option<&ImageConfig>) -> Protocol {
    let is_rie = |word: &String| word.rsplit('/').next().is_some_and(|name| RIE_PROGRAMS.contains(&name));
    if !command.is_empty() {
        // A shell line holds its programs in one word.
        let words = command.iter().chain(args).flat_map(|arg| arg.split_whitespace()).map(str::to_owned);
        return if words.into_iter().any(|word| is_rie(&word)) { Protocol::Rie } else { Protocol::Http };
    }
    let Some(image) = image else { return Protocol::Rie };
    let args = if args.is_empty() { &image.command } else { args };
    let rie = image.entrypoint.iter().chain(args).any(is_rie) || image.environment.contains_key(RIE_VARIABLE);
    if rie { Protocol::Rie } else { Protocol::Http }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn words(words: &[&str]) -> Vec<String> {
        words.iter().map(|word| (*word).to_owned()).collect()
    }

    fn image(entrypoint: &[&str], command: &[&str], variables: &[&str]) -> ImageConfig {
        let environment = variables.iter().map(|name| ((*name).to_owned(), "/x".to_owned())).collect();
        ImageConfig { entrypoint: words(entrypoint), command: words(command), environment }
    }

    #[test]
    fn aws_base_images_and_images_with_the_emulator_are_rie() {
        for image in [
            image(&["/lambda-entrypoint.sh"], &["app.handler"], &["LAMBDA_TASK_ROOT"]),
            image(&["/entry.sh"], &[], &["LAMBDA_TASK_ROOT"]),
            image(&["/usr/local/bin/aws-lambda-rie"], &["python3", "-m", "awslambdaric"], &[]),
            image(&[], &["aws-lambda-rie", "/bootstrap"], &[]),
        ] {
            assert_eq!(detect(&[], &[], Some(&image)), Protocol::Rie, "{image:?}");
        }
    }

    #[test]
    fn other_images_are_plain_servers() {
        for image in [image(&[], &["nginx"], &["PATH"]), image(&["python3"], &["server.py"], &[])] {
            assert_eq!(detect(&[], &[], Some(&image)), Protocol::Http, "{image:?}");
        }
    }

    #[test]
    fn the_pods_command_decides_over_the_image() {
        let lambda = image(&["/lambda-entrypoint.sh"], &[], &["LAMBDA_TASK_ROOT"]);
        assert_eq!(detect(&words(&["python3", "server.py"]), &[], Some(&lambda)), Protocol::Http);
        assert_eq!(detect(&words(&["python3", "server.py"]), &[], None), Protocol::Http);
        let plain = image(&["python3"], &["server.py"], &[]);
        let shell = words(&["sh", "-c", "exec /opt/aws-lambda-rie python3 -m awslambdaric app.handler"]);
        assert_eq!(detect(&shell, &[], Some(&plain)), Protocol::Rie);
        assert_eq!(detect(&[], &words(&["/aws-lambda-rie", "x"]), Some(&plain)), Protocol::Rie);
    }

    #[test]
    fn an_unknown_image_is_taken_for_rie() {
        assert_eq!(detect(&[], &[], None), Protocol::Rie);
    }
}
