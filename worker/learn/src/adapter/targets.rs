//! Which modules of a model an adapter changes, and how.

use super::Adapter;
use super::config::AdapterConfig;
use crate::error::{Error, Result};
use crate::model::Model;
use fleet_checkpoint::{ModelDir, Reading};
use fleet_common::job::{self, Bias, Init, suggest};
use fleet_common::model::{Fresh, Layout, Object, Parameter, Role};
use regex::Regex;
use std::collections::{BTreeMap, BTreeSet};

/// Modules that an error lists.
const LISTED: usize = 24;
/// Every module decided.
#[derive(Debug)]
pub(super) struct Targets {
    /// By the name of the parameter in the model's files.
    lora: BTreeMap<String, Lora>,
    whole: BTreeSet<String>,
}

#[derive(Clone, Debug)]
pub(super) struct Lora {
    /// As in the model's files.
    pub module: String,
    pub rank: usize,
    pub scale: f32,
    pub rate_of_b: f64,
    /// Whether its rows have magnitudes.
    pub is_dora: bool,
    init: Init,
}

impl Lora {
    /// Of the first matrix, which reads `inputs` numbers: PyTorch's `kaiming_uniform_` with `a = sqrt(5)`, or PEFT's "gaussian".
    pub fn fresh(&self, inputs: usize) -> Fresh {
        match self.init {
            Init::Default => Fresh::Uniform(1.0 / (inputs as f64).sqrt()),
            Init::Gaussian => Fresh::Normal(1.0 / self.rank as f64),
        }
    }
}

impl Targets {
    /// As a job asks for them.
    pub fn of(adapter: &job::Adapter, config: &AdapterConfig, model: &Model) -> Result<Targets> {
        let layout = model.layout();
        let blocks = layout.units.len() - 2;
        if let Some(block) = adapter.layers_to_transform.iter().find(|block| **block as usize >= blocks) {
            return Err(refuse(format!(
                "layers_to_transform names block {block}, and the model has {blocks}, counted from 0"
            )));
        }
        let can_be: Vec<&Parameter> =
            layout.parameters.iter().filter(|p| Place::of(p, &layout, model).is_some()).collect();
        let modules = || can_be.iter().map(|p| module(p)).collect::<Vec<_>>();
        let wanted = match &adapter.target_modules {
            Some(targets) => Wanted::of(targets, "target_modules")?,
            None => Wanted::Names(model.family.lora.0.iter().map(|name| (*name).to_owned()).collect()),
        };
        let excluded = adapter.exclude_modules.as_ref();
        let excluded = excluded.map(|targets| Wanted::of(targets, "exclude_modules")).transpose()?;
        for (key, wanted) in [("target_modules", Some(&wanted)), ("exclude_modules", excluded.as_ref())] {
            let Some(Wanted::Names(names)) = wanted else { continue };
            for name in names {
                if layout.is_tied() && ends_with(model.family.names.head, name) && key == "target_modules" {
                    return Err(refuse(format!(
                        "target_modules names {name}, which is the embedding and the head at once in this model (tie_word_embeddings), and one adapter cannot change both alike; take it out"
                    )));
                }
                known(name, key, modules())?;
            }
        }
        let layers = &adapter.layers_to_transform;
        let is_target = |p: &&&Parameter| {
            let is_of_block = Place::of(p, &layout, model) == Some(Place::Block);
            (layers.is_empty() || is_of_block && layers.contains(&(p.unit as u32 - 1)))
                && (is_of_block || !matches!(wanted, Wanted::All))
                && wanted.is(module(p))
                && !excluded.as_ref().is_some_and(|excluded| excluded.is(module(p)))
        };
        let chosen: Vec<&&Parameter> = can_be.iter().filter(is_target).collect();
        if chosen.is_empty() {
            return Err(refuse(format!(
                "target_modules is {}, and no module of the model is called so, or all are excluded; it has {}",
                wanted.said(),
                listed(modules().into_iter().map(last))
            )));
        }
        for p in &chosen {
            can_change(p, adapter.use_dora)?;
        }
        for (key, patterns) in [
            ("rank_pattern", adapter.rank_pattern.iter().map(|(pattern, _)| pattern).collect::<Vec<_>>()),
            ("alpha_pattern", adapter.alpha_pattern.iter().map(|(pattern, _)| pattern).collect()),
        ] {
            let is_idle = |pattern: &&&String| {
                let regex = super::config::pattern(pattern);
                regex.is_some_and(|regex| !chosen.iter().any(|p| regex.is_match(module(p))))
            };
            if let Some(idle) = patterns.iter().find(is_idle) {
                return Err(refuse(format!(
                    "{key} has {idle:?}, and none of the changed modules is called so; they are {}",
                    listed(chosen.iter().map(|p| last(module(p))))
                )));
            }
        }
        let lora: BTreeMap<String, Lora> = chosen
            .into_iter()
            .map(|p| {
                let module = module(p).to_owned();
                let lora = Lora {
                    rank: config.rank(&module),
                    scale: config.scale(&module) as f32,
                    module,
                    rate_of_b: adapter.loraplus_lr_ratio,
                    is_dora: adapter.use_dora,
                    init: adapter.init,
                };
                (p.name.clone(), lora)
            })
            .collect();
        let whole = wholes(adapter, model, &lora)?;
        Ok(Targets { lora, whole })
    }

