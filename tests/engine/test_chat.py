"""A chat gives the answers of each model alone, in the training's form, and its commands do what they say."""

from __future__ import annotations

import dataclasses
import io
import os
import signal
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from conftest import CHATML, WORDS, conversation, make_model, make_tokenizer, write_jsonl
from peft import AutoPeftModelForCausalLM
from rich.console import Console
from transformers import AutoModelForCausalLM, AutoTokenizer
from wording import Like

import lorafit.engine.chat as module
from lorafit.engine.chat import Turn, _Stream, chat
from lorafit.engine.data.prepare import prepare
from lorafit.engine.tokenizer import load_tokenizer
from lorafit.errors import DataError, LorafitError, ModelError, UsageError
from lorafit.files import SEAL
from lorafit.options import ChatOptions, from_stdin
from lorafit.run.directory import RunDir
from lorafit.text import harmless

NEW = 12
"""Tokens of the answers here."""


class Terminal:
    """Types lines, then leaves; keeps what was shown, and the prompts that it was shown."""

    def __init__(self, *lines: str | BaseException) -> None:
        self.lines = iter(lines)
        self.prompts: list[str] = []
        self.parts: list[str] = []
        self.talk = io.StringIO()

    def read(self, prompt: str) -> str:
        self.prompts.append(prompt)
        line = next(self.lines, EOFError())
        if isinstance(line, BaseException):
            raise line
        return line

    def chat(self, path: object, **options: Any) -> list[Turn]:
        options = {"max_new_tokens": NEW} | options
        return chat(ChatOptions(str(path), **options), Console(file=self.talk), self.read, self.parts.append)

    @property
    def shown(self) -> str:
        return "".join(self.parts)

    @property
    def said(self) -> str:
        return self.talk.getvalue()


def talk(path: object, *lines: str, **options: Any) -> list[Turn]:
    return Terminal(*lines).chat(path, **options)


def typed(*prompts: str) -> str:
    """A conversation of prompts, and answers in between, as ChatML up to the next answer."""
    roles = ("user", "assistant")
    turns = [f"<|im_start|>{roles[i % 2]}\n{text}<|im_end|>\n" for i, text in enumerate(prompts)]
    return "".join(turns) + "<|im_start|>assistant\n"


def alone(model: Any, tokenizer: Any, text: str, new: int = NEW, special: bool = False) -> str:
    """The greedy answer of a model to a text."""
    ids = tokenizer(text, add_special_tokens=special, return_tensors="pt")["input_ids"]
    with torch.no_grad():
        made = model.generate(ids, attention_mask=torch.ones_like(ids), max_new_tokens=new, do_sample=False)
    return str(tokenizer.decode(made[0, ids.shape[1] :], skip_special_tokens=True))


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("chat")


@pytest.fixture(scope="module")
def base(place: Path) -> Path:
    """With biases, which some adapters train."""
    return make_model(place / "tiny", attention_bias=True)


def trained(place: Path, base: Path, name: str, **sections: Any) -> RunDir:
    """A short run with a learning rate that changes every answer."""
    import yaml

    from lorafit.engine.train import train
    from lorafit.plan import plan_recipe
    from lorafit.recipe import Recipe
    from lorafit.run.manifest import Start

    words = WORDS.split()
    rows = [conversation(f"{words[i]} {words[-i]}", f"{name} {words[i]}") for i in range(12)]
    content: dict[str, Any] = {
        "model": {"name_or_path": str(base), "dtype": "float32"},
        "lora": {"r": 4, "lora_alpha": 8, "lora_dropout": 0.0},
        "dataset": {"train": [{"path": str(write_jsonl(place / f"{name}.jsonl", rows))}]},
        "training": {"max_steps": 8, "per_device_train_batch_size": 4, "learning_rate": 3e-2, "max_length": 64},
        "output_dir": str(place / name),
    }
    for section, values in sections.items():
        content[section] = values if not isinstance(values, dict) else content[section] | values
    path = place / f"{name}.yaml"
    path.write_text(yaml.safe_dump({key: value for key, value in content.items() if value}), encoding="utf-8")
    return train(plan_recipe(Recipe.load(path, ()), path), path.read_bytes(), Start(), Console(file=io.StringIO()))


