"""How an estimator spends its gradient where one token matters, on fresh samples of the policy."""

from __future__ import annotations

from functools import partial

import jax
import jax.numpy as jnp
import numpy as np

from rlhf_jax import measure
from rlhf_jax.data.drawn import one_prompt
from rlhf_jax.rollout import generate
from rlhf_jax.sampling import Sampling
from rlhf_jax.score import score
from rlhf_jax.study import Trained
from rlhf_jax.types import Rollout
from tasks.local import Local, law, values

BATCHES = 8  # of a training step's size, whose gradients are compared with the exact one
PREFIXES = 1024  # texts whose prefixes serve for expectations over the next token


def credit(
    trained: Trained, *, task: Local, samples: int, compare: tuple[int, ...] = ()
) -> dict[str, float | np.ndarray]:
    """What an arm's own estimator makes of `samples` fresh texts, in batches of a training step.

    With g_t = −A_t (onehot − π), the gradient of token t's term by its logits, `waste` is Σ E|g_t|²
    over tokens behind the one that decides ÷ over all tokens, `power` the terms by token; `reward`
    and `kl` are expectations over the next token at sampled prefixes. After the steps in `compare`,
    `cosine` is that of one step's gradient by all weights to the exact one, `oracle_cosine` the
    same for true advantages on the same texts.
    """
    spec, models = trained.config.rollouts, trained.config.models
    model, policy = models["policy"], trained.weights["policy"]
    rows = trained.config.data["prompts"].keywords["batch"] * spec.samples
    samples = max(1, samples // rows) * rows
    key = jax.random.fold_in(jax.random.key(trained.seed), trained.step)
    row = jnp.arange(samples)
    prompts = one_prompt(key, samples, tokens=(task.start,))
    prompts = prompts.replace(prompt_id=row // spec.samples, sample_id=row % spec.samples)
    rollout = _said(policy, prompts, key, model=model, length=task.length)
    value = jnp.zeros_like(rollout.logp)
    if spec.value is not None:
        value = _valued(trained.weights.get(spec.value, {}), rollout, model=models[spec.value])
    advantage = _advantages(spec, rollout, value, rows)
    logp = _next(policy, rollout.tokens, model=model)
    power = np.asarray(_power(logp, rollout.tokens, advantage), np.float64)
    probability, some = np.exp(np.asarray(logp, np.float64)), rollout.tokens[:PREFIXES]
    base = _next(trained.before["local_base"]["policy"], some, model=model)
    found = {
        "waste": power[task.place :].sum() / power.sum(),
        "power": power,
        "reward": probability[:, task.place - 1, : task.good].sum(axis=1).mean(),
        "kl": measure.row_kl(logp[:PREFIXES], base).sum(axis=1).mean(),
    }
    if trained.step in compare:
        tokens = np.asarray(rollout.tokens)
        state, action = _known(probability, tokens, task)
        true = jnp.asarray(_true_advantages(state, action, tokens))
        batches = [x.reshape(-1, rows, *x.shape[1:])[:BATCHES] for x in (rollout.tokens, advantage)]
        true = true.reshape(-1, rows, *true.shape[1:])[:BATCHES]
        exact = jnp.asarray(action, jnp.float32)
        own, best = _cosines(policy, some, exact, *batches, true, model=model)
        found |= {"cosine": float(own), "oracle_cosine": float(best)}
    return found


@partial(jax.jit, static_argnames=("model", "length"))
def _said(params, prompts, key, *, model, length: int) -> Rollout:
    return generate(params, prompts, key, model=model, length=length, sampling=Sampling())


@partial(jax.jit, static_argnames="model")
def _valued(params, rollout, *, model):
    return score({"self": params}, rollout, models={"self": model}).value


def _advantages(spec, rollout, value, rows):
    """As a training step computes them: a batch of `rows` rows at a time; [n, t − 1]."""

    def one(reward, value, mask, prompt_id):
        return spec.advantage(reward=reward, value=value, mask=mask, prompt_id=prompt_id)[0]

    batches = (spec.reward(rollout, {}), value, rollout.mask, rollout.prompt_id)
    batches = [x.reshape(-1, rows, *x.shape[1:]) for x in batches]
    return jax.jit(jax.vmap(one))(*batches).reshape(rollout.mask.shape)[:, 1:]


def _next(params, tokens, *, model):
    """Log-probabilities of what may be said at each place, [n, t − 1, v]."""
    return measure.next_logp(params, tokens, model=model)[:, :-1]


@jax.jit
def _power(logp, tokens, advantage):
    """E|g_t|² = E A² |onehot − π|² by token, |onehot − π|² = 1 − 2 π(a) + Σ π²."""
    p = jnp.exp(logp)
    chosen = jnp.take_along_axis(p, tokens[:, 1:, None], axis=-1)[..., 0]
    return (advantage**2 * (1 - 2 * chosen + (p**2).sum(-1))).mean(axis=0)


def _known(probability, tokens, task: Local) -> tuple[np.ndarray, np.ndarray]:
    """Of the policy itself, up to the token that decides: V [place, v + 1] and Q [place, v].

    By dynamic programming over the last token, with the policy's mean over prefixes that end in it:
    exact for a policy of first order, and a text's further past hardly matters there.
    """
    steps = np.broadcast_to(law(task.vocab), (task.place, task.vocab + 1, task.vocab)).copy()
    for t in range(task.place):
        count = np.bincount(tokens[:, t], minlength=task.vocab + 1)
        total = np.zeros_like(steps[t])
        np.add.at(total, tokens[:, t], probability[:, t])
        steps[t][count > 0] = total[count > 0] / count[count > 0, None]
    state = values(steps, task)
    paid = 1.0 * (np.arange(task.vocab) < task.good)
    return state, np.stack([*state[1:, : task.vocab], paid])


def _true_advantages(state, action, tokens):
    """Q(s_t, a_t) − V(s_t), [n, t − 1]; exactly 0 behind the token that decides."""
    place = np.arange(len(action))[None]
    found = np.zeros((len(tokens), tokens.shape[1] - 1), np.float32)
    before, chosen = tokens[:, : len(action)], tokens[:, 1 : len(action) + 1]
    found[:, : len(action)] = action[place, chosen] - state[place, before]
    return found


@partial(jax.jit, static_argnames="model")
def _cosines(params, prefixes, action_values, tokens, *advantages, model):
    """Mean cosine of single batches' gradients to the exact one, over all weights; for each kind.

    The exact one is Σ_t Σ_a ∇π(a | s_t) Q(s_t, a) at sampled prefixes (Sutton et al. 2000).
    """

    def exact(params):
        logp = _next(params, prefixes, model=model)[:, : len(action_values)]
        return (jnp.exp(logp) * action_values[None]).sum(axis=(1, 2)).mean()

    def sampled(params, tokens, advantage):
        logp = _next(params, tokens, model=model)
        chosen = jnp.take_along_axis(logp, tokens[:, 1:, None], axis=-1)[..., 0]
        return (advantage * chosen).sum(axis=1).mean()

    def flat(tree):
        return jnp.concatenate([x.ravel() for x in jax.tree.leaves(tree)])

    truth = flat(jax.grad(exact)(params))

    def one(batch):
        found = flat(jax.grad(sampled)(params, *batch))
        return found @ truth / (jnp.linalg.norm(found) * jnp.linalg.norm(truth))

    kinds = (jnp.tile(tokens, (len(advantages), 1, 1)), jnp.concatenate(advantages))
    return jax.lax.map(one, kinds).reshape(len(advantages), -1).mean(axis=1)
