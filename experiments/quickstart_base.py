"""The quickstart's base model: 1.2 M parameters, trained on the `base` split of the snippets.

Rebuilds `experiments/quickstart_base/model.safetensors`, which the repository ships:

    rlhf-jax train experiments/quickstart_base.py --out runs/quickstart_base
    cp runs/quickstart_base/model.safetensors experiments/quickstart_base/

Expect a held-out loss of 4.91 nats per word.
"""

from __future__ import annotations

from functools import partial
from pathlib import Path

from rlhf_jax.checkpoint import restore_params
from rlhf_jax.config import Checkpointing, Config, Evaluation, Learner, Pipeline
from rlhf_jax.data import snippets, streams
from rlhf_jax.models import weights
from rlhf_jax.models.transformer import Transformer
from rlhf_jax.objectives import mle
from rlhf_jax.optimizer import adam

HERE = Path(__file__).parent / "quickstart_base"
TOKENIZER = str(HERE / "tokenizer.json")
WEIGHTS = str(HERE / "model.safetensors")
PARTS = ("movie", "product")
LENGTH = 40  # tokens of a sentence, BOS and EOS included; nine sentences in ten are shorter

MODEL = Transformer(
    vocab=5000, width=128, layers=3, heads=4, kv_heads=2, mlp=384, context=128
)  # fmt: skip
STEPS = 560


def text(split: str, batch: int):
    """Sentences of one split as a stream."""
    source = partial(snippets.rows, split=split, parts=PARTS)
    return partial(
        streams.text, batch=batch, length=LENGTH, tokenizer=TOKENIZER, source=source, marks=None
    )


def export(out: Path) -> None:
    """Write the trained weights in bfloat16."""
    weights.save(out / "model.safetensors", restore_params(out / "sft", "policy"), dtype="bfloat16")


def config() -> Pipeline:
    """Maximum likelihood, then export."""
    optimizer = partial(
        adam, learning_rate=3e-3, final=0.05, steps=STEPS, warmup=40, weight_decay=0.3
    )
    sft = Config(
        name="quickstart_base",
        steps=STEPS,
        tokenizer=TOKENIZER,
        data={"text": text("base", 64), "heldout": text("heldout", 64)},
        learners={
            "policy": Learner(MODEL, mle, batch="text", optimizer=optimizer, chunk=4096),
        },
        evaluation={"heldout": Evaluation("policy", "heldout", batches=16, every=100)},
        checkpoint=Checkpointing(every=200),
    )
    return Pipeline("quickstart_base", {"sft": sft, "export": export})
