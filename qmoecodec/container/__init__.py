"""Files of the format (spec §2, §3, §6 to §8): `pack`, `unpack`, `open`, `verify`."""

from qmoecodec.container.pack import PackedGroup, PackReport, PassedTensor, pack
from qmoecodec.container.reader import Expert, File, Group, Tensors, open  # noqa: A004
from qmoecodec.container.unpack import UnpackReport, unpack
from qmoecodec.container.verify import Problem, VerifyReport, verify

__all__ = [
    "Expert",
    "File",
    "Group",
    "PackReport",
    "PackedGroup",
    "PassedTensor",
    "Problem",
    "Tensors",
    "UnpackReport",
    "VerifyReport",
    "open",
    "pack",
    "unpack",
    "verify",
]
