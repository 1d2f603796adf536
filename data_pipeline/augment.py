"""Views for contrastive learning, made on the device that trains, a whole batch at a time.

Every image gets its own parameters. They are a function of (seed, epoch, sample id, view) and
nothing else, drawn from the counter generator on the host or, for the Triton kernel, on the GPU;
:mod:`kernels.augment` does the pixels.
The pipeline is SimCLR's (arXiv 2002.05709, appendix A): colour jitter in random order, grayscale,
Gaussian blur, then MoCo v3's solarise (arXiv 2104.02057), flip, and normalisation.

Legend: B samples, V views, R = V * B rows (view-major), H height, W width, C = 3 channels,
P parameters of an image.
"""

from collections.abc import Sequence
from dataclasses import dataclass, field
from itertools import permutations

import numpy as np
import numpy.typing as npt
import torch

from common.bounds import check_bounds
from common.errors import ConfigError
from common.randomness import Stream, run_key, sample_keys, uniforms
from kernels.augment import (
    Column,
    Implementation,
    Jitter,
    augment,
    choose,
    gaussian_half_kernels,
    identity_table,
    to_device,
)

IMAGENET_MEAN = (0.485, 0.456, 0.406)
IMAGENET_STD = (0.229, 0.224, 0.225)

FloatArray = npt.NDArray[np.float64]

_JITTERS = (Jitter.BRIGHTNESS, Jitter.CONTRAST, Jitter.SATURATION, Jitter.HUE)
# Lexicographic; a place in this list is part of the format of a run.
_ORDERS = np.array(list(permutations(_JITTERS)), dtype=np.float64)


@dataclass(frozen=True, kw_only=True)
class ViewConfig:
    """How one view of a sample is augmented. The defaults are SimCLR's at strength 1."""

    flip: float = 0.5
    """Probability of a horizontal flip."""
    jitter: float = 0.8
    """Probability of colour jitter; its four operations then apply in random order."""
    brightness: float = 0.8
    """Jitter's brightness factor is uniform in [max(0, 1 - x), 1 + x]; 0 turns it off."""
    contrast: float = 0.8
    """Jitter's contrast factor, likewise."""
    saturation: float = 0.8
    """Jitter's saturation factor, likewise."""
    hue: float = 0.2
    """Jitter's hue shift is uniform in [-x, x] turns of the colour wheel, at most 0.5."""
    grayscale: float = 0.2
    """Probability of grayscale."""
    blur: float = 0.5
    """Probability of Gaussian blur."""
    blur_sigma: tuple[float, float] = (0.1, 2.0)
    """Bounds of the blur's standard deviation, in pixels of the crop; uniform between them."""
    blur_kernel: float = 0.1
    """Width of the blur's kernel as a fraction of the crop's side; made an odd pixel count."""
    solarize: float = 0.0
    """Probability of solarisation."""
    solarize_threshold: float = 0.5
    """Solarisation inverts values from here on, in [0, 1]."""

    def __post_init__(self) -> None:
        chances = ("flip", "jitter", "grayscale", "blur", "solarize", "solarize_threshold")
        factors = ("brightness", "contrast", "saturation")
        check_bounds(
            self,
            "--augment.view1|view2.",
            **dict.fromkeys(chances, "[0, 1]"),
            **dict.fromkeys(factors, "[0, inf)"),
            hue="[0, 0.5]",
            blur_sigma="(0, inf)",
            blur_kernel="(0, 1]",
        )
        if self.blur_sigma[0] > self.blur_sigma[1]:
            shown = " ".join(map(str, self.blur_sigma))
            raise ConfigError(f"--augment.view1|view2.blur-sigma {shown}: the least comes first")

    def blur_radius(self, side: int) -> int:
        """Pixels on each side of the kernel's centre, for crops of ``side`` pixels.

        The reference's rule, ``int(side * fraction) // 2``: 11 (a kernel of 23) at 224 pixels, 1 at
        32. Below 20 pixels a kernel of a tenth has no neighbours and blur does nothing.
        """
        # The small term keeps products such as 0.29 * 100 from falling below their integer.
        return int(side * self.blur_kernel + 1e-9) // 2


