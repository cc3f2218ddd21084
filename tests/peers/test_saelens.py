"""Dictionaries in SAELens, which shares no environment with the library: both load what the other wrote."""

import numpy as np
import pytest
from environments import environment, run
from kind_cases import dictionary

from interventions.diff.dictionaries import load_dictionary, save_dictionary
from interventions.diff.place import Place

pytestmark = pytest.mark.peers

#: Writes the codes and reconstructions of our dictionaries, and dictionaries of its own with theirs.
IN_SAELENS = """
import sys
from pathlib import Path
import numpy as np
import torch
from sae_lens import SAE, JumpReLUSAE, JumpReLUSAEConfig, TopKSAE, TopKSAEConfig

ours, theirs, x = Path(sys.argv[1]), Path(sys.argv[2]), torch.from_numpy(np.load(sys.argv[3]))

def write(sae, path):
    with torch.no_grad():
        codes = sae.encode(x)
        codes = codes.to_dense() if codes.is_sparse else codes
        np.savez(path, codes=codes.numpy(), reconstruction=sae.decode(codes).numpy())

for folder in sorted(ours.iterdir()):
    write(SAE.load_from_disk(folder), folder.with_suffix(".npz"))

torch.manual_seed(0)
size = {"d_in": x.shape[1], "d_sae": 24}
made = {
    "topk": TopKSAE(TopKSAEConfig(k=3, **size)),
    "rescaled": TopKSAE(TopKSAEConfig(k=3, rescale_acts_by_decoder_norm=True, apply_b_dec_to_input=False, **size)),
    "jumprelu": JumpReLUSAE(JumpReLUSAEConfig(**size)),
}
for name, sae in made.items():
    with torch.no_grad():
        for parameter in sae.parameters():
            parameter.copy_(torch.randn_like(parameter))
        if name == "jumprelu":
            sae.threshold.abs_()
    sae.save_model(theirs / name)
    write(sae, theirs / f"{name}.npz")
"""


def test_both_load_what_the_other_wrote(tmp_path):
    ours, theirs = tmp_path / "ours", tmp_path / "theirs"
    theirs.mkdir()
    one = dictionary(np.random.default_rng(0), members=1).member(0)
    threshold = np.abs(np.random.default_rng(1).standard_normal(96)).astype(np.float32)
    given = {
        "topk": one,
        "jumprelu": one.replace(architecture="jumprelu", k=None, threshold=threshold),
    }
    for name, made in given.items():
        save_dictionary(ours / name, made, Place("text.resid_post", 3), model="abc", model_name="mini")
    x = np.random.default_rng(2).standard_normal((50, 64), np.float32)
    np.save(tmp_path / "x.npy", x)
    python = environment(tmp_path / "environment", "sae-lens==6.54.12", "torch==2.13.0")
    run(
        python, "-c", IN_SAELENS, ours, theirs, tmp_path / "x.npy", env={"HF_HUB_OFFLINE": "1", "PATH": "/usr/bin:/bin"}
    )
    for name, made in given.items():
        with np.load(ours / f"{name}.npz") as found:
            np.testing.assert_allclose(made.codes(x), found["codes"], atol=1e-5)
            np.testing.assert_allclose(made(x), found["reconstruction"], atol=1e-4)
    for name in ("topk", "rescaled", "jumprelu"):
        loaded = load_dictionary(theirs / name).dictionary
        with np.load(theirs / f"{name}.npz") as found:
            for got, want in ((loaded.codes(x), found["codes"]), (loaded(x), found["reconstruction"])):
                np.testing.assert_allclose(got, want, atol=1e-5 * np.abs(want).max())
