"""Batches without end: text, prompts and pairs; shuffled, repeated, sharded, resumable.

A stream is a function `(*, seed, shard, ...) -> grain.IterDataset`. Row g of the endless sequence
is decided by the seed and g alone (`endless.py`); batch s is the rows s·batch .. (s+1)·batch − 1,
and `shard` says which of them this process makes. So every global batch is the same, in the same
order, whatever the number of processes and the mesh, and the whole state of an iterator is one
integer, the same in every process: `get_state()` and `set_state()` resume exactly, on any number.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from functools import partial
from pathlib import Path

import grain
import numpy as np

from rlhf_jax.data import DataError, chat, snippets, tokenizers, vader
from rlhf_jax.data.endless import Shard, at_least, endless
from rlhf_jax.data.packing import packed
from rlhf_jax.data.pairing import Partners, one_rater_each, same_part
from rlhf_jax.types import Labeled, Pairs, Prompts

# Rows: {"text": str}, and where there is feedback "score", "ratings", "part", "id". A source is the
# rows, texts alone, or a function that returns either (called by every process when it starts).
Rows = Sequence[Mapping | str]
Source = Rows | Callable[[], Rows]
BASE = partial(snippets.rows, split="base")
REWARD = partial(snippets.rows, split="reward")
HELDOUT = partial(snippets.rows, split="heldout")


def text(
    *,
    seed: int,
    shard: Shard,
    batch: int,
    length: int,
    tokenizer: str | Path,
    source: Source = BASE,
    field: str = "text",
    marks: Callable[[str, Sequence[tuple[int, int]]], np.ndarray] | None = vader.token_marks,
    pack: bool = False,
) -> grain.IterDataset:
    """`Labeled`: BOS text EOS in rows of `length` tokens; longer texts are cut and have no EOS.

    With `pack` a row holds as many whole texts as fit, each a segment, and has the score 0; a batch
    is then so many rows, and more texts.

    `score` is the row's "score" (snippets: mean rating, −4 to 4), `token_score` is
    `marks(text, offsets)`: the valence of VADER's lexicon (−4 to 4) on tokens of words it knows. 0
    where there is none, and everywhere if `marks` is None (needed offline: the lexicon is fetched).
    """
    encode = tokenizers.load(tokenizer)
    at_least(length, 2, "length")

    def row(record, _) -> Labeled:
        written = _text(record, field)
        ids, offsets = encode.encode_with_offsets(written)
        tokens, mask, segments = _row([encode.bos, *ids, encode.eos], length, encode.pad)
        token_score = np.zeros(length, np.float32)
        if marks is not None:
            found = marks(written, offsets[: length - 1])
            token_score[1 : 1 + len(found)] = found
        return Labeled(
            tokens=tokens, mask=mask, segments=segments, token_score=token_score,
            score=np.float32(_get(record, "score", 0.0)),
        )  # fmt: skip

    if marks is not None:
        marks("", ())  # so that a missing network is reported here and not inside a thread
    records, row = packed(_rows(source), row, length) if pack else (_rows(source), row)
    return endless(records, row, seed=seed, shard=shard, batch=batch)


def prompts(
    *,
    seed: int,
    shard: Shard,
    batch: int,
    length: int,
    tokenizer: str | Path,
    words: tuple[int, int] = (2, 2),
    empty: float = 0.0,
    truncate: bool = False,
    source: Source = HELDOUT,
    field: str = "text",
) -> grain.IterDataset:
    """`Prompts`: BOS and a text's first k words, k uniform in `words` (both ends included).

    A share `empty` of the prompts is BOS alone. A prompt of more than `length` tokens, with BOS,
    is an error, or cut at its end with `truncate`. `prompt_id` is the row's place in the stream.

    Raises:
        DataError: while iterating, showing the prompt that does not fit.
    """
    encode = tokenizers.load(tokenizer)
    at_least(length, 1, "length")
    low, high = words
    if not 0 <= low <= high:
        raise DataError(f"words={words}: needs 0 ≤ fewest ≤ most")
    if not 0 <= empty <= 1:
        raise DataError(f"empty={empty}: a share between 0 and 1")

    def row(record, rng: np.random.Generator) -> Prompts:
        count = 0 if rng.random() < empty else int(rng.integers(low, high + 1))
        start = " ".join(_text(record, field).split()[:count])
        ids = [encode.bos, *encode.encode(start)]
        if len(ids) > length and not truncate:
            raise DataError(
                f"the prompt {start!r} has {len(ids)} tokens with BOS, more than length={length}; "
                "raise length, ask for fewer words, or pass truncate=True"
            )
        tokens, _, segments = _row(ids, length, encode.pad)
        return Prompts(tokens, np.int32(segments.sum()), np.int32(0), np.int32(0))

    return endless(_rows(source), row, seed=seed, shard=shard, batch=batch, number=_number)


def chats(
    *,
    seed: int,
    shard: Shard,
    batch: int,
    length: int,
    tokenizer: str | Path,
    source: Source,
    template: str | None = None,
    pack: bool = False,
) -> grain.IterDataset:
    """`Labeled` chats in rows of `length` tokens, longer ones cut; the mask is what was said.

    Rows have "messages", a list of {"role", "content"}, and perhaps a "score". `tokenizer` is a
    directory of Hugging Face; `template` stands in for its own. `pack`: as in `text`.

    Raises:
        DataError: while iterating, for messages that the template refuses.
    """
    talk = chat.load(tokenizer, template=template)
    at_least(length, 2, "length")

    def row(record, _) -> Labeled:
        ids, said = talk.encode(_messages(record))
        tokens, mask, segments = _row(ids, length, talk.tokenizer.pad)
        mask[: len(said)] &= np.array(said[:length])
        zeros = np.zeros(length, np.float32)
        return Labeled(
            tokens=tokens, mask=mask, segments=segments, token_score=zeros,
            score=np.float32(_get(record, "score", 0.0)),
        )  # fmt: skip

    records, row = packed(_rows(source), row, length) if pack else (_rows(source), row)
    return endless(records, row, seed=seed, shard=shard, batch=batch)


def chat_prompts(
    *,
    seed: int,
    shard: Shard,
    batch: int,
    length: int,
    tokenizer: str | Path,
    source: Source,
    template: str | None = None,
    shuffle: bool = True,
) -> grain.IterDataset:
    """`Prompts`: chats up to where the assistant is to speak. Rows are those of `chats`.

    `prompt_id` is the row's place in the stream; without `shuffle` that is the place in `source`,
    counted on where it begins again, which tells a reward whose answer it reads.

    Raises:
        DataError: while iterating, for a chat of more than `length` tokens.
    """
    talk = chat.load(tokenizer, template=template)

    def row(record, _) -> Prompts:
        messages = _messages(record)
        while messages and messages[-1]["role"] == "assistant":
            messages = messages[:-1]
        ids = talk.encode(messages, ask=True).ids
        if len(ids) > length:
            raise DataError(
                f"a chat has {len(ids)} tokens, more than length={length}: {messages!r:.200}; raise"
                " length"
            )
        tokens, _, segments = _row(ids, length, talk.tokenizer.pad)
        return Prompts(tokens, np.int32(segments.sum()), np.int32(0), np.int32(0))

    order = {"number": _number, "shuffle": shuffle}
    return endless(_rows(source), row, seed=seed, shard=shard, batch=batch, **order)


def episodes(*, seed: int, shard: Shard, batch: int) -> grain.IterDataset:
    """`Prompts` for an environment, which needs their names only; their one token is a 0.

    `prompt_id` is the place in the stream, as in `prompts`: no two episodes of a batch are one.
    """

    def row(record, _) -> Prompts:
        return Prompts(np.zeros(1, np.int32), np.int32(1), np.int32(0), np.int32(0))

    return endless(range(1), row, seed=seed, shard=shard, batch=batch, number=_number)


def pairs(
    *,
    seed: int,
    shard: Shard,
    batch: int,
    length: int,
    tokenizer: str | Path,
    gap: float = 1.0,
    group: Callable[[Mapping], object] = same_part,
    label: Callable[..., bool] = one_rater_each,
    source: Source = REWARD,
    field: str = "text",
) -> grain.IterDataset:
    """`Pairs`: two rated texts of one `group`, the preferred one first; `batch` counts pairs.

    Every text in turn meets a partner drawn evenly from those of its group whose mean rating lies
    at least `gap` away. Who is preferred, `label` decides: by default one real rater of each text
    (ties between them drawn again), so annotator noise is that of people; `mean_rating` gives
    noiseless labels to measure accuracy with. `partial(same_words, count=2)` compares continuations
    of one two-word prompt.
    """
    encode = tokenizers.load(tokenizer)
    at_least(length, 2, "length")
    partners = Partners(_rows(source), gap=gap, group=group, field=field)

    def row(place: int, rng: np.random.Generator) -> Pairs:
        one, other = partners.draw(place, rng)
        if not label(np.asarray(one["ratings"]), np.asarray(other["ratings"]), rng):
            one, other = other, one
        both = [
            _row([encode.bos, *encode.encode(_text(x, field)), encode.eos], length, encode.pad)
            for x in (one, other)
        ]
        tokens, mask, segments = (np.stack(x) for x in zip(*both, strict=True))
        return Pairs(tokens=tokens, mask=mask, segments=segments)

    return endless(range(len(partners)), row, seed=seed, shard=shard, batch=batch)


# ----------------------------------------------------------------------------------- rows, records


def _number(place: int, prompt: Prompts) -> Prompts:
    return prompt.replace(prompt_id=np.int32(place % 2**31))


def _row(ids: list[int], length: int, pad: int):
    """Tokens, mask and segments `[length]`; the mask is true on everything but BOS and padding."""
    used = min(len(ids), length)
    tokens = np.full(length, pad, np.int32)
    tokens[:used] = ids[:used]
    segments = (np.arange(length) < used).astype(np.int32)
    mask = segments > 0
    mask[0] = False
    return tokens, mask, segments


def _rows(source: Source) -> Rows:
    rows = source() if callable(source) else source
    if isinstance(rows, str):
        raise DataError(
            f"a source is a sequence of texts or a function, not the text {rows[:40]!r}"
        )
    if len(rows) == 0:
        name = getattr(source, "func", source) if callable(source) else "the sequence given"
        raise DataError(f"the data set is empty: {name} has no rows")
    return rows


def _messages(record: Mapping | str) -> Sequence[Mapping]:
    if isinstance(record, str) or "messages" not in record:
        raise DataError(f'rows of chats have "messages"; this one is {record!r:.120}')
    return record["messages"]


def _get(record: Mapping | str, name: str, default):
    return default if isinstance(record, str) else record.get(name, default)


def _text(record: Mapping | str, field: str) -> str:
    if isinstance(record, str):
        return record
    if field not in record:
        raise DataError(f"rows have no field {field!r}; they have {', '.join(record)}")
    value = record[field]
    return value.decode("utf-8") if isinstance(value, bytes) else str(value)
