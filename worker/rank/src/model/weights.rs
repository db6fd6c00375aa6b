//! Weights in Hugging Face's names and types: found, checked and copied into the flat buffer, and handed out for writing. Every refusal names
//! the tensor.

use super::config::{parse_config, read_config};
use crate::error::{Error, Result};
use crate::shim::buffers::{as_bytes, from_bytes};
use fleet_checkpoint::{CONFIG_FILE, Dtype, MODEL_FILE, TensorRef, TensorSlice, Tensors};
use fleet_common::job::LlamaConfig;
use fleet_common::model::{Layout, Parameter};
use half::{bf16, f16};
use std::ops::Range;
use std::path::Path;

const EMBEDDING: &str = "model.embed_tokens.weight";
const HEAD: &str = "lm_head.weight";

/// The weights of a model directory or of a checkpoint.
pub fn open_weights(dir: &Path) -> Result<Tensors> {
    let file = dir.join(MODEL_FILE);
    Ok(Tensors::open(if file.exists() { &file } else { dir })?)
}

/// The shape of the model in `dir`. Where config.json ties the head to the embedding and the weights have two different ones, they are
/// not tied, as in transformers 5.
pub fn read_model(dir: &Path) -> Result<LlamaConfig> {
    let path = dir.join(CONFIG_FILE);
    let refuse = |what: String| Error::Input(format!("{}: {what}", path.display()));
    let mut config = parse_config(&read_config(dir)?).map_err(refuse)?;
    if config.tie_word_embeddings {
        let tensors = open_weights(dir)?;
        let differ = tensors
            .get(EMBEDDING)
            .zip(tensors.get(HEAD))
            .is_some_and(|(a, b)| (a.dtype, a.shape) != (b.dtype, b.shape) || a.data != b.data);
        config.tie_word_embeddings = !differ;
    }
    Ok(config)
}

/// A parameter's tensor. Of a tied pair writers keep one, some of them the head.
pub fn find<'a>(tensors: &'a Tensors, layout: &Layout, parameter: &Parameter) -> Option<TensorSlice<'a>> {
    let other = || match layout.head.weight == layout.embedding && parameter.name == EMBEDDING {
        true => tensors.get(HEAD),
        false => None,
    };
    tensors.get(&parameter.name).or_else(other)
}

/// Finds every parameter in `tensors` and checks its shape and type, before anything is copied.
pub fn check_weights(tensors: &Tensors, layout: &Layout, dir: &Path) -> Result<()> {
    let refuse = |what: String| Error::Input(format!("{}: {what}", dir.display()));
    for p in &layout.parameters {
        let Some(tensor) = find(tensors, layout, p) else {
            let cure = match p.name == HEAD {
                true => {
                    "; if the embedding is also the head, set tie_word_embeddings to true in its config.json"
                }
                false => "; they do not belong to this config.json",
            };
            return Err(refuse(format!("the weights lack {}{cure}", p.name)));
        };
        if tensor.shape != p.shape {
            return Err(refuse(format!(
                "{} is {:?}, config.json asks for {:?}",
                p.name, tensor.shape, p.shape
            )));
        }
        if !matches!(tensor.dtype, Dtype::F32 | Dtype::BF16 | Dtype::F16) {
            return Err(refuse(format!("{} is {:?}; fleet reads F32, BF16 and F16", p.name, tensor.dtype)));
        }
    }
    Ok(())
}

/// Copies the part of `parameter` that lies in `range` (of the flat buffer) from `tensor`, and returns it. `out` begins at the flat element
/// `out_start`.
pub fn copy_part<'a>(
    parameter: &Parameter,
    tensor: TensorSlice,
    range: Range<usize>,
    out: &'a mut [f32],
    out_start: usize,
) -> &'a [f32] {
    let (begin, end) = (range.start.max(parameter.range.start), range.end.min(parameter.range.end));
    if begin >= end {
        return &[];
    }
    let out = &mut out[begin - out_start..end - out_start];
    let size = if tensor.dtype == Dtype::F32 { 4 } else { 2 };
    let at = begin - parameter.range.start;
    let bytes = &tensor.data[at * size..(at + out.len()) * size];
    match tensor.dtype {
        Dtype::F32 => match from_bytes::<f32>(bytes) {
            Some(values) => out.copy_from_slice(values),
            None => {
                for (to, from) in out.iter_mut().zip(bytes.chunks_exact(4)) {
                    *to = f32::from_le_bytes([from[0], from[1], from[2], from[3]]);
                }
            }
        },
        Dtype::BF16 => {
            for (to, from) in out.iter_mut().zip(bytes.chunks_exact(2)) {
                *to = bf16::from_le_bytes([from[0], from[1]]).to_f32();
            }
        }
        _ => {
            for (to, from) in out.iter_mut().zip(bytes.chunks_exact(2)) {
                *to = f16::from_le_bytes([from[0], from[1]]).to_f32();
            }
        }
    }
    out
}

