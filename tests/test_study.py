"""How studies are run: what is trained, kept and refused, and that they can fail."""

import json
from dataclasses import replace

import numpy as np
import pytest
import tiny_study
from numpy.testing import assert_allclose

from rlhf_jax import cli
from rlhf_jax.study import conduct, digest, work
from rlhf_jax.study.design import Claim
from rlhf_jax.study.results import Results
from rlhf_jax.study.verdicts import judge

FILE = tiny_study.__file__


@pytest.fixture(scope="module")
def home(tmp_path_factory, compiled_once):
    """A cache of its own, and programs compiled once."""
    folder = tmp_path_factory.mktemp("studies")
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("RLHF_JAX_CACHE", str(folder / "cache"))
        yield folder


def study(out, *options, preset="cpu_ci"):
    return cli.main(["study", FILE, "--preset", preset, "--out", str(out), *options])


@pytest.fixture(scope="module")
def done(home):
    """The study with one seed, as a user runs it."""
    assert study(home / "out") == 0
    return home / "out"


def test_a_study_leaves_results_a_page_and_what_made_them(done):
    results = Results.read(done / "results.jsonl")
    assert results.arms == ("full", "one")
    assert results.seeds == (0,)
    assert results.steps("full") == (0, 4)
    assert_allclose(results.vector("kl", "full", 0), 0, atol=1e-6)
    assert results.vector("kl", "full")[0, 0] > 0
    assert_allclose(results.vector("kl", "one")[:, 0], 0, atol=1e-6)
    record = json.loads((done / "study.json").read_text())
    assert set(record["seconds"]) == {"base", "full", "one"}
    assert record["settings"]["train"]["steps"] == 4
    page = (done / "index.html").read_text()
    assert "Does credit that reaches one token only" in page
    assert (done / "figure.png").stat().st_size > 1000


def test_what_is_finished_is_not_trained_again(done, monkeypatch, capsys):
    before = (done / "results.jsonl").read_text()
    trained = []
    real = work.Together
    monkeypatch.setattr(
        work, "Together", lambda *a: (trained.append((a[0].name, tuple(a[1]))), real(*a))[1]
    )
    assert study(done) == 0
    assert trained == []
    assert study(done, "--seeds", "2") == 0
    assert trained == [("base", (1,)), ("full", (1,)), ("one", (1,))]
    results = Results.read(done / "results.jsonl")
    assert results.seeds == (0, 1)
    assert study(done) == 0  # the first seed alone is there again, unchanged
    assert (done / "results.jsonl").read_text() == before
    assert study(done.parent / "other", "--arms", "one") == 0  # another study shares the base
    assert trained[3:] == [("one", (0,))]
    out = capsys.readouterr().out
    assert "P1   not run" in out


def test_mistakes_are_named_before_anything_is_trained(done, capsys):
    for options, message in (
        (("--set", "train.steps=5"), "settings.train.steps: 4 -> 5"),
        (("--arms", "on"), "has no arm on; valid: full, one"),
        (("--seeds", "some"), "--seeds some: a number of seeds"),
        (("--set", "data.letters=3"), "there is no 'letters' here"),
    ):
        assert study(done, *options) == 2
        assert message in capsys.readouterr().err
    assert study(done, preset="laptop") == 2
    assert "--preset laptop: " in capsys.readouterr().err
    assert cli.main(["train", FILE, "--out", str(done / "x")]) == 2
    assert "run it with rlhf-jax study" in capsys.readouterr().err
    assert cli.main(["study", "experiments/smoke.py", "--out", str(done / "x")]) == 2
    assert "is no study" in capsys.readouterr().err


def test_an_arm_that_was_changed_is_not_mixed_with_what_it_was(done, home):
    settings = tiny_study.PRESETS["cpu_ci"]
    changed = tiny_study.config(settings)
    arms = {**changed.arms, "one": replace(changed.arms["one"], says="something else", at=(2,))}
    mine = conduct.Work(replace(changed, arms=arms), done, (0,))
    assert mine.missing("full") == ()
    with pytest.raises(conduct.ConfigError, match="another arm 'one'"):
        mine.missing("one")


def test_a_study_is_the_same_one_seed_at_a_time_on_a_mesh(done, home):
    assert study(home / "alone", "--set", "together=false") == 0
    found, expected = (Results.read(x / "results.jsonl") for x in (home / "alone", done))
    for arm in ("full", "one"):
        assert_allclose(found.vector("kl", arm), expected.vector("kl", arm), atol=1e-4)


def test_an_interrupted_seed_keeps_what_was_measured_on_its_way(home):
    made = tiny_study.config(replace(tiny_study.PRESETS["cpu_ci"], together=False))
    seen = []

    def measure(trained):
        seen.append((trained.step, trained.config.steps))
        if len(seen) == 2:
            raise KeyboardInterrupt
        return tiny_study.measure(trained)

    record = {"study": made.name, "settings": {}}
    made = replace(made, measure=measure)
    with pytest.raises(KeyboardInterrupt):
        conduct.conduct(made, home / "stopped", record=record, arms=["full"])
    results = conduct.conduct(made, home / "stopped", record=record, arms=["full"])
    assert seen == [(0, 4), (4, 4), (4, 4)]
    assert_allclose(results.vector("kl", "full", 0), 0, atol=1e-6)
    assert results.vector("kl", "full")[0, 0] > 0


def test_a_study_can_fail(home):
    """Credit that falls on the next token flips the verdict on the claim about the first."""
    verdicts = {}
    for late in (0, 1):
        settings = tiny_study.PRESETS["cpu"]
        settings = replace(settings, data=replace(settings.data, late=late))
        made = tiny_study.config(settings)
        record = {"study": made.name, "settings": {"late": late}}
        results = conduct.conduct(made, home / f"late{late}", record=record, arms=["full"])
        (verdict,) = judge(made.primaries, results)
        verdicts[late] = verdict
    assert verdicts[0].verdict == "supported" and verdicts[1].verdict == "refuted"
    assert verdicts[0].p == verdicts[1].p == 2 / 2**8


def test_the_hash_of_a_base_is_of_what_decides_its_weights(monkeypatch):
    base = tiny_study.config().bases["base"]
    assert digest.digest(base, {}, together=True) == digest.digest(base, {}, together=True)
    free = replace(base, name="else", seed=3, mesh=(1, 1, 1, 1))
    assert digest.digest(base, {}, together=True) == digest.digest(free, {}, together=True)
    learner = base.learners["policy"]
    different = [
        (replace(base, steps=99), {}),
        (replace(base, learners={"policy": replace(learner, epochs=2)}), {}),
        (base, {"before": "0123"}),
    ]
    found = {digest.digest(run, stages, together=True) for run, stages in different}
    monkeypatch.setattr(digest, "_of_file", lambda path, changed: path)  # another file content
    found |= {digest.digest(base, {}, together=True)}
    monkeypatch.undo()
    found |= {digest.digest(base, {}, together=True), digest.digest(base, {}, together=False)}
    assert len(found) == 6


def test_a_study_of_too_many_primaries_is_refused():
    def one(i):
        return Claim(f"P{i}", "x", lambda r: np.zeros(8), (0.0, np.inf))

    with pytest.raises(conduct.ConfigError, match="at most 6"):
        replace(tiny_study.config(), primaries=tuple(one(i) for i in range(7)))
    with pytest.raises(ValueError, match="at least one finite bound"):
        replace(one(1), supported=(-np.inf, np.inf))
