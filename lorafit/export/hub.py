"""What a run made, as a model repository on a hub: which files, what must not be in them, the upload, and the proof."""

from __future__ import annotations

import contextlib
import hashlib
import json
import os
import re
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from lorafit.bounds import read_json
from lorafit.errors import ModelError, UsageError
from lorafit.files import CARD, SEAL, check_own, file_digest, read_seal
from lorafit.options import PushOptions
from lorafit.plan import Plan
from lorafit.progress import stage
from lorafit.run.directory import RunDir, located, open_run
from lorafit.text import first_line
from lorafit.written import is_secret

CONFIG = "adapter_config.json"
_OWN = (SEAL, "merge_report.json", "merge_report.md")
"""Records of this machine, for lorafit alone."""
_TOKEN = re.compile(r"\b(hf_[A-Za-z0-9]{20,}|sk-[A-Za-z0-9_-]{20,}|gh[pousr]_[A-Za-z0-9]{30,}|AKIA[0-9A-Z]{16})\b")
"""What tokens of well-known services look like."""
MOST_TEXT = 4 << 20
"""Size of a text file above which it is a vocabulary, in which anything may look like a token."""
_HUB_ID = re.compile(r"[A-Za-z0-9][\w.-]*/[A-Za-z0-9][\w.-]*")


@dataclass(frozen=True)
class Part:
    """A file to be pushed.

    Attributes:
        content: what is pushed in place of the file, where that differs.
    """

    name: str
    file: Path
    content: bytes | None = None

    @property
    def bytes(self) -> int:
        return self.file.stat().st_size if self.content is None else len(self.content)

    def digests(self) -> tuple[str, str]:
        """SHA-256, and the name that git gives it: a hub knows large files by the one, small ones by the other."""
        if self.content is None and self.file.stat().st_size > MOST_TEXT:
            return file_digest(self.file), ""
        data = self.file.read_bytes() if self.content is None else self.content
        git = hashlib.sha1(b"blob %d\0" % len(data) + data, usedforsecurity=False).hexdigest()
        return hashlib.sha256(data).hexdigest(), git


def push(options: PushOptions) -> dict[str, Any]:
    """Upload what a run made, in one commit, and see that what is there is what is here.

    Returns what was, or would be, done. Raises UsageError, ModelError, DriftError for files that are not as they were
    written, and what a run that is not finished raises.
    """
    with open_run(options.run) as (run, plan):
        folder = _folder(run, plan, options)
        parts = tuple(_parts(folder, run, plan, options))
        for part in parts:
            _refuse_private(part, run)
        done: dict[str, Any] = {
            "repository": options.to,
            "private": not options.public,
            "what": folder.name,
            "files": [{"path": part.name, "bytes": part.bytes} for part in parts],
        }
        return done | ({"pushed": False} if options.dry_run else _upload(parts, options))


def _folder(run: RunDir, plan: Plan, options: PushOptions) -> Path:
    """The folder that is pushed, as it was written and proved."""
    if not options.merged:
        assert run.result is not None  # it was opened as a finished run
        return run.result
    if not run.merged.is_dir():
        raise UsageError(f"{run.path}: is not merged; `lorafit merge {run.path}` does that")
    check_own(run.merged, "merge again")
    report = read_json(run.merged / "merge_report.json")
    if report.get("verification", {}).get("level") in (None, "none"):
        raise UsageError(f"{run.merged}: was merged without a proof (--verify none); merge again, with --overwrite")
    return run.merged


def _parts(folder: Path, run: RunDir, plan: Plan, options: PushOptions) -> Iterator[Part]:
    """The files that the folder's seal lists, the card and the adapter's configuration as a hub's readers need them."""
    seal = read_seal(folder)
    assert seal is not None
    base = _base(folder, plan, options)
    for name in sorted(seal.names):
        file = folder / name
        if name in _OWN or not file.is_file():
            continue
        if name == CONFIG:
            config = read_json(file) | {"base_model_name_or_path": base}
            yield Part(name, file, json.dumps(config, indent=2, sort_keys=True).encode())
        elif name == CARD:
            yield Part(name, file, _card(file.read_text(encoding="utf-8"), base, plan, options).encode())
        else:
            yield Part(name, file)


def _base(folder: Path, plan: Plan, options: PushOptions) -> str:
    """What the base is called on a hub. Raises UsageError where only a person knows, and PEFT has to."""
    named = plan.model.name_or_path
    if options.base is not None:
        if not _HUB_ID.fullmatch(options.base):
            raise UsageError(f"--base {options.base}: is no id on a hub, such as meta-llama/Llama-3.1-8B")
        return options.base
    if plan.model.kind in ("hub", "bundled") and _HUB_ID.fullmatch(named):
        return named
    if (folder / CONFIG).is_file():
        raise UsageError(
            f"{folder / CONFIG}: names the base {plan.as_written().model.name_or_path}, which is here alone, "
            "and PEFT loads it by that name; say what it is called on the hub with --base ORG/NAME"
        )
    return Path(named).name


