"""What is learned with each chat template that TRL ships, compared with TRL's own mask or with the words expected.

The tables here say it for every template and shape of a conversation; a template that a newer TRL ships fails
until it is in them.
"""

from __future__ import annotations

import copy
import functools
import itertools
import re
from datetime import date as day
from typing import Any

import pytest
from conftest import make_tokenizer
from transformers import AddedToken, AutoTokenizer, PreTrainedTokenizerBase
from trl import get_training_chat_template
from wording import Like

from lorafit.engine.data.encode import IGNORED, Lengths, tokenize
from lorafit.engine.data.render import Renderer
from lorafit.engine.evaluate.sets import said
from lorafit.engine.tokenizer import settle_template
from lorafit.errors import DataError
from lorafit.facts.template import template_families, thinking_switch, trl_templates
from lorafit.rows import Example, Fault
from lorafit.rows.audit import SourceAudit

Messages = list[dict[str, Any]]
TOOLS = (
    {
        "type": "function",
        "function": {
            "name": "weather",
            "description": "The weather in a city",
            "parameters": {"type": "object", "properties": {"city": {"type": "string"}}, "required": ["city"]},
        },
    },
)


def user(text: str, **rest: Any) -> dict[str, Any]:
    return {"role": "user", "content": text, **rest}


def assistant(text: str, *cities: str, **rest: Any) -> dict[str, Any]:
    calls = [{"type": "function", "function": {"name": "weather", "arguments": {"city": city}}} for city in cities]
    return {"role": "assistant", "content": text, **({"tool_calls": calls} if calls else {}), **rest}


def result(text: str) -> dict[str, Any]:
    return {"role": "tool", "name": "weather", "content": text}


MULTI = [user("one"), assistant("two three"), user("four"), assistant("red green")]
SHAPES: dict[str, Messages] = {
    "single": [user("say yes"), assistant("yes or no")],
    "multi": MULTI,
    "system": [{"role": "system", "content": "the cat"}, *MULTI],
    "open": [*MULTI, user("blue")],
    "call": [user("one"), assistant("", "Rome"), result("sunny"), assistant("red green")],
    "said": [user("one"), assistant("let me see", "Rome"), result("sunny"), assistant("red green")],
    "calls": [user("one"), assistant("", "Rome", "Oslo"), result("sunny"), result("windy"), assistant("red green")],
    "reasoning": [user("one"), assistant("two three", reasoning_content="hm so")],
    "reasonings": [
        user("one"),
        assistant("two three", reasoning_content="hm so"),
        user("four"),
        assistant("red green", reasoning_content="ah yes"),
    ],
}
WITH_TOOLS = ("call", "said", "calls")


# What becomes of each shape:
#   =  learned: the same tokens as TRL's mask, or, without one, exactly the words expected
#   ~  the same, and the audit counts under context_left_out what the template doesn't show
#   x  refused in one line, as the template refuses it, or tells an answer's tokens apart only from its end
#   -  left out and counted under answers_left_out, as the template doesn't show an answer or its tool call
TABLE = """
                        single multi system open call said calls reasoning reasonings
cohere                  =      =     =      =    x    x    x     ~         ~
cohere2                 =      =     =      =    x    x    x     ~         ~
deepseek_r1_distill     =      =     =      =    -    -    -     ~         ~
deepseekv3              =      =     =      =    ~    ~    ~     ~         ~
diffusion_gemma         =      =     =      =    =    =    =     =         ~
gemma                   =      =     x      =    x    x    x     ~         ~
gemma3                  =      =     =      =    x    x    x     ~         ~
gemma4                  =      =     =      =    =    x    =     ~         ~
gemma4_v2               =      =     =      =    =    =    =     ~         ~
gemma4_v3               =      =     =      =    =    x    =     ~         ~
gemma4_v4               =      =     =      =    =    x    =     ~         ~
gemma4_v5               =      =     =      =    =    x    =     =         x
glm4moe                 =      =     =      =    =    =    =     =         ~
gptoss                  =      =     =      =    =    ~    -     =         ~
idefics3                =      =     =      =    -    -    -     ~         ~
lfm2                    =      =     =      =    -    -    -     ~         ~
lfm2_2_5                =      =     =      =    =    =    =     =         ~
lfm2_2_5_v2             =      =     =      =    =    =    =     =         ~
lfm2_2_5_vl             =      =     =      =    =    =    =     =         ~
lfm2_v2                 =      =     =      =    =    =    =     ~         ~
llama3                  =      =     =      =    -    -    -     ~         ~
llama3_1                =      =     =      =    =    ~    x     ~         ~
llama3_2                =      =     =      =    =    ~    x     ~         ~
llava_next              =      =     =      =    x    x    x     ~         ~
muse_glimmer            =      =     =      =    =    ~    =     =         =
nemotron_3_5_lightning  =      =     =      =    =    =    =     =         ~
nemotron_3_nano         =      =     =      =    =    =    =     =         ~
nemotron_3_super        =      =     =      =    =    =    =     =         ~
nemotron_3_ultra        =      =     =      =    =    =    =     =         ~
phi3                    =      =     =      =    -    -    -     ~         ~
phi3_5                  =      =     =      =    -    -    -     ~         ~
qwen2_5                 =      =     =      =    =    =    =     ~         ~
qwen2_5_vl              =      =     =      =    -    -    -     ~         ~
qwen3                   =      =     =      =    =    =    =     =         =
qwen3_5_nothink         =      =     =      =    =    =    =     =         =
qwen3_5_think           =      =     =      =    =    =    =     =         =
qwen3_6                 =      =     =      =    =    =    =     =         =
qwen3_8                 =      =     =      =    =    =    =     =         =
qwen3_instruct_2507     =      =     =      =    =    =    =     ~         ~
qwen3_vl                =      =     =      =    =    =    =     ~         ~
smolvlm                 =      =     =      =    -    -    -     ~         ~
"""
HEAD, *LINES = [line.split() for line in TABLE.strip().splitlines()]
OUTCOMES = {name: dict(zip(HEAD, codes, strict=True)) for name, *codes in LINES}

