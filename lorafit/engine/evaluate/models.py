"""The models that are compared: which they are, that they belong together, and their weights in memory."""

from __future__ import annotations

import contextlib
import dataclasses
import gc
import json
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal, TypeAlias

import torch
from peft import PeftModel
from transformers import PreTrainedModel

from lorafit.bounds import read_json
from lorafit.engine.evaluate.batches import autocast, ready
from lorafit.engine.loss import settle_head
from lorafit.engine.model import base_source, load_base, on_cpu
from lorafit.engine.tokenizer import reading
from lorafit.errors import ModelError, UsageError
from lorafit.evaluation.figures import BASE, START
from lorafit.facts.fingerprint import differences, listed, weights_digest
from lorafit.files import check, check_own
from lorafit.options import EvalOptions, name_of
from lorafit.plan import Plan
from lorafit.plan.adapters import check_adapter
from lorafit.recipe import Recipe
from lorafit.recipe.schema import EvalSection
from lorafit.recipe.start import place_of
from lorafit.run.directory import RunDir, located, open_run
from lorafit.written import References, expanded, require

LoadedModel: TypeAlias = Any
"""A PreTrainedModel, or a PeftModel around one."""
Kind = Literal["base", "adapter", "trained", "merged"]


@dataclass(frozen=True)
class NamedModel:
    """A model that is compared, by its name in figures.

    Attributes:
        path: the adapter's or model's folder; of a base, what its recipe names.
        plan: of the run whose base it is or is on: how that base is loaded.
        run: where that base is, if the run keeps one.
        sha256: of the weights of an adapter or a model; None for a base, which its run knows by fingerprint.
    """

    name: str
    kind: Kind
    path: str
    plan: Plan
    run: RunDir
    sha256: str | None = None

    @property
    def is_whole(self) -> bool:
        """Whether it is a model of its own, and not the run's base or an adapter on that."""
        return self.kind in ("trained", "merged")

    @property
    def quantization(self) -> str | None:
        """Such as nf4 or int8."""
        kwargs = self.plan.quantization_kwargs
        if kwargs is None or self.is_whole:
            return None
        return str(kwargs.get("bnb_4bit_quant_type")) if kwargs.get("load_in_4bit") else "int8"

    @property
    def loads(self) -> str:
        """A key of what has to be in memory for it: equal for models that share a base."""
        if self.is_whole:
            return f"{self.kind} {self.path}"
        name, kwargs = self.plan.model.name_or_path, self.plan.model_kwargs
        base = str(self.run.base) if self.run.base.is_dir() else name
        return json.dumps([base, kwargs, self.plan.quantization_kwargs], sort_keys=True)


def base_of(run: RunDir, plan: Plan) -> NamedModel:
    return NamedModel(BASE, "base", plan.model.name_or_path, plan, run)


def result_of(run: RunDir, plan: Plan, name: str | None = None) -> NamedModel:
    """The result of a run: its adapter, or its model if it trained in full."""
    kind = plan.adapter.result
    folder = run.model if kind == "trained" else run.adapter
    return NamedModel(name or kind, kind, str(folder), plan, run, weights_digest(folder))


def adapter_at(name: str, folder: Path, run: RunDir, plan: Plan) -> NamedModel:
    """An adapter from anywhere, on a run's base. Raises UsageError if there is none, ModelError if it is of another."""
    if not (folder / "adapter_config.json").is_file():
        raise UsageError(f"{folder}: has no adapter_config.json, so it is no adapter")
    check(folder)
    named = str(read_json(folder / "adapter_config.json").get("base_model_name_or_path") or "")
    ours = {expanded(plan.model.name_or_path).name.lower(), run.base.name}
    if named and expanded(named).name.lower() not in ours:
        raise ModelError(f"{folder}: is for the base {named}, and {run.path} is on {plan.model.name_or_path}")
    return NamedModel(name, "adapter", str(folder), plan, run, weights_digest(folder))


