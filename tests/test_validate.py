"""`lorafit validate`: faulty recipes of the kinds that people write, each found at its line, and no false alarm."""

from __future__ import annotations

import json
import os
import re
import xml.etree.ElementTree as ElementTree
from pathlib import Path
from typing import Any

import datasets  # noqa: F401 - reads where its cache is as it is imported: before a test takes the place away
import jsonschema.validators  # noqa: F401 - which takes longer than the tests' limit on a slow machine
import pytest
import referencing.jsonschema  # noqa: F401
from conftest import conversation, write_jsonl
from typer.testing import CliRunner, Result
from wording import Like

from lorafit.cli import app
from lorafit.options import ValidateOptions
from lorafit.validate.check import Checker
from lorafit.validate.findings import Report

ROOT = Path(__file__).parent.parent
HERE = "#!"
"""Marks the line of a recipe in which the fault stands."""

GOOD = """\
extends: base.yaml
model:
  name_or_path: MODEL
dataset:
  train:
    - path: chat.jsonl
      format: messages
  validation: 0.1
  loss_on: assistant
training:
  max_length: 64
  num_train_epochs: 2
  learning_rate: 2e-4
  per_device_train_batch_size: 2
"""


def changed(old: str, new: str) -> str:
    assert old in GOOD
    return GOOD.replace(old, new, 1)


def added(section: str, line: str) -> str:
    """A line at the end of a section that the recipe has, or a new section."""
    if f"\n{section}:\n" not in GOOD:
        return f"{GOOD}{section}:\n  {line}\n"
    return GOOD.replace(f"\n{section}:\n", f"\n{section}:\n  {line}\n", 1)


def gated(gate: str) -> str:
    return f"{GOOD}eval:\n  gates:\n    - {gate} {HERE}\n"


def measured(metrics: str) -> str:
    return f"{GOOD}eval:\n  trust_code: true\n  metrics: [{metrics}] {HERE}\n"