/// Every parameter of the flat buffer `flat`, for writing.
pub fn tensor_refs<'a>(layout: &'a Layout, flat: &'a [f32]) -> Vec<TensorRef<'a>> {
    layout
        .parameters
        .iter()
        .map(|p| TensorRef {
            name: &p.name,
            dtype: Dtype::F32,
            shape: &p.shape,
            data: as_bytes(&flat[p.range.clone()]),
        })
        .collect()
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::testing::tiny_config;

    /// A safetensors file of f32 tensors that are filled with their number.
    fn write(path: &Path, names: &[(&str, usize)]) {
        let (mut header, mut data) = (serde_json::Map::new(), Vec::<u8>::new());
        for (number, (name, len)) in names.iter().enumerate() {
            let begin = data.len();
            data.extend((number as f32).to_le_bytes().repeat(*len));
            let info =
                serde_json::json!({"dtype": "F32", "shape": [len], "data_offsets": [begin, data.len()]});
            header.insert((*name).to_owned(), info);
        }
        let header = serde_json::Value::Object(header).to_string();
        let bytes = [&(header.len() as u64).to_le_bytes()[..], header.as_bytes(), &data].concat();
        std::fs::write(path, bytes).unwrap();
    }

    #[test]
    fn a_tied_pair_is_one_tensor_whichever_was_kept_and_two_where_they_differ() {
        let dir = tempfile::tempdir().unwrap();
        let config = LlamaConfig { tie_word_embeddings: true, ..tiny_config() };
        let json = crate::model::config::config_json(&config, &Default::default());
        std::fs::write(dir.path().join(CONFIG_FILE), serde_json::to_vec(&json).unwrap()).unwrap();
        let file = dir.path().join(MODEL_FILE);
        let tied = |names: &[(&str, usize)]| {
            write(&file, names);
            read_model(dir.path()).unwrap().tie_word_embeddings
        };
        assert!(tied(&[(EMBEDDING, 4)]));
        assert!(tied(&[(HEAD, 4)]));
        assert!(!tied(&[(EMBEDDING, 4), (HEAD, 4)]), "their values differ");

        write(&file, &[(HEAD, 4), ("model.layers.0.self_attn.rotary_emb.inv_freq", 2)]);
        let tensors = open_weights(dir.path()).unwrap();
        let embedding = |config: &LlamaConfig| {
            let layout = crate::model::network(config, 4).layout;
            find(&tensors, &layout, &layout.parameters[0]).is_some()
        };
        assert!(embedding(&config));
        assert!(!embedding(&tiny_config()), "of an untied pair both are needed");
    }

    #[test]
    fn a_missing_head_is_named_with_the_cure() {
        let dir = tempfile::tempdir().unwrap();
        let layout = crate::model::network(&tiny_config(), 4).layout;
        let names: Vec<(&str, usize)> = layout
            .parameters
            .iter()
            .filter(|p| p.name != HEAD)
            .map(|p| (p.name.as_str(), p.range.len()))
            .collect();
        write(&dir.path().join(MODEL_FILE), &names);
        let mut layout = layout;
        layout.parameters.iter_mut().for_each(|p| p.shape = vec![p.range.len()]);
        let error = check_weights(&open_weights(dir.path()).unwrap(), &layout, dir.path()).unwrap_err();
        assert!(error.to_string().contains("lack lm_head.weight; if the embedding"), "{error}");
    }
}
