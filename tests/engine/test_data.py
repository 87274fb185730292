"""Rows become tokens with labels: what is learned is the answers with their ends, and nothing else."""

from __future__ import annotations

import copy
import itertools
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import trl
from conftest import CHATML, SPECIAL, conversation, make_tokenizer, write_jsonl
from datasets import Dataset
from tokenizers import AddedToken, Tokenizer, decoders, models, normalizers, pre_tokenizers, processors, trainers
from transformers import AutoTokenizer, LlamaForCausalLM, PreTrainedTokenizerBase, PreTrainedTokenizerFast
from trl import SFTConfig, SFTTrainer, get_training_chat_template
from trl.trainer.sft_trainer import DataCollatorForLanguageModeling
from wording import Like

import lorafit.engine.data.encode
from lorafit.engine.data.encode import IGNORED, Lengths, tokenize
from lorafit.engine.data.prepare import prepare
from lorafit.engine.data.render import Renderer
from lorafit.errors import DataError
from lorafit.plan import DataPlan, SourcePlan
from lorafit.recipe.schema import AuditSection
from lorafit.rows import Example
from lorafit.rows.audit import SourceAudit, breaches, source_findings

TEMPLATES = Path(trl.__file__).parent / "chat_templates"
MARKED = (
    "{% for m in messages %}{{ '<|im_start|>' + m['role'] + '\n' }}{% if m['role'] == 'assistant' %}"
    "{% generation %}{{ m['content'] + '<|im_end|>' + '\n' }}{% endgeneration %}{% else %}"
    "{{ m['content'] + '<|im_end|>' + '\n' }}{% endif %}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
)
MARKED_WITHOUT_END = MARKED.replace(
    "{{ m['content'] + '<|im_end|>' + '\n' }}{% endgeneration %}",
    "{{ m['content'] }}{% endgeneration %}{{ '<|im_end|>' + '\n' }}",
)
PLAIN = (
    "{% for m in messages %}{{ m['role'] + ': ' + m['content'] + '\n' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ 'assistant:' }}{% endif %}"
)
TRIMMED = CHATML.replace("message['content']", "message['content'] | trim")
THINKING = (
    "{% for m in messages %}{% set c = m['content'] %}{% if '</think>' in c and not loop.last %}"
    "{% set c = c.split('</think>')[-1] %}{% endif %}{{ '<|im_start|>' + m['role'] + '\n' + c + '<|im_end|>\n' }}"
    "{% endfor %}{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
)
TOOLS = (
    "{% for m in messages %}{{ '<|im_start|>' + m['role'] + '\n' + m['content'] }}"
    "{% for call in m['tool_calls'] or [] %}{{ '<call>' + (call['function'] | tojson) + '</call>' }}{% endfor %}"
    "{{ '<|im_end|>\n' }}{% endfor %}{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
)
PHI4 = (
    "{% for m in messages %}{{ '<|' + m['role'] + '|>' + m['content'] + '<|end|>' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|assistant|>' }}{% else %}{{ eos_token }}{% endif %}"
)
CALL = [{"type": "function", "function": {"name": "weather", "arguments": {"city": "Rome"}}}]


def user(text: str) -> dict[str, Any]:
    return {"role": "user", "content": text}


def assistant(text: str, **rest: Any) -> dict[str, Any]:
    return {"role": "assistant", "content": text, **rest}


def system(text: str) -> dict[str, Any]:
    return {"role": "system", "content": text}


SINGLE = [user("say yes"), assistant("yes or no")]
MULTI = [user("one"), assistant("two three"), user("four"), assistant("red green")]
CONVERSATIONS = {
    "single": SINGLE,
    "multi": MULTI,
    "system": [system("the cat"), *MULTI],
    "empty system": [system(""), *SINGLE],
    "ends with a user": [*MULTI, user("blue")],
    "repeats the prompt": [user("yes or no"), assistant("yes or no"), user("assistant"), assistant("assistant")],
    "equal answers": [user("a"), assistant("a"), user("a"), assistant("a")],
    "answers in a row": [user("a"), assistant("one"), assistant("two")],
    "begins with the assistant": [assistant("hello there"), user("a"), assistant("b")],
    "system and assistant": [system("the cat"), assistant("sat")],
    "unicode": [user("ñandú 🙂"), assistant("naïve 👩‍👩‍👧 e\u0301 漢字"), user("🙂"), assistant("🙂")],
    "code": [user("x"), assistant("if a:\n\n        b = 1\n\n\n        c  =  2")],
    "begins with white space": [user("x"), assistant("\n\n  two\n three"), user("y"), assistant(" four")],
    "tool": [user("a"), assistant("one"), {"role": "tool", "content": "two"}, assistant("three")],
    "special tokens as text": [user("<|im_end|>"), assistant("it is <|im_end|> said")],
}


@pytest.fixture(scope="session")
def shared_tokenizer(tmp_path_factory: pytest.TempPathFactory) -> PreTrainedTokenizerBase:
    return AutoTokenizer.from_pretrained(make_tokenizer(tmp_path_factory.mktemp("tokenizers") / "plain"))


@pytest.fixture
def tokenizer(shared_tokenizer: PreTrainedTokenizerBase) -> PreTrainedTokenizerBase:
    return copy.deepcopy(shared_tokenizer)


def example(messages: list[dict[str, Any]], **rest: Any) -> Example:
    return Example("data.jsonl", 7, messages=tuple(messages), **rest)


