"""Direct preference optimization: pairs of answers in tokens, TRL's trainer, and what must hold before its steps."""

from __future__ import annotations

import dataclasses
import itertools
from collections.abc import Iterable, Iterator
from typing import TYPE_CHECKING

import numpy as np
from transformers import PreTrainedTokenizerBase

from lorafit.engine.data.encode import Lengths, TokenRow, read_examples, tokenize
from lorafit.engine.data.render import Renderer
from lorafit.engine.methods.sft import assemble
from lorafit.errors import DataError
from lorafit.plan.values import DataPlan, Plan
from lorafit.rows import Example, Row, Shape, place_of, with_rejected
from lorafit.rows.audit import SourceAudit
from lorafit.run.directory import RunDir

if TYPE_CHECKING:
    from lorafit.engine.data.prepare import Prepared
    from lorafit.engine.pairs import PairTrainer

_AT_ONCE = 1000
"""Pairs that are rendered and tokenized together."""


def encode(
    rows: Iterable[Row], shape: Shape, plan: DataPlan, renderer: Renderer, audit: SourceAudit
) -> Iterator[list[TokenRow]]:
    """Tokens of pairs, in batches: the chosen answer's row, with the rejected one's beside it. Raises DataError.

    Both answers are rendered as supervised fine-tuning renders a row, so that each ends as it would there. A pair of
    which one answer can't be learned is left out and counted.
    """
    lengths = Lengths.of(plan)
    examples = read_examples(rows, shape, audit)
    lost = SourceAudit(audit.path)
    while chunk := list(itertools.islice(examples, _AT_ONCE)):
        if single := next((example for example in chunk if example.rejected is None), None):
            raise DataError(f"{single.place}: has no rejected answer; pairs need `chosen` and `rejected`")
        chosen = _by_number(chunk, renderer, lengths, audit)
        paired = (example for example in chunk if (example.file, example.number) in chosen)
        rejected = _by_number(map(with_rejected, paired), renderer, lengths, lost)
        for number in [
            number for number, row in chosen.items() if number in rejected and _equal(row, rejected[number])
        ]:
            cut = rejected.pop(number)
            line = f"{place_of(*number)}: max_length {plan.max_length} cuts off all in which the two answers differ"
            lost.count("answers_cut_off", line)
            lost.drop("answers_cut_off")
            _take_out(cut, lost)
        for number in chosen.keys() - rejected.keys():
            _take_out(chosen.pop(number), audit)
        yield [_pair(row, rejected[number]) for number, row in chosen.items()]
    audit.tokens += lost.tokens
    audit.supervised_tokens += lost.supervised_tokens
    audit.take_in(lost)


def _equal(chosen: TokenRow, rejected: TokenRow) -> bool:
    return np.array_equal(chosen.input_ids, rejected.input_ids)


def _take_out(row: TokenRow, audit: SourceAudit) -> None:
    """Count a row no more that can't be a pair."""
    audit.rows -= 1
    audit.tokens -= len(row.input_ids)
    audit.supervised_tokens -= row.learned


def _pair(chosen: TokenRow, rejected: TokenRow) -> TokenRow:
    return dataclasses.replace(
        chosen,
        rejected_ids=rejected.input_ids,
        rejected_labels=rejected.labels,
        learned=chosen.learned + rejected.learned,
        key=chosen.key ^ (rejected.key >> 1),  # equal pairs are equal in both
    )


def _by_number(
    examples: Iterable[Example], renderer: Renderer, lengths: Lengths, audit: SourceAudit
) -> dict[tuple[str, int], TokenRow]:
    made = itertools.chain.from_iterable(tokenize(examples, renderer, lengths, audit))
    return {(row.file, row.number): row for row in made}


def build(plan: Plan, run: RunDir, data: Prepared, tokenizer: PreTrainedTokenizerBase) -> PairTrainer:
    """The trainer with model, adapter and data in place. Raises ModelError, DoesNotFitError."""
    from lorafit.engine.pairs import PairCollator, PairTrainer, pair_arguments, unhashed

    with unhashed():
        collator = PairCollator(tokenizer.pad_token_id)
        return assemble(PairTrainer, pair_arguments, plan, run, data, tokenizer, data_collator=collator)


def check(trainer: PairTrainer, plan: Plan) -> None:
    """Compute the reference, and see that the policy starts where it should. Raises ModelError."""
    from lorafit.engine.pairs import check_start, refer

    refer(trainer, plan)
    check_start(trainer, plan)
