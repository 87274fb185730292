"""`lorafit estimate-vram`: what it says, and what scripts read from it. The figures themselves are tested elsewhere."""

from __future__ import annotations

import json
import os
import shlex
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import yaml
from conftest import RecipeMaker, write_jsonl
from typer.testing import CliRunner
from wording import Like

from lorafit.cli import app
from lorafit.errors import ModelError
from lorafit.facts import ModelFacts, known_models, layout
from lorafit.gpus import GPUS
from lorafit.memory import Band, Estimate, Term
from lorafit.memory.estimate import PROCESS
from lorafit.text import GIB, gib
from lorafit.vram.advice import Change, reconciled
from lorafit.vram.answer import by_trace
from lorafit.vram.cost import active_parameters
from lorafit.vram.question import SHARDINGS, parse_sweeps

ROOT = Path(__file__).resolve().parents[2]
BUNDLED = "HuggingFaceTB/SmolLM2-135M-Instruct"
SMALL = "./small"
CONFIG = {
    "model_type": "llama",
    "hidden_size": 2048,
    "intermediate_size": 5632,
    "num_hidden_layers": 4,
    "num_attention_heads": 16,
    "num_key_value_heads": 8,
    "vocab_size": 32000,
    "max_position_embeddings": 8192,
    "tie_word_embeddings": False,
}


@pytest.fixture(scope="module", autouse=True)
def working_directory(tmp_path_factory: pytest.TempPathFactory) -> Iterator[None]:
    """One with a model's configuration in it, without its weights."""
    before, here = Path.cwd(), tmp_path_factory.mktemp("here")
    (here / SMALL).mkdir()
    (here / SMALL / "config.json").write_text(json.dumps(CONFIG))
    os.chdir(here)
    yield
    os.chdir(before)


def run(*words: object) -> tuple[int, str, str]:
    command = ["estimate-vram", *(str(word) for word in words)]
    result = CliRunner().invoke(app, command, catch_exceptions=False)
    return result.exit_code, result.stdout, result.stderr


def answer(*words: object) -> dict[str, Any]:
    code, out, err = run(*words, "--json")
    assert code in (0, 5), err
    return dict(json.loads(out))


def small(*words: object) -> dict[str, Any]:
    return answer("--model", SMALL, *words)


@pytest.fixture
def bundled_recipe(tmp_path: Path) -> Path:
    """A recipe for a model that is known without its files, whose data isn't here."""
    content = {
        "model": {"name_or_path": SMALL},
        "lora": {"r": 8},
        "dataset": {"train": [{"path": "nowhere.jsonl", "format": "text"}]},
        "training": {"per_device_train_batch_size": 16, "max_length": 2048},
    }
    path = tmp_path / "recipe.yaml"
    path.write_text(yaml.safe_dump(content))
    return path


class TestWhatIsEstimated:
    def test_a_recipe_whose_data_is_elsewhere(self, bundled_recipe: Path) -> None:
        found = answer(bundled_recipe)
        assert found["recipe"] == str(bundled_recipe)
        assert (found["setup"]["batch"], found["setup"]["max_length"], found["setup"]["lora_r"]) == (16, 2048, 8)

    def test_a_model_by_name(self) -> None:
        found = answer("--model", BUNDLED)
        assert found["model"]["parameters"] == 134_515_008

    def test_a_model_without_a_recipe(self) -> None:
        found = small("--max-length", 1024, "--batch", 4, "--set", "lora.r=64")
        assert found["recipe"] is None
        assert (found["setup"]["batch"], found["setup"]["max_length"], found["setup"]["lora_r"]) == (4, 1024, 64)

    def test_the_methods(self) -> None:
        full, lora, qlora = (small("--method", method) for method in ("full", "lora", "qlora"))
        assert full["setup"]["lora_r"] is None
        assert qlora["setup"]["quantization"]["load_in_4bit"] is True
        assert full["total"] > lora["total"] > qlora["total"]

    def test_the_parts_are_the_whole(self, bundled_recipe: Path) -> None:
        found = answer(bundled_recipe)
        assert sum(term["bytes"] for term in found["terms"]) == found["allocated"] <= found["reserved"]
        assert found["least"] < found["total"] < found["most"]

    def test_a_recipe_or_a_model(self, bundled_recipe: Path) -> None:
        for words in ((), (bundled_recipe, "--model", SMALL), (bundled_recipe, "--method", "full")):
            code, out, err = run(*words)
            assert (code, out) == (2, "")
            assert len(err.splitlines()) == 1

    def test_the_named_gpu_decides_about_types(self) -> None:
        assert small("--gpu", "T4")["setup"]["dtype"] == "float16"
        assert small("--gpu", "A10")["setup"]["dtype"] == "bfloat16"

    @pytest.mark.parametrize("sharding", [way for way in SHARDINGS if way != "none"])
    def test_several_gpus(self, sharding: str) -> None:
        found = small("--gpus", 4, "--sharding", sharding)
        assert (found["setup"]["gpus"], found["setup"]["sharding"]) == (4, sharding)

    def test_several_gpus_without_a_word_are_ddp(self) -> None:
        assert small("--gpus", 2)["setup"]["sharding"] == "ddp"