END = {  # the tokenizers' own eos_token; where the template ends a turn with another one, that is in its text
    "cohere": "<|END_OF_TURN_TOKEN|>",
    "cohere2": "<|END_OF_TURN_TOKEN|>",
    "deepseek_r1_distill": "<｜end▁of▁sentence｜>",
    "deepseekv3": "<｜end▁of▁sentence｜>",
    **dict.fromkeys(["diffusion_gemma", "gemma", "gemma3"], "<eos>"),
    **dict.fromkeys(["gemma4", "gemma4_v2", "gemma4_v3", "gemma4_v4", "gemma4_v5"], "<turn|>"),
    "glm4moe": "<|endoftext|>",
    "gptoss": "<|return|>",
    "idefics3": "<end_of_utterance>",
    **dict.fromkeys(["lfm2", "lfm2_v2", "lfm2_2_5", "lfm2_2_5_v2", "lfm2_2_5_vl"], "<|im_end|>"),
    **dict.fromkeys(["llama3", "llama3_1", "llama3_2"], "<|eot_id|>"),
    "llava_next": "</s>",
    "muse_glimmer": "<|eot|>",
    **{f"nemotron_3_{size}": "<|im_end|>" for size in ("5_lightning", "nano", "super", "ultra")},
    **dict.fromkeys(["phi3", "phi3_5"], "<|endoftext|>"),
    **{f"qwen{size}": "<|im_end|>" for size in ("2_5", "2_5_vl", "3", "3_5_nothink", "3_5_think", "3_6", "3_8")},
    **{f"qwen3_{kind}": "<|im_end|>" for kind in ("instruct_2507", "vl")},
    "smolvlm": "<end_of_utterance>",
}
START = {"cohere": "<BOS_TOKEN>", "deepseek": "<｜begin▁of▁sentence｜>", "lfm": "<|startoftext|>"}
START |= dict.fromkeys(("llama", "muse"), "<|begin_of_text|>") | dict.fromkeys(("gemma", "diffusion"), "<bos>")

COMMENT = re.compile(r"\{#.*?#\}", re.DOTALL)
CONTROL = re.compile(
    r"<[|｜][^<>\s{}']+>"  # <|im_start|>, <|channel>, <｜User｜>, <|"|>
    r"|<\w+\|>"  # <channel|>
    r"|</?(?:start_of_turn|end_of_turn|end_of_utterance|start_of_image|image|sop|s)>|\[gMASK\]"
)
PLAIN = re.compile(r"</?(?:think|tool_call|tool_response|arg_key|arg_value)>")
"""Tokens of their own that are not special, as they are in the real tokenizers."""

