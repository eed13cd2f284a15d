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
    then records.

    Batches are filled up to bucket(N) with what lay there, so rows must not depend on each other. An int8 network's are
    the same to the bit in any batch. In half precision a row's bits are those of its bucket: with another size sums
    along k are split otherwise (conv.cuh, parts_of; cuBLAS in the classifier)."""

    def __init__(self, function):
        self.function, self.recorded, self.lock = function, {}, threading.Lock()

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
        stream, graph = torch.cuda.Stream(priority=-1), torch.cuda.CUDAGraph()
        with RECORDING:
            stream.wait_stream(torch.cuda.current_stream())
            with torch.cuda.stream(stream):
                self.function(static)
            # it waits for the device first; other threads may allocate pinned memory meanwhile
            with torch.cuda.graph(graph, stream=stream, capture_error_mode="thread_local"):
                result = self.function(static)
        return graph, static, result, torch.cuda.Event()
