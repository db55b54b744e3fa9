"""A fuzzer: damaged and strange input through the programs, each case judged. `tools/fuzz.py` runs it."""