@pytest.fixture(scope="module")
def run(place: Path, base: Path) -> RunDir:
    return trained(place, base, "red", lora={"bias": "all"})


@pytest.fixture(scope="module")
def other(place: Path, base: Path) -> RunDir:
    return trained(place, base, "blue", training={"seed": 5})


@pytest.fixture(scope="module")
def answers(base: Path, run: RunDir, other: RunDir) -> dict[str, str]:
    """What each model alone answers to `one two`."""
    models = {
        "base": AutoModelForCausalLM.from_pretrained(base),
        "adapter": AutoPeftModelForCausalLM.from_pretrained(run.adapter),
        "other": AutoPeftModelForCausalLM.from_pretrained(other.adapter),
    }
    tokenizer = AutoTokenizer.from_pretrained(run.adapter)
    return {name: alone(model.eval(), tokenizer, typed("one two")) for name, model in models.items()}


def test_each_model_answers_as_it_does_alone_in_any_order(run: RunDir, other: RunDir, answers: dict[str, str]) -> None:
    assert len(set(answers.values())) == 3
    order = ["base", "adapter", "other", "base", "other", "adapter", "adapter", "base"]
    lines = [line for name in order for line in ("/reset", f"/adapter {name}", "one two")]
    turns = talk(run.path, *lines, adapters=(("other", other.path),))
    assert [turn.model for turn in turns] == order
    assert [turn.answer for turn in turns] == [answers[name] for name in order]


def test_adapter_of_the_run_answers_first_and_prompts_name_who_does(run: RunDir, answers: dict[str, str]) -> None:
    terminal = Terminal("one two", "/base", "/reset", "one two")
    turns = terminal.chat(run.path)
    assert [turn.answer for turn in turns] == [answers["adapter"], answers["base"]]
    assert terminal.prompts == ["adapter> ", "adapter> ", "base> ", "base> ", "base> "]
    assert talk(run.path, "one two", use="base")[0].answer == answers["base"]


def test_an_adapter_folder_goes_by_its_name(run: RunDir, other: RunDir, answers: dict[str, str]) -> None:
    terminal = Terminal("/adapter", "/adapter other", "/adapter", "one two")
    turns = terminal.chat(run.path, adapters=(("other", other.adapter),))
    assert turns[0].answer == answers["other"]
    assert "  base\n* adapter\n  other\n" in terminal.said
    assert "  base\n  adapter\n* other\n" in terminal.said


def test_the_conversation_goes_on_in_the_form_of_the_training(run: RunDir, base: Path) -> None:
    first, second = talk(run.path, "one two", "three")
    model = AutoPeftModelForCausalLM.from_pretrained(run.adapter).eval()
    tokenizer = AutoTokenizer.from_pretrained(run.adapter)
    assert second.answer == alone(model, tokenizer, typed("one two", first.answer.strip(), "three"))
    assert [first, second] == [
        dataclasses.replace(turn, seconds=old.seconds)
        for turn, old in zip(talk(run.path, prompts=("one two", "three")), (first, second), strict=True)
    ]


def test_tokens_are_those_of_a_training_row(run: RunDir, monkeypatch: pytest.MonkeyPatch) -> None:
    seen: list[list[int]] = []
    tokens = module.Session.tokens
    monkeypatch.setattr(module.Session, "tokens", lambda *given: seen.append(tokens(*given)) or seen[-1])
    talk(run.path, prompts=("the dogs",), system="say yes", max_new_tokens=1)
    talk(run.path, prompts=("the the",), max_new_tokens=1)
    plan = run.load_plan()
    row = prepare(plan.data, load_tokenizer(plan, run.result)).rows
    first = next(row for row in row if row["question"] == "the the")
    assert first["input_ids"][: len(seen[1])] == seen[1]
    assert first["labels"][len(seen[1]) - 1] == -100 != first["labels"][len(seen[1])]
    tokenizer = AutoTokenizer.from_pretrained(run.adapter)
    assert tokenizer.decode(seen[0]).startswith("<|im_start|>system\nsay yes<|im_end|>\n<|im_start|>user\nthe dogs<")


