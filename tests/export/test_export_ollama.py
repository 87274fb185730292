"""Modelfiles: their Go templates render what the chat template renders, or they say why not."""

from __future__ import annotations

import re
from typing import Any

import jinja2
import pytest

from lorafit.export import ollama as go_template
from lorafit.export.ollama import Modelfile, modelfile
from lorafit.facts.template import trl_templates

SPECIAL: dict[str, str | None] = {"bos_token": "<s>", "eos_token": "</s>", "unk_token": None}

CHATML = (
    "{% for m in messages %}{{ '<|im_start|>' + m['role'] + '\n' + m['content'] + '<|im_end|>' + '\n' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
)
WITH_DEFAULT = (
    "{% if messages[0]['role'] != 'system' %}{{ '<|im_start|>system\nYou help.<|im_end|>\n' }}{% endif %}" + CHATML
)
ZEPHYR = (
    "{% for m in messages %}{{ '<|' + m['role'] + '|>\n' + m['content'] + eos_token + '\n' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|assistant|>\n' }}{% endif %}"
)
MISTRAL = (
    "{{ bos_token }}{% if messages[0]['role'] == 'system' %}{% set system = messages[0]['content'] %}"
    "{% set messages = messages[1:] %}{% endif %}{% for m in messages %}{% if m['role'] == 'user' %}"
    "{% if loop.last and system is defined %}{{ '[INST] ' + system + '\n\n' + m['content'] + '[/INST]' }}"
    "{% else %}{{ '[INST] ' + m['content'] + '[/INST]' }}{% endif %}"
    "{% else %}{{ ' ' + m['content'] + eos_token }}{% endif %}{% endfor %}"
)
LLAMA2 = (
    "{% if messages[0]['role'] == 'system' %}{% set system = '<<SYS>>\n' + messages[0]['content'] + '\n<</SYS>>\n\n' %}"
    "{% set messages = messages[1:] %}{% else %}{% set system = '' %}{% endif %}{% for m in messages %}"
    "{% if m['role'] == 'user' %}{{ bos_token + '[INST] ' + (system if loop.first else '') }}"
    "{{ m['content'] + ' [/INST]' }}"
    "{% else %}{{ ' ' + m['content'] + ' ' + eos_token }}{% endif %}{% endfor %}"
)
NUMBERED = "{% for m in messages %}{{ loop.index ~ '/' ~ m['role'] ~ ': ' ~ m['content'] ~ '\n' }}{% endfor %}"
DATED = "{{ strftime_now('%d %b %Y') }}" + CHATML


def parts(made: Modelfile) -> tuple[str, str | None]:
    template = re.search(r'^TEMPLATE """(.*?)"""$', made.text, re.S | re.M)
    system = re.search(r'^SYSTEM """(.*?)"""$', made.text, re.S | re.M)
    assert template
    return template[1], system[1] if system else None


def ask(made: Modelfile, messages: list[tuple[str, str]]) -> str:
    """What Ollama's rules make of a Modelfile and a request."""
    template, system = parts(made)
    if system is not None and messages[0][0] != "system":
        messages = [("system", system), *messages]
    listed = [{"Role": role, "Content": text} for role, text in messages]
    return go_template.render(
        template, {"System": "\n\n".join(text for role, text in messages if role == "system"), "Messages": listed}
    )


def expect(source: str, messages: list[tuple[str, str]]) -> str:
    text: Any = (
        jinja2.Environment(trim_blocks=True, lstrip_blocks=True)
        .from_string(source)
        .render(
            messages=[{"role": role, "content": text} for role, text in messages], add_generation_prompt=True, **SPECIAL
        )
    )
    return str(text).removeprefix("<s>")


TALK = [("user", "Why?"), ("assistant", "Because."), ("user", "I see {{ x }}."), ("assistant", "Good"), ("user", "Bye")]


