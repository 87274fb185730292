"""LLaMA-Factory's data sets, by name, looked up in dataset_info.json."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from lorafit.bounds import read_text
from lorafit.init.peers.convert import Conversion
from lorafit.init.peers.dialect import count, names, text

INFO = "dataset_info.json"
_TAGS = {
    "role_tag": {"role", "from"},
    "content_tag": {"content", "value"},
    "user_tag": {"user", "human"},
    "assistant_tag": {"assistant", "gpt", "model"},
    "observation_tag": {"tool", "observation", "function", "ipython"},
    "function_tag": {"function_call"},
    "system_tag": {"system"},
}
_COLUMNS = (
    *("prompt", "query", "response", "history", "messages", "system", "tools"),
    *("images", "videos", "audios", "kto_tag"),
)
_READ = ("file_name", "hf_hub_url", "formatting", "columns", "tags", "subset", "split", "num_samples", "ranking")


def sources(c: Conversion) -> None:
    """The training rows, and those of eval_dataset."""
    folder = Path(c.get("dataset_dir", text, "data"))
    if not folder.is_absolute() and not folder.is_dir() and (c.file.parent / folder).is_dir():
        folder = c.file.parent / folder
    if not c.given("dataset"):
        c.refuse("dataset", "there is none, so there is nothing to train on")
    info = _info(c, folder)
    most = c.get("max_samples", count, 0)
    for key, target in (("dataset", "dataset.train"), ("eval_dataset", "dataset.validation")):
        if c.given(key):
            asked: list[str] = c.get(key, names, [])
            found = [_source(c, key, name, folder, info) for name in asked]
            c.put(target, [one | ({"max_rows": most} if most else {}) for one in found], key)
    if c.given("eval_dataset") and c.given("val_size"):
        c.fates["val_size"] = "no effect on what is learned: eval_dataset are the validation rows"


def _info(c: Conversion, folder: Path) -> dict[str, Any]:
    file = folder / INFO
    if not file.is_file():
        return {}
    try:
        info = json.loads(read_text(file))
    except (OSError, ValueError, RecursionError) as error:
        c.refuse("dataset_dir", f"{file} can't be read: {error}")
    if not isinstance(info, dict):
        c.refuse("dataset_dir", f"{file}: expected data sets by name")
    return info


def _source(c: Conversion, key: str, name: str, folder: Path, info: dict[str, Any]) -> dict[str, Any]:
    if str(folder) == "ONLINE":
        return {"path": name} | _shape(c, key, name, {})
    entry = info.get(name)
    if not isinstance(entry, dict):
        where = "is not in" if info else "is looked up in"
        hint = "" if info else ", which is not here"
        c.note(key, f"'{name}' {where} {folder / INFO}{hint}; check the path and the format")
        return {"path": str(folder / f"{name}.json"), "format": "auto"}
    if entry.get("ranking") or _columns(entry).get("kto_tag"):
        c.refuse(key, f"'{name}' holds preferences, and lorafit trains on answers only")
    return _place(c, key, name, folder, entry) | _shape(c, key, name, entry)


def _place(c: Conversion, key: str, name: str, folder: Path, entry: dict[str, Any]) -> dict[str, Any]:
    for strange in sorted({*entry} - {*_READ}):
        if strange not in ("ms_hub_url", "om_hub_url") or not (entry.get("hf_hub_url") or entry.get("file_name")):
            c.note(key, f"'{name}' in {INFO}: {strange}: no equivalent")
    place: dict[str, Any]
    if entry.get("hf_hub_url"):
        place = {"path": str(entry["hf_hub_url"])}
        place |= {ours: entry[theirs] for theirs, ours in (("subset", "name"), ("split", "split")) if entry.get(theirs)}
    else:
        place = {"path": str(folder / str(entry.get("file_name") or f"{name}.json"))}
    if entry.get("num_samples"):
        place["max_rows"] = entry["num_samples"]
    return place


def _shape(c: Conversion, key: str, name: str, entry: dict[str, Any]) -> dict[str, Any]:
    columns = _columns(entry)
    for strange in sorted({*columns} - {*_COLUMNS}):
        c.note(key, f"'{name}' in {INFO}: columns.{strange}: no equivalent")
    for media in ("images", "videos", "audios"):
        if columns.get(media):
            c.refuse(key, f"'{name}' has {media}, and lorafit trains on text only")
    if entry.get("formatting", "alpaca") == "sharegpt":
        return _turns(c, key, name, columns, entry.get("tags") or {})
    return _alpaca(columns)


def _columns(entry: dict[str, Any]) -> dict[str, Any]:
    columns = entry.get("columns")
    return columns if isinstance(columns, dict) else {}


def _turns(c: Conversion, key: str, name: str, columns: dict[str, str], tags: dict[str, str]) -> dict[str, Any]:
    for tag, known in _TAGS.items():
        if tag in tags and tags[tag] not in known:
            c.note(key, f"'{name}' in {INFO}: {tag}: '{tags[tag]}' is not known to lorafit; rename it in the rows")
    column = columns.get("messages", "conversations")
    kind = "messages" if column == "messages" else "sharegpt"
    needed = "messages" if kind == "messages" else "conversations"
    mapped = {} if column == needed else {needed: column}
    mapped |= {own: columns[own] for own in ("system", "tools") if columns.get(own) and columns[own] != own}
    return {"format": kind} | ({"columns": mapped} if mapped else {})


def _alpaca(columns: dict[str, str]) -> dict[str, Any]:
    """Instruction and input are joined by one line break, where lorafit's own alpaca has an empty line."""
    prompt, query = columns.get("prompt", "instruction"), columns.get("query", "input")
    mapped = {
        own: columns[theirs]
        for theirs, own in (("response", "output"), ("history", "history"), ("system", "system"), ("tools", "tools"))
        if columns.get(theirs) and columns[theirs] != own
    }
    joined = f"{{{{ row['{prompt}'] }}}}{{% if row['{query}'] | default('') %}}\n{{{{ row['{query}'] }}}}{{% endif %}}"
    shape: dict[str, Any] = {"format": "alpaca", "template": {"instruction": joined, "input": "{{ '' }}"}}
    return shape | ({"columns": mapped} if mapped else {})
