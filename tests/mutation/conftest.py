"""Nothing here is a test, and cosmic-ray is installed by `make mutation` alone."""

collect_ignore = ["mutants.py", "run.py"]
