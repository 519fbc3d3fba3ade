"""Whole runs of experiments/smoke.py: resume, meshes, signals, and what stops a run."""

import json
import os
import shutil
import signal
import subprocess
import sys
import time
from dataclasses import replace
from functools import partial
from pathlib import Path
from types import SimpleNamespace

import chex
import jax
import jax.numpy as jnp
import numpy as np
import pytest
import toy_sft

from rlhf_jax import experience, feed, lanes, objectives, runs
from rlhf_jax import train as loop
from rlhf_jax.checkpoint import Checkpoints, restore_params
from rlhf_jax.config import Checkpointing, Config, ConfigError, From, Learner, Pipeline
from rlhf_jax.data import tokenizers
from rlhf_jax.experiment import load
from rlhf_jax.feed import RunError
from rlhf_jax.hostpool import RewardError
from rlhf_jax.metrics import Meter
from rlhf_jax.optimizer import sgd
from rlhf_jax.phases import phase_key
from rlhf_jax.start import abstract_rollout, abstract_state, begin

EXPERIMENTS = Path(__file__).parent.parent / "experiments"
SMOKE = EXPERIMENTS / "smoke.py"


def smoke(**changes) -> Config:
    return replace(load(SMOKE), mesh=(1, 1, 1, 1), **changes)


def train(config, out, **options):
    """On the first devices, as many as the mesh needs."""
    devices = jax.devices()[: int(np.prod(config.mesh))]
    return loop.train(config, out, devices=devices, **options)


def bits(tree):
    return [np.asarray(x).tobytes() for x in jax.tree.leaves(tree)]


def log(out):
    """metrics.jsonl without what a clock says."""
    rows = [json.loads(line) for line in (out / "metrics.jsonl").read_text().splitlines()]
    timed = ("time", "speed", "wall")
    return [{k: v for k, v in row.items() if not k.startswith(timed)} for row in rows]


pytestmark = pytest.mark.usefixtures("compiled_once")


KEPT = Checkpointing(every=1, keep=4)


@pytest.fixture(scope="module")
def whole(tmp_path_factory):
    """Four steps without a stop: the state at the end, and its directory."""
    out = tmp_path_factory.mktemp("whole")
    return train(smoke(steps=4, checkpoint=KEPT), out), out


def stopped(whole, out, step):
    """The directory of the run if it had been killed after that step's checkpoint."""
    shutil.copytree(whole[1], out, dirs_exist_ok=True)
    for later in range(step + 1, 5):
        shutil.rmtree(out / "checkpoints" / str(later))
    assert (out / "checkpoints" / str(step)).is_dir()
    return out


def test_a_resumed_run_equals_one_that_never_stopped_bit_for_bit(whole, tmp_path):
    state, out = whole
    resumed = train(smoke(steps=4), stopped(whole, tmp_path, 2), resume=True)
    assert bits(resumed) == bits(state)
    assert log(tmp_path) == log(out)
    assert [row["step"] for row in log(tmp_path)] == [0, 1, 2, 3]


def test_the_reward_model_learns_at_every_second_step_and_the_others_at_each(whole):
    state, _ = whole
    steps = {name: int(learner.step) for name, learner in state.learners.items()}
    assert steps == {"policy": 8, "critic": 8, "reward": 2}


def test_a_run_resumes_on_another_mesh_from_the_same_bits(whole, tmp_path):
    state, _ = whole
    config = replace(smoke(steps=4), mesh=(2, 2, 2, 1))
    resumed = train(config, stopped(whole, tmp_path, 3), resume=True)
    # The weights restored are the same bits; one step later only the order of sums differs.
    chex.assert_trees_all_close(
        jax.device_get(resumed.learners["reward"].params),
        jax.device_get(state.learners["reward"].params),
        atol=1e-5,
    )
    chex.assert_trees_all_close(
        jax.device_get(resumed.learners["policy"].params),
        jax.device_get(state.learners["policy"].params),
        atol=2e-3,  # Adam's step is ~1e-3 whatever the gradient's size
    )


def test_without_a_checkpoint_a_run_starts_at_0_and_another_seed_is_another_run(tmp_path, capsys):
    for seed in (0, 1):
        train(replace(toy_sft.config(1), seed=seed), tmp_path / str(seed), resume=True)
        assert "no complete checkpoint" in capsys.readouterr().out
    (one,), (other,) = log(tmp_path / "0"), log(tmp_path / "1")
    assert one["step"] == other["step"] == 0 and one != other


def _stuck(scores, batch):
    terms = objectives.mle(scores, batch)
    return terms.replace(loss=terms.loss * jnp.inf)


def test_non_finite_updates_stop_the_run_with_the_batch_dumped(tmp_path):
    config = replace(toy_sft.config(4, objective=_stuck), max_skipped=3)
    with pytest.raises(RunError, match=r"3 updates in a row of 'policy'.*nonfinite_policy_step2"):
        train(config, tmp_path)
    assert np.load(tmp_path / "nonfinite_policy_step2.npz")["tokens"].shape == (8, 24)


