"""The formats of rows: which one a row has, and rows as examples."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from typing import Any

from lorafit.errors import DataError
from lorafit.rows.cells import Cells, Fault, Format, Row, Shape, as_bool, brief, names, place_of
from lorafit.rows.turns import Message, read_tools, read_turns

COLUMNS: dict[Format, tuple[str, ...]] = {
    "preference": ("chosen", "rejected"),
    "unpaired_preference": ("label",),
    "messages": ("messages",),
    "sharegpt": ("conversations",),
    "alpaca": ("instruction", "output"),
    "prompt_completion": ("prompt", "completion"),
    "text": ("text",),
}
"""The columns that a format needs, in the order in which `auto` looks for them."""

_OWN: dict[Format, tuple[str, ...]] = {
    "preference": ("prompt", "messages", "conversations", "instruction", "input", "system", "tools"),
    "unpaired_preference": ("prompt", "completion", "messages", "conversations", "system", "tools"),
    "messages": ("system", "tools"),
    "sharegpt": ("system", "tools"),
    "alpaca": ("input", "system", "tools", "history"),
    "prompt_completion": ("tools",),
    "text": (),
}
OPTIONAL: dict[Format, tuple[str, ...]] = {name: (*columns, "train", "weight") for name, columns in _OWN.items()}
"""The columns that a format also reads, where a row has them."""

_LABELLED = ("completion", "messages", "conversations")


def detect_format(
    row: Row,
    columns: Mapping[str, str],
    template: str | Mapping[str, str] | None = None,
    key: str = "dataset.train.0",
) -> tuple[Format, str]:
    """The format of a row by its columns, and why. Raises DataError when none fits."""
    cells = Cells(row, columns, template, key)
    for name, needed in COLUMNS.items():
        found = needed
        if name == "unpaired_preference":  # a label alone may be anything
            found = (*needed, *[column for column in _LABELLED if cells.has(column)][:1])
            label = cells.get("label") if cells.has("label") else None
            is_word = isinstance(label, str) and label.strip().lower() in ("true", "false")  # CSV knows only text
            if len(found) > 1 and not isinstance(label, bool) and label in (0, 1, "0", "1"):
                raise DataError(
                    f"{row.place}: label {brief(label)} may say that the answer is good or bad, or be a "
                    f"class; name the format with {key}.format (unpaired_preference learns the good ones only)"
                )
            if len(found) == 1 or not (isinstance(label, bool) or is_word):
                continue
        if all(map(cells.has, found)):
            made = " and ".join(repr(column) for column in found if column in cells.made)
            read = " and ".join(cells.name(column) for column in found if column not in cells.made)
            return name, ", and ".join(
                [f"the rows have {read}"] * bool(read) + [f"the template makes {made}"] * bool(made)
            )
    known = "; ".join(
        f"{name}: {', '.join(needed)}" for name, needed in COLUMNS.items() if name != "unpaired_preference"
    )
    raise DataError(
        f"{row.place}: the columns {names(row.fields)} fit no format ({known}); "
        f"name the format with {key}.format and map the columns with {key}.columns"
    )


@dataclass(frozen=True)
class Example:
    """One row in a shape that can be rendered: messages, or a prompt and completion, or text.

    A plain prompt and completion (both text) are joined as they are; a text is learned whole.

    Attributes:
        completion_start: of conversations with a prompt of their own, the index in `messages` where
            the completion begins. Messages before it say `train: False`.
        rejected: of preference rows, the completion that lost; the one that won is in `messages` or
            `completion`.
        label: of unpaired preference rows, whether the completion is good.
        train: False where the row says that it is not to be learned (then it may hold nothing else).
    """

    file: str
    number: int
    messages: tuple[Message, ...] = ()
    prompt: str | None = None
    completion: str | None = None
    text: str | None = None
    tools: tuple[dict[str, Any], ...] | None = None
    completion_start: int | None = None
    rejected: tuple[Message, ...] | str | None = None
    label: bool | None = None
    train: bool = True

    @property
    def place(self) -> str:
        return place_of(self.file, self.number)


def to_example(row: Row, shape: Shape) -> Example:
    """A row in a known format.

    Raises DataError for what the format does not allow, and Fault for a row that an audit counts.
    """
    cells = Cells(row, shape.columns, shape.template, shape.key)
    learned = cells.learned()
    try:
        read = _READERS[shape.format](cells)
    except Fault:
        if learned:
            raise
        read = {}
    return Example(row.file, row.number, **{**read, "train": learned and read.get("train", True)})


def with_rejected(example: Example) -> Example:
    """A preference row with the answer that was rejected in place of the chosen one."""
    if isinstance(example.rejected, str):
        return replace(example, completion=example.rejected)
    before = example.messages[: example.completion_start]
    return replace(example, messages=(*before, *(example.rejected or ())))


_Fields = dict[str, Any]
"""Fields of an Example."""


def _from_alpaca(cells: Cells) -> _Fields:
    messages = [
        *_history(cells),
        {"role": "user", "content": _instruction(cells)},
        {"role": "assistant", "content": cells.answer("output")},
    ]
    return _conversation(cells, "history", messages)


def _instruction(cells: Cells) -> str:
    instruction, extra = cells.text("instruction"), cells.optional_text("input")
    return f"{instruction}\n\n{extra}" if extra.strip() else instruction


def _history(cells: Cells) -> list[Message]:
    pairs = cells.get("history") or []
    if not isinstance(pairs, list) or not all(isinstance(pair, list) and len(pair) == 2 for pair in pairs):
        raise cells.wrong(cells.name("history"), "must be a list of [question, answer]", pairs)
    what = f"a text in {cells.name('history')}"
    return [
        {"role": role, "content": cells.as_text(text, what) if text is not None or role == "user" else None}
        for pair in pairs
        for role, text in zip(("user", "assistant"), pair, strict=True)
    ]


def _from_messages(cells: Cells, name: str = "messages") -> _Fields:
    return _conversation(cells, name, read_turns(cells, name, cells.need(name)))


def _from_prompt_completion(cells: Cells) -> _Fields:
    kinds = {name: _kind(cells, name) for name in ("prompt", "completion")}
    if kinds["prompt"] == kinds["completion"] == "text":
        _refuse_tools(cells)
        return {"prompt": cells.text("prompt"), "completion": cells.answer("completion")}
    _same_kind(cells, kinds)
    prompt, completion = _turns(cells, "prompt"), _turns(cells, "completion")
    return _conversation(cells, "completion", completion, prompt)


def _kind(cells: Cells, name: str) -> str:
    """`text` or `turns`. Raises DataError for anything else, and Fault for an answer that is null."""
    value = cells.need(name)
    if value is None and name != "prompt":
        raise cells.no_answer(cells.name(name), "null")
    if isinstance(value, (list, dict)):
        return "turns"
    cells.as_text(value, cells.name(name))
    return "text"


def _same_kind(cells: Cells, kinds: dict[str, str]) -> None:
    if len(set(kinds.values())) > 1:
        (one, kind), (other, other_kind) = kinds.items()
        raise DataError(
            f"{cells.place}: {cells.name(one)} is {kind}, but {cells.name(other)} is {other_kind}; "
            "make both text, or both turns of a conversation"
        )


def _turns(cells: Cells, name: str) -> list[Message]:
    value = cells.need(name)
    return read_turns(cells, name, [value] if isinstance(value, dict) else value)


def _refuse_tools(cells: Cells) -> None:
    for name in ("system", "tools"):
        if cells.get(name):
            raise DataError(f"{cells.place}: {cells.name(name)} needs a conversation, but the row is plain text")


def _from_preference(cells: Cells) -> _Fields:
    kinds = {name: _kind(cells, name) for name in ("chosen", "rejected")}
    _same_kind(cells, kinds)
    kind = kinds["chosen"]
    source = next((n for n in ("prompt", "messages", "conversations", "instruction") if cells.get(n) is not None), None)
    plain_prompt = source == "prompt" and _kind(cells, "prompt") == "text"
    if plain_prompt and kind == "text":
        _refuse_tools(cells)
        chosen, rejected = cells.answer("chosen"), cells.answer("rejected")
        _differ(cells, chosen, rejected)
        return {"prompt": cells.text("prompt"), "completion": chosen, "rejected": rejected}
    if kind == "text":
        answers = [[{"role": "assistant", "content": cells.answer(name)}] for name in kinds]
    else:
        answers = [_turns(cells, name) for name in kinds]
    _differ(cells, *answers)
    if source == "instruction":
        prompt = [{"role": "user", "content": _instruction(cells)}]
    elif source is None or plain_prompt:
        prompt, answers = _shared_beginning(cells, *answers)
        if plain_prompt and cells.text("prompt").strip() != (prompt[-1]["content"] or "").strip():
            _same_kind(cells, {"prompt": "text", "chosen": "turns"})
    else:
        prompt = _turns(cells, source)
    for name, answer in zip(kinds, answers, strict=True):
        if answer and answer[0]["role"] != "assistant":
            raise cells.wrong(
                cells.name(name), "must go on after the prompt with the assistant's turn", answer[0]["role"]
            )
    lost = _conversation(cells, "rejected", answers[1], prompt)
    won = _conversation(cells, "chosen", answers[0], prompt)
    return {**won, "rejected": lost["messages"][lost["completion_start"] :]}


def _differ(cells: Cells, chosen: Any, rejected: Any) -> None:
    if chosen == rejected:
        raise DataError(f"{cells.place}: {cells.name('chosen')} and {cells.name('rejected')} are the same")


def _shared_beginning(
    cells: Cells, chosen: list[Message], rejected: list[Message]
) -> tuple[list[Message], list[list[Message]]]:
    """The prompt that both conversations begin with, and what is left of them."""
    longest = min(len(chosen), len(rejected)) - 1
    count = next((i for i in range(longest) if chosen[i] != rejected[i]), max(longest, 0))
    if not count:
        raise DataError(
            f"{cells.place}: there is no prompt: no 'prompt', 'messages', 'conversations' or 'instruction', and "
            f"{cells.name('chosen')} and {cells.name('rejected')} don't begin with the same turns"
        )
    return chosen[:count], [chosen[count:], rejected[count:]]


def _from_unpaired_preference(cells: Cells) -> _Fields:
    label = as_bool(cells.need("label"))
    if label is None:
        raise cells.wrong(cells.name("label"), "must be true or false", cells.need("label"))
    source = next((name for name in ("messages", "conversations") if cells.has(name)), None)
    if cells.has("completion") or source is None:
        return {**_from_prompt_completion(cells), "label": label}
    turns = read_turns(cells, source, cells.need(source))
    return {**_conversation(cells, source, turns[-1:], turns[:-1]), "label": label}


_READERS: dict[Format, Callable[[Cells], _Fields]] = {
    "alpaca": _from_alpaca,
    "messages": _from_messages,
    "sharegpt": lambda cells: _from_messages(cells, "conversations"),
    "prompt_completion": _from_prompt_completion,
    "text": lambda cells: {"text": cells.answer("text")},
    "preference": _from_preference,
    "unpaired_preference": _from_unpaired_preference,
}


def _conversation(cells: Cells, name: str, learned: list[Message], prompt: list[Message] | None = None) -> _Fields:
    """The fields of a conversation, of which `learned` is what the column `name` holds.

    Raises Fault if there is nothing to learn in it.
    """
    before = _system(cells, [*(prompt or []), *learned])
    if prompt is not None:
        before = [{**message, "train": False} for message in (*before, *prompt)]
    answers = [message for message in learned if message["role"] == "assistant"]
    if not answers:
        where = "" if prompt is None else f" in {cells.name(name)}"
        raise Fault(
            "no_supervised_tokens",
            f"{cells.place}: there is no assistant turn{where}, so there is nothing to learn",
        )
    for message in answers:
        said = message["content"]
        silent = not (said or "").strip() and not message.get("tool_calls") and not message.get("reasoning_content")
        if silent and message.get("train", True):
            raise cells.no_answer(f"an assistant turn in {cells.name(name)}", "null" if said is None else "empty")
    messages = tuple({**message, "content": message["content"] or ""} for message in (*before, *learned))
    return {
        "messages": messages,
        "tools": read_tools(cells),
        "completion_start": None if prompt is None else len(before),
        "train": any(message.get("train", True) for message in answers),
    }


def _system(cells: Cells, messages: list[Message]) -> list[Message]:
    """The column `system` as a message."""
    text = cells.optional_text("system")
    if not text.strip():
        return []
    if messages and messages[0]["role"] in ("system", "developer"):
        raise DataError(
            f"{cells.place}: there is {cells.name('system')}, and a system message as the first turn as well"
        )
    return [{"role": "system", "content": text}]