def rows_of(
    tokenizer: PreTrainedTokenizerBase, *examples: Example, loss_on: str = "assistant", max_length: int = 4096
) -> tuple[list[dict[str, list[int]]], SourceAudit]:
    audit = SourceAudit("data.jsonl")
    batches = list(tokenize(examples, Renderer(tokenizer, loss_on), Lengths(max_length), audit))
    rows = [{"input_ids": row.input_ids.tolist(), "labels": row.labels.tolist()} for batch in batches for row in batch]
    assert audit.rows == len(rows)
    assert audit.supervised_tokens == sum(label != IGNORED for row in rows for label in row["labels"][1:])
    return rows, audit


def learned(
    tokenizer: PreTrainedTokenizerBase, given: list[dict[str, Any]] | Example, loss_on: str = "assistant"
) -> list[str]:
    """What is learned of one row: each unbroken run of learned tokens as text."""
    one = given if isinstance(given, Example) else example(given)
    rows, audit = rows_of(tokenizer, one, loss_on=loss_on)
    if not rows:  # as the audit's defaults refuse it
        raise DataError(breaches(source_findings(audit, AuditSection().model_dump()))[0])
    (row,) = rows
    assert all(label in (token, IGNORED) for token, label in zip(row["input_ids"], row["labels"], strict=True))
    runs = itertools.groupby(row["labels"], key=lambda label: label != IGNORED)
    return [tokenizer.decode(list(run)) for is_learned, run in runs if is_learned]


def plan(*paths: Path, **changes: Any) -> DataPlan:
    values: dict[str, Any] = {
        "train": tuple(SourcePlan(str(path), f"dataset.train.{n}") for n, path in enumerate(paths)),
        "validation": (),
        "validation_fraction": None,
        "loss_on": "assistant",
        "max_length": 256,
        "packing": False,
        "seed": 42,
        "chat_template": None,
        "trust_remote_code": False,
    }
    return DataPlan(**values | changes)


# --- conversations --------------------------------------------------------------------------------


@pytest.mark.parametrize("template", [CHATML, MARKED, MARKED_WITHOUT_END], ids=["turns", "markers", "end outside"])
@pytest.mark.parametrize("name", CONVERSATIONS)
def test_exactly_the_answers_and_their_ends_are_learned(
    tokenizer: PreTrainedTokenizerBase, template: str, name: str
) -> None:
    tokenizer.chat_template = template
    messages = CONVERSATIONS[name]
    answers = [m["content"] + "<|im_end|>" for m in messages if m["role"] == "assistant"]
    assert learned(tokenizer, messages) == answers
    assert learned(tokenizer, messages, "completion") == answers[-1:]
    whole = tokenizer.apply_chat_template(messages, tokenize=False)
    assert learned(tokenizer, messages, "all") == [whole]


@pytest.mark.parametrize("template", [CHATML, MARKED], ids=["turns", "markers"])
def test_the_tokens_are_those_of_the_chat_template(tokenizer: PreTrainedTokenizerBase, template: str) -> None:
    tokenizer.chat_template = template
    rows, audit = rows_of(tokenizer, *(example(messages) for messages in CONVERSATIONS.values()))
    for row, messages in zip(rows, CONVERSATIONS.values(), strict=True):
        assert row["input_ids"] == tokenizer.apply_chat_template(messages)["input_ids"]
    assert audit.rows == len(CONVERSATIONS)
    answers = sum(message["role"] == "assistant" for messages in CONVERSATIONS.values() for message in messages)
    assert audit.answers == audit.ends_learned == answers
    assert audit.tokens == sum(len(row["input_ids"]) for row in rows)
    assert audit.supervised_tokens == sum(label != IGNORED for row in rows for label in row["labels"])
    assert audit.longest == max(len(row["input_ids"]) for row in rows)
    assert audit.dropped == {}
    assert set(audit.found) == {"special_tokens_in_content"}


@pytest.mark.parametrize("template", [CHATML, MARKED, MARKED_WITHOUT_END], ids=["turns", "markers", "end outside"])
def test_white_space_at_both_ends_of_an_answer_stays_in_it(tokenizer: PreTrainedTokenizerBase, template: str) -> None:
    tokenizer.chat_template = template
    (text,) = learned(tokenizer, [user("a"), assistant("\n yes 🙂\n\n")])
    assert text.endswith("\n yes 🙂\n\n<|im_end|>")
    assert text.strip() == "yes 🙂\n\n<|im_end|>"


def test_white_space_tokens_without_offsets_are_learned(tokenizer: PreTrainedTokenizerBase) -> None:
    """A ByteLevel post-processor may trim white space off the offsets: such tokens seem to be empty."""
    tokenizer.backend_tokenizer.post_processor = processors.ByteLevel(trim_offsets=True)
    code = "if a:\n\n        b = 1\n\n\n   c  =  2"
    messages = [user("  x  "), assistant(code), user("  y  "), assistant("   z  \n")]
    offsets = tokenizer(code, return_offsets_mapping=True)["offset_mapping"]
    assert any(start == end for start, end in offsets)
    assert learned(tokenizer, messages) == [code + "<|im_end|>", "   z  \n<|im_end|>"]
    tokenizer.chat_template = MARKED
    assert learned(tokenizer, messages) == [code + "<|im_end|>", "   z  \n<|im_end|>"]
    whole = "a  b\n\n  "
    assert learned(tokenizer, Example("t", 1, text=whole)) == [whole + "<|im_end|>"]
    assert learned(tokenizer, Example("t", 1, prompt="a", completion="   b")) == ["   b<|im_end|>"]


