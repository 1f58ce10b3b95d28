"""What trained networks drew, and how far it is from what they should have drawn."""

import io
import pathlib
from collections.abc import Mapping

import matplotlib

matplotlib.use("Agg")

import matplotlib.pyplot as plt
import numpy as np
from PIL import Image


def draw(
    path: str | pathlib.Path,
    truth: np.ndarray,
    drawn: Mapping[str, np.ndarray],
    colors: str = "viridis",
) -> None:
    """Draws the truth beside every picture, and the errors below on one scale.

    Args:
      path: of the PNG.
      truth: ``[h, w]``.
      drawn: pictures like it by their titles.
      colors: name of Matplotlib's map for the pictures.
    """
    columns = len(drawn) + 1
    figure, axes = plt.subplots(
        2, columns, figsize=(1.9 * columns, 4.0), layout="constrained"
    )
    low, high = float(truth.min()), float(truth.max())
    errors = [np.abs(picture - truth) for picture in drawn.values()]
    # Without the worst hundredth, which would leave the rest dark.
    worst = float(np.quantile(np.stack(errors), 0.99))
    pictures = {"exact": truth, **drawn}
    for axis, (title, picture) in zip(axes[0], pictures.items(), strict=True):
        axis.imshow(picture, cmap=colors, vmin=low, vmax=high, aspect="auto")
        axis.set_title(title.replace(", ", "\n"), fontsize=8)
    axes[1][0].axis("off")
    for axis, error in zip(axes[1][1:], errors, strict=True):
        axis.imshow(error, cmap="magma", vmin=0, vmax=worst, aspect="auto")
    axes[1][1].set_ylabel("|error|", fontsize=8)
    for row in axes:
        figure.colorbar(row[1].images[0], ax=list(row), fraction=0.03)
    for axis in axes.flat:
        axis.set(xticks=[], yticks=[])
    stream = io.BytesIO()
    figure.savefig(stream, dpi=90)
    plt.close(figure)
    # A palette halves the file: the noise of the errors does not compress.
    Image.open(stream).convert("RGB").quantize(256).save(path, "PNG")
