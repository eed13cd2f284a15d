"""Answer over HTTP with the networks of checkpoints, on the standard library's http.server.

  python serve.py --port 8000                       # runs/{compress,finetune,train}/best.pt
  python serve.py --model small=a.pt --model big=b.pt
  curl -F image=@cat.jpg localhost:8000/predict     # also: curl -T cat.jpg localhost:8000/predictions/resnet50

Interfaces: /predict, the Open Inference Protocol v2 with Triton's extensions (/v2), /metrics (Prometheus), /healthz,
/openapi.json, and a page at /. One thread reads, checks and decodes each connection's request; one thread per network
runs batches of what has been decoded meanwhile. SIGTERM finishes what has begun, SIGHUP reads changed files.

It speaks HTTP/1.1 strictly and bounds what a client can cost, but it is no firewall: put a proxy in front of it where
strangers reach it (README.md says what for).
"""
import argparse
import base64
import bisect
import codecs
import concurrent.futures
import contextlib
import ctypes
import functools
import gc
import gzip
import hmac
import http.server
import io
import itertools
import json
import math
import mmap
import multiprocessing
import os
import queue
import re
import resource
import select
import signal
import socket
import socketserver
import ssl
import sys
import threading
import time
import traceback
import urllib.parse
import zlib
from collections import Counter, deque
from collections.abc import Callable
from typing import NamedTuple

import numpy as np
import torch
from PIL import Image

import data
from csrc.graphs import KEPT, bucket
from resnet50 import (
    Cascade,
    Flat,
    Help,
    ResNet50,
    UserError,
    add_model_args,
    between,
    device_name,
    find_device,
    fuse,
    load_some_model,
    predict,
    run_script,
)

DEFAULTS = ["runs/compress/best.pt", "runs/finetune/best.pt", "runs/train/best.pt"]
FORMATS = ("JPEG", "PNG", "WEBP", "BMP", "GIF")  # no decoder but these is ever tried
MAGIC = (b"\xff\xd8\xff", b"\x89PNG\r\n", b"RIFF", b"GIF8")  # what files begin with and pixels hardly ever
HEAD_BYTES, LINE_BYTES, HEADERS, DEPTH, PARTS = 65536, 8192, 100, 100, 64
MARKS = 1 << 18  # brackets, quotes and backslashes of a JSON; 64 MiB of pixels, a list per row, have fewer
LARGE = 1 << 20  # bytes of a JSON
SCANS = 100  # of a JPEG, which usually has up to 12: each may cost as much as the pixels, in a few bytes
TYPES = {"UINT8": np.dtype("u1"), "FP32": np.dtype("<f4")}  # of pixels
VERSION = "1"
METADATA = dict(name="resnet50", version=VERSION, extensions=[
    "binary_tensor_data", "classification", "model_configuration", "statistics", "model_repository", "parameters"])
DEAR = 0.1  # what a batch may cost beside its images, as a share of these


class Refusal(Exception):
    """An answer that is no success: HTTP status, text for the client, more headers; close: the rest of what the client
    sends cannot be told apart any more."""

    def __init__(self, status, text, close=False, **headers):
        super().__init__(text)
        self.status, self.text, self.close = status, text, close
        self.headers = {k.replace("_", "-"): v for k, v in headers.items()}


def require(condition, text):
    """400 with this text where a request does not hold what it has to"""
    if not condition:
        raise Refusal(400, text)


def say(text, to="stderr"):
    """A line, in one piece whatever other threads and processes print. Answers go on when nobody reads it any more."""
    with contextlib.suppress(OSError, AttributeError):
        stream = getattr(sys, to)
        stream.write(f"{text}\n")
        stream.flush()


# ------------------------------------------------------------------------------------------------------ numbers

class Histogram:
    """Counts of values up to each bound, as Prometheus keeps them."""

    def __init__(self, bounds):
        self.bounds, self.counts, self.sum = bounds, [0] * (len(bounds) + 1), 0.0

    def add(self, value):
        self.counts[bisect.bisect_left(self.bounds, value)] += 1
        self.sum += value

    def samples(self, label):
        """-> [(what follows the metric's name, value)]"""
        totals = list(itertools.accumulate(self.counts))
        return [*((f'_bucket{{{label},le="{bound}"}}', n) for bound, n in zip([*self.bounds, "+Inf"], totals)),
                (f"_sum{{{label}}}", f"{self.sum:.9g}"), (f"_count{{{label}}}", totals[-1])]


SECONDS = (0.001, 0.0025, 0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1.0, 2.5, 5.0, 10.0, 30.0)
SIZES = (1, 2, 4, 8, 16, 32, 64, 128)


class Statistics:
    """What happened to one network's requests, for Triton's statistics and for Prometheus"""

    PARTS = ("success", "fail", "queue", "compute_input", "compute_infer", "compute_output")

    def __init__(self):
        self.lock = threading.Lock()
        self.count, self.ns, self.images, self.last = Counter(), Counter(), 0, 0
        self.batches, self.batch_ns = Counter(), Counter()  # by size
        self.request_seconds, self.queue_seconds, self.batch_size = map(Histogram, (SECONDS, SECONDS, SIZES))

    def batch(self, size, seconds, waits):
        with self.lock:
            self.batches[size] += 1
            self.batch_ns[size] += int(seconds * 1e9)
            self.batch_size.add(size)
            for wait in waits:
                self.queue_seconds.add(wait)

    def request(self, images, **seconds):
        """seconds: of PARTS that the request went through, success or fail among them"""
        with self.lock:
            for part, value in seconds.items():
                self.count[part] += 1
                self.ns[part] += int(value * 1e9)
            if "success" in seconds:
                self.images += images
                self.request_seconds.add(seconds["success"])
            self.last = int(time.time() * 1000)

    def triton(self, name):
        def duration(count, ns):
            return dict(count=count, ns=ns)
        with self.lock:
            return dict(
                name=name, version=VERSION, last_inference=self.last, inference_count=self.images,
                execution_count=sum(self.batches.values()),
                inference_stats={p: duration(self.count[p], self.ns[p]) for p in self.PARTS},
                batch_stats=[dict(batch_size=size, compute_input=duration(n, 0),
                                  compute_infer=duration(n, self.batch_ns[size]), compute_output=duration(n, 0))
                             for size, n in sorted(self.batches.items())])


# ------------------------------------------------------------------------------------------------------- engine

class Network(NamedTuple):
    """A checkpoint, read. A request keeps the one that it began with."""
    path: str
    net: torch.nn.Module
    size: int  # of its square images
    transform: Callable  # PIL image -> uint8 (size, size, 3)
    classes: list
    stamp: tuple
    enough: int  # images of the smallest batch that is about as fast, per image, as the largest
    exif: bool  # whether photographs are turned as their tags say: as in the network's training


def members(net):
    """The networks that an answer may come from: of a cascade both, whatever its small one says of a blank image"""
    return list(net.children()) if isinstance(net, Cascade) else [net]


def fused(net, dtype):
    """-> net with its float ResNet-50s on the fused kernels"""
    if isinstance(net, Cascade):
        net.small, net.big = (fused(member, dtype) for member in members(net))
    return fuse(net, dtype) if isinstance(net, ResNet50) and not net.config.get("adapter") else net


def enough_images(one, many, batch, unit):
    """Seconds of one image and of a batch, images that go side by side -> Network.enough: what a batch costs beside its
    images has to stay within DEAR of these"""
    each = many / batch
    return min(batch, math.ceil(max(1.0, (one - each) / (DEAR * each)) / unit) * unit)


class Scores(NamedTuple):
    """What a request's images got, arrays of NumPy (n, classes)"""
    logits: np.ndarray  # float32
    probabilities: np.ndarray  # float32
    order: np.ndarray  # int64: the classes, the likeliest first

    @classmethod
    def of(cls, logits):
        with np.errstate(invalid="ignore"):  # rows that are not finite are refused
            values = np.exp(logits - logits.max(1, keepdims=True))
            return cls(logits, values / values.sum(1, keepdims=True), (-logits).argsort(1))


class Ticket(concurrent.futures.Future):
    """One request's images on their way through the batcher. Its result: their Scores"""

    def __init__(self, network, pixels, deadline, alive):
        super().__init__()
        self.network, self.pixels, self.deadline, self.alive = network, pixels, deadline, alive
        self.since = time.monotonic()


class Turns:
    """A lock that nobody has twice while another waits"""

    def __init__(self):
        self.next, self.lock = threading.Lock(), threading.Lock()

    def __enter__(self):
        with self.next:
            self.lock.acquire()

    def __exit__(self, *error):
        self.lock.release()

    def taken(self):
        """Whether someone has it or waits for it"""
        return self.next.locked() or self.lock.locked()


