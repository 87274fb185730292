"""axolotl's recipes: its keys, what several decide together, and its own defaults."""

from __future__ import annotations

from typing import Any

from lorafit.init.peers import read
from lorafit.init.peers import transformers as shared
from lorafit.init.peers.axolotl_data import DATASET_RULES, set_template, sources
from lorafit.init.peers.convert import Conversion, Rules, becomes, decides, idle, lost, refused, table

TITLE = "axolotl"
NAMED = "base_model"
MARKS: tuple[str, ...] = ("base_model", "micro_batch_size", "sequence_len", "adapter", "val_set_size", "sample_packing")
"""Keys by which a recipe is known to be axolotl's."""

_OTHER_LOSS = "only supervised fine-tuning is converted; recipes/dpo.yaml learns from pairs"
_LAYERS = "which weights are trained would be others"

RULES: Rules = table(
    becomes("base_model", "model.name_or_path", read.text),
    becomes("revision_of_model", "model.revision", read.text),
    decides("bf16 fp16 bfloat16 float16 float32", "model.dtype"),
    decides(
        "flash_attention sdp_attention eager_attention attn_implementation xformers_attention flex_attention",
        "model.attn_implementation",
    ),
    decides("chat_template chat_template_jinja", "model.chat_template"),
    decides("load_in_4bit load_in_8bit", "quantization"),
    decides("adapter", "lora, quantization"),
    becomes("lora_r", "lora.r", read.count),
    decides("lora_target_modules lora_target_linear", "lora.target_modules"),
    becomes("lora_modules_to_save", "lora.modules_to_save", read.names),
    becomes("peft_layers_to_transform", "lora.layers_to_transform", read.indices),
    becomes("peft_use_dora", "lora.use_dora", read.flag),
    becomes("peft_use_rslora", "lora.use_rslora", read.flag),
    decides("peft_init_lora_weights", "lora.init_lora_weights"),
    becomes("loraplus_lr_ratio", "lora.loraplus_lr_ratio", read.above_zero),
    decides("datasets", "dataset.train"),
    decides("test_datasets val_set_size", "dataset.validation"),
    decides("train_on_inputs", "dataset.loss_on"),
    becomes("min_sample_len", "dataset.min_length", read.count),
    decides("excess_length_strategy", "dataset.excess_length_strategy"),
    becomes("sequence_len", "training.max_length", read.count),
    becomes("sample_packing", "training.packing", read.flag),
    decides("num_epochs max_steps", "training.num_train_epochs, training.max_steps"),
    becomes("micro_batch_size", "training.per_device_train_batch_size", read.count),
    decides("gradient_accumulation_steps batch_size", "training.gradient_accumulation_steps"),
    becomes("eval_batch_size", "training.per_device_eval_batch_size", read.count),
    decides("lr_scheduler cosine_min_lr_ratio", "training.lr_scheduler_type"),
    decides("optimizer", "training.optim"),
    decides("noisy_embedding_alpha", "training.neftune_noise_alpha"),
    decides("gradient_checkpointing", "training.gradient_checkpointing"),
    decides("group_by_length", "training.train_sampling_strategy"),
    decides("logging_steps", "training.logging_steps"),
    decides(
        "eval_strategy evaluation_strategy eval_steps evals_per_epoch",
        "training.eval_strategy, training.eval_steps, training.evals_per_epoch",
    ),
    decides(
        "save_strategy save_steps saves_per_epoch",
        "training.save_strategy, training.save_steps, training.saves_per_epoch",
    ),
    becomes("early_stopping_patience", "training.early_stopping_patience", read.whole),
    decides(
        "wandb_project wandb_mode use_wandb use_tensorboard use_mlflow mlflow_experiment_name use_comet",
        "training.report_to",
    ),
    shared.COMMON,
    DATASET_RULES,
    refused("rl reward_model process_reward_model", _OTHER_LOSS),
    refused("pretraining_dataset", "lorafit does no pretraining; name the rows as datasets of type completion"),
    refused("processor_type is_multimodal image_size image_resize_algorithm", "lorafit trains on text only"),
    becomes("lora_model_dir", "start_from", read.text),
    refused("relora relora_* jagged_restart_*", "lorafit has no ReLoRA"),
    refused("unfrozen_parameters lisa_* peft_layer_replication", _LAYERS),
    refused("gptq", "lorafit trains on no GPTQ model; name the model that it was made from"),
    refused("trust_remote_code_dataset kd_trainer diffusion qat", _OTHER_LOSS),
    idle(
        "base_model_config model_type tokenizer_type tokenizer_use_fast tokenizer_use_mistral_common "
        "is_falcon_derived_model is_llama_derived_model is_mistral_derived_model is_qwen_derived_model",
        "transformers tells from the model",
    ),
    idle(
        "strict dataset_prepared_path dataset_processes dataset_num_proc dataset_keep_in_memory dataset_shard_num "
        "debug xformers_optimized pad_to_sequence_len eval_sample_packing batch_flattening sample_packing_* "
        "gradient_checkpointing_kwargs torch_compile torch_compile_backend torch_compile_mode lora_mlp_kernel "
        "lora_qkv_kernel lora_o_kernel unsloth_* liger_* cut_cross_entropy flash_attn_* dataloader_pin_memory "
        "dataloader_prefetch_factor save_safetensors save_only_model local_rank low_cpu_mem_usage device_map device "
        "max_memory gpu_memory_limit ddp ddp_* eval_table_size eval_max_new_tokens profiler_steps special_config "
        "include_tokens_per_second include_tkps gc_steps lora_on_cpu hf_use_auth_token lora_fan_in_fan_out world_size "
        "experimental_skip_move_to_device skip_prepare_dataset remove_unused_columns merge_lora merge_method "
        "loraplus_lr_embedding mean_resizing_embeddings max_prompt_len",
        shared.NOT_LEARNED,
    ),
    idle(
        "trl vllm num_labels dpo_* orpo_alpha rpo_alpha simpo_gamma cpo_alpha kto_* rl_beta gradio_* pretrain_* "
        "pretraining_* heads_k_stride ring_attn_func llama4_*",
        "of other methods",
    ),
    idle(
        "use_ray ray_* is_preprocess preprocess_iterable total_* axolotl_config_path multipack_real_batches",
        shared.NOT_LEARNED,
    ),
    lost("quantization", "the trained model is quantized by `lorafit merge`"),
    decides("special_tokens plugins peft", ""),
    lost("wandb_* mlflow_* comet_* tensorboard_*", "a tracker's own settings come from its environment variables"),
    lost("hub_* push_dataset_to_hub", "lorafit pushes nothing by itself", "every_save"),
    lost(
        "tensor_parallel_size context_parallel_size sequence_parallel_degree dp_shard_size", "lorafit shares by DDP", 1
    ),
    lost("resume_from_checkpoint auto_resume_from_checkpoints", "use `lorafit train --resume`"),
    lost("tokens added_tokens_overrides resize_token_embeddings_to_32x", "lorafit adds no tokens to a vocabulary"),
    lost("tokenizer_config", "the tokenizer is the model's own"),
    lost("default_system_message", "the chat template decides it; see model.chat_template"),
    lost("eot_tokens", "the chat template decides it; see model.chat_template", chosen=([],)),
    lost("tokenizer_legacy", "transformers tells it from the model's files", chosen=(False,)),
    lost("shuffle_merged_datasets", "rows are shuffled in every epoch", True),
    lost("dataset_exact_deduplication", "duplicates are counted by dataset.audit.duplicates"),
    lost("lora_target_parameters peft_layers_pattern peft_trainable_token_indices", "only linear layers are adapted"),
    lost("bnb_config_kwargs", "write it into the quantization section by its upstream names"),
    lost("loss_watchdog_threshold loss_watchdog_patience", "a loss that is not finite stops the training by itself"),
    lost("embedding_lr embedding_lr_scale lr_groups lr_quadratic_warmup cosine_constant_lr_ratio lr_div_factor", ""),
    lost("auto_find_batch_size", "see `lorafit estimate-vram` for what fits"),
    lost("do_causal_lm_eval eval_causal_lm_metrics do_bench_eval bench_dataset bench_split", "see the eval section"),
    lost(
        "rope_scaling rope_theta overrides_of_model_config overrides_of_model_kwargs s2_attention use_pose pose_*", ""
    ),
    lost("model_kwargs model_config_type optim_args optim_target_modules fp8 dataloader_drop_last", ""),
    lost(
        "fix_untrained_tokens shrink_embeddings embeddings_skip_upcast neftune_* torchdistx_path accelerator_config", ""
    ),
    lost("adam_epsilon2 adam_beta3 dataset_shard_idx curriculum_sampling peft_autocast_adapter_dtype noise_scale", ""),
)


