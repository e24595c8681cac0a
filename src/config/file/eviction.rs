//! What a file says of eviction.

use std::collections::BTreeMap;
use std::str::FromStr;
use std::time::Duration;

use super::{ConfigError, KubeletConfiguration, Overlay};
use crate::config::NodeSettings;
use crate::config::values::{GoDuration, Threshold, ValueError};

/// Signals that this node measures.
const MEASURED: [&str; 4] = ["memory.available", "nodefs.available", "nodefs.inodesFree", "pid.available"];
/// Those that kubelet knows beside them.
const UNMEASURED: [&str; 5] = [
    "imagefs.available",
    "imagefs.inodesFree",
    "containerfs.available",
    "containerfs.inodesFree",
    "allocatableMemory.available",
];
/// Thresholds that a kubelet takes for none: one that is never crossed, and one that always is.
const OFF: [&str; 2] = ["0%", "100%"];

impl Overlay {
    pub(super) fn eviction(
        &mut self,
        fields: &KubeletConfiguration,
        node: &mut NodeSettings,
    ) -> Result<(), ConfigError> {
        if let Some(texts) = &fields.eviction_hard {
            node.eviction_hard = self.thresholds("evictionHard", texts)?;
        }
        if let Some(texts) = &fields.eviction_soft {
            node.eviction_soft = self.thresholds("evictionSoft", texts)?;
        }
        if let Some(texts) = &fields.eviction_minimum_reclaim {
            node.eviction_minimum_reclaim = self.by_signal("evictionMinimumReclaim", texts)?;
        }
        if let Some(texts) = &fields.eviction_soft_grace_period {
            let periods: BTreeMap<String, GoDuration> = self.by_signal("evictionSoftGracePeriod", texts)?;
            node.eviction_soft_grace_period = periods.into_iter().map(|(signal, period)| (signal, period.0)).collect();
        }
        if let Some(signal) = node.eviction_soft.keys().find(|s| !node.eviction_soft_grace_period.contains_key(*s)) {
            let missing: Result<(), _> = Err(ValueError::new("it needs a period in evictionSoftGracePeriod"));
            self.check(&format!("evictionSoft.{signal}"), missing)?;
        }
        if let Some(seconds) = fields.eviction_max_pod_grace_period {
            let seconds = u64::try_from(seconds).map_err(|_| ValueError::new(format!("{seconds} is negative")));
            let seconds = self.check("evictionMaxPodGracePeriod", seconds)?;
            node.eviction_max_pod_grace_period = Duration::from_secs(seconds);
        }
        Ok(())
    }

    fn thresholds(
        &mut self,
        name: &str,
        texts: &BTreeMap<String, String>,
    ) -> Result<BTreeMap<String, Threshold>, ConfigError> {
        let mut texts = texts.clone();
        texts.retain(|_, text| !OFF.contains(&text.as_str()));
        self.by_signal(name, &texts)
    }

    fn by_signal<T>(&mut self, name: &str, texts: &BTreeMap<String, String>) -> Result<BTreeMap<String, T>, ConfigError>
    where
        T: FromStr<Err = ValueError>,
    {
        let mut values = BTreeMap::new();
        for (signal, text) in texts {
            let field = format!("{name}.{signal}");
            match signal.as_str() {
                known if MEASURED.contains(&known) => {
                    values.insert(signal.clone(), self.check(&field, text.parse::<T>())?);
                }
                known if UNMEASURED.contains(&known) => self.ignored.push(field),
                _ => return self.check(&field, Err(ValueError::new("there is no such eviction signal"))),
            }
        }
        Ok(values)
    }
}

#[cfg(test)]
mod tests {
    use super::super::tests::applied;
    use super::*;

    #[test]
    fn a_threshold_of_nothing_or_of_all_is_off() {
        let (settings, warnings) = applied(
            "evictionHard: {imagefs.available: 0%, memory.available: 100Mi, nodefs.available: 100%, nodefs.inodesFree: 0%}\n\
             evictionSoft: {nodefs.available: 100%}\nevictionMinimumReclaim: {nodefs.available: 0%}\n",
        );
        assert_eq!(warnings, Vec::<String>::new());
        let node = settings.node;
        assert_eq!(node.eviction_hard.into_keys().collect::<Vec<_>>(), ["memory.available"]);
        assert!(node.eviction_soft.is_empty(), "{:?}", node.eviction_soft);
        assert_eq!(node.eviction_minimum_reclaim["nodefs.available"], Threshold::Percent(0.0), "no threshold");
    }
}
