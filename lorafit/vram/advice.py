"""What to change so that a recipe fits, in order of the harm done, each change planned and estimated anew."""

from __future__ import annotations

import re
import shlex
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace

from lorafit.errors import LorafitError
from lorafit.memory import Estimate, Setup, Sharding
from lorafit.outcome import Outcome, Outcomes
from lorafit.plan import Plan
from lorafit.recipe import Recipe
from lorafit.vram.question import Solver, Subject

SHORTEST = 512
"""Tokens below which rows are not cut further."""
GPU_COUNTS = (2, 4, 8)
WORTH = 0.01
"""Share of the total below which a saving alone is not worth a word."""
SMALLER_STATES = {
    "adamw_torch": ("adamw_8bit", "paged_adamw_8bit"),
    "adamw_torch_fused": ("adamw_8bit", "paged_adamw_8bit"),
    "adamw_8bit": ("paged_adamw_8bit",),
    "paged_adamw_32bit": ("paged_adamw_8bit",),
    "lion_32bit": ("lion_8bit", "paged_lion_8bit"),
    "lion_8bit": ("paged_lion_8bit",),
    "paged_lion_32bit": ("paged_lion_8bit",),
    "ademamix_8bit": ("paged_ademamix_8bit",),
}
"""Optimizers with the same update and smaller states, the nearest first."""


@dataclass(frozen=True)
class Change:
    """A way to lower the memory, or several: what it does and costs, as overrides for `--set` or as more GPUs.

    It is harmful where the result of the training changes, or more GPUs are needed.
    """

    does: str
    costs: str
    overrides: tuple[str, ...] = ()
    harmful: bool = False
    gpus: int = 1
    sharding: Sharding | None = None

    def made(self, subject: Subject) -> Subject:
        changed = subject.changed(*self.overrides)
        return changed.over(self.gpus, self.sharding) if self.sharding else changed

    @property
    def options(self) -> str:
        """What is added to the command for it."""
        words = [word for override in self.overrides for word in ("--set", shlex.quote(override))]
        return " ".join(words + (["--gpus", str(self.gpus), "--sharding", self.sharding] if self.sharding else []))


@dataclass(frozen=True)
class Advice:
    """A change that lowers the memory, and what it leads to."""

    change: Change
    estimate: Estimate
    verdict: str


def advise(solve: Solver, subject: Subject, capacity: int) -> list[Advice]:
    """The changes that help, the least harmful first; also those that are enough together, if no harmless one is.

    Of a change that can be made in several degrees the mildest that fits is shown, else the strongest.
    """
    return _Adviser(solve, subject, capacity).advice()


@dataclass
class _Adviser:
    solve: Solver
    subject: Subject
    capacity: int

    def advice(self) -> list[Advice]:
        try:
            found = self.solve(self.subject)
            total = found.estimate().total
            levers = [degrees for lever in LEVERS if (degrees := list(lever(found.recipe, found.setup)))]
        except LorafitError:  # only traced: nothing light can be said
            return []
        tried = [best[1] for lever in levers if (best := self._degree([], lever)) is not None]
        helping = [one for one in tried if one.verdict == "fits" or one.estimate.total < (1 - WORTH) * total]
        if not any(one.verdict == "fits" and not one.change.harmful for one in helping):
            together = self._together(levers)
            if together is not None and (together.verdict == "fits" or not any(o.verdict == "fits" for o in helping)):
                helping.append(together)
        return sorted(helping, key=lambda one: one.change.harmful)

    def _advice(self, made: list[Change]) -> Advice | None:
        """What some changes together lead to; None where the plan refuses one of them."""
        change = joined(made)
        try:
            return Advice(change, *self.solve(change.made(self.subject)).judged(self.capacity))
        except LorafitError:
            return None

    def _degree(self, before: list[Change], lever: list[Change]) -> tuple[Change, Advice] | None:
        """The mildest degree of a lever that fits, on top of other changes; else the one that takes least."""
        tried = [(change, advice) for change in lever if (advice := self._advice([*before, change])) is not None]
        fitting = next(((change, advice) for change, advice in tried if advice.verdict == "fits"), None)
        return fitting or min(tried, key=lambda pair: pair[1].estimate.total, default=None)

    def _together(self, levers: list[list[Change]]) -> Advice | None:
        """The changes with the least harm that are enough together; all that help, where even they are not."""
        made: list[Change] = []
        best: Advice | None = None
        for lever in levers:
            found = self._degree(made, lever)
            if found is None or (best is not None and found[1].estimate.total >= best.estimate.total):
                continue
            made, best = [*made, found[0]], found[1]
            if best.verdict == "fits":
                made, best = self._milder(made, best, levers)
                break
        return best if len(made) > 1 else None

    def _milder(self, made: list[Change], best: Advice, levers: list[list[Change]]) -> tuple[list[Change], Advice]:
        """Without the changes that aren't needed, and with the others as mild as will do; the most harmful first."""
        for change in reversed(made[:-1]):
            fewer = [other for other in made if other is not change]
            advice = self._advice(fewer)
            if advice is not None and advice.verdict == "fits":
                made, best = fewer, advice
        for place, change in reversed([*enumerate(made)]):
            lever = next(lever for lever in levers if change in lever)
            for milder in lever[: lever.index(change)]:
                others = [*made[:place], milder, *made[place + 1 :]]
                advice = self._advice(others)
                if advice is not None and advice.verdict == "fits":
                    made, best = others, advice
                    break
        return made, best


