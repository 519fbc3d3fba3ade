"""Slots that take the next prompt when a text ends: the same samples for fewer steps."""

from dataclasses import replace
from functools import partial

import jax
import numpy as np
import pytest
import toys
from numpy.testing import assert_allclose, assert_array_equal
from toy_environments import JUMPS, names_of

from rlhf_jax import sharding
from rlhf_jax.rollout import generate
from rlhf_jax.sampling import Sampling
from rlhf_jax.types import Prompts

ROWS, LENGTH = 32, 12
STOP = Sampling(stop=(5, 9, 11))  # of 32 tokens: texts of about ten


def queue(samples=1):
    """Prompts of 1 to 4 tokens, each `samples` times in a row."""
    rng = np.random.default_rng(0)
    length = rng.integers(1, 5, ROWS).astype(np.int32)
    tokens = np.where(np.arange(4) < length[:, None], rng.integers(1, 32, (ROWS, 4)), 0)
    shared = np.arange(ROWS) // samples * samples
    name = np.arange(ROWS, dtype=np.int32)
    return Prompts(tokens[shared].astype(np.int32), length[shared], shared, name - shared)


@partial(jax.jit, static_argnames=("model", "slots", "samples", "windows"))
def say(params, prompts, *, model, slots=None, samples=1, windows=1):
    return generate(
        params, prompts, jax.random.key(3), model=model, length=LENGTH, sampling=STOP, pad=0,
        slots=slots, samples=samples, windows=windows,
    )  # fmt: skip


@pytest.fixture(scope="module")
def plain(model, params):
    return jax.device_get(say(params, queue(), model=model))


def assert_same(found, expected):
    found = jax.device_get(found)
    for name in ("tokens", "mask", "segments", "ended", "prompt_id", "sample_id"):
        assert_array_equal(getattr(found, name), getattr(expected, name), err_msg=name)
    for name in ("logp", "behaviour_logp", "earned"):
        assert_allclose(getattr(found, name), getattr(expected, name), atol=1e-5, err_msg=name)


@pytest.mark.parametrize("slots", [1, 6, 16])
def test_samples_are_those_of_plain_generation_however_many_slots(model, params, plain, slots):
    found = say(params, queue(), model=model, slots=slots)
    assert_same(found, plain)
    written = plain.mask.sum()
    # Every slot writes in every step but the last ones, and those in which it waits for a wave.
    assert written / slots <= found.steps.max() <= written / slots + 2 * LENGTH
    assert plain.steps.max() <= LENGTH < found.steps.max()


@pytest.mark.parametrize("windows", [1, 3])
def test_so_do_layers_that_are_scanned_and_a_sliding_window(model, params, windows):
    odd = replace(model, scan=True, window=3, local_layers=(True, False))
    stacked = toys.weights(odd)
    expected = jax.device_get(say(stacked, queue(), model=odd))
    assert_same(say(stacked, queue(), model=odd, slots=6, windows=windows), expected)


@pytest.mark.parametrize(("slots", "windows"), [(1, 2), (6, 3), (16, 4)])
def test_texts_that_move_to_larger_slots_are_the_same(model, params, plain, slots, windows):
    written = plain.mask.sum(1)
    assert written.max() == LENGTH and (written < LENGTH / windows).any()  # some move, some do not
    found = say(params, queue(), model=model, slots=slots, windows=windows)
    assert_same(found, plain)
    # Larger slots write when they are taken, not when one of them is.
    steps = found.steps.max()
    assert written.sum() / slots <= steps <= written.sum() / slots + 2 * LENGTH


def test_prompts_that_several_samples_share_are_read_once(model, params):
    expected = jax.device_get(say(params, queue(4), model=model))
    assert len({tuple(row) for row in expected.tokens}) == ROWS  # samples differ
    assert_same(say(params, queue(4), model=model, samples=4), expected)
    assert_same(say(params, queue(4), model=model, slots=8, samples=4), expected)
    assert_same(say(params, queue(4), model=model, slots=8, samples=4, windows=2), expected)


@pytest.mark.parametrize("windows", [1, 3])
def test_slots_of_a_mesh_keep_to_their_own_prompts(model, params, plain, windows):
    """Four parts of the rows: no array of texts crosses the mesh inside the loop."""
    mesh = sharding.make_mesh((2, 2, 2, 1))
    with jax.set_mesh(mesh):
        rows = jax.device_put(queue(), sharding.rows(mesh))
        made = partial(say, model=model, slots=8, windows=windows)
        made = jax.jit(made, out_shardings=sharding.rows(mesh))
        assert_same(made(params, rows), plain)


def test_an_environment_answers_in_slots_too():
    @partial(jax.jit, static_argnames=("slots", "windows"))
    def run(prompts, slots, windows=1):
        return generate(
            toys.chain(20), prompts, jax.random.key(0), model=toys.Table(20), length=4,
            sampling=Sampling(stop=(-1,)), pad=9, environment=JUMPS, slots=slots, windows=windows,
        )  # fmt: skip

    expected = jax.device_get(run(names_of(), None))
    assert_same(run(names_of(), 4), expected)
    assert_same(run(names_of(), 4, 2), expected)  # a cache of the model's own has one size


def rooms_of(program):
    """Lengths of the caches that loops of a traced program carry."""
    loops = [e for e in program.jaxpr.eqns[0].params["jaxpr"].eqns if e.primitive.name == "while"]
    keys = [x.aval.shape for e in loops for x in e.outvars if len(x.aval.shape) == 4]
    return sorted({shape[-1] for shape in keys if shape[-2] == 4})


@pytest.mark.parametrize("kind", ["unrolled", "scanned", "an environment"])
def test_a_cache_that_grows_with_the_texts_changes_no_sample(model, params, plain, kind):
    """Prompts of four and responses of twelve tokens, in three windows of four."""
    if kind == "an environment":  # three tokens a turn
        call = partial(
            generate, toys.weights(world := replace(model, vocab=20)), names_of(),
            jax.random.key(0), model=world, length=5, sampling=Sampling(stop=(-1,)), pad=9,
            environment=JUMPS,
        )  # fmt: skip
        expected = jax.device_get(jax.jit(call)())
        assert_same(jax.jit(partial(call, windows=3))(), expected)
        return assert_same(jax.jit(partial(call, windows=3, slots=4))(), expected)
    if kind == "scanned":
        model, params = replace(model, scan=True), toys.stacked(params, model.layers)
    assert_same(say(params, queue(), model=model, windows=3), plain)
    if kind == "unrolled":
        traced = jax.make_jaxpr(partial(say, model=model, windows=3))(params, queue())
        assert rooms_of(traced) == [8, 12, 16]
        traced = jax.make_jaxpr(partial(say, model=model, windows=3, slots=8))(params, queue())
        assert rooms_of(traced) == [8, 12, 16]


def test_a_cache_of_codes_says_the_same_in_slots_in_windows_and_scanned(model, params):
    coded = replace(model, cache_dtype="int8")
    expected = jax.device_get(say(params, queue(4), model=coded))
    assert_same(say(params, queue(4), model=coded, slots=8, samples=4), expected)
    assert_same(say(params, queue(4), model=coded, slots=8, samples=4, windows=2), expected)
    assert_same(say(params, queue(4), model=coded, windows=2), expected)
    stacked = toys.stacked(params, model.layers)
    assert_same(say(stacked, queue(4), model=replace(coded, scan=True)), expected)


def test_slots_that_do_not_fit_are_refused(model, params):
    with pytest.raises(ValueError, match=r"6 slots for 32 texts.*4 samples.*try 8 slots"):
        say(params, queue(4), model=model, slots=6, samples=4)
