"""What a chat template does with an assistant's turn, found by rendering a probe (no transformers).

Training itself renders with transformers; this light look lets a plan say in advance how the answer
ends and how its tokens will be found.
"""

from __future__ import annotations

import importlib.util
import json
import re
from dataclasses import dataclass
from datetime import datetime
from pathlib import Path
from typing import Any

import jinja2
import jinja2.ext
import jinja2.nodes
import jinja2.parser
from jinja2.sandbox import ImmutableSandboxedEnvironment

_ANSWER = "lorafit-probe-answer"
GENERATION = re.compile(r"\{%-?\s*generation\s*-?%\}")


@dataclass(frozen=True)
class TemplateFacts:
    """How a template treats an answer.

    Attributes:
        end_of_turn: the text that follows an answer, without surrounding white space; empty if the
            template does not end the turn; None if the probe could not be rendered.
        marks_answers: whether it has `{% generation %}` markers.
        has_training_version: whether TRL ships a training version of exactly this template, which is then used.
    """

    end_of_turn: str | None
    marks_answers: bool
    has_training_version: bool


class _Generation(jinja2.ext.Extension):
    """Accepts `{% generation %}` blocks, which render as their content."""

    tags = {"generation"}  # noqa: RUF012 - as jinja2 declares it

    def parse(self, parser: jinja2.parser.Parser) -> list[jinja2.nodes.Node]:
        next(parser.stream)
        return parser.parse_statements(("name:endgeneration",), drop_needle=True)


def inspect_template(template: str, special_tokens: dict[str, str | None]) -> TemplateFacts:
    """Render a question and an answer, as training does, and look at what follows the answer."""
    trained = training_version(template)
    return TemplateFacts(
        end_of_turn=_end_of_turn(trained or template, special_tokens),
        marks_answers=GENERATION.search(template) is not None,
        has_training_version=trained is not None,
    )


def _end_of_turn(template: str, special_tokens: dict[str, str | None]) -> str | None:
    environment = ImmutableSandboxedEnvironment(
        trim_blocks=True, lstrip_blocks=True, extensions=[_Generation, jinja2.ext.loopcontrols]
    )

    def raise_exception(message: str) -> None:
        raise jinja2.TemplateError(message)

    def tojson(value: Any, ensure_ascii: bool = False, indent: int | None = None, **_: Any) -> str:
        return json.dumps(value, ensure_ascii=ensure_ascii, indent=indent)

    environment.filters["tojson"] = tojson
    environment.globals.update(raise_exception=raise_exception, strftime_now=lambda form: datetime.now().strftime(form))
    messages: list[dict[str, Any]] = [{"role": "user", "content": "probe"}, {"role": "assistant", "content": _ANSWER}]
    for probe in (messages, in_parts(messages)):
        try:
            text = environment.from_string(template).render(
                messages=probe, tools=None, documents=None, add_generation_prompt=False, **special_tokens
            )
        except Exception:  # noqa: BLE001 - a template may fail in any way; training will say how
            continue
        _, found, after = text.partition(_ANSWER)
        if found:
            return after.strip()
    return None


def in_parts(messages: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """Messages with their text as a list of one part, as the templates of models for images want it."""
    return [{**message, "content": [{"type": "text", "text": message["content"]}]} for message in messages]


def uses_date(template: str) -> bool:
    """Whether a template may write the day on which it is rendered."""
    return "strftime_now" in template


def _trl_folder() -> Path | None:
    spec = importlib.util.find_spec("trl")
    return None if spec is None or spec.origin is None else Path(spec.origin).parent / "chat_templates"


def trl_templates() -> dict[str, Path]:
    """The chat templates that TRL ships, by name, without their training versions."""
    folder = _trl_folder()
    files = sorted(folder.glob("*.jinja")) if folder else []
    return {file.stem: file for file in files if not file.stem.endswith("_training")}


def template_families() -> list[tuple[str, bool]]:
    """The chat templates that TRL ships, by name, each with whether TRL ships a training version of it, too."""
    return [(name, _training_version(file).is_file()) for name, file in trl_templates().items()]


def _training_version(original: Path) -> Path:
    return original.with_name(f"{original.stem}_training.jinja")


def training_version(template: str) -> str | None:
    """The training version that TRL ships of exactly this template: it marks answers and keeps what was said."""
    for original in trl_templates().values():
        trained = _training_version(original)
        if trained.is_file() and original.read_text(encoding="utf-8") == template:
            return trained.read_text(encoding="utf-8")
    return None
