"""Parts of ``benchmarks/uses.py``, one file a use."""
