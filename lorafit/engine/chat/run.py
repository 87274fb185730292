"""`lorafit chat`: the story, and the models of a chat, loaded until it ends."""

from __future__ import annotations

import contextlib
import gc
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import torch
from transformers import AutoModelForCausalLM, AutoTokenizer, PreTrainedTokenizerBase
from trl.trainer.utils import add_fused_lm_head

from lorafit.bounds import read_json
from lorafit.console import Console
from lorafit.engine.chat.conversation import Conversation, Session, known
from lorafit.engine.data.render import ChatTemplate, special_tokens
from lorafit.engine.evaluate.models import Loaded, NamedModel, adapter_named, base_of, loaded
from lorafit.engine.model import loading
from lorafit.engine.quiet import hush_progress
from lorafit.engine.tokenizer import cannot_load, gguf, load_tokenizer, location
from lorafit.errors import ModelError, UsageError
from lorafit.evaluation.figures import BASE
from lorafit.facts import weight_files
from lorafit.files import check
from lorafit.options.chat import ChatOptions, Turn, Write
from lorafit.plan import Plan
from lorafit.rows.audit import Audit
from lorafit.run.directory import RunDir, located, open_run
from lorafit.text import near
from lorafit.written import expanded


@contextlib.contextmanager
def open_session(options: ChatOptions, console: Console) -> Iterator[Session]:
    """Load what was named, until the block ends. Raises UsageError, ModelError, DoesNotFitError."""
    taken = ["base", "adapter", "trained", "model"]
    for name, path in options.adapters:
        if name in taken:
            raise UsageError(f"--adapter {name}={path}: the name {name!r} is taken; give it another")
        taken.append(name)
    with _of_run(options, console) if RunDir(located(options.path)).is_run else _of_model(options, console) as session:
        yield session


@contextlib.contextmanager
def _of_run(options: ChatOptions, console: Console) -> Iterator[Session]:
    with contextlib.ExitStack() as models:
        with contextlib.ExitStack() as held:  # only while they load, so that a chat is in no other command's way
            run, plan = held.enter_context(open_run(options.path))
            names, contenders = {}, [base_of(run, plan)]
            if plan.adapter.trains_base:
                names, first = {"trained": BASE}, "trained"
                contenders = [NamedModel(first, "trained", str(run.model), plan, run)]
                if options.adapters:
                    raise UsageError(f"--adapter: {run.path} trained in full, and adapters are for its base")
            else:
                first = "adapter"
                contenders.append(NamedModel(first, "adapter", str(run.adapter), plan, run))
                contenders += [adapter_named(name, path, run, plan, held) for name, path in options.adapters]
                names = {one.name: one.name for one in contenders}
            first = known(options.use or first, names)
            tokenizer = load_tokenizer(plan, run.result)
            template = _template(tokenizer, plan.data.date)
            if template is not None and _is_plain(plan):
                template = None
                _tell(console, f"{run.path}: learned to complete plain prompts, so each prompt is continued as it is")
            elif template is None:
                _tell(console, _untemplated(options.path))
            model = models.enter_context(loaded(contenders))
        yield Session(model, names, first, tokenizer, template)


def _is_plain(plan: Plan) -> bool:
    """Whether the training saw prompts without the chat template."""
    return plan.audit is not None and Audit.from_dict(plan.audit).masks == "the completion column"


