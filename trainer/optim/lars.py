"""LARS, layer-wise adaptive rate scaling (You, Gitman & Ginsburg 2017, arXiv 1708.03888).

For a weight w with gradient g, weight decay wd, trust coefficient eta and learning rate lr:

=========  =====================================  ==================================
variant    trust ratio                            update
=========  =====================================  ==================================
"simclr"   eta |w| / |g + wd w|                   v = mu v + lr ratio (g + wd w);
                                                  w -= v
"mocov3"   eta |w| / |g + wd w|                   v = mu v + ratio (g + wd w);
                                                  w -= lr v
"you"      eta |w| / (|g| + wd |w| + eps)         as "mocov3"
=========  =====================================  ==================================

"simclr" is google-research/simclr's: the learning rate is inside the velocity, so a step is felt
at the rate it was taken with. The others differ from it while the rate changes. "you" is the
paper's ratio, as in lightly and solo-learn.

With Nesterov momentum the last line moves w by ``mu v + u``, u being what was added to v. The ratio
is 1 where |w| or the denominator is 0, so that a zero-initialised tensor can leave zero; but 0
where |g| is 0, as lightly and solo-learn have it, and as torch leaves a parameter without gradient:
frozen weights would shrink by eta in each step, for the ratio takes the weight decay out again.
Tensors of one dimension or none (biases, BatchNorm) get neither the ratio nor weight decay.

The norms are those of whole layers, also where every process holds and moves a piece of each
(:mod:`trainer.parallel.fsdp`, :mod:`trainer.parallel.zero`): the squared norms of pieces are added
up over processes in one all-reduce.
"""

from collections.abc import Callable, Iterable
from typing import Any, Literal, get_args, overload

import torch
import torch.distributed as dist
from torch.optim.sgd import sgd

from trainer.optim.sharded_norms import LayerNorms

Variant = Literal["simclr", "mocov3", "you"]
Tensors = list[torch.Tensor]


class LARS(torch.optim.Optimizer):
    """See the module's docstring. One step makes no host synchronisation.

    State: ``momentum_buffer`` per parameter, of the parameter's shape and dtype, absent when
    momentum is 0.

    Skipping: when the attribute ``found_inf`` is set to a 0-d float32 tensor that holds 1, the step
    leaves parameters and momentum as they are, to the bit, whatever the gradients hold; the
    decision stays on the device. It is the protocol of torch's fused optimizers; see
    :func:`trainer.optim.optimizers.apply_update`.

    Args:
        params: parameters, named parameters, or groups of them; floating point, dense. Types and
            devices may be mixed.
        lr: learning rate; ``param_groups[i]["lr"]`` may be set before every step.
        momentum: mu, in [0, 1).
        weight_decay: wd.
        trust_coefficient: eta.
        variant: "simclr", "mocov3" or "you".
        nesterov: Nesterov momentum.
        eps: added to the denominator of "you" only.

    Raises:
        ValueError: an argument is out of range, or a parameter is sparse or overlaps itself.
    """

    found_inf: torch.Tensor | None = None
    holders: dist.ProcessGroup | None = None
    """Where parameters are pieces: the processes that hold all of them."""

    def __init__(
        self,
        params: Iterable[Any],
        lr: float,
        momentum: float = 0.9,
        weight_decay: float = 1e-6,
        trust_coefficient: float = 1e-3,
        variant: Variant = "simclr",
        nesterov: bool = False,
        eps: float = 1e-8,
    ) -> None:
        defaults = {
            "lr": lr,
            "momentum": momentum,
            "weight_decay": weight_decay,
            "trust_coefficient": trust_coefficient,
            "variant": variant,
            "nesterov": nesterov,
            "eps": eps,
        }
        super().__init__(params, defaults)

    def add_param_group(self, param_group: dict[str, Any]) -> None:
        """Add a group of parameters; see :class:`LARS` for its settings and errors."""
        super().add_param_group(param_group)
        try:
            _check_group(self.param_groups[-1])
        except ValueError:
            self.param_groups.pop()
            raise

    @overload
    def step(self, closure: None = None) -> None: ...

    @overload
    def step(self, closure: Callable[[], float]) -> float: ...

    @torch.no_grad()
    def step(self, closure: Callable[[], float] | None = None) -> float | None:
        """One update of every parameter that has a gradient; gradients are left as they are."""
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
        for group in self.param_groups:
            for params in _by_device_and_dtype(group["params"]):
                self._update(group, params)
        return loss

    def _update(self, group: dict[str, Any], params: Tensors) -> None:
        """Update parameters of one device and dtype."""
        matrices = [p for p in params if p.ndim > 1]
        vectors = [p for p in params if p.ndim <= 1]
        for alike, adapt in ((matrices, True), (vectors, False)):
            if alike:
                momenta = [self._momentum_buffer(p) for p in alike] if group["momentum"] else None
                norms = LayerNorms(self.holders, len(alike)) if adapt else None
                self.update_pieces(group, alike, _gradients(alike), momenta, norms)

    def update_pieces(
        self,
        group: dict[str, Any],
        weights: Tensors,
        grads: Tensors,
        momenta: Tensors | None,
        layer_norms: LayerNorms | None,
    ) -> None:
        """One update of layers, or of this process's pieces of them; a collective if in pieces.

        ``weights``, plain tensors of one device and dtype, and their ``momenta``, if there is any
        momentum, are moved in place: ``v = momentum v + update; w -= lr v`` where found_inf is not
        set. Without ``layer_norms``, of the whole layers, there is no trust ratio and no decay.
        """
        lr = group["lr"]
        if layer_norms is not None:
            updates = self._adapted_gradients(group, weights, grads, layer_norms)
        elif group["variant"] == "simclr":
            updates = list(torch._foreach_mul(grads, lr)) if grads else grads
        else:
            updates = grads
        if not weights:
            return
        # The kernel walks the memory of its tensors side by side and does not look at strides: it
        # gets that memory as vectors, in one layout.
        sgd(
            [_memory(w) for w in weights],
            [_memory(match_layout(u, w)) for u, w in zip(updates, weights)],
            [None] * len(weights) if momenta is None else [_memory(m) for m in momenta],
            has_sparse_grad=False,
            fused=True,
            found_inf=self.found_inf,
            weight_decay=0.0,
            momentum=group["momentum"],
            lr=1.0 if group["variant"] == "simclr" else lr,  # simclr's updates have it already
            dampening=0.0,
            nesterov=group["nesterov"],
            maximize=False,
        )

    def _adapted_gradients(
        self, group: dict[str, Any], weights: Tensors, grads: Tensors, layer_norms: LayerNorms
    ) -> Tensors:
        """New tensors ``ratio * (g + wd w)``, times the learning rate for "simclr"."""
        weight_decay, eta = group["weight_decay"], group["trust_coefficient"]
        updates = list(torch._foreach_add(grads, weights, alpha=weight_decay)) if grads else []
        weight_norm, grad_norm, update_norm = layer_norms(weights, grads, updates)
        denominator = update_norm
        if group["variant"] == "you":
            denominator = grad_norm + weight_decay * weight_norm + group["eps"]
        adapt = (weight_norm > 0) & (update_norm > 0)
        ratio = torch.where(adapt, eta * weight_norm / denominator, 1.0) * (grad_norm != 0)
        if group["variant"] == "simclr":
            ratio = ratio * group["lr"]
        if updates:
            torch._foreach_mul_(updates, ratio.to(updates[0].dtype).unbind())
        return updates

    def _momentum_buffer(self, param: torch.Tensor) -> torch.Tensor:
        state = self.state[param]
        buffer = state.get("momentum_buffer")
        if buffer is None:
            # Zeros, and not the first update: the first step may be one that is skipped.
            buffer = torch.zeros_like(param, memory_format=torch.preserve_format)
        # A checkpoint does not keep channels_last.
        state["momentum_buffer"] = match_layout(buffer, param)
        return state["momentum_buffer"]


