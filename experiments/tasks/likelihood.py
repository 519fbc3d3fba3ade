"""Likelihood on texts that a task draws anew at every step: base models, and what is taught."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any

from rlhf_jax.config import Config, From, Learner
from rlhf_jax.data.drawn import drawn
from rlhf_jax.objectives import mle


def likelihood(
    name: str,
    model: Any,
    draw: Callable,
    *,
    steps: int,
    rows: int,
    optimizer: Callable,
    start: From | None = None,
    **options: Any,
) -> Config:
    """A run of `steps` updates on `draw(key, rows)`; fresh weights unless it starts from others."""
    learner = Learner(model, mle, batch="text", optimizer=optimizer, start=start)
    return Config(
        name=name,
        steps=steps,
        data={"text": partial(drawn, draw=draw, batch=rows)},
        learners={"policy": learner},
        **options,
    )
