"""What XLA compiles: `collect` and `update`. Pure; weights and keys are arguments.

Division by a number of tokens happens in `_value` and nowhere else.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from functools import partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax
from jaxtyping import Array, Float

from rlhf_jax import masked, rewards
from rlhf_jax.config import Learner, Rollouts
from rlhf_jax.models import weights
from rlhf_jax.objectives.reference_kl import reference_kl_vocab
from rlhf_jax.parts import UNKNOWN, Lengths, at_width, by_length, map_over, parts, sum_over
from rlhf_jax.score import score
from rlhf_jax.sharding import split_rows
from rlhf_jax.types import (
    Control,
    Experience,
    LearnerState,
    Params,
    Rollout,
    Scores,
    Sequences,
    Terms,
)

Metrics = dict[str, Float[Array, ""]]


def update(
    state: LearnerState,
    frozen: Mapping[str, Params],
    batch: Sequences,
    key: Array,
    *,
    learner: Learner,
    models: Mapping[str, Any],
    lengths: Lengths = UNKNOWN,
) -> tuple[LearnerState, Metrics]:
    """All epochs and minibatches of one learner over one batch.

    `frozen` holds the weights of the models in `learner.others`. Epochs are shuffled along the
    leading axis, so that a group stays whole. Metrics are means over all that was seen.

    With `lengths.widths` a minibatch is cut into micro-batches of similar length, and each is
    computed at the narrowest of these widths that holds it. None of `lengths` changes the result.
    """
    if learner.transform is not None:
        with _fitting(learner.transform, batch):
            batch = learner.transform(batch, jax.random.fold_in(key, learner.epochs))
    rows = batch.tokens.shape[0]
    check_rows(rows, learner)
    bound = {"learner": learner, "models": models, "lengths": lengths}
    batch = _prepared(state.params, frozen, batch, cuts=learner.minibatches, **bound)

    def order(epoch):
        if learner.minibatches == 1:
            return jnp.arange(rows)
        return jax.random.permutation(jax.random.fold_in(key, epoch), rows)

    orders = jnp.stack([order(i) for i in range(learner.epochs)])
    orders = orders.reshape(-1, rows // learner.minibatches)

    def one(state, order):
        minibatch = split_rows(jax.tree.map(lambda x: x[order], batch))
        return optimizer_step(state, frozen, minibatch, **bound)

    state, (sums, plain) = jax.lax.scan(one, state, orders)
    sums, plain = jax.tree.map(lambda x: x.sum(0), sums), jax.tree.map(lambda x: x.mean(0), plain)
    metrics = {name: total / jnp.maximum(n, 1.0) for name, (total, n) in sums.items()}
    return state, metrics | plain | {"skipped": state.skipped.astype(jnp.float32)}


def optimizer_step(state, frozen, batch, *, learner, models, lengths=UNKNOWN):
    """One optimiser step on one minibatch: scan over micro-batches, one division, one update."""
    micro = _micro(batch, learner, lengths.widths)
    scored = partial(_scored, frozen=frozen, learner=learner, models=models, lengths=lengths)
    count = _counts(state.params, micro, scored, learner)

    def loss(params, part, width):
        return _value(params, part, count, partial(scored, width=width), learner)

    # The gradient is taken at one width: a derivative of a choice keeps what every width needs.
    grad = partial(jax.value_and_grad(loss, has_aux=True), state.params)
    (value, sums), grads = sum_over(partial(at_width, grad, widths=lengths.widths), micro)
    norm = optax.tree.norm(grads)
    state = apply_gradients(state, grads, jnp.isfinite(value) & jnp.isfinite(norm), learner)
    return state, (sums, {"loss": value, "grad_norm": norm})


def evaluate(
    params: Params,
    frozen: Mapping[str, Params],
    batch: Sequences,
    *,
    learner: Learner,
    models: Mapping[str, Any],
) -> Metrics:
    """A learner's loss and metrics on a batch it does not learn from, untransformed."""
    batch = _prepared(params, frozen, batch, learner=learner, models=models)
    micro = _micro(batch, learner)
    scored = partial(_scored, frozen=frozen, learner=learner, models=models)
    count = _counts(params, micro, scored, learner)
    value, sums = sum_over(lambda part: _value(params, part, count, scored, learner), micro)
    return {name: total / jnp.maximum(n, 1.0) for name, (total, n) in sums.items()} | {
        "loss": value
    }


