"""What a training starts from by `start_from`: where that adapter is, and its values as the lowest layer of `lora`."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from pydantic import ValidationError

from lorafit.bounds import known_json
from lorafit.errors import ModelError
from lorafit.facts.hub import hub_file, hub_unreachable, spare_retries
from lorafit.files import read_seal
from lorafit.recipe.layers import Draft, merge, placed
from lorafit.recipe.schema import LoraSection
from lorafit.recipe.yaml import Located, Mistake, Position
from lorafit.tree import dotted
from lorafit.written import expanded

CONFIG, WEIGHTS = "adapter_config.json", "adapter_model.safetensors"
"""What PEFT saves of an adapter."""
CHANGING_STARTS = ("pissa", "olora", "corda", "loftq")
"""Starts (PEFT's init_lora_weights) that change the base: as it is on the hub, it is not the adapter's."""

_KEPT = frozenset(LoraSection.model_fields) - {"init_lora_weights", "loraplus_lr_ratio"}
FREE = ("lora_dropout", "loraplus_lr_ratio")
"""Keys that are no part of an adapter, so that a recipe may say otherwise."""
_OF_NOTHING = frozenset(
    {"task_type", "peft_type", "auto_mapping", "peft_version", "base_model_name_or_path", "revision", "inference_mode"}
    | {"fan_in_fan_out", "megatron_config", "megatron_core", "init_lora_weights", "qalora_group_size"}
    | {"loftq_config", "eva_config", "corda_config", "lora_ga_config"}
)
"""Keys of PEFT's file that say nothing of how the adapter computes, or only with others."""


@dataclass(frozen=True)
class Place:
    """Where an adapter is.

    Attributes:
        folder: the one that PEFT reads.
        run: the run that it is of, or None.
    """

    folder: Path
    run: Path | None

    @property
    def config(self) -> dict[str, Any]:
        return known_json(self.folder / CONFIG) or {}


def place_of(name: str) -> Place:
    """Find an adapter: of a run, of one of its checkpoints, in a folder, or on the hub. Raises ModelError."""
    path = expanded(name)
    if not path.exists() and not name.startswith((".", "/", "~")) and name.count("/") == 1:
        return Place(_of_hub(name), None)
    if is_run(path):
        return Place(path / "adapter", path)
    if not (path / CONFIG).is_file():
        what = (
            "holds no adapter"
            if path.is_dir()
            else "there is no such run, folder with an adapter, or adapter on the hub"
        )
        raise ModelError(f"{what} (no {CONFIG})" if path.is_dir() else what)
    run = path.parent.parent if path.parent.name == "checkpoints" else path.parent
    return Place(path, run if is_run(run) else None)


def is_run(folder: Path) -> bool:
    """Whether a folder is a run of lorafit's, by its seal; other tools have files of that name as well."""
    seal = read_seal(folder)
    return seal is not None and seal.kind == "run" and (folder / "plan.json").is_file()


def _of_hub(name: str) -> Path:
    """The folder in the client's cache, where the adapter is fetched if it is not there."""
    spare_retries()
    found = [hub_file(name, file, None) for file in (CONFIG, WEIGHTS)]
    if found[0] is None or found[1] is None:
        why = hub_unreachable() or f"the hub has no {CONFIG} and {WEIGHTS} of that name, or does not let you read them"
        raise ModelError(f"there is no such run or folder, it is not in the hub's cache, and {why}")
    return found[0].parent


def on_its_start(draft: Draft) -> Draft:
    """The draft over the values of the adapter that it starts from, with the mistakes that this shows."""
    asked = draft.root.value.get("start_from") if isinstance(draft.root.value, dict) else None
    if asked is None or not isinstance(asked.value, str) or not asked.value:
        return draft
    try:
        place = place_of(asked.value)
        values = dict(_values(place))
    except ModelError as error:
        mistake = Mistake(asked.position, "start_from", f"{asked.as_written()}: {error}")
        return Draft(draft.root, [*draft.mistakes, mistake], complete=False)
    below = placed({"lora": values}, Position(str(place.folder / CONFIG)))
    own = draft.root.value.get("lora")
    mistakes = [*draft.mistakes, *_contradictions(own, values, place)] if own is not None else draft.mistakes
    if own is not None and own.value is None:
        root = replace(draft.root, value={key: one for key, one in draft.root.value.items() if key != "lora"})
        return Draft(merge(below, root), mistakes, draft.complete)
    return Draft(merge(below, draft.root), mistakes, draft.complete)


def _values(place: Place) -> Iterator[tuple[str, Any]]:
    """What the recipe's section for the adapter is, by PEFT's file. Raises ModelError for what can't go on."""
    if place.run is not None and not place.folder.is_dir():
        trained = (place.run / "model").is_dir()
        raise ModelError(
            "was trained in full: name its model as model.name_or_path, and leave start_from out"
            if trained
            else "the run is not finished; go on with `lorafit train --resume`"
        )
    config = place.config
    if config.get("peft_type") != "LORA":
        raise ModelError(f"{CONFIG} is none of LoRA's (peft_type: {config.get('peft_type')})")
    how = str(config.get("init_lora_weights", True))
    if how.lower().split("_")[0] in CHANGING_STARTS or how == "lora_ga":
        raise ModelError(f"the adapter began by {how}, which changes the base, and was not converted to plain LoRA")
    other = [name for name, value in config.items() if value and name not in {*_KEPT, *_OF_NOTHING}]
    if other:
        raise ModelError(f"the adapter has {', '.join(other)}, which lorafit does not train")
    for name in LoraSection.model_fields:
        if name in _KEPT and config.get(name) not in (None, {}):
            yield name, config[name]


def _contradictions(own: Located, values: dict[str, Any], place: Place) -> Iterator[Mistake]:
    """Keys of a section for the adapter that are not as the adapter is."""
    if not isinstance(own.value, dict):
        yield Mistake(own.position, "lora", "has no effect beside start_from, whose adapter goes on; remove it")
        return
    try:
        asked, there = LoraSection.model_validate(own.plain()), LoraSection.model_validate(values)
    except ValidationError:
        return  # said where the recipe is checked
    for name in own.value:
        before, now = getattr(there, name), getattr(asked, name)
        if name in FREE or _same(before, now) or (name == "target_modules" and now == _targets_asked(place)):
            continue
        shown = list(before) if isinstance(before, tuple) else before
        path = ("lora", name)
        yield Mistake(
            own.place((name,)), dotted(path), f"the adapter that the training starts from has {shown}; leave this out"
        )


def _same(one: Any, other: Any) -> bool:
    if isinstance(one, tuple) and isinstance(other, tuple):
        return set(one) == set(other)
    return bool(one == other)


def _targets_asked(place: Place) -> Any:
    """What the recipe of the adapter's run said of its targets."""
    plan = known_json(place.run / "plan.json") if place.run else None
    try:
        asked = plan["recipe"]["lora"]["target_modules"] if plan else None
    except (KeyError, TypeError):
        return None
    return tuple(asked) if isinstance(asked, list) else asked
