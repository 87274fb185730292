#!/usr/bin/env python
"""Compare `lorafit estimate-vram` with measured runs.

    scripts/validate_vram.py ROWS.csv [--json] [--no-trace] [--docs]

Each row says what ran and what was measured. It is mapped to the estimator's inputs by rules for its
software stack, never by its measured value; rows that can't be mapped are listed with the reason.
"""

from __future__ import annotations

import argparse
import csv
import dataclasses
import json
import re
import statistics
import sys
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from lorafit.errors import LorafitError
from lorafit.facts import ModelFacts, layout, read_facts
from lorafit.memory import Estimate, Kernel, LossPath, Setup, Sharding, Stack, estimate
from lorafit.memory.estimate import GROUPED, features_of
from lorafit.memory.static import BYTES, trained
from lorafit.plan.adapters import Full, Lora
from lorafit.recipe import LoraSection

GIB = 1 << 30
UNITS = {"GiB": GIB, "GB": 10**9, "MiB": 1 << 20, "MB": 10**6, "B": 1}
DENSE = {"gate_proj", "up_proj", "down_proj", "q_proj", "k_proj", "v_proj", "o_proj"}
ATTENTION = ("q_proj", "k_proj", "v_proj", "o_proj")
NF4 = {
    "load_in_4bit": True,
    "bnb_4bit_quant_type": "nf4",
    "bnb_4bit_use_double_quant": True,
    "bnb_4bit_compute_dtype": "bfloat16",
    "llm_int8_skip_modules": None,
}


PEFT_SUITE_LENGTH = 648
"""Tokens of the PEFT suite's longest batch, which it does not publish: the one fitted number, from one row (the plain
adapter of rank 32), which is left out of the summaries; the suite's other rows are predicted with it."""
FITTED_ROW = "34"


class Unmodelled(Exception):
    """Why a row can't be mapped."""


@dataclass(frozen=True)
class Case:
    """A row as the estimator sees it.

    Attributes:
        quantity: allocated, reserved, device (what nvidia-smi shows) or longest (the longest row that fits).
        measured: in bytes, or tokens for longest.
        capacity: of the card, in bytes; None if it can't matter.
        also: other quantities measured in the same run, in bytes.
    """

    id: str
    group: str
    setup: Setup
    quantity: str
    measured: float
    capacity: int | None
    also: dict[str, float]


# --- rows -> cases ---------------------------------------------------------------------------------


def case_of(row: dict[str, str]) -> Case:
    """The case of a row. Raises Unmodelled."""
    stack = next((build for pattern, build in STACKS if re.search(pattern, row["source"])), None)
    if stack is None:
        raise Unmodelled("no rules for this software stack")
    if not row["model"] or "kernel only" in row["model"]:
        raise Unmodelled("not a training run")
    return stack(row)


def fms(row: dict[str, str]) -> Case:
    """foundation-model-stack/fms-acceleration: HF Trainer with reentrant checkpointing.

    Every scenario packs to 4096 tokens (the column is derived from the throughput, and halved on two GPUs).
    """
    kernels: set[Kernel] = set()
    loss: LossPath = "logits_shifted" if version(row, "transformers") >= (4, 46) else "logits_upcast"
    if "foak" in row["kernels"]:
        kernels |= {"rms_norm", "rope", "cross_entropy"}
    if "liger" in row["kernels"]:
        loss = "liger"
    # SFTTrainer prepared the model itself: norms in float32, bf16 autocast (trl 0.13: peft_module_casting_to_bf16)
    prepared = row["kernels"] == "baseline-peft-bnb" and row["num_gpus"] == "1"
    autocast = "bfloat16" if prepared or "autocast" in row["dtype_quant"] else None
    stack = Stack(loss, autocast, frozenset(kernels), upcast="norms" if prepared else "none")
    lora = None
    if row["method"] != "full":
        names = [name for name in row["targets"].split() if name in DENSE]
        lora = adapter(rank_of(row), names, dropout=number_after("lora_dropout", row["notes"]))
    setup = make(row, 4096, lora, stack, checkpointing="reentrant", attention="flash_attention_2")
    if lora is None and autocast and setup.sharding == "fsdp":
        # accelerate makes trained parameters float32 under FSDP with mixed precision (accelerator.py: prepare_model)
        setup = dataclasses.replace(setup, dtype="float32", adapter_dtype="float32")
    return case(row, "fms-acceleration", setup)


