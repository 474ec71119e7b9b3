"""Distillation of a model with groups of blocks: stage 3, stages alone, joint training."""

import os
import signal
from dataclasses import replace

import pytest
import torch

from d2m.distill import learner
from d2m.distill.features import block_features, feature_names, group_feature_names
from d2m.distill.loop import distill
from d2m.families.flow import generator_at, noisy
from d2m.model.block_group import block_groups, set_kappa
from d2m.recipe.recipe import with_stages
from d2m.recipe.structure import Blocks
from tests.tiny.pair import BLOCKS, GROUPS, THREE, grouped_pair, tiny_batches
from tests.tiny.pipeline import tiny_inputs

MEMBERS = ("transformer_blocks.1.", "single_transformer_blocks.0.", "single_transformer_blocks.2.")


def run(student, teacher, recipe, workdir, **options):
    options = {"log": lambda text: None, "workdir": workdir, "seed": 3} | options
    return distill(student, teacher, recipe, tiny_batches, **options)


def weights(model):
    return {name: parameter.detach().clone() for name, parameter in model.named_parameters()}


def only(stage, **changes):
    return replace(THREE, stages=(replace(stage, **changes),))


@pytest.fixture(scope="module")
def trained(tmp_path_factory):
    """(student, teacher, weights before, log) of 100 steps of stage 3 alone."""
    student, teacher = grouped_pair()
    before = weights(student)
    recipe = only(GROUPS, steps=100, batch_size=8)
    history = run(student, teacher, recipe, tmp_path_factory.mktemp("run"), log_every=20)
    return student, teacher, before, history


# ---------------------------------------------------------------- stage 3


def test_the_groups_loss_falls(trained):
    *_, history = trained
    # The group loss is weighed by the output's, so both fall together; features say it unweighted.
    assert history[-1]["output"] < 0.8 * history[0]["output"]
    first, last = (history[i]["features"] for i in (0, -1))
    assert all(last[name] < 0.92 * first[name] for name in first)
    assert list(first) == [
        "transformer_blocks.3.text",
        "transformer_blocks.3.image",
        "single_transformer_blocks.1.text",
        "single_transformer_blocks.1.image",
        "single_transformer_blocks.4.image",
    ]


def test_blocks_outside_groups_do_not_move_a_bit(trained):
    student, teacher, before, _ = trained
    after, (_, untouched) = weights(student), grouped_pair()
    moved = {name for name in before if not torch.equal(before[name], after[name])}
    inside = {name for name in before if name.startswith(MEMBERS)}
    assert moved <= inside
    # Attention, norms and FFNs of members and the routers learn; a text stream's last Linears may
    # have nothing to learn from.
    for part in ("router.tokens", "attn.to_q", "norm1.linear", "experts.w1", "shared.fc1", "gate"):
        assert any(part in name for name in moved), part
    assert len(moved) > 0.9 * len(inside)
    for name, parameter in untouched.named_parameters():
        assert torch.equal(parameter, teacher.get_parameter(name)), name


def test_the_log_tells_how_blocks_are_used(trained):
    student, _, _, history = trained
    for line in history:
        assert list(line["groups"]) == list(block_groups(student))
        for name, group in block_groups(student).items():
            figures = line["groups"][name]
            assert len(figures["share"]) == len(group.blocks)
            assert sum(figures["share"]) == pytest.approx(1, abs=1e-4)
            assert 0 <= figures["entropy"] <= 1
        terms = {"output": 1, "group": 1, "balance": 0.01, "group_balance": 0.01}
        total = sum(weight * line[name] for name, weight in terms.items())
        assert line["loss"] == pytest.approx(total, rel=1e-4)
    assert "transformer_blocks.2.ff" in history[0]["experts"]  # the dense model's names


