"""Model families of Hugging Face: config.json ↔ `Transformer`, tensor names ↔ parameter paths.

A family is a `Family`: two functions of numbers and a table of names. What a config.json says
beyond that is refused by name, unless it is known to change no number.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from typing import Any

from rlhf_jax.models.families import gemma, gpt, llama
from rlhf_jax.models.families.fields import HARMLESS as HARMLESS
from rlhf_jax.models.families.fields import Family, FamilyError, Fields
from rlhf_jax.models.families.fields import Names as Names
from rlhf_jax.models.transformer import Transformer

# A model that several can say exactly is saved as the first.
FAMILIES: dict[str, Family] = {**llama.FAMILIES, **gemma.FAMILIES, **gpt.FAMILIES}
BUFFERS = r"(attn|attention)\.(bias|masked_bias)$|rotary_emb\.inv_freq$"  # of old files: no weights


def read(config: Mapping[str, Any]) -> tuple[str, Transformer]:
    """The family and the model of a config.json.

    Raises:
        FamilyError: for a model type, a field or a value that is not computed exactly here.
    """
    kind = config.get("model_type")
    if kind not in FAMILIES:
        raise FamilyError(f"model_type {kind!r} is not supported; valid: {', '.join(FAMILIES)}")
    fields = Fields(config)
    try:
        model = FAMILIES[kind].read(fields)
    except (TypeError, KeyError, ValueError) as error:
        if isinstance(error, FamilyError):
            raise FamilyError(f"{kind}: {error}") from error
        raise FamilyError(
            f"{kind}: config.json cannot be read: {error!r}; does a field hold text where a number "
            "is meant?"
        ) from error
    if left := fields.unread():
        shown = ", ".join(f"{name}={value!r}" for name, value in left.items())
        raise FamilyError(
            f"{kind}: config.json has fields that are not known here and may change the numbers: "
            f"{shown}; if they change none, take them out of the file"
        )
    made = next(iter(config.get("architectures") or ()), "")
    if made.endswith("ForSequenceClassification"):
        labels = config.get("num_labels", len(config.get("id2label") or (0, 0)))  # 2 if not said
        if labels != 1:
            raise FamilyError(
                f"{kind}: {made} with {labels} labels (id2label in config.json): a reward model "
                "has one"
            )
        model = replace(model, lm_head=False, value_head=True, value_bias=False)
    for name in ("bos_token_id", "eos_token_id", "pad_token_id"):
        given = config.get(name)
        for i in given if isinstance(given, list) else [] if given is None else [given]:
            if not (isinstance(i, int) and -1 <= i < model.vocab):  # old files: -1 for none
                raise FamilyError(
                    f"{kind}: config.json says {name}={i!r}, and tokens are 0 to "
                    f"{model.vocab - 1}; correct it, or vocab_size, or make it null"
                )
    return kind, model


# What a config.json does not say: how a model is computed, not what.
FREE = ("scan", "remat", "dtype", "param_dtype", "lora", "lm_head", "value_head", "value_bias")
LABELS = (
    "num_labels",
    "id2label",
    "label2id",
    "problem_type",
)  # of a config.json that scores texts


def scores(model: Transformer) -> bool:
    """Whether a model is a reward model for transformers: one number a text, and no next token."""
    return model.value_head and not model.lm_head


def headed(config: Mapping[str, Any], model: Transformer) -> dict[str, Any]:
    """A config.json with the head of the model: of the next token, or a reward model's."""
    family, found = FAMILIES[config["model_type"]], dict(config)
    if not scores(model):
        found = {name: x for name, x in found.items() if name not in LABELS}
        return found | {"architectures": [family.architecture]}
    if len(found.get("id2label") or ()) != 1:
        found |= {"id2label": {"0": "LABEL_0"}, "label2id": {"LABEL_0": 0}}
    return found | {"architectures": [family.scoring]}


def write(model: Transformer, kind: str | None = None) -> dict[str, Any]:
    """The config.json of a model, of the family `kind` or of the first that can say it exactly.

    Raises:
        FamilyError: if none can.
    """
    for name in [kind] if kind is not None else FAMILIES:
        family = FAMILIES[name]
        config = {"architectures": [family.architecture], "model_type": name, **family.write(model)}
        if says(config, model):
            return config
    raise FamilyError(
        f"no family of Hugging Face computes this model: {model}; known: {', '.join(FAMILIES)}"
    )


def says(config: Mapping[str, Any], model: Transformer) -> bool:
    """Whether a config.json is that of the model."""
    plain = {name: getattr(Transformer(vocab=1), name) for name in FREE}
    both = (read(config)[1], model)
    return _same(*(replace(m, head_dim=m.size_of_head, **plain) for m in both))


def _same(one: Transformer, other: Transformer) -> bool:
    def canonical(model):
        local = model.local_layers or (True,) * model.layers
        none = not model.window or not any(local)
        scale = model.query_scale or model.size_of_head**-0.5
        return replace(
            model,
            window=0 if none else model.window,
            local_layers=() if none or all(local) else local,
            query_scale=round(scale, 9),
            rope_theta=model.rope_theta if model.positions == "rotary" else 0.0,
            local_rope_theta=None if none else model.local_rope_theta,
        )

    return canonical(one) == canonical(other)
