"""Random and mutated recipes: a Recipe or a RecipeError, never another exception, never slow."""

from __future__ import annotations

import json
import os
import random
import time
from pathlib import Path
from typing import Any

import pytest

from lorafit.recipe import Recipe, RecipeError
from lorafit.recipe.load import sections

DOCUMENTS = int(os.environ.get("LORAFIT_FUZZ_DOCUMENTS", "2500"))
SEED = int(os.environ.get("LORAFIT_FUZZ_SEED", "1"))
SLOW = 2.0  # seconds a document

SMALL = """\
model: {name_or_path: a/b, dtype: auto}
lora:
  r: 8
  target_modules: [q_proj, v_proj]
dataset:
  train:
    - path: rows.jsonl
      columns: {output: answer}
  validation: 0.1
training:
  learning_rate: 1e-4
  eval_strategy: no
"""
CHILD = """\
extends: [base.yaml, "${LORAFIT_FUZZ_PARENT:-base.yaml}"]
lora: &lora
  use_dora: true # a comment
  rank_pattern: {? q_proj : 4}
quantization:
  load_in_4bit: yes
  bnb_4bit_quant_type: 'nf4'
dataset:
  validation:
  - {path: "held\\tout.jsonl", format: text}
output_dir: >-
  runs/
  one
"""
PARENT = """\
model:
  name_or_path: ${LORAFIT_FUZZ_MODEL:-a/b}
  revision: ~
training: &training
  <<: {seed: 1}
  optim: adamw_torch
  report_to: []
dataset:
  train:
  - path: é.jsonl
"""
RECIPES = (SMALL, CHILD, PARENT)
TOKENS = (
    *"&*!|>'\"%@`[]{},:?-#~<=\\\n\r\t\0\x07\x1b\x85\xa0\u2028\ufeff\ud7ff😀ß",
    *("&a ", "*a", "*a ", "&a [*a]", "<<: *lora\n", "<<: {r: 1}\n", "<<: [*a, *a]\n"),
    *("!!int ", "!!str ", "!!python/object:os.system ", "!<x%0A> ", "!foo "),
    *("|\n", ">-\n  ", "|2+\n", "---\n", "...\n", "--- ", "%YAML 1.1\n---\n", "%TAG ! x\n", "\r\n"),
    *("? ", ": ", "- ", "\n  ", "\n    - ", "{}", "[]", "[[", "{{"),
    *("null", "no", ".nan", "-.inf", "1e999", "1e-4", "0x" + "f" * 40, "9" * 5000, "0o17", "1_000"),
    *("${HOME}", "${NOT_SET_ANYWHERE}", '"${A:-1}"', "${A:-}", "'${A}'"),
    *('"\\ud800"', '"\\UFFFFFFFF"', '"\\0"', '"a\\nb"'),
    *("extends: base.yaml\n", "extends: [small.yaml, base.yaml]\n", "extends: case.yaml\n", "lr: 1\n"),
)
KEYS = sorted({name for _, section in sections() for name in section.model_fields} | {"extends", "lr", "rr", "", "<<"})
SCALARS: tuple[Any, ...] = (
    *(None, True, False, 0, 1, -1, 0.5, 1e-4, 1e400, -0.0, float("nan"), 2**31, 2**64, 10**400, "", " ", "auto", "no"),
    *("steps", "nf4", "text", "all-linear", "pissa_niter_4", "base.yaml", "case.yaml", "a\nb", "é"),
    *("x" * 500, "\x1b[31m", "${HOME}", "${A:-3}", "${", "~", "tuple[Source, ...]", "float", "\ud800", "\0"),
)


def mutated(rng: random.Random) -> bytes:
    """A valid recipe with a few random injuries."""
    text = rng.choice(RECIPES)
    for _ in range(rng.choice((1, 1, 2, 3, 8))):
        kind = rng.randrange(7)
        here, there = (rng.randrange(len(text) + 1) for _ in range(2))
        lines = text.splitlines(keepends=True)
        if kind == 0:
            text = text[:here] + text[here + rng.randrange(1, 6) :]
        elif kind == 1:
            text = text[:here] + text[min(here, there) : min(here, there) + rng.randrange(1, 40)] + text[here:]
        elif kind == 2 and lines:
            one, other = rng.randrange(len(lines)), rng.randrange(len(lines))
            lines[one], lines[other] = lines[other], lines[one]
            text = "".join(lines)
        elif kind == 3 and lines:
            lines.insert(rng.randrange(len(lines)), rng.choice(rng.choice(RECIPES).splitlines(keepends=True)))
            text = "".join(lines)
        elif kind == 4:
            text = text[:here] + rng.choice(TOKENS) + text[here:]
        else:
            text = text[:here] + rng.choice(TOKENS) + text[here + rng.randrange(3) :]
    data = bytearray(text.encode("utf-8", "surrogatepass"))
    if rng.random() < 0.2:
        for _ in range(rng.randrange(1, 4)):
            data[rng.randrange(len(data))] ^= 1 << rng.randrange(8)
    return bytes(data)


