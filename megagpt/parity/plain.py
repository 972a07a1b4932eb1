"""The outside reference: training in one plain PyTorch process, without DeepSpeed or the trainer.

Also the batches that such comparisons train on: learnable, the same on every machine.
"""

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.func import functional_call

from megagpt.config import ResolvedConfig
from megagpt.lora import build, initialise_
from megagpt.model import GPT, IGNORED, decayed

WEIGHT = "weight"
MOMENTS = ("exp_avg", "exp_avg_sq")


@dataclass(frozen=True)
class PlainRun:
    """Losses and gradient norms (before clipping) of each step, and flat weights at the start.

    ``start`` is by name. ``state`` holds the flat weights and both moments of Adam at the end, by
    kind and name, on the CPU. Frozen weights are in neither.
    """

    losses: list[float]
    norms: list[float]
    start: dict[str, Tensor]
    state: dict[str, dict[str, Tensor]]


def global_batch(step: int, samples: int, length: int, vocabulary: int) -> tuple[Tensor, Tensor]:
    """Return a step's tokens and targets (samples, length); the token gives the target.

    In every second step most samples have only some targets, the first has the fewest.
    """
    generator = torch.Generator().manual_seed(1000 + step)
    tokens = torch.randint(0, vocabulary, (samples, length), generator=generator)
    targets = (tokens * 7 + 3) % vocabulary
    if step % 2:
        for sample in range(samples):
            targets[sample, (sample + 1) * length // samples :] = IGNORED
    return tokens, targets


def dropout_seeds(step: int, samples: int) -> Tensor:
    """Return a seed for each sample (samples,) of a step."""
    return torch.arange(samples) + 1_000_003 * (step + 1)


def document_ids(step: int, samples: int, length: int) -> Tensor:
    """Return ids (samples, length) of packed documents of about five tokens each."""
    generator = torch.Generator().manual_seed(2000 + step)
    return (torch.rand(samples, length, generator=generator) < 0.2).cumsum(dim=1).int()


@dataclass(frozen=True)
class Samples:
    """A step's global batch: tokens and targets (samples, length), and what blocks need beside."""

    tokens: Tensor
    targets: Tensor
    document_ids: Tensor | None = None
    dropout_seed: Tensor | None = None
    positions: Tensor | None = None

    def part(self, cut: slice, device: torch.device | None) -> "Samples":
        """Return some of the samples, on a device."""
        parts = {k: v[cut].to(device) for k, v in vars(self).items() if v is not None}
        return Samples(**parts)


def samples_of(config: ResolvedConfig, step: int) -> Samples:
    """Return a step's global batch as the configuration has its data.

    Packed conversations are the documents: the first two tokens of each are no targets.
    """
    shape = config.megagpt.model
    count = config.train_batch_size
    tokens, targets = global_batch(step, count, shape.sequence_length, shape.vocabulary)
    seeds = dropout_seeds(step, count) if config.megagpt.drops else None
    packed = packs_conversations(config)
    if not (packed or config.megagpt.data.document_mask):
        return Samples(tokens, targets, dropout_seed=seeds)
    documents = document_ids(step, count, shape.sequence_length)
    if not packed:
        return Samples(tokens, targets, documents, seeds)
    positions = positions_in(documents)
    return Samples(tokens, targets.masked_fill(positions < 2, IGNORED), documents, seeds, positions)


def packs_conversations(config: ResolvedConfig) -> bool:
    """Return whether samples are of whole conversations."""
    return config.megagpt.data.packing in ("conversations", "one_per_row")


def positions_in(documents: Tensor) -> Tensor:
    """Return the place of each token in its document, from ids (samples, length) in order."""
    index = torch.arange(documents.shape[1]).expand_as(documents)
    begins = documents != documents.roll(1, dims=1)
    return index - torch.where(begins, index, 0).cummax(dim=1).values


def train(
    config: ResolvedConfig,
    steps: int,
    device: torch.device | None = None,
    dtype: torch.dtype = torch.float32,
) -> PlainRun:
    """Train with AdamW, weight decay and clipping as the configuration says.

    Its mesh, ZeRO, offload, precision and recomputation do not matter, and its scheduler is left
    out. Forward and backward compute in ``dtype``, everything else in fp32.
    """
    training = config.megagpt.training.model_copy(update={"recompute": "none"})
    whole = build(config.megagpt.model_copy(update={"training": training}))
    model = initialise_(whole, training.seed).to(device)
    trained = {name: p for name, p in model.named_parameters() if p.requires_grad}
    start = _flat(trained)
    optimizer = adam(config, model)
    computed = model if dtype == torch.float32 else computing_in(dtype, model)
    losses = []
    norms = []
    for step in range(steps):
        loss = _loss(config, computed, step, device)
        loss.backward()
        norms.append(
            float(torch.nn.utils.clip_grad_norm_(model.parameters(), config.gradient_clipping))
        )
        optimizer.step()
        optimizer.zero_grad()
        losses.append(loss.item())
    state = {WEIGHT: _flat(trained)}
    for moment in MOMENTS:
        state[moment] = _flat(
            {name: optimizer.state[p][moment] for name, p in trained.items() if steps}
        )
    return PlainRun(losses, norms, start, state)


def computing_in(dtype: torch.dtype, model: GPT) -> Callable[..., Tensor]:
    """Return the model as a function of copies of its parameters in another dtype.

    Gradients reach the parameters in fp32.
    """

    def forward(*inputs: Tensor, **context: Any) -> Tensor:
        rounded = {name: parameter.to(dtype) for name, parameter in model.named_parameters()}
        return functional_call(model, rounded, inputs, context)

    return forward


def adam(config: ResolvedConfig, model: GPT, fused: bool | None = None) -> torch.optim.AdamW:
    """Return AdamW as the configuration says, with weight decay of matrices only.

    ``fused`` is torch's.
    """
    given = config.optimizer.params
    beta1, beta2 = given.betas
    groups: dict[float, list[Tensor]] = {given.weight_decay: [], 0.0: []}
    for name, parameter in model.named_parameters():
        if parameter.requires_grad:
            groups[given.weight_decay if decayed(name) else 0.0].append(parameter)
    return torch.optim.AdamW(
        [{"params": parameters, "weight_decay": decay} for decay, parameters in groups.items()],
        lr=given.lr,
        betas=(beta1, beta2),
        eps=given.eps,
        fused=fused,
    )


def _loss(
    config: ResolvedConfig, model: Callable[..., Tensor], step: int, device: torch.device | None
) -> Tensor:
    samples = samples_of(config, step).part(slice(None), device)
    if samples.positions is not None and samples.dropout_seed is None:
        return _loss_of_conversations(model, samples)
    context = dict(vars(samples))
    return model(context.pop("tokens"), context.pop("targets"), **context)


def _loss_of_conversations(model: Callable[..., Tensor], samples: Samples) -> Tensor:
    """Return the mean loss of the targets, each conversation read alone, without any packing."""
    assert samples.document_ids is not None
    total = samples.targets.new_zeros((), dtype=torch.float32)
    for tokens, targets, documents in zip(
        samples.tokens, samples.targets, samples.document_ids, strict=True
    ):
        for document in documents.unique():
            own = documents == document
            if count := int((targets[own] != IGNORED).sum()):
                total = total + count * model(tokens[own][None], targets[own][None])
    return total / (samples.targets != IGNORED).sum()


def _flat(tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    return {name: tensor.detach().clone().flatten().cpu() for name, tensor in tensors.items()}
