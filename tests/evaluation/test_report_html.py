"""report.html as a file: what is in it, and that foreign text stays text."""

from __future__ import annotations

import json
import math
import random
import re
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import pytest

from lorafit.evaluation.report.charts import learning_curves
from lorafit.evaluation.report.html import Training, as_json, shares, write_html
from lorafit.evaluation.report.text import change, interval, quantity, state_of, visible
from lorafit.evaluation.results import Answer, Difference, Figure, Gate, Metric, Model, Results, Sample, Set, Speed

LOSS = Metric(name="loss", label="loss", unit="nats", better="lower")
EXACT = Metric(name="exact_match", label="exact match", unit="share", better="higher")
F1 = Metric(name="token_f1", label="token F1", unit="share", better="higher")
LENGTH = Metric(name="length", label="length of the answer", unit="tokens", better=None)
BITS = Metric(name="bits_per_byte", label="bits per byte", unit="bits", better="lower")
PERPLEXITY = Metric(name="perplexity", label="perplexity", unit="number", better="lower")

MODELS = ("base", "adapter", "merged")
FIGURES: dict[tuple[str, Metric], tuple[tuple[float, float], ...]] = {
    ("heldout", LOSS): ((3.2134, 0.11), (0.0038, 0.0006), (0.0038, 0.0006)),
    ("heldout", PERPLEXITY): ((24.86, 2.9), (1.0038, 0.0006), (1.0038, 0.0006)),
    ("heldout", EXACT): ((0.0, 0.0), (0.95, 0.055), (0.9333, 0.06)),
    ("heldout", F1): ((0.134, 0.031), (0.981, 0.016), (0.977, 0.018)),
    ("heldout", LENGTH): ((61.4, 2.2), (17.1, 0.3), (17.1, 0.3)),
    ("general", BITS): ((0.9127, 0.042), (0.9561, 0.046), (0.9561, 0.046)),
    ("general", LOSS): ((2.871, 0.13), (3.004, 0.14), (3.004, 0.14)),
    ("chat", BITS): ((0.6022, 0.061), (0.6109, 0.065), (0.6108, 0.065)),
    ("chat", LENGTH): ((58.9, 4.1), (31.4, 5.2), (31.6, 5.2)),
}
CLEAR = {("general", "bits_per_byte"), ("general", "loss"), ("chat", "length")}
HOSTILE = (
    "</script><script>document.title='ran'</script><img src=x onerror=\"document.title='ran';alert(1)\">"
    "<!--<script>\"'&amp; \x00\x1b[31m \u202egnp.exe \u2028"
)


def differences() -> tuple[Difference, ...]:
    made = []
    for (set_name, metric), values in FIGURES.items():
        for model, against in ((1, 0), (2, 0), (2, 1)):
            value = values[model][0] - values[against][0]
            clear = against == 0 and (set_name == "heldout" or (set_name, metric.name) in CLEAR)
            half = abs(value) * 0.05 if clear else max(abs(value) * 2.5, values[0][1] * 0.3)
            rows = 60 if set_name == "heldout" else 40
            worse = metric.better == "lower" and value > 0
            wins = (2 if worse else rows - 3) if clear else rows // 4
            losses = rows - wins if clear else rows // 5
            made.append(
                Difference(
                    set=set_name,
                    metric=metric.name,
                    model=MODELS[model],
                    against=MODELS[against],
                    value=value,
                    low=value - half,
                    high=value + half,
                    wins=wins,
                    ties=rows - wins - losses,
                    losses=losses,
                    detectable=half * 1.4,
                )
            )
    return tuple(made)


