//! CUDA sources. They are compiled where they run; here they are text.

/// Cross-entropy, SwiGLU and rotary embedding, for elements of type `ELEMENT`, which is to be defined as `float` or `bf16`.
pub const FUSED: &str = include_str!("../cuda/fused.cu");
