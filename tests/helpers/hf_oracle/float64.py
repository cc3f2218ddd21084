"""transformers computing in float64, whose results are the same on every CPU to float32's last bit."""

from contextlib import contextmanager

import torch
from torch.overrides import TorchFunctionMode


class _Float64(TorchFunctionMode):
    """Reads every float32 that PyTorch code asks for as float64, except in rotary modules.

    A model whose weights are float64 is not a float64 program yet: transformers computes norms, softmax and
    interpolation weights in float32 by name. Rotary angles stay float32, because their rounding belongs to the model:
    an angle of 500 radians is a multiple of 3e-5, in training as in vlm_jax. The powers behind them and their sines
    and cosines are computed in float64, because libraries round these differently.
    """

    in_rotary_module = False

    def __torch_function__(self, function, types, args=(), kwargs=None):
        kwargs = kwargs or {}
        if not self.in_rotary_module:
            function = torch.Tensor.double if function is torch.Tensor.float else function
            args = [torch.float64 if arg is torch.float32 else arg for arg in args]
            kwargs = {name: torch.float64 if arg is torch.float32 else arg for name, arg in kwargs.items()}
        elif function is torch.Tensor.__rpow__:
            exponent, base = args
            return function(exponent.double(), base).float()
        elif function in (torch.Tensor.cos, torch.Tensor.sin):
            return function(args[0].double())
        return function(*args, **kwargs)


@contextmanager
def computing_in(dtype):
    """PyTorch code that says float32, or says nothing, computes in float64 if that is ``dtype``."""
    if dtype != torch.float64:
        yield
        return
    default = torch.get_default_dtype()
    torch.set_default_dtype(torch.float64)
    try:
        with _Float64():
            yield
    finally:
        torch.set_default_dtype(default)


def enter_rotary(*_):
    """A forward pre-hook of rotary modules."""
    _Float64.in_rotary_module = True


def leave_rotary(*_):
    """A forward hook of rotary modules."""
    _Float64.in_rotary_module = False
