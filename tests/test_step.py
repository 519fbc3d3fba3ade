"""The update and what comes before it: nothing but the batch's content decides what is learned."""

from dataclasses import dataclass, replace
from functools import partial

import chex
import jax
import jax.numpy as jnp
import numpy as np
import pytest
import toys
from numpy.testing import assert_allclose, assert_array_equal

from rlhf_jax import masked, objectives, phases, sharding
from rlhf_jax.config import Config, From, Frozen, Learner, Rollouts
from rlhf_jax.optimizer import adam, sgd
from rlhf_jax.parts import Lengths, by_length, parts
from rlhf_jax.step import Misfit, evaluate, optimizer_step, update
from rlhf_jax.types import Terms

TABLE = toys.Table(32)
ADAM = partial(adam, learning_rate=1e-3, epsilon=1e-5)


def learner_of(objective, model=TABLE, **fields):
    fields = {"batch": "text", "optimizer": partial(sgd, learning_rate=1.0)} | fields
    return Learner(model, objective, **fields)


@pytest.fixture(scope="module")
def state():
    """A learner's state over a table; `sgd` and `adam` states share the weights."""

    def make(learner, seed=0):
        return jax.jit(partial(phases.init_learner, learner=learner))(jax.random.key(seed))

    return make


def gradient(state, batch, learner, frozen=None):
    """Loss, gradient and metrics of one optimiser step, read off plain gradient descent."""
    run = jax.jit(partial(optimizer_step, learner=learner, models={"reference": TABLE}))
    new, (sums, plain) = run(state, frozen or {}, batch)
    grads = jax.tree.map(lambda old, new: np.asarray(old) - np.asarray(new), state.params,
                         new.params)  # fmt: skip
    return float(plain["loss"]), grads, jax.device_get(sums)


def updated(state, batch, learner):
    run = jax.jit(partial(update, learner=learner, models={}))
    return jax.device_get(run(state, {}, batch, jax.random.key(0)))


def evaluated(params, batch, learner):
    return jax.jit(partial(evaluate, learner=learner, models={}))(params, {}, batch)


def assert_same(a, b, tolerance=1e-5):
    assert_allclose(a[0], b[0], rtol=tolerance)
    jax.tree.map(partial(assert_allclose, atol=tolerance, rtol=tolerance), a[1], b[1])
    jax.tree.map(partial(assert_allclose, atol=1e-4, rtol=tolerance), a[2], b[2])


def weighted(scores, batch, *, power=1.0):
    """Two terms: a per-token one with its own count, a per-sequence one."""
    mask = batch.mask.astype(jnp.float32)
    length = jnp.maximum(mask.sum(-1, keepdims=True), 1)
    token = Terms(
        -scores.logp * batch.token_score,
        weight=mask,
        count=mask / length,
        scale=0.5,
        metrics={"logp": scores.logp},
    )
    whole = masked.sum(scores.logp, batch.mask, axis=-1)
    rows = Terms(whole**2, weight=(batch.score > 0).astype(jnp.float32), metrics={"x": whole})
    return {"token": token, "row": rows}


@pytest.fixture(scope="module")
def plain(state):
    learner = learner_of(weighted)
    start = state(learner)
    return start, learner, gradient(start, toys.labeled(), learner)


@pytest.mark.parametrize("parts", [2, 16])
def test_k_micro_batches_are_one(plain, parts):
    start, learner, whole = plain
    again = gradient(start, toys.labeled(), replace(learner, microbatches=parts))
    assert_same(again, whole)
    assert max(np.abs(x).max() for x in jax.tree.leaves(whole[1])) > 1e-2


def test_more_columns_of_padding_change_nothing(plain):
    start, learner, whole = plain
    batch = toys.labeled()
    wide = jax.tree.map(lambda x: np.pad(x, ((0, 0), (0, 5))) if x.ndim > 1 else x, batch)
    wide = wide.replace(tokens=np.where(wide.segments > 0, wide.tokens, 29))
    assert_same(gradient(start, wide, learner), whole)