NAMES = sorted(trl_templates().keys() & OUTCOMES)
TRAINED = [name for name, trained in template_families() if trained and name in OUTCOMES]
FOLDER = next(iter(trl_templates().values())).parent
MARKED = [*TRAINED, "lfm2_2_5", "lfm2_2_5_v2", "lfm2_2_5_vl"]  # the last three have markers of their own
UNMARKED = sorted(set(NAMES) - set(MARKED))


@pytest.fixture(scope="session")
def shared(tmp_path_factory: pytest.TempPathFactory) -> PreTrainedTokenizerBase:
    return AutoTokenizer.from_pretrained(make_tokenizer(tmp_path_factory.mktemp("tokenizers") / "plain"))


@functools.cache
def with_template(shared: PreTrainedTokenizerBase, name: str, end: str | None = None) -> PreTrainedTokenizerBase:
    """A tokenizer with a template of TRL's and the tokens that the template writes."""
    tokenizer = copy.deepcopy(shared)
    template = trl_templates()[name].read_text(encoding="utf-8")
    bos = next((token for family, token in START.items() if name.startswith(family)), None)
    written = COMMENT.sub("", template)
    control = {*CONTROL.findall(written), END[name], *([bos] if bos else [])}
    assert len(control) > 1
    tokenizer.add_tokens([AddedToken(token, special=True, normalized=False) for token in sorted(control)])
    plain = sorted(set(PLAIN.findall(written)))
    tokenizer.add_tokens([AddedToken(token, special=False, normalized=False) for token in plain])
    tokenizer.eos_token = end or END[name]
    tokenizer.bos_token = bos or tokenizer.bos_token
    assert ("bos_token" in written) == (bos is not None)
    tokenizer.chat_template = template
    return tokenizer


IMAGES = ("idefics3", "llava_next", "smolvlm")
"""Templates of models for images, which show no plain text."""


def as_wanted(name: str, messages: Any) -> Messages:
    parts = [{**message, "content": [{"type": "text", "text": message["content"]}]} for message in messages]
    return parts if name in IMAGES else list(messages)


def example(messages: Messages, tools: bool = False, **rest: Any) -> Example:
    return Example("data.jsonl", 7, messages=tuple(messages), tools=TOOLS if tools else None, **rest)


def of_shape(shape: str) -> Example:
    return example(SHAPES[shape], tools=shape in WITH_TOOLS)


renderer_of = functools.cache(Renderer)


def row_of(
    tokenizer: PreTrainedTokenizerBase, given: Example, loss_on: str = "assistant"
) -> tuple[list[int], list[bool], SourceAudit]:
    """The tokens of a row, which of them are learned, and what the audit says. DataError if the row is refused."""
    audit = SourceAudit("data.jsonl")
    renderer = renderer_of(tokenizer, loss_on)
    renderer.render(given)  # raises also the faults that an audit counts
    ((row,),) = tokenize([given], renderer, Lengths(4096), audit)
    assert all(label in (token, IGNORED) for token, label in zip(row.input_ids, row.labels, strict=True))
    return row.input_ids.tolist(), (row.labels != IGNORED).tolist(), audit


def runs(tokenizer: PreTrainedTokenizerBase, ids: list[int], mask: list[bool]) -> list[str]:
    """Each unbroken run of learned tokens, as text."""
    groups = itertools.groupby(zip(ids, mask, strict=True), key=lambda pair: pair[1])
    return [tokenizer.decode([token for token, _ in group]) for is_learned, group in groups if is_learned]


def learned(tokenizer: PreTrainedTokenizerBase, given: Example, loss_on: str = "assistant") -> list[str]:
    ids, mask, _ = row_of(tokenizer, given, loss_on)
    return runs(tokenizer, ids, mask)


def outcome(tokenizer: PreTrainedTokenizerBase, shape: str) -> str:
    """A code of the table; anything else is what went wrong."""
    try:
        *_, audit = row_of(tokenizer, of_shape(shape))
    except Fault as fault:
        return "-" if fault.rule == "answers_left_out" else fault.rule
    except DataError as error:
        return "x" if re.fullmatch(r"data\.jsonl:7: the chat template re(fuses|nders) .+", str(error)) else str(error)
    return "~" if "context_left_out" in audit.found else "="


def test_the_tables_have_every_template() -> None:
    assert OUTCOMES.keys() == END.keys() == trl_templates().keys()
    assert set(HEAD) == set(SHAPES)
    assert set(TRAINED) == {file.stem.removesuffix("_training") for file in FOLDER.glob("*_training.jinja")}
    assert len(TRAINED) >= 31


