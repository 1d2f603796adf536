"""``widebatch evaluate retrieve|cluster|diagnose|duplicates``: what an encoder sees in a data set.

None of them needs labels; the first two compare with them where they are there.
"""

import argparse
from pathlib import Path
from typing import Any

from launch.evaluate_options import (
    Report,
    Rows,
    add_method,
    add_picture,
    head_rows,
    job_settings,
    shown,
)

_RETRIEVE = """\
Show me more like these: the nearest images of each query by cosine similarity, as a list (--json)
and a picture. Queries are a .beton file, a folder of images (with one sub-folder per class, if you
like), image files, or samples of the searched file itself, which then do not find themselves.
With labels on both sides also mean average precision, and recall and precision among the k
nearest, over all queries.
"""
_CLUSTER = """\
k-means on features scaled to length 1, started by k-means++, the best of --restarts; with labels
normalised mutual information (NMI), adjusted Rand index (ARI) and purity.
"""
_DIAGNOSE = """\
What features tell of themselves, without labels: alignment of two augmented views and uniformity
(Wang & Isola 2020), effective rank (RankMe) and feature standard deviation, which both fall when a
network collapses. They order encoders of one architecture and data set, and say little elsewhere.
"""
_DUPLICATES = """\
Finds, by features, images that are in a data set twice, and pairs that a contrastive loss wrongly
pushes apart (false negatives: each among the other's nearest, with neighbours in common), as lists
(--json) and a picture. The JSON says how far the pixels of each pair differ.
"""


def add_retrieve(methods: Any) -> None:
    """``evaluate retrieve``."""
    parser = add_method(
        methods,
        "retrieve",
        "more images like these",
        _RETRIEVE,
        train="images that are searched",
        evaluate=_retrieve,
        table=_retrieve_table,
    )
    add = parser.add_argument
    add(
        "--query",
        type=Path,
        nargs="+",
        default=[],
        metavar="PATH",
        help="a .beton file, a folder, or image files (default the searched file)",
    )
    add(
        "--indices",
        type=int,
        nargs="+",
        default=[],
        metavar="N",
        help="samples of the query file that ask (default all)",
    )
    add("--k", type=int, default=10, help="neighbours of each query (default 10)")
    add(
        "--recall-at",
        type=int,
        nargs="+",
        default=[1, 5, 10],
        metavar="K",
        help="for recall and precision (default 1 5 10)",
    )
    add_picture(parser, "the first queries and their neighbours")


def add_cluster(methods: Any) -> None:
    """``evaluate cluster``."""
    parser = add_method(
        methods,
        "cluster",
        "k-means, NMI and ARI",
        _CLUSTER,
        train="images that are grouped",
        evaluate=_cluster,
        table=_cluster_table,
    )
    add = parser.add_argument
    add("--k", type=int, help="clusters (default as many as there are classes)")
    add("--restarts", type=int, default=10, help="starts, of which the best is kept (default 10)")
    add_picture(parser, "the largest clusters by their most central images")


def add_diagnose(methods: Any) -> None:
    """``evaluate diagnose``."""
    parser = add_method(
        methods,
        "diagnose",
        "collapse, spread: no labels needed",
        _DIAGNOSE,
        train="images that are looked at",
        evaluate=_diagnose,
        table=_diagnose_table,
    )
    add = parser.add_argument
    add(
        "--pairs-of",
        type=int,
        default=10_000,
        metavar="N",
        help="images of which all pairs are compared (default 10000)",
    )
    add(
        "--views-of",
        type=int,
        default=2048,
        metavar="N",
        help="images of which two views are compared (default 2048)",
    )


def add_duplicates(methods: Any) -> None:
    """``evaluate duplicates``."""
    parser = add_method(
        methods,
        "duplicates",
        "duplicates and false negatives",
        _DUPLICATES,
        train="images that are looked through",
        evaluate=_duplicates,
        table=_duplicates_table,
    )
    add = parser.add_argument
    add(
        "--threshold",
        type=float,
        default=0.98,
        help="cosine similarity of near-identical images (default 0.98)",
    )
    add("--k", type=int, default=10, help="neighbours of each image (default 10)")
    add(
        "--least-shared",
        type=float,
        default=0.5,
        metavar="SHARE",
        help="Jaccard index of the neighbourhoods of a false negative (default 0.5)",
    )
    add("--limit", type=int, default=1000, help="pairs of each kind to list (default 1000)")
    add_picture(parser, "the most alike pairs of both kinds")


