"""axolotl's data sets: their prompt types, and a recipe's own prompts, as formats, columns and templates."""

from __future__ import annotations

import json
import re
import string
from typing import Any

from lorafit.init.peers import read
from lorafit.init.peers import transformers as shared
from lorafit.init.peers.convert import Conversion, Rules, decides, idle, lost, table
from lorafit.rows import is_local
from lorafit.rows.turns import ROLES

_ASKS = "Write a response that appropriately completes the request.\n\n"
_TASK = "Below is an instruction that describes a task"
ALPACA = (
    "{% if input | default('') %}"
    f"{_TASK}, paired with an input that provides further context. {_ASKS}"
    "### Instruction:\n{{ instruction }}\n\n### Input:\n{{ input }}\n\n### Response:\n"
    "{% else %}"
    f"{_TASK}. {_ASKS}### Instruction:\n{{{{ instruction }}}}\n\n### Response:\n"
    "{% endif %}"
)
"""The prompt of the type alpaca, as the Stanford Alpaca data set was trained with."""
_CELLS = ("system", "instruction", "input", "output")
_OWN_PROMPT = {
    "system_prompt": "",
    "field_system": "system",
    "field_instruction": "instruction",
    "field_input": "input",
    "field_output": "output",
    "format": "{instruction} {input} ",
    "no_input_format": "{instruction} ",
    "system_format": "{system}",
}
"""The keys of a prompt of the user's own, with axolotl's defaults."""
_JINJA = re.compile(r"[{}]")


def own_prompt(c: Conversion, key: str, kind: dict[str, Any]) -> dict[str, Any]:
    """A prompt of the user's own, with {instruction} and {input}, after the row's system prompt or that of all."""
    for strange in sorted({*kind} - {*_OWN_PROMPT}):
        c.note(f"{key}.{strange}", "no equivalent")
    said = {name: str(kind.get(name) or usual) for name, usual in _OWN_PROMPT.items()}
    cells = {name: f"row[{json.dumps(said[f'field_{name}'], ensure_ascii=False)}]" for name in _CELLS}

    def jinja(name: str, known: tuple[str, ...]) -> str:
        try:
            parts = [*string.Formatter().parse(said[name])]
        except ValueError as error:
            c.refuse(f"{key}.{name}", f"{error}; in axolotl's prompts, {{instruction}} and its like stand in braces")
        return "".join(_plain(before) + _cell(c, f"{key}.{name}", cells, field, known) for before, field, *_ in parts)

    system = json.dumps(said["system_prompt"], ensure_ascii=False)
    cells["system"] = f"({cells['system']} | default({system}))"
    prompt = (
        f"{{% if {cells['system']} %}}{jinja('system_format', ('system',))}{{% endif %}}"
        f"{{% if {cells['input']} | default('') %}}{jinja('format', ('instruction', 'input'))}"
        f"{{% else %}}{jinja('no_input_format', ('instruction',))}{{% endif %}}"
    )
    completion = f"{{{{ {cells['output']} }}}}"
    return {"format": "prompt_completion", "template": {"prompt": prompt, "completion": completion}}


def _plain(words: str) -> str:
    """Text as Jinja that writes it."""
    return f"{{{{ {json.dumps(words, ensure_ascii=False)} }}}}" if _JINJA.search(words) else words


def _cell(c: Conversion, key: str, cells: dict[str, str], field: str | None, known: tuple[str, ...]) -> str:
    if field is None:
        return ""
    if field not in known:
        c.refuse(key, f"{{{field}}}: axolotl fills in {', '.join(known)} here; write {{{{ and }}}} for braces")
    return f"{{{{ {cells[field]} }}}}"


_ROWS = "dataset.train"
TEMPLATES = {
    "phi_3": "phi3",
    "phi_35": "phi3_5",
    "qwen_25": "qwen2_5",
    "qwen3_5": "qwen3_5_think",
    "deepseek_v3": "deepseekv3",
    "command_a": "cohere2",
}
"""Its names for templates that TRL ships under another."""
DATASET_RULES: Rules = table(
    decides("datasets[].path datasets[].data_files datasets[].ds_type", _ROWS),
    decides("datasets[].type datasets[].conversation", _ROWS),
    decides("datasets[].split datasets[].name datasets[].revision", _ROWS),
    decides(
        "datasets[].field datasets[].field_messages datasets[].field_tools",
        _ROWS,
    ),
    decides(
        "datasets[].message_field_role datasets[].message_field_content datasets[].message_property_mappings "
        "datasets[].roles",
        _ROWS,
    ),
    decides("datasets[].roles_to_train", "dataset.loss_on"),
    decides("datasets[].chat_template datasets[].chat_template_jinja", "model.chat_template"),
    idle("datasets[].trust_remote_code datasets[].preprocess_shards", "data sets run no code"),
    lost("datasets[].field_human datasets[].field_model datasets[].field_system", "map them in the source's columns"),
    lost("datasets[].train_on_eos", "the end of every learned turn is learned", "turn"),
    lost("datasets[].shards datasets[].shards_idx", "take the first rows with max_rows"),
    lost(
        "datasets[].message_field_training", "a turn says `train: false` or `weight: 0`", "train", "training", "weight"
    ),
    lost("datasets[].message_field_training_detail", "whole turns are learned or not"),
    lost("datasets[].drop_system_message datasets[].field_thinking datasets[].template_thinking_key", ""),
    lost("datasets[].split_thinking datasets[].input_transform datasets[].input_format datasets[].temperature", ""),
)

