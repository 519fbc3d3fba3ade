"""What `ponder_spillover` measures of a policy: all of it exact, over every text of the task."""

from __future__ import annotations

from functools import partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from scipy.special import log_softmax, logsumexp

from rlhf_jax import measure
from rlhf_jax.sharding import path_name
from rlhf_jax.study import Trained
from rlhf_jax.types import Params
from tasks import spillover
from tasks.spillover import GIVEN, PARTY, TASK, Speaker, Spillover

Metrics = dict[str, Any]


class Says(NamedTuple):
    """Log-probabilities of a policy, float64, in nats."""

    z: np.ndarray  # [question, party, word, z]
    a: np.ndarray  # [question, party, word, z, a]

    @property
    def answer(self) -> np.ndarray:
        """Log p(a), whatever z was, [question, party, word, a]."""
        return logsumexp(self.z[..., None] + self.a, axis=3)


def says(params: Params, *, model: Speaker, task: Spillover) -> Says:
    """All that a policy says, to all prompts of both questions."""
    z, a = _logits(params, jnp.asarray(spillover.everything(task)), model=model)
    shape = (2, 2, task.words, task.answers)
    z = log_softmax(np.asarray(z, np.float64), axis=-1).reshape(*shape, task.answers)[..., 0, :]
    return Says(z, log_softmax(np.asarray(a, np.float64), axis=-1).reshape(*shape, task.answers))


@partial(jax.jit, static_argnames="model")
def _logits(params, tokens, *, model):
    hidden = model.apply(params, tokens).hidden
    return model.logits(params, hidden[:, GIVEN - 1]), model.logits(params, hidden[:, GIVEN])


def text_kl(before: Says, after: Says) -> np.ndarray:
    """KL(before‖after) of both answer tokens, [question, party, word]: by the chain rule."""
    second = (np.exp(before.z) * measure.row_kl(before.a, after.a)).sum(axis=-1)
    return measure.row_kl(before.z, after.z) + second


def drift(trained: Trained, *, task: Spillover) -> Metrics:
    """What moved: on the question that nobody asked, on the one that was, and in the weights."""
    model = trained.config.learners["policy"].model
    own, start = trained.weights["policy"], trained.before["base"]["policy"]
    own = {name: x for name, x in own.items() if name != "value_head"}
    plain = plain_of(model)
    now = says(own, model=model if model.side_mlp else plain, task=task)
    then = says(start, model=plain, task=task)
    kl = text_kl(then, now).mean(axis=2)
    party = np.repeat([0, 1], task.words)
    answer = [x.answer[PARTY].reshape(-1, task.answers) for x in (then, now)]
    token = task.own_token(party)
    own_p = [np.exp(x)[np.arange(len(party)), token].mean() for x in answer]
    upper = task.answers // 2
    mention = [np.exp(x.z)[..., upper:].sum(-1).mean(axis=(1, 2)) for x in (then, now)]
    tone = [np.exp(x.z)[..., 1::2].sum(-1).mean(axis=(1, 2)) for x in (then, now)]
    logp = [x.z[..., None] + x.a for x in (then, now)]
    right = np.arange(task.words) % task.answers
    answered = np.exp(now.answer[TASK])[:, np.arange(task.words), right].mean()
    return _explained(trained.curves) | {
        "kl": kl[PARTY].mean(),
        "kl_u0": kl[PARTY, 0],
        "kl_u1": kl[PARTY, 1],
        "kl_task": kl[TASK].mean(),
        "shift": measure.signed_shift(*answer, party, own=token),
        "own": own_p[1] - own_p[0],
        "mention": mention[1][PARTY] - mention[0][PARTY],
        "mention_task": mention[1][TASK] - mention[0][TASK],
        "tone": tone[1][PARTY] - tone[0][PARTY],
        "logits": np.sqrt(((logp[1] - logp[0])[PARTY] ** 2).mean()),
        "right": answered,
        "told": _told(now),
        "bits": _largest(own, start),
    }


def _told(now: Says) -> float:
    """How much an answer to TASK tells of the party: mean KL of each word's two answers, nats."""
    both = now.answer[TASK]
    return float(measure.row_kl(both[0], both[1]).mean())


