"""Every objective obeys every law; and every law is broken by an objective made to break it."""

import ast
from functools import partial
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import struct
from jaxtyping import Array, Float

from rlhf_jax import masked, objectives
from rlhf_jax.aggregate import (
    over_ends,
    over_length,
    over_prompts,
    over_sequence_means,
    over_sequences,
)
from rlhf_jax.objectives import (
    above_value,
    combine,
    cringe,
    cringe_vocab,
    discriminator,
    distill,
    distill_vocab,
    dpo,
    energy,
    from_head,
    gated,
    horizon_one,
    horizon_one_vocab,
    ipo,
    kto,
    mle,
    of_experience,
    of_the_state,
    orpo,
    outcome,
    ppo,
    quark,
    quark_vocab,
    reference_kl,
    reference_kl_vocab,
    reinforce,
    reward_model,
    sampled_kl,
    score_value,
    signed_likelihood,
    token_npo,
    token_reward_model,
    unlikelihood,
    value,
    visit_counts,
    visit_counts_vocab,
    weighted_regression,
)
from rlhf_jax.ratios import k3, sequence_log_ratio
from rlhf_jax.testing import LAWS, BrokenLawError, check_objective, random_batch
from rlhf_jax.types import Experience, Judged, Labeled, Pairs, Scores, Sequences, Terms, Weighed

every_ppo = partial(ppo, clip_high=0.3, dual_clip=3.0, importance_cap=2.0, entropy_coefficient=0.01)
on_policy = {"batch": Experience}
over_vocabulary = {"vocab": reference_kl_vocab}

OBJECTIVES = {
    "mle": (mle, {}),
    "ppo": (ppo, {}),
    "ppo, every option": (every_ppo, {}),
    "ppo of sequences": (partial(ppo, log_ratio=sequence_log_ratio), {}),
    "reinforce": (partial(reinforce, importance_cap=2.0, entropy_coefficient=0.01), {}),
    "sampled_kl": (partial(sampled_kl, estimator=k3, coefficient=0.1), {}),
    **{
        f"ppo {by.__name__}": (partial(ppo, aggregate=by), {})
        for by in (over_sequences, over_sequence_means, over_prompts)
    },
    "ppo over_length": (partial(ppo, aggregate=partial(over_length, length=16)), {}),
    "value": (value, {}),
    "value, not clipped": (partial(value, clip=None, coefficient=0.1), {}),
    "reward_model": (partial(reward_model, centre=0.1), {}),
    "dpo": (dpo, {}),
    "dpo, every option": (partial(dpo, beta=0.5, smoothing=0.1, reduce=masked.mean), {}),
    "ipo": (ipo, {}),
    "kto": (partial(kto, beta=0.5, desirable=2.0, undesirable=0.5), {"batch": Judged}),
    "orpo": (orpo, {}),
    "unlikelihood": (partial(unlikelihood, threshold=0.0, alpha=2.0), {}),
    "unlikelihood by degree": (partial(unlikelihood, threshold=None, alpha=2.0), {}),
    "signed_likelihood": (signed_likelihood, {}),
    "token_npo": (partial(token_npo, threshold=0.0, beta=0.5, alpha=2.0), {}),
    "cringe": (partial(cringe, threshold=0.0), {"vocab": partial(cringe_vocab, top_k=2)}),
    "horizon_one": (
        partial(horizon_one, kl_coefficient=0.5),
        {"batch": Labeled, "vocab": horizon_one_vocab},
    ),
    "horizon_one of a head": (
        partial(horizon_one, kl_coefficient=0.5),
        {
            "vocab": partial(horizon_one_vocab, reward=from_head),
            "others": ("reference", "token_reward"),
        },
    ),
    "token_reward_model": (partial(token_reward_model, threshold=0.1), {}),
    "reward_model of segments": (partial(reward_model, reduce=masked.sum, error=0.1), {}),
    "reference_kl": (partial(reference_kl, coefficient=0.1), over_vocabulary),
    "weighted_regression": (partial(weighted_regression, beta=0.5, cap=2.0), {"batch": Labeled}),
    "weighted_regression above the value": (
        partial(
            combine,
            policy=partial(weighted_regression, beta=0.5, advantage=above_value),
            value=partial(score_value, coefficient=0.5),
        ),
        {"batch": Labeled},
    ),
    "weighted_regression of experience": (
        partial(weighted_regression, beta=0.5, advantage=of_experience, aggregate=over_sequences),
        on_policy,
    ),
    "quark": (quark, {"batch": Labeled, "vocab": quark_vocab}),
    "gated": (
        partial(gated, objective=ppo, on=1, off=2, on_coefficient=0.1, off_coefficient=2.0),
        over_vocabulary,
    ),
    "ppo + value": (partial(combine, policy=ppo, value=partial(value, coefficient=0.1)), on_policy),
    "ppo + KL": (partial(combine, policy=ppo, kl=reference_kl), on_policy | over_vocabulary),
    **{
        f"distill, beta {beta}": (
            distill,
            {"vocab": partial(distill_vocab, beta=beta, temperature=2.0), "others": ("teacher",)},
        )
        for beta in (0.0, 0.3, 1.0)
    },
    "outcome": (outcome, {}),
    "outcome of states": (partial(outcome, target=of_the_state, coefficient=0.5), {}),
    "visit_counts": (visit_counts, {"vocab": visit_counts_vocab}),
    "discriminator": (partial(discriminator, smoothing=0.1), {}),
    "discriminator of texts": (partial(discriminator, aggregate=over_ends), {}),
    "energy": (energy, {"batch": Weighed}),
}


