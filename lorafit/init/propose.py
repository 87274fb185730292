"""A first recipe for a model, its data and a GPU: every value chosen for a reason, which is written beside it."""

from __future__ import annotations

import itertools
from collections.abc import Iterator
from dataclasses import dataclass, replace
from typing import Any, cast

from lorafit.errors import DataError, DoesNotFitError, ModelError, UsageError
from lorafit.facts import ModelFacts, known_models, read_facts
from lorafit.gpus import find_gpu, parse_memory
from lorafit.hardware import Hardware, detect_cpu, detect_gpu_or_assume, hardware_of
from lorafit.init.document import Document, Line
from lorafit.init.guess import Guess, final_answers, guess
from lorafit.memory import Estimate
from lorafit.options import InitOptions
from lorafit.rows import Example, Fault, Format, Shape, data_files, is_local, read_rows, to_example
from lorafit.text import gib, near
from lorafit.vram.question import Method, Subject, solver

FIRST_ROWS = 200
MOST_ROWS = 50_000
"""Rows that are counted; beyond it only their being many matters."""
BYTES_A_TOKEN = 3
"""Fewer than most tokenizers put into one, so that rows are rather thought too long than too short."""
TOKENS_A_TURN = 8
"""What a chat template adds around a turn."""


@dataclass(frozen=True)
class Sample:
    """What was seen of a data set.

    Attributes:
        shape: how its rows are read; None where they aren't here.
        template: what makes the format's columns of them, if asked for.
        rows: their number; MOST_ROWS for as many or more, None where they aren't here.
        longest: rough tokens of the longest of the first rows.
        average: rough tokens of a row.
        faulty: what is wrong with the first row that can't be learned, of those that were looked at.
        final: the expression that finds what answers come to, where they mark it.
    """

    shape: Guess | None
    template: str | None = None
    rows: int | None = None
    longest: int | None = None
    average: float | None = None
    faulty: str | None = None
    final: str | None = None

    def source(self, path: str) -> dict[str, Any]:
        """The source in a recipe."""
        shape = self.shape
        values: dict[str, Any] = {"path": path}
        if shape is None:
            values["format"] = Line("auto", "on the hub: not looked at")
            return values
        values["format"] = Line(shape.format, shape.why)
        if shape.columns:
            values["columns"] = Line(dict(shape.columns), shape.check)
        return values | ({"template": self.template} if self.template else {})


def look(path: str, asked: InitOptions) -> Sample:
    """What a source's rows are like. Raises DataError for rows that can't be read, or not as was asked."""
    columns, template = asked.columns_by_name(), asked.template
    if not is_local(path):
        said = asked.format is not None or columns or template
        return Sample(Guess(cast(Format, asked.format or "auto"), columns, "as asked") if said else None, template)
    rows = read_rows(path)
    first = list(itertools.islice(rows, FIRST_ROWS))
    if not first:
        raise DataError(f"{path}: there are no rows")
    seen = guess(first, asked.format, columns, template)
    lengths, answers, faulty = [], [], None
    for row in first if not seen.is_open else ():
        try:
            example = to_example(row, Shape(seen.format, seen.columns, template))
        except DataError as error:
            if not isinstance(error, Fault) and asked.says_how:
                raise
            faulty = faulty or str(error)
            continue
        lengths.append(_tokens(example))
        answers += [message["content"] for message in example.messages if message["role"] == "assistant"]
        answers += [example.completion] if example.completion else []
    lengths = lengths or [0]
    count = len(first) + sum(1 for _ in itertools.islice(rows, MOST_ROWS - len(first)))
    average = sum(lengths) / len(lengths)
    return Sample(seen, template, count, max(lengths), average, faulty, final_answers(answers))


def _tokens(example: Example) -> int:
    said = [*(message["content"] for message in example.messages), example.prompt, example.completion, example.text]
    size = sum(map(_bytes, said)) + _bytes(str(example.tools) if example.tools else None)
    return size // BYTES_A_TOKEN + TOKENS_A_TURN * (len(example.messages) + 1)


def _bytes(value: Any) -> int:
    if isinstance(value, str):
        return len(value.encode("utf-8", "surrogateescape"))
    if isinstance(value, (list, dict)):
        return len(str(value))
    return 0


ROWS_A_STEP = 16
BATCHES = (4, 2, 1)
SHORTEST = 256


@dataclass(frozen=True)
class Settings:
    """What the memory decides.

    Attributes:
        estimate: None on a CPU.
        passed: what was tried before, with its GiB, and did not surely fit.
    """

    method: Method
    batch: int
    checkpointing: bool
    max_length: int
    estimate: Estimate | None = None
    passed: tuple[str, ...] = ()

    @property
    def overrides(self) -> tuple[str, ...]:
        return (
            f"training.max_length={self.max_length}",
            f"training.per_device_train_batch_size={self.batch}",
            f"training.global_batch_size={ROWS_A_STEP}",
            f"training.gradient_checkpointing={str(self.checkpointing).lower()}",
        )

    def __str__(self) -> str:
        method = "LoRA in 16 bits" if self.method == "lora" else "QLoRA"
        checkpointing = ", gradient checkpointing" if self.checkpointing else ""
        return f"{method}, {self.batch} x {self.max_length} tokens at once{checkpointing}"


