"""All of a merged model's folder but its weights: configuration, tokenizer, card, and the report of the merge."""

from __future__ import annotations

import json
import shutil
import statistics
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from lorafit.bounds import read_json
from lorafit.engine.tokenizer import tokenizer_of
from lorafit.facts import TOKENIZER_FILES, TokenizerFacts
from lorafit.facts.folder import tokenizer_facts
from lorafit.facts.template import inspect_template
from lorafit.files import file_digest, write_text
from lorafit.run.manifest import versions
from lorafit.written import as_written

if TYPE_CHECKING:
    from lorafit.engine.merge.run import Merging
    from lorafit.engine.merge.stream import Merged
    from lorafit.engine.merge.verify import Proof

TYPES = {"F32": "float32", "F16": "float16", "BF16": "bfloat16", "F64": "float64"}
_KEPT = ("preprocessor_config.json", "processor_config.json", "video_preprocessor_config.json", "LICENSE*", "NOTICE*")


def write_config(base: Path, folder: Path, dtype: str | None, untied: bool, vocabulary: int | None) -> None:
    """The base's config.json with what the merge has changed, and the files beside it that a deployment needs.

    Args:
        dtype: name of the weights' type, where it is not the base's; None leaves it.
        untied: whether embeddings and head are now different tensors.
        vocabulary: rows of the embeddings, where they are not the base's; None leaves it.
    """
    config = read_json(base / "config.json")
    config.pop("quantization_config", None)
    config.pop("_name_or_path", None)  # where somebody had it
    text = config.get("text_config") if isinstance(config.get("text_config"), dict) else None
    parts: list[dict[str, Any]] = [part for part in (config, text) if part is not None]
    for part in parts:
        if untied and (part is config or "tie_word_embeddings" in part):
            part["tie_word_embeddings"] = False
        if vocabulary and "vocab_size" in part:
            part["vocab_size"] = vocabulary
        if dtype in TYPES.values():
            names = [name for name in ("dtype", "torch_dtype") if name in part] or (["dtype"] if part is config else [])
            part |= dict.fromkeys(names, dtype)
    write_json(folder / "config.json", config)
    for pattern in _KEPT:
        for file in filter(Path.is_file, base.glob(pattern)):
            shutil.copyfile(file, folder / file.name)


def tokenizer_folder(*folders: Path) -> Path | None:
    """The first folder with a tokenizer: with a vocabulary, or if none has one of the usual names, any of its files."""
    for names in (("tokenizer.json", "tokenizer.model", "vocab.json"), TOKENIZER_FILES):
        for folder in folders:
            if any((folder / name).is_file() for name in names):
                return folder
    return None


def copy_tokenizer(source: Path, folder: Path) -> None:
    """The tokenizer with its chat templates, byte for byte as it was trained with."""
    for name in TOKENIZER_FILES:
        if (source / name).is_file():
            shutil.copyfile(source / name, folder / name)
    if (source / "additional_chat_templates").is_dir():
        shutil.copytree(source / "additional_chat_templates", folder / "additional_chat_templates")


def write_generation_config(base: Path, folder: Path) -> None:
    """The base's generation settings, stopping at every token that ends an answer of the folder's tokenizer.

    The ends are those of the base, the tokenizer's end token, and what the chat template writes after an answer,
    if that is one token.
    """
    file = base / "generation_config.json"
    config = read_json(file) if file.is_file() else {}
    known = config.get("eos_token_id", read_json(base / "config.json").get("eos_token_id"))
    facts = tokenizer_facts(folder) or TokenizerFacts()
    ids = _token_ids(folder) if tokenizer_folder(folder) else {}
    named = {"bos_token": facts.bos_token, "eos_token": facts.eos_token, "pad_token": facts.pad_token}
    turn = inspect_template(facts.chat_template, dict(named)).end_of_turn if facts.chat_template else None
    every = [*(known if isinstance(known, list) else [known]), ids.get(facts.eos_token), ids.get(turn)]
    ends = list(dict.fromkeys(token for token in every if isinstance(token, int)))
    if ends:
        config["eos_token_id"] = ends[0] if len(ends) == 1 else ends
    for name in ("bos_token", "pad_token"):
        if config.get(f"{name}_id") is None and named[name] in ids:
            config[f"{name}_id"] = ids[named[name]]
    write_json(folder / "generation_config.json", config)


