"""What a recipe may say: frozen pydantic sections whose docstrings are the only documentation.

Names are upstream's own (PEFT, TRL, transformers, bitsandbytes), so that they can be searched for.
Validators check; nothing here rewrites a value. `auto` is resolved later, in `lorafit.plan`.
"""

from __future__ import annotations

import contextlib
import re
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Annotated, Any, Literal

from pydantic import AfterValidator, BaseModel, ConfigDict, Field, FiniteFloat, PrivateAttr, ValidationError

from lorafit.recipe.yaml import Located, Mistake, Position
from lorafit.rows import Format
from lorafit.tree import KeyPath, dotted
from lorafit.written import References

MOST_WHOLE, MOST = 2**31 - 1, 1e30
"""The largest numbers that a recipe may have: what libraries below compute with is not Python's."""
PositiveInt = Annotated[int, Field(gt=0, le=MOST_WHOLE)]
PositiveFloat = Annotated[float, Field(gt=0, le=MOST)]
NonNegativeFloat = Annotated[float, Field(ge=0, le=MOST)]
Fraction = Annotated[float, Field(ge=0, lt=1)]
Share = Annotated[float, Field(ge=0, le=1)]
Text = Annotated[str, Field(min_length=1)]


def _path(text: str) -> str:
    if any(character < " " or character == "\x7f" for character in text):
        raise ValueError("a path without line breaks and other control characters")
    return text


PathText = Annotated[Text, AfterValidator(_path)]


class Section(BaseModel):
    model_config = ConfigDict(
        frozen=True,
        extra="forbid",
        strict=True,
        allow_inf_nan=False,
        use_attribute_docstrings=True,
        protected_namespaces=(),
    )


# A YAML list is kept as an immutable tuple, for which strict mode would want a Python tuple.
Names = Annotated[tuple[Text, ...], Field(strict=False)]
Tracker = Literal[
    "tensorboard",
    "wandb",
    "mlflow",
    "trackio",
    "comet_ml",
    "swanlab",
    "clearml",
    "neptune",
    "dvclive",
    "codecarbon",
    "azure_ml",
    "dagshub",
    "flyte",
]
RowFormat = Literal["auto", Format]
Trackers = Annotated[tuple[Tracker, ...], Field(strict=False)]


def _template_variable(name: str) -> str:
    known = ("messages", "tools", "documents", "add_generation_prompt", "not", "if", "else", "is", "in", "and", "or")
    if not name.isidentifier() or name in known or name.endswith("_token"):
        raise ValueError("a variable of the chat template that a recipe can set")
    return name


def _template_text(text: str) -> str:
    if text.lower() in ("true", "false"):
        raise ValueError(f"{text.lower()} without quotes (as text, it is true to a template)")
    return text


TemplateValue = bool | int | FiniteFloat | Annotated[str, AfterValidator(_template_text)]
TemplateVariable = Annotated[str, AfterValidator(_template_variable)]


Name = Annotated[str, Field(pattern=r"^[A-Za-z0-9_][A-Za-z0-9_-]*$")]


def _kernel(text: str) -> str:
    if not re.fullmatch(r"[\w.-]+/[\w.-]+@[0-9a-f]{40}:\w+", text):
        raise ValueError("a kernel as ORG/REPO@COMMIT:LAYER, with all 40 digits of the commit")
    return text


KernelName = Annotated[str, AfterValidator(_kernel)]


