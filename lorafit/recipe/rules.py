"""Rules that hold between the fields of a recipe, each with what to do about it.

Only what the recipe alone can tell is checked here; rules that need the model or the machine are
in `lorafit.plan`.
"""

from __future__ import annotations

from collections.abc import Iterator

from lorafit.errors import UsageError
from lorafit.gpus import find_gpu, parse_memory
from lorafit.recipe.layers import OF_4_BITS
from lorafit.recipe.schema import BUILT_IN_SETS, EvalSet, Recipe, Source
from lorafit.rows import COLUMNS, OPTIONAL, check_template
from lorafit.tree import KeyPath

Complaint = tuple[KeyPath, str]
"""A place in the recipe, and what is wrong there."""
SCHEDULE_KWARGS = {
    "cosine": ("num_cycles",),
    "cosine_with_restarts": ("num_cycles",),
    "cosine_with_min_lr": ("min_lr_rate", "min_lr", "num_cycles"),
    "polynomial": ("lr_end", "power"),
    "inverse_sqrt": ("timescale",),
    "warmup_stable_decay": (
        *("num_decay_steps", "num_stable_steps", "warmup_type"),
        *("decay_type", "min_lr_ratio", "num_cycles"),
    ),
}
"""What transformers' schedules take; the others take nothing."""


def cross_check(recipe: Recipe) -> Iterator[Complaint]:
    """Every broken rule as (path, message)."""
    if recipe.model.use_kernels and not recipe.model.trust_remote_code:
        yield (
            ("model", "use_kernels"),
            "kernels are code that is downloaded and run: set trust_remote_code: true",
        )
    yield from _quantization(recipe)
    yield from _lora(recipe)
    yield from _dataset(recipe)
    yield from _training(recipe)
    yield from _schedule(recipe)
    yield from _preference(recipe)
    yield from _hardware(recipe)
    yield from _merge(recipe)
    yield from _eval(recipe)


def _quantization(recipe: Recipe) -> Iterator[Complaint]:
    quantization = recipe.quantization
    if quantization is None:
        return
    if quantization.load_in_4bit == quantization.load_in_8bit:
        yield (
            ("quantization", "load_in_4bit"),
            "set exactly one of load_in_4bit and load_in_8bit to true, or remove the section",
        )
    else:
        bits, others = (8, OF_4_BITS) if quantization.load_in_8bit else (4, ("llm_int8_threshold",))
        for name in others:
            if name in quantization.model_fields_set:
                yield ("quantization", name), f"has no effect with load_in_{bits}bit; remove it"
    if recipe.trains_base:
        yield (
            ("quantization",),
            "quantized weights can't be trained in full; add `lora: {}`, or remove quantization",
        )


def _lora(recipe: Recipe) -> Iterator[Complaint]:
    lora, quantization = recipe.lora, recipe.quantization
    if lora is None:
        return
    start = str(lora.init_lora_weights)
    path = ("lora", "init_lora_weights")
    if start == "loftq" and not (quantization and quantization.load_in_4bit):
        yield path, "loftq corrects for 4-bit rounding: add quantization.load_in_4bit: true, or use another start"
    elif start == "loftq" and (lora.lora_alpha != lora.r or lora.use_rslora or lora.alpha_pattern or lora.rank_pattern):
        yield path, "loftq's start is the rounding error itself, so its scale must be 1: set lora_alpha to r"
    if start.startswith(("pissa", "olora")):
        if quantization:
            yield path, f"{start} changes the base's weights, which are quantized; use loftq, or remove quantization"
        if lora.use_rslora:
            yield path, f"{start} can't be saved for the unchanged base with use_rslora; turn one of them off"
        if lora.rank_pattern or lora.alpha_pattern:
            yield path, f"{start} can't be saved for the unchanged base with rank_pattern or alpha_pattern"
    if start == "eva" and quantization:
        yield path, "eva runs on an unquantized base only; remove quantization"
    if start.startswith(("eva", "loftq", "pissa", "olora")) and lora.use_dora:
        yield path, f"{start} does not go with use_dora"
    targets = lora.target_modules
    if isinstance(targets, tuple):
        if not targets:
            yield ("lora", "target_modules"), "is empty: nothing would be trained; use all-linear"
        for index, name in enumerate(targets):
            if name.split(".")[-1] == "lm_head":
                yield (
                    ("lora", "target_modules", index),
                    "TRL computes the loss from lm_head's weight directly, so an adapter on it would never be "
                    "trained; put lm_head in modules_to_save",
                )


