"""Scenes of the built-in *shapes* data set: drawn with NumPy and OpenCV, reproducible from a seed.

A scene is a muted, noisy background under a few textured objects that overlap and leave the frame.
Colour hints at a class without giving it away: hues scatter about the class's own and reach into
its neighbours', so that the outline has to be read.

Letters: H, W image height and width.
"""

from collections.abc import Callable
from dataclasses import dataclass

import cv2
import numpy as np

# Neighbours on the colour circle are unlike in outline.
CLASSES = ('circle', 'star', 'square', 'crescent', 'triangle', 'ring', 'cross', 'heart')
# RGB, the classes' own hues: what visualisers draw with.
PALETTE = (
    (230, 60, 60), (230, 188, 60), (145, 230, 60), (60, 230, 103),
    (60, 230, 230), (60, 103, 230), (145, 60, 230), (230, 60, 188),
)  # fmt: skip
HUE_SPREAD = 0.045  # standard deviation; the classes are 0.125 apart
OBJECTS = (2, 5)  # fewest and most an image
RADII = (0.14, 0.27)  # of the shorter side; an outline is two radii across
MIN_VISIBLE = 0.45  # of an object's area; what is hidden further is placed elsewhere
PLACEMENT_TRIES = 12
OUTLINE_POINTS = 48
SUBPIXEL_BITS = 4
SHADOW = 12  # pixels that an object's shadow may reach beyond it


@dataclass(frozen=True)
class Scene:
    """One image and its objects, front to back.

    Attributes:
        image: (H, W, 3) uint8, BGR.
        labels: Indices into `CLASSES`, one an object.
        masks: Per object the pixels where it is seen, (H, W) bool; they do not overlap.
    """

    image: np.ndarray
    labels: tuple[int, ...]
    masks: tuple[np.ndarray, ...]


def draw_scene(rng: np.random.Generator, height: int, width: int) -> Scene:
    """Draw a scene.

    Args:
        rng: Source of everything random: equal states give equal scenes.
        height: Image height in pixels.
        width: Image width in pixels.

    Returns:
        The scene, of at least one object.
    """
    canvas = _background(rng, height, width)
    labels, alphas, masks = _place_objects(rng, height, width)
    for label, alpha in zip(reversed(labels), reversed(alphas), strict=True):
        _paint(rng, canvas, label, alpha)
    canvas += rng.uniform(3.0, 9.0) * rng.standard_normal(canvas.shape, np.float32)
    image = np.clip(canvas, 0, 255).astype(np.uint8)
    return Scene(image, tuple(labels), tuple(masks))


def _place_objects(
    rng: np.random.Generator, height: int, width: int
) -> tuple[list[int], list[np.ndarray], list[np.ndarray]]:
    """Choose classes and outlines front to back: a later object never hides an earlier one."""
    count = int(rng.integers(OBJECTS[0], OBJECTS[1] + 1))
    taken = np.zeros((height, width), bool)
    labels, alphas, masks = [], [], []
    for _ in range(count):
        label = int(rng.integers(len(CLASSES)))
        for _ in range(PLACEMENT_TRIES):
            alpha, area = _random_outline(rng, label, height, width)
            visible = (alpha >= 0.5) & ~taken
            if visible.sum() >= MIN_VISIBLE * area:
                taken |= visible
                labels.append(label)
                alphas.append(alpha)
                masks.append(visible)
                break
    assert labels, "the first object is in nobody's way and centred inside the frame"
    return labels, alphas, masks


def _random_outline(
    rng: np.random.Generator, label: int, height: int, width: int
) -> tuple[np.ndarray, float]:
    """Turn, stretch and move a class's outline; returns its coverage (H, W) and its whole area."""
    radius = rng.uniform(*RADII) * min(height, width)
    stretch = np.exp(rng.uniform(-0.15, 0.15))
    # Up to a third of a turn keeps a heart a heart; the rest is symmetric or turns freely.
    turn = rng.uniform(-np.pi / 3, np.pi / 3)
    cos, sin = np.cos(turn), np.sin(turn)
    linear = np.array([[cos, -sin], [sin, cos]]) @ np.diag([radius * stretch, radius / stretch])
    centre = rng.uniform(0.12, 0.88, 2) * (width, height)
    contours = [points @ linear.T + centre for points in OUTLINES[label]()]

    coverage = np.zeros((height, width), np.uint8)
    scale = 1 << SUBPIXEL_BITS
    fixed = [np.round(points * scale).astype(np.int32) for points in contours]
    cv2.fillPoly(coverage, fixed, 255, cv2.LINE_AA, SUBPIXEL_BITS)
    # The first contour bounds the object, any other is a hole in it.
    area, *holes = (abs(_signed_area(points)) for points in contours)
    return coverage.astype(np.float32) / 255, area - sum(holes)


