"""Parameters and activations of the formulas are those of the model: counted on it, and on its
fused kernels.
"""

from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import Tensor

from megagpt.lora import attach
from megagpt.model import GPT, Block, Context, decayed, global_names
from megagpt.planning.cost.working_memory import kept_by_block, kept_by_head, rotary_angles
from megagpt.planning.parameters import frozen_of_rank, groups_of_rank, parameters_of_rank
from megagpt.schema.lora import LoraConfig
from tests.planning.test_memory import layout_of
from tests.support.configurations import KINDS, tiny

BATCH = 2
SHAPES: dict[str, dict[str, Any]] = {
    **KINDS,
    "grouped": {"num_kv_heads": 2},
    "untied": {"tie_embeddings": False, "bias": False},
}


def layout_with(recompute: str = "none", **shape: Any) -> Any:
    config = tiny(batch=BATCH, micro=BATCH, num_layers=3, **shape)
    config["megagpt"]["training"]["recompute"] = recompute
    return layout_of(config, 1)


ADAPTERS = {"rank": 3, "targets": ["qkv", "output", "up"]}


@pytest.mark.parametrize("lora", [None, ADAPTERS], ids=["whole", "lora"])
@pytest.mark.parametrize("shape", SHAPES.values(), ids=SHAPES)
@pytest.mark.parametrize("pipeline", [1, 2, 3])
def test_a_stage_has_the_parameters_of_the_model_in_its_order(
    shape: dict[str, Any], pipeline: int, lora: dict[str, Any] | None
) -> None:
    layout = layout_with(**shape).with_parallel(pipeline=pipeline)
    adapters = LoraConfig.model_validate(lora) if lora else None
    layout = replace(layout, lora=adapters)
    for rank in range(pipeline):
        with torch.device("meta"):
            part = GPT(layout.model, "none", layout.stages[rank])
            if adapters is not None:
                attach(part, adapters)
        names = global_names(part)
        expected = [
            (names[p], p.numel(), decayed(names[p]), p.requires_grad) for p in part.parameters()
        ]
        assert sorted(parameters_of_rank(layout, rank)) == sorted(expected)
        sizes = [
            [numel for _, numel, of, trained in expected if trained and of is wanted]
            for wanted in (True, False)
        ]
        ours = parameters_of_rank(layout, rank)
        assert [p.numel for p in ours if p.trained and p.decayed] == sizes[0], (
            "the order decides which rank keeps what"
        )
        frozen = sum(numel for _, numel, _, trained in expected if not trained)
        assert frozen_of_rank(layout, rank) == frozen
        assert groups_of_rank(layout, rank) == (sum(sizes[0]), sum(sizes[1]))


@pytest.mark.parametrize("shape", SHAPES.values(), ids=SHAPES)
@pytest.mark.parametrize("tensor", [1, 2])
def test_tensor_shards_add_up_to_the_model(shape: dict[str, Any], tensor: int) -> None:
    layout = layout_with(**shape).with_parallel(tensor=tensor)
    replicated = [
        parameter.numel
        for parameter in parameters_of_rank(layout, 0)
        if parameter.name.endswith((".output.bias", ".down.bias", "positions.weight"))
        or ("norm" in parameter.name and not is_cut(parameter.name, layout.model.qk_norm))
    ]
    whole = tensor * sum(p.numel for p in parameters_of_rank(layout, 0)) - (tensor - 1) * sum(
        replicated
    )
    assert whole == layout.model.num_parameters


def is_cut(name: str, qk_norm: str) -> bool:
    return qk_norm == "whole" and name.endswith((".query_norm.weight", ".key_norm.weight"))


def saved_bytes(function: Any, parameters: Any) -> int:
    """Bytes that autograd keeps of a call, the parameters apart, each byte once."""
    known = {parameter.untyped_storage().data_ptr() for parameter in parameters}
    storages: dict[int, int] = {}

    def keep(tensor: Tensor) -> Tensor:
        storage = tensor.untyped_storage()
        if storage.data_ptr() not in known:
            storages[storage.data_ptr()] = storage.nbytes()
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
        output = function()
    assert output.requires_grad
    return sum(storages.values())


@pytest.mark.parametrize("shape", SHAPES.values(), ids=SHAPES)
@pytest.mark.parametrize("recompute", ["none", "selective", "full"])
def test_a_block_keeps_what_the_formula_says(
    fused_device: str, shape: dict[str, Any], recompute: str
) -> None:
    layout = layout_with(recompute, **shape)
    block = Block(layout.model, 0, recompute).to(fused_device)
    for parameter in block.parameters():
        torch.nn.init.normal_(parameter, std=0.02)
    x = torch.randn(
        BATCH, layout.model.sequence_length, layout.model.hidden_size, device=fused_device
    )
    x.requires_grad_()
    angles = 0 if recompute == "full" else rotary_angles(layout.model)
    kept = saved_bytes(lambda: block(x, Context()), block.parameters())
    assert kept == kept_by_block(layout) + angles


def test_the_head_keeps_its_gradient_in_fp32(fused_device: str) -> None:
    layout = layout_with(tie_embeddings=False)
    with torch.device(fused_device):
        head = GPT(layout.model, "none", range(4, 5)).head
        assert head is not None
        for parameter in head.parameters():
            torch.nn.init.normal_(parameter, std=0.02)
        shape = (BATCH, layout.model.sequence_length)
        x = torch.randn(*shape, layout.model.hidden_size, requires_grad=True)
        targets = torch.zeros(shape, dtype=torch.int64)
    seen = saved_bytes(lambda: head(x, targets), head.parameters())
    assert (
        kept_by_head(layout) <= seen <= kept_by_head(layout) + 8
    )  # and the number of counted targets


def test_a_plain_block_has_the_published_size() -> None:
    """Korthikanti et al. 2022, section 4.1: 34 s b h without scores, of which dropout's two
    masks are 2 s b h; over t tensor ranks 10 + 24 / t with those masks (section 4.2.1), with
    sequence parallelism all of it over t.
    """
    layout = replace(
        layout_with(hidden_size=1024, num_heads=16, sequence_length=512), element_bytes=2
    )
    unit = layout.tokens * layout.model.hidden_size
    statistics = layout.tokens * 4 * (2 * 2 + layout.model.num_heads)
    assert kept_by_block(layout) - statistics == (34 - 2) * unit
    shared = layout.with_parallel(tensor=4)
    assert kept_by_block(shared) == pytest.approx((10 - 2 + 24 / 4) * unit, rel=0.01)
    assert kept_by_block(shared.with_parallel(sequence=True)) == pytest.approx(
        (34 - 2) / 4 * unit, rel=0.01
    )
