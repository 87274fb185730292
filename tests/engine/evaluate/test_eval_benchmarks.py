"""Benchmarks of lm-evaluation-harness on a model in memory, with tasks that need no network."""

from __future__ import annotations

import io
import json
import math
from pathlib import Path
from typing import Any

import pytest
import yaml
from conftest import WORDS, write_jsonl
from rich.console import Console
from wording import Like

from lorafit.engine.evaluate import benchmarks as benchmarks_module
from lorafit.engine.evaluate import tasks as tasks_module
from lorafit.engine.evaluate.benchmarks import TaskResult, check, run
from lorafit.errors import DataError, UsageError
from lorafit.recipe.schema import EvalSection, LmEvalSection

pytest.importorskip("lm_eval")

ROWS = 7
CHOICE: dict[str, Any] = {
    "task": "tiny/choice",
    "dataset_path": "json",
    "test_split": "test",
    "output_type": "multiple_choice",
    "doc_to_text": "{{question | upper}} is",
    "doc_to_target": "{{answer}}",
    "doc_to_choice": "{{options}}",
    "metric_list": [
        {"metric": "acc", "aggregation": "mean", "higher_is_better": True},
        {"metric": "acc_norm", "aggregation": "mean", "higher_is_better": True},
        {"metric": "brier_score", "aggregation": "brier_score", "higher_is_better": False},
        {"metric": "mcc", "aggregation": "matthews_corrcoef", "higher_is_better": True},
    ],
}
WRITE: dict[str, Any] = {
    "task": "tiny_write",
    "tag": "tiny_tag",
    "dataset_path": "json",
    "test_split": "test",
    "fewshot_split": "test",
    "num_fewshot": 1,
    "output_type": "generate_until",
    "doc_to_text": "{{question}}",
    "doc_to_target": "{{options[answer]}}",
    "generation_kwargs": {"until": ["\n"], "max_gen_toks": 4, "do_sample": False},
    "metric_list": [{"metric": "exact_match", "aggregation": "mean", "higher_is_better": True}],
    "filter_list": [
        {"name": "first-word", "filter": [{"function": "regex", "regex_pattern": "(.)"}, {"function": "take_first"}]},
        {"name": "all", "filter": [{"function": "take_first"}]},
    ],
}
ROLL: dict[str, Any] = {
    "task": "tiny_roll",
    "tag": "tiny_tag",
    "dataset_path": "json",
    "test_split": "test",
    "output_type": "loglikelihood_rolling",
    "doc_to_text": "",
    "doc_to_target": "{{question}}",
    "metric_list": [{"metric": "word_perplexity"}, {"metric": "byte_perplexity"}, {"metric": "bits_per_byte"}],
}


def write_task(folder: Path, content: dict[str, Any], data: Path | None = None, more: str = "") -> Path:
    path = folder / f"{str(content.get('task', content.get('group', 'part'))).replace('/', '-')}.yaml"
    if data is not None:
        content = content | {"dataset_kwargs": {"data_files": {"test": str(data)}}}
    path.write_text(yaml.safe_dump(content) + more)
    return path


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    words = WORDS.split()
    rows = [
        {"question": " ".join(words[i : i + 3 + i % 3]), "options": [words[i], words[-i - 1], "yes"], "answer": i % 3}
        for i in range(ROWS)
    ]
    return write_jsonl(tmp_path_factory.mktemp("data") / "rows.jsonl", rows)


@pytest.fixture(scope="module")
def tasks(tmp_path_factory: pytest.TempPathFactory, data: Path) -> Path:
    """A folder with three tasks, a tag of two of them, and a group of all."""
    folder = tmp_path_factory.mktemp("tasks")
    for content in (CHOICE, WRITE, ROLL):
        write_task(folder, content, data)
    write_task(folder, {"group": "tiny_group", "task": ["tiny/choice", "tiny_tag"]})
    return folder


@pytest.fixture(scope="module")
def model(tiny_model: Path) -> Any:
    from transformers import AutoModelForCausalLM

    return AutoModelForCausalLM.from_pretrained(tiny_model)


@pytest.fixture(scope="module")
def tokenizer(tiny_model: Path) -> Any:
    from transformers import AutoTokenizer

    return AutoTokenizer.from_pretrained(tiny_model)


def asking(tasks: tuple[str, ...], trust_code: bool = False, **more: Any) -> EvalSection:
    return EvalSection(lm_eval=LmEvalSection(tasks=tasks, **more), trust_code=trust_code)


def console() -> Console:
    return Console(file=io.StringIO(), width=500)


@pytest.fixture(scope="module")
def results(tasks: Path, model: Any, tokenizer: Any) -> dict[str, TaskResult]:
    asked = asking(("tiny_group",), include_path=str(tasks))
    return {result.task: result for result in run(asked, model, tokenizer)}


