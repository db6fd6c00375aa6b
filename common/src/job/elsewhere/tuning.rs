//! Names that the tools for fine-tuning (TRL, PEFT, bitsandbytes, axolotl, LLaMA-Factory, Unsloth) have.

const ONE_WAY: &str = "there is one way to compute, and nothing to choose; take the key out";
const ADAMW: &str = "the optimizer is AdamW; what it takes is in [optimizer], such as `optimizer.learning_rate`; take the key out";
const NOTHING: &str = "it has no meaning here; take the key out";
const PREPARED: &str =
    "the data are prepared on all cores, in little memory, before the first step; take the key out";
const TASK: &str =
    "write `task_name`: \"sft\" learns rows of instructions, \"dpo\", \"ipo\" and \"orpo\" preferences";
const ADAPTER: &str = "write `adapter.type` = \"lora\" or \"dora\"; without one the whole model is trained";
const QUANTIZED: &str = "write `quantization`, such as \"nf4\" or \"int8\"; scales of four bits have eight bits themselves (double quantisation)";
const EMBEDDINGS: &str = "the vocabulary stays as it is in the model; add tokens to model and tokenizer before, or take the key out";
const TOKENS: &str = "the tokenizer says which tokens are special, and it is that of the model or of `tokenizer.path`; take the key out";
const TOKENIZER: &str = "the model's tokenizer.json is read, or that of `tokenizer.path`; take the key out";
const SYSTEM: &str = "a system's text is in the rows, in the field that `data.fields.system` names, or in the chat template; take the key out";
const TEMPLATE: &str =
    "write `data.chat_template`, the name of a template or a .jinja file; left out it is the model's own";
const CUT: &str = "rows are cut at `max_seq_len` tokens, prompt and answer together, from their beginning on; take the key out";
const UNKNOWN_LOSS: &str =
    "the losses of preferences are those of `dpo.loss_type`, and it has none with this; take the key out";
const KTO: &str = "rows with a label for each answer (KTO) are not learnt; take the key out, and write `task_name` = \"dpo\" for pairs";
const REFERENCE: &str = "the reference is the model as training begins, or `dpo.ref_model`; take the key out";
const LOCAL: &str =
    "a model is a directory on this machine, and no program of its own is run; take the key out";
const NO_LAYERS: &str = "what is trained is said in [adapter], such as `adapter.target_modules` and `adapter.layers_to_transform`, or it is the whole model; take the key out";
const NO_ADAPTER_KIND: &str =
    "an adapter is LoRA or DoRA, and its `adapter.init` \"default\" or \"gaussian\"; take the key out";
const SEEN: &str = "losses and accuracies are told with every evaluation; take the key out";

