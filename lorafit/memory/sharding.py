"""What one of several GPUs holds: shares of weights, gradients and states, and what is gathered for a layer.

FSDP (full shard) and ZeRO-3 gather a layer's weights before it runs, the next layer's meanwhile, and keep
embeddings and output head gathered; gradients are reduced to shares layer by layer. ZeRO-1 shares the
states, ZeRO-2 the gradients too. Sources: torch/distributed/fsdp, deepspeed/runtime/zero.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Any

from lorafit.memory.setup import Setup
from lorafit.memory.static import BYTES, packed_bytes, quantized_tensors, trained, trained_bytes
from lorafit.memory.tape import Ledger, Parameter, Storage, Value

if TYPE_CHECKING:
    from lorafit.memory.operations import Operations

WEIGHTS_SHARDED = ("fsdp", "fsdp_offload", "zero3")
GRADIENTS_SHARDED = (*WEIGHTS_SHARDED, "zero2")
STATES_SHARDED = (*GRADIENTS_SHARDED, "zero1")
GATHERED_LAYERS = 2
"""The one that runs and the one that is fetched meanwhile."""


def share(setup: Setup, size: int, kind: str) -> int:
    """One process's part of a tensor of weights or states, in bytes."""
    if kind == "weights" and setup.sharding == "fsdp_offload":
        return 0
    sharded = setup.sharding in (WEIGHTS_SHARDED if kind == "weights" else STATES_SHARDED)
    return -(-size // setup.world) if sharded else size


def own_bytes(setup: Setup) -> list[int]:
    """DDP's buckets: a copy of the trained gradients, to be sent (torch/nn/parallel/distributed.py)."""
    return [trained_bytes(setup)] if setup.sharding == "ddp" and setup.world > 1 else []


class Shards:
    """Gathering and reducing around each layer."""

    def __init__(self, setup: Setup, operations: Operations) -> None:
        self.setup, self.do = setup, operations
        self.lingering: Storage | None = None
        layers: dict[str, int] = {}
        rest = 0
        quantized = {tensor.name for tensor in quantized_tensors(setup)}
        held = [
            (t.name, packed_bytes(setup, t) if t.name in quantized else t.size * BYTES[setup.dtype])
            for t in setup.facts.tensors
        ]
        held += [(t.name, t.size * BYTES[t.dtype]) for t in trained(setup)] if not setup.adapter.trains_base else []
        width = BYTES[setup.stack.autocast] if setup.stack.autocast else BYTES[setup.dtype]
        for name, size in held:
            cast = size if name in quantized else size * min(width, BYTES[setup.dtype]) // BYTES[setup.dtype]
            parts = name.split(".")
            index = next((parts[i + 1] for i, part in enumerate(parts) if part in ("layers", "h")), None)
            if index is None:
                rest += cast
            else:
                layers[index] = layers.get(index, 0) + cast
        gathers = setup.sharding in WEIGHTS_SHARDED
        self.layer_bytes = max(layers.values()) if gathers else 0
        self.root_bytes = rest if gathers else 0
        operations.casts = not gathers  # gathered weights are in the type of the product already

    def root(self, ledger: Ledger) -> Storage:
        """Embeddings, the last norm and the output head, gathered for a forward and a backward pass."""
        return Storage(ledger, self.root_bytes, "gathered weights")

    def around(self, x: Value, layer: dict[str, Any], run: Callable[[Value], Value]) -> Value:
        """Run a layer with its weights gathered, in both directions."""
        ledger, do = self.do.ledger, self.do
        size = GATHERED_LAYERS * self.layer_bytes
        held: list[Storage] = []
        before = ledger.now

        def finish(g: Value) -> Sequence[Value | None]:
            held.clear()
            self._reduce(layer)
            if size:
                self.lingering = None
                self.lingering = Storage(ledger, ledger.top - before - size, "a second layer's activations")
            return [g.view()]

        def start(g: Value) -> Sequence[Value | None]:
            ledger.top = ledger.now
            held.append(Storage(ledger, size, "gathered weights"))
            return [g.view()]

        x = do.made(x.view(), [x], finish)
        gathered = Storage(ledger, size, "gathered weights")
        y = run(x)
        del gathered
        return do.made(y.view(), [y], start)

    def _reduce(self, layer: dict[str, Any]) -> None:
        """Whole gradients of a layer become this process's share."""
        for part in layer.values():
            for parameter in vars(part).values() if hasattr(part, "weight") else part:
                if isinstance(parameter, Parameter) and parameter.gradient is not None:
                    size = int(parameter.gradient.bytes)
                    parameter.gradient = None
                    if parameter.shard is None and self.setup.sharding != "fsdp_offload":
                        parameter.shard = Storage(self.do.ledger, -(-size // self.setup.world), "gradients")
