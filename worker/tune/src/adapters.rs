//! Adapters of one model: named, switched on and off, made one with it, made one of several.

use fleet_checkpoint::{MANIFEST_FILE, ModelDir, STATE_FILE, new_directory};
use fleet_learn::adapter::{Combination, Combined, can_combine, combine};
use fleet_learn::{Error, Result};
use fleet_rank::generate::TextModel;
use fleet_rank::host_model::open_adapter;
use fleet_rank::merge::{Merged, belong_together, merge, unmerge};
use std::fs;
use std::path::{Path, PathBuf};

/// A model's adapters, each under a name, of which one at most is switched on. A model is asked as it is with that. Files are PEFT's.
///
/// What changes the weights in memory is undone by reading them again, so that a model that was asked with many adapters is the one of its files;
/// what is written by `merge` is read again and has to compute what model and adapter compute, or nothing is left.
///
/// ```
/// use fleet_tune::{Backend, Combination};
///
/// # let dir = tempfile::tempdir().unwrap();
/// # let dir = dir.path();
/// # let base = fleet_tune::testing::tiny_model(dir)?;
/// # let adapter = fleet_tune::testing::tiny_adapter(dir, &base)?;
/// let mut model = Backend::new("cpu")?.load_model(&base)?;
/// let adapters = model.adapters_mut();
/// adapters.load("sft", &adapter)?;
/// adapters.combine(&[("sft", 0.5), ("sft", 0.25)], Combination::Cat, "weaker", dir.join("weaker"))?;
/// assert_eq!((adapters.list(), adapters.active()), (vec!["sft", "weaker"], None));
/// adapters.switch_to("sft")?;
/// let merged = adapters.merge(dir.join("merged"))?;
/// assert!(merged.difference < 1e-4);
/// adapters.switch_off();
/// # Ok::<(), fleet_tune::Error>(())
/// ```
pub struct AdapterManager {
    base: PathBuf,
    named: Vec<(String, PathBuf)>,
    active: Option<usize>,
    /// Read when it is asked for. Its first variant is the model alone, the others are the adapters in their order.
    text: Option<TextModel>,
}

impl AdapterManager {
    pub(crate) fn of(base: &Path) -> AdapterManager {
        AdapterManager { base: base.to_owned(), named: Vec::new(), active: None, text: None }
    }

    /// Takes the adapter in `path` up as `name`, switched off. Refused where it is for another model.
    pub fn load(&mut self, name: &str, path: impl AsRef<Path>) -> Result<()> {
        let path = path.as_ref();
        self.is_free(name)?;
        match &mut self.text {
            Some(text) => drop(text.add(&[path.to_owned()])?),
            None => drop(open_adapter(path, &ModelDir::open(&self.base)?)?),
        }
        self.named.push((name.to_owned(), path.to_owned()));
        Ok(())
    }

    /// Names, in the order in which they were loaded.
    pub fn list(&self) -> Vec<&str> {
        self.named.iter().map(|(name, _)| name.as_str()).collect()
    }

    /// The one that is switched on.
    pub fn active(&self) -> Option<&str> {
        self.active.map(|at| self.named[at].0.as_str())
    }

    pub(crate) fn active_dir(&self) -> Option<&Path> {
        self.active.map(|at| self.named[at].1.as_path())
    }

    /// From now on the model is asked with this one, and no other.
    pub fn switch_to(&mut self, name: &str) -> Result<()> {
        self.active = Some(self.number(name)?);
        Ok(())
    }

    /// From now on the model is asked as it is.
    pub fn switch_off(&mut self) {
        self.active = None;
    }

    /// Writes the model with the active adapter in its weights to the new directory `output`, and checks it.
    pub fn merge(&self, output: impl AsRef<Path>) -> Result<Merged> {
        let Some(adapter) = self.active_dir() else {
            return Err(Error::Input("no adapter is switched on that could be merged".into()));
        };
        let adapters = [adapter.to_owned()];
        belong_together(&self.base, &adapters)?;
        merge(&self.base, &adapters, output.as_ref())
    }