def _nan_reward(rollout, params):
    at = rollout.mask & (jnp.arange(rollout.mask.shape[0]) == 3)[:, None]
    return jnp.where(at, jnp.nan, 0.0).astype(jnp.float32)


def _short_reward(rollout, params):
    return jnp.zeros(rollout.mask.shape[0], jnp.float32)


def _raising_reward(rollout, params):
    raise RewardError("the judge is out")


@pytest.mark.parametrize(
    ("reward", "says"),
    [
        (_nan_reward, "row 3 is not finite"),
        (_short_reward, "a reward is float32 of the rollout's shape"),
        (_raising_reward, "the judge is out"),
    ],
)
def test_a_bad_reward_stops_the_run_and_is_shown(reward, says, tmp_path):
    config = smoke(steps=1)
    rollouts = replace(config.rollouts, reward=reward, show=0)
    with pytest.raises((RewardError, RunError), match=says):
        train(replace(config, rollouts=rollouts), tmp_path)


def test_the_host_pays_for_a_chunk_while_the_next_are_sampled_and_rows_keep_their_order(
    tmp_path, monkeypatch
):
    config, order = smoke(), []
    monkeypatch.setattr(lanes, "count", lambda mesh: 2)

    def pay(rollout, params):
        order.append("pay")
        last = np.asarray(rollout.mask).cumsum(1) * np.asarray(rollout.mask)
        last = last == last.max(1, keepdims=True).clip(1)
        return np.where(last, np.asarray(rollout.prompt_id)[:, None], 0).astype(np.float32)

    pay.on_host = True

    def made(chunks):
        spec = replace(config.rollouts, reward=pay, chunks=chunks, value=None)
        one = replace(config, rollouts=spec)
        phases, out = loop.prepared(one, jax.devices()[:1]), tmp_path / str(chunks)

        def noted(name):
            return lambda *args: (order.append(name), getattr(phases, name)(*args))[1]

        spied = replace(phases, generate=noted("generate"), score=noted("score"))
        out.mkdir()
        with jax.set_mesh(phases.mesh), Meter(out, name="chunks", start=0, total=1) as meter:
            state, frozen = begin(one, phases, {})
            streams, tokenizer = feed.opened_all(one), tokenizers.load("bytes")
            run = experience.Run(one, spied, frozen, streams, {}, tokenizer, meter, out)
            found, _, metrics = experience.make_experience(run, state, 0)
            meter.write(0, metrics)
        return jax.device_get(found), log(out)[0]

    whole, logged = made(1)
    assert order == ["generate", "pay", "score"]
    order.clear()
    found, in_chunks = made(4)
    assert order == ["generate"] * 3 + ["pay", "generate", *["pay"] * 3] + ["score"] * 4
    assert len(set(whole.reward.sum(1))) > 4
    for name in ("tokens", "mask", "prompt_id", "sample_id", "segments", "group_tokens"):
        np.testing.assert_array_equal(getattr(found, name), getattr(whole, name))
    for name in ("reward", "advantage", "old_logp", "ref_logp"):
        np.testing.assert_allclose(getattr(found, name), getattr(whole, name), atol=1e-4)
    for name in ("rollout/reward", "rollout/kl", "rollout/length"):
        assert in_chunks[name] == pytest.approx(logged[name], abs=1e-4)


def test_sampling_ahead_is_one_step_behind_in_weights_and_resumes_bit_for_bit(tmp_path):
    config = smoke(steps=4, checkpoint=KEPT)
    config = replace(config, rollouts=replace(config.rollouts, ahead=True, show=0))
    state, out = train(config, tmp_path / "run"), tmp_path / "run"
    lines = log(out)
    assert [line["rollout/staleness"] for line in lines] == [0, 1, 1, 1]
    # The first step leaves the policy as it is: the reward model begins with nothing but zeros.
    assert lines[0]["rollout/mismatch"] < 1e-4 < lines[2]["rollout/mismatch"]

    # What waits after three steps was sampled with the weights that two had left behind.
    phases, spec = loop.prepared(config, jax.devices()[:1]), config.rollouts
    run = SimpleNamespace(config=config, phases=phases)
    with jax.set_mesh(phases.mesh), Checkpoints(out / "checkpoints", read_only=True) as kept:
        target = abstract_state(config, phases)
        target = target.replace(pending=abstract_rollout(config, phases))
        old, new = kept.restore(2, target), kept.restore(3, target)
        prompts = feed.opened(config, spec.prompts)
        fourth = [experience.next_batch(run, spec.prompts, prompts) for _ in range(4)][3]
        own = {"policy": old.learners["policy"].params}
        params, key = phases.written_with(own, own)["policy"], phase_key(config.seed, 3, "rollout")
        assert bits(phases.generate(params, fourth, key, spec.sampling)) == bits(new.pending)

    for later in ("3", "4"):
        shutil.rmtree(out / "checkpoints" / later)
    assert bits(train(config, out, resume=True)) == bits(state)
    assert log(out) == lines


