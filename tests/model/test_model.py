"""The model alone: its start, its loss, and what recomputation, dropout, document masks and the
cache may change.
"""

import ast
import math
import random
import subprocess
import sys
from collections import Counter
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

import kernels
import megagpt.model
from kernels import reference
from kernels.philox import fold_seed, keep_mask
from megagpt.config import ModelConfig
from megagpt.model import GPT, KeyValueCache, decayed, initial_value, initialise_
from tests.support.configurations import KINDS

SIZES = {"vocab_size": 256, "num_layers": 3, "hidden_size": 32, "num_heads": 4}
FAMILIES = {name: ModelConfig(**SIZES, sequence_length=32, **kind) for name, kind in KINDS.items()}
GPT2, LLAMA = FAMILIES["gpt2"], FAMILIES["llama3"]
every_family = pytest.mark.parametrize("config", FAMILIES.values(), ids=FAMILIES)


def build(
    config: ModelConfig, *, dtype: torch.dtype = torch.float64, recompute: str = "none"
) -> GPT:
    return initialise_(GPT(config, recompute), seed=0).to(dtype)


def random_tokens(*shape: int, seed: int = 0) -> Tensor:
    return torch.randint(GPT2.vocab_size, shape, generator=torch.Generator().manual_seed(seed))


def changed(config: ModelConfig, **keys: object) -> ModelConfig:
    return config.model_validate({**config.model_dump(exclude_unset=True), **keys})


# ---------------------------------------------------------------------------------- shape and start


@every_family
def test_the_parameters_are_as_many_as_the_config_counts(config):
    assert sum(parameter.numel() for parameter in GPT(config).parameters()) == config.num_parameters


def test_parameters_have_global_names():
    names = {
        name
        for name, _ in GPT(GPT2).named_parameters()
        if not name.startswith(("blocks.0.", "blocks.1."))
    }
    weights = [
        "attention_norm",
        "attention.qkv",
        "attention.output",
        "mlp_norm",
        "mlp.up",
        "mlp.down",
    ]
    block = {f"blocks.2.{owner}.{kind}" for owner in weights for kind in ("weight", "bias")}
    assert names == block | {
        "embedding.tokens.weight",
        "embedding.positions.weight",
        "head.norm.weight",
        "head.norm.bias",
    }


@pytest.mark.parametrize(("tied", "init_std"), [(True, 0.02), (False, 0.02), (False, 0.1)])
def test_the_first_loss_is_that_of_normal_logits(tied, init_std):
    """Normalised states have squared length hidden_size, so logits are normal with variance
    hidden_size x std^2.
    """
    config = changed(
        GPT2, hidden_size=64, vocab_size=512, vocabulary=512, tie_embeddings=tied, init_std=init_std
    )
    loss = build(config, dtype=torch.float32)(random_tokens(8, 32), random_tokens(8, 32, seed=1))
    assert loss.item() == pytest.approx(math.log(512) + 64 * init_std**2 / 2, rel=0.02)


@every_family
def test_a_starting_value_depends_on_its_name_only(config):
    whole = dict(initialise_(GPT(config), seed=3).named_parameters())
    names = random.Random(0).sample(sorted(whole), len(whole))
    torch.manual_seed(99)  # the global generator must not matter
    for name in names:
        assert torch.equal(initial_value(name, whole[name].shape, config, seed=3), whole[name])


def test_starting_values_differ_between_names_and_seeds():
    shape = torch.Size((8, 8))
    cases = [
        ("blocks.0.mlp.up.weight", 0),
        ("blocks.1.mlp.up.weight", 0),
        ("blocks.0.mlp.up.weight", 1),
    ]
    values = [initial_value(name, shape, GPT2, seed) for name, seed in cases]
    assert not any(torch.equal(values[i], values[j]) for i, j in ((0, 1), (0, 2), (1, 2)))


