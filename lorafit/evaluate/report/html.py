"""The evaluation as one HTML page that needs nothing else: report.html."""

from __future__ import annotations

import base64
import hashlib
import json
import math
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from importlib import resources
from pathlib import Path
from typing import Any

from jinja2 import Environment, PackageLoader, StrictUndefined
from markupsafe import Markup

from lorafit.evaluate.report.page import charts, words
from lorafit.evaluate.report.page.content import keys, memory_rows, merge_facts, merge_rows, sets_of, verdict
from lorafit.evaluate.results import Answer, Results, Sample
from lorafit.files import write_text

MOST_CHARACTERS = 20_000
"""Of one text; the rest of it is in samples.jsonl."""
MOST_TEXT = 24_000_000
"""Characters of all texts; a browser shows a page of that size at once."""
SHOWN = 50
"""Examples on a page of the table, and in the HTML itself for readers without JavaScript."""
SHOWN_CHARACTERS = 1_000
"""Of a text in the HTML itself."""


@dataclass
class Examples:
    """The samples that the page holds, and how many it does not."""

    kept: list[Sample] = field(default_factory=list)
    left_out: int = 0
    characters: int = 0


def write_html(
    folder: Path,
    results: Results,
    samples: Iterable[Sample],
    metrics: list[dict[str, Any]],
    memory: dict[str, Any] | None,
    merge: dict[str, Any] | None,
    most_samples: int = 1000,
) -> None:
    """Write folder/report.html.

    Args:
        metrics: the lines of the run's metrics.jsonl.
        memory: `memory` of the run's manifest.
        merge: the content of merge_report.json.
        most_samples: that the page holds, over all sets; a set gets its share of them, from its first row on.
    """
    page = resources.files("lorafit.evaluate.report").joinpath("page")
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
            verdict=verdict(results),
            keys=keys(results),
            sets=sets_of(results),
            curves=charts.learning_curves(metrics),
            examples=examples,
            memory=memory,
            merge=merge,
        )
    )
    # Surrogates are escaped where they are shown and in the data; this is for any that are left, such as in a path.
    write_text(folder / "report.html", html.encode("utf-8", "backslashreplace").decode("utf-8"))


def _environment() -> Environment:
    environment = Environment(
        loader=PackageLoader("lorafit.evaluate.report", "page"),
        autoescape=True,
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
        finalize=words.visible,
    )
    environment.filters |= {"moment": words.moment, "quantity": words.quantity, "change": words.change}
    environment.globals |= {
        "count": words.count,
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
    hashes = (base64.b64encode(hashlib.sha256(text.encode()).digest()).decode() for text in (style, script))
    return (
        "default-src 'none'; style-src 'sha256-{}'; script-src 'sha256-{}'; base-uri 'none'; form-action 'none'".format(
            *hashes
        )
    )


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


def flat(data: Mapping[str, Any], above: str = "") -> list[tuple[str, str]]:
    """Nested settings as lines: `eval.max_new_tokens`, `64`."""
    found: list[tuple[str, str]] = []
    for name, value in data.items():
        if isinstance(value, dict) and value:
            found += flat(value, f"{above}{name}.")
        else:
            text = value if isinstance(value, str) else json.dumps(value, ensure_ascii=False, default=str)
            found.append((f"{above}{name}", text))
    return found
