"""Loss and scores of train_encoder, against hand computations and plain oracles."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from torch.nn import functional as F

from train_encoder.loss import contrastive_loss
from train_encoder.train import learning_rate
from train_encoder.zero_shot import hard_accuracy, retrieval


def features(rows: int, seed: int) -> tuple[torch.Tensor, torch.Tensor]:
    generator = torch.Generator().manual_seed(seed)
    return tuple(F.normalize(torch.randn(rows, 8, generator=generator), dim=-1) for _ in range(2))


@pytest.mark.parametrize("smoothing", [0.0, 0.1])
def test_loss_equals_cross_entropy_and_leaves_invalid_rows_out(smoothing):
    image, text = features(6, 0)
    logits = 100 * image @ text.T
    target = torch.arange(6)
    expected = (F.cross_entropy(logits, target, label_smoothing=smoothing)
                + F.cross_entropy(logits.T, target, label_smoothing=smoothing)) / 2
    everything = torch.ones(6, dtype=torch.bool)
    loss = contrastive_loss(image, text, everything, label_smoothing=smoothing)
    torch.testing.assert_close(loss, expected)
    cooler = (F.cross_entropy(logits / 5, target) + F.cross_entropy(logits.T / 5, target)) / 2
    torch.testing.assert_close(contrastive_loss(image, text, everything, logit_scale=20.0), cooler)

    valid = torch.tensor([True, False, True, True, False, True])
    image.requires_grad_()
    masked = contrastive_loss(image, text, valid, label_smoothing=smoothing)
    torch.testing.assert_close(masked, contrastive_loss(image[valid], text[valid], everything[:4],
                                                        label_smoothing=smoothing))
    gradient, = torch.autograd.grad(masked, image)
    assert gradient.isfinite().all() and not gradient[~valid].any() and gradient[valid].any()


def test_learning_rate_warms_up_and_falls_to_zero():
    rates = [learning_rate(step, 10, 2.0, 4) for step in range(1, 11)]
    assert rates[:5] == [0.5, 1.0, 1.5, 2.0, 2.0]
    assert rates[4:] == sorted(rates[4:], reverse=True) and 0 < rates[-1] < 0.2


def test_retrieval_with_several_captions_against_sorting():
    generator = np.random.default_rng(0)
    owners = np.repeat(np.arange(12), 3)[:-1]  # the last picture has two captions
    image, text = generator.normal(size=(12, 5)), generator.normal(size=(35, 5))
    result = retrieval(image, text, owners)
    scores = text @ image.T
    for k in (1, 5, 10):
        found = [any(owners[c] == i for c in np.argsort(-scores[:, i])[:k]) for i in range(12)]
        assert result["image_to_text"][f"R@{k}"] == pytest.approx(np.mean(found))
        found = [owners[c] in np.argsort(-scores[c])[:k] for c in range(35)]
        assert result["text_to_image"][f"R@{k}"] == pytest.approx(np.mean(found))
    assert np.mean(np.array(result["image_to_text_ranks"]) < 1) == pytest.approx(result["image_to_text"]["R@1"])


def test_a_model_that_sees_no_difference_scores_nothing():
    result = retrieval(np.ones((20, 4)), np.ones((20, 4)), np.arange(20))
    assert result["image_to_text"]["R@10"] == result["text_to_image"]["R@10"] == 0


def test_hard_accuracy_intervals_count_pictures_not_pairs():
    items = [{"image": str(n // 4), "kind": "color", "correct": int(n // 4 % 2)} for n in range(40)]
    result = hard_accuracy(items + [{"image": "a", "kind": "place", "correct": 1}])
    assert result["color"]["accuracy"] == 0.5 and result["color"]["n"] == 40
    assert result["color"]["high"] - result["color"]["low"] > 0.6  # 10 pictures: 2 * 2.26 * 0.167
    assert result["place"] == {"accuracy": 1.0, "low": None, "high": None, "n": 1}
