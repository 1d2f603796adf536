"""Images through an encoder, their neighbours, and a map of them.

Shape suffixes: N images, R queries, K neighbours, S side in pixels, F features.
"""

import numpy as np
import numpy.typing as npt
import torch

from data_pipeline.augment import Augment, AugmentConfig
from data_pipeline.reading.loader import Batch
from data_pipeline.reading.order import Position
from trainer.evaluation.job import choose_device
from trainer.evaluation.load_encoder import LoadedEncoder
from trainer.features.extraction import extract_features
from trainer.report.options import MissingError
from trainer.report.samples import Images

_BATCH = 128  # images per forward pass
_FEWEST = 10  # points of a map


def features_of(source: LoadedEncoder, images_NSS3: Images, device: str = "auto") -> torch.Tensor:
    """Features (N, F) of images by an encoder, float32 on the CPU, in their order."""
    where = choose_device(device)
    how = source.preprocessing
    plain = Augment(AugmentConfig(normalize=how.normalize, mean=how.mean, std=how.std), seed=0)
    crops_NVSS3 = torch.from_numpy(np.ascontiguousarray(images_NSS3))[:, None]
    ids_N = torch.arange(len(images_NSS3))
    parts = (
        Batch(crops, ids, torch.zeros_like(ids), Position())
        for crops, ids in zip(crops_NVSS3.split(_BATCH), ids_N.split(_BATCH))
    )
    encoder = source.encoder.to(where)
    return extract_features(encoder, parts, plain, where, gather=False).features_NF


def nearest(asked_RF: torch.Tensor, bank_NF: torch.Tensor, k: int) -> torch.Tensor:
    """Indices (R, K) of the bank's rows of highest cosine similarity, the nearest first."""
    asked_RF = torch.nn.functional.normalize(asked_RF, dim=1)
    bank_NF = torch.nn.functional.normalize(bank_NF, dim=1)
    return (asked_RF @ bank_NF.T).topk(min(k, len(bank_NF)), dim=1).indices


def project(features_NF: torch.Tensor) -> tuple[npt.NDArray[np.float64], str]:
    """A two-dimensional map (N, 2) of features, and what made it; deterministic.

    t-SNE on cosine distances; the first two principal components where scikit-learn is missing.

    Raises:
        MissingError: there are too few images.
    """
    unit_NF = torch.nn.functional.normalize(features_NF, dim=1)
    count, width = unit_NF.shape
    if count < _FEWEST:
        raise MissingError(f"{count} images are too few for a map")
    # As van der Maaten recommends: 50 principal components hold what neighbourhoods depend on.
    reduced_NF = _principal_components(unit_NF, min(50, count, width))
    try:
        from sklearn.manifold import TSNE
    except ImportError:
        return reduced_NF[:, :2], "principal components, for scikit-learn is not installed"
    perplexity = min(30.0, (count - 1) / 3)
    tsne = TSNE(
        perplexity=perplexity, init="pca", learning_rate="auto", max_iter=500, random_state=0
    )
    return np.asarray(tsne.fit_transform(reduced_NF), np.float64), "t-SNE of cosine distances"


def _principal_components(x_NF: torch.Tensor, count: int) -> npt.NDArray[np.float64]:
    centred_NF = x_NF.double() - x_NF.double().mean(dim=0)
    u_NK, s_K, _ = torch.linalg.svd(centred_NF, full_matrices=False)
    # The sign of a component is arbitrary: its largest entry is made positive.
    signs_K = u_NK.gather(0, u_NK.abs().argmax(dim=0, keepdim=True)).sign()
    found: npt.NDArray[np.float64] = (u_NK * s_K * signs_K)[:, :count].numpy()
    return found
