"""Mutated requests and images against a running server: no answer may be a 500, none may hang, and it must live on.

  python -m tests.fuzz_serve --port 8000 --requests 100000       # a server of one's own; its memory with --pid
"""
import argparse
import contextlib
import io
import json
import random
import re
import socket
import sys
import threading
import time
from collections import Counter
from concurrent.futures import ThreadPoolExecutor

import numpy as np
from PIL import Image

ALLOWED = {200, 400, 401, 404, 405, 408, 413, 414, 415, 417, 431, 499, 501, 503, 504}
NUMBERS = [b"-1", b"0", b"1", b"255", b"256", b"4294967296", b"-9223372036854775809", b"1e400", b"1.5", b"NaN", b"true",
           b"null", b'""', b"[]", b"{}", b"9" * 400]
TOKENS = [b"\r\n", b"\n", b"\r", b"\0", b" ", b":", b";", b"--x", b"--x--", b'"', b"\\", b"{", b"}", b"[", b"]", b"%00",
          b"../", b"\xff\xd8", b"\xff\xd9", b"\xff\xc0", b"IHDR", b"IDAT", b"RIFF", b"WEBPVP8X", b"\x00\x00\xff\xff",
          b"Content-Length: 3\r\n", b"Transfer-Encoding: chunked\r\n", b"Content-Encoding: gzip\r\n",
          b"Expect: 100-continue\r\n", b"Host: y\r\n", b"Inference-Header-Content-Length: 5\r\n", b"\xc2\x80"]


def images(size=40):
    values = np.random.default_rng(0).integers(0, 256, (size, size, 3), dtype=np.uint8)
    found = []
    for kind, options in (("JPEG", {}), ("JPEG", dict(progressive=True)), ("PNG", {}), ("WEBP", {}), ("GIF", {}),
                          ("WEBP", dict(lossless=True)), ("BMP", {}), ("PNG", dict(bits=4))):
        file = io.BytesIO()
        image = Image.fromarray(values)
        (image.convert("P") if "bits" in options else image).save(file, kind, **options)
        found.append(file.getvalue())
    return found


def request(method, path, body=b"", **headers):
    lines = [f"{method} {path} HTTP/1.1", "Host: x"] + [f"{k.replace('_', '-')}: {v}" for k, v in headers.items()]
    if body or method == "POST":
        lines.append(f"Content-Length: {len(body)}")
    return "\r\n".join(lines + ["", ""]).encode() + body


def templates(model, size):
    """-> [(head, body)] of valid requests of every kind"""
    pictures, path = images(), f"/v2/models/{model}/infer"
    tensor = dict(name="pixels", shape=[1, 3, size, size], datatype="UINT8")
    values = list(range(3 * size * size))
    plain = json.dumps({"id": "a", "inputs": [{**tensor, "data": [v % 256 for v in values]}],
                        "outputs": [{"name": "logits"}]}).encode()
    tail = bytes(v % 256 for v in values)
    binary = json.dumps({"inputs": [{**tensor, "parameters": {"binary_data_size": len(tail)}}], "outputs": [
        {"name": "probabilities", "parameters": {"classification": 3, "binary_data": True}}]}).encode()
    picture = len(pictures[0]).to_bytes(4, "little") + pictures[0]
    strings = json.dumps({"inputs": [dict(name="image", shape=[1], datatype="BYTES",
                                          parameters={"binary_data_size": len(picture)})]}).encode()
    length = "Inference_Header_Content_Length"
    found = [request("POST", "/predict?topk=2", p) for p in pictures * 4]
    for p in pictures:
        part = b'--x\r\nContent-Disposition: form-data; name="image"; filename="a"\r\n\r\n' + p + b"\r\n"
        found.append(request("POST", "/predict", part * 2 + b"--x--\r\n",
                             Content_Type="multipart/form-data; boundary=x"))
        chunks = b"%x\r\n%s\r\n0\r\n\r\n" % (len(p), p)
        found.append(b"POST /predict HTTP/1.1\r\nHost: x\r\nTransfer-Encoding: chunked\r\n\r\n" + chunks)
    found += [request("POST", path, plain)] * 4 + [request("POST", path, binary + tail, **{length: len(binary)}),
                                                   request("POST", path, strings + picture, **{length: len(strings)}),
                                                   request("POST", path, tail, **{length: 0})] * 3
    found += [request("GET", p) for p in ("/", "/healthz", "/metrics", "/openapi.json", "/v2", f"/v2/models/{model}",
                                          f"/v2/models/{model}/config", "/v2/models/stats")]
    return [f.partition(b"\r\n\r\n")[::2] for f in found] + [(b"POST /v2/repository/index HTTP/1.1\r\nHost: x", b"{}")]


