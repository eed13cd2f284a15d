"""serve.py: real clients where they are installed, the wire's odd corners by hand, answers against predict()."""
import asyncio
import concurrent.futures
import contextlib
import fcntl
import gc
import gzip
import http.client
import io
import json
import math
import multiprocessing
import os
import platform
import pwd
import re
import resource
import shutil
import signal
import socket
import ssl
import struct
import subprocess
import sys
import threading
import time
import types
import weakref
import zlib

import numpy as np
import pytest
import torch
from PIL import Image

import compress
import data
import resnet50
import serve
from csrc import graphs
from tests.bench.serve import free_port
from tests.conftest import ROOT
from tests.fuzz_serve import fuzz, resident
from tests.test_int8 import build, photographs

CLASSES = ["ant", "bee, wasp", "cat", "dög", "eel", "fox: red", "gnu"]
STARTED = []
LIMITS = ("--max-body", 300_000, "--max-pixels", 250_000, "--head-timeout", 1, "--idle-timeout", 5, "--max-images", 8)


def start(*args, wait=True):
    """-> (process, port) of a server that is ready"""
    command = [sys.executable, "serve.py", "--port", "0", "--device", "cpu", *map(str, args)]
    process = subprocess.Popen(command, cwd=ROOT, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True,
                               env={**os.environ, "OMP_NUM_THREADS": "1"})
    STARTED.append(process)
    if not wait:
        return process
    line = process.stdout.readline()
    assert line, process.stderr.read()
    log = []  # read all along, or a full pipe would stop the server
    reader = threading.Thread(target=lambda: log.extend(process.stderr), daemon=True)
    reader.start()
    process.log, process.reader = log, reader
    return process, json.loads(line)["port"]


@pytest.fixture(scope="module", autouse=True)
def no_orphans():
    yield
    for process in STARTED:
        process.kill()


def stop(process):
    process.send_signal(signal.SIGTERM)
    assert process.wait(20) == 0, process.log
    process.reader.join(5)


@pytest.fixture(scope="module")
def networks(tmp_path_factory):
    """{name: path} of a float and an int8 network for 32 pixels"""
    folder, model = tmp_path_factory.mktemp("networks"), build("plain")
    model.preprocess.update(resize=40, crop=32)
    net = compress.post_training(model, [photographs(4, 32, 32)])
    paths = {name: str(folder / f"{name}.pt") for name in ("float", "int8")}
    for path, m in zip(paths.values(), (model, net)):
        resnet50.save_checkpoint(path, m, classes=CLASSES)
    return paths


@pytest.fixture(scope="module")
def server(networks):
    process, port = start(*(f"--model={name}={path}" for name, path in networks.items()), *LIMITS)
    yield port
    stop(process)
    entries = [json.loads(line) for line in process.log if line.startswith("{")]
    assert entries and not [line for line in process.log if "Traceback" in line], process.log
    assert not [e for e in entries if e["status"] == 500 or len(e["path"]) > 200]


@pytest.fixture(scope="module")
def net(networks):
    return resnet50.build_model(resnet50.load_checkpoint(networks["float"]), "float")


