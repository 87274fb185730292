"""What a benchmark found: types, and medians with intervals."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict, dataclass
from typing import Any, Literal

import numpy as np

RESAMPLES = 10_000
Phase = Literal["prefill", "decode"]
PHASES: tuple[Phase, ...] = ("prefill", "decode")


@dataclass(frozen=True)
class Median:
    """Of the rounds, with the ends of its 95% bootstrap interval (percentile method; rounds are drawn again)."""

    value: float
    low: float
    high: float


def median(values: Sequence[float], seed: int) -> Median:
    """The median of the rounds' values."""
    rounds = np.asarray(values, dtype=np.float64)
    drawn = np.random.default_rng(seed).integers(0, len(rounds), (RESAMPLES, len(rounds)))
    low, high = np.quantile(np.median(rounds[drawn], axis=1), (0.025, 0.975))
    return Median(float(np.median(rounds)), float(low), float(high))


@dataclass(frozen=True)
class BenchModel:
    """A model that was measured.

    Attributes:
        kind: base, adapter, trained, merged or quantized.
        dtype: of the weights that are not quantized.
        quantization: such as nf4; None where no weights are quantized.
        tensor_bytes: parameters and buffers as they are held while the model runs, quantized ones as stored with
            their scales; an adapter's with those of its base.
        cache_bytes_per_token: tensors of the KV cache, for each token of each row, of the longest shape.
    """

    kind: str
    path: str
    dtype: str
    quantization: str | None
    tensor_bytes: int
    cache_bytes_per_token: float


@dataclass(frozen=True)
class Timing:
    """One model on one shape.

    Attributes:
        prefill_seconds: of each round: the pass over the prompts.
        decode_seconds: of each round: all steps together.
        prefill: prompt tokens of all rows in a second.
        decode: new tokens of all rows in a second.
        peak_bytes: on CUDA: `tensor_bytes` and the most that was allocated above the weights; None on a CPU.
    """

    model: str
    prompt_tokens: int
    batch: int
    prefill_seconds: tuple[float, ...]
    decode_seconds: tuple[float, ...]
    prefill: Median
    decode: Median
    peak_bytes: int | None


@dataclass(frozen=True)
class Ratio:
    """Speed of `model` over that of `against` on one shape: the median of the rounds' ratios."""

    model: str
    against: str
    phase: Phase
    prompt_tokens: int
    batch: int
    ratio: Median


def timing(
    model: str,
    tokens: tuple[int, int, int],
    seconds: Sequence[tuple[float, float]],
    peak_bytes: int | None,
    seed: int,
) -> Timing:
    """Tokens in a second from the times of the rounds.

    Args:
        tokens: of a prompt, rows of a batch, new tokens of a row.
        seconds: of each round, prefill and decode.
    """
    prompt, batch, new = tokens
    prefill, decode = zip(*seconds, strict=True)
    return Timing(
        model,
        prompt,
        batch,
        prefill,
        decode,
        median([prompt * batch / one for one in prefill], seed),
        median([new * batch / one for one in decode], seed),
        peak_bytes,
    )


def ratios(timings: Sequence[Timing], against: str, seed: int) -> list[Ratio]:
    """Every model against one of them, shape by shape, paired by round."""
    found = []
    reference = {(one.prompt_tokens, one.batch): one for one in timings if one.model == against}
    for one in timings:
        if one.model == against:
            continue
        other = reference[one.prompt_tokens, one.batch]
        for phase, mine, its in (
            (PHASES[0], one.prefill_seconds, other.prefill_seconds),
            (PHASES[1], one.decode_seconds, other.decode_seconds),
        ):
            values = [b / a for a, b in zip(mine, its, strict=True)]
            found.append(Ratio(one.model, against, phase, one.prompt_tokens, one.batch, median(values, seed)))
    return found


@dataclass(frozen=True)
class BenchReport:
    """What a benchmark found.

    Attributes:
        hardware: device, its name, threads, cores.
        settings: what was asked for, and `token_digests`: sha256 of each shape's token ids.
        load: the system's load average (1 minute) at the start and the end; None where there is none.
        remarks: what a reader should know, a sentence each.
    """

    run: str
    created: str
    versions: dict[str, str]
    hardware: dict[str, Any]
    settings: dict[str, Any]
    models: dict[str, BenchModel]
    timings: tuple[Timing, ...]
    ratios: tuple[Ratio, ...]
    load: tuple[float, float] | None
    remarks: tuple[str, ...]
    bench_version: int = 1

    def as_dict(self) -> dict[str, Any]:
        """For JSON."""
        return {"bench_version": self.bench_version, **asdict(self)}
