//! What a file says of the host's going down.

use std::collections::BTreeMap;
use std::time::Duration;

use serde::{Deserialize, Serialize};

use super::{ConfigError, KubeletConfiguration, Overlay, set_duration};
use crate::config::NodeSettings;
use crate::config::values::ValueError;

/// One entry of `shutdownGracePeriodByPodPriority`.
#[derive(Clone, Copy, Debug, Serialize, Deserialize)]
#[serde(rename_all = "camelCase")]
pub(super) struct ByPriority {
    priority: i32,
    shutdown_grace_period_seconds: i64,
}

impl Overlay {
    pub(super) fn node_shutdown(
        &self,
        fields: &KubeletConfiguration,
        node: &mut NodeSettings,
    ) -> Result<(), ConfigError> {
        let grace = &mut node.shutdown_grace;
        set_duration(&mut grace.all, fields.shutdown_grace_period);
        set_duration(&mut grace.critical, fields.shutdown_grace_period_critical_pods);
        let (all, critical) = (grace.all, grace.critical);
        let too_short = |period: Duration| !period.is_zero() && period < Duration::from_secs(1);
        let sane = match () {
            () if too_short(all) || too_short(critical) => Err("it must be zero or at least 1s"),
            () if critical > all => Err("shutdownGracePeriodCriticalPods must not be longer"),
            () => Ok(()),
        };
        self.check("shutdownGracePeriod", sane.map_err(ValueError::new))?;
        let Some(entries) = &fields.shutdown_grace_period_by_pod_priority else { return Ok(()) };
        let mut periods = BTreeMap::new();
        for ByPriority { priority, shutdown_grace_period_seconds: seconds } in entries {
            let period = u64::try_from(*seconds).map(Duration::from_secs);
            let period = period.map_err(|_| ValueError::new(format!("{seconds} seconds are negative")));
            let period = self.check("shutdownGracePeriodByPodPriority", period)?;
            let first = match periods.insert(*priority, period) {
                None => Ok(()),
                Some(_) => Err(ValueError::new(format!("priority {priority} is there twice"))),
            };
            self.check("shutdownGracePeriodByPodPriority", first)?;
        }
        let alone = match periods.is_empty() || all.is_zero() {
            true => Ok(()),
            false => Err(ValueError::new("it and shutdownGracePeriod exclude each other")),
        };
        self.check("shutdownGracePeriodByPodPriority", alone)?;
        node.shutdown_grace.by_priority = periods;
        Ok(())
    }
}

#[cfg(test)]
mod tests {
    use super::super::tests::{applied, refused_field};
    use super::*;

    #[test]
    fn two_periods_make_two_groups_and_priorities_as_many_as_there_are() {
        let (settings, warnings) = applied("shutdownGracePeriod: 30s\nshutdownGracePeriodCriticalPods: 10s\n");
        assert_eq!(warnings, Vec::<String>::new());
        let grace = settings.node.shutdown_grace;
        let seconds = |groups: Vec<(i32, Duration)>| -> Vec<_> {
            groups.into_iter().map(|(priority, period)| (priority, period.as_secs())).collect()
        };
        assert_eq!((seconds(grace.groups()), grace.total().as_secs()), (vec![(0, 20), (2_000_000_000, 10)], 30));
        let (settings, _) = applied(
            "shutdownGracePeriodByPodPriority:\n- {priority: 1000, shutdownGracePeriodSeconds: 5}\n\
             - {priority: 0, shutdownGracePeriodSeconds: 60}\n",
        );
        assert_eq!(seconds(settings.node.shutdown_grace.groups()), [(0, 60), (1000, 5)]);
        assert!(applied("").0.node.shutdown_grace.groups().is_empty(), "off");
    }

    #[test]
    fn what_contradicts_itself_is_refused() {
        for (body, part) in [
            ("shutdownGracePeriod: 10s\nshutdownGracePeriodCriticalPods: 11s\n", "must not be longer"),
            ("shutdownGracePeriod: 10ms\n", "at least 1s"),
            (
                "shutdownGracePeriod: 10s\n\
                 shutdownGracePeriodByPodPriority: [{priority: 0, shutdownGracePeriodSeconds: 1}]\n",
                "exclude each other",
            ),
            ("shutdownGracePeriodByPodPriority: [{priority: 0, shutdownGracePeriodSeconds: -1}]\n", "negative"),
        ] {
            let error = refused_field(body);
            assert!(error.contains("shutdownGracePeriod") && error.contains(part), "{error}");
        }
    }
}
