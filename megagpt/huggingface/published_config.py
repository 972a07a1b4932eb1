"""The config.json of a published model, as `megagpt.model`.

Every key that changes what is computed is either ours too or refused, and all refusals are reported
at once. A key that nobody knows is refused unless the user says that it changes nothing.
"""

import json
import math
import re
from collections.abc import Collection, Iterator
from pathlib import Path
from typing import Any

from megagpt.config import ConfigError, ModelConfig, RunConfig
from megagpt.huggingface.architectures import (
    ARCHITECTURES,
    OF_TRAINING,
    Architecture,
)
from megagpt.huggingface.keys import Key, UnlikeOursError
from megagpt.schema.errors import shown
from megagpt.schema.model import ModelSection
from megagpt.schema.rope import DynamicScaling
from megagpt.utils import UserError, human_count

# Keys of transformers' PretrainedConfig, and others that the models of the table never read: where
# the model comes from, what a classifier on top would use, how text is generated from it.
CHANGES_NO_RESULT = re.compile(
    r"architectures|model_type|transformers_version|(torch_)?dtype|use_bfloat16|torchscript|"
    r"_?name_or_path|_commit_hash|auto_map|tokenizer_class|transformers\.js_config|"
    r"unsloth_version|unsloth_fixed|prefix|use_cache|cache_implementation|"
    r"(bos|eos|pad|sep|cls|unk|mask|decoder_start)_token_id|chunk_size_feed_forward|"
    r"output_(attentions|hidden_states|past|scores)|(use_)?return_dict(_in_generate)?|"
    r"_?attn_implementation(_autoset|_internal)?|_flash_attn_2_enabled|gradient_checkpointing|"
    r"_?num_labels|id2label|label2id|problem_type|finetuning_task|task_specific_params|"
    r"classifier_dropout|summary_.*|"
    r"do_sample|early_stopping|(max|min)_length|num_beams|num_beam_groups|num_return_sequences|"
    r"temperature|top_[kp]|typical_p|(length|repetition|diversity)_penalty|"
    r"(encoder_)?no_repeat_ngram_size|bad_words_ids|suppress_tokens|begin_suppress_tokens|"
    r"forced_(bos|eos)_token_id|remove_invalid_values|exponential_decay_length_penalty"
)
# Numbers of ours that decide how much is allocated.
SIZES = {
    *("vocabulary", "hidden_size", "num_layers", "sequence_length"),
    *("num_heads", "num_kv_heads", "head_size", "mlp_size"),
}


