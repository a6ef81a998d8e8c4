"""The metrics against scikit-learn, brute-force loops and cases worked out by hand."""

import threading
import time
from functools import partial

import numpy as np
import pytest
import torch
from models import tiny_llama, tiny_vit
from sklearn.metrics import average_precision_score

from libragrad_minimal import metrics
from libragrad_minimal.dropping import drop_tokens


@pytest.fixture
def maps():
    torch.manual_seed(0)
    scores, masks = torch.randn(5, 8, 8), torch.zeros(5, 32, 32, dtype=torch.bool)
    for i in range(5):
        masks[i, 3 * i : 3 * i + 9, 20 - 4 * i : 30 - 3 * i] = True
    return scores, masks


def test_mean_and_error_by_hand():
    mean, error = metrics.mean_and_error(torch.tensor([1.0, 2.0, 3.0, 6.0]))
    assert mean == 3.0
    assert error == pytest.approx((14 / 3) ** 0.5 / 2)
    assert np.isnan(metrics.mean_and_error(torch.tensor([1.0]))[1])


def test_segmentation_ap_equals_scikit_learn(maps):
    scores, masks = maps
    fine = metrics.upsample(scores, (32, 32))
    expected = [
        average_precision_score(m.flatten().numpy(), s.flatten().numpy()) for s, m in zip(fine, masks, strict=True)
    ]
    np.testing.assert_allclose(metrics.segmentation_ap(scores, masks), expected, atol=1e-6)


def test_segmentation_ap_shares_a_threshold_among_equal_scores(maps):
    scores, masks = maps
    coarse = scores.repeat_interleave(4, 1).repeat_interleave(4, 2).round()  # already at full size: many exact ties
    expected = [
        average_precision_score(m.flatten(), s.flatten()) for s, m in zip(coarse.numpy(), masks.numpy(), strict=True)
    ]
    np.testing.assert_allclose(metrics.segmentation_ap(coarse, masks), expected, atol=1e-6)
    constant = metrics.segmentation_ap(torch.zeros(5, 8, 8), masks)
    np.testing.assert_allclose(constant, masks.flatten(1).float().mean(1), atol=1e-6)


def test_a_perfect_map_gets_full_marks():
    mask = torch.zeros(1, 16, 16, dtype=torch.bool)
    mask[:, 4:8, 8:12] = True
    scores = mask.float()
    assert metrics.segmentation_ap(scores, mask).item() == 1
    assert metrics.pointing_game(scores, mask).item() == 1
    assert metrics.mass_inside(scores, mask).item() == 1
    assert metrics.pointing_game(-scores, mask).item() == 0
    assert metrics.mass_inside(-scores, mask).item() == 0


def test_mass_inside_by_hand():
    scores = torch.tensor([[[3.0, 1.0], [-5.0, 4.0]]])
    mask = torch.tensor([[[1, 1, 0, 0], [1, 1, 0, 0], [0, 0, 0, 0], [0, 0, 1, 1]]], dtype=torch.bool)
    assert metrics.mass_inside(scores, mask).item() == pytest.approx((3 + 4 / 2) / 8)


def test_grid_pointing_game_by_hand():
    scores = torch.tensor([[[1.0, 2.0], [3.0, -9.0]]]).repeat_interleave(3, 1).repeat_interleave(2, 2).repeat(4, 1, 1)
    share = metrics.grid_pointing_game(scores, torch.arange(4))
    torch.testing.assert_close(share, torch.tensor([1 / 6, 2 / 6, 3 / 6, 0]))
    three = metrics.grid_pointing_game(torch.ones(1, 4, 6), torch.tensor([2]), grid=(1, 3))
    torch.testing.assert_close(three, torch.tensor([1 / 3]))


@pytest.mark.parametrize("metric", [metrics.segmentation_ap, metrics.pointing_game, metrics.mass_inside])
def test_bad_maps_get_one_clear_error(metric, maps):
    scores, masks = maps
    with pytest.raises(ValueError, match="boolean"):
        metric(scores, masks.float())
    with pytest.raises(ValueError, match="sample 2 is empty"):
        metric(scores, masks & (torch.arange(5) != 2)[:, None, None])
    with pytest.raises(ValueError, match=r"\(B, h, w\)"):
        metric(scores.flatten(1), masks)
    with pytest.raises(ValueError, match="NaN"):
        metric(scores / 0 * 0, masks)


def test_grid_pointing_game_refuses_what_it_cannot_cut():
    with pytest.raises(ValueError, match="equal cells"):
        metrics.grid_pointing_game(torch.ones(1, 7, 8), torch.tensor([0]))
    with pytest.raises(ValueError, match="0..3"):
        metrics.grid_pointing_game(torch.ones(1, 8, 8), torch.tensor([4]))


