"""How well rows are classified, or values predicted: plain numpy on what the model said of every row.

    precision = right / said      recall = right / there      F1 = 2 right / (said + there)

for each label, from the confusion matrix. Macro-F1 is the mean over the labels that occur, among the rows or among the
answers. A correlation of values that do not vary is None.
"""

from __future__ import annotations

import numpy as np


def confusion(labels: np.ndarray, predicted: np.ndarray, count: int) -> np.ndarray:
    """(count, count) int64: rows with a label (axis 0) that were taken for another (axis 1)."""
    flat = np.bincount(labels.astype(np.int64) * count + predicted.astype(np.int64), minlength=count * count)
    return flat.reshape(count, count)


def accuracy_and_f1(matrix: np.ndarray) -> dict[str, float | None]:
    """{"accuracy", "f1"} of a confusion matrix, each from 0 to 1."""
    right, said, there = np.diagonal(matrix), matrix.sum(0), matrix.sum(1)
    occurs = (said + there) > 0
    f1 = 2 * right[occurs] / (said + there)[occurs]
    return {"accuracy": float(right.sum() / matrix.sum()), "f1": float(f1.mean())}


def correlations(values: np.ndarray, predicted: np.ndarray) -> dict[str, float | None]:
    """{"pearson", "spearman"}, each from -1 to 1, of two (n,) arrays."""
    return {"pearson": _pearson(values, predicted), "spearman": _pearson(_ranks(values), _ranks(predicted))}


def _pearson(x: np.ndarray, y: np.ndarray) -> float | None:
    x, y = (np.asarray(z, np.float64) - np.mean(z, dtype=np.float64) for z in (x, y))
    norm = np.sqrt((x @ x) * (y @ y))
    return float(x @ y / norm) if norm > 0 else None


def _ranks(x: np.ndarray) -> np.ndarray:
    """Ranks from 1; equal values share the mean of theirs."""
    _, inverse, counts = np.unique(x, return_inverse=True, return_counts=True)
    last = np.cumsum(counts)
    return (last - (counts - 1) / 2)[inverse]
