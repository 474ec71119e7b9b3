"""Random inputs of a bundle's component."""

import numpy as np

from runtime.bundle.directory import Bundle

SIZES = {"batch": 2, "image_tokens": 16, "text_tokens": 16, "tokens": 32}


def inputs(bundle: Bundle, component: str, seed: int = 0, **sizes: int) -> dict[str, np.ndarray]:
    """Random inputs of a component; named dimensions from `sizes`."""
    sizes = SIZES | sizes
    rng, made = np.random.default_rng(seed), {}
    for name, row in bundle.component(component)["inputs"].items():
        shape = [sizes.get(dim, 8) if isinstance(dim, str) else dim for dim in row["shape"]]
        if row["dtype"] == "int64":
            made[name] = rng.integers(0, 40, shape)
        else:
            made[name] = rng.standard_normal(shape).astype(row["dtype"])
    return made
