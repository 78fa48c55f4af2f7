"""The primitives by kind: which act element by element, and which only move elements about.

Transforms nothing. Limits: primitives are known by name, since some are exported nowhere.
"""

ELEMENTWISE: frozenset[str] = frozenset(
    """
    abs acos acosh add add_any and asin asinh atan atan2 atanh bessel_i0e bessel_i1e cbrt ceil clamp
    convert_element_type copy cos cosh digamma div eq erf erf_inv erfc exp exp2 expm1 floor ge gt integer_pow
    is_finite le lgamma log log1p logistic lt max min mul ne neg nextafter not or pow reduce_precision rem round
    rsqrt select_n sign sin sinh sqrt square sub tan tanh threshold xor
    """.split()
)
"""One output element from one element of each operand."""

VIEWS: frozenset[str] = frozenset(
    """
    broadcast_in_dim concatenate dynamic_slice dynamic_update_slice expand_dims gather pad reshape rev select_n slice
    split squeeze stack tile transpose unstack
    """.split()
)
"""0/1 linear maps in the operands that `VIEW_DATA` allows to be unknown; all others must be known."""

VIEW_DATA: dict[str, slice] = {
    "concatenate": slice(0, None),
    "dynamic_update_slice": slice(0, 2),
    "pad": slice(0, 1),
    "select_n": slice(1, None),
    "stack": slice(0, None),
}
"""Which operands of a view carry data (the first alone, where nothing is said); others are indices or predicates."""

ONE_TO_ONE: frozenset[str] = frozenset(
    "concatenate expand_dims reshape rev split squeeze stack transpose unstack".split()
)
"""The views that show every element exactly once (over all their outputs), so that no copies need be counted."""


AFFINE: frozenset[str] = frozenset("add add_any sub neg mul div convert_element_type copy".split())
"""Elementwise operations that may be affine in their unknown operands."""

REDUCTIONS: frozenset[str] = frozenset(
    "reduce_sum reduce_max reduce_min reduce_prod cumsum cumprod cummax cummin cumlogsumexp".split()
)
"""Reductions along axes, and what accumulates along one."""

FLAT: tuple[str, ...] = ("argmax", "argmin", "sign", "threshold", "round", "floor", "ceil")
"""Operations whose derivative JAX defines but which is zero or blind almost everywhere: no rule to solve with."""

OWN_DERIVATIVE: tuple[str, ...] = ("custom_vjp_call", "custom_vjp_call_jaxpr", "custom_jvp_call")
"""Calls of functions with `jax.custom_vjp` or `jax.custom_jvp`."""

PROGRAMS: tuple[str, ...] = ("cond", "scan", *OWN_DERIVATIVE)
"""Operations that are functions. Integers and predicates that they read stay as the forward pass has them."""
