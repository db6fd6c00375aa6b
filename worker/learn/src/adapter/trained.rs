//! What is trained of an adapter: a layout of its own, and where its numbers act in the model.

use super::targets::Targets;
use super::{Adapter, AdapterConfig, FewBits, MAGNITUDE};
use crate::error::{Error, Result};
use crate::model::Model;
use crate::units::Places;
use fleet_checkpoint::ModelDir;
use fleet_common::job;
use fleet_common::model::{Fresh, Layout, Linear, Parameter, Role, Stored, Wiring};
use std::ops::Range;
use std::path::{Path, PathBuf};

/// Units and groups of matrices begin at whole cache lines.
const ALIGN: usize = 64;

/// The numbers of an adapter, which a strategy keeps as it keeps those of a model: the same units, of which some may hold nothing.
#[derive(Clone, Debug)]
pub struct Trained {
    pub layout: Layout,
    /// Parameters of the model that are trained themselves: their ranges in the model's flat buffer, and where they are here.
    whole: Places,
    /// In the order of the products' weights in the model.
    added: Vec<AddedProduct>,
    /// What is added to the embedding's rows.
    embedding: Option<AddedTable>,
    /// The first unit that has anything.
    lowest: usize,
    /// Share of what the first matrices would read that they do not see in a training step.
    pub dropout: f32,
}

/// An adapter that is trained, and beside what.
#[derive(Clone, Debug)]
pub struct TrainedAdapter {
    pub trained: Trained,
    pub config: AdapterConfig,
    /// The directory of the model.
    pub base: PathBuf,
    /// How the model's matrices are kept while it is trained beside.
    pub few_bits: FewBits,
    /// An adapter whose numbers it begins with.
    pub from: Option<PathBuf>,
}

impl TrainedAdapter {
    /// As `adapter` asks for it, beside the model in `base`, whose matrices are kept so.
    pub fn new(
        adapter: &job::Adapter,
        few_bits: FewBits,
        model: &Model,
        base: &ModelDir,
    ) -> Result<TrainedAdapter> {
        let (trained, config) = Trained::new(adapter, model, base)?;
        let (base, from) = (base.path().to_owned(), adapter.path.clone());
        // What is trained itself needs more bits.
        let few_bits = few_bits.only(|range| trained.whole.find(range).is_none());
        Ok(TrainedAdapter { trained, config, base, few_bits, from })
    }

    /// For the log.
    pub fn describe(&self, model: &Model) -> String {
        let modules: usize = self.trained.added.iter().map(|added| added.parts.len()).sum();
        let modules = modules + usize::from(self.trained.embedding.is_some());
        let whole = self.trained.whole.iter().map(|(range, _)| range.len()).sum::<usize>();
        let and = if whole > 0 {
            format!(", and {} parameters of it", counted(whole as u64))
        } else {
            String::new()
        };
        format!(
            "an adapter of {modules} modules with {} parameters{and} is trained beside {} parameters that stay as they are, once on each node{}",
            counted(self.trained.layout.count() - whole as u64),
            counted(model.layout().count() - whole as u64),
            match self.few_bits.is_empty() {
                true => String::new(),
                false => format!(", the matrices of blocks in {}", self.few_bits.names()),
            }
        )
    }
}

/// In thousands or millions, as is usual.
fn counted(parameters: u64) -> String {
    match parameters {
        0..10_000 => parameters.to_string(),
        10_000..1_000_000 => format!("{:.1} K", parameters as f64 / 1e3),
        _ => format!("{:.1} M", parameters as f64 / 1e6),
    }
}

/// What is added to one product: `x a^T`, `[tokens, rank]`, times `b` of each part.
#[derive(Clone, Debug)]
pub struct AddedProduct {
    /// In the model's flat buffer, the weight of the product.
    weight: Range<usize>,
    /// Counted over all units.
    pub number: usize,
    /// Of all parts together.
    pub rank: usize,
    /// `[rank, inputs]`, the first matrices of all parts one below the other.
    pub a: Range<usize>,
    pub parts: Vec<AddedPart>,
}

/// One module of the model's files, which has some of the outputs.
#[derive(Clone, Debug)]
pub struct AddedPart {
    pub outputs: Range<usize>,
    /// Its part of the rank.
    pub ranks: Range<usize>,
    /// `[outputs, rank]` of this part.
    pub b: Range<usize>,
    pub scale: f32,
    /// `[outputs]`, under DoRA.
    pub magnitude: Option<Range<usize>>,
}

impl AddedProduct {
    /// Whether rows of the matrix have magnitudes.
    pub fn is_dora(&self) -> bool {
        self.parts.iter().any(|part| part.magnitude.is_some())
    }
}

/// What is added to rows of the embedding: those of `a` times `b^T`.
#[derive(Clone, Debug)]
pub struct AddedTable {
    /// `[vocabulary, rank]`.
    pub a: Range<usize>,
    /// `[width, rank]`.
    pub b: Range<usize>,
    pub rank: usize,
    pub scale: f32,
}

