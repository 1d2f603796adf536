"""What is fuzzed: sound files to start from, how they are changed, and what must hold of a result.

A target's ``read`` returns why an input was refused, or ``""`` where it was taken. What it raises
is a finding: a refusal that does not name the file, or anything but a refusal.
"""

import json
import random
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from common.errors import DataError
from data_pipeline.packing import beton_writer
from data_pipeline.packing.pack import PackConfig, pack
from data_pipeline.reading import beton
from data_pipeline.reading.manifest import manifest_path
from tests.data_pipeline import images
from tests.data_pipeline.betons import check_beton, read_sample_table
from tests.fuzz.mutate import Span, mutate_bytes, mutate_json

COUNT = 6
_LIMITS = (0, 2, COUNT)  # samples that may be damaged

Mutate = Callable[[random.Random, bytes], bytes]


@dataclass(frozen=True)
class Target:
    """One reader of files."""

    seeds: Sequence[bytes]
    mutate: Mutate
    read: Callable[[bytes], str]
    cap_mib: int
    """Address space that reading may add."""


def refusal(path: Path, error: Exception) -> str:
    """The message, without what differs from input to input."""
    message = str(error)
    assert str(path) in message, f"the file is not named: {message}"
    assert "\n" not in message, f"more than one line: {message}"
    kept = message.replace(str(path), "")[:60]
    return "".join("#" if c.isdigit() else c for c in kept)


def packed(folder: Path, kind: str, side: int = 12) -> Path:
    """A .beton of a few tiny images and its manifest."""
    files = {
        f"class {i % 2}/{i}.jpg": images.jpeg(side + i, side, seed=i, subsampling=i % 3)
        for i in range(COUNT)
    }
    images.write_folder(folder / "set", files)
    path = folder / f"{kind}.beton"
    config = PackConfig(workers=1, format=kind)  # type: ignore[arg-type]
    pack(str(folder / "set"), path, config, progress=False)
    return path


def spans_of(data: bytes) -> list[Span]:
    """Every number of a .beton's header, field types and tables."""
    header = np.frombuffer(data, beton.HEADER, 1)[0]
    tables = beton.HEADER.itemsize + 2 * beton.FIELD.itemsize
    found = _columns(beton.HEADER, 0)
    found += [
        (beton.HEADER.itemsize + i * beton.FIELD.itemsize + j, 1) for i in (0, 1) for j in (0, 1, 6)
    ]
    for sample in range(int(header["num_samples"])):
        start = tables + sample * beton_writer.METADATA.itemsize
        found += _columns(beton_writer.METADATA["f0"], start)
        found.append((start + int(beton_writer.METADATA.fields["f1"][1]), 8))  # type: ignore[index]
        start = int(header["alloc_table_ptr"]) + sample * beton.ALLOCATION.itemsize
        found += _columns(beton.ALLOCATION, start)
    return found


def _columns(dtype: np.dtype, start: int) -> list[Span]:
    assert dtype.fields is not None
    return [(start + int(field[1]), field[0].itemsize) for field in dtype.fields.values()]


def _move_both(rng: random.Random, data: bytes) -> bytes:
    """A sample's pointer changed in both tables alike: what a careful hand would do."""
    changed = bytearray(data)
    header = np.frombuffer(changed, beton.HEADER, 1)[0]
    start, tail = beton.HEADER.itemsize + 2 * beton.FIELD.itemsize, int(header["alloc_table_ptr"])
    metadata = np.frombuffer(changed, beton_writer.METADATA, COUNT, start)
    allocations = np.frombuffer(changed, beton.ALLOCATION, COUNT, tail)
    row = rng.randrange(COUNT)
    sample = int(allocations["sample_id"][row])
    size = int(allocations["size"][row])
    places = (
        0,
        start,
        tail,
        tail - size,
        tail - size + 1,
        len(data),
        (1 << 64) - 1,
        (1 << 64) - size,
    )
    pointer = rng.choice((*places, int(allocations["ptr"][row]) + rng.randrange(-40, 40)))
    allocations["ptr"][row] = metadata["f0"]["data_ptr"][sample] = pointer % (1 << 64)
    if rng.random() < 0.5:
        allocations["size"][row] = rng.choice((1, size - 1, size + 1, tail, (1 << 64) - 1))
    if rng.random() < 0.3:
        metadata["f0"]["height"][sample] = rng.choice((1, 8, 9, 4096, 65535))
    return bytes(changed)


