"""Proof: the merged folder, loaded by transformers alone, against the adapter on the base it was trained on."""

from __future__ import annotations

import dataclasses
import gc
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import bitsandbytes as bnb
import torch
from transformers import AutoModelForCausalLM, BitsAndBytesConfig, PreTrainedModel, PreTrainedTokenizerBase

from lorafit.engine.data.encode import IGNORED
from lorafit.engine.evaluate.likelihood import divergence
from lorafit.engine.evaluate.sets import held_out_rows
from lorafit.engine.merge.source import Base, Source
from lorafit.engine.model import keep_gradients, load_adapter, load_base, loading, on_cpu
from lorafit.engine.tokenizer import reading
from lorafit.errors import GateError, LorafitError
from lorafit.progress import each

PROBES = (
    "The cat sat on the mat. Write a function that adds 12 and 30, and explain in one sentence why it is right: "
    "def add(a, b): return a + b\n",
    "Question: Which of the two trains arrives first, the one at 9:40 or the one at a quarter to ten? Answer: ",
    "Dear Sir or Madam,\n\nthank you for your letter of 3 May. We are sorry to hear that parcel no. 4471 was lost.",
)
"""Texts that are compared where the run held no rows out."""
KEPT_BYTES = 512 << 20
"""Bytes of logits that are kept for the comparison."""


@dataclass(frozen=True)
class Probe:
    """Token ids, and the positions whose next token is looked at."""

    ids: list[int]
    positions: list[int]


@dataclass(frozen=True)
class Figures:
    """How far a model is from the adapter, over the learned positions of the rows.

    Attributes:
        loss: mean negative log likelihood of the rows' own next tokens, in nats.
        loss_increase: over that of the adapter on its base, in nats.
        kl: mean Kullback-Leibler divergence from the adapter's distribution to the model's, in nats.
        top1: share of positions with the same most likely token.
        logit_difference: the largest, of all positions and tokens.
    """

    loss: float
    loss_increase: float
    kl: float
    kl_max: float
    top1: float
    logit_difference: float


def rows_to_compare(source: Source, tokenizer: PreTrainedTokenizerBase, count: int) -> tuple[list[Probe], str]:
    """The run's held-out rows, spread over all of them, or a few texts; and what they are, in words."""
    why = "the adapter's run is not known"
    if source.plan is not None:
        try:
            held = held_out_rows(source.plan, tokenizer, None)
        except LorafitError as error:
            why = str(error)
        else:
            chosen = torch.linspace(0, len(held) - 1, min(count, len(held))).long().unique().tolist()
            rows = []
            for index in chosen:
                ids, labels = held[index]["input_ids"], held[index]["labels"]
                rows.append(Probe(ids, [at - 1 for at, label in enumerate(labels) if label != IGNORED and at]))
            return [row for row in rows if row.positions], f"{len(rows)} held-out rows"
    rows = [Probe(ids := tokenizer(text)["input_ids"], list(range(len(ids) - 1))) for text in PROBES]
    return [row for row in rows if row.positions], f"{len(PROBES)} built-in texts ({why})"


@dataclass(frozen=True)
class Reference:
    """What the adapter on its base answers: what a merge has to give again.

    Attributes:
        logits: by row, (kept positions, vocabulary), float32.
        loss: of all positions of the rows.
        base_kl: mean divergence from the adapter's distribution to that of the base alone: how much it changes.
    """

    rows: list[Probe]
    shown: str
    logits: list[torch.Tensor]
    loss: float
    base_kl: float

    def compare(self, model: Any) -> Figures:
        """The figures of a model, which is loaded in float32."""
        loss, made = _run(model, self.rows, [len(kept) for kept in self.logits], "the merged model's answers")
        return Figures(loss, loss - self.loss, **agreement(zip(self.logits, made, strict=True)))


def agreement(pairs: Iterable[tuple[torch.Tensor, torch.Tensor]]) -> dict[str, float]:
    """`kl`, `kl_max`, `top1` and `logit_difference`, as in Figures, of a model's logits against those of another one.

    Args:
        pairs: (positions, vocabulary) of the other one and of the model, row by row.
    """
    found = []
    for mine, its in pairs:
        width = min(mine.shape[-1], its.shape[-1])  # a padded vocabulary
        mine, its = mine[:, :width], its[:, :width]
        each = divergence(mine.log_softmax(-1), its.log_softmax(-1))
        alike = (mine.argmax(-1) == its.argmax(-1)).sum()
        found.append((len(mine), float(each.sum()), float(alike), float(each.max()), float((mine - its).abs().max())))
    count, kl, top, *largest = zip(*found, strict=True)
    worst, apart = (float(torch.tensor(values, dtype=torch.double).max()) for values in largest)  # nan, if one is
    return {"kl": sum(kl) / sum(count), "kl_max": worst, "top1": sum(top) / sum(count), "logit_difference": apart}