def test_prompts_that_exceed_the_context_are_refused(tmp_path):
    config = smoke(steps=1)
    long = replace(config, rollouts=replace(config.rollouts, length=60, show=0))
    with pytest.raises(ConfigError, match=r"exceed the model's context of 64"):
        train(long, tmp_path)


def test_a_tokenizer_that_does_not_fit_the_model_is_refused(tmp_path):
    small = replace(load(SMOKE).learners["policy"].model, vocab=64)
    with pytest.raises(RunError, match=r"vocabulary of 64.*does not fit"):
        train(toy_sft.config(1, model=small), tmp_path)


def test_a_checkpoint_of_another_shape_is_refused_by_name(whole, tmp_path):
    _, out = whole
    wide = replace(load(SMOKE).learners["policy"].model, width=64)
    with pytest.raises(ConfigError, match=r"shape: .*the model wants"):
        train(toy_sft.config(1, model=wide, start=From("policy", path=str(out))), tmp_path)


def test_supervised_fine_tuning_needs_no_rollouts(tmp_path):
    train(toy_sft.config(3), tmp_path)
    losses = [row["policy/loss"] for row in log(tmp_path)]
    assert losses[-1] < losses[0]


def test_a_pipelines_stage_starts_from_an_earlier_ones_weights_and_is_not_run_twice(
    tmp_path, monkeypatch
):
    monkeypatch.setattr(runs, "train", train)
    run_stages, ran = runs.run_stages, []
    still = partial(sgd, learning_rate=0.0)
    stages = {
        "first": toy_sft.config(2),
        "second": toy_sft.config(1, start=From("policy", stage="first"), optimizer=still),
        "third": lambda out: ran.append(out),
    }
    with pytest.raises(KeyboardInterrupt):
        run_stages(Pipeline("three", {**stages, "third": _interrupted}), tmp_path)
    run_stages(Pipeline("three", stages), tmp_path)
    run_stages(Pipeline("three", stages), tmp_path)
    assert ran == [tmp_path]
    first, second = (restore_params(tmp_path / name, "policy") for name in ("first", "second"))
    assert bits(first) == bits(second)
    assert len(log(tmp_path / "first")) == 2


def _interrupted(out):
    raise KeyboardInterrupt


def test_the_value_function_can_be_a_head_on_the_policys_trunk(tmp_path):
    config = smoke(steps=2)  # the reward model says 0 until it has learned
    model = replace(config.learners["policy"].model, value_head=True)
    objective = partial(
        objectives.combine, policy=objectives.ppo, value=partial(objectives.value, coefficient=0.1)
    )
    config = replace(
        config,
        learners={
            "policy": Learner(model, objective),
            "reward": config.learners["reward"],
        },
        rollouts=replace(config.rollouts, value="policy", show=0),
    )
    state = train(config, tmp_path)
    assert np.abs(np.asarray(state.learners["policy"].params["value_head"]["kernel"])).max() > 0
    assert {"policy/policy/ratio", "policy/value/squared_error"} <= set(log(tmp_path)[0])


# ------------------------------------------------------------------------ as a user's process


def command(*arguments, **options):
    """One device, and programs that an earlier command compiled."""
    environment = {
        **os.environ,
        "XLA_FLAGS": os.environ["XLA_FLAGS"].replace("device_count=8", "device_count=1"),
        "JAX_COMPILATION_CACHE_DIR": jax.config.jax_compilation_cache_dir,
        "JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS": "0",
    }
    return subprocess.Popen(
        [sys.executable, "-m", "rlhf_jax", *map(str, arguments)],
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        env=environment,
        **options,
    )


def wait_for_lines(path, n, process, seconds=120):
    end = time.monotonic() + seconds
    while time.monotonic() < end and process.poll() is None:
        if path.exists() and len(path.read_text().splitlines()) >= n:
            return
        time.sleep(0.05)
    process.kill()
    raise AssertionError(process.communicate()[0])


@pytest.mark.parametrize("how", [signal.SIGTERM, signal.SIGKILL])
def test_a_killed_run_resumes_from_its_last_checkpoint_and_repeats_no_step(how, tmp_path):
    out = tmp_path / "run"
    given = ("train", toy_sft.__file__, "--out", out, "--set", "checkpoint.every=1")
    process = command(*given)
    wait_for_lines(out / "metrics.jsonl", 3, process)
    process.send_signal(how)
    text = process.communicate(timeout=120)[0]
    assert process.returncode == (0 if how == signal.SIGTERM else -9), text
    if how == signal.SIGTERM:
        assert "is saved" in text
    saved = len(list((out / "checkpoints").glob("[0-9]*")))
    assert saved, text
    steps = max(int(p.name) for p in (out / "checkpoints").iterdir() if p.name.isdigit()) + 2
    process = command(*given, "--set", f"steps={steps}", "--resume")
    text = process.communicate(timeout=240)[0]
    assert process.returncode == 0, text
    rows = log(out)
    assert [row["step"] for row in rows] == list(range(steps))
    assert (out / "report.html").is_file()
