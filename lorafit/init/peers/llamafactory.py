"""LLaMA-Factory's recipes: its keys, its data sets by name, what several keys decide together, and its own defaults."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from lorafit.bounds import read_text
from lorafit.init.peers import read
from lorafit.init.peers import transformers as shared
from lorafit.init.peers.convert import Conversion, Rules, becomes, decides, idle, lost, refused, table

INFO = "dataset_info.json"
_TAGS = {
    "role_tag": {"role", "from"},
    "content_tag": {"content", "value"},
    "user_tag": {"user", "human"},
    "assistant_tag": {"assistant", "gpt", "model"},
    "observation_tag": {"tool", "observation", "function", "ipython"},
    "function_tag": {"function_call"},
    "system_tag": {"system"},
}
_COLUMNS = (
    *("prompt", "query", "response", "history", "messages", "system", "tools"),
    *("images", "videos", "audios", "kto_tag"),
)
_READ = ("file_name", "hf_hub_url", "formatting", "columns", "tags", "subset", "split", "num_samples", "ranking")


def sources(c: Conversion) -> None:
    """The training rows, and those of eval_dataset."""
    folder = Path(c.get("dataset_dir", read.text, "data"))
    if not folder.is_absolute() and not folder.is_dir() and (c.file.parent / folder).is_dir():
        folder = c.file.parent / folder
    if not c.given("dataset"):
        c.refuse("dataset", "there is none, so there is nothing to train on")
    info = _info(c, folder)
    most = c.get("max_samples", read.count, 0)
    for key, target in (("dataset", "dataset.train"), ("eval_dataset", "dataset.validation")):
        if c.given(key):
            asked: list[str] = c.get(key, read.names, [])
            found = [_source(c, key, name, folder, info) for name in asked]
            c.put(target, [one | ({"max_rows": most} if most else {}) for one in found], key)
    if c.given("eval_dataset"):
        c.no_effect("val_size", why="eval_dataset are the validation rows")


def _info(c: Conversion, folder: Path) -> dict[str, Any]:
    file = folder / INFO
    if not file.is_file():
        return {}
    try:
        info = json.loads(read_text(file))
    except (OSError, ValueError, RecursionError) as error:
        c.refuse("dataset_dir", f"{file} can't be read: {error}")
    if not isinstance(info, dict):
        c.refuse("dataset_dir", f"{file}: expected data sets by name")
    return info


def _source(c: Conversion, key: str, name: str, folder: Path, info: dict[str, Any]) -> dict[str, Any]:
    if str(folder) == "ONLINE":
        return {"path": name} | _shape(c, key, name, {})
    entry = info.get(name)
    if not isinstance(entry, dict):
        where = "is not in" if info else "is looked up in"
        hint = "" if info else ", which is not here"
        c.note(key, f"'{name}' {where} {folder / INFO}{hint}; check the path and the format")
        return {"path": str(folder / f"{name}.json"), "format": "auto"}
    if entry.get("ranking") or _columns(entry).get("kto_tag"):
        c.refuse(key, f"'{name}' holds preferences, and only supervised fine-tuning is converted; see recipes/dpo.yaml")
    return _place(c, key, name, folder, entry) | _shape(c, key, name, entry)


def _place(c: Conversion, key: str, name: str, folder: Path, entry: dict[str, Any]) -> dict[str, Any]:
    for strange in sorted({*entry} - {*_READ}):
        if strange not in ("ms_hub_url", "om_hub_url") or not (entry.get("hf_hub_url") or entry.get("file_name")):
            c.note(key, f"'{name}' in {INFO}: {strange}: no equivalent")
    place: dict[str, Any]
    if entry.get("hf_hub_url"):
        place = {"path": str(entry["hf_hub_url"])}
        place |= {ours: entry[theirs] for theirs, ours in (("subset", "name"), ("split", "split")) if entry.get(theirs)}
    else:
        place = {"path": str(folder / str(entry.get("file_name") or f"{name}.json"))}
    if entry.get("num_samples"):
        place["max_rows"] = entry["num_samples"]
    return place


def _shape(c: Conversion, key: str, name: str, entry: dict[str, Any]) -> dict[str, Any]:
    columns = _columns(entry)
    for strange in sorted({*columns} - {*_COLUMNS}):
        c.note(key, f"'{name}' in {INFO}: columns.{strange}: no equivalent")
    for media in ("images", "videos", "audios"):
        if columns.get(media):
            c.refuse(key, f"'{name}' has {media}, and lorafit trains on text only")
    if entry.get("formatting", "alpaca") == "sharegpt":
        return _turns(c, key, name, columns, entry.get("tags") or {})
    return _alpaca(columns)


def _columns(entry: dict[str, Any]) -> dict[str, Any]:
    columns = entry.get("columns")
    return columns if isinstance(columns, dict) else {}


def _turns(c: Conversion, key: str, name: str, columns: dict[str, str], tags: dict[str, str]) -> dict[str, Any]:
    for tag, known in _TAGS.items():
        if tag in tags and tags[tag] not in known:
            c.note(key, f"'{name}' in {INFO}: {tag}: '{tags[tag]}' is not known to lorafit; rename it in the rows")
    column = columns.get("messages", "conversations")
    kind = "messages" if column == "messages" else "sharegpt"
    needed = "messages" if kind == "messages" else "conversations"
    mapped = {} if column == needed else {needed: column}
    mapped |= {own: columns[own] for own in ("system", "tools") if columns.get(own) and columns[own] != own}
    return {"format": kind} | ({"columns": mapped} if mapped else {})


def _alpaca(columns: dict[str, str]) -> dict[str, Any]:
    """Instruction and input are joined by one line break, where lorafit's own alpaca has an empty line."""
    prompt, query = columns.get("prompt", "instruction"), columns.get("query", "input")
    mapped = {
        own: columns[theirs]
        for theirs, own in (("response", "output"), ("history", "history"), ("system", "system"), ("tools", "tools"))
        if columns.get(theirs) and columns[theirs] != own
    }
    joined = f"{{{{ row['{prompt}'] }}}}{{% if row['{query}'] | default('') %}}\n{{{{ row['{query}'] }}}}{{% endif %}}"
    shape: dict[str, Any] = {"format": "alpaca", "template": {"instruction": joined, "input": "{{ '' }}"}}
    return shape | ({"columns": mapped} if mapped else {})


