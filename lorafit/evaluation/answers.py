"""The metrics of answers that come with lorafit, as functions: of an answer as text, and as JSON.

Those of JSON are strict: no NaN, no key twice, nothing around it such as a code fence.
"""

from __future__ import annotations

import functools
import importlib
import json
import re
import string
import unicodedata
from collections import Counter
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from decimal import Decimal, DecimalException
from pathlib import Path
from typing import Any, NoReturn

from lorafit.bounds import read_text, within
from lorafit.errors import MissingError, UsageError
from lorafit.evaluation.results import Metric
from lorafit.text import first_line

PairScore = Callable[[str, str], float | None]
"""(answer, expected) -> score; None: the row has no such value."""


@dataclass(frozen=True)
class Judged:
    """An answer to score, with the row as it was read from the file, which may be empty."""

    answer: str
    expected: str
    prompt: str = ""
    row: Mapping[str, Any] = field(default_factory=dict)


@dataclass(frozen=True)
class AnswerMetric:
    """A metric with its argument.

    Attributes:
        score: of one answer; None: the row has no such value.
        says_yes_or_no: whether all scores so far were true or false, which makes the figure a share of the rows.
    """

    info: Metric
    score: Callable[[Judged], float | None]
    says_yes_or_no: Callable[[], bool] = lambda: False


def load_extra(module: str, metric: str) -> Any:
    """A module of the extra `eval`. Raises MissingError if it is not installed."""
    try:
        return importlib.import_module(module)
    except ImportError:
        package = module.partition(".")[0]
        raise MissingError(f"the metric {metric} needs the package {package}: pip install 'lorafit[eval]'") from None


_ARTICLES = frozenset(("a", "an", "the"))
_GRAM = 4


def normalize(text: str) -> str:
    """The text as SQuAD compares answers, for all of Unicode.

    Compatibility forms are unified (NFKC), case is folded, punctuation and the words a, an and the are taken away, and
    white space becomes one space. Punctuation goes without a space in its place, as in SQuAD: `1.5` becomes `15`.
    """
    folded = unicodedata.normalize("NFKC", text).casefold()
    kept = "".join(character for character in folded if not _is_punctuation(character))
    return " ".join(word for word in kept.split() if word not in _ARTICLES)


def _is_punctuation(character: str) -> bool:
    # SQuAD takes away ASCII's symbols too, such as $ and +, which are no punctuation to Unicode.
    return character in string.punctuation or unicodedata.category(character).startswith("P")


def exact_match(answer: str, expected: str) -> float:
    """Share of answers that are the expected one, but for white space at the ends."""
    return float(answer.strip() == expected.strip())


def exact_match_normalized(answer: str, expected: str) -> float:
    """Share of answers that are the expected one after SQuAD's normalization: no case, punctuation and a, an, the."""
    return float(normalize(answer) == normalize(expected))


def token_f1(answer: str, expected: str) -> float:
    """F1 of the words in common, in any order, after SQuAD's normalization. Two without words: 1."""
    given, wanted = Counter(normalize(answer).split()), Counter(normalize(expected).split())
    if not given and not wanted:
        return 1.0
    return 2 * (given & wanted).total() / (given.total() + wanted.total())


def contains(answer: str, expected: str) -> float | None:
    """Share of answers that the expected one is a part of, both normalized as SQuAD does.

    A part of a word counts: `no` is in `know`. None where nothing of the expected answer is left.
    """
    wanted = normalize(expected)
    return float(wanted in normalize(answer)) if wanted else None


def contains_text(text: str) -> PairScore:
    """Share of answers that contain TEXT, exactly as it is written."""
    return lambda answer, expected: float(text in answer)


def regex(pattern: str) -> PairScore:
    """Share of answers in which Python's re.search finds PATTERN.

    Raises UsageError if it is none; the metric does if an answer takes it too long, as `(a+)+$` may.
    """
    compiled = _compiled("regex", pattern)

    def score(answer: str, expected: str) -> float:
        with within(UsageError, f"metric regex: '{pattern}': an answer"):
            return float(compiled.search(answer) is not None)

    return score


def extract(pattern: str) -> PairScore:
    """Share of answers in which PATTERN last finds what it last finds in the expected one: its group, or all of it.

    Numbers are compared as numbers: 1,000 is 1000.0, and a full stop or comma at the end is none of them. None where
    the expected answer has no match. Raises UsageError as `regex`.
    """
    compiled = _compiled("extract", pattern)
    if compiled.groups > 1:
        raise UsageError(f"metric extract: '{pattern}' has {compiled.groups} groups; write all but one as (?:…)")

    def last(text: str) -> str | None:
        with within(UsageError, f"metric extract: '{pattern}': an answer"):
            found = compiled.findall(text)
        return found[-1].strip() if found else None

    def score(answer: str, expected: str) -> float | None:
        wanted, given = last(expected), last(answer)
        if wanted is None or given is None:
            return None if wanted is None else 0.0
        one, other = _number(given), _number(wanted)
        return float(given == wanted if one is None or other is None else one == other)

    return score


