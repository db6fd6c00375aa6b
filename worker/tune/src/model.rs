//! A model that is asked.

use crate::{AdapterManager, Backend, Device, Dtype};
use fleet_checkpoint::ModelDir;
use fleet_data::chat::Conversation;
use fleet_data::decode;
use fleet_learn::{Error, Result};
use fleet_rank::generate::{Ask, Chat, Generated, Prompt, Settings};
use fleet_rank::merge::merge;
use std::path::{Path, PathBuf};
use time::OffsetDateTime;

/// A model in a directory of Hugging Face's layout, with the adapter that is switched on. Its weights are read when it is first asked, and computed
/// with on the CPU, in fp32.
///
/// ```
/// use fleet_tune::{Backend, Settings};
///
/// # let dir = tempfile::tempdir().unwrap();
/// # let dir = dir.path();
/// # let model = fleet_tune::testing::tiny_model(dir)?;
/// let mut model = Backend::new("cpu")?.load_model(&model)?;
/// let settings = Settings { max_new_tokens: 4, ..Settings::default() };
/// let generated = model.generate("the cat", &settings)?;
/// assert!(generated.new_tokens <= 4);
///
/// let ids = model.encode("the cat sat")?;
/// let forward = model.forward(&ids, Some(&ids))?;
/// assert_eq!(forward.logits.len(), ids.len() * forward.vocab_size);
/// assert!(forward.loss.unwrap() > 0.0);
/// # Ok::<(), fleet_tune::Error>(())
/// ```
pub struct Model {
    path: PathBuf,
    backend: Backend,
    adapters: AdapterManager,
}

/// What a model computes for a sequence.
#[derive(Clone, Debug, PartialEq)]
pub struct Forward {
    /// `[tokens, vocab_size]`.
    pub logits: Vec<f32>,
    pub vocab_size: usize,
    /// Nats for each label, where there are labels.
    pub loss: Option<f64>,
}

impl Model {
    pub(crate) fn open(backend: &Backend, path: &Path) -> Result<Model> {
        let path = std::path::absolute(path)
            .map_err(|e| Error::Environment(format!("{} cannot be found: {e}", path.display())))?;
        ModelDir::open(&path)?;
        let adapters = AdapterManager::of(&path);
        Ok(Model { path, backend: backend.clone(), adapters })
    }

    /// Its directory.
    pub fn path(&self) -> &Path {
        &self.path
    }

    /// Where it is trained.
    pub fn device(&self) -> Device {
        self.backend.device()
    }

    /// In which it is trained.
    pub fn dtype(&self) -> Dtype {
        self.backend.dtype()
    }

    pub fn adapters(&self) -> &AdapterManager {
        &self.adapters
    }

    pub fn adapters_mut(&mut self) -> &mut AdapterManager {
        &mut self.adapters
    }

    /// Loads an adapter and switches it on; its name is that of its directory.
    pub fn load_adapter(&mut self, path: impl AsRef<Path>) -> Result<()> {
        let path = path.as_ref();
        let name = path.file_name().unwrap_or(path.as_os_str()).to_string_lossy().into_owned();
        self.adapters.load(&name, path)?;
        self.adapters.switch_to(&name)
    }

    /// Copies the adapter that is switched on to the new directory `path`.
    pub fn save_adapter(&self, path: impl AsRef<Path>) -> Result<PathBuf> {
        match self.adapters.active() {
            Some(name) => self.adapters.save(name, path),
            None => Err(Error::Input("no adapter is switched on that could be saved".into())),
        }
    }

    /// Writes the whole model as it answers now, with the active adapter in its weights, to the new directory `path`.
    pub fn save_pretrained(&self, path: impl AsRef<Path>) -> Result<PathBuf> {
        let active: Vec<PathBuf> = self.adapters.active_dir().map(Path::to_owned).into_iter().collect();
        Ok(merge(&self.path, &active, path.as_ref())?.output)
    }

    /// Gives the memory of the weights back; they are read again when the model is asked.
    pub fn release(&mut self) {
        self.adapters.release();
    }

