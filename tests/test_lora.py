"""Terms of low rank: a fresh one changes nothing, only they are trained, with any objective."""

import json
from dataclasses import replace
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import toys
from numpy.testing import assert_allclose, assert_array_equal

from rlhf_jax import inference, phases
from rlhf_jax import train as loop
from rlhf_jax.check import check
from rlhf_jax.checkpoint import restore_frozen, restore_params
from rlhf_jax.config import ConfigError, From, Frozen
from rlhf_jax.experiment import load
from rlhf_jax.models import weights
from rlhf_jax.models.transformer import Lora

SMOKE = Path(__file__).parent.parent / "experiments" / "smoke.py"
LORA = Lora(rank=2, alpha=6.0)
pytestmark = pytest.mark.usefixtures("compiled_once")


def hidden(model, params, tokens):
    return jax.jit(model.apply)(params, tokens).hidden


@pytest.fixture(scope="module")
def tokens():
    return jnp.asarray(np.random.default_rng(0).integers(0, 32, (2, 9)))


@pytest.fixture(scope="module")
def fresh(model, params):
    """The model's weights with terms of low rank as they are made."""
    made = jax.jit(replace(model, lora=LORA).init)(jax.random.key(3))
    return weights.merged(params, weights.trained(made, "lora_"))


@pytest.fixture(scope="module")
def adapted(model, fresh):
    """A model with terms of low rank, and weights in which they say something."""
    flat, rng = weights.flat(fresh), np.random.default_rng(4)
    for name in [name for name in flat if "lora_" in name]:
        flat[name] = jnp.asarray(0.1 * rng.standard_normal(flat[name].shape), jnp.float32)
    return replace(model, lora=LORA), weights.nested(flat)


@pytest.mark.parametrize("scan", [False, True], ids=["unrolled", "scanned"])
def test_a_fresh_adapter_changes_nothing_and_turned_off_it_is_the_base_bit_for_bit(
    model, params, fresh, adapted, tokens, scan
):
    low, lively = adapted
    model, low = replace(model, scan=scan), replace(low, scan=scan)
    if scan:
        params, fresh, lively = (toys.stacked(x, model.layers) for x in (params, fresh, lively))
    plain = hidden(model, params, tokens)
    assert_array_equal(hidden(low, fresh, tokens), plain)
    assert_array_equal(hidden(model, lively, tokens), plain)  # the same tree, the adapter off
    assert np.abs(hidden(low, lively, tokens) - plain).max() > 0.1


def test_a_term_of_low_rank_is_a_change_of_its_matrix(model, adapted, tokens):
    low, lively = adapted
    flat = weights.flat(lively)
    for name in [name for name in flat if name.endswith("lora_a")]:
        stem = name.removesuffix("lora_a")
        up = flat[f"{stem}lora_b"]
        flat[f"{stem}kernel"] = flat[f"{stem}kernel"] + 6.0 / 2 * flat[name] @ up
    one, other = hidden(low, lively, tokens), hidden(model, weights.nested(flat), tokens)
    assert_allclose(one, other, atol=2e-5)


def test_only_the_matrices_that_are_named_get_a_term(model):
    low = replace(model, lora=replace(LORA, on="query|value"))
    made = jax.eval_shape(low.init, jax.random.key(0))
    found = weights.flat(weights.trained(made, "lora_"))
    assert {name.split("/")[1] for name in found} == {"query", "value"}
    assert found["layers_0/query/lora_a"].shape == (32, 2)
    assert found["layers_1/value/lora_b"].shape == (2, 16)


# ------------------------------------------------------------------------------------- training


def smoke(path, **changes):
    """The smoke experiment in which policy and critic are adapters of one frozen base."""
    given = load(SMOKE)
    plain = given.learners["policy"].model
    low = replace(plain, lora=LORA)
    scalar = replace(low, lm_head=False, value_head=True)
    learners = {
        **given.learners,
        "policy": replace(given.learners["policy"], model=low, base="reference"),
        "critic": replace(given.learners["critic"], model=scalar, base="reference"),
    }
    frozen = {"reference": Frozen(From(path=str(path)), plain)}
    return replace(given, learners=learners, frozen=frozen, **{"mesh": (1, 1, 1, 1), **changes})


