"""The commands' options, each written once, as a field of a frozen type: help, limits, and rules between them."""

from __future__ import annotations

import math
import re
from collections.abc import Callable, Iterable
from dataclasses import dataclass, field, fields
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Literal, NamedTuple, TextIO

from lorafit.errors import UsageError
from lorafit.text import near

if TYPE_CHECKING:
    from lorafit.hardware import Hardware
    from lorafit.plan import Plan
    from lorafit.run.directory import RunDir

Completes = Literal["recipes", "runs", "keys", "gpus"]
"""What a shell offers for a value: a function of lorafit.cli.complete."""


@dataclass(frozen=True)
class Option:
    """How a field is typed by a name. A field of several values is repeatable, and a Literal's choices are checked.

    Attributes:
        typed: names and what stands for the value, such as `--set KEY=VALUE`. No name: the field's own, with dashes;
            no value: its type's.
        parse: makes a value of a text (of each, where the option is repeatable), or raises UsageError, whose message
            begins with the text.
        joined: whether one text holds all values of a field of several, which `parse` takes apart.
        min: the least number.
    """

    help: str
    typed: str = ""
    completes: Completes | None = None
    parse: Callable[[str], Any] | None = None
    joined: bool = False
    min: float | None = None


class Argument(Option):
    """How a field is typed by its place. A field of several values takes all that is typed."""


RunPath = Annotated[Path, Argument("A run directory, such as runs/quickstart.", "RUN", "runs")]
Overrides = Annotated[tuple[str, ...], Option("Override a value of the recipe; repeatable.", "--set KEY=VALUE", "keys")]
ForGpu = Annotated[str | None, Option("Plan for this GPU, not what the recipe is meant for.", "NAME", "gpus")]
Here = Annotated[bool, Option("Plan for this machine.")]
Locked = Annotated[bool, Option("Refuse any drift from the lock that the run was trained with.")]


@dataclass(frozen=True)
class Options:
    """What a command is asked to do: its arguments and options, each written once, as a field."""

    def check(self) -> None:
        """Raises UsageError for what doesn't go together."""


@dataclass(frozen=True)
class JsonOptions(Options):
    """What a command is asked to do whose result can be had as JSON."""

    as_json: Annotated[bool, Option("Print the result as JSON.", "--json")] = field(default=False, kw_only=True)


@dataclass(frozen=True)
class RecipeOptions(JsonOptions):
    """What a command is asked to do with one recipe."""

    config: Annotated[Path, Argument("The recipe, a YAML file.", "CONFIG", "recipes")]
    overrides: Overrides = ()


def hardware_for(gpu: str | None, here: bool = False) -> Hardware | None:
    """What --gpu and --here ask to plan for; None: what a recipe is meant for. Raises UsageError."""
    if gpu is not None and here:
        raise UsageError("--gpu and --here exclude each other")
    from lorafit.gpus import find_gpu
    from lorafit.hardware import detect, hardware_of

    return hardware_of(find_gpu(gpu)) if gpu is not None else detect() if here else None


def run_of(path: Path) -> RunDir:
    """A run by its directory, or by the recipe that says where it is. Raises RecipeError."""
    from lorafit.recipe import Recipe
    from lorafit.run.directory import RunDir, located

    return RunDir(located(Recipe.load(path).output_dir or f"runs/{path.stem}" if path.is_file() else path))


@dataclass(frozen=True)
class ValidateOptions(JsonOptions):
    """What is checked, and for which machine; with `here`, what that lacks is a fault."""

    paths: Annotated[tuple[str, ...], Argument("Recipes, folders of them, or patterns.", "PATH", "recipes")]
    overrides: Overrides = ()
    deep: Annotated[bool, Option("Tokenize and audit all data as well; loads torch, but no weights.")] = False
    skip: Annotated[
        tuple[str, ...], Option("Leave a part out, such as data that is elsewhere.", "data|model|memory")
    ] = ()
    gpu: ForGpu = None
    here: Here = False
    strict: Annotated[bool, Option("What can't be checked is a fault.")] = False
    format: Annotated[str | None, Option("text, json, github, junit or sarif.  [default: text]", "FORMAT")] = None

    @property
    def hardware(self) -> Hardware | None:
        """To plan for; None: what each recipe is meant for. Raises UsageError."""
        return hardware_for(self.gpu, self.here)

    def check(self) -> None:
        """Raises UsageError for two formats at once."""
        if self.as_json and self.format not in (None, "json"):
            raise UsageError(f"--json and --format {self.format} exclude each other")


