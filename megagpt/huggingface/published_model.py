"""Reads a model as Hugging Face stores it: config.json as `megagpt.model`, tensors by our names.

Everything in it that changes what is computed is either ours too or refused, and all refusals are
reported at once. Only safetensors and JSON are read; nothing is executed.
"""

import json
import math
import re
from collections.abc import Iterator
from functools import cached_property
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from torch import Tensor

from megagpt.checkpoint.format import DamagedCheckpointError
from megagpt.checkpoint.reader import require_small_header
from megagpt.checkpoint.safetensors_file import StoredFile, StoredSlice
from megagpt.config import ConfigError, ModelConfig, RunConfig
from megagpt.data.manifest import read_dataset_manifest
from megagpt.data.model_tokenizer.storing import difference_of_tokenizers
from megagpt.huggingface.architectures import (
    ARCHITECTURES,
    CONFIG,
    INDEX,
    OF_TRAINING,
    WEIGHTS,
    Architecture,
    Part,
)
from megagpt.schema.errors import shown
from megagpt.schema.model import ModelSection
from megagpt.utils import UserError, human_count

DERIVED = ("mlp_size", "head_size")  # from our other keys
FORMATS = ("F64", "F32", "BF16", "F16")
# Keys of transformers' PretrainedConfig, and others that its three models here never read: where
# the model comes from, what a classifier on top would use, how text is generated from it.
CHANGES_NO_RESULT = re.compile(
    r"architectures|model_type|transformers_version|(torch_)?dtype|use_bfloat16|torchscript|"
    r"_?name_or_path|_commit_hash|auto_map|tokenizer_class|transformers\.js_config|"
    r"unsloth_version|unsloth_fixed|(bos|eos|pad|sep|decoder_start)_token_id|prefix|use_cache|"
    r"output_(attentions|hidden_states|past|scores)|(use_)?return_dict(_in_generate)?|"
    r"_?attn_implementation(_autoset|_internal)?|gradient_checkpointing|"
    r"_?num_labels|id2label|label2id|problem_type|finetuning_task|task_specific_params|"
    r"classifier_dropout|summary_.*|"
    r"do_sample|early_stopping|(max|min)_length|num_beams|num_beam_groups|num_return_sequences|"
    r"temperature|top_[kp]|typical_p|(length|repetition|diversity)_penalty|"
    r"(encoder_)?no_repeat_ngram_size|bad_words_ids|suppress_tokens|begin_suppress_tokens|"
    r"forced_(bos|eos)_token_id|remove_invalid_values|exponential_decay_length_penalty"
)


