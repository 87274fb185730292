"""`lorafit push`: what a run made, on a hub: which files, what must not be in them, the upload, and the proof."""

from __future__ import annotations

import contextlib
import hashlib
import json
import os
import re
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, TypeGuard

from lorafit.bounds import read_json
from lorafit.errors import ModelError, UsageError
from lorafit.facts.fingerprint import git_digest
from lorafit.files import CARD, SEAL, file_digest, read_seal
from lorafit.options import PushOptions
from lorafit.progress import stage
from lorafit.recipe.start import CONFIG
from lorafit.run.directory import RunDir, located, open_run, proved_merge
from lorafit.run.summary import load_adapter
from lorafit.text import first_line
from lorafit.written import References, as_written, hidden

_OWN = (SEAL, "merge_report.json", "merge_report.md")
"""Records of this machine, for lorafit alone."""
_TOKEN = re.compile(r"\b(hf_[A-Za-z0-9]{20,}|sk-[A-Za-z0-9_-]{20,}|gh[pousr]_[A-Za-z0-9]{30,}|AKIA[0-9A-Z]{16})\b")
"""What tokens of well-known services look like."""
MOST_TEXT = 4 << 20
"""Size of a text file above which it is a vocabulary, in which anything may look like a token."""
_VOCABULARIES = ("tokenizer.json", "vocab.json", "merges.txt", "vocab.txt")
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

    @property
    def text(self) -> str | None:
        """The content; None of weights and large vocabularies."""
        if self.file.suffix == ".safetensors" or self.bytes > MOST_TEXT:
            return None
        return (self.content or self.file.read_bytes()).decode("utf-8", "replace")

    def is_there(self, found: Any) -> bool:
        """Whether the hub has it: large files by their SHA-256, small ones by the name that git gives them."""
        if found is None or found.size != self.bytes:
            return False
        if found.lfs:
            sha256 = file_digest(self.file) if self.content is None else hashlib.sha256(self.content).hexdigest()
            return bool(found.lfs.sha256 == sha256)
        data = self.file.read_bytes() if self.content is None else self.content
        return bool(found.blob_id == git_digest(data))


@dataclass(frozen=True)
class Source:
    """What is pushed, and what others can't know of it.

    Attributes:
        base: the base as the folder's files name it: by `~` and `${NAME}`, where the recipe did.
        is_public_name: whether others find the base by that name.
        before: the adapters that training went on from, as the card names them.
        places: of this machine, which no text may name.
    """

    folder: Path
    base: str
    is_public_name: bool
    before: tuple[str, ...]
    references: References = field(default_factory=dict)
    places: tuple[str, ...] = ()


def push(options: PushOptions) -> dict[str, Any]:
    """Upload what a run made, in one commit, and see that what is there is what is here.

    Returns what was, or would be, done. Raises UsageError, ModelError, DriftError for files that are not as they were
    written, and what a run that is not finished raises.
    """
    with _opened(options) as source:
        parts = tuple(_parts(source, options))
        for part in parts:
            _refuse_private(part, source, options)
        done: dict[str, Any] = {
            "repository": options.to,
            "private": not options.public,
            "what": source.folder.name,
            "files": [{"path": part.name, "bytes": part.bytes} for part in parts],
            "searched": [part.name for part in parts if part.text is not None],
        }
        return done | ({"pushed": False} if options.dry_run else _upload(parts, options))


@contextlib.contextmanager
def _opened(options: PushOptions) -> Iterator[Source]:
    """A run's result or merged model, or a merged model wherever it was written; all as it was written and proved."""
    path = located(options.run)
    seal, above = read_seal(path), RunDir(path.parent)
    is_merged = seal is not None and seal.kind == "merge"
    if is_merged and (above.merged != path or not above.is_run):
        report = proved_merge(path)
        base = str(report["base"]["name"])
        is_public = _HUB_ID.fullmatch(base) is not None and not located(base).exists()
        before = tuple(str(one["path"]) for one in report.get("chain", ()))
        yield Source(path, base, is_public, before, places=(str(path.resolve()),))
        return
    with open_run(above.path if is_merged else options.run) as (run, plan):
        written = plan.as_written()
        base, named = written.model.name_or_path, plan.model.name_or_path
        is_public = plan.model.kind in ("hub", "bundled") and _HUB_ID.fullmatch(base) is not None
        before = tuple(one.path for one in written.chain)
        folder = run.merged if is_merged or options.merged else run.result
        assert folder is not None  # it was opened as a finished run
        if folder == run.merged:
            proved_merge(folder, run.adapter)
        # a place that is written as any word, such as `models`, is none that can be found in a text
        local = () if is_public else tuple(name for name in (base, named) if name.startswith(("/", "~", ".")))
        yield Source(folder, base, is_public, before, plan.references, (str(run.path.resolve()), *local))


def _parts(source: Source, options: PushOptions) -> Iterator[Part]:
    """The files that the folder's seal lists, the card and the adapter's configuration as a hub's readers need them."""
    seal = read_seal(source.folder)
    assert seal is not None
    base = _base(source, options)
    for name in sorted(seal.names):
        file = source.folder / name
        if name in _OWN or not file.is_file():
            continue
        if name == CONFIG:
            config = read_json(file) | {"base_model_name_or_path": base}
            yield Part(name, file, json.dumps(config, indent=2, sort_keys=True).encode())
        elif name == CARD:
            text = file.read_text(encoding="utf-8", errors="replace")
            yield Part(name, file, _card(text, base, source, options).encode())
        else:
            yield Part(name, file)


