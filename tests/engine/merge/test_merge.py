"""A merged model answers as the adapter does, loads alone, is proved, and is whole or absent."""

from __future__ import annotations

import io
import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from conftest import RecipeMaker, Train, as_planned, conversation, make_model, resealed, write_jsonl
from peft import AutoPeftModelForCausalLM, PeftModel
from peft.tuners.lora import LoraLayer
from rich.console import Console
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM, AutoTokenizer
from typer.testing import CliRunner
from wording import Like
from yaml import safe_dump

from lorafit.cli import app
from lorafit.engine.merge.run import Merging, merge
from lorafit.engine.train import train as run_training
from lorafit.errors import DoesNotFitError, DriftError, GateError, ModelError, UsageError
from lorafit.files import LOCK, SEAL, damage
from lorafit.options import Addition, MergeOptions
from lorafit.plan import plan_recipe
from lorafit.recipe import Recipe
from lorafit.run.directory import RunDir
from lorafit.run.manifest import Start

IDS = torch.arange(3, 40)[None]
QUIET = Console(file=io.StringIO())


def merged(path: Path, said: io.StringIO | None = None, **options: Any) -> Path:
    """Merge, also where it was done before."""
    return merge(MergeOptions(path, **{"overwrite": True} | options), Console(file=said or io.StringIO(), width=10_000))


def logits(model: Any) -> torch.Tensor:
    model.eval()
    with torch.no_grad():
        return model(input_ids=IDS).logits


def logits_of(folder: Path) -> torch.Tensor:
    return logits(AutoModelForCausalLM.from_pretrained(folder).float())


def report_of(folder: Path) -> dict[str, Any]:
    return json.loads((folder / "merge_report.json").read_text())


def hidden(folder: Path) -> list[str]:
    return [entry.name for entry in folder.glob(".*") if entry.name != LOCK]


@pytest.fixture(scope="module")
def trained(tmp_path_factory: pytest.TempPathFactory, tiny_model: Path) -> Path:
    """A plain run without held-out rows, trained once."""
    return run_of(tmp_path_factory.mktemp("trained"), tiny_model)


@pytest.fixture
def run(trained: Path, tmp_path: Path) -> RunDir:
    """A copy of it, to be merged or broken."""
    return RunDir(shutil.copytree(trained, tmp_path / "runs" / "plain"))


def run_of(folder: Path, model: Path, **sections: Any) -> Path:
    """Train a small run; keyword arguments are sections of its recipe."""
    rows = write_jsonl(folder / "rows.jsonl", [conversation(f"cat {i} sat", f"mat {i % 5}") for i in range(24)])
    content = {
        "model": {"name_or_path": str(model), "dtype": "float32"},
        "lora": {"r": 4, "lora_dropout": 0.0},
        "dataset": {"train": [{"path": str(rows)}]},
        "training": {"max_steps": 8, "learning_rate": 1e-2, "max_length": 128, "per_device_train_batch_size": 4},
        "output_dir": str(folder / "run"),
    }
    for section, values in sections.items():
        content[section] = {**content.get(section, {}), **values}  # type: ignore[dict-item]
    path = folder / "recipe.yaml"
    path.write_text(safe_dump(content))
    plan = plan_recipe(Recipe.load(path, ()), path)
    run_training(plan, path.read_bytes(), Start(), QUIET)
    return folder / "run"


@pytest.mark.parametrize("lora", [{}, {"use_dora": True}, {"use_rslora": True}, {"init_lora_weights": "pissa"}])
def test_merged_logits_are_the_adapters(lora: dict[str, Any], recipe: RecipeMaker, train: Train) -> None:
    run = train(recipe(lora=lora))
    check_merged(run, "stream")
    check_merged(run, "full")


def check_merged(run: RunDir, method: Any) -> None:
    destination = merged(run.path, method=method)
    assert destination == run.merged
    adapter = AutoPeftModelForCausalLM.from_pretrained(run.adapter)
    model = AutoModelForCausalLM.from_pretrained(destination)
    assert not list(destination.glob("adapter*"))
    torch.testing.assert_close(logits(model), logits(adapter), rtol=1e-4, atol=1e-5)
    assert (logits(model) - logits(adapter.unload())).abs().max() > 1e-3
    tokenizer = AutoTokenizer.from_pretrained(destination)
    assert tokenizer.chat_template
    assert model.generation_config.eos_token_id == tokenizer.eos_token_id
    report = report_of(destination)
    assert report["base_weights"]["used"] == "original"
    assert report["method"]["used"] == method
    assert report["verification"]["level"] == "logits"
    assert report["verification"]["figures"]["kl"] < 1e-6
    assert report["merged_weights"] == 14


def test_what_is_deployed_is_complete(recipe: RecipeMaker, train: Train, tiny_model: Path, tmp_path: Path) -> None:
    base = tmp_path / "base"
    shutil.copytree(tiny_model, base)
    settings = json.loads((base / "generation_config.json").read_text()) | {"eos_token_id": [0], "top_k": 7}
    (base / "generation_config.json").write_text(json.dumps(settings))
    run = train(recipe(model={"name_or_path": str(base)}))
    folder = merged(run.path)
    found = json.loads((folder / "generation_config.json").read_text())
    assert found["top_k"] == 7
    assert found["eos_token_id"] == [0, 2], "the base's end, and the one that training taught"
    config = json.loads((folder / "config.json").read_text())
    assert config["architectures"] == ["LlamaForCausalLM"]
    assert "quantization_config" not in config
    card = (folder / "README.md").read_text()
    assert "library_name: transformers" in card
    assert "training rows" in card
    assert "KL" in (folder / "merge_report.md").read_text()