    /// What is added to a weight of the model, if anything is.
    pub fn lora(&self, p: &Parameter) -> Option<&Lora> {
        self.lora.get(&p.name)
    }

    /// Whether a parameter of the model is trained itself.
    pub fn is_whole(&self, p: &Parameter) -> bool {
        self.whole.contains(&p.name)
    }

    /// As PEFT's files have such a parameter: a layer that is changed has become a part of another one.
    pub fn name_of_whole(&self, p: &Parameter) -> String {
        let weight = format!("{}.weight", module(p));
        match p.name.strip_suffix(".bias").filter(|_| self.lora.contains_key(&weight)) {
            Some(module) => format!("{}{module}.base_layer.bias", super::WRAPPED),
            None => format!("{}{}", super::WRAPPED, p.name),
        }
    }

    /// Writes names out where PEFT would take what the job says for something else, or not at all.
    pub fn spell_out(&self, adapter: &job::Adapter, model: &Model, config: &mut Object) {
        if matches!(adapter.target_modules, Some(job::Targets::Pattern(_)))
            && !adapter.layers_to_transform.is_empty()
        {
            let modules: Vec<&str> = self.lora.values().map(|lora| lora.module.as_str()).collect();
            config.insert("target_modules".into(), modules.into());
            config.insert("layers_to_transform".into(), serde_json::Value::Null);
        }
        if !adapter.modules_to_save.is_empty() {
            let saved = Wanted::Names(adapter.modules_to_save.clone());
            let layout = model.layout();
            let modules: BTreeSet<&str> =
                layout.parameters.iter().map(module).filter(|module| saved.is(module)).collect();
            config.insert("modules_to_save".into(), modules.into_iter().collect::<Vec<_>>().into());
        }
    }

    /// Those that an adapter's file has.
    pub fn found(
        (adapter, base): (&Adapter, &ModelDir),
        config: &AdapterConfig,
        rate_of_b: f64,
        model: &Model,
    ) -> Result<Targets> {
        let layout = model.layout();
        let (mut lora, mut whole) = (BTreeMap::new(), BTreeSet::new());
        for change in &adapter.changes {
            let p = &layout.parameters[change.parameter];
            if let Some(added) = &change.added {
                let is_dora = added.magnitude.is_some();
                if Place::of(p, &layout, model).is_none() {
                    return Err(refuse(format!(
                        "it changes {}, and fleet trains adapters of the linear layers of blocks, of the embedding and of the head",
                        p.name
                    )));
                }
                can_change(p, is_dora)?;
                // PEFT writes the embedding beside what changes it.
                if change.whole.as_ref().is_some_and(|whole| !has(base, p, whole)) {
                    return Err(refuse(format!("it was made beside another {} than the model has", p.name)));
                }
                let module = module(p).to_owned();
                let (rank, scale) = (config.rank(&module), config.scale(&module) as f32);
                let lora_of_it = Lora { module, rank, scale, rate_of_b, is_dora, init: Init::Default };
                lora.insert(p.name.clone(), lora_of_it);
            } else if change.whole.is_some() {
                whole.insert(p.name.clone());
            }
        }
        together(model, &whole)?;
        Ok(Targets { lora, whole })
    }
}

