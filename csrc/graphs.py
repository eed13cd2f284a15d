"""A network on CUDA as one launch: its kernels recorded once per shape of input, then replayed together (CUDA graphs,
which cost the CPU some 10 us where a hundred launches cost a millisecond)."""
import threading

import torch

KEPT = 8  # shapes; each holds memory for a whole pass


class Graphs:
    """function(x) -> tensor, for inference, its result in memory of the caller's own. Threads may call at once: one
    runs after the other. The first call with a shape runs the function itself, to warm up, then records."""

    def __init__(self, function):
        self.function, self.recorded, self.lock = function, {}, threading.Lock()

    @torch.no_grad()
    def __call__(self, x):
        stream = torch.cuda.current_stream(x.device)
        if torch.cuda.is_current_stream_capturing():  # someone records more than this network
            return self.function(x)
        with self.lock, torch.cuda.device(x.device):
            key = x.device, x.dtype, x.shape
            graph, static, result, done = self.recorded.pop(key, None) or self.record(x)
            self.recorded[key] = graph, static, result, done
            if len(self.recorded) > KEPT:
                self.recorded.pop(next(iter(self.recorded)))
            stream.wait_event(done)  # the call before may run on another stream, in the same memory
            static.copy_(x)
            graph.replay()
            copy = result.clone()
            done.record(stream)
            return copy

    def record(self, x):
        static, stream = x.clone(), torch.cuda.Stream(x.device)
        stream.wait_stream(torch.cuda.current_stream(x.device))
        with torch.cuda.stream(stream):
            self.function(static)
        torch.cuda.current_stream(x.device).wait_stream(stream)
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            result = self.function(static)
        return graph, static, result, torch.cuda.Event()
