"""The one exception that bad input to the quantizer raises."""

from __future__ import annotations

from qmoecodec.errors import QMoEError


class QuantizeError(QMoEError, ValueError):
    """Report a checkpoint, calibration set or setting the quantizer cannot work with.

    The message names the file, tensor or option at fault. Nothing has been written to
    the output directory when it is raised before the last unit is finished.
    """