class Model:
    """A name, the network that answers to it, the thread that runs it, a batch at a time, and one that answers. What
    waits while a batch runs makes the next one, but for half of it where the rest is enough for a batch: answers come
    at a batch's end, and the first should not wait for all. A batch that is not enough waits for requests that are
    being decoded at the moment, no longer than max_delay, and for nothing else. One batch at a time runs of all who
    share a `device`."""

    def __init__(self, name, args, path, device=None):
        self.name, self.args, self.statistics, self.device = name, args, Statistics(), device or Turns()
        self.network = self.load(path)
        self.waiting, self.images, self.coming = deque(), 0, 0
        self.pace = 0.0  # seconds that an image takes, lately
        self.changed = threading.Condition()
        self.last, self.done = None, queue.SimpleQueue()
        threading.Thread(target=self.work, name=f"batches of {name}", daemon=True).start()
        threading.Thread(target=self.answer_all, name=f"answers of {name}", daemon=True).start()

    def load(self, path):
        """-> Network, warm"""
        stamp = stamp_of(path)
        where = argparse.Namespace(**{**vars(self.args), "checkpoint": path})
        net, checkpoint, source = load_some_model(where, DEFAULTS)
        net = spread(fused(net, getattr(torch, self.args.amp_dtype)), self.args.devices)
        size = net.preprocess["crop"]
        device, batch = torch.device(self.args.devices[0]), self.args.max_batch

        def seconds(n, times):
            """The least of some calls, the first of which is cold"""
            blank = torch.zeros(n, 3, size, size, dtype=torch.uint8, device=device)
            blank, took = blank.contiguous(memory_format=torch.channels_last), []
            for _ in range(times):
                with self.device:
                    began = time.perf_counter()
                    logits = torch.cat([predict(member, blank) for member in members(net)]).cpu()
                    took.append(time.perf_counter() - began)
            if not logits.isfinite().all():
                raise UserError(f"{source}: its outputs are not finite")
            return min(took)
        with torch.inference_mode():
            unit = torch.get_num_threads() if device.type == "cpu" else 1
            if device.type != "cpu":  # a graph for each size, which takes longer to record than a request may
                for n in sorted({bucket(n) for n in range(1, batch + 1)})[:KEPT]:
                    seconds(n, 1)
            enough = enough_images(seconds(1, 9), seconds(batch, 3), batch, unit)
        number = str(getattr(net, "dtype", net.precision)).removeprefix("torch.")
        say(f"{self.name}: {source}, {number}, {size} pixels")
        classes = [c.encode(errors="backslashreplace").decode()  # a folder's name may be any bytes, an answer not
                   for c in checkpoint["classes"] or map(str, range(net.config["num_classes"]))]
        return Network(source, net, size, data.eval_transform(net.preprocess), classes, stamp or stamp_of(source),
                       enough, self.args.exif or bool(checkpoint["args"].get("exif")))

    def reload(self):
        """A changed file. What was there serves until the new network is warm, and on if it is bad."""
        told = "unchanged"
        if stamp_of(self.network.path) != self.network.stamp:
            try:
                self.network, told = self.load(self.network.path), "reloaded"
            except Exception as error:  # whatever is wrong with the file, the server stays up
                told = f"NOT reloaded: {error}"
        say(f"{self.name}: {told}")

    @contextlib.contextmanager
    def expecting(self, images, deadline):
        """Around the reading of a request's images, to submit() within: the batcher knows that they come. Refuses what
        the queue has no room for, and what its turn would find expired, before it costs anything."""
        with self.changed:
            if images > self.args.max_queue:
                raise Refusal(413, f"more images than the queue of {self.args.max_queue} has room for")
            ahead = self.images + self.coming
            wait, later = ahead * self.pace, f"{math.ceil(max(ahead * self.pace, 1))}"
            if ahead + images > self.args.max_queue:
                raise Refusal(503, f"the queue is full: {ahead} images wait", Retry_After=later)
            if ahead and time.monotonic() + wait > deadline:  # else it is late by itself, which is a 504
                raise Refusal(503, f"{ahead} images wait, which take longer than the request allows", Retry_After=later)
            self.coming += images
        try:
            yield
        finally:
            with self.changed:
                self.coming -= images
                self.changed.notify()

    def submit(self, network, pixels, deadline, alive):
        """uint8 (n, 3, H, W) -> Ticket"""
        ticket = Ticket(network, pixels, deadline, alive)
        with self.changed:
            self.waiting.append(ticket)
            self.images += len(pixels)
            self.changed.notify()
        return ticket

    def wait(self):
        """Until there is a batch to take"""
        with self.changed:
            while not self.waiting:
                self.hand_over()
                self.changed.wait()
            enough = self.waiting[0].network.enough
            until = time.monotonic() + self.args.max_delay_ms / 1e3
            while self.coming and self.images < enough and (left := until - time.monotonic()) > 0:
                self.hand_over()
                self.changed.wait(left)

    def take(self):
        """-> the next batch's tickets"""
        with self.changed:
            enough = self.waiting[0].network.enough
            most = min(self.args.max_batch, math.ceil(max(1, self.images / 2 / enough)) * enough)
            tickets, count = [], 0
            while self.waiting and (not tickets or count + len(self.waiting[0].pixels) <= most
                                    and self.waiting[0].network is tickets[0].network):
                tickets.append(self.waiting.popleft())
                count += len(tickets[-1].pixels)
            self.images -= count
            return tickets

    def learn(self, seconds, images):
        """The pace from a batch. One image, which anything may have held up, says little about many."""
        self.pace += (seconds / images - self.pace) * images / (images + self.args.max_batch)

    def work(self):
        while True:
            self.wait()
            if self.device.taken():
                self.hand_over()
            with self.device:
                if tickets := self.due(self.take()):
                    batch = self.run(tickets)
                    self.hand_over()
                    self.last = batch
                    del batch, tickets  # whose network may have been replaced when the next ones come

    def due(self, tickets):
        """-> those that someone waits for still; the others are refused"""
        now = time.monotonic()
        for ticket in tickets:
            ticket.waited = now - ticket.since
            if now > ticket.deadline:
                late = f"waited {ticket.waited * 1e3:.0f} ms, longer than the request allows"
                ticket.set_exception(Refusal(504, late))
            elif not ticket.alive():
                ticket.set_exception(Refusal(499, "the client is gone"))
        return [ticket for ticket in tickets if not ticket.done()]

    def run(self, tickets):
        """-> arguments of answer()"""
        started = time.monotonic()
        try:
            pixels, device = torch.cat([ticket.pixels for ticket in tickets]), torch.device(self.args.devices[0])
            pixels = pixels.pin_memory() if device.type == "cuda" else pixels  # which a GPU reads by itself
            pixels = pixels.to(device, non_blocking=True).contiguous(memory_format=torch.channels_last)
            parts = pixels.split(self.args.max_batch)
            self.hand_over()
            with torch.inference_mode():
                logits = torch.cat([predict(tickets[0].network.net, part) for part in parts]).cpu().numpy()
        except Exception:  # whatever it is, the next batch shall have its chance
            say(traceback.format_exc())
            return tickets, None, 0.0
        seconds = time.monotonic() - started
        self.learn(seconds, len(logits))
        return tickets, logits, seconds

    def hand_over(self):
        """The last batch to the thread that answers it. Each answer wakes a thread that wants Python's lock, and a
        next batch would wait for them all: so this comes right before it, or where there is none yet."""
        if self.last:
            self.done.put(self.last)
            self.last = None

    def answer_all(self):
        while True:
            self.answer(*self.done.get())

    def answer(self, tickets, logits, seconds):
        """logits float32 (n, classes), or None where the network failed. NumPy's, as in a connection's thread"""
        if logits is None:
            for ticket in tickets:
                ticket.set_exception(Refusal(500, "the network failed; the server's log says how"))
            return
        count, most = len(logits), self.args.max_batch
        for first in range(0, count, most):  # a single request may hold more images
            size, waits = min(most, count - first), [] if first else [ticket.waited for ticket in tickets]
            self.statistics.batch(size, seconds * size / count, waits)
        # of all at once: each operation on so many numbers gives Python's lock away
        finite, scores, end = np.isfinite(logits).all(1), Scores.of(logits), 0
        for ticket in tickets:
            rows = slice(end, end := end + len(ticket.pixels))
            ticket.computed, ticket.batch = seconds, min(count, most)
            if finite[rows].all():
                ticket.set_result(Scores(*(values[rows] for values in scores)))
            else:  # JSON has no word for that
                ticket.set_exception(Refusal(500, "the network's outputs are not finite"))


