//! Parameters that no gradient reaches.

use super::*;
use serde_json::Value;

const WEIGHTS: &str = "model.safetensors";

/// Sets a tensor of a model's one file of weights to zeros.
fn clear(model: &Path, name: &str) {
    let file = model.join(WEIGHTS);
    let mut bytes = std::fs::read(&file).unwrap();
    let header = u64::from_le_bytes(bytes[..8].try_into().unwrap()) as usize;
    let entries: Value = serde_json::from_slice(&bytes[8..8 + header]).unwrap();
    let [start, end] = [0, 1].map(|n| entries[name]["data_offsets"][n].as_u64().unwrap() as usize);
    bytes[8 + header + start..8 + header + end].fill(0);
    std::fs::write(file, bytes).unwrap();
}

/// What is told after each of two steps.
fn told(cut: Cut, checkpoint: &Path) -> Vec<[Option<String>; 2]> {
    each(cut, |rank, seat| {
        let mut engine = engine::<f32>(&tiny_config(), cut, || seat.take());
        engine.load_weights(checkpoint).unwrap();
        [1, 2].map(|_| {
            step(&mut engine, cut, rank, 1);
            engine.without_gradient()
        })
    })
}

/// Nothing flows back through an output projection of zeros, and it gets a gradient itself.
#[test]
fn what_got_no_gradient_in_the_first_step_is_named_once() {
    let dir = tempfile::tempdir().unwrap();
    let whole = save::<f32>(&tiny_config(), ALONE, Files::Shared, dir.path(), None);
    let (one, spoiled) = (dir.path().join("one"), dir.path().join("spoiled"));
    consolidate(&whole, &one).unwrap();
    // Without the hashes of a checkpoint.
    std::fs::create_dir(&spoiled).unwrap();
    for file in [CONFIG_FILE, WEIGHTS] {
        std::fs::copy(one.join(file), spoiled.join(file)).unwrap();
    }
    clear(&spoiled, "model.layers.1.self_attn.o_proj.weight");
    let several = OF_SEVERAL.into_iter().flat_map(|kind| {
        [(ONE_HOST[1], 2), (&[0, 0, 1, 1][..], 1), (&[0, 1], 2)].map(|(hosts, micro)| Cut {
            kind,
            hosts,
            micro,
        })
    });
    for cut in std::iter::once(ALONE).chain(several) {
        for [first, second] in told(cut, &spoiled) {
            let line = first.unwrap();
            for part in ["input_layernorm", "self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj"] {
                assert!(line.contains(&format!("model.layers.1.{part}.weight")), "{cut:?}: {line}");
            }
            assert!(line.contains(" 4 parameters"), "{cut:?}: {line}");
            assert_eq!(second, None);
        }
        assert!(told(cut, &whole).into_iter().flatten().all(|line| line.is_none()), "{cut:?}");
    }
}
