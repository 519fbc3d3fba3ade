"""Numbers that others published, to spread into a config: `partial(ppo, **ZIEGLER_2019.ppo)`.

Each was read in the source that it names. What a source leaves open is not here.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from types import MappingProxyType
from typing import Any

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
