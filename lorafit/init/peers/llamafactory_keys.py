"""LLaMA-Factory's keys: what becomes of each."""

from __future__ import annotations

from lorafit.init.peers.common import NOT_LEARNED, TRANSFORMERS
from lorafit.init.peers.dialect import above_zero, count, flag, names, number, text, whole
from lorafit.init.peers.rules import Rules, becomes, decides, idle, lost, refused, table

TITLE = "LLaMA-Factory"
MARKS = ("stage", "finetuning_type", "cutoff_len", "template", "dataset_dir", "lora_rank", "lora_target", "val_size")
"""Keys by which a recipe is known to be LLaMA-Factory's."""

_OTHER_METHOD = "lorafit trains with LoRA, QLoRA, or all weights"
_NO_IMAGES = "for images, videos and audio only"

RULES: Rules = table(
    becomes("model_name_or_path", "model.name_or_path", text),
    becomes("model_revision", "model.revision", text),
    becomes("trust_remote_code", "model.trust_remote_code", flag),
    decides("flash_attn", "model.attn_implementation"),
    decides("template", "model.chat_template"),
    decides("stage", "", "sft is what lorafit does"),
    decides("finetuning_type", "lora"),
    decides("quantization_bit quantization_method", "quantization"),
    decides("quantization_type", "quantization.bnb_4bit_quant_type"),
    decides("double_quantization", "quantization.bnb_4bit_use_double_quant"),
    becomes("lora_rank", "lora.r", count),
    becomes("lora_alpha", "lora.lora_alpha", number),
    becomes("lora_dropout", "lora.lora_dropout", number),
    decides("lora_target", "lora.target_modules"),
    becomes("additional_target", "lora.modules_to_save", names),
    becomes("use_rslora", "lora.use_rslora", flag),
    becomes("use_dora", "lora.use_dora", flag),
    becomes("loraplus_lr_ratio", "lora.loraplus_lr_ratio", above_zero),
    decides("pissa_init pissa_iter", "lora.init_lora_weights"),
    decides("dataset dataset_dir", "dataset.train"),
    decides("eval_dataset val_size", "dataset.validation"),
    decides("max_samples", "dataset.train"),
    decides("enable_thinking", "model.chat_template_kwargs"),
    decides("train_on_prompt mask_history", "dataset.loss_on"),
    becomes("cutoff_len", "training.max_length", count),
    decides("packing neat_packing", "training.packing"),
    decides("disable_gradient_checkpointing", "training.gradient_checkpointing"),
    idle("gradient_checkpointing activation_checkpointing", "disable_gradient_checkpointing decides it"),
    becomes("early_stopping_steps", "training.early_stopping_patience", whole),
    decides("disable_shuffling", "training.train_sampling_strategy"),
    decides("pure_bf16", "model.dtype"),
    decides("use_swanlab", "training.report_to"),
    TRANSFORMERS,
    idle(
        "cache_dir use_fast_tokenizer low_cpu_mem_usage use_unsloth use_unsloth_gc enable_liger_kernel pissa_convert "
        "use_reentrant_gc infer_backend infer_dtype offload_folder use_kv_cache print_param_status buffer_size "
        "overwrite_cache preprocessing_batch_size preprocessing_num_workers tokenized_path "
        "plot_loss compute_accuracy include_effective_tokens_per_second create_new_adapter eval_num_beams "
        "eval_on_each_dataset predict_with_generate ray_* placement_strategy resources_per_worker upcast_lmhead_output "
        "quantization_device_map loraplus_lr_embedding export_* adapter_folder flash_attn_* use_v1_kernels",
        NOT_LEARNED,
    ),
    idle("hf_hub_token ms_hub_token om_hub_token", "secrets come from the environment"),
    idle(
        "freeze_vision_tower freeze_multi_modal_projector freeze_language_model media_dir image_* video_*", _NO_IMAGES
    ),
    idle("crop_to_patches use_audio_in_video audio_sampling_rate", _NO_IMAGES),
    refused("adapter_name_or_path", "training would start from something else than the base model"),
    refused("use_galore use_apollo use_badam use_llama_pro use_muon use_dft_loss use_asft_loss", _OTHER_METHOD),
    refused("use_adam_mini use_mca use_eaft_loss train_from_scratch mixture_of_depths", _OTHER_METHOD),
    idle(
        "galore_* apollo_* badam_* freeze_* oft_* pref_* dpo_* kto_* ppo_* ref_model* reward_model*", "of other methods"
    ),
    idle("simpo_gamma ld_alpha module_dropout", "of other methods"),
    idle(
        "do_sample temperature top_p top_k num_beams max_length max_new_tokens repetition_penalty", "for answering only"
    ),
    idle("length_penalty skip_special_tokens sortish_sampler", "for answering only"),
    lost(
        "resize_vocab add_tokens add_special_tokens new_special_tokens_config", "lorafit adds no tokens to a vocabulary"
    ),
    lost("rope_scaling shift_attn moe_aux_loss_coef upcast_layernorm split_special_tokens fp8 fp8_*", ""),
    lost("streaming", "set dataset.streaming: true and training.max_steps"),
    lost("mix_strategy interleave_probs", "sources are mixed by their weight", "concat"),
    lost("tool_format", "the chat template writes tools"),
    lost("default_system", "the chat template decides it", chosen=("",)),
    lost("preserve_thinking", "the chat template decides it"),
    lost("ignore_pad_token_for_loss", "padding is never learned", True),
    lost("generation_max_length generation_num_beams", "see the eval section"),
    lost("swanlab_*", "a tracker's own settings come from its environment variables"),
)
