"""Rows as text: the chat template applied once, and the answers found in it as spans of characters."""

from __future__ import annotations

import copy
import functools
import json
import re
from collections.abc import Iterable
from dataclasses import dataclass
from datetime import datetime
from typing import Any

from transformers import PreTrainedTokenizerBase
from transformers.utils import chat_template_utils
from transformers.utils.chat_template_utils import _compile_jinja_template, render_jinja_template

from lorafit import bounds
from lorafit.errors import DataError, ModelError
from lorafit.facts.template import (
    GENERATION,
    empty_reasoning,
    ends_reasoning,
    has_reasoning,
    in_parts,
    inspect_template,
    opens_reasoning,
    training_version,
    uses_date,
)
from lorafit.rows import Example, Fault, Message
from lorafit.text import first_line

# What transformers compiles every chat template with, here and for whoever else asks a tokenizer.
chat_template_utils.ImmutableSandboxedEnvironment = bounds.Environment

_REASONING = ("reasoning_content", "thinking", "reasoning")
_WORD = re.compile(r"\w+")
_OTHER = "\ue0ff"
"""An answer that differs from every other in its first character (which is for private use)."""
UNTRAINED = "train: false"
"""Why a row is left out that says itself that it is not to be learned."""
Span = tuple[int, int]


@dataclass(frozen=True)
class Rendered:
    """A row as text.

    Attributes:
        spans: what is learned, as character ranges in order: the answers with their ends.
        answers: the answers, where more than they is learned in several spans; None: they are the spans.
        special: whether the tokenizer adds its special tokens (a chat template writes its own).
        question: what the last answer answers, for people.
        answer: the last answer with its end, as it is learned.
        prompt: what a model is asked for it; None for plain text.
        reasoning: whether an answer that is learned has reasoning before it (True), or an empty block (False).
        remarks: what an audit rule counts, without dropping the row: rule -> what it is.
    """

    file: str
    number: int
    text: str
    spans: tuple[Span, ...]
    special: bool
    question: str
    remarks: dict[str, str]
    answers: tuple[Span, ...] | None = None
    answer: str = ""
    prompt: str | None = None
    reasoning: bool | None = None