def test_a_first_step_by_hand(tmp_path):
    """The same noise; output, group and balance losses spelt out."""
    student, teacher = grouped_pair()
    history = run(
        student,
        teacher,
        only(GROUPS, steps=1, top_k=0, losses={"output": 1.0, "group": 2.0, "group_balance": 0.1}),
        tmp_path,
    )

    student, teacher = grouped_pair()
    learner.set_top_k(student, 0)
    batch = tiny_batches(0, 2)
    x, t, _ = noisy(batch.pop("latents"), generator_at(3, 0, 0))
    inputs = batch | {"hidden_states": x, "timestep": t, "guidance": torch.full((2,), 3.5)}
    for group in block_groups(student).values():
        group.record = True
    names = group_feature_names(student)
    with torch.no_grad(), block_features(student, names) as mine:
        with block_features(teacher) as aims:
            guess, target = student(**inputs).sample, teacher(**inputs).sample
    output = (guess - target).square().mean()
    errors = [(mine[name] - aims[name]).square().mean() for name in names]
    norms = [aims[name].norm() for name in names]
    group = 0
    for error, norm in zip(errors, norms):
        weight = output / error * (sum(norms) / len(norms)) / norm
        group += weight * error / len(names)
    balance = 0
    for each in block_groups(student).values():
        p, windows = each.last_logits.softmax(-1), each.last_logits.shape[1]
        share = torch.bincount(each.last_logits.argmax(-1), minlength=windows) / 2
        balance += windows * (share * p.mean(0)).sum() / 3
    assert history[0]["output"] == pytest.approx(output.item(), rel=1e-5)
    assert history[0]["group"] == pytest.approx(group.item(), rel=1e-5)
    assert history[0]["group_balance"] == pytest.approx(balance.item(), rel=1e-5)
    total = output + 2 * group + 0.1 * balance
    assert history[0]["loss"] == pytest.approx(total.item(), rel=1e-5)


def test_feature_names_follow_kappa():
    student, teacher = grouped_pair()
    ends = group_feature_names(student)
    assert len(feature_names(student)) == 2 * (1 + 1 + 1 + 1) - 1 and len(ends) == 5
    set_kappa(student, 2)  # the group of two blocks runs both of them now
    assert len(group_feature_names(student)) == 3
    assert "single_transformer_blocks.0.image" in feature_names(student)
    set_kappa(student, None)
    assert feature_names(student) == feature_names(teacher) and not group_feature_names(student)


def test_features_of_a_student_that_runs_all_blocks_match_the_teachers():
    student, teacher = grouped_pair(dtype=torch.float64)
    inputs = tiny_inputs(dtype=torch.float64)
    from d2m.model.surgery import unit_gates

    with torch.no_grad(), unit_gates(student):
        with block_features(student) as mine, block_features(teacher) as aims:
            student(**inputs), teacher(**inputs)
    assert list(mine) == list(aims)
    for name, feature in mine.items():
        torch.testing.assert_close(feature, aims[name], rtol=1e-9, atol=1e-9)


# ---------------------------------------------------------------- stages, alone and together


def test_stages_one_by_one_are_the_run_of_all(tmp_path):
    """1 and 2, then 3 from their result: the bits of 1, 2, 3 in one run."""
    whole, teacher = grouped_pair()
    lines = run(whole, teacher, THREE, tmp_path / "whole", log_every=2)
    parts, teacher = grouped_pair()
    run(parts, teacher, with_stages(THREE, [1, 2]), tmp_path / "first")
    last = run(parts, teacher, with_stages(THREE, ["groups"]), tmp_path / "last", log_every=2)
    for name, parameter in parts.named_parameters():
        assert torch.equal(parameter, whole.get_parameter(name)), name
    assert [line["loss"] for line in last] == [line["loss"] for line in lines[-3:]]
    assert [line["done"] for line in last] == [2, 4, 6]


def test_stages_before_the_third_run_all_blocks(tmp_path):
    student, teacher = grouped_pair()
    plain, _ = grouped_pair(blocks=Blocks())
    grouped = run(student, teacher, with_stages(THREE, [1, 2]), tmp_path / "1")
    without = run(
        plain, teacher, replace(THREE, stages=THREE.stages[:2], blocks=Blocks()), tmp_path / "2"
    )
    assert [line["loss"] for line in grouped] == [line["loss"] for line in without]


