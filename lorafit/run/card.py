"""The model card that is saved with an adapter or model."""

from __future__ import annotations

import json
from pathlib import Path
from typing import TYPE_CHECKING, Any

import yaml

from lorafit.written import REFERENCE

if TYPE_CHECKING:
    from lorafit.plan import Plan


def write_card(path: Path, plan: Plan, manifest: dict[str, Any]) -> None:
    """Write README.md with the front matter that model hubs read."""
    plan = plan.as_written()
    whole = plan.adapter.trains_base
    head: dict[str, Any] = {"library_name": "transformers" if whole else "peft", "tags": ["lorafit"]} | _base_of(plan)
    load = _LOAD if whole else _load_adapter(path.with_name("adapter_config.json"))
    _write(path, head, plan.name, "Trained with lorafit.", _rows(plan, manifest), load, manifest["versions"])


def write_merged_card(path: Path, plan: Plan | None, manifest: dict[str, Any], report: dict[str, Any]) -> None:
    """Write README.md of a merged model: of its training, where that is known, and of the merge."""
    plan = plan.as_written() if plan is not None else None
    head: dict[str, Any] = {"library_name": "transformers", "pipeline_tag": "text-generation", "tags": ["lorafit"]}
    if plan is not None:
        head |= _base_of(plan)
    rows = _rows(plan, manifest) if plan is not None and manifest else [("base model", f"`{report['base']['name']}`")]
    figures = report["verification"]["figures"]
    rows.append(("merged into", f"{report['base_weights']['used']} weights, {report['dtype']}"))
    if figures:
        rows.append(("against the adapter", f"KL {figures['kl']:.2g} nats, top-1 agreement {figures['top1']:.1%}"))
    name = plan.name if plan is not None else Path(report["adapter"]).name
    intro = "Trained and merged with lorafit." if plan is not None else "Merged with lorafit."
    _write(path, head, name, f"{intro} {report['verdict']}", rows, _LOAD, report["versions"])


_LOAD = 'from transformers import AutoModelForCausalLM\n\nmodel = AutoModelForCausalLM.from_pretrained(".")'


def _load_adapter(config: Path) -> str:
    """How PEFT loads an adapter: by the base that it names, unless only a person knows where that is."""
    base = str(json.loads(config.read_text(encoding="utf-8"))["base_model_name_or_path"])
    reference = REFERENCE.fullmatch(base)
    if reference is None and not base.startswith("~"):
        return 'from peft import AutoPeftModelForCausalLM\n\nmodel = AutoPeftModelForCausalLM.from_pretrained(".")'
    where = f'os.environ["{reference["name"]}"]' if reference else f"os.path.expanduser({json.dumps(base)})"
    return (
        "import os\n\nfrom peft import PeftModel\nfrom transformers import AutoModelForCausalLM\n\n"
        f'base = AutoModelForCausalLM.from_pretrained({where})\nmodel = PeftModel.from_pretrained(base, ".")'
    )


def _base_of(plan: Plan) -> dict[str, str]:
    """What a hub links to; a local base is nothing to link to, and neither is one that a variable names."""
    name = plan.model.name_or_path
    return {"base_model": name} if plan.model.kind in ("hub", "bundled") and "${" not in name else {}


def _rows(plan: Plan, manifest: dict[str, Any]) -> list[tuple[str, str]]:
    result, data = manifest["result"], manifest["data"]["audit"]["training_rows"]
    name = plan.model.name_or_path
    rows = [
        ("base model", f"`{name}`"),
        ("method", _method(plan)),
        ("trainable parameters", f"{plan.trainable_parameters:,}"),
        ("training rows", f"{data['rows']:,} ({data['supervised_tokens']:,} learned tokens)"),
        ("steps", f"{result['steps']:,}"),
        ("learning rate", f"{plan.training.learning_rate:g}"),
        ("seed", str(plan.training.seed)),
    ]
    if values := plan.data.chat_template_kwargs:
        rows.append(("chat template", "asks with " + ", ".join(f"`{k}: {json.dumps(v)}`" for k, v in values.items())))
    if result["best_validation_loss"] is not None:
        rows.append(("validation loss", f"{result['best_validation_loss']:.4f} (step {result['best_step']})"))
    return rows


def _write(
    path: Path,
    head: dict[str, Any],
    name: str,
    intro: str,
    rows: list[tuple[str, str]],
    load: str,
    versions: dict[str, str],
) -> None:
    table = "\n".join(f"| {key} | {value} |" for key, value in rows)
    made_with = ", ".join(f"{key} {value}" for key, value in versions.items())
    path.write_text(
        f"---\n{yaml.safe_dump(head, sort_keys=True)}---\n\n# {name}\n\n"
        f"{intro}\n\n| | |\n|---|---|\n{table}\n\n```python\n{load}\n```\n\n{made_with}\n",
        encoding="utf-8",
    )


def _method(plan: Plan) -> str:
    quantization = plan.quantization_kwargs
    bits = "4-bit" if quantization and quantization.get("load_in_4bit") else "8-bit"
    return plan.adapter.described(f" on a {bits} base" if quantization else "")
