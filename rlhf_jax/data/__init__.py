"""Text from people, as resumable host streams of the batches of `rlhf_jax.types`.

corpus      fetch the human-rated snippets once, checked by their hash
snippets    parse, clean and split them; rows for the streams
builder     the same as a TFDS data set, without TensorFlow; rows of any TFDS directory
tokenizers  any `tokenizer.json`, and a byte tokenizer
vader       the VADER score of a text, and the lexicon's marks on its tokens
reasoning   tasks whose answers a program checks, from reasoning-gym
streams     text, chats, prompts, pairs: batches without end
endless     the order of their rows: shuffled, repeated, sharded, resumable
packing     whole texts put together in one row
"""

import os
from pathlib import Path


class DataError(ValueError):
    """A mistake in data, a tokenizer or a stream's arguments; the message says what to do."""


def cache_directory() -> Path:
    """`$RLHF_JAX_CACHE`, else `$XDG_CACHE_HOME/rlhf_jax`, else `~/.cache/rlhf_jax`."""
    if own := os.environ.get("RLHF_JAX_CACHE"):
        return Path(own).expanduser().absolute()
    if xdg := os.environ.get("XDG_CACHE_HOME"):
        return Path(xdg).expanduser().absolute() / "rlhf_jax"
    return Path.home() / ".cache" / "rlhf_jax"