class Renderer:
    """Renders examples as text and finds their answers.

    Args:
        loss_on: `assistant`, `completion` or `all`, as in the recipe.
        date: the day (ISO) that a template which writes the date is given. None: today.

    `masks` says how answers in conversations are found: by `{% generation %}` markers (of the
    template, or of the training version of it that TRL ships), or, where there are none, by
    rendering the conversation turn by turn and taking what each assistant turn adds.
    """

    def __init__(self, tokenizer: PreTrainedTokenizerBase, loss_on: str, date: str | None = None) -> None:
        self.tokenizer = tokenizer
        self.loss_on = loss_on
        self.eos = str(tokenizer.eos_token or "")
        self.special = special_tokens(tokenizer)
        self.special_pattern = re.compile("|".join(map(re.escape, self.special)) or "(?!)")
        self._firsts = {token[0] for token in self.special if token}
        named: Any = tokenizer.chat_template
        named = named if isinstance(named, dict) else {"default": named}
        self._templates = {
            name: ChatTemplate(tokenizer, template, self.special, date)
            for name, template in named.items()
            if name in ("default", "tool_use") and template is not None
        }
        self.masks = self._templates["default"].masks if "default" in self._templates else "turn by turn"

    def render(self, example: Example) -> Rendered:
        """Raises DataError for a row that the template refuses, and Fault for one whose answer it leaves out."""
        if example.text is None and example.prompt is None:
            with bounds.within(DataError, f"{example.place}: the chat template"):
                return self._conversation(example)
        prompt, answer = example.prompt, example.completion or ""
        if example.text is not None:
            prompt, answer = None, example.text
        answer = answer if self._is_ended(answer) else answer + self.eos
        text = (prompt or "") + answer
        begin = len(prompt) if prompt is not None and self.loss_on != "all" else 0
        answer = "" if prompt is None else answer
        spans, question = ((begin, len(text)),), prompt or ""
        return Rendered(example.file, example.number, text, spans, True, question, {}, answer=answer, prompt=prompt)

    def _is_ended(self, text: str) -> bool:
        return self.eos != "" and text.rstrip().endswith(self.eos)

    def _template_for(self, example: Example) -> ChatTemplate:
        found = self._templates.get("tool_use") if example.tools else None
        found = found or self._templates.get("default")
        if found is None:
            raise DataError(
                f"{example.place}: a conversation needs a chat template, and the tokenizer has none; set "
                "model.chat_template to a Jinja file"
            )
        return found

    def _conversation(self, example: Example) -> Rendered:
        template = self._template_for(example)
        tools = list(example.tools) if example.tools else None
        messages = [{key: value for key, value in m.items() if key != "train"} for m in example.messages]
        answers = [index for index, message in enumerate(messages) if message["role"] == "assistant"]
        untrained = self._untrained(example)
        learned = self._learned(example, answers, untrained)
        everything = self.loss_on == "all" and not untrained
        whole = everything and template.ends_turns and template.marked is None
        try:
            asked = {index: template.prompt(messages[:index], tools) for index in template.to_check(learned, messages)}
            text, spans = template.answers(messages, tools, answers, learned, example.place, whole)
            prompt = asked[learned[-1]]
            alone = learned == answers[-1:] and self.loss_on != "all"
            if alone and prompt is not None and not text.startswith(prompt):
                text, spans = template.last_answer(messages, tools, prompt) or (text, spans)
        except DataError:
            raise
        except Exception as error:  # noqa: BLE001 - a template may fail in any way
            raise DataError(f"{example.place}: the chat template refuses the row: {first_line(error)}") from None
        self._check_shown(text, spans, [messages[index] for index in learned], example)
        spans, reasoning, differs = _asked(text, spans, {i: p for i, p in asked.items() if p is not None}, messages)
        if not template.ends_turns:
            text, spans = self._end_turns(text, spans)
            if prompt is not None and not differs and not text.startswith(prompt):
                differs = f"earlier answers end with {self.eos!r} here, which the chat template does not write"
        begin, end = spans[-1]
        answer = text[max(begin, len(prompt)) if prompt is not None and text.startswith(prompt) else begin : end]
        answers_only: tuple[Span, ...] | None = None
        if everything:
            spans = [(0, len(text))]
        elif self.loss_on == "all":
            answers_only = tuple(spans)
            spans = _without(template.turns(text, messages, tools, untrained, example.place), text)
        question = next((m["content"] for m in reversed(messages[: learned[-1]]) if m["role"] == "user"), "")
        remarks = self._remarks(messages, [messages[index] for index in learned], text)
        left_out = [_name(tool) for tool in tools or [] if not template.knows_tools or _name(tool) not in text]
        if left_out:
            remarks["context_left_out"] = f"the chat template leaves out the tool {left_out[0]!r}"
        if differs:
            remarks["prompt_differs"] = f"the row learns after another text than a server asks with: {differs}"
        return Rendered(
            example.file,
            example.number,
            text,
            tuple(spans),
            False,
            question,
            remarks,
            answers_only,
            answer,
            prompt,
            reasoning,
        )

    def _untrained(self, example: Example) -> list[int]:
        """The indices of the messages that say `train: false`. A prompt's all do, but `all` learns a prompt, too."""
        begin = (example.completion_start or 0) if self.loss_on == "all" else 0
        return [i for i, message in enumerate(example.messages) if i >= begin and not message.get("train", True)]

    def _learned(self, example: Example, answers: list[int], untrained: list[int]) -> list[int]:
        """The indices of the messages whose words are learned. Raises Fault if there are none."""
        trained = [index for index in answers if index not in untrained]
        if self.loss_on == "completion":
            begin = answers[-1] if example.completion_start is None else example.completion_start
            trained = [index for index in trained if index >= begin]
        if not trained:
            raise Fault(UNTRAINED, f"{example.place}: the last answer says `train: false`")
        return trained

    def _check_shown(self, text: str, spans: list[Span], answers: list[Message], example: Example) -> None:
        """Raises Fault for an answer or a tool call that the template does not write."""

        def has_words(part: str) -> bool:
            return self.special_pattern.sub("", part).strip() != ""

        shown = [text[start:end] for start, end in spans]
        expected = all(has_words(message["content"]) or message.get("tool_calls") for message in answers)
        if not shown or (expected and not all(map(has_words, shown))):
            raise Fault("answers_left_out", f"{example.place}: the chat template leaves out an answer")
        for message in answers:
            names = [_name(call) for call in message.get("tool_calls") or []]
            for name in dict.fromkeys(names):
                if sum(part.count(name) for part in shown) < names.count(name):
                    raise Fault(
                        "answers_left_out",
                        f"{example.place}: the chat template leaves out the tool call {name!r}; use one that knows "
                        "tools, such as model.chat_template: qwen2_5 for ChatML",
                    )

    def _remarks(self, messages: list[Message], learned: list[Message], text: str) -> dict[str, str]:
        found: dict[str, str] = {}
        for message in learned:
            reasoning = next((message[key] for key in _REASONING if message.get(key)), None)
            if isinstance(reasoning, str) and reasoning.strip() not in text:
                found["context_left_out"] = "the chat template leaves out the reasoning of an answer"
            if not _shows_all(text, message["content"]):
                found["context_left_out"] = "the chat template leaves out words of an answer"
        for message in messages:
            if message["role"] != "assistant" and not _shows(text, message["content"]):
                found["context_left_out"] = f"the chat template leaves out a turn of the role {message['role']!r}"
        for words in (part for message in messages for part in _words(message)):
            token = self.special_pattern.search(words) if any(first in words for first in self._firsts) else None
            if token:
                found["special_tokens_in_content"] = (
                    f"the content of a turn holds {token.group()!r}, which becomes a control token"
                )
        return found

    def _end_turns(self, text: str, spans: list[Span]) -> tuple[str, list[Span]]:
        """Put the end token after every answer that has none, for templates that don't end turns."""
        parts: list[str] = []
        ended: list[Span] = []
        done = length = 0
        for start, end in spans:
            answer = text[start:end] if text[start:end].endswith(self.eos) else text[start:end] + self.eos
            parts += [text[done:start], answer]
            length += start - done
            ended.append((length, length + len(answer)))
            length, done = length + len(answer), end
        return "".join([*parts, text[done:]]), ended


