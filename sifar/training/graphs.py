"""CUDA graphs: the kernels of a step are recorded once, and then started as one piece.

A GPU is done with the some 500 kernels of a small batch before its host has started them all."""
import torch
from fastai.learner import Callback

from .callbacks import unwrap
from .precision import needs_autocast


class CudaGraphs(Callback):
    """The forward and backward passes of training batches as CUDA graphs, one pair for each shape of images.

    The optimizer and the callbacks run as usual. dtype: of the forward pass, as Precision has it."""
    # after Precision (10), whose forward pass this replaces, and after all that changes the images
    order = 20
    run_valid = False

    def __init__(self, dtype): self.dtype = dtype

    def before_fit(self): self.passes = {}

    def before_batch(self):
        x = self.x.as_subclass(torch.Tensor)
        # a model that is partly frozen has other kernels
        key = x.shape, sum(p.requires_grad for p in self.model.parameters())
        unwrap(self.model)
        if key not in self.passes: self.passes[key] = self.record(x)

        def replay(x):
            unwrap(self.model)                          # for this pass only
            return self.passes[key](x.as_subclass(torch.Tensor))
        self.model.forward = replay

    def record(self, x):
        "The recorded passes of images like `x` (n,3,h,w), as a function that autograd knows."
        # recording runs the model a few times, which must not reach the statistics of its BatchNorms
        kept = [b.clone() for b in self.model.buffers()]
        with torch.autocast("cuda", self.dtype, needs_autocast(self.dtype), cache_enabled=False):
            torch.cuda.make_graphed_callables(self.model, (x.clone(),))
        for b, old in zip(self.model.buffers(), kept): b.copy_(old)
        return self.model.__dict__.pop("forward")       # where torch has put it

    def after_cancel_batch(self): unwrap(self.model)
    def after_fit(self): self.passes = {}


class Recorded:
    """A function of a list of tensors on a GPU: run at its first call, recorded at the second, then replayed.

    The first call is a warm-up, in which libraries set themselves up. What it returns is overwritten by the
    next call. The function must depend on nothing but its inputs."""

    def __init__(self, function): self.function, self.calls = function, 0

    def __call__(self, tensors):
        self.calls += 1
        if self.calls == 1: return self.function(tensors)
        if self.calls == 2: self.record(tensors)
        torch._foreach_copy_(self.inputs, tensors)
        self.graph.replay()
        return self.outputs

    def record(self, tensors):
        self.inputs, self.graph = [t.clone() for t in tensors], torch.cuda.CUDAGraph()
        with torch.cuda.graph(self.graph): self.outputs = self.function(self.inputs)
