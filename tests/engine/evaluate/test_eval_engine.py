"""The engine's batches give what a plain loop over rows gives: losses, divergences, options, greedy answers."""

from __future__ import annotations

import functools
import itertools
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
import transformers
from conftest import make_model, make_tokenizer
from hypothesis import given
from hypothesis import strategies as st
from packaging.version import Version
from peft import LoraConfig, get_peft_model
from transformers import (
    AutoModelForCausalLM,
    AutoTokenizer,
    BitsAndBytesConfig,
    Gemma2Config,
    Gemma2ForCausalLM,
    GPT2Config,
    GPT2LMHeadModel,
    LlamaConfig,
    LlamaForCausalLM,
    MambaConfig,
    MambaForCausalLM,
    Qwen2Config,
    Qwen2ForCausalLM,
)

from lorafit.engine.evaluate import batches as batches_module
from lorafit.engine.evaluate import batches as greedy_module
from lorafit.engine.evaluate import likelihood as likelihood_module
from lorafit.engine.evaluate.batches import (
    CPU_TOKENS,
    Generated,
    batches,
    end_tokens,
    generate,
    padded,
    ready,
    shrinking,
    token_budget,
)
from lorafit.engine.evaluate.likelihood import Choice, choices, divergences, likelihoods, whole

VOCABULARY = 384
PAD = 0
MODULES = (greedy_module, likelihood_module)
WIDE: dict[str, Any] = {"vocab_size": VOCABULARY, "initializer_range": 0.3, "tie_word_embeddings": False}
USUAL: dict[str, Any] = WIDE | {
    "hidden_size": 32,
    "intermediate_size": 64,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 256,
    "bos_token_id": None,
    "eos_token_id": None,
    "pad_token_id": PAD,
}
"""Wide weights, so that answers are not one token again and again and no two tokens are equally likely."""
MODELS: dict[str, Callable[[], Any]] = {
    "llama": lambda: LlamaForCausalLM(LlamaConfig(**USUAL)),
    "qwen2": lambda: Qwen2ForCausalLM(Qwen2Config(**USUAL)),
    "gpt2": lambda: GPT2LMHeadModel(
        GPT2Config(**WIDE, n_embd=32, n_layer=2, n_head=4, n_positions=256, bos_token_id=None, eos_token_id=None)
    ),
    "gemma2": lambda: Gemma2ForCausalLM(
        Gemma2Config(**USUAL | {"head_dim": 8, "sliding_window": 8, "query_pre_attn_scalar": 8})
    ),
    "mamba": lambda: MambaForCausalLM(
        MambaConfig(**WIDE, hidden_size=32, num_hidden_layers=2, state_size=4, pad_token_id=PAD, eos_token_id=None)
    ),
}
SHARED = {"llama", "qwen2", "gpt2"}
"""Those whose cache is of keys and values alone, of all positions."""


@functools.cache
def built(name: str) -> Any:
    torch.manual_seed(1)
    return ready(MODELS[name](), SimpleNamespace(hardware=SimpleNamespace(device="cpu")))


def adapted(name: str = "llama", zero: bool = False) -> Any:
    """A model of its own, with LoRA on it."""
    torch.manual_seed(1)
    model = ready(MODELS[name](), SimpleNamespace(hardware=SimpleNamespace(device="cpu")))
    model = get_peft_model(model, LoraConfig(r=4, target_modules=["q_proj", "v_proj", "down_proj"])).eval()
    if not zero:
        with torch.no_grad():
            for part, weight in model.named_parameters():
                if "lora_B" in part:
                    weight.normal_(std=0.3)
    return model


@pytest.fixture(scope="module")
def four_bit(tmp_path_factory: pytest.TempPathFactory) -> Any:
    """A bitsandbytes NF4 model with LoRA on it."""
    path = make_model(tmp_path_factory.mktemp("engine") / "model", initializer_range=0.3)
    quantized = BitsAndBytesConfig(load_in_4bit=True, bnb_4bit_quant_type="nf4", bnb_4bit_compute_dtype=torch.float32)
    model = AutoModelForCausalLM.from_pretrained(path, quantization_config=quantized, dtype=torch.float32)
    model = ready(model, SimpleNamespace(hardware=SimpleNamespace(device="cpu")))
    model = get_peft_model(model, LoraConfig(r=4, target_modules=["q_proj", "v_proj"])).eval()
    with torch.no_grad():
        for part, weight in model.named_parameters():
            if "lora_B" in part:
                weight.normal_(std=0.3)
    return model


