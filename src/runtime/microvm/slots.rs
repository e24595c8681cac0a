//! Pure: which image lies behind which of a machine's slots.

use serde::{Deserialize, Serialize};

use crate::runtime::types::ImageId;

/// The slots of one machine, from 0.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
pub(super) struct Slots {
    images: Vec<Option<String>>,
}

/// What has to be done before an image can be used.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(super) enum Place {
    /// It lies there already.
    Taken(u8),
    /// This slot is free for it.
    Free(u8),
    /// This slot holds an image that no container uses, which has to give way.
    Instead(u8, ImageId),
}

impl Slots {
    pub(super) fn new(count: u8) -> Self {
        Self { images: vec![None; usize::from(count)] }
    }

    /// Where an image goes; `used` says whether a container of the machine uses an image. `None` if every slot is in use.
    pub(super) fn place(&self, image: &ImageId, used: impl Fn(&ImageId) -> bool) -> Option<Place> {
        let slots = || (0_u8..).zip(&self.images);
        if let Some((slot, _)) = slots().find(|(_, held)| held.as_deref() == Some(image.as_str())) {
            return Some(Place::Taken(slot));
        }
        if let Some((slot, _)) = slots().find(|(_, held)| held.is_none()) {
            return Some(Place::Free(slot));
        }
        slots().find_map(|(slot, held)| {
            let held = ImageId::from(held.as_deref()?);
            (!used(&held)).then_some(Place::Instead(slot, held))
        })
    }

    /// Notes that the image lies there now.
    pub(super) fn put(&mut self, slot: u8, image: &ImageId) {
        if let Some(held) = self.images.get_mut(usize::from(slot)) {
            *held = Some(image.to_string());
        }
    }

    /// Notes that the slot is empty.
    pub(super) fn take(&mut self, slot: u8) {
        if let Some(held) = self.images.get_mut(usize::from(slot)) {
            *held = None;
        }
    }

    /// The images that lie there.
    pub(super) fn images(&self) -> impl Iterator<Item = ImageId> {
        self.images.iter().flatten().map(|image| ImageId::from(image.as_str()))
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn image(name: &str) -> ImageId {
        ImageId::from(name)
    }

    #[test]
    fn an_image_takes_one_slot_and_an_unused_one_gives_way() {
        let mut slots = Slots::new(2);
        let none = |_: &ImageId| false;
        assert_eq!(slots.place(&image("a"), none), Some(Place::Free(0)));
        slots.put(0, &image("a"));
        assert_eq!(slots.place(&image("a"), none), Some(Place::Taken(0)));
        slots.put(1, &image("b"));
        assert_eq!(slots.place(&image("c"), |held| *held == image("a")), Some(Place::Instead(1, image("b"))));
        assert_eq!(slots.place(&image("c"), |_| true), None);
        slots.take(0);
        assert_eq!(slots.place(&image("c"), |_| true), Some(Place::Free(0)));
        assert_eq!(slots.images().collect::<Vec<_>>(), [image("b")]);
        assert_eq!(Slots::new(0).place(&image("a"), none), None);
        let text = serde_json::to_string(&slots).unwrap();
        assert_eq!(serde_json::from_str::<Slots>(&text).unwrap(), slots);
    }
}
