"""Nothing that a recipe, a data set, a model or an adapter brings keeps a command from its end, or takes the memory."""

from __future__ import annotations

import faulthandler
import gzip
import json
import os
import re
import shutil
import signal
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pyarrow
import pyarrow.parquet
import pytest
import typer
from conftest import CHATML, RecipeMaker, conversation, make_tokenizer, write_jsonl
from typer.testing import CliRunner, Result

from lorafit import bounds
from lorafit.cli import app
from lorafit.cli.exits import reporting
from lorafit.errors import DataError, ModelError, UsageError
from lorafit.rows import read_rows

ENDLESS = "(([a-z]|_|\\.|[0-9])+)+!"
"""An expression that tries every way to divide a name."""
LOOPS = "{% for i in range(99999) %}{% for j in range(99999) %}{% endfor %}{% endfor %}"
WILD = "**/" * 40


@pytest.fixture(autouse=True)
def ends() -> Iterator[None]:
    """What has no end after all ends the process, with the place."""
    faulthandler.dump_traceback_later(180, exit=True)
    yield
    faulthandler.cancel_dump_traceback_later()


@pytest.fixture
def short(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(bounds, "LONGEST", 0.3)


def lorafit(*args: object) -> Result:
    return CliRunner().invoke(app, [str(arg) for arg in args])


def said(result: Result, code: int, *words: str) -> None:
    assert result.exit_code == code, result.output
    assert not result.exception or isinstance(result.exception, SystemExit), result.exception
    assert all(word in result.output for word in words), result.output


def copied(model: Path, to: Path, **files: str) -> Path:
    """A model whose files have another content, by their names with `_` for a dot."""
    shutil.copytree(model, to)
    for name, content in files.items():
        stem, _, suffix = name.rpartition("_")
        (to / f"{stem}.{suffix}").write_text(content)
    return to


def adapter_of(base: Path, folder: Path, **config: Any) -> Path:
    """A LoRA on one layer of a model, whose configuration says something else."""
    import torch
    from peft import LoraConfig, get_peft_model
    from transformers import AutoModelForCausalLM

    torch.manual_seed(0)
    model = get_peft_model(AutoModelForCausalLM.from_pretrained(base), LoraConfig(r=2, target_modules=["q_proj"]))
    model.save_pretrained(folder)
    file = folder / "adapter_config.json"
    file.write_text(json.dumps(json.loads(file.read_text()) | config))
    return folder


# --- time -----------------------------------------------------------------------------------------


@pytest.mark.usefixtures("short")
@pytest.mark.parametrize(
    ("sections", "code", "key"),
    [
        ({"lora": {"target_modules": ENDLESS}}, 2, "lora.target_modules"),
        ({"lora": {"rank_pattern": {ENDLESS: 4}}}, 2, "lora.rank_pattern"),
        ({"lora": {"rank_pattern": {f"q_proj|{ENDLESS}": 4}}}, 2, "lora.rank_pattern"),
        ({"lora": {"alpha_pattern": {ENDLESS: 4}}}, 2, "lora.alpha_pattern"),
        ({"quantization": {"load_in_8bit": True, "llm_int8_skip_modules": [ENDLESS]}}, 2, "llm_int8_skip_modules"),
        ({"dataset": {"template": {"prompt": LOOPS, "completion": "x"}}}, 3, "template"),
        ({"dataset": {"path": f"{WILD}x.jsonl"}}, 3, "path"),
    ],
    ids=["targets", "ranks", "ranks of some", "alphas", "skipped", "data template", "glob"],
)
def test_a_recipe_is_told_off_in_time(
    sections: dict[str, Any], code: int, key: str, recipe: RecipeMaker, rows: Path
) -> None:
    """Each is a mistake at its key; `validate` goes on with the next recipe."""
    if "dataset" in sections:
        sections = {"dataset": {"train": [{"path": str(rows)} | sections["dataset"]]}}
    bad, good = recipe("bad", **sections), recipe("good")
    result = lorafit("validate", bad, good, "--format", "json")
    assert result.exit_code == code, result.output
    first, second = json.loads(result.stdout)["recipes"]
    assert [key in fault["key"] for fault in first["faults"]] == [True], first
    assert second["ok"]


@pytest.mark.usefixtures("short")
def test_a_chat_template_is_told_off_in_time(recipe: RecipeMaker, tiny_model: Path, tmp_path: Path) -> None:
    file = tmp_path / "endless.jinja"
    file.write_text(LOOPS + CHATML)
    said(lorafit("validate", recipe(model={"chat_template": str(file)})), 2, "recipe.yaml", "model.chat_template")
    model = copied(tiny_model, tmp_path / "m", chat_template_jinja=LOOPS + CHATML)
    said(lorafit("validate", recipe(model={"name_or_path": str(model)})), 4, "model.name_or_path")
    said(lorafit("train", recipe(model={"name_or_path": str(model)})), 4, "0.3 seconds")
    said(lorafit("smoke", recipe(model={"name_or_path": str(model)})), 4, "0.3 seconds")


@pytest.mark.usefixtures("short")
def test_a_row_is_told_off_in_time(tmp_path: Path, recipe: RecipeMaker, tiny_model: Path, rows: Path) -> None:
    """A chat template may have no end for one row alone."""
    row = f"{{% if 'w7' in messages[0].content %}}{LOOPS}{{% endif %}}"
    model = copied(tiny_model, tmp_path / "m", chat_template_jinja=row + CHATML)
    data = write_jsonl(tmp_path / "some.jsonl", [conversation(f"w{n}", "x") for n in range(9)])
    path = recipe(model={"name_or_path": str(model)}, dataset={"train": [{"path": str(data)}]})
    said(lorafit("preview", path), 3, f"{data}:8:", "0.3 seconds")


@pytest.mark.usefixtures("short")
@pytest.mark.parametrize(
    "config", [{"target_modules": ENDLESS}, {"rank_pattern": {ENDLESS: 4}}, {"alpha_pattern": {ENDLESS: 4}}], ids=str
)
def test_an_adapter_is_told_off_in_time(config: dict[str, Any], tiny_model: Path, tmp_path: Path) -> None:
    from transformers import AutoModelForCausalLM

    from lorafit.engine.evaluate.models import Loaded
    from lorafit.engine.model import load_adapter

    adapter = adapter_of(tiny_model, tmp_path / "a", **config)
    for method in ("stream", "full"):
        said(lorafit("merge", adapter, "-o", tmp_path / "out", "--method", method), 4, str(adapter))
    for load in (lambda base: load_adapter(base, adapter), lambda base: Loaded(base).add("x", adapter)):
        with pytest.raises(ModelError, match=r"0\.3 seconds"):
            load(AutoModelForCausalLM.from_pretrained(tiny_model))
    if "alpha_pattern" in config:
        said(lorafit("merge", adapter, "--check-vllm"), 4, "adapter_config.json")


@pytest.mark.usefixtures("short")
def test_what_is_rendered_elsewhere_is_told_off_in_time(tmp_path: Path) -> None:
    from lm_eval import utils
    from transformers import AutoTokenizer

    from lorafit.engine.data.render import Renderer
    from lorafit.engine.evaluate.tasks import kept_templates
    from lorafit.evaluation.answers import Judged
    from lorafit.evaluation.metrics import make_metric
    from lorafit.export.ollama import modelfile

    with pytest.raises(ModelError):
        modelfile(LOOPS, {}, "x.gguf", [])
    with kept_templates(False), pytest.raises(Exception, match=r"0\.3 seconds"):
        utils.apply_template(LOOPS, {})
    tokenizer = AutoTokenizer.from_pretrained(make_tokenizer(tmp_path, LOOPS))
    with pytest.raises(ModelError):
        Renderer(tokenizer, "assistant")
    with pytest.raises(Exception, match=r"0\.3 seconds"):
        tokenizer.apply_chat_template([{"role": "user", "content": "x"}], tokenize=False)
    schema = tmp_path / "schema.json"
    schema.write_text(json.dumps({"pattern": "^(a+)+$"}))
    for metric in ({"regex": "(a+)+$"}, {"json_schema": str(schema)}):
        with pytest.raises(UsageError, match=r"0\.3 seconds"):
            make_metric(metric).score(Judged(answer=f'"{"a" * 60}b"', expected=""))


@pytest.mark.usefixtures("short")
def test_the_limit_of_a_block_within_another_leaves_that_ones() -> None:
    def work() -> None:
        with bounds.within(DataError, "outer"):
            for _ in range(99999):
                with bounds.within(UsageError, "inner"):
                    sum(range(100_000))

    with pytest.raises(DataError, match="outer"):
        work()
    began = time.thread_time()
    while time.thread_time() < began + 0.4:  # no alarm is left
        pass


# --- length ---------------------------------------------------------------------------------------

AGAIN = "{%% set ns = namespace(x=[1]) %%}{%% for i in range(40) %%}{%% set ns.x = %s %%}{%% endfor %%}"
GROWING = {
    "power": "{{ 10 ** 10000000 }}",
    "power of a power": AGAIN.replace("[1]", "9") % "ns.x * ns.x",
    "times": "{{ 'x' * 5000 }}",
    "times, turned round": "{{ 5000 * 'x' }}",
    "list": "{{ [1] * 5000 }}",
    "width": "{{ '%5000d' % 1 }}",
    "width given": "{{ '%*d' % (2000000, 1) }}",
    "places": "{{ '%.5000f' % 1 }}",
    "format": "{{ '{:5000}'.format(1) }}",
    "format by name": "{{ '{a:>5000}'.format_map({'a': 1}) }}",
    "format, filter": "{{ '%5000d' | format(1) }}",
    "center": "{{ 'x' | center(2000000) }}",
    "center, method": "{% set f = 'x'.center %}{{ f(2000000) }}",
    "zfill": "{{ 'x' | attr('zfill') }}{{ 'x'.zfill(2000000) }}",
    "expandtabs": "{{ ('\\t' * 50).expandtabs(100) }}",
    "replace": "{{ ('x' * 100) | replace('', 'y' * 100) }}",
    "replace, method": "{{ ('x' * 100).replace('x', 'y' * 100) }}",
    "join": "{{ range(100) | join('y' * 100) }}",
    "join, method": "{{ ('y' * 100).join(['a'] * 100) }}",
    "indent": "{{ ('\\n' * 100) | indent(100) }}",
    "tojson": "{{ ([1] * 100) | tojson(indent=100) }}",
    "wordwrap": "{{ ('x' * 100) | wordwrap(1, wrapstring='y' * 100) }}",
    "round": "{{ 1.5 | round(1000000000, 'ceil') }}",
    "batch": "{{ [1] | batch(2000000) | list }}",
    "sum": "{{ ([[1]] * 100) | sum(start=[]) }}",
    "translate": "{{ ('x' * 100).translate({120: 'y' * 100}) }}",
    "bytes": "{{ (1).to_bytes(2000000, 'big') }}",
    "tildes": "{% set x = 'x' * 100 %}{{ " + " ~ ".join("x" * 40) + " }}",
    "loop": "{% for i in range(5000) %}x{% endfor %}",
    "macro": "{% macro m() %}{% for i in range(5000) %}x{% endfor %}{% endmacro %}{% set x = m() %}",
    "lists in lists": AGAIN % "[ns.x, ns.x]",
    "tuples": AGAIN % "(ns.x, ns.x)",
    "dicts": AGAIN % "{1: ns.x, 2: ns.x}",
    "dict()": AGAIN % "dict(a=ns.x, b=ns.x)",
    "list()": AGAIN % "(ns.x * 2) | batch(2) | list",
    "lipsum": "{{ lipsum(5000) }}",
}


@pytest.mark.parametrize("template", GROWING.values(), ids=GROWING)
def test_a_template_makes_nothing_that_is_too_long(template: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(bounds, "LONGEST_TEXT", 3000)
    environment = bounds.Environment(extensions=[])
    with pytest.raises(Exception, match=r"too long|is undefined"):
        environment.from_string(template).render()


def test_a_template_that_takes_memory_step_by_step_is_stopped(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(bounds, "MOST_MEMORY", 100 << 20)
    doubled = (
        "{% set ns = namespace(x='x' * 1000000) %}{% for i in range(99) %}{% set ns.x = ns.x OP ns.x %}{% endfor %}"
    )
    for operator in "+~":
        with pytest.raises(Exception, match="MiB of memory"):
            bounds.Environment().from_string(doubled.replace("OP", operator)).render()


def test_templates_render_as_without_limits() -> None:
    """Values of every kind, as transformers' own environment has them."""
    from jinja2.sandbox import ImmutableSandboxedEnvironment

    source = (
        "{{ 2 ** 10 }} {{ 'ab' * 3 }} {{ 3 * [1] }} {{ '%5.2f|%s' % (1.5, 'x') }} {{ '{:>5}|{a}'.format(1, a=2) }} "
        "{{ 'x' | center(9) }} {{ 'a-b' | replace('-', '+') }} {{ [1, 2] | join(', ') }} {{ 'a' ~ 1 ~ none }} "
        "{{ 'a\nb' | indent(2) }} {{ {'a': [1, (2, 3)]} }} {{ 'abc' | list }} {{ 7 % 3 }} {{ [1.5, 2] | sum }} "
        "{{ {'a': x} | tojson }} {{ 2.567 | round(1) }} {{ [1, 2, 3] | batch(2) | list }} {{ ' a b '.split() }} "
        "{% for a, b in [(1, 2), (x, 3)] %}{{ a }}{{ b }}{% endfor %} {{ '%s' | format('é') }} {{ 'x'.zfill(3) }}"
    )
    plain, bounded = ImmutableSandboxedEnvironment(), bounds.Environment()
    assert bounded.from_string(source).render(x="ü") == plain.from_string(source).render(x="ü")


LONG = {
    "rows.jsonl": '{"text": "a"}\n{"text": "%s"}\n',
    "blank.jsonl": '{"text": "a"}\n' + "\n" * 3000 + "%.0s",
    "rows.csv": 'text\na\n"%s"\n',
    "lines.csv": 'text\na\n"' + "b\n" * 2000 + '%.0s"\n',
    "rows.json": '[{"text": "a"}, {"text": "%s"}]',
    "blank.json": '[{"text": "a"}, ' + " " * 3000 + '{"text": "b"}]%.0s',
    "rows.jsonl.gz": '{"text": "a"}\n{"text": "%s"}\n',
    "rows.csv.zst": 'text\na\n"%s"\n',
}


@pytest.mark.parametrize("name", LONG)
def test_a_row_has_a_longest_length(name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(bounds, "LONGEST_ROW", 2000)
    monkeypatch.setattr("lorafit.rows.files._CHUNK", 64)  # a window of JSON is no shorter than this
    file = tmp_path / name

    def write(length: int) -> None:
        content = (LONG[name] % ("x" * length)).encode()
        if name.endswith(".gz"):
            content = gzip.compress(content)
        elif name.endswith(".zst"):
            content = pyarrow.compress(content, codec="zstd", asbytes=True)
        file.write_bytes(content)

    write(6000)
    rows = read_rows(str(file))
    assert next(rows).fields == {"text": "a"}
    with pytest.raises(DataError, match=rf"{name}(:\d+|: row 2): .*2000 characters"):
        list(rows)
    if name.startswith("rows"):
        write(1500)
        assert len(list(read_rows(str(file)))) == 2


def test_a_row_of_parquet_has_a_longest_length(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(bounds, "LONGEST_ROW", 100_000)
    file = tmp_path / "rows.parquet"
    pyarrow.parquet.write_table(pyarrow.table({"text": ["a"] * 9 + ["b" * 200_000]}), file)
    with pytest.raises(DataError, match=r"rows\.parquet: row 10: "):
        list(read_rows(str(file)))
    pyarrow.parquet.write_table(pyarrow.table({"text": ["a" * 50_000] * 10}), file)
    assert len(list(read_rows(str(file)))) == 10
    # values of megabytes that take no room in the file
    pyarrow.parquet.write_table(pyarrow.table({"text": ["c" * 3_000_000] * 20}), file, compression="zstd")
    with pytest.raises(DataError, match=r"rows\.parquet: row 1: .*unpacks"):
        list(read_rows(str(file)))


def test_an_object_of_rows_has_a_longest_length(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(bounds, "LARGEST_DOCUMENT", 3_000_000)
    file = tmp_path / "rows.json"
    file.write_text(json.dumps({"data": [{"text": "x" * 1000}] * 8000}))
    with pytest.raises(DataError, match=r"3000000 characters.*jsonl"):
        list(read_rows(str(file)))


@pytest.mark.parametrize(
    ("name", "content", "place"),
    [
        ("a.jsonl", '{"text": "a"}\n{"text": "b", "text": "c"}\n', "a.jsonl:2: "),
        ("a.jsonl", '{"text": "a", "more": [{"b": 1, "b": 1}]}\n', "a.jsonl:1: "),
        ("a.json", '[{"text": "a"},\n {"text": "b", "text": "c"}]', "a.json:2: "),
        ("a.json", '{"data": [{"text": "a"}],\n "data": []}', "a.json:1: "),
    ],
)
def test_a_row_with_a_key_twice_is_refused(name: str, content: str, place: str, tmp_path: Path) -> None:
    (tmp_path / name).write_text(content)
    with pytest.raises(DataError, match=f"{place}the key .* twice"):
        list(read_rows(str(tmp_path / name)))


# --- files ----------------------------------------------------------------------------------------


def pipe(path: Path) -> Path:
    os.mkfifo(path)
    return path


def link(to: str) -> Callable[[Path], Path]:
    def make(path: Path) -> Path:
        path.symlink_to(to)
        return path

    return make


def large(path: Path) -> Path:
    with path.open("wb") as stream:
        stream.truncate(1 << 40)
    return path


@pytest.mark.parametrize(
    "odd", [pipe, link("/dev/zero"), link("/proc/self/pagemap"), large], ids=["pipe", "device", "proc", "large"]
)
def test_only_files_are_read_and_no_further_than_a_limit(
    odd: Callable[[Path], Path], recipe: RecipeMaker, tiny_model: Path, rows: Path, tmp_path: Path
) -> None:
    is_large = odd is large
    named = odd(tmp_path / "x.jinja")
    said(lorafit("validate", recipe(model={"chat_template": str(named)})), 2, "model.chat_template", "x.jinja")
    named = odd(tmp_path / "x.yaml")
    for command in ("validate", "train", "explain"):
        said(lorafit(command, named), 2, "x.yaml")
    said(lorafit("init", tmp_path / "new.yaml", "--from", named), 2, "x.yaml")
    for name in ("config.json", "chat_template.jinja", "tokenizer_config.json", "model.safetensors"):
        model = copied(tiny_model, tmp_path / f"m-{name}")
        (model / name).unlink(missing_ok=True)
        odd(model / name)
        result = lorafit("train", recipe(model={"name_or_path": str(model)}), "--dry-run")
        said(result, 4) if name in ("config.json", "chat_template.jinja") or is_large else None
        assert result.exit_code in (0, 2, 4), result.output
    if not is_large:  # data may be of any size
        data = odd(tmp_path / "x.jsonl")
        said(lorafit("validate", recipe(dataset={"train": [{"path": str(data)}]})), 3, "dataset.train.0.path")
    odd(tmp_path / "locked.yaml.lock")
    said(lorafit("lock", "--check", recipe("locked")), 2, "locked.yaml.lock")


@pytest.mark.parametrize("name", ["../out.safetensors", "/etc/passwd", "a/../../b.safetensors", "", "a\0b"])
def test_an_index_leads_to_nothing_outside(name: str, recipe: RecipeMaker, tiny_model: Path, tmp_path: Path) -> None:
    model = copied(tiny_model, tmp_path / "m")
    shutil.move(model / "model.safetensors", tmp_path / "out.safetensors")
    (model / "model.safetensors.index.json").write_text(json.dumps({"weight_map": {"a": name}}))
    said(lorafit("validate", recipe(model={"name_or_path": str(model)})), 4, "model.safetensors.index.json")


# --- mistakes -------------------------------------------------------------------------------------


@pytest.mark.parametrize("text", ["a\0b", "runs/a\nb", "a\rb", "\x1b[0m"], ids=repr)
def test_a_path_is_a_path(text: str, recipe: RecipeMaker, rows: Path) -> None:
    for sections in (
        {"output_dir": text},
        {"model": {"name_or_path": text}},
        {"model": {"chat_template": text}},
        {"dataset": {"train": [{"path": text}]}},
        {"eval": {"sets": [{"name": "a", "path": text}]}},
    ):
        said(lorafit("train", recipe(**sections)), 2, "recipe.yaml:")


def test_a_link_to_itself_is_no_run(recipe: RecipeMaker, tmp_path: Path) -> None:
    loop = link("loop")(tmp_path / "loop")
    for command in ("train", "validate"):
        said(lorafit(command, recipe(output_dir=str(loop))), 2, "loop")
        said(lorafit(command, recipe(output_dir=str(loop / "x"))), 2, "loop")
    said(lorafit("eval", loop), 2, "loop")
    said(lorafit("merge", loop), 2, "loop")


@pytest.mark.parametrize(
    ("key", "number"),
    [
        ("training.neftune_noise_alpha", 1e300),
        ("training.learning_rate", 1e300),
        ("training.weight_decay", 1e300),
        ("training.adam_epsilon", 1e300),
        ("training.max_grad_norm", 1e300),
        ("training.max_steps", 10**12),
        ("training.warmup_steps", 10**12),
        ("training.per_device_train_batch_size", 10**12),
        ("training.dataloader_num_workers", 10**6),
        ("lora.lora_alpha", 1e300),
        ("lora.r", 10**12),
        ("lora.loraplus_lr_ratio", 1e300),
    ],
)
def test_a_number_has_a_limit(key: str, number: float, recipe: RecipeMaker) -> None:
    said(lorafit("train", recipe(), "--set", f"{key}={number}"), 2, key, "at most")


@pytest.mark.parametrize(
    "sizes",
    [
        {"num_hidden_layers": -1},
        {"num_hidden_layers": 0},
        {"num_hidden_layers": 10**9},
        {"hidden_size": -64},
        {"vocab_size": 2**40},
        {"vocab_size": 1e300},
        {"num_attention_heads": -4},
        {"head_dim": -1},
    ],
    ids=str,
)
def test_a_model_has_sizes_that_can_be(
    sizes: dict[str, float], recipe: RecipeMaker, tiny_model: Path, tmp_path: Path
) -> None:
    config = json.loads((tiny_model / "config.json").read_text())
    model = copied(tiny_model, tmp_path / "m", config_json=json.dumps(config | sizes))
    said(lorafit("train", recipe(model={"name_or_path": str(model)})), 4, next(iter(sizes)))


@pytest.mark.parametrize(
    "template",
    [
        "{{ " + "(" * 2000 + "1" + ")" * 2000 + " }}",
        "{{ " + "9" * 5000 + " }}",
        "{% for a in [1] %}" * 30 + "{% endfor %}" * 30,
        "{% if 1 %}" * 500 + "{% endif %}" * 500,
        "{{ 1" + " | string" * 3000 + " }}",
    ],
    ids=["brackets", "digits", "loops", "branches", "filters"],
)
def test_a_template_that_can_not_be_compiled(template: str, recipe: RecipeMaker, rows: Path, tmp_path: Path) -> None:
    source = {"path": str(rows), "template": {"prompt": template, "completion": "x"}}
    said(lorafit("validate", recipe(dataset={"train": [source]})), 2, "dataset.train.0.template.prompt")
    (tmp_path / "odd.jinja").write_text(template)
    said(lorafit("validate", recipe(model={"chat_template": str(tmp_path / "odd.jinja")})), 2, "odd.jinja")


def test_a_folder_is_no_recipe(tmp_path: Path, tiny_model: Path) -> None:
    run = tmp_path / "run"
    run.mkdir()
    (run / "plan.json").write_text("{}")
    for command in ("train", "preview", "explain", "estimate-vram", "smoke", "lock"):
        said(lorafit(command, run), 2, str(run), "recipe.yaml")
        said(lorafit(command, tiny_model), 2, str(tiny_model), "is a folder")


def test_an_interrupt_that_is_lost_comes_again() -> None:
    """One that is raised while Python destroys an object is none that anybody sees."""

    class Destroyed:
        def __init__(self, number: int) -> None:
            self.number = number

        def __del__(self) -> None:
            os.kill(os.getpid(), self.number)
            threading.Event().wait(0.01)

    for number, code in ((signal.SIGINT, 130), (signal.SIGTERM, 143)):

        @reporting()
        def command(number: int = number) -> None:
            Destroyed(number)
            for _ in range(1000):
                threading.Event().wait(0.01)

        with pytest.raises(typer.Exit) as left:
            command()
        assert left.value.exit_code == code


def test_code_that_takes_the_alarm_does_not_end_the_limit(short: None) -> None:
    """As metrics of one's own do, which have a limit of their own."""
    with bounds.within(UsageError, "it"):
        pass
    before = signal.signal(signal.SIGALRM, lambda *_: None)
    signal.alarm(5)
    signal.alarm(0)
    signal.signal(signal.SIGALRM, before)
    with pytest.raises(UsageError, match="it takes longer"), bounds.within(UsageError, "it"):
        re.fullmatch("(a+)+b", "a" * 40)


def test_the_alarm_goes_back_to_whom_it_was() -> None:
    rang: list[int] = []
    mine = signal.signal(signal.SIGALRM, lambda number, _: rang.append(number))
    try:
        with bounds.within(UsageError, "it"):
            pass
        end = time.monotonic() + 2
        while signal.getsignal(signal.SIGALRM) is bounds._tick and time.monotonic() < end:
            time.sleep(0.05)
        os.kill(os.getpid(), signal.SIGALRM)
        assert rang == [signal.SIGALRM]
    finally:
        signal.signal(signal.SIGALRM, mine)
