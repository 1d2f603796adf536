"""``widebatch plan RECIPE``: whether a run fits a cluster, and what it costs, before it queues."""

import argparse
import logging
from collections.abc import Sequence
from dataclasses import fields, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from common.bounds import check_bounds
from common.errors import ConfigError
from common.files.strict_json import dump_json
from launch.arguments import Parser, unknown
from launch.exit_codes import ExitCode
from launch.settings_arguments import check_recipe, parse_settings, refuse_unknown
from trainer.planner.rates import GPUS, Gpu, Rates

if TYPE_CHECKING:
    from trainer.config import RunConfig

_DESCRIPTION = """\
Say whether a run fits a cluster, what to change if not, what it sends, how long it takes and what
bounds it. The networks are counted without data or GPU; times are from stated rates, or from this
machine's with --calibrate. All settings of `widebatch pretrain RECIPE` can be given too, and
`widebatch pretrain --help` lists the recipes.
"""
_EPILOG = """\
examples:
  widebatch plan simclr-r50 --batch 16384 --nodes 4 --gpus 8 --gpu h100-80g
  widebatch plan simclr-r50 --batch 4096 --gpus 8 --gpu a100-40g --micro-batch 256 --json
  widebatch plan digits-demo --data.train digits.beton --calibrate
"""
_UNNAMED = (Path("its data set"),)
# Options: a field of Rates or of Gpu, the unit that it is given in, what it may be, and what it is.
_ANY = "(0, inf)"
_RATES = {
    "loader_rate": ("loader_rate", 1, _ANY, "images that a core decodes and crops in a second"),
    "cores": ("cores", 1, _ANY, "cores for the loader of each GPU (default 12)"),
    "link_gbps": ("link_bytes", 1e9 / 8, _ANY, "a node's network, Gb/s each way (default 400)"),
    "nvlink_gbs": ("nvlink", 1e9, _ANY, "a GPU to the others of its node, GB/s each way"),
    "gpu_memory_gib": ("memory", 2**30, _ANY, "memory of a GPU"),
    "flops_fraction": ("flops_fraction", 1, "(0, 1]", "of the peak that convolutions attain"),
    "bandwidth_fraction": (
        "bandwidth_fraction",
        1,
        "(0, 1]",
        "of the memory bandwidth that the rest attains",
    ),
}
_OTHER_GPU = "for another, the nearest with its --gpu-memory-gib"


def main(arguments: Sequence[str]) -> ExitCode:
    """Run the command; ``arguments`` are those after ``plan``."""
    parser = command_parser()
    if not arguments or arguments[0] in ("-h", "--help"):
        parser.print_help()
        return ExitCode.DONE if arguments else ExitCode.USAGE
    recipe = arguments[0]
    check_recipe(recipe)
    args, overrides = parser.parse_known_args(arguments[1:])
    own = [option for action in parser._actions for option in action.option_strings]
    refuse_unknown(f"widebatch plan {recipe}", overrides, own)
    if not {"-h", "--help"} & set(overrides):
        _check(args)
    config = parse_settings(
        "plan", recipe, overrides, train=_UNNAMED, other_options=own, text=_DESCRIPTION
    )
    return _plan(args, config, known=config.data.train != _UNNAMED)


def command_parser() -> argparse.ArgumentParser:
    """The command's own options; settings of a recipe are tyro's to read."""
    parser = Parser(
        prog="widebatch plan",
        passes_on=True,
        usage="widebatch plan RECIPE [--gpu NAME | --calibrate] [options] [settings]",
        description=_DESCRIPTION,
        epilog=_EPILOG,
        allow_abbrev=False,
        add_help=False,  # --help after a recipe is for its settings
    )
    parser.add_argument(
        "--gpu", type=_gpu, choices=tuple(GPUS), metavar="NAME", help=f"one of {', '.join(GPUS)}"
    )
    parser.add_argument("--nodes", type=int, default=1, metavar="N", help="machines (default 1)")
    parser.add_argument(
        "--gpus", type=int, default=1, metavar="N", help="GPUs, or processes, of each (default 1)"
    )
    parser.add_argument(
        "--images",
        type=int,
        metavar="N",
        help="images to train on (default: those of --data.train, or the recipe's data set)",
    )
    parser.add_argument(
        "--calibrate",
        action="store_true",
        help="train a few steps on this machine and use what they took in place of stated rates",
    )
    parser.add_argument("--json", action="store_true", help="print the plan as JSON")
    group = parser.add_argument_group("rates, in place of the stated ones")
    for name, (_, _, _, text) in _RATES.items():
        group.add_argument(f"--{name.replace('_', '-')}", type=float, metavar="X", help=text)
    return parser


def _gpu(name: str) -> str:
    if name not in GPUS:
        raise argparse.ArgumentTypeError(f"{unknown('GPU', name, GPUS)} ({_OTHER_GPU})")
    return name


def _check(args: argparse.Namespace) -> None:
    if args.calibrate and args.gpu:
        raise ConfigError("--gpu and --calibrate: one names a GPU, the other measures this machine")
    if not args.calibrate and not args.gpu:
        raise ConfigError(
            f"--gpu NAME is one of {', '.join(GPUS)} ({_OTHER_GPU}); --calibrate measures this one"
        )
    for name in ("flops_fraction", "bandwidth_fraction", "gpu_memory_gib"):
        if args.calibrate and getattr(args, name) is not None:
            flag = name.replace("_", "-")
            raise ConfigError(f"--{flag}: --calibrate measures that; leave one of them out")
    bounds = {name: interval for name, (_, _, interval, _) in _RATES.items()}
    check_bounds(args, "--", nodes="[1, inf)", gpus="[1, inf)", images="[1, inf)", **bounds)


def _plan(args: argparse.Namespace, config: "RunConfig", known: bool) -> ExitCode:
    from trainer.planner.plan import images_of, make_plan, plan_to_json
    from trainer.planner.table import table
    from trainer.planner.traffic import Cluster

    images = images_of(config, args.images, known)
    cluster = Cluster(nodes=args.nodes, gpus=args.gpus, rates=_rates(args, config, known))
    plan = make_plan(config, cluster, images)
    print(dump_json(plan_to_json(plan), indent=1) if args.json else table(plan))
    return ExitCode.DONE


def _rates(args: argparse.Namespace, config: "RunConfig", known: bool) -> Rates:
    given: dict[str, Any] = {}
    for name, (field, unit, _, _) in _RATES.items():
        if getattr(args, name) is not None:
            given[field] = getattr(args, name) * unit
    of_gpu = {field.name: given.pop(field.name) for field in fields(Gpu) if field.name in given}
    rates = Rates(gpu=replace(GPUS[args.gpu or "a100-80g"], **of_gpu), **given)
    if not args.calibrate:
        return rates
    from trainer.planner.calibrate import calibrate

    logging.getLogger(__name__).info("measuring: a few steps at two small batches")
    return calibrate(config, known, rates)
