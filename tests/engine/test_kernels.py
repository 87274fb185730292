"""Kernels of the hub in place of layers: pinned, consented to, really there, and computing the same."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from conftest import RecipeMaker, make_model
from transformers import AutoModelForCausalLM, PreTrainedModel
from transformers.models.llama.modeling_llama import LlamaRMSNorm

from lorafit.engine.model import put_kernels
from lorafit.errors import ModelError
from lorafit.facts import read_facts
from lorafit.hardware import Hardware, missing_packages
from lorafit.memory import setup_of
from lorafit.plan import make_plan
from lorafit.recipe import Recipe, RecipeError

NAME = f"kernels-community/liger@{'0123456789' * 4}:LigerRMSNorm"
AMPERE = Hardware("cuda", "NVIDIA A100-SXM4-80GB", 80 << 30, (8, 0), True)


@pytest.fixture
def model(tmp_path: Path) -> PreTrainedModel:
    made: PreTrainedModel = AutoModelForCausalLM.from_pretrained(make_model(tmp_path / "model"))
    return made


@pytest.fixture
def hub(monkeypatch: pytest.MonkeyPatch) -> dict[str, Any]:
    """Stands in for transformers' kernels: what it was asked for, and the forward that it puts on the norms."""
    told: dict[str, Any] = {"forward": LlamaRMSNorm.forward}
    monkeypatch.setattr(LlamaRMSNorm, "kernel_layer_name", "RMSNorm", raising=False)

    def use(self: PreTrainedModel, use_kernels: bool, kernel_config: Any) -> None:
        told.update(config=kernel_config, training=self.training)
        for module in self.modules():
            if isinstance(module, LlamaRMSNorm) and told["forward"] is not None:
                module.forward = told["forward"].__get__(module)

    monkeypatch.setattr(PreTrainedModel, "set_use_kernels", use)
    return told


def same(self: Any, hidden: torch.Tensor) -> torch.Tensor:
    spread = hidden.pow(2).mean(-1, keepdim=True)
    return self.weight * (hidden * torch.rsqrt(spread + self.variance_epsilon))


def other(self: Any, hidden: torch.Tensor) -> torch.Tensor:
    return same(self, hidden) * 1.05


def test_a_kernel_that_computes_the_same(model: PreTrainedModel, hub: dict[str, Any]) -> None:
    """It is asked for at its commit, for training, and no other kernel beside it."""
    hub["forward"] = same
    put_kernels(model, {"RMSNorm": NAME})
    named, pinned = hub["config"].kernel_mapping["RMSNorm"]
    assert named == "kernels-community/liger:LigerRMSNorm"
    assert pinned == {"revision": "0123456789" * 4, "trust_remote_code": True}
    assert not hub["config"].inherit_mapping
    assert hub["training"]


@pytest.mark.parametrize(("forward", "told"), [(other, "differ"), (None, "use_kernels.RMSNorm")])
def test_one_that_computes_something_else_or_is_not_there(
    forward: Any, told: str, model: PreTrainedModel, hub: dict[str, Any]
) -> None:
    hub["forward"] = forward
    with pytest.raises(ModelError, match=told):
        put_kernels(model, {"RMSNorm": NAME})


def test_without_the_package_it_is_one_line(model: PreTrainedModel) -> None:
    with pytest.raises(ModelError, match=r"^model\.use_kernels: .*kernels"):
        put_kernels(model, {"RMSNorm": NAME})


@pytest.mark.parametrize(
    ("kernels", "place"),
    [
        ({"RMSNorm": "kernels-community/liger:LigerRMSNorm"}, "model.use_kernels.RMSNorm"),
        ({"RMSNorm": "kernels-community/liger@main:LigerRMSNorm"}, "model.use_kernels.RMSNorm"),
        (True, "model.use_kernels"),
    ],
)
def test_a_kernel_without_a_commit_is_refused(kernels: Any, place: str, recipe: RecipeMaker) -> None:
    with pytest.raises(RecipeError) as caught:
        Recipe.load(recipe(model={"use_kernels": kernels, "trust_remote_code": True}))
    assert [mistake.path for mistake in caught.value.mistakes] == [place]


def test_what_a_recipe_with_kernels_needs(recipe: RecipeMaker, tiny_model: Path) -> None:
    """Consent, the package and a GPU; and its memory is that of fused norms."""
    with pytest.raises(RecipeError, match=r"model\.use_kernels: .*trust_remote_code"):
        Recipe.load(recipe(model={"use_kernels": {"RMSNorm": NAME}}))
    asked = Recipe.load(recipe(model={"use_kernels": {"RMSNorm": NAME}, "trust_remote_code": True, "dtype": "auto"}))
    assert [path for path, _ in missing_packages(asked)] == [("model", "use_kernels")]
    facts = read_facts(str(tiny_model))
    with pytest.raises(RecipeError, match=r"model\.use_kernels: .*GPU"):
        make_plan(asked, facts, Hardware("cpu", "a CPU", None, None, False), read_data=False)
    plan = make_plan(asked, facts, AMPERE, read_data=False)
    assert plan.model.kernels == {"RMSNorm": NAME}
    assert setup_of(plan, facts).stack.kernels == {"rms_norm"}
