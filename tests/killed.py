"""What the processes of test_kills.py do; imports nothing that takes time, since each of them imports it."""

import os


def fit(home, log):
    os.environ["ALTER_HOME"] = home
    os.environ["OMP_NUM_THREADS"] = "1"
    descriptor = os.open(log, os.O_WRONLY | os.O_CREAT | os.O_APPEND)
    os.dup2(descriptor, 1)
    os.dup2(descriptor, 2)
    os.setsid()
    from alter.cli import main

    main(["fit", "--config", "recipe.yaml"])