def peft_suite(row: dict[str, str]) -> Case:
    """huggingface/peft method_comparison: a plain loop; padded batches, no clipping by default."""
    stack = Stack("logits", use_cache=True, keep_outputs=True)
    length = PEFT_SUITE_LENGTH if "<=768" in row["seq_len"] else int(row["seq_len"])
    method = row["method"]
    lora = None
    if method.startswith("lora"):
        kinds = ("lora-vanilla", "lora-dora", "lora-target-mlp", "lora-rslora", "lora-target")
        if not method.startswith(kinds):
            raise Unmodelled(f"a variant of LoRA that lorafit does not train ({method})")
        lora = adapter(rank_of(row), row["targets"].split("+"), use_dora="dora" in method)
    elif method == "ln_tuning":
        raise Unmodelled("LN tuning: not trained by lorafit")
    elif method != "full":
        raise Unmodelled(f"not LoRA ({method})")
    setup = make(row, length, lora, stack, checkpointing="none", attention="sdpa", masked=True)
    return case(row, "peft-suite", setup)


def fsdp_qlora(row: dict[str, str]) -> Case:
    """AnswerDotAI/fsdp_qlora: its own loop, bf16 adapters, outputs alive in the backward pass."""
    stack = Stack("logits_upcast", keep_outputs=True)
    names = [f"{name}_proj" for name in row["targets"].split("+")]
    lora = adapter(rank_of(row), names, dropout=0.1)
    setup = make(row, int(row["seq_len"]), lora, stack, checkpointing="reentrant", attention="sdpa")
    return case(row, "fsdp_qlora", dataclasses.replace(setup, adapter_dtype="bfloat16"))


def unsloth(row: dict[str, str]) -> Case:
    """docs.unsloth.ai: the longest row that fits a card, on transformers with Flash Attention 2.

    Of December 2024: the loss of transformers 4.46, and PEFT's prepare_model_for_kbit_training under bf16 autocast.
    """
    if "HF" not in row["kernels"]:
        raise Unmodelled("Unsloth's own kernels")
    stack = Stack("logits_shifted", upcast="all", autocast="bfloat16")
    lora = adapter(rank_of(row), sorted(DENSE))
    setup = make(row, int(row["seq_len"]), lora, stack, checkpointing="reentrant", attention="flash_attention_2")
    setup = dataclasses.replace(setup, optimizer="adamw_8bit")
    found = case(row, "unsloth", setup)
    capacity = round(float(row["measured"]) * GIB)  # of cards: 12 GB is 12 GiB
    return dataclasses.replace(found, quantity="longest", measured=float(row["seq_len"]), capacity=capacity)


def own(row: dict[str, str]) -> Case:
    """scripts/gpu_check: lorafit itself, with random weights of a model's shapes; the notes say of how many layers."""
    full, quantized = row["method"] == "full", row["method"] == "qlora"
    lora = None if full else LoraSection(r=rank_of(row), use_dora=row["method"] == "dora", lora_dropout=0.05)
    stack = Stack("fused", autocast=None if full else "bfloat16")
    packed = row["packing"] == "packed"
    length, rows = int(row["seq_len"]), int(row["micro_batch"])
    setup = make(row, length, lora, stack, checkpointing=row["grad_ckpt"] or "none", attention=row["attention"])
    layers = number_after("layers", row["notes"], int)
    config = {**setup.facts.config, "num_hidden_layers": layers}
    setup = dataclasses.replace(
        setup,
        facts=dataclasses.replace(setup.facts, config=config, tensors=tuple(layout(config))),
        quantization={"load_in_8bit": True} if row["method"] == "int8" else setup.quantization,
        adapter_dtype="bfloat16" if full or quantized or row["method"] == "int8" else "float32",
        optimizer=row["optimizer"],
        masked=rows > 1 and not packed,
        packed=packed,
    )
    found = case(row, "lorafit", setup)
    reserved = re.search(r"reserved ([\d.]+) GiB", row["second_measure"])
    return dataclasses.replace(found, also=found.also | ({"reserved": float(reserved[1]) * GIB} if reserved else {}))


def torchtune(row: dict[str, str]) -> Case:
    raise Unmodelled("torchtune: its own modules, compiled")


STACKS: list[tuple[str, Callable[[dict[str, str]], Case]]] = [
    ("fms-acceleration", fms),
    ("huggingface/peft", peft_suite),
    ("fsdp_qlora", fsdp_qlora),
    ("unsloth", unsloth),
    ("torchtune", torchtune),
    ("scripts/gpu_check", own),
]


