"""The codec: rows of ternary digits to codewords and back (spec §5), for rows, experts and stacks of experts."""

from qmoecodec.codec.bank import BankPlanner, given_bank
from qmoecodec.codec.rows import count_digits, decode_rows, encode_rows, matvec_rows
from qmoecodec.codec.stack import decode, encode, matvec

__all__ = ["BankPlanner", "count_digits", "decode", "decode_rows", "encode", "encode_rows", "given_bank", "matvec",
           "matvec_rows"]
