"""Quantize Switch Transformers to ternary experts with calibration data."""
