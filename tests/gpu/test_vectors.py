"""The conformance vectors on the device: same digits, or the same reason, as the codec on the host."""

import collections
import pathlib

import numpy as np
import pytest

import qmoecodec
from qmoecodec.container.ternary import to_float
from tests.gpu import vector_groups

PARTS = 8
#: Reasons that lie in what the device checks.
ON_DEVICE = {
    "row_lengths", "row_underrun", "row_overrun", "row_padding", "unused_codeword", "overrun_nonzero", "level_value",
    "level_zero",
}  # fmt: skip


def test_the_host_says_what_the_manifest_says():
    """What the tests below compare with finds the vectors' faults, compiled and not; the first wrong group names a file's."""
    wrong = {}
    reasons = collections.Counter()
    for name, group in vector_groups.groups():
        verdict, plain = (vector_groups.host_verdict(group, backend) for backend in ("numba", "reference"))
        if isinstance(plain, qmoecodec.FormatError):
            assert isinstance(verdict, qmoecodec.FormatError), name
            assert (verdict.reason, verdict.where) == (plain.reason, plain.where), name
        else:
            assert np.array_equal(verdict, plain), name
        if isinstance(verdict, qmoecodec.FormatError):
            reasons[verdict.reason] += 1
            # Damaged bytes with a damaged checksum have another reason in the file.
            wrong.setdefault(name.split()[0], verdict.reason == group.error or group.error == "checksum")
        else:
            reasons["valid"] += 1
    assert all(wrong.values()), [vector for vector, right in wrong.items() if not right]
    assert reasons["valid"] >= 300
    assert min(reasons[reason] for reason in ON_DEVICE) >= 6, reasons


@pytest.mark.gpu
@pytest.mark.parametrize("part", range(PARTS))
def test_groups(part, guarded):
    """Every group as it is in its file, unchecked by the host: the device decodes it, or finds what is wrong."""
    torch = pytest.importorskip("torch", reason="needs torch")
    pytest.importorskip("cupy", reason="needs CuPy")
    from qmoecodec_gpu import backend, matvec

    gpu = backend.load()
    seen = collections.Counter()
    for name, group in vector_groups.groups(part, PARTS):
        expected = vector_groups.host_verdict(group)
        for layout in ("auto", "file"):
            try:
                experts = gpu.experts.load(group.encoded, group.levels, dtype=group.dtype, layout=layout)
            except qmoecodec.FormatError as error:
                assert isinstance(expected, qmoecodec.FormatError), (name, error)
                assert error.reason == expected.reason, name
                if error.reason not in ("code_offsets", "dictionary_index"):
                    assert error.where["expert"] == expected.where["expert"], name
                seen[error.reason] += 1
                continue
            assert not isinstance(expected, qmoecodec.FormatError), (name, expected)
            seen["valid"] += 1
            assert np.array_equal(experts.decode().cpu().numpy(), expected), name
            if 0 in expected.shape:
                continue
            levels = to_float(group.levels.view(f"u{group.levels.itemsize}"), dtype=group.dtype, to=np.float64)
            low, high = levels[..., :1], levels[..., 1:]
            dense = np.where(expected < 0, low, np.where(expected > 0, high, 0.0))
            with np.errstate(over="ignore"):
                halves = torch.from_numpy(dense.astype(np.float32)).bfloat16()
            assert torch.equal(experts.decode(dtype=torch.bfloat16).cpu(), halves), name
            if np.abs(dense).max() > 1e30:
                continue
            x = torch.randn(3, expected.shape[2]).bfloat16()
            numbers = [0, expected.shape[0] - 1, 0]
            y = matvec.grouped_matvec(experts, x.cuda(), torch.tensor(numbers, device="cuda")).double().cpu().numpy()
            for t, e in enumerate(numbers):
                exact = dense[e] @ x[t].double().numpy()
                bound = 2.0**-8 * np.abs(exact) + 1e-5 * (np.abs(dense[e]) @ np.abs(x[t].double().numpy())) + 1e-36
                assert (np.abs(y[t] - exact) <= bound).all(), name
    assert seen["valid"] > 50 and len(seen) > 4, seen
    assert len(guarded) > 200


@pytest.mark.gpu
def test_files(tmp_path):
    """Every vector as a file: opened by the host, each group loaded by the device, passthrough checked."""
    pytest.importorskip("torch", reason="needs torch")
    pytest.importorskip("cupy", reason="needs CuPy")
    from qmoecodec_gpu import backend

    gpu = backend.load()
    seen = collections.Counter()
    for number, vector in enumerate(vector_groups.VECTORS):
        scratch = tmp_path / str(number)
        scratch.mkdir()
        path = vector_groups.RUNNER.stage(vector, vector_groups.CONFORMANCE, pathlib.Path(scratch))
        expected = vector["expect"].get("error")
        found = None
        try:
            with qmoecodec.open(path) as file:
                for packed in file.files:  # in the order of spec §9
                    for index in range(len(packed.metadata.dictionaries)):
                        packed.dictionary(index)
                    for group in packed.metadata.groups:
                        experts = gpu.experts.load(file[group.name])
                        assert (experts.decode().cpu().numpy() == file[group.name].decode().reshape(experts.shape)).all()
                    for name in packed.metadata.passthrough:
                        file.tensor_bytes(name)
        except qmoecodec.FormatError as error:
            found = error.reason
        assert found == expected, vector["id"]
        seen[found] += 1
    assert seen[None] > 200 and len(seen) > 40, seen
