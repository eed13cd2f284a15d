"""A network on CUDA as one launch: its kernels recorded once per size of input, then replayed together (CUDA graphs,
which cost the CPU some 10 us where a hundred launches cost a millisecond)."""
import threading

import torch

KEPT = 16  # sizes; each holds memory for a whole pass
RECORDING = threading.RLock()  # PyTorch records one graph at a time, in whatever thread


def bucket(n):
    """-> the batch that n images are filled up to: each size is recorded apart, so there are few"""
    return 1 << (n - 1).bit_length() if n <= 32 else -(-n // 32) * 32


class Graphs:
    """function(x) -> tensor, for inference, x (N, C, H, W) NHWC and its result (N, ...) in memory of the caller's own.
    Threads may call at once: one runs after the other. The first call with a size runs the function itself, to warm up,
    then records. ways(N) -> keyword arguments, each a dict, with which the function gives the same: where there are
    several, each is recorded, and the fastest kept.

    Batches are filled up to bucket(N) with what lay there, so rows must not depend on each other. An int8 network's are
    the same to the bit in any batch. In half precision a row's bits are those of its bucket: with another size sums
    along k are split otherwise (conv.cuh, parts_of; cuBLAS in the classifier)."""

    def __init__(self, function, ways=lambda n: [{}]):
        self.function, self.ways, self.lock = function, ways, threading.Lock()
        self.recorded, self.chosen = {}, {}  # by size; the way, by N

    @torch.inference_mode(False)  # memory of inference mode could not be written to by later calls outside of it
    @torch.no_grad()
    def __call__(self, x):
        with torch.cuda.device(x.device):
            if torch.cuda.is_current_stream_capturing():  # someone records more than this network
                return self.function(x)
            with self.lock:
                n, stream = len(x), torch.cuda.current_stream()
                key = x.device, x.dtype, bucket(n), x.shape[1:]
                graph, static, result, done = self.recorded.pop(key, None) or self.record(x)
                self.recorded[key] = graph, static, result, done
                if len(self.recorded) > KEPT:
                    self.recorded.pop(next(iter(self.recorded)))
                stream.wait_event(done)  # the call before may run on another stream, in the same memory
                static[:n].copy_(x)
                graph.replay()
                copy = result[:n].clone()
                done.record(stream)
                return copy

    def record(self, x):
        static = x.new_zeros(bucket(len(x)), *x.shape[1:]).to(memory_format=torch.channels_last)
        # of another pool than most streams: PyTorch hands 32 out in turn, so it could be one on which another thread
        # works, whose kernels would be recorded here instead of run
        stream, ways = torch.cuda.Stream(priority=-1), self.ways(len(static))
        best, least = None, float("inf")
        with RECORDING:
            stream.wait_stream(torch.cuda.current_stream())
            for way in ways:
                with torch.cuda.stream(stream):
                    self.function(static, **way)
                # it waits for the device first; other threads may allocate pinned memory meanwhile
                graph = torch.cuda.CUDAGraph()
                with torch.cuda.graph(graph, stream=stream, capture_error_mode="thread_local"):
                    result = self.function(static, **way)
                time = milliseconds(graph) if len(ways) > 1 else 0
                if time < least:
                    best, least, self.chosen[len(static)] = (graph, static, result), time, way
        return *best, torch.cuda.Event()


def milliseconds(graph):
    """How long the graph takes: the least of a few times."""
    times = []
    for _ in range(4):
        begin, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        graph.replay()  # the device is at work while the others are launched
        begin.record()
        for _ in range(3):
            graph.replay()
        end.record()
        end.synchronize()
        times.append(begin.elapsed_time(end) / 3)
    return min(times)