_NUMBER = re.compile(r"[-+]?(\d{1,3}(,\d{3})+|\d+)?(\.\d+)?([eE][-+]?\d+)?")


def _number(text: str) -> Decimal | None:
    """The number that a text is, with commas between thousands alone; None for other texts, such as 1,5."""
    text = text.rstrip(".,").replace("\N{MINUS SIGN}", "-")
    if not _NUMBER.fullmatch(text) or not any(character.isdigit() for character in text):
        return None
    try:
        return Decimal(text.replace(",", ""))
    except DecimalException:  # an exponent that is out of all measure
        return None


def _compiled(metric: str, pattern: str) -> re.Pattern[str]:
    """Raises UsageError for no regular expression, and one that takes long to compile."""
    try:
        with within(UsageError, f"metric {metric}: '{pattern}'"):
            return re.compile(pattern)
    except (re.error, OverflowError, RecursionError) as error:
        raise UsageError(f"metric {metric}: '{pattern}' is no regular expression: {first_line(error)}") from None


def words(answer: str, expected: str) -> float:
    """Words of the answer, as white space parts them."""
    return float(len(answer.split()))


def repetition(answer: str, expected: str) -> float:
    """Share of the answer's runs of four words that stood in it before. An answer of fewer than four words: 0."""
    found = answer.split()
    grams = [tuple(found[start : start + _GRAM]) for start in range(len(found) - _GRAM + 1)]
    return 1 - len(set(grams)) / len(grams) if grams else 0.0


_TOKEN = re.compile("[a-z0-9]+")


def rouge_1(answer: str, expected: str) -> float | None:
    """ROUGE-1: F1 of the words (a-z and 0-9, no stems) in common. None where the expected answer has no such word."""
    return _rouge_n(answer, expected, 1)


def rouge_2(answer: str, expected: str) -> float | None:
    """ROUGE-2: F1 of the pairs of neighbouring words in common. None where the expected answer has no two words."""
    return _rouge_n(answer, expected, 2)


def rouge_l(answer: str, expected: str) -> float | None:
    """ROUGE-L: F1 of the longest sequence of words in common. None where the expected answer has no such word."""
    given, wanted = _tokens(answer), _tokens(expected)
    return _f1(_common_length(given, wanted), len(given), len(wanted))


def chrf(answer: str, expected: str) -> float | None:
    """chrF of sacrebleu, answer by answer: runs of up to six characters in common. None where nothing is expected."""
    return _sacrebleu_score("chrf", answer, expected)


def bleu(answer: str, expected: str) -> float | None:
    """BLEU of sacrebleu, answer by answer: runs of up to four words in common. None where nothing is expected.

    With exponential smoothing and effective order, as sacrebleu's sentence BLEU. The mean over answers is not the BLEU
    of the whole set.
    """
    return _sacrebleu_score("bleu", answer, expected)


def _tokens(text: str) -> list[str]:
    return _TOKEN.findall(text.lower())


def _rouge_n(answer: str, expected: str, size: int) -> float | None:
    def grams(text: str) -> Counter[tuple[str, ...]]:
        tokens = _tokens(text)
        return Counter(zip(*(tokens[start:] for start in range(size)), strict=False))

    given, wanted = grams(answer), grams(expected)
    return _f1((given & wanted).total(), given.total(), wanted.total())


def _f1(common: int, given: int, wanted: int) -> float | None:
    return 2 * common / (given + wanted) if wanted else None


def _common_length(one: list[str], other: list[str]) -> int:
    """Length of the longest common subsequence.

    Bit-parallel, after Hyyrö (2004): a row of the usual table is one integer, whose zero bits count the length.
    """
    places: dict[str, int] = {}
    for index, token in enumerate(one):
        places[token] = places.get(token, 0) | 1 << index
    everything = (1 << len(one)) - 1
    row = everything
    for token in other:
        matches = row & places.get(token, 0)
        row = ((row + matches) | (row - matches)) & everything
    return len(one) - row.bit_count()


def _sacrebleu_score(name: str, answer: str, expected: str) -> float | None:
    if not expected.strip():
        return None
    # A perfect score comes out a rounding error above 100.
    return min(float(_scorer(name).sentence_score(answer, [expected]).score) / 100, 1.0)


@functools.cache
def _scorer(name: str) -> Any:
    metrics = load_extra("sacrebleu.metrics", name)
    return metrics.CHRF() if name == "chrf" else metrics.BLEU(effective_order=True)


_DRAFT = "https://json-schema.org/draft/2020-12/schema"


def parse(text: str) -> Any:
    """The value of a JSON text. Raises ValueError if it is not strictly JSON, or nested too deeply to read."""
    try:
        return json.loads(text, object_pairs_hook=_object, parse_constant=_refuse)
    except RecursionError:
        raise ValueError("nested too deeply") from None


