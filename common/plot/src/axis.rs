//! An axis: which numbers it spans, and where its marks stand.

/// From numbers to places.
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct Axis {
    low: f64,
    high: f64,
    log: bool,
}

impl Axis {
    /// Over all `values` that can stand on it, with some air around them. `None` where there are none.
    pub fn over(values: impl Iterator<Item = f64>, log: bool, air: f64) -> Option<Axis> {
        let sound = values.filter(|value| value.is_finite() && (!log || *value > 0.0));
        let seen = sound.fold(None, |seen: Option<(f64, f64)>, value| {
            Some(seen.map_or((value, value), |(low, high)| (low.min(value), high.max(value))))
        });
        let (low, high) = seen?;
        let (low, high) = if log { (low.log10(), high.log10()) } else { (low, high) };
        // Halved, so that the widest range is finite.
        let wide = (high / 2.0 - low / 2.0) * 2.0 * air;
        let wide = if wide.is_finite() { wide } else { 0.0 };
        let alone = match (high > low, log) {
            (true, _) => 0.0,
            (false, true) => 0.5,
            (false, false) => (high.abs() / 10.0).max(f64::MIN_POSITIVE * 1e6).max(1e-12),
        };
        let around = if high > low { wide } else { alone };
        Some(Axis { low: low - around, high: high + around, log })
    }

    /// The same from zero on, where the numbers are not below it.
    pub fn with_zero(self) -> Axis {
        if self.log { self } else { Axis { low: self.low.min(0.0), ..self } }
    }

    /// Where a number stands, 0 to 1; `None` where it cannot stand on this axis.
    pub fn place(&self, value: f64) -> Option<f64> {
        if !value.is_finite() || (self.log && value <= 0.0) {
            return None;
        }
        let value = if self.log { value.log10() } else { value };
        let half = self.high / 2.0 - self.low / 2.0;
        Some((value / 2.0 - self.low / 2.0) / half)
    }

    /// About so many marks, each with its place and its words.
    pub fn ticks(&self, about: usize) -> Vec<(f64, String)> {
        let values = if self.log { self.powers(about) } else { self.steps(about) };
        let within = values.into_iter().filter_map(|(value, step)| {
            let at = self.place(value).filter(|at| (-1e-9..=1.0 + 1e-9).contains(at))?;
            Some((at, words(value, step)))
        });
        within.collect()
    }

    /// Multiples of 1, 2 or 5 times a power of ten.
    fn steps(&self, about: usize) -> Vec<(f64, f64)> {
        let raw = (self.high / about.max(1) as f64) - (self.low / about.max(1) as f64);
        let power = 10f64.powf(raw.log10().floor());
        let factor =
            [1.0, 2.0, 5.0, 10.0].into_iter().find(|factor| factor * power >= raw * 0.999).unwrap_or(10.0);
        let step = factor * power;
        if !step.is_finite() || step <= 0.0 {
            return Vec::new();
        }
        // Numbers that are round but for their last bits count as round.
        let first = (self.low / step - 1e-9).ceil();
        let count = ((self.high / step + 1e-9).floor() - first).clamp(0.0, 4.0 * about as f64) as usize;
        (0..=count).map(|n| ((first + n as f64) * step, step)).collect()
    }

    /// Powers of ten; with few of them also 2 and 5 times those.
    fn powers(&self, about: usize) -> Vec<(f64, f64)> {
        let (first, last) = (self.low.floor() as i32, self.high.ceil() as i32);
        let decades = (last - first).max(1) as usize;
        let every = decades.div_ceil(about.max(1)) as i32;
        let factors: &[f64] = if decades <= 3 { &[1.0, 2.0, 5.0] } else { &[1.0] };
        let powers = (first..=last).filter(|power| power.rem_euclid(every) == 0);
        powers
            .flat_map(|power| factors.iter().map(move |f| (f * 10f64.powi(power), 10f64.powi(power))))
            .collect()
    }
}

/// A number between others that are `step` apart, short.
pub fn words(value: f64, step: f64) -> String {
    let (size, step) = (value.abs(), step.abs());
    if size < step * 1e-9 {
        return "0".to_owned();
    }
    let scale = |unit: f64, name: &str| format!("{}{name}", decimals(value / unit, step / unit));
    match size.max(step) {
        size if !(1e-3..1e15).contains(&size) => exponent(value),
        size if size >= 1e12 => scale(1e12, "T"),
        size if size >= 1e9 => scale(1e9, "G"),
        size if size >= 1e6 => scale(1e6, "M"),
        size if size >= 1e4 => scale(1e3, "k"),
        _ => decimals(value, step),
    }
}

fn exponent(value: f64) -> String {
    let text = format!("{value:.1e}");
    text.replace(".0e", "e")
}

fn decimals(value: f64, step: f64) -> String {
    let places = (-step.log10() - 1e-9).ceil().clamp(0.0, 9.0) as usize;
    format!("{value:.places$}")
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    fn labels(low: f64, high: f64, log: bool) -> Vec<String> {
        let axis = Axis::over([low, high].into_iter(), log, 0.0).unwrap();
        axis.ticks(5).into_iter().map(|(_, label)| label).collect()
    }

    #[test]
    fn marks_are_round_numbers() {
        assert_eq!(labels(0.0, 1.0, false), ["0", "0.2", "0.4", "0.6", "0.8", "1.0"]);
        assert_eq!(labels(1.93, 5.2, false), ["2", "3", "4", "5"]);
        assert_eq!(labels(0.0, 250_000.0, false), ["0", "50k", "100k", "150k", "200k", "250k"]);
        assert_eq!(labels(0.0, 3e-4, false), ["0", "1e-4", "2e-4", "3e-4"]);
        assert_eq!(labels(1e-5, 1.0, true), ["1e-5", "1e-4", "0.001", "0.01", "0.1", "1"]);
        assert_eq!(labels(1.5, 30.0, true), ["2", "5", "10", "20"]);
    }

    #[test]
    fn a_single_number_has_room_around_it_and_none_has_no_axis() {
        let axis = Axis::over([3.0].into_iter(), false, 0.05).unwrap();
        assert_eq!(axis.place(3.0), Some(0.5));
        assert_eq!(Axis::over([f64::NAN, f64::INFINITY].into_iter(), false, 0.0), None);
        assert_eq!(Axis::over([0.0, -1.0].into_iter(), true, 0.0), None);
    }

    proptest! {
        #[test]
        fn any_range_has_a_few_marks_inside_it(low in any::<f64>(), high in any::<f64>(), log in any::<bool>()) {
            if let Some(axis) = Axis::over([low, high].into_iter(), log, 0.05) {
                let ticks = axis.ticks(6);
                prop_assert!(ticks.len() <= 25, "{ticks:?}");
                prop_assert!(ticks.iter().all(|(at, label)| (-0.01..=1.01).contains(at) && label.len() < 16), "{ticks:?}");
                for value in [low, high] {
                    if let Some(at) = axis.place(value) {
                        prop_assert!((-0.01..=1.01).contains(&at));
                    }
                }
            }
        }
    }
}
