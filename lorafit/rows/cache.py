"""Where tokenized data is kept between runs: folders named by the hash of everything that shaped them.

    <cache>/lorafit/rows/<key>/   one source, tokenized: rows.arrow and audit.json
    <cache>/lorafit/sets/<key>/   what a recipe makes of its sources: audit.json, the order, the packs
    <cache>/lorafit/digests/      of weight files that were read whole, by their place, size, times and inode
    <cache>/lorafit/headers/      of a hub model's weights that are not here, by its commit (see facts/hub.py)

Changing a byte of a data file, the tokenizer, the template, a setting or lorafit's own code gives another key. Entries
are whole or absent, and compared with their seals when they are read; one process makes an entry while others wait, and
the least recently used entries make way for new ones.
"""

from __future__ import annotations

import atexit
import contextlib
import dataclasses
import functools
import hashlib
import itertools
import json
import os
import shutil
import tempfile
import time
from collections.abc import Callable, Iterator
from importlib.metadata import version
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeVar

from lorafit import files
from lorafit.bounds import known_json
from lorafit.errors import DoesNotFitError, UsageError
from lorafit.rows.audit import Audit

if TYPE_CHECKING:
    from lorafit.plan.values import DataPlan, SourcePlan

T = TypeVar("T")
KINDS = ("rows", "sets")
LIMIT_BYTES = 20 << 30
"""What all entries may take together."""
SETTLED_NS = 2_000_000_000
"""How long a file must have been left alone for its digests to be remembered."""
_PACKAGES = ("lorafit", "tokenizers", "transformers", "trl", "jinja2")
_CODE = ("rows", "engine/data", "engine/methods", "bounds.py", "facts/template.py", "plan/values.py")
_SHAPING = (
    *("loss_on", "max_length", "min_length", "excess_length_strategy", "chat_template", "chat_template_kwargs"),
    *("date", "tokenizer_sha256", "vocab_size", "trust_remote_code", "method"),
)


def rows_key(plan: DataPlan, source: SourcePlan) -> str | None:
    """The name of a tokenized source's entry; None where what it is made of is not known."""
    if source.sha256 is None or plan.tokenizer_sha256 is None:
        return None
    shaping = {name: getattr(plan, name) for name in _SHAPING}
    own = dataclasses.asdict(source)
    for name in ("rows", "weight", "key"):
        del own[name]
    return _hash([own, shaping, code_version()])


def set_key(plan: DataPlan) -> str | None:
    """The name of the entry of all sources together; None where a source has none."""
    sources = [(rows_key(plan, source), source.weight) for source in plan.train]
    held_out = [(rows_key(plan, source), source.weight) for source in plan.validation]
    if any(key is None for key, _ in (*sources, *held_out)):
        return None
    return _hash([sources, held_out, plan.validation_fraction, plan.packing, plan.shuffle, plan.seed])


@functools.cache
def code_version() -> str:
    """A hash of what turns rows into tokens: lorafit's own modules, and the versions of the libraries."""
    package = Path(__file__).parents[1]
    code = [
        file for name in _CODE for file in (sorted((package / name).glob("*.py")) or [package / name]) if file.is_file()
    ]
    return _hash([[hashlib.sha256(file.read_bytes()).hexdigest() for file in code], [version(p) for p in _PACKAGES]])


def _hash(value: Any) -> str:
    return hashlib.sha256(json.dumps(value, sort_keys=True).encode()).hexdigest()[:32]


_own: list[Path] = []


@contextlib.contextmanager
def private() -> Iterator[None]:
    """An empty cache of this process's own until the block ends: nothing is taken from an earlier run."""
    with tempfile.TemporaryDirectory(prefix="lorafit-cache-") as folder:
        _own.append(Path(folder))
        try:
            yield
        finally:
            _own.pop()


def cache_folder() -> Path:
    """$XDG_CACHE_HOME/lorafit (if absolute), or ~/.cache/lorafit; a temporary folder where that can't be written."""
    return _own[-1] if _own else _shared_folder()


@functools.cache
def _shared_folder() -> Path:
    asked = os.environ.get("XDG_CACHE_HOME", "")
    try:
        root = (Path(asked) if os.path.isabs(asked) else Path.home() / ".cache") / "lorafit"
        for kind in KINDS:
            (root / kind).mkdir(parents=True, exist_ok=True)
            with tempfile.TemporaryFile(dir=root / kind):
                pass
        return root
    except (OSError, RuntimeError):  # there may be no home
        temporary = tempfile.mkdtemp(prefix="lorafit-")
        atexit.register(shutil.rmtree, temporary, ignore_errors=True)
        return Path(temporary)