FOUR_BITS = "quantization:\n  load_in_4bit: true\n"
FAULTS: dict[str, tuple[str, int, str]] = {
    # what people did: the recipe, the exit code, a part of the message
    "misspelt section": (GOOD.replace("training:", f"trainig: {HERE}"), 2, "'training'"),
    "misspelt key": (added("training", f"lerning_rate: 1e-4 {HERE}"), 2, "'learning_rate'"),
    "misspelt key in a source": (
        changed("      format: messages", f"      fromat: messages {HERE}"), 2, "'format'"
    ),
    "misspelt key in an eval set": (
        f"{GOOD}eval:\n  sets:\n    - name: own\n      path: chat.jsonl\n      rol: task {HERE}\n", 2, "'role'"
    ),
    "misspelt audit rule": (added("dataset", f"audit: {{trunkated: 0.1}} {HERE}"), 2, "'truncated'"),
    "another tool's name": (added("training", f"max_seq_length: 64 {HERE}"), 2, "'max_length'"),
    "key of another section": (added("training", f"lora_alpha: 16 {HERE}"), 2, "'lora.lora_alpha'"),
    "dotted key": (f"{GOOD}lora.r: 8 {HERE}\n", 2, "nest"),
    "wrong type": (changed("num_train_epochs: 2", f"num_train_epochs: two {HERE}"), 2, "got 'two'"),
    "number as text": (changed("learning_rate: 2e-4", f'learning_rate: "1e-4" {HERE}'), 2, "number"),
    "yes for true": (added("training", f"packing: yes {HERE}"), 2, "true … false … 'yes'"),
    "float for a whole number": (added("lora", f"r: 8.5 {HERE}"), 2, "whole"),
    "negative rate": (changed("learning_rate: 2e-4", f"learning_rate: -1e-4 {HERE}"), 2, "above 0"),
    "dropout of 1": (added("lora", f"lora_dropout: 1.0 {HERE}"), 2, "below 1"),
    "unknown scheduler": (added("training", f"lr_scheduler_type: cosin {HERE}"), 2, "'cosine'"),
    "unknown optimizer": (added("training", f"optim: adamw_bnb_8bit {HERE}"), 2, "auto | adamw_torch"),
    "key twice": (added("training", "seed: 1\n  seed: 2 #!"), 2, "given twice"),
    "empty section": (f"{GOOD}lora: {HERE}\n", 2, "is empty"),
    "tab": (f"{GOOD}lora:\n\tr: 8 {HERE}\n", 2, "spaces"),
    "unset variable": (changed("MODEL", f"${{NO_SUCH_VARIABLE}} {HERE}"), 2, "NO_SUCH_VARIABLE"),
    "missing section": (GOOD.partition("dataset:")[0].replace("base.yaml", f"base.yaml {HERE}"), 2, "is missing"),
    "parent that is not there": (changed("extends: base.yaml", f"extends: bse.yaml {HERE}"), 2, "does not exist"),
    "4 bits, trained in full": (
        GOOD.replace("extends: base.yaml\n", "") + FOUR_BITS.replace(":\n", f": {HERE}\n", 1),
        2,
        "`lora: {}`"
    ),
    "both 4 and 8 bits": (
        f"{GOOD}quantization:\n  load_in_4bit: true {HERE}\n  load_in_8bit: true\n", 2, "exactly one"
    ),
    "4-bit settings with 8 bits": (
        f"{GOOD}quantization:\n  load_in_8bit: true\n  bnb_4bit_quant_type: fp4 {HERE}\n", 2, "load_in_8bit"
    ),
    "epochs and steps": (added("training", f"max_steps: 10 {HERE}"), 2, "max_steps … num_train_epochs"),
    "stopping early without validation": (
        added("training", f"early_stopping_patience: 2 {HERE}").replace("  validation: 0.1\n", ""),
        2,
        "dataset.validation",
    ),
    "no such figure": (
        added("training", f"metric_for_best_model: heldout.exact {HERE}"), 2, "heldout.exact_match"
    ),
    "steps that are never reached": (added("training", f"eval_steps: 10 {HERE}"), 2, "eval_strategy: steps"),
    "resume path": (
        added("training", f"resume_from_checkpoint: runs/old/checkpoint-10 {HERE}"), 2, "lorafit train --resume"
    ),
    "targets that match nothing": (added("lora", f"target_modules: [query_key_value] {HERE}"), 2, "query_key_value"),
    "one target of several": (added("lora", f"target_modules: [q_proj, v_porj] {HERE}"), 2, "v_porj"),
    "expression that matches nothing": (added("lora", f'target_modules: ".*attention.*" {HERE}'), 2, "no linear layer"),
    "adapter on the head": (added("lora", f"target_modules: [q_proj, lm_head] {HERE}"), 2, "lm_head"),
    "saved module that is not there": (added("lora", f"modules_to_save: [embed_token] {HERE}"), 2, "embed_token"),
    "layer beyond the last": (
        added("lora", f"layers_to_transform: [0, 7] {HERE}\n  target_modules: [q_proj]"), 2, "7"
    ),
    "paged optimizer on a CPU": (
        f"{GOOD}hardware:\n  device: cpu\n".replace("training:\n", f"training:\n  optim: paged_adamw_8bit {HERE}\n"),
        2,
        "GPU",
    ),
    "flash attention on a T4": (
        f"{GOOD}hardware:\n  gpu: T4\n".replace("MODEL\n", f"MODEL\n  attn_implementation: flash_attention_2 {HERE}\n"),
        2,
        "compute capability 8.0",
    ),
    "max_length above the model's": (changed("max_length: 64", f"max_length: 4096 {HERE}"), 2, "context … 512"),
    "gate without a figure": (
        f"{GOOD}eval:\n  gates:\n    - exact_match >= 0.8 {HERE}\n", 2, "exact_match"
    ),
    "unknown GPU": (f"{GOOD}hardware:\n  gpu: RTX 4099 {HERE}\n", 2, "'RTX 4099'"),
    "data that is not there": (changed("path: chat.jsonl", f"path: chats.jsonl {HERE}"), 3, "no such file"),
    "pattern that matches nothing": (changed("path: chat.jsonl", f"path: 'train-*.jsonl' {HERE}"), 3, "matches no"),
    "validation that is not there": (
        changed("validation: 0.1", f"validation:\n    - path: held/out.csv {HERE}"), 3, "no such file"
    ),
    "missing column": (
        changed("- path: chat.jsonl\n      format: messages", f"- path: questions.csv\n      format: alpaca {HERE}"),
        3,
        "'instruction' is missing",
    ),
    "misspelt mapped column": (
        changed(
            "- path: chat.jsonl\n      format: messages",
            "- path: questions.csv\n      format: alpaca\n      columns:\n        instruction: question\n"
            f"        output: answr {HERE}",
        ),
        3,
        "'answr' is missing",
    ),
    "wrong format": (
        changed("format: messages", f"format: prompt_completion {HERE}"), 3, "'prompt' is missing"
    ),
    "no known format": (
        changed("- path: chat.jsonl\n      format: messages", f"- path: questions.csv {HERE}"), 3, "fit no format"
    ),
    "broken JSON": (
        changed("- path: chat.jsonl\n      format: messages", f"- path: broken.jsonl {HERE}"), 3, "broken.jsonl:2"
    ),
    "empty file": (
        changed("- path: chat.jsonl\n      format: messages", f"- path: empty.jsonl {HERE}"), 3, "no rows"
    ),
    "empty answer": (changed("path: chat.jsonl", f"path: unanswered.jsonl {HERE}").replace(
        "      format: messages\n", ""), 3, "nothing to learn"),
    "eval set that is not there": (
        f"{GOOD}eval:\n  sets:\n    - name: own\n      path: own.jsonl {HERE}\n", 3, "no such file"
    ),
    "set of options without its column": (
        f"{GOOD}eval:\n  sets:\n    - name: own\n      path: chat.jsonl\n      options: choices {HERE}\n",
        3,
        "'choices' … list",
    ),
    "gate on a set that there is none of": (
        gated("helout.exact_match.adapter >= 0.8"), 2, "'heldout.exact_match.adapter'"
    ),
    "gate on a metric that is not measured": (gated("heldout.bleu.adapter > 0"), 2, "metric bleu"),
    "gate on a model of another method": (gated("heldout.loss.trained < 3"), 2, "model trained"),
    "gate on a misspelt model": (gated("heldout.loss.adaptr < 3"), 2, "'heldout.loss.adapter'"),
    "gate on a figure of other sets": (gated("heldout.kl.adapter < 1"), 2, "general, chat"),
    "gate on what the base does not have": (gated("chat.kl.base < 1"), 2, "no figure 'chat.kl.base'"),
    "gate on a judge that is not asked": (gated("heldout.judge.adapter > 0.5"), 2, "metric judge"),
    "gate on options that there are none of": (gated("heldout.accuracy.adapter > 0"), 2, "no figure"),
    "gate on a misspelt figure of the baseline": (gated("heldout.loss.adapter < baseline.heldout.los.adapter"), 2, ""),
    "gate on a misspelt set beside benchmarks": (
        gated("heldot.loss.adapter < 3").replace("  gates", "  lm_eval: {tasks: [own.yaml]}\n  gates"), 2, "heldout"
    ),
    "gate on a misspelt model of a benchmark": (
        gated("own_task.acc.adaptr > 0").replace("  gates", "  lm_eval: {tasks: [own.yaml]}\n  gates"), 2, "adaptr"
    ),
    "function that is a class": (measured("own.metrics:Judge"), 2, "no function"),
    "function that was taken away": (measured("own.metrics:gone"), 2, "function gone"),
    "function in a list": (measured("own.metrics:listed"), 2, "no function"),
    "schema without an end": (measured("json_schema: bomb.json"), 2, "bomb.json"),
    "schema that is too deep": (measured("json_schema: deep.json"), 2, "deep.json"),
    "function without arguments": (measured("own.metrics:nothing"), 2, "(answer, expected)"),
    "gate that says nothing of the model": (gated("1 < 2"), 2, "names no figure"),
    "metric that there is none of": (measured("exact_mach"), 2, "exact_match"),
    "metric quoted whole": (measured('"regex: ^[A-Z]+$"'), 2, "`regex: ^[A-Z]+$`"),
    "metric with an argument that takes none": (measured('"exact_match: x"'), 2, "takes no argument"),
    "metric without its argument": (measured("json_schema"), 2, "needs an argument"),
    "metric twice": (measured("words, words"), 2, "two metrics"),
    "expression that is none": (measured("regex: '(a'"), 2, "no regular expression"),
    "function that is not trusted": (
        measured("own.metrics:score").replace("  trust_code: true\n", ""), 2, "eval.trust_code: true"
    ),
    "function in no module": (measured("no_such_module:score"), 2, "no module no_such_module"),
    "function in no module of a package": (measured("own.missing:score"), 2, "no module own.missing"),
    "function that is not there": (measured("own.metrics:scores"), 2, "own.metrics … scores"),
    "function of one argument": (measured("own.metrics:one"), 2, "(answer, expected)"),
    "function with an argument by name": (measured("own.metrics:named"), 2, "(answer, expected)"),
    "function that is async": (measured("own.metrics:later"), 2, "async"),
    "function that yields": (measured("own.metrics:several"), 2, "generator"),
    "function that is a number": (measured("own.metrics:LIMIT"), 2, "no function"),
    "module that is no Python": (measured("own.broken:score"), 2, "broken.py:2"),
    "schema that is not there": (measured("json_schema: none.json"), 2, "none.json"),
    "schema that is no JSON": (measured("json_schema: broken.jinja"), 2, "is not JSON"),
    "schema that is none": (measured("json_schema: bad.json"), 2, "JSON Schema"),
    "schema of a set": (
        f"{GOOD}eval:\n  sets:\n    - {{name: own, path: chat.jsonl, metrics: [json_schema: no.json]}} {HERE}\n",
        2,
        "no.json",
    ),
    "benchmark that is not there": (
        f"{GOOD}eval:\n  lm_eval:\n    tasks: [tasks/own.yaml] {HERE}\n", 2, "tasks/own.yaml"
    ),
    "folder of benchmarks that is not there": (
        f"{GOOD}eval:\n  lm_eval:\n    tasks: [arc_easy]\n    include_path: tasks {HERE}\n", 2, "no folder tasks"
    ),
    "benchmark with the name of a set": (
        f"{GOOD}eval:\n  lm_eval:\n    tasks: [heldout] {HERE}\n", 2, "set … heldout"
    ),
    "judge without a scheme": (
        f"{GOOD}eval:\n  judge:\n    base_url: localhost:8000 {HERE}\n    model: own\n", 2, "http://localhost:8000/v1"
    ),
    "judge that is shown no answers": (
        f"{GOOD}eval:\n  judge:\n    base_url: http://localhost:8000\n    model: own\n    prompt: Better? {HERE}\n",
        2,
        "has no {first}",
    ),
    "chat template that is no Jinja": (
        GOOD.replace("MODEL\n", f"MODEL\n  chat_template: broken.jinja {HERE}\n"), 2, "broken.jinja:2: no Jinja"
    ),
    "misspelt mapped path": (
        changed(
            "- path: chat.jsonl\n      format: messages",
            "- path: nested.jsonl\n      format: alpaca\n      columns:\n        instruction: task.text\n"
            f"        output: task.answr {HERE}",
        ),
        3,
        "'task.answr' is missing",
    ),
    "misspelt column in a template": (
        changed(
            "- path: chat.jsonl\n      format: messages",
            "- path: questions.csv\n      format: prompt_completion\n      template:\n"
            f"        prompt: '{{{{ qestion }}}}' {HERE}\n        completion: '{{{{ answer }}}}'",
        ),
        3,
        "'qestion' is undefined",
    ),
    "folder that is not there": (changed("path: chat.jsonl", f"path: shards/ {HERE}"), 3, "no such file"),
    "path that is no hub id": (changed("path: chat.jsonl", f"path: data/all/train {HERE}"), 3, "no such file"),
    "argument of another schedule": (
        added("training", f"lr_scheduler_kwargs: {{min_lr_rate: 0.1}} {HERE}"), 2, "cosine"
    ),
    "schedule without its argument": (
        added("training", f"lr_scheduler_type: cosine_with_min_lr {HERE}"), 2, "min_lr_rate"
    ),
    "decay without its steps": (
        added("training", f"lr_scheduler_type: warmup_stable_decay {HERE}"), 2, "num_decay_steps"
    ),
    "model that is not there": (changed("MODEL", f"./models/none {HERE}"), 4, "no such folder"),
    "quantized model": (changed("MODEL", f"GPTQ {HERE}"), 2, "(gptq)"),
    "too little memory": (f"{GOOD}hardware:\n  vram: 100MiB {HERE}\n", 5, "does not fit"),
}  # fmt: skip