def _signed_area(points: np.ndarray) -> float:
    x, y = points.T
    return 0.5 * float(np.dot(x, np.roll(y, -1)) - np.dot(y, np.roll(x, -1)))


# Outlines: functions without arguments that give contours (n, 2) in (x, y), about one unit wide
# each way from the origin, y down.
def _arc(radius: float, start: float, end: float, points: int = OUTLINE_POINTS) -> np.ndarray:
    angle = np.linspace(start, end, points, endpoint=False)
    return radius * np.stack([np.cos(angle), np.sin(angle)], axis=1)


def _polygon(corners: int, radius: float = 1.0) -> np.ndarray:
    return _arc(radius, -np.pi / 2, 1.5 * np.pi, corners)


def _circle() -> list[np.ndarray]:
    return [_polygon(OUTLINE_POINTS, 0.9)]


def _square() -> list[np.ndarray]:
    return [0.85 * np.array([[-1, -1], [1, -1], [1, 1], [-1, 1]], float)]


def _triangle() -> list[np.ndarray]:
    return [_polygon(3, 1.15) + (0, 0.2)]


def _star() -> list[np.ndarray]:
    points = _polygon(10, 1.15)
    points[1::2] *= 0.45
    return [points]


def _ring() -> list[np.ndarray]:
    return [_polygon(OUTLINE_POINTS), _polygon(OUTLINE_POINTS, 0.55)]


def _cross() -> list[np.ndarray]:
    arm = 0.34
    quarter = np.array([[arm, -1], [arm, -arm], [1, -arm]])
    turn = np.array([[0, 1], [-1, 0]])
    return [np.concatenate([quarter @ np.linalg.matrix_power(turn, k) for k in range(4)])]


def _crescent() -> list[np.ndarray]:
    """Circle of radius 1 about the origin less one of radius 0.85 about (0.55, 0)."""
    radius, shift = 0.85, 0.55
    # The two circles meet at (x, +-y).
    x = (1 - radius**2 + shift**2) / (2 * shift)
    y = np.sqrt(1 - x**2)
    outer, inner = np.arctan2(y, x), np.arctan2(y, x - shift)
    back = _arc(1.0, outer, 2 * np.pi - outer)
    front = _arc(radius, 2 * np.pi - inner, inner) + (shift, 0)
    return [1.1 * np.concatenate([back, front]) + (0.25, 0)]


def _heart() -> list[np.ndarray]:
    angle = np.linspace(0, 2 * np.pi, OUTLINE_POINTS, endpoint=False)
    x = 16 * np.sin(angle) ** 3
    y = 13 * np.cos(angle) - 5 * np.cos(2 * angle) - 2 * np.cos(3 * angle) - np.cos(4 * angle)
    return [np.stack([x, -y - 2.5], axis=1) / 15.5]


OUTLINES: tuple[Callable[[], list[np.ndarray]], ...] = (
    _circle, _star, _square, _crescent, _triangle, _ring, _cross, _heart,
)  # fmt: skip


# Colour and texture. A pattern is (H, W) float32 in [0, 1].
def _paint(rng: np.random.Generator, canvas: np.ndarray, label: int, alpha: np.ndarray) -> None:
    """Paint an object of a class over `canvas` in place: shadow, texture, light from one side."""
    x, y, width, height = cv2.boundingRect((alpha > 0).astype(np.uint8))
    window = np.s_[
        max(y - SHADOW, 0) : y + height + SHADOW, max(x - SHADOW, 0) : x + width + SHADOW
    ]
    canvas, alpha = canvas[window], alpha[window]
    height, width = alpha.shape
    shift = np.float32([[1, 0, SHADOW / 4], [0, 1, SHADOW / 4]])
    shadow = cv2.GaussianBlur(cv2.warpAffine(alpha, shift, (width, height)), (0, 0), SHADOW / 4)
    canvas *= 1 - 0.45 * shadow[..., None]

    hue = (label / len(CLASSES) + rng.normal(0.0, HUE_SPREAD)) % 1.0
    colour = _bgr(hue, rng.uniform(0.45, 0.95), rng.uniform(0.6, 1.0))
    other = _bgr((hue + rng.normal(0.0, 0.02)) % 1.0, rng.uniform(0.3, 0.9), rng.uniform(0.3, 0.9))
    pattern = TEXTURES[rng.integers(len(TEXTURES))](rng, height, width)[..., None]
    texture = colour + (other - colour) * pattern
    light = 0.75 + 0.5 * _ramp(rng, height, width)[..., None]
    canvas += alpha[..., None] * (texture * light - canvas)


