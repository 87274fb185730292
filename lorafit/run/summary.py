"""Plans and audits as people read them, and the model card."""

from __future__ import annotations

import itertools
import json
from pathlib import Path
from typing import Any

import yaml
from rich.markup import escape
from rich.text import Text

from lorafit.bounds import read_json
from lorafit.console import Console, print_line, print_table, table
from lorafit.plan import Plan
from lorafit.rows.audit import RULES, Audit, Limits, findings
from lorafit.text import harmless
from lorafit.written import REFERENCE


def print_plan(plan: Plan, console: Console | None = None) -> None:
    """The plan as a table on stdout."""
    console = console or Console()
    plan = plan.as_written()
    model, hardware = plan.model, plan.hardware
    parameters, trainable = model.parameters, model.trainable_parameters
    share = f" ({trainable / parameters:.2%})" if parameters else ""
    lines = [
        ("run", plan.output_dir),
        ("model", f"{model.name_or_path} ({model.model_type}, from {model.source})"),
        ("machine", f"{hardware.name} ({hardware.device})" + f" x {hardware.world_size}" * (hardware.world_size > 1)),
        ("parameters", f"{parameters:,}" if parameters else "not known before the model loads"),
        ("trained", f"{trainable:,}{share}" if trainable else "not known before the model loads"),
    ]
    lines += [("starts from", " -> ".join(stage.path for stage in plan.chain))] if plan.chain else []
    for name, sources in (("train", plan.data.train), ("validation", plan.data.validation)):
        for source in sources:
            rows = "rows not counted" if source.rows is None else f"{source.rows} rows"
            lines.append((name, f"{source.path} ({source.format or 'format known after download'}, {rows})"))
    if plan.data.validation_fraction is not None:
        lines.append(("validation", f"{plan.data.validation_fraction:.0%} of the training rows"))
    if plan.schedule:
        s = plan.schedule
        every = f", evaluated every {s.eval_steps}" if s.eval_steps else ""
        saved = f", saved every {s.save_steps}" if s.save_steps else ""
        lines.append(("steps", f"{s.total_steps} ({s.steps_per_epoch} an epoch){every}{saved}"))
    overview = table("", "", head=False)
    for key, value in lines:
        overview.add_row(Text(key, style="bold"), escape(str(value)))
    print_table(console, overview)
    choices = table("resolved", "value", "because")
    for key, choice in plan.choices.items():
        value = ", ".join(map(str, choice.value)) if isinstance(choice.value, list) else str(choice.value)
        choices.add_row(key, escape(value), escape(choice.reason))
    print_table(console, choices)
    if plan.audit:
        print_audit(Audit.from_dict(plan.audit), plan.data.audit, console)
    else:
        print_line(
            console, "The data has not been audited yet: `lorafit preview` does it, and so does training, first."
        )
    for remark in plan.remarks:
        print_line(console, remark, "yellow")


def print_audit(audit: Audit, limits: Limits, console: Console | None = None) -> None:
    """What was counted of each source, and what was found wrong, with the limits."""
    console = console or Console()
    counts = table("data", "rows", "used", "tokens", "learned", "longest", "left out", right=range(1, 6))
    parts = (("", audit.train), ("validation: ", audit.validation))
    for name, source in ((name, source) for name, sources in parts for source in sources):
        dropped = ", ".join(f"{count} {reason}" for reason, count in source.dropped.items())
        share = f"{source.supervised_tokens / source.tokens:.0%}" if source.tokens else ""
        numbers = (source.read, source.rows, source.tokens)
        counts.add_row(
            Text(harmless(name + source.path)),
            *(f"{n:,}" for n in numbers),
            share,
            f"{source.longest:,}",
            Text(harmless(dropped)),
        )
    print_table(console, counts)
    print_findings(audit, limits, console)


def print_findings(audit: Audit, limits: Limits, console: Console) -> None:
    """What was found wrong, a line each, and the rows that are left."""
    for one in findings(audit, limits):
        limit = "no limit" if one.limit is None else f"limit {one.limit:.4g}"
        line = f"{one} {RULES[one.rule]} ({limit}); the first: {one.finding.first}"
        print_line(console, harmless(line), "red" if one.is_breach else "yellow")
    for source in (*audit.train, *audit.validation):
        if source.reasoning or source.empty_reasoning:
            none = source.read - source.reasoning - source.empty_reasoning
            line = (
                f"{source.path}: {source.reasoning:,} rows have reasoning, {none:,} none; before the answers of "
                f"{source.empty_reasoning:,} the chat template writes an empty block of it"
            )
            print_line(console, harmless(line))
    part, held_out = audit.training_rows, audit.validation_rows
    packs = f" in {part.packs:,} packed rows" if part.packs is not None else ""
    others = f"; {held_out.rows:,} validation rows" if held_out else ""
    first = "" if audit.whole else "the first "
    print_line(
        console,
        f"{first}{part.rows:,} training rows{packs}, {part.tokens:,} tokens, {part.supervised_tokens:,} of them learned"
        f"{others}; answers found by: {audit.masks}",
    )


