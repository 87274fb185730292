"""Modelfiles for Ollama: a Go template that renders what the chat template renders, checked by rendering both."""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from datetime import datetime
from itertools import takewhile
from typing import Any

import jinja2

from lorafit.bounds import within
from lorafit.errors import ModelError
from lorafit.facts.template import in_parts, light_environment

_ACTION = re.compile(r"\{\{ (.*?) \}\}")
_ACTIONS = {
    '"{{"': "{{ '{{' }}",
    ".Content": "{{ dot.Content }}",
    ".System": "{{ dot.System }}",
    "$.System": "{{ root.System }}",
    'if eq .Role "system"': "{% if dot.Role == 'system' %}",
    'if eq .Role "user"': "{% if dot.Role == 'user' %}",
    'if eq .Role "assistant"': "{% if dot.Role == 'assistant' %}",
    "if .System": "{% if dot.System %}",
    "if not .System": "{% if not dot.System %}",
    "if and $.System (eq $i 1)": "{% if root.System and loop.index0 == 1 %}",
    "if and $.System (eq (len (slice $.Messages $i)) 1)": "{% if root.System and loop.last %}",
    "if not (eq (len (slice $.Messages $i)) 1)": "{% if not loop.last %}",
    "else": "{% else %}",
    "range $i, $_ := .Messages": "{% for dot in dot.Messages %}",
}
"""The actions of Go's templates that our Modelfiles have (https://pkg.go.dev/text/template), as Jinja has them."""


def quoted(text: str) -> str:
    """Text as it stands in a template: as it is, with `{{` written as an action."""
    return text.replace("{{", '{{ "{{" }}')


def render(template: str, data: dict[str, Any]) -> str:
    """Render one of our Go templates with fields. Raises ValueError for an action that none of them has."""
    open_blocks: list[str] = []
    texts: list[str] = []
    parts = []
    for index, part in enumerate(_ACTION.split(template)):
        if index % 2 == 0:
            parts.append(f"{{{{ texts[{len(texts)}] }}}}")
            texts.append(part)
        elif part == "end" and open_blocks:
            parts.append(f"{{% end{open_blocks.pop()} %}}")
        elif part in _ACTIONS:
            parts.append(_ACTIONS[part])
            open_blocks += [word for word in ("if", "for") if f"{{% {word} " in _ACTIONS[part]]
        else:
            raise ValueError(f"{part!r} is not known here")
    environment = jinja2.Environment(undefined=jinja2.StrictUndefined)
    try:
        return environment.from_string("".join(parts)).render(dot=data, root=data, texts=texts)
    except jinja2.TemplateError as error:
        raise ValueError(str(error)) from None


Message = dict[str, Any]
_END = "{{ end }}"
_SYSTEM_WORDS = ["lorafitsystem", "lorafitquestion"]


@dataclass(frozen=True)
class Modelfile:
    """A Modelfile, and a line on what it can't do; None if it renders as the chat template does."""

    text: str
    remark: str | None


def modelfile(
    chat_template: str,
    special_tokens: dict[str, str | None],
    gguf_name: str,
    stops: list[str],
    adds_bos: bool = True,
) -> Modelfile:
    """The Modelfile for a GGUF file beside it.

    Args:
        chat_template: Jinja, as in the model's folder.
        special_tokens: bos_token, eos_token … as the template may write them.
        gguf_name: the file's name.
        stops: texts at which an answer ends.
        adds_bos: whether the file's tokenizer puts a beginning before every text (add_bos_token); the template
            doesn't write it then.

    The TEMPLATE is compared with the chat template on conversations with and without a system message, of one and of
    several turns, each ending where the model is to answer. If they differ it is left out, and the remark says why.
    """
    with within(ModelError, "the chat template: for a Modelfile it"):
        return _modelfile(_Jinja(chat_template, special_tokens, adds_bos), gguf_name, stops)


def _modelfile(jinja: _Jinja, gguf_name: str, stops: list[str]) -> Modelfile:
    lines = [f"FROM ./{gguf_name}"]
    remark = None
    try:
        template, system = _make(jinja)
        if '"""' in template + (system or ""):
            raise _CannotExpress('it holds """, which a Modelfile can\'t quote')
    except _CannotExpress as error:
        remark = (
            f"the Modelfile has no TEMPLATE, for {error}; Ollama will choose one by itself: "
            "compare its prompts with lorafit preview, or serve the file with llama-server --jinja"
        )
    else:
        lines.append(f'TEMPLATE """{template}"""')
        if system:
            lines.append(f'SYSTEM """{system}"""')
        if jinja.trims():
            remark = (
                "the chat template strips the spaces around messages and Ollama doesn't: send messages without them"
            )
    lines += [f"PARAMETER stop {_quote(stop)}" for stop in dict.fromkeys(stops)]
    return Modelfile("\n".join(lines) + "\n", remark)