def test_weights_start_normal_and_residual_projections_smaller():
    config = changed(GPT2, init_std=0.05)
    for owner, std in {
        "embedding.tokens": 0.05,
        "blocks.1.attention.qkv": 0.05,
        "blocks.1.mlp.up": 0.05,
        "blocks.1.attention.output": 0.05 / math.sqrt(6),
        "blocks.1.mlp.down": 0.05 / math.sqrt(6),
    }.items():
        value = initial_value(f"{owner}.weight", torch.Size((256, 128)), config, seed=0)
        assert value.std().item() == pytest.approx(std, rel=0.02)
        assert abs(value.mean().item()) < 4 * std / math.sqrt(value.numel())
    assert torch.equal(
        initial_value("blocks.1.mlp.up.bias", torch.Size((4,)), config, 0), torch.zeros(4)
    )
    assert torch.equal(
        initial_value("head.norm.weight", torch.Size((4,)), config, 0), torch.ones(4)
    )


def test_weight_decay_reaches_matrices_only():
    for name, parameter in GPT(GPT2).named_parameters():
        assert decayed(name) == (parameter.ndim == 2), name


@every_family
def test_the_loss_is_the_cross_entropy_of_the_logits(config):
    """And in training the z-loss (Chowdhery et al. 2022, section 5), if the model has one."""
    model, tokens, targets = (
        build(config, dtype=torch.float32),
        random_tokens(2, 20),
        random_tokens(2, 20, seed=1),
    )
    targets[0, 5:] = -100
    logits = model(tokens).flatten(0, 1)
    expected = F.cross_entropy(logits, targets.flatten())
    with torch.no_grad():
        torch.testing.assert_close(model(tokens, targets), expected)
    squares = logits.logsumexp(dim=-1)[targets.flatten() >= 0].square().mean()
    in_training = expected + config.z_loss * squares
    torch.testing.assert_close(model(tokens, targets), in_training)
    assert (in_training > expected) == (config.z_loss > 0)


# ------------------------------------------------------------------------------------ recomputation


def loss_and_gradients(model: GPT, **keywords: Tensor) -> tuple[Tensor, dict[str, Tensor]]:
    model.zero_grad()
    loss = model(random_tokens(2, 16), random_tokens(2, 16, seed=1), **keywords)
    loss.backward()
    return loss.detach(), {
        name: parameter.grad.clone() for name, parameter in model.named_parameters()
    }


@pytest.mark.parametrize("recompute", ["selective", "full"])
@every_family
def test_recomputation_changes_no_bit(config, recompute):
    config = changed(config, dropout=0.3)
    keywords = {
        "dropout_seed": torch.tensor([5, 6]),
        "document_ids": torch.arange(16).expand(2, 16) // 5,
    }
    loss, gradients = loss_and_gradients(build(config, dtype=torch.float32), **keywords)
    other_loss, other_gradients = loss_and_gradients(
        build(config, dtype=torch.float32, recompute=recompute), **keywords
    )
    assert torch.equal(loss, other_loss)
    assert gradients.keys() == other_gradients.keys()
    assert [
        name for name in gradients if not torch.equal(gradients[name], other_gradients[name])
    ] == []


@pytest.mark.parametrize(
    ("recompute", "attention", "mlp"), [("none", 1, 1), ("selective", 1, 2), ("full", 2, 2)]
)
def test_recomputation_runs_its_part_of_each_block_twice(recompute, attention, mlp):
    model, runs = build(GPT2, recompute=recompute), Counter()
    for block in model.blocks.values():
        block.attention.register_forward_pre_hook(lambda *_: runs.update(["attention"]))
        block.mlp.register_forward_pre_hook(lambda *_: runs.update(["mlp"]))
    loss_and_gradients(model)
    assert runs == {"attention": attention * GPT2.num_layers, "mlp": mlp * GPT2.num_layers}
    runs.clear()
    with torch.no_grad():
        model(random_tokens(2, 16))
    assert runs == {"attention": GPT2.num_layers, "mlp": GPT2.num_layers}


