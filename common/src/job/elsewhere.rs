//! Names that other tools (transformers, TRL, axolotl, Lightning, DeepSpeed, nanoGPT, litgpt, Megatron) have for what fleet calls otherwise, always does, or
//! leaves out; those of the tools for fine-tuning are in `tuning.rs`.

mod tuning;

/// What to do instead of a key of another tool: as it stands, in whichever table, or with all of its table.
pub(super) fn instead(key: &str) -> Option<&'static str> {
    let name = key.rsplit('.').next().unwrap_or(key);
    let table = key.split('.').next().unwrap_or(key);
    let find = |name: &str| all_names().find(|(names, _)| names.contains(&name)).map(|(_, instead)| *instead);
    let begins =
        |name: &str| all_families().find(|(begin, _)| name.starts_with(begin)).map(|(_, instead)| *instead);
    [key, name, table].into_iter().find_map(find).or_else(|| [name, table].into_iter().find_map(begins))
}

/// The name of another tool that `key` is but for a letter or two, and what to do instead.
pub(super) fn misspelt(key: &str) -> Option<(&'static str, &'static str)> {
    let name = key.rsplit('.').next().unwrap_or(key).to_lowercase();
    let is_near =
        |known: &&&str| known.len() >= 6 && strsim::damerau_levenshtein(&name, known) <= known.len() / 6;
    all_names().find_map(|(names, instead)| Some((*names.iter().find(is_near)?, *instead)))
}

fn all_names() -> impl Iterator<Item = &'static (&'static [&'static str], &'static str)> {
    NAMES.iter().chain(tuning::NAMES)
}

fn all_families() -> impl Iterator<Item = &'static (&'static str, &'static str)> {
    FAMILIES.iter().chain(tuning::FAMILIES)
}

const RECORD: &str = "losses are kept in the cluster (`fleet runs show`) and printed by `fleet launch --json`; take the key out";
const PREPARED: &str = "the data are prepared on all cores before the first step; take the key out";
const HUB: &str =
    "checkpoints are Hugging Face directories below `output_dir`; upload one with the hub's own tool";
const SPREAD: &str = "`-n` of the command, or `devices`, says how many ranks there are, and `strategy` how they share the work";

const CLIPPED: &str = "gradients are clipped by their norm, to `max_grad_norm`; take the key out";
const SHARDED: &str = "write `strategy`: \"fsdp\" shards weights, gradients and optimizer state (full shard, ZeRO-3), with `reshard_after_forward` = false all but weights in use (ZeRO-2), \"hsdp\" within each host";
const ADAMW: &str = "the optimizer is AdamW; what it takes is in [optimizer], such as `optimizer.learning_rate`; take the key out";
const PACKED: &str = "nothing is padded: documents are packed into sequences of `max_seq_len` tokens, and rows share one where `data.packing` says so; take the key out";
const NOTHING: &str = "it has no meaning here; take the key out";

