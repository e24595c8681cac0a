//! Pure: how a client is told what became of its command.

use bytes::Bytes;
use serde::Serialize;

/// How a protocol version writes it.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(in crate::kubelet_api) enum StatusForm {
    /// A `metav1.Status`, since v4.
    Json,
    /// A sentence, or nothing if all went well.
    Text,
}

/// What became of a command.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(in crate::kubelet_api) enum Outcome {
    /// It ended well, or was not this client's to judge.
    Success,
    /// It ended with this code, not 0.
    ExitCode(i32),
    /// It could not be run, or its streams broke.
    Failed(String),
}

/// `metav1.Status`, as far as the error stream has it (KK staging/src/k8s.io/client-go/tools/remotecommand/v4.go reads
/// it).
#[derive(Serialize)]
struct Status<'a> {
    metadata: Empty,
    status: &'static str,
    #[serde(skip_serializing_if = "Option::is_none")]
    message: Option<&'a str>,
    #[serde(skip_serializing_if = "Option::is_none")]
    reason: Option<&'static str>,
    #[serde(skip_serializing_if = "Option::is_none")]
    details: Option<Details>,
    #[serde(skip_serializing_if = "Option::is_none")]
    code: Option<u16>,
}

#[derive(Serialize)]
struct Empty {}

#[derive(Serialize)]
struct Details {
    causes: [Cause; 1],
}

#[derive(Serialize)]
struct Cause {
    reason: &'static str,
    message: String,
}

impl Outcome {
    /// The bytes for the error stream, possibly none.
    pub(in crate::kubelet_api) fn write(&self, form: StatusForm) -> Bytes {
        let message = self.message();
        match form {
            StatusForm::Text => Bytes::from(message),
            StatusForm::Json => Bytes::from(serde_json::to_vec(&self.status(&message)).unwrap_or_default()),
        }
    }

    fn message(&self) -> String {
        match self {
            Self::Success => String::new(),
            Self::ExitCode(code) => format!("command terminated with non-zero exit code: {code}"),
            Self::Failed(why) => format!("Internal error occurred: {why}"),
        }
    }

    fn status<'a>(&self, message: &'a str) -> Status<'a> {
        let (message, metadata) = (Some(message), Empty {});
        match self {
            Self::Success => {
                Status { metadata, status: "Success", message: None, reason: None, details: None, code: None }
            }
            Self::ExitCode(code) => {
                let details = Details { causes: [Cause { reason: "ExitCode", message: code.to_string() }] };
                let (reason, details) = (Some("NonZeroExitCode"), Some(details));
                Status { metadata, status: "Failure", message, reason, details, code: None }
            }
            Self::Failed(_) => {
                let reason = Some("InternalError");
                Status { metadata, status: "Failure", message, reason, details: None, code: Some(500) }
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use serde_json::{Value, json};

    use super::*;

    fn json_of(outcome: &Outcome) -> Value {
        serde_json::from_slice(&outcome.write(StatusForm::Json)).unwrap()
    }

    #[test]
    fn v4_clients_get_a_status() {
        assert_eq!(json_of(&Outcome::Success), json!({"metadata": {}, "status": "Success"}));
        let code = json!({"metadata": {}, "status": "Failure", "reason": "NonZeroExitCode",
            "message": "command terminated with non-zero exit code: 7",
            "details": {"causes": [{"reason": "ExitCode", "message": "7"}]}});
        assert_eq!(json_of(&Outcome::ExitCode(7)), code);
        let failed = json!({"metadata": {}, "status": "Failure", "reason": "InternalError", "code": 500,
            "message": "Internal error occurred: no such file"});
        assert_eq!(json_of(&Outcome::Failed("no such file".to_owned())), failed);
    }

    #[test]
    fn older_clients_get_a_sentence_or_nothing() {
        assert_eq!(Outcome::Success.write(StatusForm::Text), "");
        assert_eq!(Outcome::ExitCode(2).write(StatusForm::Text), "command terminated with non-zero exit code: 2");
    }
}
