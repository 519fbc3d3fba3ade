import os
import subprocess
import sys
import time
from functools import partial
from types import SimpleNamespace

import host_scores
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from numpy.testing import assert_allclose, assert_array_equal

from rlhf_jax import hostpool, masked, rewards
from rlhf_jax.ratios import k1, k2, k3
from rlhf_jax.rewards import RewardError, from_model, from_text
from rlhf_jax.testing import random_batch
from rlhf_jax.types import Rollout

PARAMS = {"reward": {"w": jnp.float32(2.0)}}


def decode(ids):
    """Tokens 3, 4, … are a, b, …; 0 is padding, 1 BOS and 2 EOS, which a text does not show."""
    return "".join(chr(ord("a") + i - 3) for i in ids if i > 2)


def rollout(*responses, prompt=(3,), holes=()):
    """Rows of BOS, prompt, response, with `holes` among the response's tokens not masked in."""
    p = 1 + len(prompt)
    t = p + max(len(r) for r in responses) + 1
    base = jax.tree.map(lambda x: x[:1].repeat(len(responses), 0), random_batch(Rollout))
    tokens = np.zeros((len(responses), t), np.int32)
    mask, segments = np.zeros(tokens.shape, bool), np.zeros(tokens.shape, np.int32)
    for i, response in enumerate(responses):
        row = [1, *prompt, *response]
        tokens[i, : len(row)], segments[i, : len(row)], mask[i, p : len(row)] = row, 1, True
    mask[:, [p + h for h in holes]] = False
    ended = np.array([len(r) > 0 and r[-1] == 2 for r in responses])
    return base.replace(**jax.tree.map(jnp.asarray, dict(
        tokens=tokens, mask=mask, segments=segments, ended=ended,
        logp=np.zeros(tokens.shape, np.float32), behaviour_logp=np.zeros(tokens.shape, np.float32),
    )))  # fmt: skip


AB = rollout([4, 3, 2], [3, 2], [], [3, 3, 3, 2])
text = partial(from_text, decode=decode, workers=2)


def test_a_score_lands_on_the_last_token_in_float32_exactly():
    reward = text(host_scores.seventy)(AB, {})
    assert reward.dtype == jnp.float32
    last = np.asarray(masked.is_last(AB.mask))
    assert_array_equal(np.asarray(reward)[last], np.float32(0.7))
    assert_array_equal(np.asarray(reward)[~last], 0.0)
    assert last.sum() == 3


def test_each_row_gets_the_score_of_its_own_text():
    many = rollout(*[[3] * (i % 7) + [2] for i in range(40)])
    reward = text(host_scores.length)(many, {})
    assert_array_equal(reward.sum(1), [1 + i % 7 for i in range(40)])
    alone = text(host_scores.length, prompt=False)(many, {})
    assert_array_equal(alone.sum(1), [i % 7 for i in range(40)])


def test_the_tokens_themselves_are_decoded_holes_and_all():
    shown = []
    holed = rollout([4, 3, 5, 2], holes=(1,))
    from_text(host_scores.length, decode=lambda x: shown.append(x) or "text")(holed, {})
    from_text(host_scores.length, decode=lambda x: shown.append(x) or "text", prompt=False)(
        holed, {}
    )
    assert shown == [[1, 3, 4, 3, 5, 2], [4, 5, 2]]


def test_a_function_that_asks_for_it_is_told_the_prompt_that_a_text_answers():
    named = AB.replace(prompt_id=jnp.array([7, 0, 2, 3]))
    reward = text(host_scores.names_its_prompt, by_prompt=True)(named, {})
    assert_array_equal(reward.sum(1), [703, 2, 0, 304])
    with pytest.raises(
        RewardError, match=r"names_its_prompt raised on row \d\n +text: \('\w+', \d\)"
    ):
        text(partial(host_scores.names_its_prompt, wrong=1), by_prompt=True)(named, {})


def test_numbers_of_other_kinds_are_numbers():
    assert_array_equal(text(host_scores.fraction)(AB, {}).sum(1), [1.5, 1, 0, 2])
    assert_array_equal(text(host_scores.is_long)(AB, {}).sum(1), [0, 0, 0, 1])


