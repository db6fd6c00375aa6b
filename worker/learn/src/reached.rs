//! Which parameters a step's gradients reach. An executor writes zeros where nothing flows back, so that a parameter is without a gradient
//! whose numbers are all exactly zero, in every micro-batch and on every rank, before any rank adds to those of another.

use crate::error::Result;
use crate::units::{Memory, Units};
use crate::watched::Watch;
use fleet_collectives::{Gang, Op};
use fleet_common::model::{Layout, Role};

/// Names that a line has.
const NAMED_MAX: usize = 8;

/// Of each parameter of a layout, whether any of its gradients was not zero, or none is expected in a first step.
pub(crate) struct Reached(Vec<bool>);

impl Reached {
    pub fn new(layout: &Layout) -> Reached {
        Reached(layout.parameters.iter().map(|p| p.role == Role::LoraA).collect())
    }

    /// For a pass over the units of `layout`. A number that is not zero ends the look at its parameter.
    pub fn look<'a>(&'a mut self, layout: &'a Layout) -> Look<'a> {
        Look { layout, reached: self }
    }

    /// What to say of the parameters that no gradient of any rank has reached, if there are some. A collective call.
    pub fn line(&self, layout: &Layout, gang: &mut dyn Gang) -> Result<Option<String>> {
        let mut found: Vec<f64> = self.0.iter().map(|found| f64::from(u8::from(*found))).collect();
        gang.all_reduce_f64(&mut found, Op::Max)?;
        let missed = layout.parameters.iter().zip(found).filter(|(_, found)| *found == 0.0);
        Ok(said(&missed.map(|(parameter, _)| parameter.name.as_str()).collect::<Vec<_>>()))
    }
}

fn said(names: &[&str]) -> Option<String> {
    let named = names[..names.len().min(NAMED_MAX)].join(", ");
    let more = match names.len().saturating_sub(NAMED_MAX) {
        0 => String::new(),
        more => format!(" and {more} more"),
    };
    let are = match names.len() {
        0 => return None,
        1 => "1 parameter",
        count => &format!("{count} parameters"),
    };
    Some(format!(
        "no gradient of the first step has reached {are}: {named}{more}; weight decay alone changes what never gets one"
    ))
}

/// Looks at gradients where they are ready.
pub(crate) struct Look<'a> {
    layout: &'a Layout,
    reached: &'a mut Reached,
}

impl<M: Memory> Watch<M> for Look<'_> {
    fn ready(&mut self, unit: usize, units: &mut dyn Units<M>) -> Result<()> {
        let parameters = self.layout.parameters.iter().zip(&mut self.reached.0);
        for (parameter, reached) in parameters.filter(|(parameter, _)| parameter.unit == unit) {
            *reached = *reached || M::any(units.numbers().1, &parameter.range)?;
        }
        units.ready(unit)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_few_names_are_told_and_then_their_number() {
        assert_eq!(said(&[]), None);
        let one = said(&["lm_head.weight"]).unwrap();
        assert!(one.contains("reached 1 parameter: lm_head.weight; "), "{one}");
        let many: Vec<String> = (0..10).map(|n| format!("w{n}")).collect();
        let many = said(&many.iter().map(String::as_str).collect::<Vec<_>>()).unwrap();
        assert!(many.contains("10 parameters: w0, w1,") && many.contains("w7 and 2 more; "), "{many}");
    }
}