impl Trained {
    /// As `adapter` asks for it, for the model in `base`.
    fn new(adapter: &job::Adapter, model: &Model, base: &ModelDir) -> Result<(Trained, AdapterConfig)> {
        if let Some(dir) = &adapter.path {
            return Trained::of_dir(dir, (adapter.dropout, adapter.loraplus_lr_ratio), model, base);
        }
        let mut config = AdapterConfig::of_job(adapter, model, base.path())?;
        let targets = Targets::of(adapter, &config, model)?;
        targets.spell_out(adapter, model, &mut config.json);
        Ok((Trained::of_targets(&targets, &config, model)?, config))
    }

    /// As the adapter in `dir` was made, with another share that is dropped, where one is given.
    fn of_dir(
        dir: &Path,
        (dropout, rate_of_b): (Option<f64>, f64),
        model: &Model,
        base: &ModelDir,
    ) -> Result<(Trained, AdapterConfig)> {
        let mut config = AdapterConfig::read(dir)?;
        config.dropout = dropout.unwrap_or(config.dropout);
        config.json.insert("lora_dropout".into(), config.dropout.into());
        let given = Adapter::open(dir, base)?;
        let targets = Targets::found((&given, base), &config, rate_of_b, model)?;
        Ok((Trained::of_targets(&targets, &config, model)?, config))
    }

    /// What the adapter in `dir` adds to the model in `base`, to compute with it.
    pub fn of_file(dir: &Path, model: &Model, base: &ModelDir) -> Result<Trained> {
        Ok(Trained::of_dir(dir, (None, 1.0), model, base)?.0)
    }

    fn of_targets(targets: &Targets, config: &AdapterConfig, model: &Model) -> Result<Trained> {
        let wiring = model.wiring();
        let mut made = Maker::default();
        let unit_of = |number: usize| wiring.layout.units[number].clone();
        made.embedding(&wiring, targets);
        for (number, _) in wiring.layout.units.iter().enumerate() {
            for linear in products(&wiring, number) {
                made.product(linear, &wiring.layout, targets);
            }
            made.wholes(number, &unit_of(number), &wiring.layout, targets);
            made.end_unit();
        }
        made.done(config)
    }

    /// Where a range of the model's flat buffer is, if it is trained itself. A range of which only a part is trained is an executor's mistake.
    pub fn place(&self, range: &Range<usize>) -> Option<Range<usize>> {
        self.whole.find(range)
    }

    /// What is added to the product with this weight.
    pub fn added(&self, weight: &Range<usize>) -> Option<&AddedProduct> {
        let at = self.added.binary_search_by_key(&weight.start, |added| added.weight.start).ok()?;
        Some(&self.added[at])
    }

    /// What is added to products, in the order of their weights.
    pub fn products(&self) -> impl Iterator<Item = &AddedProduct> {
        self.added.iter()
    }

    /// What is added to the embedding's rows, if anything is.
    pub fn embedding(&self) -> Option<&AddedTable> {
        self.embedding.as_ref()
    }

    /// The first unit that has anything: no gradient need flow further down.
    pub fn lowest(&self) -> usize {
        self.lowest
    }
}

/// The products of a unit that an adapter can change.
fn products(wiring: &Wiring, unit: usize) -> Vec<&Linear> {
    match unit.checked_sub(1).map(|number| wiring.blocks.get(number)) {
        None => Vec::new(),
        Some(Some(block)) => vec![&block.qkv, &block.out, &block.up, &block.down],
        Some(None) if wiring.head.weight == wiring.embedding => Vec::new(),
        Some(None) => vec![&wiring.head],
    }
}

#[derive(Default)]
struct Maker {
    parameters: Vec<Parameter>,
    units: Vec<Range<usize>>,
    unit_start: usize,
    next: usize,
    whole: Vec<(Range<usize>, usize)>,
    added: Vec<AddedProduct>,
    embedding: Option<AddedTable>,
}

impl Maker {
    fn embedding(&mut self, wiring: &Wiring, targets: &Targets) {
        let table = wiring.layout.parameters.iter().find(|p| p.range == wiring.embedding);
        let Some((table, lora)) = table.and_then(|table| Some((table, targets.lora(table)?))) else { return };
        let (rows, width, rank) = (table.shape[0], table.shape[1], lora.rank);
        let name = |end: &str| format!("{}.lora_embedding_{end}", lora.module);
        // PEFT begins with zeros where rows are looked up, and draws what they are multiplied with.
        let zero = Fresh::Constant(0.0);
        let a = self.add(&name("A"), &[rows, rank], Role::LoraB, Stored::Transposed, zero);
        self.next = self.next.next_multiple_of(ALIGN);
        let b = self.add(&name("B"), &[width, rank], Role::LoraA, Stored::AsIs, Fresh::Normal(1.0));
        self.embedding = Some(AddedTable { a, b, rank, scale: lora.scale });
    }

