"""Shapes of real models for the tests: widths of a token's norm, and of a head's."""

WIDTHS = {"llama2-7b": 4096, "llama3.2-1b": 2048, "qwen3 head": 128}