def entry(kind: str, key: str) -> Path:
    """The folder of an entry, there or not. What lorafit did not write there is left alone."""
    places = (cache_folder() / kind / f"{key}{f'-{number}' * bool(number)}" for number in itertools.count())
    return next(filter(files.is_free, places))


def known_audit(plan: DataPlan) -> dict[str, Any] | None:
    """The audit of exactly this data, if it was made before."""
    key = set_key(plan)
    if key is None:
        return None
    folder = entry("sets", key)
    try:
        if not files.is_intact(folder, "audit.json"):
            return None
        raw = json.loads((folder / "audit.json").read_text(encoding="utf-8"))
        return Audit.from_dict(raw).as_dict()
    except Exception:  # noqa: BLE001 - a damaged entry may fail in any way
        return None


def kept(folder: Path, make: Callable[[Path], None], read: Callable[[Path], T]) -> T:
    """What `read` gives for an entry, which is made first if it is not there or damaged.

    Args:
        make: fills a new folder.
        read: opens a whole one; one where this fails is of another version and made anew.
    """
    with in_use(folder):
        found, kind = files.read_seal(folder), f"cache {folder.name}"
        if found is not None and found.kind == kind and not files.damage(folder):
            with contextlib.suppress(Exception):
                return read(folder)
        if found is not None and found.kind != kind:
            files.discard(folder)  # another entry, under this one's name
        with files.staged(folder, kind) as partial:
            make(partial)
        return read(folder)


def remembered(file: Path, what: str, make: Callable[[Path], T]) -> T:
    """What was found by reading a whole file, as JSON has it, until its size, its times or its inode change."""
    real = file.resolve()
    before = _identity(real)
    place = cache_folder() / "digests" / f"{_hash(str(real))}.json"
    known = known_json(place) or {}
    if known.get("file") != before or known.get("sha256") != files.own_digest(known):
        known = {"file": before}
    if what not in known:
        known[what] = make(file)
        # A change in the same tick of the clock would leave no trace, so what was just written is not remembered.
        if time.time_ns() - max(before[2:]) > SETTLED_NS and _identity(real) == before:
            with contextlib.suppress(OSError, DoesNotFitError):
                place.parent.mkdir(exist_ok=True)
                files.write_text(place, json.dumps(known | {"sha256": files.own_digest(known)}))
    made: T = known[what]
    return made


def _identity(file: Path) -> list[int]:
    facts = file.stat()
    return [facts.st_size, facts.st_ino, facts.st_mtime_ns, facts.st_ctime_ns]


@contextlib.contextmanager
def in_use(folder: Path) -> Iterator[None]:
    """Hold an entry for this process: others wait, and nobody prunes it. Marks it as used."""
    folder.parent.mkdir(parents=True, exist_ok=True)
    with files.held(files.lock_of(folder), wait=True):
        yield
        with contextlib.suppress(OSError):
            os.utime(folder)


def prune(keep: set[Path], limit: int | None = None) -> None:
    """Remove what killed writers left, and the least recently used entries until all take at most `limit` bytes.

    Entries in `keep`, and those that another process holds, stay.
    """
    limit = LIMIT_BYTES if limit is None else limit
    for leftover in _folders(".*"):
        _remove(leftover, leftover.with_name(leftover.name.lstrip(".").partition(".")[0]))
    found = []
    for folder in filter(files.is_ours, _folders("[!.]*")):
        with contextlib.suppress(OSError):  # another process may be pruning as well
            found.append((folder.stat().st_mtime, sum(f.stat().st_size for f in folder.iterdir()), folder))
    total = sum(size for _, size, _ in found)
    for _, size, folder in sorted(found):
        if total <= limit:
            return
        if folder not in keep and _remove(folder, folder):
            total -= size


def _folders(pattern: str) -> list[Path]:
    return [path for kind in KINDS for path in (cache_folder() / kind).glob(pattern) if path.is_dir()]


def _remove(path: Path, folder: Path) -> bool:
    """Remove an entry's folder, or what is left of making it, unless another process holds the entry."""
    with contextlib.suppress(UsageError, OSError), files.held(files.lock_of(folder)):
        files.discard(path)
        return True
    return False
