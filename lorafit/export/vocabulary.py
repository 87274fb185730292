"""A model folder's tokenizer as a GGUF file has it: tokens, types, merges or scores, and how text is split."""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from lorafit.bounds import read_json as facts_json
from lorafit.errors import ModelError
from lorafit.facts.folder import tokenizer_facts


def refused(folder: Path, what: str) -> ModelError:
    """An error for what our own writer of GGUF files doesn't know, with the way out."""
    return ModelError(f"{folder}: {what}, which lorafit can't write as GGUF exactly; use --llama-cpp DIR")


NORMAL, UNKNOWN, CONTROL, USER_DEFINED, UNUSED, BYTE = 1, 2, 3, 4, 5, 6
"""GGUF's token types."""

_CONTRACTIONS = r"(?i:'s|'t|'re|'ve|'m|'ll|'d)"
_WORDS_AND_NUMBERS = r"|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}%s| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
_UPPER, _LOWER = r"\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}", r"\p{Ll}\p{Lm}\p{Lo}\p{M}"
_CASED = rf"[^\r\n\p{{L}}\p{{N}}]?[{_UPPER}]*[{_LOWER}]+%s|[^\r\n\p{{L}}\p{{N}}]?[{_UPPER}]+[{_LOWER}]*%s"
_REST = r" ?[^\s\p{L}\p{N}]+[\r\n/]*|\s*[\r\n]+|\s+(?!\S)|\s+"

_SPLITS = {
    (_CONTRACTIONS + _WORDS_AND_NUMBERS % "{1,3}", True): "llama-bpe",
    (_CONTRACTIONS + _WORDS_AND_NUMBERS % "{1,3}", False): "dbrx",
    (_CONTRACTIONS + _WORDS_AND_NUMBERS % "", False): "qwen2",
    (_CASED % ("", "") + r"|\p{N}|" + _REST, True): "tekken",
    (_CASED % (_CONTRACTIONS + "?", _CONTRACTIONS + "?") + r"|\p{N}{1,3}|" + _REST, False): "gpt-4o",
}
"""The expression by which text is split before merging, and whether a word which is a token is not merged
(tokenizer.json's ignore_merges): llama.cpp's name of both. From src/llama-vocab.cpp of llama.cpp."""

_STOPS_BY_NAME = {
    *("<|eot_id|>", "<|im_end|>", "<|end|>", "<end_of_turn>", "<|endoftext|>", "</s>", "<EOT>", "_<EOT>"),
    *("<|end_of_text|>", "<end_of_utterance>", "<|eom_id|>", "<|return|>", "<|call|>"),
}
"""Tokens at which llama.cpp stops by their text, without a key."""


@dataclass(frozen=True)
class Vocabulary:
    """A tokenizer as GGUF has it.

    Attributes:
        model: "gpt2" or "llama".
        pre: llama.cpp's name for how text is split before merging.
        tokens: one text for each row of the embeddings.
        types: GGUF's token types, one for each token.
        scores: one for each token (SentencePiece), else empty.
        merges: "left right", the first most important; empty for SentencePiece.
        special: ids by GGUF's names: bos, eos, unknown, padding, eot, eom.
        add_bos, add_eos: whether every text gets one.
        add_space_prefix: whether a space is put before the first word; None where GGUF has no say.
        named: what the model's name has to hold, for llama.cpp to read these tokens right.
        remark: what llama.cpp does in another way.
    """

    model: str
    pre: str
    tokens: list[str]
    types: list[int]
    scores: list[float]
    merges: list[str]
    special: dict[str, int]
    add_bos: bool
    add_eos: bool
    add_space_prefix: bool | None
    named: str = ""
    remark: str | None = None
    chat_template: str | None = field(repr=False, default=None)


