"""Packs: what is in them against the folder they were made of, everywhere a folder goes, and everything that is wrong
with one."""
import concurrent.futures
import contextlib
import errno
import json
import multiprocessing
import os
import re
import resource
import shutil
import signal
import sys
from pathlib import Path
from unittest import mock

import numpy as np
import pytest
import torch
from PIL import Image

import data
from resnet50 import PREPROCESS, UserError

MODES = {"lossless": ["--lossless"], "jpeg": ["--max-side", "48", "--quality", "80"], "raw": ["--raw", "40"]}


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """The demo set's layout, with images of other sizes, kinds and names"""
    root = data.make_demo(str(tmp_path_factory.mktemp("folder") / "set"), train=7, val=3)
    noise = np.random.default_rng(0).integers(0, 256, (61, 90, 3), dtype=np.uint8)
    Image.fromarray(noise).save(os.path.join(root, "train", "disk", "über lang.png"))
    Image.fromarray(noise[:, :, 0]).save(os.path.join(root, "train", "ring", "grey.jpg"), quality=95)
    Image.fromarray(noise[:31, :17]).save(os.path.join(root, "train", "ring", "small.jpg"), quality=95)
    os.makedirs(os.path.join(root, "train", "ring", "deep", "er"))
    Image.fromarray(noise).save(os.path.join(root, "train", "ring", "deep", "er", "tall.bmp"))
    return root


def main(*flags):
    return data.main(data.get_args_parser().parse_args([str(f) for f in flags]))


def pack(root, out, *flags):
    return main("--pack", root, "--out", out, *flags)


@pytest.fixture(scope="module")
def packs(folder, tmp_path_factory):
    root = tmp_path_factory.mktemp("packs")
    for mode, flags in MODES.items():
        pack(folder, root / mode, *flags, "--workers", 2)
    return {mode: str(root / mode) for mode in MODES}


@pytest.mark.parametrize("mode", MODES)
def test_a_pack_is_the_folder(mode, folder, packs):
    theirs, ours = (data.open_folder(root) for root in (folder, packs[mode]))
    assert theirs[2:4] == ours[2:4] and len(theirs[0]) == 74 and len(theirs[1]) == 30
    for a, b in zip(theirs[:2], ours[:2]):
        assert (a.labels == b.labels).all() and len(a) == len(b)
        for i in range(len(a)):
            assert os.path.relpath(a.path(i), folder) == os.path.relpath(b.path(i), packs[mode])
            image, packed = data.load(a.path(i)), data.load(b.path(i))
            if mode == "lossless":
                assert np.array_equal(image, packed)
                assert a.path(i).endswith("jpg") or data.read(a.path(i)) == data.read(b.path(i))
                continue
            side = (min if mode == "raw" else max)(image.size)
            scale = min(1, (40 if mode == "raw" else 48) / side)
            assert packed.size == tuple(round(n * scale) for n in image.size) and packed.mode == "RGB"
            again = image.resize(packed.size, Image.Resampling.BICUBIC)
            error = np.abs(np.asarray(again, float) - np.asarray(packed)).mean()
            assert error == 0 if scale == 1 and mode == "raw" else error < (2 if mode == "raw" else 25)
    info = main("--info", packs[mode])
    assert info["images"] == 104 and info["mode"] == mode and info["bytes"] == os.path.getsize(packs[mode])


def killed_at(call, block):
    """Code for run(): notes are taken every `block` images, and SIGKILL comes behind that call of fsync"""
    return f"script.BLOCK = {block}\ninner, left = os.fsync, [{call}]\ndef fsync(fd):\n    inner(fd)\n" \
           "    left[0] -= 1\n    if not left[0]: os.kill(os.getpid(), signal.SIGKILL)\nos.fsync = fsync\n"


