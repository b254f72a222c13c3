"""Storage format and codec for ternary mixture-of-experts weights below one bit per weight (specification in spec/)."""

from __future__ import annotations

from qmoecodec.codec import count_digits, decode, decode_rows, encode, encode_rows, matvec, matvec_rows
from qmoecodec.container import (  # qmoecodec.open is the name
    Expert,
    File,
    Group,
    PackedGroup,
    PackReport,
    PassedTensor,
    Problem,
    Tensors,
    UnpackReport,
    VerifyReport,
    open,  # noqa: A004
    pack,
    unpack,
    verify,
)
from qmoecodec.errors import REASONS, EncodeError, FormatError, MissingExtraError, QMoEError
from qmoecodec.types import Dictionary, Encoded

__version__ = "0.1.0"
__all__ = [
    "REASONS",
    "Dictionary",
    "EncodeError",
    "Encoded",
    "Expert",
    "File",
    "FormatError",
    "Group",
    "MissingExtraError",
    "PackReport",
    "PackedGroup",
    "PassedTensor",
    "Problem",
    "QMoEError",
    "Tensors",
    "UnpackReport",
    "VerifyReport",
    "__version__",
    "count_digits",
    "decode",
    "decode_rows",
    "encode",
    "encode_rows",
    "matvec",
    "matvec_rows",
    "open",
    "pack",
    "unpack",
    "verify",
]