@dataclass(frozen=True, kw_only=True)
class AugmentConfig:
    """The two views of a sample and what the encoder gets to see of them."""

    view1: ViewConfig = field(default_factory=ViewConfig)
    """The first view."""
    view2: ViewConfig = field(default_factory=ViewConfig)
    """The second view; the same settings again make the views symmetric."""
    normalize: bool = True
    """Subtract the mean and divide by the deviation; SimCLR's own code does not."""
    mean: tuple[float, float, float] = IMAGENET_MEAN
    """Mean of red, green, blue in [0, 1]."""
    std: tuple[float, float, float] = IMAGENET_STD
    """Standard deviation of red, green, blue in [0, 1]."""

    def __post_init__(self) -> None:
        check_bounds(self, "--augment.", mean="[0, 1]", std="(0, inf)")


def simclr_views(strength: float = 1.0, blur: bool = True) -> AugmentConfig:
    """SimCLR (arXiv 2002.05709): strength 1 with blur for ImageNet, 0.5 without for CIFAR."""
    view = ViewConfig(
        brightness=0.8 * strength,
        contrast=0.8 * strength,
        saturation=0.8 * strength,
        hue=0.2 * strength,
        blur=0.5 if blur else 0.0,
    )
    return AugmentConfig(view1=view, view2=view)


def mocov2_views() -> AugmentConfig:
    """MoCo v2 (arXiv 2003.04297). Its crops have scale (0.2, 1)."""
    view = ViewConfig(brightness=0.4, contrast=0.4, saturation=0.4, hue=0.1)
    return AugmentConfig(view1=view, view2=view)


def mocov3_views() -> AugmentConfig:
    """MoCo v3 (arXiv 2104.02057), BYOL's asymmetric pair. Its crops have scale (0.2, 1)."""
    return AugmentConfig(
        view1=ViewConfig(brightness=0.4, contrast=0.4, saturation=0.2, hue=0.1, blur=1.0),
        view2=ViewConfig(
            brightness=0.4, contrast=0.4, saturation=0.2, hue=0.1, blur=0.1, solarize=0.2
        ),
    )