class TestVerdicts:
    def test_they_change_with_the_capacity(self) -> None:
        words = [word for size in ("1MiB", "16GiB", "9TiB") for word in ("--vram", size)]
        found = small(*words)
        assert [one["verdict"] for one in found["asked"]][::2] == ["does not fit", "fits"]

    def test_tight_is_what_lies_within_the_band(self) -> None:
        total = small()["total"]
        assert small("--vram", f"{total >> 20}MiB")["asked"][0]["verdict"] == "tight"

    def test_every_known_gpu_has_one(self) -> None:
        devices = small()["devices"]
        assert [one["name"] for one in devices] == [gpu.name for gpu in GPUS]
        assert {one["verdict"] for one in devices} <= {"fits", "tight", "does not fit"}

    def test_a_named_gpu_is_judged_by_an_estimate_for_it(self) -> None:
        first, second = small("--gpu", "A10", "--gpu", "T4")["asked"]
        assert (first["name"], second["name"]) == ("A10", "T4")
        assert second["total"] == small("--gpu", "T4")["total"]


class TestAssertFits:
    def test_it_fits(self) -> None:
        code, out, err = run("--model", SMALL, "--assert-fits", "80GiB", "--assert-fits", "RTX 4090")
        assert code == 0, err
        assert "RTX 4090" in out

    def test_it_does_not(self) -> None:
        code, out, err = run("--model", SMALL, "--batch", 16, "--assert-fits", "80GiB", "--assert-fits", "2GiB")
        assert code == 5
        assert err == Like("does not fit … 2 GiB")
        assert len(err.splitlines()) == 1
        assert "allocated" in out, "the table is printed all the same"

    def test_tight_is_not_enough(self) -> None:
        total = small()["total"]
        code, _, err = run("--model", SMALL, "--assert-fits", f"{total >> 20}MiB")
        assert code == 5
        assert err.startswith("tight, ")

    def test_the_message_has_the_best_advice(self) -> None:
        found = small("--batch", 16)
        half = f"{round(found['total'] * 0.7) >> 20}MiB"
        code, _, err = run("--model", SMALL, "--batch", 16, "--assert-fits", half)
        assert code == 5
        assert "--set training.per_device_train_batch_size=" in err

    def test_json_is_whole_on_stdout(self) -> None:
        code, out, err = run("--model", SMALL, "--assert-fits", "1GiB", "--json")
        assert code == 5
        assert json.loads(out)["failures"] == err.splitlines()


