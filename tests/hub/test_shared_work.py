"""Tests of work shared by several processes: dealt out, gathered in order, and ended by the same error in all."""

import json

import pytest

from helpers.processes import start_together
from timm_coda.hub import ALONE, join_launch
from timm_coda.hub.processes import Processes

HEAD = """
import json, os, sys, time
from timm_coda.hub import ProcessError, join_launch

class Odd(Exception):  # it cannot be sent: its arguments are not its message
    def __init__(self, one, two):
        super().__init__(f"{one} and {two}")

processes = join_launch()
rank = processes.rank

def error_of(work):
    try:
        work()
    except BaseException as error:
        return [type(error).__name__, str(error), processes.told(error)]
"""


def run(code: str, tmp_path, *, count: int, codes: list[int] | None = None) -> list:
    """What the processes print, as JSON."""
    programs = start_together(count, ["-c", HEAD + code], cwd=tmp_path)
    ends = [program.communicate(timeout=60) for program in programs]
    assert [program.returncode for program in programs] == (codes or [0] * count), ends
    # Some versions of PyTorch print that they are connected.
    printed = ([line for line in out.splitlines() if not line.startswith("[Gloo]")] for out, _ in ends)
    return [json.loads("\n".join(lines)) if lines else None for lines in printed]


def test_results_are_in_order_and_errors_are_those_of_one_process(tmp_path):
    code = """
def work(item):
    time.sleep(0.02 * (item % 3))
    if item in bad:
        raise Odd(item, rank) if item == 4 else ValueError(f"item {item}")
    return item, rank

bad = ()
calls = []
found = {
    "seven": processes.share(range(7), work),
    "none": processes.share([], work),
    "one": processes.share([5], work),
    "join": processes.share(range(4), work, join=lambda parts: calls.append(rank) or [item for item, _ in parts]),
    "first": processes.first(lambda: f"from {rank}"),
}
bad = (5, 4)
found["item 4"] = error_of(lambda: processes.share(range(7), work))
bad = (6, 2, 1)
found["item 1"] = error_of(lambda: processes.share(range(7), work))
found["first fails"] = error_of(lambda: processes.first(lambda: Odd("a", "b").missing))
found["join fails"] = error_of(lambda: processes.share([3], work, join=lambda parts: 1 / 0))

def downloaded():
    if rank == 0:
        time.sleep(0.1)
        open("downloaded", "x").close()
    assert os.path.exists("downloaded")
    return f"by {rank}"

found["in turn"] = processes.in_turn(downloaded)
found["second fails"] = error_of(lambda: processes.in_turn(lambda: 1 / (rank != 1)))
found["one apart"] = error_of(lambda: processes.together(lambda: 1 / 0 if rank == 1 else processes.share([3, 0], work)))
found["apart at the end"] = error_of(lambda: processes.together(lambda: [processes.share([], work), 1 / (2 - rank)]))
found["together"] = processes.together(lambda: (rank, processes.share([3, 0], work)))
found["end"] = processes.end(3 * (rank == 2))
print(json.dumps([found, calls]))
"""
    found = run(code, tmp_path, count=3)
    for rank, (one, calls) in enumerate(found):
        assert one["seven"] == [[item, item % 3] for item in range(7)]
        assert (one["none"], one["one"], one["join"], one["first"]) == ([], [[5, 0]], [0, 1, 2, 3], "from 0")
        assert calls == ([0] if rank == 0 else [])
        assert one["item 4"] == ["Odd", "4 and 1", True], "an error that cannot be sent has its name and words"
        assert one["item 1"] == ["ValueError", "item 1", True]
        assert one["first fails"] == ["AttributeError", "'Odd' object has no attribute 'missing'", True]
        assert one["join fails"] == ["ZeroDivisionError", "division by zero", True]
        assert one["in turn"] == f"by {rank}"
        assert one["second fails"] == ["ZeroDivisionError", "division by zero", True]
        for apart in ("one apart", "apart at the end"):
            assert one[apart] == ["ZeroDivisionError", "division by zero", True]
        assert one["together"] == [rank, [[3, 0], [0, 1]]], "all go on at the same call"
        assert one["end"] == 3, "the code of the process that has one"


def test_no_process_waits_for_one_that_has_failed(tmp_path):
    """A process ends by an error that only it has met, while the others share work; then another is killed."""
    code = """
if rank == 1:
    found = None
else:
    found = error_of(lambda: processes.share(range(6), lambda item: item))
print(json.dumps([found, processes.end(2 if rank == 1 else 0)]))
"""
    words = "process 1 of 3 has ended before the others: see its message"
    said = [["ProcessError", words, False], 2]
    assert run(code, tmp_path, count=3) == [said, [None, 2], said]
    code = """
def work(item):
    if item == 1:
        os._exit(7)

processes.first(int)  # all are connected
print(json.dumps([error_of(lambda: processes.share(range(6), work)), processes.end(4)]))
"""
    words = "another process of this run has ended: see its message"
    found = run(code, tmp_path, count=3, codes=[0, 7, 0])
    assert found[1] is None and found[0] == [["ProcessError", words, False], 4] == found[2]


def test_the_connection_is_closed_while_python_still_runs(tmp_path):
    """A thread of gloo that frees the last message while Python shuts down would abort the process."""
    code = """
import atexit

processes.share(range(3), lambda item: item)
connected = len(os.listdir("/proc/self/task"))
atexit._run_exitfuncs()
print(json.dumps([connected, len(os.listdir("/proc/self/task"))]))
"""
    for connected, closed in run(code, tmp_path, count=2):
        assert closed < connected, "threads"


@pytest.mark.parametrize(
    "variables",
    [
        {"WORLD_SIZE": ""},
        {"WORLD_SIZE": "1", "RANK": "0", "LOCAL_RANK": "0"},
        {"WORLD_SIZE": "2"},
        {"WORLD_SIZE": "2", "RANK": "1", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": "1"},
        {"OMPI_COMM_WORLD_SIZE": "2", "OMPI_COMM_WORLD_RANK": "0"},
    ],
)
def test_without_a_launch_nothing_is_shared(monkeypatch, capsys, variables):
    """Also where variables of a whole job or container are set, but none that only a launcher sets."""
    for name in ("WORLD_SIZE", "RANK", "LOCAL_RANK", "MASTER_ADDR", "MASTER_PORT"):
        monkeypatch.delenv(name, raising=False)
    for name, value in variables.items():
        monkeypatch.setenv(name, value)
    assert join_launch() is ALONE and ALONE.count == 1
    size = next(iter(variables))
    note = f"note: {size}=2, but no launcher has set LOCAL_RANK: this is a single process\n"
    assert capsys.readouterr().err == (note if variables[size] == "2" else "")
    with pytest.raises(ZeroDivisionError):
        ALONE.share([1, 0], lambda item: 1 / item)
    assert Processes().share("abc", str.upper) == ["A", "B", "C"] and ALONE.end(5) == 5