@dataclass(frozen=True)
class InitOptions(Options):
    """A first recipe as it was asked for: for a model, data and one of gpu, vram and cpu; or from another tool's."""

    file: Annotated[Path, Argument("The recipe to write.", "[FILE]")] = Path("recipe.yaml")
    model: Annotated[str | None, Option("Hub id or folder of the base.", "NAME")] = None
    data: Annotated[str | None, Option("Training rows.", "PATH")] = None
    validation: Annotated[str | None, Option("Held-out rows.  [default: 0.1, if rows are enough]", "PATH|FRACTION")] = (
        None
    )
    format: Annotated[str | None, Option("The rows' format, see docs/data.md.  [default: guessed]", "FORMAT")] = None
    columns: Annotated[
        tuple[str, ...],
        Option("What a column of the format is called in the rows; repeatable.", "--columns NAME=COLUMN"),
    ] = ()
    template: Annotated[
        str | None, Option("Jinja that makes text of a row, such as '{{ question }} {{ answer }}'.", "JINJA")
    ] = None
    gpu: Annotated[str | None, Option("The GPU that it has to fit, such as 'RTX 4090'.", "NAME", "gpus")] = None
    vram: Annotated[str | None, Option("The memory that it has to fit, such as 24GiB.", "SIZE")] = None
    cpu: Annotated[bool, Option("For a machine without a GPU.")] = False
    name: Annotated[str | None, Option("Name of the run, below runs/.  [default: FILE's]", "RUN")] = None
    source: Annotated[
        Path | None, Option("Convert a recipe of axolotl, LLaMA-Factory or TRL instead.", "--from OTHER")
    ] = None
    kind: Annotated[str | None, Option("The tool that --from is of: axolotl, llamafactory or trl.", "TOOL")] = None
    force: Annotated[bool, Option("Overwrite FILE.")] = False
    to_stdout: Annotated[bool, Option("Print the recipe; write nothing.", "--print")] = False

    def check(self) -> None:
        """Raises UsageError for what doesn't go together, or can't be written."""
        if self.cpu and (self.gpu or self.vram):
            raise UsageError("--cpu and --gpu or --vram exclude each other")
        if not self.to_stdout:
            self.refuse_overwriting(self.file)
        self.columns_by_name()
        if self.format is not None:
            from lorafit.rows import COLUMNS

            if self.format not in COLUMNS:
                raise UsageError(
                    f"--format {self.format}: not one of {', '.join(COLUMNS)}{near(self.format, list(COLUMNS))}"
                )
        if self.template is not None:
            from lorafit.rows import check_template

            try:
                check_template(self.template)
            except ValueError as error:
                raise UsageError(f"--template: {error}") from None
            if not re.search(r"\{[{%]", self.template):
                raise UsageError("--template: reads no column; a column stands in two braces, as {{ question }}")
        if self.source is not None and (self.model or self.data or self.validation or self.name or self.says_how):
            raise UsageError(
                "--from takes everything from the other recipe; it goes with --kind, --gpu, --vram and --cpu"
            )
        if self.source is None and self.kind is not None:
            raise UsageError("--kind says whose recipe --from is; give both")

    @property
    def says_how(self) -> bool:
        """Whether it is said how rows are read."""
        return bool(self.format or self.columns or self.template)

    def columns_by_name(self) -> dict[str, str]:
        """The rows' columns by the format's. Raises UsageError."""
        pairs = [part.strip().partition("=") for text in self.columns for part in text.split(",")]
        for name, equals, column in pairs:
            if not (name and equals and column):
                raise UsageError(f"--columns {name}: expected NAME=COLUMN, such as output=answer")
        asked = [name.strip() for name, _, _ in pairs]
        if asked:
            from lorafit.rows import COLUMNS, OPTIONAL

            known = {column for columns in (*COLUMNS.values(), *OPTIONAL.values()) for column in columns}
            for name in asked:
                if name not in known:
                    raise UsageError(f"--columns {name}: no format has such a column{near(name, sorted(known))}")
                if asked.count(name) > 1:
                    raise UsageError(f"--columns {name}: is named twice")
        return {name.strip(): column.strip() for name, _, column in pairs}

    def refuse_overwriting(self, file: Path) -> None:
        """Raises UsageError for a file that may not, or can't, be written."""
        if file.is_dir():
            raise UsageError(f"{file}: is a folder; give the name of a file")
        if file.exists() and not file.is_file():
            raise UsageError(f"{file}: is no file that can be replaced")
        if file.exists() and not self.force:
            raise UsageError(f"{file}: is there already; --force overwrites it, --print only shows")
        if not file.parent.is_dir():
            raise UsageError(f"{file}: there is no folder {file.parent}")


