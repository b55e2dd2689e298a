"""Hypergradients: how the loss on other rows changes with what steers the training. Tensors in, tensors out.

Inner loss L1(W, a), outer loss L2(W, a), v = dL2/dW at the trained W, H the Hessian of L1 in W:

    dL2/da (total) = dL2/da (direct) - cross(q)        cross(q) = d/dt grad_a L1(W + t q, a)  at t = 0

    one step     q = lr v                                  W = W' - lr grad L1; Adam and AdamW: q = `slope` * v
    Neumann      q = step * sum of (I - step H)^j v        j < terms; W near its optimum, step * H below 1
    CG           q = H^-1 v                                the limit of that sum
    K steps      by differentiating through the steps      `unroll`: exact, for small models

``cross(q)`` and ``H q`` are differences of two gradients along q: no second derivatives, any attention kernel.

One step and differences: Liu, Simonyan, Yang: DARTS, ICLR 2019, arXiv 1806.09055. Slope of the optimizer: Choe et al.:
Making Scalable Meta Learning Practical, NeurIPS 2023, arXiv 2310.05674. Neumann: Lorraine, Vicol, Duvenaud: Optimizing
Millions of Hyperparameters by Implicit Differentiation, AISTATS 2020, arXiv 1911.02590. CG: Rajeswaran et al.:
Meta-Learning with Implicit Gradients, NeurIPS 2019, arXiv 1909.04630.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Protocol

import torch
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel

Tensors = Sequence[Tensor]
Loss = Callable[[Tensors, Tensors], Tensor]  # of weights and outer variables
TINY = 1e-30  # of a quotient
BLOCK = 2**16  # entries


# ---------------------------------------------------------------- differences of gradients


def difference(gradient: Callable[[Tensor], Tensors], direction: Tensors, *, radius: float = 0.01) -> list[Tensor]:
    """Derivative of a gradient along a direction: ``(g(t) - g(-t)) / 2t`` with ``t = radius / ||direction||``.

    Args:
        gradient: What some gradient is at the weights plus its argument (0-d) times the direction; the same function
            both times, so under one dropout draw, or its noise is divided by t. See `moved`.
        direction: Tensors of the weights' shapes; its length is that of all of them together.
        radius: Length of either move, above 0; the error grows with its square.
    """
    t = radius / length(direction).clamp(min=TINY)
    return list(torch._foreach_div(torch._foreach_sub(list(gradient(t)), list(gradient(-t))), 2 * t))


@contextlib.contextmanager
def moved(weights: Tensors, direction: Tensors, by: Tensor | float) -> Iterator[None]:
    """``weights + by * direction`` inside, in place; afterwards they are bit for bit what they were.

    Raises:
        ValueError: Weights below float32.
    """
    check_masters(weights)
    before = [w.clone() for w in weights]
    try:
        torch._foreach_add_(list(weights), torch._foreach_mul(list(direction), by))
        yield
    finally:
        torch._foreach_copy_(list(weights), before)


def check_masters(weights: Tensors) -> None:
    """Raise for weights below float32: moves along a direction are smaller than their last digit.

    Raises:
        ValueError: Such weights.
    """
    for w in weights:
        if w.dtype not in (torch.float32, torch.float64):
            raise ValueError(
                f"differences of gradients need float32 weights, got {w.dtype}, in which moves so small are rounded "
                "away: load the model with dtype=torch.float32"
            )


# ---------------------------------------------------------------- the inverse Hessian


def neumann(product: Callable[[Tensors], Tensors], vector: Tensors, *, step: float, terms: int) -> list[Tensor]:
    """``step * sum over j < terms of (I - step H)^j vector``, which tends to ``H^-1 vector``.

    Args:
        product: ``H p`` for any p.
        vector: V, a list of tensors.
        step: Above 0, and below 2 divided by the largest eigenvalue of H, or the sum diverges.
        terms: At least 1.
    """
    term = list(torch._foreach_mul(list(vector), step))
    total = list(term)
    for _ in range(terms - 1):
        term = list(torch._foreach_sub(term, list(product(term)), alpha=step))
        total = list(torch._foreach_add(total, term))
    return total


def conjugate_gradient(
    product: Callable[[Tensors], Tensors], vector: Tensors, *, iterations: int, damping: float = 0.0
) -> list[Tensor]:
    """The p that solves ``(H + damping I) p = vector``, as far as ``iterations`` go.

    What has converged stays, and so does the last p before a direction of negative curvature, where H has no minimum.

    Args:
        product: ``H p`` for any p; H symmetric.
        vector: A list of tensors.
        iterations: At most; each takes one product.
        damping: At least 0.
    """
    solution = [torch.zeros_like(v) for v in vector]
    residual, direction = list(vector), list(vector)
    square = dot(residual, residual)
    going = square > 0
    for _ in range(iterations):
        image = along(product(direction), damping, direction)
        curvature = dot(direction, image)
        going = going & (curvature > 0) & (square > 0)
        share = torch.where(going, square / torch.where(going, curvature, 1.0), 0.0)
        solution = along(solution, share, direction)
        residual = along(residual, -share, image)
        before, square = square, dot(residual, residual)
        direction = along(residual, square / before.clamp(min=TINY), direction)
    return solution


def along(start: Tensors, by: Tensor | float, direction: Tensors) -> list[Tensor]:
    """``start + by * direction``."""
    return list(torch._foreach_add(list(start), torch._foreach_mul(list(direction), by)))


def dot(a: Tensors, b: Tensors) -> Tensor:
    """Sum of the products of all entries, 0-d."""
    return torch.stack([product.sum() for product in torch._foreach_mul(list(a), list(b))]).sum()


def length(tensors: Tensors) -> Tensor:
    """Euclidean norm of several tensors as one vector, 0-d."""
    return torch.linalg.vector_norm(torch.stack(torch._foreach_norm(list(tensors))))


# ---------------------------------------------------------------- the optimizer's own derivative


def slope(
    group: Mapping[str, Any], state: Mapping[str, Any], gradient: Tensor, *, out: Tensor | None = None
) -> Tensor | float:
    """How far the optimizer's last update of a parameter moves with the gradient it took, entry by entry.

    ``W' = W - update``, ``slope = d update / d gradient``: the learning rate for SGD; for Adam and AdamW, with r the
    root of the corrected second moment and m the corrected first,

        lr * ((1 - b1) / (1 - b1^t) / (r + eps) - m * (1 - b2) / (1 - b2^t) * g / (r * (r + eps)^2))

    Entries that never had a gradient get 0: Adam's slope there, lr / eps, tells of its eps only.

    Args:
        group: Group of the optimizer, one that `check_slope` admits.
        state: State of the parameter, after the step.
        gradient: Gradient of that step.
        out: Where a tensor is to lie; ``gradient`` itself will do.
    """
    if "betas" not in group:
        return group["lr"] * (1 + group["momentum"] if group["nesterov"] else 1)
    (b1, b2), t = group["betas"], state["step"].to(gradient.device)
    c1, c2 = 1 - b1**t, 1 - b2**t
    found = torch.empty_like(gradient) if out is None else out
    for here, g, first, second in blocks(found, gradient, state["exp_avg"], state["exp_avg_sq"]):
        root = corrected_root(group, state["step"], second)
        denominator = root + group["eps"]
        bend = torch.mul(first, g, out=here).div_(root).div_(denominator).mul_((1 - b2) / (c1 * c2))
        bend.neg_().add_((1 - b1) / c1).div_(denominator).mul_(group["lr"]).masked_fill_(root == 0, 0.0)
    return found


def blocks(*tensors: Tensor) -> Iterator[tuple[Tensor, ...]]:
    """Views of some rows of each at a time, on a CPU: what is worked out of them entry by entry stays in its cache."""
    like = tensors[0]
    if like.device.type != "cpu" or like.dim() == 0 or not like.numel():
        return iter([tensors])
    rows = max(1, BLOCK * len(like) // like.numel())
    return zip(*(t.split(rows) for t in tensors), strict=True)


def preconditioner(group: Mapping[str, Any], state: Mapping[str, Any]) -> Tensor | float:
    """How far the optimizer goes in the end for a gradient, per learning rate, entry by entry.

    Other than `slope` it counts later steps too, through which momentum spreads the gradient, and holds second moments
    where they are: ``1 / (1 - momentum)`` for SGD, ``1 / (r + eps)`` for Adam and AdamW. Entries that never had a
    gradient get 0.

    Args:
        group: Group of the optimizer, one that `check_slope` admits.
        state: State of the parameter, after a step.
    """
    if "betas" not in group:
        return 1 / (1 - group["momentum"])
    root = corrected_root(group, state["step"], state["exp_avg_sq"])
    return (1 / (root + group["eps"])).masked_fill_(root == 0, 0.0)


def corrected_root(group: Mapping[str, Any], step: Tensor, second: Tensor) -> Tensor:
    """r: root of Adam's bias-corrected second moment."""
    return (second / (1 - group["betas"][1] ** step.to(second.device))).sqrt_()


