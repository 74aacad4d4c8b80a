"""The tokenizer in a GGUF file: tokens, their kinds, merges, the name of the rule that splits a text, stop tokens."""

from __future__ import annotations

import json
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from posttrain.errors import reject, suggest
from posttrain.model.trust import read_json

if TYPE_CHECKING:
    from gguf import GGUFWriter

PRETOKENIZERS = (
    "default", "gpt-2", "llama-bpe", "llama3", "qwen2", "smollm", "tekken", "falcon", "starcoder", "refact",
    "command-r", "olmo", "dbrx", "stablelm2", "deepseek-llm", "deepseek-coder", "gpt-4o", "bloom", "mpt",
)  # fmt: skip
"""Rules of llama.cpp for splitting a text before its merges, by name."""
QWEN2 = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
)
LLAMA3 = QWEN2.replace(r"\p{N}|", r"\p{N}{1,3}|", 1)
BY_PATTERN = {QWEN2: "qwen2", LLAMA3: "llama-bpe"}
NORMAL, UNKNOWN, CONTROL, USER_DEFINED, UNUSED, BYTE = 1, 2, 3, 4, 5, 6
"""Kinds of tokens in gguf."""
BYTES = re.compile(r"<0x[0-9A-F]{2}>")
SPACE = "\u2581"
"""Sign of a space in the tokens of SentencePiece."""


@dataclass(frozen=True, kw_only=True)
class Vocabulary:
    """A tokenizer, as the file holds it: byte-level BPE, or SentencePiece's BPE with bytes to fall back on."""

    tokens: Sequence[str]
    kinds: Sequence[int]
    merges: Sequence[str]
    pretokenizer: str
    """Name of the rule that splits a text."""
    stops: Sequence[int]
    """Ids that end an answer; the first ends a chat's turn."""
    begin: int | None
    pad: int | None
    adds_begin: bool
    """True when a plain text begins with ``begin``."""
    template: str
    scores: Sequence[float] = ()
    """Of SentencePiece's tokens: the pair whose token has the highest one is merged first."""
    unknown: int | None = None
    space_first: bool = False
    """True when a text of SentencePiece's begins with a space that is not written."""

    @property
    def stop_texts(self) -> list[str]:
        """The stop tokens as text."""
        return [self.tokens[each] for each in self.stops]

    def write(self, writer: GGUFWriter) -> None:
        """Write the tokenizer's keys."""
        writer.add_tokenizer_model("llama" if self.scores else "gpt2")
        writer.add_tokenizer_pre(self.pretokenizer)
        writer.add_token_list(self.tokens)
        writer.add_token_types(self.kinds)
        if self.scores:
            writer.add_token_scores(self.scores)
            writer.add_add_space_prefix(self.space_first)
        else:
            writer.add_token_merges(self.merges)
        if self.unknown is not None:
            writer.add_unk_token_id(self.unknown)
        places = (writer.add_eos_token_id, writer.add_eot_token_id, writer.add_eom_token_id)
        for add, token in zip(places, self.stops, strict=False):
            add(token)
        if self.begin is not None:
            writer.add_bos_token_id(self.begin)
        if self.pad is not None:
            writer.add_pad_token_id(self.pad)
        writer.add_add_bos_token(self.adds_begin)
        writer.add_chat_template(self.template)


def read_vocabulary(folder: Path, rows: int, template: str, pretokenizer: str | None = None) -> Vocabulary:
    """Read the tokenizer in ``folder`` for a model with ``rows`` embeddings.

    Raises BadInput when it is no BPE over bytes, or splits texts by a rule that is not known and not given.
    """
    from transformers import AutoTokenizer

    path = folder / "tokenizer.json"
    tokenizer = AutoTokenizer.from_pretrained(folder)
    if not tokenizer.is_fast:
        reject(str(path), "there is no such file", "GGUF files are written from a fast tokenizer; use --to merged")
    values = json.loads(tokenizer.backend_tokenizer.to_str())  # as it works: its class may replace rules of the file
    model = values["model"]
    with_bytes = bool(model.get("byte_fallback"))
    known = values.get("normalizer") in (None, NFC) if not with_bytes else _space_first(values) is not None
    if model.get("type") != "BPE" or not known:
        kind = f"{model.get('type')} with rules for spaces that are not known" if with_bytes else model.get("type")
        fix = "GGUF files are written for BPE over bytes or SentencePiece; --to merged serves every tokenizer"
        reject(str(path), f"the tokenizer is {kind}, and not a BPE that llama.cpp has", fix)
    tokens, kinds = _tokens(values, rows, path)
    begin = tokenizer.bos_token_id
    pairs = [pair.split(" ", 1) if isinstance(pair, str) else list(pair) for pair in model["merges"]]
    return Vocabulary(
        tokens=tokens,
        kinds=kinds,
        merges=[" ".join(pair) for pair in pairs],
        pretokenizer="default" if with_bytes else _pretokenizer(values, path, pretokenizer),
        scores=_scores(tokens, pairs) if with_bytes else (),
        unknown=tokenizer.unk_token_id,
        space_first=bool(_space_first(values)),
        stops=_stops(folder, tokenizer.eos_token_id, path),
        begin=begin,
        pad=tokenizer.pad_token_id,
        adds_begin=begin is not None and tokenizer("a").input_ids[:1] == [begin],
        template=template,
    )


