//! Kubernetes quantities (`500m`, `1.5Gi`) as exact numbers.
//!
//! The text form is that of `apimachinery/pkg/api/resource`: a signed decimal number, then a suffix that is decimal
//! (`n u m k M G T P E`), binary (`Ki Mi Gi Ti Pi Ei`) or an exponent (`e3`, `E-6`). What is finer than a nano-unit is
//! rounded away from zero, and what is larger than 2^63-1 units is capped there.

use std::fmt;
use std::iter::Sum;
use std::ops::{Add, Sub};
use std::str::FromStr;

/// Nano-units in one unit.
const UNIT: i128 = 1_000_000_000;
/// The largest magnitude, in nano-units: 2^63-1 units.
const MAX: i128 = i64::MAX as i128 * UNIT;
/// Decimal digits of [`MAX`]; a number with more is capped unread.
const MAX_DIGITS: i64 = 28;
/// From here on a number that is a multiple of 1024 may be shown with a binary suffix; small counts stay decimal.
const BINARY_FROM: i128 = 1024 * 1024 * UNIT;

/// A number of nano-units (10^-9), exact for everything Kubernetes accepts.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct Quantity {
    nanos: i128,
}

/// A text that is not a quantity.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
#[error("invalid quantity {text:?}: {reason}")]
pub struct ParseQuantityError {
    text: String,
    reason: &'static str,
}

// === impl Quantity ===

impl Quantity {
    /// Nothing.
    pub const ZERO: Self = Self { nanos: 0 };

    /// So many whole units (cores, bytes, Pods).
    pub fn from_units(units: i64) -> Self {
        Self { nanos: i128::from(units) * UNIT }
    }

    /// So many thousandths of a unit (`500` is `500m`).
    pub fn from_millis(millis: i64) -> Self {
        Self { nanos: i128::from(millis) * (UNIT / 1000) }
    }

    /// The number in nano-units.
    pub fn nanos(self) -> i128 {
        self.nanos
    }

    /// Whole units, a fraction rounded away from zero (Kubernetes' `Value()`).
    pub fn value(self) -> i64 {
        saturate(divide_away_from_zero(self.nanos, UNIT))
    }

    /// Thousandths, a fraction rounded away from zero (Kubernetes' `MilliValue()`). Saturates at the ends of `i64`.
    pub fn milli_value(self) -> i64 {
        saturate(divide_away_from_zero(self.nanos, UNIT / 1000))
    }

    /// How many times `divisor` fits, rounded up: what `resourceFieldRef` delivers. A divisor of zero counts as one
    /// unit, as in Kubernetes.
    pub fn divided_by(self, divisor: Self) -> i64 {
        let divisor = if divisor.nanos == 0 { UNIT } else { divisor.nanos };
        saturate(divide_away_from_zero(self.nanos, divisor))
    }

    /// Whether this is zero.
    pub fn is_zero(self) -> bool {
        self.nanos == 0
    }

    fn clamped(nanos: i128) -> Self {
        Self { nanos: nanos.clamp(-MAX, MAX) }
    }
}

fn saturate(number: i128) -> i64 {
    i64::try_from(number).unwrap_or(if number < 0 { i64::MIN } else { i64::MAX })
}

fn divide_away_from_zero(number: i128, divisor: i128) -> i128 {
    let quotient = number / divisor;
    match number % divisor {
        0 => quotient,
        _ if (number < 0) == (divisor < 0) => quotient + 1,
        _ => quotient - 1,
    }
}

impl Add for Quantity {
    type Output = Self;

    fn add(self, other: Self) -> Self {
        Self::clamped(self.nanos.saturating_add(other.nanos))
    }
}

impl Sub for Quantity {
    type Output = Self;

    fn sub(self, other: Self) -> Self {
        Self::clamped(self.nanos.saturating_sub(other.nanos))
    }
}

impl Sum for Quantity {
    fn sum<I: Iterator<Item = Self>>(quantities: I) -> Self {
        quantities.fold(Self::ZERO, Add::add)
    }
}

// === Reading ===

impl FromStr for Quantity {
    type Err = ParseQuantityError;