def _quote(text: str) -> str:
    return f'"{text}"' if '"' not in text and "\n" not in text else f'"""{text}"""'


class _CannotExpress(Exception):
    """Why a chat template can't be a Go template that Ollama renders the same."""


class _Jinja:
    """A chat template, rendered as transformers does, without its beginning token where the tokenizer adds it."""

    def __init__(self, source: str, special_tokens: dict[str, str | None], adds_bos: bool) -> None:
        self._now = datetime(2024, 7, 26)
        self._special = {name: text for name, text in special_tokens.items() if text is not None}
        self._bos = self._special.get("bos_token", "") if adds_bos else ""
        environment = light_environment(lambda: self._now)
        self._error: str | None = None
        self._parts = False
        try:
            self._template = environment.from_string(source)
        except jinja2.TemplateError as error:
            self._template = environment.from_string("{{ raise_exception('x') }}")
            self._error = str(error)
        if self.render([_user("a")]) is None:
            self._parts = True

    def render(self, messages: list[Message], prompt: bool = True) -> str | None:
        """The prompt, or None if the template doesn't accept the messages."""
        try:
            text = self._template.render(
                messages=in_parts(messages) if self._parts else messages,
                tools=None,
                documents=None,
                add_generation_prompt=prompt,
                **self._special,
            )
        except Exception as error:  # noqa: BLE001 - a template may fail in any way
            self._error = self._error or str(error)
            return None
        return text.removeprefix(self._bos) if self._bos else text

    def need(self, messages: list[Message]) -> str:
        text = self.render(messages)
        if text is None:
            raise _CannotExpress(f"the chat template fails on {len(messages)} messages: {self._error}")
        return text

    def knows_system(self) -> bool:
        text = self.render([_system("lorafitsystem"), _user("a")])
        return text is not None and "lorafitsystem" in text

    def depends_on_date(self) -> bool:
        before = self.render([_user("a")])
        self._now = datetime(2031, 1, 2)
        after = self.render([_user("a")])
        self._now = datetime(2024, 7, 26)
        return before != after

    def trims(self) -> bool:
        padded = self.render([_user("  a\n")])
        return padded is not None and "  a\n" not in padded


def _turn_of(role: str) -> Callable[[str], Message]:
    return lambda text: {"role": role, "content": text}


_system, _user, _assistant = map(_turn_of, ("system", "user", "assistant"))


def _make(jinja: _Jinja) -> tuple[str, str | None]:
    """The Go template, and the system message that the chat template gives itself, if it can stand in SYSTEM."""
    if jinja.depends_on_date():
        raise _CannotExpress("the chat template writes the day's date")
    for template, system in _candidates(jinja):
        try:
            difference = _difference(jinja, template, system)
        except ValueError as error:
            difference = str(error)
        if difference is None:
            return template, system
    raise _CannotExpress(f"the chat template treats turns in ways that Ollama's templates can't ({difference})")


@dataclass(frozen=True)
class _Pieces:
    """The texts around messages, found by rendering words that occur nowhere else."""

    start: str  # before the first question, without a system message
    user: tuple[str, str]
    assistant: tuple[str, str]
    prompt: str  # after the last question


def _candidates(jinja: _Jinja) -> Iterator[tuple[str, str | None]]:
    """Templates to try, the plainest first."""
    pieces = _find_pieces(jinja)
    start, prompt = pieces.start, pieces.prompt
    assistant, user = _turn("assistant", pieces.assistant), _turn("user", pieces.user)
    if not jinja.knows_system():
        yield _range(_unless_system(start), user + assistant, prompt), None
        return
    before, after = _cut(jinja.need([_system("lorafitsystem"), _user("lorafitquestion")]), _SYSTEM_WORDS)[:2]
    if after.endswith(pieces.user[0]):
        around = (before, after.removesuffix(pieces.user[0]))
        turns = user + assistant + _turn("system", around)
        default = start[len(around[0]) : len(start) - len(around[1])]
        if default and start == around[0] + default + around[1]:
            yield _range("", turns, prompt), default
        yield _range(_unless_system(start), turns, prompt), None
        # a beginning that is there with and without a system message
        if common := _shared(start, before):
            inner = _turn("system", (before.removeprefix(common), around[1]))
            opening = quoted(common) + _unless_system(start.removeprefix(common))
            yield _range(opening, user + assistant + inner, prompt), None
    if before == start + pieces.user[0]:
        for condition in ("(eq $i 1)", "(eq (len (slice $.Messages $i)) 1)"):
            told = f"{{{{ if and $.System {condition} }}}}{{{{ $.System }}}}{quoted(after)}{_END}"
            turn = _turn("user", pieces.user, quoted(pieces.user[0]) + told)
            yield _range(quoted(start), turn + assistant, prompt), None
    # The system message stands before everything, in whatever form.
    opening = f"{{{{ if .System }}}}{quoted(before)}{{{{ .System }}}}{quoted(after)}{{{{ else }}}}"
    opening += f"{quoted(start + pieces.user[0])}{_END}"
    answer = f"{{{{ if not (eq (len (slice $.Messages $i)) 1) }}}}{quoted(pieces.user[1] + pieces.assistant[0])}{_END}"
    question = _turn("user", ("", ""), after=answer)
    answered = _turn("assistant", ("", pieces.assistant[1] + pieces.user[0]))
    yield _range(opening, question + answered, pieces.user[1] + prompt), None