def assemble(c: Conversion) -> None:
    """What several keys decide together, and axolotl's own defaults."""
    adapter = _adapter(c)
    sources(c)
    _masking(c)
    _precision(c, adapter)
    _attention(c)
    _template(c)
    _batches(c)
    shared.schedule(c, "num_epochs", 1.0)
    _schedule(c)
    shared.optimizer(c, "optimizer")
    if not c.given("learning_rate"):
        c.note("learning_rate", "is not given, which axolotl wants; lorafit's default is 2e-4")
    shared.logging(c)
    shared.sampling(c)
    c.defaults(max_length=512, weight_decay=0.0, max_grad_norm=1.0, seed=42)
    _validation(c)
    _trackers(c)
    _words(c)


def _adapter(c: Conversion) -> bool:
    kind = c.get("adapter", read.text, "")
    four, eight = c.on("load_in_4bit"), c.on("load_in_8bit")
    if kind not in ("", "lora", "qlora"):
        c.refuse("adapter", f"lorafit has no {kind}; it trains lora and qlora, or all weights")
    bits = "load_in_4bit" if four else "load_in_8bit"
    if not kind:
        if four or eight:
            c.refuse(bits, "quantized weights can't be trained without an adapter")
        c.without_adapter()
        return False
    if four or eight:
        c.put(f"quantization.{bits}", True, bits)
    if four:
        c.default("quantization.bnb_4bit_quant_type", "nf4")
        c.default("quantization.bnb_4bit_use_double_quant", True)
    if kind == "qlora" and not four:
        c.refuse("adapter", "qlora needs load_in_4bit: true")
    for target in ("lora.r", "lora.lora_alpha"):
        if target not in c.lines:
            c.put(target, 8, "PEFT's default, if nothing is said")
    c.default("lora.lora_dropout", 0.0)
    named = c.plain("lora_target_modules")
    if c.on("lora_target_linear") or named == "all-linear":
        c.put("lora.target_modules", "all-linear", "lora_target_linear" if named is None else "lora_target_modules")
    elif isinstance(named, list):
        c.put("lora.target_modules", c.read("lora_target_modules", read.names, named), "lora_target_modules")
    elif named:
        c.put("lora.target_modules", c.read("lora_target_modules", read.text, named), "lora_target_modules")
    else:
        shared.peft_default_targets(c)
    start = c.plain("peft_init_lora_weights")
    if start is not None:
        start = start if isinstance(start, bool) else c.read("peft_init_lora_weights", read.text, start)
        c.put("lora.init_lora_weights", start, "peft_init_lora_weights")
    return True


