"""Text to tokens and back: any `tokenizer.json` of the `tokenizers` library, or plain bytes."""

from __future__ import annotations

import functools
import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import tokenizers as library

from rlhf_jax.data import DataError
from rlhf_jax.types import Sequences

# Names in use for the three tokens every batch needs; a file that has exactly one of each loads
# without a word. "<|endoftext|>" and the like mean different things in different files: say it.
KNOWN = {
    "pad": ("<pad>", "[PAD]", "<|pad|>", "<|finetune_right_pad_id|>"),
    "bos": ("<bos>", "<s>", "[BOS]", "<|begin_of_text|>", "<|startoftext|>"),
    "eos": ("<eos>", "</s>", "[EOS]", "<|end_of_text|>"),
}


class Tokenizer:
    """A `tokenizers.Tokenizer` that knows its padding, beginning and end.

    `stops` are all tokens that end what a model says, the end first; `never` those that it must not
    say: padding and beginning, unless they end texts, too.

    `encode` adds no special token and never turns text such as "<eos>" into one, so that only the
    framework decides where a text begins and ends.
    """

    def __init__(
        self,
        base: library.Tokenizer,
        *,
        pad: str | None,
        bos: str,
        eos: str,
        stops: Sequence[int] = (),
    ):
        base.no_padding()
        base.no_truncation()
        base.encode_special_tokens = True
        self.base = base
        self.bos, self.eos = (self._known(base, name) for name in (bos, eos))
        # Segments say where a text ends: without a token for padding any stands there.
        self.pad = 0 if pad is None else self._known(base, pad)
        self.stops = tuple(dict.fromkeys((self.eos, *stops)))
        self.never = tuple(
            self._known(base, name)
            for name in dict.fromkeys((pad, bos))
            if name is not None and self._known(base, name) not in self.stops
        )
        added = base.get_added_tokens_decoder()
        self.specials = frozenset(i for i, token in added.items() if token.special)

    @property
    def vocab_size(self) -> int:
        """Tokens, added ones included: the least `vocab` a model needs."""
        return max(self.base.get_vocab(with_added_tokens=True).values()) + 1

    @property
    def largest(self) -> int:
        """Largest id that a text becomes, or that begins, ends or pads one.

        Other special tokens are left out: some files name one that their model has no row for.
        """
        ids = set(self.base.get_vocab(with_added_tokens=True).values()) - self.specials
        return max(ids | {self.pad, self.bos, *self.stops})

    def id(self, token: str) -> int:
        """Number of a token by its name, e.g. of the control token `<good>`.

        Raises:
            DataError: if there is no such token.
        """
        return self._known(self.base, token)

    def encode(self, text: str) -> list[int]:
        """Tokens of a text, without BOS or EOS."""
        return self.base.encode(text, add_special_tokens=False).ids

    def encode_with_offsets(self, text: str) -> tuple[list[int], list[tuple[int, int]]]:
        """Tokens, and the characters (start, end) that each was made from."""
        encoding = self.base.encode(text, add_special_tokens=False)
        return encoding.ids, encoding.offsets

    def decode(self, ids: Sequence[int], *, specials: bool = False) -> str:
        """Text of tokens; padding, BOS, EOS and control tokens are left out unless `specials`."""
        ids = [int(i) for i in ids]
        if not specials:
            return self.base.decode(ids, skip_special_tokens=True)
        parts, plain = [], []  # in stretches: a decoder may treat a special token as a word
        for i in ids:
            if i in self.specials:
                parts += [self.base.decode(plain), self.base.id_to_token(i)]
                plain = []
            else:
                plain.append(i)
        return " ".join(part for part in [*parts, self.base.decode(plain)] if part)

    def decode_batch(self, batch: Sequence[Sequence[int]]) -> list[str]:
        """Texts of rows of tokens, special tokens left out."""
        return [self.decode(row) for row in np.asarray(batch).tolist()]

    @staticmethod
    def _known(base: library.Tokenizer, token: str) -> int:
        number = base.token_to_id(token)
        if number is None:
            raise DataError(
                f"the tokenizer has no token {token!r}; its special tokens: {_special_names(base)}"
            )
        return number


def load(
    name: str | Path,
    *,
    pad: str | None = None,
    bos: str | None = None,
    eos: str | None = None,
    add: Sequence[str] = (),
) -> Tokenizer:
    """The tokenizer of a `tokenizer.json` (a path, or its folder), or "bytes".

    `pad`, `bos` and `eos` name tokens where the usual names do not find them. `add` appends special
    tokens to the vocabulary (control tokens, or a missing `<pad>`): the model needs as many more
    rows. Nothing is guessed: padding is the end token only if you say `pad=` that it is. A folder
    of Hugging Face says the three in tokenizer_config.json: there a model without a beginning
    begins with its end, and one without padding, or whose padding is its end, pads with any token,
    since segments say where a text ends.

    Raises:
        DataError: if there is no such file, it cannot be read, or one of the three is missing.
    """
    return _load(str(name), pad, bos, eos, tuple(add))


