"""A run's stored model on one device, or shared by ranks: pipeline, tensor and data axis.

No engine, no gradients. Each rank reads what it holds of the checkpoint. The stages of a replica
pass hidden states on, batch after batch, so that all of them work at once; only the last stage gets
a result. Replicas take turns with the batches. Every rank of a replica must make the same calls
with the same batches.
"""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from itertools import islice
from math import gcd
from pathlib import Path
from typing import Any, TypeVar

import numpy as np
import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor, nn

from megagpt.checkpoint.collective import from_rank0, together
from megagpt.config import ResolvedConfig
from megagpt.dataset import Batch
from megagpt.distributed import Mesh
from megagpt.inference.stored_model import load_model, open_weights
from megagpt.model import (
    GPT,
    IGNORED,
    Head,
    KeyValueCache,
    global_names,
    replace_parameters,
)
from megagpt.parallel import tensor_parallel
from megagpt.parallel.tensor_parallel import TensorAxis
from megagpt.planning.stages import cut
from megagpt.rundir.directory import read_config
from megagpt.utils import MIB, UserError

LOGITS_AT_ONCE = 64 * MIB  # numbers; 256 MiB in fp32

Item = TypeVar("Item")


@dataclass(frozen=True)
class Score:
    """The log-probability of some targets together, in nats, and whether each was the best."""

    log_probability: float
    greedy: bool