def saved_bytes(recompute: str) -> int:
    """What autograd keeps from forward to backward in the blocks, parameters aside; one count
    for a shared storage.
    """
    model = build(GPT2, dtype=torch.float32, recompute=recompute)
    parameters = {parameter.untyped_storage().data_ptr() for parameter in model.parameters()}
    kept: dict[int, Tensor] = {}

    def keep(tensor: Tensor) -> Tensor:
        kept[tensor.untyped_storage().data_ptr()] = tensor
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
        hidden = model.embedding(random_tokens(2, 16), megagpt.model.Context())
        for block in model.blocks.values():
            hidden = block(hidden, megagpt.model.Context())
    return sum(
        tensor.untyped_storage().nbytes()
        for pointer, tensor in kept.items()
        if pointer not in parameters
    )


def test_recomputation_keeps_fewer_activations():
    residual = 2 * 16 * GPT2.hidden_size * 4  # bytes of (batch, length, hidden_size) in fp32
    none, selective, full = (saved_bytes(recompute) for recompute in ("none", "selective", "full"))
    assert (
        none - selective >= GPT2.num_layers * 8 * residual
    )  # before and after GELU, 4 x hidden_size each
    assert (
        full <= (GPT2.num_layers + 1) * residual
    )  # what enters each block, and a little for the embedding


# ------------------------------------------------------------------------------------------ dropout


@every_family
def test_dropout_depends_neither_on_the_batch_nor_on_its_order(config):
    model = build(changed(config, dropout=0.2))
    tokens, seeds = random_tokens(4, 24), torch.tensor([10, 11, 12, 13])
    whole = model(tokens, dropout_seed=seeds)
    halves = [model(tokens[part], dropout_seed=seeds[part]) for part in (slice(0, 2), slice(2, 4))]
    torch.testing.assert_close(torch.cat(halves), whole)
    torch.testing.assert_close(model(tokens.flip(0), dropout_seed=seeds.flip(0)).flip(0), whole)


def test_dropout_follows_its_seed_and_is_off_without_one():
    model, tokens = build(changed(GPT2, dropout=0.2)), random_tokens(1, 24)
    first, again, other = (model(tokens, dropout_seed=torch.tensor([seed])) for seed in (1, 1, 2))
    assert torch.equal(first, again)
    assert not torch.allclose(first, other)
    assert torch.equal(model(tokens), build(GPT2)(tokens))


def test_every_site_drops_with_a_seed_of_its_own(monkeypatch):
    seen: list[int] = []

    def recorded(probability: float, seed: Tensor, *rest: object) -> Tensor:
        seen.extend(seed.flatten().tolist())
        return keep_mask(probability, seed, *rest)

    monkeypatch.setattr(reference, "keep_mask", recorded)
    build(changed(GPT2, dropout=0.2))(random_tokens(2, 8), dropout_seed=torch.tensor([1, 2]))
    sites = (
        1 + 3 * GPT2.num_layers
    )  # the embedding; attention's weights, its output and the MLP's in each block
    assert sorted(seen) == sorted(
        fold_seed(seed, site).item() for seed in (1, 2) for site in range(sites)
    )
    assert len(set(seen)) == 2 * sites


def test_attention_drops_by_sample_head_query_and_key():
    """Values that are unit vectors make the output the attention weights themselves."""
    q, k = torch.randn(
        2, 2, 4, 16, 16, dtype=torch.float64, generator=torch.Generator().manual_seed(0)
    )
    unit_vectors, seed = (
        torch.eye(16, dtype=torch.float64).expand(2, 4, 16, 16),
        torch.tensor([7, 8]),
    )
    whole = kernels.attention(q, k, unit_vectors, dropout=0.5, dropout_seed=seed)
    kept = keep_mask(
        0.5, seed[:, None, None], torch.arange(4)[:, None], torch.arange(16), columns=16
    )
    assert torch.equal(whole != 0, kept.tril())
    shard = kernels.attention(
        q[:, 2:], k[:, 2:], unit_vectors[:, 2:], dropout=0.5, dropout_seed=seed, head_offset=2
    )
    torch.testing.assert_close(shard, whole[:, 2:])


def test_dropout_at_a_position_offset_continues_the_mask():
    x, seed = torch.ones(2, 12, 8), torch.tensor([3, 4])
    whole = kernels.dropout(x, 0.5, seed=seed)
    assert torch.equal(kernels.dropout(x[:, 5:], 0.5, seed=seed, position_offset=5), whole[:, 5:])


