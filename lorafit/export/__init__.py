"""A finished model for other programs: GGUF (llama.cpp, Ollama), vLLM, the hub."""

from __future__ import annotations

from pathlib import Path

from lorafit.errors import UsageError

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

    llama.cpp writes it if its folder is given. Raises UsageError, ModelError, DoesNotFitError; nothing is left then.
    """
    _check(kind, llama_cpp, f"gguf:{kind}")
    if llama_cpp is not None:
        from lorafit.export.llama_cpp import convert

        convert(folder, destination, kind, llama_cpp)
        return "llama.cpp"
    from lorafit.export.gguf import write_gguf

    write_gguf(folder, destination, kind)
    return "lorafit"


def _check(kind: str, llama_cpp: Path | None, where: str) -> None:
    if kind in KINDS or (kind in LLAMA_CPP_KINDS and llama_cpp is not None):
        return
    if kind in LLAMA_CPP_KINDS:
        raise UsageError(
            f"{where}: only llama.cpp writes {kind}; give its folder with --llama-cpp DIR, or choose {', '.join(KINDS)}"
        )
    raise UsageError(f"{where}: unknown kind {kind!r}; choose {', '.join(KINDS)}, or with --llama-cpp such as q4_k_m")
