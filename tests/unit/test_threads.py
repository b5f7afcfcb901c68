"""A rank computes with the cores that it may use, and gives way to other processes, whatever that changes but texts."""

from __future__ import annotations

import ctypes
import logging
import os
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch

from llama import Llama
from llama.backends.cpu.backend import StepThreads
from llama.backends.cpu.build import library
from llama.distributed.threads import allowed_cpus, share_cores, usable_cores, user_chose_threads
from tests.models import BYTE_BOS

ALLOWED = sorted(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else list(range(os.cpu_count() or 1))
needs_kernels = pytest.mark.skipif(library() is None, reason="no C++ compiler here")


@pytest.fixture
def two_threads() -> Iterator[None]:
    before = torch.get_num_threads()
    torch.set_num_threads(2)
    yield
    torch.set_num_threads(before)


def write_topology(root: Path, siblings: dict[int, str]) -> None:
    for cpu, text in siblings.items():
        topology = root / f"sys/devices/system/cpu/cpu{cpu}/topology"
        topology.mkdir(parents=True)
        (topology / "thread_siblings_list").write_text(f"{text}\n")


def test_each_thread_of_its_own_core_counts(tmp_path: Path) -> None:
    write_topology(tmp_path, {cpu: str(cpu) for cpu in [*ALLOWED, 9001]})  # and not those of other processes
    assert usable_cores(tmp_path) == len(ALLOWED)


@pytest.mark.parametrize("together", [2, 4])
def test_threads_of_one_core_count_once(tmp_path: Path, together: int) -> None:
    groups = [ALLOWED[first : first + together] for first in range(0, len(ALLOWED), together)]
    write_topology(tmp_path, {cpu: ",".join(map(str, [*group, 9001])) for group in groups for cpu in group})
    assert usable_cores(tmp_path) == len(groups) == -(-len(ALLOWED) // together)


def test_without_a_topology_torchs_own_choice_is_the_limit(tmp_path: Path) -> None:
    assert usable_cores(tmp_path) == min(len(ALLOWED), torch.get_num_threads())


@pytest.mark.parametrize("version", [1, 2])
@pytest.mark.parametrize(
    ("quota", "cores"), [(None, len(ALLOWED)), (150_000, 1), (20_000, 1), (64_00_000, len(ALLOWED))]
)
def test_a_containers_quota_of_cpu_time_counts(tmp_path: Path, version: int, quota: int | None, cores: int) -> None:
    """The tightest of a group and its parents. More threads than the quota pays for stop each other."""
    write_topology(tmp_path, {cpu: str(cpu) for cpu in ALLOWED})
    (tmp_path / "proc/self").mkdir(parents=True)
    group = tmp_path / "sys/fs/cgroup" / ("cpu" if version == 1 else "") / "pod/box"
    group.mkdir(parents=True)
    (tmp_path / "proc/self/cgroup").write_text("4:cpu,cpuacct:/pod/box\n" if version == 1 else "0::/pod/box\n")
    for folder, most in ((group, None), (group.parent, quota)):
        if version == 1:
            (folder / "cpu.cfs_quota_us").write_text(f"{-1 if most is None else most}\n")
            (folder / "cpu.cfs_period_us").write_text("100000\n")
        else:
            (folder / "cpu.max").write_text(f"{'max' if most is None else most} 100000\n")
    assert usable_cores(tmp_path) == cores


def test_omp_num_threads_is_the_users_unless_torchrun_set_it(monkeypatch: pytest.MonkeyPatch) -> None:
    """1 was always taken for torchrun's, which sets it where the user did not."""
    monkeypatch.delenv("TORCHELASTIC_RUN_ID", raising=False)
    monkeypatch.setenv("OMP_NUM_THREADS", "1")
    assert user_chose_threads()


@pytest.mark.parametrize("value", ["9999", " 9999,4"])
def test_more_threads_than_cores_are_not_given_and_that_is_told_once(
    value: str, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    """torch cut the number that the user asked for without a word."""
    caplog.set_level(logging.INFO, logger="llama")
    before = torch.get_num_threads()
    # What other tests gave torch is no caller's choice here.
    monkeypatch.setattr("llama.distributed.threads._default_threads", before)
    monkeypatch.delenv("OMP_NUM_THREADS", raising=False)
    share_cores(1)
    threads = torch.get_num_threads()
    try:
        monkeypatch.setenv("OMP_NUM_THREADS", value)
        for _ in range(3):
            share_cores(1)
        assert torch.get_num_threads() == threads
    finally:
        torch.set_num_threads(before)
    said = f"threads: {threads}, and not the 9999 of OMP_NUM_THREADS, as there are no more cores"
    assert [record.getMessage() for record in caplog.records] == [said]


def test_a_number_that_the_caller_gave_torch_stays(two_threads: None) -> None:
    torch.set_num_threads(3)
    share_cores(1)
    assert torch.get_num_threads() == 3


@pytest.mark.parametrize(("user", "expected"), [({}, "2000"), ({"GOMP_SPINCOUNT": "7"}, "7")], ids=["default", "user"])
def test_a_command_tells_openmp_to_wait_briefly_before_torch_reads_it(user: dict[str, str], expected: str) -> None:
    """By default its threads keep cores busy that other processes need: prompts were read 5 to 20 times slower."""
    code = "import os, sys, llama.cli; print('torch' in sys.modules, os.environ['GOMP_SPINCOUNT'])"
    names = ("GOMP_SPINCOUNT", "OMP_WAIT_POLICY")
    env = {name: value for name, value in os.environ.items() if name not in names} | user
    done = subprocess.run([sys.executable, "-c", code], env=env, capture_output=True, text=True)
    assert done.stdout == f"False {expected}\n", done.stderr


@pytest.mark.slow
@pytest.mark.skipif(len(ALLOWED) < 2, reason="one core")
@pytest.mark.parametrize("variable", ["OMP_PROC_BIND=true", "OMP_PLACES=cores", f"OMP_PLACES={{{ALLOWED[0]}}}"])
def test_all_places_of_openmp_count(variable: str) -> None:
    """The main thread is bound to the first of them when torch is imported, and it alone was looked at."""
    name, _, value = variable.partition("=")
    code = "import torch; from llama.distributed.threads import *; share_cores(1); print(torch.get_num_threads())"
    env = {each: text for each, text in os.environ.items() if not each.startswith("OMP_")} | {name: value}
    done = subprocess.run([sys.executable, "-c", code], env=env, capture_output=True, text=True)
    assert int(done.stdout) == (1 if "{" in value else usable_cores(Path("/"))), done.stderr


def test_one_thread_computes_where_openmp_may_give_fewer(two_threads: None, caplog: pytest.LogCaptureFixture) -> None:
    """OMP_DYNAMIC on a busy machine: oneDNN left out parts of bf16 products, and the weights were blamed for NaN."""
    openmp = ctypes.CDLL(None)
    if not hasattr(openmp, "omp_set_dynamic"):
        pytest.skip("a torch without OpenMP")
    openmp.omp_set_dynamic(1)
    try:
        share_cores(1)
        assert torch.get_num_threads() == 1
        share_cores(1)
    finally:
        openmp.omp_set_dynamic(0)
        share_cores(1)
    assert caplog.text.count("OMP_DYNAMIC") <= 1


def write_accounts(root: Path, seconds: int, others: float, own: float) -> None:
    """The kernel's, of a machine on which all but two cores are busy with others, and so much of those two."""
    (root / "proc/self").mkdir(parents=True, exist_ok=True)
    cpus = sorted(allowed_cpus())
    busy = [(others + own) / 2] * 2 + [1.0] * (len(cpus) - 2)
    rows = [(cpu, round(100 * share * seconds)) for cpu, share in zip(cpus, busy, strict=False)]
    rows.append((9001, 100 * seconds))
    lines = [f"cpu{cpu} {ticks // 2} 0 {ticks - ticks // 2} {100 * seconds - ticks} 0 0 0 0 0 0" for cpu, ticks in rows]
    (root / "proc/stat").write_text("\n".join(["cpu 1 2 3", *lines, "intr 5 6"]))
    ticks = round(100 * own * seconds)
    (root / "proc/self/stat").write_text(f"7 (a) b) R {'0 ' * 10}{ticks // 2} {ticks - ticks // 2} 0 0")


@needs_kernels
@pytest.mark.skipif(len(ALLOWED) < 2, reason="one core")
def test_threads_give_way_to_other_processes(tmp_path: Path, two_threads: None) -> None:
    """Two jobs at once on two cores ran at a quarter of the speed that each has with one thread."""

    def threads_of_a_step() -> int:
        with threads:
            return torch.get_num_threads()

    write_accounts(tmp_path, 0, 0, 0)
    threads = StepThreads(2, tmp_path, seconds=0)
    found = []
    for seconds, others, own in ((10, 0, 2.0), (20, 0.5, 1.5), (30, 1 / 3, 1.0), (40, 0, 1.0)):
        write_accounts(tmp_path, seconds, others, own)  # since the start: 0, 10, 0 and -10 s of others in turn
        found.append(threads_of_a_step())
        assert torch.get_num_threads() == 2
    assert found == [2, 1, 2, 2]
    torch.set_num_threads(3)  # by the caller
    write_accounts(tmp_path, 50, 1.0, 1.0)
    assert threads_of_a_step() == 3


@needs_kernels
def test_a_text_does_not_depend_on_threads_that_change_while_it_is_made(llama: Llama, two_threads: None) -> None:
    found = []
    for numbers in ((1, 1, 1), (2, 2, 2), (1, 3, 2)):
        events = llama.stream([[BYTE_BOS, *b"one two"]], 24, temperature=0.8, seed=5)
        tokens = []
        for i, event in enumerate(events):
            torch.set_num_threads(numbers[i % 3])
            tokens.append(event.token)
        found.append(tokens)
    assert found[0] == found[1] == found[2] and len(found[0]) > 8
