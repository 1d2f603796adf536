"""SimCLR's views from decoded crops: time per image, ours beside torchvision and kornia.

    python benchmarks/augment.py --sides 32 224 --samples 256 32 --rounds 7

Every contender turns uint8 crops into normalised float32 images by colour jitter, grayscale, blur,
flip, each image with parameters of its own (kornia draws the order of jitter once a batch). Each
is given its crops as it likes them best, before the clock starts. They take turns within each
round; the table shows medians. On a CPU the clock is processor time, all threads together: what a
core pays, whoever else is on the machine.

lightly and kornia (the `bench` extra) join when they are installed.
"""

import argparse
import importlib.util
import json
import statistics
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from PIL import Image, ImageFilter
from torch import nn
from torchvision.transforms import v2

from data_pipeline.augment import IMAGENET_MEAN, IMAGENET_STD, Augment, simclr_views
from kernels.augment import Implementation

OURS = "widebatch"
Run = Callable[[Any], object]


@dataclass(frozen=True)
class Contender:
    name: str
    prepare: Callable[[torch.Tensor], Any]  # from uint8 (B, 2, H, W, 3), not timed
    run: Run


def ours(name: str, implementation: Implementation) -> Contender:
    augment = Augment(simclr_views(), seed=0, implementation=implementation)

    def run(crops_BVHWC: torch.Tensor) -> object:
        return augment(crops_BVHWC, torch.arange(len(crops_BVHWC)), 0)

    return Contender(name, lambda crops: crops, run)


def planar(crops_BVHWC: torch.Tensor) -> torch.Tensor:
    return crops_BVHWC.flatten(0, 1).permute(0, 3, 1, 2).contiguous()


def torchvision_tensors(side: int) -> Contender:
    """One image at a time on uint8, torchvision's fastest way."""
    view = simclr_views().view1
    width = 2 * view.blur_radius(side) + 1
    jitter = v2.ColorJitter(view.brightness, view.contrast, view.saturation, view.hue)
    pipeline = v2.Compose(
        [
            v2.RandomApply([jitter], view.jitter),
            v2.RandomGrayscale(view.grayscale),
            v2.RandomApply([v2.GaussianBlur(width, view.blur_sigma)], view.blur),
            v2.RandomHorizontalFlip(view.flip),
            v2.ToDtype(torch.float32, scale=True),
            v2.Normalize(IMAGENET_MEAN, IMAGENET_STD),
        ]
    )
    return Contender(
        "torchvision v2, tensors",
        planar,
        lambda images: torch.stack([pipeline(image) for image in images]),
    )


def torchvision_pil(_: int) -> Contender:
    """One PIL image at a time, as the papers' own PyTorch code does."""
    view = simclr_views().view1

    def blur(image: Image.Image) -> Image.Image:
        return image.filter(
            ImageFilter.GaussianBlur(torch.empty(1).uniform_(*view.blur_sigma).item())
        )

    jitter = v2.ColorJitter(view.brightness, view.contrast, view.saturation, view.hue)
    pipeline = v2.Compose(
        [
            v2.RandomApply([jitter], view.jitter),
            v2.RandomGrayscale(view.grayscale),
            v2.RandomApply([blur], view.blur),
            v2.RandomHorizontalFlip(view.flip),
            v2.ToImage(),
            v2.ToDtype(torch.float32, scale=True),
            v2.Normalize(IMAGENET_MEAN, IMAGENET_STD),
        ]
    )
    return Contender(
        "torchvision v2, PIL",
        lambda crops: [Image.fromarray(crop.numpy()) for crop in crops.flatten(0, 1)],
        lambda images: torch.stack([pipeline(image) for image in images]),
    )


def lightly_pil(side: int) -> Contender:
    """lightly's SimCLR transform, one PIL image at a time, without its crop."""
    from lightly.transforms.simclr_transform import SimCLRViewTransform

    view = simclr_views().view1
    whole = SimCLRViewTransform(
        input_size=side,
        cj_prob=view.jitter,
        cj_bright=view.brightness,
        cj_contrast=view.contrast,
        cj_sat=view.saturation,
        cj_hue=view.hue,
        random_gray_scale=view.grayscale,
        gaussian_blur=view.blur,
        sigmas=view.blur_sigma,
    )
    first, *steps = whole.transform.transforms
    assert type(first).__name__ == "RandomResizedCrop"
    return Contender(
        "lightly, PIL",
        lambda crops: [Image.fromarray(crop.numpy()) for crop in crops.flatten(0, 1)],
        lambda images: torch.stack([v2.Compose(steps)(image) for image in images]),
    )


