"""What may be trained of a model, and what follows from it: one description for each tuner, which everybody asks.

Below them: which modules get an adapter, checked against the model's real names.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any, ClassVar, Literal

from lorafit.bounds import read_json, within
from lorafit.errors import ModelError, UsageError
from lorafit.facts import ModelFacts, Tensor
from lorafit.recipe import LoraSection, Recipe
from lorafit.recipe.rules import Complaint
from lorafit.text import near
from lorafit.tree import KeyPath

OUTPUT_HEADS = ("lm_head", "embed_out")
MAGNITUDE = "lora_magnitude_vector"
"""Part of the names of DoRA's magnitudes, which stay float32 whatever the adapter's type."""
PRESETS = ("all-linear", "attention", "mlp", "qv")
_ATTENTION = re.compile(r"(^|\.)(self_attn|self_attention|attention|attn)(\.|$)")
_QV = {"q_proj", "v_proj", "query", "value", "q_lin", "v_lin"}
_LAYER = re.compile(r"\.(\d+)\.")


Reduced = tuple[str, Any, Any, str]
"""A key of the recipe, its value, the one that a tiny model on a CPU can have, and why."""
_FROM_VALUES = ("pissa", "olora", "eva", "orthogonal")
"""Starts that take the rank out of a weight's or an input's own directions."""


class TargetError(ValueError):
    """Targets that don't match; `path` is where in the recipe, or in its section for the adapter."""

    def __init__(self, path: KeyPath, message: str) -> None:
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


@dataclass(frozen=True)
class Full:
    """Training in full: the base's own weights are trained, and nothing stands beside them."""

    name: ClassVar[str] = "full"
    source: ClassVar[str] = ""
    unordered: ClassVar[tuple[str, ...]] = ()
    scaling: ClassVar[tuple[str, ...]] = ()
    trains_base: ClassVar[bool] = True
    result: ClassVar[Literal["trained"]] = "trained"
    title: ClassVar[str] = "full training"
    scale: ClassVar[None] = None
    formula: ClassVar[str] = ""
    rank: ClassVar[None] = None
    variant: ClassVar[str] = "plain"
    drops: ClassVar[bool] = False
    least_width: ClassVar[int] = 1
    loraplus_lr_ratio: ClassVar[None] = None

    def described(self, base: str = "") -> str:
        return "all parameters"

    def arguments(self, targets: Targets | None) -> None:
        return None

    def complaints(self, facts: ModelFacts, device: str) -> Iterator[Complaint]:
        return iter(())

    def targets(self, facts: ModelFacts) -> None:
        return None

    def tensors(self, facts: ModelFacts, targets: Targets | None, dtype: str = "") -> Iterator[Tensor]:
        return (replace(tensor, dtype=dtype) for tensor in facts.tensors)

    def copies(self, module: str) -> bool:
        return False

    def owns(self, parameter: str) -> bool:
        return False

    def reduced(self, real: ModelFacts, tiny: ModelFacts, tokens: int) -> Iterator[Reduced]:
        return iter(())