def read_vocabulary(folder: Path, rows: int) -> Vocabulary:
    """The tokenizer of a model folder, filled up to `rows` tokens; what isn't known exactly raises ModelError."""
    file = folder / "tokenizer.json"
    if not file.is_file():
        raise refused(folder, "there is no tokenizer.json")
    tokenizer, settings = read_json(file), read_json(folder / "tokenizer_config.json")
    model = tokenizer.get("model") or {}
    if model.get("type") != "BPE":
        raise refused(folder, f"the tokenizer is of the kind {model.get('type')!r}")
    if model.get("continuing_subword_prefix") or model.get("end_of_word_suffix") or model.get("dropout"):
        raise refused(folder, "the tokenizer marks parts of words")
    vocab: dict[str, int] = model["vocab"]
    pairs = [_pair(folder, merge) for merge in model["merges"]]
    added: list[dict[str, Any]] = tokenizer.get("added_tokens") or []
    added = [token for token in added if token["id"] < rows or token["content"] in vocab]  # the model has no others
    tokens, types = _fill(folder, rows, vocab, added)
    ids = {text: index for index, text in enumerate(tokens)}
    scores: list[float] = []
    merges: list[str] = []
    prefix: bool | None = None
    if model.get("byte_fallback"):
        kind, pre = "llama", "default"
        prefix = _space_prefix(folder, tokenizer)
        scores = _scores(folder, tokens, types, pairs)
        _mark_bytes(folder, types, ids, model.get("unk_token") or _content(settings.get("unk_token")))
        tokens = _respelled(tokens, types, pairs)
    else:
        kind, pre = "gpt2", _pre(folder, tokenizer)
        merges = [f"{left} {right}" for left, right in pairs]
    add_bos, add_eos = _adds(folder, tokenizer, settings)
    facts = tokenizer_facts(folder)
    template = facts.chat_template if facts else None
    special = _special(folder, settings, ids)
    named, remark = _stripping(added, kind)
    return Vocabulary(
        kind, pre, tokens, types, scores, merges, special, add_bos, add_eos, prefix, named, remark, template
    )


def read_json(file: Path) -> dict[str, Any]:
    """An object; empty without the file. Raises ModelError."""
    return facts_json(file) if file.is_file() else {}


def _pair(folder: Path, merge: str | list[str]) -> tuple[str, str]:
    parts = merge.split(" ") if isinstance(merge, str) else merge
    if len(parts) != 2 or any(" " in part for part in parts):
        raise refused(folder, f"the tokenizer has the merge {merge!r}")
    return parts[0], parts[1]


def _fill(folder: Path, rows: int, vocab: dict[str, int], added: list[dict[str, Any]]) -> tuple[list[str], list[int]]:
    """Texts and types for every row; rows without a token get a name that nothing else has."""
    texts = {index: text for text, index in vocab.items()}
    kinds = dict.fromkeys(texts, NORMAL)
    for token in added:
        index, text = token["id"], token["content"]
        if token.get("single_word"):
            raise refused(folder, f"the token {text!r} is found as a whole word only")
        if texts.get(index, text) != text or vocab.get(text, index) != index:
            raise refused(folder, f"two tokens are at {index}, or {text!r} has two places")
        texts[index] = text
        kinds[index] = CONTROL if token.get("special") else USER_DEFINED
    if texts and (highest := max(texts)) >= rows:
        raise ModelError(f"{folder}: token {highest} has no row in the embeddings ({rows:,} rows); merge again")
    taken = set(texts.values())
    for index in range(rows):
        if index not in texts:
            name = f"[PAD{index}]"
            while name in taken:
                name = f"[{name}]"
            taken.add(name)
            texts[index], kinds[index] = name, UNUSED
    return [texts[index] for index in range(rows)], [kinds[index] for index in range(rows)]


_NOT_STRIPPED = {"<unk>", "<s>", "<|endoftext|>"}
"""Special tokens after which llama.cpp keeps the spaces in a model whose name says phi-3 (src/llama-vocab.cpp)."""


def _stripping(added: list[dict[str, Any]], kind: str) -> tuple[str, str | None]:
    """The name by which llama.cpp takes the spaces after special tokens along, as Phi-3's do; else what is to be said.

    GGUF has no key for tokens that take the spaces beside them along.
    """
    strips = [token["content"] for token in added if token.get("lstrip") or token.get("rstrip")]
    if not strips:
        return "", None
    after = {token["content"] for token in added if token.get("rstrip") and not token.get("lstrip")}
    if kind == "llama" and after == {token["content"] for token in added} - _NOT_STRIPPED:
        return "phi-3", None
    return "", f"GGUF: the tokenizer drops the spaces beside {strips[0]}, which llama.cpp keeps"


