"""Parameter counts against the formulas of the method, at FLUX's size and at a tiny one."""

import pytest

from d2m.convert.sparse_pipeline import shapes_of
from runtime.files.parameters import block_count, count, modulation, totals


def sites(d: int, number: int = 1) -> dict[str, tuple[int, ...]]:
    """Shapes of sparse FFNs of width d, 1S12E."""
    shapes: dict[str, tuple[int, ...]] = {}
    for i in range(number):
        shapes |= {
            f"blocks.{i}.ff.shared.fc1.weight": (d, d),
            f"blocks.{i}.ff.shared.fc1.bias": (d,),
            f"blocks.{i}.ff.shared.fc2.weight": (d, d),
            f"blocks.{i}.ff.shared.fc2.bias": (d,),
            f"blocks.{i}.ff.gate.weight": (12, d),
            f"blocks.{i}.ff.experts.w1": (12, d, d // 4),
            f"blocks.{i}.ff.experts.b1": (12, d // 4),
            f"blocks.{i}.ff.experts.w2": (12, d // 4, d),
        }
    return shapes


@pytest.mark.parametrize("d", [32, 128, 3072])
@pytest.mark.parametrize("k", [0, 1, 2, 4, 12])
def test_ffn_follows_the_formula(d, k):
    shapes = sites(d, 3) | {"blocks.0.attn.to_q.weight": (d, d), "blocks.0.ff.neurons": (4 * d,)}
    counts = count(shapes, k)
    activated = (2 * d**2 + 2 * d) + k * (d**2 // 2 + d // 4) + 12 * d
    dense = 8 * d**2 + 4 * d + d
    assert counts["ffn_activated"] == 3 * activated
    assert counts["ffn"] == 3 * (dense + 12 * d)  # no weight lost, gates added
    assert counts["total"] == counts["ffn"] + d**2  # buffers are no parameters
    assert counts["activated"] == 3 * activated + d**2
    assert counts["gates"] == 3 * 12 * d and counts["sites"] == 3 and counts["num_experts"] == 12
    assert counts["ffn_share"] == (1 + 0.25 * k) / 4
    assert counts["ffn_share_with_biases"] == pytest.approx(activated / dense)


def test_ffn_share_of_L_is_exactly_three_eighths():
    assert count(sites(3072), 2)["ffn_share"] == 0.375


def test_dense_model_activates_everything():
    counts = count({"a.weight": (3, 4), "a.bias": (3,)})
    assert counts["total"] == counts["activated"] == 15
    assert counts["sites"] == 0 and counts["ffn_share"] == 1.0


@pytest.mark.parametrize("top_k", [None, -1, 13])
def test_top_k_out_of_range(top_k):
    with pytest.raises(ValueError, match="give a number from 0 to 12"):
        count(sites(32), top_k)


def test_real_flux_sizes_from_the_meta_device():
    """19 + 38 blocks at d = 3072: the paper's 11.901 B dense; L keeps all of it and the gates.

    The paper's 5.15 B activated needs the shared modulation too: 3.229 B of per-block modulation
    are still here, so L activates 11.901 B less 10 of 12 experts in 76 FFNs, gates added.
    """
    import torch
    from diffusers import FluxTransformer2DModel

    from d2m.model.sparse_transformer import SparseFluxTransformer2DModel

    with torch.device("meta"):
        dense = FluxTransformer2DModel(guidance_embeds=True)
        sparse = SparseFluxTransformer2DModel(guidance_embeds=True)
    total = count(shapes_of(dense))["total"]
    assert round(total / 1e9, 3) == 11.901
    counts = count(shapes_of(sparse), 2)
    d = 3072
    assert counts["sites"] == 2 * 19 + 38
    assert counts["total"] == total + 76 * 12 * d
    assert counts["activated"] == counts["total"] - 76 * 10 * (d**2 // 2 + d // 4)
    # ... and with the shared modulation in place of the per-block one it is the paper's L.
    modulation = 19 * 2 * (6 * d**2 + 6 * d) + 38 * (3 * d**2 + 3 * d)
    shared = 6 * (d**2 + d) + (12 * 19 + 3 * 38) * d
    assert round((counts["activated"] - modulation + shared) / 1e9, 3) == 5.147


def test_groups_count_the_blocks_that_run():
    """Against the model without the blocks that are skipped: equal in size, so equal in count."""
    import torch
    from diffusers import FluxTransformer2DModel

    from d2m.model.sparse_transformer import SparseFluxTransformer2DModel
    from tests.tiny.pipeline import TRANSFORMER_CONFIG

    def counted(kappa, double, single, **config):
        sizes = {"num_layers": double, "num_single_layers": single}
        with torch.device("meta"):
            model = SparseFluxTransformer2DModel(**TRANSFORMER_CONFIG | sizes | config)
        return count(shapes_of(model), 2, kappa)

    groups = {"double": [[0, 1, 2]], "single": [[0, 1], [2, 3, 4]]}
    routers = 3 * 32 * (3 + 2 + 3)
    for kappa in (1, 2):
        mine = counted(kappa, 4, 5, groups=groups)
        plain = counted(None, 4 - (3 - kappa), 5 - (2 - kappa) - (3 - kappa))
        assert mine["activated"] == plain["activated"] + routers
        assert mine["ffn_activated"] == plain["ffn_activated"]
        assert mine["ffn_share"] == 0.375
    every = counted(None, 4, 5, groups=groups)
    assert every["total"] == mine["total"] == counted(None, 4, 5)["total"] + routers
    assert every["activated"] == counted(None, 4, 5)["activated"] + routers
    dense = FluxTransformer2DModel(**TRANSFORMER_CONFIG)
    assert count(shapes_of(dense), None, 1)["activated"] == count(shapes_of(dense))["total"]


GROUPED = {
    "embed.weight": (5,),
    "transformer_blocks.0.w": (7,),
    "transformer_blocks.1.router.tokens.weight": (3, 8),
    **{f"transformer_blocks.1.blocks.{i}.w": (7,) for i in range(3)},
    **{f"transformer_blocks.1.blocks.{i}.ff.experts.w1": (12, 2, 2) for i in range(3)},
    "transformer_blocks.1.blocks.0.neurons": (100,),
}


@pytest.mark.parametrize(("kappa", "run"), [(None, 3), (1, 1), (2, 2), (3, 3), (9, 3)])
def test_blocks_that_a_group_skips_are_not_activated(kappa: int | None, run: int) -> None:
    counted = totals(GROUPED, top_k=2, kappa=kappa)
    assert counted["total"] == 5 + 7 + 24 + 3 * (7 + 48)
    assert counted["activated"] == 5 + 7 + 24 + run * (7 + 8)


def test_without_experts_everything_is_activated() -> None:
    counted = totals({"a": (2, 3), "b": ()})
    assert counted == {"total": 7, "activated": 7}


def test_blocks_of_a_group_count_each_for_itself() -> None:
    assert block_count(GROUPED, "transformer_blocks") == 4
    assert block_count(GROUPED, "single_transformer_blocks") == 0


def test_what_a_hostile_header_may_say_is_counted() -> None:
    assert totals({"a.experts.w1": (0, 2), "b.experts.w1": ()}, 2) == {"total": 1, "activated": 1}


def test_modulation_by_names() -> None:
    shared = {"modulation.linear.weight": (18, 3)}
    assert modulation({}) == {"mode": "full", "rank": None}
    assert modulation(shared | {"a.table": (6, 3)}) == {"mode": "single", "rank": None}
    assert modulation(shared) == {"mode": "lowrank", "rank": 3}