@pytest.mark.parametrize("name", NAMES)
def test_what_becomes_of_each_shape(shared: PreTrainedTokenizerBase, name: str) -> None:
    tokenizer = with_template(shared, name)
    assert {shape: outcome(tokenizer, shape) for shape in HEAD} == OUTCOMES[name]


# --- with markers ---------------------------------------------------------------------------------


@pytest.mark.parametrize("end", [None, "<|endoftext|>"], ids=["own end", "another end"])
@pytest.mark.parametrize("name", MARKED)
def test_same_tokens_as_trl(shared: PreTrainedTokenizerBase, name: str, end: str | None) -> None:
    tokenizer = with_template(shared, name, end)
    renderer = Renderer(tokenizer, "assistant")
    assert renderer.masks.startswith("TRL's " if name in TRAINED else "markers ")
    training = get_training_chat_template(tokenizer) or tokenizer.chat_template
    compared, refused = [], []
    for shape in HEAD:
        given = of_shape(shape)
        if OUTCOMES[name][shape] in "x-":
            with pytest.raises(DataError):
                learned(tokenizer, given)
            refused.append(shape)
            continue
        theirs = tokenizer.apply_chat_template(
            as_wanted(name, given.messages),
            tools=given.tools,
            chat_template=training,
            return_assistant_tokens_mask=True,
            return_dict=True,
        )
        ids, mask, audit = row_of(tokenizer, given)
        assert ids == theirs["input_ids"]
        ours, trls = runs(tokenizer, ids, mask), runs(tokenizer, ids, list(map(bool, theirs["assistant_masks"])))
        # the line break after an end token is not learned, nor what the prompt has already, nor empty reasoning
        for run, one in zip(ours, [run.rstrip() for run in trls], strict=True):
            assert one.endswith(run)
            assert not any(word in one.removesuffix(run) for word in ("two", "red", "yes", "hm", "ah", "Rome", "Oslo"))
        assert all(bit for is_learned, bit in zip(mask, theirs["assistant_masks"], strict=True) if is_learned)
        unended = ["untrained_ends"] if (name, shape) == UNENDED else []
        assert audit.found.keys() <= {"context_left_out", "prompt_differs", *unended}
        compared.append(shape)
    assert compared == [shape for shape in HEAD if OUTCOMES[name][shape] in "=~"]
    assert len(compared) + len(refused) == len(SHAPES)


UNENDED = ("diffusion_gemma", "said")
"""It writes what is said beside a call after the call's result, and ends neither."""


@pytest.mark.parametrize("name", [name for name in MARKED if "x" in OUTCOMES[name].values()])
def test_what_trls_template_refuses(shared: PreTrainedTokenizerBase, name: str) -> None:
    """Not lorafit, but the template: TRL can't train on these rows either."""
    tokenizer = with_template(shared, name)
    for shape in (shape for shape, code in OUTCOMES[name].items() if code == "x"):
        with pytest.raises(Exception) as theirs:  # noqa: PT011 - whatever Jinja raises
            tokenizer.apply_chat_template(
                as_wanted(name, SHAPES[shape]), chat_template=get_training_chat_template(tokenizer)
            )
        with pytest.raises(DataError) as ours:
            learned(tokenizer, of_shape(shape))
        assert str(ours.value) == Like(f"data.jsonl:7: … refuses … {theirs.value}")


# --- what is asked ----------------------------------------------------------------------------------

SHOWN = [(name, shape) for name in NAMES for shape in HEAD if OUTCOMES[name][shape] in "=~"]
SHOWN = [case for case in SHOWN if case[0] != "deepseekv3" or case[1] not in WITH_TOOLS]
"""deepseekv3's template takes the arguments of tool calls as text only; plainly it can't be asked here."""


