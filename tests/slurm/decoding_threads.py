"""``decoding_threads.py FILE.beton FOLDER``: writes to FOLDER/RANK how many threads decode a batch,
and how many CPUs the process sees.

Finds its place and its share of the cores as ``widebatch pretrain`` does.
"""

import itertools
import os
import sys
import threading
from contextlib import closing
from pathlib import Path

import torch
import torch.distributed as dist

from common.cores import own_cores
from data_pipeline.crops import CropConfig
from data_pipeline.reading.loader import TrainLoader
from data_pipeline.reading.open_data import OpenData
from data_pipeline.reading.order import Position
from data_pipeline.reading.pool import LoaderConfig
from data_pipeline.views import views_of_one_size
from launch import cluster
from trainer.parallel.machine import settle_threads


def main(data: Path, folder: Path) -> None:
    cluster.take_place()
    if "RANK" in os.environ:
        dist.init_process_group("gloo")
    config = settle_threads(LoaderConfig(backend="torchvision"), torch.device("cpu"))
    views = views_of_one_size(CropConfig(size=8), 1)
    loader = TrainLoader(OpenData(data), views, config, seed=0, batch_size=160)
    decode, seen = loader._decoder.decode, set()
    together = threading.Barrier(loader.config.workers, timeout=60)

    def noted(*arguments: object) -> None:
        if threading.get_ident() not in seen:
            seen.add(threading.get_ident())
            together.wait()  # so that no thread does the work of two
        decode(*arguments)  # type: ignore[arg-type]

    loader._decoder.decode = noted  # type: ignore[method-assign]
    with closing(loader):
        list(itertools.islice(loader.starting_at(Position()), 2))
    (folder / os.environ.get("RANK", "0")).write_text(f"{len(seen)} of {len(own_cores().cpus)}")


if __name__ == "__main__":
    main(Path(sys.argv[1]), Path(sys.argv[2]))
