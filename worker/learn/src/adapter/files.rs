//! The numbers of an adapter that is trained, as a directory has them.

use super::ADAPTER_MODEL;
use crate::error::{Error, Result};
use fleet_checkpoint::{Reading, Tensor, Tensors, read_part, stored_shape};
use fleet_common::model::{Layout, Parameter};
use std::collections::BTreeMap;
use std::path::Path;

/// Tensors that are named in a refusal.
const NAMED: usize = 10;

/// An adapter's file, which has just what is trained.
pub struct AdapterFile {
    tensors: Tensors,
    /// What a tensor is called where nobody wraps its layer: the name that the file has.
    names: BTreeMap<String, String>,
}

impl AdapterFile {
    /// `dir` is a checkpoint, or an adapter as PEFT writes it.
    pub fn open(dir: &Path, layout: &Layout) -> Result<AdapterFile> {
        let tensors = Tensors::of_file(dir, ADAPTER_MODEL)?;
        let names = tensors.names().map(|name| (plain(name), name.to_owned())).collect();
        let file = AdapterFile { tensors, names };
        let mut wrong: Vec<String> = Vec::new();
        for p in &layout.parameters {
            let wanted = stored_shape(p);
            match file.find(p) {
                None => wrong.push(format!("{} is not there", p.name)),
                Some(t) if t.shape != wanted => {
                    wrong.push(format!("{} is {:?} and the job asks for {wanted:?}", p.name, t.shape));
                }
                Some(_) => {}
            }
        }
        let known: Vec<String> = layout.parameters.iter().map(|p| plain(&p.name)).collect();
        // PEFT writes embeddings that an adapter changes as they were, too.
        let others = file.names.iter().filter(|(name, _)| !known.contains(name));
        let others = others.filter(|(_, name)| !name.ends_with(".base_layer.weight"));
        wrong.extend(others.map(|(_, name)| format!("{name} has no place")));
        if wrong.is_empty() {
            return Ok(file);
        }
        let more = wrong.len().saturating_sub(NAMED);
        wrong.truncate(NAMED);
        Err(Error::Input(format!(
            "{}: it is another adapter than the job's: {}{}; give the job what it was made with",
            dir.join(ADAPTER_MODEL).display(),
            wrong.join(", "),
            if more > 0 { format!(" and {more} more") } else { String::new() }
        )))
    }

    fn find(&self, p: &Parameter) -> Option<Tensor<'_>> {
        self.tensors.get(self.names.get(&plain(&p.name))?)
    }

    /// Has numbers of a parameter, from its number `first` on, read in fp32.
    pub fn read_part<'a>(
        &'a self,
        p: &'a Parameter,
        first: usize,
        out: &'a mut [f32],
        reading: &mut Reading<'a>,
    ) {
        read_part(p, self.find(p).expect("it was found when the file was opened"), first, out, reading);
    }
}

/// Without what versions of PEFT put between, or before.
pub(crate) fn plain(name: &str) -> String {
    let name = name.strip_prefix(super::WRAPPED).unwrap_or(name);
    let name = match name.strip_suffix(".weight") {
        Some(magnitude) if magnitude.ends_with(super::MAGNITUDE) => magnitude,
        _ => name,
    };
    [".base_layer.", ".modules_to_save."].iter().fold(name.to_owned(), |name, part| name.replace(part, "."))
}