class ModelSection(Section):
    name_or_path: PathText
    """Hub id, local folder, or a `.gguf` file (which is dequantized). A folder is relative to the
    working directory."""
    revision: Text | None = None
    """Branch, tag or commit on the hub. Pin a commit for runs that can be repeated."""
    dtype: Literal["auto", "float32", "bfloat16", "float16"] = "auto"
    """Type of the frozen weights and of the arithmetic. `auto`: bfloat16 where the hardware is fast
    in it, float16 on older GPUs, else float32."""
    attn_implementation: Literal["auto", "sdpa", "eager", "flash_attention_2", "flash_attention_3"] = "auto"
    """Attention kernel of transformers. `auto`: sdpa, or eager for the few models that have no sdpa."""
    trust_remote_code: bool = False
    """Whether to run Python code that the model's repository ships, or `use_kernels` names. Off: it is refused."""
    use_kernels: dict[Name, KernelName] = Field(default_factory=dict)
    """Kernels of the hub in place of layers while training on a GPU, as `RMSNorm: ORG/REPO@COMMIT:LAYER`, by
    transformers' names for layers. They are code that is downloaded: each is pinned to a commit, and trust_remote_code
    is needed. Refused where the model's outputs are others with them, or one does not run on this GPU."""
    chat_template: PathText | None = None
    """What replaces the tokenizer's chat template, in training and in what is saved: the path of a
    Jinja file, or the name of a template that TRL ships, such as `qwen3` (docs/data.md lists them)."""
    chat_template_kwargs: dict[TemplateVariable, TemplateValue] = Field(default_factory=dict)
    """Variables of the chat template, such as `enable_thinking: false`, in training, eval, chat and the
    merge's proof alike. They become the defaults of the chat template that is saved. Where no row has
    reasoning and the template can switch it off, it is switched off."""


class QuantizationSection(Section):
    load_in_4bit: bool = False
    """Keep the frozen weights in 4 bits (QLoRA)."""
    load_in_8bit: bool = False
    """Keep the frozen weights in 8 bits (LLM.int8())."""
    bnb_4bit_quant_type: Literal["nf4", "fp4"] = "nf4"
    """4-bit data type."""
    bnb_4bit_use_double_quant: bool = True
    """Quantize the quantization constants too, which saves about 0.37 bits a weight."""
    bnb_4bit_compute_dtype: Literal["auto", "float32", "bfloat16", "float16"] = "auto"
    """Type that 4-bit weights are dequantized to for arithmetic. `auto`: the model's dtype."""
    llm_int8_threshold: NonNegativeFloat = 6.0
    """8-bit only: activations above this are outliers and are multiplied in 16 bits."""
    llm_int8_skip_modules: Names | None = None
    """Modules to leave unquantized, 4-bit or 8-bit, besides the output head, which always stays so."""


Alpha = Annotated[float, Field(gt=0, le=60_000)]  # below the largest float16


class LoraSection(Section):
    r: PositiveInt = 16
    """Rank of the adapter."""
    lora_alpha: Alpha = 32
    """Scale: the update is multiplied by lora_alpha / r (or / sqrt(r) with use_rslora)."""
    lora_dropout: Fraction = 0.05
    """Dropout on the adapter's input."""
    target_modules: Literal["all-linear", "attention", "mlp", "qv"] | Text | Names = "all-linear"
    """Which linear layers get an adapter: `all-linear` (all but the output head), `attention`,
    `mlp`, `qv` (query and value only), a list of module names, or one regular expression that
    matches whole module paths. Checked against the model's real tensor names."""
    exclude_modules: Names | None = None
    """Module names to leave out of target_modules."""
    modules_to_save: Names | None = None
    """Modules to train in full and to save with the adapter."""
    layers_to_transform: Annotated[tuple[Annotated[int, Field(ge=0)], ...], Field(strict=False)] | None = None
    """Indices of the layers that get an adapter. Default: all."""
    rank_pattern: dict[str, PositiveInt] = Field(default_factory=dict)
    """Ranks of some modules that differ from r, by module name or regular expression."""
    alpha_pattern: dict[str, Alpha] = Field(default_factory=dict)
    """Values of lora_alpha that differ for some modules, by module name or regular expression."""
    bias: Literal["none", "all", "lora_only"] = "none"
    """Which biases are trained."""
    use_rslora: bool = False
    """Rank-stabilized scaling: lora_alpha / sqrt(r)."""
    use_dora: bool = False
    """Weight-decomposed LoRA (DoRA): learns a magnitude for each output as well."""
    init_lora_weights: (
        bool | Annotated[str, Field(pattern=r"^(gaussian|orthogonal|pissa|pissa_niter_[0-9]+|olora|loftq|eva)$")]
    ) = True
    """How the adapter starts: true (B is zero), gaussian, orthogonal, pissa, pissa_niter_N, olora,
    loftq (needs 4-bit) or eva (from the training rows). PiSSA and OLoRA change the base; lorafit
    saves them as an ordinary adapter of rank 2r for the unchanged base."""
    loraplus_lr_ratio: PositiveFloat | None = None
    """LoRA+: the learning rate of the B matrices is this many times that of the A matrices
    (the paper suggests 16)."""