def _find_pieces(jinja: _Jinja) -> _Pieces:
    words = ["lorafitquestionone", "lorafitanswerone", "lorafitquestiontwo", "lorafitanswertwo", "lorafitquestionthree"]
    one, first, two, second, three = words
    messages = [_user(one), _assistant(first), _user(two), _assistant(second), _user(three)]
    opening, to_answer, to_question, to_answer_too, _, ending = _cut(jinja.need(messages), words)
    if to_answer != to_answer_too:
        raise _CannotExpress("the chat template renders earlier questions in several ways")
    last = jinja.render([_user(one), _assistant(first)], prompt=False)
    # What a conversation ends with is what an answer ends with, unless more comes at the end of all.
    ends = [_cut(last, [one, first])[2]] if last is not None else []
    ends = [end for end in ends if to_question.startswith(end)]
    if to_question.endswith(opening):
        ends.append(to_question.removesuffix(opening))
    ends = [end for end in ends if opening.endswith(to_question.removeprefix(end))]
    if not ends:
        raise _CannotExpress("the chat template renders the first question in another way than later ones")
    end = ends[0]
    question = to_question.removeprefix(end)
    alone = jinja.render([_user(one)], prompt=False)
    asked = [_cut(alone, [one])[1]] if alone is not None else []
    shared = _shared(to_answer, ending)
    after = next((text for text in [*asked, end] if shared.startswith(text)), shared)
    start = opening.removesuffix(question)
    return _Pieces(start, (question, after), (to_answer.removeprefix(after), end), ending.removeprefix(after))


def _cut(text: str, words: list[str]) -> list[str]:
    """The texts around words that occur once each and in this order."""
    parts = []
    for word in words:
        part, found, text = text.partition(word)
        if not found or word in text:
            raise _CannotExpress("the chat template leaves out, repeats or rearranges messages")
        parts.append(part)
    return [*parts, text]


def _shared(one: str, other: str) -> str:
    """What two texts begin with."""
    return "".join(a for a, _ in takewhile(lambda pair: pair[0] == pair[1], zip(one, other, strict=False)))


def _turn(role: str, around: tuple[str, str], opener: str | None = None, after: str | None = None) -> str:
    """A role's turn: its content between two texts, or between pieces of a template."""
    before = quoted(around[0]) if opener is None else opener
    after = quoted(around[1]) if after is None else after
    return f'{{{{ if eq .Role "{role}" }}}}{before}{{{{ .Content }}}}{after}{_END}'


def _unless_system(text: str) -> str:
    return f"{{{{ if not .System }}}}{quoted(text)}{_END}" if text else ""


def _range(start: str, turns: str, prompt: str) -> str:
    return f"{start}{{{{ range $i, $_ := .Messages }}}}{turns}{_END}{quoted(prompt)}"


def _conversations(with_system: bool) -> Iterator[list[Message]]:
    turns = [
        _user("What is the order of 3864?"),
        _assistant('{"order": "3864"}'),
        _user("And then?\nTwo lines, with {{ braces }} and <tags>."),
        _assistant("Nothing."),
        _user("Thanks!"),
    ]
    for length in (1, 3, 5):
        yield turns[:length]
        if with_system:
            yield [_system("Answer in JSON."), *turns[:length]]


def _difference(jinja: _Jinja, template: str, system: str | None) -> str | None:
    """Where the two render a conversation differently, or None."""
    for messages in _conversations(jinja.knows_system()):
        expected = jinja.need(messages)
        given = messages if system is None or messages[0]["role"] == "system" else [_system(system), *messages]
        if render(template, _as_ollama(given)) != expected:
            kind = "with" if messages[0]["role"] == "system" else "without"
            return f"{len(messages)} messages {kind} a system message come out differently"
    return None


def _as_ollama(messages: list[Message]) -> dict[str, Any]:
    """What Ollama gives its templates."""
    system = "\n\n".join(message["content"] for message in messages if message["role"] == "system")
    listed = [{"Role": message["role"], "Content": message["content"]} for message in messages]
    return {"System": system, "Messages": listed}