@dataclass(frozen=True)
class Lora:
    """LoRA and its relatives: DoRA, rank-stabilized scaling, LoRA+, and other starts."""

    section: LoraSection

    name: ClassVar[str] = "lora"
    source: ClassVar[str] = "peft/tuners/lora/layer.py"
    unordered: ClassVar[tuple[str, ...]] = (
        "target_modules",
        "exclude_modules",
        "modules_to_save",
        "layers_to_transform",
    )
    scaling: ClassVar[tuple[str, ...]] = ("r", "lora_alpha", "use_rslora")
    trains_base: ClassVar[bool] = False
    result: ClassVar[Literal["adapter"]] = "adapter"

    @property
    def title(self) -> str:
        return f"LoRA r={self.section.r}"

    @property
    def scale(self) -> float:
        return self.section.lora_alpha / (self.section.r**0.5 if self.section.use_rslora else self.section.r)

    @property
    def formula(self) -> str:
        return "lora_alpha / sqrt(r)" if self.section.use_rslora else "lora_alpha / r"

    @property
    def rank(self) -> int:
        return self.section.r

    @property
    def variant(self) -> str:
        return "dora" if self.section.use_dora else "plain"

    @property
    def drops(self) -> bool:
        return self.section.lora_dropout > 0

    @property
    def least_width(self) -> int:
        lora = self.section
        if not str(lora.init_lora_weights).startswith(_FROM_VALUES):
            return 1
        return max((lora.r, *lora.rank_pattern.values()))

    def described(self, base: str = "") -> str:
        lora = self.section
        kind = "DoRA" if lora.use_dora else "rsLoRA" if lora.use_rslora else "LoRA"
        return f"{kind}{base}, r {lora.r}, alpha {lora.lora_alpha:g}"

    @property
    def loraplus_lr_ratio(self) -> float | None:
        return self.section.loraplus_lr_ratio

    def complaints(self, facts: ModelFacts, device: str) -> Iterator[Complaint]:
        lora = self.section
        if facts.tensors:
            if lora.init_lora_weights == "loftq" and device == "cpu":
                yield ("lora", "init_lora_weights"), "PEFT computes loftq on a GPU, and this is a CPU; use true"
            return
        if lora.target_modules in ("attention", "mlp", "qv"):
            yield (
                ("lora", "target_modules"),
                f"can't be expanded for a {facts.model_type} model without its safetensors headers; use all-linear",
            )
        if isinstance(lora.target_modules, str) and lora.layers_to_transform is not None:
            yield ("lora", "layers_to_transform"), "needs a list of target_modules for this model"

    def targets(self, facts: ModelFacts) -> Targets:
        try:
            targets = find_targets(self.section, facts)
            check_modules_to_save(self.section, facts)
        except TargetError as error:
            raise TargetError(("lora", *error.path), str(error)) from None
        return targets

    def tensors(self, facts: ModelFacts, targets: Targets | None, dtype: str = "") -> Iterator[Tensor]:
        for tensor in _trained_tensors(self.section, targets or find_targets(self.section, facts), facts):
            yield replace(tensor, dtype="float32" if MAGNITUDE in tensor.name else dtype)

    def copies(self, module: str) -> bool:
        return _is_saved(module, self.section)

    def owns(self, parameter: str) -> bool:
        return "lora_" in parameter or "modules_to_save" in parameter

    def reduced(self, real: ModelFacts, tiny: ModelFacts, tokens: int) -> Iterator[Reduced]:
        return _reduced(self.section, real, tiny, tokens)

    def arguments(self, targets: Targets | None) -> dict[str, Any]:
        names = {"target_modules": list(targets.names)} if targets else {}
        given = self.section.model_dump(mode="json", exclude={"loraplus_lr_ratio"})  # all but that are LoraConfig's
        given |= {"lora_alpha": _whole(given["lora_alpha"])}  # as PEFT writes it
        given |= {"alpha_pattern": {key: _whole(value) for key, value in given["alpha_pattern"].items()}}
        return given | names | {"task_type": "CAUSAL_LM"}


Adapter = Full | Lora
ADAPTERS: tuple[type[Adapter], ...] = (Full, Lora)
"""What is trained of a model. Every description answers the same questions:

`name`: of its section in the recipe and of its module in lorafit.engine.adapters; `source`: of what it computes, in
PEFT; `unordered`: keys of its section whose lists have no order; `trains_base`: whether the base's own weights are
trained: then they can't be quantized, and there is nothing to merge; `result`: what a run's result is called in
evaluations; `title` and `described(base)`: for people; `scale`: what the update is multiplied by, by which `formula` of
the `scaling` keys; `rank`; `variant`: what measured runs are told apart by; `drops`: whether its inputs are dropped
out; `least_width`: what no side of an adapted matrix may be below; `loraplus_lr_ratio`: how much faster its B matrices
learn; `complaints(facts, device)`: what can't be carried out there; `targets(facts)`: the adapted modules (raises
TargetError, with the place in the recipe); `tensors(facts, targets, dtype)`: every tensor that is trained, in its type;
`copies(module)`: whether it trains a copy of that module of the base; `owns(parameter)`: whether a parameter of the
model is its own; `reduced(real, tiny, tokens)`: what of it a smoke run's tiny model can't have, whose pass has so many
tokens; `arguments(targets)`: what PEFT is told.
"""


