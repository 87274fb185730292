"""Which modules an adapter goes on, checked against the model's real names, and its exact size."""

from __future__ import annotations

import difflib
import re
from collections.abc import Callable, Iterable
from dataclasses import dataclass

from lorafit.facts import ModelFacts
from lorafit.recipe import LoraSection

PRESETS = ("all-linear", "attention", "mlp", "qv")
_ATTENTION = re.compile(r"(^|\.)(self_attn|self_attention|attention|attn)(\.|$)")
_QV = {"q_proj", "v_proj", "query", "value", "q_lin", "v_lin"}
_LAYER = re.compile(r"\.(\d+)\.")


class TargetError(ValueError):
    """Targets that don't match; `path` is where in the recipe's lora section."""

    def __init__(self, path: tuple[str | int, ...], message: str) -> None:
        super().__init__(message)
        self.path = path


@dataclass(frozen=True)
class Targets:
    """The adapted modules.

    Attributes:
        modules: full module paths, in the model's order.
        names: what PEFT is given: short names if they mean exactly these modules, else full paths.
    """

    modules: tuple[str, ...]
    names: tuple[str, ...]
    reason: str


def find_targets(lora: LoraSection, facts: ModelFacts) -> Targets:
    """Expand and check the target modules. Raises TargetError."""
    linear = list(facts.linear)
    if isinstance(lora.target_modules, tuple):
        chosen = _by_names(lora.target_modules, linear)
        reason = "the list in the recipe, each name found"
    elif lora.target_modules in PRESETS:
        chosen = _by_preset(lora.target_modules, linear)
        reason = f"{lora.target_modules} of the {len(linear)} linear layers, without the output head"
    else:
        chosen = _by_expression(lora.target_modules, linear)
        reason = "the modules whose whole path matches the expression"
    for index, name in enumerate(lora.exclude_modules or ()):
        remaining = [module for module in chosen if not _is_named(module, name)]
        if remaining == chosen:
            raise TargetError(("exclude_modules", index), f"matches no target module{_near(name, chosen)}")
        chosen = remaining
    if lora.layers_to_transform is not None:
        chosen = _in_layers(lora.layers_to_transform, chosen)
    if not chosen:
        raise TargetError(("target_modules",), "leaves no module to train")
    for pattern in ("rank_pattern", "alpha_pattern"):
        for key in getattr(lora, pattern):
            if not any(_pattern_matches(key, module) for module in chosen):
                raise TargetError((pattern, key), f"matches no target module{_near(key, chosen)}")
    return Targets(tuple(chosen), _short_names(chosen, linear), reason)


def _is_named(module: str, name: str) -> bool:
    return module == name or module.endswith(f".{name}")


def _near(name: str, modules: Iterable[str]) -> str:
    leaves = sorted({module.rpartition(".")[2] for module in modules})
    near = difflib.get_close_matches(name.rpartition(".")[2], leaves, n=3, cutoff=0.5)
    return f"; did you mean {', '.join(near)}?" if near else f"; there are {', '.join(leaves)}"


def _by_names(names: tuple[str, ...], linear: list[str]) -> list[str]:
    for index, name in enumerate(names):
        if not any(_is_named(module, name) for module in linear):
            raise TargetError(("target_modules", index), f"'{name}' matches no linear layer of the model{_near(name, linear)}")
    return [module for module in linear if any(_is_named(module, name) for name in names)]


def _by_preset(preset: str, linear: list[str]) -> list[str]:
    rules: dict[str, Callable[[str], bool]] = {
        "all-linear": lambda module: True,
        "attention": lambda module: _ATTENTION.search(module) is not None,
        "mlp": lambda module: _ATTENTION.search(module) is None and _LAYER.search(module) is not None,
        "qv": lambda module: module.rpartition(".")[2] in _QV,
    }
    chosen = [module for module in linear if rules[preset](module)]
    if not chosen:
        raise TargetError(("target_modules",), f"the model has no layers of the kind {preset}{_near(preset, linear)}")
    return chosen


def _by_expression(expression: str, linear: list[str]) -> list[str]:
    try:
        pattern = re.compile(expression)
    except re.error as error:
        raise TargetError(("target_modules",), f"is neither a preset nor a regular expression: {error}") from None
    chosen = [module for module in linear if pattern.fullmatch(module)]
    if not chosen:
        hint = _near(expression, linear) if expression.isidentifier() else f" such as {linear[0]}" if linear else ""
        only = " (one name stands in a list: [q_proj])" if expression.isidentifier() else ""
        raise TargetError(
            ("target_modules",), f"matches the whole path of no linear layer{only}{hint}; presets: {', '.join(PRESETS)}"
        )
    return chosen


def _in_layers(layers: tuple[int, ...], modules: list[str]) -> list[str]:
    have = {int(match[1]) for module in modules if (match := _LAYER.search(module))}
    for index, layer in enumerate(layers):
        if layer not in have:
            raise TargetError(
                ("layers_to_transform", index), f"there is no layer {layer}; layers run from 0 to {max(have, default=0)}"
            )
    return [m for m in modules if (match := _LAYER.search(m)) and int(match[1]) in layers]


def _short_names(chosen: list[str], linear: list[str]) -> tuple[str, ...]:
    leaves = tuple(dict.fromkeys(module.rpartition(".")[2] for module in chosen))
    meant = [module for module in linear if any(_is_named(module, leaf) for leaf in leaves)]
    return leaves if meant == chosen else tuple(chosen)


def _pattern_matches(key: str, module: str) -> bool:
    """PEFT's rule for rank_pattern and alpha_pattern (peft/utils/other.py: get_pattern_key)."""
    try:
        return re.match(rf"(.*\.)?({key})$", module) is not None
    except re.error:
        return False


def rank_of(lora: LoraSection, module: str) -> int:
    return next((r for key, r in lora.rank_pattern.items() if _pattern_matches(key, module)), lora.r)


def trainable_parameters(lora: LoraSection | None, targets: Targets | None, facts: ModelFacts) -> int:
    """Trainable parameters by formula: r (in + out) for each adapted matrix, plus what is asked beside.

    DoRA adds its magnitudes (one per output); `bias` adds existing biases; modules_to_save add a
    whole copy of each module. Without an adapter, every parameter.
    """
    if lora is None or targets is None:
        return facts.parameters
    total = 0
    for module in targets.modules:
        out_features, in_features = facts.linear[module].shape
        total += rank_of(lora, module) * (in_features + out_features)
        if lora.use_dora:
            total += out_features
    adapted = set(targets.modules)
    for tensor in facts.tensors:
        module, _, leaf = tensor.name.rpartition(".")
        saved = any(_is_named(module, name) for name in lora.modules_to_save or ())
        if saved:
            total += tensor.size
        elif leaf == "bias" and (lora.bias == "all" or (lora.bias == "lora_only" and module in adapted)):
            total += tensor.size
    return total


def check_modules_to_save(lora: LoraSection, facts: ModelFacts) -> None:
    """Raises TargetError for a module that the model does not have."""
    modules = {tensor.name.rpartition(".")[0] for tensor in facts.tensors}
    if facts.tensors and not any(module.endswith("lm_head") for module in modules):
        modules.add("lm_head")  # tied to the embeddings, so it has no tensor of its own
    for index, name in enumerate(lora.modules_to_save or ()):
        if not any(_is_named(module, name) for module in modules):
            raise TargetError(("modules_to_save", index), f"'{name}' is no module of the model{_near(name, modules)}")
