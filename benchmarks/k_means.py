"""k-means of a data set's rows as DeepCluster-v2 makes them before an epoch, beside faiss.

    python benchmarks/k_means.py --rows 1281167 --clusters 3000

Unit rows around drawn centres; the same rows, first centres and iterations for both, on the same
number of threads, in turns. Ours is spherical k-means in float32 with sums in float64; faiss's too,
but for its sums' float32. The last column is how much of the rows' cosines with their centres each
has come to, and the line below it how far two processes of ours are from one.
"""

import argparse
import statistics
import time
from collections.abc import Callable

import faiss
import numpy as np
import torch
from demo import processor
from torch import multiprocessing
from torch.nn.functional import normalize

from trainer.objectives.parts.k_means import k_means

_PORT = 29_561


def rows(count: int, dim: int, clusters: int) -> torch.Tensor:
    """Around as many centres, half noise."""
    generator = torch.Generator().manual_seed(0)
    centres = normalize(torch.randn(clusters, dim, generator=generator))
    which = torch.randint(clusters, (count,), generator=generator)
    noise = torch.randn(count, dim, generator=generator) / dim**0.5
    return normalize(centres[which] + noise)


def ours(rows_SD: torch.Tensor, start_KD: torch.Tensor, iterations: int) -> torch.Tensor:
    """Centres, and rows put to them."""
    return k_means(rows_SD, start_KD, iterations, spherical=True)[0]


def theirs(rows_SD: torch.Tensor, start_KD: torch.Tensor, iterations: int) -> torch.Tensor:
    """The same, of all rows: by itself faiss takes 256 for each cluster."""
    clusters, dim = start_KD.shape
    search = faiss.Kmeans(
        dim,
        clusters,
        niter=iterations,
        spherical=True,
        max_points_per_centroid=len(rows_SD),
        min_points_per_centroid=1,
    )
    search.train(rows_SD.numpy(), init_centroids=start_KD.numpy())
    search.index.search(rows_SD.numpy(), 1)
    return torch.from_numpy(np.asarray(search.centroids))


def similarity(rows_SD: torch.Tensor, centres_KD: torch.Tensor) -> float:
    """The mean cosine of rows with their nearest centres."""
    return float(
        torch.cat([(part @ centres_KD.T).amax(1) for part in rows_SD.split(4096)]).double().mean()
    )


def _on_a_rank(rank: int, rows_SD: torch.Tensor, start_KD: torch.Tensor, iterations: int) -> None:
    torch.distributed.init_process_group(
        "gloo", init_method=f"tcp://127.0.0.1:{_PORT}", rank=rank, world_size=2
    )
    own_RD = rows_SD.tensor_split(2)[rank]
    centres_KD, _ = k_means(own_RD, start_KD, iterations, spherical=True)
    torch.distributed.destroy_process_group()
    if rank == 0:
        alone_KD, _ = k_means(rows_SD, start_KD, iterations, spherical=True)
        off = (1 - (centres_KD * alone_KD).sum(1)).abs()
        print(
            f"two processes beside one: the median centre is {float(off.median()):.1e} of a cosine"
            f" off, the furthest {float(off.max()):.1e}"
        )


def main() -> None:
    """Print the table."""
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--rows", type=int, default=200_000)
    parser.add_argument("--clusters", type=int, default=3000)
    parser.add_argument("--dim", type=int, default=128)
    parser.add_argument("--iterations", type=int, default=5)
    parser.add_argument("--turns", type=int, default=3)
    parser.add_argument("--threads", type=int, default=2)
    args = parser.parse_args()
    torch.set_num_threads(args.threads)
    faiss.omp_set_num_threads(args.threads)
    print(
        f"{processor()}, {args.threads} threads; {args.rows} rows of {args.dim},"
        f" {args.clusters} clusters"
    )
    rows_SD = rows(args.rows, args.dim, args.clusters)
    start_KD = rows_SD[: args.clusters].clone()
    contenders: dict[str, Callable[..., torch.Tensor]] = {"ours": ours, "faiss": theirs}
    seconds: dict[str, list[float]] = {name: [] for name in contenders}
    reached = {}
    for _ in range(args.turns):
        for name, contender in contenders.items():
            started = time.perf_counter()
            centres_KD = contender(rows_SD, start_KD, args.iterations)
            seconds[name].append(time.perf_counter() - started)
            reached[name] = similarity(rows_SD, centres_KD)
    for name, each in seconds.items():
        middle = statistics.median(each)
        print(
            f"{name:6} {middle:7.2f} s ({min(each):.2f} to {max(each):.2f}),"
            f" {middle / args.iterations:.3f} s an iteration, cosine {reached[name]:.4f}"
        )
    ratio = statistics.median(a / b for a, b in zip(seconds["ours"], seconds["faiss"]))
    print(f"ours takes {ratio:.2f} of faiss's time")
    rows_SD.share_memory_()
    multiprocessing.spawn(_on_a_rank, (rows_SD, start_KD, args.iterations), nprocs=2)


if __name__ == "__main__":
    main()
