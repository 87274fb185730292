"""An evaluation on the disk: results.json, samples.jsonl and the reports, whole or absent."""

from __future__ import annotations

import itertools
import sys
from collections.abc import Iterable, Iterator
from pathlib import Path

from lorafit.evaluate.report.html import write_html
from lorafit.evaluate.report.junit import as_junit
from lorafit.evaluate.report.markdown import as_markdown
from lorafit.evaluate.results import Results, Sample
from lorafit.facts.folder import read_json
from lorafit.files import staged
from lorafit.rundir import RunDir

FILES = {"samples": "samples.jsonl", "markdown": "report.md", "html": "report.html", "junit": "junit.xml"}


def write_reports(destination: Path, results: Results, samples: Iterable[Sample], run: RunDir) -> Results:
    """Write the folder of an evaluation; what stood there is replaced at the end. Returns the results as written.

    Raises DoesNotFitError.
    """
    results = results.model_copy(update={"files": FILES})
    with staged(destination, "evaluation") as folder:
        with (folder / FILES["samples"]).open("w", encoding="utf-8") as stream:
            for sample in samples:
                stream.write(sample.model_dump_json() + "\n")
        (folder / "results.json").write_text(results.model_dump_json(indent=2) + "\n", encoding="utf-8")
        (folder / FILES["markdown"]).write_text(as_markdown(results), encoding="utf-8")
        (folder / FILES["junit"]).write_text(as_junit(results), encoding="utf-8")
        merge = run.merged / "merge_report.json"
        write_html(
            folder,
            results,
            read_samples(folder),
            run.metrics_until(sys.maxsize),
            run.load_manifest().get("memory"),
            read_json(merge) if merge.is_file() else None,
        )
    return results


def read_samples(folder: Path, most: int | None = None) -> Iterator[Sample]:
    """The samples of an evaluation, in order."""
    with (folder / FILES["samples"]).open(encoding="utf-8") as stream:
        for line in itertools.islice(stream, most):
            yield Sample.model_validate_json(line)
