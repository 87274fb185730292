"""Making the plan: the only place that decides what a recipe leaves open."""

from __future__ import annotations

import dataclasses
import datetime
import importlib.util
import itertools
import os
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from lorafit.audit import Audit
from lorafit.cache import known_audit
from lorafit.errors import DataError, printable
from lorafit.facts import ModelFacts, read_facts
from lorafit.hardware import Hardware, detect
from lorafit.plan.types import Choice, DataPlan, Plan, Schedule, SourcePlan, make_schedule, validation_rows
from lorafit.recipe import Mistake, Recipe, RecipeError, Source
from lorafit.rows import (
    COLUMNS,
    OPTIONAL,
    Format,
    Row,
    detect_format,
    digest,
    is_local,
    read_rows,
    size_digest,
)
from lorafit.targets import (
    OUTPUT_HEADS,
    TargetError,
    Targets,
    check_modules_to_save,
    find_targets,
    is_skipped,
    near,
    trainable_parameters,
)
from lorafit.template import TemplateFacts, inspect_template, trl_templates, uses_date

DEFAULT_GLOBAL_BATCH_SIZE = 16
DEFAULT_EPOCHS = 3.0
DEFAULT_WARMUP_RATIO = 0.03
TRACKER_MODULES = {"azure_ml": "azureml", "flyte": "flytekit"}
"""Modules that trackers need, where these are not called like the tracker."""
CUDA_ONLY_OPTIMIZERS = ("8bit", "paged", "lion", "ademamix")
NO_SDPA = frozenset(
    (
        "deepseek_v4",
        "flint",
        "gemma2",
        "gpt_oss",
        "granite_swa",
        "granitemoe_swa",
        "hy_v4",
        "mimo_v2_flash",
        "vaultgemma",
    )
)
"""Models that transformers does not run with sdpa, which knows no soft caps and no attention sinks."""
FLASH_NEEDS = {"flash_attention_2": (8, 0), "flash_attention_3": (9, 0)}
"""The compute capability from which a kernel runs."""


def plan_recipe(
    recipe: Recipe, recipe_path: str | Path, hardware: Hardware | None = None, count_rows: bool = True
) -> Plan:
    """Read the model's facts and the machine, and make the plan."""
    model = recipe.model
    facts = read_facts(model.name_or_path, model.revision)
    return make_plan(recipe, facts, hardware or detect(), Path(recipe_path).stem, count_rows=count_rows)


def make_plan(
    recipe: Recipe,
    facts: ModelFacts,
    hardware: Hardware,
    default_name: str = "run",
    read_data: bool = True,
    count_rows: bool = True,
) -> Plan:
    """Resolve a recipe for a model and a machine.

    Args:
        default_name: of the run directory below runs/, if the recipe names none.
        read_data: whether to look into the data files, for their formats and contents.
        count_rows: whether to read them through for the number of rows, where no audit knows it.

    Raises RecipeError with every choice that this model or machine can't carry out, and DataError.
    """
    return _Planner(recipe, facts, hardware, read_data, count_rows).plan(default_name)


def with_audit(plan: Plan, audit: Audit) -> Plan:
    """The plan, completed by what was counted of its data: the audit, and the number of steps."""
    part = audit.training_rows
    rows = None if plan.data.streaming else part.packs if plan.data.packing else part.rows
    schedule = make_schedule(rows, plan.training_kwargs, plan.hardware.world_size)
    return dataclasses.replace(
        plan,
        audit=audit.as_dict(),
        schedule=schedule,
        choices=plan.choices | {"steps": _steps_choice(schedule, rows, plan.data.packing)},
        remarks=tuple(remark for remark in plan.remarks if remark != _PACKED_LATER),
    )


_PACKED_LATER = "The number of steps is known once the rows are packed."


def _steps_choice(schedule: Schedule, rows: int | None, packing: bool) -> Choice:
    if rows is None:
        return Choice(schedule.total_steps, "max_steps; the rows are streamed")
    kind = "packed rows" if packing else "rows"
    return Choice(schedule.total_steps, f"{rows} {kind} make {schedule.steps_per_epoch} steps an epoch")


