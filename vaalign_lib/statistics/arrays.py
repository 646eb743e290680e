"""The one check of what public functions are given: finite real numbers in a range, fitting shapes."""

import numpy as np
from numpy.typing import ArrayLike, NDArray

Array = NDArray[np.float64]


def numbers(
    name: str,
    values: ArrayLike,
    *,
    above: float | None = None,
    at_least: float | None = None,
    below: float | None = None,
    at_most: float | None = None,
    whole: bool = False,
    axes: int | None = None,
    least: int = 1,
) -> Array:
    """Return values, of any shape, as an array of floats; booleans count as 0 and 1.

    There must be at least `least` of them, on so many `axes` (0: a single number), and, if `whole`, without
    fractions.

    Raises:
        ValueError: they are something else, not finite, masked, or out of the range; it begins with the name.
    """
    try:
        array = np.asarray(values)
    except (TypeError, ValueError, RuntimeError) as error:  # ragged lists, tensors with gradients
        raise ValueError(f"{name}: expected an array of real numbers: {error}") from None
    if np.ma.is_masked(values) or array.dtype.kind not in "biuf":
        kind = "masked ones" if np.ma.is_masked(values) else f"values of type {array.dtype}"
        raise ValueError(f"{name}: expected real numbers, got {kind}")
    array = np.asarray(array, dtype=float)
    if array.size < least or (axes is not None and array.ndim != axes):
        kind = {None: "an array", 0: "one number", 1: "a vector"}.get(axes, f"an array of {axes} axes")
        many = "" if axes == 0 else f" of at least {least} number{'s' * (least > 1)}"
        raise ValueError(f"{name}: expected {kind}{many}, got shape {array.shape}")
    good, kind = np.isfinite(array), "whole" if whole else "finite"
    wanted = f"a {kind} number" if axes == 0 else f"{kind} numbers"
    for limit, words, holds in (
        (above, "above", np.greater),
        (at_least, "of at least", np.greater_equal),
        (below, "below", np.less),
        (at_most, "up to", np.less_equal),
    ):
        if limit is not None:
            good &= holds(array, limit)
            wanted += f" {words} {limit:g}"
    if whole:
        good &= np.rint(array) == array
    if not good.all():
        raise ValueError(f"{name}: expected {wanted}, got {array[~good][0]:g}")
    return array


def number(name: str, value: ArrayLike, **limits: float | None) -> float:
    """Return one number; its limits are those of `numbers`."""
    return float(numbers(name, value, axes=0, **limits))  # type: ignore[arg-type]


def count(name: str, value: ArrayLike, least: int = 1) -> int:
    """Return a whole number that is at least so large."""
    return int(numbers(name, value, axes=0, whole=True, at_least=least))


def broadcast(**arrays: Array) -> list[Array]:
    """Return arrays, given by name, broadcast against each other; ValueError if their shapes do not fit."""
    try:
        shape = np.broadcast_shapes(*(array.shape for array in arrays.values()))
    except ValueError:
        shapes = ", ".join(f"{name} {array.shape}" for name, array in arrays.items())
        raise ValueError(f"{', '.join(arrays)}: shapes do not fit: {shapes}") from None
    return [np.broadcast_to(array, shape) for array in arrays.values()]
