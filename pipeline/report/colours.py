"""Colours of feature vectors: their three principal components as red, green and blue."""

import base64
import io

import numpy as np
from numpy.typing import NDArray
from PIL import Image

FITTED_ROWS = 600  # from which the components are taken
_BOUNDS = (2.0, 98.0)  # percentiles that become 0 and 255: a few outliers would leave all grey


def principal_colours(values: NDArray[np.float32]) -> NDArray[np.uint8]:
    """Maps vectors (N, D) to colours (N, 3); alike vectors are of like colours.

    The first component is red; each points to where its largest weight is positive, so that the
    same vectors always have the same colours. With less than three dimensions the rest is 0.
    """
    centred = values - values.mean(axis=0)
    fitted = centred[np.linspace(0, len(values) - 1, min(len(values), FITTED_ROWS)).astype(int)]
    _, _, components = np.linalg.svd(fitted, full_matrices=False)
    components = components[:3]
    largest = np.abs(components).argmax(axis=1)[:, None]
    components *= np.sign(np.take_along_axis(components, largest, axis=1))
    projected = centred @ components.T
    low, high = np.percentile(projected, _BOUNDS, axis=0)
    shares = (projected - low) / np.maximum(high - low, np.finfo(np.float32).tiny)
    colours = np.zeros((len(values), 3), np.uint8)
    colours[:, : len(components)] = np.round(255 * shares.clip(0, 1))
    return colours


def colour_layer(colours: NDArray[np.uint8], grid: tuple[int, int]) -> str:
    """Returns the URL of an image of one pixel for each cell (rows * columns, 3), row by row."""
    buffer = io.BytesIO()
    Image.fromarray(colours.reshape(*grid, 3)).save(buffer, "PNG")
    return "data:image/png;base64," + base64.b64encode(buffer.getvalue()).decode("ascii")
