"""Tiles of `bidirectional_gla`'s kernels in Gluon: from memory to shared memory, and back."""

from triton.experimental import gluon
from triton.experimental.gluon import language as gl
from triton.experimental.gluon.language.nvidia.hopper import async_copy


@gluon.jit
def copy_rows(to, p, stride, n, at: gl.constexpr, D: gl.constexpr, z=0):
    """Starts the copy of rows 0..64 of (n, D) at p to shared memory; zeros beyond n rows.

    In a loop z is a zero that the compiler does not know: it would else keep all addresses.
    """
    rows = gl.arange(0, 64, layout=gl.SliceLayout(1, at))[:, None] + z
    cols = gl.arange(0, D, layout=gl.SliceLayout(0, at))[None, :]
    # The columns' mask is always true, but gives the mask the shape that the copy asks for.
    mask = (rows < n) & (cols < D)
    async_copy.async_copy_global_to_shared(to, p + (rows * stride + cols), mask=mask)


@gluon.jit
def write_rows(x, through, p, stride, n, at: gl.constexpr, D: gl.constexpr, z=0):
    """Stores (64, D) bfloat16 in whole rows, by way of shared memory."""
    through.store(x)
    store_rows(through, p, stride, n, at, D, z)


@gluon.jit
def store_rows(x, p, stride, n, at: gl.constexpr, D: gl.constexpr, z=0):
    """Stores the first n rows of a (64, D) tile in shared memory."""
    rows = gl.arange(0, 64, layout=gl.SliceLayout(1, at))[:, None] + z
    cols = gl.arange(0, D, layout=gl.SliceLayout(0, at))[None, :]
    gl.store(p + (rows * stride + cols), x.load(at), mask=(rows < n) & (cols < D))


@gluon.jit
def held(x):
    """float32 x, computed here: the compiler would delay it, and hold what it is made of."""
    return gl.inline_asm_elementwise(
        'mov.b32 $0, $1;', '=r,r', [x], gl.float32, is_pure=False, pack=1
    )


@gluon.jit
def held_pairs(x):
    """As `held`, for bfloat16."""
    return gl.inline_asm_elementwise(
        'mov.b32 $0, $1;', '=r,r', [x], gl.bfloat16, is_pure=False, pack=2
    )