def print_preview(report: dict[str, Any], console: Console | None = None) -> None:
    """Rows by loss mask, lengths, packing and the audit on stdout."""
    console = console or Console()
    plain = console.color_system is None or console.no_color
    legend = (
        "learned text stands in ⟦ ⟧" if plain else "[green]learned[/green], [dim]context[/dim], [cyan]control[/cyan]"
    )
    for row in report["rows"]:
        title = (
            f"{row['place'] or report['part']} · row {row['number']}: {row['tokens']} tokens, {row['learned']} learned"
        )
        console.print(Text(harmless(title), style="bold"), soft_wrap=True)
        console.print(_masked(row["segments"], plain), soft_wrap=True)
        if "rejected" in row:
            console.print(Text("rejected: ", style="bold").append(_masked(row["rejected"], plain)), soft_wrap=True)
        for name in ("input_ids", "labels", "rejected_ids", "rejected_labels"):
            if name in row:
                console.print(f"{name.replace('input_', ''):6} {row[name]}", highlight=False, soft_wrap=True)
        console.print()
    if report["rows"]:
        console.print(f"({legend})", highlight=False)
    _print_lengths(report, console)
    print_audit(Audit.from_dict(report["audit"]), report["limits"], console)
    for remark in report["remarks"]:
        print_line(console, remark, "yellow")


def _masked(parts: list[dict[str, Any]], plain: bool) -> Text:
    """Text of which it shows what is learned."""
    text = Text()
    for learned, segments in itertools.groupby(parts, key=lambda segment: bool(segment["learned"])):
        text.append("⟦" * (plain and learned))
        for segment in segments:
            style = ("bold green", "green") if learned else ("cyan", "dim")
            text.append(harmless(segment["text"]), style[not segment["special"]])
        text.append("⟧" * (plain and learned))
    return text


def _print_lengths(report: dict[str, Any], console: Console) -> None:
    found, packing = report["lengths"], report["packing"]
    if found:
        most = max(bar["rows"] for bar in found["histogram"])
        bars = table("tokens up to", "rows", "", right=(0, 1))
        for bar in found["histogram"]:
            bars.add_row(f"{bar['up_to']:,}", f"{bar['rows']:,}", "█" * round(40 * bar["rows"] / most))
        print_table(console, bars)
        quantiles = (f"{name} {found[key]:,}" for name, key in (("median", "median"), ("90%", "p90"), ("99%", "p99")))
        print_line(console, f"{', '.join(quantiles)}, longest {found['longest']:,} tokens")
    if packing:
        made = "makes" if packing["on"] else "would make"
        print_line(
            console,
            f"packing {made} {packing['packed_rows']:,} rows of {packing['rows']:,}, {packing['efficiency']:.0%} full; "
            f"unpacked batches hold {packing['efficiency_without']:.0%} tokens, the rest is padding",
        )


def write_card(path: Path, plan: Plan, manifest: dict[str, Any]) -> None:
    """Write README.md with the front matter that model hubs read."""
    plan = plan.as_written()
    whole = plan.adapter.trains_base
    head: dict[str, Any] = {"library_name": "transformers" if whole else "peft", "tags": ["lorafit"]} | _base_of(plan)
    config = path.with_name("adapter_config.json")
    load = _LOAD if whole else load_adapter(read_json(config)["base_model_name_or_path"])
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


def load_adapter(base: str) -> str:
    """How PEFT loads an adapter: by the base that it names, unless only a person knows where that is."""
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
        *([("started from", " → ".join(f"`{stage.path}`" for stage in plan.chain))] if plan.chain else []),
        ("method", _method(plan)),
        ("trainable parameters", f"{plan.trainable_parameters:,}"),
        ("training rows", f"{data['rows']:,} ({data['supervised_tokens']:,} learned tokens)"),
        ("steps", f"{result['steps']:,}"),
        ("learning rate", f"{plan.training.learning_rate:g}"),
        ("seed", str(plan.training.seed)),
    ]
    if values := plan.data.chat_template_kwargs:
        rows.append(("chat template", "asks with " + ", ".join(f"`{k}: {json.dumps(v)}`" for k, v in values.items())))
    if result["best_metric"] is not None:
        rows.append((plan.training.best_by, f"{result['best_metric']:.4f} (step {result['best_step']})"))
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
