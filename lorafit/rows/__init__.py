"""Data files -> rows -> examples, with the place of each row for error messages. No heavy imports.

files (lines, lists, tables) -> cells (columns, paths, templates) -> formats (and their turns)
"""

from lorafit.rows.cells import Fault, Format, Row, Shape, check_template, place_of
from lorafit.rows.files import data_files, digest, is_local, read_rows, size_digest
from lorafit.rows.formats import COLUMNS, OPTIONAL, Example, detect_format, to_example, with_rejected
from lorafit.rows.turns import Message

__all__ = [
    "COLUMNS",
    "OPTIONAL",
    "Example",
    "Fault",
    "Format",
    "Message",
    "Row",
    "Shape",
    "check_template",
    "data_files",
    "detect_format",
    "digest",
    "is_local",
    "place_of",
    "read_rows",
    "size_digest",
    "to_example",
    "with_rejected",
]