@pytest.mark.parametrize(
    ("source", "default"),
    [
        (CHATML, None),
        (WITH_DEFAULT, "You help."),
        (ZEPHYR, None),
        (MISTRAL, None),
        (LLAMA2, None),
        (trl_templates()["phi3"].read_text(), None),
        (trl_templates()["llama3"].read_text(), None),
        (
            trl_templates()["qwen2_5"].read_text(),
            "You are Qwen, created by Alibaba Cloud. You are a helpful assistant.",
        ),
    ],
    ids=["chatml", "default system", "zephyr", "mistral", "llama2", "phi3", "llama3", "qwen2.5"],
)
def test_it_renders_what_the_chat_template_renders(source: str, default: str | None) -> None:
    made = modelfile(source, SPECIAL, "model.gguf", ["<end>"])
    assert parts(made)[1] == default
    for length in (1, 3, 5):
        for messages in (TALK[:length], [("system", "Be short."), *TALK[:length]]):
            if source is LLAMA2 and length > 1:
                continue  # its beginning token stands before every turn: looked at below
            assert ask(made, messages) == expect(source, messages)


def test_a_system_message_in_the_first_question() -> None:
    made = modelfile(trl_templates()["gemma3"].read_text(), {"bos_token": "<bos>"}, "m.gguf", [])
    assert ask(made, [("system", "Be short."), ("user", "Hi"), ("assistant", "Yes"), ("user", "Bye")]) == (
        "<start_of_turn>user\nBe short.\n\nHi<end_of_turn>\n<start_of_turn>model\nYes<end_of_turn>\n"
        "<start_of_turn>user\nBye<end_of_turn>\n<start_of_turn>model\n"
    )


def test_the_beginning_is_written_once() -> None:
    source = "{{ bos_token }}" + CHATML
    template, _ = parts(modelfile(source, SPECIAL, "m.gguf", []))
    assert "<s>" not in template  # the tokenizer adds it
    template, _ = parts(modelfile(source, SPECIAL, "m.gguf", [], adds_bos=False))
    assert template.startswith("<s>") or "{{ if not .System }}<s>" in template
    made = modelfile(LLAMA2, SPECIAL, "m.gguf", [])
    assert ask(made, TALK[:3]) == expect(LLAMA2, TALK[:3])


def test_what_else_it_says() -> None:
    made = modelfile(CHATML, SPECIAL, "my model.gguf", ["<|im_end|>", 'a"b', "<|im_end|>"])
    lines = made.text.splitlines()
    assert lines[0] == "FROM ./my model.gguf"
    assert lines[-2:] == ['PARAMETER stop "<|im_end|>"', 'PARAMETER stop """a"b"""']
    assert made.remark is None


def test_a_template_that_trims_is_told() -> None:
    made = modelfile(trl_templates()["gemma"].read_text(), {"bos_token": "<bos>"}, "m.gguf", [])
    assert "TEMPLATE" in made.text
    assert made.remark is not None
    assert "strips" in made.remark


@pytest.mark.parametrize(
    ("source", "why"),
    [(NUMBERED, "chat template"), (DATED, "date"), ("{{ messages[0]['nothing'].x.y }}", "fails"), ("{% if", "fails")],
)
def test_without_a_template_it_says_why(source: str, why: str) -> None:
    made = modelfile(source, SPECIAL, "m.gguf", ["<end>"])
    assert "TEMPLATE" not in made.text
    assert "SYSTEM" not in made.text
    assert 'PARAMETER stop "<end>"' in made.text
    assert made.remark is not None
    assert why in made.remark
    assert "\n" not in made.remark


def test_every_template_that_trl_ships_is_answered() -> None:
    made = {name: modelfile(file.read_text(), SPECIAL, "m.gguf", []) for name, file in trl_templates().items()}
    without = {name for name, one in made.items() if "TEMPLATE" not in one.text}
    assert all(made[name].remark for name in without)
    assert not without & {"llama3", "llama3_1", "qwen2_5", "qwen3", "gemma", "gemma3", "phi3", "cohere"}


def test_the_renderer_refuses_what_it_does_not_know() -> None:
    for template in ("{{ frobnicate .A }}", "{{ end }}", "{{ if .System }}", "{{ else }}", "{{ .Content }}"):
        with pytest.raises(ValueError, match=r"."):
            go_template.render(template, {"System": ""})
    assert (
        go_template.render('{{ if not .System }}{{ "{{" }}{% if %}{{ else }}3{{ end }}', {"System": ""}) == "{{{% if %}"
    )
