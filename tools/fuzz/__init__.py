"""Fuzz targets of the decoder: `python tools/fuzz/run.py TARGET --seconds N` (needs atheris, which tests do not)."""
