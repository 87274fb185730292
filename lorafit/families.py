"""Model families by transformers' model types: layers, GGUF and PEFT names of each, in one entry.

A family that is not here still trains: its tensors are told from safetensors headers, and the rest is as usual.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from typing import Any, Literal

_HEAD = "lm_head vocab_size,hidden_size ?!tie_word_embeddings"


@dataclass(frozen=True)
class LayerTraits:
    """How a family's layers differ from Llama's, where the memory of their activations is known in closed form.

    Attributes:
        norms: where they stand: before attention and feed-forward, after them, or both.
        wide_norm: whether a norm multiplies by its weight before it goes back to 16 bits, as Gemma's does.
        scales_embeddings: whether embeddings are multiplied by a number.
        scales_residuals: whether embeddings and what is added to the hidden states are multiplied by a number.
        soft_caps: whether scores and logits are capped.
    """

    norms: Literal["before", "after", "around"] = "before"
    wide_norm: bool = False
    scales_embeddings: bool = False
    scales_residuals: bool = False
    soft_caps: bool = False


@dataclass(frozen=True)
class Gguf:
    """A family in GGUF files.

    Attributes:
        read: the architecture that is read as this family; empty for one that transformers doesn't dequantize.
        head_dim: the key from which transformers takes head_dim (integrations/ggml.py); empty: it takes its default.
        written: the architecture as which lorafit writes the family; empty for one that it doesn't write.
        written_class: the class of transformers whose models are written.
        slides: whether attention slides over `sliding_window` unless the configuration says otherwise.
        neighbours: whether llama.cpp rotates neighbours in a head (LLAMA_ROPE_TYPE_NORM), where transformers rotates
            halves, so that rows change their order.
        biases: whether llama.cpp reads biases.
        square: whether it takes all heads together to be as wide as the model.
        head: whether it reads an output head of its own: `own` always, `tied` never, `either` where there is one.
        activation: of the MLP, by transformers' name.
        norm_shift: what is added to the norms' weights, where transformers adds it as it runs.
        period: the layer after each `period - 1` sliding ones sees everything; 0 without such a pattern.
        local_base: base of the rotations in sliding layers, which no key says; 0 where it is that of the others.
        large: layers of the model whose queries are scaled by its width and not by the size of its heads.
        figures: keys of config.json that must be there, and what they are called behind the architecture's name.
        refused: keys of config.json that llama.cpp has no answer to.
        runs_windowless: whether llama.cpp runs it without the sliding window that the file says.
        rope: what rotations may be besides: `longrope`, and `partial`, of a part of each head.
    """

    read: str = ""
    head_dim: str = ""
    written: str = ""
    written_class: str = ""
    slides: bool = False
    neighbours: bool = False
    biases: bool = False
    square: bool = False
    head: str = "either"
    activation: str = "silu"
    norm_shift: float = 0.0
    period: int = 0
    local_base: float = 0.0
    large: int = 0
    figures: Mapping[str, str] = field(default_factory=dict)
    refused: tuple[str, ...] = ()
    runs_windowless: bool = False
    rope: tuple[str, ...] = ()


@dataclass(frozen=True)
class Family:
    """A family of models.

    Tensors are described one a line: `name sizes`, then `+key` for a bias and `?key` for a condition. A name stands for
    a module with a weight, `=name` for a parameter itself, and `name[key]` for as many modules as the key says. Sizes
    are sums of products of configuration keys and of the lengths that `facts.layouts` adds; conditions are keys that
    are true or false, and `!` turns one round.

    Attributes:
        layer: tensors of each layer; empty where they are not known without safetensors headers.
        before: of what comes before the layers.
        after: of what comes after them.
        layers: where the layers are.
        defaults: what keys mean that config.json leaves out, as transformers' class has it.
        vision: what sees, in front of a multimodal family's layers.
        text: the family of the language model, where AutoModelForCausalLM loads that only.
        stored: parts of tensors' names in files, and what they are in the model that transformers loads.
        traits: for memory in closed form; None where only a trace tells it.
        gguf: names in GGUF files.
        sdpa: whether every transformers that may be installed runs it with sdpa, which has no soft caps or sinks.
        plain_linear: whether its linear layers are torch's own class, which alone bitsandbytes replaces.
        last_linear: the last linear layer, where no norm or head may follow: transformers keeps a model's last module.
        peft_targets: what PEFT adapts if nothing is asked for, where it is not query and value.
    """

    layer: str = ""
    before: str = "model.embed_tokens vocab_size,hidden_size"
    after: str = f"model.norm hidden_size\n{_HEAD}"
    layers: str = "model.layers"
    defaults: Mapping[str, Any] = field(default_factory=dict)
    vision: Family | None = None
    text: str = ""
    stored: Mapping[str, str] = field(default_factory=dict)
    traits: LayerTraits | None = None
    gguf: Gguf = Gguf()
    sdpa: bool = True
    plain_linear: bool = True
    last_linear: str = ""
    peft_targets: tuple[str, ...] = ()


def family_of(model_type: str) -> Family:
    """The family of a model type; one that says nothing for a type that is not known."""
    return FAMILIES.get(model_type, _UNKNOWN)


_UNKNOWN = Family()


def _attention(qkv_bias: str = "+attention_bias", bias: str = "+attention_bias", out: str = "o_proj") -> str:
    return f"""
        self_attn.q_proj queries,hidden_size {qkv_bias}
        self_attn.k_proj keys,hidden_size {qkv_bias}
        self_attn.v_proj keys,hidden_size {qkv_bias}
        self_attn.{out} hidden_size,queries {bias}
    """


def _mlp(name: str = "mlp", inner: str = "intermediate_size", rest: str = "") -> str:
    return f"""
        {name}.gate_proj {inner},hidden_size {rest}
        {name}.up_proj {inner},hidden_size {rest}
        {name}.down_proj hidden_size,{inner} {rest}
    """


def _experts(inner: str = "intermediate_size", router: str = "mlp.gate", rest: str = "") -> str:
    experts = f"{router.partition('.')[0]}.experts"
    return f"""
        {router} num_experts,hidden_size {rest}
        ={experts}.gate_up_proj num_experts,2*{inner},hidden_size {rest}
        ={experts}.down_proj num_experts,hidden_size,{inner} {rest}
    """


def _norms(*names: str, bias: str = "") -> str:
    return "".join(f"\n{name} hidden_size {bias}\n" for name in names)


_TWO_NORMS = _norms("input_layernorm", "post_attention_layernorm")
_TWO_NORMS_WITH_BIAS = _norms("input_layernorm", "post_attention_layernorm", bias="+yes")
_POST_NORMS = _norms("post_attention_layernorm", "post_feedforward_layernorm")
_FOUR_NORMS = _TWO_NORMS + _norms("pre_feedforward_layernorm", "post_feedforward_layernorm")
_HEAD_NORMS = """
    self_attn.q_norm head_dim
    self_attn.k_norm head_dim
