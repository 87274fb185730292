"""`lorafit merge`, step by step: what one merge knows, decides and does."""

from __future__ import annotations

import contextlib
import gc
import os
import shutil
import time
from collections import Counter
from pathlib import Path
from typing import NoReturn

import torch
from transformers import PreTrainedConfig

from lorafit.bounds import read_json
from lorafit.console import Console
from lorafit.engine import hush_progress
from lorafit.engine.merge.edits import Combination
from lorafit.engine.merge.exports import make_exports
from lorafit.engine.merge.folder import (
    FILES,
    TYPES,
    Written,
    build_report,
    copy_tokenizer,
    tokenizer_folder,
    write_config,
    write_generation_config,
    write_report,
)
from lorafit.engine.merge.full import make_adapter, merge_in_memory
from lorafit.engine.merge.skeleton import Attached, NotOneByOne, attach, empty_model, match_keys, read_config, resized
from lorafit.engine.merge.source import Base, Source, find_base, open_source, same_base
from lorafit.engine.merge.stream import stream
from lorafit.engine.merge.task import RoundTrip, Task
from lorafit.engine.merge.tensors import FLOATS, Store, write_index
from lorafit.engine.merge.verify import Proof, Reference, measure, rows_to_compare
from lorafit.engine.tokenizer import load_tokenizer, tokenizer_of
from lorafit.errors import DoesNotFitError, GateError, ModelError, UsageError
from lorafit.export.gguf import check_gguf
from lorafit.facts import weight_files
from lorafit.files import discard, finish, partial_of, seal, settle, staged, writing
from lorafit.hardware import available_memory
from lorafit.options import MergeOptions, unverified
from lorafit.progress import stage
from lorafit.recipe.schema import MergeSection
from lorafit.recipe.start import CHANGING_STARTS
from lorafit.run.directory import located, proved_merge
from lorafit.run.summary import write_merged_card
from lorafit.written import References

# Read by torch at its first allocation: blocks of 2 MB and more in huge pages, where the system leaves that to programs
# (transparent_hugepage: madvise). Merging is mostly fresh memory: 12 s became 7.4 s for 1.5 billion parameters.
os.environ.setdefault("THP_MEM_ALLOC_ENABLE", "1")


SLACK = 64 << 20
"""Bytes of disk beside the weights: tokenizer, reports, and what file systems need."""
LIMITS = ("max_kl", "min_top1", "max_loss_increase", "max_logit_difference")
"""The settings that a merge is held to."""


def merge(options: MergeOptions, console: Console) -> Path:
    """Merge an adapter into its base, whole or not at all, and prove it.

    Returns the folder. Raises UsageError, ModelError for inputs that don't belong together,
    DoesNotFitError, and GateError: then what was written is left under the name `….unverified`.
    """
    options.check()
    hush_progress()
    if options.only_exports():
        return export(options, console)
    with contextlib.ExitStack() as stack:
        paths = [located(path) for path in (options.path, *(addition.path for addition in options.additions))]
        twice = next((path for path in paths if paths.count(path) > 1), None)
        if twice is not None:
            raise UsageError(f"{twice}: is named twice; give it one factor, with --weight or in --add")
        source = stack.enter_context(open_source(options.path))
        others = [stack.enter_context(open_source(addition.path)) for addition in options.additions]
        for other in others:
            same_base(source, other)
        destination = options.destination()
        stack.enter_context(writing(destination))
        return _merge(options, source, others, destination, console)


def export(options: MergeOptions, console: Console) -> Path:
    """Write exports of a merge that is there and was proved, without merging again; returns the merged folder.

    Raises UsageError for one that was not proved, ModelError for another adapter's, DriftError for one that changed.
    """
    merged = options.destination()
    with open_source(options.path) as source, writing(merged):
        report = proved_merge(merged, source.adapter)
        if options.llama_cpp is None:
            for remark in check_gguf(merged, merged):
                console.print(remark, style="yellow", highlight=False, soft_wrap=True)
        console.print(f"exporting {merged}, which is merged and proved already", highlight=False, soft_wrap=True)
        held = [source.run.path if source.run else source.adapter, merged]
        options.claim(held)
        seal(merged, "merge", FILES)
        try:
            make_exports(options, merged, report, None, console)
        finally:
            finish(merged)
    return merged


