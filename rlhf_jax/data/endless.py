"""Rows in an endless order: shuffled, repeated, cut into batches, a slice of each per process.

Row g of the sequence (g // n epochs over n records, each in its own order) is decided by the seed
and g alone, and the whole state of an iterator is one integer.
"""

from __future__ import annotations

import sys
from collections.abc import Callable, Sequence

import grain
import jax
import numpy as np

from rlhf_jax.data import DataError


def endless(
    records: Sequence,
    row: Callable,
    *,
    seed: int,
    shard: tuple[int, int],
    batch: int,
    number: Callable | None = None,
    shuffle: bool = True,
) -> grain.IterDataset:
    """Shuffle, repeat, make rows, take this process's slices, batch. `row(record, rng) -> tree`.

    `number(place, row)` tells a row its place in the sequence. Without `shuffle` every epoch has
    the records' own order: row g is that of record g modulo n.
    """
    index, count = check_shard(shard, batch)
    if not 0 <= seed < 2**32:
        raise DataError(f"seed={seed}: must be at least 0 and below 2**32")
    if not shuffle:
        rows = grain.MapDataset.source(records).seed(seed).repeat().random_map(row)
    elif len(records) >= 1000:
        rows = grain.MapDataset.source(records).seed(seed).shuffle().repeat().random_map(row)
    else:  # grain finds a row's place among few by trial: 2 ms for 23 rows, 300 ms for 2
        rows = grain.MapDataset.source(_Epochs(records, seed)).seed(seed).random_map(row)
    if number is not None:
        rows = rows.map_with_index(number)
    mine = grain.MapDataset.source(_Slices(rows, batch=batch, index=index, count=count))
    batches = mine.batch(batch // count, drop_remainder=True, batch_fn=_stack)
    # One thread and a few batches ahead: rows are cheap, and the device needs the host's cores.
    return batches.to_iter_dataset(grain.ReadOptions(num_threads=1, prefetch_buffer_size=4))


def check_shard(shard: tuple[int, int], batch: int) -> tuple[int, int]:
    """The shard, if it is one and `batch` rows divide over all of them.

    Raises:
        DataError: if not.
    """
    index, count = shard
    if not 0 <= index < count:
        raise DataError(f"shard={shard}: needs 0 ≤ index < count")
    at_least(batch, 1, "batch")
    if batch % count:
        raise DataError(
            f"batch={batch} does not divide over {count} processes; "
            f"use a multiple of {count}, such as {-(-batch // count) * count}"
        )
    return shard


def at_least(value: int, least: int, name: str) -> None:
    """Raise DataError for a number that is too small."""
    if value < least:
        raise DataError(f"{name}={value}: must be at least {least}")


class _Epochs:
    """Few records, endlessly, each epoch in an order of its own."""

    def __init__(self, records: Sequence, seed: int):
        self.records, self.seed = records, seed

    def __len__(self) -> int:
        return sys.maxsize

    def __getitem__(self, at: int):
        epoch, place = divmod(int(at), len(self.records))
        order = np.random.default_rng((self.seed, epoch)).permutation(len(self.records))
        return self.records[int(order[place])]

    def __repr__(self) -> str:
        return f"{len(self.records)} records, shuffled and repeated"


class _Slices:
    """This process's rows, in order: its slice of batch 0, of batch 1, and so on."""

    def __init__(self, rows, *, batch: int, index: int, count: int):
        self.rows, self.batch, self.index, self.mine = rows, batch, index, batch // count

    def __len__(self) -> int:
        return sys.maxsize // self.batch * self.mine

    def __getitem__(self, at: int):
        step, place = divmod(int(at), self.mine)
        return self.rows[step * self.batch + self.index * self.mine + place]

    def __repr__(self) -> str:
        return f"slice {self.index} of batches of {self.batch}"


def _stack(rows):
    return jax.tree.map(lambda *x: np.stack(x), *rows)