"""
_WHOLE_NORMS = """
    self_attn.q_norm queries
    self_attn.k_norm keys
"""
_OLMOE_NORMS = """
    self_attn.q_norm hidden_size
    self_attn.k_norm num_key_value_heads*whole_head
"""
_LLAMA = _attention() + _mlp(rest="+mlp_bias") + _TWO_NORMS
_MISTRAL = _attention("", "") + _mlp() + _TWO_NORMS
_QWEN3_ATTENTION = _attention() + _HEAD_NORMS
_GEMMA3 = _QWEN3_ATTENTION + _mlp() + _FOUR_NORMS
_GEMMA = _attention() + _mlp()
_FUSED_MLP = """
    mlp.gate_up_proj 2*intermediate_size,hidden_size
    mlp.down_proj hidden_size,intermediate_size
"""
_GLM = _attention(bias="") + _FUSED_MLP + _TWO_NORMS
_COHERE = _attention() + _mlp() + _norms("input_layernorm")
_LATENT_ATTENTION = """
    self_attn.q_proj num_attention_heads*qk_head_dim,hidden_size ?!q_lora_rank
    self_attn.q_a_proj q_lora_rank,hidden_size +attention_bias ?q_lora_rank
    self_attn.q_a_layernorm q_lora_rank ?q_lora_rank
    self_attn.q_b_proj num_attention_heads*qk_head_dim,q_lora_rank ?q_lora_rank
    self_attn.kv_a_proj_with_mqa kv_lora_rank+qk_rope_head_dim,hidden_size +attention_bias
    self_attn.kv_a_layernorm kv_lora_rank
    self_attn.kv_b_proj num_attention_heads*qk_nope_head_dim+num_attention_heads*v_head_dim,kv_lora_rank
    self_attn.o_proj hidden_size,num_attention_heads*v_head_dim +attention_bias
