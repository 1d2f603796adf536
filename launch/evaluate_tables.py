"""What each method of ``widebatch evaluate`` prints: a report's lines for a person."""

from pathlib import Path
from typing import Any

Report = dict[str, Any]
Rows = list[tuple[str, str]]
_COMPARED = {
    "k": "k",
    "temperature": "temperature",
    "c": "C",
    "epochs": "epochs",
    "batch_size": "batch",
    "peak_lr": "learning rate",
    "head_layers": "layers of its head",
}
_TARGETS = 10
_QUERIES, _NEAREST, _PAIRS = 5, 5, 3  # of each list; the JSON has all


def labelled(report: Report) -> Rows:
    """A report's lines for a person; accuracies in percent."""
    data, settings = report["data"], report["settings"]
    few = ""
    if settings.get("labels_per_class"):
        few = f", {settings['labels_per_class']} per class, seed {settings['seed']}"
    top_n = min(5, report["num_classes"])
    rows = [
        *_head(report),
        ("protocol", _protocol_line(report)),
        ("train", f"{report['n_train']:,} of {_shown(data['train']['path'])}{few}"),
        ("test", f"{report['n_test']:,} of {_shown(data['test']['path'])}"),
        ("top-1", f"{100 * report['top1']:.2f} % of {report['num_classes']} classes"),
        (f"top-{top_n}", f"{100 * report['top5']:.2f} %"),
    ]
    if len(report.get("by_k", ())) > 1:
        rows += [
            (f"k {each['k']}", f"{100 * each['top1']:.2f} %, {100 * each['top5']:.2f} %")
            for each in report["by_k"]
        ]
    return rows


def targets(report: Report) -> Rows:
    """The mean over targets, and the first of them."""
    data = report["data"]
    rows = [
        *_head(report),
        ("protocol", f"{_protocol_line(report)}, of {report['kind']}"),
        ("train", f"{report['n_train']:,} of {_shown(data['train']['path'])}"),
        ("test", f"{report['n_test']:,} of {_shown(data['test']['path'])}"),
    ]
    count = len(report["by_target"])
    if report["kind"] == "labels":
        rows.append(("mAP", f"{100 * report['mean_average_precision']:.2f} % of {count} labels"))
    else:
        rows.append(("R2", f"{report['r2']:.4f}, mean of {count}"))
    for name, each in [*report["by_target"].items()][:_TARGETS]:
        if report["kind"] == "labels":
            share = f"of {100 * each['share']:.1f} % of the images"
            rows.append((name, f"{100 * each['average_precision']:.2f} %, {share}"))
        else:
            rows.append((name, f"R2 {each['r2']:.4f}, off by {each['mean_absolute_error']:.4g}"))
    return rows


def _protocol_line(report: Report) -> str:
    """The protocol, and those of its settings that a result is compared by."""
    settings = report["settings"]
    shown = [f"{called} {settings[key]:g}" for key, called in _COMPARED.items() if key in settings]
    return ", ".join([report["protocol"], *shown])


def _searched(report: Report) -> Rows:
    path = report["data"]["train"]["path"]
    return [*_head(report), ("images", f"{report['n_train']:,} of {_shown(path)}")]


def retrieve(report: Report) -> Rows:
    """The first queries with their nearest."""
    asked = report["data"]["query"]["path"]
    rows = [*_searched(report), ("queries", f"{report['n_query']:,} of {_shown(asked)}")]
    if report["mean_average_precision"] is not None:
        rows.append(("mAP", f"{100 * report['mean_average_precision']:.2f} %"))
        rows += [
            (f"recall@{k}", f"{100 * value:.2f} %") for k, value in report["recall_at"].items()
        ]
    neighbours = _few(_NEAREST, report["measured"]["k"])
    rows.append(
        ("nearest", f"{neighbours} images to {_few(_QUERIES, report['n_query'])} queries (--json)")
    )
    for query in report["queries"][:_QUERIES]:
        rows.append((f"#{query['sample']}", query["file"] or ""))
        rows += [
            ("", f"{each['similarity']:.3f} {_called(each['sample'], each['file'])}")
            for each in query["neighbours"][:_NEAREST]
        ]
    return rows


