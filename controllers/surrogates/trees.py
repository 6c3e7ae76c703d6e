"""Gradient-boosted trees in compiled code: scikit-learn's predict takes 1 ms for seven rows."""

import numpy as np
from numpy.typing import NDArray
from sklearn.ensemble import HistGradientBoostingRegressor

from biscale_env.core.jit import compiled
from controllers.base import Floats
from controllers.records import Records, record_dtype

Ints = NDArray[np.int64]


class TreeNode:
    """One node: where to go by one feature, or a leaf (feature -1) with its value."""

    feature: int
    threshold: float
    left: int
    right: int
    value: float


NODE_DTYPE = record_dtype(TreeNode)


@compiled
def sum_trees(x: Floats, roots: Ints, nodes: Records, base: float, out: Floats) -> None:
    """Sum of the leaves that each row of x (n, features) falls into, plus ``base``.

    Trees lie end to end in ``nodes``; ``roots`` are their first nodes, ``out`` is (n,).
    """
    for i in range(x.shape[0]):
        total = base
        for r in range(roots.size):
            k = roots[r]
            while nodes[k].feature >= 0:
                go_left = x[i, nodes[k].feature] <= nodes[k].threshold
                k = nodes[k].left if go_left else nodes[k].right
            total += nodes[k].value
        out[i] = total


class CompiledTrees:
    """A fitted histogram gradient-boosting regressor as flat arrays.

    Predicts what the regressor predicts.
    """

    def __init__(self, fitted: HistGradientBoostingRegressor) -> None:
        """Lay the trees out end to end."""
        trees = [stage[0].nodes for stage in fitted._predictors]
        sizes = np.array([len(t) for t in trees])
        self._roots = np.concatenate([[0], np.cumsum(sizes)[:-1]]).astype(np.int64)
        offset = np.repeat(self._roots, sizes)
        found = np.concatenate(trees)
        self._nodes = np.zeros(len(found), dtype=NODE_DTYPE)
        leaf = found["is_leaf"].astype(bool)
        self._nodes["feature"] = np.where(leaf, -1, found["feature_idx"].astype(np.int64))
        self._nodes["threshold"] = found["num_threshold"]
        self._nodes["left"], self._nodes["right"] = found["left"] + offset, found["right"] + offset
        self._nodes["value"] = found["value"]
        self._base = float(np.ravel(fitted._baseline_prediction)[0])

    def predict(self, x: Floats) -> Floats:
        """Predictions (n,) for features (n, f)."""
        out = np.empty(len(x))
        sum_trees(np.ascontiguousarray(x), self._roots, self._nodes, self._base, out)
        return out
