"""The retention benchmark's pictures: heat maps of R, curves over the number of concepts, and strips
of the first concept.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import matplotlib
import numpy as np
from jobs import Job
from PIL import Image
from tables import Row, methods_of

matplotlib.use("Agg")
from matplotlib import pyplot


def draw(out: Path, rows: Sequence[Row], jobs: Sequence[Job]) -> None:
    heat_maps(out / "heat-maps.png", rows)
    curves(out / "over-concepts.png", rows)
    strips(out / "first-concept.jpg", methods_of(rows), jobs)


def _mean_over_seeds(rows: Sequence[Row], method: str, key: str) -> np.ndarray:
    return np.mean([np.array(r[key], float) for r in rows if r["method"] == method], axis=0)


def heat_maps(path: Path, rows: Sequence[Row]) -> None:
    """R of each method, mean over seeds."""
    matrices = {m: _mean_over_seeds(rows, m, "matrix") for m in methods_of(rows)}
    # unbiased distances of a few pictures can all be below 0
    top = max(1e-6, *(float(np.nanmax(matrix)) for matrix in matrices.values()))
    columns = min(4, len(matrices))
    lines = -(-len(matrices) // columns)
    size = (3.2 * columns, 3.2 * lines)
    figure, axes = pyplot.subplots(
        lines, columns, figsize=size, squeeze=False, layout="constrained"
    )
    for axis in axes.flat:
        axis.set_visible(False)
    for axis, (method, matrix) in zip(axes.flat, matrices.items(), strict=False):
        axis.set_visible(True)
        axis.imshow(matrix, vmin=0, vmax=top, cmap="viridis_r")
        axis.set(title=method.replace(" ", "\n"), xlabel="concept", ylabel="after concept")
        axis.set(xticks=[], yticks=[])
    figure.suptitle(
        "R[i, j]: distance of the drawn pictures from the real ones (MMD², dark is far)"
    )
    figure.savefig(path, dpi=90)


def curves(path: Path, rows: Sequence[Row]) -> None:
    """A_MMD and F_MMD over the number of concepts."""
    figure, axes = pyplot.subplots(1, 2, figsize=(12, 4))
    colors = pyplot.get_cmap("tab20")
    for number, method in enumerate(methods_of(rows)):
        counts, *figures = _mean_over_seeds(rows, method, "over").T
        for axis, values in zip(axes, figures, strict=True):
            axis.plot(counts, values, color=colors(number), marker=".", label=method)
    for axis, title in zip(axes, ("A_MMD", "F_MMD"), strict=True):
        axis.set(title=title, xlabel="concepts learned")
        axis.xaxis.get_major_locator().set_params(integer=True)
    axes[1].legend(fontsize=7, loc="center left", bbox_to_anchor=(1, 0.5))
    figure.tight_layout()
    figure.savefig(path, dpi=90, bbox_inches="tight")  # long names and all


def strips(path: Path, methods: Sequence[str], jobs: Sequence[Job]) -> None:
    """The first concept by each method: a real picture, then drawn after each later concept."""
    counts = [n + 1 for n in jobs[0].strip]
    size = (1.3 * len(counts) + 1.3, 1.6 * len(methods) + 0.4)
    figure, axes = pyplot.subplots(
        len(methods), 1, figsize=size, squeeze=False, layout="constrained"
    )
    for axis, method in zip(axes[:, 0], methods, strict=True):
        folder = next(job.folder for job in jobs if job.variant == method)
        axis.imshow(Image.open(folder / "first-concept.jpg"))
        axis.set(xticks=[], yticks=[], frame_on=False)
        axis.set_title(method, fontsize=9, loc="left")
    after = ", ".join(map(str, counts))
    figure.suptitle(
        f"The first concept: a real picture, then drawn after {after} concepts", fontsize=9
    )
    figure.savefig(path, dpi=100, bbox_inches="tight", pil_kwargs={"quality": 85})
