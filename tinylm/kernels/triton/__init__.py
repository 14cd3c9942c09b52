"""The operators as Triton kernels, one file each; imported only where they are chosen.

Conventions of all kernels here: ``UPPER`` arguments are pointers, ``lower`` ones are numbers,
``UPPER: tl.constexpr`` ones are known when a kernel is compiled. All names begin with ``tinylm_``:
profilers show it, and `tinylm.kernels.turing` goes by it. Sums, statistics and softmax are fp32.
Nothing uses atomics, so that every result is the same, bit for bit, each time. Tiles come from
tables, not from trials at run time: a first call costs one compilation and no more.
"""