def check_slope(optimizer: torch.optim.Optimizer) -> None:
    """Raise for an optimizer whose `slope` is not known.

    Raises:
        ValueError: None of SGD, Adam, AdamW, or a setting of them that has another slope.
    """
    name, groups = type(optimizer).__name__, optimizer.param_groups
    if not isinstance(optimizer, (torch.optim.SGD, torch.optim.Adam, torch.optim.AdamW)):
        raise ValueError(
            f"the derivative of {name}'s update is not known: use SGD, Adam or AdamW, or precondition=False"
        )
    decays = not isinstance(optimizer, (torch.optim.SGD, torch.optim.AdamW)) and any(g["weight_decay"] for g in groups)
    if decays or any(g.get("amsgrad") or g.get("dampening") for g in groups):
        raise ValueError(
            f"the derivative of {name}'s update is not known with amsgrad, dampening, or a weight_decay that goes "
            "through its moments: use AdamW without amsgrad, or precondition=False"
        )


# ---------------------------------------------------------------- exact: through the steps


class Update(Protocol):
    """A differentiable optimizer: new weights and state from weights, gradients and state."""

    def start(self, weights: Tensors) -> Any:
        """The state before the first step."""

    def __call__(self, weights: Tensors, gradients: Tensors, state: Any) -> tuple[list[Tensor], Any]:
        """One step."""


