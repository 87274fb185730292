"""What a chat template does with an assistant's turn, found by rendering a probe (no transformers).

Training itself renders with transformers; this light look lets a plan say in advance how the answer
ends and how its tokens will be found.
"""

from __future__ import annotations

import importlib.util
import json
import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from datetime import datetime
from pathlib import Path
from typing import Any

import jinja2
import jinja2.ext
import jinja2.meta
import jinja2.nodes
import jinja2.parser

from lorafit.bounds import Environment, within
from lorafit.errors import ModelError
from lorafit.text import first_line

_ANSWER = "lorafit-probe-answer"
GENERATION = re.compile(r"\{%-?\s*generation\s*-?%\}")
THINKING_SWITCHES = ("enable_thinking", "thinking")
"""What templates call the variable that switches reasoning off."""
REASONING = (
    ("<think>", "</think>"),
    ("[THINK]", "[/THINK]"),
    ("<|START_THINKING|>", "<|END_THINKING|>"),
    ("<|channel|>analysis", "<|channel|>final<|message|>"),
    ("<|channel>thought", "<channel|>"),
)
"""What reasoning begins and ends with, in the templates of those families that have it."""
_EMPTY = re.compile("|".join(rf"\s*{re.escape(begin)}\s*{re.escape(end)}\s*" for begin, end in REASONING))
_HEADER = re.compile(r"\s*(?:<\|start\|>assistant)?(?:<\|channel\|>final| to=user)<\|message\|>")
_REST = re.compile("|".join(rf"\s*{re.escape(end)}\s*" for _, end in REASONING))
_DEFAULTS = re.compile(r"(?:(?:\{%- if \w+ is not defined %\}\{%- set \w+ = [^%]* %\}\{%- endif %\})+\n)+")


def with_defaults(template: str, values: Mapping[str, Any]) -> str:
    """A chat template in which variables have these values unless whoever renders it gives others.

    Other values that it has as defaults stay. So what was trained on is what anybody asks who has the tokenizer, and
    knows nothing of the recipe.
    """
    sets = "".join(
        f"{{%- if {name} is not defined %}}{{%- set {name} = {_literal(value)} %}}{{%- endif %}}"
        for name, value in sorted(values.items())
    )
    prefix = f"{sets}\n" if sets else ""  # the line break goes with the block before it
    return template if template.startswith(prefix) else prefix + template


def _literal(value: Any) -> str:
    if value is None or isinstance(value, bool):
        return str(value).lower()
    return json.dumps(value, ensure_ascii=False).replace("%", "\\u0025").replace("{", "\\u007b")


def syntax_error(template: str) -> str | None:
    """The line of a template that is no Jinja, and why it is none; None for one that is."""
    try:
        light_environment().from_string(template)
    except Exception as error:  # noqa: BLE001 - such as brackets 2000 deep
        return f"{getattr(error, 'lineno', 1)}: no Jinja: {first_line(error)}"
    return None


def variables(template: str) -> set[str]:
    """The names that a template takes from whoever renders it. Empty if it is no Jinja. Raises ModelError."""
    with _within():
        try:
            return jinja2.meta.find_undeclared_variables(light_environment().parse(template))
        except Exception:  # noqa: BLE001 - a template may fail in any way; training will say how
            return set()


def _within() -> within:
    return within(ModelError, "the chat template: a question and an answer, or reading it,")


def without_defaults(template: str) -> tuple[str, str]:
    """What `with_defaults` put before a template, and the template."""
    found = _DEFAULTS.match(template)
    return (found.group(), template[found.end() :]) if found else ("", template)


def without_reasoning(answer: str, is_open: bool = False) -> str:
    """An answer without the reasoning it begins with; empty if that never ends.

    Args:
        is_open: whether the prompt has begun it already.
    """
    for begin, end in REASONING:
        if end in answer and (is_open or answer.lstrip().startswith(begin)):
            return answer.partition(end)[2]
    return "" if has_reasoning(answer) or is_open else answer


def without_header(answer: str) -> str:
    """An answer without what gpt-oss and its like write before its words: its channel, or whom it is for."""
    return _HEADER.sub("", answer)


def has_reasoning(answer: str) -> bool:
    """Whether an answer begins with reasoning; an empty block is none."""
    return answer.lstrip().startswith(tuple(begin for begin, _ in REASONING)) and not _EMPTY.match(answer)


