"""Every launcher leads to the same variables."""

import logging

import pytest

from common.errors import ConfigError
from launch.cluster import Cluster, discover, take_place

SLURM_TASK = {
    "SLURM_JOB_ID": "1234",
    "SLURM_STEP_ID": "0",
    "SLURM_PROCID": "5",
    "SLURM_LOCALID": "1",
    "SLURM_NODEID": "2",
    "SLURM_STEP_NUM_TASKS": "6",
    "SLURM_STEP_TASKS_PER_NODE": "2(x3)",
    "SLURM_STEP_NODELIST": "node7",
}


def test_a_process_that_nobody_launched_is_alone() -> None:
    assert discover({"PATH": "/bin"}) == Cluster("single")


def test_the_shell_of_a_batch_script_is_no_task() -> None:
    """Slurm gives it SLURM_PROCID=0 and SLURM_NTASKS too."""
    batch = {"SLURM_JOB_ID": "1", "SLURM_PROCID": "0", "SLURM_NTASKS": "4"}
    assert discover(batch).launcher == "single"


def test_torchrun_says_it_all() -> None:
    place = discover(
        {
            "RANK": "3",
            "WORLD_SIZE": "4",
            "LOCAL_RANK": "1",
            "LOCAL_WORLD_SIZE": "2",
            "GROUP_RANK": "1",
            "MASTER_ADDR": "10.0.0.1",
            "MASTER_PORT": "4242",
        }
    )
    assert place == Cluster("torchrun", 3, 4, 1, 2, 1, "10.0.0.1", 4242)


def test_torchrun_inside_srun_wins() -> None:
    assert discover({**SLURM_TASK, "RANK": "0", "WORLD_SIZE": "8"}).world_size == 8


def test_a_task_of_srun_becomes_torch_variables(caplog: pytest.LogCaptureFixture) -> None:
    environment = dict(SLURM_TASK)
    with caplog.at_level(logging.INFO):
        take_place(environment)
        assert logging.getLogger().level == logging.WARNING  # rank 0 speaks for all
    port = environment.pop("MASTER_PORT")
    assert environment == SLURM_TASK | {
        "RANK": "5",
        "WORLD_SIZE": "6",
        "LOCAL_RANK": "1",
        "LOCAL_WORLD_SIZE": "2",
        "GROUP_RANK": "2",
        "MASTER_ADDR": "node7",
    }
    assert 20_000 <= int(port) < 32_768


def test_all_tasks_of_a_step_find_one_port_and_other_jobs_another() -> None:
    port = discover(SLURM_TASK).master_port
    assert discover({**SLURM_TASK, "SLURM_PROCID": "0", "SLURM_NODEID": "0"}).master_port == port
    assert discover({**SLURM_TASK, "SLURM_JOB_ID": "1235"}).master_port != port


@pytest.mark.parametrize(
    ("tasks", "node", "here"), [("2(x3)", 2, 2), ("2(x2),1", 2, 1), ("3,1,2", 1, 1), ("8", 0, 8)]
)
def test_the_compressed_task_list_is_read(tasks: str, node: int, here: int) -> None:
    task = {**SLURM_TASK, "SLURM_STEP_TASKS_PER_NODE": tasks, "SLURM_NODEID": str(node)}
    assert discover(task).local_world_size == here


@pytest.mark.parametrize(
    ("nodes", "first"),
    [
        ("gpu[03-09]", "gpu03"),
        ("gpu[03,7-9],x[1-2]", "gpu03"),
        ("x1,gpu[03-09]", "x1"),
        ("rack[2-4]-n[010-020]", "rack2-n010"),
        ("a-b", "a-b"),
    ],
)
def test_the_first_node_of_a_list_is_the_masters(nodes: str, first: str) -> None:
    assert discover({**SLURM_TASK, "SLURM_STEP_NODELIST": nodes}).master_addr == first
    assert discover({**SLURM_TASK, "MASTER_ADDR": "a1"}).master_addr == "a1"


@pytest.mark.parametrize(
    ("environment", "message"),
    [
        ({"RANK": "0"}, "no WORLD_SIZE"),
        ({"RANK": "x", "WORLD_SIZE": "2"}, "RANK='x' is not an integer"),
        ({"RANK": "2", "WORLD_SIZE": "2"}, "RANK=2 is outside WORLD_SIZE=2"),
        ({**SLURM_TASK, "SLURM_NODEID": "9"}, "outside the step's task list"),
    ],
)
def test_contradictions_are_named(environment: dict[str, str], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        discover(environment)