def _dataset(recipe: Recipe) -> Iterator[Complaint]:
    dataset, training = recipe.dataset, recipe.training
    sources = [(("dataset", "train"), dataset.train)]
    if isinstance(dataset.validation, tuple):
        sources.append((("dataset", "validation"), dataset.validation))
    for where, group in sources:
        for index, source in enumerate(group):
            if source.format == "text" and dataset.loss_on != "all" and "loss_on" in dataset.model_fields_set:
                yield (
                    (*where, index, "format"),
                    f"text rows have no answer, so loss_on: {dataset.loss_on} has no meaning; use loss_on: all",
                )
            yield from _columns((*where, index), source)
            if where[1] == "validation" and "weight" in source.model_fields_set:
                yield (*where, index, "weight"), "has no effect on validation rows; remove it"
    if dataset.min_length is not None and dataset.min_length > training.max_length:
        yield ("dataset", "min_length"), f"is above training.max_length ({training.max_length}): no row would be left"
    if dataset.streaming:
        yield from _streaming(recipe)
    if dataset.validation is not None:
        return
    needs = "needs validation rows; add dataset.validation, such as 0.1"
    for name, is_asked in (
        ("early_stopping_patience", training.early_stopping_patience is not None),
        ("load_best_model_at_end", training.load_best_model_at_end is True),
        ("metric_for_best_model", training.metric_for_best_model is not None),
        ("evals_per_epoch", training.evals_per_epoch is not None),
        ("eval_strategy", training.eval_strategy in ("steps", "epoch")),
        ("per_device_eval_batch_size", "per_device_eval_batch_size" in training.model_fields_set),
    ):
        if is_asked:
            yield ("training", name), needs


def _columns(path: KeyPath, source: Source | EvalSet) -> Iterator[Complaint]:
    """The names in `columns` and `template` have to be the format's."""
    formats = COLUMNS if source.format == "auto" else [source.format]
    known = {column: None for name in formats for column in (*COLUMNS[name], *OPTIONAL[name])}
    templates = source.template if isinstance(source.template, dict) else {}
    for where, names in (("columns", source.columns), ("template", templates)):
        for column in names:
            if column not in known:
                yield (
                    (*path, where, column),
                    f"no such column in the format {source.format}, which has: {', '.join(known)}",
                )
    for column in templates:
        if column in source.columns:
            yield (*path, "columns", column), "is made by the template as well; give one of them"
    if isinstance(source.template, str) and source.format not in ("auto", "text"):
        yield (*path, "template"), f"one text makes the column `text`; for {source.format} name the columns it makes"
    texts: list[tuple[tuple[str, ...], str]] = [((name,), text) for name, text in templates.items()]
    if isinstance(source.template, str):
        texts.append(((), source.template))
    for rest, text in texts:
        try:
            check_template(text)
        except ValueError as error:
            yield (*path, "template", *rest), str(error)


def _streaming(recipe: Recipe) -> Iterator[Complaint]:
    dataset, training = recipe.dataset, recipe.training
    where = ("dataset", "streaming")
    if training.max_steps is None:
        yield where, "the number of rows of a stream is not known; add training.max_steps"
    if isinstance(dataset.validation, float):
        yield ("dataset", "validation"), "no fraction of a stream can be held out; name sources of their own"
    if training.dataloader_num_workers:
        yield ("training", "dataloader_num_workers"), "must be 0 for a stream, which is audited as it comes"
    if training.train_sampling_strategy == "group_by_length":
        yield ("training", "train_sampling_strategy"), "the lengths of a stream's rows are not known; use random"
    for what in ("eval", "save"):
        for name, asked in ((f"{what}_strategy", "epoch"), (f"{what}s_per_epoch", None)):
            given = getattr(training, name)
            if given == asked if asked else given is not None:
                yield ("training", name), f"a stream's epochs are not known; use {what}_strategy: steps"