@pytest.mark.parametrize(("phase", "at"), [("stage groups", 3), ("stage experts", 4)])
def test_interrupted_runs_go_on_to_the_same_bits(phase, at, tmp_path):
    """Also where a router never chose some block, whose moments stay zero for a while."""

    def pair():
        student, teacher = grouped_pair()
        for group in block_groups(student).values():  # one block for all samples at first
            for parameter in group.router.parameters():
                parameter.data *= 0.01
            group.router.embedding.weight.data[0] += 1
        return student, teacher

    reference, teacher = pair()
    whole = run(reference, teacher, THREE, tmp_path / "whole", log_every=4)
    used = [figures["share"] for figures in whole[-1]["groups"].values()]
    assert any(0.0 in share for share in used)

    def interrupt(name, step, steps):
        if (name, step) == (phase, at):
            os.kill(os.getpid(), signal.SIGINT)

    student, teacher = pair()
    with pytest.raises(KeyboardInterrupt, match="of 18 steps"):
        run(student, teacher, THREE, tmp_path / "part", progress=interrupt, log_every=4)
    student, teacher = pair()
    again = run(student, teacher, THREE, tmp_path / "part", resume=True, log_every=4)
    for name, parameter in student.named_parameters():
        assert torch.equal(parameter, reference.get_parameter(name)), name
    assert [line | {"seconds": 0} for line in again] == [line | {"seconds": 0} for line in whole]
    untouched = grouped_pair()[1]
    for name, parameter in teacher.named_parameters():  # the checkpoint went into the student alone
        assert torch.equal(parameter, untouched.get_parameter(name)), name


def test_joint_training_is_a_recipe(tmp_path):
    student, teacher = grouped_pair()
    before = weights(student)
    joint = replace(
        GROUPS,
        name="joint",
        train=("shared", "experts", "gate", "groups", "router"),
        losses=GROUPS.losses | {"feature": 1.0},
    )
    history = run(student, teacher, replace(THREE, stages=(joint,)), tmp_path)
    moved = {n for n, p in student.named_parameters() if not torch.equal(before[n], p)}
    assert any(name.startswith("transformer_blocks.0.ff.experts") for name in moved)
    assert any(".router." in name for name in moved)
    assert not any(name.startswith("transformer_blocks.0.attn") for name in moved)
    assert {"feature", "group", "balance", "group_balance"} <= history[0].keys()
    assert len(history[0]["features"]) == 7


@pytest.mark.parametrize(
    ("train", "top_k", "inside", "outside"),
    [
        (("blocks",), 0, "transformer_blocks.0.attn.to_q.weight", ".experts."),
        (("blocks",), 2, "transformer_blocks.0.ff.experts.w1", ".router."),
        (("groups",), 2, "transformer_blocks.1.blocks.2.norm1.linear.weight", "blocks.0.attn"),
        (("adaln",), 2, "transformer_blocks.1.blocks.2.norm1.linear.weight", ".attn."),
        (("router",), 2, "transformer_blocks.1.router.tokens.weight", ".blocks."),
    ],
)
def test_words_of_a_stage(train, top_k, inside, outside):
    student, _ = grouped_pair()
    names = learner.trainable(student, replace(GROUPS, train=train, top_k=top_k)).keys()
    assert inside in names
    if train == ("groups",):
        assert all(name.startswith(MEMBERS) for name in names)
    else:
        assert not any(outside in name for name in names)
    assert not any(name.startswith(("x_embedder", "norm_out", "proj_out")) for name in names)


def test_a_router_that_has_nothing_to_choose():
    student, _ = grouped_pair(blocks=replace(BLOCKS, single=((0, 1),)))
    learner.trainable(student, replace(GROUPS, kappa=2))
    for kappa in (None, 3):
        with pytest.raises(ValueError, match=f"trains 'router' with kappa {kappa}, where all"):
            learner.trainable(student, replace(GROUPS, kappa=kappa))
