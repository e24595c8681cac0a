//! `lambdalet check`.

use std::fmt;
use std::path::Path;

use crate::config::Settings;

/// Report.
#[derive(Debug, Default)]
pub struct Report;

impl Report {
    /// Failed.
    pub fn failed(&self) -> bool {
        false
    }
}

impl fmt::Display for Report {
    fn fmt(&self, _: &mut fmt::Formatter<'_>) -> fmt::Result {
        Ok(())
    }
}

/// Examines.
pub async fn examine(_settings: &Settings, _kubeconfig: Option<&Path>) -> Report {
    Report
}