def ends_reasoning(prompt: str) -> bool:
    """Whether a prompt ends where reasoning is over."""
    return prompt.rstrip().endswith(tuple(end for _, end in REASONING))


def opens_reasoning(prompt: str) -> bool:
    """Whether a prompt ends where reasoning has just begun."""
    return prompt.rstrip().endswith(tuple(begin for begin, _ in REASONING))


def empty_reasoning(text: str, start: int = 0, end: int | None = None, is_open: bool = False) -> int:
    """Where an empty block of reasoning, and the white space around it, ends that stands at a place; 0 if none does.

    Args:
        is_open: whether it has begun before that place.
    """
    found = (_REST if is_open else _EMPTY).match(text, start, len(text) if end is None else end)
    return found.end() if found else 0


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
    """Render a question and an answer, as training does, and look at what follows the answer. Raises ModelError."""
    with _within():
        trained = training_version(template)
        return TemplateFacts(
            end_of_turn=_end_of_turn(trained or template, special_tokens),
            marks_answers=GENERATION.search(template) is not None,
            has_training_version=trained is not None,
        )


def _end_of_turn(template: str, special_tokens: dict[str, str | None]) -> str | None:
    text = _rendered(template, special_tokens)
    found = "" if text is None else text.partition(_ANSWER)[1]
    return text.partition(_ANSWER)[2].strip() if text is not None and found else None


def thinking_switch(template: str, special_tokens: dict[str, str | None]) -> str | None:
    """The variable that must be false for answers without reasoning to follow right after the prompt for them.

    None where they do so anyway, or no variable helps. Raises ModelError.
    """
    with _within():
        if _answers_at_once(template, special_tokens):
            return None
        switched = (name for name in THINKING_SWITCHES if re.search(rf"\b{name}\b", template))
        return next(
            (name for name in switched if _answers_at_once(with_defaults(template, {name: False}), special_tokens)),
            None,
        )


def _answers_at_once(template: str, special_tokens: dict[str, str | None]) -> bool:
    """Whether an answer follows the generation prompt, with nothing but white space or an empty block between."""
    text = _rendered(training_version(template) or template, special_tokens)
    prompt = _rendered(template, special_tokens, prompt=True)
    if text is None or prompt is None:
        return True  # nothing is known
    return text.startswith(prompt) and text[len(prompt) :].lstrip().startswith(_ANSWER)


def _rendered(template: str, special_tokens: dict[str, str | None], prompt: bool = False) -> str | None:
    """A question and its answer, or the prompt for it; None where the template can't be probed."""
    environment = light_environment()
    messages: list[dict[str, Any]] = [{"role": "user", "content": "probe"}, {"role": "assistant", "content": _ANSWER}]
    given = messages[:1] if prompt else messages
    for probe in (given, in_parts(given)):
        try:
            text = environment.from_string(template).render(
                messages=probe, tools=None, documents=None, add_generation_prompt=prompt, **special_tokens
            )
        except Exception:  # noqa: BLE001 - a template may fail in any way; training will say how
            continue
        if ("probe" if prompt else _ANSWER) in text:
            return text
    return None


def light_environment(now: Callable[[], datetime] = datetime.now) -> Environment:
    """Renders chat templates as transformers does."""
    environment = Environment(trim_blocks=True, lstrip_blocks=True, extensions=[_Generation, jinja2.ext.loopcontrols])

    def raise_exception(message: str) -> None:
        raise jinja2.TemplateError(message)

    def tojson(value: Any, ensure_ascii: bool = False, indent: int | None = None, **_: Any) -> str:
        return json.dumps(value, ensure_ascii=ensure_ascii, indent=indent)

    environment.filters["tojson"] = tojson
    environment.globals.update(raise_exception=raise_exception, strftime_now=lambda form: now().strftime(form))
    return environment


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
    """The training version that TRL ships of exactly this template: it marks answers and keeps what was said.

    What `with_defaults` put before the template stands before that, too.
    """
    defaults, template = without_defaults(template)
    for original in trl_templates().values():
        trained = _training_version(original)
        if trained.is_file() and original.read_text(encoding="utf-8") == template:
            return defaults + trained.read_text(encoding="utf-8")
    return None