def _micro(batch, learner, widths=()):
    """A minibatch as micro-batches; if widths can make use of it, of rows of similar length."""
    if widths and learner.microbatches > 1:
        order = by_length(batch, learner.microbatches)
        batch = jax.tree.map(lambda x: x[order], batch)
    return parts(batch, learner.microbatches)


def _prepared(params, frozen, batch, *, learner, models, cuts=1, lengths=UNKNOWN):
    """The batch with what `learner.prepare` adds: statistics over all of it, without gradient."""
    if learner.prepare is None:
        return batch
    given = {"learner": learner, "models": models, "lengths": lengths}
    scored = partial(_scored, params, frozen=frozen, **given)
    scores = map_over(scored, batch, cuts * learner.microbatches, lengths.widths)
    with _fitting(learner.prepare, batch):
        return jax.lax.stop_gradient(learner.prepare(jax.lax.stop_gradient(scores), batch))


class Misfit(ValueError):
    """A learner's functions do not fit its batch, its model or each other; the message says how."""


@contextmanager
def _fitting(fn: Callable, batch: Sequences) -> Iterator[None]:
    """What a function asks for in vain becomes a `Misfit`; errors of its own stay what they are."""
    try:
        yield
    except AttributeError as error:
        if not isinstance(error.obj, type(batch)):
            raise
        raise Misfit(
            f"{_name(fn)} reads {error.name!r}, which a batch of "
            f"{type(batch).__name__} has not; give the learner one that has: rollouts make "
            "Experience, streams.text Labeled, streams.pairs Pairs, Derived(selection.with_score) "
            "makes Labeled of Experience"
        ) from error
    except ValueError as error:
        frame = error.__traceback__
        while frame.tb_next is not None:
            frame = frame.tb_next
        if not frame.tb_frame.f_globals.get("__name__", "").startswith("rlhf_jax."):
            raise
        raise Misfit(str(error)) from error


def _name(fn: Callable) -> str:
    fn = getattr(fn, "func", fn)  # of a partial
    return getattr(fn, "__name__", str(fn))


def _terms(scores, part, learner) -> dict[str, Terms]:
    with _fitting(learner.objective, part):
        found = learner.objective(scores, part)
    return terms_of(found, part, learner.objective)


def terms_of(found: Any, batch: Sequences, objective: Callable) -> dict[str, Terms]:
    """What an objective returned for this batch, always as a dict.

    Raises:
        Misfit: if it is something else, or if something in it would be broadcast: a mean as a loss
            would count padding, and nobody would see it.
    """
    name, shape = _name(objective), batch.tokens.shape
    terms = {"": found} if isinstance(found, Terms) else found
    if not isinstance(terms, Mapping) or not all(isinstance(x, Terms) for x in terms.values()):
        raise Misfit(f"{name} returns {type(found).__name__}; valid: Terms, or a dict of Terms")
    for label, term in terms.items():
        parts = {"loss": term.loss, "weight": term.weight, "count": term.count}
        parts |= {f"metric {key!r}": x for key, x in term.metrics.items()}
        shapes = {key: jnp.shape(x) for key, x in parts.items() if x is not None}
        loss, of = shapes["loss"], f" in {label!r}" if label else ""
        if jnp.shape(term.scale):
            raise Misfit(f"{name} returns a scale of shape {term.scale.shape}{of}; valid: a number")
        if set(shapes.values()) == {loss} and loss and loss == shape[: len(loss)]:
            continue
        said = ", ".join(f"{key} {x}" for key, x in shapes.items())
        valid = " or ".join(str(shape[:i]) for i in range(len(shape), 0, -1))
        raise Misfit(
            f"{name} returns shapes that do not fit{of}: {said}. All must be one of {valid}: "
            "what is summed over rows, or averaged, is so by the trainer"
        )
    return terms


