"""p(v_i) by place."""

import pytest
import torch

from mipruner.prior import visual_prior

TABLE = [[1.0, 2.0], [3.0, 10.0]]


@pytest.mark.parametrize("name", ["uniform", "center", "thirds", "estimated"])
@pytest.mark.parametrize("grid", [(24, 24), (1, 1), (5, 8), (3, 12, 9)])
def test_a_prior_is_a_distribution(name, grid):
    prior = visual_prior(name, grid, TABLE).view(-1, *grid[-2:])
    assert (prior > 0).all()
    torch.testing.assert_close(prior.sum(), torch.tensor(1.0))
    assert torch.equal(prior, prior[:1].expand_as(prior)), "frames differ"


@pytest.mark.parametrize("name", ["uniform", "center", "thirds"])
def test_left_is_right_and_up_is_down(name):
    prior = visual_prior(name, (10, 7)).view(10, 7)
    torch.testing.assert_close(prior, prior.flip(0))
    torch.testing.assert_close(prior, prior.flip(1))


def test_where_they_are_highest():
    assert visual_prior("uniform", (4, 5)).tolist() == pytest.approx([1 / 20] * 20)
    assert visual_prior("center", (9, 9)).argmax() == 40
    thirds = visual_prior("thirds", (30, 30)).view(30, 30)
    assert {tuple(place) for place in (thirds > 0.999 * thirds.max()).nonzero().tolist()} <= {
        (y, x) for y in (9, 10, 19, 20) for x in (9, 10, 19, 20)
    }
    for prior in (visual_prior("center", (24, 24)), visual_prior("thirds", (24, 24))):
        assert 0.005 < prior[0] / prior.max() < 0.05


def test_the_estimate_is_stretched_over_the_image():
    assert visual_prior("estimated", (2, 2), TABLE).tolist() == pytest.approx([1 / 16, 2 / 16, 3 / 16, 10 / 16])
    quarters = visual_prior("estimated", (20, 20), TABLE).view(2, 10, 2, 10).sum((1, 3))
    assert quarters.flatten().diff().min() > 0
    row = visual_prior("estimated", (1, 4), [[1.0, 1.0, 1.0, 1.0, 3.0, 3.0, 3.0, 3.0]])
    assert row[0] == pytest.approx(1 / 8, rel=0.02)
    assert row[3] == pytest.approx(3 / 8, rel=0.02)


@pytest.mark.parametrize("table", [None, [[1.0, 0.0]], [[1.0, -2.0]], [[float("nan")]]])
def test_an_estimate_must_be_positive(table):
    with pytest.raises(ValueError, match="needs prior_table"):
        visual_prior("estimated", (2, 2), table)
    with pytest.raises(ValueError, match="choose uniform, center, thirds or estimated"):
        visual_prior("middle", (2, 2))
