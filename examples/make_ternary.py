"""Write the ternary twin of switch-pycode-4e: `python make_ternary.py OUT.safetensors` (needs numpy only).

ternary-gptq-2023.npz holds the expert digits the paper's GPTQ chose (5 per byte, base 3, least significant first;
0 zero, 1 row minimum, 2 row maximum; matrices in the order of `names`, row-major) and each row's two levels as
bfloat16 bits.
"""
import json
import pathlib
import struct
import sys

import numpy as np

here = pathlib.Path(__file__).parent
raw = (here / "switch-pycode-4e" / "model.safetensors").read_bytes()
n_header = struct.unpack("<Q", raw[:8])[0]
header, data = json.loads(raw[8 : 8 + n_header]), bytearray(raw[8 + n_header :])
npz = np.load(here / "ternary-gptq-2023.npz")
digits = (npz["digits"][:, None] // np.array([1, 3, 9, 27, 81], np.uint8) % 3).reshape(-1)
at = row = 0
for name in npz["names"]:
    entry = header[f"{name}.weight"]
    rows, cols = entry["shape"]
    d = digits[at : at + rows * cols].reshape(rows, cols)
    lo, hi = npz["lo"][row : row + rows, None], npz["hi"][row : row + rows, None]
    begin, end = entry["data_offsets"]
    data[begin:end] = np.where(d == 1, lo, np.where(d == 2, hi, 0)).astype("<u2").tobytes()
    at, row = at + rows * cols, row + rows
pathlib.Path(sys.argv[1]).write_bytes(raw[: 8 + n_header] + data)