def random_value(rng: random.Random, depth: int) -> Any:
    roll = rng.random()
    if depth <= 0 or roll < 0.5:
        return rng.choice(SCALARS)
    if roll < 0.75:
        return [random_value(rng, depth - 1) for _ in range(rng.randrange(4))]
    return {rng.choice(KEYS): random_value(rng, depth - 1) for _ in range(rng.randrange(4))}


def whole_recipe() -> dict[str, Any]:
    """Every field of every section with its default, where that is not null."""
    document: dict[str, Any] = {}
    for where, section in sections():
        target = document
        for name in where:
            target = target.setdefault(name, {})
        for name, field in section.model_fields.items():
            default = None if field.is_required() else field.get_default(call_default_factory=True)
            if isinstance(default, str | int | float | dict):
                target[name] = default
    document["model"]["name_or_path"] = "a/b"
    document["dataset"] |= {"train": [{"path": "rows.jsonl"}], "validation": 0.1}
    document["quantization"] = {"load_in_4bit": True}
    document["hardware"] = {"gpu": "RTX 4090", "vram": "24GiB"}
    document["eval"] |= {
        "sets": [{"name": "own", "path": "own.jsonl"}],
        "lm_eval": document["eval"]["lm_eval"] | {"tasks": ["task"]},
        "judge": document["eval"]["judge"] | {"base_url": "http://localhost/v1", "model": "judge"},
    }
    return document


def structured(rng: random.Random) -> bytes:
    """Known keys in their places, some with random values."""
    document = whole_recipe()
    for _ in range(rng.choice((1, 1, 1, 2, 4, 20))):
        where, section = rng.choice(sections())
        target: Any = document
        for step in where:
            target = target.get(step) if isinstance(target, dict) else None
            target = target[0] if isinstance(target, list) and target else target
        if not isinstance(target, dict):
            continue
        name = rng.choice((*section.model_fields, *section.model_fields, rng.choice(KEYS)))
        if rng.random() < 0.2:
            target.pop(name, None)
        elif rng.random() < 0.3:
            target[name] = rng.choice((1, 2, 0.5, True, False, "auto", "text", "steps", ["q_proj"], {"q_proj": 4}))
        else:
            target[name] = random_value(rng, rng.randrange(4))
    # JSON is YAML, but for NaN, Infinity and surrogates, which are then interesting texts.
    text = json.dumps(document, indent=rng.choice((None, 1)), ensure_ascii=rng.random() < 0.5)
    return text.encode("utf-8", "replace")


def random_override(rng: random.Random) -> str:
    where, section = rng.choice(sections())
    steps = [*where, rng.choice(list(section.model_fields))]
    for _ in range(rng.choice((0, 0, 0, 1, 2))):
        steps.insert(rng.randrange(len(steps) + 1), rng.choice((*KEYS, "0", "1", "-1")))
    text = f"{'.'.join(steps)}={rng.choice((*TOKENS, *map(str, SCALARS)))}"
    if rng.random() < 0.3:
        here = rng.randrange(len(text) + 1)
        text = text[:here] + rng.choice(TOKENS) + text[here + rng.randrange(2) :]
    return text


def check(path: Path, overrides: list[str]) -> bool:
    """Load it; whether it is a recipe."""
    start = time.perf_counter()
    wrong = None
    try:
        json.dumps(Recipe.load(path, overrides).resolved())
    except RecipeError as error:
        wrong = error
    assert time.perf_counter() - start < SLOW
    if wrong is not None:
        assert wrong.mistakes
        for mistake in wrong.mistakes:
            line = str(mistake)
            assert line
            assert line.isprintable()  # so it is one line, and can be encoded
            assert mistake.message.isprintable()
            assert len(line) < 1500
    return wrong is None


@pytest.fixture
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    (tmp_path / "base.yaml").write_text(PARENT, encoding="utf-8")
    (tmp_path / "small.yaml").write_text(SMALL, encoding="utf-8")
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("HOME", "home")
    return tmp_path


@pytest.mark.parametrize("make", [mutated, structured])
def test_any_document_is_a_recipe_or_a_recipe_error(make: Any, folder: Path) -> None:
    path = folder / "case.yaml"
    accepted = 0
    count = DOCUMENTS * 2 // 3 if make is mutated else DOCUMENTS // 3
    for number in range(count):
        rng = random.Random(f"{SEED} {number}")
        data = make(rng)
        path.write_bytes(data)
        overrides = [random_override(rng) for _ in range(rng.choice((0, 0, 0, 1, 2)))]
        try:
            accepted += check(path, overrides)
        except Exception as error:
            raise AssertionError(f"document {number} of seed {SEED}: {data!r} with {overrides!r}") from error
    assert 0.005 * count < accepted < 0.9 * count, "the documents are all wrong, or all right"


def test_any_override_is_applied_or_a_recipe_error(folder: Path) -> None:
    path = folder / "small.yaml"
    accepted = 0
    for number in range(DOCUMENTS // 10):
        overrides = [random_override(random.Random(f"{SEED} {number}"))]
        try:
            accepted += check(path, overrides)
        except Exception as error:
            raise AssertionError(f"override {number} of seed {SEED}: {overrides!r}") from error
    assert accepted
