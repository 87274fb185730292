"""What a merge says of itself: merge_report.json for programs, merge_report.md for people."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from lorafit.files import write_text

FILES = ("merge_report.json", "merge_report.md")


def write_report(folder: Path, report: dict[str, Any]) -> None:
    write_text(folder / FILES[0], json.dumps(report, indent=2, ensure_ascii=False) + "\n")
    write_text(folder / FILES[1], as_markdown(report))


def as_markdown(report: dict[str, Any]) -> str:
    """The report on a page."""
    lines = ["# Merge report", "", f"**{report['verdict']}**", ""]
    rows = [
        ("adapter", f"`{report['adapter']}`"),
        *((f"and {item['weight']:g} times", f"`{item['adapter']}`") for item in report["additions"]),
        ("base", f"`{report['base']['name']}` (that of the training: {report['base']['checked']})"),
        ("base weights", f"{report['base_weights']['used']}: {report['base_weights']['reason']}"),
        ("method", f"{report['method']['used']}: {report['method']['reason']}"),
        ("written", f"{report['bytes'] / 1e9:.2f} GB, {report['dtype']}, in {report['seconds']:.1f} s"),
        ("changed", _changed(report)),
    ]
    lines += ["| | |", "|---|---|", *(f"| {name} | {value} |" for name, value in rows), ""]
    lines += _verification(report)
    lines += [f"- {remark}" for remark in report["remarks"]]
    targets = sorted(report["targets"], key=lambda target: -target["relative"])
    if targets:
        lines += [
            "",
            "## Changed weights, most changed first",
            "",
            "| weight | change ‖ΔW‖/‖W‖ | kept by rounding |",
            "|---|---|---|",
        ]
        lines += [f"| {t['parameter']} | {t['relative']:.3g} | {t['kept']:.1%} |" for t in targets[:20]]
        if len(targets) > 20:
            lines.append(f"| … {len(targets) - 20} more in merge_report.json | | |")
    return "\n".join(lines).rstrip() + "\n"


def _changed(report: dict[str, Any]) -> str:
    count = report["merged_weights"]
    shown = f"{count} weights"
    sizes = [target["relative"] for target in report["targets"]]
    if sizes:
        shown += f", by {min(sizes):.2g} to {max(sizes):.2g} of their norm"
    return shown + ("; embeddings and head were tied and no longer are" if report["untied"] else "")


def _verification(report: dict[str, Any]) -> list[str]:
    found = report["verification"]
    lines = ["## Verification", "", f"Level: {found['level']} ({found['reason']}).", ""]
    if found["figures"] is None:
        return lines
    adapter = found["adapter"]
    lines += [f"On {found['rows']}, {found['positions']:,} positions; the adapter on the base it was trained on:", ""]
    lines += ["| | loss | KL to the adapter | top-1 agreement | largest logit difference |", "|---|---|---|---|---|"]
    lines.append(f"| adapter | {adapter['loss']:.4f} | 0 | 100% | 0 |")
    lines.append(f"| base alone | | {adapter['base_kl']:.3g} | | |")
    candidates = {f"merged into {kind}": figures for kind, figures in report["base_weights"]["figures"].items()}
    for name, figures in (candidates | found["exports"]).items():
        shown = (
            f"{figures['loss']:.4f} | {figures['kl']:.3g} | {figures['top1']:.1%} | {figures['logit_difference']:.3g}"
        )
        lines.append(f"| {name} | {shown} |")
    lines += [
        "",
        f"Limits: {', '.join(f'{k} {v:g}' for k, v in found['limits'].items() if v is not None) or 'none'}.",
        "",
    ]
    lines += [f"- beyond its limit: {breach}" for breach in found["breaches"]]
    return lines
