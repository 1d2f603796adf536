"""Optimizers of a run: which one, over which parameters, at which rate, and one guarded step."""

import itertools
import math
from dataclasses import dataclass
from typing import Any, Literal

import torch
from torch import nn

from common.bounds import check_bounds
from common.errors import ConfigError
from trainer.optim.lars import LARS, Variant, match_layout


class ShardedOptimizer:
    """What a strategy puts in the place of torch's optimizer: ``inner`` moves a process's part."""

    found_inf: torch.Tensor | None = None
    grad_scale: torch.Tensor | None = None

    def __init__(self, inner: torch.optim.Optimizer) -> None:
        self.inner = inner

    @property
    def param_groups(self) -> list[dict[str, Any]]:
        """This process's part and its settings, which may be changed in place."""
        return self.inner.param_groups

    def step(self) -> None:
        """Move this process's part, unless ``found_inf`` is set, by gradients over ``grad_scale``;
        see :func:`apply_update`."""
        inner: Any = self.inner
        inner.found_inf, inner.grad_scale = self.found_inf, self.grad_scale
        try:
            self._step()
        finally:
            inner.found_inf = inner.grad_scale = None

    def _step(self) -> None:
        raise NotImplementedError

    def zero_grad(self, set_to_none: bool = True) -> None:
        """Drop the gradients."""
        raise NotImplementedError

    def gradient_norm(self) -> torch.Tensor:
        """See :func:`gradient_norm`. A collective."""
        raise NotImplementedError


Updatable = torch.optim.Optimizer | ShardedOptimizer


@dataclass(frozen=True, kw_only=True)
class OptimConfig:
    """The optimizer; the defaults are SimCLR's for ImageNet (arXiv 2002.05709)."""

    name: Literal["lars", "sgd", "adamw"] = "lars"
    """LARS for large batches; SGD with momentum; AdamW."""
    base_lr: float = 0.3
    """Peak learning rate at a global batch of 256 samples, whatever the scaling rule."""
    lr_scaling: Literal["linear", "sqrt", "none"] = "linear"
    """The peak rate at batch B: base_lr x B/256, base_lr x sqrt(B/256), or base_lr as it is.
    SimCLR's 0.075 x sqrt(B) is sqrt with a base_lr of 1.2."""
    momentum: float = 0.9
    """Of LARS and SGD, in [0, 1)."""
    nesterov: bool = False
    """Nesterov momentum, for LARS and SGD."""
    weight_decay: float = 1e-6
    """On weights of two and more dimensions; decoupled in AdamW, part of the gradient otherwise."""
    decay_vectors: bool = False
    """Decay biases and BatchNorm parameters as well (MoCo v1 and v2); not with LARS."""
    variant: Variant = "simclr"
    """Of LARS: simclr (rate inside the velocity), mocov3 (outside), you (the paper's ratio)."""
    trust_coefficient: float = 1e-3
    """Of LARS: eta, the relative change of a weight by a step at rate 1."""
    betas: tuple[float, float] = (0.9, 0.999)
    """Of AdamW: decay of the running mean and of the running square, per step."""
    clip_norm: float = 0.0
    """Of SGD and AdamW: longer gradients, all of a step together, are scaled to this norm; 0: none
    are."""
    steady: tuple[str, ...] = ()
    """Modules by their names, anywhere in an objective, whose learning rate stays at its peak:
    predictor, for SimSiam."""
    eps: float = 1e-8
    """Added to the denominators of AdamW and of LARS's variant "you"."""

    def __post_init__(self) -> None:
        numbers = ("base_lr", "weight_decay", "trust_coefficient", "eps", "clip_norm")
        check_bounds(self, "--optim.", **dict.fromkeys(numbers, "[0, inf)"))
        check_bounds(self, "--optim.", momentum="[0, 1)", betas="[0, 1)")
        if self.nesterov and self.name != "adamw" and not self.momentum:
            raise ConfigError("--optim.nesterov needs --optim.momentum above 0")
        if self.clip_norm and self.name == "lars":
            raise ConfigError(
                "--optim.clip-norm does not go with LARS, which takes no notice of a gradient's"
                " length; use --optim.name sgd or adamw"
            )
        if self.decay_vectors and self.name == "lars":
            raise ConfigError(
                "--optim.decay-vectors does not go with LARS, which leaves biases and BatchNorm out"
                " of weight decay; use --optim.name sgd or adamw"
            )


def scaled_lr(config: OptimConfig, global_batch: int) -> float:
    """The peak learning rate at ``global_batch`` samples per step, over all processes."""
    ratio = global_batch / 256  # samples that `base_lr` is quoted for
    factors = {"linear": ratio, "sqrt": math.sqrt(ratio), "none": 1.0}
    return config.base_lr * factors[config.lr_scaling]


