"""Running the models on the sets, into records: likelihoods, divergences, options and answers."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from typing import Any, TypeVar

import torch
from rich.progress import track

from lorafit.console import Console
from lorafit.data import special_tokens
from lorafit.evaluate.contenders import BASE, Contender, Loaded
from lorafit.evaluate.engine.choices import choices
from lorafit.evaluate.engine.greedy import end_tokens, generate
from lorafit.evaluate.engine.likelihood import divergences, likelihoods
from lorafit.evaluate.records import Records
from lorafit.evaluate.sets import EvalRows, OptionRow, Prompts, said

T = TypeVar("T")


def measure(
    loaded: Loaded,
    contender: Contender,
    rows: EvalRows,
    options: list[OptionRow],
    max_new_tokens: int,
    records: Records,
    console: Console,
) -> None:
    """Everything about one model on one set that is not in the records yet."""
    model = loaded.use(contender.name if contender.kind == "adapter" else BASE)
    name, pad = (rows.name, contender.name), rows.tokenizer.pad_token_id
    shows = rows.role == "forgetting" and contender.kind == "adapter"
    with torch.inference_mode():
        if shows:
            _divergences(loaded, model, rows, name, pad, records, console)
        else:
            _likelihoods(model, rows, name, pad, records, console)
        if options:
            _options(model, options, name, pad, records, console)
        if rows.questions:
            _answers(model, rows, name, max_new_tokens, records, console)


def _likelihoods(
    model: Any, rows: EvalRows, name: tuple[str, str], pad: int, records: Records, console: Console
) -> None:
    names = (*name, "likelihood")
    done = records.done(*names)
    if len(done) == len(rows.rows):
        return
    with records.writer(*names) as add:
        made = likelihoods(model, rows.rows, pad, done)
        for one in _shown(made, len(rows.rows) - len(done), names, console):
            add({"row": one.row, "nll": one.nll, "tokens": one.tokens, "hits": one.hits})


def _divergences(
    loaded: Loaded, model: Any, rows: EvalRows, name: tuple[str, str], pad: int, records: Records, console: Console
) -> None:
    names = (*name, "divergence")
    done = records.done(*names)
    if len(done) == len(rows.rows):
        return
    with records.writer(*name, "likelihood", timed=False) as add_own, records.writer(*names) as add:
        made = divergences(loaded.base, model, rows.rows, pad, done)
        for one in _shown(made, len(rows.rows) - len(done), names, console):
            own = one.likelihood
            add_own({"row": own.row, "nll": own.nll, "tokens": own.tokens, "hits": own.hits})
            add({"row": one.row, "kl": one.kl, "tokens": one.tokens})


def _options(
    model: Any, options: list[OptionRow], name: tuple[str, str], pad: int, records: Records, console: Console
) -> None:
    names = (*name, "options")
    known = records.done(*names)
    left = [option for option in options if option.row not in known]
    if not left:
        return
    with records.writer(*names) as add:
        made = choices(model, [option.choice for option in left], pad)
        for one in _shown(made, len(left), names, console):
            add({"row": left[one.row].row, "logprobs": one.logprobs})


def _answers(
    model: Any, rows: EvalRows, name: tuple[str, str], max_new_tokens: int, records: Records, console: Console
) -> None:
    names = (*name, "answers")
    known = records.done(*names)
    done = {number for number, row in enumerate(rows.questions) if row in known}
    if len(done) == len(rows.questions):
        return
    special = set(special_tokens(rows.tokenizer).values())
    lengths, ends = [], set()
    for row in rows.questions:
        question = rows.question(row)
        lengths.append(question.length)
        ends |= {question.end} & special
    with records.writer(*names) as add:
        made = generate(
            model,
            Prompts(rows),
            end_tokens(model, rows.tokenizer, ends),
            rows.tokenizer.pad_token_id,
            max_new_tokens,
            done,
            lengths,
        )
        for one in _shown(made, len(rows.questions) - len(done), names, console):
            row = rows.questions[one.row]
            add(
                {
                    "row": row,
                    "text": said(one.ids, rows.question(row).prompt, rows.tokenizer),
                    "tokens": len(one.ids) + one.ended,
                    "ended": one.ended,
                    "seconds": one.seconds,
                }
            )


def _shown(made: Iterable[T], total: int, names: tuple[str, ...], console: Console) -> Iterator[T]:
    """The same, with progress on a terminal."""
    if not console.is_terminal:
        return iter(made)
    description = f"{names[1]} · {names[0]}: {names[2]}"
    return iter(track(made, description=description, total=total, console=console, transient=True))
