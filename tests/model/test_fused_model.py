"""A whole model on the Triton kernels equals the same model on torch: loss, and the gradient of
every parameter.
"""

import pytest
import torch
from torch import Tensor

import kernels
from kernels.launcher import reset_launches
from megagpt.config import ModelConfig
from megagpt.model import GPT, initialise_
from tests.support.configurations import KINDS

SIZES = {
    "vocab_size": 128,
    "num_layers": 1,
    "hidden_size": 32,
    "num_heads": 4,
    "sequence_length": 20,
}
GPT2 = ModelConfig(**SIZES, dropout=0.2)
QWEN3 = ModelConfig(**SIZES, **KINDS["qwen3"], tie_embeddings=False)
GEMMA2 = ModelConfig(**SIZES, **KINDS["gemma2"])
NORMS = {"norm_forward", "norm_backward"}
ATTENTION = {"attention_forward", "attention_backward_delta", "attention_backward_keys"}
LOSS = {"cross_entropy_statistics", "cross_entropy_gradient"}


def loss_and_gradients(model: GPT, device: str) -> dict[str, Tensor]:
    generator = torch.Generator().manual_seed(0)
    tokens = torch.randint(128, (2, 21), generator=generator).to(device)
    documents = torch.tensor([[0] * 9 + [1] * 11, [0] * 20], device=device)
    seed = torch.tensor([5, 6], device=device)
    loss = model(tokens[:, :-1], tokens[:, 1:], document_ids=documents, dropout_seed=seed)
    gradients = torch.autograd.grad(loss, list(model.parameters()))
    names = (name for name, _ in model.named_parameters())
    return {"loss": loss.detach(), **dict(zip(names, gradients, strict=True))}


@pytest.mark.rotate(2)
@pytest.mark.parametrize("recompute", ["none", "full"])
@pytest.mark.parametrize("given", ["ids", "bounds"])
def test_document_bounds_are_computed_once_for_all_layers(
    given: str, recompute: str, fused_device: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """In a forward and backward, not by each layer, nor when a layer is computed again; never
    where they are given.
    """
    config = GPT2.model_copy(update={"num_layers": 3})
    model = initialise_(GPT(config, recompute=recompute), seed=0).to(fused_device)
    tokens = torch.zeros(2, 20, dtype=torch.int64, device=fused_device)
    documents = torch.tensor([[0] * 9 + [1] * 11, [0] * 20], device=fused_device)
    if given == "bounds":
        documents = kernels.document_bounds(documents)
    sorts, sort = [], Tensor.sort
    monkeypatch.setattr(
        Tensor, "sort", lambda *args, **kwargs: sorts.append(1) or sort(*args, **kwargs)
    )
    model(tokens, tokens, document_ids=documents).backward()
    assert kernels.launches()["attention_forward"] == 3 * (2 if recompute == "full" else 1)
    assert len(sorts) == (given == "ids")


@pytest.mark.parametrize("config", [GPT2, QWEN3, GEMMA2], ids=["gpt2", "qwen3", "gemma2"])
def test_a_model_is_the_same_on_triton_and_on_torch(
    config: ModelConfig, fused_device: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    model = initialise_(GPT(config), seed=0).to(fused_device)
    fused = loss_and_gradients(model, fused_device)
    assert set(kernels.launches()) >= NORMS | ATTENTION | LOSS
    monkeypatch.setenv("MEGAGPT_KERNELS", "torch")
    reset_launches()
    plain = loss_and_gradients(model, fused_device)
    assert kernels.launches() == {}
    for name, value in plain.items():
        torch.testing.assert_close(
            fused[name], value, rtol=1e-4, atol=1e-5, msg=lambda text, name=name: f"{name}: {text}"
        )
