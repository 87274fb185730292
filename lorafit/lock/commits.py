"""Commits of hub models and data sets: from the client's cache where the hub can't be asked."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Literal

from lorafit.errors import DataError, ModelError, first_line
from lorafit.facts import hub_unreachable

Kind = Literal["model", "dataset"]
_COMMIT = re.compile(r"[0-9a-f]{40}")


def commit_of(name: str, revision: str | None, kind: Kind) -> str:
    """The commit that a branch, a tag or None (main) is at. Raises ModelError or DataError where it can't be told."""
    if revision is not None and _COMMIT.fullmatch(revision):
        return revision
    unreachable = hub_unreachable()
    if unreachable is None:
        return _commit_on_hub(name, revision, kind)
    reference = _cached(name, kind) / "refs" / (revision or "main")
    try:
        commit = reference.read_text(encoding="utf-8").strip()
    except OSError:
        commit = ""
    if _COMMIT.fullmatch(commit):
        return commit
    raise _error(kind)(
        f"{name}: its commit at {revision or 'main'} is not in the cache and {unreachable}; download it first, or name "
        "a commit as the revision"
    )


def _commit_on_hub(name: str, revision: str | None, kind: Kind) -> str:
    from huggingface_hub import HfApi

    try:
        info = HfApi().repo_info(name, revision=revision, repo_type=kind, timeout=10)
    except Exception as error:  # noqa: BLE001 - the client raises dozens of types
        raise _error(kind)(f"{name}: the hub does not tell its commit: {first_line(error)}") from None
    if info.sha is None:
        raise _error(kind)(f"{name}: the hub does not tell its commit")
    return str(info.sha)


def _cached(name: str, kind: Kind) -> Path:
    from huggingface_hub import constants
    from huggingface_hub.file_download import repo_folder_name

    return Path(constants.HF_HUB_CACHE) / repo_folder_name(repo_id=name, repo_type=kind)


def _error(kind: Kind) -> type[ModelError] | type[DataError]:
    return ModelError if kind == "model" else DataError
