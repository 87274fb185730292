"""The data sources with their formats and rows, how rows become tokens (length, chat template, padding), and the
files of an evaluation."""

from __future__ import annotations

import dataclasses
import datetime
import itertools
import os
from collections.abc import Sequence
from typing import Any, Literal

from lorafit.bounds import LARGEST_TEMPLATE, read_text
from lorafit.errors import DataError, ModelError
from lorafit.facts.template import (
    TemplateFacts,
    has_reasoning,
    inspect_template,
    thinking_switch,
    trl_templates,
    uses_date,
    variables,
    with_defaults,
)
from lorafit.plan.methods import method_of
from lorafit.plan.values import Context, DataPlan, SourcePlan
from lorafit.progress import stage
from lorafit.recipe import Recipe, Source
from lorafit.rows import (
    COLUMNS,
    OPTIONAL,
    Fault,
    Format,
    Row,
    Shape,
    detect_format,
    digest,
    is_local,
    read_rows,
    size_digest,
    to_example,
)
from lorafit.text import first_line, near, printable
from lorafit.tree import key_path
from lorafit.written import expanded

_ROWS = 1000
"""First rows of a source that are looked at for reasoning; the audit counts them all."""


Reading = Literal["nothing", "formats", "digests"]
"""How far sources are looked into: not at all, their first rows, or whole for their hash."""


def plan_sources(context: Context, reading: Reading) -> tuple[list[SourcePlan], list[SourcePlan]]:
    """The sources of training rows and those of validation rows. Those that can't be read are noted as faults."""
    dataset = context.recipe.dataset
    validation = dataset.validation if isinstance(dataset.validation, tuple) else ()
    return (
        [_source(context, source, f"dataset.train.{i}", reading) for i, source in enumerate(dataset.train)],
        [_source(context, source, f"dataset.validation.{i}", reading) for i, source in enumerate(validation)],
    )


def counted(source: SourcePlan) -> SourcePlan:
    """The source with its number of rows, if it is local."""
    if source.hub is not None:
        return source
    found = itertools.islice(read_rows(source.path), source.max_rows)
    with stage(f"counting {source.path}", unit="rows") as counting:
        for _ in found:
            counting.done += 1
    return dataclasses.replace(source, rows=int(counting.done))


def unread_columns(row: Row, format: Format, source: SourcePlan) -> list[str]:
    """A row's columns that its format does not read. A template may read any."""
    if source.template is not None:
        return []
    known = {source.columns.get(name, name) for name in (*COLUMNS[format], *OPTIONAL[format])}
    read = known | {name.split(".")[0] for name in known}
    return [printable(name) for name in row.fields if name not in read]


def _source(context: Context, source: Source, key: str, reading: Reading) -> SourcePlan:
    asked = SourcePlan(
        source.path,
        key,
        None if source.format == "auto" else source.format,
        dict(source.columns),
        dict(source.template) if isinstance(source.template, dict) else source.template,
        source.weight,
        source.max_rows,
    )
    if not is_local(source.path):
        hub = {"split": source.split, "name": source.name, "revision": source.revision}
        return dataclasses.replace(asked, hub=hub)
    for name in ("split", "name", "revision"):
        if name in source.model_fields_set:
            context.wrong((*key_path(key), name), "is for hub data sets; this is a local path")
    if reading == "nothing":
        return asked
    try:
        return _looked_into(context, asked, reading)
    except DataError as error:
        context.faults.append(((*key_path(key), "path"), error))
        return asked


def _looked_into(context: Context, source: SourcePlan, reading: Reading) -> SourcePlan:
    """The source with its format and, if asked for, its hash. Raises DataError."""
    key = source.key
    first = next(read_rows(source.path), None)
    if first is None:
        raise DataError(f"{source.path}: there are no rows")
    format = source.format
    if format is None:
        format, reason = detect_format(first, source.columns, source.template, key)
        context.choose(f"{key}.format", format, reason)
    unread = unread_columns(first, format, source)
    if unread:
        context.remarks.append(f"{key}: not read: the column{'s' * (len(unread) > 1)} {', '.join(unread)}.")
    method = method_of(context.recipe)
    if format not in method.reads:
        raise DataError(f"{key}: {method.title} learns nothing from rows in the format {format}")
    if remark := method.reads[format]:
        context.remarks.append(f"{key}: {remark}.")
    if format == "prompt_completion" and _has_template(context) and _is_plain(first, source.shape(format)):
        names = ", ".join(f"{name}: {source.columns.get(plain, plain)}" for name, plain in _AS_TURNS)
        context.remarks.append(
            f"{key}: prompts and completions are joined as plain text, without the model's chat template; with it: "
            f"format: alpaca, columns: {{{names}}}."
        )
    streamed = context.recipe.dataset.streaming and key.startswith("dataset.train")
    if reading == "formats":
        return dataclasses.replace(source, format=format)
    sha256 = size_digest(source.path) if streamed else digest(source.path)
    return dataclasses.replace(source, format=format, sha256=sha256)


