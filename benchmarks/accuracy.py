"""CIFAR-10 under one budget: SimCLR, MoCo v2 and v3, BYOL, SimSiam, Barlow Twins, VICReg, SwAV and
DINO beside lightly's.

    python benchmarks/accuracy.py --train cifar-train.beton --test cifar-test.beton --json OUT.json

Every contender gets the same encoder with the same initial weights, the same images, global batch,
number of steps, arithmetic, threads and loader workers; each crops and augments as its own CIFAR-10
recipe says. Encoders are then judged by the same code: weighted nearest neighbours and logistic
regression on frozen features, all training images against all test images.

Recipes are made for hundreds of epochs, and this budget is a few. So `--search` chooses each
contender's learning rate, ours and theirs alike, as a multiple of its recipe's: by short runs,
judged on held-out training images; the test set has no part in it. Warm-up, where a recipe has any,
is a tenth of the run.

Time per step is taken apart from that: contenders take turns of some steps each, loader and
optimizer included; the first steps of a turn, which live on batches read ahead, do not count.
"""

import argparse
import dataclasses
import itertools
import json
import statistics
import tempfile
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import torch
from _accuracy_budget import Budget, encoder_config, read_images
from _accuracy_judging import judge, judge_held_out
from _accuracy_report import PIXELS, UNTRAINED, Report, print_table
from loader import cpu_seconds  # benchmarks/loader.py
from torch import nn

from data_pipeline.reading.pool import LoaderConfig
from trainer.config import DataConfig, RunConfig
from trainer.evaluation.load_encoder import load_encoder
from trainer.loop import fit
from trainer.objectives.parts.multi_crop import MultiCropConfig
from trainer.optim.optimizers import scaled_lr
from trainer.recipes import RECIPES
from trainer.telemetry import TelemetryConfig

AHEAD = 5  # steps at the start of a turn that are not timed: two batches for each of two workers
# Of our rates, which are made for 800 epochs and more: lightly's is four times ours for MoCo, as is
# digits-demo's, whose run is short, for LARS.
SHORT = 4.0
OnStep = Callable[[], None]


@dataclass(frozen=True)
class Trained:
    encoder: nn.Module
    loss: float  # of the last step


@dataclass(frozen=True)
class Contender:
    name: str
    beside: str | None  # contender of ours that a peer is compared with
    train: Callable[[Budget, float, Path, OnStep], Trained]  # rate factor, folder for a run
    describe: Callable[[Budget, float], str]
    factor: float = 1.0  # of its recipe's learning rate in a run of a few epochs, if not searched
    rate_of: str | None = None  # contender whose search it shares


def our_config(recipe: str, budget: Budget, factor: float, out: Path) -> RunConfig:
    """A recipe with the budget's settings: what `widebatch pretrain` would make of overrides."""
    base = RECIPES[recipe]()
    steps_per_epoch = len(read_images(budget.train).labels_N) // budget.batch
    schedule = dataclasses.replace(
        base.schedule,
        warmup_epochs=budget.warmup_steps / steps_per_epoch if base.schedule.warmup_epochs else 0.0,
        cosine_per="step",
    )
    objective = base.objective
    if isinstance(objective, MultiCropConfig):  # two views, as lightly's have on CIFAR-10
        objective = dataclasses.replace(objective, small_views=0)
    return dataclasses.replace(
        base,
        objective=objective,
        data=DataConfig(train=(budget.train,)),
        out=out,
        batch=budget.batch,
        steps=budget.steps,
        seed=budget.seed,
        precision=budget.precision,
        device="cpu",
        encoder=budget.encoder,
        loader=LoaderConfig(workers=budget.workers),
        optim=dataclasses.replace(base.optim, base_lr=factor * base.optim.base_lr),
        schedule=schedule,
        telemetry=TelemetryConfig(tensorboard=False),
    )


def our_name(recipe: str) -> str:
    return f"widebatch {recipe}"


