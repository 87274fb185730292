"""A benchmark measures what it says: the same tokens for all, steps with the cache, tensors counted once."""

from __future__ import annotations

import contextlib
import io
import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from conftest import RecipeMaker, Train, conversation, make_model, write_jsonl
from rich.console import Console
from transformers import AutoModelForCausalLM
from typer.testing import CliRunner
from wording import Like
from yaml import safe_dump

from lorafit.cli import app
from lorafit.engine.bench.measure import Pass, SharedBase, draw_tokens, models_of, run_pass, tensor_bytes
from lorafit.engine.bench.report import BenchReport, as_markdown, median, print_bench, ratios, timing
from lorafit.engine.bench.run import bench
from lorafit.engine.merge.run import merge
from lorafit.engine.tokenizer import load_tokenizer
from lorafit.engine.train import train as run_training
from lorafit.errors import ModelError, UsageError
from lorafit.options import BenchOptions, MergeOptions, Shape, parse_models, parse_numbers
from lorafit.plan import plan_recipe
from lorafit.recipe import Recipe
from lorafit.run.directory import RunDir
from lorafit.run.manifest import Start

QUIET = Console(file=io.StringIO())
NAMES = ["base", "adapter", "merged", "quantized"]
SMALL: dict[str, Any] = {"prompt_tokens": (5, 9), "batch": (1, 3), "new_tokens": 4, "rounds": 3}


@pytest.fixture(scope="module")
def merged(tmp_path_factory: pytest.TempPathFactory, tiny_model: Path) -> RunDir:
    """A run with its merged model and the 4-bit copy of it."""
    folder = tmp_path_factory.mktemp("bench")
    rows = write_jsonl(folder / "rows.jsonl", [conversation(f"cat {i} sat", f"mat {i % 5}") for i in range(16)])
    content = {
        "model": {"name_or_path": str(tiny_model), "dtype": "float32"},
        "lora": {"r": 4, "lora_dropout": 0.0},
        "dataset": {"train": [{"path": str(rows)}]},
        "training": {"max_steps": 8, "learning_rate": 1e-2, "max_length": 128, "per_device_train_batch_size": 4},
        "output_dir": str(folder / "run"),
        "merge": {"max_kl": None, "min_top1": None, "max_loss_increase": None},
    }
    recipe = folder / "recipe.yaml"
    recipe.write_text(safe_dump(content))
    run_training(plan_recipe(Recipe.load(recipe, ()), recipe), recipe.read_bytes(), Start(), QUIET)
    merge(MergeOptions(folder / "run", verify="weights", quantize="nf4"), QUIET)
    return RunDir(folder / "run")


@pytest.fixture(scope="module")
def report(merged: RunDir) -> BenchReport:
    """Of all four models, timed by a clock that goes on by one second each time it is read."""
    return bench(BenchOptions(merged.path, **SMALL), ticking())


def ticking(step: float = 1.0) -> Callable[[], float]:
    now = 0.0

    def tick() -> float:
        nonlocal now
        now += step
        return now

    return tick


def passes(run: RunDir, name: str, new_tokens: int = 12) -> Pass:
    """One pass of a model on two prompts."""
    plan = run.load_plan()
    ids = draw_tokens(load_tokenizer(plan, run.adapter), 384, Shape(7, 2), 0)
    if name == "merged":
        return run_pass(AutoModelForCausalLM.from_pretrained(run.merged).eval(), ids, new_tokens, ticking())
    base = AutoModelForCausalLM.from_pretrained(plan.model.name_or_path).eval()
    return run_pass(SharedBase(base, run.adapter).use(name == "adapter"), ids, new_tokens, ticking())


def test_every_model_is_timed_on_every_shape_in_every_round(report: BenchReport) -> None:
    assert list(report.models) == NAMES
    assert {(one.model, one.prompt_tokens, one.batch) for one in report.timings} == {
        (name, length, batch) for name in NAMES for length in (5, 9) for batch in (1, 3)
    }
    assert all(len(one.prefill_seconds) == len(one.decode_seconds) == 3 for one in report.timings)
    assert {(one.model, one.against, one.phase) for one in report.ratios} == {
        (name, "adapter", phase) for name in ("base", "merged", "quantized") for phase in ("prefill", "decode")
    }


def test_tokens_per_second_count_all_rows(report: BenchReport) -> None:
    for one in report.timings:  # the clock is read before and after each phase: each takes a second
        assert one.prefill_seconds == one.decode_seconds == (1.0, 1.0, 1.0)
        assert one.prefill.value == one.prefill.low == one.prefill.high == one.prompt_tokens * one.batch
        assert one.decode.value == 4 * one.batch
    assert {one.ratio.value for one in report.ratios} == {1.0}


