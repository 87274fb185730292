"""What lorafit writes: whole or absent, sealed, read as it was written, and taken away only where it is lorafit's.

A folder that is written as one has a seal in it, `lorafit.json`:

    lorafit   what the folder is: run, checkpoint, adapter, model, start, base, evaluation, records, merge, gguf, cache
    files     XXH3 (128 bits) of each file by its path in the folder; null where its content may still change.
              null instead of them all: the folder is being made, and everything in it is its maker's

Only files that a seal lists are ever removed or replaced. XXH3 finds damage and edits at the speed of memory (9 GiB/s
where SHA-256 does 1.3); it is no proof against forgery, for which the manifest and locks have SHA-256.
"""

from __future__ import annotations

import contextlib
import errno
import fcntl
import hashlib
import itertools
import json
import os
import re
import shutil
import time
from collections.abc import Container, Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path, PurePosixPath
from typing import Any

import xxhash

from lorafit.bounds import read_text
from lorafit.errors import DoesNotFitError, DriftError, LorafitError, UsageError
from lorafit.progress import stage

SEAL = "lorafit.json"
LOCK = ".lorafit.lock"
"""What a process holds that writes a run, or reads it."""
FULL_BELOW = 1 << 20
"""Free bytes below which a failed write is blamed on the disk."""
_MARK = b"lorafit: held while a folder is read or written\n"
"""Content of every lock file that lorafit made, by which it is known as such."""
_PATIENCE = (0.0, 0.05, 0.1)
"""Seconds to wait for a lock, which another process may have for a moment to see that it is free."""
_CHUNK = 4 << 20
_MOST_MARKED = 64 << 20
"""Bytes of a file that are looked at for a mark."""
CARD = "README.md"
"""The card of a result: people write in it, and no command reads it."""
_LEFT = re.compile(r"\.(.+)\.\d+-\d+\.partial")
"""The name of a file that was being written as its process was killed."""
_FULL = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)
_READ_ONLY = (errno.EROFS, errno.EACCES, errno.EPERM)


# --- digests --------------------------------------------------------------------------------------


def file_digest(file: Path) -> str:
    """SHA-256 of a file, as it is on the disk."""
    return _digest(file, hashlib.sha256())


def quick_digest(file: Path) -> str:
    """XXH3 (128 bits) of a file."""
    return _digest(file, xxhash.xxh3_128())


def _digest(file: Path, digest: Any) -> str:
    size = file.stat().st_size
    buffer = bytearray(min(_CHUNK, max(size, 1)))
    with file.open("rb", buffering=0) as stream, stage(f"hashing {file.name}", size, "bytes") as hashed:
        while count := stream.readinto(buffer):
            digest.update(memoryview(buffer)[:count])
            hashed.advance(count)
    return str(digest.hexdigest())


def own_digest(content: dict[str, Any]) -> str:
    """SHA-256 of a JSON object but for its `sha256`, which it is kept as."""
    rest = {key: value for key, value in content.items() if key != "sha256"}
    return hashlib.sha256(json.dumps(rest, sort_keys=True).encode()).hexdigest()


# --- files ----------------------------------------------------------------------------------------


@contextlib.contextmanager
def beside(destination: Path) -> Iterator[Path]:
    """A new file beside `destination` that becomes it when the block ends well, else is removed.

    Raises DoesNotFitError when the disk is full.
    """
    partial = next(
        path
        for number in itertools.count()
        if not os.path.lexists(path := destination.with_name(f".{destination.name}.{os.getpid()}-{number}.partial"))
    )
    try:
        yield partial
        with partial.open("rb") as stream:
            os.fsync(stream.fileno())
        partial.replace(destination)
    except BaseException as error:
        partial.unlink(missing_ok=True)
        if _is_full(error, destination.parent):
            raise DoesNotFitError(f"{destination}: the disk is full; nothing was left half written") from error
        if isinstance(error, OSError) and error.filename == str(partial):  # which nobody has heard of
            raise type(error)(error.errno, error.strerror, str(destination)) from None
        raise


def claim_file(file: Path, mark: str) -> None:
    """See that a file can be written: it is not there, or lorafit wrote it, as a mark shows.

    Args:
        mark: a key of the JSON object that it is, or what it begins with; of a picture, words in its metadata.

    Raises UsageError.
    """
    if not os.path.lexists(file):
        return
    if file.is_dir():
        raise UsageError(f"{file}: is a folder; give the name of a file")
    if not file.is_file() or not _is_marked(file.read_bytes()[:_MOST_MARKED], mark):
        raise UsageError(f"{file}: exists and was not written by this command; move it, or name another file")


