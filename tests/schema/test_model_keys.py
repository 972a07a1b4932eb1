"""Keys of `megagpt.model` that came after version 0.1.0: their defaults, what is refused of them,
and that runs which do not have them keep their identity.
"""

import json
from typing import Any

import pytest

from megagpt.config import ModelConfig, ResolvedConfig, identity_differences
from tests import REPOSITORY
from tests.support.config_documents import MINIMAL, put, resolve, resolve_errors
from tests.support.configurations import KINDS

MODEL = MINIMAL["megagpt"]["model"]
OLD_RUN = REPOSITORY / "tests" / "fixtures" / "version_0.1.0" / "runs" / "old"


def with_model(**keys: Any) -> dict[str, Any]:
    return put(MINIMAL, "megagpt.model", MODEL | keys)


def of_model(document: dict[str, Any]) -> dict[str, Any]:
    prefix = "megagpt.model."
    identity = resolve(document).identity()
    return {key[len(prefix) :]: identity[key] for key in identity if key.startswith(prefix)}


def test_a_run_of_an_older_version_has_the_identity_that_it_recorded() -> None:
    recorded = json.loads((OLD_RUN / "checkpoints/step_00000002/manifest.json").read_text())
    read = ResolvedConfig.from_json((OLD_RUN / "config.json").read_text())
    assert json.loads(json.dumps(read.identity())) == recorded["identity"]


def test_a_key_is_in_the_identity_where_it_differs_from_its_default() -> None:
    spelled_out = with_model(
        head_size=16,
        mlp_size=256,
        qkv_bias=True,
        norm_epsilon=1e-5,
        sliding_window_pattern=["sliding"],
    )
    assert of_model(spelled_out) == of_model(MINIMAL)
    changed = {"head_size": 8, "mlp_size": 128, "qkv_bias": False, "z_loss": 1e-4}
    assert of_model(with_model(**changed)).items() - of_model(MINIMAL).items() == changed.items()
    scaled = with_model(position="rotary", rope_scaling={"type": "linear", "factor": 2.0})
    assert {key for key in of_model(scaled) if key.startswith("rope")} == {
        "rope_scaling.type",
        "rope_scaling.factor",
    }
    assert identity_differences(
        resolve(MINIMAL).identity(), resolve(with_model(qk_norm="whole")).identity()
    ) == ['megagpt.model.qk_norm: unset in the run directory, "whole" requested']


@pytest.mark.parametrize("kind", KINDS.values(), ids=KINDS)
def test_a_resolved_run_reads_back_as_it_was(kind: dict[str, Any]) -> None:
    resolved = resolve(with_model(**kind))
    again = ResolvedConfig.from_json(resolved.to_json())
    assert again == resolved
    assert again.identity() == resolved.identity()


def test_biases_are_those_of_their_places() -> None:
    places = ("qkv_bias", "output_bias", "mlp_bias", "norm_bias")

    def biases(**keys: Any) -> list[bool]:
        model = ModelConfig.model_validate(MODEL | {"vocab_size": 128} | keys)
        return [getattr(model, place) for place in places]

    assert biases() == [True] * 4
    assert biases(bias=False) == [False] * 4
    assert biases(norm="rmsnorm") == [True, True, True, False]
    assert biases(bias=False, qkv_bias=True) == [True, False, False, False]


def test_a_window_slides_in_the_layers_of_its_pattern_if_it_hides_anything() -> None:
    model = resolve(
        with_model(
            num_layers=5, sliding_window=8, sliding_window_pattern=["sliding", "full", "full"]
        )
    ).megagpt.model
    assert [model.window(layer) for layer in range(5)] == [8, None, None, 8, None]
    assert resolve(with_model(sliding_window=32)).megagpt.model.window(0) is None


ROTARY = {"position": "rotary"}
LONG = {"type": "longrope", "factor": 2.0, "original_length": 16}


@pytest.mark.parametrize(
    ("keys", "said"),
    [
        ({"num_heads": 3}, "num_heads: 3 does not divide hidden_size 64: use 2 or 4"),
        (
            {"rope_base": 5e5},
            'rope_base: has no effect with position "learned", only with "rotary"',
        ),
        (
            {**ROTARY, "rope_fraction": 0.2},
            "rope_fraction: must rotate an even number of a head's channels (found 3)",
        ),
        (
            {**ROTARY, "rope_scaling": {**LONG, "short_factor": [1.0] * 8, "long_factor": [2.0]}},
            "rope_scaling.long_factor: one factor for each pair of rotated channels (found 1, need "
            "8)",
        ),
        (
            {**ROTARY, "rope_scaling": {"type": "ntk", "factor": 2.0}},
            'rope_scaling: "type": expected one of "linear", "dynamic", "yarn", "llama3", '
            '"longrope"; got "ntk"',
        ),
        (
            {
                **ROTARY,
                "rope_scaling": {
                    "type": "llama3",
                    "factor": 2.0,
                    "original_length": 8,
                    "high_freq_factor": 1.0,
                },
            },
            "rope_scaling.high_freq_factor: must be greater than low_freq_factor 1, got 1",
        ),
        (
            {"norm": "rmsnorm", "norm_bias": True},
            'norm_bias: has no effect with norm "rmsnorm"; remove it',
        ),
        (
            {"sliding_window_pattern": ["full"]},
            "sliding_window_pattern: has no effect without sliding_window; remove it",
        ),
        ({"score_softcap": 0}, "score_softcap: must be greater than 0, got 0"),
    ],
    ids=str,
)
def test_what_cannot_be_or_would_have_no_effect_is_refused(keys: dict[str, Any], said: str) -> None:
    (error,) = resolve_errors(with_model(**keys))
    assert error == f"x.json: megagpt.model.{said}"
