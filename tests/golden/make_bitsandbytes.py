"""Make tests/golden/bitsandbytes.json anew: what bitsandbytes quantises a weight to on a CPU (0.50, with torch 2.13).

Run it where bitsandbytes is installed: python tests/golden/make_bitsandbytes.py
"""

import json
from pathlib import Path

import bitsandbytes.functional as bnb
import numpy as np
import torch


def weight():
    """330 blocks of 64 and a part of one, in two groups of scales; one block is zero."""
    value = np.random.default_rng(0).standard_normal((55, 385)).astype(np.float32)
    value.reshape(-1)[640:704] = 0.0
    return value


def main():
    found = {}
    for double in (False, True):
        given = {"blocksize": 64, "quant_type": "nf4", "compress_statistics": double}
        codes, state = bnb.quantize_4bit(torch.tensor(weight()), **given)
        entry = {"codes": codes.numpy().tobytes().hex(), "sum": bnb.dequantize_4bit(codes, state).double().abs().sum()}
        if double:
            entry["absmax"] = state.absmax.numpy().tobytes().hex()
            entry["scales"], entry["offset"] = state.state2.absmax.tolist(), state.offset.item()
        else:
            entry["absmax"] = state.absmax.tolist()
        found["double" if double else "simple"] = {**entry, "sum": entry["sum"].item()}
    Path(__file__).with_name("bitsandbytes.json").write_text(json.dumps(found) + "\n")


if __name__ == "__main__":
    main()