def make(row: dict[str, str], length: int, lora: LoraSection | None, stack: Stack, **values: Any) -> Setup:
    quantized = "nf4" in row["dtype_quant"]
    world = int(row["num_gpus"] or 1)
    kind = row["sharding"].lower()
    sharding: Sharding = "fsdp" if "full_shard" in kind else "ddp" if world > 1 else "none"
    return Setup(
        facts=facts_of(row["model"]),
        batch=int(row["micro_batch"]),
        length=length,
        dtype="bfloat16",
        quantization=NF4 if quantized else None,
        adapter=Lora(lora) if lora else Full(),
        adapter_dtype="float32" if lora else "bfloat16",
        optimizer="adamw_torch",
        stack=stack,
        world=world,
        sharding=sharding,
        compute_capability=capability(row["gpu"]),
        **values,
    )


def facts_of(name: str) -> ModelFacts:
    try:
        return read_facts(name if "/" in name else f"meta-llama/{name}")
    except LorafitError as error:
        raise Unmodelled(str(error)) from None


def adapter(rank: int, names: list[str], dropout: float = 0.0, use_dora: bool = False) -> LoraSection:
    return LoraSection(r=rank, lora_alpha=rank, lora_dropout=dropout, target_modules=tuple(names), use_dora=use_dora)


def case(row: dict[str, str], group: str, setup: Setup) -> Case:
    measured = float(row["measured"]) * UNITS.get(row["unit"].split()[0], GIB)
    what = row["what_measured"]
    quantity = "reserved" if "reserved" in what else "device" if "smi" in what else "allocated"
    also = {}
    shown = re.search(r"nvidia-smi ([\d.]+) GiB", row["second_measure"])
    if shown:
        also["device"] = float(shown[1]) * GIB
    return Case(row["id"], group, setup, quantity, measured, memory_of(row["gpu"]), also)


def rank_of(row: dict[str, str]) -> int:
    return int(float(row["rank"]))


def number_after(word: str, text: str, kind: Any = float) -> Any:
    found = re.search(rf"{word} ([\d.]+)", text)
    if not found:
        raise Unmodelled(f"'{word}' is not stated")
    return kind(found[1])


def version(row: dict[str, str], package: str) -> tuple[int, ...]:
    found = re.search(rf"{package}\s?~?([\d.]+)", row["stack"])
    return tuple(int(part) for part in found[1].strip(".").split(".")) if found else (0,)


CARDS = {"A100-80GB": (81920, (8, 0)), "L40S": (46068, (8, 9)), "4090": (24564, (8, 9)), "H100": (81559, (9, 0))}
"""Memory (MiB, as the driver reports it) and compute capability."""


def capability(gpu: str) -> tuple[int, int]:
    return next((value[1] for name, value in CARDS.items() if name in gpu), (8, 0))


def memory_of(gpu: str) -> int | None:
    return next((value[0] << 20 for name, value in CARDS.items() if name in gpu), None)


# --- predictions ------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Prediction:
    """Bytes, or tokens for the longest row that fits."""

    allocated: float
    reserved: float
    device: float
    longest: float = 0


Method = Callable[[Setup, int | None], Estimate]


def closed(setup: Setup, capacity: int | None) -> Estimate:
    return estimate(setup, capacity)


def traced(setup: Setup, capacity: int | None) -> Estimate:
    from lorafit.engine.trace.record import estimate_by_trace

    return estimate_by_trace(setup, capacity)


def predict(case: Case, method: Method) -> Prediction:
    if case.quantity == "longest":
        longest = longest_that_fits(case, method)
        return Prediction(0, 0, 0, longest)
    found = method(case.setup, case.capacity)
    return Prediction(found.allocated, found.reserved, found.total)


def longest_that_fits(case: Case, method: Method) -> float:
    """The most tokens a row for which the card serves every request, within 1%."""
    assert case.capacity is not None
    low, high = 128, 1 << 17
    while high > low * 1.01:
        middle = round((low * high) ** 0.5)
        found = method(dataclasses.replace(case.setup, length=middle), case.capacity)
        low, high = (middle, high) if found.served else (low, middle)
    return low


def rule(setup: Setup) -> float:
    """Parameters x bytes: the base's, and for what is trained a gradient and two states of Adam."""
    bytes_each = 0.5 if setup.quantization else BYTES[setup.dtype]
    trains = sum(tensor.size * BYTES[tensor.dtype] for tensor in trained(setup))
    own = 0 if setup.adapter.trains_base else trains
    return setup.facts.parameters * bytes_each + own + 3 * trains