def adapter_named(name: str, path: Path, run: RunDir, plan: Plan, held: contextlib.ExitStack) -> NamedModel:
    """An adapter folder, or the adapter of another run (held by the stack), on a run's own base.

    Raises UsageError, ModelError.
    """
    path = located(path)
    if not RunDir(path).is_run:
        return adapter_at(name, path, run, plan)
    other, its = held.enter_context(open_run(path))
    check_same_base(run, other)
    if its.adapter.trains_base:
        raise UsageError(f"--adapter {name}={path}: the run trained in full and has no adapter")
    return NamedModel(name, "adapter", str(other.adapter), plan, run, weights_digest(other.adapter))


def start_is_here(plan: Plan, remarks: list[str]) -> bool:
    """Whether an adapter that a run started from is still there; one that is gone is remarked on."""
    if plan.start_from is None:
        return False
    try:
        place_of(plan.start_from)
    except ModelError:
        remarks.append(f"{plan.start_from}, from which the training started, is gone, so it is not compared")
        return False
    return True


def start_of(run: RunDir, plan: Plan) -> NamedModel:
    """The adapter that a run started from. Raises UsageError if there is none, ModelError if it is gone or another."""
    if plan.start_from is None:
        raise UsageError(f"{run.path}: started from no adapter, so there is no model {START}")
    folder = place_of(plan.start_from).folder
    start = adapter_at(START, folder, run, plan)
    if start.sha256 != plan.chain[-1].sha256:
        raise ModelError(f"{folder}: is not the adapter that {run.path} started from any more; bring that back")
    return start


def merged_at(name: str, folder: Path, run: RunDir, plan: Plan) -> NamedModel:
    """A run's merged model. Raises UsageError, or ModelError if it is that of another adapter or base."""
    if not (folder / "config.json").is_file():
        raise UsageError(f"{folder}: there is no merged model; make it with `lorafit merge {run.path}`")
    if not (folder / "merge_report.json").is_file():
        raise ModelError(f"{folder}: has no merge_report.json, so whose merge it is can't be told")
    check_own(folder, "merge again") if folder == run.merged else check(folder)
    report = read_json(folder / "merge_report.json")
    base, recorded = report.get("base") or {}, report.get("adapter_sha256")
    if recorded not in (None, weights_digest(run.adapter)):
        raise ModelError(f"{folder}: is the merge of another adapter ({report.get('adapter')}), not of {run.adapter}")
    if str(base.get("checked", "")).startswith("no"):
        raise ModelError(f"{folder}: is merged into another base ({base.get('name')}) than that of {run.path}")
    if expanded(str(base.get("name"))).name != expanded(plan.model.name_or_path).name:
        raise ModelError(
            f"{folder}: is merged into another base ({base.get('name')}) than that of {run.path} "
            f"({plan.model.name_or_path})"
        )
    return NamedModel(name, "merged", str(folder), plan, run, weights_digest(folder))


def check_same_base(first: RunDir, other: RunDir) -> None:
    """Models can share rows and tokens if they are of one base. Raises ModelError."""
    changed = differences(first.base_files() or {}, other.base_files() or {})
    if changed:
        raise ModelError(
            f"{other.path}: was trained on another base than {first.path} (differs in {listed(changed, 3)}); evaluate "
            "it by itself, and compare with --baseline"
        )


