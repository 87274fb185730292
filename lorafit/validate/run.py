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
    return Report(
        tuple(map(checker.check, each(found.recipes, "validating", len(found.recipes), "recipes"))), found.skipped
    )
