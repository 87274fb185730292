"""The keys of TRL's command line, `trl sft --config`: what becomes of each."""

from __future__ import annotations

from lorafit.init.peers.common import NOT_LEARNED, TRANSFORMERS
from lorafit.init.peers.dialect import count, flag, names, number, text
from lorafit.init.peers.rules import Rules, becomes, decides, idle, lost, refused, table

TITLE = "TRL"
MARKS = ("dataset_name", "use_peft", "lora_r", "max_length", "assistant_only_loss", "dtype", "torch_dtype")
"""Keys by which a recipe is known to be TRL's."""
_ROWS = "dataset.train"

RULES: Rules = table(
    becomes("model_name_or_path", "model.name_or_path", text),
    becomes("model_revision", "model.revision", text),
    becomes("trust_remote_code", "model.trust_remote_code", flag),
    decides("dtype torch_dtype", "model.dtype"),
    decides("attn_implementation", "model.attn_implementation"),
    decides("chat_template_path", "model.chat_template"),
    decides("load_in_4bit load_in_8bit", "quantization"),
    decides("bnb_4bit_quant_type", "quantization.bnb_4bit_quant_type"),
    decides("use_bnb_nested_quant", "quantization.bnb_4bit_use_double_quant"),
    decides("use_peft", "lora"),
    becomes("lora_r", "lora.r", count),
    becomes("lora_alpha", "lora.lora_alpha", number),
    becomes("lora_dropout", "lora.lora_dropout", number),
    decides("lora_target_modules", "lora.target_modules"),
    becomes("lora_modules_to_save", "lora.modules_to_save", names),
    becomes("use_rslora", "lora.use_rslora", flag),
    becomes("use_dora", "lora.use_dora", flag),
    decides("dataset_name datasets dataset_train_split dataset_config", _ROWS),
    decides("dataset_test_split test_split_size", "dataset.validation"),
    decides("dataset_text_field", _ROWS),
    decides("dataset_streaming streaming", "dataset.streaming"),
    decides("assistant_only_loss completion_only_loss", "dataset.loss_on"),
    decides("max_length max_seq_length", "training.max_length"),
    becomes("packing", "training.packing", flag),
    decides("gradient_checkpointing activation_checkpointing", "training.gradient_checkpointing"),
    decides("datasets[].path datasets[].data_files datasets[].name datasets[].split", _ROWS),
    idle("datasets[].columns", "the format decides which columns are read"),
    lost("datasets[].fraction", "use max_rows or weight"),
    lost("datasets[].data_dir", "name the files"),
    TRANSFORMERS,
    idle("padding_free pad_to_multiple_of eval_packing activation_offloading pad_token", NOT_LEARNED),
    idle("ignore_bias_buffers bnb_4bit_quant_storage lora_task_type shuffle_dataset", NOT_LEARNED),
    lost("env", "set environment variables where the training is started"),
    lost("dataset_kwargs", "lorafit prepares the rows itself"),
    refused("vision_model", "lorafit trains on text only"),
    lost("lora_target_parameters", "only linear layers are adapted"),
    lost("eos_token", "the chat template and the tokenizer decide how an answer ends"),
    lost("packing_strategy", "lorafit fills rows with whole examples", "bfd", "bfd_split"),
    lost("truncation_mode", "lorafit cuts at the end", "keep_start"),
    lost("loss_type", "lorafit has the usual cross-entropy", "nll", "chunked_nll"),
    lost("model_init_kwargs router_aux_loss_coef use_liger_loss", ""),
)
