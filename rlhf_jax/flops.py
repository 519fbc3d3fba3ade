"""Operations that a model needs, counted from its shapes: a multiply and an add are two."""

from __future__ import annotations

import math
from functools import lru_cache
from typing import Any

import jax

from rlhf_jax.models import weights

HEADS = ("head/kernel", "value_head/kernel")
MATRICES = ("/kernel", "/lora_a", "/lora_b")
BEHIND_ATTENTION = ("out", "gate", "up", "down", "side_up", "side_down")


def forward(model: Any, *, rows: float, tokens: float, read: float) -> float:
    """Operations of a forward pass over `rows` texts of `tokens` tokens, of which `read` are read.

    For them alone are logits, and what follows attention in the last layer.
    2 per weight and token, and 4 · heads · head_dim per pair of a token and one that it attends to
    (Kaplan et al. 2020, table 1; causal, so about half of all pairs). Norms, rotations and the
    softmax are left out: they are bytes, not operations. A backward pass costs twice as much.
    """
    pairs = tokens * (tokens + 1) / 2
    attention = 4 * model.heads * model.size_of_head * model.layers * pairs
    head = 2 * model.width * model.vocab * read if model.lm_head else 0.0
    unread = behind_attention(model) * (tokens - read)
    return rows * (2 * (matrices(model) * tokens - unread) + attention + head)


def matrices(model: Any) -> int:
    """Weights that every token is multiplied by, without embedding and heads."""
    return sum(
        math.prod(x.shape)
        for name, x in shapes(model).items()
        if name.endswith(MATRICES) and not name.endswith(HEADS)
    )


def behind_attention(model: Any) -> float:
    """Weights of a layer behind its attention, where no token needs another."""
    names = {name: name.split("/") for name in shapes(model) if name.endswith(MATRICES)}
    found = (shapes(model)[name] for name, path in names.items() if path[-2] in BEHIND_ATTENTION)
    return sum(math.prod(x.shape) for x in found) / model.layers


def weight_bytes(model: Any) -> float:
    """Bytes of the weights in the dtype they are stored in: what a forward pass reads at least."""
    return sum(math.prod(x.shape) * x.dtype.itemsize for x in shapes(model).values())


def decode_bytes(model: Any, *, rows: float, tokens: float) -> float:
    """Bytes that a decoding step reads: every weight once, and keys and values of each row's text.

    The cache is counted in its own dtype.
    """
    size = jax.numpy.dtype(model.cache_dtype or model.dtype).itemsize
    cache = 2 * model.layers * model.kv_heads * model.size_of_head * size * rows * tokens
    return weight_bytes(model) + cache


def update_bytes(model: Any, *, passes: float) -> float:
    """Bytes that an update moves at least, without activations, in `passes` forward and backward.

    Each pass reads the weights twice and adds to the gradient (2 reads or writes); then Adam reads
    gradient, weights and two moments and writes the last three: 7.
    """
    return weight_bytes(model) * (4 * passes + 7)


def of_program(jaxpr: Any, *, at_most: int = 1) -> float:
    """Operations of all matrix products that a traced program does, over all devices.

    A scan's body counts as often as it runs, a loop whose end depends on data `at_most` times in
    all, whatever loop it is in; of a choice the branch that does most. What a backward pass
    recomputes is part of it.
    """
    return _operations(jaxpr, at_most, 1)


def _operations(jaxpr: Any, at_most: int, times: int) -> float:
    total = 0.0
    for equation in jaxpr.eqns:
        name, given = equation.primitive.name, equation.params
        if name == "dot_general":
            (contracted, _), _ = given["dimension_numbers"]
            left, out = equation.invars[0].aval.shape, equation.outvars[0].aval.shape
            total += times * 2 * math.prod(out) * math.prod(left[axis] for axis in contracted)
            continue
        again = at_most if name == "while" else times
        inner = [
            [_operations(getattr(x, "jaxpr", x), at_most, again) for x in _flat(value)]
            for value in given.values()
        ]
        inner = [count for counts in inner for count in counts]
        if name == "cond":
            total += max(inner)
        elif name == "shard_map":  # of one device
            total += given["mesh"].size * sum(inner)
        else:
            total += given.get("length", 1) * sum(inner) if name == "scan" else sum(inner)
    return total


def _flat(value: Any) -> list[Any]:
    """Programs among an instruction's parameters."""
    listed = value if isinstance(value, tuple | list) else (value,)
    return [x for x in listed if hasattr(getattr(x, "jaxpr", x), "eqns")]


@lru_cache(maxsize=32)
def shapes(model: Any) -> dict[str, jax.ShapeDtypeStruct]:
    """A model's weights by their paths; made once, for a model is a value."""
    return weights.flat(jax.eval_shape(lambda: model.init(jax.random.key(0))))
