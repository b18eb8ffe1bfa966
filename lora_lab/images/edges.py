"""Edges of an image as ControlNets were trained with: those of OpenCV's Canny, without OpenCV."""

import numpy as np
from PIL import Image
from scipy.ndimage import binary_propagation

TANGENT = np.tan(np.pi / 8)  # of 22.5 degrees: below it a gradient counts as horizontal


def canny(picture: Image.Image, low: float, high: float) -> Image.Image:
    """White edges of one pixel on black (RGB, the size of the RGB `picture`): Canny 1986, as cv2.Canny computes it.

    A gradient is |dx| + |dy| of Sobel's 3x3 filter in the channel where that is largest. An edge consists of pixels
    whose gradient is above `low` and a maximum across the edge, and has at least one above `high`."""
    dx, dy = _gradient(np.asarray(picture, np.int32))
    size = np.abs(dx) + np.abs(dy)
    candidates = _largest_across(dx, dy, size) & (size > low)
    edges = binary_propagation(candidates & (size > high), np.ones((3, 3)), candidates)
    return Image.fromarray(edges.astype(np.uint8) * 255).convert("RGB")


def _gradient(pixels: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Sobel's derivatives (H, W) along x and y of pixels (H, W, C), of the channel in which they are largest."""
    padded = np.pad(pixels, ((1, 1), (1, 1), (0, 0)), mode="edge")
    rows = padded[:-2] + 2 * padded[1:-1] + padded[2:]
    columns = padded[:, :-2] + 2 * padded[:, 1:-1] + padded[:, 2:]
    dx, dy = rows[:, 2:] - rows[:, :-2], columns[2:] - columns[:-2]
    channel = (np.abs(dx) + np.abs(dy)).argmax(2)[..., None]
    return np.take_along_axis(dx, channel, 2)[..., 0], np.take_along_axis(dy, channel, 2)[..., 0]


def _largest_across(dx: np.ndarray, dy: np.ndarray, size: np.ndarray) -> np.ndarray:
    """Whether the gradient of a pixel (H, W) is larger than that of its neighbours along the gradient."""
    padded = np.pad(size, 1)
    height, width = size.shape

    def shifted(down: int, right: int) -> np.ndarray:
        return padded[1 + down : 1 + down + height, 1 + right : 1 + right + width]

    flat = np.abs(dy) < TANGENT * np.abs(dx)
    steep = np.abs(dy) > (2 + TANGENT) * np.abs(dx)  # above 67.5 degrees
    falling = (dx < 0) != (dy < 0)
    diagonal = np.where(
        falling,
        (size > shifted(-1, 1)) & (size > shifted(1, -1)),
        (size > shifted(-1, -1)) & (size > shifted(1, 1)),
    )
    horizontal = (size > shifted(0, -1)) & (size >= shifted(0, 1))
    vertical = (size > shifted(-1, 0)) & (size >= shifted(1, 0))
    return np.where(flat, horizontal, np.where(steep, vertical, diagonal))
