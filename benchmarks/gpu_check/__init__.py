"""One file per part of the check, the table of them in `parts.py`, what they share in `bench.py`, `bounds.py`, `apart.py` and `running.py`."""
