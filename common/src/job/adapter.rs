//! `[adapter]`: the model stays as it is, and small matrices beside it are trained (LoRA).

use super::Model;
use super::error::JobFileError;
use super::fields::Fields;
use super::load::absolute;
use super::render::table;
use super::value::{Kind, Value};
use crate::model::Family;
use serde::{Deserialize, Serialize};
use serde_json::{Map, json};
use std::path::{Path, PathBuf};

const RANK_MAX: u32 = 1 << 14;
const LAYERS_MAX: u32 = 1 << 16;

/// What of an adapter a job says; the rest follows from the model's family.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Adapter {
    /// Of the matrices; `None`: as the model's family has it.
    pub r: Option<u32>,
    /// What they add is multiplied with `alpha / r`. `None`: twice the rank.
    pub alpha: Option<f64>,
    /// Over the root of the rank, not over the rank.
    pub use_rslora: bool,
    /// Rows of the changed matrices have lengths of their own, which are trained too (DoRA).
    pub use_dora: bool,
    /// Other ranks, by regular expressions for how modules' names end, from a dot on; the first that fits counts.
    pub rank_pattern: Vec<(String, u32)>,
    /// The same for `alpha`.
    pub alpha_pattern: Vec<(String, f64)>,
    /// Share of the inputs that the first matrix does not see in a step. `None`: as the adapter has it that is gone on from, else 0.05.
    pub dropout: Option<f64>,
    /// The changed modules. `None`: those of the model's family.
    pub target_modules: Option<Targets>,
    /// Of those, modules that stay as they are.
    pub exclude_modules: Option<Targets>,
    /// Blocks whose modules are changed, counted from 0; empty: all.
    pub layers_to_transform: Vec<u32>,
    /// Modules that are trained themselves.
    pub modules_to_save: Vec<String>,
    pub bias: Bias,
    /// What the learning rate of the second matrices is multiplied with (LoRA+).
    pub loraplus_lr_ratio: f64,
    pub init: Init,
    /// An adapter to go on from, with what its own configuration says. Absolute.
    pub path: Option<PathBuf>,
}

impl Adapter {
    /// Where nobody says it.
    const DROPOUT: f64 = 0.05;

    pub fn rank(&self, family: &Family) -> u32 {
        self.r.unwrap_or(family.lora.1)
    }

    pub fn alpha(&self, family: &Family) -> f64 {
        self.alpha.unwrap_or(2.0 * f64::from(self.rank(family)))
    }

    /// Of a new adapter.
    pub fn dropout(&self) -> f64 {
        self.dropout.unwrap_or(Adapter::DROPOUT)
    }

    pub fn targets(&self, family: &Family) -> Targets {
        let usual = || Targets::Names(family.lora.0.iter().map(|&name| name.to_owned()).collect());
        self.target_modules.clone().unwrap_or_else(usual)
    }

    /// With what is taken for a model of `family` where the job says nothing. One that goes on from another is as that says.
    pub fn spelled_out(&self, family: &Family) -> Adapter {
        if self.path.is_some() {
            return self.clone();
        }
        Adapter {
            r: Some(self.rank(family)),
            alpha: Some(self.alpha(family)),
            dropout: Some(self.dropout()),
            target_modules: Some(self.targets(family)),
            ..self.clone()
        }
    }
}

/// How the matrices of a model are kept that stays as it is. Those in four bits have one scale in eight bits for 64 numbers, as bitsandbytes has
/// it with `bnb_4bit_use_double_quant`.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum Quantization {
    /// Quantiles of the normal distribution.
    Nf4,
    /// Floating-point numbers.
    Fp4,
    /// Eight bits, a scale for each row, as bitsandbytes has them.
    Int8,
    /// Half-quadratic quantisation as the package hqq has it, in so many bits, with a scale and a zero for 64 numbers.
    Hqq8,
    Hqq4,
    Hqq3,
    Hqq2,
    Hqq1,
}

impl Quantization {
    /// With the word that a job has for each.
    pub const ALL: [(&str, Quantization); 8] = [
        ("nf4", Quantization::Nf4),
        ("fp4", Quantization::Fp4),
        ("int8", Quantization::Int8),
        ("hqq8", Quantization::Hqq8),
        ("hqq4", Quantization::Hqq4),
        ("hqq3", Quantization::Hqq3),
        ("hqq2", Quantization::Hqq2),
        ("hqq1", Quantization::Hqq1),
    ];

