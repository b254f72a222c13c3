"""The exceptions of the Switch runtime and of the importer of published checkpoints."""

from __future__ import annotations

from qmoecodec.errors import QMoEError


class SwitchError(QMoEError, ValueError):
    """A checkpoint, token file or setting that the runtime cannot work with; the message names what is at fault."""


class BackendError(QMoEError, RuntimeError):
    """The expert backend that was asked for is not there. Another is never taken in its place."""


class CheckpointImportError(QMoEError, ValueError):
    """A published QMoE checkpoint whose files are missing, left over or inconsistent."""
