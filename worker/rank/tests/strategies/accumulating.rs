//! What hosts need of each other while gradients are accumulated.

use super::*;
use fleet_learn::strategy::{Micro, Strategy};
use std::sync::Barrier;
use std::time::Duration;

/// If a host does wait for the other one, it is found out so soon.
const DEADLINE: Duration = Duration::from_secs(20);

/// What `rank` computes for every parameter in a micro-batch.
fn gradient(rank: usize, micro: usize) -> f32 {
    (1 + rank) as f32 * [1.0, 0.25, 16.0][micro]
}

/// Computes nothing, and says of all units that their gradients are ready, as an executor does.
fn micro_batch(
    strategy: &mut dyn Strategy<Host<f32>>,
    layout: &Layout,
    value: f32,
    micro: Micro,
) -> fleet_learn::Result<()> {
    let units = strategy.units(micro);
    for unit in (0..layout.units.len()).rev() {
        let (_, gradients) = units.numbers();
        for parameter in layout.parameters.iter().filter(|parameter| parameter.unit == unit) {
            let fresh = gradients.fresh();
            let numbers = gradients.range(parameter.range.clone());
            numbers.iter_mut().for_each(|number| *number = if fresh { value } else { *number + value });
        }
        units.ready(unit)?;
    }
    Ok(())
}

#[test]
fn a_host_needs_no_other_before_the_last_micro_batch() {
    let layout = Model::new(&tiny_config()).unwrap().layout();
    let count = layout.parameters.iter().map(|p| p.range.len()).sum::<usize>();
    let numbers = |hosts: &[usize]| -> f32 {
        let of = |rank: usize| (0..3).map(move |micro| gradient(rank, micro)).sum::<f32>();
        (0..hosts.len()).map(of).sum()
    };
    let several: [&'static [usize]; 4] = [&[0, 1], &[0, 0, 1], &[0, 1, 0, 1], &[0, 1, 2]];
    for (kind, hosts) in OF_SEVERAL.into_iter().flat_map(|kind| several.map(|hosts| (kind, hosts))) {
        let cut = Cut { kind, hosts, micro: 3 };
        let first_host_is_done = Barrier::new(hosts.len());
        let norms = each(cut, |rank, seat| {
            let mut gang = seat.take();
            gang.set_deadline(DEADLINE);
            let (layout, workers) = (layout.clone(), workers(1).unwrap());
            let mut strategy: Box<dyn Strategy<Host<f32>>> = match kind {
                Kind::Solo => unreachable!("several ranks"),
                Kind::Shared => Box::new(Shared::new(layout.clone(), workers, gang).unwrap()),
                Kind::Fsdp | Kind::FsdpKeepingWeights => {
                    Box::new(Sharded::fully(layout.clone(), workers, gang, cut.resident()).unwrap())
                }
                Kind::Hsdp => Box::new(Sharded::within_hosts(layout.clone(), workers, gang).unwrap()),
            };
            // Twice: what is left of the first step is not in the second.
            let reports = [1, 2].map(|step| {
                let mut compute = |micro: usize| {
                    let which = Micro { first: micro == 0, last: micro == 2 };
                    micro_batch(&mut *strategy, &layout, gradient(rank, micro), which)
                };
                let is_first = hosts[rank] == 0;
                let alone = if is_first { (0..2).try_for_each(&mut compute) } else { Ok(()) };
                first_host_is_done.wait();
                alone.unwrap();
                (if is_first { 2 } else { 0 }..3).try_for_each(&mut compute).unwrap();
                let update = Update { adamw: ADAMW, lr: 1e-3, step };
                strategy.update(&update, 1.0, Votes::default()).unwrap()
            });
            reports.map(|report| report.grad_norm)
        });
        let want = f64::from(numbers(hosts)) * (count as f64).sqrt();
        for norm in norms.into_iter().flatten() {
            assert!((norm / want - 1.0).abs() < 1e-5, "{cut:?}: {norm} instead of {want}");
        }
    }
}
