"""What the experiments in this folder share: a model from a local directory of Hugging Face.

An experiment takes it as an argument, `--set model.path=DIR --set model.rank=0`. Learners are terms
of low rank over one frozen copy of the directory's weights, or with rank 0 whole trees.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from functools import partial
from typing import Any, NamedTuple

from rlhf_jax.config import ConfigError, From, Frozen, Learner, never
from rlhf_jax.data import tokenizers
from rlhf_jax.models import pretrained
from rlhf_jax.models.transformer import Lora, Transformer
from rlhf_jax.objectives import mle
from rlhf_jax.optimizer import adam
from rlhf_jax.sampling import Sampling


class Still(NamedTuple):
    """Where models that never learn stand in a `Config`."""

    learners: Mapping[str, Learner]
    frozen: Mapping[str, Frozen]


@dataclass(frozen=True)
class Local:
    """A directory of Hugging Face, and how its model is computed and trained."""

    path: str = ""
    rank: int = 16  # of adapters; 0: all weights are trained
    alpha: float = 32.0
    learning_rate: float | None = None  # None: 3e-4 for adapters, 1e-5 for all weights
    dtype: str = "float32"  # of activations; "bfloat16" on accelerators
    remat: str = "none"
    scan: bool = True  # one program for all layers: compiles in a fraction of the time

    def base(self) -> Transformer:
        """The model as it is, without adapter."""
        if not self.path:
            raise ConfigError("name a directory of Hugging Face: --set model.path=DIR")
        changes = {"dtype": self.dtype, "remat": self.remat, "scan": self.scan}
        return pretrained.model(self.path, **changes)

    def policy(self) -> Transformer:
        """The model that is trained."""
        base = self.base()
        return replace(base, lora=Lora(self.rank, self.alpha)) if self.rank else base

    def scalar(self) -> Transformer:
        """The same with one number per token in place of the next token: a critic, a reward."""
        return replace(self.policy(), lm_head=False, value_head=True)

    def whole(self) -> Frozen:
        """The directory's weights, never trained."""
        return Frozen(From(path=self.path), self.base())

    def shared(self, name: str) -> dict[str, Frozen]:
        """What adapters stand on, if there are any."""
        return {name: self.whole()} if self.rank else {}

    def learner(
        self,
        model: Transformer,
        objective: Callable,
        *,
        updates: int,
        base: str = "reference",
        start: From | None = None,
        **rest: Any,
    ) -> Learner:
        """One that starts as the directory, or from `start`; `base` names what adapters stand on.

        The rate rises over 5 % of `updates`, the run's optimiser steps, and falls to a tenth.
        """
        rate = self.learning_rate
        if rate is None:
            rate = 3e-4 if self.rank else 1e-5
        warmup = max(1, updates // 20)
        optimizer = partial(adam, learning_rate=rate, final=0.1, steps=updates, warmup=warmup)
        if self.rank:
            where = {"base": base, "start": start}
        else:
            where = {"start": start if start is not None else From(path=self.path)}
        return Learner(model, objective, optimizer=optimizer, **where, **rest)

    def still(self, models: Mapping[str, tuple[Transformer, From]], *, base: str) -> Still:
        """Models of earlier stages as they are: frozen, or adapters that no step changes."""
        if not self.rank:
            return Still(
                {}, {name: Frozen(start, model) for name, (model, start) in models.items()}
            )
        held = {
            name: self.learner(model, mle, updates=1, base=base, start=start, when=never)
            for name, (model, start) in models.items()
        }
        return Still(held, {})

    def sampling(self) -> Sampling:
        """Temperature 1, ended by the tokens that end a text or a turn."""
        tokenizer = tokenizers.load(self.path)
        return Sampling(stop=tokenizer.stops, banned=tokenizer.never)