@pytest.fixture(scope="module")
def reported(tasks: Path, model: Any, tokenizer: Any) -> dict[str, dict[str, Any]]:
    """What the harness itself says of the same tasks."""
    from lm_eval.evaluator import simple_evaluate
    from lm_eval.models.huggingface import HFLM
    from lm_eval.tasks import TaskManager

    found = simple_evaluate(
        model=HFLM(pretrained=model, tokenizer=tokenizer, batch_size=1),
        tasks=["tiny/choice", "tiny_write", "tiny_roll"],
        task_manager=TaskManager(include_path=str(tasks), include_defaults=False),
        bootstrap_iters=0,
        fewshot_random_seed=0,
    )
    return dict(found["results"])


def figure(result: TaskResult, metric: str) -> float:
    values = result.metrics[metric]
    value = sum(n for _, n, _ in values) / sum(d for _, _, d in values)
    return math.exp(value) if result.transforms[metric] == "exp" else value


def test_figures_are_those_that_the_harness_reports(
    results: dict[str, TaskResult], reported: dict[str, dict[str, Any]]
) -> None:
    expected = {
        ("tiny_choice", "acc"): reported["tiny/choice"]["acc,none"],
        ("tiny_choice", "acc_norm"): reported["tiny/choice"]["acc_norm,none"],
        ("tiny_choice", "brier_score"): reported["tiny/choice"]["brier_score,none"],
        ("tiny_write", "exact_match_first-word"): reported["tiny_write"]["exact_match,first-word"],
        ("tiny_write", "exact_match_all"): reported["tiny_write"]["exact_match,all"],
        ("tiny_roll", "word_perplexity"): reported["tiny_roll"]["word_perplexity,none"],
        ("tiny_roll", "byte_perplexity"): reported["tiny_roll"]["byte_perplexity,none"],
        ("tiny_roll", "bits_per_byte"): reported["tiny_roll"]["bits_per_byte,none"],
    }
    found = {(name, metric): figure(r, metric) for name, r in results.items() for metric in r.metrics}
    assert found == pytest.approx(expected, rel=1e-4)


def test_every_document_has_its_value(results: dict[str, TaskResult]) -> None:
    for result in results.values():
        assert result.rows == ROWS
        for values in result.metrics.values():
            assert [index for index, _, _ in values] == list(range(ROWS))
    words = results["tiny_roll"].metrics["word_perplexity"]
    assert words[0][1] > 0
    assert words[0][2] == 3


def test_what_metrics_are(results: dict[str, TaskResult]) -> None:
    infos = {info.name: info for result in results.values() for info in result.infos}
    assert (infos["acc"].unit, infos["acc"].better) == ("share", "higher")
    assert (infos["bits_per_byte"].unit, infos["bits_per_byte"].better) == ("bits", "lower")
    assert (infos["word_perplexity"].unit, infos["word_perplexity"].better) == ("number", "lower")
    assert infos["exact_match_first-word"].label == "exact match (first-word)"


def test_samples_show_what_was_asked_and_answered(results: dict[str, TaskResult]) -> None:
    choice = results["tiny_choice"].samples
    assert [sample["doc_id"] for sample in choice] == list(range(ROWS))
    assert choice[0]["prompt"] == "THE CAT SAT is"
    assert choice[0]["target"] == "the"
    assert choice[1]["answer"] in ("cat", "user", "yes")
    for sample in choice:
        assert sample["scores"]["acc"] == (sample["answer"] == sample["target"])
    written = results["tiny_write"].samples[0]
    assert written["prompt"].endswith("the cat sat")
    assert len(written["prompt"]) > len("the cat sat")
    assert set(written["scores"]) == {"exact_match_first-word", "exact_match_all"}
    assert json.loads(json.dumps(written)) == written


def test_a_metric_that_is_no_mean_is_left_out_and_named(tasks: Path, model: Any, tokenizer: Any) -> None:
    (result,) = run(asking(("tiny/choice",), include_path=str(tasks), limit=3), model, tokenizer)
    assert result.rows == 3
    assert result.left_out == ("mcc",)
    assert "mcc" not in result.metrics