OWN_TASK = """\
task: own_task
dataset_path: json
dataset_kwargs: {data_files: {test: choices.jsonl}}
test_split: test
output_type: multiple_choice
doc_to_text: instruction
doc_to_choice: "{{ asked.of }}"
doc_to_target: output
metric_list: [{metric: acc}]
"""
METRICS = """
from pathlib import Path
Path("the code was run").touch()
LIMIT = 5
if LIMIT:
    def score(answer, expected, row=None): return 1.0
first, best = [lambda answer, expected: 0.5] * 2
from math import dist as distance
class Judge:
    def __call__(self, answer, expected): return 1
whole = Judge()
nothing = lambda: 1
for of_loop in [best]: pass
(walrus := lambda answer, expected: 1)
def setup():
    global later_set
    later_set = best
gone = best
del gone
listed = [best]
def one(answer): return 1
def named(answer, expected, *, how): return 1
async def later(answer, expected): return 1
def several(answer, expected): yield 1
"""


NOT_TOLD_BY_TRAINING = ("too little memory",)
"""What is no fault where the recipe is trained: on this machine, not on the GPU that it states."""


@pytest.fixture(scope="module")
def project(tmp_path_factory: pytest.TempPathFactory, tiny_model: Path) -> Path:
    """A folder with data, a model's files, and a parent recipe."""
    folder = tmp_path_factory.mktemp("a project")
    write_jsonl(folder / "chat.jsonl", [conversation(f"question {i}", "an answer") for i in range(30)])
    write_jsonl(folder / "unanswered.jsonl", [conversation("hello", "")])
    (folder / "questions.csv").write_text("question,answer\nhow,so\n")
    (folder / "broken.jsonl").write_text('{"text": "a"}\n{"text": \n')
    (folder / "empty.jsonl").write_text("")
    (folder / "broken.jinja").write_text("{% for one in messages %}\n{{ one.role }")
    (folder / "marked.jinja").write_text(
        "{% for one in messages %}{{ one.role }}{% generation %}{{ one.content }}{% endgeneration %}"
        "{% if loop.last %}{% break %}{% endif %}{% endfor %}"
    )
    steps = {f"a{n}": {"allOf": [{"$ref": f"#/$defs/a{n + 1}"}] * 2} for n in range(40)}
    (folder / "bomb.json").write_text(json.dumps({"$ref": "#/$defs/a0", "$defs": steps | {"a40": {}}}))
    (folder / "deep.json").write_text('{"not":' * 900 + "{}" + "}" * 900)
    (folder / "own.yaml").write_text(OWN_TASK)
    (folder / "schema.json").write_text('{"type": "object"}')
    (folder / "bad.json").write_text('{"type": "nothing"}')
    (folder / "own").mkdir()
    (folder / "own" / "metrics.py").write_text(METRICS)
    (folder / "own" / "broken.py").write_text("import re\ndef score(answer, expected: return 1\n")
    write_jsonl(folder / "nested.jsonl", [{"task": {"text": "how", "answer": "so"}}])
    write_jsonl(folder / "choices.jsonl", [{"instruction": "how", "output": "so", "asked": {"of": ["so", "not so"]}}])
    (folder / "base.yaml").write_text("lora:\n  r: 4\n")
    gptq = folder / "gptq"
    gptq.mkdir()
    for file in tiny_model.iterdir():
        (gptq / file.name).write_bytes(file.read_bytes())
    config = json.loads((gptq / "config.json").read_text())
    (gptq / "config.json").write_text(json.dumps(config | {"quantization_config": {"quant_method": "gptq"}}))
    return folder


