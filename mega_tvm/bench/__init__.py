"""mega_tvm against other libraries, in one process run: ``python -m mega_tvm.bench --help``.

Importing this package loads no library: the thread count must be fixed before any is.
"""
