"""Views for contrastive learning, made on the device that trains, a whole batch at a time.

Every image gets its own parameters. They are a function of (seed, epoch, sample id, view) and
nothing else, drawn from the counter generator; :mod:`kernels.augment` does the pixels.
The pipeline is SimCLR's (arXiv 2002.05709, appendix A): colour jitter in random order, grayscale,
Gaussian blur, then MoCo v3's solarise (arXiv 2104.02057), flip, and normalisation.

Legend: B samples, V views, R = V * B rows (view-major), H height, W width, C = 3 channels,
P parameters of an image.
"""

from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from functools import lru_cache
from itertools import permutations
from typing import NamedTuple

import torch

from common.bounds import check_bounds
from common.errors import ConfigError
from common.randomness import Stream, uniforms_on_device
from kernels.augment import (
    Column,
    FloatArray,
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
Rgb = tuple[float, float, float]

_JITTERS = (Jitter.BRIGHTNESS, Jitter.CONTRAST, Jitter.SATURATION, Jitter.HUE)
# Lexicographic; a place in this list is part of the format of a run.
_ORDERS = list(permutations(_JITTERS))
_STREAMS = [stream for stream in Stream if Stream.FLIP <= stream <= Stream.SOLARIZE]


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


FLIPS = ViewConfig(jitter=0.0, grayscale=0.0, blur=0.0)
"""A view that is flipped, or not, and otherwise stays as it is."""


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

    def normalisation(self) -> tuple[Rgb, Rgb]:
        """What is subtracted of a view's channels, and what they are divided by then."""
        return (self.mean, self.std) if self.normalize else ((0.0, 0.0, 0.0), (1.0, 1.0, 1.0))


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


def mocov3_views(blur: bool = True) -> AugmentConfig:
    """MoCo v3 (arXiv 2104.02057), BYOL's asymmetric pair, without blur for CIFAR. Its crops have
    scale (0.2, 1)."""
    view = ViewConfig(brightness=0.4, contrast=0.4, saturation=0.2, hue=0.1)
    return AugmentConfig(
        view1=replace(view, blur=1.0 if blur else 0.0),
        view2=replace(view, blur=0.1 if blur else 0.0, solarize=0.2),
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

    def __call__(self, crops_BVHWC: torch.Tensor, ids_B: torch.Tensor, epoch: int) -> torch.Tensor:
        """As :meth:`groups`, of the only one: ``(V * B, 3, H, W)``, view by view."""
        (views_VBCHW,) = self.groups([crops_BVHWC], ids_B, epoch)
        return views_VBCHW.flatten(0, 1)

    def groups(
        self, crops: Sequence[torch.Tensor], ids_B: torch.Tensor, epoch: int
    ) -> tuple[torch.Tensor, ...]:
        """Augmented views of all groups, whose views are numbered on.

        Args:
            crops: of each group, uint8 ``(B, V, H, W, 3)`` on the device that trains.
            ids_B: int64 sample ids. Keep them on the host as the loader gives them: on a GPU they
                would have to be waited for.
            epoch: from 0.

        Returns:
            For each group ``(V, B, 3, H, W)`` in ``dtype``, every image channels_last.

        Raises:
            ValueError: shapes or dtypes are not as said.
        """
        device, views, first = crops[0].device, [], 0
        by_triton = choose(device, self.implementation, self.dtype).implementation == "triton"
        drawn_by_B = to_device(ids_B, device) if by_triton else ids_B.cpu()
        for crops_BVHWC, looks in zip(crops, self._looks, strict=True):
            if crops_BVHWC.shape[:2] != (len(ids_B), len(looks)):
                raise ValueError(
                    f"augment: {len(ids_B)} ids and {len(looks)} looks for crops of shape "
                    f"{tuple(crops_BVHWC.shape)}"
                )
            side = min(crops_BVHWC.shape[2:4])
            table_RP = draw_parameters(looks, self.seed, epoch, drawn_by_B, side=side, first=first)
            of_group = self._run(crops_BVHWC, table_RP.float() if by_triton else table_RP.numpy())
            views.append(of_group.unflatten(0, (len(looks), len(ids_B))))
            first += len(looks)
        return tuple(views)

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
    looks: tuple[ViewConfig, ...],
    seed: int,
    epoch: int,
    ids_B: torch.Tensor,
    *,
    side: int,
    first: int = 0,
) -> torch.Tensor:
    """Parameters of every view of every sample, for crops of ``side`` pixels.

    Args:
        looks: how each view is altered.
        seed: the run's.
        epoch: from 0.
        ids_B: int64 sample ids, on the device that draws.
        side: of the crops, pixels.
        first: number of the first view.

    Returns:
        float64 ``(V * B, P)`` on that device, view-major: a table as :mod:`kernels.augment.table`
        defines it.
    """
    given = _laws(looks, ids_B.device)
    views_V = torch.arange(first, first + len(looks), device=ids_B.device)
    uniform_VBS = uniforms_on_device(seed, epoch, ids_B, views_V, given.streams)
    drawn_VBS = given.low + given.span * uniform_VBS
    drawn = dict(zip(_STREAMS, drawn_VBS.unbind(-1)))
    happens = dict(zip(_STREAMS, (uniform_VBS < given.chance).unbind(-1)))

    radii = [look.blur_radius(side) for look in looks]
    size_p = Column.BLUR + max(radii) + 1
    table_VBP = drawn_VBS.new_zeros((len(looks), len(ids_B), size_p))
    table_VBP[..., Column.FLIP] = happens[Stream.FLIP]
    order_VB4 = given.orders[(drawn[Stream.JITTER_ORDER] * len(given.orders)).long()]
    busy_VB4 = torch.take_along_dim(given.busy, order_VB4 - Jitter.BRIGHTNESS, 2)
    busy_VB4 = busy_VB4 & happens[Stream.JITTER][..., None]
    table_VBP[..., Column.JITTER : Column.JITTER + len(_JITTERS)] = order_VB4 * busy_VB4
    for jitter in _JITTERS:
        table_VBP[..., Column[jitter.name]] = drawn[Stream[jitter.name]]
    table_VBP[..., Column.GRAYSCALE] = happens[Stream.GRAYSCALE]
    table_VBP[..., Column.SOLARIZE] = torch.where(
        happens[Stream.SOLARIZE], given.threshold, torch.inf
    )
    table_VBP[..., Column.BLUR] = 1.0
    for view, radius in enumerate(radii):  # another view's kernel may be wider
        half_BK = table_VBP[view, :, Column.BLUR : Column.BLUR + radius + 1]
        drawn_BK = gaussian_half_kernels(drawn[Stream.BLUR_SIGMA][view], radius)
        half_BK.copy_(torch.where(happens[Stream.BLUR][view, :, None], drawn_BK, half_BK))
    return table_VBP.flatten(0, 1)


class _Laws(NamedTuple):
    """What is drawn for V views from S streams, on one device."""

    streams: torch.Tensor  # (S,)
    low: torch.Tensor  # (V, 1, S): a number is uniform from here
    span: torch.Tensor  # (V, 1, S): over so much
    chance: torch.Tensor  # (V, 1, S): and something happens with this probability
    busy: torch.Tensor  # (V, 1, 4): whether each operation of the jitter does anything
    threshold: torch.Tensor  # (V, 1): of solarisation
    orders: torch.Tensor  # (24, 4)


@lru_cache(maxsize=64)  # its upload to a GPU waits, once in a run
def _laws(looks: tuple[ViewConfig, ...], device: torch.device) -> _Laws:
    laws = [[[_law(look, stream) for stream in _STREAMS]] for look in looks]
    low, span, chance = torch.tensor(laws, dtype=torch.float64, device=device).unbind(-1)
    spreads_V14 = [[[getattr(look, code.name.lower()) for code in _JITTERS]] for look in looks]
    thresholds_V1 = [[look.solarize_threshold] for look in looks]
    return _Laws(
        torch.tensor(_STREAMS, device=device),
        low,
        span,
        chance,
        torch.tensor(spreads_V14, dtype=torch.float64, device=device) != 0,
        torch.tensor(thresholds_V1, dtype=torch.float64, device=device),
        torch.tensor(_ORDERS, device=device),
    )


def _law(look: ViewConfig, stream: Stream) -> tuple[float, float, float]:
    """Least number of a stream, how far they go, and the probability that something happens."""
    if stream == Stream.JITTER_ORDER:
        return 0.0, 1.0, 0.0
    if stream == Stream.HUE:
        return -look.hue, 2.0 * look.hue, 0.0
    if stream == Stream.BLUR_SIGMA:
        low, high = look.blur_sigma
        return low, high - low, 0.0
    setting = getattr(look, stream.name.lower())
    if stream in (Stream.BRIGHTNESS, Stream.CONTRAST, Stream.SATURATION):
        low = max(0.0, 1.0 - setting)
        return low, 1.0 + setting - low, 0.0
    return 0.0, 1.0, setting