def test_ratios_are_paired_by_round_and_their_intervals_hold_them() -> None:
    slow = timing("adapter", (100, 2, 10), [(2.0, 4.0), (4.0, 8.0), (1.0, 2.0)], None, 0)
    fast = timing("merged", (100, 2, 10), [(1.0, 1.0), (2.0, 2.0), (0.5, 0.5)], None, 0)
    assert (slow.prefill.value, slow.prefill.low, slow.prefill.high) == (100, 50, 200)
    assert slow.decode.value == 5
    prefill, decode = ratios([slow, fast], "adapter", 0)
    assert (prefill.ratio.value, prefill.ratio.low, prefill.ratio.high) == (2, 2, 2), "twice as fast in each round"
    assert decode.ratio.value == 4
    for seed in range(5):
        found = median([3.0, 1.0, 4.0, 1.5, 9.0, 2.6], seed)
        assert found.low <= found.value == 2.8 <= found.high
        assert found.low < found.high
        assert found == median([3.0, 1.0, 4.0, 1.5, 9.0, 2.6], seed)
    assert median([7.0], 0).low == median([7.0], 0).high == 7


def test_all_models_get_the_same_tokens(merged: RunDir, monkeypatch: pytest.MonkeyPatch) -> None:
    seen: list[torch.Tensor] = []

    def spy(model: Any, ids: torch.Tensor, *rest: Any) -> Pass:
        seen.append(ids.clone())
        return run_pass(model, ids, *rest)

    monkeypatch.setattr("lorafit.engine.bench.run.run_pass", spy)
    options = BenchOptions(merged.path, prompt_tokens=(6,), batch=(2,), new_tokens=1, rounds=1)
    first = bench(options)
    assert len(seen) == 8, "four models, warmed up and timed once"
    assert all(torch.equal(ids, seen[0]) for ids in seen)
    other = bench(BenchOptions(merged.path, ("merged",), (6, 7), 1, (2,), 1))
    digests = other.settings["token_digests"]
    assert digests["6x2"] == first.settings["token_digests"]["6x2"], "shapes don't depend on each other"
    assert not torch.equal(draw(merged, 1), draw(merged, 0))


def draw(run: RunDir, seed: int) -> torch.Tensor:
    return draw_tokens(load_tokenizer(run.load_plan(), run.adapter), 300, Shape(400, 5), seed)


def test_prompts_are_plain_tokens_that_the_model_has(merged: RunDir) -> None:
    ids = draw(merged, 0)
    assert ids.shape == (5, 400)
    assert int(ids.min()) >= 3, "the first three are special"
    assert int(ids.max()) < 300
    assert len(ids.unique()) > 200


@pytest.mark.parametrize("name", ["base", "adapter", "merged"])
def test_decoding_goes_on_with_the_cache(name: str, merged: RunDir) -> None:
    done = passes(merged, name)
    assert done.tokens.shape == (2, 12)
    assert done.cached_tokens == 7 + 12
    assert done.cache_bytes == 2 * 2 * 2 * 16 * 4 * (7 + 12) * 2, "keys and values, layers, heads, width, float32, rows"
    assert done.above_bytes is None


def test_adapter_and_merged_give_the_same_tokens_as_without_a_cache(merged: RunDir) -> None:
    adapter, model, base = (passes(merged, name) for name in ("adapter", "merged", "base"))
    assert torch.equal(adapter.tokens, model.tokens)
    assert not torch.equal(adapter.tokens, base.tokens)
    alone = AutoModelForCausalLM.from_pretrained(merged.merged)
    ids = draw_tokens(load_tokenizer(merged.load_plan(), merged.adapter), 384, Shape(7, 2), 0)
    for step in range(12):
        newest = alone(input_ids=ids).logits[:, -1].argmax(-1)
        assert torch.equal(newest, model.tokens[:, step])
        ids = torch.cat([ids, newest[:, None]], dim=1)


def test_the_base_runs_without_pefts_modules_and_takes_turns(merged: RunDir) -> None:
    plan = merged.load_plan()
    alone = AutoModelForCausalLM.from_pretrained(plan.model.name_or_path).eval()
    sides = SharedBase(AutoModelForCausalLM.from_pretrained(plan.model.name_or_path).eval(), merged.adapter)
    ids = draw_tokens(load_tokenizer(plan, merged.adapter), 384, Shape(7, 2), 0)
    expected = alone(input_ids=ids).logits
    adapted = sides.use(True)(input_ids=ids).logits
    for _ in range(2):
        base = sides.use(False)
        assert not [name for name, _ in base.named_modules() if "lora" in name]
        torch.testing.assert_close(base(input_ids=ids).logits, expected)
        torch.testing.assert_close(sides.use(True)(input_ids=ids).logits, adapted)
    assert (adapted - expected).abs().max() > 1e-3