def example_results(**changed: Any) -> Results:
    """An evaluation with numbers that are made up."""

    def of(name: str) -> tuple[Metric, ...]:
        return tuple(metric for set_name, metric in FIGURES if set_name == name)

    figures = {
        f"{set_name}.{metric.name}.{model}": Figure(
            value=value,
            low=max(value - half, 0.0) if metric.unit == "share" else value - half,
            high=min(value + half, 1.0) if metric.unit == "share" else value + half,
            rows=60 if set_name == "heldout" else 40,
        )
        for (set_name, metric), values in FIGURES.items()
        for model, (value, half) in zip(MODELS, values, strict=True)
    }
    content = {
        "run": "runs/tickets",
        "name": "tickets-135m",
        "created": "2030-03-04T15:06:07+00:00",
        "versions": {"lorafit": "0.1.0", "torch": "2.13.0+cpu", "transformers": "5.23.0", "peft": "0.21.2"},
        "hardware": {"device": "cpu", "name": "AMD EPYC", "memory_bytes": 25276510208, "world_size": 1},
        "settings": {"seed": 0, "decoding": "greedy", "eval": {"max_new_tokens": 64, "limit": None}},
        "models": {
            "base": Model(
                kind="base",
                path="models/SmolLM2-135M-Instruct",
                sha256="ba13b7f4d3f1faf87bd46e5e336a173d",
                quantization="nf4",
                dtype="bfloat16",
                seconds=81.2,
            ),
            "adapter": Model(
                kind="adapter",
                path="runs/tickets/adapter",
                sha256="0fa1bc7e99d1",
                quantization="nf4",
                dtype="bfloat16",
                seconds=64.9,
            ),
            "merged": Model(
                kind="merged",
                path="runs/tickets/merged",
                sha256=None,
                quantization=None,
                dtype="float32",
                seconds=58.3,
            ),
        },
        "sets": {
            "heldout": Set(
                role="task",
                source="data/quickstart/heldout.jsonl",
                rows=60,
                answered=60,
                metrics=of("heldout"),
            ),
            "general": Set(
                role="forgetting", source="texts that ship with lorafit", rows=40, answered=0, metrics=of("general")
            ),
            "chat": Set(
                role="forgetting", source="questions that ship with lorafit", rows=40, answered=40, metrics=of("chat")
            ),
        },
        "figures": figures,
        "differences": differences(),
        "gates": (
            Gate(
                gate="heldout.exact_match.adapter >= 90%",
                where="eval.gates.0",
                passed=True,
                sentence="heldout.exact_match.adapter is 95.0%, and 90% was demanded",
            ),
            Gate(
                gate="heldout.loss.adapter < heldout.loss.base (ci)",
                where="eval.gates.1",
                passed=True,
                sentence="heldout.loss.adapter is 0.0038 and heldout.loss.base is 3.2134; the whole interval holds",
            ),
            Gate(
                gate="general.bits_per_byte.adapter <= general.bits_per_byte.base * 1.02",
                where="eval.gates.2",
                passed=False,
                sentence="general.bits_per_byte.adapter is 0.9561, and at most 0.9310 was demanded",
            ),
            Gate(
                gate="heldout.exact_match.merged >= baseline.heldout.exact_match.merged",
                where="--baseline",
                passed=False,
                sentence="heldout.exact_match.merged is 93.3%, and 96.7% was demanded",
            ),
        ),
        "speed": tuple(
            Speed(model=model, set="heldout", tokens_per_second=speed, latency_median=1.42, latency_p95=2.9)
            for model, speed in (("base", 118.4), ("adapter", 101.7), ("merged", 122.0))
        ),
        "remarks": ("4 of 60 held-out rows have a prompt that is in the training rows too; they are counted.",),
        "files": {"samples": "samples.jsonl", "html": "report.html"},
    }
    return Results(**(content | changed))


WRITTEN = (
    "please close my account and erase my data. order: {}. i need a reply right away. - idris",
    "We dont need the mixer after all, can we return it? (my order: {})",
    "This is about order {}. Please deliver the mixer to my neighbours address.",
    "The lamp of order {} flickers, and the plug is warm. Is that safe?",
)
KIND = ("account", "return", "delivery", "defect")


def example_samples() -> list[Sample]:
    rng = random.Random(0)
    made = []
    for row in range(60):
        order, kind = rng.randrange(1000, 9999), row % 4
        expected = json.dumps(
            {"category": KIND[kind], "priority": "high" if kind == 0 else "low", "order": str(order)}
        ).replace(" ", "")
        right = row % 20 != 3
        adapter = expected if right else expected.replace("low", "high").replace("defect", "delivery")
        base = f"I'm sorry to hear that. To help you with order {order}, I need some more information about it. " * 3
        if row == 1:
            base = HOSTILE
        answers = {
            name: Answer(
                text=text,
                ended=name != "base" or row % 3 > 0,
                scores={
                    "exact_match": float(text == expected),
                    "token_f1": score,
                    "loss": 0.0038 if score > 0.5 else 3.2,
                },
            )
            for name, text, score in (("base", base, 0.13), ("adapter", adapter, 0.98), ("merged", adapter, 0.98))
        }
        prompt = WRITTEN[kind].format(order)
        made.append(
            Sample(
                set="heldout",
                row=row,
                place=f"data/quickstart/heldout.jsonl:{row + 1}",
                prompt=prompt,
                expected=expected,
                answers=answers,
            )
        )
    for row in range(3):
        text = ("متى تصل الطلبية؟ order 12", "Der Mixer ist da.\tDanke!\r\nGruß", "word " * 300)[row]
        made.append(
            Sample(
                set="chat",
                row=row,
                place=f"chat:{row + 1}",
                prompt=text,
                expected="I am happy to help you with the order today.",
                answers={
                    name: Answer(text="I am glad to help you with your order.", ended=True, scores={"length": 9.0})
                    for name in MODELS
                },
            )
        )
    return made


