"""Real processes, faults by seed, an observer at the destination and a judge: `python tests/chaos/run.py --help`."""