class Loaded:
    """One model in memory and the adapters on it, of which one, or none, is in use at a time.

    PEFT leaves trained biases in the base when an adapter is turned off; here they are swapped as well.
    """

    def __init__(self, base: LoadedModel) -> None:
        self.model: LoadedModel = base
        self._names: dict[str, str] = {}
        self._biases = {BASE: _biases(base)}
        self._used = BASE

    def add(self, name: str, folder: Path) -> None:
        """Put an adapter on the base; it is not in use yet. Raises ModelError."""
        inner = f"adapter{len(self._names)}"  # PEFT's names may not be any
        self.use(BASE)
        check_adapter(folder, (name for name, _ in self.model.named_modules()))
        with reading("adapter", folder):
            if isinstance(self.model, PeftModel):
                self.model.load_adapter(str(folder), adapter_name=inner)
            else:
                self.model = PeftModel.from_pretrained(self.model, str(folder), adapter_name=inner)
        _check_finite(self.model, str(folder), f".{inner}.")
        self.model.eval()
        self._names[name] = inner
        self._biases[name] = _biases(self.model)
        self._used = name
        self.use(name)
        with autocast(self.model):
            settle_head(self.model.get_base_model())
        self.use(BASE)

    def use(self, name: str) -> LoadedModel:
        """The model as `base` or as an adapter by its name."""
        if name != self._used and isinstance(self.model, PeftModel):
            if name == BASE:
                self.model.base_model.disable_adapter_layers()
            else:
                self.model.base_model.enable_adapter_layers()
                self.model.set_adapter(self._names[name])
                self.model.requires_grad_(False)
            self._set_biases(name)
        elif name == BASE and isinstance(self.model, PeftModel):
            self.model.base_model.disable_adapter_layers()
        self._used = name
        return self.model

    def use_model(self, model: NamedModel) -> LoadedModel:
        """The model in memory, in use as one of the compared ones."""
        return self.use(model.name if model.kind == "adapter" else BASE)

    @contextlib.contextmanager
    def base(self) -> Iterator[None]:
        """The base alone, until the block ends."""
        before = self._used
        self.use(BASE)
        try:
            yield
        finally:
            self.use(before)

    @torch.no_grad()
    def _set_biases(self, name: str) -> None:
        for parameter, value in zip(_bias_parameters(self.model), self._biases[name], strict=True):
            parameter.copy_(value)


def _check_finite(model: LoadedModel, path: str, part: str = "") -> None:
    """Raises ModelError for a weight that holds a number that is not finite."""
    for name, parameter in model.named_parameters():
        is_part = part in f"{name}." or name.endswith(".bias")
        if is_part and parameter.is_floating_point() and not parameter.isfinite().all():
            raise ModelError(f"{path}: {name} holds numbers that are not finite; it is broken")


def _bias_parameters(model: LoadedModel) -> list[torch.nn.Parameter]:
    """The base's biases, which are the same with adapters on it."""
    return [
        parameter
        for name, parameter in model.named_parameters()
        if name.endswith(".bias") and ".lora_" not in name and ".modules_to_save." not in name
    ]


def _biases(model: LoadedModel) -> list[torch.Tensor]:
    return [parameter.detach().clone() for parameter in _bias_parameters(model)]


def from_disk(model: NamedModel) -> tuple[PreTrainedModel, Plan]:
    """A model, or of an adapter its base, and the plan that it was loaded by: on a CPU where there is no CUDA GPU.

    Raises ModelError, DoesNotFitError.
    """
    plan = model.plan
    if plan.hardware.device == "mps" or (plan.hardware.device == "cuda" and not torch.cuda.is_available()):
        plan = on_cpu(plan)
    if not model.is_whole:
        return load_base(plan, base_source(plan, model.run)), plan
    plan = dataclasses.replace(plan, quantization_kwargs=None)
    return load_base(plan, located(model.path)), plan


@contextlib.contextmanager
def loaded(models: list[NamedModel]) -> Iterator[Loaded]:
    """Models that share what `loads` says, in memory until the block ends. Raises ModelError, DoesNotFitError."""
    base, plan = from_disk(models[0])
    if models[0].is_whole:
        _check_finite(base, models[0].path)
    made = Loaded(ready(base, plan))
    del base
    for model in models:
        if model.kind == "adapter":
            made.add(model.name, Path(model.path))
    try:
        yield made
    finally:
        del made
        gc.collect()


def groups(models: list[NamedModel]) -> list[list[NamedModel]]:
    """Models by what has to be in memory for them, in order."""
    found: dict[str, list[NamedModel]] = {}
    for model in models:
        found.setdefault(model.loads, []).append(model)
    return list(found.values())


@dataclass(frozen=True)
class Comparison:
    """The run, the eval section in force, what both take from the environment, and the models, the base first."""

    run: RunDir
    plan: Plan
    section: EvalSection
    references: References
    models: list[NamedModel]
    remarks: list[str]

    @property
    def names(self) -> list[str]:
        return [model.name for model in self.models]

    @property
    def main(self) -> str | None:
        """The model that is the run's result; others are compared with it, besides the base."""
        return next((model.name for model in self.models if model.kind in ("adapter", "trained")), None)


