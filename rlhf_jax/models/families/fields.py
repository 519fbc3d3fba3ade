"""What all families share: reading a config.json field by field, rotary bases, tables of names."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

from rlhf_jax.models.transformer import RopeScaling, Transformer


class FamilyError(ValueError):
    """A config.json that no family here computes exactly; the message names what is unknown."""


@dataclass(frozen=True)
class Names:
    """Tensors of a file and the leaves they hold; `{i}` is the layer.

    `layout`: "same", "transposed" (a file's matrices are [out, in], ours [in, out]), "columns"
    (GPT-2: query, key and value side by side), "interleaved" (GPT-NeoX: head by head, [out, in]).
    """

    tensor: str
    leaves: tuple[str, ...]
    layout: str = "same"


@dataclass(frozen=True)
class Family:
    """One `model_type`."""

    architecture: str
    scoring: str  # the architecture of its reward models
    read: Callable[[Fields], Transformer]
    write: Callable[[Transformer], dict[str, Any]]
    names: tuple[Names, ...]  # of all that the family may have; a model has some of them
    prefix: str  # that tensors may lack: files of the bare model


# Fields of a config.json that say how a model was made, saved or served.
HARMLESS = frozenset(
    """
    _name_or_path architectures attention_dropout attn_pdrop auto_map bad_words_ids
    begin_suppress_tokens bos_token_id cache_implementation chunk_size_feed_forward
    classifier_dropout cls_token_id decoder_start_token_id diversity_penalty do_sample dtype
    early_stopping embd_pdrop encoder_no_repeat_ngram_size eos_token_id
    exponential_decay_length_penalty finetuning_task forced_bos_token_id forced_eos_token_id
    gradient_checkpointing hidden_dropout id2label initializer_range is_decoder
    is_encoder_decoder is_llama_config keys_to_ignore_at_inference label2id length_penalty
    max_length mlp_dropout min_length model_type no_repeat_ngram_size n_ctx num_beam_groups
    num_beams num_labels num_return_sequences output_attentions output_hidden_states output_scores
    pad_token_id prefix problem_type pruned_heads remove_invalid_values repetition_penalty
    reorder_and_upcast_attn resid_pdrop return_dict return_dict_in_generate rope_interleaved
    sep_token_id summary_activation summary_first_dropout summary_proj_to_labels
    summary_type summary_use_proj suppress_tokens task_specific_params temperature
    tf_legacy_loss tie_encoder_decoder tokenizer_class top_k top_p torch_dtype torchscript
    transformers.js_config transformers_version typical_p unsloth_version unsloth_fixed
    use_bfloat16 use_cache vocab_size
    """.split()  # noqa: SIM905
)
OFF = (None, False, 0, "", [], {})  # of an unknown field: what it describes is not there


class Fields:
    """A config.json, which remembers what was read of it."""

    def __init__(self, found: Mapping[str, Any]):
        self.found, self.seen = dict(found), set(HARMLESS)

    def __call__(self, name: str, *default: Any) -> Any:
        """A field, or its default; None counts as absent where there is a default."""
        self.seen.add(name)
        value = self.found.get(name)
        if value is not None:
            return value
        if default:
            return default[0]
        raise FamilyError(f"config.json has no {name!r}, which this family needs")

    def must(self, name: str, value: Any, default: Any) -> None:
        """Only one value of this field is computed here."""
        if (given := self(name, default)) != value:
            raise FamilyError(
                f"config.json says {name}={given!r}; only {value!r} is supported, and another value"
                " would change the numbers"
            )

    def unread(self) -> dict[str, Any]:
        """What is left that may change the numbers."""
        return {k: v for k, v in self.found.items() if k not in self.seen and v not in OFF}


ACTIVATIONS = {  # of a config.json
    "silu": "silu",
    "swish": "silu",
    "gelu": "gelu",
    "gelu_new": "gelu_tanh",
    "gelu_fast": "gelu_tanh",
    "gelu_pytorch_tanh": "gelu_tanh",
}
SAVED = {"silu": "silu", "gelu": "gelu", "gelu_tanh": "gelu_pytorch_tanh"}


def activation(name: str) -> str:
    """Our name of an activation."""
    if name not in ACTIVATIONS:
        raise FamilyError(f"activation {name!r} is not known; valid: {', '.join(ACTIVATIONS)}")
    return ACTIVATIONS[name]


def rope(fields: Fields, theta: float = 10_000.0) -> dict[str, Any]:
    """Rotary base and scaling, where older and newer files have them."""
    given = fields("rope_parameters", None) or fields("rope_scaling", None) or {}
    fields("rope_scaling", None)
    base = fields("rope_theta", given.get("rope_theta", theta))
    return {"rope_theta": float(base), "rope_scaling": scaling(given)}


def scaling(given: Mapping[str, Any]) -> RopeScaling | None:
    """What rope_parameters or rope_scaling say; None: nothing is scaled."""
    kind = given.get("rope_type", given.get("type", "default"))
    known = {"rope_type", "type", "rope_theta", "partial_rotary_factor"}
    if kind == "default":
        found = None
    elif kind == "linear":
        known, found = known | {"factor"}, RopeScaling("linear", float(given["factor"]))
    elif kind == "llama3":
        names = ("factor", "low_freq_factor", "high_freq_factor")
        original = given["original_max_position_embeddings"]
        found = RopeScaling("llama3", *(float(given[name]) for name in names), int(original))
        known |= {*names, "original_max_position_embeddings"}
    else:
        raise FamilyError(f'rope scaling {kind!r} is not supported; valid: "linear", "llama3"')
    if extra := {k: v for k, v in given.items() if k not in known and v not in OFF}:
        raise FamilyError(f"rope scaling has fields that are not known here: {extra}")
    return found


def rope_out(model: Transformer) -> dict[str, Any]:
    """Rotary base and scaling, as newer files have them."""
    scaling, found = model.rope_scaling, {"rope_theta": model.rope_theta}
    if scaling is None:
        return {"rope_parameters": {"rope_type": "default", **found}}
    found |= {"rope_type": scaling.kind, "factor": scaling.factor}
    if scaling.kind == "llama3":
        found |= {
            "low_freq_factor": scaling.low,
            "high_freq_factor": scaling.high,
            "original_max_position_embeddings": scaling.original,
        }
    return {"rope_parameters": found}


def both(tensor: str, leaf: str, layout: str = "transposed") -> tuple[Names, ...]:
    """A matrix and its bias."""
    kernel = Names(f"{tensor}.weight", (f"{leaf}/kernel",), layout)
    return kernel, Names(f"{tensor}.bias", (f"{leaf}/bias",))


def norm(tensor: str, leaf: str) -> tuple[Names, ...]:
    """A LayerNorm's scale and bias."""
    return Names(f"{tensor}.weight", (f"{leaf}/scale",)), Names(f"{tensor}.bias", (f"{leaf}/bias",))


SCORE = Names("score.weight", ("value_head/kernel",), "transposed")  # of a reward model
