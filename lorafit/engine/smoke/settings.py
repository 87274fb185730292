"""The recipe of a smoke run: the asked one with a tiny model, few rows and steps, and what a CPU can't do replaced."""

from __future__ import annotations

import dataclasses
import itertools
import json
import math
from typing import Any

from lorafit.facts import ModelFacts
from lorafit.options import Replaced
from lorafit.plan import Plan
from lorafit.plan.adapters import adapter_of, is_skipped
from lorafit.plan.resolve import CUDA_ONLY_OPTIMIZERS
from lorafit.recipe import Recipe
from lorafit.rows import read_rows

LEAST_ROWS, MOST_ROWS = 64, 256
HELD_OUT_ROWS = 8
CPU_OPTIMIZER = "adamw_torch_fused"


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
        section, _, name = key.partition(".")
        self.section(section)[name] = used
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
    draft.replace("model.dtype", meant.dtype, "float32", "the same on every CPU")
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
            section |= {f"{what}_strategy": "steps", f"{what}_steps": steps}
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
