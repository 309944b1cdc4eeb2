"""Faster fp32 matrix products on Linux: MLX's wheel calls a plain BLAS there, NumPy's wheel brings a tuned one.

A library that is loaded before all others gives the one's name to the other's function. It is for programs that tests
start, and only saves time.
"""

import subprocess
import sys
from pathlib import Path

import numpy as np

_SOURCE = """
#include <stdint.h>
void scipy_cblas_sgemm64_(int, int, int, int64_t, int64_t, int64_t, float, const float *, int64_t, const float *,
                          int64_t, float, float *, int64_t);
void cblas_sgemm(int order, int ta, int tb, int m, int n, int k, float alpha, const float *a, int lda, const float *b,
                 int ldb, float beta, float *c, int ldc) {
  scipy_cblas_sgemm64_(order, ta, tb, m, n, k, alpha, a, lda, b, ldb, beta, c, ldc);
}
"""


def preloaded(folder: Path) -> dict[str, str]:
    """Variables for a process whose products shall be fast; none where that cannot be made."""
    tuned = next((Path(np.__file__).parents[1] / "numpy.libs").glob("libscipy_openblas64_*"), None)
    if tuned is None or sys.platform != "linux":
        return {}
    source, library = folder / "products.c", folder / "products.so"
    source.write_text(_SOURCE)
    command = [sys.executable, "-m", "ziglang", "cc", "-shared", "-fPIC", "-O2", "-o", str(library), str(source)]
    built = subprocess.run([*command, str(tuned), f"-Wl,-rpath,{tuned.parent}"], capture_output=True, check=False)
    return {"LD_PRELOAD": str(library)} if built.returncode == 0 else {}