def spread(net, devices):
    """Puts a network on a device; on several each takes the next steps until it has its share of the weights' bytes,
    and what flows between them is copied."""
    if len(devices) == 1:
        return net.to(devices[0])
    if not isinstance(net, Flat):
        raise UserError(f"--devices {','.join(devices)}: only ResNet-50s of ours are split, not a "
                        f"{net.config.get('arch', net.precision)}", 2)
    named, call, where = dict(net.named_modules()), net.call, {}
    sizes = {step.name: sum(t.nbytes for t in (*named[step.name].parameters(), *named[step.name].buffers()))
             if step.name in named else 0 for step in net.steps}
    total, so_far = sum(sizes.values()), 0
    for step in net.steps:
        where[step.name] = devices[min(so_far * len(devices) // total, len(devices) - 1)]
        so_far += sizes[step.name]
        if step.name in named:
            named[step.name].to(where[step.name])

    def moved(step, x, **more):
        to = where[step.name]
        return call(step, x.to(to), **{k: v.to(to) for k, v in more.items()})
    net.call, net.replay, net.plan_for = moved, net.run_sliced, lambda pixels: None
    return net


def stamp_of(path):
    """What tells a changed file from the one that was read"""
    with contextlib.suppress(OSError, TypeError):
        status = os.stat(path)
        return status.st_mtime_ns, status.st_size, status.st_ino


@contextlib.contextmanager
def turn(lock, deadline, alive):
    """Within a lock or semaphore, for a request that someone waits for still"""
    left = deadline - time.monotonic()
    if left <= 0 or not lock.acquire(timeout=left):
        raise Refusal(504, "waited for its turn to be decoded longer than the request allows")
    try:
        if not alive():
            raise Refusal(499, "the client is gone")
        yield
    finally:
        lock.release()


def decode(network, encoded, args, gate):
    """Encoded bytes -> uint8 array (crop, crop, 3). The size is looked at before any pixel is decoded, in a context of
    gate()."""
    require(encoded, "the image is empty")
    try:
        with Image.open(io.BytesIO(encoded), formats=FORMATS) as image:
            (width, height), kind = image.size, image.format
        if width * height > args.max_pixels:
            raise Refusal(413, f"the image has {width} x {height} pixels, more than {args.max_pixels}")
        # MPO: a JPEG that others follow. What is coded has a zero after each 255
        require(kind not in ("JPEG", "MPO") or encoded.count(b"\xff\xda") <= SCANS, f"the JPEG has over {SCANS} scans")
        with gate():
            gap = 0 if args.full_decode else 2
            return network.transform.encoded(encoded, FORMATS, network.exif, gap).numpy()
    except Refusal:
        raise
    except Image.UnidentifiedImageError:
        raise Refusal(400, f"not an image in any of {', '.join(FORMATS)}") from None
    except Image.DecompressionBombError:
        raise Refusal(413, f"the image has more than {args.max_pixels} pixels") from None
    except ValueError as error:  # data.decode() says what is wrong
        raise Refusal(400, str(error)[:200]) from None
    except Exception as error:  # decoders raise nearly everything on damaged headers
        raise Refusal(400, f"damaged image: {type(error).__name__}") from None


# --------------------------------------------------------------------------------------------- the wire, strictly

def malformed(text, status=400):
    return Refusal(status, text, close=True)


CONTINUE = b"HTTP/1.1 100 Continue\r\n\r\n"
# a header; one way to match: a line of blanks could cost seconds with Python's lock held
FIELD = re.compile(rb"([!#$%&'*+.^_`|~0-9A-Za-z-]+):([^\x00-\x08\x0a-\x1f\x7f]*)")


class Stream:
    """Reads a socket. Every call ends by `deadline` (monotonic seconds), with TimeoutError."""

    def __init__(self, connection):
        self.connection, self.buffer, self.deadline, self.patience = connection, bytearray(), 0.0, False

    def within(self, seconds, grows=False):
        """The time from now for what comes next. grows: 64 KiB add a second, but to no more than that time again"""
        self.deadline, self.patience = time.monotonic() + seconds, grows and seconds

    def fill(self):
        left = self.deadline - time.monotonic()
        if left <= 0:
            raise TimeoutError
        self.connection.settimeout(left)
        received = self.connection.recv(262144)
        if not received:
            raise EOFError
        self.buffer += received
        if self.patience:
            self.deadline = min(self.deadline + len(received) / 65536, time.monotonic() + self.patience)

    def line(self, limit, what, status=400):
        """-> the bytes before the next CR LF; Refusal `status` beyond `limit`, 400 where a line ends in LF alone"""
        at = 0
        while (end := self.buffer.find(b"\n", at)) < 0 and len(self.buffer) <= limit:
            at = len(self.buffer)
            self.fill()
        if not 0 <= end <= limit:
            raise malformed(f"{what}: a line is too long", status)
        if self.buffer[end - 1:end] != b"\r":
            raise malformed(f"{what}: a line ends without carriage return")
        line = bytes(self.buffer[:end - 1])
        del self.buffer[:end + 1]
        return line

    def read(self, size):
        while len(self.buffer) < size:
            self.fill()
        taken = bytes(memoryview(self.buffer)[:size])
        del self.buffer[:size]
        return taken

    def fields(self):
        """Headers or trailers, and the empty line behind: yields (lower-case name, value)"""
        left, count = HEAD_BYTES, 0
        while line := self.line(left, "headers", 431):
            left, count = left - len(line) - 2, count + 1
            if count > HEADERS:
                raise malformed("too many headers", 431)
            field = FIELD.fullmatch(line)
            if not field:
                raise malformed("a header is malformed")
            yield field[1].decode().lower(), field[2].strip(b" \t").decode("latin-1")

    def chunked(self, limit):
        """The body of a Transfer-Encoding: chunked; Refusal 413 beyond `limit` bytes or 65,536 chunks"""
        body = bytearray()
        for _ in range(65536):
            match = re.fullmatch(rb"([0-9A-Fa-f]{1,8})[ \t]*(?:;[^\x00-\x08\x0a-\x1f\x7f]*)?",
                                 self.line(1024, "the body is malformed"))
            if not match:
                raise malformed("the body is malformed: a chunk's size is no hexadecimal number")
            size = int(match[1], 16)
            if len(body) + size > limit:
                raise Refusal(413, f"the body is larger than {limit} bytes", close=True)
            if size == 0:
                list(self.fields())  # trailers, which nobody here asks for
                return bytes(body)
            body += self.read(size)
            if self.read(2) != b"\r\n":
                raise malformed("the body is malformed: a chunk does not end where it says")
        raise Refusal(413, "the body has too many chunks", close=True)


def read_head(stream):
    """-> (method, target, minor version, {lower-case name: value}). Anything that two parsers might read differently is
    refused, and the connection closed."""
    first = stream.line(LINE_BYTES, "request line", 414)
    first = first or stream.line(LINE_BYTES, "request line", 414)  # old clients end a body with an empty line
    match = re.fullmatch(rb"([A-Z]{1,20}) ([\x21-\x7e]{1,8000}) HTTP/1\.([01])", first)
    if not match:
        raise malformed("the request line is not HTTP/1.1")
    headers = {}
    for name, value in stream.fields():
        if name in headers and name in ("host", "content-length", "transfer-encoding", "content-type",
                                        "content-encoding", "inference-header-content-length"):
            raise malformed(f"several {name} headers")
        headers[name] = f"{headers[name]}, {value}" if name in headers else value
    if match[3] == b"1" and "host" not in headers:
        raise malformed("no Host header")
    if not re.fullmatch(r"[\w.~!$&'()*+,;=%:\[\]-]*", headers.get("host", ""), re.ASCII):
        raise malformed("Host is no name or address")
    if "content-length" in headers:
        if "transfer-encoding" in headers:
            raise malformed("Content-Length and Transfer-Encoding exclude each other")
        if not re.fullmatch("[0-9]{1,15}", headers["content-length"]):
            raise malformed("Content-Length is no number")
    if "transfer-encoding" in headers and match[3] == b"0":
        raise malformed("HTTP/1.0 has no Transfer-Encoding")
    if headers.get("transfer-encoding", "chunked").lower() != "chunked":
        raise malformed("no Transfer-Encoding but chunked is known", 501)
    return match[1].decode(), match[2].decode(), int(match[3]), headers


def inflate(body, encoding, limit):
    """Decompresses gzip (of any number of members) or deflate (zlib) up to `limit` bytes."""
    if encoding in ("", "identity"):
        return body
    if encoding not in ("gzip", "x-gzip", "deflate"):
        raise Refusal(415, "no Content-Encoding but gzip and deflate is known", Accept_Encoding="gzip, deflate")
    if body.count(b"\x1f\x8b\x08") > 65536:  # members of nothing cost a hundred times what their bytes do
        raise Refusal(413, "the body has too many gzip members")
    try:
        if encoding == "deflate":
            stream = zlib.decompressobj()
            result = stream.decompress(body, limit + 1)
            if len(result) <= limit and (not stream.eof or stream.unused_data):
                raise EOFError
        else:
            result = gzip.GzipFile(fileobj=io.BytesIO(body)).read(limit + 1)
    except (zlib.error, gzip.BadGzipFile, EOFError):
        raise Refusal(400, f"the body is not {encoding}, is cut short or goes on behind its end") from None
    if len(result) > limit:
        raise Refusal(413, f"the body is larger than {limit} bytes when decompressed")
    return result


NO_MARKS = bytes(set(range(256)) - set(b'[]{}"\\'))


def read_json(text, most):
    """bytes -> what they say in JSON, an object of up to `most` values. No NaN, no depth beyond DEPTH. Python's lock is
    held meanwhile, so large texts are looked at in a few calls before they can grow, and numbers are read by Python."""
    def refuse(constant):
        raise ValueError(f"{constant} is no JSON")
    if len(text.translate(None, NO_MARKS)) > MARKS or text.count(b",") > most:
        raise Refusal(413, f"more than {most} values in JSON, or {MARKS} brackets and quotes; data may be one flat "
                           "list, or binary")
    try:
        bare = text.replace(b"\\\\", b"").replace(b'\\"', b"")  # so that strings end at the next quote: linear time
        bare = re.sub(rb'"[^"]*"?', b"", bare).translate(None, NO_MARKS)
        if max(itertools.accumulate(1 if b in b"[{" else -1 for b in bare), default=0) > DEPTH:
            raise ValueError(f"nested deeper than {DEPTH}")
        lets = dict(parse_int=lambda digits: int(digits), parse_float=lambda digits: float(digits))  # other threads run
        value = json.loads(text, parse_constant=refuse, **lets if len(text) > LARGE else {})
    except (ValueError, RecursionError) as error:
        raise Refusal(400, f"the JSON cannot be read: {str(error)[:100]}") from None
    require(isinstance(value, dict), "the JSON is no object")
    return value


def read_form(body, content_type, most):
    """multipart/form-data of up to `most` parts -> contents of those named image and of those that are files"""
    match = re.search(r'(?i:boundary)=(?:"([^"]{1,70})"|([^\s;"]{1,70}))', content_type)
    require(match, "multipart without a boundary")
    edge = b"--" + (match[1] or match[2]).encode("latin-1")
    pieces = (b"\r\n" + body).split(b"\r\n" + edge, most + 3)  # the first is what RFC 2046 calls the preamble
    if len(pieces) > most + 2:
        raise Refusal(413, f"more than {most} parts")
    require(len(pieces) >= 3 and pieces[-1].startswith(b"--"),
            "the multipart body does not have and end with its boundary")
    found = []
    for piece in pieces[1:-1]:
        head, separator, content = piece.partition(b"\r\n\r\n")
        disposition = re.search(rb"(?im)^content-disposition:\s*form-data;(.*)$", head)
        require(separator and disposition, "a part of the form has no Content-Disposition")
        if re.search(rb'\b(name="?image(\[\])?"?\s*(;|$)|filename\*?=)', disposition[1]):
            found.append(content)
    require(found, "the form has no field named image")
    return found


# ------------------------------------------------------------------------------- Open Inference Protocol, version 2

def split_binary(body, headers):
    """-> (the request's JSON, None if the body is the only input, a batch of one; the bytes of tensors behind it)"""
    length = headers.get("inference-header-content-length")
    if length is None:
        return body, b""
    require(re.fullmatch("[0-9]{1,12}", length) and int(length) <= len(body),
            "Inference-Header-Content-Length lies outside the body")
    return body[:int(length)] if int(length) else None, body[int(length):]


def parameter(item, name, default=None):
    """-> a parameter of the request or of one of its tensors; of the default's type, where there is one"""
    parameters = item.get("parameters", {})
    require(isinstance(parameters, dict), "parameters is no object")
    require("shared_memory_region" not in parameters, "no shared memory is known here")
    value = parameters.get(name, default)
    require(default is None or type(value) is type(default),
            f"parameter {name} is no {'boolean' if isinstance(default, bool) else 'whole number'}")
    return value


def read_input(network, request, tail, limit):
    """The request's only input -> uint8 (n, 3, crop, crop) or a list of encoded images. `limit`: images that one
    request may hold.

    pixels  UINT8 (n, 3, H, W); or FP32, normalised by the network's mean and deviation, taken to the nearest pixel
    image   BYTES (n) or (n, 1): encoded images"""
    inputs = request.pop("inputs", None)  # millions of numbers are not held while their pixels wait
    require(isinstance(inputs, list) and len(inputs) == 1 and isinstance(inputs[0], dict),
            "inputs must be a list of one tensor")
    tensor = inputs[0]
    name, kind, shape = (tensor.get(key) for key in ("name", "datatype", "shape"))
    require(name in ("pixels", "image"), "unexpected inference input; expected pixels or image")
    require(kind in (*TYPES, "BYTES"), f"datatype of {name} must be {', '.join(TYPES)} or BYTES")
    require(isinstance(shape, list) and all(type(n) is int and 0 <= n < 2 ** 31 for n in shape),
            f"shape of {name} must be a list of whole numbers")
    if kind == "BYTES":
        require(len(shape) == 1 or shape[1:] == [1], f"shape of {name} must be [n] or [n, 1] for BYTES")
    else:
        wanted = [3, network.size, network.size]
        require(shape[1:] == wanted, f"shape of {name} must be [n, {', '.join(map(str, wanted))}]")
    require(1 <= shape[0] <= limit, f"{name}: a request holds 1 to {limit} images")
    size = parameter(tensor, "binary_data_size")
    if size is None:
        require(not tail, "bytes follow the JSON that no input claims")
    else:
        require(type(size) is int and size == len(tail) and "data" not in tensor,
                f"binary_data_size of {name} is not what follows the JSON")
    if kind == "BYTES":
        return json_strings(tensor.get("data"), shape[0]) if size is None else binary_strings(tail, shape[0])
    count = math.prod(shape)
    if size is None:
        values = json_numbers(tensor.get("data"), count, kind)
    else:
        require(size == count * TYPES[kind].itemsize, f"binary_data_size of {name} does not fit its shape")
        values = np.frombuffer(tail, TYPES[kind])
    values = values.reshape(shape)
    if kind == "FP32":
        require(np.isfinite(values).all(), f"{name} holds values that are not finite")
        mean, std = (np.float32(network.net.preprocess[k]).reshape(3, 1, 1) * 255 for k in ("mean", "std"))
        with np.errstate(over="ignore"):  # far beyond white
            values = np.rint(values * std + mean).clip(0, 255)
    return torch.from_numpy(values.astype(np.uint8))


def json_numbers(values, count, kind):
    try:
        while isinstance(values, list) and values and isinstance(values[0], list):
            if set(map(type, values)) != {list} or len(set(map(len, values))) > 1:
                raise ValueError
            values = list(itertools.chain.from_iterable(values))
        if not isinstance(values, list):
            raise ValueError
        parts = [values[i:i + 65536] for i in range(0, len(values), 65536)]  # between which other threads run
        if any(set(map(type, part)) - {int, float} for part in parts):  # of texts NumPy makes giant arrays
            raise ValueError
        array = np.concatenate([np.array(part, np.float64 if kind == "FP32" else None) for part in parts])
    except (ValueError, OverflowError):
        raise Refusal(400, f"data must be {count} numbers, and not ragged") from None
    if array.size != count or kind == "UINT8" and not (array.dtype.kind in "iu"
                                                       and 0 <= array.min() <= array.max() <= 255):
        raise Refusal(400, f"data must be {count} numbers" + " from 0 to 255" * (kind == "UINT8"))
    with np.errstate(over="ignore"):  # to infinity, which is refused
        return array.astype(TYPES[kind])


def json_strings(values, count):
    """BYTES in JSON: text cannot hold an image, so it must be in base64"""
    flat = [v for item in values for v in (item if isinstance(item, list) else [item])] \
        if isinstance(values, list) else []
    require(len(flat) == count and all(isinstance(v, str) for v in flat), f"data must be {count} strings")
    try:
        return [base64.b64decode(v, validate=True) for v in flat]
    except ValueError:
        raise Refusal(400, "BYTES in JSON must be base64") from None


def binary_strings(tail, count):
    """BYTES behind the JSON: each with its length before it, uint32 little-endian"""
    found, at = [], 0
    while at < len(tail) and len(found) < count:
        size = int.from_bytes(tail[at:at + 4], "little")
        found.append(tail[at + 4:at + 4 + size])
        at += 4 + size
    require(at == len(tail) and len(found) == count, f"the lengths of {count} BYTES do not fill the binary data")
    return found


def wanted_outputs(request, classes):
    """-> [(name, whether binary, classes to name or 0)]"""
    if request is None:
        return [("probabilities", True, 0)]
    binary = parameter(request, "binary_data_output", False)
    outputs = request.get("outputs", [])
    require(isinstance(outputs, list) and len(outputs) <= 2 and all(isinstance(o, dict) for o in outputs),
            "outputs must be a list of probabilities, logits or both")
    require(isinstance(request.get("id", ""), str) and len(request.get("id", "")) <= 1024,
            "id is no text of up to 1024 characters")
    found = []
    for output in outputs or [{"name": "probabilities"}]:
        name, top = output.get("name"), parameter(output, "classification", 0)
        require(name in ("probabilities", "logits") and name not in (n for n, _, _ in found),
                "unexpected inference output; expected probabilities or logits, each once")
        require(top >= 0, "parameter classification is no whole number")
        found.append((name, parameter(output, "binary_data", binary), min(top, classes)))
    return found


def best(values, order, top):
    """float32 (n, classes), their order in Scores -> for each of n [(value, class)], the likeliest first"""
    return [list(zip(row[first].tolist(), first.tolist())) for row, first in zip(values, order[:, :top])]


def infer_response(name, classes, request, outputs, scores):
    """-> (headers, body)"""
    entries, tails = [], []
    for output, binary, top in outputs:
        values = scores.logits if output == "logits" else scores.probabilities
        if top:
            strings = [f"{v:f}:{i}:{classes[i]}" for row in best(values, scores.order, top) for v, i in row]
        entry = dict(name=output, datatype="BYTES" if top else "FP32", shape=[len(values), top or values.shape[1]])
        if binary:
            tails.append(b"".join(len(s).to_bytes(4, "little") + s for s in map(str.encode, strings)) if top else
                         values.astype("<f4").tobytes())
            entry["parameters"] = {"binary_data_size": len(tails[-1])}
        else:
            entry["data"] = strings if top else values.flatten().tolist()
        entries.append(entry)
    answer = dict(model_name=name, model_version=VERSION, outputs=entries)
    if request and "id" in request:
        answer["id"] = request["id"]
    body = json.dumps(answer).encode()
    if not tails:
        return {"Content-Type": "application/json"}, body
    return {"Content-Type": "application/octet-stream", "Inference-Header-Content-Length": str(len(body))}, \
        b"".join([body, *tails])


# ------------------------------------------------------------------------------------------- what describes itself

GRAY_GIF = "R0lGODdhAQABAIEAAICAgAAAAAAAAAAAACwAAAAAAQABAAAIBAABBAQAOw=="  # one pixel, base64


def openapi(models, keys):
    """Names of the models, and whether requests need a key -> the OpenAPI 3.1 document of ROUTES"""
    error = {"description": "A reason", "content": {"application/json": {"schema": {
        "type": "object", "required": ["error"], "properties": {"error": {"type": "string"}}}}}}
    name = {"name": "name", "in": "path", "required": True,
            "schema": {"type": "string", "enum": list(models)}}
    topk = {"name": "topk", "in": "query", "schema": {"type": "integer", "minimum": 1, "maximum": 999999}}
    encoded = {"schema": {"type": "string", "format": "binary"}}
    tensor = {"type": "object", "required": ["name", "shape", "datatype"], "properties": {
        "name": {"enum": ["pixels", "image"]}, "datatype": {"enum": [*TYPES, "BYTES"]}, "data": {"type": "array"},
        "shape": {"type": "array", "items": {"type": "integer", "minimum": 0}}, "parameters": {"type": "object"}}}
    bodies = {
        "images": {"required": True, "content": {
            "multipart/form-data": {"schema": {"type": "object", "required": ["image"],
                                               "properties": {"image": encoded["schema"]}}},
            **{f"image/{kind.lower()}": encoded for kind in FORMATS}}},
        "tensors": {"required": True, "content": {"application/json": {
            "example": {"inputs": [{"name": "image", "shape": [1], "datatype": "BYTES", "data": [GRAY_GIF]}]},
            "schema": {"type": "object", "required": ["inputs"], "properties": {
                "id": {"type": "string"}, "parameters": {"type": "object"},
                "inputs": {"type": "array", "items": tensor, "minItems": 1, "maxItems": 1},
                "outputs": {"type": "array", "maxItems": 2, "items": {
                    "type": "object", "required": ["name"], "properties": {
                        "name": {"enum": ["probabilities", "logits"]}, "parameters": {"type": "object"}}}}}}}}}}

    def operation(route):
        kind, schema = route.content
        binary = {"application/octet-stream": encoded} if route.body == "tensors" else {}  # where a request asks so
        answers = {"200": {"description": "Success", "content": {kind: {"schema": schema}, **binary}},
                   **{str(status): error for status in (400, 401, *route.errors)}}
        return {"summary": route.summary,
                "parameters": [name] * ("{name}" in route.path) + [topk] * (route.body == "images"),
                "responses": answers, **({"requestBody": bodies[route.body]} if route.body else {}),
                **({"security": []} if keys and route.path in OPEN_PATHS else {})}
    paths = {route.path.format(name="{name}", version="", slash=""):
             {method.lower(): operation(route) for method in route.methods} for route in ROUTES.values()}
    schemes = {"bearer": {"type": "http", "scheme": "bearer"},
               "header": {"type": "apiKey", "in": "header", "name": "X-API-Key"}}
    secured = {"security": [{name: []} for name in schemes], "components": {"securitySchemes": schemes}}
    return {"openapi": "3.1.0", "info": {"title": "ResNet-50", "version": VERSION}, "paths": paths,
            **(secured if keys else {})}


PAGE = """<!doctype html>
<html lang="en"><head><meta charset="utf-8"><meta name="viewport" content="width=device-width, initial-scale=1">
<title>ResNet-50</title><link rel="icon" href="data:,">
<style>
:root { color-scheme: light dark }
body { font: 16px/1.5 system-ui, sans-serif; margin: 0 auto; max-width: 60rem; padding: 1rem }
#drop { border: 2px dashed #888; border-radius: .5rem; padding: 1.5rem; text-align: center; cursor: pointer }
#drop:focus-visible, #drop.over { border-color: #06c; outline: 3px solid #9cf }
#result { display: flex; flex-wrap: wrap; gap: 1rem; margin: 1rem 0 }
#picture { max-width: min(100%, 20rem); max-height: 20rem; object-fit: contain }
#bars { flex: 1 1 16rem; list-style: none; margin: 0; padding: 0 }
#bars li { position: relative; margin: .25rem 0; padding: .15rem .5rem; z-index: 0; overflow-wrap: anywhere }
#bars li span { position: absolute; inset: 0; right: auto; background: #06c4; z-index: -1; border-radius: .2rem }
#charts { display: grid; grid-template-columns: repeat(auto-fit, minmax(14rem, 1fr)); gap: 1rem }
figure { margin: 0 }
svg { width: 100%; height: 4rem; background: #8882 } figcaption { font-size: .85rem; opacity: .7 }
#error { color: light-dark(#a00, #f88) } input { position: absolute; opacity: 0; width: 1px; height: 1px }
</style></head><body>
<h1>ResNet-50</h1>
<div id="drop" role="button" tabindex="0" aria-label="Choose an image">
Drop or paste an image, or press Enter to choose one</div>
<input id="file" type="file" accept="image/jpeg,image/png,image/webp,image/bmp,image/gif" tabindex="-1"
  aria-hidden="true">
<p id="error" role="alert"></p>
<div id="result" aria-live="polite"><img id="picture" alt="" hidden><ol id="bars"></ol></div>
<p id="timings"></p>
<div id="charts"></div>
<script>
const $ = id => document.getElementById(id);
let latest, headers = {};
async function classify(file) {
  latest = file; show([], "", "");
  $("picture").src = URL.createObjectURL(file); $("picture").alt = file.name || "pasted image";
  $("picture").hidden = false;
  const form = new FormData(); form.append("image", file);
  const began = performance.now();
  try {
    const answer = await fetch("predict?topk=5", {method: "POST", body: form, headers});
    const found = await answer.json().catch(() => ({error: `${answer.status} ${answer.statusText}`}));  // a proxy's own
    if (file !== latest) return;
    const key = answer.status === 401 && prompt("API key");
    if (key) { headers = {"X-API-Key": key}; return classify(file); }
    if (!answer.ok) throw new Error(found.error);
    const t = found.timings;
    show(found.top.map(({class: name, probability}) => {
      const item = document.createElement("li"), bar = document.createElement("span");
      bar.style.width = 100 * probability + "%";
      item.append(bar, `${name} ${(100 * probability).toFixed(1)} %`);
      return item;
    }), `${found.model}: decoded in ${t.decode_ms} ms, waited ${t.queue_ms} ms, computed in ${t.compute_ms} ms in a ` +
      `batch of ${t.batch}; ${(performance.now() - began).toFixed(0)} ms in all`, "");
  } catch (error) { if (file === latest) show([], "", error.message); }
}
function show(bars, timings, error) {
  $("bars").replaceChildren(...bars); $("timings").textContent = timings; $("error").textContent = error;
}
const take = ([...list]) => { const file = list.find(f => f.type.startsWith("image/")) ?? list[0];
  if (file) classify(file); };
$("drop").onclick = () => $("file").click();
$("drop").onkeydown = e => { if (e.key === "Enter" || e.key === " ") { e.preventDefault(); $("file").click(); } };
$("file").onchange = () => { take($("file").files); $("file").value = ""; };
document.ondragover = e => { e.preventDefault(); $("drop").classList.add("over"); };
document.ondragleave = () => $("drop").classList.remove("over");
document.ondrop = e => { e.preventDefault(); $("drop").classList.remove("over"); take(e.dataTransfer.files); };
document.onpaste = e => take(e.clipboardData.files);
const charts = [  // of what is between two polls: the one over the other
  ["images per second", "images_total", "uptime_seconds", 1],
  ["images per batch", "batch_size_sum", "batch_size_count", 1],
  ["milliseconds per request", "request_seconds_sum", "request_seconds_count", 1000],
].map(([title, over, under, scale]) => {
  const figure = document.createElement("figure");
  figure.innerHTML = `<svg viewBox="0 0 60 10" preserveAspectRatio="none" aria-hidden="true"><polyline fill="none"
    stroke="#06c" stroke-width=".3"/></svg><figcaption></figcaption>`;
  $("charts").append(figure);
  return {title, over, under, scale, values: [], line: figure.querySelector("polyline"),
    caption: figure.querySelector("figcaption")};
});
let lasts = {};  // by process, each of which counts its own requests
async function poll() {
  try {
    const answer = await fetch("metrics", {headers}), text = await answer.text();
    if (!answer.ok) throw new Error(text);  // a proxy may keep them to itself: no charts, instead of zeros
    const sum = name => [...text.matchAll(new RegExp(`^resnet50_${name}(?:{.*})? (.*)$`, "gm"))]
      .reduce((s, m) => s + +m[1], 0);
    const now = charts.map(chart => [sum(chart.over), sum(chart.under)]), last = lasts[sum("process_id")];
    if (last) charts.forEach((chart, i) => {
      const [over, under] = [0, 1].map(k => now[i][k] - last[i][k]), value = under ? chart.scale * over / under : 0;
      const top = Math.max(1e-9, ...chart.values, value);
      chart.values = [...chart.values, value].slice(-60);
      chart.line.setAttribute("points", chart.values.map((v, x) => `${x},${9.8 - 9.6 * v / top}`).join(" "));
      chart.caption.textContent = `${chart.title}: ${value.toFixed(1)} (a minute's most: ${top.toFixed(1)})`;
    });
    lasts[sum("process_id")] = now;
  } catch (error) { lasts = {}; }
  setTimeout(poll, 1000);
}
poll();
</script></body></html>
"""


# ---------------------------------------------------------------------------------------------------------- server

def as_json(value, status=200):
    return status, {"Content-Type": "application/json"}, json.dumps(value).encode()


class Handler(http.server.BaseHTTPRequestHandler):
    """One connection"""

    def setup(self):
        self.connection, self.idle, self.begun = self.request, True, False
        with self.server.lock:
            self.server.handlers[self.request] = self
        self.connection.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, True)
        self.args = self.server.args
        if self.server.tls:
            self.connection = self.server.tls.wrap_socket(self.request, server_side=True, do_handshake_on_connect=False)
        self.stream = Stream(self.connection)

    def handle(self):
        with contextlib.suppress(OSError, EOFError):  # the client went away, or was idle for too long
            if self.server.tls:
                self.connection.settimeout(self.args.head_timeout)
                self.connection.do_handshake()
            while self.one():
                pass

    def finish(self):
        self.goodbye()
        self.connection.close()  # TLS has taken the socket that shutdown_request would close

    def goodbye(self):
        """TLS's own, without which the end could be an attacker's. The client's is not waited for."""
        if self.server.tls:
            with contextlib.suppress(OSError, ValueError):
                self.connection.settimeout(0)
                self.connection.unwrap()

    def one(self):
        """One request and its answer. -> whether the connection goes on"""
        self.idle, self.body, self.ticket, self.asked = True, b"", None, False  # who is quiet holds no memory
        if self.server.fileno() < 0 and self.begun:  # closed by drain(): no more than a first request is answered
            return False
        self.stream.within(self.args.idle_timeout)
        if not self.stream.buffer:
            self.stream.fill()
        self.idle, self.begun, self.started = False, True, time.monotonic()
        self.stream.within(self.args.head_timeout)
        self.method, self.path, self.minor, self.headers, self.images, self.model = "-", "-", 1, {}, 0, None
        try:
            self.method, self.path, self.minor, self.headers = read_head(self.stream)
            function, model = self.route()
            self.read_body()
            self.arrived = time.monotonic()  # a slow upload is no slow answer, and has a deadline of its own
            status, headers, body = function(self, model)
            close = False
        except Refusal as refusal:
            status, headers, body = as_json({"error": refusal.text}, refusal.status)
            headers.update(refusal.headers)
            close = refusal.close
        except TimeoutError:
            (status, headers, body), close = as_json({"error": "the request came too slowly"}, 408), True
        except (OSError, EOFError):
            if self.method == "-":
                raise
            (status, headers, body), close = as_json({"error": "the client is gone"}, 499), True
        except Exception:
            say(traceback.format_exc())
            (status, headers, body), close = as_json({"error": "an error inside the server"}, 500), True
        if self.model:
            self.book(status)
        connection = re.split(r"[ \t]*,[ \t]*", self.headers.get("connection", "").lower())
        keep = not close and not self.server.draining and "close" not in connection and (
            self.minor == 1 or "keep-alive" in connection)
        self.answer(status, headers, body, keep)
        return keep

    def book(self, status):
        now, statistics = time.monotonic(), self.model.statistics
        if status >= 400:
            statistics.request(0, fail=now - self.started)
        else:
            statistics.request(self.images, success=now - self.started, queue=self.ticket.waited,
                               compute_input=self.decoded, compute_infer=self.ticket.computed,
                               compute_output=now - self.inferred)

    def route(self):
        """-> the function that answers, and the Model that the path names or None. All that can be refused before the
        body is read, is: what is left of a body unread closes the connection."""
        path, _, query = re.sub("(?i)^https?://[^/?]+/?", "/", self.path).partition("?")  # RFC 9112, 3.2.2
        path, self.query = urllib.parse.unquote(path), dict(urllib.parse.parse_qsl(query, keep_blank_values=True))
        asked = "GET" if self.method == "HEAD" else self.method
        body = "transfer-encoding" in self.headers or int(self.headers.get("content-length", 0)) > 0
        route, match = next(((r, m) for pattern, r in ROUTES.items() if (m := pattern.fullmatch(path))), (None, None))
        if route is None:
            raise Refusal(404, "nothing is here; /openapi.json lists what is", close=body)
        if asked not in route.methods:
            allowed = ", ".join(route.methods).replace("GET", "GET, HEAD")
            raise Refusal(405, f"{self.method[:20]} is not for this path", close=body, Allow=allowed)
        if self.server.keys and path not in OPEN_PATHS and not self.authorised():
            raise Refusal(401, "this needs an API key: Authorization: Bearer KEY", close=body,
                          WWW_Authenticate="Bearer")
        name, version = (match.groupdict().get(key) for key in ("name", "version"))
        if name and (name not in self.server.models or version not in (None, VERSION)):
            version = f" version {version}" if name in self.server.models else ""
            raise Refusal(404, f"Request for unknown model: '{name}'{version} is not found", close=body)
        if int(self.headers.get("content-length", 0)) > self.args.max_body:
            raise Refusal(413, f"the body is larger than {self.args.max_body} bytes", close=True)
        expected = self.headers.get("expect")
        if expected and expected.lower() != "100-continue":
            raise Refusal(417, "nothing but 100-continue can be expected", close=True)
        if expected and body and self.minor and not self.stream.buffer:
            self.connection.sendall(CONTINUE)
        return route.answer, self.server.models.get(name)

    def authorised(self):
        given = self.headers.get("x-api-key") or re.sub("^(?i:bearer) +", "", self.headers.get("authorization", ""))
        return any([hmac.compare_digest(given.encode("latin-1"), key) for key in self.server.keys])

    def read_body(self):
        """Into self.body, decompressed. It may take head_timeout, and a second for every 64 KiB that have come, but
        pause for no longer than head_timeout."""
        limit = self.args.max_body
        size = int(self.headers.get("content-length", 0))
        self.stream.within(self.args.head_timeout, grows=True)
        body = self.stream.chunked(limit) if "transfer-encoding" in self.headers else self.stream.read(size)
        self.body = inflate(body, self.headers.get("content-encoding", "").lower().strip(), limit)

    def answer(self, status, headers, body, keep):
        accepted = self.headers.get("accept-encoding", "") if len(body) > 1024 else ""
        for encoding, compress in (("gzip", gzip.compress), ("deflate", zlib.compress)):
            if re.search(rf"\b{encoding}\b(?!\s*;\s*q=0(\.0*)?\s*(,|$))", accepted):
                body, headers = compress(body, 1), {**headers, "Content-Encoding": encoding, "Vary": "Accept-Encoding"}
                break
        head = [f"HTTP/1.1 {status} {self.responses.get(status, ('Unknown',))[0]}", f"Date: {self.date_time_string()}",
                *(f"{k}: {v}" for k, v in headers.items()), f"Content-Length: {len(body)}",
                "X-Content-Type-Options: nosniff", f"Connection: {'keep-alive' if keep else 'close'}", "", ""]
        with self.server.lock:
            self.server.answers[status] += 1
        if status != 499:
            self.connection.settimeout(self.args.head_timeout + len(body) / 65536)
            with contextlib.suppress(OSError, EOFError):
                self.connection.sendall("\r\n".join(head).encode("latin-1") + (b"" if self.method == "HEAD" else body))
                if not keep:
                    self.part()
        if self.args.access_log:
            say(json.dumps(dict(time=round(time.time(), 3), client=self.client_address[0], method=self.method,
                                path=self.path[:200], status=status, bytes=len(body), images=self.images,
                                ms=round((time.monotonic() - self.started) * 1e3, 2))))

    def part(self):
        """Ends this side, and reads on for a second what a refused client is still sending: a reset would throw away
        what it has not read yet, and a proxy would make a 502 of it."""
        self.goodbye()
        self.connection.shutdown(socket.SHUT_WR)  # from here on TLS is read as it comes
        self.stream.within(1)
        while True:
            self.stream.buffer.clear()
            self.stream.fill()

    def alive(self):
        """False when the client is gone. One that has said all it wants looks the same until something is written, for
        which 100 Continue is there; HTTP/1.0 does not know it and TLS would have to wrap it, so these are gone."""
        with contextlib.suppress(OSError, ValueError):
            poll = select.poll()  # select() knows descriptors up to 1023
            poll.register(self.connection, getattr(select, "POLLRDHUP", select.POLLHUP))  # seen through TLS too
            if self.stream.buffer or not poll.poll(0):
                return True
            if self.minor and not self.asked:
                os.write(self.request.fileno(), CONTINUE)  # never waits; TLS has taken this socket
                self.asked = True
            return self.asked and not poll.poll(0)[0][1] & (select.POLLERR | select.POLLHUP)
        return False

    # ------------------------------------------------------------------------------------------------- routes

    def deadline(self):
        timeout = self.headers.get("x-request-timeout-ms", str(self.args.timeout_ms))
        require(re.fullmatch("[0-9]{1,9}", timeout) and int(timeout) >= 1,
                "X-Request-Timeout-Ms is no number of milliseconds")
        return self.arrived + min(int(timeout), self.args.timeout_ms) / 1e3

    def infer(self, model, network, images, limit=math.inf):
        """Pixels uint8 (n, 3, H, W) or a list of encoded images -> their Scores, within `limit` seconds at most;
        self.ticket, self.decoded and self.inferred say what it took and when that was. Here as in all that a
        connection's thread does, arrays are NumPy's: PyTorch's operations would give each thread a team of OpenMP's, as
        many threads again as cores."""
        begin, deadline = time.monotonic(), min(self.deadline(), self.arrived + limit)
        gate = functools.partial(turn, self.server.gate, deadline, self.alive)
        with model.expecting(len(images), deadline):
            if isinstance(images, list):
                images = [decode(network, e, self.args, gate)[None] for e in images]
                images = images[0] if len(images) == 1 else np.concatenate(images)
                images = torch.from_numpy(images.transpose(0, 3, 1, 2))  # channels_last, as networks want it
            self.decoded, self.images = time.monotonic() - begin, len(images)
            self.ticket = model.submit(network, images, deadline, self.alive)
        try:
            scores = self.ticket.result(max(deadline - time.monotonic(), 0))
        except concurrent.futures.TimeoutError:
            raise Refusal(504, "no answer within the request's time") from None
        self.inferred = time.monotonic()
        return scores

    def predict(self, model):
        self.model = model = model or next(iter(self.server.models.values()))
        network = model.network
        require(re.fullmatch("[1-9][0-9]{0,5}", self.query.get("topk", "5")), "topk is no positive number")
        top = min(int(self.query.get("topk", 5)), len(network.classes))
        kind = self.headers.get("content-type", "")
        encoded = [self.body]
        if kind.lower().startswith("multipart/form-data"):
            encoded = read_form(self.body, kind, max(PARTS, self.args.max_images))
        if len(encoded) > self.args.max_images:
            raise Refusal(413, f"more than {self.args.max_images} images")
        scores, found = self.infer(model, network, encoded), []
        for row in best(scores.probabilities, scores.order, top):
            listed = [{"class_id": i, "class": network.classes[i], "probability": round(p, 6)} for p, i in row]
            found.append({**listed[0], "top": listed})
        times = dict(decode_ms=self.decoded, queue_ms=self.ticket.waited, compute_ms=self.ticket.computed,
                     total_ms=self.inferred - self.started)
        more = dict(model=model.name, timings={**{k: round(v * 1e3, 3) for k, v in times.items()},
                                               "batch": self.ticket.batch})
        return as_json({**found[0], **more} if len(found) == 1 else {"predictions": found, **more})

    def v2_infer(self, model):
        self.model, network, most = model, model.network, self.args.max_images
        text, tail = split_binary(self.body, self.headers)
        if text is not None:
            large = len(text) > LARGE
            with turn(self.server.reading, self.deadline(), self.alive) if large else contextlib.nullcontext():
                request = read_json(text, most * 3 * network.size ** 2 + 1000)
                images = read_input(network, request, tail, most)
        elif len(tail) == 3 * network.size ** 2 and not tail.startswith(MAGIC):  # an image may have that many bytes
            request, images = None, torch.frombuffer(bytearray(tail), dtype=torch.uint8).view(1, 3, network.size, -1)
        else:
            request, images = None, [tail]
        outputs = wanted_outputs(request, len(network.classes))
        microseconds = parameter(request or {}, "timeout", 0)  # tritonclient's infer(timeout=), without one 0
        require(0 <= microseconds < 1 << 63, "parameter timeout is no number of microseconds")
        scores = self.infer(model, network, images, microseconds / 1e6 or math.inf)
        return 200, *infer_response(model.name, network.classes, request, outputs, scores)

    def ready(self, model):
        told = {"name": model.name} if model else {"live": True}
        if self.server.draining:
            return as_json({**told, "ready": False, "error": "the server ends"}, 503)
        return as_json({**told, "ready": True})

    def model_metadata(self, model):
        size, count = model.network.size, len(model.network.classes)
        return as_json(dict(
            name=model.name, versions=[VERSION], platform="pytorch_resnet50",
            inputs=[dict(name="pixels", datatype="UINT8", shape=[-1, 3, size, size])],
            outputs=[dict(name="probabilities", datatype="FP32", shape=[-1, count])]))

    def model_configuration(self, model):
        size, count = model.network.size, len(model.network.classes)
        return as_json(dict(
            name=model.name, platform="pytorch_resnet50", backend="resnet50", version_policy={"latest": {}},
            max_batch_size=min(self.args.max_batch, self.args.max_images),
            input=[dict(name="pixels", data_type="TYPE_UINT8", format="FORMAT_NCHW", dims=[3, size, size])],
            output=[dict(name="probabilities", data_type="TYPE_FP32", dims=[count], label_filename="")],
            dynamic_batching=dict(max_queue_delay_microseconds=int(self.args.max_delay_ms * 1000))))

    def model_statistics(self, model):
        chosen = [model] if model else self.server.models.values()
        return as_json(dict(model_stats=[m.statistics.triton(m.name) for m in chosen]))

    def metrics(self, model):
        """Prometheus' text format, 0.0.4"""
        server = self.server
        with server.lock:
            answers, connections, refused = dict(server.answers), len(server.handlers), server.refused
        models = [(f'model="{name}"', m) for name, m in server.models.items()]
        lines = []

        def family(name, kind, text, samples):
            lines.extend([f"# HELP resnet50_{name} {text}", f"# TYPE resnet50_{name} {kind}",
                          *(f"resnet50_{name}{more} {value}" for more, value in samples)])
        family("requests_total", "counter", "Answers by HTTP status.",
               [(f'{{code="{code}"}}', n) for code, n in sorted(answers.items())])
        family("connections", "gauge", "Open connections.", [("", connections)])
        family("connections_refused_total", "counter", "Connections that found no room.", [("", refused)])
        family("process_id", "gauge", "Whose counts these are.", [("", os.getpid())])
        family("uptime_seconds", "gauge", "Since the start.", [("", f"{time.monotonic() - server.since:.3f}")])
        family("images_total", "counter", "Images answered.",
               [(f"{{{label}}}", m.statistics.images) for label, m in models])
        family("queue_images", "gauge", "Images that wait.", [(f"{{{label}}}", m.images) for label, m in models])
        for name, text in (("request_seconds", "Requests answered with success."),
                           ("queue_seconds", "Waiting for a batch."), ("batch_size", "Images per batch.")):
            samples = []
            for label, m in models:
                with m.statistics.lock:
                    samples += getattr(m.statistics, name).samples(label)
            family(name, "histogram", text, samples)
        return 200, {"Content-Type": "text/plain; version=0.0.4; charset=utf-8"}, ("\n".join(lines) + "\n").encode()

    def page(self, model):
        policy = "default-src 'none'; style-src 'unsafe-inline'; script-src 'unsafe-inline'; connect-src 'self'; " \
            "img-src 'self' blob: data:"
        return 200, {"Content-Type": "text/html; charset=utf-8", "Content-Security-Policy": policy}, PAGE.encode()


class Route(NamedTuple):
    methods: list
    path: str  # {name} of a model; {version} and {slash} may be missing
    answer: Callable  # Handler, Model that the path names or None -> (status, headers, body)
    summary: str  # this and all that follows: for openapi()
    errors: tuple = ()
    body: str | None = None
    content: tuple = ("application/json", {"type": "object"})


NAME = r"(?P<name>[A-Za-z0-9._-]{1,64})"
PLACES = dict(name=NAME, version=r"(?:/versions/(?P<version>[0-9]{1,9}))?", slash="/?")
MODEL = "/v2/models/{name}{version}"
BUSY = (404, 408, 413, 415, 417, 503, 504)
ROUTES = {re.compile(route.path.replace(".", r"\.").format(**PLACES)): route for route in (
    Route(["GET"], "/", Handler.page, "A page to try it", content=("text/html", {"type": "string"})),
    Route(["POST"], "/predict", Handler.predict, "Classes of an encoded image, or of a form's", BUSY, "images"),
    Route(["POST", "PUT"], "/predictions/{name}", Handler.predict,  # PUT is what curl -T sends
          "Classes of an encoded image, or of a form's", BUSY, "images"),
    Route(["GET"], "/healthz", Handler.ready, "Whether requests are welcome", (503,)),
    Route(["GET"], "/metrics", Handler.metrics, "Prometheus", content=("text/plain", {"type": "string"})),
    Route(["GET"], "/openapi.json", lambda handler, model: as_json(
        openapi(handler.server.models, bool(handler.server.keys))), "This"),
    Route(["GET"], "/v2{slash}", lambda handler, model: as_json(METADATA), "The server"),
    Route(["GET"], "/v2/health/live", lambda handler, model: as_json({"live": True}), "Alive"),
    Route(["GET"], "/v2/health/ready", Handler.ready, "Ready", (503,)),
    Route(["GET"], "/v2/models/stats", Handler.model_statistics, "Statistics of all models"),
    Route(["GET"], MODEL, Handler.model_metadata, "Inputs and outputs", (404,)),
    Route(["GET"], MODEL + "/ready", Handler.ready, "Ready", (404, 503)),
    Route(["GET"], MODEL + "/config", Handler.model_configuration, "Triton's configuration", (404,)),
    Route(["GET"], MODEL + "/stats", Handler.model_statistics, "Statistics", (404,)),
    Route(["POST"], MODEL + "/infer", Handler.v2_infer, "Inference", BUSY, "tensors"),
    Route(["POST"], "/v2/repository/index", lambda handler, model: as_json(
              [dict(name=name, version=VERSION, state="READY", reason="") for name in handler.server.models]),
          "The models", (413,), content=("application/json", {"type": "array", "items": {"type": "object"}})))}
OPEN_PATHS = ("/", "/healthz", "/v2/health/live", "/v2/health/ready")


class Server(socketserver.ThreadingTCPServer):
    request_queue_size, daemon_threads, block_on_close, allow_reuse_address = 1024, True, False, True

    def __init__(self, args, models):
        self.args, self.models, self.draining = args, models, False
        self.gate = threading.BoundedSemaphore(os.cpu_count() or 1)  # decoders at once
        self.reading = threading.Lock()  # one large JSON at once: its objects take many times the bytes
        self.lock, self.handlers = threading.Condition(), {}
        self.answers, self.refused, self.since = Counter(), 0, time.monotonic()
        self.keys = read_keys(args.api_key_file)
        self.tls = read_tls(args)
        self.address_family = socket.AF_INET6 if ":" in args.host else socket.AF_INET
        try:
            super().__init__((args.host, args.port), Handler)
        except OSError as error:
            raise UserError(f"--host {args.host} --port {args.port}: {error.strerror or error}", 2) from error

    def server_bind(self):
        if self.args.processes > 1:  # allow_reuse_port does it from Python 3.11 on
            self.socket.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEPORT, 1)
        super().server_bind()

    def process_request(self, request, client_address):
        with self.lock:
            if room := len(self.handlers) < self.args.max_connections:
                self.handlers[request] = None
        if room:
            with contextlib.suppress(RuntimeError):  # no more threads
                return super().process_request(request, client_address)
        self.refused += 1
        body = b'{"error": "too many connections"}'
        with contextlib.suppress(OSError):
            request.setblocking(False)
            if not self.tls:  # whose clients would take plain text for damage
                request.send(b"HTTP/1.1 503 Service Unavailable\r\nContent-Type: application/json\r\n"
                             b"Retry-After: 1\r\nConnection: close\r\nContent-Length: %d\r\n\r\n%s"
                             % (len(body), body))
        self.shutdown_request(request)

    def shutdown_request(self, request):
        super().shutdown_request(request)
        with self.lock:
            self.handlers.pop(request, None)
            self.lock.notify_all()

    def handle_error(self, request, client_address):
        if not isinstance(sys.exc_info()[1], (OSError, EOFError)):
            say(traceback.format_exc())

    def drain(self):
        """Not ready from now on; what is asked within --drain-delay is answered still, then what has begun is."""
        self.draining = True
        time.sleep(self.args.drain_delay)
        self.shutdown()
        self.socket.setblocking(False)
        with contextlib.suppress(OSError):  # until nobody is left who has connected already
            for _ in range(self.request_queue_size):
                self.process_request(*self.get_request())
        self.server_close()  # who comes now is refused at once, and may ask another server
        with self.lock:
            # what a new connection asks may be on its way
            self.lock.wait_for(lambda: all(handler and handler.begun for handler in self.handlers.values()), 1)
            for request, handler in self.handlers.items():
                if handler is None or handler.idle:
                    with contextlib.suppress(OSError):  # not SSLSocket.shutdown, after which it would say no goodbye
                        socket.socket.shutdown(handler.connection if handler else request, socket.SHUT_RD)
            self.lock.wait_for(lambda: not self.handlers, self.args.drain_timeout)


