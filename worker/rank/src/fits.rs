//! What a job needs on the CPU. One that can never fit is refused before it takes any memory, with what would fit.

use crate::choice::{self, Memory, Pool};
use fleet_collectives::{Gang, Op};
use fleet_common::capability::{Refusal, Wanted};
use fleet_common::job::{ActivationCheckpointing, Device, Executor, Job, Precision, Shape, Strategy};
use fleet_cpu::activation_bytes;
use fleet_learn::adapter::{Kept, frozen_bytes};
use fleet_learn::machine;
use fleet_learn::model::Model;
use fleet_learn::strategy::{Keeping, Needs, Resident};
use fleet_learn::{Error, Result};
use fleet_torch::{Base, Held, Numbers};
use half::bf16;

/// What decides how much memory a step takes for each rank of a machine.
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct Setting {
    pub strategy: Strategy,
    /// As the job has it.
    pub executor: Executor,
    pub precision: Precision,
    pub reshard_after_forward: bool,
    pub activation_checkpointing: ActivationCheckpointing,
    /// Sequences at once.
    pub batch_size: u32,
    pub accumulate_grad_batches: u32,
    pub shape: Shape,
}

impl Setting {
    pub fn of(job: &Job, shape: Shape) -> Setting {
        Setting {
            strategy: job.strategy,
            executor: job.executor,
            precision: job.precision,
            reshard_after_forward: job.reshard_after_forward,
            activation_checkpointing: job.activation_checkpointing,
            batch_size: job.batch_size,
            accumulate_grad_batches: job.accumulate_grad_batches,
            shape,
        }
    }

    pub fn keeping(&self) -> Keeping {
        Keeping {
            strategy: self.strategy,
            bf16: matches!(self.precision, Precision::Bf16Mixed | Precision::Fp16Mixed),
            narrow: self.precision == Precision::Bf16True,
            shape: self.shape,
            resident: Resident::of(self.reshard_after_forward),
            accumulates: self.accumulate_grad_batches > 1,
        }
    }

    /// What computes it on a CPU; an error where nothing does.
    pub fn computed_by(&self) -> std::result::Result<Executor, Refusal> {
        let Setting { executor, precision, .. } = *self;
        Wanted { device: Device::Cpu, executor, precision, ..Wanted::ANYTHING }.executor()
    }
}

/// Bytes for each rank. What the ranks share is divided by their number.
pub struct Need {
    pub kept: Needs,
    pub activations: usize,
}

impl Need {
    pub fn of(model: &Model, max_seq_len: u32, setting: &Setting) -> Need {
        let again = setting.activation_checkpointing.of(model.decoder.layers);
        let tokens = setting.batch_size as usize * (max_seq_len as usize - 1);
        if setting.computed_by() == Ok(Executor::Torch) {
            let (numbers, layout) = (Numbers::from(setting.precision), model.trained_layout());
            let mut kept = fleet_torch::needs(
                &layout,
                Held::of(setting.strategy, setting.reshard_after_forward),
                numbers,
                choice::together(setting.strategy, setting.shape),
            );
            kept.weights += beside_on_torch(model, numbers, setting.shape.of_node() as usize);
            return Need {
                kept,
                activations: fleet_torch::activation_bytes(fleet_torch::Pass {
                    decoder: &model.decoder,
                    trained: model.adapter.as_ref().map(|adapter| &adapter.trained),
                    numbers,
                    tokens,
                    again,
                }),
            };
        }
        let (layout, is_bf16) = (model.trained_layout(), setting.precision != Precision::Fp32);
        let mut kept = Needs::of(&setting.keeping(), &layout);
        if let Some(adapter) = &model.adapter {
            let frozen = frozen_bytes(&model.layout(), Kept::of(setting.precision), &adapter.few_bits);
            kept.weights += frozen.div_ceil(setting.shape.of_node() as usize);
        }
        Need {
            kept,
            activations: match is_bf16 {
                true => activation_bytes::<bf16>(&model.decoder, tokens, again),
                false => activation_bytes::<f32>(&model.decoder, tokens, again),
            },
        }
    }