def _card(text: str, base: str, plan: Plan, options: PushOptions) -> str:
    """A model card for others: the base and the adapters before it by their names, and how to load it from there."""
    for local in {plan.as_written().model.name_or_path, plan.model.name_or_path} - {base}:
        text = text.replace(f"`{local}`", f"`{base}`")
    for before in plan.as_written().chain:
        if not _HUB_ID.fullmatch(before.path) or located(before.path).exists():
            text = text.replace(f"`{before.path}`", f"`{_short(before.path)}`")
    if "base_model:" not in text and options.base:
        text = text.replace("---\n", f"---\nbase_model: {base}\n", 1)
    return text.replace('from_pretrained(".")', f'from_pretrained("{options.to}")')


def _short(path: str) -> str:
    """The run's name in the path of what it left."""
    parts = [part for part in Path(path).parts if part not in ("adapter", "model", "merged")]
    return parts[-1] if parts else path


def _refuse_private(part: Part, run: RunDir) -> None:
    """Raises ModelError for a text that holds a secret, or a place on this machine."""
    if part.file.suffix == ".safetensors" or (part.content is None and part.file.stat().st_size > MOST_TEXT):
        return
    data = part.file.read_bytes() if part.content is None else part.content
    text = data.decode("utf-8", "replace")
    secrets = ((name, value) for name, value in os.environ.items() if is_secret(name) and len(value) > 7)
    secret = next((name for name, value in secrets if value in text), None)
    if secret is not None:
        raise ModelError(f"{part.file}: holds the value of the environment's {secret}, so it is not pushed")
    if _TOKEN.search(text):
        raise ModelError(f"{part.file}: holds what looks like a token, so it is not pushed")
    for place in {str(Path.cwd()), str(run.path.resolve()), os.path.expanduser("~")} - {"/", "/root"}:
        if place in text:
            raise ModelError(f"{part.file}: holds {place}, a place on this machine, so it is not pushed")


def _upload(parts: tuple[Part, ...], options: PushOptions) -> dict[str, Any]:
    from huggingface_hub import CommitOperationAdd, HfApi, constants

    repository, revision = options.to, options.revision
    if constants.HF_HUB_OFFLINE:
        raise ModelError(f"{repository}: can't be pushed offline; unset HF_HUB_OFFLINE")
    api = HfApi()
    operations = [CommitOperationAdd(part.name, part.content or str(part.file)) for part in parts]
    with explained(repository):
        address = api.create_repo(repository, repo_type="model", private=not options.public, exist_ok=True)
        found = api.model_info(repository)
        if not found.private and not options.public:
            raise UsageError(f"{repository}: is there and public; push to another name, or say --public")
        if revision is not None:
            api.create_branch(repository, branch=revision, exist_ok=True)
        with stage(f"uploading to {repository}"):
            commit = api.create_commit(
                repository,
                operations,
                commit_message=options.message or f"{parts[0].file.parent.name} of lorafit",
                revision=revision,
            )
        with stage("comparing what is there with what is here"):
            names = [part.name for part in parts]
            there = {one.path: one for one in api.get_paths_info(repository, names, revision=commit.oid)}
            others = sorted(name for name in api.list_repo_files(repository, revision=commit.oid) if name not in there)
    wrong = [part.name for part in parts if not _is_there(part, there.get(part.name))]
    if wrong:
        raise ModelError(f"{repository}: {', '.join(wrong)} are not there as they are here; push again")
    return {"pushed": True, "private": bool(found.private), "url": str(address), "commit": commit.oid, "left": others}


def _is_there(part: Part, found: Any) -> bool:
    if found is None or found.size != part.bytes:
        return False
    sha256, git = part.digests()
    return bool(found.lfs.sha256 == sha256 if found.lfs else found.blob_id == git)


@contextlib.contextmanager
def explained(repository: str) -> Iterator[None]:
    """Turn what the hub's client raises into one line without a token. Raises ModelError."""
    from huggingface_hub.errors import HfHubHTTPError, LocalTokenNotFoundError, OfflineModeIsEnabled

    try:
        yield
    except LocalTokenNotFoundError:
        raise ModelError(f"{repository}: not logged in to the hub; run: hf auth login") from None
    except OfflineModeIsEnabled:
        raise ModelError(f"{repository}: can't be pushed offline; unset HF_HUB_OFFLINE") from None
    except HfHubHTTPError as error:
        status = error.response.status_code if error.response is not None else None
        raise ModelError(f"{repository}: {_REFUSALS.get(status) or f'the hub refused: {_told(error)}'}") from None
    except Exception as error:
        if not isinstance(error, OSError) and not type(error).__module__.startswith(("httpx", "httpcore")):
            raise
        raise ModelError(f"{repository}: the hub can't be reached: {_told(error)}; try again when online") from None


_REFUSALS = {
    401: "the hub doesn't accept the login; run: hf auth login, with a token that may write",
    403: "the login may not write there; use a token with write access, or another owner",
    409: "another push was at it at the same time; push again",
    404: "the owner doesn't exist, or the login can't see it",
}
"""What a hub's answers mean, by HTTP status."""


def _told(error: Exception) -> str:
    """The first line of an error without anything that looks like a token."""
    return " ".join("hf_…" if "hf_" in word else word for word in first_line(error).split())
