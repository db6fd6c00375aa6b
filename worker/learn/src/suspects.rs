//! Who had no numbers. Sums over all ranks say that somebody had none; then each rank computes its part of the step a second time, looks at its
//! own loss and at its own gradients before anybody adds to them, and tells the others. Steps that have numbers pay nothing for it.

use crate::batch::TokenBatch;
use crate::error::{Error, Result};
use crate::executor::{Executor, Weigh};
use crate::objective::Weighing;
use crate::strategy::{Micro, Strategy};
use crate::units::{Memory, Units};
use crate::watched::{Watch, Watched};
use fleet_collectives::{Activity, Op};
use fleet_common::ids::Rank;
use fleet_common::model::Layout;

/// Ranks that a line names one by one.
const NAMED_MAX: usize = 8;

/// A part of a step that was computed, and what it was computed for.
pub(crate) struct Step<'a> {
    pub micro_batches: &'a [TokenBatch],
    pub scale: f32,
    pub number: u64,
}

/// What a rank found of its own.
#[derive(Clone, Copy, Debug, PartialEq)]
enum Found {
    Loss(f64),
    /// Of this unit first, on the way from the head to the embedding.
    Gradients(usize),
}

impl Found {
    /// As it travels in a sum: 0 is nothing.
    fn code(found: Option<Found>) -> f64 {
        match found {
            None => 0.0,
            Some(Found::Gradients(unit)) => 1.0 + unit as f64,
            Some(Found::Loss(loss)) if loss.is_nan() => -1.0,
            Some(Found::Loss(loss)) => -2.0 - f64::from(u8::from(loss < 0.0)),
        }
    }

    fn of(code: f64) -> Option<Found> {
        match code {
            0.0 => None,
            -1.0 => Some(Found::Loss(f64::NAN)),
            -2.0 => Some(Found::Loss(f64::INFINITY)),
            code if code < 0.0 => Some(Found::Loss(f64::NEG_INFINITY)),
            code => Some(Found::Gradients(code as usize - 1)),
        }
    }

    /// Of a loss that is no number nothing behind it is; of gradients those that were computed first are to blame.
    fn weight(&self) -> usize {
        match self {
            Found::Loss(_) => usize::MAX,
            Found::Gradients(unit) => *unit,
        }
    }
}

/// Names rank and unit in the error of a step whose weights were not updated. A collective call.
pub(crate) fn named<M: Memory>(
    executor: &mut dyn Executor<M>,
    strategy: &mut dyn Strategy<M>,
    step: &Step,
    mut weigh: Option<&mut dyn Weighing>,
    error: Error,
) -> Result<Error> {
    strategy.gang().note(Activity::Forward);
    let layout = executor.layout().clone();
    let mut mine = None;
    for (number, batch) in step.micro_batches.iter().enumerate() {
        let units = strategy.units(Micro { first: true, last: false });
        let mut searched = Watched { units, by: Search { layout: &layout, found: None } };
        let mut weigh = weigh.as_deref_mut().map(|weigh| move |losses: &[f64]| weigh.weigh(number, losses));
        let weigh = weigh.as_mut().map(|weigh| weigh as &mut Weigh);
        executor.forward_weigh_backward(&mut searched, &batch.view(), step.scale, weigh)?;
        let found = searched.by.found.map(Found::Gradients);
        let loss = M::value(executor.take_loss()?)?;
        let found = if loss.is_finite() { found } else { Some(Found::Loss(loss)) };
        mine = mine.or(found);
    }
    let gang = strategy.gang();
    let mut codes = vec![0.0; gang.world_size()];
    codes[gang.rank()] = Found::code(mine);
    gang.all_reduce_f64(&mut codes, Op::Sum)?;
    Ok(verdict(&codes, &layout, step.number).unwrap_or(error))
}

/// Looks at gradients where they would be handed to the peers, and keeps them back.
struct Search<'a> {
    layout: &'a Layout,
    /// The first unit whose gradients are no numbers.
    found: Option<usize>,
}