class ChatTemplate:
    """One chat template of a tokenizer, and how its answers are found."""

    def __init__(
        self, tokenizer: PreTrainedTokenizerBase, template: str, special: dict[str, int], date: str | None
    ) -> None:
        self.template = template
        self.special = tuple(special)
        self.special_pattern = re.compile("|".join(map(re.escape, special)) or "(?!)")
        self.names = dict(tokenizer.special_tokens_map)
        self.eos = str(tokenizer.eos_token) if tokenizer.eos_token else None
        with bounds.within(ModelError, "the chat template: a question and an answer"):
            self._look(template, date)

    def _look(self, template: str, date: str | None) -> None:
        """Find out how it treats answers, by rendering some."""
        self.marked = training_version(template) or (template if GENERATION.search(template) else None)
        self.wants_parts = False
        self.wants_parts = not self._shows_words() and self._shows_words(parts=True)
        named: dict[str, str | None] = {key: str(value) for key, value in self.names.items()}
        end_of_turn = inspect_template(template, named).end_of_turn
        self.ends_turns = end_of_turn != ""
        self.closing = {self.eos} if self.eos else set()
        self.closing.update(token for token in self.special if (end_of_turn or "").startswith(token))
        self.knows_tools = re.search(r"\btools\b", template) is not None
        self.masks = "turn by turn"
        if self.marked is not None:
            own = self.marked == template
            self.masks = "markers of the chat template" if own else "TRL's training version of the chat template"
        if uses_date(template):
            day = datetime.fromisoformat(date) if date else datetime.now()
            for text in {template, self.marked or template}:
                _compile_jinja_template(text).globals["strftime_now"] = day.strftime

    def _shows_words(self, parts: bool = False) -> bool:
        """Whether words given as plain text, or as a list of parts, are written."""
        probe: list[Message] = [{"role": role, "content": _OTHER} for role in ("user", "assistant")]
        try:
            return _OTHER in self.write(in_parts(probe) if parts else probe, None)
        except Exception:  # noqa: BLE001 - a template may fail in any way
            return False

    def write(self, messages: list[Message], tools: Any, *, prompt: bool = False) -> str:
        """The conversation as text, as training sees it."""
        return self._render(self.marked or self.template, messages, tools, add_generation_prompt=prompt)[0]

    def prompt(self, messages: list[Message], tools: Any) -> str | None:
        """What a server asks with for the answer to some turns; None where the template has nothing for them."""
        try:
            return self.ask(messages, tools) if messages else None
        except Exception:  # noqa: BLE001 - a template may refuse a system message alone
            return None

    def ask(self, messages: list[Message], tools: Any = None) -> str:
        """What a server asks with; raises whatever the template does."""
        return self._render(self.template, messages, tools, add_generation_prompt=True)[0]

    def to_check(self, learned: list[int], messages: list[Message]) -> list[int]:
        """The answers whose prompts are compared with what stands before them: the last one, if that tells of all."""
        in_a_row = any(messages[index - 1]["role"] == "assistant" for index in learned if index)
        more = any(message.get(key) for message in messages for key in ("tool_calls", *_REASONING))
        return learned[-1:] if self._is_plain and not more and not in_a_row else learned

    @functools.cached_property
    def _is_plain(self) -> bool:
        """Whether in a conversation of two questions what is learned begins where the prompt for it ends."""
        probe: list[Message] = [
            {"role": role, "content": f"{_OTHER}{number}"} for number in (1, 2) for role in ("user", "assistant")
        ]
        try:
            text, spans = self.answers(probe, None, [1, 3], [1, 3], "")
        except Exception:  # noqa: BLE001 - a template may fail in any way
            return False
        prompts = [self.prompt(probe[:index], None) for index in (1, 3)]
        return [text[:start] for start, _ in spans] == prompts

    def last_answer(self, messages: list[Message], tools: Any, prompt: str) -> tuple[str, list[Span]] | None:
        """The conversation as the template itself writes it, not TRL's version, if its last answer follows `prompt`."""
        if self.marked in (None, self.template) or messages[-1]["role"] != "assistant":
            return None
        text = self._render(self.template, messages, tools)[0]
        start, end = self._with_end(text, len(prompt), len(text))
        return (text, [(start, end)]) if text.startswith(prompt) and text.endswith(self.special, 0, end) else None

    def answers(
        self,
        messages: list[Message],
        tools: Any,
        answers: list[int],
        learned: list[int],
        place: str,
        whole: bool = False,
    ) -> tuple[str, list[Span]]:
        """The conversation as text, and the spans of its learned answers with their ends; of all of it if `whole`."""
        if whole:
            text = self.write(messages, tools)
            return text, [(0, len(text))]
        if self.marked is None:
            text = self.write(messages, tools)
            return text, list(self.turns(text, messages, tools, learned, place))
        text, blocks = self._render(self.marked, messages, tools, return_assistant_tokens_mask=True)
        if learned != answers:
            blocks = self._blocks_of(learned, answers, blocks, text, messages, tools)
        spans: list[Span] = []
        for start, end in blocks:
            if spans and spans[-1][1] == start:  # one answer in several blocks
                spans[-1] = spans[-1][0], end
            elif start < end:
                spans.append((start, end))
        return text, [self._with_end(text, start, end) for start, end in spans]

    def _blocks_of(
        self, which: list[int], answers: list[int], blocks: list[Span], text: str, messages: list[Message], tools: Any
    ) -> list[Span]:
        """The blocks of some answers: from where the text changes with an answer to where it does with the next."""
        found: list[Span] = []
        until = len(text)
        for index in reversed(answers):
            other = [*messages[:index], _with_other_words(messages[index]), *messages[index + 1 :]]
            begin = min(until, _common_length(self.write(other, tools), text))
            if index in which:
                found = [block for block in blocks if begin < block[1] <= until] + found
            until = begin
        return found

    def turns(self, text: str, messages: list[Message], tools: Any, which: list[int], place: str) -> Iterable[Span]:
        """What each of some turns adds to the text, found by rendering the conversation up to it."""
        for index in which:
            until = self.write(messages[: index + 1], tools).rstrip()
            while not text.startswith(until):
                # some templates close the whole conversation with a token, which is not in its midst
                closing = next((token for token in self.special if until.endswith(token)), None)
                if closing is None:
                    raise DataError(
                        f"{place}: the chat template renders an answer differently when turns follow it, so "
                        "its tokens can't be told apart; use loss_on: completion or all, or a template with "
                        "{% generation %} markers"
                    )
                until = until.removesuffix(closing).rstrip()
            start = self._start(messages, index, tools, until)
            if start >= len(until):
                raise Fault("answers_left_out", f"{place}: the chat template leaves out an answer")
            yield self._with_end(text, start, len(until))

    def _start(self, messages: list[Message], index: int, tools: Any, until: str) -> int:
        """Where a turn's words begin in `until`, the text that they end.

        For an answer that is after the prompt for it. Where the answer is not rendered after just that
        prompt (one that begins to think, say), or there is no prompt (the first turn, a user's turn), it
        is where the text changes with the words.
        """
        try:
            answer = messages[index]["role"] == "assistant"
            prompt = self.write(messages[:index], tools, prompt=True) if index and answer else None
        except Exception:  # noqa: BLE001 - a template may refuse a system message alone
            prompt = None
        if prompt is not None:
            start = _common_length(prompt, until)
            if not prompt[start:].strip():
                return start
        changed = {key: _OTHER for key in ("content", *_REASONING) if key in messages[index]}
        return _common_length(self.write([*messages[:index], {**messages[index], **changed}], tools), until)

    def _with_end(self, text: str, start: int, end: int) -> Span:
        """Trim white space off an answer's end, and take in an end token that follows it."""
        end = start + len(text[start:end].rstrip())
        if not text.endswith(self.special, start, end):
            gap = len(text[end:]) - len(text[end:].lstrip())
            follows = self.special_pattern.match(text, end + gap)
            if follows and follows.group() in self.closing:
                end = follows.end()
        return start, end

    def _render(self, template: str, messages: list[Message], tools: Any, **how: Any) -> tuple[str, list[Span]]:
        def render(given: list[Message]) -> tuple[str, list[Span]]:
            given = in_parts(given) if self.wants_parts else given
            texts, spans = render_jinja_template([given], tools=tools, chat_template=template, **how, **self.names)
            return str(texts[0]), spans[0] if spans else []

        try:
            return render(messages)
        except TypeError:  # some templates join the arguments of a tool call as text
            if not any(message.get("tool_calls") for message in messages):
                raise
            return render([_with_text_arguments(message) for message in messages])


