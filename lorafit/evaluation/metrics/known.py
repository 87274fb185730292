"""The metrics that a recipe may name, and how they are made."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from typing import Literal

from lorafit.errors import UsageError
from lorafit.evaluation.metrics import answers
from lorafit.evaluation.metrics.answers import AnswerMetric, PairScore, load_extra
from lorafit.evaluation.metrics.custom import check_function, custom_info, custom_metric
from lorafit.evaluation.results import Better, Metric
from lorafit.text import near

MetricSpec = str | Mapping[str, str]
"""`exact_match`, `{'regex': PATTERN}` or `module:function`."""

DEFAULTS = ("exact_match", "exact_match_normalized", "token_f1")
JSON_DEFAULTS = ("json_match", "json_valid")
POSSIBLE_DEFAULTS = (*DEFAULTS, *JSON_DEFAULTS, "repetition")
"""All that may be measured where a recipe names none; of which, the expected answers decide."""
RESERVED = frozenset(
    {"loss", "perplexity", "bits_per_byte", "token_accuracy", "kl", "accuracy", "accuracy_per_byte", "macro_f1"}
    | {"ended", "length", "agreement", "judge"}
)
"""Names of an evaluation's other figures, which a metric of the user's own must not take."""


@dataclass(frozen=True)
class KnownMetric:
    """A metric that comes with lorafit.

    Attributes:
        plain: its score without an argument; None: it needs one.
        bind: makes its score from an argument; None: it takes none.
        argument: what the argument is, such as PATTERN.
        needs: a package of the extra `eval`, which a score with an argument loads itself.
    """

    info: Metric
    plain: PairScore | None = None
    bind: Callable[[str], PairScore] | None = None
    argument: str = ""
    needs: str | None = None

    @property
    def about(self) -> str:
        """A sentence about it: the first line of its function's docstring, or of both if its argument is optional."""
        functions = [function for function in (self.plain, self.bind) if function is not None]
        return " With an argument: ".join((inspect.getdoc(function) or "").partition("\n")[0] for function in functions)

    def check(self, argument: str | None) -> None:
        """Raises UsageError if an argument is missing, one too many, or wrong, as far as it alone can tell."""
        name = self.info.name
        if argument is None:
            if self.plain is None:
                raise UsageError(f"metric {name} needs an argument: write `{name}: {self.argument}`")
        elif self.bind is None:
            raise UsageError(f"metric {name} takes no argument: write `{name}` instead of `{name}: {argument}`")
        elif not argument:
            raise UsageError(f"metric {name}: the argument is empty: write `{name}: {self.argument}`")
        elif not self.needs:
            self.bind(argument)

    def make(self, argument: str | None) -> PairScore:
        """Its score. Raises UsageError as `check`, or if the file that is its argument is wrong; MissingError."""
        self.check(argument)
        if self.bind is not None and argument is not None:
            return self.bind(argument)
        if self.needs:
            load_extra(self.needs, self.info.name)
        assert self.plain is not None
        return self.plain


def _metric(
    name: str,
    label: str,
    plain: PairScore | None = None,
    *,
    unit: Literal["share", "number"] = "share",
    better: Better = "higher",
    bind: Callable[[str], PairScore] | None = None,
    argument: str = "",
    needs: str | None = None,
) -> KnownMetric:
    return KnownMetric(Metric(name=name, label=label, unit=unit, better=better), plain, bind, argument, needs)