def test_the_order_of_rows_changes_nothing(plain):
    start, learner, whole = plain
    order = np.random.default_rng(0).permutation(16)
    batch = jax.tree.map(lambda x: x[order], toys.labeled())
    assert_same(gradient(start, batch, replace(learner, microbatches=4)), whole)


def test_terms_are_divided_once_each_by_its_own_count(plain):
    """The same number by hand, term by term, in float64."""
    start, _, (loss, grads, sums) = plain
    batch = toys.labeled()
    table = np.asarray(start.params["head"]["kernel"], np.float64)
    logp = table - np.log(np.exp(table).sum(1, keepdims=True))
    token, rows, count = 0.0, 0.0, 0.0
    for row, mask in enumerate(batch.mask):
        at = np.flatnonzero(mask)
        own = logp[batch.tokens[row, at - 1], batch.tokens[row, at]]
        token += -(own * batch.token_score[row, at]).sum()
        count += 1.0  # 1/length at each of its tokens
        rows += own.sum() ** 2 * (batch.score[row] > 0)
    expected = 0.5 * token / count + rows / (batch.score > 0).sum()
    assert_allclose(loss, expected, rtol=1e-5)
    assert_allclose(sums["row/x"][1], (batch.score > 0).sum())
    assert_allclose(sums["token/logp"][1], batch.mask.sum())
    assert set(sums) == {"token/logp", "row/x"}
    assert np.abs(grads["value_head"]["kernel"]).max() == 0


def test_a_minibatch_without_weight_teaches_nothing_and_is_finite(plain):
    start, learner, _ = plain
    batch = toys.labeled()
    batch = batch.replace(mask=np.zeros_like(batch.mask), score=-np.ones(16, np.float32))
    loss, grads, _ = gradient(start, batch, learner)
    assert loss == 0
    jax.tree.map(lambda x: assert_array_equal(x, 0.0), grads)


def test_nan_where_the_weight_is_zero_touches_nothing(plain):
    start, learner, whole = plain
    batch = toys.labeled()
    batch = batch.replace(token_score=np.where(batch.mask, batch.token_score, np.nan))
    assert_same(gradient(start, batch, learner), whole)


def test_an_evaluation_gives_the_loss_of_the_same_batch(plain):
    start, learner, (loss, _, sums) = plain
    learner = replace(learner, microbatches=2)
    found = evaluated(start.params, toys.labeled(), learner)
    assert_allclose(found["loss"], loss, rtol=1e-5)
    assert_allclose(found["row/x"], sums["row/x"][0] / sums["row/x"][1], rtol=1e-5)


def test_minibatches_partition_the_batch_and_every_epoch_sees_all_of_it(state):
    """Each row's own gradient is counted: in every epoch exactly once, in another order."""

    def note(scores, batch):
        metrics = {f"row{i}": (batch.score == i).astype(jnp.float32) for i in range(16)}
        return Terms(jnp.zeros(batch.score.shape) + 0 * scores.logp.sum(),
                     jnp.ones(batch.score.shape), metrics=metrics)  # fmt: skip

    learner = learner_of(note, epochs=3, minibatches=4, microbatches=2)
    batch = toys.labeled().replace(score=np.arange(16, dtype=np.float32))
    new, metrics = updated(state(learner), batch, learner)
    assert int(new.step) == 12
    for i in range(16):
        assert_allclose(metrics[f"row{i}"], 1 / 16, rtol=1e-6)


