"""Facts of a hub model: cached files first, then headers over HTTP, then the bundled configurations and formulas."""

from __future__ import annotations

import contextlib
import functools
import hashlib
import json
import os
import socket
import sys
from collections.abc import Iterable
from importlib import resources
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

from lorafit.bounds import read_json
from lorafit.errors import DoesNotFitError, ModelError
from lorafit.facts.folder import Shard, described, hub_shards, read_shard, tokenizer_facts, weight_files
from lorafit.facts.layouts import layout
from lorafit.facts.model import ModelFacts, Tensor, check_sizes
from lorafit.files import own_digest, write_text
from lorafit.rows.cache import cache_folder


class UnreachableError(ModelError):
    """The hub can't be asked for a model, which says nothing about the model."""


@functools.cache
def hub_unreachable() -> str | None:
    """Why the hub is not asked, or None if it can be.

    One quick connection stands before the client's own retries, which take most of a minute.
    """
    for name in ("HF_HUB_OFFLINE", "TRANSFORMERS_OFFLINE"):
        if os.environ.get(name, "").upper() in ("1", "ON", "YES", "TRUE"):
            return f"{name} is set"
    if any(os.environ.get(name) for name in ("HTTPS_PROXY", "https_proxy", "ALL_PROXY", "all_proxy")):
        return None  # the client knows how to use a proxy
    endpoint = urlsplit(os.environ.get("HF_ENDPOINT") or "https://huggingface.co")
    port = endpoint.port or (80 if endpoint.scheme == "http" else 443)
    try:
        socket.create_connection((endpoint.hostname or "", port), timeout=3).close()
    except OSError:
        return f"{endpoint.hostname} can't be reached"
    return None


def spare_retries() -> None:
    """Where the hub can't be reached, have its clients use their caches at once, without retries of half a minute."""
    if hub_unreachable() is None:
        return
    import huggingface_hub.constants

    huggingface_hub.constants.HF_HUB_OFFLINE = True
    if "datasets" in sys.modules:  # which has taken the value over
        sys.modules["datasets"].config.HF_HUB_OFFLINE = True


def from_hub(name: str, revision: str | None) -> ModelFacts:
    """The facts of a hub model. Raises ModelError, UnreachableError where the hub can't be asked for it."""
    spare_retries()
    found = {file: hub_file(name, file, revision) for file in ("config.json", "tokenizer_config.json")}
    if found["config.json"] is None:
        bundled = known_models().get(name.lower())
        if bundled is None:
            unreachable = hub_unreachable()
            why = unreachable or "the hub does not have it or does not let you read it"
            raise (UnreachableError if unreachable else ModelError)(
                f"{name}: config.json is not in the cache and {why}; download the model first, or check the name, "
                "the revision and your access"
            )
        source = f"the bundled configuration ({hub_unreachable() or 'the hub does not let you read it'})"
        return ModelFacts(name, "bundled", source, bundled, tuple(layout(bundled)))
    hub_file(name, "chat_template.jinja", revision)
    folder = found["config.json"].parent
    config = read_json(found["config.json"])
    check_sizes(name, config)
    place, otherwise = "", "from the hub"
    shards = _downloaded(folder)
    if shards is None:
        shards, place = (), " on the hub"
        if "quantization_config" not in config:
            shards, problem = _hub_headers(name, folder.name)
            otherwise += f"; {problem}" if problem else ""
    try:
        known = described(name, config, shards, place, otherwise)
    except ModelError as error:
        if not place:
            raise
        known = described(name, config, (), place, f"{otherwise}; {str(error).removeprefix(f'{name}: ')}")
    return ModelFacts(name, "hub", *known, tokenizer_facts(folder))


def _downloaded(folder: Path) -> Iterable[Shard] | None:
    """The weights that are here; None where they are not, or in part.

    An index alone may be what the client kept of a hub that answers with something else.
    """
    try:
        weights = weight_files(folder)
    except ModelError:
        if any(folder.glob("*.safetensors")):
            raise
        return None
    return map(read_shard, weights) if weights and all(file.is_file() for file in weights) else None


@functools.cache
def _hub_headers(name: str, commit: str) -> tuple[tuple[Shard, ...], str]:
    """The headers of a model's weights that are not here, and why there are none if they can't be had.

    They are kept in lorafit's cache: those of a commit don't change.
    """
    asked = f"{os.environ.get('HF_ENDPOINT', '')} {name.lower()}@{commit}"
    key = hashlib.sha256(asked.encode()).hexdigest()[:32]
    place = cache_folder() / "headers" / f"{key}.json"
    known = _kept_headers(place)
    if known is not None:
        return known, ""
    if hub_unreachable():
        return (), ""
    try:
        found = hub_shards(name, commit)
    except ModelError as error:
        return (), str(error).removeprefix(f"{name}: ")
    files = {shard.name: [(t.name, t.dtype, t.shape) for t in shard.tensors] for shard in found}
    with contextlib.suppress(OSError, DoesNotFitError):
        place.parent.mkdir(exist_ok=True)
        write_text(place, json.dumps({"files": files, "sha256": own_digest({"files": files})}))
    return found, ""


def _kept_headers(place: Path) -> tuple[Shard, ...] | None:
    try:
        known = dict(json.loads(place.read_text(encoding="utf-8")))
        if known.get("sha256") != own_digest(known):
            return None
        return tuple(
            Shard(file, b"", tuple(Tensor(name, tuple(shape), dtype) for name, dtype, shape in tensors), 0)
            for file, tensors in known["files"].items()
        )
    except (OSError, ValueError, TypeError, KeyError, RecursionError):
        return None


def hub_file(name: str, file: str, revision: str | None) -> Path | None:
    """A hub model's file in the client's cache, fetched if it is not there; None if it can't be had."""
    from huggingface_hub import hf_hub_download, try_to_load_from_cache

    cached = try_to_load_from_cache(name, file, revision=revision)
    if isinstance(cached, str):
        return Path(cached)
    if cached is not None or hub_unreachable():
        return None  # known to be missing, or not to be asked for
    try:
        return Path(hf_hub_download(name, file, revision=revision, etag_timeout=5))
    except Exception:  # noqa: BLE001 - whatever the client raises, the file can't be had
        return None


def known_models() -> dict[str, dict[str, Any]]:
    """The bundled configurations by lower-case name; their sources are in the file."""
    text = resources.files("lorafit.facts").joinpath("known_models.json").read_text(encoding="utf-8")
    return {name.lower(): entry["config"] for entry in json.loads(text)["models"] for name in entry["names"]}
