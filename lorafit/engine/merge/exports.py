"""What is made of a merged model: 4-bit copies, and GGUF files with a Modelfile."""

from __future__ import annotations

import gc
import shutil
from collections.abc import Iterator
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch
from transformers import AutoConfig, AutoModelForCausalLM, BitsAndBytesConfig, PreTrainedTokenizerBase

from lorafit.console import Console
from lorafit.engine.merge.folder import copy_tokenizer, write_report
from lorafit.engine.merge.verify import PROBES, Reference, agreement, breaches, compare_folder
from lorafit.engine.model import loading
from lorafit.engine.tokenizer import reading, tokenizer_of
from lorafit.errors import DoesNotFitError, GateError, ModelError, is_out_of_memory
from lorafit.export.gguf import export_gguf, parse_export, read_gguf
from lorafit.export.ollama import modelfile
from lorafit.export.vocabulary import read_vocabulary, stop_ids
from lorafit.families import family_of
from lorafit.files import claim, discard, staged
from lorafit.options import MergeOptions, copy_of, gguf_of, unverified
from lorafit.progress import each, stage
from lorafit.text import first_line

COMPARED_ROWS = 8
"""Rows that a GGUF file is compared on."""
SPECIAL = ("bos_token", "eos_token", "pad_token", "unk_token")
"""What chat templates know by name."""


def make_exports(
    options: MergeOptions, merged: Path, report: dict[str, Any], reference: Reference | None, console: Console
) -> None:
    """Every export that was asked for, each whole or absent, and measured; then the report says so too."""
    verification, made = report["verification"], []
    if options.quantize:
        made.append(quantized_copy(merged, options.quantize))
        if reference is not None:
            figures = compare_folder(reference, made[-1])
            verification["exports"][f"merged, then {options.quantize}"] = asdict(figures)
            _gate(made[-1], breaches(figures, verification["limits"]), report["base_weights"]["used"])
    if options.exports:
        made.append(gguf_files(options, merged, report, reference, console))
    if made:
        report["exported"] = [str(folder) for folder in made]
        write_report(merged, report)
        console.print(f"exported: {', '.join(report['exported'])}", highlight=False, soft_wrap=True)


def _gate(made: Path, found: list[str], base_weights: str) -> None:
    """Raises GateError for a 4-bit copy that is beyond a limit; it is left under another name."""
    if not found:
        return
    aside = unverified(made)
    claim(aside, "merge", "a merge")
    discard(aside)
    made.rename(aside)
    why = ""
    if base_weights == "dequantized":
        why = (
            "; weights that were in 4 bits before are rounded back to where they were, and the adapter is lost: merge "
            "with --base-weights original"
        )
    raise GateError(f"{aside}: not verified: {'; '.join(found)}{why}")