    fn from_str(text: &str) -> Result<Self, Self::Err> {
        let refuse = |reason| ParseQuantityError { text: shortened(text), reason };
        let (negative, rest) = match text.as_bytes().first() {
            Some(b'-') => (true, &text[1..]),
            Some(b'+') => (false, &text[1..]),
            _ => (false, text),
        };
        let end = rest.find(|c: char| !c.is_ascii_digit() && c != '.').unwrap_or(rest.len());
        let (number, suffix) = rest.split_at(end);
        let (whole, fraction) = number.split_once('.').unwrap_or((number, ""));
        if whole.is_empty() && fraction.is_empty() {
            return Err(refuse("a number is expected first"));
        }
        if fraction.contains('.') {
            return Err(refuse("more than one decimal point"));
        }
        let scale = Scale::of(suffix).ok_or_else(|| refuse("unknown suffix"))?;
        let mut digits: Vec<u8> = whole.bytes().chain(fraction.bytes()).map(|digit| digit - b'0').collect();
        let exponent = match scale {
            Scale::Decimal(exponent) => exponent,
            Scale::Binary(power) => {
                for _ in 0..power {
                    multiply_by_1024(&mut digits);
                }
                0
            }
        };
        let fraction_digits = i64::try_from(fraction.len()).map_err(|_| refuse("too long"))?;
        let nanos = scaled(&digits, exponent.saturating_sub(fraction_digits).saturating_add(9));
        Ok(Self { nanos: if negative { -nanos } else { nanos } })
    }
}

/// What a suffix multiplies by.
enum Scale {
    /// 10 to this power.
    Decimal(i64),
    /// 1024 to this power.
    Binary(u32),
}

impl Scale {
    fn of(suffix: &str) -> Option<Self> {
        Some(match suffix {
            "n" => Self::Decimal(-9),
            "u" => Self::Decimal(-6),
            "m" => Self::Decimal(-3),
            "" => Self::Decimal(0),
            "k" => Self::Decimal(3),
            "M" => Self::Decimal(6),
            "G" => Self::Decimal(9),
            "T" => Self::Decimal(12),
            "P" => Self::Decimal(15),
            "E" => Self::Decimal(18),
            "Ki" => Self::Binary(1),
            "Mi" => Self::Binary(2),
            "Gi" => Self::Binary(3),
            "Ti" => Self::Binary(4),
            "Pi" => Self::Binary(5),
            "Ei" => Self::Binary(6),
            _ => Self::Decimal(suffix.strip_prefix(['e', 'E'])?.parse().ok()?),
        })
    }
}

/// Multiplies a number of decimal digits, the first the most significant. Digits rather than `i128`, so that no number
/// of fraction digits loses exactness.
fn multiply_by_1024(digits: &mut Vec<u8>) {
    let mut carry = 0_u32;
    for digit in digits.iter_mut().rev() {
        let product = u32::from(*digit) * 1024 + carry;
        *digit = (product % 10) as u8;
        carry = product / 10;
    }
    while carry > 0 {
        digits.insert(0, (carry % 10) as u8);
        carry /= 10;
    }
}

/// `digits` times 10^`exponent`, rounded up and capped at [`MAX`].
fn scaled(digits: &[u8], exponent: i64) -> i128 {
    let first = digits.iter().position(|digit| *digit != 0).unwrap_or(digits.len());
    let digits = &digits[first..];
    if digits.is_empty() {
        return 0;
    }
    let length = i64::try_from(digits.len()).unwrap_or(i64::MAX);
    let kept = length.saturating_add(exponent.min(0)).max(0);
    if kept.saturating_add(exponent.max(0)) > MAX_DIGITS {
        return MAX;
    }
    let (kept, dropped) = digits.split_at(usize::try_from(kept).unwrap_or(usize::MAX).min(digits.len()));
    let mut number = kept.iter().fold(0_i128, |number, digit| number * 10 + i128::from(*digit));
    number *= 10_i128.pow(u32::try_from(exponent.max(0)).unwrap_or(0));
    if dropped.iter().any(|digit| *digit != 0) {
        number += 1;
    }
    number.min(MAX)
}

/// Enough of a text to know it again; an error must not carry a megabyte somebody put into a Pod.
fn shortened(text: &str) -> String {
    const LONGEST: usize = 64;
    match text.char_indices().nth(LONGEST) {
        Some((end, _)) => format!("{}…", &text[..end]),
        None => text.to_owned(),
    }
}