def _respelled(tokens: list[str], types: list[int], pairs: list[tuple[str, str]]) -> list[str]:
    """SentencePiece's own tokens of several spaces, which llama.cpp looks for in the text as it is."""
    made = {left + right for left, right in pairs}
    return [
        text.replace("▁", " ") if kind == USER_DEFINED and text in made else text
        for text, kind in zip(tokens, types, strict=True)
    ]


def _parts(part: dict[str, Any] | None, inner: str) -> list[dict[str, Any]]:
    """The steps of a part of tokenizer.json, whether it is one step, a sequence, or none."""
    if part is None:
        return []
    return list(part[inner]) if part["type"] == "Sequence" else [part]


def _pre(folder: Path, tokenizer: dict[str, Any]) -> str:
    """llama.cpp's name of a byte-level tokenizer's splitting, told from what the splitting is."""
    if any(step["type"] != "NFC" for step in _parts(tokenizer.get("normalizer"), "normalizers")):
        raise refused(folder, "the tokenizer changes the text before it splits it")
    *before, last = _parts(tokenizer.get("pre_tokenizer"), "pretokenizers") or [{"type": "nothing"}]
    ignores = bool(tokenizer["model"].get("ignore_merges"))
    found: str | None = None
    if last["type"] == "ByteLevel" and not last.get("add_prefix_space"):
        if last.get("use_regex", True):
            if not before:
                found = None if ignores else "gpt-2"
            elif [step["type"] for step in before] == ["Digits"] and before[0].get("individual_digits"):
                found = None if ignores else "smollm"
        elif len(before) == 1 and before[0]["type"] == "Split":
            split = before[0]
            if split.get("behavior") == "Isolated" and not split.get("invert"):
                found = _SPLITS.get((str(split["pattern"].get("Regex")), ignores))
    if found is None:
        raise refused(folder, "the tokenizer splits text in a way that has no name in GGUF files known here")
    return found


def _space_prefix(folder: Path, tokenizer: dict[str, Any]) -> bool:
    """Whether a SentencePiece tokenizer puts a space before the text, in the forms that transformers saves."""
    normalizers = _parts(tokenizer.get("normalizer"), "normalizers")
    steps = [step["type"] for step in normalizers]
    splitting = _parts(tokenizer.get("pre_tokenizer"), "pretokenizers")
    replaces = [step for step in normalizers if step["type"] == "Replace"]
    plain = all(step["pattern"] == {"String": " "} and step["content"] == "▁" for step in replaces)
    if replaces and [step.get("pattern") for step in splitting] == [{"String": " "}]:
        splitting = []  # there are no spaces any more, so nothing is split
    if plain and not splitting and steps in (["Prepend", "Replace"], ["Replace"]):
        return "Prepend" in steps
    if not steps and [step["type"] for step in splitting] == ["Metaspace"] and not splitting[0].get("split", True):
        return bool(splitting[0].get("prepend_scheme", "always") != "never")
    raise refused(folder, "the tokenizer treats spaces in its own way")


def _scores(folder: Path, tokens: list[str], types: list[int], pairs: list[tuple[str, str]]) -> list[float]:
    """Scores by which SentencePiece's algorithm makes the same merges.

    tokenizer.json has merges only. They come from scores in the original: the merges that make a token stand together,
    and every way to split it into two tokens is among them. Where that isn't so, scores can't say the same.
    """
    rank: dict[str, int] = {}
    made: dict[str, set[tuple[str, str]]] = {}
    before = ""
    for left, right in pairs:
        whole = left + right
        if whole != before and whole in rank:
            raise refused(folder, f"the tokenizer's merges for {whole!r} have several ranks")
        rank.setdefault(whole, len(rank) + 1)
        made.setdefault(whole, set()).add((left, right))
        before = whole
    normal = {text for text, kind in zip(tokens, types, strict=True) if kind == NORMAL}
    for text in normal:
        ways = {(text[:at], text[at:]) for at in range(1, len(text)) if text[:at] in normal and text[at:] in normal}
        if ways - made.get(text, set()):
            raise refused(folder, f"the tokenizer doesn't make {text!r} in every way that its tokens allow")
    least = -float(len(rank) + 1)
    return [
        -float(rank[text]) if text in rank and kind in (NORMAL, USER_DEFINED) else least if kind == NORMAL else 0.0
        for text, kind in zip(tokens, types, strict=True)
    ]