def drawn(*lengths: int, seed: int = 0) -> list[list[int]]:
    """Random tokens, the special ones left out."""
    draw = torch.Generator().manual_seed(seed)
    return [torch.randint(3, VOCABULARY, (length,), generator=draw).tolist() for length in lengths]


def learned_rows() -> list[dict[str, list[int]]]:
    """Rows of different lengths that learn their last tokens, every second one, all, or none."""
    rows = [{"input_ids": ids, "labels": list(ids)} for ids in drawn(9, 23, 4, 31, 14, 14, 2, 17)]
    for row in rows[:4]:
        row["labels"][: len(row["labels"]) // 2] = [-100] * (len(row["labels"]) // 2)
    rows[4]["labels"][::2] = [-100] * 7
    rows[7]["labels"] = [-100] * 17
    return rows


def allow(monkeypatch: pytest.MonkeyPatch, tokens: int) -> None:
    """Batches of so many padded tokens."""
    for module in MODULES:
        monkeypatch.setattr(module, "token_budget", lambda model: tokens)


def counted(module: Any, monkeypatch: pytest.MonkeyPatch, *names: str) -> list[str]:
    """The names of the functions, as they are called."""
    found: list[str] = []

    def counting(name: str, inner: Any) -> Any:
        return lambda *args: found.append(name) or inner(*args)

    for name in names:
        monkeypatch.setattr(module, name, counting(name, getattr(module, name)))
    return found


@torch.no_grad()
def logits_of(model: Any, ids: list[int]) -> torch.Tensor:
    return model(input_ids=torch.tensor([ids], device=model.device), use_cache=False).logits[0].float()


def plain_loss(model: Any, row: dict[str, list[int]]) -> tuple[float, int, int]:
    """By transformers' logits, token by token."""
    log_probs = logits_of(model, row["input_ids"]).log_softmax(-1)
    pairs = [(place, label) for place, label in enumerate(row["labels"][1:]) if label != -100]
    nll = -sum(float(log_probs[place, label]) for place, label in pairs)
    return nll, len(pairs), sum(int(log_probs[place].argmax()) == label for place, label in pairs)


ROW_BY_ROW, TOGETHER = 1, 16 * 31  # of tokens; the longest of learned_rows has 31


# --- losses ---------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", MODELS)
@pytest.mark.parametrize("tokens", [ROW_BY_ROW, TOGETHER])
def test_losses_are_those_of_a_plain_loop(name: str, tokens: int, monkeypatch: pytest.MonkeyPatch) -> None:
    allow(monkeypatch, tokens)
    model, rows = built(name), learned_rows()
    made = sorted(likelihoods(model, rows, PAD), key=lambda one: one.row)
    assert [one.row for one in made] == list(range(len(rows)))
    for one, row in zip(made, rows, strict=True):
        nll, count, hits = plain_loss(model, row)
        assert (one.tokens, one.hits) == (count, hits)
        assert one.nll == pytest.approx(nll, rel=1e-5, abs=1e-5)


@pytest.mark.parametrize("tokens", [ROW_BY_ROW, TOGETHER])
def test_losses_of_an_adapter_and_of_4_bits(tokens: int, four_bit: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    allow(monkeypatch, tokens)
    for model in (adapted(), four_bit):
        for one in likelihoods(model, learned_rows(), PAD):
            assert one.nll == pytest.approx(plain_loss(model, learned_rows()[one.row])[0], rel=1e-5, abs=1e-5)


def test_a_dataset_is_taken_as_a_list_is() -> None:
    from datasets import Dataset

    model, rows = built("llama"), learned_rows()
    assert list(likelihoods(model, Dataset.from_list(rows), PAD)) == list(likelihoods(model, rows, PAD))


def test_a_model_in_16_bits_is_measured_in_16_bits() -> None:
    torch.manual_seed(1)
    model = ready(MODELS["llama"]().bfloat16(), SimpleNamespace(hardware=SimpleNamespace(device="cpu")))
    for one in likelihoods(model, learned_rows(), PAD):
        with torch.autocast("cpu", dtype=torch.bfloat16):
            nll = plain_loss(model, learned_rows()[one.row])[0]
        assert one.nll == pytest.approx(nll, rel=2e-2, abs=1e-2)


# --- divergences ----------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["llama", "gemma2"])  # gemma2 does more with its logits than its head makes
@pytest.mark.parametrize("tokens", [ROW_BY_ROW, TOGETHER])
def test_divergences_are_over_the_whole_vocabulary(name: str, tokens: int, monkeypatch: pytest.MonkeyPatch) -> None:
    allow(monkeypatch, tokens)
    model, rows = adapted(name), learned_rows()
    made = sorted(divergences(model.disable_adapter, model, rows, PAD), key=lambda one: one.row)
    assert [one.row for one in made] == list(range(len(rows)))
    for one, row in zip(made, rows, strict=True):
        mine = logits_of(model, row["input_ids"]).double().log_softmax(-1)
        with model.disable_adapter():
            its = logits_of(model, row["input_ids"]).double().log_softmax(-1)
        places = [place for place, label in enumerate(row["labels"][1:]) if label != -100]
        kl = sum(float(sum(its[place].exp() * (its[place] - mine[place]))) for place in places)
        assert one.kl == pytest.approx(kl, rel=1e-4, abs=1e-5)
        assert one.tokens == len(places)
        assert one.kl > 0.01 * one.tokens or not places
        nll, count, hits = plain_loss(model, row)
        assert (one.tokens, one.hits) == (count, hits)
        assert one.nll == pytest.approx(nll, rel=1e-5, abs=1e-5)


@pytest.mark.parametrize("name", ["llama", "gemma2"])
def test_divergences_in_chunks_are_the_same(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    model, rows = adapted(name), learned_rows()
    made = {one.row: one.kl for one in divergences(model.disable_adapter, model, rows, PAD)}
    monkeypatch.setattr(likelihood_module, "LOGIT_BYTES", 4 * VOCABULARY * 5)  # 5 positions
    assert {one.row: one.kl for one in divergences(model.disable_adapter, model, rows, PAD)} == pytest.approx(
        made, rel=1e-5
    )


@pytest.mark.parametrize("name", ["llama", "gemma2"])
def test_an_adapter_of_zeros_diverges_from_nothing(name: str) -> None:
    model = adapted(name, zero=True)
    assert [one.kl for one in divergences(model.disable_adapter, model, learned_rows(), PAD)] == [0.0] * 8


def test_rows_that_learn_nothing_have_no_divergence() -> None:
    model, row = adapted(zero=True), learned_rows()[7]
    (made,) = divergences(model.disable_adapter, model, [row], PAD)
    assert (made.kl, made.tokens, made.nll) == (0.0, 0, 0.0)


# --- options --------------------------------------------------------------------------------------


def questions_of(model: Any) -> list[Choice]:
    """Options of different numbers and lengths; some are what the model itself would say, or begin so."""
    prompts = drawn(12, 5, 20, 1, 7, 12, 16, seed=3)
    likely: list[int] = []
    for _ in range(2):
        likely.append(int(logits_of(model, [*prompts[2], *likely])[-1].argmax()))
    unlikely = likely[1] ^ 1
    return [
        Choice(prompts[0], drawn(3, 1, 5, 2, seed=4)),
        Choice(prompts[1], drawn(1, 1, seed=5)),
        Choice(prompts[2], [*drawn(1, 4, seed=6), likely[:1], likely, [likely[0], unlikely]]),
        Choice(prompts[3], drawn(2, 6, 1, seed=7)),
        Choice(prompts[4], drawn(3, seed=8)),
        Choice(prompts[5], drawn(1, 1, 1, seed=9)),  # one token each: the prompt alone is run
        Choice(prompts[6], [prompts[0][:3], prompts[0][:2], prompts[0][:3]]),  # the same twice, and a beginning of it
    ]


def compare(model: Any, questions: list[Choice], rel: float = 1e-5) -> None:
    """The options come out as each of them run with its prompt."""
    made = sorted(choices(model, questions, PAD), key=lambda one: one.row)
    assert [one.row for one in made] == list(range(len(questions)))
    for one, its in zip(made, whole(model, questions, PAD, 10_000), strict=True):
        assert one.logprobs == pytest.approx(its, rel=rel, abs=1e-5)


@pytest.fixture
def ways(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """By which way each batch was computed; a trial is of both."""
    return counted(likelihood_module, monkeypatch, "_shared", "whole")


@pytest.mark.parametrize("name", MODELS)
@pytest.mark.parametrize("tokens", [ROW_BY_ROW, 60, TOGETHER])
def test_options_are_scored_as_if_each_were_run_with_its_prompt(
    name: str, tokens: int, monkeypatch: pytest.MonkeyPatch, ways: list[str]
) -> None:
    allow(monkeypatch, tokens)
    model = built(name)
    questions = questions_of(model)
    compare(model, questions)
    assert ("_shared" in ways) == (name in SHARED)


def test_options_of_an_adapter_and_of_4_bits(four_bit: Any, ways: list[str]) -> None:
    for model in (adapted(), four_bit):
        ways.clear()
        questions = questions_of(model)
        compare(model, questions, rel=1e-4)
        assert ways == ["_shared", "whole"]  # the batch, and two of its options to check it


@pytest.mark.parametrize("name", ["llama", "mamba"])
def test_options_with_room_for_few_logits(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    model = built(name)
    questions = questions_of(model)
    monkeypatch.setattr(likelihood_module, "LOGIT_BYTES", 4 * VOCABULARY * 50)
    compare(model, questions)


@pytest.mark.parametrize("name", ["llama", "gpt2", "gemma2"])
def test_options_are_scored_as_by_lm_eval(name: str, tmp_path: Path) -> None:
    from lm_eval.models.huggingface import HFLM

    model = built(name)
    tokenizer = AutoTokenizer.from_pretrained(make_tokenizer(tmp_path / "tokenizer"))
    harness = HFLM(pretrained=model, tokenizer=tokenizer, batch_size=1)
    questions = questions_of(model)
    requests = [(("", ""), question.prompt, option) for question in questions for option in question.options]
    its = harness._loglikelihood_tokens(requests, disable_tqdm=True)
    made = sorted(choices(model, questions, PAD), key=lambda one: one.row)
    assert [value for one in made for value in one.logprobs] == pytest.approx([value for value, _ in its], rel=1e-5)


def test_a_cache_that_is_wrong_when_shared_is_not_shared(ways: list[str], monkeypatch: pytest.MonkeyPatch) -> None:
    """A model that leaves the positions it is given out of account, and so goes wrong with padding."""
    model = built("llama")
    inner = model.forward

    def forward(*args: Any, position_ids: Any = None, **kwargs: Any) -> Any:
        if position_ids is not None:
            position_ids = torch.zeros_like(position_ids)
        return inner(*args, position_ids=position_ids, **kwargs)

    monkeypatch.setattr(model, "forward", forward)
    allow(monkeypatch, 40)
    questions = questions_of(model)
    compare(model, questions)
    assert ways.count("_shared") == 1  # the trial


# --- greedy answers -------------------------------------------------------------------------------

PROMPTS = drawn(9, 3, 14, 1, 6, 14, 11, 4, seed=11)
MOST = 12


def alone(model: Any, ends: set[int], most: int = MOST) -> list[tuple[list[int], bool]]:
    """By `generate`, one prompt at a time."""
    found = []
    for prompt in PROMPTS:
        ids = torch.tensor([prompt], device=model.device)
        output = model.generate(
            input_ids=ids,
            attention_mask=torch.ones_like(ids),
            max_new_tokens=most,
            do_sample=False,
            eos_token_id=sorted(ends) or None,
            pad_token_id=PAD,
        )
        answer = output[0, len(prompt) :].tolist()
        ended = answer[-1] in ends
        found.append((answer[:-1] if ended else answer, ended))
    return found


def ends_of(model: Any) -> set[int]:
    """End tokens that end some rows at once, some at different later places, and at least one not at all."""
    free = [answer for answer, _ in alone(model, set())]
    spared = set(free[0])
    ends: set[int] = set()
    for place, answer in zip((0, 2, 5, 7, 3), free[1:], strict=False):
        later = [token for token in answer[place:] if token not in spared]
        ends |= set(later[:1])
    return ends


def check_answers(
    model: Any, monkeypatch: pytest.MonkeyPatch, own: bool, together: bool = True, pad: int = PAD
) -> None:
    """Batched answers are those that are generated one by one, however they are put together.

    Args:
        together: whether rows of different lengths may be in one batch; else two of one length are.
    """
    ends = ends_of(model)
    expected = alone(model, ends)
    stopped = {len(answer) for answer, ended in expected if ended}
    assert len(stopped) >= 3, stopped
    assert not all(ended for _, ended in expected)
    used = counted(greedy_module, monkeypatch, "_own_loop", "_library")
    guesses: list[Any] = [None, [3, 1, 4, 1, 5, 9, 2, 6], [MOST - i for i in range(8)]]
    for tokens, guess in [(ROW_BY_ROW, None), (50, guesses[1]), *((10_000, guess) for guess in guesses)]:
        allow(monkeypatch, tokens)
        made = list(generate(model, PROMPTS, ends, pad, MOST, expected_lengths=guess))
        assert sorted(one.row for one in made) == list(range(len(PROMPTS)))
        assert [(one.ids, one.ended) for one in sorted(made, key=by_row)] == expected
        assert all(one.seconds > 0 for one in made)
        sizes = {one.batch_rows for one in made}
        assert sizes == {1} if tokens == ROW_BY_ROW else (8 in sizes) == (together and tokens > 50)
        assert together or 2 in sizes or tokens <= 50  # PROMPTS has two of one length
    assert set(used) == {"_own_loop" if own else "_library"}


def by_row(one: Generated) -> int:
    return one.row


@pytest.mark.parametrize("name", MODELS)
def test_greedy_answers_are_those_of_generate(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    check_answers(built(name), monkeypatch, own=name in SHARED)


def test_greedy_answers_of_an_adapter(monkeypatch: pytest.MonkeyPatch) -> None:
    check_answers(adapted(), monkeypatch, own=True)


def test_greedy_answers_of_4_bits(four_bit: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    check_answers(four_bit, monkeypatch, own=True)


WISHES: list[tuple[dict[str, Any], bool]] = [
    ({"repetition_penalty": 1.7}, Version(transformers.__version__) >= Version("5.23")),
    ({"no_repeat_ngram_size": 2}, False),
    ({"no_repeat_ngram_size": 1}, False),
    ({"min_new_tokens": 2, "suppress_tokens": [5, 6, 7]}, True),
    ({"encoder_repetition_penalty": 1.7}, False),
    ({"sequence_bias": {(5,): 2.0, (17, 40): -5.0}}, False),
]
"""What a generation configuration asks for, and whether padding leaves it as it is."""


@pytest.mark.parametrize(
    ("name", "asked", "together"), [*(("llama", *wish) for wish in WISHES), ("gemma2", *WISHES[0])]
)
def test_what_the_generation_configuration_asks_for(
    name: str, asked: dict[str, Any], together: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    """By transformers; the padding token is one that the model says, so that punishing it would show."""
    model = built(name)
    plain = alone(model, set())
    for key, value in asked.items():
        monkeypatch.setattr(model.generation_config, key, value)
    if "repetition_penalty" in asked or "no_repeat_ngram_size" in asked:
        assert alone(model, set()) != plain
    said = alone(model, ends_of(model))[0][0][3]
    check_answers(model, monkeypatch, own=False, together=together, pad=said)


def test_the_smallest_that_can_be_asked_for() -> None:
    model = built("llama")
    assert [(one.row, one.ids, one.ended) for one in generate(model, PROMPTS[:1], set(), PAD, 1)] == [
        (0, alone(model, set(), most=1)[0][0], False)
    ]
    assert list(generate(model, [], {2}, PAD, MOST)) == []
    (first,) = alone(model, set(), most=1)[0][0]
    (made,) = generate(model, PROMPTS[:1], {first}, PAD, MOST)
    assert (made.ids, made.ended) == ([], True)


@pytest.mark.parametrize("name", ["gemma2", "llama"])
def test_without_end_tokens_all_is_generated(name: str) -> None:
    model = built(name)
    made = sorted(generate(model, PROMPTS, (), PAD, MOST), key=by_row)
    assert [(one.ids, one.ended) for one in made] == alone(model, set())


def test_the_end_tokens_are_those_of_model_tokenizer_and_training() -> None:
    def ends(of_model: Any, of_tokenizer: int | None, *learned: int) -> set[int]:
        model = SimpleNamespace(generation_config=SimpleNamespace(eos_token_id=of_model))
        tokenizer: Any = SimpleNamespace(eos_token_id=of_tokenizer)
        return end_tokens(model, tokenizer, learned)

    assert ends([2, 7], 5, 9) == {2, 5, 7, 9}
    assert ends(2, 2) == {2}
    assert ends(None, None) == set()
    assert ends(0, None) == {0}


# --- what is left out, and what doesn't fit -------------------------------------------------------


def everything(model: Any, done: set[int]) -> dict[str, dict[int, Any]]:
    """What all of the engine finds, by row; answers without their times."""
    rows, questions = learned_rows()[:7], questions_of(model)
    return {
        "likelihoods": {one.row: one for one in likelihoods(model, rows, PAD, done)},
        "divergences": {one.row: one for one in divergences(model.disable_adapter, model, rows, PAD, done)},
        "choices": {one.row: one for one in choices(model, questions, PAD, done)},
        "generate": {one.row: one.ids for one in generate(model, PROMPTS[:7], {5}, PAD, MOST, done)},
    }


def close(made: dict[str, dict[int, Any]], other: dict[str, dict[int, Any]]) -> None:
    """The same but for rounding."""
    assert {name: set(found) for name, found in made.items()} == {name: set(found) for name, found in other.items()}
    assert made["generate"] == other["generate"]
    for name, field in (("likelihoods", "nll"), ("divergences", "kl"), ("choices", "logprobs")):
        for row, one in made[name].items():
            assert getattr(one, field) == pytest.approx(getattr(other[name][row], field), rel=1e-5, abs=1e-5)


def test_rows_that_are_done_are_left_out() -> None:
    model = adapted()
    all_of_it, rest = everything(model, set()), everything(model, {0, 3, 6})
    assert all(set(found) == {1, 2, 4, 5} for found in rest.values())
    close(
        rest, {name: {row: one for row, one in found.items() if row in rest[name]} for name, found in all_of_it.items()}
    )
    assert all(found == {} for found in everything(model, set(range(7))).values())


def test_batches_that_do_not_fit_are_made_smaller(monkeypatch: pytest.MonkeyPatch) -> None:
    """A model that has memory for 4 rows only."""
    model = adapted()
    expected = everything(model, set())
    inner, sizes = model.base_model.model.model.forward, []  # the decoder, which all ways go through

    def forward(input_ids: torch.Tensor, **kwargs: Any) -> Any:
        sizes.append(len(input_ids))
        if len(input_ids) > 4:
            raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB.")
        return inner(input_ids=input_ids, **kwargs)

    monkeypatch.setattr(model.base_model.model.model, "forward", forward)
    close(everything(model, set()), expected)
    assert max(sizes) > 4


def test_other_errors_and_rows_that_never_fit_are_raised() -> None:
    def too_small(batch: list[int]) -> list[int]:
        raise torch.OutOfMemoryError(f"{len(batch)} rows")

    def wrong(batch: list[int]) -> list[int]:
        raise RuntimeError(f"{len(batch)} rows")

    with pytest.raises(torch.OutOfMemoryError, match="1 rows"):
        list(shrinking(too_small, [[0, 1, 2, 3, 4]]))
    with pytest.raises(RuntimeError, match="5 rows"):
        list(shrinking(wrong, [[0, 1, 2, 3, 4]]))


@pytest.mark.parametrize(
    "error",
    [torch.OutOfMemoryError("x"), MemoryError(), RuntimeError("DefaultCPUAllocator: can't allocate memory: 9 bytes")],
)
@given(sizes=st.lists(st.integers(1, 20), max_size=6), fits=st.integers(1, 8))
def test_shrinking_gives_every_row_once_and_in_order(error: Exception, sizes: list[int], fits: int) -> None:
    tried: list[int] = []

    def work(batch: list[int]) -> list[int]:
        tried.append(len(batch))
        if len(batch) > fits:
            raise error
        return batch

    numbers = iter(range(sum(sizes)))
    planned = [[next(numbers) for _ in range(size)] for size in sizes]
    assert list(shrinking(work, planned)) == list(range(sum(sizes)))
    assert sum(size > fits for size in tried) <= 5  # halvings from 20 rows to 1: none is made twice


def test_batches_are_made_no_smaller_than_needed() -> None:
    tried: list[int] = []

    def work(batch: list[int]) -> list[int]:
        tried.append(len(batch))
        if len(batch) > 9:
            raise torch.OutOfMemoryError
        return batch

    assert list(shrinking(work, [list(range(64))] * 2)) == [*range(64)] * 2
    assert tried == [64, 32, 16, *[8] * 16]


# --- batches --------------------------------------------------------------------------------------


@given(lengths=st.lists(st.integers(0, 300), max_size=60), budget=st.integers(1, 1000), most=st.integers(1, 10))
def test_batches_hold_every_row_once_within_the_budget_longest_first(
    lengths: list[int], budget: int, most: int
) -> None:
    made = list(batches(lengths, budget, most))
    taken = [index for batch in made for index in batch]
    assert sorted(taken) == list(range(len(lengths)))
    assert [lengths[index] for index in taken] == sorted(lengths, reverse=True)
    for batch in made:
        assert 1 <= len(batch) <= most
        assert len(batch) == 1 or len(batch) * max(lengths[index] for index in batch) <= budget
    for batch, after in itertools.pairwise(made):  # none is smaller than it could be
        assert len(batch) == most or (len(batch) + 1) * max(lengths[index] for index in [*batch, after[0]]) > budget


@given(order=st.permutations(range(12)), count=st.integers(0, 12), budget=st.integers(1, 100))
def test_batches_in_a_given_order(order: list[int], count: int, budget: int) -> None:
    lengths = [(7 * index) % 12 + 1 for index in range(12)]
    made = list(batches(lengths, budget, order=order[:count]))
    assert [index for batch in made for index in batch] == order[:count]
    assert all(len(batch) == 1 or len(batch) * max(lengths[index] for index in batch) <= budget for batch in made)


def test_rows_are_padded_on_either_side() -> None:
    assert padded([[1, 2, 3], [4]], 9).tolist() == [[1, 2, 3], [4, 9, 9]]
    assert padded([[1, 2, 3], [4]], 9, left=True).tolist() == [[1, 2, 3], [9, 9, 4]]


@pytest.mark.parametrize("name", MODELS)
def test_the_budget_is_of_the_free_memory(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    found = []
    for free in (0, 1 << 20, 1 << 22, 1 << 40, None):
        monkeypatch.setattr(batches_module, "available_memory", lambda free=free: free)
        found.append(token_budget(built(name)))
    assert found[0] == 1
    assert 1 < found[1] < found[2] < CPU_TOKENS
    assert found[3:] == [CPU_TOKENS, CPU_TOKENS]


@pytest.mark.parametrize("own", [True, False], ids=["loop", "library"])
def test_answers_end_where_the_models_positions_do(own: bool) -> None:
    """A model with learned positions can't be run beyond them."""
    model = ready(MODELS["gpt2"](), SimpleNamespace(hardware=SimpleNamespace(device="cpu")))
    positions = model.config.max_position_embeddings
    model.generation_config.repetition_penalty = 1.0 if own else 1.1
    prompts = [[5] * (positions - 3), [5, 6, 7]]
    found = {one.row: one for one in generate(model, prompts, set(), 0, 8)}
    assert [len(found[row].ids) for row in (0, 1)] == [3, 8]
    assert not found[0].ended
