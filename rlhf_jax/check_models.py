"""Mistakes in the directories of Hugging Face that an experiment starts from."""

from __future__ import annotations

from rlhf_jax.config import Config, ConfigError
from rlhf_jax.data import chat, streams, tokenizers
from rlhf_jax.models import pretrained


def check_directories(config: Config) -> None:
    """Their weights are all there and of the model's shapes; their tokenizers fit the embedding.

    Raises:
        ConfigError: saying which file is wrong.
    """
    found = set()
    for kind in ("learners", "frozen"):
        for name, one in getattr(config, kind).items():
            path = one.start.path if one.start is not None else None
            if path is None or not pretrained.is_directory(path):
                continue
            found.add(name)
            try:
                pretrained.load(path, config.models[name])
            except ValueError as error:
                raise ConfigError(f"{kind}.{name}.start: {error}") from error
    found |= {name for name, learner in config.learners.items() if learner.base in found}
    for where, path, tokenizer in _tokenizers(config) if found else ():
        for name in sorted(found):
            try:
                vocab = config.models[name].vocab
                tokenizers.check_fits(tokenizer, path, vocab=vocab, model=repr(name))
            except ValueError as error:
                raise ConfigError(f"{where}: {error}") from error


def _tokenizers(config):
    """Where one is named, its path, and the tokenizer, or the chat, that it is."""
    yield "tokenizer", config.tokenizer, tokenizers.load(config.tokenizer)
    for name, stream in config.data.items():
        given = getattr(stream, "keywords", {})
        if "tokenizer" in given:
            where, path = f"data.{name}.tokenizer", given["tokenizer"]
            talks = stream.func in (streams.chats, streams.chat_prompts)
            load = chat.load if talks else tokenizers.load
            template = {"template": given.get("template")} if talks else {}
            yield where, path, load(path, **template)
