"""Kills, signals, full disks, NaN: a run that is interrupted anywhere ends with the same bits as one that is not.

The interruptions are placed exactly: `before` wraps a function of train.py in the child process, which then kills or
signals itself there. The training configuration uses everything that has state: EMA, momentum, mixup, dropout,
drop-path, RandAugment. The network is a narrow one, so that a step takes milliseconds; nothing tested here depends on
its width."""
import json
import os
import shutil
import signal

import pytest
import torch

from tests.conftest import equal_state

# 10 steps an epoch
FLAGS = ["--recipe", "demo", "--opt", "nesterov", "--lr", "0.01", "--epochs", "2", "--image-size", "32",
         "--batch-size", "5", "--log-every", "2", "--mixup-alpha", "0.2", "--cutmix-alpha", "1", "--dropout", "0.1",
         "--drop-path", "0.1", "--auto-augment", "ra", "--seed", "7"]

NARROW = """
import functools
widths = {"conv1": 8, **{f"layer{i}": 8 * 2 ** i for i in range(1, 5)}}
widths.update({f"layer{i}.{j}.conv{k}": 4 * 2 ** i\
 for i, n in enumerate((3, 4, 6, 3), 1) for j in range(n) for k in (1, 2)})
train.ResNet50 = functools.partial(train.ResNet50, widths=widths)
"""


@pytest.fixture
def run(run):
    def narrow(*args, before="", **options):
        return run(*args, before=NARROW + before, **options)
    return narrow


def kill_after(steps, name="SIGKILL", when="True"):
    return f"""
real, count = train.train_step, [0]
def step(*a, **k):
    out = real(*a, **k); count[0] += 1
    if count[0] == {steps} and {when}: os.kill(os.getpid(), signal.{name})
    return out
train.train_step = step
"""


def flags(tiny, out, *more):
    return ["--data", tiny, "--out", out, *FLAGS, *more]


