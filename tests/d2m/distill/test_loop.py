"""Distillation on a tiny pair: it learns what it should, moves nothing else, resumes exactly."""

import json
import os
import signal
import threading
from dataclasses import replace

import pytest
import torch

from d2m.distill import learner
from d2m.distill.features import block_features, feature_errors, feature_names
from d2m.distill.loop import distill
from d2m.families.flow import generator_at, noisy
from d2m.model.surgery import set_top_k, sparse_ffns
from tests.tiny.pair import EXPERTS, RECIPE, SHARED, recipe_with, tiny_batches, tiny_pair
from tests.tiny.pipeline import tiny_inputs


def run(student, teacher, recipe, workdir, **options):
    options = {"log": lambda text: None, "workdir": workdir, "seed": 3} | options
    return distill(student, teacher, recipe, tiny_batches, **options)


def weights(model):
    return {name: parameter.detach().clone() for name, parameter in model.named_parameters()}


@pytest.fixture(scope="module")
def trained(tmp_path_factory):
    """(student, teacher, weights before, log, workdir) of a run of both stages."""
    student, teacher = tiny_pair()
    before, workdir = weights(student), tmp_path_factory.mktemp("run")
    history = run(student, teacher, recipe_with(60), workdir, log_every=20)
    return student, teacher, before, history, workdir


# ---------------------------------------------------------------- the run


def test_the_loss_falls_in_both_stages(trained):
    _, _, _, history, _ = trained
    for stage in ("shared", "experts"):
        lines = [line for line in history if line["stage"] == stage]
        assert lines[-1]["output"] < 0.8 * lines[0]["output"]
        assert lines[-1]["feature"] < 0.8 * lines[0]["feature"]


def test_frozen_parameters_do_not_move_a_bit(trained):
    student, teacher, before, _, _ = trained
    after, (_, untouched) = weights(student), tiny_pair()
    moved = {name for name in before if not torch.equal(before[name], after[name])}
    parts = (".shared.", ".experts.", ".gate.")
    assert moved == {name for name in before if any(part in name for part in parts)}
    for name, parameter in untouched.named_parameters():
        assert torch.equal(parameter, teacher.get_parameter(name)), name


@pytest.mark.parametrize(
    ("stage", "parts"), [(SHARED, (".shared.",)), (EXPERTS, (".experts.", ".gate."))]
)
def test_a_stage_moves_what_it_trains_and_no_more(stage, parts, tmp_path):
    student, teacher = tiny_pair()
    before = weights(student)
    run(student, teacher, replace(RECIPE, stages=(replace(stage, steps=2, ema=0.0),)), tmp_path)
    moved = {n for n, p in student.named_parameters() if not torch.equal(before[n], p)}
    assert moved == {name for name in before if any(part in name for part in parts)}


def test_stage_one_does_not_depend_on_experts(tmp_path):
    (one, teacher), (two, _) = tiny_pair(), tiny_pair()
    with torch.no_grad():
        for ffn in sparse_ffns(two).values():
            for parameter in (*ffn.experts.parameters(), *ffn.gate.parameters()):
                parameter.normal_()
    recipe = replace(RECIPE, stages=(SHARED,))
    first = run(one, teacher, recipe, tmp_path / "1")
    second = run(two, teacher, recipe, tmp_path / "2")
    assert [line["loss"] for line in first] == [line["loss"] for line in second]
    for name, parameter in one.named_parameters():
        assert (".shared." not in name) or torch.equal(parameter, two.get_parameter(name))
    inputs = tiny_inputs()
    with torch.no_grad():
        assert torch.equal(one(**inputs).sample, two(**inputs).sample)
        set_top_k(one, 2), set_top_k(two, 2)
        assert not torch.equal(one(**inputs).sample, two(**inputs).sample)


