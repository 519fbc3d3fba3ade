"""The toy of a predictable future at its usual size; it stands in experiments/tasks."""

from __future__ import annotations

import sys
from functools import partial
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parent.parent / "experiments"))

from tasks import predictable

TASK = predictable.Predictable()
KEYS, LENGTH, FIRST, VOCAB = TASK.keys, TASK.length, TASK.first, TASK.vocab
A, B, BOS = TASK.a, TASK.b, TASK.bos
BAD, GOOD = TASK.tags

OUTPUTS = predictable.texts(TASK).outputs  # 16807 texts
TEXTS = OUTPUTS.tokens[:, 1:]

exact = partial(predictable.exact, TASK)
share_of_b = partial(predictable.share_of_b, task=TASK)
draw = partial(predictable.draw, task=TASK)
reward_of = predictable.reward_of