    /// As a job names it.
    pub fn name(self) -> &'static str {
        Quantization::ALL.iter().find(|(_, kind)| *kind == self).expect("all are listed").0
    }
}

impl std::str::FromStr for Quantization {
    type Err = String;

    fn from_str(word: &str) -> Result<Quantization, String> {
        let found = Quantization::ALL.into_iter().find(|(name, _)| *name == word);
        found.map(|(_, kind)| kind).ok_or_else(|| {
            let all = Quantization::ALL.map(|(name, _)| name).join(", ");
            format!("{word:?} is none of {all}")
        })
    }
}

/// Modules of a model by their names in its files.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum Targets {
    /// Every linear layer of every block.
    AllLinear,
    /// Whole names, or how they end, from a dot on.
    Names(Vec<String>),
    /// A regular expression for the whole name.
    Pattern(String),
}

/// Which biases are trained.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum Bias {
    #[default]
    None,
    All,
    /// Of the changed modules.
    LoraOnly,
}

/// How the first matrices begin; the second ones are zero.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum Init {
    /// Uniform, as a linear layer of PyTorch.
    #[default]
    Default,
    /// Normal, with the standard deviation `1 / r`.
    Gaussian,
}

/// Settings that make a job train an adapter.
const OF_ADAPTERS: [&str; 17] = [
    "adapter.type",
    "adapter.r",
    "adapter.alpha",
    "adapter.use_rslora",
    "adapter.use_dora",
    "adapter.rank_pattern",
    "adapter.alpha_pattern",
    "adapter.dropout",
    "adapter.target_modules",
    "adapter.exclude_modules",
    "adapter.layers_to_transform",
    "adapter.modules_to_save",
    "adapter.bias",
    "adapter.loraplus_lr_ratio",
    "adapter.init",
    "adapter.path",
    "adapter.task_type",
];

/// The adapter that a job trains, if it does. Relative paths are taken from `dir`.
pub(super) fn adapter(f: &Fields, dir: &Path, model: &Model) -> Result<Option<Adapter>, JobFileError> {
    let Some(first) = OF_ADAPTERS.into_iter().find(|name| f.is_given(name)) else { return Ok(None) };
    let is_dora = f.word("adapter.type", &[("lora", false), ("dora", true)])?;
    f.word("adapter.task_type", &[("causal_lm", ())])?;
    let spelling = f.spelling(first).to_owned();
    if matches!(model, Model::New(_)) {
        let message = format!(
            "`{spelling}` asks for an adapter, which changes a model that is there; give its directory as `model.path`"
        );
        return Err(f.refuse(&[first], message));
    }
    let r = f.get("adapter.r", "a whole number", |v| v.int())?;
    if r.is_some_and(|r| r <= 0) {
        return Err(f.refuse(&["adapter.r"], "r must be positive".to_owned()));
    }
    let alpha = f.float("adapter.alpha", "a number", |_| true)?;
    if alpha.is_some_and(|alpha| alpha <= 0.0) {
        return Err(f.refuse(&["adapter.alpha"], "lora_alpha must be positive".to_owned()));
    }
    let dropout = f.float("adapter.dropout", "a number", |_| true)?;
    if dropout.is_some_and(|dropout| !(0.0..=1.0).contains(&dropout)) {
        return Err(f.refuse(&["adapter.dropout"], "lora_dropout must be between 0 and 1".to_owned()));
    }
    // A model that drops something is not the one that its reference is.
    let dropout = dropout.or(super::dpo::is_wanted(f)?.then_some(0.0));
    let path = f.text("adapter.path", "the directory of an adapter")?;
    let path = path.map(|path| absolute(f, "adapter.path", dir, &path)).transpose()?;
    let names = |name| f.texts(name, "a name or a list of names").map(Option::unwrap_or_default);
    let adapter = Adapter {
        r: f.int32("adapter.r", 1, RANK_MAX)?,
        alpha,
        use_rslora: f.flag("adapter.use_rslora")?.unwrap_or(false),
        use_dora: f.flag("adapter.use_dora")?.or(is_dora).unwrap_or(false),
        rank_pattern: pattern(f, "adapter.rank_pattern", "a rank, a whole number of at least 1", |v| {
            v.int().and_then(|n| u32::try_from(n).ok()).filter(|n| (1..=RANK_MAX).contains(n))
        })?,
        alpha_pattern: pattern(f, "adapter.alpha_pattern", "a number above 0", |v| {
            v.float().filter(|x| *x > 0.0)
        })?,
        dropout,
        target_modules: modules(f, "adapter.target_modules", "\"all-linear\", a list")?
            .map(|targets| if targets == all_linear() { Targets::AllLinear } else { targets }),
        exclude_modules: modules(f, "adapter.exclude_modules", "a list")?,
        layers_to_transform: layers(f)?,
        modules_to_save: names("adapter.modules_to_save")?,
        bias: f
            .word("adapter.bias", &[("none", Bias::None), ("all", Bias::All), ("lora_only", Bias::LoraOnly)])?
            .unwrap_or_default(),
        loraplus_lr_ratio: f
            .float("adapter.loraplus_lr_ratio", "a number above 0", |x| x > 0.0)?
            .unwrap_or(1.0),
        init: init(f)?,
        path,
    };
    if adapter.path.is_some() {
        let of_new = OF_ADAPTERS.into_iter().filter(|name| {
            ![
                "adapter.path",
                "adapter.type",
                "adapter.task_type",
                "adapter.dropout",
                "adapter.loraplus_lr_ratio",
            ]
            .contains(name)
        });
        let given: Vec<&str> = of_new.filter(|name| f.is_given(name)).collect();
        if let Some(first) = given.first() {
            let message = format!(
                "`{}` and `{}` do not go together: what an adapter is made of stands in its adapter_config.json; keep one of them",
                f.spelling(first),
                f.spelling("adapter.path")
            );
            return Err(f.refuse(&[first], message));
        }
    }
    Ok(Some(adapter))
}