@pytest.mark.parametrize("normalizer", [normalizers.NFKC(), normalizers.NFD()], ids=["NFKC", "NFD"])
def test_normalized_text_keeps_its_place(tokenizer: PreTrainedTokenizerBase, normalizer: Any) -> None:
    tokenizer.backend_tokenizer.normalizer = normalizer
    messages = [user("ﬁ e\u0301 é"), assistant("ﬁn é e\u0301 ½"), user("ﬁﬁ"), assistant("½")]
    expected = [normalizer.normalize_str(text) + "<|im_end|>" for text in ("ﬁn é e\u0301 ½", "½")]
    assert learned(tokenizer, messages) == expected


@pytest.mark.parametrize(
    "template", [CHATML, MARKED, CHATML.replace("+ '\\n' +", "+")], ids=["turns", "markers", "glued"]
)
@pytest.mark.parametrize("prefix", ["first", "always", "never"])
def test_a_sentencepiece_kind_of_tokenizer(template: str, prefix: str) -> None:
    """It puts a space before the text, or after every special token."""
    inner = Tokenizer(models.BPE(byte_fallback=True))
    inner.pre_tokenizer = pre_tokenizers.Metaspace(prepend_scheme=prefix, split=False)
    inner.decoder = decoders.Sequence([decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse()])
    trainer = trainers.BpeTrainer(
        vocab_size=420, special_tokens=[*SPECIAL, *(f"<0x{n:02X}>" for n in range(256))], show_progress=False
    )
    inner.train_from_iterator(["user one two\nassistant two  three\n red green"] * 4, trainer)
    for n in range(256):  # the bytes are ordinary tokens
        assert inner.token_to_id(f"<0x{n:02X}>") is not None
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=inner, eos_token="<|im_end|>")
    tokenizer.chat_template = template
    messages = [user("one two"), assistant("two  three 🙂\n two"), user("red"), assistant("red")]
    texts = [text.strip() for text in learned(tokenizer, messages)]
    assert texts == ["two  three 🙂\n two<|im_end|>", "red<|im_end|>"]
    assert [text.strip() for text in learned(tokenizer, messages, "completion")] == ["red<|im_end|>"]


def test_a_special_token_that_swallows_white_space_is_not_learned(tokenizer: PreTrainedTokenizerBase) -> None:
    """Phi's `<|assistant|>` takes the white space that follows it, also that of the answer."""
    tokens = [AddedToken(f"<|{name}|>", rstrip=True, special=True) for name in ("user", "assistant", "end")]
    tokenizer.add_tokens(tokens)
    tokenizer.chat_template = (TEMPLATES / "phi3.jinja").read_text() + "{# changed #}"
    messages = [user("a"), assistant("  b"), user("a"), assistant("c")]
    assert learned(tokenizer, messages) == ["b<|end|>", "c<|end|><|im_end|>"]


def test_an_end_token_without_a_name(tokenizer: PreTrainedTokenizerBase) -> None:
    """Many templates end turns with a token that is not the tokenizer's eos_token."""
    tokenizer.eos_token = "<|endoftext|>"
    assert "<|im_end|>" not in tokenizer.all_special_tokens
    for template in (CHATML, MARKED, MARKED_WITHOUT_END):
        tokenizer.chat_template = template
        assert learned(tokenizer, MULTI) == ["two three<|im_end|>", "red green<|im_end|>"]
        assert rows_of(tokenizer, example(MULTI))[1].ends_learned == 2


def test_a_token_that_closes_the_whole_conversation(tokenizer: PreTrainedTokenizerBase) -> None:
    """Phi-4's template, which has no training version: eos comes after the last turn only."""
    tokenizer.chat_template = PHI4
    tokenizer.add_tokens([AddedToken(f"<|{name}|>", special=True) for name in ("user", "assistant", "end")])
    assert learned(tokenizer, SINGLE) == ["yes or no<|end|><|im_end|>"]
    assert learned(tokenizer, MULTI) == ["two three<|end|>", "red green<|end|><|im_end|>"]
    assert learned(tokenizer, [*MULTI, user("a")]) == ["two three<|end|>", "red green<|end|>"]


def test_a_prompt_that_begins_the_thinking(tokenizer: PreTrainedTokenizerBase) -> None:
    """The generation prompt says more than how an answer is rendered; answers may look like it."""
    tokenizer.chat_template = CHATML.replace("assistant\n'", "assistant\n<think>\n'")
    assert learned(tokenizer, [user("a"), assistant("<b>yes</b>")]) == ["<b>yes</b><|im_end|>"]
    messages = [user("a"), assistant("yes"), user("b"), assistant("<")]
    assert learned(tokenizer, messages) == ["yes<|im_end|>", "<<|im_end|>"]
    thought = "<think>\nhm</think>\nyes"
    assert learned(tokenizer, [user("a"), assistant(thought)]) == ["hm</think>\nyes<|im_end|>"]


def test_a_template_that_refuses_a_system_message_alone(tokenizer: PreTrainedTokenizerBase) -> None:
    tokenizer.chat_template = "{% if messages | length == 1 %}{{ raise_exception('one message') }}{% endif %}" + CHATML
    assert learned(tokenizer, [system("a"), assistant("b")]) == ["b<|im_end|>"]


