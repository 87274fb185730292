"""`lorafit chat`: the models of a chat, loaded until it ends, and the conversation: its commands, its answers,
streamed."""

from __future__ import annotations

import contextlib
import gc
import math
import signal
import time
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

import torch
from transformers import AutoModelForCausalLM, AutoTokenizer, PreTrainedTokenizerBase, StoppingCriteria
from transformers.generation.streamers import BaseStreamer
from trl.trainer.utils import add_fused_lm_head

from lorafit.bounds import read_json
from lorafit.console import Console
from lorafit.engine import hush_progress
from lorafit.engine.callbacks import StopRequest
from lorafit.engine.data.encode import plain_prompt
from lorafit.engine.data.render import ChatTemplate, special_tokens
from lorafit.engine.evaluate.batches import autocast, end_tokens, placed
from lorafit.engine.evaluate.models import Loaded, NamedModel, adapter_named, base_of, loaded, start_is_here, start_of
from lorafit.engine.model import loading
from lorafit.engine.tokenizer import gguf, load_tokenizer, location, reading
from lorafit.errors import DataError, DoesNotFitError, LorafitError, ModelError, UsageError, is_out_of_memory
from lorafit.evaluation.figures import BASE
from lorafit.facts import weight_files
from lorafit.files import check
from lorafit.options import RESERVED, ChatOptions, Write
from lorafit.rows import Message
from lorafit.rows.audit import Audit
from lorafit.run.directory import RunDir, located, open_run
from lorafit.text import first_line, harmless, near
from lorafit.written import expanded


@dataclass(frozen=True)
class Turn:
    """A prompt and its answer.

    Attributes:
        answer: as the model wrote it, without special tokens; not made harmless for a terminal.
        tokens: of the answer, with its end token.
        ended: `end`: by itself; `length`: cut off; `stopped`: by Ctrl-C.
    """

    prompt: str
    answer: str
    model: str
    tokens: int
    seconds: float
    ended: Literal["end", "length", "stopped"]


@dataclass(frozen=True)
class Session:
    """The models, in memory, and the form that a conversation takes for them.

    Attributes:
        names: of the models as people see them -> as `loaded` does.
        first: who answers first.
        template: None: each prompt is continued as plain text.
    """

    loaded: Loaded
    names: dict[str, str]
    first: str
    tokenizer: PreTrainedTokenizerBase
    template: ChatTemplate | None

    def tokens(self, messages: list[Message]) -> list[int]:
        """The conversation up to the answer that is asked for, in tokens as a server has them. Raises DataError."""
        try:
            for message in messages:
                message["content"].encode()
        except UnicodeEncodeError:
            raise DataError("the prompt is no text: it has bytes in it that are no UTF-8") from None
        if self.template is None:
            return plain_prompt(self.tokenizer, str(messages[-1]["content"]))
        return list(self.tokenizer(self.text(messages), add_special_tokens=False, verbose=False)["input_ids"])

    def text(self, messages: list[Message]) -> str:
        """What `tokens` are of, where there is a template. Raises DataError if that refuses the conversation."""
        assert self.template is not None
        try:
            return self.template.ask(messages)
        except Exception as error:  # noqa: BLE001 - a template may fail in any way
            raise DataError(f"the chat template refuses the conversation: {first_line(error)}") from None

    def ends(self, model: Any) -> list[int]:
        """The tokens at which an answer ends."""
        closing = self.tokenizer.convert_tokens_to_ids(sorted(self.template.closing)) if self.template else []
        return sorted(end_tokens(model, self.tokenizer, closing))

    def answer(self, name: str, messages: list[Message], options: ChatOptions, seed: int, show: Write) -> Turn:
        """One model's answer to a conversation, shown as it comes. Where people type, Ctrl-C stops it.

        Raises DataError, DoesNotFitError, and UsageError for a conversation that is too long.
        """
        ids = self.tokens(messages)
        if not ids:
            raise UsageError("the prompt is empty")
        model = self.loaded.use(self.names[name])
        most = getattr(model.config.get_text_config(), "max_position_embeddings", None) or math.inf
        if len(ids) >= most:
            hint = "" if options.prompts else "; /reset begins a new one"
            raise UsageError(
                f"the conversation is {len(ids)} tokens long, and the model takes {most} with the answer{hint}"
            )
        ends = self.ends(model)
        stream = _Stream(self.tokenizer, show)
        draw = {"do_sample": True, "temperature": options.temperature, "top_p": 1.0, "top_k": 0}
        greedy = {"do_sample": False, "temperature": None, "top_p": None, "top_k": None}
        inputs = torch.tensor([ids], device=model.device)
        torch.manual_seed(seed)
        began = time.perf_counter()
        stop = _Stop(signal.SIGINT)
        by_hand = contextlib.nullcontext() if options.prompts else stop.listening()
        with by_hand, autocast(model), _memory_errors(name):
            model.generate(
                input_ids=inputs,
                attention_mask=torch.ones_like(inputs),
                max_new_tokens=int(min(options.max_new_tokens, most - len(ids))),
                eos_token_id=ends or None,
                pad_token_id=self.tokenizer.pad_token_id or 0,  # nothing is padded
                use_cache=True,
                streamer=stream,
                stopping_criteria=[stop],
                **(draw if options.temperature else greedy),
            )
        seconds = time.perf_counter() - began
        ended: Literal["end", "stopped", "length"] = "stopped" if stop.signal_number else "length"
        if stream.ids and stream.ids[-1] in ends:
            ended = "end"
        return Turn(str(messages[-1]["content"]), stream.text, name, len(stream.ids), seconds, ended)


