"""Whether vLLM can serve an adapter unmerged, beside others on one base (multi-LoRA).

Follows vLLM's sources as of late 2025 (0.11 to 0.13), which can't be run here: `vllm/lora/peft_helper.py` (what of
adapter_config.json is read and refused), `vllm/lora/lora_model.py` and `vllm/lora/utils.py` (which tensor names are
taken), and `vllm/config/lora.py` (`MaxLoRARanks`). vLLM reads neither rank_pattern nor alpha_pattern: every module is
scaled by lora_alpha / r (lora_alpha / sqrt(r) with rsLoRA), so an adapter whose modules want other factors would be
served wrongly without a word.
"""

from __future__ import annotations

import math
import re
import shlex
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from lorafit.errors import ModelError
from lorafit.export.vocabulary import read_json
from lorafit.facts import stored_tensors
from lorafit.plan.adapters import check_expressions, pattern_matches
from lorafit.written import REFERENCE

MAX_LORA_RANKS = (1, 8, 16, 32, 64, 128, 256, 320, 512)
"""The values that --max-lora-rank takes."""

_PAIR = re.compile(
    r"(?:base_model\.model\.)?(?P<module>.+)\.(?:lora_(?P<matrix>[AB])\.weight|lora_embedding_(?P<embedding>[AB]))"
)
_QUANTIZED = re.compile(r"(?i)(bnb|-4bit|-8bit|gptq|awq|gguf)")


@dataclass(frozen=True)
class VllmReport:
    """Whether vLLM can serve an adapter unmerged: the command for it, or the reasons why not; and what else to know."""

    servable: bool
    reasons: tuple[str, ...]
    command: str | None
    remarks: tuple[str, ...]


def check_vllm(adapter: Path) -> VllmReport:
    """Look at an adapter's configuration and at the header of its weights. Raises ModelError if one is missing.

    The name under which it is served is the folder's; of a run's `adapter` folder it is the run's.
    """
    config = read_json(adapter / "adapter_config.json")
    if not config:
        raise ModelError(f"{adapter}: there is no adapter_config.json, so this is not an adapter's folder")
    header = {tensor.name: tensor.shape for tensor in stored_tensors(adapter / "adapter_model.safetensors")}
    ranks = _ranks(header)
    reasons = [*_refused_settings(config), *_refused_tensors(header)]
    try:
        largest = max([int(config.get("r") or 0), *ranks.values()])
        if largest > MAX_LORA_RANKS[-1]:
            reasons.append(f"the rank {largest} is above {MAX_LORA_RANKS[-1]}, the largest that vLLM takes")
        check_expressions(config, ranks, str(adapter / "adapter_config.json"))
        reasons += _scaled_otherwise(config, ranks)
    except (AttributeError, TypeError, ValueError, re.error) as error:
        raise ModelError(
            f"{adapter / 'adapter_config.json'}: r, lora_alpha or a pattern can't be used: {error}"
        ) from None
    base = config.get("base_model_name_or_path")
    if not base:
        reasons.append("adapter_config.json doesn't name the base model")
    if reasons:
        return VllmReport(False, tuple(reasons), None, ("merge it instead: lorafit merge",))
    return VllmReport(True, (), _command(adapter, config, largest), tuple(_remarks(adapter, config)))


def _refused_settings(config: dict[str, Any]) -> list[str]:
    reasons = []
    if config.get("peft_type") != "LORA":
        reasons.append(f"it is of the kind {config.get('peft_type')}; vLLM serves LORA")
    if config.get("use_dora"):
        reasons.append("it uses DoRA, which vLLM doesn't")
    if config.get("bias", "none") != "none" or config.get("lora_bias"):
        reasons.append("it trains biases, which vLLM doesn't serve")
    listed = {
        "modules_to_save": "it holds whole trained modules (modules_to_save: {})",
        "trainable_token_indices": "it holds trained tokens (trainable_token_indices: {})",
        "target_parameters": "it adapts parameters that are no linear layers (target_parameters: {})",
        "layer_replication": "it repeats layers (layer_replication: {})",
        "alora_invocation_tokens": "it is an activated LoRA (alora_invocation_tokens: {})",
    }
    for key, words in listed.items():
        if config.get(key):
            value = config[key]
            shown = ", ".join(map(str, value)) if isinstance(value, (list, dict)) else str(value)
            reasons.append(words.format(shown) + ", which vLLM doesn't serve")
    return reasons


