"""Dictionaries: their bytes (`serial`), the two-tree construction (`aivf`) and the paper's table (`qmoe2023`)."""

from qmoecodec.dictionary.serial import aivf_from_symbols, parse, table_from_phrases

__all__ = ["aivf_from_symbols", "parse", "table_from_phrases"]
