"""The security rules, held against the code and against a real run.

What the syntax tree can show of all files (no pickle, no object collectives, no code from text) is
in ``test_architecture.py``; here is the rest.
"""

import ast
import dataclasses
import functools
import http.client
import os
import re
import socket
import stat
from pathlib import Path

import pytest

from tests.dist import run_ranks
from tests.monitoring.scrapes import NODES, RUN_FACTS
from tests.test_architecture import FILES, ROOT
from tests.trainer.runs import SMALL_ENCODER, pack_images
from tests.trainer.tiny import tiny_config
from trainer.config import RunConfig, from_json, to_json
from trainer.telemetry import TelemetryConfig
from trainer.telemetry.prometheus import Prometheus

SECRETS = {
    "WIDEBATCH_TEST_TOKEN": "hunter2-token",
    "AWS_SECRET_ACCESS_KEY": "hunter2-key",
    "WANDB_API_KEY": "hunter2-wandb",
    "DATABASE_PASSWORD": "hunter2-password",
}


@functools.cache
def _nodes(file: Path) -> list[ast.AST]:
    return list(ast.walk(ast.parse(file.read_text())))


def _calls(file: Path) -> list[ast.Call]:
    return [node for node in _nodes(file) if isinstance(node, ast.Call)]


def _where(words: set[str]) -> set[str]:
    """Files of the packages with a call whose last name is one of ``words``."""
    return {
        file.relative_to(ROOT).as_posix()
        for file in FILES
        for call in _calls(file)
        if ast.unparse(call.func).rsplit(".", 1)[-1] in words
    }


# --- the code -----------------------------------------------------------------------------------


def test_nothing_reads_yaml() -> None:
    """Own files are JSON; a reader that is not there runs no tag."""
    for file in FILES:
        for node in _nodes(file):
            names = [alias.name for alias in node.names] if isinstance(node, ast.Import) else []
            names += [str(node.module)] if isinstance(node, ast.ImportFrom) else []
            assert not {name.split(".")[0] for name in names} & {"yaml", "ruamel", "omegaconf"}


def test_weights_are_unpickled_in_one_place_only() -> None:
    """``--init-from``, where test_architecture.py asks for weights_only=True."""
    for file in FILES:
        may = file.relative_to(ROOT).as_posix() == "trainer/models/init_from.py"
        for call in _calls(file):
            name = ast.unparse(call.func)
            assert may or name != "torch.load", file
            assert name not in {"load_state_dict_from_url", "torch.hub.load"}, file
            assert name not in {"np.load", "numpy.load", "torch.package.PackageImporter"}, file


def test_code_named_by_a_text_is_imported_in_known_places_only() -> None:
    """A recipe may name an encoder's code; a file from elsewhere may not (see weights.py)."""
    assert _where({"import_module", "__import__", "run_path", "run_module"}) <= {
        "launch/evaluate_command.py",  # the trainer's, by a fixed table
        "trainer/models/encoders.py",
        "trainer/recipes/__init__.py",  # its own folder's modules, as pkgutil lists them
    }
    assert not _where({"compile_command", "literal_eval", "loads_pickle"})


def test_json_from_files_is_read_strictly_where_it_may_come_from_elsewhere() -> None:
    for name in ("data_pipeline/reading/manifest.py", "trainer/evaluation/load_encoder.py"):
        assert "json.load" not in (ROOT / name).read_text()


def test_json_is_written_by_the_one_function_that_leaves_nan_out() -> None:
    assert _where({"dumps", "dump"}) == {
        "common/files/strict_json.py",
        "common/collectives.py",  # from rank to rank
    }


def test_child_processes_are_started_from_argument_lists() -> None:
    """No shell sees what a user or a file has written."""
    for file in FILES:
        for call in _calls(file):
            if ast.unparse(call.func) in {"subprocess.run", "subprocess.Popen"}:
                assert not isinstance(call.args[0], ast.Constant | ast.JoinedStr), file


def test_no_setting_is_a_secret() -> None:
    """Settings are saved as they are, so none may be called what holds a secret."""
    names: list[str] = []

    def walk(cls: type) -> None:
        for field in dataclasses.fields(cls):
            names.append(field.name)

    from trainer import config as module

    for value in vars(module).values():
        if dataclasses.is_dataclass(value) and isinstance(value, type):
            walk(value)
    assert len(names) > 50
    secret = re.compile(r"token|password|secret|credential|api_?key|private")
    assert not [name for name in names if secret.search(name)]


