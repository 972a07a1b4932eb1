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


def train(
    config: ResolvedConfig,
    steps: int,
    device: torch.device | None = None,
    dtype: torch.dtype = torch.float32,
) -> PlainRun:
    """Train with AdamW, weight decay and clipping as the configuration says.

    Its mesh, ZeRO, offload and precision do not matter, and its scheduler is left out. Forward and
    backward compute in ``dtype``, everything else in fp32.
    """
    model = initialise_(build(config.megagpt), config.megagpt.training.seed).to(device)
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
    shape = config.megagpt.model
    samples = config.train_batch_size
    tokens, targets = global_batch(step, samples, shape.sequence_length, shape.vocabulary)
    seeds = dropout_seeds(step, samples).to(device) if config.megagpt.drops else None
    documents = None
    if config.megagpt.data.document_mask:
        documents = document_ids(step, samples, shape.sequence_length).to(device)
    return model(tokens.to(device), targets.to(device), document_ids=documents, dropout_seed=seeds)


def _flat(tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    return {name: tensor.detach().clone().flatten().cpu() for name, tensor in tensors.items()}