def _asked(
    text: str, spans: list[Span], prompts: dict[int, str], messages: list[Message]
) -> tuple[list[Span], bool | None, str]:
    """What is learned of answers: what a model has to say after the prompts for them, which are by message.

    An empty block of reasoning that the template puts before an answer is not learned.

    Returns the spans, whether there is reasoning (False: an empty block, None: neither), and how the text before an
    answer differs from the prompt for it.
    """
    differs = ""
    found: list[bool | None] = []
    spans = list(spans)
    for index, prompt in prompts.items():
        at = len(prompt)
        number = next((number for number, (_, end) in enumerate(spans) if end > at), None)
        if not text.startswith(prompt):
            thinks = has_reasoning(messages[index]["content"]) or any(messages[index].get(key) for key in _REASONING)
            differs = differs or _difference(prompt, thinks, not any(number < index for number in prompts))
        elif number is not None:
            start, end = spans[number]
            others = (len(other) for before, other in prompts.items() if before < index)
            if start < at and not any(start <= other < at for other in others):  # else one is learned with it
                spans[number] = at, end
            elif text[at:start].strip():
                differs = differs or f"{text[at:start].strip()!r} stands before the answer, and is not learned"
    own = any(empty_reasoning(message["content"]) for message in messages if message["role"] == "assistant")
    for number, (start, end) in enumerate(spans):
        is_open = opens_reasoning(text[max(start - 40, 0) : start])
        empty = 0 if own else empty_reasoning(text, start, end, is_open)
        found.append(False if empty else is_open or has_reasoning(text[start:end]) or None)
        if empty:
            spans[number] = empty, end
            differs = differs or "it has no empty reasoning at its end; set enable_thinking in chat_template_kwargs"
    return spans, True if True in found else False if False in found else None, differs


