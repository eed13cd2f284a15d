"""Fixtures: small image folders made on the spot, and the shared real data where a checkout has it beside it."""
import os
import subprocess
import sys

import pytest
import torch

import data

ROOT = os.path.dirname(os.path.dirname(os.path.abspath(__file__)))
SHARED = os.path.join(os.path.dirname(ROOT), "shared", "data")


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


@pytest.fixture
def run():
    """run(script arguments..., before="python code run first", processes=N) -> CompletedProcess. `before` can wrap
    functions of the imported module `train`, to place a signal or a kill at an exact step. On the CPU, where runs
    repeat to the bit."""
    def call(*args, before="", processes=1, restarts=0, script="train.py", timeout=300, env=None):
        module = script.removesuffix(".py")
        code = f"import os, sys, signal\nsys.path.insert(0, {ROOT!r})\nimport {module}\nimport {module} as script\n" \
               f"{before}\nfrom resnet50 import run_script\n" \
               f"run_script(script.main, script.get_args_parser().parse_args(), {script!r})\n"
        path = os.path.join(call.folder, f"entry{call.count}.py")
        call.count += 1
        with open(path, "w") as f:
            f.write(code)
        command = [sys.executable]
        if processes > 1:
            command += ["-m", "torch.distributed.run", "--standalone", f"--nproc_per_node={processes}",
                        f"--max-restarts={restarts}"]
        return subprocess.run(command + [path, *map(str, args)], capture_output=True, text=True, timeout=timeout,
                              cwd=ROOT, env={**os.environ, "CUDA_VISIBLE_DEVICES": "", **(env or {})})
    import tempfile
    with tempfile.TemporaryDirectory() as call.folder:
        call.count = 0
        yield call


def equal_state(a, b, keys=("model", "ema", "optimizer")):
    """Names of the tensors that differ in any bit between two last.pt files."""
    a, b = (torch.load(p, weights_only=True) for p in (a, b))
    different = [k for k in ("epoch", "step", "samples_seen", "best", "ema_updates") if a[k] != b[k]]

    def walk(x, y, name):
        if isinstance(x, torch.Tensor):
            if not torch.equal(x, y):
                different.append(name)
        elif isinstance(x, dict):
            assert x.keys() == y.keys(), name
            for k in x:
                walk(x[k], y[k], f"{name}.{k}")
        elif isinstance(x, (list, tuple)):
            assert len(x) == len(y), name
            for i, (p, q) in enumerate(zip(x, y)):
                walk(p, q, f"{name}.{i}")
        elif x != y:
            different.append(name)
    for key in keys:
        walk(a[key], b[key], key)
    return different