def test_the_log_says_how_the_routing_fares(trained):
    _, _, _, history, workdir = trained
    assert history == [json.loads(line) for line in (workdir / "log.jsonl").open()]
    assert [(line["stage"], line["step"], line["done"]) for line in history] == [
        *(("shared", step, step) for step in (20, 40, 60)),
        *(("experts", step, 60 + step) for step in (20, 40, 60)),
    ]
    student, _ = tiny_pair()
    for line in history:
        assert list(line["features"]) == feature_names(student)
        assert set(line) >= {"loss", "output", "feature", "gradient", "lr", "seconds", "steps"}
        assert ("experts" in line) == ("balance" in line) == (line["stage"] == "experts")
    last = history[-1]
    assert list(last["experts"]) == list(sparse_ffns(student))
    for figures in last["experts"].values():
        assert sum(figures["share"]) == pytest.approx(1, abs=1e-4) and len(figures["share"]) == 12
        assert 0 < figures["entropy"] <= 1 <= figures["busiest"]
    assert last["dead"] == sum(figures["dead"] for figures in last["experts"].values())
    weighted = last["output"] + last["feature"] + 0.01 * last["balance"]
    assert last["loss"] == pytest.approx(weighted, rel=1e-4)


def test_a_first_step_against_plain_adamw(tmp_path):
    """One step by hand: the same noise, the losses spelt out, torch's own AdamW unfused."""
    student, teacher = tiny_pair()
    stage = replace(SHARED, steps=1, warmup=0.0, clip=0.0, losses={"output": 2.0})
    history = run(student, teacher, replace(RECIPE, stages=(stage,)), tmp_path)

    other, _ = tiny_pair()
    set_top_k(other, 0)
    batch = tiny_batches(0, 2)
    x, t, _ = noisy(batch.pop("latents"), generator_at(3, 0, 0))
    inputs = batch | {"hidden_states": x, "timestep": t, "guidance": torch.full((2,), 3.5)}
    with torch.no_grad():
        target = teacher(**inputs).sample
    loss = (other(**inputs).sample - target).square().mean() * 2
    loss.backward()
    learnt = [p for name, p in other.named_parameters() if ".shared." in name]
    torch.optim.AdamW(learnt, lr=3e-3, betas=learner.BETAS, weight_decay=0.0).step()
    assert history[0]["loss"] == pytest.approx(loss.item(), rel=1e-5)
    for name, parameter in other.named_parameters():
        torch.testing.assert_close(student.get_parameter(name), parameter, rtol=1e-5, atol=1e-6)


def test_the_average_is_the_result(tmp_path):
    """With decay 0 of a young average the result is close to, but not, the last weights."""
    results = {}
    for ema in (0.0, 0.99):
        student, teacher = tiny_pair()
        stage = replace(SHARED, steps=3, ema=ema)
        run(student, teacher, replace(RECIPE, stages=(stage,)), tmp_path / str(ema))
        results[ema] = weights(student)
    name = "transformer_blocks.0.ff.shared.fc1.weight"
    last, average, first = results[0.0][name], results[0.99][name], weights(tiny_pair()[0])[name]
    # Decays .1, 2/11, 3/12: the average lags behind the last weights, far past the first.
    assert 0 < (average - last).norm() < 0.5 * (last - first).norm()


def test_bfloat16_autocast_trains_float32_weights(tmp_path):
    student, teacher = tiny_pair()
    history = run(student, teacher, replace(recipe_with(4), precision="bfloat16"), tmp_path)
    assert all(parameter.dtype == torch.float32 for parameter in student.parameters())
    exact = run(*tiny_pair(), recipe_with(4), tmp_path / "exact")
    for line, reference in zip(history, exact, strict=True):
        # The model rounds its times to bfloat16 too, so random weights end up well apart.
        assert line["output"] == pytest.approx(reference["output"], rel=0.3)
        assert line["output"] != reference["output"]


@pytest.mark.gpu
@pytest.mark.parametrize("precision", ["float32", "bfloat16"])
def test_cuda_trains_as_the_cpu_does(precision, tmp_path):
    """The same draws, so the same losses up to rounding; and a resume goes on from there."""
    student, teacher = tiny_pair()
    recipe = replace(recipe_with(4), precision=precision)
    history = run(student.cuda(), teacher.cuda(), recipe, tmp_path / "cuda")
    exact = run(*tiny_pair(), recipe_with(4), tmp_path / "cpu")
    for line, reference in zip(history, exact, strict=True):
        limit = 1e-2 if precision == "float32" else 0.3
        assert line["output"] == pytest.approx(reference["output"], rel=limit)
    student, teacher = tiny_pair()
    assert run(student.cuda(), teacher.cuda(), recipe, tmp_path / "cuda", resume=True) == history


