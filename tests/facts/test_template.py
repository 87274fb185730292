"""What a chat template does with an answer, told without transformers as transformers does it."""

from __future__ import annotations

from pathlib import Path

import pytest

from lorafit.facts.template import in_parts, inspect_template, training_version

SPECIAL: dict[str, str | None] = {"eos_token": "</s>", "bos_token": "<s>", "pad_token": None}
CHATML = (
    "{% for m in messages %}{{ '<|im_start|>' + m['role'] + '\n' + m['content'] + '<|im_end|>' + '\n' }}{% endfor %}"
)


@pytest.mark.parametrize(
    ("template", "end"),
    [
        (CHATML, "<|im_end|>"),
        ("{% for m in messages %}[{{ m.content }}]{{ eos_token }}{% endfor %}", "]</s>"),
        ("{% for m in messages %}{{ m.content + '\n' }}{% endfor %}", ""),
        ("{% for m in messages %}{{ m.content }}{% if not loop.last %}{{ eos_token }}{% endif %}{% endfor %}", ""),
        ("{% for m in messages %}{% generation %}{{ m.content }}<end>{% endgeneration %}{% endfor %}", "<end>"),
        ("{% for m in messages %}{% if loop.index > 5 %}{% break %}{% endif %}{{ m.content }}!{% endfor %}", "!"),
        ("{% set ns = namespace(a='') %}{% for m in messages %}{% set ns.a = m.content %}{% endfor %}{{ ns.a }}.", "."),
        ("{{ messages | tojson }}", '"}]'),
        ("{{ strftime_now('%Y') }}{{ messages[1]['content'] }}?", "?"),
        ("nothing of the answer", None),
        ("{{ raise_exception('no') }}", None),
        ("{% for m in messages %}", None),
        ("{{ messages[7].content.x }}", None),
        ("{{ 1 / 0 }}", None),
        ("{% for a in range(10 ** 12) %}x{% endfor %}", None),
        ("{{ messages.append(1) }}", None),
        ("{{ ''.__class__.__mro__ }}", None),
    ],
)
def test_what_follows_an_answer(template: str, end: str | None) -> None:
    assert inspect_template(template, SPECIAL).end_of_turn == end


@pytest.mark.parametrize(
    ("template", "marked"),
    [
        ("{% generation %}x{% endgeneration %}", True),
        ("{%- generation -%}x{%- endgeneration -%}", True),
        ("{{ generation }}", False),
        (CHATML, False),
    ],
)
def test_markers(template: str, marked: bool) -> None:
    assert inspect_template(template, SPECIAL).marks_answers is marked


def test_as_transformers_renders() -> None:
    """The same text after the answer for every template that TRL ships."""
    import trl
    from transformers.utils.chat_template_utils import render_jinja_template

    folder = Path(trl.__file__).parent / "chat_templates"
    messages = [{"role": "user", "content": "probe"}, {"role": "assistant", "content": "ANSWER"}]
    told = 0
    for file in sorted(folder.glob("*.jinja")):
        template = file.read_text(encoding="utf-8")
        special = {key: value for key, value in SPECIAL.items() if value is not None}
        try:
            written = training_version(template) or template
            rendered, _ = render_jinja_template([messages], chat_template=written, **special)
        except Exception:  # noqa: BLE001 - wants other messages
            continue
        _, found, after = rendered[0].partition("ANSWER")
        if not found:
            rendered, _ = render_jinja_template([in_parts(messages)], chat_template=written, **special)
            _, found, after = rendered[0].partition("ANSWER")
        expected = after.strip() if found else None
        assert inspect_template(template, SPECIAL).end_of_turn == expected, file.name
        told += 1
    assert told > 10


def test_training_versions_are_trls() -> None:
    import trl

    folder = Path(trl.__file__).parent / "chat_templates"
    originals = [folder / f.name.replace("_training", "") for f in folder.glob("*_training.jinja")]
    originals = [file for file in originals if file.is_file()]
    assert originals
    for file in originals:
        assert inspect_template(file.read_text(encoding="utf-8"), SPECIAL).has_training_version
    assert not inspect_template(CHATML, SPECIAL).has_training_version
