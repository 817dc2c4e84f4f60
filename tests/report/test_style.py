"""The colours: contrast on both pages, and apart for colour-blind readers."""

from __future__ import annotations

import itertools

import numpy as np
import pytest

from probmoe_ext.report.style import DARK, LIGHT, house_style, log_axis, panels

# Machado, Oliveira and Fernandes 2009, severity 1.
VISION = {
    "normal": np.eye(3),
    "protanopia": [[0.152, 1.053, -0.205], [0.115, 0.786, 0.099], [-0.004, -0.048, 1.052]],
    "deuteranopia": [[0.367, 0.861, -0.228], [0.280, 0.673, 0.047], [-0.012, 0.043, 0.969]],
    "tritanopia": [[1.256, -0.077, -0.179], [-0.078, 0.931, 0.148], [0.005, 0.691, 0.304]],
}
# Oklab (Ottosson 2020).
TO_CONES = [[0.4122, 0.5363, 0.0514], [0.2119, 0.6807, 0.1074], [0.0883, 0.2817, 0.6300]]
TO_LAB = [[0.2105, 0.7936, -0.0041], [1.9780, -2.4286, 0.4506], [0.0259, 0.7828, -0.8087]]


def linear(colour: str) -> np.ndarray:
    values = np.array([int(colour[place : place + 2], 16) for place in (1, 3, 5)]) / 255
    return np.where(values <= 0.04045, values / 12.92, ((values + 0.055) / 1.055) ** 2.4)


def contrast(first: str, second: str) -> float:
    low, high = sorted(float(linear(one) @ [0.2126, 0.7152, 0.0722]) for one in (first, second))
    return (high + 0.05) / (low + 0.05)


def oklab(colour: str, vision: str) -> np.ndarray:
    seen = np.clip(np.array(VISION[vision]) @ linear(colour), 0, 1)
    return np.array(TO_LAB) @ np.cbrt(np.array(TO_CONES) @ seen)


@pytest.mark.parametrize(("roles", "page"), [(LIGHT, "#ffffff"), (DARK, "#14171b")])
def test_contrast_as_wcag_asks(roles: dict[str, str], page: str) -> None:
    assert contrast(roles["ink"], page) >= 7
    assert contrast(roles["muted"], page) >= 4.5
    assert all(contrast(colour, page) >= 3 for role, colour in roles.items() if role.startswith("series-"))


@pytest.mark.parametrize("vision", VISION)
@pytest.mark.parametrize("roles", [LIGHT, DARK])
def test_series_stay_apart(roles: dict[str, str], vision: str) -> None:
    places = [oklab(colour, vision) for role, colour in roles.items() if role.startswith("series-")]
    assert min(float(np.linalg.norm(a - b)) for a, b in itertools.combinations(places, 2)) > 0.1


def test_roles_are_told_by_their_colour() -> None:
    assert len(set(LIGHT.values())) == len(LIGHT)
    assert set(DARK) == set(LIGHT)


def test_labels_of_a_logarithmic_axis_are_numbers() -> None:
    with house_style():
        figure, (axes,) = panels(1, (3, 2))
        axes.plot([20, 3000], [0.04, 5])
        log_axis(axes, "x")
        log_axis(axes, "y")
        figure.draw_without_rendering()
    assert [label.get_text() for label in axes.get_xticklabels()][1:-1] == ["100", "1000"]
    assert "0.1" in [label.get_text() for label in axes.get_yticklabels()]
    assert not any(label.get_text() for axis in (axes.xaxis, axes.yaxis) for label in axis.get_minorticklabels())