def _scored(params, part, *, frozen, learner, models, width=None, lengths=UNKNOWN):
    models = {"self": learner.model, **{name: models[name] for name in learner.scores}}
    own = params if learner.base is None else weights.merged(frozen[learner.base], params)
    trees = {"self": own, **{name: frozen[name] for name in learner.scores}}
    cut = {"width": width, "most": lengths.most, "pieces": lengths.pieces}
    with _fitting(learner.vocab or learner.objective, part):
        return score(trees, part, models=models, vocab=learner.vocab, chunk=learner.chunk, **cut)


def _counts(params, micro, scored, learner) -> dict[str, Array]:
    """Σ count over the minibatch before any forward pass.

    Counts may not depend on scores, so zeros stand in for them, and XLA drops what is not counted.
    """

    def of_part(part):
        shapes = jax.eval_shape(lambda: scored(params, part))
        zeros = jax.tree.map(lambda x: jnp.zeros(x.shape, x.dtype), shapes)
        terms = _terms(zeros, part, learner)
        return {
            name: (term.weight if term.count is None else term.count).astype(jnp.float32).sum()
            for name, term in terms.items()
        }

    return sum_over(of_part, micro)


def _value(params, part, count, scored, learner):
    """This part's share of the minibatch's loss, and its sums of metrics."""
    total, sums = jnp.float32(0.0), {}
    scores = scored(params, part)
    for name, term in _terms(scores, part, learner).items():
        weight = term.weight.astype(jnp.float32)
        used = weight != 0
        value = masked.sum(term.loss.astype(jnp.float32) * weight, used)
        total += term.scale * value / jnp.where(count[name] == 0, 1.0, count[name])
        for metric, x in term.metrics.items():
            label = f"{name}/{metric}" if name else metric
            sums[label] = (masked.sum(x, used), used.astype(jnp.float32).sum())
    return total, jax.lax.stop_gradient(sums)


def apply_gradients(state, grads, finite, learner) -> LearnerState:
    """Step the optimiser, or leave weights and moments as they are and count the skip."""
    updates, opt_state = learner.optimizer().update(grads, state.opt_state, state.params)
    new = state.replace(
        params=optax.apply_updates(state.params, updates),
        opt_state=opt_state,
        step=state.step + 1,
        skipped_row=jnp.zeros_like(state.skipped_row),
    )
    old = state.replace(skipped=state.skipped + 1, skipped_row=state.skipped_row + 1)
    return jax.tree.map(lambda a, b: jnp.where(finite, a, b), new, old)


def check_rows(rows: int, learner: Learner) -> None:
    """Raise Misfit unless a batch of `rows` rows splits evenly."""
    parts = learner.minibatches * learner.microbatches
    if rows % parts:
        raise Misfit(
            f"a batch of {rows} rows does not divide into {learner.minibatches} minibatches of "
            f"{learner.microbatches} micro-batches; use a multiple of {parts}, such as "
            f"{-(-rows // parts) * parts}"
        )


class Opinions(NamedTuple):
    """What models say about a rollout before anything is learned from it."""

    old: Scores  # the policy's; the sampler's log-probabilities alone, if it is not asked again
    reference: Float[Array, "b t"]  # log-probabilities; without a reference the policy's
    value: Float[Array, "b t"]  # 0 without a critic
    kl: Float[Array, "b t"]  # of policy and reference over the vocabulary, if that is asked for


