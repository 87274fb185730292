"""What is evaluated: a run by its folder or its recipe, the eval section, and the models that were named."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from lorafit.errors import UsageError
from lorafit.evaluate.assemble import BASE
from lorafit.evaluate.contenders import (
    Contender,
    adapter_at,
    adapter_named,
    base_of,
    check_same_base,
    merged_at,
    result_of,
)
from lorafit.evaluate.options import Options, name_of
from lorafit.plan import Plan
from lorafit.recipe import Recipe
from lorafit.rundir import RunDir, open_run
from lorafit.written import References, require


@dataclass(frozen=True)
class Lineup:
    """The run, the eval section in force, what both take from the environment, and the models, the base first."""

    run: RunDir
    plan: Plan
    section: dict[str, Any]
    references: References
    contenders: list[Contender]
    remarks: list[str]


@contextlib.contextmanager
def line_up(options: Options) -> Iterator[Lineup]:
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
        section = recipe.eval.model_dump(mode="json")
        given = {"limit": options.limit, "max_new_tokens": options.max_new_tokens}
        section |= {name: value for name, value in given.items() if value is not None}
        references = {**plan.references, **recipe.references}
        yield Lineup(run, plan, section, references, _contenders(options, run, plan, stack), remarks)


def _recipe_of(plan: Plan, run: RunDir, overrides: tuple[str, ...]) -> Recipe:
    """A recipe with the run's eval section, so that it is checked, and overrides are, as any recipe is."""
    values: dict[str, Any] = {
        "model": {"name_or_path": plan.model["name_or_path"]},
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


def _contenders(options: Options, run: RunDir, plan: Plan, stack: contextlib.ExitStack) -> list[Contender]:
    own = result_of(run, plan)
    asked = options.compare
    if asked is None:
        asked = (BASE, own.kind, *(("merged",) if (run.merged / "config.json").is_file() else ()))
    found: list[Contender] = []
    for name in asked:
        taken = [*(contender.name for contender in found), *(adapter.name for adapter in options.adapters)]
        if name == BASE:
            found.append(base_of(run, plan))
        elif name == own.kind or name in ("adapter", "trained"):
            if name != own.kind:
                raise UsageError(f"--compare {name}: {run.path} has no {name}; what it trained is called {own.kind}")
            found.append(own)
        elif name == "merged":
            found.append(merged_at("merged", run.merged, run, plan))
        else:
            found.append(_at(Path(name), name_of(name, taken), run, plan, stack))
    found += [adapter_named(adapter.name, adapter.path, run, plan, stack) for adapter in options.adapters]
    return sorted(found, key=lambda contender: contender.kind != BASE)


def _at(path: Path, name: str, run: RunDir, plan: Plan, stack: contextlib.ExitStack) -> Contender:
    """What a path in --compare is: a run, a merged model, or an adapter."""
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