def test_what_is_shown_is_the_answer_and_comes_in_parts(run: RunDir) -> None:
    terminal = Terminal()
    (turn,) = terminal.chat(run.path, prompts=("one two",), use="base")
    assert terminal.shown == harmless(turn.answer) + "\n" * (not turn.answer.endswith("\n"))
    assert len(terminal.parts) > 3
    assert turn.tokens == NEW
    assert turn.ended == "length"
    assert f"cut off at {NEW} tokens" in terminal.said
    assert "tokens/s" in terminal.said


def test_an_answer_ends_with_the_turn(other: RunDir, answers: dict[str, str]) -> None:
    """The run learned short answers with their ends."""
    (turn,) = talk(other.path, prompts=("one two",), max_new_tokens=100)
    assert turn.ended == "end"
    assert turn.answer == answers["other"]
    assert turn.tokens < NEW


def test_the_end_of_a_turn_ends_an_answer_where_the_model_does_not_know_it(
    place: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = make_model(place / "ends", eos_token_id=0)
    make_tokenizer(folder, eos_token="<|endoftext|>")
    seen: list[list[int]] = []
    ends = module.Session.ends
    monkeypatch.setattr(module.Session, "ends", lambda *given: seen.append(ends(*given)) or seen[-1])
    talk(folder, prompts=("one",), max_new_tokens=1)
    assert AutoTokenizer.from_pretrained(folder).convert_ids_to_tokens(seen[0]) == ["<|endoftext|>", "<|im_end|>"]


def test_what_is_drawn_follows_from_the_seed(run: RunDir) -> None:
    def draw(seed: int) -> list[str]:
        return [t.answer for t in talk(run.path, prompts=("a", "a"), temperature=1.0, seed=seed, use="base")]

    assert draw(1) == draw(1)
    assert draw(1) != draw(2)


def test_bytes_of_a_character_are_held_back_until_it_is_whole(tiny_model: Path) -> None:
    tokenizer = AutoTokenizer.from_pretrained(tiny_model)
    parts: list[str] = []
    stream = _Stream(tokenizer, parts.append)
    text = "é 漢字 👩‍👧\nyes"
    ids = tokenizer(text, add_special_tokens=False)["input_ids"]
    assert len(ids) > len(text)
    stream.put(torch.tensor([[1, 2, 3]]))  # the prompt
    for token in ids[:-1]:
        stream.put(torch.tensor([token]))
    stream.put(torch.tensor([tokenizer.eos_token_id]))
    stream.end()
    assert "".join(parts) == stream.text == tokenizer.decode(ids[:-1])
    assert not any("\ufffd" in part for part in parts)


def test_no_control_character_reaches_the_terminal(
    run: RunDir, monkeypatch: pytest.MonkeyPatch, tiny_model: Path
) -> None:
    hostile = "\x1b]0;x\x07\x1b[2J a\rb\x9bc\u202ed"
    kept = "tab\tline\nnarrow\u00a0wide\u3000 👩\u200d👧 é"
    monkeypatch.setattr(_Stream, "_decoded", lambda stream: (hostile + kept)[: 5 * len(stream.ids)])
    terminal = Terminal("one")
    (turn,) = terminal.chat(run.path)
    assert turn.answer == (hostile + kept)[: 5 * turn.tokens]
    assert not set("\x1b\x07\r\x9b\u202e") & set(terminal.shown)
    assert terminal.shown.startswith(r"\x1b]0;x\x07\x1b[2J a\rb\x9bc\u202ed")
    assert harmless(kept) == kept


def test_compare_asks_every_model_and_keeps_nothing(run: RunDir, other: RunDir, answers: dict[str, str]) -> None:
    given = (("other", other.path),)
    terminal = Terminal("/compare one two", "one two", "/compare")
    turns = terminal.chat(run.path, adapters=given)
    assert [turn.model for turn in turns] == ["base", "adapter", "other", "adapter", "base", "adapter", "other"]
    assert [turn.answer for turn in turns] == [answers[turn.model] for turn in turns]
    after = talk(run.path, "/compare x", "one two", "/compare", "three", adapters=given)[-1]
    assert after.answer == talk(run.path, "one two", "three")[-1].answer
    empty = Terminal("/compare")
    assert empty.chat(run.path) == []
    assert "no prompt yet" in empty.said


def test_the_system_message_changes_and_turns_are_kept(run: RunDir, monkeypatch: pytest.MonkeyPatch) -> None:
    seen: list[list[dict[str, str]]] = []
    tokens = module.Session.tokens
    monkeypatch.setattr(module.Session, "tokens", lambda room, said: seen.append(said) or tokens(room, said))
    talk(run.path, "one", "/system say no", "two", "/system", "three", "/reset", "four", system="say yes")
    roles = [[message["role"] for message in said] for said in seen]
    assert roles == [
        ["system", "user"],
        ["system", "user", "assistant", "user"],
        ["user", "assistant", "user", "assistant", "user"],
        ["user"],
    ]
    assert [said[0]["content"] for said in seen[:2]] == ["say yes", "say no"]


def test_help_quit_slashes_and_mistakes(run: RunDir) -> None:
    terminal = Terminal("/help", "/rest", "/adapter adaptr", "", "  ", "//reset", "/quit", "not read")
    turns = terminal.chat(run.path)
    assert [turn.prompt for turn in turns] == ["/reset"]
    assert "/compare TEXT" in terminal.said
    assert terminal.said == Like("… /rest: … /reset")
    assert terminal.said == Like("… 'adaptr' … adapter")
    assert terminal.shown.count("\n") == turns[0].answer.rstrip("\n").count("\n") + 1


def interrupting(terminal: Terminal, after: int) -> Callable[[str], None]:
    """Shows like the terminal, and presses Ctrl-C after some parts."""

    def write(text: str) -> None:
        terminal.parts.append(text)
        if len(terminal.parts) == after:
            os.kill(os.getpid(), signal.SIGINT)

    return write


def test_ctrl_c_stops_an_answer_and_keeps_it(run: RunDir, monkeypatch: pytest.MonkeyPatch) -> None:
    seen: list[list[dict[str, str]]] = []
    tokens = module.Session.tokens
    monkeypatch.setattr(module.Session, "tokens", lambda room, said: seen.append(said) or tokens(room, said))
    terminal = Terminal("one two", "three")
    options = ChatOptions(str(run.path), max_new_tokens=40, use="base")
    before = signal.getsignal(signal.SIGINT)
    stopped, next_ = chat(options, Console(file=terminal.talk), terminal.read, interrupting(terminal, 3))
    assert signal.getsignal(signal.SIGINT) is before
    assert stopped.ended == "stopped"
    assert stopped.tokens < 40
    assert next_.ended != "stopped"
    assert seen[1] == [
        {"role": "user", "content": "one two"},
        {"role": "assistant", "content": stopped.answer.strip()},
        {"role": "user", "content": "three"},
    ]
    assert "stopped" in terminal.said


def test_ctrl_c_stops_a_comparison(run: RunDir) -> None:
    terminal = Terminal("/compare one two")
    options = ChatOptions(str(run.path), max_new_tokens=40)
    turns = chat(options, Console(file=terminal.talk), terminal.read, interrupting(terminal, 3))
    assert [(turn.model, turn.ended) for turn in turns] == [("base", "stopped")]


def test_ctrl_c_ends_a_chat_that_nobody_types_in(run: RunDir) -> None:
    terminal = Terminal()
    options = ChatOptions(str(run.path), prompts=("one two",), use="base")
    with pytest.raises(KeyboardInterrupt):
        chat(options, Console(file=terminal.talk), terminal.read, interrupting(terminal, 2))


def test_the_second_ctrl_c_at_the_prompt_leaves(run: RunDir) -> None:
    terminal = Terminal(KeyboardInterrupt(), "/help", KeyboardInterrupt(), KeyboardInterrupt(), "not read")
    assert terminal.chat(run.path) == []
    assert len(terminal.prompts) == 4
    assert "Ctrl-C once more" in terminal.said


def test_a_conversation_that_is_too_long_is_refused(run: RunDir) -> None:
    terminal = Terminal("one", "a cat " * 300, "two", "/compare " + "a cat " * 300)
    turns = terminal.chat(run.path)
    assert [turn.prompt for turn in turns] == ["one", "two"]
    assert terminal.said == Like("… tokens … 512 … /reset")
    assert turns == [
        dataclasses.replace(turn, seconds=old.seconds)
        for turn, old in zip(talk(run.path, "one", "two"), turns, strict=True)
    ]
    with pytest.raises(UsageError, match="takes 512"):
        talk(run.path, prompts=("a cat " * 300,))


def test_an_answer_ends_where_the_context_does(run: RunDir) -> None:
    tokenizer = AutoTokenizer.from_pretrained(run.adapter)
    prompt = "a" * (507 - len(tokenizer(typed(""), add_special_tokens=False)["input_ids"]))
    (turn,) = talk(run.path, prompts=(prompt,), use="base")
    assert len(tokenizer(typed(prompt), add_special_tokens=False)["input_ids"]) + turn.tokens <= 512
    assert turn.ended in ("length", "end")


def test_a_model_folder(run: RunDir, base: Path, other: RunDir, answers: dict[str, str]) -> None:
    assert [turn.answer for turn in talk(base, "one two")] == [answers["base"]]
    turns = talk(base, "/compare one two", adapters=(("red", run.path), ("other", other.adapter)))
    assert {turn.model: turn.answer for turn in turns} == {
        "model": answers["base"],
        "red": answers["adapter"],
        "other": answers["other"],
    }


def test_a_run_that_trained_in_full(place: Path, base: Path) -> None:
    full = trained(place, base, "full", lora=None, training={"learning_rate": 1e-3})
    terminal = Terminal("one two", "/base", "/adapter")
    (turn,) = terminal.chat(full.path)
    model = AutoModelForCausalLM.from_pretrained(full.model)
    assert turn.model == "trained"
    assert turn.answer == alone(model, AutoTokenizer.from_pretrained(full.model), typed("one two"))
    assert "no model 'base'" in terminal.said
    assert "* trained\n" in terminal.said
    with pytest.raises(UsageError, match="trained in full"):
        talk(full.path, adapters=(("x", full.path),))


def test_plain_text_is_continued_where_there_is_no_template(place: Path) -> None:
    folder = make_model(place / "plain")
    (folder / "chat_template.jinja").unlink()
    terminal = Terminal("one two", "three", "/system x")
    turns = terminal.chat(folder)
    model, tokenizer = AutoModelForCausalLM.from_pretrained(folder), AutoTokenizer.from_pretrained(folder)
    assert [turn.answer for turn in turns] == [
        alone(model, tokenizer, text, special=True) for text in ("one two", "three")
    ]
    assert terminal.said.count("has no chat") == 1
    assert "a system message" in terminal.said
    with pytest.raises(UsageError, match="system message"):
        talk(folder, system="x")


def test_a_run_on_plain_prompts_continues_them(place: Path, base: Path) -> None:
    rows = [{"prompt": f"{i} and", "completion": f" {i + 1}"} for i in range(8)]
    data = write_jsonl(place / "plain.jsonl", rows)
    run = trained(place, base, "completions", dataset={"train": [{"path": str(data)}]})
    terminal = Terminal("3 and")
    (turn,) = terminal.chat(run.path)
    model = AutoPeftModelForCausalLM.from_pretrained(run.adapter).eval()
    assert turn.answer == alone(model, AutoTokenizer.from_pretrained(run.adapter), "3 and", special=True)
    assert "plain prompts" in terminal.said


def test_answers_end_as_in_training_where_the_template_has_no_ends(place: Path, base: Path) -> None:
    file = place / "endless.jinja"
    file.write_text(
        "{% for m in messages %}{{ m['role'] + ': ' + m['content'] + '\n' }}{% endfor %}"
        "{% if add_generation_prompt %}{{ 'assistant: ' }}{% endif %}"
    )
    run = trained(place, base, "endless", model={"chat_template": str(file)})
    first, second = talk(run.path, "one", "two", use="base")
    model, tokenizer = AutoModelForCausalLM.from_pretrained(base), AutoTokenizer.from_pretrained(run.adapter)
    text = f"user: one\nassistant: {first.answer.strip()}<|im_end|>\nuser: two\nassistant: "
    assert second.answer == alone(model, tokenizer, text)


def test_a_template_that_refuses_a_conversation_is_one_line(place: Path) -> None:
    folder = make_model(place / "strict")
    make_tokenizer(
        folder, "{% if messages[0]['role'] == 'system' %}{{ raise_exception('no system here') }}{% endif %}" + CHATML
    )
    terminal = Terminal("/system x", "one", "/system")
    turns = terminal.chat(folder)
    assert [turn.prompt for turn in turns] == ["one"]
    assert terminal.said == Like("… refuses … no system here")
    with pytest.raises(DataError, match="no system here"):
        talk(folder, prompts=("one",), system="x")


def test_a_system_message_that_the_template_leaves_out_is_told(place: Path) -> None:
    folder = make_model(place / "deaf")
    make_tokenizer(
        folder, "{% for m in messages if m['role'] != 'system' %}{{ m['content'] + '<|im_end|>' }}{% endfor %}"
    )
    terminal = Terminal("/system no", "one")
    terminal.chat(folder)
    assert terminal.said == Like("… leaves out … system")


def test_bytes_that_are_no_text_are_refused(run: RunDir) -> None:
    with pytest.raises(DataError, match="no UTF-8"):
        talk(run.path, prompts=("a\udcff",))


def refusals() -> Iterator[tuple[str, dict[str, Any], type[LorafitError], str]]:
    yield "RUN", {"temperature": float("nan")}, UsageError, "number from 0"
    yield "RUN", {"use": "bas"}, UsageError, r"'bas'.*\bbase\b"
    yield "BASE", {"use": "base"}, UsageError, "no model 'base'.* model"
    yield "PLAIN", {"prompts": ("",)}, UsageError, "prompt .*empty"
    yield "RUN", {"adapters": (("base", Path("x")),)}, UsageError, "is taken"
    yield "RUN", {"adapters": (("x", Path("nowhere")),)}, UsageError, "nowhere"
    yield "BASE", {"adapters": (("x", Path("nowhere")),)}, UsageError, "no adapter"
    yield "OTHER", {"adapters": (("x", Path("RUN")),)}, ModelError, "base .*tiny.* .*another"
    yield "PLACE/rad", {}, UsageError, r"rad: .*\bred\b"
    yield "PLACE", {}, UsageError, "no run .* and no model"
    yield "RUN/adapter", {}, UsageError, "is an adapter"
    yield "nobody/nothing", {}, ModelError, "nobody/nothing: .*tokenizer"


@pytest.mark.parametrize(("path", "options", "kind", "text"), list(refusals()))
def test_mistakes_are_one_clear_line(
    path: str, options: dict[str, Any], kind: type[LorafitError], text: str, place: Path, base: Path, run: RunDir
) -> None:
    if path == "OTHER":
        make_model(place / "another", seed=3)
    if path == "PLAIN":
        (make_model(place / "untemplated") / "chat_template.jinja").unlink()
    places = {"RUN": run.path, "BASE": base, "OTHER": place / "another", "PLAIN": place / "untemplated", "PLACE": place}
    for name, real in places.items():
        path = path.replace(name, str(real)) if path.startswith(name) else path
    options = options | {"adapters": tuple((n, places.get(str(p), p)) for n, p in options.get("adapters", ()))}
    with pytest.raises(kind, match=text) as caught:
        talk(path, **{"prompts": ("one",)} | options)
    assert "\n" not in str(caught.value)


def test_an_unfinished_run_is_refused(run: RunDir, tmp_path: Path) -> None:
    for name in ("plan.json", SEAL):
        (tmp_path / name).write_bytes((run.path / name).read_bytes())
    with pytest.raises(UsageError, match="not finished"):
        talk(tmp_path, prompts=("one",))


def test_a_chat_is_in_no_other_commands_way(run: RunDir) -> None:
    held: list[bool] = []

    def write(_: str) -> None:
        with run.lock():
            held.append(True)

    chat(ChatOptions(str(run.path), prompts=("one",), max_new_tokens=2), Console(quiet=True), input, write)
    assert held


class _Pipe(io.StringIO):
    def __init__(self, text: str, is_terminal: bool) -> None:
        super().__init__(text)
        self.is_terminal = is_terminal

    def isatty(self) -> bool:
        return self.is_terminal


def test_a_pipe_is_one_prompt() -> None:
    assert from_stdin(_Pipe("one\ntwo\n", False)) == ("one\ntwo",)
    assert from_stdin(_Pipe("one\ntwo\n", True)) == ()
    with pytest.raises(UsageError, match="stdin: is empty"):
        from_stdin(_Pipe("\n", False))
    with pytest.raises(UsageError, match="no UTF-8"):
        from_stdin(io.TextIOWrapper(io.BytesIO(b"\xff"), encoding="utf-8"))