def _is_marked(content: bytes, mark: str) -> bool:
    if not content or content.startswith(mark.encode()):
        return True
    if content.startswith((b"\x89PNG", b"<?xml")):
        return mark.encode() in content[:4096]
    try:
        return mark in dict(json.loads(content))
    except (ValueError, TypeError, RecursionError):  # such as a lock with the marks of a merge conflict in it
        lines = content.decode("utf-8", "replace").splitlines()
        return lines[0].startswith(("{", "<<<<<<< ")) and any(re.match(f' {{1,2}}"{mark}": ', line) for line in lines)


def write_text(path: Path, text: str) -> None:
    """Write a file, whole or not at all."""
    write_bytes(path, text.encode("utf-8"))


def write_bytes(path: Path, content: bytes) -> None:
    """Write bytes to a file, whole or not at all."""
    with beside(path) as partial:
        partial.write_bytes(content)


def _is_full(error: BaseException, folder: Path) -> bool:
    """Whether a failed write is the disk's fault; libraries tell it in their own ways, so the disk itself is asked."""
    if isinstance(error, OSError) and error.errno in _FULL:
        return True
    if not isinstance(error, Exception) or isinstance(error, LorafitError) or not folder.exists():
        return False
    return shutil.disk_usage(folder).free < FULL_BELOW


# --- seals ----------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Seal:
    """What a folder is, and the digests of the files that lorafit wrote into it, see above."""

    kind: str
    files: dict[str, str | None] | None

    @property
    def names(self) -> tuple[str, ...]:
        """The files that are listed."""
        return tuple(self.files or ())

    def write(self, folder: Path) -> None:
        write_text(folder / SEAL, json.dumps({"lorafit": self.kind, "files": self.files}, indent=1) + "\n")


def read_seal(folder: Path) -> Seal | None:
    """The seal of a folder; None if there is none that lorafit can have written."""
    try:
        content = json.loads(read_text(folder / SEAL))
        seal = Seal(content["lorafit"], content["files"])
        names = seal.files or {}
        inside = all(is_inside(name) and isinstance(digest, str | None) for name, digest in names.items())
    except (OSError, ValueError, LookupError, TypeError, AttributeError, RecursionError):
        return None
    return seal if inside and isinstance(seal.kind, str) else None


def is_inside(name: str) -> bool:
    """Whether a path in a seal or an index leads to a file of its folder and nowhere else."""
    path = PurePosixPath(name)
    return path.parts != () and not path.is_absolute() and ".." not in path.parts and "\0" not in name


def seal(folder: Path, kind: str, open_files: Container[str] = ()) -> None:
    """Seal a folder that is finished, with all files in it, but for some whose content may still change."""
    files = sorted(file.relative_to(folder).as_posix() for file in folder.rglob("*") if file.is_file())
    digests = {name: None if name in open_files else quick_digest(folder / name) for name in files if name != SEAL}
    Seal(kind, digests).write(folder)


def finish(folder: Path) -> None:
    """Seal the files whose content could still change."""
    known = read_seal(folder)
    assert known is not None
    files = known.files or {}
    Seal(known.kind, {name: digest or quick_digest(folder / name) for name, digest in files.items()}).write(folder)


def is_ours(folder: Path, kind: str | None = None) -> bool:
    """Whether lorafit wrote a folder, of a kind if one is named, or it is an empty one."""
    if not folder.is_dir():
        return False
    found = read_seal(folder)
    if found is None:
        return all(is_left(entry.name, (SEAL,)) for entry in folder.iterdir())
    return kind is None or found.kind == kind


def is_left(name: str, of: Container[str]) -> bool:
    """Whether a file is what a killed process left of writing one of some files."""
    left = _LEFT.fullmatch(name)
    return left is not None and left[1] in of


def foreign(folder: Path, changed: bool = False) -> Iterator[str]:
    """The paths in a folder that its seal does not list; all of them if there is none.

    Args:
        changed: files that are no longer as they were written, as well: people may have written in them.
    """
    known = read_seal(folder)
    if known is not None and known.files is None:
        return
    names = {SEAL, *(known.files or {})} if known else {SEAL} if is_ours(folder) else set()
    parents = {parent.as_posix() for name in names for parent in PurePosixPath(name).parents}
    for place, folders, files in os.walk(folder):
        for name in sorted((*folders, *files)):
            path = Path(place, name)
            inside = path.relative_to(folder).as_posix()
            if (is_left(inside, names) and path.is_file()) or (inside == LOCK and _is_lock(path)):
                continue
            if inside not in (names if name in files or path.is_symlink() else parents):
                yield inside
    for name, digest in (known.files or {}).items() if known and changed else ():
        if digest and os.path.lexists(folder / name) and _changed(folder, name, digest):
            yield name


