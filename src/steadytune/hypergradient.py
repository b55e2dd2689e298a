"""Hypergradients: gradients of a loss on held-out rows with respect to variables of the training. Functions of tensors.

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
import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Protocol

import torch
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel

Tensors = Sequence[Tensor]
Loss = Callable[[Tensors, Tensors], Tensor]  # (weights, outer variables) -> loss
TINY = 1e-30  # added to denominators that may be 0
BLOCK = 2**16  # number of entries that are computed at once


# ---------------------------------------------------------------- differences of gradients


def difference(gradient: Callable[[Tensor], Tensors], direction: Tensors, *, radius: float = 0.01) -> list[Tensor]:
    """Derivative of a gradient along a direction: ``(g(t) - g(-t)) / 2t`` with ``t = radius / ||direction||``.

    Args:
        gradient: Function t -> gradient at ``weights + t * direction``, with t a 0-d tensor; see `moved`. Both calls
            must use the same dropout mask, because the difference of two masks would be divided by t.
        direction: Tensors of the weights' shapes. ``||direction||`` is the norm of all of them as one vector.
        radius: Length of each move, above 0; the error grows with its square.
    """
    t = radius / length(direction).clamp(min=TINY)
    return list(torch._foreach_div(torch._foreach_sub(list(gradient(t)), list(gradient(-t))), 2 * t))


@contextlib.contextmanager
def moved(weights: Tensors, direction: Tensors, by: Tensor | float) -> Iterator[None]:
    """Set weights to ``weights + by * direction``, in place; restore them bit for bit at the end.

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
    """Raise for weights below float32, because moves along a direction would be rounded away.

    Raises:
        ValueError: A weight has less precision than float32.
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
        vector: The vector, as a list of tensors.
        step: Step size, above 0. The sum diverges from 2 / (largest eigenvalue of H) on.
        terms: Number of terms, at least 1.
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
    """Approximate solution p of ``(H + damping I) p = vector`` after at most ``iterations`` iterations.

    It stops when it has converged. It also stops at a direction of negative curvature, and returns the p before it.

    Args:
        product: ``H p`` for any p; H symmetric.
        vector: The right-hand side, as a list of tensors.
        iterations: Largest number of iterations, each with one product.
        damping: Damping, at least 0.
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


def proximal(
    product: Callable[[Tensors], Tensors], vector: Tensors, *, strength: float, iterations: int
) -> list[Tensor]:
    """``(I + H / strength)^-1 vector`` by `conjugate_gradient`: the gradient at the start of a training held near it.

    With ``phi = argmin L1(phi) + strength/2 |phi - theta|^2`` and the vector ``dL2/dphi`` it is ``dL2/dtheta``.

    Args:
        product: ``H p`` for any p, with H the Hessian of L1 at phi.
        vector: The vector, as a list of tensors.
        strength: Strength of the pull, above 0; an infinite one gives the vector itself.
        iterations: Largest number of iterations.
    """
    if math.isinf(strength):
        return list(vector)
    solution = conjugate_gradient(product, vector, iterations=iterations, damping=strength)
    return list(torch._foreach_mul(solution, strength))


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
    """Derivative of the optimizer's last update of a parameter with respect to its gradient, entry by entry.

    ``W' = W - update``, ``slope = d update / d gradient``: the learning rate for SGD; for Adam and AdamW, with r the
    root of the corrected second moment and m the corrected first,

        lr * ((1 - b1) / (1 - b1^t) / (r + eps) - m * (1 - b2) / (1 - b2^t) * g / (r * (r + eps)^2))

    Entries that never had a gradient get 0, because Adam's slope there, lr / eps, depends on its eps alone.

    Args:
        group: Parameter group of an optimizer that `check_slope` admits.
        state: Optimizer state of the parameter after the step.
        gradient: Gradient of that step.
        out: Tensor to write the slope into; it may be ``gradient``.
    """
    if "betas" not in group:
        return group["lr"] * (1 + group["momentum"] if group["nesterov"] else 1)
    (b1, b2), t = group["betas"], state["step"].to(gradient.device)
    c1, c2 = 1 - b1**t, 1 - b2**t
    result = torch.empty_like(gradient) if out is None else out
    for here, g, first, second in blocks(result, gradient, state["exp_avg"], state["exp_avg_sq"]):
        root = corrected_root(group, state["step"], second)
        denominator = root + group["eps"]
        bend = torch.mul(first, g, out=here).div_(root).div_(denominator).mul_((1 - b2) / (c1 * c2))
        bend.neg_().add_((1 - b1) / c1).div_(denominator).mul_(group["lr"]).masked_fill_(root == 0, 0.0)
    return result


