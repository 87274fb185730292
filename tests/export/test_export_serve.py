"""Serving an adapter unmerged with vLLM."""

from __future__ import annotations

import json
import shlex
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from safetensors.numpy import save_file

from lorafit.errors import ModelError
from lorafit.export.vllm import check_vllm

CONFIG = {
    "peft_type": "LORA",
    "base_model_name_or_path": "org/base model",
    "revision": "abc",
    "r": 8,
    "lora_alpha": 16,
    "bias": "none",
    "target_modules": ["q_proj", "v_proj"],
    "modules_to_save": None,
    "use_dora": False,
    "use_rslora": False,
    "rank_pattern": {},
    "alpha_pattern": {},
}


def make_adapter(
    folder: Path, ranks: dict[str, int] | None = None, extra: dict[str, Any] | None = None, **changes: Any
) -> Path:
    folder.mkdir(parents=True, exist_ok=True)
    tensors = dict(extra or {})
    for module, rank in (ranks or {"q_proj": 8, "v_proj": 8}).items():
        name = f"base_model.model.model.layers.0.self_attn.{module}"
        tensors[f"{name}.lora_A.weight"] = np.zeros((rank, 4), np.float32)
        tensors[f"{name}.lora_B.weight"] = np.zeros((4, rank), np.float32)
    save_file(tensors, folder / "adapter_model.safetensors")
    (folder / "adapter_config.json").write_text(json.dumps(CONFIG | changes))
    return folder


def test_a_plain_adapter_is_served(tmp_path: Path) -> None:
    adapter = make_adapter(tmp_path / "my run" / "adapter", use_rslora=True)
    report = check_vllm(adapter)
    assert report.servable
    assert report.reasons == ()
    assert report.command is not None
    assert shlex.split(report.command) == [
        *("vllm", "serve", "org/base model", "--revision", "abc", "--enable-lora"),
        *("--lora-modules", f"my run={adapter}", "--max-lora-rank", "8"),
    ]


def test_the_rank_is_rounded_up_to_one_that_it_takes(tmp_path: Path) -> None:
    ranks = {"q_proj": 24, "v_proj": 100}
    same = {"rank_pattern": ranks, "alpha_pattern": {"q_proj": 48, "self_attn.v_proj": 200}}
    command = check_vllm(make_adapter(tmp_path / "a", ranks, **same)).command
    assert command is not None
    assert command.endswith("--max-lora-rank 128")


@pytest.mark.parametrize(
    ("ranks", "changes", "reason"),
    [
        (None, {"peft_type": "IA3"}, "IA3"),
        (None, {"use_dora": True}, "DoRA"),
        (None, {"bias": "all"}, "biases"),
        (None, {"lora_bias": True}, "biases"),
        (None, {"modules_to_save": ["lm_head"]}, "modules_to_save: lm_head"),
        (None, {"trainable_token_indices": [3]}, "trainable_token_indices: 3"),
        (None, {"target_parameters": ["experts.up"]}, "target_parameters: experts.up"),
        (None, {"base_model_name_or_path": None}, "base model"),
        (None, {"lora_alpha": None}, "no lora_alpha"),
        ({"q_proj": 600}, {"r": 600, "lora_alpha": 1200}, "above 512"),
        (
            {"q_proj": 4, "v_proj": 8},
            {"rank_pattern": {"q_proj": 4}},
            "1 of 2",
        ),
        (None, {"alpha_pattern": {"v_proj": 3}}, "first model.layers.0.self_attn.v_proj"),
    ],
)
def test_what_it_does_not_serve(
    ranks: dict[str, int] | None, changes: dict[str, Any], reason: str, tmp_path: Path
) -> None:
    report = check_vllm(make_adapter(tmp_path / "a", ranks, **changes))
    assert not report.servable
    assert report.command is None
    assert len(report.reasons) == 1
    assert reason in report.reasons[0]


@pytest.mark.parametrize(
    "changes", [{"r": "x"}, {"lora_alpha": "x"}, {"alpha_pattern": {"((": 4}}, {"alpha_pattern": [1]}]
)
def test_fields_that_can_not_be_used(changes: dict[str, Any], tmp_path: Path) -> None:
    with pytest.raises(ModelError, match=r"adapter_config\.json: (r, lora_alpha|an expression)"):
        check_vllm(make_adapter(tmp_path / "a", **changes))


def test_tensors_that_are_no_matrices(tmp_path: Path) -> None:
    extra = {"base_model.model.lm_head.weight": np.zeros((4, 4), np.float32)}
    report = check_vllm(make_adapter(tmp_path / "a", extra=extra))
    assert "lm_head.weight" in report.reasons[0]
    dora = {"base_model.model.model.layers.0.self_attn.q_proj.lora_magnitude_vector": np.zeros(4, np.float32)}
    assert not check_vllm(make_adapter(tmp_path / "b", extra=dora)).servable


def test_remarks_and_missing_files(tmp_path: Path) -> None:
    adapter = make_adapter(tmp_path / "a", base_model_name_or_path="unsloth/llama-3-8b-bnb-4bit")
    (adapter / "chat_template.jinja").write_text("x")
    remarks = check_vllm(adapter).remarks
    assert any("quantized" in remark for remark in remarks)
    assert any("--chat-template" in remark for remark in remarks)
    with pytest.raises(ModelError, match="no adapter_config"):
        check_vllm(tmp_path)
    (adapter / "adapter_model.safetensors").unlink()
    with pytest.raises(ModelError, match="no such file"):
        check_vllm(adapter)


def test_the_light_modules_are_light() -> None:
    names = ", ".join(f"lorafit.export.{name}" for name in ("gguf", "ollama", "vllm"))
    code = f"import sys, {names}; sys.exit(str({{'torch', 'transformers', 'gguf'}} & set(sys.modules) or ''))"
    assert subprocess.run([sys.executable, "-c", code], capture_output=True, text=True).stderr.strip() == ""
