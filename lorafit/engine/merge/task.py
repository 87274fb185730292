"""A streaming merge, thought through before a byte is written: what becomes of each tensor, and what is computed."""

from __future__ import annotations

import itertools
import logging
import math
from collections.abc import Iterator
from dataclasses import dataclass
from math import prod
from typing import Any

import bitsandbytes as bnb
import torch
from transformers import PreTrainedConfig, PreTrainedModel
from transformers.core_model_loading import Concatenate, MergeModulelist, Transpose, dot_natural_key
from transformers.pytorch_utils import Conv1D
from transformers.quantizers.auto import AutoHfQuantizer

from lorafit.engine.merge.edits import Combination, Edit, Replacement
from lorafit.engine.merge.skeleton import Attached, NotOneByOne, Part, convert, empty_model, match_keys, parted, revert
from lorafit.engine.merge.tensors import FLOATS, NAMES, Change, Store, new_shards
from lorafit.engine.model import quantization_config
from lorafit.errors import ModelError
from lorafit.facts import Tensor

CHUNK = 256 << 20
"""Bytes in float32 above which a tensor is merged some rows at a time."""
SMALL = 16 << 20
"""Bytes in float32 below which a tensor is never divided."""

Edits = list[tuple[float, tuple[Edit, ...]]]
"""The edits of a parameter by each adapter that has some, with the factor of the adapter's delta."""