def test_memory_is_the_sum_of_the_tensors(report: BenchReport, merged: RunDir, tiny_model: Path) -> None:
    def held(folder: Path) -> int:
        model = AutoModelForCausalLM.from_pretrained(folder)
        return sum(one.numel() * one.element_size() for one in [*model.parameters(), *model.buffers()])

    models = report.models
    added = sum(8 * 4 * (i + o) // 2 for i, o in [(64, 64), (64, 32), (64, 32), (64, 64)] * 2)
    added += sum(8 * 4 * (i + o) // 2 for i, o in [(64, 128), (64, 128), (128, 64)] * 2)  # r 4, float32
    assert models["base"].tensor_bytes == held(tiny_model)
    assert models["adapter"].tensor_bytes == held(tiny_model) + added
    assert models["merged"].tensor_bytes == held(merged.merged)
    assert held(merged.merged) > models["quantized"].tensor_bytes > held(merged.merged) / 8
    assert models["base"].cache_bytes_per_token == 2 * 2 * 2 * 16 * 4
    assert [one.quantization for one in models.values()] == [None, None, None, "nf4"]
    assert [one.kind for one in models.values()] == NAMES


def test_scales_of_quantized_weights_are_counted(merged: RunDir) -> None:
    model = AutoModelForCausalLM.from_pretrained(merged.path / "merged-nf4")
    plain = {one.data_ptr(): one.numel() * one.element_size() for one in [*model.parameters(), *model.buffers()]}
    states = [one.quant_state for one in model.parameters() if hasattr(one, "quant_state")]
    assert len(states) == 14
    scales = [t for s in states for t in (s.absmax, s.code, s.offset, s.state2.absmax, s.state2.code)]
    more = {one.data_ptr(): one.numel() * one.element_size() for one in scales}
    assert tensor_bytes(model) == sum((plain | more).values())


def test_tied_weights_are_counted_once(tmp_path: Path) -> None:
    tied = AutoModelForCausalLM.from_pretrained(make_model(tmp_path / "tied", tie_word_embeddings=True))
    untied = AutoModelForCausalLM.from_pretrained(make_model(tmp_path / "untied"))
    assert tensor_bytes(untied) - tensor_bytes(tied) == 384 * 64 * 4


def test_only_named_models_are_measured(merged: RunDir) -> None:
    found = models_of(merged, merged.load_plan(), ("quantized", "base"))
    assert [one.name for one in found] == ["base", "quantized"]


@pytest.mark.parametrize(("missing", "flags"), [("merged", ""), ("quantized", " --quantize nf4")])
def test_a_missing_model_is_named_with_what_makes_it(missing: str, flags: str, merged: RunDir, tmp_path: Path) -> None:
    run = RunDir(shutil.copytree(merged.path, tmp_path / "run"))
    shutil.rmtree(run.path / {"merged": "merged", "quantized": "merged-nf4"}[missing])
    with pytest.raises(UsageError, match=rf"`lorafit merge {run.path}{flags}`"):
        bench(BenchOptions(run.path, ("adapter", missing)))
    if missing == "quantized":
        assert [one.name for one in models_of(run, run.load_plan(), ())] == NAMES[:3]


def test_a_copy_of_an_earlier_merge_is_refused(merged: RunDir, tmp_path: Path) -> None:
    run = RunDir(shutil.copytree(merged.path, tmp_path / "run"))
    merge(MergeOptions(run.path, verify="none", overwrite=True), QUIET)
    with pytest.raises(ModelError, match=r"merged-nf4: .*not made of"):
        models_of(run, run.load_plan(), ())


def test_a_run_that_trained_in_full_has_no_adapter(recipe: RecipeMaker, train: Train) -> None:
    run = train(recipe(lora=None))
    found = bench(BenchOptions(run.path, **SMALL), ticking())
    assert list(found.models) == ["base", "trained"]
    assert {(one.model, one.against) for one in found.ratios} == {("base", "trained")}
    with pytest.raises(UsageError, match=r"--model adapter: .*\btrained\b"):
        bench(BenchOptions(run.path, ("adapter",)))


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        ({"models": ("adapter", "mergd")}, r"\bmerged\b"),
        ({"models": ("base", "base")}, "twice"),
        ({"prompt_tokens": (0,)}, "--prompt-tokens"),
        ({"batch": ()}, "--batch"),
        ({"batch": (2, 2)}, "twice"),
        ({"output": Path("speed.txt")}, r"\.json or \.md"),
        ({"output": Path("nowhere/speed.md")}, "no folder nowhere"),
    ],
)
def test_what_can_not_be_measured_is_said(changes: dict[str, Any], said: str) -> None:
    with pytest.raises(UsageError, match=said):
        BenchOptions(Path("run"), **changes).check()


