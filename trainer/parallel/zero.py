"""DeepSpeed's ZeRO-1 and ZeRO-2: optimizer state, and gradients too, in flat shards.

ZeRO lays the parameters of an optimizer's group end to end and gives each process an equal part,
with no regard to where a tensor ends: the optimizer sees one vector. LARS needs the norms of whole
layers, so :class:`ZeroLARS` cuts the vector where layers end and adds up the squared norms of the
pieces over processes, all layers in one all-reduce. SGD and AdamW take the vector as it is.

Weights themselves are whole on every process, between steps. All that knows DeepSpeed's insides is
here, private attributes among it (the layout, and averaged gradients). They are those of 0.19;
another version is refused.

Shapes: S elements of a process's part, W processes.
"""

import importlib.metadata
import logging
import os
import warnings
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
import torch.distributed as dist
from lightning_fabric import Fabric
from lightning_fabric.accelerators import CUDAAccelerator
from lightning_fabric.strategies import DeepSpeedStrategy
from torch import nn

from common.errors import ConfigError
from trainer.objectives.base import Objective
from trainer.optim.lars import LARS
from trainer.optim.optimizers import OptimConfig, ShardedOptimizer, build_optimizer
from trainer.optim.sharded_norms import LayerNorms, total_norm
from trainer.parallel.sharding import Sharding
from trainer.state.checkpoint import Tensors, split_key

_VERSION = "0.19."
_BUCKET = 1 << 23  # gradients reduced at a time: 32 MiB, about DDP's


def zero_strategy(stage: int, backend: str, compress: bool) -> DeepSpeedStrategy:
    """Fabric's strategy for ZeRO-1 or -2; ``compress``: gradients are reduced in bfloat16.

    Raises:
        ConfigError: DeepSpeed is missing, or another version than this file knows.
    """
    try:
        version = importlib.metadata.version("deepspeed")
    except importlib.metadata.PackageNotFoundError:
        version = "none"
    if not version.startswith(_VERSION):
        raise ConfigError(
            f"--strategy deepspeed-{stage} needs DeepSpeed {_VERSION}x, found {version}; install "
            "what requirements.lock names, or use --strategy fsdp"
        )
    _import_deepspeed(on_cuda=backend == "nccl")
    return _Strategy(
        config=_config(stage, backend, compress),
        process_group_backend=backend,
        logging_level=logging.ERROR,
    )


def _import_deepspeed(on_cuda: bool) -> None:
    """Import it so that it says nothing and compiles nothing."""
    if not on_cuda:
        os.environ.setdefault("DS_ACCELERATOR", "cpu")
    os.environ.setdefault("DS_LOG_LEVEL", "ERROR")
    # It calls torch by a name that torch has replaced.
    warnings.filterwarnings("ignore", ".*all_gather_into_tensor.*deprecated", FutureWarning)
    import deepspeed.ops

    # Its shared-memory collectives would be compiled with g++ at the first start, for a minute.
    deepspeed.ops.__compatible_ops__["deepspeed_shm_comm"] = False


def _config(stage: int, backend: str, compress: bool) -> dict[str, Any]:
    """DeepSpeed's settings: the step is the optimizer's own, untouched, and waits for nothing."""
    return {
        "train_micro_batch_size_per_gpu": 1,  # read by its statistics only
        "gradient_accumulation_steps": 1,
        "gradient_clipping": 0.0,  # left out, it clips at 1
        "zero_allow_untested_optimizer": True,
        "steps_per_print": 2**31,
        "timers": {"throughput": {"enabled": False}},  # it waits for the device in every step
        # Weights are float32 and the forward pass autocasts; these would cast the weights.
        "bf16": {"enabled": False},
        "fp16": {"enabled": False},
        "communication_data_type": "bf16" if compress else "fp32",
        "zero_optimization": {
            "stage": stage,
            "overlap_comm": backend == "nccl",
            "reduce_bucket_size": _BUCKET,
            "allgather_bucket_size": 16 * _BUCKET,
            "compute_grad_norm": False,  # it reads the norm on the host; ours stays on the device
        },
    }