def adapter_of(recipe: Recipe) -> Adapter:
    """What a recipe trains."""
    return Full() if recipe.lora is None else Lora(recipe.lora)


def adapter_told(recipe: Mapping[str, Any]) -> Adapter:
    """What a recipe trains, by its values."""
    return Full() if recipe["lora"] is None else Lora(LoraSection.model_validate(recipe["lora"]))


def _reduced(lora: LoraSection, real: ModelFacts, tiny: ModelFacts, tokens: int) -> Iterator[Reduced]:
    if lora.init_lora_weights == "loftq":
        yield "lora.init_lora_weights", "loftq", True, "PEFT computes loftq on a GPU"
    if lora.init_lora_weights == "eva" and tokens < 4 * lora.r:  # PEFT would wait for a larger pass for ever
        yield "lora.init_lora_weights", "eva", True, f"a pass has too few tokens for r = {lora.r}"
    layers = tiny.layers or 1
    few = f"the tiny model has {layers} layers"
    now = lora
    if lora.layers_to_transform is not None:
        kept_layers = [index for index in lora.layers_to_transform if index < layers] or [layers - 1]
        yield "lora.layers_to_transform", list(lora.layers_to_transform), kept_layers, few
        now = now.model_copy(update={"layers_to_transform": tuple(kept_layers)})
    if not tiny.tensors or not real.tensors:
        return
    for name in ("exclude_modules", "modules_to_save"):
        asked = getattr(lora, name)
        kept = [one for one in asked or () if one in OUTPUT_HEADS or any(_is_named(each, one) for each in tiny.modules)]
        if asked is not None:
            yield f"lora.{name}", list(asked), kept or None, few
            now = now.model_copy(update={name: tuple(kept) or None})
    targets: Any = lora.target_modules
    if isinstance(targets, tuple):
        kept = [one for one in targets if any(_is_named(each, one) for each in tiny.modules)] or _leaves(lora, real)
        yield "lora.target_modules", list(targets), kept, few
        now = now.model_copy(update={"target_modules": tuple(kept)})
    elif not _matches(LoraSection(target_modules=targets), tiny):
        yield "lora.target_modules", targets, _leaves(lora, real), few
        now = now.model_copy(update={"target_modules": tuple(_leaves(lora, real))})
    now = now.model_copy(update={"rank_pattern": {}, "alpha_pattern": {}})
    for name in ("rank_pattern", "alpha_pattern"):
        patterns = getattr(lora, name)
        matching = {
            key: value for key, value in patterns.items() if _matches(now.model_copy(update={name: {key: value}}), tiny)
        }
        if patterns:
            yield f"lora.{name}", dict(patterns), matching, few


def _leaves(lora: LoraSection, facts: ModelFacts) -> list[str]:
    """The last names of the modules that are adapted."""
    return list(dict.fromkeys(module.rpartition(".")[2] for module in find_targets(lora, facts).modules))


def _matches(lora: LoraSection, facts: ModelFacts) -> bool:
    try:
        find_targets(lora, facts)
    except TargetError:
        return False
    return True


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
    saved = {module for module in chosen if _is_saved(module, lora)}
    if saved:
        _refuse_both(lora)
        chosen = [module for module in chosen if module not in saved]
        reason += f", without the {len(saved)} that modules_to_save trains in full"
    for index, name in enumerate(lora.exclude_modules or ()):
        remaining = [module for module in chosen if not _is_named(module, name)]
        if remaining == chosen and not _is_left_out(name, lora.target_modules, linear):
            raise TargetError(("exclude_modules", index), f"matches no target module{near(name, chosen)}")
        chosen = remaining
    if lora.layers_to_transform is not None:
        chosen = _in_layers(lora.layers_to_transform, chosen)
    if not chosen:
        raise TargetError(("target_modules",), "leaves no module to train")
    for pattern in ("rank_pattern", "alpha_pattern"):
        for key in getattr(lora, pattern):
            with within(partial(TargetError, (pattern, key)), "the expression"):
                found = [module for module in chosen if pattern_matches(key, module)]
            if not found:
                raise TargetError((pattern, key), f"matches no target module{near(key, chosen)}")
    return Targets(tuple(chosen), _short_names(chosen, facts), reason)