def _mark_bytes(folder: Path, types: list[int], ids: dict[str, int], unknown: str | None) -> None:
    for byte in range(256):
        index = ids.get(f"<0x{byte:02X}>")
        if index is None:
            raise refused(folder, f"the tokenizer falls back to bytes and has no <0x{byte:02X}>")
        types[index] = BYTE
    if unknown is not None and unknown in ids:
        types[ids[unknown]] = UNKNOWN


def _adds(folder: Path, tokenizer: dict[str, Any], settings: dict[str, Any]) -> tuple[bool, bool]:
    """Whether every text begins and ends with its token.

    As transformers has it: tokenizer_config.json decides if it says anything, else tokenizer.json's template does.
    """
    bos, eos = _content(settings.get("bos_token")), _content(settings.get("eos_token"))
    if "add_bos_token" in settings or "add_eos_token" in settings:
        adds_bos, adds_eos = bool(settings.get("add_bos_token")), bool(settings.get("add_eos_token"))
        return bos is not None and adds_bos, eos is not None and adds_eos
    before: list[str] = []
    after: list[str] = []
    for step in _parts(tokenizer.get("post_processor"), "processors"):
        if step["type"] == "TemplateProcessing":
            pieces = [piece["SpecialToken"]["id"] if "SpecialToken" in piece else None for piece in step["single"]]
            text = pieces.index(None) if None in pieces else len(pieces)
            before += [piece for piece in pieces[:text] if piece]
            after += [piece for piece in pieces[text:] if piece]
        elif step["type"] != "ByteLevel":
            raise refused(folder, f"the tokenizer ends with {step['type']!r}")
    if before not in ([], [bos]) or after not in ([], [eos]):
        raise refused(folder, f"the tokenizer puts {[*before, *after]} around every text")
    return bool(before), bool(after)


def _content(token: Any) -> str | None:
    """A token's text: tokenizer_config.json has a string, or an object with it."""
    return token.get("content") if isinstance(token, dict) else token


def _special(folder: Path, settings: dict[str, Any], ids: dict[str, int]) -> dict[str, int]:
    names = {"bos": "bos_token", "eos": "eos_token", "unknown": "unk_token", "padding": "pad_token"}
    special: dict[str, int] = {}
    for name, key in names.items():
        text = _content(settings.get(key))
        if text is not None:
            if text not in ids:
                raise ModelError(f"{folder}: {key} {text!r} is not among the tokenizer's tokens")
            special[name] = ids[text]
    texts = {index: text for text, index in ids.items()}
    more = [index for index in stop_ids(folder) if index != special.get("eos")]
    if "eos" not in special and more:
        special["eos"] = more.pop(0)
    for index in sorted(more, key=lambda index: texts.get(index) in _STOPS_BY_NAME):
        text = texts.get(index)
        if text == "<|eom_id|>":
            special["eom"] = index
        elif "eot" not in special:
            special["eot"] = index
        elif text not in _STOPS_BY_NAME and special.setdefault("eom", index) != index:
            raise refused(folder, f"generation also stops at {text!r}, for which there is no key left")
    return special


def stop_ids(folder: Path) -> list[int]:
    """The tokens at which generation_config.json, or else config.json, stops."""
    for file in ("generation_config.json", "config.json"):
        given = read_json(folder / file).get("eos_token_id")
        if given is not None:
            return [index for index in (given if isinstance(given, list) else [given]) if isinstance(index, int)]
    return []