@pytest.mark.parametrize("probability", [0.1, 0.6])
def test_dropout_leaves_the_expectation(probability):
    seeds = torch.arange(4000)
    deviation = math.sqrt(
        probability / (1 - probability) / len(seeds)
    )  # of the mean of ones that were dropped and scaled
    means = kernels.dropout(torch.ones(len(seeds), 4, 8), probability, seed=seeds).mean(dim=0)
    assert (means - 1).abs().max() < 4.5 * deviation
    q, k, v = torch.randn(3, 1, 2, 6, 4, generator=torch.Generator().manual_seed(1)).expand(
        3, len(seeds), 2, 6, 4
    )
    dropped = kernels.attention(q, k, v, dropout=probability, dropout_seed=seeds).mean(dim=0)
    plain = kernels.attention(q[:1], k[:1], v[:1])[0]
    assert (dropped - plain).abs().max() < 4.5 * deviation * v.abs().max()


# ------------------------------------------------------------------------------ documents and cache


def test_a_document_among_others_is_read_as_if_alone():
    """Rotary attention sees distances only, so a document's place in the sequence does not
    matter either.
    """
    model, lengths = build(LLAMA), (5, 1, 9)
    tokens = random_tokens(1, sum(lengths))
    document_ids = torch.repeat_interleave(torch.arange(3), torch.tensor(lengths))[None]
    packed = model(tokens, document_ids=document_ids).split(lengths, dim=1)
    for logits, document in zip(packed, tokens.split(lengths, dim=1), strict=True):
        torch.testing.assert_close(logits, model(document), rtol=0, atol=1e-6)  # angles are fp32


@every_family
def test_no_document_sees_the_one_before(config):
    model, tokens, other = build(config), random_tokens(1, 20), random_tokens(1, 20, seed=1)
    document_ids = (torch.arange(20) >= 8).long()[None]
    spliced = torch.cat((other[:, :8], tokens[:, 8:]), dim=1)
    assert torch.equal(
        model(tokens, document_ids=document_ids)[:, 8:],
        model(spliced, document_ids=document_ids)[:, 8:],
    )
    assert not torch.allclose(model(tokens)[:, 8:], model(spliced)[:, 8:])


@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float64, 1e-13), (torch.float32, 1e-6)])
@every_family
def test_the_cache_changes_no_logit(config, dtype, tolerance):
    model, tokens = build(config, dtype=dtype), random_tokens(2, 32)
    cache = KeyValueCache(32)
    with torch.no_grad():
        pieces = [model(piece, cache=cache) for piece in tokens.split([5, 1, 1, 9, 1, 15], dim=1)]
        torch.testing.assert_close(torch.cat(pieces, dim=1), model(tokens), rtol=0, atol=tolerance)
    assert cache.length == 32


def test_a_full_cache_says_so():
    cache = KeyValueCache(4)
    with pytest.raises(ValueError, match="holds 4 positions, need 5"), torch.no_grad():
        build(GPT2)(random_tokens(1, 5), cache=cache)


# ---------------------------------------------------------------------------------------- ignorance


def test_the_model_imports_nothing_parallel():
    tree = ast.parse(Path(megagpt.model.__file__).read_text())
    imports = [node for node in ast.walk(tree) if isinstance(node, ast.Import | ast.ImportFrom)]
    names = {node.module for node in imports if isinstance(node, ast.ImportFrom)}
    names |= {alias.name for node in imports for alias in node.names}
    assert not {
        name for name in names if name and name.startswith(("torch.distributed", "deepspeed"))
    }
    loaded = "import sys, megagpt.model; print(*sys.modules)"
    result = subprocess.run(
        [sys.executable, "-c", loaded], capture_output=True, text=True, check=True
    )
    modules = set(result.stdout.split())
    assert "megagpt.model" in modules
    assert not modules & {"deepspeed", "megagpt.distributed", "megagpt.parallel.engine"}
