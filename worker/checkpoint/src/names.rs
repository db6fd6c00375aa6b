//! The files of a checkpoint with several writers, and who writes what.

/// The weights of an adapter, as PEFT names them.
pub const ADAPTER_FILE: &str = "adapter_model.safetensors";
/// Weights, in Hugging Face's names.
pub const MODEL_FILE: &str = "model.safetensors";
/// Which file has which weight, where there are several.
pub const MODEL_INDEX_FILE: &str = "model.safetensors.index.json";
pub const CONFIG_FILE: &str = "config.json";
pub const TOKENIZER_FILE: &str = "tokenizer.json";
pub const OPTIMIZER_FILE: &str = "optimizer.safetensors";
pub const STATE_FILE: &str = "trainer_state.json";
pub const MANIFEST_FILE: &str = "manifest.json";

/// File number `number`, from 0, of `of` with weights.
pub fn model_file(number: usize, of: usize) -> String {
    numbered("model", number, of)
}

/// The optimizer state that rank `rank` of `world` keeps.
pub fn optimizer_file(rank: usize, world: usize) -> String {
    numbered("optimizer", rank, world)
}

fn numbered(stem: &str, number: usize, of: usize) -> String {
    match of {
        1 => format!("{stem}.safetensors"),
        _ => format!("{stem}-{:05}-of-{of:05}.safetensors", number + 1),
    }
}

/// Whether a file has weights, one of several.
pub(crate) fn is_shard_of_model(file: &str) -> bool {
    file.starts_with("model-")
}

/// Whether a file has weights.
pub(crate) fn is_of_model(file: &str) -> bool {
    file == MODEL_FILE || is_shard_of_model(file)
}

/// Whether a file has the optimizer's state.
pub(crate) fn is_of_optimizer(file: &str) -> bool {
    file == OPTIMIZER_FILE || file.starts_with("optimizer-")
}

/// For each tensor, of these sizes, the rank that writes it: the largest first, each to who has least so far. Of `world` ranks the first have
/// some where there are fewer tensors than ranks.
pub fn writers(sizes: &[usize], world: usize) -> Vec<usize> {
    let mut order: Vec<usize> = (0..sizes.len()).collect();
    order.sort_by_key(|at| std::cmp::Reverse(sizes[*at]));
    let mut load = vec![0usize; world];
    let mut writers = vec![0; sizes.len()];
    for at in order {
        let rank = (0..world).min_by_key(|rank| load[*rank]).unwrap_or(0);
        writers[at] = rank;
        load[rank] += sizes[at].max(1);
    }
    writers
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    proptest! {
        #[test]
        fn nobody_writes_much_more_than_a_fair_share(sizes in proptest::collection::vec(1usize..1000, 1..50), world in 1usize..9) {
            let mut load = vec![0; world];
            writers(&sizes, world).iter().zip(&sizes).for_each(|(rank, size)| load[*rank] += size);
            let (all, largest) = (sizes.iter().sum::<usize>(), *sizes.iter().max().unwrap());
            prop_assert!(*load.iter().max().unwrap() <= all.div_ceil(world) + largest);
            prop_assert!(load.iter().take(sizes.len()).all(|load| *load > 0));
        }
    }

    #[test]
    fn files_have_the_names_that_transformers_gives_them() {
        assert_eq!(
            (model_file(0, 1), model_file(1, 4)),
            (MODEL_FILE.into(), "model-00002-of-00004.safetensors".into())
        );
        assert!(
            is_of_model(&model_file(0, 1))
                && is_of_model(&model_file(3, 4))
                && !is_of_model(&optimizer_file(0, 2))
        );
    }
}
