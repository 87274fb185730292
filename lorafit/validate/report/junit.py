"""JUnit's XML: a test case for each recipe, failed by its faults."""

from __future__ import annotations

from xml.etree.ElementTree import Element, SubElement, indent, tostring

from lorafit.errors import printable
from lorafit.validate.types import Report


def junit(report: Report) -> str:
    wrong = [one for one in report.checked if not one.is_ok]
    suite = Element(
        "testsuite", name="lorafit validate", tests=str(len(report.checked)), failures=str(len(wrong)), errors="0"
    )
    for one in report.checked:
        case = SubElement(suite, "testcase", classname="lorafit.validate", name=printable(one.file))
        if not one.is_ok:
            lines = "\n".join(str(fault.mistake) for fault in one.faults)
            first = one.faults[0]
            SubElement(case, "failure", type=first.rule, message=str(first.mistake)).text = lines
        if one.notes:
            SubElement(case, "system-out").text = "\n".join(map(printable, one.notes))
    indent(suite)
    return tostring(suite, encoding="unicode", xml_declaration=True)
