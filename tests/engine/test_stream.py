"""Streaming: rows are tokenized as they are trained on, audited as they come, and a run resumes exactly."""

from __future__ import annotations

import itertools
from pathlib import Path
from typing import Any

import pytest
from conftest import WORDS, RecipeMaker, Train, conversation, write_jsonl
from test_train import digest, stop_at

import lorafit.engine.data.encode
import lorafit.engine.data.prepare
from lorafit.engine.data.prepare import prepare
from lorafit.engine.tokenizer import load_tokenizer
from lorafit.errors import DataError, Interrupted
from lorafit.plan import plan_recipe
from lorafit.recipe import Recipe


def rows_with(count: int, word: str = "n") -> list[dict[str, Any]]:
    words = WORDS.split()
    return [conversation(f"{words[n % 20]} {word}{n}", f"{word}{n} {words[n % 7]}") for n in range(count)]


@pytest.fixture
def prepared(recipe: RecipeMaker) -> Any:
    def go(*sources: dict[str, Any], **training: Any) -> Any:
        dataset = {"train": list(sources), "streaming": True}
        path = recipe(dataset=dataset, training={"max_steps": 4, **training})
        plan = plan_recipe(Recipe.load(path), path)
        tokenizer = load_tokenizer(plan)
        return prepare(plan.data, tokenizer), tokenizer, plan

    return go


def names(data: Any, tokenizer: Any, count: int) -> list[str]:
    """The word that tells a row from the others."""
    return [
        tokenizer.decode(row["input_ids"]).split("assistant\n")[1].split()[0]
        for row in itertools.islice(data.train, count)
    ]


def test_every_row_comes_once_a_pass(prepared: Any, tmp_path: Path) -> None:
    file = write_jsonl(tmp_path / "rows.jsonl", rows_with(30))
    in_order = [f"n{n}" for n in range(30)]
    data, tokenizer, plan = prepared({"path": str(file)}, train_sampling_strategy="sequential")
    assert names(data, tokenizer, 75) == (in_order * 3)[:75]
    assert plan.schedule.total_steps == 4
    shuffled, tokenizer, _ = prepared({"path": str(file)})
    found = names(shuffled, tokenizer, 90)
    passes = [found[:30], found[30:60], found[60:]]
    assert all(sorted(one) == sorted(in_order) for one in passes)
    assert len({tuple(one) for one in (*passes, in_order)}) == 4
    assert names(prepared({"path": str(file)})[0], tokenizer, 90) == found