class _Stream(BaseStreamer):
    """Shows tokens as text as soon as it is known what they say.

    Everything is decoded anew with each token: what a token says may depend on those before it. Bytes that begin a
    character decode to U+FFFD, which is held back until more is known.
    """

    def __init__(self, tokenizer: PreTrainedTokenizerBase, show: Write) -> None:
        self.tokenizer = tokenizer
        self.show = show
        self.ids: list[int] = []
        self.text = ""
        self._is_prompt = True

    def put(self, value: torch.Tensor) -> None:
        if not self._is_prompt:
            self.ids += value.flatten().tolist()
            self._show(self._decoded().rstrip("\ufffd"))
        self._is_prompt = False

    def end(self) -> None:
        self._show(self._decoded())

    def _decoded(self) -> str:
        return str(self.tokenizer.decode(self.ids, skip_special_tokens=True, clean_up_tokenization_spaces=False))

    def _show(self, text: str) -> None:
        new = text[len(self.text) :]
        if new:
            self.text += new
            self.show(new)


class _Stop(StopRequest, StoppingCriteria):
    """Ends an answer once Ctrl-C asked for it; a second one is a KeyboardInterrupt."""

    def __call__(self, input_ids: torch.Tensor, scores: Any, **_: Any) -> torch.Tensor:
        asked = self.signal_number is not None
        return torch.full((len(input_ids),), asked, device=input_ids.device, dtype=torch.bool)


@contextlib.contextmanager
def _memory_errors(name: str) -> Iterator[None]:
    try:
        yield
    except Exception as error:
        if is_out_of_memory(error):
            raise DoesNotFitError(f"{name}: the answer does not fit into memory: {first_line(error)}") from error
        raise


HELP = """\
/adapter NAME    answer with this model from now on, in the same conversation; without a NAME: which there are
/base            answer with the base
/compare TEXT    the answers of all models to TEXT, or to the last prompt; they are not kept
/system TEXT     change the system message, and keep what was said; without a TEXT: none
/reset           forget what was said
/quit            leave, as Ctrl-D does
//…              a prompt that begins with a slash
Ctrl-C stops an answer."""


