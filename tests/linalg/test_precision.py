"""The precision of products, in the text of programs for a GPU: DEFAULT is TF32 there, HIGHEST float32."""

import functools
import re

import jax
import jax.numpy as jnp
import pytest

import gum_optax as go
from gum_optax._linalg.orthonormal import lift, orthonormalize, outside, project

M, N, R = 24, 40, 8
G, P, S = (jax.ShapeDtypeStruct(shape, jnp.float32) for shape in ((M, N), (M, R), (R, N)))
KEY = jax.random.key(0)


def products(f, *arguments):
    """The precision and the dtype of each product with a side of length N, and of each other product."""
    text = jax.jit(f).trace(*arguments).lower(lowering_platforms=("cuda",)).as_text()
    found = {"long": set(), "short": set()}
    for line in text.splitlines():
        if "dot_general" in line:
            precision, shapes = re.search(r"precision = \[(\w+), \w+\].* : \((.*?)\) ->", line).groups()
            length = "long" if re.search(rf"\b{N}x|x{N}x", shapes) else "short"
            found[length].add((precision, re.search(r"x([a-z]+\d+)>", shapes)[1]))
    return found["long"], found["short"]


FAST, EXACT, HALF = {("DEFAULT", "f32")}, {("HIGHEST", "f32")}, {("DEFAULT", "bf16")}


@pytest.mark.parametrize(
    ("f", "arguments", "expected"),
    [
        (project, (P, G), (FAST, set())),
        (lift, (P, S), (FAST, set())),
        (outside, (P, G), (EXACT, set())),
        (orthonormalize, (P,), (set(), EXACT)),
        (go.newton_schulz, (G,), (FAST, FAST)),
        (functools.partial(go.newton_schulz, dtype=jnp.bfloat16), (G,), (HALF, HALF)),
        (go.gram_newton_schulz, (G,), (EXACT, EXACT)),
        (go.polar_by_products, (G,), (EXACT, EXACT)),
        (functools.partial(go.subspace_iteration, KEY), (G, P), (FAST, EXACT)),
        (functools.partial(go.sketched_subspace, KEY), (G, P), (FAST, EXACT)),
        (functools.partial(go.randomized_svd, KEY), (G, P), (FAST | EXACT, EXACT)),
    ],
)
def test_products_have_the_precision_that_the_page_names(f, arguments, expected):
    assert products(f, *arguments) == expected