def _difference(prompt: str, thinks: bool, is_first: bool) -> str:
    """Why a row does not begin with the prompt for its answer, as far as that tells."""
    if opens_reasoning(prompt) and not thinks:
        return "the prompt for it begins to think, and the answer does not"
    if ends_reasoning(prompt) and thinks:
        return "the prompt for it ends with an empty block of reasoning, and the answer has some; keep such rows apart"
    if is_first:
        return "the chat template writes the turns before it otherwise there"
    return "the chat template writes earlier turns otherwise there; try dataset.loss_on: completion"


def _with_text_arguments(message: Message) -> Message:
    if not message.get("tool_calls"):
        return message
    message = copy.deepcopy(message)
    for function in (call.get("function", call) for call in message["tool_calls"]):
        if not isinstance(function.get("arguments"), str):
            function["arguments"] = json.dumps(function.get("arguments"), ensure_ascii=False)
    return message


def special_tokens(tokenizer: PreTrainedTokenizerBase) -> dict[str, int]:
    """The ids of the tokens that stand for no text, longest first.

    The tokenizer's own list has only those with a name, such as eos_token; many a model ends its turns
    with one that has none.
    """
    tokens = dict(zip(tokenizer.all_special_tokens, tokenizer.all_special_ids, strict=True))
    tokens |= {token.content: id for id, token in tokenizer.added_tokens_decoder.items() if token.special}
    return dict(sorted(tokens.items(), key=lambda item: -len(item[0])))


