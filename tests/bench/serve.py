"""Requests per second and latency of serve.py with JPEG uploads, against what decoding and predicting reach alone and
against the usual FastAPI + uvicorn server of the same int8 network.

  python -m tests.bench.serve                                    # two minutes
  python -m tests.bench.serve --rounds 9 --connections 64
  python -m tests.bench.serve --side 1512                        # photographs enlarged to what telephones send
  python -m tests.bench.serve --overload 60                      # and a minute at five times the rate, and slow clients

The contenders alternate, round by round, on the same images and threads, each alone while it is measured:
  offline   decoder threads and batches of 32 in one process, no HTTP: the ceiling
  ours      serve.py, closed loop: so many connections, each sends the next image when it has its answer
  fastapi   one uvicorn process, Pillow, torchvision's transforms and predict in the handler, as tutorials have it
  fastapi_float   the same with the network before quantization in plain PyTorch, which tutorials stop at
Then, at half of ours' rate, an open loop: requests leave at random times (Poisson) whatever the server does, and a
latency counts from when its request should have left. batch 1: decode and predict of one image, alone.
ratio.p99_to_latency is the open loop's 99th percentile over that, ratio.p99_to_latency_even the same with requests that
leave at even intervals, as wrk2 and perf_analyzer send them unless told otherwise; ratio.fastapi_at_equal_p99 the
highest rate found at which ours' 99th percentile is not above FastAPI's at half of its own rate, over that; stolen the
share of the CPUs' time that a virtual machine's hypervisor gave to others meanwhile: latencies are of what is left.
"""
import argparse
import importlib.util
import io
import json
import os
import queue
import random
import socket
import statistics
import subprocess
import sys
import threading
import time
from collections import Counter
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import torch
from PIL import Image

import data
import resnet50
from tests.bench.infer import SHARED, Stolen

FASTAPI = """
import io, os
import torch, uvicorn
from fastapi import FastAPI, File, UploadFile
from PIL import Image
from torchvision import transforms
from resnet50 import build_model, load_checkpoint, predict
app, path = FastAPI(), os.environ["CHECKPOINT"]
checkpoint = load_checkpoint(path)
model, classes = build_model(checkpoint, path), checkpoint["classes"]
transform = transforms.Compose([transforms.Resize(model.preprocess["resize"]),
                                transforms.CenterCrop(model.preprocess["crop"]), transforms.PILToTensor()])

@app.post("/predict")
async def classify(image: UploadFile = File(...)):
    picture = Image.open(io.BytesIO(await image.read())).convert("RGB")
    pixels = transform(picture).unsqueeze(0)
    with torch.inference_mode():
        probabilities = predict(model, pixels.contiguous(memory_format=torch.channels_last)).softmax(1)[0]
    p, i = probabilities.max(0)
    return {"class_id": int(i), "class": classes[i], "probability": float(p)}

uvicorn.run(app, port=int(os.environ["PORT"]), log_level="error")
"""


def say(text=""):
    print(text, file=sys.stderr, flush=True)


def network(folder):
    """-> paths of an int8 checkpoint and of the float one it is made from: the real weights if there, else random"""
    path, real = os.path.join(folder, "serve-int8.pt"), os.path.join(SHARED, "resnet50_v1_imagenet.pth")
    source = os.path.join(folder, "serve-float.pt")
    if not os.path.exists(path) or not os.path.exists(source):
        if os.path.exists(real):
            model = resnet50.build_model(resnet50.load_checkpoint(real), real, stride_on="1x1")
        else:
            torch.manual_seed(0)
            model = resnet50.ResNet50().eval()
        pixels = torch.randint(0, 256, (8, 3, 224, 224), dtype=torch.uint8)
        os.makedirs(folder, exist_ok=True)
        resnet50.save_checkpoint(source, model, classes=list(map(str, range(1000))))
        resnet50.save_checkpoint(path, resnet50.quantize(model, [pixels]), classes=list(map(str, range(1000))))
    return path, source


