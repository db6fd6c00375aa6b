//! A decoder as data: what a `config.json` describes, in words that name no family. Executors build it, `layout` says where its numbers
//! lie, and [`families`] alone knows how each kind of model spells it.

pub mod families;
mod few_bits;
mod layout;
mod rotary;
mod settings;

pub use families::{Family, Splits};
pub use few_bits::{Packer, QUANTIZATION_CONFIG};
pub use layout::{Affine, Block, Fresh, Layout, Linear, Parameter, Role, Stored, Wiring};
pub use rotary::{Rotary, Scaling};
pub use settings::{Object, Settings, parse_object};

/// What is wrong with a model's `path` that is no directory. Names of the hub are not fetched.
pub fn no_such_model(path: &std::path::Path) -> &'static str {
    match path.exists() {
        true => {
            "it is a file; name the directory of a model, which holds config.json, model.safetensors and tokenizer.json"
        }
        false => {
            "there is no such model directory; check the path (a model of the Hugging Face hub is fetched before: \
             `hf download NAME --local-dir DIR`)"
        }
    }
}

/// Beyond any model.
const NUMBERS_MAX: f64 = 1e13;
/// More heads than a message looks through.
const HEADS_LISTED: usize = 512;

/// A causal language model: embedding, blocks of attention and a feed-forward network, head.
#[derive(Clone, Debug, PartialEq)]
pub struct Decoder {
    /// Rows of the embedding and of the head.
    pub vocab_size: usize,
    pub hidden_size: usize,
    /// Width of the embedding's rows. Where that is not `hidden_size`, a matrix without bias leads there, and another one back to the head.
    pub embedding_size: usize,
    pub layers: usize,
    /// The longest sequence that the model was made for.
    pub max_positions: usize,
    pub positions: Positions,
    pub norm: Norm,
    pub form: Form,
    /// A norm between the embedding and the first block.
    pub embedding_norm: bool,
    /// A norm between the last block and the head.
    pub final_norm: bool,
    pub attention: Attention,
    pub mlp: Mlp,
    /// The head is the embedding.
    pub tied: bool,
    pub head_bias: bool,
    pub init: Init,
}

/// How a token's place is told.
#[derive(Clone, Debug, PartialEq)]
pub enum Positions {
    /// Rows that are added to the embedding; the first token has the row of number `offset`.
    Learned { offset: usize },
    /// Queries and keys are turned.
    Rotary(Rotary),
    /// A slope per head times the distance is subtracted from the scores (Press et al. 2021).
    Alibi,
}

#[derive(Clone, Copy, Debug, PartialEq)]
pub struct Norm {
    pub kind: NormKind,
    pub eps: f64,
    /// Scale, and bias of a LayerNorm, are parameters.
    pub affine: bool,
}

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum NormKind {
    /// `x / sqrt(mean(x^2) + eps) * scale`.
    Rms,
    /// `(x - mean) / sqrt(var + eps) * scale + bias`.
    Layer,
}

/// Where a block's norms stand.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Form {
    /// `x += attention(norm(x)); x += mlp(norm(x))`.
    NormFirst,
    /// `x = norm(x + attention(x)); x = norm(x + mlp(x))`.
    NormLast,
    /// `x += attention(n) + mlp(n)` with `n = norm(x)`: one norm.
    Parallel,
}

#[derive(Clone, Debug, PartialEq)]
pub struct Attention {
    pub heads: usize,
    /// Divides `heads`.
    pub kv_heads: usize,
    pub head_dim: usize,
    /// Of queries, keys and values.
    pub qkv_bias: bool,
    pub out_bias: bool,
    /// The heads' queries and keys go through a norm of their own before they are turned.
    pub qk_norm: bool,
    /// For each layer, how many of the last tokens a token sees, itself included; all of them where there is no number.
    pub windows: Vec<Option<usize>>,
}

