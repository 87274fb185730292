"""What is made of a merged model: 4-bit copies, GGUF files with a Modelfile, a hub repository."""

from __future__ import annotations

import gc
import json
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from transformers import AutoModelForCausalLM, BitsAndBytesConfig

from lorafit.errors import GateError, ModelError, UsageError
from lorafit.facts.folder import read_json
from lorafit.merge.folder import special_tokens
from lorafit.merge.options import Options
from lorafit.merge.report import as_markdown
from lorafit.merge.verify import PROBES, Reference, breaches, compare_folder
from lorafit.staging import discard, staged, write_text
from lorafit.tokenizer import cannot_load, tokenizer_of


def make_exports(
    options: Options, merged: Path, report: dict[str, Any], reference: Reference | None, console: Console
) -> None:
    """Every export that was asked for, each whole or absent, and measured; then the report says so too."""
    verification, made = report["verification"], []
    if options.quantize:
        made.append(quantized_copy(merged, options.quantize))
        if reference is not None:
            figures = compare_folder(reference, made[-1])
            verification["exports"][f"merged, then {options.quantize}"] = figures.as_dict()
            _gate(made[-1], breaches(figures, verification["limits"]), report["base_weights"]["used"])
    if options.exports:
        made.append(gguf_files(options, merged, report, reference, console))
    if made:
        report["exported"] = [str(folder) for folder in made]
        write_text(merged / "merge_report.json", json.dumps(report, indent=2, ensure_ascii=False) + "\n")
        write_text(merged / "merge_report.md", as_markdown(report))
        console.print(f"exported: {', '.join(report['exported'])}", highlight=False, soft_wrap=True)
    if options.push_to_hub is not None:
        from lorafit.export.hub import push

        console.print(push(merged, options.push_to_hub, options.private), highlight=False, soft_wrap=True)


def _gate(made: Path, found: list[str], base_weights: str) -> None:
    """Raises GateError for a 4-bit copy that is beyond a limit; it is left under another name."""
    if not found:
        return
    unverified = made.with_name(f"{made.name}.unverified")
    discard(unverified)
    made.rename(unverified)
    why = ""
    if base_weights == "dequantized":
        why = (
            "; weights that were in 4 bits before are rounded back to where they were, and the adapter is lost: merge "
            "with --base-weights original"
        )
    raise GateError(f"{unverified}: not verified: {'; '.join(found)}{why}")


def gguf_files(
    options: Options, merged: Path, report: dict[str, Any], reference: Reference | None, console: Console
) -> Path:
    """GGUF files in a folder beside the merged model, read back and compared with it, with a Modelfile for Ollama."""
    from lorafit.export import export_gguf, parse_export
    from lorafit.export.check import compare_gguf
    from lorafit.export.ollama import modelfile

    destination = merged.with_name(f"{merged.name}-gguf")
    if destination.exists() and not all(_ours(file) for file in destination.iterdir()):
        raise UsageError(f"{destination}: holds other files than GGUF exports; choose another --output")
    tokenizer = tokenizer_of(merged)
    rows = [row.ids for row in reference.rows] if reference else [tokenizer(text)["input_ids"] for text in PROBES]
    name = Path(report["adapter"]).name
    with staged(destination) as folder:
        for text in options.exports:
            kind = parse_export(text, options.llama_cpp)
            file = folder / f"{name}-{kind}.gguf"
            made_by = export_gguf(merged, file, kind, options.llama_cpp)
            report.setdefault("gguf", {})[kind] = {"made_by": made_by, "bytes": file.stat().st_size}
            try:
                report["gguf"][kind] |= compare_gguf(merged, file, rows)
            except ModelError as error:
                console.print(
                    f"{file.name}: not compared with the merged model: {error}", style="yellow", soft_wrap=True
                )
            if isinstance(tokenizer.chat_template, str):
                ends = read_json(merged / "generation_config.json").get("eos_token_id") or []
                stops = tokenizer.convert_ids_to_tokens(ends if isinstance(ends, list) else [ends])
                made = modelfile(tokenizer.chat_template, special_tokens(tokenizer), file.name, stops)
                target = "Modelfile" if text == options.exports[0] else f"Modelfile-{kind}"
                (folder / target).write_text(made.text, encoding="utf-8")
                if made.remark:
                    console.print(made.remark, style="yellow", highlight=False, soft_wrap=True)
    return destination


def _ours(file: Path) -> bool:
    return file.suffix == ".gguf" or file.name.startswith("Modelfile")


def quantized_copy(merged: Path, kind: str) -> Path:
    """The merged model in 4 bits, as bitsandbytes stores it, in a folder beside: `merged-nf4`. Raises ModelError."""
    destination = merged.with_name(f"{merged.name}-{kind}")
    config = BitsAndBytesConfig(
        load_in_4bit=True,
        bnb_4bit_quant_type=kind,
        bnb_4bit_use_double_quant=True,
        bnb_4bit_compute_dtype=torch.bfloat16,
    )
    with staged(destination) as folder:
        try:
            model = AutoModelForCausalLM.from_pretrained(
                str(merged), dtype="auto", quantization_config=config, device_map={"": "cpu"}
            )
        except Exception as error:
            raise cannot_load("merged model", str(merged), error) from error
        model.save_pretrained(folder)
        tokenizer_of(merged).save_pretrained(folder)
        del model
    gc.collect()
    return destination