class Source(Section):
    path: PathText
    """A .json, .jsonl, .csv or .parquet file (the first three also with .gz or .zst), a folder of
    them, a pattern such as `data/*.jsonl`, or a hub data set's id. Relative to the working directory."""
    format: RowFormat = "auto"
    """Shape of the rows. `auto` decides from the columns and says why. Of a preference row the chosen
    answer is learned, or with a preference section both; of unpaired ones, those whose label is true."""
    columns: dict[str, Text] = Field(default_factory=dict)
    """The file's name for a column that the format expects, such as `output: answer`, or the path to
    a nested one, such as `output: instances.0.output`."""
    template: Text | dict[str, Text] | None = None
    """Jinja (sandboxed) that makes the format's columns from a row's, for rows of another shape: one
    text for the column `text`, or texts by column, such as `prompt: "Q: {{ question }}"`."""
    weight: Annotated[float, Field(gt=0, le=1000)] = 1.0
    """How often the rows are seen in an epoch: 2 is twice each, 0.5 a random half of them. When
    streaming: the source's share of the rows, relative to the other sources' weights."""
    max_rows: PositiveInt | None = None
    """Read this many rows, from the start, and no more."""
    split: Text = "train"
    """Hub data sets only: the split to read."""
    name: Text | None = None
    """Hub data sets only: the configuration's name."""
    revision: Text | None = None
    """Hub data sets only: branch, tag or commit."""


Sources = Annotated[tuple[Source, ...], Field(strict=False, min_length=1)]


class AuditSection(Section):
    """Limits, each a share from 0 to 1 of what it counts; null: no limit. A source over a limit stops
    training before weights are loaded. Rows that can't be learned are left out where the limit lets
    them pass."""

    empty_answers: Share | None = 0.0
    """Rows with an empty answer, or none."""
    not_utf8: Share | None = 0.0
    """Rows with text that is not UTF-8."""
    no_supervised_tokens: Share | None = 0.0
    """Rows of which no token is learned."""
    answers_left_out: Share | None = 0.0
    """Rows of which the chat template leaves out an answer or a tool call."""
    context_left_out: Share | None = 0.0
    """Rows of which the chat template leaves out a turn, the tools, or the reasoning of an answer that is
    learned. These rows stay in."""
    special_tokens_in_content: Share | None = 0.0
    """Conversations whose words hold text that becomes a control token, such as an end of turn."""
    prompt_differs: Share | None = 0.0
    """Rows that learn an answer after another text than the prompt that a server asks with, such as one
    with an empty block of reasoning."""
    prompt_boundary: Share | None = None
    """Rows whose prompt ends within a token once the answer follows, such as one with a space at its end."""
    bos: Share | None = 0.0
    """Rows with other than one beginning-of-sequence token, where the tokenizer adds one to text."""
    untrained_ends: Share | None = 0.0
    """Answers whose end token is not learned, from which the model would not learn to stop."""
    truncated: Share | None = None
    """Rows that are cut at max_length."""
    lost_tokens: Share | None = 0.5
    """Learned tokens that are lost to max_length."""
    answers_cut_off: Share | None = 0.1
    """Rows that are left out since max_length cuts off their answers whole."""
    duplicates: Share | None = 0.5
    """Training rows that repeat an earlier one. A validation fraction keeps equal rows together."""
    leaked: Share | None = 0.0
    """Validation rows that are training rows as well."""