# --- deletion ---------------------------------------------------------------------------------------------------------


def naive_deletion(model_fn, x, scores, descending, fractions, target, take_away):
    """One sample, one order, one fraction at a time, one token at a time."""
    order = sorted(range(len(scores)), key=lambda t: -scores[t] if descending else scores[t])
    logits = []
    for fraction in (0, *fractions):
        gone = order[: round(fraction * len(order))]
        with torch.no_grad():
            logits.append(model_fn(take_away(x, gone)))
    logits = torch.cat(logits)
    return logits[:, target], logits.log_softmax(1)[:, target], logits.argmax(1)


def test_vision_deletion_equals_a_naive_loop():
    model, images = tiny_vit(), torch.randn(3, 3, 32, 32)
    scores = {name: torch.randn(3, 4, 4) for name in ("one", "two", "three")}
    labels = torch.tensor([0, 1, 2])
    fractions = (0.1, 0.4, 0.7, 1.0)
    results = metrics.deletion(
        model, images, scores, metrics.occlude_patches, labels=labels, fractions=fractions, batch_size=7
    )

    def paint(image, gone):
        image = image.clone()
        for patch in gone:
            row, column = divmod(patch, 4)
            image[:, 8 * row : 8 * row + 8, 8 * column : 8 * column + 8] = 0
        return image[None]

    for name, maps in scores.items():
        for i in range(3):
            predicted = model(images[i : i + 1]).argmax(1)
            for curves, descending in ((results[name].mif, True), (results[name].lif, False)):
                expected = naive_deletion(
                    model, images[i], maps[i].flatten().tolist(), descending, fractions, predicted.item(), paint
                )
                for got, want in zip(curves, expected, strict=True):
                    torch.testing.assert_close(got[i], want)
        summary = results[name].summary()
        accuracy = (results[name].mif.predicts == labels[:, None]).float().mean(1)
        torch.testing.assert_close(summary["MIF accuracy (true label)"], 100 - 100 * accuracy)
        torch.testing.assert_close(summary["SRG"], summary["LIF accuracy"] + summary["MIF accuracy"] - 100)


def test_deletion_metrics_by_hand():
    """Two classes whose log-odds is the sum of the tokens that are left: 2, 1 and -1."""
    tokens = torch.tensor([[2.0, 1.0, -1.0]])

    def model_fn(x):
        return torch.stack([x.sum(1), torch.zeros(len(x))], 1)

    result = metrics.deletion(
        model_fn,
        tokens,
        {"exact": tokens},
        lambda x, keep: x * keep,
        labels=torch.tensor([1]),
        fractions=(1 / 3, 2 / 3, 1),
    )["exact"]
    mif, lif = torch.tensor([2.0, 0.0, -1.0, 0.0]), torch.tensor([2.0, 3.0, 2.0, 0.0])
    torch.testing.assert_close(result.mif.logit[0], mif)
    torch.testing.assert_close(result.lif.logit[0], lif)
    summary = {name: value.item() for name, value in result.summary().items()}
    p = [1 / (1 + np.exp(-z)) for z in (2, 0, -1, 0)]
    assert summary["MIF AOPC"] == pytest.approx((0 + (p[0] - p[1]) + (p[0] - p[2]) + (p[0] - p[3])) / 4)
    assert summary["MIF log-odds"] == pytest.approx(np.log([q / p[0] for q in p]).mean())
    # at a tie (log-odds 0) the first class wins, so only the third point of MIF answers "1"
    assert summary["MIF accuracy"] == pytest.approx(25)
    assert summary["LIF accuracy"] == pytest.approx(100)
    assert summary["SRG"] == pytest.approx(25)
    assert summary["MIF accuracy (true label)"] == pytest.approx(75)
    assert summary["LIF accuracy (true label)"] == 0
    assert summary["SRG (logit)"] == pytest.approx((7 - 1) / 4)


def test_deletion_shares_equal_copies():
    """Same scores under two names, and the empty picture of both orders, are computed once."""
    seen = []

    def model_fn(x):
        seen.append(len(x))
        return torch.stack([x.sum(1), -x.sum(1)], 1)

    x = torch.randn(2, 4)
    metrics.deletion(model_fn, x, {"a": x, "again": x}, lambda x, keep: x * keep, fractions=(0.25, 0.5, 0.75, 1))
    assert sum(seen) == 2 * (1 + 3 + 3 + 1)


