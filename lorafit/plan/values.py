"""The plan as a value: what was resolved, why, and how it is stored; and a plan in the making."""

from __future__ import annotations

import dataclasses
import functools
import json
import math
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, Literal, TypeVar

from lorafit.errors import DataError
from lorafit.facts import ModelFacts
from lorafit.hardware import Hardware
from lorafit.plan.adapters import Adapter, adapter_told
from lorafit.plan.methods import METHODS, SFT, Method
from lorafit.recipe import Mistake, Recipe
from lorafit.rows import Format, Shape
from lorafit.tree import KeyPath
from lorafit.written import Reference, References, as_written, at_keys, read_back, remember

PASSES = (
    *("per_device_train_batch_size", "gradient_accumulation_steps", "global_batch_size"),
    *("per_device_eval_batch_size", "gradient_checkpointing"),
)
"""Fields of `training` that decide about memory and time alone, as long as a step has as many rows."""


@dataclass(frozen=True)
class Choice:
    """A resolved value and why it is so."""

    value: Any
    reason: str


@dataclass(frozen=True)
class SourcePlan:
    """A data source with its format known.

    Attributes:
        key: where the recipe has it, such as dataset.train.0.
        format: None where only the hub can tell.
        rows: None where they were not counted.
        sha256: of a local source's files; None where they were not read.
    """

    path: str
    key: str = "dataset.train.0"
    format: Format | None = None
    columns: dict[str, str] = field(default_factory=dict)
    template: str | dict[str, str] | None = None
    weight: float = 1.0
    max_rows: int | None = None
    hub: dict[str, str | None] | None = None
    rows: int | None = None
    sha256: str | None = None

    def shape(self, format: Format) -> Shape:
        """How its rows are read."""
        return Shape(format, self.columns, self.template, self.key)


@dataclass(frozen=True)
class DataPlan:
    """What is read, and how it becomes tokens.

    Attributes:
        shuffle: whether rows are mixed before they are packed, and a stream is shuffled.
        audit: the limits, by rule.
        date: the day that a chat template writes, if it writes one.
        tokenizer_sha256: of the tokenizer's files; None where they are not there yet.
        chat_template_kwargs: values of the chat template's variables.
        vocab_size: rows of the model's embedding; None where that is not known.
        method: what its tokens are for, by its name in METHODS.
    """

    train: tuple[SourcePlan, ...]
    validation: tuple[SourcePlan, ...]
    validation_fraction: float | None
    loss_on: str
    max_length: int
    packing: bool
    seed: int
    chat_template: str | None
    trust_remote_code: bool
    min_length: int | None = None
    excess_length_strategy: str = "truncate"
    streaming: bool = False
    shuffle: bool = True
    audit: dict[str, float | None] = field(default_factory=dict)
    date: str | None = None
    tokenizer_sha256: str | None = None
    chat_template_kwargs: dict[str, Any] = field(default_factory=dict)
    vocab_size: int | None = None
    method: str = SFT.name


@dataclass(frozen=True)
class Schedule:
    """Counts that follow from the number of training rows."""

    steps_per_epoch: int
    total_steps: int
    eval_steps: int | None
    save_steps: int | None


@dataclass(frozen=True)
class ModelPlan:
    """The base model.

    Attributes:
        kind: hub, bundled, folder or gguf, as its facts say.
        source: where the facts are from.
        trainable_parameters: by formula; 0 where the model's tensors are not known.
        kernels: of the hub, by the layer that they take the place of, as ORG/REPO@COMMIT:LAYER.
    """

    name_or_path: str
    kind: str
    source: str
    model_type: str
    parameters: int
    trainable_parameters: int
    adapted_modules: int
    kernels: dict[str, str] = field(default_factory=dict)