def example_metrics() -> list[dict[str, Any]]:
    lines: list[dict[str, Any]] = []
    rng = random.Random(1)
    for step in range(1, 77):
        loss = 3.3 * math.exp(-step / 9) * rng.uniform(0.75, 1.3) + 0.0009
        lines.append(
            {
                "step": step,
                "loss": loss,
                "grad_norm": 0.02 + loss * 0.9,
                "learning_rate": 5e-4 * min(step / 4, (77 - step) / 73),
                "entropy": loss * 0.8,
                "mean_token_accuracy": 1 - loss / 5,
            }
        )
        if step % 19 == 0:
            lines.append({"step": step, "eval_loss": loss * 1.2 + 0.002, "eval_mean_token_accuracy": 1 - loss / 4.5})
    return lines


MEMORY = {
    "device": "cuda",
    "predicted": {"allocated": 1626234240, "reserved": 1651247104, "method": "closed form"},
    "measured": {"allocated": 1583284224, "reserved": 1702887424},
    "baseline": 575340544,
    "setup": {"batch": 8, "length": 86, "dtype": "float32", "loss": "compact"},
}
MERGE = {
    "verdict": "Verified: the merged model answers as the adapter on its base does.",
    "base_weights": {"used": "original", "reason": "the adapter was trained on weights that were not quantized"},
    "method": {"used": "stream", "reason": "tensor by tensor"},
    "dtype": "F32",
    "bytes": 538090408,
    "merged": 210,
    "targets": [{"parameter": "a", "relative": 0.0048}, {"parameter": "b", "relative": 0.0315}],
    "verification": {
        "rows": "60 held-out rows",
        "figures": {"loss": 0.0038, "loss_increase": -5.7e-09, "kl": 3.9e-09, "kl_max": 1.4e-07, "top1": 1.0},
        "limits": {"max_kl": 0.1, "min_top1": 0.9, "max_loss_increase": 0.05, "max_logit_difference": None},
        "breaches": [],
    },
    "remarks": [],
}


class Page(HTMLParser):
    """The elements, ids and texts of a page; what is not closed is in `open`."""

    VOID = ("meta", "input", "br", "link", "img", "hr")

    def __init__(self, html: str) -> None:
        super().__init__()
        self.elements: list[tuple[str, dict[str, str | None]]] = []
        self.open: list[str] = []
        self.texts: list[str] = []
        self.feed(html)
        self.close()

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.elements.append((tag, dict(attrs)))
        if tag not in self.VOID:
            self.open.append(tag)

    def handle_startendtag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.elements.append((tag, dict(attrs)))

    def handle_endtag(self, tag: str) -> None:
        assert self.open, f"</{tag}> closes nothing"
        assert self.open.pop() == tag

    def handle_data(self, data: str) -> None:
        if not self.open or self.open[-1] not in ("style", "script"):
            self.texts.append(data)

    @property
    def text(self) -> str:
        return re.sub(r"\s+", " ", " ".join(self.texts))

    @property
    def ids(self) -> list[str]:
        return [attrs["id"] or "" for _, attrs in self.elements if "id" in attrs]


def write(folder: Path, **changed: Any) -> str:
    given = {"metrics": example_metrics(), "memory": MEMORY, "merge": MERGE}
    training = Training(**{name: changed.pop(name, value) for name, value in given.items()})
    rows: dict[str, Any] = {"results": example_results(), "samples": iter(example_samples())}
    write_html(folder, training=training, **(rows | changed))
    return (folder / "report.html").read_text(encoding="utf-8")


def data_of(html: str) -> dict[str, Any]:
    found = re.search(r'<script id="data" type="application/json">(.*?)</script>', html, re.S)
    assert found
    return json.loads(found[1])