def _is_named(module: str, name: str) -> bool:
    return module == name or module.endswith(f".{name}")


def _whole(value: float) -> float:
    return int(value) if float(value).is_integer() else value


def _is_left_out(name: str, targets: Any, linear: list[str]) -> bool:
    """Whether whole paths, as `_short_names` gives them, leave out already what is to be excluded."""
    paths = isinstance(targets, tuple) and all("." in target for target in targets)
    return paths and any(_is_named(module, name) for module in linear)


def _is_saved(module: str, lora: LoraSection) -> bool:
    """Whether modules_to_save trains a module in full, so that PEFT puts no adapter on it or below it.

    PEFT's rule (peft/utils/other.py: _set_trainable) is the end of a path, not only a whole name.
    """
    parts = module.split(".")
    paths = [".".join(parts[: end + 1]) for end in range(len(parts))]
    return any(path.endswith(name) for path in paths for name in lora.modules_to_save or ())


def _refuse_both(lora: LoraSection) -> None:
    for index, name in enumerate(lora.target_modules if isinstance(lora.target_modules, tuple) else ()):
        if _is_saved(name, lora):
            raise TargetError(
                ("target_modules", index), f"'{name}' is trained in full by modules_to_save; remove it from one of them"
            )


def _by_names(names: tuple[str, ...], linear: list[str]) -> list[str]:
    for index, name in enumerate(names):
        if not any(_is_named(module, name) for module in linear):
            raise TargetError(
                ("target_modules", index), f"'{name}' matches no linear layer of the model{near(name, linear)}"
            )
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
        raise TargetError(("target_modules",), f"the model has no layers of the kind {preset}{near(preset, linear)}")
    return chosen


def _by_expression(expression: str, linear: list[str]) -> list[str]:
    try:
        with within(partial(TargetError, ("target_modules",)), "the expression"):
            pattern = re.compile(expression)
            chosen = [module for module in linear if pattern.fullmatch(module)]
    except _NO_EXPRESSION as error:
        raise TargetError(("target_modules",), f"is neither a preset nor a regular expression: {error}") from None
    if not chosen:
        hint = near(expression, linear) if expression.isidentifier() else f" such as {linear[0]}" if linear else ""
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
                ("layers_to_transform", index),
                f"there is no layer {layer}; layers run from 0 to {max(have, default=0)}",
            )
    return [m for m in modules if (match := _LAYER.search(m)) and int(match[1]) in layers]


def _short_names(chosen: list[str], facts: ModelFacts) -> tuple[str, ...]:
    """Short names if, in the whole model (its vision tower, say), they name the chosen modules only."""
    leaves = tuple(dict.fromkeys(module.rpartition(".")[2] for module in chosen))
    loaded = [module for module in facts.modules if ".experts." not in f"{module}."]  # experts are fused
    meant = {module for module in loaded if any(_is_named(module, leaf) for leaf in leaves)}
    return leaves if meant == set(chosen) else tuple(chosen)


_NO_EXPRESSION = (re.error, OverflowError, RecursionError)
"""What re.compile raises."""


def pattern_matches(key: str, module: str) -> bool:
    """PEFT's rule for rank_pattern and alpha_pattern (peft/utils/other.py: get_pattern_key)."""
    try:
        return re.match(rf"(.*\.)?({key})$", module) is not None
    except _NO_EXPRESSION:
        return False