def mutate(data, g):
    """Bytes -> bytes with one to four changes"""
    data = bytearray(data)
    for _ in range(g.choice((1, 1, 1, 2, 4))):
        at, kind = g.randrange(len(data) + 1), g.randrange(7)
        to = min(len(data), at + g.choice((1, 1, 2, 4, 16, 200)))
        if kind == 0 and at < len(data):
            data[at] ^= 1 << g.randrange(8)
        elif kind == 1:
            del data[at:to]
        elif kind == 2:
            data[at:at] = data[at:to] * g.choice((1, 2, 50))
        elif kind == 3:
            data[at:to] = g.choice(TOKENS)
        elif kind == 4:
            data[at:at] = g.choice(TOKENS)
        elif kind == 5:
            data[at:to] = g.randbytes(to - at)
        else:
            numbers = list(re.finditer(rb"\d+", data[:100_000]))
            if numbers:
                one = g.choice(numbers)
                data[one.start():one.end()] = g.choice(NUMBERS)
    return bytes(data)


def mutated(pool, g):
    """-> a request: its body changed and the length right, or the whole of it changed, or two spliced"""
    head, body = g.choice(pool)
    kind = g.randrange(4)
    if kind < 2 and body:
        body = mutate(body, g)
        return re.sub(rb"Content-Length: \d+$", b"Content-Length: %d" % len(body), head) + b"\r\n\r\n" + body
    if kind == 2:
        return mutate(head, g) + b"\r\n\r\n" + body
    other = b"\r\n\r\n".join(g.choice(pool))
    whole = mutate(head + b"\r\n\r\n" + body, g)
    return whole[:g.randrange(len(whole) + 1)] + other[g.randrange(len(other) + 1):] if g.randrange(2) else whole


def send(port, data, timeout=20):
    """-> statuses of the answers. A server that waits for a rest is told after a moment that none will come."""
    received = b""
    with socket.create_connection(("127.0.0.1", port), timeout=0.1) as s, contextlib.suppress(ConnectionResetError,
                                                                                             BrokenPipeError):
        s.sendall(data)
        with contextlib.suppress(TimeoutError):
            received = s.recv(1 << 16)
        s.settimeout(timeout)
        s.shutdown(socket.SHUT_WR)
        while part := s.recv(1 << 16):
            received += part
    return [int(code) for code in re.findall(rb"HTTP/1\.1 (\d{3}) [A-Z][^\r\n]*\r\nDate: ", received)]


def fuzz(port, model, size, count, seed=0, threads=4):
    """-> Counter of statuses (0: closed without an answer) over `count` mutated requests, and the requests that broke
    something: [(request, why)]"""
    pool, seen, broken, lock = templates(model, size), Counter(), [], threading.Lock()
    assert all(set(send(port, b"\r\n\r\n".join(t))) <= {200, 499} for t in pool)

    def loop(k):
        g = random.Random(seed * threads + k)
        for _ in range(count // threads):
            data = mutated(pool, g)
            try:
                statuses = send(port, data)
            except OSError as error:
                statuses = [f"{type(error).__name__}: {error}"]
            with lock:
                seen.update(statuses or [0])
                if set(statuses) - ALLOWED:
                    broken.append((data, statuses))
    with ThreadPoolExecutor(threads) as workers:
        list(workers.map(loop, range(threads)))
    return seen, broken


def resident(pid):
    """Bytes of memory that a process holds"""
    with open(f"/proc/{pid}/statm") as f:
        return int(f.read().split()[1]) * 4096


def main():
    p = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    p.add_argument("--port", type=int, required=True)
    p.add_argument("--model", default="resnet50")
    p.add_argument("--size", type=int, default=224, help="pixels of the network's images")
    p.add_argument("--requests", type=int, default=100_000)
    p.add_argument("--seed", type=int, default=0)
    p.add_argument("--pid", type=int, help="of the server, to watch its memory")
    args = p.parse_args()
    total, memory, began = Counter(), [], time.monotonic()
    for part in range(10):
        seen, broken = fuzz(args.port, args.model, args.size, args.requests // 10, args.seed + part)
        total += seen
        for data, why in broken[:5]:
            print(why, data[:2000], file=sys.stderr)
        if args.pid:
            memory.append(resident(args.pid))
        print(f"{(part + 1) * 10} % in {time.monotonic() - began:.0f} s: {dict(total)}", file=sys.stderr, flush=True)
        if broken:
            sys.exit(1)
    print(json.dumps(dict(statuses={str(k): n for k, n in sorted(total.items())}, resident_bytes=memory)))


if __name__ == "__main__":
    main()