@dataclass
class _Planner:
    recipe: Recipe
    facts: ModelFacts
    hardware: Hardware
    read_data: bool = True
    count_rows: bool = True
    choices: dict[str, Choice] = field(default_factory=dict)
    mistakes: list[Mistake] = field(default_factory=list)
    remarks: list[str] = field(default_factory=list)

    def plan(self, default_name: str) -> Plan:
        output_dir = self.recipe.output_dir or f"runs/{default_name}"
        dtype = self._dtype()
        targets = self._targets()
        max_length = self._max_length()
        chat_template = self._chat_template()
        train, validation = self._sources()
        data = self._data(train, validation, max_length, chat_template)
        training_kwargs = self._training_kwargs(dtype, bool(self.recipe.dataset.validation))
        model_kwargs = self._model_kwargs(dtype)
        quantization_kwargs = self._quantization_kwargs(dtype)
        if self.mistakes:
            raise RecipeError(self.mistakes)
        plan = Plan(
            name=Path(output_dir).name,
            output_dir=output_dir,
            recipe=self.recipe.resolved(),
            hardware=self.hardware,
            model=self._model_summary(targets),
            choices=self.choices,
            model_kwargs=model_kwargs,
            quantization_kwargs=quantization_kwargs,
            lora_kwargs=self._lora_kwargs(targets),
            adapter_dtype=self._adapter_dtype(dtype),
            loraplus_lr_ratio=self.recipe.lora.loraplus_lr_ratio if self.recipe.lora else None,
            training_kwargs=training_kwargs,
            data=data,
            schedule=None,
            remarks=tuple(self.remarks),
        )
        return self._with_data(plan) if self.read_data else plan

    def choose(self, key: str, value: Any, reason: str) -> Any:
        self.choices[key] = Choice(value, reason)
        return value

    def wrong(self, path: tuple[str | int, ...], message: str) -> None:
        self.mistakes.append(self.recipe.mistake(path, message))

    # --- model ------------------------------------------------------------------------------------

    def _dtype(self) -> str:
        asked, hardware = self.recipe.model.dtype, self.hardware
        key = "model.dtype"
        if asked != "auto":
            if asked == "float16" and hardware.device == "cpu":
                self.wrong(("model", "dtype"), "float16 can't be trained on a CPU; use auto")
            elif asked == "float16" and self.recipe.lora is None:
                self.wrong(("model", "dtype"), "float16 weights can't be trained in full; use auto")
            if asked == "bfloat16" and not hardware.fast_bf16:
                self.remarks.append(f"bfloat16 is slow on {hardware.name}, which has no fast arithmetic for it.")
            return str(self.choose(key, asked, "as the recipe says"))
        if self.recipe.lora is None:
            return str(self.choose(key, "float32", "training in full: small updates get lost in 16-bit weights"))
        if hardware.fast_bf16:
            return str(self.choose(key, "bfloat16", f"{hardware.name} has fast bfloat16 arithmetic"))
        if hardware.device == "cuda":
            reason = f"{hardware.name} has no bfloat16 arithmetic; the loss is scaled for float16"
            return str(self.choose(key, "float16", reason))
        return str(self.choose(key, "float32", f"a CPU without instructions for bfloat16 ({hardware.name})"))

    def _adapter_dtype(self, dtype: str) -> str:
        if self.recipe.lora is None:
            return dtype
        if self.recipe.quantization and dtype == "bfloat16":
            reason = "as QLoRA does it (arXiv:2305.14314); DoRA's magnitudes stay float32"
            return str(self.choose("adapter dtype", "bfloat16", reason))
        return str(self.choose("adapter dtype", "float32", "small updates get lost in 16 bits"))

    def _model_kwargs(self, dtype: str) -> dict[str, Any]:
        model = self.recipe.model
        if self.facts.stored_quantization:
            self.wrong(
                ("model", "name_or_path"),
                f"its weights are stored quantized ({self.facts.stored_quantization}); name the model that it was made "
                "from, and quantize that with the quantization section",
            )
        return {
            "revision": model.revision,
            "dtype": dtype,
            "attn_implementation": self._attention(dtype),
            "trust_remote_code": model.trust_remote_code,
        }

    def _attention(self, dtype: str) -> str:
        asked, key = self.recipe.model.attn_implementation, "model.attn_implementation"
        family, hardware = self.facts.model_type, self.hardware
        if asked == "auto":
            if family in NO_SDPA:
                return str(self.choose(key, "eager", f"transformers does not run {family} models with sdpa"))
            return str(self.choose(key, "sdpa", "fast everywhere and part of torch"))
        wrong = None
        if asked == "sdpa" and family in NO_SDPA:
            wrong = f"transformers does not run {family} models with sdpa"
        elif asked in FLASH_NEEDS:
            major, minor = needed = FLASH_NEEDS[asked]
            if hardware.device == "cpu":
                wrong = f"{asked} needs a CUDA GPU"
            elif hardware.compute_capability and hardware.compute_capability < needed:
                wrong = f"{asked} needs compute capability {major}.{minor}, which {hardware.name} does not have"
            elif dtype == "float32" and not self._mixed(dtype):
                wrong = f"{asked} does not compute in float32"
        if wrong:
            self.wrong(("model", "attn_implementation"), f"{wrong}; use auto")
        return asked

    def _mixed(self, dtype: str) -> str | None:
        """The 16-bit type that arithmetic is done in, if any."""
        if self.recipe.lora is None and self.hardware.device == "cuda" and self.hardware.fast_bf16:
            return "bfloat16"
        return None if dtype == "float32" else dtype

    def _quantization_kwargs(self, dtype: str) -> dict[str, Any] | None:
        quantization = self.recipe.quantization
        if quantization is None:
            return None
        skip = self._unquantized(quantization.llm_int8_skip_modules)
        if quantization.load_in_8bit:
            return {
                "load_in_8bit": True,
                "llm_int8_threshold": quantization.llm_int8_threshold,
                "llm_int8_skip_modules": skip,
            }
        compute = quantization.bnb_4bit_compute_dtype
        if compute == "auto":
            compute = self.choose("quantization.bnb_4bit_compute_dtype", dtype, "as the model's dtype")
        return {
            "load_in_4bit": True,
            "bnb_4bit_quant_type": quantization.bnb_4bit_quant_type,
            "bnb_4bit_use_double_quant": quantization.bnb_4bit_use_double_quant,
            "bnb_4bit_compute_dtype": compute,
            "llm_int8_skip_modules": skip,
        }

    def _unquantized(self, asked: tuple[str, ...] | None) -> list[str] | None:
        """What bitsandbytes leaves alone. A list replaces its default, which is the output head."""
        if asked is None:
            return None
        names = list(self.facts.quantizable)
        for index, name in enumerate(asked):
            if names and name not in OUTPUT_HEADS and not any(is_skipped(module, [name]) for module in names):
                self.wrong(
                    ("quantization", "llm_int8_skip_modules", index),
                    f"'{name}' matches no linear layer of the model{near(name, names)}",
                )
        heads = [head for head in OUTPUT_HEADS if head in self.facts.modules] or ["lm_head"]
        reason = "the recipe's list, and the output head, from whose weight the loss is computed"
        return list(self.choose("quantization.llm_int8_skip_modules", list(dict.fromkeys((*asked, *heads))), reason))

    def _targets(self) -> Targets | None:
        lora, facts = self.recipe.lora, self.facts
        if lora is None:
            return None
        if not facts.tensors:
            if lora.target_modules in ("attention", "mlp", "qv"):
                self.wrong(
                    ("lora", "target_modules"),
                    f"can't be expanded for a {facts.model_type} model without its safetensors headers; use all-linear",
                )
            if isinstance(lora.target_modules, str) and lora.layers_to_transform is not None:
                self.wrong(("lora", "layers_to_transform"), "needs a list of target_modules for this model")
            self.remarks.append(
                f"The layers of a {facts.model_type} model are not known without its safetensors headers: "
                "target_modules are checked when the model loads."
            )
            return None
        try:
            targets = find_targets(lora, facts)
            check_modules_to_save(lora, facts)
        except TargetError as error:
            self.wrong(("lora", *error.path), str(error))
            return None
        if lora.init_lora_weights == "loftq" and self.hardware.device == "cpu":
            self.wrong(("lora", "init_lora_weights"), "PEFT computes loftq on a GPU, and this is a CPU; use true")
        if facts.is_moe:
            self.remarks.append("Experts are fused parameters in transformers 5, so they get no adapter.")
        self.choose("lora.target_modules", list(targets.names), f"{targets.reason} ({len(targets.modules)} modules)")
        return targets

    def _lora_kwargs(self, targets: Targets | None) -> dict[str, Any] | None:
        lora = self.recipe.lora
        if lora is None:
            return None
        names: Any = list(targets.names) if targets else lora.target_modules
        return {
            "r": lora.r,
            "lora_alpha": lora.lora_alpha,
            "lora_dropout": lora.lora_dropout,
            "target_modules": list(names) if isinstance(names, tuple) else names,
            "exclude_modules": _list(lora.exclude_modules),
            "modules_to_save": _list(lora.modules_to_save),
            "layers_to_transform": _list(lora.layers_to_transform),
            "rank_pattern": lora.rank_pattern,
            "alpha_pattern": lora.alpha_pattern,
            "bias": lora.bias,
            "use_rslora": lora.use_rslora,
            "use_dora": lora.use_dora,
            "init_lora_weights": lora.init_lora_weights,
            "task_type": "CAUSAL_LM",
        }

    def _model_summary(self, targets: Targets | None) -> dict[str, Any]:
        facts = self.facts
        known = bool(facts.tensors)
        trainable = trainable_parameters(self.recipe.lora, targets, facts) if known else 0
        return {
            "name_or_path": facts.name,
            "kind": facts.kind,
            "source": facts.source,
            "model_type": facts.model_type,
            "parameters": facts.parameters,
            "trainable_parameters": trainable,
            "adapted_modules": len(targets.modules) if targets else 0,
        }

    # --- data -------------------------------------------------------------------------------------

    def _max_length(self) -> int:
        asked, limit = self.recipe.training.max_length, self.facts.max_position_embeddings
        if limit is None or asked <= limit:
            return asked
        if "max_length" in self.recipe.training.model_fields_set:
            self.wrong(("training", "max_length"), f"{asked} is above the model's context of {limit} tokens")
            return asked
        return int(self.choose("training.max_length", limit, f"the model's context is shorter than {asked} tokens"))

    def _chat_template(self) -> str | None:
        path = self.recipe.model.chat_template
        if path is None:
            return None
        known = trl_templates()
        if not os.path.exists(Path(path).expanduser()) and path.removesuffix(".jinja") == path and "/" not in path:
            if path not in known:
                hint = near(path, list(known))
                self.wrong(("model", "chat_template"), f"no such file, and TRL ships no template of that name{hint}")
                return None
            path = str(known[path])
        try:
            return Path(path).expanduser().read_text(encoding="utf-8")
        except (OSError, UnicodeDecodeError) as error:
            self.wrong(("model", "chat_template"), f"can't be read: {error}")
            return None

    def _sources(self) -> tuple[list[SourcePlan], list[SourcePlan]]:
        dataset = self.recipe.dataset
        train = [self._source(source, f"dataset.train.{i}") for i, source in enumerate(dataset.train)]
        if not isinstance(dataset.validation, tuple):
            return train, []
        return train, [self._source(s, f"dataset.validation.{i}") for i, s in enumerate(dataset.validation)]

    def _source(self, source: Source, key: str) -> SourcePlan:
        asked = SourcePlan(
            source.path,
            key,
            _given(source.format),
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
                self.wrong((*_steps(key), name), "is for hub data sets; this is a local path")
        if not self.read_data:
            return asked
        first = next(read_rows(source.path), None)
        if first is None:
            raise DataError(f"{source.path}: there are no rows")
        format = asked.format
        if format is None:
            format, reason = detect_format(first, asked.columns, asked.template, key)
            self.choose(f"{key}.format", format, reason)
        unread = unread_columns(first, format, asked)
        if unread:
            self.remarks.append(f"{key}: not read: the column{'s' * (len(unread) > 1)} {', '.join(unread)}.")
        if format == "preference":
            self.remarks.append(f"{key}: of each pair the chosen answer is learned.")
        if format == "unpaired_preference":
            self.remarks.append(f"{key}: the rows whose label is false are left out.")
        streamed = self.recipe.dataset.streaming and key.startswith("dataset.train")
        sha256 = size_digest(source.path) if streamed else digest(source.path)
        return dataclasses.replace(asked, format=format, sha256=sha256)

    def _with_data(self, plan: Plan) -> Plan:
        """The plan with the number of steps, from an audit of this very data or by counting its rows."""
        data = plan.data
        known = None if data.streaming else known_audit(data)
        if known is not None:
            return with_audit(plan, Audit.from_dict(known))
        schedule, choices = None, plan.choices
        remarks = list(plan.remarks)
        if data.streaming:
            schedule = make_schedule(None, plan.training_kwargs, self.hardware.world_size)
        elif data.packing:
            remarks.append(_PACKED_LATER)
        if self.count_rows and not data.streaming:
            data = dataclasses.replace(
                data, train=tuple(map(_counted, data.train)), validation=tuple(map(_counted, data.validation))
            )
            counts = [source.rows for source in data.train]
            if not data.packing and all(count is not None for count in counts):
                rows = sum(round((source.rows or 0) * source.weight) for source in data.train)
                rows -= validation_rows(rows, data.validation_fraction)
                schedule = make_schedule(rows, plan.training_kwargs, self.hardware.world_size)
                choices = choices | {"steps": _steps_choice(schedule, rows, data.packing)}
        return dataclasses.replace(plan, data=data, schedule=schedule, choices=choices, remarks=tuple(remarks))

    def _data(
        self, train: list[SourcePlan], validation: list[SourcePlan], max_length: int, chat_template: str | None
    ) -> DataPlan:
        recipe = self.recipe
        if any(source.format not in ("text", "prompt_completion", None) for source in (*train, *validation)):
            self._conversations(chat_template)
        self._padding()
        fraction = recipe.dataset.validation if isinstance(recipe.dataset.validation, float) else None
        tokenizer = self.facts.tokenizer
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
            audit=recipe.dataset.audit.model_dump(),
            date=datetime.date.today().isoformat() if template and uses_date(template) else None,
            tokenizer_sha256=tokenizer.sha256 if tokenizer else None,
        )

    def _conversations(self, replaced: str | None) -> None:
        """How the answers in conversations end and are found, as far as the files tell."""
        tokenizer = self.facts.tokenizer
        if tokenizer is None and replaced is None:
            return
        template = replaced or (tokenizer.chat_template if tokenizer else None)
        loss_on = self.recipe.dataset.loss_on
        if template is None:
            with_packing = " (with packing, this would go unnoticed)" if self.recipe.training.packing else ""
            self.wrong(
                ("dataset", "loss_on"),
                f"the tokenizer has no chat template, so conversations can't be rendered and loss_on: {loss_on} can't "
                f"be masked{with_packing}; set model.chat_template to a Jinja file",
            )
            return
        eos = tokenizer.eos_token if tokenizer else None
        special: dict[str, str | None] = {
            "eos_token": eos or "",
            "bos_token": (tokenizer.bos_token if tokenizer else None) or "",
            "pad_token": (tokenizer.pad_token if tokenizer else None) or "",
        }
        facts = inspect_template(template, special)
        self.choose("chat template", _template_name(replaced, self.recipe), _how_masked(facts))
        if facts.end_of_turn is None:
            self.remarks.append("The chat template could not be probed; the rows will show whether it renders.")
        elif facts.end_of_turn == "":
            self.choose(
                "end of turn", eos, "the chat template does not end an answer; the end token is added and learned"
            )
        else:
            self.choose("end of turn", facts.end_of_turn, "the chat template ends an answer with it; it is learned")

    def _padding(self) -> None:
        tokenizer = self.facts.tokenizer
        if tokenizer is None:
            return
        token, reason = tokenizer.pad_token, "the tokenizer's own"
        if token is None:
            token, reason = tokenizer.eos_token, "the tokenizer has none; padding is masked by position, not by token"
        elif token == tokenizer.eos_token:
            reason = "same as the end token; padding is masked by position, so the end is learned"
        self.choose("padding token", token, reason)

    # --- training ---------------------------------------------------------------------------------

    def _training_kwargs(self, dtype: str, has_validation: bool) -> dict[str, Any]:
        training, on_gpu = self.recipe.training, self.hardware.device == "cuda"
        batch, accumulation = self._batch()
        eval_batch: Any = training.per_device_eval_batch_size
        if eval_batch == "auto":
            eval_batch = batch
            if has_validation:
                self.choose("training.per_device_eval_batch_size", batch, "as in training")
        mixed = self._mixed(dtype)
        return {
            "num_train_epochs": training.num_train_epochs or DEFAULT_EPOCHS,
            "max_steps": training.max_steps or -1,
            "per_device_train_batch_size": batch,
            "per_device_eval_batch_size": eval_batch,
            "gradient_accumulation_steps": accumulation,
            "learning_rate": training.learning_rate,
            "lr_scheduler_type": training.lr_scheduler_type,
            "lr_scheduler_kwargs": dict(training.lr_scheduler_kwargs),
            "warmup_steps": self._warmup(),
            "optim": self._optimizer(),
            "weight_decay": training.weight_decay,
            "adam_beta1": training.adam_beta1,
            "adam_beta2": training.adam_beta2,
            "adam_epsilon": training.adam_epsilon,
            "max_grad_norm": training.max_grad_norm,
            "neftune_noise_alpha": training.neftune_noise_alpha,
            "gradient_checkpointing": self._checkpointing(),
            "train_sampling_strategy": training.train_sampling_strategy,
            "dataloader_num_workers": training.dataloader_num_workers,
            "seed": training.seed,
            "logging_steps": training.logging_steps,
            "eval_strategy": self._evaluation(has_validation),
            "eval_steps": training.eval_steps,
            "save_strategy": training.save_strategy,
            "save_steps": training.save_steps,
            "save_total_limit": training.save_total_limit,
            "load_best_model_at_end": self._keep_best(has_validation),
            "early_stopping_patience": training.early_stopping_patience,
            "report_to": self._trackers(),
            "bf16": mixed == "bfloat16",
            "fp16": mixed == "float16",
            "use_cpu": not on_gpu,
        }

    def _batch(self) -> tuple[int, int]:
        training, world = self.recipe.training, self.hardware.world_size
        wanted = training.global_batch_size or DEFAULT_GLOBAL_BATCH_SIZE
        batch: Any = training.per_device_train_batch_size
        if batch == "auto":
            usual = 4 if self.hardware.device == "cuda" else 8
            batch = next((size for size in (usual, 4, 2, 1) if size <= usual and wanted % (size * world) == 0), 1)
            reason = f"usual on a {'GPU' if self.hardware.device == 'cuda' else 'CPU'}"
            if batch != usual:
                reason = f"the most that makes {wanted} rows a step, of {usual} that are {reason}"
            self.choose("training.per_device_train_batch_size", batch, reason)
        steps: Any = training.gradient_accumulation_steps
        if steps == "auto":
            if training.global_batch_size and wanted % (batch * world):
                self.wrong(
                    ("training", "global_batch_size"),
                    f"{wanted} is not a multiple of {batch} rows x {world} processes",
                )
            steps = max(1, wanted // (batch * world))
            processes = f"{world} process{'es' * (world > 1)}"
            reason = f"{batch} rows x {steps} passes x {processes} = {batch * steps * world} rows a step"
            self.choose("training.gradient_accumulation_steps", steps, reason)
        return int(batch), int(steps)

    def _warmup(self) -> float:
        training = self.recipe.training
        if training.warmup_steps is not None:
            return training.warmup_steps
        if training.warmup_ratio is not None:
            return training.warmup_ratio
        if training.lr_scheduler_type == "constant":
            return 0
        return float(self.choose("training.warmup_ratio", DEFAULT_WARMUP_RATIO, "default"))

    def _optimizer(self) -> str:
        asked, on_gpu = self.recipe.training.optim, self.hardware.device == "cuda"
        if asked == "auto":
            if self.recipe.quantization and on_gpu:
                reason = "quantized base: states in 8 bits, paged out when memory is short"
                return str(self.choose("training.optim", "paged_adamw_8bit", reason))
            return str(self.choose("training.optim", "adamw_torch_fused", "one kernel for the whole update"))
        if not on_gpu and any(part in asked for part in CUDA_ONLY_OPTIMIZERS):
            message = f"{asked} needs a CUDA GPU, and this is a CPU; use auto or adamw_torch_fused"
            self.wrong(("training", "optim"), message)
        return asked

    def _trackers(self) -> list[str]:
        trackers = self.recipe.training.report_to
        for index, name in enumerate(trackers):
            module = TRACKER_MODULES.get(name, name)
            if not is_installed(module):
                self.wrong(("training", "report_to", index), f"the package {module} is not installed")
        return list(trackers)

    def _checkpointing(self) -> bool:
        asked, on_gpu = self.recipe.training.gradient_checkpointing, self.hardware.device == "cuda"
        if asked != "auto":
            return asked
        reason = "GPU memory is scarcer than time" if on_gpu else "main memory is plenty, time is not"
        return bool(self.choose("training.gradient_checkpointing", on_gpu, reason))

    def _evaluation(self, has_validation: bool) -> str:
        asked = self.recipe.training.eval_strategy
        if asked != "auto":
            return asked
        if not has_validation:
            return str(self.choose("training.eval_strategy", "no", "there are no validation rows"))
        return str(self.choose("training.eval_strategy", "epoch", "there are validation rows"))

    def _keep_best(self, has_validation: bool) -> bool:
        training = self.recipe.training
        asked = training.load_best_model_at_end
        if asked != "auto":
            return asked
        best = has_validation and training.eval_strategy != "no" and training.save_strategy != "no"
        reason = "of the lowest validation loss" if best else "there is no validation loss to choose by"
        return bool(self.choose("training.load_best_model_at_end", best, reason))


def unread_columns(row: Row, format: Format, source: SourcePlan) -> list[str]:
    """A row's columns that its format does not read. A template may read any."""
    if source.template is not None:
        return []
    known = {source.columns.get(name, name) for name in (*COLUMNS[format], *OPTIONAL[format])}
    read = known | {name.split(".")[0] for name in known}
    return [printable(name) for name in row.fields if name not in read]


def _counted(source: SourcePlan) -> SourcePlan:
    if source.hub is not None:
        return source
    rows = sum(1 for _ in itertools.islice(read_rows(source.path), source.max_rows))
    return dataclasses.replace(source, rows=rows)


def is_installed(module: str) -> bool:
    return importlib.util.find_spec(module) is not None


def _given(format: str) -> Format | None:
    return None if format == "auto" else format  # type: ignore[return-value]


def _list(values: Any) -> list[Any] | None:
    return None if values is None else list(values)


def _steps(key: str) -> tuple[str | int, ...]:
    return tuple(int(part) if part.isdecimal() else part for part in key.split("."))


def _template_name(replaced: str | None, recipe: Recipe) -> str:
    return str(recipe.model.chat_template) if replaced else "the tokenizer's"


def _how_masked(facts: TemplateFacts) -> str:
    if facts.marks_answers:
        return "marks its answers itself"
    if facts.has_training_version:
        return "answers are marked by TRL's training version of it"
    return "answers are found by rendering the conversation turn by turn"