def test_several_workers_find_the_same_and_one_that_fails_stops_all():
    model, x, ran = tiny_vit(), torch.randn(3, 3, 32, 32), []
    scores = {name: torch.randn(3, 16) for name in "abcd"}

    def model_fn(pictures):
        ran.append(threading.get_ident())
        assert not torch.is_grad_enabled()
        return model(pictures)

    run = partial(metrics.deletion, inputs=x, scores=scores, occlude=metrics.occlude_patches, batch_size=4)
    expected = run(model_fn)
    assert set(ran) == {threading.get_ident()}
    ran.clear()
    for name, found in run(model_fn, workers=3).items():
        for curves, others in ((found.mif, expected[name].mif), (found.lif, expected[name].lif)):
            assert all(torch.equal(a, b) for a, b in zip(curves, others, strict=True))
    assert len(set(ran)) > 1

    def fails_at_the_third(pictures):
        ran.append(0)
        if len(ran) == 3:
            raise ArithmeticError("the third")
        time.sleep(0.05)
        return model(pictures)

    ran.clear()
    with pytest.raises(ArithmeticError, match="the third"):
        run(fails_at_the_third, workers=2)
    assert len(ran) < 10, "the rest ran all the same"


def test_deletion_follows_another_target():
    model, images = tiny_vit(), torch.randn(2, 3, 32, 32)
    target = torch.tensor([3, 4])
    result = metrics.deletion(model, images, {"x": torch.randn(2, 16)}, metrics.occlude_patches, target=target)["x"]
    with torch.no_grad():
        torch.testing.assert_close(result.mif.logit[:, 0], model(images).gather(1, target[:, None])[:, 0])