@pytest.mark.parametrize(("name", "shape"), SHOWN)
@pytest.mark.parametrize("loss_on", ["assistant", "completion"])
def test_the_prompt_is_what_a_server_asks(shared: PreTrainedTokenizerBase, name: str, shape: str, loss_on: str) -> None:
    """The same text and ids as a plain apply_chat_template's, and what was learned begins after them; or it counts."""
    tokenizer = with_template(shared, name)
    given, audit, renderer = of_shape(shape), SourceAudit("data.jsonl"), renderer_of(tokenizer, loss_on)
    last = max(index for index, message in enumerate(given.messages) if message["role"] == "assistant")
    before = as_wanted(name, given.messages[:last])
    plain = {"tools": given.tools, "add_generation_prompt": True}
    assert renderer.render(given).prompt == tokenizer.apply_chat_template(before, tokenize=False, **plain)
    ((row,),) = tokenize([given], renderer, Lengths(4096), audit)
    asked = tokenizer.apply_chat_template(before, **plain)["input_ids"]
    assert (row.prompt or row.input_ids[: row.asked].tolist()) == asked
    starts = [i for i, label in enumerate(row.labels) if label != IGNORED and (not i or row.labels[i - 1] == IGNORED)]
    assert ("prompt_differs" in audit.found) or (row.asked > 0 and starts[-1] == len(asked))
    if loss_on == "completion" and shape in ("single", "multi", "system") and name not in THINKING:
        assert not audit.found.keys() & {"prompt_differs", "prompt_boundary"}


THINKING = (
    *("deepseek_r1_distill", "deepseekv3", "glm4moe", "qwen3", "qwen3_5_think", "qwen3_6", "qwen3_8"),
    *(name for name in NAMES if name.startswith("nemotron_3_")),
)
"""Templates that leave room for reasoning before an answer that has none."""


@pytest.mark.parametrize("name", [name for name in THINKING if not name.startswith("deepseek")])
@pytest.mark.parametrize("shape", ["single", "multi", "system", "call"])
def test_reasoning_switched_off(shared: PreTrainedTokenizerBase, name: str, shape: str) -> None:
    """Then an answer without reasoning follows right after the prompt for it, and the saved tokenizer asks so."""
    tokenizer = copy.deepcopy(with_template(shared, name))
    assert thinking_switch(str(tokenizer.chat_template), dict(tokenizer.special_tokens_map)) == "enable_thinking"
    switched = tokenizer.apply_chat_template(SHAPES["single"][:1], add_generation_prompt=True, enable_thinking=False)
    settle_template(tokenizer, {"enable_thinking": False})
    assert tokenizer.apply_chat_template(SHAPES["single"][:1], add_generation_prompt=True) == switched
    audit = SourceAudit("data.jsonl")
    ((row,),) = tokenize([of_shape(shape)], Renderer(tokenizer, "completion"), Lengths(4096), audit)
    assert "prompt_differs" not in audit.found
    asked, answer = row.input_ids[: row.asked].tolist(), row.input_ids[row.asked :].tolist()
    assert said(answer, asked, tokenizer) == SHAPES[shape][-1]["content"]
    (run,) = runs(tokenizer, row.input_ids.tolist(), (row.labels != IGNORED).tolist())
    assert "think>" not in run
    audit = SourceAudit("data.jsonl")
    list(tokenize([of_shape("reasoning")], Renderer(tokenizer, "completion"), Lengths(4096), audit))
    assert audit.found["prompt_differs"].count == audit.reasoning + 1 - audit.reasoning == 1


# --- without markers ------------------------------------------------------------------------------

LLAMA_CALL = '{"name": "weather", "parameters": {"city": "Rome"}}<|eot_id|>'
GEMMA_CALLS = [f'<|tool_call>call:weather{{city:<|"|>{city}<|"|>}}<tool_call|>' for city in ("Rome", "Oslo")]
CALLS: dict[str, dict[str, str]] = {  # how an answer that calls tools is written
    "llama3_1": {"call": LLAMA_CALL, "said": LLAMA_CALL},
    "llama3_2": {"call": LLAMA_CALL, "said": LLAMA_CALL},
    "gemma4": {"call": GEMMA_CALLS[0] + "<|tool_response>", "calls": "".join(GEMMA_CALLS) + "<|tool_response>"},
    "gemma4_v2": {
        "call": GEMMA_CALLS[0] + "<turn|>",
        "said": GEMMA_CALLS[0] + "let me see<turn|>",
        "calls": "".join(GEMMA_CALLS) + "<turn|>",
    },
}
CALLS |= dict.fromkeys(["gemma4_v3", "gemma4_v4", "gemma4_v5"], CALLS["gemma4"])
THOUGHT = {"gemma4_v5": "<|channel>thought\nhm so\n<channel|>"}