def kornia_batch(side: int) -> Contender:
    from kornia import augmentation as kornia

    view = simclr_views().view1
    width = 2 * view.blur_radius(side) + 1
    pipeline = nn.Sequential(
        kornia.ColorJitter(
            view.brightness, view.contrast, view.saturation, view.hue, p=view.jitter
        ),
        kornia.RandomGrayscale(p=view.grayscale),
        kornia.RandomGaussianBlur((width, width), view.blur_sigma, p=view.blur),
        kornia.RandomHorizontalFlip(p=view.flip),
        kornia.Normalize(torch.tensor(IMAGENET_MEAN), torch.tensor(IMAGENET_STD)),
    )
    return Contender("kornia", planar, lambda images: pipeline(images.float() / 255))


def contenders(side: int, device: torch.device) -> list[Contender]:
    found = [ours(OURS, "auto")]
    if device.type == "cpu":
        found += [ours(f"{OURS}, plain torch", "reference")]
        found += [torchvision_tensors(side), torchvision_pil(side)]
    else:
        found += [torchvision_tensors(side)]
    if importlib.util.find_spec("lightly") and device.type == "cpu":
        found.append(lightly_pil(side))
    if importlib.util.find_spec("kornia"):
        found.append(kornia_batch(side))
    return found


def measure(run: Run, prepared: Any, device: torch.device) -> float:
    """Seconds of one batch: of the processor on a CPU, of the clock on a GPU."""
    if device.type == "cpu":
        start = time.process_time()
        run(prepared)
        return time.process_time() - start
    torch.cuda.synchronize()
    start = time.perf_counter()
    run(prepared)
    torch.cuda.synchronize()
    return time.perf_counter() - start


def compare(side: int, samples: int, rounds: int, device: torch.device) -> dict[str, list[float]]:
    """Seconds per image of each contender, one entry per round."""
    crops = torch.randint(0, 256, (samples, 2, side, side, 3), dtype=torch.uint8).to(device)
    found = contenders(side, device)
    prepared = [contender.prepare(crops) for contender in found]
    seconds: dict[str, list[float]] = {contender.name: [] for contender in found}
    for round_ in range(rounds + 1):  # the first warms up and does not count
        for contender, images in zip(found, prepared):
            taken = measure(contender.run, images, device)
            if round_:
                seconds[contender.name].append(taken / (2 * samples))
    return seconds


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--sides", type=int, nargs="+", default=[32, 224], help="of crops, pixels")
    parser.add_argument("--samples", type=int, nargs="+", default=[256, 32], help="for each side")
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--rounds", type=int, default=7)
    parser.add_argument("--threads", type=int, default=1, help="of the CPU")
    parser.add_argument("--json", type=Path, help="write every measurement there")
    args = parser.parse_args()
    if len(args.sides) != len(args.samples):
        parser.error("--samples wants one number for each of --sides")

    torch.set_num_threads(args.threads)
    torch.manual_seed(0)
    device = torch.device(args.device)
    clock = "processor time" if device.type == "cpu" else torch.cuda.get_device_name()
    print(f"SimCLR's two views, microseconds per image, {args.threads} thread(s), {clock}")
    print(f"{'side':>5} {'samples':>8}  {'':26}{'median':>9}{'min':>9}{'max':>9}{'ratio':>8}")
    records = []
    for side, samples in zip(args.sides, args.samples):
        seconds = compare(side, samples, args.rounds, device)
        base = statistics.median(seconds[OURS])
        for name, taken in seconds.items():
            middle = statistics.median(taken)
            print(
                f"{side:>5} {samples:>8}  {name:26}{middle * 1e6:>9.1f}{min(taken) * 1e6:>9.1f}"
                f"{max(taken) * 1e6:>9.1f}{middle / base:>8.1f}"
            )
            records.append({"side": side, "samples": samples, "name": name, "seconds": taken})
    if args.json:
        settings = {key: str(value) for key, value in vars(args).items() if key != "json"}
        args.json.write_text(json.dumps({"settings": settings, "records": records}, indent=1))


if __name__ == "__main__":
    main()
