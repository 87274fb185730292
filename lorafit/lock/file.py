"""A lock as a file."""

from __future__ import annotations

import hashlib
import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from lorafit.bounds import read_text
from lorafit.errors import UsageError, first_line
from lorafit.files import own_digest, write_text

VERSION = 2
_PARTS: dict[str, type | tuple[type, ...]] = {
    "recipe": dict,
    "model": dict,
    "judging": dict,
    "tokenizer": dict,
    "chat_template": (str, type(None)),
    "date": (str, type(None)),
    "data": dict,
    "versions": dict,
}


@dataclass(frozen=True)
class Lock:
    """What a lock holds, see lorafit.lock."""

    content: dict[str, Any]

    @property
    def text(self) -> str:
        whole = {"lock_version": VERSION, **self.content}
        return json.dumps(whole | {"sha256": own_digest(whole)}, indent=2, sort_keys=True, ensure_ascii=False) + "\n"

    @property
    def sha256(self) -> str:
        return hashlib.sha256(self.text.encode("utf-8", "surrogateescape")).hexdigest()

    def write(self, path: Path) -> None:
        """Write it, or nothing."""
        write_text(path, self.text)

    @staticmethod
    def read(path: Path) -> Lock:
        """Raises UsageError for a file that is missing or no lock of this version."""
        try:
            content = json.loads(read_text(path))
        except FileNotFoundError:
            raise UsageError(f"{path}: there is no lock; `lorafit lock` writes it") from None
        except (OSError, ValueError, RecursionError) as error:
            raise UsageError(f"{path}: can't be read as a lock: {first_line(error)}; write it anew") from None
        if not isinstance(content, dict) or content.get("lock_version") != VERSION:
            found = content.get("lock_version") if isinstance(content, dict) else None
            raise UsageError(f"{path}: is no lock of version {VERSION} (lock_version: {found}); write it anew")
        wrong = [name for name, kind in _PARTS.items() if not isinstance(content.get(name, ...), kind)]
        if wrong or not _is_whole(content):
            raise UsageError(f"{path}: is no lock: {', '.join(wrong) or 'a part'} can't be read; write it anew")
        if content.get("sha256") != own_digest(content):
            raise UsageError(f"{path}: was edited: its sha256 is not that of its content; write it anew")
        return Lock({name: content[name] for name in _PARTS})


def _is_whole(content: dict[str, Any]) -> bool:
    """Whether the parts hold what they should, as far as their readers count on it."""
    data, model = content["data"], content["model"]
    files = [entry.get("files") for entry in data.values() if isinstance(entry, dict)]
    held = content["recipe"].get("references", {})
    return (
        len(files) == len(data)
        and isinstance(held, dict)
        and all(isinstance(one, dict) and one.keys() == {"text", "sha256"} for one in held.values())
        and all(isinstance(part, dict | None) for part in (*files, model.get("files")))
        and all(isinstance(entry.get("commit"), str | None) for entry in (model, *data.values()))
        and all(
            isinstance(text, str) for part in ("versions", "tokenizer", "judging") for text in content[part].values()
        )
    )


def lock_path(config: Path) -> Path:
    """recipe.yaml -> recipe.yaml.lock"""
    return config.with_name(f"{config.name}.lock")
