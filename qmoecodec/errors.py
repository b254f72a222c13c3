"""The exceptions of the package, and the closed list of reasons for which bytes are rejected (spec/ERRORS.md)."""

from __future__ import annotations

from typing import Final

#: Every reason a reader may give, with what it says (spec/ERRORS.md is written from the same list).
REASONS: Final[dict[str, str]] = {
    # §2.1 bytes
    "truncated": "the file ends before what it announces",
    "header_size": "the header's length is out of bounds or not a multiple of 8",
    "header_encoding": "the header is not UTF-8, or a string is not valid Unicode",
    # §2.2 JSON
    "header_json": "the text is not one JSON object with nothing but spaces after it",
    "duplicate_key": "an object holds a key twice",
    "json_depth": "values are nested too deep",
    "json_number": "a number is not an integer in 0..2^63-1",
    "json_size": "a JSON text holds too many values",
    "header_schema": "a JSON value has the wrong type or a wrong set of keys",
    # §2.3 tensors
    "tensor_count": "there are too many tensors",
    "shape_rank": "a tensor has too many dimensions",
    "unknown_dtype": "a dtype is not in the list",
    "shape_overflow": "a product of dimensions is out of range",
    "offset_order": "a tensor ends before it begins",
    "tensor_size": "a tensor's bytes do not fit its dtype and shape",
    "misaligned": "a tensor does not begin at a multiple of its element size",
    "tensor_overlap": "two tensors share bytes",
    "tensor_hole": "bytes between two tensors belong to none",
    "trailing_data": "bytes after the last tensor belong to none",
    # §3 metadata
    "not_packed": "the file has no qmoecodec metadata",
    "metadata_canonical": "the metadata text is not in canonical form",
    "metadata_schema": "the metadata has a missing, unknown or wrong value",
    "unsupported_version": "the file's major format version is not known",
    "unsupported_feature": "the file requires a feature that is not known",
    "orphan_tensor": "a tensor has no role",
    "missing_tensor": "a tensor that the metadata names is not there",
    "reserved_name": "a name begins with 'qmoecodec.' or is '__metadata__'",
    "source_conflict": "a tensor is named twice",
    # §4 dictionaries
    "dictionary_threshold": "the threshold does not fit the dictionary",
    "dictionary_symbol": "a node symbol or digit is 3",
    "dictionary_size": "the dictionary ends too early or too late",
    "dictionary_padding": "unused bits of the dictionary are not 0",
    "dictionary_phrase_length": "a phrase is longer than 255 digits",
    "dictionary_duplicate": "two codewords have the same phrase",
    # §5 rows
    "unused_codeword": "a codeword stands for no phrase",
    "row_underrun": "codewords give fewer digits than the row has",
    "row_overrun": "a codeword begins at or beyond the end of its row",
    "overrun_nonzero": "digits beyond the end of the row are not 0",
    "row_padding": "unused bits at the end of a row are not 0",
    "not_canonical": "the encoding is not the canonical one",
    # §6 groups
    "role_dtype": "a role tensor has the wrong dtype",
    "role_shape": "a role tensor has the wrong shape",
    "code_offsets": "code offsets do not begin at 0, fall, or do not end at the end",
    "row_lengths": "row lengths do not add up to the expert's codes",
    "dictionary_index": "an expert names no fitting dictionary",
    "level_value": "a level is not finite, is -0, or the two are not in order",
    "level_zero": "a digit stands for a level that is 0",
    # §7 checksums
    "checksum": "a checksum does not match",
    # §8 several files
    "shard_index": "the shard index is not usable",
    "shard_path": "the index or a shard is not a plain file of the directory",
    "shard_missing": "a shard is not there",
    "shard_mismatch": "the shard index and the shards name different tensors",
}


def printable(text: str) -> str:
    r"""Escape what a terminal would obey or cannot show: a file chooses its names, so they may hold anything.

    >>> print(printable("a\x1b[31m.weight"))
    a\x1b[31m.weight
    """
    return "".join(c if c.isprintable() else c.encode("unicode_escape").decode() for c in text)


class QMoEError(Exception):
    """Root of all errors that this project raises on purpose."""


class FormatError(QMoEError, ValueError):
    """Bytes that the specification forbids.

    Attributes
    ----------
    reason : one of `REASONS`
    message : what is wrong, in words
    where : place -> value, such as ``{"tensor": "a_codes", "expert": 3, "row": 17, "byte": 4096}``
    """

    def __init__(self, reason: str, message: str = "", **where: object) -> None:
        if reason not in REASONS:
            raise ValueError(f"{reason!r} is not in the closed list of reasons")
        self.reason = reason
        self.message = message or REASONS[reason]
        self.where = {k: v for k, v in where.items() if v is not None}
        place = ", ".join(f"{k} {v}" for k, v in self.where.items())
        super().__init__(f"[{reason}] {self.message}" + (f" ({place})" if place else ""))

    def __reduce__(self) -> tuple[object, ...]:
        """Pickle the parts, for `args` holds the finished text: workers of a process pool raise this too."""
        return _restore, (self.reason, self.message, self.where)

    def at(self, **where: object) -> FormatError:
        """Return the same error with more of its place known (outer places first)."""
        return FormatError(self.reason, self.message, **{**where, **self.where})


def _restore(reason: str, message: str, where: dict[str, object]) -> FormatError:
    return FormatError(reason, message, **where)


class EncodeError(QMoEError, ValueError):
    """Digits that the chosen dictionary cannot express."""


class MissingExtraError(QMoEError, ImportError):
    """An optional package is needed that is not installed."""