def test_untouched_tensors_are_copied_and_shards_stay(recipe: RecipeMaker, train: Train, tmp_path: Path) -> None:
    base = make_model(tmp_path / "base")
    model = AutoModelForCausalLM.from_pretrained(base)
    model.save_pretrained(base, max_shard_size="100KB")
    (base / "model.safetensors").unlink()
    run = train(recipe(model={"name_or_path": str(base)}, lora={"target_modules": "qv"}))
    folder = merged(run.path)
    before, after = sorted(base.glob("*.safetensors")), sorted(folder.glob("*.safetensors"))
    assert len(before) > 2
    assert [file.name for file in before] == [file.name for file in after]
    changed = 0
    for one, other in zip(before, after, strict=True):
        old, new = load_file(one), load_file(other)
        assert old.keys() == new.keys()
        for key in old:
            adapted = "q_proj" in key or "v_proj" in key
            assert torch.equal(old[key], new[key]) is not adapted
            changed += adapted
    assert changed == 4
    index = json.loads((folder / "model.safetensors.index.json").read_text())
    assert index["metadata"]["total_size"] == sum(t.nbytes for file in after for t in load_file(file).values())


# --- quantized bases ------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def quantized(tmp_path_factory: pytest.TempPathFactory, tiny_model: Path) -> Path:
    """A QLoRA run with held-out rows."""
    quantization, dataset = {"load_in_4bit": True}, {"validation": 0.25}
    return run_of(tmp_path_factory.mktemp("quantized"), tiny_model, quantization=quantization, dataset=dataset)


def test_a_quantized_run_is_merged_into_what_measures_better(quantized: Path, tmp_path: Path) -> None:
    folder = merged(quantized, output=tmp_path / "auto")
    report = report_of(folder)
    figures = report["base_weights"]["figures"]
    assert figures.keys() == {"original", "dequantized"}
    used = report["base_weights"]["used"]
    assert figures[used]["loss"] <= min(value["loss"] for value in figures.values()) + 1e-4
    assert figures["dequantized"]["kl"] < 1e-6, "it is exactly what the adapter was trained on"
    assert figures["original"]["kl"] > 10 * figures["dequantized"]["kl"]
    assert not hasattr(AutoModelForCausalLM.from_pretrained(folder).config, "quantization_config")
    assert sorted(entry.name for entry in folder.iterdir() if entry.is_dir()) == []


def test_base_weights_can_be_chosen(quantized: Path, tmp_path: Path, tiny_model: Path) -> None:
    original = merged(quantized, output=tmp_path / "original", base_weights="original")
    adapter = PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained(tiny_model), quantized / "adapter")
    torch.testing.assert_close(logits_of(original), logits(adapter), rtol=1e-4, atol=1e-5)
    dequantized = merged(quantized, output=tmp_path / "dequantized", base_weights="dequantized", verify="weights")
    assert report_of(dequantized)["verification"]["figures"] is None
    assert (logits_of(dequantized) - logits_of(original)).abs().max() > 1e-3
    full = merged(quantized, output=tmp_path / "full", base_weights="dequantized", method="full")
    torch.testing.assert_close(logits_of(dequantized), logits_of(full), rtol=1e-5, atol=1e-6)


def test_without_measuring_the_base_is_the_one_of_the_training(quantized: Path, tmp_path: Path) -> None:
    report = report_of(merged(quantized, output=tmp_path / "m", verify="weights"))
    assert report["base_weights"]["used"] == "dequantized"


def test_an_unquantized_run_has_nothing_to_dequantize(run: RunDir) -> None:
    with pytest.raises(UsageError, match=r"not .*quantized base"):
        merged(run.path, base_weights="dequantized")


def test_a_4_bit_copy_is_measured(quantized: Path, tmp_path: Path) -> None:
    folder = merged(
        quantized, output=tmp_path / "m", quantize="nf4", overrides=("merge.max_kl=1.0", "merge.min_top1=0.1")
    )
    assert report_of(folder)["base_weights"]["used"] == "original"
    copy = AutoModelForCausalLM.from_pretrained(tmp_path / "m-nf4", device_map={"": "cpu"})
    assert copy.config.quantization_config.bnb_4bit_quant_type == "nf4"
    cost = report_of(folder)["verification"]["exports"]["merged, then nf4"]
    assert cost["kl"] > 0
    assert "merged, then nf4" in (folder / "merge_report.md").read_text()


def test_a_4_bit_copy_that_lost_the_adapter_is_not_kept(quantized: Path, tmp_path: Path) -> None:
    """Dequantized weights lie where 4-bit rounding puts them, so rounding again undoes small changes."""
    limits = ("merge.max_kl=1e-6", "merge.min_top1=0.0", "merge.max_loss_increase=10.0")
    with pytest.raises(GateError, match=r"m-nf4\.unverified: .*--base-weights original"):
        merged(quantized, output=tmp_path / "m", base_weights="dequantized", quantize="nf4", overrides=limits)
    assert sorted(entry.name for entry in tmp_path.iterdir()) == ["m", "m-nf4.unverified"]


# --- gates ----------------------------------------------------------------------------------------


def test_beyond_a_limit_nothing_but_the_unverified_model_is_left(quantized: Path, tmp_path: Path) -> None:
    destination = tmp_path / "out" / "m"
    with pytest.raises(GateError, match=r"m\.unverified: not verified: .*merge\.max_kl is 1e-08.*dequantized"):
        merged(quantized, output=destination, base_weights="original", overrides=("merge.max_kl=1e-8",))
    assert [entry.name for entry in destination.parent.iterdir()] == ["m.unverified"]
    report = report_of(destination.with_name("m.unverified"))
    assert report["verification"]["breaches"]
    assert "Not verified" in report["verdict"]


def test_the_recipes_merge_section_sets_the_limits(recipe: RecipeMaker, train: Train) -> None:
    run = train(recipe(merge={"min_top1": 1.0, "max_kl": None, "verify": "weights"}))
    report = report_of(merged(run.path))
    assert report["verification"]["level"] == "weights"
    assert report["verification"]["limits"]["min_top1"] == 1.0
    assert report["verification"]["limits"]["max_kl"] is None
    assert report_of(merged(run.path, verify="logits"))["verification"]["level"] == "logits", "a flag overrides it"