#[rustfmt::skip]
const NAMES: &[(&[&str], &str)] = &[
    (&["warmup_ratio"], "write `warmup_steps`, as a number of steps; left out it is 50, and at most a tenth of the run"),
    (&["num_warmup_steps", "warmup_iters", "lr_warmup_steps", "lr_warmup_iters"], "write `warmup_steps`"),
    (&["betas", "adam_betas"], "write `optimizer.beta1` and `optimizer.beta2`"),
    (&["label_smoothing_factor"], "the loss is the cross-entropy of the next token; take the key out"),
    (&["min_lr", "lr_min", "eta_min", "final_lr"], "write `min_lr_ratio`, the lowest rate as a share of `learning_rate`"),
    (&["global_batch_size", "total_batch_size", "effective_batch_size", "train_batch_size"],
        "write `batch_size`, the sequences of one rank, and `accumulate_grad_batches`: their product with the number of ranks is the global batch"),
    (&["gradient_accumulation_iters"], "write `accumulate_grad_batches`"),
    (&["n_embd", "n_embed", "d_model", "hidden_dim", "embed_dim"], "write `model.hidden_size`"),
    (&["n_head", "n_heads", "num_heads"], "write `model.num_attention_heads`"),
    (&["n_kv_head", "n_kv_heads", "n_query_groups", "num_query_groups"], "write `model.num_key_value_heads`"),
    (&["n_layer", "n_layers", "num_layers"], "write `model.num_hidden_layers`"),
    (&["n_inner", "d_ff", "ffn_dim", "ffn_hidden_size"], "write `model.intermediate_size`"),
    (&["n_positions", "n_ctx"], "write `model.max_position_embeddings`"),
    (&["padded_vocab_size", "padding_multiple", "make_vocab_size_divisible_by"], "write `vocab_size`"),
    (&["dropout", "dropout_rate", "hidden_dropout"], "it trains without dropout; take the key out"),
    (&["shuffle", "shuffle_dataset", "data_seed"], "the data are always shuffled, anew in every epoch, and `seed` says how; take the key out"),
    (&["eval_packing", "eval_sample_packing", "pad_to_sequence_len", "group_by_length", "train_sampling_strategy"], PACKED),
    (&["bf16", "bf16_full_eval", "fp16", "fp16_full_eval", "tf32", "half_precision_backend", "mixed_precision", "amp", "torch_dtype", "param_dtype", "reduce_dtype"],
        "write `precision`, which is \"32\", \"bf16-mixed\", \"16-mixed\" or \"bf16-true\""),
    (&["grad_scaler", "loss_scale", "initial_scale_power", "loss_scale_window"],
        "under `precision` = \"16-mixed\" losses are scaled as PyTorch's GradScaler does it; take the key out"),
    (&["nproc_per_node", "world_size", "gpus", "num_gpus", "num_processes"], SPREAD),
    (&["nnodes", "num_machines"], "write `num_nodes`, or give --nodes to `fleet submit`"),
    (&["node_rank", "machine_rank", "local_rank", "main_process_ip", "main_process_port", "master_addr", "master_port", "rdzv_endpoint"],
        "the cluster places the ranks and tells them of each other; take the key out"),
    (&["sharding_strategy", "zero_stage", "zero_optimization", "fsdp_sharding_strategy", "fsdp_version"], SHARDED),
    (&["cpu_offload", "offload_params", "offload_optimizer_device", "offload_param_device", "fsdp_offload_params"],
        "write `offload_optimizer`, which keeps optimizer state and master weights in the memory of the host"),
    (&["use_orig_params", "limit_all_gathers", "cpu_ram_efficient_loading", "backward_prefetch", "forward_prefetch", "auto_wrap_policy", "sync_module_states"],
        "units are blocks, the next one is gathered while one is computed, and each rank reads just its part; take the key out"),
    (&["find_unused_parameters", "static_graph", "bucket_cap_mb", "gradient_as_bucket_view", "no_sync", "sync_batchnorm"],
        "gradients are reduced block by block during backward, after the last micro-batch of a step, and parameters without any are named; take the key out"),
    (&["ddp_timeout", "timeout"], "a gang ends when a rank dies or stands still for 15 minutes, and names it; take the key out"),
    (&["nccl", "gloo", "dist_backend", "ddp_backend"], "ranks exchange through shared memory, TCP or QUIC, and NCCL on CUDA; `transport` chooses between nodes"),
    (&["deterministic", "cudnn_deterministic", "full_determinism"], "a run with as many ranks gives the same bits again on the CPU; take the key out"),
    (&["report_to", "logging_dir", "logger", "log_level", "use_wandb", "use_tensorboard"], RECORD),
    (&["max_length", "sequence_len", "seq_len", "seq_length", "block_size", "cutoff_len", "context_length"], "write `max_seq_len`"),
    (&["micro_batch_size", "per_gpu_train_batch_size"], "write `batch_size`, the sequences of one rank"),
    (&["per_gpu_eval_batch_size"], "write `eval.batch_size`"),
    (&["model_name_or_path", "base_model", "model_id", "pretrained_model_name_or_path"], "write `model.path`, a Hugging Face directory on this machine"),
    (&["tokenizer_name", "tokenizer_name_or_path", "tokenizer_config"], "write `tokenizer.path`, a tokenizer.json on this machine"),
    (&["dataset_text_field", "text_column", "text_column_name"], "write `data.text_field`"),
    (&["dataset", "datasets", "dataset_path", "data_files", "train_file", "train_files", "train_data"], "write `data.path`, a file, a folder or a list of them"),
    (&["val_set_size", "validation_split_percentage", "test_size", "validation_file", "eval_dataset", "test_datasets"],
        "write `data.validation_fraction`, the share of the documents that is held out"),
    (&["optim", "optimizer_type", "optimizer_name", "optim_args", "optim_target_modules", "optimizer.type", "optimizer.name", "optimizer.class_path",
        "optimizer.params", "optimizer.fused"], ADAMW),
    (&["lr_scheduler", "scheduler", "lr_scheduler_kwargs", "cosine_min_lr_ratio"], "write `optimizer.schedule`, which is \"cosine\", \"linear\" or \"constant\", and `min_lr_ratio`"),
    (&["decay_lr", "lr_decay_style"], "write `optimizer.schedule`, which is \"cosine\", \"linear\" or \"constant\""),
    (&["lr_decay_iters", "lr_decay_steps"], "the rate falls until the run's end, which `max_steps` or `epochs` says; take the key out"),
    (&["gradient_clip_val", "gradient_clipping", "grad_clip", "clip_grad", "clip_grad_norm", "max_norm"], "write `max_grad_norm`"),
    (&["max_epochs", "n_epochs"], "write `epochs`"),
    (&["max_train_steps", "num_train_steps", "train_steps", "max_iters", "train_iters"], "write `max_steps`"),
    (&["max_train_samples", "max_samples", "limit_train_batches", "max_tokens"], "`max_steps` ends a run early; take the key out"),
    (&["max_eval_samples", "limit_val_batches", "eval_iters"], "write `max_eval_examples`"),
    (&["eval_strategy", "evaluation_strategy", "do_eval", "eval_on_start", "evals_per_epoch", "val_check_interval", "check_val_every_n_epoch", "eval_delay",
        "eval_interval", "eval_every"],
        "write `eval_steps`, where 0 is never"),
    (&["save_strategy", "saves_per_epoch", "save_only_model", "save_safetensors", "enable_checkpointing", "save_interval",
        "save_every", "checkpoint_interval", "always_save_checkpoint", "every_n_train_steps"],
        "write `save_steps`, where 0 is at the end alone; a checkpoint has all that a run needs to go on, in safetensors"),
    (&["logging_strategy", "log_every_n_steps", "logging_first_step", "log_interval", "log_every"], "write `logging_steps`; the first step is always told"),
    (&["save_top_k", "save_last", "keep_last"], "write `save_total_limit`, how many of the newest checkpoints are kept"),
    (&["greater_is_better"], "of a loss the lowest is the best; take the key out"),
    (&["gradient_checkpointing_kwargs", "attn_implementation", "flash_attention", "xformers_attention", "use_liger_kernel"],
        "there is one way to compute, and nothing to choose; take the key out"),
    (&["num_workers", "dataset_num_proc", "preprocessing_num_workers", "dataset_prepared_path", "overwrite_cache"], PREPARED),
    (&["deepspeed", "fsdp", "accelerator_config", "tensor_model_parallel_size",
        "pipeline_model_parallel_size"], SPREAD),
    (&["push_to_hub"], HUB),
    (&["use_cpu", "no_cuda", "use_mps_device", "accelerator"], "write `device`"),
    (&["do_train", "do_predict", "remove_unused_columns", "disable_tqdm", "label_names", "past_index", "torch_empty_cache_steps", "skip_memory_metrics",
        "prediction_loss_only", "include_for_metrics", "include_inputs_for_metrics", "include_num_input_tokens_seen", "include_tokens_per_second",
        "log_on_each_node", "save_on_each_node", "ignore_data_skip", "length_column_name", "batch_eval_metrics", "jit_mode_eval", "debug", "tpu_num_cores",
        "eval_accumulation_steps", "callbacks", "plugins", "barebones", "benchmark", "inference_mode", "use_distributed_sampler",
        "reload_dataloaders_every_n_epochs", "enable_progress_bar", "enable_model_summary", "prescale_gradients", "gradient_predivide_factor",
        "communication_data_type", "sparse_gradients", "zero_allow_untested_optimizer", "zero_force_ds_cpu_optimizer", "data_efficiency", "aio",
        "dump_state"],
        NOTHING),
    (&["average_tokens_across_devices"], "every token counts alike, on whichever rank it is; take the key out"),
    (&["auto_find_batch_size"], "write `batch_size`; `fleet plan` tells what fits"),
    (&["padding_free", "packing_strategy", "dataset_kwargs"], PACKED),
    (&["model_init_kwargs"], "a model is read as it lies at `model.path`; take the key out"),
    (&["eos_token", "pad_token"], "the tokenizer says so, which is that of the model or of `tokenizer.path`; take the key out"),
    (&["activation_offloading"], "write `activation_checkpointing`"),
    (&["loss_type"], "write `dpo.loss_type` for preferences; the loss of others is the cross-entropy of the next token"),
    (&["ckpt_path", "resume_from", "load_checkpoint"], "write `resume_from_checkpoint`, \"latest\" or the directory of a checkpoint"),
    (&["min_epochs", "min_steps"], "a run ends after `epochs` or `max_steps`, and not before; take the key out"),
    (&["gradient_clip_algorithm"], CLIPPED),
    (&["limit_test_batches", "fast_dev_run", "overfit_batches"], "`max_steps` ends a run early; take the key out"),
    (&["num_sanity_val_steps"], "a run evaluates before its first step; take the key out"),
    (&["default_root_dir"], "write `output_dir`"),
    (&["trainer"], "its settings stand at the top of a job file: `max_steps`, `devices`, `precision` and the like; take the table out"),
    (&["profiler", "flops_profiler", "wall_clock_breakdown", "memory_breakdown", "comms_logger"],
        "where the time goes is always told; write `trace` for each rank's timeline"),
    (&["detect_anomaly", "logging_nan_inf_filter"], "what is NaN or infinite is found in every step, and named; take the key out"),
    (&["max_time"], "write `max_time_s`, in seconds"),
    (&["train_micro_batch_size_per_gpu"], "write `batch_size`, the sequences of one rank"),
    (&["steps_per_print"], "write `logging_steps`"),
    (&["tensorboard", "csv_monitor"], RECORD),
    (&["mask_history", "roles_to_train", "train_on_eos"], "`data.loss_on` says which tokens are learnt: every turn of the assistant with its end, or all; take the key out"),
];

