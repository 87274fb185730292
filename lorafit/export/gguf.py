"""A merged model folder as one GGUF file: by lorafit, or by the user's own llama.cpp for what lorafit doesn't write."""

from __future__ import annotations

import shutil
import subprocess
import sys
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from lorafit.errors import ModelError, UsageError
from lorafit.export.layout import (
    Layout,
    Placed,
    Rows,
    check_architecture,
    language,
    loaded_name,
    make_layout,
    read_rows,
    remarks,
)
from lorafit.export.vocabulary import Vocabulary, read_json, read_vocabulary, refused
from lorafit.facts import by_name, read_shard, weight_files
from lorafit.families import family_of
from lorafit.files import beside
from lorafit.progress import each
from lorafit.text import printable

if TYPE_CHECKING:
    from gguf import GGMLQuantizationType, GGUFWriter

KINDS = ("f32", "f16", "bf16", "q8_0", "q4_0", "q4_1", "q5_0", "q5_1")
"""Kinds of GGUF files that lorafit writes itself."""
LLAMA_CPP_KINDS = (
    *("q2_k", "q3_k_s", "q3_k_m", "q3_k_l", "q4_k_s", "q4_k_m", "q5_k_s", "q5_k_m", "q6_k"),
    *("iq1_s", "iq1_m", "iq2_xxs", "iq2_xs", "iq2_s", "iq2_m", "iq3_xxs", "iq3_xs", "iq3_s", "iq3_m"),
    *("iq4_nl", "iq4_xs", "tq1_0", "tq2_0"),
)
"""Kinds that only llama.cpp writes."""


def parse_export(text: str, llama_cpp: Path | None = None) -> str:
    """The kind in a command-line value such as `gguf:f16`. Raises UsageError.

    Kinds that only llama.cpp writes, such as q4_k_m, are accepted only with `llama_cpp`, the folder of one.
    """
    form, _, kind = text.strip().lower().partition(":")
    if form != "gguf" or not kind:
        raise UsageError(f"--export {text}: expected gguf:KIND, with KIND one of {', '.join(KINDS)}")
    _check(kind, llama_cpp, f"--export {text}")
    return kind


def export_gguf(folder: Path, destination: Path, kind: str, llama_cpp: Path | None = None) -> str:
    """Write a merged model folder as a GGUF file; returns which program wrote it, "lorafit" or "llama.cpp".

    llama.cpp writes it if its folder is given. The file is written beside its place, flushed and renamed, so that it is
    whole or absent. Raises UsageError, ModelError for what isn't known exactly, and DoesNotFitError for a full disk.
    """
    _check(kind, llama_cpp, f"gguf:{kind}")
    write = partial(_write, folder, kind) if llama_cpp is None else _converter(folder, kind, llama_cpp)
    destination.parent.mkdir(parents=True, exist_ok=True)
    with beside(destination) as place:
        write(place, destination.stem)
    return "lorafit" if llama_cpp is None else "llama.cpp"


def check_gguf(base: Path, tokenizer: Path | None, rows: int | None = None) -> list[str]:
    """Refuse, before anything is merged, what `export_gguf` would refuse of a model that is merged into this base.

    Args:
        tokenizer: the folder that the merged model's is taken from.
        rows: of its embeddings, where the adapter brings another vocabulary along.

    Returns:
        What llama.cpp does in another way than this model, a sentence each.

    Raises ModelError.
    """
    _writer_package()
    config = read_json(base / "config.json")
    packed = config.pop("quantization_config", None)  # what is merged is not quantized any more
    files = weight_files(base)
    if packed or rows is not None or not files:
        check_architecture(base, config)
    else:
        make_layout(base, config, by_name(map(read_shard, files)))
    if tokenizer is None:
        raise refused(base, "there is no tokenizer.json")
    vocabulary = read_vocabulary(tokenizer, rows if rows is not None else int(language(config)["vocab_size"]))
    return [*remarks(config), *filter(None, [vocabulary.remark])]


def _check(kind: str, llama_cpp: Path | None, where: str) -> None:
    if kind in KINDS or (kind in LLAMA_CPP_KINDS and llama_cpp is not None):
        return
    if kind in LLAMA_CPP_KINDS:
        raise UsageError(
            f"{where}: only llama.cpp writes {kind}; give its folder with --llama-cpp DIR, or choose {', '.join(KINDS)}"
        )
    raise UsageError(f"{where}: unknown kind {kind!r}; choose {', '.join(KINDS)}, or with --llama-cpp such as q4_k_m")


_CONVERTED = ("f32", "f16", "bf16", "q8_0", "tq1_0", "tq2_0")
"""What convert_hf_to_gguf.py writes by itself (--outtype)."""