/// Whether a parameter of the model has just these numbers.
fn has(base: &ModelDir, p: &Parameter, numbers: &[f32]) -> bool {
    let (mut own, mut reading) = (vec![0.0; numbers.len()], Reading::default());
    base.read_part(p, 0, &mut own, &mut reading);
    reading.run(1).is_ok() && own == numbers
}

/// Parameters that are trained themselves: modules that are saved, and biases.
fn wholes(adapter: &job::Adapter, model: &Model, lora: &BTreeMap<String, Lora>) -> Result<BTreeSet<String>> {
    let layout = model.layout();
    let saved = Wanted::Names(adapter.modules_to_save.clone());
    let modules: Vec<&str> = layout.parameters.iter().map(module).collect();
    for name in &adapter.modules_to_save {
        let is_head = layout.is_tied() && name == last(model.family.names.head);
        if is_head
            || layout
                .parameters
                .iter()
                .any(|p| p.role == fleet_common::model::Role::TiedTable && saved.is(module(p)))
        {
            return Err(refuse(format!(
                "modules_to_save names {name}, which is the embedding and the head at once in this model (tie_word_embeddings); untie them first"
            )));
        }
        known(name, "modules_to_save", modules.clone())?;
    }
    let weight_of = |p: &Parameter| format!("{}.weight", module(p));
    let is_whole = |p: &&Parameter| {
        saved.is(module(p))
            || p.role == Role::Bias
                && match adapter.bias {
                    Bias::None => false,
                    Bias::All => true,
                    Bias::LoraOnly => lora.contains_key(&weight_of(p)),
                }
            || p.role == Role::NormBias && adapter.bias == Bias::All
    };
    let whole: BTreeSet<String> = layout.parameters.iter().filter(is_whole).map(|p| p.name.clone()).collect();
    if let Some(both) = whole.iter().find(|name| lora.contains_key(*name)) {
        return Err(refuse(format!(
            "{both} is in modules_to_save and in target_modules; take it out of one of them"
        )));
    }
    together(model, &whole)?;
    Ok(whole)
}

/// What is one product for fleet is trained as a whole or not at all.
fn together(model: &Model, whole: &BTreeSet<String>) -> Result<()> {
    let wiring = model.wiring();
    for block in &wiring.blocks {
        for linear in [&block.qkv, &block.up] {
            for range in [Some(&linear.weight), linear.bias.as_ref()].into_iter().flatten() {
                let within = |p: &&Parameter| range.start <= p.range.start && p.range.end <= range.end;
                let (of_it, others): (Vec<&Parameter>, Vec<&Parameter>) =
                    wiring.layout.parameters.iter().filter(within).partition(|p| whole.contains(&p.name));
                if let (Some(one), Some(other)) = (of_it.first(), others.first()) {
                    return Err(refuse(format!(
                        "{} would be trained itself and {} not; fleet computes with both at once: train both, or neither",
                        one.name, other.name
                    )));
                }
            }
        }
    }
    Ok(())
}

/// Where a matrix is that an adapter can change.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Place {
    Embedding,
    Block,
    Head,
}

impl Place {
    fn of(p: &Parameter, layout: &Layout, model: &Model) -> Option<Place> {
        let names = &model.family.names;
        match p.role {
            Role::Table | Role::TiedTable if module(p) == names.embedding => Some(Place::Embedding),
            Role::Weight if p.unit == 0 => None,
            Role::Weight if p.unit + 1 < layout.units.len() => Some(Place::Block),
            Role::Weight if module(p) == names.head => Some(Place::Head),
            _ => None,
        }
    }
}

