"""Small models whose every probability is known, lively weights, and a float64 transformer."""

from __future__ import annotations

import os
import sys
import tempfile
from contextlib import contextmanager
from dataclasses import dataclass

import jax
import jax.numpy as jnp
import numpy as np

from rlhf_jax.models.transformer import Output
from rlhf_jax.types import Experience, Labeled, Pairs


@dataclass(frozen=True)
class Table:
    """A Markov chain as a model: row i of `table` holds the logits of what follows token i."""

    size: int
    lm_head: bool = True
    value_head: bool = False
    context: int = 1024

    @property
    def vocab(self):
        return self.size

    def init(self, key):
        table = jax.random.normal(key, (self.size, self.size), jnp.float32)
        return markov(table, jnp.zeros((self.size,), jnp.float32))

    def apply(self, params, tokens, *, positions=None, segments=None, cache=None):
        return Output(jax.nn.one_hot(tokens, self.size), cache)

    def logits(self, params, hidden):
        return hidden @ params["head"]["kernel"]

    def value(self, params, hidden):
        return (hidden @ params["value_head"]["kernel"])[..., 0]

    def empty_cache(self, rows, length):
        return jnp.zeros((rows, length), jnp.float32)


def markov(table, values=None):
    """Weights of a `Table`, under names that have a sharding rule."""
    values = jnp.zeros(len(table)) if values is None else values
    return {
        "head": {"kernel": jnp.asarray(table, jnp.float32)},
        "value_head": {"kernel": jnp.asarray(values, jnp.float32)[:, None]},
    }


def chain(size, sharpness=50.0):
    """Weights of a `Table` that surely counts upwards: token i is followed by i + 1."""
    return markov(sharpness * jnp.eye(size)[(jnp.arange(size) + 1) % size])


def weights(model, seed=0):
    """Parameters of a `Transformer` that says something: logits of about unit size, no head 0."""
    rng = np.random.default_rng(seed)

    def leaf(path, x):
        name = path[-1].key
        if name == "scale":
            return 1.0 + 0.2 * rng.standard_normal(x.shape)
        size = {"embedding": 0.3, "bias": 0.3}.get(name, 1 / np.sqrt(x.shape[-2:][0]))
        return size * rng.standard_normal(x.shape)

    shapes = jax.eval_shape(model.init, jax.random.key(0))
    made = jax.tree_util.tree_map_with_path(leaf, shapes)
    return jax.tree.map(lambda x: jnp.asarray(x, jnp.float32), made)


def stacked(params, layers):
    """The same weights for a model that scans over its layers."""
    rest = {k: v for k, v in params.items() if not k.startswith("layers_")}
    blocks = [params[f"layers_{i}"] for i in range(layers)]
    return rest | {"layers": jax.tree.map(lambda *x: jnp.stack(x), *blocks)}


def padding(rows, t, shortest, seed=0):
    """Random texts of `shortest` to `t` tokens, padded with 0: tokens, segments."""
    rng = np.random.default_rng(seed)
    length = rng.integers(shortest, t + 1, rows)
    length[0] = t
    segments = (np.arange(t) < length[:, None]).astype(np.int32)
    tokens = rng.integers(1, 30, (rows, t)) * segments
    return tokens.astype(np.int32), segments


def labeled(rows=16, t=12, seed=0):
    """Texts with feedback; the first token of each is given."""
    rng = np.random.default_rng(seed + 1)
    tokens, segments = padding(rows, t, 3, seed)
    mask = (segments > 0) & (np.arange(t) > 0)
    token_score = np.where(mask, rng.standard_normal((rows, t)), 0).astype(np.float32)
    score = rng.standard_normal(rows).astype(np.float32)
    return Labeled(tokens, mask, segments, score, token_score)


def pairs(n=8, t=12, seed=0):
    """Comparisons of two texts each."""
    tokens, segments = padding(2 * n, t, 3, seed)
    tokens, segments = tokens.reshape(n, 2, t), segments.reshape(n, 2, t)
    return Pairs(tokens, (segments > 0) & (np.arange(t) > 0), segments)