# ---------------------------------------------------------------- parts


def test_features_are_the_blocks_outputs():
    student, teacher = tiny_pair()
    names = feature_names(teacher)
    assert names[0] == "transformer_blocks.0.text" and len(names) == 7
    assert names[-1] == "single_transformer_blocks.1.image"
    assert "single_transformer_blocks.1.text" not in names  # read by nothing
    inputs = tiny_inputs()
    with torch.no_grad(), block_features(teacher) as features:
        output = teacher(**inputs).sample
    assert list(features) == names
    assert features[names[0]].shape == (2, 8, 32) and features[names[1]].shape == (2, 16, 32)
    kept = dict(features)
    with torch.no_grad():  # hooks are gone
        last = teacher.proj_out(teacher.norm_out(kept[names[-1]], _embedding(teacher, inputs)))
        teacher(**tiny_inputs(1))
    assert torch.equal(features[names[-1]], kept[names[-1]])
    torch.testing.assert_close(last, output)
    with block_features(student, []) as nothing, torch.no_grad():
        student(**inputs)
    assert nothing == {}


def _embedding(model, inputs):
    t, guidance = inputs["timestep"] * 1000, inputs["guidance"] * 1000
    return model.time_text_embed(t, guidance, inputs["pooled_projections"])


def test_feature_errors_by_hand():
    teacher = {"a": torch.tensor([[[3.0, 4.0]]]), "b": torch.tensor([[[1.0, 0.0]]])}
    student = {"b": torch.tensor([[[1.0, 2.0]]]), "a": torch.tensor([[[3.0, 3.0]]])}
    errors, norms, powers = feature_errors(student, teacher)
    assert errors.tolist() == [0.5, 2.0] and norms.tolist() == [5.0, 1.0]
    assert powers.tolist() == pytest.approx([12.5, 0.5])


def test_feature_errors_of_a_masked_text_by_hand():
    mask = torch.tensor([[True, True, False], [True, False, False]])
    text = torch.tensor([[[3.0], [4.0], [9.0]], [[12.0], [9.0], [9.0]]])
    guess = torch.tensor([[[3.0], [2.0], [-5.0]], [[13.0], [-5.0], [-5.0]]], requires_grad=True)
    aims = {"0.text": text, "0.image": torch.ones(2, 3, 1)}
    features = {"0.text": guess, "0.image": torch.zeros(2, 3, 1)}
    errors, norms, powers = feature_errors(features, aims, mask=mask)
    assert errors.tolist() == [(4 / 2 + 1) / 2, 1.0]  # every sample's own mean
    assert norms.tolist() == pytest.approx([13.0, 6**0.5])
    assert powers.tolist() == pytest.approx([((9 + 16) / 2 + 144) / 2, 1.0])
    errors.sum().backward()
    assert guess.grad.flatten().tolist() == [0.0, -1.0, 0.0, 1.0, 0.0, 0.0]


def test_noise_is_a_function_of_its_place():
    latents = torch.randn(64, 5, 3)
    x, t, velocity = noisy(latents, generator_at(0, 1, 7))
    again = noisy(latents, generator_at(0, 1, 7))
    other = noisy(latents, generator_at(0, 1, 8))
    assert torch.equal(x, again[0]) and not torch.equal(t, other[1])
    noise = velocity + latents
    torch.testing.assert_close(x, (1 - t[:, None, None]) * latents + t[:, None, None] * noise)
    assert noise.std() == pytest.approx(1, abs=0.1) and noise.mean() == pytest.approx(0, abs=0.1)
    logits = noisy(torch.zeros(4096, 1, 1), generator_at(0), mean=0.5, std=2.0)[1].logit()
    assert logits.mean() == pytest.approx(0.5, abs=0.1) and logits.std() == pytest.approx(
        2, abs=0.1
    )


def test_learning_rate_rises_then_falls():
    stage = replace(SHARED, steps=100, lr=1.0, warmup=0.1)
    rates = [learner.learning_rate(stage, step) for step in range(100)]
    assert rates[:10] == pytest.approx([(i + 1) / 10 for i in range(10)])
    assert rates[10] == 1.0 and rates == sorted(rates[:10]) + sorted(rates[10:], reverse=True)
    assert learner.LAST_RATE < rates[-1] < learner.LAST_RATE + 0.001
    assert learner.learning_rate(replace(stage, warmup=0.0, steps=1), 0) == 1.0


