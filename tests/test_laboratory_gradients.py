"""Expected gradients over all batches, against the truth and against the trainer itself."""

from functools import partial
from itertools import product

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import toys
from numpy.testing import assert_allclose
from toy_chain import OUTPUTS, REFERENCE, REWARD, START, reference_params

from rlhf_jax import exact, masked
from rlhf_jax.advantages import batch_mean, group_relative, leave_one_out, reward_to_go
from rlhf_jax.aggregate import over_prompts, over_sequences, over_tokens
from rlhf_jax.config import Learner
from rlhf_jax.models.transformer import Transformer
from rlhf_jax.objectives import combine, ppo, reinforce, sampled_kl
from rlhf_jax.objectives import value as value_loss
from rlhf_jax.ratios import k1, k2, k3
from rlhf_jax.step import evaluate

ARMS = exact.enumerate_outputs(prompt=[0], vocab=3, length=1)  # three texts of one token
ARM = toys.Table(3)
ARM_REWARD = np.array([1.0, 0, 2])
ENDING = exact.enumerate_outputs(prompt=[0], vocab=3, length=2, stop=[1])  # of one or two tokens
ENDING_REWARD = np.random.default_rng(0).normal(size=len(ENDING))


def softmax(x):
    return exact.maxent(np.array(x), temperature=1.0)


def arm_params(logits=(0.3, -0.2, 0.5)):
    return toys.markov(np.tile(logits, (3, 1)))


def leaf(grads):
    return np.asarray(grads["head"]["kernel"], np.float64)


def expected(outputs, reward, params, model, **options):
    logp = exact.token_logp(params, outputs, model=model)
    texts = exact.experience(outputs, reward, logp=logp)
    p = exact.probabilities(params, outputs, model=model)
    options = {"objective": reinforce, "rows": 2} | options
    found = exact.expected_gradient({"self": params}, texts, p, models={"self": model}, **options)
    return found[0], found[1]


def of_reward(outputs, reward, params, model):
    """∇ E[R]."""
    return exact.gradient_of(
        lambda logp: (jnp.exp(logp) * jnp.asarray(reward, jnp.float32)).sum(),
        params,
        outputs,
        model=model,
    )


@pytest.mark.parametrize(
    ("objective", "advantage", "rows", "share"),
    [
        (reinforce, reward_to_go, 1, 1.0),
        (reinforce, leave_one_out, 2, 1.0),
        (reinforce, batch_mean, 2, 1 / 2),  # (B − 1)/B
        (partial(ppo, aggregate=over_sequences), reward_to_go, 2, 1.0),
    ],
)
def test_baselines_and_the_truth(objective, advantage, rows, share):
    params = reference_params()
    value, truth = of_reward(OUTPUTS, REWARD, params, REFERENCE)
    assert_allclose(value, START @ REWARD, atol=1e-6)
    options = {"objective": objective, "advantage": advantage, "rows": rows}
    _, grads = expected(OUTPUTS, REWARD, params, REFERENCE, **options)
    assert_allclose(-leaf(grads), share * leaf(truth), atol=1e-5)


@pytest.mark.parametrize(("own", "share"), [(True, 2 / 3), (False, 1.0)])
def test_a_mean_that_the_sample_is_part_of_shrinks_the_gradient(own, share):
    truth = leaf(of_reward(ARMS, ARM_REWARD, arm_params(), ARM)[1])
    options = {"advantage": partial(batch_mean, own=own), "rows": 3}
    _, grads = expected(ARMS, ARM_REWARD, arm_params(), ARM, **options)
    assert_allclose(-leaf(grads), share * truth, atol=1e-6)


def test_dividing_by_the_groups_deviation_turns_the_gradient():
    truth = leaf(of_reward(ARMS, ARM_REWARD, arm_params(), ARM)[1])[0]
    advantage = partial(group_relative, epsilon=1e-7)
    _, grads = expected(ARMS, ARM_REWARD, arm_params(), ARM, advantage=advantage)
    assert_allclose(-leaf(grads)[0] / truth, [1, 0.645230, 0.725931], atol=1e-5)


def test_a_mean_over_tokens_is_biased_when_lengths_differ_and_one_over_texts_is_not():
    params = ARM.init(jax.random.key(0))
    given = ENDING, ENDING_REWARD, params, ARM
    truth = leaf(of_reward(*given)[1])
    by_text, by_token, by_group = (
        -leaf(expected(*given, objective=objective, advantage=leave_one_out)[1])
        for objective in (
            reinforce,
            partial(reinforce, aggregate=over_tokens),
            partial(reinforce, aggregate=over_prompts),
        )
    )
    assert_allclose(by_text, truth, atol=1e-6)
    parallel = (by_token * truth).sum() / (truth**2).sum() * truth
    assert np.abs(by_token - parallel).max() > 0.01 * np.abs(parallel).max()
    assert_allclose(by_group, by_token, atol=1e-6)  # one prompt: the same mean


