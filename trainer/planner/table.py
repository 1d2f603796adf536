"""A plan for a person: what fits, what travels, what is waited for, what it costs."""

import math

from trainer.planner.plan import Plan

_WHAT = {
    "parameters": "weights of all networks, fp32",
    "gradients": "of what is trained",
    "optimizer": "velocities or moments",
    "buffers": "BatchNorm statistics, queue",
    "crops": "uint8, batches read ahead included",
    "views": "augmented, in the compute dtype",
    "activations": "kept for the backward pass, autocast's copies of weights included",
    "loss": "rows of all processes, projections of all pieces",
    "temporaries": "of the backward pass",
    "allocator": "rounding and fragments",
    "context": "libraries, workspaces, communication buffers",
}


def table(plan: Plan) -> str:
    """The whole plan, lines under headings."""
    parts = [_head(plan), _memory(plan), _traffic(plan), _time(plan), _input(plan), _rates(plan)]
    return "\n\n".join(part for part in parts if part)


def verdict(plan: Plan) -> list[str]:
    """Whether it fits and what to change, a line each."""
    needed, limit = plan.memory.total, plan.memory.limit
    if plan.fits:
        return [f"fits      {_size(needed)} of {_size(limit)} per process"]
    lines = [f"DOES NOT FIT: {_size(needed)} of {_size(limit)} per process"]
    if plan.remedy is None:
        return lines
    if plan.remedy.gpus:
        lines.append(f"  {plan.remedy.gpus} GPUs are the least that hold it as it is")
    if plan.remedy.activation_checkpointing:
        lines.append("  --activation-checkpointing fits: the encoder then runs forward twice")
    if plan.remedy.micro_batch:
        lines.append(
            f"  --micro-batch {plan.remedy.micro_batch} fits: the networks then take"
            f" {plan.remedy.exact_passes:.0f} times as long, with exact BatchNorm;"
            " with --micro-batch-norm piece 4/3 times"
        )
    if len(lines) == 1:
        lines.append("  no micro-batch and no number of GPUs helps: take a smaller encoder or crop")
    return lines


def _head(plan: Plan) -> str:
    world = plan.nodes * plan.gpus
    name = f"{plan.nodes} x {plan.gpus} {plan.device}" if world > 1 else plan.device
    lines = [f"{plan.recipe or 'run'} on {name}, {plan.precision}", "", *verdict(plan)]
    lines += plan.run.lines()
    if plan.micro_batch < plan.run.local_batch:
        pieces = math.ceil(plan.run.local_batch / plan.micro_batch)
        lines.append(
            f"pieces    {pieces} of at most {plan.micro_batch} images per process and step"
        )
    lines.append(
        f"network   {plan.parameters / 1e6:.2f} M parameters, {plan.trainable / 1e6:.2f} M trained,"
        f" {plan.flops / 1e12:.3g} TFLOP per process and step"
    )
    return "\n".join(lines)


def _memory(plan: Plan) -> str:
    total, limit = plan.memory.total, plan.memory.limit
    lines = ["memory of a process at its peak (0: not there at that moment)"]
    lines += [
        f"  {part.name:12} {_size(part.bytes):>10}  {_WHAT[part.name]}"
        for part in plan.memory.parts
    ]
    return "\n".join(
        [*lines, f"  {'total':12} {_size(total):>10}  {total / limit:.0%} of {_size(limit)}"]
    )


def _traffic(plan: Plan) -> str:
    if not plan.flows:
        return ""
    lines = [
        "sent in a step                     by a GPU,   by a node,   calls      time",
        "                                      NVLink      network",
    ]
    lines += [
        f"  {flow.part:30} {_size(flow.nvlink_bytes):>11} {_size(flow.network_bytes):>12}"
        f" {flow.collectives:7}  {_seconds(flow.seconds):>8}"
        f"{'  beside backward' if flow.overlapped else ''}"
        for flow in plan.flows
    ]
    return "\n".join(lines)


def _time(plan: Plan) -> str:
    time = plan.time
    rows = {
        "augmentation": time.augment,
        "forward": time.passes * time.forward,
        "backward": time.passes * time.backward,
        "loss": time.loss,
        "update": time.update,
        "communication waited for": time.exposed,
        "loader, beside these": time.loader,
    }
    return "\n".join(
        [
            f"step {_seconds(time.seconds)}, bound by the {time.bottleneck}",
            *(f"  {name:26} {_seconds(value):>9}" for name, value in rows.items()),
            f"run       {plan.images_per_second:,.0f} images/s, {plan.hours:.3g} hours,"
            f" {plan.gpu_hours:.4g} GPU-hours; checkpoints and evaluations not counted",
        ]
    )


def _input(plan: Plan) -> str:
    need = plan.input
    return (
        f"each node needs, for {need.images_per_second:,.0f} images/s\n"
        f"  loader    {need.cores:.1f} cores at {need.core_rate:,.0f} images/s each"
        f" (it has {plan.rates.cores * plan.gpus:.0f})\n"
        f"  disk      {need.disk_bytes / 1e6:,.0f} MB/s until the file"
        f" ({_size(need.file_bytes)}) is in the page cache"
    )


def _rates(plan: Plan) -> str:
    rates, measured = plan.rates, plan.rates.calibration
    if measured is not None:
        batches = " and ".join(str(batch) for batch in measured.batches)
        text = f"rates: measured here at batches of {batches}, on one process; links are stated"
    else:
        text = (
            f"rates: stated, none measured: {rates.gpu.flops_fraction:.0%} of"
            f" {rates.gpu.flops / 1e12:.0f} TFLOP/s, {rates.gpu.bandwidth_fraction:.0%} of"
            f" {rates.gpu.bandwidth / 1e12:.2f} TB/s; --calibrate measures"
        )
    if plan.nodes * plan.gpus > 1:
        text += (
            f"\n       links: NVLink {rates.nvlink_fraction:.0%} of"
            f" {rates.gpu.nvlink / 1e9:.0f} GB/s, network {rates.link_fraction:.0%} of"
            f" {rates.link_bytes * 8 / 1e9:.0f} Gb/s per node"
        )
    return f"{text}\n       images: {plan.images.source}"


def _size(count: float) -> str:
    for unit, scale in (("GiB", 2**30), ("MiB", 2**20), ("KiB", 2**10)):
        if count >= scale:
            value = count / scale
            return f"{value:.4g} {unit}" if value < 1000 else f"{value:.0f} {unit}"
    return f"{count:.0f} B"


def _seconds(value: float) -> str:
    return f"{value:.3g} s" if value >= 1 else f"{1e3 * value:.3g} ms"