def accelerate_says(setup: Setup) -> float:
    """`accelerate estimate-memory`: training with Adam in the base's type (its table's last column)."""
    from accelerate.commands.estimate import estimate_training_usage
    from accelerate.utils import calculate_maximum_sizes

    from lorafit.engine.trace.record import build

    wide = dataclasses.replace(setup, adapter=Full(), quantization=None, dtype="float32", checkpointing="none")
    total, _ = calculate_maximum_sizes(build(wide, None))
    kind = "float32" if setup.dtype == "float32" else "float16"
    return max(float(value) for value in estimate_training_usage(total, kind).values())


@dataclass(frozen=True)
class Result:
    id: str
    group: str
    features: str
    having: dict[str, str]
    quantity: str
    measured: float
    predicted: dict[str, float]

    def error(self, method: str) -> float:
        return self.predicted[method] / self.measured - 1


def results_of(case: Case, methods: dict[str, Method], others: bool) -> Iterator[Result]:
    made = {name: predict(case, method) for name, method in methods.items()}
    for quantity, measured in ((case.quantity, case.measured), *case.also.items()):
        predicted = {name: getattr(prediction, quantity) for name, prediction in made.items()}
        if others and quantity in ("allocated", "reserved"):
            predicted |= {"accelerate": accelerate_says(case.setup), "rule": rule(case.setup)}
        yield Result(case.id, case.group, features(case.setup), features_of(case.setup), quantity, measured, predicted)


def features(setup: Setup) -> str:
    kind = "full" if setup.adapter.trains_base else "qlora" if setup.quantization else "lora"
    return f"{kind}{' on ' + str(setup.world) + ' GPUs, ' + setup.sharding if setup.world > 1 else ''}"


# --- the report -------------------------------------------------------------------------------------


def summary(results: list[Result], method: str) -> dict[str, Any]:
    errors = sorted(abs(result.error(method)) for result in results)
    last = min(len(errors) - 1, round(0.95 * (len(errors) - 1)))
    return {
        "rows": len(errors),
        "median": statistics.median(errors),
        "p95": errors[last],
        "bias": statistics.median(result.error(method) for result in results),
    }


def bands(results: list[Result]) -> dict[str, Any]:
    """Errors by what rows have in common, and how many rows have each feature."""
    groups: dict[tuple[str, ...], list[Result]] = {}
    for result in results:
        if result.id != FITTED_ROW and result.quantity in ("device", "reserved"):
            groups.setdefault(tuple(result.having[name] for name in GROUPED), []).append(result)
    covered: dict[str, dict[str, int]] = {}
    for having in {result.id: result.having for result in results}.values():
        for name, value in having.items():
            counts = covered.setdefault(name, {})
            counts[value] = counts.get(value, 0) + 1
    found = []
    for key, members in sorted(groups.items()):
        methods = [method for method in ("closed form", "trace") if method in members[0].predicted]
        errors = {method: round(summary(members, method)["p95"], 4) for method in methods}
        found.append({**dict(zip(GROUPED, key, strict=True)), "rows": len(members), "error": errors})
    return {"about": "made by scripts/validate_vram.py --record", "groups": found, "covered": covered}


def write_docs(file: Path, results: list[Result], skipped: list[tuple[str, str]], summaries: dict[str, Any]) -> None:
    """Put the summary and every row between the page's markers."""
    lines = ["| rows | quantity | method | rows | median | 95% | bias |", "|---|---|---|--:|--:|--:|--:|"]
    for kind, found in summaries.items():
        gpus, quantity = kind.split(", ")
        for method, figures in found.items():
            errors = f"{figures['median']:.1%} | {figures['p95']:.1%} | {figures['bias']:+.1%}"
            lines.append(f"| {gpus} | {quantity} | {method} | {figures['rows']} | {errors} |")
    lines += ["", "| row | what | quantity | measured | closed form | trace | accelerate | rule |"]
    lines.append("|--:|---|---|--:|--:|--:|--:|--:|")
    for result in results:
        size, unit = (1, " tokens") if result.quantity == "longest" else (GIB, "")
        cells = []
        for method in ("closed form", "trace", "accelerate", "rule"):
            given = method in result.predicted
            cells.append(f"{result.predicted[method] / size:.2f} ({result.error(method):+.1%})" if given else "")
        what = f"{result.group}: {result.features}"
        measured = f"{result.measured / size:.2f}{unit}"
        lines.append(f"| {result.id} | {what} | {result.quantity} | {measured} | {' | '.join(cells)} |")
    reasons: dict[str, list[str]] = {}
    for identifier, reason in skipped:
        reasons.setdefault(reason, []).append(identifier)
    lines += ["", "Not modelled:", ""]
    lines += [f"- {reason}: {', '.join(identifiers)}" for reason, identifiers in reasons.items()]
    before, begin, rest = file.read_text(encoding="utf-8").partition("<!-- validation: begin -->")
    _, end, after = rest.partition("<!-- validation: end -->")
    if not end:
        raise SystemExit(f"{file}: has no markers for the validation")
    file.write_text("\n".join([before + begin, *lines, end + after]), encoding="utf-8")


