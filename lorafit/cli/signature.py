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
from lorafit.options.fields import Argument, Option, Options

Asked = TypeVar("Asked", bound=Options)


def command(run: Callable[[Asked], None]) -> Callable[..., None]:
    """Make a command of a function: parsed and checked options in, failures as messages and exit codes out."""
    [kind] = [hint for name, hint in get_type_hints(run).items() if name != "return"]
    hints = get_type_hints(kind, include_extras=True)
    by_name = {one.name: one for one in fields_of(kind)}
    # the order of __init__, where fields that every command has come last
    fields = [_field(hints[name], name, by_name[name].default) for name in inspect.signature(kind).parameters]

    @reporting
    def typed(**given: Any) -> None:
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
    shown: Argument | Option

    @property
    def parse(self) -> Callable[[str], Any] | None:
        return self.shown.parse if isinstance(self.shown, Option) else None

    @property
    def is_joined(self) -> bool:
        return isinstance(self.shown, Option) and self.shown.joined

    @property
    def is_repeatable(self) -> bool:
        return get_origin(self.kind) is tuple and not self.is_joined

    @property
    def choices(self) -> tuple[str, ...]:
        return get_args(self.kind) if get_origin(self.kind) is Literal else ()

    @property
    def flag(self) -> str:
        flags = self.shown.flags.split() if isinstance(self.shown, Option) else []
        return flags[-1] if flags else f"--{self.name.replace('_', '-')}"

    def parameter(self) -> inspect.Parameter:
        """The field as typer takes it: without the types that only lorafit knows, and None for no values."""
        kind = str if self.parse or self.choices else get_args(self.kind)[0] if self.is_repeatable else self.kind
        kind = list[kind] if self.is_repeatable else kind  # type: ignore[valid-type]
        default = self.default
        if isinstance(default, tuple):
            default = ",".join(map(str, default)) or None
        kind = kind if default is not None else kind | None
        default = inspect.Parameter.empty if default is MISSING else default
        return inspect.Parameter(
            self.name, inspect.Parameter.KEYWORD_ONLY, default=default, annotation=Annotated[kind, self._typer()]
        )

    def _typer(self) -> Any:
        completes = self.shown.completes
        common: dict[str, Any] = {
            "metavar": self.shown.metavar,
            "help": self.shown.help,
            "autocompletion": getattr(complete, completes) if completes else None,
        }
        if isinstance(self.shown, Argument):
            return typer.Argument(**common)
        flags = self.shown.flags.split() or [self.flag]
        return typer.Option(*flags, min=self.shown.min, **common)

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
            return self.parse(given) if self.parse else given
        except UsageError as error:
            raise UsageError(f"{self.flag} {error}") from None


def _field(hint: Any, name: str, default: Any) -> _Field:
    kind, shown = get_args(hint)[:2] if get_origin(hint) is Annotated else (hint, None)
    if not isinstance(shown, Argument | Option):
        raise TypeError(f"{name}: is typed nowhere; annotate it with an Argument or an Option")
    if get_origin(kind) in (Union, UnionType):
        [kind] = [part for part in get_args(kind) if part is not NoneType]
    return _Field(name, kind, default, shown)
