"""Batches made from other batches of the step, statistics over a whole batch, tagged prompts."""

import inspect
import shutil
from dataclasses import replace
from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import toys
from flax import struct
from jaxtyping import Array, Float
from numpy.testing import assert_allclose

from rlhf_jax import comparisons, masked, phases
from rlhf_jax import train as loop
from rlhf_jax.check import check
from rlhf_jax.config import Config, ConfigError, Derived, From, Frozen, Learner, Rollouts
from rlhf_jax.data import streams
from rlhf_jax.feed import RunError
from rlhf_jax.models.transformer import Transformer
from rlhf_jax.objectives import (
    dpo,
    energy,
    ipo,
    kto,
    mismatched,
    mle,
    orpo,
    presets,
    reward_model,
)
from rlhf_jax.optimizer import sgd
from rlhf_jax.pool import Pool
from rlhf_jax.rewards import KL
from rlhf_jax.sampling import Sampling
from rlhf_jax.score import score
from rlhf_jax.step import Misfit, evaluate, update
from rlhf_jax.types import Contrast, Labeled, Pairs, Scores, Sequences, Terms

POLICY = Transformer(vocab=264, width=16, layers=1, heads=2, kv_heads=1, mlp=16, context=32)
SCALAR = replace(POLICY, lm_head=False, value_head=True)
SGD = partial(sgd, learning_rate=0.1)


def length_reward(rollout, params):
    return masked.at_last(rollout.mask.sum(1).astype(jnp.float32), rollout.mask)


def longer_first(experience, *, params, key):
    """Comparisons of neighbours: the longer text is preferred."""
    length = experience.mask.sum(1).reshape(-1, 2)
    order = jnp.argsort(-length, axis=1)

    def pair(x):
        x = x.reshape(-1, 2, x.shape[-1])
        return jnp.take_along_axis(x, order[:, :, None], axis=1)

    return Pairs(*(pair(x) for x in (experience.tokens, experience.mask, experience.segments)))


def winners(pairs, texts, *, params, key):
    """The preferred ones, as many texts of a stream, and nothing else."""
    parts = [(pairs.tokens[:, 0], pairs.mask[:, 0], pairs.segments[:, 0])]
    width = parts[0][0].shape[1]
    parts.append(tuple(x[:, :width] for x in (texts.tokens, texts.mask, texts.segments)))
    return Sequences(*(jnp.concatenate(x) for x in zip(*parts, strict=True)))


pytestmark = pytest.mark.usefixtures("compiled_once")

ROWS = ["one", "two two", "three three"]
CONFIG = Config(
    name="derived",
    steps=2,
    data={
        "prompts": partial(
            streams.prompts,
            batch=8,
            length=4,
            words=(1, 1),
            truncate=True,
            tokenizer="bytes",
            source=ROWS,
        ),
        "text": partial(
            streams.text, batch=8, length=24, tokenizer="bytes", source=ROWS, marks=None
        ),
    },
    learners={
        "policy": Learner(POLICY, mle, batch="winners", optimizer=SGD),
        "reward": Learner(SCALAR, reward_model, batch="comparisons", optimizer=SGD),
    },
    rollouts=Rollouts(
        length_reward,
        length=8,
        samples=2,
        reference=None,
        value=None,
        kl=KL(0.0, adaptive=False),
        sampling=Sampling(stop=(2,), banned=(0, 1)),
        show=0,
    ),
    derived={
        "comparisons": Derived(longer_first),
        "winners": Derived(winners, of=("comparisons", "text")),
    },
    mesh=(1, 1, 1, 1),
)


def run(config, out, **options):
    return loop.train(config, out, devices=jax.devices()[:1], **options)


def test_learners_learn_from_what_is_made_of_rollouts_and_streams_and_resume(tmp_path):
    """The policy learns from a pool of all that was made, so a resume needs the pool as it was."""
    pooled = Derived(winners, of=("comparisons", "text"), pool=Pool(rows=24))
    config = replace(CONFIG, derived=CONFIG.derived | {"winners": pooled})
    whole = run(config, tmp_path / "whole")
    assert {n: int(s.step) for n, s in whole.learners.items()} == {"policy": 2, "reward": 2}
    run(replace(config, steps=1), tmp_path / "parts")
    pool = tmp_path / "parts" / "pools" / "winners"
    shutil.copy(pool / "0.npz", pool / "1.npz")  # of a step that no checkpoint knows
    resumed = run(config, tmp_path / "parts", resume=True)
    for a, b in zip(jax.tree.leaves(whole), jax.tree.leaves(resumed), strict=True):
        assert np.asarray(a).tobytes() == np.asarray(b).tobytes()


def test_a_derived_batch_that_does_not_divide_says_so(tmp_path):
    learners = CONFIG.learners | {"policy": replace(CONFIG.learners["policy"], minibatches=3)}
    with pytest.raises(RunError, match=r"learners\.policy, .* 'winners': a batch of 16 rows"):
        run(replace(CONFIG, learners=learners), tmp_path)


