"""A validation's report: for people, and for what shows it in a CI."""

from __future__ import annotations

import json
from collections.abc import Callable

from lorafit.validate.report.github import github
from lorafit.validate.report.junit import junit
from lorafit.validate.report.sarif import sarif
from lorafit.validate.report.text import text
from lorafit.validate.types import Report
from lorafit.written import hidden_in

FORMATS: dict[str, Callable[[Report], str]] = {
    "text": text,
    "json": lambda report: json.dumps(hidden_in(report.as_dict()), indent=2, ensure_ascii=False),
    "github": github,
    "junit": junit,
    "sarif": lambda report: json.dumps(hidden_in(sarif(report)), indent=2, ensure_ascii=False),
}