def build_optimizer(
    module: nn.Module, config: OptimConfig, lars: type[LARS] = LARS
) -> torch.optim.Optimizer:
    """The optimizer over the parameters of ``module`` that require gradients.

    There are at most two groups: ``"matrices"``, of two and more dimensions, and ``"vectors"``,
    without weight decay; and two of what is steady, ``"steady matrices"`` and ``"steady vectors"``.
    ``group["group_name"]`` says which, ``group["param_names"]`` holds the names in ``module`` in
    the order of ``group["params"]``. ``lars`` is the class of LARS.

    Raises:
        ConfigError: nothing in ``module`` requires gradients, or nothing has a name of
            ``config.steady``.
    """
    groups, lr = _parameter_groups(module, config), config.base_lr
    if config.name == "lars":
        return lars(
            groups,
            lr=lr,
            momentum=config.momentum,
            trust_coefficient=config.trust_coefficient,
            variant=config.variant,
            nesterov=config.nesterov,
            eps=config.eps,
        )
    optimizer: torch.optim.Optimizer
    if config.name == "sgd":
        optimizer = torch.optim.SGD(
            groups, lr=lr, momentum=config.momentum, nesterov=config.nesterov, fused=True
        )
    else:
        optimizer = torch.optim.AdamW(groups, lr=lr, betas=config.betas, eps=config.eps, fused=True)
    optimizer.register_step_pre_hook(_prepare_fused_step)
    return optimizer


def _parameter_groups(module: nn.Module, config: OptimConfig) -> list[dict[str, Any]]:
    named = [(name, p) for name, p in module.named_parameters() if p.requires_grad]
    if not named:
        raise ConfigError("there is nothing to train: no parameter requires gradients")
    for part in config.steady:
        if not any(part in name.split(".")[:-1] for name, _ in named):
            raise ConfigError(f"--optim.steady {part}: nothing that is trained has this name")
    steady = {n for n, _ in named if not set(config.steady).isdisjoint(n.split(".")[:-1])}
    groups = []
    for is_steady, matrices in itertools.product((False, True), (True, False)):
        params = [
            (name, p)
            for name, p in named
            if (name in steady) == is_steady and (p.ndim > 1) == matrices
        ]
        decays = matrices or config.decay_vectors
        group = {
            "group_name": "steady " * is_steady + ("matrices" if matrices else "vectors"),
            "params": params,
            "weight_decay": config.weight_decay if decays else 0.0,
            "decays": decays,
            "steady": is_steady,
        }
        groups += [group] if params else []
    return groups


def set_lr(
    optimizer: Updatable,
    lr: float,
    weight_decay: float | None = None,
    steady_lr: float | None = None,
) -> None:
    """Set the learning rate of every group, another one of what is steady, and the weight decay of
    those that decay; no device work."""
    for group in optimizer.param_groups:
        group["lr"] = lr if steady_lr is None or not group["steady"] else steady_lr
        if weight_decay is not None and group["decays"]:
            group["weight_decay"] = weight_decay


def gradient_norm(optimizer: Updatable) -> torch.Tensor:
    """Euclidean norm of all gradients together, a 0-d tensor on their device; not synchronised.

    After the strategy's averaging it is the same on every process, and not finite when any gradient
    is not. A collective where gradients are sharded.
    """
    if isinstance(optimizer, ShardedOptimizer):
        return optimizer.gradient_norm()
    params = [p for group in optimizer.param_groups for p in group["params"]]
    grads = [p.grad for p in params if p.grad is not None]
    return torch.nn.utils.get_total_norm(grads, foreach=True)


def apply_update(
    optimizer: Updatable,
    lr: float,
    norm: torch.Tensor | None = None,
    weight_decay: float | None = None,
    clip_norm: float = 0.0,
    steady_lr: float | None = None,
) -> torch.Tensor:
    """One step at rate ``lr``, left out if ``norm`` is not finite; no host synchronisation.

    A step left out changes neither parameters nor optimizer state by a bit, AdamW's step count
    included, whatever the gradients hold. For the optimizers of :func:`build_optimizer`.

    Args:
        optimizer: gradients are in its parameters; they stay there, scaled where they are clipped.
        lr: for every group, but those that ``steady_lr`` is for, where there is one.
        norm: 0-d tensor, equal on all processes, as from :func:`gradient_norm`; None steps always.
        weight_decay: for every group that decays; None: as it is.
        clip_norm: gradients of a larger ``norm`` are scaled to it; 0: none are. Not for LARS.
        steady_lr: see :func:`set_lr`.

    Returns:
        0-d float32 tensor on the device: 1 where the step was left out, else 0.
    """
    set_lr(optimizer, lr, weight_decay, steady_lr)
    if norm is None:
        optimizer.step()
        return torch.zeros(())
    skipped = 1 - norm.isfinite().float()
    guarded: Any = optimizer
    # Torch's fused optimizers decide on the device when they find this attribute; LARS does too.
    guarded.found_inf = skipped
    if clip_norm:
        guarded.grad_scale = (norm / clip_norm).clamp(min=1).float()
    try:
        optimizer.step()
    finally:
        guarded.found_inf = guarded.grad_scale = None
    return skipped


def _prepare_fused_step(optimizer: torch.optim.Optimizer, *_: Any) -> None:
    """Mend what torch's fused kernels do not look at, for SGD and AdamW.

    They walk the memory of parameter, gradient and state side by side: a channels_last weight
    beside a contiguous momentum (from a checkpoint) would silently be mixed up. And a first step
    of SGD that is skipped would leave its momentum uninitialised.
    """
    for group in optimizer.param_groups:
        for param in group["params"]:
            if param.grad is None:
                continue
            if param.grad.stride() != param.stride():
                param.grad = match_layout(param.grad, param)
            state = optimizer.state[param]
            if group.get("momentum") and state.get("momentum_buffer") is None:
                state["momentum_buffer"] = torch.zeros_like(param)
            for name, value in state.items():
                if value.shape == param.shape:
                    state[name] = match_layout(value, param)