def test_scalars_of_array_libraries_are_numbers_and_their_vectors_are_not():
    for scalar in (np.float32(0.5), np.float64(0.5), np.array(0.5), jnp.float32(0.5)):
        assert hostpool._scored(lambda text, x=scalar: x, "text") == ("value", 0.5)
    for other in (np.zeros(1), jnp.zeros(1), np.zeros((0,))):
        assert hostpool._scored(lambda text, x=other: x, "text")[0] == "type"


def test_the_workers_survive_from_call_to_call_and_leave_the_accelerator_alone():
    one = text(host_scores.where, workers=1)
    pids = np.asarray([one(AB, {}).max(), one(AB, {}).max()])
    assert pids[0] == pids[1] != os.getpid()
    os.environ["JAX_PLATFORMS"] = "unchanged"
    try:
        assert text(host_scores.platform, workers=1)(AB, {}).max() == 1.0
        assert os.environ["JAX_PLATFORMS"] == "unchanged"
    finally:
        os.environ["JAX_PLATFORMS"] = "cpu"


def test_the_time_of_a_sample_starts_when_the_sample_does():
    four = rollout(*[[3, 2]] * 4)  # 2 s in all, each of them below its 1.5
    assert text(host_scores.slow, timeout=1.5, workers=1)(four, {}).sum() == 4.0


BAD = rollout([3, 2], [3, 4, 2], [3, 2])


@pytest.mark.parametrize(
    ("score", "message"),
    [
        (host_scores.hangs_on_b, "took longer than 2 s on row 1"),
        (host_scores.fails_on_b, "raised on row 1\n  text: 'aab'\n.*KeyError: 'b'"),
        (host_scores.nan_on_b, "returned nan on row 1"),
        (host_scores.infinite_on_b, "returned inf on row 1"),
        (host_scores.two_on_b, r"one number per text, but returned list: \[1.0, 2.0\] on row 1"),
        (host_scores.none_on_b, "one number per text, but returned NoneType: None on row 1"),
        (host_scores.words, "one number per text, but returned str: '0.7' on row"),
        (host_scores.dies_on_b, r"died \(exit code 3.*\) while it scored row 1"),
    ],
    ids=lambda x: getattr(x, "__name__", ""),
)
def test_what_goes_wrong_is_an_error_that_shows_the_row_and_never_a_silent_0(score, message):
    began = time.monotonic()
    with pytest.raises(RewardError, match=f"(?s){message}") as error:
        text(score, timeout=2.0)(BAD, {})
    assert "text: '" in str(error.value)
    assert time.monotonic() - began < 20


def test_the_first_of_several_that_fail_is_shown_whichever_was_done_first():
    rows = rollout([3, 2], [3] * 19 + [2], [3, 2])
    with pytest.raises(RewardError, match="on row 0"):
        text(host_scores.nan_sooner_if_longer, workers=2)(rows, {})


def test_after_a_failure_the_same_reward_works_again():
    reward = text(host_scores.dies_on_b)
    with pytest.raises(RewardError):
        reward(BAD, {})
    assert reward(rollout([3, 2], [3, 2]), {}).sum() == 2.0


def test_the_row_named_is_the_rollouts_although_empty_rows_are_not_scored():
    with pytest.raises(RewardError, match="on row 2"):
        text(host_scores.nan_on_b)(rollout([3, 2], [], [4, 2]), {})


def test_a_row_without_a_masked_token_is_not_scored_and_gets_0():
    shown = []
    reward = from_text(host_scores.seventy, decode=lambda ids: shown.append(ids) or "text")(AB, {})
    assert len(shown) == 3
    assert not reward[2].any()


def test_a_function_without_a_module_level_name_is_refused_with_what_to_do():
    with pytest.raises(RewardError, match="define it with def at the top level of a module"):
        text(lambda text: 1.0)(AB, {})


def test_a_function_whose_module_workers_cannot_import_is_refused(monkeypatch):
    module = SimpleNamespace(__name__="nowhere")

    def score(text):
        return 1.0

    score.__module__, score.__qualname__ = "nowhere", "score"
    module.score = score
    monkeypatch.setitem(sys.modules, "nowhere", module)
    with pytest.raises(RewardError, match=r"(?s)could not import.*No module named 'nowhere'"):
        text(score, workers=1)(AB, {})


