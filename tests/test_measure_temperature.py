"""Heat: worked numbers on the chain of four tokens, by enumeration and by sampling."""

from dataclasses import dataclass
from functools import partial

import jax
import numpy as np
import pytest
import toys
from numpy.testing import assert_allclose
from toy_chain import BETA, BOS, CHAIN, OUTPUTS, REFERENCE, REWARD, START, reference_params

from rlhf_jax import exact, measure
from rlhf_jax.measure import Estimate
from rlhf_jax.sampling import Sampling
from rlhf_jax.types import Prompts

TILT = exact.tilted(START, REWARD, beta=BETA)
KINDS = {"texts": {}, "tokens": {"outputs": OUTPUTS}}


def close(found, expected, atol=1e-6):
    assert_allclose(found, expected, atol=atol, rtol=0)


def policy_params():
    """A chain that likes twos, sharper than the one it comes from."""
    return toys.markov(1.6 * np.log(CHAIN) + np.array([0, 0, 1, 0.0]), np.zeros(5))


def prompts(rows):
    start = np.full((rows, 1), BOS, np.int32)
    return Prompts(start, np.ones(rows, np.int32), np.arange(rows), np.zeros(rows, np.int32))


# ---- enumerated


def test_heat_that_restores_the_entropy_does_not_undo_the_shift():
    found = measure.shape_distortion(TILT, START)
    close([*found], [1.444242, 0.732895])
    hot = measure.heated(TILT, found.temperature)
    close([exact.entropy(hot), hot @ REWARD], [3.610435, 1.154554])


def test_token_and_sequence_temperature_differ_by_a_known_kl():
    by_token, by_text = (measure.heated(START, 0.5, **x) for x in (KINDS["tokens"], {}))
    close(exact.kl(by_token, by_text), 0.010494)


@pytest.mark.parametrize("kind", KINDS)
def test_a_base_that_is_only_sharper_is_not_distorted(kind):
    sharp = measure.heated(START, 0.6, **KINDS[kind])
    close([*measure.shape_distortion(sharp, START, **KINDS[kind])], [1 / 0.6, 0])
    other = measure.shape_distortion(
        sharp, START, **KINDS["texts" if kind == "tokens" else "tokens"]
    )
    assert other.kl > 1e-4


def test_the_token_temperature_of_an_entropy_has_that_entropy():
    found = measure.token_temperature_of_entropy(TILT, OUTPUTS, exact.entropy(START))
    close(exact.entropy(exact.token_temperature(TILT, OUTPUTS, found)), 3.610435)
    assert abs(found - exact.temperature_of_entropy(TILT, exact.entropy(START))) > 0.001
    with pytest.raises(ValueError, match=r"5\.000000 is out of reach: heat goes from .*4\.1588"):
        measure.token_temperature_of_entropy(TILT, OUTPUTS, 5.0)


@pytest.mark.parametrize("kind", KINDS)
def test_a_sweep_is_what_each_temperature_gives(kind):
    twos = (OUTPUTS.tokens == 2).sum(axis=1)
    found = measure.sweep_outputs(TILT, START, {"reward": REWARD, "twos": twos}, **KINDS[kind])
    assert found["temperature"].tolist() == [0.5, 0.7, 0.85, 1.0, 1.15, 1.3, 1.6, 2.0]
    assert (np.diff(found["entropy"]) > 0).all() and (np.diff(found["reward"]) < 0).all()
    at_one = [found[x][3] for x in ("entropy", "kl", "reward", "twos")]
    close(at_one, [3.178711, 1.060783, 1.359942, TILT @ twos])
    hot = measure.heated(TILT, 2.0, **KINDS[kind])
    close([found["kl"][-1], found["reward"][-1]], [exact.kl(hot, START), hot @ REWARD])


# ---- any function


def test_a_temperature_is_found_on_rising_and_falling_functions():
    close(measure.matching_temperature(np.log, np.log(3)), 3)
    close(measure.matching_temperature(lambda t: 1 / t, 0.25), 4)
    close(measure.matching_temperature(lambda t: Estimate(t**2, 0.1, 5), 0.49, high=1.0), 0.7)
    close(measure.matching_temperature(lambda t: t, 20.0), 20)  # the ends are in the range
    asked = []
    measure.matching_temperature(lambda t: asked.append(t) or t, 1.0)
    assert len(set(asked)) == len(asked)  # a value may cost a rollout