def test_a_kl_penalty_on_the_reward_climbs_the_reward_minus_the_kl():
    """Also when texts end early, and with no gradient through the penalty itself."""
    params, ref_params = ARM.init(jax.random.key(0)), ARM.init(jax.random.key(1))
    logp, ref_logp = (exact.token_logp(x, ENDING, model=ARM) for x in (params, ref_params))
    reward = exact.token_rewards(ENDING_REWARD, ENDING) - 0.3 * (logp - ref_logp)
    _, grads = expected(ENDING, reward, params, ARM, advantage=reward_to_go)
    start = exact.probabilities(ref_params, ENDING, model=ARM)

    def gain(logp):
        p = jnp.exp(logp)
        return (p * (jnp.asarray(ENDING_REWARD) - 0.3 * (logp - jnp.log(start)))).sum()

    _, truth = exact.gradient_of(gain, params, ENDING, model=ARM)
    assert_allclose(-leaf(grads), leaf(truth), atol=1e-6)


def test_it_is_the_mean_of_the_trainers_own_gradients_over_every_batch():
    """PPO, a critic and an entropy bonus on a transformer, texts of several lengths."""
    model = Transformer(
        vocab=3, width=8, layers=1, heads=2, kv_heads=1, mlp=8, value_head=True, head_dim=4
    )
    params = toys.weights(model)
    objective = partial(
        combine,
        policy=partial(ppo, entropy_coefficient=0.1),
        value=partial(value_loss, clip=None, coefficient=0.3),
    )
    logp = exact.token_logp(params, ENDING, model=model)
    texts = exact.experience(
        ENDING, ENDING_REWARD, logp=0.9 * logp, value=np.where(ENDING.mask, 0.3, 0.0)
    )
    p = exact.probabilities(params, ENDING, model=model)
    value, grads = exact.expected_gradient(
        {"self": params},
        texts,
        p,
        models={"self": model},
        objective=objective,
        advantage=leave_one_out,
        rows=2,
    )

    def trainers_loss(params, index):
        batch = jax.tree.map(lambda x: x[index], texts)
        advantage, target = leave_one_out(batch.reward, batch.value, batch.mask, batch.prompt_id)
        batch = batch.replace(advantage=advantage, target=target)
        return evaluate(params, {}, batch, learner=Learner(model, objective), models={})["loss"]

    index = np.array(list(product(range(len(ENDING)), repeat=2)))
    weight = p[index].prod(axis=1)
    every = jax.jit(jax.vmap(jax.value_and_grad(trainers_loss), in_axes=(None, 0)))(params, index)
    means = jax.tree.map(lambda x: np.tensordot(weight, np.asarray(x, np.float64), 1), every)
    assert_allclose(value, means[0], rtol=1e-5)
    jax.tree.map(lambda a, b: assert_allclose(a, b, rtol=1e-4, atol=1e-6), grads, means[1])


def test_a_gradient_respects_the_alphabet():
    few = exact.enumerate_outputs(prompt=[0], vocab=3, length=1, alphabet=[0, 2])
    _, grads = of_reward(few, ARM_REWARD[[0, 2]], arm_params(), ARM)
    p = softmax([0.3, 0.5])
    assert_allclose(leaf(grads)[0], [-p[0] * p[1], 0, p[0] * p[1]], atol=1e-6)


# ---- estimators of KL, on one token: π = softmax(.3, −.2, .5), ref = softmax(0, .4, −.1)

PI, REF = softmax([0.3, -0.2, 0.5]), softmax([0.0, 0.4, -0.1])
OF_KL = [0.022440, -0.179420, 0.156980]  # ∇ KL(π‖ref)
OF_REVERSE_KL = PI - REF  # ∇ KL(ref‖π)


def test_k1_and_k3_are_unbiased_and_k2_is_not():
    first, second, third = (np.asarray(k(jnp.log(PI), jnp.log(REF))) for k in (k1, k2, k3))
    assert_allclose([PI @ first, PI @ third, exact.kl(PI, REF)], 0.119788, atol=1e-6)
    assert_allclose(PI @ second, 0.111461, atol=1e-6)
    spread = [PI @ (k - PI @ k) ** 2 for k in (first, third)]
    assert_allclose(spread, [0.208572, 0.013562], atol=1e-6)


