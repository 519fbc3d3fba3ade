"""A model that cannot see control tokens."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import jax
import jax.numpy as jnp
from jaxtyping import Array, Int

from rlhf_jax.models.transformer import Output
from rlhf_jax.types import Params

GENERATES_NOT = (
    "an Untagged model reads whole texts and cannot generate: sample from the model itself, with "
    "prompts that hold no tags"
)


@dataclass(frozen=True)
class Untagged:
    """`model`, reading every text as if the tokens `tags` were not there.

    For a reference that never learned them: `Frozen(From("policy"), Untagged(MODEL, tags=(3, 4)))`.
    Otherwise it reads tags that mean nothing to it, and what they do to it is noise in every KL. It
    has the model's weights; what it says after a tag is what it says after the token before.
    """

    model: Any
    tags: tuple[int, ...]

    @property
    def vocab(self) -> int:
        """The model's."""
        return self.model.vocab

    @property
    def context(self) -> int:
        """The model's."""
        return self.model.context

    @property
    def lm_head(self) -> bool:
        """The model's."""
        return self.model.lm_head

    @property
    def value_head(self) -> bool:
        """The model's."""
        return self.model.value_head

    def init(self, key: Array) -> Params:
        """The model's fresh weights."""
        return self.model.init(key)

    def apply(
        self,
        params: Params,
        tokens: Int[Array, "b t"],
        *,
        positions: Int[Array, "b t"] | None = None,
        segments: Int[Array, "b t"] | None = None,
        cache: Any = None,
        **hooks: Any,
    ) -> Output:
        """Hidden states of whole texts, each tag's that of the token before it."""
        if cache is not None or positions is not None:
            raise ValueError(GENERATES_NOT)
        segments = jnp.ones_like(tokens) if segments is None else segments
        tag = (tokens[:, :, None] == jnp.array(self.tags)[None, None]).any(-1)
        index = jnp.broadcast_to(jnp.arange(tokens.shape[1]), tokens.shape)
        starts = jnp.concatenate(
            [jnp.ones_like(tag[:, :1]), segments[:, 1:] != segments[:, :-1]], axis=1
        )
        number = jnp.cumsum(~tag, axis=1) - ~tag  # among the tokens that it sees
        positions = number - jax.lax.cummax(jnp.where(starts, number, 0), axis=1)
        hidden = self.model.apply(
            params,
            jnp.where(tag, 0, tokens),
            positions=positions,
            segments=jnp.where(tag, 0, segments),  # as padding: nothing attends to it
            **hooks,
        ).hidden
        seen = jax.lax.cummax(jnp.where(tag, 0, index), axis=1)
        return Output(jnp.take_along_axis(hidden, seen[:, :, None], axis=1), None)

    def empty_cache(self, rows: int, length: int) -> Any:
        """Raises ValueError: it cannot generate."""
        raise ValueError(GENERATES_NOT)

    def logits(self, params: Params, hidden: Array) -> Array:
        """The model's."""
        return self.model.logits(params, hidden)

    def value(self, params: Params, hidden: Array) -> Array:
        """The model's."""
        return self.model.value(params, hidden)