@pytest.fixture(scope="module")
def base(tmp_path_factory):
    path = tmp_path_factory.mktemp("base") / "base.safetensors"
    weights.save(path, toys.weights(load(SMOKE).learners["policy"].model))
    return path


@pytest.fixture(scope="module")
def run(base, tmp_path_factory):
    """Three steps; tests/test_models_run.py has eight devices."""
    out, config = tmp_path_factory.mktemp("run"), smoke(base, steps=3)
    return loop.train(config, out, devices=jax.devices()[:1]), out, config


def test_adapters_learn_and_the_optimiser_knows_of_nothing_else(run, base):
    state, out, _ = run
    for name in ("policy", "critic"):
        learner = state.learners[name]
        paths = set(weights.flat(learner.params))
        assert paths and all("lora_" in p or p.startswith("value_head/") for p in paths)
        moments = jax.tree.leaves(learner.opt_state)
        assert sum(x.size for x in moments) < 2.1 * sum(
            x.size for x in jax.tree.leaves(learner.params)
        )
        assert any(
            np.abs(x).max() > 0 for n, x in weights.flat(learner.params).items() if "_b" in n
        )
    saved, given = restore_frozen(out, "reference"), weights.load(base)
    jax.tree.map(assert_array_equal, saved, given)
    assert set(weights.flat(restore_params(out, "policy"))) == set(
        weights.flat(state.learners["policy"].params)
    )


def test_the_reference_is_the_policy_before_it_learned(run):
    rows = [json.loads(x) for x in (run[1] / "metrics.jsonl").read_text().splitlines()]
    assert abs(rows[0]["rollout/kl"]) < 1e-5 < abs(rows[-1]["rollout/kl"])


def test_what_is_resumed_is_what_was_trained_bit_for_bit(run, capsys):
    state, out, config = run
    resumed = loop.train(config, out, resume=True, devices=jax.devices()[:1])
    assert "already at step 3" in capsys.readouterr().out
    jax.tree.map(assert_array_equal, jax.device_get(resumed), jax.device_get(state))


def test_weights_that_stood_still_are_found_by_a_relative_path_too(run, base, monkeypatch):
    monkeypatch.chdir(run[1].parent)
    saved = restore_frozen(run[1].name, "reference")
    jax.tree.map(assert_array_equal, saved, weights.load(base))


def test_a_finished_run_speaks_with_its_adapter(run):
    state, out, config = run
    params = inference.learner_params(config, out, "policy")
    assert "kernel" in params["layers_0"]["query"]
    assert_array_equal(
        params["layers_0"]["query"]["lora_b"],
        state.learners["policy"].params["layers_0"]["query"]["lora_b"],
    )
    assert len(inference.sample_texts(config, out, prompts=["a"], count=2, length=4)) == 2


def test_the_whole_tree_shares_its_buffers_with_the_base(run, base):
    state, _, config = run
    frozen = {"reference": jax.tree.map(jnp.asarray, weights.load(base))}
    whole = phases.weights_of(["policy"], state, frozen, config=config)["policy"]
    assert (
        whole["layers_0"]["query"]["kernel"] is frozen["reference"]["layers_0"]["query"]["kernel"]
    )


@pytest.mark.parametrize(
    "changes, says",
    [
        ({"base": "nobody"}, r"learners\.policy\.base: there is no 'nobody'; valid: reference"),
        ({"trains": "nothing"}, "finds none of the model's weights"),
        ({"trains": "("}, "is no regular expression"),
        ({"trains": "lora_a"}, r"are not trained, and frozen\.reference has them not.*lora_b"),
    ],
)
def test_a_base_that_does_not_fit_is_refused_before_anything_is_compiled(base, changes, says):
    config = smoke(base)
    policy = replace(config.learners["policy"], **changes)
    with pytest.raises(ConfigError, match=says):
        check(replace(config, learners={**config.learners, "policy": policy}), devices=1)