def _check_group(group: dict[str, Any]) -> None:
    for name in ("lr", "weight_decay", "trust_coefficient", "eps"):
        if not group[name] >= 0:
            raise ValueError(f"LARS: {name} must not be negative, got {group[name]}")
    if not 0 <= group["momentum"] < 1:
        raise ValueError(f"LARS: momentum must lie in [0, 1), got {group['momentum']}")
    if group["nesterov"] and not group["momentum"]:
        raise ValueError("LARS: Nesterov momentum needs a momentum above 0")
    if group["variant"] not in get_args(Variant):
        raise ValueError(
            f"LARS: unknown variant {group['variant']!r}; use one of {', '.join(get_args(Variant))}"
        )
    for param in group["params"]:
        if not param.is_floating_point():
            raise ValueError(f"LARS: a parameter has dtype {param.dtype}, not floating point")
        if not _is_dense(param):
            raise ValueError(
                f"LARS: a parameter of shape {tuple(param.shape)} is sparse or a strided view; "
                "make it contiguous"
            )


def _by_device_and_dtype(params: Tensors) -> list[Tensors]:
    groups: dict[tuple[torch.device, torch.dtype], Tensors] = {}
    for param in params:
        if param.grad is not None:
            groups.setdefault((param.device, param.dtype), []).append(param)
    return list(groups.values())


def _gradients(params: Tensors) -> Tensors:
    grads = []
    for param in params:
        assert param.grad is not None  # noqa: S101 - for the type checker
        if param.grad.layout != torch.strided:
            raise ValueError(f"LARS: a gradient of shape {tuple(param.shape)} is sparse")
        grads.append(param.grad.to(param.dtype))
    return grads


def _is_dense(tensor: torch.Tensor) -> bool:
    """Whether the tensor's elements fill one piece of memory, in any order of dimensions."""
    if tensor.layout != torch.strided:
        return False
    expected = 1
    for stride, size in sorted(zip(tensor.stride(), tensor.shape)):
        if size > 1:
            if stride != expected:
                return False
            expected *= size
    return True


def _memory(tensor: torch.Tensor) -> torch.Tensor:
    """A dense tensor's elements as a vector, in the order in which they lie in memory."""
    return tensor.as_strided((tensor.numel(),), (1,))


def match_layout(tensor: torch.Tensor, model: torch.Tensor) -> torch.Tensor:
    """The tensor in the memory layout of ``model``, of the same shape: itself where it has that.

    Both are dense. A copy is made only if elements have to move: strides of dimensions of size 1,
    which 1x1 convolutions have and operations set as they like, mean nothing.
    """
    if tensor.stride() == model.stride():
        return tensor
    pairs = zip(tensor.shape, tensor.stride(), model.stride())
    if all(ours == theirs for size, ours, theirs in pairs if size > 1):
        return tensor.as_strided(model.shape, model.stride())
    return torch.empty_like(model, dtype=tensor.dtype).copy_(tensor)
