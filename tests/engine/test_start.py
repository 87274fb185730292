"""An adapter that goes on: what it is comes from where it was, the base is the same, and the chain is told."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from click.testing import Result
from conftest import RecipeMaker, Train, make_model
from peft import AutoPeftModelForCausalLM
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM
from typer.testing import CliRunner

from lorafit.cli import app
from lorafit.engine.data.prepare import prepare
from lorafit.engine.methods import module_of
from lorafit.engine.tokenizer import load_tokenizer
from lorafit.engine.trainer import save_adapter
from lorafit.errors import LorafitError, ModelError, UsageError
from lorafit.facts.hub import hub_unreachable
from lorafit.plan import plan_recipe, with_audit
from lorafit.recipe import Recipe, RecipeError
from lorafit.run.directory import RunDir

SHORT = {"max_steps": 2}


def cli(*arguments: object) -> Result:
    return CliRunner().invoke(app, [*map(str, arguments)])


def places(file: Path) -> list[tuple[str, int | None]]:
    """What planning a recipe finds wrong: the keys, with their lines."""
    with pytest.raises(RecipeError) as caught:
        plan_recipe(Recipe.load(file), file)
    return [(mistake.path, mistake.position.line) for mistake in caught.value.mistakes]


def line_of(file: Path, text: str) -> int:
    lines = file.read_text().splitlines()
    return next(number for number, line in enumerate(lines, 1) if line.strip().startswith(text))


@pytest.fixture
def sft(recipe: RecipeMaker, train: Train) -> RunDir:
    """A finished run of two steps."""
    run: RunDir = train(recipe("sft", training=SHORT))
    return run


def onward(recipe: RecipeMaker, start: RunDir | Path, name: str = "on", **sections: Any) -> Path:
    """A recipe that goes on from an adapter, and says nothing of it."""
    path = start.path if isinstance(start, RunDir) else start
    return recipe(name, **{"lora": ..., "start_from": str(path), "training": SHORT} | sections)


KINDS: dict[str, dict[str, Any]] = {
    "plain": {},
    "dora": {"lora": {"use_dora": True}},
    "pissa": {"lora": {"init_lora_weights": "pissa"}},
    "beside": {"lora": {"bias": "all", "modules_to_save": ["lm_head"], "use_rslora": True}},
    "patterns": {"lora": {"rank_pattern": {"q_proj": 2}, "exclude_modules": ["v_proj"], "layers_to_transform": [1]}},
    "nf4": {"quantization": {"load_in_4bit": True}},
}


@pytest.mark.parametrize("kind", KINDS)
def test_zero_steps_write_the_same_bytes(kind: str, recipe: RecipeMaker, train: Train, tmp_path: Path) -> None:
    before = train(recipe("before", **KINDS[kind] | {"training": SHORT}))
    sections = {key: value for key, value in KINDS[kind].items() if key != "lora"}
    file = onward(recipe, before, **sections)
    plan = plan_recipe(Recipe.load(file), file)
    tokenizer = load_tokenizer(plan)
    data = prepare(plan.data, tokenizer)
    plan = with_audit(plan, data.audit)
    trainer = module_of(plan.method.name).build(plan, RunDir(tmp_path / "none"), data, tokenizer)
    save_adapter(trainer.model, tmp_path / "saved", plan.references)
    for name in ("adapter_model.safetensors", "adapter_config.json"):
        assert (tmp_path / "saved" / name).read_bytes() == (before.adapter / name).read_bytes()


def test_the_adapter_goes_on_and_the_base_does_not(sft: RunDir, recipe: RecipeMaker, train: Train) -> None:
    on = train(onward(recipe, sft))
    was, now = (load_file(run.adapter / "adapter_model.safetensors") for run in (sft, on))
    assert was.keys() == now.keys()
    moved = max((now[name] - was[name]).abs().max().item() for name in was)
    new = max(value.abs().max().item() for name, value in was.items() if "lora_B" in name)
    assert 0 < moved < 3 * new  # two steps of Adam beside two
    assert on.base_files() == sft.base_files()


@pytest.mark.parametrize(
    ("sections", "key", "line"),
    [
        ({"lora": {"r": 8, "lora_alpha": 8}}, "lora.r", "r:"),
        ({"lora": {"r": 4, "lora_alpha": 9}}, "lora.lora_alpha", "lora_alpha:"),
        ({"lora": {"target_modules": "qv", "r": ..., "lora_alpha": ...}}, "lora.target_modules", "target_modules:"),
        ({"lora": None}, "lora", "lora:"),
        ({"quantization": {"load_in_4bit": True}}, "quantization", "quantization:"),
    ],
)
def test_what_contradicts_the_adapter_is_refused_at_its_line(
    sections: dict[str, Any], key: str, line: str, sft: RunDir, recipe: RecipeMaker
) -> None:
    lora = sections.get("lora")
    sections = sections | ({"lora": {k: v for k, v in lora.items() if v is not ...}} if lora else {})
    file = onward(recipe, sft, **sections)
    if lora:
        content = yaml.safe_load(file.read_text())
        file.write_text(yaml.safe_dump(content | {"lora": sections["lora"]}))
    assert places(file) == [(key, line_of(file, line))]
    assert f"{file}:{line_of(file, line)}" in cli("validate", file).stdout


def test_what_says_the_same_is_no_contradiction(sft: RunDir, recipe: RecipeMaker) -> None:
    """The recipe of before, with another dropout, which is no part of an adapter."""
    lora = {"r": 4, "lora_alpha": 8, "target_modules": "all-linear", "lora_dropout": 0.25}
    file = onward(recipe, sft, lora=lora)
    plan = plan_recipe(Recipe.load(file), file)
    assert plan.lora_kwargs is not None
    assert plan.lora_kwargs["lora_dropout"] == 0.25


def test_another_base_is_refused(sft: RunDir, recipe: RecipeMaker, tmp_path: Path) -> None:
    other = make_model(tmp_path / "other", seed=7)
    file = onward(recipe, sft, model={"name_or_path": str(other)})
    assert places(file) == [("model.name_or_path", line_of(file, "name_or_path:"))]


def test_a_base_that_is_too_large_to_be_read_while_planning_is_compared_before_training(
    sft: RunDir, recipe: RecipeMaker, train: Train, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("lorafit.plan.chain.HASHED", 0)
    file = onward(recipe, sft, model={"name_or_path": str(make_model(tmp_path / "other", seed=7))})
    assert plan_recipe(Recipe.load(file), file).remarks
    with pytest.raises(ModelError, match=str(sft.path)):
        train(file)
    assert RunDir(tmp_path / "runs" / "on").is_empty


@pytest.mark.parametrize(
    "what", ["nothing", "empty", "unfinished", "trained in full", "changed", "pissa", "ia3", "pickle"]
)
def test_what_can_not_go_on_is_refused(
    what: str, sft: RunDir, recipe: RecipeMaker, train: Train, tmp_path: Path
) -> None:
    start = sft.path
    config = sft.adapter / "adapter_config.json"
    if what == "nothing":
        start = tmp_path / "gone"
    elif what == "empty":
        (start := tmp_path / "empty").mkdir()
    elif what == "unfinished":
        shutil.rmtree(sft.adapter)
    elif what == "trained in full":
        start = train(recipe("full", lora=..., training=SHORT)).path
    elif what == "changed":
        config.write_text(config.read_text().replace('"r": 4', '"r": 2'))
    else:
        shutil.copytree(sft.adapter, start := tmp_path / "copy")
        (start / "lorafit.json").unlink()
        changes = {"pissa": {"init_lora_weights": "pissa"}, "ia3": {"peft_type": "IA3"}, "pickle": {}}[what]
        (start / config.name).write_text(json.dumps(json.loads(config.read_text()) | changes))
        if what == "pickle":
            (start / "adapter_model.safetensors").rename(start / "adapter_model.bin")
    file = onward(recipe, start)
    assert places(file) == [("start_from", line_of(file, "start_from:"))]


def test_an_adapter_that_is_of_no_run_goes_on(sft: RunDir, recipe: RecipeMaker, train: Train, tmp_path: Path) -> None:
    """What is known of its base is said; one that names another is refused."""
    shutil.copytree(sft.adapter, copy := tmp_path / "with space")
    for name in ("lorafit.json", "README.md"):
        (copy / name).unlink()
    file = onward(recipe, copy)
    assert any(str(copy) in remark for remark in plan_recipe(Recipe.load(file), file).remarks)
    assert train(file).result is not None
    config = copy / "adapter_config.json"
    config.write_text(config.read_text().replace("tiny", "gemma"))
    assert places(file) == [("start_from", line_of(file, "start_from:"))]


def test_an_adapter_of_the_hub(
    sft: RunDir, recipe: RecipeMaker, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """It is taken from the client's cache; one that isn't there can't be had offline."""
    repository = tmp_path / "hub" / "models--someone--adapter"
    shutil.copytree(sft.adapter, repository / "snapshots" / ("0" * 40))
    (repository / "snapshots" / ("0" * 40) / "lorafit.json").unlink()
    (repository / "refs").mkdir()
    (repository / "refs" / "main").write_text("0" * 40)
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(tmp_path / "hub"))
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    hub_unreachable.cache_clear()
    file = onward(recipe, Path("someone/adapter"))
    assert Recipe.load(file).lora is not None
    assert [stage.path for stage in plan_recipe(Recipe.load(file), file).chain] == ["someone/adapter"]
    other = onward(recipe, Path("someone/other"))
    assert places(other) == [("start_from", line_of(other, "start_from:"))]
    hub_unreachable.cache_clear()


