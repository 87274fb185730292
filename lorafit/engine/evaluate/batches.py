"""How a model is run on many rows: its arithmetic, its cache, batches as large as memory allows, and greedy answers."""

from __future__ import annotations

import contextlib
import functools
import inspect
import itertools
import time
from collections.abc import Callable, Collection, Iterable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any, TypeAlias, TypeVar

import torch
import transformers
from packaging.version import Version
from transformers import DynamicCache, GenerationMixin, PreTrainedModel, PreTrainedTokenizerBase
from transformers.cache_utils import DynamicLayer
from trl.trainer.utils import add_fused_lm_head

from lorafit.engine.loss import settle_head
from lorafit.errors import is_out_of_memory
from lorafit.hardware import available_memory
from lorafit.plan import Plan
from lorafit.progress import partly_done

T = TypeVar("T")
MOST_ROWS = 64
CPU_TOKENS = 2048
"""Padded tokens of a batch on a CPU: more are no faster there, and leave the caches."""
GPU_TOKENS = 32768
SHARE = 0.25
"""Share of the free memory that a batch may take."""


def batches(
    lengths: Sequence[int], budget_tokens: int, most_rows: int = MOST_ROWS, order: Sequence[int] | None = None
) -> Iterator[list[int]]:
    """Indices by length, longest first (so that what doesn't fit is met at once), in batches within a budget.

    Args:
        budget_tokens: of rows times the longest of them; a longer row is a batch by itself.
        order: the indices to take, in this order, if not all by length.
    """
    if order is None:
        order = sorted(range(len(lengths)), key=lambda index: -lengths[index])
    batch: list[int] = []
    longest = 0
    for index in order:
        longest_then = max(longest, lengths[index])
        if batch and (len(batch) == most_rows or longest_then * (len(batch) + 1) > budget_tokens):
            yield batch
            batch, longest_then = [], lengths[index]
        batch.append(index)
        longest = longest_then
    if batch:
        yield batch


