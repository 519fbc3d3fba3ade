"""Which way of training makes a policy seek a predictable future? All answers are known exactly.

The toy is `pst.py`. Closed forms for the data first; then small transformers, trained, against the
same forms built on the distribution that their own base has learned.
"""

from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pst
import pytest
from loop import probabilities, prompts_of, trained
from numpy.testing import assert_allclose

from rlhf_jax import advantages, exact, masked, objectives, rewards
from rlhf_jax.conditioning import condition
from rlhf_jax.config import Learner, Rollouts
from rlhf_jax.models.transformer import Transformer
from rlhf_jax.optimizer import adam
from rlhf_jax.score import score

BETA, TEMPERATURE, ROWS = 0.5, 0.8, 256

DATA = pst.exact()
REWARD = pst.reward_of(pst.OUTPUTS.tokens)
LOGP = np.log(DATA, out=np.full_like(DATA, -30.0), where=DATA > 0)  # impossible, and finite
GOOD = exact.conditioned(DATA, REWARD > 0)


@pytest.mark.parametrize(
    ("found", "share"),
    [
        (DATA, 0.4),
        (exact.tilted(DATA, REWARD, beta=1.0), 0.559014),
        (exact.tilted(DATA, REWARD, beta=BETA), 0.654771),
        (exact.tilted(DATA, REWARD, beta=0.25), 0.716535),
        (GOOD, 0.727273),
        (exact.horizon_optimum(DATA, REWARD, pst.OUTPUTS, beta=BETA, horizon=1), 0.4),
        (exact.sequence_temperature(DATA, TEMPERATURE), 0.706711),
        (exact.sequence_temperature(DATA, 0.5), 0.991288),
        (exact.token_temperature(DATA, pst.OUTPUTS, TEMPERATURE), 0.375937),
        (exact.token_temperature(DATA, pst.OUTPUTS, 0.5), 0.307692),
        (exact.best_of_n(DATA, LOGP, 2), 0.64),
        (exact.best_of_n(DATA, LOGP, 4), 0.8704),
        (exact.best_of_n(DATA, LOGP, 16), 0.999718),
    ],
)
def test_the_laboratory_knows_where_every_method_ends(found, share):
    assert_allclose(found.sum(), 1, atol=1e-9)
    assert_allclose(pst.share_of_b(found), share, atol=1e-6)


def test_the_closed_forms_are_those_of_arithmetic():
    """b e / (b e + a (1 − 1/K + e/K)), e = exp(1/β); b^(1/τ) against a^(1/τ) K^(m (1 − 1/τ))."""
    a, b, keys, length = pst.FIRST, 1 - pst.FIRST, pst.KEYS, pst.LENGTH
    e = np.exp(1 / BETA)
    tilt = b * e / (b * e + a * (1 - 1 / keys + e / keys))
    assert_allclose(pst.share_of_b(exact.tilted(DATA, REWARD, beta=BETA)), tilt, atol=1e-12)
    cold = 1 / TEMPERATURE
    one, other = b**cold, a**cold * keys ** (length * (1 - cold))
    found = pst.share_of_b(exact.sequence_temperature(DATA, TEMPERATURE))
    assert_allclose(found, one / (one + other), atol=1e-12)
    # Conditioning says more of B when asked for what is good, and all in all what the data say.
    assert_allclose((DATA * REWARD).sum(), 0.55, atol=1e-12)
    bad = exact.conditioned(DATA, REWARD == 0)
    whole = 0.55 * pst.share_of_b(GOOD) + 0.45 * pst.share_of_b(bad)
    assert_allclose(whole, 0.4, atol=1e-12)


def test_drawn_texts_are_those_of_the_toy():
    batch = jax.jit(partial(pst.draw, rows=20_000))(jax.random.key(0))
    tokens = np.asarray(batch.tokens)
    weights = pst.VOCAB ** np.arange(pst.LENGTH, -1, -1)
    count = np.bincount(tokens[:, 1:] @ weights, minlength=len(DATA))
    assert count[DATA == 0].sum() == 0
    assert_allclose(pst.share_of_b(count / 20_000), 0.4, atol=0.015)
    likely = DATA > 0
    spread = (count - 20_000 * DATA)[likely] ** 2 / (20_000 * DATA)[likely]
    assert abs(spread.sum() - 256) < 5 * np.sqrt(2 * 256)
    assert_allclose(np.asarray(batch.score).mean(), 0.55, atol=0.015)


# --- by training

MODEL = Transformer(vocab=pst.VOCAB, width=32, layers=2, heads=4, kv_heads=2, mlp=64)
CONSTANT = {"kl": rewards.KL(BETA, adaptive=False), "value": None}
ALL = partial(advantages.batch_mean, own=False)  # all prompts are the same start token


