"""Numba kernels. Private: they trust their input as each one states, return a status, and never raise.

Import this package only from functions that need it; importing it loads Numba.
"""
