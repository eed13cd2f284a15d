"""Images in, uint8 batches out: folders, decoding, transforms, order, loaders, mixing, demo data.

  python data.py                                    # make the demo set under runs/demo and describe it
  python data.py --data /imagenet                   # describe a folder: classes, images per split, what was ignored
  python data.py --import-imagenet ARCHIVES --out /imagenet     # the three ILSVRC2012 tar files -> train/ and val/
  python data.py --pack /imagenet --out FILE --raw 256          # one file that is read as the folder is
  python data.py --info FILE                                    # what a pack holds, and whether all of it is intact

A data set is a folder with train/ and val/, each with a folder per class; or one folder of class folders, split by a
hash of the file's name; or a pack of either, whose images have the paths FILE/train/CLASS/NAME. Only uint8 pixels leave
the workers; they are normalised on the device (resnet50.normalize). Order and augmentation are a pure function of
(seed, epoch, index, repeat): no state lives in a worker, so the number of workers changes nothing and a run resumes in
mid-epoch by arithmetic.
"""
import argparse
import atexit
import collections
import concurrent.futures
import contextlib
import errno
import fcntl
import functools
import hashlib
import io
import itertools
import json
import mmap
import multiprocessing
import os
import pathlib
import re
import resource
import shutil
import signal
import struct
import sys
import tarfile
import threading
import time
import warnings
import zlib

import numpy as np
import torch
from PIL import ExifTags, Image, ImageDraw, ImageFilter

import csrc
from resnet50 import Help, UserError, above_zero, amount, between, fraction, positive, run_script

FORMATS = ("JPEG", "PNG", "WEBP")  # what a stranger may send to a server
TRAIN_FORMATS = FORMATS + ("BMP", "GIF", "PPM", "TIFF")
EXTENSIONS = (".jpg", ".jpeg", ".jfif", ".png", ".webp", ".bmp", ".gif", ".ppm", ".pgm", ".tif", ".tiff")
VAL_NAMES = ("val", "valid", "validation")
HELD_OUT = 0.1  # of a folder that has none of these
DEMO = "runs/demo"
# by orientation tag; ImageOps.exif_transpose also writes the tags anew, and fails where others are damaged
TURNS = dict(enumerate((Image.Transpose.FLIP_LEFT_RIGHT, Image.Transpose.ROTATE_180, Image.Transpose.FLIP_TOP_BOTTOM,
                        Image.Transpose.TRANSPOSE, Image.Transpose.ROTATE_270, Image.Transpose.TRANSVERSE,
                        Image.Transpose.ROTATE_90), 2))
# damaged EXIF blocks warn for thousands of good ImageNet files; catch_warnings() around each would not do: left by
# threads in another order than entered, it silences everything for good
warnings.filterwarnings("ignore", module=r"PIL\.")


def progress(text, last=False):
    """On a terminal one line, cut to its width and drawn anew until the last; elsewhere plain lines"""
    live = sys.stderr.isatty()
    if live:
        text = "\r\x1b[K" + (text if last else text[:os.get_terminal_size(2).columns - 1])
    print(text, end="" if live and not last else "\n", file=sys.stderr, flush=True)


def hashed(content, size=8):
    """bytes -> a number of `size` bytes, the same on every machine"""
    return int.from_bytes(hashlib.blake2b(content, digest_size=size).digest(), "little")


# --------------------------------------------------------------------------------------------------- decoding

def decode(data, formats=TRAIN_FORMATS, exif=False, short_side=None):
    """Encoded bytes -> PIL image, mode RGB. The content decides the format, not the file name. Alpha is dropped, 16-bit
    grey keeps its high byte, CMYK is converted; exif=True turns the image as its orientation tag says. A JPEG is
    decoded at a half, a quarter or an eighth of its size (a sharp low-pass in its own transform) where the short side
    keeps `short_side` pixels. Raises ValueError for what is damaged, cut short, or in none of `formats`; nothing is
    repaired in silence."""
    try:
        image = Image.open(io.BytesIO(data), formats=formats)
        if image.format in ("JPEG", "MPO") and not jpeg_ends(data):  # MPO: a JPEG that others follow
            raise ValueError("cut short: no end-of-image marker")
        if image.format == "PNG" and data.rfind(b"\0\0\0\0IEND") < 0:  # padded with zeros it decodes, as a JPEG does
            raise ValueError("cut short: no IEND chunk")
        if short_side:
            image.draft(None, (short_side, short_side))
        image.load()
        turn = None
        with contextlib.suppress(SyntaxError, ValueError, struct.error):  # a damaged block beside good pixels
            turn = TURNS.get(image.getexif().get(ExifTags.Base.Orientation)) if exif else None
        if turn is not None:
            image = image.transpose(turn)
        if image.mode.startswith("I") or image.mode == "F":
            image = grey16(image)
        return image if image.mode == "RGB" else image.convert("RGB")
    except Image.UnidentifiedImageError as error:
        raise ValueError(f"not an image in any of {', '.join(formats)}") from error
    except (OSError, SyntaxError, ValueError, EOFError, struct.error, zlib.error, IndexError, TypeError, KeyError,
            Image.DecompressionBombError, OverflowError, MemoryError) as error:
        raise ValueError(f"damaged or cut short: {error}") from error


def jpeg_ends(data):
    """True if an end-of-image marker follows the first scan. A file cut short and padded with zeros decodes without an
    error otherwise. Header segments are stepped over, so that a thumbnail's own marker does not count."""
    at = 2
    while at + 4 <= len(data) and data[at] == 0xFF and data[at + 1] != 0xDA:
        at += 1 if data[at + 1] == 0xFF else 2 + struct.unpack(">H", data[at + 2:at + 4])[0]
    return data.find(b"\xff\xd9", at) >= 0


def grey16(image):
    """Modes I;16, I and F hold 16-bit grey (PNG, TIFF); PIL's own conversion to 8 bits would saturate at 255. Where
    none is above 255, floats and 32-bit integers are bytes, and floats up to 1 shares of white."""
    values = np.nan_to_num(np.asarray(image)).astype(np.float64)  # float TIFFs may have NaN where there is nothing
    if image.mode in ("F", "I") and (most := values.max(initial=0)) <= 255:
        values *= 65535 if image.mode == "F" and most <= 1 else 257
    return Image.fromarray((values.clip(0, 65535) / 256).astype(np.uint8))


# ------------------------------------------------------------------------------------------------------ packs

MAGIC = b"resnet50pack/1\r\n"
BLOCK = 256  # images between two notes of how far a pack has got
MIXED = 256  # chunks of neighbouring images that are mixed, where an order keeps them together
COLUMNS = dict(key="<u8", offset="<u8", size="<u4", width="<u4", height="<u4", crc="<u4", end="<u8", shard="<u2",
               order="<u4", names="u1")