def _token_ids(folder: Path) -> dict[str | None, int]:
    """The ids of a tokenizer's special tokens, and of others as far as they are at hand."""
    file = folder / "tokenizer.json"
    added = read_json(file).get("added_tokens") if file.is_file() else None
    if not added:
        return dict(tokenizer_of(folder).get_vocab())
    return {token["content"]: token["id"] for token in added}


def write_json(file: Path, value: Any) -> None:
    file.write_text(json.dumps(value, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")


FILES = ("merge_report.json", "merge_report.md")
"""The report, for programs and for people."""


@dataclass(frozen=True)
class Written:
    """A merged folder as it was written."""

    folder: Path
    merged: int
    targets: list[Merged]
    untied: bool
    dtype: str
    bytes: int
    seconds: float


def combined(merging: Merging) -> dict[str, Any]:
    """The part of a report that says how adapters were combined, and on which base."""
    options, base = merging.options, merging.base
    return {
        "weight": options.weight,
        "combine": {"method": options.combine, "density": options.density, "seed": options.seed},
        "base": {"name": base.name, "checked": base.checked},
    }


def build_report(merging: Merging, written: Written, kind: str, reason: str, proof: Proof) -> dict[str, Any]:
    """What merge_report.json says."""
    reference, weights = proof.reference, merging.source.adapter / "adapter_model.safetensors"
    kept = [target.kept for target in written.targets]
    if kept and statistics.median(kept) < 0.5:
        merging.say(
            f"Rounding to {written.dtype} leaves {statistics.median(kept):.0%} of what the adapter changes in the "
            "middle weight: the adapter's work is partly lost in the merged model. Use the adapter itself, or "
            "--dtype float32."
        )
    if written.untied:
        merging.say("embeddings and head were one tensor and are two now: the adapter treats them differently")
    added = zip(merging.others, merging.options.additions, strict=True)
    report = {
        "report_version": 2,
        "verdict": _verdict(proof, merging.method),
        "adapter": merging.source.shown,
        "adapter_sha256": file_digest(weights) if weights.is_file() else None,
        "chain": [asdict(stage) for stage in merging.source.plan.chain] if merging.source.plan else [],
        "additions": [{"adapter": other.shown, "weight": addition.weight} for other, addition in added],
        **combined(merging),
        "base_weights": {
            "used": kind,
            "reason": reason,
            "quantization": merging.source.quantization,
            "figures": {name: asdict(value) for name, value in proof.figures.items()},
        },
        "method": {"used": merging.method, "reason": merging.method_reason},
        "dtype": written.dtype,
        "bytes": written.bytes,
        "seconds": round(written.seconds, 3),
        "untied": written.untied,
        "merged_weights": written.merged,
        "targets": [asdict(target) for target in written.targets],
        "verification": {
            "level": proof.level,
            "reason": proof.reason,
            "rows": reference.shown if reference else None,
            "positions": sum(len(kept) for kept in reference.logits) if reference else 0,
            "adapter": {"loss": reference.loss, "base_kl": reference.base_kl} if reference else None,
            "figures": asdict(proof.figures[kind]) if proof.figures else None,
            "exports": {},
            "limits": merging.limits,
            "breaches": proof.breaches,
        },
        "remarks": merging.remarks,
        "versions": versions(),
    }
    return as_written(report, merging.references)


def _verdict(proof: Proof, method: str) -> str:
    if proof.breaches:
        return "Not verified: beyond the limits."
    if proof.level == "weights" and method == "full":
        return "Not verified: merged by PEFT in memory into finite numbers; neither weights nor answers were compared."
    shown = {
        "logits": "Verified: the merged model, loaded by transformers alone, answers as the adapter on its base does.",
        "weights": "Verified by weights: every target is merged and sound; answers were not compared.",
        "none": "Not verified, as asked.",
    }
    return shown[proof.level]


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
