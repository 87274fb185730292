"""`lorafit smoke`: the pipeline with a tiny model, golden files, and what makes it fail."""

from __future__ import annotations

import json
import math
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from conftest import CHATML, RecipeMaker, conversation, make_model, make_tokenizer, write_jsonl
from typer.testing import CliRunner
from wording import Like

from lorafit.cli import app
from lorafit.engine.smoke import read_golden
from lorafit.errors import DataError, GateError, Interrupted, ModelError, UsageError
from lorafit.options import SmokeOptions
from lorafit.recipe import RecipeError

Smoke = Callable[..., Any]


@pytest.fixture
def smoke(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Smoke:
    """Run a recipe file; afterwards nothing may be left of it."""
    from lorafit.engine.smoke import smoke as run

    scratch = tmp_path / "scratch"
    scratch.mkdir()
    monkeypatch.setattr(tempfile, "tempdir", str(scratch))

    def go(config: Path, *overrides: str, **options: Any) -> Any:
        try:
            return run(SmokeOptions(config, overrides, **options))
        finally:
            assert list(scratch.iterdir()) == []
            assert not (tmp_path / "runs").exists()

    return go


def write_config(folder: Path, **values: Any) -> Path:
    """A model folder without weights."""
    folder.mkdir()
    (folder / "config.json").write_text(json.dumps(values), encoding="utf-8")
    return make_tokenizer(folder)


LLAMA = {
    "model_type": "llama",
    "hidden_size": 1024,
    "intermediate_size": 4096,
    "num_hidden_layers": 12,
    "num_attention_heads": 16,
    "num_key_value_heads": 4,
    "vocab_size": 384,
    "max_position_embeddings": 2048,
    "tie_word_embeddings": False,
}


class TestRuns:
    def test_reports_each_step_of_the_same_architecture(self, smoke: Smoke, recipe: RecipeMaker) -> None:
        report = smoke(recipe(dataset={"validation": 0.2}))
        assert [step.step for step in report.steps] == [1, 2, 3, 4, 5]
        for step in report.steps:
            assert abs(step.loss - math.log(384)) < 2
            assert step.grad_norm > 0
            assert step.tokens > 0
        assert [step.moved for step in report.steps] == sorted(step.moved for step in report.steps)
        assert report.steps[-1].moved > 0
        assert report.validation_loss is not None
        assert report.tokenizer == "real"
        assert report.failures == ()

    def test_stays_as_it_is(self, smoke: Smoke, recipe: RecipeMaker) -> None:
        config = recipe(lora={"lora_dropout": 0.1})
        first, second = (smoke(config, steps=3) for _ in range(2))
        assert first.steps == second.steps

    def test_needs_no_weights_of_the_model(self, smoke: Smoke, recipe: RecipeMaker, tmp_path: Path) -> None:
        folder = write_config(tmp_path / "big", **LLAMA)
        report = smoke(
            recipe(
                model={"name_or_path": str(folder), "dtype": "bfloat16"},
                quantization={"load_in_4bit": True, "bnb_4bit_compute_dtype": "bfloat16"},
                lora={"layers_to_transform": [1, 11], "init_lora_weights": "loftq", "lora_alpha": 4},
                training={"optim": "paged_adamw_8bit", "warmup_steps": 500, "packing": True},
            ),
            steps=3,
        )
        assert report.failures == ()
        assert report.tiny["layers"] < 12
        used = {one.key: one.used for one in report.replaced}
        assert used == {
            "model.dtype": "float32",
            "quantization.bnb_4bit_compute_dtype": "float32",
            "lora.init_lora_weights": True,
            "lora.layers_to_transform": [1],
            "training.optim": "adamw_torch_fused",
            "training.warmup_steps": 1,
        }

    def test_experts(self, smoke: Smoke, recipe: RecipeMaker, tmp_path: Path) -> None:
        experts = {"num_experts": 64, "num_experts_per_tok": 8, "moe_intermediate_size": 256, "head_dim": 32}
        folder = write_config(tmp_path / "moe", **LLAMA | {"model_type": "qwen3_moe"} | experts)
        report = smoke(recipe(model={"name_or_path": str(folder)}), steps=3)
        assert report.failures == ()
        assert report.inputs["model"]["architecture"] == "qwen3_moe"

    def test_gguf(self, smoke: Smoke, recipe: RecipeMaker, tmp_path: Path) -> None:
        from lorafit.export.gguf import export_gguf

        export_gguf(make_model(tmp_path / "plain"), tmp_path / "m.gguf", "f32")
        report = smoke(recipe(model={"name_or_path": str(tmp_path / "m.gguf")}), steps=3)
        assert (report.tokenizer, report.failures) == ("real", ())

    def test_without_the_tokenizer_a_stand_in(self, smoke: Smoke, recipe: RecipeMaker) -> None:
        report = smoke(recipe(model={"name_or_path": "meta-llama/Llama-3.2-1B"}), steps=3)
        assert report.tokenizer == "stand-in"
        assert "STAND-IN" in report.tokenizer_note
        assert report.failures == ()

    @pytest.mark.parametrize("ranks", [{}, {"q_proj": 96}])
    def test_a_start_from_singular_values_has_its_rank(
        self, ranks: dict[str, int], smoke: Smoke, recipe: RecipeMaker, tmp_path: Path
    ) -> None:
        """No side of the tiny model's matrices is below the largest rank."""
        start: dict[str, Any] = {"init_lora_weights": "orthogonal" if ranks else "pissa", "r": 80, "lora_alpha": 80}
        folder = write_config(tmp_path / "big", **LLAMA)
        report = smoke(recipe(model={"name_or_path": str(folder)}, lora=start | {"rank_pattern": ranks}), steps=3)
        assert report.failures == ()
        assert report.tiny["hidden_size"] >= max([80, *ranks.values()])

    def test_full_training(self, smoke: Smoke, recipe: RecipeMaker) -> None:
        assert smoke(recipe(lora=...), steps=3).failures == ()


class TestFails:
    def test_where_the_recipe_is_wrong(self, smoke: Smoke, recipe: RecipeMaker) -> None:
        with pytest.raises(RecipeError, match="q_prj"):
            smoke(recipe(lora={"target_modules": ["q_prj"]}))

    def test_where_the_data_is_wrong(self, smoke: Smoke, recipe: RecipeMaker, tmp_path: Path) -> None:
        rows = write_jsonl(tmp_path / "bad.jsonl", [conversation("a", "b"), conversation("c", "")])
        with pytest.raises(DataError, match="empty"):
            smoke(recipe(dataset={"train": [{"path": str(rows)}]}))

    def test_where_there_is_no_model(self, smoke: Smoke, recipe: RecipeMaker) -> None:
        with pytest.raises(ModelError, match="nobody/nothing"):
            smoke(recipe(model={"name_or_path": "nobody/nothing"}))

    def test_where_the_architecture_is_not_known(self, smoke: Smoke, recipe: RecipeMaker, tmp_path: Path) -> None:
        folder = write_config(tmp_path / "own", **LLAMA | {"model_type": "quux"})
        with pytest.raises(ModelError, match="quux"):
            smoke(recipe(model={"name_or_path": str(folder)}))

    def test_where_the_loss_is_no_number(self, smoke: Smoke, recipe: RecipeMaker) -> None:
        with pytest.raises(GateError, match=r"nan|inf|finite"):
            smoke(recipe(training={"learning_rate": 1e30}))

    def test_where_the_adapter_does_not_change(self, smoke: Smoke, recipe: RecipeMaker) -> None:
        (failure,) = smoke(recipe(training={"learning_rate": 1e-12}), steps=3).failures
        assert "lora_A" in failure
        assert "learning_rate" in failure

    def test_and_leaves_nothing_behind_when_interrupted(
        self, smoke: Smoke, recipe: RecipeMaker, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        def stopped(*_: Any) -> None:
            raise Interrupted("a checkpoint was saved, go on with --resume", 15)

        monkeypatch.setattr("lorafit.engine.smoke.train", stopped)
        with pytest.raises(Interrupted, match=r"nothing .*left"):
            smoke(recipe())


class TestGolden:
    golden = ""
    """As it was recorded, once."""

    @pytest.fixture
    def recorded(self, smoke: Smoke, recipe: RecipeMaker) -> Path:
        config = recipe()
        file = config.with_suffix(".golden.json")
        if not self.golden:
            smoke(config, steps=4, record=True)
            TestGolden.golden = file.read_text()
        file.write_text(self.golden)
        return config

    def test_holds(self, smoke: Smoke, recorded: Path) -> None:
        text = recorded.with_suffix(".golden.json").read_text()
        assert str(recorded.parent) not in text
        report = smoke(recorded, compare=True)
        assert len(report.steps) == 4
        assert (report.failures, report.changed) == ((), ())

    def test_sees_another_learning_rate(self, smoke: Smoke, recorded: Path) -> None:
        (failure,) = smoke(recorded, "training.learning_rate=0.0101", compare=True).failures
        assert "step 2: learning rate" in failure
        assert "training.learning_rate 0.01 -> 0.0101" in failure

    def test_sees_another_template(self, smoke: Smoke, recorded: Path, tmp_path: Path) -> None:
        template = tmp_path / "other.jinja"
        template.write_text(
            CHATML.replace("message['role']", "message['role'] + ':'").replace("assistant\n", "assistant:\n")
        )
        (failure,) = smoke(recorded, f"model.chat_template={template}", compare=True).failures
        assert "step 1:" in failure
        assert "tokens, recorded" in failure
        assert failure == Like("… chat template … changed")

    def test_sees_other_rows(self, smoke: Smoke, recorded: Path, rows: Path) -> None:
        rows.write_text(rows.read_text().replace("the", "a cat"))
        (failure,) = smoke(recorded, compare=True).failures
        assert "data dataset.train.0 has changed" in failure

    def test_sees_what_shows_only_in_the_weights(self, smoke: Smoke, recorded: Path) -> None:
        (failure,) = smoke(recorded, "training.adam_beta2=0.9", compare=True).failures
        assert "the weights moved" in failure

    def test_allows_what_the_tolerance_does(self, smoke: Smoke, recorded: Path) -> None:
        change = "training.weight_decay=0.001"
        (failure,) = smoke(recorded, change, compare=True, tolerance=1e-9).failures
        report = smoke(recorded, change, compare=True, tolerance=0.05)
        assert report.failures == ()
        assert report.changed == ("training.weight_decay default -> 0.001",)
        assert report.changed[0] in failure

    @pytest.mark.parametrize("value", ["NaN", "Infinity", "-Infinity", "1e999", "true", '"1.5"', "[]", "{}"])
    @pytest.mark.parametrize("key", ["validation_loss", "loss", "grad_norm", "learning_rate", "moved", "tokens"])
    def test_is_of_finite_numbers(self, recorded: Path, tmp_path: Path, key: str, value: str) -> None:
        content = json.loads(recorded.with_suffix(".golden.json").read_text())
        (content if key == "validation_loss" else content["steps"][-1])[key] = 12345
        file = tmp_path / "a.golden.json"
        file.write_text(json.dumps(content).replace("12345", value))
        with pytest.raises(UsageError, match="is broken"):
            read_golden(file)

    def test_is_not_compared_with_a_stand_in(self, smoke: Smoke, recorded: Path) -> None:
        with pytest.raises(GateError, match="model's own tokenizer"):
            smoke(recorded, "model.name_or_path=meta-llama/Llama-3.2-1B", compare=True)

    @pytest.mark.parametrize(
        ("content", "said"),
        [
            (None, "no such"),
            ("{", "is broken"),
            ('{"losses": []}', "no golden file"),
            ('{"lorafit_golden": 99}', "format 99"),
            ('{"lorafit_golden": 1, "steps": [{"step": 1}], "tokenizer": "real"}', "is broken"),
            (
                '{"lorafit_golden": 1, "steps": [], "validation_loss": null, "tokenizer": "real", "inputs": {}}',
                "broken",
            ),
        ],
    )
    def test_must_be_one(
        self, smoke: Smoke, recipe: RecipeMaker, tmp_path: Path, content: str | None, said: str
    ) -> None:
        file = tmp_path / "g.json"
        if content is not None:
            file.write_text(content)
        with pytest.raises(UsageError, match=said) as error:
            smoke(recipe(), compare=True, golden=file)
        assert "\n" not in str(error.value)

    @pytest.mark.parametrize(
        ("arguments", "said"),
        [
            (["--record", "--check"], "exclude"),
            (["--golden", "x.json"], "--golden"),
            (["--tolerance", "0.1"], "--tolerance"),
            (["--check", "--tolerance", "-1"], "--tolerance"),
            (["--steps", "2"], "--steps 2"),
        ],
    )
    def test_options_that_do_not_go_together(self, recipe: RecipeMaker, arguments: list[str], said: str) -> None:
        result = CliRunner().invoke(app, ["smoke", str(recipe()), *arguments])
        assert result.exit_code == 2
        assert said in result.stderr

    def test_from_the_command_line(self, recorded: Path) -> None:
        runner = CliRunner()
        good = runner.invoke(app, ["smoke", str(recorded), "--check", "--json"])
        assert (good.exit_code, good.stderr) == (0, "")
        assert len(json.loads(good.stdout)["steps"]) == 4
        bad = runner.invoke(app, ["smoke", str(recorded), "--check", "--set", "lora.lora_alpha=9"])
        assert bad.exit_code == 6
        assert bad.stderr.count("\n") == 1
        assert "lora.lora_alpha 8.0 -> 9.0" in bad.stderr
