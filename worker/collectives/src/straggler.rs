//! When one of several that should take equally long is a straggler: what agents say of the ranks of a node and ranks of the hosts of a gang.

use std::time::Duration;

/// So many times as long as the others (their median) is slow, in two windows one after the other, and until it comes below `FINE` again.
pub const SLOW: f64 = 1.5;
pub const FINE: f64 = 1.25;
/// A window has so many steps at least, and lasts so long.
pub const STEPS_MIN: u64 = 5;
pub const WINDOW_MIN: Duration = Duration::from_secs(3);
/// Less for each step is no matter.
const DIFFERENCE_MIN: Duration = Duration::from_millis(2);

/// Who takes longest, and how many times as long as the others. `means` are seconds of a step.
pub fn slowest(means: &[f64]) -> Option<(usize, f64)> {
    let all = (0..means.len()).map(|at| (at, times_as_long(means, at)));
    all.max_by(|a, b| a.1.total_cmp(&b.1))
}

/// How many times as long as the others this one takes.
pub fn times_as_long(means: &[f64], at: usize) -> f64 {
    let mut others: Vec<f64> = means.to_vec();
    let mine = others.remove(at);
    others.sort_by(f64::total_cmp);
    let Some(median) = others.get(others.len() / 2) else { return 1.0 };
    match mine - median < DIFFERENCE_MIN.as_secs_f64() {
        true => 1.0,
        false => mine / median.max(1e-9),
    }
}
