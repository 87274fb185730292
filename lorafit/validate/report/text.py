"""For people: a line for each recipe, and for each fault one as a compiler writes it."""

from __future__ import annotations

from collections.abc import Iterator

from lorafit.errors import printable
from lorafit.validate.types import Checked, Report
from lorafit.vram.answer import gib


def text(report: Report) -> str:
    return "\n".join([*_lines(report), _last(report)])


def _lines(report: Report) -> Iterator[str]:
    seen = set()
    for one in report.checked:
        yield f"{'ok  ' if one.is_ok else 'FAIL'} {printable(one.file)}{_about(one)}"
        for fault in one.faults:
            again = fault in seen
            seen.add(fault)
            yield f"     {fault.mistake.position}: (as above)" if again else f"     {fault.mistake}"
        for note in one.notes:
            yield f"     note: {printable(note)}"
    for left_out in report.skipped:
        yield f"skip {printable(left_out.file)}: {left_out.reason}"


def _about(one: Checked) -> str:
    if one.kind == "part":
        return "  a part: others extend it" if one.is_ok else ""
    if not one.is_ok or not one.facts.get("parameters"):
        return ""
    parameters, trained = one.facts["parameters"], one.facts["trainable_parameters"]
    parts = [one.facts["model"], f"{parameters / 1e6:,.0f} M parameters, {trained / 1e6:,.2f} M trained"]
    if "fits" in one.facts:
        parts.append(f"{gib(one.facts['peak_memory_bytes'])} GiB: {one.facts['fits']} in {one.facts['device']}")
    return "  " + "; ".join(parts)


def _last(report: Report) -> str:
    count, wrong = len(report.checked), sum(not one.is_ok for one in report.checked)
    files = f"{count} file{'s' * (count != 1)}"
    faults = len(report.faults)
    return f"{files}: {faults} fault{'s' * (faults != 1)} in {wrong}" if wrong else f"{files}: no faults"