@pytest.mark.parametrize(
    ("derived", "message"),
    [
        ({"text": Derived(winners)}, r"derived\.text: there is a batch of that name"),
        ({"a": Derived(winners, of=("b",)), "b": Derived(winners)}, r"derived\.a\.of: .* 'b'"),
        ({"a": Derived(winners, models=("judge",))}, r"derived\.a\.models: there is no 'judge'"),
        ({"a": Derived(longer_first, pool=Pool(rows=0))}, r"derived\.a\.pool\.rows: must be at"),
    ],
)
def test_mistakes_are_found_before_anything_is_compiled(derived, message):
    with pytest.raises(ConfigError, match=message):
        check(replace(CONFIG, derived=derived), devices=1)


def test_a_derived_batch_sees_the_weights_it_names(tmp_path):
    def judged(experience, *, params, key):
        assert set(params) == {"reference"}
        return Sequences(experience.tokens, experience.mask, experience.segments)

    config = replace(
        CONFIG,
        steps=1,
        derived={"kept": Derived(judged, models=("reference",))},
        learners={"policy": replace(CONFIG.learners["policy"], batch="kept")},
        frozen={"reference": Frozen(From("policy"))},
    )
    assert int(run(config, tmp_path).step) == 1


def test_prompts_are_transformed_before_sampling(tmp_path):
    seen = []

    def tagging(prompts, key):
        return prompts.replace(
            tokens=jnp.concatenate([prompts.tokens[:, :1] * 0 + 9, prompts.tokens], axis=1),
            length=prompts.length + 1,
        )

    def watched(experience, *, params, key):
        jax.debug.callback(lambda x: seen.append(np.asarray(x)), experience.tokens)
        return Sequences(experience.tokens, experience.mask, experience.segments)

    config = replace(
        CONFIG,
        steps=1,
        rollouts=replace(CONFIG.rollouts, transform=tagging),
        derived={"kept": Derived(watched)},
        learners={"policy": replace(CONFIG.learners["policy"], batch="kept")},
    )
    run(config, tmp_path)
    jax.effects_barrier()
    assert seen[0].shape == (16, 5 + 8)
    assert (seen[0][:, 0] == 9).all() and (seen[0][:, 1] == 1).all()


# ------------------------------------------------------------------------------------ prepare


@struct.dataclass
class Centred(Labeled):
    """With the mean log-probability of all texts at the weights before the update."""

    centre: Float[Array, "b"]


def centre(scores, batch):
    whole = masked.mean(scores.logp, batch.mask)
    fields = {name: getattr(batch, name) for name in Labeled.__dataclass_fields__}
    return Centred(**fields, centre=jnp.full(batch.score.shape, whole))


def around_the_centre(scores, batch):
    loss = (scores.logp - batch.centre[:, None]) ** 2
    return Terms(loss, batch.mask.astype(jnp.float32))


@pytest.mark.parametrize(("minibatches", "microbatches"), [(1, 1), (1, 4), (2, 2)])
def test_a_statistic_is_of_the_whole_batch_however_it_is_cut(minibatches, microbatches):
    table, batch = toys.Table(32), jax.tree.map(jnp.asarray, toys.labeled())
    learner = Learner(
        table,
        around_the_centre,
        optimizer=partial(sgd, learning_rate=0.0),
        prepare=centre,
        minibatches=minibatches,
        microbatches=microbatches,
    )
    state = phases.init_learner(jax.random.key(0), learner=learner)
    call = jax.jit(partial(update, learner=learner, models={}))
    _, metrics = call(state, {}, batch, jax.random.key(1))
    logp = logp_of(table, state.params, batch)
    spread = np.var(logp[np.asarray(batch.mask)])
    if minibatches == 1:
        assert_allclose(metrics["loss"], spread, rtol=1e-4)
        found = jax.jit(partial(evaluate, learner=learner, models={}))(state.params, {}, batch)
        assert_allclose(found["loss"], spread, rtol=1e-4)
    else:  # means over minibatches of unequal numbers of tokens, around one centre
        halves = metrics["loss"]
        assert_allclose(halves, spread, rtol=0.2)


def test_no_gradient_flows_through_a_statistic():
    table, batch = toys.Table(32), jax.tree.map(jnp.asarray, toys.labeled())
    learner = Learner(table, around_the_centre, optimizer=partial(sgd, learning_rate=1.0))
    learner = replace(learner, prepare=centre)
    state = phases.init_learner(jax.random.key(0), learner=learner)
    new, _ = jax.jit(partial(update, learner=learner, models={}))(
        state, {}, batch, jax.random.key(1)
    )
    moved = jax.tree.map(lambda a, b: a - b, state.params, new.params)

    fixed = centre_of(table, state.params, batch)

    def loss(params):
        logp = score({"self": params}, batch, models={"self": table}).logp
        return masked.mean((logp - fixed) ** 2, batch.mask)

    expected = jax.grad(loss)(state.params)
    jax.tree.map(partial(assert_allclose, atol=1e-6), moved, expected)


