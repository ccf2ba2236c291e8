"""Parts of ``benchmarks/real.py``: its rows, what a row is measured with, how rows are shared out, its page."""