def read_keys(path):
    """--api-key-file: a key per line -> list of bytes"""
    if path is None:
        return []
    try:
        with open(path, "rb") as f:
            lines = f.read().removeprefix(codecs.BOM_UTF8).splitlines()
    except OSError as error:
        raise UserError(f"--api-key-file {path}: {error.strerror}") from error
    keys = [line.strip() for line in lines if line.strip()]
    if not keys:
        raise UserError(f"--api-key-file {path}: holds no key")
    if not all(FIELD.fullmatch(b"X-API-Key:" + key) for key in keys):
        raise UserError(f"--api-key-file {path}: holds what no header can, as UTF-16 does")
    return keys


def read_tls(args):
    if args.tls_cert is None:
        return None

    def refuse():  # instead of asking the terminal
        raise UserError(f"--tls-key {args.tls_key}: is encrypted; a server needs one without a pass phrase")
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    # requests say how long they are; and drain()'s end of an idle connection is no error that would forbid a goodbye
    context.options |= getattr(ssl, "OP_IGNORE_UNEXPECTED_EOF", 0)
    try:
        context.load_cert_chain(args.tls_cert, args.tls_key, refuse)
    except (OSError, ssl.SSLError) as error:
        raise UserError(f"--tls-cert {args.tls_cert}, --tls-key {args.tls_key}: "
                        f"{getattr(error, 'strerror', None) or error}") from error
    return context


