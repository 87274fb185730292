"""Saving what was trained: an adapter as PEFT has it, and the result of a run with its card and manifest."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from peft import PeftModel

from lorafit.files import CARD, seal, staged, write_bytes
from lorafit.plan import Plan
from lorafit.progress import stage
from lorafit.run.card import write_card
from lorafit.run.directory import RunDir
from lorafit.run.manifest import hashes
from lorafit.written import References, as_written, expanded


def save_adapter(model: Any, folder: Path, references: References, **kwargs: Any) -> None:
    """Save what was trained, and of an adapter name the base as the recipe does; PEFT's empty card is left out.

    The names of modules, which PEFT keeps as sets, are sorted: the same run writes the same bytes.
    """
    configs = [*model.peft_config.values()] if isinstance(model, PeftModel) else []
    for one in configs:  # PEFT looks there whether the vocabulary has grown
        one.base_model_name_or_path = str(expanded(one.base_model_name_or_path or ""))
    model.save_pretrained(str(folder), **kwargs)
    name_base(model, references)
    config = folder / "adapter_config.json"
    if not config.is_file():
        return
    (folder / CARD).unlink(missing_ok=True)
    values = as_written(json.loads(config.read_text(encoding="utf-8")), references)
    for name in ("target_modules", "exclude_modules", "modules_to_save"):
        if isinstance(values.get(name), list):
            values[name].sort()
    config.write_text(json.dumps(values, indent=2, sort_keys=True), encoding="utf-8")


def name_base(model: Any, references: References) -> None:
    """Name the base in a model's configurations, which trackers log, as the recipe does."""
    for one in model.peft_config.values() if isinstance(model, PeftModel) else ():
        one.base_model_name_or_path = as_written(one.base_model_name_or_path, references)
    model.config.name_or_path = as_written(model.config.name_or_path, references)


def save_result(trainer: Any, plan: Plan, run: RunDir, manifest: dict[str, Any]) -> None:
    """Write adapter/ (or model/), whole, with a manifest that knows its hashes; clear away what it replaces."""
    adapter = isinstance(trainer.model, PeftModel)
    name = "adapter" if adapter else "model"
    with stage(f"saving {name}"), staged(run.path / name, name) as folder:
        if adapter:
            start = {"path_initial_model_for_weight_conversion": str(run.start)} if run.start.is_dir() else {}
            before = (run.start / "adapter_config.json").read_bytes() if start else b""
            save_adapter(trainer.model, folder, plan.references, **start)
            if start:  # PEFT writes its own there
                write_bytes(run.start / "adapter_config.json", before)
        else:
            trainer.model.config.use_cache = True
            trainer.model.save_pretrained(str(folder))
        trainer.processing_class.save_pretrained(str(folder))
        write_card(folder / "README.md", plan, manifest)
        # A run with a result is finished, so the manifest is there before it.
        seal(folder, name)
        run.write_manifest(manifest | {"files": hashes(run, folder, name)})
    run.forget_replaced()