@pytest.fixture(scope="module")
def html(tmp_path_factory: pytest.TempPathFactory) -> str:
    folder = tmp_path_factory.mktemp("report")
    text = write(folder)
    assert [path.name for path in folder.iterdir()] == ["report.html"]
    return text


@pytest.fixture(scope="module")
def page(html: str) -> Page:
    return Page(html)


def test_the_head_says_what_came_out(page: Page) -> None:
    assert "tickets-135m" in page.text
    assert "2 of 4 gates failed" in page.text
    assert "0.0% → 95.0%" in page.text
    assert re.search(r"\+95\.0 points .{1,20}\+90\.2 \w+ \+99\.8 points .{1,30}60 rows", page.text)
    assert "4 March 2030, 15:06 UTC" in page.text
    assert "4 of 60 held-out rows" in page.text
    assert "eval.max_new_tokens 64" in page.text


def test_gates_are_told_apart_by_words(page: Page) -> None:
    assert "passed heldout.exact_match.adapter >= 90% eval.gates.0 heldout.exact_match.adapter is 95.0%" in page.text
    assert "failed general.bits_per_byte.adapter <= general.bits_per_byte.base * 1.02 eval.gates.2" in page.text


def test_figures_have_their_unit_interval_and_best(page: Page) -> None:
    assert re.search(r"loss nats, lower .{1,12}3\.2134 3\.1034 \w+ 3\.3234 0\.0038 best", page.text)
    assert re.search(
        r"exact match higher .{1,12}0\.0% 0\.0% \w+ 0\.0% 95\.0% best 89\.5% \w+ 100\.0% 93\.3%", page.text
    )
    assert re.search(r"tokens 61\.4 59\.2 \w+ 63\.6 17\.1 16\.8 \w+ 17\.4 17\.1", page.text)


def test_cells_know_their_column_where_a_narrow_screen_hides_the_head(html: str) -> None:
    tables = re.findall(r'<table class="[^"]*stack">(.*?)</table>', html, re.DOTALL)
    assert len(tables) >= 3
    for table in tables:
        heads = [re.sub("<[^>]*>", "", head) for head in re.findall(r"<th scope=.col.[^>]*>(.*?)</th>", table)]
        for row in re.findall(r"<tr><th scope=.row.>.*?</tr>", table, re.DOTALL):
            assert re.findall(r'<td[^>]*data-label="([^"]*)"', row) == heads[1:]


def test_forgetting_has_a_section_that_says_what_it_means(html: str, page: Page) -> None:
    section = html[html.index('<section id="forgetting"') : html.index('<section id="speed"')]
    assert "the task" in section
    assert "<h3>general</h3>" in section
    assert "<h3>chat</h3>" in section
    assert "<h3>heldout</h3>" not in section


def test_bars_show_direction_without_colour(html: str) -> None:
    assert len(re.findall(r'<svg class="bar ', html)) == len(differences())
    assert re.search(r"loss: .{1,30}−3\.2096, better, .{1,5}60 rows", html)
    assert re.search(r"bits per byte: .{1,30}\+0\.0434, worse, .{1,5}40 rows", html)
    assert re.search(r"answer: .{1,30}−27\.5, lower, .{1,5}40 rows", html)
    # A lower loss is better, and better is to the right of the zero line at 120.
    bar = html[html.index("−3.2096, better") :]
    assert float(re.search(r'class="dot" cx="([\d.]+)"', bar)[1]) > 120  # type: ignore[index]
    worse = html[html.index("+0.0434, worse") :]
    assert float(re.search(r'class="dot" cx="([\d.]+)"', worse)[1]) < 120  # type: ignore[index]


def test_differences_have_wins_and_what_could_be_seen(page: Page) -> None:
    assert re.search(
        r"exact match .{80,180} \+95.0 points \+90.2 \w+ \+99.8 points better 57 / 0 / 3 6.6 points",
        page.text,
    )


def test_curves_memory_and_merge_are_there(html: str, page: Page) -> None:
    assert {"curve-loss-title", "curve-learning-rate-title", "curve-accuracy-title"} <= set(page.ids)
    assert "Loss, logarithmic scale" in page.text
    assert re.search(r'<path class="line" d="M[\d.,L]+"/>', html)
    assert re.search(r"predicted, \w+ 1\.54 GiB", page.text)
    assert re.search(r"measured, \w+ 1\.47 GiB −2\.6%", page.text)
    assert re.search(r"token 100\.0% .{1,9} 90\.0%", page.text)
    assert re.search(r"KL .{1,20}3\.9e-09 .{1,9}0\.1000", page.text)
    assert "matrices merged 210" in page.text


