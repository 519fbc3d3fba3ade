"""A linear read-out of a layer, whose gradient never reaches the model that it reads."""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass

import jax

from rlhf_jax.models.transformer import Output, Transformer
from rlhf_jax.types import Params


@dataclass(frozen=True)
class Probe(Transformer):
    """The first `layers` layers of another model, read only, and a value head that learns.

    The head sees the residual stream after layer `layers`, behind the source's final norm, and its
    `scores.reward` is a logit per token: with `token_reward_model` logistic regression (Alain &
    Bengio 2016), with `value` least squares. Of what a token is told, it reads the position of that
    token. The trunk has gradient 0: start it from the model to read (`Learner.start`), deeper than
    it as it may be, and leave weight decay at 0, which moves weights without any gradient.

    With `lm_head=True, tied=False` a head over the vocabulary learns, as in a tuned lens.
    """

    lm_head: bool = False
    value_head: bool = True

    def __post_init__(self):
        super().__post_init__()
        if self.lm_head and self.tied:
            raise ValueError(
                "a probe's head may not be the embedding, which is part of the model it reads: "
                "set tied=False, or lm_head=False"
            )

    @classmethod
    def of(cls, model: Transformer, *, layers: int, **changes) -> Probe:
        """A probe of `model` after `layers` of its layers, with the model's kernel and tap.

        Raises:
            ValueError: if the model has fewer.
        """
        if layers > model.layers:
            raise ValueError(f"layers={layers}: the model to probe has {model.layers}")
        shape = {f.name: getattr(model, f.name) for f in dataclasses.fields(Transformer)}
        return cls(**shape | {"layers": layers, "lm_head": False, "value_head": True} | changes)

    def apply(self, *args, **kwargs) -> Output:
        """Hidden states, without gradient."""
        found = super().apply(*args, **kwargs)
        return found._replace(hidden=jax.lax.stop_gradient(found.hidden))

    def part_of(self, source: Params) -> Params:
        """The weights of a deeper model without the layers behind the probe."""
        if "layers" in source:  # scanned: one tree with a leading axis
            return source | {"layers": jax.tree.map(lambda x: x[: self.layers], source["layers"])}
        behind = [name for name in source if name.startswith("layers_")]
        behind = [name for name in behind if int(name.removeprefix("layers_")) >= self.layers]
        return {name: x for name, x in source.items() if name not in behind}