def fitting(model: str, hardware: Hardware, capacity: int, max_length: int, others: tuple[str, ...]) -> Settings:
    """The first of the candidates that surely fits, beside other values that matter to memory, as overrides.

    Raises ModelError, and DoesNotFitError where none does.
    """
    solve = solver()
    passed: list[str] = []
    for one in candidates(max_length):
        subject = Subject(None, model, one.method, (*one.overrides, *others), hardware)
        estimate, verdict = solve(subject).judged(capacity)
        if verdict == "fits":
            return replace(one, estimate=estimate, passed=tuple(passed))
        passed.append(f"{one}: {gib(estimate.total)} GiB, {verdict}")
    raise DoesNotFitError(
        f"{model}: does not fit in {gib(capacity)} GiB, even with {passed[-1]}; "
        "choose a smaller model or a GPU with more memory"
    )


def candidates(max_length: int) -> Iterator[Settings]:
    """From the least lossy to the smallest."""
    yield Settings("lora", BATCHES[0], False, max_length)
    yield from (Settings("lora", batch, True, max_length) for batch in BATCHES)
    yield from (Settings("qlora", batch, True, max_length) for batch in BATCHES)
    length = max_length // 2
    while length >= SHORTEST:
        yield Settings("qlora", 1, True, length)
        length //= 2


FEW_ROWS = 50
"""Rows below which a tenth of them says nothing."""
SMALL = 2_000
DEFAULT_LENGTH = 2_048
SHORTEST_ROW = 256
LARGE_MODEL = 30_000_000_000
PACKED_BELOW = 0.5
"""Share of max_length that rows fill on average, below which they are packed."""


def first_recipe(asked: InitOptions) -> tuple[Document, tuple[str, ...]]:
    """A first recipe, and what should be said of it, where a model, data and a machine are given.

    Raises UsageError, DataError, ModelError and DoesNotFitError.
    """
    hardware, capacity = _meant(asked)
    model, data = asked.model, asked.data
    assert model is not None
    assert data is not None
    try:
        facts = read_facts(model)
    except ModelError as error:
        raise ModelError(f"{error}{near(model, known_models())}") from None
    sample = look(data, asked)
    held_out, held_out_why = _validation(asked, sample)
    length, length_why = _max_length(sample, facts)
    packing = capacity is not None and _worth_packing(sample, length)
    if capacity is None:
        settings = next(candidates(length))
    else:
        others = (f"training.packing={str(packing).lower()}", *["dataset.validation=0.1"] * (held_out is not None))
        settings = fitting(model, hardware, capacity, length, others)
    if settings.max_length < length:
        length_why = f"the longest that fits; longer rows are cut ({length} would hold the longest seen)"
    lines = (
        _model(asked, settings)
        | _dataset(asked, sample, held_out, held_out_why)
        | _training(facts, sample, settings, length_why, packing)
        | ({"eval.metrics": Line([{"extract": sample.final}])} if sample.final else {})
        | _hardware(asked)
        | {"output_dir": Line(f"runs/{asked.name or asked.file.stem}")}
    )
    memory = _memory(asked, settings)
    method = "QLoRA" if settings.method == "qlora" else "LoRA"
    title = f"{method} of {model} on {data}, for {_place(asked)}. Made by `lorafit init`."
    seen = sample.shape
    doubtful = (*seen.remarks, *([f"{data}: {seen.check}"] if seen.check else [])) if seen else ()
    if seen and seen.format == "preference":
        both = "`preference: {}` learns from both answers (recipes/dpo.yaml)"
        doubtful += (f"{data}: of each pair the chosen answer is learned; {both}",)
    faulty = (f"{sample.faulty}; `lorafit preview` counts such rows",) if sample.faulty else ()
    return Document(lines, (title, memory)), (*settings.passed, memory, *doubtful, *faulty)


def _meant(asked: InitOptions) -> tuple[Hardware, int | None]:
    """What the recipe is for, and its memory; None on a CPU."""
    if asked.cpu:
        return detect_cpu(), None
    if asked.gpu is not None:
        gpu = find_gpu(asked.gpu)
        return hardware_of(gpu), parse_memory(asked.vram) if asked.vram else gpu.memory_bytes
    assert asked.vram is not None
    return detect_gpu_or_assume(), parse_memory(asked.vram)


def _validation(asked: InitOptions, sample: Sample) -> tuple[float | list[dict[str, Any]] | None, str]:
    """The held-out rows, and why. Raises UsageError and DataError."""
    if asked.validation is None:
        if sample.rows is not None and sample.rows < FEW_ROWS:
            return None, ""
        return 0.1, "a tenth is held out: shows when the model only learns the rows by heart"
    try:
        share = float(asked.validation)
    except ValueError:
        if is_local(asked.validation):
            data_files(asked.validation)
        return [look(asked.validation, asked).source(asked.validation)], "rows of their own"
    if not 0 < share < 1:
        raise UsageError(f"--validation {asked.validation}: expected a path, or a fraction between 0 and 1 such as 0.1")
    return share, "the share of rows that is held out"