class DatasetSection(Section):
    train: Sources
    """Where the training rows come from; several sources are mixed by their weights."""
    validation: Annotated[float, Field(gt=0, lt=1)] | Sources | None = None
    """Held-out rows: a fraction of the training rows, taken at random with the run's seed, or
    sources of their own. None: no evaluation."""
    loss_on: Literal["assistant", "completion", "all"] = "assistant"
    """Which tokens are learned: every answer in a conversation with its end-of-turn token
    (assistant), only the last one or the completion column (completion), or every token (all). Rows in
    the text format are always learned whole. A turn or a row with `train: false` or `weight: 0` is not
    learned."""
    min_length: PositiveInt | None = None
    """Leave out rows with fewer tokens than this."""
    excess_length_strategy: Literal["truncate", "drop"] = "truncate"
    """What becomes of rows longer than max_length: they are cut at the end, or left out. Both are
    counted and reported."""
    streaming: bool = False
    """Tokenize while training instead of before, for data that should not be read whole first. Needs
    max_steps. Only the first rows are audited before training, the others as they come."""
    audit: AuditSection = Field(default_factory=AuditSection)
    """How much may be wrong with the data before training is refused."""


BatchSize = Annotated[int, Field(gt=0, le=1_000_000)]


class TrainingSection(Section):
    max_length: PositiveInt = 2048
    """Tokens per row; see dataset.excess_length_strategy for longer rows."""
    packing: bool = False
    """Fill each row of max_length tokens with several examples, which do not see each other."""
    num_train_epochs: PositiveFloat | None = None
    """Passes over the training rows. Default: 3, or as many as max_steps needs."""
    max_steps: PositiveInt | None = None
    """Optimizer steps to stop after, instead of num_train_epochs."""
    per_device_train_batch_size: BatchSize | Literal["auto"] = "auto"
    """Rows in one forward pass on one device. `auto`: 8 on a CPU, 4 on a GPU, at most what
    global_batch_size allows."""
    gradient_accumulation_steps: PositiveInt | Literal["auto"] = "auto"
    """Forward passes per optimizer step. `auto`: as many as global_batch_size needs."""
    global_batch_size: PositiveInt | None = None
    """Rows per optimizer step over all devices, when gradient_accumulation_steps is auto.
    Default: 16."""
    per_device_eval_batch_size: BatchSize | Literal["auto"] = "auto"
    """Rows in one evaluation pass on one device. `auto`: as in training."""
    learning_rate: PositiveFloat | None = None
    """Peak learning rate. Default: 2e-4; for pairs (`preference`) 1e-5, or 1e-6 where all parameters are trained."""
    lr_scheduler_type: Literal[
        "linear",
        "cosine",
        "cosine_with_restarts",
        "cosine_with_min_lr",
        "polynomial",
        "constant",
        "constant_with_warmup",
        "inverse_sqrt",
        "warmup_stable_decay",
    ] = "cosine"
    """Learning-rate schedule of transformers."""
    lr_scheduler_kwargs: dict[str, float | int | str | bool] = Field(default_factory=dict)
    """Arguments of the schedule, such as `min_lr_rate: 0.1` for cosine_with_min_lr."""
    warmup_ratio: Fraction | None = None
    """Share of the steps over which the learning rate rises. Default: 0.03."""
    warmup_steps: Annotated[int, Field(ge=0, le=MOST_WHOLE)] | Fraction | None = None
    """Steps over which the learning rate rises, instead of warmup_ratio; below 1, a share of them."""
    optim: Literal[
        "auto",
        "adamw_torch",
        "adamw_torch_fused",
        "adamw_8bit",
        "paged_adamw_8bit",
        "paged_adamw_32bit",
        "adafactor",
        "lion_8bit",
        "lion_32bit",
        "paged_lion_8bit",
        "paged_lion_32bit",
        "ademamix_8bit",
        "paged_ademamix_8bit",
        "rmsprop",
        "adagrad",
        "sgd",
    ] = "auto"
    """Optimizer, by transformers' name. `auto`: paged_adamw_8bit for a quantized base on a CUDA GPU,
    adamw_torch_fused otherwise."""
    weight_decay: NonNegativeFloat = 0.0
    """Decoupled weight decay."""
    adam_beta1: Fraction = 0.9
    """First-moment decay of the Adam optimizers."""
    adam_beta2: Fraction = 0.999
    """Second-moment decay of the Adam optimizers."""
    adam_epsilon: PositiveFloat = 1e-8
    """Epsilon of the Adam optimizers."""
    max_grad_norm: NonNegativeFloat = 1.0
    """Gradients are clipped to this norm; 0 turns clipping off."""
    neftune_noise_alpha: Annotated[float, Field(gt=0, le=1000)] | None = None
    """NEFTune: scale of the noise added to the embeddings in training."""
    gradient_checkpointing: bool | Literal["auto"] = "auto"
    """Recompute activations in the backward pass to save memory. `auto`: on a GPU."""
    train_sampling_strategy: Literal["random", "sequential", "group_by_length"] = "random"
    """Order of the training rows."""
    dataloader_num_workers: Annotated[int, Field(ge=0, le=128)] = 0
    """Processes that prepare batches beside the training process."""
    seed: Annotated[int, Field(ge=0, lt=2**32)] = 42
    """Seed of the adapter's start, the order of rows, dropout, and the validation split."""
    logging_steps: PositiveInt = 1
    """Optimizer steps between two lines of metrics."""
    eval_strategy: Literal["auto", "no", "steps", "epoch"] = "auto"
    """When to evaluate. `auto`: after each epoch if there are validation rows, or at the end if
    max_steps ends the run sooner."""
    eval_steps: PositiveInt | None = None
    """Optimizer steps between two evaluations (with `eval_strategy: steps`)."""
    evals_per_epoch: PositiveInt | None = None
    """Evaluations in each epoch, instead of one (with `eval_strategy: epoch` or `auto`)."""
    save_strategy: Literal["auto", "no", "steps", "epoch"] = "auto"
    """When to write a checkpoint. `auto`: when it evaluates, else after each epoch. A checkpoint is
    also written at the end, and when the run is interrupted."""
    save_steps: PositiveInt | None = None
    """Optimizer steps between two checkpoints (with `save_strategy: steps`)."""
    saves_per_epoch: PositiveInt | None = None
    """Checkpoints in each epoch, instead of one (with `save_strategy: epoch` or `auto`)."""
    save_total_limit: PositiveInt | None = 2
    """Checkpoints to keep, besides the best one. null: all."""
    load_best_model_at_end: bool | Literal["auto"] = "auto"
    """Whether the best adapter by metric_for_best_model is the result, rather than the last one.
    `auto`: if there is an evaluation."""
    metric_for_best_model: Text | None = None
    """What is compared to find the best adapter, and to stop early: `loss` or `mean_token_accuracy` of
    the validation rows, or SET.METRIC of the evaluation, such as `heldout.exact_match`, which is then
    measured whenever the validation loss is. Default: loss."""
    early_stopping_patience: PositiveInt | None = None
    """Stop after this many evaluations that are no better by metric_for_best_model."""
    report_to: Trackers = ()
    """Trackers, by transformers' names; their packages must be installed. metrics.jsonl is always
    written."""