def test_prompts_longer_than_the_model_are_refused(merged: RunDir) -> None:
    with pytest.raises(UsageError, match=r"513 .*512"):
        bench(BenchOptions(merged.path, ("base",), (500,), 13, (1,), 1))


def test_lists_of_the_command_line() -> None:
    assert parse_numbers("1, 8") == (1, 8)
    assert parse_models("adapter, merged") == ("adapter", "merged")
    done = CliRunner().invoke(app, ["bench", "runs/none", "--batch", "1;8"])
    assert done.exit_code == 2
    assert done.stderr.startswith("--batch 1;8: ")
    for option, value in (("--rounds", "0"), ("--new-tokens", "0"), ("--seed", "-1")):
        done = CliRunner().invoke(app, ["bench", "runs/none", option, value])
        assert done.exit_code == 2
        assert option in done.stderr


@pytest.mark.parametrize("free", [1 << 40, 1 << 10])
def test_models_take_turns_if_they_fit_together(free: int, merged: RunDir, monkeypatch: pytest.MonkeyPatch) -> None:
    order: list[str] = []

    def spy(model: Any, *rest: Any) -> Pass:
        wrapped = any("lora" in name for name, _ in model.named_modules())
        order.append("adapter" if wrapped else Path(model.config.name_or_path).name)
        return run_pass(model, *rest)

    monkeypatch.setattr("lorafit.engine.bench.measure.available_memory", lambda: free)
    monkeypatch.setattr("lorafit.engine.bench.run.run_pass", spy)
    found = bench(BenchOptions(merged.path, NAMES[:3], (4,), 1, (1,), 2))
    pair, back = ["tiny", "adapter"], ["adapter", "tiny"]
    if free > 1 << 30:
        assert order == ["merged", *back, *pair, "merged", "merged", *back]
    else:
        assert order == [*back, *pair, *back, "merged", "merged", "merged"]
    assert any("after the other" in remark for remark in found.remarks) == (free < 1 << 30)


@pytest.mark.parametrize(("load", "busy"), [(0.0, False), (10_000.0, True)])
def test_a_busy_machine_is_remarked(load: float, busy: bool, merged: RunDir, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("os.getloadavg", lambda: (load, 0.0, 0.0))
    found = bench(BenchOptions(merged.path, ("merged",), (4,), 1, (1,), 1))
    assert found.load == (load, load)
    assert any("busy" in remark for remark in found.remarks) == busy


def test_the_report_is_written_whole_or_not_at_all(merged: RunDir, tmp_path: Path) -> None:
    file = tmp_path / "speed.json"
    options = BenchOptions(merged.path, ("adapter",), (4,), 2, (1,), 2, output=file)

    def interrupted() -> float:
        raise KeyboardInterrupt

    with contextlib.suppress(KeyboardInterrupt):
        bench(options, interrupted)
    assert not list(tmp_path.iterdir())
    found = bench(options, ticking())
    assert json.loads(file.read_text()) == json.loads(json.dumps(found.as_dict()))
    assert [one.name for one in tmp_path.iterdir()] == ["speed.json"]


def test_tables_show_every_figure(report: BenchReport) -> None:
    text = as_markdown(report)
    assert "| 9 | 3 | merged | 27.0 [27.0, 27.0] | 1.00 [1.00, 1.00] |" in text
    assert "| 9 | 3 | adapter | 12.0 [12.0, 12.0] | 1 |" in text
    assert "| quantized | nf4, the rest float32 |" in text
    assert text == Like("… 3 rounds … 95% … 4 greedy steps")
    assert text == Like("… no peak … CPU")
    shown = io.StringIO()
    print_bench(report, Console(file=shown, width=80))
    for part in ("27.0 [27.0, 27.0]", "KV cache", "nf4, the rest float32", report.hardware["name"]):
        assert part in shown.getvalue()


def test_one_round_has_no_intervals(merged: RunDir) -> None:
    options = BenchOptions(merged.path, models=("base", "merged"), **SMALL | {"rounds": 1})
    text = as_markdown(bench(options, ticking()))
    assert "| 9 | 3 | merged | 27.0 |" in text
    assert "[" not in text
    assert text == Like("… One round … no intervals … 4 greedy steps")
