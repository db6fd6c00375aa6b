//! The losses of a pair of answers.

use fleet_common::job::{Dpo, PreferenceLoss};

/// An answer behind its prompt.
#[derive(Clone, Copy, Debug)]
pub(super) struct Answer {
    /// Its loss: minus the log-probability of all its tokens.
    pub model: f64,
    /// The same of the reference.
    pub reference: f64,
    /// At least one.
    pub tokens: f64,
}

#[derive(Clone, Copy, Debug)]
pub(super) struct Pair {
    pub chosen: Answer,
    pub rejected: Answer,
}

/// The loss of a pair, and how it grows with the model's loss of the chosen answer and of the rejected one.
pub(super) fn of(dpo: &Dpo, pair: &Pair) -> (f64, [f64; 2]) {
    let (beta, wrong) = (dpo.beta, dpo.label_smoothing);
    let per = |answer: Answer| if dpo.loss_type.is_per_token() { answer.tokens } else { 1.0 };
    let [chosen, rejected] = [pair.chosen, pair.rejected].map(|a| (a.reference - a.model) / per(a));
    // Of the loss by `chosen` and `rejected`; most losses know their difference alone.
    let of_difference = |(loss, slope): (f64, f64)| (loss, [slope, -slope]);
    let h = chosen - rejected;
    let (loss, slopes) = match dpo.loss_type {
        PreferenceLoss::Sigmoid | PreferenceLoss::SigmoidNorm => of_difference((
            (1.0 - wrong) * softplus(-beta * h) + wrong * softplus(beta * h),
            beta * (wrong * sigmoid(beta * h) - (1.0 - wrong) * sigmoid(-beta * h)),
        )),
        PreferenceLoss::Robust => {
            let whole = 1.0 - 2.0 * wrong;
            of_difference((
                ((1.0 - wrong) * softplus(-beta * h) - wrong * softplus(beta * h)) / whole,
                beta * (-(1.0 - wrong) * sigmoid(-beta * h) - wrong * sigmoid(beta * h)) / whole,
            ))
        }
        PreferenceLoss::Hinge => {
            let left = 1.0 - beta * h;
            of_difference((left.max(0.0), if left > 0.0 { -beta } else { 0.0 }))
        }
        PreferenceLoss::Ipo => {
            let off = h - 1.0 / (2.0 * beta);
            of_difference((off * off, 2.0 * off))
        }
        PreferenceLoss::Orpo => {
            // Log-odds of an answer whose tokens have the mean log-probability `x`, and how they grow with it.
            let odds = |x: f64| {
                (x - (-x.exp_m1()).max(f64::MIN_POSITIVE).ln(), -1.0 / x.exp_m1().min(-f64::EPSILON))
            };
            let ((of_chosen, by_chosen), (of_rejected, by_rejected)) = (odds(chosen), odds(rejected));
            let more = of_chosen - of_rejected;
            let slope = -beta * sigmoid(-more);
            (beta * softplus(-more) - chosen, [slope * by_chosen - 1.0, -slope * by_rejected])
        }
    };
    (loss, [-slopes[0] / per(pair.chosen), -slopes[1] / per(pair.rejected)])
}

fn sigmoid(x: f64) -> f64 {
    1.0 / (1.0 + (-x).exp())
}

/// `ln(1 + e^x)`.
fn softplus(x: f64) -> f64 {
    x.max(0.0) + (-x.abs()).exp().ln_1p()
}

#[cfg(test)]
mod tests {
    use super::*;

    fn dpo(loss_type: PreferenceLoss, label_smoothing: f64) -> Dpo {
        Dpo { beta: 0.1, loss_type, label_smoothing, ..Dpo::default() }
    }

    const fn answer(model: f64, reference: f64, tokens: f64) -> Answer {
        Answer { model, reference, tokens }
    }

    const PAIR: Pair = Pair { chosen: answer(10.0, 12.0, 4.0), rejected: answer(20.0, 17.0, 5.0) };

    #[test]
    fn losses_are_those_of_trl() {
        // Log-ratios 2 and -3, so that their difference is 5; for each token 2/4 + 3/5. TRL 1.16's formulas in double precision; that of ORPO
        // by the paper (arXiv:2403.07691), with p = e^-2.5 and e^-4.
        for (kind, smoothing, wanted) in [
            (PreferenceLoss::Sigmoid, 0.0, 0.474_076_984_18),
            (PreferenceLoss::Sigmoid, 0.1, 0.524_076_984_18),
            (PreferenceLoss::Hinge, 0.0, 0.5),
            (PreferenceLoss::Ipo, 0.0, 15.21),
            (PreferenceLoss::Robust, 0.1, 0.411_576_984_18),
            (PreferenceLoss::SigmoidNorm, 0.0, 0.639_658_918_62),
            (PreferenceLoss::Orpo, 0.0, 2.518_949_230_18),
        ] {
            let pair = if kind == PreferenceLoss::Orpo {
                Pair { chosen: answer(10.0, 0.0, 4.0), rejected: answer(20.0, 0.0, 5.0) }
            } else {
                PAIR
            };
            let (loss, _) = of(&dpo(kind, smoothing), &pair);
            assert!((loss - wanted).abs() < 1e-9, "{kind:?} {smoothing}: {loss}");
        }
        // Its sign: a model that is no better than its reference has the loss ln 2, and a better one less.
        let even = Pair { chosen: answer(3.0, 3.0, 1.0), rejected: answer(5.0, 5.0, 1.0) };
        let (loss, counts) = of(&dpo(PreferenceLoss::Sigmoid, 0.0), &even);
        assert!((loss - std::f64::consts::LN_2).abs() < 1e-12 && counts[0] > 0.0 && counts[1] < 0.0);
    }

    #[test]
    fn what_tokens_count_is_how_the_loss_grows_with_theirs() {
        for kind in [
            PreferenceLoss::Sigmoid,
            PreferenceLoss::Hinge,
            PreferenceLoss::Ipo,
            PreferenceLoss::Robust,
            PreferenceLoss::SigmoidNorm,
            PreferenceLoss::Orpo,
        ] {
            let dpo = dpo(kind, if kind.is_smoothed() { 0.2 } else { 0.0 });
            let reference = if kind == PreferenceLoss::Orpo { [0.0; 2] } else { [12.0, 17.0] };
            let at = |chosen: f64, rejected: f64| Pair {
                chosen: answer(10.0 + chosen, reference[0], 4.0),
                rejected: answer(20.0 + rejected, reference[1], 5.0),
            };
            let (_, counts) = of(&dpo, &at(0.0, 0.0));
            let step = 1e-6;
            let slope = |up: Pair, down: Pair| (of(&dpo, &up).0 - of(&dpo, &down).0) / (2.0 * step);
            let chosen = slope(at(step, 0.0), at(-step, 0.0));
            let rejected = slope(at(0.0, step), at(0.0, -step));
            assert!((counts[0] - chosen).abs() < 1e-6 && (counts[1] - rejected).abs() < 1e-6, "{kind:?}");
        }
    }

    /// An answer of which the model is certain, and one that it takes for impossible.
    #[test]
    fn odds_stay_numbers() {
        for chosen in [0.0, 1e-12, 1e4] {
            let pair = Pair { chosen: answer(chosen, 0.0, 1.0), rejected: answer(1e4 - chosen, 0.0, 1.0) };
            let (loss, counts) = of(&dpo(PreferenceLoss::Orpo, 0.0), &pair);
            assert!(
                loss.is_finite() && counts.iter().all(|count| count.is_finite()),
                "{chosen}: {loss} {counts:?}"
            );
        }
    }
}