def _object(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    made = dict(pairs)
    if len(made) < len(pairs):
        raise ValueError("a key occurs twice")
    return made


def _refuse(constant: str) -> NoReturn:
    raise ValueError(f"{constant} is not JSON")


def is_json(text: str) -> bool:
    """Whether a text is a JSON object or array."""
    try:
        return isinstance(parse(text), dict | list)
    except ValueError:
        return False


def json_valid(answer: str, expected: str) -> float:
    """Share of answers that are a JSON object or array and nothing else."""
    return float(is_json(answer))


def json_match(answer: str, expected: str) -> float | None:
    """Share of answers that are the same JSON value as the expected one, in whatever order of keys.

    `1` and `1.0` are the same, `1` and `true` are not. None where the expected answer is not JSON.
    """
    try:
        wanted = parse(expected)
    except ValueError:
        return None
    try:
        return float(_is_same(parse(answer), wanted))
    except (ValueError, RecursionError):
        return 0.0


def _is_same(one: Any, other: Any) -> bool:
    # To Python, True == 1.
    if isinstance(one, bool) or isinstance(other, bool):
        return one is other
    if isinstance(one, dict) and isinstance(other, dict):
        return one.keys() == other.keys() and all(_is_same(value, other[key]) for key, value in one.items())
    if isinstance(one, list) and isinstance(other, list):
        return len(one) == len(other) and all(map(_is_same, one, other))
    return bool(one == other)


def json_schema(path: str) -> PairScore:
    """Share of answers that are JSON and valid against the JSON Schema in the file PATH.

    The draft is that of `$schema`, else 2020-12. `format` is not checked. References are followed inside of the file
    alone: nothing is fetched and no other file is read. Raises UsageError if the file is missing or no such schema.
    """
    validator = _validator(Path(path))

    def score(answer: str, expected: str) -> float:
        try:
            with within(UsageError, f"metric json_schema: {path}: an answer"):
                return float(validator.is_valid(parse(answer)))
        except (ValueError, RecursionError):
            return 0.0
        except _unresolvable() as error:
            raise _unresolved(path, error.ref) from None

    return score


def _validator(path: Path) -> Any:
    schema, place = _read(path), f"metric json_schema: {path}"
    try:
        with within(UsageError, f"{place}: it"):
            return _checked(path, schema)
    except RecursionError:
        raise UsageError(f"{place}: is nested too deeply, or a $ref leads to itself") from None


def _checked(path: Path, schema: Any) -> Any:
    validators = load_extra("jsonschema.validators", "json_schema")
    registry = load_extra("jsonschema_specifications", "json_schema").REGISTRY
    dialect = schema.get("$schema", _DRAFT) if isinstance(schema, dict) else _DRAFT
    draft = validators.validator_for({"$schema": dialect}, default=None) if isinstance(dialect, str) else None
    if draft is None:
        raise UsageError(f"metric json_schema: {path}: $schema is no known draft of JSON Schema: {dialect}")
    try:
        draft.check_schema(schema)
    except validators.exceptions.SchemaError as error:
        where, what = error.json_path, first_line(error.message)
        raise UsageError(f"metric json_schema: {path} is no valid JSON Schema: at {where}: {what}") from None
    _check_references(path, schema, registry)
    validator = draft(schema, registry=registry)
    try:
        validator.is_valid(None)
    except _unresolvable() as error:
        raise _unresolved(path, error.ref) from None
    return validator


def _read(path: Path) -> Any:
    try:
        return parse(read_text(path))
    except OSError as error:
        raise UsageError(f"metric json_schema: {path} can't be read: {error.strerror}") from None
    except ValueError as error:
        raise UsageError(f"metric json_schema: {path} is not JSON: {first_line(error)}") from None


def _check_references(path: Path, schema: Any, registry: Any) -> None:
    """Raises UsageError at a reference that leads out of the file: before answers are generated, not after."""
    referencing = load_extra("referencing", "json_schema")
    drafts = load_extra("referencing.jsonschema", "json_schema")
    root = referencing.Resource.from_contents(schema, default_specification=drafts.DRAFT202012)
    left = [(root, registry.resolver_with_root(root))]
    while left:
        resource, resolver = left.pop()
        left += [(inner, resolver.in_subresource(inner)) for inner in resource.subresources()]
        contents = resource.contents if isinstance(resource.contents, dict) else {}
        for reference in (contents[key] for key in ("$ref", "$dynamicRef") if isinstance(contents.get(key), str)):
            try:
                resolver.lookup(reference)
            except (_unresolvable(), ValueError):
                raise _unresolved(path, reference) from None


def _unresolvable() -> Any:
    return load_extra("referencing.exceptions", "json_schema").Unresolvable


def _unresolved(path: str | Path, reference: str) -> UsageError:
    return UsageError(f"metric json_schema: {path}: $ref {reference} is not in this file, and nothing else is read")
