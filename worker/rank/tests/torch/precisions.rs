//! Several ranks in 16 bits, and what jobs make of precisions, of offload and of blocks that are computed again.

use super::*;
use fleet_checkpoint::{Dtype, LossScale, TrainerState, read_numbers};
use fleet_common::events::EventBody;
use fleet_common::job::{ActivationCheckpointing, Precision};

const ALONE: Cut = Cut { kind: Kind::Alone, ..CPU };

#[test]
fn ranks_with_models_in_bf16_learn_like_one() {
    let alone = train(&tiny_config(), ALONE, Numbers::BF16_TRUE, 20).remove(0);
    assert!(alone[19].loss < 0.9 * alone[0].loss, "it learns: {alone:?}");
    for held in [Held::DDP, Held::FSDP, Held::FSDP_KEEPING_WEIGHTS] {
        let cut = Cut { kind: Kind::Ranks(held), world: 3, micro: 2 };
        let all = train(&tiny_config(), cut, Numbers::BF16_TRUE, 20);
        close(&all[0], &alone, 2e-2, &format!("{held:?}"));
        assert_eq!(all[0], all[2], "every rank knows the same");
        let copying = Cut { kind: Kind::Copying(held), ..cut };
        assert_eq!(all, train(&tiny_config(), copying, Numbers::BF16_TRUE, 20), "{held:?}");
    }
}

/// All numbers of a checkpoint, in the order of their names, and their types.
fn numbers(dir: &Path) -> (Vec<f32>, Vec<Dtype>) {
    let mut all = Vec::new();
    let mut dtypes = Vec::new();
    for files in [Files::of_model(dir).unwrap(), Files::of_optimizer(dir).unwrap()] {
        for name in files.names() {
            let tensor = files.get(name).unwrap();
            let mut some = vec![0.0; tensor.shape.iter().product()];
            read_numbers(&tensor, 0, &mut some).unwrap();
            all.extend(some);
            dtypes.push(tensor.dtype);
        }
    }
    (all, dtypes)
}

#[test]
fn checkpoints_in_bf16_go_to_any_number_of_ranks_and_to_other_precisions() {
    for (number, config) in [tiny_config(), transposed()].into_iter().enumerate() {
        let dir = tempfile::tempdir().unwrap();
        let place = |name: &str| dir.path().join(format!("{number}-{name}"));
        let saved = save_in(Numbers::BF16_TRUE, &config, ALONE, &place("first"), Err(3));
        let (kept, dtypes) = numbers(&saved);
        assert!(dtypes.iter().all(|dtype| *dtype == Dtype::BF16) && kept.iter().any(|x| *x != 0.0));
        for kind in [DDP, FSDP] {
            let cut = Cut { kind, world: 3, micro: 1 };
            let again = save_in(Numbers::BF16_TRUE, &config, cut, &place(&format!("{kind:?}")), Ok(&saved));
            assert_eq!(diff(&saved, &again).unwrap(), [], "{kind:?}, to the last bit");
            let wide = save_in(Numbers::FP32, &config, cut, &place(&format!("{kind:?}-32")), Ok(&saved));
            assert_eq!(numbers(&wide).0, kept, "widened");
            assert!(numbers(&wide).1.iter().all(|dtype| *dtype == Dtype::F32));
            let back =
                save_in(Numbers::BF16_TRUE, &config, ALONE, &place(&format!("{kind:?}-16")), Ok(&wide));
            assert_eq!(diff(&saved, &back).unwrap(), [], "{kind:?}, back");
        }
        let on_cpu = save_in(Numbers::FP32, &config, CPU, &place("cpu"), Ok(&saved));
        assert_eq!(numbers(&on_cpu).0, kept, "by the other executor");
        // What was never in bf16 is rounded.
        let fp32 = save_in(Numbers::FP32, &config, ALONE, &place("fp32"), Err(3));
        let rounded = numbers(&save_in(Numbers::BF16_TRUE, &config, ALONE, &place("rounded"), Ok(&fp32))).0;
        let nearest = |x: &f32| half::bf16::from_f32(*x).to_f32();
        assert_eq!(rounded, numbers(&fp32).0.iter().map(nearest).collect::<Vec<f32>>());
    }
}

/// On rank 1 two targets count so much that what flows back from them is more than fp16 holds, while their losses cancel.
fn spoiled(rank: usize) -> TokenBatch {
    let mut batch = global_batch(1);
    let weights = batch.weights.as_mut().unwrap();
    if rank == 1 {
        (weights[SEQ + 7], weights[SEQ + 9]) = (1e12, -1e12);
    }
    batch
}