class Augment:
    """Turns uint8 crops into the float views that an encoder takes.

    A view's bytes depend on the sample's pixels and on (seed, epoch, sample id, view), never on the
    batch, the place in it or the number of processes.

    Args:
        config: how views are normalised, and two views where ``looks`` are not given.
        seed: the run's.
        dtype: of the views.
        implementation: see :func:`kernels.augment.augment`.
        looks: for each group of views, how each of them is altered.
    """

    def __init__(
        self,
        config: AugmentConfig,
        seed: int,
        dtype: torch.dtype = torch.float32,
        implementation: Implementation = "auto",
        looks: Sequence[tuple[ViewConfig, ...]] | None = None,
    ) -> None:
        self.config = config
        self._looks = looks or ((config.view1, config.view2),)
        self.seed = seed
        self.dtype = dtype
        self.implementation = implementation
        self._mean = config.mean if config.normalize else (0.0, 0.0, 0.0)
        self._std = config.std if config.normalize else (1.0, 1.0, 1.0)
        self._settings: dict[tuple[torch.device, int, tuple[ViewConfig, ...]], torch.Tensor] = {}

    def __call__(self, crops_BVHWC: torch.Tensor, ids_B: torch.Tensor, epoch: int) -> torch.Tensor:
        """Augmented views.

        Args:
            crops_BVHWC: uint8 ``(B, V, H, W, 3)`` on the device that trains, V 1 or 2.
            ids_B: int64 sample ids. Keep them on the host as the loader gives them: on a GPU they
                would have to be waited for.
            epoch: from 0.

        Returns:
            ``(V * B, 3, H, W)`` in ``dtype``, channels_last, all samples of the first view first.

        Raises:
            ValueError: shapes or dtypes are not as said.
        """
        described, views = self._looks[0], crops_BVHWC.shape[1]
        if not 1 <= views <= len(described):
            raise ValueError(
                f"augment: settings describe {len(described)} views, crops have {views}"
            )
        return self._views(crops_BVHWC, described[:views], 0, ids_B, epoch)

    def groups(
        self, crops: Sequence[torch.Tensor], ids_B: torch.Tensor, epoch: int
    ) -> tuple[torch.Tensor, ...]:
        """Augmented views of all groups, whose views are numbered on.

        Args:
            crops: a tensor for each group, as for a call.
            ids_B: as there.
            epoch: as there.

        Returns:
            For each group ``(V, B, 3, H, W)``, every image channels_last.
        """
        views, first = [], 0
        for crops_BVHWC, looks in zip(crops, self._looks, strict=True):
            of_group = self._views(crops_BVHWC, looks, first, ids_B, epoch)
            views.append(of_group.unflatten(0, (len(looks), -1)))
            first += len(looks)
        return tuple(views)

    def _views(
        self,
        crops_BVHWC: torch.Tensor,
        looks: tuple[ViewConfig, ...],
        first: int,
        ids_B: torch.Tensor,
        epoch: int,
    ) -> torch.Tensor:
        samples, views, *sides, _ = crops_BVHWC.shape
        if ids_B.shape != (samples,):
            raise ValueError(f"{samples} crops want {samples} ids, got {tuple(ids_B.shape)}")
        if views != len(looks):
            raise ValueError(f"crops of {views} views want as many looks, got {len(looks)}")
        side, device = min(sides), crops_BVHWC.device
        table_RP: FloatArray | torch.Tensor
        if choose(device, self.implementation, self.dtype).implementation == "triton":
            table_RP = self._draw_on(device, looks, first, ids_B, epoch, side)
        else:
            table_RP = draw_parameters(
                looks, self.seed, epoch, ids_B.cpu().numpy(), side=side, first=first
            )
        return self._run(crops_BVHWC, table_RP)

    def _draw_on(
        self,
        device: torch.device,
        looks: tuple[ViewConfig, ...],
        first: int,
        ids_B: torch.Tensor,
        epoch: int,
        side: int,
    ) -> torch.Tensor:
        """:func:`draw_parameters`, drawn where it is used; only the ids are copied there."""
        from kernels.augment.triton_draw import draw_table

        known = (device, side, looks)
        if known not in self._settings:  # its upload waits, once in a run
            self._settings[known] = torch.tensor(
                [_distributions(look, side) for look in looks], dtype=torch.float64, device=device
            )
        return draw_table(
            int(run_key(self.seed, epoch)),
            to_device(ids_B, device),
            self._settings[known],
            _widest_blur(looks, side),
            first_view=first,
        )

    def plain(self, crops_BVHWC: torch.Tensor) -> torch.Tensor:
        """The crops as they are, scaled to [0, 1] and normalised: for evaluation. As a call."""
        return self._run(crops_BVHWC, identity_table(crops_BVHWC.shape[0] * crops_BVHWC.shape[1]))

    def _run(self, crops_BVHWC: torch.Tensor, table_RP: FloatArray | torch.Tensor) -> torch.Tensor:
        return augment(
            crops_BVHWC,
            table_RP,
            mean=self._mean,
            std=self._std,
            dtype=self.dtype,
            implementation=self.implementation,
        )


