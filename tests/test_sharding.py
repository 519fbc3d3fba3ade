"""One program, any mesh: the same loss, gradients and samples, and no full weight on a device."""

import re
from dataclasses import replace
from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import toys
from jax.sharding import PartitionSpec as P
from numpy.testing import assert_allclose, assert_array_equal

from rlhf_jax import masked, objectives, phases, sharding
from rlhf_jax.config import Config, From, Frozen, Learner, Rollouts
from rlhf_jax.models.transformer import Transformer
from rlhf_jax.optimizer import adam, sgd
from rlhf_jax.rewards import KL
from rlhf_jax.sampling import Sampling
from rlhf_jax.types import Control, LearnerState, Pairs, Prompts

MESHES = {
    "one device": (1, 1, 1, 1),
    "data": (8, 1, 1, 1),
    "all": (2, 2, 2, 1),
    "sequence": (1, 2, 2, 2),
}
STEEP = 1e3  # learning rate: large, so that the difference of weights shows the gradient's digits


def every_kind(scores, batch):
    """Token, value and pair objectives on `[n, k, t]` experience, each with its own count."""

    def compare(scores, batch):
        both = Pairs(batch.tokens, batch.mask, batch.segments)
        return objectives.reward_model(scores, both, centre=0.1)

    parts = {"sft": objectives.mle, "policy": objectives.ppo, "value": objectives.value}
    return objectives.combine(scores, batch, **parts, pairs=compare)


@pytest.fixture(scope="module")
def config(model):
    learner = Learner(
        replace(model, scan=True),
        every_kind,
        optimizer=partial(sgd, learning_rate=STEEP),
        microbatches=2,
        chunk=64,
    )
    return Config(
        "mesh",
        steps=1,
        learners={"policy": learner},
        data={"prompts": partial(dict, batch=16)},
        frozen={"reference": Frozen(From("policy"))},
        rollouts=Rollouts(
            reward=lambda rollout, params: masked.at_last(jnp.ones(16), rollout.mask),
            length=8,
            value="policy",
            kl=KL(initial=0.1),
            microbatches=2,
        ),
    )


def groups():
    """Experience of 16 groups of two, [16, 2, 12]."""
    return jax.tree.map(lambda x: x.reshape(16, 2, *x.shape[1:]), toys.experience(32))


def prompts():
    length = np.arange(16, dtype=np.int32) % 4 + 1
    tokens = np.random.default_rng(0).integers(1, 32, (16, 4)).astype(np.int32)
    name = np.arange(16, dtype=np.int32)
    return Prompts(np.where(np.arange(4) < length[:, None], tokens, 0), length, name, 0 * name)


@pytest.fixture(scope="module")
def outcome(config, model, params):
    """`mesh name -> what one step does there`, computed once."""
    found = {}
    weights = jax.device_get(toys.stacked(params, model.layers))
    settings = Sampling(temperature=0.7, top_p=0.9, stop=(5, 9))

    def run(name):
        shape = MESHES[name]
        mesh = sharding.make_mesh(shape, jax.devices()[: int(np.prod(shape))])
        with jax.set_mesh(mesh), toys.standard_error() as written:
            built = phases.build(config, mesh)
            parts = built.shardings.learners["policy"]
            zeros = [np.zeros((), np.int32) for _ in range(3)]  # donated: no two may be one
            state = LearnerState(
                weights, config.learners["policy"].optimizer().init(weights), *zeros
            )
            state = jax.device_put(state, parts, may_alias=False)
            key = jax.random.key(0)
            own = built.written_with({"policy": state.params}, ["policy"])["policy"]
            rollout = built.generate(own, built.place(prompts()), key, settings)
            step0 = None
            if name == "all":
                names = {"policy": state.params, "reference": jax.tree.map(jnp.copy, state.params)}
                control = Control(*map(jnp.float32, (0.1, 0, 1)))
                reward = built.reward(rollout, names)
                said = built.score(rollout, names)
                step0 = jax.device_get(built.collect(rollout, reward, said, control))
            rollout = jax.device_get(rollout)
            batch = built.place(groups())
            new, metrics = built.update["policy"](state, {}, batch, key)
            assert jax.tree.map(lambda x: x.sharding, new) == parts
            grads = jax.tree.map(
                lambda x, y: (np.asarray(x, np.float64) - np.asarray(y)) / STEEP,
                weights,
                jax.device_get(new.params),
            )
            return rollout, grads, jax.device_get(metrics), step0, written()

    def get(name):
        if name not in found:
            found[name] = None  # tried: a failure is not compiled again for every test
            found[name] = run(name)
        assert found[name] is not None, f"the step on {name} failed before"
        return found[name]

    return get