def _retrieve(args: argparse.Namespace) -> Report | None:
    from trainer.evaluation.retrieve import RetrieveConfig, retrieve

    given = job_settings(args, "train", "k", "picture", "pictured")
    for name in ("query", "indices", "recall_at"):
        given[name] = tuple(getattr(args, name))
    return retrieve(RetrieveConfig(**given))


def _cluster(args: argparse.Namespace) -> Report | None:
    from trainer.evaluation.cluster import ClusterConfig, cluster

    return cluster(
        ClusterConfig(**job_settings(args, "train", "k", "restarts", "picture", "pictured"))
    )


def _diagnose(args: argparse.Namespace) -> Report | None:
    from trainer.evaluation.diagnose import DiagnoseConfig, diagnose

    return diagnose(DiagnoseConfig(**job_settings(args, "train", "pairs_of", "views_of")))


def _duplicates(args: argparse.Namespace) -> Report | None:
    from trainer.evaluation.duplicates import DuplicatesConfig, duplicates

    names = ("train", "threshold", "k", "least_shared", "limit", "picture", "pictured")
    return duplicates(DuplicatesConfig(**job_settings(args, *names)))


def _searched(report: Report) -> Rows:
    path = report["data"]["train"]["path"]
    return [*head_rows(report), ("images", f"{report['n_train']:,} of {shown(path)}")]


def _retrieve_table(report: Report) -> Rows:
    asked = report["data"]["query"]["path"]
    rows = [*_searched(report), ("queries", f"{report['n_query']:,} of {shown(asked)}")]
    if report["mean_average_precision"] is not None:
        rows.append(("mAP", f"{100 * report['mean_average_precision']:.2f} %"))
        rows += [
            (f"recall@{k}", f"{100 * value:.2f} %") for k, value in report["recall_at"].items()
        ]
    for query in report["queries"][:5]:
        rows.append((f"#{query['sample']}", query["file"] or ""))
        rows += [
            ("", f"{each['similarity']:.3f} {_called(each['sample'], each['file'])}")
            for each in query["neighbours"][:5]
        ]
    return rows


def _called(sample: int, file: str | None) -> str:
    return f"#{sample} {file or ''}".rstrip()


def _cluster_table(report: Report) -> Rows:
    sizes = [size for size in report["sizes"] if size]  # fewer than k where few images differ
    rows = [
        *_searched(report),
        ("clusters", f"{len(sizes)}, of {min(sizes):,} to {max(sizes):,} images"),
    ]
    if report["nmi"] is not None:
        rows += [(name.upper(), f"{report[name]:.4f}") for name in ("nmi", "ari")]
        rows.append(("purity", f"{100 * report['purity']:.2f} %"))
    return rows


def _diagnose_table(report: Report) -> Rows:
    positive, negative = report["positive_similarity"], report["negative_similarity"]
    return [
        *_searched(report),
        ("alignment", f"{report['alignment']:.4f} (0: views of an image coincide)"),
        ("uniform.", f"{report['uniformity']:.4f} (lower: spread more evenly)"),
        ("rank", f"{report['effective_rank']:.1f} of {report['feature_dim']}"),
        ("std", f"{report['feature_std']:.4f} (1: spread evenly, 0: one point)"),
        ("cosines", f"{positive:.4f} of two views of an image, {negative:.4f} of two images"),
    ]


def _duplicates_table(report: Report) -> Rows:
    same = report["false_negatives_of_one_class"]
    labels = "" if same is None else f", {100 * same:.1f} % of one class"
    groups = f"{report['n_duplicates']:,} pairs in {len(report['groups']):,} groups"
    rows = [
        *_searched(report),
        ("twice", f"{groups}, similarity {report['settings']['threshold']:g} or more"),
        ("", f"the pixels of {report['n_same_pixels']:,} are the same but for 5 of 256 levels"),
        ("alike", f"{report['n_false_negatives']:,} likely false negatives{labels}"),
    ]
    for name in ("duplicates", "false_negatives"):
        rows += [
            (
                "",
                f"{' and '.join(map(_called, pair['samples'], pair['files'] or (None, None)))}:"
                f" similarity {pair['similarity']:.4f}, pixels differ by"
                f" {pair['pixel_difference']:.1f}",
            )
            for pair in report[name][:3]
        ]
    return rows
