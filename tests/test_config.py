"""Experiments as values: overriding, describing, comparing, and mistakes found before compiling."""

import json
import re
import sys
from dataclasses import replace
from functools import partial

import pytest

from rlhf_jax import conditioning, objectives, returns_to_go
from rlhf_jax.advantages import gae, whitened
from rlhf_jax.check import check
from rlhf_jax.config import (
    Config,
    ConfigError,
    Evaluation,
    From,
    Frozen,
    Learner,
    Pipeline,
    Rollouts,
    batch_plan,
    every,
)
from rlhf_jax.environment import Environment
from rlhf_jax.experiment import describe, difference, load, override
from rlhf_jax.models.transformer import Transformer
from rlhf_jax.optimizer import adam
from rlhf_jax.rewards import KL
from rlhf_jax.sampling import Sampling


def stream(*, seed, shard, batch, length=8, path="a.txt"):
    """A data stream, for its name and its arguments."""


def reward(rollout, params, *, scale=1.0):
    """A reward, for its name."""


MODEL = Transformer(vocab=32, width=32, layers=1, heads=4, kv_heads=2, mlp=64)
CONFIG = Config(
    "example",
    steps=10,
    learners={
        "policy": Learner(
            MODEL,
            partial(objectives.ppo, clip=0.2),
            optimizer=partial(adam, learning_rate=1e-3),
            minibatches=4,
        ),
        "critic": Learner(
            replace(MODEL, lm_head=False, value_head=True),
            objectives.value,
            start=From("policy", path="base.safetensors"),
        ),
        "sft": Learner(MODEL, objectives.mle, batch="text"),
    },
    data={
        "prompts": partial(stream, batch=16),
        "text": partial(stream, batch=24),
        "held out": partial(stream, batch=8),
    },
    frozen={"reference": Frozen(From("policy"))},
    rollouts=Rollouts(partial(reward), length=8, samples=2, shaping=(partial(reward, scale=2.0),)),
    evaluation={"text": Evaluation("sft", "held out")},
)


def test_the_example_is_sound():
    check(CONFIG, devices=8)


# --- override


@pytest.mark.parametrize(
    ("setting", "read", "value"),
    [
        ("steps=3", lambda c: c.steps, 3),
        ("name=other", lambda c: c.name, "other"),
        ("name=2024", lambda c: c.name, "2024"),  # text stays text
        ("name=none", lambda c: c.name, "none"),
        ("learners.critic.start.path=none", lambda c: c.learners["critic"].start.path, None),
        ("name='2024'", lambda c: c.name, "2024"),
        ("name=a=b", lambda c: c.name, "a=b"),
        ("rollouts.kl.initial=1", lambda c: c.rollouts.kl.initial, 1.0),
        ("rollouts.kl.adaptive=false", lambda c: c.rollouts.kl.adaptive, False),
        ("rollouts.reference=none", lambda c: c.rollouts.reference, None),
        ("rollouts.sampling.top_p=0.9", lambda c: c.rollouts.sampling.top_p, 0.9),
        ("learners.policy.model.layers=3", lambda c: c.learners["policy"].model.layers, 3),
        ("learners.policy.objective.clip=0", lambda c: keywords(c)["clip"], 0.0),
        ("learners.policy.objective.dual_clip=3.0", lambda c: keywords(c)["dual_clip"], 3.0),
        ("learners.policy.optimizer.learning_rate=1e-4",
         lambda c: c.learners["policy"].optimizer.keywords, {"learning_rate": 1e-4}),
        ("learners.policy.optimizer.clip=None",
         lambda c: c.learners["policy"].optimizer.keywords["clip"], None),
        ("learners.critic.start.path=b", lambda c: c.learners["critic"].start.path, "b"),
        ("learners.policy.scores=('reference',)", lambda c: c.learners["policy"].scores,
         ("reference",)),
        ("rollouts.advantage.advantage.trace=1.0",
         lambda c: c.rollouts.advantage.keywords["advantage"].keywords["trace"], 1.0),
        ("rollouts.shaping.0.scale=3", lambda c: c.rollouts.shaping[0].keywords, {"scale": 3.0}),
        ("data.held out.batch=4", lambda c: c.data["held out"].keywords, {"batch": 4}),
        ("mesh=[2,2,2,1]", lambda c: c.mesh, (2, 2, 2, 1)),
        ("mesh.1=4", lambda c: c.mesh, (-1, 4, 1, 1)),
    ],
)  # fmt: skip
def test_a_setting_changes_one_thing_through_dataclasses_mappings_partials_and_tuples(
    setting, read, value
):
    before = describe(CONFIG)
    changed = override(CONFIG, [setting])
    assert read(changed) == value and type(read(changed)) is type(value)
    assert len(difference(before, describe(changed))) == 1
    assert describe(CONFIG) == before