@pytest.fixture(scope="module")
def straight(tiny, tmp_path_factory):
    """Uninterrupted runs by number of processes -> folder."""
    runs = {}

    def get(run, processes):
        if processes not in runs:
            out = str(tmp_path_factory.mktemp("straight") / str(processes))
            done = run(*flags(tiny, out, "--batch-size", 6 // processes if processes > 1 else 5, "--workers", 1),
                       processes=processes)
            assert done.returncode == 0, done.stderr[-3000:]
            runs[processes] = out
        return runs[processes]
    return get


@pytest.fixture(scope="module")
def stopped(tiny, tmp_path_factory):
    """Copies a run that was stopped after 7 of the 10 steps of its second epoch -> the copy."""
    first = tmp_path_factory.mktemp("stopped") / "r"

    def get(run, out):
        if not first.exists():
            done = run(*flags(tiny, first, "--workers", 0), before=kill_after(17, "SIGTERM"))
            assert done.returncode == 75, done.stderr[-3000:]
        return shutil.copytree(first, out)
    return get


def records(out):
    with open(os.path.join(out, "metrics.jsonl")) as f:
        return [json.loads(line) for line in f]


def epochs(out):
    return [{k: v for k, v in r.items() if k != "seconds"} for r in records(out) if r["event"] == "epoch"]


def test_kill_twice_in_one_epoch_and_resume_is_bit_exact(run, tiny, tmp_path, straight):
    reference, out = straight(run, 1), str(tmp_path / "r")
    assert run(*flags(tiny, out, "--save-every", 2, "--workers", 0), before=kill_after(5)).returncode == -signal.SIGKILL
    first = torch.load(os.path.join(out, "last.pt"), weights_only=True)
    assert first["step"] == 4 and first["epoch"] == 0 and first["samples_seen"] == 20
    assert run("--resume", "auto", "--out", out, "--save-every", 3, "--workers", 2,
               before=kill_after(3)).returncode == -signal.SIGKILL
    assert torch.load(os.path.join(out, "last.pt"), weights_only=True)["step"] == 6
    with open(os.path.join(out, "metrics.jsonl"), "a") as f:
        f.write('{"event": "step", "half a li')  # what a kill during a write leaves
    # the other flags come from args.json
    done = run("--resume", "auto", "--out", out, "--save-every", 0, "--workers", 1)
    assert done.returncode == 0, done.stderr
    assert equal_state(f"{reference}/last.pt", f"{out}/last.pt") == []
    a, b = ([(r["event"], r["step"], r.get("loss"), r.get("lr")) for r in records(o)] for o in (reference, out))
    assert [r[:2] for r in a] == [r[:2] for r in b] and a[-1] == b[-1]
    best = [torch.load(f"{o}/best.pt", weights_only=True) for o in (reference, out)]
    assert (all(torch.equal(best[0]["model"][k], best[1]["model"][k]) for k in best[0]["model"])
            and best[0]["metrics"] == best[1]["metrics"])
    assert json.loads(done.stdout.splitlines()[-1])["top1"] == best[0]["metrics"]["top1"]


def test_an_epoch_s_training_figures_are_the_means_of_its_intervals(run, straight):
    found = records(straight(run, 1))
    for epoch in (r for r in found if r["event"] == "epoch"):
        steps = [r for r in found if r["event"] == "step" and epoch["epoch"] - 1 < r["epoch"] <= epoch["epoch"]]
        assert [r["step"] for r in steps] == [10 * epoch["epoch"] - k for k in (8, 6, 4, 2, 0)]
        assert all(r["top1"] % 10 == 0 for r in steps)  # of ten images
        for key in ("loss", "top1"):
            assert sum(r[key] for r in steps) / 5 == pytest.approx(epoch[f"train_{key}"], abs=1e-3)


def test_a_network_that_is_scored_itself_goes_on_training(run, tiny, tmp_path):
    done = run(*flags(tiny, tmp_path / "r", "--model-ema-decay", 0, "--batch-size", 25, "--workers", 0))
    assert done.returncode == 0, done.stderr[-2000:]
    assert torch.load(tmp_path / "r" / "last.pt", weights_only=True)["model"]["bn1.num_batches_tracked"] == 4


@pytest.mark.parametrize("name, where", [("SIGTERM", "step"), ("SIGINT", "evaluation")])
def test_signal_saves_and_exits_75(run, tiny, tmp_path, straight, name, where):
    reference, out = straight(run, 1), str(tmp_path / "r")
    before = kill_after(13, name) if where == "step" else f"""
real = train.evaluate
def evaluate(*a, **k):
    os.kill(os.getpid(), signal.{name})
    return real(*a, **k)
train.evaluate = evaluate
"""
    done = run(*flags(tiny, out, "--workers", 1), before=before)
    assert (done.returncode == 75 and f"stopped by {name}" in done.stderr.splitlines()[-1]
            and "Traceback" not in done.stderr)
    saved = torch.load(f"{out}/last.pt", weights_only=True)
    assert saved["step"] == (13 if where == "step" else 10)
    done = run(*flags(tiny, out, "--resume", "--workers", 0))
    assert done.returncode == 0 and equal_state(f"{reference}/last.pt", f"{out}/last.pt") == [], done.stderr
    # what a window held when the run stopped is in the epoch's training loss all the same
    assert epochs(reference) == epochs(out)


def test_worker_killed_under_torchrun_restarts_and_ends_with_the_same_bits(run, tiny, tmp_path, straight):
    """Three processes: gradient sums over three depend on their grouping, which DDP changes after its first step."""
    reference, out = straight(run, 3), str(tmp_path / "r")
    when = "os.environ['TORCHELASTIC_RESTART_COUNT'] == '0' and os.environ['RANK'] == '1'"
    done = run(*flags(tiny, out, "--batch-size", 2, "--save-every", 2, "--workers", 1),
               before=kill_after(5, when=when), processes=3, restarts=1)
    assert done.returncode == 0, done.stderr[-3000:]
    assert "resumed" in done.stderr and equal_state(f"{reference}/last.pt", f"{out}/last.pt") == []
    assert torch.load(f"{out}/last.pt", weights_only=True)["metrics"]["images"] == 29


def test_signal_to_one_of_two_processes_stops_both_at_one_step(run, tiny, tmp_path, straight):
    reference, out = straight(run, 2), str(tmp_path / "r")
    done = run(*flags(tiny, out, "--batch-size", 3, "--workers", 1),
               before=kill_after(4, "SIGTERM", "os.environ['RANK'] == '1'"), processes=2)
    assert done.returncode != 0 and "stopped by SIGTERM, state saved" in done.stderr
    assert "Warning" not in done.stderr  # which each process would print
    saved = torch.load(f"{out}/last.pt", weights_only=True)
    assert saved["step"] in (5, 6) and len(saved["statistics"]) == 2 and not torch.equal(*saved["statistics"])
    mean = torch.stack(saved["statistics"]).mean(0)[:8]
    assert torch.allclose(saved["model"]["bn1.running_mean"].double(), mean, atol=1e-7)
    done = run(*flags(tiny, out, "--batch-size", 3, "--resume", "auto", "--workers", 1), processes=2)
    assert done.returncode == 0 and equal_state(f"{reference}/last.pt", f"{out}/last.pt") == [], done.stderr[-3000:]
    assert epochs(reference) == epochs(out)
    assert torch.equal(*torch.load(f"{out}/last.pt", weights_only=True)["statistics"])  # what is scored is one network


def test_a_failing_process_does_not_hang_the_other(run, tiny, tmp_path):
    done = run(*flags(tiny, tmp_path / "r"), processes=2, timeout=120,
               before="real = train.train_step\ndef step(*a, **k):\n"
                      "    if os.environ['RANK'] == '1': raise train.UserError('no more')\n"
                      "    return real(*a, **k)\ntrain.train_step = step")
    assert done.returncode != 0 and "train.py: error: no more" in done.stderr
    assert "its own line says why), and process 0 with it" in done.stderr and "pair.cc" not in done.stderr


def test_divergence_exits_4_and_keeps_the_checkpoint(run, tiny, tmp_path):
    out = str(tmp_path / "r")
    poison = """
real, count = train.normalize, [0]
def normalize(*a):
    count[0] += 1
    return real(*a) * (float("nan") if count[0] in (3, 4) or count[0] > 6 else 1)
train.normalize = normalize
"""
    done = run(*flags(tiny, out, "--save-every", 2, "--max-skips", 2, "--workers", 0), before=poison)
    assert done.returncode == 4 and "diverged" in done.stderr.splitlines()[-1] and "Traceback" not in done.stderr
    saved = torch.load(f"{out}/last.pt", weights_only=True)
    assert (saved["step"] == 6 and all(bool(torch.isfinite(v).all()) for v in saved["model"].values())
            and saved["skips"] == 0 and saved["skipped"] == 2)


def test_divergence_at_the_end_of_an_epoch_keeps_the_checkpoint(run, tiny, tmp_path):
    """Before --max-skips is reached: only the validation loss tells."""
    out = tmp_path / "r"
    assert run(*flags(tiny, out, "--epochs", 1, "--workers", 0)).returncode == 0
    before = (out / "last.pt").read_bytes(), (out / "best.pt").read_bytes()
    wild = ["--lr", 1e25, "--max-skips", 50, "--clip-grad-norm", 0, "--workers", 0]
    done = run(*flags(tiny, out, "--epochs", 2, "--resume", *wild))
    assert done.returncode == 4 and "Traceback" not in done.stderr, done.stderr[-2000:]
    assert "loss on validation is nan; " + str(out / "last.pt") + " was left" in done.stderr.splitlines()[-1]
    assert before == ((out / "last.pt").read_bytes(), (out / "best.pt").read_bytes())
    done = run(*flags(tiny, tmp_path / "new", "--epochs", 1, *wild))
    assert done.returncode == 4 and not (tmp_path / "new" / "best.pt").exists()
    assert done.stderr.splitlines()[-1].endswith("; there is no checkpoint yet")
    for line in (out / "metrics.jsonl").read_text().splitlines():
        json.loads(line, parse_constant=lambda name: pytest.fail(f"{name} is no JSON"))


def test_a_run_goes_on_in_another_folder_with_its_best_network_and_curves(run, tiny, tmp_path, straight, stopped):
    reference, out = straight(run, 1), tmp_path / "other"
    done = run(*flags(tiny, out, "--resume", f"{reference}/last.pt", "--epochs", 3, "--lr", 0, "--workers", 0))
    assert done.returncode == 0, done.stderr[-2000:]
    result, best = json.loads(done.stdout.splitlines()[-1]), torch.load(out / "best.pt", weights_only=True)
    assert result["epochs"] == 3 and result["top1"] == best["metrics"]["top1"]
    if result["best_epoch"] < 3:
        assert (out / "best.pt").read_bytes() == open(f"{reference}/best.pt", "rb").read()
    assert records(out)[:len(records(reference))] == records(reference)  # curves.svg begins where the run began
    done = run(*flags(tiny, tmp_path / "third", "--resume", f"{reference}/last.pt", "--workers", 0))  # a finished one
    assert done.returncode == 0 and (tmp_path / "third" / "best.pt").exists(), done.stderr[-2000:]
    assert equal_state(f"{reference}/last.pt", tmp_path / "third" / "last.pt") == []
    stale = stopped(run, tmp_path / "stale")
    (stale / "metrics.jsonl").write_text('{"event": "step", "epoch": 0.1, "step": 1, "loss": 99.0, "lr": 1.0}\n')
    done = run(*flags(tiny, stale, "--resume", f"{reference}/last.pt", "--overwrite", "--workers", 0))
    assert done.returncode == 0 and records(stale) == records(reference), done.stderr[-2000:]


def test_a_best_network_that_was_moved_away_is_not_missed(run, tiny, tmp_path, stopped):
    out = stopped(run, tmp_path / "r")
    (out / "best.pt").rename(tmp_path / "kept.pt")
    done = run("--resume", "--out", out, "--lr", 0, "--workers", 0)
    assert done.returncode == 0 and json.loads(done.stdout.splitlines()[-1])["best_epoch"] == 2, done.stderr[-2000:]


@pytest.mark.parametrize("flag, value, before", [("--opt", "adamw", "nesterov"), ("--best-by", "loss", "top1")])
def test_what_a_resumed_run_cannot_change_is_refused(run, tiny, tmp_path, stopped, flag, value, before):
    done = run("--resume", "--out", stopped(run, tmp_path / "r"), flag, value, "--workers", 0)
    assert done.returncode == 2 and "Traceback" not in done.stderr
    assert f"last.pt: was trained with {flag} {before}, not {value}" in done.stderr.splitlines()[-1]


def test_a_resumed_run_decays_and_moves_as_its_flags_say(run, tiny, tmp_path, stopped):
    out = stopped(run, tmp_path / "r")
    done = run("--resume", "--out", out, "--weight-decay", 0.5, "--momentum", 0.25, "--workers", 0)
    assert done.returncode == 0, done.stderr[-2000:]
    groups = torch.load(out / "last.pt", weights_only=True)["optimizer"]["param_groups"]
    assert [(g["weight_decay"], g["momentum"]) for g in groups] == [(0.5, 0.25), (0.0, 0.25)]


def test_a_batch_size_that_was_found_is_not_sought_again(run, tiny, tmp_path, stopped, straight):
    """Memory that is free differs from day to day"""
    reference, out = straight(run, 1), stopped(run, tmp_path / "r")
    done = run(*flags(tiny, out, "--resume", "--batch-size", "auto", "--workers", 0),
               before="train.find_batch_size = lambda *a, **k: 8")
    assert done.returncode == 0 and equal_state(f"{reference}/last.pt", f"{out}/last.pt") == [], done.stderr[-2000:]


def test_a_mean_over_epochs_does_not_become_a_moving_average(run, tiny, tmp_path, stopped):
    done = run("--resume", "--out", stopped(run, tmp_path / "r"), "--model-ema-decay", 0, "--swa-start", 0,
               "--workers", 0)
    assert done.returncode == 2 and "last.pt: --swa-start was off in this run" in done.stderr.splitlines()[-1]


@pytest.mark.parametrize("batch, steps", [(8, 1), (30, 0)])  # of the epoch's 50 images 35 have been used
def test_a_run_goes_on_with_another_batch_size(run, tiny, tmp_path, stopped, batch, steps):
    out = stopped(run, tmp_path / "r")
    done = run("--resume", "--out", out, "--batch-size", batch, "--log-every", 5, "--workers", 0)
    assert done.returncode == 0 and "Traceback" not in done.stderr, done.stderr[-2000:]
    assert torch.load(out / "last.pt", weights_only=True)["step"] == 17 + steps
    last = [r for r in records(out) if r["event"] == "step"][-1]
    assert steps == 0 or last["step"] == 18  # what is left of the epoch is in its training loss


def test_a_run_is_ended_by_fewer_epochs(run, tiny, tmp_path, stopped):
    out = stopped(run, tmp_path / "r")
    done = run("--resume", "--out", out, "--epochs", 1, "--workers", 0)
    assert done.returncode == 0 and "Traceback" not in done.stderr, done.stderr[-2000:]
    result, (epoch,) = json.loads(done.stdout.splitlines()[-1]), [r for r in records(out) if r["event"] == "epoch"]
    assert (result["epochs"], result["top1"], result["last_top1"]) == (1, epoch["top1"], epoch["top1"])


@pytest.mark.parametrize("where, every", [("RunLog.write", 0), ("save_training", 5)])
def test_a_kill_at_the_end_of_an_epoch_neither_loses_nor_doubles_its_line(run, tiny, tmp_path, where, every):
    out = tmp_path / "r"
    killer = f"""
real, saves = train.{where}, [0]
def killing(*a, **k):
    saves[0] += 1
    if a[1:2] == ("epoch",) or a[0] == {str(out / "last.pt")!r} and saves[0] == 3: os.kill(os.getpid(), signal.SIGKILL)
    return real(*a, **k)
train.{where} = killing
"""
    done = run(*flags(tiny, out, "--save-every", every, "--workers", 0), before=killer)
    assert done.returncode == -signal.SIGKILL and torch.load(out / "last.pt", weights_only=True)["step"] == 10
    done = run("--resume", "--out", out, "--workers", 0)
    assert done.returncode == 0 and [r["epoch"] for r in records(out) if r["event"] == "epoch"] == [1, 2], done.stderr


def test_a_restarted_run_that_began_with_another_goes_on_from_its_own(run, tiny, tmp_path, stopped):
    other, out = stopped(run, tmp_path / "other"), tmp_path / "r"
    done = run(*flags(tiny, out, "--resume", other / "last.pt", "--save-every", 2, "--workers", 0), restarts=1,
               before=kill_after(2, when="os.environ['TORCHELASTIC_RESTART_COUNT'] == '0'"))
    assert done.returncode == 0, done.stderr[-2000:]
    assert [line.rpartition("/")[2] for line in done.stderr.splitlines() if line.startswith("resumed")] == [
        "last.pt at epoch 1, step 17", "last.pt at epoch 1, step 18"] and f"resumed {out}" in done.stderr


def test_a_restart_goes_on_with_no_run_but_its_own(run, tiny, tmp_path, stopped):
    """torchrun restarts a process that was refused, too"""
    out = stopped(run, tmp_path / "r")
    before = {path.name: path.read_bytes() for path in out.iterdir()}
    done = run(*flags(tiny, out, "--workers", 0), restarts=1)
    assert done.returncode == 1 and done.stderr.count(f"{out} is not empty") == 2, done.stderr[-2000:]
    assert before == {path.name: path.read_bytes() for path in out.iterdir()}


def test_patience_lasts_no_longer_by_asking_again(run, tiny, tmp_path):
    out = tmp_path / "r"
    for more in ((), ("--resume",), ("--resume",)):
        done = run(*flags(tiny, out, "--epochs", 9, "--patience", 1, "--best-by", "loss", "--workers", 0, *more),
                   before="train.evaluate = lambda *a, **k: dict(top1=0.0, top5=0.0, loss=1.0, images=1, corrupt=0)")
        assert done.returncode == 0 and json.loads(done.stdout.splitlines()[-1])["epochs"] == 2, done.stderr[-2000:]
        assert "no better loss for 1 epochs" in done.stderr


def test_full_disk_is_one_line_and_keeps_the_checkpoint(run, tiny, tmp_path):
    out = str(tmp_path / "r")
    full = """
import resource
signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
real, count = train.save_checkpoint, [0]
def save_checkpoint(*a, **k):
    count[0] += 1
    if count[0] == 2: resource.setrlimit(resource.RLIMIT_FSIZE, (10 ** 4, 10 ** 4))
    return real(*a, **k)
train.save_checkpoint = save_checkpoint
"""
    done = run(*flags(tiny, out, "--save-every", 2, "--workers", 0), before=full)
    assert (done.returncode == 3 and "last.pt: not written (File too large)" in done.stderr.splitlines()[-1]
            and "Traceback" not in done.stderr)
    assert (torch.load(f"{out}/last.pt", weights_only=True)["step"] == 2
            and sorted(os.listdir(out)) == ["args.json", "last.pt", "metrics.jsonl"])


def test_run_folders_are_not_overwritten_silently(run, tiny, tmp_path):
    out = tmp_path / "r"
    out.mkdir()
    (out / "notes.txt").write_text("mine")
    done = run(*flags(tiny, out))
    assert (done.returncode == 2
            and all(word in done.stderr for word in ("not empty", "--resume", "--overwrite", "--out")))
    done = run(*flags(tiny, out, "--overwrite", "--epochs", 1))
    assert done.returncode == 0 and (out / "notes.txt").read_text() == "mine", done.stderr
    (out / "last.pt").rename(tmp_path / "last.pt")
    done = run(*flags(tiny, out, "--resume"))
    assert done.returncode == 2 and "has a best.pt, and no last.pt that --resume" in done.stderr.splitlines()[-1]
    (tmp_path / "last.pt").rename(out / "last.pt")
    (out / "best.pt").rename(tmp_path / "best.pt")
    done = run(*flags(tiny, tmp_path / "other", "--resume", tmp_path / "best.pt"))
    assert done.returncode == 3 and "no training state of this version, no optimizer" in done.stderr
    older = torch.load(out / "last.pt", weights_only=True)
    del older["averaged"], older["args"]["best_by"]
    torch.save(older, tmp_path / "older.pt")
    done = run(*flags(tiny, tmp_path / "other", "--resume", tmp_path / "older.pt"))
    assert done.returncode == 3 and "older.pt: holds no training state of this version, no averaged" in done.stderr
    assert run(*flags(tiny, tmp_path / "other", "--resume", tmp_path / "none.pt")).returncode == 3
    last = out / "last.pt"
    last.write_bytes(last.read_bytes()[:1000])
    done = run(*flags(tiny, out, "--resume"))
    assert done.returncode == 3 and "last.pt: truncated or damaged" in done.stderr and "Traceback" not in done.stderr


@pytest.mark.parametrize("more, code, text", [
    (["--checkpoint", "OUT/best.pt"], 2, "--overwrite would delete OUT/best.pt, which is read"),
    (["--data", "nowhere"], 3, "nowhere: no such folder"), (["--num-classes", 7], 2, "the data has 10 classes")])
def test_overwriting_loses_nothing_where_the_new_run_cannot_begin(run, tiny, tmp_path, stopped, more, code, text):
    out = stopped(run, tmp_path / "r")
    before = {path.name: path.read_bytes() for path in out.iterdir()}
    done = run(*flags(tiny, out, "--overwrite", *(str(m).replace("OUT", str(out)) for m in more)))
    assert done.returncode == code and text.replace("OUT", str(out)) in done.stderr.splitlines()[-1], done.stderr
    assert "best.pt" in before and before == {path.name: path.read_bytes() for path in out.iterdir()}


def test_corrupt_training_files(run, tiny, tmp_path):
    shutil.copytree(tiny, tmp_path / "d")
    victim = tmp_path / "d" / "train" / "ring" / "0002.jpg"
    victim.write_bytes(b"not an image")
    options = flags(tmp_path / "d", tmp_path / "r", "--epochs", 1, "--workers", 2)
    done = run(*options)
    assert (done.returncode == 3 and "ring/0002.jpg: not an image" in done.stderr.splitlines()[-1]
            and "Traceback" not in done.stderr)
    done = run(*options, "--on-corrupt", "skip", "--overwrite")
    assert (done.returncode == 0 and json.loads(done.stdout.splitlines()[-1])["corrupt"] == 1
            and "ring/0002.jpg" in done.stderr)
