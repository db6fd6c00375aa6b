//! Adapters on several ranks of the torch executor: the same training as that of one rank of the CPU executor, and the same checkpoints.

use super::gang;
use fleet_common::events::Outcome;
use fleet_common::job::{Executor, Job, Precision, Strategy, parse_toml};
use std::path::Path;

/// A job that trains an adapter beside a golden model, with `more` in its file.
fn job(dir: &Path, more: &str) -> Job {
    gang::job(dir);
    let base = Path::new(env!("CARGO_MANIFEST_DIR")).join("../../tests/parity/golden/foreign/byte_level");
    let text = format!(
        r#"
        run_name = "run"
        output_dir = "out"
        seed = 7
        max_seq_len = 16
        max_steps = 12
        logging_steps = 1
        threads_per_rank = 1
        model = {{ path = {base:?} }}
        data = {{ path = ".", include = ["*.txt"], validation_fraction = 0.2 }}
        optimizer = {{ lr = 1e-2, warmup_steps = 2, weight_decay = 0.1, max_grad_norm = 1.0 }}
        checkpoint = {{ save_steps = 6, save_total_limit = 2 }}
        eval = {{ eval_steps = 6, batch_size = 2, max_eval_examples = 10 }}
        {more}
        "#
    );
    parse_toml(&text, dir).unwrap().0
}

fn near(found: &[f64], wanted: &[f64], tolerance: f64, what: &str) {
    let same = found.iter().zip(wanted).all(|(a, b)| (a / b - 1.0).abs() < tolerance);
    assert!(found.len() == wanted.len() && same, "{what}: {found:?}, {wanted:?}");
}

/// With what each rank drops, evaluations of which they have uneven shares, and a resume with other ranks, another strategy and another executor.
#[test]
fn ranks_strategies_and_executors_train_the_same_adapter() {
    for (more, tolerance) in [
        (
            "adapter = { r = 4, dropout = 0.1, target_modules = \"all-linear\", loraplus_lr_ratio = 4.0 }",
            1e-4,
        ),
        ("quantization = \"nf4\"\nadapter = { r = 4, dropout = 0.1, use_dora = true }", 1e-4),
        ("precision = \"bf16-mixed\"\nadapter = { r = 4, dropout = 0.1, layers_to_transform = [1] }", 2e-2),
    ] {
        let dir = tempfile::tempdir().unwrap();
        let base = job(dir.path(), more);
        let of = |name: &str, executor, strategy, world: u32| Job {
            run_name: name.into(),
            executor,
            strategy,
            batch_size: 12 / world,
            ..base.clone()
        };
        let wanted = gang::launch(&of("cpu", Executor::Cpu, Strategy::Auto, 1), 1, None, None);
        assert!(wanted.losses()[11] < wanted.losses()[0] - 0.1, "it learns: {:?}", wanted.losses());
        let evaluations = |ended: &gang::Ended| ended.evaluations().iter().map(|e| e.1).collect::<Vec<f64>>();
        for (name, strategy, world, other) in [
            ("alone", Strategy::Auto, 1, Strategy::Fsdp),
            ("ddp", Strategy::Ddp, 2, Strategy::Fsdp),
            ("fsdp", Strategy::Fsdp, 3, Strategy::Ddp),
        ] {
            let what = format!("{more} under {name}");
            let whole = gang::launch(&of(name, Executor::Torch, strategy, world), world, None, None);
            let done = |outcome: &_| matches!(outcome, Ok(Outcome::Succeeded { steps: 12, .. }));
            assert!(whole.outcomes.iter().all(done), "{what}: {:?}", whole.outcomes);
            near(&whole.losses(), &wanted.losses(), tolerance, &what);
            near(&evaluations(&whole), &evaluations(&wanted), tolerance, &what);
            let half = whole.checkpoints().remove(0);
            fleet_checkpoint::verify(Path::new(&half.path)).unwrap();
            for (number, executor) in [Executor::Torch, Executor::Cpu].into_iter().enumerate() {
                let rest = of(&format!("{name}-{number}"), executor, other, 2);
                let rest = gang::launch(&rest, 2, Some(&half.path), None);
                near(&rest.losses(), &wanted.losses()[6..], tolerance, &format!("{what}, gone on"));
            }
        }
    }
}

/// The frozen model in fp16, and losses that are scaled.
#[test]
fn an_adapter_trains_in_fp16() {
    let dir = tempfile::tempdir().unwrap();
    let base = job(dir.path(), "batch_size = 12\nadapter = { r = 4, dropout = 0.1 }");
    let fp16 = Job { precision: Precision::Fp16Mixed, run_name: "fp16".into(), ..base.clone() };
    let (wanted, found) = (gang::launch(&base, 1, None, None), gang::launch(&fp16, 1, None, None));
    near(&found.losses(), &wanted.losses(), 2e-2, "fp16");
}