class _Strategy(DeepSpeedStrategy):
    """Fabric's, on the CPU too, and with backward passes that DeepSpeed sees."""

    def setup_environment(self) -> None:
        """Fabric's own refuses the CPU, which DeepSpeed does not."""
        if isinstance(self.accelerator, CUDAAccelerator):
            super().setup_environment()
            return
        if self.accelerator is not None:
            self.accelerator.setup_device(self.root_device)
        self._set_world_ranks()
        self._init_deepspeed_distributed()

    def _initialize_engine(
        self, model: nn.Module, optimizer: Any = None, scheduler: Any = None
    ) -> tuple[Any, Any, Any]:
        import deepspeed

        engine, wrapped, _, scheduler = deepspeed.initialize(
            model=model,
            optimizer=optimizer,
            lr_scheduler=scheduler,
            config=self.config,
            dist_init_required=False,
        )
        return engine, wrapped, scheduler

    def backward(
        self, tensor: torch.Tensor, module: nn.Module | None, *args: Any, **kwargs: Any
    ) -> None:
        """Through the engine, which reduces gradients; our precisions do not know it."""
        engine: Any = module
        engine.backward(tensor, *args, **kwargs)


@dataclass(frozen=True)
class _Piece:
    """What this process's part holds of one parameter: elements begin ... end of the part."""

    layer: int
    begin: int
    end: int


class _FlatGroup:
    """How DeepSpeed's optimizer ``zero`` laid out one group of parameters.

    ``names``: parameters' names by their ``id``.
    """

    def __init__(self, zero: Any, index: int, names: dict[int, str]) -> None:
        params = zero.round_robin_bit16_groups[index]
        self.process_group: dist.ProcessGroup = zero.real_dp_process_group[index]
        self.size = int(zero.partition_size[index])
        self.names = [names[id(param)] for param in params]
        self.shapes = [param.shape for param in params]
        self.offsets = [int(offset) for offset in zero.round_robin_bit16_offsets[index]]
        self.flat: torch.Tensor = zero.single_partition_of_fp32_groups[index]
        """This process's part of the weights, (S,), which the optimizer moves."""
        self._start = dist.get_rank(self.process_group) * self.size
        self.pieces = self._pieces()
        held = torch.tensor([piece.layer for piece in self.pieces], dtype=torch.int64)
        self.layer_norms = LayerNorms(
            self.process_group, len(params), held.to(self.flat.device, non_blocking=True)
        )

    def _pieces(self) -> list[_Piece]:
        pieces = []
        for layer, (offset, shape) in enumerate(zip(self.offsets, self.shapes)):
            begin = max(0, offset - self._start)
            end = min(self.size, offset + shape.numel() - self._start)
            if begin < end:
                pieces.append(_Piece(layer, begin, end))
        return pieces

    def cut(self, part: torch.Tensor) -> list[torch.Tensor]:
        """Views of a part (S,), one for each piece."""
        return [part[piece.begin : piece.end] for piece in self.pieces]

    def gather(self, part: torch.Tensor) -> Tensors:
        """Whole tensors by name, from the processes' parts (S,). A collective."""
        world_size = dist.get_world_size(self.process_group)
        flat = part.new_empty(world_size * self.size)
        dist.all_gather_single(flat, part.detach().contiguous(), group=self.process_group)
        return {
            name: flat[offset : offset + shape.numel()].view(shape)
            for name, offset, shape in zip(self.names, self.offsets, self.shapes)
        }

    def part_of(self, tensors: Tensors) -> torch.Tensor:
        """This process's part of whole tensors by name, (S,); zeros where there are none."""
        part = torch.zeros_like(self.flat)
        for piece, view in zip(self.pieces, self.cut(part)):
            value = tensors.get(self.names[piece.layer])
            if value is not None:
                first = self._start + piece.begin - self.offsets[piece.layer]
                view.copy_(value.reshape(-1)[first : first + len(view)])
        return part