    fn product(&mut self, linear: &Linear, model: &Layout, targets: &Targets) {
        let within =
            |p: &&Parameter| linear.weight.start <= p.range.start && p.range.end <= linear.weight.end;
        let mut modules: Vec<&Parameter> = model.parameters.iter().filter(within).collect();
        modules.sort_by_key(|p| p.range.start);
        let chosen: Vec<_> = modules.into_iter().filter_map(|p| Some((p, targets.lora(p)?))).collect();
        if chosen.is_empty() {
            return;
        }
        self.next = self.next.next_multiple_of(ALIGN);
        let (start, mut rank) = (self.next, 0);
        for (_, lora) in &chosen {
            let name = format!("{}.lora_A.weight", lora.module);
            self.add(
                &name,
                &[lora.rank, linear.inputs],
                Role::LoraA,
                Stored::AsIs,
                lora.fresh(linear.inputs),
            );
        }
        let a = start..self.next;
        let mut parts = Vec::new();
        for (p, lora) in &chosen {
            self.next = self.next.next_multiple_of(ALIGN);
            let first = (p.range.start - linear.weight.start) / linear.inputs;
            let outputs = first..first + p.shape[0];
            let stored = if p.stored == Stored::Transposed { Stored::AsIs } else { p.stored };
            let name = format!("{}.lora_B.weight", lora.module);
            let b = self.add(&name, &[p.shape[0], lora.rank], Role::LoraB, stored, Fresh::Constant(0.0));
            self.parameters.last_mut().expect("it was added").rate = lora.rate_of_b;
            let magnitude = lora.is_dora.then(|| {
                self.next = self.next.next_multiple_of(ALIGN);
                let name = format!("{}{MAGNITUDE}", lora.module);
                let range = self.add(&name, &[p.shape[0]], Role::Magnitude, stored, Fresh::RowLengths);
                // As PEFT's optimizer of LoRA+ has it.
                self.parameters.last_mut().expect("it was added").rate = lora.rate_of_b;
                range
            });
            parts.push(AddedPart { outputs, ranks: rank..rank + lora.rank, b, scale: lora.scale, magnitude });
            rank += lora.rank;
        }
        let number = self.added.len();
        self.added.push(AddedProduct { weight: linear.weight.clone(), number, rank, a, parts });
    }

    /// Parameters that are trained themselves.
    fn wholes(&mut self, unit: usize, range: &Range<usize>, model: &Layout, targets: &Targets) {
        let mut chosen: Vec<&Parameter> =
            model.parameters.iter().filter(|p| p.unit == unit && targets.is_whole(p)).collect();
        chosen.sort_by_key(|p| p.range.start);
        let mut end = range.start;
        for p in chosen {
            // What touches in the model touches here: it may be read as one.
            if p.range.start != end {
                self.next = self.next.next_multiple_of(ALIGN);
            }
            end = p.range.end;
            let start = self.next;
            self.next += p.range.len();
            self.whole.push((p.range.clone(), start));
            self.parameters.push(Parameter {
                name: targets.name_of_whole(p),
                range: start..self.next,
                unit: self.units.len(),
                ..p.clone()
            });
        }
    }

    fn add(&mut self, name: &str, shape: &[usize], role: Role, stored: Stored, fresh: Fresh) -> Range<usize> {
        let range = self.next..self.next + shape.iter().product::<usize>();
        self.next = range.end;
        self.parameters.push(Parameter {
            name: format!("{}{name}", super::WRAPPED),
            shape: shape.to_vec(),
            range: range.clone(),
            unit: self.units.len(),
            role,
            stored,
            fresh,
            rate: 1.0,
        });
        range
    }

    fn end_unit(&mut self) {
        self.next = self.next.next_multiple_of(ALIGN);
        self.units.push(std::mem::replace(&mut self.unit_start, self.next)..self.next);
    }

    fn done(self, config: &AdapterConfig) -> Result<Trained> {
        let lowest = self.units.iter().position(|unit| !unit.is_empty());
        let lowest =
            lowest.ok_or_else(|| Error::Input("adapter: nothing of the model is left to train".into()))?;
        Ok(Trained {
            layout: Layout { parameters: self.parameters, units: self.units, len: self.next },
            whole: joined(self.whole),
            added: self.added,
            embedding: self.embedding,
            lowest,
            dropout: config.dropout as f32,
        })
    }
}

/// Ranges that touch, there and here, are one.
fn joined(mut ranges: Vec<(Range<usize>, usize)>) -> Places {
    ranges.sort_by_key(|(range, _)| range.start);
    let mut all: Vec<(Range<usize>, usize)> = Vec::new();
    for (range, place) in ranges {
        match all.last_mut() {
            Some((last, start)) if last.end == range.start && *start + last.len() == place => {
                last.end = range.end;
            }
            _ => all.push((range, place)),
        }
    }
    Places::new(all)
}