def test_a_chain_of_three_is_one_adapter(sft: RunDir, recipe: RecipeMaker, train: Train) -> None:
    """It is told wherever the run is, merges as the last adapter, and plain PEFT loads it."""
    second = train(onward(recipe, sft, "second"))
    third = train(onward(recipe, second.adapter, "third"))
    paths = [str(sft.path), str(second.adapter)]
    assert [stage.path for stage in third.load_plan().chain] == paths
    assert [stage["path"] for stage in third.read_manifest()["chain"]] == paths
    assert all(path in (third.adapter / "README.md").read_text() for path in paths)
    merged = cli("merge", third.path)
    assert merged.exit_code == 0, merged.output
    report = json.loads((third.merged / "merge_report.json").read_text())
    assert [stage["path"] for stage in report["chain"]] == paths
    assert report["verification"]["figures"]["kl"] < 1e-4
    ids = torch.arange(3, 40)[None]
    with torch.no_grad():
        one = AutoPeftModelForCausalLM.from_pretrained(third.adapter).eval()(input_ids=ids).logits
        other = AutoModelForCausalLM.from_pretrained(third.merged).eval()(input_ids=ids).logits
    torch.testing.assert_close(one, other, atol=1e-4, rtol=1e-4)
    checks = json.loads(cli("verify", third.path, "--json").stdout)
    assert any(str(second.adapter) in json.dumps(one) for one in checks["checks"])


