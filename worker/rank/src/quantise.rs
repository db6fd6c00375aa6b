//! `fleet-rank quantise`: a model with the matrices of its blocks in few bits, in files that transformers reads.

use crate::host_model::open_model;
use crate::merge::is_new;
use fleet_checkpoint::{ModelDir, remake};
use fleet_common::job::Quantization;
use fleet_common::model::{Object, Parameter, QUANTIZATION_CONFIG, Role};
use fleet_learn::adapter::{FewBits, quantise_for_files};
use fleet_learn::{Error, Result};
use serde_json::{Value, json};
use std::collections::BTreeMap;
use std::fmt;
use std::path::{Path, PathBuf};

/// What was written.
#[derive(Clone, Debug, PartialEq, serde::Serialize)]
pub struct Written {
    pub output: PathBuf,
    pub quantization: &'static str,
    /// Those in few bits.
    pub matrices: usize,
    /// That they have.
    pub numbers: usize,
    /// That each of these takes.
    pub bytes_per_number: f64,
}

/// Writes `model` to the new directory `output`, the matrices of its blocks as `kind` says, in the layout of bitsandbytes or hqq, all else as it is.
pub fn quantise(model: &Path, kind: Quantization, output: &Path) -> Result<Written> {
    is_new(output)?;
    let given = open_model(model)?;
    if given.is_quantised() {
        let what = "its weights are quantised already; take the model as it was before";
        return Err(Error::Input(format!("{}: {what}", model.display())));
    }
    let few = FewBits::of(&given, Some(kind))?;
    let mut places: BTreeMap<&str, &Parameter> = BTreeMap::new();
    for p in given.layout.parameters.iter().filter(|p| few.has(p)) {
        places.extend(given.tensors_of(p).map(|tensor| (tensor.name, p)));
    }
    let mut config = given.config.clone();
    config.insert(QUANTIZATION_CONFIG.into(), said(kind, &others(&given, &few)));
    let mut bytes = 0;
    remake(&given, Some(&config), output, &mut |tensor| -> Result<_> {
        let Some(p) = places.get(tensor.name) else { return Ok(None) };
        let made = quantise_for_files(&given, p, tensor.name, kind)?;
        bytes += made.iter().map(|tensor| tensor.data.len()).sum::<usize>();
        Ok(Some(made))
    })?;
    let numbers = places.values().map(|p| p.range.len()).sum::<usize>();
    Ok(Written {
        output: output.to_owned(),
        quantization: kind.name(),
        matrices: places.len(),
        numbers,
        bytes_per_number: bytes as f64 / numbers.max(1) as f64,
    })
}

/// Modules that stay as they are, of which transformers would expect that they are quantised, too.
fn others(model: &ModelDir, few: &FewBits) -> Vec<String> {
    let plain = model.layout.parameters.iter().filter(|p| p.role == Role::Weight && !few.has(p));
    let mut names = vec![model.family.names.head.to_owned()];
    names.extend(plain.filter_map(|p| p.name.strip_suffix(".weight")).map(ToOwned::to_owned));
    names.sort();
    names.dedup();
    names
}

/// `quantization_config`, as transformers writes it.
fn said(kind: Quantization, skipped: &[String]) -> Value {
    let bits = match kind {
        Quantization::Hqq8 => 8,
        Quantization::Hqq4 => 4,
        Quantization::Hqq3 => 3,
        Quantization::Hqq2 => 2,
        Quantization::Hqq1 => 1,
        Quantization::Nf4 | Quantization::Fp4 | Quantization::Int8 => {
            let (four, eight) = (kind != Quantization::Int8, kind == Quantization::Int8);
            return json!({
                "_load_in_4bit": four,
                "_load_in_8bit": eight,
                "bnb_4bit_compute_dtype": "float32",
                "bnb_4bit_quant_storage": "uint8",
                "bnb_4bit_quant_type": if four { kind.name() } else { "fp4" },
                "bnb_4bit_use_double_quant": four,
                "llm_int8_enable_fp32_cpu_offload": false,
                "llm_int8_has_fp16_weight": false,
                "llm_int8_skip_modules": skipped,
                "llm_int8_threshold": 6.0,
                "load_in_4bit": four,
                "load_in_8bit": eight,
                "quant_method": "bitsandbytes",
            });
        }
    };
    let weights: Object = [
        ("axis", json!(1)),
        ("channel_wise", json!(true)),
        ("group_size", json!(64)),
        ("nbits", json!(bits)),
        ("optimize", json!(true)),
        ("round_zero", json!(false)),
        ("view_as_float", json!(false)),
    ]
    .into_iter()
    .map(|(key, value)| (key.to_owned(), value))
    .collect();
    json!({
        "quant_config": {
            "offload_meta": false,
            "scale_quant_params": null,
            "weight_quant_params": weights,
            "zero_quant_params": null,
        },
        "quant_method": "hqq",
        "skip_modules": skipped,
    })
}

impl fmt::Display for Written {
    fn fmt(&self, f: &mut fmt::Formatter) -> fmt::Result {
        let Written { output, quantization, matrices, numbers, bytes_per_number } = self;
        write!(
            f,
            "{}: {matrices} matrices of {numbers} numbers in {}, {bytes_per_number:.3} bytes each",
            output.display(),
            quantization.to_uppercase()
        )
    }
}
