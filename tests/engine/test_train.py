"""A run from start to end: what it writes, how it stops, goes on, and refuses."""

from __future__ import annotations

import fcntl
import hashlib
import json
import os
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import yaml
from conftest import RecipeMaker, Train, make_model, write_jsonl
from safetensors.torch import load_file

from lorafit import files
from lorafit.console import Console
from lorafit.engine.callbacks import StopRequest
from lorafit.engine.evaluate.run import evaluate
from lorafit.engine.model import dequantized_base
from lorafit.engine.verify import retrain
from lorafit.errors import DataError, DoesNotFitError, DriftError, GateError, Interrupted, ModelError, UsageError
from lorafit.facts.fingerprint import summary
from lorafit.options import EvalOptions
from lorafit.run.directory import RunDir
from lorafit.run.fingerprint import model_fingerprint


def digest(run: RunDir) -> str:
    return hashlib.sha256((run.adapter / "adapter_model.safetensors").read_bytes()).hexdigest()


def stop_at(step: int, monkeypatch: pytest.MonkeyPatch, number: int = signal.SIGTERM) -> None:
    """Deliver a real signal to this process during a step."""
    count = 0
    original = StopRequest.agreed

    def agreed(self: StopRequest) -> int | None:
        nonlocal count
        count += 1
        if count == step:
            os.kill(os.getpid(), number)
            time.sleep(0.01)
        return original(self)

    monkeypatch.setattr(StopRequest, "agreed", agreed)


def test_a_run_writes_what_the_design_says(recipe: RecipeMaker, train: Train, rows: Path) -> None:
    path = recipe(dataset={"train": [{"path": str(rows)}], "validation": 0.25})
    run = train(path)
    assert run.recipe.read_bytes() == path.read_bytes()
    assert run.load_plan().recipe["training"]["max_steps"] == 4
    manifest = run.load_manifest()
    assert manifest["data"]["files"] == {str(rows): hashlib.sha256(rows.read_bytes()).hexdigest()}
    audit = manifest["data"]["audit"]
    assert (audit["training_rows"]["rows"], audit["validation_rows"]["rows"]) == (18, 6)
    assert audit == run.load_plan().audit
    assert manifest["result"]["steps"] == 4
    assert manifest["versions"]["peft"]
    assert manifest["model"]["trainable_parameters"] == run.load_plan().trainable_parameters
    assert run.base_files() == model_fingerprint(run.load_plan())
    assert manifest["model"]["fingerprint"] == summary(run.base_files() or {})
    metrics = [json.loads(line) for line in run.metrics.read_text().splitlines()]
    assert [entry["step"] for entry in metrics if "loss" in entry] == [1, 2, 3, 4]
    assert [entry["step"] for entry in metrics if "eval_loss" in entry] == [4]
    names = {file.name for file in run.adapter.iterdir()}
    assert {
        "adapter_model.safetensors",
        "adapter_config.json",
        "tokenizer.json",
        "chat_template.jinja",
        "README.md",
    } <= names
    assert "lorafit" in (run.adapter / "README.md").read_text()
    assert not [file for file in run.path.rglob("*") if file.name == "training_args.bin"], "a pickle was written"
    beside = {file.name for file in run.path.parent.iterdir()}
    assert beside == {"recipe"}, "something was left beside the run"


