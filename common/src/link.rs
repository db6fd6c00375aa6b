//! A network between machines, as people write it: `10Gbit` and `50us`.

use std::fmt;
use std::str::FromStr;
use std::time::Duration;

/// How much goes through, in each direction.
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct Rate {
    pub bits_per_s: f64,
}

/// From one end to the other.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Latency(pub Duration);

const RATES: [(&str, f64); 4] = [("Gbit", 1e9), ("Mbit", 1e6), ("kbit", 1e3), ("bit", 1.0)];
const TIMES: [(&str, f64); 5] = [("µs", 1e-6), ("us", 1e-6), ("ms", 1e-3), ("ns", 1e-9), ("s", 1.0)];

impl FromStr for Rate {
    type Err = String;

    fn from_str(text: &str) -> Result<Rate, String> {
        let bits_per_s =
            quantity(text.strip_suffix("/s").unwrap_or(text), &RATES).filter(|rate| *rate >= 1.0);
        let bits_per_s = bits_per_s.ok_or("write a number of bits per second, such as 10Gbit or 100Mbit")?;
        Ok(Rate { bits_per_s })
    }
}

impl FromStr for Latency {
    type Err = String;

    fn from_str(text: &str) -> Result<Latency, String> {
        let seconds = quantity(text, &TIMES).and_then(|seconds| Duration::try_from_secs_f64(seconds).ok());
        Ok(Latency(seconds.ok_or("write a time, such as 50us or 2ms")?))
    }
}

/// A finite number that is not negative, and a unit.
fn quantity(text: &str, units: &[(&str, f64)]) -> Option<f64> {
    let (number, unit) = units.iter().find_map(|(name, factor)| Some((text.strip_suffix(name)?, factor)))?;
    let number: f64 = number.trim_end().parse().ok()?;
    Some(number * unit).filter(|value| value.is_finite() && *value >= 0.0)
}

impl fmt::Display for Rate {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let (name, factor) =
            RATES.into_iter().find(|(_, factor)| self.bits_per_s >= *factor).unwrap_or(("bit", 1.0));
        write!(f, "{} {name}/s", self.bits_per_s / factor)
    }
}

impl fmt::Display for Latency {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{:?}", self.0)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn numbers_with_units_are_read_and_written() {
        for (text, bits_per_s, written) in [
            ("10Gbit", 1e10, "10 Gbit/s"),
            ("2.5 Gbit/s", 2.5e9, "2.5 Gbit/s"),
            ("100Mbit", 1e8, "100 Mbit/s"),
        ] {
            let rate: Rate = text.parse().unwrap();
            assert_eq!((rate.bits_per_s, rate.to_string().as_str()), (bits_per_s, written));
            assert_eq!(rate.to_string().parse(), Ok(rate));
        }
        for (text, micros, written) in [("50us", 50, "50µs"), ("2ms", 2000, "2ms"), ("30µs", 30, "30µs")] {
            let latency: Latency = text.parse().unwrap();
            assert_eq!((latency.0.as_micros(), latency.to_string().as_str()), (micros, written));
        }
        for text in ["", "10", "Gbit", "-1Gbit", "NaNGbit", "0Gbit", "1e999Gbit", "10 cows"] {
            assert!(text.parse::<Rate>().is_err(), "{text}");
        }
        for text in ["", "5", "us", "-1us", "1e30s", "NaNs"] {
            assert!(text.parse::<Latency>().is_err(), "{text}");
        }
    }
}
