#!/usr/bin/env python
"""Evaluation's throughput against lm-evaluation-harness's HF backend, in turn, on the same rows and model.

    python scripts/bench/evaluation.py [--model models/SmolLM2-135M-Instruct] [--rounds 3]

Three kinds of work on the quickstart's held-out rows: the log-likelihood of each answer, of six options for each
prompt, and greedy answers. The harness runs at each batch size of --batches; its best counts. Exits with 1 unless both
give the same log-likelihoods. Times mean something only on a machine that does nothing else.
"""

from __future__ import annotations

import argparse
import functools
import logging
import statistics
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[2]
CATEGORIES = ("account", "billing", "delivery", "return", "technical", "other")
NEW_TOKENS = 32
SAME = 1e-3
"""The largest difference between log-likelihoods of an answer, in relation to them, that is rounding."""


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default=str(ROOT / "models" / "SmolLM2-135M-Instruct"))
    parser.add_argument("--adapter", help="measure with this adapter on the model")
    parser.add_argument("--rows", type=Path, default=ROOT / "data" / "quickstart" / "heldout.jsonl")
    parser.add_argument("--limit", type=int, default=60)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--batches", default="1,4,8,16,32,64")
    arguments = parser.parse_args()

    logging.getLogger("lm_eval").setLevel(logging.ERROR)
    work = prepare(arguments)
    print("| work | lorafit rows/s | lm-eval rows/s (best batch) | ratio | largest difference |")
    print("|---|---|---|---|---|")
    sizes = [int(size) for size in arguments.batches.split(",")]
    same = True
    for name, ours, theirs, rows, apart in work:
        tried = {size: timed(functools.partial(theirs, size))[0] for size in sizes}
        best = min(sizes, key=tried.__getitem__)
        times: list[tuple[float, float]] = []
        for _ in range(arguments.rounds):
            mine, found = timed(ours)
            its, expected = timed(functools.partial(theirs, best))
            times.append((mine, its))
        mine, its = (statistics.median(column) for column in zip(*times, strict=True))
        ratios = sorted(theirs / ours for ours, theirs in times)
        print(
            f"| {name} | {rows / mine:.2f} | {rows / its:.2f} ({best}) | {its / mine:.2f} "
            f"({ratios[0]:.2f} to {ratios[-1]:.2f}) | {apart(found, expected)} |",
            flush=True,
        )
        same &= all(
            abs(one - other) <= SAME * max(abs(other), 1)
            for one, other in zip(found, expected, strict=True)
            if not isinstance(one, str)  # of two tokens that are equally likely, either is greedy
        )
    return 0 if same else 1


def timed(work: Callable[[], Any]) -> tuple[float, Any]:
    began = time.perf_counter()
    found = work()
    return time.perf_counter() - began, found


def prepare(arguments: argparse.Namespace) -> list[tuple[str, Callable[[], Any], Callable[[int], Any], int, Any]]:
    """Each kind of work: name, ours, the harness's at a batch size, rows, and how far apart two results are."""
    import json

    import torch
    from lm_eval.api.instance import Instance
    from lm_eval.models.huggingface import HFLM
    from transformers import AutoModelForCausalLM, AutoTokenizer
    from trl.trainer.utils import add_fused_lm_head

    from lorafit.engine.data.encode import IGNORED
    from lorafit.engine.evaluate.batches import generate
    from lorafit.engine.evaluate.likelihood import Choice, choices, likelihoods
    from lorafit.engine.loss import settle_head

    tokenizer = AutoTokenizer.from_pretrained(arguments.model)
    model: Any = AutoModelForCausalLM.from_pretrained(arguments.model, dtype=torch.float32).eval()
    if arguments.adapter:
        from peft import PeftModel

        model = PeftModel.from_pretrained(model, arguments.adapter).eval()
    bare = model.get_base_model() if arguments.adapter else model
    add_fused_lm_head(bare, outputs=("log_probs", "is_top1"))
    settle_head(bare)
    lines = arguments.rows.read_text(encoding="utf-8").splitlines()[: arguments.limit]
    prompts, answers = [], []
    for line in lines:
        messages = json.loads(line)["messages"]
        prompts.append(tokenizer.apply_chat_template(messages[:1], tokenize=False, add_generation_prompt=True))
        answers.append(messages[1]["content"] + tokenizer.eos_token)
    options = [f'{{"category":"{category}","priority"' for category in CATEGORIES]

    def ids(text: str) -> list[int]:
        return list(tokenizer(text, add_special_tokens=False)["input_ids"])

    def parted(prompt: str, answer: str) -> tuple[list[int], list[int]]:
        """As the harness does: the white space that a prompt ends with is scored with the answer."""
        head, whole = ids(prompt.rstrip()), ids(prompt + answer)
        return head, whole[len(head) :]

    rows = []
    for prompt, answer in zip(prompts, answers, strict=True):
        head, tail = parted(prompt, answer)
        rows.append({"input_ids": head + tail, "labels": [IGNORED] * len(head) + tail})
    questions = [Choice(ids(prompt.rstrip()), [parted(prompt, option)[1] for option in options]) for prompt in prompts]
    pad = tokenizer.pad_token_id

    @functools.cache
    def harness(size: int) -> Any:
        return HFLM(pretrained=model, tokenizer=tokenizer, batch_size=size, add_bos_token=False)

    def requests(kind: str, asked: list[tuple[Any, ...]]) -> list[Any]:
        return [
            Instance(request_type=kind, doc={}, arguments=one, idx=index, metadata=("bench", index, 1))
            for index, one in enumerate(asked)
        ]

    def their_likelihoods(size: int, asked: list[tuple[str, str]]) -> list[float]:
        return [found[0] for found in harness(size).loglikelihood(requests("loglikelihood", asked), disable_tqdm=True)]

    def our_answers() -> list[str]:
        made = {
            one.row: one.ids
            for one in generate(model, [ids(p) for p in prompts], {tokenizer.eos_token_id}, pad, NEW_TOKENS)
        }
        return [tokenizer.decode(made[row], skip_special_tokens=True).strip() for row in range(len(prompts))]

    def their_answers(size: int) -> list[str]:
        settings = {"until": [tokenizer.eos_token], "max_gen_toks": NEW_TOKENS, "do_sample": False}
        asked = requests("generate_until", [(prompt, dict(settings)) for prompt in prompts])
        return [text.strip() for text in harness(size).generate_until(asked, disable_tqdm=True)]

    def largest(one: list[float], other: list[float]) -> str:
        return f"{max(abs(a - b) for a, b in zip(one, other, strict=True)):.1e} nats"

    def differing(one: list[str], other: list[str]) -> str:
        return f"{sum(a != b for a, b in zip(one, other, strict=True))} answers"

    pairs = list(zip(prompts, answers, strict=True))
    of_options = [(prompt, option) for prompt in prompts for option in options]

    def our_likelihoods() -> list[float]:
        found = {one.row: -one.nll for one in likelihoods(model, rows, pad)}
        return [found[row] for row in range(len(rows))]

    def our_options() -> list[float]:
        found = {one.row: one.logprobs for one in choices(model, questions, pad)}
        return [value for row in range(len(questions)) for value in found[row]]

    return [
        ("loss of answers", our_likelihoods, lambda size: their_likelihoods(size, pairs), len(rows), largest),
        ("six options a prompt", our_options, lambda size: their_likelihoods(size, of_options), len(rows), largest),
        (f"answers of up to {NEW_TOKENS} tokens", our_answers, their_answers, len(rows), differing),
    ]


if __name__ == "__main__":
    sys.exit(main())