impl<M: Memory> Watch<M> for Search<'_> {
    fn ready(&mut self, unit: usize, units: &mut dyn Units<M>) -> Result<()> {
        let whole = &self.layout.units[unit];
        let of_unit = |range: &&std::ops::Range<usize>| whole.start <= range.start && range.end <= whole.end;
        for range in self.layout.parameters.iter().map(|p| &p.range).filter(of_unit) {
            if self.found.is_none() && !M::all_finite(units.numbers().1, range)? {
                self.found = Some(unit);
            }
        }
        Ok(())
    }
}

/// By what each rank found, the worst; `None` where all had numbers: their sum has overflowed.
fn verdict(codes: &[f64], layout: &Layout, step: u64) -> Option<Error> {
    let found: Vec<Option<Found>> = codes.iter().map(|code| Found::of(*code)).collect();
    let worst = found.iter().flatten().copied().max_by_key(Found::weight)?;
    let with_it = |found: &Option<Found>| found.is_some_and(|found| found.weight() == worst.weight());
    let ranks: Vec<usize> = (0..found.len()).filter(|rank| with_it(&found[*rank])).collect();
    let on = on_ranks(&ranks, found.len());
    let what = match worst {
        Found::Loss(loss) => format!("the loss became {loss}{on}"),
        Found::Gradients(unit) => {
            format!("the gradients of {} became NaN or infinite{on}", unit_name(unit, layout))
        }
    };
    // Where all have it, it is of none.
    let culprit = ranks.first().filter(|_| ranks.len() < found.len()).map(|rank| *rank as Rank);
    Some(Error::no_number(&what, step, culprit))
}

fn unit_name(unit: usize, layout: &Layout) -> String {
    let blocks = layout.units.len() - 2;
    match unit {
        0 => "the embedding".to_owned(),
        unit if unit > blocks => "the head".to_owned(),
        unit => format!("block {unit} of {blocks}"),
    }
}

/// ` on rank 1`, ` on ranks 0, 1 and 4`, ` on 12 of 16 ranks`; nothing where there is only one.
fn on_ranks(ranks: &[usize], world: usize) -> String {
    let names: Vec<String> = ranks.iter().map(usize::to_string).collect();
    match &names[..] {
        _ if world == 1 => String::new(),
        all if all.len() == world => " on all ranks".to_owned(),
        [one] => format!(" on rank {one}"),
        [first @ .., last] if names.len() <= NAMED_MAX => {
            format!(" on ranks {} and {last}", first.join(", "))
        }
        many => format!(" on {} of {world} ranks", many.len()),
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::model::Model;
    use crate::testing::tiny_config;

    #[test]
    fn the_first_part_of_a_step_without_numbers_is_named_with_all_ranks_that_have_it() {
        let layout = Model::new(&tiny_config()).unwrap().layout();
        let said = |found: &[Option<Found>]| {
            let codes: Vec<f64> = found.iter().map(|found| Found::code(*found)).collect();
            verdict(&codes, &layout, 7).map(|error| (error.to_string(), error.culprit(9)))
        };
        let starts = |found: &[Option<Found>], start: &str, culprit| {
            let (line, blamed) = said(found).unwrap();
            assert!(line.starts_with(&format!("{start} at step 7; ")), "{line}");
            assert_eq!(blamed, culprit, "{line}");
        };
        let [loss, infinite] = [f64::NAN, f64::INFINITY].map(|loss| Some(Found::Loss(loss)));
        let of = |unit| Some(Found::Gradients(unit));
        assert_eq!(said(&[None, None]), None);
        starts(&[loss], "the loss became NaN", 9);
        starts(&[None, loss, None], "the loss became NaN on rank 1", 1);
        starts(&[infinite, infinite], "the loss became inf on all ranks", 9);
        starts(&[of(3), loss, loss], "the loss became NaN on ranks 1 and 2", 1);
        starts(&[of(1), of(2), of(0)], "the gradients of block 2 of 2 became NaN or infinite on rank 1", 1);
        starts(
            &[of(3), of(2), of(3), None],
            "the gradients of the head became NaN or infinite on ranks 0 and 2",
            0,
        );
        starts(&[None, of(0)], "the gradients of the embedding became NaN or infinite on rank 1", 1);
        let many: Vec<_> = (0..16).map(|rank| loss.filter(|_| rank < 12)).collect();
        starts(&many, "the loss became NaN on 12 of 16 ranks", 0);
    }
}
