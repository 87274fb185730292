"""The plan: every value that a recipe leaves open, resolved, each with its reason.

`make_plan` is the only place that decides. What it returns is exactly what the libraries are
handed later (`model_kwargs` for from_pretrained, `lora_kwargs` for LoraConfig and so on), so that
what is shown before a run is what runs. No torch, no transformers.
"""

from __future__ import annotations

from lorafit.plan.resolve import dated, make_plan, plan_recipe, with_audit
from lorafit.plan.values import Choice, DataPlan, Plan, Schedule, SourcePlan, Training, make_schedule, validation_rows

__all__ = [
    "Choice",
    "DataPlan",
    "Plan",
    "Schedule",
    "SourcePlan",
    "Training",
    "dated",
    "make_plan",
    "make_schedule",
    "plan_recipe",
    "validation_rows",
    "with_audit",
]
