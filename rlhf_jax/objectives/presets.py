"""What others published: numbers to spread, `partial(ppo, **ZIEGLER_2019.ppo)`, and variants.

Each was read in the source that it names. What a source leaves open is not here.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import partial
from types import MappingProxyType
from typing import Any

from rlhf_jax.advantages import group_relative, leave_one_out
from rlhf_jax.aggregate import over_length, over_prompts, over_sequence_means, over_sequences
from rlhf_jax.objectives.combine import combine
from rlhf_jax.objectives.ppo import ppo
from rlhf_jax.objectives.reinforce import reinforce
from rlhf_jax.objectives.sampled_kl import sampled_kl
from rlhf_jax.ratios import k3, sequence_log_ratio

Numbers = Mapping[str, Any]


@dataclass(frozen=True)
class Preset:
    """Keyword arguments by the function that takes them."""

    source: str
    ppo: Numbers  # objectives.ppo
    value: Numbers  # objectives.value
    gae: Numbers  # advantages.gae
    kl: Numbers  # rewards.KL
    epochs: int
    minibatches: int
    learning_rate: float  # of the policy
    critic_learning_rate: float  # the policy's where both share one trunk
    temperature: float
    rows: int | None = None  # samples per rollout


def _numbers(**numbers: Any) -> Numbers:
    return MappingProxyType(numbers)


ZIEGLER_2019 = Preset(
    source="Ziegler et al. 2019, github.com/openai/lm-human-preferences (sentiment) and its "
    "re-implementation github.com/vwxyzjn/lm-human-preference-details (64 rows per device; the "
    "learning rate falls linearly to 0, Adam's epsilon is 1e-5, rewards are divided by their std)",
    ppo=_numbers(clip=0.2),
    value=_numbers(clip=0.2, coefficient=0.1),
    gae=_numbers(discount=1.0, trace=0.95),
    kl=_numbers(initial=0.15, adaptive=True, target=6.0, horizon=10_000),
    epochs=4,
    minibatches=1,
    learning_rate=1e-5,
    critic_learning_rate=1e-5,
    temperature=0.7,
    rows=64,
)

TRL_PPO = Preset(
    source="github.com/huggingface/trl, PPOConfig (v2) and examples/scripts/ppo",
    ppo=_numbers(clip=0.2),
    value=_numbers(clip=0.2, coefficient=0.1),
    gae=_numbers(discount=1.0, trace=0.95),
    kl=_numbers(initial=0.05, adaptive=False),
    epochs=4,
    minibatches=1,
    learning_rate=3e-6,
    critic_learning_rate=3e-6,
    temperature=0.7,
)

VERL_PPO = Preset(
    source="github.com/volcengine/verl, trainer/config/ppo_trainer.yaml (KL off by default)",
    ppo=_numbers(clip=0.2, dual_clip=3.0),
    value=_numbers(clip=0.5, coefficient=1.0),
    gae=_numbers(discount=1.0, trace=1.0),
    kl=_numbers(initial=0.0, adaptive=False),
    epochs=1,
    minibatches=4,
    learning_rate=1e-6,
    critic_learning_rate=1e-5,
    temperature=1.0,
    rows=1024,
)


@dataclass(frozen=True)
class Variant:
    """A critic-free method: `Learner(objective=…)` and `Rollouts(advantage=…, value=None)`.

    Several samples per prompt; no KL in the reward (`KL(0.0, adaptive=False)`) except for RLOO.
    GRPO's KL is a loss, and still needs `Rollouts(reference=…)`.
    """

    source: str
    objective: Callable
    advantage: Callable


GRPO = Variant(
    source="Shao et al. 2024 (DeepSeekMath), eq. 3 and 4; the clip is TRL's default",
    objective=partial(
        combine,
        policy=partial(ppo, clip=0.2, aggregate=over_sequence_means),
        kl=partial(sampled_kl, estimator=k3, coefficient=0.04, aggregate=over_sequence_means),
    ),
    advantage=group_relative,
)

DR_GRPO = Variant(
    source="Liu et al. 2025 (Understanding R1-Zero-Like Training), §3.2: neither length nor std "
    "divides; set length to the rollouts' own",
    objective=partial(ppo, clip=0.2, aggregate=partial(over_length, length=1024)),
    advantage=partial(group_relative, normalise=False),
)

DAPO = Variant(
    source="Yu et al. 2025, eq. 8: asymmetric clip, mean over a prompt's tokens, no KL; its soft "
    "penalty on length is rewards.length_penalty, its filter of tied prompts selection.informative",
    objective=partial(ppo, clip=0.2, clip_high=0.28, aggregate=over_prompts),
    advantage=group_relative,
)

GSPO = Variant(
    source="Zheng et al. 2025, eq. 5 and 7, §5.1 (clip of 3e-4 below and 4e-4 above)",
    objective=partial(
        ppo,
        clip=3e-4,
        clip_high=4e-4,
        log_ratio=sequence_log_ratio,
        aggregate=over_sequence_means,
    ),
    advantage=group_relative,
)

RLOO = Variant(
    source="Ahmadian et al. 2024, eq. 8: leave-one-out baseline, KL in the reward, one update",
    objective=partial(reinforce, aggregate=over_sequences),
    advantage=leave_one_out,
)
