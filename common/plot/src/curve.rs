//! A series that grows while it is watched, in bounded memory.

/// Points of a curve at most. Beyond that neighbours are drawn together, so that what stays has the extremes of what was.
const POINTS_MAX: usize = 8_192;

/// Points in the order in which they were recorded. One that lies before the last one takes back what came from there on: a run that went
/// back to a checkpoint goes on from it.
#[derive(Clone, Debug, Default, PartialEq)]
pub struct Curve {
    points: Vec<(f64, f64)>,
}

impl Curve {
    pub fn push(&mut self, x: f64, y: f64) {
        // The same one again is no new one: it was read twice.
        let is_last = self.points.last().is_some_and(|(at, last)| *at == x && last.to_bits() == y.to_bits());
        if !x.is_finite() || is_last {
            return;
        }
        if self.points.last().is_some_and(|(last, _)| *last > x) {
            self.points.truncate(self.points.partition_point(|(at, _)| *at < x));
        }
        self.points.push((x, y));
        if self.points.len() >= 2 * POINTS_MAX {
            self.points = extremes(&self.points, POINTS_MAX / 4);
        }
    }

    pub fn points(&self) -> &[(f64, f64)] {
        &self.points
    }
}

/// At most four points for each of `columns` equal stretches of x: the first, the lowest, the highest and the last, in their order, and a gap
/// where one was. As a line they look like all points, where a stretch is a pixel wide.
pub fn extremes(points: &[(f64, f64)], columns: usize) -> Vec<(f64, f64)> {
    let (Some((first, _)), Some((last, _))) = (points.first(), points.last()) else { return Vec::new() };
    if points.len() <= 4 * columns || last <= first {
        return points.to_vec();
    }
    let column = |x: f64| (((x - first) / (last - first) * columns as f64) as usize).min(columns - 1);
    let mut kept = Vec::with_capacity(4 * columns);
    for part in points.chunk_by(|(one, _), (other, _)| column(*one) == column(*other)) {
        let numbers = || part.iter().enumerate().filter(|(_, (_, y))| y.is_finite());
        let low = numbers().min_by(|(_, one), (_, other)| one.1.total_cmp(&other.1));
        let high = numbers().max_by(|(_, one), (_, other)| one.1.total_cmp(&other.1));
        let gap = part.iter().position(|(_, y)| !y.is_finite());
        let named = [Some(0), low.map(|(at, _)| at), high.map(|(at, _)| at), gap, Some(part.len() - 1)];
        let mut at: Vec<usize> = named.into_iter().flatten().collect();
        at.sort_unstable();
        at.dedup();
        kept.extend(at.into_iter().map(|at| part[at]));
    }
    kept
}

/// The mean of `count` points up to each one; a gap begins anew.
pub fn smooth(points: &[(f64, f64)], count: usize) -> Vec<(f64, f64)> {
    let (mut sum, mut begin) = (0.0, 0);
    let mean = |(at, (x, y)): (usize, &(f64, f64))| {
        if !y.is_finite() {
            (sum, begin) = (0.0, at + 1);
            return (*x, *y);
        }
        sum += y;
        if at + 1 - begin > count {
            sum -= points[begin].1;
            begin += 1;
        }
        (*x, sum / (at + 1 - begin) as f64)
    };
    points.iter().enumerate().map(mean).collect()
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    #[test]
    fn a_run_that_went_back_has_each_step_once() {
        let mut curve = Curve::default();
        for (x, y) in [(1.0, 5.0), (2.0, 4.0), (3.0, 3.0), (2.0, 4.5), (3.0, 3.5)] {
            curve.push(x, y);
        }
        assert_eq!(curve.points(), [(1.0, 5.0), (2.0, 4.5), (3.0, 3.5)]);
    }

    #[test]
    fn a_million_points_take_little_room_and_keep_their_peak() {
        let mut curve = Curve::default();
        for n in 0..1_000_000 {
            curve.push(f64::from(n), if n == 700_001 { 9.0 } else { f64::from(n % 7) / 7.0 });
        }
        assert!(curve.points().len() < 2 * POINTS_MAX);
        assert!(curve.points().contains(&(700_001.0, 9.0)));
        assert_eq!(curve.points().first(), Some(&(0.0, 0.0)));
        assert_eq!(curve.points().last().map(|(x, _)| *x), Some(999_999.0));
    }

    #[test]
    fn a_mean_begins_anew_behind_a_gap() {
        let points = [(1.0, 2.0), (2.0, 4.0), (3.0, 6.0), (4.0, f64::NAN), (5.0, 8.0)];
        let means: Vec<f64> = smooth(&points, 2).into_iter().map(|(_, y)| y).collect();
        assert_eq!(means[..3], [2.0, 3.0, 5.0]);
        assert!(means[3].is_nan());
        assert_eq!(means[4], 8.0);
    }

    proptest! {
        #[test]
        fn what_is_kept_is_in_order_and_has_the_extremes(
            ys in proptest::collection::vec(prop_oneof![9 => -1e6..1e6f64, 1 => Just(f64::NAN)], 1..3_000),
            columns in 1usize..40,
        ) {
            let points: Vec<(f64, f64)> = ys.iter().enumerate().map(|(x, y)| (x as f64, *y)).collect();
            let kept = extremes(&points, columns);
            prop_assert!(kept.len() <= points.len() && kept.len() <= 5 * columns.max(points.len() / 4 + 1));
            prop_assert!(kept.windows(2).all(|two| two[0].0 < two[1].0));
            let span = |points: &[(f64, f64)]| points.iter().filter(|(_, y)| y.is_finite())
                .fold((f64::INFINITY, f64::NEG_INFINITY), |(low, high), (_, y)| (low.min(*y), high.max(*y)));
            prop_assert_eq!(span(&kept), span(&points));
            let has_gap = |points: &[(f64, f64)]| points.iter().any(|(_, y)| y.is_nan());
            prop_assert_eq!(has_gap(&kept), has_gap(&points));
        }
    }
}