def _training(recipe: Recipe) -> Iterator[Complaint]:
    training = recipe.training
    for one, other in (("max_steps", "num_train_epochs"), ("warmup_steps", "warmup_ratio")):
        if getattr(training, one) is not None and getattr(training, other) is not None:
            yield ("training", one), f"give either {one} or {other}"
    if training.global_batch_size is not None:
        size, steps = training.per_device_train_batch_size, training.gradient_accumulation_steps
        if steps != "auto":
            yield ("training", "global_batch_size"), "has no effect unless gradient_accumulation_steps is auto"
        elif size != "auto" and training.global_batch_size % size:
            yield (
                ("training", "global_batch_size"),
                f"is not a multiple of per_device_train_batch_size ({size})",
            )
    for what in ("eval", "save"):
        strategy, steps = getattr(training, f"{what}_strategy"), getattr(training, f"{what}_steps")
        if strategy == "steps" and steps is None:
            yield ("training", f"{what}_strategy"), f"needs {what}_steps"
        if strategy != "steps" and steps is not None:
            yield ("training", f"{what}_steps"), f"has no effect without {what}_strategy: steps"
        if strategy in ("no", "steps") and getattr(training, f"{what}s_per_epoch") is not None:
            yield (
                ("training", f"{what}s_per_epoch"),
                f"has no effect with {what}_strategy: {strategy}; remove one of them",
            )
    best = ("early_stopping_patience", "load_best_model_at_end", "metric_for_best_model")
    if training.eval_strategy == "no":
        for name in best:
            if getattr(training, name) not in (None, False, "auto"):
                yield ("training", name), "needs evaluations; remove eval_strategy: no"
    if (
        training.metric_for_best_model
        and training.load_best_model_at_end is False
        and not (training.early_stopping_patience)
    ):
        yield (
            ("training", "metric_for_best_model"),
            "has no effect with load_best_model_at_end: false; remove one of them",
        )
    keeps = training.load_best_model_at_end is True or (
        training.early_stopping_patience is not None and training.load_best_model_at_end == "auto"
    )
    if keeps and training.save_strategy == "no":
        yield ("training", "save_strategy"), "the best adapter can't be kept without checkpoints; use auto"


def _preference(recipe: Recipe) -> Iterator[Complaint]:
    section, training = recipe.preference, recipe.training
    if section is None:
        return
    losses = (section.loss_type,) if isinstance(section.loss_type, str) else section.loss_type
    if section.loss_weights is not None and len(section.loss_weights) != len(losses):
        yield ("preference", "loss_weights"), f"has {len(section.loss_weights)} weights for {len(losses)} losses"
    if section.label_smoothing and not {"robust", "exo_pair"} & set(losses):
        yield ("preference", "label_smoothing"), "has no effect but with loss_type robust or exo_pair"
    if "exo_pair" in losses and not section.label_smoothing:
        yield ("preference", "loss_type"), "exo_pair needs label_smoothing above 0, such as 0.001"
    if recipe.lora is not None and recipe.lora.init_lora_weights == "eva":
        yield ("lora", "init_lora_weights"), "eva starts from batches of single answers; use true, or start_from"
    if training.packing:
        yield ("training", "packing"), "pairs are not packed; remove it"
    if recipe.dataset.streaming:
        yield ("dataset", "streaming"), "the reference is computed before the first step, so pairs are not streamed"
    if recipe.dataset.loss_on == "all":
        yield ("dataset", "loss_on"), "of pairs the answers are compared; use assistant or completion"
    if training.train_sampling_strategy == "group_by_length":
        yield ("training", "train_sampling_strategy"), "pairs are not grouped by length; use random"


