"""Shapes of real models for the tests: widths of gate and up."""

WIDTHS = {"llama2-7b": 11008, "llama3.2-1b": 8192}