class ZeroLARS(LARS):
    """LARS on ZeRO's flat shards; the trust ratios are those of whole layers."""

    layouts: dict[str, _FlatGroup]
    """By the name of a group; set when ZeRO has laid them out."""

    @torch.no_grad()
    def step(self, closure: Callable[[], float] | None = None) -> None:  # type: ignore[override]
        """One update, of those groups that DeepSpeed shows: it steps group by group."""
        for group in self.param_groups:
            layout = self.layouts[group["group_name"]]
            (flat,) = group["params"]
            adapt = group["group_name"].endswith("matrices")
            cut = layout.cut if adapt else _as_one
            self.update_pieces(
                group,
                cut(flat),
                cut(flat.grad),
                cut(self._momentum_buffer(flat)) if group["momentum"] else None,
                layout.layer_norms if adapt else None,
            )


def _as_one(part: torch.Tensor) -> list[torch.Tensor]:
    return [part]


class ZeroOptimizer(ShardedOptimizer):
    """The ``engine`` that ``deepspeed.initialize`` made of ``inner`` and ``module``."""

    def __init__(self, engine: Any, inner: torch.optim.Optimizer, module: nn.Module) -> None:
        super().__init__(inner)
        self._engine, self._zero = engine, engine.optimizer
        names = {id(param): name for name, param in module.named_parameters()}
        self.layouts = {
            group["group_name"]: _FlatGroup(self._zero, index, names)
            for index, group in enumerate(inner.param_groups)
        }
        if isinstance(inner, ZeroLARS):
            inner.layouts = self.layouts

    def _step(self) -> None:
        self._engine.step()  # then everyone's parts are gathered

    def zero_grad(self, set_to_none: bool = True) -> None:
        """The engine has dropped them in its step."""

    def gradient_norm(self) -> torch.Tensor:
        """That of all processes' parts. A collective."""
        pieces = [p for parts in self._zero.averaged_gradients.values() for p in parts or ()]
        return total_norm(pieces, self._zero.dp_process_group)


class ZeroSharded(Sharding):
    """Networks and optimizer under ZeRO: weights are whole on every process."""

    optimizer: ZeroOptimizer

    def __init__(self, fabric: Fabric, objective: Objective, optim: OptimConfig) -> None:
        self.objective, self._is_rank_zero = objective, fabric.is_global_zero
        inner = build_optimizer(objective, optim, lars=ZeroLARS)
        self.model, _ = fabric.setup(objective, inner)
        self.optimizer = ZeroOptimizer(self.model._forward_module, inner, objective)

    def optimizer_tensors(self) -> Tensors:
        """Gathered group by group, onto the CPU of rank 0."""
        gathered: Tensors = {}
        for layout in self.optimizer.layouts.values():
            for slot, value in self.optimizer.inner.state.get(layout.flat, {}).items():
                of_group = self._of_group(layout, value)
                if self._is_rank_zero:
                    gathered |= {f"{n}::{slot}": t.detach().cpu() for n, t in of_group.items()}
        return gathered

    def _of_group(self, layout: _FlatGroup, value: Any) -> Tensors:
        if isinstance(value, torch.Tensor) and value.shape == layout.flat.shape:
            return layout.gather(value)
        number = value if isinstance(value, torch.Tensor) else torch.tensor(value)
        return dict.fromkeys(layout.names, number)  # AdamW's count of steps

    def restore_optimizer(self, saved: Tensors) -> None:
        """Every process takes its part of each group's."""
        parameters = dict(self.objective.named_parameters())
        slots: dict[str, Tensors] = {}
        for key, value in saved.items():
            name, slot = split_key(key, parameters)
            slots.setdefault(slot, {})[name] = value
        for layout in self.optimizer.layouts.values():
            for slot, tensors in slots.items():
                of_group = {name: tensors[name] for name in layout.names if name in tensors}
                if not of_group:
                    continue
                first = next(iter(of_group.values()))
                whole = first.ndim > 0
                part = layout.part_of(of_group) if whole else first.to(layout.flat.device)
                self.optimizer.inner.state[layout.flat][slot] = part