def test_what_heat_cannot_reach_is_named():
    with pytest.raises(ValueError, match=r"-1\.000000 is out of reach.*0\.05.* to 400\.0.*T=20"):
        measure.matching_temperature(lambda t: t**2, -1)
    with pytest.raises(ValueError, match="0 < low < high"):
        measure.matching_temperature(lambda t: t, 1, low=0.0)


def test_a_sweep_keeps_estimates_and_their_errors():
    found = measure.sweep(lambda t: {"a": 2 * t, "b": Estimate(t, t / 10, 9)}, [1, 2])
    assert {name: x.tolist() for name, x in found.items()} == {
        "temperature": [1, 2],
        "a": [2, 4],
        "b": [1, 2],
        "b_error": [0.1, 0.2],
    }


# ---- sampled


def test_a_sampled_distortion_is_the_enumerated_one_within_its_error():
    p = exact.probabilities(policy_params(), OUTPUTS, model=REFERENCE)
    expected = measure.shape_distortion(p, START, outputs=OUTPUTS)
    assert expected.temperature > 1.3 and expected.kl > 0.1
    found = measure.sampled_distortion(
        policy_params(),
        reference_params(),
        prompts(2000),
        jax.random.key(0),
        model=REFERENCE,
        length=3,
    )
    close(found.temperature, expected.temperature, 0.02)
    close(found.kl.value, expected.kl, 0.003)
    assert found.kl.error < 0.001 and found.kl.n == 2000


traces = []


@dataclass(frozen=True)
class Counted(toys.Table):
    """Notes when it is compiled."""

    def logits(self, params, hidden):
        traces.append(1)
        return super().logits(params, hidden)


def test_a_sampled_sweep_is_the_exact_one_and_one_program():
    at = partial(
        measure.sampled_at,
        policy_params(),
        prompts(1500),
        jax.random.key(1),
        model=Counted(5),
        length=3,
        reference=reference_params(),
        sampling=Sampling(banned=(3,)),
    )
    few = exact.enumerate_outputs(prompt=[BOS], vocab=4, length=3, alphabet=[0, 1, 2])
    base, p = (
        exact.probabilities(x, few, model=REFERENCE) for x in (reference_params(), policy_params())
    )
    _, first = at(0.8)
    known = len(traces)
    rollout, second = at(1.5)
    assert len(traces) == known and (np.asarray(rollout.tokens[:, 1:]) != 3).all()
    for temperature, found in ((0.8, first), (1.5, second)):
        hot = exact.token_temperature(p, few, temperature)
        for value, estimate in (
            (exact.entropy(hot), found.entropy),
            (exact.kl(hot, base), found.kl),
        ):
            assert abs(estimate.value - value) < 4 * estimate.error < 0.2
    with pytest.raises(ValueError, match="without top-k"):
        at(1.5, sampling=Sampling(top_k=1))


# ---- quality against diversity


def test_the_dominated_area_of_a_staircase_is_that_of_its_rectangles():
    points = [[1, 3], [2, 2], [3, 1], [1.5, 1.5], [1, 2]]
    close(measure.hypervolume(points, (0, 0)), 6)
    close(measure.hypervolume(points, (1, 0)), 2 + 1)
    assert measure.hypervolume(points, (5, 5)) == 0
    assert measure.frontier(points).tolist() == [[1, 3], [2, 2], [3, 1]]
    assert measure.frontier([[1, 1], [1, 1], [1, 0]]).tolist() == [[1, 1]]


def test_the_dominated_area_is_the_share_of_darts_below_a_point():
    rng = np.random.default_rng(0)
    points, darts = rng.uniform(-0.2, 1, (6, 2)), rng.uniform(size=(200_000, 2))
    below = (darts[:, None] < points[None]).all(axis=2).any(axis=1)
    close(measure.hypervolume(points, (0, 0)), below.mean(), 0.005)
    shuffled = points[rng.permutation(6)]
    close(measure.hypervolume(shuffled, (0, 0)), measure.hypervolume(points, (0, 0)), 1e-12)
    more = np.concatenate([points, [[0.99, 0.99]]])
    assert measure.hypervolume(more, (0, 0)) > measure.hypervolume(points, (0, 0))


def test_points_that_are_none_are_refused():
    with pytest.raises(ValueError, match=r"finite points \[m, 2\].*\(3,\)"):
        measure.hypervolume([1, 2, 3], (0, 0))
    with pytest.raises(ValueError, match="finite points"):
        measure.frontier([[np.nan, 1]])