@dataclass(frozen=True)
class EstimateOptions(JsonOptions):
    """An estimate as it was asked for; the plan is made for the first of `gpus`."""

    config: Annotated[Path | None, Argument("The recipe, a YAML file.", "[CONFIG]", "recipes")] = None
    overrides: Overrides = ()
    model: Annotated[str | None, Option("A model in place of a recipe, with defaults.", "NAME")] = None
    method: Annotated[str | None, Option("With --model.  [default: lora]", "lora|qlora|full")] = None
    max_length: Annotated[int | None, Option("Short for training.max_length.")] = None
    batch: Annotated[int | None, Option("Short for training.per_device_train_batch_size.")] = None
    gpus: Annotated[
        tuple[str, ...],
        Option("A GPU that it should fit, such as 'RTX 4090'; repeatable.", "--gpu NAME", "gpus"),
    ] = ()
    sizes: Annotated[
        tuple[str, ...], Option("Memory that it should fit, such as 24GiB; repeatable.", "--vram SIZE")
    ] = ()
    asserted: Annotated[
        tuple[str, ...],
        Option("Exit with 5 unless it certainly fits; repeatable, for CI.", "--assert-fits GPU|SIZE", "gpus"),
    ] = ()
    list_gpus: Annotated[bool, Option("Show which of the known GPUs it fits.")] = False
    world: Annotated[int | None, Option("GPUs that train together.", "--gpus N")] = None
    sharding: Annotated[str | None, Option("none, ddp, fsdp, fsdp_offload, zero1, zero2 or zero3.", "HOW")] = None
    sweeps: Annotated[
        tuple[str, ...], Option("Estimate for each value of a key; repeatable.", "--sweep KEY=V1,V2")
    ] = ()
    trace: Annotated[bool, Option("Run the real modules on tensors without data: exact, takes seconds.")] = False
    plot: Annotated[Path | None, Option("Draw it, as .png or .svg.", "FILE")] = None
    tokens: Annotated[int | None, Option("Tokens of an epoch, for cost.", "N")] = None
    price: Annotated[
        float | None, Option("Price of one GPU for an hour, for cost; needs --gpu.", "--price-per-hour X")
    ] = None
    calibrate: Annotated[
        tuple[Path, ...],
        Option("How far off the estimates of finished runs were; repeatable.", "RUN", "runs"),
    ] = ()

    @property
    def short(self) -> dict[str, str]:
        """Overrides that have options of their own, and these as typed."""
        keys = (("max-length", "max_length", self.max_length), ("batch", "per_device_train_batch_size", self.batch))
        return {f"training.{key}={value}": f"--{name} {value}" for name, key, value in keys if value is not None}

    def check(self) -> None:
        """Raises UsageError for what doesn't go with --calibrate."""
        others = [one for one in fields(self) if one.name not in ("calibrate", "as_json")]
        if self.calibrate and any(getattr(self, one.name) != one.default for one in others):
            raise UsageError("--calibrate reads runs; it goes with --json alone")


_NAME = re.compile(r"[A-Za-z0-9_-]+")
RESERVED = ("base", "adapter", "start", "trained", "merged", "baseline")
"""Names of models that are always the run's own, and of what gates compare with."""


class Named(NamedTuple):
    """A model by a name of its own."""

    name: str
    path: Path


