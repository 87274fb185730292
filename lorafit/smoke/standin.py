"""The tokenizer of a tiny model: the real one, or a stand-in where that can't be had."""

from __future__ import annotations

import json
import re
from collections.abc import Iterator
from importlib import resources
from typing import Any

from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import AutoTokenizer, PreTrainedTokenizerBase, PreTrainedTokenizerFast

from lorafit.facts import ModelFacts, hub_unreachable
from lorafit.template import inspect_template
from lorafit.tokenizer import cannot_load, gguf, location

VOCABULARY = 2048
CHATML = (
    "{% if tools %}{{ '<|im_start|>system\n' }}{% for tool in tools %}{{ tool | tojson + '\n' }}{% endfor %}"
    "{{ '<|im_end|>\n' }}{% endif %}"
    "{% for message in messages %}{{ '<|im_start|>' + message['role'] + '\n' }}"
    "{% if message['reasoning_content'] %}{{ '<think>\n' + message['reasoning_content'] + '\n</think>\n' }}{% endif %}"
    "{% if message['content'] is string %}{{ message['content'] }}"
    "{% elif message['content'] %}{% for part in message['content'] %}{{ part['text'] }}{% endfor %}{% endif %}"
    "{% for call in message['tool_calls'] or [] %}{{ '<tool_call>' + (call['function'] | tojson) + '</tool_call>' }}"
    "{% endfor %}{{ '<|im_end|>\n' }}"
    "{% endfor %}{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
)
END = "<|im_end|>"
_LIKE_A_TOKEN = re.compile(r"<\|?[A-Za-z][\w/-]*\|?>|\[/?[A-Z]+\]|</s>")


def real_tokenizer(facts: ModelFacts, revision: str | None) -> PreTrainedTokenizerBase | None:
    """The model's own tokenizer; None where the hub or its cache does not give it. Raises ModelError for local ones."""
    local = facts.kind in ("folder", "gguf")
    if facts.kind == "bundled":
        return None
    hub: dict[str, Any] = {} if local else {"revision": revision, "local_files_only": hub_unreachable() is not None}
    try:
        tokenizer: PreTrainedTokenizerBase = AutoTokenizer.from_pretrained(
            *location(facts.name), **gguf(facts.name), **hub, trust_remote_code=False
        )
    except Exception as error:
        if local:
            raise cannot_load("tokenizer", facts.name, error) from error
        return None
    return tokenizer


def stand_in(template: str | None) -> PreTrainedTokenizerBase:
    """A small byte-level tokenizer, the same every time, that knows the control tokens of the recipe's template.

    It is made from lorafit's own texts, not from the data, so that a change of the data changes the rows alone.
    """
    found = inspect_template(template, {}) if template else None
    end = found.end_of_turn if found and _LIKE_A_TOKEN.fullmatch(found.end_of_turn or "") else END
    control = dict.fromkeys(("<|endoftext|>", "<|im_start|>", END, *_LIKE_A_TOKEN.findall(template or "")))
    inner = Tokenizer(models.BPE())
    inner.pre_tokenizer = pre_tokenizers.Sequence(
        [pre_tokenizers.Digits(individual_digits=True), pre_tokenizers.ByteLevel(add_prefix_space=False)]
    )
    inner.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=VOCABULARY,
        special_tokens=list(control),
        initial_alphabet=sorted(pre_tokenizers.ByteLevel.alphabet()),
        show_progress=False,
    )
    inner.train_from_iterator(_texts(), trainer)
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=inner, bos_token="<|endoftext|>", eos_token=end, pad_token="<|endoftext|>"
    )
    tokenizer.chat_template = template or CHATML
    return tokenizer


def _texts() -> Iterator[str]:
    text = resources.files("lorafit.evaluate").joinpath("texts/general.jsonl").read_text(encoding="utf-8")
    for line in text.splitlines():
        yield json.loads(line)["text"]