PairLoss = Literal[
    "sigmoid",
    "hinge",
    "ipo",
    "exo_pair",
    "nca_pair",
    "robust",
    "bco_pair",
    "sppo_hard",
    "apo_zero",
    "apo_down",
    "discopop",
    "sft",
    "sigmoid_norm",
]
"""TRL's losses of pairs, but for those that sort the pairs of a pass (aot)."""


class PreferenceSection(Section):
    """Learning from pairs of answers to the same prompt, of which one is chosen and one rejected. Absent: supervised
    fine-tuning."""

    method: Literal["dpo"] = "dpo"
    """Direct preference optimization: the log-likelihoods of both answers against a reference's."""
    loss_type: Annotated[tuple[PairLoss, ...], Field(strict=False, min_length=1)] | PairLoss = "sigmoid"
    """Loss by TRL's name, or several, which are added up. `sigmoid` is DPO's own; `ipo` is TRL's, normalized by
    length; `sft` is the mean negative log-likelihood of the chosen answers' tokens."""
    loss_weights: Annotated[tuple[PositiveFloat, ...], Field(strict=False, min_length=1)] | None = None
    """Weight of each loss of a list. Default: 1 each."""
    beta: PositiveFloat = 0.1
    """How strongly the reference holds; for `ipo` it is tau."""
    label_smoothing: Annotated[float, Field(ge=0, lt=0.5)] = 0.0
    """Share of pairs taken to be the wrong way round, for `robust` and `exo_pair`."""
    reference: Literal["auto", "start", "base"] = "auto"
    """Model with whose log-likelihoods the answers' are compared: as it is when the training starts (`start`), or
    without the adapter that goes on (`base`). They are computed once, before the first step. `auto`: start."""