def _masking(c: Conversion) -> None:
    """What is learned, and what becomes of rows that are too long."""
    # Beside texts, which are learned whole, lorafit learns only the answers of what else there is, by default.
    has_texts = any(source["format"] == "text" for source in c.value("dataset.train"))
    if c.on("train_on_inputs"):
        c.put("dataset.loss_on", "all", "train_on_inputs")
    elif not has_texts and c.value("dataset.loss_on") is None:
        c.put("dataset.loss_on", "assistant", c.why("train_on_inputs"))
    strategy = c.get("excess_length_strategy", read.text, "drop")
    if strategy not in ("drop", "truncate"):
        c.refuse("excess_length_strategy", f"lorafit knows drop and truncate, not {strategy}")
    c.put("dataset.excess_length_strategy", strategy, c.why("excess_length_strategy"))


def _precision(c: Conversion, adapter: bool) -> None:
    bf16 = c.plain("bf16")
    if c.on("float16") or (c.on("fp16") and bf16 in (None, False)):
        dtype, key = "float16", "fp16"
    elif c.on("bfloat16"):
        dtype, key = "bfloat16", "bfloat16"
    elif c.on("float32"):
        dtype, key = "float32", "float32"
    elif bf16 in (None, "auto"):
        dtype, key = "auto" if adapter else "bfloat16", "bf16"
    elif bf16 == "full" or c.on("bf16"):
        dtype, key = "bfloat16", "bf16"
    else:
        dtype, key = "float32", "bf16"
    if dtype == "float16" and not adapter:
        c.note(key, "lorafit trains no float16 weights in full; float32 is written")
        dtype = "float32"
    c.put("model.dtype", dtype, c.why(key))


def _attention(c: Conversion) -> None:
    named = c.get("attn_implementation", read.text, "")
    switches = {"flash_attention": "flash_attention_2", "sdp_attention": "sdpa", "eager_attention": "eager"}
    for key, name in switches.items():
        if c.on(key):
            c.put("model.attn_implementation", name, key)
    if named in ("sdpa", "eager", "flash_attention_2", "flash_attention_3"):
        c.put("model.attn_implementation", named, "attn_implementation")
    elif named:
        c.note("attn_implementation", f"'{named}': no equivalent; lorafit chooses")
    for key in ("xformers_attention", "flex_attention"):
        if c.on(key):
            c.note(key, "no equivalent; lorafit chooses (the same result but for rounding)")


def _template(c: Conversion) -> None:
    """The template of conversations: the data sets' own has been set before."""
    name, jinja = c.get("chat_template", read.text, ""), c.get("chat_template_jinja", read.text, "")
    if not any(source["format"] in ("messages", "sharegpt") for source in c.value("dataset.train")):
        c.no_effect("chat_template", "chat_template_jinja", why="the rows are no conversations")
        return
    if "model.chat_template" not in c.lines:
        set_template(c, "chat_template", name, jinja)
    elif (name or jinja) and name not in [entry.get("chat_template") for entry in c.plain("datasets")]:
        key = "chat_template" if name else "chat_template_jinja"
        c.note(key, "lorafit has one chat template for all data sets, which is a data set's own here")