def test_a_wrong_merge_is_not_kept(run: RunDir, monkeypatch: pytest.MonkeyPatch) -> None:
    from peft.tuners.lora.layer import Linear

    with monkeypatch.context() as patch:  # as when a tensor on meta is added: nothing happens, and nothing is said
        patch.setattr(Linear, "merge", lambda self, **_: None)
        with pytest.raises(GateError, match="changes nothing"):
            merged(run.path, verify="weights")
    right = Linear.get_delta_weight
    with monkeypatch.context() as patch:  # a scale that is off, as by rank instead of its root
        patch.setattr(Linear, "get_delta_weight", lambda self, name: 0.5 * right(self, name))
        with pytest.raises(GateError, match="adapter's definition"):
            merged(run.path, verify="weights")
    with monkeypatch.context() as patch:
        patch.setattr(PeftModel, "merge_and_unload", lambda self, **_: self.unload(), raising=False)
        with pytest.raises(GateError, match="not verified"):
            merged(run.path, method="full", overrides=("merge.max_kl=1e-4",))
    assert not run.merged.exists()
    assert not hidden(run.path)


def test_a_saved_model_that_loads_differently_is_not_kept(run: RunDir, monkeypatch: pytest.MonkeyPatch) -> None:
    original = AutoModelForCausalLM.from_pretrained

    def lossy(name: str, **kwargs: Any) -> Any:
        model = original(name, **kwargs)
        loaded = model[0] if isinstance(model, tuple) else model
        if "merged" in name:
            loaded.lm_head.weight.data[5:200] *= -1
        return model

    with monkeypatch.context() as patch:
        patch.setattr("lorafit.engine.merge.verify.AutoModelForCausalLM.from_pretrained", lossy)
        with pytest.raises(GateError, match="not verified"):
            merged(run.path)
    assert not run.merged.exists()


def test_an_adapter_that_rounding_loses_is_reported(recipe: RecipeMaker, train: Train, tmp_path: Path) -> None:
    base = make_model(tmp_path / "base")
    AutoModelForCausalLM.from_pretrained(base, dtype=torch.bfloat16).save_pretrained(base)
    run = train(recipe(model={"name_or_path": str(base), "dtype": "bfloat16"}, training={"learning_rate": 1e-6}))
    said = io.StringIO()
    folder = merged(run.path, said, verify="weights")
    assert "partly lost" in said.getvalue()
    assert AutoModelForCausalLM.from_pretrained(folder).dtype == torch.bfloat16
    said = io.StringIO()
    exact = merged(run.path, said, verify="weights", dtype="float32")
    assert "partly lost" not in said.getvalue()
    assert AutoModelForCausalLM.from_pretrained(exact).dtype == torch.float32


def test_rounding_to_16_bits_is_no_wrong_merge(recipe: RecipeMaker, train: Train, tmp_path: Path) -> None:
    deep = make_model(tmp_path / "deep", num_hidden_layers=12)
    run = train(recipe(model={"name_or_path": str(deep)}))
    for dtype in ("bfloat16", "float16"):
        folder = merged(run.path, dtype=dtype)
        assert AutoModelForCausalLM.from_pretrained(folder).dtype == getattr(torch, dtype)
        assert 0 < report_of(folder)["verification"]["figures"]["kl"] < 1e-3


def test_a_run_with_flash_attention_is_merged_on_the_cpu(run: RunDir) -> None:
    as_planned(run, model_kwargs={"attn_implementation": "flash_attention_2"})
    assert merged(run.path).is_dir()


# --- refusals -------------------------------------------------------------------------------------


def test_refusals(recipe: RecipeMaker, train: Train, tmp_path: Path) -> None:
    full = train(recipe("full", lora=..., training={"learning_rate": 1e-3}))
    with pytest.raises(UsageError, match="nothing to merge"):
        merged(full.path)
    with pytest.raises(UsageError, match="no such run"):
        merged(tmp_path / "nowhere")
    with pytest.raises(UsageError, match="run directory"):
        merged(tmp_path)
    run = train(recipe())
    mine = tmp_path / "mine"
    mine.mkdir()
    (mine / "thesis.txt").write_text("years")
    with pytest.raises(UsageError, match="not a merge"):
        merged(run.path, output=mine)
    assert merged(run.path, output=tmp_path / "a b" / "merged").is_dir()
    with pytest.raises(UsageError, match="--overwrite"):
        merged(run.path, output=tmp_path / "a b" / "merged", overwrite=False)


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (["--method", "fast"], "--method: … auto, stream, full … fast"),
        (["--base-weights", "int3"], "--base-weights: "),
        (["--combine", "ties", "--density", "0.5"], "name others with --add"),
        (["--add", "x:0.5", "--combine", "ties"], "needs --density"),
        (["--density", "0.5"], "--density is for"),
        (["--add", "x:nan"], "expected RUN:WEIGHT"),
        (["--add", ":0.5"], "expected RUN:WEIGHT"),
        (["--weight", "0"], "--weight: expected"),
        (["--rank", "4"], "--as-adapter"),
        (["--as-adapter"], "needs --rank"),
        (["--as-adapter", "--rank", "2", "--quantize", "nf4"], "can't go with"),
        (["--export", "onnx"], "gguf"),
        (["--set", "merge.max_kl=-1"], "--set merge.max_kl=-1: merge.max_kl: "),
        (["--set", "eval.limit=3"], "--set eval.limit=3: … merge section"),
        (["--set", "merge.min_top1=1.5"], "--set merge.min_top1=1.5: merge.min_top1: "),
        (["--quantize", "int4"], "--quantize: … nf4, fp4"),
    ],
)
def test_what_does_not_go_together_is_said_before_anything_loads(
    arguments: list[str], said: str, tmp_path: Path
) -> None:
    result = CliRunner().invoke(app, ["merge", str(tmp_path), *arguments])
    assert result.exit_code == 2
    assert result.stderr == Like(f"… {said}")
    assert len(result.stderr.strip().splitlines()) == 1


