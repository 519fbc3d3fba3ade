"""An adapter learns from every objective and on every mesh, and its base never changes."""

from dataclasses import replace
from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import toys
from numpy.testing import assert_allclose, assert_array_equal
from test_objectives import OBJECTIVES

from rlhf_jax import phases, sharding, step
from rlhf_jax.config import Config, From, Frozen, Learner
from rlhf_jax.models import weights
from rlhf_jax.models.transformer import Lora, Transformer
from rlhf_jax.objectives import combine, ppo, value
from rlhf_jax.optimizer import sgd
from rlhf_jax.testing import VOCABULARY, _annotated_batch, _quick, random_batch
from rlhf_jax.types import LearnerState

STEEP = 1e3  # learning rate: large, so that the difference of weights shows the gradient's digits
LORA = Lora(rank=2, alpha=4.0)
TINY = Transformer(
    vocab=VOCABULARY, width=8, layers=1, heads=2, kv_heads=1, mlp=8, value_head=True
)  # fmt: skip
LOW = replace(TINY, lora=LORA)
# In every run of the tests: by token and of values, over the vocabulary, of pairs by both heads.
QUICK = ("ppo + value", "reference_kl", "dpo", "reward_model")


def lively(model, seed=0):
    """An adapter both of whose factors say something, so that both learn."""
    return weights.trained(toys.weights(model, seed), "lora_")


@pytest.mark.parametrize(
    "name", [pytest.param(x, marks=() if x in QUICK else pytest.mark.slow) for x in OBJECTIVES]
)
def test_an_adapter_learns_from_its_objective_and_nothing_else_changes(name):
    objective, given = OBJECTIVES[name]
    others = given.get("others", ("reference",))
    learner = Learner(
        LOW, objective, base="base", vocab=given.get("vocab"), scores=others, trains="lora_"
    )
    base = toys.weights(TINY)
    before = jax.device_get(base)
    own = lively(LOW)
    optimizer = learner.optimizer()
    state = LearnerState(own, optimizer.init(own), *(jnp.int32(0) for _ in range(3)))
    batch = jax.tree.map(
        jnp.asarray, random_batch(given.get("batch") or _annotated_batch(objective))
    )
    frozen = {"base": base, **dict.fromkeys(others, base)}
    models = dict.fromkeys(frozen, TINY)

    def one(state, frozen, batch):
        key = jax.random.key(0)
        return step.update(state, frozen, batch, key, learner=learner, models=models)

    run = jax.jit(one, compiler_options=_quick())
    new, metrics = run(state, frozen, batch)
    assert int(new.step) == 1 and int(new.skipped) == 0 and np.isfinite(metrics["loss"])
    names = set(weights.flat(own))
    assert names == set(weights.flat(new.params)) and all("lora_" in name for name in names)
    for path, x in weights.flat(new.params).items():
        assert np.isfinite(x).all() and (np.asarray(x) != weights.flat(own)[path]).any(), path
    size = sum(x.size for x in jax.tree.leaves(own))
    moments = sum(x.size for x in jax.tree.leaves(new.opt_state) if x.ndim)
    assert moments == 2 * size
    jax.tree.map(assert_array_equal, jax.device_get(base), before)


@pytest.fixture(scope="module")
def moved():
    """`mesh -> what one update moves an adapter by`, by its paths."""
    model = Transformer(
        vocab=16, width=16, layers=2, heads=4, kv_heads=2, mlp=16, value_head=True, scan=True
    )  # fmt: skip
    low = replace(model, lora=LORA)
    learner = Learner(
        low, partial(combine, policy=ppo, value=value), base="reference", trains="lora_",
        optimizer=partial(sgd, learning_rate=STEEP), microbatches=2,
    )  # fmt: skip
    config = Config(
        "mesh", steps=1, learners={"policy": learner}, data={},
        frozen={"reference": Frozen(From("policy"), model)},
    )  # fmt: skip
    own, base = jax.device_get((lively(low), toys.weights(model)))
    batch = toys.experience(16)
    batch = batch.replace(tokens=batch.tokens % 16)

    def run(shape):
        mesh = sharding.make_mesh(shape, jax.devices()[: int(np.prod(shape))])
        with jax.set_mesh(mesh):
            built = phases.build(config, mesh)
            zeros = [np.zeros((), np.int32) for _ in range(3)]  # donated: no two may be one
            state = LearnerState(own, learner.optimizer().init(own), *zeros)
            state = jax.device_put(state, built.shardings.learners["policy"], may_alias=False)
            frozen = {"reference": jax.device_put(base, sharding.shardings(base, mesh))}
            key = jax.random.key(0)
            new, metrics = built.update["policy"](state, frozen, built.place(batch), key)
            jax.tree.map(assert_array_equal, jax.device_get(frozen["reference"]), base)
            params, said = jax.device_get((new.params, metrics["loss"]))
            moves = jax.tree.map(lambda x, y: (np.asarray(x, np.float64) - y) / STEEP, params, own)
            return weights.flat(moves), float(said)

    return run


def test_an_adapter_moves_alike_on_every_mesh_and_its_base_does_not(moved):
    expected, loss = moved((1, 1, 1, 1))
    assert all(np.abs(x).max() > 1e-4 for x in expected.values())
    for shape in ((8, 1, 1, 1), (2, 2, 2, 1)):
        found, said = moved(shape)
        assert_allclose(said, loss, rtol=1e-5)
        for name, x in expected.items():
            assert_allclose(found[name], x, atol=1e-5 * np.abs(x).max(), err_msg=f"{shape} {name}")
