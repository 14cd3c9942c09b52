"""The operators as C++ kernels for CPUs (``csrc/simd/training.hpp``), one file each: every kernel
makes one pass of several.

They are registered with torch like any others, so autograd, torch.compile and opcheck know them.
Here is checked what C++ only gets as addresses. Variants for AMX, for AVX-512 with bf16, for AVX2
and for any processor are chosen when they are called.
"""