def token_budget(model: Any) -> int:
    """Padded tokens of a batch: what fits into a quarter of the free memory, at most a fixed number on each device.

    A token takes its key and value in every layer (2 x layers x key-value heads x head size), and the activations of
    one layer, which are freed before the next: about eight tensors as wide as the hidden state and its feed-forward
    part, in float32 at worst. Logits are counted by those who make them.
    """
    config = model.config.get_text_config()
    hidden = int(config.hidden_size)
    wide = max(int(getattr(config, "intermediate_size", 0) or 0), 4 * hidden)
    heads = int(getattr(config, "num_attention_heads", 0) or 1)
    kept = int(getattr(config, "num_key_value_heads", 0) or heads)
    head = int(getattr(config, "head_dim", 0) or hidden // heads)
    layers = int(getattr(config, "num_hidden_layers", 1))
    size = max(torch.finfo(model.dtype).bits // 8, 2)
    token_bytes = size * 2 * layers * kept * head + 4 * 8 * (hidden + wide)
    if model.device.type == "cuda":
        free: int | None = torch.cuda.mem_get_info(model.device)[0]
        most = GPU_TOKENS
    else:
        free, most = available_memory(), CPU_TOKENS
    return most if free is None else max(min(int(SHARE * free / token_bytes), most), 1)


def logit_positions(model: Any, most_bytes: int) -> int:
    """Positions whose logits take so many bytes in float32; at least one."""
    return max(most_bytes // (4 * int(model.config.get_text_config().vocab_size)), 1)


def shrinking(work: Callable[[list[int]], list[T]], planned: Iterable[list[int]]) -> Iterator[T]:
    """The results of all batches; where memory is too small for one, it and those after it are halved.

    Raises what a single row raises.
    """
    pieces = 1
    for batch in planned:
        place = 0
        while place < len(batch):
            part = batch[place : place + -(-len(batch) // pieces)]
            made = _attempt(work, part)
            if made is None:
                while -(-len(batch) // pieces) >= len(part):
                    pieces *= 2
                if torch.cuda.is_available():
                    torch.cuda.empty_cache()
            else:
                yield from made
                place += len(part)


def _attempt(work: Callable[[list[int]], list[T]], batch: list[int]) -> list[T] | None:
    """None where memory is too small; by then nothing holds what was made until there."""
    try:
        return work(batch)
    except Exception as error:
        if len(batch) == 1 or not is_out_of_memory(error):
            raise
        return None


def padded(rows: Sequence[Sequence[int]], value: int, left: bool = False) -> torch.Tensor:
    """(rows, longest) from lists of different lengths."""
    longest = max(map(len, rows))
    fill = [[value] * (longest - len(row)) for row in rows]
    return torch.tensor([[*more, *row] if left else [*row, *more] for row, more in zip(rows, fill, strict=True)])


def ones(rows: Sequence[Sequence[int]]) -> list[list[int]]:
    """The attention mask of each row, without padding."""
    return [[1] * len(row) for row in rows]


def placed(model: PreTrainedModel, device: str) -> PreTrainedModel:
    """The model on a device, to be run there with a cache."""
    if getattr(model, "hf_quantizer", None) is None:  # else it is there already
        model.to(device)
    model.config.use_cache = True
    return model.eval()


def ready(model: PreTrainedModel, plan: Plan) -> PreTrainedModel:
    """The model on the device it was trained on, with the training's head, so that losses mean the same."""
    placed(model, plan.hardware.device)
    add_fused_lm_head(model, outputs=("log_probs", "is_top1"))
    with autocast(model):
        settle_head(model)
    return model


def autocast(model: Any) -> contextlib.AbstractContextManager[Any]:
    """Arithmetic as in training: 16-bit weights with float32 adapters meet in 16-bit arithmetic."""
    dtype = model.dtype
    if dtype == torch.float32:
        return contextlib.nullcontext()
    return torch.autocast(model.device.type, dtype=dtype)


def bare(model: Any) -> PreTrainedModel:
    """The transformers model, with the adapters in it where there are some."""
    inner: PreTrainedModel = model.get_base_model() if hasattr(model, "get_base_model") else model
    return inner


def new_cache(model: Any) -> DynamicCache:
    return DynamicCache(config=model.config.get_text_config(decoder=True))


def with_cache(model: Any, cache: Any) -> dict[str, Any]:
    """The argument by which a model takes a cache: `cache` since transformers 5.24, `past_key_values` before."""
    return {"cache" if "cache" in takes(model) else "past_key_values": cache}


def cache_of(output: Any) -> Any:
    """The cache in a model's output; None if there is none."""
    return getattr(output, "cache", getattr(output, "past_key_values", None))


@torch.no_grad()
def has_plain_cache(model: Any) -> bool:
    """Whether all that a model keeps of a prompt is keys and values of every position: rows can be copied and dropped.

    It must also take positions and the number of logits wanted.
    """
    known = takes(model)
    if not {"attention_mask", "position_ids", "logits_to_keep"} <= known or not {"cache", "past_key_values"} & known:
        return False
    cache = new_cache(model)
    with autocast(model):
        ids = torch.zeros((1, 2), dtype=torch.long, device=model.device)
        kept = cache_of(model(input_ids=ids, use_cache=True, **with_cache(model, cache)))
    return (
        type(kept) is DynamicCache
        and kept.get_seq_length() == 2
        and all(type(layer) is DynamicLayer for layer in kept.layers)
    )


@torch.no_grad()
def ignores_padding(model: Any) -> bool:
    """Whether padding before a prompt changes nothing, which is not so for everything recurrent: it is tried."""
    ids = torch.arange(3, 9, device=model.device)
    wide, mask = torch.cat([ids.new_zeros(4), ids])[None], torch.tensor([[0] * 4 + [1] * 6], device=model.device)
    positions = {"position_ids": (mask.cumsum(-1) - 1).clamp_min(0)} if "position_ids" in takes(model) else {}
    with autocast(model):
        alone = model(input_ids=ids[None], attention_mask=torch.ones_like(ids)[None]).logits[0, -1].float()
        after = model(input_ids=wide, attention_mask=mask, **positions).logits[0, -1].float()
    return bool((alone - after).abs().max() <= (1e-3 if is_exact(model) else 5e-2) * alone.abs().max())


def is_exact(model: Any) -> bool:
    """Whether results differ by float32 rounding only, however they are put into batches."""
    return model.dtype == torch.float32 and not getattr(model, "is_quantized", False)


def takes(model: Any) -> frozenset[str]:
    """The names of what a model's forward pass may be given."""
    return _parameters(type(bare(model)).forward)


@functools.cache
def _parameters(forward: Callable[..., Any]) -> frozenset[str]:
    return frozenset(inspect.signature(forward).parameters)


HARMLESS = {
    *("bos_token_id", "eos_token_id", "pad_token_id", "decoder_start_token_id", "max_length", "max_new_tokens"),
    *("do_sample", "temperature", "top_p", "top_k", "top_h", "min_p", "typical_p", "epsilon_cutoff", "eta_cutoff"),
    *("use_cache", "transformers_version", "_from_model_config", "return_dict_in_generate", "length_penalty"),
    *("output_attentions", "output_hidden_states", "output_scores", "output_logits", "early_stopping"),
}
"""Settings of a generation configuration that change no greedy answer."""
NEUTRAL_AT_ONE = {"repetition_penalty", "encoder_repetition_penalty", "num_beams", "num_return_sequences"}
BLIND_TO_PADDING = {"min_new_tokens", "suppress_tokens", "begin_suppress_tokens"}
"""Wishes that padding before a prompt leaves as they are; n-grams are looked for in it as well."""
if Version(transformers.__version__) >= Version("5.23"):  # before, the padding was punished as well
    BLIND_TO_PADDING.add("repetition_penalty")
KEPT = 0.75
"""Share of a batch that is still at work below which the others are taken out of it."""


Answer: TypeAlias = tuple[list[int], bool, float]
"""`ids`, `ended` and `seconds` of Generated."""


@dataclass(frozen=True)
class Generated:
    """A greedy answer.

    Attributes:
        ids: without the end token.
        ended: by an end token.
        seconds: from the start of its batch to its own end.
    """

    row: int
    ids: list[int]
    ended: bool
    seconds: float
    batch_rows: int


def end_tokens(model: Any, tokenizer: PreTrainedTokenizerBase, learned: Collection[int] = ()) -> set[int]:
    """Every token that ends an answer: the model's, the tokenizer's, and those that training taught."""
    config = model.generation_config
    known = config.eos_token_id if isinstance(config.eos_token_id, list) else [config.eos_token_id]
    return {token for token in (*known, tokenizer.eos_token_id, *learned) if token is not None}


@torch.no_grad()
def generate(
    model: Any,
    prompts: Sequence[Sequence[int]],
    ends: Collection[int],
    pad_id: int,
    max_new_tokens: int,
    done: Collection[int] = (),
    expected_lengths: Sequence[int] | None = None,
) -> Iterator[Generated]:
    """Greedy answers to all prompts but those in `done`, batch by batch.

    They are those of `model.generate` for one prompt at a time, with the model's generation configuration but for
    sampling: whatever else that asks for is left to `generate`, and so are models that keep other things than keys and
    values of all positions. Rows of different lengths are put together only where padding changes nothing. An answer
    ends, unended, where the model's positions do: some models can go no further, and others have never learned to.

    Args:
        ends: the tokens that end an answer.
        expected_lengths: of the answers, in tokens: rows that are alike are put together. They change no answer.
    """
    lengths = [len(prompt) for prompt in prompts]
    expected = [0] * len(lengths) if expected_lengths is None else expected_lengths
    left = [index for index in range(len(lengths)) if index not in done]
    if not left or max_new_tokens < 1:
        return
    wishes = _wishes(model)
    own = not wishes and _has_plain_loop(model)
    room = [_room(model, length, max_new_tokens) for length in lengths]

    def work(batch: list[int]) -> list[Generated]:
        chosen = [list(prompts[index]) for index in batch]
        with autocast(model):
            made = (_own_loop if own else _library)(model, chosen, set(ends), pad_id, room[batch[0]])
        return [Generated(row, *one, len(batch)) for row, one in zip(batch, made, strict=True)]

    def planned() -> Iterator[list[int]]:
        sizes = [length + max_new_tokens // 2 for length in lengths]  # an answer's tokens are keys and values only
        budget = 2 * token_budget(model)  # a step reads all weights, for however many rows
        yield from ([index] for index in left if room[index] < max_new_tokens)
        free = [index for index in left if room[index] == max_new_tokens]
        if own or (wishes <= BLIND_TO_PADDING and ignores_padding(model)):
            order = sorted(free, key=lambda index: (-expected[index], -lengths[index]))
            yield from batches(sizes, budget, order=order)
            return
        order = sorted(free, key=lambda index: (-lengths[index], -expected[index]))
        for _, alike in itertools.groupby(order, key=lambda index: lengths[index]):
            yield from batches(sizes, budget, order=list(alike))

    yield from shrinking(work, planned())


def _room(model: Any, prompt: int, most: int) -> int:
    """Tokens that an answer may have after a prompt of so many; a prompt beyond the positions shows there is no end."""
    positions = getattr(model.config.get_text_config(decoder=True), "max_position_embeddings", None)
    return min(most, positions - prompt) if isinstance(positions, int) and positions > prompt else most


def _wishes(model: Any) -> set[str]:
    """The names of what a model's generation configuration asks for beyond the most likely token each time."""
    return {
        name
        for name, value in model.generation_config.to_diff_dict().items()
        if name not in HARMLESS
        and value not in (None, False, [], {}, 0)
        and not (name in NEUTRAL_AT_ONE and value == 1)
    }


def _has_plain_loop(model: Any) -> bool:
    """Whether `generate` does with this model what it does with most, so that the own loop does the same."""
    methods = ("generate", "_sample", "prepare_inputs_for_generation", "_update_model_kwargs_for_generation")
    inner = type(bare(model))
    usual = all(getattr(inner, name, None) is getattr(GenerationMixin, name, None) for name in methods)
    return usual and has_plain_cache(model)


def _library(model: Any, prompts: list[list[int]], ends: set[int], pad_id: int, most: int) -> list[Answer]:
    """Generate by transformers, with all that the model's generation configuration asks for but sampling."""
    began = time.perf_counter()
    inputs = padded(prompts, pad_id, left=True).to(model.device)
    output = model.generate(
        input_ids=inputs,
        attention_mask=padded(ones(prompts), 0, left=True).to(model.device),
        max_new_tokens=most,
        do_sample=False,
        temperature=None,
        top_p=None,
        top_k=None,
        eos_token_id=sorted(ends),
        pad_token_id=pad_id,
        use_cache=True,
        return_dict_in_generate=False,
    )
    seconds = time.perf_counter() - began
    found = []
    for ids in output[:, inputs.shape[1] :].tolist():
        end = next((place for place, token in enumerate(ids) if token in ends), None)
        found.append((ids[:end], end is not None, seconds))
    return found


def _own_loop(model: Any, prompts: list[list[int]], ends: set[int], pad_id: int, most: int) -> list[Answer]:
    """The most likely token each time; rows that have ended leave the batch and its cache."""
    began = time.perf_counter()
    device = model.device
    mask = padded(ones(prompts), 0, left=True).to(device)
    ids = padded(prompts, pad_id, left=True).to(device)
    positions = (mask.cumsum(-1) - 1).clamp_min(0)
    cache = new_cache(model)
    answers: list[list[int]] = [[] for _ in prompts]
    ended: list[float | None] = [None] * len(prompts)
    rows = list(range(len(prompts)))
    for step in range(most):
        output = model(
            input_ids=ids,
            attention_mask=mask,
            position_ids=positions,
            **with_cache(model, cache),
            use_cache=True,
            logits_to_keep=1,
        )
        chosen = output.logits[:, -1].float().argmax(-1)
        now = time.perf_counter() - began
        for row, token in zip(rows, chosen.tolist(), strict=True):
            if ended[row] is None and token in ends:
                ended[row] = now
            elif ended[row] is None:
                answers[row].append(token)
        partly_done(len(prompts) * (step + 1) / most)
        working = [place for place, row in enumerate(rows) if ended[row] is None]
        if not working or step == most - 1:
            break
        ids, positions = chosen[:, None], positions[:, -1:] + 1
        mask = torch.cat([mask, mask.new_ones(len(mask), 1)], dim=1)
        if len(working) <= KEPT * len(rows):
            where = torch.tensor(working, device=device)
            cache.batch_select_indices(where)
            ids, positions, mask = ids[where], positions[where], mask[where]
            rows = [rows[place] for place in working]
    total = time.perf_counter() - began
    return [
        (answer, end is not None, total if end is None else end) for answer, end in zip(answers, ended, strict=True)
    ]