def test_a_run_on_what_was_trained_in_full_records_that(recipe: RecipeMaker, train: Train) -> None:
    full = train(recipe("full", lora=..., training=SHORT))
    file = recipe("after", model={"name_or_path": str(full.model)}, training=SHORT)
    (stage,) = plan_recipe(Recipe.load(file), file).chain
    assert (stage.kind, stage.path) == ("model", str(full.model))


def test_a_base_beside_somebody_elses_plan_is_a_base(
    tiny_model: Path, sft: RunDir, recipe: RecipeMaker, tmp_path: Path
) -> None:
    """Another tool's project may have a plan.json and a folder called model or adapter, too."""
    shutil.copytree(tiny_model, tmp_path / "project" / "model")
    shutil.copytree(sft.adapter, tmp_path / "project" / "adapter")
    (tmp_path / "project" / "plan.json").write_text('{"steps": []}')
    file = recipe("other", model={"name_or_path": str(tmp_path / "project" / "model")}, training=SHORT)
    assert plan_recipe(Recipe.load(file), file).chain == ()
    file = onward(recipe, tmp_path / "project" / "adapter")
    (stage,) = plan_recipe(Recipe.load(file), file).chain
    assert stage.base is None


def test_a_run_whose_plan_is_damaged_is_a_base_all_the_same(recipe: RecipeMaker, train: Train) -> None:
    full = train(recipe("full", lora=..., training=SHORT))
    full.plan_file.write_text("{}")
    file = recipe("after", model={"name_or_path": str(full.model)}, training=SHORT)
    plan = plan_recipe(Recipe.load(file), file)
    assert (plan.chain, any(str(full.path) in remark for remark in plan.remarks)) == ((), True)


