"""The story of `lorafit validate`: find recipes, check each, report."""

from __future__ import annotations

from collections.abc import Iterable

from lorafit.errors import UsageError
from lorafit.progress import each
from lorafit.targets import near
from lorafit.validate.check import Checker
from lorafit.validate.find import find
from lorafit.validate.findings import Options
from lorafit.validate.types import PARTS, Report


def validate(paths: Iterable[str], options: Options) -> Report:
    """Check every recipe that the paths name. Raises UsageError for a path without recipes, or an unknown part."""
    for part in options.skip:
        if part not in PARTS:
            raise UsageError(f"--skip {part}: no such part{near(part, PARTS)}")
    found = find(paths)
    checker = Checker(options)
    wrong = [one for one in found.skipped if one.is_recipe and options.strict]
    checked = [*map(checker.check, each(found.recipes, "validating", len(found.recipes), "recipes"))]
    checked += (one.as_fault() for one in wrong)
    return Report(tuple(checked), tuple(one for one in found.skipped if one not in wrong))
