"""Focal losses of `mmcv._ext` in the calling conventions of `mmcv.ops.focal_loss`.

N samples, C classes. A target of C is background: no class is positive.

Source: Lin et al., Focal Loss for Dense Object Detection (arXiv 1708.02002), equation 5.
"""

import torch
import torch.nn.functional as F
from torch import Tensor

from linvis.compat.precision import at_least_float32


def sigmoid_focal_loss_forward(
    input: Tensor, target: Tensor, weight: Tensor, output: Tensor, gamma: float, alpha: float
) -> None:
    """Write -a (1 - p)^gamma log(p) of every sample and class, p the probability of what is right.

    Args:
        input: Logits, shape (N, C), any floating dtype; computed at least in float32.
        target: Class of each sample, shape (N,), int64, C for background.
        weight: Factor of the samples of each class, shape (C,), or empty. Background has factor 1.
        output: Shape (N, C); receives the loss.
        gamma: Focusing exponent.
        alpha: a of the positive class; that of a negative one is 1 - alpha.
    """
    _, margin, factor = _sigmoid_terms(input, target, weight, alpha)
    output.copy_(factor * torch.sigmoid(-margin).pow(gamma) * F.softplus(-margin))


def sigmoid_focal_loss_backward(
    input: Tensor, target: Tensor, weight: Tensor, grad_input: Tensor, gamma: float, alpha: float
) -> None:
    """Write the derivative of every loss by its logit; arguments as forward, grad_input (N, C)."""
    sign, margin, factor = _sigmoid_terms(input, target, weight, alpha)
    wrong = torch.sigmoid(-margin)
    slope = wrong.pow(gamma) * (wrong + gamma * (1 - wrong) * F.softplus(-margin))
    grad_input.copy_(-sign * factor * slope)


def softmax_focal_loss_forward(
    input: Tensor, target: Tensor, weight: Tensor, output: Tensor, gamma: float, alpha: float
) -> None:
    """Write -alpha (1 - p)^gamma log(p) of every sample, p the probability of its class.

    Args:
        input: Probabilities, shape (N, C), any floating dtype; computed at least in float32.
        target: Class of each sample, shape (N,), int64; a negative one has loss 0.
        weight: Factor of the samples of each class, shape (C,), or empty.
        output: Shape (N,); receives the loss.
        gamma: Focusing exponent.
        alpha: Factor of all losses.
    """
    right, factor = _softmax_terms(input, target, weight, alpha)
    output.copy_(-factor * (1 - right).pow(gamma) * right.log())


def softmax_focal_loss_backward(
    input: Tensor,
    target: Tensor,
    weight: Tensor,
    buff: Tensor,
    grad_input: Tensor,
    gamma: float,
    alpha: float,
) -> None:
    """Write the derivative of every sample's loss by its logits.

    Args:
        input: As forward, like what is not named here.
        target: As forward.
        weight: As forward.
        buff: Shape (N,); receives p times the derivative of the loss by p.
        grad_input: Shape (N, C); receives the result.
        gamma: As forward.
        alpha: As forward.
    """
    right, factor = _softmax_terms(input, target, weight, alpha)
    wrong = 1 - right
    # One minus a probability of one has no negative power; its coefficient is zero.
    focus = gamma * wrong.clamp_min(torch.finfo(wrong.dtype).tiny).pow(gamma - 1) * right
    slope = factor * (focus * right.log() - wrong.pow(gamma))
    buff.copy_(slope)
    probabilities = at_least_float32(input)
    one_hot = _one_hot(target, probabilities)
    grad_input.copy_(slope[:, None] * (one_hot - probabilities))


def _one_hot(target: Tensor, like: Tensor) -> Tensor:
    classes = torch.arange(like.shape[1], device=like.device)
    return (target[:, None] == classes).to(like.dtype)


def _class_weight(target: Tensor, weight: Tensor, like: Tensor) -> Tensor:
    """Factor of each sample, shape (N,), 1 without weights and for background."""
    if weight.numel() == 0:
        return like.new_ones(len(target))
    weights = torch.cat([at_least_float32(weight).to(like), like.new_ones(1)])
    return weights[target]


def _sigmoid_terms(
    input: Tensor, target: Tensor, weight: Tensor, alpha: float
) -> tuple[Tensor, Tensor, Tensor]:
    """Sign of each class, +1 if positive; sign times logit; and the factor of each loss."""
    logits = at_least_float32(input)
    positive = _one_hot(target, logits)
    sign = 2 * positive - 1
    factor = (1 - alpha) + (2 * alpha - 1) * positive
    return sign, sign * logits, factor * _class_weight(target, weight, logits)[:, None]


def _softmax_terms(
    input: Tensor, target: Tensor, weight: Tensor, alpha: float
) -> tuple[Tensor, Tensor]:
    """Probability of the class of each sample, kept above zero, and the factor of its loss."""
    probabilities = at_least_float32(input)
    right = probabilities.gather(1, target.clamp_min(0)[:, None])[:, 0]
    right = right.clamp_min(torch.finfo(right.dtype).tiny)
    factor = alpha * _class_weight(target.clamp_min(0), weight, right) * (target >= 0)
    return right, factor