class HardwareSection(Section):
    """What the recipe is meant for, so that it can be checked on another machine, such as one of a CI. Training
    elsewhere is said, and goes on."""

    device: Literal["cpu", "cuda", "mps"] | None = None
    """As torch calls it: cuda is an AMD GPU (ROCm) too, mps an Apple GPU. Default: cuda where gpu or vram is given;
    else what is here."""
    gpu: Text | None = None
    """A GPU's name, such as RTX 4090 (docs/vram.md lists them). The recipe has to fit its memory."""
    vram: Text | None = None
    """Memory of one GPU that the recipe has to fit, such as 24GiB. Default: that of gpu."""


class MergeSection(Section):
    """What `lorafit merge` does unless its options say otherwise. Nothing here changes the training. A
    merge over a limit fails; the limits hold for the merged model against the adapter on the base as it
    was trained."""

    base_weights: Literal["auto", "original", "dequantized"] = "auto"
    """What an adapter that was trained on a quantized base is added to: the 16-bit weights
    (`original`), or exactly what it was trained on (`dequantized`). `auto`: both are measured on held-out
    rows, and the better is kept."""
    verify: Literal["auto", "logits", "weights", "none"] = "auto"
    """How the result is checked: by running both models (`logits`), by the merged weights alone
    (`weights`), or not at all. `auto`: logits if the model fits in memory, else weights."""
    rows: PositiveInt = 64
    """Held-out rows that both models are run on."""
    max_kl: NonNegativeFloat | None = 0.1
    """Limit of the mean KL divergence from the adapter's predictions to the merged model's, over the
    learned positions, in nats. null: none."""
    min_top1: Share | None = 0.9
    """Least share of the learned positions at which both find the same token most likely. null: none."""
    max_loss_increase: NonNegativeFloat | None = 0.05
    """Limit of the merged model's loss above the adapter's, in nats a token. null: none."""
    max_logit_difference: PositiveFloat | None = None
    """Limit of the largest difference between two logits. null: none."""


MetricSpec = Text | dict[Name, Text]
MetricSpecs = Annotated[tuple[MetricSpec, ...], Field(strict=False)]


