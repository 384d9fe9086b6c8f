"""Load a compiled model and run it: ``python examples/run_model.py MODEL.so``.

Needs numpy, apache-tvm-ffi and TVM's runtime library; neither torch nor the compiler.
"""

import sys
import time

import numpy as np

import mega_tvm


def main() -> None:
    """Run each shape that the model was compiled for, once cold and then warm."""
    if len(sys.argv) != 2:
        sys.exit("usage: python examples/run_model.py MODEL.so")
    path = sys.argv[1]
    load = mega_tvm.load  # imported at its first use: not what is timed here
    start = time.perf_counter()
    model = load(path, num_threads=1)
    print(f"loaded {path} in {1e3 * (time.perf_counter() - start):.1f} ms")
    random = np.random.default_rng(0)
    for entry in model.entries:
        x = random.standard_normal(entry.input_shape, dtype=np.float32)
        start = time.perf_counter()
        y = model(x)
        cold = time.perf_counter() - start
        warm = []
        for _ in range(200):
            start = time.perf_counter()
            model(x)
            warm.append(time.perf_counter() - start)
        print(
            f"{list(x.shape)} -> {list(y.shape)}: first call {1e6 * cold:.0f} us, "
            f"then {1e6 * float(np.median(warm)):.0f} us (median of {len(warm)}); "
            f"y[0, :4] = {np.array2string(y[0, :4], precision=4)}"
        )


if __name__ == "__main__":
    main()
