"""Typer's signature of a command, made from the fields of its options' type."""

from __future__ import annotations

import inspect
from collections.abc import Callable
from dataclasses import MISSING, dataclass
from dataclasses import fields as fields_of
from types import NoneType, UnionType
from typing import Annotated, Any, Literal, TypeVar, Union, get_args, get_origin, get_type_hints

import typer

from lorafit.cli import complete
from lorafit.cli.exits import reporting
from lorafit.errors import UsageError
from lorafit.options import Argument, Option, Options

Asked = TypeVar("Asked", bound=Options)


def command(run: Callable[[Asked], None]) -> Callable[..., None]:
    """Make a command of a function: parsed and checked options in, failures as messages and exit codes out."""
    [kind] = [hint for name, hint in get_type_hints(run).items() if name != "return"]
    hints = get_type_hints(kind, include_extras=True)
    by_name = {one.name: one for one in fields_of(kind)}
    # the order of __init__, where fields that every command has come last
    fields = [_field(hints[name], name, by_name[name].default) for name in inspect.signature(kind).parameters]

    def typed(**given: Any) -> None:
        with reporting():
            options = kind(**{one.name: one.value(given[one.name]) for one in fields})
            options.check()
            run(options)

    typed.__signature__ = inspect.Signature([one.parameter() for one in fields])  # type: ignore[attr-defined]
    typed.__name__ = run.__name__
    return typed


@dataclass(frozen=True)
class _Field:
    """A field of an options' type.

    Attributes:
        kind: its type, without None.
        default: MISSING for what has to be given.
    """

    name: str
    kind: Any
    default: Any
    shown: Option

    @property
    def flags(self) -> list[str]:
        """Its names on the command line."""
        names = [word for word in self.shown.typed.split() if word.startswith("-")]
        return names or [f"--{self.name.replace('_', '-')}"]

    @property
    def flag(self) -> str:
        """The name that messages give it."""
        return max(self.flags, key=len)

    @property
    def is_repeatable(self) -> bool:
        return get_origin(self.kind) is tuple and not self.shown.joined

    @property
    def choices(self) -> tuple[str, ...]:
        return get_args(self.kind) if get_origin(self.kind) is Literal else ()

    def parameter(self) -> inspect.Parameter:
        """The field as typer takes it: without the types that only lorafit knows, and None for no values."""
        is_text = self.shown.parse or self.choices
        kind = str if is_text else get_args(self.kind)[0] if self.is_repeatable else self.kind
        kind = list[kind] if self.is_repeatable else kind  # type: ignore[valid-type]
        default = ",".join(map(str, self.default)) or None if isinstance(self.default, tuple) else self.default
        return inspect.Parameter(
            self.name,
            inspect.Parameter.KEYWORD_ONLY,
            default=inspect.Parameter.empty if default is MISSING else default,
            annotation=Annotated[kind if default is not None else kind | None, self._typer()],
        )

    def _typer(self) -> Any:
        shown, place = self.shown, isinstance(self.shown, Argument)
        metavar = " ".join(word for word in shown.typed.split() if place or not word.startswith("-"))
        completion = getattr(complete, shown.completes) if shown.completes else None
        common: dict[str, Any] = {"metavar": metavar or None, "help": shown.help, "autocompletion": completion}
        return typer.Argument(**common) if place else typer.Option(*self.flags, min=shown.min, **common)

    def value(self, given: Any) -> Any:
        """The field's value of what typer read. Raises UsageError."""
        if given is None:
            return self.default
        if self.is_repeatable:
            return tuple(map(self._parsed, given))
        if self.choices and given not in self.choices:
            raise UsageError(f"{self.flag}: expected one of {', '.join(self.choices)}, got {given}")
        return self._parsed(given)

    def _parsed(self, given: Any) -> Any:
        try:
            return self.shown.parse(given) if self.shown.parse else given
        except UsageError as error:
            raise UsageError(f"{self.flag}{' ' * bool(given)}{error}") from None


def _field(hint: Any, name: str, default: Any) -> _Field:
    kind, shown = get_args(hint)[:2] if get_origin(hint) is Annotated else (hint, None)
    if not isinstance(shown, Option):
        raise TypeError(f"{name}: is typed nowhere; annotate it with an Argument or an Option")
    if get_origin(kind) in (Union, UnionType):
        [kind] = [part for part in get_args(kind) if part is not NoneType]
    return _Field(name, kind, default, shown)