def relief(plan: Plan, capacity: int) -> Advice | None:
    """The least harmful change with which a run's plan fits so many bytes; None where nothing is known to help."""
    shared = Outcomes()

    def solve(subject: Subject) -> Outcome:
        recipe = Recipe.restored(plan.recipe, "the run's recipe", subject.overrides, plan.references)
        return shared.of(recipe, plan.name, subject.hardware, reading="nothing")

    found = advise(solve, Subject(None, None, "lora", (), plan.hardware), capacity)
    return next((one for one in found if one.verdict == "fits"), None)


def joined(made: list[Change]) -> Change:
    """Several changes as one."""
    made = reconciled(made)
    spread = next((change for change in made if change.sharding), made[0])
    return Change(
        does="; ".join(change.does for change in made),
        costs="; ".join(dict.fromkeys(change.costs for change in made)),
        overrides=tuple(override for change in made for override in change.overrides),
        harmful=any(change.harmful for change in made),
        gpus=spread.gpus,
        sharding=spread.sharding,
    )


def reconciled(made: list[Change]) -> list[Change]:
    """Fewer rows at once on more GPUs: with the passes that keep the rows of a step."""
    count = max((change.gpus for change in made), default=1)
    fewer = next((change for change in made if any(o.startswith(_ROWS) for o in change.overrides)), None)
    if count == 1 or fewer is None:
        return made

    def shared(found: re.Match[str]) -> str:
        return f"{found[1]}{max(int(found[2]) // count, 1)}"

    result = []
    for change in made:
        kept = tuple(override for override in change.overrides if not override.startswith(_PASSES))
        if change is fewer:
            kept = tuple(re.sub(f"({_PASSES})(\\d+)", shared, override) for override in change.overrides)
            result.append(replace(change, overrides=kept, does=re.sub(r"(at once, )(\d+)", shared, change.does)))
        else:
            result.append(replace(change, overrides=kept if change.gpus > 1 else change.overrides))
    return result


_ROWS, _PASSES = "training.per_device_train_batch_size=", "training.gradient_accumulation_steps="


def _fewer_rows_in_evaluation(recipe: Recipe, setup: Setup) -> Iterator[Change]:
    if recipe.training.per_device_eval_batch_size != "auto" and setup.eval_batch > 1:
        override = "training.per_device_eval_batch_size=1"
        yield Change("one row at once in evaluation", "slower evaluation", (override,))


def _fewer_rows(recipe: Recipe, setup: Setup) -> Iterator[Change]:
    """Halves of the rows at once, with more passes a step."""
    rows = setup.batch
    each = rows * setup.accumulation
    counted = recipe.training.global_batch_size is not None
    size = rows // 2
    while size:
        if each % size == 0:
            overrides = [f"training.per_device_train_batch_size={size}"]
            if not counted:
                overrides.append(f"training.gradient_accumulation_steps={each // size}")
            yield Change(f"{size} row{'s' * (size > 1)} at once, {each // size} passes a step", "slower", (*overrides,))
        size //= 2


def _checkpointing(recipe: Recipe, setup: Setup) -> Iterator[Change]:
    if setup.checkpointing == "none":
        yield Change(
            "gradient checkpointing",
            "about a third more arithmetic",
            ("training.gradient_checkpointing=true",),
        )


def _smaller_states(recipe: Recipe, setup: Setup) -> Iterator[Change]:
    for name in SMALLER_STATES.get(setup.optimizer, ()):
        paged = " that move to main memory when short" * name.startswith("paged")
        yield Change(f"optimizer states in 8 bits{paged}", "states are rounded", (f"training.optim={name}",))


def _four_bits(recipe: Recipe, setup: Setup) -> Iterator[Change]:
    asked = recipe.quantization
    if recipe.trains_base or (asked is not None and asked.load_in_4bit):
        return
    override = "quantization.load_in_4bit=true" if asked is None else "quantization={load_in_4bit: true}"
    yield Change("base in 4 bits (QLoRA)", "the base's weights are rounded; slower", (override,))


def _shorter_rows(recipe: Recipe, setup: Setup) -> Iterator[Change]:
    length = setup.length // 2
    while length >= SHORTEST:
        yield Change(f"max_length {length}", "longer rows are cut", (f"training.max_length={length}",), True)
        length //= 2


def _adapter(recipe: Recipe, setup: Setup) -> Iterator[Change]:
    if recipe.trains_base:
        costs = "only an adapter is trained; wants a higher learning rate"
        yield Change("LoRA in place of full training", costs, ("lora={}",), True)
        overrides = ("lora={}", "quantization.load_in_4bit=true")
        costs += "; the base's weights are rounded"
        yield Change("QLoRA in place of full training", costs, overrides, True)


def _more_gpus(recipe: Recipe, setup: Setup) -> Iterator[Change]:
    """FSDP's full shard, with as many rows a step as before where they can be divided."""
    training = recipe.training
    if setup.world > 1 or setup.device == "cpu":
        return
    for count in GPU_COUNTS:
        overrides: tuple[str, ...] = ()
        rows = setup.batch * setup.accumulation
        if training.gradient_accumulation_steps != "auto":
            overrides = (f"training.gradient_accumulation_steps={max(setup.accumulation // count, 1)}",)
        elif training.global_batch_size is not None and rows % (setup.batch * count):
            continue
        yield Change(
            f"{count} GPUs with FSDP",
            f"{count} GPUs to pay for, and FSDP, which lorafit does not start itself",
            overrides,
            True,
            count,
            "fsdp",
        )


LEVERS: tuple[Callable[[Recipe, Setup], Iterator[Change]], ...] = (
    _fewer_rows_in_evaluation,
    _fewer_rows,
    _checkpointing,
    _smaller_states,
    _four_bits,
    _shorter_rows,
    _adapter,
    _more_gpus,
)
"""What can be changed in a plan, the least harmful first, each in degrees from mild to strong."""
