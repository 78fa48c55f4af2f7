r"""Sets for hard constraints on parameters: each maps an array to the nearest array of the set.

`train(..., constraints=[(where, set)])` holds the picked parameters in the set: the returned model satisfies the
constraint exactly, in its own dtype. What "exactly" means:

- zeros, signs, bounds, orders and levels hold without any error (bounds and levels as the dtype rounds them);
- norms, sums, ranks and orthonormality hold up to the rounding of the entries (relative $2^{-8}$ for bfloat16, and
  $10^{-6}$ for float32), and a ball's radius is never exceeded by more than $10^{-6}$. An array that is in the set to
  that accuracy is returned as it is.

Where a set has an argument `axis`, every slice along that axis is in the set: `axis=-1` means each row of a matrix by
itself, a tuple of axes means their entries together, and `None` all entries of the array together. [`Intersection`][]
makes one set of several, and [`Together`][] holds several arrays in one.
"""

from ._base import AbstractSet as AbstractSet
from ._entries import Box as Box
from ._entries import NonNegative as NonNegative
from ._entries import Quantized as Quantized
from ._entries import Sparse as Sparse
from ._joint import Intersection as Intersection
from ._joint import Together as Together
from ._matrices import LowRank as LowRank
from ._matrices import Orthogonal as Orthogonal
from ._matrices import SpectralBall as SpectralBall
from ._slices import Equal as Equal
from ._slices import L1Ball as L1Ball
from ._slices import L2Ball as L2Ball
from ._slices import Monotone as Monotone
from ._slices import Simplex as Simplex
from ._slices import Sphere as Sphere
