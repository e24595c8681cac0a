//! What a file says of images.

use super::{ConfigError, KubeletConfiguration, Overlay, set, set_duration};
use crate::config::Settings;
use crate::config::values::ValueError;

impl Overlay {
    pub(super) fn images(&self, fields: &KubeletConfiguration, settings: &mut Settings) -> Result<(), ConfigError> {
        let images = &mut settings.images;
        // As kubelet: one at a time unless serializeImagePulls is false, then as many as told, or any number.
        if fields.serialize_image_pulls == Some(false) {
            images.max_parallel_pulls = fields.max_parallel_image_pulls;
        }
        let garbage = &mut images.garbage;
        set(&mut garbage.high_percent, fields.image_gc_high_threshold_percent);
        set(&mut garbage.low_percent, fields.image_gc_low_threshold_percent);
        set_duration(&mut garbage.min_age, fields.image_minimum_gc_age);
        let max_age = fields.image_maximum_gc_age.filter(|age| !age.0.is_zero());
        set(&mut garbage.max_age, max_age.map(|age| Some(age.0)));
        let (high, low) = (garbage.high_percent, garbage.low_percent);
        let sane = match () {
            () if high > 100 => Err(ValueError::new(format!("{high} is not a percentage"))),
            () if low >= high => Err(ValueError::new(format!("{high} is not above imageGCLowThresholdPercent, {low}"))),
            () => Ok(()),
        };
        self.check("imageGCHighThresholdPercent", sane)
    }
}