fn can_change(p: &Parameter, is_dora: bool) -> Result<()> {
    match (p.role, is_dora) {
        (Role::TiedTable, _) => Err(refuse(format!(
            "{} would be changed, which is the embedding and the head at once in this model (tie_word_embeddings), and one adapter cannot change both alike; untie them first, or change linear layers alone",
            p.name
        ))),
        (Role::Table, true) => Err(refuse(format!(
            "{} would be changed, and DoRA is for linear layers; take the embedding out of target_modules, or set use_dora = false",
            p.name
        ))),
        _ => Ok(()),
    }
}

/// How modules are meant.
enum Wanted {
    All,
    Names(Vec<String>),
    Pattern(Regex, String),
}

impl Wanted {
    fn of(targets: &job::Targets, key: &str) -> Result<Wanted> {
        Ok(match targets {
            job::Targets::AllLinear => Wanted::All,
            job::Targets::Names(names) => Wanted::Names(names.clone()),
            job::Targets::Pattern(pattern) => {
                let regex = Regex::new(&format!("^(?:{pattern})$"));
                let regex = regex.map_err(|why| {
                    let why = why.to_string();
                    let why = why.lines().last().unwrap_or_default().trim().to_owned();
                    refuse(format!("{key} is {pattern:?}, which is no regular expression ({why})"))
                })?;
                Wanted::Pattern(regex, pattern.clone())
            }
        })
    }

    fn is(&self, module: &str) -> bool {
        match self {
            Wanted::All => true,
            Wanted::Names(names) => names.iter().any(|name| ends_with(module, name)),
            Wanted::Pattern(regex, _) => regex.is_match(module),
        }
    }

    fn said(&self) -> String {
        match self {
            Wanted::All => "\"all-linear\"".to_owned(),
            Wanted::Names(names) => names.join(", "),
            Wanted::Pattern(_, pattern) => format!("{pattern:?}"),
        }
    }
}

/// How the modules that an adapter can change end.
pub(super) fn linear_names(model: &Model) -> Vec<String> {
    let layout = model.layout();
    let blocks = layout.units.len() - 2;
    let is_linear = |p: &&Parameter| (1..=blocks).contains(&p.unit) && p.role == Role::Weight;
    let names: BTreeSet<&str> = layout.parameters.iter().filter(is_linear).map(|p| last(module(p))).collect();
    names.into_iter().map(str::to_owned).collect()
}

/// A whole name, or its end from a dot on.
fn ends_with(module: &str, name: &str) -> bool {
    module.strip_suffix(name).is_some_and(|before| before.is_empty() || before.ends_with('.'))
}

fn module(p: &Parameter) -> &str {
    p.name.strip_suffix(".weight").or_else(|| p.name.strip_suffix(".bias")).unwrap_or(&p.name)
}

fn last(module: &str) -> &str {
    module.rsplit('.').next().unwrap_or(module)
}

/// Refuses a name that no module has.
fn known(name: &str, key: &str, modules: Vec<&str>) -> Result<()> {
    if modules.iter().any(|module| ends_with(module, name)) {
        return Ok(());
    }
    let ends: BTreeSet<&str> = modules.iter().map(|module| last(module)).collect();
    let near = suggest::nearest(name, ends.iter().copied().chain(modules.iter().copied()));
    let near = near.map(|near| format!("; did you mean {near}?")).unwrap_or_else(|| ".".to_owned());
    Err(refuse(format!(
        "{key} names {name}, and no module of the model that can be so is called so{near} It has {}",
        listed(ends.into_iter())
    )))
}

fn listed<'a>(names: impl Iterator<Item = &'a str>) -> String {
    let names: BTreeSet<&str> = names.collect();
    let more = names.len().saturating_sub(LISTED);
    let some: Vec<&str> = names.into_iter().take(LISTED).collect();
    format!("{}{}", some.join(", "), if more > 0 { format!(" and {more} more") } else { String::new() })
}

fn refuse(what: String) -> Error {
    Error::Input(format!("adapter: {what}"))
}
