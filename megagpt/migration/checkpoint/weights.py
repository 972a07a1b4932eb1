"""A checkpoint's tensors as those of our model."""

from functools import cached_property

import torch
from torch import Tensor

from megagpt.config import ConfigError, ModelConfig
from megagpt.huggingface.architectures import ARCHITECTURES, Architecture, Part
from megagpt.huggingface.published_model import as_ours
from megagpt.migration.checkpoint import megatron_names
from megagpt.migration.checkpoint.sources import Source

MOST_LISTED = 10
TABLES = ("embedding.tokens.weight", "head.weight")  # theirs may have rows that pad


class ForeignWeights:
    """What `write_checkpoint` asks for: the architecture, and our tensors part by part."""

    def __init__(self, source: Source, model: ModelConfig) -> None:
        """Raise ConfigError with the tensors that are missing, left over or of another shape."""
        self.source = source
        self.model = model
        self._is_megatron = megatron_names.is_megatron(source.tensors)
        self._is_gpt_neox = megatron_names.is_gpt_neox(source.tensors)
        names = {name.removeprefix("module."): name for name in source.tensors}
        self._names = megatron_names.canonical(source.tensors) if self._is_megatron else names
        self.architecture = self._architecture(model)
        self._require_tensors()

    def ours(self, part: Part, model: ModelConfig) -> Tensor | None:
        """Return a tensor of ours in fp32; None for a bias that our model does not have."""
        theirs = [self._tensor(name, part, shape) for name, shape in part.theirs.items()]
        return as_ours(part, theirs, model, self.architecture, str(self.source.directory))

    @property
    def steps(self) -> int:
        """Updates that Adam's moments have seen; 0: there are none."""
        return self.source.steps

    def moment(self, part: Part, model: ModelConfig, moment: str) -> Tensor:
        """Return one of Adam's moments of a tensor of ours in fp32."""
        held = {name: [tensor] for name, tensor in self.source.moments[moment].items()}
        theirs = [self._tensor(name, part, shape, held) for name, shape in part.theirs.items()]
        return part.relation.join(theirs, model).to(torch.float32).contiguous()

    def _architecture(self, model: ModelConfig) -> Architecture:
        """Return how the names become ours: Megatron's, or those of one class of transformers."""
        if self._is_megatron:
            return megatron_names.architecture_of(self._names, model, gpt_neox=self._is_gpt_neox)
        alike = [one for one in ARCHITECTURES if self._has_names_of(one)]
        fitting = [one for one in alike if not one.misfits(model)]
        if fitting:
            return fitting[0]
        if not alike:
            raise ConfigError(
                [
                    f"{self.source.directory}: tensors of no model that is known (found "
                    f"{', '.join(sorted(self._names)[:3])} ...)"
                ]
            )
        raise ConfigError(
            [
                f"{self.source.directory}: the tensors are those of {alike[0].name}, and "
                f"megagpt.model is not: needs {', '.join(alike[0].misfits(model))}"
            ]
        )

    def _has_names_of(self, one: Architecture) -> bool:
        (embedding,), _ = one.modules["embedding.tokens"]
        (norm,), _ = (
            one.modules["blocks.*.attention_norm"]
            if "blocks.*.attention_norm" in (one.modules)
            else one.modules["blocks.*.attention_post_norm"]
        )
        names = (f"{embedding}.weight", f"{norm.replace('*', '0')}.weight")
        return all(one.stored_name(name, self._names) in self._names for name in names)

    def _require_tensors(self) -> None:
        expected: set[str] = set()
        problems = []
        where = self.source.directory
        for part in self.architecture.parts(self.model):
            for name, shape in part.theirs.items():
                stored = self.architecture.stored_name(name, self._names)
                expected.add(stored)
                if stored not in self._names:
                    problems.append(f"{where}: {name}: missing")
                elif (found := self._tensor(name, part, shape).shape) != shape:
                    problems.append(
                        f"{where}: {self._names[stored]}: shape {tuple(found)}, the model's is "
                        f"{tuple(shape)}"
                    )
        problems += [
            f"{where}: {self._names[name]}: megagpt.model has no such tensor"
            for name in self._names
            if name not in expected and not self._is_ignored(name)
        ]
        if problems:
            more = len(problems) - MOST_LISTED
            hidden = [f"{where}: and {more} more"] if more > 0 else []
            raise ConfigError([*problems[:MOST_LISTED], *hidden])

    def _is_ignored(self, name: str) -> bool:
        """Return whether a tensor is no parameter, or the tied head's weight, stored again."""
        head, embedding = self.architecture.head_and_embedding()
        if megatron_names.BUFFERS.fullmatch(name):
            return True
        if not self.model.tie_embeddings or name != self.architecture.stored_name(head, (name,)):
            return False
        tied = self._names.get(self.architecture.stored_name(embedding, self._names), "")
        return all(
            torch.equal(copy, table)
            for copy, table in zip(
                self.source.tensors[self._names[name]], self.source.tensors[tied], strict=True
            )
        )

    def _tensor(
        self, name: str, part: Part, shape: torch.Size, held: dict[str, list[Tensor]] | None = None
    ) -> Tensor:
        """Return a whole tensor of theirs, without rows that pad a table of tokens."""
        stored = self.architecture.stored_name(name, self._names)
        ranks = (held or self.source.tensors)[self._names[stored]]
        if self._is_megatron:
            whole = megatron_names.merge(stored, ranks, self.model, gpt_neox=self._is_gpt_neox)
        else:
            whole = ranks[0]
        return whole[: shape[0]] if part.name in TABLES else whole

    @cached_property
    def description(self) -> str:
        """What was read, for people."""
        ranks = max(len(tensors) for tensors in self.source.tensors.values())
        shared = f", {ranks} tensor ranks" if ranks > 1 else ""
        return f"{self.source.kind} with the names of {self.architecture.name}{shared}"