def draw_parameters(
    looks: Sequence[ViewConfig],
    seed: int,
    epoch: int,
    ids_B: npt.NDArray[np.int64],
    *,
    side: int,
    first: int = 0,
) -> FloatArray:
    """Parameters of every view of every sample, for crops of ``side`` pixels.

    Args:
        looks: how each view is altered.
        seed: the run's.
        epoch: from 0.
        ids_B: sample ids.
        side: of the crops, pixels.
        first: number of the first view.

    Returns:
        float64 ``(V * B, P)``, view-major: a table as :mod:`kernels.augment.table` defines it.
    """
    radius = _widest_blur(looks, side)
    tables = [
        _draw_view(look, _Draw(seed, epoch, ids_B, view), side, radius)
        for view, look in enumerate(looks, first)
    ]
    return np.concatenate(tables)


def _widest_blur(looks: Sequence[ViewConfig], side: int) -> int:
    """Of all views, pixels: the tables have room for it."""
    return max(look.blur_radius(side) for look in looks)


def _distributions(view: ViewConfig, side: int) -> list[float]:
    """In the order of :class:`kernels.augment.triton_draw.Setting`, which only GPUs can import."""
    jitters = view.jitter, view.brightness, view.contrast, view.saturation, view.hue
    blur = view.blur, *view.blur_sigma, view.blur_radius(side)
    return [view.flip, *jitters, view.grayscale, *blur, view.solarize, view.solarize_threshold]


class _Draw:
    """The draws of one view of a batch, one float64 per sample."""

    def __init__(self, seed: int, epoch: int, ids_B: npt.NDArray[np.int64], view: int) -> None:
        self.seed, self.epoch, self.ids_B, self.view = seed, epoch, ids_B, view

    def uniform(self, stream: Stream, low: float = 0.0, high: float = 1.0) -> FloatArray:
        keys = sample_keys(self.seed, self.epoch, self.ids_B, self.view, stream)
        return low + (high - low) * uniforms(keys)

    def factor(self, stream: Stream, spread: float) -> FloatArray:
        return self.uniform(stream, max(0.0, 1.0 - spread), 1.0 + spread)

    def chance(self, stream: Stream, probability: float) -> npt.NDArray[np.bool_]:
        return self.uniform(stream) < probability


def _draw_view(view: ViewConfig, draw: _Draw, side: int, radius: int) -> FloatArray:
    table_BP = identity_table(draw.ids_B.size, radius)
    table_BP[:, Column.FLIP] = draw.chance(Stream.FLIP, view.flip)

    jittered_B = draw.chance(Stream.JITTER, view.jitter)
    order_B4 = _ORDERS[(draw.uniform(Stream.JITTER_ORDER) * len(_ORDERS)).astype(np.int64)]
    spreads = (view.brightness, view.contrast, view.saturation, view.hue)
    idle = [code for code, spread in zip(_JITTERS, spreads) if spread == 0]
    order_B4[np.isin(order_B4, idle) | ~jittered_B[:, None]] = Jitter.NONE
    table_BP[:, Column.JITTER : Column.JITTER + len(_JITTERS)] = order_B4
    table_BP[:, Column.BRIGHTNESS] = draw.factor(Stream.BRIGHTNESS, view.brightness)
    table_BP[:, Column.CONTRAST] = draw.factor(Stream.CONTRAST, view.contrast)
    table_BP[:, Column.SATURATION] = draw.factor(Stream.SATURATION, view.saturation)
    table_BP[:, Column.HUE] = draw.uniform(Stream.HUE, -view.hue, view.hue)

    table_BP[:, Column.GRAYSCALE] = draw.chance(Stream.GRAYSCALE, view.grayscale)
    blurred_B = draw.chance(Stream.BLUR, view.blur)
    own_radius = view.blur_radius(side)  # the other view's kernel may be wider
    table_BP[blurred_B, Column.BLUR : Column.BLUR + own_radius + 1] = gaussian_half_kernels(
        draw.uniform(Stream.BLUR_SIGMA, *view.blur_sigma)[blurred_B], own_radius
    )
    solarized_B = draw.chance(Stream.SOLARIZE, view.solarize)
    table_BP[solarized_B, Column.SOLARIZE] = view.solarize_threshold
    return table_BP