def ours(recipe: str) -> Contender:
    def train(budget: Budget, factor: float, out: Path, on_step: OnStep) -> Trained:
        def stop_requested() -> bool:  # the loop asks once a step
            on_step()
            return False

        fit(our_config(recipe, budget, factor, out), stop_requested)
        _check_start(out, budget)
        last = json.loads((out / "metrics.jsonl").read_text().splitlines()[-1])
        return Trained(load_encoder(str(out)).encoder, last["loss"])

    def describe(budget: Budget, factor: float) -> str:
        config = our_config(recipe, budget, factor, Path())
        optim, loss = config.optim, config.objective
        warmup = f", {budget.warmup_steps} warm-up steps" if config.schedule.warmup_epochs else ""
        method = "".join(
            f", {name} {getattr(loss, name)}"
            for name in ("temperature", "queue", "momentum")
            if hasattr(loss, name)
        )
        return (
            f"{optim.name} at {scaled_lr(optim, budget.batch):.3g}, decay {optim.weight_decay:g}, "
            f"cosine{warmup}{method}; "
            f"head {config.head.hidden_dim}-{config.head.out_dim}"
        )

    return Contender(our_name(recipe), None, train, describe, SHORT)


def _check_start(out: Path, budget: Budget) -> None:
    """Peers start from `initial_encoder`; hold our run to the same weights."""
    started = load_encoder(f"untrained:{out}").encoder.state_dict()
    for name, value in budget.initial_encoder().state_dict().items():
        assert torch.equal(value, started[name]), name


def contenders() -> list[Contender]:
    import _accuracy_lightly as peer

    def theirs(
        name: str,
        beside: str,
        settings: peer.Settings,
        factor: float = 1.0,
        rate_of: str | None = None,
    ) -> Contender:
        def train(budget: Budget, factor: float, _: Path, on_step: OnStep) -> Trained:
            return Trained(*peer.train(settings, budget, factor, on_step))

        return Contender(name, our_name(beside), train, settings.describe, factor, rate_of)

    simclr, mocov2, mocov3 = (f"{name}-cifar10-r18" for name in ("simclr", "mocov2", "mocov3"))
    lars = peer.Settings("simclr", "lars", rate_per_256=1.0, weight_decay=1e-6)
    symmetric = peer.Settings("moco-symmetric")
    others = []
    for name in ("byol", "simsiam", "barlowtwins", "vicreg", "swav", "dino"):
        recipe = f"{name}-cifar10-r18"
        settings = peer.Settings(name)
        if name == "swav":  # Adam's rate is what it is at its batch of 512
            settings = peer.Settings(name, "adam", rate_per_256=1e-3, weight_decay=1e-6)
        others += [ours(recipe), theirs(f"lightly {name}", recipe, settings)]
    return [
        ours(simclr),
        theirs("lightly SimCLR", simclr, peer.Settings("simclr")),
        ours(mocov2),
        theirs("lightly MoCo", mocov2, peer.Settings("moco")),
        ours(mocov3),
        theirs("lightly MoCo, symmetric", mocov3, symmetric, rate_of="lightly MoCo"),
        theirs("lightly SimCLR, our optimizer", simclr, lars, SHORT, our_name(simclr)),
        *others,
    ]


def search(contender: Contender, budget: Budget, factors: list[float]) -> dict[float, float]:
    """Held-out kNN accuracy of short runs, by the factor of the learning rate."""
    found = {}
    for factor in factors:
        with tempfile.TemporaryDirectory() as name:
            trained = contender.train(budget, factor, Path(name) / "run", lambda: None)
        found[factor] = judge_held_out(trained.encoder, budget)
    return found


def time_turns(
    found: list[Contender], budget: Budget, rounds: int
) -> dict[str, list[tuple[float, float]]]:
    """Seconds and processor seconds of a step: one pair for each contender and round."""
    turns: dict[str, list[tuple[float, float]]] = {contender.name: [] for contender in found}
    for _ in range(rounds):
        for contender in found:
            stamps: list[tuple[float, float]] = []

            def on_step(stamps: list[tuple[float, float]] = stamps) -> None:
                stamps.append((time.perf_counter(), cpu_seconds()))

            with tempfile.TemporaryDirectory() as name:
                contender.train(budget, 1.0, Path(name) / "run", on_step)
            walls = [stamp[0] for stamp in stamps[AHEAD - 1 :]]
            steps = [after - before for before, after in itertools.pairwise(walls)]
            processor = (stamps[-1][1] - stamps[AHEAD - 1][1]) / len(steps)
            turns[contender.name].append((statistics.median(steps), processor))
    return turns


def parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    add = parser.add_argument
    add("--train", type=Path, help="CIFAR-10's training images, made by `widebatch pack`")
    add("--test", type=Path, help="its test images")
    add("--encoder", default="resnet8x2", help="resnet8x2, resnet20, resnet18...")
    add("--batch", type=int, default=128, help="images per step")
    add("--steps", type=int, default=390)
    add("--seeds", type=int, nargs="+", default=[0])
    add(
        "--search",
        type=float,
        nargs="*",
        default=[1, 4],
        help="factors of the learning rates; none: no search",
    )
    add("--search-steps", type=int, default=80, help="of a short run for each factor")
    add("--rounds", type=int, default=3, help="turns of each contender for the time; 0: no times")
    add("--turn", type=int, default=10, help="timed steps of a turn")
    add("--precision", choices=["bf16", "fp32"], default="bf16")
    add("--threads", type=int, default=1, help="of torch: more only where cores are free")
    add("--workers", type=int, default=2, help="of each loader: our threads, their processes")
    add("--only", nargs="+", help="contenders whose name has one of these in it: byol swav")
    add("--without", nargs="+", default=[], help="contenders whose name has one of these in it")
    add("--json", type=Path, help="write every measurement there, as it comes")
    return parser.parse_args()


def main() -> None:
    args = parse()
    if args.train is None or args.test is None:
        print("left out: this needs CIFAR-10, packed: --train FILE.beton --test FILE.beton")
        return
    torch.set_num_threads(args.threads)
    settings = {key: str(value) for key, value in vars(args).items() if key != "json"}
    report = Report(args.json, settings)
    chosen = [
        one
        for one in contenders()
        if not any(part in one.name for part in args.without)
        and any(part in one.name.lower() for part in args.only or [""])
    ]
    base = Budget(
        train=args.train,
        test=args.test,
        encoder=encoder_config(args.encoder),
        batch=args.batch,
        steps=args.steps,
        seed=args.seeds[0],
        precision=args.precision,
        workers=args.workers,
    )
    epochs = args.steps * args.batch / len(read_images(args.train).labels_N)
    print(
        f"{args.train.name}, {args.encoder}, batch {args.batch}, {args.steps} steps = "
        f"{epochs:.2f} epochs, {args.precision}, {args.threads} threads, {args.workers} workers",
        flush=True,
    )
    factors = choose_rates(chosen, base, args, report)
    if not any(part in PIXELS for part in args.without):
        report.result(PIXELS, base.seed, **judge(nn.Flatten(), base))
    for seed in args.seeds:
        compare(chosen, dataclasses.replace(base, seed=seed), factors, report)
    if args.rounds:
        turn = dataclasses.replace(base, steps=AHEAD + args.turn)
        report.add("seconds per step", time_turns(chosen, turn, args.rounds))
    print_table(report, {contender.name: contender.beside for contender in chosen})


def choose_rates(
    found: list[Contender], base: Budget, args: argparse.Namespace, report: Report
) -> dict[str, float]:
    """Each contender's factor of its learning rate, and its settings in words."""
    short = dataclasses.replace(base, steps=args.search_steps)
    factors: dict[str, float] = {}
    for contender in found:
        tried: dict[float, float] = {}
        if contender.rate_of in factors:
            best = factors[contender.rate_of]
        elif args.search:
            tried = search(contender, short, args.search)
            best = max(tried, key=lambda factor: tried[factor])
        else:
            best = contender.factor
        factors[contender.name] = best
        said = ", ".join(f"x {factor:g}: {100 * knn:.1f}" for factor, knn in tried.items())
        print(f"  {contender.name:36} {contender.describe(base, best)}", flush=True)
        if said:
            print(f"  {'':36} rate chosen by held-out kNN %, {said}", flush=True)
        report.add("rates", {**report.values.get("rates", {}), contender.name: tried})
    report.add("factors", factors)
    report.add("used", {one.name: one.describe(base, factors[one.name]) for one in found})
    return factors


def compare(
    found: list[Contender], budget: Budget, factors: dict[str, float], report: Report
) -> None:
    """Train and judge everyone at one seed."""
    report.result(UNTRAINED, budget.seed, **judge(budget.initial_encoder(), budget))
    for contender in found:
        start = time.perf_counter()
        with tempfile.TemporaryDirectory() as name:
            trained = contender.train(
                budget, factors[contender.name], Path(name) / "run", lambda: None
            )
        minutes = (time.perf_counter() - start) / 60
        figures = judge(trained.encoder, budget)
        report.result(contender.name, budget.seed, **figures, loss=trained.loss, minutes=minutes)


if __name__ == "__main__":
    main()