class EvalSet(Section):
    """Rows that models are compared on."""

    name: Name
    """Name of the set in figures. `heldout` are the rows that the run kept out of training, unless a path is given."""
    path: PathText | None = None
    """Files of the rows, on this machine, as for a source. Only `heldout` needs none."""
    format: RowFormat = "auto"
    """Shape of the rows, as a source's."""
    columns: dict[str, Text] = Field(default_factory=dict)
    """Columns, as for a source."""
    template: Text | dict[str, Text] | None = None
    """Templates, as for a source."""
    max_rows: PositiveInt | None = None
    """Read this many rows, from the start, and no more."""
    role: Literal["task", "forgetting"] = "task"
    """`task`: likelihoods and answers. `forgetting`: text that has nothing to do with the task; bits per byte, and how
    far the adapter's predictions moved from the base's."""
    metrics: MetricSpecs | None = None
    """Metrics of the answers in this set. Default: eval.metrics."""
    options: Annotated[tuple[Text, ...], Field(strict=False, min_length=2)] | Text | None = None
    """The answers that a row may have, or the column that lists them: the most likely one is the model's choice, from
    which come `accuracy` and `macro_f1`."""
    limit: PositiveInt | None = None
    """Rows that answers are generated for. Default: eval.limit."""
    max_new_tokens: PositiveInt | None = None
    """Tokens that an answer may have. Default: eval.max_new_tokens."""


class LmEvalSection(Section):
    """Benchmarks of lm-evaluation-harness, on the model in memory. Needs `pip install 'lorafit[lm-eval]'`."""

    tasks: Annotated[tuple[PathText, ...], Field(strict=False, min_length=1)]
    """Task names of lm-evaluation-harness, or YAML files of your own."""
    include_path: PathText | None = None
    """A folder with tasks of your own."""
    num_fewshot: Annotated[int, Field(ge=0, le=1000)] | None = None
    """Solved examples before each question. Default: as the task says."""
    limit: PositiveInt | None = None
    """Documents of each task, from the first. Default: all."""
    apply_chat_template: bool = False
    """Whether questions are given as a user's turn in a conversation."""


class JudgeSection(Section):
    """A language model that compares two answers, in both orders. It can be wrong, and fooled by an answer."""

    base_url: Text
    """URL of an OpenAI-compatible endpoint, such as http://localhost:8000/v1."""
    model: Text
    """The judge, by the endpoint's name for it."""
    api_key_env: Name | None = None
    """The name of the environment variable that holds the key. The key itself is in no recipe and no report."""
    rows: PositiveInt = 50
    """Pairs of answers that are compared, for each model and set."""
    prompt: Text | None = None
    """What the judge is asked, with {question}, {expected}, {first} and {second}. Default: lorafit's own."""
    timeout: Annotated[float, Field(gt=0, le=86400)] = 60.0
    """Seconds for one reply."""
    max_tokens: PositiveInt = 256
    """Tokens that a reply may have."""


BUILT_IN_SETS: tuple[Literal["general", "chat"], ...] = ("general", "chat")


class EvalSection(Section):
    """What `lorafit eval` measures and demands. Nothing here changes the training."""

    sets: Annotated[tuple[EvalSet, ...], Field(strict=False)] = ()
    """Sets besides the held-out rows, or instead of them."""
    forgetting: Annotated[tuple[Literal["general", "chat"], ...], Field(strict=False)] = BUILT_IN_SETS
    """Sets of role forgetting that come with lorafit: some dozen texts of many kinds, and some dozen conversations.
    []: none."""
    metrics: MetricSpecs | None = None
    """Metrics of answers: names such as `exact_match`, `name: argument` for those that need one (`regex`, `contains`,
    `json_schema`), or `module:function` of your own; docs/eval.md lists them. Default: exact_match,
    exact_match_normalized, token_f1, repetition, and json_match and json_valid where all answers are to be JSON."""
    limit: PositiveInt = 100
    """Rows of a set that answers are generated for, from the first. Likelihoods are of all rows."""
    max_new_tokens: PositiveInt = 256
    """Tokens that an answer may have."""
    seed: Annotated[int, Field(ge=0, lt=2**32)] = 42
    """Seed of the intervals' resampling."""
    gates: Names = ()
    """What must hold, such as `heldout.exact_match.adapter >= 0.8`, or the evaluation fails. With `(ci)` behind it, it
    must hold for the whole 95% interval. See docs/eval.md."""
    trust_code: bool = False
    """Whether Python code that this section names may run: metrics of your own (`module:function`), and what a task of
    your own brings (`!function`). Off: they are refused. It runs with all your rights, so read it first."""
    lm_eval: LmEvalSection | None = None
    """Benchmarks. Absent: none."""
    judge: JudgeSection | None = None
    """A language model as a judge of answers. Absent: none."""


