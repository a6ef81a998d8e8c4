"""The functions that notebook 05 defines: against loops, scikit-learn, SciPy, and cases worked out by hand."""

import numpy as np
import pandas as pd
import pytest
import torch
import torch.nn.functional as F
from models import tiny_vit
from notebook_functions import NOTEBOOKS, functions_of
from scipy.stats import ttest_rel
from sklearn.metrics import average_precision_score

from libragrad_minimal import LIBRA, PLAIN

GONE = [6, 12, 19, 25, 32, 38, 44, 51, 57]  # 10, 20, ... 90 % of 64 patches, rounded down


@pytest.fixture
def notebook():
    return functions_of(NOTEBOOKS / "05_faithfulness_benchmark.ipynb")


def test_the_bill_of_a_product_by_hand(notebook):
    """x relu(x) + 1 at 2 is 5: plain gradients give the product twice, balanced ones once."""
    x, one = torch.tensor(2.0, requires_grad=True), torch.tensor(1.0, requires_grad=True)
    notebook.logit, notebook.parts = x * torch.relu(x) + one, [x, one]
    assert notebook.completeness_error(PLAIN) == 4 and notebook.completeness_error(LIBRA) == 0


def test_painted_patches_are_grey(notebook):
    notebook.model, notebook.pixels = tiny_vit(img_size=64), torch.randn(1, 3, 64, 64)
    kept = torch.randperm(64)[:20]
    picture = notebook.pixels.clone()
    for patch in set(range(64)) - set(kept.tolist()):
        row, column = divmod(patch, 8)
        picture[0, :, 8 * row : 8 * row + 8, 8 * column : 8 * column + 8] = 0
    torch.testing.assert_close(notebook.painted(kept), notebook.model(picture)[0].detach())


def test_dropped_patches_are_tokens_that_nobody_attends_to(notebook, monkeypatch):
    notebook.model, notebook.pixels = tiny_vit(img_size=64), torch.randn(1, 3, 64, 64)
    kept = torch.randperm(64)[:20]
    dropped, attention = notebook.dropped(kept), F.scaled_dot_product_attention
    seen = torch.zeros(1, 65, dtype=torch.bool)
    seen[0, 0] = seen[0, 1 + kept] = True
    monkeypatch.setattr(F, "scaled_dot_product_attention", lambda q, k, v, **_: attention(q, k, v, attn_mask=seen))
    hidden = notebook.model(notebook.pixels)[0].detach()
    torch.testing.assert_close(dropped, hidden, rtol=1e-4, atol=1e-5)
    monkeypatch.undo()
    assert (notebook.model(notebook.pixels)[0] - hidden).abs().max() > 1e-3, "a check that can't fail is no check"


@pytest.mark.parametrize("descending", [True, False])
def test_curve_takes_the_scores_away_in_their_order(notebook, descending):
    scores = torch.randn(1, 8, 8)
    answers = notebook.curve(scores, lambda kept: set(kept.tolist()), descending)
    ranked = sorted(range(64), key=lambda patch: scores.flatten()[patch].item(), reverse=descending)
    assert answers == [set(ranked[gone:]) for gone in GONE]


@pytest.mark.parametrize("place", [0, 19, 63])
def test_srg_where_one_patch_decides_by_hand(notebook, place):
    """The class is the predicted one while the patch of the place-th highest score is there."""
    notebook.predicted = 0
    right = sum(gone <= place for gone in GONE), sum(gone <= 63 - place for gone in GONE)
    scores = -torch.arange(64.0).reshape(1, 8, 8)
    srg = notebook.srg(scores, lambda kept: torch.tensor([float(place in kept), 0.5]))
    assert srg == pytest.approx(100 * (right[1] - right[0]) / 9)


def test_average_precision_equals_scikit_learn(notebook):
    scores, mask = torch.randn(1, 8, 8), np.random.default_rng(0).random((8, 8)) < 0.3
    expected = average_precision_score(mask.flatten(), scores.flatten().numpy())
    assert notebook.average_precision(scores, mask) == pytest.approx(expected, abs=1e-9)


def test_difference_is_that_of_a_paired_t_test(notebook):
    first, second = torch.randn(20, dtype=torch.float64), torch.randn(20, dtype=torch.float64)
    mean, error = notebook.difference({"a | AP": first, "b | AP": second}, "a", "b", "AP")
    assert mean == pytest.approx((first - second).mean().item())
    assert mean / error == pytest.approx(ttest_rel(first, second).statistic)


def test_gain_is_that_of_a_paired_t_test(notebook):
    values = {"plain": np.random.default_rng(0).normal(size=9), "libra": np.random.default_rng(1).normal(size=9)}
    parts = [
        pd.DataFrame({"example": range(9), "method": "IxG", "rules": rules, "protocol": "", "metric": "AP", "value": v})
        for rules, v in values.items()
    ]
    (told,) = notebook.gain(pd.concat(parts), "IxG libra", "IxG plain").items()
    measure, (mean, error) = told
    expected = ttest_rel(values["libra"], values["plain"])
    assert (measure, mean / error) == ("AP", pytest.approx(expected.statistic))


@pytest.mark.parametrize("sign", [1, -1])
def test_agreement_of_equal_and_of_opposite_orders(notebook, sign):
    means = {"a": 1.0, "b": 5.0, "c": 2.0}
    results = {f"{run} | SRG, occlude patches": torch.tensor([mean, mean + 1]) for run, mean in means.items()}
    results |= {f"{run} | SRG, drop tokens": torch.tensor([sign * mean**3]) for run, mean in means.items()}
    results |= {f"{run} | SRG (logit), drop tokens": torch.tensor([0.0]) for run in means}
    assert notebook.agreement(results, "SRG") == pytest.approx(sign)


def test_the_best_three(notebook):
    means = {"a": 1.0, "b": 4.0, "c": 2.0, "d": 3.0}
    results = {f"{name} | plain | AP": torch.tensor([mean - 1, mean + 1]) for name, mean in means.items()}
    assert notebook.best_three(results, "AP") == "b, plain 4.00 ± 1.00; d, plain 3.00 ± 1.00; c, plain 2.00 ± 1.00"


def test_told_counts_differences_of_more_than_two_errors(notebook):
    cells = pd.DataFrame({"x": [(3.0, 1.0), (-3.0, 1.0)], "y": [(1.0, 1.0), (5.0, 2.0)]})
    assert notebook.told(cells) == "better 2, worse 1, of 4"
