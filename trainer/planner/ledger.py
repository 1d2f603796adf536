"""What tensors are alive, and what work was done, operation by operation."""

import weakref
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from torch.utils.flop_counter import flop_registry

_WITHOUT_WORK = ("aten.empty", "aten.empty_strided", "aten.empty_like", "aten.detach")


@dataclass(frozen=True)
class Operation:
    """One operation's work on the device."""

    flops: float
    """Of matrix products and convolutions; a multiply-add is 2."""
    bytes: float
    """Read and written, every tensor once."""


class Ledger(TorchDispatchMode):
    """Adds up the storages that operations make, each once, until they are freed.

    Works on fake and on real tensors. Storages belong to the ``part`` that was set when they were
    made; :meth:`hold` adds bytes that no operation makes.
    """

    def __init__(self) -> None:
        super().__init__()
        self.part = "parameters"
        self.live: Counter[str] = Counter()
        self.at_peak: Counter[str] = Counter()
        self.operations: list[Operation] = []
        self._known: dict[int, tuple[Any, int, str]] = {}

    def __torch_dispatch__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: Any = None
    ) -> Any:
        """Run ``func``, then count its work and its new storages."""
        kwargs = kwargs or {}
        out = func(*args, **kwargs)
        self.operations.append(_work(func, args, kwargs, out))
        for leaf in tree_leaves(out):
            if isinstance(leaf, torch.Tensor):
                self.own(leaf)
        return out

    def own(self, tensor: torch.Tensor) -> None:
        """Count a tensor's storage, unless it is counted already."""
        storage = tensor.untyped_storage()
        key = id(storage)
        if key in self._known:
            return
        # Kept while the storage lives: then its Python object, and the id, are the same one.
        reference = weakref.ref(storage, lambda _: self._free(key))
        self._known[key] = (reference, storage.nbytes(), self.part)
        self.hold(self.part, storage.nbytes())

    def move(self, tensor: torch.Tensor, part: str) -> None:
        """Let a counted storage belong to another part."""
        key = id(tensor.untyped_storage())
        if key in self._known:
            reference, size, old = self._known[key]
            self._known[key] = (reference, size, part)
            self.live[old] -= size
            self.live[part] += size

    def hold(self, part: str, size: int) -> None:
        """Count ``size`` bytes from now on; of a negative size, no longer."""
        self.live[part] += size
        if self.live.total() > self.at_peak.total():
            self.at_peak = self.live.copy()

    @contextmanager
    def phase(self, part: str) -> Iterator[None]:
        """Storages made within belong to ``part``."""
        before, self.part = self.part, part
        yield
        self.part = before

    def _free(self, key: int) -> None:
        _, size, part = self._known.pop(key)
        self.live[part] -= size


def _work(func: Any, args: Any, kwargs: Any, out: Any) -> Operation:
    packet = func._overloadpacket
    flops = 0.0
    if packet in flop_registry:
        flops = float(flop_registry[packet](*args, **kwargs, out_val=out))
    if func.is_view or not str(func).startswith("aten."):
        return Operation(flops, 0.0)
    if str(packet) in _WITHOUT_WORK:
        return Operation(0.0, 0.0)
    tensors = [t for t in tree_leaves((args, kwargs, out)) if isinstance(t, torch.Tensor)]
    moved = float(sum(t.numel() * t.itemsize for t in tensors))
    if "batch_norm" in str(packet):  # statistics first, then the values once more
        moved += tensors[0].nbytes if tensors else 0
    return Operation(flops, moved)
