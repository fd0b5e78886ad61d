"""Who loads an export: the rules of other programs, as far as an adapter alone can meet or break them."""

from __future__ import annotations

import pytest

from subspace_store.formats.loaders import LOADERS, VLLM_RANKS, partial_kinds, refusals, vllm_max_rank

LLAMA = [f"model.layers.{layer}.self_attn.{kind}" for layer in range(3) for kind in ("q_proj", "v_proj")]


@pytest.mark.parametrize(
    ("kind", "rank", "has_head", "modules", "loads"),
    [
        ("peft", 8, False, LLAMA, {"peft", "vllm", "lorax"}),
        ("peft", 8, True, LLAMA, {"peft"}),
        ("peft", 512, False, LLAMA, {"peft", "vllm", "lorax"}),
        ("peft", 513, False, LLAMA, {"peft", "lorax"}),
        ("peft", 8, False, LLAMA[:-1], {"peft", "vllm"}),  # the last layer has no v_proj
        ("peft", 8, False, [], {"peft", "vllm", "lorax"}),
        ("diffusers", 8, False, ["unet.down.0.to_q"], {"diffusers"}),
    ],
)
def test_an_export_is_loaded_by_those_who_can(
    kind: str, rank: int, has_head: bool, modules: list[str], loads: set[str]
) -> None:
    refused = refusals(kind, rank=rank, has_head=has_head, modules=modules)
    assert set(LOADERS) - set(refused) == loads
    assert all(refused.values())


def test_the_rank_that_vllm_is_to_be_started_with_is_one_that_it_allows() -> None:
    assert [vllm_max_rank(rank) for rank in (1, 2, 8, 9, 65, 300, 512)] == [1, 8, 8, 16, 128, 320, 512]
    assert vllm_max_rank(VLLM_RANKS[-1] + 1) is None


def test_a_kind_of_layer_is_partial_if_one_layer_below_the_last_lacks_it() -> None:
    assert partial_kinds(LLAMA) == ()
    assert partial_kinds([name for name in LLAMA if "1.self_attn.v_proj" not in name]) == ("self_attn.v_proj",)
    assert partial_kinds(["classifier.dense"]) == ()
    # The stacks of a model that has two are counted apart.
    assert partial_kinds([*LLAMA, "encoder.blocks.0.q", "encoder.blocks.1.q"]) == ()
