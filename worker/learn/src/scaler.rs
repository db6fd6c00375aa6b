//! By how much losses are scaled so that their gradients are numbers in fp16: PyTorch's `GradScaler`. A function of which steps had numbers, which
//! all ranks know, so all of them have the same scale.

use fleet_checkpoint::LossScale;

/// PyTorch's.
const FIRST: f64 = 65_536.0;
/// After so many steps with numbers the scale is doubled.
const PATIENCE: u64 = 2_000;
/// Below it gradients are no numbers whatever the scale is.
const LEAST: f64 = 1.0;

#[derive(Clone, Debug, PartialEq)]
pub struct Scaler {
    state: LossScale,
}

impl Default for Scaler {
    fn default() -> Scaler {
        Scaler::of(LossScale { scale: FIRST, good_steps: 0, skipped: 0 })
    }
}

impl Scaler {
    /// Goes on from where another one was.
    pub fn of(state: LossScale) -> Scaler {
        Scaler { state }
    }

    pub fn state(&self) -> LossScale {
        self.state
    }

    /// A step had numbers.
    pub fn succeed(&mut self) {
        self.state.good_steps += 1;
        if self.state.good_steps == PATIENCE {
            let scale = self.state.scale * 2.0;
            self.state = LossScale { scale, good_steps: 0, ..self.state };
        }
    }

    /// The scale cannot be halved any more.
    pub fn is_spent(&self) -> bool {
        self.state.scale / 2.0 < LEAST
    }

    /// A step had none and is left out. `false`: the scale cannot be halved any more.
    pub fn skip(&mut self) -> bool {
        if self.is_spent() {
            return false;
        }
        self.state =
            LossScale { scale: self.state.scale / 2.0, good_steps: 0, skipped: self.state.skipped + 1 };
        true
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_scale_is_doubled_after_2000_good_steps_and_halved_after_a_bad_one() {
        let mut scaler = Scaler::default();
        (0..PATIENCE - 1).for_each(|_| scaler.succeed());
        assert_eq!(scaler.state().scale, 65_536.0);
        scaler.succeed();
        assert_eq!(scaler.state(), LossScale { scale: 131_072.0, good_steps: 0, skipped: 0 });
        scaler.succeed();
        assert!(scaler.skip());
        assert_eq!(scaler.state(), LossScale { scale: 65_536.0, good_steps: 0, skipped: 1 });
        assert_eq!(Scaler::of(scaler.state()), scaler);
    }

    #[test]
    fn a_scale_below_one_is_none() {
        let mut scaler = Scaler::default();
        assert!((0..16).all(|_| scaler.skip()), "65536 is 2 to the 16");
        assert_eq!(scaler.state().scale, 1.0);
        assert!(!scaler.skip());
        assert_eq!(scaler.state().scale, 1.0, "the same error again");
    }
}
