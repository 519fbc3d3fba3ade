"""Weights go through a file and from one tree to another unchanged, or an error lists why not."""

from dataclasses import replace

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import toys
from jax.sharding import NamedSharding
from jax.sharding import PartitionSpec as P
from numpy.testing import assert_array_equal

from rlhf_jax import sharding
from rlhf_jax.models import weights


@pytest.fixture(scope="module")
def small(model):
    return replace(model, layers=1)


@pytest.fixture(scope="module")
def tree(small):
    return toys.weights(small)


def test_what_was_saved_is_what_is_loaded(tmp_path, tree):
    path = tmp_path / "new" / "folder" / "w.safetensors"
    weights.save(path, tree)
    found = weights.load(path)
    assert jax.tree.structure(found) == jax.tree.structure(tree)
    jax.tree.map(assert_array_equal, found, tree)


def test_half_the_bits_make_half_the_file_and_come_back_as_float32(tmp_path, tree):
    weights.save(tmp_path / "full", tree)
    weights.save(tmp_path / "half", tree, dtype="bfloat16")
    size = [(tmp_path / name).stat().st_size for name in ("full", "half")]
    assert size[1] < 0.6 * size[0]
    found = weights.fill(tree, weights.load(tmp_path / "half"), origin="half")
    rounded = jax.tree.map(lambda x: x.astype(jnp.bfloat16).astype(jnp.float32), tree)
    jax.tree.map(assert_array_equal, found, rounded)
    assert {x.dtype for x in jax.tree.leaves(found)} == {jnp.dtype("float32")}


@pytest.mark.parametrize("keep", [0, 5, 100, -1])
def test_a_file_that_was_cut_short_is_refused(tmp_path, tree, keep):
    path = tmp_path / "w.safetensors"
    weights.save(path, tree)
    path.write_bytes(path.read_bytes()[:keep])
    with pytest.raises(ValueError, match=r"w\.safetensors is not a complete \.safetensors file"):
        weights.load(path)


def test_a_file_that_is_not_there_is_named(tmp_path):
    with pytest.raises(ValueError, match=r"there is no weights file .*w\.safetensors"):
        weights.load(tmp_path / "w.safetensors")
    with pytest.raises(ValueError, match="there is no weights file"):
        weights.load(tmp_path)


def test_filling_keeps_the_targets_dtypes_and_shardings_and_takes_the_values(small, tree):
    mesh = sharding.make_mesh((2, 2, 2, 1))
    parts = sharding.shardings(tree, mesh)
    target = jax.device_put(jax.tree.map(jnp.zeros_like, tree), parts)
    source = jax.tree.map(np.asarray, tree)
    found = weights.fill(target, source, origin="a file")
    jax.tree.map(assert_array_equal, found, tree)
    assert jax.tree.map(lambda x: x.sharding, found) == parts
    found = weights.fill(target, tree, origin="another learner")
    assert jax.tree.map(lambda x: x.sharding, found) == parts


def test_a_copy_of_another_learner_survives_when_that_one_is_given_away(tree):
    source = jax.tree.map(jnp.copy, tree)
    copy = weights.fill(tree, source, origin="policy")
    give = jax.jit(lambda x: jax.tree.map(lambda y: y + 1, x), donate_argnums=0)
    give(source)
    assert all(x.is_deleted() for x in jax.tree.leaves(source))
    jax.tree.map(assert_array_equal, copy, tree)


def test_a_critic_starts_from_a_policy_and_keeps_its_fresh_head(small, tree):
    policy = {name: x for name, x in tree.items() if name != "value_head"}
    fresh = jax.tree.map(jnp.zeros_like, tree)
    found = weights.fill(fresh, policy, origin="policy")
    assert_array_equal(found["value_head"]["kernel"], 0.0)
    assert_array_equal(found["embed"]["embedding"], tree["embed"]["embedding"])
    kernel = {"kernel": tree["value_head"]["kernel"]}
    with pytest.raises(ValueError, match=r"extra: value_head/bias \(1,\)"):
        weights.fill({**policy, "value_head": kernel}, tree, origin="critic")
    found = weights.fill(fresh, {**policy, "value_head": kernel}, origin="scores")
    assert_array_equal(found["value_head"]["kernel"], kernel["kernel"])
    back = weights.fill(policy, found, origin="critic")  # and a head too many is left behind
    assert set(back) == set(policy)


def test_every_leaf_that_does_not_fit_is_listed(small, tree):
    wider = toys.weights(replace(small, mlp=80, layers=2))
    with pytest.raises(ValueError) as error:
        weights.fill(wider, tree, origin="base.safetensors")
    text = str(error.value)
    assert "weights of base.safetensors do not fit the model" in text
    assert "shape: layers_0/gate/kernel is (32, 64), the model wants (32, 80)" in text
    assert "missing: layers_1/query/kernel (32, 32)" in text
    with pytest.raises(ValueError, match=r"extra: layers_1/query/kernel \(32, 32\)"):
        weights.fill(tree, wider, origin="x")
    headless = tree | {"value_head": {"kernel": jnp.zeros((5, 1)), "bias": jnp.zeros(1)}}
    with pytest.raises(ValueError, match=r"value_head/kernel is \(5, 1\)"):
        weights.fill(tree, headless, origin="x")


def test_a_leafs_sharding_may_come_from_a_shape_alone(tree):
    mesh = sharding.make_mesh((8, 1, 1, 1))
    whole = NamedSharding(mesh, P())
    target = jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=whole), tree)
    found = weights.fill(target, tree, origin="x")
    assert {x.sharding for x in jax.tree.leaves(found)} == {whole}


def test_what_is_trained_stands_in_its_bases_place_or_beside_it():
    base = {"layer": {"kernel": 1, "bias": 2}, "head": 3}
    whole = weights.merged(base, {"layer": {"bias": 4, "lora_a": 5}, "value_head": 6})
    expected = {"kernel": 1, "bias": 4, "lora_a": 5}
    assert whole == {"layer": expected, "head": 3, "value_head": 6}
    assert base == {"layer": {"kernel": 1, "bias": 2}, "head": 3}