def is_skipped(module: str, skip: Iterable[str]) -> bool:
    """Whether a module stays unquantized (transformers/quantizers/quantizers_utils.py: should_convert_module).

    Raises UsageError for an expression that takes too long.
    """
    boundary = r"(?:(?<=\.)|(?=\.|$))"
    try:
        with within(UsageError, "quantization.llm_int8_skip_modules: an expression"):
            return any(re.match(rf"(?:{key}){boundary}", module) or module.endswith(key) for key in skip)
    except _NO_EXPRESSION:
        return False


def check_expressions(config: Mapping[str, Any], modules: Iterable[str], where: str) -> None:
    """See that the expressions of an adapter's configuration end on a model's modules, as PEFT matches them.

    Raises ModelError.
    """
    whole = [config[key] for key in ("target_modules", "exclude_modules") if isinstance(config.get(key), str)]
    given = [config.get(name) for name in ("rank_pattern", "alpha_pattern")]
    keys = [key for patterns in given if isinstance(patterns, dict) for key in patterns]
    layers = config.get("layers_pattern")
    try:
        with within(ModelError, f"{where}: an expression of the adapter"):
            patterns = [re.compile(f"(?:{text})$") for text in whole]
            patterns += [re.compile(rf"(.*\.)?({key})$") for key in keys]
            names = layers if isinstance(layers, list) else [layers] if layers else []
            patterns += [re.compile(rf".*\.{name}\.(\d+)\.") for name in names]
            for module in modules:
                for pattern in patterns:
                    pattern.match(module)
    except _NO_EXPRESSION as error:
        raise ModelError(f"{where}: an expression of the adapter is none: {error}") from None


def check_adapter(adapter: Path, modules: Iterable[str]) -> None:
    """Check the expressions in the configuration of an adapter's folder. Raises as `check_expressions`."""
    check_expressions(read_json(adapter / "adapter_config.json"), modules, str(adapter))


def rank_of(lora: LoraSection, module: str) -> int:
    return next((r for key, r in lora.rank_pattern.items() if pattern_matches(key, module)), lora.r)


def _trained_tensors(lora: LoraSection, targets: Targets, facts: ModelFacts) -> Iterator[Tensor]:
    """Every tensor that an adapter trains: A (r x in) and B (out x r) of each adapted matrix, and what is asked beside.

    DoRA adds its magnitudes (one per output); `bias` adds existing biases; modules_to_save add a
    whole copy of each module.
    """
    for module in targets.modules:
        out_features, in_features = facts.linear[module].shape
        rank = rank_of(lora, module)
        yield Tensor(f"{module}.lora_A.weight", (rank, in_features))
        yield Tensor(f"{module}.lora_B.weight", (out_features, rank))
        if lora.use_dora:
            yield Tensor(f"{module}.{MAGNITUDE}.weight", (out_features,))
    adapted = set(targets.modules)
    for tensor in (*facts.tensors, *_tied_head(facts)):
        module, _, leaf = tensor.name.rpartition(".")
        if (
            _is_saved(module, lora)
            or (leaf == "bias" and lora.bias == "all")
            or (leaf == "bias" and lora.bias == "lora_only" and module in adapted)
        ):
            yield tensor


def _tied_head(facts: ModelFacts) -> tuple[Tensor, ...]:
    """The output head of a model that keeps it in the embeddings, as modules_to_save copies it."""
    if any(module.endswith(OUTPUT_HEADS) for module in facts.modules):
        return ()
    embeddings = (t for t in facts.tensors if t.name.endswith(("embed_tokens.weight", "wte.weight")))
    return tuple(Tensor("lm_head.weight", tensor.shape) for tensor in embeddings)[:1]


def check_modules_to_save(lora: LoraSection, facts: ModelFacts) -> None:
    """Raises TargetError for a module that the model does not have."""
    modules = {*facts.modules, *(tensor.name.rpartition(".")[0] for tensor in _tied_head(facts))}
    for index, name in enumerate(lora.modules_to_save or ()):
        if not any(_is_named(module, name) for module in modules):
            raise TargetError(("modules_to_save", index), f"'{name}' is no module of the model{near(name, modules)}")