@contextlib.contextmanager
def opened(options: EvalOptions) -> Iterator[Comparison]:
    """Open what was named, and hold it until the block ends. Raises RecipeError, UsageError, ModelError."""
    path, recipe = options.path, None
    if path.is_file():
        recipe = Recipe.load(path, options.overrides)
        path = Path(recipe.output_dir or f"runs/{path.stem}")
    with contextlib.ExitStack() as stack:
        run, plan = stack.enter_context(open_run(path))
        remarks = []
        if recipe is None:
            recipe = _recipe_of(plan, run, options.overrides)
        else:
            changed = _changed(recipe, plan)
            if changed:
                remarks.append(
                    f"{options.path}: has changed since the run was trained ({', '.join(changed)}); what is evaluated "
                    "is the run as it was trained"
                )
        given = {"limit": options.limit, "max_new_tokens": options.max_new_tokens}
        section = recipe.eval.model_copy(update={name: value for name, value in given.items() if value is not None})
        references = {**plan.references, **recipe.references}
        yield Comparison(run, plan, section, references, _models(options, run, plan, stack, remarks), remarks)


def _recipe_of(plan: Plan, run: RunDir, overrides: tuple[str, ...]) -> Recipe:
    """A recipe with the run's eval section, so that it is checked, and overrides are, as any recipe is."""
    values: dict[str, Any] = {
        "model": {"name_or_path": plan.model.name_or_path},
        "lora": {},
        "dataset": {"train": [{"path": plan.data.train[0].path}]},
        "eval": plan.eval,
    }
    require(plan.references, "eval.")
    return Recipe.restored(values, str(run.plan_file), overrides, plan.references)


def _changed(recipe: Recipe, plan: Plan) -> list[str]:
    """The sections in which a recipe is no longer what a run was trained by."""
    now, then = recipe.resolved(), plan.recipe
    later = ("eval", "merge", "output_dir")
    return [name for name in now if name not in later and now[name] != then.get(name)]


def _models(
    options: EvalOptions, run: RunDir, plan: Plan, stack: contextlib.ExitStack, remarks: list[str]
) -> list[NamedModel]:
    own = result_of(run, plan)
    asked = options.compare
    if asked is None:
        before = (START,) if start_is_here(plan, remarks) else ()
        asked = (BASE, own.kind, *before, *(("merged",) if (run.merged / "config.json").is_file() else ()))
    found: list[NamedModel] = []
    for name in asked:
        taken = [*(model.name for model in found), *(adapter.name for adapter in options.adapters)]
        if name == BASE:
            found.append(base_of(run, plan))
        elif name == own.kind or name in ("adapter", "trained"):
            if name != own.kind:
                raise UsageError(f"--compare {name}: {run.path} has no {name}; what it trained is called {own.kind}")
            found.append(own)
        elif name == START:
            found.append(start_of(run, plan))
        elif name == "merged":
            found.append(merged_at("merged", run.merged, run, plan))
        else:
            found.append(_at(Path(name), name_of(name, taken), run, plan, stack))
    found += [adapter_named(adapter.name, adapter.path, run, plan, stack) for adapter in options.adapters]
    return sorted(found, key=lambda model: model.kind != BASE)


def _at(path: Path, name: str, run: RunDir, plan: Plan, stack: contextlib.ExitStack) -> NamedModel:
    """The model at a path in --compare: a run, a merged model, or an adapter."""
    if RunDir(path).is_run:
        other, its = stack.enter_context(open_run(path))
        check_same_base(run, other)
        return result_of(other, its, name)
    if (path / "adapter_config.json").is_file():
        return adapter_at(name, path, run, plan)
    if (path / "config.json").is_file():
        return merged_at(name, path, run, plan)
    raise UsageError(
        f"--compare {path}: is no run, merged model or adapter; expected base, adapter, merged, or the path of one"
    )