@dataclass(frozen=True)
class Stage:
    """A training that came before.

    Attributes:
        path: of what it left, as the recipe that starts from it names it.
        kind: `adapter`: it goes on; `model` and `merged`: it is the base of what comes after.
        base: what it was trained on, as its own recipe names it; None where that is not known.
        sha256: of its weights, as lorafit.facts.fingerprint's `weights_digest` gives it.
    """

    path: str
    kind: Literal["adapter", "model", "merged"]
    base: str | None
    sha256: str


@dataclass(frozen=True)
class Preference:
    """How pairs are learned, by the names of the recipe's section.

    Attributes:
        loss_type: at least one.
        loss_weights: one for each loss.
    """

    method: str
    loss_type: tuple[str, ...]
    loss_weights: tuple[float, ...]
    beta: float
    label_smoothing: float
    reference: Literal["start", "base"]


@dataclass(frozen=True)
class Training:
    """What lorafit itself reads of `training_kwargs`, by their names there; max_steps is -1 where epochs are given."""

    num_train_epochs: float
    max_steps: int
    per_device_train_batch_size: int
    per_device_eval_batch_size: int
    gradient_accumulation_steps: int
    learning_rate: float
    warmup_steps: float
    optim: str
    max_grad_norm: float
    gradient_checkpointing: bool
    seed: int
    eval_strategy: Literal["no", "steps", "epoch"]
    eval_steps: int | None
    evals_per_epoch: int | None
    save_strategy: Literal["no", "steps", "epoch", "auto"]
    save_steps: int | None
    saves_per_epoch: int | None
    load_best_model_at_end: bool
    metric_for_best_model: str
    early_stopping_patience: int | None
    bf16: bool
    fp16: bool

    @staticmethod
    def of(training_kwargs: Mapping[str, Any]) -> Training:
        return Training(**{one.name: training_kwargs[one.name] for one in dataclasses.fields(Training)})

    @property
    def best_by(self) -> str:
        """What the best adapter is found by, in words."""
        shown = {
            "loss": "validation loss",
            "mean_token_accuracy": "token accuracy on the validation rows",
            "rewards/accuracies": "preference accuracy on the validation rows",
            "rewards/margins": "reward margin on the validation rows",
        }
        return shown.get(self.metric_for_best_model, self.metric_for_best_model)

    def rows_per_step(self, world_size: int) -> int:
        """Rows (packed ones, with packing) of an optimizer step over all processes."""
        return self.per_device_train_batch_size * self.gradient_accumulation_steps * world_size