_AS_TURNS = (("instruction", "prompt"), ("output", "completion"))


def _has_template(context: Context) -> bool:
    tokenizer = context.facts.tokenizer
    return context.recipe.model.chat_template is not None or bool(tokenizer and tokenizer.chat_template)


def _is_plain(row: Row, shape: Shape) -> bool:
    """Whether a prompt and completion are text, and not turns. Raises DataError."""
    try:
        return to_example(row, shape).prompt is not None
    except Fault:  # counted by the audit
        return True


def choose_max_length(context: Context) -> int:
    """The most tokens that a row may have."""
    training, limit = context.recipe.training, context.facts.max_position_embeddings
    asked = training.max_length
    if limit is None or asked <= limit:
        return asked
    if "max_length" in training.model_fields_set:
        context.wrong(("training", "max_length"), f"{asked} is above the model's context of {limit} tokens")
        return asked
    return context.choose("training.max_length", limit, f"the model's context is shorter than {asked} tokens")


def read_chat_template(context: Context) -> str | None:
    """The text of the recipe's chat template, a file or one of TRL's; None for the tokenizer's own."""
    path = context.recipe.model.chat_template
    if path is None:
        return None
    known = trl_templates()
    if not os.path.exists(expanded(path)) and path.removesuffix(".jinja") == path and "/" not in path:
        if path not in known:
            hint = near(path, list(known))
            context.wrong(("model", "chat_template"), f"no such file, and TRL ships no template of that name{hint}")
            return None
        path = str(known[path])
    try:
        return read_text(expanded(path), LARGEST_TEMPLATE)
    except (OSError, ValueError, RuntimeError) as error:  # not UTF-8, a NUL in the name; no home
        reason = error.strerror if isinstance(error, OSError) else error
        context.wrong(("model", "chat_template"), f"can't be read: {path}: {first_line(reason)}")
        return None


def plan_data(
    context: Context,
    train: list[SourcePlan],
    validation: list[SourcePlan],
    max_length: int,
    chat_template: str | None,
    looks: bool = True,
) -> DataPlan:
    """What is read, and how it becomes tokens.

    Args:
        looks: whether the sources' first rows may be read.
    """
    recipe = context.recipe
    template_kwargs = dict(recipe.model.chat_template_kwargs)
    if any(source.format not in ("text", "prompt_completion", None) for source in (*train, *validation)):
        try:
            template_kwargs |= _conversations(context, chat_template, (*train, *validation) if looks else ())
        except ModelError as error:  # it has no end
            if chat_template is None:
                raise
            context.wrong(("model", "chat_template"), str(error))
    _padding(context)
    fraction = recipe.dataset.validation if isinstance(recipe.dataset.validation, float) else None
    tokenizer = context.facts.tokenizer
    template = chat_template or (tokenizer.chat_template if tokenizer else None)
    return DataPlan(
        train=tuple(train),
        validation=tuple(validation),
        validation_fraction=fraction,
        loss_on=recipe.dataset.loss_on,
        max_length=max_length,
        packing=recipe.training.packing,
        seed=recipe.training.seed,
        chat_template=chat_template,
        trust_remote_code=recipe.model.trust_remote_code,
        min_length=recipe.dataset.min_length,
        excess_length_strategy=recipe.dataset.excess_length_strategy,
        streaming=recipe.dataset.streaming,
        shuffle=recipe.training.train_sampling_strategy != "sequential",
        audit=recipe.dataset.audit.model_dump(include=set(method_of(recipe).rules)),
        date=datetime.date.today().isoformat() if template and uses_date(template) else None,
        tokenizer_sha256=tokenizer.sha256 if tokenizer else None,
        chat_template_kwargs=template_kwargs,
        vocab_size=context.facts.vocab_size,
        method=method_of(recipe).name,
    )


