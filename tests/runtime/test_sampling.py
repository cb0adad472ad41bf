"""Which token comes next, by the logits of each text."""

import numpy as np
import pytest

from ir_convert.runtime.sampling import choose


@pytest.mark.parametrize(
    ("settings", "expected"),
    [
        ((1.0, None, None), [0.5, 0.3, 0.15, 0.05]),
        ((2.0, None, None), [0.379, 0.294, 0.208, 0.12]),
        ((1.0, None, 0.7), [0.625, 0.375, 0, 0]),  # the token that crosses the line stays
        ((1.0, 3, None), [0.526, 0.316, 0.158, 0]),
    ],
)
def test_samples_are_drawn_by_their_probabilities(settings, expected):
    logits = np.log([[0.05, 0.5, 0.15, 0.3]]).repeat(4000, axis=0).astype(np.float32)
    drawn = choose(logits, *settings, np.random.default_rng(0))
    shares = np.bincount(drawn, minlength=4)[[1, 3, 2, 0]] / 4000
    np.testing.assert_allclose(shares, expected, atol=0.03)
    assert (shares[np.array(expected) == 0] == 0).all()


def test_each_text_is_sampled_by_its_own_logits():
    """However far those of another are from them; and each has likeliest tokens of its own."""
    logits = np.log([[0.97, 0.01, 0.01, 0.01], [0.25, 0.25, 0.25, 0.25]])
    logits[1] += 900
    drawn = choose(logits.repeat(200, axis=0).astype(np.float32), 1.0, None, 0.9, np.random.default_rng(0))
    assert set(drawn[:200].tolist()) == {0}
    assert set(drawn[200:].tolist()) == {0, 1, 2, 3}


def test_a_draw_next_to_1_takes_the_last_token_that_may_come():
    class Most:
        def random(self, shape):
            return np.full(shape, np.nextafter(1, 0))

    logits = np.zeros((2, 20), np.float32)  # the shares of 10, rounded, add up to no more than that
    assert choose(logits[:, :10], 1.0, None, None, Most()).tolist() == [9, 9]
    assert choose(logits, 1.0, None, 0.48, Most()).tolist() == [9, 9]