def tables(folder: Path) -> Target:
    """Header and tables of a .beton: its check alone, and what it lets through is in bounds."""
    sources = [packed(folder / kind, kind).read_bytes() for kind in ("jpeg", "raw")]
    spans = spans_of(sources[0])
    path = folder / "fuzzed.beton"

    def mutate(rng: random.Random, data: bytes) -> bytes:
        if rng.random() < 0.1 and len(data) == len(sources[0]):
            return _move_both(rng, sources[0])
        return mutate_bytes(rng, data, spans, sources)

    def read(data: bytes) -> str:
        path.write_bytes(data)
        limit = _LIMITS[len(data) % 3]
        try:
            info = check_beton(path, max_damaged=limit)
        except DataError as error:
            return refusal(path, error)
        table = read_sample_table(path, max_damaged=limit)
        ends = table.offsets + table.sizes
        assert (table.offsets > 0).all() and (ends <= len(data)).all() and (table.sizes >= 0).all()
        assert len(table.damaged) == info.num_damaged <= limit
        assert (table.heights * table.widths <= beton.MAX_PIXELS).all()
        return ""

    return Target(sources, mutate, read, cap_mib=64)


def samples(folder: Path) -> Target:
    """A whole .beton, images too: what the check lets through, both backends read to the end."""
    from data_pipeline.crops import centre_crop_boxes
    from data_pipeline.reading.ffcv_loader import FfcvDecoder
    from data_pipeline.reading.open_data import OpenData
    from data_pipeline.reading.substitutes import Cut
    from data_pipeline.reading.torchvision_loader import TorchvisionDecoder

    # Images of one size and layout, so that a changed table often fits a changed image.
    files = {f"a/{i}.jpg": images.jpeg(16, 16, seed=i, progressive=i == 1) for i in range(COUNT)}
    images.write_folder(folder / "set", files)
    source = folder / "jpeg.beton"
    config = PackConfig(workers=1, format="jpeg")
    pack(str(folder / "set"), source, config, progress=False)
    sound = source.read_bytes()
    spans, path = spans_of(sound), folder / "fuzzed.beton"
    table = read_sample_table(source)
    pixels = [range(int(at), int(at + size)) for at, size in zip(table.offsets, table.sizes)]

    def mutate(rng: random.Random, data: bytes) -> bytes:
        if rng.random() < 0.3:
            return mutate_bytes(rng, data, spans, (sound,))
        changed = bytearray(data)
        for _ in range(rng.choice((1, 2, 4))):
            at = rng.choice(rng.choice(pixels))
            if at < len(changed):
                changed[at] = rng.choice(
                    (0, 255, changed[at] ^ (1 << rng.randrange(8)), 0xC4, 0xDA)
                )
        return bytes(changed)

    def read(data: bytes) -> str:
        path.write_bytes(data)
        try:
            file = OpenData(path, max_damaged=COUNT)
        except DataError as error:
            return refusal(path, error)
        found = file.table
        ids = np.arange(len(found.sizes))
        if (found.heights * found.widths).max() > 1 << 22:
            ids = ids[:2]  # decoding megapixels 100,000 times is not what this is for
        boxes = centre_crop_boxes(found.heights[ids], found.widths[ids], 8, 8)
        outcomes = []
        for decoder in (FfcvDecoder(file), TorchvisionDecoder(file)):
            out = np.empty((len(ids), 1, 8, 8, 3), np.uint8)
            failed = decoder.try_decode(ids, (Cut(boxes, out),)).tolist()
            assert set(failed) >= set(found.damaged) & set(ids.tolist())
            problems = [decoder.problem(sample) for sample in failed]
            assert all(problems)
            outcomes.append(failed)
        assert outcomes[0] == outcomes[1], f"the backends disagree on what is damaged: {outcomes}"
        return f"{len(outcomes[0])} damaged" if outcomes[0] else ""

    return Target([sound], mutate, read, cap_mib=2048)