@contextlib.contextmanager
def _of_model(options: ChatOptions, console: Console) -> Iterator[Session]:
    """A model by itself, with adapters on it."""
    name = options.path
    _check_model(name)
    check(located(name))
    weight_files(located(name))
    folders = {given: _adapter_folder(given, path, name) for given, path in options.adapters}
    names = {"model": BASE} | {given: given for given in folders}
    first = known(options.use or "model", names)
    tokenizer = _from_pretrained(AutoTokenizer, "tokenizer", name)
    template = _template(tokenizer, None)
    if template is None:
        _tell(console, _untemplated(name))
    model = _from_pretrained(AutoModelForCausalLM, "model", name, dtype="auto")
    if getattr(model, "hf_quantizer", None) is None:  # else it is in its place
        model.to("cuda" if torch.cuda.is_available() else "cpu")
    model.eval()
    if folders:
        add_fused_lm_head(model, outputs=("log_probs", "is_top1"))  # Loaded settles it with each adapter
    here = Loaded(model)
    del model
    for given, folder in folders.items():
        here.add(given, folder)
    try:
        yield Session(here, names, first, tokenizer, template)
    finally:
        del here
        gc.collect()


def _from_pretrained(kind: Any, what: str, name: str, **kwargs: Any) -> Any:
    try:
        with loading(name):
            return kind.from_pretrained(*location(name), **gguf(name), trust_remote_code=False, **kwargs)
    except Exception as error:
        raise cannot_load(what, name, error) from error


def _check_model(name: str) -> None:
    """Raises UsageError for a path that holds no model; a name that is no path may be one on the hub."""
    path = expanded(name)
    if path.is_file() and name.endswith(".gguf"):
        return
    if (path / "adapter_config.json").is_file():
        raise UsageError(f"{name}: is an adapter; name its run or its base, with --adapter NAME={name}")
    if path.exists() and not (path / "config.json").is_file():
        raise UsageError(f"{name}: is no run (it has no plan.json) and no model (it has no config.json)")
    is_path = name.startswith((".", "/", "~")) or name.count("/") > 1 or name.endswith((".gguf", "/"))
    if not path.exists() and (is_path or ("/" in name and path.parent.is_dir())):
        beside = sorted(one.name for one in path.parent.iterdir()) if path.parent.is_dir() else []
        raise UsageError(f"{name}: no such run or model{near(path.name, beside) if beside else ''}")


def _adapter_folder(name: str, path: Path, base: str) -> Path:
    """An adapter's folder, also of a run. Raises UsageError, and ModelError if it is for another base."""
    run = RunDir(located(path))
    folder = run.adapter if run.is_run else run.path
    if not (folder / "adapter_config.json").is_file():
        raise UsageError(f"--adapter {name}={path}: {folder} has no adapter_config.json, so there is no adapter")
    check(folder)
    named = str(read_json(folder / "adapter_config.json").get("base_model_name_or_path") or "")
    if named and expanded(named).name.lower() != located(base).name.lower():
        raise ModelError(f"--adapter {name}={path}: is for the base {named}, not for {base}")
    return folder


def _template(tokenizer: PreTrainedTokenizerBase, date: str | None) -> ChatTemplate | None:
    template: Any = tokenizer.chat_template
    template = template.get("default") if isinstance(template, dict) else template
    return ChatTemplate(tokenizer, template, special_tokens(tokenizer), date) if template else None


def _untemplated(name: str) -> str:
    return f"{name}: has no chat template, so each prompt is continued as plain text, by itself"


def _tell(console: Console, text: str) -> None:
    console.print(text, style="yellow", markup=False, highlight=False, soft_wrap=True)


def chat(options: ChatOptions, console: Console, read: Callable[[str], str], write: Write) -> list[Turn]:
    """Answer the prompts of the options, or else those that are read until `/quit` or the end of input.

    Args:
        console: for remarks.
        read: shows its argument and returns a line, as `input` does.
        write: shows a part of an answer at once; it gets text that is harmless for a terminal.

    Returns every answer. Raises UsageError, ModelError, DoesNotFitError; DataError if the template refuses a prompt.
    """
    options.check()
    hush_progress()
    with open_session(options, console) as session:
        talk = Conversation(session, options, console, write)
        if options.prompts:
            for prompt in options.prompts:
                talk.ask(prompt)
        else:
            with contextlib.suppress(ImportError):
                import readline  # noqa: F401 - gives `input` its line editing
            talk.run(read)
        return talk.turns