@pytest.mark.parametrize("devices", [1, 8])
def test_micro_batches_no_wider_than_their_rows_learn_the_same(state, devices):
    """And each is computed at the narrowest width that holds it: the model says how wide it was."""

    def wide(scores, batch):
        return weighted(scores, batch)["token"].replace(metrics={"width": scores.value})

    model = Ruler(32, value_head=True)
    learner = learner_of(wide, model, minibatches=2)
    batch, length = toys.labeled(64), np.full(64, 12)
    length[8:] = np.random.default_rng(0).integers(3, 8, 56)
    keep = np.arange(12) < length[:, None]
    batch = batch.replace(mask=batch.mask & keep, segments=batch.segments * keep)

    def run(learner, **known):
        go = partial(update, learner=learner, models={}, **known)
        with jax.set_mesh(sharding.make_mesh(devices=jax.devices()[:devices])):
            return jax.device_get(jax.jit(go)(state(learner), {}, batch, jax.random.key(0)))

    plain, metrics = run(learner)
    new, found = run(replace(learner, microbatches=4), lengths=Lengths((8, 99), 11, 1))
    assert_allclose(found.pop("loss"), metrics["loss"], rtol=1e-5)
    jax.tree.map(partial(assert_allclose, atol=1e-5, rtol=1e-5), new, plain)
    assert metrics["width"] == 12
    assert 8 < found["width"] < 12
    if devices == 1:  # as long as the longest of eight rows that follow each other in length
        order = jax.random.permutation(jax.random.fold_in(jax.random.key(0), 0), 64)
        length = batch.segments.sum(1)
        parts = [np.sort(length[rows]).reshape(4, 8) for rows in np.asarray(order).reshape(2, 32)]
        parts = np.concatenate(parts) - 1  # the first token of a row is given
        widths = np.where(parts.max(1) < 8, 8, 12)
        assert_allclose(found["width"], (widths * parts.sum(1)).sum() / parts.sum(), rtol=1e-6)


@dataclass(frozen=True)
class Ruler(toys.Table):
    """A chain whose value is the number of tokens that it was given in a row."""

    def value(self, params, hidden):
        return jnp.full(hidden.shape[:-1], hidden.shape[1], jnp.float32)


@pytest.mark.parametrize("groups", [1, 4])
def test_parts_by_length_are_of_similar_length_and_rows_stay_where_they_are(groups):
    """In each part of a mesh the rows of a part are no longer than those of the next."""
    batch = toys.labeled(32)
    with jax.set_mesh(sharding.make_mesh((groups, 1, 1, 1), jax.devices()[:groups])):
        order = jax.jit(partial(by_length, n=4))(batch)
        made = jax.jit(partial(parts, n=4))(np.asarray(order))
    assert_array_equal(np.sort(order), np.arange(32))
    length = (batch.segments > 0).sum(1)[np.asarray(made)]  # [4, 32 / 4]
    own = np.asarray(made).reshape(4, groups, -1)
    assert_array_equal(
        own // (32 // groups), np.broadcast_to(np.arange(groups)[:, None], own.shape)
    )
    length = length.reshape(4, groups, -1)
    assert (length[:-1].max(-1) <= length[1:].min(-1)).all()


def test_rows_that_do_not_divide_are_refused_with_a_size_that_does(state):
    learner = learner_of(objectives.mle, minibatches=3, microbatches=2)
    message = "16 rows does not divide into 3 minibatches of 2 micro-batches.*such as 18"
    with pytest.raises(ValueError, match=message):
        update(state(learner), {}, toys.labeled(), jax.random.key(0), learner=learner, models={})


def averaged(scores, batch):
    return Terms(-scores.logp.mean(), weight=batch.mask.astype(jnp.float32))


def scalar(scores, batch):
    return Terms(-scores.logp.mean(), weight=jnp.float32(1.0))


def summed(scores, batch):
    return {"all": Terms(-scores.logp, weight=batch.mask.sum(-1, dtype=jnp.float32))}


def shortened(scores, batch):
    return Terms(-scores.logp[:, 1:], weight=batch.mask[:, 1:])


def counted(scores, batch):
    return Terms(-scores.logp, weight=batch.mask, count=batch.mask.any(-1))


def measured(scores, batch):
    return Terms(-scores.logp, weight=batch.mask, metrics={"logp": scores.logp.mean()})


def scaled(scores, batch):
    return Terms(-scores.logp, weight=batch.mask, scale=batch.score)


