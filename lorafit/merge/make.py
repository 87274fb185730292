"""Merging: an adapter and its base -> one model that transformers loads alone, proved to answer as the adapter does."""

from __future__ import annotations

import contextlib
import fcntl
import os
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import NoReturn

from rich.console import Console

from lorafit.card import write_merged_card
from lorafit.errors import DoesNotFitError, GateError, UsageError
from lorafit.merge.exports import make_exports, places
from lorafit.merge.options import Options
from lorafit.merge.report import write_report
from lorafit.merge.source import Source, find_base, is_merged, open_source, same_base
from lorafit.merge.work import Work
from lorafit.quiet import hush_progress
from lorafit.rundir import located
from lorafit.staging import discard, partial_of, staged

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
        return _merge(options, source, others, console)


def _merge(options: Options, source: Source, others: list[Source], console: Console) -> Path:
    destination = _destination(options, source)
    replaced = [destination, _unverified(destination), *places(options, destination)]
    base = find_base(source, options.base, options.allow_other_base)
    for needed in (base.folder, *(each.adapter for each in (source, *others))):
        inside = next((place for place in replaced if needed.resolve().is_relative_to(place.resolve())), None)
        if inside is not None:
            raise UsageError(f"{inside}: would be replaced, and the merge needs {needed}; choose another --output")
    work = Work(options, source, others, base, console)
    if base.remark:
        work.say(base.remark)
    if options.as_adapter:
        from lorafit.merge.as_adapter import make_adapter

        return make_adapter(work, destination)
    work.prepare()
    proof = work.choose_proof()
    kinds, reason = work.base_kinds(proof)
    if partial_of(destination).is_dir():
        with _held(partial_of(destination), destination):
            discard(partial_of(destination))  # of a merge that was killed: its space is needed
    _check_disk(destination, work.bytes * len(kinds) + SLACK)
    with staged(destination) as folder, _held(folder, destination):
        if proof.level == "logits":
            proof.reference = work.measure()
        made = {kind: work.write(kind, folder / kind if len(kinds) > 1 else folder) for kind in kinds}
        proof.compare({kind: written.folder for kind, written in made.items()})
        chosen = kinds[0]
        if len(kinds) > 1:
            chosen, reason = proof.better_of(kinds)
            _keep(folder, folder / chosen, kinds)
        proof.judge(chosen, work.limits)
        report = work.report(made[chosen], chosen, reason, proof)
        write_report(folder, report)
        write_merged_card(folder / "README.md", source.plan, source.manifest, report)
        if proof.breaches:
            _set_aside(folder, destination, proof.breaches, chosen, source)
    make_exports(options, destination, report, proof.reference, console)
    return destination


@contextlib.contextmanager
def _held(folder: Path, destination: Path) -> Iterator[None]:
    """Hold a folder that is written, so that no other process takes it for what a killed merge left.

    Else the files of two merges into one destination would be mixed. Raises UsageError if another one has it.
    """
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        with contextlib.suppress(OSError):  # file systems that can't lock folders
            try:
                fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except BlockingIOError:
                raise UsageError(f"{destination}: another merge into it is at work") from None
        yield
    finally:
        os.close(descriptor)


def _set_aside(folder: Path, destination: Path, breaches: list[str], kind: str, source: Source) -> NoReturn:
    """Leave what was written under a name that nobody deploys. Raises GateError."""
    unverified = _unverified(destination)
    discard(unverified)
    folder.rename(unverified)
    hint = (
        "; --base-weights dequantized is what it was trained on" if kind == "original" and source.quantization else ""
    )
    raise GateError(f"{unverified}: not verified: {'; '.join(breaches)}{hint}")


def _unverified(destination: Path) -> Path:
    return destination.with_name(f"{destination.name}.unverified")


def _destination(options: Options, source: Source) -> Path:
    name = "merged-adapter" if options.as_adapter else "merged"
    if options.output is not None:
        destination = located(options.output)
    elif source.run is not None:
        destination = source.run.path / name
    else:
        raise UsageError(f"{source.adapter}: is not a run, so say with --output where the result goes")
    if destination.exists() and not is_merged(destination):
        raise UsageError(f"{destination}: exists and is not a merged model; choose another --output")
    return destination


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
