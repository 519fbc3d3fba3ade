"""No device ever holds a whole matrix: when a run begins, learns, saves and goes on."""

from dataclasses import replace

import jax
import numpy as np
import toy_sft

from rlhf_jax import train
from rlhf_jax.checkpoint import Checkpoints
from rlhf_jax.config import Checkpointing, From, Frozen
from rlhf_jax.models import weights


def matrices(model):
    """Shapes of the parameters of two axes or more, stacked layers aside."""
    shapes = weights.flat(jax.eval_shape(model.init, jax.random.key(0)))
    return {x.shape for name, x in shapes.items() if x.ndim > 1 and "norm" not in name}


def test_at_no_moment_of_a_run_does_a_device_hold_a_whole_matrix(tmp_path, monkeypatch):
    """Weights of a file, a frozen copy, Adam's moments; two steps, and a third after a resume."""
    model = replace(toy_sft.config().learners["policy"].model, scan=True, value_head=True)
    start = jax.device_get(model.init(jax.random.key(0)))
    weights.save(tmp_path / "base.safetensors", start)
    of = From(path=str(tmp_path / "base.safetensors"))
    config = replace(
        toy_sft.config(steps=2, model=model, start=of),
        frozen={"reference": Frozen(of, model)},
        mesh=(1, 2, 2, 2),
        checkpoint=Checkpointing(every=1),
    )
    whole, moments = matrices(model), []
    assert len(whole) >= 6
    others = {id(x): x for x in jax.live_arrays()}  # what other tests keep

    def look(moment):
        found = [x for x in jax.live_arrays() if x.shape in whole and x.dtype != np.int32]
        found = [x for x in found if id(x) not in others]
        for x in found:
            most = max(part.data.size for part in x.addressable_shards)
            assert most <= x.size // 4, (moment, x.shape, x.sharding)
        moments.append((moment, len(found)))

    def watched(moment, fn):
        def call(*given, **named):
            look(f"before {moment}")
            made = fn(*given, **named)
            look(f"after {moment}")
            return made

        return call

    for name in ("save", "save_frozen", "restore", "restore_frozen"):
        monkeypatch.setattr(Checkpoints, name, watched(name, getattr(Checkpoints, name)))
    monkeypatch.setattr(train, "begin", watched("begin", train.begin))
    built = train.prepared(config)
    update = watched("update", built.update["policy"])
    built = replace(built, update={"policy": update}, init=watched("init", built.init))
    train.train(config, tmp_path / "run", phases=built)
    longer = replace(config, steps=3)
    train.train(longer, tmp_path / "run", phases=built, resume=True)
    seen = dict(moments)
    for moment in ("begin", "update", "save", "save_frozen", "restore", "restore_frozen"):
        # Weights, frozen ones or both, and both moments: at least one tree of them.
        assert seen[f"after {moment}"] >= len(whole), moment
    assert seen["after update"] >= 4 * len(whole)  # weights, frozen ones, both moments
