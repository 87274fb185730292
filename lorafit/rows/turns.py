"""Turns of a conversation in the shapes that data sets have -> messages in the one that chat templates read."""

from __future__ import annotations

import json
from typing import Any

from lorafit.errors import DataError
from lorafit.rows.cells import CONTENTS, SPEAKERS, Cells

Message = dict[str, Any]

ROLES = {
    "human": "user",
    "user": "user",
    "gpt": "assistant",
    "assistant": "assistant",
    "model": "assistant",
    "bot": "assistant",
    "agent": "assistant",
    "customer": "user",
    "system": "system",
    "developer": "developer",
    "tool": "tool",
    "observation": "tool",
    "function": "tool",
    "ipython": "tool",
    "function_call": "assistant",
}
_REASONING = ("reasoning_content", "reasoning", "thinking")
_CALLS = ("tool_calls", "function_call")
_FLAGS = ("train", "training", "weight")
_TEXT_PARTS = {
    "text": ("text", "value"),
    "input_text": ("text", "value"),
    "output_text": ("text", "value"),
    "refusal": ("refusal", "text", "value"),
}
_REASONING_PARTS = dict.fromkeys(("reasoning", "thinking"), ("text", "value", "thinking", "reasoning"))
_MEDIA = ("image", "audio", "video", "file")


def read_turns(cells: Cells, name: str, value: Any) -> list[Message]:
    """The messages of a column: a list of turns. The content of one that has none is None.

    Raises DataError for what isn't a turn, and Fault for text that isn't UTF-8.
    """
    if not isinstance(value, list):
        raise cells.wrong(cells.name(name), "must be a list", value)
    messages: list[Message] = []
    for number, item in enumerate(value, 1):
        message, is_call = _read_turn(cells, item, f"turn {number} of {cells.name(name)}")
        before = messages[-1] if messages else {}
        if (
            is_call
            and before.get("role") == "assistant"
            and "tool_calls" not in before
            and not ("reasoning_content" in before and "reasoning_content" in message)
            and before.get("train", True) == message.get("train", True)
        ):
            messages[-1] = {**message, **before, "tool_calls": message["tool_calls"]}
        else:
            messages.append(message)
    return messages


def _read_turn(cells: Cells, item: Any, what: str) -> tuple[Message, bool]:
    """A turn as a message, and whether it is a tool call in a turn of its own."""
    fields = {key: field for key, field in item.items() if field is not None} if isinstance(item, dict) else {}
    said = next((fields.pop(key) for key in SPEAKERS if fields.get(key)), None)
    if said is None:
        raise _not_a_turn(cells, what, item)
    role = ROLES.get(said) if isinstance(said, str) else None
    if role is None:
        raise cells.wrong(what, f"has an unknown role (known: {', '.join(ROLES)})", said)
    content = next((fields.pop(key) for key in CONTENTS if key in fields), None)
    flags = [cells.flag(fields.pop(key, None), key, f"{key!r} in {what}") for key in _FLAGS]
    message: Message = {**fields, "role": role, "content": content}
    if role == "assistant":
        message = _assistant(cells, message, said == "function_call", what)
    elif any(message.get(key) for key in _CALLS):
        raise DataError(f"{cells.place}: {what} calls tools, but is not the assistant's")
    elif content is None:
        raise _not_a_turn(cells, what, item)
    elif role == "tool" and _is_data(content):
        message["content"] = json.dumps(content, ensure_ascii=False, default=str)
    else:
        message["content"], reasoning, calls = _content(cells, content, what)
        if reasoning or calls:
            raise DataError(f"{cells.place}: {what} holds reasoning or tool calls, but is not the assistant's")
    cells.check_utf8(message, what)
    if not all(flags):
        message["train"] = False
    return message, said == "function_call"


def _not_a_turn(cells: Cells, what: str, item: Any) -> DataError:
    return cells.wrong(what, "needs 'role' and 'content' (or 'from' and 'value')", item)


def _assistant(cells: Cells, message: Message, is_call: bool, what: str) -> Message:
    """A message with its reasoning and tool calls under the names that chat templates know."""
    content = message["content"]
    calls = message.pop("tool_calls", [])
    legacy = message.pop("function_call", None)
    thoughts = [cells.as_text(message.pop(key), f"{key!r} in {what}") for key in _REASONING if key in message]
    raw_calls = [*_as_list(cells, calls, what), *([] if legacy is None else [legacy])]
    if is_call:
        raw_calls += _as_list(cells, content, what)
        content = None
    elif content is not None:
        content, reasoning, part_calls = _content(cells, content, what)
        thoughts += reasoning
        raw_calls += part_calls
    message["content"] = content
    thoughts = [thought for thought in dict.fromkeys(thoughts) if thought.strip()]
    if len(thoughts) > 1:
        raise cells.wrong(what, "has reasoning more than once", thoughts)
    if thoughts:
        message["reasoning_content"] = thoughts[0]
    if raw_calls:
        message["tool_calls"] = [_tool_call(cells, call, what) for call in raw_calls]
    elif is_call:
        raise cells.wrong(what, "must call a tool", message)
    return message