# --- the right base -------------------------------------------------------------------------------


def test_another_base_of_the_same_shape_is_refused(recipe: RecipeMaker, train: Train, tmp_path: Path) -> None:
    base = make_model(tmp_path / "base")
    run = train(recipe(model={"name_or_path": str(base)}))
    other = make_model(tmp_path / "other", seed=7)
    with pytest.raises(ModelError, match=r"not the base .*--allow-other-base"):
        merged(run.path, base=str(other))
    moved = tmp_path / "moved"
    shutil.copytree(base, moved)
    assert merged(run.path, base=str(moved)).is_dir(), "the same weights elsewhere are the same base"
    shutil.rmtree(base)
    shutil.copytree(other, base)
    with pytest.raises(ModelError, match="not the base"):
        merged(run.path)
    said = io.StringIO()
    folder = merged(run.path, said, allow_other_base=True, verify="weights")
    assert "it was allowed" in said.getvalue()
    assert "another base" in report_of(folder)["base"]["checked"]


def test_an_adapter_from_elsewhere(run: RunDir, tmp_path: Path, tiny_model: Path) -> None:
    foreign = tmp_path / "foreign"
    shutil.copytree(run.adapter, foreign)
    with pytest.raises(UsageError, match="--output"):
        merged(foreign)
    said = io.StringIO()
    folder = merged(foreign, said, output=tmp_path / "m")
    assert "not trained" in said.getvalue()
    assert report_of(folder)["base"]["checked"] == Like("… name and shapes")
    torch.testing.assert_close(logits_of(folder), logits_of(merged(run.path)), rtol=1e-5, atol=1e-6)
    wide = make_model(tmp_path / "wide", hidden_size=128)
    with pytest.raises(ModelError, match=r"this base.*size mismatch"):
        merged(foreign, output=tmp_path / "w", base=str(wide))
    shallow = make_model(tmp_path / "shallow", num_hidden_layers=1)
    with pytest.raises(ModelError, match="no place for"):
        merged(foreign, output=tmp_path / "s", base=str(shallow))
    with pytest.raises(ModelError, match="no such folder"):
        merged(foreign, output=tmp_path / "s", base="./nowhere")
    with pytest.raises(ModelError) as caught:
        merged(foreign, output=tmp_path / "s", base="someone/something")
    assert "\n" not in str(caught.value)
    assert not (tmp_path / "w").exists()
    assert not (tmp_path / "s").exists()


def test_without_any_tokenizer(tmp_path: Path, run: RunDir) -> None:
    for source, name in ((run.adapter, "adapter"), (Path(run.load_plan().model.name_or_path), "base")):
        shutil.copytree(source, tmp_path / name, ignore=shutil.ignore_patterns("tokenizer*", "*.jinja", SEAL))
    said = io.StringIO()
    folder = merged(tmp_path / "adapter", said, output=tmp_path / "m", base=str(tmp_path / "base"))
    assert "tokenizer" in said.getvalue()
    assert report_of(folder)["verification"]["level"] == "weights"
    with pytest.raises(ModelError, match="no tokenizer"):
        merged(tmp_path / "adapter", output=tmp_path / "m", base=str(tmp_path / "base"), verify="logits")


def test_what_is_not_computed_one_by_one_is_merged_in_memory_and_said(run: RunDir, tmp_path: Path) -> None:
    other = foreign(run, tmp_path / "foreign", init_lora_weights="olora")
    said = io.StringIO()
    report = report_of(merged(other, said, output=tmp_path / "m"))
    assert report["method"]["used"] == "full"
    assert "olora" in report["method"]["reason"]
    assert "in memory" in said.getvalue()
    with pytest.raises(UsageError, match=r"--method stream: .*olora"):
        merged(other, output=tmp_path / "m", method="stream")
    base = tmp_path / "pickled"
    model = AutoModelForCausalLM.from_pretrained(json.loads(run.plan_file.read_text())["model"]["name_or_path"])
    shutil.copytree(json.loads(run.plan_file.read_text())["model"]["name_or_path"], base)
    torch.save(model.state_dict(), base / "pytorch_model.bin")
    (base / "model.safetensors").unlink()
    shutil.copytree(run.adapter, tmp_path / "other")
    report = report_of(merged(tmp_path / "other", output=tmp_path / "p", base=str(base)))
    assert "no safetensors" in report["method"]["reason"]
    torch.testing.assert_close(logits_of(tmp_path / "p"), logits_of(merged(run.path)), rtol=1e-5, atol=1e-6)


def test_tied_embeddings_are_untied_when_they_must_be(recipe: RecipeMaker, train: Train, tmp_path: Path) -> None:
    tied = make_model(tmp_path / "tied", tie_word_embeddings=True)
    run = train(recipe(model={"name_or_path": str(tied)}, lora={"modules_to_save": ["embed_tokens"]}))
    adapter = AutoPeftModelForCausalLM.from_pretrained(run.adapter)
    for method in ("stream", "full"):
        said = io.StringIO()
        folder = merged(run.path, said, method=method, output=tmp_path / method)
        assert "are two now" in said.getvalue()
        model = AutoModelForCausalLM.from_pretrained(folder)
        assert model.config.tie_word_embeddings is False
        torch.testing.assert_close(logits(model), logits(adapter), rtol=1e-4, atol=1e-4)


# --- several adapters -----------------------------------------------------------------------------


@pytest.fixture
def two(recipe: RecipeMaker, train: Train) -> tuple[Any, Any]:
    one = train(recipe("one"))
    other = train(recipe("other", lora={"r": 2, "target_modules": ["q_proj", "down_proj"]}, training={"seed": 3}))
    return one, other