def manifests(folder: Path) -> Target:
    """The manifest beside a sound .beton."""
    path = packed(folder, "jpeg")
    beside = manifest_path(path)
    seed = beside.read_bytes()

    def read(data: bytes) -> str:
        beside.write_bytes(data)
        try:
            check_beton(path)
        except DataError as error:
            if f"{path}: sample" in str(error):  # a class that the changed manifest lacks
                return "a label without a class"
            return refusal(beside, error)
        return ""

    return Target([seed], lambda rng, data: mutate_json(rng, data, [seed]), read, cap_mib=64)


def safetensors(folder: Path) -> Target:
    """Tensors, from memory and from a file, which must agree where both can be read."""
    import torch
    from safetensors.torch import save

    from common.files.safetensors_file import load_safetensors, parse_safetensors

    tensors = {"a.weight": torch.arange(6.0).view(2, 3), "b": torch.ones(3).half()}
    seeds = [save(tensors | {"none": torch.empty(0, 4)}), save({"x": torch.tensor(1)}, {"k": "v"})]
    path = folder / "fuzzed.safetensors"

    def mutate(rng: random.Random, data: bytes) -> bytes:
        length = int.from_bytes(data[:8], "little")
        if rng.random() < 0.5 or length > len(data):
            return mutate_bytes(rng, data, [(0, 8), (0, 2)], seeds)
        header = mutate_json(rng, data[8 : 8 + length], seeds)
        length = len(header) + rng.choice((0, 0, 0, 0, 1, -1, 1 << 60))
        return (length % (1 << 64)).to_bytes(8, "little") + header + data[8 + length :]

    def read(data: bytes) -> str:
        path.write_bytes(data)
        outcomes = []
        for load in (lambda: parse_safetensors(data, path), lambda: load_safetensors(path)):
            try:
                outcomes.append(load())
            except DataError as error:
                outcomes.append(refusal(path, error))
        refused = [outcome for outcome in outcomes if isinstance(outcome, str)]
        if refused:  # maybe one alone: of types that only a file's reader knows
            return refused[0]
        loaded, again = outcomes
        assert loaded.keys() == again.keys()
        assert sum(t.numel() * t.element_size() for t in loaded.values()) <= len(data)
        return ""

    return Target(seeds, mutate, read, cap_mib=64)


def configuration(folder: Path) -> Target:
    """A run's config.json as resuming, evaluating and reporting read it."""
    import dataclasses

    from common.errors import ConfigError
    from trainer.config import DataConfig, RunConfig, completed, differences, from_json, to_json
    from trainer.evaluation.load_encoder import run_encoder_config, run_preprocessing
    from trainer.recipes import RECIPES

    configs = [
        dataclasses.replace(RECIPES[name](), data=DataConfig(train=(Path("x.beton"),)))
        for name in ("simclr-r50", "mocov2-r50", "mocov3-r50")
    ]
    current = to_json(configs[0])
    seeds = [json.dumps(to_json(config)).encode() for config in configs]
    path = folder / "config.json"

    def read(data: bytes) -> str:
        from common.files.strict_json import read_json_file

        path.write_bytes(data)
        try:
            values = read_json_file(path)
            differences(completed(values), current)
            run_encoder_config(values, str(path))
            run_preprocessing(values, str(path))
            config = from_json(RunConfig, values, str(path))
        except (DataError, ConfigError) as error:
            return refusal(path, error)
        assert from_json(RunConfig, to_json(config)) == config
        return ""

    return Target(seeds, lambda rng, data: mutate_json(rng, data, seeds), read, cap_mib=64)


TARGETS: dict[str, Callable[[Path], Target]] = {
    "tables": tables,
    "samples": samples,
    "manifests": manifests,
    "safetensors": safetensors,
    "configuration": configuration,
}
