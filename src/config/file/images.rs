//! What a file says of images.

use super::{ConfigError, KubeletConfiguration, Overlay, chosen, set, set_duration};
use crate::config::Settings;
use crate::config::values::ValueError;

impl Overlay {
    pub(super) fn images(&self, fields: &KubeletConfiguration, settings: &mut Settings) -> Result<(), ConfigError> {
        let images = &mut settings.images;
        // As kubelet: one at a time unless serializeImagePulls is false, then as many as told, or any number. To ask for
        // two or more is to say that it is false.
        let most = fields.max_parallel_image_pulls;
        if !fields.serialize_image_pulls.unwrap_or(most.is_none_or(|most| most < 2)) {
            images.max_parallel_pulls = most;
        }
        let garbage = &mut images.garbage;
        set(&mut garbage.high_percent, fields.image_gc_high_threshold_percent);
        set(&mut garbage.low_percent, fields.image_gc_low_threshold_percent);
        set_duration(&mut garbage.min_age, fields.image_minimum_gc_age);
        set(&mut garbage.max_age, chosen(fields.image_maximum_gc_age).map(Some));
        let (high, low) = (garbage.high_percent, garbage.low_percent);
        let sane = match () {
            () if high > 100 => Err(ValueError::new(format!("{high} is not a percentage"))),
            () if low >= high => Err(ValueError::new(format!("{high} is not above imageGCLowThresholdPercent, {low}"))),
            () => Ok(()),
        };
        self.check("imageGCHighThresholdPercent", sane)
    }
}