@pytest.mark.parametrize("end", [None, "<|endoftext|>"], ids=["own end", "another end"])
@pytest.mark.parametrize("name", UNMARKED)
def test_exactly_the_words_and_their_ends(shared: PreTrainedTokenizerBase, name: str, end: str | None) -> None:
    tokenizer = with_template(shared, name, end)
    assert Renderer(tokenizer, "assistant").masks == "turn by turn"
    compared = []
    for shape in HEAD:
        if OUTCOMES[name][shape] in "x-":
            with pytest.raises(DataError):
                learned(tokenizer, of_shape(shape))
            continue
        expected = [m["content"] + END[name] for m in SHAPES[shape] if m["role"] == "assistant"]
        if shape in WITH_TOOLS:
            expected[0] = CALLS[name][shape]
        if shape == "reasoning":
            expected[0] = THOUGHT.get(name, "") + expected[0]
        assert learned(tokenizer, of_shape(shape)) == expected
        ids, _, audit = row_of(tokenizer, of_shape(shape))
        tools = list(TOOLS) if shape in WITH_TOOLS else None
        assert ids == tokenizer.apply_chat_template(SHAPES[shape], tools=tools)["input_ids"]
        assert audit.found.keys() <= {"context_left_out", "prompt_differs"}
        compared.append(shape)
    assert compared == [shape for shape in HEAD if OUTCOMES[name][shape] in "=~"]


def test_those_without_markers_are_known() -> None:
    assert sorted(CALLS) == UNMARKED


@pytest.mark.parametrize(("name", "shape"), [(n, s) for n in UNMARKED for s in HEAD if OUTCOMES[n][s] == "x"])
def test_an_answer_that_is_written_otherwise_when_turns_follow(
    shared: PreTrainedTokenizerBase, name: str, shape: str
) -> None:
    tokenizer = with_template(shared, name)
    expected = "single tool-calls" if shape == "calls" else "use loss_on: completion"
    with pytest.raises(DataError, match=expected):
        learned(tokenizer, of_shape(shape))
    if shape != "calls":
        last = "<|channel>thought\nah yes\n<channel|>" if shape == "reasonings" else ""
        assert learned(tokenizer, of_shape(shape), "completion") == [f"{last}red green<turn|>"]


# --- what is learned of a row ---------------------------------------------------------------------

ANSWERING = [name for name in NAMES if OUTCOMES[name]["multi"] == "="]
REWRITING = ("qwen3", "qwen3_5_nothink", "qwen3_5_think", "qwen3_6")
"""Their last answer alone is rendered as the template does it, without empty reasoning in earlier turns."""


def untrained(messages: Messages, *which: int) -> Messages:
    return [{**message, "train": False} if index in which else message for index, message in enumerate(messages)]


@pytest.mark.parametrize("name", ANSWERING)
def test_some_answers_of_a_conversation(shared: PreTrainedTokenizerBase, name: str) -> None:
    tokenizer = with_template(shared, name)
    ids, _, _ = row_of(tokenizer, example(MULTI))
    first, second = learned(tokenizer, example(MULTI))
    assert "two three" in first
    assert "red green" in second
    assert learned(tokenizer, example(untrained(MULTI, 1))) == [second]
    assert learned(tokenizer, example(untrained(MULTI, 3))) == [first]
    assert learned(tokenizer, example(MULTI), "completion") == [second]
    prompted = example(untrained(MULTI, 0, 1, 2), completion_start=3)  # as conversations with a prompt are read
    assert learned(tokenizer, prompted, "assistant") == learned(tokenizer, prompted, "completion") == [second]
    longer = example(untrained(MULTI, 0), completion_start=1)
    assert learned(tokenizer, longer, "assistant") == learned(tokenizer, longer, "completion") == [first, second]
    for given in (example(MULTI), prompted, longer):
        assert learned(tokenizer, given, "all") == [tokenizer.decode(ids)]
        assert name in REWRITING or row_of(tokenizer, given)[0] == ids


@pytest.mark.parametrize("name", ANSWERING)
def test_all_but_some_turns(shared: PreTrainedTokenizerBase, name: str) -> None:
    tokenizer = with_template(shared, name)
    answers = learned(tokenizer, example(MULTI))
    turns = ["one", answers[0], "four", answers[1]]
    for index, message in enumerate(MULTI):
        ids, mask, _ = row_of(tokenizer, example(untrained(MULTI, index)), "all")
        (left_out,) = runs(tokenizer, ids, [not is_learned for is_learned in mask])
        assert message["content"] in left_out
        # without what its prompt gives but for a space before a word; and for a user with the end of the turn
        assert left_out.strip() in turns[index] or turns[index] in left_out
        assert not any(other["content"] in left_out for other in MULTI if other is not message)
    _, mask, _ = row_of(tokenizer, example(untrained(MULTI, 0, 1), completion_start=1), "all")
    (left_out,) = runs(tokenizer, ids, [not is_learned for is_learned in mask])
    assert "two three" in left_out  # of the completion; the prompt says `train: false` only as it is one
    assert "one" not in left_out


