"""What holds in every file of the packages: the direction of imports, and what is never written.

The rules read the syntax tree, so that they hold for code no test happens to run. Each rule is
first shown to catch an example of what it forbids.
"""

import ast
import functools
import subprocess
import sys
from collections.abc import Callable, Iterator
from graphlib import CycleError, TopologicalSorter
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]
PACKAGES = ("launch", "trainer", "data_pipeline", "kernels", "common")
FILES = sorted(file for package in PACKAGES for file in (ROOT / package).rglob("*.py"))

# launch -> trainer -> {data_pipeline, kernels} -> common
MAY_IMPORT = {
    "launch": {"launch", "trainer", "data_pipeline", "kernels", "common"},
    "trainer": {"trainer", "data_pipeline", "kernels", "common"},
    "data_pipeline": {"data_pipeline", "common"},
    "kernels": {"kernels", "common"},
    "common": {"common"},
}
EXCEPTIONS = {("data_pipeline/augment.py", "kernels.augment")}

# Rooms of the trainer, each with those below it; those that are not named stand above the loop.
# Loose files stand between: what a run is made of.
ROOMS_BELOW: dict[str, set[str]] = {
    "models": set(),
    "optim": set(),
    "features": set(),
    "telemetry": set(),
    "health": {"telemetry"},
    "state": {"health", "models"},
    "objectives": {"models", "optim", "features"},
    "parallel": {"objectives", "state", "models", "optim"},
}
LOOSE = {"__init__", "config", "loop", "prepare", "run", "step"}

# Code that runs in every step of training: it must not wait for the device.
IN_A_STEP = (
    "kernels/",
    "trainer/loop.py",
    "trainer/objectives/",
    "trainer/optim/lars.py",
    "trainer/optim/sharded_norms.py",
    "trainer/parallel/sync_batch_norm.py",
)

PICKLES = {"pickle", "cPickle", "_pickle", "dill", "cloudpickle", "shelve", "marshal", "joblib"}
WAITS = {"item", "tolist", "cpu", "numpy", "synchronize"}
RANK_NAMES = {"rank", "global_rank", "local_rank", "is_global_zero", "is_rank_zero", "is_source"}
COLLECTIVES = {
    "agreed_share",
    "all_gather",
    "all_gather_into_tensor",
    "all_gather_json",
    "all_gather_single",
    "all_reduce",
    "all_to_all",
    "all_to_all_single",
    "barrier",
    "broadcast",
    "broadcast_json",
    "full_tensor",
    "gather_rows",
    "info_nce",
    "monitored_barrier",
    "model_tensors",
    "nt_xent",
    "optimizer_tensors",
    "permute_rows",
    "reduce",
    "reduce_scatter",
    "reduce_scatter_tensor",
    "scatter",
    "settle_threads",
    "total_norm",
    "whole",
    "whole_encoder",
}

# Of trainer/objectives, what others may import, and ask of an objective's settings.
CONTRACT = {"base", "cost", "registry", "parts"}
ASKED_OF_CONFIGS = {"views", "build", "costs", "compares", "least_samples"}

Rule = Callable[[ast.AST], Iterator[tuple[int, str]]]


@functools.cache
def _tree(file: Path) -> ast.Module:
    return ast.parse(file.read_text(), str(file))


def _calls(tree: ast.AST) -> Iterator[ast.Call]:
    return (node for node in ast.walk(tree) if isinstance(node, ast.Call))


def _name(call: ast.Call) -> str:
    """``dist.all_reduce`` for that call; the last part of anything more involved."""
    return ast.unparse(call.func)


def _last(call: ast.Call) -> str:
    return _name(call).rsplit(".", 1)[-1]