def parse_adapter(text: str) -> Named:
    """`NAME=PATH`. Raises UsageError."""
    name, equals, path = text.partition("=")
    if not equals or not path or not _NAME.fullmatch(name):
        raise UsageError(f"{text}: expected NAME=PATH, the name of letters, digits, _ and -")
    return Named(name, Path(path))


def parse_compare(text: str) -> tuple[str, ...]:
    """Names and paths, separated by commas. Raises UsageError."""
    parts = tuple(part.strip() for part in text.split(",") if part.strip())
    if not parts:
        raise UsageError(f"{text}: names no model; expected some of base, adapter, merged, or paths of runs")
    return parts


Adapters = Annotated[
    tuple[Named, ...],
    Option("Another adapter, or a run's, on the same base; repeatable.", "--adapter NAME=PATH", parse=parse_adapter),
]


@dataclass(frozen=True)
class EvalOptions(JsonOptions):
    """An evaluation as it was asked for. None means: as the recipe's eval section has it, or its default.

    Of a recipe, its run is evaluated by the eval section as it is now.
    """

    path: Annotated[Path, Argument("A run directory, or the recipe of one.", "RUN|CONFIG", "runs")]
    overrides: Annotated[
        tuple[str, ...], Option("Override a value of the eval section; repeatable.", "--set KEY=VALUE")
    ] = ()
    compare: Annotated[
        tuple[str, ...] | None,
        Option(
            "base, adapter, merged, or paths of other runs.  [default: those that there are]",
            "M1,M2",
            parse=parse_compare,
            joined=True,
        ),
    ] = None
    adapters: Adapters = ()
    data: Annotated[Path | None, Option("Rows to evaluate on instead of the held-out ones.")] = None
    limit: Annotated[int | None, Option("Rows to generate answers for.  [default: eval.limit]", min=1)] = None
    max_new_tokens: Annotated[
        int | None, Option("Tokens an answer may have.  [default: eval.max_new_tokens]", min=1)
    ] = None
    fail_under: Annotated[tuple[str, ...], Option("Exit with 6 unless this holds; repeatable, for CI.", "GATE")] = ()
    baseline: Annotated[Path | None, Option("An earlier results.json: exit with 6 if it was better.", "FILE")] = None
    output: Annotated[Path | None, Option("Default: eval/ in the run.", "-o --output")] = None
    resume: Annotated[bool, Option("Go on with an interrupted evaluation.")] = False
    locked: Locked = False
    show_rows: Annotated[int, Option("Answers to print.", "--show", min=0)] = 3

    def check(self) -> None:
        """Raises UsageError for what doesn't go together."""
        for override in self.overrides:
            if not override.startswith("eval."):
                raise UsageError(
                    f"--set {override}: an evaluation can change the eval section only, such as eval.limit"
                )
        if self.compare is not None and len(set(self.compare)) < len(self.compare):
            raise UsageError(f"--compare {','.join(self.compare)}: names a model twice")
        names = [adapter.name for adapter in self.adapters]
        for name in names:
            if name in RESERVED or names.count(name) > 1:
                raise UsageError(f"--adapter {name}=…: the name is taken; choose another")
        for path, option in ((self.data, "--data"), (self.baseline, "--baseline")):
            if path is not None and not path.exists():
                raise UsageError(f"{option} {path}: no such file")

    def destination(self, run: RunDir) -> Path:
        """The folder that is written: what --output says, or eval/ in the run."""
        from lorafit.run.directory import located

        return located(self.output) if self.output else run.eval


def name_of(path: str, taken: list[str]) -> str:
    """A name for a run or model in figures, from the last part of its path."""
    stem = re.sub(r"[^A-Za-z0-9_-]+", "_", Path(path).resolve().name).strip("_") or "model"
    name, number = stem, 2
    while name in taken or name in RESERVED:
        name, number = f"{stem}_{number}", number + 1
    return name


Combine = Literal["linear", "ties", "dare_linear", "dare_ties", "magnitude_prune"]


@dataclass(frozen=True)
class Addition:
    """Another adapter, and the factor of its delta."""

    path: Path
    weight: float


