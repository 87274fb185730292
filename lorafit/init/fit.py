"""The settings of a first recipe that fit a memory: the least lossy that the estimator says fit."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

from lorafit.errors import DoesNotFitError
from lorafit.hardware import Hardware
from lorafit.memory import Estimate
from lorafit.vram.answer import Method, Solver, Subject, gib

ROWS_A_STEP = 16
BATCHES = (4, 2, 1)
SHORTEST = 256


@dataclass(frozen=True)
class Settings:
    """What the memory decides.

    Attributes:
        estimate: None on a CPU.
        passed: what was tried before, with its GiB, and did not surely fit.
    """

    method: Method
    batch: int
    checkpointing: bool
    max_length: int
    estimate: Estimate | None = None
    passed: tuple[str, ...] = ()

    @property
    def overrides(self) -> tuple[str, ...]:
        return (
            f"training.max_length={self.max_length}",
            f"training.per_device_train_batch_size={self.batch}",
            f"training.global_batch_size={ROWS_A_STEP}",
            f"training.gradient_checkpointing={str(self.checkpointing).lower()}",
        )

    @property
    def words(self) -> str:
        method = "LoRA in 16 bits" if self.method == "lora" else "QLoRA"
        checkpointing = ", gradient checkpointing" if self.checkpointing else ""
        return f"{method}, {self.batch} x {self.max_length} tokens at once{checkpointing}"


def fitting(model: str, hardware: Hardware, capacity: int, max_length: int, others: tuple[str, ...]) -> Settings:
    """The first of the candidates that surely fits. Raises ModelError, and DoesNotFitError where none does.

    Args:
        others: the recipe's other values that matter to memory, as overrides.
    """
    solve = Solver()
    passed: list[str] = []
    for one in candidates(max_length):
        subject = Subject(None, model, one.method, (*one.overrides, *others), hardware)
        estimate, verdict = solve.judged(subject, capacity)
        if verdict == "fits":
            return Settings(one.method, one.batch, one.checkpointing, one.max_length, estimate, tuple(passed))
        passed.append(f"{one.words}: {gib(estimate.total)} GiB, {verdict}")
    raise DoesNotFitError(
        f"{model}: does not fit in {gib(capacity)} GiB, even with {passed[-1]}; "
        "choose a smaller model or a GPU with more memory"
    )


def candidates(max_length: int) -> Iterator[Settings]:
    """From the least lossy to the smallest."""
    for method in ("lora", "qlora"):
        for checkpointing, batches in ((False, BATCHES[:1]), (True, BATCHES)):
            for batch in batches:
                if method == "lora" or checkpointing:
                    yield Settings(method, batch, checkpointing, max_length)
    length = max_length // 2
    while length >= SHORTEST:
        yield Settings("qlora", 1, True, length)
        length //= 2


def on_cpu(max_length: int) -> Settings:
    return Settings("lora", BATCHES[0], False, max_length)
