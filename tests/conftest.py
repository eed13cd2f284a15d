"""Fixtures: small image folders made on the spot, and the shared real data where a checkout has it beside it."""
import atexit
import collections
import multiprocessing
import os
import runpy
import subprocess
import sys

import pytest
import torch

import data

FORKS = multiprocessing.get_context("forkserver")  # has imported once what a script imports in seconds
FORKS.set_forkserver_preload(["train", "finetune", "compress", "export", "torchvision.transforms.v2"])
NO_GPU = {"CUDA_VISIBLE_DEVICES": ""}  # on the CPU runs repeat to the bit
ROOT = os.path.dirname(os.path.dirname(os.path.abspath(__file__)))
SHARED = os.path.join(os.path.dirname(ROOT), "shared", "data")


def pytest_collection_modifyitems(items):
    """Where files go to several cores, those that take longest go first, so that the cores end together: by the number
    of their tests, but for one whose few tests train for minutes."""
    count = collections.Counter(item.path for item in items)
    items.sort(key=lambda item: (item.path.name != "test_reliability.py", -count[item.path], str(item.path)))


@pytest.fixture(scope="session")
def tiny(tmp_path_factory):
    """10 classes, 50 training and 29 validation images: nothing divides evenly."""
    root = data.make_demo(str(tmp_path_factory.mktemp("tiny") / "set"), train=5, val=3)
    os.unlink(os.path.join(root, "val", "waves", "0002.jpg"))
    return root


@pytest.fixture(scope="session")
def shared():
    if not os.path.isdir(SHARED):
        pytest.skip("no shared real data beside this checkout")
    return SHARED


@pytest.fixture(scope="module")
def one_thread():
    """Handing the work on small maps to a second thread takes longer than doing it."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


def script_process(command, said, env):
    """Runs `command`, a Python file and its arguments, as the process's main program; stdout and stderr go to `said`"""
    os.chdir(ROOT)
    os.environ.clear()
    os.environ.update(env)
    for number, path in enumerate(said, 1):
        os.dup2(os.open(path, os.O_WRONLY | os.O_CREAT | os.O_TRUNC), number)
    sys.argv = command
    try:
        runpy.run_path(command[0], run_name="__main__")
    finally:
        atexit._run_exitfuncs()


def run_forked(command, said, timeout):
    """subprocess.run() of a script, without seconds of imports; variables that these read are the first run's"""
    process = FORKS.Process(target=script_process, args=(command, said, {**os.environ, **NO_GPU}))
    process.start()
    process.join(timeout)
    if process.exitcode is None:
        process.kill()
        raise subprocess.TimeoutExpired(command, timeout)
    return subprocess.CompletedProcess(command, process.exitcode, *(path.read_text() for path in said))


@pytest.fixture
def run(tmp_path_factory):
    """run(script arguments..., before="python code run first", processes=N) -> CompletedProcess. `before` can wrap
    functions of the imported module `train`, to place a signal or a kill at an exact step."""
    entry = tmp_path_factory.mktemp("run") / "entry.py"

    def call(*args, before="", processes=1, restarts=0, script="train.py", timeout=300):
        module = script.removesuffix(".py")
        entry.write_text(
            f"import os, sys, signal\nsys.path.insert(0, {ROOT!r})\nimport {module}\nimport {module} as script\n"
            f"{before}\nfrom resnet50 import run_script\n"
            f"run_script(script.main, script.get_args_parser().parse_args(), {script!r})\n")
        command = [str(entry), *map(str, args)]
        if processes == 1 and not restarts:
            return run_forked(command, [entry.with_name("stdout"), entry.with_name("stderr")], timeout)
        launch = [sys.executable, "-m", "torch.distributed.run", "--standalone", f"--nproc_per_node={processes}",
                  f"--max-restarts={restarts}"]
        return subprocess.run(launch + command, capture_output=True, text=True, timeout=timeout, cwd=ROOT,
                              env={**os.environ, **NO_GPU})
    return call


def leaves(value, name):
    """-> {name: tensor or plain value} of nested dicts and lists"""
    if isinstance(value, dict):
        parts = value.items()
    elif isinstance(value, (list, tuple)):
        parts = enumerate(value)
    else:
        return {name: value}
    return {k: leaf for key, part in parts for k, leaf in leaves(part, f"{name}.{key}").items()}


def equal_state(*paths):
    """Names of the tensors that differ in any bit between two last.pt files."""
    keys = ("model", "ema", "optimizer", "epoch", "step", "samples_seen", "best", "ema_updates")
    a, b = ({k: v for key in keys for k, v in leaves(torch.load(path, weights_only=True)[key], key).items()}
            for path in paths)
    assert a.keys() == b.keys()
    return [k for k, v in a.items() if not (torch.equal(v, b[k]) if isinstance(v, torch.Tensor) else v == b[k])]
