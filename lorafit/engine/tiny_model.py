"""A smoke run's tiny model, of the real one's architecture, random; and its recipe: few rows, and what a CPU can't do
replaced."""

from __future__ import annotations

import copy
import dataclasses
import itertools
import json
import math
import re
from collections.abc import Iterator, Mapping
from importlib import resources
from pathlib import Path
from typing import Any, Literal, TypeAlias

import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import (
    AutoConfig,
    AutoModelForCausalLM,
    AutoTokenizer,
    PreTrainedConfig,
    PreTrainedModel,
    PreTrainedTokenizerBase,
    PreTrainedTokenizerFast,
)

from lorafit.engine.tokenizer import cannot_load, gguf, location
from lorafit.errors import ModelError
from lorafit.facts import ModelFacts, Tensor, hub_unreachable, read_facts
from lorafit.facts.template import inspect_template
from lorafit.plan import Plan
from lorafit.plan.adapters import adapter_of, is_skipped
from lorafit.plan.resolve import CUDA_ONLY_OPTIMIZERS
from lorafit.recipe import Recipe
from lorafit.rows import read_rows
from lorafit.text import first_line

BLOCK = 64
"""bitsandbytes quantizes blocks of so many weights, and its kernels for a CPU want rows of whole blocks."""
MOST_LAYERS = 8
MOST_HEADS = 8

Shape: TypeAlias = Literal["narrow", "even", "roomy"]
"""The hidden size: small, a small multiple of the heads, or that of all heads, for families that know no other."""
_EXPERTS = ("num_local_experts", "num_experts", "n_routed_experts", "moe_num_experts")
_SMALL = {
    "moe_intermediate_size": BLOCK,
    "shared_expert_intermediate_size": BLOCK,
    "intermediate_size_mlp": 2 * BLOCK,
    "num_experts_per_tok": 2,
    "moe_topk": 2,
    "n_group": 1,
    "topk_group": 1,
    "n_shared_experts": 1,
    "first_k_dense_replace": 1,
    "moe_layer_start_index": 1,
    "decoder_sparse_step": 2,
    "num_nextn_predict_layers": 0,
    "q_lora_rank": BLOCK,
    "kv_lora_rank": BLOCK,
    "word_embed_proj_dim": None,
}
"""Sizes that are at most so much in a tiny model. None: those follow from others."""


def shrink(config: Any, vocabulary: int, tokens: Mapping[str, int | None], least: int, shape: Shape = "narrow") -> None:
    """Make a configuration tiny, in place.

    Kept are the size and grouping of heads, positions and windows, the pattern of layers, tied embeddings and
    whatever is a switch.

    Args:
        vocabulary: the tokenizer's size.
        tokens: ids of special tokens, by their name in a configuration.
        least: of each side of a matrix, for adapters that start from its singular values.
        shape: what the hidden size is.
    """
    text = config.get_text_config()
    _shorten(text)
    _narrow(text, least, shape)
    for part in (getattr(config, name, None) for name in ("vision_config", "audio_config")):
        if part is not None and not isinstance(part, dict):
            _shorten(part)
            _narrow(part, BLOCK, shape="roomy")
    for part in {id(config): config, id(text): text}.values():
        if getattr(part, "vocab_size", None) is not None:
            part.vocab_size = vocabulary
        for name, value in vars(part).copy().items():
            if name in tokens:
                setattr(part, name, tokens[name])
            elif name.endswith(("_token_id", "_token_index")) and isinstance(value, int) and value >= vocabulary:
                setattr(part, name, None if name in ("pad_token_id", "bos_token_id") else vocabulary - 1)
    if isinstance(getattr(text, "initializer_range", None), float):  # as wide models are scaled: a loss that moves
        text.initializer_range = round(1 / math.sqrt(text.hidden_size), 4)


def _shorten(part: Any) -> None:
    """The least number of layers that shows every kind that there is."""
    layers = getattr(part, "num_hidden_layers", None)
    if not isinstance(layers, int):
        return
    patterns = {
        name: value for name, value in vars(part).items() if isinstance(value, list | tuple) and len(value) == layers
    }
    kept = min(2, layers)
    for pattern in patterns.values():
        firsts = [pattern.index(kind) + 1 for kind in pattern]
        kept = max([kept, *(first for first in firsts if first <= MOST_LAYERS)])
    if any(getattr(part, name, None) for name in _EXPERTS):
        kept = max(kept, min(layers, 3) if getattr(part, "first_k_dense_replace", 0) else 2)
    part.num_hidden_layers = kept
    for name, pattern in patterns.items():
        setattr(part, name, pattern[:kept])
    only = getattr(part, "mlp_only_layers", None)
    if only:
        part.mlp_only_layers = [index for index in only if index < kept]


