"""axolotl's keys: what becomes of each."""

from __future__ import annotations

from lorafit.init.peers.axolotl_data import DATASET_RULES
from lorafit.init.peers.common import NOT_LEARNED
from lorafit.init.peers.dialect import (
    above_zero,
    above_zero_or_none,
    count,
    flag,
    indices,
    limit,
    mapping,
    names,
    number,
    text,
    whole,
)
from lorafit.init.peers.rules import Rules, becomes, decides, idle, lost, refused, table

TITLE = "axolotl"
MARKS = ("base_model", "micro_batch_size", "sequence_len", "adapter", "val_set_size", "sample_packing")
"""Keys by which a recipe is known to be axolotl's."""

_ANOTHER_START = "training would start from something else than the base model"
_OTHER_LOSS = "lorafit trains on answers (SFT) only"
_LAYERS = "which weights are trained would be others"

RULES: Rules = table(
    becomes("base_model", "model.name_or_path", text),
    becomes("revision_of_model", "model.revision", text),
    becomes("trust_remote_code", "model.trust_remote_code", flag),
    decides("bf16 fp16 bfloat16 float16 float32", "model.dtype"),
    decides(
        "flash_attention sdp_attention eager_attention attn_implementation xformers_attention flex_attention",
        "model.attn_implementation",
    ),
    decides("chat_template chat_template_jinja", "model.chat_template"),
    decides("load_in_4bit load_in_8bit", "quantization"),
    decides("adapter", "lora, quantization"),
    becomes("lora_r", "lora.r", count),
    becomes("lora_alpha", "lora.lora_alpha", number),
    becomes("lora_dropout", "lora.lora_dropout", number),
    decides("lora_target_modules lora_target_linear", "lora.target_modules"),
    becomes("lora_modules_to_save", "lora.modules_to_save", names),
    becomes("peft_layers_to_transform", "lora.layers_to_transform", indices),
    becomes("peft_use_dora", "lora.use_dora", flag),
    becomes("peft_use_rslora", "lora.use_rslora", flag),
    decides("peft_init_lora_weights", "lora.init_lora_weights"),
    becomes("loraplus_lr_ratio", "lora.loraplus_lr_ratio", above_zero),
    decides("datasets", "dataset.train"),
    decides("test_datasets val_set_size", "dataset.validation"),
    decides("train_on_inputs", "dataset.loss_on"),
    becomes("min_sample_len", "dataset.min_length", count),
    decides("excess_length_strategy", "dataset.excess_length_strategy"),
    becomes("sequence_len", "training.max_length", count),
    becomes("sample_packing", "training.packing", flag),
    decides("num_epochs max_steps", "training.num_train_epochs, training.max_steps"),
    becomes("micro_batch_size", "training.per_device_train_batch_size", count),
    decides("gradient_accumulation_steps batch_size", "training.gradient_accumulation_steps"),
    becomes("eval_batch_size", "training.per_device_eval_batch_size", count),
    becomes("learning_rate", "training.learning_rate", above_zero),
    decides("lr_scheduler cosine_min_lr_ratio", "training.lr_scheduler_type"),
    becomes("lr_scheduler_kwargs", "training.lr_scheduler_kwargs", mapping),
    decides("warmup_ratio warmup_steps", "training.warmup_ratio, training.warmup_steps"),
    decides("optimizer", "training.optim"),
    becomes("weight_decay", "training.weight_decay", number),
    becomes("adam_beta1", "training.adam_beta1", number),
    becomes("adam_beta2", "training.adam_beta2", number),
    becomes("adam_epsilon", "training.adam_epsilon", above_zero),
    becomes("max_grad_norm", "training.max_grad_norm", number),
    becomes("neftune_noise_alpha", "training.neftune_noise_alpha", above_zero_or_none),
    decides("noisy_embedding_alpha", "training.neftune_noise_alpha"),
    decides("gradient_checkpointing", "training.gradient_checkpointing"),
    decides("group_by_length", "training.train_sampling_strategy"),
    becomes("dataloader_num_workers", "training.dataloader_num_workers", whole),
    becomes("seed", "training.seed", whole),
    decides("logging_steps", "training.logging_steps"),
    decides(
        "eval_strategy evaluation_strategy eval_steps evals_per_epoch", "training.eval_strategy, training.eval_steps"
    ),
    decides("save_strategy save_steps saves_per_epoch", "training.save_strategy, training.save_steps"),
    becomes("save_total_limit", "training.save_total_limit", limit),
    decides("load_best_model_at_end", "training.load_best_model_at_end"),
    becomes("early_stopping_patience", "training.early_stopping_patience", whole),
    decides(
        "wandb_project wandb_mode use_wandb use_tensorboard use_mlflow mlflow_experiment_name use_comet",
        "training.report_to",
    ),
    becomes("output_dir", "output_dir", text),
    DATASET_RULES,
    refused("rl reward_model process_reward_model", _OTHER_LOSS),
    refused("pretraining_dataset", "lorafit does no pretraining; name the rows as datasets of type completion"),
    refused("processor_type is_multimodal image_size image_resize_algorithm", "lorafit trains on text only"),
    refused("lora_model_dir", _ANOTHER_START),
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
        NOT_LEARNED,
    ),
    idle(
        "trl vllm num_labels dpo_* orpo_alpha rpo_alpha simpo_gamma cpo_alpha kto_* rl_beta gradio_* pretrain_* "
        "pretraining_* heads_k_stride ring_attn_func llama4_*",
        "of other methods",
    ),
    idle(
        "use_ray ray_* is_preprocess preprocess_iterable total_* axolotl_config_path multipack_real_batches",
        NOT_LEARNED,
    ),
    lost("quantization", "the trained model is quantized by `lorafit merge`"),
    decides("special_tokens plugins peft", ""),
    lost("wandb_* mlflow_* comet_* tensorboard_*", "a tracker's own settings come from its environment variables"),
    lost("hub_* push_dataset_to_hub", "lorafit pushes nothing by itself", "every_save"),
    lost("deepspeed fsdp fsdp_*", "several processes are started with accelerate launch, and share by DDP"),
    lost(
        "tensor_parallel_size context_parallel_size sequence_parallel_degree dp_shard_size", "lorafit shares by DDP", 1
    ),
    lost("resume_from_checkpoint auto_resume_from_checkpoints", "use `lorafit train --resume`"),
    lost("tf32", "matters to float32 arithmetic only, and there in the last digits"),
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
    lost(
        "metric_for_best_model greater_is_better", "the best is that of the lowest validation loss", "loss", "eval_loss"
    ),
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
