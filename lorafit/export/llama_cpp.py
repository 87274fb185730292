"""GGUF files by the user's own llama.cpp, for architectures and kinds that lorafit doesn't write itself."""

from __future__ import annotations

import shutil
import subprocess
import sys
from pathlib import Path

from lorafit.errors import ModelError, printable
from lorafit.export.vocabulary import read_json
from lorafit.files import beside

_CONVERTED = ("f32", "f16", "bf16", "q8_0", "tq1_0", "tq2_0")
"""What convert_hf_to_gguf.py writes by itself (--outtype)."""


def convert(folder: Path, destination: Path, kind: str, llama_cpp: Path) -> None:
    """Run llama.cpp's convert_hf_to_gguf.py, and llama-quantize for kinds that it leaves to that program.

    The script runs with this Python. llama-quantize is looked for in `llama_cpp`, its build/bin and bin, and PATH. The
    16-bit file between the two is deleted. Nothing is left if a program fails. Raises ModelError in one line with
    the last line of what the program said.
    """
    script = llama_cpp / "convert_hf_to_gguf.py"
    if not script.is_file():
        raise ModelError(
            f"{llama_cpp}: there is no convert_hf_to_gguf.py; --llama-cpp is the folder of a llama.cpp clone"
        )
    direct = kind in _CONVERTED
    quantize = None if direct else _find_quantize(llama_cpp)
    destination.parent.mkdir(parents=True, exist_ok=True)
    with beside(destination) as partial:
        if quantize is None:
            _convert(script, folder, partial, kind)
            return
        between = partial.with_suffix(".16bit")
        config = read_json(folder / "config.json")
        half = "bf16" if config.get("dtype", config.get("torch_dtype")) == "bfloat16" else "f16"
        try:
            _convert(script, folder, between, half)
            _run([str(quantize), str(between), str(partial), kind.upper()], partial)
        finally:
            between.unlink(missing_ok=True)


def _convert(script: Path, folder: Path, file: Path, kind: str) -> None:
    _run([sys.executable, str(script), str(folder), "--outfile", str(file), "--outtype", kind], file)


def _find_quantize(llama_cpp: Path) -> Path:
    for place in (llama_cpp, llama_cpp / "build" / "bin", llama_cpp / "bin"):
        found = shutil.which("llama-quantize", path=str(place))
        if found:
            return Path(found)
    found = shutil.which("llama-quantize")
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