def _batches(c: Conversion) -> None:
    c.default("training.per_device_train_batch_size", 1)
    rows, total = int(c.value("training.per_device_train_batch_size")), c.get("batch_size", read.whole, 0)
    if total:
        c.put("training.gradient_accumulation_steps", max(total // rows, 1), "batch_size / micro_batch_size")
    else:
        c.choose("training.gradient_accumulation_steps", "gradient_accumulation_steps", read.count, 1)
    checkpointing = c.plain("gradient_checkpointing")
    if isinstance(checkpointing, str) and checkpointing in ("offload", "offload_disk", "unsloth"):
        c.note("gradient_checkpointing", f"'{checkpointing}': no equivalent; plain checkpointing is written")
        checkpointing = True
    on = False if checkpointing is None else c.read("gradient_checkpointing", read.flag, checkpointing)
    c.put("training.gradient_checkpointing", on, c.why("gradient_checkpointing"))
    noise = c.get("noisy_embedding_alpha", read.above_zero, 0.0)
    if noise:
        c.put("training.neftune_noise_alpha", noise, "noisy_embedding_alpha")


def _schedule(c: Conversion) -> None:
    shared.scheduler(c, "lr_scheduler", "cosine")
    least = c.get("cosine_min_lr_ratio", read.number, 0.0)
    if least and c.value("training.lr_scheduler_type") == "cosine":
        c.put("training.lr_scheduler_type", "cosine_with_min_lr", "lr_scheduler, cosine_min_lr_ratio")
        c.put("training.lr_scheduler_kwargs", {"min_lr_rate": least}, "cosine_min_lr_ratio")
    if c.given("warmup_steps"):
        c.put("training.warmup_steps", c.get("warmup_steps", read.whole, 0), "warmup_steps")
    elif c.given("warmup_ratio"):
        c.put("training.warmup_ratio", c.get("warmup_ratio", read.number, 0.0), "warmup_ratio")
    else:
        c.put("training.warmup_ratio", 0.03, "axolotl's default (there at most 100 steps)")


def _validation(c: Conversion) -> None:
    if "dataset.validation" not in c.lines:
        shared.held_out(c, "val_set_size")
    else:
        c.no_effect("val_set_size", why="test_datasets are the validation rows")
    shared.evaluation(c, ("evals_per_epoch", "saves_per_epoch"))
    if c.value("dataset.validation") is None:
        keys = ("early_stopping_patience", "eval_batch_size", "load_best_model_at_end")
        c.no_effect(*keys, why="there are no validation rows")
        c.lines.pop("training.early_stopping_patience", None)
        c.lines.pop("training.per_device_eval_batch_size", None)
        return
    stops = bool(c.value("training.early_stopping_patience"))
    c.choose("training.load_best_model_at_end", "load_best_model_at_end", read.flag, stops)
    shared.best(c)


def _trackers(c: Conversion) -> None:
    found: dict[str, str] = {}
    if c.plain("wandb_project") or c.plain("use_wandb"):
        found["wandb"] = "wandb_project"
    if c.plain("wandb_mode") == "disabled" or c.plain("use_wandb") is False:
        found.pop("wandb", None)
    elif c.plain("wandb_project"):
        c.note("wandb_project", "set the environment variable WANDB_PROJECT", "training.report_to")
    others = (
        ("use_tensorboard", "tensorboard"),
        ("use_mlflow", "mlflow"),
        ("mlflow_experiment_name", "mlflow"),
        ("use_comet", "comet_ml"),
    )
    found |= {name: key for key, name in others if c.plain(key)}
    if found:
        c.put("training.report_to", list(found), ", ".join(found.values()))


def _words(c: Conversion) -> None:
    """Special tokens and plugins."""
    tokens: dict[str, Any] = c.get("special_tokens", read.mapping, {})
    others = [name for name, token in tokens.items() if token and name != "pad_token"]
    if others:
        c.note("special_tokens", f"{', '.join(others)}: no equivalent (the tokenizer keeps its own special tokens)")
    else:
        c.no_effect("special_tokens", why="padding is masked")
    plugins: list[str] = c.get("plugins", read.names, [])
    strange = [name for name in plugins if not any(part in str(name) for part in ("liger", "cut_cross_entropy"))]
    c.fates["plugins"] = "no effect on what is learned: faster kernels" if not strange else c.fates.get("plugins", "")
    if strange:
        c.note("plugins", f"{', '.join(map(str, strange))}: no equivalent")
    if c.given("peft"):
        c.note("peft", "no equivalent (lorafit's loftq wants a 4-bit base and lora_alpha equal to r)")