# ------------------------------------------------------------------------------------------------------------- main

def get_args_parser():
    p = argparse.ArgumentParser(prog="serve.py", description="Answer over HTTP with the networks of checkpoints.",
                                formatter_class=Help)
    g = add_model_args(p)
    g.add_argument("--model", action="append", default=[], metavar="NAME=FILE",
                   help="serve FILE under this name; may be given several times (default: resnet50 alone)")
    g.add_argument("--amp-dtype", choices=("float32", "bfloat16"), default="float32",
                   help="in which float ResNet-50s compute")
    g.add_argument("--device", "--devices", dest="devices", metavar="A[,B...]",
                   type=lambda text: [device_name(name) for name in text.split(",")],
                   default="cuda" if torch.cuda.device_count() else "cpu",  # is_available() would spoil CUDA for forks
                   help="several: each holds its share of every network, stage after stage")
    g.add_argument("--threads", type=between(1, 1024), help="of the CPU for a batch; default: one per core")
    g.add_argument("--full-decode", action="store_true",
                   help="decode JPEGs whole, even where a half, a quarter or an eighth of their size has twice the "
                        "short side that the network resizes to")
    g.add_argument("--exif", action="store_true",
                   help="turn images as their orientation tags say, even where training did not")
    g = p.add_argument_group("address")
    g.add_argument("--host", default="127.0.0.1", help="0.0.0.0 for all interfaces")
    g.add_argument("--port", type=between(0, 65535), default=8000, help="0: any that is free")
    g.add_argument("--processes", type=between(1, 256), default=1, metavar="N", help="share the port between so many")
    g.add_argument("--api-key-file", metavar="FILE", help="a key per line; requests must carry one")
    g.add_argument("--tls-cert", metavar="FILE")
    g.add_argument("--tls-key", metavar="FILE")
    g = p.add_argument_group("batches")
    g.add_argument("--max-batch", type=between(1, 1024), default=32, metavar="N")
    g.add_argument("--max-delay-ms", type=between(0.0, 1e4, float), default=2.0, metavar="MS",
                   help="how long a batch waits for requests that are being decoded")
    g.add_argument("--max-queue", type=between(1, 10 ** 6), default=256, metavar="N", help="images; 503 beyond")
    g.add_argument("--timeout-ms", type=between(1, 10 ** 7), default=10000, metavar="MS",
                   help="of a request, at most; its header X-Request-Timeout-Ms may say less")
    g = p.add_argument_group("limits")
    g.add_argument("--max-body", type=between(1024, 2 ** 40), default=64 << 20, metavar="BYTES",
                   help="of a request, decompressed too")
    g.add_argument("--max-pixels", type=between(1, 10 ** 9), default=50_000_000, metavar="N", help="of an image")
    g.add_argument("--max-images", type=between(1, 10 ** 4), default=64, metavar="N", help="in a request")
    g.add_argument("--max-connections", type=between(1, 10 ** 5), default=1024, metavar="N")
    g.add_argument("--head-timeout", type=between(0.1, 3600.0, float), default=10.0, metavar="S",
                   help="for a request's headers, and for a pause in its body; this may take a second more for every "
                        "64 KiB")
    g.add_argument("--idle-timeout", type=between(0.1, 3600.0, float), default=75.0, metavar="S",
                   help="between a connection's requests")
    g = p.add_argument_group("life")
    g.add_argument("--drain-delay", type=between(0.0, 600.0, float), default=0.0, metavar="S",
                   help="go on answering after SIGTERM, not ready, until proxies have noticed")
    g.add_argument("--drain-timeout", type=between(0.0, 3600.0, float), default=30.0, metavar="S")
    g.add_argument("--access-log", action=argparse.BooleanOptionalAction, default=True, help="a JSON line per answer")
    return p