TITLE = "LLaMA-Factory"
NAMED = "model_name_or_path"
MARKS: tuple[str, ...] = (
    *("stage", "finetuning_type", "cutoff_len", "template"),
    *("dataset_dir", "lora_rank", "lora_target", "val_size"),
)
"""Keys by which a recipe is known to be LLaMA-Factory's."""

_OTHER_METHOD = "lorafit trains with LoRA, QLoRA, or all weights"
_NO_IMAGES = "for images, videos and audio only"

RULES: Rules = table(
    decides("flash_attn", "model.attn_implementation"),
    decides("template", "model.chat_template"),
    decides("stage", "", "sft is what is converted"),
    decides("finetuning_type", "lora"),
    decides("quantization_bit quantization_method", "quantization"),
    decides("quantization_type", "quantization.bnb_4bit_quant_type"),
    decides("double_quantization", "quantization.bnb_4bit_use_double_quant"),
    becomes("lora_rank", "lora.r", read.count),
    decides("lora_target", "lora.target_modules"),
    becomes("additional_target", "lora.modules_to_save", read.names),
    becomes("loraplus_lr_ratio", "lora.loraplus_lr_ratio", read.above_zero),
    decides("pissa_init pissa_iter", "lora.init_lora_weights"),
    decides("dataset dataset_dir", "dataset.train"),
    decides("eval_dataset val_size", "dataset.validation"),
    decides("max_samples", "dataset.train"),
    decides("enable_thinking", "model.chat_template_kwargs"),
    decides("train_on_prompt mask_history", "dataset.loss_on"),
    becomes("cutoff_len", "training.max_length", read.count),
    decides("packing neat_packing", "training.packing"),
    decides("disable_gradient_checkpointing", "training.gradient_checkpointing"),
    idle("gradient_checkpointing activation_checkpointing", "disable_gradient_checkpointing decides it"),
    becomes("early_stopping_steps", "training.early_stopping_patience", read.whole),
    decides("disable_shuffling", "training.train_sampling_strategy"),
    decides("pure_bf16", "model.dtype"),
    decides("use_swanlab", "training.report_to"),
    shared.TRANSFORMERS,
    idle(
        "cache_dir use_fast_tokenizer low_cpu_mem_usage use_unsloth use_unsloth_gc enable_liger_kernel pissa_convert "
        "use_reentrant_gc infer_backend infer_dtype offload_folder use_kv_cache print_param_status buffer_size "
        "overwrite_cache preprocessing_batch_size preprocessing_num_workers tokenized_path "
        "plot_loss compute_accuracy include_effective_tokens_per_second eval_num_beams "
        "eval_on_each_dataset predict_with_generate ray_* placement_strategy resources_per_worker upcast_lmhead_output "
        "quantization_device_map loraplus_lr_embedding export_* adapter_folder flash_attn_* use_v1_kernels",
        shared.NOT_LEARNED,
    ),
    idle("hf_hub_token ms_hub_token om_hub_token", "secrets come from the environment"),
    idle(
        "freeze_vision_tower freeze_multi_modal_projector freeze_language_model media_dir image_* video_*", _NO_IMAGES
    ),
    idle("crop_to_patches use_audio_in_video audio_sampling_rate", _NO_IMAGES),
    decides("adapter_name_or_path", "start_from"),
    refused("create_new_adapter", "a new adapter would be trained on a merged one; merge that first"),
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


TEMPLATES = {
    "qwen": "qwen2_5",
    "phi": "phi3",
    "gemma2": "gemma",
    "gemma3_text": "gemma3",
    "qwen3_nothink": "qwen3_instruct_2507",
    "gpt_oss": "gptoss",
    "gpt": "gptoss",
    "deepseek3": "deepseekv3",
    "glm4_moe": "glm4moe",
}
"""Its names for templates that TRL ships under another."""
ATTENTION = {
    "auto": "auto",
    "disabled": "eager",
    "sdpa": "sdpa",
    "fa2": "flash_attention_2",
    "fa3": "flash_attention_3",
}


def assemble(c: Conversion) -> None:
    """What several keys decide together, and LLaMA-Factory's own defaults."""
    stage = c.get("stage", read.text, "sft")
    if stage != "sft":
        c.refuse("stage", f"only sft is converted, not {stage}; recipes/dpo.yaml learns from pairs")
    _method(c)
    sources(c)
    _masking(c)
    _precision(c)
    _template(c)
    c.put("model.attn_implementation", *_attention(c))
    _training(c)
    if "dataset.validation" not in c.lines:
        shared.held_out(c, "val_size")
    shared.quiet_evaluation(c)
    if c.on("use_swanlab"):
        c.put("training.report_to", [*(c.value("training.report_to") or []), "swanlab"], "use_swanlab")


def _method(c: Conversion) -> None:
    kind = c.get("finetuning_type", read.text, "lora")
    bits = c.get("quantization_bit", read.whole, 0)
    if kind not in ("lora", "full"):
        c.refuse("finetuning_type", f"lorafit has no {kind}; it trains lora, or all weights (full)")
    if bits:
        _quantization(c, bits)
    if kind == "full":
        if bits:
            c.refuse("quantization_bit", "quantized weights can't be trained without an adapter")
        c.without_adapter()
        return
    before: list[str] = c.get("adapter_name_or_path", read.names, [])
    if len(before) > 1:
        c.refuse("adapter_name_or_path", "all but the last would be merged into the base first; do that, and name one")
    if before:
        c.put("start_from", before[0], "adapter_name_or_path")
    c.default("lora.r", 8)
    if "lora.lora_alpha" not in c.lines:
        c.put("lora.lora_alpha", 2 * c.value("lora.r"), "LLaMA-Factory's default: twice lora_rank")
    c.default("lora.lora_dropout", 0.0)
    targets = c.get("lora_target", read.names, ["all"])
    c.put("lora.target_modules", "all-linear" if targets == ["all"] else targets, c.why("lora_target"))
    if c.on("pissa_init"):
        rounds = c.get("pissa_iter", read.whole, 16)
        c.put("lora.init_lora_weights", "pissa" if rounds == -1 else f"pissa_niter_{rounds}", "pissa_init, pissa_iter")


def _quantization(c: Conversion, bits: int) -> None:
    how = str(c.plain("quantization_method") or "bnb").lower()
    if how not in ("bnb", "bitsandbytes") or bits not in (4, 8):
        key = "quantization_bit" if bits not in (4, 8) else "quantization_method"
        c.refuse(key, f"lorafit quantizes with bitsandbytes, to 4 or 8 bits, not with {how} to {bits}")
    c.put(f"quantization.load_in_{bits}bit", True, "quantization_bit")
    if bits == 4:
        c.choose("quantization.bnb_4bit_quant_type", "quantization_type", read.text, "nf4")
        c.choose("quantization.bnb_4bit_use_double_quant", "double_quantization", read.flag, True)
        if c.on("bf16"):
            c.note(
                "quantization_bit", "with a 4-bit base lorafit keeps the adapter in bfloat16, LLaMA-Factory in float32"
            )
            c.fates["quantization_bit"] = "quantization"


def _masking(c: Conversion) -> None:
    if c.on("train_on_prompt"):
        c.put("dataset.loss_on", "all", "train_on_prompt")
    elif c.on("mask_history"):
        c.put("dataset.loss_on", "completion", "mask_history: only the last answer")
    else:
        given = next((key for key in ("train_on_prompt", "mask_history") if c.given(key)), None)
        c.put("dataset.loss_on", "assistant", given or "LLaMA-Factory's default")


def _precision(c: Conversion) -> None:
    if c.on("pure_bf16"):
        c.put("model.dtype", "bfloat16", "pure_bf16")
    elif c.on("bf16"):
        # In full, its weights are float32 under bfloat16 arithmetic: lorafit's auto.
        c.put("model.dtype", "bfloat16" if "lora.r" in c.lines else "auto", "bf16")
    elif c.on("fp16"):
        c.put("model.dtype", "float16" if "lora.r" in c.lines else "auto", "fp16")
    else:
        c.put("model.dtype", "auto", "LLaMA-Factory's default: the model's own type")


def _template(c: Conversion) -> None:
    name = c.get("template", read.text, "")
    if name:
        shared.chat_template(c, "template", name, TEMPLATES)
    if not c.given("enable_thinking"):
        return
    if c.get("enable_thinking", read.flag, True):
        c.note("enable_thinking", "true: LLaMA-Factory also learns an empty block where a row has no reasoning")
    else:
        c.put("model.chat_template_kwargs", {"enable_thinking": False}, "enable_thinking")
        message = "false: LLaMA-Factory takes reasoning out of the rows, lorafit learns what they have"
        c.note("enable_thinking", message, "model.chat_template_kwargs")


def _attention(c: Conversion) -> tuple[str, str]:
    asked = c.plain("flash_attn")
    words = {True: "fa2", False: "disabled", None: "auto"}  # as older recipes say it
    name = words[asked] if asked is None or isinstance(asked, bool) else c.read("flash_attn", read.text, asked)
    if name not in ATTENTION:
        c.note("flash_attn", f"'{name}': no equivalent; lorafit chooses")
        name = "auto"
    return ATTENTION[name], c.why("flash_attn")


def _training(c: Conversion) -> None:
    c.default("training.max_length", 2048)
    if c.on("packing") or c.on("neat_packing"):
        key = "neat_packing" if c.on("neat_packing") else "packing"
        c.put("training.packing", True, key)
        if key == "packing":
            c.note("packing", "LLaMA-Factory lets packed rows see each other, lorafit doesn't", "training.packing")
    key = "disable_gradient_checkpointing"
    c.put("training.gradient_checkpointing", not c.on(key), c.why(key))
    shared.training(c, 5e-5)
    if c.on("disable_shuffling"):
        c.put("training.train_sampling_strategy", "sequential", "disable_shuffling")
