"""Metrics of answers that should be JSON. Strict: no NaN, no key twice, nothing around it such as a code fence."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any, NoReturn

from lorafit.bounds import read_text, within
from lorafit.errors import UsageError
from lorafit.evaluation.metrics.metric import PairScore, load_extra
from lorafit.text import first_line

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