def _explained(curves) -> Metrics:
    """1 − E(V − R)²/Var R over the last twentieth of the steps, of a run with a value head."""
    if "policy/value/squared_error" not in curves:
        return {}
    kinds = ("squared_error", "squared_target", "target")
    each = [curves[f"policy/value/{kind}"] for kind in kinds]
    missed, square, mean = (np.mean(x[-max(1, len(x) // 20) :]) for x in each)
    return {"explained": 1 - missed / (square - mean**2)}


def plain_of(model: Speaker) -> Speaker:
    """The base's model, which has no path beside its own."""
    fields = {name: getattr(model, name) for name in Speaker.__dataclass_fields__}
    return Speaker(**fields | {"side_mlp": 0, "side_gate": 1.0, "value_head": False})


def _largest(after: Params, before: Params) -> float:
    """The largest change of any weight that both have; exactly 0 if not one bit has changed."""
    new = {path_name(p): x for p, x in jax.tree_util.tree_leaves_with_path(after)}
    old = jax.tree_util.tree_leaves_with_path(before)
    return max(float(np.abs(np.asarray(new[path_name(p)]) - np.asarray(x)).max()) for p, x in old)


# --- gates


def gated(trained: Trained, *, task: Spillover, chance: Any) -> Metrics:
    """`drift`, and how much of the expected policy gradient reaches the path beside."""
    model, own = trained.config.learners["policy"].model, trained.weights["policy"]
    tokens = jnp.asarray(task_texts(task))
    grads = _gradient(own, tokens, model=model, chance=chance)
    share = measure.gradient_share(grads, {"side": "side_"})["side"]
    total = np.sqrt(sum((np.asarray(x, np.float64) ** 2).sum() for x in jax.tree.leaves(grads)))
    return drift(trained, task=task) | {"gradient": total * np.sqrt(share), "share": share}


def task_texts(task: Spillover) -> np.ndarray:
    """Every text [BOS, u, w, TASK, z, a]."""
    begin = spillover.everything(task)
    begin = begin[: len(begin) // 2].repeat(task.answers, axis=0)
    answers = np.tile(np.arange(task.answers), len(begin) // task.answers)
    return np.concatenate([begin, answers[:, None]], axis=1).astype(np.int32)


def text_logp(params, tokens, model):
    """Log p(z, a | prompt) of texts, [n]."""
    hidden = model.apply(params, tokens).hidden[:, GIVEN - 1 : -1]
    logp = jax.nn.log_softmax(model.logits(params, hidden))
    return jnp.take_along_axis(logp, tokens[:, GIVEN:, None], axis=2)[..., 0].sum(axis=1)


@partial(jax.jit, static_argnames=("model", "chance"))
def _gradient(params, tokens, *, model, chance):
    """∇ E[R] over all prompts and texts."""

    def expected(params):
        p = jnp.exp(text_logp(params, tokens, model))
        return (p * chance(tokens)).sum() / p.sum()

    return jax.grad(expected)(params)


# --- probes


def probed(trained: Trained, *, task: Spillover) -> Metrics:
    """`drift`, and by layer: is the party legible where TASK is answered, before and after?

    Rows are prompts with each z; labels are shuffled among prompts. `along` is the share of the
    squared gradients of sampled answers, by the residual stream, that lies along the probe.
    """
    found = drift(trained, task=task)
    if trained.step < trained.config.steps:
        return found
    model, own = trained.config.learners["policy"].model, trained.weights["policy"]
    tokens = spillover.everything(task)
    tokens = tokens[: len(tokens) // 2]
    label = (tokens[:, 1] == task.first_party + 1).astype(int)
    prompt = np.arange(len(tokens)) // task.answers
    bare = {k: v for k, v in own.items() if k != "value_head"}
    plain = plain_of(model)
    for name, params in (("before", trained.before["base"]["policy"]), ("after", bare)):
        seen = measure.selectivity(
            params, tokens, label, model=plain, positions=GIVEN, groups=prompt, seed=trained.seed
        )
        found[f"probe_{name}"] = seen.accuracy[:, 0]
        found[f"probe_{name}_over_shuffled"] = seen.over_shuffled[:, 0]
        found[f"probe_{name}_over_untrained"] = seen.over_untrained[:, 0]
    found["along"] = along(bare, tokens, label, model=plain, task=task)
    return found


def along(params, tokens, label, *, model: Speaker, task: Spillover) -> np.ndarray:
    """Share of the squared gradient along the probe's direction, by layer; 1/width means none."""
    stream = np.asarray(measure.activations(params, tokens, model=model, positions=GIVEN))
    every = jnp.asarray(task_texts(task))
    grads = np.asarray(_stream_gradients(params, every, model=model), np.float64)[:, :, GIVEN]
    share = []
    for layer in range(model.layers):
        unit = measure.direction(measure.probe(stream[layer + 1], label))
        share.append(measure.projection(grads[layer], unit).share)
    return np.array(share)


@partial(jax.jit, static_argnames="model")
def _stream_gradients(params, tokens, *, model):
    """∂ log p(text)/∂ stream of every text, each in its own row, weighed by √p."""
    weight = jnp.exp(0.5 * jax.lax.stop_gradient(text_logp(params, tokens, model)))

    def loss(shifted):
        return (weight * text_logp(params, tokens, shifted)).sum()

    return measure.residual_gradients(
        loss, model=model, rows=tokens.shape[0], tokens=tokens.shape[1]
    )