NFC = {"type": "NFC"}
"""Qwen's normalizer, which llama.cpp leaves out: a text that it changes is found by the comparison of ids."""


def _space_first(values: Mapping[str, Any]) -> bool | None:
    """Return True when texts begin with a space that is not written, else False; None for unknown rules."""
    normalizer, rule = values.get("normalizer"), values.get("pre_tokenizer")
    steps = list((normalizer or {}).get("normalizers", [normalizer] if normalizer else []))
    prepended = [each for each in steps if each == {"type": "Prepend", "prepend": SPACE}]
    written = [each for each in steps if each.get("type") == "Replace" and each.get("content") == SPACE]
    if rule is None:
        return bool(prepended) if written and len(prepended) + len(written) == len(steps) else None
    if rule.get("type") != "Metaspace" or rule.get("replacement") != SPACE or steps:
        return None
    return bool(rule.get("prepend_scheme", "always") != "never")


def _scores(tokens: Sequence[str], pairs: Sequence[Sequence[str]]) -> list[float]:
    """Return SentencePiece's scores of the tokens: by them llama.cpp merges in the order of ``pairs``."""
    ranks: dict[str, int] = {}
    for rank, pair in enumerate(pairs):
        ranks.setdefault("".join(pair), rank)
    return [-float(ranks[token] + 1) if token in ranks else 0.0 for token in tokens]


def _tokens(values: Mapping[str, Any], rows: int, path: Path) -> tuple[list[str], list[int]]:
    model = values["model"]
    vocabulary, with_bytes = dict(model["vocab"]), bool(model.get("byte_fallback"))
    kinds = {number: BYTE if with_bytes and BYTES.fullmatch(token) else NORMAL for token, number in vocabulary.items()}
    for added in values["added_tokens"]:
        vocabulary[added["content"]] = added["id"]
        kinds[added["id"]] = CONTROL if added["special"] else USER_DEFINED
    if with_bytes and model.get("unk_token") in vocabulary:
        kinds[vocabulary[model["unk_token"]]] = UNKNOWN
    if max(vocabulary.values()) >= rows:
        what = f"it has {max(vocabulary.values()) + 1} tokens, and the model {rows} rows"
        reject(str(path), what, "Copy the model again")
    by_id = {number: token for token, number in vocabulary.items()}
    tokens = [by_id.get(number, f"[PAD{number}]") for number in range(rows)]
    return tokens, [kinds.get(number, UNUSED) for number in range(rows)]


def _pretokenizer(values: Mapping[str, Any], path: Path, given: str | None) -> str:
    if given is not None:
        if given not in PRETOKENIZERS:
            reject(f"pretokenizer={given}", "is no rule of llama.cpp", suggest(given, PRETOKENIZERS))
        return given
    known = _known(values.get("pre_tokenizer") or {})
    if known is None:
        options = ", ".join(PRETOKENIZERS)
        fix = f"Give pretokenizer=NAME, the rule of llama.cpp, and the ids will be compared. Rules: {options}"
        reject(str(path), "splits texts by a rule without a known name", fix)
    return known


def _known(rule: Mapping[str, Any]) -> str | None:
    """Return llama.cpp's name of a rule; None for an unknown one."""
    parts = list(rule.get("pretokenizers", [rule]))
    kinds = [part.get("type") for part in parts]
    if kinds == ["ByteLevel"] and parts[0].get("use_regex", True) and not parts[0].get("add_prefix_space"):
        return "gpt-2"
    if kinds == ["Digits", "ByteLevel"] and parts[0].get("individual_digits"):
        return "smollm"
    if kinds == ["Split", "ByteLevel"]:
        return BY_PATTERN.get(parts[0].get("pattern", {}).get("Regex", ""))
    return None


def _stops(folder: Path, own: int | None, path: Path) -> list[int]:
    """Return the ids that end an answer: the tokenizer's own first, then those of generation."""
    config = folder / "generation_config.json"
    given = read_json(config).get("eos_token_id") if config.is_file() else None
    listed = given if isinstance(given, list) else [given]
    found = list(dict.fromkeys(each for each in (own, *listed) if isinstance(each, int)))
    if not found or len(found) > 3:
        what = f"{len(found)} tokens end an answer"
        reject(str(path), what, "A GGUF file names one to three: set eos_token_id of generation_config.json")
    return found
