"""A training step's memory, recorded on the real modules without data, weights or a GPU."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

from lorafit.memory.allocator import Replay, replay
from lorafit.memory.setup import Setup
from lorafit.trace.log import FREE, SHORT, Event, Key, NotPeriodic, Recorder, Segment, lay_out
from lorafit.trace.model import build
from lorafit.trace.standins import fuse, standing_in
from lorafit.trace.steps import (
    decoder_layers,
    mark_layers,
    record_evaluation,
    record_optimizer,
    record_pass,
    record_weights,
)

CUBLAS_WORKSPACE = {9: 32 << 20}
CUBLAS_WORKSPACE_BEFORE = 8_519_680


@dataclass(frozen=True)
class Trace:
    """Two optimizer steps of the whole model, event by event.

    Attributes:
        events: (storage, bytes), FREE in place of the bytes where a storage ends.
        phases: (index of its first event, name) of each part.
    """

    events: tuple[Event, ...]
    phases: tuple[tuple[int, str], ...]

    def replay(self, capacity: int | None = None) -> Replay:
        return replay(self.events, capacity)


def trace(setup: Setup) -> Trace:
    """Record a setup's training step. Raises ModelError."""
    layers = setup.facts.layers or 0
    try:
        return _traced(setup, layers, SHORT if layers > SHORT and _uniform(setup) else layers)
    except NotPeriodic:
        return _traced(setup, layers, layers)


def _uniform(setup: Setup) -> bool:
    """Whether all layers but the first and the last two have tensors of the same shapes."""
    return True


def _traced(setup: Setup, layers: int, recorded: int) -> Trace:
    recorder = Recorder()
    model = build(setup, recorded)
    record_weights(model, recorder)
    passes = min(setup.accumulation, 2)
    with standing_in(setup, recorder) as autocast, recorder:
        if setup.device == "cuda":
            recorder.begin("start")
            recorder.keep(CUBLAS_WORKSPACE.get(setup.compute_capability[0], CUBLAS_WORKSPACE_BEFORE))
        fuse(model, setup.stack.kernels)
        mark_layers(decoder_layers(model), recorder)
        for number in range(passes):
            record_pass(model, setup, recorder, autocast, number)
        recorder.begin("zero_grad")
        for parameter in model.parameters():
            parameter.grad = None
        if setup.eval_batch:
            record_evaluation(model, setup, recorder, autocast)
        recorder.begin("end")
    parts = lay_out(recorder.segments, layers) if recorded != layers else as_recorded(recorder.segments)
    steps = Recorder()
    record_optimizer(model, setup, steps, layers)
    update = {
        segment.phase: [((segment.phase, None), [(("optimizer", None, n), size) for n, size in segment.events])]
        for segment in steps.segments
    }
    return Trace(*_in_order(parts | update))


def _in_order(parts: dict[str, list[tuple[Key, list[Event]]]]) -> tuple[tuple[Event, ...], tuple[tuple[int, str], ...]]:
    once = [name for name in parts if name.split()[0] in ("weights", "adapter", "start")]
    passes = [name for name in parts if name.split()[0] in ("forward", "backward")]
    order = list(once)
    for number in (1, 2):
        order += [*passes, f"clipping {number}", f"optimizer {number}", "zero_grad"]
    order += [name for name in parts if name.startswith("evaluation")]
    events: list[Event] = []
    phases: list[tuple[int, str]] = []
    for name in order:
        phases.append((len(events), name))
        for _, part in parts.get(name, []):
            events += part
    return tuple(events), tuple(phases)


def as_recorded(segments: list[Segment]) -> dict[str, list[tuple[Key, list[Event]]]]:
    result: dict[str, list[tuple[Key, list[Event]]]] = {}
    for segment in segments:
        events = [(("whole", None, number), size) for number, size in segment.events]
        result.setdefault(segment.phase, []).append(((segment.phase, segment.layer), events))
    return result
