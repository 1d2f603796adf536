"""The complete description of a run, and what follows from it before step 0.

:class:`RunConfig` composes the dataclasses that stand beside their owners. :func:`plan_run` derives
per-process batch, steps, warm-up and learning rate from it, and refuses what cannot work. Reading
back from JSON is strict: an unknown key is an error, and nothing but plain values is accepted.
"""

import dataclasses
import difflib
import functools
import types
import typing
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Annotated, Any, Literal, TypeVar

import tyro

from common.bounds import check_bounds
from common.errors import ConfigError
from common.randomness import SEEDS
from data_pipeline.augment import AugmentConfig
from data_pipeline.crops import CropConfig
from data_pipeline.reading.beton import name_of
from data_pipeline.reading.damage import check_limit
from data_pipeline.reading.pool import LoaderConfig
from data_pipeline.views import ViewPlan
from trainer.features.online_knn import OnlineKnnConfig
from trainer.health.collapse import CollapseConfig
from trainer.health.non_finite import GuardConfig
from trainer.health.stragglers import StragglerConfig
from trainer.health.watchdog import WatchdogConfig
from trainer.models.encoders import EncoderConfig, fixed_image_size, takes_size
from trainer.models.heads import HeadConfig
from trainer.objectives.registry import AnyObjectiveConfig, DefaultObjectiveConfig
from trainer.optim.optimizers import OptimConfig, scaled_lr
from trainer.optim.schedule import ScheduleConfig, lr_factor, warmup_steps
from trainer.parallel.strategy import PrecisionName, StrategyConfig
from trainer.state.checkpoint import CheckpointConfig
from trainer.step import MicroBatchNorm
from trainer.telemetry import TelemetryConfig

T = TypeVar("T")


@dataclass(frozen=True, kw_only=True)
class DataConfig:
    """Packed data sets, made by ``widebatch pack``."""

    train: tuple[Path, ...]
    """.beton file to pretrain on, or several as one set; labels in it are the online kNN's."""
    test: tuple[Path, ...] = ()
    """.beton file with labels for the online kNN, or several; none: no online kNN."""
    max_substitutes: float = 0.0001
    """Damaged samples of a set in whose place others may be shown: below 1 a fraction of all,
    rounded up, else a number; 0: the first one ends the run. RUN/substitutes.jsonl lists them."""

    def __post_init__(self) -> None:
        if not self.train:
            raise ConfigError("--data.train names no file")
        check_limit(self.max_substitutes, "--data.max-substitutes")


