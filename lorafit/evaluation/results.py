"""What an evaluation found: the content of results.json, as types. docs/results.schema.json is made from it.

A figure is named `SET.METRIC.MODEL`, such as `heldout.exact_match.adapter`.
"""

from __future__ import annotations

from typing import Annotated, Any, Literal

from pydantic import BaseModel, ConfigDict, Field

RESULTS_VERSION: Literal[3] = 3
FEWEST = 6
"""Rows that differ: of fewer, all may fall to one side by chance more often than in 5 of 100 cases (2 * 0.5 ** 5)."""


Better = Literal["higher", "lower"] | None
"""Which way a metric should go; None: neither, such as the length of an answer."""


class Part(BaseModel):
    model_config = ConfigDict(frozen=True, extra="forbid", use_attribute_docstrings=True, protected_namespaces=())


class Metric(Part):
    """What a figure measures."""

    name: str
    label: str
    """For people, such as `exact match`."""
    unit: Literal["share", "nats", "bits", "tokens", "number", "seconds"]
    better: Better
    """None: neither, such as the length of an answer."""


Number = Annotated[float, Field(strict=True, allow_inf_nan=False)]


class Figure(Part):
    value: Number | None
    """None where no row has it."""
    low: Number | None
    """Lower end of the 95% bootstrap interval."""
    high: Number | None
    """Upper end of it."""
    rows: int
    """Rows that it is taken over."""


class Difference(Part):
    """A metric of one model minus that of another, on the same rows."""

    set: str
    metric: str
    model: str
    against: str
    value: float | None
    """model - against."""
    low: float | None
    """Lower end of the 95% interval of the paired bootstrap."""
    high: float | None
    """Upper end of it."""
    wins: int
    """Rows on which `model` is better (or higher, where neither is better)."""
    ties: int
    losses: int
    detectable: float | None
    """The smallest difference that this many rows would have shown with a probability of 80%."""

    @property
    def is_clear(self) -> bool:
        """Whether the interval leaves out zero, and enough rows differ: resamples of few rows are too sure of them."""
        if self.low is None or self.high is None or self.wins + self.losses < FEWEST:
            return False
        return self.low > 0 or self.high < 0

    @property
    def is_same(self) -> bool:
        """Whether no row differs."""
        return self.low == self.high == 0


class Gate(Part):
    """A demand and whether it was met."""

    gate: str
    """The gate as it was written, such as `heldout.loss.adapter < heldout.loss.base (ci)`."""
    where: str
    """Where it was written: `eval.gates.0`, `--fail-under` or `--baseline`; `eval` for a loss that is not finite."""
    passed: bool
    sentence: str
    """The figures in it, for people: `heldout.exact_match.adapter is 0.75, and 0.8 was demanded`."""


class Set(Part):
    """Rows that the models were run on."""

    role: Literal["task", "forgetting", "benchmark"]
    source: str
    """A path, or what the rows are in words."""
    rows: int
    """Rows of which the likelihood was measured."""
    answered: int
    """Rows for which answers were generated."""
    sha256: str | None = None
    """SHA-256 of what the rows were read from, and which of them they are; equal for every model. None: not known."""
    metrics: tuple[Metric, ...]
    """Metrics in the order in which they are shown."""


class Model(Part):
    kind: Literal["base", "adapter", "trained", "merged"]
    path: str
    """A folder or hub id."""
    sha256: str | None
    """SHA-256 of the weights of an adapter or a model; None for a base."""
    quantization: str | None
    """Such as nf4; None where the weights are not quantized."""
    dtype: str
    seconds: float
    """Time that it was run, all sets together."""


class Speed(Part):
    """How fast answers were generated, in the batches of the evaluation."""

    model: str
    set: str
    tokens_per_second: float
    """New tokens of all rows of a batch."""
    latency_median: float
    """Seconds from the start of a row's batch to the row's end token."""
    latency_p95: float


class Results(Part):
    results_version: Literal[3] = RESULTS_VERSION
    run: str
    name: str
    created: str
    """ISO time, UTC."""
    versions: dict[str, str]
    hardware: dict[str, Any]
    settings: dict[str, Any]
    """What the figures depend on: seed, max_new_tokens, limit, and the eval section as it was used."""
    models: dict[str, Model]
    """Models by name, in the order in which they are shown: base first."""
    sets: dict[str, Set]
    figures: dict[str, Figure]
    differences: tuple[Difference, ...]
    gates: tuple[Gate, ...]
    speed: tuple[Speed, ...] = ()
    baseline: str | None = None
    """The earlier results.json that gates compared with."""
    remarks: tuple[str, ...] = ()
    """What a reader should know, a sentence each."""
    files: dict[str, str] = Field(default_factory=dict)
    """Files beside this one, by what they are: samples, report, html, junit."""

    def figure(self, set_name: str, metric: str, model: str) -> Figure | None:
        return self.figures.get(f"{set_name}.{metric}.{model}")

    @property
    def first(self) -> str:
        """The model that others are compared with: the base, if it is there."""
        return next(iter(self.models))

    @property
    def failed(self) -> list[Gate]:
        return [gate for gate in self.gates if not gate.passed]


class Answer(Part):
    """What one model made of a row."""

    text: str | None = None
    """The generated answer; None where none was."""
    ended: bool | None = None
    """Whether it ended by itself rather than at max_new_tokens."""
    chosen: str | None = None
    """The option with the highest likelihood, of a row with options."""
    scores: dict[str, float]
    """This row's value by metric."""


class Sample(Part):
    """A row of samples.jsonl."""

    set: str
    row: int
    """From 0, in the order of the set."""
    place: str
    """File and line."""
    prompt: str
    expected: str
    answers: dict[str, Answer]
    """Answers by model."""