@pytest.mark.parametrize("mode", MODES)
def test_the_bytes_do_not_depend_on_workers_nor_on_being_stopped(mode, folder, packs, tmp_path, run, monkeypatch):
    pack(folder, tmp_path / "one", *MODES[mode], "--workers", 0)
    wanted = Path(packs[mode]).read_bytes()
    assert wanted == (tmp_path / "one").read_bytes()
    out = tmp_path / "two"
    flags = ["--pack", folder, "--out", out, *MODES[mode], "--workers", 0]
    assert run(*flags, script="data.py", before=killed_at(3, 20)).returncode == -signal.SIGKILL and not out.exists()
    with open(f"{out}.part", "ab") as f:
        f.write(b"what was being written")
    lines = Path(f"{out}.part.log").read_text().splitlines()
    assert len(lines) == 3  # the settings, two blocks; the third was synced but not noted
    read = []
    monkeypatch.setattr(data, "packed", lambda path, inner=data.packed, **k: read.append(path) or inner(path, **k))
    pack(folder, out, *MODES[mode], "--workers", 0)
    assert len(read) == 104 - 40 and out.read_bytes() == wanted and sorted(os.listdir(tmp_path)) == ["one", "two"]


def test_one_process_at_a_time_writes_a_pack(folder, packs, tmp_path, monkeypatch):
    def other(*args, inner=data.write_block):
        monkeypatch.undo()
        with concurrent.futures.ProcessPoolExecutor(1, multiprocessing.get_context("fork")) as pool, pytest.raises(
                UserError, match="x.part.log: another process is writing this pack"):
            pool.submit(pack, folder, tmp_path / "x", *MODES["raw"], "--workers", 0).result()
        return inner(*args)
    monkeypatch.setattr(data, "write_block", other)
    pack(folder, tmp_path / "x", *MODES["raw"], "--workers", 0)
    assert (tmp_path / "x").read_bytes() == Path(packs["raw"]).read_bytes()
    monkeypatch.setattr(data.fcntl, "lockf", mock.Mock(side_effect=OSError(errno.ENOLCK, "no locks")))
    pack(folder, tmp_path / "y", *MODES["raw"], "--workers", 0)  # such file systems there are


def test_quality_is_that_of_the_jpegs(folder, packs, tmp_path):
    pack(folder, tmp_path / "low", "--max-side", "48", "--quality", "10", "--workers", 0)
    assert os.path.getsize(tmp_path / "low") < 0.8 * os.path.getsize(packs["jpeg"])


def test_processes_that_are_killed(folder, packs, tmp_path, run):
    """Packers end with their parent, whose output they hold open, and it with them. Then it goes on."""
    flags = ["--pack", folder, "--out", tmp_path / "x", *MODES["raw"], "--workers", 2]
    assert run(*flags, script="data.py", before=killed_at(1, 20), timeout=60).returncode == -signal.SIGKILL
    kill = "script.BLOCK = 20\ninner = script.packed\ndef packed(path, **how):\n" \
           "    if path.endswith('tall.bmp'): os.kill(os.getpid(), signal.SIGKILL)\n    return inner(path, **how)\n" \
           "script.packed = packed\n"
    done = run(*flags, script="data.py", before=kill, timeout=60)
    assert done.returncode == 3 and "a process that packs was killed" in done.stderr.splitlines()[-1]
    pack(*flags[1:4:2], *flags[4:])
    assert (tmp_path / "x").read_bytes() == Path(packs["raw"]).read_bytes()


@pytest.mark.parametrize("workers", [0, 1, 3])
def test_no_more_is_made_ahead_than_memory_has_a_bound_for(workers):
    begun, read = [], 0
    items = (begun.append(i) or i for i in range(50))
    for result in data.in_order(concurrent.futures.ThreadPoolExecutor, workers, lambda i: i * i, items):
        assert result == read ** 2 and len(begun) - read <= 2 * workers + 1
        read += 1
    assert read == 50