def collect(
    rollout: Rollout,
    reward: Float[Array, "b t"],
    scores: Opinions,
    control: Control,
    *,
    spec: Rollouts,
) -> tuple[Experience, Control, Metrics]:
    """A rollout, its rewards and what `opinions` found become experience: KL, advantages.

    The control comes back with its KL coefficient adapted. Metrics are means over the samples, or
    over masked tokens; KL is the sum over a sample's tokens of logp − ref_logp, in nats.
    """
    mask = rollout.mask
    old, ref, value, exact = scores
    outcome = masked.sum(reward, mask, axis=-1)
    if spec.normalise:
        reward = rewards.normalise(reward, mask, control.reward_mean, control.reward_std)
    for shape in spec.shaping:
        reward = shape(reward, rollout)
    kl = masked.sum(old.logp - ref, mask, axis=-1)
    penalty = exact if spec.kl.exact else spec.kl.estimator(old.logp, ref)
    total = rewards.minus_kl(reward, penalty, mask, control.kl_coefficient)
    advantage, target = spec.advantage(
        reward=total, value=value, mask=mask, prompt_id=rollout.prompt_id
    )
    fields = {name: getattr(rollout, name) for name in Rollout.__dataclass_fields__}
    same = rollout.prompt_id[:, None] == rollout.prompt_id[None, :]
    length = mask.sum(-1, dtype=jnp.float32)
    experience = Experience(
        **fields,
        old_logp=old.logp,
        ref_logp=ref,
        value=value,
        reward=total,
        advantage=advantage,
        target=target,
        group_tokens=jnp.where(same, length[None, :], 0.0).sum(-1),
    )
    coefficient = control.kl_coefficient
    if spec.kl.adaptive:
        coefficient = rewards.adaptive_kl(
            coefficient, kl.mean(), kl.shape[0], target=spec.kl.target, horizon=spec.kl.horizon
        )
    metrics = {
        "rollout/reward": outcome.mean(),
        "rollout/reward_std": outcome.std(),
        "rollout/return": masked.sum(total, mask, axis=-1).mean(),
        "rollout/kl": kl.mean(),
        "rollout/kl_coefficient": control.kl_coefficient,
        "rollout/length": length.mean(),
        "rollout/ended": rollout.ended.mean(dtype=jnp.float32),
    }
    if old.entropy is not None:
        gap = jnp.abs(rollout.logp - old.logp)
        metrics["rollout/entropy"] = masked.mean(old.entropy, mask)
        metrics["rollout/mismatch"] = jnp.where(mask, gap, 0.0).max()
    control = control.replace(kl_coefficient=jnp.asarray(coefficient, jnp.float32))
    return jax.lax.stop_gradient((experience, control, metrics))


def rollout_lengths(spec: Rollouts) -> Lengths:
    """What is known of rollouts: an environment may write between the policy's tokens."""
    return Lengths(spec.widths, spec.length, 1 if spec.environment is None else None)


def opinions(
    rollout: Rollout, params: Mapping[str, Params], *, spec: Rollouts, models: Mapping[str, Any]
) -> Opinions:
    """The trainer's log-probabilities, the reference's, the values and, if asked for, the KL.

    Rows do not meet: a rollout may be scored in chunks.
    """
    zero = jnp.zeros(rollout.tokens.shape, jnp.float32)
    compare = spec.kl.exact and spec.reference is not None
    scorers = {spec.policy if spec.rescore else None, spec.reference, spec.value} - {None}

    known = rollout_lengths(spec)

    def some(part, width):
        found, cut = {}, {"width": width, "most": known.most, "pieces": known.pieces}
        for name in scorers:
            if compare and name == spec.policy:
                trees = {"self": params[name], "reference": params[spec.reference]}
                shapes = {"self": models[name], "reference": models[spec.reference]}
                found[name] = score(trees, part, models=shapes, vocab=reference_kl_vocab, **cut)
                found[spec.reference] = found[name]["reference"]
            elif name not in found:
                own = {"self": models[name]}
                found[name] = score({"self": params[name]}, part, models=own, **cut)
        return found

    found = map_over(some, rollout, spec.microbatches, known.widths)
    policy = found[spec.policy] if spec.policy in found else Scores(logp=rollout.logp)
    return Opinions(
        old=policy,
        reference=policy.logp if spec.reference is None else found[spec.reference].logp,
        value=found[spec.value].value if spec.value is not None else zero,
        kl=policy.extra["reference_kl"] if compare else zero,
    )
