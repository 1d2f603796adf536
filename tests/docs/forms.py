"""What the pages' commands are changed to so that they run here: ALL of it, each with its reason.

Commands that nothing here matches run as they stand on the page.
"""

import re
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

from tests.docs import stand_ins

_SMALL = " --batch 16 --steps 2 --crop.size 32 --loader.backend torchvision"


@dataclass(frozen=True)
class Form:
    """A part of a command, and what runs in its place."""

    pattern: str
    instead: str
    reason: str
    page: str = ""
    """The only page that it is for; all pages by default."""


@dataclass(frozen=True)
class NotRun:
    """A command that does not run here at all."""

    pattern: str
    reason: str


FORMS = (
    Form(
        r"(\bpretrain \S+ .*)",
        r"\1" + _SMALL,
        "2 steps of 16 small images: a page's test takes minutes, not days; FFCV compiles anew in "
        "each process",
    ),
    Form(
        r"(\bpretrain jigsaw-\S+ .*)--crop.size 32",
        r"\1--crop.size 96",
        "its tiles are of this size",
        "objectives.md",
    ),
    Form(
        r"--encoder.image-size 224 --crop.size 224(.*) --init-from dinov2_vits14_pretrain.pth"
        r"(.*) --crop.size 32",
        r"--encoder.image-size 28\1\2 --crop.size 28",
        "no weights of DINOv2 without network: tests/peers has files of their names and shapes",
        "finetune.md",
    ),
    Form(
        r"videos/train",
        "photos/train",
        "folders of images are clips too; there are no videos here",
        "data.md",
    ),
    Form(
        r"(slurm/\w+\.sh --.*)",
        r"\1" + _SMALL,
        "the same, in a job",
    ),
    Form(
        r"(\bpretrain \S+-r50 .*|slurm/simclr_r50\.sh .*)",
        r"\1 --encoder.name resnet18",
        "a ResNet-50 takes a minute to start with on two cores",
    ),
    Form(
        r"--(devices|nproc-per-node|ntasks-per-node) 8",
        r"--\1 2",
        "2 processes on the CPU stand for 8 GPUs",
    ),
    Form(
        r"--nnodes 2 (--nproc-per-node \d+) --rdzv-backend c10d --rdzv-endpoint node1:29500",
        r"--nnodes 1 \1 --rdzv-backend c10d --rdzv-endpoint localhost:0",
        "this is one machine: the same rendezvous, with one node in it",
    ),
    Form(r"/shared/", "shared/", "there is no such folder at the root here"),
    Form(
        r"sbatch (.*)slurm/",
        r"sbatch --wait \1--nodes 1 --ntasks-per-node 2 --gpus-per-node 2 --cpus-per-task 1 "
        r"--time 10 slurm/",
        "the local cluster's nodes share two real cores; waited for, a job that fails is seen",
    ),
    Form(
        r"(scancel .*) \$JOBID",
        r"job=$(sbatch --parsable --wrap 'sleep 100'); "
        r"until squeue -h -j $job -t running | grep -q .; do sleep 0.2; done; \1 $job",
        "the page's own jobs have ended by then: one that sleeps stands for them",
    ),
    Form(r"srun --nodes 2 ", "srun --nodes 1 --cpus-per-task 1 --time 10 ", "the same"),
    Form(
        r"cifar10:(train|test) (\S+) --download",
        r"embedded:digits:\1 \2",
        "tests need no network: the digits stand for CIFAR-10",
    ),
    Form(
        r"(doctor --data in1k\.beton)",
        r"\1 --recipe simclr-cifar10-r18",
        "a few steps of a ResNet-50 take minutes on two cores",
    ),
    Form(r"(\breport runs/.*)", r"\1 --max-images 60", "fewer images"),
    Form(
        r"(.* --live --port) 8000(.*)",
        r"env --default-signal=INT \1 {port}\2 >live & "
        r"until grep -q http live || ! kill -0 $!; do sleep 0.2; done; kill -INT $!; wait $!",
        "port 8000 may be taken, and somebody has to press Ctrl-C",
    ),
    Form(
        r"--init-from resnet50\.pth",
        "--init-from photos.safetensors",
        "no weights of torchvision without network: the page's own export stands for them",
    ),
    Form(
        r"^make (.*)",
        r"make --dry-run -C {checkout} \1",
        "it sets up the environment that the test runs in; tests/launch/test_setup.py and "
        "test_demo.py run setup and demo",
    ),
    Form(
        r"simclr-r50 \.\.\.(.*)9100 (.*)",
        r"simclr-r50 --data.train train.beton\1{port} \2",
        "the dots stand for a run's settings; port 9100 may be taken",
        "monitoring.md",
    ),
)

NOT_RUN = (
    NotRun(r"^apt-get ", "changes the system; tests/launch/test_setup.py reads what setup.sh runs"),
)

# What lies in a page's folder when its first command runs.
PREPARED: dict[str, tuple[Callable[[Path], None], ...]] = {
    "data.md": (stand_ins.photos,),
    "evaluate.md": (stand_ins.finished_run,),
    "finetune.md": (stand_ins.finished_run,),
    "many-gpus.md": (stand_ins.in1k, stand_ins.shared),
    "monitoring.md": (stand_ins.packed,),
    "objectives.md": (stand_ins.packed,),
    "resume.md": (stand_ins.packed,),
    "slurm.md": (stand_ins.in1k, stand_ins.cluster),
    "training.md": (stand_ins.packed,),
    "watch.md": (stand_ins.trained_run,),
}


def reason_not_to_run(command: str) -> str:
    """Why a command is left out; empty when it runs."""
    return next((left.reason for left in NOT_RUN if re.search(left.pattern, command)), "")


def form_of(command: str, page: str, **values: object) -> str:
    """The command as it runs here."""
    for form in FORMS:
        if form.page in ("", page):
            command = re.sub(form.pattern, form.instead, command)
    for name, value in values.items():
        command = command.replace(f"{{{name}}}", str(value))
    return command