def damage(folder: Path, *ignored: str) -> list[str]:
    """List what is wrong in a sealed folder, by file; empty if all but the ignored files are as they were written.

    A file that was added counts if what reads such folders may read it.
    """
    found = read_seal(folder)
    if found is None:
        return [f"{SEAL} is missing or can't be read"]
    if found.files is None:
        return ["it was not finished"]
    kept = {name: digest for name, digest in found.files.items() if digest and name not in ignored}
    changed = [reason for name, digest in kept.items() if (reason := _changed(folder, name, digest))]
    return changed + [f"{name} was added" for name in foreign(folder) if is_read(name)]


def is_read(name: str) -> bool:
    """Whether loading a model or a tokenizer may read a file of that name."""
    file = PurePosixPath(name)
    return file.suffix in (".json", ".jinja", ".safetensors", ".bin", ".model", ".pt", ".pth", ".py") or (
        file.name in ("vocab.txt", "merges.txt")
    )


def is_intact(folder: Path, name: str) -> bool:
    """Whether one file of a sealed folder is as it was written."""
    known = read_seal(folder)
    digest = (known.files or {}).get(name) if known else None
    return digest is not None and _changed(folder, name, digest) is None


def _changed(folder: Path, name: str, digest: str) -> str | None:
    file = folder / name
    try:
        if not file.is_file():
            return f"{name} is missing"
        return None if quick_digest(file) == digest else f"{name} has changed"
    except OSError as error:
        return f"{name} can't be read: {error.strerror}"


def check(folder: Path, hint: str = f"bring that back, or, if it is meant, remove the folder's {SEAL}") -> None:
    """Refuse a folder that is not as lorafit wrote it. One without a seal is not lorafit's. Raises DriftError."""
    if os.path.lexists(folder / SEAL):
        check_own(folder, hint)


def check_own(folder: Path, hint: str) -> None:
    """Refuse a folder that has no seal, or is not as lorafit wrote it. Raises DriftError."""
    if wrong := damage(folder, CARD):
        raise DriftError(f"{folder}: is not as it was written: {', '.join(wrong)}; {hint}")


def check_file(file: Path, hint: str) -> None:
    """Refuse a file that its folder's seal lists and that has changed. Raises DriftError."""
    known = read_seal(file.parent)
    digest = (known.files or {}).get(file.name) if known else None
    if digest is not None and (wrong := _changed(file.parent, file.name, digest)):
        raise DriftError(f"{file.parent}: is not as it was written: {wrong}; {hint}")


# --- folders --------------------------------------------------------------------------------------


def claim(destination: Path, kind: str, what: str, needed: Iterable[Path] = ()) -> None:
    """See that a folder can be written: it is not there, empty, or one of the kind and nothing else is in it.

    Args:
        what: the kind, for people.
        needed: what is read meanwhile, and must not be in it. The working directory must not be, either.

    Raises UsageError.
    """
    whole = next((parent for parent in destination.parents if (one := read_seal(parent)) and one.kind != "run"), None)
    if whole is not None:
        raise UsageError(f"{destination}: is in {whole}, which lorafit wrote as a whole; choose another --output")
    if not os.path.lexists(destination):
        return
    if not destination.is_dir():
        raise UsageError(f"{destination}: is a file; the output is a folder")
    for path in (*needed, Path.cwd()):
        if path.resolve().is_relative_to(destination.resolve()):
            raise UsageError(f"{destination}: would be replaced, and {path} is in it; choose another --output")
    if destination.is_mount():
        raise UsageError(f"{destination}: is a mount point, which can't be replaced; name a folder in it")
    known = read_seal(destination)
    if not is_ours(destination, kind) or (known is not None and known.files is None):
        raise UsageError(f"{destination}: exists and is not {what} of lorafit's; choose another --output")
    if other := next(foreign(destination, changed=not kind.startswith("cache")), None):
        raise UsageError(
            f"{destination}: holds {other}, which lorafit did not write so; move that, or choose another --output"
        )


def partial_of(destination: Path) -> Path:
    """Where a folder is written before it gets its name."""
    return _spare(destination, "partial")