@functools.lru_cache(maxsize=16)
def _load(name, pad, bos, eos, add) -> Tokenizer:
    said, stops = {}, ()
    if name == "bytes":
        base = byte_base()
    else:
        path = Path(name).expanduser()
        path = path / "tokenizer.json" if path.is_dir() else path
        if not path.is_file():
            raise DataError(
                f'there is no tokenizer file {path}; give a tokenizer.json, its folder, or "bytes"'
            )
        if (path.parent / "config.json").is_file():
            said, stops = _of_model(path.parent)
        try:
            base = library.Tokenizer.from_file(str(path))
        except Exception as error:  # the library raises bare Exception
            raise DataError(f"{path} is not a tokenizer.json that can be read: {error}") from error
    if add:
        base.add_special_tokens(
            [library.AddedToken(t, special=True, normalized=False) for t in add]
        )
    named = {"pad": pad, "bos": bos, "eos": eos}
    found = {
        role: given or (said[role] if role in said else _find(base, role, name))
        for role, given in named.items()
    }
    return Tokenizer(base, **found, stops=stops)


def check_fits(found: Any, name: str | Path, *, vocab: int, model: str) -> None:
    """Compare a tokenizer, or a `chat.Chat`, with the rows of an embedding.

    Raises:
        DataError: if the model has no row for a token.
    """
    if found.largest < vocab:
        return
    base = getattr(found, "tokenizer", found).base
    token = base.id_to_token(found.largest)
    what = "which generation_config.json says ends texts" if token is None else repr(token)
    raise DataError(
        f"the tokenizer of {name} does not fit the model of {model}: it makes ids up to "
        f"{found.largest} ({what}), and the embedding has {vocab} rows, ids 0 to {vocab - 1} "
        "(vocab_size in config.json); take tokenizer, config.json and weights of one model"
    )


def _of_model(folder: Path) -> tuple[dict[str, str | None], tuple[int, ...]]:
    """Roles of tokens in a folder of Hugging Face, and the ids that end what its model says."""
    found = [
        read_json(folder / name)
        for name in ("tokenizer_config.json", "generation_config.json", "config.json")
    ]
    tokens = {role: found[0].get(f"{role}_token") for role in KNOWN}
    tokens = {role: x.get("content") if isinstance(x, dict) else x for role, x in tokens.items()}
    if tokens["eos"] is None:
        return {}, ()
    ends = [one["eos_token_id"] for one in found if one.get("eos_token_id") is not None]
    ids = [i for end in ends for i in (end if isinstance(end, list) else [end])]
    pad = None if tokens["pad"] == tokens["eos"] else tokens["pad"]
    said = {"pad": pad, "bos": tokens["bos"] or tokens["eos"], "eos": tokens["eos"]}
    return said, tuple(dict.fromkeys(ids))


def read_json(file: Path) -> dict:
    """A JSON file; empty if there is none."""
    if not file.is_file():
        return {}
    try:
        return json.loads(file.read_text(encoding="utf-8"))
    except ValueError as error:
        raise DataError(f"{file} is not valid JSON: {error}; download it again") from error


def _find(base: library.Tokenizer, role: str, name: str) -> str:
    """The one usual name of a role that the vocabulary has."""
    there = [token for token in KNOWN[role] if base.token_to_id(token) is not None]
    if len(there) == 1:
        return there[0]
    why = f"several tokens that could be {role}: {there}" if there else f"no usual {role} token"
    advice = f'say which with {role}="..."'
    if not there:
        advice += f', or append one with add=("<{role}>",)'
    raise DataError(f"{name} has {why}; {advice}. Its special tokens: {_special_names(base)}")


def _special_names(base: library.Tokenizer) -> str:
    names = [token.content for token in base.get_added_tokens_decoder().values()]
    return ", ".join(names[:20]) or "none"


def byte_base() -> library.Tokenizer:
    """UTF-8 bytes as 256 tokens behind `<pad> <bos> <eos> <good> <bad>`: no file, any text."""
    alphabet = sorted(library.pre_tokenizers.ByteLevel.alphabet())
    specials = ["<pad>", "<bos>", "<eos>", "<good>", "<bad>"]
    vocab = {token: i for i, token in enumerate([*specials, *alphabet])}
    base = library.Tokenizer(library.models.BPE(vocab=vocab, merges=[]))
    base.pre_tokenizer = library.pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    base.decoder = library.decoders.ByteLevel()
    base.add_special_tokens(
        [library.AddedToken(t, special=True, normalized=False) for t in specials]
    )
    return base


def texts(tokenizer: Tokenizer, batch: Sequences, *, part: str = "all") -> list[str]:
    """Texts of the rows of a Rollout or Labeled batch, to read them.

    `part`: "all", "response" (where the mask is true) or "prompt" (the text before it).
    """
    tokens, mask = np.asarray(batch.tokens), np.asarray(batch.mask)
    used = np.asarray(batch.segments) > 0
    if part == "response":
        used = used & mask
    elif part == "prompt":
        used = used & (np.cumsum(mask, axis=-1) == 0)
    elif part != "all":
        raise DataError(f'part {part!r}: valid are "all", "response" and "prompt"')
    return [tokenizer.decode(row[keep]) for row, keep in zip(tokens, used, strict=True)]