METRICS: Mapping[str, KnownMetric] = {
    known.info.name: known
    for known in (
        _metric("exact_match", "exact match", answers.exact_match),
        _metric("exact_match_normalized", "exact match, normalized", answers.exact_match_normalized),
        _metric("token_f1", "token F1", answers.token_f1),
        _metric("contains", "contains", answers.contains, bind=answers.contains_text, argument="TEXT"),
        _metric("regex", "matches the expression", bind=answers.regex, argument="PATTERN"),
        _metric("json_valid", "is JSON", answers.json_valid),
        _metric("json_match", "same JSON", answers.json_match),
        _metric(
            "json_schema",
            "fits the schema",
            bind=answers.json_schema,
            argument="PATH",
            needs="jsonschema.validators",
        ),
        _metric("rouge_1", "ROUGE-1", answers.rouge_1),
        _metric("rouge_2", "ROUGE-2", answers.rouge_2),
        _metric("rouge_l", "ROUGE-L", answers.rouge_l),
        _metric("chrf", "chrF", answers.chrf, needs="sacrebleu.metrics"),
        _metric("bleu", "BLEU", answers.bleu, needs="sacrebleu.metrics"),
        _metric("words", "words", answers.words, unit="number", better=None),
        _metric("repetition", "repetition", answers.repetition, better="lower"),
    )
}
"""Metrics by name, in the order of the documentation."""


def metric_info(spec: MetricSpec) -> Metric:
    """The description of a metric. No file is read, and no code imported.

    Raises UsageError if there is no such metric, or its argument is wrong, as far as the recipe alone can tell.
    """
    name, argument = _parted(spec)
    if ":" in name:
        return _own(name)
    if name not in METRICS:
        raise _unknown(name)
    METRICS[name].check(argument)
    return METRICS[name].info


def check_metric(spec: MetricSpec) -> None:
    """Raises UsageError for what `make_metric` would refuse, as far as files tell, and MissingError. Runs no code."""
    metric_info(spec)
    name, argument = _parted(spec)
    if ":" in name:
        check_function(name)
    else:
        METRICS[name].make(argument)


def make_metric(spec: MetricSpec) -> AnswerMetric:
    """The metric that a recipe names.

    Raises UsageError if there is no such metric, or its argument is wrong; MissingError.
    """
    info = metric_info(spec)
    name, argument = _parted(spec)
    if ":" in name:
        return custom_metric(name)
    score = METRICS[name].make(argument)
    return AnswerMetric(info, lambda judged: score(judged.answer, judged.expected))


def _parted(spec: MetricSpec) -> tuple[str, str | None]:
    """The name of a metric and its argument."""
    if isinstance(spec, str):
        return spec, None
    if len(spec) != 1:
        raise UsageError(f"a metric is one name or one `name: argument`, not {dict(spec)}")
    ((name, argument),) = spec.items()
    if ":" in name:
        raise UsageError(f"metric {name}: a metric of your own takes no argument")
    return name, argument


def _own(spec: str) -> Metric:
    first, _, name = spec.partition(":")
    known = METRICS.get(first.strip())
    if known is not None:
        how = f"an argument stands outside of quotes: `{first.strip()}: {name.strip()}`"
        raise UsageError(f"metric '{spec}': {how if known.bind else f'{first.strip()} takes no argument'}")
    if name in METRICS or name in RESERVED:
        raise UsageError(f"metric {spec}: there is a figure {name} already; give the function another name")
    return custom_info(spec)


def _unknown(name: str) -> UsageError:
    hint = near(name, METRICS)
    known = f" There are {', '.join(METRICS)}" if "did you mean" in hint else ""
    return UsageError(f"there is no metric '{name}'{hint}{known}; or your own, as module:function")


def make_metrics(specs: Iterable[MetricSpec]) -> tuple[AnswerMetric, ...]:
    """The metrics of a set. Raises UsageError as make_metric does, and if two have the same name."""
    made: dict[str, AnswerMetric] = {}
    for spec in specs:
        metric = make_metric(spec)
        if metric.info.name in made:
            raise UsageError(f"two metrics of a set are named {metric.info.name}: leave one out")
        made[metric.info.name] = metric
    return tuple(made.values())


def default_metrics(expected: Iterable[str]) -> tuple[MetricSpec, ...]:
    """The metrics where a recipe names none: those of JSON too if every expected answer is a JSON object or array."""
    given = list(expected)
    is_json = bool(given) and all(map(answers.is_json, given))
    return (*DEFAULTS, *(JSON_DEFAULTS if is_json else ()), "repetition")