/// As a job file has it.
pub(super) fn in_a_file(adapter: &Adapter) -> Map<String, serde_json::Value> {
    let modules = |targets: &Targets| match targets {
        Targets::AllLinear => json!("all-linear"),
        Targets::Names(names) => json!(names),
        Targets::Pattern(pattern) => json!(pattern),
    };
    if let Some(path) = &adapter.path {
        return table(json!({
            "path": path, "dropout": adapter.dropout, "loraplus_lr_ratio": adapter.loraplus_lr_ratio,
        }));
    }
    fn entries<T: Serialize>(pattern: &[(String, T)]) -> Option<Map<String, serde_json::Value>> {
        let entries = pattern.iter().map(|(key, number)| (key.clone(), json!(number)));
        (!pattern.is_empty()).then(|| entries.collect())
    }
    let some = |names: &[String]| (!names.is_empty()).then(|| json!(names));
    let layers = &adapter.layers_to_transform;
    table(json!({
        "type": "lora",
        "r": adapter.r,
        "alpha": adapter.alpha,
        "use_rslora": adapter.use_rslora,
        "use_dora": adapter.use_dora,
        "rank_pattern": entries(&adapter.rank_pattern),
        "alpha_pattern": entries(&adapter.alpha_pattern),
        "dropout": adapter.dropout,
        "target_modules": adapter.target_modules.as_ref().map(modules),
        "exclude_modules": adapter.exclude_modules.as_ref().map(modules),
        "layers_to_transform": (!layers.is_empty()).then_some(layers),
        "modules_to_save": some(&adapter.modules_to_save),
        "bias": adapter.bias,
        "loraplus_lr_ratio": adapter.loraplus_lr_ratio,
        "init": adapter.init,
    }))
}

pub(super) fn quantization(
    f: &Fields,
    adapter: Option<&Adapter>,
) -> Result<Option<Quantization>, JobFileError> {
    let words: Vec<_> = [("none", None)]
        .into_iter()
        .chain(Quantization::ALL.map(|(name, kind)| (name, Some(kind))))
        .collect();
    let quantization = f.word("quantization", &words)?.flatten();
    if quantization.is_some() && adapter.is_none() {
        let message = format!(
            "`{}` is for a model that stays as it is: weights that are trained need more bits; give the job an `[adapter]`, or leave it out",
            f.spelling("quantization")
        );
        return Err(f.refuse(&["quantization"], message));
    }
    Ok(quantization)
}

/// Entries of a table from patterns for modules to numbers.
fn pattern<T>(
    f: &Fields,
    name: &'static str,
    wanted: &str,
    number: impl Fn(&Value) -> Option<T>,
) -> Result<Vec<(String, T)>, JobFileError> {
    let wanted = format!("a table from patterns for the ends of modules' names to {wanted}");
    let given = f.get(name, &wanted, |v| match &v.kind {
        Kind::Table(entries) => entries.iter().map(|(key, v)| Some((key.clone(), number(v)?))).collect(),
        _ => None,
    })?;
    Ok(given.unwrap_or_default())
}