def _base(source: Source, options: PushOptions) -> str:
    """What the base is called on a hub. Raises UsageError where only a person knows, and PEFT has to."""
    if options.base is not None:
        return options.base
    if source.is_public_name:
        return source.base
    if (source.folder / CONFIG).is_file():
        raise UsageError(
            f"{source.folder / CONFIG}: names the base {source.base}, which others can't find by that, and PEFT loads "
            "it by that name; say what it is called on the hub with --base ORG/NAME"
        )
    return Path(source.base).name


def _card(text: str, base: str, source: Source, options: PushOptions) -> str:
    """A model card for others: the base and the adapters before it by their names, and how to load it from there."""
    text = text.replace(load_adapter(source.base), load_adapter(base)).replace(f"`{source.base}`", f"`{base}`")
    for before in source.before:
        if not _HUB_ID.fullmatch(before) or located(before).exists():
            text = text.replace(f"`{before}`", f"`{_short(before)}`")
    if options.base and text.startswith("---\n"):
        text = re.sub(r"(?m)^base_model: .*\n", "", text, count=1).replace("---\n", f"---\nbase_model: {base}\n", 1)
    where = f'"{options.to}"' + (f", revision={json.dumps(options.revision)}" if options.revision else "")
    return text.replace('from_pretrained(".")', f"from_pretrained({where})")


def _short(path: str) -> str:
    """The run's name in the path of what it left."""
    parts = [part for part in Path(path).parts if part not in ("adapter", "model", "merged")]
    return parts[-1] if parts else path


def _refuse_private(part: Part, source: Source, options: PushOptions) -> None:
    """Raises ModelError for a text that holds a secret, or a place on this machine."""
    if part.text is None:
        return
    text = part.text.replace(options.base, "") if options.base else part.text  # which is asked for by name
    searched: list[tuple[str, Callable[[str], str]]] = [
        ("the value of a variable that holds a secret, or a password", hidden),
        ("what looks like a token", lambda t: _TOKEN.sub("…", t)),
    ]
    if part.name not in _VOCABULARIES:  # a vocabulary is the base's, and may hold anything as a word
        places = [place for place in (os.getcwd(), *source.places) if place not in ("/", ".", "~")]
        place = re.compile("|".join(rf"{re.escape(place)}(?![\w-])" for place in places))
        searched += [
            ("a place on this machine", lambda t: place.sub("…", t)),
            ("the home folder, or what a recipe's ${NAME} stands for", lambda t: as_written(t, source.references)),
        ]
    for what, search in searched:
        if (other := search(text)) != text:
            pairs = zip(text.splitlines(), other.splitlines(), strict=False)
            line = next((number for number, (a, b) in enumerate(pairs, 1) if a != b), 1)
            raise ModelError(f"{part.file}:{line}: holds {what}; nothing is pushed until that is gone")


def _upload(parts: tuple[Part, ...], options: PushOptions) -> dict[str, Any]:
    from huggingface_hub import CommitOperationAdd, HfApi, constants
    from huggingface_hub.utils.logging import get_logger
    from huggingface_hub.utils.tqdm import disable_progress_bars

    repository, revision = options.to, options.revision
    if constants.HF_HUB_OFFLINE:
        raise ModelError(f"{repository}: can't be pushed offline; unset HF_HUB_OFFLINE")
    disable_progress_bars()
    get_logger().setLevel("ERROR")  # what it says of another try has the signature of the upload's address in it
    api = HfApi()
    operations = [
        CommitOperationAdd(part.name, str(part.file) if part.content is None else part.content) for part in parts
    ]
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
        names = {part.name for part in parts}
        there = {one.path: one for one in api.get_paths_info(repository, [*names], revision=commit.oid)}
        others = sorted({*api.list_repo_files(repository, revision=commit.oid)} - names - {".gitattributes"})
    with stage("comparing what is there with what is here"):
        wrong = [part.name for part in parts if not part.is_there(there.get(part.name))]
    if wrong:
        raise ModelError(f"{repository}: {', '.join(wrong)} are not there as they are here; push again")
    return {"pushed": True, "private": bool(found.private), "url": str(address), "commit": commit.oid, "left": others}


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
    except UnicodeEncodeError:  # of a header
        raise ModelError(f"{repository}: the login is no token; run: hf auth login, or look at HF_TOKEN") from None
    except Exception as error:
        # The client raises a RuntimeError from what an upload met, and a ValueError from a card that is refused.
        met = error if _is_of_network(error) else error.__cause__
        if not _is_of_network(met):
            raise
        if isinstance(error, ValueError) and met is not error:
            said = " ".join(str(error).split())
            raise ModelError(f"{repository}: nothing was pushed: {said}; put {CARD} right") from None
        if not isinstance(met, HfHubHTTPError):
            raise ModelError(f"{repository}: the hub can't be reached: {_told(met)}; try again when online") from None
        status = met.response.status_code if met.response is not None else None
        raise ModelError(f"{repository}: {_REFUSALS.get(status) or f'the hub refused: {_told(met)}'}") from None


def _is_of_network(error: BaseException | None) -> TypeGuard[Exception]:
    of_client = type(error).__module__.startswith(("httpx", "httpcore"))
    return of_client or (isinstance(error, OSError) and error.filename is None)  # else it is a file's, here


_REFUSALS = {
    401: "the hub doesn't accept the login; run: hf auth login, with a token that may write",
    403: "the login may not write there; use a token with write access, or another owner",
    409: "another push was at it at the same time; push again",
    404: "the owner doesn't exist, or the login can't see it",
}
"""What a hub's answers mean, by HTTP status."""


def _told(error: Exception) -> str:
    """The first line of an error without anything that looks like a token, or an address that is signed."""
    return " ".join("…" if re.search("hf_|[?&]", word) else word for word in first_line(error).split())