class PlacedModel:
    """The model of a run as this rank holds it; ``mesh`` is None if it holds all of it.

    ``trunk`` are its layers without the head, ``head`` is None except on the last stage.
    """

    def __init__(
        self, model: GPT, config: ResolvedConfig, step: int, device: torch.device, mesh: Mesh | None
    ) -> None:
        self.head: Head | None = model.head
        model.head = None
        self.trunk = model
        self.config = config
        self.step = step
        self.device = device
        self.mesh = mesh

    @property
    def replica(self) -> int:
        """The number of this rank's replica."""
        return self.mesh.data_rank if self.mesh is not None else 0

    @property
    def replicas(self) -> int:
        """The number of replicas."""
        return self.mesh.data_size if self.mesh is not None else 1

    @property
    def speaks(self) -> bool:
        """Whether this rank has its replica's results: one rank of the last stage."""
        return self.head is not None and (self.mesh is None or self.mesh.tensor_rank == 0)

    def share(self, items: Iterator[Item]) -> Iterator[Item]:
        """Yield this replica's items: every ``replicas``-th."""
        return islice(items, self.replica, None, self.replicas)

    def sums(self, values: Sequence[float]) -> list[float]:
        """Return the sums over the replicas of the values of the rank that speaks; collective."""
        if self.mesh is None:
            return list(values)
        own = torch.tensor(values, dtype=torch.float64, device=self.device)
        own = own if self.speaks else torch.zeros_like(own)
        dist.all_reduce(own)
        return own.tolist()

    def gather(self, results: list[Item]) -> list[Item]:
        """Return all replicas' results in the order of the items given to ``share``; collective.

        Those of ranks that do not speak are ignored.
        """
        if self.mesh is None:
            return results
        everyones: list[Any] = [None] * self.mesh.world_size
        mine = (self.replica, results) if self.speaks else None
        dist.all_gather_object(everyones, mine)
        by_replica = dict(filter(None, everyones))
        whole: list[Any] = [None] * sum(map(len, by_replica.values()))
        for replica, own in by_replica.items():
            whole[replica :: self.replicas] = own
        return whole

    @torch.no_grad()
    def loss(self, batch: Batch) -> Tensor | None:
        """Return the mean loss of the targets in nats on the last stage, None on others."""
        context = {
            name: torch.from_numpy(array)
            for name in ("document_ids", "positions")
            if (array := getattr(batch, name)) is not None
        }
        x = self._hidden(torch.from_numpy(batch.tokens), **context)
        if self.head is None:
            return None
        return self.head(x, torch.from_numpy(batch.targets).to(self.device))

    @torch.no_grad()
    def scores(self, tokens: np.ndarray, targets: np.ndarray, rows: np.ndarray) -> list[Score]:
        """Return the score of each row of targets on the last stage, an empty list on others.

        ``tokens`` (batch, length) are read once; ``targets`` (n, length) stand beside the tokens
        of ``rows`` (n,), so one row may have several.
        """
        x = self._hidden(torch.from_numpy(tokens))
        if self.head is None:
            return []
        wanted = torch.from_numpy(targets).to(self.device)
        counts = wanted != IGNORED
        owners, places = counts.nonzero(as_tuple=True)
        states = x[torch.from_numpy(rows).to(self.device)[owners], places]
        log_probabilities, best = self._targets(states, wanted[counts])
        nats = torch.zeros(len(targets), dtype=torch.float64, device=self.device)
        nats.index_add_(0, owners, log_probabilities.double())
        misses = torch.zeros(len(targets), dtype=torch.int64, device=self.device)
        misses.index_add_(0, owners, (~best).long())
        return [
            Score(nat, miss == 0) for nat, miss in zip(nats.tolist(), misses.tolist(), strict=True)
        ]

    def _targets(self, x: Tensor, targets: Tensor) -> tuple[Tensor, Tensor]:
        """Return the log-probability of each target (n,), and whether it is the best token.

        ``x`` (n, hidden_size) are hidden states. The logits of some at a time are in memory.
        """
        assert self.head is not None
        model = self.config.megagpt.model
        found: list[Tensor] = []
        best: list[Tensor] = []
        at_once = max(1, LOGITS_AT_ONCE // model.vocab_size)
        for states, wanted in zip(x.split(at_once), targets.split(at_once), strict=True):
            logits = self.head(states[None], None)[0, :, : model.vocabulary].float()
            log_probabilities = F.log_softmax(logits, dim=-1)
            found.append(log_probabilities.gather(1, wanted[:, None])[:, 0])
            best.append(logits.argmax(dim=-1) == wanted)
        return torch.cat(found), torch.cat(best)

    @torch.no_grad()
    def logits(self, tokens: Tensor, cache: KeyValueCache) -> Tensor:
        """Return the logits (batch, 1, padded vocabulary) of the token after ``tokens``, fp32.

        Every rank of the replica gets the same. ``cache`` is this rank's own.
        """
        x = self._hidden(tokens, cache=cache)
        cache.length += tokens.shape[1]
        if self.head is not None:
            logits = self.head(x[:, -1:], None).float().contiguous()
        else:
            shape = (tokens.shape[0], 1, self.config.megagpt.model.vocab_size)
            logits = torch.empty(shape, device=self.device)
        if self.mesh is not None:
            source = int(self.mesh.device_mesh.mesh[-1, self.mesh.data_rank, 0])
            dist.broadcast(logits, src=source, group=self.mesh.model_group)
        return logits

    def _hidden(self, tokens: Tensor, **context: Any) -> Tensor:
        """Return the hidden states after this rank's layers, and send them to the next stage."""
        context = {
            name: value.to(self.device) if isinstance(value, Tensor) else value
            for name, value in context.items()
        }
        mesh = self.mesh
        if mesh is None or mesh.pipeline_rank == 0:
            x = tokens.to(self.device)
        else:
            shape = (*tokens.shape, self.config.megagpt.model.hidden_size)
            x = torch.empty(shape, device=self.device, dtype=self._dtype)
            dist.recv(x, src=mesh.rank_of_stage(mesh.pipeline_rank - 1))
        x = self.trunk(x, **context)
        if mesh is not None and mesh.pipeline_rank + 1 < mesh.pipeline_size:
            dist.send(x.contiguous(), dst=mesh.rank_of_stage(mesh.pipeline_rank + 1))
        return x

    @property
    def _dtype(self) -> torch.dtype:
        return next(self.trunk.parameters()).dtype


def mesh_sizes(
    config: ResolvedConfig, ranks: int, tensor: int | None, pipeline: int | None
) -> tuple[int, int, int]:
    """Return the sizes of the axes pipeline, data and tensor for a number of ranks.

    Of axes that are not given, the run's own are taken if the ranks are a multiple of them. Raise
    UserError if the model cannot be shared like that.
    """
    model = config.megagpt.model
    parallel = config.megagpt.parallel
    tensor = tensor or parallel.tensor
    pipeline = pipeline or parallel.pipeline
    if ranks % (tensor * pipeline):
        raise UserError(
            f"{ranks} ranks are no multiple of tensor {tensor} x pipeline {pipeline}; start "
            f"{tensor * pipeline} of them, or give --tensor and --pipeline"
        )
    shared = gcd(model.num_kv_heads, model.mlp_size, model.vocab_size)
    if shared % tensor:
        possible = [str(ranks) for ranks in range(1, shared + 1) if shared % ranks == 0]
        raise UserError(
            f"--tensor {tensor}: must divide num_kv_heads, the MLP width and the rows of the "
            f"embedding; use one of {', '.join(possible)}"
        )
    if pipeline > model.num_layers:
        raise UserError(
            f"--pipeline {pipeline}: the model has {model.num_layers} layers; use fewer stages"
        )
    return pipeline, ranks // (tensor * pipeline), tensor


def place_model(
    run_directory: Path, *, step: int | None, device: torch.device, mesh: Mesh | None = None
) -> PlacedModel:
    """Return the model of a run's newest sound checkpoint, or of ``step``, in fp32.

    Every rank of the mesh must call it. Raise UserError if there is no such checkpoint.
    """
    if mesh is None or mesh.world_size == 1:
        model, config, found = load_model(run_directory, step=step, device=device)
        return PlacedModel(model, config, found, device, None)
    config = read_config(run_directory)
    found = from_rank0(lambda: open_weights(run_directory, step)[0])
    _, weight = together(lambda: open_weights(run_directory, found, verified=True))
    axis = TensorAxis(mesh.tensor_group, sequence=False) if mesh.tensor_size > 1 else None
    layers = cut(config.megagpt.model, mesh.pipeline_size)[mesh.pipeline_rank]
    with torch.device("meta"):
        model = GPT(config.megagpt.model, layers=layers)
    names = global_names(model)
    split = {} if axis is None else tensor_parallel.split_dimensions(model)
    if axis is not None:
        tensor_parallel.share(model, axis)

    def read(template: nn.Parameter) -> nn.Parameter:
        box = tensor_parallel.box(template.shape, split.get(template), axis)
        return nn.Parameter(weight(names[template], box).to(device))

    replace_parameters(model, read)
    return PlacedModel(model.eval(), config, found, device, mesh)
