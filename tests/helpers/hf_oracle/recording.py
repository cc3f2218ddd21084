"""Records what the modules of a transformers model take and give."""

import sys
from collections import defaultdict
from contextlib import contextmanager

import torch


class Recorder:
    """Keeps what modules take and give, in call order, under the names given to them."""

    def __init__(self):
        self.seen = defaultdict(list)
        self.handles = []

    def input(self, name, module):
        def hook(_, args, kwargs):
            self.seen[name].append(args[0] if args else kwargs["hidden_states"])

        self.handles.append(module.register_forward_pre_hook(hook, with_kwargs=True))

    def output(self, name, module, item=0):
        def hook(_, __, out):
            self.seen[name].append(out if isinstance(out, torch.Tensor) else out[item])

        self.handles.append(module.register_forward_hook(hook))

    def one(self, name):
        (tensor,) = self.seen[name]
        return tensor

    def stack(self, name):
        return torch.stack(self.seen[name])

    def __enter__(self):
        return self

    def __exit__(self, *_):
        for handle in self.handles:
            handle.remove()


@contextmanager
def attention_recorded(modules):
    """Yields a list per attention module, of ``(scores, probs)`` of its every call; masked scores are NaN."""
    calls = defaultdict(list)
    files = {sys.modules[type(module).__module__] for module in modules}
    eager = {file: file.eager_attention_forward for file in files}

    def record(file):
        def forward(module, query, key, value, attention_mask, *args, **kwargs):
            out, probs = eager[file](module, query, key, value, attention_mask, *args, **kwargs)
            scores = query @ key.repeat_interleave(query.shape[1] // key.shape[1], 1).mT * kwargs["scaling"]
            calls[module].append((scores.masked_fill(probs == 0, torch.nan), probs))
            return out, probs

        return forward

    for file in files:
        file.eager_attention_forward = record(file)
    try:
        yield calls
    finally:
        for file in files:
            file.eager_attention_forward = eager[file]