def _refused_tensors(header: dict[str, tuple[int, ...]]) -> list[str]:
    odd = [name for name in header if _PAIR.fullmatch(name) is None]
    experts = [name for name in header if ".experts" in name]
    embeddings = [name for name in header if "lora_embedding" in name or ".embed_tokens.lora" in name]
    found = (
        (odd, "it holds tensors that are no LoRA matrices ({}), which vLLM refuses"),
        (experts, "it adapts experts ({}), whose form in files vLLM's versions take differently"),
        (embeddings, "it adapts the embeddings ({}), which vLLM no longer takes for every model"),
    )
    return [words.format(f"{len(names)}, first {min(names)}") for names, words in found if names]


def _ranks(header: dict[str, tuple[int, ...]]) -> dict[str, int]:
    """Each adapted module's rank, from its A matrix (rank, inputs)."""
    found = ((_PAIR.fullmatch(name), shape) for name, shape in header.items())
    return {match["module"]: shape[0] for match, shape in found if match and match["matrix"] == "A"}


def _scaled_otherwise(config: dict[str, Any], ranks: dict[str, int]) -> list[str]:
    """Modules that PEFT scales by another factor than the one vLLM has for all."""
    if not config.get("r"):
        return ["adapter_config.json has no rank (r)"]
    if not config.get("lora_alpha"):
        return ["adapter_config.json has no lora_alpha"]

    def factor(alpha: float, rank: int) -> float:
        return alpha / (math.sqrt(rank) if config.get("use_rslora") else rank)

    def own_alpha(module: str) -> float:
        patterns = (config.get("alpha_pattern") or {}).items()  # as PEFT, which takes the first that matches
        return float(next((value for pattern, value in patterns if pattern_matches(pattern, module)), alpha))

    alpha = float(config["lora_alpha"])
    general = factor(alpha, int(config["r"]))
    odd = [
        module
        for module, rank in ranks.items()
        if not math.isclose(factor(own_alpha(module), rank), general, rel_tol=1e-6)
    ]
    if not odd:
        return []
    return [
        f"vLLM scales every module by {general:g}, which is wrong for {len(odd)} of {len(ranks)} "
        f"(rank_pattern or alpha_pattern), first {min(odd)}"
    ]


def _command(adapter: Path, config: dict[str, Any], largest: int) -> str:
    path = adapter.resolve()
    name = path.parent.name if path.name == "adapter" else path.name
    rank = next(value for value in MAX_LORA_RANKS if value >= largest)
    words = ["vllm", "serve"]
    if config.get("revision"):
        words += ["--revision", str(config["revision"])]
    words += ["--enable-lora", "--lora-modules", f"{name}={path}", "--max-lora-rank", str(rank)]
    base = str(config["base_model_name_or_path"])
    # A shell makes of `~` and of a variable what they stand for, unless they are quoted.
    home, rest = ("~/", base[2:]) if base.startswith("~/") else ("", base)
    shown = f'"{base}"' if REFERENCE.fullmatch(base) else home + shlex.quote(rest)
    return " ".join([*words[:2], shown, shlex.join(words[2:])])


def _remarks(adapter: Path, config: dict[str, Any]) -> list[str]:
    remarks = []
    base = str(config["base_model_name_or_path"])
    if base.lower().endswith(".gguf"):
        remarks.append(f"the base {base} is a GGUF file, which vLLM only takes in an experimental way")
    elif _QUANTIZED.search(base):
        remarks.append(f"the base {base} is quantized; vLLM must be able to load it as it is")
    if any((adapter / name).is_file() for name in ("chat_template.jinja", "tokenizer_config.json")):
        remarks.append(
            "vLLM takes the chat template from the base, not from the adapter: add --chat-template if they differ"
        )
    return remarks
