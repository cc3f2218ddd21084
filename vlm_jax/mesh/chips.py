"""What the vendors publish about the chips that programs are planned for and measured on."""

from typing import NamedTuple


class Chip(NamedTuple):
    """One chip: FLOP/s in bfloat16 (dense), bytes a second from its memory and to its neighbours; of TPUs also the
    bytes that a program may use, which their compiler says."""

    flops: float
    memory: float
    links: float
    hbm: float | None = None


#: By the first part of a topology's name.
TPUS = {
    "v5e": Chip(197e12, 819e9, 200e9, 15.75 * 2**30),
    "v5p": Chip(459e12, 2765e9, 600e9, 95.74 * 2**30),
    "v6e": Chip(918e12, 1640e9, 448e9, 31.25 * 2**30),
}
#: By the beginning of what JAX calls a device's kind.
CHIP_KINDS = {
    "TPU v5 lite": TPUS["v5e"],
    "TPU v6 lite": TPUS["v6e"],
    "TPU v5": TPUS["v5p"],
    "NVIDIA H100": Chip(989e12, 3350e9, 450e9),
    "NVIDIA H200": Chip(989e12, 4800e9, 450e9),
    "NVIDIA A100": Chip(312e12, 2039e9, 300e9),
}


def chip(kind: str) -> Chip | None:
    """That of a device's kind; None where it is not known, as a CPU's."""
    return next((chip for name, chip in CHIP_KINDS.items() if kind.startswith(name)), None)