@pytest.fixture(scope="module")
def base():
    """Weights trained by likelihood on texts drawn afresh, and the probability of every text."""
    learner = Learner(
        MODEL,
        objectives.mle,
        batch="text",
        optimizer=partial(adam, learning_rate=5e-3, final=0.01, steps=1200),
    )
    texts = {"text": partial(pst.draw, rows=ROWS)}
    params, _ = trained({"base": learner}, steps=1200, key=jax.random.key(0), data=texts)
    return params["base"], exact.probabilities(params["base"], pst.OUTPUTS, model=MODEL)


def policy(base, *, reward, advantage=ALL, steps=300, **given):
    """P(B) of a policy that starts at the base, trained by REINFORCE."""
    learner = Learner(
        MODEL,
        objectives.reinforce,
        optimizer=partial(adam, learning_rate=2e-3, final=0.02, steps=steps),
    )
    spec = Rollouts(reward, length=1 + pst.LENGTH, advantage=advantage, **(CONSTANT | given))
    params, metrics = trained(
        {"policy": learner},
        steps=steps,
        key=jax.random.key(1),
        rollouts=spec,
        prompts=prompts_of(ROWS, bos=pst.BOS),
        frozen={"reference": base},
        frozen_models={"reference": MODEL},
        start={"policy": base},
    )
    assert np.asarray(metrics["rollout/mismatch"]).max() < 1e-3
    return float(probabilities(MODEL, params["policy"], [[pst.BOS, pst.B]])[0])


def at_the_end(rollout, params):
    """The reward of a text, on its last token."""
    return masked.at_last(pst.reward_of(rollout.tokens).astype(jnp.float32), rollout.mask)


def own_likelihood(rollout, params):
    """log p of every token, by the base."""
    return score({"self": params["reference"]}, rollout, models={"self": MODEL}).logp


@pytest.mark.slow
def test_likelihood_neither_seeks_nor_avoids_what_is_predictable(base):
    """TOST at ±.02 of the data's .4; at another temperature it says what arithmetic says."""
    params, p = base
    assert abs(pst.share_of_b(p) - 0.4) < 0.02
    assert exact.kl(DATA, p) < 0.01
    cold = exact.probabilities(params, pst.OUTPUTS, model=MODEL, temperature=0.5)
    assert abs(pst.share_of_b(cold) - 0.307692) < 0.02


@pytest.mark.slow
def test_reward_at_the_end_pays_for_itself_where_it_is_cheap(base):
    """KL-regularised RL shifts P(B) from .40 to .65 for a reward that says nothing of A and B."""
    params, p = base
    target = pst.share_of_b(exact.tilted(p, REWARD, beta=BETA))
    assert abs(target - 0.654771) < 0.02
    found = policy(params, reward=at_the_end)
    assert abs(found - target) < 0.02


@pytest.mark.slow
def test_with_a_horizon_of_one_token_the_choice_stays_that_of_the_base(base):
    params, p = base
    own = partial(advantages.credit_horizon, horizon=1)
    centred = partial(advantages.centred, advantage=own)
    found = policy(params, reward=at_the_end, advantage=centred)
    assert abs(found - pst.share_of_b(p)) < 0.02


@pytest.mark.slow
def test_maximum_entropy_on_its_own_likelihood_seeks_what_is_predictable(base):
    """Reward log p − τ log π, τ = .8: p^(1/τ)/Z over whole texts, .71 for B."""
    params, p = base
    target = pst.share_of_b(exact.sequence_temperature(p, TEMPERATURE))
    assert abs(target - 0.706711) < 0.02
    found = policy(
        params,
        reward=own_likelihood,
        shaping=(partial(rewards.max_entropy, temperature=TEMPERATURE),),
        kl=rewards.KL(0.0, adaptive=False),
    )
    assert abs(found - target) < 0.02


@pytest.mark.slow
def test_conditioning_shifts_what_is_asked_for_and_nothing_else():
    """P(B | good) = .727, more than RL at β = .5; without a tag .4, as in the data."""
    tagged = Transformer(vocab=pst.VOCAB + 2, width=32, layers=2, heads=4, kv_heads=2, mlp=64)
    learner = Learner(
        tagged,
        objectives.mle,
        batch="text",
        optimizer=partial(adam, learning_rate=5e-3, final=0.01, steps=1200),
        transform=partial(condition, edges=(0.5,), tags=(pst.BAD, pst.GOOD), drop=0.25),
    )
    texts = {"text": partial(pst.draw, rows=ROWS)}
    params, _ = trained({"policy": learner}, steps=1200, key=jax.random.key(0), data=texts)

    def share(*tag):
        prompt = [pst.BOS, *tag]
        text = [[*prompt, pst.B]]
        return float(probabilities(tagged, params["policy"], text, given=len(prompt))[0])

    assert abs(share(pst.GOOD) - 0.727273) < 0.02
    assert abs(share() - 0.4) < 0.02
    assert share(pst.BAD) < 0.02
