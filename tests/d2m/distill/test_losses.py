"""Every loss against numbers worked out by hand."""

import math

import pytest
import torch

from d2m.distill.losses import (
    balance_loss,
    choices,
    feature_loss,
    feature_weights,
    group_balance_loss,
    load_figures,
    output_loss,
)


def test_output_loss_is_the_mean_square():
    student = torch.tensor([[1.0, 2.0], [3.0, 4.0]], requires_grad=True)
    teacher = torch.tensor([[1.0, 0.0], [3.0, 1.0]], requires_grad=True)
    loss = output_loss(student, teacher)  # (0 + 4 + 0 + 9) / 4
    assert loss.item() == 3.25
    loss.backward()
    assert student.grad.tolist() == [[0.0, 1.0], [0.0, 1.5]]  # 2 (s - t) / 4
    assert teacher.grad is None


def test_output_loss_widens_half_precision():
    student, teacher = torch.full((4,), 300.0).half(), torch.zeros(4).half()
    assert output_loss(student, teacher).item() == 90_000  # 65504 is the largest half
    assert output_loss(student.double(), teacher.double()).dtype == torch.float64


def test_feature_weights_follow_the_paper():
    # w_l = |L| / |L_l| * mean norm / norm_l with L = 6, L_l = 2, 3, norms 1, 3 (mean 2)
    output, features = torch.tensor(6.0), torch.tensor([2.0, 3.0])
    weights = feature_weights(output, features, torch.tensor([1.0, 3.0]))
    assert weights.tolist() == pytest.approx([6 / 2 * 2 / 1, 6 / 3 * 2 / 3])


def test_feature_loss_is_their_mean_and_weights_get_no_gradient():
    output = torch.tensor(6.0, requires_grad=True)
    features = torch.tensor([2.0, 3.0], requires_grad=True)
    loss = feature_loss(output, features, torch.tensor([1.0, 3.0]))
    assert loss.item() == pytest.approx((6 * 2 + 4 / 3 * 3) / 2)
    loss.backward()
    assert output.grad is None
    assert features.grad.tolist() == pytest.approx([3.0, 2 / 3])


def test_a_layer_without_error_weighs_nothing():
    weights = feature_weights(torch.tensor(1.0), torch.tensor([0.0, 1.0]), torch.ones(2))
    assert weights.tolist() == [0.0, 1.0]


def test_choices_count_the_top_k():
    # Two layers of three tokens, three experts; ties do not occur.
    logits = torch.tensor(
        [[[3.0, 2.0, 1.0], [0.0, 2.0, 1.0], [5.0, 4.0, 0.0]], [[0.0, 1.0, 2.0]] * 3]
    )
    probabilities, counts = choices(logits, 2)
    assert counts.tolist() == [[2.0, 3.0, 1.0], [0.0, 3.0, 3.0]]
    assert torch.allclose(probabilities, logits.softmax(-1))
    assert choices(logits[0], 1)[1].tolist() == [2.0, 1.0, 0.0]


def test_balance_loss_by_hand():
    # Two experts, three tokens, k = 1: shares 2/3, 1/3; mean probabilities .6, .4.
    probabilities = torch.tensor([[0.8, 0.2], [0.7, 0.3], [0.3, 0.7]], requires_grad=True)
    loss = balance_loss(probabilities, torch.tensor([2.0, 1.0]))
    assert loss.item() == pytest.approx(2 * (2 / 3 * 0.6 + 1 / 3 * 0.4))
    loss.backward()
    assert probabilities.grad.tolist()[0] == pytest.approx([2 * 2 / 3 / 3, 2 * 1 / 3 / 3])


@pytest.mark.parametrize("top_k", [1, 2, 5, 12])
def test_balance_loss_is_one_when_uniform_and_E_when_collapsed(top_k):
    uniform = balance_loss(torch.full((24, 12), 1 / 12), torch.full((12,), 2.0 * top_k))
    assert uniform.item() == pytest.approx(1, abs=1e-6)
    one = torch.zeros(12)
    one[3] = 1
    assert balance_loss(one.expand(24, 12), 24 * one).item() == 12


def test_load_figures_by_hand():
    figures = load_figures([2, 1, 1, 0])
    entropy = -(0.5 * math.log(0.5) + 2 * 0.25 * math.log(0.25)) / math.log(4)
    assert figures == {"entropy": pytest.approx(entropy), "busiest": 2.0, "dead": 1}
    assert load_figures([5.0] * 12) == {"entropy": pytest.approx(1), "busiest": 1, "dead": 0}
    collapsed = load_figures([0, 7, 0])
    assert collapsed == {"entropy": 0.0, "busiest": 3.0, "dead": 2}
    # Dead is under 1 % of a fair share: 1 of 1000 choices among 4 experts is .4 %.
    assert load_figures([400, 400, 199, 1])["dead"] == 1
    assert load_figures([400, 400, 197, 3])["dead"] == 0


def test_group_balance_by_hand():
    # Two samples take windows 0 and 1 of three; the other group's two take the same of two.
    logits = [
        torch.log(torch.tensor([[0.5, 0.3, 0.2], [0.1, 0.6, 0.3]])).requires_grad_(True),
        torch.log(torch.tensor([[0.9, 0.1], [0.7, 0.3]])),
    ]
    loss, counts = group_balance_loss(logits)
    assert [each.tolist() for each in counts] == [[1, 1, 0], [2, 0]]
    first = 3 * (0.5 * 0.3 + 0.5 * 0.45)  # shares 1/2 1/2 0, means .3 .45 .25
    second = 2 * (1.0 * 0.8)
    assert loss.item() == pytest.approx((first + second) / 2)
    loss.backward()
    assert logits[0].grad.abs().sum() > 0


def test_group_balance_is_one_when_windows_are_used_alike():
    even = torch.eye(3).repeat(4, 1) * 50
    assert group_balance_loss([even])[0].item() == pytest.approx(1)
    assert group_balance_loss([even[:1].expand(6, -1)])[0].item() == pytest.approx(3)