def test_trimmed_answers(tokenizer: PreTrainedTokenizerBase) -> None:
    tokenizer.chat_template = TRIMMED
    messages = [user("  a "), assistant("\n two \n"), user("b\n"), assistant("  two ")]
    assert learned(tokenizer, messages) == ["two<|im_end|>", "two<|im_end|>"]


def test_tool_calls_are_learned(tokenizer: PreTrainedTokenizerBase) -> None:
    tokenizer.chat_template = TOOLS
    messages = [user("a"), assistant("", tool_calls=CALL), {"role": "tool", "content": "9"}, assistant("nine")]
    first, second = learned(tokenizer, messages)
    assert first == '<call>{"name": "weather", "arguments": {"city": "Rome"}}</call><|im_end|>'
    assert second == "nine<|im_end|>"


@pytest.mark.parametrize("template", [CHATML, MARKED], ids=["turns", "markers"])
@pytest.mark.parametrize("said", ["", "let me see"])
def test_a_template_that_leaves_out_tool_calls_is_refused(
    tokenizer: PreTrainedTokenizerBase, template: str, said: str
) -> None:
    """Otherwise the model would learn to say nothing, or to promise and not to call."""
    tokenizer.chat_template = template
    messages = [user("a"), assistant(said, tool_calls=CALL), {"role": "tool", "content": "9"}, assistant("nine")]
    with pytest.raises(DataError, match=r"^data\.jsonl:7: .*leaves out (an answer|the tool call)"):
        learned(tokenizer, messages)
    assert learned(tokenizer, messages, "completion") == ["nine<|im_end|>"]


def test_an_answer_may_be_a_special_token(tokenizer: PreTrainedTokenizerBase) -> None:
    tokenizer.add_tokens([AddedToken("<yes>", special=True)])
    for template in (CHATML, MARKED):
        tokenizer.chat_template = template
        assert learned(tokenizer, [user("a"), assistant("<yes>")]) == ["<yes><|im_end|>"]


def test_an_answer_that_the_template_leaves_out(tokenizer: PreTrainedTokenizerBase) -> None:
    tokenizer.chat_template = CHATML.replace("message['content']", "(message['content'] if loop.first else '')")
    with pytest.raises(DataError, match=r"^data\.jsonl:7: .*leaves out an answer"):
        learned(tokenizer, SINGLE)


def test_dropped_thinking(tokenizer: PreTrainedTokenizerBase) -> None:
    """Earlier answers that are shown without their thinking can't be learned turn by turn."""
    tokenizer.chat_template = THINKING
    messages = [user("a"), assistant("<think>hm</think>two"), user("b"), assistant("<think>so</think>one")]
    with pytest.raises(DataError, match=r"^data\.jsonl:7: .*when turns follow.*completion or all") as caught:
        learned(tokenizer, messages)
    assert len(str(caught.value).splitlines()) == 1
    assert learned(tokenizer, messages, "completion") == ["<think>so</think>one<|im_end|>"]  # as the error advises
    assert learned(tokenizer, messages, "all") == [tokenizer.apply_chat_template(messages, tokenize=False)]


def test_dropped_thinking_in_trls_training_version(tokenizer: PreTrainedTokenizerBase) -> None:
    tokenizer.chat_template = (TEMPLATES / "qwen3.jinja").read_text()
    messages = [user("a"), assistant("<think>hm</think>two"), user("b"), assistant("<think>so</think>one")]
    _, audit = rows_of(tokenizer, example(messages))
    assert audit.masks == Like("TRL's … template")
    assert learned(tokenizer, messages) == [
        "<think>\nhm\n</think>\n\ntwo<|im_end|>",
        "<think>\nso\n</think>\n\none<|im_end|>",
    ]


def test_how_the_answers_are_found_is_said(tokenizer: PreTrainedTokenizerBase) -> None:
    assert rows_of(tokenizer, example(SINGLE))[1].masks == "turn by turn"
    tokenizer.chat_template = MARKED
    assert rows_of(tokenizer, example(SINGLE))[1].masks == Like("markers … template")


def test_named_templates(tokenizer: PreTrainedTokenizerBase) -> None:
    tokenizer.chat_template = {"default": CHATML, "rag": "x"}
    assert learned(tokenizer, SINGLE) == ["yes or no<|im_end|>"]
    tokenizer.chat_template = {"rag": CHATML}
    with pytest.raises(DataError, match=r"data\.jsonl:7: .*chat template"):
        learned(tokenizer, SINGLE)


@pytest.mark.parametrize("loss_on", ["assistant", "completion", "all"])
def test_without_a_template(tokenizer: PreTrainedTokenizerBase, loss_on: str) -> None:
    tokenizer.chat_template = None
    with pytest.raises(DataError, match=r"data\.jsonl:7: .*chat template.*model\.chat_template"):
        learned(tokenizer, SINGLE, loss_on)
    assert learned(tokenizer, Example("t", 1, prompt="a", completion=" b"), loss_on)[0].endswith(" b<|im_end|>")