def experience(rows=16, t=12, seed=0):
    """Experience with plausible numbers; four tokens of prompt."""
    rng = np.random.default_rng(seed + 2)
    tokens, segments = padding(rows, t, 6, seed)
    mask = (segments > 0) & (np.arange(t) >= 4)

    def noise(scale, shift=0.0):
        x = shift + scale * rng.standard_normal((rows, t))
        return np.where(mask, x, 0).astype(np.float32)

    logp = np.minimum(noise(0.5, -3.0), 0.0)
    return Experience(
        tokens=tokens,
        mask=mask,
        segments=segments,
        logp=logp,
        behaviour_logp=logp,
        temperature=np.full(rows, 0.7, np.float32),
        ended=np.ones(rows, bool),
        prompt_id=np.arange(rows, dtype=np.int32),
        sample_id=np.zeros(rows, np.int32),
        earned=np.zeros((rows, t), np.float32),
        steps=np.full(rows, t, np.int32),
        old_logp=logp,
        ref_logp=np.minimum(noise(0.5, -3.0), 0.0),
        value=noise(0.5),
        reward=noise(1.0),
        advantage=noise(1.0),
        target=noise(1.0),
        group_tokens=mask.sum(1).astype(np.float32),
    )


def forward(model, params, tokens, segments=None):
    """Hidden states and logits of a `Transformer`, in float64, one token at a time."""
    p = jax.tree.map(lambda x: np.asarray(x, np.float64), params)
    tokens = np.asarray(tokens)
    segments = np.ones_like(tokens) if segments is None else np.asarray(segments)
    hidden = np.zeros((*tokens.shape, model.width))
    for row in range(tokens.shape[0]):
        for name in np.unique(segments[row][segments[row] > 0]):
            at = np.flatnonzero(segments[row] == name)
            hidden[row, at] = _text(model, p, tokens[row, at])
    head = p["embed"]["embedding"].T if model.tied else p["head"]["kernel"]
    return hidden, hidden @ head


def _text(model, p, tokens):
    size, group = model.size_of_head, model.heads // model.kv_heads
    h = p["embed"]["embedding"][tokens]
    for i in range(model.layers):
        layer = p[f"layers_{i}"]
        x = _norm(h, layer["attention_norm"]["scale"], model.norm_epsilon)
        query, key, value = (
            (x @ layer[name]["kernel"]).reshape(len(tokens), -1, size)
            for name in ("query", "key", "value")
        )
        mixed = np.zeros_like(query)
        for t in range(len(tokens)):
            for head in range(model.heads):
                q = _turn(query[t, head], t, model.rope_theta)
                keys = [_turn(key[s, head // group], s, model.rope_theta) for s in range(t + 1)]
                w = np.exp(np.array(keys) @ q / np.sqrt(size))
                mixed[t, head] = (w / w.sum()) @ value[: t + 1, head // group]
        h = h + mixed.reshape(len(tokens), -1) @ layer["out"]["kernel"]
        x = _norm(h, layer["mlp_norm"]["scale"], model.norm_epsilon)
        gate = x @ layer["gate"]["kernel"]
        up = x @ layer["up"]["kernel"]
        h = h + (gate / (1 + np.exp(-gate)) * up) @ layer["down"]["kernel"]
    return _norm(h, p["final_norm"]["scale"], model.norm_epsilon)


def _norm(x, scale, epsilon):
    return x / np.sqrt((x**2).mean(-1, keepdims=True) + epsilon) * scale


def _turn(x, position, theta):
    """Rotate pair (i, i + half) by position · theta^(−i / half), as complex numbers."""
    half = len(x) // 2
    z = (x[:half] + 1j * x[half:]) * np.exp(1j * position * theta ** (-np.arange(half) / half))
    return np.concatenate([z.real, z.imag])


@contextmanager
def standard_error():
    """What anyone writes there, XLA included, as a function to be called afterwards."""
    with tempfile.TemporaryFile("w+") as file:
        sys.stderr.flush()
        kept = os.dup(2)
        os.dup2(file.fileno(), 2)
        try:
            yield lambda: (file.seek(0), file.read())[1]
        finally:
            os.dup2(kept, 2)
            os.close(kept)