def test_the_start_is_evaluated_beside_base_and_adapter(sft: RunDir, recipe: RecipeMaker, train: Train) -> None:
    validation = {"dataset": {"validation": 0.25}, "eval": {"forgetting": [], "max_new_tokens": 4}}
    gate = {"gates": ["heldout.loss.start - heldout.loss.start == 0"]}
    on = train(onward(recipe, sft, **validation | {"eval": validation["eval"] | gate}))
    made = cli("eval", on.path, "--json")
    assert made.exit_code == 0, made.output
    assert {f"heldout.loss.{model}" for model in ("base", "adapter", "start")} <= {*json.loads(made.stdout)["figures"]}
    assert places_of_gate(recipe, validation) == ["eval.gates.0"]
    weights = sft.adapter / "adapter_model.safetensors"
    weights.write_bytes(weights.read_bytes()[:-1] + b"\x01")
    assert cli("eval", on.path).exit_code == 7
    shutil.rmtree(sft.path)
    gone = cli("eval", on.path, "--set", "eval.gates=[]")
    assert (gone.exit_code, str(sft.path) in gone.output) == (0, True), gone.output


def places_of_gate(recipe: RecipeMaker, sections: dict[str, Any]) -> list[str]:
    """What validation finds of a gate on the start in a recipe that has none."""
    gates = {"eval": sections["eval"] | {"gates": ["heldout.loss.start <= 9"]}}
    found = json.loads(cli("validate", recipe("without", **sections | gates), "--json").stdout)
    return [fault["key"] for one in found["recipes"] for fault in one["faults"]]


def test_a_start_that_changed_is_told(sft: RunDir, recipe: RecipeMaker, train: Train) -> None:
    """By the lock, and by a run that would be resumed."""
    file = onward(recipe, sft, training={"max_steps": 4, "save_steps": 2, "save_strategy": "steps"})
    assert cli("lock", file).exit_code == 0
    on = train(file)
    shutil.rmtree(on.adapter)
    shutil.rmtree(on.checkpoints / "checkpoint-4")
    assert train(file, resume=True).result is not None
    shutil.rmtree(on.adapter)
    again = train(recipe("sft", training={"max_steps": 3}), overwrite=True)
    assert again.path == sft.path
    drift = cli("lock", "--check", file)
    assert (drift.exit_code, "start_from" in drift.output) == (7, True)
    with pytest.raises(UsageError, match="chain"):
        train(file, resume=True)


def test_a_run_does_not_replace_what_it_starts_from(sft: RunDir, recipe: RecipeMaker, train: Train) -> None:
    file = onward(recipe, sft, "sft")
    with pytest.raises(LorafitError, match=str(sft.path)):
        train(file, overwrite=True)
    assert sft.result is not None


def test_a_smoke_run_begins_anew(sft: RunDir, recipe: RecipeMaker) -> None:
    made = cli("smoke", onward(recipe, sft), "--json")
    assert made.exit_code == 0, made.output
    assert "start_from" in [one["key"] for one in json.loads(made.stdout)["replaced"]]