PAIRS = [shape for shape in HEAD if sum(message["role"] == "assistant" for message in SHAPES[shape]) == 2]


@pytest.mark.parametrize("name", [name for name in NAMES if any(OUTCOMES[name][shape] in "=~" for shape in PAIRS)])
def test_each_learned_token_is_of_one_answer(shared: PreTrainedTokenizerBase, name: str) -> None:
    """Also where an answer is in several blocks, or is written otherwise when turns follow it."""
    tokenizer = with_template(shared, name)
    assert PAIRS == ["multi", "system", "open", "call", "said", "calls", "reasonings"]
    for shape in (shape for shape in PAIRS if OUTCOMES[name][shape] in "=~" and name not in REWRITING):
        messages = SHAPES[shape]
        first, second = (index for index, message in enumerate(messages) if message["role"] == "assistant")
        ids, mask, _ = row_of(tokenizer, of_shape(shape))
        parts = []
        for other in (second, first):
            same, part, _ = row_of(tokenizer, example(untrained(messages, other), shape in WITH_TOOLS))
            assert same == ids
            parts.append(part)
        assert [one + other for one, other in zip(*parts, strict=True)] == mask  # none twice, and none is missing
        said = [" ".join(runs(tokenizer, ids, part)) for part in parts]
        assert [text.count("red green") for text in said] == [0, 1]
        assert [text.count("Rome") for text in said] == [shape in WITH_TOOLS, 0]
        assert learned(tokenizer, of_shape(shape), "completion") == runs(tokenizer, ids, parts[1])


IN_A_ROW = [user("one"), assistant("two three"), assistant("red green")]


@pytest.mark.parametrize("name", [name for name in ANSWERING if name not in ("cohere", "cohere2", "gemma", "gemma3")])
def test_answers_in_a_row(shared: PreTrainedTokenizerBase, name: str) -> None:
    """Some templates write them without anything in between that is not learned."""
    tokenizer = with_template(shared, name)
    whole = "".join(learned(tokenizer, example(IN_A_ROW))).replace("<|start|>assistant", "")
    first = learned(tokenizer, example(untrained(IN_A_ROW, 2)))
    second = learned(tokenizer, example(untrained(IN_A_ROW, 1)))
    assert "".join([*first, *second]) == whole
    assert ("two three" in first[0], "red green" in first[0]) == (True, False)
    assert ("two three" in second[0], "red green" in second[0]) == (False, True)


def test_several_blocks_of_an_answer(shared: PreTrainedTokenizerBase) -> None:
    thought = "<|channel|>analysis<|message|>ah yes<|end|>"
    final = "<|channel|>final<|message|>"
    tokenizer = with_template(shared, "gptoss")
    messages = SHAPES["reasonings"]
    assert learned(tokenizer, example(untrained(messages, 1))) == [
        f"{thought}<|start|>assistant{final}red green<|return|>"
    ]
    assert learned(tokenizer, example(untrained(messages, 3))) == [f"{final}two three<|end|>"]
    tokenizer = with_template(shared, "diffusion_gemma")
    call = GEMMA_CALLS[0]
    assert learned(tokenizer, example(untrained(SHAPES["said"], 3), tools=True)) == [call, "let me see"]
    assert learned(tokenizer, example(untrained(SHAPES["said"], 1), tools=True)) == ["red green<turn|>"]


BLOCKS = (
    "{% for m in messages %}{{ '<|im_start|>' + m['role'] + '\n' }}{% if m['role'] == 'assistant' %}"
    "{% if m['reasoning_content'] %}{% generation %}{{ '<' + m['reasoning_content'] + '>' }}{% endgeneration %}"
    "{{ '\n' }}{% endif %}{% if loop.index0 != 5 %}{% generation %}{{ m['content'] + '<|im_end|>' }}"
    "{% endgeneration %}{% endif %}{% else %}{{ m['content'] }}{% endif %}{{ '\n' }}{% endfor %}"
)


