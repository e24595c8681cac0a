//! What a file says of eviction.

use std::collections::BTreeMap;
use std::str::FromStr;
use std::time::Duration;

use super::{ConfigError, KubeletConfiguration, Overlay};
use crate::config::NodeSettings;
use crate::config::values::{GoDuration, ValueError};

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

impl Overlay {
    pub(super) fn eviction(
        &mut self,
        fields: &KubeletConfiguration,
        node: &mut NodeSettings,
    ) -> Result<(), ConfigError> {
        if let Some(texts) = &fields.eviction_hard {
            node.eviction_hard = self.by_signal("evictionHard", texts)?;
        }
        if let Some(texts) = &fields.eviction_soft {
            node.eviction_soft = self.by_signal("evictionSoft", texts)?;
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