@pytest.mark.parametrize("loss_on", ["assistant", "completion", "all"])
@pytest.mark.parametrize(
    ("template", "reason"),
    [
        ("{% if messages[0]['role'] == 'system' %}{{ raise_exception('no system') }}{% endif %}", "no system"),
        ("{{ messages[9].content.text }}", "no element 9"),
        ("{% for m in messages %}", "end of template"),
        ("{{ 1 / 0 }}", "division by zero"),
    ],
)
def test_a_refusal_names_the_row(tokenizer: PreTrainedTokenizerBase, template: str, reason: str, loss_on: str) -> None:
    tokenizer.chat_template = template
    with pytest.raises(DataError) as caught:
        learned(tokenizer, [system("a"), *SINGLE], loss_on)
    message = str(caught.value)
    assert message == Like("data.jsonl:7: … chat template … refuses")
    assert reason in message
    assert len(message.splitlines()) == 1


def test_a_template_that_fails_on_tool_calls_only(tokenizer: PreTrainedTokenizerBase) -> None:
    """TRL tries every template with tool calls, and lets some failures through."""
    trap = "{% for m in messages %}{{ '' if 1 / (0 if m['tool_calls'] else 1) else '' }}{% endfor %}"
    for template in (CHATML, MARKED):
        tokenizer.chat_template = trap + template
        assert learned(tokenizer, MULTI) == ["two three<|im_end|>", "red green<|im_end|>"]


def test_the_question_is_that_of_the_last_answer(tokenizer: PreTrainedTokenizerBase) -> None:
    examples = [example(SINGLE), example([*MULTI, user("blue")]), Example("t", 1, prompt="p", completion="c")]
    batches = tokenize(examples, Renderer(tokenizer, "assistant"), Lengths(256), SourceAudit("t"))
    assert [row.question for batch in batches for row in batch] == ["say yes", "four", "p"]


# --- TRL's templates ------------------------------------------------------------------------------

TRL_SPECIAL = {
    "qwen2_5": [],
    "qwen3": ["<think>", "</think>"],
    "llama3": ["<|start_header_id|>", "<|end_header_id|>", "<|eot_id|>"],
    "gemma": ["<start_of_turn>", "<end_of_turn>"],
    "phi3": ["<|system|>", "<|user|>", "<|assistant|>", "<|end|>"],
}


@pytest.mark.parametrize("named", [True, False], ids=["end is eos", "end is not eos"])
@pytest.mark.parametrize("name", TRL_SPECIAL)
def test_same_mask_as_trl(tokenizer: PreTrainedTokenizerBase, name: str, named: bool) -> None:
    tokens = [AddedToken(token, special="think" not in token) for token in TRL_SPECIAL[name]]
    tokenizer.add_tokens(tokens)
    ends = {"llama3": "<|eot_id|>", "gemma": "<end_of_turn>", "phi3": "<|endoftext|>"}
    tokenizer.eos_token = ends.get(name, "<|im_end|>") if named else "<|endoftext|>"
    tokenizer.chat_template = (TEMPLATES / f"{name}.jinja").read_text()
    training = get_training_chat_template(tokenizer)
    assert training is not None
    compared = 0
    for messages in CONVERSATIONS.values():
        try:
            theirs = tokenizer.apply_chat_template(
                messages, chat_template=training, return_assistant_tokens_mask=True, return_dict=True
            )
        except Exception:  # noqa: BLE001 - Gemma takes neither system messages nor answers in a row
            with pytest.raises(DataError, match=r"^data\.jsonl:7: .*template refuses"):
                learned(tokenizer, messages)
            continue
        (row,), audit = rows_of(tokenizer, example(messages))
        assert row["input_ids"] == theirs["input_ids"]
        mask = theirs["assistant_masks"]
        for index, (label, bit) in enumerate(zip(row["labels"], mask, strict=True)):
            if (label != IGNORED) != bool(bit):  # what the prompt supplies, or white space at an end
                assert bit
                assert tokenizer.decode([row["input_ids"][index]]).strip() in ("", "<think>", "</think>")
        assert audit.ends_learned >= 1
        compared += 1
    assert compared >= 7


def test_an_answer_in_several_blocks_is_one(tokenizer: PreTrainedTokenizerBase) -> None:
    """Phi-3's training version marks the token that closes the conversation on its own."""
    tokenizer.eos_token = "<|endoftext|>"
    tokenizer.add_tokens([AddedToken(token, special=True) for token in TRL_SPECIAL["phi3"]])
    tokenizer.chat_template = (TEMPLATES / "phi3.jinja").read_text()
    assert learned(tokenizer, MULTI, "completion") == ["red green<|end|>\n<|endoftext|>"]
    assert rows_of(tokenizer, example(MULTI))[1].answers == 2


# --- end and padding tokens -----------------------------------------------------------------------


@pytest.mark.parametrize("pad", [None, "<|im_end|>", "<|endoftext|>"])
def test_the_padding_token_does_not_matter(tmp_path: Path, pad: str | None) -> None:
    tokenizer = AutoTokenizer.from_pretrained(make_tokenizer(tmp_path / "t", pad=pad))
    assert learned(tokenizer, MULTI) == ["two three<|im_end|>", "red green<|im_end|>"]


def test_ends_stay_learned_in_a_padded_batch(tmp_path: Path) -> None:
    tokenizer = AutoTokenizer.from_pretrained(make_tokenizer(tmp_path / "t", pad="<|im_end|>"))
    rows, _ = rows_of(tokenizer, example(SINGLE), example(MULTI))
    batch = DataCollatorForLanguageModeling(pad_token_id=tokenizer.pad_token_id)(rows)
    eos = tokenizer.eos_token_id
    assert batch["input_ids"][0, -1] == eos == tokenizer.pad_token_id
    assert [(labels == eos).sum().item() for labels in batch["labels"]] == [1, 2]
    for row, labels, mask in zip(rows, batch["labels"].tolist(), batch["attention_mask"], strict=True):
        length = len(row["labels"])
        assert labels == row["labels"] + [IGNORED] * (len(labels) - length)
        assert mask.sum() == length


