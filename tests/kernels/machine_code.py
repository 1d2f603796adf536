"""Compile every Triton kernel for GPUs that are not here, and read what came out.

``python -m tests.kernels.machine_code [--arch 80 90 100] [--only SUBSTRING] [--json]``

Every configuration of :mod:`tests.kernels.compile_cases` is compiled to machine code by the
``ptxas`` that Triton brings, and disassembled: registers, local-memory accesses (spills), shared
memory, tensor-core instructions. The exit status is 1 where a configuration breaks a limit: it
spills, asks for more shared memory than a block may have, or multiplies without tensor cores
although it was written for them. No GPU takes part, and none proves less: this says what a kernel
would run with, not how fast.
"""

import argparse
import json
import re
import subprocess
import sys
import tempfile
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from tests.kernels.compile_cases import KERNELS, CompileCase

ARCHITECTURES = (80, 90, 100)  # A100, H100, B200: compute capability times ten
# Largest dynamic shared memory of a thread block, bytes (CUDA C++ Programming Guide, table of
# technical specifications per compute capability).
SHARED_LIMIT = {80: 163 * 1024, 90: 227 * 1024, 100: 227 * 1024}
REGISTER_LIMIT = 255  # per thread
TENSOR_LIMIT = 512  # columns of tensor memory of a multiprocessor, compute capability 10.0
# mma.sync, warp-group mma, fifth-generation tensor cores.
TENSOR_CORE_INSTRUCTIONS = ("HMMA", "HGMMA", "UTCHMMA", "UTCQMMA")


@dataclass(frozen=True, kw_only=True)
class Report:
    """What one configuration became on one architecture."""

    name: str
    architecture: int
    warps: int
    stages: int
    registers: int = 0
    """Per thread."""
    spills: int = 0
    """Instructions that access local memory."""
    shared: int = 0
    """Bytes per block."""
    tensor_memory: int = 0
    """Columns; compute capability 10.0 only."""
    tensor_cores: str = ""
    """The instruction found and how often: ``HGMMA 32``."""
    problems: tuple[str, ...] = ()


def compile_case(case: CompileCase, architecture: int) -> Report:
    """Compile one configuration for one architecture and read the machine code.

    Args:
        case: the configuration.
        architecture: compute capability times ten: 80, 90 or 100.

    Returns:
        The report; its ``problems`` say which limits are broken, or why nothing was compiled.
    """
    from triton.compiler import CompilationError
    from triton.runtime.errors import OutOfResources, PTXASError

    base: dict[str, Any] = {
        "name": case.name,
        "architecture": architecture,
        "warps": case.warps,
        "stages": case.stages,
    }
    try:
        compiled = _compile(case, architecture)
    except (CompilationError, OutOfResources, PTXASError, RuntimeError) as error:
        return Report(**base, problems=(f"does not compile: {str(error).strip()[-300:]}",))
    registers, instructions = _read_machine_code(compiled.asm["cubin"])
    counts = {name: instructions.count(name) for name in TENSOR_CORE_INSTRUCTIONS}
    found = {
        **base,
        "registers": registers,
        "spills": sum(name in ("LDL", "STL") for name in instructions),
        "shared": compiled.metadata.shared,
        "tensor_memory": getattr(compiled.metadata, "tmem_size", 0) or 0,
        "tensor_cores": ", ".join(f"{name} {count}" for name, count in counts.items() if count),
    }
    return Report(**found, problems=tuple(_problems(case, Report(**found))))


def _compile(case: CompileCase, architecture: int) -> Any:
    import triton
    from triton.backends.compiler import GPUTarget
    from triton.compiler import ASTSource

    position = {name: index for index, name in enumerate(case.kernel.arg_names)}
    missing = set(position) - set(case.signature) - set(case.constants)
    if missing:
        raise RuntimeError(f"arguments without a type or value: {sorted(missing)}")
    source = ASTSource(
        fn=case.kernel,
        signature={name: case.signature.get(name, "constexpr") for name in case.kernel.arg_names},
        constexprs={(position[name],): value for name, value in case.constants.items()},
        attrs={(position[name],): [["tt.divisibility", 16]] for name in case.aligned},
    )
    return triton.compile(
        source,
        target=GPUTarget("cuda", architecture, 32),
        options={"num_warps": case.warps, "num_stages": case.stages},
    )


