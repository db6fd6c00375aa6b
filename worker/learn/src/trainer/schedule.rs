//! The learning rate of each step: linear warm-up from 0, then constant, or down to a share of the peak. As Hugging Face counts: the
//! first step of a warm-up has rate 0.

use fleet_common::job::{Optimizer, Schedule};

/// Rate of optimizer step `step`, which counts from 0, of `total`.
pub fn learning_rate(o: &Optimizer, step: u64, total: u64) -> f64 {
    let warmup = o.warmup(total);
    if step < warmup {
        return o.learning_rate * step as f64 / warmup as f64;
    }
    let progress = (step - warmup) as f64 / total.saturating_sub(warmup).max(1) as f64;
    let left = match o.schedule {
        Schedule::Constant => return o.learning_rate,
        Schedule::Cosine => 0.5 * (1.0 + (std::f64::consts::PI * progress).cos()),
        Schedule::Linear => 1.0 - progress,
    };
    o.learning_rate * (o.min_lr_ratio + (1.0 - o.min_lr_ratio) * left.max(0.0))
}

#[cfg(test)]
mod tests {
    use super::*;

    fn optimizer(schedule: Schedule, min_lr_ratio: f64) -> Optimizer {
        Optimizer {
            learning_rate: 2.0,
            schedule,
            warmup_steps: Some(4),
            min_lr_ratio,
            weight_decay: 0.0,
            beta1: 0.9,
            beta2: 0.95,
            eps: 1e-8,
            max_grad_norm: 1.0,
        }
    }

    #[test]
    fn a_warm_up_is_no_longer_than_its_run() {
        let mut o = optimizer(Schedule::Cosine, 0.0);
        let table = [
            (Some(4), 25, 4),
            (Some(25), 25, 25),
            (Some(1000), 25, 2),
            (None, 25, 2),
            (None, 9, 0),
            (None, 9000, 50),
        ];
        for (given, total, wanted) in table {
            o.warmup_steps = given;
            assert_eq!(o.warmup(total), wanted, "{given:?} of {total}");
        }
    }

    #[test]
    fn warm_up_peak_and_end() {
        for schedule in [Schedule::Cosine, Schedule::Linear, Schedule::Constant] {
            let o = optimizer(schedule, 0.1);
            let rates: Vec<f64> = (0..=4).map(|s| learning_rate(&o, s, 24)).collect();
            assert_eq!(rates, [0.0, 0.5, 1.0, 1.5, 2.0]);
            let end = learning_rate(&o, 24, 24);
            assert!((end - if schedule == Schedule::Constant { 2.0 } else { 0.2 }).abs() < 1e-12);
        }
        assert!((learning_rate(&optimizer(Schedule::Cosine, 0.0), 14, 24) - 1.0).abs() < 1e-12);
        assert!((learning_rate(&optimizer(Schedule::Linear, 0.0), 9, 24) - 1.5).abs() < 1e-12);
    }
}