def parse_addition(text: str) -> Addition:
    """`PATH:WEIGHT`, or a path alone for a weight of 1. Raises UsageError."""
    path, colon, typed = text.rpartition(":")
    weight = _number(typed)
    if not colon or (typed and weight is None and Path(text).exists()):
        return Addition(Path(text), 1.0)
    if not path or not weight or not math.isfinite(weight):
        raise UsageError(f"{text}: expected RUN:WEIGHT with a number other than 0, such as runs/other:0.3")
    return Addition(Path(path), weight)


def _number(text: str) -> float | None:
    try:
        return float(text)
    except ValueError:
        return None


@dataclass(frozen=True)
class MergeOptions(JsonOptions):
    """A merge as it was asked for. None means: as the recipe's merge section has it, or its default."""

    path: Annotated[Path, Argument("A run directory, or a folder with an adapter.", "RUN", "runs")]
    overrides: Annotated[
        tuple[str, ...], Option("Override a value of the merge section; repeatable.", "--set KEY=VALUE")
    ] = ()
    output: Annotated[Path | None, Option("Default: merged/ in the run.", "-o --output")] = None
    method: Annotated[
        Literal["auto", "stream", "full"], Option("stream: tensor by tensor; full: in memory.", "auto|stream|full")
    ] = "auto"
    base: Annotated[str | None, Option("The base, if not where the run or adapter says.", "NAME")] = None
    allow_other_base: Annotated[bool, Option("Merge into a base that is not the one of the training.")] = False
    base_weights: Annotated[
        Literal["auto", "original", "dequantized"] | None,
        Option("For QLoRA: which weights to add to.", "original|dequantized|auto"),
    ] = None
    dtype: Annotated[
        Literal["auto", "float32", "bfloat16", "float16"],
        Option("float32, bfloat16 or float16.  [default: as stored]", "TYPE"),
    ] = "auto"
    verify: Annotated[
        Literal["auto", "logits", "weights", "none"] | None,
        Option("How much is proved.  [default: auto]", "logits|weights|none"),
    ] = None
    weight: Annotated[float, Option("Factor of the run's own adapter.", "X")] = 1.0
    additions: Annotated[
        tuple[Addition, ...],
        Option("Add another adapter, X times; below 0 subtracts. Repeatable.", "--add RUN:X", parse=parse_addition),
    ] = ()
    combine: Annotated[Combine, Option("linear, ties, dare_linear, dare_ties or magnitude_prune.", "HOW")] = "linear"
    density: Annotated[float | None, Option("Share of each delta that --combine keeps.", "X")] = None
    seed: Annotated[int, Option("Decides what DARE drops.", min=0)] = 0
    as_adapter: Annotated[bool, Option("Make one adapter of several (SVD) instead of a model.")] = False
    rank: Annotated[int | None, Option("Rank of the adapter that --as-adapter makes.", "R", min=1)] = None
    quantize: Annotated[
        Literal["nf4", "fp4"] | None, Option("A 4-bit copy of the merged model as well.", "nf4|fp4")
    ] = None
    exports: Annotated[
        tuple[str, ...], Option("f16, bf16, q8_0 …, with an Ollama Modelfile. Repeatable.", "--export gguf:KIND")
    ] = ()
    llama_cpp: Annotated[Path | None, Option("Export by llama.cpp's own converter, in this folder.", "DIR")] = None
    check_vllm: Annotated[bool, Option("Only tell whether vLLM can serve the adapter unmerged, and how.")] = False
    overwrite: Annotated[bool, Option("Make anew what is there already; it is kept until that is done.")] = False
    locked: Locked = False

    def destination(self) -> Path:
        """The folder to write: what --output says, or merged/ (merged-adapter/) in the run. Raises UsageError."""
        from lorafit.run.directory import RunDir, located

        if self.output is not None:
            return located(self.output)
        run = RunDir(located(self.path))
        if run.path.name == "adapter" and RunDir(run.path.parent).is_run:
            run = RunDir(run.path.parent)
        if not run.is_run and (run.path / "adapter_config.json").is_file():
            raise UsageError(f"{run.path}: is not a run, so say with --output where the result goes")
        return run.path / "merged-adapter" if self.as_adapter else run.merged

    def places(self) -> dict[Path, str]:
        """The folders that exports make beside the merged one, and their kinds."""
        merged, found = self.destination(), {}
        if self.quantize:
            found[copy_of(merged, self.quantize)] = "merge"
        if self.exports:
            found[gguf_of(merged)] = "gguf"
        return found

    def only_exports(self) -> bool:
        """Whether GGUF files are asked for, and nothing but them, of a merge that is there."""
        asked = {field.name for field in fields(self) if getattr(self, field.name) != field.default}
        others = asked - {"path", "exports", "llama_cpp", "output", "as_json", "locked"}
        return bool(self.exports) and not others and (self.destination() / "merge_report.json").is_file()

    def claim(self, needed: Iterable[Path]) -> None:
        """See that what is written can be: the merged folder, one that fails, and exports. Raises UsageError."""
        from lorafit.files import claim

        merged = {} if self.only_exports() else {self.destination(): "merge"}
        for place, kind in {**merged, **self.places()}.items():
            for path in (place, unverified(place)):
                claim(path, kind, "a merge" if kind == "merge" else "an export", needed)
            if place.is_dir() and any(place.iterdir()) and not self.overwrite:
                raise UsageError(
                    f"{place}: is there already; use --overwrite to make it anew, or choose another --output"
                )

    def settings(self, plan: Plan | None) -> dict[str, Any]:
        """The merge section of a run's plan (None: its defaults) with what was asked for. Raises RecipeError."""
        from lorafit.recipe import Recipe

        section = plan.merge if plan else {}
        if self.overrides or plan is None:
            values = {
                "model": {"name_or_path": "any"},
                "lora": {},
                "quantization": plan.recipe["quantization"] if plan else {"load_in_4bit": True},  # it may have been
                "dataset": {"train": [{"path": "any"}]},
                "merge": section,
            }
            section = Recipe.restored(values, "plan.json", self.overrides).merge.model_dump(mode="json")
        given = {"base_weights": self.base_weights, "verify": self.verify}
        return section | {key: value for key, value in given.items() if value is not None}

    def check(self) -> None:
        """Raises UsageError for what doesn't go together."""
        if self.check_vllm:
            return
        for override in self.overrides:
            if not override.startswith("merge."):
                raise UsageError(f"--set {override}: a merge can change the merge section only, such as merge.max_kl")
        if self.overrides:
            self.settings(None)  # says what no recipe may have
        self._check_combination()
        self._check_adapter()
        for text in self.exports:
            from lorafit.export.gguf import parse_export

            parse_export(text, self.llama_cpp)
        if self.llama_cpp is not None and not self.exports:
            raise UsageError("--llama-cpp goes with --export gguf:KIND")
        if self.method == "full" and self.additions:
            raise UsageError("several adapters are combined by --method stream only")

    def _check_combination(self) -> None:
        prunes = self.combine != "linear"
        if prunes and not self.additions:
            raise UsageError(f"--combine {self.combine} combines several adapters; name others with --add")
        if prunes and self.density is None:
            raise UsageError(f"--combine {self.combine} needs --density, the share of each delta to keep (such as 0.5)")
        if self.density is not None and not prunes:
            raise UsageError("--density is for --combine ties, dare_linear, dare_ties and magnitude_prune")
        if self.density is not None and not 0 < self.density <= 1:
            raise UsageError(f"--density: expected a share above 0 and up to 1, got {self.density:g}")
        if not math.isfinite(self.weight) or self.weight == 0:
            raise UsageError(f"--weight: expected a number other than 0, got {self.weight:g}")

    def _check_adapter(self) -> None:
        if self.rank is not None and not self.as_adapter:
            raise UsageError("--rank is the rank of the adapter that --as-adapter makes")
        if self.as_adapter and self.rank is None:
            raise UsageError("--as-adapter needs --rank, the rank of the adapter to make")
        if self.as_adapter and (self.exports or self.quantize or self.method == "full"):
            raise UsageError("--as-adapter makes an adapter; it can't go with --export, --quantize or --method full")


