"""One answer: a conversation as tokens, generated and shown as it comes, and stopped by Ctrl-C."""

from __future__ import annotations

import contextlib
import math
import signal
import time
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any, Literal

import torch
from transformers import PreTrainedTokenizerBase, StoppingCriteria
from transformers.generation.streamers import BaseStreamer

from lorafit.chat import ChatOptions, Turn, Write
from lorafit.data.render import ChatTemplate
from lorafit.errors import (
    DataError,
    DoesNotFitError,
    UsageError,
    first_line,
    is_out_of_memory,
)
from lorafit.evaluate.contenders import Loaded
from lorafit.evaluate.engine.arithmetic import autocast
from lorafit.rows import Message


@dataclass(frozen=True)
class Room:
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
            return self._plain(str(messages[-1]["content"]))
        return list(self.tokenizer(self.text(messages), add_special_tokens=False, verbose=False)["input_ids"])

    def text(self, messages: list[Message]) -> str:
        """What `tokens` are of, where there is a template. Raises DataError if that refuses the conversation."""
        assert self.template is not None
        try:
            return self.template.ask(messages)
        except Exception as error:  # noqa: BLE001 - a template may fail in any way
            raise DataError(f"the chat template refuses the conversation: {first_line(error)}") from None

    def _plain(self, text: str) -> list[int]:
        ids = list(self.tokenizer(text, verbose=False)["input_ids"])
        start, end = self.tokenizer.bos_token_id, self.tokenizer.eos_token_id
        if start is not None and ids[:2] == [start, start]:
            ids = ids[1:]
        return ids[:-1] if ids[1:] and ids[-1] == end and not text.endswith(str(self.tokenizer.eos_token)) else ids

    def ends(self, model: Any) -> list[int]:
        """The tokens at which an answer ends."""
        known = model.generation_config.eos_token_id
        closing = self.tokenizer.convert_tokens_to_ids(sorted(self.template.closing)) if self.template else []
        ids = [*(known if isinstance(known, list) else [known]), self.tokenizer.eos_token_id, *closing]
        return sorted({token for token in ids if token is not None})

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
        with _stoppable(not options.prompts) as stop, autocast(model), _memory_errors(name):
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
        ended: Literal["end", "stopped", "length"] = "stopped" if stop.asked else "length"
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


class _Stop(StoppingCriteria):
    """Ends an answer once that is asked for."""

    def __init__(self) -> None:
        self.asked = False

    def __call__(self, input_ids: torch.Tensor, scores: Any, **_: Any) -> torch.Tensor:
        return torch.full((len(input_ids),), self.asked, device=input_ids.device, dtype=torch.bool)


@contextlib.contextmanager
def _stoppable(by_hand: bool) -> Iterator[_Stop]:
    """Ctrl-C asks for a stop while the block runs; a second one is a KeyboardInterrupt."""
    stop = _Stop()
    if not by_hand:
        yield stop
        return

    def ask(*_: Any) -> None:
        if stop.asked:
            raise KeyboardInterrupt
        stop.asked = True

    before = signal.signal(signal.SIGINT, ask)
    try:
        yield stop
    finally:
        signal.signal(signal.SIGINT, before)


@contextlib.contextmanager
def _memory_errors(name: str) -> Iterator[None]:
    try:
        yield
    except Exception as error:
        if is_out_of_memory(error):
            raise DoesNotFitError(f"{name}: the answer does not fit into memory: {first_line(error)}") from error
        raise