@dataclass(frozen=True, kw_only=True)
class RunConfig:
    """Everything that decides what a run computes, and where it writes.

    Which objective it is, the recipe decides; the command line changes that one's settings.
    """

    data: DataConfig
    """What to learn from."""
    batch: int
    """Global batch: images per optimizer step over all processes."""
    epochs: float = 100.0
    """Length of the run in passes over the data; fractions are allowed."""
    steps: int | None = None
    """Length of the run in optimizer steps; overrides `epochs`."""
    seed: int = 0
    """Decides initial weights, order of samples, crops and augmentations."""
    init_from: Path | None = None
    """File that the encoder starts from in place of random weights: torchvision's, timm's, MoCo's
    or our own (.safetensors, .pth, .pth.tar); read when the run is new. None: random."""
    out: Path
    """Run folder: config.json, metrics.jsonl, checkpoints/. An existing run is gone on with."""
    resume: Literal["auto", "force", "never"] = "auto"
    """auto: go on if the folder holds this same run; force: go on although settings or data
    changed; never: refuse a folder that holds a run."""
    log_samples: bool = False
    """Write samples.jsonl: the global list of sample ids of every step."""
    precision: PrecisionName = "auto"
    """Arithmetic of the encoder: bf16 autocast over fp32 weights, or plain fp32 or fp64. auto: bf16
    where the processor of a new run has it, else fp32; a run that goes on keeps what it has."""
    device: Literal["auto", "cpu", "cuda"] = "auto"
    """auto: CUDA where there is a GPU."""
    sync_batch_norm: bool = True
    """BatchNorm statistics over the global batch; off, a run depends on the number of processes."""
    batch_norm_group: int = 0
    """Processes that share BatchNorm statistics; 0: all of them."""
    micro_batch: int = 0
    """Images of a process in memory at a time; 0: all. A step takes the same gradients in pieces
    of so many, with another cost in time: see `micro_batch_norm`."""
    micro_batch_norm: MicroBatchNorm = "exact"
    """BatchNorm of a batch in pieces. exact: statistics over the global batch, for some 15
    (ResNet-18) to 38 (ResNet-50) times the time of a step; piece: over the pieces that all
    processes have at a time, for 4/3 of it, with noisier statistics."""
    activation_checkpointing: bool = False
    """Keep the inputs of the encoder's blocks instead of all activations: less memory for a third
    more time."""
    compile: bool = False
    """Let torch.compile fuse the encoder; the first step takes minutes longer."""
    max_skipped_steps: int = 10
    """Stop, or roll back (--guard.on-repeat), after so many steps in a row whose gradients were not
    finite; each is left out."""
    crop: CropConfig = field(default_factory=CropConfig)
    augment: AugmentConfig
    loader: LoaderConfig = field(default_factory=LoaderConfig)
    encoder: EncoderConfig = field(default_factory=EncoderConfig)
    head: HeadConfig = field(default_factory=HeadConfig)
    objective: tyro.conf.AvoidSubcommands[AnyObjectiveConfig] = field(
        default_factory=DefaultObjectiveConfig
    )
    optim: OptimConfig = field(default_factory=OptimConfig)
    schedule: ScheduleConfig = field(default_factory=ScheduleConfig)
    strategy: Annotated[StrategyConfig, tyro.conf.arg(name="")] = field(
        default_factory=StrategyConfig
    )
    checkpoint: CheckpointConfig = field(default_factory=CheckpointConfig)
    knn: OnlineKnnConfig = field(default_factory=OnlineKnnConfig)
    telemetry: TelemetryConfig = field(default_factory=TelemetryConfig)
    guard: GuardConfig = field(default_factory=GuardConfig)
    watchdog: WatchdogConfig = field(default_factory=WatchdogConfig)
    straggler: StragglerConfig = field(default_factory=StragglerConfig)
    collapse: CollapseConfig = field(default_factory=CollapseConfig)
    recipe: tyro.conf.Suppress[str] = ""
    """Name of the recipe that the settings started from."""

    def __post_init__(self) -> None:
        check_bounds(
            self,
            "--",
            batch="[2, 1e9]",
            epochs="(0, 1e9]",
            steps="[1, 1e15]",
            batch_norm_group="[0, 1e9]",
            micro_batch="[0, 1e9]",
            max_skipped_steps="[1, 1e9]",
        )
        if self.seed not in SEEDS:
            raise ConfigError(f"--seed {self.seed}: choose {SEEDS[0]} to {SEEDS[-1]} (64 bits)")

    def view_plan(self) -> ViewPlan:
        """Views of each image that a step takes."""
        return self.objective.views(self.crop, self.augment)


# What may differ between the run that wrote a checkpoint and the one that goes on from it: where
# things lie, how they are watched, and how many processes and workers do the work.
_FREE_TO_CHANGE = (
    *("out", "resume", "device", "loader", "checkpoint", "telemetry", "knn", "data"),
    *("guard", "watchdog", "straggler", "collapse"),
    *("micro_batch", "activation_checkpointing", "compile", "strategy.name"),
)