_TEXTS = (
    *("split", "name", "revision", "conversation", "field", "field_messages", "field_tools"),
    *("message_field_role", "message_field_content", "chat_template", "chat_template_jinja"),
)
_KNOWN_ROLE_KEYS = ({"role", "from"}, {"content", "value"})


def sources(c: Conversion) -> None:
    """The training rows, and those of test_datasets."""
    if not c.plain("datasets"):
        c.refuse("datasets", "there are none, so there is nothing to train on")
    c.put("dataset.train", _all(c, "datasets"), "datasets")
    if c.plain("test_datasets"):
        c.put("dataset.validation", _all(c, "test_datasets"), "test_datasets")
    if all(source["format"] == "text" for source in c.value("dataset.train")):
        c.put("dataset.loss_on", "all", "type: completion")


def _all(c: Conversion, key: str) -> list[dict[str, Any]]:
    found: list[dict[str, Any]] = []
    c.read(key, read.data_sets, c.plain(key))
    for index, located in enumerate(c.source[key].value):
        _fates(c, key, index, located.value)
        found += _source(c, f"{key}.{index}", located.plain())
    return found


def _fates(c: Conversion, key: str, index: int, values: Any) -> None:
    """Apply the table; test_datasets have the same keys as datasets."""
    if key == "datasets":
        c.apply("datasets", index, values)
        return
    before = dict(c.fates), len(c.notes)
    c.apply("datasets", index, values)
    notes, c.notes = c.notes[before[1] :], c.notes[: before[1]]
    made = {f"{key}.{index}.{name}": c.fates[f"datasets.{index}.{name}"] for name in values}
    c.fates = before[0] | made
    for note in notes:
        path = note.key.replace("datasets.", f"{key}.", 1)
        c.note(path, note.message)


def _source(c: Conversion, key: str, entry: dict[str, Any]) -> list[dict[str, Any]]:
    for name in _TEXTS:
        if entry.get(name) is not None:
            c.read(f"{key}.{name}", read.text, entry[name])
    path = c.read(f"{key}.path", read.text, entry.get("path"))
    named = c.read(f"{key}.data_files", read.file_names, entry.get("data_files"))
    if path not in ("json", "csv", "parquet", "text") and named and not is_local(path):
        c.note(f"{key}.data_files", "files of a hub data set have no equivalent; all of the split is read")
        named = []
    shape = _shape(c, key, entry)
    return [{"path": file, **shape, **_part(c, key, entry, file)} for file in named or [path]]


def _part(c: Conversion, key: str, entry: dict[str, Any], path: str) -> dict[str, Any]:
    """The split, of which `train[:100]` is the first rows."""
    part: dict[str, Any] = {}
    split, bracket, rest = str(entry.get("split") or "").partition("[")
    if bracket:
        first = rest.removeprefix(":").removesuffix("]")
        if rest.startswith(":") and first.isdecimal():
            part["max_rows"] = int(first)
        else:
            c.note(f"{key}.split", f"[{rest}: only the first rows have an equivalent, max_rows; all are read")
    if is_local(path):
        for name in ("split", "name", "revision"):
            if entry.get(name) and f"{key}.{name}" not in {note.key for note in c.notes} and "max_rows" not in part:
                c.fates[f"{key}.{name}"] = "no effect on what is learned: a local file has no split"
        return part
    hub = {"split": split if split != "train" else "", "name": entry.get("name"), "revision": entry.get("revision")}
    return part | {name: value for name, value in hub.items() if value}