def _schedule(recipe: Recipe) -> Iterator[Complaint]:
    """Arguments that transformers would only miss, or refuse, when the first step is near."""
    name, given = recipe.training.lr_scheduler_type, recipe.training.lr_scheduler_kwargs
    known = SCHEDULE_KWARGS.get(name, ())
    for key in given:
        if key not in known:
            what = f"; it takes {', '.join(known)}" if known else ", which takes none; remove it"
            yield ("training", "lr_scheduler_kwargs", key), f"is no argument of {name}{what}"
    path = ("training", "lr_scheduler_type")
    if name == "cosine_with_min_lr" and ("min_lr" in given) == ("min_lr_rate" in given):
        yield path, "give one of min_lr_rate and min_lr in lr_scheduler_kwargs, such as min_lr_rate: 0.1"
    if name == "warmup_stable_decay" and "num_decay_steps" not in given:
        yield path, "needs num_decay_steps in lr_scheduler_kwargs"


def _hardware(recipe: Recipe) -> Iterator[Complaint]:
    hardware = recipe.hardware
    if hardware is None:
        return
    for name, read in (("gpu", find_gpu), ("vram", parse_memory)):
        value = getattr(hardware, name)
        if value is None:
            continue
        if hardware.device in ("cpu", "mps"):
            yield ("hardware", name), f"has no effect with device: {hardware.device}; remove it"
        try:
            read(value)
        except UsageError as error:
            yield ("hardware", name), str(error)


def _merge(recipe: Recipe) -> Iterator[Complaint]:
    if recipe.trains_base and "merge" in recipe.model_fields_set:
        yield ("merge",), "training in full leaves no adapter to merge; add `lora: {}`, or remove merge"
    elif recipe.quantization is None and recipe.merge.base_weights != "auto":
        yield ("merge", "base_weights"), "has no effect without quantization; remove it"


def _eval(recipe: Recipe) -> Iterator[Complaint]:
    section = recipe.eval
    names: list[str] = [*section.forgetting]
    for number, one in enumerate(section.sets):
        path = ("eval", "sets", number)
        if one.name in names or one.name in BUILT_IN_SETS:
            yield (*path, "name"), f"there is a set of the name {one.name} already; choose another"
        names.append(one.name)
        if one.path is None and one.name != "heldout":
            yield (*path, "name"), "needs a path; only heldout has rows without one"
        if one.path is None:
            for key in ("format", "columns", "template", "max_rows"):
                if key in one.model_fields_set:
                    yield (*path, key), "is for rows of a path; the run's held-out rows are read as in training"
        if one.role == "forgetting" and (one.metrics or one.options or one.limit or one.max_new_tokens):
            yield (
                (*path, "role"),
                "a set of role forgetting has no answers; remove metrics, options, limit and max_new_tokens",
            )
        if one.metrics:
            yield from _metrics((*path, "metrics"), one.metrics, section.trust_code)
        yield from _columns(path, one)
    if section.metrics:
        yield from _metrics(("eval", "metrics"), section.metrics, section.trust_code)
    for number, gate in enumerate(section.gates):
        from lorafit.evaluation.gates import parse  # numpy, which most recipes don't need

        try:
            parse(gate)
        except UsageError as error:
            yield ("eval", "gates", number), str(error)


def _metrics(path: KeyPath, specs: tuple[str | dict[str, str], ...], trusted: bool) -> Iterator[Complaint]:
    """Metrics that there are none of, and code that is not trusted.

    What a metric needs, such as trusted code and files, is looked for later.
    """
    from lorafit.evaluation.metrics import metric_info

    names: list[str] = []
    for number, spec in enumerate(specs):
        try:
            names.append(metric_info(spec).name)
        except UsageError as error:
            yield (*path, number), str(error)
        else:
            if isinstance(spec, str) and ":" in spec and not trusted:
                what = f"{spec} is Python code, which is not run; set eval.trust_code: true if you trust it"
                yield (*path, number), what
            if names[-1] in names[:-1]:
                yield (*path, number), f"two metrics of a set are named {names[-1]}: leave one out"