@dataclass(frozen=True)
class RunPlan:
    """What a run's settings come to on ``world_size`` processes and ``num_samples`` samples."""

    num_samples: int
    world_size: int
    global_batch: int
    local_batch: int
    """Images per process and step."""
    steps_per_epoch: int
    total_steps: int
    warmup_steps: int
    peak_lr: float
    compares: str
    """What an image's loss is made of, in words."""

    def lines(self) -> list[str]:
        """For a person, before step 0."""
        epochs = self.total_steps / self.steps_per_epoch
        compares = f", {self.compares}" if self.compares else ""
        return [
            f"batch     {self.global_batch} global = {self.world_size} x {self.local_batch}"
            f" per process{compares}",
            f"length    {self.total_steps} steps = {epochs:.4g} epochs"
            f" x {self.steps_per_epoch} steps ({self.num_samples} samples,"
            f" {self.num_samples % self.global_batch} left out per epoch)",
            f"schedule  {self.warmup_steps} warm-up steps to a peak learning rate of"
            f" {self.peak_lr:.4g}",
        ]

    def caveats(self) -> list[str]:
        """What a user should know of the schedule before the first step, a line each."""
        if 2 * self.warmup_steps <= self.total_steps:
            return []
        return [
            f"the warm-up takes {self.warmup_steps} steps and the whole run {self.total_steps};"
            " see --schedule.warmup-epochs"
        ]


def refuse_unsupported(config: RunConfig) -> None:
    """Refuse settings of memory, precision and strategy that do not go together.

    On one process too, where nothing is sharded: a run must not fail when it gets a second.

    Raises:
        ConfigError: names the settings, why they do not go together, and what to set.
    """
    strategy = config.strategy
    if strategy.compress_gradients == "bf16" and config.precision == "fp64":
        raise ConfigError(
            "--compress-gradients bf16 leaves 3 digits of --precision fp64; set one of the two only"
        )
    if config.micro_batch and config.activation_checkpointing:
        raise ConfigError(
            "--activation-checkpointing does not go with --micro-batch, which bounds the memory by"
            " itself; set one of them"
        )
    if strategy.name == "ddp":
        return
    if config.micro_batch:
        raise ConfigError(
            f"--micro-batch with --strategy {strategy.name}: a batch in pieces runs parts of the "
            "networks outside the strategy's own forward and backward passes, where weights are "
            "not gathered and gradients not reduced; use --strategy ddp"
        )
    if strategy.name == "fsdp" and config.compile:
        raise ConfigError(
            "--compile with --strategy fsdp: FSDP gathers weights in hooks inside the encoder, "
            "which a compiled encoder breaks at; use --strategy ddp, deepspeed-1 or deepspeed-2"
        )
    if strategy.name != "fsdp" and config.precision == "fp64":
        raise ConfigError(
            f"--precision fp64 with --strategy {strategy.name}: DeepSpeed's master weights are "
            "float32; use --strategy fsdp or ddp"
        )


def plan_run(config: RunConfig, num_samples: int, world_size: int) -> RunPlan:
    """Derive the plan of a run.

    Raises:
        ConfigError: settings do not go together; the batch does not divide, exceeds the data, or
            leaves no negatives; the run has no step; the data set is too small.
    """
    refuse_unsupported(config)
    batch = config.batch
    fixed, views = fixed_image_size(config.encoder), config.view_plan()
    if fixed is not None and fixed != config.crop.size:
        raise ConfigError(
            f"--crop.size {config.crop.size}: {config.encoder.name} takes images of"
            f" --encoder.image-size {fixed} alone; set both to the same number"
        )
    judged = config.knn.size or config.crop.size
    if config.data.test and not takes_size(config.encoder, judged):
        raise ConfigError(
            f"--knn.size {judged}: {config.encoder.name} takes no images of this size"
        )
    for group in views:
        if not takes_size(config.encoder, group.crop.size):
            raise ConfigError(
                f"{config.encoder.name} takes no images of {group.crop.size} pixels, as this"
                " objective's views are: a vit takes what its patches divide; leave them out, or"
                " take another encoder"
            )
    if batch > num_samples:
        raise ConfigError(
            f"--batch {batch} is more than the {num_samples} samples of"
            f" {name_of(config.data.train)};"
            f" try --batch {_batch_for(num_samples, world_size)}"
        )
    if batch % world_size:
        below, above = batch - batch % world_size, batch + world_size - batch % world_size
        nearest = " and ".join(str(b) for b in (below, above) if 2 <= b <= num_samples)
        nearest = nearest or f"none, of {num_samples} samples"
        raise ConfigError(
            f"--batch {batch} does not divide by {world_size} processes; nearest that do: {nearest}"
        )
    steps_per_epoch = num_samples // batch
    least, why = config.objective.least_samples()
    if steps_per_epoch * batch < least:
        raise ConfigError(
            f"--objective.{why} {least} is more than the {steps_per_epoch * batch} samples of an"
            f" epoch of {name_of(config.data.train)}; lower it, or bring more images"
        )
    total = config.steps if config.steps is not None else round(config.epochs * steps_per_epoch)
    if total < 1:
        raise ConfigError(
            f"--epochs {config.epochs}: the run would have {total} steps; it needs at least 1"
        )
    if config.sync_batch_norm and config.batch_norm_group and world_size % config.batch_norm_group:
        raise ConfigError(
            f"--batch-norm-group {config.batch_norm_group} does not divide {world_size} processes"
        )
    return RunPlan(
        num_samples=num_samples,
        world_size=world_size,
        global_batch=batch,
        local_batch=batch // world_size,
        steps_per_epoch=steps_per_epoch,
        total_steps=total,
        warmup_steps=warmup_steps(config.schedule, steps_per_epoch),
        peak_lr=scaled_lr(config.optim, batch),
        compares=config.objective.compares(batch, num_samples),
    )