@pytest.mark.parametrize("live", [False, True])
def test_progress_is_lines_or_on_a_terminal_one_line(live, folder, tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(data, "BLOCK", 40)
    monkeypatch.setattr(sys.stderr, "isatty", lambda: live, raising=False)
    monkeypatch.setattr(os, "get_terminal_size", lambda fd: os.terminal_size((80, 24)))
    pack(folder, tmp_path / "x", "--raw", 16, "--workers", 0)
    said = capsys.readouterr().err
    assert said.count("\n") == (1 if live else 3) and said.count("\r") == (3 if live else 0)
    assert said.endswith("104 of 104 images, 0.00 GB\n")


class Killed(BaseException):
    pass


@pytest.mark.parametrize("shards", [0, 3])
def test_parts_and_logs_that_a_kill_has_cut(shards, folder, tmp_path, monkeypatch):
    """Stopped again and again, with a part that is gone or shorter than the log says, and a line of it that has no
    end: the same bytes as in one go"""
    flags, inner, left = [*MODES["raw"], "--shards", shards, "--workers", 0], os.fsync, [0]
    pack(folder, tmp_path / "one", *flags)
    monkeypatch.setattr(data, "BLOCK", 20)

    def fsync(fd):
        inner(fd)
        left[0] -= 1
        if not left[0]:
            raise Killed
    monkeypatch.setattr(os, "fsync", fsync)
    for damage in ("part cut", "part gone", "line cut"):
        out = tmp_path / damage
        log, part = f"{out}.part.log", f"{out}.001" if shards else f"{out}.part"
        for first, left[0] in ((True, 5), (False, 2), (False, 2)):
            with pytest.raises(Killed):
                pack(folder, out, *flags)
            counts = [count for count, *_ in map(json.loads, Path(log).read_text().splitlines()[1:])]
            assert counts == sorted(set(counts))  # each goes on where the line before it ends
            if damage == "line cut":
                os.truncate(log, os.path.getsize(log) - 9)
            elif first and damage == "part cut":
                os.truncate(part, os.path.getsize(part) * 2 // 3)
            elif first:
                os.unlink(part)
        pack(folder, out, *flags)
        for name in ["one", *(f"one.{k:03}" for k in range(shards))]:
            assert (tmp_path / name).read_bytes() == (tmp_path / name.replace("one", damage)).read_bytes()


def test_shards_hold_the_same(folder, packs, tmp_path, run):
    """Killed between and inside of shards, and resumed; damage, a shard that is missing, cut short or not its own"""
    wanted = pack(folder, tmp_path / "one", *MODES["raw"], "--shards", 5, "--workers", 2)
    parts = [f"one.{k:03}" for k in range(5)]
    assert sorted(os.listdir(tmp_path)) == ["one", *parts]
    assert wanted["bytes"] == sum(os.path.getsize(tmp_path / n) for n in ["one", *parts])
    info = main("--info", tmp_path / "one")
    assert info["bytes"] == wanted["bytes"] and info["shards"] == 5 and info["images"] == 104
    sizes = [os.path.getsize(tmp_path / n) for n in parts]
    assert max(sizes) < 2 * min(sizes)
    images = [data.Images(data.open_folder(root)[0], lambda _: data.eval_transform(dict(PREPROCESS, resize=9, crop=8)))
              for root in (packs["raw"], str(tmp_path / "one"))]
    keys = [(0, i, 0) for i in range(0, 74, 3)]
    (a, y, _), (b, z, _) = (i.batch(keys) for i in images)
    assert torch.equal(a, b) and torch.equal(y, z)
    for at in (1, 2, 3, 5, 6, 8, 9, 10, 11):  # of the calls of fsync, some of them within a shard
        out = tmp_path / f"at{at}"
        flags = ["--pack", folder, "--out", out, *MODES["raw"], "--workers", 0, "--shards", 5]
        done = run(*flags, script="data.py", before=killed_at(at, 13))
        assert done.returncode == -signal.SIGKILL and not out.exists()
        main(*flags)
        for n in ["one", *parts]:
            other = n.replace("one", f"at{at}")
            assert (tmp_path / n).read_bytes() == (tmp_path / other).read_bytes()
            os.unlink(tmp_path / other)
        assert sorted(os.listdir(tmp_path)) == ["one", *parts]
    content = (tmp_path / "one.003").read_bytes()
    there = data.Pack(str(tmp_path / "one"))
    i = int(np.flatnonzero(there.shard == 3)[1])
    for damaged, said in ((content[:-1], "one.003: [0-9]+ bytes, expected"), (content + b"x", "one.003: [0-9]+ bytes"),
                          (None, "one.003: No such file"),
                          (content[:there.offset[i]] + bytes(3) + content[there.offset[i] + 3:],
                           f"{re.escape(there.name(i))}: damaged at bytes {there.offset[i]} to .*one.003")):
        os.unlink(tmp_path / "one.003")
        if damaged is not None:
            (tmp_path / "one.003").write_bytes(damaged)
        with pytest.raises(UserError, match=said):
            data.check_pack(str(tmp_path / "one"))
        (tmp_path / "one.003").write_bytes(content)
    (tmp_path / "x.001").write_bytes(b"mine")
    (tmp_path / "z.part").write_bytes(b"mine")
    for flags, said in (((tmp_path / "x", "--shards", 3), "x.001: exists"), ((tmp_path / "z",), "z.part: exists"),
                        ((tmp_path,), "is a folder"), ((tmp_path / "no" / "z",), "there is no folder .*/no$"),
                        ((tmp_path / "y", "--shards", 105), "--shards 105: .* 104 images"),
                        ((tmp_path / "y", "--shards", 3, "--overwrite"), "remove the old one")):
        with pytest.raises(UserError, match=said):
            pack(folder, *flags, "--raw", 20)
    assert (tmp_path / "x.001").read_bytes() == (tmp_path / "z.part").read_bytes() == b"mine"


def test_overwriting_a_pack_removes_its_shards(folder, packs, tmp_path):
    out = tmp_path / "one"
    pack(folder, out, *MODES["raw"], "--shards", 3)
    (tmp_path / "one.007").write_text("somebody else's")
    pack(folder, out, *MODES["raw"], "--overwrite")
    assert sorted(os.listdir(tmp_path)) == ["one", "one.007"]
    assert out.read_bytes() == open(packs["raw"], "rb").read()


def test_shards_leave_room_for_other_files(folder, tmp_path):
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    last = max(map(int, os.listdir("/proc/self/fd")))
    with contextlib.ExitStack() as stack:
        while stack.enter_context(open(os.devnull)).fileno() < last:  # other tests leave some open, with gaps between
            pass
        stack.callback(resource.setrlimit, resource.RLIMIT_NOFILE, (soft, hard))
        resource.setrlimit(resource.RLIMIT_NOFILE, (last + 50, hard))
        pack(folder, tmp_path / "x", "--raw", 16, "--workers", 0, "--shards", 60)
        made = data.Pack(str(tmp_path / "x"))
        for _ in range(30):
            stack.enter_context(open(os.devnull))
        assert len(made.maps) == 60


def test_other_settings_start_anew(folder, tmp_path, run):
    out = tmp_path / "x"
    run("--pack", folder, "--out", out, "--raw", 30, "--workers", 0, script="data.py", before=killed_at(1, 20))
    assert os.path.exists(f"{out}.part")
    pack(folder, out, "--raw", 20, "--workers", 0)
    assert data.load(f"{out}/val/ring/0000.jpg").size == (20, 20)


def test_training_on_a_lossless_pack_is_training_on_the_folder(tiny, run, tmp_path):
    pack(tiny, tmp_path / "pack", "--lossless", "--workers", 0)
    results = []
    for root, chunk in ((tiny, 4), (tmp_path / "pack", 4), (tmp_path / "pack", 0)):
        done = run("--data", root, "--epochs", 1, "--batch-size", 10, "--image-size", 32, "--workers", 1, "--out",
                   tmp_path / f"out{len(results)}", "--amp-dtype", "float32", "--recipe", "demo", "--random-erase", 0.5,
                   "--shuffle-chunk", chunk)
        assert done.returncode == 0, done.stderr[-1000:]
        result = json.loads(done.stdout.splitlines()[-1])
        results.append({k: result[k] for k in ("top1", "top5", "loss", "samples_seen")})
    assert results[0] == results[1] != results[2]  # another order, another network
    states = [torch.load(tmp_path / f"out{i}" / "last.pt", weights_only=True)["model"] for i in (0, 1)]
    assert all(torch.equal(states[0][k], states[1][k]) for k in states[0])


def test_folders_of_a_pack_are_those_of_the_file_system(tmp_path, monkeypatch):
    """With names that sort otherwise than their paths do; and names are gone through once, not once for each folder"""
    for name in ("a/x.jpg", "a-b/y.jpg", "a/c/z.jpg", "a/c/d/e/v.jpg", "a/c-/w.jpg", "B/a/u.jpg", "top.jpg"):
        (tmp_path / "set" / name).parent.mkdir(parents=True, exist_ok=True)
        Image.new("RGB", (3, 2)).save(tmp_path / "set" / name)
    pack(tmp_path / "set", tmp_path / "x", "--raw", 16, "--workers", 0)
    there, looks = data.open_pack(str(tmp_path / "x")), []
    monkeypatch.setattr(there, "all_names", type("Names", (list,), {
        "__iter__": lambda self: looks.append(1) or list.__iter__(self)})(there.all_names), raising=False)
    for inner in ("", "a", "a/c", "a/c/d", "a/c/d/e", "B", "none", "top.jpg", "a/x.jpg"):
        ours, theirs = (str(tmp_path / root / inner) for root in ("x", "set"))
        assert data.is_folder(ours) == data.is_folder(theirs), inner
        if data.is_folder(theirs):
            assert data.list_classes(ours) == data.list_classes(theirs)
            for folder in ("", *data.list_classes(theirs)[0]):
                assert data.images_below(ours, folder) == data.images_below(theirs, folder)
    assert len(looks) == 1


def test_a_flat_folder_splits_as_before(folder, tmp_path):
    flat = os.path.join(folder, "train")
    pack(flat, tmp_path / "flat", "--raw", 16, "--workers", 0)
    theirs, ours = data.open_folder(flat, val_split=0.3), data.open_folder(str(tmp_path / "flat"), val_split=0.3)
    for a, b in zip(theirs[:2], ours[:2]):
        assert [os.path.relpath(a.path(i), flat) for i in range(len(a))] == [
            os.path.relpath(b.path(i), tmp_path / "flat") for i in range(len(b))]
    assert len(data.scan_unlabelled(str(tmp_path / "flat"))) == len(data.scan_unlabelled(flat)) == 74


def test_names_of_equal_hashes_are_told_apart(folder, tmp_path, monkeypatch):
    monkeypatch.setattr(data, "name_key", lambda name: len(name) % 3)
    pack(folder, tmp_path / "x", "--raw", 16, "--workers", 0)
    files = data.open_folder(str(tmp_path / "x"))[0]
    for i in range(len(files)):
        inner = os.path.relpath(files.path(i), tmp_path / "x")
        there = data.open_pack(str(tmp_path / "x"))
        assert there.name(there.find(inner)) == inner
    assert there.find("train/none.jpg") is None
    with pytest.raises(OSError, match="no such image"):
        data.load(str(tmp_path / "x" / "train" / "none.jpg"))


def orientation(path):
    image = Image.fromarray(np.zeros((20, 30, 3), np.uint8))
    exif = image.getexif()
    exif[0x0112] = 6
    image.save(path, exif=exif)


def test_orientation_tags(tmp_path):
    (tmp_path / "set" / "a").mkdir(parents=True)
    orientation(tmp_path / "set" / "a" / "x.jpg")
    for mode, flags in MODES.items():
        pack(tmp_path / "set", tmp_path / mode, *flags, "--workers", 0)
        assert data.load(str(tmp_path / mode / "a" / "x.jpg")).size == (30, 20)
        if mode == "lossless":
            assert data.load(str(tmp_path / mode / "a" / "x.jpg"), exif=True).size == (20, 30)
            continue
        with pytest.raises(UserError, match="packed without, and keeps no orientation"):
            data.load(str(tmp_path / mode / "a" / "x.jpg"), exif=True)
        with pytest.raises(UserError, match="packed without, and keeps no orientation"):
            data.scan_unlabelled(str(tmp_path / mode)).content(np.array([0]), exif=True)
        pack(tmp_path / "set", tmp_path / (mode + "2"), *flags, "--workers", 0, "--exif")
        assert data.load(str(tmp_path / (mode + "2") / "a" / "x.jpg"), exif=True).size == (20, 30)


def test_tags_that_a_pack_does_not_keep_are_refused_before_a_run_begins(packs, tmp_path):
    import train
    (tmp_path / "best.pt").write_bytes(b"an earlier run's")
    flags = "--data", packs["raw"], "--out", str(tmp_path), "--overwrite", "--exif", "--auto-augment", "ra"
    with pytest.raises(UserError, match="^[^ ]*raw: --exif: was packed without, and keeps no orientation$") as caught:
        train.main(train.get_args_parser().parse_args([*flags, "--device", "cpu"]))
    assert caught.value.code == 2 and os.listdir(tmp_path) == ["best.pt"]


# ---------------------------------------------------------------------------------------------------- what is wrong

@pytest.mark.parametrize("mode", MODES)
def test_every_damaged_byte_is_noticed(mode, packs, tmp_path):
    """In a record by the image's name and its place; in the index at once; a short file by its length."""
    good = Path(packs[mode]).read_bytes()
    rng, path = np.random.default_rng(0), str(tmp_path / "damaged")
    there = data.Pack(packs[mode])
    first_column = min(offset for offset, _ in there.head["columns"].values())
    covered = np.zeros(len(good), bool)
    for offset, size in [*there.head["columns"].values(), *zip(there.offset.tolist(), there.size.tolist())]:
        covered[offset:offset + size] = True
    covered[there.head["columns"]["names"][0] + there.head["columns"]["names"][1]:] = True
    head = good.index(b'{"check": ')
    for at in [*rng.choice(np.flatnonzero(covered), 60), *rng.integers(head + 9, len(good), 60)]:
        bad = bytearray(good)
        bad[at] ^= 1 << int(rng.integers(8))
        Path(path).write_bytes(bad)
        with pytest.raises(UserError) as caught:
            data.check_pack(path)
        i = int(np.searchsorted(there.offset, at, side="right")) - 1
        if at < first_column:
            assert there.name(i) in str(caught.value) and f"bytes {there.offset[i]} to" in str(caught.value)
        assert path in str(caught.value) and caught.value.code == 3
    for length in [0, 5, 30, len(good) // 2, len(good) - 1, *rng.integers(0, len(good), 20).tolist()]:
        Path(path).write_bytes(good[:length])
        with pytest.raises(UserError, match="no pack|cut short|no class folders|no such folder|damaged"):
            data.check_pack(path)


class Map:
    """Notes what is asked for, instead of a memory map."""

    def __init__(self, asked, shard=0):
        self.asked, self.shard = asked, shard

    def madvise(self, what, start, length):
        assert start % os.sysconf("SC_PAGE_SIZE") == 0
        self.asked.append((self.shard, start, start + length))


def test_what_may_be_on_disk_is_asked_for(packs):
    """Whole records, once, as long as the pack fits into memory; neighbours in one piece"""
    there, asked = data.Pack(packs["raw"]), []
    there.maps, index = [Map(asked)], np.array([3, 70, 9, 71])
    for large, pieces in ((False, [(3, 3), (9, 9), (70, 71)]), (False, []), (True, [(3, 3), (9, 9), (70, 71)])):
        asked.clear()
        there.leaves_memory = large
        there.content(index)
        for (_, start, end), (first, last) in zip(asked, pieces, strict=True):
            assert 0 <= int(there.offset[first]) - start < os.sysconf("SC_PAGE_SIZE")
            assert end == int(there.offset[last]) + int(there.size[last])


@pytest.mark.parametrize("shards", [0, 3])
def test_chunks_are_asked_for_in_one_piece_and_once(shards, folder, packs, tmp_path, monkeypatch):
    """Over two epochs in the order of chunks"""
    monkeypatch.setattr(data, "MIXED", 2)
    path = packs["raw"]
    if shards:
        pack(folder, path := str(tmp_path / "pack"), *MODES["raw"], "--shards", shards)
    files, asked, seen, where = data.open_folder(path)[0], [], [], data.open_pack(path)
    monkeypatch.setattr(where, "maps", [Map(asked, k) for k in range(len(where.maps))])
    where.seen[:] = False
    where.content(np.arange(len(where)))  # so that it asks for none by itself
    asked.clear()
    files.keep_together(7)
    order = data.Order(files.labels, 5, chunk=7)
    for order.epoch in range(2):
        for keys in order:
            index = np.array([i for _, i, _ in keys])
            places = files.content(index)[1].tolist()
            for (shard, begin, size), i in zip(places, index):  # this time or earlier
                assert any(s == shard and a <= begin and begin + size <= b for s, a, b in asked), i
        pieces, chunks = len(asked) - sum(seen), -(-len(files) // 7)
        assert chunks / 2 <= pieces <= chunks + 2 * data.MIXED + shards  # an epoch's last may be the next one's first
        seen.append(len(asked) - sum(seen))


def test_a_damaged_image_travels_as_a_complaint(packs, tmp_path):
    """As one in a folder does: training takes the next, evaluation counts it."""
    path = str(tmp_path / "pack")
    shutil.copy(packs["raw"], path)
    files = data.open_folder(path)[0]
    there = data.Pack(path)
    i = there.find(os.path.relpath(files.path(3), path))
    with open(path, "r+b") as f:
        f.seek(int(there.offset[i]) + 5)
        f.write(b"\xaa\x55\xaa")
    for replace in (True, False):
        images = data.Images(files, lambda _: data.eval_transform(dict(PREPROCESS, resize=9, crop=8)), replace=replace)
        pixels, label, complaint = images[(0, 3, 0)]
        many, labels, complaints = images.batch([(0, k, 0) for k in range(2, 6)])
        assert complaints == [complaint] and len(labels) == len(many) == 3 + replace
        assert labels.tolist() == files.labels[[2, 4, 4, 5] if replace else [2, 4, 5]].tolist()
        assert torch.equal(many[-1].permute(1, 2, 0), images[(0, 5, 0)][0])
        assert files.path(3) in complaint and f"damaged at bytes {there.offset[i]}" in complaint
        assert (pixels is not None) == replace and (label == files.labels[4] if replace else label == -1)


@pytest.mark.parametrize("spoil, said", [(lambda path: path.write_bytes(b"nothing"), "not an image"),
                                         (lambda path: path.symlink_to("nowhere.jpg"), ".*No such file")])
def test_images_that_do_not_decode(spoil, said, folder, tmp_path):
    root = tmp_path / "set"
    shutil.copytree(folder, root)
    spoil(root / "train" / "disk" / "bad.jpg")
    before = signal.signal(signal.SIGTERM, lambda *_: None)  # what its processes inherit must not keep them
    try:
        with pytest.raises(UserError, match=f"disk/bad.jpg: {said}.*--on-corrupt skip"):
            pack(root, tmp_path / "x", "--raw", 16, "--workers", 2)
    finally:
        signal.signal(signal.SIGTERM, before)
    (tmp_path / "alone").mkdir()
    spoil(tmp_path / "alone" / "bad.jpg")
    with pytest.raises(UserError, match="alone: none of 1 images decodes"):
        pack(tmp_path / "alone", tmp_path / "none", "--raw", 16, "--workers", 0, "--on-corrupt", "skip")
    assert not (tmp_path / "none").exists()
    found = pack(root, tmp_path / "x", "--raw", 16, "--workers", 2, "--on-corrupt", "skip")
    assert found["images"] == 104 and found["corrupt"] == 1
    assert len(data.open_folder(str(tmp_path / "x"))[0]) == 74


def test_a_file_that_vanishes_is_one_that_does_not_decode(folder, tmp_path, monkeypatch):
    """After the folder was listed, before it is looked at"""
    inner = data.images_below
    monkeypatch.setattr(data, "images_below", lambda *args: [*inner(*args), "train/gone.jpg"])
    with pytest.raises(UserError, match="train/gone.jpg: .*No such file.*--on-corrupt skip"):
        pack(folder, tmp_path / "x", "--raw", 16, "--workers", 0)
    found = pack(folder, tmp_path / "x", "--raw", 16, "--workers", 0, "--on-corrupt", "skip")
    assert (found["images"], found["corrupt"]) == (104, 1)


def test_a_lossless_pack_keeps_files_whose_pixels_restart_markers_would_change(folder, tmp_path, monkeypatch):
    other = Path(folder, "train", "ring", "small.jpg").read_bytes()
    monkeypatch.setattr(data, "with_restarts", lambda content: other)
    pack(folder, tmp_path / "x", "--lossless", "--workers", 0)
    made = data.Pack(str(tmp_path / "x"))
    for i in range(len(made)):
        assert made.record(i).tobytes() == Path(folder, made.name(i)).read_bytes()


def test_a_full_disk(folder, tmp_path, run):
    limit = "import resource\nresource.setrlimit(resource.RLIMIT_FSIZE, (100_000, 100_000))\n" \
            "signal.signal(signal.SIGXFSZ, signal.SIG_IGN)\n"
    done = run("--pack", folder, "--out", tmp_path / "x", "--raw", 64, "--workers", 0, script="data.py", before=limit)
    assert done.returncode == 3 and "not written" in done.stderr.splitlines()[-1] and not (tmp_path / "x").exists()
    pack(folder, tmp_path / "x", "--raw", 64, "--workers", 0)
    assert data.check_pack(str(tmp_path / "x"))["images"] == 104


@pytest.mark.parametrize("flags, complaint, code", [
    ([], "one of --lossless", 2), (["--raw", 9, "--lossless"], "one of --lossless", 2),
    (["--raw", 0], "--raw: 0 must lie in [1, 1e+09]", 2), (["--raw", 9, "--workers", -1], "--workers: -1 must be", 2),
    (["--raw", 9, "--quality", 5], "goes with --max-side", 2), (["--raw", 9, "--shards", -1], "--shards: -1 must", 2),
    (["--max-side", 9, "--quality", 0], "--quality: 0 must lie in", 2), (["--max-side", 0], "--max-side: 0 must", 2),
    (["--lossless", "--exif"], "--exif: a lossless pack", 2), (["--raw", 9, "--pack", "nowhere"], "no such folder", 3)])
def test_what_packing_cannot_honour_is_refused(flags, complaint, code, folder, tmp_path, capsys):
    with pytest.raises((UserError, SystemExit)) as caught:
        pack(folder, tmp_path / "x", *flags)
    assert complaint in str(caught.value) + capsys.readouterr().err
    assert caught.value.code == code and os.listdir(tmp_path) == []


def test_packs_are_not_overwritten_and_folders_not_described_as_packs(folder, packs, tmp_path):
    with pytest.raises(UserError, match="exists; --overwrite"):
        pack(folder, packs["raw"], "--raw", 9)
    (tmp_path / "x").write_text("text")
    for args, match in ((["--info", tmp_path / "x"], "no pack"), (["--info", tmp_path / "none"], "no pack"),
                        (["--raw", "9"], "--raw goes with --pack"), (["--data", tmp_path / "x"], "it is a file"),
                        (["--info", tmp_path / "x", "--raw", 5], "--info: no --raw with it"),
                        (["--pack", folder, "--raw", 9, "--data", "x"], "--pack: no --data with it"),
                        (["--pack", folder, "--import-imagenet", "x"], "no --"),
                        (["--pack", packs["raw"], "--raw", 9, "--out", tmp_path / "o"], "lies in a pack, or is one"),
                        (["--pack", tmp_path / "x", "--raw", 9, "--out", tmp_path / "o"], "it is a file, and no pack"),
                        (["--out", "x"], "--out goes with --import-imagenet and --pack"),
                        (["--import-imagenet", folder, "--out", tmp_path / "o", "--val-labels", packs["raw"]],
                         "no line with ILSVRC2012_val")):
        with pytest.raises(UserError, match=match):
            main(*args)
