"""The tensors of a decoder, by its family's layout in transformers."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from functools import cache
from math import prod
from typing import Any

from lorafit.errors import ModelError
from lorafit.facts.model import Tensor, text_config_of


def layout(config: dict[str, Any]) -> list[Tensor]:
    """The tensors of a decoder by its family's layout in transformers; empty for other families."""
    family = str(config.get("model_type"))
    try:
        if family in TOWERS:
            return list(_towers(config, TOWERS[family]))
        if family in TEXT_ONLY:
            return list(_decoder(_part(config, "text_config"), FAMILIES[TEXT_ONLY[family]]))
        return list(_decoder(config, FAMILIES[family])) if family in FAMILIES else []
    except KeyError as error:
        raise ModelError(f"the configuration of a {family} model has no {error}") from None
    except (TypeError, ValueError, IndexError, ZeroDivisionError) as error:
        raise ModelError(f"the configuration of a {family} model can't be right: {error}") from None


_HEAD = "lm_head vocab_size,hidden_size ?!tie_word_embeddings"


@dataclass(frozen=True)
class _Family:
    """A family's tensors, one a line: `name sizes`, then `+key` for a bias and `?key` for a condition.

    A name stands for a module with a weight, `=name` for a parameter itself, and `name[key]` for as
    many modules as the key says. Sizes are sums of products of configuration keys and of the
    lengths that `_Sizes` adds; conditions are true or false keys, `!` turns one round.

    Attributes:
        layer: of each layer.
        before: of what comes before the layers.
        after: of what comes after them.
        layers: where the layers are.
        defaults: what keys mean that config.json leaves out, as transformers' class has it.
    """

    layer: str
    before: str = "model.embed_tokens vocab_size,hidden_size"
    after: str = f"model.norm hidden_size\n{_HEAD}"
    layers: str = "model.layers"
    defaults: Mapping[str, Any] = field(default_factory=dict)


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
_GLM_DEFAULTS = {"num_key_value_heads": 2, "head_dim": 128, "attention_bias": True}