def test_from_text_asks_for_exactly_one_way_to_decode():
    for arguments in ({}, {"decode": decode, "tokenizer": "bytes"}):
        with pytest.raises(ValueError, match="and not both"):
            from_text(host_scores.length, **arguments)
    with pytest.raises(ValueError, match="seconds per sample"):
        from_text(host_scores.length, decode=decode, timeout=0.0)
    with pytest.raises(ValueError, match="at least 1"):
        hostpool.Pool(host_scores.length, 0)


def run_script(path, *lines):
    """A user's own script, without `if __name__ == "__main__"`; its output."""
    path.write_text("\n".join(("from rlhf_jax.hostpool import Pool", *lines)))
    env = {**os.environ, "PYTHONPATH": os.path.dirname(__file__)}
    run = subprocess.run([sys.executable, path], env=env, capture_output=True, timeout=120)
    return run.returncode, run.stdout.decode(), run.stderr.decode()


def test_workers_end_with_the_program_and_do_not_run_it_again(tmp_path):
    code, out, err = run_script(
        tmp_path / "script.py",
        "import host_scores",
        "print('once')",
        "print(int(Pool(host_scores.where, 1).map(['x'], timeout=30)[0]))",
    )
    assert code == 0, err
    once, pid = out.split()
    assert once == "once"
    with pytest.raises(ProcessLookupError):
        os.kill(int(pid), 0)


def test_a_function_of_the_running_script_is_refused_with_what_to_do(tmp_path):
    code, _, err = run_script(
        tmp_path / "script.py",
        "def score(text): return 1.0",
        "Pool(score, 1).map(['x'], timeout=30)",
    )
    assert code == 1
    assert "defined in the script that runs, not in a module); define it with def" in err


class ReadsPositions:
    """A model whose value after a token is w · (1 + the token's index) · segment."""

    def apply(self, params, tokens, *, segments):
        index = jnp.arange(tokens.shape[1], dtype=jnp.float32)[None, :, None]
        return SimpleNamespace(hidden=(1 + index) * segments[..., None])

    def value(self, params, hidden):
        return params["w"] * hidden[..., 0]


def test_from_model_pays_the_value_after_the_last_masked_token():
    reward = jax.jit(partial(from_model, model=ReadsPositions()))(AB, PARAMS)
    assert_array_equal(reward.sum(1), [2.0 * 5, 2.0 * 4, 0.0, 2.0 * 6])
    assert_array_equal(reward != 0, masked.is_last(AB.mask))
    other = from_model(AB, {"judge": PARAMS["reward"]}, model=ReadsPositions(), learner="judge")
    assert_array_equal(other, reward)


def test_from_model_does_not_depend_on_what_padding_holds():
    spoilt = AB.replace(tokens=jnp.where(AB.segments > 0, AB.tokens, 77))
    assert_array_equal(
        from_model(spoilt, PARAMS, model=ReadsPositions()),
        from_model(AB, PARAMS, model=ReadsPositions()),
    )


RNG = np.random.default_rng(0)
LOGP, REF = (jnp.asarray(RNG.normal(size=AB.mask.shape), jnp.float32) for _ in range(2))


def test_the_sum_of_rewards_is_the_score_minus_beta_times_the_sum_of_kl():
    score = jnp.array([0.7, -1.0, 3.0, 2.0])
    reward = rewards.minus_kl(masked.at_last(score, AB.mask), k1(LOGP, REF), AB.mask, 0.15)
    kl = np.where(AB.mask, np.float64(LOGP) - np.float64(REF), 0.0).sum(1)
    expected = np.where(AB.mask.any(1), score, 0.0) - 0.15 * kl
    assert_allclose(reward.sum(1), expected, rtol=1e-5, atol=1e-6)


def test_the_kl_penalty_is_paid_for_saying_what_the_reference_would_not():
    more_likely = rewards.minus_kl(jnp.zeros_like(LOGP), k1(REF + 0.5, REF), AB.mask, 0.1)
    assert_allclose(more_likely, np.where(AB.mask, -0.05, 0.0), rtol=1e-4)


def test_masked_nan_touches_no_reward():
    def spoil(x):
        return jnp.where(AB.mask, x, jnp.nan)

    clean = rewards.minus_kl(jnp.ones_like(LOGP), k1(LOGP, REF), AB.mask, 0.1)
    spoilt = rewards.minus_kl(spoil(jnp.ones_like(LOGP)), k1(spoil(LOGP), spoil(REF)), AB.mask, 0.1)
    assert_array_equal(clean, spoilt)
    assert_array_equal(clean[~AB.mask], 0.0)
    normal = rewards.normalise(spoil(LOGP), AB.mask, 1.0, 2.0)
    assert_array_equal(normal, rewards.normalise(LOGP, AB.mask, 1.0, 2.0))