def _max_length(sample: Sample, facts: ModelFacts) -> tuple[int, str]:
    limit = facts.max_position_embeddings
    if sample.longest is None:
        chosen, why = DEFAULT_LENGTH, "the rows were not looked at"
    else:
        chosen = max(SHORTEST_ROW, 1 << (sample.longest - 1).bit_length())
        why = f"the longest of the first rows has roughly {sample.longest} tokens"
    if limit is not None and chosen > limit:
        return limit, f"the model's context; {why}"
    return chosen, why


def _worth_packing(sample: Sample, length: int) -> bool:
    many = sample.rows is not None and sample.rows >= SMALL
    return many and sample.average is not None and sample.average < PACKED_BELOW * length


def _model(asked: InitOptions, settings: Settings) -> dict[str, Line]:
    lines = {"model.name_or_path": Line(asked.model)}
    if asked.cpu:
        lines["model.dtype"] = Line("float32", "CPUs rarely have bfloat16; the same result on every machine")
    if settings.method == "qlora":
        lines["quantization.load_in_4bit"] = Line(True, "QLoRA: in 16 bits the base does not fit")
    return lines | {
        "lora.r": Line(16, "enough for most tasks; more for much new knowledge"),
        "lora.lora_alpha": Line(32, "twice r, the common convention"),
        "lora.lora_dropout": Line(0.05),
        "lora.target_modules": Line("all-linear", "better than attention alone, at modest cost"),
    }


def _dataset(asked: InitOptions, sample: Sample, held_out: Any, held_out_why: str) -> dict[str, Line]:
    assert asked.data is not None
    lines = {"dataset.train": Line([sample.source(asked.data)])}
    if held_out is not None:
        lines["dataset.validation"] = Line(held_out, held_out_why)
    text = sample.shape is not None and sample.shape.format == "text"
    learned = Line("all", "plain text has no answers") if text else Line("assistant", "only the answers are learned")
    return lines | {"dataset.loss_on": learned}


def _training(facts: ModelFacts, sample: Sample, settings: Settings, length_why: str, packing: bool) -> dict[str, Line]:
    large, saves = facts.parameters > LARGE_MODEL, settings.checkpointing
    lines = {"max_length": Line(settings.max_length, length_why)}
    if packing:
        lines["packing"] = Line(True, "rows are short: several in one")
    lines |= {
        "num_train_epochs": Line(*_epochs(sample)),
        "per_device_train_batch_size": Line(settings.batch, "rows in memory at once"),
        "global_batch_size": Line(ROWS_A_STEP, "rows a step, on any number of GPUs"),
        "learning_rate": Line(1e-4, "large models want less") if large else Line(2e-4, "usual for LoRA"),
        "lr_scheduler_type": Line("cosine"),
        "warmup_ratio": Line(0.03),
        "gradient_checkpointing": Line(
            saves, "saves memory for a third more time" if saves else "not needed here, and slower"
        ),
        "seed": Line(42),
    }
    if settings.method == "qlora":
        lines["max_grad_norm"] = Line(0.3, "a 4-bit base gives a spikier gradient")
    return {f"training.{key}": line for key, line in lines.items()}


def _epochs(sample: Sample) -> tuple[int, str]:
    if sample.rows is None:
        return 2, "how many rows there are is not known here"
    rows = f"{sample.rows} rows" if sample.rows < MOST_ROWS else f"{MOST_ROWS} rows or more"
    if sample.rows < SMALL:
        return 3 if sample.rows < SMALL // 2 else 2, f"{rows}: few are learned in 2 or 3 passes; more overfit"
    return (2, f"{rows}: rarely better with more") if sample.rows < MOST_ROWS else (1, f"{rows}: one pass is plenty")


def _hardware(asked: InitOptions) -> dict[str, Line]:
    """What the recipe is for."""
    if asked.cpu:
        return {"hardware.device": Line("cpu")}
    known = {"hardware.gpu": asked.gpu and find_gpu(asked.gpu).name, "hardware.vram": asked.vram}
    given = {key: Line(value) for key, value in known.items() if value}
    first = next(iter(given))
    return given | {first: Line(given[first].value, "what it has to fit; checked by validate and by CI")}


def _place(asked: InitOptions) -> str:
    if asked.cpu:
        return "a CPU"
    return find_gpu(asked.gpu).name if asked.gpu else f"a GPU of {asked.vram}"


def _memory(asked: InitOptions, settings: Settings) -> str:
    known = settings.estimate
    if known is None:
        return "Memory: `lorafit estimate-vram` says what it takes, and how much is free."
    return (
        f"Memory: about {gib(known.total)} GiB on the GPU, from {gib(known.least)} to {gib(known.most)} "
        f"(estimated; {_place(asked)})."
    )