_REPOSITORY = re.compile(r"(?!.*(?:--|\.\.))[A-Za-z0-9][\w.-]*(?<![.-])")


@dataclass(frozen=True)
class PushOptions(JsonOptions):
    """An upload as it was asked for."""

    run: RunPath
    to: Annotated[str, Argument("The repository on the hub, such as me/my-adapter.", "ID")]
    merged: Annotated[bool, Option("Push the merged model, instead of what the run trained.")] = False
    base: Annotated[str | None, Option("What a base that is local here is called on the hub.", "ID")] = None
    public: Annotated[bool, Option("For everyone to see.  [default: private]")] = False
    revision: Annotated[str | None, Option("A branch, made where there is none.  [default: main]", "BRANCH")] = None
    message: Annotated[str | None, Option("Of the commit.", "TEXT")] = None
    dry_run: Annotated[bool, Option("Only check, and list files and sizes; the hub is not asked.")] = False

    def check(self) -> None:
        """Raises UsageError for a name that no repository can have."""
        for option, name in (("", self.to), ("--base ", self.base)):
            parts = (name or "a/b").split("/") if name != "" else ()
            if len(parts) != 2 or not all(_REPOSITORY.fullmatch(part) for part in parts):
                raise UsageError(
                    f"{option}{name}: no repository can be called so; expected OWNER/NAME, of letters, digits, - _ ."
                )