def keywords(config):
    return config.learners["policy"].objective.keywords


def test_settings_apply_in_order_and_reach_into_the_stages_of_a_pipeline():
    pipeline = Pipeline("two", {"sft": CONFIG, "ppo": CONFIG})
    changed = override(pipeline, ["stages.ppo.steps=3", "stages.ppo.steps=4"])
    assert (changed.stages["sft"].steps, changed.stages["ppo"].steps) == (10, 4)


@pytest.mark.parametrize(
    ("setting", "message"),
    [
        ("stepz=1", "no 'stepz' here. Did you mean 'steps'? Valid: name, steps, learners"),
        ("learners.polcy.epochs=2", "Did you mean 'policy'? Valid: policy, critic, sft"),
        ("learners.policy.objective.clipp=2",
         "Did you mean 'clip'? Valid: clip, clip_high, dual_clip"),
        ("rollouts.zzz=2", "no 'zzz' here. Valid: reward, length"),
        ("steps.a=2", "no 'a' here. Valid: nothing: it is a plain value"),
        ("mesh.4=2", "no '4' here. Valid: 0, 1, 2, 3"),
        ("steps", "--set steps: write it as name.name=value"),
        ("=3", "write it as name.name=value"),
        ("steps=1.5", "'1.5' is float, valid is int (now 10)"),
        ("steps=many", "'many' is str, valid is int"),
        ("steps=true", "'true' is bool, valid is int"),
        ("steps=none", "'none' is NoneType, valid is int"),
        ("learners.policy.optimizer.learning_rate=none", "'none' is NoneType, valid is float"),
        ("rollouts.kl.adaptive=1", "'1' is int, valid is bool"),
        ("mesh=2", "'2' is int, valid is tuple"),
        ("learners=3", "this is code, not a number"),
        ("rollouts.kl=0.1", "name what is inside it (initial, adaptive, target, horizon, "),
        ("learners.policy.objective=dpo", "change it in the experiment's file"),
        ("learners.policy.model.heads=5", "heads 5 must be a multiple of kv_heads 2"),
        ("learners.policy.model.kv_heads=0", "kv_heads is 0: must be at least 1"),
    ],
)  # fmt: skip
def test_a_setting_that_does_not_fit_says_what_would(setting, message):
    with pytest.raises(ConfigError, match=re.escape(message)):
        override(CONFIG, [setting])


# --- describe and compare


def test_a_description_is_json_with_every_default():
    described = describe(CONFIG)
    assert json.loads(json.dumps(described)) == described
    policy = described["learners"]["policy"]
    assert policy["objective"] == {"function": "rlhf_jax.objectives.ppo.ppo", "clip": 0.2}
    assert policy["model"]["norm_epsilon"] == 1e-6 and policy["model"]["type"] == "Transformer"
    assert described["rollouts"]["sampling"]["stop"] == []
    assert described["learners"]["critic"]["objective"] == "rlhf_jax.objectives.value.value"


def test_what_a_function_was_given_by_position_is_described_too():
    assert describe(partial(every, n=2)) != describe(partial(every, 1, n=2))


def test_a_difference_names_every_path_that_changed_appeared_or_went():
    changed = replace(CONFIG, steps=11, data={**CONFIG.data, "new": stream}, rollouts=None)
    lines = difference(describe(CONFIG), describe(changed))
    assert lines[0] == "steps: 10 -> 11"
    assert "data.new: (absent) -> test_config.stream" in lines
    assert any(line.startswith("rollouts: {") and line.endswith("-> None") for line in lines)
    assert difference(describe(CONFIG), describe(replace(CONFIG))) == []


