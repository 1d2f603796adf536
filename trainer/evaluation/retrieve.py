"""Show me more like these: ``widebatch evaluate retrieve``.

Shape suffixes: M queries.
"""

import contextlib
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import torch

from common.bounds import check_bounds
from common.errors import ConfigError, DataError
from data_pipeline.reading.open_data import OpenData
from trainer.evaluation.job import Job
from trainer.evaluation.open_images import open_images
from trainer.evaluation.pictures import Album, Cell, PictureConfig, save_rows
from trainer.evaluation.ranking import rank_all
from trainer.features.extraction import Features
from trainer.features.labelled_files import compare_labels
from trainer.features.neighbours import nearest_others, nearest_rows

_LISTED = 10_000  # queries whose neighbours the JSON holds


@dataclass(frozen=True, kw_only=True)
class RetrieveConfig(PictureConfig):
    """Show me more like these: the nearest images of each query by cosine similarity.

    Told as a list (--json) and a picture. Queries are .beton files, a folder of images (with one
    sub-folder per class, if you like), image files, or samples of the searched file itself, which
    then do not find themselves. With labels on both sides also mean average precision, and recall
    and precision among the k nearest, over all queries.
    """

    query: tuple[Path, ...] = ()
    """.beton files, one folder, or image files; none: samples of the searched set itself."""
    indices: tuple[int, ...] = ()
    """Samples of the query file that ask; none: all of them."""
    k: int = 10
    """Neighbours to show of each."""
    recall_at: tuple[int, ...] = (1, 5, 10)
    """Neighbours among which recall and precision are counted."""

    def __post_init__(self) -> None:
        """Refuse what contradicts itself."""
        super().__post_init__()
        check_bounds(self, "--", k="[1, inf)", recall_at="[1, inf)")


@dataclass(frozen=True)
class Queries:
    """A packed set of queries, there as long as the block of :func:`_open_queries`."""

    data: OpenData
    described: str
    """Where they come from."""
    labels_M: torch.Tensor  # noqa: N815
    """int64, in the numbers of the searched file's classes; -1: none."""
    remarks: tuple[str, ...]
    """What a reader of figures by labels ought to know."""
    names: list[str] | None
    """Their files, where they are not those that were packed."""
    notes: list[str]
    """What became of files that are no queries."""


def retrieve(config: RetrieveConfig) -> dict[str, Any] | None:
    """Search. A collective where several processes were started.

    Returns:
        JSON values on rank 0, ``None`` on the others: ``queries`` (the first 10,000), each with
        ``sample``, ``label``, ``file`` where known, and its ``neighbours`` (``sample``,
        ``similarity``, ``label``, ``file``, the nearest first); ``mean_average_precision``,
        ``recall_at`` and ``precision_at`` (fractions, over ``n_judged`` queries) where labels
        allow, else ``None``.

    Raises: as :func:`trainer.evaluation.knn.knn`; ConfigError: an index is not in the file.
    """
    job = Job(config)
    searched = OpenData(config.train)
    with job, _open_queries(config.query, searched) as queries:
        indices = _indices(config.indices, queries)
        bank = job.features(searched)
        among_M = queries.data.places_in(searched)
        own = among_M is not None  # then their features are the bank's
        asked = (
            job.features(queries.data) if among_M is None else bank.take(torch.from_numpy(among_M))
        )
        job.leave()  # a search takes seconds where features took minutes
        if job.rank:
            return None
        numbers = torch.arange(len(asked.ids_N))
        asked = asked._replace(labels_N=queries.labels_M, ids_N=numbers).take(indices)
        itself_M = None if among_M is None else torch.from_numpy(among_M)[indices]
        if itself_M is not None:
            nearest = nearest_others(bank.features_NF, itself_M, config.k, device=job.device)
        else:
            nearest = nearest_rows(bank.features_NF, asked.features_NF, config.k, device=job.device)
        answers = [list(zip(i, s)) for s, i in zip(*(found.tolist() for found in nearest))]
        album, of_asked = (Album(data, job.preprocessing) for data in (searched, queries.data))
        if queries.names is not None:
            of_asked.names = queries.names
        pictured = []
        if config.picture is not None:
            some, classes = answers[: config.pictured], searched.info.class_names
            rows = _rows(asked, bank, some, of_asked, album, classes)
            save_rows(rows, config.picture, first_apart=True)
            if len(some) < len(answers):
                pictured = [f"{len(some)} of {len(answers)} queries are in the picture: --pictured"]
        facts = job.facts(train=searched.info, query=queries.data.info)
        asking = config.query or searched.info.paths  # which may have been packed on the way
        paths = [str(path.absolute()) for path in asking]
        facts["data"]["query"] |= {"path": queries.described, "paths": paths}
        report = _report(config, job, bank, asked, itself_M, answers)
        for query in report["queries"]:
            query["file"] = of_asked.names and of_asked.names[query["sample"]]
            for found in query["neighbours"]:
                found["file"] = album.names and album.names[found["sample"]]
        remarks = [] if own else queries.remarks
        report["notes"] += [*queries.notes, *remarks, *pictured, *album.notes]
        return {**report, **facts}