fn all_linear() -> Targets {
    Targets::Names(vec!["all-linear".to_owned()])
}

fn modules(f: &Fields, name: &'static str, wanted: &str) -> Result<Option<Targets>, JobFileError> {
    let wanted =
        format!("{wanted} of modules or how their names end, or a regular expression for whole names");
    f.get(name, &wanted, |v| {
        let is_list = matches!(v.kind, Kind::List(_));
        let texts =
            v.texts().filter(|all| !all.is_empty() && all.iter().all(|text| !text.trim().is_empty()))?;
        let is_name = |text: &str| text.chars().all(|c| c.is_ascii_alphanumeric() || "_.-".contains(c));
        Some(match &texts[..] {
            [one] if is_list || is_name(one) => Targets::Names(texts),
            // As LLaMA-Factory writes several; no module's name has a comma.
            [one] if one.split(',').all(|name| !name.trim().is_empty() && is_name(name.trim())) => {
                Targets::Names(one.split(',').map(|name| name.trim().to_owned()).collect())
            }
            // As PEFT takes a single text; a plain name is how names end.
            [one] => Targets::Pattern(one.clone()),
            _ => Targets::Names(texts),
        })
    })
}

fn layers(f: &Fields) -> Result<Vec<u32>, JobFileError> {
    let wanted = "the number of a block, counted from 0, or a list of them";
    let number = |n: i64| u32::try_from(n).ok().filter(|n| *n < LAYERS_MAX);
    let given = f.get("adapter.layers_to_transform", wanted, |v| match &v.kind {
        Kind::List(items) => {
            items.iter().map(|item| item.int().and_then(number)).collect::<Option<Vec<u32>>>()
        }
        _ => Some(vec![v.int().and_then(number)?]),
    })?;
    let mut layers = given.unwrap_or_default();
    layers.sort_unstable();
    layers.dedup();
    Ok(layers)
}

fn init(f: &Fields) -> Result<Init, JobFileError> {
    let wanted = "\"default\" or \"gaussian\"";
    let given = f.get("adapter.init", wanted, |v| match (v.text(), v.bool()) {
        (Some("default"), _) | (None, Some(true)) => Some(Init::Default),
        (Some("gaussian"), _) => Some(Init::Gaussian),
        _ => None,
    })?;
    Ok(given.unwrap_or_default())
}

#[cfg(test)]
#[allow(clippy::unwrap_used)] // in a test an unwrap is an assertion
mod tests {
    use super::super::{Job, parse_toml};
    use super::*;

    fn of(text: &str) -> Result<Job, String> {
        let text = format!("data.path = \"x\"\n{text}");
        parse_toml(&text, "/work/dir".as_ref()).map(|(job, _)| job).map_err(|e| e.to_string())
    }

    #[test]
    fn a_job_says_what_it_wants_in_the_words_of_peft() {
        let job = of("model.path = \"m\"\nlora_r = 4\nlora_alpha = 8\ntarget_modules = [\"q_proj\", \"v_proj\"]\nlayers_to_transform = [1, 0, 1]")
            .unwrap();
        let adapter = job.adapter.clone().unwrap();
        assert_eq!((adapter.r, adapter.alpha, adapter.dropout), (Some(4), Some(8.0), None));
        assert_eq!(adapter.target_modules, Some(Targets::Names(vec!["q_proj".into(), "v_proj".into()])));
        assert_eq!(adapter.layers_to_transform, [0, 1]);
        assert_eq!(Job::from_json(&job.to_json()).unwrap(), job);
        let again = parse_toml(&job.to_toml(), "/work/dir".as_ref()).unwrap().0;
        assert_eq!(again, job);

        let adapter = |text: &str| of(&format!("model.path = \"m\"\n{text}")).unwrap().adapter;
        assert_eq!(adapter("seed = 1"), None);
        assert!(adapter("adapter = \"lora\"").is_some() && adapter("[adapter]\ntype = \"lora\"").is_some());
        let targets =
            |text: &str| adapter(&format!("[adapter]\ntarget_modules = {text}")).unwrap().target_modules;
        assert_eq!(targets("\"all-linear\""), Some(Targets::AllLinear));
        assert_eq!(targets("\"q_proj\""), Some(Targets::Names(vec!["q_proj".into()])));
        assert_eq!(targets("'.*\\.(q|v)_proj'"), Some(Targets::Pattern(".*\\.(q|v)_proj".into())));
        assert_eq!(targets("'q_proj, v_proj'"), targets("['q_proj', 'v_proj']"), "as others write it");

        let dora = |text: &str| adapter(text).unwrap().use_dora;
        assert!(dora("[adapter]\ntype = \"dora\"") && dora("use_dora = true") && !dora("adapter = \"lora\""));
        let job = of("model.path = \"m\"\n[adapter]\nexclude_modules = '.*\\.1\\..*'\n[adapter.rank_pattern]\nv_proj = 4\n'layers\\.1\\.q_proj' = 2\nq_proj = 8\n[adapter.alpha_pattern]\nq_proj = 0.5")
            .unwrap();
        let adapter = job.adapter.clone().unwrap();
        let ranks = [("v_proj", 4), ("layers\\.1\\.q_proj", 2), ("q_proj", 8)];
        assert_eq!(adapter.rank_pattern, ranks.map(|(name, rank)| (name.to_owned(), rank)));
        assert_eq!(adapter.alpha_pattern, [("q_proj".to_owned(), 0.5)]);
        assert_eq!(adapter.exclude_modules, Some(Targets::Pattern(".*\\.1\\..*".into())));
        assert_eq!(Job::from_json(&job.to_json()).unwrap(), job);
        assert_eq!(parse_toml(&job.to_toml(), "/work/dir".as_ref()).unwrap().0, job);
    }

