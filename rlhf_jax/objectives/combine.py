"""Several objectives on one learner."""

from __future__ import annotations

from collections.abc import Callable

from rlhf_jax.types import Scores, Sequences, Terms


def combine(scores: Scores, batch: Sequences, **parts: Callable) -> dict[str, Terms]:
    """Each part's terms under its name; the trainer divides each by its own Σ count and adds them.

    Use: a policy and a critic on one trunk, or a penalty beside a policy gradient.
    Memory: what the parts cost.

    Example:
        both = partial(combine, policy=ppo, value=partial(value, coefficient=0.1))
        Learner(model, both)
    """
    terms = {}
    for name, part in parts.items():
        found = part(scores, batch)
        if isinstance(found, Terms):
            terms[name] = found
        else:
            terms |= {f"{name}/{inner}": term for inner, term in found.items()}
    return terms