@pytest.mark.parametrize("name", OBJECTIVES)
def test_the_laws_hold_for(name):
    fn, arguments = OBJECTIVES[name]
    check_objective(fn, **arguments)


def weight_of(batch):
    return batch.mask.astype(jnp.float32)


def mean_inside(scores: Scores, batch: Labeled) -> Terms:
    loss = -masked.select(scores.logp, batch.mask) / jnp.maximum(batch.mask.sum(), 1)
    return Terms(loss, weight_of(batch), count=weight_of(batch))


def whitened_by_the_batch(scores: Scores, batch: Experience) -> Terms:
    advantage = masked.whiten(batch.advantage, batch.mask)
    return Terms(-advantage * masked.select(scores.logp, batch.mask), weight_of(batch))


def weight_from_scores(scores: Scores, batch: Labeled) -> Terms:
    logp = masked.select(scores.logp, batch.mask)
    return Terms(-logp, weight_of(batch) * (logp < -1.0))


def scale_from_scores(scores: Scores, batch: Labeled) -> Terms:
    logp = masked.select(scores.logp, batch.mask)
    return Terms(-logp, weight_of(batch), scale=jnp.exp(jnp.mean(logp)))


def times_zero(scores: Scores, batch: Experience) -> Terms:
    ratio = jnp.exp(jnp.clip(scores.logp - batch.old_logp, -20.0, 20.0))
    return Terms(-batch.advantage * ratio, weight_of(batch))


def nan_from_the_row(scores: Scores, batch: Labeled) -> Terms:
    return Terms(-scores.logp * jnp.exp(batch.score)[:, None], weight_of(batch))


def off_by_one(scores: Scores, batch: Labeled) -> Terms:
    return Terms(-jnp.roll(scores.logp, 1, axis=1), weight_of(batch))


def reads_the_last_column(scores: Scores, batch: Pairs) -> Terms:
    score = scores.reward[..., -1]
    weight = batch.mask.any(-1).all(-1).astype(jnp.float32)
    return Terms(jax.nn.softplus(score[:, 1] - score[:, 0]), weight)


def divides_by_the_width(scores: Scores, batch: Labeled) -> Terms:
    logp = masked.select(scores.logp, batch.mask)
    return Terms(-logp / batch.tokens.shape[1], weight_of(batch))


def counts_the_padding(scores: Scores, batch: Labeled) -> Terms:
    logp = masked.select(scores.logp, batch.mask)
    return Terms(-logp, weight_of(batch), count=jnp.ones(batch.tokens.shape))


def favours_the_first_row(scores: Scores, batch: Labeled) -> Terms:
    logp = masked.select(scores.logp, batch.mask)
    return Terms(-logp * jnp.arange(batch.tokens.shape[0], 0.0, -1.0)[:, None], weight_of(batch))


def overflows(scores: Scores, batch: Experience) -> Terms:
    ratio = jnp.exp(masked.select(scores.logp - batch.old_logp, batch.mask))
    return Terms(ratio, weight_of(batch))


def log_of_zero(scores: Scores, batch: Labeled) -> Terms:
    logp = masked.select(scores.logp, batch.mask) - 1e-3 * ~batch.mask
    return Terms(-jnp.log1p(-jnp.exp(logp)), weight_of(batch))