"""
_SPARSE = _mlp(rest="?!sparse") + _experts("moe_intermediate_size", rest="?sparse")
_SHARED_EXPERTS = _mlp("mlp.shared_experts", "n_shared_experts*moe_intermediate_size", "?sparse")
_CORRECTION = "=mlp.gate.e_score_correction_bias num_experts ?sparse"
_LATENT = {"kv_lora_rank": 512, "q_lora_rank": 1536, "qk_rope_head_dim": 64, "qk_nope_head_dim": 128, "v_head_dim": 128}
_KEYS, _VALUES = "linear_num_key_heads*linear_key_head_dim", "linear_num_value_heads*linear_value_head_dim"
_GATED_ATTENTION = f"""
    self_attn.q_proj 2*queries,hidden_size +attention_bias ?!linear
    self_attn.k_proj keys,hidden_size +attention_bias ?!linear
    self_attn.v_proj keys,hidden_size +attention_bias ?!linear
    self_attn.o_proj hidden_size,queries +attention_bias ?!linear
    self_attn.q_norm head_dim ?!linear
    self_attn.k_norm head_dim ?!linear
    =linear_attn.dt_bias linear_num_value_heads ?linear
    =linear_attn.A_log linear_num_value_heads ?linear
    linear_attn.conv1d 2*{_KEYS}+{_VALUES},1,linear_conv_kernel_dim ?linear
    linear_attn.norm linear_value_head_dim ?linear
    linear_attn.out_proj hidden_size,{_VALUES} ?linear
"""
_QWEN35_ATTENTION = f"""
    {_GATED_ATTENTION}
    linear_attn.in_proj_qkv 2*{_KEYS}+{_VALUES},hidden_size ?linear
    linear_attn.in_proj_z {_VALUES},hidden_size ?linear
    linear_attn.in_proj_b linear_num_value_heads,hidden_size ?linear
    linear_attn.in_proj_a linear_num_value_heads,hidden_size ?linear
"""
_QWEN_EXPERTS = (
    _experts("moe_intermediate_size", rest="?sparse")
    + _mlp("mlp.shared_expert", "shared_expert_intermediate_size", "?sparse")
    + "mlp.shared_expert_gate 1,hidden_size ?sparse"
)
_LINEAR_DEFAULTS = {
    "head_dim": 256,
    "linear_conv_kernel_dim": 4,
    "linear_key_head_dim": 128,
    "linear_value_head_dim": 128,
    "linear_num_key_heads": 16,
    "linear_num_value_heads": 32,
    "full_attention_interval": 4,
}
_SMALL_EXPERTS = {"moe_intermediate_size": 512, "shared_expert_intermediate_size": 512}
_NEOX_MLP = """
    mlp.dense_h_to_4h intermediate_size,hidden_size +{bias}
    mlp.dense_4h_to_h hidden_size,intermediate_size +{bias}
