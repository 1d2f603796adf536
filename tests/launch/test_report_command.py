"""``widebatch report``: where the page goes, what is refused, and how a live one ends."""

import http.client
import json
import re
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from launch.__main__ import main
from launch.exit_codes import ExitCode
from tests.report.made_runs import bare_run, write_metrics

ROOT = Path(__file__).resolve().parents[2]


@pytest.fixture
def run(tmp_path):
    return bare_run(tmp_path / "run")


def test_the_page_lies_in_the_runs_folder(run, capsys, caplog):
    assert main(["report", str(run)]) == ExitCode.DONE
    assert capsys.readouterr().out == f"{run / 'report.html'}\n"
    page = (run / "report.html").read_text()
    assert ">Loss<" in page
    assert "gone.beton is not there any more" in page


def test_what_is_left_out_is_said(run, capfd):
    main(["report", str(run)])
    said = capfd.readouterr().err
    for words in ("left out: views", "gone.beton is not there any more", "widebatch evaluate"):
        assert words in said


def test_several_runs_share_a_page_in_the_working_folder(run, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    other = bare_run(tmp_path / "other")
    assert main(["report", str(run), str(other)]) == ExitCode.DONE
    assert capsys.readouterr().out == "report.html\n"
    assert "2 runs" in (tmp_path / "report.html").read_text()
    assert main(["report", str(run), str(other), "--out", "deep/page.html"]) == ExitCode.DONE
    assert (tmp_path / "deep" / "page.html").is_file()
    assert not (run / "report.html").exists()


def test_figures_are_drawn_beside_the_page(run, tmp_path, capsys):
    figures = tmp_path / "figures"
    assert main(["report", str(run), "--figures", str(figures)]) == ExitCode.DONE
    assert sorted(path.name for path in figures.iterdir()) == ["curves.png", "overview.png"]
    assert str(figures / "overview.png") in capsys.readouterr().out


@pytest.mark.parametrize(
    ("words", "why"),
    [
        (["--live", "--out", "x.html"], "--live writes no files"),
        (["--live", "--figures", "x"], "--live writes no files"),
        (["--out", "."], ".: is a folder; choose another name"),
        (["--out", "run/metrics.jsonl"], "run/metrics.jsonl: exists and is no .html file"),
        (["--port", "80"], "add --live"),
        (["--live", "--port", "65536"], "--port 65536: must be a number from 0 to 65535"),
        (["elsewhere", "--figures", "x"], "name one"),
        (["elsewhere"], "elsewhere: holds no config.json"),
        (["--device", "tpu"], "choose auto, cpu"),
        (["--max-images", "0"], "--max-images 0: must be a number from 1"),
    ],
)
def test_bad_input_is_refused_in_one_line(run, words, why, capfd, monkeypatch, tmp_path):
    monkeypatch.chdir(tmp_path)
    assert main(["report", str(run), *words]) == ExitCode.USAGE
    (line,) = capfd.readouterr().err.splitlines()
    assert why in line
    assert not list(tmp_path.glob("**/*.html"))


@pytest.mark.parametrize("words", [[], ["--live"]])
def test_without_plotly_the_remedy_is_named(run, words, tmp_path):
    code = (
        "import sys\nsys.modules['plotly'] = None\n"
        "from launch.__main__ import main\nsys.exit(main(sys.argv[1:]))"
    )
    done = subprocess.run(
        [sys.executable, "-c", code, "report", str(run), *words],
        cwd=ROOT,
        capture_output=True,
        text=True,
        timeout=120,
    )
    assert done.returncode == ExitCode.USAGE
    (line,) = done.stderr.splitlines()
    assert line.endswith("run `pip install plotly`")
    assert not list(tmp_path.glob("**/*.html"))


def test_a_port_that_is_taken_is_named(run, capfd):
    import socket

    with socket.socket() as other:
        other.bind(("127.0.0.1", 0))
        other.listen()
        port = other.getsockname()[1]
        words = ["report", str(run), "--live", "--port", str(port)]
        assert main(words) == ExitCode.USAGE
    assert f"--port {port}: Address already in use" in capfd.readouterr().err


def fetch(url):
    port = int(re.search(r":(\d+)/", url)[1])
    connection = http.client.HTTPConnection("127.0.0.1", port, timeout=60)
    connection.request("GET", "/")
    return connection.getresponse().read().decode()


def eventually(check, seconds=120):
    deadline = time.monotonic() + seconds
    while not check():
        assert time.monotonic() < deadline
        time.sleep(0.5)


@pytest.mark.slow
def test_a_live_page_follows_the_run_and_ctrl_c_ends_it_in_silence(run):
    command = [sys.executable, "-m", "launch", "report", str(run), "--live"]
    with subprocess.Popen(
        command, cwd=ROOT, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
    ) as process:
        try:
            url = process.stdout.readline()
            assert url.startswith("http://127.0.0.1:")
            assert "step 30 of 40" in fetch(url)
            write_metrics(run, 40)
            eventually(lambda: "finished, step 40 of 40" in fetch(url))
            eventually(lambda: "gone.beton is not there any more" in fetch(url))
            settings = (run / "config.json").read_text()
            (run / "config.json").write_text("{")  # is being written
            assert "finished, step 40 of 40" in fetch(url)
            (run / "config.json").write_text(json.dumps({**json.loads(settings), "batch": 77}))
            eventually(lambda: "77 images" in fetch(url))
            process.send_signal(signal.SIGINT)
            assert process.wait(60) == ExitCode.DONE
            assert "Traceback" not in process.stderr.read()
        finally:
            process.kill()
    assert not (run / "report.html").exists()