def averaged(scores: Scores, batch: Labeled) -> Terms:
    return Terms(masked.mean(-scores.logp, batch.mask), jnp.float32(1.0))


def integer_weight(scores: Scores, batch: Labeled) -> Terms:
    return Terms(-masked.select(scores.logp, batch.mask), batch.mask.astype(jnp.int32))


def metric_of_another_shape(scores: Scores, batch: Labeled) -> Terms:
    good = mle(scores, batch)
    return good.replace(metrics={"length": batch.mask.sum(1).astype(jnp.float32)})


def branches_on_a_value(scores: Scores, batch: Labeled) -> Terms:
    good = mle(scores, batch)
    return good if scores.logp.sum() < 0 else good.replace(loss=-good.loss)


def computes_in_bfloat16(scores: Scores, batch: Experience) -> Terms:
    surrogate = jnp.where(batch.mask, scores.logp * batch.advantage, 0.0)
    return Terms(-surrogate.astype(jnp.float32), weight_of(batch))


@jax.custom_batching.custom_vmap
def _own(x):
    return x


@_own.def_vmap
def _of_all_seeds(size, batched, x):
    return jnp.broadcast_to(x.mean(0), x.shape), True


def mixes_seeds(scores: Scores, batch: Experience) -> Terms:
    advantage = _own(masked.select(batch.advantage, batch.mask))
    return Terms(-advantage * masked.select(scores.logp, batch.mask), weight_of(batch))


def a_column_short(scores: Scores, batch: Labeled) -> Terms:
    good = mle(scores, batch)
    return good.replace(loss=good.loss[:, 1:])


def an_array(scores: Scores, batch: Labeled) -> Terms:
    return mle(scores, batch).loss


def always_nan(scores: Scores, batch: Labeled) -> Terms:
    return Terms(scores.logp * jnp.nan, weight_of(batch))


BROKEN = [
    (mean_inside, "additivity"),
    (whitened_by_the_batch, "additivity"),
    (weight_from_scores, "weights"),
    (scale_from_scores, "weights"),
    (times_zero, "nan"),
    (nan_from_the_row, "nan"),
    (off_by_one, "zero_gradient"),
    (reads_the_last_column, "zero_gradient"),
    (reads_the_last_column, "padding"),
    (divides_by_the_width, "padding"),
    (counts_the_padding, "padding"),
    (favours_the_first_row, "permutation"),
    (overflows, "extremes"),
    (log_of_zero, "extremes"),
    (averaged, "shapes"),
    (integer_weight, "shapes"),
    (metric_of_another_shape, "shapes"),
    (a_column_short, "shapes"),
    (an_array, "shapes"),
    (always_nan, "shapes"),
    (branches_on_a_value, "jit"),
    (computes_in_bfloat16, "bfloat16"),
    (mixes_seeds, "vmap"),
]


@pytest.mark.parametrize(("fn", "law"), BROKEN, ids=lambda x: getattr(x, "__name__", x))
def test_a_broken_objective_breaks_its_law(fn, law):
    with pytest.raises(BrokenLawError, match=f"law '{law}': .*"):
        check_objective(fn, laws=[law])


@pytest.mark.parametrize("fn", [a_column_short, an_array, always_nan])
def test_what_every_law_would_trip_over_is_said_first(fn):
    with pytest.raises(BrokenLawError, match=r"law 'shapes': .*"):
        check_objective(fn)


def test_every_law_is_broken_by_some_objective():
    assert {law for _, law in BROKEN} == set(LAWS)


def test_the_message_says_where_and_what_was_expected():
    with pytest.raises(BrokenLawError, match=r"scores\.logp is not 0 at \(\d, \d\), where weight"):
        check_objective(off_by_one, laws=["zero_gradient"])


def test_a_constant_denominator_is_allowed():
    def dr_grpo(scores: Scores, batch: Experience) -> Terms:
        length = jnp.maximum(batch.mask.sum(1, keepdims=True), 1)
        loss = -masked.select(batch.advantage, batch.mask) * masked.select(scores.logp, batch.mask)
        return Terms(loss, weight_of(batch), count=weight_of(batch) * 16.0 / length)

    check_objective(dr_grpo, laws=["shapes", "weights", "padding", "additivity"])