    /// Ids of a text's tokens, with what the tokenizer puts before a prompt.
    pub fn encode(&mut self, text: &str) -> Result<Vec<u32>> {
        Ok(self.adapters.text()?.prompt(&text.into())?.ids)
    }

    /// The text of tokens, without special ones.
    pub fn decode(&mut self, ids: &[u32]) -> Result<String> {
        let tokenizer = &self.adapters.text()?.tokenizer().tokenizer;
        decode(tokenizer, ids, true).map_err(|e| Error::Input(format!("the tokens cannot be decoded: {e}")))
    }

    /// What comes after `prompt`.
    pub fn generate(&mut self, prompt: &str, settings: &Settings) -> Result<Generated> {
        self.generate_streamed(prompt, settings, &mut |_| true)
    }

    /// The same, piece by piece; `emit` ends it by giving `false`.
    pub fn generate_streamed(
        &mut self,
        prompt: &str,
        settings: &Settings,
        emit: &mut dyn FnMut(&str) -> bool,
    ) -> Result<Generated> {
        self.adapters.text()?.answer(&prompt.into(), settings, emit)
    }

    /// What comes after these tokens.
    pub fn generate_after(&mut self, ids: &[u32], settings: &Settings) -> Result<Generated> {
        let text = self.adapters.text()?;
        text.check(ids)?;
        let prompt = Prompt { ids: ids.to_vec(), end: None, notes: Vec::new() };
        text.write(&prompt, settings, &mut |_| true)
    }

    /// The answer to a message, in the words of the model's chat template, or of the adapter's.
    pub fn chat(&mut self, system: Option<&str>, message: &str, settings: &Settings) -> Result<Generated> {
        let variant = self.adapters.variant();
        let text = self.adapters.text()?;
        let template = text.template(variant, None)?;
        let conversation = Conversation::ask(system, message);
        let ask = Chat { conversation: &conversation, template: &template, now: OffsetDateTime::now_utc() };
        text.answer(&Ask::Chat(ask), settings, &mut |_| true)
    }

    /// Logits of a sequence. `labels` are as many as tokens: the token that stands there is to be predicted by what is before it; one beyond the
    /// vocabulary, such as `u32::MAX`, is not. The loss is the mean of those behind the first.
    pub fn forward(&mut self, ids: &[u32], labels: Option<&[u32]>) -> Result<Forward> {
        let logits = self.adapters.text()?.logits(ids)?;
        let vocab_size = logits.len() / ids.len();
        let loss = match labels {
            None => None,
            Some(labels) if labels.len() != ids.len() => {
                let message = format!("{} labels are given for {} tokens", labels.len(), ids.len());
                return Err(Error::Input(message));
            }
            Some(labels) => loss(&logits, vocab_size, labels),
        };
        Ok(Forward { logits, vocab_size, loss })
    }
}

/// Mean of `-ln p` of each label but the first, by the logits of the token before it; none where there is no label.
fn loss(logits: &[f32], vocab_size: usize, labels: &[u32]) -> Option<f64> {
    let predicted = logits.chunks_exact(vocab_size).zip(&labels[1..]);
    let losses: Vec<f64> = predicted
        .filter_map(|(row, label)| {
            let largest = row.iter().copied().fold(f32::NEG_INFINITY, f32::max);
            let of = |x: f32| f64::from(x - largest);
            let sum: f64 = row.iter().map(|x| of(*x).exp()).sum();
            Some(sum.ln() - of(*row.get(*label as usize)?))
        })
        .collect();
    (!losses.is_empty()).then(|| losses.iter().sum::<f64>() / losses.len() as f64)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_loss_is_of_the_labels_behind_the_first() {
        let logits = [0.0, 0.0, (3.0f32).ln(), 0.0, 9.0, 9.0];
        let of = |labels: &[u32]| loss(&logits, 2, labels);
        let near = |a: Option<f64>, b: f64| assert!((a.unwrap_or(f64::NAN) - b).abs() < 1e-6, "{a:?} {b}");
        near(of(&[0, 1, 0]), (2f64.ln() + (4.0f64 / 3.0).ln()) / 2.0);
        near(of(&[0, u32::MAX, 1]), 4f64.ln());
        assert_eq!(of(&[0, u32::MAX, u32::MAX]), None);
    }
}