def _converter(folder: Path, kind: str, llama_cpp: Path) -> Callable[[Path, str], None]:
    """Runs llama.cpp's convert_hf_to_gguf.py, and llama-quantize for kinds that it leaves to that program.

    The script runs with this Python. llama-quantize is looked for in `llama_cpp`, its build/bin and bin, and PATH. The
    16-bit file between the two is deleted. Raises ModelError in one line with the last line of what a program said.
    """
    script = llama_cpp / "convert_hf_to_gguf.py"
    if not script.is_file():
        raise ModelError(
            f"{llama_cpp}: there is no convert_hf_to_gguf.py; --llama-cpp is the folder of a llama.cpp clone"
        )
    quantize = None if kind in _CONVERTED else _find_quantize(llama_cpp)

    def convert(file: Path, outtype: str) -> None:
        _run([sys.executable, str(script), str(folder), "--outfile", str(file), "--outtype", outtype], file)

    def write(file: Path, _: str) -> None:
        if quantize is None:
            return convert(file, kind)
        between = file.with_suffix(".16bit")
        config = read_json(folder / "config.json")
        try:
            convert(between, "bf16" if config.get("dtype", config.get("torch_dtype")) == "bfloat16" else "f16")
            _run([str(quantize), str(between), str(file), kind.upper()], file)
        finally:
            between.unlink(missing_ok=True)

    return write


def _find_quantize(llama_cpp: Path) -> Path:
    places = [str(llama_cpp), str(llama_cpp / "build" / "bin"), str(llama_cpp / "bin"), None]  # None is PATH
    found = next(filter(None, (shutil.which("llama-quantize", path=place) for place in places)), None)
    if found:
        return Path(found)
    raise ModelError(
        f"{llama_cpp}: there is no llama-quantize in it, in its build/bin or bin, or in PATH; "
        "build it: cmake -B build && cmake --build build --target llama-quantize"
    )


def _run(command: list[str], made: Path) -> None:
    name = Path(command[1] if command[0] == sys.executable else command[0]).name
    try:
        done = subprocess.run(command, capture_output=True, text=True, errors="replace", check=False)
    except OSError as error:
        raise ModelError(f"{name}: can't be run: {error.strerror}") from error
    if done.returncode != 0:
        lines = [line.strip() for line in (done.stderr or done.stdout).splitlines() if line.strip()]
        said = printable(lines[-1]) if lines else f"exit code {done.returncode}"
        raise ModelError(f"{name} failed: {said}")
    if not made.is_file():
        raise ModelError(f"{name} ended without writing its file")


_FILE_TYPES = {"f32": 0, "f16": 1, "q4_0": 2, "q4_1": 3, "q8_0": 7, "q5_0": 8, "q5_1": 9, "bf16": 32}
"""general.file_type of each kind, as llama.cpp numbers them."""
_BLOCK = 32
"""Numbers that the quantized kinds here put under one scale."""
_FLOAT16_MAX = 65504.0
_AT_A_TIME = 16 << 20
"""Numbers that are read and converted together."""


def _writer_package() -> Any:
    try:
        import gguf
    except ImportError:
        raise ModelError("writing GGUF needs the package gguf: pip install 'lorafit[gguf]'") from None
    return gguf


def _write(folder: Path, kind: str, place: Path, name: str) -> None:
    """Write a merged model (config.json, safetensors, tokenizer).

    Matrices get the kind; norms, biases and all that has one dimension stay in float32, as llama.cpp has it. With
    the kinds of 4 and 5 bits, embeddings and output head get q8_0; rows that don't divide by 32 get f16.
    """
    gguf = _writer_package()
    config = read_json(folder / "config.json")
    if not config:
        raise ModelError(f"{folder}: there is no config.json, so this is not a model folder; run lorafit merge first")
    files = weight_files(folder) or [folder / "model.safetensors"]
    layout = make_layout(folder, config, by_name(map(read_shard, files)))
    vocabulary = read_vocabulary(folder, layout.vocabulary)
    writer = gguf.GGUFWriter(place, layout.architecture)
    try:
        _add_metadata(writer, layout, vocabulary, name, kind)
        _write_tensors(writer, layout, kind)
    finally:
        writer.close()


def _add_metadata(writer: GGUFWriter, layout: Layout, vocabulary: Vocabulary, name: str, kind: str) -> None:
    writer.add_type("model")
    writer.add_name(name if vocabulary.named in name.lower() else f"{vocabulary.named} {name}")
    writer.add_file_type(_FILE_TYPES[kind])
    writer.add_quantization_version(2)  # the layout of blocks that every current reader expects
    for key, value in layout.metadata.items():
        full = f"{layout.architecture}.{key}"
        if isinstance(value, str):
            writer.add_string(full, value)
        elif isinstance(value, float):
            writer.add_float32(full, value)
        else:
            writer.add_uint32(full, value)
    writer.add_tokenizer_model(vocabulary.model)
    writer.add_tokenizer_pre(vocabulary.pre)
    writer.add_token_list(vocabulary.tokens)
    if vocabulary.scores:
        writer.add_token_scores(vocabulary.scores)
    writer.add_token_types(vocabulary.types)
    if vocabulary.merges:
        writer.add_token_merges(vocabulary.merges)
    for key, index in vocabulary.special.items():
        writer.add_uint32(f"tokenizer.ggml.{key}_token_id", index)
    writer.add_add_bos_token(vocabulary.add_bos)
    writer.add_add_eos_token(vocabulary.add_eos)
    if vocabulary.add_space_prefix is not None:
        writer.add_add_space_prefix(vocabulary.add_space_prefix)
    if vocabulary.chat_template:
        writer.add_chat_template(vocabulary.chat_template)