# --- check


def broken(**fields):
    return replace(CONFIG, **fields)


def with_learner(**fields):
    return broken(
        learners=CONFIG.learners | {"policy": replace(CONFIG.learners["policy"], **fields)}
    )


def with_rollouts(**fields):
    return broken(rollouts=replace(CONFIG.rollouts, **fields))


@pytest.mark.parametrize(
    ("config", "message"),
    [
        (with_learner(minibatches=3), "policy: 32 rows of 'experience' do not divide into "
         "3 minibatches × 1 micro-batches × 8 devices; use a multiple of 24, such as 48"),
        (broken(data=CONFIG.data | {"text": partial(stream, batch=20)}),
         "sft: 20 rows of 'text' do not divide"),
        (broken(data=CONFIG.data | {"held out": partial(stream, batch=12)}),
         "evaluation.text: 12 rows of 'held out' do not divide into 1 micro-batches × 8 devices"),
        (with_learner(batch="txt"), "learners.policy.batch: there is no 'txt'; valid: experience"),
        (with_learner(scores=("ref",)), "learners.policy.scores: there is no 'ref'; valid: critic"),
        (with_learner(epochs=0), "learners.policy.epochs=0: must be at least 1"),
        (with_learner(chunk=0), "learners.policy.chunk=0: must be at least 1"),
        (with_learner(objective=partial(objectives.ppo, clap=1)), "learners.policy.objective: ppo()"
         " got an unexpected keyword argument 'clap'; its arguments are scores, batch, clip"),
        (broken(steps=-1), "steps=-1: must be at least 0"),
        (broken(frozen={"reference": Frozen(From("pol"))}), "no learner 'pol' to take the model"),
        (broken(frozen={"self": Frozen(From("policy"))}), "may be called 'self'"),
        (broken(frozen={"policy": Frozen(From("policy"))}), "policy: both a learner and frozen"),
        (broken(evaluation={"x": Evaluation("nobody", "text")}),
         "evaluation.x.learner: there is no 'nobody'; valid: critic, policy, sft"),
        (broken(evaluation={"x": Evaluation("sft", "texts")}), "evaluation.x.batch: there is no"),
        (with_rollouts(prompts="p"), "rollouts.prompts: there is no 'p'; valid: held out, prompts"),
        (with_rollouts(policy="teacher"), "rollouts.policy: there is no 'teacher'"),
        (with_rollouts(policy="critic"), "the model of 'critic' has no lm_head"),
        (with_rollouts(value="sft"), "the model of 'sft' has no value_head"),
        (with_rollouts(reference="r"), "rollouts.reference: there is no 'r'"),
        (with_rollouts(microbatches=5), "rollouts.microbatches=5 does not divide 32 rows"),
        (with_rollouts(microbatches=8, chunks=8), "=8 does not divide 4 rows of a chunk"),
        (with_rollouts(widths=(0, 8)), "rollouts.widths=(0, 8): numbers of tokens"),
        (with_rollouts(widths=(8,), microbatches=8), "rollouts.microbatches: the 32 rows of a "
         "chunk do not divide into 8 micro-batches × 8 devices, which widths need"),
        (broken(
            rollouts=replace(CONFIG.rollouts, rescore=False, kl=KL(exact=True)),
            learners=CONFIG.learners | {"policy": replace(
                CONFIG.learners["policy"], objective=objectives.reference_kl,
                vocab=objectives.reference_kl_vocab, scores=("reference",),
            )},
        ), "rollouts.rescore=False leaves no logits for an exact KL"),
        (with_rollouts(chunks=8), "rollouts.chunks: 32 rows do not divide into 8 chunks × 2 "
         "samples × 8 devices; use a multiple of 128"),
        (with_rollouts(chunks=2, ahead=True), "rollouts.ahead=True samples the next step's"),
        (with_rollouts(slots=3), "rollouts.slots: 3 slots for 32 texts"),
        (with_rollouts(slots=0), "rollouts.slots: 0: at least 1"),
        (with_rollouts(length=2000), "rollouts.length=2000 exceed the model's context of 1024"),
        (with_rollouts(sampling=Sampling(temperature=0.0)), "for greedy decoding set top_k=1"),
        (with_rollouts(sampling=Sampling(top_p=1.5)), "rollouts.sampling.top_p=1.5"),
        (broken(mesh=(3, 1, 1, 1)), "mesh (3, 1, 1, 1)"),
        (broken(mesh=(2, 2)), "needs four positive sizes"),
        (broken(mesh=(-1, -1, 1, 1)), "needs four positive sizes"),
        (broken(mesh=8), "mesh=8: "),
    ],
)  # fmt: skip
def test_a_mistake_is_found_before_anything_is_compiled(config, message):
    with pytest.raises(ConfigError, match=re.escape(message)):
        check(config, devices=8)


