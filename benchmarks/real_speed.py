"""One side of the comparison of generation in benchmarks/real.py: prints the CPU and clock seconds of 64 new tokens.

python -m benchmarks.real_speed SIDE FOLDER BATCH
"""

import os
import sys
import time
from collections.abc import Callable
from pathlib import Path

import numpy as np

NEW, PROMPT = 64, 24


def transformers_side(folder: Path, ids: np.ndarray) -> Callable[[], object]:
    import torch
    from transformers import AutoModelForCausalLM

    torch.set_num_threads(len(os.sched_getaffinity(0)))
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()
    options = {"max_new_tokens": NEW, "min_new_tokens": NEW, "do_sample": False, "pad_token_id": 2}
    tokens = torch.tensor(ids)
    with torch.inference_mode():
        model.generate(tokens, **options)

    def run():
        with torch.inference_mode():
            return model.generate(tokens, **options)

    return run


def our_side(folder: Path, ids: np.ndarray, **options) -> Callable[[], object]:
    import vlm_jax

    model, _ = vlm_jax.load(folder, **options)
    inputs = vlm_jax.Inputs.from_hf(model.config, input_ids=ids)
    # An end token that no row writes, so that all tokens are made.
    return lambda: np.asarray(vlm_jax.generate(model, inputs, NEW, eos_token_id=model.config.text.vocab_size - 1))


def main() -> None:
    side, folder, batch = sys.argv[1], Path(sys.argv[2]), int(sys.argv[3])
    ids = np.random.default_rng(0).integers(100, 40_000, (batch, PROMPT))
    if side == "transformers":
        run = transformers_side(folder, ids)
    else:
        run = our_side(folder, ids, **({"dtype": "bfloat16"} if side == "ours-bfloat16" else {}))
    run()
    cpu, clock = [], []
    for _ in range(5):
        begun = time.process_time(), time.perf_counter()
        run()
        cpu.append(time.process_time() - begun[0])
        clock.append(time.perf_counter() - begun[1])
    per_token = 1e3 * float(np.median(cpu)) / NEW
    print(f"generation, batch {batch}, {side:13s}: {np.median(cpu):.2f} CPU s ({per_token:.1f} ms a step), ", end="")
    print(f"{np.median(clock):.2f} s of the clock")


if __name__ == "__main__":
    main()