class PublishedModel:
    """A directory with config.json and safetensors.

    Raises UserError if it has none, or has another architecture.
    """

    def __init__(self, directory: Path) -> None:
        self.directory = directory
        self._config = read_json(directory / CONFIG)
        self.architecture = self._architecture()

    def _architecture(self) -> Architecture:
        named = self._config.get("architectures") or [
            a.name for a in ARCHITECTURES if self._is_like(a)
        ]
        for architecture in ARCHITECTURES:
            if named in ([architecture.name], [architecture.headless_name]):
                return architecture
        known = ", ".join(architecture.name for architecture in ARCHITECTURES)
        raise UserError(
            f"{self.directory / CONFIG}: architectures: unknown (found "
            f"{named or self._model_type}, need one of {known})"
        )

    def _is_like(self, architecture: Architecture) -> bool:
        """Return whether a file without `architectures` has this one's type, or else its keys.

        GPT-2's first files have neither.
        """
        if self._model_type is not None:
            return bool(architecture.model_type == self._model_type)
        return all(
            key.theirs in self._config
            for key in architecture.keys
            if key.default is ... and key.ours not in OF_TRAINING
        )

    @property
    def _model_type(self) -> Any:
        return self._config.get("model_type")

    def run_config(self, written: RunConfig) -> RunConfig:
        """Return the configuration with this model in it.

        Raise ConfigError with everything that the model has and ours has not.
        """
        problems = list(self._unlike_ours())
        found = self._values(problems)
        if not problems:
            keys = {
                "preset": None,
                "vocab_size": found.get("vocabulary"),
                **self.architecture.needs,
                **found,
            }
            if not self.architecture.grouped_heads:
                keys["num_kv_heads"] = found["num_heads"]
            try:
                changed = written.changed(
                    [f"megagpt.model.{key}={json.dumps(value)}" for key, value in keys.items()]
                )
                problems += self._not_derived(changed.megagpt.model)
                problems += self._too_large(changed.megagpt.model)
            except ConfigError as error:  # its values do not make a model of ours
                problems += map(self._with_their_key, error.errors)
        if problems:
            raise ConfigError(f"{self.directory / CONFIG}: {problem}" for problem in problems)
        return changed

    @cached_property
    def _flat(self) -> dict[str, Any]:
        """The keys of config.json that may have an effect; the rotary section's are among them."""
        flat = {
            k: v
            for k, v in self._config.items()
            if v is not None and not CHANGES_NO_RESULT.fullmatch(k)
        }
        for section in ("rope_parameters", "rope_scaling"):  # transformers 5, 4
            if not isinstance(flat.get(section, {}), dict):
                continue  # it stays, and is refused as an unknown key
            for key, value in flat.pop(section, {}).items():
                if key == "rope_theta":
                    flat[key] = value
                elif (key, value) not in (("rope_type", "default"), ("type", "default")):
                    flat[f"{section}.{key}"] = value
        return flat

    def _unlike_ours(self) -> Iterator[str]:
        """Yield values that compute something else, and keys that may have an unknown effect."""
        fixed = {key.theirs: key for key in self.architecture.fixed}
        known = {key.theirs for key in self.architecture.keys} | {*self.architecture.ignored}
        for key in fixed.values():
            value = self._flat.get(key.theirs, key.default)
            if value not in key.values:
                yield f"{key.theirs} {shown(value)}: megagpt needs {json.dumps(key.values[0])}"
        for name, value in self._flat.items():
            if name not in fixed and name not in known and value is not False:
                yield f"{name} {shown(value)}: megagpt does not support it"

    def _values(self, problems: list[str]) -> dict[str, Any]:
        """Return our keys with their values, None for derived ones; append to ``problems``."""
        found: dict[str, Any] = {}
        for key in self.architecture.keys:
            # of training the run's own are kept
            if key.ours in OF_TRAINING + DERIVED or self._may_differ(key.ours):
                continue
            value = self._flat.get(key.theirs, key.default)
            if value is ...:
                problems.append(f"{key.theirs}: missing; download it again")
            elif found.get(key.ours, value) != value:
                problems.append(
                    f"{key.theirs} {shown(value)}: megagpt has one {key.ours} for all layers"
                )
            # Nothing may be computed with such a number.
            elif isinstance(value, int) and value > self._stored_bytes:
                problems.append(
                    f"{key.theirs} {shown(value)}: its tensor files have only "
                    f"{self._stored_bytes} bytes"
                )
            found[key.ours] = value
        return found

    def _may_differ(self, ours: str) -> bool:
        """Return whether a run may have another value: its sequence length, with rotary positions.

        They have no table, so a run may be shorter than the model was trained for.
        """
        return ours == "sequence_length" and self.architecture.needs["position"] == "rotary"

    def _not_derived(self, model: ModelSection) -> Iterator[str]:
        for key in self.architecture.keys:
            value = self._flat.get(key.theirs)
            ours = getattr(model, key.ours)
            if key.ours in DERIVED and value not in (None, ours):
                yield (
                    f"{key.theirs} {shown(value)}: megagpt's is {ours} at hidden_size "
                    f"{model.hidden_size}"
                )
            if self._may_differ(key.ours) and isinstance(value, int) and ours > value:
                yield (
                    f"{key.theirs} {value}: shorter than the run's sequences; --set "
                    f"megagpt.model.{key.ours}={value}"
                )

    def _too_large(self, model: ModelSection) -> Iterator[str]:
        """Yield a problem if the model has more parameters than its files have bytes.

        Nothing may be allocated from a size that a file merely states.
        """
        parameters = ModelConfig.model_validate(model.model_dump()).num_parameters
        if parameters > self._stored_bytes:
            yield (
                f"{human_count(parameters)} parameters: its tensor files have only "
                f"{self._stored_bytes} bytes"
            )

    def _with_their_key(self, error: str) -> str:
        """Return an error of one of our keys, after the key of config.json that it comes from."""
        line = error.removeprefix("--set: ")
        theirs = {f"megagpt.model.{key.ours}": key.theirs for key in self.architecture.keys}
        key = line.partition(":")[0]
        return f"{theirs[key]}: {line}" if key in theirs else line

    def require_tensors(self, model: ModelConfig) -> None:
        """Raise UserError if tensors are missing, left over, or of other shapes or formats."""
        expected = {
            name: tuple(shape)
            for part in self.architecture.parts(model)
            for name, shape in part.theirs.items()
        }
        known = {self._name(name): name for name in expected}
        problems = [f"{name}: missing" for name in expected if self._name(name) not in self._places]
        for name in self._places:
            if name not in known:
                ignored = re.fullmatch(self.architecture.buffers, name) or self._is_tied_copy(name)
                problems += [] if ignored else [f"{name}: megagpt has no such tensor"]
                continue
            stored = self._stored(name)
            shape = stored.shape
            kind = stored.kind
            if shape != expected[known[name]] or kind not in FORMATS:
                wanted = f"{expected[known[name]]} in {', '.join(FORMATS)}"
                problems.append(f"{name}: {kind} of shape {shape}, the model's is {wanted}")
        if problems:
            listed = "\n".join(f"  {problem}" for problem in problems[:10])
            more = f"\n  and {len(problems) - 10} more" if len(problems) > 10 else ""
            raise UserError(
                f"{self.directory}: its tensors are not those of its config.json:\n{listed}{more}"
            )

    def _is_tied_copy(self, name: str) -> bool:
        """Return whether a tensor is the tied head's weight, stored a second time."""
        (embedding,) = self.architecture.modules["embedding.tokens"][0]
        embedding = self._name(f"{embedding}.weight")
        if name != "lm_head.weight" or embedding not in self._places:
            return False
        copy = self._tensor(name)
        tied = self._tensor(embedding)
        return copy.dtype == tied.dtype and torch.equal(copy, tied)

    def ours(self, part: Part, model: ModelConfig) -> Tensor | None:
        """Return a tensor of ours in fp32; None for a bias that our model does not have.

        Raise UserError if it is corrupt.
        """
        theirs = [self._tensor(self._name(name)).float() for name in part.theirs]
        if not all(tensor.isfinite().all() for tensor in theirs):
            raise UserError(
                f"{self.directory}: {', '.join(part.theirs)}: not finite; download the model again"
            )
        if part.stored:
            return part.relation.join(theirs, model).contiguous()
        if any(tensor.any() for tensor in theirs):
            named = ", ".join(part.theirs)
            raise UserError(
                f"{self.directory}: {named}: not zero, so biases are needed; --set "
                f"megagpt.model.bias=true"
            )
        return None

    def _name(self, name: str) -> str:
        """Return a tensor's name in these files: without the prefix if the model has no head."""
        short = name.removeprefix(self.architecture.prefix)
        return name if name in self._places or short not in self._places else short

    @cached_property
    def _places(self) -> dict[str, str]:
        """The file of each tensor."""
        if (self.directory / INDEX).is_file():
            places = read_json(self.directory / INDEX).get("weight_map")
            if not isinstance(places, dict) or not all(map(is_file_name, places.values())):
                raise UserError(
                    f"{self.directory / INDEX}: weight_map: not a map to file names; download it "
                    f"again"
                )
            return places
        if not (self.directory / WEIGHTS).is_file():
            raise UserError(
                f"{self.directory / WEIGHTS}: not found; if the weights are in another format, "
                "such as pickle, save them again with transformers: "
                "AutoModelForCausalLM.from_pretrained(...).save_pretrained(...)"
            )
        return dict.fromkeys(self._open(WEIGHTS).keys(), WEIGHTS)

    @cached_property
    def _stored_bytes(self) -> int:
        """The size of all its files together."""
        return sum(self._open(file).size_bytes for file in dict.fromkeys(self._places.values()))

    def _tensor(self, name: str) -> Tensor:
        try:
            return self._stored(name).read()
        except SafetensorError as error:
            raise UserError(f"{self.directory}: {name}: {error}; download it again") from error

    def _stored(self, tensor: str) -> StoredSlice:
        """Return where a tensor lies, with its shape and format; nothing of it is read yet."""
        file = self._places[tensor]
        try:
            return self._open(file).slice(tensor)
        except SafetensorError as error:
            raise UserError(
                f"{self.directory / INDEX}: weight_map: {tensor} is not in {file} ({error}); "
                f"download both again"
            ) from error

    def _open(self, file: str) -> StoredFile:
        if file not in self._opened:
            try:
                require_small_header(self.directory, file)
                self._opened[file] = StoredFile(self.directory / file)
            except (SafetensorError, DamagedCheckpointError, OSError) as error:
                raise UserError(
                    f"{self.directory / file}: cannot be read ({error}); download it again"
                ) from error
        return self._opened[file]

    @cached_property
    def _opened(self) -> dict[str, StoredFile]:
        return {}

    def require_tokenizer(self, data: Path) -> bool:
        """Raise UserError if the data's tokenizer gives other ids than the model's.

        Return False if the model has no tokenizer to compare.
        """
        difference = difference_of_tokenizers(data, self.directory)
        if difference:
            raise UserError(
                f"{data}: its tokenizer is not that of {self.directory}: {difference}; prepare the "
                f"data with the model's tokenizer: {preparation(self.directory, data)}"
            )
        return difference is not None

    def require_rows(self, data: Path, config: RunConfig) -> None:
        """Raise UserError if the data have ids beyond the model's embedding."""
        vocabulary = read_dataset_manifest(data).vocabulary
        rows = config.megagpt.model.vocab_size
        if rows is not None and vocabulary > rows:
            raise UserError(
                f"{data}: its tokenizer has ids beyond the embedding of {self.directory} (found "
                f"{vocabulary} tokens, need at most {rows}); prepare the data with the model's "
                f"tokenizer: {preparation(self.directory, data)}"
            )


def preparation(model: Path, data: Path) -> str:
    """Return the command that prepares data with a model's tokenizer."""
    return (
        f"python launch/download_data.py --dataset ... --tokenizer {model} --output {data} --force"
    )


def is_file_name(value: Any) -> bool:
    """Return whether a value names a safetensors file in the same directory."""
    return isinstance(value, str) and re.fullmatch(r"[\w-][\w.-]*\.safetensors", value) is not None


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