def switched(banned, **fields):
    """The example, whose prompts get a tag and whose texts another."""
    texts = partial(conditioning.condition, edges=(0.0,), tags=(7, 8))
    texts = partial(conditioning.chained, transforms=(every, texts))
    sft = replace(CONFIG.learners["sft"], transform=texts)
    rollouts = replace(
        CONFIG.rollouts,
        transform=partial(conditioning.tagged, tags=(9,)),
        sampling=Sampling(banned=banned),
        **fields,
    )
    return broken(learners=CONFIG.learners | {"sft": sft}, rollouts=rollouts)


def test_the_policy_may_not_say_the_control_tokens_that_it_reads():
    check(switched((7, 8, 9)), devices=8)
    with pytest.raises(ConfigError, match=r"sft\.transform: .* control tokens \[7, 8\] .*"
                       r"Sampling\(banned=\(0, 9, 7, 8\)\)"):  # fmt: skip
        check(switched((0, 9)), devices=8)
    with pytest.raises(ConfigError, match=r"rollouts\.transform: .* \[9\] .*banned=\(7, 8, 9\)"):
        check(switched((7, 8)), devices=8)
    asked = returns_to_go.on_request(
        Environment(reward, reward, forced=0, prompt=1), request=1.0, edges=(0.0,), tags=(3, 9)
    )
    here = broken(rollouts=replace(CONFIG.rollouts, environment=asked))
    with pytest.raises(ConfigError, match=r"rollouts\.environment: .* control tokens \[3, 9\]"):
        check(here, devices=8)


def test_control_tokens_are_banned_only_where_the_policy_has_them():
    config = switched((9,))
    texts = partial(conditioning.condition, edges=(0.0,), tags=(40, 41))
    sft = replace(config.learners["sft"], model=replace(MODEL, vocab=64), transform=texts)
    check(replace(config, learners=config.learners | {"sft": sft}), devices=8)
    outside = replace(sft, model=MODEL)
    with pytest.raises(ConfigError, match=r"\[40, 41\] are not in the model's vocabulary, ids 0"):
        check(replace(config, learners=config.learners | {"sft": outside}), devices=8)


def test_a_batch_only_has_to_divide_over_the_devices_that_share_rows():
    odd = broken(
        learners={"sft": Learner(MODEL, objectives.mle, batch="text", minibatches=3)},
        frozen={},
        rollouts=None,
        mesh=(1, 1, 2, -1),
    )
    check(odd, devices=8)
    with pytest.raises(ConfigError, match="8 devices"):
        check(replace(odd, data={**odd.data, "text": partial(stream, batch=12)},
                      mesh=(-1, 1, 1, 1)), devices=8)  # fmt: skip


def test_the_plan_of_a_step_is_in_numbers():
    plan = batch_plan(CONFIG, devices=8)
    assert plan["rollout"] == {
        "prompts": 16,
        "samples per prompt": 2,
        "rows": 32,
        "response tokens at most": 256,
    }
    assert plan["policy"]["rows per minibatch"] == 8
    assert plan["policy"]["optimiser steps per step"] == 4
    assert plan["sft"]["rows per step"] == 24
    json.dumps(plan)


