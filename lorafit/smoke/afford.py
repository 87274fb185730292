"""How much of a recipe's batch a tiny model on a CPU does in seconds."""

from __future__ import annotations

import itertools
import json
import math

from lorafit.facts import ModelFacts
from lorafit.plan import Plan
from lorafit.rows import read_rows
from lorafit.smoke.settings import LEAST_ROWS, MOST_ROWS, Size

TOKENS_PER_STEP = 4096
LOGITS_PER_STEP = 1 << 28
ATTENTION_PER_PASS = 1 << 33
"""What a step may have, so that a run takes seconds: tokens, tokens x vocabulary, and, of packed rows, which are one
long row to a CPU's attention, tokens x tokens x width of all layers' queries."""
BYTES_PER_TOKEN = 3


def afford(meant: Plan, tiny: ModelFacts, steps: int) -> Size:
    """How much of the planned batch a CPU does in a second or two."""
    batch = meant.training_kwargs["per_device_train_batch_size"]
    passes = meant.training_kwargs["gradient_accumulation_steps"]
    longest = meant.data.max_length
    row = min(_row_tokens(meant), longest)
    width = longest if meant.data.packing else row
    limit = min(TOKENS_PER_STEP, LOGITS_PER_STEP // int(tiny.text_config["vocab_size"]))
    at_once = min(limit, math.isqrt(ATTENTION_PER_PASS // _queries(tiny)) // 256 * 256) if meant.data.packing else limit
    while batch * width > at_once and batch > 1:
        batch = -(-batch // 2)
    while batch * passes * width > limit and passes > 1:
        passes = -(-passes // 2)
    if width > at_once:
        longest = at_once
    needed = steps * batch * passes * (longest / row if meant.data.packing else 1)
    rows = int(min(max(needed, LEAST_ROWS), MOST_ROWS))
    return Size(batch, passes, longest, rows, batch * (longest if meant.data.packing else row))


def _queries(tiny: ModelFacts) -> int:
    """The width of the queries of all layers together."""
    config, hidden = tiny.text_config, int(tiny.text_config.get("hidden_size", 64))
    heads = int(config.get("num_attention_heads") or 1)
    return (tiny.layers or 2) * heads * int(config.get("head_dim") or -(-hidden // heads))


def _row_tokens(meant: Plan) -> int:
    """Tokens of a row, roughly."""
    lengths = [
        len(json.dumps(row.fields, ensure_ascii=False, default=str).encode("utf-8", "replace")) // BYTES_PER_TOKEN
        for source in meant.data.train
        if source.hub is None
        for row in itertools.islice(read_rows(source.path), LEAST_ROWS)
    ]
    return max(sum(lengths) // len(lengths), 1) if lengths else meant.data.max_length
