"""One PPO iteration on random weights: what `rlhf-jax bench` measures, here and in its peers.

    rlhf-jax bench benchmarks/ppo.py
    rlhf-jax bench benchmarks/ppo.py --set size=M --set mean=24

Prompts are random tokens, texts are paid for the share of their tokens in a quarter of the
vocabulary, and the learning rate is so small that neither the lengths nor the texts drift. Without
`mean` every response has the full length; with it a text ends after each token with probability
1 / mean.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from functools import partial

import jax
import jax.numpy as jnp

from rlhf_jax import masked
from rlhf_jax.advantages import gae, whitened
from rlhf_jax.config import Config, ConfigError, From, Frozen, Learner, Rollouts
from rlhf_jax.data.drawn import drawn
from rlhf_jax.models import weights
from rlhf_jax.models.transformer import Transformer
from rlhf_jax.objectives import ppo, value
from rlhf_jax.optimizer import adam
from rlhf_jax.rewards import KL
from rlhf_jax.sampling import Sampling
from rlhf_jax.types import Prompts

END = 2  # the token that ends a text
FIRST = 8  # prompts and rewards begin at this token
RATE = partial(adam, learning_rate=1e-9, clip=None)


@dataclass(frozen=True)
class Random(Transformer):
    """Weights that say nearly every token with equal probability, and END with 1 / mean."""

    mean: float | None = None

    def init(self, key):
        """GPT-2's scales; with `mean` embeddings share a direction, of which END has more."""
        flat = weights.flat(super().init(key))
        for own, name in zip(jax.random.split(key, len(flat)), sorted(flat), strict=True):
            if name.endswith(("/kernel", "/embedding")):
                writes = name.endswith(("out/kernel", "down/kernel"))  # into the residual stream
                scale = 0.02 / math.sqrt(2 * self.layers) if writes else 0.02
                flat[name] = scale * jax.random.normal(own, flat[name].shape, flat[name].dtype)
        params = weights.nested(flat)
        if self.mean is None:
            return params
        # The stream is then mostly this direction, and its norm after the last layer √width: END's
        # logit exceeds the others by `more`, whatever the text.
        table = params["embed"]["embedding"] + 1.0
        spread = 0.02**2 * self.width / 2  # log E exp of a logit of variance 0.02² width
        more = math.log(self.vocab / (self.mean - 1)) + spread
        return params | {"embed": {"embedding": table.at[END].set(1.0 + more / self.width)}}


SIZES = {
    "S": dict(vocab=4096, width=192, layers=6, heads=6, kv_heads=2, mlp=512),
    "M": dict(vocab=8192, width=512, layers=8, heads=8, kv_heads=4, mlp=1408),
    "135M": dict(vocab=49152, width=576, layers=30, heads=9, kv_heads=3, mlp=1536),
    "1.5B": dict(vocab=151936, width=1536, layers=28, heads=12, kv_heads=2, mlp=8960),
}


def config(
    size: str = "S",
    steps: int = 7,
    rows: int = 64,
    prompt: int = 32,
    length: int = 64,
    mean: float | None = None,
    epochs: int = 1,
    minibatches: int = 4,
    microbatches: int | None = None,
    widths: tuple | None = None,
    windows: int = 1,
    cache_dtype: str | None = None,
    slots: int | None = None,
    chunks: int = 1,
    rescore: bool = False,
    dtype: str = "float32",
    scan: bool = False,
    remat: str = "none",
) -> Config:
    """Policy, separate critic of the same shape, frozen reference.

    Where texts end by themselves (`mean`) padding is left out: unless told otherwise half as many
    slots as rows, and micro-batches at three widths.
    """
    if size not in SIZES:
        raise ConfigError(f"size={size!r}; valid: {', '.join(SIZES)}")
    if mean is not None and mean <= 1:
        raise ConfigError(f"mean={mean}: a text has more than one token on average")
    if mean is not None:
        slots = rows // chunks // 2 if slots is None else slots
        microbatches = 4 if microbatches is None else microbatches
        widths = (prompt + length // 4, prompt + length // 2) if widths is None else widths
    microbatches, widths = microbatches or 1, widths or ()
    model = Random(**SIZES[size], mean=mean, dtype=dtype, scan=scan, remat=remat,
                   cache_dtype=cache_dtype)  # fmt: skip
    critic = Random(**SIZES[size], dtype=dtype, scan=scan, remat=remat, lm_head=False,
                    value_head=True)  # fmt: skip
    train = {"optimizer": RATE, "epochs": epochs, "minibatches": minibatches,
             "microbatches": microbatches}  # fmt: skip
    draw = partial(random_prompts, length=prompt, vocab=model.vocab)
    return Config(
        name=f"bench_{size}",
        steps=steps,
        data={"prompts": partial(drawn, draw=draw, batch=rows)},
        learners={
            "policy": Learner(model, partial(ppo, clip=0.2), **train),
            "critic": Learner(critic, partial(value, clip=0.2), **train),
        },
        frozen={"reference": Frozen(From("policy"))},
        rollouts=Rollouts(
            partial(share, vocab=model.vocab),
            length=length,
            sampling=Sampling(stop=() if mean is None else (END,)),
            slots=slots,
            chunks=chunks,
            windows=windows,
            rescore=rescore,
            widths=tuple(widths),
            microbatches=microbatches,
            kl=KL(initial=0.05),
            advantage=partial(whitened, advantage=partial(gae, trace=0.95)),
            show=0,
        ),
    )


def random_prompts(key, rows: int, *, length: int, vocab: int) -> Prompts:
    """Prompts of equal length, any tokens but the first few."""
    tokens = jax.random.randint(key, (rows, length), FIRST, vocab, jnp.int32)
    row = jnp.arange(rows, dtype=jnp.int32)
    return Prompts(tokens, jnp.full_like(row, length), row, jnp.zeros_like(row))


def share(rollout, params, *, vocab: int):
    """The share of a response's tokens in a quarter of the vocabulary, paid at its end."""
    wanted = (rollout.tokens >= FIRST) & (rollout.tokens < FIRST + vocab // 4)
    counted = jnp.maximum(rollout.mask.sum(axis=1), 1)
    score = (wanted & rollout.mask).sum(axis=1) / counted
    return masked.at_last(score.astype(jnp.float32), rollout.mask)
