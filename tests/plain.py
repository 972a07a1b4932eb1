"""The outside reference: the same training in one plain PyTorch process, without DeepSpeed or any of the trainer."""

from typing import Any

import torch
from torch import Tensor

from megagpt.config import RunConfig
from megagpt.model import GPT, decayed, initialise_
from tests.jobs import dropout_seeds, global_batch


def train(config: dict[str, Any], steps: int, dtype: torch.dtype = torch.float32) -> dict[str, Any]:
    """Losses, gradient norms before clipping, the weights at the start, weights and moments at the end."""
    import json

    alone = config | {"megagpt": {key: value for key, value in config["megagpt"].items() if key != "parallel"}}
    resolved = RunConfig.from_json(json.dumps(alone)).resolved(world_size=1, vocabulary=None, bf16_native=True)
    model_config, adam = resolved.megagpt.model, resolved.optimizer.params
    model = initialise_(GPT(model_config), resolved.megagpt.training.seed).to(dtype)
    start = {name: parameter.detach().clone().flatten() for name, parameter in model.named_parameters()}
    groups: dict[float, list[Tensor]] = {adam.weight_decay: [], 0.0: []}
    for name, parameter in model.named_parameters():
        groups[adam.weight_decay if decayed(name) else 0.0].append(parameter)
    optimizer = torch.optim.AdamW(
        [{"params": parameters, "weight_decay": decay} for decay, parameters in groups.items()],
        lr=adam.lr,
        betas=tuple(adam.betas),
        eps=adam.eps,
    )
    losses, norms = [], []
    for step in range(steps):
        batch = global_batch(step, resolved.train_batch_size, model_config.sequence_length, model_config.vocabulary)
        seeds = dropout_seeds(step, resolved.train_batch_size) if model_config.dropout else None
        loss = model(*batch, dropout_seed=seeds)
        loss.backward()
        norms.append(float(torch.nn.utils.clip_grad_norm_(model.parameters(), resolved.gradient_clipping)))
        optimizer.step()
        optimizer.zero_grad()
        losses.append(loss.item())
    state = {"weight": dict(model.named_parameters())}
    for moment in ("exp_avg", "exp_avg_sq"):
        state[moment] = {name: optimizer.state[p][moment] for name, p in model.named_parameters() if steps}
    flat = {kind: {name: v.detach().flatten() for name, v in tensors.items()} for kind, tensors in state.items()}
    return {"losses": losses, "norms": norms, "start": start, "state": flat}