@dataclass(frozen=True)
class Plan:
    """A recipe resolved for a model and a machine.

    Attributes:
        name: of the run, the last part of output_dir.
        output_dir: the run directory.
        recipe: the recipe with its defaults, as JSON-able values.
        hardware: what the plan was made for.
        choices: every resolved value by its key in the recipe, with its reason, in order.
        model_kwargs: for from_pretrained.
        quantization_kwargs: for BitsAndBytesConfig; None without quantization.
        lora_kwargs: for LoraConfig; None for training in full.
        adapter_dtype: type of the trained adapter's weights.
        loraplus_lr_ratio: for LoRA+; None without.
        training_kwargs: for SFTConfig, without what follows from the number of rows.
        data: what is read, and how it becomes tokens.
        schedule: None while the number of rows is not known.
        audit: what was counted of the data (see lorafit.rows.audit); None before it was tokenized.
        remarks: what the user should know, a sentence each.
        merge: the recipe's merge section; empty in plans of before there was one.
        eval: the recipe's eval section; empty in plans of before there was one.
        references: the recipe's ${NAME}, which stand for their values in the file.
        chain: the trainings that came before, the oldest first.
        preference: how pairs are learned; None without.
    """

    name: str
    output_dir: str
    recipe: dict[str, Any]
    hardware: Hardware
    model: ModelPlan
    choices: dict[str, Choice]
    model_kwargs: dict[str, Any]
    quantization_kwargs: dict[str, Any] | None
    lora_kwargs: dict[str, Any] | None
    adapter_dtype: str
    loraplus_lr_ratio: float | None
    training_kwargs: dict[str, Any]
    data: DataPlan
    schedule: Schedule | None
    remarks: tuple[str, ...] = ()
    audit: dict[str, Any] | None = None
    merge: dict[str, Any] = field(default_factory=dict)
    eval: dict[str, Any] = field(default_factory=dict)
    references: References = field(default_factory=dict)
    chain: tuple[Stage, ...] = ()
    preference: Preference | None = None

    def to_json(self) -> str:
        return json.dumps(self._as_written(), indent=2, ensure_ascii=False) + "\n"

    def as_written(self) -> Plan:
        """The plan as it is stored and shown: no text that the recipe takes from the environment, no home folder."""
        return Plan._of(self._as_written())

    def _as_written(self) -> dict[str, Any]:
        given = self.references
        parts = {name: at_keys(getattr(self, name), given, name) for name in ("merge", "eval")}
        return as_written(dataclasses.asdict(self) | parts | {"recipe": at_keys(self.recipe, given)}, given)

    @staticmethod
    def from_json(text: str) -> Plan:
        """Read what `to_json` wrote, with the references as the environment has them now, if it does.

        Raises ValueError, KeyError or TypeError for anything else.
        """
        raw = json.loads(text)
        references = {key: Reference(**one) for key, one in raw["references"].items()}
        remember(references)
        return Plan._of(read_back(raw, references) | {"references": raw["references"]})

    @staticmethod
    def _of(raw: dict[str, Any]) -> Plan:
        data = raw["data"]
        hardware = raw["hardware"]
        if hardware["compute_capability"]:
            hardware["compute_capability"] = tuple(hardware["compute_capability"])
        raw |= {
            "hardware": Hardware(**hardware),
            "model": ModelPlan(**raw["model"]),
            "choices": {key: Choice(**choice) for key, choice in raw["choices"].items()},
            "data": DataPlan(
                **data | {part: tuple(SourcePlan(**item) for item in data[part]) for part in ("train", "validation")}
            ),
            "schedule": Schedule(**raw["schedule"]) if raw["schedule"] else None,
            "remarks": tuple(raw["remarks"]),
            "references": {key: Reference(**one) for key, one in raw["references"].items()},
            "chain": tuple(Stage(**one) for one in raw["chain"]),
            "preference": _preference_of(raw["preference"]) if raw["preference"] else None,
        }
        return Plan(**raw)

    def decides(self) -> dict[str, Any]:
        """What the trained weights depend on, as JSON-able values: a run can go on only if it is the same.

        How the result will be evaluated and merged, and where the recipe is meant to run, is no part of it; nor is how
        the rows of a step are divided into passes, and what is computed twice to save memory.
        """
        whole = json.loads(self.to_json())
        parts = (
            "recipe",
            "model_kwargs",
            "quantization_kwargs",
            "lora_kwargs",
            "adapter_dtype",
            "training_kwargs",
            "data",
            "chain",
            "preference",
        )
        machine = {key: whole["hardware"][key] for key in ("device", "world_size")}
        for source in (*whole["data"]["train"], *whole["data"]["validation"]):
            del source["rows"]  # follows from the files
        values = {key: Reference(one.sha256, one.sha256) for key, one in self.references.items()}
        whole["recipe"] = at_keys(whole["recipe"], values)
        for later in ("merge", "eval", "hardware"):
            whole["recipe"].pop(later, None)
        for values in (whole["recipe"]["training"], whole["training_kwargs"]):
            for name in PASSES:
                values.pop(name, None)
        return {part: whole[part] for part in parts} | {"hardware": machine, "rows_per_step": self.rows_per_step}

    @property
    def start_from(self) -> str | None:
        """The adapter that goes on, if one does."""
        asked: str | None = self.recipe["start_from"]
        return asked

    @property
    def method(self) -> Method:
        """What it trains by."""
        return METHODS[self.data.method]

    @functools.cached_property
    def adapter(self) -> Adapter:
        """What is trained of the model."""
        return adapter_told(self.recipe)

    @functools.cached_property
    def training(self) -> Training:
        return Training.of(self.training_kwargs)

    @property
    def dtype(self) -> str:
        """The type in which the base is loaded."""
        return str(self.model_kwargs["dtype"])

    @property
    def revision(self) -> str | None:
        """The base's revision on the hub."""
        revision: str | None = self.model_kwargs["revision"]
        return revision

    @property
    def attention(self) -> str:
        return str(self.model_kwargs["attn_implementation"])

    @property
    def rows_per_step(self) -> int:
        return self.training.rows_per_step(self.hardware.world_size)

    @property
    def passes(self) -> dict[str, int]:
        """How a step is computed, which a run that goes on may change: rows in a pass, passes, and what is kept."""
        names = ("per_device_train_batch_size", "gradient_accumulation_steps", "gradient_checkpointing")
        return {name: getattr(self.training, name) for name in names}

    @property
    def trainable_parameters(self) -> int:
        return self.model.trainable_parameters