def test_a_sequence_objective_and_a_field_of_a_subclass_can_be_checked():
    @struct.dataclass
    class Gated(Labeled):
        gate: Float[Array, "b"]

    def gated(scores, batch):
        gate = jnp.where(batch.mask.any(1), batch.gate, 0.0)
        loss = -masked.sum(scores.logp, batch.mask, axis=1) * gate
        return Terms(loss, batch.mask.any(1).astype(jnp.float32))

    check_objective(gated, batch=Gated)
    check_objective(gated, batch=random_batch(Gated, seed=3), laws=["nan", "vmap"])


def test_the_random_batches_have_padding_holes_and_an_empty_row():
    for kind in (Labeled, Experience, Pairs):
        batch = random_batch(kind)
        text = batch.segments > 0
        assert not batch.mask[..., 0].any()
        assert not batch.mask[~text].any()
        assert (~text).any()
        holes = text[..., 1:-1] & ~batch.mask[..., 1:-1] & batch.mask[..., 2:]
        assert holes.any()
        assert (~batch.mask.any(-1)).sum() == 1


def test_an_objective_that_does_not_say_its_batch_is_asked_for_it():
    with pytest.raises(ValueError, match=r"pass\s+check_objective\(batch=Labeled\)"):
        check_objective(lambda scores, batch: None)


def test_a_law_that_does_not_exist_is_answered_with_those_that_do():
    with pytest.raises(ValueError, match=r"additivity"):
        check_objective(mle, laws=["gravity"])


def test_a_field_without_shape_is_asked_for():
    @struct.dataclass
    class Odd(Sequences):
        thing: object

    with pytest.raises(ValueError, match=r"Odd\.thing has no annotation"):
        check_objective(mle, batch=Odd)


def test_missing_inputs_are_named():
    batch = jax.tree.map(jnp.asarray, random_batch(Experience))
    scores = Scores(logp=batch.logp)
    with pytest.raises(ValueError, match=r"needs scores\.value"):
        value(scores, batch)
    with pytest.raises(ValueError, match="vocab=reference_kl_vocab"):
        reference_kl(scores, batch)
    with pytest.raises(ValueError, match=r"needs scores\.entropy"):
        ppo(scores, batch, entropy_coefficient=0.1)
    with pytest.raises(ValueError, match=r"needs scores\.reward"):
        reward_model(Scores(), jax.tree.map(jnp.asarray, random_batch(Pairs)))
    with pytest.raises(ValueError, match="'teacher'"):
        logits = jnp.zeros((batch.tokens.size, 5))
        flat = jax.tree.map(lambda x: jnp.zeros(batch.tokens.size, x.dtype), batch)
        reference_kl_vocab({"self": logits, "teacher": logits}, flat)


def test_no_metric_of_ppo_is_needed_to_compute_its_loss():
    batch = jax.tree.map(jnp.asarray, random_batch(Experience))
    without = ppo(Scores(logp=batch.logp), batch)
    with_entropy = ppo(Scores(logp=batch.logp, entropy=-batch.logp), batch)
    np.testing.assert_array_equal(without.loss, with_entropy.loss)
    assert "entropy" in with_entropy.metrics


FOLDER = Path(objectives.__file__).parent
KNOWN = {"__future__", "collections", "dataclasses", "functools", "math", "types", "typing"}
KNOWN |= {"jax", "jaxtyping", "numpy"}
OURS = {"masked", "types", "aggregate", "ratios", "comparisons", "advantages", "objectives"}


@pytest.mark.parametrize("path", sorted(FOLDER.glob("*.py")), ids=lambda path: path.stem)
def test_an_objective_knows_no_model_no_mesh_no_key_and_no_mean(path):
    tree = ast.parse(path.read_text(encoding="utf-8"))
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            assert {alias.name.split(".")[0] for alias in node.names} <= KNOWN
        elif isinstance(node, ast.ImportFrom) and node.module == "rlhf_jax":
            assert {alias.name for alias in node.names} <= OURS
        elif isinstance(node, ast.ImportFrom):
            top, _, rest = node.module.partition(".")
            assert rest.split(".")[0] in OURS if top == "rlhf_jax" else top in KNOWN
        elif isinstance(node, ast.Call) and getattr(node.func, "attr", "") == "mean":
            # Along one axis of an array (members of a group) it is part of a formula. Over rows it
            # would be the trainer's business: only a `prepare` may, which sees the whole batch.
            functions = [f for f in ast.walk(tree) if isinstance(f, ast.FunctionDef)]
            inside = {f.name for f in functions if node in ast.walk(f)}
            along = any(keyword.arg == "axis" for keyword in node.keywords)
            assert along or inside <= {"kto_reference", "self_normalised"}
