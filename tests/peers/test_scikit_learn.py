"""scikit-learn and SciPy: overlap at a threshold, rank correlation. (Average precision: tests/test_metrics.py.)"""

import numpy as np
import pytest
import scipy.stats
import sklearn.metrics
import torch

from libragrad_minimal import metrics


@pytest.mark.parametrize("threshold", [None, 0.3])
def test_overlap_at_a_threshold(threshold):
    scores, masks = torch.randn(3, 8, 8), torch.rand(3, 32, 32) > 0.6
    fine = metrics.upsample(scores, (32, 32)).flatten(1).numpy()
    found = [row > (row.mean() if threshold is None else threshold) for row in fine]
    there = masks.flatten(1).numpy()
    for ours, theirs in ((metrics.iou, sklearn.metrics.jaccard_score), (metrics.f1, sklearn.metrics.f1_score)):
        expected = [theirs(mask, pixels) for mask, pixels in zip(there, found, strict=True)]
        np.testing.assert_allclose(ours(scores, masks, threshold), expected, rtol=1e-5)


@pytest.mark.parametrize("tied", [False, True])
def test_kendall_correlation(tied):
    scores = {name: torch.randn(2, 5, 5) for name in ("a", "b", "c")}
    if tied:
        scores = {name: values.round() for name, values in scores.items()}
    ours = metrics.kendall_correlation(scores)
    flat = [values.flatten(1).numpy() for values in scores.values()]
    for sample in range(2):
        for i in range(3):
            for j in range(3):
                tau = scipy.stats.kendalltau(flat[i][sample], flat[j][sample]).statistic
                assert ours[sample, i, j].item() == pytest.approx(tau, abs=1e-6)