@dataclass(frozen=True)
class SGD:
    """``u <- momentum * u + g + weight_decay * W; W <- W - lr * u``, as `torch.optim.SGD`."""

    lr: float
    momentum: float = 0.0
    weight_decay: float = 0.0

    def start(self, weights: Tensors) -> list[Tensor]:
        """Zeros."""
        return [torch.zeros_like(w) for w in weights]

    def __call__(self, weights: Tensors, gradients: Tensors, state: Tensors) -> tuple[list[Tensor], list[Tensor]]:
        """One step."""
        gradients = along(gradients, self.weight_decay, weights)
        state = along(gradients, self.momentum, state)
        return along(weights, -self.lr, state), state


@dataclass(frozen=True)
class AdamW:
    """Bias-corrected Adam, its decay decoupled, as `torch.optim.AdamW`; with ``weight_decay = 0`` it is Adam."""

    lr: float
    betas: tuple[float, float] = (0.9, 0.999)
    eps: float = 1e-8
    weight_decay: float = 0.0

    def start(self, weights: Tensors) -> tuple[int, list[Tensor], list[Tensor]]:
        """Steps taken, first and second moments."""
        return 0, [torch.zeros_like(w) for w in weights], [torch.zeros_like(w) for w in weights]

    def __call__(
        self, weights: Tensors, gradients: Tensors, state: tuple[int, Tensors, Tensors]
    ) -> tuple[list[Tensor], tuple[int, list[Tensor], list[Tensor]]]:
        """One step."""
        (b1, b2), t = self.betas, state[0] + 1
        squares = torch._foreach_mul(list(gradients), list(gradients))
        first = along(torch._foreach_mul(list(state[1]), b1), 1 - b1, gradients)
        second = along(torch._foreach_mul(list(state[2]), b2), 1 - b2, squares)
        roots = [_root(v / (1 - b2**t)) + self.eps for v in second]
        steps = torch._foreach_div(torch._foreach_div(first, 1 - b1**t), roots)
        kept = torch._foreach_mul(list(weights), 1 - self.lr * self.weight_decay)
        return along(kept, -self.lr, steps), (t, first, second)


def _root(x: Tensor) -> Tensor:
    """Square root whose derivative at 0 is 0, where autograd's is infinite: NaN for weights without a gradient."""
    positive = x > 0
    return torch.where(positive, torch.where(positive, x, 1.0).sqrt(), 0.0)


def unroll(
    inner: Loss, outer: Loss, weights: Tensors, alphas: Tensors, update: Update, *, steps: int = 1, state: Any = None
) -> tuple[list[Tensor], list[Tensor]]:
    """The exact hypergradient of ``steps`` inner steps: autograd through all of them.

    Holds ``steps`` graphs with second derivatives, so it is for small models and for checking the others; attention
    runs in the kernel that has them.

    Args:
        inner: L1(weights, alphas), a scalar.
        outer: L2(weights, alphas).
        weights: W at the start.
        alphas: The outer variables.
        update: `SGD` or `AdamW`.
        steps: K, at least 1.
        state: State of the update at the start; by default its own.

    Returns:
        DL2(W_K(alphas), alphas)/dalphas, and W_K.
    """
    alphas = [a.detach().requires_grad_() for a in alphas]
    weights = [w.detach().requires_grad_() for w in weights]
    state = update.start(weights) if state is None else state
    with torch.enable_grad(), sdpa_kernel(SDPBackend.MATH):
        for _ in range(steps):
            found = torch.autograd.grad(inner(weights, alphas), weights, create_graph=True, materialize_grads=True)
            weights, state = update(weights, found, state)
        total = torch.autograd.grad(outer(weights, alphas), alphas, materialize_grads=True)
    return list(total), [w.detach() for w in weights]
