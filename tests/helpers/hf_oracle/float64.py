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


def exact(make):
    """The model that ``make()`` builds with float64 parameters, set up to compute without float32's rounding.

    It has to run under ``computing_in(torch.float64)``. Results in float32 depend on the CPU, because its vector width
    decides the order of sums; these do not, to float32's last bit.
    """
    with computing_in(torch.float64):
        enter_rotary()  # constructors compute rotary frequencies
        try:
            model = make()
        finally:
            leave_rotary()
    for module in model.modules():
        if "RotaryEmbedding" in type(module).__name__:
            module.register_forward_pre_hook(enter_rotary)
            module.register_forward_hook(leave_rotary, always_call=True)
    return model


def enter_rotary(*_):
    """A forward pre-hook of rotary modules."""
    _Float64.in_rotary_module = True


def leave_rotary(*_):
    """A forward hook of rotary modules."""
    _Float64.in_rotary_module = False