def test_an_interrupted_run_ends_with_the_same_weights(
    recipe: RecipeMaker, train: Train, rows: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Also in the middle of an epoch, at its end, between logs, with dropout, accumulation and the best kept."""
    settings: dict[str, Any] = {
        "lora": {"lora_dropout": 0.2},
        "dataset": {"train": [{"path": str(rows)}], "validation": 0.25},
        "training": {
            "max_steps": ...,
            "num_train_epochs": 3,
            "gradient_accumulation_steps": 2,
            "per_device_train_batch_size": 3,
            "logging_steps": 2,
        },
    }
    whole = train(recipe("whole", **settings))
    assert whole.load_manifest()["result"]["steps"] == 9
    ignored = {"seconds", "eval_runtime", "eval_samples_per_second", "eval_steps_per_second"}
    for stop in (1, 3, 6, 7):
        path = recipe(f"stopped-{stop}", **settings)
        stop_at(stop, monkeypatch)
        with pytest.raises(Interrupted, match="--resume") as caught:
            train(path)
        assert caught.value.signal_number == signal.SIGTERM
        monkeypatch.undo()
        run = train(path, resume=True)
        assert digest(run) == digest(whole), stop
        curves = [
            [{k: v for k, v in entry.items() if k not in ignored} for entry in r.metrics_until(99)]
            for r in (run, whole)
        ]
        assert curves[0] == curves[1]


def test_a_run_goes_on_in_smaller_passes(recipe: RecipeMaker, train: Train, monkeypatch: pytest.MonkeyPatch) -> None:
    """What a run that is out of memory is told to do changes nothing that is learned; other rows a step do."""
    settings = {"training": {"max_steps": 6, "per_device_train_batch_size": 4, "save_strategy": "no"}}
    whole, path = train(recipe("whole", **settings)), recipe("stopped", **settings)
    stop_at(3, monkeypatch)
    with pytest.raises(Interrupted):
        train(path)
    monkeypatch.undo()
    fewer = "training.per_device_train_batch_size=1"
    with pytest.raises(UsageError, match=r"1 rows now, and 4 .*gradient_accumulation_steps"):
        train(path, fewer, resume=True)
    smaller = (fewer, "training.gradient_accumulation_steps=4", "training.gradient_checkpointing=true")
    run = train(path, *smaller, resume=True)
    losses = [[entry["loss"] for entry in one.metrics_until(99) if "loss" in entry] for one in (run, whole)]
    assert losses[0] == pytest.approx(losses[1], rel=1e-5)
    assert digest(run) != digest(whole), "it was other arithmetic"
    noted = [(entry["step"], entry["passes"]) for entry in run.metrics_until(99) if "passes" in entry]
    assert noted == [
        (
            3,
            run.load_plan().passes
            | {"per_device_train_batch_size": 1, "gradient_accumulation_steps": 4}
            | {"gradient_checkpointing": True},
        )
    ]
    assert not retrain(run, 3, None, Console(stderr=True)).largest
    assert not retrain(run, 6, None, Console(stderr=True)).failed, "sums in another order are no drift"


def test_a_signal_in_the_last_step_finishes_the_run(
    recipe: RecipeMaker, train: Train, monkeypatch: pytest.MonkeyPatch
) -> None:
    stop_at(4, monkeypatch)
    assert train(recipe()).result is not None


EARLY = {
    "max_steps": 60,
    "learning_rate": 0.1,
    "eval_strategy": "steps",
    "eval_steps": 2,
    "early_stopping_patience": 3,
    "lr_scheduler_type": "constant",
}


@pytest.mark.parametrize("training", [{"save_strategy": "steps", "save_steps": 2}, EARLY])
def test_a_run_that_was_stopped_after_its_last_step_trains_no_more(
    training: dict[str, Any], recipe: RecipeMaker, train: Train, rows: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """By a kill before the result was saved; and by a signal in the step in which early stopping decides."""
    settings = {"dataset": {"train": [{"path": str(rows)}], "validation": 0.5}, "training": training}
    whole = train(recipe("whole", **settings))
    result = whole.load_manifest()["result"]
    path = recipe("killed", **settings)
    with monkeypatch.context() as patch:
        patch.setattr("lorafit.engine.train.save_result", lambda *_: [][0])
        with pytest.raises(IndexError):
            train(path)
    killed = train(path, resume=True)
    with monkeypatch.context() as patch:
        stop_at(result["steps"], patch)
        signalled = train(recipe("signalled", **settings))
    for run in (killed, signalled):
        assert digest(run) == digest(whole)
        assert run.load_manifest()["result"] == result
        assert [e["step"] for e in run.metrics_until(99)] == [e["step"] for e in whole.metrics_until(99)]


def test_a_killed_run_resumes_from_its_last_whole_checkpoint(recipe: RecipeMaker, train: Train) -> None:
    settings = {"training": {"max_steps": 8, "save_strategy": "steps", "save_steps": 2}}
    whole = train(recipe("whole", **settings))
    path = recipe("killed", **settings)
    run = RunDir(whole.path.parent / "killed")
    environment = os.environ | {"PYTHONPATH": str(Path.cwd())}
    process = subprocess.Popen(
        [sys.executable, "-m", "lorafit", "train", str(path)], env=environment, stderr=subprocess.DEVNULL
    )
    while run.last_checkpoint() is None and process.poll() is None:
        time.sleep(0.005)
    process.kill()
    process.wait()
    assert run.result is None, "the run was too quick to be killed"
    # A checkpoint that was being written when the process died is no checkpoint.
    (run.checkpoints / ".checkpoint-6.partial").mkdir(exist_ok=True)
    with run.metrics.open("a") as metrics:
        metrics.write('{"step": 7, "lo')
    resumed = train(path, resume=True)
    assert digest(resumed) == digest(whole)
    assert [e["step"] for e in resumed.metrics_until(99) if "loss" in e] == list(range(1, 9))


def test_ctrl_c_has_its_exit_code(recipe: RecipeMaker, tmp_path: Path) -> None:
    path = recipe(training={"max_steps": 100000, "save_strategy": "no"})
    environment = os.environ | {"PYTHONPATH": str(Path.cwd())}
    process = subprocess.Popen(
        [sys.executable, "-m", "lorafit", "train", str(path)], env=environment, stderr=subprocess.PIPE, text=True
    )
    run = RunDir(tmp_path / "runs" / "recipe")
    while not (run.metrics.is_file() and run.metrics.stat().st_size) and process.poll() is None:
        time.sleep(0.02)
    process.send_signal(signal.SIGINT)
    _, errors = process.communicate(timeout=60)
    assert process.returncode == 130
    assert "go on with --resume" in errors
    assert "Traceback" not in errors
    assert run.last_checkpoint() is not None


class TestStarting:
    def test_a_finished_run_is_not_started_again(self, recipe: RecipeMaker, train: Train) -> None:
        path = recipe()
        before = digest(train(path))
        with pytest.raises(UsageError, match="run is finished"):
            train(path)
        with pytest.raises(UsageError, match="run is finished"):
            train(path, resume=True)
        assert digest(RunDir(path.parent / "runs" / "recipe")) == before

    def test_an_unfinished_run_wants_a_decision(
        self, recipe: RecipeMaker, train: Train, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        path = recipe()
        stop_at(2, monkeypatch)
        with pytest.raises(Interrupted):
            train(path)
        monkeypatch.undo()
        with pytest.raises(UsageError, match="--resume"):
            train(path)
        with pytest.raises(UsageError, match=r"another recipe \(training.learning_rate\)"):
            train(path, "training.learning_rate=0.5", resume=True)

    def test_a_damaged_checkpoint_is_named_and_the_one_before_offered(
        self, recipe: RecipeMaker, train: Train, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        """Every file of it, damaged in every way; without it, the run ends with the same weights."""
        saving = {"save_strategy": "steps", "save_steps": 1, "save_total_limit": 4}
        path, whole = recipe(training=saving), train(recipe("whole", training=saving))
        stop_at(3, monkeypatch)
        with pytest.raises(Interrupted):
            train(path)
        monkeypatch.undo()
        run = RunDir(path.parent / "runs" / "recipe")
        last, before, *_ = run.all_checkpoints()
        names = [file.name for file in last.iterdir()]
        assert {"optimizer.pt", "scheduler.pt", "rng_state.pth", "trainer_state.json", "adapter_config.json"} <= set(
            names
        )
        for name in names:
            content = (last / name).read_bytes()
            for damaged in (None, b"", content[: len(content) // 2], content[:-1] + bytes([content[-1] ^ 1])):
                (last / name).unlink() if damaged is None else (last / name).write_bytes(damaged)
                if (damaged, name) == (content[: len(content) // 2], "lorafit.json"):
                    continue
                with pytest.raises(DriftError, match=rf"{last.name}: .*{name}.*{before.name}, which is whole"):
                    train(path, resume=True)
            (last / name).write_bytes(content)
        shutil.copyfile(before / "optimizer.pt", last / "optimizer.pt")
        with pytest.raises(DriftError, match=r"optimizer\.pt has changed"):
            train(path, resume=True)
        (before / "optimizer.pt").unlink()
        with pytest.raises(DriftError, match="checkpoint-1, which is whole"):
            train(path, resume=True)
        shutil.rmtree(last)
        shutil.rmtree(before)  # what was said
        assert digest(train(path, resume=True)) == digest(whole)

    @pytest.mark.parametrize("name", ["plan.json", "recipe.yaml", "fingerprint.json"])
    def test_what_was_edited_since_a_checkpoint_is_named(
        self, name: str, recipe: RecipeMaker, train: Train, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        path = recipe()
        stop_at(2, monkeypatch)
        with pytest.raises(Interrupted):
            train(path)
        monkeypatch.undo()
        file = RunDir(path.parent / "runs" / "recipe").path / name
        content = file.read_text()
        for edited in ("{}", content.replace("0", "1"), *([] if name == "plan.json" else [None])):
            file.unlink() if edited is None else file.write_text(edited)
            with pytest.raises((DriftError, UsageError), match=name):
                train(path, resume=True)
        file.write_text(content)
        assert train(path, resume=True).result is not None

    def test_a_checkpoint_of_another_run_is_none(
        self, recipe: RecipeMaker, train: Train, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        path, other = recipe(), train(recipe("other", training={"save_strategy": "steps", "save_steps": 2}))
        stop_at(2, monkeypatch)
        with pytest.raises(Interrupted):
            train(path)
        monkeypatch.undo()
        run = RunDir(path.parent / "runs" / "recipe")
        (last,) = run.all_checkpoints()
        own = shutil.copytree(last, path.parent / "kept")
        shutil.rmtree(last)
        shutil.copytree(other.checkpoints / "checkpoint-2", last)
        with pytest.raises(DriftError, match=r"plan\.json"):
            train(path, resume=True)
        shutil.rmtree(last)
        shutil.copytree(own, last.with_name("checkpoint-3"))
        with pytest.raises(DriftError, match="is of step 2"):
            train(path, resume=True)

    def test_another_merge_is_no_other_recipe(
        self, recipe: RecipeMaker, train: Train, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        path = recipe(merge={"rows": 3})
        stop_at(2, monkeypatch)
        with pytest.raises(Interrupted):
            train(path)
        monkeypatch.undo()
        run = train(path, "merge.max_kl=0.5", "merge.verify=none", resume=True)
        assert run.result is not None
        merge = run.load_plan().merge  # as the run began
        assert (merge["rows"], merge["max_kl"], merge["verify"]) == (3, 0.1, "auto")

    def test_changed_data_or_another_machine_is_no_resume(
        self, recipe: RecipeMaker, train: Train, rows: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        path = recipe()
        stop_at(2, monkeypatch)
        with pytest.raises(Interrupted):
            train(path)
        monkeypatch.undo()
        text = rows.read_text()
        rows.write_text(text.replace("cat", "dog"))
        with pytest.raises(UsageError, match=r"data.train.*sha256.*exactly"):
            train(path, resume=True)
        rows.write_text(text)
        monkeypatch.setenv("WORLD_SIZE", "2")
        with pytest.raises(UsageError, match=r"hardware.world_size"):
            train(path, resume=True)
        monkeypatch.undo()
        assert train(path, resume=True).result is not None

    def test_overwrite_keeps_the_old_run_until_the_new_one_is_done(
        self, recipe: RecipeMaker, train: Train, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        path = recipe()
        run = train(path)
        before = digest(run)
        stop_at(2, monkeypatch)
        with pytest.raises(Interrupted):
            train(path, "training.seed=7", overwrite=True)
        monkeypatch.undo()
        assert digest(RunDir(run.replaced)) == before
        train(path, "training.seed=7", resume=True)
        assert not run.replaced.exists()
        assert digest(run) != before

    def test_a_folder_that_is_no_run_is_left_alone(self, recipe: RecipeMaker, train: Train, tmp_path: Path) -> None:
        folder = tmp_path / "mine"
        folder.mkdir()
        (folder / "thesis.txt").write_text("years of work")
        for overwrite in (False, True):
            with pytest.raises(UsageError, match="not a run"):
                train(recipe(output_dir=str(folder)), overwrite=overwrite)
        assert (folder / "thesis.txt").read_text() == "years of work"

    def test_resume_without_a_run(self, recipe: RecipeMaker, train: Train) -> None:
        with pytest.raises(UsageError, match="no run"):
            train(recipe(), resume=True)

    def test_a_failed_start_does_not_stand_in_the_way(self, recipe: RecipeMaker, train: Train, tmp_path: Path) -> None:
        path = recipe()
        run = RunDir(tmp_path / "runs" / "recipe")
        from lorafit.plan import plan_recipe
        from lorafit.recipe import Recipe

        run.begin(plan_recipe(Recipe.load(path), path), path.read_bytes())
        assert train(path).result is not None

    def test_two_processes_do_not_share_a_run(self, recipe: RecipeMaker, train: Train, tmp_path: Path) -> None:
        path = recipe()
        with RunDir(tmp_path / "runs" / "recipe").lock(), pytest.raises(UsageError, match="another process"):
            train(path)

    def test_a_run_that_ends_just_before_the_lock_is_taken(
        self, recipe: RecipeMaker, train: Train, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        path = recipe()
        before = []

        def meanwhile(*_: object) -> None:
            monkeypatch.undo()
            before.append(digest(train(path)))

        monkeypatch.setattr("lorafit.engine.train.settle_device", meanwhile)
        with pytest.raises(UsageError, match="run is finished"):
            train(path)
        assert before == [digest(RunDir(path.parent / "runs" / "recipe"))]

    def test_a_lock_is_never_held_twice(self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        """Not by one who opened the file before it was taken away and one who came after that."""
        run = RunDir(tmp_path / "run")
        lock, flock = run.path / files.LOCK, fcntl.flock

        def late(descriptor: int, how: int) -> None:
            flock(descriptor, how)
            monkeypatch.undo()
            lock.unlink()

        monkeypatch.setattr(fcntl, "flock", late)
        with run.lock():
            assert lock.exists()
            with pytest.raises(UsageError, match="another process"), run.lock():
                pass
        assert not run.path.exists(), "nothing was begun"

    def test_another_base_is_no_resume(
        self, recipe: RecipeMaker, train: Train, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        base = make_model(tmp_path / "base")
        path = recipe(model={"name_or_path": str(base)})
        stop_at(2, monkeypatch)
        with pytest.raises(Interrupted):
            train(path)
        monkeypatch.undo()
        make_model(base, seed=1)
        with pytest.raises(UsageError, match=r"\(changed: tensor lm_head.weight, "):
            train(path, resume=True)
        make_model(base)
        assert train(path, resume=True).result is not None

    def test_a_run_that_is_called_as_if_it_were_replaced(self, recipe: RecipeMaker, train: Train) -> None:
        other = train(recipe("mine.replaced"))
        assert train(recipe("mine")).result is not None
        assert other.result is not None

    @pytest.mark.parametrize("written", ["link", "~/home", ".", "empty/../empty", "empty"])
    def test_paths_that_mean_another(
        self, written: str, recipe: RecipeMaker, train: Train, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        """An empty folder is filled and not replaced: it may be a mount point, or where one stands."""
        path = recipe(output_dir=written)
        here = tmp_path / "here"
        folder = {"link": here / "empty", "~/home": tmp_path / "home", ".": here}.get(written, here / "empty")
        folder.mkdir(parents=True)
        here.mkdir(exist_ok=True)
        if written == "link":
            (here / "link").symlink_to(folder)
        number = folder.stat().st_ino
        monkeypatch.chdir(here)
        monkeypatch.setenv("HOME", str(tmp_path))
        stop_at(2, monkeypatch)
        with pytest.raises(Interrupted):
            train(path)
        train(path, resume=True)
        assert RunDir(folder).result is not None
        assert folder.stat().st_ino == number
        assert not (here / "~").exists()

    def test_a_path_with_spaces(self, recipe: RecipeMaker, train: Train, tmp_path: Path) -> None:
        assert train(recipe(output_dir=str(tmp_path / "my runs" / "a b"))).adapter.is_dir()


class TestTraining:
    def test_early_stopping_and_the_best_checkpoint(self, recipe: RecipeMaker, train: Train, rows: Path) -> None:
        run = train(
            recipe(
                dataset={"train": [{"path": str(rows)}], "validation": 0.5},
                training=EARLY,
            )
        )
        result = run.load_manifest()["result"]
        losses = {e["step"]: e["eval_loss"] for e in run.metrics_until(99) if "eval_loss" in e}
        assert result["stopped_early"]
        assert result["best_step"] == min(losses, key=losses.__getitem__)
        best = run.checkpoints / f"checkpoint-{result['best_step']}" / "adapter_model.safetensors"
        assert best.read_bytes() == (run.adapter / "adapter_model.safetensors").read_bytes()

    @pytest.mark.parametrize("metric", ["token_f1", "bits_per_byte", "accuracy"])
    def test_the_best_by_any_figure(self, metric: str, recipe: RecipeMaker, train: Train, rows: Path) -> None:
        """It is what `eval` finds of the kept adapter, and measuring it changes no step."""
        answers = {json.loads(line)["messages"][1]["content"] for line in rows.read_text().splitlines()}
        sets = [{"name": "heldout", "metrics": ["token_f1"], "options": sorted(answers)}]
        training = {"max_steps": 12, "eval_strategy": "steps", "eval_steps": 2, "learning_rate": 3e-2}
        run, plain = (
            train(
                recipe(
                    name,
                    dataset={"train": [{"path": str(rows)}], "validation": 0.5},
                    eval={"sets": sets, "max_new_tokens": 8, "forgetting": []},
                    training=training | {"metric_for_best_model": by},
                )
            )
            for name, by in (("figure", f"heldout.{metric}"), ("plain", None))
        )
        assert [e["loss"] for e in run.metrics_until(99) if "loss" in e] == [
            e["loss"] for e in plain.metrics_until(99) if "loss" in e
        ]
        found = {e["step"]: e[f"eval_heldout.{metric}"] for e in run.metrics_until(99) if "eval_loss" in e}
        best = (min if metric == "bits_per_byte" else max)(found.values())
        result = run.load_manifest()["result"]
        assert result["best_metric"] == best
        assert found[result["best_step"]] == best
        results, _ = evaluate(EvalOptions(run.path))
        assert results.figures[f"heldout.{metric}.adapter"].value == pytest.approx(best)

    def test_the_same_seed_gives_the_same_weights_and_another_does_not(self, recipe: RecipeMaker, train: Train) -> None:
        first, second = train(recipe("a")), train(recipe("b"))
        assert digest(first) == digest(second)
        assert digest(train(recipe("c"), "training.seed=1")) != digest(first)

    def test_accumulation_equals_a_larger_batch(self, recipe: RecipeMaker, train: Train) -> None:
        """Per token, not per batch: rows of different lengths weigh the same either way."""
        large = train(recipe("large", training={"per_device_train_batch_size": 8, "gradient_accumulation_steps": 1}))
        small = train(recipe("small", training={"per_device_train_batch_size": 1, "gradient_accumulation_steps": 8}))
        curves = [[e["loss"] for e in run.metrics_until(99) if "loss" in e] for run in (large, small)]
        assert curves[0] == pytest.approx(curves[1], rel=1e-4)

    def test_a_diverging_run_stops(self, recipe: RecipeMaker, train: Train) -> None:
        path = recipe(training={"learning_rate": 1e30, "max_steps": 20, "max_grad_norm": 0, "warmup_steps": 0})
        with pytest.raises(GateError, match="diverged"):
            train(path)
        assert RunDir(path.parent / "runs" / "recipe").result is None

    @pytest.mark.parametrize("save", ["no", "steps"])
    def test_a_run_that_diverges_between_logs_keeps_its_good_checkpoints(
        self, save: str, recipe: RecipeMaker, train: Train
    ) -> None:
        diverging = {"learning_rate": 1e30, "max_steps": 5, "max_grad_norm": 0, "warmup_steps": 0, "logging_steps": 99}
        saving = {"save_steps": 1, "save_total_limit": 1} if save == "steps" else {}
        path = recipe(training={**diverging, "save_strategy": save, **saving})
        with pytest.raises(GateError, match="diverged"):
            train(path)
        run = RunDir(path.parent / "runs" / "recipe")
        assert run.result is None
        checkpoint = run.last_checkpoint()
        assert (checkpoint is not None) == (save == "steps")
        if checkpoint:
            weights = load_file(checkpoint / "adapter_model.safetensors")
            assert all(tensor.isfinite().all() for tensor in weights.values())

    def test_packed_rows_make_fewer_steps(self, recipe: RecipeMaker, train: Train) -> None:
        run = train(recipe(training={"packing": True, "max_steps": ..., "num_train_epochs": 1}))
        assert run.load_manifest()["schedule"]["total_steps"] < 6

    def test_save_total_limit(self, recipe: RecipeMaker, train: Train) -> None:
        run = train(recipe(training={"max_steps": 5, "save_strategy": "steps", "save_steps": 1, "save_total_limit": 2}))
        assert sorted(f.name for f in run.checkpoints.iterdir()) == ["checkpoint-4", "checkpoint-5"]

    def test_old_checkpoints_go_whole_and_the_best_stays(
        self, recipe: RecipeMaker, train: Train, rows: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        removed = []
        original = files._remove
        monkeypatch.setattr(files, "_remove", lambda folder: [removed.append(folder), original(folder)])
        dataset = {"train": [{"path": str(rows)}], "validation": 0.5}
        run = train(recipe(dataset=dataset, training={**EARLY, "save_total_limit": 1}))
        result = run.load_manifest()["result"]
        kept = {f"checkpoint-{result['best_step']}", f"checkpoint-{result['steps']}"}
        assert {f.name for f in run.checkpoints.iterdir()} == kept
        assert removed
        assert all(folder.name.startswith(".") for folder in removed)


class TestFailures:
    def test_a_broken_row_stops_before_anything_is_written(self, recipe: RecipeMaker, train: Train, rows: Path) -> None:
        rows.write_text(rows.read_text() + '{"messages": [{"role": "user", "content": "only a question"}]}\n')
        with pytest.raises(DataError, match=r"rows.jsonl:25: .*no assistant turn"):
            train(recipe())
        assert not (rows.parent / "runs" / "recipe").exists()

    def test_rows_that_are_all_cut_off(self, recipe: RecipeMaker, train: Train) -> None:
        with pytest.raises(DataError, match=r"max_length 3 .*no row"):
            train(recipe(training={"max_length": 3}))

    def test_a_truncated_weight_file(self, recipe: RecipeMaker, train: Train, tiny_model: Path, tmp_path: Path) -> None:
        broken = tmp_path / "broken model"
        shutil.copytree(tiny_model, broken)
        weights = broken / "model.safetensors"
        weights.write_bytes(weights.read_bytes()[:-100])
        with pytest.raises(ModelError, match="cut off"):
            train(recipe(model={"name_or_path": str(broken)}))

    def test_a_full_disk_leaves_no_half_result(
        self, recipe: RecipeMaker, train: Train, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        def full(folder: Path) -> None:
            raise OSError(28, "No space left on device", str(folder))

        whole = train(recipe("whole"))
        path = recipe()
        original = files.sync
        monkeypatch.setattr(files, "sync", lambda f: full(f) if f.name == ".adapter.partial" else original(f))
        with pytest.raises(DoesNotFitError, match=r"adapter: .*full"):
            train(path)
        run = RunDir(path.parent / "runs" / "recipe")
        assert run.result is None
        assert [entry.name for entry in run.path.glob(".*")] == [files.LOCK]
        monkeypatch.undo()
        assert digest(train(path, resume=True)) == digest(whole)


def test_another_process_does_not_take_the_base_of_the_run_that_is_replaced(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    run = RunDir(tmp_path / "run")
    (run.base / "old").mkdir(parents=True)
    main = iter([lambda: shutil.rmtree(run.base), lambda: (run.base / "new").mkdir(parents=True)])
    monkeypatch.setenv("RANK", "1")
    monkeypatch.setattr("lorafit.engine.model.wait_for_everyone", lambda: next(main)())
    base = dequantized_base(SimpleNamespace(model=SimpleNamespace(kind="gguf")), run)
    assert [entry.name for entry in base.iterdir()] == ["new"]


def test_secrets_stay_out_of_the_run(recipe: RecipeMaker, train: Train, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HF_TOKEN", "hf_verysecret")
    monkeypatch.setenv("WANDB_API_KEY", "wandb_verysecret")
    run = train(recipe())
    for file in run.path.rglob("*"):
        if file.is_file():
            assert b"verysecret" not in file.read_bytes(), file


def test_recipe_parents_are_in_the_plan(recipe: RecipeMaker, train: Train, tmp_path: Path) -> None:
    parent = recipe("parent")
    child = tmp_path / "child.yaml"
    child.write_text(yaml.safe_dump({"extends": "parent.yaml", "output_dir": str(tmp_path / "runs" / "child")}))
    assert train(child).load_plan().recipe["training"]["max_steps"] == 4
    assert parent.exists()


def test_rows_from_several_sources(recipe: RecipeMaker, train: Train, rows: Path, tmp_path: Path) -> None:
    more = write_jsonl(tmp_path / "more.jsonl", [{"instruction": "say", "input": "yes", "output": "no"}] * 3)
    run = train(recipe(dataset={"train": [{"path": str(rows)}, {"path": str(more)}]}))
    assert run.load_manifest()["data"]["audit"]["training_rows"]["rows"] == 27