class Task:
    """A streaming merge, thought through: what becomes of each tensor. Raises ModelError, NotOneByOne.

    Attributes:
        shards: the files to write.
        jobs: the parameters to compute; all other tensors are copied.
        untied: parameters that get a tensor of their own, with what they were tied to.
        parted: whether tied parameters are different ones now, each stored already or not.
        unknown: keys of the base that belong to no parameter, and are copied.
    """

    def __init__(
        self,
        store: Store,
        model: PreTrainedModel,
        adapters: list[tuple[Attached, float]],
        combination: Combination | None = None,
        round_trip: RoundTrip | None = None,
        dtype: torch.dtype | None = None,
        check: bool = True,
    ) -> None:
        """
        Args:
            model: without memory, for the names and shapes of things.
            adapters: each with the factor of its delta.
            round_trip: what the base went through in training, if it is to be merged into that.
            dtype: to write every floating tensor in; None: each as it is stored.
            check: whether to measure and check what the adapters change.
        """
        self.store, self.model, self.adapters = store, model, adapters
        self.combination = combination or Combination()
        self.round_trip, self.dtype, self.check = round_trip, dtype, check
        self.parts, self.unknown = match_keys(model, store.tensors)
        self._shapes = {name: tuple(p.shape) for name, p in model.named_parameters(remove_duplicate=False)}
        self.untied = self._untie()
        edited = self._edits()
        self._changes: dict[str, Change | None] = {}
        self._added: dict[str, dict[str, Change]] = {}
        self.jobs = [job for name, part in self.parts.items() if (job := self._job(part, edited.get(name, [])))]
        self.jobs += [self._new(name, source, edited) for name, source in self.untied.items()]
        self.shards = new_shards(store, self._changes, self._added)

    @property
    def alone(self) -> bool:
        """Whether it is one adapter, added as it is."""
        return len(self.adapters) == 1 and self.adapters[0][1] == 1

    @property
    def bytes(self) -> int:
        """To be written."""
        return sum(shard.size for shard in self.shards)

    @property
    def peak_bytes(self) -> int:
        """Bytes of memory, roughly: the adapters, and what the largest job needs."""
        largest = max((job.chunk_bytes * (2 + job.copies) for job in self.jobs), default=0)
        return largest + sum(attached.bytes for attached, _ in self.adapters)

    def _untie(self) -> dict[str, str]:
        found: dict[str, str] = {}
        for attached, _ in self.adapters:
            found |= parted(self.model, attached.edits)
        self.parted = bool(found)
        tied = self.model.all_tied_weights_keys.items()
        self._edited_once = {t for t, s in tied if t not in found and not {t, s} <= self.parts.keys()}  # one tensor
        pairs = ((target, source) if source in self.parts else (source, target) for target, source in found.items())
        return {mine: its for mine, its in pairs if mine not in self.parts}

    def _edits(self) -> dict[str, Edits]:
        stored_as = {source: target for target, source in self.model.all_tied_weights_keys.items()}
        found: dict[str, Edits] = {}
        for attached, weight in self.adapters:
            for name, edits in attached.edits.items():
                if name in self._edited_once:
                    continue
                if name not in self.parts and name not in self.untied:
                    name = stored_as.get(name, name)  # the tied one is stored under the other's name
                if name not in self.parts and name not in self.untied:
                    raise ModelError(f"{self.store.folder}: has no {name}, which the adapter changes")
                found.setdefault(name, []).append((weight, edits))
        return found

    def _job(self, part: Part, edits: Edits) -> Job | None:
        """The job of a stored parameter; None if it is copied."""
        stored = [self.store.tensors[key] for key in part.all_keys]
        first, name = stored[0], part.parameter
        beside = self._beside(first) if part.converter is None else {}
        shape = self._shapes.get(name, first.shape)
        trip = self.round_trip is not None and name in self.round_trip.parameters
        if beside:
            self._changes |= {side.name: None for side in beside.values()}
            self._changes |= {key: None for key in [_sibling(first.name, "weight_format")] if key in self.store.tensors}
            self._changes[first.name] = Change(NAMES[self.dtype or _dtype_of(self.model)], shape)
        elif self.dtype is not None:
            self._changes |= {s.name: Change(NAMES[self.dtype], s.shape) for s in stored if s.dtype in FLOATS}
        cast = any((change := self._changes.get(s.name)) and change.dtype != s.dtype for s in stored)
        grown = _brought_shape(edits)
        if part.converter is None and not beside and first.shape != shape and grown in (None, first.shape):
            raise ModelError(
                f"{self.store.folder}: {first.name} has the shape {first.shape}, and the model wants {shape}"
            )
        if not (edits or beside or cast or trip):
            return None
        if not beside and any(s.dtype not in FLOATS for s in stored):
            raise NotOneByOne(f"{first.name} is stored as {first.dtype}, which is no plain floating type")
        if grown is not None and part.converter is None and grown != first.shape:
            self._changes[first.name] = Change(NAMES[self.dtype] if self.dtype else first.dtype, grown)
        at = min(stored, key=lambda s: (s.file, s.begin)).name
        return Job(self, name, part, at, grown or shape, edits, tuple(part.all_keys), beside)

    def _new(self, name: str, source: str, edited: dict[str, Edits]) -> Job:
        """The job of a parameter that was tied to another one, and gets a tensor of its own.

        It begins as what it was tied to, which the adapter may have brought along (with another vocabulary).
        """
        part, edits = self.parts[source], edited.get(name, [])
        brought = [
            (weight, tuple(edit for edit in several if isinstance(edit, Replacement) and not edit.must_change))
            for weight, several in edited.get(source, [])
        ]
        if not any(isinstance(edit, Replacement) for _, several in edits for edit in several) and self.alone:
            edits = [
                (weight, (*several, *(edits[0][1] if edits else ()))) for weight, several in brought if several
            ] or edits
        stored = self.store.tensors[part.key]
        shape = _brought_shape(edits) or stored.shape
        dtype = NAMES[self.dtype] if self.dtype else stored.dtype
        self._added.setdefault(stored.file.name, {})[name] = Change(dtype, shape)
        return Job(self, name, part, part.key, shape, edits, (name,), {})

    def _beside(self, stored: Tensor) -> dict[str, Tensor]:
        """What bitsandbytes stored beside a packed weight, by what unpacking calls it."""
        found = {side: self.store.tensors.get(f"{stored.name}{side}") for side in SIDE_KEYS}
        if stored.dtype == "I8":
            found = {"SCB": self.store.tensors.get(_sibling(stored.name, "SCB"))}
        return {name: tensor for name, tensor in found.items() if tensor is not None}