def test_kl_estimators_by_hand_and_clamped():
    assert_allclose(k1(-1.0, -1.5), 0.5)
    assert_allclose(k2(-1.0, -1.5), 0.125)
    assert_allclose(k3(-1.0, -1.5), np.exp(-0.5) - 0.5, rtol=1e-6)
    assert_allclose(k3(-1000.0, 0.0), np.exp(20) - 21, rtol=1e-6)


def test_kl_estimators_average_to_the_kl():
    p, q = np.array([0.6, 0.3, 0.1]), np.array([0.3, 0.3, 0.4])
    kl = (p * np.log(p / q)).sum()
    for estimator in (k1, k3):
        assert_allclose((p * estimator(jnp.log(p), jnp.log(q))).sum(), kl, rtol=1e-5)
    assert (p * k2(jnp.log(p), jnp.log(q))).sum() > 0


@pytest.mark.parametrize(
    ("kl", "change"), [(6.0, 0.0), (6.6, 0.1), (7.2, 0.2), (60.0, 0.2), (5.4, -0.1), (0.0, -0.2)]
)
def test_the_kl_coefficient_follows_its_target(kl, change):
    new = rewards.adaptive_kl(0.15, kl, 64, target=6.0, horizon=10_000)
    assert new.dtype == jnp.float32
    assert_allclose(new, 0.15 * (1 + change * 64 / 10_000), rtol=1e-6)


def test_a_kl_coefficient_of_0_stays_0():
    assert rewards.adaptive_kl(0.0, 100.0, 64) == 0.0


def test_texts_that_were_cut_off_pay_the_penalty_on_their_last_token():
    cut = rollout([3, 2], [3, 3], [])
    reward = rewards.missing_eos(jnp.ones(cut.mask.shape), cut, penalty=1.5)
    assert_allclose(reward.sum(1) - cut.mask.shape[1], [0.0, -1.5, 0.0])
    assert reward[1, masked.last_index(cut.mask)[1]] == -0.5


def test_length_is_paid_for_beyond_its_target():
    shaped = partial(rewards.length_penalty, rollout=AB, coefficient=0.1)
    zero = jnp.zeros(AB.mask.shape)
    assert_allclose(shaped(zero).sum(1), [-0.3, -0.2, 0.0, -0.4], rtol=1e-6)
    assert_allclose(shaped(zero, target=3).sum(1), [0.0, 0.0, 0.0, -0.1], rtol=1e-6)
    assert_array_equal(shaped(zero) != 0, masked.is_last(AB.mask))


def test_normalised_token_rewards_sum_to_the_normalised_score():
    reward = jnp.where(AB.mask, LOGP, 0.0)
    total = rewards.normalise(reward, AB.mask, 0.3, 2.0).sum(1)
    expected = np.where(AB.mask.any(1), (reward.sum(1) - 0.3) / 2.0, 0.0)
    assert_allclose(total, expected, rtol=1e-5, atol=1e-6)


def test_normalising_by_mean_0_and_variance_1_changes_no_bit():
    reward = masked.at_last(jnp.full(4, 0.7), AB.mask)
    assert_array_equal(rewards.normalise(reward, AB.mask, 0.0, 1.0), reward)


def test_a_reward_is_checked_before_it_is_learned_from():
    good = jnp.where(AB.mask, 1.0, 0.0)
    rewards.check(good, AB)
    with pytest.raises(
        RewardError, match=r"row 1 is not finite at token 2: nan \(1 such rows\)\n  'aa'"
    ):
        rewards.check(good.at[1, 2].set(jnp.nan), AB, decode=decode)
    with pytest.raises(RewardError, match=r"row 2 is not 0 outside the mask.*\n  tokens \[1, 3\]"):
        rewards.check(good.at[2, 2].set(1.0), AB)
    with pytest.raises(RewardError, match=r"this one is float32 \[4\].*masked\.at_last"):
        rewards.check(good.sum(1), AB)
    with pytest.raises(RewardError, match="this one is int32"):
        rewards.check(good.astype(jnp.int32), AB)