@pytest.mark.parametrize(
    ("objective", "says"),
    [
        (averaged, r"averaged returns shapes that do not fit: loss \(\), weight \(16, 12\)\. All"),
        (scalar, r"scalar returns .*: loss \(\), weight \(\)\. .* one of \(16, 12\) or \(16,\):"),
        (summed, r"summed returns .* fit in 'all': loss \(16, 12\), weight \(16,\)\."),
        (shortened, r"loss \(16, 11\), weight \(16, 11\)\. All must be one of"),
        (counted, r"loss \(16, 12\), weight \(16, 12\), count \(16,\)\."),
        (measured, r"loss \(16, 12\), weight \(16, 12\), metric 'logp' \(\)\."),
        (scaled, r"scaled returns a scale of shape \(16,\); valid: a number"),
        (lambda scores, batch: scores.logp, r"<lambda> returns \w*Tracer; valid: Terms, or a dict"),
        (
            lambda scores, batch: {"a": scores.logp},
            "<lambda> returns dict; valid: Terms, or a dict",
        ),
    ],
)
def test_terms_that_would_be_broadcast_are_refused(state, objective, says):
    learner = learner_of(objective)
    with pytest.raises(Misfit, match=says):
        gradient(state(learner), toys.labeled(), learner)


def test_a_transform_comes_before_the_objective_and_never_in_an_evaluation(state):
    def halved(batch, key):
        return batch.replace(mask=batch.mask & (jnp.arange(12) < 6)[None])

    def counted(scores, batch):
        return Terms(scores.logp, batch.mask.astype(jnp.float32),
                     metrics={"late": (jnp.arange(12) >= 6)[None] & batch.mask})  # fmt: skip

    learner = learner_of(counted, transform=halved)
    start = state(learner)
    _, metrics = updated(start, toys.labeled(), learner)
    assert float(metrics["late"]) == 0
    found = evaluated(start.params, toys.labeled(), learner)
    assert float(found["late"]) > 0


def test_where_a_transform_may_put_any_token_into_the_mask_only_widths_are_known():
    spec = Rollouts(reward=None, length=5, widths=(8,))
    plain = learner_of(objectives.mle, batch="experience")
    assert phases.lengths(plain, spec) == Lengths((8,), 5, 1)
    changed = replace(plain, transform=lambda batch, key: batch)
    assert phases.lengths(changed, spec) == Lengths((8,))
    assert phases.lengths(learner_of(objectives.mle), spec) == Lengths()


# --- updates that are not finite, and tracing


def spoiled(scores, batch):
    """Not finite if any score says so; a loss whose gradient alone is not, if it says -2."""
    loss = -scores.logp + jnp.where(batch.score > 9, jnp.inf, 0.0)[:, None]
    root = jnp.sqrt(jnp.where(batch.score < -9, 0.0, 1.0)[:, None] * scores.logp**2)
    return Terms(loss + root, batch.mask.astype(jnp.float32))


def test_a_gradient_that_is_not_finite_changes_no_bit_and_is_counted_and_one_trace_does_it(state):
    learner = learner_of(spoiled, optimizer=partial(adam, learning_rate=0.1))

    @chex.assert_max_traces(n=1)
    def once(state, batch, key):
        return update(state, {}, batch, key, learner=learner, models={})

    step, key = jax.jit(once), jax.random.key(0)
    good = toys.labeled()
    bad = good.replace(score=np.where(np.arange(16) == 3, 10, 0).astype(np.float32))
    steep = good.replace(score=np.full(16, -10, np.float32))

    first, metrics = step(state(learner), good, key)
    assert int(first.step) == 1 and float(metrics["skipped"]) == 0
    second, metrics = step(first, bad, key)
    assert float(metrics["skipped"]) == 1 and not np.isfinite(metrics["loss"])
    third, metrics = step(second, steep, key)
    assert np.isfinite(metrics["loss"]) and not np.isfinite(metrics["grad_norm"])
    assert (int(third.skipped), int(third.skipped_row), int(third.step)) == (2, 2, 1)
    jax.tree.map(assert_array_equal, (third.params, third.opt_state),
                 (first.params, first.opt_state))  # fmt: skip
    fourth, _ = step(third, good, key)
    assert (int(fourth.skipped), int(fourth.skipped_row), int(fourth.step)) == (2, 0, 2)
    assert np.abs(fourth.params["head"]["kernel"] - third.params["head"]["kernel"]).max() > 1e-3