@pytest.mark.parametrize("name", ["data", "all", "sequence"])
def test_every_mesh_gives_the_loss_and_gradients_of_one_device(outcome, name):
    """Token, value and pair objectives; both micro-batches."""
    _, expected, metrics, *_ = outcome("one device")
    _, grads, found, *_ = outcome(name)
    assert_allclose(found["loss"], metrics["loss"], rtol=1e-5)
    assert set(found) == set(metrics)
    for metric, x in metrics.items():
        assert_allclose(found[metric], x, rtol=2e-5, atol=1e-6, err_msg=metric)
    for (path, g), e in zip(
        jax.tree_util.tree_leaves_with_path(grads), jax.tree.leaves(expected), strict=True
    ):
        assert np.abs(e).max() > 1e-4, path
        assert_allclose(g, e, rtol=1e-5, atol=1e-5 * np.abs(e).max(), err_msg=str(path))


@pytest.mark.parametrize("name", ["data", "all", "sequence"])
def test_every_mesh_draws_the_same_tokens(outcome, name):
    expected, found = outcome("one device")[0], outcome(name)[0]
    assert_array_equal(found.tokens, expected.tokens)
    assert_array_equal(found.mask, expected.mask)
    assert_allclose(found.logp, expected.logp, atol=1e-5)
    assert 16 < expected.mask.sum() < 16 * 8  # some rows ended early


def test_on_a_mesh_too_the_kl_is_0_before_the_first_update(outcome):
    experience, _, metrics = outcome("all")[3]
    assert np.abs(experience.old_logp - experience.ref_logp).max() < 1e-5
    assert abs(metrics["rollout/kl"]) < 1e-5
    assert metrics["rollout/mismatch"] < 1e-4
    assert metrics["rollout/reward"] == 1


@pytest.mark.parametrize("name", ["data", "all", "sequence"])
def test_the_partitioner_never_gathers_a_whole_array_because_it_must(outcome, name):
    """XLA says so on stderr, while compiling the sampler or the update."""
    assert "Involuntary full rematerialization" not in outcome(name)[4]


# --- how weights come to be


SPREAD = Transformer(vocab=80, width=32, layers=2, heads=8, kv_heads=4, mlp=96, scan=True)


@pytest.fixture(scope="module")
def made():
    """A state that was created on (2, 2, 2, 1), the program that did it, and its shardings."""
    learner = Learner(
        SPREAD, objectives.mle, batch="text", optimizer=partial(adam, learning_rate=1.0)
    )
    config = Config("init", steps=1, learners={"policy": learner}, data={"text": dict})
    mesh = sharding.make_mesh((2, 2, 2, 1))
    with jax.set_mesh(mesh):
        built = phases.build(config, mesh)
        program = built.init.lower(0).compile()
        return program(0), program.as_text(), built.shardings, config


def split(tree):
    """`name, array` for every leaf that is divided over devices."""
    for path, x in jax.tree_util.tree_leaves_with_path(tree):
        if any(x.sharding.spec):
            yield sharding.path_name(path), x