def unverified(destination: Path) -> Path:
    """Where what failed its proof is left."""
    return destination.with_name(f"{destination.name}.unverified")


def copy_of(merged: Path, kind: str) -> Path:
    """The folder of a 4-bit copy."""
    return merged.with_name(f"{merged.name}-{kind}")


def gguf_of(merged: Path) -> Path:
    """The folder of GGUF files."""
    return merged.with_name(f"{merged.name}-gguf")


Write = Callable[[str], None]


@dataclass(frozen=True)
class ChatOptions(JsonOptions):
    """A chat as it was asked for; by the seed, its n-th answer is drawn alike every time."""

    path: Annotated[str, Argument("A run directory, a model folder or a hub id.", "RUN|MODEL", "runs")]
    adapters: Adapters = ()
    use: Annotated[str | None, Option("The model that answers first.  [default: the run's]", "NAME")] = None
    prompts: Annotated[tuple[str, ...], Option("Answer this and leave; repeatable, in turn.", "--prompt TEXT")] = ()
    system: Annotated[str | None, Option("The system message.", "TEXT")] = None
    max_new_tokens: Annotated[int, Option("Tokens an answer may have.", min=1)] = 512
    temperature: Annotated[float, Option("Temperature of sampling; 0 is greedy.", min=0)] = 0.0
    seed: Annotated[int, Option("Decides what is drawn at a temperature above 0.", min=0)] = 0

    def check(self) -> None:
        """Raises UsageError for what no chat can be held with."""
        if not math.isfinite(self.temperature):
            raise UsageError(f"--temperature {self.temperature}: has to be a number from 0")


def from_stdin(stdin: TextIO) -> tuple[str, ...]:
    """What a file or a pipe at stdin holds, as one prompt; none if people type there. Raises UsageError."""
    if stdin.isatty():
        return ()
    try:
        text = stdin.read().rstrip("\n")
    except UnicodeDecodeError:
        raise UsageError("stdin: is no UTF-8 text") from None
    if not text.strip():
        raise UsageError("stdin: is empty, so there is no prompt; give one with --prompt")
    return (text,)


MODELS = ("base", "adapter", "trained", "merged", "quantized")
"""What can be measured, in this order. A run that trained in full has `trained` in place of `adapter`."""


@dataclass(frozen=True)
class Shape:
    """Prompts that are run together."""

    prompt_tokens: int
    batch: int


def parse_numbers(text: str) -> tuple[int, ...]:
    """Numbers such as `128,512`. Raises UsageError."""
    try:
        return tuple(int(part) for part in text.split(","))
    except ValueError:
        raise UsageError(f"{text}: has to be numbers with commas between, such as 1,8") from None


def parse_models(text: str) -> tuple[str, ...]:
    """Names such as `adapter,merged`."""
    return tuple(part.strip() for part in text.split(","))


