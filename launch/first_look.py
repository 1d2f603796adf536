"""What a command line is refused for before torch is imported, which takes seconds.

Names of settings and the files that they name are looked at here; their values are tyro's to read,
and whether all goes together the trainer says.
"""

import os
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path

from launch.nearest import unknown
from trainer.errors import ConfigError

# Groups and their settings, of all recipes; a test holds them to the dataclasses.
_SETTINGS = """
-: batch epochs steps seed init-from out resume [no-]log-samples precision device
    [no-]sync-batch-norm batch-norm-group micro-batch micro-batch-norm strategy compress-gradients
    [no-]activation-checkpointing [no-]compile max-skipped-steps
data: train test max-substitutes
crop: size scale ratio
augment: [no-]normalize mean std
augment.view1 augment.view2: flip jitter brightness contrast saturation hue grayscale blur
    blur-sigma blur-kernel solarize solarize-threshold
loader: backend workers prefetch max-reduction
encoder: name stem [no-]zero-init-residual image-size
head objective.predictor: layers hidden-dim out-dim hidden-norm last-norm linear-bias
objective: temperature loss-implementation queue momentum momentum-schedule key-batch-norm
optim: name base-lr lr-scaling momentum [no-]nesterov weight-decay [no-]decay-vectors variant
    trust-coefficient betas eps
schedule: kind warmup-epochs warmup-start-fraction final-lr-fraction cosine-per milestones gamma
checkpoint: every-epochs every-steps keep [no-]asynchronous max-failures
knn: every-epochs k temperature batch resize
telemetry: log-every log-seconds [no-]tensorboard wandb prometheus-port prometheus-host
    prometheus-targets
guard: on-repeat rollbacks
watchdog: timeout patience warning join-timeout
straggler: factor readings
collapse: every-steps feature-std effective-rank measurements on-alarm
"""
_SWITCH = "[no-]"
_HELP = ("-h", "--help")
_OF_TYRO = (*_HELP, "--tyro-print-completion", "--tyro-write-completion")


def setting_flags() -> list[str]:
    """Every flag that a setting of some recipe has."""
    flags = []
    for line in _SETTINGS.replace("\n    ", " ").strip().splitlines():
        groups, _, names = line.partition(": ")
        for group in groups.split():
            before = "" if group == "-" else f"{group}."
            for name in names.split():
                flags.append(f"--{before}{name.removeprefix(_SWITCH)}")
                if name.startswith(_SWITCH):
                    flags.append(f"--{before}no-{name.removeprefix(_SWITCH)}")
    return flags


def refuse_unknown(
    prog: str, words: Sequence[str], flags: Iterable[str], other_options: Iterable[str] = ()
) -> None:
    """Refuse a setting that is none of ``flags``, and name the one that was meant.

    Raises:
        ConfigError: the first such setting.
    """
    known = list(flags)
    for flag in given(words):
        if flag.replace("_", "-") not in (*known, *_OF_TYRO):
            near = [*known, *other_options]
            raise ConfigError(unknown("setting", flag, near, f"see '{prog} --help'"))


def refuse_files(prog: str, words: Sequence[str]) -> None:
    """Refuse data files that are none, and a run's folder that cannot be one.

    Raises:
        ConfigError, DataError: names the file and what to do.
    """
    if set(_HELP) & set(words):
        return
    values = given(words)
    if "--data.train" not in values:
        raise ConfigError(f"--data.train FILE is required; see '{prog} --help'")
    from data_pipeline.beton import sample_count

    for name in ("--data.train", "--data.test"):
        if values.get(name):
            sample_count(values[name])
    if values.get("--out"):
        _refuse_folder(Path(values["--out"]))


def given(words: Sequence[str]) -> Mapping[str, str]:
    """Flags of a command line with the word that follows; of equal flags the last one's."""
    found = {}
    for word, following in zip(words, (*words[1:], "")):
        flag, equals, value = word.partition("=")
        if _is_flag(flag):
            found[flag] = value if equals else "" if _is_flag(following) else following
    return found


def _is_flag(word: str) -> bool:
    return word.startswith("--") or (word.startswith("-") and word[1:2].isalpha())


def _refuse_folder(out: Path) -> None:
    place = out.absolute()
    while not place.exists() and not place.is_symlink():
        place = place.parent
    if not place.is_dir():
        raise ConfigError(f"--out {out}: {place} exists and is no folder; choose another name")
    if not os.access(place, os.W_OK | os.X_OK):
        raise ConfigError(
            f"--out {out}: {place} cannot be written by this user; choose another folder"
        )
