"""PPO at the sizes of pods: Llama's shapes by numbers, four models, to be planned before queueing.

    rlhf-jax plan experiments/models/pod.py --set size=8B --topology v5e:16x16
    rlhf-jax plan experiments/models/pod.py --set size=70B --topology v5p:4x4x8
    rlhf-jax train experiments/models/pod.py --set size=tiny --set rows=16 --set length=64 --out DIR

Policy and critic are trained in full, float32 with bfloat16 computation; reference and reward model
are frozen, in bfloat16. Without `path` weights are random, prompts are random tokens and nothing
is to be learned: what it costs does not hang on what they are. `path` is a directory of Hugging
Face whose shapes are those of `size`, `reward` the run or directory of a reward model.
Shapes: Llama 3 (Dubey et al. 2024, table 3) and 3.2.
"""

from __future__ import annotations

from dataclasses import replace
from functools import partial

import jax
import jax.numpy as jnp

from rlhf_jax.advantages import gae, whitened
from rlhf_jax.config import Config, ConfigError, From, Frozen, Learner, Rollouts
from rlhf_jax.data.drawn import drawn
from rlhf_jax.models.transformer import Transformer
from rlhf_jax.objectives import ppo, value
from rlhf_jax.optimizer import adam
from rlhf_jax.rewards import KL, from_model
from rlhf_jax.sampling import Sampling
from rlhf_jax.types import Prompts

LLAMA = {"vocab": 128256, "kv_heads": 8, "rope_theta": 500_000.0, "tied": False, "context": 8192}
SIZES = {
    "tiny": dict(vocab=512, width=64, layers=2, heads=8, kv_heads=8, mlp=128, tied=False),
    "1B": {**LLAMA, "width": 2048, "layers": 16, "heads": 32, "mlp": 8192, "tied": True},
    "8B": {**LLAMA, "width": 4096, "layers": 32, "heads": 32, "mlp": 14336},
    "70B": {**LLAMA, "width": 8192, "layers": 80, "heads": 64, "mlp": 28672},
}
TENSOR = {"8B": 4, "70B": 4}  # decoding reads all weights: a device holds a quarter of them


def config(
    size: str = "8B",
    rows: int = 512,
    prompt: int = 512,
    length: int = 512,
    minibatches: int = 2,
    microbatches: int = 1,
    remat: str = "full",
    dtype: str = "bfloat16",  # float32 is faster on a CPU
    cache_dtype: str | None = None,
    path: str | None = None,
    reward: str | None = None,
) -> Config:
    """Policy, critic, reference and reward model of one shape."""
    if size not in SIZES:
        raise ConfigError(f"size={size!r}; valid: {', '.join(SIZES)}")
    policy = Transformer(**SIZES[size], dtype=dtype, scan=True, remat=remat,
                         cache_dtype=cache_dtype)  # fmt: skip
    critic = replace(policy, lm_head=False, value_head=True)
    start = From(path=path) if path is not None else None
    train = {"optimizer": partial(adam, learning_rate=1e-6), "minibatches": minibatches,
             "microbatches": microbatches, "start": start}  # fmt: skip
    still = partial(replace, param_dtype=dtype)
    return Config(
        name=f"pod_{size}",
        steps=100,
        data={"prompts": partial(drawn, draw=partial(asked, length=prompt, vocab=policy.vocab),
                                 batch=rows)},
        learners={
            "policy": Learner(policy, partial(ppo, clip=0.2), **train),
            "critic": Learner(critic, partial(value, clip=0.2), **train),
        },
        frozen={
            "reference": Frozen(From("policy"), still(policy)),
            "reward": Frozen(From("critic", path=reward), still(critic)),
        },
        rollouts=Rollouts(
            partial(from_model, model=still(critic), learner="reward"),
            length=length,
            sampling=Sampling(),
            microbatches=microbatches,
            kl=KL(initial=0.05),
            advantage=partial(whitened, advantage=partial(gae, trace=0.95)),
            show=0,
        ),
        mesh=(1, -1, TENSOR.get(size, 1), 1),
    )  # fmt: skip


def asked(key: jax.Array, rows: int, *, length: int, vocab: int) -> Prompts:
    """Prompts of any tokens."""
    tokens = jax.random.randint(key, (rows, length), 0, vocab, jnp.int32)
    row = jnp.arange(rows, dtype=jnp.int32)
    return Prompts(tokens, jnp.full_like(row, length), row, jnp.zeros_like(row))