def _few(shown: int, total: int) -> str:
    return f"{shown} of {total:,}" if shown < total else f"{total}"


def _called(sample: int, file: str | None) -> str:
    return f"#{sample} {file or ''}".rstrip()


def embed(report: Report) -> Rows:
    """How many, and of what."""
    images = f"{report['rows']:,} of {_shown(report['data']['train']['path'])}"
    return [*_head(report), ("images", images)]


def cluster(report: Report) -> Rows:
    """Sizes, and how far the clusters are the classes."""
    sizes = [size for size in report["sizes"] if size]  # fewer than k where few images differ
    rows = [
        *_searched(report),
        ("clusters", f"{len(sizes)}, of {min(sizes):,} to {max(sizes):,} images"),
    ]
    if report["nmi"] is not None:
        rows += [(name.upper(), f"{report[name]:.4f}") for name in ("nmi", "ari")]
        rows.append(("purity", f"{100 * report['purity']:.2f} %"))
    return rows


def diagnose(report: Report) -> Rows:
    """The figures."""
    positive, negative = report["positive_similarity"], report["negative_similarity"]
    return [
        *_searched(report),
        ("alignment", f"{report['alignment']:.4f} (0: views of an image coincide)"),
        ("uniform.", f"{report['uniformity']:.4f} (lower: spread more evenly)"),
        ("rank", f"{report['effective_rank']:.1f} of {report['feature_dim']}"),
        ("std", f"{report['feature_std']:.4f} (1: spread evenly, 0: one point)"),
        ("cosines", f"{positive:.4f} of two views of an image, {negative:.4f} of two images"),
    ]


def duplicates(report: Report) -> Rows:
    """How many, and the most alike pairs."""
    same = report["false_negatives_of_one_class"]
    labels = "" if same is None else f", {100 * same:.1f} % of one class"
    groups = f"{report['n_duplicates']:,} pairs in {len(report['groups']):,} groups"
    least = f"similarity {report['settings']['threshold']:g} or more"
    return [
        *[("doubt", report["doubt"])] * bool(report["doubt"]),
        *_searched(report),
        ("same", f"{groups} look the same to this encoder: {least}"),
        ("", f"the pixels of {report['n_same_pixels']:,} are the same but for 5 of 256 levels"),
        *_pairs(report, "duplicates"),
        ("alike", f"{report['n_false_negatives']:,} pairs are likely false negatives{labels}"),
        *_pairs(report, "false_negatives"),
    ]


def _pairs(report: Report, kind: str) -> Rows:
    pairs = report[kind][:_PAIRS]
    heading = f"{_few(_PAIRS, report[f'n_{kind}'])} pairs, the most alike first:"
    return [("", heading)] * bool(pairs) + [
        (
            "",
            f"  {' and '.join(map(_called, pair['samples'], pair['files'] or (None, None)))}:"
            f" similarity {pair['similarity']:.4f}, pixels differ by"
            f" {pair['pixel_difference']:.1f}",
        )
        for pair in pairs
    ]


def _shown(paths: str) -> str:
    """Paths as they are seen from the working folder."""
    return paths.replace(f"{Path.cwd()}/", "")


def _head(report: Report) -> Rows:
    """The first lines of every table: which encoder."""
    encoder = report["encoder"]
    stem = f" ({encoder['stem']} stem)" if "stem" in encoder else ""
    layer = f", {encoder['layer']}" if "layer" in encoder else ""
    where = ", ".join(
        f"{name} {encoder[name]:g}" for name in ("step", "epoch") if encoder.get(name) is not None
    )
    crop = f"{report['preprocessing']['size']}-pixel crops"
    return [
        ("encoder", f"{_shown(encoder['source'])}{f', {where}' if where else ''}"),
        ("", f"{encoder['architecture']}{stem}{layer}, {encoder['feature_dim']} features, {crop}"),
    ]