def summed(one: Path, other: Path, weight: float) -> torch.Tensor:
    """Logits with both adapters' outputs added, the other's times a weight."""
    base = json.loads((one / "adapter_config.json").read_text())["base_model_name_or_path"]
    model = PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained(base), one, adapter_name="one")
    model.load_adapter(other, adapter_name="other")
    model.base_model.set_adapter(["one", "other"])
    for module in model.modules():
        if isinstance(module, LoraLayer) and "other" in module.scaling:
            module.scaling["other"] *= weight
    return logits(model)


@pytest.mark.parametrize("weight", [0.3, -1.0])
def test_a_sum_of_adapters_answers_as_their_outputs_added(weight: float, two: tuple[Any, Any], tmp_path: Path) -> None:
    one, other = two
    folder = merged(one.path, output=tmp_path / "m", additions=(Addition(other.path, weight),))
    expected = summed(one.adapter, other.adapter, weight)
    torch.testing.assert_close(logits_of(folder), expected, rtol=1e-4, atol=1e-4)
    report = report_of(folder)
    assert report["additions"] == [{"adapter": str(other.path), "weight": weight}]
    assert report["verification"]["level"] == "weights"


def test_pefts_linear_is_no_sum(tmp_path: Path, recipe: RecipeMaker, train: Train) -> None:
    """Why the sum is made of full deltas: PEFT's `linear` multiplies summed factors, which adds cross terms."""
    one, other = train(recipe("one")), train(recipe("other", training={"seed": 3}))
    base = json.loads((one.adapter / "adapter_config.json").read_text())["base_model_name_or_path"]
    model = PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained(base), one.adapter, adapter_name="one")
    model.load_adapter(other.adapter, adapter_name="other")
    model.add_weighted_adapter(["one", "other"], [1.0, 0.5], "sum", combination_type="linear")
    model.set_adapter("sum")
    theirs = logits(model)
    expected = summed(one.adapter, other.adapter, 0.5)
    ours = logits_of(merged(one.path, output=tmp_path / "m", additions=(Addition(other.path, 0.5),)))
    assert (ours - expected).abs().max() < 1e-3 * (theirs - expected).abs().max()


def test_one_adapter_of_several(two: tuple[Any, Any], tmp_path: Path) -> None:
    one, other = two
    addition = (Addition(other.path, 0.5),)
    folder = merged(one.path, output=tmp_path / "wide", additions=addition, as_adapter=True, rank=6)
    report = report_of(folder)
    assert report["truncation_error"]["largest"] < 1e-4, "4 + 2 ranks fit into 6"
    base = json.loads((one.adapter / "adapter_config.json").read_text())["base_model_name_or_path"]
    adapter = PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained(base), folder)
    torch.testing.assert_close(logits(adapter), summed(one.adapter, other.adapter, 0.5), rtol=1e-4, atol=1e-4)
    narrow = merged(one.path, output=tmp_path / "narrow", additions=addition, as_adapter=True, rank=1)
    assert report_of(narrow)["truncation_error"]["largest"] > 0.01
    again = merged(narrow, output=tmp_path / "again", base=base, verify="weights")
    assert again.is_dir(), "it merges like any other"


def test_one_adapter_of_dora_is_for_the_base_of_the_training(tmp_path: Path, tiny_model: Path) -> None:
    """DoRA's deltas depend on the base, which was in 4 bits."""
    from lorafit.engine.merge.source import find_base, open_source
    from lorafit.engine.merge.verify import as_trained

    run = run_of(tmp_path, tiny_model, quantization={"load_in_4bit": True}, lora={"use_dora": True})
    made = merged(run, output=tmp_path / "made", as_adapter=True, rank=64)
    with open_source(run) as source:
        base = find_base(source, None, False)
        expected = logits(PeftModel.from_pretrained(as_trained(source, base), source.adapter))
        found = logits(PeftModel.from_pretrained(as_trained(source, base), made))
    torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-4)


def test_an_adapter_is_not_added_to_itself(run: RunDir) -> None:
    with pytest.raises(UsageError, match="is named twice"):
        merged(run.path, additions=(Addition(run.path, -1.0),))


def test_adapters_of_different_bases_are_not_combined(recipe: RecipeMaker, train: Train, tmp_path: Path) -> None:
    other_base = make_model(tmp_path / "other-base", seed=5)
    one, other = train(recipe("one")), train(recipe("two", model={"name_or_path": str(other_base)}))
    with pytest.raises(ModelError, match="another base"):
        merged(one.path, additions=(Addition(other.path, 1.0),))


# --- broken inputs --------------------------------------------------------------------------------


def broken(run: Any, change: Any) -> Path:
    """The run with its adapter's weights changed."""
    file = run.adapter / "adapter_model.safetensors"
    tensors = load_file(file)
    change(tensors)
    save_file(tensors, file, metadata={"format": "pt"})
    resealed(run)
    return run.path


def first_b(tensors: dict[str, torch.Tensor]) -> str:
    return next(key for key in sorted(tensors) if "lora_B" in key)


@pytest.mark.parametrize("method", ["stream", "full"])
def test_a_zero_adapter_is_refused(method: Any, run: RunDir) -> None:
    broken(run, lambda tensors: tensors[first_b(tensors)].zero_())
    with pytest.raises(GateError, match="changes nothing here"):
        merged(run.path, method=method)
    assert not run.merged.exists()


@pytest.mark.parametrize("method", ["stream", "full"])
def test_an_adapter_with_nan_is_refused(method: Any, run: RunDir) -> None:
    broken(run, lambda tensors: tensors[first_b(tensors)].view(-1)[3:4].fill_(float("nan")))
    with pytest.raises((GateError, ModelError), match="not finite"):
        merged(run.path, method=method)
    assert not run.merged.exists()


def test_an_adapter_that_lacks_a_tensor_is_refused(run: RunDir) -> None:
    broken(run, lambda tensors: tensors.pop(first_b(tensors)))
    with pytest.raises(ModelError, match=r"lacks 1 .*tensors"):
        merged(run.path)