def test_a_stream_is_not_read_ahead(prepared: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A broken line far behind what is used does not matter."""
    monkeypatch.setattr(lorafit.engine.data.prepare, "SAMPLE_ROWS", 4)
    monkeypatch.setattr(lorafit.engine.data.encode, "_BATCH_ROWS", 4)
    file = write_jsonl(tmp_path / "rows.jsonl", rows_with(100))
    with file.open("a") as stream:
        stream.write("{broken\n")
    data, tokenizer, _ = prepared({"path": str(file)}, train_sampling_strategy="sequential")
    assert names(data, tokenizer, 20) == [f"n{n}" for n in range(20)]
    with pytest.raises(DataError, match=r"rows\.jsonl:101: not JSON"):
        names(data, tokenizer, 200)


def test_sources_are_interleaved_by_weight(prepared: Any, tmp_path: Path) -> None:
    many = write_jsonl(tmp_path / "many.jsonl", rows_with(300, "m"))
    few = write_jsonl(tmp_path / "few.jsonl", rows_with(100, "f"))
    sources = ({"path": str(many), "weight": 3.0}, {"path": str(few), "max_rows": 90})
    data, tokenizer, _ = prepared(*sources, train_sampling_strategy="sequential")
    found = names(data, tokenizer, 390)
    assert sorted(found) == sorted([f"m{n}" for n in range(300)] + [f"f{n}" for n in range(90)])
    assert 100 < sum(name.startswith("m") for name in found[:200]) < 190


def test_packed_streams_hold_every_row(prepared: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(lorafit.engine.data.prepare, "SHUFFLE_ROWS", 16)
    file = write_jsonl(tmp_path / "rows.jsonl", rows_with(50))
    data, _, _ = prepared({"path": str(file)}, packing=True, max_length=128)
    packed, count = [], 0
    for row in data.train:
        packed.append(row)
        count += len(row["seq_lengths"])
        if count >= 48:  # three chunks of 16
            break
    assert count == 48
    assert all(len(row["input_ids"]) == len(row["labels"]) == sum(row["seq_lengths"]) <= 128 for row in packed)
    assert len(packed) < 25


def test_the_first_rows_are_audited_before_training(prepared: Any, tmp_path: Path) -> None:
    file = write_jsonl(tmp_path / "rows.jsonl", [*rows_with(5), conversation("a", "")])
    with pytest.raises(DataError, match=r"rows\.jsonl:6: .*dataset\.audit\.empty_answers: 1 of 6"):
        prepared({"path": str(file)})
    good, _, _ = prepared({"path": str(write_jsonl(tmp_path / "good.jsonl", rows_with(5)))})
    assert not good.audit.whole
    assert good.audit.train[0].rows == good.audit.training_rows.rows == 5


def test_a_fault_further_on_stops_the_training_with_its_line(
    recipe: RecipeMaker, train: Train, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(lorafit.engine.data.prepare, "SAMPLE_ROWS", 4)
    monkeypatch.setattr(lorafit.engine.data.encode, "_BATCH_ROWS", 4)
    file = write_jsonl(tmp_path / "rows.jsonl", [*rows_with(20), conversation("a", "")])
    dataset = {"train": [{"path": str(file)}], "streaming": True}
    sequential = {"max_steps": 8, "train_sampling_strategy": "sequential"}
    with pytest.raises(DataError, match=r"rows\.jsonl:21: .*empty_answers"):
        train(recipe(dataset=dataset, training=sequential))
    allowed = {**dataset, "audit": {"empty_answers": 0.5}}
    run = train(recipe("allowed", dataset=allowed, training=sequential))
    (source,) = run.load_manifest()["data"]["audit"]["train"]
    assert source["read"] == 21
    assert source["found"]["empty_answers"]["count"] == 1
    assert run.load_plan().audit["train"][0]["read"] < 21


@pytest.mark.parametrize("packing", [False, True])
def test_a_streamed_run_resumes_exactly(
    packing: bool, recipe: RecipeMaker, train: Train, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    file = write_jsonl(tmp_path / "rows.jsonl", rows_with(30))
    held_out = write_jsonl(tmp_path / "held_out.jsonl", rows_with(4, "v"))
    settings = {
        "dataset": {"train": [{"path": str(file)}], "validation": [{"path": str(held_out)}], "streaming": True},
        "training": {"max_steps": 12, "packing": packing, "per_device_train_batch_size": 4 - 3 * packing},
    }
    whole = train(recipe("whole", **settings))
    assert [entry["step"] for entry in whole.metrics_until(99) if "loss" in entry] == list(range(1, 13))
    path = recipe("stopped", **settings)
    stop_at(9, monkeypatch)  # in the second epoch: an epoch has 8 steps of 4 rows
    with pytest.raises(Interrupted):
        train(path)
    monkeypatch.undo()
    assert digest(train(path, resume=True)) == digest(whole)


def test_a_fraction_or_a_changed_stream_is_refused(
    recipe: RecipeMaker, train: Train, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from lorafit.errors import UsageError

    file = write_jsonl(tmp_path / "rows.jsonl", rows_with(30))
    path = recipe(dataset={"train": [{"path": str(file)}], "streaming": True})
    stop_at(2, monkeypatch)
    with pytest.raises(Interrupted):
        train(path)
    monkeypatch.undo()
    write_jsonl(file, rows_with(31))
    with pytest.raises(UsageError, match=r"\(.*\bdata\b"):
        train(path, resume=True)


def test_a_stream_without_a_usable_row_says_why(prepared: Any, tmp_path: Path) -> None:
    rows = [{"prompt": "a", "completion": "b", "label": False}]
    file = write_jsonl(tmp_path / "rows.jsonl", rows)
    with pytest.raises(DataError, match=r"rows\.jsonl: no row .*\(label is false"):
        prepared({"path": str(file)})
