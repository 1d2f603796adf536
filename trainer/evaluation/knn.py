"""Nearest neighbours as a classifier: ``widebatch evaluate knn``."""

from dataclasses import asdict, dataclass
from typing import Any

from common.bounds import check_bounds
from common.errors import ConfigError
from trainer.evaluation.labelled import EvaluateConfig, LabelledJob
from trainer.features.knn import MAX_K, knn_classify_each, remark_on_k
from trainer.features.labels import Accuracy


@dataclass(frozen=True, kw_only=True)
class KnnConfig(EvaluateConfig):
    """Weighted k nearest neighbours by cosine similarity.

    Each of the k nearest training images votes for its class with weight exp(similarity /
    temperature). Exact, deterministic. Of several k, found in one pass, the first is the result and
    all are in the JSON as by_k.
    """

    k: tuple[int, ...] = (200,)
    """Neighbours that vote; at most the training samples."""
    temperature: float = 0.07
    """Of the votes."""

    def __post_init__(self) -> None:
        """Refuse what contradicts itself."""
        super().__post_init__()
        check_bounds(self, "--", k=f"[1, {MAX_K}]", temperature="(0, inf)")
        if not self.k:
            raise ConfigError("--k: name at least one number of neighbours")


def knn(config: KnnConfig) -> dict[str, Any] | None:
    """Classify the test file. A collective where several processes were started.

    Returns:
        On rank 0 :meth:`LabelledJob.report` with ``by_k``, ``None`` on the others.

    Raises:
        ConfigError: settings contradict each other or the data.
        DataError, CheckpointError: a file is missing, damaged or not labelled.
        NumericalError: the encoder's features are not finite.
    """
    job = LabelledJob(config, config.layer)
    few_N = config.few(job.labels.train_N)
    with job:
        test = job.test_features()
        train = job.features(job.train).take(few_N)
    if job.rank:
        return None
    results = knn_classify_each(train, test, config.k, config.temperature, device=job.device)
    first, count = results[0], len(few_N)
    notes = [note for k in config.k for note in remark_on_k(k, count, job.num_classes, "--k")]
    return job.report(
        "knn",
        "weighted-knn",
        Accuracy(first.top1, first.top5),
        count,
        settings={
            "k": first.k,
            "requested_k": first.requested_k,
            "temperature": config.temperature,
            "similarity": "cosine",
            **config.budget(),
        },
        measured=job.measured(k=[r.k for r in results], temperature=config.temperature),
        notes=notes,
        by_k=[asdict(result) for result in results],
    )
