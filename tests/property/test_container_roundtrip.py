"""unpack(pack(x)) is x, for whatever hypothesis makes of names, types, shapes and bytes."""

import pathlib
import struct
import tempfile
from typing import Any

import numpy as np
from hypothesis import given, settings
from hypothesis import strategies as st

from qmoecodec.container import open as open_packed
from qmoecodec.container import pack, unpack, verify
from qmoecodec.container.header import DTYPE_SIZES, header_bytes, lay_out, parse_header
from qmoecodec.container.json_text import canonical, parse_object
from qmoecodec.errors import FormatError

SIZES = {"F16": np.uint16, "BF16": np.uint16, "F32": np.uint32, "F64": np.uint64}
# The bits of -1, 1, 0.5, the least subnormal, and -0, which is no level.
NUMBERS = {
    "F16": [0xBC00, 0x3C00, 0x3800, 1, 0x8000],
    "BF16": [0xBF80, 0x3F80, 0x3F00, 1, 0x8000],
    "F32": [0xBF80_0000, 0x3F80_0000, 0x3F00_0000, 1, 0x8000_0000],
    "F64": [0xBFF << 52, 0x3FF << 52, 0x3FE << 52, 1, 1 << 63],
}
names = st.one_of(
    st.text(min_size=1, max_size=12).filter(lambda s: s != "__metadata__" and not s.startswith("qmoecodec.")),
    st.builds("m.experts.{}.{}".format, st.integers(0, 12), st.sampled_from(["w", "w.weight", "w_codes", "{}"])),
    st.builds("experts.expert_{}".format, st.integers(0, 3)),
    st.sampled_from(["a", "a.weight", "a_codes", "a_levels", "m.experts.w", "experts", ".weight", "{}"]),
)


@st.composite
def tensors(draw: st.DrawFn) -> tuple[str, tuple[int, ...], bytes]:
    if draw(st.booleans()):
        dtype = draw(st.sampled_from(sorted(SIZES)))
        shape = tuple(draw(st.lists(st.integers(0, 40), min_size=2, max_size=3)))
        seed = draw(st.integers(0, 2**32))
        rng = np.random.default_rng(seed)
        zeros = draw(st.sampled_from([0, 0.3, 0.8, 0.99, 1]))
        values = np.array([0, *draw(st.permutations(NUMBERS[dtype]))[:2]], SIZES[dtype])
        bits = values[rng.choice(3, size=shape, p=[zeros, (1 - zeros) / 2, (1 - zeros) / 2])]
        if bits.size and draw(st.integers(0, 9)) == 0:
            bits.reshape(-1)[draw(st.integers(0, bits.size - 1))] = draw(st.integers(0, 2**16 - 1))
        return dtype, shape, bits.tobytes()
    dtype = draw(st.sampled_from(sorted(DTYPE_SIZES)))
    shape = tuple(draw(st.lists(st.integers(0, 4), max_size=4)))
    n = DTYPE_SIZES[dtype] * int(np.prod(shape, dtype=int))
    return dtype, shape, draw(st.binary(min_size=n, max_size=n))


@settings(max_examples=60)
@given(
    content=st.dictionaries(names, tensors(), max_size=8),
    metadata=st.none() | st.dictionaries(st.text(max_size=5).filter(lambda s: s != "qmoecodec"), st.text(max_size=9), min_size=1),
    code_bits=st.sampled_from([8, 12]),
)  # fmt: skip
def test_round_trip(content: dict[str, Any], metadata: dict[str, str] | None, code_bits: Any) -> None:
    placed = lay_out((name, dtype, shape) for name, (dtype, shape, _) in content.items())
    data = header_bytes(placed, metadata) + b"".join(content[name][2] for name in placed)
    with tempfile.TemporaryDirectory() as folder:
        source, packed, again = (pathlib.Path(folder) / name for name in "abc")
        source.write_bytes(data)
        report = pack(source, packed, code_bits=code_bits)
        assert verify(packed, deep=True).problems == ()
        unpack(packed, again)
        assert again.read_bytes() == data
        assert sum(g.shape[0] for g in report.groups) <= sum(t[1][0] if len(t[1]) == 3 else 1 for t in content.values())
        with open_packed(packed) as f:
            for name in f.tensors:
                assert f.tensor_bytes(name).tobytes() == content[name][2]
            for group in f.groups.values():
                if group.info.layout != "stacked":
                    assert group.dense().tobytes() == content[group.info.source][2]


json_values = st.recursive(
    st.none() | st.booleans() | st.integers(0, 2**63 - 1) | st.text(),
    lambda inner: st.lists(inner, max_size=4) | st.dictionaries(st.text(max_size=4), inner, max_size=4),
    max_leaves=20,
)


@given(st.dictionaries(st.text(), json_values, max_size=5))
def test_canonical_json_and_back(value: dict[str, Any]) -> None:
    text = canonical(value)
    assert text.isascii()
    assert parse_object(text) == value


@given(st.binary(max_size=60) | st.text('{}[]":,0123456789.eE+-nulltrefas\\ \n', max_size=60).map(str.encode))
def test_the_header_parser_raises_nothing_but_format_errors(data: bytes) -> None:
    for strict in (True, False):
        try:
            header = parse_header(struct.pack("<Q", len(data) + 1) + b"{" + data, 9 + len(data), strict=strict)
        except FormatError:
            continue
        assert all(info.n_bytes == 0 for info in header.tensors.values())