class Pack:
    """One file with all images of a folder, memory-mapped: MAGIC, records, the columns of an index, a JSON head, its
    length as uint64 and MAGIC again. Columns have an entry per image in the order of names: offset, size, width, height
    and CRC-32 of its record, end of its name in `names`, number of the shard; and a hash of each name, sorted, with the
    position it belongs to. `check` of the head is the CRC-32 of the rest of it. Shards are files beside it, FILE.000
    and so on, with the records. A record is an image file, or uint8 (height, width, 3)."""

    def __init__(self, path):
        self.path = path
        index = np.frombuffer(mapped(path), np.uint8)
        tail = len(MAGIC) + 8
        if len(index) < 2 * tail or index[-len(MAGIC):].tobytes() != MAGIC:
            raise UserError(f"{path}: cut short at byte {len(index)}: a pack ends with its index")
        length = int(index[-tail:-len(MAGIC)].view("<u8")[0])
        try:
            self.head = json.loads(index[-tail - length:-tail].tobytes())
            if self.head.pop("check", None) not in (None, check_of(self.head)):  # the first packs have none
                raise ValueError("head")
            for name, kind in COLUMNS.items():
                offset, size = self.head["columns"][name]
                part = index[offset:offset + size]
                if len(part) != size or zlib.crc32(part) != self.head["checks"][name]:
                    raise ValueError(f"column {name} at byte {offset}")
                setattr(self, name, part.view(kind))
            shards = shard_names(path, self.head["shards"])
        except (ValueError, KeyError, TypeError) as error:
            raise UserError(f"{path}: damaged index ({type(error).__name__}: {error})") from error
        self.files = shards or [path]
        # a map keeps its file open, and the files that a process may have open, often 1024, are for others too
        soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
        resource.setrlimit(resource.RLIMIT_NOFILE, (min(soft + len(self.files), hard), hard))
        self.maps = [mapped(p) for p in self.files]
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # nobody writes into them
            self.parts = [torch.frombuffer(m, dtype=torch.uint8) for m in self.maps]
        for k, part in enumerate(shards):
            ends = (self.offset.astype(np.int64) + self.size)[self.shard == k]
            if len(self.parts[k]) != ends.max(initial=len(MAGIC)):
                raise UserError(f"{part}: {len(self.parts[k])} bytes, expected {ends.max(initial=len(MAGIC))}")
        self.seen = np.zeros(len(self.key), bool)  # whose checksum was compared by this process
        memory = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
        self.leaves_memory = sum(map(len, self.parts)) > memory / 2

    def __len__(self):
        return len(self.key)

    def name(self, i):
        return os.fsdecode(self.names[int(self.end[i - 1]) if i else 0:int(self.end[i])].tobytes())

    @functools.cached_property
    def all_names(self):
        blob, ends = self.names.tobytes(), self.end.tolist()
        return [os.fsdecode(blob[a:b]) for a, b in zip([0] + ends, ends)]

    @functools.cached_property
    def spans(self):
        """{folder: (its first image, behind its last)}, with those of the folders in it, which follow one another"""
        spans, end = {}, 0
        for folder, names in itertools.groupby(self.all_names, os.path.dirname):
            begin, end = end, end + sum(1 for _ in names)
            for parent in {"", *itertools.accumulate(folder.split("/"), os.path.join)}:
                spans[parent] = spans.get(parent, (begin,))[0], end
        return spans

    def folders(self, inner):
        return sorted(os.path.basename(f) for f in self.spans if f and os.path.dirname(f) == inner)

    def below(self, inner, folder):
        begin, end = self.spans.get("/".join(p for p in (inner, folder) if p), (0, 0))
        return [name[len(inner) + 1 if inner else 0:] for name in self.all_names[begin:end]]

    def find(self, name):
        """-> position of an image, or None"""
        key = name_key(name)
        at = int(np.searchsorted(self.key, key))
        while at < len(self.key) and self.key[at] == key:
            if self.name(i := int(self.order[at])) == name:
                return i
            at += 1

    def record(self, i):
        """-> uint8 view of an image's bytes. Raises ValueError where they are not what was written."""
        begin, size, shard = int(self.offset[i]), int(self.size[i]), int(self.shard[i])
        part = self.parts[shard][begin:begin + size].numpy()
        if not self.seen[i]:
            if zlib.crc32(part) != self.crc[i]:
                raise ValueError(f"damaged at bytes {begin} to {begin + size} of {self.files[shard]}")
            self.seen[i] = True
        return part

    def ask(self, index):
        """Has the system begin to read records, all at once, neighbours in one piece, and no more than they: it would
        read each in pieces by itself, with several times as much around them."""
        places = np.stack([self.shard[index], self.offset[index], self.offset[index] + self.size[index]], 1)
        places = places[np.lexsort(places.T[::-1])].astype(np.int64)
        new = np.diff(places[:, 0], prepend=-1) != 0
        new[1:] |= places[1:, 1] > places[:-1, 2] + mmap.PAGESIZE
        first = np.flatnonzero(new)
        for (shard, begin, _), end in zip(places[first], places[np.append(first, len(index))[1:] - 1, 2]):
            page = begin // mmap.PAGESIZE * mmap.PAGESIZE
            self.maps[shard].madvise(mmap.MADV_WILLNEED, page, end - page)

    def content(self, index, exif=False):
        """Files.content of the records at those positions"""
        turns = self.turns(exif)
        self.ask(index if self.leaves_memory else index[~self.seen[index]])
        places = np.stack([self.shard[index], self.offset[index], self.size[index]], 1).astype(np.int64)
        seen = np.stack([self.height[index], self.width[index]], 1).astype(np.int64)
        for row in range(len(index)) if turns else np.flatnonzero(self.seen[index] == 0):
            try:
                record = self.record(index[row])
                if turns and has_exif(record.tobytes()):
                    seen[row] = 0
            except ValueError:
                seen[row] = 0
        return self.parts, torch.from_numpy(places), seen, self.head["mode"] == "raw"

    def image(self, i, exif=False):
        """-> PIL image, mode RGB"""
        turns, part = self.turns(exif), self.record(i)
        if self.head["mode"] == "raw":
            return Image.fromarray(part.reshape(int(self.height[i]), int(self.width[i]), 3))
        return decode(part.tobytes(), exif=turns)

    def turns(self, exif):
        """Whether what is read is still to be turned, if exif is wanted"""
        if exif and not self.head["exif"] and self.head["mode"] != "lossless":
            raise UserError(f"{self.path}: --exif: was packed without, and keeps no orientation", code=2)
        return exif and self.head["mode"] == "lossless"


def mapped(path):
    """-> a file's memory map"""
    try:
        with open(path, "rb") as f:
            return mmap.mmap(f.fileno(), 0, access=mmap.ACCESS_READ)
    except (OSError, ValueError) as error:  # ValueError: empty
        raise UserError(f"{path}: {getattr(error, 'strerror', None) or error}") from error


def name_key(name):
    return hashed(os.fsencode(name))


open_pack = functools.lru_cache(8)(Pack)


def pack_of(path):
    """A path -> the Pack that it lies in, or is, and its name there; (None, None) for one of the file system's own"""
    at, inner = path, []
    while at and not os.path.lexists(at):
        at, name = os.path.split(at)
        inner.insert(0, name)
    if not at or not os.path.isfile(at) or (not inner and not is_pack(at)):
        return None, None
    return open_pack(at), "/".join(n for n in inner if n)


def is_pack(path):
    with contextlib.suppress(OSError):
        with open(path, "rb") as f:
            return f.read(len(MAGIC)) == MAGIC
    return False


def is_folder(path):
    """Whether a folder of that path exists, in the file system or in a pack"""
    pack, inner = pack_of(path)
    return inner in pack.spans if pack else os.path.isdir(path)


def in_pack(path):
    """-> the Pack that an image lies in and its position there, or None, None for a file of its own. Raises OSError"""
    pack, inner = pack_of(os.path.dirname(path))
    i = pack.find(os.path.join(inner, os.path.basename(path))) if pack else None
    if pack and i is None:
        raise FileNotFoundError(errno.ENOENT, "no such image", path)
    return pack, i


def read(path):
    """-> the bytes of an image file, or of its record in a pack. Raises OSError, or ValueError for a damaged record."""
    pack, i = in_pack(path)
    if pack:
        return pack.record(i).tobytes()
    with open_image(path) as f:
        return f.read()


def open_image(path):
    """-> a file to read, which a named pipe with nobody at its other end would be waited for without O_NONBLOCK"""
    return open(path, "rb", opener=lambda path, flags: os.open(path, flags | os.O_NONBLOCK))


def load(path, exif=False):
    """An image of a folder or a pack -> PIL image, mode RGB. Raises OSError, or ValueError as decode does."""
    pack, i = in_pack(path)
    return pack.image(i, exif) if pack else decode(read(path), exif=exif)


def packed(path, mode, side, quality, exif):
    """An image file -> (bytes of its record, width, height), or (complaint, None, None)"""
    try:
        content = read(path)
        image = decode(content, exif=exif and mode != "lossless")
        width, height = image.size
        if mode == "lossless":
            restarted = with_restarts(content)
            return restarted if np.array_equal(decode(restarted), image) else content, width, height
        scale = side / (min if mode == "raw" else max)(width, height)
        if scale < 1:
            width, height = (max(1, round(scale * n)) for n in (width, height))
            image = image.resize((width, height), Image.Resampling.BICUBIC, reducing_gap=3.0)
        if mode == "raw":
            return image.tobytes(), width, height
        if scale < 1 or exif or content[:2] != b"\xff\xd8":  # others are small enough as they are
            buffer = io.BytesIO()
            image.save(buffer, "JPEG", quality=quality)
            content = buffer.getvalue()
        return with_restarts(content), width, height
    except (OSError, ValueError) as error:
        return f"{path}: {error}", None, None


def packed_all(paths, **how):
    """packed() of each: a message between processes for every image would take as long as a small image does"""
    return [packed(p, **how) for p in paths]


def with_restarts(content):
    """A JPEG file -> the same with restart markers, so that what lies outside a crop need not be decoded; others as
    they are"""
    made = csrc.jpeg_restart(torch.frombuffer(bytearray(content), dtype=torch.uint8))
    return made.numpy().tobytes() if len(made) else content