@pytest.mark.parametrize(
    ("stage", "words"),
    [
        (replace(SHARED, train=("everything",)), "trains 'everything'; expected some of shared"),
        (replace(EXPERTS, top_k=0), "trains 'experts' with top_k 0, where no token reaches"),
    ],
)
def test_stages_that_cannot_be_run(stage, words, tmp_path):
    student, teacher = tiny_pair()
    with pytest.raises(ValueError, match=words):
        run(student, teacher, replace(RECIPE, stages=(stage,)), tmp_path)


def test_a_dense_student_is_refused(tmp_path):
    _, teacher = tiny_pair()
    with pytest.raises(ValueError, match="names no parameter of this student"):
        run(teacher, teacher, RECIPE, tmp_path)


def test_a_loss_that_is_no_number_stops_the_run(tmp_path):
    student, teacher = tiny_pair()
    with torch.no_grad():
        teacher.proj_out.bias[0] = torch.nan
    with pytest.raises(ValueError, match="the loss became nan in training, expected a number"):
        run(student, teacher, recipe_with(4), tmp_path, save_seconds=0)
    assert not list((tmp_path / "checkpoints").glob("*"))


# ---------------------------------------------------------------- stopping and going on


def test_ctrl_c_saves_and_says_how_to_go_on(tmp_path):
    reference, teacher = tiny_pair()
    whole = run(reference, teacher, RECIPE, tmp_path / "whole", log_every=4)

    student, teacher = tiny_pair()
    handler = signal.getsignal(signal.SIGINT)

    def interrupt(phase, step, steps):
        if (phase, step) == ("stage experts", 3):
            os.kill(os.getpid(), signal.SIGINT)

    said = []
    with pytest.raises(
        KeyboardInterrupt, match="stopped after 9 of 12 steps.*continue with --resume"
    ):
        run(student, teacher, RECIPE, tmp_path, progress=interrupt, log=said.append, log_every=4)
    assert not any("stopped" in text for text in said)  # the sentence is the exception's alone
    assert signal.getsignal(signal.SIGINT) is handler

    student, teacher = tiny_pair()
    history = run(student, teacher, RECIPE, tmp_path, resume=True, log=said.append, log_every=4)
    assert "after 9 of 12 steps" in said[-1]
    assert all(torch.equal(p, reference.get_parameter(n)) for n, p in student.named_parameters())
    # The line that the interruption fell into is the uninterrupted run's, and none is there twice.
    assert [line | {"seconds": 0} for line in history] == [line | {"seconds": 0} for line in whole]
    # Done is done: a further resume trains nothing and gives the same.
    student, teacher = tiny_pair()
    assert run(student, teacher, RECIPE, tmp_path, resume=True) == history
    assert all(torch.equal(p, reference.get_parameter(n)) for n, p in student.named_parameters())


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"seed": 4}, "holds a run with seed 3, not 4; resume with the same one"),
        ({"recipe": recipe_with(7)}, "holds a run with recipe"),
    ],
)
def test_resume_under_other_settings_is_refused(trained, changes, words):
    *_, workdir = trained
    options = {"recipe": recipe_with(60), "resume": True, "workdir": workdir} | changes
    with pytest.raises(ValueError, match=words):
        run(*tiny_pair(), **options)


def test_without_resume_it_starts_from_the_beginning(tmp_path):
    first = run(*tiny_pair(), recipe_with(2), tmp_path)
    again = run(*tiny_pair(), recipe_with(2), tmp_path)
    assert [line["loss"] for line in first] == [line["loss"] for line in again]
    assert len((tmp_path / "log.jsonl").read_text().splitlines()) == len(again)


def test_it_runs_outside_the_main_thread(tmp_path):
    """Where no signal handler can be set."""
    done = []
    thread = threading.Thread(
        target=lambda: done.append(run(*tiny_pair(), recipe_with(1), tmp_path))
    )
    thread.start()
    thread.join()
    assert len(done[0]) == 2