"""
_GEMMA_DEFAULTS = {"tie_word_embeddings": True, "head_dim": 256}
_GEMMA2_DEFAULTS = {
    **_GEMMA_DEFAULTS,
    "num_key_value_heads": 4,
    "rms_norm_eps": 1e-6,
    "query_pre_attn_scalar": 256,
    "sliding_window": 4096,
}
_GEMMA3_DEFAULTS = {**_GEMMA2_DEFAULTS, "max_position_embeddings": 131072, "rope_theta": 1e6}
_GEMMA3_TRAITS = LayerTraits("around", wide_norm=True, scales_embeddings=True)
_GEMMA_GGUF = Gguf(
    head_dim="attention.key_length",
    activation="gelu_pytorch_tanh",
    norm_shift=1.0,
    refused=("use_bidirectional_attention",),
)
_GEMMA3_GGUF = replace(
    _GEMMA_GGUF,
    read="gemma3",
    written="gemma3",
    written_class="Gemma3ForCausalLM",
    period=6,
    local_base=10000.0,
    large=62,
    refused=("use_bidirectional_attention", "attn_logit_softcapping", "final_logit_softcapping"),
)
_GLM_DEFAULTS = {"num_key_value_heads": 2, "head_dim": 128, "attention_bias": True}
_BARE = {name: f"transformer.{name}" for name in ("wte.", "wpe.", "h.", "ln_f.", "word_embeddings")}
_SIGLIP = Family(
    """
    layer_norm1 hidden_size +yes
    self_attn.k_proj hidden_size,hidden_size +yes
    self_attn.v_proj hidden_size,hidden_size +yes
    self_attn.q_proj hidden_size,hidden_size +yes
    self_attn.out_proj hidden_size,hidden_size +yes
    layer_norm2 hidden_size +yes
    mlp.fc1 intermediate_size,hidden_size +yes
    mlp.fc2 hidden_size,intermediate_size +yes
    """,
    before="""
    model.vision_tower.embeddings.patch_embedding hidden_size,num_channels,patch_size,patch_size +yes
    model.vision_tower.embeddings.position_embedding patches*patches,hidden_size
    """,
    after="""
    model.vision_tower.post_layernorm hidden_size +yes
    =model.vision_tower.head.probe 1,1,hidden_size ?vision_use_head
    =model.vision_tower.head.attention.in_proj_weight 3*hidden_size,hidden_size ?vision_use_head
    =model.vision_tower.head.attention.in_proj_bias 3*hidden_size ?vision_use_head
    model.vision_tower.head.attention.out_proj hidden_size,hidden_size +yes ?vision_use_head
    model.vision_tower.head.layernorm hidden_size +yes ?vision_use_head
    model.vision_tower.head.mlp.fc1 intermediate_size,hidden_size +yes ?vision_use_head
    model.vision_tower.head.mlp.fc2 hidden_size,intermediate_size +yes ?vision_use_head
    =model.multi_modal_projector.mm_input_projection_weight hidden_size,text_hidden_size
    model.multi_modal_projector.mm_soft_emb_norm hidden_size
    """,
    layers="model.vision_tower.encoder.layers",
    defaults={"num_channels": 3, "image_size": 224, "patch_size": 16, "vision_use_head": True},
)

FAMILIES: dict[str, Family] = {
    "llama": Family(
        _LLAMA,
        traits=LayerTraits(),
        gguf=Gguf("llama", "rope.dimension_count", "llama", "LlamaForCausalLM", neighbours=True, biases=True),
    ),
    "mistral": Family(
        _MISTRAL,
        defaults={"num_key_value_heads": 8},
        traits=LayerTraits(),
        gguf=Gguf(
            "mistral", "rope.dimension_count", "llama", "MistralForCausalLM", slides=True, neighbours=True, biases=True
        ),
    ),
    "ministral": Family(_MISTRAL, defaults={"num_key_value_heads": 8}),
    "ministral3": Family(_MISTRAL, defaults={"num_key_value_heads": 8, "head_dim": 128}),
    "mixtral": Family(
        _attention("", "") + _experts() + _TWO_NORMS,
        defaults={"num_key_value_heads": 8, "num_experts": 8},
        traits=LayerTraits(),
        stored={"block_sparse_moe.": "mlp."},
    ),
    "granite": Family(
        _LLAMA,
        traits=LayerTraits(scales_residuals=True),
        gguf=Gguf(
            written="granite",
            written_class="GraniteForCausalLM",
            neighbours=True,
            biases=True,
            figures={
                "attention_multiplier": "attention.scale",
                "embedding_multiplier": "embedding_scale",
                "residual_multiplier": "residual_scale",
                "logits_scaling": "logit_scale",
            },
        ),
    ),
    "granitemoe": Family(
        _attention() + _experts(router="block_sparse_moe.router") + _TWO_NORMS,
        defaults={"num_experts": 8},
        stored={
            "input_linear.weight": "experts.gate_up_proj",
            "output_linear.weight": "experts.down_proj",
            "router.layer.": "router.",
        },
    ),
    "smollm3": Family(_LLAMA, defaults={"num_key_value_heads": 4, "tie_word_embeddings": True}, traits=LayerTraits()),
    "qwen2": Family(
        _attention("+yes", "") + _mlp() + _TWO_NORMS,
        defaults={"num_key_value_heads": 32},
        traits=LayerTraits(),
        gguf=Gguf("qwen2", "", "qwen2", "Qwen2ForCausalLM", biases=True),
    ),
    "qwen2_moe": Family(
        _attention("+qkv_bias", "") + _mlp(rest="?!sparse") + _QWEN_EXPERTS + _TWO_NORMS,
        defaults={
            "num_key_value_heads": 16,
            "qkv_bias": True,
            "num_experts": 60,
            "moe_intermediate_size": 1408,
            "shared_expert_intermediate_size": 5632,
        },
    ),
    "qwen3": Family(
        _QWEN3_ATTENTION + _mlp() + _TWO_NORMS,
        defaults={"num_key_value_heads": 32, "head_dim": 128},
        traits=LayerTraits(),
        gguf=Gguf("qwen3", "", "qwen3", "Qwen3ForCausalLM"),
    ),
    "qwen3_moe": Family(
        _QWEN3_ATTENTION + _SPARSE + _TWO_NORMS,
        defaults={"num_key_value_heads": 4, "num_experts": 128, "moe_intermediate_size": 768},
        traits=LayerTraits(),
    ),
    "qwen3_next": Family(
        _GATED_ATTENTION
        + f"""
        linear_attn.in_proj_qkvz 2*{_KEYS}+2*{_VALUES},hidden_size ?linear
        linear_attn.in_proj_ba 2*linear_num_value_heads,hidden_size ?linear
        """
        + _mlp(rest="?!sparse")
        + _QWEN_EXPERTS
        + _TWO_NORMS,
        defaults={**_LINEAR_DEFAULTS, **_SMALL_EXPERTS, "num_key_value_heads": 2, "num_experts": 512},
    ),
    "qwen3_5_text": Family(
        _QWEN35_ATTENTION + _mlp() + _TWO_NORMS, defaults={**_LINEAR_DEFAULTS, "num_key_value_heads": 4}
    ),
    "qwen3_5_moe_text": Family(
        _QWEN35_ATTENTION + _QWEN_EXPERTS + _TWO_NORMS,
        defaults={**_LINEAR_DEFAULTS, **_SMALL_EXPERTS, "num_key_value_heads": 2, "num_experts": 256},
    ),
    "gemma": Family(
        _GEMMA + _TWO_NORMS,
        defaults={**_GEMMA_DEFAULTS, "num_key_value_heads": 16},
        traits=LayerTraits(wide_norm=True, scales_embeddings=True),
    ),
    "gemma2": Family(
        _GEMMA + _FOUR_NORMS,
        defaults=_GEMMA2_DEFAULTS,
        traits=replace(_GEMMA3_TRAITS, soft_caps=True),
        gguf=replace(
            _GEMMA_GGUF,
            read="gemma2",
            written="gemma2",
            written_class="Gemma2ForCausalLM",
            head="tied",
            period=2,
            large=46,
            figures={
                "attn_logit_softcapping": "attn_logit_softcapping",
                "final_logit_softcapping": "final_logit_softcapping",
            },
        ),
        sdpa=False,
    ),
    "gemma3_text": Family(
        _GEMMA3,
        defaults=_GEMMA3_DEFAULTS,
        traits=_GEMMA3_TRAITS,
        gguf=_GEMMA3_GGUF,
    ),
    "gemma3": Family(
        _GEMMA3,
        before="model.language_model.embed_tokens vocab_size,hidden_size",
        after=f"model.language_model.norm hidden_size\n{_HEAD}",
        layers="model.language_model.layers",
        defaults={**_GEMMA3_DEFAULTS, "vocab_size": 262208, "num_attention_heads": 8},
        vision=_SIGLIP,
        gguf=replace(_GEMMA3_GGUF, read="", written_class="Gemma3ForConditionalGeneration"),
        stored={
            "language_model.model.": "model.language_model.",
            "language_model.lm_head.": "lm_head.",
            "vision_tower.vision_model.": "model.vision_tower.",
            "vision_tower.": "model.vision_tower.",
            "multi_modal_projector.": "model.multi_modal_projector.",
        },
    ),
    "phi": Family(
        _attention("+yes", "+yes", "dense")
        + """
        self_attn.q_layernorm whole_head +yes ?qk_layernorm
        self_attn.k_layernorm whole_head +yes ?qk_layernorm
        mlp.fc1 intermediate_size,hidden_size +yes
        mlp.fc2 hidden_size,intermediate_size +yes
        input_layernorm hidden_size +yes
        """,
        after=f"model.final_layernorm hidden_size +yes\n{_HEAD}\n=lm_head.bias vocab_size",
        peft_targets=("q_proj", "v_proj", "fc1", "fc2"),
    ),
    "phi3": Family(
        """
        self_attn.qkv_proj queries+2*keys,hidden_size
        self_attn.o_proj hidden_size,queries
        """
        + _FUSED_MLP
        + _TWO_NORMS,
        traits=LayerTraits(),
        gguf=Gguf(
            "phi3",
            "",
            "phi3",
            "Phi3ForCausalLM",
            slides=True,
            square=True,
            runs_windowless=True,
            rope=("partial", "longrope"),
        ),
    ),
    "olmo": Family(_attention() + _mlp(), after=_HEAD, last_linear="mlp.down_proj"),
    "olmo2": Family(
        _attention() + _WHOLE_NORMS + _mlp() + _POST_NORMS,
        traits=LayerTraits("after"),
        gguf=Gguf(written="olmo2", written_class="Olmo2ForCausalLM", square=True, head="own"),
    ),
    "olmo3": Family(_attention() + _WHOLE_NORMS + _mlp() + _POST_NORMS),
    "olmoe": Family(
        _attention() + _OLMOE_NORMS + _experts() + _TWO_NORMS,
        defaults={"num_experts": 64},
        traits=LayerTraits(),
    ),
    "exaone4": Family(_attention("", "") + _HEAD_NORMS + _mlp() + _POST_NORMS, defaults={"num_key_value_heads": 32}),
    "seed_oss": Family(
        _attention(bias="+attention_out_bias") + _mlp(rest="+mlp_bias") + _TWO_NORMS,
        defaults={"num_key_value_heads": 8, "head_dim": 128, "attention_bias": True},
    ),
    "cohere": Family(
        _COHERE
        + """
        self_attn.q_norm num_attention_heads,head_dim ?use_qk_norm
        self_attn.k_norm num_key_value_heads,head_dim ?use_qk_norm
        """,
        defaults={"tie_word_embeddings": True},
    ),
    "cohere2": Family(_COHERE, defaults={"tie_word_embeddings": True}),
    "glm": Family(_GLM, defaults=_GLM_DEFAULTS),
    "glm4": Family(_GLM + _norms("post_self_attn_layernorm", "post_mlp_layernorm"), defaults=_GLM_DEFAULTS),
    "glm4_moe": Family(
        _attention(bias="")
        + """
        self_attn.q_norm head_dim ?use_qk_norm
        self_attn.k_norm head_dim ?use_qk_norm
        """
        + _SPARSE
        + _CORRECTION
        + _SHARED_EXPERTS
        + _TWO_NORMS,
        defaults={
            "num_key_value_heads": 8,
            "num_experts": 128,
            "n_shared_experts": 1,
            "moe_intermediate_size": 1408,
            "first_k_dense_replace": 1,
        },
    ),
    "gpt_oss": Family(
        _attention()
        + """
        =self_attn.sinks num_attention_heads
        mlp.router num_experts,hidden_size +yes
        =mlp.experts.gate_up_proj num_experts,hidden_size,2*intermediate_size
        =mlp.experts.gate_up_proj_bias num_experts,2*intermediate_size
        =mlp.experts.down_proj num_experts,intermediate_size,hidden_size
        =mlp.experts.down_proj_bias num_experts,hidden_size
        """
        + _TWO_NORMS,
        defaults={"num_key_value_heads": 8, "head_dim": 64, "num_experts": 128, "attention_bias": True},
        sdpa=False,
    ),
    "deepseek_v2": Family(
        _LATENT_ATTENTION
        + _mlp(rest="+mlp_bias ?!sparse")
        + _experts("moe_intermediate_size", rest="?sparse")
        + _SHARED_EXPERTS.replace("?sparse", "+mlp_bias ?sparse")
        + _TWO_NORMS,
        defaults={**_LATENT, "num_experts": 64, "n_shared_experts": 2, "moe_intermediate_size": 1407},
    ),
    "deepseek_v3": Family(
        _LATENT_ATTENTION + _SPARSE + _CORRECTION + _SHARED_EXPERTS + _TWO_NORMS,
        defaults={
            **_LATENT,
            "num_experts": 256,
            "n_shared_experts": 1,
            "moe_intermediate_size": 2048,
            "first_k_dense_replace": 3,
        },
    ),
    "starcoder2": Family(
        _attention("+use_bias", "+use_bias")
        + """
        mlp.c_fc intermediate_size,hidden_size +use_bias
        mlp.c_proj hidden_size,intermediate_size +use_bias
        """
        + _TWO_NORMS_WITH_BIAS,
        after=f"model.norm hidden_size +yes\n{_HEAD}",
        defaults={"num_key_value_heads": 2, "use_bias": True, "tie_word_embeddings": True},
    ),
    "stablelm": Family(
        _attention("+use_qkv_bias", "")
        + """
        self_attn.q_layernorm.norms[num_attention_heads] whole_head ?qk_layernorm
        self_attn.k_layernorm.norms[num_key_value_heads] whole_head ?qk_layernorm
        input_layernorm hidden_size +yes
        post_attention_layernorm hidden_size +yes ?!use_parallel_residual
        """
        + _mlp(),
        after=f"model.norm hidden_size +yes\n{_HEAD}",
        defaults={"num_key_value_heads": 32},
    ),
    "gpt_neox": Family(
        """
        attention.query_key_value 3*hidden_size,hidden_size +attention_bias
        attention.dense hidden_size,hidden_size +attention_bias
        """
        + _NEOX_MLP.format(bias="yes")
        + _TWO_NORMS_WITH_BIAS,
        before="gpt_neox.embed_in vocab_size,hidden_size",
        after=f"gpt_neox.final_layer_norm hidden_size +yes\n{_HEAD}",
        layers="gpt_neox.layers",
        defaults={"attention_bias": True},
        stored={"embed_out.": "lm_head."},
        peft_targets=("query_key_value",),
    ),
    "falcon": Family(
        """
        self_attention.query_key_value queries+2*keys,hidden_size +bias
        self_attention.dense hidden_size,hidden_size +bias
        input_layernorm hidden_size +yes ?!two_norms
        ln_attn hidden_size +yes ?two_norms
        ln_mlp hidden_size +yes ?two_norms
        post_attention_layernorm hidden_size +yes ?!parallel_attn
        """
        + _NEOX_MLP.format(bias="bias"),
        before="transformer.word_embeddings vocab_size,hidden_size",
        after=f"transformer.ln_f hidden_size +yes\n{_HEAD}",
        layers="transformer.h",
        defaults={"tie_word_embeddings": True, "multi_query": True, "parallel_attn": True},
        plain_linear=False,
        peft_targets=("query_key_value",),
    ),
    "bloom": Family(
        """
        self_attention.query_key_value 3*hidden_size,hidden_size +yes
        self_attention.dense hidden_size,hidden_size +yes
        """
        + _NEOX_MLP.format(bias="yes")
        + _TWO_NORMS_WITH_BIAS,
        before="""
        transformer.word_embeddings vocab_size,hidden_size
        transformer.word_embeddings_layernorm hidden_size +yes
        """,
        after=f"transformer.ln_f hidden_size +yes\n{_HEAD}",
        layers="transformer.h",
        defaults={"tie_word_embeddings": True},
        stored=_BARE,
        sdpa=False,
        peft_targets=("query_key_value",),
    ),
    "gpt2": Family(
        """
        ln_1 hidden_size +yes
        attn.c_attn 3*hidden_size,hidden_size +yes
        attn.c_proj hidden_size,hidden_size +yes
        ln_2 hidden_size +yes
        mlp.c_fc intermediate_size,hidden_size +yes
        mlp.c_proj hidden_size,intermediate_size +yes
        """,
        before="transformer.wte vocab_size,hidden_size\ntransformer.wpe max_position_embeddings,hidden_size",
        after=f"transformer.ln_f hidden_size +yes\n{_HEAD}",
        layers="transformer.h",
        defaults={"tie_word_embeddings": True},
        stored=_BARE,
        peft_targets=("c_attn",),
    ),
    "opt": Family(
        """
        self_attn.k_proj hidden_size,hidden_size +enable_bias
        self_attn.v_proj hidden_size,hidden_size +enable_bias
        self_attn.q_proj hidden_size,hidden_size +enable_bias
        self_attn.out_proj hidden_size,hidden_size +enable_bias
        self_attn_layer_norm hidden_size +yes ?layer_norm_elementwise_affine
        fc1 ffn_dim,hidden_size +enable_bias
        fc2 hidden_size,ffn_dim +enable_bias
        final_layer_norm hidden_size +yes ?layer_norm_elementwise_affine
        """,
        before="""
        model.decoder.embed_tokens vocab_size,word_embed_proj_dim
        model.decoder.embed_positions max_position_embeddings+2,hidden_size
        model.decoder.project_out word_embed_proj_dim,hidden_size ?projected
        model.decoder.project_in hidden_size,word_embed_proj_dim ?projected
        """,
        after="""
        model.decoder.final_layer_norm hidden_size +yes ?layer_norm_elementwise_affine ?last_norm
        lm_head vocab_size,word_embed_proj_dim ?!tie_word_embeddings
        """,
        layers="model.decoder.layers",
        defaults={
            "tie_word_embeddings": True,
            "enable_bias": True,
            "layer_norm_elementwise_affine": True,
            "do_layer_norm_before": True,
        },
        last_linear="fc2",
        stored={"decoder.": "model.decoder."},
    ),
    "qwen3_5": Family(text="qwen3_5_text", stored={"model.language_model.": "model."}),
    "qwen3_5_moe": Family(text="qwen3_5_moe_text", stored={"model.language_model.": "model."}),
    "gpt_bigcode": Family(peft_targets=("c_attn",)),
    "codegen": Family(sdpa=False, peft_targets=("qkv_proj",)),
    "mpt": Family(sdpa=False, peft_targets=("Wqkv",)),
}
_NO_SDPA = (
    *("deepseek_v4", "falcon_mamba", "flint", "gpt_neo", "gpt_neox_japanese", "gptj", "granite_swa", "granitemoe_swa"),
    *("hy_v4", "inkling2_text", "mamba", "mamba2", "mimo_v2_flash", "openai-gpt", "rwkv", "vaultgemma", "xglm"),
)
FAMILIES |= dict.fromkeys(_NO_SDPA, Family(sdpa=False))