def _shape(c: Conversion, key: str, entry: dict[str, Any]) -> dict[str, Any]:
    kind = entry.get("type")
    if isinstance(kind, dict):
        return own_prompt(c, f"{key}.type", kind)
    name, _, variant = str(kind or "").partition(".")
    if name == "chat_template":
        return _conversation(c, key, entry, str(entry.get("field_messages") or "messages"))
    if name == "sharegpt":
        if entry.get("conversation"):
            _own_template(c, f"{key}.conversation", str(entry["conversation"]), "")
        return _conversation(c, key, entry, str(entry.get("field_messages") or "conversations"))
    if name == "completion":
        field = entry.get("field") or "text"
        c.note(f"{key}.type", "texts longer than sequence_len are left out here; axolotl cuts them into pieces")
        c.fates[f"{key}.type"] = _ROWS
        return {"format": "text"} | ({"columns": {"text": field}} if field != "text" else {})
    if name == "alpaca" and not variant:
        return {"format": "prompt_completion", "template": {"prompt": ALPACA, "completion": "{{ output }}"}}
    c.note(f"{key}.type", f"'{kind}': how it prompts is not known to lorafit; name the format, or write a template")
    return {"format": "auto"}


def _conversation(c: Conversion, key: str, entry: dict[str, Any], column: str) -> dict[str, Any]:
    properties = _mapping(c, key, entry, "message_property_mappings").items()
    mapped = {name: c.read(f"{key}.message_property_mappings", read.text, to) for name, to in properties}
    role = entry.get("message_field_role") or mapped.get("role") or "role"
    content = entry.get("message_field_content") or mapped.get("content") or "content"
    for name, known in zip((role, content), _KNOWN_ROLE_KEYS, strict=True):
        if name not in known:
            said = next((k for k in ("message_property_mappings", "message_field_role") if k in entry), "type")
            c.note(f"{key}.{said}", f"'{name}': turns need role and content, or from and value; rename it in the rows")
    roles = _mapping(c, key, entry, "roles").values()
    strange = {role for some in roles for role in c.read(f"{key}.roles", read.words, some)} - {*ROLES}
    if strange:
        c.note(f"{key}.roles", f"{', '.join(sorted(strange))}: no equivalent; lorafit knows {', '.join(ROLES)}")
    _roles_to_train(c, key, entry)
    if entry.get("chat_template") or entry.get("chat_template_jinja"):
        _own_template(
            c, f"{key}.chat_template", entry.get("chat_template") or "", entry.get("chat_template_jinja") or ""
        )
    own = "sharegpt" if column == "conversations" else "messages"
    needed = "conversations" if own == "sharegpt" else "messages"
    columns = {needed: column} if column != needed else {}
    if entry.get("field_tools") and entry["field_tools"] != "tools":
        columns["tools"] = entry["field_tools"]
    return {"format": own} | ({"columns": columns} if columns else {})


def _mapping(c: Conversion, key: str, entry: dict[str, Any], name: str) -> dict[str, Any]:
    value = entry.get(name)
    return {} if value is None else c.read(f"{key}.{name}", read.mapping, value)


def _roles_to_train(c: Conversion, key: str, entry: dict[str, Any]) -> None:
    if entry.get("roles_to_train") is None:
        return
    roles = c.read(f"{key}.roles_to_train", read.words, entry["roles_to_train"])
    if roles and {*roles} <= {"assistant", "gpt", "model"}:
        return
    if {"user", "human"} & {*roles} and {"assistant", "gpt", "model"} & {*roles}:
        c.put("dataset.loss_on", "all", "roles_to_train")
        if len(c.plain("datasets")) > 1:
            c.note(f"{key}.roles_to_train", "lorafit learns everything in all data sets then", "dataset.loss_on")
    else:
        c.note(f"{key}.roles_to_train", f"{', '.join(map(str, roles))}: lorafit learns the answers, or everything")


def _own_template(c: Conversion, key: str, name: str, jinja: str) -> None:
    """A template of one data set, where lorafit has one for all."""
    before, files = c.value("model.chat_template"), dict(c.beside)
    set_template(c, key, name, jinja)
    if before is not None and (c.value("model.chat_template"), c.beside) != (before, files):
        c.note(key, "lorafit has one chat template for all data sets, which is this one now", "model.chat_template")


def set_template(c: Conversion, key: str, name: str, jinja: str) -> None:
    """The chat template that a data set or the whole recipe names."""
    if jinja and name in ("", "jinja"):
        if "{" in jinja:
            shared.beside_recipe(c, "chat_template.jinja", jinja, "chat_template_jinja")
        else:
            c.put("model.chat_template", jinja, "chat_template_jinja")
    elif name.startswith("tokenizer_default_fallback_"):
        c.note(key, f"'{name}': the tokenizer's own is used; if it has none, set model.chat_template")
    elif name not in ("", "tokenizer_default"):
        shared.chat_template(c, key, name, TEMPLATES)