    pub fn total(&self) -> usize {
        self.kept.total() + self.activations
    }
}

/// Bytes of the model beside which an adapter is trained, which each rank of the torch executor has for itself, but for what of it is in few bits:
/// `sharing` ranks have that together.
pub fn beside_on_torch(model: &Model, numbers: Numbers, sharing: usize) -> usize {
    model.adapter.as_ref().map_or(0, |adapter| Base::bytes(&model.layout(), adapter, numbers, sharing))
}

/// The copy that a checkpoint is written from, for each rank of the first node, which have the most: they write the weights, and all that keep
/// moments write these.
pub fn saving(model: &Model, setting: &Setting) -> usize {
    let layout = model.trained_layout();
    let one = if setting.precision == Precision::Bf16True { 2 } else { 4 } * layout.len;
    let (keeping, of_node) = (setting.keeping(), setting.shape.of_node() as usize);
    let is_torch = setting.computed_by() == Ok(Executor::Torch);
    let is_over_hosts = keeping.is_sharded_over_hosts();
    let together = match (is_torch, is_over_hosts) {
        (true, _) => choice::together(setting.strategy, setting.shape),
        (_, true) => setting.shape.ranks as usize,
        _ => of_node,
    };
    // Masters come from other ranks through a buffer where they are not what is gathered anyway.
    let longest = layout.units.iter().map(|unit| unit.len()).max().unwrap_or(0);
    let is_gathered = is_over_hosts || is_torch && together > 1;
    let buffer = if is_gathered && keeping.bf16 { 4 * longest } else { 0 };
    one / of_node + 2 * one / together + buffer
}

/// What a job runs as.
pub struct Settled {
    /// Never `Auto` for several ranks.
    pub strategy: Strategy,
    /// Why it was chosen, where the job left it open.
    pub reason: Option<String>,
}

/// Chooses a strategy where the job leaves it open, and refuses a job that needs more than the smallest of its machines has, whatever else runs
/// on it. With the `gang` of all ranks, where there are several: they find the same. A collective call.
pub fn settle(job: &Job, model: &Model, shape: Shape, gang: Option<&mut dyn Gang>) -> Result<Settled> {
    let several = gang.is_some();
    let program = machine::program_bytes(shape.of_node() as usize);
    let [memory, with_swap, program] =
        worst([machine::memory_bytes(), machine::total_bytes()], program, gang)?;
    let mut setting = Setting::of(job, shape);
    let needs = |setting: &Setting| Need::of(model, job.max_seq_len, setting).total();
    let mut reason = None;
    if several && setting.strategy == Strategy::Auto {
        let chosen = choose(model, job.max_seq_len, &setting, (memory, program));
        setting.strategy = chosen.strategy;
        reason = Some(format!("strategy: {}", chosen.reason));
    }
    match refusal(&setting, with_swap, needs) {
        None => Ok(Settled { strategy: setting.strategy, reason }),
        Some(line) => Err(Error::Environment(line)),
    }
}

/// The least of each that any rank `has`, and the most that any `takes`. A collective call.
pub fn worst(has: [usize; 2], takes: usize, gang: Option<&mut dyn Gang>) -> Result<[usize; 3]> {
    let [first, second] = has;
    let Some(gang) = gang else { return Ok([first, second, takes]) };
    let mut most = [-(first as f64), -(second as f64), takes as f64];
    gang.all_reduce_f64(&mut most, Op::Max)?;
    Ok([-most[0] as usize, -most[1] as usize, most[2] as usize])
}

/// What `auto` is for this setting where the smallest node has so much memory, and the program itself takes so much for each rank.
pub fn choose(
    model: &Model,
    max_seq_len: u32,
    setting: &Setting,
    (memory, program): (usize, usize),
) -> choice::Choice {
    let needs = |strategy| {
        let setting = Setting { strategy, ..*setting };
        Need::of(model, max_seq_len, &setting).total() + saving(model, &setting) + program
    };
    let memory = Memory { bytes: memory, from: Pool::Node };
    choice::choose(setting.shape, memory, choice::in_order(setting.shape), needs)
}

