//! Against layers that bitsandbytes wrote (`tests/parity/quant.py`), and with what may be wrong in their files.

use super::*;
use safetensors::SafeTensors;
use safetensors::tensor::TensorView;
use std::collections::BTreeMap;
use std::path::{Path, PathBuf};

fn golden() -> PathBuf {
    Path::new(env!("CARGO_MANIFEST_DIR")).join("../../tests/parity/golden/quant/stored.safetensors")
}

fn find(tensors: &Tensors, name: &str) -> QuantisedWeight {
    QuantisedWeight::find(tensors, name).unwrap().unwrap()
}

/// Names of the tensors of a layer, but for what the test adds.
fn names(layer: &str) -> Vec<String> {
    let bytes = std::fs::read(golden()).unwrap();
    let tensors = SafeTensors::deserialize(&bytes).unwrap();
    let prefix = format!("{layer}.");
    let of = |name: &&str| name.starts_with(&prefix) && !name.ends_with(".numbers");
    let mut names: Vec<String> = tensors.names().into_iter().filter(of).map(ToOwned::to_owned).collect();
    names.sort();
    names
}

#[test]
fn layers_of_bitsandbytes_are_read_and_would_be_written_as_they_are() {
    let tensors = Tensors::open(&golden()).unwrap();
    for layer in ["plain", "double", "fp4", "int8"] {
        let weight = find(&tensors, &format!("{layer}.weight"));
        assert_eq!((weight.rows, weight.cols), (20, 48), "{layer}");
        let mut written: Vec<String> = weight.parts().into_iter().map(|part| part.name).collect();
        written.sort();
        assert_eq!(written, names(layer));
        for part in weight.parts() {
            let there = tensors.get(&part.name).unwrap();
            assert_eq!((there.dtype, there.shape), (part.dtype, &part.shape[..]), "{}", part.name);
            if let Some(data) = part.data {
                assert_eq!(there.data().unwrap(), data, "{}", part.name);
            }
        }
    }
    let QuantisedForm::FourBit(form) = find(&tensors, "double.weight").form else { panic!() };
    assert_eq!((form.kind, form.block, form.dtype), (FourBitKind::Nf4, 64, Dtype::BF16));
    assert_eq!(form.nested.unwrap().offset, 2.589_583_4);
    assert_eq!(find(&tensors, "int8.weight").form, QuantisedForm::Int8);
}

#[test]
fn what_is_not_quantised_is_none_of_these() {
    let tensors = Tensors::open(&golden()).unwrap();
    assert_eq!(QuantisedWeight::find(&tensors, "plain.numbers").unwrap(), None);
    assert_eq!(QuantisedWeight::find(&tensors, "no.weight").unwrap(), None);
}

fn golden_hqq(name: &str) -> PathBuf {
    golden().with_file_name("../packed").join(name).join("model.safetensors")
}

#[test]
fn layers_of_hqq_are_read_and_would_be_written_as_they_are() {
    for (name, bits, axis) in [("hqq4", 4, 1), ("hqq3", 3, 0)] {
        let tensors = Tensors::open(&golden_hqq(name)).unwrap();
        let weight = find(&tensors, "model.layers.0.mlp.up_proj.weight");
        let form = HqqForm { bits, group: 16, axis, dtype: Dtype::F32 };
        assert_eq!((weight.rows, weight.cols, &weight.form), (56, 32, &QuantisedForm::Hqq(form)));
        let stem = "model.layers.0.mlp.up_proj.";
        let written: Vec<String> = weight.parts().into_iter().map(|part| part.name).collect();
        let there = tensors.names().filter(|name| name.starts_with(stem));
        assert!(there.eq(written.iter().map(String::as_str)), "{written:?}");
        // transformers has zeros of four bits rounded.
        for part in weight.parts().into_iter().filter(|part| !part.name.ends_with("round_zero")) {
            let there = tensors.get(&part.name).unwrap();
            assert_eq!((there.dtype, there.shape), (part.dtype, &part.shape[..]), "{}", part.name);
            assert!(part.data.is_none_or(|data| there.data().unwrap() == data), "{}", part.name);
        }
    }
}

