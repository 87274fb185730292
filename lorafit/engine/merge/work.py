"""One merge: what is known of its parts, what is decided, and its steps."""

from __future__ import annotations

import gc
import statistics
import time
from collections import Counter
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch

from lorafit.bounds import read_json
from lorafit.console import Console
from lorafit.engine.merge.edits import Combination
from lorafit.engine.merge.folder import TYPES, copy_tokenizer, tokenizer_folder, write_config, write_generation_config
from lorafit.engine.merge.full import merge_in_memory
from lorafit.engine.merge.quantized import RoundTrip
from lorafit.engine.merge.skeleton import Attached, NotOneByOne, attach, empty_model, match_keys, read_config, resized
from lorafit.engine.merge.source import Base, Source
from lorafit.engine.merge.stream import Merged, stream
from lorafit.engine.merge.task import Task
from lorafit.engine.merge.tensors import FLOATS, Store, write_index
from lorafit.engine.merge.verify import Proof, Reference, measure, rows_to_compare
from lorafit.engine.tokenizer import load_tokenizer, tokenizer_of
from lorafit.errors import DoesNotFitError, GateError, ModelError, UsageError
from lorafit.facts import weight_files
from lorafit.files import file_digest
from lorafit.hardware import available_memory
from lorafit.options.merge import Options
from lorafit.progress import stage
from lorafit.run.manifest import versions
from lorafit.written import References, as_written


@dataclass(frozen=True)
class Written:
    """A merged folder as it was written."""

    folder: Path
    merged: int
    targets: list[Merged]
    untied: bool
    dtype: str
    bytes: int
    seconds: float


class Work:
    """One merge: what is known of its parts, and its steps."""

    def __init__(self, options: Options, source: Source, others: list[Source], base: Base, console: Console) -> None:
        self.options, self.source, self.others, self.base, self.console = options, source, others, base, console
        self.settings = options.settings(source.plan)
        self.limits = {
            key: self.settings[key] for key in ("max_kl", "min_top1", "max_loss_increase", "max_logit_difference")
        }
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
        self._refuse(config)
        store = Store(self.base.folder)
        if not store.shards:
            raise NotOneByOne("the base has no safetensors files")
        adapters: list[tuple[Attached, float]] = []
        for source, weight in ((self.source, self.options.weight), *zip(self.others, self._weights(), strict=True)):
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
            check = self.settings["verify"] != "none"
            return Task(store, empty_model(config), adapters, combination, trip, self.dtype, check)

        self.tasks["original"] = task(None)
        if self.stored_packed:
            self.tasks["dequantized"] = self.tasks["original"]
        elif self.source.quantization is not None:
            assert self.source.plan is not None
            dtype = getattr(torch, self.source.plan.dtype)
            self.tasks["dequantized"] = task(RoundTrip(config, self.source.quantization, dtype))

    def _weights(self) -> list[float]:
        return [addition.weight for addition in self.options.additions]

    def _refuse(self, config: Any) -> None:
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
            if isinstance(start, str) and start.lower().split("_")[0] in ("pissa", "olora", "corda", "loftq"):
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
        asked = self.settings["verify"]
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
        asked = self.settings["base_weights"]
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
        rows, shown = rows_to_compare(self.source, tokenizer, self.settings["rows"])
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
            trip = None
            if kind == "dequantized":
                assert self.source.plan is not None
                assert self.source.quantization is not None
                dtype = getattr(torch, self.source.plan.dtype)
                trip = RoundTrip(read_config(self.base.folder), self.source.quantization, dtype)
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

    def report(self, written: Written, kind: str, reason: str, proof: Proof) -> dict[str, Any]:
        """What merge_report.json says."""
        reference, weights = proof.reference, self.source.adapter / "adapter_model.safetensors"
        kept = [target.kept for target in written.targets]
        if kept and statistics.median(kept) < 0.5:
            self.say(
                f"Rounding to {written.dtype} leaves {statistics.median(kept):.0%} of what the adapter changes in the "
                "middle weight: the adapter's work is partly lost in the merged model. Use the adapter itself, or "
                "--dtype float32."
            )
        if written.untied:
            self.say("embeddings and head were one tensor and are two now: the adapter treats them differently")
        report = {
            "report_version": 2,
            "verdict": _verdict(proof, self.method),
            "adapter": self.source.shown,
            "adapter_sha256": file_digest(weights) if weights.is_file() else None,
            "additions": [
                {"adapter": other.shown, "weight": weight}
                for other, weight in zip(self.others, self._weights(), strict=True)
            ],
            "weight": self.options.weight,
            "combine": {"method": self.options.combine, "density": self.options.density, "seed": self.options.seed},
            "base": {"name": self.base.name, "checked": self.base.checked},
            "base_weights": {
                "used": kind,
                "reason": reason,
                "quantization": self.source.quantization,
                "figures": {name: value.as_dict() for name, value in proof.figures.items()},
            },
            "method": {"used": self.method, "reason": self.method_reason},
            "dtype": written.dtype,
            "bytes": written.bytes,
            "seconds": round(written.seconds, 3),
            "untied": written.untied,
            "merged_weights": written.merged,
            "targets": [asdict(target) for target in written.targets],
            "verification": {
                "level": proof.level,
                "reason": proof.reason,
                "rows": reference.shown if reference else None,
                "positions": sum(len(kept) for kept in reference.logits) if reference else 0,
                "adapter": {"loss": reference.loss, "base_kl": reference.base_kl} if reference else None,
                "figures": proof.figures[kind].as_dict() if proof.figures else None,
                "exports": {},
                "limits": self.limits,
                "breaches": proof.breaches,
            },
            "remarks": self.remarks,
            "versions": versions(),
        }
        return as_written(report, self.references)


def _verdict(proof: Proof, method: str) -> str:
    if proof.breaches:
        return "Not verified: beyond the limits."
    if proof.level == "weights" and method == "full":
        return "Not verified: merged by PEFT in memory into finite numbers; neither weights nor answers were compared."
    shown = {
        "logits": "Verified: the merged model, loaded by transformers alone, answers as the adapter on its base does.",
        "weights": "Verified by weights: every target is merged and sound; answers were not compared.",
        "none": "Not verified, as asked.",
    }
    return shown[proof.level]


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
