"""What the closed form's terms are, in words and formulas."""

from __future__ import annotations

from lorafit.memory.setup import Setup
from lorafit.memory.static import trained, why_states
from lorafit.memory.types import Term

_LLAMA = "transformers/models/llama/modeling_llama.py"
WHY = {
    "hidden states": ("a layer's input: tokens x hidden_size x {width} bytes{layers}", _LLAMA),
    "norms, in float32": ("each norm keeps its input in float32: tokens x hidden_size x 4 bytes", _LLAMA),
    "norms": ("a number for each row of a fused norm", "liger_kernel/ops/rms_norm.py"),
    "final norm": ("its input in float32: tokens x hidden_size x 4 bytes", _LLAMA),
    "queries, keys, values, attention output": (
        "what attention keeps: tokens x (2 x heads + 2 x key heads) x head_dim x {width} bytes a layer",
        "aten/native/transformers/cuda",
    ),
    "attention scores": ("eager attention: batch x heads x length x length, as computed and in float32", _LLAMA),
    "attention masks as numbers": (
        "batch x length x length x {width} bytes in each layer: torch's sdpa turns a boolean mask into numbers",
        "aten/native/transformers/attention.cpp: convert_boolean_attn_mask",
    ),
    "attention's own buffers": (
        "the backward kernel adds up the queries' gradient in float32",
        "flash_attn/flash_api.cpp: mha_bwd",
    ),
    "positions and masks": ("cosines, sines and the mask of positions", "transformers/masking_utils.py"),
    "gate, up and activation": ("three tensors of tokens x intermediate_size x {width} bytes a layer", _LLAMA),
    "tokens sorted by expert": ("a copy of each token for each of its experts", "transformers/integrations/moe.py"),
    "experts' outputs": ("one for each token and expert", "transformers/integrations/moe.py"),
    "router": ("tokens x experts", "transformers/integrations/moe.py"),
    "adapters' inputs": (
        "a copy of the layer's input for each target, dropped out and in the type of the product",
        "peft/tuners/lora/layer.py: Linear.forward",
    ),
    "adapters' outputs": ("tokens x outputs, until they are added", "peft/tuners/lora/layer.py"),
    "DoRA's whole matrices": (
        "base and update of a layer as matrices, for their norms; with dropout a copy of the weight stays",
        "peft/tuners/lora/dora.py",
    ),
    "DoRA's products": ("tokens x outputs of base and update, kept for the magnitudes", "peft/tuners/lora/dora.py"),
    "dropout masks": ("a {mask} for each number of an adapter's input", "aten/native/cuda/Dropout.cu"),
    "dequantized weight": (
        "one weight at a time in 16 bits, for products of more than 1536 rows and in the backward pass",
        "bitsandbytes/backends/cuda/ops.py",
    ),
    "8-bit input and product": ("a layer's input in 8 bits, its product in 32", "bitsandbytes/autograd/_functions.py"),
    "weights cast by autocast": ("copies of trained weights in 16 bits", "aten/autocast_mode.cpp: cached_cast"),
    "supervised positions": ("their hidden states, copied for the head", "trl/trainer/utils.py: add_fused_lm_head"),
    "tile of logits": ("at most 4096 x 32768 logits at once", "trl/kernels/chunked_logprob.py"),
    "logits": ("tokens x vocabulary, as computed and in float32", "transformers/loss/loss_utils.py"),
    "output head's gradient, in float32": ("vocabulary x hidden_size x 4 bytes", "trl/kernels/chunked_logprob.py"),
    "gradients of activations": ("what flows back through a layer at this moment", "torch's autograd engine"),
    "optimizer's temporary copies": ("one of each trained number", "torch/optim/_multi_tensor"),
    "cuBLAS workspace": ("kept for matrix products", "aten/cuda/CublasHandlePool.cpp"),
    "gathered weights": ("a layer's and the next one's, and those outside the layers", "torch/distributed/fsdp"),
    "a second layer's activations": ("held until the next layer is through, as measured FSDP runs show", ""),
    "gradients to be sent": ("DDP's buckets: a copy of the gradients", "torch/nn/parallel/distributed.py"),
    "loss": ("a number", ""),
}


def explained(name: str, size: int, setup: Setup) -> Term:
    if name == "adapter":
        count = sum(tensor.size for tensor in trained(setup))
        return Term(name, size, f"{count:,} parameters in {setup.adapter_dtype}", "peft/tuners/lora/layer.py")
    if name == "gradients":
        return Term(name, size, "one for each trained number, in its type", "torch's autograd engine")
    if name == "optimizer states":
        return Term(name, size, why_states(setup.optimizer), "torch/optim, bitsandbytes/optim")
    text, source = WHY[name]
    kept = setup.checkpointing != "none"
    return Term(
        name,
        size,
        text.format(
            width=4 if setup.dtype == "float32" else 2,
            layers=", kept for every layer" if kept else ", added to in every layer",
            mask="byte" if setup.device == "cuda" else "number",
        ),
        source,
    )
