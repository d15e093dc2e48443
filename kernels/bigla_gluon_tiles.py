"""What the kernels of `bidirectional_gla` in Gluon share: sizes, launch, layouts, tiles.

Key dim 32, value dim 64, chunks of 64 tokens, bfloat16, 4 warps.
"""

from triton.experimental import gluon
from triton.experimental.gluon import language as gl
from triton.experimental.gluon.language.nvidia.hopper import async_copy

CHUNK = 64
RESIDENT = 3  # programs a multiprocessor, with these options
LAUNCH = dict(num_warps=4, maxnreg=168)
OVERHEAD = 2  # of a program that walks a segment, in chunks; fits what was measured
C, K, V = gl.constexpr(CHUNK), gl.constexpr(32), gl.constexpr(64)
LOG2E = gl.constexpr(1.4426950408889634)
# Results of products in registers, K and V or C wide, and their left operands there.
KEYS = gl.constexpr(gl.NVMMADistributedLayout([3, 0], [4, 1], [16, 32, 16]))
TOKENS = gl.constexpr(gl.NVMMADistributedLayout([3, 0], [4, 1], [16, 64, 16]))
LEFT_KEYS = gl.constexpr(gl.DotOperandLayout(operand_index=0, parent=KEYS, k_width=2))
LEFT_TOKENS = gl.constexpr(gl.DotOperandLayout(operand_index=0, parent=TOKENS, k_width=2))
# Rows of memory, 16 bytes a thread, K and V or C wide.
ROWS_K = gl.constexpr(gl.BlockedLayout([1, 8], [8, 4], [4, 1], [1, 0]))
ROWS_V = gl.constexpr(gl.BlockedLayout([1, 8], [4, 8], [4, 1], [1, 0]))
# Shared memory, likewise.
NARROW = gl.constexpr(gl.NVMMASharedLayout(64, 16))
WIDE = gl.constexpr(gl.NVMMASharedLayout(128, 16))


@gluon.jit
def await_previous():
    """As in `launch.py`."""
    wait: gl.constexpr = 'griddepcontrol.wait; // $0'
    gl.inline_asm_elementwise(wait, '=r', [], gl.int32, is_pure=False, pack=1)


@gluon.jit
def segment_chunks(i_s, n_segments, n_chunks):
    """As in `bigla_tiles.py`."""
    each = n_chunks // n_segments
    longer = n_chunks % n_segments
    return i_s * each + gl.minimum(i_s, longer), each + gl.where(i_s < longer, 1, 0)


@gluon.jit
def copy_rows(to, p, stride, n, D: gl.constexpr, z=0):
    """Starts the copy of rows 0..64 of (n, D) at p to shared memory; zeros beyond n rows.

    In a loop z is a zero that the compiler does not know: it would else keep all addresses.
    """
    at: gl.constexpr = ROWS_K if D == 32 else ROWS_V
    rows = gl.arange(0, 64, layout=gl.SliceLayout(1, at))[:, None] + z
    cols = gl.arange(0, D, layout=gl.SliceLayout(0, at))[None, :]
    # The columns' mask is always true, but gives the mask the shape that the copy asks for.
    mask = (rows < n) & (cols < D)
    async_copy.async_copy_global_to_shared(to, p + (rows * stride + cols), mask=mask)


@gluon.jit
def write_rows(x, through, p, stride, n, D: gl.constexpr, z=0):
    """Stores (64, D) bfloat16 in whole rows, by way of shared memory; z as for `copy_rows`."""
    through.store(x)
    store_rows(through, p, stride, n, D, z)


@gluon.jit
def store_rows(x, p, stride, n, D: gl.constexpr, z=0):
    """Stores the first n rows of a (64, D) tile in shared memory."""
    at: gl.constexpr = ROWS_K if D == 32 else ROWS_V
    rows = gl.arange(0, 64, layout=gl.SliceLayout(1, at))[:, None] + z
    cols = gl.arange(0, D, layout=gl.SliceLayout(0, at))[None, :]
    gl.store(p + (rows * stride + cols), x.load(at), mask=(rows < n) & (cols < D))


@gluon.jit
def decayed(x, bits):
    """x times 2 to the `bits`, bfloat16."""
    return x * gl.exp2(bits).to(gl.bfloat16)


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