def open_models(args):
    """-> {name: Model}"""
    named = {}
    for item in args.model:
        name, _, path = item.partition("=")
        if not re.fullmatch(NAME, name) or not path or name in named or name == "stats":
            raise UserError(f"--model {item}: expected NAME=FILE, each name once, of letters, digits, . _ and -", 2)
        named[name] = path
    if named and (args.checkpoint or args.weights):
        raise UserError("--model excludes --checkpoint and --weights", 2)
    device = Turns()  # all have the same --devices
    models = {name: Model(name, args, path, device)
              for name, path in (named or {"resnet50": args.checkpoint}).items()}
    if args.amp_dtype != "float32" and not any(
            hasattr(net, "dtype") for model in models.values() for net in members(model.network.net)):
        raise UserError(f"--amp-dtype {args.amp_dtype}: no network here is a float ResNet-50", 2)
    return models


def check_args(args):
    if bool(args.tls_cert) != bool(args.tls_key):
        raise UserError("--tls-cert and --tls-key go together", 2)
    if args.processes > 1 and args.port == 0:
        raise UserError("--processes needs a --port", 2)
    if not args.host:
        raise UserError("--host is empty; 0.0.0.0 or :: is every interface", 2)
    Image.MAX_IMAGE_PIXELS = args.max_pixels  # Pillow's own comes first; a WebP that is open holds its pixels already
    spare = 64  # files beside the connections: the listening socket, checkpoints, what Python opens
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    if soft < args.max_connections + spare:
        with contextlib.suppress(OSError, ValueError):
            resource.setrlimit(resource.RLIMIT_NOFILE, (min(args.max_connections + spare, hard), hard))
        if 0 <= (files := resource.getrlimit(resource.RLIMIT_NOFILE)[0]) < args.max_connections + spare:
            args.max_connections = max(1, files - spare)
            say(f"only {args.max_connections} connections: the system allows {files} open files (ulimit -n)")