def pictures(folder, side, count=64):
    """-> encoded JPEGs: photographs where they are, else the demo set's; side: of the shorter one, else as they are"""
    root = os.path.join(SHARED, "imagenet-cc")
    if not os.path.isdir(root):
        root = data.make_demo(os.path.join(folder, "demo"), train=10, val=1)
    files = data.scan_unlabelled(root)
    found = [Path(files.path(i * len(files) // count)).read_bytes() for i in range(count)]
    return [enlarged(content, side) for content in found] if side else found


def enlarged(content, side):
    image, out = Image.open(io.BytesIO(content)).convert("RGB"), io.BytesIO()
    scale = side / min(image.size)
    image.resize([round(n * scale) for n in image.size], Image.Resampling.BICUBIC).save(out, "JPEG", quality=90)
    return out.getvalue()


def free_port():
    with socket.socket() as s:
        s.bind(("127.0.0.1", 0))
        return s.getsockname()[1]


class Client:
    """Multipart uploads of the pictures to a port"""

    def __init__(self, port, images):
        self.port, self.requests = port, []
        for image in images:
            body = b'--x\r\nContent-Disposition: form-data; name="image"; filename="a.jpg"\r\n' \
                b"Content-Type: image/jpeg\r\n\r\n" + image + b"\r\n--x--\r\n"
            self.requests.append(b"POST /predict HTTP/1.1\r\nHost: x\r\nContent-Length: %d\r\n" % len(body)
                                 + b"Content-Type: multipart/form-data; boundary=x\r\n\r\n" + body)

    def connect(self):
        s = socket.create_connection(("127.0.0.1", self.port), timeout=60)
        s.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, True)
        return s

    def ask(self, s, i):
        """-> the answer's status"""
        s.sendall(self.requests[i % len(self.requests)])
        received = b""
        while b"\r\n\r\n" not in received:
            part = s.recv(65536)
            if not part:
                raise ConnectionResetError("closed")
            received += part
        head, _, body = received.partition(b"\r\n\r\n")
        size = int(head.lower().partition(b"content-length:")[2].split(b"\r\n")[0])
        while len(body) < size:
            body += s.recv(65536)
        return int(head.split(b" ", 2)[1])

    def closed(self, seconds, connections):
        """-> requests per second"""
        counts, until, start = [0] * connections, time.monotonic() + seconds, threading.Barrier(connections)

        def loop(k):
            with self.connect() as s:
                start.wait()
                while time.monotonic() < until:
                    assert self.ask(s, k + counts[k] * connections) == 200
                    counts[k] += 1
        began = time.monotonic()
        run_threads(loop, connections)
        return sum(counts) / (time.monotonic() - began)

    def open(self, seconds, rate, connections=128, even=False):
        """-> [(status, seconds since the request was due)]"""
        due, found, generator, at = queue.SimpleQueue(), [], random.Random(0), 0.0
        began = time.monotonic() + 0.5
        while (at := at + (1 / rate if even else generator.expovariate(rate))) < seconds:
            due.put(at)

        def loop(k):
            s = self.connect()
            while True:
                try:
                    at = due.get_nowait()
                except queue.Empty:
                    return s.close()
                time.sleep(max(0.0, began + at - time.monotonic()))
                try:
                    status = self.ask(s, int(at * 1e3))
                except ConnectionError:  # it was idle for longer than the server keeps it
                    s = self.connect()
                    status = self.ask(s, int(at * 1e3))
                found.append((status, time.monotonic() - began - at))
        run_threads(loop, connections)
        return found

    def slow(self, count):
        """-> sockets of so many clients that began to upload and do not go on"""
        crowd = [self.connect() for _ in range(count)]
        for s in crowd:
            s.sendall(self.requests[0][:400])
        return crowd


def percentile(answers, share=0.99):
    """Seconds within which that share of the answers came; all must be a 200"""
    assert {status for status, _ in answers} == {200}
    return sorted(seconds for _, seconds in answers)[int(len(answers) * share)]


def run_threads(function, count):
    with ThreadPoolExecutor(count) as pool:
        list(pool.map(function, range(count)))


class Offline:
    """Decoder threads and batches, as many of each as the server has"""

    def __init__(self, path, images):
        self.model = resnet50.build_model(resnet50.load_checkpoint(path), path)
        self.transform, self.images = data.eval_transform(self.model.preprocess), images

    def decode(self, i):
        return self.transform.encoded(self.images[i % len(self.images)], gap=2)  # as the server

    def predict(self, pixels):
        with torch.inference_mode():
            return resnet50.predict(self.model, torch.stack(pixels).permute(0, 3, 1, 2))

    def rate(self, seconds, batch=32):
        decoded, until, done = queue.Queue(2 * batch), time.monotonic() + seconds, 0

        def feed(k):
            i = k
            while time.monotonic() < until:
                decoded.put(self.decode(i))
                i += threads
        threads = os.cpu_count() or 1
        workers = [threading.Thread(target=feed, args=(k,), daemon=True) for k in range(threads)]
        began = time.monotonic()
        for w in workers:
            w.start()
        while time.monotonic() < until:
            self.predict([decoded.get() for _ in range(batch)])
            done += batch
        rate = done / (time.monotonic() - began)
        while any(w.is_alive() for w in workers):  # they may wait for room
            while not decoded.empty():
                decoded.get()
            workers[0].join(0.01)
        return rate

    def latency(self, count=30):
        """Median seconds of one image; of decoding alone; of predicting alone"""
        parts = []
        for i in range(count):
            begin = time.monotonic()
            pixels = self.decode(i)
            middle = time.monotonic()
            self.predict([pixels])
            parts.append((time.monotonic() - begin, middle - begin, time.monotonic() - middle))
        return [statistics.median(column) for column in zip(*parts)]


def start(command, port, **env):
    process = subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, env={**os.environ, **env})
    for _ in range(600):
        if process.poll() is not None:
            raise RuntimeError(process.stderr.read().decode()[-500:])
        try:
            socket.create_connection(("127.0.0.1", port), timeout=1).close()
            break
        except OSError:
            time.sleep(0.1)
    threading.Thread(target=process.stderr.read, daemon=True).start()
    return process


class Contenders:
    """The servers, each in a process of its own with a client, and what runs without HTTP"""

    def __init__(self, side):
        folder = os.path.join("runs", "bench")
        path, source = network(folder)
        self.images, self.processes, self.clients = pictures(folder, side), [], {}
        self.offline = Offline(path, self.images)
        try:
            self.add("ours", ["serve.py", "--checkpoint", path, "--no-access-log"])
            if all(importlib.util.find_spec(name) for name in ("fastapi", "uvicorn")):
                self.add("fastapi", ["-c", FASTAPI], CHECKPOINT=path)
                self.add("fastapi_float", ["-c", FASTAPI], CHECKPOINT=source)
            else:
                say("no fastapi and uvicorn: pip install -r tests/requirements.txt")
        except BaseException:
            self.stop()
            raise

    def add(self, name, command, **env):
        port = free_port()
        more = ["--port", str(port)] if name == "ours" else []
        self.processes.append(start([sys.executable, *command, *more], port, PORT=str(port), **env))
        self.clients[name] = Client(port, self.images)

    def stop(self):
        for process in self.processes:
            process.terminate()


def closed_loops(contenders, args):
    """-> {name: [requests per second of each round]}"""
    offline, rates = contenders.offline, {}
    offline.predict([offline.decode(0)] * 32)
    for client in contenders.clients.values():
        client.closed(1, 4)
    for _ in range(args.rounds):
        rates.setdefault("offline", []).append(offline.rate(args.seconds))
        for name, client in contenders.clients.items():
            rates.setdefault(name, []).append(client.closed(args.seconds, args.connections))
    return rates


def open_loops(contenders, args):
    """-> of each round [batch 1's latency and its parts], [median, 99th percentile], the latter at even intervals. The
    machine's speed drifts: each round has its own batch 1 and its own rate, half of what a closed loop reaches."""
    latencies, random_times, even_times, ours = [], [], [], contenders.clients["ours"]
    for _ in range(args.rounds):
        latencies.append(contenders.offline.latency())
        rate = ours.closed(args.seconds, args.connections) / 2
        answers = ours.open(2 * args.seconds, rate)
        random_times.append([percentile(answers, q) for q in (0.5, 0.99)])
        even_times.append(percentile(ours.open(2 * args.seconds, rate, even=True)))
    return latencies, random_times, even_times


def at_equal_p99(clients, rates, args):
    """-> the highest rate found, to 3 % of what ours reaches, at which ours answers as soon as FastAPI at half of its
    own rate, over that. Both are measured anew in each step."""
    half, low, high = statistics.median(rates["fastapi"]) / 2, 0.0, statistics.median(rates["ours"])
    for _ in range(5):
        rate = (low + high) / 2
        limit = percentile(clients["fastapi"].open(2 * args.seconds, half))
        if percentile(clients["ours"].open(2 * args.seconds, rate)) <= limit:
            low = rate
        else:
            high = rate
    return low / half


def crowded(ours, rate, args):
    """-> figures of args.overload seconds at five times the rate, and of clients beside 200 that are stuck"""
    answers = ours.open(args.overload, 5 * rate, connections=400)
    refused = sorted(seconds for status, seconds in answers if status == 503)
    good, others = sum(status == 200 for status, _ in answers) / args.overload, []
    for _ in range(args.rounds):
        alone = ours.closed(args.seconds, args.connections)
        stuck = ours.slow(200)
        others.append(ours.closed(args.seconds, args.connections) / alone)
        for s in stuck:
            s.close()
    return {"overload.statuses": dict(Counter(str(status) for status, _ in answers)),
            "overload.refused_ms": round(1e3 * refused[len(refused) // 2], 2) if refused else None,
            "ratio.overload_goodput": round(good / rate, 3),
            "ratio.beside_200_slow_clients": round(statistics.median(others), 3)}


def median_ratio(above, below):
    return round(statistics.median(a / b for a, b in zip(above, below)), 3)


def main():
    p = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    p.add_argument("--rounds", type=int, default=5)
    p.add_argument("--seconds", type=float, default=5.0, help="of each contender in a round")
    p.add_argument("--connections", type=int, default=48)
    p.add_argument("--side", type=int, metavar="PIXELS", help="enlarge the photographs to this shorter side")
    p.add_argument("--overload", type=float, default=0.0, metavar="S", help="seconds at five times the rate")
    args = p.parse_args()
    contenders, stolen = Contenders(args.side), Stolen()
    try:
        rates = closed_loops(contenders, args)
        median = {name: statistics.median(values) for name, values in rates.items()}
        latencies, random_times, even_times = open_loops(contenders, args)
        equal = at_equal_p99(contenders.clients, rates, args) if "fastapi" in rates else None
        crowd = crowded(contenders.clients["ours"], median["ours"], args) if args.overload else {}
    finally:
        contenders.stop()
    alone = [one for one, _, _ in latencies]
    result = {"requests_per_second": {name: round(rate, 2) for name, rate in median.items()},
              "latency_ms": dict(zip(("batch_1", "decode", "predict"),
                                     (round(1e3 * statistics.median(c), 2) for c in zip(*latencies)))),
              "open_loop_ms": dict(zip(("p50", "p99"),
                                       (round(1e3 * statistics.median(c), 2) for c in zip(*random_times)))),
              "ratio.offline": median_ratio(rates["ours"], rates["offline"]),
              "ratio.p99_to_latency": median_ratio([p99 for _, p99 in random_times], alone),
              "ratio.p99_to_latency_even": median_ratio(even_times, alone), "stolen": stolen.share()}
    if equal is not None:
        for name in ("fastapi", "fastapi_float"):
            result[f"ratio.{name}"] = median_ratio(rates["ours"], rates[name])
        result["ratio.fastapi_at_equal_p99"] = round(equal, 3)
    result.update(crowd)
    say(f"{len(contenders.images)} JPEGs, {args.connections} connections, {args.rounds} rounds, "
        f"{resnet50.environment()}")
    for name, values in rates.items():
        say(f"{name:10}{median[name]:10.1f} requests/s  [{min(values):.1f}, {max(values):.1f}]")
    print(json.dumps(result))


if __name__ == "__main__":
    main()
