"""Run every kernel under compute-sanitizer: memcheck, racecheck and initcheck must find nothing."""

from __future__ import annotations

import argparse
import dataclasses
import subprocess
import sys

TOOLS = ("memcheck", "racecheck", "initcheck")


def exercise(*, quick: bool) -> None:
    """Run every kernel on small input, damaged input too; quick: with one shape and two dictionaries."""
    import numpy as np
    import torch

    import qmoecodec
    from qmoecodec.dictionary import aivf, table_from_phrases
    from qmoecodec_gpu import backend, encoding, matvec
    from qmoecodec_gpu.experts import GpuExperts

    backend.load()
    rng = np.random.default_rng(0)
    table = table_from_phrases([bytes((n // 3**k) % 3 for k in range(5)) for n in range(243)] + [b""] * 13, code_bits=8)
    sparse, dense, wide = (aivf.build(1 - p, 2 * p, 1 - p, code_bits=b) for p, b in ((0.885, 8), (0.4, 8), (0.885, 12)))
    found = damaged = 0
    for dictionary in (sparse, wide) if quick else (sparse, dense, wide, table):
        for shape in ((3, 37, 520), (2, 5, 31), (1, 1, 1))[: 1 if quick else 3]:
            draws = rng.random(shape)
            digits = np.where(draws < 0.8, 0, np.where(draws < 0.9, -1, 1)).astype(np.int8)
            staged = encoding.encode(torch.from_numpy(digits).cuda(), dictionary)
            encoded = encoding.to_encoded(staged, dictionary)
            levels = torch.stack([-torch.rand(shape[:2]) - 0.1, torch.rand(shape[:2]) + 0.1], -1).bfloat16()
            for layout in ("auto", "file"):
                experts = GpuExperts.load(encoded, levels, layout=layout)
                if not (experts.decode().cpu().numpy() == digits).all():
                    raise AssertionError("decode is wrong")
                experts.decode(dtype=torch.bfloat16)
                for tokens in (1, 3, 80) if quick else (1, 3, 30, 600) if layout == "auto" else (1, 8):
                    x = torch.randn(tokens, shape[2], device="cuda").bfloat16()
                    expert = torch.from_numpy(rng.integers(-1, shape[0] + 1, size=tokens)).cuda()
                    y = matvec.grouped_matvec(experts, x, expert)
                    good = (expert >= -1) & (expert < shape[0])
                    if not bool(y[good].isfinite().all()):
                        raise AssertionError("an output was not written")
            for _ in range(4):
                codes = encoded.codes.copy()
                codes[rng.integers(codes.size)] ^= np.uint8(1 << rng.integers(8))
                damaged += 1
                try:
                    GpuExperts.load(dataclasses.replace(encoded, codes=codes), levels)
                except qmoecodec.FormatError:
                    found += 1
    torch.cuda.synchronize()
    print(f"exercised; {found} of {damaged} damaged inputs were rejected, the others are valid encodings of other digits")


def main() -> None:
    """Run the tools and print their summaries."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--exercise", action="store_true", help="run the kernels, without a tool")
    parser.add_argument("--quick", action="store_true", help="less input: initcheck takes minutes with all")
    parser.add_argument("--tools", default=",".join(TOOLS))
    arguments = parser.parse_args()
    if arguments.exercise:
        exercise(quick=arguments.quick)
        return
    failed = False
    for tool in arguments.tools.split(","):
        # Other libraries' kernels are not ours to judge.
        ours = "kns=matvec,kns=matmul_tile,kns=_rows,kns=route_tokens,kns=shared_base"
        command = ["compute-sanitizer", "--tool", tool, "--kernel-name", ours, "--error-exitcode", "1"]
        command += [sys.executable, __file__, "--exercise", *(["--quick"] if arguments.quick else [])]
        done = subprocess.run(command, capture_output=True, text=True, check=False)
        lines = (done.stdout + done.stderr).splitlines()
        summary = [line for line in lines if "SUMMARY" in line or "exercised" in line]
        print(f"{tool}: {' | '.join(summary) or 'no summary'}")
        if done.returncode:
            failed = True
            print("\n".join(lines[:60]))
    sys.exit(failed)


if __name__ == "__main__":
    main()
