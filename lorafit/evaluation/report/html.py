"""The evaluation as one HTML page that needs nothing else, and all reports on the disk, whole or absent."""

from __future__ import annotations

import base64
import hashlib
import itertools
import json
import math
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass, field
from importlib import resources
from pathlib import Path
from typing import Any, NamedTuple

from jinja2 import Environment, PackageLoader, StrictUndefined
from markupsafe import Markup

from lorafit.evaluation.report import charts
from lorafit.evaluation.report.charts import Bar, bar, extent, is_number
from lorafit.evaluation.report.text import (
    DifferenceRow,
    FigureRow,
    State,
    as_junit,
    as_markdown,
    count,
    difference_rows,
    figure_rows,
    in_bytes,
    moment,
    number,
    quantity,
    size,
    state_of,
    visible,
)
from lorafit.evaluation.results import Answer, Metric, Results, Sample
from lorafit.evaluation.results import Set as SetInfo
from lorafit.files import staged, write_text
from lorafit.tree import dotted, leaves
from lorafit.written import References, as_written

MOST_CHARACTERS = 20_000
"""Characters of one text; the rest of it is in samples.jsonl."""
MOST_TEXT = 24_000_000
"""Characters of all texts; a browser shows a page of that size at once."""
SHOWN = 50
"""Examples on a page of the table, and in the HTML itself for readers without JavaScript."""
SHOWN_CHARACTERS = 1_000
"""Characters of a text in the HTML itself."""


@dataclass
class Examples:
    """The samples that the page holds, and how many it does not."""

    kept: list[Sample] = field(default_factory=list)
    left_out: int = 0
    characters: int = 0


class Training(NamedTuple):
    """What the page says of a run's training: its metrics.jsonl, the manifest's memory, and its merge_report.json."""

    metrics: list[dict[str, Any]]
    memory: dict[str, Any] | None = None
    merge: dict[str, Any] | None = None


def write_html(
    folder: Path,
    results: Results,
    samples: Iterable[Sample],
    training: Training,
    most_samples: int = 1000,
) -> None:
    """Write folder/report.html.

    Args:
        most_samples: that the page holds, over all sets; a set gets its share of them, from its first row on.
    """
    page = resources.files("lorafit.evaluation.report").joinpath("page")
    style, script = (page.joinpath(name).read_text(encoding="utf-8") for name in ("page.css", "page.js"))
    examples = take(samples, shares(results, most_samples))
    html = (
        _environment()
        .get_template("page.html")
        .render(
            policy=_policy(style, script),
            style=Markup(style),
            script=Markup(script),
            # Markup that needs no escaping: our own, and JSON without any character of markup.
            data=Markup(as_json(_data(results, examples.kept))),
            results=results,
            verdict=outcome(results),
            keys=keys(results),
            sets=sets_of(results),
            curves=charts.learning_curves(training.metrics),
            examples=examples,
            memory=training.memory,
            merge=training.merge,
        )
    )
    # Surrogates are escaped where they are shown and in the data; this is for any that are left, such as in a path.
    write_text(folder / "report.html", html.encode("utf-8", "backslashreplace").decode("utf-8"))


def _environment() -> Environment:
    environment = Environment(
        loader=PackageLoader("lorafit.evaluation.report", "page"),
        autoescape=True,
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
        finalize=visible,
    )
    environment.filters |= {"moment": moment, "quantity": quantity, "size": size}
    environment.globals |= {
        "cells": cells,
        "note": note,
        "state_of": state_of,
        "count": count,
        "shortened": shortened,
        "shown": SHOWN,
        "bar_width": charts.BAR_WIDTH,
        "bar_height": charts.BAR_HEIGHT,
        "memory_rows": memory_rows,
        "merge_rows": merge_rows,
        "merge_facts": merge_facts,
        "flat": flat,
    }
    return environment


def _policy(style: str, script: str) -> str:
    css, js = (base64.b64encode(hashlib.sha256(text.encode()).digest()).decode() for text in (style, script))
    allowed = f"style-src 'sha256-{css}'; script-src 'sha256-{js}'"
    return f"default-src 'none'; {allowed}; base-uri 'none'; form-action 'none'"


