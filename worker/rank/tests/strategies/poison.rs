//! A step in which one rank computes what is no number.

use super::*;
use fleet_learn::Error;

/// A batch of two sequences; what `spoil` does to the weights of its targets is what is wrong with it.
fn batch(spoil: &dyn Fn(&mut [f32])) -> [TokenBatch; 1] {
    let (ids, targets) = (token_ids(2 * SEQ, 97, 1), token_ids(2 * SEQ, 97, 51));
    let mut weights = vec![0.0; ids.len()];
    weights[5] = 1e-6;
    spoil(&mut weights);
    [TokenBatch { ids, targets, weights: Some(weights), seq: SEQ, ..Default::default() }]
}

/// What each rank is told of a step in which `culprit` has a spoiled batch. Before and after, all have the same weights.
fn errors(cut: Cut, culprit: usize, spoil: &(dyn Fn(&mut [f32]) + Sync)) -> Vec<Error> {
    each(cut, |rank, seat| {
        let mut engine = engine::<f32>(&tiny_config(), cut, || seat.take());
        engine.fresh_weights(5).unwrap();
        let before = engine.weights().unwrap().into_owned();
        let update = |step| Update { adamw: ADAMW, lr: 3e-3, step };
        let spoiled = batch(&|weights| {
            if rank == culprit {
                spoil(weights)
            }
        });
        let micro: Vec<TokenBatch> = (0..cut.micro).map(|_| spoiled[0].clone()).collect();
        let error = engine.step(&micro, &update(1), Votes::default()).unwrap_err();
        assert_eq!(engine.weights().unwrap(), before, "{cut:?}");
        error
    })
}

fn cuts() -> impl Iterator<Item = Cut> {
    let alone = [1, 2].map(|micro| Cut { micro, ..ALONE });
    let hosts = [(ONE_HOST[1], 1), (ONE_HOST[2], 1), (ONE_HOST[1], 2), (&[0, 0, 1], 1)];
    let several =
        OF_SEVERAL.into_iter().flat_map(move |kind| hosts.map(|(hosts, micro)| Cut { kind, hosts, micro }));
    alone.into_iter().chain(several)
}

#[test]
fn the_rank_whose_loss_is_no_number_is_named_and_the_weights_stay() {
    for cut in cuts() {
        for culprit in 0..cut.world() {
            for error in errors(cut, culprit, &|weights| weights[7] = f32::NAN) {
                let on = if cut.world() > 1 { format!(" on rank {culprit}") } else { String::new() };
                let start = format!("the loss became NaN{on} at step 1; ");
                assert!(error.to_string().starts_with(&start), "{cut:?}: {error}");
                assert_eq!(error.culprit(0), culprit as u32);
            }
        }
    }
}

/// Two targets count so much that their flow back is more than fp32 holds, while their losses cancel.
#[test]
fn where_the_loss_is_a_number_the_unit_whose_gradients_are_none_is_named() {
    for cut in cuts() {
        let culprit = cut.world() - 1;
        for error in errors(cut, culprit, &|weights| (weights[1], weights[3]) = (1e36, -1e36)) {
            let on = if cut.world() > 1 { format!(" on rank {culprit}") } else { String::new() };
            let start = format!("the gradients of the head became NaN or infinite{on} at step 1; ");
            assert!(error.to_string().starts_with(&start), "{cut:?}: {error}");
        }
    }
}