def _preference_of(raw: dict[str, Any]) -> Preference:
    return Preference(**raw | {name: tuple(raw[name]) for name in ("loss_type", "loss_weights")})


def make_schedule(rows: int | None, training: Training, world_size: int) -> Schedule:
    """Steps from the number of training rows (None: a stream), as transformers' Trainer counts them.

    Evaluations and checkpoints per epoch become their number of steps, rounded up, so that they happen inside
    a step, where an interrupted run can go on exactly.
    """
    total = training.max_steps
    per_epoch = total
    if rows is not None:
        batches = math.ceil(math.ceil(rows / training.per_device_train_batch_size) / world_size)
        per_epoch = max(math.ceil(batches / training.gradient_accumulation_steps), 1)
    if total < 1:
        total = math.ceil(training.num_train_epochs * per_epoch)

    def every(times: int | None) -> int:
        return min(math.ceil(per_epoch / (times or 1)), total)

    evaluate = {"epoch": every(training.evals_per_epoch), "steps": training.eval_steps, "no": None}[
        training.eval_strategy
    ]
    with_it = every(training.saves_per_epoch) if training.saves_per_epoch or not evaluate else evaluate
    save = {"auto": with_it, "epoch": every(training.saves_per_epoch), "steps": training.save_steps, "no": None}[
        training.save_strategy
    ]
    return Schedule(per_epoch, total, evaluate, save)


def validation_rows(rows: int, fraction: float | None) -> int:
    """How many of the rows a validation fraction holds out: at least one, and not all."""
    return 0 if fraction is None else min(max(round(rows * fraction), 1), max(rows - 1, 0))


T = TypeVar("T")


@dataclass
class Context:
    """What every decision may look at, and where it is noted.

    Attributes:
        choices: every resolved value by its key in the recipe, with its reason, in order.
        mistakes: what the recipe asks for and this model or machine can't carry out.
        faults: sources whose rows can't be read, by their place in the recipe.
        remarks: what the user should know, a sentence each.
    """

    recipe: Recipe
    facts: ModelFacts
    hardware: Hardware
    choices: dict[str, Choice] = field(default_factory=dict)
    mistakes: list[Mistake] = field(default_factory=list)
    faults: list[tuple[KeyPath, DataError]] = field(default_factory=list)
    remarks: list[str] = field(default_factory=list)

    @property
    def on_gpu(self) -> bool:
        return self.hardware.device == "cuda"

    def choose(self, key: str, value: T, reason: str) -> T:
        self.choices[key] = Choice(value, reason)
        return value

    def wrong(self, path: KeyPath, message: str) -> None:
        self.mistakes.append(self.recipe.mistake(path, message))