def shares(results: Results, most: int) -> dict[str, int]:
    """How many samples of each set the page holds: as many of each where they don't all fit."""
    left, found = max(most, 0), {}
    by_size = sorted(results.sets, key=lambda name: max(results.sets[name].rows, results.sets[name].answered))
    for index, name in enumerate(by_size):
        found[name] = min(max(results.sets[name].rows, results.sets[name].answered), left // (len(by_size) - index))
        left -= found[name]
    return found


def take(samples: Iterable[Sample], most: Mapping[str, int]) -> Examples:
    """The first samples of each set, with texts of bounded length."""
    left = dict(most)
    examples = Examples()
    for sample in samples:
        texts = [sample.prompt, sample.expected, *(answer.text or "" for answer in sample.answers.values())]
        length = sum(min(len(text), MOST_CHARACTERS) for text in texts)
        if left.get(sample.set, 0) > 0 and examples.characters + length <= MOST_TEXT:
            left[sample.set] -= 1
            examples.characters += length
            examples.kept.append(sample if max(map(len, texts)) <= MOST_CHARACTERS else _cut(sample))
        else:
            examples.left_out += 1
    return examples


def _cut(sample: Sample) -> Sample:
    answers = {
        name: answer.model_copy(update={"text": answer.text and _cut_text(answer.text)})
        for name, answer in sample.answers.items()
    }
    return sample.model_copy(
        update={"prompt": _cut_text(sample.prompt), "expected": _cut_text(sample.expected), "answers": answers}
    )


def _cut_text(text: str) -> str:
    over = len(text) - MOST_CHARACTERS
    return text if over <= 0 else f"{text[:MOST_CHARACTERS]}\n[{over:,} more characters are in samples.jsonl]"


def shortened(text: str) -> str:
    """A text of the table as it stands in the HTML itself."""
    over = len(text) - SHOWN_CHARACTERS
    return text if over <= 0 else f"{text[:SHOWN_CHARACTERS]} … ({over:,} more characters are shown with JavaScript)"


def _data(results: Results, samples: Iterable[Sample]) -> dict[str, Any]:
    metrics = {name: [metric.model_dump() for metric in info.metrics] for name, info in results.sets.items()}
    return {
        "models": list(results.models),
        "pairs": list(dict.fromkeys((one.model, one.against) for one in results.differences)),
        "metrics": metrics,
        "shown": SHOWN,
        "samples": [
            [
                sample.set,
                sample.row,
                sample.place,
                sample.prompt,
                sample.expected,
                {name: _answer(answer) for name, answer in sample.answers.items()},
            ]
            for sample in samples
        ],
    }


def _answer(answer: Answer) -> dict[str, Any]:
    found = {"text": answer.text, "ended": answer.ended, "chosen": answer.chosen}
    scores = {name: value for name, value in answer.scores.items() if math.isfinite(value)}
    return {name: value for name, value in found.items() if value is not None} | {"scores": scores}


def as_json(data: Any) -> str:
    """JSON that may stand in a script element: no `<`, `>`, `&`, U+2028, U+2029 or lone surrogate but as an escape."""
    text = json.dumps(data, ensure_ascii=False, allow_nan=False, separators=(",", ":"))
    for character in "<>&\u2028\u2029":
        text = text.replace(character, f"\\u{ord(character):04x}")
    return text.encode("utf-8", "backslashreplace").decode("utf-8")


def flat(data: Mapping[str, Any]) -> list[tuple[str, str]]:
    """Nested settings as lines: `eval.max_new_tokens`, `64`."""
    return [
        (dotted(key), value if isinstance(value, str) else json.dumps(value, ensure_ascii=False, default=str))
        for key, value in leaves(dict(data), enters=lambda _: False)
        if key
    ]


MOST_KEYS = 4
"""Differences in the head of the page."""
SAY_LITTLE = ("token_accuracy", "ended", "repetition", "agreement")
"""Shares that say little alone."""


@dataclass(frozen=True)
class Key:
    """A main difference, for the head of the page."""

    set: str
    row: DifferenceRow
    before: str
    after: str

    @property
    def rows(self) -> str:
        one = self.row.difference
        return count(one.wins + one.ties + one.losses, "row")

    @property
    def state(self) -> State:
        return state_of(self.row.difference, self.row.metric)


@dataclass(frozen=True)
class SetContent:
    """A set with its tables."""

    name: str
    info: SetInfo
    figures: tuple[FigureRow, ...]
    pairs: dict[tuple[str, str], list[tuple[DifferenceRow, Bar | None]]]
    """Differences by model and what it is compared with, in the order of the metrics."""

    @property
    def rows(self) -> str:
        info = self.info
        answered = "all answered" if info.answered == info.rows else f"{info.answered:,} of them answered"
        return f"{count(info.rows, 'row')}, {answered}" if info.answered else count(info.rows, "row")


def sets_of(results: Results) -> list[SetContent]:
    return [
        SetContent(name, info, tuple(figure_rows(results, name)), _pairs(results, name))
        for name, info in results.sets.items()
    ]


def _pairs(results: Results, name: str) -> dict[tuple[str, str], list[tuple[DifferenceRow, Bar | None]]]:
    rows = list(difference_rows(results, name))
    found: dict[tuple[str, str], list[tuple[DifferenceRow, Bar | None]]] = {row.pair: [] for row in rows}
    for metric in results.sets[name].metrics:
        of_metric = [row for row in rows if row.metric == metric]
        most = extent(row.difference for row in of_metric)
        for row in of_metric:
            found[row.pair].append((row, bar(row.difference, metric, most)))
    return found


def cells(row: FigureRow, info: SetInfo) -> list[tuple[str, str, str, bool]]:
    """Cells by model: the value, its interval, its rows where they are not the set's, and whether it is the best."""
    metric, values = row.metric, [figure.value for figure in row.figures if figure and figure.value is not None]
    # By what is shown: of two figures that read alike, none is marked as the better one.
    told_apart = metric.better is not None and len({quantity(value, metric.unit) for value in values}) > 1
    best = quantity((max if metric.better == "higher" else min)(values), metric.unit) if told_apart else None
    own = (info.rows, info.answered)
    rows = ["" if figure is None or figure.rows in own else count(figure.rows, "row") for figure in row.figures]
    each = zip(row.values, row.intervals, rows, strict=True)
    return [(value, ends, of_rows, value == best) for value, ends, of_rows in each]


def note(metric: Metric) -> str:
    """The unit of a metric, and which way it should go."""
    better = {"higher": "higher is better", "lower": "lower is better", None: ""}[metric.better]
    unit = metric.unit if metric.unit in ("nats", "bits", "tokens") else ""
    return ", ".join(part for part in (unit, better) if part)


def outcome(results: Results) -> str:
    """What became of the gates."""
    failed, gates = len(results.failed), len(results.gates)
    if not gates:
        return "No gates were set"
    if failed:
        return f"{failed} of {count(gates, 'gate')} failed"
    return "The gate passed" if gates == 1 else f"All {gates} gates passed"


def keys(results: Results) -> list[Key]:
    """The main difference of every set, against the first model, which is the base; those of tasks first."""
    roles = ("task", "benchmark", "forgetting")
    in_order = sorted(results.sets, key=lambda name: roles.index(results.sets[name].role))
    return [key for name in in_order if (key := _key(results, name))][:MOST_KEYS]


def _key(results: Results, name: str) -> Key | None:
    here = [row for row in difference_rows(results, name) if row.difference.value is not None]
    pairs = [row.pair for row in here]
    pair = next((pair for pair in pairs if pair[1] == next(iter(results.models), None)), pairs[0] if pairs else None)
    known = {row.metric.name: row for row in here if row.pair == pair}
    telling = [metric for metric in results.sets[name].metrics if metric.better and metric.name in known]
    if not telling:
        return None
    row = known[min(telling, key=_telling).name]
    before, after = (results.figure(name, row.metric.name, model) for model in reversed(row.pair))
    shown = [quantity(figure.value if figure else None, row.metric.unit) for figure in (before, after)]
    return Key(name, row, *shown)


def _telling(metric: Metric) -> bool:
    """False for shares of right answers, which say more to people than likelihoods; they come first."""
    return metric.unit != "share" or metric.better != "higher" or metric.name in SAY_LITTLE


def memory_rows(memory: Mapping[str, Any]) -> list[tuple[str, str, str]]:
    """(what, how much, note) of a manifest's `memory`."""
    predicted, measured = memory.get("predicted") or {}, memory.get("measured") or {}
    rows = [
        (f"predicted, {kind}", in_bytes(predicted[kind]), str(predicted.get("method", "")))
        for kind in predicted
        if is_number(predicted[kind])
    ]
    for kind, value in measured.items():
        # On the CPU the whole process is measured, with libraries that the prediction leaves out.
        basis = predicted.get(kind)
        note = f"{100 * (value / basis - 1):+.1f}% of the predicted" if is_number(basis) and basis else ""
        rows.append((f"measured, {kind}", in_bytes(value), note.replace("-", "−")))
    if is_number(memory.get("baseline")):
        rows.append(("before the training", in_bytes(memory["baseline"]), "what the process held already"))
    return rows


MERGE_FIGURES = (
    ("kl", "mean KL from the adapter", "max_kl", "at most"),
    ("kl_max", "largest KL of a token", None, ""),
    ("top1", "same most likely token", "min_top1", "at least"),
    ("loss", "loss", None, ""),
    ("loss_increase", "loss above the adapter's", "max_loss_increase", "at most"),
    ("logit_difference", "largest difference of a logit", "max_logit_difference", "at most"),
)


def merge_rows(merge: Mapping[str, Any]) -> list[tuple[str, str, str]]:
    """(figure, value, limit) of a merge report's verification."""
    verification = merge.get("verification") or {}
    figures, limits = verification.get("figures") or {}, verification.get("limits") or {}
    rows = []
    for name, label, limit, word in MERGE_FIGURES:
        if is_number(figures.get(name)):
            unit = "share" if name == "top1" else "nats"
            demanded = limits.get(limit) if limit else None
            shown = f"{word} {quantity(demanded, unit)}" if is_number(demanded) else ""
            rows.append((label, quantity(figures[name], unit), shown))
    return rows


def merge_facts(merge: Mapping[str, Any]) -> list[tuple[str, str]]:
    targets = merge.get("targets") or []
    method, base = merge.get("method") or {}, merge.get("base_weights") or {}
    changes = [target.get("relative") for target in targets if is_number(target.get("relative"))]
    verification = merge.get("verification") or {}
    facts = [
        ("base weights", f"{base.get('used')}: {base.get('reason')}" if base.get("used") else ""),
        ("method", f"{method.get('used')}: {method.get('reason')}" if method.get("used") else ""),
        ("matrices merged", f"{merge['merged']:,}" if is_number(merge.get("merged")) else ""),
        ("relative change of a matrix", f"{number(min(changes), 4)} to {number(max(changes), 4)}" if changes else ""),
        ("type and size", f"{merge.get('dtype')}, {in_bytes(merge.get('bytes'))}" if merge.get("dtype") else ""),
        ("checked on", str(verification.get("rows") or "")),
    ]
    return [(name, value) for name, value in facts if value]


FILES = {"samples": "samples.jsonl", "markdown": "report.md", "html": "report.html", "junit": "junit.xml"}


def write_reports(
    destination: Path, results: Results, samples: Iterable[Sample], training: Training, references: References
) -> Results:
    """Write the folder of an evaluation; what stood there is replaced at the end. Returns the results as written.

    What the recipe takes from the environment is written as references. Raises DoesNotFitError.
    """
    results = Results.model_validate(as_written(results.model_copy(update={"files": FILES}).model_dump(), references))
    with staged(destination, "evaluation") as folder:
        with (folder / FILES["samples"]).open("w", encoding="utf-8") as stream:
            for sample in samples:
                place = as_written(sample.place, references)  # a row is what it is
                stream.write(sample.model_copy(update={"place": place}).model_dump_json() + "\n")
        (folder / "results.json").write_text(results.model_dump_json(indent=2) + "\n", encoding="utf-8")
        (folder / FILES["markdown"]).write_text(as_markdown(results), encoding="utf-8")
        (folder / FILES["junit"]).write_text(as_junit(results), encoding="utf-8")
        write_html(folder, results, read_samples(folder), training)
    return results


def read_samples(folder: Path, most: int | None = None) -> Iterator[Sample]:
    """The samples of an evaluation, in order."""
    with (folder / FILES["samples"]).open(encoding="utf-8") as stream:
        for line in itertools.islice(stream, most):
            yield Sample.model_validate_json(line)
