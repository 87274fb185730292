"""A decoder's layers by family: attention, feed-forward and norms, and the adapter on them, as operations on sizes.

The order of the operations and what each keeps are those of transformers 5 (models/*/modeling_*.py),
PEFT (tuners/lora/layer.py, bnb.py, dora.py) and bitsandbytes (backends/cuda/ops.py).
"""

from __future__ import annotations

import math
import re
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from lorafit.errors import ModelError
from lorafit.facts import Tensor
from lorafit.families import family_of
from lorafit.memory.estimate import Setup
from lorafit.memory.operations import Anchor, Operations, Parameter, Value
from lorafit.memory.static import BYTES, GRADIENTS_SHARDED, Shards, quantized_tensors, width_of
from lorafit.plan.adapters import MAGNITUDE

_LORA = rf".*\.(lora_[AB]|{MAGNITUDE})\.weight"
FUSED_ROWS = 1536
"""From more rows than this on, bitsandbytes makes the weight in 16 bits (backends/cuda/ops.py:
_gemm_4bit_custom_max_m)."""


@dataclass
class Linear:
    """A linear layer, with its adapter if it has one.

    Attributes:
        dequantized: bytes of the weight as made for a product; 0 if it is not quantized.
    """

    out: int
    inputs: int
    weight: Parameter
    dequantized: int
    bits: int
    bias: Parameter | None = None
    down: Parameter | None = None
    up: Parameter | None = None
    magnitude: Parameter | None = None
    rank: int = 0