@pytest.mark.parametrize(
    "template", [PLAIN, PLAIN.replace("'\n'", "''"), PLAIN.replace("m['content']", "m['content'] | trim")]
)
def test_answers_are_ended_where_the_template_does_not(tokenizer: PreTrainedTokenizerBase, template: str) -> None:
    tokenizer.chat_template = template
    assert [text.strip() for text in learned(tokenizer, MULTI)] == ["two three<|im_end|>", "red green<|im_end|>"]
    assert [text.strip() for text in learned(tokenizer, MULTI, "completion")] == ["red green<|im_end|>"]
    assert learned(tokenizer, SINGLE, "all")[0].strip() == "user: say yes\nassistant: yes or no<|im_end|>".replace(
        "\n", "" if "''" in template else "\n"
    )
    assert rows_of(tokenizer, example(MULTI))[1].ends_learned == 2
    assert tokenizer.chat_template == template  # as it is saved, and used for inference


def test_an_end_in_the_data_is_not_doubled(tokenizer: PreTrainedTokenizerBase) -> None:
    tokenizer.chat_template = PLAIN
    assert learned(tokenizer, [user("a"), assistant("b<|im_end|>")]) == [" b<|im_end|>"]


def test_markers_where_the_template_does_not_end_answers(tokenizer: PreTrainedTokenizerBase) -> None:
    tokenizer.chat_template = (
        "{% for m in messages %}{{ m['role'] + ': ' }}{% if m['role'] == 'assistant' %}"
        "{% generation %}{{ m['content'] }}{% endgeneration %}{% else %}{{ m['content'] }}{% endif %}"
        "{{ '\n' }}{% endfor %}"
    )
    assert [text.strip() for text in learned(tokenizer, MULTI)] == ["two three<|im_end|>", "red green<|im_end|>"]


def test_a_template_that_ends_all_answers_but_the_last(tokenizer: PreTrainedTokenizerBase) -> None:
    tokenizer.chat_template = (
        "{% for m in messages %}{{ m['role'] + ':' + m['content'] }}{% if not loop.last %}{{ eos_token }}{% endif %}"
        "{% endfor %}{% if add_generation_prompt %}{{ eos_token + 'assistant:' }}{% endif %}"
    )
    assert learned(tokenizer, MULTI) == ["two three<|im_end|>", "red green<|im_end|>"]


@pytest.mark.parametrize("cut", [False, True], ids=["whole", "one row cut"])
def test_answers_without_an_end_are_counted(tokenizer: PreTrainedTokenizerBase, cut: bool) -> None:
    tokenizer.chat_template = PLAIN.replace("+ '\n'", "+ '[/done]\n'")
    rows = [example(MULTI), example([user("a"), assistant("b " * 40)])]
    _, audit = rows_of(tokenizer, *rows, max_length=60 if cut else 400)
    assert audit.found["untrained_ends"].count == audit.answers == 3
    assert audit.found["untrained_ends"].first == Like("data.jsonl:7: … answer … end")


def test_a_tokenizer_without_an_end_token(tokenizer: PreTrainedTokenizerBase) -> None:
    tokenizer.eos_token = None
    assert learned(tokenizer, Example("t", 1, prompt="a", completion=" b")) == [" b"]
    assert learned(tokenizer, Example("t", 1, text="a b")) == ["a b"]


# --- truncation -----------------------------------------------------------------------------------


def test_long_rows_are_cut_and_counted(tokenizer: PreTrainedTokenizerBase) -> None:
    long_answer = example([user("a"), assistant("yes " * 200)])
    long_question = example([user("yes " * 200), assistant("no")])
    rows, audit = rows_of(tokenizer, example(SINGLE), long_answer, long_question, max_length=64)
    assert [len(row["input_ids"]) for row in rows][1:] == [64]
    assert (audit.rows, audit.found["truncated"].count, audit.dropped) == (2, 2, {"answers_cut_off": 1})
    assert audit.longest > 200
    assert (audit.answers, audit.ends_learned) == (3, 1)
    assert audit.tokens == sum(len(row["input_ids"]) for row in rows)
    whole, _ = rows_of(tokenizer, example(SINGLE), long_answer, long_question)
    before = sum(label != IGNORED for row in whole for label in row["labels"])
    assert audit.lost_tokens == audit.found["lost_tokens"].count == before - audit.supervised_tokens > 0


def test_a_row_of_just_max_length_is_whole(tokenizer: PreTrainedTokenizerBase) -> None:
    (row,), _ = rows_of(tokenizer, example(SINGLE))
    length = len(row["input_ids"]) - 1  # without the line break after the end token
    (cut,), audit = rows_of(tokenizer, example(SINGLE), max_length=length)
    assert (audit.found["truncated"].count, audit.ends_learned, audit.lost_tokens) == (1, 1, 0)
    assert cut["labels"] == row["labels"][:-1]
    _, audit = rows_of(tokenizer, example(SINGLE), max_length=length + 1)
    assert audit.found == {}