def make_pack(root, out, mode, side=None, quality=90, workers=0, exif=False, skip=False, shards=0):
    """Writes all images below a folder into one file, or their records into `shards` more, the same bytes whatever the
    workers. Killed, it goes on at the last BLOCK when it is called with the same arguments. -> dict of counts"""
    names = images_below(root)
    if not names:
        raise UserError(f"{root}: no images ({', '.join(EXTENSIONS)})")
    if shards > len(names):
        raise UserError(f"--shards {shards}: {root} has {len(names)} images", code=2)
    paths = [os.path.join(root, n) for n in names]
    about = [mode, side, quality, exif, skip, shards, [[n, *state_of(p)] for n, p in zip(names, paths)]]
    index, separate = out + ".part", shard_names(out, shards)
    parts = separate or [index]
    log = PackLog(out + ".part.log", parts, hashlib.blake2b(json.dumps(about).encode(), digest_size=16).hexdigest())
    foreign = [p for p in separate if os.path.exists(p) and not log.kept]
    with contextlib.suppress(OSError), open(index, "rb") as f:  # an empty one is of a process that was killed
        foreign += [index] * (not MAGIC.startswith(f.read(len(MAGIC))))
    if foreign:
        raise UserError(f"{foreign[0]}: exists, and is none of this pack's", code=2)
    csrc.load()  # once, before there are processes
    work = functools.partial(packed_all, mode=mode, side=side, quality=quality, exif=exif)
    pool = functools.partial(concurrent.futures.ProcessPoolExecutor, mp_context=multiprocessing.get_context("fork"),
                             initializer=start_packer)
    try:
        chunks = (paths[k:k + 4] for k in range(log.done, len(paths), 4))
        with log.open(), contextlib.closing(in_order(pool, workers, work, chunks)) as made:
            records, size = itertools.chain.from_iterable(made), sum(r[1] for r in log.rows)
            for shard, path in enumerate(parts):
                end = -(-(shard + 1) * len(names) // len(parts))
                with open_part(path, log.rows, shard) as f:
                    while log.done < end:
                        done = min(log.done + BLOCK, end)
                        block = write_block(f, shard, names[log.done:done], records, skip)
                        log.add(done, block)
                        size += sum(r[1] for r in block)
                        progress(f"{log.done} of {len(names)} images, {size / 1e9:.2f} GB", last=log.done == len(names))
            if not log.rows:
                raise UserError(f"{root}: none of {len(names)} images decodes")
            with open_part(index, [] if shards else log.rows, 0) as f:
                write_index(f, log.rows, dict(mode=mode, side=side, quality=quality if mode == "jpeg" else None,
                                              exif=exif, shards=shards))
        os.replace(index, out)
        os.unlink(log.path)
    except concurrent.futures.BrokenExecutor as error:  # without memory the system kills the largest
        raise UserError(f"{out}: a process that packs was killed; the same command goes on, with fewer --workers if "
                        "memory was short") from error
    except OSError as error:
        raise UserError(f"{out}: not written ({error.strerror or error}); the same command goes on") from error
    return dict(images=len(log.rows), corrupt=len(names) - len(log.rows), bytes=pack_size(out, shards))


def state_of(path):
    """-> (size, time of its last change), of links to nothing and files that are gone (): these do not decode"""
    with contextlib.suppress(OSError):
        found = os.stat(path)
        return found.st_size, found.st_mtime_ns
    return ()


def write_block(f, shard, names, records, skip):
    """Writes the next records, one for each name -> their rows of the index, on the disk when this returns"""
    block = []
    for name in names:
        content, width, height = next(records)
        if width is not None:
            block.append([f.tell(), len(content), width, height, zlib.crc32(content), shard, name])
            f.write(content)
        elif not skip:
            raise UserError(f"{content} (--on-corrupt skip leaves such files out)")
    f.flush()
    os.fsync(f.fileno())
    return block


class PackLog:
    """Beside an unfinished pack: the digest of its images and settings, then a line for each BLOCK that is written."""

    def __init__(self, path, parts, digest):
        """Reads what there is of the same pack, as far as its parts still have it"""
        self.path, self.digest = path, digest
        self.rows, self.done, self.kept = [], 0, 0  # of the index; images; bytes of the log that say so
        sizes = [os.path.getsize(p) if os.path.exists(p) else 0 for p in parts]
        with contextlib.suppress(OSError, ValueError), open(path) as f:
            for line in f:
                said = json.loads(line)
                if not line.endswith("\n") or not self.kept and said != digest:  # cut by a kill, or of another pack
                    break
                if self.kept:
                    done, block = said
                    if any(r[0] + r[1] > sizes[r[5]] for r in block):
                        break
                    self.rows += block
                    self.done = done
                self.kept += len(line)

    def open(self):
        self.file = open(self.path, "a")
        try:
            fcntl.lockf(self.file, fcntl.LOCK_EX | fcntl.LOCK_NB)  # which no fork holds on to
        except OSError as error:  # others than these are of file systems without locks
            alone = error.errno not in (errno.EAGAIN, errno.EACCES)
        else:  # or another has ended since this was read
            alone = os.path.exists(self.path) and os.path.getsize(self.path) >= self.kept
        if not alone:
            raise UserError(f"{self.path}: another process is writing this pack", code=2)
        self.file.truncate(self.kept)  # what is written next would not follow from the rest
        self.file.seek(self.kept)
        if not self.kept:
            self.write(self.digest)
        return self.file

    def write(self, line):
        self.file.write(json.dumps(line) + "\n")
        self.file.flush()

    def add(self, done, block):
        self.done = done
        self.rows += block
        self.write([done, block])


def shard_names(out, shards):
    return [f"{out}.{k:03}" for k in range(shards)]


def pack_size(path, shards):
    return sum(os.path.getsize(p) for p in [path, *shard_names(path, shards)])


def open_part(path, rows, shard):
    """-> file at the end of what `rows` say is in it"""
    end = next((r[0] + r[1] for r in reversed(rows) if r[5] == shard), 0)
    f = open(path, "ab")
    f.truncate(end)
    f.seek(end)
    if not end:
        f.write(MAGIC)
    return f


def start_packer():
    """Ctrl-C is its parent's affair; SIGTERM and its parent's death must end it, whatever it inherits"""
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    signal.signal(signal.SIGTERM, signal.SIG_DFL)
    parent = multiprocessing.parent_process()
    threading.Thread(target=lambda: (parent.join(), os._exit(1)), daemon=True).start()


def write_index(f, rows, head):
    keys = np.array([name_key(r[6]) for r in rows], "<u8")
    order = np.argsort(keys, kind="stable")
    encoded = [os.fsencode(r[6]) for r in rows]
    numbers = np.array([r[:6] for r in rows], "<u8").reshape(-1, 6).T
    columns = dict(zip(("offset", "size", "width", "height", "crc", "shard"), numbers), key=keys[order], order=order,
                   end=np.cumsum([len(e) for e in encoded]), names=np.frombuffer(b"".join(encoded), "u1"))
    head.update(columns={}, checks={})
    for name, kind in COLUMNS.items():
        values = columns[name].astype(kind).tobytes()
        f.write(bytes(-f.tell() % 64))
        head["columns"][name], head["checks"][name] = [f.tell(), len(values)], zlib.crc32(values)
        f.write(values)
    content = json.dumps(dict(head, check=check_of(head)), sort_keys=True).encode()
    f.write(content + struct.pack("<Q", len(content)) + MAGIC)
    f.flush()
    os.fsync(f.fileno())


def check_of(head):
    return zlib.crc32(json.dumps(head, sort_keys=True).encode())


# ---------------------------------------------------------------------------------------------------- folders

class Files:
    """Paths and labels of a split in three arrays. A list of a million tuples would be copied into every worker, page
    by page, as reference counts change."""

    def __init__(self, root, names, labels):
        encoded = [os.fsencode(n) for n in names]
        self.root = root
        self.blob = np.frombuffer(b"".join(encoded), dtype=np.uint8)
        self.ends = np.cumsum([len(e) for e in encoded], dtype=np.int64)
        self.labels = np.asarray(labels, dtype=np.int32)
        self.pack, self.inner = pack_of(root)
        self.positions = np.full(len(names) if self.pack else 0, -1)  # in the pack, once they were looked for
        self.keep_together(0)

    def keep_together(self, chunk):
        """Reads neighbours of a pack, `chunk` at a time, as one piece: for an Order of such chunks"""
        self.chunk, self.asked = chunk, 0
        self.asked_at = np.full(len(self) // chunk + 1 if chunk else 0, -2 * MIXED)

    def __len__(self):
        return len(self.ends)

    def name(self, i):
        """The path below the root"""
        begin = self.ends[i - 1] if i else 0
        return os.fsdecode(self.blob[begin:self.ends[i]].tobytes())

    def path(self, i):
        return os.path.join(self.root, self.name(i))

    def content(self, index, exif=False):
        """-> files and places int64 (N, 3) as csrc.crop_images takes them, for positions (N,); int64 array (N, 2):
        height and width of all that may be decoded, and zeros for what is damaged, or turned by an EXIF tag that
        counts; whether they are RGB pixels"""
        if self.pack:
            if self.chunk:
                chunks = np.unique(index // self.chunk)
                chunks = chunks[self.asked - self.asked_at[chunks] >= 2 * MIXED]  # not lately
                self.asked_at[chunks] = self.asked + np.arange(len(chunks))
                self.asked += len(chunks)
                around = (chunks[:, None] * self.chunk + np.arange(self.chunk)).reshape(-1)
                self.pack.ask(self.in_pack(around[around < len(self)]))
            return self.pack.content(self.in_pack(index), exif)
        parts = []
        for i in index:
            part = ()
            with contextlib.suppress(OSError), open_image(self.path(i)) as f:
                part = np.fromfile(f, np.uint8)
            parts.append(part if len(part) else np.zeros(1, np.uint8))  # no JPEG
        files = [torch.from_numpy(p) for p in parts]
        places = torch.tensor([[i, 0, len(p)] for i, p in enumerate(parts)])
        seen = csrc.jpeg_sizes(files, places).numpy()
        if exif:
            seen[[has_exif(p.tobytes()) for p in parts]] = 0
        return files, places, seen, False

    def in_pack(self, index):
        """Positions here -> positions in the pack"""
        for i in index[self.positions[index] < 0]:
            self.positions[i] = self.pack.find(os.path.join(self.inner, self.name(i)))
        return self.positions[index]

    def select(self, keep):
        """-> the Files at the positions `keep` (int array)."""
        return Files(self.root, [self.name(i) for i in keep], self.labels[keep])


def list_classes(root):
    """-> sorted names of the class folders under root, and a note on the hidden ones that are left out."""
    pack, inner = pack_of(root)
    if pack:
        return pack.folders(inner), []
    try:
        entries = [e for e in os.scandir(root) if e.is_dir()]
    except OSError as error:
        raise UserError(f"{error.filename}: {error.strerror}") from error
    hidden = sorted(e.name for e in entries if e.name.startswith("."))
    return (sorted(e.name for e in entries if not e.name.startswith(".")),
            [f"{root}: hidden folder {h} ignored" for h in hidden])


def class_index(classes, wnids):
    """-> {folder name: index}; a wnid counts before a name,
    a name that two classes share (ImageNet has two cranes) is None."""
    index = {}
    for i, name in enumerate(classes):
        index[name] = None if name in index else i
    index.update({w: i for i, w in enumerate(wnids or ())})
    return index


def ids_of(classes, wnids, folders):
    """-> wnids; where a network knows the names of ImageNet's 1000 classes alone, as torchvision's weights do, and the
    folders are called by as many WordNet ids: these, for their order is that of the classes"""
    named_so = len(folders) == len(classes) == 1000 and all(re.fullmatch(r"n\d{8}", f) for f in folders)
    return folders if wnids is None and named_so and not set(folders) & set(classes) else wnids


def walk(root, onerror=None):
    """Folders and their files as os.walk finds them, through links too, sorted, without hidden folders. A link to a
    folder above it is not followed: it would lead round in a circle."""
    way = {root: tuple(map(str, pathlib.Path(root).resolve().parents))}
    for path, subfolders, files in os.walk(root, onerror=onerror, followlinks=True):
        here, above = os.path.realpath(path), way.pop(path)
        if here in above:
            subfolders.clear()
            continue
        subfolders[:] = sorted(s for s in subfolders if not s.startswith("."))
        way.update((os.path.join(path, s), (*above, here)) for s in subfolders)
        yield path, files


def images_below(root, folder=""):
    """-> paths, relative to root, of the images in root/folder and below; sorted, hidden ones left out"""
    pack, inner = pack_of(root)
    if pack:
        return pack.below(inner, folder)
    def fail(error):
        raise UserError(f"{error.filename}: {error.strerror}") from error
    names = []
    for path, files in walk(os.path.join(root, folder), fail):
        names += [os.path.normpath(os.path.join(os.path.relpath(path, root), f)) for f in sorted(files)
                  if f.lower().endswith(EXTENSIONS) and not f.startswith(".")]
    return names


def some(items, most=3):
    return ", ".join(items[:most]) + (f" and {len(items) - most} more" if len(items) > most else "")


def check_folder(root):
    if not is_folder(root):
        raise UserError(f"{root}: no such folder" + "; it is a file, and no pack" * os.path.isfile(root))


def scan_unlabelled(root):
    """Every image below root -> Files, with the label that cross entropy ignores. Raises UserError if there is none."""
    check_folder(root)
    names = images_below(root)
    if not names:
        raise UserError(f"{root}: no images ({', '.join(EXTENSIONS)})")
    return Files(root, names, np.full(len(names), -100))


def scan(root, index, allow_empty):
    """Every image below root/<class>/ -> Files, labels by `index`.
    Sorted, so the order is the same on every machine."""
    folders, notes = list_classes(root)
    unknown = [f for f in folders if index.get(f) is None]
    if unknown:
        raise UserError(f"{root}: class folder{'s' * (len(unknown) > 1)} {some(unknown, 5)} not among the "
                        f"{len(set(index.values()))} classes of the training set, checkpoint or --classes")
    found = [images_below(root, f) for f in folders]
    empty = [f for f, names in zip(folders, found) if not names]
    if empty and not allow_empty:
        raise UserError(f"{root}: no images in class folder{'s' * (len(empty) > 1)} {some(empty, 5)}")
    if len(empty) == len(folders):
        raise UserError(f"{root}: no images ({', '.join(EXTENSIONS)}) in class folders")
    labels = np.repeat([index[f] for f in folders], [len(names) for names in found])
    return Files(root, list(itertools.chain(*found)), labels), notes


def hash_split(files, share):
    """Files -> those for training and those for validation, `share` (default HELD_OUT) of them: by a hash of the path
    below the root, so that adding files moves no other"""
    share = HELD_OUT if share is None else share
    if not 0 < share < 1:
        raise UserError(f"--val-split {share}: must lie between 0 and 1", code=2)
    chosen = np.array([hashed(os.fsencode(files.name(i)), 4) / 2**32 < share for i in range(len(files))])
    if chosen.all() or not chosen.any():
        raise UserError(f"{files.root}: {len(files)} images are too few to split, give a val/ folder")
    return files.select(np.flatnonzero(~chosen)), files.select(np.flatnonzero(chosen))


def known_as(classes, names, wnids):
    """Folders' names, and a network's classes by name and wnid -> the network's (names, wnids), where the folders are
    these classes in their order, else (classes, None)"""
    return (list(names), classes) if names and ids_of(names, wnids, classes) == classes else (classes, None)


def open_folder(root, classes=None, wnids=None, val_split=None, eval_only=False):
    """-> (train Files or None, val Files, classes, wnids, notes). `classes` None: taken from the training folders
    alone. Without val/, validation is the `val_split` of the images that a fixed hash picks; with
    eval_only and no val_split all images of a folder without train/ and val/ are evaluated.
    Raises UserError naming the folder."""
    check_folder(root)
    train_root = os.path.join(root, "train")
    val_root = next((os.path.join(root, v) for v in VAL_NAMES if is_folder(os.path.join(root, v))), None)
    split = is_folder(train_root)
    if val_root and val_split is not None:
        raise UserError(f"--val-split: {root} has its own {os.path.basename(val_root)}/", code=2)
    if val_root and not split and not eval_only:
        raise UserError(f"{root}: has {os.path.basename(val_root)}/ but no train/")
    if classes is None:
        classes, _ = list_classes(train_root if split else val_root or root)
        if not classes:
            raise UserError(f"{root}: no class folders (expected {root}/train/<class>/*.jpg or {root}/<class>/*.jpg)")
    known, wnids = wnids, ids_of(classes, wnids, list_classes(train_root if split else val_root or root)[0])
    index, train = class_index(classes, wnids), None
    notes = [f"{root}: one class alone, {classes[0]}: is that folder the data set?"] if len(classes) == 1 else []
    if wnids is not known:
        notes.append(f"{root}: its WordNet ids stand for the network's classes, in their order")
    if not (eval_only and val_root):
        train, more = scan(train_root if split else root, index, allow_empty=False)
        notes += more
    if val_root:
        val, more = scan(val_root, index, allow_empty=True)
        notes += more
    elif eval_only and val_split is None and not split:
        train, val = None, train
        notes.append(f"{root}: no val/: what a network was trained on may be scored too; --val-split 0.1 scores what "
                     "training here holds out")
    else:
        train, val = hash_split(train, val_split)
        notes.append(f"{root}: no val/, {len(val)} of {len(train) + len(val)} images held out by a hash of their names")
    if len(classes) > 1 and all(val.name(i).count("/") > 1 for i in range(len(val))):
        notes.append(f"{root}: all images lie in folders below {some(classes)}: are those the classes?")
    for part, other, name in ((train, val, "training"), (val, train, "validation")) if train else ():
        if len(absent := np.setdiff1d(other.labels, part.labels)):
            notes.append(f"{part.root}: no {name} image of {some([classes[i] for i in absent], 5)}")
    return train, val, classes, wnids, notes


# ------------------------------------------------------------------------------------------------- transforms

def add_augment_args(parser):
    group = parser.add_argument_group("augmentation (training only)")

    def number(name, kind, default, metavar, text):
        group.add_argument(name, type=kind, default=default, metavar=metavar, help=text)
    number("--crop-scale", above_zero, 0.08, "A", "smallest area of a random crop")
    number("--hflip", fraction, 0.5, "P", "probability of a left-right flip")
    number("--color-jitter", amount, 0.0, "S", "brightness, contrast, saturation, up to +-S")
    number("--rotation", amount, 0.0, "DEG", "random rotation, up to +-DEG")
    number("--elastic", amount, 0.0, "PX", "elastic deformation, strength in pixels")
    group.add_argument("--auto-augment", choices=("none", "ra", "ta_wide"), default="none",
                       help="RandAugment or TrivialAugmentWide")
    number("--ra-magnitude", between(0, 30), 9, "0..30", "RandAugment strength")
    number("--ra-std", amount, 0.0, "S", "normal noise on that strength, same scale")
    number("--random-erase", fraction, 0.0, "P", "probability of erasing a rectangle")
    number("--mixup-alpha", amount, 0.0, "A", "mixup, Beta(A, A)")
    number("--cutmix-alpha", amount, 0.0, "A", "CutMix, Beta(A, A); with mixup each batch takes one")
    number("--repeated-aug", positive, 1, "N", "each image N times per epoch, 1/N of the images")
    group.add_argument("--balanced", action="store_true", help="draw every class equally often")
    return group


def rand_augment(magnitude, std, **options):
    """torchvision's RandAugment with a strength drawn anew per image (timm's mstd)."""
    from torchvision.transforms import v2
    inner = v2.RandAugment(magnitude=magnitude, **options)

    def augment(image):
        noisy = magnitude + std * torch.randn(()).item()
        inner.magnitude = int(min(max(round(noisy), 0), inner.num_magnitude_bins - 1))
        return inner(image)
    return augment


class Transform:
    """What becomes of an image: a box of it, resized with antialiasing to uint8 (size, size, 3) and mirrored or not,
    then `rest` of that, and then a rectangle of that `colour` with probability `erase`. crops(heights, widths,
    seeds), arrays of N, gives the boxes as csrc.crop_images has them, int64 (N, 9), from nothing but the seeds. JPEGs
    are decoded smaller where `gap` times the resized size is left; `resize` is that of the short side, where the box is
    the whole image."""

    def __init__(self, size, kernel, crops, rest=None, gap=0, resize=None, erase=0.0, colour=(0, 0, 0)):
        if kernel not in ("bilinear", "bicubic"):
            raise UserError(f"interpolation {kernel}: expected bilinear or bicubic")
        self.size, self.kernel, self.crops, self.rest, self.gap = size, kernel, crops, rest, gap
        self.resize, self.erase, self.colour = resize or size, erase, torch.tensor(colour, dtype=torch.uint8)

    def __call__(self, image, seed=0):
        """PIL image, mode RGB -> uint8 (size, size, 3). Raises ValueError for what csrc.crop_images leaves out."""
        pixels = np.array(image)
        found = self.single(pixels.reshape(-1), pixels.shape[:2], self.gap, seed)
        if found is None:
            raise ValueError(f"{image.width} x {image.height} pixels: too long a strip to be resized")
        return found

    def encoded(self, content, formats=TRAIN_FORMATS, exif=False, gap=0):
        """The bytes of an image file, as decode() takes them -> uint8 (size, size, 3). Raises ValueError as it does."""
        found = None
        if content and not (exif and has_exif(content)):
            found = self.single(np.frombuffer(bytearray(content), np.uint8), None, gap)
        return self(decode(content, formats, exif, gap * self.resize)) if found is None else found

    def single(self, values, size, gap, seed=0):
        """RGB pixels of that size, or a file and None -> uint8 (size, size, 3), None if that is no intact JPEG. Arrays
        are NumPy's: each operation of PyTorch gives Python's lock away, for which a server's threads queue."""
        files, places = [torch.from_numpy(values)], torch.from_numpy(np.array([[0, 0, values.size]], np.int64))
        seen = np.array([size]) if size else csrc.jpeg_sizes(files, places).numpy()
        out = np.empty((1, self.size, self.size, 3), np.uint8)
        done = self.fill(torch.from_numpy(out), files, places, seen, bool(size), np.array([seed], np.uint64), gap)
        return torch.from_numpy(out[0]) if done.numpy()[0] else None

    def fill(self, out, files, places, seen, raw, seeds, gap):
        """Writes images into out uint8 (N, size, size, 3), as csrc.crop_images takes them out of files and places;
        seen int64 (N, 2): their heights and widths, zeros for what is not to be decoded; raw: they are RGB pixels. The
        rest draws from torch's default generator at the image's seed, which is then where it was. -> bool (N): which
        were written"""
        places.numpy()[seen[:, 0] == 0, 2] = 0
        # what has no size gets a box, but no pixels
        crops = torch.from_numpy(self.crops(*np.maximum(seen, 1).T, seeds))
        done = csrc.crop_images(torch.from_numpy(out.numpy().transpose(0, 3, 1, 2)), files, places,
                                torch.from_numpy(seen * raw), crops, self.kernel, gap)
        rows = np.flatnonzero(done.numpy()) if self.rest or self.erase else ()
        if self.rest:
            with torch.random.fork_rng(devices=()):  # without workers this is the training process's own generator
                for row in rows:
                    torch.default_generator.manual_seed(int(seeds[row]))
                    out[row] = self.rest(out[row])
        if self.erase:
            boxes = erasures(seeds, self.size, self.erase).tolist()
            for row in rows:
                top, left, h, w = boxes[row]
                out[row, top:top + h, left:left + w] = self.colour
        return done


def has_exif(content):
    """Whether a file may say how to turn it: in EXIF, or in XMP alone"""
    return b"Exif\0\0" in content or b"tiff:Orientation" in content


def uniform(seeds, count):
    """uint64 (N,) -> float64 (N, count), 0 <= x < 1: SplitMix64 (Steele, Lea and Flood, 2014) from each seed"""
    steps = np.arange(1, count + 1, dtype=np.uint64) * np.uint64(0x9E3779B97F4A7C15)
    z = np.asarray(seeds, np.uint64)[:, None] + steps
    for shift, factor in ((30, 0xBF58476D1CE4E5B9), (27, 0x94D049BB133111EB)):
        z = (z ^ (z >> np.uint64(shift))) * np.uint64(factor)
    return ((z ^ (z >> np.uint64(31))) >> np.uint64(11)) * 2.0 ** -53


def first_to_fit(numbers, areas, scale, ratio, most_a, most_b):
    """Of ten rectangles whose share of the areas, (N,), lies in `scale` and whose sides a / b in `ratio`, by numbers
    (N, 20 or more), the first with no side longer than allowed, (N,): -> a, b, and where there is none False"""
    area = areas[:, None] * (scale[0] + (scale[1] - scale[0]) * numbers[:, :10])
    low, high = np.log(ratio)
    ratio = np.exp(low + (high - low) * numbers[:, 10:20])
    a, b = np.rint(np.sqrt(area * ratio)).astype(np.int64), np.rint(np.sqrt(area / ratio)).astype(np.int64)
    fits = (a > 0) & (b > 0) & (a <= most_a[:, None]) & (b <= most_b[:, None])
    first = np.arange(len(numbers)), fits.argmax(1)
    return a[first], b[first], fits.any(1)


def random_crops(heights, widths, seeds, size, scale, hflip):
    """The boxes of torchvision's RandomResizedCrop, ratio 3/4 to 4/3, from the same distribution: the first of ten
    that fits, or the largest in the middle."""
    numbers = uniform(seeds, 23)
    w, h, fits = first_to_fit(numbers, heights * widths, (scale, 1), (3 / 4, 4 / 3), widths, heights)
    w = np.where(fits, w, np.minimum(widths, np.rint(heights * (4 / 3)).astype(np.int64)))
    h = np.where(fits, h, np.minimum(heights, np.rint(widths / (3 / 4)).astype(np.int64)))
    top, left = heights - h, widths - w
    top = np.where(fits, np.floor(numbers[:, 20] * (top + 1)), top // 2)
    left = np.where(fits, np.floor(numbers[:, 21] * (left + 1)), left // 2)
    whole, zero = np.full_like(w, size), np.zeros_like(w)
    return np.stack([top, left, h, w, whole, whole, zero, zero, numbers[:, 22] < hflip], 1).astype(np.int64)


def erasures(seeds, size, probability):
    """The rectangles of torchvision's RandomErasing in squares of `size` pixels, from the same distribution: with that
    probability the first of ten, area 2 to 33 %, height 0.3 to 3.3 of the width, that fits. -> int64 (N, 4): top, left,
    height and width, zeros for none."""
    numbers, most = uniform(seeds, 46)[:, 23:], np.full(len(seeds), size - 1)  # behind the numbers of random_crops
    h, w, fits = first_to_fit(numbers, np.full(len(seeds), size * size), (0.02, 0.33), (0.3, 3.3), most, most)
    chosen = fits & (numbers[:, 22] < probability)
    top, left = np.floor(numbers[:, 20] * (size - h + 1)), np.floor(numbers[:, 21] * (size - w + 1))
    return np.where(chosen[:, None], np.stack([top, left, h, w], 1), 0).astype(np.int64)


def centre_crops(heights, widths, seeds, resize, crop):
    """torchvision's Resize, which gives the short side `resize` pixels, and CenterCrop"""
    sides = np.stack([heights, widths])
    resized, zero = resize * sides // sides.min(0), np.zeros_like(sides)
    return np.concatenate([zero, sides, resized, np.rint((resized - crop) / 2).astype(np.int64), zero[:1]]).T.copy()


def train_transform(size, preprocess, args):
    """-> Transform. What comes between crop and erasing draws from torch's default generator."""
    from torchvision.transforms import InterpolationMode, v2
    grey, steps = [round(255 * m) for m in preprocess["mean"]], []
    moving = dict(interpolation=InterpolationMode.BILINEAR, fill=grey)
    if args.rotation:
        steps.append(v2.RandomRotation(args.rotation, **moving))
    if args.elastic:
        steps.append(v2.ElasticTransform(args.elastic, fill=grey))
    if args.auto_augment == "ra":
        steps.append(rand_augment(args.ra_magnitude, args.ra_std, **moving))
    elif args.auto_augment == "ta_wide":
        steps.append(v2.TrivialAugmentWide(**moving))
    if args.color_jitter:
        steps.append(v2.ColorJitter(args.color_jitter, args.color_jitter, args.color_jitter))

    def rest(pixels):
        return torch.from_numpy(np.array(v2.Compose(steps)(Image.fromarray(pixels.numpy()))))
    crops = functools.partial(random_crops, size=size, scale=args.crop_scale, hflip=args.hflip)
    return Transform(size, preprocess["interpolation"], crops, rest if steps else None, gap=2, erase=args.random_erase,
                     colour=grey)


def eval_transform(preprocess):
    """-> Transform: short side to `resize`, centre crop. Deterministic."""
    resize, crop = preprocess["resize"], preprocess["crop"]
    if resize < crop:
        raise UserError(f"the short side is resized to {resize} pixels, and {crop} are cut out: expected no more")
    return Transform(crop, preprocess["interpolation"], functools.partial(centre_crops, resize=resize, crop=crop),
                     resize=resize)


# ------------------------------------------------------------------------------------- order, loading, mixing

def seed_for(*numbers):
    """Integers -> a 63-bit seed; different tuples give unrelated seeds."""
    return hashed(struct.pack(f"<{len(numbers)}q", *numbers)) >> 1


class Images(torch.utils.data.Dataset):
    """key (epoch, index, repeat) -> (uint8 (H, W, 3), label, complaint or None). Never raises for a bad file: the
    complaint travels with the batch, and the reader of the batches decides (an exception would lose its one line in a
    worker's traceback). A bad training image is replaced by the next good one, so that batches keep their size; in
    evaluation pixels are None and the image is not counted."""

    def __init__(self, files, transform_at, seed=0, exif=False, replace=False):
        self.files, self.seed, self.exif, self.replace = files, seed, exif, replace
        self.transform = functools.lru_cache(2)(transform_at)  # of an epoch; threads may be at different ones

    def __getitem__(self, key):
        complaint, index = None, key[1]
        for candidate in range(index, index + (16 if self.replace else 1)):
            i = candidate % len(self.files)
            try:
                return *self.sample(load(self.files.path(i), self.exif), i, key), complaint
            except (OSError, ValueError) as error:
                complaint = complaint or f"{self.files.path(i)}: {error}"
        return None, -1, complaint

    def sample(self, image, i, key):
        """PIL RGB image, its position in the files -> what a batch holds of it: pixels and label"""
        return self.transform(key[0])(image, seed_for(self.seed, *key)), int(self.files.labels[i])

    def batch(self, keys, empty=torch.empty):
        """Keys of one epoch -> what collate() makes of their samples, decoded in one call by csrc.crop_images. Other
        formats than JPEG, and whatever is wrong with a file, are __getitem__'s. Any number of threads, if the transform
        has no rest. empty(N, H, W, 3, dtype=) gives the memory."""
        transform = self.transform(keys[0][0])
        seeds = np.array([seed_for(self.seed, *key) for key in keys], np.uint64)
        index = np.array([i for _, i, _ in keys])
        out = empty(len(keys), transform.size, transform.size, 3, dtype=torch.uint8)
        pixels, labels = out.permute(0, 3, 1, 2), torch.from_numpy(self.files.labels[index].astype(np.int64))
        done, complaints = transform.fill(out, *self.files.content(index, self.exif), seeds, transform.gap), []
        for row in (~done).nonzero()[:, 0].tolist():
            sample, label, complaint = self[keys[row]]
            complaints += [complaint] if complaint else []
            if sample is not None:
                out[row], labels[row], done[row] = sample, label, True
        return (pixels, labels, complaints) if done.all() else (pixels[done], labels[done], complaints)

    __getitems__ = batch  # of a DataLoader's worker


def collate(samples):
    """-> pixels uint8 (N, 3, H, W) channels_last, labels int64 (N,), complaints."""
    pixels, labels = zip(*(sample[:2] for sample in samples if sample[0] is not None))
    return torch.stack(pixels).permute(0, 3, 1, 2), torch.tensor(labels), [c for _, _, c in samples if c]


class Order:
    """The training order as a batch sampler: batches of keys for process `rank` of `world`. A step uses `accumulate`
    batches from every process. Set .epoch and .start (samples of the epoch already used, all processes together) before
    iterating. The images of a step are the same whatever the number of processes, if the global batch is. With `chunk`
    so many neighbours are used near to one another, in a stretch of MIXED such chunks: they can be read as one piece,
    and those in use fit into memory."""

    def __init__(self, labels, batch_size, rank=0, world=1, accumulate=1, seed=0, repeats=1, balanced=False, chunk=0):
        self.labels, self.batch_size, self.rank, self.world, self.seed = labels, batch_size, rank, world, seed
        self.accumulate, self.repeats, self.balanced, self.chunk = accumulate, repeats, balanced, chunk
        self.global_batch = batch_size * world * accumulate
        # of a whole epoch; the rest of the permutation is left out
        self.steps = max(1, len(labels) // self.global_batch)
        self.epoch = self.start = 0

    def indices(self):
        """-> (index, repeat) arrays of the whole epoch; repeat counts the earlier uses of the index in this epoch."""
        n, total = len(self.labels), self.steps * self.global_batch
        generator = torch.Generator().manual_seed(seed_for(self.seed, self.epoch))
        if self.balanced:
            weights = 1.0 / torch.from_numpy(np.bincount(self.labels)[self.labels]).double()
            # inverse-CDF sampling: torch.multinomial stops at 2^24 classes and is slower
            ends = weights.cumsum(0)
            points = torch.rand(total, generator=generator, dtype=torch.float64) * ends[-1]
            order = torch.searchsorted(ends, points).numpy()
            position = np.argsort(order, kind="stable")
            first = np.searchsorted(order[position], order[position])
            repeat = np.empty(total, dtype=np.int64)
            repeat[position] = np.arange(total) - first
            return order, repeat
        if self.chunk:
            chunks = -(-n // self.chunk)
            begins = torch.randperm(chunks, generator=generator)[torch.arange(n) // self.chunk]
            delays = min(MIXED, chunks) * torch.rand(n, generator=generator, dtype=torch.float64)
            order = torch.argsort((begins + delays) % chunks).numpy()  # around the end: its start is as mixed
        else:
            order = torch.randperm(n, generator=generator).numpy()
        position = np.arange(total)
        slot = position // self.repeats
        return order[slot % n], position % self.repeats + slot // n * self.repeats

    def __len__(self):
        return (self.steps * self.global_batch - self.start) // self.global_batch * self.accumulate

    def __iter__(self):
        order, repeat = self.indices()
        epoch, per_batch = self.epoch, self.batch_size * self.world
        for begin in range(self.start, self.start + len(self) * per_batch, per_batch):
            # strided: repeats of an image meet different processes
            slots = range(begin + self.rank, begin + per_batch, self.world)
            yield [(epoch, int(order[s]), int(repeat[s])) for s in slots]


def eval_batches(n, batch_size, rank=0, world=1):
    """Keys for evaluation: every image exactly once over all processes, nothing padded."""
    mine = range(rank, n, world)
    return [[(0, i, 0) for i in mine[b:b + batch_size]] for b in range(0, len(mine), batch_size)]


def in_order(pool, workers, function, items):
    """function(item) of each in their order, by the threads or processes of pool(workers), ahead of the reader. One
    more is prepared each time that the reader had to wait, up to two per worker, so that memory has a bound."""
    if not workers:
        yield from map(function, items)
        return
    pool, items, ahead, depth = pool(workers), iter(items), collections.deque(), workers + 1
    try:
        while True:
            ahead.extend(pool.submit(function, i) for i in itertools.islice(items, depth - len(ahead)))
            if not ahead:
                return
            depth = min(depth + (not ahead[0].done()), 2 * workers)
            yield ahead.popleft().result()
    finally:
        pool.shutdown(cancel_futures=True)


class Threads:
    """The batches of a data set in their order, made by threads ahead of the reader. They decode without Python's
    lock and hand over what they made, uncopied. Memory that is not pinned is used again once no batch is in it."""

    def __init__(self, images, batches, workers, pin):
        self.images, self.batches, self.workers, self.pin = images, batches, workers, pin
        self.lock, self.arrays = threading.Lock(), []
        self.unused, = [sys.getrefcount(a) for a in [np.empty(0)]]  # of one that only such a list holds

    def __iter__(self):
        make = functools.partial(self.images.batch, empty=self.empty)
        return in_order(concurrent.futures.ThreadPoolExecutor, self.workers, make, self.batches)

    def empty(self, *size, dtype):
        if self.pin:  # kept and used again by PyTorch, which knows of the copies under way
            return torch.empty(size, dtype=dtype, pin_memory=True)
        count = int(np.prod(size))
        with self.lock:
            found = next((a for a in self.arrays if len(a) >= count and sys.getrefcount(a) == self.unused), None)
            if found is None:
                found = np.empty(count, np.uint8)
                self.arrays = [a for a in self.arrays if len(a) >= count] + [found]  # those of smaller images go
            return torch.from_numpy(found[:count]).view(size)


class Processes(torch.utils.data.DataLoader):
    """A DataLoader that names a worker's death as such also where it first breaks the connection by which the worker
    was handing over a batch: PyTorch's handler of SIGCHLD, which raises an error of its own, runs a moment later."""

    def __iter__(self):
        try:
            yield from super().__iter__()
        except (EOFError, ConnectionError):
            time.sleep(9)  # which that ends
            raise


class Ahead:
    """The batches of a loader in a GPU's memory. Each is copied, by a stream of its own, while the network works on the
    one before."""

    def __init__(self, loader, device):
        self.loader, self.device = loader, device
        self.stream = torch.cuda.Stream(device)  # one for all epochs: PyTorch keeps freed memory for its own stream

    def __len__(self):
        return len(self.loader)

    def copies(self):
        for pixels, labels, complaints in self.loader:
            with torch.cuda.stream(self.stream):
                tensors = [t.to(self.device, non_blocking=True) for t in (pixels, labels)]
                copied = self.stream.record_event()
            yield tensors, complaints, copied

    def __iter__(self):
        # the second of a pair is under way before the first is handed over
        for (tensors, complaints, copied), _ in itertools.pairwise(itertools.chain(self.copies(), [None])):
            reader = torch.cuda.current_stream(self.device)
            reader.wait_event(copied)
            for tensor in tensors:
                tensor.record_stream(reader)  # or their memory would be the next copies' while it is read
            yield *tensors, complaints


def make_loader(dataset, batches, workers, device="cpu"):
    """-> iterable over batches of keys, yielding (pixels, labels, complaints), the tensors on the device: by threads,
    or by a DataLoader's processes where augmentations draw from torch's generator, of which a process has one. Ctrl-C
    and SIGTERM reach the whole process group, but only the training process may act on them; its workers leave when it
    does. (They cannot ignore SIGTERM for good: it is what multiprocessing ends them with when the interpreter exits,
    waiting without a limit.)"""
    device = torch.device(device)
    pin = device.type == "cuda"
    whole = isinstance(dataset, Images) and dataset.__getitems__
    if whole:
        csrc.load()  # once, before there are threads or processes
    if whole and not dataset.transform(0).rest:
        loader = Threads(dataset, batches, workers, pin)
    else:
        leaving = multiprocessing.RawValue("b", 0)
        atexit.register(setattr, leaving, "value", 1)  # runs before multiprocessing's own exit function

        def start_worker(_):
            signal.signal(signal.SIGINT, signal.SIG_IGN)
            signal.signal(signal.SIGTERM, lambda *_: leaving.value and os._exit(0))

        gather = (lambda batch: batch) if whole else getattr(dataset, "collate", collate)

        def share(samples):
            """Into shared memory here: where the queue does it and there is too little, the batch is gone, and waited
            for"""
            *tensors, complaints = gather(samples)
            return *(t.share_memory_() for t in tensors), complaints

        loader = Processes(
            dataset, batch_sampler=batches, num_workers=workers, pin_memory=pin,
            collate_fn=share if workers else gather,
            persistent_workers=workers > 0, worker_init_fn=start_worker,
            generator=torch.Generator(),  # or it draws from ours
            multiprocessing_context="fork" if workers else None)
    return Ahead(loader, device) if pin else loader


def make_mixer(mixup_alpha, cutmix_alpha, classes):
    """-> callable (floats (N, 3, H, W), labels (N,)) -> (floats, probabilities (N, classes)), or None.
    Works on the device."""
    from torchvision.transforms import v2
    choices = [v2.MixUp(alpha=mixup_alpha, num_classes=classes)] if mixup_alpha else []
    choices += [v2.CutMix(alpha=cutmix_alpha, num_classes=classes)] if cutmix_alpha else []
    return v2.RandomChoice(choices) if choices else None


# -------------------------------------------------------------------------------------------------- demo data

DEMO_CLASSES = ("checks", "cross", "disk", "dots", "ring", "rings", "square", "stripes", "triangle", "waves")


def draw(name, rng, side=72):
    """One demo image (side, side, 3) uint8. The class is the shape or the texture; place, size, angle, colours, light,
    noise, blur, clutter and an occluding bar are nuisance, so single pixels say next to nothing."""
    y, x = np.mgrid[0:side, 0:side] / (side - 1) * 2 - 1  # -1 .. 1
    angle, (cx, cy) = rng.uniform(0, 2 * np.pi), rng.uniform(-0.3, 0.3, 2)
    size = rng.uniform(0.5, 0.8)
    u = ((x - cx) * np.cos(angle) + (y - cy) * np.sin(angle)) / size
    v = ((y - cy) * np.cos(angle) - (x - cx) * np.sin(angle)) / size
    radius, wave = np.hypot(u, v), rng.uniform(5.5, 9)
    field = {  # positive inside, about one unit per `size`
        "disk": lambda: 1 - radius,
        "ring": lambda: rng.uniform(0.16, 0.24) - abs(radius - 0.8),
        "square": lambda: 0.85 - np.maximum(abs(u), abs(v)),
        "triangle": lambda: np.minimum.reduce([v + 0.55, 0.55 - v / 2 + u * 0.866, 0.55 - v / 2 - u * 0.866]),
        "cross": lambda: np.maximum(np.minimum(0.28 - abs(u), 1 - abs(v)), np.minimum(0.28 - abs(v), 1 - abs(u))),
        "stripes": lambda: np.sin(wave * u) / wave,
        "checks": lambda: np.sin(wave * u) * np.sin(wave * v) / wave,
        "dots": lambda: (np.cos(wave * u) + np.cos(wave * v) - 0.9) / wave,
        "rings": lambda: np.sin(wave * radius) / wave,
        "waves": lambda: np.sin(wave * (u + rng.uniform(0.2, 0.3) * np.sin(wave * 0.6 * v))) / wave,
    }[name]()
    mask = np.clip(field * size * side / 2 / rng.uniform(0.7, 1.6) + 0.5, 0, 1)[..., None]
    # bright on dark; both polarities would take a longer run
    back, front = rng.uniform(0, 100, 3), rng.uniform(130, 255, 3)
    light = 1 + rng.uniform(-0.3, 0.3) * x + rng.uniform(-0.3, 0.3) * y
    image = Image.fromarray(((mask * front + (1 - mask) * back) * light[..., None]).clip(0, 255).astype(np.uint8))
    pen = ImageDraw.Draw(image)
    for _ in range(rng.integers(0, 4)):  # clutter
        px, py = rng.uniform(0, side, 2)
        r = rng.uniform(1.5, 5)
        colour = tuple(int(c) for c in rng.uniform(0, 255, 3))
        (pen.ellipse if rng.random() < 0.5 else pen.rectangle)((px - r, py - r, px + r, py + r), fill=colour)
    ends = rng.uniform(0, side, 4)
    if rng.random() < 0.3:  # occlusion
        pen.line(tuple(ends), fill=tuple(int(c) for c in rng.uniform(0, 255, 3)), width=int(rng.integers(2, 5)))
    if rng.random() < 0.4:
        image = image.filter(ImageFilter.GaussianBlur(rng.uniform(0.3, 0.8)))
    noisy = np.asarray(image) + rng.normal(0, rng.uniform(2, 10), (side, side, 3))
    return noisy.clip(0, 255).astype(np.uint8)


def make_demo(root=DEMO, train=220, val=60):
    """Draw the demo set once: 10 classes, `train` + `val` JPEGs each; the same bytes on every run.
    Appears complete or not at all."""
    if os.path.isdir(root):
        return root
    temporary = f"{root}.{os.getpid()}.tmp"
    shutil.rmtree(temporary, ignore_errors=True)  # a killed process's of the same number, as containers give them
    try:
        for split, count in (("train", train), ("val", val)):
            for label, name in enumerate(DEMO_CLASSES):
                folder = os.path.join(temporary, split, name)
                os.makedirs(folder)
                for i in range(count):
                    rng = np.random.default_rng([split == "val", label, i])
                    Image.fromarray(draw(name, rng)).save(os.path.join(folder, f"{i:04d}.jpg"), quality=90)
        os.rename(temporary, root)
    except OSError as error:
        if not os.path.isdir(root):  # no other process was first
            raise UserError(f"{root}: not written ({error.strerror or error})") from error
    finally:
        shutil.rmtree(temporary, ignore_errors=True)
    return root


# ------------------------------------------------------------------------------------------- ImageNet archives

DEVKIT_BYTES = 2 ** 24  # at most, of a file in it and of what that unpacks to: no few bytes shall fill the memory


def read_mat(buffer):
    """Elements of a MATLAB 5 file's data section, as nested Python values: enough of the format for ILSVRC2012's
    meta.mat (numbers, as flat arrays, text, cells, structures). Layout: MathWorks, "MAT-File Format", 2019, ch. 1."""
    kinds = {1: "i1", 2: "u1", 3: "<i2", 4: "<u2", 5: "<i4", 6: "<u4",
             7: "<f4", 9: "<f8", 12: "<i8", 13: "<u8", 16: "u1", 17: "<u2"}

    def elements(buffer):  # -> types and payloads
        at, buffer = 0, memoryview(buffer)  # whose slices, of matrices in matrices, are no copies
        while at + 8 <= len(buffer):
            kind, size = struct.unpack_from("<II", buffer, at)
            if kind >> 16:  # up to four bytes packed into the tag
                yield kind & 0xFFFF, buffer[at + 4:at + 4 + (kind >> 16)]
                at += 8
            else:
                yield kind, buffer[at + 8:at + 8 + size]
                at += 8 + size + (-size % 8 if kind != 15 else 0)

    def matrix(payload):
        inner = elements(payload)
        (_, flags), *_ = itertools.islice(inner, 3)  # then dimensions and name
        if flags[0] == 1:  # cell
            return [matrix(p) for _, p in inner]
        if flags[0] == 2:  # structure array: field names, then the fields of each element in turn
            length = struct.unpack("<i", next(inner)[1])[0]
            text = bytes(next(inner)[1])
            fields = [text[i:i + length].split(b"\0")[0].decode() for i in range(0, len(text), length)]
            parts = [matrix(p) for _, p in inner]
            return [dict(zip(fields, parts[at:at + len(fields)])) for at in range(0, len(parts), len(fields))]
        kind, data = next(inner, (9, b""))
        values = np.frombuffer(data, kinds[kind])
        return "".join(map(chr, values)) if flags[0] == 4 else values

    values = []
    for kind, payload in elements(buffer):
        if kind == 15:  # compressed
            kind, payload = next(elements(zlib.decompressobj().decompress(payload, DEVKIT_BYTES)))
        if kind == 14:
            values.append(matrix(payload))
    return values


def val_wnids(archives, labels):
    """-> {validation file name: wnid}, from a text file with a name and a wnid per line (--val-labels; Kaggle's
    LOC_val_solution.csv is one) or from the devkit beside the archives."""
    if labels:
        with open(labels, encoding="utf-8", errors="replace") as f:
            rows = re.findall(r"^(ILSVRC2012_val_\d{8})\S*?[\s,]+(n\d{8})", f.read(), re.M)
        if not rows:
            raise UserError(f"{labels}: no line with ILSVRC2012_val_... and a wnid")
        return {name + ".JPEG": wnid for name, wnid in rows}
    with tarfile.open(os.path.join(archives, "ILSVRC2012_devkit_t12.tar.gz")) as devkit:
        def member(ending):
            found = next(m for m in devkit.getmembers() if m.name.endswith(ending))
            return devkit.extractfile(found).read(DEVKIT_BYTES)
        synsets = read_mat(member("data/meta.mat")[128:])[0]  # behind the header
        wnid_of = {int(s["ILSVRC2012_ID"].item()): s["WNID"] for s in synsets}
        truth = member("ILSVRC2012_validation_ground_truth.txt").split()
    return {f"ILSVRC2012_val_{i:08d}.JPEG": wnid_of[int(number)] for i, number in enumerate(truth, 1)}


def members(archive):
    """The regular files of an open tar. tarfile takes a damaged or missing header for the end; here it must be one."""
    yield from filter(tarfile.TarInfo.isfile, archive)
    archive.fileobj.seek(archive.offset)
    if archive.fileobj.read(tarfile.BLOCKSIZE) != bytes(tarfile.BLOCKSIZE):
        raise tarfile.ReadError(f"no header and no end at byte {archive.offset}")


def extract(member_file, split, wnid, name):
    """Copies an open tar member to split/wnid/name; an interrupted import never leaves a half-written image."""
    folder, name = os.path.join(split, wnid), os.path.basename(name)
    if not re.fullmatch(r"n\d{8}", wnid) or not name.strip("."):  # both may come from the archives
        raise ValueError(f"{wnid!r} and {name!r} are not a wnid and an image")
    os.makedirs(folder, exist_ok=True)
    path = os.path.join(folder, name)
    if not os.path.exists(path):
        temporary = f"{path}.{os.getpid()}.part"  # another import may write the same image
        with open(temporary, "wb") as f:
            shutil.copyfileobj(member_file, f)
        os.replace(temporary, path)


def import_imagenet(archives, out, labels=None):
    """ILSVRC2012_img_train.tar (a tar of 1000 tars) and ILSVRC2012_img_val.tar -> out/train/<wnid>/ and
    out/val/<wnid>/. Run again after an interruption: what is there is kept. -> {split: images}."""
    counts = collections.Counter()
    try:
        wnid_of = val_wnids(archives, labels)
        with tarfile.open(os.path.join(archives, "ILSVRC2012_img_train.tar")) as outer:
            for inner_member in members(outer):
                wnid = os.path.splitext(os.path.basename(inner_member.name))[0]
                with tarfile.open(fileobj=outer.extractfile(inner_member)) as inner:
                    for member in members(inner):
                        extract(inner.extractfile(member), os.path.join(out, "train"), wnid, member.name)
                        counts["train"] += 1
                progress(f"{wnid} {counts['train']} images")
        with tarfile.open(os.path.join(archives, "ILSVRC2012_img_val.tar")) as val:
            for member in members(val):
                name = os.path.basename(member.name)
                if name not in wnid_of:
                    raise UserError(f"{archives}: no label for {name}")
                extract(val.extractfile(member), os.path.join(out, "val"), wnid_of[name], name)
                counts["val"] += 1
        progress(f"{counts['train']} and {counts['val']} images", last=True)
    except FileNotFoundError as error:
        raise UserError(f"{error.filename}: no such file; --import-imagenet wants ILSVRC2012_img_train.tar, "
                        "ILSVRC2012_img_val.tar and ILSVRC2012_devkit_t12.tar.gz in one folder "
                        "(or --val-labels FILE for the last)") from error
    except (tarfile.TarError, zlib.error, struct.error, EOFError, StopIteration, LookupError, ValueError, TypeError,
            AttributeError, OverflowError, RecursionError) as error:  # the last: what meta.mat holds is something else
        raise UserError(f"{archives}: damaged or unexpected archive ({type(error).__name__}: {error})") from error
    except OSError as error:
        raise UserError(f"{error.filename or out}: {error.strerror or error}") from error
    return dict(counts)


def get_args_parser():
    parser = argparse.ArgumentParser(prog="data.py", formatter_class=Help,
                                     description="Make, import, pack or describe a data set.")
    parser.add_argument("--data", metavar="FOLDER",
                        help=f"folder or pack to describe (default: the demo set, made under {DEMO})")
    parser.add_argument("--val-split", type=float, metavar="F",
                        help="share held out where there is no val/ (default: 0.1)")
    parser.add_argument("--out", metavar="PATH", help="the folder that --import-imagenet, the file that --pack writes")
    group = parser.add_argument_group("ImageNet")
    group.add_argument("--import-imagenet", metavar="FOLDER", help="folder with the three ILSVRC2012 archives")
    group.add_argument("--val-labels", metavar="FILE", help="validation labels as text, instead of the devkit")
    group = parser.add_argument_group("packs")
    group.add_argument("--pack", metavar="FOLDER", help="write all its images into one file; say how:")
    group.add_argument("--lossless", action="store_true", help="the files' own pixels, JPEGs with restart markers")
    group.add_argument("--max-side", type=positive, metavar="N", help="as JPEGs whose long side is N at most")
    group.add_argument("--raw", type=positive, metavar="N", help="as pixels, the short side N at most")
    group.add_argument("--quality", type=between(1, 100), metavar="Q", help="with --max-side: of JPEG (default: 90)")
    group.add_argument("--shards", type=between(0, 1000), default=0, metavar="N",
                       help="put the images into N files beside it, FILE.000 and so on")
    group.add_argument("--exif", action="store_true", help="turn images as their orientation tags say")
    group.add_argument("--workers", type=between(0), default=os.cpu_count(), metavar="N",
                       help="processes that pack")
    group.add_argument("--on-corrupt", choices=("error", "skip"), default="error")
    group.add_argument("--overwrite", action="store_true")
    group.add_argument("--info", metavar="FILE", help="describe a pack, and read all of it")
    return parser


def pack_folder(args):
    """--pack, from the flags to the result"""
    def refuse(text):
        raise UserError(text, code=2)
    modes = [m for m, given in (("lossless", args.lossless), ("jpeg", args.max_side), ("raw", args.raw)) if given]
    if len(modes) != 1 or not args.out:
        refuse("--pack needs --out FILE, and one of --lossless, --max-side N and --raw N")
    mode, = modes
    if args.quality and mode != "jpeg":
        refuse("--quality goes with --max-side")
    if args.shards and args.overwrite:
        refuse("--overwrite would leave a pack without its images for a while: with --shards remove the old one")
    if args.exif and mode == "lossless":
        refuse("--exif: a lossless pack keeps the orientation tags; it is the reader's flag")
    check_folder(args.pack)
    if not os.path.isdir(args.pack):
        raise UserError(f"{args.pack}: lies in a pack, or is one; --pack takes a folder of image files")
    if os.path.isdir(args.out):
        refuse(f"--out {args.out}: is a folder; it names the file that --pack writes")
    if not os.path.isdir(os.path.dirname(args.out) or "."):
        refuse(f"--out {args.out}: there is no folder {os.path.dirname(args.out)}")
    if os.path.exists(args.out) and not args.overwrite:
        refuse(f"{args.out}: exists; --overwrite replaces it")
    old = []
    with contextlib.suppress(UserError, OSError):  # what is no pack any more has no shards that one could be sure of
        old = Pack(args.out).files
    made = make_pack(args.pack, args.out, mode, args.max_side or args.raw, args.quality or 90, args.workers, args.exif,
                     args.on_corrupt == "skip", args.shards)
    for shard in set(old) - {args.out}:
        os.unlink(shard)
    return dict(made, pack=args.out, mode=mode)


def check_pack(path):
    """--info: reads every record. Raises UserError with the first that is damaged."""
    if not is_pack(path):
        raise UserError(f"{path}: no pack, or none that is whole")
    pack = Pack(path)
    for i in range(len(pack)):
        try:
            pack.record(i)
        except ValueError as error:
            raise UserError(f"{path}/{pack.name(i)}: {error}") from error
    head = {k: v for k, v in pack.head.items() if k not in ("columns", "checks") and v is not None}
    return dict(pack=path, images=len(pack), bytes=pack_size(path, pack.head["shards"]),
                largest=[int(pack.width.max()), int(pack.height.max())],
                pixels=int((pack.width.astype(np.int64) * pack.height).sum()), **head)


JOBS = {  # and the flags that each reads; without any it describes
    "info": (), "import_imagenet": ("out", "val_labels"), None: ("data", "val_split"),
    "pack": ("out", "lossless", "max_side", "raw", "quality", "shards", "exif", "workers", "on_corrupt", "overwrite")}


def main(args):
    def flag(key):
        return "--" + key.replace("_", "-")
    usual, job = get_args_parser().parse_args([]), next((k for k in JOBS if k and getattr(args, k)), None)
    for key in vars(args):
        if getattr(args, key) != getattr(usual, key) and key != job and key not in JOBS[job]:
            partners = [flag(k) for k in JOBS if k and key in JOBS[k]]
            raise UserError(f"{flag(key)} goes with {' and '.join(partners)}" if partners and not job else
                            f"{flag(job)}: no {flag(key)} with it", code=2)
    if args.info:
        return check_pack(args.info)
    if args.pack:
        return pack_folder(args)
    if args.import_imagenet:
        if not args.out:
            raise UserError("--import-imagenet needs --out FOLDER", code=2)
        import_imagenet(args.import_imagenet, args.out, args.val_labels)
    root = args.out or args.data or make_demo()
    train, val, classes, _, notes = open_folder(root, val_split=args.val_split)
    there, used = (collections.Counter(os.path.splitext(f)[1] or f for f in names) for names in (
        (f for _, files in walk(root) for f in files),
        (files.name(i) for files in (train, val) for i in range(len(files)))))
    if other := there - used:
        notes.append(f"{root}: ignored {', '.join(f'{n} {kind}' for kind, n in other.most_common(9))}")
    for note in notes:
        print(note, file=sys.stderr)
    for name, files in (("train", train), ("val", val)):
        counts = np.bincount(files.labels, minlength=len(classes))
        print(f"{name}: {len(files)} images, {len(classes)} classes, {counts.min()} to {counts.max()} each",
              file=sys.stderr)
    return dict(data=root, train=len(train), val=len(val), classes=len(classes))


if __name__ == "__main__":
    run_script(main, get_args_parser().parse_args(), "data.py")