#[rustfmt::skip]
pub(super) const NAMES: &[(&[&str], &str)] = &[
    (&["stage", "rl", "training_type"], TASK),
    (&["finetuning_type", "full_finetuning"], ADAPTER),
    (&["adapter_folder", "lora_model_dir", "create_new_adapter"], "write `adapter.path`, the directory of an adapter from which training goes on"),
    (&["lora_target_linear"], "write `adapter.target_modules` = \"all-linear\""),
    (&["additional_target"], "write `adapter.modules_to_save`"),
    (&["peft_use_dora"], "write `adapter.use_dora`"),
    (&["peft_use_rslora"], "write `adapter.use_rslora`"),
    (&["peft_layers_to_transform"], "write `adapter.layers_to_transform`"),
    (&["lora_bias"], "write `adapter.bias`"),
    (&["lora_task_type"], "write `adapter.task_type`"),
    (&["lora_fan_in_fan_out", "fan_in_fan_out", "auto_mapping", "base_model_name_or_path", "revision_of_model", "peft_version", "runtime_config", "qalora_group_size",
        "use_qalora", "ensure_weight_tying", "megatron_config", "megatron_core", "max_lora_rank"], "how the model has its weights is known; take the key out"),
    (&["pissa_init", "loftq_config", "eva_config", "corda_config", "arrow_config", "lora_ga_config", "layer_replication", "alora_invocation_tokens", "relora_steps",
        "use_llama_pro", "trainable_token_indices", "target_parameters", "lora_target_parameters", "loraplus_lr_embedding"], NO_ADAPTER_KIND),
    (&["layers_pattern", "freeze_trainable_layers", "freeze_trainable_modules", "unfrozen_parameters", "freeze_vision_tower"], NO_LAYERS),

    (&["bnb_4bit_use_double_quant", "use_bnb_nested_quant", "double_quantization", "bnb_4bit_quant_storage", "quantization_bit", "quantization_method", "quantization_type",
        "quantization_config", "bnb_config", "quant_method", "llm_int8_threshold", "llm_int8_skip_modules", "llm_int8_enable_fp32_cpu_offload",
        "llm_int8_has_fp16_weight", "gptq", "use_hqq"], QUANTIZED),
    (&["bnb_4bit_compute_dtype", "pure_bf16", "upcast_layernorm"], "write `precision`, which is \"32\", \"bf16-mixed\", \"16-mixed\" or \"bf16-true\""),
    (&["ref_model_quantization_bit", "reward_model_quantization_bit"], REFERENCE),

    (&["template", "chat_template_jinja"], TEMPLATE),
    (&["tool_format", "enable_thinking", "chat_template_kwargs"], "what a template wants beside messages is in the rows, in their field chat_template_kwargs; take the key out"),
    (&["default_system", "default_system_message"], SYSTEM),
    (&["response_template", "instruction_template", "train_on_responses_only"], "write `data.loss_on`; where an answer begins is found by the chat template"),
    (&["formatting_func"], "write `data.format` and [data.fields], which say what the rows are"),
    (&["max_prompt_length", "max_completion_length", "max_target_length", "truncation_mode", "excess_length_strategy", "truncation_side"], CUT),
    (&["min_sample_len"], "short rows are learnt as others are; take the key out"),
    (&["special_tokens", "tokens", "new_special_tokens", "added_tokens_overrides", "bos_token", "split_special_tokens"], TOKENS),
    (&["resize_vocab", "resize_token_embeddings", "resize_token_embeddings_to_32x"], EMBEDDINGS),
    (&["tokenizer_type", "tokenizer_use_fast", "tokenizer_legacy", "use_fast_tokenizer", "processing_class"], TOKENIZER),
    (&["trust_remote_code", "model_revision", "revision", "cache_dir", "low_cpu_mem_usage", "device_map", "max_memory", "use_cache", "base_model_config", "strict", "is_falcon_derived_model",
        "is_llama_derived_model", "infer_backend", "fast_inference", "gpu_memory_utilization"], LOCAL),
    (&["model_type"], "a model's own config.json says what it is; a new one is described in [model], with `model.model_type`"),

    (&["dataset_dir", "train_dataset", "dataset_config", "dataset_train_split", "tokenized_path"], "write `data.path`, a file, a folder or a list of them"),
    (&["dataset_test_split", "val_size", "eval_split_ratio"], "write `data.validation_fraction`, the share of the documents that is held out"),
    (&["interleave_probs", "mix_strategy"], "write `data.weights`: how often each path of `data.path` is seen in an epoch"),
    (&["streaming", "dataset_streaming", "buffer_size", "dataset_processes", "dataset_keep_in_memory", "dataset_shard_num", "skip_prepare_dataset"], PREPARED),
    (&["dataset_exact_deduplication"], "write `data.clean.near_duplicates`; 1 leaves out what has the same words"),
    (&["shuffle_merged_datasets", "disable_shuffling", "push_dataset_to_hub"], "the data are shuffled, anew in every epoch, and `seed` says how; take the key out"),
    (&["random_state"], "write `seed`"),
    (&["neat_packing", "sample_packing_group_size", "sample_packing_bin_size", "pad_to_multiple_of", "padding_value", "label_pad_token_id", "num_of_sequences", "chars_per_token"],
        "write `data.packing`; nothing is padded, and no row sees another one of its sequence"),

    (&["rl_beta", "pref_beta"], "write `dpo.beta`"),
    (&["pref_loss"], "write `dpo.loss_type`"),
    (&["dpo_label_smoothing"], "write `dpo.label_smoothing`"),
    (&["orpo_alpha"], "write `dpo.beta`, with `dpo.loss_type` = \"orpo\""),
    (&["pref_ftx", "simpo_gamma", "gamma_beta_ratio", "cpo_alpha", "rpo_alpha", "ld_alpha", "discopop_tau", "f_divergence_type", "f_alpha_divergence_coef", "beta_dpo", "use_weighting",
        "dpo_use_weighting", "reference_free", "loss_weights", "pref_bco_weight"], UNKNOWN_LOSS),
    (&["kto_chosen_weight", "kto_rejected_weight", "kto_desirable_weight", "kto_undesirable_weight", "desirable_weight", "undesirable_weight"], KTO),
    (&["force_use_ref_model", "sync_ref_model", "ref_model_mixup_alpha", "ref_model_sync_steps", "model_adapter_name", "ref_adapter_name", "ref_adapters", "ref_model_adapters",
        "precompute_ref_batch_size", "reward_model", "is_encoder_decoder", "disable_dropout"], REFERENCE),
    (&["generate_during_eval", "predict_with_generate", "eval_num_beams", "compute_accuracy", "plot_loss", "print_param_status", "use_swanlab", "log_level_replica"], SEEN),

    (&["flash_attn", "flash_optimum", "sdp_attention", "s2_attention", "shift_attn", "eager_attention", "sage_attention", "flex_attention", "use_unsloth", "enable_liger_kernel",
        "liger_kernel_config"], ONE_WAY),
    (&["rope_scaling"], "a model's own config.json says how its positions turn, and a new one is described in [model]; take the key out"),
    (&["use_gradient_checkpointing", "use_unsloth_gc", "disable_gradient_checkpointing", "gradient_checkpointing_offload"], "write `activation_checkpointing`"),
    (&["use_adam_mini", "use_badam", "use_galore", "use_apollo", "use_muon"], ADAMW),
    (&["lr_quadratic_warmup", "cosine_constant_lr_ratio"], "write `optimizer.schedule`, which is \"cosine\", \"linear\" or \"constant\", and `warmup_steps`"),
    (&["noisy_embedding_alpha"], "write `neftune_noise_alpha`"),
    (&["eval_batch_size"], "write `eval.batch_size`"),
    (&["auto_resume_from_checkpoints"], "write `resume_from_checkpoint` = \"latest\""),
    (&["loss_watchdog_threshold", "loss_watchdog_patience"], "write `early_stopping.patience`; a loss that is NaN or infinite is found and named"),
    (&["sequence_parallel_degree", "context_parallel_size", "tensor_parallel_size", "parallelism_config"], "a sequence is computed by one rank; `strategy` says how ranks share the work"),
    (&["export_size", "enable_jit_checkpoint", "restore_callback_states_from_checkpoint"], "a checkpoint is a directory as Hugging Face has it, and a run goes on from it whole; take the key out"),
    (&["include_effective_tokens_per_second", "eval_do_concat_batches", "eval_use_gather_object", "ignore_bias_buffers", "router_aux_loss_coef", "ray_run_name", "project",
        "trackio_space_id", "trackio_bucket_id", "trackio_static_space_id", "image_max_pixels", "image_min_pixels", "media_dir", "crop_ratio"], NOTHING),
];

/// By how they begin.
pub(super) const FAMILIES: &[(&str, &str)] =
    &[("galore_", ADAMW), ("badam_", ADAMW), ("liger_", ONE_WAY), ("ray_", NOTHING)];
