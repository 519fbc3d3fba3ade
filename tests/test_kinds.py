"""The update of an objective of every kind: eight devices find the gradient of one."""

from dataclasses import replace
from functools import partial

import jax
import numpy as np
import pytest
import toys
from numpy.testing import assert_allclose
from test_objectives import OBJECTIVES

from rlhf_jax import phases, sharding
from rlhf_jax.config import Config, From, Frozen, Learner
from rlhf_jax.optimizer import sgd
from rlhf_jax.testing import _annotated_batch, random_batch
from rlhf_jax.types import LearnerState

STEEP = 1e3  # learning rate: the difference of weights shows the gradient's digits
KINDS = (
    "ppo of sequences", "ppo over_sequences", "ppo over_prompts", "dpo", "kto", "orpo", "cringe",
    "reference_kl", "distill, beta 0.3", "horizon_one", "energy", "discriminator of texts",
    "reward_model of segments", "quark", "value",
)  # fmt: skip


def gradient(name, model, shape):
    """Of one optimiser step on 24 rows, in two micro-batches; and the metrics."""
    fn, given = OBJECTIVES[name]
    kind, others = given.get("batch") or _annotated_batch(fn), given.get("others", ("reference",))
    batch = [random_batch(kind, seed) for seed in range(4)]
    batch = jax.tree.map(lambda *x: np.concatenate(x), *batch)
    learner = Learner(
        model, fn, batch="text", vocab=given.get("vocab"), scores=others, microbatches=2, chunk=24,
        optimizer=partial(sgd, learning_rate=STEEP),
    )  # fmt: skip
    frozen = {other: Frozen(From("policy")) for other in others}
    config = Config("kinds", 1, {"policy": learner}, {"text": dict}, frozen=frozen)
    own, other = (jax.device_get(toys.weights(model, seed)) for seed in (0, 1))
    mesh = sharding.make_mesh(shape, jax.devices()[: int(np.prod(shape))])
    with jax.set_mesh(mesh):
        built = phases.build(config, mesh)
        places = built.shardings.learners["policy"]
        zeros = [np.zeros((), np.int32) for _ in range(3)]
        state = LearnerState(own, learner.optimizer().init(own), *zeros)
        state = jax.device_put(state, places, may_alias=False)
        models = {name: jax.device_put(other, places.params) for name in others}
        update = built.update["policy"]
        new, metrics = update(state, models, built.place(batch), jax.random.key(0))
        moved = jax.tree.map(
            lambda x, y: (np.asarray(x, np.float64) - np.asarray(y)) / STEEP,
            own,
            jax.device_get(new.params),
        )
        return moved, jax.device_get(metrics)


@pytest.mark.slow
@pytest.mark.parametrize("name", KINDS)
def test_eight_devices_find_the_gradient_of_one(name, model):
    model = replace(model, scan=True)
    expected, metrics = gradient(name, model, (1, 1, 1, 1))
    largest = max(np.abs(x).max() for x in jax.tree.leaves(expected))
    assert largest > 1e-5
    for shape in ((2, 2, 2, 1), (1, 2, 2, 2)):
        found, own = gradient(name, model, shape)
        same = partial(assert_allclose, rtol=1e-4, atol=1e-5 * largest)
        jax.tree.map(same, found, expected)
        for metric, x in metrics.items():
            assert_allclose(own[metric], x, rtol=1e-4, atol=1e-5, err_msg=metric)
