"""Where a run begins: weights of a source go straight to their places, the rest is made."""

import re
from dataclasses import replace
from functools import partial

import jax
import numpy as np
import pytest
import toys
from numpy.testing import assert_array_equal

from rlhf_jax import objectives, phases, sharding, start
from rlhf_jax.checkpoint import Checkpoints
from rlhf_jax.config import Config, ConfigError, From, Frozen, Learner
from rlhf_jax.models import weights
from rlhf_jax.models.transformer import Lora, Transformer
from rlhf_jax.optimizer import sgd

PLAIN = Transformer(
    vocab=80, width=32, layers=2, heads=4, kv_heads=2, mlp=48, scan=True, tied=False
)
LOW = replace(PLAIN, lora=Lora(rank=2, on="query|up"))
SCALAR = replace(PLAIN, lm_head=False, value_head=True)


def learner(model, where=None):
    rate = partial(sgd, learning_rate=1.0)
    return Learner(model, objectives.mle, batch="text", optimizer=rate, start=where)


def run(learners, **frozen):
    return Config("x", steps=1, learners=learners, data={"text": dict}, frozen=frozen)


def begun(config, stages=None):
    """The state and the frozen trees on four devices, what was compiled, and the phases."""
    mesh, texts, real = sharding.make_mesh((1, 2, 2, 1), jax.devices()[:4]), [], jax.jit

    def watched(fn, **options):
        program = real(fn, **options)

        def call(*given):
            compiled = program.lower(*given).compile()
            texts.append(compiled.as_text())
            return compiled(*given)

        return call

    with jax.set_mesh(mesh), pytest.MonkeyPatch.context() as patch:
        made = phases.build(config, mesh)
        patch.setattr(start.jax, "jit", watched)
        return *start.begin(config, made, stages or {}), texts, made


@pytest.fixture(scope="module")
def source():
    """Weights of a plain model with a head over the vocabulary."""
    return toys.stacked(toys.weights(replace(PLAIN, scan=False)), PLAIN.layers)


@pytest.fixture(scope="module")
def found(source, tmp_path_factory):
    """A critic that is named before the policy which it starts from, and a reference."""
    path = str(tmp_path_factory.mktemp("start") / "base.safetensors")
    weights.save(path, source)
    learners = {
        "critic": learner(SCALAR, From("policy")),
        "policy": learner(LOW, From(path=path)),
        "other": learner(replace(PLAIN, layers=1)),
    }
    config = run(learners, reference=Frozen(From(path=path), PLAIN))
    return *begun(config), config


def test_what_a_source_has_is_taken_and_the_rest_is_as_without_it(found, source):
    state, frozen, _, made, config = found
    fresh = made.init(config.seed)
    assert jax.tree.structure(state) == jax.tree.structure(fresh)
    assert jax.tree.map(lambda x: x.sharding, state) == made.shardings
    whole = weights.merged(fresh.learners["policy"].params, source)
    jax.tree.map(assert_array_equal, state.learners["policy"].params, whole)
    assert np.abs(whole["layers"]["query"]["lora_a"]).max() > 0
    whole = {**source, "value_head": fresh.learners["critic"].params["value_head"]}
    del whole["head"]
    jax.tree.map(assert_array_equal, state.learners["critic"].params, whole)
    jax.tree.map(assert_array_equal, state.learners["other"], fresh.learners["other"])
    jax.tree.map(assert_array_equal, frozen["reference"], source)
    assert {int(x) for one in state.learners.values() for x in (one.step, one.skipped)} == {0}


def test_nothing_is_made_at_random_that_a_source_has(found):
    """A program of random numbers that returns no more than it must does not draw the others."""
    texts = [text for text in found[2] if "shift-right-logical" in text]  # threefry's
    assert len(texts) == 2  # of the learner from nothing, and of the terms of low rank
    low = [text for text in texts if re.search(r"\[2,\d+,2\]", text)]
    assert len(low) == 1
    for part in ("2,16,24", "40,16", "16,40"):  # of a matrix, the embedding and the head
        assert f"[{part}]" not in low[0] and f"[{part}]" in "".join(found[2])


def test_the_weights_of_another_run_are_read_to_their_places(source, tmp_path):
    saved = begun(run({"policy": learner(PLAIN)}))
    state = saved[0]
    with Checkpoints(tmp_path / "checkpoints") as checkpoints:
        checkpoints.save(1, state)
    config = run({"critic": learner(SCALAR, From("policy", path=str(tmp_path)))})
    critic, _, texts, made = begun(config)
    assert not any("shift-right-logical" in text for text in texts)
    params = critic.learners["critic"].params
    assert jax.tree.map(lambda x: x.sharding, critic) == made.shardings
    assert_array_equal(params["value_head"]["kernel"], 0.0)
    same = {name: x for name, x in state.learners["policy"].params.items() if name != "head"}
    jax.tree.map(assert_array_equal, {n: x for n, x in params.items() if n != "value_head"}, same)
    wide = replace(SCALAR, mlp=64)
    with pytest.raises(ConfigError, match=r"(?s)critic\.start: .*shape: layers/gate/kernel is"):
        begun(run({"critic": learner(wide, From("policy", stage="first"))}), {"first": tmp_path})


def test_learners_that_start_from_each_other_are_refused():
    config = run({"a": learner(PLAIN, From("b")), "b": learner(PLAIN, From("a"))})
    with pytest.raises(ConfigError, match=r"learners\.a\.start: a → b → a is a circle"):
        begun(config)
    config = run({"a": learner(PLAIN, From(stage="first"))})
    with pytest.raises(ConfigError, match=r"learners\.a\.start: no earlier stage 'first'"):
        begun(config)