def test_no_row_left(tokenizer: PreTrainedTokenizerBase, tmp_path: Path) -> None:
    file = write_jsonl(tmp_path / "rows.jsonl", [conversation("a", "b")])
    with pytest.raises(DataError, match=r"rows\.jsonl:1: .*max_length 4 .*no row"):
        prepare(plan(file, max_length=4), tokenizer)


def test_nothing_to_learn_in_a_row(tokenizer: PreTrainedTokenizerBase) -> None:
    tokenizer.eos_token = None
    rows, audit = rows_of(tokenizer, Example("file.jsonl", 3, text="a"))
    assert rows == []
    assert audit.found["no_supervised_tokens"].first == Like("file.jsonl:3: … no token … learned")
    assert audit.dropped == {"no_supervised_tokens": 1}


# --- text, and prompt and completion --------------------------------------------------------------


def add_by_itself(tokenizer: PreTrainedTokenizerBase, bos: bool = True, eos: bool = False) -> None:
    single = f"{SPECIAL[0] + ' ' if bos else ''}$A{' ' + SPECIAL[2] if eos else ''}"
    tokenizer.backend_tokenizer.post_processor = processors.TemplateProcessing(
        single=single, special_tokens=[(SPECIAL[0], 0), (SPECIAL[2], 2)]
    )


@pytest.mark.parametrize("loss_on", ["assistant", "completion"])
@pytest.mark.parametrize("end", ["", "<|im_end|>"])
@pytest.mark.parametrize("adds", ["", "bos", "eos", "bos eos"])
def test_a_completion_is_learned_with_one_end(
    tokenizer: PreTrainedTokenizerBase, loss_on: str, end: str, adds: str
) -> None:
    add_by_itself(tokenizer, "bos" in adds, "eos" in adds)
    given = Example("t", 1, prompt="say yes:", completion=" yes, yes" + end)
    assert learned(tokenizer, given, loss_on) == [" yes, yes<|im_end|>"]
    (row,), audit = rows_of(tokenizer, given, loss_on=loss_on)
    assert tokenizer.decode(row["input_ids"]) == "<|endoftext|>" * ("bos" in adds) + "say yes: yes, yes<|im_end|>"
    assert audit.ends_learned == audit.answers == 1


@pytest.mark.parametrize("end", ["", "<|im_end|>"])
@pytest.mark.parametrize("adds", ["", "bos", "eos", "bos eos"])
def test_a_text_is_learned_whole_with_one_end(tokenizer: PreTrainedTokenizerBase, end: str, adds: str) -> None:
    add_by_itself(tokenizer, "bos" in adds, "eos" in adds)
    for loss_on in ("assistant", "completion", "all"):
        assert learned(tokenizer, Example("t", 1, text="a cat sat\n" + end), loss_on) == ["a cat sat\n<|im_end|>"]


def test_a_start_in_the_data_is_not_doubled(tokenizer: PreTrainedTokenizerBase) -> None:
    add_by_itself(tokenizer)
    (row,), _ = rows_of(tokenizer, Example("t", 1, prompt="<|endoftext|>a", completion=" cat"))
    assert tokenizer.decode(row["input_ids"]) == "<|endoftext|>a cat<|im_end|>"


def test_loss_on_all_of_a_prompt_and_completion(tokenizer: PreTrainedTokenizerBase) -> None:
    assert learned(tokenizer, Example("t", 1, prompt="say", completion=" yes"), "all") == ["say yes<|im_end|>"]


def test_a_chat_template_that_writes_its_own_start(tokenizer: PreTrainedTokenizerBase) -> None:
    add_by_itself(tokenizer, bos=True, eos=True)
    tokenizer.chat_template = "{{ bos_token }}" + CHATML
    (row,), _ = rows_of(tokenizer, example(SINGLE))
    assert row["input_ids"].count(tokenizer.bos_token_id) == 1
    assert row["input_ids"].count(tokenizer.eos_token_id) == 2
    assert learned(tokenizer, SINGLE) == ["yes or no<|im_end|>"]


def test_a_token_over_the_boundary_is_learned(tokenizer: PreTrainedTokenizerBase) -> None:
    assert len(tokenizer("hello")["input_ids"]) < len(tokenizer("hel")["input_ids"]) + len(tokenizer("lo")["input_ids"])
    assert learned(tokenizer, Example("t", 1, prompt="say hel", completion="lo")) == [" hello<|im_end|>"]
    assert learned(tokenizer, Example("t", 1, prompt="say ", completion="yes")) == [" yes<|im_end|>"]


@pytest.mark.parametrize("bos", [False, True])
def test_same_labels_as_trl(tokenizer: PreTrainedTokenizerBase, tiny_model: Path, tmp_path: Path, bos: bool) -> None:
    add_by_itself(tokenizer, bos)
    pairs = [
        ("say yes:", " yes or no"),
        ("one\n", "two"),
        ("🙂", " the cat"),
        ("a", " mat<|im_end|>"),
        ("", "red"),
        ("x", "ñ 🙂"),
    ]
    trainer = SFTTrainer(
        model=LlamaForCausalLM.from_pretrained(tiny_model),
        args=SFTConfig(output_dir=str(tmp_path), report_to=[], max_length=64, use_cpu=True, bf16=False),
        train_dataset=Dataset.from_list([{"prompt": prompt, "completion": completion} for prompt, completion in pairs]),
        processing_class=tokenizer,
    )
    rows, _ = rows_of(
        tokenizer, *(Example("t", 1, prompt=prompt, completion=completion) for prompt, completion in pairs)
    )
    for ours, theirs, (prompt, _) in zip(rows, trainer.train_dataset, pairs, strict=True):
        assert ours["input_ids"] == theirs["input_ids"]
        if prompt or not bos:
            assert ours["labels"] == theirs["labels"]
        assert ours["labels"][1:] == theirs["labels"][1:]


