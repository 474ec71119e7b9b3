"""The terms of the distillation loss, and figures that show whether the routing is alive.

Pure functions of tensors. B batch, T tokens, D width, E experts, K chosen.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
from torch import Tensor

DEAD_SHARE = 0.01  # ours: an expert with under 1 % of its fair share of the choices counts as dead


def output_loss(student: Tensor, teacher: Tensor) -> Tensor:
    """Output distillation: the mean squared error of two equal shapes, in float32 (read).

    The teacher's tensor gets no gradient. Scalar.
    """
    return torch.nn.functional.mse_loss(_wide(student), _wide(teacher.detach()))


def token_loss(student: Tensor, teacher: Tensor, counted: Tensor | None = None) -> Tensor:
    """`output_loss` of the tokens that count, [B, T, D] and bool [B, T]; None: all do.

    Every sample's mean over its own tokens weighs alike (ours): it changes nothing how far a text
    is filled up, nor with which others it shares a batch. Scalar.
    """
    if counted is None:
        return output_loss(student, teacher)
    squares = (_wide(student) - _wide(teacher.detach())).square().mean(-1)
    share = counted.to(squares.dtype)
    return ((squares * share).sum(1) / share.sum(1)).mean()


def feature_weights(output: Tensor, features: Tensor, norms: Tensor) -> Tensor:
    """The paper's weight of every layer's feature loss (read), detached.

    `w_l = |L_distill| / |L_feature_l| * (sum_j ||f_tea_j||) / (L * ||f_tea_l||)`: every layer pulls
    about as hard as the output does, layers of large features a little less.

    Args:
        output: the output loss, scalar.
        features [L]: the layers' feature losses.
        norms [L]: Euclidean norms of the teacher's features.

    A layer that matches its teacher exactly (loss 0) gets weight 0, not infinity (ours).
    """
    output, features, norms = output.detach(), features.detach(), norms.detach()
    balance = norms.mean() / norms.clamp_min(torch.finfo(norms.dtype).tiny)
    weights = output.abs() / features.abs() * balance
    return torch.where(features > 0, weights, torch.zeros_like(weights))


def feature_loss(
    output: Tensor, features: Tensor, norms: Tensor, own: Tensor | None = None
) -> Tensor:
    """`mean_l w_l L_feature_l` with the paper's weights; arguments as in `feature_weights`.

    own [L]: where the batch is spread over processes, the feature losses of this one's samples:
    weighed as the whole batch's, which the other arguments are of.

    The weights are read; the mean over layers is ours (the sum differs by the factor L, which the
    recipe's weight of the term can restore): one unit of it weighs about as much as the output.
    """
    return (feature_weights(output, features, norms) * (features if own is None else own)).mean()


def choices(logits: Tensor, top_k: int) -> tuple[Tensor, Tensor]:
    """Gate probabilities [..., T, E] and how many tokens chose each expert [..., E] (detached).

    `logits` [..., T, E]; the same float32 softmax and top-k as the op's gate. Leading dimensions
    are layers of one shape, taken together because the work is many small kernels.
    """
    probabilities = torch.softmax(_wide(logits), dim=-1)
    chosen = probabilities.detach().topk(top_k, dim=-1).indices
    # A mask and a sum, not bincount: that one waits for the device to learn its output's size.
    counts = torch.zeros_like(probabilities).scatter_(-1, chosen, 1.0).sum(dim=-2)
    return probabilities, counts


def balance_loss(probabilities: Tensor, counts: Tensor) -> Tensor:
    """Switch Transformer's load balance, `E * sum_i f_i P_i` (read); [...], 1 when uniform.

    Args:
        probabilities [..., T, E]: the gate's softmax, which gets the gradient.
        counts [..., E]: how many tokens chose each expert; `f_i` is its share of all K*T choices
            (ours: normalised by K, so that uniform is 1 for every K), `P_i` the mean probability.

    It is E when one expert takes everything.
    """
    share = counts / counts.sum(dim=-1, keepdim=True).clamp_min(1)
    return probabilities.shape[-1] * (share * probabilities.mean(dim=-2)).sum(dim=-1)


def group_balance_loss(
    logits: Sequence[Tensor], over: Callable[[list[Tensor]], list[Tensor]] = list
) -> tuple[Tensor, list[Tensor]]:
    """Balance of the groups of blocks: (mean over groups of `balance_loss`, each group's choices).

    `logits`: per group [B, W], a logit for every sample and window of blocks, of which a sample
    takes the largest. The loss is 1 when windows are used alike, W when one takes everything (the
    experts' loss with a window for an expert and a sample for a token: ours). Choices are [W],
    detached. over: this process's choices -> all processes'.
    """
    pairs = [choices(each, 1) for each in logits]
    counted = over([counts for _, counts in pairs])
    losses = [balance_loss(pair[0], counts) for pair, counts in zip(pairs, counted)]
    return torch.stack(losses).mean(), counted


def load_figures(counts: Sequence[float]) -> dict[str, float]:
    """Utilisation of one layer's experts from the number of choices of each.

    Returns `entropy` of the load divided by log E (1 uniform, 0 collapsed), `busiest` (the largest
    share times E, 1 when uniform) and `dead` (experts under 1 % of their fair share).
    """
    counts_ = torch.as_tensor(counts, dtype=torch.float64)
    experts = len(counts_)
    share = counts_ / counts_.sum().clamp_min(1)
    entropy = -torch.xlogy(share, share).sum() / torch.log(torch.tensor(float(max(experts, 2))))
    return {
        "entropy": float(entropy),
        "busiest": float(share.max() * experts),
        "dead": len(dead_experts(counts)),
    }


def dead_experts(counts: Sequence[float]) -> list[int]:
    """Indices of the experts with under DEAD_SHARE of their fair share of all choices."""
    floor = DEAD_SHARE * max(sum(counts), 1) / max(len(counts), 1)
    return [index for index, count in enumerate(counts) if count < floor]


def _wide(tensor: Tensor) -> Tensor:
    """At least float32: float64 stays, half precisions are widened."""
    return tensor if tensor.dtype == torch.float64 else tensor.float()