def _spare(folder: Path, what: str) -> Path:
    """A place beside a folder for one of lorafit's own: free, or left by a process that was killed."""
    for number in itertools.count(1):
        path = folder.with_name(f".{folder.name}.{what}{f'-{number}' * (number > 1)}")
        if is_free(path):
            return path
    raise AssertionError


def plain_name(folder: Path) -> str:
    """What a folder that is made, removed or replaced is called in the end: `eval` for `.eval.partial`."""
    match = re.fullmatch(r"\.(.+)\.(?:partial|removing|replaced|work)(?:-\d+)?", folder.name)
    return (match[1] if match else folder.name).removesuffix(".unverified")


def is_free(folder: Path) -> bool:
    """Whether lorafit may put a folder of its own there: nothing is there, or one of its own and nothing else in it."""
    if not os.path.lexists(folder):
        return True
    return not folder.is_symlink() and is_ours(folder) and next(foreign(folder), None) is None


@contextlib.contextmanager
def staged(destination: Path, kind: str, open_files: Container[str] = ()) -> Iterator[Path]:
    """A folder beside `destination` that becomes it when the block ends well, sealed, else is removed.

    One of the kind that stands at the destination is replaced, at the very end; `claim` tells before. What a killed
    process left beside it is removed first. Raises DoesNotFitError when the disk is full.
    """
    if is_ours(old := destination.with_name(f".{destination.name}.replaced")) and not os.path.lexists(destination):
        old.rename(destination)  # a process was killed just before the new one had its name
    partial = partial_of(destination)
    for left in (partial, _spare(destination, "removing")):
        discard(left)
    partial.mkdir(parents=True)
    try:
        Seal(kind, None).write(partial)
        yield partial
        if partial.is_dir():  # the block may have put it elsewhere
            settle(partial, destination, kind, open_files)
    except BaseException as error:
        full = _is_full(error, partial.parent)
        discard(partial)
        if full:
            raise DoesNotFitError(f"{destination}: the disk is full; nothing was left half written") from error
        raise


def settle(partial: Path, destination: Path, kind: str, open_files: Container[str] = ()) -> None:
    """Seal a finished folder and give it its name, in place of one of the kind. Raises UsageError if that isn't so."""
    seal(partial, kind, open_files)
    sync(partial)
    claim(destination, kind, f"a folder ({kind})")
    old = None
    if destination.is_dir():
        old = _spare(destination, "replaced")
        discard(old)
        destination.rename(old)
    partial.rename(destination)
    if old is not None:
        discard(old)


def sync(folder: Path) -> None:
    """Flush a folder's files to the disk, so that a rename never outruns them."""
    for file in folder.rglob("*"):
        if file.is_file():
            with file.open("rb") as stream:
                os.fsync(stream.fileno())


def discard(folder: Path) -> None:
    """Remove what lorafit wrote into a folder, and the folder unless it holds something else.

    It is never seen half removed: it is renamed first, where nothing else is in it.
    """
    if folder.is_symlink() or not folder.is_dir() or not is_ours(folder):
        return
    if next(foreign(folder), None) is None and not folder.name.startswith("."):
        doomed = _spare(folder, "removing")
        if doomed.is_dir():
            _remove(doomed)  # what a killed removal left
        with contextlib.suppress(OSError):  # a mount point
            folder = folder.rename(doomed)
    _remove(folder)


def _remove(folder: Path) -> None:
    """Remove what a seal lists, the seal last, and the folders that are empty then."""
    known = read_seal(folder)
    if known is not None and known.files is None:
        for entry in folder.iterdir():
            if entry.is_dir() and not entry.is_symlink():
                shutil.rmtree(entry, ignore_errors=True)
            elif entry.name != SEAL:
                entry.unlink(missing_ok=True)
        (folder / SEAL).unlink(missing_ok=True)  # last: a removal that is killed goes on the next time
        folder.rmdir()
        return
    names = [SEAL, *(known.files or ())] if known else [SEAL]
    for left in [entry.name for entry in folder.iterdir() if is_left(entry.name, names)]:
        remove_file(folder, left)
    for name in names[1:]:
        remove_file(folder, name)
    if _is_lock(folder / LOCK):
        (folder / LOCK).unlink()
    if known:
        (folder / SEAL).unlink()
    with contextlib.suppress(OSError):  # somebody else's files are in it, or it is a mount point
        folder.rmdir()