@dataclass(frozen=True)
class BenchOptions(JsonOptions):
    """A benchmark as it was asked for, of some of MODELS."""

    run: RunPath
    models: Annotated[
        tuple[str, ...],
        Option(
            "base, adapter, merged, quantized.  [default: what there is]",
            "--model M1,M2",
            parse=parse_models,
            joined=True,
        ),
    ] = ()
    prompt_tokens: Annotated[
        tuple[int, ...], Option("Tokens of a prompt.", "N1,N2", parse=parse_numbers, joined=True)
    ] = (128, 512)
    new_tokens: Annotated[int, Option("Tokens generated after it.", min=1)] = 64
    batch: Annotated[tuple[int, ...], Option("Prompts at once.", "N1,N2", parse=parse_numbers, joined=True)] = (1, 8)
    rounds: Annotated[int, Option("Repetitions, models in turn.", min=1)] = 5
    seed: Annotated[int, Option("Decides the prompts' tokens.", min=0)] = 0
    output: Annotated[Path | None, Option("Write a .json or .md file as well.", "-o --output")] = None

    @property
    def shapes(self) -> list[Shape]:
        return [Shape(length, batch) for length in self.prompt_tokens for batch in self.batch]

    def check(self) -> None:
        """Raises UsageError for what can't be measured."""
        for name in self.models:
            if name not in MODELS:
                raise UsageError(f"--model {name}: is no model of a run{near(name, MODELS)}")
        if len(set(self.models)) < len(self.models):
            raise UsageError(f"--model {','.join(self.models)}: names a model twice")
        for option, values in (("--prompt-tokens", self.prompt_tokens), ("--batch", self.batch)):
            if not values or min(values) < 1:
                raise UsageError(f"{option}: needs numbers from 1, such as 1,8")
            if len(set(values)) < len(values):
                raise UsageError(f"{option} {','.join(map(str, values))}: has a number twice")
        if self.output is not None:
            self._check_output(self.output)

    def _check_output(self, file: Path) -> None:
        from lorafit.files import claim_file

        if file.suffix not in (".json", ".md"):
            raise UsageError(f"-o {file}: has to end in .json or .md, which says what is written")
        claim_file(file, "bench_version" if file.suffix == ".json" else "# Speed of ")
        if not file.absolute().parent.is_dir():
            raise UsageError(f"-o {file}: there is no folder {file.parent}")


DEFAULT_STEPS = 5
LEAST_STEPS = 3
"""The rate is 0 in the first step, B moves in the second, and only then has A a gradient."""
MOST_STEPS = 50
DEFAULT_TOLERANCE = 1e-3


@dataclass(frozen=True)
class SmokeOptions(RecipeOptions):
    """A smoke run as it was asked for."""

    steps: Annotated[int | None, Option("Optimizer steps.  [default: 5, or the recording's]", "N")] = None
    record: Annotated[bool, Option("Write the losses to the golden file.")] = False
    compare: Annotated[bool, Option("Exit with 6 unless they are as recorded.", "--check")] = False
    golden: Annotated[Path | None, Option("The golden file.  [default: beside CONFIG, .golden.json]", "FILE")] = None
    tolerance: Annotated[float | None, Option("Relative difference that --check allows.  [default: 0.001]", "X")] = None

    @property
    def golden_file(self) -> Path:
        return self.golden or self.config.with_suffix(".golden.json")

    def check(self) -> None:
        """Raises UsageError for options that don't go together."""
        if self.record:
            from lorafit.files import claim_file

            claim_file(self.golden_file, "lorafit_golden")
        if self.record and self.compare:
            raise UsageError("--record and --check exclude each other")
        if self.golden is not None and not (self.record or self.compare):
            raise UsageError("--golden: goes with --record or --check")
        if self.tolerance is not None and not self.compare:
            raise UsageError("--tolerance: goes with --check")
        if self.tolerance is not None and not 0 < self.tolerance < 1:
            raise UsageError(f"--tolerance {self.tolerance:g}: expected a number above 0 and below 1")
        if self.steps is not None and not LEAST_STEPS <= self.steps <= MOST_STEPS:
            raise UsageError(
                f"--steps {self.steps}: expected {LEAST_STEPS} to {MOST_STEPS}; not every part of an adapter moves "
                f"before step {LEAST_STEPS}"
            )