/// By how they begin.
#[rustfmt::skip]
const FAMILIES: &[(&str, &str)] = &[
    ("wandb_", RECORD), ("mlflow_", RECORD), ("hub_", HUB), ("dataloader_", PREPARED), ("fsdp_", SPREAD), ("ddp_", SPREAD),
    ("torch_compile", "there is one way to compute, and nothing to choose; take the key out"),
];

#[cfg(test)]
mod tests {
    use super::*;

    /// As they stand in the files of these tools, at the top or in a table, and what the line must say.
    #[rustfmt::skip]
    const COMMON: &[(&str, &str)] = &[
        // transformers
        ("optim", "AdamW"), ("warmup_ratio", "`warmup_steps`"), ("bf16", "`precision`"), ("fp16", "`precision`"), ("tf32", "`precision`"),
        ("report_to", "take the key out"), ("eval_strategy", "`eval_steps`"), ("save_strategy", "`save_steps`"), ("logging_strategy", "`logging_steps`"),
        ("dataloader_num_workers", "take the key out"), ("ddp_find_unused_parameters", "`strategy`"),
        ("push_to_hub", "take the key out|upload"), ("group_by_length", "`max_seq_len`"), ("auto_find_batch_size", "`batch_size`"),
        ("eval_accumulation_steps", "take the key out"), ("torch_compile", "take the key out"),
        ("deepspeed", "`strategy`"), ("fsdp_config", "`strategy`"), ("use_cpu", "`device`"),
        // TRL
        ("max_length", "`max_seq_len`"), ("padding_free", "nothing is padded"), ("roles_to_train", "`data.loss_on`"), ("dataset_text_field", "`data.text_field`"),
        ("eos_token", "`tokenizer.path`"), ("model_init_kwargs", "`model.path`"), ("loss_type", "cross-entropy"), ("activation_offloading", "`activation_checkpointing`"),
        // PEFT, bitsandbytes, Unsloth
        ("bnb_4bit_compute_dtype", "`precision`"), ("bnb_4bit_use_double_quant", "`quantization`"), ("device_map", "take the key out"),
        ("full_finetuning", "`adapter.type`"), ("use_gradient_checkpointing", "`activation_checkpointing`"), ("random_state", "`seed`"), ("fan_in_fan_out", "take the key out"),
        ("loftq_config", "`adapter.init`"), ("max_prompt_length", "`max_seq_len`"), ("truncation_mode", "`max_seq_len`"), ("response_template", "`data.loss_on`"),
        ("rpo_alpha", "`dpo.loss_type`"), ("desirable_weight", "KTO"), ("sync_ref_model", "`dpo.ref_model`"), ("padding_value", "`data.packing`"),
        // axolotl
        ("base_model", "`model.path`"), ("sequence_len", "`max_seq_len`"), ("micro_batch_size", "`batch_size`"), ("val_set_size", "`data.validation_fraction`"),
        ("datasets", "`data.path`"), ("rl", "`task_name`"), ("rl_beta", "`dpo.beta`"), ("lora_target_linear", "\"all-linear\""), ("lora_model_dir", "`adapter.path`"),
        ("peft_use_dora", "`adapter.use_dora`"), ("special_tokens", "`tokenizer.path`"), ("trust_remote_code", "take the key out"), ("strict", "take the key out"),
        ("tokenizer_type", "`tokenizer.path`"), ("default_system_message", "`data.fields.system`"), ("excess_length_strategy", "`max_seq_len`"),
        ("eval_batch_size", "`eval.batch_size`"), ("noisy_embedding_alpha", "`neftune_noise_alpha`"), ("liger_rope", "take the key out"), ("sdp_attention", "take the key out"),
        ("chat_template_jinja", "`data.chat_template`"), ("loss_watchdog_patience", "`early_stopping.patience`"),
        // LLaMA-Factory
        ("stage", "`task_name`"), ("finetuning_type", "`adapter.type`"), ("template", "`data.chat_template`"), ("cutoff_len", "`max_seq_len`"), ("dataset_dir", "`data.path`"),
        ("val_size", "`data.validation_fraction`"), ("quantization_bit", "`quantization`"), ("pref_beta", "`dpo.beta`"), ("pref_loss", "`dpo.loss_type`"),
        ("flash_attn", "take the key out"), ("plot_loss", "take the key out"), ("additional_target", "`adapter.modules_to_save`"), ("neat_packing", "`data.packing`"),
        ("resize_vocab", "take the key out"), ("interleave_probs", "`data.weights`"), ("pure_bf16", "`precision`"), ("galore_rank", "AdamW"),
        ("model_type", "`model.model_type`"), ("rope_scaling", "config.json"),
        // Lightning
        ("max_epochs", "`epochs`"), ("min_steps", "take the key out"), ("trainer", "`max_steps`"), ("accelerator", "`device`"),
        ("gradient_clip_val", "`max_grad_norm`"), ("limit_val_batches", "`max_eval_examples`"), ("fast_dev_run", "`max_steps`"),
        ("log_every_n_steps", "`logging_steps`"), ("default_root_dir", "`output_dir`"), ("callbacks", "take the key out"), ("profiler", "`trace`"),
        ("ckpt_path", "`resume_from_checkpoint`"), ("max_time", "`max_time_s`"),
        // DeepSpeed
        ("train_micro_batch_size_per_gpu", "`batch_size`"), ("zero_optimization.stage", "`strategy`"), ("fp16.enabled", "`precision`"),
        ("bf16.enabled", "`precision`"), ("gradient_clipping", "`max_grad_norm`"), ("optimizer.type", "AdamW"), ("optimizer.params.lr", "AdamW"),
        ("scheduler.type", "`optimizer.schedule`"), ("steps_per_print", "`logging_steps`"), ("wall_clock_breakdown", "`trace`"),
    ];