    /// Takes the adapter `name` out of this model, into which it was merged before, and writes what is left to the new directory `output`.
    pub fn unmerge(&self, name: &str, output: impl AsRef<Path>) -> Result<Merged> {
        let adapter = self.named[self.number(name)?].1.clone();
        unmerge(&self.base, &[adapter], output.as_ref())
    }

    /// Makes one adapter of several, each with a weight, writes it to the new directory `output`, and takes it up as `name`.
    pub fn combine(
        &mut self,
        weights: &[(&str, f64)],
        how: Combination,
        name: &str,
        output: impl AsRef<Path>,
    ) -> Result<Combined> {
        let part = |(name, weight): &(&str, f64)| Ok((self.named[self.number(name)?].1.clone(), *weight));
        let parts: Vec<(PathBuf, f64)> = weights.iter().map(part).collect::<Result<_>>()?;
        self.is_free(name)?;
        can_combine(&parts)?;
        let combined = combine(&parts, how, output.as_ref())?;
        self.load(name, output)?;
        Ok(combined)
    }

    /// Copies the adapter `name` to the new directory `path`.
    pub fn save(&self, name: &str, path: impl AsRef<Path>) -> Result<PathBuf> {
        copy_adapter(&self.named[self.number(name)?].1, path.as_ref())
    }

    fn is_free(&self, name: &str) -> Result<()> {
        match self.named.iter().any(|(known, _)| known == name) {
            false => Ok(()),
            true => Err(Error::Input(format!("there is an adapter {name} already; take another name"))),
        }
    }

    fn number(&self, name: &str) -> Result<usize> {
        let found = self.named.iter().position(|(known, _)| known == name);
        found.ok_or_else(|| {
            let known = self.list().join(", ");
            let known = if known.is_empty() { "none is loaded".into() } else { format!("there are {known}") };
            Error::Input(format!("there is no adapter {name}: {known}"))
        })
    }

    /// The variant of `text` that is asked.
    pub(crate) fn variant(&self) -> usize {
        self.active.map_or(0, |at| at + 1)
    }

    /// The model with what is switched on, read if it is not in memory.
    pub(crate) fn text(&mut self) -> Result<&mut TextModel> {
        let variant = self.variant();
        if self.text.is_none() {
            let cores = std::thread::available_parallelism().map_or(1, |cores| cores.get() as u32);
            let mut text = TextModel::open(&self.base, &[], None, cores)?;
            for (_, path) in &self.named {
                text.add(std::slice::from_ref(path))?;
            }
            self.text = Some(text);
        }
        let text = self.text.as_mut().expect("it was just read");
        text.choose(variant)?;
        Ok(text)
    }

    /// Gives the memory of the weights back; they are read again when the model is asked.
    pub(crate) fn release(&mut self) {
        self.text = None;
    }
}

/// Copies an adapter, a checkpoint or a directory of PEFT's, to the new directory `to`. What is there of a run stays behind.
pub(crate) fn copy_adapter(from: &Path, to: &Path) -> Result<PathBuf> {
    let failed = |e: std::io::Error| {
        Error::Environment(format!("cannot copy {} to {}: {e}", from.display(), to.display()))
    };
    let of_run = |name: &str| {
        name.starts_with('.') || name.starts_with("optimizer") || [MANIFEST_FILE, STATE_FILE].contains(&name)
    };
    if let Some(parent) = to.parent() {
        fs::create_dir_all(parent).map_err(failed)?;
    }
    let mut files = Vec::new();
    for entry in fs::read_dir(from).map_err(failed)? {
        let entry = entry.map_err(failed)?;
        if let Some(name) = entry.file_name().to_str().filter(|name| !of_run(name) && entry.path().is_file())
        {
            files.push((name.to_owned(), fs::read(entry.path()).map_err(failed)?));
        }
    }
    new_directory(to, |part| files.iter().try_for_each(|(name, bytes)| part.write_bytes(name, bytes)))?;
    Ok(to.to_owned())
}