@dataclass(frozen=True)
class Job:
    """A parameter to compute, from its stored tensors to those that are written.

    Attributes:
        at: key of the stored tensor at whose turn it is done.
        shape: of the result.
        writes: the keys that are written.
        beside: what belongs to a packed weight.
    """

    task: Task
    parameter: str
    part: Part
    at: str
    shape: tuple[int, ...]
    edits: Edits
    writes: tuple[str, ...]
    beside: dict[str, Tensor]

    @property
    def all_edits(self) -> list[Edit]:
        return [edit for _, several in self.edits for edit in several]

    @property
    def copies(self) -> int:
        """How many copies of a chunk in float32 it needs beside the weight itself."""
        return max((edit.copies for edit in self.all_edits), default=0) + (
            len(self.edits) if not self.task.alone else 0
        )

    @property
    def chunk_bytes(self) -> int:
        """Bytes of the largest piece that is computed at a time, in float32."""
        row = prod(self.shape[1:]) * 4
        return max((rows.stop - rows.start for rows in self.chunks() if rows), default=prod(self.shape[:1])) * row

    def chunks(self) -> Iterator[slice | None]:
        """The rows to compute at a time; None for all at once."""
        size = prod(self.shape) * 4
        limit = CHUNK if self.copies <= 2 else max(min(size // 4, CHUNK), SMALL)
        fewest = [edit.fewest_rows for edit in self.all_edits]
        if size <= limit or not self._by_rows or None in fewest:
            yield None
            return
        least = max((count for count in fewest if count), default=1)
        count = min(math.ceil(size / limit), max(self.shape[0] // least, 1))
        bounds = [self.shape[0] * index // count for index in range(count + 1)]
        yield from (slice(start, stop) for start, stop in itertools.pairwise(bounds))

    @property
    def _by_rows(self) -> bool:
        if not self.task.combination.by_rows or len(self.shape) < 2:
            return False
        converter = self.part.converter
        if converter is None:
            return True
        first, *others = converter.operations  # experts: one stored tensor for each row, and nothing that mixes them
        return (
            isinstance(first, MergeModulelist)
            and first.dim == 0
            and all(
                (isinstance(op, Concatenate) and op.dim > 0)
                or (isinstance(op, Transpose) and min(op.dim0, op.dim1) > 0)
                for op in others
            )
        )

    def whole(self) -> torch.Tensor | None:
        """A weight that can only be had whole: unpacked, or quantized and back. None for all others."""
        task, store = self.task, self.task.store
        if self.beside:
            sides = {name.removeprefix("."): store.read(stored) for name, stored in self.beside.items()}
            weight = unpack(store.read(store.tensors[self.part.key]), sides)
            owner = task.model.get_submodule(self.parameter.rpartition(".")[0])
            return weight.T.contiguous() if isinstance(owner, Conv1D) else weight  # packed as a linear layer's
        if task.round_trip is not None and self.parameter in task.round_trip.parameters:
            return task.round_trip(self.parameter, store.read(store.tensors[self.part.key]))
        return None

    def read(self, rows: slice | None) -> torch.Tensor:
        """The base's weight, or some rows of it, in the type it is stored in."""
        store = self.task.store
        if self.part.converter is None:
            return store.read(store.tensors[self.part.key], rows)
        chosen = {pattern: keys if rows is None else keys[rows] for pattern, keys in self.part.keys.items()}
        tensors = {pattern: [store.read(store.tensors[key]) for key in keys] for pattern, keys in chosen.items()}
        return convert(self.task.model, self.part, tensors)

    def pieces(
        self, value: torch.Tensor, rows: slice | None, places: dict[str, Tensor]
    ) -> Iterator[tuple[Tensor, int, torch.Tensor]]:
        """What is written of a merged weight: where, how many bytes into the tensor, and the numbers."""
        if self.part.converter is None:
            place = places[self.writes[0]]
            yield place, rows.start * place.row_bytes if rows else 0, value
            return
        chosen = [key for keys in self.part.keys.values() for key in (keys if rows is None else keys[rows])]
        made = revert(self.task.model, self.parameter, value)
        for key, tensor in zip(sorted(chosen, key=dot_natural_key), made, strict=True):
            if tuple(tensor.shape) != places[key].shape:
                raise ModelError(f"{self.parameter}: transformers' way back to {key} is not what the base has")
            yield places[key], 0, tensor


def _sibling(key: str, leaf: str) -> str:
    return f"{key.rpartition('.')[0]}.{leaf}"


def _dtype_of(model: PreTrainedModel) -> torch.dtype:
    """The type that a packed base is meant to be computed in."""
    dtype = model.config.dtype or torch.float16
    return dtype if isinstance(dtype, torch.dtype) else getattr(torch, str(dtype))


def _brought_shape(edits: Edits) -> tuple[int, ...] | None:
    """The shape of the weight that an adapter brings along, if it does."""
    brought = [edit.value for _, several in edits for edit in several if isinstance(edit, Replacement)]
    return tuple(brought[0].shape) if brought else None


SIDE_KEYS = (
    ".absmax",
    ".quant_map",
    ".nested_absmax",
    ".nested_quant_map",
    ".quant_state.bitsandbytes__nf4",
    ".quant_state.bitsandbytes__fp4",
)
"""What bitsandbytes stores beside a packed 4-bit weight, behind the weight's key."""


class RoundTrip:
    """Quantizes and dequantizes as the training's base was.

    Attributes:
        parameters: the weights that bitsandbytes quantizes, by transformers' own choice of modules.
    """

    def __init__(self, config: PreTrainedConfig, kwargs: dict[str, Any], dtype: torch.dtype) -> None:
        """
        Args:
            kwargs: of BitsAndBytesConfig, as the plan has them.
            dtype: that the base was loaded in, from which bitsandbytes quantized.
        """
        self._config, self._dtype = quantization_config(kwargs), dtype
        model = empty_model(config)
        turned = {name for name, module in model.named_modules() if isinstance(module, Conv1D)}
        quantizer = AutoHfQuantizer.from_config(self._config, pre_quantized=False)
        heard = logging.getLogger("transformers.integrations.bitsandbytes")
        level = heard.level
        heard.setLevel(logging.ERROR)
        quantizer._process_model_before_weight_loading(model, device_map={"": "cpu"})
        heard.setLevel(level)
        kinds = (bnb.nn.Linear4bit, bnb.nn.Linear8bitLt)
        found = {name for name, module in model.named_modules() if isinstance(module, kinds)}
        self.parameters = frozenset(f"{name}.weight" for name in found)
        self._turned = frozenset(f"{name}.weight" for name in found & turned)

    def __call__(self, parameter: str, weight: torch.Tensor) -> torch.Tensor:
        """The weight as the adapter saw it, in the type that the base was loaded in."""
        weight = weight.to(self._dtype)
        if parameter not in self.parameters:
            return weight
        turned = parameter in self._turned
        weight = weight.T.contiguous() if turned else weight
        if self._config.load_in_8bit:
            packed, scales, _ = bnb.functional.int8_vectorwise_quant(weight.to(torch.float16))
            made = bnb.functional.int8_vectorwise_dequant(packed, scales).to(self._dtype)
        else:
            packed, state = bnb.functional.quantize_4bit(
                weight,
                compress_statistics=self._config.bnb_4bit_use_double_quant,
                quant_type=self._config.bnb_4bit_quant_type,
            )
            made = bnb.functional.dequantize_4bit(packed, state)
        return made.T.contiguous() if turned else made


def unpack(weight: torch.Tensor, beside: dict[str, torch.Tensor]) -> torch.Tensor:
    """A stored bitsandbytes weight as plain numbers: 4-bit with its state, or int8 with its row scales."""
    if "SCB" in beside:
        return bnb.functional.int8_vectorwise_dequant(weight, beside["SCB"]).to(torch.float16)
    state = bnb.functional.QuantState.from_dict(beside, device=torch.device("cpu"))
    return bnb.functional.dequantize_4bit(weight, state)
