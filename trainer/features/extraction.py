"""Features of a frozen encoder for every sample of a file, in the file's order, on every rank.

Shape suffixes: N samples of the file, L samples of this rank, B samples of a batch, V views (1),
F features.
"""

import contextlib
from collections.abc import Iterable, Iterator
from typing import NamedTuple

import torch
import torch.distributed as dist
from torch import nn
from tqdm import tqdm

from common.collectives import gather_rows
from common.errors import DataError, NumericalError
from data_pipeline.augment import Augment
from data_pipeline.reading.batch import Batch

_WHOLE_IMAGE_UP_TO = 64  # pixels
_GATHER_BYTES = 64 << 20  # per rank and exchange: bounds what the device holds beside the encoder


class Features(NamedTuple):
    """What an encoder makes of a file: rows in the order of the sample ids."""

    features_NF: torch.Tensor  # noqa: N815
    """float32 on the CPU: the pooled encoder output, before any head."""
    labels_N: torch.Tensor  # noqa: N815
    """int64; -1 where the file has no labels."""
    ids_N: torch.Tensor  # noqa: N815
    """int64, ascending."""

    def take(self, indices: torch.Tensor) -> "Features":
        """The rows at ``indices``."""
        return Features(self.features_NF[indices], self.labels_N[indices], self.ids_N[indices])

    def blocks(
        self, rows: int, device: torch.device
    ) -> Iterator[tuple[torch.Tensor, torch.Tensor]]:
        """Features and labels of at most ``rows`` samples at a time, on ``device``."""
        for features_BF, labels_B in zip(self.features_NF.split(rows), self.labels_N.split(rows)):
            yield features_BF.to(device), labels_B.to(device)


def default_resize(size: int) -> int:
    """Shorter side to resize to for a centre crop of ``size``: the usual 256 for 224.

    Up to 64 pixels the crop is the whole image: small images (CIFAR, digits) are made to fit, and
    cutting off an eighth would lose what they show.
    """
    return size if size <= _WHOLE_IMAGE_UP_TO else round(size * 256 / 224)


@torch.no_grad()
def extract_features(
    encoder: nn.Module,
    loader: Iterable[Batch],
    augment: Augment,
    device: torch.device | str,
    autocast_dtype: torch.dtype | None = None,
    *,
    progress: str | None = None,
) -> Features:
    """Run ``encoder`` over every batch of ``loader`` and put the rows in the order of their ids.

    The encoder runs in evaluation mode; afterwards every module is in the mode it was in before. In
    a process group a collective: every rank returns every row, which does not depend on the number
    of ranks, up to the rounding of batches of another size.

    Args:
        encoder: (B, 3, H, W) -> (B, F) on ``device``.
        loader: batches of one view: this rank's shard of the file.
        augment: its ``plain`` makes images of crops.
        device: where the encoder lies.
        autocast_dtype: 16-bit compute dtype of the encoder; any other, or ``None``: its own.
        progress: text of a progress bar on stderr (shown on a terminal only); ``None`` for none.

    Raises:
        DataError: the loader gave no samples.
        NumericalError: a feature, or the norm of a sample's features, is not finite.
    """
    device = torch.device(device)
    parts: list[Features] = []
    total = len(loader.local_ids) if hasattr(loader, "local_ids") else None
    # disable=None: no bar where stderr is not a terminal.
    bar = tqdm(
        total=total, desc=progress, unit="img", leave=False, disable=None if progress else True
    )
    with _evaluating(encoder), bar:
        for batch in loader:
            images = augment.plain(batch.crops_BVHWC.to(device, non_blocking=True))
            with reduced_precision(device, autocast_dtype):
                features_BF = encoder(images)
            parts.append(
                Features(features_BF.float().cpu(), batch.labels_B.cpu(), batch.ids_B.cpu())
            )
            bar.update(len(batch.ids_B))
    local = _concatenate(parts)
    if dist.is_initialized() and dist.get_world_size() > 1:
        local = _gather(local, device)
    return _checked(_in_order(local))


def reduced_precision(device: torch.device, dtype: torch.dtype | None) -> torch.autocast:
    """Autocast to ``dtype`` where it is a 16-bit float; without effect otherwise."""
    reduced = dtype in (torch.bfloat16, torch.float16)
    return torch.autocast(device.type, dtype=dtype if reduced else None, enabled=reduced)


@contextlib.contextmanager
def _evaluating(module: nn.Module) -> Iterator[None]:
    """``module.eval()`` for a while; not ``train()`` after: parts of it may have been in eval."""
    before = {part: part.training for part in module.modules()}
    module.eval()
    try:
        yield
    finally:
        for part, training in before.items():
            part.training = training


def _concatenate(parts: list[Features]) -> Features:
    """One table of a rank's batches; a rank whose shard is empty has (0, 0) features."""
    if not parts:
        none = torch.empty(0, dtype=torch.int64)
        return Features(torch.empty(0, 0), none, none)
    return Features(*(torch.cat(column) for column in zip(*parts)))


def _gather(local: Features, device: torch.device) -> Features:
    """All ranks' rows, rank by rank; shards may be uneven or empty."""
    shape = torch.tensor([local.features_NF.shape], dtype=torch.int64, device=device)
    shapes_W2 = gather_rows(shape)
    rows, width = shapes_W2[:, 0].tolist(), int(shapes_W2[:, 1].max())
    features_LF = local.features_NF.reshape(-1, width)  # gives an empty shard its width
    return Features(
        _gather_some_at_a_time(features_LF, rows, device),
        _gather_some_at_a_time(local.labels_N, rows, device),
        _gather_some_at_a_time(local.ids_N, rows, device),
    )


def _gather_some_at_a_time(
    local: torch.Tensor, rows: list[int], device: torch.device
) -> torch.Tensor:
    """Rows of all ranks on the CPU; they cross ``device``, which need not hold them all."""
    row_bytes = local.element_size() * (local.shape[1] if local.ndim > 1 else 1)
    step = max(1, _GATHER_BYTES // max(1, row_bytes))
    parts: list[list[torch.Tensor]] = [[] for _ in rows]
    for first in range(0, max(rows), step):
        counts = [min(step, max(0, total - first)) for total in rows]
        block = gather_rows(local[first : first + step].to(device), counts)
        for part, piece in zip(parts, block.cpu().split(counts)):
            part.append(piece)
    return torch.cat([piece for part in parts for piece in part])


def _in_order(table: Features) -> Features:
    if len(table.ids_N) == 0:
        raise DataError("there are no samples: evaluation needs at least one")
    steps = table.ids_N.diff()
    if bool((steps <= 0).any()):
        table = table.take(table.ids_N.argsort(stable=True))
        steps = table.ids_N.diff()
    if bool((steps == 0).any()):
        twice = int(table.ids_N[1:][steps == 0][0])
        raise ValueError(f"the loader gave sample {twice} twice: shards must not overlap")
    return table


def _checked(table: Features) -> Features:
    # By the norm: one that overflows would make a zero row of finite features, near to nothing.
    finite_N = torch.linalg.vector_norm(table.features_NF, dim=1).isfinite()
    if not bool(finite_N.all()):
        bad = table.ids_N[~finite_N]
        raise NumericalError(
            f"the encoder's features are not finite for {len(bad)} of {len(finite_N)} samples, "
            f"the first being sample {int(bad[0])}: evaluate an earlier checkpoint, or in float32"
        )
    return table