def test_a_frozen_tree_has_the_model_of_the_learner_it_copies_unless_it_names_its_own():
    own = replace(MODEL, layers=2)
    config = broken(frozen={"a": Frozen(From("critic")), "b": Frozen(From("policy"), own)})
    assert config.models["a"] == CONFIG.learners["critic"].model and config.models["b"] == own


def test_every_nth_step():
    assert [i for i in range(7) if every(i, n=3, offset=1)] == [1, 4]
    assert whitened is not gae


# --- load

GOOD = "from rlhf_jax.config import Config\ndef config(): return Config('x', 1, {}, {})\n"


def written(folder, text, name="some_experiment.py"):
    path = folder / name
    path.write_text(text)
    return path


@pytest.fixture(autouse=True)
def import_state(monkeypatch):
    """What an experiment adds to the import path and modules goes with the test."""
    import sys

    monkeypatch.setattr(sys, "path", list(sys.path))
    before = set(sys.modules)
    yield
    for name in set(sys.modules) - before:
        if name.endswith("_experiment"):
            del sys.modules[name]


def test_a_file_gives_its_config_and_may_import_the_file_beside_it(tmp_path):
    written(tmp_path, GOOD)
    text = "import some_experiment as base\nfrom dataclasses import replace\n"
    other = written(tmp_path, text + "def config(): return replace(base.config(), steps=7)\n",
                    "other_experiment.py")  # fmt: skip
    assert load(other) == Config("x", 7, {}, {})
    assert load(str(other)).name == "x"


def test_a_file_imports_what_lies_beside_it_whatever_another_folder_calls_the_same(tmp_path):
    text = "from dataclasses import replace\nimport base_experiment\n"
    text += "def config(): return replace(base_experiment.config(), steps=7)\n"
    files = {}
    for i, name in enumerate(("first", "second", "third")):
        folder = tmp_path / name
        (folder / "own").mkdir(parents=True)
        written(folder, GOOD.replace("'x'", repr(name)), "base_experiment.py")
        place = folder if i < 2 else folder / "own"  # one folder up counts, too
        files[name] = written(place, text, "other_experiment.py")
    assert [load(file).name for file in files.values()] == list(files)
    # The same name in a folder and in the one above it, for a file of each.
    written(tmp_path / "third" / "own", GOOD.replace("'x'", "'own'"), "base_experiment.py")
    files["own"], files["third"] = files["third"], written(tmp_path / "third", text, "third.py")
    for name in ("first", "second", "first", "own", "third", "own", "second"):
        assert load(files[name]).name == name
    written(tmp_path / "first", "raise RuntimeError", "json.py")  # of the standard library, loaded
    assert load(files["first"]).name == "first" and sys.modules["json"] is json


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("", "defines no function config() that returns a Config"),
        ("config = 3", "defines no function config()"),
        ("def config(): return 3", "returned int, not a Config"),
    ],
)
def test_a_file_without_a_config_is_refused(tmp_path, text, message):
    with pytest.raises(ConfigError, match=re.escape(message)):
        load(written(tmp_path, text))


def test_a_file_that_is_not_there_is_named(tmp_path):
    with pytest.raises(ConfigError, match=r"no experiment file .*nowhere\.py"):
        load(tmp_path / "nowhere.py")


def test_a_setting_of_an_argument_of_config_reaches_it_before_anything_is_made(tmp_path):
    text = (
        "from dataclasses import dataclass\nfrom rlhf_jax.config import Config\n"
        "@dataclass(frozen=True)\nclass Model:\n    path: str = ''\n    width: int = 3\n"
        "def config(model: Model = Model(), rows: int = 2):\n"
        "    return Config(model.path or 'none', model.width * rows, {}, {})\n"
    )
    file = written(tmp_path, text)
    assert load(file) == Config("none", 6, {}, {})
    found = load(file, ["model.path=here", "rows=5", "seed=4", "model.width=2"])
    assert found == Config("here", 10, {}, {}, seed=4)
    with pytest.raises(ConfigError, match="Did you mean 'path'"):
        load(file, ["model.pth=x"])