def _with_other_words(message: Message) -> Message:
    """An answer of the same form, every word of which is another."""
    changed: Message = {key: _OTHER for key in ("content", *_REASONING) if message.get(key)}
    if message.get("tool_calls"):
        changed["tool_calls"] = calls = copy.deepcopy(message["tool_calls"])
        for call in calls:
            call.get("function", call)["name"] = _OTHER
    return {**message, **(changed or {"content": _OTHER})}


def _name(called: Any) -> str:
    """The name of a tool or of a call of it."""
    return str((called.get("function") or called).get("name")) if isinstance(called, dict) else str(called)


def _without(spans: Iterable[Span], text: str) -> list[Span]:
    """What some spans, in order, leave of a text. A space before one is of the same token as its first word."""
    bounds = [0, *(bound for start, end in spans for bound in (len(text[:start].rstrip(" ")), end)), len(text)]
    return [(start, end) for start, end in zip(bounds[::2], bounds[1::2], strict=True) if start < end]


def _words(message: Message) -> Iterable[str]:
    """Everything in a message that its row gives: its content, its reasoning, its tool calls."""
    yield from (message[key] for key in ("content", *_REASONING) if isinstance(message.get(key), str))
    if message.get("tool_calls"):
        yield json.dumps(message["tool_calls"], ensure_ascii=False)


def _shows_all(text: str, content: str) -> bool:
    """Whether a text shows all of an answer; its white space may be another."""
    return content.strip() in text or "".join(content.split()) in "".join(text.split())


def _shows(text: str, content: str) -> bool:
    """Whether a text shows a message's content, by its first word: a template may trim it or write it as JSON."""
    word = _WORD.search(content)
    return word is None or word.group() in text


def _common_length(first: str, second: str) -> int:
    """How many characters two texts begin with in common."""
    known, length = 0, min(len(first), len(second))
    if first[:length] == second[:length]:
        return length
    while known + 1 < length:  # the first `known` are the same, the first `length` are not
        middle = (known + length) // 2
        if first[known:middle] == second[known:middle]:
            known = middle
        else:
            length = middle
    return known