@pytest.mark.parametrize("how", ["replace", "mask", "remove"])
def test_text_deletion_equals_a_naive_loop(how):
    model, ids = tiny_llama(), torch.randint(3, 30, (2, 7))
    scores = torch.randn(2, 7)
    removable = torch.ones(7, dtype=torch.bool)
    removable[[0, 6]] = False
    occlude = {
        "replace": partial(metrics.replace_tokens, token_id=1),
        "mask": metrics.mask_tokens,
        "remove": metrics.remove_tokens,
    }[how]

    def model_fn(inputs):
        return model(**inputs).logits[:, -1]

    def naive_take_away(x, gone):
        gone = [t + 1 for t in gone]
        if how == "replace":
            return {"input_ids": torch.tensor([[1 if t in gone else int(x[t]) for t in range(7)]])}
        if how == "mask":
            return {"input_ids": x[None], "attention_mask": torch.tensor([[int(t not in gone) for t in range(7)]])}
        return {"input_ids": torch.tensor([[int(x[t]) for t in range(7) if t not in gone]])}

    fractions = (0.2, 0.6, 1.0)
    result = metrics.deletion(model_fn, ids, {"x": scores}, occlude, removable=removable, fractions=fractions)["x"]
    for i in range(2):
        predicted = model_fn({"input_ids": ids[i : i + 1]}).argmax(1).item()
        for curves, descending in ((result.mif, True), (result.lif, False)):
            inner = scores[i, 1:6].tolist()
            expected = naive_deletion(model_fn, ids[i], inner, descending, fractions, predicted, naive_take_away)
            for got, want in zip(curves, expected, strict=True):
                torch.testing.assert_close(got[i], want, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("occlude", [metrics.mask_tokens, metrics.remove_tokens])
def test_padding_is_never_there_and_never_counts(occlude):
    """Prompts of 6 and 4 tokens in one padded batch get the curves that each gets alone."""
    model, ids, scores = tiny_llama(), torch.randint(3, 30, (2, 6)), torch.randn(2, 6)
    mask = torch.tensor([[1, 1, 1, 1, 1, 1], [0, 0, 1, 1, 1, 1]])
    removable = torch.ones(6, dtype=torch.bool)
    removable[-1] = False
    run = partial(metrics.deletion, lambda inputs: model(**inputs).logits[:, -1], occlude=occlude, fractions=(0.4, 1.0))
    together = run(ids, {"x": scores}, removable=removable, attention_mask=mask)["x"]
    for row, start in ((0, 0), (1, 2)):
        one = slice(row, row + 1), slice(start, None)
        alone = run(ids[one], {"x": scores[one]}, removable=removable[start:])["x"]
        for curves, expected in ((together.mif, alone.mif), (together.lif, alone.lif)):
            for got, want in zip(curves, expected, strict=True):
                torch.testing.assert_close(got[row], want[0], rtol=1e-4, atol=1e-5)


def test_masking_a_text_is_dropping_its_tokens():
    """A causal model run by hand without the hidden tokens, at their own positions, answers the same."""
    model, ids = tiny_llama(), torch.randint(3, 30, (1, 7))
    keep = torch.tensor([[True, True, False, True, False, True, True]])
    positions = torch.arange(7)[None][keep][None]
    with torch.no_grad():
        masked = model(**metrics.mask_tokens(ids, keep)).logits[:, -1]
        dropped = model(input_ids=ids[keep][None], position_ids=positions).logits[:, -1]
    torch.testing.assert_close(masked, dropped, rtol=1e-4, atol=1e-5)


def test_targets_predicted_second_and_true():
    logits = torch.tensor([[1.0, 3.0, 2.0], [0.0, -1.0, 5.0]])
    labels = torch.tensor([2, 1])
    assert metrics.target_class(logits, "predicted").tolist() == [1, 2]
    assert metrics.target_class(logits, "second").tolist() == [2, 0]
    assert metrics.target_class(logits, "true", labels).tolist() == [2, 1]
    for which, wrong in (("true", "give labels"), ("third", "predicted, second and true")):
        with pytest.raises(ValueError, match=wrong):
            metrics.target_class(logits, which)
    run = partial(metrics.deletion, lambda x: x, logits, {"x": torch.randn(2, 3)}, lambda x, keep: x * keep)
    for which in ("predicted", "second", "true"):
        result = run(target=which, labels=labels)["x"]
        followed = metrics.target_class(logits, which, labels)
        torch.testing.assert_close(result.mif.logit[:, 0], logits.gather(1, followed[:, None])[:, 0])
        assert ("SRG (second label)" in result.summary()) == (which == "second")
    hits = (result.mif.predicts == labels[:, None]).float().mean(1)
    torch.testing.assert_close(result.summary()["MIF accuracy (true label)"], 100 - 100 * hits)


@pytest.mark.parametrize(
    "occlude, name",
    [
        (metrics.occlude_patches, "occlude patches"),
        (partial(metrics.replace_tokens, token_id=1), "replace tokens"),
        (drop_tokens, "drop tokens"),
    ],
)
def test_protocols_have_names(occlude, name):
    assert metrics.protocol_name(occlude) == name


def test_overlap_by_hand():
    """Of 16 pixels two patches of four are found, the object covers one of them and another."""
    scores = torch.tensor([[[1.0, 1.0], [-1.0, -1.0]]]).repeat_interleave(2, 1).repeat_interleave(2, 2)
    mask = torch.zeros(1, 4, 4, dtype=torch.bool)
    mask[:, :, :2] = True
    assert metrics.iou(scores, mask, 0.5).item() == pytest.approx(4 / 12)
    assert metrics.f1(scores, mask, 0.5).item() == pytest.approx(2 * 4 / 16)


def test_kendall_correlation_by_hand():
    first, second = torch.tensor([[1.0, 2, 3, 4]]), torch.tensor([[1.0, 2, 4, 3]])
    expected = torch.tensor([[[1, 4 / 6, -1], [4 / 6, 1, -4 / 6], [-1, -4 / 6, 1]]])
    scores = {"a": first, "b": second, "reversed": -first}
    torch.testing.assert_close(metrics.kendall_correlation(scores), expected)
    with pytest.raises(ValueError, match="one shape"):
        metrics.kendall_correlation({"a": first, "b": second[:, :2]})


def test_occlude_patches_on_a_rectangle():
    images = torch.arange(1.0, 25).view(1, 1, 4, 6)
    keep = torch.tensor([[True, False, True, False, True, True]])
    painted = metrics.occlude_patches(images, keep, grid=(2, 3), value=-1)
    gone = torch.zeros(4, 6, dtype=torch.bool)
    gone[:2, 2:4] = gone[2:, :2] = True
    assert (painted[0, 0][gone] == -1).all()
    assert torch.equal(painted[0, 0][~gone], images[0, 0][~gone])
    with pytest.raises(ValueError, match="grid"):
        metrics.occlude_patches(images, keep)


def test_deletion_refuses_bad_input():
    x = torch.randn(2, 4)
    run = partial(metrics.deletion, lambda x: x, x, occlude=lambda x, keep: x * keep)
    with pytest.raises(ValueError, match="NaN"):
        run({"a": x * float("nan")})
    with pytest.raises(ValueError, match="scores of b"):
        run({"a": x, "b": x[:1]})
    with pytest.raises(ValueError, match="between 0 and 1"):
        run({"a": x}, fractions=(10,))
    with pytest.raises(ValueError, match="no scores"):
        run({})
    with pytest.raises(ValueError, match="not removable"):
        metrics.remove_tokens(torch.ones(1, 2), torch.zeros(1, 2, dtype=torch.bool))


def test_completeness_error_by_hand():
    absolute, relative = metrics.completeness_error(torch.tensor([2.0, -4.0]), torch.tensor([2.5, -4.0]))
    torch.testing.assert_close(absolute, torch.tensor([0.5, 0.0]))
    torch.testing.assert_close(relative, torch.tensor([0.25, 0.0]))
