"""The closed-form starts of shared modulation against brute force, and against each other."""

import pytest
import torch
import torch.nn.functional as F

from d2m.convert.modulation_fit import compress_adaln, fit_lowrank, fit_single, modulation_moments
from d2m.families.flow import generator_at, noisy
from d2m.families.inputs import transformer_inputs
from d2m.model.modulation import norms
from d2m.model.surgery import identity_error
from d2m.recipe.structure import AdaLN
from tests.tiny.pair import RECIPE, grouped_pair, tiny_batches, tiny_pair
from tests.tiny.pipeline import tiny_inputs, tiny_transformer

F64 = torch.float64
D = 8


def noise(*shape, seed=0):
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=F64)


def problem(seed=0, samples=200):
    """Two norms of 6 D and one of 3 D rows, and calibration inputs s [samples, D]."""
    rows = {"a": 6 * D, "b": 6 * D, "c": 3 * D}
    weights = {name: noise(n, D, seed=seed + i) for i, (name, n) in enumerate(rows.items())}
    biases = {name: noise(n, seed=seed + 9 + i) for i, (name, n) in enumerate(rows.items())}
    scale = torch.logspace(0, -1, D, dtype=F64)
    s = noise(samples, D, seed=seed + 20) * scale @ noise(D, D, seed=seed + 21) + noise(D, seed=7)
    mean = s.mean(0)
    return weights, biases, s, mean, (s - mean).T @ (s - mean) / samples


def wanted(weights, biases, s):
    return {name: s @ weight.T + biases[name] for name, weight in weights.items()}


def test_single_is_the_least_squares_solution():
    """Against torch's lstsq on all samples, with a shared column block and a table per norm."""
    weights, biases, s, mean, _ = problem()
    fit = fit_single(weights, biases, mean)
    total = dict.fromkeys(("ours", "lstsq"), 0.0)
    for part, users in ((slice(0, 3 * D), "abc"), (slice(3 * D, 6 * D), "ab")):
        tables = torch.eye(len(users), dtype=F64).repeat_interleave(len(s), 0)
        design = torch.cat([s.repeat(len(users), 1), tables], dim=1)
        aims = torch.cat([wanted(weights, biases, s)[name][:, part] for name in users])
        best = torch.linalg.lstsq(design, aims).solution
        total["lstsq"] += (design @ best - aims).square().sum().item()
        shared = s @ fit["linear.weight"][part].T + fit["linear.bias"][part]
        ours = torch.cat([shared + fit[name][part] for name in users])
        total["ours"] += (ours - aims).square().sum().item()
    assert total["ours"] == pytest.approx(total["lstsq"], rel=1e-9) and total["ours"] > 1


@pytest.mark.parametrize("rank", [1, 3, 7])
def test_lowrank_is_eckart_youngs_optimum(rank):
    """The error is that of the truncated SVD of W C^1/2, which no matrix of that rank can beat."""
    weights, biases, s, mean, covariance = problem(3)
    fit = fit_lowrank(weights, biases, mean, covariance, rank)
    low = s @ fit["linear.weight"].T
    assert low.shape == (200, rank)
    error = sum(
        (low @ fit[f"{n}.weight"].T + fit[f"{n}.bias"] - aim).square().sum() / len(s)
        for n, aim in wanted(weights, biases, s).items()
    )
    values, vectors = torch.linalg.eigh(covariance)
    root = (vectors * values.clamp_min(0).sqrt()) @ vectors.T
    singular = torch.linalg.svdvals(torch.cat(list(weights.values())) @ root)
    # The ridge moves the optimum a little.
    assert error.item() == pytest.approx(singular[rank:].square().sum().item(), rel=2e-3)
    basis = fit["linear.weight"]
    torch.testing.assert_close(basis @ basis.T, torch.eye(rank, dtype=F64))


def test_lowrank_at_full_rank_is_exact_everywhere():
    """Also off the calibration data, which may span fewer directions than D."""
    weights, biases, s, mean, covariance = problem(5, samples=4)
    fit = fit_lowrank(weights, biases, mean, covariance, D)
    x = noise(50, D, seed=33)
    for name, aim in wanted(weights, biases, x).items():
        low = x @ fit["linear.weight"].T
        actual = low @ fit[f"{name}.weight"].T + fit[f"{name}.bias"]
        torch.testing.assert_close(actual, aim, rtol=1e-9, atol=1e-9)


@pytest.mark.parametrize(("dtype", "limit"), [(F64, 1e-9), (torch.float32, 1e-5)])
def test_identity_of_the_model_at_full_rank(dtype, limit):
    student, teacher = tiny_pair(dtype=dtype)
    data = double_batches if dtype == F64 else tiny_batches
    moments = modulation_moments(teacher, data, RECIPE)
    compress_adaln(student, AdaLN("lowrank", 32), moments)
    assert identity_error(student, teacher, tiny_inputs(dtype=dtype)) < limit
    assert student.config.adaln == "lowrank" and student.config.adaln_rank == 32


def test_full_is_left_alone():
    student, teacher = tiny_pair()
    names = list(student.state_dict())
    compress_adaln(student, AdaLN(), {})
    assert list(student.state_dict()) == names and student.config.adaln == "full"
    assert identity_error(student, teacher, tiny_inputs()) < 1e-5


def test_moments_are_those_of_what_the_norms_get():
    model = tiny_transformer(dtype=F64)
    seen = []
    model.transformer_blocks[0].norm1.register_forward_pre_hook(
        lambda module, args, kwargs: seen.append(F.silu(kwargs["emb"])), with_kwargs=True
    )
    with torch.no_grad():
        for i in range(RECIPE.calibration.batches):
            batch = double_batches(i, 32)
            x, t, _ = noisy(batch["latents"], generator_at(4, "adaln", i))
            model(**transformer_inputs(model, batch, x, t.double()))
    moments = modulation_moments(model, double_batches, RECIPE, seed=4)
    s = torch.cat(seen)
    # The model multiplies its times in float64 here, the calibration draws them in float32.
    torch.testing.assert_close(moments["mean"], s.mean(0), rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(
        moments["covariance"], torch.cov(s.T, correction=0), rtol=1e-3, atol=1e-4
    )


def test_lowrank_starts_closer_than_single():
    """At no more weights; the output's error with all else as in the teacher."""
    errors, weights = {}, {}
    for mode, rank in (("single", None), ("lowrank", None), ("lowrank", 16)):
        student, teacher = grouped_pair(dtype=F64)
        moments = modulation_moments(teacher, double_batches, RECIPE)
        compress_adaln(student, AdaLN(mode, rank), moments)
        errors[mode, rank] = identity_error(student, teacher, tiny_inputs(5, F64, batch=8))
        shared = ("modulation", *norms(student))
        weights[mode, rank] = sum(
            p.numel() for n, p in student.named_parameters() if n.startswith(shared)
        )
    assert weights["lowrank", None] <= weights["single", None]
    assert errors["lowrank", None] < 0.8 * errors["single", None]
    assert errors["lowrank", 16] < errors["lowrank", None]


def double_batches(step, size):
    return {name: tensor.double() for name, tensor in tiny_batches(step, size).items()}
