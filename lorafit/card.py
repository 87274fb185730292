"""The model card that is saved with an adapter or model."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any

import yaml

if TYPE_CHECKING:
    from lorafit.plan import Plan


def write_card(path: Path, plan: Plan, manifest: dict[str, Any]) -> None:
    """Write README.md with the front matter that model hubs read."""
    lora, result, data = plan.lora_kwargs, manifest["result"], manifest["data"]["audit"]["training_rows"]
    name = plan.model["name_or_path"]
    is_hub = plan.model["kind"] in ("hub", "bundled")
    head: dict[str, Any] = {"library_name": "peft" if lora else "transformers", "tags": ["lorafit"]}
    if is_hub:
        head["base_model"] = name
    rows = [
        ("base model", f"`{name}`"),
        ("method", _method(plan)),
        ("trainable parameters", f"{plan.trainable_parameters:,}"),
        ("training rows", f"{data['rows']:,} ({data['supervised_tokens']:,} learned tokens)"),
        ("steps", f"{result['steps']:,}"),
        ("learning rate", f"{plan.training_kwargs['learning_rate']:g}"),
        ("seed", str(plan.training_kwargs["seed"])),
    ]
    if result["best_validation_loss"] is not None:
        rows.append(("validation loss", f"{result['best_validation_loss']:.4f} (step {result['best_step']})"))
    table = "\n".join(f"| {key} | {value} |" for key, value in rows)
    versions = ", ".join(f"{key} {value}" for key, value in manifest["versions"].items())
    load = (
        'from peft import AutoPeftModelForCausalLM\n\nmodel = AutoPeftModelForCausalLM.from_pretrained(".")'
        if lora
        else 'from transformers import AutoModelForCausalLM\n\nmodel = AutoModelForCausalLM.from_pretrained(".")'
    )
    path.write_text(
        f"---\n{yaml.safe_dump(head, sort_keys=True)}---\n\n# {plan.name}\n\n"
        f"Trained with lorafit.\n\n| | |\n|---|---|\n{table}\n\n```python\n{load}\n```\n\n{versions}\n",
        encoding="utf-8",
    )


def _method(plan: Plan) -> str:
    lora = plan.lora_kwargs
    if lora is None:
        return "all parameters"
    kind = "DoRA" if lora["use_dora"] else "rsLoRA" if lora["use_rslora"] else "LoRA"
    if plan.quantization_kwargs:
        bits = "4-bit" if plan.quantization_kwargs.get("load_in_4bit") else "8-bit"
        kind += f" on a {bits} base"
    return f"{kind}, r {lora['r']}, alpha {lora['lora_alpha']:g}"