def kind_of(result: Result) -> str:
    gpus = "several GPUs" if "GPUs" in result.features else "one GPU"
    return f"{gpus}, {result.quantity}"


def read(file: Path) -> list[dict[str, str]]:
    try:
        with file.open(encoding="utf-8", newline="") as stream:
            rows = list(csv.DictReader(stream))
    except (OSError, UnicodeDecodeError, csv.Error) as error:
        raise SystemExit(f"{file}: can't be read: {error}") from None
    missing = {"id", "model", "method", "measured", "what_measured", "source"} - set(rows[0] if rows else ())
    if missing:
        raise SystemExit(f"{file}: no rows with the columns {', '.join(sorted(missing))}")
    return rows


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("rows", type=Path)
    parser.add_argument("--json", action="store_true", help="print everything as JSON")
    parser.add_argument("--no-trace", action="store_true", help="the closed form alone")
    parser.add_argument("--record", type=Path, help="write the error bands that estimates show")
    parser.add_argument("--docs", type=Path, help="write the figures into a page, between its markers")
    parser.add_argument("--others", action="store_true", help="compare with accelerate and parameters x bytes")
    options = parser.parse_args()
    rows = read(options.rows)
    methods: dict[str, Method] = {"closed form": closed}
    if not options.no_trace:
        methods["trace"] = traced
    results: list[Result] = []
    skipped: list[tuple[str, str]] = []
    for row in rows:
        try:
            case = case_of(row)
        except Unmodelled as error:
            skipped.append((row["id"], str(error)))
            continue
        except (KeyError, ValueError, TypeError, IndexError) as error:
            skipped.append((row["id"], f"a value can't be read: {error!r}"))
            continue
        applicable = {n: m for n, m in methods.items() if n != "trace" or case.setup.sharding in ("none", "ddp")}
        try:
            results += results_of(case, applicable, options.others)
        except LorafitError as error:
            skipped.append((row["id"], str(error)))
        if not options.json:
            print(f"\r{len(results)} predictions, {len(skipped)} rows left out", end="", file=sys.stderr)
    print(file=sys.stderr)
    groups: dict[str, list[Result]] = {}
    for result in results:
        if result.id != FITTED_ROW:
            groups.setdefault(kind_of(result), []).append(result)
    summaries = {
        kind: {
            method: summary(having, method)
            for method in ("closed form", "trace", "accelerate", "rule")
            if (having := [result for result in found if method in result.predicted])
        }
        for kind, found in sorted(groups.items())
    }
    if options.record:
        options.record.write_text(json.dumps(bands(results), indent=1) + "\n", encoding="utf-8")
    if options.docs:
        write_docs(options.docs, results, skipped, summaries)
    if options.json:
        print(json.dumps({"summary": summaries, "rows": [as_json(r) for r in results], "left_out": skipped}, indent=2))
    else:
        show(results, skipped, summaries)


def as_json(result: Result) -> dict[str, Any]:
    return dataclasses.asdict(result) | {"error": {name: result.error(name) for name in result.predicted}}


def show(results: list[Result], skipped: list[tuple[str, str]], summaries: dict[str, Any]) -> None:
    for result in results:
        unit, size = ("tokens", 1) if result.quantity == "longest" else ("GiB", GIB)
        cells = "  ".join(
            f"{name} {value / size:.2f} ({result.error(name):+.1%})" for name, value in result.predicted.items()
        )
        mark = "  (its length was fitted)" if result.id == FITTED_ROW else ""
        print(f"{result.id:>5} {result.features:24.24} {result.quantity:9} {result.measured / size:.2f} {unit}", end="")
        print(f"  {cells}{mark}")
    reasons: dict[str, list[str]] = {}
    for identifier, reason in skipped:
        reasons.setdefault(reason, []).append(identifier)
    for reason, identifiers in reasons.items():
        print(f"not modelled ({len(identifiers)}): {reason}: {', '.join(identifiers)}")
    for kind, found in summaries.items():
        for method, figures in found.items():
            print(
                f"{kind:28} {method:12} {figures['rows']:3} rows  median {figures['median']:.1%}  "
                f"95% {figures['p95']:.1%}  bias {figures['bias']:+.1%}"
            )


if __name__ == "__main__":
    main()