def measure(source: Source, base: Base, rows: list[Probe], shown: str) -> Reference:
    """Run the adapter on its base as it was trained: that base's type and quantization, in float32 arithmetic."""
    model = load_adapter(as_trained(source, base), source.adapter)
    vocabulary = int(model.get_base_model().get_input_embeddings().weight.shape[0])
    each = max(KEPT_BYTES // (4 * vocabulary * len(rows)), 1)
    keep = [min(len(row.positions), each) for row in rows]
    loss, logits = _run(model, rows, keep, "the adapter's answers")
    with model.disable_adapter():
        _, of_base = _run(model, rows, keep, "the base's answers")
    return Reference(rows, shown, logits, loss, agreement(zip(logits, of_base, strict=True))["kl"])


@torch.no_grad()
def _run(model: Any, rows: list[Probe], keep: list[int], what: str) -> tuple[float, list[torch.Tensor]]:
    """The mean loss over all positions of all rows, and the logits of some positions of each."""
    model.eval()
    total, count, kept = 0.0, 0, []
    for row, width in each(zip(rows, keep, strict=True), f"comparing {what}", len(rows)):
        logits = model(input_ids=torch.tensor([row.ids]), use_cache=False).logits[0].float()
        at = torch.tensor(row.positions)
        chosen = logits[at]
        following = torch.tensor(row.ids)[at + 1]
        total += float(torch.nn.functional.cross_entropy(chosen, following, reduction="sum"))
        count += len(row.positions)
        kept.append(chosen[:width].clone())
    return total / count, kept


def as_trained(source: Source, base: Base) -> PreTrainedModel:
    """The base as the adapter was trained on it, in float32 arithmetic."""
    if source.plan is None:
        return load_merged(base.folder, None)[0]
    return in_float32(load_base(on_cpu(source.plan), base.folder))


def in_float32(model: PreTrainedModel) -> PreTrainedModel:
    """All but quantized weights as float32, with the values they have; quantized ones are multiplied in float32."""
    keep_gradients(model)
    for module in model.modules():
        if isinstance(module, bnb.nn.Linear4bit):
            module.compute_dtype, module.compute_type_is_set = torch.float32, True
    for parameter in model.parameters():
        if parameter.is_floating_point() and not isinstance(parameter, (bnb.nn.Params4bit, bnb.nn.Int8Params)):
            parameter.data = parameter.data.float()
    for name, buffer in model.named_buffers():
        if buffer.is_floating_point() and buffer.dtype != torch.float32 and "SCB" not in name:
            buffer.data = buffer.data.float()
    return model.eval()


def load_merged(folder: Path, quantization: BitsAndBytesConfig | None) -> tuple[PreTrainedModel, dict[str, Any]]:
    """A model folder by transformers alone, in float32 arithmetic, and what was missing or left over."""
    more: dict[str, Any] = {"quantization_config": quantization, "device_map": {"": "cpu"}} if quantization else {}
    with reading("merged model", folder), loading(folder):
        model, info = AutoModelForCausalLM.from_pretrained(
            str(folder), dtype="auto", output_loading_info=True, trust_remote_code=False, **more
        )
    return in_float32(model), info


def compare_folder(reference: Reference, folder: Path, quantization: BitsAndBytesConfig | None = None) -> Figures:
    """Load a folder and compare it. Raises GateError if tensors are missing or of another shape."""
    model, info = load_merged(folder, quantization)
    for what in ("missing_keys", "mismatched_keys", "error_msgs"):
        if info.get(what):
            raise GateError(
                f"{folder}: the merged model does not load cleanly: {what}: {sorted(map(str, info[what]))[:3]}"
            )
    figures = reference.compare(model)
    del model
    gc.collect()
    return figures


@dataclass
class Proof:
    """How a merge is verified, and what came of it.

    Attributes:
        level: logits, weights or none.
        reason: why so.
        figures: of each merged folder, by the kind of base weights; empty unless the level is logits.
        breaches: of the limits, a sentence each.
    """

    level: str
    reason: str
    reference: Reference | None = None
    figures: dict[str, Figures] = dataclasses.field(default_factory=dict)
    breaches: list[str] = dataclasses.field(default_factory=list)

    def compare(self, folders: dict[str, Path]) -> None:
        """Raises GateError for a folder that doesn't load cleanly."""
        if self.reference is not None:
            self.figures = {kind: compare_folder(self.reference, folder) for kind, folder in folders.items()}

    def better_of(self, kinds: list[str], limits: dict[str, float | None]) -> tuple[str, str]:
        """Choose the better kind of base weights among those that hold the limits, or among all if none does; and why.

        That is the one with the lower loss, to four digits, or at equal loss the lower KL.
        """
        assert self.reference is not None
        held = [kind for kind in kinds if not breaches(self.figures[kind], limits)]
        if len(held) == 1:
            return held[0], f"it alone holds the limits on {self.reference.shown}"
        best = min(held or kinds, key=lambda kind: (round(self.figures[kind].loss, 4), self.figures[kind].kl))
        losses = {round(self.figures[kind].loss, 4) for kind in kinds}
        what = "lower loss" if len(losses) > 1 else "same loss, and the lower KL,"
        return best, f"it has the {what} of the two on {self.reference.shown}"

    def judge(self, kind: str, limits: dict[str, float | None]) -> None:
        if self.figures:
            self.breaches = breaches(self.figures[kind], limits)


def breaches(figures: Figures, limits: dict[str, float | None]) -> list[str]:
    """What is beyond a limit, a sentence each. A figure that is not a number is beyond every limit."""
    found = []
    for name, shown, value, sign in (
        ("max_kl", "mean KL divergence from the adapter", figures.kl, 1),
        ("min_top1", "top-1 agreement with the adapter", figures.top1, -1),
        ("max_loss_increase", "loss above the adapter's", figures.loss_increase, 1),
        ("max_logit_difference", "logit difference", figures.logit_difference, 1),
    ):
        limit = limits.get(name)
        if limit is not None and not sign * value <= sign * limit:
            found.append(f"{shown} is {value:.4g}, and merge.{name} is {limit:g}")
    return found
