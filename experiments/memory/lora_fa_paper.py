"""Tables of the LoRA-FA paper's discussion (arXiv:2308.03303; rebuttals at ICLR 2024), peak memory in its "GB".

They are GiB: bf16 weights of 6.74 billion parameters are its 12.6. Pairs are (LoRA, LoRA-FA); PyTorch, bf16 base, rank
64 and all linear maps where nothing else is said. T2 and T9 are by (geometry, batch, sequence); T3 is stated for
Llama-2-7B and 16 x 1024 tokens, T4, T6 and T8 for 16 x 2048.
"""

T2 = {("llama2-13b", 2, 1024): (50, 45), ("llama2-13b", 2, 2048): (71, 62)}
T3 = {
    "reserved by hardware and PyTorch": (1.2, 1.2),
    "model in bf16": (12.6, 12.6),
    "adapters": (0.8, 0.8),
    "cache": (5.1, 4.8),
    "optimizer state": (0.7, 0.4),
    "activations": (55.6, 42.3),
}
# Rank; LoRA on attention only.
T4 = {
    1: (63.32, 61.24),
    2: (63.47, 61.26),
    4: (63.51, 61.32),
    8: (63.58, 61.83),
    16: (63.7, 61.64),
    32: (63.97, 61.9),
    64: (64.44, 62.51),
    128: (64.86, 63.45),
}
# A tenth of the layers, two tenths, ...; LoRA.
T6 = (59.52, 60.73, 61.92, 64.45, 66.4, 67.79, 69.42, 71.07, 73.15, 75.33)
T8 = {
    "all": (75.33, 62.51),
    "only attention": (64.44, 56.72),
    "only MLP": (67.77, 58.85),
    "no q": (72.94, 60.55),
    "no k": (73.67, 60.57),
    "no v": (73.05, 60.35),
    "no o": (73.47, 60.38),
    "no up": (73.14, 60.43),
    "no down": (69.3, 58.89),
    "no gate": (73.14, 60.4),
}
T9 = {("llama2-7b", 8, 2048): (47.58, 38.54), ("llama2-13b", 8, 2048): (77.13, 63.93)}