def test_what_is_not_given_is_not_there(tmp_path: Path) -> None:
    results = example_results(gates=(), speed=(), remarks=(), differences=(), sets={}, figures={})
    text = write(tmp_path, results=results, samples=[], metrics=[], memory=None, merge=None)
    ids = Page(text).ids
    assert not {"training", "memory", "merge", "speed", "forgetting", "task"} & set(ids)
    assert {"gates", "examples"} <= set(ids)
    assert "No gates" in text
    assert "0 rows" in Page(text).text


def test_examples_are_in_the_page_and_its_html(html: str, page: Page) -> None:
    data = data_of(html)
    assert len(data["samples"]) == 63
    assert data["samples"][0][:3] == ["heldout", 0, "data/quickstart/heldout.jsonl:1"]
    assert data["samples"][0][5]["adapter"]["scores"]["exact_match"] == 1.0
    body = html[html.index('<table id="rows"') : html.index('<div id="pager"')]
    assert body.count("<tr>") == 1 + 50
    assert "first 50 rows" in page.text
    assert "left out" not in page.text


def test_samples_left_out_are_told(tmp_path: Path) -> None:
    text = write(tmp_path, most_samples=10)
    kept = [sample[0] for sample in data_of(text)["samples"]]
    assert kept == ["heldout"] * 4 + ["chat"] * 3
    assert "56 more rows" in Page(text).text


def test_small_sets_are_kept_whole() -> None:
    results = example_results()
    assert shares(results, 1000) == {"heldout": 60, "general": 40, "chat": 40}
    assert shares(results, 100) == {"general": 33, "chat": 33, "heldout": 34}
    assert shares(results, 0) == {"heldout": 0, "general": 0, "chat": 0}


def test_the_page_parses_and_its_ids_are_unique(page: Page) -> None:
    assert page.open == []
    assert len(page.ids) == len(set(page.ids))
    known = set(page.ids)
    for tag, attrs in page.elements:
        for name in ("aria-labelledby", "for"):
            assert set((attrs.get(name) or "").split()) <= known
        if tag == "a":
            assert (attrs["href"] or "")[1:] in known
        if tag == "th":
            assert attrs["scope"] in ("col", "row", "rowgroup")


def test_nothing_is_loaded_and_nothing_is_inline_but_what_the_policy_names(html: str, page: Page) -> None:
    tags = [tag for tag, _ in page.elements]
    assert tags.count("script") == 2
    assert tags.count("style") == 1
    assert not {"img", "link", "iframe", "object", "embed", "base", "a:http"} & set(tags)
    for _, attrs in page.elements:
        assert "src" not in attrs
        assert "style" not in attrs  # the policy would refuse it
        assert not any(name.startswith("on") for name in attrs)
        assert (attrs.get("href") or "#").startswith("#")
    assert not re.search(r"url\(|@import|https?://", html)
    policy = next(
        attrs["content"] for tag, attrs in page.elements if attrs.get("http-equiv") == "Content-Security-Policy"
    )
    assert policy is not None
    assert policy.startswith("default-src 'none'; style-src 'sha256-")
    assert "unsafe" not in policy


def test_hostile_text_stays_text(tmp_path: Path) -> None:
    hostile = HOSTILE + "'\"><svg onload=alert(1)>"
    sample = example_samples()[0]
    sample = sample.model_copy(
        update={
            "prompt": hostile,
            "expected": "\ud83d lone \udc00",
            "place": hostile,
            "answers": {
                "base": Answer.model_construct(
                    text=hostile + "\ud800", ended=False, chosen=hostile, scores={"loss": math.nan}
                )
            },
        }
    )
    results = example_results(
        name=hostile, remarks=(hostile,), gates=(Gate(gate=hostile, where=hostile, passed=False, sentence=hostile),)
    )
    plain = Page(write(tmp_path, samples=[]))
    text = write(
        tmp_path,
        results=results,
        samples=[sample],
        memory={"device": hostile, "reason": "\ud800"},
        merge={"verdict": hostile},
    )
    found = Page(text)
    assert found.open == []
    for tag in ("script", "img", "svg"):
        # Nothing but our own; a mark of a control character is a span.
        assert [tag, "onload"] not in [[name, key] for name, attrs in found.elements for key in attrs]
        assert sum(name == tag for name, _ in found.elements) <= sum(name == tag for name, _ in plain.elements)
    assert "\x00" not in text
    assert "\x1b" not in text
    assert "\u202e" not in text.split('<script id="data"')[0]
    assert "⟨NUL⟩⟨ESC⟩[31m ⟨U+202E⟩gnp.exe ⟨U+2028⟩" in text
    assert "⟨U+D83D⟩ lone ⟨U+DC00⟩" in text
    data = data_of(text)["samples"][0]
    assert data[3] == hostile
    assert data[4] == "\ud83d lone \udc00"
    assert data[5]["base"]["scores"] == {}