#[derive(Clone, Copy, Debug, PartialEq)]
pub struct Mlp {
    pub size: usize,
    pub activation: Activation,
    /// `down(activation(gate x) * up x)`, else `down(activation(up x))`.
    pub gated: bool,
    pub bias: bool,
}

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Activation {
    Silu,
    /// With the error function.
    Gelu,
    /// With the hyperbolic tangent, as GPT-2 has it.
    GeluTanh,
    Relu,
}

/// How fresh weights are drawn: normal, biases 0, norms' scales 1.
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct Init {
    pub std: f64,
    /// What is added to the residual stream begins smaller by the square root of how many such there are.
    pub scale_residual: bool,
}

impl Attention {
    /// Rows of queries, keys and values together.
    pub fn qkv_size(&self) -> usize {
        (self.heads + 2 * self.kv_heads) * self.head_dim
    }

    pub fn q_size(&self) -> usize {
        self.heads * self.head_dim
    }

    /// One slope per head for `Positions::Alibi`, as BLOOM has them where the heads are no power of two.
    pub fn alibi_slopes(&self) -> Vec<f32> {
        let heads = self.heads;
        let whole = if heads.is_power_of_two() { heads } else { heads.next_power_of_two() / 2 };
        let base = |count: usize| 2f64.powf(-8.0 / count as f64);
        let first = (1..=whole).map(|n| base(whole).powi(n as i32));
        let rest = (0..heads - whole).map(|n| base(2 * whole).powi(2 * n as i32 + 1));
        first.chain(rest).map(|slope| slope as f32).collect()
    }
}

impl Decoder {
    /// What executors rely on.
    pub fn check(&self) -> Result<(), String> {
        let a = &self.attention;
        if self.numbers() > NUMBERS_MAX {
            return Err(format!(
                "it describes {:.0e} parameters; fleet takes at most {NUMBERS_MAX:.0e}",
                self.numbers()
            ));
        }
        if a.kv_heads == 0 || !a.heads.is_multiple_of(a.kv_heads) {
            let fits: Vec<_> = (1..=a.heads.min(HEADS_LISTED))
                .filter(|n| a.heads.is_multiple_of(*n))
                .map(|n| n.to_string())
                .collect();
            return Err(format!(
                "num_attention_heads ({}) is not a multiple of num_key_value_heads ({}); choose one of {}",
                a.heads,
                a.kv_heads,
                fits.join(", ")
            ));
        }
        if let Positions::Rotary(rotary) = &self.positions
            && (!rotary.width.is_multiple_of(2) || rotary.width == 0 || rotary.width > a.head_dim)
        {
            return Err(format!(
                "rotary embeddings turn {} of head_dim = {} numbers; it has to be an even number of them",
                rotary.width, a.head_dim
            ));
        }
        Ok(())
    }

    /// About as many parameters; exact arithmetic would overflow where a configuration is nonsense.
    fn numbers(&self) -> f64 {
        let of = |n: usize| n as f64;
        let a = &self.attention;
        let head = of(a.head_dim);
        let attention = (of(a.heads) + 2.0 * of(a.kv_heads)) * head + of(a.heads) * head;
        let block = of(self.hidden_size) * (attention + 3.0 * of(self.mlp.size));
        let positions = match self.positions {
            Positions::Learned { .. } => of(self.max_positions) * of(self.hidden_size),
            _ => 0.0,
        };
        of(self.layers) * block + 2.0 * of(self.vocab_size) * of(self.embedding_size) + positions
    }

    /// Floating-point operations of a training step per token, in sequences of `seq` tokens: six per weight of a product, and the
    /// attention's own products where every token sees half of its sequence.
    pub fn flops_per_token(&self, seq: usize) -> f64 {
        let (a, h) = (&self.attention, self.hidden_size);
        let mlp = self.mlp.size * h * if self.mlp.gated { 3 } else { 2 };
        let block = h * a.qkv_size() + a.q_size() * h + mlp;
        let projections = if self.embedding_size == h { 0 } else { 2 * h * self.embedding_size };
        let products = self.layers * block + projections + self.vocab_size * self.embedding_size;
        6.0 * products as f64 + 6.0 * (self.layers * a.q_size()) as f64 * seq as f64
    }
}