def _batch_for(num_samples: int, world_size: int) -> int:
    """The greatest product of the processes and a power of two with 8 steps or more an epoch."""
    most = max(1, num_samples // 8 // world_size)
    return max(2, world_size << most.bit_length() - 1)


def lr_at(config: RunConfig, plan: RunPlan, step: int) -> float:
    """Learning rate of the ``step``-th update, from 0."""
    factor = lr_factor(config.schedule, step, plan.steps_per_epoch, plan.total_steps)
    return plan.peak_lr * factor


def absolute(config: T) -> T:
    """A configuration whose paths are the same from any working folder."""
    found: dict[str, Any] = {}
    for each in dataclasses.fields(config):  # type: ignore[arg-type]
        value = getattr(config, each.name)
        if isinstance(value, Path):
            found[each.name] = value.absolute()
        elif isinstance(value, tuple):
            found[each.name] = tuple(v.absolute() if isinstance(v, Path) else v for v in value)
        elif dataclasses.is_dataclass(value):
            found[each.name] = absolute(value)
    return dataclasses.replace(config, **found)  # type: ignore[type-var]


def to_json(config: object) -> Any:
    """Plain JSON values of a configuration: dataclasses to objects, paths to strings."""
    if dataclasses.is_dataclass(config) and not isinstance(config, type):
        return {f.name: to_json(getattr(config, f.name)) for f in dataclasses.fields(config)}
    if isinstance(config, tuple | list):
        return [to_json(item) for item in config]
    if isinstance(config, Mapping):
        return {str(key): to_json(value) for key, value in config.items()}
    if isinstance(config, Path):
        return str(config)
    if config is None or isinstance(config, bool | int | float | str):
        return config
    raise TypeError(f"a configuration holds no {type(config).__name__}")


def from_json(cls: type[T], values: Any, where: str = "config") -> T:
    """Build dataclass ``cls`` from :func:`to_json`'s values.

    Raises:
        ConfigError: an unknown or missing key, or a value of the wrong type; names the key.
    """
    if not isinstance(values, Mapping):
        raise ConfigError(f"{where}: expected an object, found {type(values).__name__}")
    hints = _hints(typing.cast(type, cls))
    fields = {f.name: f for f in dataclasses.fields(cls)}  # type: ignore[arg-type]
    for key in values:
        if key not in fields:
            near = difflib.get_close_matches(str(key), fields, n=1)
            raise ConfigError(
                f"{where}.{key}: unknown setting" + (f"; did you mean {near[0]}?" if near else "")
            )
    built = {key: _value(hints[key], value, f"{where}.{key}") for key, value in values.items()}
    try:
        return cls(**built)
    except (TypeError, ValueError, OverflowError) as error:
        raise ConfigError(f"{where}: {error}") from None


@functools.cache
def _hints(cls: type) -> dict[str, Any]:
    return typing.get_type_hints(cls)


def _value(hint: Any, value: Any, where: str) -> Any:
    origin, arguments = typing.get_origin(hint), typing.get_args(hint)
    if origin is typing.Annotated:
        return _value(arguments[0], value, where)
    if origin in (typing.Union, types.UnionType):
        if value is None and type(None) in arguments:
            return None
        kinds = [a for a in arguments if a is not type(None)]
        return _value(_named(kinds, value, where) if kinds[1:] else kinds[0], value, where)
    if dataclasses.is_dataclass(hint):
        return from_json(typing.cast(type, hint), value, where)
    if origin is tuple:
        if arguments[0] is Path and not isinstance(value, list):  # of runs with one file, or none
            value = [] if value is None else [value]
        if not isinstance(value, list):
            raise ConfigError(f"{where}: expected a list, found {value!r}")
        kinds = [arguments[0]] * len(value) if Ellipsis in arguments else list(arguments)
        if len(kinds) != len(value):
            raise ConfigError(f"{where}: expected {len(kinds)} values, found {len(value)}")
        return tuple(_value(k, v, where) for k, v in zip(kinds, value, strict=True))
    if origin is Literal:
        if value not in arguments:
            raise ConfigError(f"{where}: {value!r} is none of {', '.join(map(str, arguments))}")
        return value
    if hint is Path and isinstance(value, str) and "\0" not in value:
        return Path(value)
    if hint is float and isinstance(value, int) and not isinstance(value, bool):
        return float(value)
    if isinstance(hint, type) and (type(value) is not hint):
        raise ConfigError(f"{where}: expected {hint.__name__}, found {value!r}")
    return value


def _named(kinds: list[type], value: Any, where: str) -> type:
    """The dataclass whose ``name`` the value has; the first one for a value without any."""
    names = {kind.__dataclass_fields__["name"].default: kind for kind in kinds}  # type: ignore[attr-defined]
    name = value.get("name", next(iter(names))) if isinstance(value, Mapping) else None
    if isinstance(value, Mapping) and (not isinstance(name, str) or name not in names):
        raise ConfigError(f"{where}.name: {name!r} is none of {', '.join(names)}")
    return names.get(name, kinds[0])


def completed(saved: Mapping[str, Any]) -> Mapping[str, Any]:
    """A saved configuration with today's defaults for settings that it is too old to have.

    Returned as it is where it cannot be read, so that :func:`differences` names what is wrong.
    """
    try:
        values: Mapping[str, Any] = to_json(absolute(from_json(RunConfig, saved)))
    except ConfigError:
        return saved
    return values


def differences(saved: Mapping[str, Any], current: Mapping[str, Any]) -> list[str]:
    """Settings that change a run's numbers and differ: ``name: saved -> current``, dotted names.

    Where things lie, how they are watched and how many workers carry them may change; so may the
    size of pieces of a batch, unless BatchNorm's statistics are those of a piece.
    """
    free = set(_FREE_TO_CHANGE)
    if current.get("micro_batch_norm") == "piece":
        free.remove("micro_batch")

    def compare(saved: Any, current: Any, name: str) -> Iterator[str]:
        if isinstance(saved, Mapping) and isinstance(current, Mapping):
            for key in sorted(set(saved) | set(current)):
                full = f"{name}.{key}" if name else key
                if full not in free:
                    yield from compare(saved.get(key), current.get(key), full)
        elif _are_parts(saved) and _are_parts(current) and len(saved) == len(current):
            for number, pair in enumerate(zip(saved, current)):
                yield from compare(*pair, f"{name}.{number}")
        elif saved != current:
            yield f"{name}: {saved} -> {current}"

    return list(compare(saved, current, ""))


def _are_parts(value: Any) -> bool:
    return isinstance(value, list) and all(isinstance(each, Mapping) for each in value)