def picture(kind="PNG", size=(60, 45), seed=0, **options):
    values = np.random.default_rng(seed).integers(0, 256, (size[1] // 5, size[0] // 5, 3), dtype=np.uint8)
    file = io.BytesIO()
    Image.fromarray(values).resize(size).save(file, kind, **options)
    return file.getvalue()


def with_scans(count):
    """A progressive JPEG whose last scan comes so often that it has `count`"""
    encoded = picture("JPEG", progressive=True)
    begins = [m.start() for m in re.finditer(b"\xff\xda", encoded)]
    return encoded[:-2] + encoded[begins[-1]:-2] * (count - len(begins)) + encoded[-2:]


def expected(net, *encoded):
    transform = data.eval_transform(net.preprocess)
    pixels = torch.stack([transform(data.decode(e)).permute(2, 0, 1) for e in encoded])
    with torch.no_grad():
        return resnet50.predict(net, pixels.contiguous(memory_format=torch.channels_last))


def ask(port, method, path, body=None, **headers):
    """-> (status, headers, body) over a connection of its own"""
    connection = http.client.HTTPConnection("127.0.0.1", port, timeout=20)
    connection.request(method, path, body, {k.replace("_", "-"): v for k, v in headers.items()})
    answer = connection.getresponse()
    result = answer.status, answer.headers, answer.read()
    connection.close()
    return result


def raw(port, text, wait=10, more=()):
    """Bytes on the wire -> all that comes back until the server closes, or for a whole answer"""
    with socket.create_connection(("127.0.0.1", port), timeout=wait) as s:
        s.sendall(text)
        for part in more:
            s.sendall(part)
        received = b""
        while part := s.recv(65536):
            received += part
        return received


def status_of(answer):
    """The only answer's status; its body must be JSON with an error if it is none of success"""
    head, _, body = answer.partition(b"\r\n\r\n")
    status = int(head.split()[1])
    assert status < 400 or json.loads(body)["error"], answer
    return status


def form(*files, name="image"):
    head = f'--x\r\nContent-Disposition: form-data; name="{name}"; filename="a.png"\r\n\r\n'.encode()
    headers = {"Content_Type": "multipart/form-data; boundary=x"}
    return b"".join(head + f + b"\r\n" for f in files) + b"--x--\r\n", headers


# --------------------------------------------------------------------------------------------------- answers

@pytest.mark.parametrize("kind, options", [("PNG", {}), ("JPEG", dict(quality=90)), ("WEBP", dict(lossless=True)),
                                           ("BMP", {}), ("GIF", {})])
def test_predict_says_what_the_network_says(server, net, kind, options):
    encoded = picture(kind, **options)
    wanted = expected(net, encoded).softmax(1)[0]
    body, headers = form(encoded)
    for method, path, sent, more in (("POST", "/predict?topk=3", body, headers),
                                     ("POST", "/predict?topk=3", encoded, {}),
                                     ("PUT", "/predictions/float?topk=3", encoded, {})):
        status, _, answer = ask(server, method, path, sent, **more)
        found = json.loads(answer)
        assert status == 200 and found["model"] == "float" and len(found["top"]) == 3
        assert [t["class_id"] for t in found["top"]] == wanted.topk(3).indices.tolist()
        assert all(abs(t["probability"] - wanted[t["class_id"]]) < 2e-5 for t in found["top"])
        times = found["timings"]
        assert found["class"] == CLASSES[found["class_id"]] and times.pop("batch") >= 1
        assert sum(times.values()) < 2 * times["total_ms"] + 0.01  # which is that of the others, and more
    assert json.loads(ask(server, "POST", "/predictions/int8", encoded)[2])["model"] == "int8"


def test_float_networks_in_bfloat16(networks, net):
    process, port = start("--checkpoint", networks["float"], "--amp-dtype", "bfloat16")
    images = [picture(seed=s) for s in range(4)]
    body, headers = form(*images)
    found = json.loads(ask(port, "POST", "/predict?topk=7", body, **headers)[2])["predictions"]
    wanted = expected(resnet50.fuse(net, torch.bfloat16), *images).softmax(1)
    for probabilities, answer in zip(wanted, found):
        assert all(abs(t["probability"] - probabilities[t["class_id"]]) < 1e-3 for t in answer["top"])
    assert (wanted - expected(net, *images).softmax(1)).abs().max() > 1e-4  # bfloat16 can be told apart
    stop(process)
    assert any("bfloat16, 32 pixels" in line for line in process.log) and '"images": 4' in process.log[-1]


def test_amp_dtype_that_no_network_takes_is_refused(networks):
    def opened(*flags):
        return serve.open_models(serve.get_args_parser().parse_args(
            ["--device", "cpu", "--max-batch", "2", "--amp-dtype", "bfloat16", *flags]))
    with pytest.raises(resnet50.UserError, match="--amp-dtype bfloat16: no network") as caught:
        opened("--checkpoint", networks["int8"])
    assert caught.value.code == 2
    assert len(opened(*(f"--model={name}={path}" for name, path in networks.items()))) == 2


def test_several_images_in_one_form(server, net):
    images = [picture(seed=s) for s in range(3)]
    body, headers = form(*images)
    found = json.loads(ask(server, "POST", "/predict", body, **headers)[2])["predictions"]
    assert [f["class_id"] for f in found] == expected(net, *images).argmax(1).tolist()


def test_many_at_once_get_their_own_answers(server, net):
    images = [picture(seed=s, size=(50, 50)) for s in range(24)]
    with concurrent.futures.ThreadPoolExecutor(24) as pool:
        found = list(pool.map(lambda i: json.loads(ask(server, "POST", "/predict?topk=7", i)[2]), images))
    for logits, answer in zip(expected(net, *images).softmax(1), found):
        assert all(abs(t["probability"] - logits[t["class_id"]]) < 2e-5 for t in answer["top"])
    assert max(answer["timings"]["batch"] for answer in found) > 1
    stats = json.loads(ask(server, "GET", "/v2/models/float/stats")[2])["model_stats"][0]
    assert abs(stats["last_inference"] / 1e3 - time.time()) < 600
    assert stats["inference_count"] >= 24 and stats["execution_count"] < stats["inference_count"]
    assert sum(b["batch_size"] * b["compute_infer"]["count"] for b in stats["batch_stats"]) == stats["inference_count"]


def test_pages_and_descriptions(server):
    for path, kind in (("/", "text/html"), ("/healthz", "application/json"), ("/openapi.json", "application/json"),
                       ("/metrics", "text/plain"), ("/v2", "application/json"), ("/v2/", "application/json"),
                       ("/v2/models/stats", "application/json"), ("/v2/models/int8/versions/1", "application/json")):
        status, headers, body = ask(server, "GET", path)
        assert status == 200 and headers["Content-Type"].startswith(kind) and body, path
        assert headers["X-Content-Type-Options"] == "nosniff"
        assert path != "/" or headers["Content-Security-Policy"].startswith("default-src 'none'")
        status, headers, nothing = ask(server, "HEAD", path)
        assert status == 200 and nothing == b"" and int(headers["Content-Length"]) > 0
    assert raw(server, b"HEAD / HTTP/1.1\r\nHost: x\r\nConnection: close\r\n\r\n").endswith(b"\r\n\r\n")
    stats = json.loads(ask(server, "GET", "/v2/models/stats")[2])["model_stats"]
    assert [m["name"] for m in stats] == ["float", "int8"]
    assert [m["name"] for m in json.loads(ask(server, "GET", "/v2/models/int8/stats")[2])["model_stats"]] == ["int8"]
    config = json.loads(ask(server, "GET", "/v2/models/int8/config")[2])
    assert config["max_batch_size"] == 8 and config["dynamic_batching"] == {"max_queue_delay_microseconds": 2000}
    document = json.loads(ask(server, "GET", "/openapi.json")[2])
    described = document["paths"]
    assert len(described) == 16 and "security" not in document
    answers = described["/v2/models/{name}/infer"]["post"]["responses"]["200"]["content"]
    assert list(answers) == ["application/json", "application/octet-stream"]
    assert ask(server, "GET", "/")[2].count(b"http://") == 0  # no outside resource
    assert json.loads(ask(server, "GET", "/v2/health/ready")[2]) == {"live": True, "ready": True}
    assert json.loads(ask(server, "GET", "/v2/models/int8/ready")[2]) == {"name": "int8", "ready": True}


def test_schemathesis(server, tmp_path):
    """Requests drawn from /openapi.json, right ones and wrong ones, one after the other. Not asked: that what fits the
    schema is accepted; no schema says which bytes are a picture."""
    pytest.importorskip("schemathesis")
    done = subprocess.run(
        [os.path.join(os.path.dirname(sys.executable), "schemathesis"), "run", f"http://127.0.0.1:{server}/openapi.json",
         "-n", "15", "--seed", "1", "--continue-on-failure", "--exclude-checks", "positive_data_acceptance"],
        cwd=tmp_path, capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stdout[-5000:] + done.stderr[-1000:]


def test_metrics_are_prometheus(server):
    ask(server, "POST", "/predict", picture())
    text = ask(server, "GET", "/metrics")[2].decode()
    for line in text.splitlines():
        assert re.fullmatch(r'# (HELP|TYPE) \w+ .+|\w+(\{(\w+="[^"]*",?)+\})? [0-9.e+-]+', line), line
    buckets = [int(n) for n in re.findall(r'request_seconds_bucket\{model="float",le="[^"]+"\} (\d+)', text)]
    count = int(re.search(r'request_seconds_count\{model="float"\} (\d+)', text)[1])
    assert buckets == sorted(buckets) and buckets[-1] == count > 0
    assert re.search(r'batch_size_bucket\{model="float",le="1"\} [1-9]', text)  # bounds are of their buckets


# ------------------------------------------------------------------------------------- Open Inference Protocol

def v2(shape, kind="UINT8", name="pixels", values=None, **more):
    return json.dumps({"inputs": [dict(name=name, shape=shape, datatype=kind, data=values)], **more}).encode()


def failed(port):
    stats = json.loads(ask(port, "GET", "/v2/models/float/stats")[2])["model_stats"][0]
    return stats["inference_stats"]["fail"]["count"]


def infer(port, body, model="float", **headers):
    status, headers, body = ask(port, "POST", f"/v2/models/{model}/infer", body, **headers)
    length = int(headers.get("Inference-Header-Content-Length", len(body)))
    return status, json.loads(body[:length]), body[length:]


def test_json_tensors(server, net):
    pixels = photographs(2, 32, 32)
    with torch.no_grad():
        logits = resnet50.predict(net, pixels)
    for values in (pixels.tolist(), pixels.flatten().tolist()):
        outputs = [{"name": "logits"}, {"name": "probabilities", "parameters": {"classification": 2}}]
        status, answer, _ = infer(server, v2([2, 3, 32, 32], values=values, id="a\r\nb", outputs=outputs))
        assert status == 200 and answer["id"] == "a\r\nb" and answer["model_name"] == "float"
        first, second = answer["outputs"]
        assert first["shape"] == [2, 7] and second["datatype"] == "BYTES" and second["shape"] == [2, 2]
        np.testing.assert_allclose(np.reshape(first["data"], (2, 7)), logits.numpy(), rtol=1e-4, atol=1e-4)
        best = logits.softmax(1).topk(2, 1)
        assert second["data"] == [f"{v:f}:{i}:{CLASSES[i]}" for v, i in
                                  zip(best.values.flatten().tolist(), best.indices.flatten().tolist())]
    every = [{"name": "logits", "parameters": {"classification": 99}}]  # of 7
    assert infer(server, v2([1, 3, 32, 32], values=[0] * 3072, outputs=every))[1]["outputs"][0]["shape"] == [1, 7]
    assert infer(server, v2([1, 3, 32, 32], values=[0] * 3072, parameters={"timeout": 1}))[0] == 504  # microsecond
    for beyond, value in ((1e6, 255), (-1e6, 0)):
        found = [infer(server, v2([1, 3, 32, 32], kind, values=[v] * 3072))[1] for kind, v in (
            ("FP32", beyond), ("UINT8", value))]
        assert found[0] == found[1]
    scores = serve.Scores.of(np.float32([[0, 1000, -5], [np.nan, 0, 0], [1, 2, 3]]))
    assert scores.probabilities[0].tolist() == [0, 1, 0] and scores.order[::2].tolist() == [[1, 0, 2], [2, 1, 0]]
    floats = resnet50.normalize(pixels, net.preprocess)
    status, answer, _ = infer(server, v2([2, 3, 32, 32], "FP32", values=floats.flatten().tolist()))
    np.testing.assert_allclose(np.reshape(answer["outputs"][0]["data"], (2, 7)), logits.softmax(1), atol=1e-5)


def test_binary_tensors_and_images(server, net):
    images = [picture(seed=4), picture("JPEG", seed=5)]
    tail = b"".join(len(i).to_bytes(4, "little") + i for i in images)
    text = json.dumps({"inputs": [dict(name="image", shape=[2, 1], datatype="BYTES",
                                       parameters={"binary_data_size": len(tail)})],
                       "parameters": {"binary_data_output": True}}).encode()
    status, answer, binary = infer(server, text + tail, Inference_Header_Content_Length=str(len(text)))
    assert status == 200, answer
    found = np.frombuffer(binary, "<f4").reshape(answer["outputs"][0]["shape"])
    np.testing.assert_allclose(found, expected(net, *images).softmax(1), atol=1e-5)
    for body in (images[0], None):  # one encoded image, or one tensor, and nothing else
        pixels = photographs(1, 32, 32)
        wanted = expected(net, images[0]) if body else resnet50.predict(net, pixels).detach()
        status, answer, binary = infer(server, body or pixels.numpy().tobytes(), Inference_Header_Content_Length="0")
        assert status == 200
        np.testing.assert_allclose(np.frombuffer(binary, "<f4"), wanted.softmax(1)[0], atol=1e-5)


def test_compressed_both_ways(server, net):
    body = v2([1, 3, 32, 32], values=photographs(1, 32, 32).flatten().tolist(), outputs=[{"name": "logits"}])
    plain = infer(server, body)[1]
    for name, pack in (("gzip", gzip.compress), ("deflate", zlib.compress)):
        assert infer(server, pack(body), Content_Encoding=name)[1] == plain
        status, headers, answer = ask(server, "GET", "/metrics", Accept_Encoding=name)
        assert headers["Content-Encoding"] == name and headers["Vary"] == "Accept-Encoding"
        assert b"resnet50_connections" in zlib.decompress(answer, 47)
    assert "Content-Encoding" not in ask(server, "GET", "/metrics", Accept_Encoding="gzip;q=0")[1]
    for packed in (gzip.compress(body[:99]) + gzip.compress(body[99:]), gzip.compress(body)):
        assert infer(server, packed, Content_Encoding="x-gzip")[1] == plain
    for packed in (gzip.compress(b"") * 70_000, gzip.compress(bytes(10 ** 7))):
        assert infer(server, packed, Content_Encoding="gzip")[0] == 413
    assert infer(server, b"no gzip", Content_Encoding="gzip")[0] == 400
    for name, packed in (("gzip", gzip.compress(body)), ("deflate", zlib.compress(body))):
        assert infer(server, packed[:-1], Content_Encoding=name)[0] == 400
        assert infer(server, packed + b"more", Content_Encoding=name)[0] == 400
    status, headers, _ = ask(server, "POST", "/v2/models/float/infer", body, Content_Encoding="br")
    assert status == 415 and headers["Accept-Encoding"] == "gzip, deflate"


@pytest.mark.parametrize("binary_in", [True, False])
@pytest.mark.parametrize("binary_out", [True, False])
@pytest.mark.parametrize("packing", [None, "gzip", "deflate"])
def test_tritonclient(server, networks, binary_in, binary_out, packing):
    client_of = pytest.importorskip("tritonclient.http")
    client = client_of.InferenceServerClient(f"127.0.0.1:{server}", concurrency=4)
    assert client.is_server_live() and client.is_server_ready() and client.is_model_ready("int8")
    assert [m["name"] for m in client.get_model_repository_index()] == ["float", "int8"]
    described, configured = client.get_model_metadata("int8"), client.get_model_config("int8", "1")
    assert described["inputs"][0]["shape"] == [-1, *configured["input"][0]["dims"]] == [-1, 3, 32, 32]
    pixels = photographs(3, 32, 32)
    net = resnet50.build_model(resnet50.load_checkpoint(networks["int8"]), "int8")
    wanted = resnet50.predict(net, pixels)
    tensor = client_of.InferInput("pixels", [3, 3, 32, 32], "UINT8")
    tensor.set_data_from_numpy(pixels.contiguous().numpy(), binary_data=binary_in)
    outputs = [client_of.InferRequestedOutput("logits", binary_data=binary_out),
               client_of.InferRequestedOutput("probabilities", binary_data=binary_out, class_count=1)]
    arguments = dict(outputs=outputs, request_id="7", request_compression_algorithm=packing,
                     response_compression_algorithm=packing)
    for result in (client.infer("int8", [tensor], **arguments),
                   client.async_infer("int8", [tensor], **arguments).get_result()):
        np.testing.assert_allclose(result.as_numpy("logits"), wanted.numpy(), rtol=1e-6)
        best = [(s if isinstance(s, str) else s.decode()).split(":")[1] for s in result.as_numpy("probabilities")[:, 0]]
        assert best == [str(i) for i in wanted.argmax(1).tolist()] and result.get_response()["id"] == "7"
    assert client.infer("int8", [tensor]).as_numpy("probabilities").shape == (3, 7)  # what it asks for by itself
    stats = client.get_inference_statistics("int8")["model_stats"][0]["inference_stats"]
    assert stats["success"]["count"] >= 3 and stats["compute_infer"]["ns"] > 0
    with pytest.raises(Exception, match="Request for unknown model: 'x' is not found"):
        client.infer("x", [tensor])
    client.close()


@pytest.mark.parametrize("binary", [True, False])
def test_kserve_rest_client(server, networks, binary):
    kserve = pytest.importorskip("kserve")
    pixels = photographs(3, 32, 32)
    net = resnet50.build_model(resnet50.load_checkpoint(networks["int8"]), "int8")
    wanted = resnet50.predict(net, pixels).softmax(1)

    async def talk():
        url, client = f"http://127.0.0.1:{server}", kserve.InferenceRESTClient(kserve.RESTConfig(protocol="v2"))
        assert await client.is_server_live(url) and await client.is_server_ready(url)
        assert await client.is_model_ready(url, "int8") and not await client.is_model_ready(url, "x")
        tensor = kserve.InferInput("pixels", [3, 3, 32, 32], "UINT8")
        tensor.set_data_from_numpy(pixels.contiguous().numpy(), binary_data=binary)
        request = kserve.InferRequest(model_name="int8", infer_inputs=[tensor], request_id="k")
        answer = await client.infer(url, request, model_name="int8")
        assert answer.model_name == "int8" and answer.id == "k"
        np.testing.assert_allclose(answer.outputs[0].as_numpy().reshape(3, 7), wanted.numpy(), rtol=1e-5)
        with pytest.raises(Exception, match="Request for unknown model: 'x' is not found, '404"):
            await client.infer(url, request, model_name="x")
        await client.close()
    asyncio.run(talk())


@pytest.mark.parametrize("body, text", [
    (b"", "JSON"), (b"[]", "no object"), (b"{", "JSON"), (b'{"inputs": []}', "one tensor"),
    (b'{"inputs": [1]}', "one tensor"), (b'{"a": NaN}', "NaN"), (b'{"a": -Infinity}', "Infinity"),
    (b"[" * 100_000, "deeper than 100"), (b'{"a":' * 50_000, "deeper"), (b'{"a": ' + b"9" * 5000 + b"}", "JSON"),
    (v2([1, 3, 32, 32], name="x", values=[]), "unexpected inference input"),
    (v2([1, 3, 32, 32], "FP16", values=[]), "datatype"),
    (v2([-1, 3, 32, 32], values=[0] * 3072), "whole numbers"), (v2([True, 3, 32, 32], values=[0] * 3072), "whole"),
    (v2([1, 32, 32, 3], values=[0] * 3072), r"\[n, 3, 32, 32\]"), (v2([16, 2 ** 60], values=[]), "shape"),
    (v2([0, 3, 32, 32], values=[]), "1 to 8 images"), (v2([9, 3, 32, 32], values=[0]), "1 to 8 images"),
    (v2([1, 3, 32, 32], values=[0] * 3071), "3072 numbers"), (v2([1, 3, 32, 32], values=[256] * 3072), "0 to 255"),
    (v2([1, 3, 32, 32], values=[0.5] * 3072), "numbers"), (v2([1, 3, 32, 32], values=[[1], [2, 3]]), "ragged"),
    (v2([1, 3, 32, 32], values=["1"] * 3072), "numbers"), (v2([1, 3, 32, 32], values="x"), "numbers"),
    (v2([1, 3, 32, 32], "FP32", values=[1e39] * 3072), "not finite"),
    (v2([1], "BYTES", "image", values=["%"]), "base64"), (v2([2], "BYTES", "image", values=["eA=="]), "2 strings"),
    (v2([1], "BYTES", "image", values=["eA=="]), "not an image"),
    (v2([1, 3, 32, 32], values=[0] * 3072, outputs=[{"name": "x"}]), "unexpected inference output"),
    (v2([1, 3, 32, 32], values=[0] * 3072, outputs=[{"name": "logits"}] * 2), "each once"),
    (v2([1, 3, 32, 32], values=[0] * 3072, outputs=[{"name": "logits"}] * 5000), "outputs"),
    (v2([1, 3, 32, 32], values=[0] * 3072, outputs=[{"name": "logits", "parameters": {"classification": -1}}]), "numb"),
    (v2([1, 3, 32, 32], values=[0] * 3072, outputs=[{"name": "logits", "parameters": {"classification": True}}]),
     "whole number"),
    (v2([1, 3, 32, 32], values=[0] * 3072, parameters=[]), "no object"),
    (v2([1, 3, 32, 32], values=[0] * 3072, outputs=[{"name": "logits", "parameters": {"shared_memory_region": "x"}}]),
     "no shared memory"),
    *((v2([1, 3, 32, 32], values=[0] * 3072, id=i), "id is no text") for i in (1, "x" * 1025)),
    (v2([1, 3, 32, 32], values=[0] * 3072, parameters={"binary_data_output": 1}), "boolean"),
    (v2([1, 3, 32, 32], values=[0] * 3072, parameters={"timeout": "1"}), "whole number"),
    (v2([1, 3, 32, 32], values=[0] * 3072, parameters={"timeout": -1}), "microseconds"),
    (v2([1, 3, 32, 32], values=[0] * 3072, parameters={"timeout": 10 ** 400}), "microseconds")],
    ids=lambda v: repr(v[:40]) if isinstance(v, bytes) else "")
def test_wrong_tensors_are_a_400_with_a_reason(server, body, text):
    before = failed(server)
    status, answer, _ = infer(server, body)
    assert status == 400 and re.search(text, answer["error"]), answer
    assert failed(server) == before + 1


@pytest.mark.parametrize("length", ["-5", "99999999999", "+1", "1_0", "x", ""])
def test_wrong_lengths_of_the_json_part(server, length):
    status, answer, _ = infer(server, v2([1], values=[]), Inference_Header_Content_Length=length)
    assert status == 400 and "Inference-Header-Content-Length" in answer["error"]


@pytest.mark.parametrize("tensor, size, tail", [
    *((dict(name="pixels", shape=[1, 3, 32, 32], datatype="UINT8"), size, tail) for size, tail in
      ((5, b"1234"), (3072, bytes(3071)), (-1, b"1"), (True, b"1"), (12, bytes(12)))),
    *((dict(name="pixels", shape=[1, 3, 32, 32], datatype="UINT8", data=[0] * 3072), *more) for more in
      ((3072, bytes(3072)), (None, b"x"))),
    (dict(name="image", shape=[1], datatype="BYTES"), 8, b"\xff\xff\xff\xffabcd")])
def test_wrong_binary_sizes(server, tensor, size, tail):
    text = json.dumps({"inputs": [{**tensor, "parameters": {"binary_data_size": size}}]}).encode()
    assert infer(server, text + tail, Inference_Header_Content_Length=str(len(text)))[0] == 400


# ------------------------------------------------------------------------------------------------- the wire

HEAD = b"POST /predict HTTP/1.1\r\nHost: x\r\n"


@pytest.mark.parametrize("text, status", [
    (b"GET / HTTP/1.1\nHost: x\n\n", 400), (b"GET / HTTP/1.1\r\n\r\n", 400),
    (b"GET / HTTP/1.1\r\nHost: xy\nA: b\r\n\r\n", 400),
    (b"GET / HTTP/1.32\r\nHost: x\r\n\r\n", 400),
    (b"GET /\r\n", 400), (b"\x00\x01\x02\r\n", 400), (b"get / HTTP/1.1\r\nHost: x\r\n\r\n", 400),
    (b"GET / HTTP/1.1\r\nHost: x\r\nA: \x00\r\n\r\n", 400), (b"GET / HTTP/1.1\r\nHost: x\r\nA : b\r\n\r\n", 400),
    (b"GET / HTTP/1.1\r\nHost: x\r\n folded\r\n\r\n", 400), (b"GET / HTTP/1.1\r\nHost: x\r\nA: b\rc\r\n\r\n", 400),
    (b"GET / HTTP/1.1\r\nHost: x\r\nHost: y\r\n\r\n", 400), (b"GET /" + b"a" * 9000 + b" HTTP/1.1\r\n", 414),
    (b"GET / HTTP/1.1\r\nHost: x\r\n" + b"A: b\r\n" * 1 + b"".join(b"A%d: b\r\n" % i for i in range(200)), 431),
    (b"GET / HTTP/1.1\r\nHost: x\r\nA: " + b"b" * 70_000, 431),
    (b"GET / HTTP/1.1\r\nHost: x\r\n" + b"".join(b"A%d: %s\r\n" % (i, b"b" * 7000) for i in range(12)), 431),
    (HEAD + b"Content-Length: -1\r\n\r\n", 400), (HEAD + b"Content-Length: +12\r\n\r\n", 400),
    (HEAD + b"Content-Length: 1_2\r\n\r\n", 400), (HEAD + "Content-Length: ١\r\n\r\n".encode(), 400),
    (HEAD + b"Content-Length: 1\r\nContent-Length: 2\r\n\r\n", 400),
    *((HEAD + b"%s: %s\r\n" % pair * 2 + b"Content-Length: 0\r\n\r\n", 400) for pair in (
        (b"Content-Type", b"image/png"), (b"Content-Encoding", b"gzip"), (b"Inference-Header-Content-Length", b"0"))),
    (HEAD + b"Content-Length: 1\r\nTransfer-Encoding: chunked\r\n\r\n", 400),
    (HEAD + b"Content-Length: 999999999999\r\n\r\n", 413), (HEAD + b"Content-Length: 300001\r\n\r\n", 413),
    (HEAD + b"Transfer-Encoding: gzip\r\n\r\n", 501), (HEAD + b"Transfer-Encoding: chunked\r\n\r\nx\r\n", 400),
    (HEAD + b"Transfer-Encoding: chunked\r\n\r\n2\r\nabXY", 400),
    *((HEAD + b"Transfer-Encoding: chunked\r\n\r\n" + size + b"\r\nab\r\n0\r\n\r\n", 400)
      for size in (b" 2", b"2\x0b", b"2\r", b"2;\0")),
    (HEAD + b"Transfer-Encoding: chunked\r\n\r\n0\r\nno trailer\r\n\r\n", 400),
    (b"POST /predict HTTP/1.0\r\nConnection: keep-alive\r\nTransfer-Encoding: chunked\r\n\r\n0\r\n\r\n", 400),
    (b"GET / HTTP/1.1\r\nHost: a b\r\n\r\n", 400), (b"GET / HTTP/1.1\r\nHost: a/b\r\n\r\n", 400),
    (HEAD + b"Transfer-Encoding: chunked\r\n\r\nfffffff\r\n", 413),
    (HEAD + b"Transfer-Encoding: chunked\r\n\r\n" + b"1\r\nx\r\n" * 65536, 413),
    (HEAD + b"Transfer-Encoding: chunked\r\n\r\n" + (b"30d40\r\n" + bytes(200_000) + b"\r\n") * 2, 413),
    (HEAD + b"Content-Length: 10\r\n\r\nabc", 408),
    (b"POST / HTTP/1.1\r\nHost: x\r\nContent-Length: 3\r\n\r\nabc", 405),
    (b"PUT /predict HTTP/1.1\r\nHost: x\r\nContent-Length: 3\r\n\r\nabc", 405),
    (b"TRACE / HTTP/1.1\r\nHost: x\r\nConnection: close\r\n\r\n", 405), (b"GET / HTTP/1.1\r\nHost: x\r\nA: b", 408),
    (HEAD + b"Expect: 200-ok\r\nContent-Length: 3\r\n\r\n", 417),
    (HEAD + b"Expect: 100-continue\r\nContent-Length: 300001\r\n\r\n", 413),
    *((b"POST /v2/models/%s/infer HTTP/1.1\r\nHost: x\r\nExpect: 100-continue\r\nContent-Length: 5\r\n\r\n" % name, 404)
      for name in (b"none", b"float/versions/2")),
    (b"POST /nowhere HTTP/1.1\r\nHost: x\r\nContent-Length: 5\r\n\r\n", 404)], ids=lambda v: repr(v)[:60])
def test_odd_requests_get_one_answer_and_a_close(server, text, status):
    answer = raw(server, text)
    assert answer.count(b"HTTP/1.1 ") == 1 and status_of(answer) == status and b"Connection: close" in answer, answer
    assert status != 405 or (b"Allow: POST\r\n" if b"PUT" in text else b"Allow: GET, HEAD\r\n") in answer


def test_a_refusal_reaches_who_sends_all_before_it_reads(server):
    """As http.client and nginx do"""
    for path, status in ((b"/predictions/none", 404), (b"/", 405), (b"/predict", 413)):
        first = b"POST %s HTTP/1.1\r\nHost: x\r\nContent-Length: 20000000\r\n\r\n" % path
        assert status_of(raw(server, first, more=[bytes(20_000_000)])) == status


def test_chunked_and_continue(server, net):
    encoded = picture()
    chunks = b"".join(b"%x;ext=1\r\n%s\r\n" % (len(c), c) for c in (encoded[:7], encoded[7:]))
    chunks += b"0\r\nTrailer: x\r\n\r\n"
    wanted = int(expected(net, encoded).argmax())
    answer = raw(server, HEAD + b"Connection: close\r\nTransfer-Encoding: chunked\r\n\r\n" + chunks)
    assert json.loads(answer.partition(b"\r\n\r\n")[2])["class_id"] == wanted
    with socket.create_connection(("127.0.0.1", server), timeout=10) as s:
        s.sendall(HEAD + b"Expect: 100-continue\r\nContent-Length: %d\r\n\r\n" % len(encoded))
        assert s.recv(100) == b"HTTP/1.1 100 Continue\r\n\r\n"
        s.sendall(encoded)
        assert s.recv(65536).startswith(b"HTTP/1.1 200 ")


def test_a_connection_is_kept_and_nothing_runs_into_the_next_request(server):
    connection = http.client.HTTPConnection("127.0.0.1", server, timeout=10)
    for _ in range(3):
        for method, path, body, status in (("GET", "/healthz", None, 200), ("POST", "/predict", b"no image", 400),
                                           ("GET", "/v2/models/float", b"a body", 200), ("GET", "/healthz", None, 200)):
            connection.request(method, path, body)
            answer = connection.getresponse()
            assert answer.status == status and answer.read()
            local = connection.sock.getsockname()
    assert connection.sock.getsockname() == local
    both = raw(server, b"GET /healthz HTTP/1.1\r\nHost: x\r\n\r\n" * 3 + b"GET /x HTTP/1.1\r\nHost: x\r\n"
               b"Connection: close\r\n\r\n")  # pipelined
    assert re.findall(rb"HTTP/1.1 (\d+)", both) == [b"200", b"200", b"200", b"404"]
    old = b"GET /healthz HTTP/1.0\r\n%s\r\n"
    kept = raw(server, old % b"Connection: Keep-Alive\r\n" + old % b"" * 2)
    assert re.findall(rb"HTTP/1.1 200 |Connection: (?:keep|close)", kept) == [
        b"HTTP/1.1 200 ", b"Connection: keep", b"HTTP/1.1 200 ", b"Connection: close"]


@pytest.mark.parametrize("body, status, text", [
    (b"", 400, "empty"), (b"GIF89a", 400, "image"), (b"\x89PNG\r\n\x1a\n" + bytes(50), 400, "image"),
    (picture("JPEG")[:-100], 400, "cut short"), (picture("PNG")[:-80], 400, "damaged"),
    (picture("TIFF"), 400, "not an image in any of"), (picture("PPM"), 400, "not an image"),
    (picture("JPEG", (600, 500)), 413, "600 x 500 pixels"), (with_scans(101), 400, "over 100 scans"),
    (struct.pack("<2s5I4H6I", b"BM", 54, 0, 54, 40, 30000, 20000, 0, 1, 24, *[0] * 6), 413, "more than 250000"),
    (struct.pack("<4sI8sI4s4B", b"RIFF", 22, b"WEBPVP8X", 10, bytes(4), 255, 63, 0, 255) + b"\x3f\0", 413, "more than"),
    (b"%PDF-1.4", 400, "not an image")], ids=lambda v: repr(v)[:30])
def test_wrong_images(server, body, status, text):
    found, _, answer = ask(server, "POST", "/predict", body)
    assert found == status and text in json.loads(answer)["error"], answer


@pytest.mark.parametrize("line", [b"A:" + b" " * 60000 + b"\x01", b"A: x" + b" " * 60000 + b"\x01y"])
def test_blanks_in_a_header_cost_nothing(line):
    """Tried in all ways to divide them they would take days."""
    reader, writer = socket.socketpair()
    with reader, writer:
        writer.sendall(b"GET / HTTP/1.1\r\nHost: x\r\n" + line + b"\r\n\r\n")
        stream = serve.Stream(reader)
        stream.deadline = time.monotonic() + 20
        with pytest.raises(serve.Refusal, match="malformed"):
            serve.read_head(stream)


@pytest.mark.parametrize("text", [b'\\"' * 100_000, b'{"a": "' + b'\\"' * 100_000, b'"' * 99_999, b"\\" * 99_999])
def test_quotes_in_json_cost_nothing(text):
    with pytest.raises(serve.Refusal, match="cannot be read"):
        serve.read_json(text, 9)


@pytest.mark.parametrize("text", [b"[]," * 10 ** 6, b"{}," * 10 ** 6, b'"",' * 10 ** 6, b"\\\\" * 10 ** 6, b"1," * 101,
                                  b"]" * 10 ** 6])
def test_a_json_of_more_than_tensors_need_is_not_read(text, monkeypatch):
    """It would stop all threads, and become objects of fifty times its size."""
    monkeypatch.setattr(serve.json, "loads", None)
    monkeypatch.setattr(serve.itertools, "accumulate", None)
    with pytest.raises(serve.Refusal, match="100 values") as caught:
        serve.read_json(text, 100)
    assert caught.value.status == 413


def test_other_threads_run_while_a_large_json_is_read():
    """Python looks for them between two of its own steps: here it counts these."""
    values, steps = [7, -0.25, 1e30, 12345678901234567890] * 20_000, []
    text = json.dumps({"a": values, "b": ["x" * serve.LARGE]}).encode()
    sys.setprofile(lambda frame, event, arg: steps.append(event))
    try:
        found = serve.read_json(text, len(values) + 9)["a"]
    finally:
        sys.setprofile(None)
    assert found == values and list(map(type, found)) == list(map(type, values)) and len(steps) > len(values)
    wanted = np.array(values, np.float64).astype("<f4")
    assert np.array_equal(serve.json_numbers(values, len(values), "FP32"), wanted)  # in several parts


def test_depth_is_counted_outside_of_strings():
    deep = "[" * 101
    for text in (json.dumps({"a": deep}), json.dumps({"a": "\\" + '"' + deep}), json.dumps({'"' + deep: "\\"})):
        assert serve.read_json(text.encode(), 9) == json.loads(text)
    with pytest.raises(serve.Refusal, match="deeper"):
        serve.read_json(json.dumps({"\\": [[]]}).replace("[[]]", deep + "]" * 101).encode(), 9)


@pytest.mark.parametrize("values", [["A" * 300_000, *[""] * 3071], [[1, "x"] * 1536], [None] * 3072, [True] * 3072,
                                    {"a": 1}, "x" * 3072, [[1] * 3071, [1]], [10 ** 400] * 3072])
def test_numbers_are_looked_at_before_an_array_is_made(values):
    with pytest.raises(serve.Refusal, match="3072 numbers"):
        serve.json_numbers(values, 3072, "FP32")


def test_whole_numbers_beyond_64_bits_are_floats():
    assert serve.json_numbers([10 ** 30, -10 ** 30, 0.5], 3, "FP32").tolist() == np.float32([1e30, -1e30, 0.5]).tolist()
    with np.errstate(over="raise"):  # no warning in the log, where a client can write it
        assert serve.json_numbers([1e39], 1, "FP32") == math.inf


@pytest.mark.parametrize("tls", [None, "a context"])
def test_clients_that_go_beyond_the_descriptors_that_select_knows(tls):
    here, there = socket.socketpair()
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    if hard < 2048:
        pytest.skip("few open files are allowed here")
    resource.setrlimit(resource.RLIMIT_NOFILE, (max(soft, 2048), hard))
    with here, there, socket.socket(fileno=fcntl.fcntl(here, fcntl.F_DUPFD, 1500)) as far:
        handler = types.SimpleNamespace(connection=far, stream=types.SimpleNamespace(buffer=b""), minor=1, asked=False,
                                        request=types.SimpleNamespace(fileno=lambda: -1) if tls else far)
        assert far.fileno() >= 1500 and serve.Handler.alive(handler)
        there.sendall(b"what goes on")
        assert serve.Handler.alive(handler)
        there.shutdown(socket.SHUT_WR)
        for _ in range(2):  # asked once
            assert serve.Handler.alive(handler) is (tls is None)
        assert tls or there.recv(99) == b"HTTP/1.1 100 Continue\r\n\r\n"
        there.close()
        assert not serve.Handler.alive(handler)


@pytest.mark.parametrize("arrivals, lasts", [  # [(seconds after the one before, units of 64 KiB)]
    ([], 10), ([(1, 64)], 11),  # much at once is no licence to wait
    ([(1, 64)] + [(9, 0.001)] * 99, 11), ([(2, 2)] * 99, 208), ([(4, 2)] * 99, 18), ([(9, 5)] * 99, 15),
    ([(9, 9)] * 99, 901)])
def test_a_body_has_time_by_what_has_come_of_it(monkeypatch, arrivals, lasts):
    class Connection:
        def settimeout(self, seconds):
            self.until = now[0] + seconds

        def recv(self, most):
            after, received = left.pop(0) if left else (math.inf, b"")
            left[:0] = [(0, received[most:])] if received[most:] else []
            if now[0] + after > self.until:
                now[0] = self.until
                raise TimeoutError
            now[0] += after
            return received[:most]
    now = [0.0]
    monkeypatch.setattr(serve, "time", types.SimpleNamespace(monotonic=lambda: now[0]))
    for read, begin in ((serve.Stream.read, b""), (serve.Stream.chunked, b"fffffff\r\n")):
        now[0], left = 0.0, [(0, begin)] * bool(begin) + [(after, bytes(int(n * 65536))) for after, n in arrivals]
        stream = serve.Stream(Connection())
        stream.within(10, grows=True)
        with pytest.raises(TimeoutError):
            read(stream, 2 ** 30)
        assert now[0] == pytest.approx(lasts, rel=0.01)


def test_a_port_in_use_is_told_before_processes_share_it(networks):
    with socket.socket() as other:
        other.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEPORT, 1)
        other.bind(("127.0.0.1", 0))
        other.listen()
        process = start("--processes", 2, "--port", other.getsockname()[1], "--checkpoint", networks["float"],
                        wait=False)
        assert process.wait(60) == 2 and "in use" in process.stderr.read()


def loaded(checkpoint, *flags, **fields):
    """-> serve's arguments and Network of a copy of that checkpoint with other classes or args"""
    path = os.path.join(os.path.dirname(checkpoint), "copy.pt")
    resnet50.save_checkpoint(path, resnet50.build_model(resnet50.load_checkpoint(checkpoint), path),
                             **{"classes": CLASSES, **fields})
    args = serve.get_args_parser().parse_args(["--device", "cpu", "--max-batch", "1", *flags])
    return args, serve.Model("m", args, path).network


def test_class_names_that_are_no_text(networks):
    """Folders as they come out of old archives: a name whose bytes are no UTF-8"""
    names = [os.fsdecode(b"gr\xfcn"), *CLASSES[1:]]
    _, network = loaded(networks["float"], classes=names)
    outputs = [("logits", True, 7), ("probabilities", False, 7)]
    headers, body = serve.infer_response("m", network.classes, {}, outputs, serve.Scores.of(np.zeros((1, 7))))
    length = int(headers["Inference-Header-Content-Length"])
    texts = serve.binary_strings(body[length:], 7)
    found = [text.decode().split(":", 2)[2] for text in texts]
    assert sorted(found) == sorted(["gr\\udcfcn", *CLASSES[1:]])
    assert [d.encode().decode().split(":", 2)[2] for d in json.loads(body[:length])["outputs"][1]["data"]] == found


def test_photographs_are_turned_where_training_turned_them(networks):
    tag = Image.Exif()
    tag[0x0112] = 6
    encoded = picture("JPEG", exif=tag)
    for flags, trained in (((), False), (["--exif"], False), ((), True)):
        args, network = loaded(networks["float"], *flags, args=dict(exif=trained))
        pixels = torch.from_numpy(serve.decode(network, encoded, args, contextlib.nullcontext))
        wanted = network.transform(data.decode(encoded, exif=bool(flags or trained)))
        assert torch.equal(pixels, wanted)


def test_a_network_whose_outputs_are_not_finite_does_not_serve(networks, tmp_path):
    checkpoint = resnet50.load_checkpoint(networks["float"])
    model = resnet50.build_model(checkpoint, "float")
    with torch.no_grad():
        model.fc.bias[1] = math.nan
    resnet50.save_checkpoint(str(tmp_path / "nan.pt"), model, classes=CLASSES)
    process = start("--checkpoint", tmp_path / "nan.pt", wait=False)
    assert process.wait(60) == 3 and "nan.pt: its outputs are not finite" in process.stderr.read()


def test_both_networks_of_a_cascade_are_tried_before_they_serve(tmp_path):
    """Also where the small one is sure of every image that they are tried with"""
    small, big = build("plain"), build("plain", seed=9)
    small.fc.weight.zero_()
    small.fc.bias[:] = torch.tensor([50.0] + [0.0] * 6)
    for net in (small, big):
        net.preprocess.update(resize=40, crop=32)
    path = str(tmp_path / "cascade.pt")
    args = serve.get_args_parser().parse_args(["--device", "cpu", "--max-batch", "2", "--checkpoint", path])
    resnet50.save_checkpoint(path, resnet50.Cascade(small, big, 0.5), classes=CLASSES)
    args.amp_dtype = "bfloat16"
    net = serve.open_models(args)["resnet50"].network.net
    assert [member.dtype for member in net.children()] == [torch.bfloat16] * 2
    big.fc.bias[3] = math.nan
    resnet50.save_checkpoint(path, resnet50.Cascade(small, big, 0.5), classes=CLASSES)
    with pytest.raises(resnet50.UserError, match="its outputs are not finite"):
        serve.open_models(args)


@pytest.mark.parametrize("closed", [True, False])
def test_answers_do_not_depend_on_a_reader_of_the_log(slow, monkeypatch, closed):
    """Nor do the next batch, after one that failed, and what a signal asks for."""
    model, net = slow
    for stream in ("stderr", "stdout"):
        monkeypatch.setattr(sys, stream, None if closed else open("/dev/full", "w", buffering=1))
    works, model.network = model.network, model.network._replace(net=None)
    assert submit(model, images(1, 0)).exception(10)
    model.network = works
    net.go.release()
    assert submit(model, images(1, 0)).result(10) is not None
    model.network = model.network._replace(stamp="another")
    net.go.release(12)
    model.reload()
    assert model.network.stamp != "another"
    serve.say("what a process says when it is ready", "stdout")


@pytest.fixture
def bare():
    """A server in this process, without networks"""
    server = serve.Server(serve.get_args_parser().parse_args(["--device", "cpu", "--port", "0", "--no-access-log"]), {})
    threading.Thread(target=server.serve_forever, kwargs=dict(poll_interval=0.01), daemon=True).start()
    yield server
    server.shutdown()
    server.server_close()


def test_an_error_of_our_own_is_no_fault_of_the_request(bare, monkeypatch, capsys):
    def answer(self, model):
        raise ValueError("ours")
    monkeypatch.setattr(serve, "ROUTES", {re.compile("/"): serve.Route(["GET"], "/", answer, "")})
    status, _, answer = ask(bare.server_address[1], "GET", "/")
    assert status == 500 and b"inside the server" in answer and "ValueError: ours" in capsys.readouterr().err


def test_a_connection_between_requests_holds_no_body(bare):
    connection = http.client.HTTPConnection("127.0.0.1", bare.server_address[1], timeout=10)
    connection.request("POST", "/v2/repository/index", bytes(10 ** 6))
    assert connection.getresponse().read() == b"[]"
    handler, = bare.handlers.values()
    wait_until(lambda: handler.idle)
    assert handler.connection.getsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY)
    held = sum(len(value) for value in (*vars(handler).values(), handler.stream.buffer) if isinstance(value, bytes))
    assert held < 1000
    connection.close()


def test_a_body_that_is_refused_unread_is_no_request(bare):
    """And whoever stays after the connection's last answer is left"""
    bare.keys = [b"key"]
    body = b"GET /healthz HTTP/1.1\r\nHost: x\r\n\r\n"
    with socket.create_connection(bare.server_address, timeout=10) as client:
        client.sendall(HEAD + b"Content-Length: %d\r\n\r\n%s" % (len(body), body))
        answer = b"".join(iter(lambda: client.recv(65536), b""))
        assert answer.count(b"HTTP/1.1 ") == 1 and status_of(answer) == 401 and b"Connection: close" in answer
        wait_until(lambda: not bare.handlers)


def test_uptime_does_not_follow_the_clock(bare, monkeypatch):
    monkeypatch.setattr(serve.time, "time", lambda: 1e6)
    text = ask(bare.server_address[1], "GET", "/metrics")[2].decode()
    assert 0 <= float(re.search(r"^resnet50_uptime_seconds (.+)$", text, re.M)[1]) < 60


def test_an_upload_that_ends_early_is_counted(bare):
    with socket.create_connection(bare.server_address) as client:
        client.sendall(b"POST /v2/repository/index HTTP/1.1\r\nHost: x\r\nContent-Length: 9\r\n\r\nabc")
    wait_until(lambda: bare.answers == {499: 1})


def test_forms_as_rfc_2046_and_7578_have_them(server):
    image = picture()
    whole, headers = form(image)
    field = b'--x\r\nContent-Disposition: form-data; name="filename"\r\n\r\ncat\r\n'
    for body, kind in ((b"a preamble\r\n" + whole, headers["Content_Type"]),
                       (whole, headers["Content_Type"].replace("boundary", "Boundary")),
                       (field + whole, headers["Content_Type"])):
        status, _, answer = ask(server, "POST", "/predict", body, Content_Type=kind)
        assert status == 200 and "class" in json.loads(answer), answer


def test_bytes_without_a_json_part_are_pixels_or_a_file_of_as_many(server):
    def raw_infer(tail):
        return infer(server, tail, Inference_Header_Content_Length="0")
    image = picture("JPEG", size=(30, 25))
    padded = image[:2] + b"\xff\xfe" + (3 * 32 * 32 - len(image) - 2).to_bytes(2, "big") \
        + b"\0" * (3 * 32 * 32 - len(image) - 4) + image[2:]  # a comment
    assert len(padded) == 3 * 32 * 32
    assert raw_infer(padded)[0] == 200 and raw_infer(padded)[2] == raw_infer(image)[2]
    assert raw_infer(b"BM" + bytes(3 * 32 * 32 - 2))[0] == 200  # grey values 66 and 77


def test_more_images_than_the_queue_holds_need_not_come_again(slow):
    with pytest.raises(serve.Refusal, match="has room for") as caught:
        with slow[0].expecting(7, time.monotonic() + 20):
            pass
    assert caught.value.status == 413
    with slow[0].expecting(6, time.monotonic() + 20):  # just as many as it holds
        assert slow[0].coming == 6


def test_requests_as_rfc_9112_and_9110_have_them(server):
    for first in (b"GET http://x/healthz", b"GET HTTP://x/healthz", b"GET http://x", b"GET http://x?y", b"\r\nGET /",
                  b"GET /%68ealthz", b"GET /v2/models/fl%6Fat/versions/%31"):
        answer = raw(server, first + b" HTTP/1.1\r\nHost: [::1]:80\r\nConnection: x, close\r\n\r\n")
        assert answer.startswith(b"HTTP/1.1 200 "), first
    kept = b"GET /healthz HTTP/1.1\r\nHost: x\r\nConnection: %s\r\n\r\n"
    assert raw(server, kept % b"closed" + kept % b"close").count(b"HTTP/1.1 200 ") == 2
    image = picture()
    answer = raw(server, b"POST /predict HTTP/1.0\r\nExpect: 100-continue\r\nContent-Length: %d\r\n\r\n" % len(image),
                 more=[image])
    assert b"100 Continue" not in answer and status_of(answer) == 200
    answer = raw(server, HEAD + b"Connection: close\r\nExpect: 100-continue\r\nContent-Length: 1\r\n\r\nx")
    assert status_of(answer) == 400  # what is there already is not waited for
    for version, begin in ((b"1", b"HTTP/1.1 100 Continue\r\n\r\nHTTP/1.1 200 "), (b"0", b"")):
        with socket.create_connection(("127.0.0.1", server), timeout=10) as s:  # nc -N
            s.sendall(HEAD.replace(b".1", b"." + version) + b"Content-Length: %d\r\n\r\n%s" % (len(image), image))
            s.shutdown(socket.SHUT_WR)
            answer = b"".join(iter(lambda: s.recv(65536), b""))
        assert answer.startswith(begin) and bool(answer) == bool(begin), answer


def test_wrong_forms_and_queries(server):
    image = picture()
    whole, headers = form(image)
    for body, more, status in ((whole[:-6], headers, 400), (whole, {"Content_Type": "multipart/form-data"}, 400),
                               (b"--x--\r\n", headers, 400), (form(*[image] * 9)[0], headers, 413),
                               (b"--x\r\n\r\nabc\r\n--x--\r\n", headers, 400), (b"--x\r\n" * 1000, headers, 413)):
        assert ask(server, "POST", "/predict", body, **more)[0] == status
    for query in ("0", "-1", "x", "1" * 30, ""):
        assert ask(server, "POST", f"/predict?topk={query}", image)[0] == 400
    many = "&".join(f"a{i}=1" for i in range(30))
    assert json.loads(ask(server, "POST", f"/predict?{many}&topk=999", image)[2])["top"][6]["probability"] > 0
    for path in ("/predictions/none", "/v2/models/none/infer", "/v2/models/..%2f..%2fetc/infer", "/" + "a" * 300):
        assert ask(server, "POST", path, image)[0] == 404
    assert ask(server, "GET", "/v2/models/float/versions/2")[0] == 404
    assert ask(server, "POST", "/predict", image, X_Request_Timeout_Ms="0")[0] == 400


# --------------------------------------------------------------------------------------------- load and life

class Slow:
    """A network that a test lets go on, a batch at a time"""
    precision = "int8"

    def __init__(self):
        self.preprocess, self.config = dict(resnet50.PREPROCESS, crop=8, resize=8), dict(num_classes=3)
        self.go, self.batches = threading.Semaphore(12), []  # to warm up

    def to(self, device):
        return self

    def __call__(self, pixels):
        assert self.go.acquire(timeout=20)
        self.batches.append(len(pixels))
        return pixels.float().mean((2, 3))


@pytest.fixture
def slow(monkeypatch):
    """-> (Model of a Slow network, its network)"""
    net = Slow()
    monkeypatch.setattr(serve, "load_some_model", lambda *a, **k: (net, dict(classes=None, args={}), "slow"))
    args = serve.get_args_parser().parse_args(["--device", "cpu", "--max-batch", "4", "--max-queue", "6"])
    model = serve.Model("slow", args, None)
    model.network = model.network._replace(enough=4)
    net.batches.clear()
    yield model, net
    net.go.release(9)


def test_every_graph_is_recorded_before_a_network_serves(monkeypatch, slow):
    """On devices other than the CPU; meta stands in for CUDA."""
    asked = []
    monkeypatch.setattr(Slow, "__call__", lambda net, pixels: asked.append(len(pixels)) or torch.zeros(len(pixels), 3))
    slow[0].args.devices = ["meta"]
    for most, first in ((20, [1, 2, 4, 8, 16, 32]), (1024, [1, 2, 4, 8, 16, *range(32, 32 * 12, 32)])):
        slow[0].args.max_batch = most
        asked.clear()
        slow[0].load(None)
        assert asked == [*first, *[1] * 9, *[most] * 3] and len(first) <= graphs.KEPT


def test_a_file_that_changes_while_it_is_read_is_read_again(monkeypatch, slow, tmp_path):
    def stamp(name, text, seconds):
        (tmp_path / name).write_text(text)
        os.utime(tmp_path / name, (seconds, seconds))
        return serve.stamp_of(tmp_path / name)
    stamps = [stamp(*how) for how in (("a", "x", 1), ("a", "xy", 1), ("a", "xy", 2), ("b", "xy", 2))]
    assert len(set(stamps)) == 4  # by size, time and file
    model, net = slow
    monkeypatch.setattr(serve, "load_some_model", lambda *a: stamp("b", "new", 3) and (
        net, dict(classes=None, args={}), str(tmp_path / "b")))
    net.go.release(12)
    assert model.load(str(tmp_path / "b")).stamp == stamps[-1]


def test_batches_go_to_a_gpu_from_pinned_memory(monkeypatch, slow):
    """As a GPU would be told; nothing is copied here"""
    model, net = slow
    pinned, sent = [], []
    monkeypatch.setattr(torch.Tensor, "pin_memory", lambda x: pinned.append(x) or x)
    monkeypatch.setattr(torch.Tensor, "to", lambda x, *where, **how: sent.append((x, where, how)) or x)
    model.args.devices = ["cuda"]
    net.go.release()
    assert submit(model, images(2, 5)).result(9).logits.shape == (2, 3)
    (batch, *how), = sent
    assert batch is pinned[0] and len(batch) == 2 and how == [(torch.device("cuda"),), dict(non_blocking=True)]


def images(n, value):
    return torch.full((n, 3, 8, 8), value, dtype=torch.uint8)


def submit(model, pixels, seconds=60, alive=True):
    """-> Ticket, with so many seconds, of a client that is there or not"""
    return model.submit(model.network, pixels, time.monotonic() + seconds, lambda: alive)


def begin(model):
    """-> Ticket of an image that the network has begun with"""
    ticket = submit(model, images(1, 0))
    wait_until(lambda: model.images == 0)
    return ticket


def wait_until(condition, about=None):
    until = time.monotonic() + 30
    while not condition():
        assert time.monotonic() < until, about
        time.sleep(0.001)


def test_what_waits_while_a_batch_runs_makes_the_next(slow, bare):
    model, net = slow
    tickets = [begin(model), *(submit(model, images(n, n)) for n in (2, 1, 1, 2))]
    with pytest.raises(serve.Refusal, match="full") as caught:
        with model.expecting(1, time.monotonic() + 60):
            raise AssertionError("nothing may be decoded")
    assert caught.value.status == 503 and caught.value.headers["Retry-After"]
    bare.models["slow"] = model
    assert b'\nresnet50_queue_images{model="slow"} 6\n' in ask(bare.server_address[1], "GET", "/metrics")[2]
    net.go.release(3)
    for ticket, value in zip(tickets, (0, 2, 1, 1, 2)):
        assert (ticket.result(10).logits == value).all() and len(ticket.result().logits) == len(ticket.pixels)
    assert net.batches == [1, 4, 2]


@pytest.mark.parametrize("waiting, batches", [(1, [1]), (2, [2]), (3, [2, 1]), (5, [4, 1]), (6, [4, 2])])
def test_half_of_what_waits_is_taken_where_it_is_enough(slow, waiting, batches):
    model, net = slow
    model.network = model.network._replace(enough=2)
    tickets = [begin(model), *(submit(model, images(1, n)) for n in range(waiting))]
    net.go.release(1 + len(batches))
    assert all(t.exception(10) is None for t in tickets) and net.batches == [1, *batches]


def test_enough_images_for_a_batch():
    """Of one image and of 32 in so many seconds: the batch's own cost is a tenth of its images', in whole rounds"""
    assert serve.enough_images(1.0, 32.0, 32, 2) == 2  # nothing to gain
    assert serve.enough_images(0.9, 32.0, 32, 2) == 2  # a measurement that was disturbed
    assert serve.enough_images(1.5, 32.0, 32, 2) == 6  # 0.5 of its own, 1.0 each
    assert serve.enough_images(1.5, 32.0, 4, 8) == 4  # not more than is allowed
    assert serve.enough_images(1.0, 1.2, 32, 1) == 32  # a GPU


def test_one_batch_that_was_held_up_does_not_set_the_pace(slow):
    model, _ = slow
    model.args.max_batch, model.pace = 32, 0.01
    model.learn(1.0, 1)
    assert 0.01 < model.pace < 0.05  # 200 images are no reason to refuse the next
    for _ in range(20):
        model.learn(3.2, 32)
    assert model.pace == pytest.approx(0.1, rel=1e-3)


def test_what_began_with_a_network_ends_with_it(slow):
    """Whatever is reloaded meanwhile, of whatever size"""
    model, net = slow
    old, new = model.network, model.network._replace(size=16)
    first, second = begin(model), submit(model, images(1, 1))
    model.network = new
    third = submit(model, torch.full((1, 3, 16, 16), 2, dtype=torch.uint8))
    net.go.release(3)
    for ticket, network, value in ((first, old, 0), (second, old, 1), (third, new, 2)):
        assert (ticket.result(10).logits == value).all() and ticket.network is network
    assert net.batches == [1, 1, 1]


def test_a_network_that_was_replaced_is_let_go(slow):
    """Though no batch came after its last"""
    model, net = slow
    ticket = submit(model, images(1, 1))
    net.go.release()
    assert (ticket.result(10).logits == 1).all()
    gone, model.network = weakref.ref(ticket), None
    del ticket
    wait_until(lambda: gone() is None)


def test_no_batch_is_larger_than_max_batch(slow):
    model, net = slow
    ticket = submit(model, images(6, 3))
    net.go.release(2)
    assert (ticket.result(10).logits == 3).all() and net.batches == [4, 2] and ticket.batch == 4
    found = model.statistics.triton("slow")
    assert [b["batch_size"] for b in found["batch_stats"]] == [2, 4] and found["execution_count"] == 2
    assert sum(b["compute_infer"]["ns"] for b in found["batch_stats"]) == pytest.approx(ticket.computed * 1e9, rel=1e-3)
    assert model.statistics.batch_size.sum == 6 and sum(model.statistics.queue_seconds.counts) == 1


def test_expired_and_gone_requests_cost_nothing(slow):
    model, net = slow
    first = begin(model)
    old, gone, good = (submit(model, images(1, 1), **how) for how in (dict(seconds=-1), dict(alive=False), {}))
    net.go.release(2)
    assert old.exception(10).status == 504 and gone.exception(10).status == 499
    assert first.exception(10) is good.exception(10) is None and net.batches == [1, 1]


def test_models_take_turns_on_their_device(slow):
    first, net = slow
    net.go.release(12)
    second = serve.Model("second", first.args, None, first.device)
    net.batches.clear()
    tickets = [begin(first), submit(first, images(3, 3)), submit(second, images(2, 2))]
    wait_until(first.device.next.locked)
    net.go.release(3)
    for ticket, value in zip(tickets, (0, 3, 2)):
        assert (ticket.result(10).logits == value).all()
    assert net.batches == [1, 2, 3]


def test_answers_do_not_wait_for_the_next_batch(slow):
    """Neither where it follows at once, nor where it waits for another image, nor where it is another model's turn, or
    becomes that just then"""
    model, net = slow
    net.go.release(12)
    other = serve.Model("other", model.args, None, model.device)
    first, second = begin(model), submit(model, images(1, 1))
    net.go.release()
    assert (first.result(10).logits == 0).all() and not second.done()
    model.args.max_delay_ms = 60_000
    with model.expecting(1, time.monotonic() + 60):
        third = submit(model, images(1, 2))
        net.go.release()
        assert (second.result(10).logits == 1).all() and not third.done()
    wait_until(lambda: model.images == 0)
    fourth, foreign = submit(model, images(1, 3)), submit(other, images(1, 4))
    wait_until(model.device.next.locked)
    net.go.release()
    assert (third.result(10).logits == 2).all() and not fourth.done() and not foreign.done()
    net.go.release(2)
    assert (fourth.result(10).logits == 3).all() and (foreign.result(10).logits == 4).all()
    wait, fifth = model.wait, begin(model)
    model.wait, sixth = lambda: wait() or model.device.lock.acquire(), submit(model, images(1, 6))
    net.go.release(2)
    assert (fifth.result(10).logits == 0).all() and not sixth.done()
    model.wait = wait
    model.device.lock.release()
    assert (sixth.result(10).logits == 6).all()


def test_a_batch_that_cannot_begin_takes_no_answers_with_it(slow):
    model, net = slow
    first, *odd = begin(model), submit(model, images(1, 1)), submit(model, torch.zeros(1, 3, 9, 9, dtype=torch.uint8))
    net.go.release()
    assert (first.result(10).logits == 0).all() and [t.exception(10).status for t in odd] == [500, 500]


def test_outputs_that_are_not_finite_fail_their_own_request_alone(slow, monkeypatch):
    model, net = slow
    inner = Slow.__call__
    monkeypatch.setattr(Slow, "__call__", lambda net, pixels: 1 / inner(net, pixels))
    tickets = [begin(model), *(submit(model, images(1, n)) for n in (2, 0, 4))]
    net.go.release(2)
    assert [t.exception(10) and t.exception().status for t in tickets] == [500, None, 500, None]
    assert [np.unique(tickets[i].result().logits).tolist() for i in (1, 3)] == [[0.5], [0.25]] and net.batches == [1, 3]


def test_a_failing_batch_is_told_and_the_next_one_runs(slow, capsys):
    model, net = slow
    works, model.network = model.network, model.network._replace(net=None)
    bad = submit(model, images(1, 0))
    net.go.release()
    assert bad.exception(10).status == 500
    model.network = works
    good = submit(model, images(1, 5))
    assert (good.result(10).logits == 5).all() and "Traceback" in capsys.readouterr().err


def test_a_batch_waits_for_what_is_being_decoded_and_for_nothing_else(slow):
    model, net = slow
    model.args.max_delay_ms = 5000
    net.go.release()
    assert (submit(model, images(1, 1)).result(2).logits == 1).all()
    with model.expecting(1, time.monotonic() + 60):
        first = submit(model, images(1, 1))
        net.go.release()
        with pytest.raises(concurrent.futures.TimeoutError):
            first.result(0.05)
        second = submit(model, images(3, 2))  # enough: the third is not waited for
        assert first.exception(2) is second.exception(2) is None
        model.args.max_delay_ms = 20
        net.go.release()
        assert (submit(model, images(1, 3)).result(5).logits == 3).all()  # no longer than that
    assert net.batches == [1, 4, 1]


@pytest.mark.parametrize("triton", [False, True])
def test_an_answer_is_not_waited_for_beyond_the_request_s_time(bare, slow, triton, monkeypatch):
    bare.models["slow"] = slow[0]
    monkeypatch.setattr(bare.args, "timeout_ms", 60_000)  # the network gives up before that
    if triton:  # in microseconds
        done = ask(bare.server_address[1], "POST", "/v2/models/slow/infer", v2([1, 3, 8, 8], values=[0] * 192,
                                                                               parameters={"timeout": 500_000}))
    else:
        done = ask(bare.server_address[1], "POST", "/predict", picture(), X_Request_Timeout_Ms="500")
    status, _, answer = done
    assert status == 504 and b"no answer within" in answer and slow[0].statistics.count == {"fail": 1}


@pytest.mark.parametrize("given, until", [(None, 105), ("250", 100.25), ("9000", 105)])
def test_a_request_s_time_begins_when_it_has_arrived(given, until):
    """And is no longer than the server's"""
    handler = types.SimpleNamespace(started=0.0, arrived=100.0, args=types.SimpleNamespace(timeout_ms=5000),
                                    headers={"x-request-timeout-ms": given} if given else {})
    assert serve.Handler.deadline(handler) == until


def test_one_large_json_is_read_at_once(bare, slow):
    bare.models["slow"], large = slow[0], b'{"a": "%s"}' % (b"x" * serve.LARGE)
    with bare.reading:
        for body, wanted in ((large, 504), (b"{}", 400)):
            assert infer(bare.server_address[1], body, "slow", X_Request_Timeout_Ms="50")[0] == wanted
    assert infer(bare.server_address[1], large, "slow")[0] == 400


def test_nothing_is_decoded_that_nobody_waits_for(bare, slow, monkeypatch):
    """Requests that expire, or whose clients go, while they wait for a decoder, also between two of their images"""
    assert sum(bare.gate.acquire(blocking=False) for _ in range(999)) == os.cpu_count()
    model, (body, kind) = slow[0], form(*[picture()] * 3)
    bare.models["slow"], bare.gate, decoded = model, threading.Semaphore(0), []

    def decode(*args):
        decoded.append(args)
        if len(decoded) == 2:
            client.close()
        return torch.zeros(8, 8, 3, dtype=torch.uint8)
    model.network = model.network._replace(transform=types.SimpleNamespace(encoded=decode))
    status, _, answer = ask(bare.server_address[1], "POST", "/predict", body, X_Request_Timeout_Ms="50", **kind)
    assert status == 504 and b"to be decoded" in answer
    for gone in (1, 2):
        client = socket.create_connection(bare.server_address)
        client.sendall(HEAD + b"Content-Type: %s\r\nContent-Length: %d\r\n\r\n%s" % (
            kind["Content_Type"].encode(), len(body), body))
        wait_until(lambda: model.coming == 3)
        if gone == 1:
            client.close()
        bare.gate.release()
        wait_until(lambda: bare.answers[499] == gone)
        assert len(decoded) == (0, 2)[gone - 1] and model.coming == 0 and bare.gate.acquire(blocking=False)
    assert model.statistics.count == {"fail": 3}


def test_slow_clients_are_cut_and_hinder_nobody(server):
    crowd = []
    for i in range(100):
        s = socket.create_connection(("127.0.0.1", server), timeout=10)
        s.sendall(b"GET /healthz HTTP/1.1\r\nHo" if i % 2 else HEAD + b"Content-Length: 1000\r\n\r\nabc")
        crowd.append(s)
    assert ask(server, "POST", "/predict", picture())[0] == 200
    for s in crowd:
        assert s.recv(1000).startswith(b"HTTP/1.1 408 ")
        s.close()


def threads(pid):
    with open(f"/proc/{pid}/status") as f:
        return int(re.search(r"Threads:\t(\d+)", f.read())[1])


def test_a_connection_is_one_thread(networks):
    """Whatever it decodes, normalises or sorts, however many threads a batch has"""
    process, port = start("--checkpoint", networks["float"], "--threads", 8, "--max-images", 66, "--no-access-log")
    tensor = dict(name="pixels", shape=[64, 3, 32, 32], datatype="FP32", parameters={"binary_data_size": 64 * 12288})
    text = json.dumps({"inputs": [tensor]}).encode()
    asked = [("/predict", *form(*[picture("JPEG", size=(300, 300))] * 66)),
             ("/v2/models/resnet50/infer", text + bytes(64 * 12288), dict(Inference_Header_Content_Length=len(text)))]
    kept, counts = [], []
    for path, body, headers in asked * 2:
        kept.append(http.client.HTTPConnection("127.0.0.1", port, timeout=10))
        kept[-1].request("POST", path, body, {k.replace("_", "-"): v for k, v in headers.items()})
        answer = kept[-1].getresponse()
        assert answer.status == 200, answer.read()
        answer.read()
        counts.append(threads(process.pid))
    assert [n - counts[0] for n in counts] == [0, 1, 2, 3]
    stop(process)


def test_a_crowd_of_connections_is_refused(networks):
    process, port = start("--checkpoint", networks["float"], "--max-connections", 3, "--no-access-log")
    crowd = [socket.create_connection(("127.0.0.1", port), timeout=10) for _ in range(3)]
    answer = raw(port, b"")
    assert status_of(answer) == 503 and b"Retry-After" in answer
    for s in crowd:
        s.close()
    wait_until(lambda: raw(port, b"GET /healthz HTTP/1.0\r\n\r\n").startswith(b"HTTP/1.1 200"))
    stop(process)


def test_who_gets_no_thread_is_told(bare, monkeypatch):
    def refuse(thread):
        monkeypatch.undo()
        raise RuntimeError("can't start new thread")
    monkeypatch.setattr(threading.Thread, "start", refuse)
    assert status_of(raw(bare.server_address[1], b"")) == 503
    wait_until(lambda: not bare.handlers)
    assert b"connections_refused_total 1\n" in ask(bare.server_address[1], "GET", "/metrics")[2]


def test_sighup_reads_a_changed_file_and_keeps_the_old_network_if_it_is_bad(networks, tmp_path):
    path = tmp_path / "net.pt"
    good = open(networks["float"], "rb").read()
    path.write_bytes(good)
    process, port = start("--checkpoint", path, "--no-access-log")
    image, other = picture(), build("plain", seed=9)
    other.preprocess.update(resize=40, crop=32)
    before = json.loads(ask(port, "POST", "/predict", image)[2])["top"]

    def hang_up(text):
        process.send_signal(signal.SIGHUP)
        wait_until(lambda: any(text in line for line in process.log))
        process.log.clear()
        return json.loads(ask(port, "POST", "/predict", image)[2])["top"]
    assert hang_up("unchanged") == before
    path.write_bytes(good[:5000])
    assert hang_up("NOT reloaded") == before
    resnet50.save_checkpoint(str(path), other, classes=CLASSES)
    wanted = expected(other.eval(), image).softmax(1)[0]
    after = hang_up(": reloaded")
    assert after != before and all(abs(t["probability"] - wanted[t["class_id"]]) < 2e-5 for t in after)
    stop(process)


def test_sighup_while_networks_are_read_is_answered_when_they_are(monkeypatch):
    told = []

    def too_early(number, frame):
        raise AssertionError("nobody was there yet")

    def read(args):
        os.kill(os.getpid(), signal.SIGHUP)
        return {"a": types.SimpleNamespace(network=types.SimpleNamespace(path="a"), reload=reload)}

    def reload():
        told.append("reload")
        os.kill(os.getpid(), signal.SIGTERM)
    before = signal.signal(signal.SIGHUP, too_early)
    monkeypatch.setattr(serve, "open_models", read)
    monkeypatch.setattr(serve, "settle", lambda: None)
    serve.serve(serve.get_args_parser().parse_args(["--device", "cpu", "--port", "0", "--timeout-ms", "1"]))
    assert told == ["reload"] and signal.signal(signal.SIGHUP, before) is too_early


def test_sigterm_does_not_wait_for_networks_that_are_read(monkeypatch):
    told, over, before = [], threading.Event(), threading.enumerate()

    def reload():
        told.append("reload")
        os.kill(os.getpid(), signal.SIGTERM)
        over.wait(5)

    def read(args):
        os.kill(os.getpid(), signal.SIGHUP)
        return {name: types.SimpleNamespace(network=types.SimpleNamespace(path=name), reload=reload) for name in "ab"}
    monkeypatch.setattr(serve, "open_models", read)
    monkeypatch.setattr(serve, "settle", lambda: None)
    serve.serve(serve.get_args_parser().parse_args(["--device", "cpu", "--port", "0"]))
    over.set()
    wait_until(lambda: set(threading.enumerate()) <= set(before))
    assert told == ["reload"]


def test_the_garbage_collector_has_little_to_look_through(monkeypatch):
    """And still takes a network that was replaced, though it refers to itself"""
    class Net:
        pass
    net, settle, settled = Net(), serve.settle, threading.Semaphore(0)
    net.call, old, seen = [net], [net], []
    gone = weakref.ref(net)
    del net

    def read(args):
        os.kill(os.getpid(), signal.SIGHUP)
        return {"a": types.SimpleNamespace(network=types.SimpleNamespace(path="a"), reload=reload)}

    def reload():
        seen.append(gc.get_freeze_count())
        threading.Timer(0.2, old.clear).start()  # a batch that had begun with it
        os.kill(os.getpid(), signal.SIGTERM)
    monkeypatch.setattr(serve, "open_models", read)
    monkeypatch.setattr(serve, "settle", lambda: (settle(), settled.release()))
    try:
        serve.serve(serve.get_args_parser().parse_args(["--device", "cpu", "--port", "0", "--timeout-ms", "500"]))
        assert settled.acquire(timeout=20) and settled.acquire(timeout=20)
        assert seen[0] > 100_000 < gc.get_freeze_count() and len(gc.get_objects()) < 10_000 and gone() is None
    finally:
        gc.unfreeze()


def test_no_request_fails_while_networks_are_replaced(networks, tmp_path):
    path, image = tmp_path / "net.pt", picture()
    path.write_bytes(open(networks["float"], "rb").read())
    process, port = start("--checkpoint", path, "--no-access-log")
    statuses, done = [], threading.Event()

    def hammer():
        while not done.is_set():
            statuses.append(ask(port, "POST", "/predict", image)[0])
    with concurrent.futures.ThreadPoolExecutor(4) as pool:
        clients = [pool.submit(hammer) for _ in range(4)]
        try:
            for name in ("int8", "float", "int8"):
                path.write_bytes(open(networks[name], "rb").read())
                process.log.clear()
                process.send_signal(signal.SIGHUP)
                wait_until(lambda: any(": reloaded" in line for line in process.log), process.log)
        finally:
            done.set()
    for client in clients:
        client.result()  # raises what ended it
    assert len(statuses) > 20 and set(statuses) == {200}
    stop(process)


def heaps(pid):
    """How many heaps a process has for threads: 64 MiB each, at a multiple of that, of which a part may be used"""
    with open(f"/proc/{pid}/maps") as f:
        found = [(*(int(n, 16) for n in line.split()[0].split("-")), line.split()[1]) for line in f]
    return sum(a % 2 ** 26 == 0 and (use, rest) == ("rw-p", "---p") and end == begin and last == a + 2 ** 26
               for (a, end, use), (begin, last, rest) in zip(found, found[1:]))


@pytest.mark.skipif(platform.libc_ver()[0] != "glibc", reason="about glibc's malloc")
def test_threads_share_a_heap(networks):
    process, port = start("--checkpoint", networks["float"], "--no-access-log")
    before, image = heaps(process.pid), picture()
    with concurrent.futures.ThreadPoolExecutor(8) as pool:
        assert {status for status, *_ in pool.map(lambda _: ask(port, "POST", "/predict", image), range(32))} == {200}
    assert heaps(process.pid) == before
    stop(process)


def test_mutated_requests_and_images(networks):
    """A thousand of them; python -m tests.fuzz_serve sends more"""
    process, port = start("--checkpoint", networks["float"], *LIMITS, "--no-access-log")
    seen, broken = fuzz(port, "resnet50", 32, 400)
    before = resident(process.pid)
    more, worse = fuzz(port, "resnet50", 32, 800, seed=1)
    assert not broken + worse, (broken + worse)[0]
    assert {200, 400} <= set(seen + more) and resident(process.pid) < before + 30e6
    assert ask(port, "POST", "/predict", picture())[0] == 200
    stop(process)
    assert not [line for line in process.log if "Traceback" in line], process.log


def test_sigterm_ends_idle_connections_and_finishes_the_rest(networks):
    process, port = start("--checkpoint", networks["float"], "--no-access-log")
    idle = socket.create_connection(("127.0.0.1", port), timeout=10)
    body = picture()
    busy = socket.create_connection(("127.0.0.1", port), timeout=10)
    busy.sendall(HEAD + b"Content-Length: %d\r\n\r\n%s" % (len(body), body[:-1]))
    wait_until(lambda: b"resnet50_connections 3" in ask(port, "GET", "/metrics")[2])
    process.send_signal(signal.SIGTERM)
    assert idle.recv(10) == b""
    with pytest.raises(ConnectionRefusedError):  # not left to wait for the rest
        socket.create_connection(("127.0.0.1", port), timeout=10)
    busy.sendall(body[-1:])
    answer = busy.recv(65536)
    assert answer.startswith(b"HTTP/1.1 200 ") and b"Connection: close" in answer
    assert process.wait(20) == 0


def test_who_has_connected_when_the_server_ends_is_answered(bare, monkeypatch):
    clients, shutdown = [], bare.shutdown

    def late():
        """Connections that nobody accepts any more as usual"""
        shutdown()
        for _ in range(5):
            clients.append(socket.create_connection(bare.server_address, timeout=10))
            clients[-1].sendall(b"GET /healthz HTTP/1.1\r\nHost: x\r\n\r\n" * 2)
    monkeypatch.setattr(bare, "shutdown", late)
    bare.drain()
    monkeypatch.undo()
    for client in clients:
        with client:
            answer = b"".join(iter(lambda: client.recv(65536), b""))
        assert answer.count(b"HTTP/1.1 ") == 1 == answer.count(b"HTTP/1.1 503 ") and b"Connection: close" in answer
    assert not bare.handlers


def test_a_request_that_never_ends_holds_the_end_up_for_drain_timeout(bare, monkeypatch):
    monkeypatch.setattr(bare.args, "drain_timeout", 0.05)
    with socket.create_connection(bare.server_address) as client:
        client.sendall(b"GET")
        wait_until(lambda: [handler.begun for handler in bare.handlers.values() if handler] == [True])
        drain = threading.Thread(target=bare.drain, daemon=True)
        drain.start()
        drain.join(5)
        assert bare.handlers and not drain.is_alive()


def test_drain_delay_goes_on_answering_though_not_ready(networks):
    process, port = start("--checkpoint", networks["float"], "--no-access-log", "--drain-delay", 600)
    kept = http.client.HTTPConnection("127.0.0.1", port, timeout=10)
    kept.request("GET", "/healthz")
    assert kept.getresponse().read()
    process.send_signal(signal.SIGTERM)
    wait_until(lambda: ask(port, "GET", "/v2/health/ready")[0] == 503)
    assert {"ready": False, "error": "the server ends"}.items() <= json.loads(ask(port, "GET", "/healthz")[2]).items()
    assert ask(port, "GET", "/v2/models/resnet50/ready")[0] == 503
    assert ask(port, "POST", "/predict", picture())[0] == 200  # on a new connection
    kept.request("POST", "/predict", picture())
    assert kept.getresponse().status == 200  # and on an old one
    process.kill()


@pytest.fixture(scope="module")
def tls(tmp_path_factory):
    """-> (flags for a server, a client's context)"""
    if not shutil.which("openssl"):
        pytest.skip("needs openssl to make a certificate")
    folder = tmp_path_factory.mktemp("tls")
    cert, key = folder / "cert.pem", folder / "key.pem"
    subprocess.run(["openssl", "req", "-x509", "-newkey", "rsa:2048", "-nodes", "-days", "1", "-subj", "/CN=localhost",
                    "-keyout", key, "-out", cert], check=True, capture_output=True)
    return ("--tls-cert", cert, "--tls-key", key), ssl.create_default_context(cafile=str(cert))


def test_every_end_over_tls_is_a_goodbye_and_no_answer_is_lost(networks, tls):
    process, port = start("--checkpoint", networks["float"], *tls[0], "--max-body", 100_000, "--idle-timeout", 2)

    def connect(sent):
        s = tls[1].wrap_socket(socket.create_connection(("localhost", port), timeout=10), server_hostname="localhost",
                               suppress_ragged_eofs=False)  # an end without goodbye is an error
        s.sendall(sent)
        return s

    def read(s):
        with s:
            return b"".join(iter(lambda: s.recv(65536), b""))
    get = b"GET /healthz HTTP/1.1\r\nHost: x\r\n"
    assert b" 200 " in read(connect(get + b"Connection: close\r\n\r\n"))
    assert b" 200 " in read(connect(get + b"\r\n"))  # and idle for too long
    large = connect(HEAD + b"Content-Length: 900000\r\n\r\n")
    for _ in range(9):
        large.sendall(bytes(100_000))
        time.sleep(0.02)  # it has been refused meanwhile, and may go on for a moment
    assert b" 413 " in read(large)
    busy, idle = connect(HEAD + b"Expect: 100-continue\r\nContent-Length: 1\r\n\r\n"), connect(get + b"\r\n")
    assert b" 100 " in busy.recv(65536) and b" 200 " in idle.recv(65536)
    process.send_signal(signal.SIGTERM)
    assert read(idle) == b""
    busy.sendall(b"x")
    assert b" 400 " in read(busy)
    assert process.wait(20) == 0


def test_keys_and_tls(networks, tls, tmp_path):
    (tmp_path / "keys").write_bytes(b"\xef\xbb\xbffirst \r\n\r\nsecond")  # as Windows may write it
    files = [tmp_path / "cert.pem", tmp_path / "key.pem"]
    for file, source in zip(files, tls[0][1::2]):
        shutil.copy(source, file)
    process, port = start("--checkpoint", networks["float"], "--api-key-file", tmp_path / "keys", "--tls-cert",
                          files[0], "--tls-key", files[1], "--head-timeout", 1)
    context = ssl.create_default_context(cafile=str(files[0]))

    def secure(path, **headers):
        connection = http.client.HTTPSConnection("localhost", port, context=context, timeout=10)
        connection.request("GET", path, headers={k.replace("_", "-"): v for k, v in headers.items()})
        answer = connection.getresponse()
        if path == "/openapi.json" and answer.status == 200:
            documents.append(json.load(answer))
        return answer.status
    documents = []
    assert secure("/openapi.json") == 401 and secure("/openapi.json", X_API_Key="first") == 200
    assert documents[0]["security"] == [{"bearer": []}, {"header": []}]
    unlocked = [path for path, item in documents[0]["paths"].items() if item.get("get", {}).get("security") == []]
    for path in documents[0]["paths"]:
        if "{" not in path and "get" in documents[0]["paths"][path]:
            assert secure(path) == (200 if path in unlocked else 401), path
    assert unlocked == ["/", "/healthz", "/v2/health/live", "/v2/health/ready"]
    assert secure("/v2") == 401 and secure("/v2", Authorization="Bearer third") == 401
    assert secure("/v2", Authorization="Bearer second") == 200 == secure("/v2", Authorization="bearer  second")
    assert 200 == secure("/v2", X_API_Key="first") == secure("/healthz")
    with contextlib.suppress(ConnectionResetError):
        assert not raw(port, b"GET /healthz HTTP/1.1\r\nHost: x\r\n\r\n").startswith(b"HTTP/1.1")
    with socket.create_connection(("localhost", port), timeout=10) as silent:  # has no more than --head-timeout
        assert silent.recv(1) == b""
    assert secure("/healthz") == 200
    # renewed, and then one file that is bad, which changes nothing
    subprocess.run(["openssl", "req", "-x509", "-days", "1", "-subj", "/CN=other", "-key", files[1], "-out", files[0]],
                   check=True, capture_output=True)
    renewed = files[0].read_text()
    for keys, cert, told in (("third", renewed, "unchanged"), ("first", "", "cert.pem"), ("", renewed, "no key"),
                             ("f\0i\0r\0s\0t\0", renewed, "no header")):
        files[0].write_text(cert)
        (tmp_path / "keys").write_text(keys)
        process.send_signal(signal.SIGHUP)
        wait_until(lambda: any("unchanged" in line for line in process.log))
        assert any(told in line for line in process.log) and ssl.get_server_certificate(("localhost", port)) == renewed
        context.check_hostname, context.verify_mode = False, ssl.CERT_NONE
        assert secure("/v2", X_API_Key="third") == 200 and secure("/v2", X_API_Key="first") == 401
        process.log.clear()
    stop(process)


def test_behind_nginx_as_the_readme_has_it(server, net, tmp_path):
    path = shutil.which("nginx") or "/usr/sbin/nginx"
    if not os.path.exists(path):
        pytest.skip("needs nginx")
    with open(os.path.join(ROOT, "README.md"), encoding="utf-8") as f:
        block, front = re.search(r"```nginx\n(.*?)```", f.read(), re.S)[1], free_port()
    block = block.replace("127.0.0.1:8000", f"127.0.0.1:{server}").replace("listen 8080", f"listen 127.0.0.1:{front}")
    places = "".join(f"{kind}_temp_path {tmp_path};\n" for kind in ("client_body", "proxy", "fastcgi", "uwsgi", "scgi"))
    (tmp_path / "nginx.conf").write_text(
        f"user {pwd.getpwuid(os.getuid()).pw_name};\ndaemon off;\npid {tmp_path}/pid;\nerror_log {tmp_path}/log;\n"
        f"events {{}}\nhttp {{\naccess_log off;\n{places}{block}}}\n")
    nginx = subprocess.Popen([path, "-c", tmp_path / "nginx.conf", "-p", tmp_path, "-e", tmp_path / "log"])
    try:
        wait_until(lambda: socket.socket().connect_ex(("127.0.0.1", front)) == 0)
        for _ in range(3):
            found = json.loads(ask(front, "POST", "/predict", picture())[2])
            assert found["class_id"] == expected(net, picture()).argmax()
        assert ask(front, "GET", "/metrics")[0] == 403 and ask(server, "GET", "/metrics")[0] == 200
        assert ask(front, "POST", "/predict", bytes(400_000))[0] == 413  # the server's own limit in these tests
    finally:
        nginx.terminate()
        nginx.wait()


def test_processes_share_a_port_and_a_killed_one_is_replaced(networks):
    """Under load: nothing is lost but what the killed process had in work or in its queue."""
    port = free_port()
    process = start("--checkpoint", networks["float"], "--processes", 2, "--port", port, "--no-access-log", wait=False)
    children = [json.loads(process.stdout.readline())["pid"] for _ in range(2)]
    assert {json.loads(ask(port, "POST", "/predict", picture())[2])["model"] for _ in range(4)} == {"resnet50"}
    lost, answered, over = [], [], threading.Event()

    def go_on():
        while not over.is_set():
            try:
                answered.append(ask(port, "POST", "/predict", picture())[0])
            except ConnectionError as error:
                lost.append(error)
    clients = [threading.Thread(target=go_on) for _ in range(4)]
    for client in clients:
        client.start()
    wait_until(lambda: len(answered) >= 8)
    os.kill(children[0], signal.SIGKILL)
    children.append(json.loads(process.stdout.readline())["pid"])

    def go_on_for(count):
        enough = len(answered) + count
        wait_until(lambda: len(answered) >= enough)
    go_on_for(8)
    by_then = len(lost)  # of each client what was in work, and what came to its queue while the system took that down
    go_on_for(16)
    over.set()
    for client in clients:
        client.join()
    assert set(answered) == {200} and by_then == len(lost) <= 2 * len(clients)
    os.kill(children[2], signal.SIGKILL)  # again, and at once: the next one lets the others work first
    assert json.loads(process.stdout.readline())["pid"] not in children
    process.send_signal(signal.SIGTERM)
    told = process.wait(20), process.stderr.read()
    assert told[0] == 0 and re.findall(r"another takes its place(.*)", told[1]) == ["", " in 1 s"]


def test_a_process_that_cannot_start_any_more_does_not_end_the_others(monkeypatch, capsys):
    """The first is up; all others end as they do where a checkpoint has gone bad."""
    first = multiprocessing.get_context("fork").Lock()

    def child(args, up, pause):
        signal.set_wakeup_fd(-1)
        signal.signal(signal.SIGTERM, signal.SIG_DFL)
        signal.pthread_sigmask(signal.SIG_UNBLOCK, serve.SIGNALS)
        if first.acquire(block=False):
            up[0] = 1
            signal.pause()
        while not up[0]:
            time.sleep(0.001)
        if pause == 3:
            os.kill(os.getppid(), signal.SIGTERM)
        os._exit(3)
    monkeypatch.setattr(serve, "child", child)
    port = str(free_port())
    serve.supervise(serve.get_args_parser().parse_args(["--device", "cpu", "--processes", "2", "--port", port]))
    assert re.findall(r"another takes its place(.*)", capsys.readouterr().err) == ["", " in 1 s", " in 3 s"]


def test_processes_end_with_their_parent(networks):
    port = free_port()
    process = start("--checkpoint", networks["float"], "--processes", 2, "--port", port, wait=False)
    for _ in range(2):
        assert process.stdout.readline()
    assert ask(port, "GET", "/healthz")[0] == 200
    process.kill()

    def refused():
        with socket.socket() as s:
            return s.connect_ex(("127.0.0.1", port))
    wait_until(refused)


@pytest.mark.parametrize("soft, hard, files, connections", [
    (100, 200, 200, 136), (60, 60, 60, 1), (256, 4096, 1088, 1024), (4000, 4000, 4000, 1024), (-1, -1, -1, 1024)])
def test_connections_fit_into_the_open_files(monkeypatch, capsys, soft, hard, files, connections):
    limits = [(soft, hard)]
    monkeypatch.setattr(serve.resource, "getrlimit", lambda which: limits[-1])
    monkeypatch.setattr(serve.resource, "setrlimit", lambda which, limit: limits.append(limit))
    args = serve.get_args_parser().parse_args(["--device", "cpu"])
    serve.check_args(args)
    assert limits[-1] == (files, hard) and args.max_connections == connections
    assert (f"only {connections} connections" in capsys.readouterr().err) == (connections < 1024)


def test_processes_try_their_device_themselves(monkeypatch):
    """CUDA that the parent has started would not survive the fork."""
    process = start("--device", "cuda:9", "--processes", 2, "--port", free_port(), wait=False)
    assert process.wait(60) == 2 and "--device cuda:9: " in process.stderr.read()
    monkeypatch.setattr(torch, "zeros", None)
    monkeypatch.setattr(torch.cuda, "is_available", None)
    serve.check_args(serve.get_args_parser().parse_args(["--device", "cuda", "--processes", "2"]))


@pytest.mark.parametrize("variant", ["plain", "se", "split"])
@pytest.mark.parametrize("precision", ["float", "bfloat16", "int8"])
def test_a_network_spread_over_devices(variant, precision):
    """Steps go from one device to the next, each device visited once, and compute the same."""
    model, pixels = build(variant), photographs(2, 32, 32)
    whole = (compress.post_training(model, [pixels]) if precision == "int8" else
             resnet50.fuse(model, torch.bfloat16 if precision == "bfloat16" else torch.float32))
    wanted = resnet50.predict(whole, pixels)
    visited = []

    class Device(str):
        """cpu, as one of several that can be told apart"""
    names = [Device("cpu"), Device("cpu"), Device("cpu")]
    net = serve.spread(whole, names)
    inner = torch.Tensor.to

    def to(tensor, device, *args, **kwargs):
        if isinstance(device, Device) and (not visited or visited[-1] is not device):
            visited.append(device)
        return inner(tensor, device, *args, **kwargs)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(torch.Tensor, "to", to)
        got = resnet50.predict(net, pixels)
    assert len(visited) == 3 and all(a is b for a, b in zip(visited, names))  # one after the other, each once
    one_call = precision != "int8" and whole.plan() is not None  # which rounds batch-norms into the weights
    error = one_call * (0.03 if precision == "bfloat16" else 1e-6)
    assert (got - wanted).abs().max() <= error * wanted.abs().max()


def test_what_would_expire_in_the_queue_is_refused(networks):
    args = serve.get_args_parser().parse_args(["--device", "cpu", "--checkpoint", networks["float"]])
    model = serve.Model("float", args, networks["float"])
    now = time.monotonic()
    with model.expecting(2, now + 100):
        ticket = submit(model, photographs(2, 32, 32))
    assert ticket.exception(100) is None and model.pace > 0
    model.pace = 10.0
    with model.expecting(5, now - 1):  # nothing is ahead of these
        with model.expecting(1, now + 100), pytest.raises(serve.Refusal, match="6 images wait, which") as refused:
            with model.expecting(1, now + 55):
                pass
        assert refused.value.status == 503 and refused.value.headers["Retry-After"] == "60"
    assert model.coming == 0


def test_large_jpegs_are_decoded_at_reduced_size(networks):
    args = serve.get_args_parser().parse_args(["--device", "cpu", "--checkpoint", networks["float"]])
    model, gate = serve.Model("float", args, networks["float"]), contextlib.nullcontext
    values = np.random.default_rng(1).normal(0, 1, (30, 40, 3)).cumsum(0).cumsum(1)
    values = Image.fromarray(np.uint8(255 * (values - values.min()) / np.ptp(values)))
    for size, reduced in ((159, False), (640, True), (1280, True)):
        file = io.BytesIO()
        values.resize((size * 4 // 3, size), Image.BICUBIC).save(file, "JPEG", quality=95)
        fast = serve.decode(model.network, file.getvalue(), args, gate).astype(int)
        args.full_decode = True
        full = serve.decode(model.network, file.getvalue(), args, gate).astype(int)
        args.full_decode = False
        assert (fast != full).any() == reduced and np.abs(fast - full).max() <= 3


@pytest.mark.parametrize("flags, code, text", [
    (("--device", "cuda:9", "--checkpoint", "FLOAT"), 2, "--device cuda:9"),
    (("--checkpoint", "nowhere.pt"), 3, "nowhere.pt: No such file"),
    (("--model", "a"), 2, "--model a: expected NAME=FILE"),
    (("--model", "stats=x"), 2, "expected NAME=FILE"),
    (("--model", "a=x", "--model", "a=y"), 2, "each name once"), (("--model", "../a=x"), 2, "expected NAME=FILE"),
    (("--tls-cert", "x"), 2, "go together"),
    (("--api-key-file", "nowhere", "--checkpoint", "FLOAT"), 3, "nowhere: No such"),
    (("--processes", "2", "--port", "0"), 2, "needs a --port"), (("--port", "70000"), 2, "must lie in"),
    (("--processes", "2", "--checkpoint", "nowhere.pt"), 3, "a process ended by itself with status 3"),
    (("--host", "256.1.1.1", "--checkpoint", "FLOAT"), 2, "--host 256.1.1.1")])
def test_bad_flags_are_one_line(networks, capsys, flags, code, text):
    flags = [networks["float"] if f == "FLOAT" else f for f in flags]
    with pytest.raises((resnet50.UserError, SystemExit)) as caught:
        serve.main(serve.get_args_parser().parse_args(["--device", "cpu", *flags]))
    assert caught.value.code == code and text in (str(caught.value) + capsys.readouterr().err)
    assert signal.set_wakeup_fd(-1) == -1 and signal.getsignal(signal.SIGTERM) is signal.SIG_DFL


# --------------------------------------------------------------------------------------------------- the page

class Browser:
    """A headless Chromium, by the DevTools protocol over a pair of pipes: NUL-terminated JSON."""

    def __init__(self, path, profile):
        there, self.write = os.pipe()
        self.read, back = os.pipe()
        command = f"exec {path} --headless=new --no-sandbox --disable-gpu --disable-dev-shm-usage --no-first-run " \
            f"--user-data-dir={profile} --remote-debugging-pipe about:blank 3<&{there} 4>&{back}"
        self.process = subprocess.Popen(["bash", "-c", command], pass_fds=(there, back), stdout=subprocess.DEVNULL,
                                        stderr=subprocess.DEVNULL)
        os.close(there)
        os.close(back)
        self.buffer, self.count, self.events, self.session = b"", 0, [], None
        page = next(t for t in self("Target.getTargets")["targetInfos"] if t["type"] == "page")
        self.session = self("Target.attachToTarget", targetId=page["targetId"], flatten=True)["sessionId"]

    def message(self):
        while b"\0" not in self.buffer:
            part = os.read(self.read, 1 << 20)
            assert part, "the browser went away"
            self.buffer += part
        text, _, self.buffer = self.buffer.partition(b"\0")
        return json.loads(text)

    def __call__(self, method, **params):
        self.count += 1
        call = dict(id=self.count, method=method, params=params)
        if self.session:
            call["sessionId"] = self.session
        os.write(self.write, json.dumps(call).encode() + b"\0")
        while (answer := self.message()).get("id") != self.count:
            self.events.append(answer)
        assert "error" not in answer, answer
        return answer["result"]

    def value(self, expression):
        return self("Runtime.evaluate", expression=expression, returnByValue=True)["result"].get("value")

    def close(self):
        self.process.kill()
        self.process.wait()
        os.close(self.write)
        os.close(self.read)


def test_the_page_in_a_browser(server, net, tmp_path):
    path = shutil.which("chromium") or shutil.which("google-chrome")
    if not path:
        pytest.skip("needs Chromium")
    image, wrong = tmp_path / "picture.png", tmp_path / "wrong.png"
    image.write_bytes(picture())
    wrong.write_bytes(b"no picture")
    best = int(expected(net, picture()).argmax())
    browser = Browser(path, tmp_path / "profile")
    try:
        for domain in ("Page", "Runtime", "Log", "DOM"):
            browser(domain + ".enable")
        browser("Emulation.setDeviceMetricsOverride", width=360, height=740, deviceScaleFactor=1, mobile=True)
        browser("Page.navigate", url=f"http://127.0.0.1:{server}/")
        wait_until(lambda: browser.value("document.readyState") == "complete" and browser.value("charts.length") == 3)

        def choose(file):
            node = browser("DOM.querySelector", nodeId=browser("DOM.getDocument")["root"]["nodeId"], selector="#file")
            browser("DOM.setFileInputFiles", files=[str(file)], nodeId=node["nodeId"])
        choose(image)
        wait_until(lambda: browser.value("$('bars').children.length") == 5)
        assert browser.value("$('bars').children[0].textContent").startswith(CLASSES[best] + " ")
        assert browser.value("$('picture').naturalWidth") == 60 and "float: decoded in" in browser.value(
            "$('timings').textContent")
        assert browser.value("document.documentElement.scrollWidth") <= 360
        wait_until(lambda: browser.value("charts[0].values.length") >= 2)
        assert "images per second" in browser.value("charts[0].caption.textContent")
        choose(wrong)
        wait_until(lambda: browser.value("$('error').textContent"))
        assert "not an image" in browser.value("$('error').textContent") and browser.value(
            "$('bars').children.length") == 0
        browser.value("show([], '', '')")  # what is dropped says why it is no image, too
        browser.value("""(() => { const dropped = new DataTransfer(); dropped.items.add(new File(["x"], "a.pdf"));
            document.dispatchEvent(new DragEvent("drop", {dataTransfer: dropped})); })()""")
        wait_until(lambda: "not an image" in browser.value("$('error').textContent"))
        browser.value("""window.ask = window.fetch; window.asked = []; lasts = {}; window.fetch = (...a) =>
            a[0] == "metrics" ? Promise.resolve(new Response("denied", {status: 403})) :
            new Promise(done => asked.push(done)); 0""")
        for file in (wrong, image, wrong):
            choose(file)
        wait_until(lambda: browser.value("asked.length") == 3)
        found = json.dumps({"top": [{"class": "<b>", "probability": 1}], "timings": {}, "model": "m"})
        browser.value(f"asked[0](new Response({json.dumps(found)})); 0")  # late answers to what is not shown any more
        browser.value("asked[1](new Response('<html>', {status: 502})); 0")
        browser.value("new Promise(done => setTimeout(done, 0))")
        assert browser.value("$('bars').children.length + $('error').textContent") == "0"
        browser.value("asked[2](new Response('<html>', {status: 429, statusText: 'Too Many Requests'})); 0")
        wait_until(lambda: browser.value("$('error').textContent") == "429 Too Many Requests")
        choose(image)
        wait_until(lambda: browser.value("asked.length") == 4)
        assert browser.value("$('error').textContent") == ""
        browser.value(f"asked[3](new Response({json.dumps(found)})); 0")
        wait_until(lambda: browser.value("$('bars').textContent") == "<b> 100.0 %")
        keyed = json.dumps(found.replace("<b>", "<k>"))
        browser.value(f"""window.prompt = text => text == "API key" && "k"; window.fetch = (path, {{headers}}) =>
            Promise.resolve(new Response({keyed}, {{status: headers["X-API-Key"] != "k" ? 401 :
            path == "metrics" ? 403 : 200}})); 0""")
        choose(image)
        wait_until(lambda: browser.value("$('bars').textContent") == "<k> 100.0 %")
        before = browser.value("charts[0].values.length")
        browser.value("window.polls = 0; window.metrics = window.fetch; window.fetch = (...a) => { polls += 1; "
                      "return metrics(...a); }; 0")
        wait_until(lambda: browser.value("polls") >= 2)
        assert browser.value("charts[0].values.length") == before
        browser.value("""window.counts = [[1, 100, 10], [2, 0, 9], [1, 110, 12]]; window.fetch = () => {
            const [process, images, seconds] = counts.shift() ?? [0, 0, 0];
            return Promise.resolve(new Response(`resnet50_process_id ${process}\nresnet50_images_total{} ${images}\n` +
                                                `resnet50_uptime_seconds ${seconds}\n`)); };
            charts[0].values = []; poll(); poll(); poll(); 0""")  # two processes answer by turns
        wait_until(lambda: browser.value("charts[0].values.length"))
        assert browser.value("charts[0].values.slice(0, 1)") == [5]
        browser.value("window.fetch = window.ask; 0")
        browser("Page.setInterceptFileChooserDialog", enabled=True)  # the keyboard alone opens the dialogue
        for _ in range(2):
            for kind in ("rawKeyDown", "keyUp"):
                browser("Input.dispatchKeyEvent", type=kind, key="Tab", code="Tab", windowsVirtualKeyCode=9)
            if browser.value("document.activeElement.id") == "drop":
                break
        assert browser.value("document.activeElement.id") == "drop"
        for kind in ("rawKeyDown", "keyUp"):
            browser("Input.dispatchKeyEvent", type=kind, key="Enter", code="Enter", windowsVirtualKeyCode=13)
        wait_until(lambda: browser.value("1") and any(e.get("method") == "Page.fileChooserOpened"
                                                      for e in browser.events))
        wrongs = [e for e in browser.events if e.get("method") == "Runtime.exceptionThrown" or
                  e.get("method") == "Log.entryAdded" and "400" not in e["params"]["entry"]["text"]]
        assert not wrongs, wrongs
    finally:
        browser.close()
