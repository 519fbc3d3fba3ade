"""How every weight of every family is split: one file to look over, and no change unseen.

pytest -n 0 tests/test_golden.py --update     writes tests/golden/shardings.json anew
"""

import json
from dataclasses import replace
from pathlib import Path

import hub_toys
import jax

from rlhf_jax import sharding
from rlhf_jax.models import families
from rlhf_jax.models.transformer import Lora

FILE = Path(__file__).parent / "golden" / "shardings.json"


def table():
    """`family -> path -> what splits each of its axes`; of scanned layers, with adapters."""
    found = {}
    for name, config in hub_toys.CONFIGS.items():
        model = families.read(config)[1]
        model = replace(model, scan=True, lora=Lora(), value_head=True)
        shapes = jax.eval_shape(model.init, jax.random.key(0))
        found[name] = {
            sharding.path_name(path): written(sharding.spec(path, x))
            for path, x in jax.tree_util.tree_leaves_with_path(shapes)
        }
    return found


def written(spec):
    """`- tensor fsdp+sequence`: a word an axis."""
    words = ("-" if x is None else x if isinstance(x, str) else "+".join(x) for x in spec)
    return " ".join(words) or "whole"


def test_the_weights_of_every_family_are_split_as_the_golden_table_says(request):
    found = table()
    if request.config.getoption("--update"):
        FILE.parent.mkdir(exist_ok=True)
        FILE.write_text(json.dumps(found, indent=1) + "\n")
    golden = json.loads(FILE.read_text())
    assert found.keys() == golden.keys()
    for family, paths in found.items():
        assert paths == golden[family], family