#[test]
fn a_step_in_which_any_rank_has_no_numbers_in_fp16_is_skipped_by_all() {
    for kind in [DDP, FSDP] {
        let cut = Cut { kind, world: 2, micro: 1 };
        let seen = ranks(&tiny_config(), cut, Numbers::FP16_MIXED, |rank, learner| {
            learner.fresh_weights(5).unwrap();
            let good = |learner: &mut dyn Learner, step: u64| {
                let update = Update { adamw: ADAMW, lr: 2e-3, step };
                learner.step(&[global_batch(step)], &update, Votes::default()).unwrap()
            };
            let first = good(learner, 1);
            assert!(!first.skipped, "{first:?}");
            let eval = |learner: &mut dyn Learner| learner.evaluate(&[global_batch(2)]).unwrap().loss;
            let before = eval(learner);
            let update = |step| Update { adamw: ADAMW, lr: 2e-3, step };
            let bad = learner.step(&[spoiled(rank)], &update(2), Votes::default()).unwrap();
            assert!(bad.skipped && bad.loss.is_finite(), "{bad:?}");
            assert_eq!(eval(learner), before, "nothing was changed");
            let scale = learner.loss_scale();
            assert_eq!(scale, Some(LossScale { scale: 32_768.0, good_steps: 0, skipped: 1 }));
            let next = good(learner, 3);
            assert!(!next.skipped && eval(learner) != before, "{next:?}");
            // With a scale that cannot be halved any more the run ends.
            learner.set_loss_scale(LossScale { scale: 1.0, good_steps: 3, skipped: 9 });
            let error = learner.step(&[spoiled(rank)], &update(4), Votes::default()).unwrap_err();
            (first, next, error.to_string())
        });
        assert_eq!(seen[0], seen[1]);
        let line = &seen[0].2;
        assert!(line.contains("on rank 1 at step 4; ") && line.contains("steps skipped so far: 9"), "{line}");
    }
}

#[test]
fn a_step_that_is_skipped_does_not_tell_what_gradients_reach() {
    for cut in [ALONE, Cut { kind: FSDP, world: 2, micro: 1 }] {
        ranks(&tiny_config(), cut, Numbers::FP16_MIXED, |_, learner| {
            // Weights of zeros: nothing flows anywhere, but what is infinite times zero is no number.
            let step = |learner: &mut dyn Learner, number, batch| {
                let update = Update { adamw: ADAMW, lr: 2e-3, step: number };
                learner.step(&[batch], &update, Votes::default()).unwrap()
            };
            assert!(step(learner, 1, spoiled(1)).skipped);
            assert_eq!(learner.without_gradient(), None);
            assert!(!step(learner, 2, global_batch(1)).skipped);
            let (line, all) = (learner.without_gradient().unwrap(), learner.layout().parameters.len());
            assert!(line.contains(&format!("reached {all} parameters: ")), "{cut:?}: {line}");
        });
    }
}

/// Lines of the log.
fn lines(ended: &gang::Ended) -> Vec<String> {
    let line = |event: &EventBody| match event {
        EventBody::Log { line, .. } => Some(line.clone()),
        _ => None,
    };
    ended.events.iter().filter_map(line).collect()
}

fn near(found: &[f64], wanted: &[f64], tolerance: f64) {
    let same = found.iter().zip(wanted).all(|(a, b)| (a / b - 1.0).abs() < tolerance);
    assert!(found.len() == wanted.len() && same, "{found:?}, {wanted:?}");
}

#[test]
fn jobs_run_in_every_precision_and_go_on_in_others() {
    let dir = tempfile::tempdir().unwrap();
    let base = gang::job(dir.path());
    let of = |name: &str, precision| Job { run_name: name.into(), precision, ..base.clone() };
    let wanted = gang::launch(&of("32", Precision::Fp32), 1, None, None).losses();
    let whole = |precision, name: &str, world: u32| {
        let ended = gang::launch(&Job { batch_size: 4 / world, ..of(name, precision) }, world, None, None);
        near(&ended.losses(), &wanted, 3e-2);
        ended
    };

    let fp16 = whole(Precision::Fp16Mixed, "16-mixed", 2);
    let half = fp16.checkpoints().remove(0);
    let state = |path: &str| TrainerState::read(Path::new(path)).unwrap();
    let scale = state(&half.path).loss_scale.unwrap();
    assert_eq!(scale.good_steps + scale.skipped, 6, "{scale:?}");
    let rest = gang::launch(&of("16-rest", Precision::Fp16Mixed), 1, Some(&half.path), None);
    near(&rest.losses(), &fp16.losses()[6..], 1e-2);
    let after = state(&rest.checkpoints()[0].path).loss_scale.unwrap();
    assert_eq!(after.good_steps, scale.good_steps + 6, "it goes on: {after:?}");

    let bf16 = whole(Precision::Bf16True, "bf16-true", 1);
    let half = bf16.checkpoints().remove(0);
    let config = std::fs::read(Path::new(&half.path).join(CONFIG_FILE)).unwrap();
    let config: Object = serde_json::from_slice(&config).unwrap();
    assert_eq!(config["torch_dtype"], "bfloat16");
    let rest = gang::launch(&of("rest", Precision::Fp32), 1, Some(&half.path), None);
    near(&rest.losses(), &wanted[6..], 3e-2);
    let said = lines(&rest);
    let told = said.iter().filter(|line| {
        line.contains("precision bf16-true, this job has 32: weights and moments are widened")
    });
    assert_eq!(told.count(), 1, "{said:?}");
}

#[test]
fn a_job_with_blocks_computed_again_and_offload_has_the_same_losses() {
    let dir = tempfile::tempdir().unwrap();
    let base = Job { executor: job::Executor::Torch, ..gang::job(dir.path()) };
    let plain = gang::launch(&Job { run_name: "plain".into(), ..base.clone() }, 1, None, None);
    let saving = Job {
        run_name: "saving".into(),
        activation_checkpointing: ActivationCheckpointing::First(1),
        offload_optimizer: true,
        ..base
    };
    let ended = gang::launch(&saving, 1, None, None);
    assert_eq!(ended.losses(), plain.losses());
    let said = lines(&ended);
    assert_eq!(said.iter().filter(|line| line.starts_with("offload_optimizer changes nothing")).count(), 1);
}