@dataclass
class Conversation:
    """What was said, who answers, and what the commands do.

    Attributes:
        messages: the prompts and answers that the next answer is given to, without the system message.
        turns: every answer that was given, kept or not.
    """

    session: Session
    options: ChatOptions
    console: Console
    write: Write
    messages: list[Message] = field(default_factory=list)
    turns: list[Turn] = field(default_factory=list)

    def __post_init__(self) -> None:
        self.using = self.session.first
        self.system = ""
        self.set_system((self.options.system or "").strip())

    def say(self, text: str, style: str = "") -> None:
        self.console.print(text, style=style, markup=False, highlight=False, soft_wrap=True)

    def run(self, read: Callable[[str], str]) -> None:
        """Read prompts and commands until there is an end to it."""
        self.say(f"{', '.join(self.session.names)}; /help tells what there is to do", "dim")
        interrupted = False
        while True:
            try:
                line = read(f"{self.using}> ")
            except EOFError:
                self.write("\n")
                return
            except KeyboardInterrupt:
                self.write("\n")
                if interrupted:
                    return
                interrupted = True
                self.say("Ctrl-C once more leaves, as /quit and Ctrl-D do", "dim")
                continue
            interrupted = False
            try:
                if self.take(line):
                    return
            except LorafitError as error:
                self.say(str(error), "red")

    def take(self, line: str) -> bool:
        """Answer a line or do what it commands; whether it is the end. Raises LorafitError."""
        if line.startswith("/") and not line.startswith("//"):
            word, _, rest = line.partition(" ")
            return self.command(word.rstrip(), rest.strip())
        if line.strip():
            self.ask(line.removeprefix("/") if line.startswith("//") else line)
        return False

    def command(self, word: str, rest: str) -> bool:
        commands: dict[str, Callable[[str], None]] = {
            "/adapter": self.switch,
            "/base": lambda _: self.switch(BASE),
            "/compare": self.compare,
            "/system": self.set_system,
            "/reset": lambda _: self.messages.clear(),
            "/help": lambda _: self.say(HELP),
        }
        if word == "/quit":
            return True
        if word not in commands:
            raise UsageError(f"{word}: is no command{near(word, [*commands, '/quit'])}")
        commands[word](rest)
        return False

    def switch(self, name: str) -> None:
        """Let another model answer; without a name, say which there are."""
        if name:
            self.using = known(name, self.session.names)
        else:
            self.say("\n".join(f"{'*' if one == self.using else ' '} {one}" for one in self.session.names))

    def set_system(self, text: str) -> None:
        """Have a system message from now on. Raises UsageError, and DataError if the template refuses it."""
        if text and self.session.template is None:
            raise UsageError("there is no chat template, so there is no place for a system message")
        if text and text.split()[0] not in self.session.text([_message("system", text), _message("user", "x")]):
            self.say("the chat template leaves out the system message", "yellow")
        self.system = text

    def ask(self, prompt: str) -> Turn:
        """Have a prompt answered, and keep both. Raises LorafitError, and keeps neither."""
        said: list[Message] = [*self.messages, _message("user", prompt)]
        turn = self._answer(self.using, said)
        self.messages = [*said, _message("assistant", turn.answer.strip())]
        return turn

    def compare(self, prompt: str) -> None:
        """Have a prompt, or the last one, answered by every model, and keep nothing."""
        said: list[Message] = [*self.messages, _message("user", prompt)] if prompt else self.messages[:-1]
        if not said:
            raise UsageError("/compare: there is no prompt yet; give one after it")
        seed = self._seed
        for name in self.session.names:
            self.say(f"{name}:", "bold")
            if self._answer(name, said, seed).ended == "stopped":
                return

    @property
    def _seed(self) -> int:
        return self.options.seed + len(self.turns)

    def _answer(self, name: str, said: list[Message], seed: int | None = None) -> Turn:
        system: list[Message] = [_message("system", self.system)] if self.system else []
        seed = self._seed if seed is None else seed
        turn = self.session.answer(name, [*system, *said], self.options, seed, lambda text: self.write(harmless(text)))
        if not turn.answer.endswith("\n"):
            self.write("\n")
        self.turns.append(turn)
        how = {"end": "", "length": f", cut off at {turn.tokens} tokens", "stopped": ", stopped"}[turn.ended]
        rate = turn.tokens / max(turn.seconds, 1e-9)
        self.say(f"{turn.tokens} tokens, {rate:.1f} tokens/s{how}", "dim")
        return turn


def known(name: str, names: Iterable[str]) -> str:
    """The name, if there is such a model. Raises UsageError."""
    if name not in names:
        raise UsageError(f"there is no model {name!r}{near(name, names)}")
    return name


def _message(role: str, content: str) -> Message:
    return {"role": role, "content": content}


@contextlib.contextmanager
def open_session(options: ChatOptions, console: Console) -> Iterator[Session]:
    """Load what was named, until the block ends. Raises UsageError, ModelError, DoesNotFitError."""
    taken = [*RESERVED, "model"]
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
            names, candidates = {}, [base_of(run, plan)]
            if plan.adapter.trains_base:
                names, first = {"trained": BASE}, "trained"
                candidates = [NamedModel(first, "trained", str(run.model), plan, run)]
                if options.adapters:
                    raise UsageError(f"--adapter: {run.path} trained in full, and adapters are for its base")
            else:
                first = "adapter"
                candidates.append(NamedModel(first, "adapter", str(run.adapter), plan, run))
                candidates += [start_of(run, plan)] if start_is_here(plan, []) else []
                candidates += [adapter_named(name, path, run, plan, held) for name, path in options.adapters]
                names = {one.name: one.name for one in candidates}
            first = known(options.use or first, names)
            tokenizer = load_tokenizer(plan, run.result)
            template = _template(tokenizer, plan.data.date)
            # Whether the training saw prompts without the chat template.
            is_plain = plan.audit is not None and Audit.from_dict(plan.audit).masks == "the completion column"
            if template is not None and is_plain:
                template = None
                _tell(console, f"{run.path}: learned to complete plain prompts, so each prompt is continued as it is")
            elif template is None:
                _tell(console, _untemplated(options.path))
            model = models.enter_context(loaded(candidates))
        yield Session(model, names, first, tokenizer, template)


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
    placed(model, "cuda" if torch.cuda.is_available() else "cpu")
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
    with reading(what, name), loading(name):
        return kind.from_pretrained(*location(name), **gguf(name), trust_remote_code=False, **kwargs)


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