def _merge(options: MergeOptions, source: Source, others: list[Source], destination: Path, console: Console) -> Path:
    base = find_base(source, options.base, options.allow_other_base)
    held = [each.run.path if each.run else each.adapter for each in (source, *others)]
    options.claim([base.folder, *held, *(each.adapter for each in (source, *others))])
    merging = Merging(options, source, others, base, console)
    if base.remark:
        merging.say(base.remark)
    if options.as_adapter:
        return make_adapter(merging, destination)
    merging.prepare()
    if options.exports and options.llama_cpp is None:
        for remark in check_gguf(base.folder, merging.tokenizer, merging.vocabulary):
            merging.say(remark)
    proof = merging.choose_proof()
    kinds, reason = merging.base_kinds(proof)
    discard(partial_of(destination))  # of a merge that was killed: its space is needed
    _check_disk(destination, merging.bytes * len(kinds) + SLACK)
    with staged(destination, "merge", FILES if options.places() else ()) as folder:  # exports are added
        if proof.level == "logits":
            proof.reference = merging.measure()
        made = {kind: merging.write(kind, folder / kind if len(kinds) > 1 else folder) for kind in kinds}
        proof.compare({kind: written.folder for kind, written in made.items()})
        chosen = kinds[0]
        if len(kinds) > 1:
            chosen, reason = proof.better_of(kinds, merging.limits)
            _keep(folder, folder / chosen, kinds)
        proof.judge(chosen, merging.limits)
        report = build_report(merging, made[chosen], chosen, reason, proof)
        write_report(folder, report)
        write_merged_card(folder / "README.md", source.plan, source.manifest, report)
        if proof.breaches:
            _set_aside(folder, destination, proof.breaches, chosen, source)
    try:
        make_exports(options, destination, report, proof.reference, console)
    finally:
        finish(destination)
    return destination


def _set_aside(folder: Path, destination: Path, breaches: list[str], kind: str, source: Source) -> NoReturn:
    """Leave what was written under a name that nobody deploys. Raises GateError."""
    settle(folder, unverified(destination), "merge")
    hint = (
        "; --base-weights dequantized is what it was trained on" if kind == "original" and source.quantization else ""
    )
    raise GateError(f"{unverified(destination)}: not verified: {'; '.join(breaches)}{hint}")


def _check_disk(destination: Path, needed: int) -> None:
    place = destination.parent
    while not place.exists():
        place = place.parent
    free = shutil.disk_usage(place).free
    if free < needed:
        raise DoesNotFitError(
            f"{destination}: the merge needs {needed / 1e9:.2f} GB of disk and {free / 1e9:.2f} GB are free; make "
            "room, or choose another --output"
        )


def _keep(folder: Path, chosen: Path, kinds: list[str]) -> None:
    """Keep one of the candidates below a folder, in their place."""
    for kind in kinds:
        if folder / kind != chosen:
            shutil.rmtree(folder / kind)
    for entry in chosen.iterdir():
        entry.rename(folder / entry.name)
    chosen.rmdir()


