//! Kubernetes quantities (`500m`, `1.5Gi`) as exact numbers.

use std::str::FromStr;

/// Nano-units in one unit.
const UNIT: i128 = 1_000_000_000;

/// A number of nano-units (10^-9), exact for everything Kubernetes accepts.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct Quantity {
    nanos: i128,
}

impl Quantity {
    /// The number in nano-units.
    pub fn nanos(self) -> i128 {
        self.nanos
    }

    /// So many whole units (cores, bytes, Pods).
    pub const fn from_units(units: i64) -> Self {
        Self { nanos: units as i128 * UNIT }
    }

    /// So many thousandths of a unit (millicores).
    pub const fn from_millis(millis: i64) -> Self {
        Self { nanos: millis as i128 * (UNIT / 1000) }
    }
}

/// A text that is no quantity.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
#[error("{0:?} is not a quantity such as 500m, 2, 1.5Gi or 100M")]
pub struct QuantityError(String);

impl FromStr for Quantity {
    type Err = QuantityError;

    fn from_str(text: &str) -> Result<Self, Self::Err> {
        parse(text).map(|nanos| Self { nanos }).ok_or_else(|| QuantityError(text.to_owned()))
    }
}

/// Digits with an optional fraction and one suffix; no exponent.
fn parse(text: &str) -> Option<i128> {
    let split = text.find(|c: char| !c.is_ascii_digit() && c != '.').unwrap_or(text.len());
    let (number, suffix) = text.split_at(split);
    let (whole, fraction) = number.split_once('.').unwrap_or((number, ""));
    if whole.is_empty() && fraction.is_empty() || number.len() > 30 {
        return None;
    }
    let scale: i128 = match suffix {
        "n" => 1,
        "u" => 1_000,
        "m" => 1_000_000,
        "" => UNIT,
        "k" => UNIT * 1000,
        "M" => UNIT * 1000_i128.pow(2),
        "G" => UNIT * 1000_i128.pow(3),
        "T" => UNIT * 1000_i128.pow(4),
        "P" => UNIT * 1000_i128.pow(5),
        "E" => UNIT * 1000_i128.pow(6),
        "Ki" => UNIT << 10,
        "Mi" => UNIT << 20,
        "Gi" => UNIT << 30,
        "Ti" => UNIT << 40,
        "Pi" => UNIT << 50,
        "Ei" => UNIT << 60,
        _ => return None,
    };
    let digits: i128 = format!("{whole}{fraction}").parse().ok()?;
    let divisor = 10_i128.checked_pow(u32::try_from(fraction.len()).ok()?)?;
    // Rounded up, as Kubernetes does with what is finer than it can hold.
    let scaled = digits.checked_mul(scale)?;
    Some(scaled.checked_add(divisor - 1)? / divisor)
}