def _background(rng: np.random.Generator, height: int, width: int) -> np.ndarray:
    """Two muted colours under cloudy noise, a faint pattern, light from one side, loose strokes."""
    first, second = (
        _bgr(rng.random(), rng.uniform(0.0, 0.35), rng.uniform(0.2, 0.85)) for _ in '12'
    )
    pattern = _clouds(rng, height, width)[..., None]
    canvas = first + (second - first) * pattern
    faint = TEXTURES[rng.integers(len(TEXTURES))](rng, height, width) - 0.5
    canvas *= 1 + rng.uniform(0.05, 0.3) * faint[..., None]
    canvas *= 0.75 + 0.5 * _ramp(rng, height, width)[..., None]
    for _ in range(rng.integers(2, 9)):
        start, end = (rng.random((2, 2)) * (width, height)).astype(int).tolist()
        colour = _bgr(rng.random(), rng.uniform(0.0, 0.6), rng.uniform(0.2, 0.9)).tolist()
        cv2.line(canvas, start, end, colour, int(rng.integers(1, 4)), cv2.LINE_AA)
    return canvas


def _bgr(hue: float, saturation: float, value: float) -> np.ndarray:
    """Colour (3,) float32 in 0..255, blue first; all arguments in [0, 1]."""
    hsv = np.array([[[360 * hue, saturation, value]]], np.float32)
    return 255 * cv2.cvtColor(hsv, cv2.COLOR_HSV2BGR)[0, 0]


def _ramp(rng: np.random.Generator, height: int, width: int) -> np.ndarray:
    """A linear gradient in a random direction."""
    position = _along(rng.uniform(0, 2 * np.pi), height, width)
    return (position - position.min()) / np.ptp(position)


def _along(angle: float, height: int, width: int) -> np.ndarray:
    """Signed distance in pixels of every pixel from the first one, along a direction."""
    x = np.arange(width, dtype=np.float32) * np.float32(np.cos(angle))
    y = np.arange(height, dtype=np.float32) * np.float32(np.sin(angle))
    return x + y[:, None]


def _clouds(rng: np.random.Generator, height: int, width: int) -> np.ndarray:
    """Smooth noise of three octaves."""
    total = np.zeros((height, width), np.float32)
    for cells, weight in ((4, 1.0), (9, 0.6), (24, 0.35)):
        grid = rng.random((cells, cells), np.float32)
        total += weight * cv2.resize(grid, (width, height), interpolation=cv2.INTER_CUBIC)
    return (total - total.min()) / np.ptp(total)


def _stripes(rng: np.random.Generator, height: int, width: int) -> np.ndarray:
    period = rng.uniform(7, 20)
    position = _along(rng.uniform(0, 2 * np.pi), height, width)
    return 0.5 + 0.5 * np.sin(position * (2 * np.pi / period))


def _checks(rng: np.random.Generator, height: int, width: int) -> np.ndarray:
    angle, cell = rng.uniform(0, np.pi / 2), rng.uniform(6, 16)
    across, down = (_along(angle + turn, height, width) for turn in (0, np.pi / 2))
    return (np.floor(across / cell) + np.floor(down / cell)) % 2


def _speckles(rng: np.random.Generator, height: int, width: int) -> np.ndarray:
    noise = cv2.GaussianBlur(rng.random((height, width), np.float32), (0, 0), 1.5)
    return (noise > np.quantile(noise, rng.uniform(0.6, 0.9))).astype(np.float32)


def _plain(rng: np.random.Generator, height: int, width: int) -> np.ndarray:
    return 0.4 * _clouds(rng, height, width)


TEXTURES = (_clouds, _stripes, _checks, _speckles, _plain)