    #[test]
    fn what_is_taken_where_nothing_is_said_can_be_spelled_out() {
        let spelled = |text: &str, family: &str| {
            let job = of(&format!("model.path = \"m\"\n{text}")).unwrap();
            let spelled = job.spelled_out(Family::find(family));
            let again = parse_toml(&spelled.to_toml(), "/work/dir".as_ref()).unwrap().0;
            assert_eq!(
                (&again, spelled.spelled_out(Family::find("opt"))),
                (&spelled, spelled.clone()),
                "{text}"
            );
            spelled
        };
        let job = spelled("adapter.type = \"lora\"\nmax_steps = 200", "gpt2");
        let adapter = job.adapter.unwrap();
        assert_eq!((adapter.r, adapter.alpha, adapter.dropout), (Some(12), Some(24.0), Some(0.05)));
        let names = ["c_attn", "c_proj"].map(str::to_owned).to_vec();
        assert_eq!(
            (adapter.target_modules, job.optimizer.warmup_steps),
            (Some(Targets::Names(names)), Some(20))
        );
        let job =
            spelled("lora_r = 4\ntarget_modules = \"all-linear\"\nwarmup_steps = 7\nmax_steps = 20", "llama");
        let adapter = job.adapter.unwrap();
        assert_eq!((adapter.r, adapter.alpha), (Some(4), Some(8.0)));
        assert_eq!((adapter.target_modules, job.optimizer.warmup_steps), (Some(Targets::AllLinear), Some(7)));
        let going_on = spelled("adapter.path = \"a\"", "llama");
        assert_eq!((going_on.adapter.unwrap().r, going_on.optimizer.warmup_steps), (None, None));
    }

    #[test]
    fn what_cannot_be_is_refused() {
        for (text, wanted) in [
            ("adapter.r = 0", "job.toml:3: r must be positive"),
            ("lora_alpha = -1", "job.toml:3: lora_alpha must be positive"),
            ("lora_dropout = 1.5", "job.toml:3: lora_dropout must be between 0 and 1"),
            (
                "adapter.bias = \"some\"",
                "`adapter.bias` is the text \"some\"; one of \"none\", \"all\", \"lora_only\"",
            ),
            ("adapter.path = \"a\"\nlora_r = 4", "`lora_r` and `adapter.path` do not go together"),
            ("adapter = { }", "says nothing"),
            ("adapter.rank_pattern = 4", "`adapter.rank_pattern` is 4; a table from patterns"),
            ("[adapter.rank_pattern]\nq_proj = 0", "to a rank, a whole number of at least 1"),
            ("[adapter.alpha_pattern]\nq_proj = -1", "to a number above 0"),
            ("quantization = \"nf4\"", "give the job an `[adapter]`"),
            ("lora_r = 4\nquantization = \"int3\"", "one of \"none\", \"nf4\", \"fp4\""),
        ] {
            let error = of(&format!("model.path = \"m\"\n{text}")).unwrap_err();
            assert!(error.contains(wanted), "{text}: {error}");
        }
        assert!(of("lora_r = 4").unwrap_err().contains("give its directory as `model.path`"));
    }
}
