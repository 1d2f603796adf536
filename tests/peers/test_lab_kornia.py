"""CIE Lab beside kornia's, in float64."""

import kornia
import torch

from trainer.objectives.parts.lab import rgb_to_lab


def test_lab_is_kornias() -> None:
    generator = torch.Generator().manual_seed(0)
    images = torch.rand(4, 3, 64, 64, dtype=torch.float64, generator=generator)
    images[0, :, 0] = torch.eye(3, dtype=torch.float64).repeat(1, 22)[:, :64]  # pure primaries
    images[1] *= 0.02  # where the curves are straight
    theirs = kornia.color.rgb_to_lab(images)
    # Both have the constants to six digits; theirs end in products of these.
    torch.testing.assert_close(rgb_to_lab(images), theirs, rtol=1e-4, atol=2e-3)