def _write_tensors(writer: GGUFWriter, layout: Layout, kind: str) -> None:
    import gguf
    from gguf.quants import quant_shape_to_byte_shape

    types = [_type_of(entry, kind) for entry in layout.tensors]
    for entry, qtype in zip(layout.tensors, types, strict=True):
        size = int(np.prod(quant_shape_to_byte_shape(entry.tensor.shape, qtype), dtype=np.int64))
        writer.add_tensor_info(entry.name, entry.tensor.shape, np.dtype(np.float32), size, raw_dtype=qtype)
    for name, factors in layout.rope_factors.items():
        float32 = gguf.GGMLQuantizationType.F32
        writer.add_tensor_info(name, factors.shape, factors.dtype, factors.nbytes, raw_dtype=float32)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_ti_data_to_file()
    assert writer.fout is not None
    (stream,) = writer.fout
    writer.write_padding(stream, stream.tell())
    placed = zip(layout.tensors, types, strict=True)
    for entry, qtype in each(placed, f"converting to {kind}", len(types), "tensors"):
        begin = stream.tell()
        for rows in _chunks(entry):
            _check_range(entry, rows, kind)
            stream.write(np.ascontiguousarray(gguf.quantize(rows, qtype)).data)
        writer.write_padding(stream, stream.tell() - begin)
    for factors in layout.rope_factors.values():
        stream.write(factors.data)
        writer.write_padding(stream, factors.nbytes)


def _type_of(entry: Placed, kind: str) -> GGMLQuantizationType:
    from gguf import GGMLQuantizationType

    shape = entry.tensor.shape
    if len(shape) == 1 or kind == "f32":
        return GGMLQuantizationType.F32
    if kind in ("f16", "bf16"):
        return GGMLQuantizationType[kind.upper()]
    if shape[-1] % _BLOCK:
        return GGMLQuantizationType.F16
    if entry.name in ("token_embd.weight", "output.weight"):
        return GGMLQuantizationType.Q8_0
    return GGMLQuantizationType[kind.upper()]


def _chunks(entry: Placed) -> Iterator[Rows]:
    """A tensor's rows in GGUF's order, whole heads at a time where their order changes."""
    shape = entry.tensor.shape
    unit = shape[0] // entry.heads if entry.heads else 1
    width = int(np.prod(shape[1:], dtype=np.int64))
    step = max(1, _AT_A_TIME // (unit * width)) * unit
    arrange: Callable[[Rows], Rows] = (lambda rows: _interleaved(rows, unit)) if entry.heads else (lambda rows: rows)
    for begin in range(0, shape[0], step):
        rows = arrange(read_rows(entry.tensor, begin, min(begin + step, shape[0])))
        yield rows + np.float32(entry.shift) if entry.shift else rows


def read_gguf(folder: Path, file: Path) -> Iterator[tuple[str, Rows]]:
    """The tensors of a file that lorafit wrote from a model folder, as that folder's model has them, in float32.

    Raises ModelError for a file that lacks one.
    """
    gguf = _writer_package()
    config = read_json(folder / "config.json")
    layout = make_layout(folder, config, by_name(map(read_shard, weight_files(folder))))
    family = family_of(str(config["model_type"]))
    found = {tensor.name: tensor for tensor in gguf.GGUFReader(file).tensors}
    for entry in layout.tensors:
        if entry.name not in found:
            raise ModelError(f"{file}: {entry.name} is missing")
        rows: Rows = gguf.dequantize(found[entry.name].data, found[entry.name].tensor_type)
        if entry.heads:
            size = rows.shape[0] // entry.heads
            rows = rows.reshape(-1, size // 2, 2, *rows.shape[1:]).swapaxes(1, 2).reshape(rows.shape)
        yield loaded_name(entry.tensor.name, family), rows - np.float32(entry.shift)


def _interleaved(rows: Rows, size: int) -> Rows:
    """(heads x size, ...) with each head's halves turned into neighbours: 0, size/2, 1, size/2 + 1, …"""
    halves = rows.reshape(-1, 2, size // 2, *rows.shape[1:])
    return np.ascontiguousarray(halves.swapaxes(1, 2)).reshape(rows.shape)


def _check_range(entry: Placed, rows: Rows, kind: str) -> None:
    largest = float(np.max(np.abs(rows), initial=0))  # NaN if any is
    if not np.isfinite(largest):
        raise ModelError(f"{entry.tensor.file}: {entry.tensor.name} has weights that are not finite; train again")
    if largest > _FLOAT16_MAX and rows.ndim > 1 and kind not in ("f32", "bf16"):
        raise ModelError(
            f"{entry.tensor.file}: {entry.tensor.name} has weights up to {largest:g}, beyond float16; use gguf:bf16"
        )
