"""An encoder with a classifier on top, to be trained as a whole.

SimCLR's fine-tuning (Chen et al. 2020, arXiv 2002.05709, appendix B.5): learning rate 0.05 x batch
/ 256, no weight decay, random crops and flips alone. SimCLR v2 (arXiv 2006.10029) keeps the first
layers of the projection head.
"""

from dataclasses import dataclass
from pathlib import Path

import torch
from torch import nn

from common.errors import ConfigError
from common.files.strict_json import read_json_file
from trainer.config import from_json
from trainer.evaluation.load_encoder import LoadedEncoder, fill
from trainer.evaluation.supervised import Recipe, zero_linear
from trainer.models.heads import HeadConfig, ProjectionHead, build_head
from trainer.state.checkpoint import CheckpointStore

_HEAD = "head."


@dataclass(frozen=True, kw_only=True)
class TuningConfig(Recipe):
    """SimCLR's fine-tuning."""

    name = "fine-tuning"
    base_lr: float = 0.05  # per 256 samples of the batch
    batch_size: int = 1024  # over all processes; all labelled samples where there are fewer
    epochs: int | None = None  # None: 30, or 60 below 5 % of the labels, as SimCLR has it
    momentum: float = 0.9  # Nesterov's
    weight_decay: float = 0.0
    seed: int = 0  # of the order of samples, crops and flips


def load_head(loaded: LoadedEncoder) -> ProjectionHead:
    """The projection head of a run, of the very checkpoint that its encoder was loaded from.

    Raises:
        ConfigError: the encoder is not of a run's folder: exports have no head.
        CheckpointError: the checkpoint does not hold the head that the run's settings describe.
    """
    known = loaded.description
    if known["kind"] != "run":
        raise ConfigError(
            f"--head-layers: {known['source']} has no projection head; give the run's folder"
        )
    run = Path(known["source"])
    settings = read_json_file(run / "config.json").get("head", {})
    head = build_head(
        from_json(HeadConfig, settings, f"{run / 'config.json'}: head"), known["feature_dim"]
    )
    tensors = CheckpointStore(run / "checkpoints").read(known["step"]).tensors("model")
    own = {k.removeprefix(_HEAD): v for k, v in tensors.items() if k.startswith(_HEAD)}
    fill(head, own, f"{run}: the head in its checkpoint")
    return head


def build_classifier(
    encoder: nn.Module, width: int, num_classes: int, head: ProjectionHead | None, depth: int
) -> nn.Sequential:
    """Encoder, ``depth`` layers of the head, and a linear layer of zeros, in the encoder's dtype.

    Args:
        encoder: ``(B, 3, H, W) -> (B, width)``; trained in place.
        width: features of the encoder.
        num_classes: C.
        head: needed where ``depth`` is above 0.
        depth: layers of the head to keep, each with its norm and ReLU.

    Raises:
        ConfigError: the head has not so many layers below its last one.
    """
    parts = [encoder]
    if depth:
        layers = [] if head is None else list(head.layers)
        if not 0 < depth < len(layers):
            raise ConfigError(
                f"--head-layers {depth}: the run's head has {len(layers)} layers, and the last is "
                f"never kept; choose 0 to {max(0, len(layers) - 1)}"
            )
        parts += layers[:depth]
        width = layers[depth].linear.in_features  # type: ignore[union-attr,assignment]
    of_encoder = next(encoder.parameters(), torch.empty(0))
    return nn.Sequential(*parts, zero_linear(width, num_classes)).to(
        of_encoder.device, of_encoder.dtype
    )
