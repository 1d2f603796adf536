import torch

from trainer.evaluation.duplicates import (
    groups,
    likely_classmates,
    near_identical,
    pairs_of,
    shared_neighbours,
)
from trainer.features.neighbours import nearest_others


def neighbourhoods(x: torch.Tensor, k: int) -> tuple[torch.Tensor, torch.Tensor]:
    return nearest_others(x, torch.arange(len(x)), k, device="cpu")


def features() -> torch.Tensor:
    """Five groups of ten; 3 is 7 again, 20, 21 and 22 nearly are one, 40 stands alone."""
    rng = torch.Generator().manual_seed(0)
    x = torch.eye(5, 16)[torch.arange(50) // 10] + 0.08 * torch.randn(50, 16, generator=rng)
    x[7] = 2 * x[3]  # cosine does not see lengths
    x[21], x[22] = x[20] + 1e-4, x[20] - 1e-4
    x[40] = torch.eye(16)[15]
    return x


def test_planted_duplicates_are_found_and_nothing_else() -> None:
    pairs = near_identical(pairs_of(*neighbourhoods(features(), 5)), 0.9999)
    assert {tuple(pair) for pair in pairs.samples_P2.tolist()} == {
        (3, 7), (20, 21), (20, 22), (21, 22),
    }  # fmt: skip
    assert pairs.similarity_P.diff().max() <= 0
    assert groups(pairs.samples_P2) == [[20, 21, 22], [3, 7]]


def test_likely_false_negatives_have_each_other_and_their_neighbours_in_common() -> None:
    similarity, index = neighbourhoods(features(), 4)  # of nine: some one-sided
    pairs = likely_classmates(pairs_of(similarity, index), 0.9999, 0.25)
    assert len(pairs) > 20
    first, second = pairs.samples_P2.T
    assert ((first // 10) == (second // 10)).all()
    assert not ((first == 40) | (second == 40)).any()
    assert not {(3, 7), (20, 21)} & {tuple(pair) for pair in pairs.samples_P2.tolist()}
    assert pairs.shared_P.min() >= 0.25 and pairs.shared_P.diff().max() <= 0
    for (a, b), shared in zip(pairs.samples_P2.tolist(), pairs.shared_P.tolist()):
        mine, theirs = ({i, *index[i].tolist()} for i in (a, b))
        assert b in mine and a in theirs
        assert shared == len(mine & theirs) / len(mine | theirs)


def test_no_sample_is_its_own_neighbour_even_among_many_equal_ones() -> None:
    equal = torch.ones(30, 4)
    similarity, index = neighbourhoods(equal, 5)
    assert index.shape == (30, 5)
    assert not (index == torch.arange(30)[:, None]).any()
    assert groups(near_identical(pairs_of(similarity, index), 0.999).samples_P2) == [
        list(range(30))
    ]


def test_more_neighbours_than_samples_are_all_the_others() -> None:
    _, index = neighbourhoods(torch.eye(4), 10)
    assert index.shape == (4, 3)
    assert shared_neighbours(index, torch.tensor([[0, 3]])).tolist() == [1.0]


def test_one_sample_has_no_pairs() -> None:
    pairs = near_identical(pairs_of(*neighbourhoods(torch.ones(1, 4), 3)), 0.5)
    assert len(pairs) == 0
    assert groups(pairs.samples_P2) == []
