"""What the vendors publish about accelerators, for estimates and utilisation."""

from typing import NamedTuple


class Chip(NamedTuple):
    """One chip.

    flops_per_second: of dense bfloat16 matmuls. memory_bytes: that a program may use; of TPUs as their compiler says,
    which is less than is published. memory_bandwidth, link_bandwidth: bytes a second from its memory, and to its
    neighbours.
    """

    flops_per_second: float
    memory_bytes: float
    memory_bandwidth: float
    link_bandwidth: float


#: By the first part of a topology's name. Memory as published: 16, 95 and 32 GB.
TPUS = {
    "v5e": Chip(197e12, 15.75 * 2**30, 819e9, 200e9),
    "v5p": Chip(459e12, 95.74 * 2**30, 2765e9, 600e9),
    "v6e": Chip(918e12, 31.25 * 2**30, 1640e9, 448e9),
}
#: By name: the SXM modules, with NVLink.
GPUS = {
    "A100 80GB": Chip(312e12, 80e9, 2039e9, 300e9),
    "H100 SXM": Chip(989e12, 80e9, 3350e9, 450e9),
    "H200 SXM": Chip(989e12, 141e9, 4800e9, 450e9),
}
#: By the beginning of what JAX calls a device's kind; the first that fits counts.
CHIP_KINDS = {
    "TPU v5 lite": TPUS["v5e"],
    "TPU v6 lite": TPUS["v6e"],
    "TPU v5": TPUS["v5p"],
    "NVIDIA H100": GPUS["H100 SXM"],
    "NVIDIA H200": GPUS["H200 SXM"],
    "NVIDIA A100": GPUS["A100 80GB"],
}


def chip(kind: str) -> Chip | None:
    """The chip of a device's kind; None if it is not known, such as a CPU's."""
    return next((chip for name, chip in CHIP_KINDS.items() if kind.startswith(name)), None)