def gguf_files(
    options: MergeOptions, merged: Path, report: dict[str, Any], reference: Reference | None, console: Console
) -> Path:
    """GGUF files in a folder beside the merged model, read back and compared with it, with a Modelfile for Ollama.

    Raises ModelError for a model that the writer doesn't know, GateError for a 16-bit file that answers differently.
    """
    destination = gguf_of(merged)
    tokenizer = tokenizer_of(merged)
    rows = [row.ids for row in reference.rows] if reference else [tokenizer(text)["input_ids"] for text in PROBES]
    rows = rows[:: max(len(rows) // COMPARED_ROWS, 1)][:COMPARED_ROWS]
    name = Path(report["adapter"]).name
    with staged(destination, "gguf") as folder:
        for text in options.exports:
            kind = parse_export(text, options.llama_cpp)
            file = folder / f"{name}-{kind}.gguf"
            with stage(f"writing {file.name}"):
                made_by = export_gguf(merged, file, kind, options.llama_cpp)
            found: dict[str, Any] = {"made_by": made_by, "bytes": file.stat().st_size}
            report.setdefault("gguf", {})[kind] = found
            try:
                found |= compare_gguf(merged, file, rows)
            except ModelError as error:
                console.print(
                    f"{file.name}: not compared with the merged model: {error}", style="yellow", soft_wrap=True
                )
            else:
                _compared(file, kind, found, report["verification"]["limits"], console)
            target = "Modelfile" if text == options.exports[0] else f"Modelfile-{kind}"
            found["modelfile"] = target if isinstance(tokenizer.chat_template, str) else None
            if found["modelfile"]:
                _write_modelfile(folder / target, merged, tokenizer, file.name, console)
    if not isinstance(tokenizer.chat_template, str):
        several = "several chat templates by name" if tokenizer.chat_template else "no chat template"
        why = f"there is no Modelfile for Ollama: the tokenizer has {several}"
        report["no_modelfile"] = why
        console.print(why, style="yellow", highlight=False, soft_wrap=True)
    return destination


def _compared(file: Path, kind: str, found: dict[str, Any], limits: dict[str, Any], console: Console) -> None:
    shown = (
        f"{file.name}: top-1 agreement with the merged model {found['top1_agreement']:.1%}, KL {found['mean_kl']:.2g}"
    )
    least, most = limits.get("min_top1"), limits.get("max_kl")
    beyond = (least is not None and not found["top1_agreement"] >= least) or (
        most is not None and not found["mean_kl"] <= most
    )
    if beyond and kind in ("f32", "f16", "bf16"):
        raise GateError(f"{shown}: beyond merge.min_top1 or merge.max_kl, so it was not kept")
    console.print(f"{shown}{'; that is beyond the limits of the merge' * beyond}", highlight=False, soft_wrap=True)


def _write_modelfile(
    target: Path, merged: Path, tokenizer: PreTrainedTokenizerBase, gguf_name: str, console: Console
) -> None:
    try:
        adds_bos = read_vocabulary(merged, len(tokenizer)).add_bos
    except ModelError:  # a tokenizer that only llama.cpp's converter knows
        adds_bos = True
    stops = [token for token in tokenizer.convert_ids_to_tokens(stop_ids(merged)) if token is not None]
    special = {name: getattr(tokenizer, name) for name in SPECIAL}
    made = modelfile(tokenizer.chat_template, special, gguf_name, stops, adds_bos)
    target.write_text(made.text, encoding="utf-8")
    if made.remark:
        console.print(made.remark, style="yellow", highlight=False, soft_wrap=True)


def quantized_copy(merged: Path, kind: str) -> Path:
    """The merged model in 4 bits, as bitsandbytes stores it, in a folder beside: `merged-nf4`. Raises ModelError."""
    destination = copy_of(merged, kind)
    config = BitsAndBytesConfig(
        load_in_4bit=True,
        bnb_4bit_quant_type=kind,
        bnb_4bit_use_double_quant=True,
        bnb_4bit_compute_dtype=torch.bfloat16,
    )
    with staged(destination, "merge") as folder:
        with reading("merged model", merged), loading(merged):
            model = AutoModelForCausalLM.from_pretrained(
                str(merged), dtype="auto", quantization_config=config, device_map={"": "cpu"}
            )
        with stage(f"writing {destination}"):
            model.save_pretrained(folder)
        copy_tokenizer(merged, folder)  # nothing, if it has none
        shutil.copyfile(merged / "merge_report.json", folder / "merge_report.json")  # whose copy it is
        del model
    gc.collect()
    return destination


_FROM_FOLDER = (
    *("rope_parameters", "head_dim", "attention_bias", "mlp_bias", "sliding_window", "use_sliding_window"),
    *("layer_types", "query_pre_attn_scalar", "attn_logit_softcapping", "final_logit_softcapping"),
    *("original_max_position_embeddings",),
)
"""What transformers doesn't read from a GGUF file of the known families and llama.cpp does."""


def compare_gguf(folder: Path, gguf: Path, token_rows: list[list[int]]) -> dict[str, float]:
    """Run a model folder and its GGUF file, one after the other, in float32 on the same tokens.

    transformers reads the GGUF file, or lorafit's own reader where transformers doesn't know the architecture. A
    model's rope scaling, head size, biases and the like don't come from it but from the folder's config.json: tensors
    and vocabulary size are what is compared.

    Args:
        token_rows: rows of token ids, of any lengths above 0.

    Returns:
        top1_agreement: share of positions where both find the same token most likely.
        mean_kl: mean of KL(folder || file) in nats.
        positions: how many were compared.

    Raises ModelError if one can't be loaded, DoesNotFitError if memory is too small.
    """
    rows = [row for row in token_rows if row]
    if not rows:
        raise ModelError(f"{gguf}: there are no tokens to compare the file on")
    expected = list(_logits(folder, None, rows))

    def pairs() -> Iterator[tuple[torch.Tensor, torch.Tensor]]:
        for first, other in zip(expected, _logits(folder, gguf, rows), strict=True):
            if first.shape != other.shape:
                raise ModelError(f"{gguf}: has {other.shape[-1]:,} tokens, the model {first.shape[-1]:,}")
            yield first, other

    found = agreement(pairs())
    return {"top1_agreement": found["top1"], "mean_kl": found["kl"], "positions": float(sum(map(len, rows)))}


def _logits(folder: Path, gguf: Path | None, rows: list[list[int]]) -> Iterator[torch.Tensor]:
    """(tokens, vocabulary) for each row; the model is gone when all are done."""
    try:
        config = AutoConfig.from_pretrained(folder)
        family = family_of(config.model_type).gguf
        ours = gguf is not None and family.written != "" and not family.read
        where, more = folder, {}
        if gguf is not None and not ours:
            where, more = gguf.parent, {"gguf_file": gguf.name}
            known, config = config, AutoConfig.from_pretrained(where, **more)
            for name in _FROM_FOLDER:
                if hasattr(known, name):
                    setattr(config, name, getattr(known, name))
        with loading(gguf or folder):
            model = AutoModelForCausalLM.from_pretrained(where, config=config, dtype=torch.float32, **more)
        if gguf is not None and ours:
            _fill(model, folder, gguf)
    except Exception as error:
        if is_out_of_memory(error):
            raise DoesNotFitError(f"{gguf or folder}: the comparison doesn't fit into memory") from error
        raise ModelError(f"{gguf or folder}: can't be loaded to compare: {first_line(error)}") from error
    model.eval()
    for row in each(rows, f"comparing {(gguf or folder).name}", len(rows)):
        with torch.no_grad():
            yield model(input_ids=torch.tensor([row])).logits[0].float()
    del model
    gc.collect()


@torch.no_grad()
def _fill(model: torch.nn.Module, folder: Path, gguf: Path) -> None:
    """Give a model folder's model the tensors of its GGUF file."""
    parameters = dict(model.named_parameters())
    for name, rows in read_gguf(folder, gguf):
        if parameters[name].shape != rows.shape:
            raise ModelError(f"{name} has the shape {tuple(rows.shape)}, the model's {tuple(parameters[name].shape)}")
        parameters[name].copy_(torch.from_numpy(rows))