@pytest.mark.parametrize(
    ("estimator", "gradient"),
    [(k1, np.zeros(3)), (k2, OF_KL), (k3, OF_REVERSE_KL)],
)
def test_what_a_kl_estimator_as_a_loss_descends(estimator, gradient):
    grads = kl_gradient(ARM_REWARD, partial(sampled_kl, estimator=estimator), None)
    assert_allclose(grads, gradient, atol=1e-6)
    assert_allclose(OF_REVERSE_KL, [0.059208, -0.224725, 0.165516], atol=1e-6)


def test_k1_in_the_reward_descends_the_kl():
    assert_allclose(kl_gradient(-np.log(PI / REF), reinforce, reward_to_go), OF_KL, atol=1e-6)
    _, grads = exact.gradient_of(
        lambda logp: (jnp.exp(logp) * (logp - jnp.log(jnp.asarray(REF, jnp.float32)))).sum(),
        arm_params(),
        ARMS,
        model=ARM,
    )
    assert_allclose(leaf(grads)[0], OF_KL, atol=1e-6)


def kl_gradient(reward, objective, advantage):
    logp, ref_logp = (np.pad(np.log(x)[:, None], ((0, 0), (1, 0))) for x in (PI, REF))
    texts = exact.experience(ARMS, reward, logp=logp, ref_logp=ref_logp)
    _, grads = exact.expected_gradient(
        {"self": arm_params()},
        texts,
        PI,
        models={"self": ARM},
        objective=objective,
        advantage=advantage,
        rows=1,
    )
    return leaf(grads)[0]


# ---- statistics of the batch, other models, mistakes


def test_prepare_sees_the_scores_without_gradient_and_other_models_are_scored():
    """A penalty on the batch's mean log-ratio, made before the update, is a constant."""

    def prepare(scores, batch):
        gap = masked.mean(scores.logp - scores["reference"].logp, batch.mask)
        return batch.replace(advantage=jnp.where(batch.mask, 1.0 + gap, 0.0))

    logp = exact.token_logp(arm_params(), ARMS, model=ARM)
    texts = exact.experience(ARMS, ARM_REWARD, logp=logp)
    params = {"self": arm_params(), "reference": arm_params((0.0, 0.4, -0.1))}
    value, grads = exact.expected_gradient(
        params,
        texts,
        PI,
        models={"self": ARM, "reference": ARM},
        objective=reinforce,
        prepare=prepare,
        rows=1,
    )
    advantage = 1 + np.log(PI / REF)
    assert_allclose(value, -PI @ (advantage * np.log(PI)), rtol=1e-5)
    # E ∇log π = 0 leaves −E[log(π/ref) ∇log π] = −∇KL.
    assert_allclose(leaf(grads)[0], [-x for x in OF_KL], atol=1e-6)


def test_too_many_batches_are_counted_and_the_way_out_is_named():
    texts = exact.experience(OUTPUTS, REWARD, logp=np.zeros(OUTPUTS.mask.shape))
    with pytest.raises(ValueError, match=r"64 texts in 4 rows .*16,777,216 .*rows=3.*most 47"):
        exact.expected_gradient({}, texts, START, models={}, objective=reinforce, rows=4)


# ---- the gradient's path


def test_policy_gradient_breaks_ties_for_the_likelier_and_natural_gradient_keeps_them():
    p, reward, times = np.array([0.4, 0.3, 0.3]), np.array([1.0, 1, 0]), [10, 100, 1000]
    flow = exact.gradient_flow(p, reward, times)
    assert_allclose(flow[:, 0] / flow[:, 1], [1.66670, 2.89167, 7.01337], atol=1e-5)
    for q in (exact.tilted(p, reward, beta=1 / 10), exact.best_of_n(p, reward, 16)):
        assert_allclose(q[0] / q[1], 4 / 3)


def test_the_flow_starts_with_the_known_change_of_entropy_and_ends_at_the_tilt():
    p, reward = softmax([0.3, -0.2, 0.5]), np.array([1.0, 0, 2])
    early = exact.gradient_flow(p, reward, [0, 1e-4])
    rate = (exact.entropy(early[1]) - exact.entropy(early[0])) / 1e-4
    assert_allclose(rate, -0.058508, atol=2e-5)
    end = exact.gradient_flow(p, reward, [1000], beta=1.0)[0]
    assert_allclose(end, exact.tilted(p, reward, beta=1.0), atol=1e-8)


def test_a_flow_needs_all_texts_and_ascending_times():
    with pytest.raises(ValueError, match="p > 0 everywhere"):
        exact.gradient_flow(np.array([1.0, 0]), np.zeros(2), [1])
    with pytest.raises(ValueError, match="must ascend"):
        exact.gradient_flow(np.array([0.5, 0.5]), np.zeros(2), [2, 1])