def test_nothing_saves_the_environment_or_the_command_line() -> None:
    """There is nothing to redact in what is never written."""
    for file in FILES:
        place = file.relative_to(ROOT).as_posix()
        if not place.startswith("trainer/") or place.startswith("trainer/planner/"):
            continue
        for node in _nodes(file):
            if isinstance(node, ast.Attribute) and ast.unparse(node) == "sys.argv":
                raise AssertionError(f"{place}:{node.lineno} looks at the command line")
            if isinstance(node, ast.Call) and "json.dump" in ast.unparse(node.func):
                assert "environ" not in ast.unparse(node), f"{place}:{node.lineno}"


# --- the metrics endpoint -----------------------------------------------------------------------


@pytest.fixture(scope="module")
def endpoint() -> Prometheus:
    server = Prometheus(TelemetryConfig().prometheus_host, 0, RUN_FACTS, NODES)
    server.read([{"step": 1, "loss": 1.0, "lr": 0.1, "substitutes": 2}])
    yield server  # type: ignore[misc]
    server.close()


def ask(port: int, method: str, path: str) -> tuple[int, str]:
    connection = http.client.HTTPConnection("127.0.0.1", port, timeout=30)
    connection.request(method, path, body=b"x" if method in ("POST", "PUT", "PATCH") else None)
    reply = connection.getresponse()
    return reply.status, reply.read().decode() + str(reply.getheaders())


def test_metrics_are_shown_to_this_machine_only_unless_asked_for(endpoint: Prometheus) -> None:
    assert endpoint._server.server_address[0] == "127.0.0.1"
    with socket.socket() as probe:
        probe.settimeout(5)
        # 127.0.0.2 is this machine too: what binds 0.0.0.0, as the library would, answers there.
        assert probe.connect_ex(("127.0.0.2", endpoint.port)) != 0


@pytest.mark.parametrize("method", ["POST", "PUT", "DELETE", "PATCH", "TRACE"])
def test_metrics_can_only_be_read(endpoint: Prometheus, method: str) -> None:
    status, body = ask(endpoint.port, method, "/metrics")
    assert status in (405, 501), body
    assert "widebatch_" not in body


@pytest.mark.parametrize("path", ["/metrics", "/", "/../../etc/passwd", "/metrics?name[]=x", "/x"])
def test_metrics_show_no_path_and_no_environment(
    endpoint: Prometheus, monkeypatch: pytest.MonkeyPatch, path: str
) -> None:
    for name, value in SECRETS.items():
        monkeypatch.setenv(name, value)
    _, body = ask(endpoint.port, "GET", path)
    assert "hunter2" not in body
    assert "root:" not in body
    for shown in (str(Path.cwd()), str(Path.home()), "/tmp", socket.gethostname()):  # noqa: S108
        assert f"{shown}/" not in body and f'"{shown}"' not in body


@pytest.mark.reliability(19)
def test_substitutes_are_counted_on_the_endpoint(endpoint: Prometheus) -> None:
    _, body = ask(endpoint.port, "GET", "/metrics")
    assert "widebatch_substituted_samples_total 2.0" in body


# --- a real run's folder ------------------------------------------------------------------------


def _train(rank: int, world_size: int, values: dict[str, object]) -> None:
    from trainer.loop import fit

    os.umask(0o002)  # a group-writable default, as on many clusters
    fit(from_json(RunConfig, values))


@pytest.fixture(scope="module")
def run_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("private")
    data = pack_images(folder, count=48)
    telemetry = TelemetryConfig(tensorboard=True, log_every=1)
    changes = {"steps": 2, "encoder": SMALL_ENCODER, "telemetry": telemetry}
    config = tiny_config(data, folder / "run", **changes)
    run_ranks(_train, 2, to_json(config), timeout=240, env=SECRETS, init_process_group=False)
    return folder / "run"


def test_a_runs_files_are_its_owners_alone(run_folder: Path) -> None:
    wrong = {}
    for path in [run_folder, *run_folder.rglob("*")]:
        mode = stat.S_IMODE(path.stat().st_mode)
        if mode & 0o077:
            wrong[str(path.relative_to(run_folder))] = oct(mode)
    assert not wrong


def test_a_runs_files_hold_no_secret_of_the_environment(run_folder: Path) -> None:
    files = [path for path in run_folder.rglob("*") if path.is_file()]
    assert len(files) > 5
    for path in files:
        assert b"hunter2" not in path.read_bytes(), path