def remove_file(folder: Path, name: str) -> None:
    """Remove a file of a folder by its path in it, and the folders between that are empty then; no link is followed."""
    file = folder / name
    between = [folder / parent for parent in PurePosixPath(name).parents if parent.parts]
    if any(parent.is_symlink() for parent in between) or (file.is_dir() and not file.is_symlink()):
        return
    file.unlink(missing_ok=True)
    for parent in between:
        with contextlib.suppress(OSError):
            parent.rmdir()


def is_vacant(folder: Path) -> bool:
    """Whether a folder holds nothing but what a killed start of lorafit's, or a file system, leaves in an empty one."""
    return all(entry.name in (LOCK, "lost+found") or is_left(entry.name, (SEAL,)) for entry in folder.iterdir())


# --- who is at work -------------------------------------------------------------------------------


@contextlib.contextmanager
def held(lock: Path, busy: str = "", shared: bool = False, wait: bool = False) -> Iterator[None]:
    """Hold a lock file, made if need be, until the block ends: alone, or shared with other readers.

    A file that was there is not written. A reader on a read-only disk goes on without: nobody can write there.

    Args:
        busy: what is said if another process has it and `wait` is off. Raises UsageError.
    """
    descriptor = _locked(lock, busy, shared, wait)
    try:
        yield
    finally:
        if descriptor is not None:
            os.close(descriptor)


@contextlib.contextmanager
def writing(destination: Path) -> Iterator[None]:
    """Hold a folder that is going to be written, until the block ends. Raises UsageError if another process does."""
    lock = lock_of(destination)
    try:
        destination.parent.mkdir(parents=True, exist_ok=True)
        opened = _locked(lock, _busy(destination), shared=False, wait=False)
    except OSError as error:
        raise UsageError(f"{destination}: can't be written: {error.strerror}; choose another --output") from None
    try:
        yield
    finally:
        with contextlib.suppress(OSError):
            if _is_lock(lock):
                lock.unlink()
        if opened is not None:
            os.close(opened)


def refuse_busy(destination: Path) -> None:
    """Say that another process is writing a folder, before anything heavy is imported. Raises UsageError."""
    if (lock := lock_of(destination)).is_file():
        with held(lock, _busy(destination), shared=True):
            pass


def lock_of(destination: Path) -> Path:
    """The lock file of a folder that is replaced as a whole, beside it. Raises UsageError for the root."""
    if not destination.name:
        raise UsageError(f"{destination}: can't be written as a folder; choose another --output")
    return destination.with_name(f".{destination.name}.lock")


def _busy(destination: Path) -> str:
    return f"{destination}: another process is writing it"


def _locked(lock: Path, busy: str, shared: bool, wait: bool) -> int | None:
    """The open lock file, locked; None where it can't be made, or its file system knows no locks."""
    kind = (fcntl.LOCK_SH if shared else fcntl.LOCK_EX) | (0 if wait else fcntl.LOCK_NB)
    patience = iter(_PATIENCE)
    while (descriptor := _opened(lock, shared)) is not None:
        try:
            fcntl.flock(descriptor, kind)
            if _is_still(lock, descriptor):  # else it was taken away by who had it before
                return descriptor
        except BlockingIOError:
            os.close(descriptor)
            if (pause := next(patience, None)) is None:
                raise UsageError(busy) from None
            time.sleep(pause)
            continue
        except OSError:
            os.close(descriptor)
            return None
        except BaseException:
            os.close(descriptor)
            raise
        os.close(descriptor)
    return None


def _opened(lock: Path, shared: bool) -> int | None:
    """The lock file, which is made if need be; None for a reader on a disk that is read-only."""
    try:
        descriptor = os.open(lock, os.O_RDWR | os.O_CREAT | os.O_EXCL, 0o666)
    except FileExistsError:
        with contextlib.suppress(FileNotFoundError):  # taken away just now
            return os.open(lock, (os.O_RDONLY if shared else os.O_RDWR) | os.O_NOFOLLOW)
        return _opened(lock, shared)
    except OSError as error:
        if shared and error.errno in _READ_ONLY:
            return os.open(lock, os.O_RDONLY) if lock.is_file() else None
        raise
    with contextlib.suppress(OSError):  # a full disk, which is told where more is written
        os.write(descriptor, _MARK)
    return descriptor


def _is_lock(file: Path) -> bool:
    """Whether a file is a lock that lorafit made."""
    return file.is_file() and not file.is_symlink() and file.stat().st_size == len(_MARK) and file.read_bytes() == _MARK


def _is_still(lock: Path, descriptor: int) -> bool:
    try:
        return os.path.samestat(os.fstat(descriptor), lock.stat())
    except FileNotFoundError:
        return False