class TestAdvice:
    def test_what_it_sets_has_the_last_word(self) -> None:
        """Advice is given as --set, to be added to the same command: also to one with the short options."""
        found = small("--batch", 8, "--max-length", 512, "--set", "training.per_device_train_batch_size=1")["setup"]
        assert (found["batch"], found["max_length"]) == (1, 512)

    def test_more_gpus_keep_the_rows_of_a_step(self) -> None:
        batch, passes = "training.per_device_train_batch_size=1", "training.gradient_accumulation_steps="
        fewer = Change("1 row at once, 16 passes a step", "slower", (batch, f"{passes}16"))
        gpus = Change("8 GPUs", "money", (f"{passes}2",), True, 8, "fsdp")
        found = reconciled([fewer, gpus])
        assert [change.overrides for change in found] == [(batch, f"{passes}2"), ()]
        assert found[0].does == Like("1 row … 2 passes")

    def words(self, advice: dict[str, Any]) -> list[str]:
        return shlex.split(advice["options"])

    @pytest.mark.parametrize(
        ("method", "share"), [("lora", 0.75), ("lora", 0.5), ("qlora", 0.6), ("full", 0.8), ("full", 0.4)]
    )
    def test_it_is_true_when_applied(self, method: str, share: float) -> None:
        base = ("--model", SMALL, "--method", method, "--batch", 8, "--set", "training.gradient_checkpointing=false")
        capacity = f"{round(answer(*base)['total'] * share) >> 20}MiB"
        asked = answer(*base, "--vram", capacity)["asked"][0]
        assert asked["verdict"] != "fits"
        assert asked["advice"]
        for advice in asked["advice"]:
            applied = answer(*base[:4], *base[6:], "--set", "training.per_device_train_batch_size=8",
                             *self.words(advice), "--vram", capacity)["asked"][0]  # fmt: skip
            assert applied["total"] == advice["total"], advice["does"]
            assert applied["verdict"] == advice["verdict"]

    def test_fewer_rows_at_once_keep_the_rows_a_step(self) -> None:
        base = ("--model", SMALL, "--set", "training.per_device_train_batch_size=8",
                "--set", "training.gradient_accumulation_steps=3")  # fmt: skip
        capacity = f"{round(answer(*base)['total'] * 0.8) >> 20}MiB"
        first = answer(*base, "--vram", capacity)["asked"][0]["advice"][0]
        setup = answer(*base, *self.words(first))["setup"]
        assert setup["batch"] < 8
        assert setup["batch"] * setup["accumulation"] == 24

    def test_it_goes_with_a_global_batch_size(self, bundled_recipe: Path) -> None:
        words = (bundled_recipe, "--set", "training.global_batch_size=32")
        capacity = f"{round(answer(*words)['total'] * 0.8) >> 20}MiB"
        first = answer(*words, "--vram", capacity)["asked"][0]["advice"][0]
        setup = answer(*words, *self.words(first))["setup"]
        assert setup["batch"] * setup["accumulation"] == 32

    def test_harmless_changes_come_first(self) -> None:
        advice = small("--method", "full", "--batch", 8, "--vram", "2GiB")["asked"][0]["advice"]
        harms = [one["harmful"] for one in advice]
        assert harms == sorted(harms)

    def test_none_where_it_fits(self) -> None:
        found = small("--vram", "80GiB")
        assert found["asked"][0]["advice"] == []

    def test_where_nothing_helps(self) -> None:
        code, out, _ = run("--model", SMALL, "--vram", "1MiB")
        assert code == 0
        assert "does not fit" in out