/// Why `setting` cannot run where there are `total` bytes, by what each rank `needs`.
fn refusal(setting: &Setting, total: usize, needs: impl Fn(&Setting) -> usize) -> Option<String> {
    let all = |setting: &Setting| needs(setting).saturating_mul(setting.shape.of_node() as usize);
    let fits = |setting: &Setting| all(setting) <= total;
    if fits(setting) {
        return None;
    }
    let changes = changes(setting);
    let mut alone: Vec<&str> = changes
        .iter()
        .filter(|(change, _)| fits(&change(setting)))
        .map(|(_, words)| words.as_str())
        .collect();
    let mut with_all = *setting;
    let mut words = Vec::new();
    if alone.is_empty() {
        for (change, what) in &changes {
            with_all = change(&with_all);
            words.push(what.as_str());
            if fits(&with_all) {
                break;
            }
        }
    }
    let together = words.join(" and ");
    if alone.is_empty() && fits(&with_all) {
        alone.push(&together);
    }
    let help = match alone.is_empty() {
        true => "no setting makes it fit: take a smaller model, or a machine with more memory".to_owned(),
        false => format!("it would fit with {}", alone.join(", or with ")),
    };
    let Shape { ranks, nodes } = setting.shape;
    let (ranks, machine) = match (ranks, nodes) {
        (1, _) => (String::new(), "this machine"),
        (ranks, 1) => (format!(" for {ranks} ranks"), "this machine"),
        _ => (format!(" on each node of {}", setting.shape.of_node()), "the smallest of them"),
    };
    Some(format!(
        "a step needs at least {}{ranks}, and {machine} has {} of memory; {help}",
        size(all(setting)),
        size(total)
    ))
}

/// A change of a setting.
type Change = Box<dyn Fn(&Setting) -> Setting>;

/// What can be changed, the ones first that cost least, with the words for it.
fn changes(setting: &Setting) -> Vec<(Change, String)> {
    let mut changes: Vec<(Change, String)> = Vec::new();
    let Shape { ranks, nodes } = setting.shape;
    let is_sharded = setting.strategy == Strategy::Fsdp || setting.strategy == Strategy::Hsdp && nodes == 1;
    if ranks > 1 && !is_sharded {
        let fsdp = |setting: &Setting| Setting { strategy: Strategy::Fsdp, ..*setting };
        changes.push((Box::new(fsdp), "strategy = \"fsdp\"".to_owned()));
    }
    if setting.batch_size > 1 {
        let one = |setting: &Setting| Setting { batch_size: 1, ..*setting };
        changes.push((Box::new(one), "batch_size = 1 and a larger accumulate_grad_batches".to_owned()));
    }
    if setting.activation_checkpointing != ActivationCheckpointing::Blocks {
        let again = |setting: &Setting| Setting {
            activation_checkpointing: ActivationCheckpointing::Blocks,
            ..*setting
        };
        changes.push((Box::new(again), "activation_checkpointing = \"blocks\"".to_owned()));
    }
    if setting.precision == Precision::Fp32 {
        let bf16 = |setting: &Setting| Setting { precision: Precision::Bf16Mixed, ..*setting };
        changes.push((Box::new(bf16), "precision = \"bf16-mixed\"".to_owned()));
    }
    let in_bf16 = |setting: &Setting| Setting { precision: Precision::Bf16True, ..*setting };
    if setting.precision != Precision::Bf16True && in_bf16(setting).computed_by().is_ok() {
        changes.push((Box::new(in_bf16), "precision = \"bf16-true\"".to_owned()));
    }
    if setting.shape.of_node() > 1 {
        let one = |setting: &Setting| {
            let nodes = setting.shape.nodes;
            Setting { shape: Shape { ranks: nodes, nodes }, ..*setting }
        };
        changes.push((Box::new(one), "one rank on a machine".to_owned()));
    }
    changes
}

