"""The section ``megagpt.training.lora``: its defaults, and what its targets may be."""

from typing import Any

import pytest

from megagpt.schema.lora import PEFT_NAMES, known_projections, projection
from tests.support.config_documents import MINIMAL, errors_of, parse, put, resolve


def with_lora(activation: str = "gelu", **lora: Any) -> dict[str, Any]:
    document = put(MINIMAL, "megagpt.training.lora", {"rank": 4} | lora)
    return put(document, "megagpt.model.activation", activation)


def test_the_default_is_every_projection_with_twice_the_rank() -> None:
    run = parse(with_lora("swiglu"))
    lora = run.megagpt.training.lora
    assert lora is not None
    assert (lora.alpha, lora.dropout, lora.base) == (8.0, 0.0, None)
    assert lora.projections(run.megagpt.model) == (
        *("query", "key", "value", "output", "gate", "up", "down"),
    )


def test_projections_have_the_rows_of_the_layers() -> None:
    model = resolve(with_lora("swiglu"), vocabulary=128).megagpt.model
    for fused, parts in (("qkv", ("query", "key", "value")), ("gate_up", ("gate", "up"))):
        assert projection(fused, model).outputs == sum(projection(p, model).outputs for p in parts)
    assert all(projection(n, model).layer for n in known_projections(model))


@pytest.mark.parametrize(
    ("lora", "said"),
    [
        ({"rank": 0}, "megagpt.training.lora.rank: must be at least 1, got 0"),
        ({"alpha": 0}, "megagpt.training.lora.alpha"),
        ({"dropout": 1.0}, "megagpt.training.lora.dropout"),
        ({"targets": []}, "megagpt.training.lora.targets"),
        ({"targets": ["gate"]}, "it has qkv, query, key, value, output, up, down"),
        ({"targets": ["q_proj"]}, 'did you mean "query"?'),
        ({"targets": ["qurey"]}, 'did you mean "query"?'),
        ({"targets": ["all", "down"]}, '"all" stands alone'),
        ({"targets": ["qkv", "key"]}, '"qkv" and "key" have the same rows'),
        ({"rnk": 4}, 'unknown key, did you mean "rank"?'),
    ],
    ids=str,
)
def test_wrong_values_are_one_line_each(lora: dict[str, Any], said: str) -> None:
    (line,) = errors_of(with_lora(**lora))
    assert said in line


def test_names_of_peft_have_a_projection() -> None:
    model = parse(with_lora("swiglu")).megagpt.model
    assert set(PEFT_NAMES.values()) <= {*known_projections(model), "all"}


def test_a_run_without_adapters_keeps_its_identity() -> None:
    assert not any("lora" in key for key in resolve(MINIMAL, vocabulary=128).identity())
    keys = resolve(with_lora(), vocabulary=128).identity()
    assert {key.rpartition(".")[2] for key in keys if ".lora." in key} == {
        *("rank", "alpha", "dropout", "targets"),
    }