def _narrow(part: Any, least: int, shape: Shape) -> None:
    """Small hidden sizes and few heads."""
    heads = getattr(part, "num_attention_heads", None)
    hidden = getattr(part, "hidden_size", None)
    if not isinstance(heads, int) or not isinstance(hidden, int):
        return
    keys = getattr(part, "num_key_value_heads", None) or heads
    size = getattr(part, "head_dim", None) or hidden // heads
    group = min(max(heads // keys, 1), MOST_HEADS)
    few = next(
        (n for n in (2, 1, 4, 8) if n <= max(keys, 1) and n * size >= least and n * group * size % BLOCK == 0), 2
    )
    few = 1 if few * group > MOST_HEADS and group * size % BLOCK == 0 and size >= least else min(few, keys)
    part.num_attention_heads = few * group
    if getattr(part, "num_key_value_heads", None) is not None:
        part.num_key_value_heads = few
    width = -(-max(BLOCK, least) // BLOCK) * BLOCK
    if shape == "even":
        width = math.lcm(width, few * group)
    if shape == "roomy" or not _sets_head_dim(part, size):
        width = few * group * size
    part.hidden_size = width
    for name in ("intermediate_size", "ffn_dim", "ffn_hidden_size"):
        if isinstance(getattr(part, name, None), int):
            setattr(part, name, max(2 * BLOCK, width))
    for name in _EXPERTS:
        if isinstance(getattr(part, name, None), int):
            setattr(part, name, min(getattr(part, name), 4))
    for name, most in _SMALL.items():
        value = getattr(part, name, None)
        if isinstance(value, int):
            setattr(part, name, width if most is None else min(value, most))


def _sets_head_dim(part: Any, size: int) -> bool:
    """Whether the size of heads can be set beside the hidden size."""
    try:
        part.head_dim = size
    except AttributeError:  # a property, computed from the hidden size
        return False
    return True


VOCABULARY = 2048
CHATML = (
    "{% if tools %}{{ '<|im_start|>system\n' }}{% for tool in tools %}{{ tool | tojson + '\n' }}{% endfor %}"
    "{{ '<|im_end|>\n' }}{% endif %}"
    "{% for message in messages %}{{ '<|im_start|>' + message['role'] + '\n' }}"
    "{% if message['reasoning_content'] %}{{ '<think>\n' + message['reasoning_content'] + '\n</think>\n' }}{% endif %}"
    "{% if message['content'] is string %}{{ message['content'] }}"
    "{% elif message['content'] %}{% for part in message['content'] %}{{ part['text'] }}{% endfor %}{% endif %}"
    "{% for call in message['tool_calls'] or [] %}{{ '<tool_call>' + (call['function'] | tojson) + '</tool_call>' }}"
    "{% endfor %}{{ '<|im_end|>\n' }}"
    "{% endfor %}{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
)
END = "<|im_end|>"
_LIKE_A_TOKEN = re.compile(r"<\|?[A-Za-z][\w/-]*\|?>|\[/?[A-Z]+\]|</s>")


def own_tokenizer(facts: ModelFacts, revision: str | None) -> PreTrainedTokenizerBase | None:
    """The model's own tokenizer; None where the hub or its cache does not give it. Raises ModelError for local ones."""
    local = facts.kind in ("folder", "gguf")
    if facts.kind == "bundled":
        return None
    hub: dict[str, Any] = {} if local else {"revision": revision, "local_files_only": hub_unreachable() is not None}
    try:
        tokenizer: PreTrainedTokenizerBase = AutoTokenizer.from_pretrained(
            *location(facts.name), **gguf(facts.name), **hub, trust_remote_code=False
        )
    except Exception as error:
        if local:
            raise cannot_load("tokenizer", facts.name, error) from error
        return None
    return tokenizer


def small_tokenizer(template: str | None) -> PreTrainedTokenizerBase:
    """A small byte-level tokenizer, the same every time, that knows the control tokens of the recipe's template.

    It is made from lorafit's own texts, not from the data, so that a change of the data changes the rows alone.
    """
    found = inspect_template(template, {}) if template else None
    end = found.end_of_turn if found and _LIKE_A_TOKEN.fullmatch(found.end_of_turn or "") else END
    control = dict.fromkeys(("<|endoftext|>", "<|im_start|>", END, *_LIKE_A_TOKEN.findall(template or "")))
    inner = Tokenizer(models.BPE())
    inner.pre_tokenizer = pre_tokenizers.Sequence(
        [pre_tokenizers.Digits(individual_digits=True), pre_tokenizers.ByteLevel(add_prefix_space=False)]
    )
    inner.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=VOCABULARY,
        special_tokens=list(control),
        initial_alphabet=sorted(pre_tokenizers.ByteLevel.alphabet()),
        show_progress=False,
    )
    inner.train_from_iterator(_texts(), trainer)
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=inner, bos_token="<|endoftext|>", eos_token=end, pad_token="<|endoftext|>"
    )
    tokenizer.chat_template = template or CHATML
    return tokenizer


def _texts() -> Iterator[str]:
    text = resources.files("lorafit.engine.evaluate").joinpath("texts/general.jsonl").read_text(encoding="utf-8")
    for line in text.splitlines():
        yield json.loads(line)["text"]


SEED = 0


def write_tiny_model(
    facts: ModelFacts, tokenizer: PreTrainedTokenizerBase, recipe: Recipe, folder: Path
) -> tuple[ModelFacts, dict[str, int]]:
    """Write the model and its tokenizer; returns its facts and sizes. Raises ModelError if there is no such model."""
    try:
        model = _built(facts, tokenizer, max(BLOCK, adapter_of(recipe).least_width))
    except ModelError:
        raise
    except Exception as error:
        raise ModelError(
            f"{facts.name}: no tiny model of the kind {facts.model_type} can be made: {first_line(error)}"
        ) from error
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    text = model.config.get_text_config()
    sizes = {
        "parameters": sum(parameter.numel() for parameter in model.parameters()),
        "layers": text.num_hidden_layers,
        "hidden_size": text.hidden_size,
        "vocab_size": text.vocab_size,
    }
    tiny = read_facts(str(folder))
    if text is not model.config:  # stored under other names than it has in memory
        named = tuple(Tensor(name, tuple(parameter.shape)) for name, parameter in model.named_parameters())
        tiny = dataclasses.replace(tiny, tensors=named)
    return tiny, sizes


def _built(facts: ModelFacts, tokenizer: PreTrainedTokenizerBase, least: int) -> PreTrainedModel:
    """The smallest that works: some families know no size of heads but the hidden size divided among them."""
    shapes: tuple[Shape, ...] = ("narrow", "even", "roomy")
    for shape in shapes:
        config = _configuration(facts)
        shrink(config, _vocabulary(tokenizer), _special_ids(tokenizer), least, shape)
        try:
            return _checked(config)
        except Exception:
            if shape == shapes[-1]:
                raise
    raise AssertionError


def _configuration(facts: ModelFacts) -> PreTrainedConfig:
    values = copy.deepcopy(facts.config)
    for name in ("quantization_config", "auto_map", "_name_or_path", "dtype", "torch_dtype"):
        values.pop(name, None)
    kind = values.pop("model_type", None)
    try:
        return AutoConfig.for_model(kind, **values)
    except Exception as error:
        raise ModelError(
            f"{facts.name}: transformers can't use its configuration, and code of the model's own is not run here: "
            f"{first_line(error)}"
        ) from error


def _checked(config: PreTrainedConfig) -> PreTrainedModel:
    """The model, after it ran once."""
    config.validate()
    torch.manual_seed(SEED)
    model = AutoModelForCausalLM.from_config(config, dtype=torch.float32)
    with torch.no_grad():
        model.eval()(input_ids=torch.arange(4)[None])
    return model


def _vocabulary(tokenizer: PreTrainedTokenizerBase) -> int:
    return -(-len(tokenizer) // BLOCK) * BLOCK


def _special_ids(tokenizer: PreTrainedTokenizerBase) -> dict[str, int | None]:
    return {f"{name}_token_id": getattr(tokenizer, f"{name}_token_id") for name in ("bos", "eos", "pad")}


LEAST_ROWS, MOST_ROWS = 64, 256
HELD_OUT_ROWS = 8
CPU_OPTIMIZER = "adamw_torch_fused"


@dataclasses.dataclass(frozen=True)
class Replaced:
    """A setting that can't be, or need not be, as the recipe has it."""

    key: str
    asked: Any
    used: Any
    why: str

    def __str__(self) -> str:
        return f"{self.key}: {self.asked} -> {self.used} ({self.why})"


@dataclasses.dataclass
class Draft:
    """Recipe values in the making, and what was replaced in them."""

    values: dict[str, Any]
    replaced: list[Replaced] = dataclasses.field(default_factory=list)

    def section(self, name: str) -> dict[str, Any]:
        section: dict[str, Any] = self.values.setdefault(name, {})
        return section

    def replace(self, key: str, asked: Any, used: Any, why: str) -> None:
        """Set a value, and note it if that changes what happens."""
        section, _, name = key.rpartition(".")
        (self.section(section) if section else self.values)[name] = used
        if asked != used:
            self.replaced.append(Replaced(key, asked, used, why))


@dataclasses.dataclass(frozen=True)
class Size:
    """Rows in a pass, passes in a step, the most tokens in a row, rows read of each source.

    Attributes:
        tokens: in a pass, roughly.
    """

    batch: int
    accumulation: int
    max_length: int
    rows: int
    tokens: int


def smoke_recipe(
    recipe: Recipe, meant: Plan, real: ModelFacts, tiny: ModelFacts, steps: int, size: Size, folder: str, stand_in: bool
) -> tuple[Recipe, tuple[Replaced, ...]]:
    """The recipe to train, and what is not as asked.

    Args:
        meant: the plan of the recipe for the hardware that it is meant for, whose choices are kept.
        folder: for the run directory.
        stand_in: whether the tokenizer is not the model's.
    """
    draft = Draft(recipe.model_dump(mode="json", exclude_unset=True))
    for name in ("merge", "eval", "hardware"):
        draft.values.pop(name, None)
    draft.values["output_dir"] = folder
    _model(draft, meant, tiny)
    _quantization(draft, recipe, tiny)
    for key, asked, used, why in adapter_of(recipe).reduced(real, tiny, size.tokens):
        draft.replace(key, asked, used, why)
    _training(draft, recipe, meant, steps, size)
    _dataset(draft, recipe, size, stand_in)
    return Recipe.of(draft.values, "the recipe as a smoke run has it"), tuple(draft.replaced)


def _model(draft: Draft, meant: Plan, tiny: ModelFacts) -> None:
    section = draft.section("model")
    for name in ("revision", "trust_remote_code"):
        section.pop(name, None)
    section["name_or_path"] = tiny.name
    kernel = meant.attention
    if meant.start_from is not None:
        draft.replace("start_from", meant.start_from, None, "the tiny model has an adapter of its own")
    draft.replace("model.dtype", meant.dtype, "float32", "the same on every CPU")
    if meant.model.kernels:
        draft.replace("model.use_kernels", meant.model.kernels, {}, "needs a CUDA GPU")
    if kernel.startswith("flash"):
        draft.replace("model.attn_implementation", kernel, "auto", "needs a CUDA GPU")


def _quantization(draft: Draft, recipe: Recipe, tiny: ModelFacts) -> None:
    quantization = recipe.quantization
    if quantization is None:
        return
    key = "quantization.bnb_4bit_compute_dtype"
    if quantization.bnb_4bit_compute_dtype not in ("auto", "float32"):
        draft.replace(key, quantization.bnb_4bit_compute_dtype, "float32", "the same on every CPU")
    asked = quantization.llm_int8_skip_modules
    if asked is not None:
        kept = [name for name in asked if any(is_skipped(module, [name]) for module in tiny.quantizable)]
        draft.replace("quantization.llm_int8_skip_modules", list(asked), kept, "the tiny model has no more of them")


def _training(draft: Draft, recipe: Recipe, meant: Plan, steps: int, size: Size) -> None:
    training, planned = recipe.training, meant.training
    section = draft.section("training")
    for name in ("global_batch_size", "num_train_epochs", "warmup_steps", "report_to", "dataloader_num_workers"):
        section.pop(name, None)
    section |= {"max_steps": steps, "logging_steps": 1, "gradient_checkpointing": planned.gradient_checkpointing}
    why = "a tiny model on a CPU takes more for too long"
    batch, passes = planned.per_device_train_batch_size, planned.gradient_accumulation_steps
    draft.replace("training.per_device_train_batch_size", batch, size.batch, why)
    draft.replace("training.gradient_accumulation_steps", passes, size.accumulation, why)
    draft.replace("training.max_length", meant.data.max_length, size.max_length, why)
    if recipe.dataset.validation is not None:
        section["per_device_eval_batch_size"] = min(planned.per_device_eval_batch_size, HELD_OUT_ROWS)
    if any(part in planned.optim for part in CUDA_ONLY_OPTIMIZERS):
        draft.replace("training.optim", planned.optim, CPU_OPTIMIZER, "needs a CUDA GPU")
    else:
        section["optim"] = planned.optim
    if training.warmup_steps is not None:
        draft.replace(
            "training.warmup_steps", training.warmup_steps, min(training.warmup_steps, steps // 2), "few steps"
        )
    for what, later in (("eval", "no"), ("save", "auto")):
        if getattr(planned, f"{what}_strategy") in ("no", "steps"):
            every = section.get(f"{what}_steps")
            if every is not None:
                draft.replace(f"training.{what}_steps", every, min(every, steps), f"{steps} steps in all")
        elif recipe.dataset.validation is not None or later == "auto":
            section |= {f"{what}_strategy": "steps", f"{what}_steps": steps, f"{what}s_per_epoch": None}
    if training.metric_for_best_model is not None:
        why = "a tiny random model answers nothing"
        draft.replace("training.metric_for_best_model", training.metric_for_best_model, None, why)
    if training.early_stopping_patience is not None:
        draft.replace("training.early_stopping_patience", training.early_stopping_patience, None, "every step is run")
    if training.report_to:
        draft.replace("training.report_to", list(training.report_to), [], "nothing is reported")


_OF_LENGTH = ("truncated", "lost_tokens", "answers_cut_off")


def _dataset(draft: Draft, recipe: Recipe, size: Size, stand_in: bool) -> None:
    dataset = draft.section("dataset")
    dataset["train"] = [first_rows(source, size.rows) for source in dataset["train"]]
    held_out = recipe.dataset.validation
    if isinstance(held_out, tuple):
        dataset["validation"] = [first_rows(source, HELD_OUT_ROWS) for source in dataset["validation"]]
    elif held_out is not None:
        dataset["validation"] = min(held_out, HELD_OUT_ROWS / size.rows)
    if stand_in or size.max_length < recipe.training.max_length:
        why = "rows have other lengths in a stand-in's tokens" if stand_in else "max_length is not the recipe's"
        audit = dataset.setdefault("audit", {})
        for rule in _OF_LENGTH:
            asked = getattr(recipe.dataset.audit, rule)
            if asked is not None:
                audit[rule] = None
                draft.replaced.append(Replaced(f"dataset.audit.{rule}", asked, None, why))


def first_rows(source: dict[str, Any], rows: int) -> dict[str, Any]:
    """A source of which no more rows are read."""
    return source | {"max_rows": min(source.get("max_rows") or rows, rows)}


TOKENS_PER_STEP = 4096
LOGITS_PER_STEP = 1 << 28
ATTENTION_PER_PASS = 1 << 33
"""What a step may have, so that a run takes seconds: tokens, tokens x vocabulary, and, of packed rows, which are one
long row to a CPU's attention, tokens x tokens x width of all layers' queries."""
BYTES_PER_TOKEN = 3


def size_for(meant: Plan, tiny: ModelFacts, steps: int) -> Size:
    """How much of the planned batch a CPU does in a second or two."""
    batch = meant.training.per_device_train_batch_size
    passes = meant.training.gradient_accumulation_steps
    longest = meant.data.max_length
    row = min(_row_tokens(meant), longest)
    width = longest if meant.data.packing else row
    limit = min(TOKENS_PER_STEP, LOGITS_PER_STEP // int(tiny.text_config["vocab_size"]))
    at_once = min(limit, math.isqrt(ATTENTION_PER_PASS // _queries(tiny)) // 256 * 256) if meant.data.packing else limit
    while batch * width > at_once and batch > 1:
        batch = -(-batch // 2)
    while batch * passes * width > limit and passes > 1:
        passes = -(-passes // 2)
    if width > at_once:
        longest = at_once
    needed = steps * batch * passes * (longest / row if meant.data.packing else 1)
    rows = int(min(max(needed, LEAST_ROWS), MOST_ROWS))
    return Size(batch, passes, longest, rows, batch * (longest if meant.data.packing else row))


def _queries(tiny: ModelFacts) -> int:
    """The width of the queries of all layers together."""
    config, hidden = tiny.text_config, int(tiny.text_config.get("hidden_size", 64))
    heads = int(config.get("num_attention_heads") or 1)
    return (tiny.layers or 2) * heads * int(config.get("head_dim") or -(-hidden // heads))


def _row_tokens(meant: Plan) -> int:
    """Tokens of a row, roughly."""
    lengths = [
        len(json.dumps(row.fields, ensure_ascii=False, default=str).encode("utf-8", "replace")) // BYTES_PER_TOKEN
        for source in meant.data.train
        if source.hub is None
        for row in itertools.islice(read_rows(source.path), LEAST_ROWS)
    ]
    return max(sum(lengths) // len(lengths), 1) if lengths else meant.data.max_length