/// For people.
pub(crate) fn size(bytes: usize) -> String {
    let gib = bytes as f64 / f64::from(1 << 30);
    match gib {
        ..0.95 => format!("{} MiB", bytes.div_ceil(1 << 20)),
        ..10.0 => format!("{gib:.1} GiB"),
        _ => format!("{gib:.0} GiB"),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const GIB: usize = 1 << 30;

    fn setting() -> Setting {
        Setting {
            strategy: Strategy::Auto,
            executor: Executor::Auto,
            precision: Precision::Fp32,
            reshard_after_forward: true,
            activation_checkpointing: ActivationCheckpointing::None,
            batch_size: 8,
            accumulate_grad_batches: 1,
            shape: Shape { ranks: 4, nodes: 1 },
        }
    }

    /// What shrinks with what is known here by its size: gradients, and activations of a sequence.
    fn needs(gradients: usize, sequence: usize) -> impl Fn(&Setting) -> usize {
        move |setting| {
            let shared = if setting.strategy == Strategy::Fsdp { setting.shape.ranks as usize } else { 1 };
            let kept =
                if setting.activation_checkpointing == ActivationCheckpointing::Blocks { 4 } else { 1 };
            gradients / shared + sequence * setting.batch_size as usize / kept
        }
    }

    #[test]
    fn what_fits_is_never_refused_and_what_would_fit_is_told() {
        let refusal = |total, gradients, sequence| {
            refusal(&setting(), total * GIB, needs(gradients * GIB, sequence * GIB))
        };
        assert_eq!(refusal(32, 8, 0), None);
        assert_eq!(
            refusal(20, 8, 0).unwrap(),
            "a step needs at least 32 GiB for 4 ranks, and this machine has 20 GiB of memory; it would fit with strategy = \"fsdp\", or with \
             one rank on a machine"
        );
        assert_eq!(
            refusal(20, 4, 2).unwrap(),
            "a step needs at least 80 GiB for 4 ranks, and this machine has 20 GiB of memory; it would fit with one rank on a machine"
        );
        assert!(refusal(12, 8, 1).unwrap().ends_with(
            "it would fit with strategy = \"fsdp\" and batch_size = 1 and a larger accumulate_grad_batches"
        ));
        assert!(
            refusal(1, 8, 1)
                .unwrap()
                .ends_with("no setting makes it fit: take a smaller model, or a machine with more memory")
        );
    }

    /// On the CPU codes and scales lie once on each host, whichever executor reads them.
    #[test]
    fn a_model_in_few_bits_counts_once_for_the_ranks_of_a_host() {
        let base = concat!(env!("CARGO_MANIFEST_DIR"), "/../../tests/parity/golden/foreign/byte_level");
        let text = format!(
            "quantization = \"nf4\"\nmodel.path = \"{base}\"\nadapter = {{ r = 2 }}\ndata.path = \"x.txt\""
        );
        let job = fleet_common::job::parse_toml(&text, "/work".as_ref()).unwrap().0;
        let model = Model::of_job(&job).unwrap();
        let few = model.adapter.as_ref().unwrap().few_bits.bytes();
        let beside = |sharing| beside_on_torch(&model, Numbers::FP32, sharing);
        assert!(few > 0 && beside(1) > few);
        assert_eq!(beside(1) - beside(4), few - few.div_ceil(4));
    }

    #[test]
    fn over_nodes_it_is_told_what_each_of_them_needs() {
        let shape = Shape { ranks: 4, nodes: 2 };
        let refused = |strategy| {
            let setting = Setting { strategy, shape, ..setting() };
            refusal(&setting, 7 * GIB, needs(8 * GIB, 0)).unwrap()
        };
        assert_eq!(
            refused(Strategy::Hsdp),
            "a step needs at least 16 GiB on each node of 2, and the smallest of them has 7.0 GiB of memory; it would fit with \
             strategy = \"fsdp\""
        );
        assert!(refused(Strategy::Ddp).contains("strategy = \"fsdp\""));
    }
}