def test_long_texts_are_cut(tmp_path: Path) -> None:
    long = "long \u2603 " * 150_000
    sample = example_samples()[0]
    samples = (
        sample.model_copy(
            update={"row": row, "prompt": long, "answers": {name: Answer(text=long, scores={}) for name in MODELS}}
        )
        for row in range(60)
    )
    text = write(tmp_path, samples=samples)
    assert len(text.encode()) < 8_000_000
    assert "samples.jsonl" in data_of(text)["samples"][0][3]
    assert "more characters " in text


def test_many_long_texts_are_left_out(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("lorafit.evaluation.report.html.MOST_TEXT", 10_000)
    text = write(tmp_path)
    assert 0 < len(data_of(text)["samples"]) < 60
    assert "left out here" in text


def test_json_has_no_markup() -> None:
    given = {"a": "</script><!--&\u2028\u2029\ud800\x00", "b": "é\u2603"}
    text = as_json(given)
    assert not set("<>&\u2028\u2029\ud800\x00") & set(text)
    assert "é\u2603" in text
    assert json.loads(text) == given


@pytest.mark.parametrize(
    ("value", "unit", "shown"),
    [
        (0.12345, "share", "12.3%"),
        (3.21344, "nats", "3.2134"),
        (-0.00000004, "nats", "−4.0e-08"),
        (0.0, "nats", "0.0000"),
        (61.44, "tokens", "61.4"),
        (1234.56, "number", "1,234.6"),
        (24.857, "number", "24.86"),
        (1.0038, "number", "1.0038"),
        (1.42, "seconds", "1.42 s"),
        (None, "share", "–"),
        (math.inf, "number", "–"),
    ],
)
def test_quantities(value: float | None, unit: str, shown: str) -> None:
    assert quantity(value, unit) == shown


def test_changes_have_a_sign() -> None:
    assert change(0.95, "share") == "+95.0 points"
    assert change(-0.0001, "share") == "0.0 points"
    assert change(-3.2, "nats") == "−3.2000"
    assert interval(-0.1, 0.25, "share", signed=True) == "−10.0 to +25.0 points"
    assert interval(None, 0.2, "share") == ""


def test_joiners_of_letters_are_no_control_characters() -> None:
    assert visible("می‌خواهم") == "می‌خواهم"
    assert visible("a\u200bb\x07<\n") == "a⟨U+200B⟩b⟨BEL⟩<\n"


def test_a_difference_is_better_by_its_metric() -> None:
    one = Difference(
        set="s",
        metric="loss",
        model="a",
        against="b",
        value=-1,
        low=-2,
        high=-0.5,
        wins=8,
        ties=0,
        losses=0,
        detectable=1,
    )
    assert state_of(one, LOSS) == "better"
    assert state_of(one, EXACT) == "worse"
    assert state_of(one, LENGTH) == "lower"
    assert state_of(one.model_copy(update={"high": 0.5}), LOSS) == "unclear"


def test_curves_of_odd_numbers() -> None:
    assert learning_curves([]) == []
    assert learning_curves([{"step": 1, "loss": math.nan}, {"step": 2, "loss": "x"}, {"eval_loss": 1.0}]) == []
    (flat,) = learning_curves([{"step": 1, "loss": 2.0}, {"step": 2, "loss": 2.0}])
    assert all(math.isfinite(tick.at) for tick in (*flat.up, *flat.across))
    long = learning_curves([{"step": step, "loss": 1.0 + (step == 4321)} for step in range(10_000)])[0]
    assert long.curves[0].path.count("L") <= 650
    assert f",{long.top}" in long.curves[0].path  # the one high value is still there