class PublishedConfig:
    """A config.json of a known architecture.

    ``ignored`` are keys of it that the user says change nothing.

    Raises UserError if the file cannot be read, or has another architecture.
    """

    def __init__(self, path: Path, ignored: Collection[str] = ()) -> None:
        self.path = path
        self.ignored = ignored
        self.document = read_json(path)
        self.architecture = self._architecture()

    def _architecture(self) -> Architecture:
        kind = self.document.get("model_type")
        named = self.document.get("architectures") or [
            a.name for a in ARCHITECTURES if self._is_like(a)
        ]
        for architecture in ARCHITECTURES:
            if named in ([architecture.name], [architecture.headless_name]):
                return architecture
        known = ", ".join(architecture.name for architecture in ARCHITECTURES)
        raise UserError(
            f"{self.path}: architectures: unknown (found {named or kind}, need one of {known})"
        )

    def _is_like(self, architecture: Architecture) -> bool:
        """Return whether a file without `architectures` has this one's type, or else its keys.

        GPT-2's first files have neither.
        """
        kind = self.document.get("model_type")
        if kind is not None:
            return bool(architecture.model_type == kind)
        own = [key for key in architecture.keys if isinstance(key, Key)]
        return all(key.theirs in self.document for key in own if key.default is ...)

    def run_config(self, written: RunConfig, stored_bytes: int) -> RunConfig:
        """Return the run ``written`` with this model, whose tensor files have ``stored_bytes``.

        Raise ConfigError with everything that the model has and ours has not.
        """
        # Nothing may be computed with a size that is larger than the files.
        oversized = list(self._oversized(stored_bytes))
        problems = oversized or self.unlike_ours()
        if not problems:
            try:
                changed = self._with_model(written, self.architecture.read(self.document))
                problems += self._too_short(changed.megagpt.model)
                problems += _too_large(changed.megagpt.model, stored_bytes)
            except ConfigError as error:  # its values do not make a model of ours
                problems += map(self._with_their_key, error.errors)
        if problems:
            raise ConfigError(f"{self.path}: {problem}" for problem in problems)
        return changed

    def unlike_ours(self) -> list[str]:
        """Return values that compute something else, and keys that may have an unknown effect."""
        problems = list(self._unknown())
        try:
            self.architecture.read(self.document)
        except UnlikeOursError as error:
            problems += error.problems
        return problems

    def _unknown(self) -> Iterator[str]:
        """Yield keys that may have an effect which is not known here."""
        known = {name for relation in self.architecture.keys for name in relation.names}
        known |= {*self.architecture.ignored, *self.ignored}
        for name, value in self.document.items():
            if not value and not isinstance(value, int | float):  # null, "", [], {}
                continue
            if name in known or value is False or CHANGES_NO_RESULT.fullmatch(name):
                continue
            yield (
                f"{name} {shown(value)}: megagpt does not support it; if it changes no result, add "
                f"--ignore_keys {name}"
            )

    def _oversized(self, stored_bytes: int) -> Iterator[str]:
        for key in self.architecture.keys:
            if isinstance(key, Key) and key.ours in SIZES:
                value = self.document.get(key.theirs)
                if isinstance(value, int) and value > stored_bytes:
                    yield (
                        f"{key.theirs} {shown(value)}: its tensor files have only {stored_bytes} "
                        "bytes"
                    )

    def _with_model(self, written: RunConfig, keys: dict[str, Any]) -> RunConfig:
        """Return the run with the model's keys in the place of its own; it keeps those of training.

        With rotary positions, a run may be shorter than what the model was trained for.
        """
        model = written.megagpt.model
        kept = [key for key in OF_TRAINING if key in model.model_fields_set]
        if "sequence_length" not in keys:
            kept += ["sequence_length"]
        biases = {place: self._free_bias(model, place) for place in self.architecture.free_biases}
        places = keys | biases
        bias = all(places[place] for place in ("qkv_bias", "output_bias", "mlp_bias"))
        document = written.as_written()
        document["megagpt"]["model"] = {
            "vocab_size": keys["vocabulary"],
            "bias": bias,
            **keys,
            **biases,
            **{key: getattr(model, key) for key in kept},
        }
        return RunConfig.from_json(json.dumps(document), "")

    @staticmethod
    def _free_bias(model: ModelSection, place: str) -> bool:
        """Return whether the run wants biases that its files always hold: yes, if it does not say.

        An export of a model without biases has zeros in their place.
        """
        if place in model.model_fields_set:
            return bool(getattr(model, place))
        return model.bias if "bias" in model.model_fields_set else True

    def _too_short(self, model: ModelSection) -> Iterator[str]:
        """Yield a problem if the run's samples are longer than the model's context."""
        longest = self.longest(model)
        if longest is not None and model.sequence_length > longest:
            yield (
                f"max_position_embeddings {longest}: shorter than the run's sequences; --set "
                f"megagpt.model.sequence_length={longest}"
            )

    def longest(self, model: ModelSection) -> int | None:
        """Return the context that it states for a model of rotary positions; None if it does not.

        Dynamic scaling starts where the stated one ends.
        """
        longest = self.document.get("max_position_embeddings")
        if not isinstance(longest, int) or model.position == "learned":
            return None
        scaling = model.rope_scaling
        return int(longest * scaling.factor) if isinstance(scaling, DynamicScaling) else longest

    def _with_their_key(self, error: str) -> str:
        """Return an error of one of our keys, after the key of config.json that it comes from."""
        line = error.removeprefix(": ")
        keys = [key for key in self.architecture.keys if isinstance(key, Key)]
        theirs = {key.ours: key.theirs for key in reversed(keys)}
        theirs |= {"rope_scaling": "rope_scaling", "rope_base": "rope_theta"}
        theirs |= {"sliding_window": "sliding_window"}
        ours = re.match(r"megagpt\.model\.(\w+)", line)
        return f"{theirs[ours[1]]}: {line}" if ours and ours[1] in theirs else line


def _too_large(model: ModelSection, stored_bytes: int) -> Iterator[str]:
    """Yield a problem if the model has more parameters than its files have bytes.

    Nothing may be allocated from a size that a file merely states.
    """
    parameters = ModelConfig.model_validate(model.model_dump()).num_parameters
    if parameters > stored_bytes:
        yield (
            f"{human_count(parameters)} parameters: its tensor files have only {stored_bytes} bytes"
        )


def read_json(path: Path) -> dict[str, Any]:
    """Return the JSON object in a file; raise UserError."""
    try:
        content = json.loads(path.read_bytes(), parse_constant=_finite, parse_float=_finite)
    except OSError as error:
        raise UserError(
            f"{path}: cannot be read ({error.strerror}); give the directory of a model, made with "
            "hf download NAME --local-dir DIR"
        ) from error
    except (ValueError, RecursionError) as error:
        raise UserError(f"{path}: not JSON ({error}); download it again") from error
    if not isinstance(content, dict):
        raise UserError(f"{path}: not a JSON object; download it again")
    return content


def _finite(number: str) -> float:
    """Return a float; raise ValueError for NaN and infinity, which JSON does not have."""
    value = float(number)
    if not math.isfinite(value):
        raise ValueError(f"{number} is not finite")
    return value