@pytest.fixture
def written(project: Path, tiny_model: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The working directory, in which `write` writes recipes."""
    monkeypatch.setattr("lorafit.bounds.LONGEST", 1.0)
    monkeypatch.chdir(project)
    for file in project.glob("recipe*.yaml"):
        file.unlink()
    return project


def write(text: str, tiny_model: Path, name: str = "recipe.yaml") -> str:
    Path(name).write_text(text.replace("MODEL", str(tiny_model)).replace("GPTQ", "./gptq"))
    return name


def run(*arguments: str) -> Result:
    return CliRunner().invoke(app, ["validate", *arguments])


@pytest.mark.parametrize("name", FAULTS)
def test_one_fault_is_found_at_its_line_and_nothing_else(name: str, written: Path, tiny_model: Path) -> None:
    text, code, message = FAULTS[name]
    file = write(text, tiny_model)
    line = next(number for number, line in enumerate(text.splitlines(), 1) if HERE in line)
    checked = Checker(ValidateOptions(())).check(file)
    assert [(f.mistake.position.file, f.mistake.position.line, f.exit_code) for f in checked.faults] == [
        (file, line, code)
    ], checked.faults
    assert str(checked.faults[0].mistake) == Like(f"… {message}")
    assert Report((checked,)).exit_code == code


@pytest.mark.parametrize(
    ("old", "new", "key"),
    [
        ("num_train_epochs: 2", f"max_steps: 1\n  warmup_steps: 4 {HERE}", "training.warmup_steps"),
        (
            "per_device_train_batch_size: 2",
            f"per_device_train_batch_size: 999999 {HERE}\n  max_length: 128",
            "training.per_device_train_batch_size",
        ),
    ],
)
def test_what_only_the_steps_and_sizes_show(old: str, new: str, key: str, written: Path, tiny_model: Path) -> None:
    """A warm-up as long as the run, which `train` refuses, and rows at once that `estimate-vram` takes for a slip."""
    text = changed(f"  {old}", f"  {new}")
    text = text.replace("  max_length: 64\n", "") if "max_length: 128" in new else text
    (fault,) = Checker(ValidateOptions(())).check(write(text, tiny_model)).faults
    line = next(number for number, line in enumerate(text.splitlines(), 1) if HERE in line)
    assert (fault.mistake.path, fault.mistake.position.line, fault.exit_code) == (key, line, 2)


def test_the_faults_are_many() -> None:
    assert len(FAULTS) >= 30


SOUND = {
    "plain": GOOD,
    "4 bits": GOOD + FOUR_BITS,
    "paged optimizer for a GPU": added("training", "optim: paged_adamw_8bit"),
    "chat template with marks": GOOD.replace("MODEL\n", "MODEL\n  chat_template: marked.jinja\n"),
    "schedule with its argument": added(
        "training", "lr_scheduler_type: cosine_with_min_lr\n  lr_scheduler_kwargs: {min_lr_rate: 0.1}"
    ),
    "what is measured": f"{GOOD}eval:\n  sets:\n    - {{name: own, path: choices.jsonl, options: asked.of}}\n"
    "  gates: [heldout.loss.adapter < baseline.heldout.loss.adapter, own.accuracy.base > 0, chat.kl.adapter < 1]\n"
    "  judge: {base_url: 'https://judge.example/v1', model: own, api_key_env: NO_SUCH_VARIABLE}\n",
    "functions of one's own": f"{GOOD}eval:\n  trust_code: true\n  metrics: ['own.metrics:score', 'own.metrics:best', "
    "'own.metrics:distance', 'own.metrics:whole', 'own.metrics:of_loop', 'own.metrics:later_set', "
    "'own.metrics:walrus']\n  gates: [heldout.best.adapter > 0]\n",
    "a schema": f"{GOOD}eval:\n  metrics: [json_schema: schema.json]\n  gates: [heldout.json_schema.merged > 0]\n",
    "gate on a task": f"{GOOD}eval:\n  lm_eval: {{tasks: [arc_easy]}}\n  gates: [arc_easy.acc.adapter > 0.3]\n",
    "room enough": f"{GOOD}hardware:\n  gpu: RTX 4090\n  vram: 8GiB\n",
    "on a CPU": f"{GOOD}hardware:\n  device: cpu\n",
    "own columns": changed(
        "- path: chat.jsonl\n      format: messages",
        "- path: questions.csv\n      columns: {instruction: question, output: answer}",
    ),
    "a template": changed(
        "- path: chat.jsonl\n      format: messages",
        "- path: questions.csv\n      template: 'Q {{ question }} A {{ answer }}'",
    ),
    "an empty answer that may be": changed("path: chat.jsonl", "path: unanswered.jsonl").replace(
        "  loss_on: assistant\n", "  loss_on: assistant\n  audit: {empty_answers: null}\n"
    ),
}


@pytest.mark.parametrize("name", FAULTS)
def test_what_this_machine_lacks_hides_no_fault(
    name: str, written: Path, tiny_model: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Without a tracker, a network and a place to write: the same fault, and the same exit code as of `train`."""
    text, code, _ = FAULTS[name]
    file = write(text, tiny_model)
    expected = Checker(ValidateOptions(())).check(file).faults
    for variable, value in {"HF_HUB_OFFLINE": "1", "XDG_CACHE_HOME": "/dev/null/none"}.items():
        monkeypatch.setenv(variable, value)
    lacking = Checker(ValidateOptions((), overrides=("training.report_to=[dvclive]",))).check(file)
    assert lacking.faults == expected
    if name not in NOT_TOLD_BY_TRAINING:
        ran = CliRunner().invoke(app, ["train", file, "--dry-run"])
        assert (ran.exit_code, ran.stdout) == (code, ""), ran.output
    if name not in NOT_TOLD_BY_TRAINING and "eval:" not in text:
        assert CliRunner().invoke(app, ["smoke", file]).exit_code == code
    assert not Path("the code was run").exists()


@pytest.fixture(scope="module")
def trained(project: Path, tiny_model: Path) -> Path:
    """A run of the good recipe."""
    recipe, cache = project / "trained.yaml", project / "cache"
    recipe.write_text(GOOD.replace("MODEL", str(tiny_model)).replace("chat.jsonl", str(project / "chat.jsonl")))
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(project)
        patch.setenv("XDG_CACHE_HOME", str(cache))
        ran = CliRunner().invoke(app, ["train", "trained.yaml", "--set", "training.max_steps=2"])
    recipe.unlink()
    assert ran.exit_code == 0, ran.output
    return project / "runs" / "trained"


@pytest.mark.parametrize("name", [name for name, (text, _, _) in FAULTS.items() if "eval:" in text])
def test_an_evaluation_refuses_what_validation_finds(
    name: str, trained: Path, written: Path, tiny_model: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """With the same exit code, before a model is loaded."""
    monkeypatch.setenv("XDG_CACHE_HOME", str(written / "cache"))
    monkeypatch.setattr("lorafit.engine.evaluate.models.load_base", None)
    text, code, _ = FAULTS[name]
    file = write(f"{text}output_dir: {trained}\n", tiny_model)
    ran = CliRunner().invoke(
        app, ["eval", file, "--baseline", str(written / "results.json")] if "baseline" in text else ["eval", file]
    )
    Path("the code was run").unlink(missing_ok=True)
    assert ran.exit_code == code, ran.output


@pytest.mark.parametrize("name", SOUND)
def test_no_false_alarm(name: str, written: Path, tiny_model: Path) -> None:
    checked = Checker(ValidateOptions((), strict=True)).check(write(SOUND[name], tiny_model))
    assert checked.faults == ()


def test_the_shipped_recipes_have_no_faults(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(ROOT)
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    ran = run("configs", "recipes", "--json")
    assert ran.exit_code == 0, ran.output
    report = json.loads(ran.stdout)
    kinds = {one["file"]: one["kind"] for one in report["recipes"]}
    assert kinds["configs/llama3-qlora.yaml"] == "recipe"
    assert kinds["recipes/qlora.yaml"] == "part"
    fits = {one["file"]: one["facts"].get("fits") for one in report["recipes"]}
    assert fits["configs/llama3-70b-qlora.yaml"] == "fits"


def test_a_fault_of_a_parent_is_reported_in_its_file(written: Path, tiny_model: Path) -> None:
    Path("parent.yaml").write_text("lora:\n  rr: 4\n")
    for name in ("recipe1.yaml", "recipe2.yaml"):
        write(changed("base.yaml", "parent.yaml"), tiny_model, name)
    ran = run("recipe1.yaml", "recipe2.yaml", "--format", "github")
    assert ran.exit_code == 2
    errors = [line for line in ran.stdout.splitlines() if line.startswith("::error")]
    assert errors == [Like("::error file=parent.yaml,line=2,col=3,title=lorafit%3A recipe::lora.rr: … 'r'")]
    Path("parent.yaml").unlink()


# --- paths ----------------------------------------------------------------------------------------


def test_folders_patterns_and_what_is_no_recipe(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    for name in ("a/one.yaml", "a/b/two.yml", "a/.hidden/three.yaml", "a/run/recipe.yaml"):
        Path(name).parent.mkdir(parents=True, exist_ok=True)
        Path(name).write_text("lora: {}\n")
    Path("a/run/plan.json").write_text("{}")
    Path("a/compose.yaml").write_text("services: {}\n")
    report = json.loads(run("a", "--json").stdout)
    assert {one["file"]: one["kind"] for one in report["recipes"]} == {"a/one.yaml": "part", "a/b/two.yml": "part"}
    skipped = {one["file"]: one["is_recipe"] for one in report["skipped"]}
    assert skipped == {"a/.hidden/three.yaml": True, "a/run/recipe.yaml": True, "a/compose.yaml": False}
    report = json.loads(run("a/**/*.yml", "a/one.yaml", "--json").stdout)
    assert [one["file"] for one in report["recipes"]] == ["a/b/two.yml", "a/one.yaml"]
    named = run("a/compose.yaml")
    assert named.exit_code == 2
    assert "a/compose.yaml:1:1: is no recipe" in named.stdout


BAD = "model: {name_or_path: m}\nlora: {r: -4}\ndataset: {train: [{path: d.jsonl}]}\n"
HIDDEN = {
    # files beside a good recipe in configs/, by path; "-> path" is a link
    "in a run's folder": {"bad/plan.json": "{}", "bad/recipe.yaml": BAD},
    "in a folder called venv": {"venv/bad.yaml": BAD},
    "in node_modules": {"a/node_modules/b/bad.yaml": BAD},
    "in __pycache__": {"__pycache__/bad.yml": BAD},
    "in a hidden folder": {".github/bad.yaml": BAD},
    "below a hidden folder": {".a/b/c/bad.yaml": BAD},
    "hidden": {".bad.yaml": BAD},
    "behind a link to a folder": {"../other/bad.yaml": BAD, "bad": "-> ../other"},
    "behind a link in a hidden folder": {"../other/bad.yaml": BAD, ".a/bad": "-> ../../other"},
    "behind a link that leads up": {"bad": "-> .."},
}
CHECKED = {
    "with a plan beside it": {"a/plan.json": "{}", "a/bad.yaml": BAD},
    "beside a run's copy": {"a/plan.json": "{}", "a/recipe.yaml": "lora: {}\n", "a/bad.yaml": BAD},
    "below a run": {"a/plan.json": "{}", "a/recipe.yaml": "lora: {}\n", "a/eval/bad.yaml": BAD},
    "in capitals": {"bad.YAML": BAD},
    "in mixed letters": {"bad.Yml": BAD},
    "a link to a file": {"../other/x.yaml": BAD, "bad.yaml": "-> ../other/x.yaml"},
    "a broken link": {"bad.yaml": "-> nothing"},
    "behind a long comment": {"bad.yaml": "foo: 1\n" + "# long\n" * 50_000 + BAD},
    "in flow style": {"bad.yaml": "{foo: 1, lora: {r: -4}}"},
    "with a key in capitals of escapes": {"bad.yaml": 'foo: 1\n"l\\u006fra": {r: -4}\n'},
    "with explicit keys": {"bad.yaml": "foo: 1\n? lora\n: {r: -4}\n"},
    "with a merged key": {"bad.yaml": "foo: 1\n<<: {lora: {r: -4}}\n"},
    "with a byte order mark": {"bad.yaml": "\ufeff" + BAD},
    "that is no YAML": {"bad.yaml": "foo: [1\n"},
    "that is no mapping": {"bad.yaml": "- lora: {r: -4}\n"},
    "of two documents": {"bad.yaml": "foo: 1\n---\n" + BAD},
}


def laid_out(files: dict[str, str]) -> None:
    for name, text in {"good.yaml": "lora: {}\n", **files}.items():
        path = Path("configs") / name
        path.parent.mkdir(parents=True, exist_ok=True)
        if text.startswith("-> "):
            path.symlink_to(text.removeprefix("-> "))
        else:
            path.write_text(text)


@pytest.mark.parametrize("files", HIDDEN.values(), ids=HIDDEN)
def test_what_a_folder_leaves_out_is_named_and_a_fault_when_strict(
    files: dict[str, str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    laid_out(files)
    left_out = os.path.normpath(os.path.join("configs", list(files)[-1]))
    report = json.loads(run("configs", "--json").stdout)
    assert [one["file"] for one in report["skipped"] if one["is_recipe"]] == [left_out]
    assert report["ok"]
    for format in ("text", "json", "github", "junit", "sarif"):
        strict = run("configs", "--strict", "--format", format)
        assert strict.exit_code == 2
        assert left_out in strict.stdout


@pytest.mark.parametrize("files", CHECKED.values(), ids=CHECKED)
def test_no_place_hides_a_recipe(files: dict[str, str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    laid_out(files)
    bad = next(name for name in files if name.rpartition("/")[2].startswith("bad"))
    report = json.loads(run("configs", "--json").stdout)
    assert [one["file"] for one in report["recipes"] if not one["ok"]] == [f"configs/{bad}"]
    assert report["exit_code"] == 2


@pytest.mark.parametrize("path", [".", "./configs", "configs/", "../{name}/configs", "{whole}"])
def test_a_folder_is_searched_however_it_is_named(path: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    laid_out({"a/b/bad.yaml": BAD, ".hidden/bad.yaml": BAD})
    report = json.loads(run(path.format(name=tmp_path.name, whole=tmp_path), "--json").stdout)
    assert [os.path.basename(one["file"]) for one in report["recipes"]] == ["good.yaml", "bad.yaml"]
    assert [one["is_recipe"] for one in report["skipped"]] == [True]


def test_an_environment_beside_recipes_is_no_fault(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Nor are links that lead nowhere else, or to no recipes; a pipe is named."""
    monkeypatch.chdir(tmp_path)
    laid_out({"venv/lib/odd.yaml": "- a list\n", "venv/lib/broken.yml": "[", "venv/lib64": "-> lib"})
    Path("data").mkdir()
    Path("data/rows.jsonl").touch()
    Path("configs/data").symlink_to("../data")
    os.mkfifo("configs/pipe.yaml")
    assert run("configs", "--strict").exit_code == 0
    assert [one["file"] for one in json.loads(run("configs", "--json").stdout)["skipped"]] == ["configs/pipe.yaml"]


def test_other_yaml_is_no_fault(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    laid_out({"compose.yaml": "services: {}\n", ".github/ci.yaml": "on: push\n", "ds.yml": "zero: {a: [model]}\n"})
    assert run("configs", "--strict").exit_code == 0
    skipped = {one["file"] for one in json.loads(run("configs", "--json").stdout)["skipped"]}
    assert skipped == {"configs/compose.yaml", "configs/ds.yml"}


@pytest.mark.parametrize(
    ("path", "message"),
    [
        ("none.yaml", "none.yaml: … No such file"),
        ("nothing", "nothing: … 0 YAML"),
        ("*.yaml", "*.yaml: … no recipes"),
    ],
)
def test_paths_without_recipes(path: str, message: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    Path("nothing").mkdir()
    ran = run(path)
    assert ran.exit_code == 2
    assert ran.output == Like(f"… {message}")


# --- options --------------------------------------------------------------------------------------


def test_parts_that_are_elsewhere_can_be_left_out(written: Path, tiny_model: Path) -> None:
    text = GOOD.replace("MODEL", "/models/llama").replace("chat.jsonl", "/data/chat.jsonl")
    file = write(text, tiny_model)
    assert run(file).exit_code == 3
    assert run(file, "--skip", "data").exit_code == 4
    assert run(file, "--skip", "data", "--skip", "model").exit_code == 0
    wrong = run(file, "--skip", "date")
    assert wrong.exit_code == 2
    assert wrong.output == Like("… date … data")


def test_for_which_machine(written: Path, tiny_model: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "")
    file = write(added("training", "optim: paged_adamw_8bit"), tiny_model)
    assert run(file).exit_code == 0
    assert run(file, "--gpu", "T4").exit_code == 0
    here = run(file, "--here")
    assert here.exit_code == 2
    assert here.stdout == Like("… GPU")
    assert run(file, "--here", "--gpu", "T4").exit_code == 2


def test_what_cannot_be_checked_is_said(written: Path, tiny_model: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    monkeypatch.setenv("HF_HUB_CACHE", str(written / "no cache"))
    file = write(GOOD.replace("MODEL", "somebody/some-model"), tiny_model)
    ran = run(file)
    assert ran.exit_code == 0
    assert ran.stdout == Like("… note: model.name_or_path: … not checked … somebody/some-model")
    assert run(file, "--strict").exit_code == 4


def test_deep_audits_the_data(written: Path, tiny_model: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(written / "cache"))
    rows = [conversation(f"question {i}", "an answer") for i in range(40)]
    rows[30] = conversation("question", " ")  # beyond the first rows
    write_jsonl(written / "late.jsonl", rows)
    file = write(changed("path: chat.jsonl", "path: late.jsonl"), tiny_model)
    assert run(file).exit_code == 0
    ran = run(file, "--deep")
    assert ran.exit_code == 3
    assert re.search(r"recipe.yaml:6:\d+: dataset.train.0.path: late.jsonl:31: .*nothing to learn", ran.stdout)
    fine = json.loads(run(write(GOOD, tiny_model), "--deep", "--json").stdout)
    assert fine["recipes"][0]["facts"]["rows"] == 27


# --- formats --------------------------------------------------------------------------------------


@pytest.fixture
def two_faults(written: Path, tiny_model: Path) -> str:
    text = added("training", "packing: yes, 100%").replace("chat.jsonl", "chäts.jsonl")
    return write(text, tiny_model, "recipe with spaces.yaml")


def test_json(two_faults: str) -> None:
    found: dict[str, Any] = json.loads(run(two_faults, "--format", "json").stdout)
    assert (found["ok"], found["exit_code"]) == (False, 2)
    (fault,) = found["recipes"][0]["faults"]
    assert (fault["line"], fault["column"], fault["key"], fault["rule"]) == (11, 12, "training.packing", "recipe")


def test_github(two_faults: str) -> None:
    (line,) = (line for line in run(two_faults, "--format", "github").stdout.splitlines() if line.startswith("::"))
    assert line == Like(
        "::error file=recipe with spaces.yaml,line=11,col=12,title=lorafit%3A recipe::"
        "training.packing: … true … false … 'yes, 100%25'"
    )


def test_junit(two_faults: str, written: Path, tiny_model: Path) -> None:
    suite = ElementTree.fromstring(run(two_faults, write(GOOD, tiny_model), "--format", "junit").stdout)
    assert (suite.get("tests"), suite.get("failures")) == ("2", "1")
    failed, fine = suite.findall("testcase")
    failure = failed.find("failure")
    assert failure is not None
    assert "recipe with spaces.yaml:11:12: training.packing" in str(failure.get("message"))
    assert fine.find("failure") is None


def test_sarif(two_faults: str) -> None:
    log = json.loads(run(two_faults, "--format", "sarif").stdout)
    assert log["version"] == "2.1.0"
    (result,) = log["runs"][0]["results"]
    place = result["locations"][0]["physicalLocation"]
    assert place["artifactLocation"]["uri"] == "recipe%20with%20spaces.yaml"
    assert place["region"] == {"startLine": 11, "startColumn": 12}
    assert result["ruleId"] in {rule["id"] for rule in log["runs"][0]["tool"]["driver"]["rules"]}


def test_an_unknown_format(two_faults: str) -> None:
    ran = run(two_faults, "--format", "yaml")
    assert ran.exit_code == 2
    assert "text, json, github, junit, sarif" in ran.output


def test_a_tracker_that_is_only_missing_here_is_no_fault(written: Path, tiny_model: Path) -> None:
    file = write(added("training", "report_to: [dvclive]"), tiny_model)
    checked = Checker(ValidateOptions(())).check(file)
    assert checked.faults == ()
    assert checked.notes[0].startswith("training.report_to.0: dvclive ")
    assert run(file, "--here").exit_code == 2
    assert run(file, "--strict").exit_code == 2


def test_a_missing_tracker_stops_the_training_alone(
    written: Path, tiny_model: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """It neither hides what is wrong with the recipe nor stops what reports nothing."""
    monkeypatch.setenv("XDG_CACHE_HOME", str(written / "cache"))
    file = write(added("training", "report_to: [dvclive]"), tiny_model)
    for command in (["train"], ["train", "--dry-run"], ["train", "--json"], ["train", "--resume"]):
        ran = CliRunner().invoke(app, [*command, file])
        assert ran.exit_code == 2
        assert re.search(r"recipe.yaml:\d+:\d+: training.report_to.0: .*pip install dvclive", ran.stderr)
    assert not Path("runs/recipe").exists()
    for command in (["preview"], ["estimate-vram"], ["explain"], ["smoke"], ["lock"]):
        assert CliRunner().invoke(app, [*command, file]).exit_code == 0, command
    assert (
        run(write(added("training", "report_to: [dvclive]") + "hardware:\n  vram: 100MiB\n", tiny_model)).exit_code == 5
    )
    write_jsonl(
        written / "late.jsonl", [conversation(f"question {i}", "an answer" if i < 30 else " ") for i in range(40)]
    )
    late = added("training", "report_to: [dvclive]").replace("chat.jsonl", "late.jsonl")
    assert run(write(late, tiny_model), "--deep").exit_code == 3


@pytest.mark.parametrize(
    ("asked", "named"),
    [
        ("tensorboard", "'lorafit[tensorboard]'"),
        ("flyte", "flytekit"),
        ("azure_ml", "azureml-mlflow"),
        ("wandb", "wandb"),
        ("flash_attention_2", "flash-attn"),
        ("flash_attention_3", "flash_attn_interface"),
    ],
)
def test_what_is_missing_names_what_to_install(
    asked: str, named: str, written: Path, tiny_model: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("lorafit.hardware.is_installed", lambda module: module == "lm_eval")
    text = added("training", f"report_to: [{asked}]")
    if asked.startswith("flash"):
        text = (
            GOOD.replace("MODEL\n", f"MODEL\n  attn_implementation: {asked}\n") + "hardware:\n  gpu: H100 PCIe 80GB\n"
        )
    ran = run(write(text, tiny_model))
    assert ran.exit_code == 0
    assert f"pip install {named}" in ran.stdout
    assert run(write(text, tiny_model), "--strict").exit_code == 2


@pytest.mark.parametrize("name", [name for name, (text, code, _) in FAULTS.items() if "eval:" in text or code == 3])
def test_a_model_that_cannot_be_had_hides_no_fault(
    name: str, written: Path, tiny_model: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    monkeypatch.setenv("HF_HUB_CACHE", str(written / "no cache"))
    text, code, _ = FAULTS[name]
    line = next(number for number, line in enumerate(text.splitlines(), 1) if HERE in line)
    checked = Checker(ValidateOptions(())).check(write(text.replace("MODEL", "somebody/some-model"), tiny_model))
    assert [(fault.mistake.position.line, fault.exit_code) for fault in checked.faults] == [(line, code)]


def test_rows_decide_which_figures_there_are(written: Path, tiny_model: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Answers that are no JSON have no JSON metrics: found with all rows, before weights load."""
    monkeypatch.setenv("XDG_CACHE_HOME", str(written / "cache"))
    file = write(gated("heldout.json_match.adapter > 0.5"), tiny_model)
    assert run(file).exit_code == 0
    ran = run(file, "--deep")
    assert ran.exit_code == 2
    assert "recipe.yaml:17:7: eval.gates.0: " in ran.stdout
    trained = CliRunner().invoke(app, ["train", file, "--set", "output_dir=runs/decided"])
    assert (trained.exit_code, Path("runs/decided/plan.json").exists()) == (2, False)
    assert "heldout.json_match.adapter" in trained.stderr


def test_the_rows_of_a_set_are_read_before_a_training(
    written: Path, tiny_model: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(written / "cache"))
    rows = [
        {"instruction": f"how {i}", "output": "so", "of": ["so", "no"] if i < 30 else ["so", "so"]} for i in range(40)
    ]
    write_jsonl(written / "own.jsonl", rows)
    file = write(f"{GOOD}eval:\n  sets:\n    - {{name: own, path: own.jsonl, options: of}}\n", tiny_model)
    for command in (["validate", "--deep"], ["train", "--set", "output_dir=runs/own"]):
        ran = CliRunner().invoke(app, [*command, file])
        assert ran.exit_code == 3, ran.output
        assert "own.jsonl:31" in ran.output
    assert not Path("runs/own/plan.json").exists()


def test_a_recipe_is_checked_once_however_it_is_named(written: Path, tiny_model: Path) -> None:
    file = write(GOOD, tiny_model)
    found = run(file, f"./{file}", str(written / file), "recipe*.yaml", "--json")
    assert [one["file"] for one in json.loads(found.output)["recipes"]] == [file]


def test_what_is_no_file_is_left_out_of_a_folder(written: Path, tiny_model: Path, tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "pipe.yaml")
    (tmp_path / "recipe.yaml").write_text("model: {}\n")
    for path in (str(tmp_path), str(tmp_path / "*.yaml")):
        assert "1 file: " in run(path).output


def test_a_fault_of_a_parent_is_shown_by_its_plain_path(
    tiny_model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    Path("recipes").mkdir()
    Path("base.yaml").write_text("lora:\n  r: 0\n")
    Path("recipes/own.yaml").write_text("extends: ../base.yaml\n")
    assert "::error file=base.yaml,line=2," in run(str(tmp_path / "recipes/own.yaml"), "--format", "github").output
    sarif = json.loads(run("recipes/own.yaml", "--format", "sarif").output)
    places = [result["locations"][0]["physicalLocation"] for result in sarif["runs"][0]["results"]]
    assert places[0]["artifactLocation"]["uri"] == "base.yaml"


def test_a_fault_of_the_command_line_is_in_no_file(written: Path, tiny_model: Path) -> None:
    arguments = (write(GOOD, tiny_model), "--set", "lora.r=0")
    assert "::error title=lorafit%3A recipe::lora.r: " in run(*arguments, "--format", "github").output
    assert json.loads(run(*arguments, "--format", "sarif").output)["runs"][0]["results"][0]["locations"] == []


def test_json_goes_with_no_other_format(written: Path, tiny_model: Path) -> None:
    assert run(write(GOOD, tiny_model), "--json", "--format", "junit").exit_code == 2