def _as_list(cells: Cells, value: Any, what: str) -> list[Any]:
    """One tool call or a list of them, or either as JSON text."""
    if isinstance(value, str):
        value = cells.json(value, f"the tool call in {what}")
    return value if isinstance(value, list) else [value]


def _tool_call(cells: Cells, call: Any, what: str) -> dict[str, Any]:
    if isinstance(call, str):
        call = cells.json(call, f"the tool call in {what}")
    function = call.get("function", call) if isinstance(call, dict) else None
    name = function.get("name") if isinstance(function, dict) else None
    if not isinstance(function, dict) or not isinstance(name, str) or not name:
        raise cells.wrong(f"a tool call in {what}", "needs 'name' and 'arguments'", call)
    arguments = function.get("arguments")
    if arguments is None and not set(function) <= {"name", "arguments", "id", "type"}:
        raise cells.wrong(f"a tool call in {what}", "needs 'name' and 'arguments'", call)
    parsed: Any = {} if arguments is None else arguments
    if isinstance(parsed, str):
        try:
            parsed = json.loads(parsed)
        except (ValueError, RecursionError):
            parsed = None
    if not isinstance(parsed, dict):
        raise cells.wrong(f"the arguments of {name!r} in {what}", "must be a JSON object", arguments)
    id = {"id": call["id"]} if call.get("id") is not None else {}
    return {**id, "type": "function", "function": {"name": name, "arguments": parsed}}


def _content(cells: Cells, content: Any, what: str) -> tuple[str, list[str], list[Any]]:
    """Text, reasoning and tool calls of a content: text, or a list of parts."""
    if not isinstance(content, list):
        return cells.as_text(content, f"the content of {what}"), [], []
    text, reasoning, calls = [], [], []
    for part in content:
        kind = part.get("type") if isinstance(part, dict) else None
        if not isinstance(part, dict) or not isinstance(kind, str):
            raise cells.wrong(f"a part of {what}", "must have a 'type'", part)
        if kind == "tool_call":
            calls += _as_list(cells, part.get("value"), what)
        elif kind in _REASONING_PARTS:
            reasoning.append(_part_text(cells, part, _REASONING_PARTS[kind], what))
        elif kind in _TEXT_PARTS:
            text.append(_part_text(cells, part, _TEXT_PARTS[kind], what))
        else:
            raise cells.wrong(f"a part of {what}", "is not text, and lorafit trains on text", kind)
    return "".join(text), ["".join(reasoning)] if reasoning else [], calls


def _part_text(cells: Cells, part: dict[str, Any], keys: tuple[str, ...], what: str) -> str:
    found = next((part[key] for key in keys if part.get(key) is not None), None)
    if found is None:
        raise cells.wrong(f"a part of {what}", f"has no {keys[0]!r}", part)
    return cells.as_text(found, f"a part of {what}")


def _is_data(content: Any) -> bool:
    """Whether a tool's answer is plain data rather than text or parts."""

    def is_part(item: Any) -> bool:
        kind = item.get("type") if isinstance(item, dict) else None
        return isinstance(kind, str) and (
            kind in (*_TEXT_PARTS, *_REASONING_PARTS) or any(medium in kind for medium in _MEDIA)
        )

    return isinstance(content, dict) or (isinstance(content, list) and not (content and all(map(is_part, content))))


def read_tools(cells: Cells) -> tuple[dict[str, Any], ...] | None:
    """The row's `tools`, each as chat templates know it; None without any."""
    what = cells.name("tools")
    tools = cells.get("tools")
    if isinstance(tools, str):
        tools = cells.json(tools, what) if tools.strip() else None
    if tools is None:
        return None
    if not isinstance(tools, list):
        raise cells.wrong(what, "must be a list", tools)
    cells.check_utf8(tools, what)
    return tuple(_tool(cells, tool, what) for tool in tools) or None


def _tool(cells: Cells, tool: Any, what: str) -> dict[str, Any]:
    if isinstance(tool, dict) and isinstance(tool.get("function"), dict):
        return {"type": "function", **tool}
    if isinstance(tool, dict) and isinstance(tool.get("name"), str):
        return {"type": "function", "function": {key: item for key, item in tool.items() if key != "type"}}
    raise cells.wrong(f"a tool in {what}", "needs a 'name'", tool)