impl TryFrom<&k8s_openapi::apimachinery::pkg::api::resource::Quantity> for Quantity {
    type Error = ParseQuantityError;

    fn try_from(quantity: &k8s_openapi::apimachinery::pkg::api::resource::Quantity) -> Result<Self, Self::Error> {
        quantity.0.parse()
    }
}

impl From<Quantity> for k8s_openapi::apimachinery::pkg::api::resource::Quantity {
    fn from(quantity: Quantity) -> Self {
        Self(quantity.to_string())
    }
}

// === Writing ===

impl fmt::Display for Quantity {
    /// A form that Kubernetes reads back as the same number: a whole number with the largest suffix that keeps it whole,
    /// decimal or (from 1Mi on, if that is shorter) binary.
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let decimal = decimal_text(self.nanos);
        let text = match binary_text(self.nanos) {
            Some(binary) if binary.len() < decimal.len() => binary,
            _ => decimal,
        };
        f.pad(&text)
    }
}

fn decimal_text(nanos: i128) -> String {
    if nanos == 0 {
        return "0".to_owned();
    }
    let mut number = nanos;
    let mut suffix = "n";
    for larger in ["u", "m", "", "k", "M", "G", "T", "P", "E"] {
        if number % 1000 != 0 {
            break;
        }
        number /= 1000;
        suffix = larger;
    }
    format!("{number}{suffix}")
}