M_ARENA_MAX = -8  # malloc.h
SIGNALS = (signal.SIGTERM, signal.SIGINT, signal.SIGHUP)


def caught(number, frame):
    """The handler of a signal that arriving() tells of"""


@contextlib.contextmanager
def arriving(numbers):
    """-> iterator over these signals, and others caught() within, as they arrive. Python runs a handler between two of
    the main thread's steps, so one that comes right before a step that waits would wait too; a byte on a socket does
    not."""
    reader, writer = socket.socketpair()
    writer.setblocking(False)
    signal.set_wakeup_fd(writer.fileno())
    before = {number: signal.getsignal(number) for number in (*SIGNALS, signal.SIGCHLD)}
    for number in numbers:
        signal.signal(number, caught)
    with reader, writer:
        try:
            yield iter(lambda: reader.recv(1)[0], None)
        finally:  # or signals would be written into whatever file gets the socket's number
            signal.set_wakeup_fd(-1)
            for number, handler in before.items():
                signal.signal(number, handler)


def settle():
    """Takes what is there from Python's garbage collector, which otherwise stops every thread for a tenth of a second
    now and then to look through PyTorch's 300,000 objects. Networks that were replaced are let go first."""
    gc.unfreeze()
    gc.collect()
    gc.freeze()


def reload(server, hang_up):
    """Reads what has changed when hang_up is set, and once more where it is again meanwhile"""
    while hang_up.wait():
        hang_up.clear()
        try:
            server.keys, server.tls = read_keys(server.args.api_key_file), read_tls(server.args)
        except UserError as error:
            say(f"NOT reloaded: {error}")
        for model in server.models.values():
            if server.draining:
                return
            model.reload()
        hang_up.wait(server.args.timeout_ms / 1e3)  # until what began with an old network has let it go
        settle()


