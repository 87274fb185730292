"""The trainings that came before one: what it starts from, checked, and what that was started from in its turn."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any, Literal

from lorafit.bounds import known_json, read_text
from lorafit.errors import LorafitError, ModelError
from lorafit.facts import read_shard, weight_files
from lorafit.facts.fingerprint import Fingerprint, base_fingerprint, comparable, differences, listed, weights_digest
from lorafit.files import check
from lorafit.plan.values import Context, Plan, Stage
from lorafit.recipe.start import WEIGHTS, Place, is_run, place_of
from lorafit.tree import KeyPath
from lorafit.written import expanded

HASHED = 4 << 30
"""Bytes of a base's weights up to which they are read whole while planning; larger ones are, as training begins."""


def find_chain(context: Context, quantization: dict[str, Any] | None) -> tuple[Stage, ...]:
    """The trainings before, the oldest first; what speaks against going on is noted in the context.

    Args:
        quantization: how the base is quantized now.
    """
    recipe = context.recipe
    if recipe.start_from is None:
        return _of_base(context)
    try:
        return _of_adapter(context, place_of(recipe.start_from), quantization)
    except LorafitError as error:
        context.wrong(("start_from",), f"{recipe.start_from}: {error}")
        return ()


def base_before(place: Place) -> Fingerprint:
    """The base that an adapter was trained on; empty for one that is of no run."""
    return (known_json(place.run / "fingerprint.json") or {}) if place.run else {}


def _of_adapter(context: Context, place: Place, quantization: dict[str, Any] | None) -> tuple[Stage, ...]:
    recipe = context.recipe
    asked, model = str(recipe.start_from), recipe.model
    if not (place.folder / WEIGHTS).is_file():
        raise ModelError(f"{place.folder} has no {WEIGHTS}; files of other kinds may hold code, and are not read")
    check(place.folder)
    stage = Stage(asked, "adapter", None, weights_digest(place.folder))
    if place.run is None:
        named = str(place.config.get("base_model_name_or_path") or "")
        if named and expanded(named).name.lower() != expanded(model.name_or_path).name.lower():
            raise ModelError(f"is for the base {named}, and model.name_or_path is {model.name_or_path}")
        known = f"by its name alone ({named})" if named else "by nothing: it names none"
        context.remarks.append(f"Whether {asked}, which is of no run, is for this base is known {known}.")
        return (stage,)
    before = _plan(place.run)
    _check_base(context, before, base_before(place))
    if before.quantization_kwargs != quantization:
        path: KeyPath = ("quantization",) if quantization else ("start_from",)
        how = _described(before.quantization_kwargs)
        context.wrong(path, f"{asked} was trained on {how} and would go on on {_described(quantization)}; keep to that")
    if before.data.chat_template_kwargs != model.chat_template_kwargs:
        context.remarks.append(f"{asked} was trained with other model.chat_template_kwargs.")
    return (*before.chain, replace(stage, base=before.model.name_or_path))


def _check_base(context: Context, before: Plan, then: Fingerprint) -> None:
    model = context.recipe.model
    folder = expanded(model.name_or_path)
    weights = [folder] if folder.is_file() else weight_files(folder) if folder.is_dir() else []
    whole = sum(file.stat().st_size for file in weights if file.is_file()) <= HASHED
    now = base_fingerprint(model.name_or_path, model.revision, whole)
    if changed := differences(then, now):
        context.wrong(
            ("model", "name_or_path"),
            f"is not the base that {context.recipe.start_from} was trained on, which is {before.model.name_or_path} "
            f"(differs in {listed(changed, 3)})",
        )
    elif not comparable(then, now):
        context.remarks.append(
            "Whether the weights are those that the adapter was trained on is seen as training begins."
        )


def _described(quantization: dict[str, Any] | None) -> str:
    if quantization is None:
        return "a base that is not quantized"
    rest = ", ".join(f"{key}: {value}" for key, value in quantization.items() if key != "llm_int8_skip_modules")
    return f"a base with {rest}"


def _of_base(context: Context) -> tuple[Stage, ...]:
    """Where the base is what another run left, that run and those before it."""
    asked = context.recipe.model.name_or_path
    folder = expanded(asked)
    run = folder.parent
    if folder.name not in ("model", "merged") or not is_run(run):
        return ()
    kind: Literal["model", "merged"] = "model" if folder.name == "model" else "merged"
    try:
        before = _plan(run)
        return (*before.chain, Stage(asked, kind, before.model.name_or_path, weights_digest(folder)))
    except ModelError as error:  # the base itself is checked elsewhere
        context.remarks.append(f"How the base came to be is not recorded: {error}.")
        return ()


def _plan(run: Path) -> Plan:
    """Raises ModelError for what can't be read."""
    try:
        return Plan.from_json(read_text(run / "plan.json"))
    except (OSError, ValueError, KeyError, TypeError, AttributeError, RecursionError) as error:
        raise ModelError(f"{run / 'plan.json'}: can't be read as a plan of this version: {error}") from None


def is_float32(start_from: str) -> bool:
    """Whether an adapter's A matrices are stored in float32: what goes on in less would lose some of it."""
    try:
        tensors = read_shard(place_of(start_from).folder / WEIGHTS).tensors
    except ModelError:
        return False  # said by `find_chain`
    return any(tensor.dtype == "F32" for tensor in tensors if "lora_A" in tensor.name)