def _imports(tree: ast.AST) -> Iterator[tuple[int, str]]:
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            yield from ((node.lineno, alias.name) for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"line {node.lineno}: relative import"
            yield node.lineno, str(node.module)
            yield from ((node.lineno, f"{node.module}.{alias.name}") for alias in node.names)


def _keyword(call: ast.Call, name: str) -> ast.expr | None:
    return next((k.value for k in call.keywords if k.arg == name), None)


def _is(node: ast.expr | None, value: object) -> bool:
    return isinstance(node, ast.Constant) and node.value is value


# --- rules --------------------------------------------------------------------------------------


def no_pickle(tree: ast.AST) -> Iterator[tuple[int, str]]:
    """Own files are safetensors and JSON; a pickle runs whatever its writer liked."""
    for line, module in _imports(tree):
        if module.split(".")[0] in PICKLES:
            yield line, f"imports {module}"
    for call in _calls(tree):
        weights_only = _keyword(call, "weights_only")
        if _name(call) == "torch.load" and not _is(weights_only, True):
            yield call.lineno, "torch.load without weights_only=True"
        if _keyword(call, "allow_pickle") and not _is(_keyword(call, "allow_pickle"), False):
            yield call.lineno, "allow_pickle"
        if _name(call) == "torch.save":
            yield call.lineno, "torch.save writes a pickle"
        if _name(call) in {"yaml.load", "yaml.unsafe_load", "yaml.full_load"}:
            yield call.lineno, "yaml other than safe_load"


def no_object_collectives(tree: ast.AST) -> Iterator[tuple[int, str]]:
    """torch's collectives for objects unpickle what another rank sent."""
    for call in _calls(tree):
        if _last(call).endswith(("_object", "_object_list")):
            yield call.lineno, _name(call)


def no_code_from_text(tree: ast.AST) -> Iterator[tuple[int, str]]:
    """No eval, no exec, no shell."""
    for call in _calls(tree):
        if _name(call) in {"eval", "exec", "os.system", "os.popen", "subprocess.getoutput"}:
            yield call.lineno, _name(call)
        shell = _keyword(call, "shell")
        if shell is not None and not _is(shell, False):
            yield call.lineno, "shell="


def no_silent_except(tree: ast.AST) -> Iterator[tuple[int, str]]:
    """An error is handled, or it is passed on."""
    for node in ast.walk(tree):
        if isinstance(node, ast.ExceptHandler):
            broad = node.type is None or ast.unparse(node.type) in {"Exception", "BaseException"}
            idle = all(
                isinstance(statement, ast.Pass | ast.Continue)
                or (isinstance(statement, ast.Expr) and isinstance(statement.value, ast.Constant))
                for statement in node.body
            )
            if node.type is None:
                yield node.lineno, "bare except"
            elif broad and idle:
                yield node.lineno, "except that hides every error"
        elif isinstance(node, ast.Call) and _last(node) == "suppress":
            for error in node.args:
                if ast.unparse(error) in {"Exception", "BaseException"}:
                    yield node.lineno, "suppress that hides every error"


def no_collective_on_some_ranks(tree: ast.AST) -> Iterator[tuple[int, str]]:
    """A collective that one rank skips hangs all the others."""
    for node in ast.walk(tree):
        if not isinstance(node, ast.If | ast.IfExp) or not _asks_for_rank(node.test):
            continue
        branches = [node.body, node.orelse]
        for part in branches:
            for statement in part if isinstance(part, list) else [part]:
                for call in _calls(statement):
                    if _last(call) in COLLECTIVES and "functional" not in _name(call):
                        yield call.lineno, f"{_name(call)} on some ranks only"


def _asks_for_rank(test: ast.expr) -> bool:
    names = {n.id for n in ast.walk(test) if isinstance(n, ast.Name)}
    names |= {n.attr for n in ast.walk(test) if isinstance(n, ast.Attribute)}
    return bool(names & RANK_NAMES)


def no_wait_for_the_device(tree: ast.AST) -> Iterator[tuple[int, str]]:
    """A step never waits for the GPU: no ``.item()`` and its like."""
    for call in _calls(tree):
        if isinstance(call.func, ast.Attribute) and call.func.attr in WAITS:
            yield call.lineno, f".{call.func.attr}()"


def no_objective_in_particular(tree: ast.AST) -> Iterator[tuple[int, str]]:
    """Outside objectives and recipes nothing knows one objective from another: it asks them."""
    for line, module in _imports(tree):
        parts = module.split(".")
        if parts[:2] == ["trainer", "objectives"] and len(parts) > 2 and parts[2] not in CONTRACT:
            yield line, f"imports {module}"
    for node in ast.walk(tree):
        if (
            isinstance(node, ast.Attribute)
            and isinstance(node.value, ast.Attribute)
            and node.value.attr == "objective"
            and ast.unparse(node.value.value).endswith("config")
            and node.attr not in ASKED_OF_CONFIGS
        ):
            yield node.lineno, ast.unparse(node)


EVERYWHERE: list[Rule] = [
    no_pickle,
    no_object_collectives,
    no_code_from_text,
    no_silent_except,
    no_collective_on_some_ranks,
]


# --- the rules see what they forbid -------------------------------------------------------------

FORBIDDEN: list[tuple[Rule, str]] = [
    (no_pickle, "import pickle"),
    (no_pickle, "from pickle import loads"),
    (no_pickle, "torch.load(f)"),
    (no_pickle, "torch.load(f, weights_only=False)"),
    (no_pickle, "torch.save(x, f)"),
    (no_pickle, "numpy.load(f, allow_pickle=True)"),
    (no_pickle, "yaml.load(f)"),
    (no_object_collectives, "dist.all_gather_object(out, x)"),
    (no_object_collectives, "dist.broadcast_object_list(x)"),
    (no_code_from_text, "eval(text)"),
    (no_code_from_text, "exec(text)"),
    (no_code_from_text, "os.system(text)"),
    (no_code_from_text, "subprocess.run(text, shell=True)"),
    (no_silent_except, "try: f()\nexcept: raise"),
    (no_silent_except, "try: f()\nexcept Exception: pass"),
    (no_silent_except, "while 1:\n try: f()\n except BaseException: continue"),
    (no_silent_except, "with contextlib.suppress(Exception): f()"),
    (no_collective_on_some_ranks, "if rank == 0:\n dist.barrier()"),
    (no_collective_on_some_ranks, "if fabric.is_global_zero:\n pass\nelse:\n broadcast_json(1)"),
    (no_wait_for_the_device, "loss.item()"),
    (no_objective_in_particular, "from trainer.objectives.moco import MoCoConfig"),
    (no_objective_in_particular, "run.config.objective.temperature"),
    (no_objective_in_particular, "if config.objective.name == 'simclr': pass"),
]
ALLOWED: list[tuple[Rule, str]] = [
    (no_pickle, "torch.load(f, weights_only=True)"),
    (no_code_from_text, "model.eval()"),
    (no_code_from_text, "subprocess.run([a], shell=False)"),
    (no_silent_except, "try: f()\nexcept FileNotFoundError: pass"),
    (no_silent_except, "try: f()\nexcept Exception as e: g(e)"),
    (no_collective_on_some_ranks, "if size > 1:\n dist.barrier()"),
    (no_collective_on_some_ranks, "if rank == 0:\n write()\ndist.barrier()"),
    (no_objective_in_particular, "from trainer.objectives.base import Objective"),
    (no_objective_in_particular, "config.objective.costs(8, 1, 128, crop)"),
]


@pytest.mark.parametrize(("rule", "code"), FORBIDDEN, ids=[code for _, code in FORBIDDEN])
def test_rule_catches(rule: Rule, code: str) -> None:
    assert list(rule(ast.parse(code)))


@pytest.mark.parametrize(("rule", "code"), ALLOWED, ids=[code for _, code in ALLOWED])
def test_rule_permits(rule: Rule, code: str) -> None:
    assert not list(rule(ast.parse(code)))


# --- and the packages keep them -----------------------------------------------------------------


def _findings(rule: Rule, files: list[Path]) -> list[str]:
    return [
        f"{file.relative_to(ROOT)}:{line}: {finding}"
        for file in files
        for line, finding in rule(_tree(file))
    ]


@pytest.mark.parametrize("rule", EVERYWHERE, ids=[rule.__name__ for rule in EVERYWHERE])
def test_packages_keep(rule: Rule) -> None:
    assert len(FILES) > 10
    assert not _findings(rule, FILES), rule.__doc__


def test_nothing_in_a_step_waits_for_the_device() -> None:
    # cpu.py: kernels for tensors that no device holds.
    in_a_step = [f for f in FILES if f.relative_to(ROOT).as_posix().startswith(IN_A_STEP)]
    files = [f for f in in_a_step if f.name != "cpu.py"]
    assert len(files) > 3
    assert not _findings(no_wait_for_the_device, files)


def test_no_objective_is_known_by_name_outside_its_room() -> None:
    rooms = ("trainer/objectives/", "trainer/recipes/")
    files = [f for f in FILES if not f.relative_to(ROOT).as_posix().startswith(rooms)]
    assert not _findings(no_objective_in_particular, files)


def _wrong_way(file: str, module: str) -> bool:
    top = module.split(".")[0]
    if top not in PACKAGES or top in MAY_IMPORT[file.split("/")[0]]:
        return False
    return not any(file == f and (module + ".").startswith(m + ".") for f, m in EXCEPTIONS)


def test_imports_go_one_way() -> None:
    wrong = []
    for file in FILES:
        place = file.relative_to(ROOT).as_posix()
        for line, module in _imports(_tree(file)):
            if _wrong_way(place, module):
                wrong.append(f"{place}:{line} imports {module}")
    assert not wrong


def test_the_direction_of_imports_is_the_one_of_the_design() -> None:
    assert _wrong_way("common/collectives.py", "kernels")
    assert _wrong_way("trainer/loop.py", "launch")
    assert _wrong_way("data_pipeline/crops.py", "kernels.augment")
    assert _wrong_way("data_pipeline/augment.py", "kernels.ntxent")
    assert not _wrong_way("data_pipeline/augment.py", "kernels.augment.reference")
    assert not _wrong_way("trainer/objectives/simclr.py", "kernels.ntxent.nt_xent")


def _graph() -> dict[str, set[str]]:
    """Files that each file imports, by their dotted names."""
    names = {
        ".".join(file.relative_to(ROOT).with_suffix("").parts).removesuffix(".__init__"): file
        for file in FILES
    }
    return {
        name: {module for _, module in _imports(_tree(file)) if module in names} - {name}
        for name, file in names.items()
    }


def _packages_aside(graph: dict[str, set[str]]) -> dict[str, set[str]]:
    """Without what ``from package import file`` says of the package beside the file."""
    return {
        name: {m for m in modules if not any(n.startswith(m + ".") for n in modules)}
        for name, modules in graph.items()
    }


def _circles(graph: dict[str, set[str]]) -> list[tuple[str, ...]]:
    try:
        TopologicalSorter(graph).prepare()
    except CycleError as circle:
        return [tuple(circle.args[1])]
    return []


def test_no_circle_of_files() -> None:
    assert _circles({"a": {"b"}, "b": {"c"}, "c": {"a"}})
    assert not _circles(_packages_aside(_graph()))


def _room(module: str) -> str:
    """``trainer.state`` for what lies in it, ``data_pipeline.packing`` too; else empty."""
    parts = module.split(".")
    rooms = {"trainer": 3, "data_pipeline": 3}
    return ".".join(parts[:2]) if len(parts) >= rooms.get(parts[0], 99) else ""


def _wrong_room(module: str, imported: str) -> bool:
    room, other = _room(module), _room(imported)
    if not room or not other or room == other:
        return False
    if room.startswith("data_pipeline"):
        return room != "data_pipeline.packing"
    below = ROOMS_BELOW.get(room.split(".")[1])
    name = other.split(".")[1]
    return other.startswith("trainer") and below is not None and name not in below


def test_rooms_know_only_those_below_them() -> None:
    assert _wrong_room("trainer.models.heads", "trainer.objectives.moco")
    assert _wrong_room("data_pipeline.reading.loader", "data_pipeline.packing.pack")
    assert not _wrong_room("trainer.parallel.fsdp", "trainer.models.encoders")
    graph = _graph()
    wrong = [(m, i) for m, modules in graph.items() for i in modules if _wrong_room(m, i)]
    assert not wrong
    between = {
        (_room(m), _room(i))
        for m, modules in graph.items()
        for i in modules
        if _room(m) and _room(i)
    }
    rooms: dict[str, set[str]] = {room: set() for pair in between for room in pair}
    for room, other in between:
        rooms[room] |= {other} - {room}
    assert not _circles(rooms)


def test_a_newcomer_finds_few_loose_files_in_the_trainer() -> None:
    assert {file.stem for file in (ROOT / "trainer").glob("*.py")} == LOOSE


def test_the_front_door_opens_without_torch() -> None:
    """``--help`` and a batch script's questions must not pay seconds for heavy imports."""
    modules = [
        ".".join(file.relative_to(ROOT).with_suffix("").parts)
        for file in sorted((ROOT / "launch").rglob("*.py"))
    ]
    heavy = ["torch", "ffcv", "numba", "deepspeed", "lightning_fabric", "sklearn", "matplotlib"]
    code = (
        f"import importlib, sys\nfor m in {modules!r}: importlib.import_module(m)\n"
        f"print(*[m for m in {heavy!r} if m in sys.modules])"
    )
    done = subprocess.run(
        [sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, timeout=120
    )
    assert done.returncode == 0, done.stderr
    assert done.stdout.split() == []