def _read_machine_code(cubin: bytes) -> tuple[int, list[str]]:
    """Registers per thread, and the name of every instruction."""
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(cubin)
        file.flush()
        usage = _tool("cuobjdump", "-res-usage", file.name)
        assembly = _tool("nvdisasm", "-c", file.name)
    registers = re.search(r"\bREG:(\d+)", usage)
    if registers is None:
        raise RuntimeError(f"cuobjdump reports no registers: {usage[-300:]}")
    # "/*0010*/  @!P0 HMMA.16816.F32 R4, ..." -> HMMA
    names = re.findall(r"^\s*/\*[0-9a-f]+\*/\s+(?:@!?\w+\s+)?([A-Z0-9]+)", assembly, re.MULTILINE)
    return int(registers[1]), names


def _tool(name: str, *arguments: str) -> str:
    import triton

    folder = Path(triton.__file__).parent / "backends" / "nvidia" / "bin"
    done = subprocess.run(
        [str(folder / name), *arguments], capture_output=True, text=True, check=True
    )
    return done.stdout + done.stderr


def _problems(case: CompileCase, report: Report) -> Iterator[str]:
    if report.spills:
        yield f"{report.spills} accesses to local memory"
    if report.registers > REGISTER_LIMIT:
        yield f"{report.registers} registers"
    limit = SHARED_LIMIT[report.architecture]
    if report.shared > limit:
        yield f"{report.shared} bytes of shared memory, {limit} are there"
    if report.tensor_memory > TENSOR_LIMIT:
        yield f"{report.tensor_memory} columns of tensor memory, {TENSOR_LIMIT} are there"
    if case.tensor_cores and not report.tensor_cores:
        yield "no tensor-core instruction"


def table(reports: Sequence[Report]) -> str:
    """The reports as text, one a line."""
    width = max((len(report.name) for report in reports), default=4)
    lines = [f"{'kernel':{width}}  sm_  warps stages  regs spills  shared KiB  tmem  tensor cores"]
    lines += [
        f"{r.name:{width}}  {r.architecture:<4} {r.warps:5} {r.stages:6}  {r.registers:4}"
        f" {r.spills:6}  {r.shared / 1024:10.1f}  {r.tensor_memory:4}  {r.tensor_cores}"
        + "".join(f"\n{'':{width}}  ! {problem}" for problem in r.problems)
        for r in reports
    ]
    return "\n".join(lines)


def main(arguments: Sequence[str] | None = None) -> int:
    """Print the table; return 1 where a limit is broken or there was nothing to compile."""
    parser = argparse.ArgumentParser(
        prog="python -m tests.kernels.machine_code", description=__doc__
    )
    parser.add_argument("--arch", type=int, nargs="+", choices=ARCHITECTURES, default=ARCHITECTURES)
    parser.add_argument("--only", default="", help="only configurations whose name contains this")
    parser.add_argument("--json", action="store_true", help="one JSON object a line")
    options = parser.parse_args(arguments)
    reports = [
        compile_case(case, architecture)
        for cases in KERNELS.values()
        for case in cases()
        if options.only in case.name
        for architecture in options.arch
    ]
    if options.json:
        for report in reports:
            print(json.dumps(asdict(report)))
    else:
        print(table(reports))
    broken = sum(bool(report.problems) for report in reports)
    print(f"{len(reports)} compiled, {broken} break a limit", file=sys.stderr)
    return int(broken > 0 or not reports)


if __name__ == "__main__":
    sys.exit(main())