def test_no_full_weight_exists_on_a_device_while_weights_are_made(made):
    """No instruction of the compiled program has the shape of a whole parameter, of any type."""
    state, text, *_ = made
    sizes = re.findall(r"\b[a-z]\w*\[([\d,]+)\]", text)
    seen = {tuple(int(n) for n in size.split(",")) for size in sizes}
    weights = dict(split(state.learners["policy"].params))
    assert len(weights) == 8
    for name, x in weights.items():
        whole, part = x.shape, x.addressable_shards[0].data.shape
        assert np.prod(part) == np.prod(whole) // 4, name  # fsdp × tensor
        assert part in seen, name  # so the pattern finds what is there
        assert not {s for s in seen if s[-2:] == whole[-2:]}, name


def test_moments_are_split_like_their_parameters(made):
    state, *_ = made
    learner = state.learners["policy"]
    moments = dict(split(learner.opt_state))
    weights = dict(split(learner.params))
    assert len(moments) == 2 * len(weights)
    for name, x in weights.items():
        mine = [m for other, m in moments.items() if other.endswith(name)]
        assert [m.sharding for m in mine] == [x.sharding] * 2, name


def test_weights_made_on_a_mesh_are_those_made_on_one_device(made):
    state, _, _, config = made
    alone = jax.jit(partial(phases.init, config=config))(0)
    same = partial(assert_allclose, rtol=1e-6, atol=1e-7)
    jax.tree.map(same, jax.device_get(state), jax.device_get(alone))


# --- mistakes


def tree_of(**shapes):
    return {name: jax.ShapeDtypeStruct(shape, jnp.float32) for name, shape in shapes.items()}


def test_a_path_without_a_rule_is_refused_rather_than_replicated():
    mesh = sharding.make_mesh((2, 2, 2, 1))
    with pytest.raises(ValueError, match=r"no sharding rule for layers_0/adapter \(4, 4\).*RULES"):
        sharding.shardings({"layers_0": tree_of(adapter=(4, 4))}, mesh)
    with pytest.raises(ValueError, match="no sharding rule for layers/adapter"):
        sharding.shardings({"layers": tree_of(adapter=(4, 4, 4))}, mesh)
    assert sharding.shardings(tree_of(step=()), mesh)["step"].spec == P()


def test_a_vector_without_a_rule_is_replicated():
    mesh = sharding.make_mesh((2, 2, 2, 1))
    tree = {"temper": tree_of(own=(3,)), "layers": tree_of(own=(4, 3))}
    found = jax.tree.map(lambda x: x.spec, sharding.shardings(tree, mesh))
    assert found == {"temper": {"own": P()}, "layers": {"own": P()}}


def test_a_size_that_does_not_divide_is_refused_with_one_that_does():
    mesh = sharding.make_mesh((1, 2, 4, 1))
    message = r"embed/embedding \(30, 8\): axis 0 of size 30 .* over 4 devices .*make it 32"
    with pytest.raises(ValueError, match=message):
        sharding.shardings({"embed": tree_of(embedding=(30, 8))}, mesh)
    found = sharding.shardings({"embed": tree_of(embedding=(32, 8))}, mesh)
    assert found["embed"]["embedding"].spec == P("tensor", sharding.SHARE)


def test_scanned_layers_keep_their_leading_axis_whole():
    mesh = sharding.make_mesh((2, 2, 2, 1))
    found = sharding.shardings({"layers": {"gate": tree_of(kernel=(3, 4, 4))}}, mesh)
    assert found["layers"]["gate"]["kernel"].spec == P(None, sharding.SHARE, "tensor")


@pytest.mark.parametrize(
    ("own", "groups", "share"),
    [
        ({0}, 1, ((0,), 1)),  # a tensor axis over all processes: each reads every row
        ({4, 5, 6, 7}, 16, ((1,), 4)),
        ({0, 1, 4, 5}, 16, ((0, 2), 8)),  # a host of 2 × 2 chips in a slice of 4 × 4
        ({3}, 4, ((3,), 4)),
        ({0, 2}, 4, ((0, 2), 4)),
    ],
)
def test_a_process_reads_the_rows_of_its_devices_in_slices_as_large_as_can_be(own, groups, share):
    assert sharding.in_slices(own, groups) == share