@contextlib.contextmanager
def _open_queries(given: Sequence[Path], searched: OpenData) -> Iterator[Queries]:
    """Pack what is not packed; without ``given`` the queries are what is searched.

    Raises:
        ConfigError: ``given`` mixes kinds, or names what is not there or no image.
        DataError: no image can be used.
    """
    with contextlib.ExitStack() as stack:
        data, names, notes = searched, None, list[str]()
        if given and given != searched.info.paths:
            opened = stack.enter_context(open_images(given, "--query"))
            for path, reason in opened.left_out:
                raise DataError(f"--query {path}: {reason}; mend it or leave it out")
            data, names = opened.data, opened.names
            notes = [
                f"{n} files of --query passed over: {why}" for why, n in opened.passed_over.items()
            ]
        given = given or searched.info.paths
        labels = compare_labels(searched, data)
        labels_M, remarks = labels.test_M, labels.classes.remarks
        folder = given[0].resolve().name if given[0].is_dir() else ""
        if folder in searched.info.class_names and not data.info.class_names:
            labels_M = torch.full_like(labels_M, searched.info.class_names.index(folder))
            remarks = (f"the queries are judged as {folder}: their folder is called so",)
        some = [str(each.absolute()) for each in given[:3]]
        described = ", ".join(some + ["..."] * (len(given) > 3))
        yield Queries(data, described, labels_M, remarks, names, notes)


def _indices(chosen: Sequence[int], queries: Queries) -> torch.Tensor:
    count = queries.data.info.num_samples
    for index in chosen:
        if not 0 <= index < count:
            raise ConfigError(
                f"--indices {index}: {queries.described} has samples 0 to {count - 1}"
            )
    return torch.tensor(chosen) if chosen else torch.arange(count)


def _report(
    config: RetrieveConfig,
    job: Job,
    bank: Features,
    asked: Features,
    itself_M: torch.Tensor | None,
    answers: list[list[tuple[int, float]]],
) -> dict[str, Any]:
    ranking = rank_all(bank, asked, config.recall_at, itself_M=itself_M, device=job.device)
    labels = bank.labels_N.tolist()
    queries = [
        {
            "sample": sample,
            "label": label,
            "neighbours": [
                {"sample": i, "similarity": similarity, "label": labels[i]}
                for i, similarity in found
            ],
        }
        for sample, label, found in zip(asked.ids_N.tolist(), asked.labels_N.tolist(), answers)
    ]
    others = len(bank.ids_N) - (itself_M is not None)
    notes = [
        f"{option} {k} is more than the {others} images that can be found: {what}"
        for option, ks, what in (
            ("--k", (config.k,), "all of them are listed"),
            ("--recall-at", config.recall_at, "left out"),
        )
        for k in ks
        if k > others
    ]
    if len(queries) > _LISTED:
        notes.append(f"the neighbours of the first {_LISTED} of {len(queries)} queries are listed")
    if ranking is None:
        notes.append(
            "not judged: no query is of a class that is there to be found; their folder is to be "
            "called as a class, or to have folders that are"
        )
    elif ranking.left_out:
        notes.append(f"{ranking.left_out} queries have nothing to be found: left out of the means")
    measures = {} if ranking is None else asdict(ranking)
    return {
        "method": "retrieve",
        "protocol": "cosine-retrieval",
        **{
            name: measures.get(name)
            for name in ("mean_average_precision", "recall_at", "precision_at")
        },
        "n_judged": measures.get("queries", 0),
        "n_train": len(bank.ids_N),
        "n_query": len(queries),
        "settings": {"k": config.k, "recall_at": list(config.recall_at), "similarity": "cosine"},
        "measured": job.measured(
            k=min(config.k, others),
            order="cosine similarity; of equal ones the first sample first",
            excluded="the query itself" if itself_M is not None else "nothing",
            recall="share of queries with an image of their class among the k nearest",
        ),
        "queries": queries[:_LISTED],
        "notes": notes,
    }


def _rows(
    asked: Features,
    bank: Features,
    answers: list[list[tuple[int, float]]],
    of_asked: Album,
    of_bank: Album,
    classes: tuple[str, ...],
) -> list[list[Cell]]:
    """A row for each answer: the image that asks, then those found, by their files and classes."""
    rows = []
    for query, label, found in zip(asked.ids_N.tolist(), asked.labels_N.tolist(), answers):
        labels = [int(bank.labels_N[i]) for i, _ in found]
        texts = [f"{s:.3f} {_class(theirs, classes)}" for theirs, (_, s) in zip(labels, found)]
        row = of_asked.cells([query], [_class(label, classes)])
        for cell, theirs in zip(of_bank.cells([i for i, _ in found], texts), labels):
            known = label >= 0 and theirs >= 0
            row.append(replace(cell, agrees=theirs == label if known else None))
        rows.append(row)
    return rows


def _class(label: int, classes: tuple[str, ...]) -> str:
    return classes[label] if 0 <= label < len(classes) else ""