def test_nothing_is_printed_and_the_model_in_memory_is_used(
    tasks: Path,
    model: Any,
    tokenizer: Any,
    tmp_path: Path,
    capfd: pytest.CaptureFixture[str],
    caplog: pytest.LogCaptureFixture,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    from transformers import AutoModelForCausalLM, AutoTokenizer

    monkeypatch.chdir(tmp_path)  # where there is no git repository

    for one in (AutoModelForCausalLM, AutoTokenizer):
        monkeypatch.setattr(one, "from_pretrained", None)
    bare = type(tokenizer)(tokenizer_object=tokenizer.backend_tokenizer, eos_token="<|im_end|>")
    before = {name: value.clone() for name, value in model.state_dict().items()}
    run(asking((str(tasks),), limit=2), model, bare)
    assert capfd.readouterr() == ("", "")
    assert [record for record in caplog.records if record.name.startswith("lm_eval")] == []
    assert bare.pad_token is None
    assert all((value == before[name]).all() for name, value in model.state_dict().items())


def test_an_adapter_counts(tasks: Path, tiny_model: Path, tokenizer: Any) -> None:
    import torch
    from peft import LoraConfig, get_peft_model
    from transformers import AutoModelForCausalLM

    base = AutoModelForCausalLM.from_pretrained(tiny_model, tie_word_embeddings=True)
    config = LoraConfig(r=4, target_modules=["q_proj"], modules_to_save=["lm_head"], init_lora_weights=False)
    adapted = get_peft_model(base, config).eval()
    ids = torch.arange(20)[None]
    with torch.no_grad():
        adapted.base_model.model.lm_head.modules_to_save["default"].weight.normal_()
        before = adapted(ids).logits
    asked = asking((str(tasks / "tiny_roll.yaml"),))
    (on,) = run(asked, adapted, tokenizer)
    with torch.no_grad():
        assert torch.equal(adapted(ids).logits, before)
    with adapted.disable_adapter():
        (off,) = run(asked, adapted, tokenizer)
    assert figure(on, "bits_per_byte") != pytest.approx(figure(off, "bits_per_byte"), rel=0.01)


def test_a_chat_template_is_applied_if_there_is_one(tasks: Path, model: Any, tokenizer: Any) -> None:
    asked = asking((str(tasks / "tiny-choice.yaml"),), limit=1, apply_chat_template=True)
    (result,) = run(asked, model, tokenizer)
    assert result.samples[0]["prompt"] == "<|im_start|>user\nTHE CAT SAT is<|im_end|>\n<|im_start|>assistant\n"
    bare = type(tokenizer)(tokenizer_object=tokenizer.backend_tokenizer, eos_token="<|im_end|>")
    with pytest.raises(UsageError, match=r"apply_chat_template: .*no chat template"):
        run(asked, model, bare)


def test_too_little_memory_for_a_batch(
    tasks: Path, model: Any, tokenizer: Any, monkeypatch: pytest.MonkeyPatch, results: dict[str, TaskResult]
) -> None:
    forward, sizes = type(model).forward, []

    def small(self: Any, input_ids: Any = None, **kwargs: Any) -> Any:
        sizes.append(len(input_ids))
        if len(input_ids) > 2:
            raise MemoryError
        return forward(self, input_ids=input_ids, **kwargs)

    monkeypatch.setattr(model, "forward", small.__get__(model))
    monkeypatch.setattr(benchmarks_module, "BATCH", 7)
    (result,) = run(asking((str(tasks / "tiny_roll.yaml"),)), model, tokenizer)
    assert max(sizes) == 7
    assert result.rows == ROWS
    assert figure(result, "bits_per_byte") == pytest.approx(figure(results["tiny_roll"], "bits_per_byte"), rel=1e-4)


def test_only_local_tasks_need_no_list_of_the_harness_own(tasks: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(tasks_module, "_every_task", None)
    for asked in (asking(("tiny_tag",), include_path=str(tasks)), asking((str(tasks),))):
        check(asked)


@pytest.fixture
def none_of_its_own(monkeypatch: pytest.MonkeyPatch) -> None:
    """As if the harness came without tasks: reading all of them takes seconds."""
    monkeypatch.setattr(tasks_module, "_every_task", lambda folders: tasks_module.manager_of(folders, False))


@pytest.mark.usefixtures("none_of_its_own")
def test_tasks_that_are_not_there(tasks: Path) -> None:
    with pytest.raises(UsageError, match=r"tiny_writ .*\btiny_write\b"):
        check(asking(("tiny_writ",), include_path=str(tasks)))
    with pytest.raises(UsageError, match=r"no file nowhere\.yaml"):
        check(asking(("nowhere.yaml",)))
    with pytest.raises(UsageError, match=r"include_path: .*folder /nowhere"):
        check(asking(("tiny_write",), include_path="/nowhere"))


def test_a_folder_without_tasks(tmp_path: Path) -> None:
    with pytest.raises(UsageError, match="has no task"):
        check(asking((str(tmp_path),)))


def test_data_that_would_have_to_be_downloaded(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    import datasets

    monkeypatch.setattr(datasets.config, "HF_HUB_OFFLINE", True)
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    path = write_task(tmp_path, WRITE | {"dataset_path": "nobody/nothing"})
    with pytest.raises(DataError, match=r"data .*downloaded") as caught:
        check(asking((str(path),)))
    assert "\n" not in str(caught.value)


def test_data_that_is_missing(tmp_path: Path) -> None:
    path = write_task(tmp_path, WRITE, tmp_path / "missing.jsonl")
    with pytest.raises(DataError, match=r"data .*missing\.jsonl"):
        check(asking((str(path),)))


def test_a_harness_that_is_not_installed(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    with pytest.raises(UsageError, match=r"pip install 'lorafit\[lm-eval\]'"):
        check(asking(("arc_easy",)))


CODE = "from pathlib import Path\nPath(__file__).with_name('ran').touch()\n\ndef change(docs):\n    return docs\n"


@pytest.mark.parametrize(
    "tag",
    [
        "process_docs: !function code.change\n",
        'process_docs: !<!function> "code.change"\n',
        "doc_to_text: !!python/name:os.system\n",
        "doc_to_text: !!python/object/apply:os.system [touch ran]\n",
        "metadata: {a: [{b: !function code.change}]}\n",
    ],
)
@pytest.mark.parametrize("how", ["file", "folder", "include", "group"])
@pytest.mark.usefixtures("none_of_its_own")
def test_code_in_a_task_is_refused(tmp_path: Path, data: Path, tag: str, how: str) -> None:
    (tmp_path / "code.py").write_text(CODE)
    content = {name: value for name, value in ROLL.items() if name not in ("process_docs", "doc_to_text", "metadata")}
    path = write_task(tmp_path, content, data, tag)
    asked = asking((str(path),))
    if how == "folder":
        asked = asking((str(tmp_path),))
    elif how == "include":
        path.rename(tmp_path / "part.yml")
        asked = asking((str(write_task(tmp_path, {"include": "part.yml", "task": "tiny_roll"})),))
    elif how == "group":
        asked = asking(
            (str(write_task(tmp_path, {"group": "all_of_it", "task": ["tiny_roll"]})),), include_path=str(tmp_path)
        )
    with pytest.raises((UsageError, DataError)) as caught:
        check(asked)
    if "!function" in tag and "change" in tag:
        assert str(caught.value) == Like("… !function … eval.trust_code: true")
    assert not (tmp_path / "ran").exists()


def test_code_in_a_task_runs_if_it_is_trusted(tmp_path: Path, data: Path) -> None:
    (tmp_path / "code.py").write_text(CODE)
    path = write_task(tmp_path, ROLL, data, "process_docs: !function code.change\n")
    check(asking((str(path),), trust_code=True))
    assert (tmp_path / "ran").exists()


def test_a_template_can_not_reach_python(tmp_path: Path, data: Path) -> None:
    template = "{{ cycler.__init__.__globals__.os.system('touch " + str(tmp_path / "ran") + "') }}"
    path = write_task(tmp_path, ROLL | {"doc_to_target": template}, data)
    with pytest.raises(DataError, match="SecurityError"):
        check(asking((str(path),)))
    assert not (tmp_path / "ran").exists()


def test_a_metric_from_elsewhere_is_refused(tmp_path: Path, data: Path) -> None:
    (tmp_path / "metric.py").write_text(CODE)
    path = write_task(tmp_path, WRITE | {"metric_list": [{"metric": str(tmp_path / "metric.py")}]}, data)
    with pytest.raises(UsageError, match=r"metric .*metric\.py .*lm-evaluation-harness"):
        check(asking((str(path),)))
    assert not (tmp_path / "ran").exists()


@pytest.mark.parametrize("is_member", [False, True])
def test_pickles_are_refused(tmp_path: Path, is_member: bool) -> None:
    """`datasets` 4 has a builder that reads them."""
    pickled = tmp_path / "rows.pkl"
    pickled.write_bytes(b"cos\nsystem\n(S'touch " + str(tmp_path / "ran").encode() + b"'\ntR.")
    content = ROLL | {"dataset_path": "pandas", "dataset_kwargs": {"data_files": str(pickled)}}
    path = tmp_path / "task.yaml"
    path.write_text(yaml.safe_dump({"group": "all_of_it", "task": [content]} if is_member else content))
    with pytest.raises(UsageError, match=r"pickles.* eval\.trust_code: true"):
        check(asking((str(path),)))
    assert not (tmp_path / "ran").exists()


def test_tasks_that_figures_would_call_the_same(tmp_path: Path, data: Path) -> None:
    one = write_task(tmp_path, ROLL | {"task": "a.b"}, data)
    other = write_task(tmp_path, ROLL | {"task": "a_b"}, data)
    with pytest.raises(UsageError, match=r"two tasks .*a_b"):
        check(asking((str(one), str(other))))
    check(asking((str(one), str(one))))
