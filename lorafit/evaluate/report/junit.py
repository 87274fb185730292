"""An evaluation's gates as JUnit XML, which CI systems show."""

from __future__ import annotations

import re
import xml.etree.ElementTree as ElementTree

from lorafit.evaluate.results import Results

_FORBIDDEN = re.compile("[^\t\n\r\x20-\ud7ff\ue000-\ufffd\U00010000-\U0010ffff]")
"""What XML 1.0 does not allow."""


def as_junit(results: Results) -> str:
    """A test suite with a case for each gate, and the figures as properties."""
    suite = ElementTree.Element(
        "testsuite",
        name=_text(f"lorafit eval {results.name}"),
        tests=str(len(results.gates)),
        failures=str(len(results.failed)),
        errors="0",
        timestamp=_text(results.created),
        time=f"{sum(model.seconds for model in results.models.values()):.3f}",
    )
    properties = ElementTree.SubElement(suite, "properties")
    for name, figure in results.figures.items():
        ElementTree.SubElement(properties, "property", name=_text(name), value=str(figure.value))
    for gate in results.gates:
        case = ElementTree.SubElement(suite, "testcase", classname=_text(gate.where), name=_text(gate.gate))
        if gate.passed:
            ElementTree.SubElement(case, "system-out").text = _text(gate.sentence)
        else:
            failure = ElementTree.SubElement(case, "failure", message=_text(gate.sentence), type="gate")
            failure.text = _text(f"{gate.gate}: {gate.sentence}")
    root = ElementTree.Element("testsuites")
    root.append(suite)
    ElementTree.indent(root)
    return '<?xml version="1.0" encoding="utf-8"?>\n' + ElementTree.tostring(root, encoding="unicode") + "\n"


def _text(text: str) -> str:
    return _FORBIDDEN.sub("\ufffd", text)
