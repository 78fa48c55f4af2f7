r"""`threshold`: a step from -1 to 1 at zero, which as a constraint asks for a margin.

Transforms a call into one equation of a primitive of its own. It is evaluated, batched and differentiated as the step
function that it is; its derivative is zero. Limits: real arrays; the margin is a number, known while tracing.
"""

from __future__ import annotations

from typing import Any

import jax
import jax.core
import jax.numpy as jnp
from jax.extend.core import Primitive
from jax.interpreters import ad, batching, mlir
from jaxtyping import Array, ArrayLike

from .._errors import as_number, described

threshold_p = Primitive("threshold")


def _step(s: Array, *, margin: float) -> Array:
    one = jnp.ones((), s.dtype)
    return jnp.where(jnp.isnan(s), s, jnp.where(s >= 0, one, -one))


def _jvp(primals, tangents, *, margin):
    out = threshold_p.bind(*primals, margin=margin)
    return out, jnp.zeros_like(out)


threshold_p.def_impl(jax.jit(_step, static_argnames="margin"))
threshold_p.def_abstract_eval(lambda s, *, margin: jax.core.ShapedArray(s.shape, s.dtype))
batching.defvectorized(threshold_p)
ad.primitive_jvps[threshold_p] = _jvp
mlir.register_lowering(threshold_p, mlir.lower_fun(_step, multiple_results=False))


def threshold(s: ArrayLike, *, margin: Any = 1.0) -> Array:
    r"""The step function with the values -1 and 1, elementwise.

    As a function it is $y = 1$ for $s \ge 0$ and $y = -1$ below, with a derivative of zero; a NaN stays one. In the
    gradient regime it is a jump, like `jnp.sign`. As a constraint of the projection regime it asks for more:

    $$y \in \{-1, 1\}, \qquad y\, s \ge \text{margin}.$$

    Of a product, `threshold(w @ x + b)` is *one* constraint for each output, on the weights, the inputs and the output
    together: see Elser and Lal, "Learning with Boolean threshold functions" (arXiv 2602.17493). With $m$ inputs of
    $\pm 1$ and weights on the sphere $|w|^2 = m$, they take the margin $\sqrt{m/\sigma}$ with $\sigma = 3$.

    **Arguments:**

    - `s`: `Float[Array, "*shape"]`.
    - `margin`: a finite number, zero or above.

    **Returns:** `Float[Array, "*shape"]`.

    !!! example

        ```python
        def loss(weights, x, y):  # a constant is an input like the others
            for w in weights:
                x = jnp.concatenate([x, jnp.ones((len(x), 1))], 1)
                x = eqxproj.threshold(x @ w.T, margin=(w.shape[1] / 3) ** 0.5)
            return jnp.sum(eqxproj.losses.equal(x, y))


        spheres = [
            (lambda m, i=i: m[i], eqxproj.sets.Sphere(radius=w.shape[1] ** 0.5, axis=-1)) for i, w in enumerate(weights)
        ]
        problem = eqxproj.feasibility_problem(loss, weights, x, y, data="pinned", constraints=spheres)
        solver = eqxproj.RelaxedReflectReflect(beta=0.2, reweight=1e-3)
        solution = eqxproj.solve(problem, solver, steps=10_000, tol=1e-2, start="random", key=key)
        ```

    **Raises:** `ValueError` for another margin, `TypeError` for another dtype.
    """
    number = as_number(margin)
    if number is None or not 0 <= number < float("inf"):
        raise ValueError(f"`margin` must be a finite number, zero or above, got {described(margin)}.")
    array = jnp.asarray(s)
    if not jnp.issubdtype(array.dtype, jnp.floating):
        raise TypeError(
            f"`s` must be a floating-point array, got dtype {array.dtype}. Convert it, as by `s.astype(jnp.float32)`."
        )
    return threshold_p.bind(array, margin=number)
