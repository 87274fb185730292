"""Merging an adapter into its base. What is asked is light; `lorafit.engine.merge.run` does it."""

from __future__ import annotations

import contextlib
import os
import shutil
from pathlib import Path
from typing import NoReturn

from lorafit.console import Console
from lorafit.engine.merge.exports import make_exports
from lorafit.engine.merge.folder import FILES, write_report
from lorafit.engine.merge.source import Source, find_base, open_source, same_base
from lorafit.engine.merge.work import Work
from lorafit.engine.quiet import hush_progress
from lorafit.errors import DoesNotFitError, GateError, UsageError
from lorafit.files import discard, finish, partial_of, settle, staged, writing
from lorafit.options.merge import Options, unverified
from lorafit.run.card import write_merged_card
from lorafit.run.directory import located

# Read by torch at its first allocation: blocks of 2 MB and more in huge pages, where the system leaves that to programs
# (transparent_hugepage: madvise). Merging is mostly fresh memory: 12 s became 7.4 s for 1.5 billion parameters.
os.environ.setdefault("THP_MEM_ALLOC_ENABLE", "1")


SLACK = 64 << 20
"""Bytes of disk beside the weights: tokenizer, reports, and what file systems need."""


def merge(options: Options, console: Console) -> Path:
    """Merge an adapter into its base, whole or not at all, and prove it.

    Returns the folder. Raises UsageError, ModelError for inputs that don't belong together,
    DoesNotFitError, and GateError: then what was written is left under the name `….unverified`.
    """
    options.check()
    hush_progress()
    with contextlib.ExitStack() as stack:
        paths = [located(path) for path in (options.path, *(addition.path for addition in options.additions))]
        twice = next((path for path in paths if paths.count(path) > 1), None)
        if twice is not None:
            raise UsageError(f"{twice}: is named twice; give it one factor, with --weight or in --add")
        source = stack.enter_context(open_source(options.path))
        others = [stack.enter_context(open_source(addition.path)) for addition in options.additions]
        for other in others:
            same_base(source, other)
        destination = options.destination()
        stack.enter_context(writing(destination))
        return _merge(options, source, others, destination, console)


def _merge(options: Options, source: Source, others: list[Source], destination: Path, console: Console) -> Path:
    base = find_base(source, options.base, options.allow_other_base)
    held = [each.run.path if each.run else each.adapter for each in (source, *others)]
    options.claim([base.folder, *held, *(each.adapter for each in (source, *others))])
    work = Work(options, source, others, base, console)
    if base.remark:
        work.say(base.remark)
    if options.as_adapter:
        from lorafit.engine.merge.as_adapter import make_adapter

        return make_adapter(work, destination)
    work.prepare()
    proof = work.choose_proof()
    kinds, reason = work.base_kinds(proof)
    discard(partial_of(destination))  # of a merge that was killed: its space is needed
    _check_disk(destination, work.bytes * len(kinds) + SLACK)
    with staged(destination, "merge", FILES if options.places() else ()) as folder:  # exports are added
        if proof.level == "logits":
            proof.reference = work.measure()
        made = {kind: work.write(kind, folder / kind if len(kinds) > 1 else folder) for kind in kinds}
        proof.compare({kind: written.folder for kind, written in made.items()})
        chosen = kinds[0]
        if len(kinds) > 1:
            chosen, reason = proof.better_of(kinds, work.limits)
            _keep(folder, folder / chosen, kinds)
        proof.judge(chosen, work.limits)
        report = work.report(made[chosen], chosen, reason, proof)
        write_report(folder, report)
        write_merged_card(folder / "README.md", source.plan, source.manifest, report)
        if proof.breaches:
            _set_aside(folder, destination, proof.breaches, chosen, source)
    try:
        make_exports(options, destination, report, proof.reference, console)
    finally:
        finish(destination)
    return destination


def _set_aside(folder: Path, destination: Path, breaches: list[str], kind: str, source: Source) -> NoReturn:
    """Leave what was written under a name that nobody deploys. Raises GateError."""
    settle(folder, unverified(destination), "merge")
    hint = (
        "; --base-weights dequantized is what it was trained on" if kind == "original" and source.quantization else ""
    )
    raise GateError(f"{unverified(destination)}: not verified: {'; '.join(breaches)}{hint}")


def _check_disk(destination: Path, needed: int) -> None:
    place = destination.parent
    while not place.exists():
        place = place.parent
    free = shutil.disk_usage(place).free
    if free < needed:
        raise DoesNotFitError(
            f"{destination}: the merge needs {needed / 1e9:.2f} GB of disk and {free / 1e9:.2f} GB are free; make "
            "room, or choose another --output"
        )


def _keep(folder: Path, chosen: Path, kinds: list[str]) -> None:
    """Of the candidates below a folder, keep one, in their place."""
    for kind in kinds:
        if folder / kind != chosen:
            shutil.rmtree(folder / kind)
    for entry in chosen.iterdir():
        entry.rename(folder / entry.name)
    chosen.rmdir()