class Merging:
    """One merge: what is known of its parts, and its steps."""

    def __init__(
        self, options: MergeOptions, source: Source, others: list[Source], base: Base, console: Console
    ) -> None:
        self.options, self.source, self.others, self.base, self.console = options, source, others, base, console
        self.settings = MergeSection.model_validate(options.settings(source.plan))
        self.limits: dict[str, float | None] = {name: getattr(self.settings, name) for name in LIMITS}
        self.remarks: list[str] = []
        self.dtype = None if options.dtype == "auto" else getattr(torch, options.dtype)
        self.tokenizer = tokenizer_folder(source.adapter, base.folder)
        if self.tokenizer is None:
            self.say(f"neither {source.adapter} nor {base.name} has a tokenizer, so the merged folder has none")
        self.tasks: dict[str, Task] = {}
        self.vocabulary: int | None = None
        self.references: References = {
            f"{number}.{key}": one
            for number, part in enumerate((source, *others))
            for key, one in (part.plan.references if part.plan else {}).items()
        }
        self.stored_packed = _stored_quantization(base.folder) == "bitsandbytes"

    def say(self, remark: str) -> None:
        self.remarks.append(remark)
        self.console.print(remark, style="yellow", highlight=False, soft_wrap=True)

    @property
    def alone(self) -> bool:
        """Whether the result should answer as one trained adapter does."""
        return not self.others and self.options.weight == 1

    # --- what is to be done

    def prepare(self) -> None:
        """Settle the method. Raises ModelError for an adapter that doesn't belong to the base."""
        self.method, self.method_reason = "stream", "tensor by tensor"
        if self.options.method == "full":
            self.method, self.method_reason = "full", "asked for"
        else:
            try:
                self._think_through()
            except NotOneByOne as reason:
                if self.options.method == "stream":
                    raise UsageError(f"{self.source.shown}: can't be merged by --method stream: {reason}") from None
                if not self.alone:
                    raise UsageError(f"{self.source.shown}: can't be combined with others: {reason}") from None
                self.method, self.method_reason = "full", str(reason)
                self.say(f"merged in memory, by PEFT: {reason}")
        if self.method == "full" and self.stored_packed:
            why = "" if self.options.method == "full" else f", and it would have to be: {self.method_reason}"
            raise UsageError(f"{self.base.name}: is stored quantized, so it can't be merged into in memory{why}")
        needed = self.tasks["original"].peak_bytes if self.tasks else 5 * self._parameters()
        available = available_memory()
        if available is not None and needed > available:
            hint = "; --method stream needs less" if self.options.method == "full" else ""
            raise DoesNotFitError(
                f"{self.source.shown}: the merge needs about {needed / 1e9:.1f} GB of memory and "
                f"{available / 1e9:.1f} GB are available{hint}"
            )

    def _think_through(self) -> None:
        config = read_config(self.base.folder)
        self._refuse()
        store = Store(self.base.folder)
        if not store.shards:
            raise NotOneByOne("the base has no safetensors files")
        adapters: list[tuple[Attached, float]] = []
        weights = (self.options.weight, *(addition.weight for addition in self.options.additions))
        for source, weight in zip((self.source, *self.others), weights, strict=True):
            rows = resized(source.adapter, config)
            if rows is not None and not self.alone:
                raise UsageError(
                    f"{source.shown}: brings a vocabulary of another size along ({rows} rows), so it can only be "
                    "merged alone, at full weight"
                )
            if rows is not None:
                config.get_text_config().vocab_size = self.vocabulary = rows
            adapters.append((attach(empty_model(config), source.adapter), weight))
        self.config = config
        combination = Combination(self.options.combine, self.options.density, self.options.seed)

        def task(trip: RoundTrip | None) -> Task:
            check = self.settings.verify != "none"
            return Task(store, empty_model(config), adapters, combination, trip, self.dtype, check)

        self.tasks["original"] = task(None)
        if self.stored_packed:
            self.tasks["dequantized"] = self.tasks["original"]
        elif self.source.quantization is not None:
            self.tasks["dequantized"] = task(self._round_trip(config))

    def _round_trip(self, config: PreTrainedConfig) -> RoundTrip:
        """What the base went through in training: loaded in the plan's type, then quantized."""
        assert self.source.plan is not None
        assert self.source.quantization is not None
        return RoundTrip(config, self.source.quantization, getattr(torch, self.source.plan.dtype))

    def _refuse(self) -> None:
        """Raises NotOneByOne for what only PEFT merges."""
        stored = _stored_quantization(self.base.folder)
        if stored not in (None, "bitsandbytes"):
            raise NotOneByOne(f"the base is stored quantized by {stored}")
        if self.source.plan is not None and self.source.plan.data.trust_remote_code:
            raise NotOneByOne("the base has code of its own")
        for source in (self.source, *self.others):
            kind, start = source.config.get("peft_type"), source.config.get("init_lora_weights")
            if kind != "LORA":
                raise NotOneByOne(f"the adapter is of PEFT's type {kind}")
            if isinstance(start, str) and start.lower().split("_")[0] in CHANGING_STARTS:
                raise NotOneByOne(
                    f"the adapter starts by {start}, which changes the base, and was not converted to plain LoRA"
                )
            if start == "lora_ga":
                self.say(
                    f"{source.shown}: starts by lora_ga, which changes the base by gradients that nobody kept: the "
                    "merge is right only if --base is that changed base, or the adapter was converted to plain LoRA"
                )

    def choose_proof(self) -> Proof:
        """How the merge is verified. Raises UsageError, DoesNotFitError for what was asked and can't be."""
        asked = self.settings.verify
        if asked in ("weights", "none"):
            return Proof(asked, "asked for")
        if not self.alone:
            if self.options.verify == "logits":
                raise UsageError("--verify logits compares with one trained adapter; a combination can't be")
            return Proof("weights", "a combination has no trained model to be compared with")
        if self.tokenizer is None:
            if asked == "logits":
                raise ModelError(f"{self.base.name}: has no tokenizer, so there is no text to compare answers on")
            return Proof("weights", "there is no tokenizer to make text for answers with")
        needed, available = 7 * self._parameters() + (1 << 30), available_memory()
        if available is not None and needed > available:
            shown = f"comparing answers needs about {needed / 1e9:.0f} GB of memory, of {available / 1e9:.0f} GB"
            if asked == "logits":
                raise DoesNotFitError(f"{self.source.shown}: {shown}; use --verify weights")
            return Proof("weights", shown)
        return Proof("logits", "asked for" if asked == "logits" else "the model fits in memory")

    def base_kinds(self, proof: Proof) -> tuple[list[str], str]:
        """What to merge into: one kind of base weights, or both to be measured; and why."""
        asked = self.settings.base_weights
        if self.stored_packed:
            if asked == "original":
                raise UsageError(
                    f"{self.base.name}: is stored quantized, so there are no original weights to merge into"
                )
            return ["dequantized"], "the base is stored quantized by bitsandbytes"
        if self.source.quantization is None:
            if self.options.base_weights == "dequantized":
                raise UsageError(
                    f"{self.source.shown}: was not trained on a quantized base, so there is nothing to dequantize"
                )
            return ["original"], "the adapter was trained on weights that were not quantized"
        if asked != "auto":
            return [asked], "asked for"
        if self.options.quantize:
            return ["original"], "a 4-bit copy is made, and rounding dequantized weights again would lose the adapter"
        if proof.level == "logits":
            return ["dequantized", "original"], ""
        return ["dequantized"], "exactly what the adapter was trained on (nothing was measured)"

    @property
    def bytes(self) -> int:
        if "original" in self.tasks:
            return self.tasks["original"].bytes
        return self._parameters() * (self.dtype.itemsize if self.dtype else 4)

    def _parameters(self) -> int:
        files = weight_files(self.base.folder) or list(self.base.folder.glob("*.bin"))
        if self.tasks:
            return self.tasks["original"].store.parameters
        return sum(file.stat().st_size for file in files if file.is_file()) // 2

    # --- the steps

    def measure(self) -> Reference:
        """The adapter's answers on the base it was trained on."""
        plan = self.source.plan
        assert self.tokenizer is not None
        tokenizer = load_tokenizer(plan, self.tokenizer) if plan else tokenizer_of(self.tokenizer)
        rows, shown = rows_to_compare(self.source, tokenizer, self.settings.rows)
        return measure(self.source, self.base, rows, shown)

    def write(self, kind: str, folder: Path) -> Written:
        """Write a whole merged folder."""
        began = time.perf_counter()
        folder.mkdir(exist_ok=True)
        if self.method == "stream":
            task = self.tasks[kind]
            with stage(f"merging into the {kind} weights", task.bytes, "bytes") as merging:
                targets = stream(task, folder, merging.advance)
            write_index(task.shards, self.base.folder, folder)
            merged, is_untied, size = len(targets), task.parted, task.bytes
        else:
            trip = self._round_trip(read_config(self.base.folder)) if kind == "dequantized" else None
            with stage(f"merging into the {kind} weights"):
                merged, is_untied = merge_in_memory(self.base.folder, self.source.adapter, folder, trip, self.dtype)
            targets, size = [], sum(file.stat().st_size for file in weight_files(folder))
            gc.collect()
        dtype_name = _main_dtype(folder)
        changed = self.method == "full" or _main_dtype(self.base.folder) != dtype_name
        write_config(self.base.folder, folder, dtype_name if changed else None, is_untied, self.vocabulary)
        if self.method == "stream":
            check_headers(self.tasks[kind], folder)
        if self.tokenizer is not None:
            copy_tokenizer(self.tokenizer, folder)
        write_generation_config(self.base.folder, folder)
        return Written(folder, merged, targets, is_untied, dtype_name, size, time.perf_counter() - began)