class Decoder:
    """The decoder of a setup. `hidden` and `loss` run it on a ledger."""

    def __init__(self, setup: Setup, operations: Operations) -> None:
        config = setup.facts.text_config
        self.setup, self.do = setup, operations
        self.shards = Shards(setup, operations) if setup.sharding in GRADIENTS_SHARDED else None
        kind = str(config.get("model_type", setup.facts.model_type))
        traits = family_of(kind).traits
        if traits is None:
            raise ModelError(
                f"{setup.facts.name}: the activations of a {kind} model are not known in closed form; use --trace"
            )
        self.traits = traits
        self.width = BYTES[setup.dtype]
        self.hidden_size: int = config["hidden_size"]
        heads: int = config["num_attention_heads"]
        self.heads = heads
        tensors = {tensor.name: tensor for tensor in setup.facts.tensors}
        self.parameters: list[Parameter] = []
        self.layers = self._layers(tensors)
        embedding = next((t for n, t in tensors.items() if n.endswith("embed_tokens.weight")), None)
        if embedding is None or "model.norm.weight" not in tensors:
            raise ModelError(
                f"{setup.facts.name}: its tensors are not those of a {kind} model alone, so that its activations are "
                "not known in closed form; use --trace"
            )
        self.embedding = self._plain(embedding)
        self.final_norm = self._plain(tensors["model.norm.weight"])
        self.head = self._plain(tensors["lm_head.weight"]) if "lm_head.weight" in tensors else self.embedding
        if self.head is self.embedding and setup.adapter.trains_base:
            self.head.uses = 2
        elif self.head is self.embedding:  # saved modules are copies, each of its own
            name = "lm_head.weight"
            self.head = self._plain(Tensor(name, (config["vocab_size"], self.hidden_size)))
        self.experts_per_token = int(config.get("num_experts_per_tok") or config.get("num_experts_per_token") or 0)
        self.vocabulary: int = config["vocab_size"]
        first = self.layers[0]
        self.head_dim = self._head_dim(config, first)

    # --- parameters -----------------------------------------------------------------------------

    def _plain(self, tensor: Tensor) -> Parameter:
        trains = self._trains(tensor.name)
        copied = trains and not self.setup.adapter.trains_base
        width = BYTES[self.setup.adapter_dtype] if copied else width_of(self.setup, tensor.name)
        return self._made(tensor.size, width, trains)

    def _made(self, elements: int, width: int, trained: bool) -> Parameter:
        parameter = Parameter(elements, width, trained)
        self.parameters.append(parameter)
        return parameter

    def _trains(self, name: str) -> bool:
        return self.setup.adapter.trains_base or self.setup.adapter.copies(name)

    def _layers(self, tensors: dict[str, Tensor]) -> list[dict[str, Any]]:
        setup = self.setup
        quantized = {tensor.name for tensor in quantized_tensors(setup)}
        own = {t.name: t for t in setup.adapter.tensors(setup.facts, None)} if not setup.adapter.trains_base else {}
        known = tensors.keys() | {"lm_head.weight"}
        if any(name not in known and re.fullmatch(_LORA, name) is None for name in own):
            raise ModelError(
                f"{setup.facts.name}: what {setup.adapter.name} layers take is not known in closed form; use --trace"
            )
        layers: dict[int, dict[str, Any]] = {}
        for name, tensor in _weights_first(tensors):
            found = re.fullmatch(r"model\.layers\.(\d+)\.(.+?)(?:\.(weight|bias))?", name)
            if not found:
                continue
            index, module, leaf = int(found[1]), found[2], found[3]
            layer = layers.setdefault(index, {})
            parameter = self._plain(tensor)
            if leaf == "bias":
                layer[module].bias = parameter
            elif leaf == "weight" and len(tensor.shape) == 2 and not module.endswith("norm"):
                path = name.removesuffix(".weight")
                linear = Linear(tensor.shape[0], tensor.shape[1], parameter, *self._dequantized(tensor, quantized))
                if down := own.get(f"{path}.lora_A.weight"):
                    linear.rank = down.shape[0]
                    a = BYTES[setup.adapter_dtype]
                    linear.down = self._made(linear.rank * linear.inputs, a, True)
                    linear.up = self._made(linear.rank * linear.out, a, True)
                    if f"{path}.{MAGNITUDE}.weight" in own:
                        linear.magnitude = self._made(linear.out, 4, True)
                layer[module] = linear
            else:
                layer[module] = (parameter, tensor.shape)
        return [layers[index] for index in sorted(layers)]

    def _dequantized(self, tensor: Tensor, quantized: set[str]) -> tuple[int, int]:
        kwargs = self.setup.quantization
        if kwargs is None or tensor.name not in quantized:
            return 0, 16
        compute = BYTES[kwargs.get("bnb_4bit_compute_dtype", self.setup.dtype)]
        if kwargs.get("load_in_8bit"):
            return tensor.size * compute, 8
        constants = 2 * 4 * math.ceil(tensor.size / 64) if kwargs["bnb_4bit_use_double_quant"] else 0
        return tensor.size * compute + constants, 4

    def _head_dim(self, config: dict[str, Any], layer: dict[str, Any]) -> int:
        if "self_attn.q_proj" in layer:
            return int(layer["self_attn.q_proj"].out // self.heads)
        return int(config.get("head_dim") or self.hidden_size // self.heads)

    # --- the pass -------------------------------------------------------------------------------

    def hidden(self, batch: int) -> Value:
        """Embeddings, layers and the final norm: (batch x length, hidden_size)."""
        do, setup = self.do, self.setup
        tokens = batch * setup.length
        do.label = "hidden states"
        x = do.new(tokens * self.hidden_size, self.embedding.width)
        checkpointing = setup.checkpointing != "none" and do.ledger.recording
        if self.embedding.trained:
            x = do.made(x, [Anchor()], self._embedding_gradient)
        elif not setup.adapter.trains_base and setup.checkpointing != "none":
            x = do.made(x, [Anchor()], lambda g: [None])  # enable_input_require_grads
        if self.traits.scales_embeddings or self.traits.scales_residuals:
            x = do.scale(x)
        shared = [x, *self._rotary(batch)]  # transformers holds the embeddings through the whole pass
        mask = self._mask(batch)
        for layer in self.layers:
            trains = setup.adapter.trains_base or any(
                isinstance(part, Linear) and part.down is not None for part in layer.values()
            )

            def run(value: Value, layer: dict[str, Any] = layer) -> Value:
                if not self.shards:
                    return self._layer(value, layer, batch, mask)
                return self.shards.around(value, layer, lambda inner: self._layer(inner, layer, batch, mask))

            x = do.checkpoint(run, x, trains) if checkpointing else run(x)
        del shared
        return self.norm(x, self.final_norm, self.hidden_size, "final norm")

    def _embedding_gradient(self, g: Value) -> Sequence[Value | None]:
        made = self.do.ledger.new(self.embedding.elements, self.embedding.width, "gradients")
        self.embedding.accumulate(made)
        return [None]

    def _rotary(self, batch: int) -> list[Value]:
        rows = batch * self.setup.length if self.setup.packed else self.setup.length
        self.do.label = "positions and masks"
        return [self.do.new(rows * self.head_dim, self.width) for _ in range(2)]

    def _mask(self, batch: int) -> Value | None:
        """A boolean mask of a byte for each pair of positions, where padding or packed rows need one."""
        setup = self.setup
        flash = setup.attention.startswith("flash")
        masked = setup.masked if self.do.training else setup.eval_masked
        if flash or not (masked or setup.packed):
            return None
        length = batch * setup.length if setup.packed else setup.length
        self.do.label = "positions and masks"
        rows = 1 if setup.packed else batch
        return self.do.new(rows * length * length, 1 if setup.attention == "sdpa" else self.width)

    def _layer(self, x: Value, layer: dict[str, Any], batch: int, mask: Value | None) -> Value:
        norms = self.traits.norms
        hidden = self.hidden_size
        residual = x
        h = x
        if norms != "after":
            h = self.norm(x, layer["input_layernorm"][0], hidden)
        h = self._attention(h, layer, batch, mask)
        if norms != "before":
            h = self.norm(h, layer["post_attention_layernorm"][0], hidden)
        h = self._residual(residual, h)
        residual = h
        del x
        if norms == "before":
            h = self.norm(h, layer["post_attention_layernorm"][0], hidden)
        elif norms == "around":
            h = self.norm(h, layer["pre_feedforward_layernorm"][0], hidden)
        h = self._feed_forward(h, layer)
        if norms != "before":
            h = self.norm(h, layer["post_feedforward_layernorm"][0], hidden)
        return self._residual(residual, h)

    def _residual(self, residual: Value, h: Value) -> Value:
        self.do.label = "hidden states"
        if self.traits.scales_residuals:
            h = self.do.scale(h)
        return self.do.add(residual, h)

    def norm(self, x: Value, weight: Parameter, size: int, label: str = "norms, in float32") -> Value:
        """RMS norm in float32; Gemma's multiplies by its weight before it goes back to 16 bits."""
        do = self.do
        if "rms_norm" in self.setup.stack.kernels:
            return self._fused_norm(x, weight, size)
        do.label = label
        before = x.width
        h = do.to(x, 4)
        h = do.times(h, do.function_of_result(do.mean(do.square(h), size)))
        if self.traits.wide_norm:
            return do.to(do.times_weight(h, Parameter(weight.elements, 4, weight.trained)), before)
        h = do.to(h, before)
        return do.times_weight(h, weight)

    def _fused_norm(self, x: Value, weight: Parameter, size: int) -> Value:
        rstd = self.do.ledger.new(x.elements // size, 4, "norms")

        def back(g: Value) -> Sequence[Value | None]:
            _ = x, rstd
            return [g.view()]

        return self.do.made(self.do.new(x.elements, x.width), [x], back)

    # --- attention ------------------------------------------------------------------------------

    def _attention(self, h: Value, layer: dict[str, Any], batch: int, mask: Value | None) -> Value:
        q, k, v = self._queries_keys_values(h, layer)
        del h
        do = self.do
        do.label = "queries, keys, values, attention output"
        q, k = self._rotate(q), self._rotate(k)
        if self.setup.stack.use_cache:
            k, v = do.copied(k), do.copied(v)
        groups = q.elements // k.elements
        eager = self.setup.attention == "eager"
        if groups > 1 and (eager or mask is not None):
            k, v = self._repeat(k, groups), self._repeat(v, groups)
        out = self._eager(q, k, v, batch, mask) if eager else self._fused(q, k, v, batch, mask)
        del q, k, v
        return self.project(out, layer["self_attn.o_proj"])

    def _queries_keys_values(self, h: Value, layer: dict[str, Any]) -> tuple[Value, Value, Value]:
        do = self.do
        if "self_attn.qkv_proj" in layer:
            fused: Linear = layer["self_attn.qkv_proj"]
            qkv = self.project(h, fused)
            rows = qkv.elements // fused.out
            queries = self.heads * self.head_dim
            keys = (fused.out - queries) // 2
            return do.slice(qkv, rows * queries), do.slice(qkv, rows * keys), do.slice(qkv, rows * keys)
        q = self.project(h, layer["self_attn.q_proj"])
        q = self._head_norm(q, layer, "self_attn.q_norm")
        k = self.project(h, layer["self_attn.k_proj"])
        k = self._head_norm(k, layer, "self_attn.k_norm")
        return q, k, self.project(h, layer["self_attn.v_proj"])

    def _head_norm(self, x: Value, layer: dict[str, Any], name: str) -> Value:
        if name not in layer:
            return x
        weight, shape = layer[name]
        return self.norm(x, weight, shape[-1])

    def _rotate(self, x: Value) -> Value:
        """x * cos + rotate_half(x) * sin, in the wider type of x and of the embeddings, which cos and sin have."""
        width = max(x.width, self.embedding.width)
        first = self._times_angle(x, width)
        half = self._half(x)
        second = self._times_angle(half, width)
        del half
        return self.do.add(first, second)

    def _times_angle(self, x: Value, width: float) -> Value:
        elements, before = x.elements, x.width

        def back(g: Value) -> Sequence[Value | None]:
            made = self.do.gradient(elements, width)
            return [made if before == width else self.do.gradient(elements, before)]

        return self.do.made(self.do.new(elements, width), [x], back)

    def _half(self, x: Value) -> Value:
        do, elements, width = self.do, x.elements, x.width
        negative = do.new(elements // 2, width)

        def back(g: Value) -> Sequence[Value | None]:
            flipped = do.gradient(elements // 2, width)
            one = do.gradient(elements, width)
            del flipped
            two = do.gradient(elements, width)
            _ = two
            return [one]

        y = do.made(do.new(elements, width), [x], back)
        del negative
        return y

    def _repeat(self, x: Value, groups: int) -> Value:
        """Keys or values for every query; of a single key, a view does."""
        elements, width = x.elements, x.width
        more = elements * groups
        y = Value(x.storage, more, width) if groups == self.heads else self.do.new(more, width)
        return self.do.made(y, [x], lambda g: [self.do.gradient(elements, width)])

    def _fused(self, q: Value, k: Value, v: Value, batch: int, mask: Value | None) -> Value:
        """Flash or memory-efficient attention: q, k, v, the output and the log-sum-exp are kept."""
        do, setup = self.do, self.setup
        width = self.do.compute or q.width
        q, k, v = do.to(q, width), do.to(k, width), do.to(v, width)
        rows = q.elements // (self.heads * self.head_dim)
        bias = None
        if mask is not None:
            bias = do.ledger.new(mask.elements, q.width, "attention masks as numbers")
        out = do.new(q.elements, q.width)
        lse = do.new(rows * self.heads, 4)
        kept = out.view()
        length = rows if setup.packed else setup.length
        rounded = rows // length * math.ceil(length / 128) * 128 * self.heads

        def back(g: Value) -> Sequence[Value | None]:
            _ = q, k, v, kept, lse, bias
            made = [do.gradient(x.elements, x.width) for x in (q, k, v)]
            expanded = [q.bytes] * 2 if k.elements < q.elements else []
            do.ledger.borrow("attention's own buffers", rounded * 4, rounded * self.head_dim * 4, *expanded)
            return made

        return do.made(out, [q, k, v], back)

    def _eager(self, q: Value, k: Value, v: Value, batch: int, mask: Value | None) -> Value:
        """Scores of every pair of positions, in 16 bits and in float32 (eager_attention_forward)."""
        do, setup = self.do, self.setup
        do.label = "attention scores"
        length = batch * setup.length if setup.packed else setup.length
        pairs = (1 if setup.packed else batch) * self.heads * length * length
        rows = q.elements // (self.heads * self.head_dim)
        scores = self._product(q, k, pairs)
        scores = do.scale(scores)
        if self.traits.soft_caps:
            scores = do.scale(do.function_of_result(do.scale(scores)))
        if mask is not None or length > 1:
            scores = do.copied(scores)
        weights = self._softmax(scores)
        del scores
        weights = do.to(weights, q.width)
        do.label = "queries, keys, values, attention output"
        out = self._product(weights, v, rows * self.heads * self.head_dim)
        return do.copied(out)  # transposed and made contiguous

    def _product(self, a: Value, b: Value, elements: int) -> Value:
        do = self.do
        if do.compute:
            a, b = do.to(a, do.compute), do.to(b, do.compute)

        def back(g: Value) -> Sequence[Value | None]:
            return [do.gradient(x.elements, x.width) for x in (a, b)]

        return do.made(do.new(elements, a.width), [a, b], back)

    def _softmax(self, x: Value) -> Value:
        do, width = self.do, x.width
        y = do.new(x.elements, 4)
        kept = y.view()

        def back(g: Value) -> Sequence[Value | None]:
            _ = kept
            return [do.gradient(g.elements, width)]

        return do.made(y, [x], back)

    # --- feed-forward ---------------------------------------------------------------------------

    def _feed_forward(self, h: Value, layer: dict[str, Any]) -> Value:
        do = self.do
        if "mlp.experts.gate_up_proj" in layer:
            return self._experts(h, layer)
        if "mlp.gate_up_proj" in layer:
            both = self.project(h, layer["mlp.gate_up_proj"], "gate, up and activation")
            gate, up = (do.slice(both, both.elements // 2) for _ in range(2))
            del both
            do.label = "gate, up and activation"
            product = do.times(up, do.function(gate))
        else:
            gate = self.project(h, layer["mlp.gate_proj"], "gate, up and activation")
            do.label = "gate, up and activation"
            gate = do.function(gate) if "swiglu" not in self.setup.stack.kernels else gate
            up = self.project(h, layer["mlp.up_proj"], "gate, up and activation")
            do.label = "gate, up and activation"
            product = do.times(gate, up)
        del gate, up, h
        return self.project(product, layer["mlp.down_proj"], "hidden states")

    def _experts(self, h: Value, layer: dict[str, Any]) -> Value:
        """Experts by grouped products: every token once for each of its experts (transformers/integrations/moe.py)."""
        do = self.do
        weight, shape = layer["mlp.experts.gate_up_proj"]
        down, _ = layer["mlp.experts.down_proj"]
        experts, inner = shape[0], shape[1] // 2
        size = self.hidden_size
        tokens = h.elements // size
        rows = tokens * self.experts_per_token
        scores = self._route(h, tokens, experts)
        do.label = "tokens sorted by expert"
        chosen = self._gather(h, rows * size)
        both = do.linear(chosen, weight, 2 * inner, size)
        del chosen
        do.label = "gate, up and activation"
        gate, up = (do.slice(both, both.elements // 2) for _ in range(2))
        del both
        product = do.times(do.function(gate), up)
        del gate, up
        do.label = "experts' outputs"
        out = do.linear(product, down, size, inner)
        del product
        weighted = do.times(out, scores)
        del out, scores
        sorted_back = self._gather(weighted, rows * size)
        del weighted
        return do.made(
            do.new(tokens * size, h.width), [sorted_back], lambda g: [Value(g.storage, rows * size, g.width)]
        )

    def _route(self, h: Value, tokens: int, experts: int) -> Value:
        """Each token's weights for its experts: a softmax over all, in float32."""
        do = self.do
        do.label = "router"
        width, rows = h.width, tokens * self.experts_per_token
        logits = do.new(tokens * experts, width)
        probabilities = do.new(tokens * experts, 4)
        positions = do.new(3 * rows, 8)
        del logits

        def back(g: Value) -> Sequence[Value | None]:
            _ = probabilities, positions
            do.ledger.borrow("router", tokens * experts * 4, tokens * experts * 4, tokens * experts * width)
            return [do.gradient(tokens * self.hidden_size, width)]

        return do.made(do.new(rows, width), [h], back)

    def _gather(self, x: Value, elements: int) -> Value:
        do, before, width = self.do, x.elements, x.width
        return do.made(do.new(elements, width), [x], lambda g: [do.gradient(before, width)])

    # --- linear layers --------------------------------------------------------------------------

    def project(self, x: Value, linear: Linear, label: str = "queries, keys, values, attention output") -> Value:
        """A linear layer with its adapter."""
        do = self.do
        do.label = label
        y = self._quantized(x, linear) if linear.dequantized else do.linear(x, linear.weight, linear.out, linear.inputs)
        if linear.down is None or linear.up is None:
            return y
        width = y.width
        if linear.dequantized:
            y = do.copied(y)  # PEFT clones the output of a quantized layer
        if linear.magnitude is not None:
            return self._decomposed(x, y, linear)
        do.label = "adapters' inputs"
        if not (linear.dequantized and do.compute):
            x = do.to(x, linear.down.width)
        low = do.linear(self._dropped(x), linear.down, linear.rank, linear.inputs)
        do.label = "adapters' outputs"
        update = do.scale(do.linear(low, linear.up, linear.out, linear.rank))
        del low
        if linear.dequantized and not do.compute:
            update = do.to(update, width)
        do.label = label
        y = do.add(y, update)
        return do.to(y, width)

    def _quantized(self, x: Value, linear: Linear) -> Value:
        do = self.do
        kwargs = self.setup.quantization or {}
        before = x.width
        compute = BYTES[kwargs.get("bnb_4bit_compute_dtype", self.setup.dtype)]
        x = do.to(x, compute)
        rows = x.elements // linear.inputs
        # a fused kernel serves few rows; 8-bit products never make the weight in the forward pass
        makes = linear.bits == 4 and (rows > FUSED_ROWS or not do.cuda)
        given = x if linear.bits == 8 else None  # kept as it was
        if linear.bits == 8:
            half = 2 * x.elements if self.setup.dtype == "bfloat16" else 0
            do.ledger.borrow("8-bit input and product", half, x.elements, rows * linear.out * 4)
        elif makes:
            do.ledger.borrow("dequantized weight", linear.dequantized)
        y = do.new(rows * linear.out, compute)
        flows = x.needs
        inputs = linear.inputs

        def back(g: Value) -> Sequence[Value | None]:
            _ = given
            if not flows:
                return [None]
            buffer = do.ledger.new(1, linear.dequantized, "dequantized weight")
            result = do.gradient(rows * inputs, compute)
            del buffer
            return [result]

        return do.to(do.made(y, [x], back), before)

    def _decomposed(self, x: Value, y: Value, linear: Linear) -> Value:
        """DoRA: the norms of base and update need both as whole matrices (peft/tuners/lora/dora.py, variants.py).

        With dropout the base's product is made again, from the dropped input and a copy of the weight that is kept.
        """
        do, width = self.do, y.width
        assert linear.down is not None
        assert linear.up is not None
        do.label = "adapters' inputs"
        x = x if linear.dequantized and do.compute else do.to(x, linear.down.width)
        drops = self.setup.adapter.drops and do.training
        given, x = x, do.dropout(x) if drops else x
        size = linear.out * linear.inputs
        product = do.compute or linear.down.width
        do.label = "DoRA's whole matrices"
        identity = do.new(linear.inputs**2, linear.down.width)
        identity = identity if product == linear.down.width else do.new(linear.inputs**2, product)
        delta = do.new(size, product)
        delta = delta if product == x.width else do.new(size, x.width)
        weight = None
        if linear.dequantized or linear.weight.width != x.width:
            weight = do.new(size, x.width)
        scaled = do.new(size, x.width)
        total = do.new(size, x.width)
        del scaled, total
        do.label = "adapters' outputs"
        low = do.linear(x, linear.down, linear.rank, linear.inputs)
        update = do.linear(low, linear.up, linear.out, linear.rank)
        del low
        do.label = "DoRA's products"
        base = self._again(x, linear, weight) if drops else y
        magnitude = do.made(do.new(linear.out, 4), [Anchor()], lambda g: [None])
        first = do.times(magnitude, base)
        del base
        second = do.scale(do.times(magnitude, update))
        del update
        both = do.add(first, second)
        del first, second
        y = do.add(y, both)
        del given, identity, delta, weight  # the update's matrix is not detached: what made it stays until here
        return y if linear.dequantized and do.compute else do.to(y, width)  # magnitudes are float32: so is the result

    def _again(self, x: Value, linear: Linear, weight: Value | None) -> Value:
        """The base's product with a copy of its weight, which the backward pass needs."""
        do = self.do
        kept = weight
        if do.compute and weight is not None and weight.width != do.compute:
            do.label = "DoRA's whole matrices"
            kept = do.new(weight.elements, do.compute)
        do.label = "DoRA's products"
        given = do.to(x, do.compute) if do.compute else x
        rows, width = x.elements // linear.inputs, given.width

        def back(g: Value) -> Sequence[Value | None]:
            _ = kept
            return [do.gradient(rows * linear.inputs, width)]

        return do.made(do.new(rows * linear.out, width), [given], back)

    def _dropped(self, x: Value) -> Value:
        return self.do.dropout(x) if self.do.training and self.setup.adapter.drops else x


def _weights_first(tensors: dict[str, Tensor]) -> list[tuple[str, Tensor]]:
    """Tensors in their order, but each module's weight before its bias, which headers have in order of name."""
    places: dict[str, int] = {}
    for place, name in enumerate(tensors):
        places.setdefault(name.rpartition(".")[0], place)
    return sorted(tensors.items(), key=lambda item: (places[item[0].rpartition(".")[0]], item[0].endswith(".bias")))