    #[test]
    fn keys_of_the_large_trainers_lead_to_fleets_or_are_said_to_be_for_nothing() {
        for (key, wanted) in COMMON {
            let line = super::super::tests::error(&format!("{key} = 1"));
            let says = wanted.split('|').any(|wanted| line.contains(wanted));
            assert!(line.contains("is a key of other tools") && says, "{key}: {line}");
        }
    }

    #[test]
    fn what_the_small_trainers_call_otherwise_is_known() {
        let names = [
            ("min_lr", "min_lr_ratio"),
            ("dropout", "without dropout"),
            ("log_interval", "logging_steps"),
            ("eval_interval", "eval_steps"),
            ("model.n_head", "model.num_attention_heads"),
            ("n_layer", "model.num_hidden_layers"),
            ("n_embd", "model.hidden_size"),
            ("block_size", "max_seq_len"),
            ("global_batch_size", "accumulate_grad_batches"),
            ("train.max_norm", "max_grad_norm"),
        ];
        for (name, wanted) in names {
            assert!(instead(name).is_some_and(|text| text.contains(wanted)), "{name}: {:?}", instead(name));
        }
    }

    #[test]
    fn no_key_of_fleets_is_called_anothers_and_every_key_that_is_named_exists() {
        let known: Vec<&str> = super::super::keys().collect();
        for key in &known {
            // A family may begin like one of ours, which is never looked for here.
            assert!(!all_names().any(|(names, _)| names.contains(key)), "{key}");
        }
        let mut names: Vec<&str> = all_names().flat_map(|(names, _)| names.iter().copied()).collect();
        let all = names.len();
        names.sort_unstable();
        names.dedup();
        assert_eq!(names.len(), all, "no name stands twice");
        let texts = all_names().map(|(_, text)| *text).chain(all_families().map(|(_, text)| *text));
        let named = texts.flat_map(|instead| instead.split('`').skip(1).step_by(2));
        let named = named.filter(|name| !name.starts_with("fleet ") && !name.starts_with('-'));
        let unknown: Vec<&str> = named.filter(|name| !known.contains(name)).collect();
        assert_eq!(unknown, [""; 0]);
    }
}