#[test]
fn what_hqq_may_have_and_fleet_does_not_read_is_refused() {
    let said = |key: &str, dtype: Dtype, data: &[u8]| {
        let (dir, name) = (golden_hqq("hqq4"), "model.layers.0.mlp.up_proj");
        let shape = if dtype == Dtype::U8 && data.len() > 1 { vec![data.len()] } else { vec![] };
        refusal_of(&dir, name, |all| {
            all.insert(format!("{name}.{key}"), (dtype, shape.clone(), data.to_vec()));
        })
    };
    for (key, dtype, data, what) in [
        ("packing", Dtype::U8, &b"5bit_u8"[..], "codes are packed as \"5bit_u8\""),
        ("quant_zero", Dtype::U8, &[1], "zeros that are quantised (quant_zero)"),
        ("channel_wise", Dtype::U8, &[0], "one scale for the whole matrix"),
        ("group_size", Dtype::I32, &[48, 0, 0, 0], "groups of 48 along axis 1"),
        ("axis", Dtype::I32, &[2, 0, 0, 0], "along axis 2"),
    ] {
        let error = said(key, dtype, data);
        assert!(error.contains(what) && error.contains("up_proj.W_q"), "{error}");
    }
}

/// What is said of the layer `double` (or `int8`) after a change to its tensors.
fn refusal(layer: &str, change: impl Fn(&mut BTreeMap<String, (Dtype, Vec<usize>, Vec<u8>)>)) -> String {
    refusal_of(&golden(), layer, change)
}

fn refusal_of(
    path: &Path,
    layer: &str,
    change: impl Fn(&mut BTreeMap<String, (Dtype, Vec<usize>, Vec<u8>)>),
) -> String {
    let bytes = std::fs::read(path).unwrap();
    let tensors = SafeTensors::deserialize(&bytes).unwrap();
    let copied =
        tensors.iter().map(|(name, t)| (name.to_owned(), (t.dtype(), t.shape().to_vec(), t.data().to_vec())));
    let mut all: BTreeMap<_, _> = copied.collect();
    change(&mut all);
    let dir = tempfile::tempdir().unwrap();
    let file = dir.path().join("model.safetensors");
    let views = all
        .iter()
        .map(|(name, (dtype, shape, data))| (name, TensorView::new(*dtype, shape.clone(), data).unwrap()));
    safetensors::serialize_to_file(views, None, &file).unwrap();
    let found = QuantisedWeight::find(&Tensors::open(&file).unwrap(), &format!("{layer}.weight"));
    found.unwrap_err().to_string()
}

fn with_state(state: &str) -> String {
    refusal("double", |all| {
        let state = state.as_bytes().to_vec();
        all.insert(
            "double.weight.quant_state.bitsandbytes__nf4".into(),
            (Dtype::U8, vec![state.len()], state),
        );
    })
}

#[test]
fn refusals_name_the_tensor() {
    let gone = |name: &str| refusal("double", |all| drop(all.remove(name)));
    assert!(gone("double.weight.nested_absmax").contains("double.weight.nested_absmax is not there"));
    assert!(gone("double.weight.absmax").contains("copy it again, or quantise the model"), "a cure");
    assert!(gone("double.weight.quant_map").contains("double.weight.quant_map is not there"));
    let short = refusal("double", |all| {
        all.insert("double.weight.absmax".into(), (Dtype::U8, vec![14], vec![0; 14]));
    });
    assert!(short.contains("double.weight.absmax is U8 [14], not U8 [15]"), "{short}");
    let turned = refusal("int8", |all| {
        all.insert("int8.weight_format".into(), (Dtype::U8, vec![], vec![2]));
    });
    assert!(turned.contains("int8.weight_format is of a format that is not row by row"), "{turned}");
    let scales = refusal("int8", |all| drop(all.remove("int8.SCB")));
    assert!(scales.contains("int8.SCB is not there"), "{scales}");
}

#[test]
fn states_that_say_something_else_are_refused() {
    for (state, what) in [
        ("{}", "no description of a weight"),
        (
            r#"{"quant_type": "fp4", "blocksize": 64, "dtype": "bfloat16", "shape": [20, 48]}"#,
            "it says \"fp4\"",
        ),
        (r#"{"quant_type": "nf4", "blocksize": 48, "dtype": "bfloat16", "shape": [20, 48]}"#, "blocks of 48"),
        (
            r#"{"quant_type": "nf4", "blocksize": 64, "dtype": "bfloat16", "shape": [960]}"#,
            "not that of a matrix",
        ),
        (
            r#"{"quant_type": "nf4", "blocksize": 64, "dtype": "bfloat16", "shape": [4294967296, 4294967296]}"#,
            "beyond any memory",
        ),
        (
            r#"{"quant_type": "nf4", "blocksize": 64, "dtype": "bfloat16", "shape": [20, 50]}"#,
            "is U8 [480, 1], not",
        ),
        (
            r#"{"quant_type": "nf4", "blocksize": 64, "dtype": "float64", "shape": [20, 48]}"#,
            "numbers in \"float64\"",
        ),
    ] {
        let said = with_state(state);
        assert!(said.contains(what) && said.contains("double.weight"), "{said}");
    }
}