fn binary_text(nanos: i128) -> Option<String> {
    if nanos.abs() < BINARY_FROM || nanos % (1024 * UNIT) != 0 {
        return None;
    }
    let mut number = nanos / (1024 * UNIT);
    let mut suffix = "Ki";
    for larger in ["Mi", "Gi", "Ti", "Pi", "Ei"] {
        if number % 1024 != 0 {
            break;
        }
        number /= 1024;
        suffix = larger;
    }
    Some(format!("{number}{suffix}"))
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    fn quantity(text: &str) -> Quantity {
        text.parse().unwrap()
    }

    #[test]
    fn every_suffix_has_its_weight() {
        for (text, nanos) in [
            ("1n", 1),
            ("1u", 1_000),
            ("1m", 1_000_000),
            ("1", UNIT),
            ("1k", 1_000 * UNIT),
            ("1M", 1_000_000 * UNIT),
            ("1G", UNIT * UNIT),
            ("1T", 1_000 * UNIT * UNIT),
            ("1P", 1_000_000 * UNIT * UNIT),
            ("1E", UNIT * UNIT * UNIT),
            ("1Ki", 1024 * UNIT),
            ("1Mi", (1 << 20) * UNIT),
            ("1Gi", (1 << 30) * UNIT),
            ("1Ti", (1 << 40) * UNIT),
            ("1Pi", (1 << 50) * UNIT),
            ("1Ei", (1 << 60) * UNIT),
            ("1.5Gi", 1_610_612_736 * UNIT),
            ("0.5", UNIT / 2),
            (".5", UNIT / 2),
            ("5.", 5 * UNIT),
            ("100m", UNIT / 10),
            ("12e6", 12_000_000 * UNIT),
            ("12E6", 12_000_000 * UNIT),
            ("12E+6", 12_000_000 * UNIT),
            ("5e-3", 5_000_000),
            ("-2Ki", -2048 * UNIT),
            ("+3", 3 * UNIT),
            ("0", 0),
            ("-0", 0),
            ("007", 7 * UNIT),
        ] {
            assert_eq!(quantity(text).nanos(), nanos, "{text}");
        }
    }

    #[test]
    fn too_large_is_capped_and_too_fine_is_rounded_away_from_zero() {
        assert_eq!(quantity("8Ei").nanos(), MAX);
        assert_eq!(quantity("8Ei").value(), i64::MAX);
        assert_eq!(quantity("-9Ei").nanos(), -MAX);
        assert_eq!(quantity("1e999999999999").nanos(), MAX);
        assert_eq!(quantity("0e999999999999").nanos(), 0);
        assert_eq!(quantity("1e-999999999999").nanos(), 1);
        assert_eq!(quantity("0.1n").nanos(), 1);
        assert_eq!(quantity("-0.1n").nanos(), -1);
        assert_eq!(quantity(&format!("0.{}1", "0".repeat(5000))).nanos(), 1);
        assert_eq!(quantity("0.0000000000000000000000000001Ei").nanos(), 1);
        assert_eq!(quantity("0.0000000000000000005Ei").nanos(), 576_460_753);
    }

    #[test]
    fn values_round_away_from_zero() {
        assert_eq!(quantity("1.1").value(), 2);
        assert_eq!(quantity("-1.1").value(), -2);
        assert_eq!(quantity("1u").milli_value(), 1);
        assert_eq!(quantity("250m").milli_value(), 250);
        assert_eq!(quantity("1500m").divided_by(quantity("1")), 2);
        assert_eq!(quantity("1500m").divided_by(quantity("1m")), 1500);
        assert_eq!(quantity("1Gi").divided_by(quantity("1Mi")), 1024);
        assert_eq!(quantity("7").divided_by(Quantity::ZERO), 7);
    }

    #[test]
    fn display_is_short_and_canonical() {
        for (text, shown) in [
            ("0.1", "100m"),
            ("1000m", "1"),
            ("2000", "2k"),
            ("1.5Gi", "1536Mi"),
            ("128Mi", "128Mi"),
            ("1024", "1024"),
            ("8152044Ki", "8152044Ki"),
            ("128974848", "123Mi"),
            ("12e6", "12M"),
            ("0", "0"),
            ("-100m", "-100m"),
            ("1.0001", "1000100u"),
        ] {
            assert_eq!(quantity(text).to_string(), shown, "{text}");
        }
    }

    #[test]
    fn refused_texts_are_named() {
        for text in [
            "",
            "+",
            ".",
            "abc",
            "1Kib",
            "1e",
            "1e1.5",
            "1ee3",
            "--1",
            "1.2.3",
            "1 Gi",
            " 1",
            "1K",
            "٣",
            "1e99999999999999999999",
        ] {
            let error = text.parse::<Quantity>().unwrap_err().to_string();
            assert!(error.contains(&format!("{text:?}")), "{error}");
        }
        let error = "9".repeat(10).replace('9', "x").repeat(100).parse::<Quantity>().unwrap_err().to_string();
        assert!(error.len() < 200, "{error}");
    }

    #[test]
    fn sums_saturate() {
        let largest = quantity("8Ei");
        assert_eq!((largest + largest).nanos(), MAX);
        assert_eq!([quantity("1"), quantity("500m")].into_iter().sum::<Quantity>(), quantity("1.5"));
        assert_eq!(quantity("1") - quantity("300m"), quantity("700m"));
    }

    proptest! {
        #[test]
        fn no_text_panics(text in ".*") {
            let _ = text.parse::<Quantity>();
        }

        #[test]
        fn no_likely_text_panics(text in "[-+]?[0-9]{0,40}\\.?[0-9]{0,40}([numkMGTPE]|[KMGTPE]i|[eE][-+]?[0-9]{0,21})?") {
            let _ = text.parse::<Quantity>();
        }

        #[test]
        fn what_is_shown_reads_back_the_same(nanos in -MAX..=MAX) {
            let shown = Quantity { nanos };
            prop_assert_eq!(shown.to_string().parse::<Quantity>().unwrap(), shown);
        }

        #[test]
        fn units_and_millis_read_back_the_same(number in any::<i64>(), binary in 0_u32..6) {
            prop_assume!(number != i64::MIN);
            let units = Quantity::from_units(number);
            prop_assert_eq!(units.value(), number);
            prop_assert_eq!(units.to_string().parse::<Quantity>().unwrap(), units);
            prop_assert_eq!(Quantity::from_millis(number).milli_value(), number);
            let shifted = (number >> 4) >> (10 * binary) << (10 * binary);
            let suffix = ["", "Ki", "Mi", "Gi", "Ti", "Pi"][binary as usize];
            let text = format!("{}{suffix}", shifted >> (10 * binary));
            prop_assert_eq!(text.parse::<Quantity>().unwrap(), Quantity::from_units(shifted));
        }

        #[test]
        fn order_is_that_of_the_numbers(a in any::<i32>(), b in any::<i32>()) {
            let (left, right) = (quantity(&format!("{a}m")), quantity(&format!("{b}m")));
            prop_assert_eq!(left.cmp(&right), a.cmp(&b));
            prop_assert_eq!((left - right).milli_value(), i64::from(a) - i64::from(b));
        }
    }
}