class Recipe(Section):
    """A complete recipe, as asked. See `lorafit.recipe.load` for how it is read."""

    model: ModelSection
    """The base model."""
    quantization: QuantizationSection | None = None
    """How the frozen base is quantized with bitsandbytes. Absent: it is not."""
    lora: LoraSection | None = None
    """The adapter. Absent: that of `start_from`, or all parameters are trained."""
    start_from: PathText | None = None
    """An adapter that goes on: a run, a folder with an adapter, or a hub id. Its rank, scale, targets and the rest of
    `lora` come from there, and the base has to be the one that it was trained on. Training starts with a fresh
    optimizer (`lorafit train --resume` is for a run that was interrupted). Absent: a new adapter."""
    dataset: DatasetSection
    """The training and validation rows."""
    preference: PreferenceSection | None = None
    """Learning from pairs of answers. Absent: supervised fine-tuning."""
    training: TrainingSection = Field(default_factory=TrainingSection)
    """The optimization."""
    hardware: HardwareSection | None = None
    """What the recipe is meant for. Absent: any machine."""
    merge: MergeSection = Field(default_factory=MergeSection)
    """How the adapter is merged into the base, and what the result must hold."""
    eval: EvalSection = Field(default_factory=EvalSection)
    """What is measured after training, and what must hold of it."""
    output_dir: PathText | None = None
    """The run directory. Default: runs/ and the recipe's file name. Relative to the working
    directory."""

    _source: Located | None = PrivateAttr(default=None)
    _references: References = PrivateAttr(default_factory=dict)

    @classmethod
    def load(cls, path: str | Path, overrides: Iterable[str] = ()) -> Recipe:
        """Read a recipe file with its parents and `--set` overrides.

        Raises RecipeError, which holds every mistake with its position.
        """
        from lorafit.recipe.load import load

        return load(path, overrides)

    @classmethod
    def of(
        cls,
        values: Mapping[str, Any],
        written: str,
        overrides: Iterable[str] = (),
        references: References | None = None,
    ) -> Recipe:
        """A recipe of plain values, with `--set` overrides. Raises RecipeError, which names `written` as the place.

        Args:
            references: those that some of the values were read from.
        """
        from lorafit.recipe.layers import draft_of
        from lorafit.recipe.load import validate

        return validate(draft_of(values, written, overrides, references))

    @classmethod
    def restored(
        cls,
        values: Mapping[str, Any],
        written: str,
        overrides: Iterable[str] = (),
        references: References | None = None,
    ) -> Recipe:
        """A recipe of what `resolved` gave, of which nobody wrote the defaults. Raises RecipeError as `of`."""
        with contextlib.suppress(ValidationError):  # `of` says what is wrong
            values = cls.model_validate(values).model_dump(mode="json", exclude_defaults=True)
        return cls.of(values, written, overrides, references)

    @property
    def trains_base(self) -> bool:
        """Whether the base's own weights are trained, for want of a section for an adapter."""
        return self.lora is None

    def remember_source(self, root: Located, references: References) -> None:
        """Keep where each value was written, for mistakes that only the plan can see, and what of it is a reference."""
        self._source = root
        self._references = references

    @property
    def references(self) -> References:
        """The ${NAME} that texts were read from, by dotted key."""
        return self._references

    @property
    def source(self) -> Located | None:
        """What was written, and where; None for a recipe that was not read."""
        return self._source

    def mistake(self, path: KeyPath, message: str) -> Mistake:
        """A mistake about the value at `path`, at the place where it was written."""
        if self._source is None:
            return Mistake(Position("recipe"), dotted(path), message)
        return Mistake(self._source.place(path), dotted(path), message)

    def resolved(self) -> dict[str, Any]:
        """Every field with defaults filled in, as JSON-able values: what a run is compared by."""
        return self.model_dump(mode="json")