# --- several seeds in one program


def assert_eight_runs_are_one_program(learner, batches):
    """`batches` [steps, seeds, ...]: vmapped updates against single ones."""
    one = partial(update, learner=learner, models={})
    alone, together = jax.jit(one), jax.jit(jax.vmap(one, in_axes=(0, None, 0, 0)))

    def key_of(seed, step):
        return jax.random.fold_in(jax.random.key(seed), step)

    def pick(tree, seed):
        return jax.tree.map(lambda x: x[seed], tree)

    make = jax.jit(jax.vmap(lambda i: phases.init_learner(jax.random.key(i), learner=learner)))
    keys = jax.jit(jax.vmap(key_of, in_axes=(0, None)))
    start = state = jax.device_get(make(np.arange(8)))
    for step, batch in enumerate(batches):
        state, metrics = together(state, {}, batch, keys(np.arange(8), step))
    state, metrics = jax.device_get((state, metrics))
    assert metrics["loss"].shape == metrics["skipped"].shape == (8,)
    for seed in range(8):
        single = pick(start, seed)
        for step, batch in enumerate(batches):
            single, metric = alone(single, {}, pick(batch, seed), key_of(seed, step))
        same = partial(assert_allclose, atol=1e-5)
        jax.tree.map(same, pick(state, seed), jax.device_get(single))
        assert_allclose(metrics["loss"][seed], metric["loss"], rtol=1e-5)
    moved = state.params["embed"]["embedding"] - start.params["embed"]["embedding"]
    assert np.abs(moved[0] - moved[1]).max() > 1e-3


def per_seed(make, seeds=range(8)):
    return jax.tree.map(lambda *x: np.stack(x), *(make(seed=s) for s in seeds))


def test_eight_seeds_in_one_program_learn_what_eight_runs_learn(model):
    """Ten steps of supervised learning."""
    learner = learner_of(objectives.mle, replace(model, layers=1), optimizer=ADAM)
    batches = [per_seed(partial(toys.labeled, 4), range(8 * i, 8 * i + 8)) for i in range(10)]
    assert_eight_runs_are_one_program(learner, batches)


def test_eight_seeds_in_one_program_take_the_same_ppo_step(model):
    """Two epochs of two minibatches on given rollouts; policy and critic on one trunk."""
    parts = {"policy": objectives.ppo, "value": objectives.value}
    learner = learner_of(
        partial(objectives.combine, **parts),
        replace(model, layers=1),
        optimizer=ADAM,
        epochs=2,
        minibatches=2,
        batch="experience",
    )
    batches = [per_seed(partial(toys.experience, 4))]
    assert_eight_runs_are_one_program(learner, batches)


def test_the_reference_is_neither_changed_nor_given_away_by_an_update():
    """The learner's own buffers are: an update needs no second copy of the state."""
    learner = learner_of(
        objectives.reference_kl, vocab=objectives.reference_kl_vocab, scores=("reference",)
    )
    config = Config(
        "kl",
        steps=1,
        learners={"policy": learner},
        data={"text": partial(dict, batch=16)},
        frozen={"reference": Frozen(From("policy"))},
    )
    mesh = sharding.make_mesh((1, 1, 1, 1), jax.devices()[:1])
    with jax.set_mesh(mesh):
        built = phases.build(config, mesh)
        state = built.init(0).learners["policy"]
        reference = jax.tree.map(lambda x: x + 1.0 * jnp.sin(37 * x), state.params)
        before = jax.device_get(reference)
        batch = built.place(toys.labeled())
        for step in range(3):
            given = state
            state, metrics = built.update["policy"](
                state, {"reference": reference}, batch, jax.random.key(step)
            )
            assert all(x.is_deleted() for x in jax.tree.leaves(given.params))
    assert not any(x.is_deleted() for x in jax.tree.leaves(reference))
    jax.tree.map(assert_array_equal, jax.device_get(reference), before)
    assert metrics["loss"] > 0 and int(state.step) == 3