def _conversations(context: Context, replaced: str | None, sources: Sequence[SourcePlan]) -> dict[str, Any]:
    """How the answers in conversations end and are found, as far as the files tell.

    Returns the variables of the chat template that are chosen for them.
    """
    recipe, tokenizer = context.recipe, context.facts.tokenizer
    if tokenizer is None and replaced is None:
        return {}
    template = replaced or (tokenizer.chat_template if tokenizer else None)
    loss_on = recipe.dataset.loss_on
    if template is None:
        with_packing = " (with packing, this would go unnoticed)" if recipe.training.packing else ""
        context.wrong(
            ("dataset", "loss_on"),
            f"the tokenizer has no chat template, so conversations can't be rendered and loss_on: {loss_on} can't "
            f"be masked{with_packing}; set model.chat_template to a Jinja file",
        )
        return {}
    eos = tokenizer.eos_token if tokenizer else None
    special: dict[str, str | None] = {
        "eos_token": eos or "",
        "bos_token": (tokenizer.bos_token if tokenizer else None) or "",
        "pad_token": (tokenizer.pad_token if tokenizer else None) or "",
    }
    given = recipe.model.chat_template_kwargs
    known = variables(template)
    unknown = [name for name in given if name not in known]
    if unknown:
        context.wrong(
            ("model", "chat_template_kwargs", unknown[0]),
            f"the chat template has no variable {unknown[0]!r}{near(unknown[0], sorted(known))}",
        )
    switched = _without_reasoning(context, with_defaults(template, given), special, sources)
    facts = inspect_template(with_defaults(template, given | switched), special)
    context.choose("chat template", _template_name(replaced, recipe), _how_masked(facts))
    if facts.end_of_turn is None:
        context.remarks.append("The chat template could not be probed; the rows will show whether it renders.")
    elif facts.end_of_turn == "":
        context.choose(
            "end of turn", eos, "the chat template does not end an answer; the end token is added and learned"
        )
    else:
        context.choose("end of turn", facts.end_of_turn, "the chat template ends an answer with it; it is learned")
    return switched


def _without_reasoning(
    context: Context, template: str, special: dict[str, str | None], sources: Sequence[SourcePlan]
) -> dict[str, Any]:
    """The variable that switches reasoning off, where the first rows have none and the template waits for some."""
    name = thinking_switch(template, special)
    if name is None or not sources or any(source.hub is not None or source.format is None for source in sources):
        return {}
    if name in context.recipe.model.chat_template_kwargs:
        return {}
    try:
        if any(map(reasons, sources)):
            return {}
    except DataError:
        return {}
    key = f"model.chat_template_kwargs.{name}"
    return {name: context.choose(key, False, "no row has reasoning; the template would leave room for it")}


def reasons(source: SourcePlan) -> bool:
    """Whether one of the first rows of a source has reasoning before an answer. Raises DataError."""
    assert source.format is not None
    for row in itertools.islice(read_rows(source.path), min(_ROWS, source.max_rows or _ROWS)):
        try:
            example = to_example(row, source.shape(source.format))
        except Fault:
            continue
        for message in example.messages:
            if message.get("reasoning_content") or has_reasoning(message["content"] or ""):
                return True
    return False


def _template_name(replaced: str | None, recipe: Recipe) -> str:
    return str(recipe.model.chat_template) if replaced else "the tokenizer's"


def _how_masked(facts: TemplateFacts) -> str:
    if facts.marks_answers:
        return "marks its answers itself"
    if facts.has_training_version:
        return "answers are marked by TRL's training version of it"
    return "answers are found by rendering the conversation turn by turn"


def _padding(context: Context) -> None:
    tokenizer = context.facts.tokenizer
    if tokenizer is None:
        return
    token, reason = tokenizer.pad_token, "the tokenizer's own"
    if token is None:
        token, reason = tokenizer.eos_token, "the tokenizer has none; padding is masked by position, not by token"
    elif token == tokenizer.eos_token:
        reason = "same as the end token; padding is masked by position, so the end is learned"
    context.choose("padding token", token, reason)