def serve(args, up=None):
    """One process, until SIGTERM or SIGINT. up: memory whose first byte becomes 1 when it is ready"""
    # glibc gives threads heaps of their own, in which images leave holes of all sizes: memory would not stay flat
    with contextlib.suppress(OSError, AttributeError):
        ctypes.CDLL(None).mallopt(M_ARENA_MAX, 1)
    with arriving([signal.SIGHUP]) as signals:  # files that change after they were read are read again
        for device in args.devices:  # here, as CUDA that a parent has started does not survive a fork
            find_device(device)
        if args.threads or args.processes > 1:
            torch.set_num_threads(args.threads or max(1, (os.cpu_count() or 1) // args.processes))
        models = open_models(args)
        settle()
        server = Server(args, models)
        for number in (signal.SIGTERM, signal.SIGINT):  # until here they end it at once
            signal.signal(number, caught)
        threading.Thread(target=server.serve_forever, kwargs=dict(poll_interval=0.1), daemon=True).start()
        host, port = server.server_address[:2]
        paths = {name: model.network.path for name, model in models.items()}
        say(json.dumps(dict(host=host, port=port, pid=os.getpid(), models=paths)), "stdout")
        if up:
            up[0] = 1
        hang_up = threading.Event()
        threading.Thread(target=reload, args=(server, hang_up), daemon=True).start()
        while next(signals) == signal.SIGHUP:
            hang_up.set()
        server.drain()


def child(args, up, pause):
    """One of --processes. It puts away its parent's ways before a signal gets through, and begins after `pause`
    seconds."""
    with contextlib.suppress(OSError, AttributeError):
        ctypes.CDLL(None).prctl(1, int(signal.SIGTERM))  # PR_SET_PDEATHSIG: nobody serves on without the parent
    signal.set_wakeup_fd(-1)
    for number in (signal.SIGTERM, signal.SIGINT, signal.SIGCHLD):
        signal.signal(number, signal.SIG_DFL)
    signal.signal(signal.SIGHUP, signal.SIG_IGN)  # it has read nothing yet
    signal.pthread_sigmask(signal.SIG_UNBLOCK, SIGNALS)
    time.sleep(pause)
    run_script(functools.partial(serve, up=up), args, "serve.py")


def supervise(args):
    """--processes: each child listens on the port itself; one that dies is replaced. Signals go on to all."""
    children, stopping, pause, died, up = [], False, 0, -math.inf, mmap.mmap(-1, 1)

    def forward(number):
        for process in children:
            if process.exitcode is None:
                os.kill(process.pid, number)

    def spawn():
        children.append(multiprocessing.get_context("fork").Process(target=child, args=(args, up, pause)))
        signal.pthread_sigmask(signal.SIG_BLOCK, SIGNALS)
        children[-1].start()
        signal.pthread_sigmask(signal.SIG_UNBLOCK, SIGNALS)
    with socket.socket(socket.AF_INET6 if ":" in args.host else socket.AF_INET) as probe:
        probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        try:  # children share the port with whoever asks for that, also with another server's
            probe.bind((args.host, args.port))
        except OSError as error:
            raise UserError(f"--host {args.host} --port {args.port}: {error.strerror or error}", 2) from error
    with arriving((*SIGNALS, signal.SIGCHLD)) as signals:
        for _ in range(args.processes):
            spawn()
        while children:
            if (number := next(signals)) != signal.SIGCHLD:
                stopping = stopping or number != signal.SIGHUP
                forward(number)
            for process in [p for p in children if p.exitcode is not None]:
                children.remove(process)
                if stopping:
                    continue
                if process.exitcode > 0 and not up[0]:  # it could not start, nor could another
                    forward(signal.SIGTERM)
                    raise UserError(f"a process ended by itself with status {process.exitcode}", process.exitcode)
                # where each dies while it loads, for want of memory or of a file that is whole, the others shall not
                # starve of the attempts
                pause = min(2 * pause + 1, 60) if time.monotonic() - died < 2 * pause + 60 else 0
                died = time.monotonic()
                say(f"process {process.pid} died; another takes its place" + f" in {pause} s" * bool(pause))
                spawn()


def main(args):
    check_args(args)
    (supervise if args.processes > 1 else serve)(args)


if __name__ == "__main__":
    run_script(main, get_args_parser().parse_args(), "serve.py")
    os._exit(0)  # the interpreter's own end would unwind threads that are inside PyTorch, and C++ aborts at that
