"""An evaluation on the disk: results.json, samples.jsonl and the reports, whole or absent."""

from __future__ import annotations

import itertools
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

from lorafit.evaluation.report.html import write_html
from lorafit.evaluation.report.text import as_junit, as_markdown
from lorafit.evaluation.results import Results, Sample
from lorafit.files import staged
from lorafit.written import References, as_written

if TYPE_CHECKING:
    pass

FILES = {"samples": "samples.jsonl", "markdown": "report.md", "html": "report.html", "junit": "junit.xml"}


class Training(NamedTuple):
    """What the page says of a run's training: its metrics.jsonl, the manifest's memory, and its merge_report.json."""

    metrics: list[dict[str, Any]]
    memory: dict[str, Any] | None = None
    merge: dict[str, Any] | None = None


def write_reports(
    destination: Path, results: Results, samples: Iterable[Sample], training: Training, references: References
) -> Results:
    """Write the folder of an evaluation; what stood there is replaced at the end. Returns the results as written.

    Raises DoesNotFitError.

    Args:
        references: those that stand for what the recipe takes from the environment.
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
        write_html(folder, results, read_samples(folder), *training)
    return results


def read_samples(folder: Path, most: int | None = None) -> Iterator[Sample]:
    """The samples of an evaluation, in order."""
    with (folder / FILES["samples"]).open(encoding="utf-8") as stream:
        for line in itertools.islice(stream, most):
            yield Sample.model_validate_json(line)