def blocks(*tensors: Tensor) -> Iterator[tuple[Tensor, ...]]:
    """Yield the tensors in views of a few rows on a CPU, so that computations entry by entry stay in its cache."""
    like = tensors[0]
    if like.device.type != "cpu" or like.dim() == 0 or not like.numel():
        return iter([tensors])
    rows = max(1, BLOCK * len(like) // like.numel())
    return zip(*(t.split(rows) for t in tensors), strict=True)


def preconditioner(group: Mapping[str, Any], state: Mapping[str, Any]) -> Tensor | float:
    """Total move of the optimizer for a gradient, in units of the learning rate, entry by entry.

    Unlike `slope`, it includes the later steps over which momentum spreads a gradient, and takes second moments as
    constants: ``1 / (1 - momentum)`` for SGD, ``1 / (r + eps)`` for Adam and AdamW. Entries that never had a gradient
    get 0.

    Args:
        group: Parameter group of an optimizer that `check_slope` admits.
        state: Optimizer state of the parameter after a step.
    """
    if "betas" not in group:
        return 1 / (1 - group["momentum"])
    root = corrected_root(group, state["step"], state["exp_avg_sq"])
    return (1 / (root + group["eps"])).masked_fill_(root == 0, 0.0)


def corrected_root(group: Mapping[str, Any], step: Tensor, second: Tensor) -> Tensor:
    """r, the root of Adam's bias-corrected second moment."""
    return (second / (1 - group["betas"][1] ** step.to(second.device))).sqrt_()


def check_slope(optimizer: torch.optim.Optimizer) -> None:
    """Raise for an optimizer whose `slope` is unknown.

    Raises:
        ValueError: The optimizer is not SGD, Adam or AdamW, or has a setting that changes the slope.
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
        """State before the first step."""

    def __call__(self, weights: Tensors, gradients: Tensors, state: Any) -> tuple[list[Tensor], Any]:
        """One step."""


@dataclass(frozen=True)
class SGD:
    """``u <- momentum * u + g + weight_decay * W; W <- W - lr * u``, as in `torch.optim.SGD`."""

    lr: float
    momentum: float = 0.0
    weight_decay: float = 0.0

    def start(self, weights: Tensors) -> list[Tensor]:
        """Momentum buffers of zeros."""
        return [torch.zeros_like(w) for w in weights]

    def __call__(self, weights: Tensors, gradients: Tensors, state: Tensors) -> tuple[list[Tensor], list[Tensor]]:
        """One step."""
        gradients = along(gradients, self.weight_decay, weights)
        state = along(gradients, self.momentum, state)
        return along(weights, -self.lr, state), state


@dataclass(frozen=True)
class AdamW:
    """Adam with bias correction and decoupled decay, as in `torch.optim.AdamW`; Adam if ``weight_decay = 0``."""

    lr: float
    betas: tuple[float, float] = (0.9, 0.999)
    eps: float = 1e-8
    weight_decay: float = 0.0

    def start(self, weights: Tensors) -> tuple[int, list[Tensor], list[Tensor]]:
        """Number of steps, first and second moments."""
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
    """Square root with derivative 0 at 0; autograd's is infinite there, and gives NaN without a gradient."""
    positive = x > 0
    return torch.where(positive, torch.where(positive, x, 1.0).sqrt(), 0.0)


def unroll(
    inner: Loss, outer: Loss, weights: Tensors, alphas: Tensors, update: Update, *, steps: int = 1, state: Any = None
) -> tuple[list[Tensor], list[Tensor]]:
    """Exact hypergradient of ``steps`` inner steps, by automatic differentiation through all of them.

    It keeps ``steps`` graphs with second derivatives in memory. Use it for small models, and to check the other
    functions. Attention runs in a kernel that has second derivatives.

    Args:
        inner: L1(weights, alphas), a scalar.
        outer: L2(weights, alphas).
        weights: Weights W before the first step.
        alphas: The outer variables.
        update: `SGD` or `AdamW`.
        steps: Number of steps K, at least 1.
        state: State of the update before the first step; by default ``update.start(weights)``.

    Returns:
        The total derivative of ``L2(W_K(alphas), alphas)`` in alphas, and W_K.
    """
    alphas = [a.detach().requires_grad_() for a in alphas]
    weights = [w.detach().requires_grad_() for w in weights]
    state = update.start(weights) if state is None else state
    with torch.enable_grad(), sdpa_kernel(SDPBackend.MATH):
        for _ in range(steps):
            grads = torch.autograd.grad(inner(weights, alphas), weights, create_graph=True, materialize_grads=True)
            weights, state = update(weights, grads, state)
        total = torch.autograd.grad(outer(weights, alphas), alphas, materialize_grads=True)
    return list(total), [w.detach() for w in weights]