class TestSweeps:
    def test_a_grid(self) -> None:
        cells = small("--sweep", "max_length=512,1024,2048", "--sweep", "lora.r=8,64", "--vram", "4GiB")["sweep"]
        assert [tuple(cell["values"].values()) for cell in cells] == [
            (length, r) for length in ("512", "1024", "2048") for r in ("8", "64")
        ]
        assert list(cells[0]["values"]) == ["training.max_length", "lora.r"]
        for rank in ("8", "64"):
            totals = [cell["total"] for cell in cells if cell["values"]["lora.r"] == rank]
            assert totals == sorted(totals)
            assert totals[0] < totals[-1]
        assert all(len(cell["verdicts"]) == 1 for cell in cells)

    def test_each_cell_is_what_the_value_alone_gives(self) -> None:
        cells = small("--sweep", "batch=1,2")["sweep"]
        assert [cell["total"] for cell in cells] == [small("--batch", size)["total"] for size in (1, 2)]

    @pytest.mark.parametrize(
        ("sweeps", "shown"),
        [
            (["max_length=512,1024"], "training.max_length"),
            (["max_length=512,1024", "r=8,16"], "training.max_length \\ lora.r"),
            (["max_length=512,1024", "r=8,16", "batch=1,2"], "training.per_device_train_batch_size"),
        ],
    )
    def test_as_printed(self, sweeps: list[str], shown: str, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setenv("COLUMNS", "200")
        code, out, _ = run("--model", SMALL, *(word for sweep in sweeps for word in ("--sweep", sweep)))
        assert code == 0
        assert shown in out

    def test_values_with_commas(self) -> None:
        swept = parse_sweeps(["target_modules=[q_proj, v_proj],all-linear"])
        assert swept == (("lora.target_modules", ("[q_proj, v_proj]", "all-linear")),)

    @pytest.mark.parametrize(
        ("sweep", "said"),
        [
            ("max_length", "… KEY=V1,V2"),
            ("max_length=", "… KEY=V1,V2"),
            ("max_lenght=512", "… 'max_length'"),
            ("lora.rank=8", "--sweep lora.rank=8: lora.rank: … 'r'"),
            ("speed=8", "… no such key"),
            ("max_length=512,many", "--sweep training.max_length=many: training.max_length: … whole"),
            ("max_length=0", "… above 0"),
            ("max_length=512,999999", "… 999999 … context"),
            (f"r={','.join(map(str, range(1, 500)))}", "… at most"),
        ],
    )
    def test_mistakes_are_one_line(self, sweep: str, said: str) -> None:
        code, out, err = run("--model", SMALL, "--sweep", sweep)
        assert (code, out) == (2, "")
        assert len(err.splitlines()) == 1
        assert err == Like(said)


class TestNonsense:
    @pytest.mark.parametrize(
        "words",
        [
            ("--batch", "0"),
            ("--batch", "-1"),
            ("--batch", "1000000000"),
            ("--max-length", "0"),
            ("--max-length", "100000000"),
            ("--gpus", "0"),
            ("--gpus", "1000000000"),
            ("--gpus", "2", "--sharding", "none"),
            ("--sharding", "fsdp"),
            ("--sharding", "zero9", "--gpus", "2"),
            ("--method", "magic"),
            ("--gpu", "RTX 9999"),
            ("--vram", "24"),
            ("--vram", "0GiB"),
            ("--assert-fits", "much"),
            ("--tokens", "0"),
            ("--price-per-hour", "2"),
            ("--gpu", "A10", "--tokens", "1000", "--price-per-hour", "-2"),
            ("--plot", "memory.pdf"),
            ("--set", "lora.r=-8"),
        ],
        ids=" ".join,
    )
    def test_one_line_each(self, words: tuple[str, ...]) -> None:
        code, out, err = run("--model", SMALL, *words)
        assert (code, out) == (2, "")
        assert len(err.splitlines()) == 1

    def test_short_options_are_named_as_typed(self) -> None:
        assert run("--model", SMALL, "--batch", "0")[2].startswith("--batch 0: ")

    def test_an_unknown_architecture(self, tmp_path: Path) -> None:
        (tmp_path / "config.json").write_text('{"model_type": "strange"}')
        code, _, err = run("--model", tmp_path)
        assert code == 4
        assert err == Like(f"{tmp_path}: … strange … safetensors")

    def test_a_folder_without_a_configuration(self, tmp_path: Path) -> None:
        code, _, err = run("--model", tmp_path)
        assert code == 4
        assert err == Like(f"{tmp_path}: … config.json")

    def test_a_model_of_text_and_pictures(self) -> None:
        code, _, err = run("--model", "google/gemma-3-12b-it")
        assert code == 4
        assert "--trace" in err
        assert len(err.splitlines()) == 1

    def test_a_model_that_nobody_knows(self) -> None:
        code, _, err = run("--model", "someone/some-model")
        assert code == 4
        assert len(err.splitlines()) == 1


class TestCost:
    def test_tokens_make_time_and_money(self) -> None:
        cost = small("--tokens", 10_000_000, "--gpu", "A100 80GB", "--price-per-hour", 2)["cost"]
        assert cost["rough"] is True
        [one] = cost["gpus"]
        low, high = one["hours"]
        assert 0 < low < high
        assert one["money"] == [2 * low, 2 * high]

    def test_more_tokens_take_longer(self) -> None:
        hours = [
            small("--tokens", tokens, "--gpu", "T4")["cost"]["gpus"][0]["hours"][0] for tokens in (10**6, 3 * 10**6)
        ]
        assert hours[1] == pytest.approx(3 * hours[0])

    def test_it_says_how_to_give_tokens(self) -> None:
        code, out, _ = run("--model", SMALL, "--gpu", "T4")
        assert code == 0
        assert "--tokens N" in out
        assert "--tokens N" in small("--gpu", "T4")["cost"]["unknown"]

    def test_nothing_where_it_is_not_asked(self) -> None:
        assert small()["cost"] is None

    def test_audited_data(self, recipe: RecipeMaker, rows: Path) -> None:
        path = recipe(training={"max_steps": ..., "num_train_epochs": 2.0})
        assert "unknown" in answer(path, "--gpu", "T4")["cost"]
        assert CliRunner().invoke(app, ["preview", str(path), "--rows", "0"]).exit_code == 0
        cost = answer(path, "--gpu", "T4")["cost"]
        assert cost["epochs"] == 2
        assert cost["tokens_per_epoch"] > 0
        write_jsonl(rows, [json.loads(line) for line in rows.read_text().splitlines()][:3])
        assert "unknown" in answer(path, "--gpu", "T4")["cost"], "other data was not audited"

    def test_steps_bound_the_tokens(self) -> None:
        cost = small("--gpu", "T4", "--set", "training.max_steps=10", "--max-length", 512)["cost"]
        assert cost["tokens_per_epoch"] == 10 * 16 * 512

    def test_weights_that_a_token_meets(self) -> None:
        """Published: of Mixtral's 46.7 billion parameters a token uses 12.9; its embedding is only looked up in."""
        assert active_parameters(facts_of("mistralai/Mixtral-8x7B-v0.1")) == pytest.approx(12.88e9 - 131e6, rel=0.002)
        tied = facts_of(BUNDLED)
        assert active_parameters(tied) == tied.parameters


def facts_of(name: str) -> ModelFacts:
    config = known_models()[name.lower()]
    return ModelFacts(name, "bundled", "", config, tuple(layout(config)))


def test_the_keys_that_scripts_read(bundled_recipe: Path) -> None:
    found = answer(bundled_recipe, "--vram", "1GiB", "--gpu", "A10", "--tokens", 1000, "--sweep", "r=8")
    estimate = {"method", "allocated", "reserved", "total", "least", "most", "band"}
    assert set(found) == estimate | {
        "recipe", "overrides", "model", "hardware", "setup", "terms", "paged", "moment", "notes", "devices", "asked",
        "sweep", "cost", "failures",
    }  # fmt: skip
    assert set(found["band"]) == {"error", "rows", "features", "status"}
    assert set(found["terms"][0]) == {"name", "bytes", "why", "source"}
    assert set(found["devices"][0]) == {"name", "memory_bytes", "verdict"}
    asked = found["asked"][1]
    assert set(asked) == estimate | {"name", "memory_bytes", "asserted", "verdict", "notes", "advice"}
    advice = {"overrides", "options", "does", "costs", "harmful", "verdict"}
    assert set(asked["advice"][0]) == estimate | advice
    assert set(found["sweep"][0]) == estimate | {"values", "verdicts"}
    assert set(found["cost"]["gpus"][0]) == {"name", "hours", "tokens_per_second", "utilisation", "money"}


@pytest.mark.parametrize(
    ("words", "says"),
    [
        (("--gpu", "RTX 4090"), "fits in RTX 4090"),
        (("--vram", "1GiB"), "does not fit"),
        (("--gpu", "RTX 4090", "--assert-fits", "1GiB"), "fits in RTX 4090 (23.99 GiB) … does not fit"),
        (("--set", "hardware.gpu=T4"), "fits in T4"),
        (("--set", "hardware.device=cpu"), "in this machine"),
        ((), "--list-gpus"),
        (("--gpus", "2", "--sharding", "zero3"), "on each GPU"),
    ],
)
def test_the_first_line_is_the_answer(bundled_recipe: Path, words: tuple[str, ...], says: str) -> None:
    found, first = answer(bundled_recipe, *words), run(bundled_recipe, *words)[1].splitlines()[0]
    assert all(gib(found[name]) in first for name in ("total", "least", "most"))
    assert first == Like(f"… {says}")


def test_gpus_are_listed_where_that_is_asked_for() -> None:
    assert not any(gpu.name in run("--model", SMALL)[1] for gpu in GPUS)
    listed = run("--model", SMALL, "--list-gpus")[1]
    assert all(gpu.name in listed for gpu in GPUS)


def test_small_parts_are_one_row() -> None:
    found, out = small(), run("--model", SMALL)[1]
    large = [term for term in found["terms"] if term["bytes"] >= 0.01 * found["allocated"]]
    few = [term for term in found["terms"] if 0 < term["bytes"] < 0.01 * found["allocated"]]
    assert len(large) > 2
    assert len(few) > 1
    rows = [line.strip() for line in out.splitlines() if "%  " in line]
    assert [row.split("  ")[0] for row in rows[:-2]] == [
        one["name"] for one in sorted(large, key=lambda t: -t["bytes"])
    ]
    assert all(term["name"] in rows[-2] for term in few), "in the row that sums them up"
    assert f" {gib(sum(term['bytes'] for term in few))} " in rows[-2]


def test_the_range_says_what_it_rests_on() -> None:
    def said(*words: str) -> tuple[dict[str, Any], str]:
        line = next(line for line in run("--model", SMALL, *words)[1].splitlines() if line.startswith("Range"))
        return small(*words)["band"], line

    band, line = said()
    assert band["rows"] > 0
    assert f"{band['rows']} measured runs" in line
    assert "assumption" not in line
    band, line = said("--gpus", "2", "--sharding", "zero2")
    assert band["rows"] == 0
    assert "assumption" in line
    assert "zero2" in line, "what was not measured"
    assert all(f"{band['error']:.0%}" in line for band, line in (said(), said("--method", "qlora")))


def test_a_picture(tmp_path: Path) -> None:
    pytest.importorskip("matplotlib")
    code, _, err = run("--model", SMALL, "--vram", "8GiB", "--plot", tmp_path / "memory.svg")
    assert code == 0, err
    assert "8 GiB" in (tmp_path / "memory.svg").read_text()


def test_the_trace_is_used(monkeypatch: pytest.MonkeyPatch) -> None:
    import lorafit.engine.trace.record
    from lorafit.memory import estimate

    asked = []

    def recorded(setup: Any, capacity: int | None = None) -> Any:
        asked.append(capacity)
        return replace(estimate(setup), method="trace")

    monkeypatch.setattr(lorafit.engine.trace.record, "estimate_by_trace", recorded, raising=False)
    code, out, _ = run("--model", SMALL, "--trace", "--vram", "8GiB", "--json")
    assert code == 0
    assert json.loads(out)["method"] == "trace"
    assert asked == [8 * GIB]


ASSUMED = Band(0.01, 0, "")


def test_what_torch_can_give_back_is_tight(monkeypatch: pytest.MonkeyPatch) -> None:
    """4 GiB allocated and 9 reserved fit 6 GiB if torch gives back what it doesn't use."""

    def made(_: Any, capacity: int | None = None) -> Estimate:
        reserved = 9 * GIB if capacity is None else 5 * GIB
        served = capacity is None or capacity > 5 * GIB
        return Estimate((Term("all", 4 * GIB, ""),), "", reserved, "closed form", ASSUMED, served=served)

    monkeypatch.setattr("lorafit.outcome.estimate", made)
    asked = small("--vram", "6GiB", "--vram", "5GiB", "--vram", "3GiB")["asked"]
    assert [one["verdict"] for one in asked] == ["tight", "does not fit", "does not fit"]


def test_a_trace_needs_no_closed_form(monkeypatch: pytest.MonkeyPatch) -> None:
    import lorafit.engine.trace.record

    def unknown(*_: Any) -> Estimate:
        raise ModelError("the activations are not known in closed form; use --trace")

    def recorded(_: Any, capacity: int | None = None) -> Estimate:
        return Estimate((Term("all", 4 * GIB, ""),), "", 4 * GIB, "trace", ASSUMED)

    monkeypatch.setattr("lorafit.outcome.estimate", unknown)
    monkeypatch.setattr(lorafit.engine.trace.record, "estimate_by_trace", recorded, raising=False)
    code, _, err = run("--model", SMALL)
    assert (code, err) == (4, Like("… closed form … --trace"))
    [asked] = small("--trace", "--vram", "2GiB")["asked"]
    assert (asked["verdict"], asked["advice"]) == ("does not fit", [])


# --- a recipe for a CPU ---------------------------------------------------------------------------


def on_cpu(*words: object) -> tuple[str, ...]:
    return ("--model", SMALL, "--set", "hardware.device=cpu", *(str(word) for word in words))


def test_a_recipe_for_a_cpu_is_estimated_for_this_machine() -> None:
    found = answer(*on_cpu())
    assert found["hardware"]["device"] == "cpu"
    assert found["total"] - found["reserved"] == PROCESS[1]
    assert found["reserved"] > found["allocated"], "the C library's heap has holes"
    for machine in found["devices"]:  # none where the memory can't be told
        assert machine["name"] == "this machine"
        assert (machine["verdict"] == "fits") == (found["most"] <= machine["memory_bytes"])
    code, out, _ = run(*on_cpu())
    assert code == 0
    assert not any(gpu.name in out for gpu in GPUS)
    assert "GPU" not in out


@pytest.mark.parametrize("trace", [False, True])
def test_a_machine_that_is_too_small(trace: bool) -> None:
    words = ("--set", "model.dtype=bfloat16", *(("--trace",) if trace else ()))
    assert run(*on_cpu("--assert-fits", "200GiB"), *words)[0] == 0
    code, _, err = run(*on_cpu("--assert-fits", "1GiB"), *words)
    assert code == 5
    assert "machine with 1 GiB" in err
    [one] = answer(*on_cpu("--vram", "1GiB"), *words)["asked"]
    assert one["verdict"] == "does not fit"
    assert all("--gpus" not in advice["options"] for advice in one["advice"])


def test_between_what_is_alive_and_what_is_held() -> None:
    """Train returns large blocks at once then."""
    words = ("--model", BUNDLED, "--set", "hardware.device=cpu", "--set", "model.dtype=float32", "--max-length", 512)
    found = answer(*words)
    for factor, verdict in ((1.1, "tight"), (1.2, "fits")):
        between = PROCESS[1] + round(factor * found["allocated"])
        assert between < found["total"]
        [one] = answer(*words, "--vram", f"{between >> 20}MiB")["asked"]
        assert one["verdict"] == verdict
        assert one["reserved"] == pytest.approx(found["allocated"], rel=0.08)
        assert any("at once" in note for note in one["notes"])


@pytest.mark.parametrize("words", [("--gpus", 2), ("--sharding", "fsdp"), ("--sweep", "hardware.device=cpu,cuda")])
def test_what_has_no_meaning_for_a_cpu_is_refused(words: tuple[object, ...]) -> None:
    code, _, err = run(*on_cpu(*words))
    assert code == 2
    assert str(words[0]) in err


def test_a_trace_judges_every_size_by_itself() -> None:
    words = on_cpu("--trace", "--set", "model.dtype=float32")
    whole = answer(*words)
    small, large = (round(size / 2**20) for size in (whole["total"] * 0.5, whole["most"] * 2))
    found = answer(*words, "--vram", f"{small}MiB", "--vram", f"{large}MiB")
    assert found["asked"][1]["total"] == found["total"] == whole["total"]
    assert [one["verdict"] for one in found["asked"]] == ["does not fit", "fits"]


def test_checkpointing_on_a_cpu_holds_what_is_alive() -> None:
    words = ("--model", BUNDLED, "--set", "hardware.device=cpu", "--set", "model.dtype=float32", "--max-length", 512)
    usual, saving = answer(*words), answer(*words, "--set", "training.gradient_checkpointing=true")
    assert usual["reserved"] > 1.1 * usual["allocated"]
    assert saving["reserved"] == pytest.approx(saving["allocated"], rel=0.02)


def test_a_trace_for_one_gpu_does_not_make_another_tight() -> None:
    """It was served at the first one's capacity, which says nothing of a smaller one's."""
    known = Estimate((Term("weights", 8 * GIB, ""),), "end", 16 * GIB, "trace", Band(0.03, 1, ""))
    none: Any = None
    assert by_trace(none, none, known, 9 * GIB) == (known, "does not fit")
    assert by_trace(none, none, known, 40 * GIB) == (known, "fits")