FAMILIES = {
    "llama": _Family(_LLAMA),
    "mistral": _Family(_MISTRAL, defaults={"num_key_value_heads": 8}),
    "ministral": _Family(_MISTRAL, defaults={"num_key_value_heads": 8}),
    "ministral3": _Family(_MISTRAL, defaults={"num_key_value_heads": 8, "head_dim": 128}),
    "mixtral": _Family(
        _attention("", "") + _experts() + _TWO_NORMS, defaults={"num_key_value_heads": 8, "num_experts": 8}
    ),
    "granite": _Family(_LLAMA),
    "granitemoe": _Family(
        _attention() + _experts(router="block_sparse_moe.router") + _TWO_NORMS, defaults={"num_experts": 8}
    ),
    "smollm3": _Family(_LLAMA, defaults={"num_key_value_heads": 4, "tie_word_embeddings": True}),
    "qwen2": _Family(_attention("+yes", "") + _mlp() + _TWO_NORMS, defaults={"num_key_value_heads": 32}),
    "qwen2_moe": _Family(
        _attention("+qkv_bias", "") + _mlp(rest="?!sparse") + _QWEN_EXPERTS + _TWO_NORMS,
        defaults={
            "num_key_value_heads": 16,
            "qkv_bias": True,
            "num_experts": 60,
            "moe_intermediate_size": 1408,
            "shared_expert_intermediate_size": 5632,
        },
    ),
    "qwen3": _Family(_QWEN3_ATTENTION + _mlp() + _TWO_NORMS, defaults={"num_key_value_heads": 32, "head_dim": 128}),
    "qwen3_moe": _Family(
        _QWEN3_ATTENTION + _mlp(rest="?!sparse") + _experts("moe_intermediate_size", rest="?sparse") + _TWO_NORMS,
        defaults={"num_key_value_heads": 4, "num_experts": 128, "moe_intermediate_size": 768},
    ),
    "qwen3_next": _Family(
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
    "qwen3_5_text": _Family(
        _QWEN35_ATTENTION + _mlp() + _TWO_NORMS, defaults={**_LINEAR_DEFAULTS, "num_key_value_heads": 4}
    ),
    "qwen3_5_moe_text": _Family(
        _QWEN35_ATTENTION + _QWEN_EXPERTS + _TWO_NORMS,
        defaults={**_LINEAR_DEFAULTS, **_SMALL_EXPERTS, "num_key_value_heads": 2, "num_experts": 256},
    ),
    "gemma": _Family(_GEMMA + _TWO_NORMS, defaults={**_GEMMA_DEFAULTS, "num_key_value_heads": 16}),
    "gemma2": _Family(_GEMMA + _FOUR_NORMS, defaults={**_GEMMA_DEFAULTS, "num_key_value_heads": 4}),
    "gemma3_text": _Family(
        _QWEN3_ATTENTION + _mlp() + _FOUR_NORMS, defaults={**_GEMMA_DEFAULTS, "num_key_value_heads": 4}
    ),
    "phi": _Family(
        _attention("+yes", "+yes", "dense")
        + """
        self_attn.q_layernorm whole_head +yes ?qk_layernorm
        self_attn.k_layernorm whole_head +yes ?qk_layernorm
        mlp.fc1 intermediate_size,hidden_size +yes
        mlp.fc2 hidden_size,intermediate_size +yes
        input_layernorm hidden_size +yes
        """,
        after=f"model.final_layernorm hidden_size +yes\n{_HEAD}\n=lm_head.bias vocab_size",
    ),
    "phi3": _Family(
        """
        self_attn.qkv_proj queries+2*keys,hidden_size
        self_attn.o_proj hidden_size,queries
        """
        + _FUSED_MLP
        + _TWO_NORMS
    ),
    "olmo": _Family(_attention() + _mlp(), after=_HEAD),
    "olmo2": _Family(_attention() + _WHOLE_NORMS + _mlp() + _POST_NORMS),
    "olmo3": _Family(_attention() + _WHOLE_NORMS + _mlp() + _POST_NORMS),
    "olmoe": _Family(_attention() + _OLMOE_NORMS + _experts() + _TWO_NORMS, defaults={"num_experts": 64}),
    "exaone4": _Family(_attention("", "") + _HEAD_NORMS + _mlp() + _POST_NORMS, defaults={"num_key_value_heads": 32}),
    "seed_oss": _Family(
        _attention(bias="+attention_out_bias") + _mlp(rest="+mlp_bias") + _TWO_NORMS,
        defaults={"num_key_value_heads": 8, "head_dim": 128, "attention_bias": True},
    ),
    "cohere": _Family(
        _COHERE
        + """
        self_attn.q_norm num_attention_heads,head_dim ?use_qk_norm
        self_attn.k_norm num_key_value_heads,head_dim ?use_qk_norm
        """,
        defaults={"tie_word_embeddings": True},
    ),
    "cohere2": _Family(_COHERE, defaults={"tie_word_embeddings": True}),
    "glm": _Family(_GLM, defaults=_GLM_DEFAULTS),
    "glm4": _Family(_GLM + _norms("post_self_attn_layernorm", "post_mlp_layernorm"), defaults=_GLM_DEFAULTS),
    "glm4_moe": _Family(
        _attention(bias="")
        + """
        self_attn.q_norm head_dim ?use_qk_norm
        self_attn.k_norm head_dim ?use_qk_norm
        """
        + _mlp(rest="?!sparse")
        + _experts("moe_intermediate_size", rest="?sparse")
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
    "gpt_oss": _Family(
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
    ),
    "deepseek_v2": _Family(
        _LATENT_ATTENTION
        + _mlp(rest="+mlp_bias ?!sparse")
        + _experts("moe_intermediate_size", rest="?sparse")
        + _SHARED_EXPERTS.replace("?sparse", "+mlp_bias ?sparse")
        + _TWO_NORMS,
        defaults={**_LATENT, "num_experts": 64, "n_shared_experts": 2, "moe_intermediate_size": 1407},
    ),
    "deepseek_v3": _Family(
        _LATENT_ATTENTION
        + _mlp(rest="?!sparse")
        + _experts("moe_intermediate_size", rest="?sparse")
        + _CORRECTION
        + _SHARED_EXPERTS
        + _TWO_NORMS,
        defaults={
            **_LATENT,
            "num_experts": 256,
            "n_shared_experts": 1,
            "moe_intermediate_size": 2048,
            "first_k_dense_replace": 3,
        },
    ),
    "starcoder2": _Family(
        _attention("+use_bias", "+use_bias")
        + """
        mlp.c_fc intermediate_size,hidden_size +use_bias
        mlp.c_proj hidden_size,intermediate_size +use_bias
        """
        + _TWO_NORMS_WITH_BIAS,
        after=f"model.norm hidden_size +yes\n{_HEAD}",
        defaults={"num_key_value_heads": 2, "use_bias": True, "tie_word_embeddings": True},
    ),
    "stablelm": _Family(
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
    "gpt_neox": _Family(
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
    ),
    "falcon": _Family(
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
    ),
    "bloom": _Family(
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
    ),
    "gpt2": _Family(
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
    ),
    "opt": _Family(
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
    ),
}
_SIGLIP = _Family(
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
_GEMMA3_LANGUAGE = _Family(
    FAMILIES["gemma3_text"].layer,
    before="model.language_model.embed_tokens vocab_size,hidden_size",
    after=f"model.language_model.norm hidden_size\n{_HEAD}",
    layers="model.language_model.layers",
    defaults={**FAMILIES["gemma3_text"].defaults, "vocab_size": 262208, "num_attention_heads": 8},
)
TOWERS = {"gemma3": (_SIGLIP, _GEMMA3_LANGUAGE)}
"""Multimodal families: what sees, and what reads its output and text."""
TEXT_ONLY = {"qwen3_5": "qwen3_5_text", "qwen3_5_moe": "qwen3_5_moe_text"}
"""Multimodal families of which AutoModelForCausalLM loads the language model only."""
_OTHER_KEYS = {
    "hidden_size": ("n_embd", "n_embed"),
    "intermediate_size": ("n_inner", "ffn_hidden_size"),
    "num_hidden_layers": ("n_layer",),
    "num_attention_heads": ("n_head",),
    "num_key_value_heads": ("num_kv_heads",),
    "num_experts": ("num_local_experts", "n_routed_experts"),
    "max_position_embeddings": ("n_positions",),
}
"""Other names of a key, by which some families' config.json has it."""
_MOST_MODULES = 1 << 14


class _Sizes:
    """The lengths and conditions that a family's lines name."""

    def __init__(self, config: dict[str, Any], family: _Family, tied: bool) -> None:
        self._known = dict(family.defaults) | config
        for key, others in _OTHER_KEYS.items():
            found = [other for other in (key, *others) if other in config]
            if found:
                self._known[key] = config[found[0]]
        self._known |= {"yes": True, "tie_word_embeddings": tied}
        self._derive(str(config.get("model_type")))

    def _derive(self, model_type: str) -> None:
        known = self._known
        hidden, heads = self["hidden_size"], self["num_attention_heads"]
        known["whole_head"] = hidden // heads
        known["head_dim"] = known.get("head_dim") or known["whole_head"]
        known["num_key_value_heads"] = known.get("num_key_value_heads") or heads
        match model_type:
            case "falcon":
                self._derive_falcon()
            case "gpt2" | "bloom":
                known["intermediate_size"] = known.get("intermediate_size") or 4 * hidden
            case "opt":
                known["word_embed_proj_dim"] = known.get("word_embed_proj_dim") or hidden
                known["projected"] = known["word_embed_proj_dim"] != hidden
                known["last_norm"] = known["do_layer_norm_before"] and not known.get("_remove_final_layer_norm")
            case "deepseek_v2" | "deepseek_v3":
                known["qk_head_dim"] = self["qk_nope_head_dim"] + self["qk_rope_head_dim"]
            case "siglip_vision_model":
                known["patches"] = self["image_size"] // self["patch_size"]
            case "stablelm" | "gpt_neox":
                known["head_dim"] = known["whole_head"]
        known["queries"] = heads * self["head_dim"]
        known["keys"] = self["num_key_value_heads"] * self["head_dim"]

    def _derive_falcon(self) -> None:
        known = self._known
        new = known.get("new_decoder_architecture")
        known["head_dim"] = known["whole_head"]
        known["intermediate_size"] = known.get("intermediate_size") or 4 * self["hidden_size"]
        if not new:
            known["num_key_value_heads"] = 1 if known["multi_query"] else self["num_attention_heads"]
        norms = known.get("num_ln_in_parallel_attn") or (2 if new else 1)
        known["two_norms"] = known["parallel_attn"] and norms == 2

    def __getitem__(self, key: str) -> int:
        value = int(key) if key.isdigit() else self._known[key]
        if not isinstance(value, int) or not 0 < value < 1 << 32:
            raise ValueError(f"{str(value)[:40]} is no size")
        return value

    def count(self, key: str) -> int:
        """How many modules: what would never end is nonsense too."""
        if self[key] > _MOST_MODULES:
            raise ValueError(f"{self[key]} is no number of {key.removeprefix('num_')}")
        return self[key]

    def shape(self, sizes: str) -> tuple[int, ...]:
        return tuple(
            sum(prod(self[key] for key in term.split("*")) for term in size.split("+")) for size in sizes.split(",")
        )

    def holds(self, condition: str) -> bool:
        key = condition.removeprefix("!")
        return bool(self._known.get(key)) is not condition.startswith("!")

    def enter(self, layer: int) -> None:
        """Sets the conditions that differ from layer to layer."""
        known = self._known
        known["sparse"] = (
            layer >= (known.get("first_k_dense_replace") or 0)
            and layer not in (known.get("mlp_only_layers") or ())
            and (layer + 1) % known.get("decoder_sparse_step", 1) == 0
        )
        if "full_attention_interval" in known:
            kinds = known.get("layer_types")
            known["linear"] = (
                kinds[layer] == "linear_attention" if kinds else (layer + 1) % known["full_attention_interval"] != 0
            )


@cache
def _lines(text: str) -> tuple[tuple[str, str, str, tuple[str, ...]], ...]:
    """Name, sizes, the bias's condition and the line's conditions."""
    found = []
    for line in filter(None, map(str.strip, text.splitlines())):
        name, sizes, *rest = line.split()
        bias = next((word[1:] for word in rest if word[0] == "+"), "")
        found.append((name, sizes, bias, tuple(word[1:] for word in rest if word[0] == "?")))
    return tuple(found)


def _tensors(text: str, prefix: str, sizes: _Sizes) -> Iterator[Tensor]:
    for name, shape_text, bias, conditions in _lines(text):
        if not all(map(sizes.holds, conditions)):
            continue
        shape = sizes.shape(shape_text)
        if name[0] == "=":
            yield Tensor(prefix + name[1:], shape)
            continue
        module, _, count = name.rstrip("]").partition("[")
        numbers = [f".{index}" for index in range(sizes.count(count))] if count else [""]
        for path in (f"{prefix}{module}{number}" for number in numbers):
            yield Tensor(f"{path}.weight", shape)
            if bias and sizes.holds(bias):
                yield Tensor(f"{path}.bias", shape[:1])


def _part(config: dict[str, Any], key: str) -> dict[str, Any]:
    if not isinstance(config[key], dict):
        raise TypeError(f"{key} is no object")
    return dict(config[key])


def _towers(config: dict[str, Any], towers: tuple[_Family, _Family]) -> Iterator[Tensor]:
    vision, text = _part(config, "vision_config"), _part(config, "text_config")
    more = {"model_type": "siglip_vision_model", "text_hidden_size": text["hidden_size"]}
    yield from _decoder(vision | more, towers[0])
    yield from _decoder(text | {"tie_word_embeddings": is_tied(config)}, towers[1])


def _decoder(config: dict[str, Any], family: _Family) -> Iterator[Tensor]:
    sizes = _Sizes(config, family, is_tied(config))
    yield from _tensors(family.before, "", sizes)
    for index in range(sizes.count("num_hidden_layers")):
        sizes.enter(index)
        yield from _tensors(family.layer, f"{family.layers}.{index}.", sizes)
    yield from _tensors(family.after, "", sizes)


def is_tied(config: dict[str, Any]) -> bool:
    """Whether the output head is the embeddings. The configuration of the loaded class says so, not a part's."""
    key, model_type = "tie_word_embeddings", str(config.get("model_type"))
    if model_type in TEXT_ONLY:
        config = text_config_of(config)
    if key in config:
        return bool(config[key])
    if model_type in FAMILIES:
        return bool(FAMILIES[model_type].defaults.get(key, False))
    return model_type in TOWERS or bool(text_config_of(config).get(key, False))