def test_targets_that_do_not_exist_are_refused(run: RunDir, tmp_path: Path) -> None:
    config = json.loads((run.adapter / "adapter_config.json").read_text())
    (run.adapter / "adapter_config.json").write_text(json.dumps(config | {"target_modules": ["wq", "wv"]}))
    resealed(run)
    with pytest.raises(ModelError, match=r"not belong .*base"):
        merged(run.path)
    assert not run.merged.exists()


def test_a_truncated_shard_is_refused(recipe: RecipeMaker, train: Train, tmp_path: Path) -> None:
    base = make_model(tmp_path / "base")
    run = train(recipe(model={"name_or_path": str(base)}))
    file = base / "model.safetensors"
    file.write_bytes(file.read_bytes()[:-1000])
    with pytest.raises(ModelError, match=r"model\.safetensors"):
        merged(run.path, allow_other_base=True)
    assert not run.merged.exists()


def test_too_little_disk_is_known_before_anything_is_written(run: RunDir, monkeypatch: pytest.MonkeyPatch) -> None:
    usage = shutil.disk_usage(run.path)
    monkeypatch.setattr("lorafit.engine.merge.run.shutil.disk_usage", lambda _: usage._replace(free=1000))
    with pytest.raises(DoesNotFitError, match=r"disk .*0.00 GB .*free"):
        merged(run.path)
    assert not hidden(run.path)