def logp_of(table, params, batch):
    return np.asarray(score({"self": params}, batch, models={"self": table}).logp)


def centre_of(table, params, batch):
    return logp_of(table, params, batch)[np.asarray(batch.mask)].mean()


@pytest.mark.parametrize("rows", [6, 16])
def test_an_evaluation_is_cut_into_micro_batches_only(rows):
    table, batch = toys.Table(32), jax.tree.map(jnp.asarray, toys.labeled(rows))
    learner = Learner(table, around_the_centre, prepare=centre, minibatches=8, microbatches=2)
    params = table.init(jax.random.key(0))
    found = jax.jit(partial(evaluate, learner=learner, models={}))(params, {}, batch)
    spread = np.var(logp_of(table, params, batch)[np.asarray(batch.mask)])
    assert_allclose(found["loss"], spread, rtol=1e-4)


# ---------------------------------------------------------------------- what does not fit


def first_loss(objective, batch, model=POLICY, **fields):
    learner = Learner(model, objective, **fields)
    state = jax.eval_shape(partial(phases.init_learner, learner=learner), jax.random.key(0))
    others = {name: state.params for name in learner.scores}
    run = partial(update, learner=learner, models=dict.fromkeys(others, model))
    return jax.eval_shape(run, state, others, batch, jax.random.key(0))


def contrast():
    text, zero = toys.labeled(), np.zeros(16, np.float32)
    arrays = {name: getattr(text, name) for name in Labeled.__dataclass_fields__}
    return Contrast(**arrays, log_q=zero)


def reads_an_advantage(scores, batch, *, scale=1.0):
    return Terms(-scale * batch.advantage * scores.logp, batch.mask.astype(jnp.float32))


def scores_every_text(batch, key):
    return batch.replace(mask=batch.mask & (batch.score > 0)[:, None])


MISFITS = {
    "an objective": (reads_an_advantage, toys.labeled(), {}, "reads 'advantage', which a batch of"),
    "a partial": (partial(reads_an_advantage, scale=2.0), toys.labeled(), {}, "reads_an_advantage"),
    "a transform": (mle, toys.experience(), {"transform": scores_every_text}, "reads 'score'"),
    "no head": (mle, toys.labeled(), {"model": SCALAR}, "logp and entropy need lm_head=True"),
    "no weights": (energy, contrast(), {"model": SCALAR}, "prepare=energy_weights"),
    "no reference": (dpo, toys.pairs(), {}, r"needs scores=\(\"reference\",\)"),
    "no point": (
        kto, toys.labeled(), {"scores": ("reference",), "transform": mismatched}, "kto_reference",
    ),
}  # fmt: skip


@pytest.mark.parametrize("case", MISFITS)
def test_what_does_not_fit_says_what_would(case):
    objective, batch, fields, message = MISFITS[case]
    with pytest.raises(Misfit, match=message):
        first_loss(objective, batch, **fields)


@pytest.mark.parametrize("objective", [dpo, ipo, orpo, reward_model], ids=lambda x: x.__name__)
def test_comparisons_are_groups_for(objective):
    unchecked = inspect.unwrap(objective)  # tests check classes by annotation, users' runs do not
    scores = Scores(logp=jnp.zeros((16, 12)), reward=jnp.zeros((16, 12)))
    scores = scores.replace(others={"reference": scores})
    with pytest.raises(ValueError, match=r"needs comparisons \[n, k, t\], not Labeled of shape"):
        unchecked(scores, jax.tree.map(jnp.asarray, toys.labeled()))


def test_prompts_are_for_rollouts(tmp_path):
    learner = replace(CONFIG.learners["policy"], batch="prompts")
    config = replace(CONFIG, learners={"policy": learner}, rollouts=None, derived={})
    with pytest.raises(RunError, match="'prompts' makes Prompts, which only the rollouts read"):
        run(config, tmp_path)


def test_a_variant_is_not_an_objective():
    learner = replace(CONFIG.learners["policy"], objective=presets.GRPO)
    with pytest.raises(ConfigError, match=r"policy\.objective is not .* PRESET\.objective"):
        check(replace(CONFIG, learners={"policy": learner}), devices=1)


def test_comparisons_are_groups():
    with pytest.raises(ValueError, match=r"needs comparisons \[n, k, t\], not Labeled of shape"):
        comparisons.whole(toys.labeled())


def test_errors_of_ones_own_stay_what_they_are():
    def attribute(scores, batch):
        return scores.nothing

    def shapes(scores, batch):
        return Terms(scores.logp + jnp.zeros((3, 7, 2)), batch.mask.astype(jnp.float32))

    with pytest.raises(AttributeError, match="nothing"):
        first_loss(attribute, toys.labeled())
    with pytest.raises(ValueError) as found:
        first_loss(shapes, toys.labeled())
    assert not isinstance(found.value, Misfit)
