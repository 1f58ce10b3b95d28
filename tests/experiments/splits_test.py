import numpy as np
import pytest

from experiments.splits import ArraySplit, Subset


def test_subset_restricts_the_rows():
    split = ArraySplit(np.zeros((10, 2, 2, 3), np.uint8), np.arange(10, dtype=np.int32))
    subset = Subset(split, np.array([7, 2, 5]))
    assert len(subset) == 3
    got = subset.__getitems__(np.array([2, 0]))
    np.testing.assert_array_equal(got["label"], [5, 7])


@pytest.mark.parametrize(
    ("images", "labels", "message"),
    [
        (np.zeros((2, 4, 4, 3)), np.zeros(2), "images must be uint8.*Got float64"),
        (np.zeros((2, 4, 4), np.uint8), np.zeros(2), r"images must be.*\(2, 4, 4\)"),
        (np.zeros((2, 4, 4, 3), np.uint8), np.zeros(3), r"shape \(2,\). Got \(3,\)"),
    ],
)
def test_array_split_errors(images, labels, message):
    with pytest.raises(ValueError, match=message):
        ArraySplit(images, labels)