def test_blocks_of_answers_that_are_not_shown_or_empty(shared: PreTrainedTokenizerBase) -> None:
    tokenizer = copy.copy(shared)
    tokenizer.chat_template = BLOCKS
    hidden = [*MULTI, user("five"), assistant("blue"), user("six"), assistant("yes", reasoning_content="no")]
    assert learned(tokenizer, example(untrained(hidden, 1, 5, 7))) == ["red green<|im_end|>"]
    assert learned(tokenizer, example(untrained(hidden, 1, 3, 5))) == ["<no>", "yes<|im_end|>"]
    with pytest.raises(Fault, match=r"leaves out .*answer"):
        learned(tokenizer, example(untrained(hidden, 1, 3, 7)))
    empty = [*MULTI[:3], assistant("")]
    assert learned(tokenizer, example(untrained(empty, 3))) == ["two three<|im_end|>"]


def test_the_end_of_an_answer_that_only_the_training_version_ends(shared: PreTrainedTokenizerBase) -> None:
    """GLM's answers end where the next turn begins; nothing is put in between."""
    tokenizer = with_template(shared, "glm4moe")
    expected = ["two three<|user|>", "red green<|user|>"]
    assert learned(tokenizer, example(MULTI)) == expected
    changed = copy.copy(tokenizer)
    changed.chat_template += "{# changed: no training version #}"
    assert learned(changed, example(MULTI)) == [text.replace("<|user|>", "<|endoftext|>") for text in expected]


# --- what the template does not show --------------------------------------------------------------


@pytest.mark.parametrize(
    ("name", "shape", "loss_on", "what"),
    [
        ("qwen2_5", "reasoning", "assistant", "reasoning"),
        ("gptoss", "reasonings", "assistant", "reasoning"),
        ("gptoss", "reasonings", "completion", None),  # the earlier answer isn't learned
        ("gptoss", "said", "assistant", "words"),
        ("gptoss", "said", "completion", None),
        ("qwen2_5", "said", "assistant", None),
        ("deepseekv3", "call", "assistant", "the tool 'weather'"),  # it shows the call
        ("phi3", "call", "completion", "the tool 'weather'"),
    ],
)
def test_what_is_left_out_is_counted(
    shared: PreTrainedTokenizerBase, name: str, shape: str, loss_on: str, what: str | None
) -> None:
    *_, audit = row_of(with_template(shared, name), of_shape(shape), loss_on)
    found = {rule: finding.first for rule, finding in audit.found.items() if rule != "prompt_differs"}
    assert found == ({} if what is None else {"context_left_out": Like(f"data.jsonl:7: … leaves out … {what}")})


def test_turns_that_are_left_out_are_counted(shared: PreTrainedTokenizerBase) -> None:
    tokenizer = with_template(shared, "phi3")
    *_, audit = row_of(tokenizer, example(SHAPES["call"]), "completion")
    assert audit.found["context_left_out"].first == Like("… leaves out … 'tool'")
    messages = [{"role": "developer", "content": "the cat"}, *MULTI]
    *_, audit = row_of(tokenizer, example(messages))
    assert audit.found["context_left_out"].first == Like("… leaves out … 'developer'")
    tokenizer = with_template(shared, "llama3_1")  # writes a result as JSON
    messages = [*SHAPES["call"][:2], result('\n"so\nsunny"'), assistant("red green")]
    *_, audit = row_of(tokenizer, example(messages))
    assert not audit.found


# --- the date -------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("name", "form"), [("gptoss", "%Y-%m-%d"), ("llama3_2", "%d %b %Y"), ("muse_glimmer", "%Y-%m-%d")]
)
def test_the_date(shared: PreTrainedTokenizerBase, name: str, form: str) -> None:
    tokenizer = with_template(shared, name)
    given = example(SHAPES["single"])
    fixed, today = day(2026, 1, 2).strftime(form), day.today().strftime(form)
    assert f": {fixed}" in Renderer(tokenizer, "assistant", date="2026-01-02").render(given).text
    assert f": {today}" in Renderer(tokenizer, "assistant").render(given).text  # the date before is forgotten
    for loss_on in ("all", "completion"):
        assert f": {fixed}" in Renderer(tokenizer, loss_on, date="2026-01-02").render(given).text


def test_these_templates_write_the_date() -> None:
    dated = {name for name, file in trl_templates().items() if "strftime_now" in file.read_text(encoding="utf-8")}
    assert dated == {"gptoss", "llama3_2", "muse_glimmer"}