def check_headers(task: Task, folder: Path) -> None:
    """The written folder has every tensor that its model wants, of the right shape. Raises GateError.

    What the base lacks, too, is not asked for.
    """
    store, model = Store(folder), empty_model(read_config(folder))
    parts, _ = match_keys(model, store.tensors)
    wanted = {name: tuple(p.shape) for name, p in model.named_parameters(remove_duplicate=False)}
    for name, shape in wanted.items():
        part = parts.get(name)
        if part is None:
            known = name in task.parts or name in task.untied
            if known and model.all_tied_weights_keys.get(name) not in parts:
                raise GateError(f"{folder}: the merged model would not load cleanly: {name} is missing")
        elif part.converter is None and store.tensors[part.key].shape != shape:
            raise GateError(f"{folder}: the merged model would not load cleanly: {name} is misshapen")


def _main_dtype(folder: Path) -> str:
    """The floating type of most of a folder's weights."""
    sizes: Counter[str] = Counter()
    for tensor in Store(folder).tensors.values():
        if tensor.dtype in FLOATS:
            sizes[tensor.dtype] += tensor.size
    return TYPES[sizes.most_common(1)[0][0]] if sizes else "unknown"


def _stored_quantization(folder: Path) -> str | None:
    stored = read_json(folder / "config.json").get("quantization_config")
    return str(stored.get("quant_method", "unknown")) if isinstance(stored, dict) else None