# --- sources and their split ----------------------------------------------------------------------


def test_mixed_sources_keep_their_order(tokenizer: PreTrainedTokenizerBase, tmp_path: Path) -> None:
    chat = write_jsonl(tmp_path / "chat.jsonl", [conversation(f"q{n}", f"chat {n}") for n in range(3)])
    text = write_jsonl(tmp_path / "text.jsonl", [{"text": f"text {n}"} for n in range(3)])
    pair = write_jsonl(tmp_path / "pair.jsonl", [{"prompt": "p", "completion": f" pair {n}"} for n in range(3)])
    prepared = prepare(plan(chat, text, pair, chat), tokenizer)
    decoded = [tokenizer.decode(row["input_ids"]) for row in prepared.train]
    wanted = [f"{kind} {n}<|im_end|>" for kind in ("chat", "text", "pair", "chat") for n in range(3)]
    assert len(decoded) == 12
    assert all(want in text for want, text in zip(wanted, decoded, strict=True))
    assert prepared.train.column_names == ["input_ids", "labels"]
    assert prepared.validation is None
    assert prepared.audit.validation_rows is None


def test_rows_of_many_batches_keep_their_order(
    tokenizer: PreTrainedTokenizerBase, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(lorafit.engine.data.encode, "_BATCH_ROWS", 3)
    examples = [example([user("q"), assistant(f"n{n}")]) if n % 5 else Example("t", 1, text=f"n{n}") for n in range(23)]
    rows, _ = rows_of(tokenizer, *examples)
    assert len(rows) == 23
    for n, row in enumerate(rows):
        assert f"n{n}<|im_end|>" in tokenizer.decode(row["input_ids"])


Split = Callable[..., tuple[list[str], list[str]]]


@pytest.fixture
def split(tokenizer: PreTrainedTokenizerBase, tmp_path: Path) -> Split:
    """Texts that are trained on and that are held out of a file with the texts `row 0`, `row 1` …"""

    def go(rows: int = 40, texts: list[str] | None = None, **changes: Any) -> tuple[list[str], list[str]]:
        texts = texts or [f"row {n}" for n in range(rows)]
        file = write_jsonl(tmp_path / "rows.jsonl", [{"text": text} for text in texts])
        made = prepare(plan(file, **{"validation_fraction": 0.25, **changes}), tokenizer)
        assert made.validation is not None
        parts = [
            [tokenizer.decode(row["input_ids"], skip_special_tokens=True) for row in part]
            for part in (made.train, made.validation)
        ]
        return parts[0], parts[1]

    return go


def test_a_fraction_is_held_out(split: Split) -> None:
    train, held_out = split()
    assert (len(train), len(held_out)) == (30, 10)
    everything = [f"row {n}" for n in range(40)]
    assert sorted(train + held_out) == sorted(everything)
    assert train == [row for row in everything if row in train]  # in order
    assert held_out == [row for row in everything if row in held_out]
    assert held_out != everything[:10] != everything[-10:]
    assert split() == (train, held_out)
    others = [split(seed=seed)[1] for seed in range(5)]
    assert len({tuple(other) for other in others}) == 5


@pytest.mark.parametrize(("rows", "fraction", "count"), [(2, 0.01, 1), (2, 0.99, 1), (10, 0.05, 1), (3, 0.5, 2)])
def test_both_parts_of_a_split_have_rows(split: Split, rows: int, fraction: float, count: int) -> None:
    assert len(split(rows, validation_fraction=fraction)[1]) == count


def test_equal_rows_stay_on_one_side(split: Split) -> None:
    texts = [f"row {n % 7}" for n in range(40)]
    train, held_out = split(texts=texts)
    assert sorted(train + held_out) == sorted(texts)
    assert 0 < len(held_out) <= 10
    assert not set(train) & set(held_out)


def test_one_row_cannot_be_split(split: Split) -> None:
    with pytest.raises(DataError, match=r"dataset\.validation: 1 row .*split"):
        split(rows=1)


def test_validation_from_sources_of_its_own(tokenizer: PreTrainedTokenizerBase, tmp_path: Path) -> None:
    train = write_jsonl(tmp_path / "train.jsonl", [conversation("q", f"t{n}") for n in range(4)])
    held_out = write_jsonl(tmp_path / "held_out.jsonl", [conversation("q", f"v{n}") for n in range(2)])
    prepared = prepare(plan(train, validation=(SourcePlan(str(held_out)),)), tokenizer)
    assert len(prepared.train) == 4
    assert prepared.validation is not None
    assert prepared.audit.validation_rows is not None
    assert prepared.audit.validation_rows.rows == len(prepared.validation) == 2
    assert "v1" in tokenizer.decode(prepared.validation[1]["input_ids"])


def test_a_source_without_rows(tokenizer: PreTrainedTokenizerBase, tmp_path: Path) -> None:
    empty = write_jsonl(tmp_path / "empty.jsonl", [])
    with pytest.raises(DataError, match=r"empty\.jsonl: .*no rows"):
        prepare(plan(empty), tokenizer)