def test_too_little_memory_is_known_before_anything_is_written(run: RunDir, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("lorafit.engine.merge.run.available_memory", lambda: 1000)
    with pytest.raises(DoesNotFitError, match="of memory"):
        merged(run.path)
    monkeypatch.setattr("lorafit.engine.merge.run.available_memory", lambda: 500 << 20)
    report = report_of(merged(run.path))
    assert report["verification"]["level"] == "weights"
    assert "of memory" in report["verification"]["reason"]


# --- what a merge must not replace ----------------------------------------------------------------


def foreign(run: RunDir, folder: Path, **changes: Any) -> Path:
    """A run's adapter as one from elsewhere, with fields of its configuration changed."""
    shutil.copytree(run.adapter, folder)
    file = folder / "adapter_config.json"
    file.write_text(json.dumps(json.loads(file.read_text()) | changes))
    (folder / SEAL).unlink()
    return folder


def base_of(run: RunDir) -> Path:
    return Path(run.load_plan().model.name_or_path)


def test_what_the_merge_needs_is_not_replaced(run: RunDir, recipe: RecipeMaker, train: Train, tmp_path: Path) -> None:
    first = merged(run.path, output=tmp_path / "first", verify="weights")
    again = train(recipe("again", model={"name_or_path": str(first)}))
    before = (first / "model.safetensors").read_bytes()
    for output in (first, tmp_path / "linked"):
        (tmp_path / "linked").is_symlink() or (tmp_path / "linked").symlink_to(first)
        with pytest.raises(UsageError, match="would be replaced"):
            merged(again.path, output=output, verify="weights")
    assert (first / "model.safetensors").read_bytes() == before
    shutil.copytree(first, tmp_path / "second.unverified")
    with pytest.raises(UsageError, match=r"second\.unverified: would be replaced"):
        merged(again.path, base=str(tmp_path / "second.unverified"), output=tmp_path / "second", verify="weights")
    adapter = merged(run.path, output=tmp_path / "adapter", as_adapter=True, rank=2)
    with pytest.raises(UsageError, match="would be replaced"):
        merged(adapter, output=adapter, verify="weights")
    assert (adapter / "adapter_model.safetensors").is_file()


def test_two_merges_into_one_destination_are_not_mixed(
    run: RunDir, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    one, other = foreign(run, tmp_path / "one"), foreign(run, tmp_path / "other")
    write, met = Merging.write, list[str]()

    def meanwhile(self: Merging, kind: str, folder: Path) -> Any:
        if self.source.adapter == one:
            with pytest.raises(UsageError, match="another process"):
                merged(other, output=tmp_path / "m", verify="weights")
            met.append(kind)
        return write(self, kind, folder)

    monkeypatch.setattr(Merging, "write", meanwhile)
    assert report_of(merged(one, output=tmp_path / "m", verify="weights"))["adapter"] == str(one)
    assert met
    (tmp_path / ".m.partial").mkdir()  # a killed one's, which nobody holds
    assert merged(other, output=tmp_path / "m", verify="weights").is_dir()


def test_exports_replace_only_exports(run: RunDir, tmp_path: Path) -> None:
    mine = tmp_path / "m-nf4"
    mine.mkdir()
    (mine / "thesis.txt").write_text("years")
    with pytest.raises(UsageError, match=r"m-nf4: .*not a merge"):
        merged(run.path, output=tmp_path / "m", quantize="nf4")
    assert (mine / "thesis.txt").is_file()
    assert not (tmp_path / "m").exists(), "it is known before anything is merged"
    (tmp_path / "m-gguf").write_text("a file")
    with pytest.raises(UsageError, match=r"m-gguf: .*file"):
        merged(run.path, output=tmp_path / "m", exports=("gguf:f16",))
    limits = ("merge.max_kl=9.0", "merge.min_top1=0.0", "merge.max_loss_increase=9.0")
    for _ in range(2):
        merged(run.path, output=tmp_path / "n", quantize="fp4", overrides=limits)
    assert (tmp_path / "n-fp4" / "config.json").is_file(), "a copy of before is replaced"


# --- silently wrong -------------------------------------------------------------------------------


@pytest.mark.parametrize("method", ["stream", "full"])
def test_numbers_beyond_float16_are_refused(method: Any, run: RunDir, tmp_path: Path) -> None:
    base = shutil.copytree(base_of(run), tmp_path / "base")
    tensors = load_file(base / "model.safetensors")
    tensors["model.layers.0.mlp.up_proj.weight"][77, 3] = 1e6
    tensors["model.embed_tokens.weight"][5, 5] = 1e6  # not adapted: only cast
    save_file(tensors, base / "model.safetensors", metadata={"format": "pt"})
    adapter = foreign(run, tmp_path / "adapter")
    options = {"base": str(base), "output": tmp_path / "m", "method": method, "verify": "weights"}
    with pytest.raises(GateError, match=r"float16.*--dtype"):
        merged(adapter, dtype="float16", **options)
    assert not (tmp_path / "m").exists()
    assert merged(adapter, dtype="bfloat16", **options).is_dir()


def test_in_memory_every_tensor_of_the_adapter_has_its_place(run: RunDir, tmp_path: Path) -> None:
    """PEFT leaves missing matrices as they begin, and only warns."""
    whole = foreign(run, tmp_path / "whole")
    shallow = make_model(tmp_path / "shallow", num_hidden_layers=1)
    with pytest.raises(ModelError, match=r"tensors .*no place"):
        merged(whole, base=str(shallow), output=tmp_path / "m", method="full", verify="weights")
    with pytest.raises(ModelError, match=r"lacks 14 .*tensors"):
        merged(
            foreign(run, tmp_path / "ia3", peft_type="IA3", feedforward_modules=[]),
            output=tmp_path / "m",
            verify="weights",
        )
    tensors = load_file(whole / "adapter_model.safetensors")
    tensors.pop(next(key for key in sorted(tensors) if "lora_A" in key))
    save_file(tensors, whole / "adapter_model.safetensors")
    with pytest.raises(ModelError, match=r"lacks 1 .*tensors"):
        merged(whole, output=tmp_path / "m", method="full", verify="weights")
    assert not (tmp_path / "m").exists()


def test_in_memory_without_answers_nothing_is_called_verified(run: RunDir) -> None:
    assert report_of(merged(run.path, method="full", verify="weights"))["verdict"].startswith("Not verified")


def test_tied_embeddings_stay_tied_in_both_kinds_of_base_weights(tmp_path: Path) -> None:
    from peft import LoraConfig, get_peft_model

    tied = make_model(tmp_path / "tied", tie_word_embeddings=True)
    run = RunDir(run_of(tmp_path, tied, quantization={"load_in_4bit": True}, dataset={"validation": 0.25}))
    config = LoraConfig(r=4, target_modules=["q_proj"], trainable_token_indices=[1, 2], task_type="CAUSAL_LM")
    peft = get_peft_model(AutoModelForCausalLM.from_pretrained(tied), config)
    with torch.no_grad():
        for parameter in peft.parameters():
            if parameter.requires_grad:
                parameter.add_(0.1 * torch.randn_like(parameter))
    peft.save_pretrained(run.adapter)
    resealed(run)
    for kind, verify in (("original", "weights"), ("dequantized", "logits")):
        settings = (f"merge.base_weights={kind}", f"merge.verify={verify}")  # as --set says it
        folder = merged(run.path, output=tmp_path / kind, overrides=settings)
        assert AutoModelForCausalLM.from_pretrained(folder).config.tie_word_embeddings
        assert not report_of(folder)["untied"]
    assert report_of(tmp_path / "dequantized")["verification"]["figures"]["kl"] < 1e-6


def test_a_logit_that_is_no_number_is_the_largest_difference() -> None:
    from lorafit.engine.merge.verify import Probe, Reference, breaches

    class Broken:
        def eval(self) -> None: ...

        def __call__(self, **_: Any) -> Any:
            return type("Output", (), {"logits": torch.full((1, 4, 8), float("nan"))})

    rows = [Probe([1, 2, 3, 4], [0, 1, 2])]
    figures = Reference(rows, "", [torch.zeros(3, 8)], 0.0, 0.0).compare(Broken())
    assert breaches(figures, {"max_logit_difference": 1.0})


# --- odd inputs -----------------------------------------------------------------------------------


def test_a_vocabulary_that_comes_along_can_not_be_scaled(run: RunDir, tmp_path: Path) -> None:
    model = AutoModelForCausalLM.from_pretrained(base_of(run))
    model.resize_token_embeddings(400)
    PeftModel.from_pretrained(model, run.adapter).save_pretrained(tmp_path / "a", save_embedding_layers=True)
    with pytest.raises(UsageError, match=r"another size .*\(400 rows\)"):
        merged(tmp_path / "a", output=tmp_path / "m", base=str(base_of(run)), weight=0.5)


def test_an_adapter_in_pytorchs_own_file(run: RunDir, tmp_path: Path) -> None:
    adapter = foreign(run, tmp_path / "a")
    torch.save(load_file(adapter / "adapter_model.safetensors"), adapter / "adapter_model.bin")
    (adapter / "adapter_model.safetensors").unlink()
    folder = merged(adapter, output=tmp_path / "m")
    torch.testing.assert_close(logits_of(folder), logits_of(merged(run.path)), rtol=1e-5, atol=1e-6)
    (adapter / "adapter_model.bin").unlink()
    with pytest.raises(ModelError, match=r"has no adapter_model\.safetensors"):
        merged(adapter, output=tmp_path / "m")


def test_an_adapter_of_integers_is_refused(run: RunDir) -> None:
    def whole(tensors: dict[str, torch.Tensor]) -> None:
        tensors[first_b(tensors)] = tensors[first_b(tensors)].int()

    with pytest.raises(ModelError, match="holds int32"):
        merged(broken(run, whole))


def test_an_adapter_that_has_a_part_of_a_tokenizer(run: RunDir, tmp_path: Path) -> None:
    adapter = foreign(run, tmp_path / "a")
    for file in adapter.glob("tokenizer*"):
        file.unlink()
    (adapter / "chat_template.jinja").write_text("{{ messages }}")
    assert len(AutoTokenizer.from_pretrained(merged(adapter, output=tmp_path / "m"))) > 100


@pytest.mark.parametrize(
    "change", [{"shape": [64, 65]}, {"dtype": "F16"}, {"dtype": "F9"}, {"data_offsets": [-4, 16384]}]
)
def test_a_header_that_can_not_be_true_is_refused(change: dict[str, Any], run: RunDir, tmp_path: Path) -> None:
    base = shutil.copytree(base_of(run), tmp_path / "base")
    content = (base / "model.safetensors").read_bytes()
    length = int.from_bytes(content[:8], "little")
    header = json.loads(content[8 : 8 + length])
    header["model.layers.0.self_attn.q_proj.weight"] |= change
    text = json.dumps(header).encode()
    (base / "model.safetensors").write_bytes(len(text).to_bytes(8, "little") + text + content[8 + length :])
    with pytest.raises(ModelError, match=r"whole safetensors .*q_proj"):
        merged(foreign(run, tmp_path / "a"), base=str(base), output=tmp_path / "m", verify="weights")


def test_odd_things_in_a_base(run: RunDir, tmp_path: Path) -> None:
    base, adapter = shutil.copytree(base_of(run), tmp_path / "base"), foreign(run, tmp_path / "a")
    (base / "LICENSES").mkdir()
    settings = json.loads((base / "generation_config.json").read_text()) | {"eos_token_id": [2, 383_999]}
    (base / "generation_config.json").write_text(json.dumps(settings))
    options = {"base": str(base), "output": tmp_path / "m", "verify": "weights"}
    merged(adapter, exports=("gguf:f16",), **options)
    assert "PARAMETER stop" in (tmp_path / "m-gguf" / "Modelfile").read_text()
    (base / "model.safetensors").rename(base / "w.safetensors")
    (base / "model.safetensors.index.json").write_text('{"weight_map": {"a": "x/w.safetensors"}}')
    with pytest.raises(ModelError, match="can't be loaded"):
        merged(adapter, method="full", **options)
    (base / "x").mkdir()
    (base / "w.safetensors").rename(base / "x" / "w.safetensors")
    with pytest.raises(ModelError, match="model's folder"):
        merged(adapter, **options)


def test_a_packed_base_is_not_merged_into_in_memory(quantized: Path, tiny_model: Path, tmp_path: Path) -> None:
    from transformers import BitsAndBytesConfig

    config = BitsAndBytesConfig(load_in_4bit=True, bnb_4bit_quant_type="nf4")
    base = shutil.copytree(tiny_model, tmp_path / "base")
    model = AutoModelForCausalLM.from_pretrained(tiny_model, quantization_config=config, device_map={"": "cpu"})
    model.save_pretrained(base)
    adapter = foreign(RunDir(quantized), tmp_path / "a")
    with pytest.raises(UsageError, match="stored quantized"):
        merged(adapter, base=str(base), output=tmp_path / "m", method="full")
    assert merged(adapter, base=str(base), output=tmp_path / "m").is_dir()


def test_prompts_are_not_merged(tiny_model: Path, tmp_path: Path) -> None:
    from peft import PromptTuningConfig, get_peft_model

    config = PromptTuningConfig(task_type="CAUSAL_LM", num_virtual_tokens=2)
    get_peft_model(AutoModelForCausalLM.from_pretrained(tiny_model), config).save_pretrained(tmp_path / "a")
    with pytest.raises(ModelError, match="PROMPT_TUNING"):
        merged(tmp_path / "a", base=str(tiny_model), output=tmp_path / "m")


def test_a_finished_merge_is_exported_without_merging_again(run: RunDir, tmp_path: Path) -> None:
    """It is still one that holds; what has changed, or was not proved, is not exported."""
    merged(run.path, output=tmp_path / "m")
    weights = (tmp_path / "m" / "model.safetensors").stat()
    merged(run.path, output=tmp_path / "m", exports=("gguf:f32",), overwrite=False)
    assert (tmp_path / "m" / "model.safetensors").stat().st_mtime_ns == weights.st_mtime_ns
    assert damage(tmp_path / "m") == []
    report = report_of(tmp_path / "m")
    assert report["gguf"]["f32"]["top1_agreement"] == 1
    shutil.rmtree(tmp_path / "m-gguf")
    config = tmp_path / "m" / "config.json"
    config.write_text(config.read_text() + "\n")
    with pytest.raises(DriftError, match=r"config\.json"):
        merged(run.path, output=tmp_path / "m", exports=("gguf:f32",), overwrite=False)
    merged(run.path, output=tmp_path / "n", verify="none")
    with pytest.raises(UsageError, match="proof"):
        merged(run.path, output=tmp_path / "n", exports=("gguf:f32",), overwrite=False)
    assert not (tmp_path / "m-gguf").exists()


def test_an_export_that_can_not_be_written_is_refused_before_anything_is_merged(
    run: RunDir, tmp_path: Path, tiny_model: Path
) -> None:
    base = tmp_path / "base"
    shutil.copytree(tiny_model, base)
    config = json.loads((base / "config.json").read_text())
    (base / "config.json").write_text(json.dumps(config | {"rope_scaling": {"rope_type": "dynamic", "factor": 2.0}}))
    with pytest.raises(ModelError, match="dynamic"):
        merged(run.path, output=tmp_path / "m", base=str(base), allow_other_base=True, exports=("gguf:f16",))
    assert not list(tmp_path.glob("*m*/*.safetensors"))


def test_why_there_is_no_modelfile_is_said(run: RunDir, tmp_path: Path) -> None:
    (run.adapter / "chat_template.jinja").unlink()
    resealed(run)
    merged(run.path, said := io.StringIO(), output=tmp_path / "m", exports=("gguf:f16",))
    assert [file.suffix for file in (tmp_path / "m-gguf").iterdir()].count("") == 0
    assert "no_modelfile" in report_of(tmp_path / "m")
    assert "Modelfile" in said.getvalue()
